"""Trains and evaluates the models of the study."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from benchmarks.study.declare import TEXT
from benchmarks.study.results import slug
from benchmarks.study.settings import AnySettings, PriorSettings
from mpo_ext.data import Pair
from mpo_ext.demo import digits, reading
from mpo_ext.demo.experiment import held_out_tasks
from mpo_ext.demo.measures import measure_digits
from mpo_ext.demo.model import DigitsProcessor, build_model, build_processor
from mpo_ext.demo.train import respond, score, summarize
from mpo_ext.train.encode import Encoder, Sample, SkippedPair
from mpo_ext.train.loop import Trainer
from mpo_ext.train.recipe import Recipe

_EVALUATION_SEED = 1  # every seed and row answers the same held-out questions

_encoded: dict[str, Sample | SkippedPair] = {}  # by ``Pair.key()``, for all rows of this process


class CachingEncoder(Encoder):
    """An encoder that caches encoded pairs for all training runs of this process."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(vars(encoder))

    def encode(self, pair: Pair, name: str) -> Sample | SkippedPair:
        key = pair.key()  # unique, because image paths are absolute
        if key not in _encoded:
            _encoded[key] = super().encode(pair, name)
        return dataclasses.replace(_encoded[key], name=name)


def clear_encoded() -> None:
    _encoded.clear()


def train(
    recipe: Recipe,
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
) -> None:
    """Trains the model in place, and deletes the output folder of the run.

    ``on_step`` is called after each step with the step number and the metrics. Raises KeyboardInterrupt if a signal
    has stopped the trainer.
    """
    trainer = Trainer(recipe, model=model, processor=processor, on_step=on_step, save=False)
    trainer.data.encoder = CachingEncoder(trainer.data.encoder)
    if trainer.run() != 0:
        raise KeyboardInterrupt  # the trainer has caught the signal
    shutil.rmtree(recipe.output.dir, ignore_errors=True)


def new_model(settings: AnySettings) -> tuple[InternVLForConditionalGeneration, DigitsProcessor]:
    """Returns an untrained model, whose weights depend on the seed, and its processor."""
    torch.manual_seed(settings.seed)
    side = settings.side if isinstance(settings, PriorSettings) else None
    processor = build_processor(side)
    size = {"hidden_size": settings.hidden_size, "layers": settings.layers, "side": side or 2}
    return build_model(processor.tokenizer, **size), processor


def evaluate_columns(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    tasks: Mapping[str, Sequence[digits.GridTask]],
) -> dict[str, dict[str, float]]:
    """Lets the model answer questions greedily. Returns the result of ``summarize`` for each kind of question.

    ``tasks`` is a dict from kind to questions. A kind is, for example, "cot" (step by step).
    """
    return {column: summarize(asked, respond(model, processor, asked)) for column, asked in tasks.items()}


def evaluate_held_out(
    model: InternVLForConditionalGeneration, processor: DigitsProcessor, settings: AnySettings
) -> Mapping[str, Mapping[str, Any]]:
    """Lets the model answer the held-out questions greedily. Returns accuracy and other measures by kind of question.

    An example of a kind is "cot" (step by step). For the task "language-prior", the measures of "cot" also include the
    results of ``measure_digits``, and the result of ``encode_right`` under the key ``right``.
    """
    if not isinstance(settings, PriorSettings):
        tasks = adding_tasks(digits.load_digits()["held-out"], settings.evaluation_tasks)
        return evaluate_columns(model, processor, tasks)
    evaluation: dict[str, dict[str, Any]] = {}
    for column, asked in reading_tasks(settings).items():
        responses = respond(model, processor, asked)
        evaluation[column] = summarize(asked, responses)
        if column == "cot":
            texts = [text for text, _ in responses]
            evaluation[column] |= measure_digits(asked, texts, settings.prior_step)
            evaluation[column]["right"] = encode_right([value is True for value in score(asked, texts)])
    return evaluation


def encode_right(right: Sequence[bool]) -> str:
    """Encodes which answers are right as a hexadecimal text: a bit 1, then one bit per answer.

    The leading 1 keeps the number of answers. Right, wrong, right gives "d" (binary 1101).
    """
    return f"{int('1' + ''.join(str(int(value)) for value in right), 2):x}"


def adding_tasks(split: digits.Digits, count: int) -> dict[str, list[digits.Task]]:
    """Returns a dict from each kind to ``count`` questions about sums of digits. The seed of the questions is fixed.

    The kinds are "direct", "cot" (step by step) and "text" (digits stated in words, no image).
    """
    rng = np.random.default_rng(_EVALUATION_SEED)
    tasks = {form: digits.sample_tasks(split, count, rng, form) for form in digits.FORMS}
    return {**tasks, TEXT: list(map(digits.in_words, digits.sample_tasks(split, count, rng, "cot")))}


def reading_tasks(settings: PriorSettings) -> dict[str, list[reading.ReadingTask]]:
    """Returns the held-out questions of the task "language-prior".

    The result is a dict from kind to questions. The kinds are "direct", "cot" (step by step) and "text" (digits stated
    in words, no image). The demo asks the same "direct" and "cot" questions.
    """
    tasks = held_out_tasks(settings)
    columns = {form: [task for task in tasks if task.form == form] for form in digits.FORMS}
    split, count = digits.load_digits()["held-out"], settings.text_evaluation_tasks
    rng = np.random.default_rng(_EVALUATION_SEED)
    return {**columns, TEXT: reading.sample_tasks(split, count, rng, "cot", side=settings.side, is_named=True)}


def start_file(folder: Path) -> Path:
    """Returns the path of the weights of the starting model in ``folder``."""
    return folder / "start.pt"


def pair_file(folder: Path, name: str) -> Path:
    return folder / f"pairs-{slug(name)}.jsonl"


def reference_file(folder: Path, name: str) -> Path:
    return folder / f"reference-{slug(name)}.jsonl"


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Appends stderr of the ``with`` block to ``log.txt`` in ``folder``."""
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        yield


class Stopwatch:
    """Measures the elapsed and the CPU time of a ``with`` block.

    Afterwards, the attribute ``seconds`` is a dict with the keys ``seconds`` (elapsed) and ``cpu_seconds``.
    """

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._begin
        self.seconds = {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
