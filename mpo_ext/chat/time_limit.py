"""A time limit for code of others that runs in this process, such as a chat template."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator


class _TimeUpError(BaseException):
    """Interrupts a block. It is no ``Exception``, so that the block does not handle it."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises ``TimeoutError`` in the block of a ``with`` statement if the block takes longer.

    It ends pure Python code, in any thread; a call of another language is ended when it returns.

    Args:
        seconds: Time that the block may take.
        what: Name of the work for the message.
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
            while is_up and not has_arrived:  # the exception is on its way and must not arrive later
                time.sleep(0.001)
    except _TimeUpError:
        raise TimeoutError(f"{what} must end within {seconds:g} seconds, got no end") from None
