"""Runs the demo (SFT, pairs, three further training runs, evaluation) and writes its results."""

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mpo_ext import report
from mpo_ext.demo import digits
from mpo_ext.demo.model import build_model, build_processor
from mpo_ext.demo.pairs import make_pairs
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.train import METHODS, evaluate, train_branch, train_sft
from mpo_ext.files import atomic_write

START = "SFT start"
LABELS = {START: START, "SFT": "SFT continued", "DPO": "DPO only", "MPO": "MPO"}
_COLORS = {START: "0.6", "SFT": "C0", "DPO": "C3", "MPO": "C2"}
_EVALUATION_SEED = 1  # the same held-out questions for every run
_PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "pillow")


@dataclasses.dataclass(slots=True)
class DemoResult:
    """Results of a run with one seed.

    Attributes:
        settings: Settings of the run.
        seconds: Duration of each stage in seconds.
        sft_curve: Log that ``train_sft`` returned.
        pair_counts: Number of pairs by form and pipeline, as in ``MadePairs.counts``.
        pairs_left_out: Number of pairs that were made but not used, by reason.
        sampling: Summary of each run of the data engine, by the run's folder.
        branch_curves: Log that ``train_branch`` returned, by method.
        accuracy: Result of ``evaluate`` on held-out questions, by method; ``START`` is the SFT model.
    """

    settings: Settings
    seconds: dict[str, float]
    sft_curve: list[dict[str, float]]
    pair_counts: dict[str, int]
    pairs_left_out: dict[str, int]
    sampling: dict[str, dict[str, Any]]
    branch_curves: dict[str, list[dict[str, float]]]
    accuracy: dict[str, dict[str, dict[str, float]]]


class _Stages:
    """Prints an explanation before each stage, a progress bar during it, and its duration after it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, explanation: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Returns a context manager for a stage. It yields a function that advances the progress bar.

        Args:
            name: Name of the stage, the key of its duration in ``seconds``.
            explanation: Text to print before the stage.
            total: Number of steps of the progress bar; None: no progress bar.
        """
        self.console.print(f"[bold]{name}[/bold]: {explanation}")
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        start = time.perf_counter()
        is_hidden = total is None or not self.console.is_terminal
        with Progress(*columns, *times, console=self.console, transient=True, disable=is_hidden) as progress:
            bar = progress.add_task(name, total=total)

            def advance(steps: int = 1, total: int | None = None) -> None:
                progress.update(bar, advance=steps, total=total)

            yield advance
        self.seconds[name] = time.perf_counter() - start
        self.console.print(f"  {self.seconds[name]:.1f} s")


def run(*, out: Path, seeds: Sequence[int], quick: bool, threads: int | None, backend: str | None) -> None:
    """Runs the demo for each seed and writes a table, curves, numbers and pairs.

    Args:
        out: Existing folder for the results.
        seeds: Seeds of the runs. The curves show the first seed; pairs of other seeds are written to ``seed-N``.
        quick: Whether to use ``Settings.quick``.
        threads: Number of CPU threads; None: torch's choice.
        backend: Backend of the loss; None: the best installed backend.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # a GPU does not pay off for such a small model
    console = Console()
    start = time.perf_counter()
    results: list[DemoResult] = []
    for seed in seeds:
        settings = Settings.quick(seed) if quick else Settings(seed=seed)
        folder = out / f"seed-{seed}" if results else out
        result = run_seed(dataclasses.replace(settings, backend=backend), folder, console)
        if not results:
            save_curves(out / "curves.png", result)
        results.append(result)
        # Written after every seed, so an interrupted run keeps the results of its complete seeds.
        save_results(out / "results.json", results, time.perf_counter() - start)
        with atomic_write(out / "table.md") as file:
            file.write(markdown(results).encode())
    print_table(console, results)
    console.print(f"{time.perf_counter() - start:.0f} s in total; table, curves and pairs are in {out}")


def run_seed(settings: Settings, folder: Path, console: Console) -> DemoResult:
    """Runs the demo with one seed, writes the pairs and the training runs to ``folder``, and returns the results."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    stages = _Stages(console)
    processor = build_processor()
    model = build_model(processor.tokenizer, hidden_size=settings.hidden_size, layers=settings.layers)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.rule(f"seed {settings.seed}")

    text = f"an {type(model).__name__} with {size:.2f} M parameters learns to read grids of digits, but not perfectly"
    with stages.stage("SFT", text, None):
        sft_curve = train_sft(model, processor, settings, rng, folder)

    text = "it answers training questions; right answers are paired with wrong ones and with answers continued blindly"
    with stages.stage("pairs", text, None):
        made = make_pairs(model, processor, settings, rng, folder, stream=sys.stderr)
    for name, summary in made.summaries.items():
        console.print(f"  {name}: {summary}", markup=False, highlight=False)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(made.counts.items()))
    left_out = "".join(f"; left out {count} {reason}" for reason, count in made.left_out.items() if count)
    console.print(f"  {sum(made.counts.values())} pairs, checked: {counts}{left_out}")
    (folder / "reference.jsonl").unlink(missing_ok=True)  # an earlier demo had another model

    models, curves = {START: model}, {}
    for method, weights in METHODS.items():
        text = ", ".join(f"{name.removesuffix('_weight')} {weight:g}" for name, weight in weights.items())
        models[method] = copy.deepcopy(model)
        with stages.stage(LABELS[method], f"the SFT model trained further on the pairs with weights {text}", None):
            curves[method] = train_branch(models[method], processor, made.path, method, settings, folder)

    tasks = held_out_tasks(settings)
    text = f"{len(tasks)} questions about held-out digits to each of the {len(models)} models"
    with stages.stage("evaluation", text, len(tasks) * len(models)) as advance:
        accuracy = {name: evaluate(model, processor, tasks, on_batch=advance) for name, model in models.items()}
    return DemoResult(
        settings=settings,
        seconds=stages.seconds,
        sft_curve=sft_curve,
        pair_counts=made.counts,
        pairs_left_out=made.left_out,
        sampling={name: summary.to_dict() for name, summary in made.summaries.items()},
        branch_curves=curves,
        accuracy=accuracy,
    )


def held_out_tasks(settings: Settings) -> list[digits.Task]:
    """Returns the questions of the final comparison, with ``settings.evaluation_tasks`` questions of each form."""
    rng = np.random.default_rng(_EVALUATION_SEED)
    split = digits.load_digits()["held-out"]
    return [task for form in digits.FORMS for task in digits.sample_tasks(split, settings.evaluation_tasks, rng, form)]


def table(results: Sequence[DemoResult]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table that compares the methods, in percent.

    With several seeds, a cell has the mean and the standard deviation.
    """
    header = ["method", "direct", "unparsable", "CoT", "unparsable"]
    rows = []
    for method, label in LABELS.items():
        cells = [label]
        for form in digits.FORMS:
            for quantity in ("accuracy", "unparsable"):
                values = [100 * result.accuracy[method][form][quantity] for result in results]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        rows.append(cells)
    return header, rows


def markdown(results: Sequence[DemoResult]) -> str:
    """Returns the comparison as Markdown: a table over all seeds and, with several seeds, a table for each seed."""
    text = report.markdown_table(*table(results)) + f"\n{_note(results)}\n"
    if len(results) > 1:
        for result in results:
            text += f"\nSeed {result.settings.seed}:\n\n{report.markdown_table(*table([result]))}"
    return text


def print_table(console: Console, results: Sequence[DemoResult]) -> None:
    """Prints the table that compares the methods."""
    header, rows = table(results)
    shown = Table(title="Held-out grids, percent", caption=_note(results))
    for index, name in enumerate(header):
        shown.add_column(name, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def _note(results: Sequence[DemoResult]) -> str:
    count = results[0].settings.evaluation_tasks
    note = f"{count} questions per form; one standard error is at most {50 / math.sqrt(count):.1f}."
    return note + (f" Mean ± standard deviation over {len(results)} seeds." if len(results) > 1 else "")


def save_results(path: Path, results: Sequence[DemoResult], seconds: float) -> None:
    """Writes all results as JSON, with the settings and package versions that reproduce them."""
    document = {
        "versions": {
            "mpo_ext": importlib.import_module("mpo_ext").__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "seconds": seconds,
        "runs": [dataclasses.asdict(result) for result in results],
    }
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=1).encode())


def save_curves(path: Path, result: DemoResult) -> None:
    """Writes a picture of the training curves of SFT and of the three branches, and of the final accuracies."""

    def lines(*quantities: tuple[str, str, str]) -> list[report.Line]:
        drawn = []
        for method, curve in result.branch_curves.items():
            for key, suffix, style in quantities:
                if key not in curve[0]:
                    continue  # SFT has no rewards
                x, y = _points(curve, key)
                drawn.append(report.Line(f"{method}{suffix}", x, y, _COLORS[method], style, smooth=9))
        return drawn

    sft = result.sft_curve
    measured = [point for point in sft if "accuracy" in point]
    accuracy = [report.Line("", [p["step"] for p in measured], [100 * p["accuracy"] for p in measured])]
    bars = [
        report.Bars(
            label=LABELS[method],
            names=digits.FORMS,
            values=[100 * forms[form]["accuracy"] for form in digits.FORMS],
            errors=[_standard_error(**forms[form]) for form in digits.FORMS],
            color=_COLORS[method],
        )
        for method, forms in result.accuracy.items()
    ]
    rewards = lines(("chosen_reward", " chosen", "-"), ("rejected_reward", " rejected", "--"))
    panels = [
        report.Panel("SFT: loss", "step", "nats per token", [report.Line("", *_points(sft, "loss"), smooth=9)]),
        report.Panel("SFT: step-by-step accuracy on validation", "step", "%", accuracy),
        report.Panel("Held-out accuracy at the end", "form of the question", "%", bars),
        report.Panel("Branches: loss on the chosen responses", "step", "nats per token", lines(("ntp_loss", "", "-"))),
        report.Panel("Branches: rewards", "step", "beta * (logp - ref_logp)", rewards),
        report.Panel("Branches: chosen above rejected", "step", "share of pairs", lines(("reward_accuracy", "", "-"))),
    ]
    report.save_panels(path, f"Digits demo, seed {result.settings.seed}", panels)


def _points(curve: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [point["step"] for point in curve], [point[key] for point in curve]


def _standard_error(accuracy: float, count: float, **_: float) -> float:
    return 100 * math.sqrt(accuracy * (1 - accuracy) / count)
