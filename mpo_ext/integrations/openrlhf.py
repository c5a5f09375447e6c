"""Implements ``mpo_ext.patch("openrlhf")``: OpenRLHF then computes the log-probs of tokens with ``token_logp``."""

from __future__ import annotations

from openrlhf.models.utils import log_probs_from_logits as own_function
from torch import Tensor

from mpo_ext.integrations.patching import Replacement, replace_in_modules
from mpo_ext.loss.functions import token_logp


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the log-prob of each label in nats.

    Args:
        logits: ``[..., V]``. Divided by ``temperature`` in place, as in OpenRLHF's function.
        labels: ``[...]`` int64.
        temperature: Divisor of the logits.

    Returns:
        ``[...]`` float32; float64 for float64 logits.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return token_logp(logits, labels, shift=False)


def replacements() -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("openrlhf")`` replaces, and a line that describes the change."""
    return replace_in_modules(own_function, log_probs_from_logits, "openrlhf"), (
        "log_probs_from_logits reads the logits once and keeps no copy of them (DPO, PPO and its relatives)"
    )
