"""mpo_ext: Mixed Preference Optimization (arXiv 2411.10442) for multimodal and text language models.

Public names are imported on first use. ``import mpo_ext`` is therefore fast, and works even if a part of the
installation is broken (see ``mpo-ext doctor``).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_ext.loss import (
        HiddenAndHead,
        MPOConfig,
        MPOOutput,
        RewardShift,
        hidden_and_head,
        linear_mpo_loss,
        linear_token_logp,
        mpo_loss,
        sequence_sums,
        shift_labels,
        token_logp,
    )

__version__ = "0.1.0"

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
    if name == "losses":  # the former name of mpo_ext.loss.preference
        return importlib.import_module("mpo_ext.loss.preference")
    if name not in __all__:
        raise AttributeError(f"module 'mpo_ext' has no attribute {name!r}")
    return getattr(importlib.import_module("mpo_ext.loss"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
