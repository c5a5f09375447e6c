"""Writes the figures of the result files into the documents: between two markers all text is made from the files.

A block begins with ``<!-- results: NAME -->`` and ends with ``<!-- end of results -->``, each on a line of its own.
tests/benchmarks/test_numbers.py fails where a block is not what its files say. Blocks whose name begins with
"predicted" come from mpo_ext.plan.roofline alone and say so; those that begin with "study_" are made by benchmarks.study.tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import check_model, machine_code, schema
from mpo_ext.plan import machines
from mpo_ext.plan import roofline as cost
from mpo_ext.report import markdown_table

PLOTS = Path("docs/plots")
_BLOCK = re.compile(r"^<!-- results: (\S+) -->\n(.*?)^<!-- end of results -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^\s*<!-- (?:results:|end of results)", re.MULTILINE)

Documents = Mapping[str, Mapping[str, Any]]


def load(folder: Path) -> dict[str, Any]:
    """The result files of a folder, checked, by name."""
    names = [name for name in schema.BENCHMARKS if (folder / f"{name}.json").exists()]
    found: dict[str, Any] = {name: schema.load(folder / f"{name}.json") for name in names}
    if (folder / "machine_code.json").exists():
        found["machine_code"] = machine_code.load(folder / "machine_code.json")
    if (folder / "study.json").exists():
        from benchmarks.study import tables as study

        found["study"] = study.load(folder / "study.json")
    return found


def pages(root: Path) -> list[Path]:
    """README.md and all pages of docs/: whatever may hold a figure."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields name and content of each block.

    Raises:
        ValueError: If markers do not come in pairs.
    """
    found = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(found):
        raise ValueError(f"markers must come in pairs, got {len(_MARKER.findall(text))} for {len(found)} blocks")
    yield from ((one[1], one[2]) for one in found)


def rewrite(text: str, documents: Documents, failed: list[str] | None = None) -> str:
    """The text with all its blocks made anew.

    Args:
        text: Of a page.
        documents: The result files by name.
        failed: Takes the reason of each block that cannot be made, which then stays as it is.

    Raises:
        ValueError: If markers do not come in pairs, or where ``failed`` is None and a block cannot be made.
    """
    list(blocks(text))

    def again(one: re.Match[str]) -> str:
        try:
            content = render(one[1], documents)
        except ValueError as error:
            if failed is None:
                raise
            failed.append(str(error))
            content = one[2]
        return f"<!-- results: {one[1]} -->\n{content}<!-- end of results -->"

    return _BLOCK.sub(again, text)


def render(name: str, documents: Documents) -> str:
    """The content of a block, which ends with a newline.

    Raises:
        ValueError: If nobody makes a block of that name, or a file that it needs is not there.
    """
    is_study = name.startswith("study_")
    if not is_study and name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)} or study_..., got {name!r}")
    for one in ("study",) if is_study else BLOCKS[name][0]:
        if one not in documents:
            raise ValueError(f"block {name!r} must have results/{one}.json, got {', '.join(documents) or 'no file'}")
    if not is_study:
        return f"\n{BLOCKS[name][1](documents).strip()}\n\n"
    from benchmarks.study import tables as study

    tables = study.tables(documents["study"])
    if name not in tables:
        raise ValueError(f"block must be one of {', '.join(tables)}, got {name!r}")
    return f"\n{tables[name].strip()}\n\n"


# ------------------------------------------------------------------------------------------------------ what is shared

_TWO = ("float32", "bfloat16")

#: Providers as a reader knows them.
_NAMES = {
    "mpo_ext, reuse_logits": "mpo_ext, `reuse_logits=True`",
    "mpo_ext, recompute=False": "mpo_ext, `recompute=False`",
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
    "mpo_ext, precomputed": "mpo_ext, precomputed reference",
}


def _name(provider: str) -> str:
    return _NAMES.get(provider, provider)


def _escape(text: str) -> str:
    """The first sentence of a reason, without what Markdown would take for markup."""
    return text.partition(". ")[0].translate(str.maketrans("|", "/", "<>`")).rstrip(".")


def _cpu(document: Mapping[str, Any]) -> str:
    one = document["environment"]
    return f"{one['threads']} threads of {one['cpu'].rsplit(' x ', 1)[0]} ({one['cores']} cores)"


def _where(document: Mapping[str, Any]) -> str:
    """Machine, versions, date and command: what a figure must be quoted with."""
    one = document["environment"]
    load = max(one["load_before"][0], one["load_after"][0])
    return (
        f"Measured on {_cpu(document)}, torch {one['versions']['torch']}, commit {one['commit']}"
        f"{' with changes' if one['modified'] else ''}, {one['started'][:10]}, load average up to {load:.1f}: "
        f"`{one['command']}`."
    )


def _where_short(document: Mapping[str, Any]) -> str:
    one = document["environment"]
    return f"{_cpu(document)}, torch {one['versions']['torch']}, {one['started'][:10]}, `{one['command']}`"


def _missing(document: Mapping[str, Any]) -> str:
    measured = {point["provider"] for point in document["points"] if point["status"] == "measured"}
    reasons = "; ".join(
        f"{_name(name)} ({_escape(reason)})" for name, reason in document["missing"].items() if name not in measured
    )
    return f"Not run: {reasons}." if reasons else ""


def _measured(document: Mapping[str, Any], sweep: str | None = None) -> list[Mapping[str, Any]]:
    points = document["points"]
    return [p for p in points if p["status"] == "measured" and (sweep is None or p["sweep"] == sweep)]


def _find(points: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    return next((p for p in points if all(p.get(key) == value for key, value in wanted.items())), None)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds:.3f} s"


def _time(point: Mapping[str, Any] | None) -> str:
    return "" if point is None else _seconds(point.get("median_s"))


def _spread(point: Mapping[str, Any] | None) -> str:
    if point is None or point.get("p20_s") is None:
        return ""
    return f"{_seconds(point['p20_s'])} to {_seconds(point['p80_s'])}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{max(size, 0) / 2**20:,.0f} MiB"


def _beyond(point: Mapping[str, Any] | None) -> float | None:
    """Peak memory beyond inputs, and from hidden states beyond the gradients, which all providers return."""
    if point is None or point.get("peak_bytes") is None:
        return None
    if point.get("hidden") is None:
        return point["peak_bytes"]
    rows = 2 * point["pairs"] * point["tokens"]
    has_head = point["provider"] != "mpo_ext, frozen head"
    width = 4 if point["dtype"] == "float32" else 2
    return point["peak_bytes"] - width * point["hidden"] * (rows + point["vocab"] * has_head)


def _of_floor(point: Mapping[str, Any] | None) -> str:
    return "" if point is None or point.get("share_of_floor") is None else f"{point['share_of_floor']:.0%}"


def _few(document: Mapping[str, Any]) -> float | None:
    """The measured share of labelled rows that is nearest to a tenth."""
    return min({p["share"] for p in _measured(document, "share")}, key=lambda one: abs(one - 0.1), default=None)


_FLOORS = {
    "logits": "the floor: one read, then one read and one write in place",
    "linear": "the floor: the three matrix products alone",
}


def _loss_rows(name: str, document: Mapping[str, Any], *, is_short: bool) -> str:
    """A row per provider that was measured on the base shape, and the floor."""
    base, few = _measured(document, "base"), _few(document)
    at_few = [p for p in _measured(document, "share") if p["share"] == few]
    share = [] if few is None else [f"float32, {few:.0%} labelled"]
    if is_short:
        header = ["", *_TWO, *share, "memory, float32"]
    else:
        header = ["", "float32", "20th to 80th percentile", "floor / time", "bfloat16", "floor / time", *share]
        header += [f"memory, {dtype}" for dtype in _TWO]
    rows = []
    for provider in dict.fromkeys(p["provider"] for p in base):
        wide, half = (_find(base, provider=provider, dtype=dtype) for dtype in _TWO)
        cells = [_time(wide), _time(half)]
        if not is_short:
            cells = [_time(wide), _spread(wide), _of_floor(wide), _time(half), _of_floor(half)]
        cells += [] if few is None else [_time(_find(at_few, provider=provider, dtype="float32"))]
        cells += [_mib(_beyond(wide))] if is_short else [_mib(_beyond(wide)), _mib(_beyond(half))]
        rows.append([_name(provider), *cells])
    floors = [_seconds(max((p["floor_s"] for p in base if p["dtype"] == d), default=None)) for d in _TWO]
    floor = [*floors] if is_short else [floors[0], "", "", floors[1], ""]
    at_few = [p for p in at_few if p["dtype"] == "float32"]
    floor += [] if few is None else [_seconds(max((p["floor_s"] for p in at_few), default=None))]
    rows.append([_FLOORS[name], *floor, *([""] if is_short else ["", ""])])
    return markdown_table(header, rows)


def _shape(name: str, document: Mapping[str, Any]) -> str:
    one = document["points"][0]
    depth = f"D = {one['hidden']}, " if name == "linear" else ""
    pairs = "One pair" if one["pairs"] == 1 else f"{one['pairs']} pairs"
    return f"{pairs}, T = {one['tokens']}, {depth}V = {one['vocab']:,}"


_ADDED = {
    "logits": "memory is what comes on top of the logits: their gradient, and whatever a method needs besides",
    "linear": "memory is what comes on top of hidden states, head and the gradients of both",
}

# ---------------------------------------------------------------------------------------------------------- the blocks


def _readme_loss(name: str) -> Callable[[Documents], str]:
    def make(documents: Documents) -> str:
        document = documents[name]
        return (
            f"{_shape(name, document)}, all rows labelled but where it says otherwise, forward + backward, "
            f"{_where_short(document)}. Medians of interleaved runs; {_ADDED[name]}:\n\n"
            f"{_loss_rows(name, document, is_short=True)}"
        )

    return make


def _loss(name: str) -> Callable[[Documents], str]:
    def make(documents: Documents) -> str:
        document = documents[name]
        lines = [
            f"{_where(document)}\n",
            f"{_shape(name, document)}, all rows labelled but where it says otherwise, forward + backward; medians of "
            f"interleaved runs; {_ADDED[name]}.\n",
            _loss_rows(name, document, is_short=False),
            _missing(document),
        ]
        return "\n".join(lines)

    return make


_AXES = {"vocab": "V", "tokens": "T", "share": "labelled", "pairs": "B", "hidden": "D", "dtype": "float16"}


def _sweep(name: str) -> Callable[[Documents], str]:
    """A row per measured shape, our ways and plain torch side by side, and the plot."""

    def make(documents: Documents) -> str:
        document = documents[name]
        points = [p for p in _measured(document) if p["sweep"] in _AXES]
        providers = [p for p in dict.fromkeys(p["provider"] for p in points) if check_model.is_ours(p) or p == "eager"]
        header = ["varied", "B", "T", *(["D"] if name == "linear" else []), "V", "labelled", "dtype"]
        rows = []
        keys = ("sweep", "pairs", "tokens", "hidden", "vocab", "share", "dtype")
        for shape in dict.fromkeys(tuple(p[key] for key in keys) for p in points):
            sweep, pairs, tokens, hidden, vocab, share, dtype = shape
            some = [p for p in points if tuple(p[key] for key in keys) == shape]
            depth = [str(hidden)] if name == "linear" else []
            cells = [_AXES[sweep], str(pairs), str(tokens), *depth, f"{vocab:,}", f"{share:.0%}", dtype]
            rows.append([*cells, *(_time(_find(some, provider=p)) for p in providers)])
        title = "From logits" if name == "logits" else "From hidden states"
        dropped = sum(p["status"] != "measured" and "were over" in p["reason"] for p in document["points"])
        lines = []
        if rows:
            lines = [
                f"![{title}: time against the sizes, as measured]({PLOTS.name}/{name}-scaling.png)\n",
                f"All shapes, forward + backward, measured in the same run as above ({_where_short(document)}):\n",
                markdown_table([*header, *map(_name, providers)], rows),
            ]
        lines += [f"Not measured, since the time of the run was over: {dropped} points."] if dropped else []
        return "\n".join(lines)

    return make


def _step_rows(document: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
    base = [point for point in document["points"] if point["sweep"].startswith("base")]
    return base, _find(base, provider="TRL", status="measured")


def _faster(point: Mapping[str, Any], trl: Mapping[str, Any] | None) -> str:
    return "" if trl is None or point is trl else f"{trl['median_s'] / point['median_s']:.1f} times faster"


def _step_shape(document: Mapping[str, Any]) -> str:
    one = document["points"][0]
    return (
        f"A small InternVL, V = {one['vocab']:,}, hidden size {one['hidden']}, {one['layers']} layers, "
        f"{one['images'] * one['image_tokens']:,} image tokens, responses of {one['response']} tokens, {one['batch']} "
        f"pair a step, float32"
    )


def _gap(base: Sequence[Mapping[str, Any]], trl: Mapping[str, Any] | None) -> str:
    others = [p for p in base if p["status"] == "measured" and p is not trl]
    if trl is None or not others:
        return ""
    gap = max(abs(a - b) for p in others for a, b in zip(p["losses"], trl["losses"], strict=True))
    return f"The losses of our trainers differ from those of TRL's by at most {gap:.1e} in a step."


def _readme_step(documents: Documents) -> str:
    document = documents["train_step"]
    base, trl = _step_rows(document)
    rows = [[_name(p["provider"]), _time(p), _mib(p["peak_bytes"]), _faster(p, trl)] for p in _measured_of(base)]
    return (
        f"{_step_shape(document)}, {_where_short(document)}:\n\n"
        f"{markdown_table(['a training step', 'time', 'peak memory', ''], rows)}\n{_gap(base, trl)}"
    )


def _measured_of(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [point for point in points if point["status"] == "measured"]


def _steps(documents: Documents) -> str:
    document = documents["train_step"]
    base, trl = _step_rows(document)
    rows = []
    for point in _measured(document):
        tokens = f"{point['images'] * point['image_tokens']:,}"
        faster = _faster(point, trl) if point in base else ""
        memory = _mib(point["peak_bytes"])
        rows.append([_name(point["provider"]), tokens, _time(point), _spread(point), memory, faster])
    header = ["", "image tokens", "step", "20th to 80th percentile", "peak memory", ""]
    lines = [
        f"{_where(document)}\n",
        f"{_step_shape(document)}; medians of steps after one that is not counted.\n",
        markdown_table(header, rows),
        _gap(base, trl),
        _missing(document),
    ]
    return "\n".join(lines)


def _sampling(documents: Documents) -> str:
    document = documents["sampling"]
    rows = []
    for p in _measured(document):
        beyond = "" if p.get("overhead_share") is None else f"{p['overhead_share']:.1%}"
        rows.append([p["provider"], str(p.get("prompts", "")), str(p.get("new_tokens", "")), _time(p), beyond])
    table = markdown_table(["", "prompts", "new tokens", "time", "beyond generating"], rows)
    return f"{_where(document)} The model is that of the digits demo.\n\n{table}{_missing(document)}"


def _rates(documents: Documents) -> str:
    settings = documents["cost_model"]["settings"]["rates"]
    rows = [
        ["bandwidth", f"{settings['bandwidth'] / 1e9:.1f} GB/s"],
        *([f"matrix products, {d}", f"{rate / 1e9:.0f} GFLOP/s"] for d, rate in settings["products"].items()),
        ["our kernels in cache, forward and backward", f"{settings['kernel_rate'] / 1e9:.2f} G logits/s"],
        ["torch's log_softmax in cache, forward and backward", f"{settings['softmax_rate'] / 1e9:.2f} G logits/s"],
        ["page faults, small pages", f"{settings['fresh'] / 1e9:.2f} GB/s"],
        ["page faults, huge pages", f"{settings['huge'] / 1e9:.1f} GB/s"],
        ["fixed, forward and backward", f"{settings['overhead'] * 1e3:.2f} ms"],
    ]
    return f"{_where(documents['cost_model'])}\n\n{markdown_table(['medians over the whole run', 'rate'], rows)}"


def _range(errors: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{one:+.0%}" for one in (min(errors), max(errors)))
    return f"{len(errors)}, {' to '.join(ends)}"


def _check(documents: Documents) -> str:
    points = documents["cost_model"]["points"]
    within, errors = check_model.WITHIN, [abs(check_model.error(p)) for p in points]
    ours = [abs(check_model.error(p)) for p in points if check_model.is_ours(p["provider"])]
    rows = []
    for one in check_model.summary(points):
        memory = "" if not one["memory_points"] else f"{one['memory_within']} of {one['memory_points']}"
        rows.append([
            one["kind"], str(one["points"]), f"{one['within']} of {one['points']}", f"{one['median_error']:.0%}",
            f"{one['worst_error']:+.0%}", memory,
        ])  # fmt: skip
    header = ["measured points", "number", f"time within {within:.0%}", "median error", "largest error"]
    header.append(f"memory within {within:.0%}")
    by_provider: dict[str, list[float]] = {}
    for point in points:
        if abs(check_model.error(point)) > within:
            name = f"{_name(point['provider'])} ({point['benchmark'].replace('_', ' ')})"
            by_provider.setdefault(name, []).append(check_model.error(point))
    lines = [
        f"Of {len(points)} measured points the predicted time of {sum(e <= within for e in errors)} is within "
        f"{within:.0%} of the measured one; of the {len(ours)} of mpo_ext it is that of "
        f"{sum(e <= within for e in ours)}, with a median error of {check_model.middle(ours):.0%}. "
        f"{_where(documents['cost_model'])}\n",
        markdown_table(header, rows),
        f"![Predicted against measured times]({PLOTS.name}/cost-model.png)\n",
    ]
    if by_provider:
        texts = [f"{name}: {_range(errors)}" for name, errors in sorted(by_provider.items())]
        lines.append(f"Predicted times that miss the measured ones by more than {within:.0%}: {'; '.join(texts)}.")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- predictions

_BIG = cost.LossShape(tokens=4096, vocab=151936)
_WIDE = cost.LossShape(tokens=4096, vocab=151936, hidden=4096)


def _share(loss: cost.LossShape, share: float) -> cost.LossShape:
    return cost.LossShape(tokens=loss.tokens, vocab=loss.vocab, hidden=loss.hidden, share=share)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _gpu_table(loss: cost.LossShape, methods: Sequence[str]) -> str:
    gpus = [machines.gpu(name) for name in machines.GPUS]
    rows = []
    for method in methods:
        costs = [cost.loss_cost(method, loss, machine) for machine in gpus]
        rows.append([_name(method), *(f"{1e3 * one.seconds:.1f}" for one in costs), _gib(costs[0].memory)])
    return markdown_table(["ms, predicted", *machines.GPUS, "memory, predicted"], rows)


def _predicted(documents: Documents) -> str:
    parts = []
    for share in (1.0, 0.1):
        loss, wide = _share(_BIG, share), _share(_WIDE, share)
        parts.append(f"Predicted, {loss.labelled:,} of {loss.rows:,} rows labelled, V = {loss.vocab:,}, bfloat16. "
                     f"From logits:\n\n{_gpu_table(loss, list(cost.LOGITS))}\n"
                     f"From hidden states, D = {wide.hidden}:\n\n{_gpu_table(wide, list(cost.LINEAR))}")  # fmt: skip
    return "\n".join(parts)


#: The paths of mpo_ext from hidden states to the gradients.
_PATHS = {
    "mpo_ext, from logits": "logits, `mpo_loss`",
    "mpo_ext, from logits, reuse_logits": "logits, `mpo_loss(reuse_logits=True)`",
    "mpo_ext": "`linear_mpo_loss`",
    "mpo_ext, recompute=False": "`linear_mpo_loss(recompute=False)`",
    "mpo_ext, frozen head": "`linear_mpo_loss`, frozen head",
    "eager": "logits, eager torch",
}
_SHARES = (1.0, 0.25, 0.1)


def _products_of(method: str) -> str:
    """How many matrix products with the head a method makes, and of which rows: counted on a machine of that rate."""
    counting = machines.Machine(name="counts", is_gpu=True, bandwidth=float("inf"), matmul_rates={"bfloat16": 1.0})
    flop = 2.0 * _WIDE.rows * _WIDE.vocab * _WIDE.hidden_size
    whole, half = (cost.loss_cost(method, _share(_WIDE, share), counting).seconds / flop for share in (1.0, 0.5))
    return f"{whole:.0f}, {'all' if half == whole else 'labelled'} rows"


def _predicted_paths(documents: Documents) -> str:
    machine = machines.gpu("H100")
    rows = []
    for method, text in _PATHS.items():
        costs = [cost.loss_cost(method, _share(_WIDE, share), machine) for share in _SHARES]
        times = [f"{1e3 * one.seconds:.1f} ms" for one in costs]
        rows.append([text, _products_of(method), *times, *(_gib(one.memory) for one in (costs[0], costs[-1]))])
    header = ["path", "products with the head", *(f"time, {share:.0%} labelled" for share in _SHARES)]
    header += [f"memory, {_SHARES[0]:.0%}", f"memory, {_SHARES[-1]:.0%}"]
    return (
        f"Predicted for an H100, {_WIDE.rows:,} rows, D = {_WIDE.hidden}, V = {_WIDE.vocab:,}, bfloat16, from hidden "
        f"states to their gradient and that of the head; memory includes the gradients, and the logits where there "
        f"are any:\n\n{markdown_table(header, rows)}"
    )


def _described_model(*, trainable_share: float = 1.0, head_learns: bool = True) -> cost.ModelShape:
    """A decoder of the sizes of Qwen2.5-7B, without a vision tower, as the trainer keeps its activations."""
    layers, width, middle, keys, vocab = 28, 3584, 18944, 512, 152064
    decoder = layers * (2 * width * width + 2 * width * keys + 3 * width * middle)
    # In bfloat16: input and output of each linear layer; a norm keeps its element and its result.
    linear = 2 * (width + width) + 2 * (width + keys) + 3 * (width + middle)
    kept = layers * (2 * linear + 2 * (4 + 2) * width)
    parameters = decoder + 2 * vocab * width
    return cost.ModelShape(
        parameters=parameters, trainable=round(trainable_share * parameters), decoder=decoder, layers=layers,
        width=width, vocab=vocab, kept=kept, head_learns=head_learns,
    )  # fmt: skip


def _predicted_steps(documents: Documents) -> str:
    model, machine = _described_model(), machines.gpu("H100")
    step = cost.StepShape(prompt=3072, response=1024, checkpointing=True, shards=8)
    ready = cost.StepShape(prompt=3072, response=1024, checkpointing=True, shards=8, precomputed=True)
    frozen = _described_model(trainable_share=0.005, head_learns=False)
    cases = [
        ("mpo_ext", model, step, "mpo_ext"),
        ("mpo_ext, precomputed reference", model, ready, "mpo_ext"),
        ("mpo_ext, precomputed, `recompute=False`", model, ready, "mpo_ext, recompute=False"),
        ("mpo_ext, precomputed, adapters of 0.5 % of the weights, frozen head", frozen, ready, "mpo_ext"),
        ("mpo_ext, separate rows", model, step, "mpo_ext, separate rows"),
        ("mpo_ext, separate rows, from logits", model, step, "mpo_ext, separate rows, from logits"),
        ("TRL's DPOTrainer", model, step, "TRL"),
    ]
    rows = []
    for text, one, of, trainer in cases:
        found = cost.step_cost(trainer, one, of, machine)
        rows.append([text, f"{found.seconds:.2f} s", f"{found.memory / 2**30:.0f} GiB"])
    return (
        f"Predicted for one of {step.shards} H100s that share the weights, communication left out; a decoder of "
        f"{model.parameters / 1e9:.1f} billion parameters in float32 that computes in bfloat16, one pair, a prompt of "
        f"{step.prompt:,} tokens, responses of {step.response:,}, gradient checkpointing:\n\n"
        f"{markdown_table(['a training step, predicted', 'time', 'memory'], rows)}"
    )


_LATENCY = 0.8e-6  # of a GPU's memory, in seconds: an assumption
_ROWS = 8192  # of the floors: two responses of 4,096 tokens


def _floors(name: str) -> tuple[float, float]:
    """Seconds that one read, and one read and one write, of the logits take at the peak of a GPU's sheet."""
    read = 2 * _ROWS * _BIG.vocab / machines.GPUS[name].bandwidth
    return read, 2 * read


def _predicted_floors(documents: Documents) -> str:
    rows = []
    for name in machines.GPUS:
        forward, backward = _floors(name)
        bandwidth = f"{machines.GPUS[name].bandwidth / 1e12:.2f} TB/s"
        rows.append([name, bandwidth, *(f"{1e3 * s:.2f}" for s in (forward, backward, forward + backward))])
    header = ["GPU", "peak bandwidth", "forward, ms", "backward, ms", "both, ms"]
    return (
        f"The floor at N = N' = {_ROWS:,}, V = {_BIG.vocab:,}, bfloat16 ({2 * _ROWS * _BIG.vocab / 1e9:.2f} GB of "
        f"logits), predicted from the peak bandwidth:\n\n{markdown_table(header, rows)}"
    )


def _predicted_issue(documents: Documents) -> str:
    counts = documents["machine_code"]["instructions"]["sm_90"]
    names = ("token_logp bfloat16", "token_logp bfloat16 stats", "logits_grad bfloat16")
    forward, stats, backward = (counts[name]["per_logit"] for name in names)
    rows = []
    for name, sheet in machines.GPUS.items():
        read, update = _floors(name)
        clocks = sheet.multiprocessors * sheet.clock / (_ROWS * _BIG.vocab)  # clocks per second and logit, of all
        shares = [forward / 128 / clocks / read, 1 / 16 / clocks / read, stats / 128 / clocks / read]
        shares.append(backward / 128 / clocks / update)
        in_flight = f"{sheet.bandwidth / sheet.multiprocessors * _LATENCY / 1024:.0f} KiB"
        rows.append([name, f"{sheet.clock / 1e9:.2f} GHz", *(f"{share:.0%}" for share in shares), in_flight])
    header = ["GPU", "clock", "forward: issue", "forward: exponentials", "forward with statistics: issue"]
    return (
        f"Predicted shares of the time that the floor gives, bfloat16, with the instructions of sm_90; and the "
        f"loads that a multiprocessor must have under way for the peak bandwidth at a latency of "
        f"{_LATENCY * 1e6:.1f} us:\n\n"
        f"{markdown_table([*header, 'backward: issue', 'in flight'], rows)}"
    )


def _counted(documents: Documents) -> str:
    code = documents["machine_code"]
    return f"Counted in the code that {code['compiler']} makes, {code['date']}: `{code['command']}`"


def _instruction_counts(documents: Documents) -> str:
    archs = documents["machine_code"]["instructions"]
    rows = []
    for kernel in ("token_logp", "token_logp stats", "logits_grad"):
        base, _, stats = kernel.partition(" ")
        for dtype in ("bfloat16", "float32"):
            name = " ".join(filter(None, (base, dtype, stats)))
            text = f"{base}{' with statistics' if stats else ''}, {dtype}"
            rows.append([text, *(f"{counts[name]['per_logit']:.1f}" for counts in archs.values())])
    return f"{_counted(documents)}:\n\n{markdown_table(['instructions per logit', *archs], rows)}"


def _registers(documents: Documents) -> str:
    table = documents["machine_code"]["registers"]
    archs = list(next(iter(table.values())))
    rows = [[name, *(str(used[arch]) for arch in archs)] for name, used in table.items() if " float16" not in name]
    return f"{_counted(documents)}:\n\n{markdown_table(['registers per thread', *archs], rows)}"


def _sheets(documents: Documents) -> str:
    rows = []
    for name, one in machines.GPUS.items():
        figures = {
            "memory": f"{one.memory / 1e9:.0f} GB",
            "bandwidth": f"{one.bandwidth / 1e12:.2f} TB/s",
            "bfloat16": f"{one.matmul_rates['bfloat16'] / 1e12:.0f}",
            "float32": f"{one.matmul_rates['float32'] / 1e12:.1f}",
            "multiprocessors": str(one.multiprocessors),
            "clock": f"{one.clock / 1e9:.2f} GHz",
        }
        cells = [f"{text}, not confirmed" if key in one.unconfirmed else text for key, text in figures.items()]
        rows.append([name, *cells, one.source])
    header = ["GPU", "memory", "peak bandwidth", "peak dense bf16 TFLOP/s", "peak float32 TFLOP/s", "multiprocessors"]
    return markdown_table([*header, "clock", "source"], rows)


#: A block's files and how it is made.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[[Documents], str]]] = {
    "readme_logits": (("logits",), _readme_loss("logits")),
    "readme_linear": (("linear",), _readme_loss("linear")),
    "readme_step": (("train_step",), _readme_step),
    "logits": (("logits",), _loss("logits")),
    "logits_sweeps": (("logits",), _sweep("logits")),
    "linear": (("linear",), _loss("linear")),
    "linear_sweeps": (("linear",), _sweep("linear")),
    "train_step": (("train_step",), _steps),
    "sampling": (("sampling",), _sampling),
    "rates": (("cost_model",), _rates),
    "cost_model": (("cost_model",), _check),
    "predicted_paths": ((), _predicted_paths),
    "predicted_steps": ((), _predicted_steps),
    "predicted_losses": ((), _predicted),
    "predicted_floors": ((), _predicted_floors),
    "predicted_issue": (("machine_code",), _predicted_issue),
    "instructions": (("machine_code",), _instruction_counts),
    "registers": (("machine_code",), _registers),
    "data_sheets": ((), _sheets),
}
