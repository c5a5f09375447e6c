"""Checks the operators on parts (shards) of the vocabulary. The tests of each backend call these checks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mpo_ext.ops import logits as ops
from mpo_ext.ops.checks import STATS
from mpo_ext.ops.memory import VocabShard, result_dtype

IGNORE = -100


def make_rows(dtype: torch.dtype, vocab: int, edges: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns 7 rows of logits and their labels.

    Some labels are at the edge of a shard. Other labels are ignored or out of range. Some rows have -inf in a whole
    shard.
    """
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(7, vocab, generator=generator)).to(dtype)
    labels = torch.tensor([0, edges[0] - 1, edges[0], vocab - 1, IGNORE, vocab, -1])
    logits[2, : edges[0]] = -torch.inf
    logits[3, edges[0] :] = -torch.inf
    logits[3, -1] = 1.5
    return logits, labels


def check_shards(backend: str, dtype: torch.dtype, vocab: int, edges: tuple[int, ...]) -> None:
    """Compares merged shards with the whole vocabulary: log-probs, statistics and gradients.

    ``edges`` are the first columns of all shards except the first shard.
    """
    logits, labels = make_rows(dtype, vocab, edges)
    mask = ops.stats_mask(STATS)
    whole = ops.token_logp(logits, labels, IGNORE, mask, backend)
    parts = [(VocabShard(first, vocab), logits[:, first:end]) for first, end in itertools.pairwise((0, *edges, vocab))]
    states = torch.stack([ops.token_logp_shard(part, labels, IGNORE, mask, backend, shard) for shard, part in parts])
    merged = ops.merge_shards(states, labels, IGNORE, mask, vocab, result_dtype(logits))
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for name, ours, theirs in zip(ops.ROW_OUTPUTS, merged, whole, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    weight = torch.linspace(-1, 2, len(labels), dtype=result_dtype(logits))
    expected = ops.logits_grad(logits, labels, *whole[1:3], weight, None, IGNORE, backend)
    written = logits.clone()
    for shard, part in parts:
        columns = slice(shard.first, shard.first + part.shape[1])
        grad = ops.logits_grad(part, labels, *merged[1:3], weight, None, IGNORE, backend, *shard)
        ops.logits_grad_(written[:, columns], labels, *merged[1:3], weight, None, IGNORE, backend, *shard)
        # Where a row and its gradient differ in alignment, the CUDA kernel computes exp in another way.
        bounds = (
            {"rtol": 1e-5, "atol": 0.0} if backend == "cuda" and dtype == torch.float32 else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(grad, written[:, columns], equal_nan=True, **bounds)
        ulp = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else bound
        torch.testing.assert_close(grad, expected[:, columns], rtol=ulp, atol=bound, equal_nan=True)
