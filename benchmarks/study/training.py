"""Trains and evaluates models for the starts and the rows of the study."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import InternVLForConditionalGeneration

from benchmarks.study import tables
from benchmarks.study.results import slug
from benchmarks.study.settings import StudySettings
from mpo_ext.data import Pair
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor, build_model, build_processor
from mpo_ext.demo.train import evaluate
from mpo_ext.train.encode import Encoder, Sample, SkippedPair
from mpo_ext.train.loop import Trainer
from mpo_ext.train.recipe import Recipe

_EVALUATION_SEED = 1  # every seed and row answers the same held-out questions

_encoded: dict[str, Sample | SkippedPair] = {}  # by ``Pair.key()``, for all rows of this process


class CachingEncoder(Encoder):
    """An encoder that caches the encoded pairs for later rows, because encoding takes a quarter of a step."""

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
    """Trains the model in place, and deletes the output folder of the run. ``on_step`` is called after each step."""
    trainer = Trainer(recipe, model=model, processor=processor, on_step=on_step, save=False)
    trainer.data.encoder = CachingEncoder(trainer.data.encoder)
    if trainer.run() != 0:
        raise KeyboardInterrupt  # the trainer has caught the signal
    shutil.rmtree(recipe.output.dir, ignore_errors=True)


def make_model(settings: StudySettings) -> tuple[InternVLForConditionalGeneration, DigitsProcessor]:
    processor = build_processor()
    return build_model(processor.tokenizer, hidden_size=settings.hidden_size, layers=settings.layers), processor


def evaluation_tasks(split: digits.Digits, count: int) -> dict[str, list[digits.Task]]:
    """Returns ``count`` questions about the digits of a split by column of the result tables, with a fixed seed."""
    rng = np.random.default_rng(_EVALUATION_SEED)
    tasks = {form: digits.sample_tasks(split, count, rng, form) for form in digits.FORMS}
    return {**tasks, tables.TEXT: list(map(digits.in_words, digits.sample_tasks(split, count, rng, "cot")))}


def evaluate_columns(
    model: InternVLForConditionalGeneration, processor: DigitsProcessor, tasks: Mapping[str, Sequence[digits.Task]]
) -> dict[str, dict[str, float]]:
    """Returns ``accuracy``, ``unparsable``, ``tokens`` and ``count`` of the greedy answers for each column."""
    return {column: next(iter(evaluate(model, processor, asked).values())) for column, asked in tasks.items()}


def evaluate_held_out(
    model: InternVLForConditionalGeneration, processor: DigitsProcessor, settings: StudySettings
) -> dict[str, dict[str, float]]:
    """Returns the result of ``evaluate_columns`` on the held-out questions."""
    tasks = evaluation_tasks(digits.load_digits()["held-out"], settings.evaluation_tasks)
    return evaluate_columns(model, processor, tasks)


def start_file(folder: Path) -> Path:
    """Returns the path of the weights of a seed's start model."""
    return folder / "start.pt"


def pair_file(folder: Path, name: str) -> Path:
    return folder / f"pairs-{slug(name)}.jsonl"


def reference_file(folder: Path, name: str) -> Path:
    return folder / f"reference-{slug(name)}.jsonl"


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Redirects stderr of the ``with`` block to the end of ``log.txt`` in the folder of a seed."""
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        yield


class Stopwatch:
    """Measures the wall-clock time and the CPU time of a ``with`` block, as ``seconds`` after the block."""

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._begin
        self.seconds = {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
