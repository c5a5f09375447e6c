"""mpo_ext: Mixed Preference Optimization (arXiv 2411.10442) for multimodal and text language models.

Public names are imported on first use. ``import mpo_ext`` is therefore fast, and works even if a part of the
installation is broken. ``mpo-ext doctor`` finds such a part.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mpo_ext import loss

if TYPE_CHECKING:
    from mpo_ext.integrations import patch, unpatch
    from mpo_ext.loss import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["__version__", "patch", "unpatch"]
__all__ += loss.__all__


def __getattr__(name: str) -> Any:
    if name == "losses":  # the former name of mpo_ext.loss.preference
        return importlib.import_module("mpo_ext.loss.preference")
    if name in ("patch", "unpatch"):
        return getattr(importlib.import_module("mpo_ext.integrations"), name)
    if name not in __all__:
        raise AttributeError(f"module 'mpo_ext' has no attribute {name!r}")
    return getattr(loss, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
