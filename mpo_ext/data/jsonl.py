"""Files of one JSON object a line: an index of byte offsets for random access, strict parsing, atomic writing."""

import collections
import dataclasses
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mpo_ext.data.records import Pair
from mpo_ext.files import atomic_write

MAX_LINE_BYTES = 16 << 20
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where a pair stands.

    Attributes:
        subset: Name of its subset; the file's name where there are no subsets.
        file: The file.
        line: Number of its line or row, from 1.
    """

    subset: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class BadLine(ValueError):  # noqa: N818 - it is also handed around as a finding, not only raised
    """A line that holds no pair.

    Attributes:
        where: File and line.
        kind: "huge line", "bad UTF-8", "bad JSON", "bad field" or "bad image path".
        reason: What is wrong with it.
    """

    def __init__(self, where: Location, kind: str, reason: str) -> None:
        super().__init__(f"{where}: {kind}: {reason}")
        self.where, self.kind, self.reason = where, kind, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return BadLine, (self.where, self.kind, self.reason)


class FieldError(ValueError):
    """What a parser raises to give its own kind to a bad line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Skipped:
    """Counts what a reader left out, and keeps the first of each kind.

    Attributes:
        counts: Number of bad lines by kind.
        examples: The first bad lines of each kind.
    """

    def __init__(self, keep: int = 5) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[BadLine]] = {}
        self._keep = keep

    def add(self, bad: BadLine) -> None:
        """Counts a bad line."""
        self.counts[bad.kind] += 1
        examples = self.examples.setdefault(bad.kind, [])
        if len(examples) < self._keep:
            examples.append(bad)

    @property
    def total(self) -> int:
        """Number of bad lines of all kinds."""
        return self.counts.total()

    def lines(self) -> Iterator[str]:
        """Yields the counts and the examples as text."""
        for kind, count in self.counts.most_common():
            yield f"left out {count:,} for {kind}"
            yield from (f"  {bad.where}: {bad.reason}" for bad in self.examples[kind])


class Pairs(Sequence[Pair]):
    """What every reader is: a lazy sequence of pairs that knows where each stands and drops none silently.

    ``pairs[i]`` reads one; a bad line raises BadLine. ``scan`` yields pairs and bad lines alike.
    """

    def locate(self, index: int) -> Location:
        """Says where a pair stands."""
        raise NotImplementedError

    def scan(self) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields every entry with its place: the pair, or what is wrong with it."""
        for index in range(len(self)):
            where = self.locate(index)
            try:
                yield where, self[index]
            except BadLine as bad:
                yield where, bad

    def good(self, skipped: Skipped) -> Iterator[Pair]:
        """Yields the good pairs and counts the others.

        Args:
            skipped: Is told of every bad line.
        """
        for _, pair in self.scan():
            if isinstance(pair, BadLine):
                skipped.add(pair)
            else:
                yield pair

    def __iter__(self) -> Iterator[Pair]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class LineFile(Pairs):
    """The lines of a file as pairs, read one by one: in memory are 8 bytes per line, whatever the lines hold.

    Safe in the workers of a data loader: reads share no position, and a copy in another process opens the file anew.
    Empty lines are no lines.

    Args:
        path: The file.
        parse: Turns the object of a line, and the line itself, into a pair. What it raises makes the line a bad one.
        subset: Name for ``Location.subset``; default: the file's name without its suffix.
        max_line_bytes: A longer line is a bad one and never loaded.

    Raises:
        OSError: If the file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parse: Callable[[dict[str, Any], str], Pair],
        *,
        subset: str | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        if isinstance(max_line_bytes, bool) or not isinstance(max_line_bytes, int) or max_line_bytes < 1:
            raise ValueError(f"max_line_bytes must be a positive int, got {max_line_bytes!r}")
        self.path = os.fspath(path)
        self.subset = Path(self.path).stem if subset is None else subset
        self._parse = parse
        self._max_line_bytes = max_line_bytes
        self._file: IO[bytes] | None = open(self.path, "rb")  # noqa: SIM115 - lives as long as the reader
        self._starts: array[int] | None = None
        self._numbers: np.ndarray | None = None

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
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

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        where = self.locate(index)
        try:
            raw = self._read(where)
            text = raw.decode("utf-8-sig" if where.line == 1 else "utf-8")
            return self._parse(parse_object(text), text)
        except BadLine:
            raise
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}, {error.object[error.start : error.start + 1]!r}"
            raise BadLine(where, "bad UTF-8", reason) from None
        except json.JSONDecodeError as error:
            raise BadLine(where, "bad JSON", f"{error.msg.removesuffix(' at')} at character {error.pos}") from None
        except RecursionError:
            raise BadLine(where, "bad JSON", "nested too deeply") from None
        except FieldError as error:
            raise BadLine(where, error.kind, str(error)) from None
        except (TypeError, ValueError) as error:
            raise BadLine(where, "bad field", str(error)) from None

    def locate(self, index: int) -> Location:
        """Says where a pair stands."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        index %= size
        _, numbers = self._index()
        return Location(self.subset, self.path, (index if numbers is None else int(numbers[index])) + 1)

    def _read(self, where: Location) -> bytes:
        starts, _ = self._index()
        start, stop = starts[where.line - 1], starts[where.line]
        if stop - start > self._max_line_bytes:
            limit = f"must be at most {self._max_line_bytes:,} bytes long, got {stop - start:,}"
            raise BadLine(where, "huge line", limit)
        raw = os.pread(self._opened().fileno(), stop - start, start)
        if len(raw) != stop - start:
            raise RuntimeError(f"{self.path} must not change while it is read, got a shorter file than was indexed")
        return raw.rstrip(b"\r\n")

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115
        return self._file

    def _index(self) -> "tuple[array[int], np.ndarray | None]":
        """Byte offsets where lines start, the end of the file last; and the numbers of lines if some are empty."""
        if self._starts is None:
            self._starts, self._numbers = self._build_index()
        return self._starts, self._numbers

    def _build_index(self) -> "tuple[array[int], np.ndarray | None]":
        starts = array("Q", [0])
        file, position = self._opened().fileno(), 0
        empty: list[int] = []
        last = b"\n"
        while chunk := os.pread(file, _CHUNK, position):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10).astype(np.uint64) + np.uint64(position + 1)
            starts.frombytes(ends.tobytes())
            position += len(chunk)
            last = chunk[-1:]
        if last != b"\n":
            starts.append(position)
        offsets = np.frombuffer(starts, np.uint64)
        lengths = np.diff(offsets)
        for line in np.flatnonzero(lengths <= 2).tolist():
            if not os.pread(file, int(lengths[line]), int(offsets[line])).rstrip(b"\r\n"):
                empty.append(line)
        return starts, np.setdiff1d(np.arange(len(lengths)), empty) if empty else None


def parse_object(text: str) -> dict[str, Any]:
    """Parses a JSON object strictly: no field twice, no NaN or infinity, nothing behind it.

    Raises:
        ValueError: If it is something else; json.JSONDecodeError if it is not JSON.
    """
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    if not isinstance(value, dict):
        raise TypeError(f"a line must hold an object, got {type(value).__name__} {text[:60]!r}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise FieldError("bad field", f"a field must be given once, got {counts.most_common(1)[0][0]!r} twice")
    return values


def _no_constant(text: str) -> float:
    raise FieldError("bad JSON", f"numbers must be finite, got {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FieldError("bad JSON", f"numbers must be finite, got {text[:40]}")
    return value


def dump_line(values: Mapping[str, Any], *, ensure_ascii: bool = False) -> bytes:
    """Returns a line of JSON as the authors of MMPR write it, its end included."""
    return json.dumps(values, ensure_ascii=ensure_ascii, allow_nan=False).encode() + b"\n"


def read_pairs(
    path: str | os.PathLike[str],
    *,
    root_map: Sequence[tuple[str, str]] = (),
    max_line_bytes: int = MAX_LINE_BYTES,
) -> LineFile:
    """Opens a file of our own format, one Pair a line.

    Args:
        path: The file.
        root_map: Pairs of prefixes (old, new): where the images have moved to.
        max_line_bytes: A longer line is a bad one.
    """
    return LineFile(path, _PairParser(tuple(root_map)), max_line_bytes=max_line_bytes)


@dataclasses.dataclass(frozen=True)
class _PairParser:
    root_map: tuple[tuple[str, str], ...]

    def __call__(self, values: dict[str, Any], line: str) -> Pair:
        if "image" in values:
            raise FieldError(
                "bad field",
                f"images of a line of pairs must be a list named 'images', got 'image' {str(values['image'])[:80]!r}: "
                "a file of such lines is read with the format 'mmpr' (--from mmpr, in a recipe format: mmpr)",
            )
        return remap(Pair.from_dict(values), self.root_map)


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> int:
    """Writes our own format, one Pair a line, whole or not at all. Returns the number of pairs."""
    count = 0
    with atomic_write(path) as file:
        for pair in pairs:
            file.write(dump_line(pair.to_dict()))
            count += 1
    return count


def parse_root_map(text: str) -> tuple[str, str]:
    """Parses OLD=NEW.

    Raises:
        ValueError: If there is no "=" or nothing before it.
    """
    old, equals, new = text.partition("=")
    if not equals or not old or not new:
        raise ValueError(f"root_map must read OLD=NEW, got {text!r}")
    return old, new


def map_root(path: str, root_map: Sequence[tuple[str, str]]) -> str:
    """Replaces the first prefix that is the path or a folder above it."""
    for old, new in root_map:
        prefix = old.rstrip("/")
        if path.rstrip("/") == prefix:
            return new
        if path.startswith(prefix + "/"):
            return new.rstrip("/") + path[len(prefix) :]
    return path


def remap(pair: Pair, root_map: Sequence[tuple[str, str]]) -> Pair:
    """Moves the images of a pair, and the root that its subset had."""
    if not root_map:
        return pair
    extra, root = pair.extra, pair.source.get("root")
    if isinstance(root, str):
        extra = {**extra, "$source": {**pair.source, "root": map_root(root, root_map)}}
    return dataclasses.replace(pair, images=tuple(map_root(image, root_map) for image in pair.images), extra=extra)
