"""Runs tasks in parallel processes, which end with their parent process. Importing this module is fast."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_WATCH_S = 1.0

Future = concurrent.futures.Future


class Workers:
    """Runs tasks in several processes, or in this process if ``jobs`` is 1.

    Use it in a ``with`` block. If the block raises an exception, all processes are ended.

    Args:
        jobs: Number of processes.
        begin: Function that each process calls before its first task. Like the tasks, it must be importable.
        *args: Arguments of ``begin``.
    """

    def __init__(self, jobs: int, begin: Callable[..., object], *args: Any) -> None:
        self.jobs = jobs
        self._begin, self._args = begin, args
        self._context = multiprocessing.get_context("spawn")  # a fork may deadlock the threads of torch
        self._stop = self._context.Event()
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.jobs == 1:
            self._begin(*self._args)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        """Starts a task, and returns its future. With one job, the task runs before ``submit`` returns."""
        if self.jobs == 1:
            future: Future[Any] = Future()
            try:
                future.set_result(task(*args))
            except BaseException as error:
                future.set_exception(error)
            return future
        try:
            return self._processes().submit(task, *args)
        except concurrent.futures.process.BrokenProcessPool:  # a process was killed, perhaps for its memory
            self._executor = None
            return self._processes().submit(task, *args)

    def _processes(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._executor is None:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self.jobs, self._context, _begin, (os.getpid(), self._stop, self._begin, self._args)
            )
        return self._executor


def _begin(parent: int, stop: Any, begin: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Sets up a worker process: starts a watching thread, then calls ``begin(*args)``.

    The thread ends this process if the parent process, with the pid ``parent``, has ended. It also ends this process
    if the event ``stop`` is set.
    """

    def watch() -> None:
        while os.getppid() == parent and not stop.wait(_WATCH_S):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    begin(*args)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt inside the ``with`` block. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
