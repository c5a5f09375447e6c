"""The result file about the compiled CUDA kernels, which ``python tests/cuda/check_sass.py --json FILE`` writes.

No GPU is needed: registers and the instructions of the main loops are read from the built module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1
_TEXTS = ("command", "date", "compiler")


def check(document: Mapping[str, Any], name: str) -> None:
    """Checks the file.

    Raises:
        ValueError: At the first thing that is not as it should be.
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


def load(path: Path) -> dict[str, Any]:
    """Reads and checks the file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not as it should be.
    """
    document: dict[str, Any] = json.loads(path.read_text())
    check(document, path.name)
    return document
