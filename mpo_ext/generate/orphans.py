"""Ends the processes that a library has started, after the process that used the library was killed.

vLLM's engine process does not notice that its parent was killed (vLLM issue 55510), and would keep the GPU's memory. A
watcher, which is this file run as a script, waits until the parent has ended in any way and then ends the processes.
Without ``/proc``, for example on macOS, nothing is watched.
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
    """Watches the processes that are started in a ``with`` block, directly or by their children.

    They are ended as soon as this process has ended, even by SIGKILL. Processes from before or after the block are
    left alone.
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
    """Returns the pids of the children of a process; an empty set if the process does not exist."""
    pids: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                pids.update(map(int, file.read().split()))
    return pids


def watch(parent: int, excluded: set[int]) -> None:
    """Waits until ``parent``, the parent of this process, has ended, and then ends the processes that it left behind.

    When ``parent`` has started all processes to be ended, it writes a line with the pids of its children to stdin.
    (Closing stdin is not enough: processes that the parent has forked hold it open.) Children that the parent starts
    later are left alone. All descendants of the processes to be ended are ended, too.

    Args:
        parent: Pid of the parent.
        excluded: Pids of children of the parent that are left alone.
    """
    excluded = {*excluded, os.getpid()}
    known: dict[int, str] = {}
    is_starting = True
    while os.getppid() == parent:
        if not is_starting:
            time.sleep(_INTERVAL_S)
        elif select.select([sys.stdin], [], [], _INTERVAL_S)[0]:
            is_starting = False
            known = {}
            _add(known, set(map(int, sys.stdin.readline().split())) - excluded)
        else:
            _add(known, children(parent) - excluded)
        for pid in list(known):
            _add(known, children(pid))
    end(known)


def end(processes: dict[int, str]) -> None:
    """Ends processes with SIGTERM, and after some seconds with SIGKILL.

    Args:
        processes: Start time of each process, by pid. A process whose start time differs is left alone, because the
            system has given the pid to another process.
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
    """Returns the start time of a process; another process with the same pid has another start time.

    Returns None if the process has ended. A zombie, which waits for its parent, counts as ended.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


if __name__ == "__main__":
    watch(int(sys.argv[1]), set(map(int, sys.argv[2:])))
