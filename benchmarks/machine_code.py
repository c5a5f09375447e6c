"""Reads results/machine_code.json, the registers and instructions of the compiled CUDA kernels.

``python tests/cuda/check_sass.py --json FILE`` writes the file from the built module, without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from benchmarks import schema

VERSION = 1
_TEXTS = ("command", "date", "compiler")


def check(document: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if ``document``, the content of results/machine_code.json, has a wrong format.

    ``name`` is the file name, for messages.
    """
    keys = {"schema", "registers", "instructions", *_TEXTS}
    if set(document) != keys or document["schema"] != VERSION:
        raise ValueError(f"{name}: must have schema {VERSION} and {', '.join(sorted(keys))}, got {sorted(document)}")
    for key in _TEXTS:
        if not (isinstance(document[key], str) and document[key]):
            raise ValueError(f"{name}: {key} must be a text, got {document[key]!r}")
    if not document["registers"] or not document["instructions"]:
        raise ValueError(f"{name}: registers and instructions must not be empty")
    for arch, kernels in document["instructions"].items():
        for kernel, counts in kernels.items():
            if not counts["per_logit"] > 0:
                raise ValueError(f"{name}: {kernel} for {arch} must have instructions, got {counts}")


load = functools.partial(schema.load, check=check)
