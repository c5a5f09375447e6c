"""Runs the demo and writes its results.

The demo trains a model by SFT and makes preference pairs from its answers. Each of three methods (SFT, DPO, MPO)
then trains a copy of this model further on the pairs. Finally, the first model and the three copies are evaluated.
"""

import copy
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import InternVLForConditionalGeneration

from mpo_ext import report
from mpo_ext.demo import digits, reading, story, tables
from mpo_ext.demo.measures import measure, standard_error
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.pairs import make_pairs
from mpo_ext.demo.results import DemoResult
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.stages import START_STAGE, Advance, Stages
from mpo_ext.demo.start import load_shipped, load_trained, new_model, shipped_start, weights_digest
from mpo_ext.demo.tables import LABELS, START
from mpo_ext.demo.train import METHODS, respond, train_branch, train_start
from mpo_ext.demo.train import START as START_RUN
from mpo_ext.files import atomic_write

_COLORS = {START: "0.6", "SFT": "C0", "DPO": "C3", "MPO": "C2"}
_EVALUATION_SEED = 1  # the same held-out questions for every run
_PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "pillow")
QUICK_NOTE = (
    "This is a quick run: its model is too small and its training too short to learn anything, by design. It shows "
    "that all parts work. The results below mean nothing; run the demo without --quick."
)


def run(
    *,
    out: Path,
    seeds: Sequence[int],
    quick: bool,
    threads: int,
    backend: str | None,
    from_scratch: bool = False,
    command: str = "mpo-ext demo",
) -> None:
    """Runs the demo for each seed, and writes tables, curves, numbers, pairs and ``demo.html``.

    To resume an interrupted run, call this function again with the same arguments.

    Args:
        out: Existing folder for the results.
        seeds: Seeds of the runs. Files of the first seed are in ``out``, files of another seed N in ``out/seed-N``.
            The curves and the page show the first seed.
        quick: Whether to use ``Settings.quick``.
        threads: Number of CPU threads.
        backend: Backend of the loss; None: the best installed backend.
        from_scratch: Whether to train the SFT model instead of loading it from the package.
        command: Command line to record in the results.
    """
    torch.set_num_threads(threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # a GPU does not pay off for such a small model
    console = Console()
    begin = time.perf_counter()
    results: list[DemoResult] = []
    if quick:
        console.print(QUICK_NOTE)
    for seed in seeds:
        settings = Settings.quick(seed) if quick else Settings(seed=seed)
        settings = dataclasses.replace(settings, backend=backend, uses_shipped_start=not from_scratch)
        folder = out / f"seed-{seed}" if results else out
        result, responses = run_seed(settings, folder, console)
        if not results:
            save_curves(out / "curves.png", result)
            note = QUICK_NOTE if quick else ""
            story.save(out / "demo.html", result, held_out_tasks(settings), responses, folder, note=note)
        results.append(result)
        # Written after every seed, so an interrupted run keeps the results of its complete seeds.
        save_results(out / "results.json", results, command)
        with atomic_write(out / "table.md") as file:
            file.write(tables.markdown(results).encode())
    tables.print_tables(console, results)
    console.print(f"{time.perf_counter() - begin:.0f} s in total. Open {out / 'demo.html'}, the page of this demo")


def run_seed(settings: Settings, folder: Path, console: Console) -> tuple[DemoResult, dict[str, list[str]]]:
    """Runs or resumes the demo with one seed, and writes the pairs and the training runs to ``folder``.

    Returns:
        (result, responses). The keys of the dict ``responses`` are those of ``tables.LABELS``: the SFT model and the
        methods. A value is the list of the model's responses to ``held_out_tasks``.
    """
    console.rule(f"seed {settings.seed}")
    stages = Stages(console, folder, settings)
    info = shipped_start(settings)
    start, processor, sft_curve = _make_start(settings, stages, folder, info)
    name = f"digits demo, seed {settings.seed}, weights {weights_digest(start)}"

    def pairs(_: Advance) -> dict[str, Any]:
        rng = np.random.default_rng([settings.seed, 1])
        made = make_pairs(start, processor, settings, rng, folder, name=name, stream=sys.stderr)
        summaries = {run: summary.to_dict() for run, summary in made.summaries.items()}
        return {"counts": made.counts, "left_out": made.left_out, "sampling": summaries}

    text = "the start answers questions; right answers are paired with wrong ones, and with answers continued blindly"
    made = stages.run("pairs", text, pairs)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(made["counts"].items()))
    console.print(f"  {sum(made['counts'].values())} pairs, checked: {counts}", markup=False, highlight=False)

    curves: dict[str, list[dict[str, float]]] = {}
    for method, weights in METHODS.items():
        loss = ", ".join(f"{term.removesuffix('_weight')} {weight:g}" for term, weight in weights.items())

        def branch(_: Advance, method: str = method) -> list[dict[str, float]]:
            return train_branch(copy.deepcopy(start), processor, folder / "pairs.jsonl", method, settings, folder)

        curves[method] = stages.run(
            LABELS[method], f"the start is trained further on the pairs with weights {loss}", branch
        )

    tasks = held_out_tasks(settings)
    responses: dict[str, list[str]] = {}
    for method in LABELS:

        def answer(advance: Advance, method: str = method) -> list[str]:
            model = copy.deepcopy(start)
            if method != START:
                load_trained(model, folder / "runs" / method)
            return [text for text, _ in respond(model, processor, tasks, on_batch=advance)]

        text = f"the model answers {len(tasks)} questions about held-out digits"
        responses[method] = stages.run(f"evaluation of {LABELS[method]}", text, answer, total=len(tasks))
    result = DemoResult(
        settings=settings,
        seconds=stages.seconds,
        start=info,
        sft_curve=sft_curve,
        pair_counts=made["counts"],
        pairs_left_out=made["left_out"],
        sampling=made["sampling"],
        branch_curves=curves,
        accuracy={method: measure(tasks, texts, settings.prior_step) for method, texts in responses.items()},
    )
    return result, responses


def _make_start(
    settings: Settings, stages: Stages, folder: Path, info: dict[str, Any] | None
) -> tuple[InternVLForConditionalGeneration, DigitsProcessor, list[dict[str, float]]]:
    """Loads or trains the SFT model. Returns the model, its processor and its training log.

    ``info`` is the result of ``shipped_start``. It describes the SFT model in the package. If ``info`` is None, a
    model is trained. The package's model has an empty log.
    """
    model, processor = new_model(settings)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6

    def train(_: Advance) -> list[dict[str, float]]:
        return train_start(copy.deepcopy(model), processor, settings, np.random.default_rng(settings.seed), folder)

    if info is not None:
        load_shipped(model, info)
        text = f"a {size:.2f} M parameter {type(model).__name__} from the package, made by `{info['command']}`"
        stages.run(START_STAGE, text, lambda _: None)
        return model, processor, []
    text = f"a {size:.2f} M parameter {type(model).__name__} learns from texts whose digits often count up"
    curve = stages.run(START_STAGE, text, train)
    load_trained(model, folder / "runs" / START_RUN)
    return model, processor, curve


def held_out_tasks(settings: Settings) -> list[reading.ReadingTask]:
    """Returns the questions for the evaluation. All questions are about held-out digits.

    The first questions ask for a direct answer. The other questions ask for a step-by-step answer.
    """
    rng = np.random.default_rng(_EVALUATION_SEED)
    split = digits.load_digits()["held-out"]
    counts = {"direct": settings.direct_evaluation_tasks, "cot": settings.evaluation_tasks}
    return [
        task
        for form, count in counts.items()
        for task in reading.sample_tasks(split, count, rng, form, side=settings.side)
    ]


def save_results(path: Path, results: Sequence[DemoResult], command: str) -> None:
    """Writes all results as JSON, with the settings and package versions that reproduce them."""
    document = {
        "command": command,
        "versions": {
            "mpo_ext": importlib.import_module("mpo_ext").__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "runs": [dataclasses.asdict(result) for result in results],
    }
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=1).encode())


def save_curves(path: Path, result: DemoResult) -> None:
    """Writes a picture of the training curves and of the final accuracies."""

    def lines(*quantities: tuple[str, str, str]) -> list[report.Line]:
        drawn = []
        for method, curve in result.branch_curves.items():
            for key, suffix, style in quantities:
                if key not in curve[0]:
                    continue  # SFT has no rewards
                x, y = _points(curve, key)
                drawn.append(report.Line(f"{method}{suffix}", x, y, _COLORS[method], style, smooth=9))
        return drawn

    accuracy = [
        report.Bars(
            label=LABELS[method],
            names=[tables.FORM_NAMES[form] for form in digits.FORMS],
            values=[100 * forms[form]["accuracy"] for form in digits.FORMS],
            errors=[standard_error(**forms[form]) for form in digits.FORMS],
            color=_COLORS[method],
        )
        for method, forms in result.accuracy.items()
    ]
    rewards = lines(("chosen_reward", " chosen", "-"), ("rejected_reward", " rejected", "--"))
    panels = [
        report.Panel("Held-out accuracy at the end", "form of the question", "%", accuracy),
        report.Panel("Branches: loss on the chosen responses", "step", "nats per token", lines(("ntp_loss", "", "-"))),
        report.Panel("Branches: rewards", "step", "beta * (logp - ref_logp)", rewards),
        report.Panel("Branches: chosen above rejected", "step", "share of pairs", lines(("reward_accuracy", "", "-"))),
    ]
    if result.sft_curve:
        loss = [report.Line("", *_points(result.sft_curve, "loss"), smooth=9)]
        panels.append(report.Panel("SFT start: loss", "step", "nats per token", loss))
    report.save_panels(path, f"Digits demo, seed {result.settings.seed}", panels)


def _points(curve: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [point["step"] for point in curve], [point[key] for point in curve]
