"""Opens pairs in any format, for commands and for the trainer."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpo_ext.checks import check_choice
from mpo_ext.data.formats import FORMATS, Format, detect_format
from mpo_ext.data.hf import load_dataset_folder
from mpo_ext.data.jsonl import read_pairs
from mpo_ext.data.mmpr import MMPRDataset, MMPRSubset, read_annotation
from mpo_ext.data.paths import RootMap, absolute_path, path_from, real_path
from mpo_ext.data.reader import MAX_LINE_BYTES, BadLine, Location, PairSequence
from mpo_ext.data.records import Pair
from mpo_ext.data.trl import read_trl
from mpo_ext.images import describe_source, image_exists


@dataclasses.dataclass(frozen=True, slots=True)
class PairSource:
    """Pairs that ``open_pairs`` opened.

    Attributes:
        path: Path that was opened.
        format: "mmpr" (a meta file, or the lines of one subset), "pairs", "trl" (lines) or "hf" (a folder).
        pairs: The pairs, each line once.
        root: Folder that relative image paths start at.
        subsets: Subsets of a meta file, by name; empty for the other formats.
        on_pair: Called with each pair, after its image paths are made absolute; None disables the callback.
    """

    path: str
    format: Format
    pairs: PairSequence
    root: str
    subsets: dict[str, MMPRSubset]
    on_pair: Callable[[Pair], object] | None = None

    def scan(self) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields the location of every line, and the line's pair with absolute image paths or a BadLine."""
        return map(self.read, range(len(self.pairs)))

    def read(self, index: int) -> tuple[Location, Pair | BadLine]:
        """Returns what ``scan`` yields for the line at an index."""
        where, _, pair = self._read(index)
        return where, pair

    def scan_for(self, folder: str | os.PathLike[str]) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields the same as ``scan``, but with relative image paths where a file in ``folder`` can use them.

        A relative path of a line becomes relative to ``folder`` if ``folder`` is the root or contains the image.
        """
        folder = os.path.realpath(folder)
        for index in range(len(self.pairs)):
            where, images, pair = self._read(index)
            if not isinstance(pair, BadLine) and images != pair.images:
                is_root = folder == real_path(self.root)
                relative = (
                    image if is_root or os.path.isabs(image) else path_from(folder, path)
                    for image, path in zip(images, pair.images, strict=True)
                )
                pair = dataclasses.replace(pair, images=tuple(relative))
            yield where, pair

    def _read(self, index: int) -> tuple[Location, tuple[str, ...], Pair | BadLine]:
        """Returns a line's location, unchanged image paths, and the pair with absolute image paths or a BadLine."""
        where = self.pairs.locate(index)
        try:
            pair = self.pairs.read(index)
        except BadLine as bad:
            return where, (), bad
        images = pair.images
        if not all(map(os.path.isabs, images)):
            pair = dataclasses.replace(pair, images=tuple(absolute_path(image, self.root) for image in images))
        if self.on_pair is not None:
            self.on_pair(pair)
        subset = pair.source.get("subset")
        if self.format != "mmpr" and isinstance(subset, str):  # name of the subset in the pair's first source
            where = dataclasses.replace(where, subset=subset)
        return where, images, pair


class MissingImages:
    """Counts the image files that do not exist, each file once. Its ``add`` serves as ``PairSource.on_pair``."""

    def __init__(self) -> None:
        self.first = ""
        self._exists: dict[int, bool] = {}

    def add(self, pair: Pair) -> None:
        """Records which images of a pair exist."""
        for image in pair.images:
            key = hash(image)
            if key not in self._exists:
                self._exists[key] = image_exists(image)
                self.first = self.first or ("" if self._exists[key] else describe_source(image))

    def warning(self, source: PairSource) -> str | None:
        """Returns a warning with the number of missing images, or None if no image is missing."""
        missing = sum(not exists for exists in self._exists.values())
        if not missing:
            return None
        text = f"warning: {missing:,} of {len(self._exists):,} images do not exist as files, as {self.first}"
        if source.format == "hf" or source.subsets:
            return f"{text}: try --root-map"
        return f"{text}: relative images start at {source.root}: try --root"


def open_pairs(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    root: str | os.PathLike[str] | None = None,
    root_map: RootMap = (),
    image_dir: str | os.PathLike[str] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> PairSource:
    """Opens pairs in any format.

    Args:
        path: Path of a meta file (.json), of a file of lines (.jsonl) or of the folder of a Hugging Face dataset.
        format: Format of the path; None: ``detect_format`` detects the format. A later line in another format is bad.
        root: Folder that relative image paths start at; None: the folder of the file. A meta file has its own roots.
        root_map: Path prefixes (old, new) of folders of images or annotations that have moved.
        image_dir: Folder for storing images of a Hugging Face dataset that have no path; None: their rows are bad.
        max_line_bytes: Maximum length of a line in bytes; a longer line is bad.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If an argument is invalid or the format cannot be detected.
        ImportError: If the path is a Hugging Face dataset, and the package datasets is not installed.
    """
    if format is not None:
        check_choice("format", format, FORMATS)
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"path must exist, got {name}")
    format = format or detect_format(name, max_line_bytes=max_line_bytes)
    if format != "hf" and os.path.isdir(name):
        raise ValueError(f"path must be a file for the format {format!r}, got the folder {name}")
    folder = os.path.abspath(os.path.dirname(name) if root is None else root)
    subsets: dict[str, MMPRSubset] = {}
    pairs: PairSequence
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
        subset = MMPRSubset(Path(name).stem, folder, os.path.abspath(name), 1, None, settings)
        pairs = read_annotation(subset, max_line_bytes=max_line_bytes)
    return PairSource(name, format, pairs, folder, subsets)
