"""Gives random access to the lines of JSON lines files, and reads and writes the format "pairs"."""

import collections
import json
import math
import os
import threading
import weakref
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from mpo_ext.checks import MAX_DEPTH, check_index, check_integer, is_nested_deeply, shorten
from mpo_ext.data.media import check_media, drop_fields
from mpo_ext.data.paths import RootMap, map_roots
from mpo_ext.data.reader import MAX_LINE_BYTES, BadLine, FieldError, Location, PairSequence, raise_bad_line
from mpo_ext.data.records import Pair
from mpo_ext.data.stored_turns import read_stored_turns
from mpo_ext.files import atomic_write, check_no_pipe

_CHUNK = 1 << 20
#: The only field of a line that replaces an unreadable record; its value is the reason.
UNREADABLE = "$unreadable"


_MOST_OPEN = 64
_open_files: "dict[int, weakref.ref[LineFile]]" = {}  # by id, in the order of their last use
_open_lock = threading.RLock()


class LineFile(PairSequence):
    """The pairs of a file with one pair per line. A pair is read from the file on each access.

    Empty lines are ignored. The index of line positions takes 8 bytes of memory per line, or 16 bytes if the file has
    empty lines. Data loader workers can share a LineFile, because reads do not move a file position. Only the 64 most
    recently read LineFiles of a process keep their file open.

    Args:
        path: Path of the file.
        parse: Function that converts a line's JSON object and text to a pair. Its errors are raised as BadLine.
        subset: Name of the data set, which becomes ``Location.subset``; None: the file's name without suffix.
        root_map: A tuple (old path, new path) for each folder that has moved.
        max_line_bytes: Maximum length of a line in bytes. A longer line is not loaded: reading it raises BadLine.
        name: Path of the file in locations and error messages; None: ``path``.
        ignore: Names of fields to remove, at any depth, before a line is parsed.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is a pipe or a device, because its lines are read more than once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parse: Callable[[dict[str, Any], str], Pair],
        *,
        subset: str | None = None,
        root_map: RootMap = (),
        max_line_bytes: int = MAX_LINE_BYTES,
        name: str | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        check_integer("max_line_bytes", max_line_bytes, least=1)
        check_no_pipe("path", path, ": write its rows to a file")
        self.path = os.fspath(path)
        self.name = self.path if name is None else name
        self.subset = Path(self.name).stem if subset is None else subset
        self._ignore = frozenset(ignore)
        self._parse = parse
        self._root_map = tuple(root_map)
        self._max_line_bytes = max_line_bytes
        self._file: IO[bytes] | None = None
        self._opened()
        self._starts: array[int] | None = None
        self._numbers: np.ndarray | None = None

    def close(self) -> None:
        """Closes the file. The next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        starts, numbers = self._index()
        return len(starts) - 1 if numbers is None else len(numbers)

    def read(self, index: int) -> Pair:
        where = self.locate(index)
        with raise_bad_line(where):
            values, text = self._read_object(where)
            pair = check_media(values, self._parse(values, text))
            return map_roots(pair, self._root_map)

    def read_object(self, index: int) -> dict[str, Any]:
        """Returns the JSON object of a line, which need not be a pair.

        Raises BadLine if the line does not hold a JSON object.
        """
        where = self.locate(index)
        with raise_bad_line(where):
            return self._read_object(where)[0]

    def locate(self, index: int) -> Location:
        index = check_index(index, len(self))
        _, numbers = self._index()
        return Location(self.subset, self.name, (index if numbers is None else int(numbers[index])) + 1)

    def _read_object(self, where: Location) -> tuple[dict[str, Any], str]:
        text = self._read_bytes(where).decode("utf-8-sig" if where.line == 1 else "utf-8")
        values = parse_object(text)
        if UNREADABLE in values:
            raise FieldError(str(values[UNREADABLE]))
        return drop_fields(values, self._ignore) if self._ignore else values, text

    def _read_bytes(self, where: Location) -> bytes:
        starts, _ = self._index()
        start, stop = starts[where.line - 1], starts[where.line]
        if stop - start > self._max_line_bytes:
            limit = f"must be at most {self._max_line_bytes:,} bytes long, got {stop - start:,}"
            raise BadLine(where, "huge line", limit)
        raw = self._pread(stop - start, start)
        if len(raw) != stop - start:
            raise RuntimeError(f"{self.name} must not change while it is read, got a shorter file than was indexed")
        return raw.rstrip(b"\r\n")

    def _opened(self) -> IO[bytes]:
        with _open_lock:
            if self._file is None:
                self._file = open(self.path, "rb")  # noqa: SIM115 - lives longer than this call
            _open_files.pop(id(self), None)
            _open_files[id(self)] = weakref.ref(self)
            while len(_open_files) > _MOST_OPEN:
                if (oldest := _open_files.pop(next(iter(_open_files)))()) is not None:
                    oldest.close()
            return self._file

    def _pread(self, size: int, position: int) -> bytes:
        with _open_lock:  # no other thread may close the file in between
            return os.pread(self._opened().fileno(), size, position)

    def _index(self) -> "tuple[array[int], np.ndarray | None]":
        """Returns (starts, numbers).

        ``starts`` has the byte offset of each line. The last element of ``starts`` is the file size. ``numbers`` has
        the indices of the non-empty lines; None: no line is empty.
        """
        if self._starts is None:
            self._starts, self._numbers = self._build_index()
        return self._starts, self._numbers

    def _build_index(self) -> "tuple[array[int], np.ndarray | None]":
        starts = array("Q", [0])
        position = 0
        empty: list[int] = []
        while chunk := self._pread(_CHUNK, position):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10).astype(np.uint64) + np.uint64(position + 1)
            starts.frombytes(ends.tobytes())
            position += len(chunk)
        if starts[-1] != position:  # the last line has no newline
            starts.append(position)
        offsets = np.frombuffer(starts, np.uint64)
        lengths = np.diff(offsets)
        for line in np.flatnonzero(lengths <= 2).tolist():
            if not self._pread(int(lengths[line]), int(offsets[line])).rstrip(b"\r\n"):
                empty.append(line)
        return starts, np.setdiff1d(np.arange(len(lengths)), empty) if empty else None


def parse_object(text: str) -> dict[str, Any]:
    """Parses a JSON object strictly: field names must be unique and numbers finite.

    Raises:
        TypeError: If the text is JSON but not an object.
        json.JSONDecodeError: If the text is not JSON.
        FieldError: If a field is repeated, a number is not finite, or the object is nested too deeply.
    """
    if text.startswith("\ufeff"):  # json.loads refuses it, too
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    value = _DECODER.decode(text)
    if not isinstance(value, dict):
        raise TypeError(f"a line must hold an object, got {type(value).__name__} {text[:60]!r}")
    # Counting brackets is faster than looking at the values, and suffices for most lines.
    if text.count("{") + text.count("[") > MAX_DEPTH and is_nested_deeply(value):
        raise FieldError("nested too deeply", kind="bad JSON")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise FieldError(f"a field must be given once, got {counts.most_common(1)[0][0]!r} twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FieldError(f"numbers must be finite, got {text[:40]}", kind="bad JSON")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def dump_line(values: Mapping[str, Any], *, ensure_ascii: bool = False) -> bytes:
    """Returns an object as a line of JSON in UTF-8, formatted like the published MMPR files.

    ``ensure_ascii`` is the argument of ``json.dumps``.
    """
    return json.dumps(values, ensure_ascii=ensure_ascii, allow_nan=False).encode() + b"\n"


def read_pairs(
    path: str | os.PathLike[str], *, root_map: RootMap = (), max_line_bytes: int = MAX_LINE_BYTES
) -> LineFile:
    """Opens a file in the format "pairs", which has one ``Pair.to_dict()`` per line.

    Args:
        path: Path of the file.
        root_map: A tuple (old path, new path) for each folder that has moved.
        max_line_bytes: Maximum length of a line in bytes. Reading a longer line raises BadLine.
    """
    return LineFile(path, parse_pair, root_map=root_map, max_line_bytes=max_line_bytes)


def parse_pair(values: dict[str, Any], line: str) -> Pair:
    """Converts ``values``, the JSON object of a line in the format "pairs", to a pair. ``line`` is not used.

    A field that is None counts as not given. A table has such fields, because all its rows have the same columns.

    Raises:
        FieldError: If the images are in a field ``image``, or if ``read_stored_turns`` raises it.
        TypeError: If a field has the wrong type.
        ValueError: If a field is missing, unknown or invalid.
    """
    if values.get("image") is not None:
        raise FieldError(
            f"images of a line of pairs must be a list named 'images', got 'image' {shorten(values['image'])}: "
            "a file of such lines is read with the format 'mmpr' (--from mmpr, in a recipe format: mmpr)"
        )
    texts = ("question", "chosen", "rejected")
    given = {name: value for name, value in values.items() if value is not None or name in texts}
    return read_stored_turns(Pair.from_dict(given))


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> int:
    """Atomically writes pairs to a file in the format "pairs". Returns the number of pairs."""
    return write_lines(path, (pair.to_dict() for pair in pairs))


def write_lines(path: str | os.PathLike[str], lines: Iterable[Mapping[str, Any]]) -> int:
    """Atomically writes objects to a JSON lines file. Returns the number of objects."""
    count = 0
    with atomic_write(path) as file:
        for values in lines:
            file.write(dump_line(values))
            count += 1
    return count
