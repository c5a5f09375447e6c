"""Checks the format of the result files.

``check`` lists the fields of a file. The field ``points`` holds the measurements. A point has the measurements of one
implementation on one shape. A point without measurements has a ``reason``. In the files of ``benchmarks.gpu``, a point
may also be a check that passed or failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

VERSION = 1
GPU_STAGES = ("correct", "tests", "sanitize", "logits", "linear", "train_step", "ncu", "tune")
ON_CPU = ("logits", "linear", "train_step", "sampling", "machine", "cost_model")
BENCHMARKS = (*ON_CPU, *(f"gpu_{stage}" for stage in GPU_STAGES))
_STATUSES = ("measured", "not run", "passed", "failed")
ENVIRONMENT = (
    "cpu", "cores", "threads", "memory_bytes", "gpu", "os", "python", "versions", "commit", "modified", "command",
    "started", "ended", "load_before", "load_after",
)  # fmt: skip
_TEXTS = ("id", "sweep", "provider", "status", "reason")
_SHAPE = ("dtype", "pairs", "tokens", "vocab", "hidden", "share")  # None if a benchmark has no such size
_NUMBERS = ("median_s", "p20_s", "p80_s", "peak_bytes", "floor_s", "share_of_floor", "predicted_s", "predicted_bytes")


def check(document: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if the content of a result file has a wrong format.

    The message states the file ``name``, the field, the rule and the value.
    """

    def must(holds: bool, where: str, rule: str, value: object) -> None:
        if not holds:
            raise ValueError(f"{name}: {where} must be {rule}, got {value!r}")

    keys = {"schema", "benchmark", "quick", "environment", "settings", "missing", "points"}
    must(set(document) == keys, "the file", f"an object of {', '.join(sorted(keys))}", sorted(document))
    must(document["schema"] == VERSION, "schema", str(VERSION), document["schema"])
    must(document["benchmark"] in BENCHMARKS, "benchmark", f"one of {', '.join(BENCHMARKS)}", document["benchmark"])
    must(isinstance(document["quick"], bool), "quick", "a bool", document["quick"])
    environment = document["environment"]
    must(set(environment) == set(ENVIRONMENT), "environment", f"an object of {', '.join(ENVIRONMENT)}", environment)
    for key in ("cpu", "python", "commit", "command", "started", "ended"):
        must(bool(environment[key]) and isinstance(environment[key], str), f"environment.{key}", "a text", None)
    must("torch" in environment["versions"], "environment.versions", "with torch", environment["versions"])
    must("/" not in environment["command"].split(" ")[0], "environment.command", "no path", environment["command"])
    for provider, reason in document["missing"].items():
        must(isinstance(reason, str) and bool(reason), f"missing[{provider!r}]", "a reason", reason)
    points = document["points"]
    must(isinstance(points, list) and bool(points), "points", "a list with at least one point", points)
    seen: set[str] = set()
    for index, point in enumerate(points):
        where = f"points[{index}]"
        for key in _TEXTS:
            must(isinstance(point.get(key), str), f"{where}.{key}", "a text", point.get(key))
        for key in _SHAPE:
            must(key in point, where, f"an object with {key}", sorted(point))
        must(point["id"] not in seen, f"{where}.id", "used once", point["id"])
        seen.add(point["id"])
        must(point["status"] in _STATUSES, f"{where}.status", f"one of {', '.join(_STATUSES)}", point["status"])
        has_reason = point["status"] in ("measured", "passed") or bool(point["reason"])
        must(has_reason, f"{where}.reason", "given", point["reason"])
        for key in _NUMBERS:
            value = point.get(key)
            is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            must(value is None or is_number, f"{where}.{key}", "a finite number or null", value)
        must(
            point["status"] != "measured" or point.get("median_s") is not None or point.get("peak_bytes") is not None,
            where, "measured with median_s or peak_bytes", point["id"],
        )  # fmt: skip
        if point.get("median_s") is not None:
            must(point["median_s"] > 0, f"{where}.median_s", "positive", point["median_s"])
            must(bool(point.get("seconds")), f"{where}.seconds", "the counted runs", point.get("seconds"))
            low, high = min(point["seconds"]), max(point["seconds"])
            must(low <= point["median_s"] <= high, f"{where}.median_s", "among its seconds", point["median_s"])


def load(path: Path, check: Callable[[Mapping[str, Any], str], None] = check) -> dict[str, Any]:
    """Reads a result file, checks its format with ``check``, and returns its content."""
    document: dict[str, Any] = json.loads(path.read_text())
    check(document, path.name)
    return document
