"""Prepares a seed of the study: the start model, the files of pairs, and the log-probs of the reference."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from benchmarks.study import results, tables, training
from benchmarks.study.settings import StudySettings
from mpo_ext.data import Pair, write_pairs
from mpo_ext.data.jsonl import dump_line
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS, read_made, write_items
from mpo_ext.demo.train import METHODS, make_recipe, write_sft
from mpo_ext.files import atomic_write
from mpo_ext.generate import runner
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.transformers_engine import TransformersEngine

_LATE = 0.5  # if a larger fraction of an answer is kept, few continuations are wrong
_BLOCK_SIZE = 2048


def prepare(folder: Path, settings: StudySettings, row: str = tables.START) -> dict[str, Any]:
    """Makes the start model of a seed, the files of pairs and the reference log-probs, unless they exist.

    ``folder`` is the folder of the seed. Files from other settings are deleted.

    Returns:
        The result of the start: ``evaluation`` of the start model, ``pairs`` (number of pairs by file), ``sampling``
        (summaries by kind of pairs) and ``curve`` (evaluations during training).

    Raises:
        RuntimeError: If the model's answers gave no pair for a file.
    """
    result = results.read(folder.parent, settings, row)
    if result is not None and training.start_file(folder).exists():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # without a result, these files come from other settings
        if path.name != results.RESULTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    training.clear_encoded()
    with training.logged(folder), training.Stopwatch() as watch:
        torch.manual_seed(settings.seed)
        rng = np.random.default_rng(settings.seed)
        model, processor = training.make_model(settings)
        curve = _train_start(model, processor, settings, rng, folder)
        pool, summaries = _sample(model, processor, settings, rng, folder)
        files = choose(pool, settings, rng)
        for name, pairs in files.items():
            write_pairs(training.pair_file(folder, name), pairs)
            _compute_reference(model, processor, settings, name, folder)
        evaluation = training.evaluate_held_out(model, processor, settings)
        torch.save(model.state_dict(), training.start_file(folder))
    training.clear_encoded()  # most of the encoded pairs belong to the first training run
    result = {
        "status": "measured",
        "evaluation": evaluation,
        "pairs": {name: len(pairs) for name, pairs in files.items()},
        "sampling": summaries,
        "curve": curve,
        **watch.seconds,
    }
    return results.save(folder.parent, settings, row, result)


def _train_start(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains the start model, in place, on correct responses to questions.

    Most questions have an image. Some have lost their image, and some name the digits in words.

    Returns:
        For each evaluation, ``step``, ``loss`` and the validation accuracy of each column.
    """
    splits = digits.load_digits()
    tasks = digits.sample_tasks(_part(splits["train"], 0, settings.sft_digits), settings.sft_questions, rng)
    blind = int(settings.sft_blind_share * len(tasks))
    named = blind + int(settings.sft_text_share * len(tasks))
    tasks[:blind] = map(digits.without_image, tasks[:blind])
    tasks[blind:named] = map(digits.in_words, tasks[blind:named])
    validation = training.evaluation_tasks(splits["validation"], settings.validation_tasks)
    curve: list[dict[str, float]] = []

    def note(step: int, line: Mapping[str, float]) -> None:
        if step % settings.sft_check_steps == 0 or step == settings.sft_most_steps:
            columns = training.evaluate_columns(model, processor, validation)
            accuracy = {column: numbers["accuracy"] for column, numbers in columns.items()}
            curve.append({"step": step, "loss": line["loss"], **accuracy})

    recipe = make_recipe(
        write_sft(folder, tasks), folder / "runs" / "start", loss=METHODS["SFT"], steps=settings.sft_most_steps,
        batch=settings.sft_batch, rate=settings.sft_rate, schedule="linear", settings=settings,
    )  # fmt: skip
    training.train(recipe, model, processor, on_step=note)
    return curve


def _part(split: digits.Digits, begin: int, end: int | None) -> digits.Digits:
    """Returns the digits of a split from index ``begin`` to ``end`` (exclusive; None: to the last)."""
    part = slice(begin, end)
    return digits.Digits(split.images[part], split.values[part], split.indices[part])


def _sample(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
    """Samples answers about digits that the start model has not seen, and makes pairs from them.

    Returns the pairs and the sampling summaries, both by kind of pairs (the kinds are those of ``choose``).
    """
    engine = TransformersEngine(model, processor, name=f"digits study, seed {settings.seed}", batch_size=BATCH_SIZE)
    unseen = _part(digits.load_digits()["train"], settings.sft_digits, None)
    for form, count in (("direct", settings.direct_questions), ("cot", settings.questions)):
        write_items(folder, form, digits.sample_tasks(unseen, count, rng, form))
    with atomic_write(folder / f"{tables.TEXT}.jsonl") as file:
        for task in digits.sample_tasks(unseen, settings.text_questions, rng, "cot"):
            item = {"question": digits.in_words(task).question, "answer_gt": str(task.answer), "form": "cot"}
            file.write(dump_line(item))
    drawn = SamplingConfig(temperature=settings.temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    common: dict[str, Any] = {"sampling": drawn, "seed": settings.seed, "matcher": digits.MATCHER}
    pool: dict[str, list[Pair]] = {}
    summaries: dict[str, Any] = {}

    def sample(name: str, source: str, pipeline: runner.PairPipeline, limit: int | None = None) -> None:
        out = folder / f"sample-{results.slug(name)}"
        summary = runner.run(pipeline, engine, folder / f"{source}.jsonl", out, block_size=_BLOCK_SIZE, limit=limit,
                               image_root=str(folder))  # fmt: skip
        assert summary is not None  # only a run of several processes returns None
        summaries[name] = summary.to_dict()
        outputs = [output for output in pipeline.outputs if output != "unsolved"]
        pairs = [pair for output in outputs for pair in read_made(out / f"{output}.jsonl", folder)]
        pool[name] = list({pair.key(): pair for pair in pairs}.values())

    for source, form in (*zip(digits.FORMS, digits.FORMS, strict=True), (tables.TEXT, "cot")):
        config = CorrectnessConfig(samples=settings.samples, pairs_per_question=settings.pairs_per_question,
                                   style=digits.STYLES[form], **common)  # fmt: skip
        sample(source, source, Correctness(config))
    for name, keep in tables.KEEPS.items():
        continuations = settings.late_continuations if keep > _LATE else 1
        blind = DropoutNTPConfig(keep=keep, samples=continuations, sample_chosen=True, style=digits.STYLES["cot"],
                                 **common)  # fmt: skip
        sample(name, "cot", DropoutNTP(blind), settings.dropout_ntp_questions)
    return pool, summaries


def choose(
    pool: Mapping[str, Sequence[Pair]], settings: StudySettings, rng: np.random.Generator
) -> dict[str, list[Pair]]:
    """Returns the pairs of each file in ``tables.PAIR_FILES``, chosen at random from ``pool``.

    ``pool`` holds the pairs by kind: "direct", "cot" (step by step), "text" and the keys of ``tables.KEEPS``. If a
    file would have no pairs, RuntimeError is raised.
    """
    mixed_kinds = ("direct", "cot", "DropoutNTP 0.5")
    shuffled = {name: [pool[name][index] for index in rng.permutation(len(pool[name]))] for name in pool}
    counts = [round(share * settings.pairs) for share in settings.mixed_shares]
    taken = [pair for name, number in zip(mixed_kinds, counts, strict=True) for pair in shuffled[name][:number]]
    mixed = list({pair.key(): pair for pair in taken}.values())
    mixed = [mixed[index] for index in rng.permutation(len(mixed))]
    count = min(settings.kind_pairs, *(len(shuffled[name]) for name in ("cot", *tables.KEEPS)))
    files = {
        "mixed": mixed,
        **{name: mixed[: round(share * len(mixed))] for name, share in tables.SHARES.items()},
        "correctness": shuffled["cot"][:count],
        "correctness and DropoutNTP": [
            *shuffled["cot"][: count - count // 2],
            *shuffled["DropoutNTP 0.5"][: count // 2],
        ],
        **{name: shuffled[name][:count] for name in tables.KEEPS},
        tables.TEXT: shuffled[tables.TEXT][: settings.pairs],
    }
    for name, pairs in files.items():
        if not pairs:
            made = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in pool.items())
            raise RuntimeError(f"pairs {name!r} must be at least one, got none of {made}")
    return files


def _compute_reference(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    name: str,
    folder: Path,
) -> None:
    """Writes the start model's log-probs of the file of pairs ``name``, which the rows use as their reference.

    The trainer computes them before a training step, whose learning rate is 0.
    """
    recipe = make_recipe(
        training.pair_file(folder, name), folder / "runs" / "reference", loss=METHODS["MPO"], steps=1,
        batch=settings.branch_batch, rate=0.0, schedule="constant", settings=settings,
        reference=training.reference_file(folder, name),
    )  # fmt: skip
    training.train(recipe, copy.deepcopy(model), processor)
