"""Runs a pipeline on a local Ray cluster: ``python ray_driver.py QUESTIONS OUT PIDS DELAY_S``.

Each engine starts a child process. The folder PIDS gets a file for each engine and each child, with the process id as
its name. DELAY_S is the time in seconds that each request takes.
"""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stub_engine import StubEngine

from mpo_ext.generate import ray_stages
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Generation, Request


class RayStub(StubEngine):
    """A stub engine with faults, which depend on the question.

    The question ``broken`` raises an error, ``deadly`` kills the process, and ``slow`` takes two seconds. With
    ``child``, the engine starts a child process. Each process writes a file with its process id as the name to the
    folder ``pids``.
    """

    def __init__(
        self,
        *,
        pids: Path,
        delay_s: float = 0.0,
        broken: str = "",
        deadly: str = "",
        slow: str = "",
        child: bool = False,
    ) -> None:
        super().__init__(delay_s=delay_s)
        self.broken, self.deadly, self.slow = broken, deadly, slow
        pids.mkdir(exist_ok=True)
        (pids / str(os.getpid())).touch()
        if child:  # as vLLM starts its engine core
            (pids / str(subprocess.Popen(["sleep", "600"]).pid)).touch()

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        questions = {request.question for request in requests}
        if self.broken in questions:
            raise FloatingPointError(f"NaN in {len(requests)} requests")
        if self.deadly in questions:
            os.kill(os.getpid(), 9)
        if self.slow in questions:
            time.sleep(2)
        return super().generate(requests)


def make_pipeline(samples: int = 2) -> DropoutNTP:
    return DropoutNTP(DropoutNTPConfig(samples=samples))


def run(
    source: Path, out: Path, pids: Path, *, delay_s: float = 0.0, stub: Any = None, samples: int = 2, **options: Any
) -> Any:
    make_engine = functools.partial(RayStub, pids=pids, delay_s=delay_s, **(stub or {}))
    options = {"engines": 2, "block_size": 4, "stream": None, **options}
    return ray_stages.run(make_pipeline(samples), make_engine, source, out, **options)


if __name__ == "__main__":
    source, out, pids = map(Path, sys.argv[1:4])
    run(source, out, pids, delay_s=float(sys.argv[4]), stub={"child": True}, address="local")
