"""Checks a model's processor and chat template without its weights, for ``mpo-ext doctor`` and ``data check``."""

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpo_ext.cli.shared import chat_options, engine_options

_SEARCHED_PAIRS = 1000  # maximum number of pairs that are searched for a pair with images
_PROVED_PAIRS = 3
_REASONS = 5  # maximum number of reasons in a message


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessorReport:
    """The result of checking a model's processor.

    Attributes:
        facts: Tuples (name, value) about the processor and the chat template.
        lines: Lines of text that show the encoded pairs.
        problems: Reasons why training with this processor would be wrong or would fail.
        warnings: Findings that may make training worse, such as text that the tokenizer does not know.
    """

    facts: tuple[tuple[str, str], ...]
    lines: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("lines", "problems", "warnings")}
        return {"facts": dict(self.facts), **lists}

    def text_lines(self) -> Iterator[str]:
        """Yields the facts, the encoded pairs and the warnings as lines of text."""
        yield from (f"{name:<20}{fact}" for name, fact in self.facts)
        yield from self.lines
        yield from (f"WARNING: {warning}" for warning in self.warnings)


def check_processor(
    args: argparse.Namespace, model: str, pairs: Iterable[tuple[Any, str]] | None = None
) -> ProcessorReport:
    """Encodes up to three pairs with the trainer's encoder, and compares the token ids with the processor's output.

    Args:
        args: Arguments with the options of ``add_chat``.
        model: Folder of a model, of a run or of adapters, or a name on the hub.
        pairs: Tuples (pair, name). The first usable pairs are encoded. Messages refer to a pair by ``name``. Image
            paths must be absolute. None: an example pair without an image. If the model takes images, also an example
            pair with an image.

    Raises:
        ImportError: If a package is missing.
        OSError: If a file cannot be read.
        ValueError: If the model, or its chat template, cannot be used.
    """
    from mpo_ext.evaluate.models import find_model
    from mpo_ext.processors import load_without_weights
    from mpo_ext.train.encode import Encoder
    from mpo_ext.train.proof import prove
    from mpo_ext.train.unknown_tokens import find_unknown

    source = find_model(model)
    path = source.path
    loaded = load_without_weights(path, **{"revision": source.revision, **engine_options(args)})
    encoder = Encoder(
        loaded.processor,
        max_length=None,
        image_token_id=getattr(loaded.config, "image_token_id", None),
        stop_ids=loaded.stop_ids,
        embedding_rows=loaded.embedding_rows,
        **chat_options(args),
    )
    facts = tuple(_facts(path, loaded, encoder.chat))
    with tempfile.TemporaryDirectory() as folder:
        if pairs is None:
            first = list(_examples(Path(folder), has_images=encoder.chat.is_multimodal))
        else:
            first = _first(pairs)
        proof = prove(encoder, first, count=_PROVED_PAIRS)
    problems = [*proof.problems, *(proof.skipped if pairs is None else ())]
    if not proof.pairs:
        reasons = [f"{count:,} x {reason}" for reason, count in proof.reasons.items()]
        problems.append(f"no pair could be encoded: {'; '.join(reasons[:_REASONS]) or 'the data has no valid pair'}")
    unknown = find_unknown(encoder.chat, first)
    return ProcessorReport(facts, tuple(proof.lines()), tuple(problems), () if unknown is None else (str(unknown),))


def good_pairs(source: Any) -> Iterator[tuple[Any, str]]:
    """Yields (pair, location) for each valid pair of a ``PairSource``. ``location`` is a text with file and line."""
    from mpo_ext.data.reader import BadLine

    for where, pair in source.scan():
        if not isinstance(pair, BadLine):
            yield pair, str(where)


def _first(pairs: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Returns the first ``_SEARCHED_PAIRS`` entries of ``pairs``.

    If any of them has images or videos, the first such entry is moved to the front.
    """
    searched = list(itertools.islice(pairs, _SEARCHED_PAIRS))
    with_images = next((entry for entry in searched if entry[0].media_paths), None)
    return (
        searched if with_images is None else [with_images, *(entry for entry in searched if entry is not with_images)]
    )


def _examples(folder: Path, *, has_images: bool) -> Iterator[tuple[Any, str]]:
    """Yields (pair, name) tuples of example pairs. ``name`` denotes the pair in messages.

    Yields a pair without images. With ``has_images``, also yields a pair with an image, and writes the image to
    ``folder``.
    """
    from mpo_ext.data.records import Pair

    yield Pair("What is larger, 2 or 3?", "3", "2"), "a question"
    if has_images:
        from PIL import Image

        path = folder / "image.png"
        Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(path)
        yield Pair("<image>\nHow many colours are there?", "1", "2", images=(str(path),)), "an image"


def _facts(path: str, loaded: Any, chat: Any) -> Iterator[tuple[str, str]]:
    tokenizer = chat.tokenizer
    yield "model", f"{path} ({', '.join(loaded.config.architectures or [loaded.config.model_type])})"
    image_processor = getattr(loaded.processor, "image_processor", None)
    names = [type(part).__name__ for part in (loaded.processor, image_processor) if part is not None]
    yield "processor", ", ".join(names)
    template = chat.chat_template
    yield (
        "chat template",
        "none: a prompt is the question and a line break" if template is None else (f"{len(template):,} characters"),
    )
    yield "end of a turn", _token(tokenizer, chat.end_id)
    yield "sampling stops at", ", ".join(_token(tokenizer, token) for token in sorted(chat.stop_ids))
    if chat.end_id not in loaded.stop_ids:
        yield "", "the end of a turn is not in generation_config.json: other programs may not stop there"
    ids = sorted(tokenizer.get_vocab().values())
    rows = loaded.embedding_rows
    yield "token ids", f"up to {ids[-1]:,}; the embedding has {'an unknown number of' if rows is None else rows} rows"
    if rows is not None and ids[-1] >= rows:
        beyond = [token for token in ids if token >= rows]
        first = _token(tokenizer, beyond[0])
        yield "", f"{len(beyond):,} of the ids have no row, the first is {first}: pairs with them are refused"


def _token(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"
