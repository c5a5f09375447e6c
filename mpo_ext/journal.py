"""Journals: append-only files of JSON objects, which stay readable if the writing process is killed.

Each sampling process writes a journal. The first line is a header with the settings of the run. Every other line is a
record, a JSON object with a ``key``. ``append`` returns after the operating system has received the record, so killing
the process loses no appended record.

The file is synced to disk when it is created and when it is closed. In between, an append syncs it if the last sync is
at least ``fsync_s`` seconds old. A kill or a crash can leave an incomplete last line. This line is removed when the
journal is opened.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.checks import LinesError, check_number
from mpo_ext.files import FileLock, sync_folder

_FORMAT = "mpo_ext.journal/1"
_TAIL_BYTES = 1 << 16
_MISSING = "(absent)"


class SettingsMismatchError(LinesError):
    """Raised if the settings in a journal file differ from the requested settings.

    Attributes:
        differences: (name, value in the file, requested value) of each setting that differs.
    """

    def __init__(self, path: Path, differences: Sequence[tuple[str, Any, Any]]) -> None:
        self.differences = list(differences)
        lines = "".join(f"\n  {name}: {_show(old)} in the file, {_show(new)} now" for name, old, new in differences)
        super().__init__(f"settings must be the settings that {path} was begun with (or take another output):{lines}")


class Journal:
    """An append-only file of records (JSON objects), as a context manager. Only one process at a time can open it.

    Args:
        path: Path of the file, which is created if it does not exist.
        settings: All settings that the records depend on, as JSON values.
        fsync_s: Minimum number of seconds between two syncs to disk during appends; 0 syncs at each ``append``.

    Raises:
        SettingsMismatchError: If the file was created with other settings.
        LockedError: If another process has opened the file.
        ValueError: If the file is not a journal.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, fsync_s: float = 5.0) -> None:
        check_number("fsync_s", fsync_s, "[0, inf]")
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.fsync_s = fsync_s
        self._lock = FileLock(self.path.with_name(f"{self.path.name}.lock"), str(self.path))
        self._file = -1
        self._synced_s = 0.0

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, self._file)
            _check_beginning(self._file, self.path)
            _cut_half_line(self._file)
            header = read_header(self.path)
            if header is None:
                self._write([{"format": _FORMAT, "settings": self.settings}])
                self.sync()
                sync_folder(self.path.parent)
            elif changes := list(differences(header, self.settings)):
                raise SettingsMismatchError(self.path, changes)
            self._close = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._close:
            self.sync()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends JSON objects. Syncs the file to disk if the last sync is at least ``fsync_s`` seconds old."""
        if not records:
            return
        self._write(records)
        if time.monotonic() - self._synced_s >= self.fsync_s:
            self.sync()

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the records in the order in which they were appended."""
        return read_records(self.path)

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        rest = memoryview(b"".join(map(encode_line, records)))
        while rest:  # a full disk or a signal can end a write early
            rest = rest[os.write(self._file, rest) :]

    def sync(self) -> None:
        """Syncs the file to disk."""
        os.fsync(self._file)
        self._synced_s = time.monotonic()


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record as a line of JSON in UTF-8.

    If a text contains a lone surrogate, which UTF-8 cannot encode, all non-ASCII characters are escaped.
    """
    try:
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can express and UTF-8 cannot
        return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the settings in the first line of a journal file, or None if this line is not complete yet.

    Raises:
        ValueError: If the file is not a journal.
    """
    with open(path, "rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    is_header = isinstance(header, dict) and header.get("format") == _FORMAT
    if not is_header or not isinstance(header.get("settings"), dict):
        raise ValueError(f"path must be a journal of format {_FORMAT}, got {path} beginning with {line[:80]!r}")
    return header["settings"]


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the records (JSON objects) of a journal file, and stops before an incomplete last line.

    Raises:
        ValueError: If a complete line after the header is not a JSON object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if number == 1:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} must hold one record a line, got line {number}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path} must hold one record a line, got line {number}: {line[:80]!r}")
            yield record


def _check_beginning(file: int, path: Path) -> None:
    """Raises ValueError unless a file is empty or begins with the header line of a journal.

    The header line may be incomplete. This check protects other files from ``_cut_half_line``.
    """
    beginning = encode_line({"format": _FORMAT})[:-2]
    found = os.pread(file, len(beginning), 0)
    # The JSON of a valid header may have other spaces.
    if not beginning.startswith(found) and read_header(path) is None:
        raise ValueError(f"path must be a journal of format {_FORMAT}, got {path} beginning with {found!r}")


def _cut_half_line(file: int) -> None:
    """Removes the remains of an interrupted write from the end of a file.

    These are bytes after the last newline, and a last line that is not JSON.
    """
    size = os.fstat(file).st_size
    end = _line_start(file, size)  # offset after the last newline
    if end > 0:
        start = _line_start(file, end - 1)
        try:
            json.loads(os.pread(file, end - start, start))
        except (ValueError, RecursionError):
            end = start
    if end < size:
        os.ftruncate(file, end)
        os.fsync(file)


def _line_start(file: int, end: int) -> int:
    """Returns the start offset of the line that ends at the offset ``end``."""
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, old value, new value) for each setting that differs, such as ("lora.rank", 8, 16).

    The settings are nested dicts. "(absent)" stands for a missing value. All yielded names begin with ``name``.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key, _MISSING), new.get(key, _MISSING), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _show(value: Any) -> str:
    return value if value == _MISSING else repr(value)
