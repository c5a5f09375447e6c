"""Compares the CPU kernels with plain torch, and the CUDA kernels if there is a GPU."""

from typing import Any

import pytest
import torch
from batches import loss_and_grad, small_batch
from torch import Tensor

from mpo_ext import linear_mpo_loss, token_logp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 7, 1003, 32_768, 92_553]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch sees")
on_each_backend = pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@on_each_backend
@pytest.mark.parametrize("stats", [(), ("entropy", "mean_logit", "top1")], ids=["no statistics", "statistics"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_and_its_gradient_agree_with_plain_torch(
    dtype: torch.dtype, vocab: int, stats: tuple[str, ...], backend: str
) -> None:
    batch = small_batch(backend, dtype, vocab)
    loss, grad = loss_and_grad(batch, backend, stats=stats)
    expected, expected_grad = loss_and_grad(batch, "reference", stats=stats)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.float(), expected_grad.float(), rtol=rtol, atol=2e-6)


@on_each_backend
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_agree_with_plain_torch(dtype: torch.dtype, vocab: int, backend: str) -> None:
    logits, labels, _ = small_batch(backend, dtype, vocab)
    logp = token_logp(logits, labels, backend=backend, shift=False)
    torch.testing.assert_close(
        logp, token_logp(logits, labels, backend="reference", shift=False), rtol=1e-5, atol=1e-5
    )


@on_each_backend
@pytest.mark.parametrize(
    ("is_frozen", "recompute"), [(False, True), (False, False), (True, True)], ids=["recompute", "keep", "frozen head"]
)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_from_hidden_states_in_many_tiles_agrees_with_float64(
    dtype: torch.dtype, vocab: int, is_frozen: bool, recompute: bool, backend: str
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(4, 9, 64, generator=generator).to(backend, dtype)
    weight = (torch.randn(vocab, 64, generator=generator) / 8).to(backend, dtype)
    labels = torch.randint(vocab, (4, 9), generator=generator)
    labels[:, :3] = -100
    ref_logp = torch.linspace(-60, -30, 4).to(backend)

    def run(precision: torch.dtype, head_backend: str, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [hidden.to(precision).requires_grad_(), weight.to(precision).requires_grad_(not is_frozen)]
        loss = linear_mpo_loss(*inputs, labels, ref_logp, backend=head_backend, **options).loss
        return loss.detach(), torch.autograd.grad(loss, [tensor for tensor in inputs if tensor.requires_grad])

    loss, gradients = run(dtype, backend, recompute=recompute, memory_budget=1 << 16)
    expected, expected_gradients = run(torch.float64, "reference")
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        bound = 2 * torch.finfo(dtype).eps * exact.norm() + 1e-6
        assert (gradient.double() - exact).norm() <= bound
