"""Predictions of mpo_ext.plan.roofline beside what was measured: every measured point that the model has a method for."""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, train_step
from benchmarks.suite import middle
from mpo_ext.plan import machines
from mpo_ext.plan import roofline as cost

WITHIN = 0.25


def is_ours(provider: str) -> bool:
    """Whether a provider is this package."""
    return provider.startswith("mpo_ext")


def compared(documents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The measured points with predictions, as points of the cost model's file.

    Each is predicted with the rates that the machine had in the same rounds, since others may use the machine too.

    Args:
        documents: Result files by benchmark.
    """
    found = []
    for benchmark in ("logits", "linear", "train_step"):
        for point in documents.get(benchmark, {"points": ()})["points"]:
            if point["status"] != "measured" or point.get("median_s") is None:
                continue
            beside = machine.rates({name: [seconds] for name, seconds in point["beside"].items()})
            predicted = _predict(benchmark, point, beside)
            if predicted is not None:
                kept = {key: point[key] for key in _KEPT if key in point}
                found.append(
                    {**kept, "id": f"{benchmark}: {point['id']}", "benchmark": benchmark}
                    | {"predicted_s": predicted.seconds, "predicted_bytes": predicted.memory}
                )
    return found


_KEPT = (
    "sweep", "provider", "dtype", "pairs", "tokens", "vocab", "hidden", "share", "status", "reason", "seconds",
    "median_s", "peak_bytes",
)  # fmt: skip


def _predict(benchmark: str, point: Mapping[str, Any], rates: machines.Machine) -> cost.Cost | None:
    provider = point["provider"]
    if benchmark == "train_step":
        sizes = train_step.Sizes(**{key: point[key] for key in train_step.Sizes.__dataclass_fields__})
        trainer = provider.removesuffix(", precomputed")
        if trainer not in cost.STEPS:
            return None
        model, step = step_inputs(sizes, precomputed=trainer != provider)
        return cost.step_cost(trainer, model, step, rates)
    if provider not in (cost.LOGITS if benchmark == "logits" else cost.LINEAR):
        return None
    shape = {key: point[key] for key in ("dtype", "pairs", "tokens", "vocab", "hidden", "share")}
    return cost.loss_cost(provider, cost.LossShape(**shape, matmul_dtype=point.get("product")), rates)


@functools.cache
def step_inputs(sizes: train_step.Sizes, *, precomputed: bool) -> tuple[cost.ModelShape, cost.StepShape]:
    """The model and the step of ``benchmarks.train_step`` as the cost model takes them."""
    from mpo_ext.plan.memory import MemoryEstimate

    with torch.device("meta"):
        model, _ = train_step.build(sizes)
    with tempfile.TemporaryDirectory() as folder:
        recipe = train_step.make_recipe(Path(folder), Path("pairs.jsonl"), sizes, 1, {})
    estimate = MemoryEstimate(recipe, model, "shared", 1)
    step = cost.StepShape(
        prompt=sizes.images * sizes.image_tokens + sizes.text + 8,
        response=(sizes.response + sizes.least_response) // 2,
        pairs=sizes.micro_batch,
        micro_batches=sizes.batch // sizes.micro_batch,
        image_tokens=sizes.images * sizes.image_tokens,
        patches=4,
        image_size=4 * sizes.image_tokens,
        precomputed=precomputed,
    )
    return estimate.cost_model(), step


def error(point: Mapping[str, Any], what: str = "s") -> float:
    """Predicted by measured, less 1."""
    measured = point["median_s"] if what == "s" else point["peak_bytes"]
    return point[f"predicted_{'s' if what == 's' else 'bytes'}"] / measured - 1


def summary(points: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields for each kind of points: how many, how many within ``WITHIN``, median and largest error, memory too."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        who = "mpo_ext" if is_ours(point["provider"]) else "peers"
        kinds.setdefault(f"{who}, {point['benchmark'].replace('_', ' ')}", []).append(point)
    for kind, some in sorted(kinds.items()):
        errors = [error(point) for point in some]
        memory = [
            error(point, "bytes") for point in some if point.get("peak_bytes", 0) and point["peak_bytes"] > 1 << 20
        ]
        yield {
            "kind": kind,
            "points": len(errors),
            "within": sum(abs(one) <= WITHIN for one in errors),
            "median_error": statistics.median(map(abs, errors)),
            "worst_error": max(errors, key=abs),
            "memory_points": len(memory),
            "memory_within": sum(abs(one) <= WITHIN for one in memory),
            "memory_median_error": middle([abs(one) for one in memory]) if memory else None,
        }
