"""A mixture of sources: random access to the lines of all sources, and the lines of each epoch by ``repeat_time``."""

import dataclasses
import hashlib
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ext.checks import check_integer
from mpo_ext.data.mmpr import MMPRDataset
from mpo_ext.data.paths import find_url
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource, open_pairs
from mpo_ext.train.encode import prompt_key
from mpo_ext.train.recipe import SourceRecipe

_DRAW = 1  # stream of the generator, apart from the stream of ``sampler``
_INSPECTED_LINES = 20_000  # maximum number of lines of a source that ``Mixture.inspect`` reads
_INSPECTED_HF_ROWS = 200  # Hugging Face datasets may have to write out their images
_EXAMPLES = 3
_ROUNDING = 1e-6  # 100 lines with repeat_time 0.29 give 29 pairs, though the product is 28.999999999999996


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureSubset:
    """A row of a mixture's table.

    Attributes:
        source: Number of the source.
        name: Name of the subset in an MMPR meta file, otherwise the name of the file or folder.
        first: Index of the first line in the mixture.
        lines: Number of lines.
        repeat_time: ``repeat_time`` of the source times that of the subset.
        pairs: Number of pairs per epoch: ``lines * repeat_time``, rounded down.
        label: The name, preceded by as much of the path as distinguishes it from other subsets.
    """

    source: int
    name: str
    first: int
    lines: int
    repeat_time: float
    pairs: int
    label: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(slots=True)
class SourceOverview:
    """The result of inspecting a source.

    Attributes:
        path: Path of the source.
        format: Format in which the source is read.
        is_format_given: Whether the recipe names the format.
        root: Folder where relative image paths start.
        lines: Number of lines.
        lines_read: Number of lines read, evenly spread.
        bad: Number of lines read that hold no pair.
        with_images: Number of pairs with images.
        images: Number of different images; 0 if files were not checked.
        missing: Number of images whose file does not exist.
        pairs_missing: Number of pairs that lack at least one image.
        examples: The first bad lines and missing images.
    """

    path: str
    format: str
    is_format_given: bool
    root: str
    lines: int
    lines_read: int = 0
    bad: int = 0
    with_images: int = 0
    images: int = 0
    missing: int = 0
    pairs_missing: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        origin = "" if self.is_format_given else " (detected)"
        sample = "" if self.lines_read == self.lines else f" among {self.lines_read:,} of its {self.lines:,} lines"
        pairs = self.lines_read - self.bad
        text = (
            f"{self.path}: format {self.format}{origin}; {self.with_images:,} of {pairs:,} pairs with images{sample}"
        )
        return text + (f"; {self.bad:,} lines hold NO PAIR" if self.bad else "")


class Mixture(Sequence[Pair | BadLine]):
    """The concatenated lines of all sources; an index selects a line, regardless of its ``repeat_time``.

    Memory holds 8 bytes per line, the readers' offsets, and no lines. A copy in another process opens the sources
    again at its first read.

    ``repeat_time`` sets how often an epoch visits the lines of a subset: of ``n`` lines it takes
    ``floor(n * repeat_time)`` pairs. Each line occurs as often as the integer part of ``repeat_time``; the rest are
    different lines, drawn at random in each epoch. The number of pairs is the same in all epochs.

    Args:
        sources: The sources to mix.
        seed: Seed of the draws.

    Attributes:
        subsets: The rows of the mixture's table.

    Raises:
        OSError: If a source cannot be read.
        ValueError: If a source is invalid, or an epoch would have no pairs.
    """

    def __init__(self, sources: Sequence[SourceRecipe], *, seed: int = 0) -> None:
        check_integer("seed", seed, least=0)
        self.sources = tuple(sources)
        self.seed = seed
        self._opened: list[PairSource | None] = [None] * len(self.sources)
        subsets: list[MixtureSubset] = []
        self._starts = [0]
        for number, recipe in enumerate(self.sources):
            for name, lines, repeat in _subsets_of(self._source(number), recipe):
                first = subsets[-1].first + subsets[-1].lines if subsets else 0
                pairs = math.floor(lines * repeat + _ROUNDING)
                subsets.append(MixtureSubset(number, name, first, lines, repeat, pairs))
            self._starts.append(subsets[-1].first + subsets[-1].lines if subsets else 0)
        paths = [self.sources[subset.source].path for subset in subsets]
        labels = _labels(paths, [subset.name for subset in subsets])
        self.subsets = tuple(
            dataclasses.replace(subset, label=label) for subset, label in zip(subsets, labels, strict=True)
        )
        if self.pairs == 0:
            paths_text = ", ".join(recipe.path for recipe in self.sources) or "no sources"
            raise ValueError(f"sources must give an epoch at least one pair, got none from {paths_text}")

    @property
    def pairs(self) -> int:
        """Number of pairs per epoch."""
        return sum(subset.pairs for subset in self.subsets)

    def __len__(self) -> int:
        """Returns the number of lines; repeated lines count once."""
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.read(index)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": [None] * len(self.sources)}

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the number of the source and the number of the line in the source, both from 0."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        index = int(index) % size
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - self._starts[source]

    def read(self, index: int) -> tuple[Pair | BadLine, str]:
        """Reads a line.

        Args:
            index: Index of the line in the mixture.

        Returns:
            The pair with absolute image paths, or the error in the line; and the line's file and number.

        Raises:
            RuntimeError: If the source has changed its number of lines.
        """
        source, line = self.locate(index)
        where, pair = self._source(source).read(line)
        return pair, str(where)

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the line indices of an epoch: ``[pairs]`` int64, ascending; repeated lines occur repeatedly."""
        check_integer("epoch", epoch, least=0)
        parts = []
        for subset in self.subsets:
            whole, rest = divmod(subset.pairs, subset.lines) if subset.lines else (0, 0)
            times = np.full(subset.lines, whole, dtype=np.int64)
            if rest:
                # Each subset has its generator: its draws do not depend on the other subsets.
                entropy = [_DRAW, self.seed, epoch, subset.source, zlib.crc32(subset.name.encode())]
                times[np.random.default_rng(entropy).permutation(subset.lines)[:rest]] += 1
            parts.append(np.repeat(np.arange(subset.first, subset.first + subset.lines, dtype=np.int64), times))
        return np.concatenate(parts)

    def prompt_groups(self) -> np.ndarray:
        """Reads all lines and returns ``[len]`` int64 numbers that are equal for pairs with the same prompt.

        Each bad line has a number that no other line has.
        """
        groups = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):
            pair, name = self.read(index)
            text = f"bad line {name}" if isinstance(pair, BadLine) else prompt_key(pair)
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            groups[index] = int.from_bytes(digest, "big", signed=True)
        return groups

    def inspect(self, *, files: bool = True, limit: int = _INSPECTED_LINES) -> list[SourceOverview]:
        """Inspects each source: its format, its pairs with images, and the images whose file does not exist.

        Args:
            files: Whether to check that the image files exist.
            limit: Maximum number of lines to read per source, spread evenly.
        """
        overviews = []
        for number, recipe in enumerate(self.sources):
            source, first = self._source(number), self._starts[number]
            size = len(source.pairs)
            overview = SourceOverview(recipe.path, source.format, recipe.format is not None, source.root, size)
            count = min(size, limit if source.format != "hf" else min(limit, _INSPECTED_HF_ROWS))
            file_exists: dict[int, bool] = {}
            for line in np.linspace(0, size - 1, count).round().astype(int) if count else ():
                pair, name = self.read(first + int(line))
                overview.lines_read += 1
                if isinstance(pair, BadLine):
                    overview.bad += 1
                    if overview.bad <= _EXAMPLES:
                        overview.examples.append(str(pair))
                    continue
                overview.with_images += bool(pair.images)
                if files:
                    overview.pairs_missing += not _has_images(pair, name, file_exists, overview)
            overview.images = len(file_exists)
            overviews.append(overview)
        return overviews

    def lines(self) -> Iterator[str]:
        """Yields the table as text."""
        width = max(len(subset.label) for subset in self.subsets)
        yield f"{'subset':<{width}}  {'lines':>11}  {'repeat_time':>11}  {'pairs/epoch':>11}"
        for subset in self.subsets:
            yield f"{subset.label:<{width}}  {subset.lines:>11,}  {subset.repeat_time:>11.4g}  {subset.pairs:>11,}"
        yield f"{'all':<{width}}  {len(self):>11,}  {'':>11}  {self.pairs:>11,}"

    def _source(self, number: int) -> PairSource:
        source = self._opened[number]
        if source is None:
            recipe = self.sources[number]
            source = open_pairs(
                recipe.path,
                format=recipe.format,
                root=recipe.root,
                root_map=recipe.root_map,
                image_dir=recipe.image_dir,
            )
            if number + 1 < len(self._starts):
                size, expected = len(source.pairs), self._starts[number + 1] - self._starts[number]
                if size != expected:
                    raise RuntimeError(
                        f"{recipe.path} must not change while it is read, got {size:,} lines after {expected:,}"
                    )
            self._opened[number] = source
        return source


def _has_images(pair: Pair, name: str, file_exists: dict[int, bool], overview: SourceOverview) -> bool:
    """Checks whether all image files of a pair exist; each file is checked once."""
    is_complete = True
    for image in pair.images:
        key = hash(image)
        if key not in file_exists:
            file_exists[key] = os.path.isfile(image)
            if not file_exists[key]:
                overview.missing += 1
                if overview.missing <= _EXAMPLES:
                    overview.examples.append(f"{name}: no such image: {find_url(image) or image}")
        is_complete = is_complete and file_exists[key]
    return is_complete


def _labels(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the names; equal names are preceded by the shortest end of their path that distinguishes them."""
    parts = [Path(os.path.normpath(path)).parts for path in paths]
    labels = []
    for path_parts, name in zip(parts, names, strict=True):
        rivals = [p for p, other_name in zip(parts, names, strict=True) if other_name == name and p != path_parts]
        if not rivals:
            labels.append(name)
            continue
        sizes = range(1, len(path_parts))
        size = next((n for n in sizes if all(p[-n:] != path_parts[-n:] for p in rivals)), len(path_parts))
        path = str(Path(*path_parts[-size:]))
        labels.append(path if path_parts[-1] == name else f"{path}: {name}")
    return labels


def _subsets_of(source: PairSource, recipe: SourceRecipe) -> Iterator[tuple[str, int, float]]:
    """Yields name, number of lines and ``repeat_time`` of each subset."""
    if isinstance(source.pairs, MMPRDataset):
        for subset, file in zip(source.pairs.subsets, source.pairs.files, strict=True):
            yield subset.name, len(file), recipe.repeat_time * subset.repeat_time
    else:
        yield Path(source.path).name, len(source.pairs), recipe.repeat_time
