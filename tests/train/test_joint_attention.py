"""Tests joint_attention.py, which computes attention on CPUs without a mask.

A row holds a prompt and several responses. Results and gradients equal those with a dense mask.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import build
from single_forwards import batch_of, gradients, loss_of
from test_split_attention import assert_as_dense, several_pairs
from torch import Tensor

from mpo_ext.train import joint_attention, split_attention
from mpo_ext.train.joint_attention import JointCalls, TokenPart, can_join, joint_calls

#: Two rows of 20 and 9 tokens, one with three responses, both with padding.
PARTS = [
    TokenPart(8, None, 0, False), TokenPart(3, 0, 5, False), TokenPart(4, 0, 5, False), TokenPart(5, None, 0, True),
    TokenPart(6, None, 0, False), TokenPart(3, None, 0, True),
]  # fmt: skip
TOKENS = 29


def dense_mask(parts: list[TokenPart]) -> Tensor:
    """Returns a mask ``[T, T]``: True where the token of the row attends to the token of the column."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    starts = [sum(part.size for part in parts[:i]) for i in range(len(parts))]
    for start, part in zip(starts, parts, strict=True):
        if not part.is_padding:
            rows = slice(start, start + part.size)
            mask[rows, rows] = torch.ones(part.size, part.size, dtype=torch.bool).tril()
            if part.prompt is not None:
                first = starts[part.prompt]
                mask[rows, first : first + part.prompt_length] = True
    return mask


def by_definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    # Padding attends to itself, so that its gradients are finite, and is then set to zero.
    seen = mask | (torch.eye(len(mask), dtype=torch.bool) & ~mask.any(1, keepdim=True))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value) * mask.any(1)[:, None, None]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("change", ["", "another prompt", "no prompt", "a prompt of one token"])
def test_result_and_gradients_are_those_of_a_dense_mask(
    dtype: torch.dtype, tol: float, scale: float | None, change: str
) -> None:
    parts = list(PARTS)
    if change:
        values = {"another prompt": {"prompt": 4}, "no prompt": {"prompt_length": 0}}
        parts[2] = parts[2]._replace(**values.get(change, {"prompt_length": 1}))
    # The order of the heads in memory is that of models, whose heads are the second axis.
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, TOKENS, 8, generator=generator, dtype=dtype).transpose(0, 1).requires_grad_() for _ in range(3)
    ]
    if change == "another prompt":  # which lies behind the response
        parts = [parts[4], parts[5], *(part._replace(prompt=2) if part.prompt == 0 else part for part in parts[:4])]
        parts[4] = parts[4]._replace(prompt=0)
    calls = joint_calls(parts)
    out = joint_attention.joint_attention(*inputs, calls, scale)
    expected = by_definition(*inputs, dense_mask(parts), scale)
    torch.testing.assert_close(out, expected, rtol=tol, atol=tol)
    weight = torch.randn(out.shape, generator=generator, dtype=dtype)
    found, truth = (torch.autograd.grad(each, inputs, weight) for each in (out, expected))
    for gradient, expected_gradient in zip(found, truth, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=tol, atol=2 * tol)


def test_all_responses_share_one_call_over_their_prompt() -> None:
    assert joint_calls(PARTS) == JointCalls(((0, 5), (5, 8), (8, 11), (11, 15), (20, 26)), ((5, 15, 0, 5),))
    shorter = [*PARTS[:2], PARTS[2]._replace(prompt_length=4), *PARTS[3:]]
    assert joint_calls(shorter).shared == ((5, 11, 0, 5), (11, 15, 0, 4))
    without = [part._replace(prompt_length=0) for part in PARTS]
    assert joint_calls(without) == JointCalls(((0, 8), (8, 11), (11, 15), (20, 26)), ())
    only_prompt = [TokenPart(5, None, 0, False), TokenPart(2, 0, 5, False)]  # the first response is empty
    assert joint_calls(only_prompt) == JointCalls(((0, 5), (5, 7)), ((5, 7, 0, 5),))


def test_a_gradient_that_is_differentiated_is_refused() -> None:
    query = torch.randn(TOKENS, 2, 8, requires_grad=True)
    out = joint_attention.joint_attention(query, query, query, joint_calls(PARTS), None)
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        gradient.sum().backward()


def test_other_dtypes_head_sizes_and_torch_versions_take_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(2, 1, 3, 8)
    assert can_join(query, query)
    assert not can_join(query.bfloat16(), query.bfloat16())
    assert not can_join(query, query[..., :4])
    assert not can_join(query.to("meta"), query.to("meta"))
    monkeypatch.setattr(joint_attention, "torch", SimpleNamespace(**vars(torch) | {"ops": SimpleNamespace(aten=None)}))
    assert not can_join(query, query)


@pytest.mark.parametrize("family", ["llama", "internvl"])
def test_without_the_kernel_results_are_the_same_up_to_rounding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = several_pairs(family, 2)
    model = build(family, "split sdpa", torch.float64)
    joined = gradients(model, loss_of(model, batch_of(model, samples, "shared")))
    monkeypatch.setattr(split_attention, "can_join", lambda query, value: False)
    assert_as_dense(model, samples, 1e-12)
    masked = gradients(model, loss_of(model, batch_of(model, samples, "shared")))
    differences = [not torch.equal(grad, masked[name]) for name, grad in joined.items()]
    assert any(differences)  # the two ways were taken
    for name, grad in joined.items():
        torch.testing.assert_close(grad, masked[name], rtol=1e-11, atol=1e-13)
