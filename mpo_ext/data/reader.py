"""The interface of all readers. A reader is a sequence of pairs. Each bad line is reported with its location."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from mpo_ext.checks import DefectError
from mpo_ext.data.records import Pair

MAX_LINE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """The place of a pair in the data.

    Attributes:
        subset: Name of the pair's data set in an MMPR meta file; without a meta file, the name of the file or dataset.
        file: Path of the file or dataset.
        line: Number of the line or dataset row, from 1.
    """

    subset: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class BadLine(DefectError):  # noqa: N818 - it is also passed around as a finding, not only raised
    """The error of a line that does not hold a valid pair.

    Attributes:
        where: Location of the line.
        kind: Kind of the defect, such as "huge line", "bad UTF-8", "bad JSON", "bad field" or "bad image path".
        reason: Description of the defect.
    """

    def __init__(self, where: Location, kind: str, reason: str) -> None:
        super().__init__(f"{where}: {kind}: {reason}")
        self.where, self.kind, self.reason = where, kind, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return BadLine, (self.where, self.kind, self.reason)


class FieldError(ValueError):
    """Raised for an invalid field of a row. ``raise_bad_line`` converts it to a BadLine of the same ``kind``."""

    def __init__(self, reason: str, *, kind: str = "bad field") -> None:
        super().__init__(reason)
        self.kind = kind


@contextlib.contextmanager
def raise_bad_line(where: Location) -> Iterator[None]:
    """Returns a context manager that converts a parsing error in its block to a BadLine.

    ``where`` is the location of the line.
    """
    try:
        yield
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


class Skipped:
    """Counts skipped lines by kind of defect, and stores examples.

    Args:
        keep: Maximum number of examples of each kind.

    Attributes:
        counts: For each kind of defect, the number of skipped lines.
        examples: For each kind of defect, the errors of the first skipped lines.
    """

    def __init__(self, keep: int = 5) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[BadLine]] = {}
        self._keep = keep

    def add(self, bad: BadLine) -> None:
        self.counts[bad.kind] += 1
        examples = self.examples.setdefault(bad.kind, [])
        if len(examples) < self._keep:
            examples.append(bad)

    @property
    def total(self) -> int:
        """Number of skipped lines."""
        return self.counts.total()

    def lines(self) -> Iterator[str]:
        """Yields lines of text that report the skipped lines: the count of each kind, followed by its examples."""
        for kind, count in self.counts.most_common():
            yield f"skipped {count:,}: {kind}"
            yield from (f"  {bad.where}: {bad.reason}" for bad in self.examples[kind])


class PairSequence(Sequence[Pair]):
    """A sequence of pairs that are read on access.

    ``pairs[i]`` reads a pair, and raises BadLine if the line does not hold a valid pair. ``scan`` yields BadLine
    instead.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.read(position) for position in range(*index.indices(len(self)))]
        return self.read(index)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.read, range(len(self)))

    def read(self, index: int) -> Pair:
        """Returns the pair at an index, or raises BadLine if the line does not hold a valid pair."""
        raise NotImplementedError

    def locate(self, index: int) -> Location:
        """Returns the location of the pair at an index."""
        raise NotImplementedError

    def scan(self) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields the location of each line with its pair, or with a BadLine if the line does not hold a valid pair."""
        for index in range(len(self)):
            where = self.locate(index)
            try:
                yield where, self.read(index)
            except BadLine as bad:
                yield where, bad

    def good(self, skipped: Skipped) -> Iterator[Pair]:
        """Yields the good pairs and adds the bad lines to ``skipped``."""
        for _, pair in self.scan():
            if isinstance(pair, BadLine):
                skipped.add(pair)
            else:
                yield pair
