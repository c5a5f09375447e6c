"""Writes results/integrations.json, from which ``python -m benchmarks --render --docs`` writes tables in docs/."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "results" / "integrations.json"


def save(kind: str, name: str, entry: Mapping[str, Any]) -> None:
    """Puts an entry into the file; ``kind`` is "runs" or "tests". It replaces the entry of the same name."""
    with PATH.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # make -j runs several trainers at once
        file.seek(0)
        text = file.read()
        document = json.loads(text) if text else {"schema": 1, "runs": {}, "tests": {}}
        document[kind] = dict(sorted({**document[kind], name: dict(entry)}.items()))
        file.truncate(0)
        file.write(json.dumps(document, indent=2) + "\n")
