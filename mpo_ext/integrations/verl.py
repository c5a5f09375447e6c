"""verl's log-probs of tokens by ``token_logp``: the function of ``mpo_ext.patch("verl")``."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils.torch_functional import logprobs_from_logits as own_function

from mpo_ext.integrations.patching import Replacement, replace_in_modules
from mpo_ext.loss.functions import token_logp


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Returns the log-prob of each label, ``[...]``, in nats; float32, or float64 for float64 logits.

    Args:
        logits: ``[..., V]``. verl's own function computes those of a ``DTensor``.
        labels: ``[...]`` int64.
        inplace_backward: Has no effect: the gradient never overwrites the logits.
    """
    if isinstance(logits, DTensor):
        return own_function(logits, labels, inplace_backward)
    return token_logp(logits, labels, shift=False)


def replacements() -> tuple[list[Replacement], str]:
    """Returns the functions of ``mpo_ext.patch("verl")``, and a line about them."""
    return replace_in_modules(own_function, logprobs_from_logits, "verl"), (
        "logprobs_from_logits reads the logits once and gives the same bits in every run"
    )
