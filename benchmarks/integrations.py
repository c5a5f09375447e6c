"""Reads results/integrations.json, which ``make integrations`` writes, and makes its tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from benchmarks import schema
from benchmarks.tables import Documents
from mpo_ext.report import markdown_table

_RUN_KEYS = {"command", "date", "version", "own", "mpo", "largest_loss_difference"}
_FIGURES = {"seconds", "cpu_seconds", "peak_mib"}
_TEST_KEYS = {"versions", "passed", "skipped", "date"}
_TITLES = {
    "trl": "TRL", "llamafactory": "LLaMA-Factory", "ms-swift": "ms-swift", "axolotl": "axolotl",
    "openrlhf": "OpenRLHF", "verl": "verl", "unsloth": "Unsloth",
}  # fmt: skip


def check(document: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if ``document``, the content of results/integrations.json, has a wrong format.

    ``name`` is the file name, for messages.
    """
    if set(document) != {"schema", "runs", "tests"} or document["schema"] != 1:
        raise ValueError(f"{name}: must have schema 1, runs and tests, got {sorted(document)}")
    for title, run in document["runs"].items():
        if set(run) != _RUN_KEYS or any(set(run[kind]) != _FIGURES for kind in ("own", "mpo")):
            raise ValueError(f"{name}: run {title!r} must have {', '.join(sorted(_RUN_KEYS))}, got {sorted(run)}")
    for title, tests in document["tests"].items():
        if set(tests) != _TEST_KEYS or not tests["passed"] > 0:
            raise ValueError(f"{name}: tests {title!r} must have passed, and {sorted(_TEST_KEYS)}, got {dict(tests)}")


load = functools.partial(schema.load, check=check)


def runs(documents: Documents) -> str:
    """Returns a table of the time and memory of each trainer, with the trainer's own loss and with mpo_ext's loss.

    Without measurements, returns a sentence that says so.
    """
    rows = []
    if not documents["integrations"]["runs"]:
        return "Not measured since the last change: run `make integrations`."
    for name, run in documents["integrations"]["runs"].items():
        own, mpo = run["own"], run["mpo"]
        rows.append([
            f"{_TITLES[name.partition(' ')[0]]} {run['version']}",
            f"{own['seconds']:.1f} s",
            f"{mpo['seconds']:.1f} s",
            f"{own['seconds'] / mpo['seconds']:.1f}",
            f"{own['cpu_seconds'] / mpo['cpu_seconds']:.1f}",
            f"{own['peak_mib']:,.0f} MiB",
            f"{mpo['peak_mib']:,.0f} MiB",
            f"{mpo['peak_mib'] / own['peak_mib']:.2f}",
        ])  # fmt: skip
    header = ["trainer", "time before", "time after", "time before / after", "CPU time before / after"]
    header += ["memory before", "memory after", "memory after / before"]
    commands = dict.fromkeys(f"- `{run['command']}`" for run in documents["integrations"]["runs"].values())
    return f"{markdown_table(header, rows)}\nCommands:\n\n" + "\n".join(commands)


def tests(documents: Documents) -> str:
    """Returns a table of the integration tests: the library versions and the number of passed tests."""
    rows = []
    for entry in documents["integrations"]["tests"].values():
        titles = [f"{_TITLES.get(name, name)} {version}" for name, version in entry["versions"].items()]
        rows.append([", ".join(titles), str(entry["passed"]), entry["date"]])
    return markdown_table(["versions", "tests passed", "date"], rows)
