"""Which pairs a step takes: sources mixed by their repeat_time, in an order that seed, epoch and step alone decide."""

import dataclasses
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ext.checks import check_integer
from mpo_ext.data.jsonl import BadLine
from mpo_ext.data.mmpr import MMPRDataset
from mpo_ext.data.records import Pair, find_url
from mpo_ext.data.sources import Source, open_pairs
from mpo_ext.train.encode import prompt_key
from mpo_ext.train.recipe import SourceRecipe

_DRAW, _ORDER = 1, 2  # streams of the generator: which lines an epoch takes, and in which order
_LOOKED_AT = 20_000  # lines of a source that ``Mixture.look`` reads at most
_LOOKED_AT_HF = 200  # rows of a Hugging Face dataset, whose images may have to be written out
_EXAMPLES = 3
_ROUNDING = 1e-6  # 100 lines by 0.29 are 29, though the product is 28.999999999999996


@dataclasses.dataclass(frozen=True, slots=True)
class Subset:
    """One row of a mixture's table.

    Attributes:
        source: Number of its source.
        name: Of a subset in an MMPR meta file; elsewhere the name of the file or folder.
        first: Index of its first line in the mixture.
        lines: Number of its lines.
        repeat_time: Of the source, times that of the subset.
        pairs: How many of an epoch's pairs it gives: ``lines * repeat_time``, rounded down.
        label: Its name, with as much of the path as tells it from the others.
    """

    source: int
    name: str
    first: int
    lines: int
    repeat_time: float
    pairs: int
    label: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(slots=True)
class Look:
    """What a first look at the lines of a source has found.

    Attributes:
        path: Of the source.
        format: How it is read.
        is_told: Whether the recipe names the format.
        root: Folder that its relative images start at.
        lines: Number of its lines.
        looked_at: Number of those that were read, evenly spread.
        bad: Number of those that hold no pair.
        with_images: Number of pairs with images.
        images: Number of different images; 0 where no files were looked for.
        missing: How many of them are no files here.
        pairs_missing: Number of pairs that lack at least one image.
        examples: The first bad lines and missing images.
    """

    path: str
    format: str
    is_told: bool
    root: str
    lines: int
    looked_at: int = 0
    bad: int = 0
    with_images: int = 0
    images: int = 0
    missing: int = 0
    pairs_missing: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        how = "" if self.is_told else ", found out"
        share = "" if self.looked_at == self.lines else f" among {self.looked_at:,} of its {self.lines:,} lines"
        pairs = self.looked_at - self.bad
        text = f"{self.path}: format {self.format}{how}; {self.with_images:,} of {pairs:,} pairs with images{share}"
        return text + (f"; {self.bad:,} lines hold NO PAIR" if self.bad else "")


class Mixture(Sequence[Pair | BadLine]):
    """The lines of all sources, one behind the other; an index is a line, whatever its ``repeat_time``.

    In memory are the readers' 8 bytes per line, none of the lines. A copy in another process opens the sources anew
    when it first reads.

    ``repeat_time`` decides how often an epoch meets the lines of a subset: of ``n`` lines it takes
    ``floor(n * repeat_time)`` pairs. That is every line as often as the whole part of ``repeat_time`` says, and for
    the rest of it different lines drawn at random, anew for each epoch. The number of pairs is the same in all epochs.

    Args:
        sources: What to mix.
        seed: Of the draws.

    Attributes:
        subsets: The rows of its table.

    Raises:
        OSError: If a source cannot be read.
        ValueError: If a source is none, or an epoch would have no pairs.
    """

    def __init__(self, sources: Sequence[SourceRecipe], *, seed: int = 0) -> None:
        check_integer("seed", seed, least=0)
        self.sources = tuple(sources)
        self.seed = seed
        self._opened: list[Source | None] = [None] * len(self.sources)
        subsets: list[Subset] = []
        self._starts = [0]
        for number, recipe in enumerate(self.sources):
            for name, lines, repeat in _subsets(self._source(number), recipe):
                first = subsets[-1].first + subsets[-1].lines if subsets else 0
                pairs = math.floor(lines * repeat + _ROUNDING)
                subsets.append(Subset(number, name, first, lines, repeat, pairs))
            self._starts.append(subsets[-1].first + subsets[-1].lines if subsets else 0)
        labels = _labels([self.sources[one.source].path for one in subsets], [one.name for one in subsets])
        self.subsets = tuple(dataclasses.replace(one, label=label) for one, label in zip(subsets, labels, strict=True))
        if self.pairs == 0:
            named = ", ".join(recipe.path for recipe in self.sources) or "no sources"
            raise ValueError(f"sources must give an epoch at least one pair, got none from {named}")

    @property
    def pairs(self) -> int:
        """Number of pairs of an epoch."""
        return sum(subset.pairs for subset in self.subsets)

    def __len__(self) -> int:
        """Number of lines, each counted once."""
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.read(index)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": [None] * len(self.sources)}

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the number of the source and the number of the line in it, from 0."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        index = int(index) % size
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - self._starts[source]

    def read(self, index: int) -> tuple[Pair | BadLine, str]:
        """Reads a line.

        Args:
            index: Of the line in the mixture.

        Returns:
            The pair, with absolute paths of images, or what is wrong with the line; and its file and line.

        Raises:
            RuntimeError: If the source is no longer as long as it was.
        """
        source, line = self.locate(index)
        where, pair = self._source(source).read(line)
        return pair, str(where)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of the lines that an epoch takes: ``[pairs]`` int64, ascending, a repeated line repeatedly."""
        check_integer("epoch", epoch, least=0)
        parts = []
        for subset in self.subsets:
            whole, rest = divmod(subset.pairs, subset.lines) if subset.lines else (0, 0)
            times = np.full(subset.lines, whole, dtype=np.int64)
            if rest:
                # Of its own generator each, so that what is drawn here does not depend on the other subsets.
                entropy = [_DRAW, self.seed, epoch, subset.source, zlib.crc32(subset.name.encode())]
                times[np.random.default_rng(entropy).permutation(subset.lines)[:rest]] += 1
            parts.append(np.repeat(np.arange(subset.first, subset.first + subset.lines, dtype=np.int64), times))
        return np.concatenate(parts)

    def prompt_groups(self) -> np.ndarray:
        """Reads all lines: ``[len]`` int64, equal where pairs have one prompt. Bad lines get numbers of their own."""
        groups = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):
            pair, name = self.read(index)
            text = f"bad line {name}" if isinstance(pair, BadLine) else prompt_key(pair)
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            groups[index] = int.from_bytes(digest, "big", signed=True)
        return groups

    def look(self, *, files: bool = True, most: int = _LOOKED_AT) -> list[Look]:
        """Takes a first look at each source: its format, pairs with images, and images that are no files.

        Args:
            files: Whether to look for the files of the images.
            most: Lines of a source to read; of more, so many are taken at even distances.
        """
        looks = []
        for number, recipe in enumerate(self.sources):
            source, first = self._source(number), self._starts[number]
            size = len(source.pairs)
            look = Look(recipe.path, source.format, recipe.format is not None, source.root, size)
            count = min(size, most if source.format != "hf" else min(most, _LOOKED_AT_HF))
            known: dict[int, bool] = {}
            for line in np.linspace(0, size - 1, count).round().astype(int) if count else ():
                pair, name = self.read(first + int(line))
                look.looked_at += 1
                if isinstance(pair, BadLine):
                    look.bad += 1
                    if look.bad <= _EXAMPLES:
                        look.examples.append(str(pair))
                    continue
                look.with_images += bool(pair.images)
                if files:
                    look.pairs_missing += not _has_images(pair, name, known, look)
            look.images = len(known)
            looks.append(look)
        return looks

    def lines(self) -> Iterator[str]:
        """Yields the table as text."""
        width = max(len(subset.label) for subset in self.subsets)
        yield f"{'subset':<{width}}  {'lines':>11}  {'repeat_time':>11}  {'pairs/epoch':>11}"
        for subset in self.subsets:
            yield f"{subset.label:<{width}}  {subset.lines:>11,}  {subset.repeat_time:>11.4g}  {subset.pairs:>11,}"
        yield f"{'all':<{width}}  {len(self):>11,}  {'':>11}  {self.pairs:>11,}"

    def _source(self, number: int) -> Source:
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
                size = self._starts[number + 1] - self._starts[number]
                found = len(source.pairs)
                if found != size:
                    raise RuntimeError(
                        f"{recipe.path} must not change while it is read, got {found:,} lines after {size:,}"
                    )
            self._opened[number] = source
        return source


def _has_images(pair: Pair, name: str, known: dict[int, bool], look: Look) -> bool:
    """Whether all images of a pair are files; each is looked for once."""
    found = True
    for image in pair.images:
        key = hash(image)
        if key not in known:
            known[key] = os.path.isfile(image)
            if not known[key]:
                look.missing += 1
                if look.missing <= _EXAMPLES:
                    look.examples.append(f"{name}: no such image: {find_url(image) or image}")
        found = found and known[key]
    return found


def _labels(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names, with the shortest end of their paths where others have the same name."""
    parts = [Path(os.path.normpath(path)).parts for path in paths]
    labels = []
    for own, name in zip(parts, names, strict=True):
        rivals = [other for other, theirs in zip(parts, names, strict=True) if theirs == name and other != own]
        if not rivals:
            labels.append(name)
            continue
        size = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in rivals)), len(own))
        path = str(Path(*own[-size:]))
        labels.append(path if own[-1] == name else f"{path}: {name}")
    return labels


def _subsets(source: Source, recipe: SourceRecipe) -> Iterator[tuple[str, int, float]]:
    if isinstance(source.pairs, MMPRDataset):
        for subset, file in zip(source.pairs.subsets, source.pairs.files, strict=True):
            yield subset.name, len(file), recipe.repeat_time * subset.repeat_time
    else:
        yield Path(source.path).name, len(source.pairs), recipe.repeat_time


class StepSampler:
    """The pairs of each optimizer step. Steps are numbered from 0 through all epochs.

    A step's pairs depend on the seed and its number alone: a run that goes on needs no other state, and another number
    of ranks shares out the same pairs. Every pair of an epoch is met once in it, in random order; the last step of
    an epoch is as short as what is left.

    Args:
        epoch: Gives the pairs of an epoch, int64, the same number for each; as ``Mixture.epoch``.
        batch_size: Pairs of a step, over all ranks.
        seed: Of the order.
        groups: Numbers that are equal for pairs of one prompt, by pair, as from ``Mixture.prompt_groups``: they then
            stand next to each other, but at the ends of steps and of ranks' shares. A pair that an epoch repeats
            stands in as many groups. None mixes all.

    Attributes:
        pairs_per_epoch: Number of pairs.
        steps_per_epoch: Number of steps, the short one included.
    """

    def __init__(
        self,
        epoch: Callable[[int], np.ndarray],
        *,
        batch_size: int,
        seed: int = 0,
        groups: np.ndarray | None = None,
    ) -> None:
        check_integer("batch_size", batch_size, least=1)
        check_integer("seed", seed, least=0)
        self._epoch, self._groups = epoch, groups
        self.batch_size, self.seed = batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None
        self.pairs_per_epoch = len(epoch(0))
        if self.pairs_per_epoch == 0:
            raise ValueError("epoch must give at least one pair, got none")
        self.steps_per_epoch = -(-self.pairs_per_epoch // batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch in their order, ``[pairs_per_epoch]`` int64. That of the last epoch asked is kept."""
        check_integer("epoch", epoch, least=0)
        if self._order is None or self._order[0] != epoch:
            pairs = self._epoch(epoch)
            if len(pairs) != self.pairs_per_epoch:
                raise ValueError(
                    f"epoch must give {self.pairs_per_epoch} pairs each time, got {len(pairs)} for epoch {epoch}"
                )
            rng = np.random.default_rng([_ORDER, self.seed, epoch])
            pairs = pairs[rng.permutation(len(pairs))]
            if self._groups is not None:
                pairs = pairs[_by_group(pairs, self._groups, rng)]
            self._order = epoch, pairs
        return self._order[1]

    def step(self, step: int) -> np.ndarray:
        """The pairs of a step, over all ranks: int64, ``[batch_size]`` or, at the end of an epoch, fewer."""
        check_integer("step", step, least=0)
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def share(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """A rank's pairs of a step: a run of them, at most one longer than another's; none where too few are left.

        Args:
            step: From 0, through all epochs.
            rank: Of the process.
            world_size: Number of processes.
        """
        check_integer("world_size", world_size, least=1)
        check_integer("rank", rank, least=0)
        if rank >= world_size:
            raise ValueError(f"rank must be less than world_size {world_size}, got {rank}")
        pairs = self.step(step)
        return pairs[len(pairs) * rank // world_size : len(pairs) * (rank + 1) // world_size]


def _by_group(pairs: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions that put the members of a group next to each other, and the groups into random order."""
    # The c-th time that a pair occurs belongs to the c-th group of its prompt: no step is to hold one pair twice.
    by_pair = np.argsort(pairs, kind="stable")
    ascending = pairs[by_pair]
    firsts = np.searchsorted(ascending, ascending, side="left")
    copy = np.empty(len(pairs), dtype=np.int64)
    copy[by_pair] = np.arange(len(pairs)) - firsts
    _, prompt = np.unique(groups[pairs], return_inverse=True)
    _, group = np.unique(prompt * (int(copy.max()) + 1) + copy, return_inverse=True)
    return np.argsort(rng.permutation(int(group.max()) + 1)[group], kind="stable")


def micro_batches(lengths: Sequence[int], size: int, *, groups: Sequence[Any] | None = None) -> list[list[int]]:
    """Splits a rank's share by length, the longest first: memory is at its peak at once, and little is padded.

    Args:
        lengths: Tokens of each pair.
        size: Pairs of a micro-batch; the last may have fewer.
        groups: What is equal for pairs of one prompt, as ``Sample.prompt_key``: such pairs stay together, at the
            place of the longest of them. None sorts each by itself.

    Returns:
        Positions in ``lengths``, each once; equal lengths keep their order.
    """
    check_integer("size", size, least=1)
    if groups is not None and len(groups) != len(lengths):
        raise ValueError(f"groups must be as many as the {len(lengths)} lengths, got {len(groups)}")
    members: dict[Any, list[int]] = {}
    for position in range(len(lengths)):
        members.setdefault(position if groups is None else groups[position], []).append(position)
    together = [sorted(positions, key=lambda position: -lengths[position]) for positions in members.values()]
    together.sort(key=lambda positions: -lengths[positions[0]])
    order = [position for positions in together for position in positions]
    return [order[start : start + size] for start in range(0, len(order), size)]
