"""Executes a training run of the study, and evaluates the trained model.

The code calls a run a row, because its results are a row of a table.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import results, tables, training
from benchmarks.study.declare import StudyRow
from benchmarks.study.settings import AnySettings
from mpo_ext.demo.train import make_recipe
from mpo_ext.train.recipe import Recipe, ReferenceRecipe, RewardShiftRecipe

_SYNCS = 4  # number of times that TR-DPO syncs its reference in a run
_LOGGED_STEPS = 5  # number of steps averaged at the beginning and at the end of a run
_LOG_KEYS = ("loss", "dpo_loss", "bco_loss", "ntp_loss", "reward_accuracy", "chosen_reward", "rejected_reward",
             "grad_norm", "reward_shift")  # fmt: skip


def run_row(folder: Path, settings: AnySettings, row: str) -> dict[str, Any]:
    """Trains a model as the run ``row`` declares, evaluates it, writes the result and returns it.

    Args:
        folder: Folder of the starting model, which ``start.prepare`` has filled.
        settings: Settings of the starting model.
        row: Name of the run, a key of ``StudyTask.rows``.

    Returns:
        The result. ``evaluation`` has the accuracies. ``log`` has the mean metrics of the first five and of the last
        five steps.
    """
    lines: list[Mapping[str, float]] = []
    with training.logged(folder), training.Stopwatch() as watch:
        model, processor = training.new_model(settings)
        model.load_state_dict(torch.load(training.start_file(folder), weights_only=True))
        recipe = row_recipe(
            tables.TASKS[settings.task].rows[row], settings, folder, folder / "runs" / results.slug(row)
        )
        training.train(recipe, model, processor, on_step=lambda _, line: lines.append(dict(line)))
        evaluation = training.evaluate_held_out(model, processor, settings)
    log = {"first": _means(lines[:_LOGGED_STEPS]), "last": _means(lines[-_LOGGED_STEPS:])}
    result = {"status": "measured", "evaluation": evaluation, "log": log, "steps": len(lines), **watch.seconds}
    return results.save(folder.parent, settings, row, result)


def row_recipe(row: StudyRow, settings: AnySettings, folder: Path, out: Path) -> Recipe:
    """Returns the training recipe of the run ``row``, which writes to ``out``.

    ``folder`` holds the starting model and its pairs.
    """
    recipe = make_recipe(
        training.pair_file(folder, row.pairs), out, loss=dict(row.loss), steps=settings.branch_steps,
        batch=settings.branch_batch, rate=settings.branch_rate * row.rate, schedule="cosine", settings=settings,
        warmup=settings.branch_warmup,
        reference=training.reference_file(folder, row.pairs),
    )  # fmt: skip
    reference = recipe.reference
    if row.is_synced:
        every = max(1, settings.branch_steps // _SYNCS)
        reference = ReferenceRecipe(kind="copy", sync_every=every, sync_mix=0.6)
    return dataclasses.replace(recipe, reference=reference, reward_shift=RewardShiftRecipe(**row.reward_shift))


def _means(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = [key for key in _LOG_KEYS if all(key in line for line in lines)]
    return {key: statistics.fmean(line[key] for line in lines) for key in keys}
