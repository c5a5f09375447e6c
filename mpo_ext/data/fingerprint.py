"""Computes fingerprints of data files. They show whether and where the data of a training run has changed.

The fingerprint of a JSON lines file ignores empty lines and the kind of line breaks. Hashing a file takes about a
second per gigabyte. If the path, size and modification time are unchanged, the stored fingerprint is reused.
"""

import base64
import codecs
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo_ext.data.hf import DatasetPairs
from mpo_ext.data.jsonl import LineFile
from mpo_ext.data.mmpr import MMPRDataset
from mpo_ext.data.sources import PairSource

_CHUNK = 1 << 20
_MAX_BLOCKS = 4096  # if a file has more lines, a block has several lines: a fingerprint takes 22 KB at most
_BLOCK_BYTES = 4  # stored bytes of the hash of a block; the digest of the file uses the whole hash
_IGNORED_FILES = ("state.json", "dataset_info.json")  # files of a saved dataset with names, dates and random numbers


@dataclasses.dataclass(frozen=True, slots=True)
class HashedFile:
    """A data file to be hashed.

    Attributes:
        path: Path of the file.
        lines: Number of lines; None if the file does not consist of lines.
        name: Name of the file in messages to the user. If it is empty, messages name the path.
    """

    path: str
    lines: int | None
    name: str = ""


def files_of(source: PairSource) -> list[list[HashedFile]]:
    """Returns the data files of a source as lists.

    For an MMPR meta file, there is a list for each data set. For any other source, there is a single list.
    """
    if isinstance(source.pairs, MMPRDataset):
        return [[HashedFile(file.path, len(file))] for file in source.pairs.files]
    if isinstance(source.pairs, LineFile):
        return [[HashedFile(source.pairs.path, len(source.pairs), source.path)]]
    if os.path.isfile(source.path):
        return [[HashedFile(source.path, None)]]
    if not os.path.isdir(source.path):
        assert isinstance(source.pairs, DatasetPairs)
        return [[HashedFile(path, None, source.path) for path in source.pairs.files]]
    paths = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
    paths = [path for path in paths if path.name not in _IGNORED_FILES and not path.name.startswith("cache-")]
    return [[HashedFile(str(path), None) for path in paths]]


def hash_file(file: HashedFile, known: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Returns the fingerprint of a file as a dict of JSON values.

    Args:
        file: The file.
        known: Stored fingerprints. If a stored fingerprint has the path, size and modification time of the file, it is
            returned with the name of the file. The file is then not read.

    Returns:
        A dict with the file's ``path``, ``size`` in bytes, ``mtime_ns``, ``name`` (for messages) and ``digest``, a
        hash of the content. A file of lines is hashed in blocks of lines. Its dict also has ``lines`` (number of
        lines), ``block`` (number of lines in a block) and ``blocks`` (the first 4 bytes of each block's hash, in
        Base64).

    Raises:
        OSError: If the file cannot be read.
    """
    status = os.stat(file.path)
    values: dict[str, Any] = {
        "path": os.path.abspath(file.path), "size": status.st_size, "mtime_ns": status.st_mtime_ns
    }  # fmt: skip
    for fingerprint in known:
        if all(fingerprint[name] == value for name, value in values.items()):
            return {**fingerprint, "name": file.name or file.path}
    values["name"] = file.name or file.path
    if file.lines is None:
        return {**values, "digest": _hash_bytes(file.path)}
    block = 1
    while block * _MAX_BLOCKS < file.lines:
        block *= 2
    n_lines, hashes = _hash_blocks(file.path, block)
    return {
        **values,
        "digest": hashlib.blake2b(b"".join(hashes), digest_size=16).hexdigest(),
        "lines": n_lines,
        "block": block,
        "blocks": base64.b64encode(b"".join(value[:_BLOCK_BYTES] for value in hashes)).decode(),
    }


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Describes how a file has changed between two of its fingerprints. Returns None if the content is the same.

    For a file of lines, the description names the first changed lines. The function reads the file again to find them.
    """
    if old["digest"] == new["digest"]:
        return None
    if "lines" not in old or "lines" not in new:
        return f"its content has changed ({old['size']:,} bytes before, {new['size']:,} now)"
    counts = f"{old['lines']:,} lines before, {new['lines']:,} now"
    block, n_kept = old["block"], min(old["lines"], new["lines"])
    stored = base64.b64decode(old["blocks"])
    before = [stored[index : index + _BLOCK_BYTES] for index in range(0, len(stored), _BLOCK_BYTES)]
    _, hashes = _hash_blocks(new["path"], block, old["lines"])
    after = [value[:_BLOCK_BYTES] for value in hashes]
    first = next((index for index, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    if first is None and new["lines"] > old["lines"]:
        return f"lines were added at its end ({counts})"
    if first is None:
        return f"lines were removed from its end ({counts})"
    line = first * block + 1
    if block == 1 and sorted(before) == sorted(after):
        return f"its lines are in another order from line {line:,} on ({counts})"
    last = min(line + block - 1, max(n_kept, line))
    where = f"is line {line:,}" if line == last else f"is among lines {line:,} to {last:,}"
    # A block that has become shorter differs even if its other lines are unchanged.
    is_cut = new["lines"] < old["lines"] and first == new["lines"] // block
    cut = ", or lines were removed from its end" if is_cut else ""
    return f"the first change {where}, empty lines not counted{cut} ({counts})"


def _hash_bytes(path: str) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _hash_blocks(path: str, block: int, limit: int | None = None) -> tuple[int, list[bytes]]:
    """Hashes a file in blocks of ``block`` lines. Returns the number of lines, and the hash of each block.

    Reads at most ``limit`` lines; None: all lines.
    """
    hashes: list[bytes] = []
    hasher = hashlib.blake2b(digest_size=16)
    n_lines, n_in_block = 0, 0
    for piece in _line_pieces(path):
        if piece is not None:
            hasher.update(piece)
            continue
        hasher.update(b"\n")
        n_lines += 1
        n_in_block += 1
        if n_in_block == block:
            hashes.append(hasher.digest())
            hasher, n_in_block = hashlib.blake2b(digest_size=16), 0
        if n_lines == limit:
            break
    if n_in_block:
        hashes.append(hasher.digest())
    return n_lines, hashes


def _line_pieces(path: str) -> Iterator[bytes | None]:
    """Yields the content of each line in pieces of limited size, and None after each line.

    Leaves out empty lines, line breaks and a byte order mark.
    """
    is_empty, held = True, b""
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while chunk := file.read(_CHUNK):
            chunk = held + chunk
            held = b"\r" if chunk.endswith(b"\r") else b""  # a line end may be split between two chunks
            first, *others = chunk[: len(chunk) - len(held)].replace(b"\r\n", b"\n").split(b"\n")
            if first:
                yield first
                is_empty = False
            for line in others:
                if not is_empty:
                    yield None
                is_empty = not line
                if line:
                    yield line
    if not is_empty:
        yield None
