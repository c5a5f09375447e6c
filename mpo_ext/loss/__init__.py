"""The loss: ``mpo_loss``, ``linear_mpo_loss``, ``token_logp``, ``linear_token_logp`` and their settings.

Names are imported on first use, which keeps ``import mpo_ext`` fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_ext.loss.config import MPOConfig
    from mpo_ext.loss.eager import sequence_sums
    from mpo_ext.loss.functions import (
        MPOOutput,
        linear_mpo_loss,
        linear_token_logp,
        mpo_loss,
        shift_labels,
        token_logp,
    )
    from mpo_ext.loss.hf_head import HiddenAndHead, hidden_and_head
    from mpo_ext.loss.reward_shift import RewardShift

_HOMES = {
    "HiddenAndHead": "hf_head",
    "MPOConfig": "config",
    "MPOOutput": "functions",
    "RewardShift": "reward_shift",
    "hidden_and_head": "hf_head",
    "linear_mpo_loss": "functions",
    "linear_token_logp": "functions",
    "mpo_loss": "functions",
    "sequence_sums": "eager",
    "shift_labels": "functions",
    "token_logp": "functions",
}

__all__ = [
    "HiddenAndHead",
    "MPOConfig",
    "MPOOutput",
    "RewardShift",
    "hidden_and_head",
    "linear_mpo_loss",
    "linear_token_logp",
    "mpo_loss",
    "sequence_sums",
    "shift_labels",
    "token_logp",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpo_ext.loss' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mpo_ext.loss.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
