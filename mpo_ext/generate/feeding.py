"""Sends the requests of a pipeline to an engine, and the generations back to the pipeline.

A pipeline samples its items (questions) in groups, called blocks. The engine runs one block after the other or, if it
can, several blocks at the same time.
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
    """Runs the generator of a pipeline to its end, and returns the generator's return value.

    Each yielded list of requests goes to ``engine.generate``. The generations go back to the generator. The return
    value holds one list of records (JSON objects) per item.
    """
    generations: Any = None
    while True:
        try:
            requests = steps.send(generations)
        except StopIteration as stop:
            return cast(Records, stop.value)
        generations = engine.generate(requests)


def run_blocks(blocks: Iterator[tuple[Tag, Steps]], engine: Engine) -> Iterator[tuple[Tag, Records]]:
    """Samples blocks (groups of items), and yields their results in the order of the blocks.

    A ``StreamingEngine`` runs several blocks at the same time. Other engines run one block after the other.

    Args:
        blocks: Tuples (tag, steps), one for each block. ``tag`` is any object. ``steps`` is a generator of requests,
            as for ``run_steps``.
        engine: The engine.

    Yields:
        Tuples (tag, result). ``result`` is the return value of the generator ``steps``.
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
                for tag, result in feeder.take(in_order=True):
                    if isinstance(result, Exception):
                        raise result
                    yield tag, result
                feeder.collect()
        return
    for tag, steps in blocks:
        yield tag, run_steps(steps, engine)


class _Block:
    """The state of a block, a group of items whose requests have been started.

    Attributes:
        tag: Object that identifies the block.
        steps: Generator that yields lists of requests.
        generations: Generations of the latest list of requests. None stands for a request that is running.
        records: Return value of ``steps``; None until it returns.
        error: Error of ``steps`` or of a request; None if the block has not failed.
        n_requests: Number of requests that ``steps`` has yielded so far.
    """

    def __init__(self, tag: Any, steps: Steps) -> None:
        self.tag, self.steps = tag, steps
        self.generations: list[Generation | None] = []
        self.records: Records | None = None
        self.error: Exception | None = None
        self.n_requests = 0


class Feeder:
    """Samples several blocks, which are groups of items, at the same time on a streaming engine."""

    def __init__(self, engine: StreamingEngine) -> None:
        self._engine = engine
        self._blocks: collections.deque[_Block] = collections.deque()
        self._running: dict[str, tuple[_Block, int]] = {}

    @property
    def n_blocks(self) -> int:
        """Number of blocks (groups of items) that ``add`` has added and ``take`` has not yet removed."""
        return len(self._blocks)

    @property
    def is_full(self) -> bool:
        """True if no further block (group of items) should be added now.

        There are two possible reasons: the engine has enough running requests, or too many results wait in memory for
        a call of ``take``.
        """
        kept = sum(block.n_requests for block in self._blocks)
        return len(self._running) >= self._engine.concurrency or kept >= _MAX_KEPT * self._engine.concurrency

    def add(self, tag: Any, steps: Steps) -> None:
        """Adds a block (a group of items), and submits its first requests.

        Args:
            tag: Any object that identifies the block.
            steps: Generator that yields the requests of the block. If the generator fails, or the engine rejects a
                request, ``take`` returns the error.
        """
        self._blocks.append(_Block(tag, steps))
        self._advance(self._blocks[-1], None)

    def take(self, *, in_order: bool) -> list[tuple[Any, Records | Exception]]:
        """Removes all complete and all failed blocks (groups of items). Returns (tag, result) for each removed block.

        The tag is the object that was given to ``add`` with the block. The result of a complete block is the return
        value of its generator. The result of a failed block is its error. The failed blocks are last in the list.

        With ``in_order``, a complete block stays if an earlier block is incomplete or has failed.
        """
        complete: list[tuple[Any, Records | Exception]] = []
        failed: list[tuple[Any, Records | Exception]] = []
        rest: collections.deque[_Block] = collections.deque()
        for block in self._blocks:
            if block.error is not None:
                failed.append((block.tag, block.error))
            elif block.records is None or (in_order and (rest or failed)):
                rest.append(block)
            else:
                complete.append((block.tag, block.records))
        self._blocks = rest
        return complete + failed

    def collect(self) -> None:
        """Waits until at least one running request has ended. Stores the generations of all ended requests.

        When all current requests of a block (a group of items) have ended, the block's next requests are submitted.
        Errors of ``StreamingEngine.finished`` are raised.
        """
        if not self._running:
            return
        for name, generation in self._engine.finished():
            if name not in self._running:  # another request of its block has failed
                continue
            block, place = self._running.pop(name)
            block.generations[place] = generation
            if None not in block.generations:
                self._advance(block, cast(list[Generation], block.generations))

    def close(self) -> None:
        """Stops all running requests, and removes all blocks."""
        self._cancel(list(self._running))
        self._blocks.clear()

    def _cancel(self, names: Sequence[str]) -> None:
        for name in names:
            del self._running[name]
        self._engine.cancel(names)

    def _advance(self, block: _Block, generations: list[Generation] | None) -> None:
        """Sends ``generations`` to the generator of a block, and submits the requests of the generator's next list.

        In the first call for a block, ``generations`` is None. An error is stored in the block, so that other blocks
        continue.
        """
        try:
            requests = block.steps.send(generations)  # type: ignore[arg-type]
            while not requests:
                requests = block.steps.send([])
            block.generations = [None] * len(requests)
            block.n_requests += len(requests)
            for place, request in enumerate(requests):
                self._running[self._engine.submit(request)] = (block, place)
        except StopIteration as stop:
            block.records = stop.value
        except Exception as error:
            block.error = error
            self._cancel([name for name, (running, _) in self._running.items() if running is block])
