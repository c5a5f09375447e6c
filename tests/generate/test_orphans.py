"""Tests ``ended_with_this_process``: child processes end when their parent ends, even if SIGKILL ends the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpo_ext.generate.orphans import children

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")

#: Starts a process before the block, three in it (a fork, another program, and a child of it) and one after it.
PARENT = """
import os, subprocess, sys, time
from mpo_ext.generate.orphans import ended_with_this_process

def sleeper():
    return subprocess.Popen(["sleep", "60"]).pid

before = sleeper()
with ended_with_this_process():
    forked = before if {is_inside} else os.fork()  # a fork would keep the pipe to the watcher open
    if forked == 0:
        time.sleep(60)
    nested = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; trap '' TERM; wait; sleep 60"], stdout=subprocess.PIPE)
    child = int(nested.stdout.readline())
    time.sleep({starting_s})
    if {is_inside}:
        print(before, before, nested.pid, child, flush=True)
        time.sleep({end_s})
time.sleep(0.6)
print(before, sleeper(), forked, nested.pid, child, flush=True)
time.sleep({end_s})
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("number", "starting_s", "is_inside"),
    [(signal.SIGKILL, 0, False), (signal.SIGTERM, 1, False), (None, 0, False), (signal.SIGKILL, 1, True)],
)
def test_processes_of_the_block_end_with_their_parent(
    number: signal.Signals | None, starting_s: int, is_inside: bool
) -> None:
    code = PARENT.format(starting_s=starting_s, is_inside=is_inside, end_s=60 if number else 0)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    before, after, *started = map(int, parent.stdout.readline().split())
    try:
        if number is not None:
            assert all(map(is_alive, started))
            parent.send_signal(number)
        parent.wait(10)
        assert wait_until_gone(started, 10)
        assert is_alive(before)
        assert is_alive(after)
    finally:
        for pid in (before, after, *started):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_children_of_a_process_that_does_not_exist() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert children(gone.pid) == set()
