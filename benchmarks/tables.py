"""Makes Markdown tables of the measured results in results/, for ``benchmarks.documents``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import check_model, step_inputs, train_step
from mpo_ext.report import markdown_table

PLOTS = Path("docs/plots")

Document = Mapping[str, Any]
Documents = Mapping[str, Document]
Point = Mapping[str, Any]

_DTYPES = ("float32", "bfloat16")

#: Table labels of the providers whose label differs from the name.
_NAMES = {
    "mpo_ext, reuse_logits": "mpo_ext, `reuse_logits=True`",
    "mpo_ext, all statistics": 'mpo_ext, `stats=("entropy", "mean_logit", "top1")`',
    "mpo_ext, recompute=False": "mpo_ext, `recompute=False`",
    "mpo_ext, recompute=True": "mpo_ext, `recompute=True`",
    "mpo_ext, memory_budget of 512 KiB": "mpo_ext, `memory_budget=2**19`",
    "mpo_ext, from logits, reuse_logits": "mpo_ext, from logits, `reuse_logits=True`",
    "eager": "the same loss in eager torch",
    "torch.compile": "the same loss under torch.compile",
    "TRL selective_log_softmax": "TRL's `selective_log_softmax`",
    "trl ChunkedLogProb": "TRL's `ChunkedLogProb`",
    "Liger cross entropy": "Liger's cross entropy",
    "liger chunked DPO": "Liger's chunked DPO",
    "quack cross entropy": "quack's cross entropy",
    "quack": "quack's cross entropy",
    "F.linear_cross_entropy": "`F.linear_cross_entropy`",
    "cut-cross-entropy torch_compile": "cut-cross-entropy (its torch_compile)",
    "TRL": "TRL's DPOTrainer",
    "TRL, precomputed": "TRL's DPOTrainer, precomputed reference",
    "TRL, torch_compile": "TRL's DPOTrainer, `torch_compile`",
    "mpo_ext, precomputed": "mpo_ext, precomputed reference",
}


def provider_name(provider: str) -> str:
    return _NAMES.get(provider, provider)


# ------------------------------------------------------------------------------------------------------------- cells


def _plain(text: str) -> str:
    """Returns the first sentence of a text, without characters that are special in Markdown."""
    return text.partition(". ")[0].translate(str.maketrans("|", "/", "<>`")).rstrip(".")


def _cpu(document: Document) -> str:
    environment = document["environment"]
    count = environment["threads"]
    threads = "1 thread" if count == 1 else f"{count} threads"
    time = ", in CPU time" if "--cpu-time" in environment["command"].split() else ""
    return f"{threads} of {environment['cpu'].rsplit(' x ', 1)[0]} ({environment['cores']} cores){time}"


def where(document: Document) -> str:
    """Returns a sentence with the machine, versions, date, load and command of a benchmark run."""
    environment = document["environment"]
    load = max(environment["load_before"][0], environment["load_after"][0])
    return (
        f"Measured on {_cpu(document)}, torch {environment['versions']['torch']}, commit {environment['commit']}"
        f"{' with uncommitted changes' if environment['modified'] else ''}, {environment['started'][:10]}, load "
        f"average at most {load:.1f}: `{environment['command']}`."
    )


def _where_short(document: Document) -> str:
    environment = document["environment"]
    return (
        f"{_cpu(document)}, torch {environment['versions']['torch']}, {environment['started'][:10]}, "
        f"`{environment['command']}`"
    )


def _missing(document: Document) -> str:
    measured = {point["provider"] for point in document["points"] if point["status"] == "measured"}
    reasons = [
        f"- {provider_name(name)}: {_plain(reason)}"
        for name, reason in document["missing"].items()
        if name not in measured
    ]
    return "\n".join(["Not run:", "", *reasons]) if reasons else ""


def _measured(document: Document, sweep: str | None = None) -> list[Point]:
    points = document["points"]
    return [p for p in points if p["status"] == "measured" and (sweep is None or p["sweep"] == sweep)]


def _find(points: Sequence[Point], **values: Any) -> Point | None:
    return next((p for p in points if all(p.get(key) == value for key, value in values.items())), None)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds:.3f} s"


def _time(point: Point | None) -> str:
    return "" if point is None else _seconds(point.get("median_s"))


def _spread(point: Point | None) -> str:
    if point is None or point.get("p20_s") is None:
        return ""
    return f"{_seconds(point['p20_s'])} to {_seconds(point['p80_s'])}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{max(size, 0) / 2**20:,.0f} MiB"


def _beyond(point: Point | None) -> float | None:
    """Returns the peak bytes of a loss without its inputs; None if memory was not measured.

    If the loss takes hidden states, the bytes of the returned gradients are subtracted, too. If the loss takes logits,
    the bytes of the returned gradient are included.
    """
    if point is None or point.get("peak_bytes") is None:
        return None
    if point.get("hidden") is None:
        return point["peak_bytes"]
    rows = 2 * point["pairs"] * point["tokens"]
    has_head = point["provider"] != "mpo_ext, frozen head"
    width = 4 if point["dtype"] == "float32" else 2
    return point["peak_bytes"] - width * point["hidden"] * (rows + point["vocab"] * has_head)


def _of_floor(point: Point | None) -> str:
    return "" if point is None or point.get("share_of_floor") is None else f"{point['share_of_floor']:.0%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table without the columns that have no value."""
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return markdown_table([header[column] for column in used], [[row[column] for column in used] for row in rows])


# ------------------------------------------------------------------------------------------- logits and hidden states

_FLOORS = {
    "logits": "only reading the logits twice and writing them once, in torch",
    "linear": "only the three matrix products, in torch",
}
_MEMORY = {
    "logits": "Memory is the peak in addition to the logits. It includes the gradient of the logits, which overwrites "
    "them with `reuse_logits=True`.",
    "linear": "Memory is the peak in addition to hidden states, head and their gradients.",
}
_AXES = {"vocab": "V", "tokens": "T", "share": "labelled", "pairs": "B", "hidden": "D", "dtype": "float16"}


def _shape(name: str, document: Document) -> str:
    point = document["points"][0]
    hidden_size = f"D = {point['hidden']}, " if name == "linear" else ""
    pairs = "One pair" if point["pairs"] == 1 else f"{point['pairs']} pairs"
    return (
        f"{pairs}, T = {point['tokens']}, {hidden_size}V = {point['vocab']:,}, forward + backward. Every token "
        "position is labelled unless the column says otherwise"
    )


def _loss_rows(name: str, document: Document, *, is_short: bool) -> str:
    """Returns the main table of a loss benchmark: times and memory of each implementation on the base shape.

    The last row is the floor, a lower bound of the time. ``is_short`` selects fewer columns, for the README.
    """
    base, swept = _measured(document, "base"), _measured(document, "share")
    few = min({p["share"] for p in swept}, key=lambda share: abs(share - 0.1), default=None)
    at_few = [p for p in swept if p["share"] == few]
    share = [] if few is None else [f"float32, {few:.0%} labelled"]
    if is_short:
        header = ["method", *_DTYPES, *share, "memory, float32"]
    else:
        header = ["method", "float32", "20th to 80th percentile", "floor / time", "bfloat16", "floor / time", *share]
        header += [f"memory, {dtype}" for dtype in _DTYPES]
    rows = []
    for provider in dict.fromkeys(p["provider"] for p in base):
        if is_short and provider == "mpo_ext, all statistics":
            continue
        wide, half = (_find(base, provider=provider, dtype=dtype) for dtype in _DTYPES)
        cells = [_time(wide), _time(half)]
        if not is_short:
            cells = [_time(wide), _spread(wide), _of_floor(wide), _time(half), _of_floor(half)]
        cells += [] if few is None else [_time(_find(at_few, provider=provider, dtype="float32"))]
        cells += [_mib(_beyond(wide))] if is_short else [_mib(_beyond(wide)), _mib(_beyond(half))]
        rows.append([provider_name(provider), *cells])
    floors = [_seconds(max((p["floor_s"] for p in base if p["dtype"] == d), default=None)) for d in _DTYPES]
    floor = [*floors] if is_short else [floors[0], "", "", floors[1], ""]
    at_few = [p for p in at_few if p["dtype"] == "float32"]
    floor += [] if few is None else [_seconds(max((p["floor_s"] for p in at_few), default=None))]
    rows.append([_FLOORS[name], *floor, *([""] if is_short else ["", ""])])
    return _table(header, rows)


def full_table(name: str, documents: Documents) -> str:
    """Returns the full table of the benchmark ``name``, which is "logits" or "linear"."""
    document = documents[name]
    return "\n".join([
        f"{where(document)}\n",
        f"{_shape(name, document)}. Times are medians. {_MEMORY[name]}\n",
        _loss_rows(name, document, is_short=False),
        _missing(document),
    ])  # fmt: skip


def sweeps(name: str, documents: Documents) -> str:
    """Returns a table of times and a link to the plot of these times.

    The table covers all measured shapes except the base shape. It has a column for each of mpo_ext's methods and for
    eager torch.
    """
    document = documents[name]
    points = [p for p in _measured(document) if p["sweep"] in _AXES]
    providers = [p for p in dict.fromkeys(p["provider"] for p in points) if check_model.is_ours(p) or p == "eager"]
    header = ["varied", "B", "T", *(["D"] if name == "linear" else []), "V", "labelled", "dtype"]
    rows = []
    keys = ("sweep", "pairs", "tokens", "hidden", "vocab", "share", "dtype")
    for shape in dict.fromkeys(tuple(p[key] for key in keys) for p in points):
        sweep, pairs, tokens, hidden, vocab, share, dtype = shape
        of_shape = [p for p in points if tuple(p[key] for key in keys) == shape]
        hidden_size = [str(hidden)] if name == "linear" else []
        cells = [_AXES[sweep], str(pairs), str(tokens), *hidden_size, f"{vocab:,}", f"{share:.0%}", dtype]
        rows.append([*cells, *(_time(_find(of_shape, provider=p)) for p in providers)])
    title = "From logits" if name == "logits" else "From hidden states"
    lines = []
    if rows:
        lines = [
            f"![{title}: measured time against the sizes]({PLOTS.name}/{name}-scaling.png)\n",
            "The same run also measured other shapes (forward + backward):\n",
            markdown_table([*header, *map(provider_name, providers)], rows),
        ]
    late = sum(p["status"] != "measured" and "were over" in p["reason"] for p in document["points"])
    lines += [f"The run reached its time limit before {late} further measurements."] if late else []
    return "\n".join(lines)


def readme_logits(documents: Documents) -> str:
    """Returns the README's benchmark table of the loss that takes logits."""
    document = documents["logits"]
    return (
        f"{_shape('logits', document)}. Medians of interleaved runs on {_where_short(document)}. "
        f"{_MEMORY['logits']}\n\n{_loss_rows('logits', document, is_short=True)}"
    )


# ---------------------------------------------------------------------------------------- training steps and sampling


def _base_steps(document: Document) -> tuple[list[Point], Point | None]:
    """Returns the measurements of training steps on the base sizes, and the measurement of TRL (or None)."""
    base = [point for point in _measured(document) if point["sweep"].startswith("base")]
    return base, _find(base, provider="TRL")


def _faster(point: Point, trl: Point | None) -> str:
    return "" if trl is None or point is trl else f"{trl['median_s'] / point['median_s']:.1f} times faster"


def _step_shape(document: Document) -> str:
    point = document["points"][0]
    return (
        f"A small InternVL, V = {point['vocab']:,}, hidden size {point['hidden']}, {point['layers']} layers, "
        f"{point['images'] * point['image_tokens']:,} image tokens, responses of {point['response']} tokens, "
        f"{point['batch']} pair per step, float32"
    )


def _loss_gap(base: Sequence[Point], trl: Point | None, names: str) -> str:
    """Returns a sentence with the largest difference between the losses of mpo_ext and TRL at the same step.

    ``names`` is the subject and verb of the sentence, such as "the losses of mpo_ext and TRL differ".
    """
    ours = [p for p in base if p is not trl]
    if trl is None or not ours:
        return ""
    gap = max(abs(a - b) for p in ours for a, b in zip(p["losses"], trl["losses"], strict=True))
    return f"In every step, {names} by at most {gap:.1e} (absolute)."


def readme_step(documents: Documents) -> str:
    """Returns the README's table of the training step."""
    document = documents["train_step"]
    base, trl = _base_steps(document)
    rows = [[provider_name(p["provider"]), _time(p), _mib(p["peak_bytes"]), _faster(p, trl)] for p in base]
    table = markdown_table(["trainer", "time of a step", "peak memory", "speed against TRL"], rows)
    gap = _loss_gap(base, trl, "the losses of our trainer differ from those of TRL")
    return f"{_step_shape(document)}; {_where_short(document)}:\n\n{table}\n{gap}"


def steps(documents: Documents) -> str:
    """Returns the full table of the training step."""
    document = documents["train_step"]
    base, trl = _base_steps(document)
    rows = []
    for point in (p for p in _measured(document) if not _is_attention(p)):
        tokens = f"{point['images'] * point['image_tokens']:,}"
        faster = _faster(point, trl) if point in base else ""
        memory = _mib(point["peak_bytes"])
        rows.append([provider_name(point["provider"]), tokens, _time(point), _spread(point), memory, faster])
    header = [
        "trainer",
        "image tokens",
        "time of a step",
        "20th to 80th percentile",
        "peak memory",
        "speed against TRL",
    ]
    return "\n".join([
        f"{where(document)}\n",
        f"{_step_shape(document)}. Times are medians of all steps except the first.\n",
        markdown_table(header, rows),
        f"{_loss_gap(base, trl, 'the losses of mpo_ext and TRL differ')}\n",
        _missing(document),
    ])  # fmt: skip


def _is_attention(point: Point) -> bool:
    return point["sweep"].startswith("prompt")


#: Table labels of the cases that attend in different ways.
_ATTENTION_NAMES = {
    "mpo_ext": "mpo_ext, one row, split attention",
    "mpo_ext, dense mask": "mpo_ext, one row, dense mask",
}


def attention_steps(documents: Documents) -> str:
    """Returns the table of training steps with long prompts, in which attention takes much of the time."""
    document = documents["train_step"]
    points = [point for point in _measured(document) if _is_attention(point)]
    rows = []
    for point in points:
        beside = [other for other in points if other["sweep"] == point["sweep"]]
        sizes = step_inputs.Sizes(**{key: point[key] for key in step_inputs.Sizes.__dataclass_fields__})
        speed = train_step.rates(sizes, point["median_s"])
        ratios = []
        for name in ("mpo_ext, separate rows", "mpo_ext, dense mask", "TRL"):
            other = _find(beside, provider=name)
            ratios.append("" if other is None else f"{point['median_s'] / other['median_s']:.2f}")
        name = _ATTENTION_NAMES.get(point["provider"], provider_name(point["provider"]))
        rows.append([
            f"{sizes.prompt:,}", str(sizes.layers), name, _time(point), *ratios, f"{speed['pairs_per_s']:.3f}",
            f"{speed['tokens_per_s']:,.0f}", _mib(point["peak_bytes"]),
        ])  # fmt: skip
    header = [
        "prompt",
        "layers",
        "trainer",
        "time of a step",
        "time / separate rows",
        "time / dense mask",
        "time / TRL",
    ]
    header += ["pairs/s", "tokens/s"]
    parts = [f"{where(document)}\n"]
    if rows:
        first = points[0]
        gaps = [
            abs(a - b)
            for point in points
            if (trl := _find(points, sweep=point["sweep"], provider="TRL")) is not None
            for a, b in zip(point["losses"], trl["losses"], strict=True)
        ]
        parts.append(
            f"A text model with the architecture of Qwen2, V = {first['vocab']:,}, hidden size {first['hidden']}, "
            f"responses of {first['response']} tokens, one pair per step, float32. Times are medians of all steps "
            'except the first. "tokens/s" counts the tokens of a prompt once per pair.\n'
        )
        parts.append(markdown_table([*header, "peak memory"], rows))
        if gaps:
            parts.append(
                f"In every step, the losses of mpo_ext and TRL differ by at most {max(gaps):.1e} (absolute).\n"
            )
    reasons = [
        f"- {point['id']}: {_plain(point['reason'])}"
        for point in document["points"]
        if _is_attention(point) and point["status"] != "measured"
    ]
    return "\n".join([*parts, *(["Not run:", "", *reasons] if reasons else [])])


def sampling(documents: Documents) -> str:
    document = documents["sampling"]
    rows = []
    for p in _measured(document):
        beyond = "" if p.get("overhead_share") is None else f"{p['overhead_share']:.1%}"
        sizes = [str(p.get(name, "")) for name in ("prompts", "prompt_tokens", "images", "samples", "new_tokens")]
        rows.append([p["provider"], *sizes, _time(p), beyond])
    header = ["method", "prompts", "prompt tokens", "images", "samples", "new tokens", "time", "overhead"]
    shared = next((p for p in _measured(document) if p.get("samples")), None)
    model = "The model is the model of the digits demo."
    if shared is not None:
        model = (
            "The first rows use the model of the digits demo. The rows with images use an untrained InternVL with "
            f"hidden size {shared['hidden']} and {shared['layers']} layers, and decode all samples together."
        )
    return f"{where(document)} {model}\n\n{markdown_table(header, rows)}{_missing(document)}"
