"""The loss of mpo_ext inside other trainers, one file per trainer.

``patch`` and ``unpatch`` change trainers at run time. Other packages are imported only when they are needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mpo_ext.integrations.patching import patch, unpatch

if TYPE_CHECKING:
    from mpo_ext.integrations.hf_trainer import MPOLossMixin, PairCollator

_HOMES = {"MPOLossMixin": "hf_trainer", "PairCollator": "hf_trainer"}

__all__ = ["MPOLossMixin", "PairCollator", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpo_ext.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mpo_ext.integrations.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
