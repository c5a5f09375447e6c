"""Converts JSON arrays, CSV, TSV, compressed files, and text in UTF-16 or UTF-32 to JSON lines.

The converted file is cached, and reused until the original file changes. Files with JSON lines in UTF-8 are read
directly. ``hub.py`` reads parquet files.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mpo_ext.checks import shorten
from mpo_ext.data.jsonl import UNREADABLE, dump_line, parse_object
from mpo_ext.data.literals import are_messages, read_literal
from mpo_ext.files import atomic_write

#: Advice in messages about a .json file that holds neither rows nor the subsets of a meta file.
ROWS_ADVICE = "rows are expected as one JSON array, or as one object per line"
_VERSION = 3  # part of the hash in the names of cached files; a new version converts all files again
_HEAD = 1 << 16
_HEAD_LINES = 100
#: Suffixes of compressed files, with their first bytes and the function that opens them.
COMPRESSIONS: dict[str, tuple[bytes, Callable[[Any], IO[bytes]]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),  # type: ignore[dict-item]
    ".bz2": (b"BZh", bz2.open),  # type: ignore[dict-item]
    ".xz": (b"\xfd7zXZ\x00", lzma.open),  # type: ignore[dict-item]
}
_REFUSED = {
    b"PK\x03\x04": "a zip file (or an Excel file): unpack it, or save it as CSV or parquet",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd: decompress it (zstd -d)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"ARROW1": "an Arrow file: name the folder that save_to_disk wrote",
    b"\xff\xff\xff\xff": "an Arrow file: name the folder that save_to_disk wrote",
    b"version https://git-lfs": "a Git LFS pointer instead of the file: fetch the file with git lfs pull",
    b"SQLite format 3": "an SQLite database: export it as CSV",
    b"\x80\x04\x95": "a pickle: write it as JSON lines",
    b"<!DOCTYPE html": "an HTML page, probably of a download that failed",
    b"<html": "an HTML page, probably of a download that failed",
}
_TAR, _TAR_START = b"ustar", 257  # the mark of a tar archive, and its place
_PARQUET = b"PAR1"
_RESPONSES = ("chosen", "rejected_response", "rejected_messages", "preferred_output")  # fields that only rows have
# Byte order marks. The mark of UTF-32 comes first, because it begins with the mark of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Columns of CSV files in which every list or object is parsed. In other columns, only messages are parsed.
_LISTS = (
    *("image", "images", "image_paths", "rejected_image", "rejected_images", "video", "videos"),
    *("messages", "conversations", "conversation", "rejected_messages", "history", "provenance", "extra"),
)


def cache_folder() -> Path:
    """Returns the cache folder of mpo_ext, which holds converted files and stored images.

    Its parent folder also holds the cache of Hugging Face datasets.
    """
    if datasets_cache := os.environ.get("HF_DATASETS_CACHE"):
        return Path(datasets_cache).absolute().parent / "mpo_ext"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"), "mpo_ext")


def is_parquet(path: str) -> bool:
    """Returns whether a file begins like a parquet file. Raises OSError if the file cannot be read."""
    with open(path, "rb") as file:
        return file.read(4) == _PARQUET


def as_lines(path: str, *, is_meta_allowed: bool = True) -> str | None:
    """Returns the path of a JSON lines file that has the rows of the file ``path``.

    A file in another format is converted, and the result is stored in the cache.

    Args:
        path: Path of a file that is not parquet.
        is_meta_allowed: Whether the file may be an MMPR meta file, which lists data sets. False: a .json file that
            holds one object is read as JSON lines.

    Returns:
        ``path`` itself if the file already holds JSON lines, otherwise a path in the cache. None if the file is an
        MMPR meta file.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the file type or encoding is not supported, or the content is invalid. The message names the
            reason.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    compression = next((suffix for suffix, (magic, _) in COMPRESSIONS.items() if head.startswith(magic)), None)
    name = path
    if compression is not None:
        name = name.removesuffix(compression)
        with _opened(path, compression) as file:
            head = file.read(_HEAD)
    descriptions = [description for magic, description in _REFUSED.items() if head.startswith(magic)]
    if head.startswith(_TAR, _TAR_START):
        descriptions.append("a tar archive: unpack it")
    if descriptions:
        raise ValueError(f"path must be a file of rows, got {path}, which is {descriptions[0]}")
    if name.endswith(".parquet"):
        raise ValueError(f"path must be a parquet file by its content too, got {path}")
    encoding = _encoding(head)
    kind = _kind(name, head.decode(encoding, "replace"))
    if kind == "object":
        is_object = _is_meta(path, compression, encoding)
        if is_object and (values := _one_object(path, compression, encoding)) is not None:
            refuse_rows(path, values)
        is_meta = is_object and is_meta_allowed
        if is_meta and compression is None and encoding == "utf-8-sig":
            return None
        if is_meta:
            raise ValueError(f"path must be an uncompressed meta file in UTF-8, got {path}")
        kind = "lines"
    if kind == "lines" and compression is None and encoding == "utf-8-sig":
        return path
    return _cached(path, compression, encoding, kind)


def _encoding(head: bytes) -> str:
    """Returns the encoding of a file from its first bytes: UTF-8, UTF-16 or UTF-32.

    A byte order mark determines the encoding. Without a mark, the encoding is UTF-8 or UTF-16. UTF-16 is detected by
    the zero bytes around the first "{" or "[".
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if len(head) > 3 and head[:1] in b"{[" and head[1] == 0 and head[2] and head[3] == 0:
        return "utf-16-le"
    if len(head) > 3 and head[0] == 0 and head[1:2] in b"{[" and head[2] == 0 and head[3]:
        return "utf-16-be"
    return "utf-8-sig"


def _kind(name: str, text: str) -> str:
    """Returns the kind of a file: "csv", "tsv", "array", "object" or "lines".

    "array" is a .json file with a JSON array. "object" is any other .json file, with one object, or with one
    object per line. "lines" is any file whose suffix is not .json, .csv or .tsv.

    Args:
        name: Name of the file without a compression suffix such as ".gz".
        text: The beginning of the file.
    """
    for suffix in ("csv", "tsv"):
        if name.lower().endswith(f".{suffix}"):
            return suffix
    if not name.lower().endswith(".json"):
        return "lines"
    first = text.lstrip()[:1]
    return {"[": "array", "{": "object"}.get(first, "object")


def _is_meta(path: str, compression: str | None, encoding: str) -> bool:
    """Returns whether a .json file may be an MMPR meta file, which lists data sets.

    Three kinds of files give False. Empty lines do not count:

    - The first line is a whole JSON object, and further lines follow.
    - The file has a single line, and this line is a pair.
    - The first line is broken, but more than half of the first lines are whole JSON objects.
    """
    with _opened(path, compression) as file, io.TextIOWrapper(file, encoding, "replace") as text:
        lines = (line for line in text if line.strip())
        first = _object_in(next(lines, ""))
        if first is None:  # an object of several lines, or a broken file
            found = [_object_in(line) is not None for line in itertools.islice(lines, _HEAD_LINES)]
            return 2 * sum(found) <= 1 + len(found)
        if any(True for _ in lines):
            return False
    return not any(name in first for name in _RESPONSES)


def _object_in(text: str) -> dict[str, Any] | None:
    """Returns the JSON object in a text, or None if the text does not hold exactly one object."""
    try:
        return parse_object(text)
    except (ValueError, TypeError, RecursionError):
        return None


def _one_object(path: str, compression: str | None, encoding: str) -> dict[str, Any] | None:
    """Returns the JSON object of a file, or None if the file does not hold exactly one object."""
    with _opened(path, compression) as file, io.TextIOWrapper(file, encoding, "replace") as text:
        return _object_in(text.read())


def refuse_rows(path: str, values: dict[str, Any]) -> None:
    """Raises ValueError if a .json file holds a single pair, or an object with a list of rows.

    ``values`` is the object in the file. An MMPR meta file, which lists data sets, is accepted.
    """
    if not values or any(
        isinstance(value, dict) and {"root", "annotation"} & value.keys() for value in values.values()
    ):
        return
    lists = [name for name, value in values.items() if _is_list_of_objects(value)]
    if any(name in values for name in _RESPONSES):
        fields = shorten(", ".join(values))
        found = f"one object with the fields {fields}: write it as one line, or into an array"
    elif lists:
        found = f"an object with {len(values[lists[0]]):,} rows in {lists[0][:80]!r}: write that array alone"
    else:
        return
    raise ValueError(f"path must be a file of rows or a meta file, got {path}, which is {found} ({ROWS_ADVICE})")


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


@contextlib.contextmanager
def _opened(path: str, compression: str | None) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") if compression is None else COMPRESSIONS[compression][1](path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"path must be a complete {compression} file, got {path}: {error}") from None


def _cached(path: str, compression: str | None, encoding: str, kind: str) -> str:
    status = os.stat(path)
    key = repr((_VERSION, os.path.realpath(path), status.st_size, status.st_mtime_ns))
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(path))[:100]
    target = cache_folder() / "lines" / f"{stem}-{digest}.jsonl"
    if target.exists():
        return str(target)
    with _opened(path, compression) as file, atomic_write(target) as out:
        if kind == "lines" and encoding == "utf-8-sig":
            while chunk := file.read(1 << 20):
                out.write(chunk)
            return str(target)
        try:
            with io.TextIOWrapper(file, encoding, newline="") as text:
                rows = {"array": _array_items, "lines": _lines}.get(kind, _csv_rows)(text, path)
                for row in rows:
                    out.write(row)
        except UnicodeError as error:
            raise ValueError(
                f"path must be text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, got {path}: {error}: "
                "convert it with iconv"
            ) from None
    return str(target)


def _lines(text: IO[str], path: str) -> Iterator[bytes]:
    for line in text:
        yield line.encode("utf-8", "surrogatepass")


def _array_items(text: IO[str], path: str) -> Iterator[bytes]:
    """Yields each element of a JSON array as a line of JSON."""
    content = text.read()
    decoder, position, count = json.JSONDecoder(), _skip(content, 0) + 1, 0
    position = _skip(content, position)
    try:
        while content[position : position + 1] != "]" or count:
            _, end = decoder.raw_decode(content, position)
            count += 1
            # A JSON string cannot contain a line break, so every line break here is white space.
            yield re.sub(r"[\r\n]", " ", content[position:end]).encode("utf-8", "surrogatepass") + b"\n"
            position = _skip(content, end)
            separator = content[position : position + 1]
            if separator == "]":
                break
            if separator != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", content, position)
            position = _skip(content, position + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"path must be a JSON array, got {path}: item {count + 1} is not JSON: {str(error).splitlines()[0]}"
        ) from None
    if content[position + 1 :].strip():
        raise ValueError(f"path must be one JSON array, got {path} with more text after character {position}")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n") and position < len(text):
        position += 1
    return position


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """Increases the maximum cell size of the csv module within a ``with`` block, for cells that hold base64 images."""
    limit = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: IO[str], path: str) -> Iterator[bytes]:
    """Yields a line with a JSON object for each record of a CSV or TSV file.

    If a record has too many or too few columns, the object has only the field ``UNREADABLE``, with an error message.
    """
    delimiter = "\t" if re.search(r"\.tsv(?:\.\w+)?$", path, re.IGNORECASE) else ","
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    with long_cells():
        try:
            header = next(reader, None)
            if not header:
                raise ValueError(f"path must have a header with the names of columns, got {path}")
            if len(header) == 1 and ";" in header[0]:
                raise ValueError(f"path must separate columns by {delimiter!r}, got {path} with {shorten(header[0])}")
            if len(set(header)) != len(header):
                raise ValueError(f"path must name each column once, got {path} with {shorten(header)}")
            for record in reader:
                if len(record) == len(header):
                    yield dump_line({name: read_cell(name, value) for name, value in zip(header, record, strict=True)})
                elif record:
                    reason = (
                        f"a record must have {len(header)} columns, got {len(record)} up to line {reader.line_num}"
                    )
                    yield dump_line({UNREADABLE: reason})
        except csv.Error as error:
            raise ValueError(f"path must be CSV, got {path}: line {reader.line_num}: {error}") from None


def read_cell(name: str, text: str) -> Any:
    """Parses a cell in the CSV column ``name``.

    In the columns ``_LISTS``, lists and objects are parsed, and an empty cell becomes None. In other columns, only
    chat messages are parsed, and in the column ``input`` also OpenAI's object with messages. A parsed cell holds JSON
    or a Python literal. An empty cell of ``answer_gt`` becomes None: the answer is unknown. All other cells stay text.
    """
    is_list = name in _LISTS
    if text.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, read_literal):
            try:
                value = parse(text)
                json.dumps(value, allow_nan=False)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            is_input = name == "input" and isinstance(value, dict) and are_messages(value.get("messages"))
            if is_list or is_input or are_messages(value):
                return value
    return None if (is_list or name == "answer_gt") and not text else text
