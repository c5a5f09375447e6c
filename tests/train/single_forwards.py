"""Computes loss and gradients with a separate forward for each response, as a reference for batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from all_float64 import AllFloat64
from families import FAMILIES, PAD, VOCAB
from torch import nn

from mpo_ext import linear_mpo_loss, mpo_loss
from mpo_ext.train.batch import Batch, collate
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward
from mpo_ext.train.masks import prompt_positions

LAYOUTS = ("shared", "separate")
# sdpa in transformers does not support a softcap on attention.
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "split sdpa", "eager")
    if family != "gemma2" or attention == "eager"
]
VISION = [family for family in FAMILIES if FAMILIES[family].tower]


def default_attention(family: str) -> str:
    return "eager" if family == "gemma2" else "sdpa"


def ref_logp(samples: Sequence[Sample]) -> torch.Tensor:
    return -torch.linspace(3, 9, 2 * len(samples))


def batch_of(model: nn.Module, samples: Sequence[Sample], kind: Any, **options: Any) -> Batch:
    return collate(samples, kind, pad_id=PAD, positions=prompt_positions(model), **options)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    with AllFloat64() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        out = forward(model, batch)
    return linear_mpo_loss(
        out.hidden, out.weight, batch.labels, -torch.linspace(3, 9, 2 * batch.pairs), cu_seqlens=batch.cu_seqlens,
        shift=False, **out.options,
    ).loss  # fmt: skip


def plain_loss(model: nn.Module, samples: Sequence[Sample], with_rejected: bool = True) -> torch.Tensor:
    """Runs a separate forward for each response. Returns the loss computed from the logits.

    The input of a forward is the prompt with its images, followed by one response.
    """
    logits, labels, lengths = [], [], [0]
    for side in ("chosen_ids", "rejected_ids"):
        for pair in samples:
            response = getattr(pair, side)
            if not len(response) or (side == "rejected_ids" and not with_rejected):
                logits.append(torch.zeros(1, VOCAB))
                labels.append(torch.tensor([-100]))
                lengths.append(1)
                continue
            inputs = {
                name: torch.cat([values, values.new_zeros(len(response))]).unsqueeze(0)
                for name, values in pair.token_inputs.items()
            }
            ids = torch.cat([pair.prompt_ids, response]).unsqueeze(0)
            row = model(input_ids=ids, **inputs, **pair.image_inputs, use_cache=False).logits[0]
            logits.append(row[len(pair.prompt_ids) - 1 : -1])
            labels.append(response)
            lengths.append(len(response))
    return mpo_loss(
        torch.cat(logits), torch.cat(labels), ref_logp(samples), cu_seqlens=torch.tensor(lengths).cumsum(0),
        shift=False, backend="reference",
    ).loss  # fmt: skip


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Backpropagates the loss. Returns the gradients by parameter name without the prefix ``module.``.

    A parameter without a gradient gets zeros. Also clears the gradients of the model.
    """
    loss.backward()
    grads = {
        name.removeprefix("module."): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return grads


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tol: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    assert largest > 0
    for name in expected:
        worst = (actual[name] - expected[name]).abs().max().item()
        assert worst <= tol * largest, f"{name}: {worst / largest:.2g} of the largest gradient"


def assert_as_plain(model: nn.Module, samples: Sequence[Sample], kinds: Sequence[str] = LAYOUTS) -> None:
    truth = plain_loss(model, samples)
    expected = gradients(model, truth)
    for kind in kinds:
        loss = loss_of(model, batch_of(model, samples, kind))
        torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
        assert_same(gradients(model, loss), expected)
