"""Runs the requests of several blocks, one block after the other or, if the engine can, at the same time.

A block is a group of items (questions) that a pipeline samples together.
"""

import collections
import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

from mpo_ext.generate.engine import Engine, Generation, Request

_MAX_KEPT = 4  # largest number of samples that have begun and are not yet returned, in units of the concurrency

Records = list[list[dict[str, Any]]]
#: The work on a block. It yields requests, gets their generations, and at the end returns the records of each item.
Steps = Generator[list[Request], list[Generation], Records]
Tag = TypeVar("Tag")


class StreamingEngine(Engine, Protocol):
    """An engine that accepts new requests while others are running.

    Attributes:
        concurrency: Number of requests that keep the engine busy.
    """

    concurrency: int

    def submit(self, request: Request) -> str:
        """Starts a request, and returns a name that identifies it."""

    def finished(self) -> list[tuple[str, Generation]]:
        """Returns the name and the generation of each request that has ended since the last call.

        If requests are running, waits until at least one of them has ended.
        """

    def cancel(self, names: Sequence[str]) -> None:
        """Stops the requests with these names."""


def run_steps(steps: Steps, engine: Engine) -> Records:
    """Runs the requests that a generator yields, and returns the generator's return value, a list for each item.

    Passes each list of requests to ``engine.generate``, and sends the generations back to ``steps``.
    """
    generations: Any = None
    while True:
        try:
            requests = steps.send(generations)
        except StopIteration as stop:
            return cast(Records, stop.value)
        generations = engine.generate(requests)


def run_blocks(blocks: Iterator[tuple[Tag, Steps]], engine: Engine) -> Iterator[tuple[Tag, Records]]:
    """Samples blocks, which are groups of items, with an engine, and yields the results in the order of the blocks.

    A ``StreamingEngine`` runs the requests of several blocks at the same time. Other engines run one block after the
    other.

    Args:
        blocks: For each block, any object that identifies it (the tag), and a generator of its requests.
        engine: The engine.

    Yields:
        The tag of each block, and the return value of its generator.
    """
    if hasattr(engine, "submit"):
        with contextlib.closing(Feeder(cast(StreamingEngine, engine))) as feeder:
            has_more = True
            while has_more or feeder.n_blocks:
                while has_more and not feeder.is_full:
                    tag, steps = next(blocks, (None, None))
                    has_more = steps is not None
                    if steps is not None:
                        feeder.add(tag, steps)
                yield from feeder.take(in_order=True)
                feeder.collect()
        return
    for tag, steps in blocks:
        yield tag, run_steps(steps, engine)


class _Block:
    """The state of a block, a group of items whose requests have been started.

    Attributes:
        tag: Object that identifies the block.
        steps: Generator that yields the block's requests.
        generations: Generations of the current list of requests; None for each running request.
        records: Return value of ``steps``; None until it returns.
        n_requests: Number of requests that ``steps`` has yielded so far.
    """

    def __init__(self, tag: Any, steps: Steps) -> None:
        self.tag, self.steps = tag, steps
        self.generations: list[Generation | None] = []
        self.records: Records | None = None
        self.n_requests = 0


class Feeder:
    """Samples several blocks, which are groups of items, at the same time on a streaming engine.

    Attributes:
        active_tag: After an error, the tag of the block that caused it; None if the engine caused it.
    """

    def __init__(self, engine: StreamingEngine) -> None:
        self._engine = engine
        self._blocks: collections.deque[_Block] = collections.deque()
        self._running: dict[str, tuple[_Block, int]] = {}
        self.active_tag: Any = None

    @property
    def n_blocks(self) -> int:
        """Number of blocks (groups of items) that were added with ``add`` and not yet removed by ``take``."""
        return len(self._blocks)

    @property
    def is_full(self) -> bool:
        """True if no further block (group of items) should be added.

        This is the case if enough requests are running. It is also the case if the blocks that ``take`` has not yet
        removed have too many requests, finished requests included.
        """
        kept = sum(block.n_requests for block in self._blocks)
        return len(self._running) >= self._engine.concurrency or kept >= _MAX_KEPT * self._engine.concurrency

    def add(self, tag: Any, steps: Steps) -> None:
        """Adds a block (a group of items), and submits the first requests that its generator ``steps`` yields.

        ``tag`` is any object that identifies the block.
        """
        self._blocks.append(_Block(tag, steps))
        self._advance(self._blocks[-1], None)

    def take(self, *, in_order: bool) -> list[tuple[Any, Records]]:
        """Removes the complete blocks (groups of items), and returns the tag and the result of each.

        The result is the return value of the block's generator. With ``in_order``, a complete block is not removed
        before all earlier blocks are complete.
        """
        complete: list[_Block] = []
        rest: collections.deque[_Block] = collections.deque()
        for block in self._blocks:
            if block.records is None or (in_order and rest):
                rest.append(block)
            else:
                complete.append(block)
        self._blocks = rest
        return [(block.tag, cast(Records, block.records)) for block in complete]

    def collect(self) -> None:
        """Waits until at least one running request has ended, and stores the generations.

        If all current requests of a block (a group of items) have ended, submits the block's next requests.
        """
        if not self._running:
            return
        self.active_tag = None
        for name, generation in self._engine.finished():
            block, place = self._running.pop(name)
            block.generations[place] = generation
            if None not in block.generations:
                self._advance(block, cast(list[Generation], block.generations))

    def close(self) -> None:
        """Stops all running requests."""
        self._engine.cancel(list(self._running))
        self._running.clear()

    def _advance(self, block: _Block, generations: list[Generation] | None) -> None:
        """Sends generations to a block's generator ``steps``, and submits the requests that it yields next.

        A block is a group of items. ``generations`` is None at its start.
        """
        self.active_tag = block.tag
        try:
            requests = block.steps.send(generations)  # type: ignore[arg-type]
            while not requests:
                requests = block.steps.send([])
        except StopIteration as stop:
            block.records = stop.value
            return
        block.generations = [None] * len(requests)
        block.n_requests += len(requests)
        for place, request in enumerate(requests):
            self._running[self._engine.submit(request)] = (block, place)
