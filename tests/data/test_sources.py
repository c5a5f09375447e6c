"""Tests how a path is opened: the format is detected from the file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpo_ext.data import (
    BadLine,
    Pair,
    open_pairs,
)

TEXT_ONLY = {"question": "1 + 1?", "chosen": "2", "rejected": "3"}


def test_the_format_is_detected(mmpr: Path, tmp_path: Path) -> None:
    subset = tmp_path / "multi.jsonl"
    source = open_pairs(subset, root=tmp_path / "images")
    assert source.format == "mmpr"
    assert source.pairs[0].images[0] == str(tmp_path / "images/a.png")
    (tmp_path / "bad.jsonl").write_bytes(b"{\n[]\n")
    with pytest.raises(ValueError, match=r"path must hold one JSON object per line, got .*bad.jsonl:1: bad JSON"):
        open_pairs(tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match="path must exist"):
        open_pairs(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"format must be one of mmpr, pairs, .*, hf, got 'csv'"):
        open_pairs(mmpr, format="csv")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "format"), [({"images": ["a.png"]}, "pairs"), ({"image": "a.png"}, "mmpr"), ({}, "mmpr")]
)
def test_the_first_distinctive_line_decides_the_format(fields: dict[str, Any], format: str, tmp_path: Path) -> None:
    lines = [TEXT_ONLY, {**TEXT_ONLY, "answer_gt": "2"}, {**TEXT_ONLY, **fields}, TEXT_ONLY]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_pairs(tmp_path / "p.jsonl")
    assert source.format == format
    pairs = [pair for _, pair in source.scan()]
    assert [len(pair.images) for pair in pairs if isinstance(pair, Pair)] == [0, 0, len(fields), 0]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"image": "a.png"}, {"images": ["b.png"]}, "named by 'image', got 'images' .*--from pairs"),
        ({"images": ["b.png"]}, {"image": "a.png"}, "named 'images', got 'image' 'a.png'.*--from mmpr"),
    ],
)
def test_a_line_of_another_format_is_a_bad_line_and_loses_no_image_silently(
    first: dict[str, Any], second: dict[str, Any], words: str, tmp_path: Path
) -> None:
    lines = [TEXT_ONLY, {**TEXT_ONLY, **first}, {**TEXT_ONLY, **second}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good, bad = [result for _, result in open_pairs(tmp_path / "p.jsonl").scan()][1:]
    assert isinstance(good, Pair)
    assert len(good.images) == 1
    assert isinstance(bad, BadLine)
    assert re.search(words, bad.reason)


def test_a_distinctive_field_after_1000_lines_is_an_error_and_loses_no_image(tmp_path: Path) -> None:
    lines = [TEXT_ONLY] * 1000 + [{**TEXT_ONLY, "images": ["a.png"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_pairs(tmp_path / "p.jsonl")
    assert source.format == "mmpr"
    with pytest.raises(BadLine, match="--from pairs"):
        source.pairs[1000]
    assert open_pairs(tmp_path / "p.jsonl", format="pairs").pairs[1000].images == ("a.png",)
