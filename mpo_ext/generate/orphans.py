"""Ends the child processes that a library starts, as soon as their parent process has ended.

vLLM's engine process does not notice that its parent was killed (vLLM issue 55510), and keeps the GPU's memory. A
watcher therefore waits until the parent has ended, and then ends the engine process. The watcher is this file, run as
a script. Without ``/proc``, for example on macOS, there is no watcher.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

_INTERVAL_S = 0.3
_GRACE_S = 3.0  # time to end after SIGTERM; then SIGKILL follows
_WATCHERS: list["subprocess.Popen[bytes]"] = []  # keeps the running watchers from being garbage-collected


@contextlib.contextmanager
def ended_with_this_process() -> Iterator[None]:
    """Starts a watcher for the child processes that are started inside the ``with`` block.

    As soon as this process has ended, even by SIGKILL, the watcher ends these children and their descendants. Children
    that start before or after the block are not ended.
    """
    if not os.path.isdir("/proc/self/task"):
        yield
        return
    parent = os.getpid()
    command = [sys.executable, "-I", "-S", __file__, *map(str, [parent, *children(parent)])]
    # A new session, so that Ctrl-C in a terminal and signals to the process group do not end the watcher.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), watcher.stdin as pipe:  # type: ignore[union-attr]
            pipe.write(" ".join(map(str, children(parent))).encode() + b"\n")


def children(pid: int) -> set[int]:
    """Returns the pids of the direct children of a process; an empty set if the process does not exist."""
    pids: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                pids.update(map(int, file.read().split()))
    return pids


def watch(parent: int, excluded: set[int]) -> None:
    """Waits until the process ``parent`` has ended. Then ends the parent's children and their descendants.

    The context manager ``ended_with_this_process`` starts this function in a separate process, the watcher. Only
    children that the parent started inside the ``with`` block are ended. At the end of the block, the parent writes
    the pids of its children to the watcher's stdin. The watcher ignores children that start later.

    Args:
        parent: Pid of the watcher's parent.
        excluded: Pids of the parent's children that started before the block. They are not ended.
    """
    excluded = {*excluded, os.getpid()}
    known: dict[int, str] = {}
    is_starting = True
    while os.getppid() == parent:
        if not is_starting:
            time.sleep(_INTERVAL_S)
        elif select.select([sys.stdin], [], [], _INTERVAL_S)[0]:
            is_starting = False
            if line := sys.stdin.readline():  # "" if the parent was killed inside the block
                known = {}
                _add(known, set(map(int, line.split())) - excluded)
        else:
            _add(known, children(parent) - excluded)
        for pid in list(known):
            _add(known, children(pid))
    end(known)


def end(processes: dict[int, str]) -> None:
    """Sends SIGTERM to processes and their children. After some seconds, sends SIGKILL to those that still run.

    Args:
        processes: Maps each pid to the start time of the process. If the start time has changed, the pid belongs to a
            new process, which is not ended.
    """
    for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 0.0)):
        for pid in list(processes):
            _add(processes, children(pid))
        for pid, start in processes.items():
            if _start_time(pid) == start:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        deadline_s = time.monotonic() + patience_s
        while any(_start_time(pid) == start for pid, start in processes.items()) and time.monotonic() < deadline_s:
            time.sleep(0.1)


def _add(known: dict[int, str], pids: Iterable[int]) -> None:
    for pid in pids:
        start = _start_time(pid)
        if start is not None:
            known[pid] = start


def _start_time(pid: int) -> str | None:
    """Returns the start time of a process, or None if the process has ended or is a zombie.

    The start time distinguishes the process from a later process with the same pid.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


if __name__ == "__main__":
    watch(int(sys.argv[1]), set(map(int, sys.argv[2:])))
