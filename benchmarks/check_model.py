"""Compares the times and memory that mpo_ext.plan predicts with the measurements in results/.

A measurement is called a point. It belongs to an implementation of the loss, or to a trainer.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.step_inputs import Sizes, build, make_recipe
from mpo_ext.plan import machines, steps
from mpo_ext.plan import roofline as cost

WITHIN = 0.25  # largest relative error of an accurate prediction


def is_ours(provider: str) -> bool:
    return provider.startswith("mpo_ext")


def compared(documents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the measured points of the benchmarks, each with ``predicted_s`` and ``predicted_bytes``.

    A prediction uses the machine speed that was measured together with the point. Points that the cost model cannot
    predict are left out.
    """
    points = []
    for benchmark in ("logits", "linear", "train_step"):
        for point in documents.get(benchmark, {"points": ()})["points"]:
            if point["status"] != "measured" or point.get("median_s") is None:
                continue
            beside = machine.rates({name: [seconds] for name, seconds in point["beside"].items()})
            predicted = _predict(benchmark, point, beside)
            if predicted is not None:
                copied = {key: point[key] for key in _COPIED if key in point}
                points.append(
                    {**copied, "id": f"{benchmark}: {point['id']}", "benchmark": benchmark}
                    | {"predicted_s": predicted.seconds, "predicted_bytes": predicted.memory}
                )
    return points


_COPIED = (
    "sweep", "provider", "dtype", "pairs", "tokens", "vocab", "hidden", "share", "status", "reason", "seconds",
    "median_s", "peak_bytes",
)  # fmt: skip


def _predict(benchmark: str, point: Mapping[str, Any], rates: machines.Machine) -> cost.Cost | None:
    provider = point["provider"]
    if benchmark == "train_step":
        sizes = Sizes(**{key: point[key] for key in Sizes.__dataclass_fields__})
        trainer = provider.removesuffix(", precomputed")
        if trainer not in steps.STEPS:
            return None
        model, step = step_inputs(sizes, precomputed=trainer != provider)
        return steps.step_cost(trainer, model, step, rates)
    if provider not in (cost.LOGITS if benchmark == "logits" else cost.LINEAR):
        return None
    shape = {key: point[key] for key in ("dtype", "pairs", "tokens", "vocab", "hidden", "share")}
    return cost.loss_cost(provider, cost.LossShape(**shape, matmul_dtype=point.get("matmul_dtype")), rates)


@functools.cache
def step_inputs(sizes: Sizes, *, precomputed: bool) -> tuple[steps.ModelShape, steps.StepShape]:
    """Returns the inputs of the cost model for a training step of ``benchmarks.train_step``.

    With ``precomputed``, the reference log-probs are computed before training.
    """
    from mpo_ext.plan.memory import MemoryEstimate

    with torch.device("meta"):
        model, _ = build(sizes)
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder), Path("pairs.jsonl"), sizes, 1, {})
    estimate = MemoryEstimate(recipe, model, "shared", 1)
    step = steps.StepShape(
        prompt=sizes.prompt,
        response=(sizes.response + sizes.least_response) // 2,
        pairs=sizes.micro_batch,
        micro_batches=sizes.batch // sizes.micro_batch,
        image_tokens=sizes.images * sizes.image_tokens,
        patches=4,
        image_size=4 * sizes.image_tokens,
        precomputed=precomputed,
    )
    return estimate.cost_model(), step


def error(point: Mapping[str, Any]) -> float:
    """Returns the relative error of the predicted time: predicted / measured - 1."""
    return point["predicted_s"] / point["median_s"] - 1


def memory_error(point: Mapping[str, Any]) -> float:
    """Returns the relative error of the predicted memory: predicted / measured - 1."""
    return point["predicted_bytes"] / point["peak_bytes"] - 1


def middle(values: Sequence[float]) -> float:
    """Returns the median, or NaN for an empty sequence."""
    return statistics.median(values) if values else float("nan")


def by_kind(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Groups measurements by benchmark, and separates mpo_ext from all other libraries.

    Returns (kind, measurements) tuples, sorted by kind. A kind is a text such as "mpo_ext, linear", or "peers, linear"
    for all other libraries.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        who = "mpo_ext" if is_ours(point["provider"]) else "peers"
        kinds.setdefault(f"{who}, {point['benchmark'].replace('_', ' ')}", []).append(point)
    return sorted(kinds.items())


def summary(points: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a dict of error statistics, such as ``median_error``, for each group that ``by_kind`` returns."""
    for kind, members in by_kind(points):
        errors = [error(point) for point in members]
        memory = [
            memory_error(point) for point in members if point.get("peak_bytes", 0) and point["peak_bytes"] > 1 << 20
        ]
        yield {
            "kind": kind,
            "points": len(errors),
            "within": sum(abs(e) <= WITHIN for e in errors),
            "median_error": statistics.median(map(abs, errors)),
            "worst_error": max(errors, key=abs),
            "memory_points": len(memory),
            "memory_within": sum(abs(e) <= WITHIN for e in memory),
            "memory_median_error": middle(list(map(abs, memory))) if memory else None,
        }
