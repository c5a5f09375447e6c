"""Writes results/integrations.json, the source of tables in docs/ (``python -m benchmarks --render --docs``)."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "results" / "integrations.json"


def save(kind: str, name: str, entry: Mapping[str, Any]) -> None:
    """Adds an entry to results/integrations.json, or replaces the entry with this name.

    ``kind`` is "runs" or "tests".
    """
    with PATH.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # make -j runs several trainers at once
        file.seek(0)
        text = file.read()
        document = json.loads(text) if text else {"schema": 1, "runs": {}, "tests": {}}
        document[kind] = dict(sorted({**document[kind], name: dict(entry)}.items()))
        file.truncate(0)
        file.write(json.dumps(document, indent=2) + "\n")
