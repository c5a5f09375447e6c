"""Measures the speed of this machine, such as bytes and FLOP per second, for the cost model in mpo_ext.plan.

Small programs measure the speed. The programs alternate with the runs of the benchmarks, because other processes may
slow the machine down for a while.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import Run, interleaved, nothing
from mpo_ext import mpo_loss
from mpo_ext.plan.machines import Machine

_WORDS = 32 << 20  # float32 values: four times the last-level cache of a common server
_FRESH_BYTES = 128 << 20  # the allocator may reuse a smaller block that was freed just before
ROWS, _HIDDEN, _COLUMNS = 256, 896, 8192  # sizes of the matrix products; the smallest is ROWS
_SHORTEST = (32, 1024)  # numbers of rows of further matrix products
_ATTENTION = (1, 4, 2048, 64)  # pairs, heads, tokens and head size of the attention kernels
_CACHED = (2, 16, 65536)  # logits that stay in a last-level cache
_NARROW = (2, 128, 65536)  # logits in bfloat16: computing takes longer than reading
DTYPES = ("float32", "bfloat16")


@functools.cache
def programs() -> dict[str, Run]:
    """Returns the programs that measure the machine, as (prepare, run) functions by name. Only ``run`` is timed.

    For programs on cached data, ``prepare`` runs the program once to fill the cache.
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

    # Only these operators write both directions into preallocated memory.
    forward, backward = (getattr(torch.ops.aten, f"_log_softmax{suffix}") for suffix in ("", "_backward_data"))

    def softmax() -> None:
        forward.out(cached, -1, False, out=out)
        backward.out(cached, out, -1, torch.float32, out=grad)

    def fresh() -> None:
        torch.empty(_FRESH_BYTES, dtype=torch.uint8).fill_(1)

    runs: dict[str, Callable[[], Any]] = {
        "read": words.sum,
        "update": lambda: words.mul_(1.0),
        "fill": lambda: words.view(torch.uint8)[:_FRESH_BYTES].fill_(0),
        "fresh": fresh,
        "kernels": lambda: loss(narrow, narrow_labels, reuse=True),
        "huge": lambda: loss(narrow, narrow_labels, reuse=False),  # the same work, into fresh memory
        "softmax": softmax,
        "overhead": lambda: loss(small, small_labels, reuse=False),
    }
    for dtype in DTYPES:
        kind = getattr(torch, dtype)
        rows, weight = torch.randn(ROWS, _HIDDEN).to(kind), torch.randn(_COLUMNS, _HIDDEN).to(kind)
        product = torch.empty(ROWS, _COLUMNS, dtype=kind)
        runs[f"product {dtype}"] = functools.partial(torch.mm, rows, weight.T, out=product)
    for size in _SHORTEST:
        rows, weight = torch.randn(size, max(size, _HIDDEN)), torch.randn(_COLUMNS, max(size, _HIDDEN))
        runs[f"product of {size}"] = functools.partial(torch.mm, rows, weight.T, out=torch.empty(size, _COLUMNS))
    query = torch.randn(_ATTENTION, requires_grad=True)
    mask = torch.ones(_ATTENTION[2], _ATTENTION[2], dtype=torch.bool).tril()
    for kind, options in {"plain": {"is_causal": True}, "masked": {"attn_mask": mask}}.items():
        runs[f"attention {kind}"] = functools.partial(_attend, query, options)
    warm = ("kernels", "huge", "softmax", "overhead")
    return {f"machine: {name}": (run if name in warm else nothing, run) for name, run in runs.items()}


def _attend(query: torch.Tensor, options: dict[str, Any]) -> None:
    """Runs attention forward and backward, with ``query`` as queries, keys and values."""
    torch.autograd.grad(F.scaled_dot_product_attention(query, query, query, **options).sum(), query)


def sample(runs: int = 5) -> dict[str, list[float]]:
    """Measures ``runs`` runs of each program. Returns a dict from the name of a program to the seconds of its runs."""
    return {name: timing.seconds for name, timing in interleaved(programs(), runs).items()}


def rates(seconds: Mapping[str, Sequence[float]], name: str = "this CPU") -> Machine:
    """Returns the speed of the machine.

    ``seconds`` maps the name of each measuring program to the seconds of its runs. Two groups of programs may be
    missing, because old result files lack them: attention, and matmuls with 32 or 1,024 rows. The result then lacks
    their speeds.

    Raises:
        ValueError: If another program is missing.
    """
    wanted = ["read", "update", "fill", "fresh", "huge", "kernels", "softmax", "overhead"]
    for key in (*wanted, *(f"product {dtype}" for dtype in DTYPES)):
        if not seconds.get(f"machine: {key}"):
            raise ValueError(f"seconds must have 'machine: {key}', got {', '.join(seconds) or 'nothing'}")
    median = {key.removeprefix("machine: "): statistics.median(values) for key, values in seconds.items()}
    size = 4 * _WORDS
    flop = 2 * ROWS * _HIDDEN * _COLUMNS

    def beyond(fresh: str, used: str) -> float:
        return max(median[fresh] - median[used], 1e-9)

    of_256 = flop / median["product float32"]
    shares = {ROWS: 1.0}
    for shortest in _SHORTEST:
        if f"product of {shortest}" in median:
            work = 2 * shortest * max(shortest, _HIDDEN) * _COLUMNS
            shares[shortest] = work / median[f"product of {shortest}"] / of_256
    pairs, heads, tokens, head_size = _ATTENTION
    scores = 3.5 * 4 * pairs * heads * head_size * tokens**2  # five products in backward, two in forward
    attention = {
        kind: {"float32": scores * part / median[f"attention {kind}"]}
        for kind, part in {"plain": 0.5, "masked": 1.0}.items()
        if f"attention {kind}" in median
    }
    return Machine(
        name=name,
        is_gpu=False,
        bandwidth=3 * size / (median["read"] + median["update"]),
        matmul_rates={dtype: flop / median[f"product {dtype}"] for dtype in DTYPES},
        matmul_shares=shares if len(shares) > 1 else {},
        attention_rates=attention,
        kernel_rate=math.prod(_NARROW) / max(median["kernels"] - median["overhead"], 1e-9),
        softmax_rate=math.prod(_CACHED) / median["softmax"],
        fresh=_FRESH_BYTES / beyond("fresh", "fill"),
        huge=2 * math.prod(_NARROW) / beyond("huge", "kernels"),
        overhead=median["overhead"],
        source="measured by benchmarks.machine",
    )
