"""Makes Markdown tables of the cost model (machine speed, prediction errors) and of the compiled CUDA kernels.

``benchmarks.documents`` uses these tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import check_model
from benchmarks import machine as machine_rates
from benchmarks.tables import PLOTS, Documents, provider_name, where
from mpo_ext.report import markdown_table

#: Table label of each kind of attention that ``benchmarks.machine`` measures.
_ATTENTION_RATES = {
    "plain": "causal attention without a mask, counting only the needed scores",
    "masked": "attention with a dense mask, counting all scores",
}


def _new_memory(rate: float) -> str:
    """Returns a table cell such as "3.20 GB/s" for the rate of first accesses to new memory, in bytes per second."""
    is_measured = rate < 1e15  # a larger rate means that new memory took no longer than used memory
    return f"{rate / 1e9:.2f} GB/s" if is_measured else "no additional time measured"


def rates(documents: Documents) -> str:
    """Returns a table of the measured speed of the machine, such as its memory bandwidth."""
    machine = documents["cost_model"]["settings"]["rates"]
    rows = [
        ["bandwidth", f"{machine['bandwidth'] / 1e9:.1f} GB/s"],
        *(
            [f"matrix products with smallest dimension {machine_rates.ROWS}, {d}", f"{rate / 1e9:.0f} GFLOP/s"]
            for d, rate in machine["matmul_rates"].items()
        ),
        *(
            [f"{_ATTENTION_RATES.get(kind, kind)}, {d}", f"{rate / 1e9:.0f} GFLOP/s"]
            for kind, by_dtype in machine.get("attention_rates", {}).items()
            for d, rate in by_dtype.items()
        ),
        *(
            [
                f"rate of matrix products with smallest dimension {size}, relative to {machine_rates.ROWS}",
                f"{share:.0%}",
            ]
            for size, share in machine.get("matmul_shares", {}).items()
            if int(size) != machine_rates.ROWS
        ),
        [
            "kernels of mpo_ext on data in cache, forward and backward",
            f"{machine['kernel_rate'] / 1e9:.2f} G logits/s",
        ],
        [
            "torch's log_softmax on data in cache, forward and backward",
            f"{machine['softmax_rate'] / 1e9:.2f} G logits/s",
        ],
        ["first access to new memory, small pages", _new_memory(machine["fresh"])],
        ["first access to new memory, huge pages", _new_memory(machine["huge"])],
        ["fixed time of a call, forward and backward", f"{machine['overhead'] * 1e3:.2f} ms"],
    ]
    return f"{where(documents['cost_model'])}\n\n{markdown_table(['quantity, median over the run', 'rate'], rows)}"


def _error_range(errors: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{error:+.1%}" for error in (min(errors), max(errors))))


def cost_model(documents: Documents) -> str:
    """Returns two tables of the cost model: the prediction errors, and the methods with large errors."""
    points = documents["cost_model"]["points"]
    within, errors = check_model.WITHIN, [abs(check_model.error(p)) for p in points]
    ours = [abs(check_model.error(p)) for p in points if check_model.is_ours(p["provider"])]
    rows = []
    for kind in check_model.summary(points):
        memory = "" if not kind["memory_points"] else f"{kind['memory_within']} of {kind['memory_points']}"
        name = kind["kind"].replace("peers", "other programs")
        rows.append([
            name, str(kind["points"]), f"{kind['within']} of {kind['points']}", f"{kind['median_error']:.0%}",
            f"{kind['worst_error']:+.1%}", memory,
        ])  # fmt: skip
    header = ["program, benchmark", "points", f"time within {within:.0%}", "median error", "largest error"]
    header.append(f"memory within {within:.0%}")
    missed: dict[tuple[str, str], list[float]] = {}
    for point in points:
        if abs(check_model.error(point)) > within:
            key = provider_name(point["provider"]), point["benchmark"].replace("_", " ")
            missed.setdefault(key, []).append(check_model.error(point))
    lines = [
        f"The predicted time is within {within:.0%} of the measured time for {sum(e <= within for e in errors)} of "
        f"{len(points)} points. For mpo_ext alone, this holds for {sum(e <= within for e in ours)} of {len(ours)} "
        f"points, and the median error is {check_model.middle(ours):.0%}. {where(documents['cost_model'])}\n",
        markdown_table(header, rows),
        f"![Predicted against measured times]({PLOTS.name}/cost-model.png)\n",
    ]
    if missed:
        rows = [[*key, str(len(errors)), _error_range(errors)] for key, errors in sorted(missed.items())]
        lines.append(f"These points have an error above {within:.0%}. The error is predicted / measured time - 1.\n")
        lines.append(markdown_table(["method", "benchmark", "points", "error"], rows))
    return "\n".join(lines)


def _counted(documents: Documents) -> str:
    code = documents["machine_code"]
    return f"Counted in the code of {code['compiler']}, {code['date']}, by `{code['command']}`"


def _kernel_label(name: str) -> str:
    """Returns a table label such as "token_logp, bfloat16, with statistics" for "token_logp bfloat16 stats"."""
    kernel, _, types = name.partition(" ")
    additions = [text for word, text in {"stats": "statistics", "pair": "pair loss"}.items() if word in types.split()]
    types = types.removesuffix(" pair").removesuffix(" stats")
    return ", ".join(filter(None, (f"`{kernel}`", types, f"with {' and '.join(additions)}" if additions else "")))


def instruction_counts(documents: Documents) -> str:
    """Returns a table of the instructions per logit in the main loops of ``token_logp`` and ``logits_grad``."""
    archs = documents["machine_code"]["instructions"]
    rows = []
    for kernel in ("token_logp", "token_logp stats", "logits_grad"):
        base, _, stats = kernel.partition(" ")
        for dtype in ("bfloat16", "float32"):
            name = " ".join(filter(None, (base, dtype, stats)))
            rows.append([_kernel_label(name), *(f"{counts[name]['per_logit']:.1f}" for counts in archs.values())])
    return f"{_counted(documents)}:\n\n{markdown_table(['instructions per logit', *archs], rows)}"


def registers(documents: Documents) -> str:
    """Returns a table of the registers per thread of each CUDA kernel, without the kernels for float16."""
    table = documents["machine_code"]["registers"]
    archs = list(next(iter(table.values())))
    rows = [
        [_kernel_label(name), *(str(used[arch]) for arch in archs)]
        for name, used in table.items()
        if " float16" not in name
    ]
    return f"{_counted(documents)}:\n\n{markdown_table(['registers per thread', *archs], rows)}"
