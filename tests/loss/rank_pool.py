"""Four local processes (gloo) that run a function together. The tests of a module share them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 4
TIMEOUT_S = 60  # of a collective; a test may take twice as long
#: In a worker, its process groups by name: "all" four ranks, "pair" (0, 1 | 2, 3) and "cross" (0, 2 | 1, 3).
GROUPS: dict[str, dist.ProcessGroup] = {}


class RankPool:
    """Runs a function on all ranks in parallel."""

    def __init__(self, store: str) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(RANKS)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``function(rank, *args)`` on all ranks. Returns the results; an error on any rank fails the test."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < RANKS:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, 2 * TIMEOUT_S)
            assert ready, f"ranks {sorted(results)} of {RANKS} have finished; the others hang"
            for pipe in ready:
                results[self.pipes.index(pipe)] = pipe.recv()
        errors = {rank: error for rank, (_, error) in sorted(results.items()) if error}
        assert not errors, "\n".join(f"rank {rank}: {error}" for rank, error in errors.items())
        return [results[rank][0] for rank in range(RANKS)]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MPO_CPU_MATMUL", "float32")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT_S)
    )
    for name, members in {"all": [[0, 1, 2, 3]], "pair": [[0, 1], [2, 3]], "cross": [[0, 2], [1, 3]]}.items():
        for ranks in members:
            group = dist.new_group(ranks)
            if rank in ranks:
                GROUPS[name] = group
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(rank, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
