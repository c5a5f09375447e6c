"""Tests the worker processes of the study: how they get tasks and how they end."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.study.workers import Workers, sigterm_as_interrupt

_PATIENCE_S = 60.0


def is_alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(process: int) -> None:
    end = time.monotonic() + _PATIENCE_S
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(process)


def test_one_job_is_this_process() -> None:
    with Workers(1, os.umask, 0o022) as workers:
        assert workers.submit(os.getpid).result() == os.getpid()
        assert isinstance(workers.submit(int, "x").exception(), ValueError)


def test_several_jobs_are_other_processes_and_outlive_one_that_is_killed() -> None:
    with Workers(2, os.nice, 0) as workers:
        first = workers.submit(os.getpid).result()
        assert first != os.getpid()
        assert isinstance(workers.submit(int, "x").exception(), ValueError)
        broken = workers.submit(os._exit, 9).exception()
        assert isinstance(broken, concurrent.futures.process.BrokenProcessPool)
        second = workers.submit(os.getpid).result()
        assert second not in (first, os.getpid())
    wait_for_end(second)


def test_an_interrupt_ends_running_tasks() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(2, os.nice, 0) as workers:  # noqa: PT012
        worker = workers.submit(os.getpid).result()
        workers.submit(time.sleep, 10 * _PATIENCE_S)
        raise KeyboardInterrupt
    assert time.monotonic() - began < _PATIENCE_S
    wait_for_end(worker)


_PARENT = """
import os, time
from benchmarks.study.workers import Workers
if __name__ == "__main__":
    with Workers(2, os.nice, 0) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        workers.submit(time.sleep, 600)
        time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    # The script lies elsewhere, so the checkout, which holds the benchmarks, is not on its path.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.kill()
        parent.stdout.close()
    wait_for_end(worker)


def test_sigterm_is_an_interrupt_only_in_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE_S)
    assert signal.getsignal(signal.SIGTERM) == before
