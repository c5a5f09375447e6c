"""Writes results/integrations.json, from which ``python -m benchmarks --render --docs`` writes tables in docs/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "results" / "integrations.json"


def save(kind: str, name: str, entry: Mapping[str, Any]) -> None:
    """Puts an entry into the file; ``kind`` is "runs" or "tests". It replaces the entry of the same name."""
    document = json.loads(PATH.read_text()) if PATH.exists() else {"schema": 1, "runs": {}, "tests": {}}
    document[kind] = {**document[kind], name: dict(entry)}
    PATH.write_text(json.dumps(document, indent=2) + "\n")
