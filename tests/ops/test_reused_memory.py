"""Tests that a step reuses the memory of the previous step's gradients after they have been freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpo_ext import empty_cache, linear_mpo_loss, mpo_loss
from mpo_ext.ops import memory

VOCAB, WIDTH = 70_000, 64  # a gradient of 17 MiB


@pytest.fixture(autouse=True)
def _no_kept_memory() -> Iterator[None]:
    gc.collect()
    empty_cache()
    yield
    empty_cache()


def step(weight: Tensor, seed: int, rows: int = 12, recompute: bool | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, rows, WIDTH, generator=generator)
    labels = torch.randint(VOCAB, (2, rows), generator=generator)
    leaf = weight.detach().requires_grad_()
    linear_mpo_loss(hidden, leaf, labels, torch.zeros(2), recompute=recompute).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)) / 8


@pytest.mark.parametrize("recompute", [None, True, False])
def test_the_next_gradient_takes_the_memory_of_a_freed_one(weight: Tensor, recompute: bool | None) -> None:
    first = step(weight, 1, recompute=recompute)
    address, copy = first.data_ptr(), first.clone()
    del first
    second = step(weight, 1, recompute=recompute)
    assert second.data_ptr() == address
    assert torch.equal(second, copy)


def test_living_gradients_share_no_memory(weight: Tensor) -> None:
    first = step(weight, 1)
    copy = first.clone()
    view = first[5:9]
    del first  # a view keeps the memory
    second = step(weight, 2)
    assert second.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert torch.equal(view, copy[5:9])


def test_at_most_one_block_is_kept_and_it_can_be_freed(weight: Tensor) -> None:
    gradients = [step(weight, seed) for seed in range(3)]
    assert not memory._free_blocks
    gradients.clear()
    assert len(memory._free_blocks) == 1
    empty_cache()
    assert not memory._free_blocks


def test_a_small_tensor_does_not_take_a_large_block(weight: Tensor) -> None:
    large = memory.reused_memory((64 << 20,), torch.uint8)
    address = large.data_ptr()
    del large
    assert memory.reused_memory((1000,), torch.uint8).data_ptr() != address
    assert memory._free_blocks[0].nbytes == 64 << 20
    taken = memory.reused_memory((20 << 20,), torch.uint8)  # below half: the block is freed
    assert not memory._free_blocks
    assert taken.untyped_storage().nbytes() == 20 << 20


def test_a_block_serves_tensors_that_are_a_little_smaller(weight: Tensor) -> None:
    step(weight, 1, rows=20, recompute=False)
    block = memory._free_blocks[0]
    gradient = step(weight, 2, rows=4, recompute=False)
    assert not memory._free_blocks
    start = block.__array_interface__["data"][0]
    assert start <= gradient.data_ptr() < start + block.nbytes


def logits_step(logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    mpo_loss(leaf, labels, torch.zeros(2), shift=False).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(("ignored", "is_reused"), [(0, True), (60, True), (70, False)])
def test_the_gradient_of_logits_reuses_memory_if_few_rows_are_ignored(ignored: int, is_reused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (2, 40), generator=generator)
    labels.view(-1)[:ignored] = -100
    memory.reused_memory(logits.shape, logits.dtype).fill_(3.0)  # freed: not zero
    assert len(memory._free_blocks) == 1
    gradient = logits_step(logits, labels)
    assert (not memory._free_blocks) == is_reused
    assert not gradient.flatten(0, 1)[:ignored].any()
    assert torch.equal(gradient[:, -5:], logits_step(logits, labels)[:, -5:])
