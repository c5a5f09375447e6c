"""The driver of a Ray run: sends groups of items (blocks) to actors, receives samples, and replaces dead actors."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TextIO

from mpo_ext.generate.ray_worker import Block, BlockResult, EngineReport, RayWorker, describe_error
from mpo_ext.journal import differences

_MAX_DEATHS = 3  # maximum number of actors that die while they sample a block; the last actor gets only this block
_CALLS = 2  # number of blocks that an actor has at a time, so that it need not wait for the driver
_AHEAD = 2  # number of samples that a streaming engine has at a time, in units of its concurrency
_STOP_S = 30.0


class BlockError(RuntimeError):
    """Raised if responses to a group of items cannot be sampled. The message names the items and the reason."""


@dataclasses.dataclass(eq=False)
class _Actor:
    """A Ray actor and the groups of items (blocks) that it samples.

    Attributes:
        handle: Ray's handle of the actor.
        report: Properties of the actor's engine; None before the engine is created.
        blocks: Blocks sent to the actor and not yet finished, by ``Block.start``.
        n_calls: Number of calls that have not returned.
    """

    handle: Any
    report: EngineReport | None = None
    blocks: dict[int, Block] = dataclasses.field(default_factory=dict)
    n_calls: int = 0


class RayPool:
    """The Ray actors of a run, each with an engine.

    Args:
        ray: The initialized module ``ray``.
        arguments: Arguments of ``RayWorker``.
        engines: Number of actors.
        gpus: Number of GPUs of each actor.
        block_size: Maximum number of samples of a block. A block is a group of items that an actor receives together.
        stream: Output for remarks to the user, or None.
    """

    def __init__(
        self,
        ray: Any,
        arguments: tuple[Any, ...],
        *,
        engines: int,
        gpus: float,
        block_size: int,
        stream: TextIO | None,
    ) -> None:
        self._ray, self._arguments, self._block_size, self._stream = ray, arguments, block_size, stream
        # Ray does not restart an actor; this class sends the blocks of a dead actor to another one instead.
        self._make_actor = ray.remote(max_restarts=0, num_gpus=gpus or None)(RayWorker).remote
        self._actors: list[_Actor] = []
        self._callers: dict[Any, _Actor] = {}  # the actor of each call that has not returned
        self._to_repeat: list[Block] = []
        self._n_deaths: dict[int, int] = {}  # by the start of a block
        self._n_deaths_at_start = 0
        self._report: EngineReport | None = None
        self._failure: str | None = None
        for _ in range(engines):
            self._add_actor()
        n_gpus = ray.cluster_resources().get("GPU", 0)
        if n_gpus < gpus * engines:
            self._say(f"the cluster has {n_gpus:g} GPUs, {engines} engines need {gpus * engines:g}: some must wait")

    def start(self) -> tuple[str, dict[str, Any]]:
        """Waits for the first engine. Returns the name of the engine's model, and the engine's settings."""
        while self._report is None:
            self._receive()
        return self._report.name, self._report.settings

    def run(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, list[dict[str, Any]]]]:
        """Samples blocks (groups of items) on the actors, and yields each finished block with its samples.

        The blocks are yielded in the order in which they finish. A sample is a JSON object.

        Raises:
            BlockError: If a block cannot be sampled. The blocks that are being sampled are finished and yielded first.
        """
        while True:
            for actor in self._actors:
                self._fill(actor, blocks)
            if not any(actor.blocks for actor in self._actors):
                if self._failure is not None:
                    raise BlockError(self._failure)
                if (block := self._next_block(blocks)) is None:
                    return
                self._to_repeat.append(block)  # no engine is ready yet
            for block, result in self._receive():
                if result.error is None:
                    yield block, [record for records in result.records for record in records]
                else:
                    self._failure = self._failure or result.error

    def close(self) -> None:
        """Ends all actors. Idle actors first close their engines."""
        refs = [actor.handle.__ray_terminate__.remote() for actor in self._actors if not actor.n_calls]
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=_STOP_S)
        for actor in self._actors:
            self._ray.kill(actor.handle)

    def _fill(self, actor: _Actor, blocks: Iterator[Block]) -> None:
        """Sends blocks (groups of items) to an actor, until it has enough work."""
        if actor.report is None:
            return
        concurrency = actor.report.concurrency
        if concurrency is not None and actor.n_calls:
            return  # the next call begins when this one returns
        n_most = _CALLS if concurrency is None else math.ceil(_AHEAD * concurrency / self._block_size)
        new: list[Block] = []
        while self._failure is None and len(actor.blocks) < n_most:
            if any(map(self._is_suspicious, actor.blocks)):
                break
            block = self._next_block(blocks)
            if block is None:
                break
            if self._is_suspicious(block.start) and actor.blocks:
                self._to_repeat.append(block)
                break
            actor.blocks[block.start] = block
            new.append(block)
        if concurrency is None:
            for block in new:
                self._call(actor, actor.handle.step, [block])
        elif actor.blocks:
            self._call(actor, actor.handle.step, new)

    def _next_block(self, blocks: Iterator[Block]) -> Block | None:
        return self._to_repeat.pop() if self._to_repeat else next(blocks, None)

    def _is_suspicious(self, start: int) -> bool:
        """Returns whether one more death of an actor during this block would end the run.

        ``start`` identifies the block, a group of items. An actor that gets such a block gets no other block at the
        same time.
        """
        return self._n_deaths.get(start, 0) == _MAX_DEATHS - 1

    def _add_actor(self) -> None:
        actor = _Actor(self._make_actor(*self._arguments))
        self._actors.append(actor)
        self._call(actor, actor.handle.start)

    def _call(self, actor: _Actor, method: Any, *arguments: Any) -> None:
        self._callers[method.remote(*arguments)] = actor
        actor.n_calls += 1

    def _receive(self) -> list[tuple[Block, BlockResult]]:
        """Waits until an actor answers a call, and returns the finished blocks of items with their results."""
        (ref,), _ = self._ray.wait(list(self._callers), num_returns=1)
        actor = self._callers.pop(ref)
        actor.n_calls -= 1
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            what = "creating an engine" if actor.report is None else " and ".join(map(str, actor.blocks.values()))
            raise RuntimeError(f"{what} failed: {describe_error(error.cause or error)}") from error
        except self._ray.exceptions.RayError as error:  # the actor or its machine died
            self._replace(actor, error)
            return []
        if isinstance(answer, EngineReport):
            self._check(answer)
            actor.report = answer
            return []
        return [(actor.blocks.pop(result.start), result) for result in answer]

    def _check(self, report: EngineReport) -> None:
        """Raises RuntimeError if the settings of an engine differ from those of the first engine."""
        self._report = self._report or report
        for name, first, second in differences(self._report.settings, report.settings):
            raise RuntimeError(f"all engines must have the same settings, got {first!r} and {second!r} for {name}")

    def _replace(self, actor: _Actor, error: Exception) -> None:
        """Replaces a dead actor by a new one, and queues the dead actor's blocks of items again.

        If three actors have died while they sampled the same block, the run fails.
        """
        self._ray.kill(actor.handle)
        self._actors.remove(actor)
        self._callers = {ref: caller for ref, caller in self._callers.items() if caller is not actor}
        reason = describe_error(error)
        if actor.report is None:
            self._n_deaths_at_start += 1
            if self._n_deaths_at_start >= _MAX_DEATHS:
                raise RuntimeError(f"{self._n_deaths_at_start} engines died while they were created: {reason}")
        for block in actor.blocks.values():
            n_deaths = self._n_deaths[block.start] = self._n_deaths.get(block.start, 0) + 1
            if n_deaths >= _MAX_DEATHS:
                self._failure = self._failure or f"{block}: {n_deaths} engines died: {reason}"
            else:
                self._to_repeat.append(block)
        self._to_repeat.sort(key=lambda block: block.start, reverse=True)
        self._say("an engine died; another one takes over its blocks")
        self._add_actor()

    def _say(self, remark: str) -> None:
        if self._stream is not None:
            print(remark, file=self._stream, flush=True)
