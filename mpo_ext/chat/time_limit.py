"""A time limit for third-party code that runs in this process, such as a chat template."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator


class _TimeUpError(BaseException):
    """Interrupts a ``with`` block. It is a ``BaseException``, so no ``except Exception`` in the block catches it."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Returns a context manager that raises ``TimeoutError`` if its block takes longer than ``seconds``.

    The time limit works in every thread. A call of compiled code is not interrupted. The error is raised after the
    call.

    Args:
        seconds: Time limit of the block, in seconds.
        what: Name of the work in the error message.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    is_done = is_up = has_arrived = False

    def interrupt() -> None:
        nonlocal is_up
        with lock:
            if not is_done:
                is_up = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeUpError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        except _TimeUpError:
            has_arrived = True
            raise
        finally:
            timer.cancel()
            with lock:
                is_done = True
            while is_up and not has_arrived:  # waits for the exception, which must not arrive after the block
                time.sleep(0.001)
    except _TimeUpError:
        raise TimeoutError(f"{what} must end within {seconds:g} seconds, got no end") from None
