"""Opens pairs of any format under one roof: for the commands, and for a trainer that takes a path."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mpo_ext.data.hf import load_dataset_folder, read_trl
from mpo_ext.data.jsonl import MAX_LINE_BYTES, BadLine, LineFile, Location, Pairs, read_pairs
from mpo_ext.data.mmpr import MMPRDataset, Subset, read_annotation
from mpo_ext.data.records import Pair, find_url

Format = Literal["mmpr", "pairs", "trl", "hf"]
FORMATS: tuple[Format, ...] = ("mmpr", "pairs", "trl", "hf")
_TELLING: dict[Format, str] = {"trl": "prompt", "pairs": "images", "mmpr": "image"}  # fields that only they have
_SNIFFED_LINES = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Opened pairs.

    Attributes:
        path: What was opened.
        format: "mmpr" (a meta file, or the lines of one subset), "pairs" (our own), "trl" (lines) or "hf" (a folder).
        pairs: The pairs, each line once.
        root: Folder that relative images start at.
        subsets: The entries of a meta file, by name; empty for the other formats.
        on_pair: Is told of each pair that is read, with its absolute images; None tells nobody.
    """

    path: str
    format: Format
    pairs: Pairs
    root: str
    subsets: dict[str, Subset]
    on_pair: Callable[[Pair], object] | None = None

    def scan(self) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields every entry with its place: the pair with absolute images, or what is wrong with it."""
        for index in range(len(self.pairs)):
            yield self.read(index)

    def read(self, index: int) -> tuple[Location, Pair | BadLine]:
        """Reads one entry, as ``scan`` yields it."""
        where, _, pair = self._read(index)
        return where, pair

    def scan_for(self, folder: str | os.PathLike[str]) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields every entry as ``scan`` does, but relative images stay so where a file in a folder can name them so.

        That is where it is the folder that they start at now, or one above them.
        """
        folder = os.path.realpath(folder)
        for index in range(len(self.pairs)):
            where, named, pair = self._read(index)
            if not isinstance(pair, BadLine) and named != pair.images:
                images = (self._from(folder, image, path) for image, path in zip(named, pair.images, strict=True))
                pair = dataclasses.replace(pair, images=tuple(images))
            yield where, pair

    def _read(self, index: int) -> tuple[Location, tuple[str, ...], Pair | BadLine]:
        """The place, the images as they are named there, and the pair with absolute ones or what is wrong with it."""
        where = self.pairs.locate(index)
        try:
            pair = self.pairs[index]
        except BadLine as bad:
            return where, (), bad
        named = pair.images
        if not all(map(os.path.isabs, named)):
            pair = dataclasses.replace(pair, images=tuple(map(self._absolute, named)))
        if self.on_pair is not None:
            self.on_pair(pair)
        subset = pair.source.get("subset")
        if self.format != "mmpr" and isinstance(subset, str):  # what the pair remembers, where the format has none
            where = dataclasses.replace(where, subset=subset)
        return where, named, pair

    def _from(self, folder: str, image: str, path: str) -> str:
        if os.path.isabs(image) or folder == _real(self.root):
            return image
        inside = os.path.relpath(path, folder)
        return path if inside.startswith("..") or find_url(image) else inside.replace(os.sep, "/")

    def _absolute(self, image: str) -> str:
        return image if find_url(image) else _join(self.root, image)


class MissingImages:
    """Counts the images of pairs that are no files here, each once. ``Source.on_pair`` takes its ``add``."""

    def __init__(self) -> None:
        self.first = ""
        self._known: dict[int, bool] = {}

    def add(self, pair: Pair) -> None:
        """Looks for the images of a pair."""
        for image in pair.images:
            key = hash(image)
            if key not in self._known:
                self._known[key] = os.path.isfile(image)
                self.first = self.first or ("" if self._known[key] else image)

    def warning(self, source: Source) -> str | None:
        """What to say at the end; None where none is missing."""
        missing = sum(not found for found in self._known.values())
        if not missing:
            return None
        told = f"warning: {missing:,} of {len(self._known):,} images are no files here, as {self.first}"
        if source.format == "hf" or source.subsets:
            return f"{told}: try --root-map"
        return f"{told}: relative images start at {source.root}: try --root"


def _join(root: str, image: str) -> str:
    """The path of an image below a root, or beside it: ``..`` leads out of where the root really lies.

    So one image has one path, from whichever folder it is named.
    """
    if not image.startswith("../"):
        return os.path.join(root, image)
    root = _real(root)
    while image.startswith("../"):
        root, image = os.path.dirname(root), image[3:]
    return os.path.join(root, image)


_real = functools.lru_cache(maxsize=64)(os.path.realpath)


def open_pairs(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    root: str | os.PathLike[str] | None = None,
    root_map: Sequence[tuple[str, str]] = (),
    image_dir: str | os.PathLike[str] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Source:
    """Opens pairs of any format.

    Args:
        path: A meta file (.json), a file of lines (.jsonl) or the folder of a Hugging Face dataset.
        format: Of the path; None finds out: a folder is "hf", a .json file "mmpr", and a .jsonl file what the first
            line tells that can ("prompt": trl; "images": pairs; "image": mmpr), or mmpr where none of the first
            thousand can. A later line of another format is a bad one.
        root: Folder that relative images start at; default: the folder of the file. A meta file has its own.
        root_map: Pairs of prefixes (old, new): where images and annotations have moved to.
        image_dir: Folder for images of a Hugging Face dataset that have no path.
        max_line_bytes: A longer line is a bad one.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If an argument is wrong or the format cannot be told.
        ImportError: If Hugging Face datasets is needed and missing.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"path must exist, got {name}")
    if format is None:
        format = "hf" if os.path.isdir(name) else "mmpr" if name.endswith(".json") else _sniff(name, max_line_bytes)
    if format != "hf" and os.path.isdir(name):
        raise ValueError(f"path must be a file for the format {format!r}, got the folder {name}")
    folder = os.path.abspath(os.path.dirname(name) if root is None else root)
    subsets: dict[str, Subset] = {}
    pairs: Pairs
    if format == "hf":
        pairs = load_dataset_folder(name, root_map=root_map, image_dir=image_dir)
    elif format == "trl":
        pairs = read_trl(name, root_map=root_map, max_line_bytes=max_line_bytes)
    elif format == "pairs":
        pairs = read_pairs(name, root_map=root_map, max_line_bytes=max_line_bytes)
    elif name.endswith(".json"):
        pairs = MMPRDataset(name, root_map=root_map, repeat=False, max_line_bytes=max_line_bytes)
        subsets = {subset.name: subset for subset in pairs.subsets}
    else:
        settings: dict[str, Any] = {"data_augment": False, "repeat_time": 1}
        subset = Subset(Path(name).stem, folder, os.path.abspath(name), 1, None, settings)
        pairs = read_annotation(subset, max_line_bytes=max_line_bytes)
    return Source(name, format, pairs, folder, subsets)


def _sniff(path: str, max_line_bytes: int) -> Format:
    def parse(values: dict[str, Any], line: str) -> Pair:
        found.append(set(values))
        return Pair("", "", "")

    found: list[set[str]] = []
    lines = LineFile(path, parse, max_line_bytes=max_line_bytes)
    if len(lines) == 0:
        raise ValueError(f"path must hold pairs, got an empty file: {path}")
    for index in range(min(len(lines), _SNIFFED_LINES)):
        try:
            lines[index]
        except BadLine:
            continue
        for format, field in _TELLING.items():
            if field in found[-1]:
                return format
    if found:  # pairs of text only, which the formats write alike
        return "mmpr"
    raise ValueError(
        f"format must be told apart by a good line, got none among the first {_SNIFFED_LINES} of {path}: "
        f"name it ({', '.join(FORMATS)})"
    )
