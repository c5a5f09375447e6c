"""Reads and writes a picks file, and selects the picked pairs.

The user picks pairs on the page of ``mpo-ext data view``. The page saves the picks file.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection
from typing import Any

import numpy as np

from mpo_ext.checks import shorten
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.files import write_json

FORMAT = "mpo_ext.picks/1"


def pair_digest(pair: Pair) -> str:
    """Returns a hash of the question and the responses of a pair. It does not depend on the images."""
    texts = json.dumps([pair.question, pair.chosen, pair.rejected])
    return hashlib.blake2b(texts.encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class Picks:
    """The pairs of a source that were picked by hand.

    Attributes:
        source: Path of the source, for error messages.
        lines: Number of lines of the source.
        digests: Dict from the index of a picked line to the ``pair_digest`` of its pair.
    """

    source: str
    lines: int
    digests: dict[int, str]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Atomically writes the picks to a JSON file."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of the JSON file."""
        pairs = [{"index": index, "digest": self.digests[index]} for index in sorted(self.digests)]
        return {"format": FORMAT, "source": self.source, "lines": self.lines, "pairs": pairs}


def read_picks(path: str | os.PathLike[str]) -> Picks:
    """Reads a file of picks.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file was not written by a page of ``mpo-ext data view``.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"picked must be a file of picks, got {name}: it does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"got {shorten(values)}")
        digests = {pair["index"]: pair["digest"] for pair in values["pairs"]}
        source, lines = values["source"], values["lines"]
        if not all(type(index) is int and 0 <= index < lines and isinstance(digests[index], str) for index in digests):
            raise ValueError("got an index outside the source")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"picked must be a file of picks that a page of 'mpo-ext data view' has written, got {name}: {error}"
        ) from None
    return Picks(str(source), lines, digests)


def restrict(source: PairSource, picks: Picks, *, keep: bool = True) -> PairSource:
    """Returns a part of a source: the picked pairs (``keep=True``), or all other lines (``keep=False``).

    Raises:
        ValueError: If the picks were made for other data. The source then has another number of lines, or another pair
            at the place of a picked pair.
    """
    if len(source.pairs) != picks.lines:
        raise ValueError(
            f"picked must belong to {source.path}, which has {len(source.pairs):,} lines, got picks of "
            f"{picks.lines:,} lines of {picks.source}"
        )
    for index, digest in sorted(picks.digests.items()):
        where, pair = source.read(index)
        if isinstance(pair, BadLine) or pair_digest(pair) != digest:
            raise ValueError(
                f"picked must belong to {source.path}, but another pair was picked at {where}: the file has changed "
                "since"
            )
    return dataclasses.replace(source, selected=_selected(picks.digests, picks.lines, keep=keep))


def _selected(indices: Collection[int], lines: int, *, keep: bool) -> np.ndarray:
    is_picked = np.zeros(lines, dtype=bool)
    is_picked[list(indices)] = True
    return np.flatnonzero(is_picked if keep else ~is_picked)
