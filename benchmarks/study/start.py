"""Prepares a starting model of the study: its weights, its pair files, and their reference log-probs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from benchmarks.study import perception_start, prior_start, results, training
from benchmarks.study.declare import START
from benchmarks.study.labels import label_shares
from benchmarks.study.settings import AnySettings, PriorSettings
from mpo_ext.data import Pair, write_pairs
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.train import METHODS, make_recipe


def prepare(folder: Path, settings: AnySettings, row: str = START) -> dict[str, Any]:
    """Makes a starting model, its pair files and the reference log-probs. If they exist, returns the saved result.

    If only the weights are missing, the model is trained again. It must then give the same answers as before, because
    earlier training runs began from the old weights. Files in ``folder`` from other settings are deleted.

    Args:
        folder: Folder of the starting model for this seed.
        settings: Settings of the starting model.
        row: Name of the starting model.

    Returns:
        The result of the starting model. ``evaluation`` has the accuracies, ``pairs`` the number of pairs by file, and
        ``sampling`` the summaries by kind of pairs. ``labels`` has the result of ``label_shares`` by file; it is empty
        for the task "perception". ``curve`` has measurements during training.

    Raises:
        RuntimeError: If no pair can be made for a file, or if a model that is trained again gives other answers.
    """
    known = results.read(folder.parent, settings, row)
    if known is not None and training.start_file(folder).exists():
        return known
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # without a result, these files come from other settings
        if path.name not in (results.RESULTS, prior_start.TRAINED):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    training.clear_encoded()
    with training.logged(folder), training.Stopwatch() as watch:
        model, processor = training.new_model(settings)
        rng = np.random.default_rng(settings.seed)
        if isinstance(settings, PriorSettings):
            curve = prior_start.train_start(model, processor, settings, rng, folder)
            files, summaries = prior_start.make_files(model, processor, settings, folder, has_all=row == START)
        else:
            curve = perception_start.train_start(model, processor, settings, rng, folder)
            files, summaries = perception_start.make_files(model, processor, settings, rng, folder)
        for name, pairs in files.items():
            write_pairs(training.pair_file(folder, name), pairs)
            _compute_reference(model, processor, settings, name, folder)
        is_prior = isinstance(settings, PriorSettings)
        labels = {name: label_shares(pairs) for name, pairs in files.items()} if is_prior else {}
        evaluation = training.evaluate_held_out(model, processor, settings)
        if known is not None and results.is_measured(known) and not _is_same(known, evaluation, files):
            raise RuntimeError(
                f"a start that is made again must equal the measured start, got other answers or pairs: remove "
                f"the results of seed {settings.seed}, so that its rows run again"
            )
        torch.save(model.state_dict(), training.start_file(folder))
    training.clear_encoded()  # most of the encoded pairs belong to the first training run
    result = {
        "status": "measured",
        "evaluation": evaluation,
        "pairs": {name: len(pairs) for name, pairs in files.items()},
        "sampling": summaries,
        "labels": labels,
        "curve": curve,
        **watch.seconds,
    }
    return results.save(folder.parent, settings, row, result)


def _is_same(
    known: Mapping[str, Any], evaluation: Mapping[str, Mapping[str, Any]], files: Mapping[str, Sequence[Pair]]
) -> bool:
    """Returns whether the earlier result ``known`` has the same evaluation and the same numbers of pairs."""
    pairs = {name: len(made) for name, made in files.items()}
    return all(
        evaluation[column][quantity] == value
        for column, quantities in known["evaluation"].items()
        for quantity, value in quantities.items()
    ) and all(pairs.get(name) == count for name, count in known.get("pairs", {}).items())


def _compute_reference(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: AnySettings,
    name: str,
    folder: Path,
) -> None:
    """Writes the reference log-probs of the pair file ``name``: the log-probs under the starting model.

    The trainer computes them before its first step, so one step with a learning rate of 0 is run.
    """
    recipe = make_recipe(
        training.pair_file(folder, name), folder / "runs" / "reference", loss=METHODS["MPO"], steps=1,
        batch=settings.branch_batch, rate=0.0, schedule="constant", settings=settings, warmup=0.0,
        reference=training.reference_file(folder, name),
    )  # fmt: skip
    training.train(recipe, copy.deepcopy(model), processor)
