"""SIGTERM and SIGINT: the first ends a run after the current step, with a checkpoint, on all ranks together."""

import contextlib
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterator
from typing import Any

from mpo_ext.train.ranks import gather

INTERRUPTED = 128 + signal.SIGTERM  # exit status of a process that SIGTERM ended, as in a shell
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptedRunError(Exception):
    """A signal ends the run while there is nothing to save yet."""


class StopRequests:
    """Requests to end a run: by a signal to any rank, or by ``on_step``.

    Args:
        accelerator: The run's ``Accelerator``.

    Attributes:
        received: The signal that this rank has received, or None.
        agreed: The signal that all ranks know of, or None.
        is_over: Whether ``on_step`` has ended the run with the current step.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.received: int | None = None
        self.agreed: int | None = None
        self.is_over = False

    def agree(self) -> bool:
        """Shares the requests among all ranks, which call it together. Returns whether a signal ends the run."""
        requests = gather(self._accelerator, (self.received, self.is_over))
        self.agreed = next((received for received, _ in requests if received is not None), None)
        self.is_over = any(is_over for _, is_over in requests)
        return self.agreed is not None

    def name(self) -> str:
        """Returns the name of the signal that ends the run."""
        return signal.Signals(self.agreed or signal.SIGTERM).name

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Notes a first SIGTERM or SIGINT instead of ending the process; a second SIGINT ends it at once."""

        def note(number: int, frame: object) -> None:
            self.received = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            handlers = {number: signal.signal(number, note) for number in _SIGNALS}
        except ValueError:  # only the main thread may set handlers
            handlers = {}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def blocked_in_new_workers() -> Iterator[None]:
    """Starts processes with the signals blocked: until ``init_worker`` runs, a signal must not kill them."""
    multiprocessing.resource_tracker.ensure_running()  # starting it unblocks the signals
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def init_worker(worker: int) -> None:
    """Makes a data worker survive a signal to the whole process group: the run ends its workers itself.

    A second SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
