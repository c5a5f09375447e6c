"""Tests that the fingerprint of a file of pairs shows whether and where the lines have changed."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_ext.data import fingerprint
from mpo_ext.data.fingerprint import HashedFile, describe_change, files_of, hash_file
from mpo_ext.data.sources import open_pairs


def lines_of(count: int) -> list[bytes]:
    return [
        json.dumps({"question": f"{number}?", "chosen": "yes", "rejected": "no"}).encode() for number in range(count)
    ]


def write(path: Path, lines: list[bytes], end: bytes = b"\n") -> dict[str, Any]:
    path.write_bytes(b"".join(line + end for line in lines))
    return hash_file(HashedFile(str(path), len(lines)))


def change(lines: list[bytes], index: int, text: bytes) -> list[bytes]:
    return [*lines[:index], text, *lines[index + 1 :]]


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "appended": (lambda lines: [*lines, b"{}"], "lines were added at its end (20 lines before, 21 now)"),
    "cut": (lambda lines: lines[:-3], "lines were removed from its end (20 lines before, 17 now)"),
    "edited": (lambda lines: change(lines, 6, b"{}"), "the first change is line 7, empty lines not counted"),
    "edited at the end": (lambda lines: change(lines, 19, b"{}"), "the first change is line 20"),
    "a character": (lambda lines: change(lines, 2, lines[2].replace(b"yes", b"Yes")), "the first change is line 3"),
    "inserted": (lambda lines: [*lines[:4], b"{}", *lines[4:]], "the first change is line 5"),
    "removed": (lambda lines: lines[1:], "the first change is line 1, empty lines not counted (20 lines before, 19"),
    "sorted": (lambda lines: sorted(lines, reverse=True), "its lines are in another order from line 1 on"),
    "swapped": (lambda lines: [*lines[:8], lines[9], lines[8], *lines[10:]], "another order from line 9 on"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_lines_is_named(tmp_path: Path, name: str) -> None:
    edit, words = CHANGES[name]
    lines = lines_of(20)
    old = write(tmp_path / "a.jsonl", lines)
    text = describe_change(old, write(tmp_path / "b.jsonl", edit(lines)))
    assert text is not None
    assert words in text


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_larger_file_is_named_with_its_block(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_MAX_BLOCKS", 5)
    edit, _ = CHANGES[name]
    lines = lines_of(20)
    old = write(tmp_path / "a.jsonl", lines)
    assert old["block"] == 4
    new = edit(lines)
    text = describe_change(old, write(tmp_path / "b.jsonl", new))
    assert text is not None
    first = next((at for at, (one, other) in enumerate(zip(lines, new, strict=False)) if one != other), None)
    if len(new) > 20 and first is None:
        assert "lines were added at its end" in text
    elif first is None:
        assert "the first change is line 17, empty" in text
        assert "or lines were removed from its end (20 lines before, 17 now)" in text
    else:
        assert f"the first change is among lines {first // 4 * 4 + 1} to " in text


def test_what_the_reader_ignores_is_no_change(tmp_path: Path) -> None:
    lines = lines_of(20)
    old = write(tmp_path / "a.jsonl", lines)
    path = tmp_path / "b.jsonl"
    for content in (
        b"\n".join(lines),
        b"\r\n".join(lines) + b"\r\n",
        b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n",
        b"\n\n".join(lines) + b"\n\n\n",
        b"\r\n\r\n".join(lines),
    ):
        path.write_bytes(content)
        new = hash_file(files_of(open_pairs(path))[0][0])
        assert new["lines"] == 20
        assert describe_change(old, new) is None


def test_lines_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(20)
    old = write(tmp_path / "a.jsonl", lines)
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(fingerprint, "_CHUNK", size)
        assert write(tmp_path / "b.jsonl", lines, b"\r\n")["blocks"] == old["blocks"]
    joined = write(tmp_path / "c.jsonl", [lines[0] + lines[1], *lines[2:]])
    assert joined["digest"] != old["digest"]


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    old = write(path, lines_of(9))
    monkeypatch.setattr(fingerprint, "_hash_blocks", lambda *args: pytest.fail("the file was read"))
    assert hash_file(HashedFile(str(path), 9), [old]) == old
    os.utime(path, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        hash_file(HashedFile(str(path), 9), [old])


def test_the_files_of_a_meta_file_and_of_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", lines_of(3))
    meta = {name: {"root": "", "annotation": f"{name}.jsonl", "repeat_time": 1} for name in "ab"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    files = files_of(open_pairs(tmp_path / "meta.json"))
    assert [[(Path(file.path).name, file.lines) for file in subset] for subset in files] == [
        [("a.jsonl", 3)],
        [("b.jsonl", 3)],
    ]
    hashes = []
    for number, answer in enumerate(["no", "no", "never"]):
        folder = tmp_path / str(number)
        rows = [{"prompt": "q", "chosen": "yes", "rejected": answer}]
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        ((file,),) = files_of(open_pairs(folder))
        hashes.append(hash_file(file))
        elsewhere = dataclasses.replace(open_pairs(folder), path="hf://owner/name")  # not a path
        assert files_of(elsewhere) == [[HashedFile(file.path, None, "hf://owner/name")]]
    assert hashes[0]["digest"] == hashes[1]["digest"]
    assert describe_change(hashes[0], hashes[1]) is None
    text = describe_change(hashes[0], hashes[2])
    assert text is not None
    assert text.startswith("its content has changed (")


@pytest.mark.parametrize(
    ("edit", "is_cut"),
    [
        (lambda lines: lines[:-2], True),
        (lambda lines: change(lines[:-2], 16, b"x"), True),
        (lambda lines: change(lines[:-2], 3, b"x"), False),
        (lambda lines: change(lines[:-4], 15, b"x"), False),
        (lambda lines: change(lines, 19, b"x"), False),
    ],
)
def test_a_block_that_is_cut_may_have_lost_its_last_lines_only(
    edit: Callable[[list[bytes]], list[bytes]], is_cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_MAX_BLOCKS", 5)
    old, new = (
        write(tmp_path / f"{name}.jsonl", lines) for name, lines in (("a", lines_of(20)), ("b", edit(lines_of(20))))
    )
    text = describe_change(old, new)
    assert text is not None
    assert ("or lines were removed from its end" in text) == is_cut, text
