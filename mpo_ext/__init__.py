"""mpo_ext: Mixed Preference Optimization (arXiv 2411.10442) for multimodal and text language models.

The public names are imported when they are first used, so that ``import mpo_ext`` is quick and works where half of the
installation is broken (see ``mpo-ext doctor``).
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

__version__ = "0.1.0"

_HOMES = {
    "HiddenAndHead": "mpo_ext.loss.hf_head",
    "MPOConfig": "mpo_ext.loss.config",
    "MPOOutput": "mpo_ext.loss.functions",
    "RewardShift": "mpo_ext.loss.reward_shift",
    "hidden_and_head": "mpo_ext.loss.hf_head",
    "linear_mpo_loss": "mpo_ext.loss.functions",
    "linear_token_logp": "mpo_ext.loss.functions",
    "mpo_loss": "mpo_ext.loss.functions",
    "sequence_sums": "mpo_ext.loss.eager",
    "shift_labels": "mpo_ext.loss.functions",
    "token_logp": "mpo_ext.loss.functions",
}

__all__ = [
    "HiddenAndHead",
    "MPOConfig",
    "MPOOutput",
    "RewardShift",
    "__version__",
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
        raise AttributeError(f"module 'mpo_ext' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
