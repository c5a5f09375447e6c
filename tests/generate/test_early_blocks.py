"""Tests that sampled responses are stored in the order of the questions, also after a kill.

Questions are sampled in groups (blocks), and blocks may finish in any order. The file of sampled responses is called
the journal.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from mpo_ext.generate import early_blocks
from mpo_ext.generate.early_blocks import EarlyBlocks
from mpo_ext.journal import Journal

SIZES = (3, 1, 4, 2, 2)


def block_records() -> list[tuple[int, list[dict[str, Any]]]]:
    """Returns (index of the first record, records) for each block. A record is a line of the journal."""
    starts = [sum(SIZES[:number]) for number in range(len(SIZES))]
    return [
        (start, [{"key": f"k{start + place}", "text": "t" * place} for place in range(size)])
        for start, size in zip(starts, SIZES, strict=True)
    ]


def open_files(folder: Path) -> tuple[Journal, Path]:
    return Journal(folder / "journal-00000-of-00001.jsonl", {"a": 1}), folder / "early-00000-of-00001.jsonl"


def announce_all(early: EarlyBlocks, journal: Journal) -> list[tuple[int, list[dict[str, Any]]]]:
    """Calls ``early.announce`` for each block that the journal lacks. Returns the blocks that must be sampled."""
    stored = list(journal.records())
    missing = []
    for start, records in block_records():
        have = stored[start : start + len(records)]
        if len(have) < len(records):
            early_records = early.announce(start, [record["key"] for record in records], have)
            assert early_records in (None, records)
            missing += [] if early_records else [(start, records)]
    return missing


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_the_journal_has_the_order_of_the_input(order: list[int], tmp_path: Path) -> None:
    journal, path = open_files(tmp_path)
    with journal, EarlyBlocks(journal) as early:
        blocks = announce_all(early, journal)
        for number in order:
            early.finish(*blocks[number])
        expected = [record for _, records in blocks for record in records]
        assert list(journal.records()) == expected
    assert not path.exists()


def test_a_block_that_finished_early_survives(tmp_path: Path) -> None:
    journal, path = open_files(tmp_path)
    with journal, EarlyBlocks(journal) as early:
        blocks = announce_all(early, journal)
        for number in (3, 1):
            early.finish(*blocks[number])
        assert list(journal.records()) == []
    assert path.exists()
    with open(path, "ab") as file:
        file.write(b'{"start": 4, "rec')  # as a kill leaves it
    with journal, EarlyBlocks(journal) as early:
        missing = announce_all(early, journal)
        assert [start for start, _ in missing] == [0, 4, 10]
        for block in missing:
            early.finish(*block)
        assert [record["key"] for record in journal.records()] == [f"k{place}" for place in range(sum(SIZES))]
    assert not path.exists()


def test_a_broken_second_file_is_named(tmp_path: Path) -> None:
    journal, path = open_files(tmp_path)
    with journal, EarlyBlocks(journal) as early:
        announce_all(early, journal)
        early.finish(*block_records()[1])
        early.finish(*block_records()[2])
    path.write_bytes(path.read_bytes().replace(b'"start":3', b'"start":'))
    with journal, pytest.raises(ValueError, match=r"early-.* must hold one block a line, got line 2: "):
        EarlyBlocks(journal).__enter__()
    path.unlink()
    with journal, EarlyBlocks(journal) as early:
        assert len(announce_all(early, journal)) == len(SIZES)


def test_blocks_of_another_size_are_sampled_again(tmp_path: Path) -> None:
    journal, _ = open_files(tmp_path)
    with journal, EarlyBlocks(journal) as early:
        announce_all(early, journal)
        early.finish(*block_records()[1])
    with journal, EarlyBlocks(journal) as early:
        assert early.announce(0, ["k0", "k1", "k2"], []) is None
        assert early.announce(3, ["k3", "k4"], []) is None


def test_the_second_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_blocks, "_COMPACT_BYTES", 0)
    journal, path = open_files(tmp_path)
    with journal, EarlyBlocks(journal) as early:
        empty = path.stat().st_size
        blocks = announce_all(early, journal)
        early.finish(*blocks[1])
        assert path.stat().st_size > empty
        early.finish(*blocks[0])
        assert path.stat().st_size == empty
        early.finish(*blocks[3])
        early.finish(*blocks[2])
        early.finish(*blocks[4])
        assert len(list(journal.records())) == sum(SIZES)


def test_moved_blocks_do_not_keep_the_second_file(tmp_path: Path) -> None:
    journal, path = open_files(tmp_path)
    for numbers in ((1, 3), (0,), (2, 4)):  # the second session moves block 1, and block 3 keeps the file
        with journal, EarlyBlocks(journal) as early:
            announce_all(early, journal)
            for number in numbers:
                early.finish(*block_records()[number])
    assert not path.exists()
    with journal:
        assert len(list(journal.records())) == sum(SIZES)


def test_any_order_and_any_kill(tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        for _ in range(20):
            journal, path = open_files(folder)
            with journal, EarlyBlocks(journal) as early:
                missing = announce_all(early, journal)
                rng.shuffle(missing)
                for block in missing[: rng.randrange(3)]:
                    early.finish(*block)
                if not missing:
                    break
            for cut in (journal.path, path):
                if path.exists() and rng.random() < 0.3:
                    head = cut.read_bytes().index(b"\n") + 1
                    size = cut.stat().st_size
                    cut.write_bytes(cut.read_bytes()[: max(head, size - rng.randrange(40))])
        else:
            pytest.fail("the journal was not completed")
        with journal:
            assert [record["key"] for record in journal.records()] == [f"k{place}" for place in range(sum(SIZES))]
        assert not path.exists()
