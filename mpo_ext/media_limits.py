"""Restores the limits of images and videos. They are environment variables, because child processes must have them."""

import contextlib
import os
from collections.abc import Iterator

from mpo_ext.images import LIMIT_VARIABLE
from mpo_ext.videos import FPS_VARIABLE, FRAMES_VARIABLE


@contextlib.contextmanager
def restored_limits() -> Iterator[None]:
    """At the end of the ``with`` block, restores the limits of images and videos that the block has changed.

    Otherwise, a later run in this process whose recipe leaves a limit at None would have the limit of this run.
    """
    before = {name: os.environ.get(name) for name in (LIMIT_VARIABLE, FPS_VARIABLE, FRAMES_VARIABLE)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
