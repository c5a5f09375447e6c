"""Makes the demo's preference pairs with ``mpo_ext.generate``: correctness, format and DropoutNTP pairs.

- Correctness pair: the rejected response has a wrong answer.
- Format pair: the rejected response has no readable answer.
- DropoutNTP pair: the model sampled the end of the rejected response without the image. The responses begin alike.
"""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from transformers import InternVLForConditionalGeneration

from mpo_ext.data import Pair, open_pairs, read_pairs, write_pairs
from mpo_ext.data.check import CheckReport, check_pairs
from mpo_ext.data.jsonl import dump_line
from mpo_ext.data.records import SOURCE
from mpo_ext.data.view import write_view
from mpo_ext.demo import digits, reading
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.settings import Settings
from mpo_ext.files import atomic_write, write_json
from mpo_ext.generate import runner
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Engine, SamplingConfig
from mpo_ext.generate.outputs import Summary
from mpo_ext.generate.transformers_engine import TransformersEngine

BATCH_SIZE = 256
MAX_NEW_TOKENS = 40
_BLOCK_SIZE = 2048
_SHOWN_PAIRS = 1000
DIRECT, STEPWISE, DROPOUT = "correctness-direct", "correctness-cot", "dropout-ntp"  # folders of the sampling runs


@dataclasses.dataclass(frozen=True, slots=True)
class MadePairs:
    """The pairs that ``make_pairs`` wrote.

    Attributes:
        path: Path of the file of pairs, ``pairs.jsonl``.
        counts: Number of pairs by form and pipeline, such as ``{"cot dropout_ntp": 900}``.
        left_out: Number of pairs that were made but are not in the file, by reason.
        summaries: Summary of each sampling run, by the name of the run's folder.
        report: Result of ``check_pairs`` for the file.
    """

    path: Path
    counts: dict[str, int]
    left_out: dict[str, int]
    summaries: dict[str, Summary]
    report: CheckReport


def make_pairs(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: Settings,
    rng: np.random.Generator,
    folder: Path,
    *,
    name: str = "digits demo",
    stream: TextIO | None = None,
) -> MadePairs:
    """Makes pairs from the model's answers to questions, and writes them to ``folder``.

    The questions are about training digits that the SFT did not use.

    The correctness pairs come from questions with a true answer. The DropoutNTP pairs come from questions without true
    answers, like the paper's data without ground truth. DropoutNTP cannot check answers. Therefore some of its chosen
    responses are wrong, and some of its rejected responses are right.

    An interrupted sampling run resumes. The following files are written to ``folder``:

    - ``images``, and a ``.jsonl`` file of questions for each sampling run.
    - A folder with the output of each sampling run.
    - ``pairs.jsonl`` with image paths relative to ``folder``.
    - The check of the pairs, ``check.json``, and the page that shows them, ``pairs.html``.

    Args:
        model: The SFT model.
        processor: Processor of the model.
        settings: Settings of the demo.
        rng: Random generator that draws the questions.
        folder: Folder to write to.
        name: Name of the model. Each set of weights needs its own name, because a resumed run keeps the responses of a
            model with the same name.
        stream: Output of the progress display; None disables the display.

    Raises:
        RuntimeError: If no pair can be made, or ``check_pairs`` finds a defect in the pairs.
    """
    engine = TransformersEngine(model, processor, name=name, batch_size=BATCH_SIZE)
    unseen = digits.part(digits.load_digits()["train"], settings.sft_digits, None)
    pairs: list[Pair] = []
    summaries: dict[str, Summary] = {}
    for run, form, count, pipeline in sampling_runs(settings):
        tasks = reading.sample_tasks(unseen, count, rng, form, side=settings.side)
        write_items(folder, run, tasks, has_truth=run != DROPOUT)
        run_pairs, summaries[run] = sample(pipeline, engine, folder, run, stream=stream)
        pairs += run_pairs
    distinct = {pair.key(): pair for pair in pairs}
    if not distinct:
        raise RuntimeError("pairs must be at least one, got none: no question has two different answers")
    path = folder / "pairs.jsonl"
    write_pairs(path, map(_with_subset, distinct.values()))
    report = _check(path)
    title = "Preference pairs of the digits demo"
    write_view(path.with_suffix(".html"), open_pairs(path), title=title, limit=_SHOWN_PAIRS, seed=settings.seed)
    counts = collections.Counter(f"{pair.extra['form']} {pair.provenance['pipeline']}" for pair in distinct.values())
    left_out = {"equal to another pair": len(pairs) - len(distinct)}
    return MadePairs(path, dict(counts), left_out, summaries, report)


def sampling_runs(settings: Settings) -> Iterator[tuple[str, str, int, runner.PairPipeline]]:
    """Yields the name, the form of the questions, the number of questions and the pipeline of each sampling run."""
    sampling = SamplingConfig(temperature=settings.temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    common: dict[str, Any] = {"sampling": sampling, "seed": settings.seed, "matcher": digits.MATCHER}
    pairing: dict[str, Any] = {"samples": settings.samples, "pairs_per_question": settings.pairs_per_question}
    for run, form, count in ((DIRECT, "direct", settings.direct_questions), (STEPWISE, "cot", settings.questions)):
        yield run, form, count, Correctness(CorrectnessConfig(style=digits.STYLES[form], **pairing, **common))
    blind = DropoutNTPConfig(keep=settings.keep, sample_chosen=True, style=digits.STYLES["cot"], **common)
    yield DROPOUT, "cot", settings.dropout_ntp_questions, DropoutNTP(blind)


def sample(
    pipeline: runner.PairPipeline,
    engine: Engine,
    folder: Path,
    run: str,
    *,
    items: str | None = None,
    limit: int | None = None,
    stream: TextIO | None = None,
) -> tuple[list[Pair], Summary]:
    """Runs a pipeline of ``mpo_ext.generate``. Returns the pairs that it made, and the summary of the run.

    Args:
        pipeline: The pipeline.
        engine: Engine that answers the questions.
        folder: Folder with the file of questions. The output is written to its subfolder ``run``.
        run: Name of the sampling run.
        items: Name of the file of questions, without ``.jsonl``. None: the same name as ``run``.
        limit: Maximum number of questions; None: all.
        stream: Output of the progress display; None disables the display.
    """
    out = folder / run
    summary = runner.run(
        pipeline, engine, folder / f"{items or run}.jsonl", out, block_size=_BLOCK_SIZE, limit=limit,
        image_root=str(folder), stream=stream,
    )  # fmt: skip
    assert summary is not None  # this is the only process
    outputs = [output for output in pipeline.outputs if output != "unsolved"]
    return [pair for output in outputs for pair in read_made(out / f"{output}.jsonl", folder)], summary


def write_items(folder: Path, name: str, tasks: Sequence[digits.GridTask], *, has_truth: bool = True) -> None:
    """Writes questions to ``NAME.jsonl``, an input file of ``mpo_ext.generate``. Writes the images to PNG files.

    ``has_truth``: whether to write the true answers.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{name}.jsonl") as file:
        for number, task in enumerate(tasks):
            if task.picture is None:
                raise ValueError(f"tasks must have images, got none in task {number}")
            image = f"images/{name}-{number:05d}.png"
            task.picture.save(folder / image)
            item = {"image": image, "question": task.question, "form": task.form, "digits": list(task.values)}
            file.write(dump_line(item | ({"answer_gt": str(task.answer)} if has_truth else {})))


def read_made(path: Path, folder: Path) -> Iterator[Pair]:
    """Yields the pairs in a file of a sampling run, with image paths relative to ``folder``."""
    for pair in read_pairs(path):
        images = (os.path.relpath(path.parent.resolve() / image, folder.resolve()) for image in pair.images)
        yield dataclasses.replace(pair, images=tuple(images))


def _with_subset(pair: Pair) -> Pair:
    """Returns a copy of a pair with its form, "direct" or "cot", as the subset.

    Reports then group the pairs by form.
    """
    return dataclasses.replace(pair, extra={**pair.extra, SOURCE: {"subset": pair.extra["form"]}})


def _check(path: Path) -> CheckReport:
    report = check_pairs(open_pairs(path))
    write_json(path.with_name("check.json"), report.to_dict())
    if not report.is_clean:
        raise RuntimeError(f"{path} must pass its check, got {dict(report.totals())}")
    return report
