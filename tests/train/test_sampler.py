"""Tests the samplers: which pairs a step takes, on which rank, and after resuming."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from families import PAD, sample

from mpo_ext.train.batch import collate
from mpo_ext.train.sampler import StepSampler, micro_batches, token_micro_batches


def numbers(count: int) -> Callable[[int], np.ndarray]:
    return lambda epoch: np.arange(count, dtype=np.int64)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (12, 4), (3, 8), (1, 1), (257, 16)])
def test_every_pair_is_met_once_in_each_epoch(count: int, size: int) -> None:
    sampler = StepSampler(numbers(count), batch_size=size)
    assert sampler.steps_per_epoch == -(-count // size)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        taken = [sampler.step(step).tolist() for step in steps]
        assert sorted(pair for pairs in taken for pair in pairs) == list(range(count))
        assert [len(pairs) for pairs in taken[:-1]] == [size] * (len(taken) - 1)
        assert len(taken[-1]) == (count % size or size)


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [StepSampler(numbers(50), batch_size=50, seed=seed).step(k).tolist() for seed in (0, 1) for k in (0, 1)]
    assert len(set(map(tuple, [*orders, range(50)]))) == 5


def test_a_step_depends_on_seed_and_number_alone() -> None:
    """Checks that a step has the same pairs in a resumed run as in an uninterrupted run, also in a later epoch."""
    whole = StepSampler(numbers(23), batch_size=5, seed=7)
    steps = [whole.step(step).tolist() for step in range(15)]
    for step in (14, 3, 9, 0, 5):
        assert StepSampler(numbers(23), batch_size=5, seed=7).step(step).tolist() == steps[step]
        assert whole.step(step).tolist() == steps[step]


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_ranks_divides_the_same_step(world_size: int, is_grouped: bool) -> None:
    groups = np.arange(37) // 3 if is_grouped else None
    sampler = StepSampler(numbers(37), batch_size=7, seed=1, groups=groups)
    for step in range(2 * sampler.steps_per_epoch):
        slices = [sampler.rank_slice(step, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(slices).tolist() == sampler.step(step).tolist()
        sizes = [len(part) for part in slices]
        assert max(sizes) - min(sizes) <= 1
    assert len(sampler.step(5)) == 2
    assert [len(sampler.rank_slice(5, rank, 8)) for rank in range(8)].count(0) == 6


def test_pairs_of_a_prompt_stand_next_to_each_other() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 20, 100) * 10**15 - 7
    sampler = StepSampler(numbers(100), batch_size=8, seed=2, groups=groups)
    seen = []
    for epoch in range(2):
        order = groups[sampler.order(epoch)]
        runs = 1 + int((order[1:] != order[:-1]).sum())
        assert runs == len(set(groups.tolist()))
        assert sorted(sampler.order(epoch).tolist()) == list(range(100))
        seen.append(order[np.flatnonzero(np.diff(order, prepend=order[0] - 1))].tolist())
    assert seen[0] != seen[1]
    assert seen[0] != sorted(seen[0])
    inside = [sampler.order(epoch)[groups[sampler.order(epoch)] == groups[0]].tolist() for epoch in range(2)]
    assert sorted(inside[0]) == sorted(inside[1])
    assert inside[0] != inside[1]


def test_copies_of_a_pair_stand_in_groups_of_their_own() -> None:
    """Checks that each block of four consecutive pairs has the four different pairs of one prompt.

    An epoch has three copies of each of the 300 pairs. The copies must be in different blocks.
    """
    times = np.repeat(np.arange(300), 3)
    groups = np.arange(300) // 4
    sampler = StepSampler(lambda epoch: times, batch_size=16, groups=groups)
    order = sampler.order(0)
    assert Counter(order.tolist()) == dict.fromkeys(range(300), 3)
    blocks = order.reshape(-1, 4)
    assert all(len(set(block)) == 4 for block in blocks.tolist())
    assert all(len(set(groups[block])) == 1 for block in blocks)


def test_wrong_arguments_of_the_sampler() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        StepSampler(numbers(3), batch_size=0)
    with pytest.raises(ValueError, match="epoch must give at least one pair, got none"):
        StepSampler(numbers(0), batch_size=1)
    with pytest.raises(ValueError, match="epoch must give 3 pairs each time, got 4 for epoch 1"):
        StepSampler(lambda epoch: np.arange(3 + epoch), batch_size=3).step(1)
    sampler = StepSampler(numbers(3), batch_size=1)
    with pytest.raises(ValueError, match="rank must be less than world_size 2, got 2"):
        sampler.rank_slice(0, 2, 2)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        sampler.step(-1)


def test_a_sampler_orders_millions_of_pairs() -> None:
    """Orders 2 million grouped pairs, which would be too slow in a Python loop."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 200_000, 2_000_000)
    sampler = StepSampler(numbers(2_000_000), batch_size=256, groups=groups)
    order = sampler.order(0)
    assert int((np.diff(groups[order]) != 0).sum()) + 1 == len(np.unique(groups))


def test_micro_batches_are_sorted_by_length_and_stable() -> None:
    lengths = [5, 9, 5, 2, 9, 7, 5]
    assert micro_batches(lengths, 3) == [[1, 4, 5], [0, 2, 6], [3]]
    assert micro_batches(lengths, 1) == [[1], [4], [5], [0], [2], [6], [3]]
    assert micro_batches(lengths, 100) == [[1, 4, 5, 0, 2, 6, 3]]
    assert micro_batches([], 4) == []
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        micro_batches(lengths, 0)


def test_micro_batches_keep_the_pairs_of_a_prompt_together() -> None:
    lengths = [5, 9, 5, 2, 9, 7, 6]
    groups = ["a", "b", "a", "b", "c", "a", "d"]
    assert micro_batches(lengths, 2, groups=groups) == [[1, 3], [4, 5], [0, 2], [6]]
    with pytest.raises(ValueError, match="groups must be as many as the 7 lengths, got 1"):
        micro_batches(lengths, 2, groups=["a"])


def test_micro_batches_are_filled_by_tokens() -> None:
    prompts, responses = [10, 30, 20, 5, 12], [[2, 3], [5, 5], [9, 1], [1, 1], [4, 4]]
    keys = list("abcde")
    assert token_micro_batches(prompts, responses, 50, "packed", groups=keys) == [[1, 3], [2, 4], [0]]
    assert token_micro_batches(prompts, responses, 60, "packed", groups=keys) == [[1, 4], [2, 0, 3]]
    assert token_micro_batches(prompts, responses, 10**6, "packed", groups=keys) == [[1, 2, 4, 0, 3]]
    assert token_micro_batches(prompts, responses, 1, "packed", groups=keys) == [[1], [2], [4], [0], [3]]
    # Rows are padded to the longest: 40; 30 and 20; 15 and 7.
    assert token_micro_batches(prompts, responses, 60, "shared", groups=keys) == [[1], [2, 4], [0, 3]]
    # Two rows for each pair: 2 * 35; 2 * 29, 2 * 16; 2 * 13, 2 * 6.
    assert token_micro_batches(prompts, responses, 70, "separate", groups=keys) == [[1], [2], [4, 0], [3]]
    assert token_micro_batches([], [], 5, "packed", groups=[]) == []
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        token_micro_batches(prompts, responses, 0, "packed", groups=keys)


def test_pairs_of_a_prompt_share_it_in_a_micro_batch_up_to_the_limit() -> None:
    prompts, responses, keys = [10, 10, 10, 30], [[2, 2], [3, 3], [4, 4], [9, 9]], ["a", "a", "a", "b"]
    assert token_micro_batches(prompts, responses, 76, "packed", groups=keys) == [[3, 2, 1, 0]]
    assert token_micro_batches(prompts, responses, 75, "packed", groups=keys) == [[3], [2, 1, 0]]
    assert token_micro_batches(prompts, responses, 24, "packed", groups=keys) == [[3], [2, 1], [0]]
    assert token_micro_batches(prompts, responses, 96, "masked", groups=keys) == [[3, 2, 1, 0]]
    assert token_micro_batches(prompts, responses, 95, "masked", groups=keys) == [[3], [2, 1, 0]]


@pytest.mark.parametrize("with_rejected_prompts", [False, True])
@pytest.mark.parametrize("layout", ["packed", "shared", "separate"])
def test_no_micro_batch_has_more_positions_than_the_limit(layout: Any, with_rejected_prompts: bool) -> None:
    rng = np.random.default_rng(0)
    samples = [
        sample("llama", seed, prompt=seed % 40, text=5 + seed % 40, chosen=chosen, rejected=rejected)
        for seed, (chosen, rejected) in enumerate(rng.integers(0, 30, (60, 2)).tolist())
    ]
    rejected_prompts: dict[int, tuple[Any, int]] = {}
    for seed in range(0, 60 * with_rejected_prompts, 3):  # some of these prompts are also those of other pairs
        number = 7 * seed % 40
        prompt = sample("llama", 100 + seed, prompt=number, text=5 + number, chosen=0, rejected=0)
        samples[seed] = dataclasses.replace(samples[seed], rejected_prompt=prompt)
        rejected_prompts[seed] = prompt.prompt_key, len(prompt.prompt_ids)
    prompts = [len(one.prompt_ids) for one in samples]
    responses = [[len(one.chosen_ids), len(one.rejected_ids)] for one in samples]
    split = token_micro_batches(
        prompts, responses, 150, layout, groups=[one.prompt_key for one in samples], rejected_prompts=rejected_prompts
    )
    assert sorted(pair for pairs in split for pair in pairs) == list(range(60))
    positions = [collate([samples[pair] for pair in pairs], layout, pad_id=PAD).positions for pairs in split]
    assert max(positions) <= 150
    assert len(positions) <= {"packed": 1.1, "shared": 1.5, "separate": 1.5}[layout] * sum(positions) / 150 + 2
