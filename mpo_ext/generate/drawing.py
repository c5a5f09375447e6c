"""Draws the next token of each row of a batch. Each row has a separate random generator."""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpo_ext.generate.engine import SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor


def sample_token(scores: "Tensor", uniforms: "Tensor", sampling: SamplingConfig) -> "Tensor":
    """Draws a token id for each row of logits, with one random number per row.

    The result is the first token id at which the cumulative probability exceeds the random number. At temperature 0,
    it is the most probable token.

    Args:
        scores: ``[B, V]`` logits.
        uniforms: ``[B]`` float64 random numbers in [0, 1).
        sampling: Temperature, ``top_k`` and ``top_p``.

    Returns:
        ``[B]`` int64 token ids.

    Raises:
        FloatingPointError: If a row has a NaN or no finite maximum. At temperature 0, rows are not checked.
    """
    import torch

    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    scores = scores.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    probs = torch.softmax(scores, dim=-1)
    if sampling.top_p < 1:
        largest_first = probs.sort(dim=-1, descending=True).values
        before = largest_first.cumsum(dim=-1) - largest_first
        smallest = largest_first.masked_fill(before >= sampling.top_p, math.inf).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < smallest, 0)
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError("logits must have a finite maximum and no NaN, got a row that violates this")
    drawn = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative.device) * total, right=True)
    return drawn.squeeze(-1).clamp_max(scores.shape[-1] - 1)


class SeededDraw:
    """Draws the next token of each row of a batch. Each row has a separate random generator.

    An instance is also a logits processor of transformers. It draws a token for each row, and sets the logits of all
    other tokens to -inf.

    Args:
        seeds: Seed of each row.
        sampling: Temperature, ``top_k`` and ``top_p``.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingConfig) -> None:
        self.generators = [random.Random(seed) for seed in seeds]
        self.sampling = sampling

    def draw(self, scores: "Tensor") -> "Tensor":
        """Draws the next token of each row from ``[B, V]`` logits, and returns the ``[B]`` token ids."""
        import torch

        uniforms = torch.tensor([generator.random() for generator in self.generators], dtype=torch.float64)
        return sample_token(scores, uniforms, self.sampling)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the random generators of the rows with the indices ``rows``, and removes all others."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        return torch.full_like(scores, -math.inf).scatter_(1, self.draw(scores)[:, None], 0.0)
