"""Stage "logits": compares the time, bandwidth and memory of ``mpo_loss`` with other libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import logits
from benchmarks.gpu.session import GpuStage
from benchmarks.losses import reason_of
from benchmarks.measure import Run, Timing, gpu_peak_bytes, interleaved, nothing
from mpo_ext import mpo_loss, token_logp
from mpo_ext.plan.roofline import LossShape

PROVIDERS = (
    "mpo_ext, cuda", "mpo_ext, triton", "mpo_ext, all statistics", "mpo_ext, reuse_logits", "eager", "torch.compile",
    "Liger cross entropy", "TRL selective_log_softmax", "quack cross entropy",
)  # fmt: skip
DRY_PROVIDERS = ("mpo_ext", "mpo_ext, reuse_logits", "eager", "quack cross entropy")
SHAPES = (
    LossShape(tokens=4096, vocab=151_936),
    LossShape(tokens=4096, vocab=151_936, share=0.1),
    LossShape(tokens=4096, vocab=151_936, dtype="float32"),
    LossShape(tokens=4096, vocab=151_674),
    LossShape(tokens=512, vocab=151_936, pairs=8),
    LossShape(tokens=128, vocab=151_936),
)
_COPY_BYTES = 4 << 30
_RUNS, _SLOW_RUNS = 30, 8  # counted runs of ours, and of providers that pass over the logits many times
_SLOW = {"eager", "TRL selective_log_softmax"}
#: Numbers of rows, nearly all ignored, with which the fixed costs of a forward are measured.
_FIXED_ROWS = (64, 1024, 8192, 65_536)


def bytes_needed(loss: LossShape, what: str) -> int:
    """Returns the number of bytes that a pass must read and write, for any implementation.

    ``what`` is the pass: "forward", "backward" or "both". Forward and backward each read the logits of the labelled
    tokens. Backward also writes the gradient for all tokens.
    """
    row = loss.vocab * loss.size
    forward = loss.labelled * row
    backward = forward + loss.rows * row
    return {"forward": forward, "backward": backward, "both": forward + backward}[what]


def bandwidths(device: str, nbytes: int = _COPY_BYTES, runs: int = 10) -> dict[str, float]:
    """Returns the measured memory bandwidths "copy", "read" and "write" in bytes per second.

    A copy of n bytes counts as 2n bytes.
    """
    source, target = (torch.zeros(nbytes // 4, dtype=torch.float32, device=device) for _ in range(2))
    programs = {"copy": lambda: target.copy_(source), "read": source.sum, "write": target.zero_}
    timings = interleaved({name: (nothing, run) for name, run in programs.items()}, runs, device=device)
    return {name: (2 if name == "copy" else 1) * nbytes / timing.median_s for name, timing in timings.items()}


def run(stage: GpuStage) -> None:
    """Measures every implementation on every shape, then the fixed costs of mpo_ext's forward pass."""
    stage.settings |= {"bytes_per_s": bandwidths(stage.device, 1 << 20 if stage.dry else _COPY_BYTES)}
    shapes = [LossShape(tokens=8, vocab=203, share=0.5)] if stage.dry else SHAPES
    for loss in shapes:
        torch.compiler.reset()  # torch.compile gives up after eight shapes of one function
        batch = logits.LogitsBatch(loss, stage.device)
        pristine = batch.logits.clone()
        for name in DRY_PROVIDERS if stage.dry else PROVIDERS:
            measure(stage, loss, batch, pristine, name)
            batch.logits.copy_(pristine)
            stage.free()
        del batch, pristine
        stage.free()
    for rows in (8,) if stage.dry else _FIXED_ROWS:
        _measure_fixed(stage, rows)


def measure(stage: GpuStage, loss: LossShape, batch: logits.LogitsBatch, pristine: Tensor, name: str) -> None:
    """Measures an implementation's forward pass, backward pass and both together. Adds the times to the result file.

    ``pristine`` is a copy of the logits, because some implementations overwrite them.
    """
    runs = 2 if stage.dry else _SLOW_RUNS if name in _SLOW else _RUNS
    try:
        passes = _passes(logits.LOSSES[name](), batch, pristine if name in logits.OVERWRITING else None)
        prepare, both = passes["both"]
        prepare()
        both()  # compiles
        peak = None
        if not stage.dry:
            prepare()
            peak = gpu_peak_bytes(both)
        for what, case in passes.items():
            timing = interleaved({name: case}, runs, device=stage.device)[name]
            floor = bytes_needed(loss, what) / stage.settings["bytes_per_s"]["copy"]
            values = {"floor_s": floor, "share_of_floor": floor / timing.median_s}
            values["peak_bytes"] = peak if what == "both" else None
            stage.add(_case(loss, what), "measured", provider=name, loss=loss, timing=timing, **values)
    except Exception as error:  # a provider that is absent or cannot run this shape
        stage.add(_case(loss, "all passes"), "not run", reason_of(error), provider=name, loss=loss)


def _case(loss: LossShape, what: str) -> str:
    return f"{what}: [{2 * loss.pairs}, {loss.tokens}, {loss.vocab}] {loss.dtype}, {loss.share:.0%} labelled"


def _passes(loss_of: logits.LossOf, batch: logits.LogitsBatch, pristine: Tensor | None) -> dict[str, Run]:
    """Returns (prepare, run) for each of "forward", "backward" and "both". Only ``run`` is timed.

    If ``pristine`` is given, ``prepare`` copies it into the logits. For "backward", ``prepare`` also computes the
    loss.
    """
    leaf = batch.logits.detach().requires_grad_()
    losses: list[Tensor] = []
    restore: Callable[[], Any] = nothing if pristine is None else functools.partial(batch.logits.copy_, pristine)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss_of(leaf, batch)

    def prepare_backward() -> None:
        restore()
        losses.append(loss_of(leaf, batch))

    def backward() -> None:
        torch.autograd.grad(losses.pop(), leaf)

    def both() -> None:
        torch.autograd.grad(loss_of(leaf, batch), leaf)

    return {"forward": (restore, forward), "backward": (prepare_backward, backward), "both": (restore, both)}


def _measure_fixed(stage: GpuStage, rows: int) -> None:
    """Measures the fixed costs of a forward pass, with a small vocabulary, and adds them to the result file.

    Measures ``rows`` positions twice: first with labels at two positions, then with labels at all positions.
    """
    loss = LossShape(tokens=rows // 2, vocab=1024)
    values = torch.zeros(2, rows // 2, 1024, device=stage.device, dtype=torch.bfloat16)
    few = torch.full((2, rows // 2), -100, device=stage.device)
    few[:, -1] = 3
    ref_logp = torch.zeros(2, device=stage.device)
    for backend in stage.backends:
        for kind, labels in (("2 labelled", few), ("all labelled", torch.full_like(few, 3))):
            calls: dict[str, Callable[[], Any]] = {
                "mpo_loss": lambda b=backend, y=labels: mpo_loss(values, y, ref_logp, shift=False, backend=b),
                "token_logp": lambda b=backend, y=labels: token_logp(values, y, shift=False, backend=b),
            }
            calls |= {} if stage.dry else {"mpo_loss in a graph": graph_of(calls["mpo_loss"])}
            try:
                runs = {name: (nothing, call) for name, call in calls.items()}
                timings: dict[str, Timing] = interleaved(runs, 2 if stage.dry else _RUNS, device=stage.device)
            except Exception as error:
                stage.add(f"fixed: {rows} rows, {kind}", "not run", reason_of(error), provider=backend, loss=loss)
                continue
            for name, timing in timings.items():
                case = f"fixed: {rows} rows, {kind}, {name}"
                stage.add(case, "measured", provider=f"mpo_ext, {backend}", loss=loss, timing=timing)


def graph_of(call: Callable[[], Any]) -> Callable[[], None]:
    """Captures a call into a CUDA graph. Returns a function that replays the graph, without launch overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
