"""Assigns the pairs of the data to optimizer steps, ranks and micro-batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from mpo_ext.checks import check_integer
from mpo_ext.train.batch import RowLayout

_ORDER = 2  # part of the seed; another number in ``mixture`` makes its random numbers independent of those here


class StepSampler:
    """Chooses the pairs of each optimizer step. Steps are numbered from 0; the numbers continue over epochs.

    An epoch visits its pairs in random order. The last step of an epoch may have fewer pairs. The seed and the step
    number determine the pairs of a step. A run therefore resumes without a stored sampler state, and the number of
    ranks does not matter.

    Args:
        epoch: Function, such as ``Mixture.epoch``, that takes the number of an epoch and returns its pair indices
            (int64). All epochs must have the same number of pairs.
        batch_size: Number of pairs per step, summed over all ranks.
        seed: Seed of the pair order.
        groups: Array of group numbers, such as ``Mixture.prompt_groups()``. Pair i belongs to group ``groups[i]``. In
            an epoch, the pairs of a group form a block. If an epoch repeats the pairs, the second copies form a second
            block, and so on. None: pairs are not grouped.

    Attributes:
        pairs_per_epoch: Number of pairs per epoch.
        steps_per_epoch: Number of steps per epoch, including a shorter last step.
    """

    def __init__(
        self, epoch: Callable[[int], np.ndarray], *, batch_size: int, seed: int = 0, groups: np.ndarray | None = None
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
        """Returns the pair indices of an epoch in the order of its steps, ``[pairs_per_epoch]`` int64.

        The result for the latest epoch is cached.
        """
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
                pairs = pairs[_sort_by_group(pairs, self._groups, rng)]
            self._order = epoch, pairs
        return self._order[1]

    def step(self, step: int) -> np.ndarray:
        """Returns the pair indices of a step over all ranks: ``[batch_size]`` int64, fewer at the end of an epoch."""
        check_integer("step", step, least=0)
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def rank_slice(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Returns the pair indices of a step for one rank; the array may be empty.

        All ranks get the same number of pairs, or numbers that differ by 1.
        """
        check_integer("world_size", world_size, least=1)
        check_integer("rank", rank, least=0)
        if rank >= world_size:
            raise ValueError(f"rank must be less than world_size {world_size}, got {rank}")
        pairs = self.step(step)
        return pairs[len(pairs) * rank // world_size : len(pairs) * (rank + 1) // world_size]


def _sort_by_group(pairs: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a permutation ``p`` such that ``pairs[p]`` is a sequence of blocks in random order.

    ``groups[i]`` is the group number of pair i. All pairs of a block have the same group. If each pair occurs once in
    ``pairs``, each group has one block. If pairs occur several times, the first block of a group has their first
    occurrences, the second block has their second occurrences, and so on.
    """
    # The c-th copy of each pair goes to the c-th group of its prompt, because a step should not contain a pair twice.
    by_pair = np.argsort(pairs, kind="stable")
    ascending = pairs[by_pair]
    firsts = np.searchsorted(ascending, ascending, side="left")
    copy = np.empty(len(pairs), dtype=np.int64)
    copy[by_pair] = np.arange(len(pairs)) - firsts
    _, prompt = np.unique(groups[pairs], return_inverse=True)
    _, group = np.unique(prompt * (int(copy.max()) + 1) + copy, return_inverse=True)
    return np.argsort(rng.permutation(int(group.max()) + 1)[group], kind="stable")


def micro_batches(lengths: Sequence[int], size: int, *, groups: Sequence[Any] | None = None) -> list[list[int]]:
    """Sorts the pairs of a rank by length, the longest first, and cuts them into micro-batches of ``size`` pairs.

    Sorting reduces padding. The first micro-batch needs the most memory.

    Args:
        lengths: Number of tokens of each pair.
        size: Number of pairs per micro-batch; the last micro-batch may have fewer.
        groups: The prompt of each pair as any hashable value, such as ``Sample.prompt_key``. Pairs with the same
            prompt become adjacent, and prompts are sorted by their longest pair. None: pairs are not grouped.

    Returns:
        For each micro-batch, the indices of its pairs in ``lengths``. Each index occurs once; pairs of equal length
        keep their order.
    """
    check_integer("size", size, least=1)
    order = [position for positions in _longest_first(lengths, groups) for position in positions]
    return [order[start : start + size] for start in range(0, len(order), size)]


def token_micro_batches(
    prompts: Sequence[int],
    responses: Sequence[Sequence[int]],
    limit: int,
    layout: RowLayout,
    *,
    groups: Sequence[Any],
    rejected_prompts: Mapping[int, tuple[Any, int]] | None = None,
) -> list[list[int]]:
    """Divides the pairs of a rank into micro-batches with at most ``limit`` token positions.

    The method is first-fit decreasing bin packing:

    - Pairs with the same prompt form a group. The groups are sorted by their longest pair, the longest first.
    - Each group goes into the first micro-batch with enough room. If a group exceeds the limit, it is divided.
    - In the layout "separate", each pair goes separately into the first micro-batch with enough room.
    - A single pair that exceeds the limit gets a micro-batch without other pairs.

    Args:
        prompts: Number of prompt tokens of each pair.
        responses: For each pair, the number of tokens of each response.
        limit: Maximum number of token positions of a micro-batch, padding included.
        layout: ``Batch.layout``, which determines the number of positions.
        groups: The prompt of each pair as any hashable value, such as ``Sample.prompt_key``. If the layout allows it,
            pairs with the same prompt share the tokens of the prompt.
        rejected_prompts: Only for pairs whose responses have different prompts: a dict from the index of the pair to
            ``(prompt, number of tokens)`` of the rejected response. ``prompt`` is a hashable value as in ``groups``.

    Returns:
        For each micro-batch, the indices of its pairs in ``prompts``. Each index occurs once.
    """
    check_integer("limit", limit, least=1)
    rejected = rejected_prompts or {}
    lengths = [
        max(prompt, rejected[pair][1] if pair in rejected else 0) + max(sizes, default=0)
        for pair, (prompt, sizes) in enumerate(zip(prompts, responses, strict=True))
    ]
    batches: list[tuple[list[int], _Rows]] = []
    for pairs in _longest_first(lengths, groups):
        rows = {pair: _rows_of(pair, prompts, responses, layout, groups, rejected) for pair in pairs}
        for part, part_rows in _parts(rows, limit, layout):
            for place, (others, other_rows) in enumerate(batches):
                joined = _joined(other_rows, part_rows)
                if _n_positions(joined, layout) <= limit:
                    batches[place] = others + part, joined
                    break
            else:
                batches.append((part, part_rows))
    return [pairs for pairs, _ in batches]


# The rows of a batch: tokens of the prompt and of all responses, by prompt, or by response in the layout "separate".
_Rows = dict[Any, tuple[int, int]]


def _rows_of(
    pair: int,
    prompts: Sequence[int],
    responses: Sequence[Sequence[int]],
    layout: RowLayout,
    groups: Sequence[Any],
    rejected: Mapping[int, tuple[Any, int]],
) -> _Rows:
    """Returns the rows of a pair. ``token_micro_batches`` describes the arguments after ``pair``."""
    sides = [(groups[pair], prompts[pair], size) for size in responses[pair] or [0]]
    if pair in rejected and len(sides) == 2:
        sides[1] = (*rejected[pair], sides[1][2])
    if layout == "separate":
        return {(pair, side): (prompt, size) for side, (_, prompt, size) in enumerate(sides)}
    return _joined(*({key: (prompt, size)} for key, prompt, size in sides))


def _joined(*batches: _Rows) -> _Rows:
    """Combines the rows of several batches. Rows with the same prompt become one row."""
    joined: _Rows = {}
    for key, (prompt, size) in chain.from_iterable(rows.items() for rows in batches):
        joined[key] = prompt, size + joined.get(key, (0, 0))[1]
    return joined


def _n_positions(rows: _Rows, layout: RowLayout) -> int:
    """Returns the number of token positions of a batch, padding included."""
    lengths = list(map(sum, rows.values()))
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)


def _parts(rows_of: Mapping[int, _Rows], limit: int, layout: RowLayout) -> Iterator[tuple[list[int], _Rows]]:
    """Divides the pairs of one prompt into parts that fit into a micro-batch.

    Yields the pairs and the rows of each part. In the layout "separate", each part is one pair. A pair that exceeds
    the limit forms a part alone.
    """
    part: list[int] = []
    rows: _Rows = {}
    for pair, pair_rows in rows_of.items():
        joined = _joined(rows, pair_rows)
        if part and (layout == "separate" or _n_positions(joined, layout) > limit):
            yield part, rows
            part, joined = [], pair_rows
        part, rows = [*part, pair], joined
    yield part, rows


def _longest_first(lengths: Sequence[int], groups: Sequence[Any] | None) -> list[list[int]]:
    """Divides the indices of ``lengths`` into groups, and returns the groups.

    Indices with equal values in ``groups`` form a group. If ``groups`` is None, each index is a group. In each group,
    the indices are sorted by length, the longest first. The groups are sorted by their longest length, the longest
    first.
    """
    if groups is not None and len(groups) != len(lengths):
        raise ValueError(f"groups must be as many as the {len(lengths)} lengths, got {len(groups)}")
    members: dict[Any, list[int]] = {}
    for position in range(len(lengths)):
        members.setdefault(position if groups is None else groups[position], []).append(position)
    sorted_groups = [sorted(positions, key=lambda position: -lengths[position]) for positions in members.values()]
    return sorted(sorted_groups, key=lambda positions: -lengths[positions[0]])
