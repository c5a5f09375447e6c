"""Rates of this machine for mpo_ext.plan.roofline: small programs that are timed beside everything else, in the same rounds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.measure import interleaved
from mpo_ext import mpo_loss
from mpo_ext.plan.machines import Machine

_WORDS = 32 << 20  # float32: four times the last-level cache of a common server
_FRESH_BYTES = 128 << 20  # a system may give small amounts back at once that were freed just before
_ROWS, _DEPTH, _COLUMNS = 256, 896, 8192  # of the matrix products
_CACHED = (2, 16, 65536)  # logits that stay in a last-level cache
_NARROW = (2, 128, 65536)  # logits in bfloat16: for each byte of them there is more to compute than to wait for
DTYPES = ("float32", "bfloat16")


def _nothing() -> None:
    pass


@functools.cache
def programs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name to ``(prepare, run)``, for ``interleaved``. What they allocate is kept.

    What is to be timed in cache runs once before, untimed: the program before it has left nothing there.
    """
    words = torch.ones(_WORDS)
    cached = torch.randn(_CACHED)
    out, grad = torch.empty_like(cached), torch.empty_like(cached)
    narrow, narrow_labels = torch.randn(_NARROW).bfloat16(), torch.randint(_NARROW[-1], _NARROW[:-1])
    small, small_labels, ref_logp = torch.randn(2, 4, 64), torch.randint(64, (2, 4)), torch.zeros(2)

    def loss(logits: torch.Tensor, labels: torch.Tensor, *, reuse: bool) -> torch.Tensor:
        logits = logits.detach().requires_grad_()
        output = mpo_loss(logits, labels, ref_logp, shift=False, reuse_logits=reuse)
        return torch.autograd.grad(output.loss, logits)[0]

    def softmax() -> None:
        torch.ops.aten._log_softmax.out(cached, -1, False, out=out)
        torch.ops.aten._log_softmax_backward_data.out(cached, out, -1, torch.float32, out=grad)

    def fresh() -> None:
        torch.empty(_FRESH_BYTES, dtype=torch.uint8).fill_(1)

    runs: dict[str, Callable[[], Any]] = {
        "read": words.sum,
        "update": lambda: words.mul_(1.0),
        "fill": lambda: words.view(torch.uint8)[:_FRESH_BYTES].fill_(0),
        "fresh": fresh,
        "kernels": lambda: loss(narrow, narrow_labels, reuse=True),
        "huge": lambda: loss(narrow, narrow_labels, reuse=False),  # to the same, into fresh memory
        "softmax": softmax,
        "overhead": lambda: loss(small, small_labels, reuse=False),
    }
    for dtype in DTYPES:
        kind = getattr(torch, dtype)
        rows, weight = torch.randn(_ROWS, _DEPTH).to(kind), torch.randn(_COLUMNS, _DEPTH).to(kind)
        product = torch.empty(_ROWS, _COLUMNS, dtype=kind)
        runs[f"product {dtype}"] = functools.partial(torch.mm, rows, weight.T, out=product)
    warm = ("kernels", "huge", "softmax", "overhead")
    return {f"machine: {name}": (run if name in warm else _nothing, run) for name, run in runs.items()}


def sample(runs: int = 5) -> dict[str, list[float]]:
    """Seconds of each program, with nothing beside it."""
    return {name: timing.seconds for name, timing in interleaved(programs(), runs).items()}


def rates(seconds: Mapping[str, Sequence[float]], name: str = "this CPU") -> Machine:
    """The machine from the seconds of its programs: medians over all of them.

    Raises:
        ValueError: If a program has not been timed.
    """
    wanted = ["read", "update", "fill", "fresh", "huge", "kernels", "softmax", "overhead"]
    for key in (*wanted, *(f"product {dtype}" for dtype in DTYPES)):
        if not seconds.get(f"machine: {key}"):
            raise ValueError(f"seconds must have 'machine: {key}', got {', '.join(seconds) or 'nothing'}")
    median = {key.removeprefix("machine: "): statistics.median(values) for key, values in seconds.items()}
    size = 4 * _WORDS
    flop = 2 * _ROWS * _DEPTH * _COLUMNS

    def beyond(fresh: str, used: str) -> float:
        """Seconds beyond those in used memory; where fresh memory is free, its size a nanosecond is the rate."""
        return max(median[fresh] - median[used], 1e-9)

    return Machine(
        name=name,
        is_gpu=False,
        bandwidth=3 * size / (median["read"] + median["update"]),
        matmul_rates={dtype: flop / median[f"product {dtype}"] for dtype in DTYPES},
        kernel_rate=math.prod(_NARROW) / max(median["kernels"] - median["overhead"], 1e-9),
        softmax_rate=math.prod(_CACHED) / median["softmax"],
        fresh=_FRESH_BYTES / beyond("fresh", "fill"),
        huge=2 * math.prod(_NARROW) / beyond("huge", "kernels"),
        overhead=median["overhead"],
        source="measured by benchmarks.machine",
    )
