"""Files that appear whole or not at all, folders synced to disk, and locks between processes."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name only when it is whole and on the disk.

    Args:
        path: Where it goes; a file that stands there is replaced at the end, or left alone if the block raises.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk, so that a rename survives a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class LockedError(RuntimeError):
    """Another process has the file."""


class FileLock:
    """Holds a file for one process, with its pid in it; the kernel lets go of it when the process dies.

    Args:
        path: The lock file. It stays behind: to delete it would let two processes lock two files of one name.
        what: What the lock stands for, for the error.
        wait: Waits until the file is free, instead of raising.

    Raises:
        LockedError: If another process has it.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self.path = path
        self.what = what
        self.wait = wait
        self._file = -1

    def __enter__(self) -> "FileLock":
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise LockedError(f"{self.what} must have one writer, but process {pid} is writing it") from None
        except OSError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._file = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Any]:
    """Opens a file for writing bytes that takes the place of ``path`` when it is complete, and not before.

    The caller holds a lock: an unfinished file of an earlier process is overwritten.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
