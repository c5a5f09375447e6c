"""Reads and writes the results of the study: a file for each training run, and study.json for the whole study."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.study import tables
from benchmarks.study.declare import START
from benchmarks.study.settings import AnySettings
from mpo_ext import report

RESULTS = "results"  # subfolder of a seed's folder
PARTS = ("pairs", "sampling", "labels", "curve")  # fields of a starting model that ``study.json`` lists separately
_COLORS = ("C0", "C2", "C1")

Results = Mapping[tuple[int, str], Mapping[str, Any]]


def slug(name: str) -> str:
    """Returns a file name for ``name``, such as "mpo-rate-x-0.5" for "MPO, rate x 0.5"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def key_of(settings: AnySettings, row: str) -> str:
    """Returns a hash of the settings that determine a result. A saved result with another hash is out of date."""
    rows = tables.TASKS[settings.task].rows
    parts = [dataclasses.asdict(settings), dataclasses.asdict(rows[row]) if row in rows else None]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def read(out: Path, settings: AnySettings, row: str) -> dict[str, Any] | None:
    """Returns the saved result of a training run or starting model.

    Returns None if ``out`` has no result, or only a result with other settings.
    """
    path = _file(out, settings, row)
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["key"] == key_of(settings, row) else None


def save(out: Path, settings: AnySettings, row: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Completes, writes and returns the result of a training run or starting model; see ``complete_result``."""
    complete = complete_result(settings, row, result)
    path = _file(out, settings, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    measure.write_text(path, json.dumps(complete, indent=1, allow_nan=False))
    return complete


def _file(out: Path, settings: AnySettings, row: str) -> Path:
    return out / f"seed-{settings.seed}" / RESULTS / f"{slug(row)}.json"


def complete_result(settings: AnySettings, row: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a result. Adds the fields ``key``, ``seed``, ``row`` and ``commit`` if they are missing."""
    return {"key": key_of(settings, row), "seed": settings.seed, "row": row, "commit": current_commit(), **result}


@functools.cache
def current_commit() -> str:
    """Returns the short hash of the current git commit. Later calls return the result of the first call."""
    return measure.environment()["commit"]


def take_over(out: Path, document: Mapping[str, Any], settings: Mapping[int, AnySettings]) -> int:
    """Copies results of an earlier study into the folder ``out``, and returns the number of copied results.

    Failures are not copied. The results of a seed are copied only if the seed is in ``settings``. Results that ``out``
    already has are not copied. ``document`` does not record the declarations of the training runs. The caller must
    make sure that these declarations have not changed.

    Args:
        out: Folder of the study.
        document: Checked content of the earlier study's result file.
        settings: Settings by seed.

    Raises:
        ValueError: If the earlier study has other settings.
    """
    starts = {start["seed"]: start for start in document["starts"]}
    task = tables.task_of(document)
    written = 0
    ours, theirs = _shared_settings(settings), document["settings"]
    if other := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        raise ValueError(f"--results must have the settings of the study, got other {', '.join(other)}")
    for result in document["results"]:
        seed, row = result["seed"], result["row"]
        if seed not in settings or not is_measured(result):
            continue
        changed = dataclasses.replace(settings[seed], **task.starts[tables.start_of(task, row)])
        if _file(out, changed, row).exists():
            continue
        parts = {name: starts[seed].get(name, {}) for name in PARTS} if row == START else {}
        save(out, changed, row, {"commit": document["environment"]["commit"], **result, **parts})
        written += 1
    return written


def _shared_settings(settings: Mapping[int, AnySettings]) -> dict[str, Any]:
    """Returns the settings without the seed, as JSON values. The settings of all seeds differ only in the seed."""
    shared: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(next(iter(settings.values())))))
    del shared["seed"]
    return shared


def failure(reason: str) -> dict[str, str]:
    return {"status": "failed", "reason": reason}


def is_measured(result: Mapping[str, Any] | None) -> bool:
    """Returns whether a result exists and is not a failure."""
    return result is not None and result["status"] == "measured"


def document_of(
    results: Results, settings: Mapping[int, AnySettings], environment: Mapping[str, Any], quick: bool
) -> dict[str, Any]:
    """Returns the content of ``study.json``. Runs without a result get the reason "not run".

    ``results`` maps (seed, name) to the result of the training run or starting model with this name. ``settings`` maps
    each seed to its settings.
    """
    starts, listed = [], []
    name = next(iter(settings.values())).task
    task = tables.TASKS[name]
    for seed in settings:
        for row in (*task.starts, *task.rows):
            result = dict(results.get((seed, row), {"seed": seed, "row": row, **failure(tables.NOT_RUN)}))
            result.pop("key", None)
            if row == START:
                parts = {name: result.pop(name, {}) for name in PARTS}
                starts.append({"seed": seed, **parts})
            listed.append(result)
    ended, load = measure.now()
    return {
        "schema": tables.SCHEMA,
        "benchmark": "study",
        "task": name,
        "quick": quick,
        "environment": {**environment, "ended": ended, "load_after": [round(value, 2) for value in load]},
        "settings": _shared_settings(settings),
        "seconds": sum(result.get("cpu_seconds", 0.0) for result in listed),
        "seeds": list(settings),
        "starts": starts,
        "results": listed,
    }


def write_document(out: Path, document: Mapping[str, Any]) -> None:
    measure.write_text(out / "study.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    measure.write_text(out / "study.md", tables.markdown(document))


def save_plot(path: Path, document: Mapping[str, Any]) -> None:
    """Plots the mean accuracy on held-out questions, and writes the plot to ``path``. Each table has a panel.

    The whiskers show the standard deviation over the seeds.
    """
    panels = []
    for table in tables.task_of(document).tables.values():
        content = []
        for column, color in zip(tables.COLUMNS, _COLORS, strict=True):
            labels, means, errors = [], [], []
            for label, row in table.rows:
                numbers = list(tables.values(document, row, column).values())
                if numbers:
                    labels.append(label)
                    means.append(statistics.fmean(numbers))
                    errors.append(statistics.stdev(numbers) if len(numbers) > 1 else 0.0)
            if labels:
                content.append(report.Bars(column, labels, means, errors, color))
        if content:
            panels.append(report.Panel(table.title, "%, held out", "", content, is_horizontal=True))
    if panels:
        report.save_panels(path, f"The study, {len(document['seeds'])} seeds", panels)
