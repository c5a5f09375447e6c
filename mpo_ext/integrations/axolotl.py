"""Implements ``mpo_ext.patch("axolotl")``: axolotl's ``rl: dpo`` then computes its loss with mpo_ext."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpo_ext.integrations import trl
from mpo_ext.integrations.patching import Replacement, check_sources


def replacements(*, reward_shift: Mapping[str, Any] | None = None) -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("axolotl")`` replaces, and a line that describes the change.

    axolotl's trainer inherits the loss from TRL's ``DPOTrainer``, so the replacements are those of
    ``mpo_ext.patch("trl")``.

    Raises:
        RuntimeError: If TRL has a version or source that mpo_ext does not know.
    """
    version = check_sources("trl")
    changes, summary = trl.replacements(reward_shift=reward_shift)
    return changes, f"its {summary} (TRL {version})"
