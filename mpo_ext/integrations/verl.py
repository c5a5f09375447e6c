"""Implements ``mpo_ext.patch("verl")``: verl then computes the log-probs of tokens with ``token_logp``."""

from __future__ import annotations

import os

from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import torch_functional
from verl.utils.torch_functional import logprobs_from_logits as own_function

from mpo_ext.integrations.patching import Replacement, replace_in_modules
from mpo_ext.loss.functions import token_logp


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Returns the log-prob of each label, ``[...]``. The dtype is float32, or float64 for float64 logits.

    Args:
        logits: ``[..., V]``. If they are a ``DTensor``, verl's own function computes the log-probs.
        labels: ``[...]`` int64.
        inplace_backward: Whether the gradient may overwrite contiguous logits. As in verl, True has no effect without
            flash attention. True also has no effect if the environment variable VERL_DISABLE_FLASH_ATTN_CE is 1.
    """
    if isinstance(logits, DTensor):
        return own_function(logits, labels, inplace_backward)
    reuse_logits = (
        inplace_backward
        and logits.is_contiguous()  # verl copies other logits, so the caller's memory is not overwritten
        and torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
        and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    )
    return token_logp(logits, labels, shift=False, reuse_logits=reuse_logits)


def replacements() -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("verl")`` replaces, and a line that describes the change."""
    return replace_in_modules(own_function, logprobs_from_logits, "verl"), (
        "logprobs_from_logits reads the logits once and gives the same bits in every run"
    )
