"""Handles signals: the first SIGTERM or SIGINT ends a run on all ranks after the current step, with a checkpoint."""

import contextlib
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from mpo_ext.train.ranks import gather

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAFE_PATH = "PYTHONSAFEPATH"  # environment variable of Python


class InterruptedRunError(Exception):
    """Raised if a signal ends the run while the reference log-probs are computed."""


class StopRequests:
    """Collects requests to end a run. Requests are signals to any rank, a result of ``on_step``, and early stopping.

    Attributes:
        received: Signal number (such as 15) that this rank has received, or None.
        agreed: Signal number that ends the run on all ranks, or None. ``agree`` sets it.
        is_over: Whether ``on_step`` or early stopping has requested the end of the run.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.received: int | None = None
        self.agreed: int | None = None
        self.is_over = False

    def agree(self) -> bool:
        """Combines the requests of all ranks in ``agreed`` and ``is_over``. All ranks must call this method.

        Returns True if any rank has received a signal. The signal then ends the run on all ranks.
        """
        requests = gather(self._accelerator, (self.received, self.is_over))
        self.agreed = next((received for received, _ in requests if received is not None), None)
        self.is_over = any(is_over for _, is_over in requests)
        return self.agreed is not None

    def status(self) -> int:
        """Returns the exit status of a run that the signal ended, as shells report it: 143 for SIGTERM."""
        return 128 + (self.agreed or signal.SIGTERM)

    def name(self) -> str:
        """Returns the name of the signal that ends the run, such as "SIGTERM"."""
        return signal.Signals(self.agreed or signal.SIGTERM).name

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Stores the number of a SIGTERM or SIGINT in ``received`` during the ``with`` block.

        After the first signal, another SIGINT raises ``KeyboardInterrupt``.
        """

        def note(number: int, frame: object) -> None:
            self.received = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        with handled(note):
            yield


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Installs ``handler`` for SIGTERM and SIGINT during the ``with`` block. Does nothing outside the main thread."""
    try:
        before = {number: signal.signal(number, handler) for number in _SIGNALS}
    except ValueError:  # only the main thread may set handlers
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def blocked_in_new_workers() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT while the ``with`` block starts worker processes.

    In a worker, the signals stay blocked until ``init_worker`` has set the signal handlers. The context manager also
    sets PYTHONSAFEPATH, so that workers do not import modules from the current folder (Python 3.11 or later).
    """
    safe_path = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        multiprocessing.resource_tracker.ensure_running()  # started first, because its start unblocks the signals
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
    finally:
        if safe_path is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = safe_path


def init_worker(worker: int) -> None:
    """Makes a data worker ignore SIGINT and the first SIGTERM, because the main process ends its workers.

    ``worker`` is the worker's number, which is not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
