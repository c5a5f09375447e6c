"""Reads the rows of an item file: JSON lines, a JSON array, TSV, CSV or Parquet, also compressed or in UTF-16."""

import codecs
import collections
import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.checks import install_hint
from mpo_ext.data.containers import as_lines, is_parquet, long_cells, read_cell
from mpo_ext.data.jsonl import UNREADABLE

TABLES = (".tsv", ".csv", ".parquet")
_HEAD = 1 << 16
_PARQUET_ROWS = 32  # rows that are read at a time; each may hold several images


def read_rows(path: str) -> Iterator[Any]:
    """Yields each row of a file, usually as a dict. Cells of TSV and CSV are read by ``read_cell``, most as strings.

    An unreadable row is None, or a dict with the reason under the key ``UNREADABLE``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the format or the encoding of the file is not supported.
    """
    if _is_parquet(path):
        for batch in _parquet(path).iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                yield {
                    name: None if value != value else value for name, value in row.items()
                }  # NaN is a missing value
        return
    lines = _lines(path)
    suffix = Path(path).suffix.lower()
    if lines == path and suffix in TABLES:
        yield from _table_rows(path, "excel-tab" if suffix == ".tsv" else "excel")
        return
    with open(lines, "rb") as file:
        for line in file:
            if line.strip():
                yield _parse(line)


def count_rows(path: str, digest: "hashlib._Hash | hashlib.blake2b") -> int:
    """Returns the number of rows of a file, and updates ``digest`` with the bytes of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the format or the encoding of the file is not supported.
    """
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if _is_parquet(path):
        return int(_parquet(path).metadata.num_rows)
    lines = _lines(path)
    if lines == path and Path(path).suffix.lower() in TABLES:
        return sum(1 for _ in read_rows(path))
    with open(lines, "rb") as file:
        return sum(bool(line.strip()) for line in file)


def _is_parquet(path: str) -> bool:
    return is_parquet(path) or Path(path).suffix.lower() == ".parquet"


def _lines(path: str) -> str:
    """Returns the path of a text file with one row per line.

    A TSV or CSV file in UTF-8 is used as it is, and so is a file of JSON lines. All other files are converted to JSON
    lines.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if Path(path).suffix.lower() in TABLES and _is_utf8(head):
        return path  # tables with images in base64 are not copied into the cache
    lines = as_lines(path, is_meta_allowed=False)
    assert lines is not None  # only meta files give None
    with open(lines, "rb") as file:
        head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8)
    if head.lstrip()[:1] == b"[" and not isinstance(_parse(head.lstrip().partition(b"\n")[0]), list):
        raise ValueError(f"path must be JSON lines, got {path} with a JSON array: give it the suffix .json")
    if head.lstrip()[:2] == b"[{":
        raise ValueError(f"path must be JSON lines, got {path} with a JSON array: give it the suffix .json")
    if b"\0" in head:
        raise ValueError(f"path must be text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, got {path}")
    return lines


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head and not head.startswith(b"PK\x03\x04")


def _table_rows(path: str, dialect: str) -> Iterator[Any]:
    try:
        with long_cells(), open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, dialect=dialect, strict=True)
            _check_names(path, [name for name in reader.fieldnames or () if name])
            for row in reader:
                # DictReader has the key None for too many values, and the value None for too few.
                is_whole = None not in row and None not in row.values()
                yield {name: read_cell(name, text) for name, text in row.items()} if is_whole else None
    except (UnicodeError, csv.Error) as error:
        raise ValueError(f"path must be a table of text in UTF-8, got {path}: {error}") from None


def _check_names(path: str, names: Sequence[str]) -> None:
    """Raises ValueError if several columns of a table have the same name."""
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"path must name each column once, got {path} with {repeated[0]!r} twice")


class _RepeatedNameError(ValueError):
    """Raised if a JSON object has the same field twice."""


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(fields)
    if len(values) < len(fields):
        raise _RepeatedNameError
    return values


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return {UNREADABLE: "a line must be text in UTF-8"}
    except _RepeatedNameError:
        return {UNREADABLE: "a line must have each field once"}
    except (ValueError, RecursionError):
        return None


def _parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: {install_hint('data')}") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} must be a Parquet file, got {error}") from None
    _check_names(path, file.schema_arrow.names)
    return file
