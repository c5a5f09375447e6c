"""Tests more than 2^31 logits. Most rows are ignored, and the kernels never touch their memory."""

from __future__ import annotations

import os

import pytest
import torch

from mpo_ext import mpo_loss

VOCAB = 151936
TOKENS = 2**31 // (2 * VOCAB) + 8  # of each of the two sequences
LABELLED = 4  # at the end of each sequence, so that the rejected sequence has them beyond element 2^31


@pytest.mark.parametrize(
    "reuse_logits",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not os.environ.get("MPO_LARGE_TESTS"), reason="writes 4.3 GB of zeros; MPO_LARGE_TESTS=1 runs it"
            ),
        ),
    ],
)
def test_rows_beyond_2_to_the_31_elements_are_found(reuse_logits: bool) -> None:
    torch.manual_seed(0)
    logits = torch.empty(2, TOKENS, VOCAB, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    few = (4 * torch.randn(2, LABELLED, VOCAB)).bfloat16()
    logits[:, -LABELLED:] = few
    labels = torch.full((2, TOKENS), -100)
    labels[:, -LABELLED:] = torch.randint(VOCAB, (2, LABELLED))
    ref = torch.full((2,), -50.0)

    small = few.double().requires_grad_()  # float64: the error of float32 sums in plain torch depends on the CPU
    expected = mpo_loss(small, labels[:, -LABELLED:], ref, shift=False, backend="reference")
    expected.loss.backward()
    logits.requires_grad_()
    out = mpo_loss(logits, labels, ref, shift=False, reuse_logits=reuse_logits)
    (grad,) = torch.autograd.grad(out.loss, logits)

    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[:, -LABELLED:].double(), small.grad, rtol=1e-2, atol=1e-6)
    assert not grad[1, 0].any()
    assert not grad[0, -LABELLED - 1].any()
    assert (grad.data_ptr() == logits.data_ptr()) == reuse_logits
