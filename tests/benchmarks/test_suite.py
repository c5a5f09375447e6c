"""Tests the benchmark suite on tiny shapes.

Each implementation gets a measured time, or the reason why it was not measured. Also tests the time limit, and the
measured rates of the machine, such as the speed of matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from typing import Any

import pytest
import torch

from benchmarks import check_model, linear, logits, losses, machine, schema, suite, train_step
from benchmarks.measure import interleaved
from mpo_ext.plan import roofline as cost
from mpo_ext.plan.roofline import LossShape

TINY = LossShape(tokens=8, vocab=512, dtype="float32", share=0.5)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("benchmarks.measure._FREE_BYTES", 1 << 12)
    monkeypatch.setattr(machine, "_WORDS", 1 << 12)
    monkeypatch.setattr(machine, "_FRESH_BYTES", 1 << 14)
    monkeypatch.setattr(machine, "_COLUMNS", 64)
    monkeypatch.setattr(machine, "_CACHED", (2, 4, 64))
    monkeypatch.setattr(machine, "_NARROW", (2, 8, 64))
    monkeypatch.setattr(machine, "_ATTENTION", (1, 2, 128, 64))
    machine.programs.cache_clear()
    yield
    machine.programs.cache_clear()


def test_every_provider_becomes_a_point_with_time_or_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("no such peer")

    monkeypatch.setitem(logits.LOSSES, "quack cross entropy", broken)
    providers = ("mpo_ext", "mpo_ext, reuse_logits", "eager", "quack cross entropy", "mpo_ext, cuda")
    results = suite.Results()
    suite.run_group(logits.BENCHMARK, suite.Group("base", TINY, providers, runs=2), results, math.inf)
    found = {point["provider"]: point for point in results.points}
    assert tuple(found) == providers
    assert (
        found["quack cross entropy"]["reason"] == results.missing["quack cross entropy"] == "ImportError: no such peer"
    )
    if not torch.cuda.is_available():
        assert found["mpo_ext, cuda"]["status"] == "not run"
        assert "cuda" in results.missing["mpo_ext, cuda"]
    for name in providers[:3]:
        assert len(found[name]["seconds"]) == 2
        assert found[name]["share_of_floor"] == found[name]["floor_s"] / found[name]["median_s"]
    assert set(results.machine) == set(machine.programs())
    assert all(len(seconds) == 2 for seconds in results.machine.values())


def test_hidden_states_have_the_products_as_floor() -> None:
    loss = LossShape(tokens=8, vocab=512, hidden=16, dtype="float32", share=0.5)
    results = suite.Results()
    suite.run_group(
        linear.BENCHMARK, suite.Group("base", loss, ("mpo_ext", linear.FROZEN, "quack"), runs=2), results, math.inf
    )
    ours, frozen, absent = results.points
    assert 0 < frozen["floor_s"] < ours["floor_s"]
    assert ours["matmul_dtype"] == "float32"
    assert absent["status"] == "not run"


def test_every_case_from_hidden_states_has_run_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    loss = LossShape(tokens=8, vocab=512, hidden=16, dtype="float32")

    def ours(batch: linear.HiddenBatch, frozen: bool = False, **options: Any) -> None:
        if (frozen, options) not in calls:
            calls.append((frozen, options))

    monkeypatch.setattr(linear, "ours", ours)
    names = [*linear.OURS, *linear.SMALL]
    cases, missing = losses.usable(linear.BENCHMARK, names, loss)
    assert tuple(cases) == tuple(names)
    assert not missing
    options = [{}, {"recompute": True}, {"recompute": False}]
    assert calls == [*((False, each) for each in options), (True, {}), (False, {"memory_budget": 1 << 19})]


def test_a_provider_that_is_too_slow_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    cases, missing = losses.usable(logits.BENCHMARK, ("eager",), TINY, most_seconds=0.0)
    assert not cases
    assert missing["eager"].startswith("would take too long: ")


def test_a_provider_that_is_slow_only_on_the_whole_shape_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataclasses.replace(TINY, tokens=256, vocab=16384)
    calls: dict[str, list[int]] = {"eager": [], "torch.compile": [], "mpo_ext": []}

    def provider(name: str) -> Any:
        def run(batch: Any) -> None:
            calls[name].append(batch.logits.shape[-1])
            time.sleep(0.3 if calls[name][-1] == whole.vocab else 0)

        return lambda: run

    for name in calls:
        monkeypatch.setitem(logits.BENCHMARK.providers, name, provider(name))
    cases, missing = losses.usable(logits.BENCHMARK, ("mpo_ext", "eager", "torch.compile"), whole, most_seconds=0.2)
    assert tuple(cases) == ("mpo_ext",)
    assert missing["eager"].startswith("would take too long: 0.3 s for a run")
    assert missing["torch.compile"].startswith("not compiled")
    assert calls["torch.compile"] == []
    assert whole.vocab not in calls["mpo_ext"]


def test_groups_beyond_the_time_are_points_with_that_reason() -> None:
    groups = [suite.Group("base", TINY, ("mpo_ext",), runs=2), suite.Group("vocab", TINY, ("mpo_ext", "eager"))]
    results = suite.run_groups(logits.BENCHMARK, groups, 0.0, lambda text: None)
    assert [point["status"] for point in results.points] == ["measured", "not run", "not run"]
    assert results.points[1]["reason"] == "the 0 s of this benchmark were over"


@pytest.mark.parametrize("quick", [True, False])
def test_groups_cover_the_sweeps(quick: bool) -> None:
    groups = [*suite.logits_groups(quick=quick), *suite.linear_groups(quick=quick)]
    ids = [
        suite.point(group.sweep, name, group.loss, reason="x")["id"] for group in groups for name in group.providers
    ]
    assert len(ids) == len(set(ids))
    assert {group.sweep for group in groups} >= {"base", "vocab", "share", "tokens", "hidden"}
    if not quick:
        assert {32768, 262144} <= {group.loss.vocab for group in groups}
        assert {group.loss.pairs for group in groups} >= {1, 2, 4, 8}
        assert {group.loss.dtype for group in groups} == {"float32", "bfloat16", "float16"}
        compared = [n for g in groups for n in g.providers if check_model.is_ours(n)]
        assert len(compared) >= 30


def test_interleaved_stops_when_the_time_is_over_but_not_before_the_least() -> None:
    calls = {"x": 0}

    def run() -> None:
        calls["x"] += 1

    timing = interleaved({"x": (lambda: None, run)}, 100, seconds_in_all=0.0, least=3)
    assert len(timing["x"].seconds) == 3
    assert calls["x"] == 4
    assert len(interleaved({"x": (lambda: None, run)}, 5)["x"].seconds) == 5


def test_a_peer_that_is_absent_is_named_and_no_process_measures_its_memory(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Any:
        raise ImportError("no such peer")

    monkeypatch.setitem(linear.RIVALS, "quack", absent)
    monkeypatch.setattr(losses, "peak_bytes", lambda target, benchmark, name, *rest: {"eager": 5 << 20}[name])
    loss = LossShape(tokens=1, vocab=1, hidden=1, dtype="float32")
    measured = losses.memory_of_cases(
        linear.BENCHMARK, loss, argparse.Namespace(cases=["quack", "eager"], device="cpu")
    )
    assert measured == {"quack": "ImportError: no such peer", "eager": (5 << 20) - 4 * 2 - 4}
    printed, errors = capfd.readouterr()
    assert [line.split(maxsplit=1) for line in printed.splitlines()[3:]] == [
        ["eager", "5.0                          5.0"],
        ["quack", "not run: ImportError: no such peer"],
    ]
    assert not errors


def test_free_memory_is_touched_after_slow_cases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []
    done: list[str] = []
    monkeypatch.setattr("benchmarks.measure._SLOW_SECONDS", 0.05)
    monkeypatch.setattr("benchmarks.measure._touch_free_memory", lambda: touched.append(done[-1]))
    cases = {
        "slow": (lambda: None, lambda: (time.sleep(0.1), done.append("slow"))),
        "fast": (lambda: None, lambda: done.append("fast")),
    }
    interleaved(cases, 2)
    assert done == ["slow", "fast"] * 3
    assert touched == ["slow"] * 3


def seconds(**changes: float) -> dict[str, list[float]]:
    base = {
        "read": 1.0, "update": 2.0, "fill": 0.5, "fresh": 2.5, "huge": 3.25, "kernels": 1.25, "softmax": 4.0,
        "overhead": 0.25, "product float32": 2.0, "product bfloat16": 1.0,
    }  # fmt: skip
    return {f"machine: {name}": [9.0, value, 0.0] for name, value in {**base, **changes}.items()}


def test_rates_are_what_the_programs_do_by_their_medians() -> None:
    found = machine.rates(seconds())
    assert found.bandwidth == 3 * 4 * (1 << 12) / 3.0  # one read, one read and one write
    assert found.fresh == (1 << 14) / (2.5 - 0.5)
    assert found.huge == 2 * 2 * 8 * 64 / (3.25 - 1.25)
    assert found.kernel_rate == 2 * 8 * 64 / (1.25 - 0.25)
    assert found.softmax_rate == 2 * 4 * 64 / 4.0
    assert found.matmul_rates == {"float32": 256 * 896 * 64, "bfloat16": 2 * 256 * 896 * 64}
    assert found.overhead == 0.25


def test_attention_and_products_of_other_sizes_have_rates() -> None:
    times = {"attention plain": 2.0, "attention masked": 8.0, "product of 32": 1.0, "product of 1024": 8.0}
    found = machine.rates(seconds(**times))
    scores = 3.5 * 4 * 2 * 64 * 128**2
    assert found.attention_rates == {"plain": {"float32": scores / 4}, "masked": {"float32": scores / 8}}
    of_256 = 256 * 896 * 64
    of_32, of_1024 = 2 * 32 * 896 * 64, 2 * 1024 * 1024 * 64 / 8
    assert found.matmul_shares == {256: 1.0, 32: of_32 / of_256, 1024: of_1024 / of_256}
    assert not machine.rates(seconds()).attention_rates  # as in result files without these programs
    assert not machine.rates(seconds()).matmul_shares


def test_steps_with_long_prompts_have_the_layers_that_fit() -> None:
    groups = [group for group in suite.step_groups(quick=False) if group[0] == "prompt"]
    assert [(sizes.prompt, sizes.layers) for _, sizes, _, _ in groups] == [
        (1024, 8), (2048, 8), (4096, 8), (8192, 2)
    ]  # fmt: skip
    assert ["TRL" in names for _, _, names, _ in groups] == [True, True, False, False]
    assert all(set(names) <= set(train_step.CASES) for _, _, names, _ in groups)
    assert [group[0] for group in suite.step_groups(quick=False, prompts=(512,))][-2:] == ["image tokens", "prompt"]
    assert train_step.rates(groups[0][1], 2.0) == {"pairs_per_s": 0.5, "tokens_per_s": 1024.0}


def test_rates_need_every_program() -> None:
    some = seconds()
    del some["machine: fresh"]
    with pytest.raises(ValueError, match="seconds must have 'machine: fresh'"):
        machine.rates(some)


def test_predictions_stand_beside_what_was_measured() -> None:
    beside = {name: values[1] for name, values in seconds().items()}
    rates = machine.rates(seconds())
    points = [
        suite.point("base", "mpo_ext", TINY, seconds=[1.0], beside=beside),
        suite.point("base", "Liger cross entropy", TINY, seconds=[1.0], beside=beside),
        suite.point("vocab", "eager", TINY, reason="too slow"),
    ]
    found = check_model.compared({"logits": {"points": points}})
    assert [one["provider"] for one in found] == ["mpo_ext"]  # the model has no method for the second
    assert found[0]["predicted_s"] == cost.loss_cost("mpo_ext", TINY, rates).seconds
    assert check_model.error(found[0]) == found[0]["predicted_s"] / found[0]["median_s"] - 1
    (line,) = check_model.summary([{**found[0], "median_s": found[0]["predicted_s"] * 2}])
    assert (line["kind"], line["points"], line["within"], line["worst_error"]) == ("mpo_ext, logits", 1, 0, -0.5)


def test_the_cost_model_describes_the_model_of_the_training_step() -> None:
    from benchmarks import step_inputs

    sizes = suite.TINY
    model, step = check_model.step_inputs(sizes, precomputed=True)
    assert (model.vocab, model.width, model.layers) == (sizes.vocab, sizes.hidden, sizes.layers)
    assert (step.image_tokens, step.response, step.precomputed) == (16, 16, True)
    attention, mlp = 4 * sizes.hidden**2, 3 * 3 * sizes.hidden**2
    assert model.decoder == attention + mlp
    assert isinstance(sizes, step_inputs.Sizes)


def test_schema_takes_what_the_suite_writes() -> None:
    assert schema.VERSION == 1
    names = {f"machine: {name}" for name in ("read", "product float32", "product of 32", "attention masked")}
    assert names <= set(machine.programs())
    points = suite.machine_points({"machine: read": [1.0, 2.0]})
    assert points[0]["provider"] == "read"
