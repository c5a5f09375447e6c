"""Tests journals, the append-only files in which runs store their results.

Records survive a kill, invalid files are rejected, and only one process may write.
"""

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_ext.files import LockedError
from mpo_ext.journal import Journal, SettingsMismatchError, read_records

RECORDS = int(os.environ.get("MPO_SCALE_RECORDS", "5000"))
SETTINGS = {"model": "stub", "sampling": {"temperature": 0.7, "top_k": 50}}


def write(path: Path, records: list[dict], settings: dict = SETTINGS) -> None:
    with Journal(path, settings) as journal:
        journal.append(records)


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    records = [{"key": str(number), "text": "a\u2028b\n\u4e2d"} for number in range(5)]
    write(tmp_path / "j.jsonl", records[:2])
    write(tmp_path / "j.jsonl", records[2:])
    assert list(read_records(tmp_path / "j.jsonl")) == records


def test_a_cut_at_any_byte_loses_at_most_the_lines_it_touches(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    records = [{"key": str(number), "text": "x" * number + "\u4e2d"} for number in range(6)]
    write(path, records)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path, SETTINGS) as journal:
            kept = list(journal.records())
            assert len(kept) == max(0, whole[:size].count(b"\n") - 1)
            journal.append(records[len(kept) :])
        assert path.read_bytes() == whole


def test_a_last_line_of_zeros_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, [{"key": "1"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 200_000 + b"\n")
    write(path, [])
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, [{"key": "1"}])
    path.write_bytes(path.read_bytes() + b"{\n" + b'{"key": "2"}\n')
    with pytest.raises(ValueError, match=r"must hold one record a line, got line 3"):
        list(read_records(path))


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"question": "mine"}\n')
    with pytest.raises(ValueError, match=r"path must be a journal"):
        write(path, [{"key": "1"}])
    assert path.read_text() == '{"question": "mine"}\n'


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, [{"key": "1"}])
    before = path.read_bytes()
    other = {"model": "stub", "sampling": {"temperature": 1.0, "top_k": 50}, "seed": 3}
    with pytest.raises(SettingsMismatchError, match=r"sampling\.temperature: 0\.7 in the file, 1\.0 now") as caught:
        write(path, [{"key": "2"}], other)
    assert caught.value.differences == [("sampling.temperature", 0.7, 1.0), ("seed", "(absent)", 3)]
    assert path.read_bytes() == before


def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, SETTINGS), pytest.raises(LockedError, match=rf"process {os.getpid()} is writing it"):
        write(path, [])
    write(path, [])


def test_half_of_a_surrogate_pair_survives(tmp_path: Path) -> None:
    write(tmp_path / "j.jsonl", [{"key": "\ud800"}])
    assert list(read_records(tmp_path / "j.jsonl")) == [{"key": "\ud800"}]


def test_each_append_reaches_the_disk_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with Journal(tmp_path / "j.jsonl", SETTINGS, fsync_s=0) as journal:
        begun = len(synced)
        journal.append([{"key": "1"}])
        journal.append([{"key": "2"}])
        assert len(synced) == begun + 2


def test_a_header_says_the_settings(tmp_path: Path) -> None:
    write(tmp_path / "j.jsonl", [])
    assert json.loads((tmp_path / "j.jsonl").read_text()) == {"format": "mpo_ext.journal/1", "settings": SETTINGS}


@pytest.mark.parametrize(
    "content",
    [
        b'{"format":"mpo_ext.journal/1"}\n',  # found by tools/fuzz.py
        b'{"format":"mpo_ext.journal/1","zettings":{"a":0}}\n{"key":"y"v\n{"ke',
        b'{"format":"mpo_ext.journal/1","settings":7}\n',
    ],
)
def test_a_header_of_another_form_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be a journal of format"), Journal(path, SETTINGS):
        pass
    assert content.startswith(path.read_bytes())


@pytest.mark.parametrize("line", [b"7", b"[]", b"null", b"[" * 5000 + b"]" * 5000])
def test_a_line_that_is_no_record_is_an_error(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, [{"key": "0"}])
    path.write_bytes(path.read_bytes() + line + b'\n{"key":"1"}\n')
    with pytest.raises(ValueError, match="must hold one record a line, got line 3"):
        list(read_records(path))


def test_a_slow_disk_delays_appends_by_one_sync_per_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, syncs = [0.0], []

    def fsync(file: int) -> None:
        clock[0] += 30.0  # seconds of a slow disk
        syncs.append(clock[0])

    monkeypatch.setattr("mpo_ext.journal.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("mpo_ext.journal.os.fsync", fsync)
    monkeypatch.setattr("mpo_ext.journal.sync_folder", lambda folder: None)
    with Journal(tmp_path / "j.jsonl", SETTINGS, fsync_s=5.0) as journal:
        syncs.clear()
        for number in range(1000):
            clock[0] += 0.1  # seconds of sampling
            journal.append([{"key": str(number)}])
        assert len(syncs) <= 1000 * 0.1 / 5.0  # the seconds of a sync do not count for the next interval
        assert len(list(journal.records())) == 1000


def test_a_long_journal_is_read_as_a_stream(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, SETTINGS, fsync_s=float("inf")) as journal:
        for first in range(0, RECORDS, 1000):
            numbers = range(first, min(first + 1000, RECORDS))
            journal.append([{"key": f"{number:032x}-0", "text": "x" * 200, "finish": "stop"} for number in numbers])
    path.write_bytes(path.read_bytes() + b'{"key": "half')
    tracemalloc.start()
    start = time.process_time()
    with Journal(path, SETTINGS) as journal:
        assert sum(1 for _ in journal.records()) == RECORDS
        journal.append([{"key": "last"}])
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20
    assert seconds < 5 + 1e-4 * RECORDS
    record_property("cases", RECORDS)
