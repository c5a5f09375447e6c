"""Tests atomic writes and file locks."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mmpr_files import PAIR

from mpo_ext.data import read_pairs, write_pairs
from mpo_ext.files import FileLock, LockedError, atomic_path, atomic_write, sync_tree, write_and_sync, write_json


def test_a_killed_writer_leaves_no_partial_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom mpo_ext.data import Pair, write_pairs\n"
        "def pairs():\n"
        "    for index in range(10**6):\n"
        "        if index == 5000: os._exit(9)\n"
        "        yield Pair('q' * 100, 'c', 'r')\n"
        f"write_pairs({str(tmp_path / 'p.jsonl')!r}, pairs())"
    )
    write_pairs(tmp_path / "p.jsonl", [PAIR])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list(read_pairs(tmp_path / "p.jsonl")) == [PAIR]


def test_atomic_write_keeps_the_permissions_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_locked_file_is_replaced_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path, is_locked=True) as file:
            file.write(b"ne")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert path.read_text() == "old"
    with atomic_write(path, is_locked=True) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_leftover_of_a_locked_writer_is_overwritten(tmp_path: Path) -> None:
    for attempt in range(2):
        process = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(tmp_path / "out",))
        process.start()
        process.join()
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"], attempt
    with atomic_write(tmp_path / "out", is_locked=True) as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _die_while_writing(path: Path) -> None:
    with atomic_write(path, is_locked=True) as file:
        file.write(b"ne")
        file.flush()
        os._exit(9)


def test_a_library_writes_to_a_path_of_the_same_suffix(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "plot.svg"
    with atomic_path(target) as temporary:
        assert (temporary.parent, temporary.suffix) == (target.parent, ".svg")
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(RuntimeError, match="full"), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise RuntimeError("full")
    assert [path.name for path in target.parent.iterdir()] == ["plot.svg"]
    assert target.read_text() == "new"


def test_the_file_is_synced_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        events.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}').rpartition('/')[2][:5]}")
        sync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    (tmp_path / "dir").mkdir()
    write_json(tmp_path / "dir" / "x.json", {"é": [1]})
    assert events == ["sync .x.js", "replace", "sync dir"]
    assert (tmp_path / "dir" / "x.json").read_text() == '{\n  "é": [\n    1\n  ]\n}\n'
    assert json.loads((tmp_path / "dir" / "x.json").read_bytes()) == {"é": [1]}

    events.clear()
    write_and_sync(tmp_path / "dir" / "y", b"y")
    sync_tree(tmp_path / "dir")
    assert sorted(events) == ["sync dir", "sync x.jso", "sync y", "sync y"]
    with pytest.raises(FileExistsError):
        write_and_sync(tmp_path / "dir" / "y", b"z")


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    locked = context.Event()

    def hold() -> None:
        with FileLock(tmp_path / "lock", "the file"):
            locked.set()
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    assert locked.wait(30)
    with pytest.raises(LockedError, match=rf"process {process.pid} is"), FileLock(tmp_path / "lock", "the file"):
        pass
    process.kill()
    process.join()
    with FileLock(tmp_path / "lock", "the file"):
        pass
