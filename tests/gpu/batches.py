"""A small batch and its loss, for the tests on a GPU."""

from typing import Any

import torch
from torch import Tensor

from mpo_ext import mpo_loss

LogitsLabelsReference = tuple[Tensor, Tensor, Tensor]


def small_batch(device: str, dtype: torch.dtype, vocab: int, tokens: int = 9) -> LogitsLabelsReference:
    """Returns (logits, labels, ref_logp) of two pairs, with the first three labels of each sequence ignored.

    With an odd ``vocab``, most rows do not start at a multiple of 16 bytes.
    """
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, tokens, vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (4, tokens), generator=generator)
    labels[:, :3] = -100
    return logits.to(device), labels.to(device), torch.linspace(-60, -30, 4).to(device)


def loss_and_grad(batch: LogitsLabelsReference, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the loss of a batch and the gradient of its logits."""
    logits = batch[0].detach().requires_grad_()
    loss = mpo_loss(logits, *batch[1:], backend=backend, **options).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]
