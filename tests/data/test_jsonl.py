"""Tests JSONL files: reading, skipped lines and memory."""

import contextlib
import dataclasses
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest
from mmpr_files import PAIR

from mpo_ext.data import (
    BadLine,
    Pair,
    Skipped,
    read_pairs,
    write_pairs,
)


def test_pairs_survive_writing_and_reading(tmp_path: Path) -> None:
    pairs = [
        PAIR,
        Pair(
            '問\n"q"\u2028',
            "c\r\n",
            "\t",
            ("a", "/b"),
            "",
            {"cut": {"characters": 3}},
            {"x": [1.5, None, {"y": 2**70}]},
        ),
    ]
    assert write_pairs(tmp_path / "p.jsonl", iter(pairs)) == 2
    assert list(read_pairs(tmp_path / "p.jsonl")) == pairs


def test_empty_lines_a_byte_order_mark_and_a_missing_newline_are_accepted(tmp_path: Path) -> None:
    line = json.dumps(PAIR.to_dict()).encode()
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n\r\n" + line + b"\n\n" + line)
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert list(pairs) == [PAIR] * 3
    assert [pairs.locate(index).line for index in range(3)] == [1, 4, 6]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert len(read_pairs(tmp_path / "empty.jsonl")) == 0
    assert list(read_pairs(tmp_path / "empty.jsonl").scan()) == []


def test_skipped_lines_are_counted_with_their_reasons(tmp_path: Path) -> None:
    line = json.dumps(PAIR.to_dict()).encode()
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([line, b"{", line, b"[]", b"{}"] + [b"x"] * 9))
    pairs, skipped = read_pairs(tmp_path / "p.jsonl"), Skipped(keep=2)
    assert list(pairs.good(skipped)) == [PAIR] * 2
    assert skipped.counts == {"bad JSON": 10, "bad field": 2}
    assert [bad.where.line for bad in skipped.examples["bad JSON"]] == [2, 6]
    assert next(skipped.lines()) == "skipped 10: bad JSON"
    with pytest.raises(BadLine, match=r"p.jsonl:2: bad JSON"):
        list(pairs)


def test_a_reader_works_in_another_process(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", [dataclasses.replace(PAIR, question=str(index)) for index in range(50)])
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert pairs[7].question == "7"
    assert pickle.loads(pickle.dumps(pairs))[8].question == "8"
    bad = BadLine(pairs.locate(0), "bad JSON", "why")
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", [PAIR] * 3)
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert len(pairs) == 3
    os.truncate(tmp_path / "p.jsonl", 10)
    with pytest.raises(RuntimeError, match="must not change while it is read"):
        pairs[2]


@pytest.mark.parametrize("lines", [100_000])
def test_memory_stays_flat_over_a_long_file(lines: int, tmp_path: Path) -> None:
    line = json.dumps({**PAIR.to_dict(), "chosen": "c" * 400}).encode() + b"\n"
    with open(tmp_path / "p.jsonl", "wb") as file:
        for _ in range(lines // 1000):
            file.write(line * 1000)
    tracemalloc.start()
    with contextlib.closing(read_pairs(tmp_path / "p.jsonl")) as pairs:
        assert len(pairs) == lines
        assert pairs[lines - 1] == pairs[lines // 2] == pairs[0]
        assert sum(1 for index in range(0, lines, 50) if pairs[index].chosen) == lines // 50
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "p.jsonl").stat().st_size
    assert size > 50e6
    assert peak < 8e6, f"{peak:,} bytes for a file of {size:,}"


def test_a_huge_line_is_never_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "p.jsonl", "wb") as file:
        file.write(b'{"question": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + json.dumps(PAIR.to_dict()).encode())
    tracemalloc.start()
    pairs = list(read_pairs(tmp_path / "p.jsonl").scan())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(pairs[0][1], BadLine)
    assert pairs[0][1].kind == "huge line"
    assert pairs[1][1] == PAIR
    assert peak < 8e6
