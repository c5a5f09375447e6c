"""Stores a run's samples in the order of the input, even if they are generated in another order.

Items (questions) are sampled in groups, called blocks. The samples are appended to the journal, a file with one JSON
object per line. If a block is complete before an earlier block, its samples wait in a second file, the file of waiting
blocks. After a killed run, the next run reads them from this file.
"""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.journal import Journal

_COMPACT_BYTES = 16 << 20  # a larger second file is emptied as soon as it holds no block that the journal lacks


@dataclasses.dataclass(slots=True)
class _Place:
    """The progress of a block, a group of items that are sampled together.

    Attributes:
        start: Index of the block's first sample among all samples of the run.
        n_stored: Number of the block's samples that the journal already holds.
        is_finished: Whether the file of waiting blocks holds all samples of the block.
    """

    start: int
    n_stored: int
    is_finished: bool = False


class EarlyBlocks:
    """Appends samples to a journal in the order of the input, even if they arrive in another order.

    The samples arrive in blocks. A block holds the samples of a few items. If a block is complete before an earlier
    block, its samples wait in a second file, the file of waiting blocks (``early-RANK-of-WORLD.jsonl``). A later run
    reads this file instead of sampling the block again. At the end, the file is deleted if no block waits in it.

    Use an instance as a context manager inside the context of the journal. Call ``announce`` for each block, in the
    order of the input, and ``finish`` when the block is complete.

    Args:
        journal: The opened journal, a file with one sample (a JSON object) per line.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        name = journal.path.name.replace("journal-", "early-", 1)
        self.path = journal.path.with_name(name)
        self._file = Journal(self.path, journal.settings, fsync_s=journal.fsync_s)
        self._places: collections.deque[_Place] = collections.deque()
        self._spans: dict[int, tuple[int, int]] = {}  # offset and size of the line of each block, by its start
        self._header_bytes = 0

    def __enter__(self) -> "EarlyBlocks":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._file)
            self._read_spans()
            self._close = stack.pop_all()
        return self

    def _read_spans(self) -> None:
        """Finds the byte offset and the size of each line in the file of waiting blocks.

        A line holds the samples of a block. A line is skipped if the journal already holds all samples of the line.
        """
        n_stored = sum(1 for _ in self.journal.records())
        with open(self.path, "rb") as file:
            self._header_bytes = len(file.readline())
            offset = self._header_bytes
            for number, line in enumerate(file, start=2):
                try:
                    block = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path} must hold one block a line, got line {number}: {error}; without the file, its "
                        "blocks are sampled again"
                    ) from None
                if block["start"] + len(block["records"]) > n_stored:  # otherwise the journal holds the whole block
                    self._spans[block["start"]] = (offset, len(line))
                offset += len(line)

    def __exit__(self, *error: object) -> None:
        self._close.__exit__(*error)  # type: ignore[arg-type]
        if not self._spans:
            self.path.unlink()
            self.path.with_name(f"{self.path.name}.lock").unlink(missing_ok=True)

    def announce(
        self, start: int, keys: Sequence[str], stored: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]] | None:
        """Registers the next block, a group of items that are sampled together. Call it in the order of the input.

        Args:
            start: Index of the block's first sample among all samples of the run.
            keys: Keys that identify the block's samples, in order.
            stored: Samples of the block that the journal already holds, as JSON objects.

        Returns:
            All samples of the block, if the file of waiting blocks has them from an earlier run. Otherwise None: the
            block must be sampled.
        """
        place = _Place(start, len(stored))
        self._places.append(place)
        if start in self._spans:
            records = self._read(start)
            # A block from a run with another block size, or with other records in the journal, does not match.
            if [record["key"] for record in records] == list(keys) and records[: len(stored)] == list(stored):
                place.is_finished = True
                self._move()
                return records
            del self._spans[start]
        return None

    def finish(self, start: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Stores all samples of a block. ``start`` is the index of the block's first sample.

        If all earlier blocks are complete, the samples go to the journal. Otherwise, they go to the file of waiting
        blocks.
        """
        if self._places[0].start == start:
            self.journal.append(records[self._places.popleft().n_stored :])
            self._move()
            return
        offset = os.path.getsize(self.path)
        self._file.append([{"start": start, "records": list(records)}])
        self._spans[start] = (offset, os.path.getsize(self.path) - offset)
        next(place for place in self._places if place.start == start).is_finished = True

    def _move(self) -> None:
        """Appends the waiting blocks to the journal, up to the first block that is not complete."""
        while self._places and self._places[0].is_finished:
            place = self._places.popleft()
            self.journal.append(self._read(place.start)[place.n_stored :])
            del self._spans[place.start]
        if not self._spans and os.path.getsize(self.path) > _COMPACT_BYTES:
            self.journal.sync()
            os.truncate(self.path, self._header_bytes)

    def _read(self, start: int) -> list[dict[str, Any]]:
        offset, size = self._spans[start]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return json.loads(file.read(size))["records"]
