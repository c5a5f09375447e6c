"""Makes Markdown tables from the result files of the GPU stages. ``benchmarks.documents`` calls this module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import Documents, provider_name
from mpo_ext.report import markdown_table

_TITLES = {
    "gpu_logits": "From logits; the floor is the bytes that must be moved, at the copy bandwidth of the same run",
    "gpu_linear": "From hidden states; the floor is the bare matrix products of the same run",
    "gpu_train_step": "A training step",
    "gpu_tune": "Launch shapes (threads : blocks per multiprocessor : vectors in flight), the present one first",
}
_CHECKS = {"gpu_correct": "operators and hardware", "gpu_sanitize": "compute-sanitizer", "gpu_tests": "tests"}


def measured(documents: Documents) -> str:
    """Returns the tables of all GPU stages that have a result file, or a message if there are no results.

    The stage "ncu" has no table.
    """
    parts = [_checks(documents)] if set(_CHECKS) & set(documents) else []
    parts += [_table(documents[name], title) for name, title in _TITLES.items() if name in documents]
    return "\n\n".join(parts) or "There are no results of a GPU yet."


def _where(document: Mapping[str, Any]) -> str:
    environment, settings = document["environment"], document["settings"]
    return (
        f"{settings['gpu']}, driver {settings['driver']}, torch {environment['versions']['torch']}, commit "
        f"{environment['commit']}, {environment['started'][:10]}: `{environment['command']}`"
    )


def _checks(documents: Documents) -> str:
    rows = []
    for name, title in _CHECKS.items():
        if name in documents:
            statuses = [point["status"] for point in documents[name]["points"]]
            counts = [str(statuses.count(status)) for status in ("passed", "failed", "not run")]
            rows.append([title, *counts, _where(documents[name])])
    return markdown_table(["checks", "passed", "failed", "not run", "where"], rows)


def _table(document: Mapping[str, Any], title: str) -> str:
    rows = []
    for point in document["points"]:
        if point["status"] != "measured":
            continue
        low, high = 1e3 * point["p20_s"], 1e3 * point["p80_s"]
        share = "" if point["share_of_floor"] is None else f"{point['share_of_floor']:.0%}"
        memory = "" if point["peak_bytes"] is None else f"{point['peak_bytes'] / 2**30:.2f} GiB"
        predicted = "" if point["predicted_s"] is None else f"{1e3 * point['predicted_s']:.1f}"
        times = [f"{1e3 * point['median_s']:.3f}", f"{low:.3f} to {high:.3f}"]
        rows.append([point["sweep"], provider_name(point["provider"]), *times, share, predicted, memory])
    header = [
        "case",
        "method",
        "ms, median",
        "20th to 80th percentile",
        "floor / time",
        "ms, predicted",
        "peak memory",
    ]
    plain = str.maketrans("|<>`", "/   ")  # characters that have a meaning in Markdown
    missing = [
        f"- {point['sweep']}, {provider_name(point['provider'])}: {point['reason'].translate(plain)}"
        for point in document["points"]
        if point["status"] == "not run"
    ]
    parts = [f"{title}. {_where(document)}.", markdown_table(header, rows)]
    return "\n\n".join([*parts, "Not run:\n\n" + "\n".join(missing)] if missing else parts)
