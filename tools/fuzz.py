"""Runs coverage-guided fuzzing with atheris: ``python tools/fuzz.py TARGET [CORPUS] [-max_total_time=3600]``.

TARGET names the code that reads the random bytes: answers, pairs, recipes, images or journals. If an input breaks a
rule of the target, libFuzzer writes the input into the current folder, and the run ends. Run ``pip install atheris``
first.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("tools/fuzz.py needs atheris: pip install atheris")

with atheris.instrument_imports(include=["mpo_ext"]):
    from mpo_ext.answers import STYLES, extract_answer, matcher
    from mpo_ext.answers.matchers import MATCHERS
    from mpo_ext.answers.math_process import MathProcess
    from mpo_ext.data.formats import FORMATS
    from mpo_ext.data.reader import BadLine
    from mpo_ext.data.records import Pair
    from mpo_ext.data.sources import open_pairs
    from mpo_ext.images import ImageError, load_image
    from mpo_ext.journal import Journal, read_records
    from mpo_ext.train.recipe import load_recipe

_SECONDS = 1.0
_FOLDER = Path(tempfile.mkdtemp(prefix="mpo-fuzz-"))
_KINDS = [kind for kind in MATCHERS if kind not in ("custom", "any")]


def answers(content: bytes) -> None:
    """Checks that extracting and comparing the answer of a response never raises an error or takes long."""
    text = content.decode("utf-8", "replace")
    response, _, truth = text.partition("\0")
    start = time.process_time()
    extracted = {extract_answer(response, style) for style in STYLES} | {response}
    for kind in _KINDS:
        rule = matcher(kind)
        for answer in extracted - {None, ""}:
            verdict = rule(answer, truth or "7")
            assert verdict.correct in (True, False, None)
    assert time.process_time() - start < _SECONDS * len(_KINDS), "takes too long"


def pairs(content: bytes) -> None:
    """Checks that each line of a pair file gives a Pair or a BadLine. An unreadable file must raise ValueError."""
    path = _FOLDER / f"p{('.jsonl', '.json', '.csv')[content[:1][0] % 3 if content else 0]}"
    path.write_bytes(content[2:])
    formats = [name for name in FORMATS if name != "hf"]
    number = content[1] % (len(formats) + 1) if len(content) > 1 else 0
    try:
        source = open_pairs(path, format=None if number == len(formats) else formats[number])  # type: ignore[arg-type]
        for _, pair in source.scan():
            assert isinstance(pair, (Pair, BadLine))
    except ValueError:
        pass


def recipes(content: bytes) -> None:
    """Checks that a recipe stays the same when it is written and read again.

    A bad recipe must raise ValueError or TypeError.
    """
    path = _FOLDER / "r.yaml"
    path.write_bytes(content)
    try:
        recipe = load_recipe(path)
    except (TypeError, ValueError):
        return
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe, "must be the same after it was written"


def images(content: bytes) -> None:
    """Checks that an image file is decoded to an RGB image. An unusable file must raise ImageError."""
    try:
        image = load_image(content)
    except ImageError:
        return
    assert image.mode == "RGB"


def journals(content: bytes) -> None:
    """Checks that a journal (an append-only file of results) keeps its records when a record is appended.

    ``Journal`` may refuse a damaged file with ValueError. It may then have removed an incomplete last line, but must
    not have changed anything else.
    """
    path = _FOLDER / "journal.jsonl"
    path.write_bytes(content)
    try:
        with Journal(path, {"a": 1}) as journal:
            kept = sum(1 for _ in journal.records())
            journal.append([{"key": "x"}])
        records = list(read_records(path))
        assert len(records) == kept + 1
        assert records[-1] == {"key": "x"}
    except ValueError:
        # A journal with other settings loses only an incomplete last line.
        assert content.startswith(path.read_bytes())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "answers": answers, "pairs": pairs, "recipes": recipes, "images": images, "journals": journals,
}  # fmt: skip


def main() -> None:
    """Fuzzes the target that is named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python tools/fuzz.py {{{','.join(TARGETS)}}} [CORPUS] [-max_total_time=SECONDS]")
    warnings.simplefilter("ignore")
    sys.stdout = io.StringIO()
    os.environ.setdefault("MPO_MAX_IMAGE_PIXELS", str(1 << 22))
    # The helper process of the matcher "math" has its own limit of time, and is not instrumented.
    MathProcess.compare = lambda *arguments: "unfinished"  # type: ignore[method-assign,assignment]
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
