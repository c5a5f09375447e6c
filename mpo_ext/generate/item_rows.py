"""Reads the rows of a file of items: JSON Lines, TSV, CSV or Parquet."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo_ext.checks import install_hint

TABLES = (".tsv", ".csv", ".parquet")
_PARQUET_ROWS = 32  # rows that are read at a time; each may hold several images


def read_rows(path: str) -> Iterator[Any]:
    """Yields the rows of a file; None for a line that is not JSON. Values of TSV and CSV are texts."""
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        for batch in _parquet(path).iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                yield {
                    name: None if value != value else value for name, value in row.items()
                }  # NaN is a missing value
    elif suffix in TABLES:
        csv.field_size_limit(sys.maxsize)  # images in base64 are longer than the default limit
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, dialect="excel-tab" if suffix == ".tsv" else "excel", strict=True):
                # DictReader has the key None for too many values, and the value None for too few.
                yield None if None in row or None in row.values() else row
    else:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield _parse(line)


def count_rows(path: str, digest: "hashlib._Hash | hashlib.blake2b") -> int:
    """Returns the number of rows of a file, and adds the content of the file to a digest."""
    suffix = Path(path).suffix.lower()
    count = 0
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            count += bool(line.strip())
    if suffix == ".parquet":
        return int(_parquet(path).metadata.num_rows)
    return sum(1 for _ in read_rows(path)) if suffix in TABLES else count


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: {install_hint('data')}") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} must be a Parquet file, got {error}") from None
