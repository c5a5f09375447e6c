"""Plots the result files as PNG and SVG. The background is white, so that plots are readable on dark web pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.check_model import WITHIN, by_kind

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255")
_LABELS = {
    "vocab": "vocabulary V", "tokens": "tokens T of each response", "share": "share of labelled rows",
    "pairs": "pairs B", "hidden": "hidden size D",
}  # fmt: skip


def draw(documents: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws the plots of the result files to ``folder``, and returns the paths of the PNG and SVG files.

    ``documents`` maps the name of a benchmark to the content of its result file.
    """
    written = []
    for name in ("logits", "linear"):
        if name in documents:
            written += _scaling(name, documents[name]["points"], folder)
    if "cost_model" in documents:
        written += _model(documents["cost_model"]["points"], folder)
    return written


def _figure(columns: int, rows: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "mpo_ext"}):
        figure.savefig(paths[0], dpi=120, facecolor="white", metadata={"Software": None})
        figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
    return paths


def _scaling(name: str, points: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Plots the measured times. Each varied size has a column of panels, and each dtype has a row of panels.

    Returns the paths of the plot files; [] if no size was varied.
    """
    measured = [point for point in points if point["status"] == "measured" and point.get("median_s") is not None]
    axes = [axis for axis in _LABELS if any(point["sweep"] == axis for point in measured)]
    dtypes = [d for d in ("float32", "bfloat16") if any(p["sweep"] in axes and p["dtype"] == d for p in measured)]
    if not axes or not dtypes:
        return []
    figure = _figure(len(axes), len(dtypes))
    providers = list(dict.fromkeys(point["provider"] for point in measured if point["sweep"] in axes))
    for row, dtype in enumerate(dtypes):
        for column, axis in enumerate(axes):
            panel = figure.add_subplot(len(dtypes), len(axes), row * len(axes) + column + 1)
            for number, provider in enumerate(providers):
                some = [p for p in measured if (p["sweep"], p["provider"], p["dtype"]) == (axis, provider, dtype)]
                some.sort(key=lambda p: p[axis])
                if some:
                    x = [p[axis] for p in some]
                    color = _COLORS[number % len(_COLORS)]
                    panel.plot(x, [p["median_s"] for p in some], ".-", color=color, label=provider)
                    panel.fill_between(
                        x, [p["p20_s"] for p in some], [p["p80_s"] for p in some], color=color, alpha=0.2
                    )
            panel.set(title=dtype, xlabel=_LABELS[axis], xscale="log", yscale="log")
            if column == 0:
                panel.set_ylabel("seconds, forward and backward")
            panel.grid(alpha=0.3, which="both")
            if panel.lines:
                panel.legend(fontsize=7)
    figure.suptitle(
        f"From {'logits' if name == 'logits' else 'hidden states'}, measured: median, 20th to 80th percentile"
    )
    return _save(figure, folder, f"{name}-scaling")


def _model(points: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    figure = _figure(1, 1)
    panel = figure.add_subplot()
    for number, (kind, some) in enumerate(by_kind(points)):
        marker = "o" if kind.startswith("mpo_ext") else "x"
        x, y = [p["median_s"] for p in some], [p["predicted_s"] for p in some]
        panel.plot(x, y, marker, markersize=4, color=_COLORS[number % len(_COLORS)], label=kind)
    ends = [min(p["median_s"] for p in points) / 1.5, max(p["median_s"] for p in points) * 1.5]
    panel.plot(ends, ends, "-", color="#666666", linewidth=0.8)
    panel.fill_between(
        ends, [(1 - WITHIN) * x for x in ends], [(1 + WITHIN) * x for x in ends], color="#666666", alpha=0.15
    )
    panel.set(xlabel="measured, seconds", ylabel="predicted, seconds", xscale="log", yscale="log")
    panel.set_title(f"The cost model on this CPU; the band is {WITHIN:.0%}", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    return _save(figure, folder, "cost-model")
