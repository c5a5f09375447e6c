"""Writes the figures of the result files into the documents: between two markers all text is made from the files.

A block begins with ``<!-- results: NAME -->`` and ends with ``<!-- end of results -->``, each on a line of its own.
tests/benchmarks/test_numbers.py fails where a block is not what its files say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import check_model, schema
from mpo_ext import cost
from mpo_ext.report import markdown_table

DOCUMENTS = ("README.md", "docs/performance.md")
_BLOCK = re.compile(r"^<!-- results: (\S+) -->\n(.*?)^<!-- end of results -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^\s*<!-- (?:results:|end of results)", re.MULTILINE)

Documents = Mapping[str, Mapping[str, Any]]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder, checked, by benchmark."""
    names = [name for name in schema.BENCHMARKS if (folder / f"{name}.json").exists()]
    return {name: schema.load(folder / f"{name}.json") for name in names}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields name and content of each block.

    Raises:
        ValueError: If markers do not come in pairs.
    """
    found = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(found):
        raise ValueError(f"markers must come in pairs, got {len(_MARKER.findall(text))} for {len(found)} blocks")
    yield from ((one[1], one[2]) for one in found)


def rewrite(text: str, documents: Documents) -> str:
    """The text with all its blocks made anew.

    Raises:
        ValueError: If a block has an unknown name, its file is not there, or markers do not come in pairs.
    """
    list(blocks(text))
    return _BLOCK.sub(
        lambda one: f"<!-- results: {one[1]} -->\n{render(one[1], documents)}<!-- end of results -->", text
    )


def render(name: str, documents: Documents) -> str:
    """The content of a block, which ends with a newline."""
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {name!r}")
    needed, make = BLOCKS[name]
    for one in needed:
        if one not in documents:
            raise ValueError(f"block {name!r} must have results/{one}.json, got {', '.join(documents) or 'no file'}")
    return f"\n{make(documents).strip()}\n\n"


# ---------------------------------------------------------------------------------------------------------- the blocks


def _where(document: Mapping[str, Any]) -> str:
    one = document["environment"]
    load = max(one["load_before"][0], one["load_after"][0])
    return (
        f"{one['threads']} threads of {one['cores']} x {one['cpu'].rsplit(' x ', 1)[0]}, torch "
        f"{one['versions']['torch']}, commit {one['commit']}{' with changes' if one['modified'] else ''}, "
        f"{one['started'][:10]}, load {load:.1f}, `{one['command']}`"
    )


def _base(document: Mapping[str, Any], sweep: str = "base") -> list[Mapping[str, Any]]:
    return [point for point in document["points"] if point["sweep"] == sweep]


def _time(point: Mapping[str, Any] | None) -> str:
    if point is None or point.get("median_s") is None:
        return ""
    seconds = point["median_s"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _memory(point: Mapping[str, Any] | None) -> str:
    if point is None or point.get("peak_bytes") is None:
        return ""
    return f"{max(point['peak_bytes'], 0) / 2**20:.0f} MiB"


def _of_floor(point: Mapping[str, Any] | None) -> str:
    return "" if point is None or point.get("share_of_floor") is None else f"{point['share_of_floor']:.0%}"


def _loss_table(document: Mapping[str, Any], floor: str, few: str | None) -> str:
    """A row per provider: time and share of the floor in both dtypes, with few labelled rows, and memory."""
    points = document["points"]
    base = _base(document)
    providers = list(dict.fromkeys(point["provider"] for point in base))
    measured = {(p["provider"], p["dtype"], p["sweep"], p["share"]): p for p in points if p["status"] == "measured"}
    shares = sorted({p["share"] for p in points if p["sweep"] == "share" and p["status"] == "measured"})
    share = min(shares, key=lambda one: abs(one - 0.1)) if shares else None
    header = ["", "float32", f"of {floor}", "bfloat16", f"of {floor}"]
    header += [] if share is None else [f"float32, {share:.0%} labelled"]
    header += ["memory, float32", "bfloat16"]
    rows = []
    for name in providers:
        wide, half = measured.get((name, "float32", "base", 1.0)), measured.get((name, "bfloat16", "base", 1.0))
        if wide is None and half is None:
            continue
        cells = [name, _time(wide), _of_floor(wide), _time(half), _of_floor(half)]
        cells += [] if share is None else [_time(measured.get((name, "float32", "share", share)))]
        rows.append([*cells, _memory(wide), _memory(half)])
    floors = [next((p["floor_s"] for p in base if p["dtype"] == d and p.get("floor_s")), None) for d in _TWO]
    texts = ["" if value is None else _time({"median_s": value}) for value in floors]
    rows.append(["the floor", texts[0], "", texts[1], "", *([] if share is None else [""]), "", ""])
    lines = [markdown_table(header, rows)]
    reasons = "; ".join(f"{name} ({_escape(reason)})" for name, reason in document["missing"].items())
    if reasons:
        lines.append(f"Not run: {reasons}.")
    return "\n".join(lines)


_TWO = ("float32", "bfloat16")


def _escape(text: str) -> str:
    return text.replace("|", "/").replace("<", "").replace(">", "").rstrip(".")


def _logits(documents: Documents) -> str:
    document = documents["logits"]
    one = _base(document)[0]
    return (
        f"{one['pairs']} pair, T = {one['tokens']}, V = {one['vocab']:,}, all rows labelled unless said otherwise, "
        f"forward + backward; medians of interleaved runs; memory beyond the logits, gradient included; "
        f"{_where(document)}:\n\n{_loss_table(document, 'floor', None)}"
    )


def _linear(documents: Documents) -> str:
    document = documents["linear"]
    one = _base(document)[0]
    return (
        f"{one['pairs']} pair, T = {one['tokens']}, D = {one['hidden']}, V = {one['vocab']:,}, forward + backward; "
        f"medians of interleaved runs; memory beyond hidden states and head, gradients included; the floor is the "
        f"matrix products of the labelled rows alone; {_where(document)}:\n\n{_loss_table(document, 'floor', None)}"
    )


def _steps(documents: Documents) -> str:
    document = documents["train_step"]
    points = document["points"]
    base = [point for point in points if point["sweep"].startswith("base")]
    first = next((p for p in base if p["provider"] == "TRL" and p["status"] == "measured"), None)
    rows = []
    for point in (p for p in points if p["status"] == "measured"):
        image_tokens = point["images"] * point["image_tokens"]
        faster = first["median_s"] / point["median_s"] if first and point in base else None
        rows.append([
            point["provider"], f"{image_tokens:,}", _time(point), _memory(point), f"{faster:.1f}" if faster else "",
        ])  # fmt: skip
    header = ["", "image tokens", "step", "peak memory", "times faster than TRL"]
    one = base[0]
    gaps = [
        max(abs(a - b) for a, b in zip(p["losses"], first["losses"], strict=True))
        for p in base
        if first and p["status"] == "measured" and p is not first
    ]
    lines = [
        f"V = {one['vocab']:,}, hidden size {one['hidden']}, {one['layers']} layers, responses of {one['response']} "
        f"tokens, {one['batch']} pair a step, float32; {_where(document)}:\n",
        markdown_table(header, rows),
    ]
    if gaps:
        lines.append(f"The losses of these trainers differ from TRL's by at most {max(gaps):.1e} in a step.")
    lines += [f"Not run: {name} ({_escape(reason)})." for name, reason in document["missing"].items()]
    return "\n".join(lines)


def _sampling(documents: Documents) -> str:
    document = documents["sampling"]
    rows = [
        [p["provider"], str(p.get("prompts", "")), str(p.get("new_tokens", "")), _time(p),
         f"{p['overhead_share']:.1%}" if p.get("overhead_share") is not None else ""]
        for p in document["points"] if p["status"] == "measured"
    ]  # fmt: skip
    table = markdown_table(["", "prompts", "new tokens", "time", "beyond generating"], rows)
    return f"The digits demo's model; {_where(document)}:\n\n{table}"


def _rates(documents: Documents) -> str:
    settings = documents["cost_model"]["settings"]["rates"]
    rows = [
        ["bandwidth", f"{settings['bandwidth'] / 1e9:.1f} GB/s"],
        *([f"matrix products, {d}", f"{rate / 1e9:.0f} GFLOP/s"] for d, rate in settings["products"].items()),
        ["our kernels in cache", f"{settings['kernel_rate'] / 1e9:.2f} G logits/s"],
        ["torch's log_softmax in cache", f"{settings['softmax_rate'] / 1e9:.2f} G logits/s"],
        ["page faults, small pages", f"{settings['fresh'] / 1e9:.2f} GB/s"],
        ["page faults, huge pages", f"{settings['huge'] / 1e9:.1f} GB/s"],
        ["fixed, forward and backward", f"{settings['overhead'] * 1e3:.2f} ms"],
    ]
    return f"Measured beside all groups; {_where(documents['cost_model'])}:\n\n{markdown_table(['', 'rate'], rows)}"


def _check(documents: Documents) -> str:
    points = documents["cost_model"]["points"]
    rows = []
    for one in check_model.summary(points):
        memory = "" if not one["memory_points"] else f"{one['memory_within']} of {one['memory_points']}"
        rows.append([
            one["kind"], str(one["points"]), f"{one['within']} of {one['points']}", f"{one['median_error']:.0%}",
            f"{one['worst_error']:+.0%}", memory,
        ])  # fmt: skip
    header = ["measured points", "number", "time within 25 %", "median error", "largest", "memory within 25 %"]
    outside = [p for p in points if abs(check_model.error(p)) > check_model.WITHIN]
    by_provider: dict[str, list[float]] = {}
    for point in outside:
        by_provider.setdefault(f"{point['provider']} ({point['benchmark'].replace('_', ' ')})", []).append(
            check_model.error(point)
        )
    lines = [markdown_table(header, rows)]
    if by_provider:
        texts = [f"{n}: {len(e)}, {min(e):+.0%} to {max(e):+.0%}" for n, e in sorted(by_provider.items())]
        lines.append(f"Times that miss 25 % (predicted against measured): {'; '.join(texts)}.")
    return "\n".join(lines)


def _gpu_table(loss: cost.Loss, methods: Sequence[str]) -> str:
    machines = [cost.gpu(name) for name in cost.GPUS]
    rows = []
    for method in methods:
        costs = [cost.loss_cost(method, loss, machine) for machine in machines]
        times = [f"{1e3 * one.seconds:.1f}" for one in costs]
        rows.append([method, *times, f"{costs[0].memory / 2**30:.2f} GiB"])
    return markdown_table(["ms, predicted", *cost.GPUS, "memory, predicted"], rows)


def _predicted(documents: Documents) -> str:
    base = cost.Loss(tokens=4096, vocab=151936, share=1.0)
    few = cost.Loss(tokens=4096, vocab=151936, share=0.1)
    parts = []
    for loss in (base, few):
        wide = cost.Loss(tokens=loss.tokens, vocab=loss.vocab, share=loss.share, hidden=4096)
        parts.append(f"Predicted, {loss.labelled:,} of {loss.rows:,} rows labelled, V = {loss.vocab:,}, bfloat16. "
                     f"From logits:\n\n{_gpu_table(loss, list(cost.LOGITS))}\n"
                     f"From hidden states, D = 4096:\n\n{_gpu_table(wide, list(cost.LINEAR))}")  # fmt: skip
    return "\n".join(parts)


def _sheets(documents: Documents) -> str:
    rows = [
        [name, f"{one.bandwidth / 1e12:.2f} TB/s", f"{one.products['bfloat16'] / 1e12:.0f}", one.source]
        for name, one in cost.GPUS.items()
    ]
    return markdown_table(["GPU", "peak bandwidth", "peak dense bf16 TFLOP/s", "source"], rows)


#: A block's files and how it is made.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[[Documents], str]]] = {
    "logits": (("logits",), _logits),
    "linear": (("linear",), _linear),
    "train_step": (("train_step",), _steps),
    "sampling": (("sampling",), _sampling),
    "rates": (("cost_model",), _rates),
    "cost_model": (("cost_model",), _check),
    "predicted_losses": ((), _predicted),
    "data_sheets": ((), _sheets),
}
