"""Trains the starting model of the task "perception", and makes pairs from its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import InternVLForConditionalGeneration

from benchmarks.study import perception, results, training
from benchmarks.study.declare import TEXT
from benchmarks.study.settings import StudySettings
from mpo_ext.data import Pair
from mpo_ext.data.jsonl import dump_line
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS, sample, write_items
from mpo_ext.demo.train import METHODS, make_recipe, write_sft
from mpo_ext.files import atomic_write
from mpo_ext.generate import runner
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.transformers_engine import TransformersEngine

_LATE = 0.5  # if a larger fraction of an answer is kept, few continuations are wrong


def make_files(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
    """Samples answers of the starting model, and makes pairs from them.

    Returns:
        Two dicts. The first maps each file name to pairs. The second maps each kind of pairs to its sampling summary.
    """
    pool, summaries = _sample(model, processor, settings, rng, folder)
    return choose(pool, settings, rng), summaries


def train_start(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains the starting model in place, with SFT on correct responses.

    There are three kinds of questions: with an image of the digits, with the digits in words, and with a missing
    image.

    Returns:
        A dict for each evaluation: ``step``, ``loss``, and the validation accuracy on each kind of validation
        questions.
    """
    splits = digits.load_digits()
    tasks = digits.sample_tasks(digits.part(splits["train"], 0, settings.sft_digits), settings.sft_questions, rng)
    blind = int(settings.sft_blind_share * len(tasks))
    named = blind + int(settings.sft_text_share * len(tasks))
    tasks[:blind] = map(digits.without_image, tasks[:blind])
    tasks[blind:named] = map(digits.in_words, tasks[blind:named])
    validation = training.adding_tasks(splits["validation"], settings.validation_tasks)
    curve: list[dict[str, float]] = []

    def note(step: int, line: Mapping[str, float]) -> None:
        if step % settings.sft_check_steps == 0 or step == settings.sft_steps:
            columns = training.evaluate_columns(model, processor, validation)
            accuracy = {column: numbers["accuracy"] for column, numbers in columns.items()}
            curve.append({"step": step, "loss": line["loss"], **accuracy})

    recipe = make_recipe(
        write_sft(folder, tasks), folder / "runs" / "start", loss=METHODS["SFT"], steps=settings.sft_steps,
        batch=settings.sft_batch, rate=settings.sft_rate, schedule="linear", settings=settings,
        warmup=settings.sft_warmup,
    )  # fmt: skip
    training.train(recipe, model, processor, on_step=note)
    return curve


def _sample(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
    """Samples answers about digits that the starting model has not seen, and makes pairs from them.

    Returns:
        (pairs, summaries). Both are dicts with the same keys, the kinds of pairs. ``choose`` explains the kinds.
    """
    engine = TransformersEngine(model, processor, name=f"digits study, seed {settings.seed}", batch_size=BATCH_SIZE)
    unseen = digits.part(digits.load_digits()["train"], settings.sft_digits, None)
    for form, count in (("direct", settings.direct_questions), ("cot", settings.questions)):
        write_items(folder, form, digits.sample_tasks(unseen, count, rng, form))
    with atomic_write(folder / f"{TEXT}.jsonl") as file:
        for task in digits.sample_tasks(unseen, settings.text_questions, rng, "cot"):
            item = {"question": digits.in_words(task).question, "answer_gt": str(task.answer), "form": "cot"}
            file.write(dump_line(item))
    drawn = SamplingConfig(temperature=settings.temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    common: dict[str, Any] = {"sampling": drawn, "seed": settings.seed, "matcher": digits.MATCHER}
    pool: dict[str, list[Pair]] = {}
    summaries: dict[str, Any] = {}

    def run(name: str, source: str, pipeline: runner.PairPipeline, limit: int | None = None) -> None:
        place = f"sample-{results.slug(name)}"
        pairs, summary = sample(pipeline, engine, folder, place, items=source, limit=limit)
        summaries[name] = summary.to_dict()
        pool[name] = list({pair.key(): pair for pair in pairs}.values())

    for source, form in (*zip(digits.FORMS, digits.FORMS, strict=True), (TEXT, "cot")):
        config = CorrectnessConfig(samples=settings.samples, pairs_per_question=settings.pairs_per_question,
                                   style=digits.STYLES[form], **common)  # fmt: skip
        run(source, source, Correctness(config))
    for name, keep in perception.KEEPS.items():
        continuations = settings.late_continuations if keep > _LATE else 1
        blind = DropoutNTPConfig(keep=keep, samples=continuations, sample_chosen=True, style=digits.STYLES["cot"],
                                 **common)  # fmt: skip
        run(name, "cot", DropoutNTP(blind), settings.dropout_ntp_questions)
    return pool, summaries


def choose(
    pool: Mapping[str, Sequence[Pair]], settings: StudySettings, rng: np.random.Generator
) -> dict[str, list[Pair]]:
    """Chooses the pairs of each file at random. Returns a dict from file name to pairs.

    ``pool`` maps each kind to its pairs. Three kinds have correctness pairs: "direct", "cot" (step by step) and "text"
    (the question states the digits in words). The other kinds, the keys of ``perception.KEEPS``, have DropoutNTP
    pairs.

    Raises:
        RuntimeError: If a file would have no pairs.
    """
    mixed_kinds = ("direct", "cot", "DropoutNTP 0.5")
    shuffled = {name: [pool[name][index] for index in rng.permutation(len(pool[name]))] for name in pool}
    counts = [round(share * settings.pairs) for share in settings.mixed_shares]
    taken = [pair for name, number in zip(mixed_kinds, counts, strict=True) for pair in shuffled[name][:number]]
    mixed = list({pair.key(): pair for pair in taken}.values())
    mixed = [mixed[index] for index in rng.permutation(len(mixed))]
    count = min(settings.kind_pairs, *(len(shuffled[name]) for name in ("cot", *perception.KEEPS)))
    files = {
        "mixed": mixed,
        **{name: mixed[: round(share * len(mixed))] for name, share in perception.SHARES.items()},
        "correctness": shuffled["cot"][:count],
        "correctness and DropoutNTP": [
            *shuffled["cot"][: count - count // 2],
            *shuffled["DropoutNTP 0.5"][: count // 2],
        ],
        **{name: shuffled[name][:count] for name in perception.KEEPS},
        TEXT: shuffled[TEXT][: settings.pairs],
    }
    for name, pairs in files.items():
        if not pairs:
            made = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in pool.items())
            raise RuntimeError(f"pairs {name!r} must be at least one, got none of {made}")
    return files
