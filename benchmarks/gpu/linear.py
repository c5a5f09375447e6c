"""Stage "linear": measures ``linear_mpo_loss``, the losses of other libraries, and a lower bound of their time.

The lower bound is the time of three matmuls. They compute the logits, the gradient of the hidden states, and the
gradient of the head. The stage also measures ``linear_mpo_loss`` with several memory budgets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import linear
from benchmarks.gpu.session import GpuStage
from benchmarks.losses import peak_of, reason_of
from benchmarks.measure import Timing, interleaved, nothing
from mpo_ext.plan import machines
from mpo_ext.plan.roofline import LINEAR, LossShape, loss_cost

LOSS = LossShape(tokens=4096, vocab=151_936, hidden=4096)
_DRY_LOSS = LossShape(tokens=8, vocab=211, hidden=16)
PROVIDERS = (*linear.OURS, *linear.OURS_ON_GPU, *linear.RIVALS, *linear.GPU_RIVALS)
_DRY_PROVIDERS = ("mpo_ext", "mpo_ext, recompute=False", linear.FROZEN, "trl ChunkedLogProb", "cut-cross-entropy")
_BUDGETS = (64, 128, 256, 512, 1024, 2048)  # MiB
_RUNS, _BUDGET_RUNS = 7, 3


def run(stage: GpuStage) -> None:
    """Measures matmuls, implementations of the loss, and several memory budgets of ``linear_mpo_loss``.

    The matmuls and the implementations are measured twice: with 100 % and with 10 % of the positions labelled. The
    memory budgets are measured with all positions labelled.
    """
    whole = _DRY_LOSS if stage.dry else LOSS
    for share in (1.0, 0.1):
        loss = dataclasses.replace(whole, share=share)
        floors = _measure_products(stage, loss)
        for name in _DRY_PROVIDERS if stage.dry else PROVIDERS:
            _measure(stage, loss, name, linear.provider, floors)
            stage.free()
    for mebibytes in _BUDGETS[:1] if stage.dry else _BUDGETS:
        for recompute in (True, False):
            options = {"recompute": recompute, "memory_budget": mebibytes << 20}
            name = f"mpo_ext, recompute={recompute}, {mebibytes} MiB"
            provider = functools.partial(linear.ours, **options)
            _measure(stage, whole, name, lambda _, provider=provider: provider, {}, sweep="memory budget")
            stage.free()


def _measure_products(stage: GpuStage, loss: LossShape) -> dict[str, float]:
    """Measures each matmul that the loss needs, one at a time.

    On a GPU, also measures matmuls with a part (tile) of the vocabulary.

    Returns a dict from the name of each matmul to its median seconds.
    """
    batch = linear.HiddenBatch(loss, stage.device)
    programs = linear.BENCHMARK.floor_runs(batch)
    if not stage.dry:
        programs |= _tile_programs(batch)
    medians = {}
    for name, program in programs.items():
        try:
            timing = interleaved({name: (nothing, program)}, 2 if stage.dry else _RUNS, device=stage.device)[name]
        except Exception as error:  # an overload that this torch lacks
            stage.add(f"products, {loss.share:.0%} labelled", "not run", reason_of(error), provider=name, loss=loss)
            continue
        medians[name] = timing.median_s
        stage.add(f"products, {loss.share:.0%} labelled", "measured", provider=name, loss=loss, timing=timing)
    return medians


def _tile_programs(batch: linear.HiddenBatch) -> dict[str, Callable[[], Any]]:
    """Returns a dict from name to function. Each function runs one matmul on a part (tile) of the vocabulary."""
    rows = batch.hidden.flatten(0, 1)[batch.labels.flatten() != -100]
    total = torch.zeros(rows.shape, device=rows.device)
    programs: dict[str, Callable[[], Any]] = {}
    for width in (2304, 2560, 4096, 8192, 8448):
        head, tile = batch.weight[:width], torch.empty(rows.shape[0], width, device=rows.device)
        grad = torch.zeros(tile.shape, dtype=rows.dtype, device=rows.device)
        d_head = torch.empty_like(head)
        programs[f"logits of a tile of {width}"] = functools.partial(
            torch.mm, rows, head.T, out_dtype=torch.float32, out=tile
        )
        programs[f"d hidden of a tile of {width}, added"] = functools.partial(
            torch.addmm, total, grad, head, out_dtype=torch.float32, out=total
        )
        programs[f"d weight of a tile of {width}"] = functools.partial(torch.mm, grad.T, rows, out=d_head)
    return programs


def _measure(
    stage: GpuStage,
    loss: LossShape,
    name: str,
    make: Callable[[str], Any],
    floors: dict[str, float],
    sweep: str = "forward and backward",
) -> None:
    """Measures the time and memory of an implementation of the loss, and adds them to the result file.

    ``make(name)`` returns the implementation. ``floors`` maps the name of each matmul of the loss to its median
    seconds. ``sweep`` is the beginning of the case's name in the result file.
    """
    case = f"{sweep}, {loss.share:.0%} labelled"
    torch.compiler.reset()
    try:
        run = make(name)
        case_of_batch = functools.partial(run, linear.HiddenBatch(loss, stage.device))
        case_of_batch()
        runs = 2 if stage.dry else _RUNS if floors else _BUDGET_RUNS
        timing = interleaved({name: (nothing, case_of_batch)}, runs, device=stage.device)[name]
        del case_of_batch
        peak = None if stage.dry else peak_of(linear.BENCHMARK, name, run, loss, stage.device)
    except Exception as error:  # a library that is absent, or out of memory
        stage.add(case, "not run", reason_of(error), provider=name, loss=loss)
        return
    values = _comparison(name, loss, floors, timing, stage)
    stage.add(case, "measured", provider=name, loss=loss, timing=timing, peak_bytes=peak, **values)


def _comparison(
    name: str, loss: LossShape, floors: dict[str, float], timing: Timing, stage: GpuStage
) -> dict[str, float]:
    values = {}
    if {"mm forward", "mm d hidden", "mm d weight"} <= set(floors):
        floor = linear.BENCHMARK.floor_seconds(name, floors)
        values = {"floor_s": floor, "share_of_floor": floor / timing.median_s}
    gpu = next((key for key in machines.GPUS if key in stage.settings.get("gpu", "")), None)
    if gpu is not None and name in LINEAR:
        cost = loss_cost(name, loss, machines.gpu(gpu))
        values |= {"predicted_s": cost.seconds, "predicted_bytes": cost.memory}
    return values
