"""Atomic writes, syncing to disk, and locks between processes."""

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, is_locked: bool = False) -> Iterator[IO[bytes]]:
    """Yields a temporary file that is open for writing. After the ``with`` block, the file is renamed to ``path``.

    Before the renaming, the file is synced to disk. If the block raises, ``path`` stays unchanged.

    Args:
        path: Path of the file to write. Its folder is created if it does not exist.
        is_locked: Whether the caller holds a lock on ``path``. If so, the temporary file has a fixed name. It then
            replaces the temporary file of a killed process.
    """
    target = Path(path)
    token = "partial" if is_locked else f"{secrets.token_hex(6)}.tmp"
    with _renamed(target, f".{target.name[:200]}.{token}") as temporary, open(temporary, "wb") as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path. After the ``with`` block, renames the file at this path to ``path``.

    The temporary path has the same suffix as ``path``. Use this function only for libraries that write to a path. In
    all other cases, use ``atomic_write``.
    """
    target = Path(path)
    with _renamed(target, f".{target.stem[:200]}.{secrets.token_hex(6)}{target.suffix}") as temporary:
        yield temporary


@contextlib.contextmanager
def _renamed(target: Path, temporary_name: str) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(temporary_name)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_outputs(
    name: str,
    outputs: Iterable[str | os.PathLike[str]],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    is_ours: bool = True,
) -> None:
    """Checks that writing the outputs destroys no file of the user.

    Args:
        name: Name of the argument with the output path, for error messages.
        outputs: Paths that will be written. Paths that do not exist are ignored.
        inputs: Paths that will be read.
        is_ours: True: mpo_ext wrote the existing outputs, so they may be replaced. False: no output may exist.

    Raises:
        ValueError: If an output and an input are the same file, even under two paths. Also raised if an output is a
            folder that contains an input.
        FileExistsError: If an output exists and ``is_ours`` is False.
    """
    existing = {_identity(path): os.fspath(path) for path in outputs if os.path.lexists(path)}
    for path in inputs if existing else ():
        real = Path(os.path.realpath(path))
        for place in (real, *real.parents):
            if place.exists() and (output := existing.get(_identity(place))) is not None:
                raise ValueError(f"{name} must not replace an input, got the input {os.fspath(path)} in {output}")
    if existing and not is_ours:
        first = next(iter(existing.values()))
        raise FileExistsError(
            f"{name} must be a new place or an earlier output of the same command, got {first}, which mpo_ext has not "
            "written: choose another place"
        )


def check_no_pipe(name: str, path: str | os.PathLike[str], advice: str = "") -> None:
    """Raises ValueError if a path is a pipe or a device, which cannot be read twice.

    ``name`` is the name of the argument with the path, for the error message. ``advice`` ends the message. The path
    need not exist.
    """
    if os.path.exists(path) and not os.path.isdir(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{name} must be a file or a folder, got {os.fspath(path)}, a pipe or device{advice}")


def check_replaceable(name: str, folder: str | os.PathLike[str]) -> None:
    """Raises ValueError if a folder is the current folder or a mount point, which a new folder cannot replace.

    ``name`` is the name of the argument with the path, for the error message. The folder need not exist.
    """
    if os.path.ismount(folder):
        raise ValueError(f"{name} must not be a mount point, got {os.fspath(folder)}: name a folder inside it")
    if os.path.isdir(folder) and os.path.samefile(folder, os.getcwd()):
        raise ValueError(
            f"{name} must not be the current folder, got {os.fspath(folder)}: name another folder, or run the command "
            "in the folder above"
        )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns the device number and the inode number of a file.

    All paths of the same file give the same numbers. A broken link gives the numbers of the link.
    """
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return status.st_dev, status.st_ino


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Atomically writes a value as indented JSON."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n")


def write_and_sync(path: Path, content: bytes) -> None:
    """Creates a file with the content and syncs it to disk; raises FileExistsError if the path exists."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Syncs the entries of a folder to disk. Otherwise, a power failure could undo a rename in the folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_tree(folder: Path) -> None:
    """Syncs a folder, and all files and folders below it, to disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)


class LockedError(RuntimeError):
    """Raised if another process holds a lock."""


class FileLock:
    """A context manager that holds a lock between processes. The operating system releases it when the process dies.

    The lock file contains the process id of the holder. The message of LockedError names this id. The lock file is
    never deleted. Otherwise, two processes could lock two different files at the same path.

    Args:
        path: Path of the lock file.
        what: Name of the locked resource for the error message.
        wait: Whether to wait until the lock is free.

    Raises:
        LockedError: If another process holds the lock and ``wait`` is False.
        FileExistsError: If the file contains anything except a process id.
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
        content = os.pread(descriptor, 33, 0)
        if content.strip() and not content.strip().isdigit():
            os.close(descriptor)
            raise FileExistsError(f"{self.path} must be a lock file, got a file that mpo_ext has not written")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._file = descriptor
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def fileno(self) -> int:
        """Returns the file descriptor of the held lock. A process that inherits the descriptor also holds the lock."""
        return self._file
