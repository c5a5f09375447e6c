"""Tests the validation of the result files' format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import schema, suite
from benchmarks.measure import provenance
from mpo_ext.plan.roofline import LossShape


def make() -> dict[str, Any]:
    loss = LossShape(tokens=4, vocab=64, dtype="float32")
    return {
        "schema": schema.VERSION,
        "benchmark": "logits",
        "quick": True,
        "environment": provenance("python -m benchmarks --quick", "2026-01-01T00:00:00+00:00", (0.5, 0.5, 0.5)),
        "settings": {},
        "missing": {"quack": "ModuleNotFoundError: No module named 'quack'"},
        "points": [
            suite.point("base", "mpo_ext", loss, seconds=[3.0, 1.0, 2.0], peak_bytes=7),
            suite.point("base", "quack", loss, reason="ModuleNotFoundError"),
        ],
    }


def test_a_point_has_the_median_of_its_runs_and_its_shape() -> None:
    measured, absent = make()["points"]
    assert (measured["median_s"], measured["p20_s"], measured["p80_s"]) == (2.0, 1.0, 3.0)
    assert (measured["tokens"], measured["vocab"], measured["hidden"], measured["status"]) == (4, 64, None, "measured")
    assert (absent["status"], absent["reason"]) == ("not run", "ModuleNotFoundError")
    assert measured["id"] == "base/mpo_ext/dtype=float32/pairs=1/tokens=4/vocab=64/share=1.0"


def test_provenance_has_hardware_versions_commit_command_and_load() -> None:
    one = make()["environment"]
    assert one["versions"]["torch"] != "not installed"
    assert one["versions"]["quack-kernels"]
    assert one["cores"] >= 1
    assert one["memory_bytes"] > 1 << 28
    assert one["load_before"] == [0.5, 0.5, 0.5]
    assert len(one["load_after"]) == 3
    assert one["commit"]


def test_a_good_file_passes() -> None:
    schema.check(make(), "x")


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("break_it", "where"),
    [
        (change("schema", to=2), "schema"),
        (change("benchmark", to="speed"), "benchmark"),
        (change("quick", to=1), "quick"),
        (change("extra", to=1), "the file"),
        (lambda document: document.pop("missing"), "the file"),
        (lambda document: document["environment"].pop("load_before"), "environment"),
        (change("environment", "commit", to=""), "environment.commit"),
        (change("environment", "versions", to={}), "environment.versions"),
        (change("environment", "command", to="/home/me/python -m benchmarks"), "environment.command"),
        (change("missing", "quack", to=""), "missing"),
        (change("points", to=[]), "points"),
        (lambda document: document["points"].append(document["points"][0]), r"points\[2\].id"),
        (change("points", 0, "status", to="done"), "status"),
        (change("points", 1, "reason", to=""), "reason"),
        (lambda document: document["points"][0].pop("vocab"), "vocab"),
        (change("points", 0, "p80_s", to=float("nan")), "p80_s must be a finite number"),
        (change("points", 0, "peak_bytes", to="7"), "peak_bytes must be a finite number"),
        (change("points", 0, "median_s", to=4.0), "median_s"),
        (change("points", 0, "median_s", to=-1.0), "median_s"),
        (change("points", 0, "seconds", to=[]), "seconds"),
        (change("points", 1, "status", to="measured"), "measured with"),
    ],
)
def test_a_bad_file_is_rejected(break_it: Callable[[dict[str, Any]], Any], where: str) -> None:
    document = copy.deepcopy(make())
    break_it(document)
    with pytest.raises(ValueError, match=where):
        schema.check(document, "x.json")
