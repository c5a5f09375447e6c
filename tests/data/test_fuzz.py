"""Tests hostile files: every line gives a pair, or is counted as bad with a reason.

MPO_FUZZ_CASES sets the number of examples. Every run draws the same examples.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.data.containers import _REFUSED
from mpo_ext.data.convert import convert
from mpo_ext.data.mmpr import to_line

CASES = int(os.environ.get("MPO_FUZZ_CASES", "200"))
MAX_LINE_BYTES = 2000
KINDS = {"huge line", "bad UTF-8", "bad JSON", "bad field", "bad image path", "no image", "image in response"}
KINDS |= {"video or audio", "unread field", "tools"}
CHECKED = KINDS | {"missing image", "broken image", "placeholders", "equal responses", "duplicate", "answer_gt"}
CHECKED |= {"wrong length", "empty question", "empty chosen", "empty rejected"}

TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["<image>", "<image>\nq", "\ud800", "\0", "</script>", "同"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PATHS = st.one_of(
    st.sampled_from(
        ["a.png", "broken.png", "none.png", "../a.png", "/etc/passwd", "", ".", "a/../a.png", "x\0", "~/a"]
    ),
    st.text(alphabet="./\\a\0~", max_size=8),
)
IMAGES = st.one_of(PATHS, st.lists(PATHS, max_size=3), JSON)
FIELDS = {
    "question": st.one_of(TEXTS, JSON),
    "chosen": st.one_of(TEXTS, JSON),
    "rejected": st.one_of(TEXTS, JSON),
    "image": IMAGES,
    "images": IMAGES,
    "prompt": st.one_of(TEXTS, JSON),
    "answer_gt": st.one_of(TEXTS, JSON),
    "provenance": st.one_of(JSON, st.just("{}")),
    "extra": st.one_of(JSON, st.fixed_dictionaries({"$source": JSON})),
    "$source": JSON,
}
GOOD = st.fixed_dictionaries({"question": TEXTS, "chosen": TEXTS, "rejected": TEXTS}, optional={"image": PATHS})


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Draws one line without a newline: valid JSON, damaged JSON, or random bytes."""
    values = draw(st.one_of(GOOD, st.fixed_dictionaries({}, optional=FIELDS), JSON))
    raw = json.dumps(values, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    damage = draw(st.sampled_from(["none"] * 4 + ["cut", "byte", "huge", "random", "deep", "twice", "digits"]))
    if damage == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif damage == "byte" and raw:
        position = draw(st.integers(0, len(raw) - 1))
        raw = raw[:position] + bytes([draw(st.integers(0, 255))]) + raw[position + 1 :]
    elif damage == "huge":
        raw = raw + b" " * MAX_LINE_BYTES
    elif damage == "random":
        raw = draw(st.binary(max_size=40))
    elif damage == "deep":
        raw = b"[" * 900 + b"]" * draw(st.integers(0, 900))
    elif damage == "twice":
        raw = b'{"chosen": "a", "chosen": "b", "question": "q", "rejected": "r"}'
    elif damage == "digits":
        raw = b'{"question": "q", "chosen": "c", "rejected": "r", "n": %s}' % draw(
            st.sampled_from([b"9" * 1500, b"1e999"])
        )
    return raw.replace(b"\n", b"").replace(b"\r", b"")


@settings(max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(lines(), max_size=6),
    st.sampled_from(["mmpr", "pairs", "trl"]),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
)
def test_no_line_is_lost_and_none_crashes_a_reader(content: list[bytes], format: Any, end: bytes, ends: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        root.mkdir()
        Image.new("RGB", (2, 2)).save(root / "a.png")
        (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        Image.new("RGB", (2, 2)).save(Path(folder, "a.png"))  # a path that leaves the root would find this file
        path = Path(folder, "p.jsonl")
        path.write_bytes(end.join(content) + (end if ends else b""))
        if path.read_bytes().startswith(tuple(_REFUSED)):  # hypothesis takes constants from the source of the reader
            with pytest.raises(ValueError, match="path must be a file of rows"):
                open_pairs(path, format=format, root=root)
            return
        if path.read_bytes().startswith(b"PAR1"):
            with pytest.raises(ValueError, match="path must hold parquet files"):
                open_pairs(path, format=format, root=root)
            return
        source = open_pairs(path, format=format, root=root, max_line_bytes=MAX_LINE_BYTES)
        entries = list(source.pairs.scan())

        written = [line for line in content if line]
        assert len(entries) == len(source.pairs) == len(written)
        for (where, result), raw in zip(entries, written, strict=True):
            if isinstance(result, BadLine):
                assert result.kind in KINDS
                assert result.reason
                assert result.where == where
                assert (result.kind == "huge line") == (
                    len(raw) > MAX_LINE_BYTES - 2 * len(end) and "huge" in result.kind
                )
            else:
                assert all(isinstance(text, str) for text in (result.question, result.chosen, result.rejected))
                if format == "mmpr":
                    assert all(os.path.normpath(image).startswith(f"{root}/") for image in result.images)
                    assert json.loads(to_line(result, str(root))) == json.loads(raw.decode("utf-8-sig"))

        bad = sum(isinstance(result, BadLine) for _, result in entries)
        report = check_pairs(source)
        assert set(report.totals()) <= CHECKED
        assert sum(report.totals()[kind] for kind in KINDS) == bad
        assert sum(stats.pairs for stats in report.stats.values()) == len(written) - bad
        assert sum(stats.skipped for stats in report.stats.values()) == bad

        count, skipped = convert(source, Path(folder, "out.jsonl"), "pairs", skip_bad=True)
        assert (count, skipped.total) == (len(written) - bad, bad)
        again = list(open_pairs(Path(folder, "out.jsonl"), format="pairs").pairs)
        assert again == [pair for _, pair in source.scan() if isinstance(pair, Pair)]
