"""The public loss functions (``mpo_loss``, ``linear_mpo_loss``, ``token_logp``, ...) and their settings.

Names are imported on first use, which keeps ``import mpo_ext`` fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_ext.loss.batch_check import BatchFinding, check_batch
    from mpo_ext.loss.config import MPOConfig
    from mpo_ext.loss.eager import sequence_sums
    from mpo_ext.loss.functions import linear_mpo_loss, linear_token_logp, mpo_loss, token_logp
    from mpo_ext.loss.hf_head import HiddenAndHead, hidden_and_head, value_in_forward
    from mpo_ext.loss.reward_shift import RewardShift
    from mpo_ext.loss.steps import MPOOutput, shift_labels
    from mpo_ext.ops.memory import empty_cache

# Modules of the names that are not in the module ``functions``.
_HOMES = {"MPOConfig": "config", "RewardShift": "reward_shift", "sequence_sums": "eager"}
_HOMES |= dict.fromkeys(("BatchFinding", "check_batch"), "batch_check")
_HOMES |= dict.fromkeys(("HiddenAndHead", "hidden_and_head", "value_in_forward"), "hf_head")
_HOMES |= dict.fromkeys(("MPOOutput", "shift_labels"), "steps")

__all__ = [
    "BatchFinding",
    "HiddenAndHead",
    "MPOConfig",
    "MPOOutput",
    "RewardShift",
    "check_batch",
    "empty_cache",
    "hidden_and_head",
    "linear_mpo_loss",
    "linear_token_logp",
    "mpo_loss",
    "sequence_sums",
    "shift_labels",
    "token_logp",
    "value_in_forward",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "empty_cache":
        return importlib.import_module("..ops.memory", __name__).empty_cache
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'functions')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
