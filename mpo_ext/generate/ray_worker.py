"""The Ray actor of a run. It holds an engine and samples responses to groups of items (blocks)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

from mpo_ext.generate.engine import Engine
from mpo_ext.generate.feeding import Feeder, Records, StreamingEngine, run_steps
from mpo_ext.generate.items import Item
from mpo_ext.generate.sampler import Pipeline, set_date

_SHOWN = 80  # maximum number of characters of a question in a message


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A group of items that an actor samples together.

    Attributes:
        start: Index of the block's first sample among all samples of the run. It identifies the block.
        first_item: Index of the block's first item in the input.
        items: The items.
        keys: Keys that identify the block's samples, in order.
    """

    start: int
    first_item: int
    items: Sequence[Item]
    keys: Sequence[str]

    def __str__(self) -> str:
        if len(self.items) == 1:
            return self.describe(0)
        return f"items {self.first_item + 1} to {self.first_item + len(self.items)}"

    def describe(self, place: int) -> str:
        """Returns the number and the question of the item with the index ``place`` in the block, as a text."""
        question = " ".join(self.items[place].question.split())
        shown = question if len(question) <= _SHOWN else f"{question[: _SHOWN - 3]}..."
        return f"item {self.first_item + place + 1} ({shown!r})"


@dataclasses.dataclass(frozen=True, slots=True)
class BlockResult:
    """The result of sampling a ``Block``.

    Attributes:
        start: The block's ``start``.
        records: One list of samples (JSON objects) per item; empty after an error.
        error: The message of an error, or None.
    """

    start: int
    records: Records
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class EngineReport:
    """The properties of an actor's engine that the driver needs.

    Attributes:
        name: Name of the model.
        settings: Result of the engine's ``settings()``.
        concurrency: Number of requests that keep a streaming engine busy; None for an engine without streaming.
    """

    name: str
    settings: dict[str, Any]
    concurrency: int | None


class RayWorker:
    """Samples groups of items (blocks) with one engine. A streaming engine runs several blocks at the same time.

    Args:
        pipeline: The pipeline.
        make_engine: Function that creates the engine.
        date: Date that the chat template writes, in ISO format.
    """

    def __init__(self, pipeline: Pipeline, make_engine: Callable[[], Engine], date: str) -> None:
        self.pipeline, self._make_engine, self._date = pipeline, make_engine, date

    def start(self) -> EngineReport:
        """Creates the engine, and returns its properties."""
        self.engine = self._make_engine()
        set_date(self.engine, self._date)
        concurrency = getattr(self.engine, "concurrency", None) if hasattr(self.engine, "submit") else None
        self._feeder = None if concurrency is None else Feeder(cast(StreamingEngine, self.engine))
        self._blocks: dict[int, Block] = {}
        return EngineReport(self.engine.name, self.engine.settings(), concurrency)

    def step(self, blocks: Sequence[Block]) -> list[BlockResult]:
        """Starts the given blocks (groups of items), and returns the results of finished blocks.

        A streaming engine waits until at least one block has finished or failed. This block may come from an earlier
        call. Any other engine finishes all given blocks. The result of a failed block has an ``error``.
        """
        if self._feeder is None:
            return [self._run(block) for block in blocks]
        for block in blocks:
            self._blocks[block.start] = block
            self._feeder.add(block.start, self.pipeline.steps(block.items, self.engine))
        finished: list[tuple[Any, Records | Exception]] = []
        try:
            while self._blocks and not (finished := self._feeder.take(in_order=False)):
                self._feeder.collect()
        except Exception as error:  # an error of the engine concerns all blocks
            finished = [(start, error) for start in self._blocks]
            self._feeder.close()
        results = []
        for start, result in finished:
            block = self._blocks.pop(start)
            if isinstance(result, Exception):
                results.append(BlockResult(start, [], f"{block}: {describe_error(result)}"))
            else:
                results.append(BlockResult(start, result))
        return results

    def _run(self, block: Block) -> BlockResult:
        try:
            return BlockResult(block.start, run_steps(self.pipeline.steps(block.items, self.engine), self.engine))
        except Exception as error:
            return BlockResult(block.start, [], f"{block}: {describe_error(error)}{self._culprit(block)}")

    def _culprit(self, block: Block) -> str:
        """Samples the items of a block one by one. Returns a text that names the first item that fails.

        Returns "" if no item fails, or if a neighbour of this item fails, too.
        """
        if len(block.items) < 2:
            return ""
        for place in range(len(block.items)):
            if self._fails(block.items[place]):
                # If a neighbour fails, too, the error does not depend on the item.
                neighbour = place + 1 if place + 1 < len(block.items) else place - 1
                return "" if self._fails(block.items[neighbour]) else f"; alone, {block.describe(place)} fails"
        return ""

    def _fails(self, item: Item) -> bool:
        try:
            run_steps(self.pipeline.steps([item], self.engine), self.engine)
        except Exception:
            return True
        return False


def describe_error(error: Exception) -> str:
    """Returns the type and the message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
