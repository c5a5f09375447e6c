"""Runs the commands of ``mpo-ext iterate`` as child processes, one after the other.

On Linux, the child processes end if this process is killed, even by SIGKILL.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import mpo_ext
from mpo_ext.files import FileLock, LockedError
from mpo_ext.generate.orphans import ended_with_this_process
from mpo_ext.train.signals import handled

_GROUP_S = 60.0  # maximum time to wait for processes that outlive their launcher


class InterruptedStageError(Exception):
    """Raised if this process has received SIGINT or SIGTERM. A running command ends before the error is raised.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class StageRunner:
    """Runs commands while it holds the lock of ``folder``; a context manager.

    Each command runs in its own process group. SIGINT and SIGTERM are forwarded to this group, so that training writes
    a checkpoint. On Linux, the group is killed if this process is killed.

    Entering the context locks the folder against other processes. If an earlier process was killed, its commands may
    still run. Entering waits until these commands have ended.

    Raises:
        LockedError: If another process holds the lock of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._received: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "StageRunner":
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(FileLock(self.folder / "iterate.lock", str(self.folder)))
            self._stage_lock = stack.enter_context(self._wait_for_old_stages())
            stack.enter_context(ended_with_this_process())
            stack.enter_context(handled(self._note))
            self._close = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()

    def run(self, command: Sequence[str]) -> int:
        """Runs a command, waits for its end, and returns its exit status.

        If a signal killed the command, the status is minus the number of the signal.

        Raises:
            OSError: If the program cannot be started.
            InterruptedStageError: If this process has received SIGINT or SIGTERM.
        """
        if self._received is not None:
            raise InterruptedStageError(self._received)
        package = str(Path(mpo_ext.__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        # PYTHONSAFEPATH: modules in the current folder must not replace modules of Python.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        sys.stdout.flush()
        process = subprocess.Popen(
            list(command), env=environment, start_new_session=True, pass_fds=[self._stage_lock.fileno()]
        )
        self._process = process
        if self._received is not None:  # the signal arrived before ``self._process`` was set
            self._pass_on(self._received)
        status = process.wait()
        _wait_for_group(process.pid)
        self._process = None
        if self._received is not None:
            raise InterruptedStageError(self._received)
        return status

    @contextlib.contextmanager
    def _wait_for_old_stages(self) -> Iterator[FileLock]:
        """Locks ``stage.lock`` and yields the lock. Each command inherits the lock.

        If an earlier run was killed, its last command may still hold the lock. This method then waits until that
        command has ended.
        """
        path, what = self.folder / "stage.lock", f"the stages of {self.folder}"
        lock = FileLock(path, what)
        try:
            lock.__enter__()
        except LockedError as error:
            print(f"waits for the last stage of a killed run to end: {error}", file=sys.stderr)
            lock = FileLock(path, what, wait=True)
            lock.__enter__()
        with contextlib.ExitStack() as stack:
            stack.push(lock)
            yield lock

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _wait_for_group(group: int) -> None:
    """Waits up to ``_GROUP_S`` seconds for all processes of a group to end, then kills those that are left."""
    deadline_s = time.monotonic() + _GROUP_S
    while time.monotonic() < deadline_s:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
