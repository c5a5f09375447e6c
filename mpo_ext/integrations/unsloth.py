"""Implements ``mpo_ext.patch("unsloth")``: Unsloth then computes the log-probs of tokens with ``token_logp``."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import Tensor
from unsloth.models.rl import selective_log_softmax as own_function

from mpo_ext.integrations.patching import Replacement, replace_in_modules
from mpo_ext.loss.functions import token_logp

_NAME = "chunked_selective_log_softmax"
_GENERATED = re.compile(r"Unsloth\w*Trainer")  # modules that Unsloth writes, with copies of its functions


def chunked_selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, chunks: int = 4, **support: Any
) -> Tensor:
    """Returns the log-prob of each token, ``[B, T]`` float32, in nats.

    Args:
        logits: ``[B, T, V]``.
        index: ``[B, T]`` int64 token ids.
        temperature: Divisor of the logits.
        chunks: Number of chunks in Unsloth's function; ignored here.
        support: Options of Unsloth that restrict the vocabulary (top k, top p, min p). If any is given, Unsloth's own
            function computes the log-probs.
    """
    if support:
        return own_function(logits, index, temperature, chunks, **support)
    if temperature != 1.0:
        logits = logits.float() / temperature
    return token_logp(logits, index, shift=False)


def replacements() -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("unsloth")`` replaces, and a line that describes the change."""
    changes = replace_in_modules(own_function, chunked_selective_log_softmax, "unsloth_zoo", "unsloth")
    generated = [module for title, module in list(sys.modules.items()) if _GENERATED.fullmatch(title)]
    changes += [
        Replacement(module, _NAME, chunked_selective_log_softmax) for module in generated if hasattr(module, _NAME)
    ]
    return changes, f"{_NAME} reads the logits once (GRPO); DPO is scored from hidden states by Unsloth itself"
