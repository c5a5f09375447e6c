"""``Mixture`` joins the lines of several data sources, and chooses the lines that each epoch visits."""

import dataclasses
import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ext.checks import check_integer
from mpo_ext.data.media import place_problem
from mpo_ext.data.mmpr import MMPRDataset
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource, StoredMedia, open_pairs, stored_note
from mpo_ext.images import describe_source, image_exists, missing_image_advice
from mpo_ext.train.encode import prompt_key
from mpo_ext.train.source_recipe import SourceRecipe

_DRAW = 1  # part of the seed; another number in ``sampler`` makes its random numbers independent of those here
_INSPECTED_LINES = 20_000  # maximum number of lines that ``Mixture.inspect`` reads per source
_INSPECTED_DATASET_ROWS = 200  # lower, because reading a row may write its images to ``image_dir``
_EXAMPLES = 3
_ROUNDING = 1e-6  # 100 lines with repeat_time 0.29 give 29 pairs, though the product is 28.999999999999996


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureSubset:
    """A part of a data source. An MMPR meta file has several subsets. Any other source has a single subset.

    Attributes:
        source: Index of the data source.
        name: Name of the subset in an MMPR meta file, otherwise the name of the file or folder.
        first: Number of lines in all earlier subsets.
        lines: Number of lines.
        repeat_time: Average number of visits to each line per epoch: the ``repeat_time`` of the source in the recipe.
            For an MMPR meta file, this value is multiplied by the ``repeat_time`` of the subset in the meta file.
        pairs: Number of pairs per epoch: ``lines * repeat_time``, rounded down.
        label: Name for display. It equals ``name``, or adds a part of the path if other subsets have the same name.
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
    """The result of inspecting a data source (``Mixture.inspect``).

    Attributes:
        path: Path of the source.
        format: Format of the source.
        is_format_given: Whether the recipe sets the format. False: the format was detected.
        root: Folder against which relative image paths are resolved.
        lines: Number of lines of the source.
        lines_read: Number of lines that were read, spread evenly over the source.
        bad: Number of read lines without a valid pair.
        misplaced: Number of misplaced pairs: read pairs whose ``<image>`` or ``<video>`` placeholders do not match
            their media.
        with_images: Number of read pairs with images.
        with_videos: Number of read pairs with videos.
        with_rejected_images: Number of read pairs with other images for the rejected response.
        images: Number of different image and video files in the read pairs, without misplaced pairs.
        missing: Number of these files that do not exist.
        pairs_missing: Number of read pairs with at least one missing file, without misplaced pairs.
        stored_in: Folder to which images and videos were written if the source holds them as bytes; "" if no read pair
            has such an image or video.
        examples: Messages for the first bad lines, misplaced pairs and missing files, up to three of each kind.
    """

    path: str
    format: str
    is_format_given: bool
    root: str
    lines: int
    lines_read: int = 0
    bad: int = 0
    misplaced: int = 0
    with_images: int = 0
    with_videos: int = 0
    with_rejected_images: int = 0
    images: int = 0
    missing: int = 0
    pairs_missing: int = 0
    stored_in: str = ""
    examples: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        origin = "" if self.is_format_given else " (detected)"
        sample = "" if self.lines_read == self.lines else f" among {self.lines_read:,} of its {self.lines:,} lines"
        pairs = self.lines_read - self.bad
        text = (
            f"{self.path}: format {self.format}{origin}; {self.with_images:,} of {pairs:,} pairs with images{sample}"
        )
        text += f"; {self.with_videos:,} with videos" if self.with_videos else ""
        if self.with_rejected_images:
            text += f"; {self.with_rejected_images:,} with other images for the rejected response, in separate rows"
        text += f"; {self.bad:,} lines hold NO PAIR" if self.bad else ""
        return text + (f"; {self.misplaced:,} pairs have WRONG PLACES for their images" if self.misplaced else "")


class Mixture(Sequence[Pair | BadLine]):
    """The lines of all data sources as one sequence. An index selects a line.

    A mixture holds 8 bytes per line in memory, but not the lines. A pickled copy in another process reopens the
    sources when it first reads a line.

    A source has one or more subsets (``MixtureSubset``). A subset's ``repeat_time`` sets how often an epoch visits its
    lines; it does not change the indices. With ``repeat_time`` 2.5, for example, an epoch visits each line twice, and
    half of the lines a third time. This half is drawn at random in each epoch. From a subset of ``n`` lines, an epoch
    takes ``floor(n * repeat_time)`` pairs, so all epochs have the same number of pairs.

    Attributes:
        subsets: Subsets of all sources, in the order of their lines.
        name: Name of the setting that lists the sources, for messages, such as ``data.train``.

    Raises:
        OSError: If a source cannot be read.
        ValueError: If a source is invalid, or an epoch would not contain any pairs.
    """

    def __init__(self, sources: Sequence[SourceRecipe], *, seed: int = 0, name: str = "sources") -> None:
        check_integer("seed", seed, least=0)
        self.sources = tuple(sources)
        self.seed = seed
        self.name = name
        self._opened: list[PairSource | None] = [None] * len(self.sources)
        subsets: list[MixtureSubset] = []
        self._starts = [0]
        for number, recipe in enumerate(self.sources):
            for name, lines, repeat in _subsets_of(self.open_source(number), recipe):
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
            raise ValueError(f"{self.name} must give an epoch at least one pair, got none from {paths_text}")

    @property
    def pairs(self) -> int:
        return sum(subset.pairs for subset in self.subsets)

    def __len__(self) -> int:
        """Returns the number of lines of all sources."""
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.read(index)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": [None] * len(self.sources)}

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the index of the source that contains line ``index``, and the index of the line in this source."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        index = int(index) % size
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - self._starts[source]

    def read(self, index: int) -> tuple[Pair | BadLine, str]:
        """Returns the pair of a line, and the file and the line number as one text.

        For a bad line, returns a ``BadLine`` instead of the pair. The image paths of the pair are absolute.

        Raises:
            RuntimeError: If the source's number of lines has changed since the mixture was created.
        """
        source, line = self.locate(index)
        where, pair = self.open_source(source).read(line)
        return pair, str(where)

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the line indices of an epoch in ascending order, ``[pairs]`` int64. Indices may repeat."""
        check_integer("epoch", epoch, least=0)
        parts = []
        for subset in self.subsets:
            whole, rest = divmod(subset.pairs, subset.lines) if subset.lines else (0, 0)
            times = np.full(subset.lines, whole, dtype=np.int64)
            if rest:
                # A separate generator per subset makes its draws independent of the other subsets.
                entropy = [_DRAW, self.seed, epoch, subset.source, zlib.crc32(subset.name.encode())]
                times[np.random.default_rng(entropy).permutation(subset.lines)[:rest]] += 1
            parts.append(np.repeat(np.arange(subset.first, subset.first + subset.lines, dtype=np.int64), times))
        return np.concatenate(parts)

    def prompt_groups(self) -> np.ndarray:
        """Reads all lines and returns a group number for each line, ``[len(self)]`` int64.

        Lines with the same prompt have the same group number. The group number of a bad line is unique.
        """
        groups = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):
            pair, name = self.read(index)
            text = f"bad line {name}" if isinstance(pair, BadLine) else prompt_key(pair)
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            groups[index] = int.from_bytes(digest, "big", signed=True)
        return groups

    def inspect(self, *, limit: int = _INSPECTED_LINES) -> list[SourceOverview]:
        """Returns an overview of each source, such as its bad lines, pairs with images, and missing image files.

        Args:
            limit: Maximum number of lines to read per source. The lines are spread evenly over the source. From a
                dataset or parquet files, at most 200 lines are read.
        """
        overviews = []
        for number, recipe in enumerate(self.sources):
            source, first = self.open_source(number), self._starts[number]
            size = len(source.pairs)
            overview = SourceOverview(source.path, source.format, recipe.format is not None, source.root, size)
            count = min(size, min(limit, _INSPECTED_DATASET_ROWS) if source.is_dataset else limit)
            file_exists: dict[int, bool] = {}
            stored = StoredMedia(source)
            for line in np.linspace(0, size - 1, count).round().astype(int) if count else ():
                pair, name = self.read(first + int(line))
                overview.lines_read += 1
                if isinstance(pair, BadLine):
                    overview.bad += 1
                    if overview.bad <= _EXAMPLES:
                        overview.examples.append(str(pair))
                    continue
                stored.add(pair)
                overview.with_images += bool(pair.images)
                overview.with_videos += bool(pair.videos)
                overview.with_rejected_images += bool(pair.rejected_images)
                if (problem := place_problem(pair)) is not None:
                    overview.misplaced += 1
                    if overview.misplaced <= _EXAMPLES:
                        overview.examples.append(f"{name}: {problem}")
                    continue
                overview.pairs_missing += not _has_images(pair, name, file_exists, overview)
            overview.images, overview.stored_in = len(file_exists), stored.folder
            overviews.append(overview)
        return overviews

    def lines(self) -> Iterator[str]:
        """Yields the lines of a text table with a row for each data subset.

        The columns are the subset's label, its number of lines, its ``repeat_time`` and its pairs per epoch. The last
        row holds the total numbers of lines and pairs.
        """
        width = max(len(subset.label) for subset in self.subsets)
        yield f"{'subset':<{width}}  {'lines':>11}  {'repeat_time':>11}  {'pairs/epoch':>11}"
        for subset in self.subsets:
            yield f"{subset.label:<{width}}  {subset.lines:>11,}  {subset.repeat_time:>11.4g}  {subset.pairs:>11,}"
        yield f"{'all':<{width}}  {len(self):>11,}  {'':>11}  {self.pairs:>11,}"

    def open_source(self, number: int) -> PairSource:
        """Returns the source at index ``number`` of ``sources``. The source is opened at the first call.

        Raises:
            OSError: If the source cannot be read.
            ValueError: If the source is invalid.
            RuntimeError: If the source's number of lines has changed since the mixture was created.
        """
        source = self._opened[number]
        if source is not None:
            return source
        recipe = self.sources[number]
        names = ("format", "root", "root_map", "image_dir", "split", "revision", "config", "ignore")
        try:
            source = open_pairs(recipe.path, **{name: getattr(recipe, name) for name in names})
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if number + 1 < len(self._starts):
            size, expected = len(source.pairs), self._starts[number + 1] - self._starts[number]
            if size != expected:
                raise RuntimeError(
                    f"{recipe.path} must not change while it is read, got {size:,} lines after {expected:,}"
                )
        self._opened[number] = source
        return source


def root_advice(path: str, root: str) -> str:
    """Returns advice for a source with missing image files.

    The advice names the setting for the folder of the images. ``root`` is the folder at which relative image paths
    start now.
    """
    if path.endswith(".json"):
        return f"root_map moves the folders of a meta file: {{path: {path}, root_map: ...}}"
    return f"relative images start at {root}; root names another folder, as in {{path: {path}, root: .}}"


def stored_lines(overviews: Iterable[SourceOverview]) -> list[str]:
    """Returns a note for each folder to which images or videos were written."""
    return [stored_note(folder) for folder in dict.fromkeys(overview.stored_in for overview in overviews) if folder]


def _has_images(pair: Pair, name: str, file_exists: dict[int, bool], overview: SourceOverview) -> bool:
    """Returns whether all image and video files of a pair exist. Counts missing files in ``overview``.

    ``file_exists`` is a cache from the hash of a path to whether the file exists. ``name`` says where the pair is:
    file and line number.
    """
    is_complete = True
    for image in pair.media_paths:
        key = hash(image)
        if key not in file_exists:
            file_exists[key] = image_exists(image)
            if not file_exists[key]:
                overview.missing += 1
                if overview.missing <= _EXAMPLES:
                    kind = "image" if image in (*pair.images, *pair.rejected_images) else "video"
                    text = f"{name}: no such {kind}: {describe_source(image)}{missing_image_advice(image)}"
                    overview.examples.append(text)
        is_complete = is_complete and file_exists[key]
    return is_complete


def _labels(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns a label for each data set. ``paths`` and ``names`` hold a path and a name for each data set.

    The label is the name if it is unique. Otherwise, the label begins with the last parts of the path. For example,
    "x/a/train.jsonl" and "x/b/train.jsonl" get the labels "a/train.jsonl" and "b/train.jsonl".
    """
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
    """Yields ``(name, number of lines, repeat_time)`` for each subset in a data source; see ``MixtureSubset``."""
    if isinstance(source.pairs, MMPRDataset):
        for subset, file in zip(source.pairs.subsets, source.pairs.files, strict=True):
            yield subset.name, len(file), recipe.repeat_time * subset.repeat_time
    else:
        yield Path(source.path).name, len(source.pairs), recipe.repeat_time
