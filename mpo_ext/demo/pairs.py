"""Makes the demo's preference pairs with ``mpo_ext.generate``: correctness, format and DropoutNTP pairs."""

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
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.settings import Settings
from mpo_ext.files import atomic_write, write_json
from mpo_ext.generate import runner
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.outputs import Summary
from mpo_ext.generate.sampler import journal_path
from mpo_ext.generate.transformers_engine import TransformersEngine

BATCH_SIZE = 256
MAX_NEW_TOKENS = 40
_BLOCK_SIZE = 2048
_SHOWN_PAIRS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class MadePairs:
    """The pairs that ``make_pairs`` wrote.

    Attributes:
        path: Path of the file of pairs, ``pairs.jsonl``.
        counts: Number of pairs by form and pipeline; a key is for example "cot dropout_ntp".
        left_out: Number of pairs that were made but are not in the file, by reason.
        summaries: Summary of each sampling run, by the name of the run's folder.
        report: Result of ``check_pairs`` for the file.
    """

    path: Path
    counts: dict[str, int]
    left_out: dict[str, int]
    summaries: dict[str, Summary]
    report: CheckReport


class _Sampler:
    """Runs pipelines of ``mpo_ext.generate`` with one model, and keeps the summary of each run."""

    def __init__(self, engine: TransformersEngine, folder: Path, stream: TextIO | None) -> None:
        self.engine, self.folder, self.stream = engine, folder, stream
        self.summaries: dict[str, Summary] = {}

    def run(self, pipeline: runner.PairPipeline, form: str, limit: int | None = None) -> list[Pair]:
        """Runs a pipeline on the file of questions ``FORM.jsonl`` and returns the pairs that it made.

        ``limit`` is the maximum number of questions; None: all.
        """
        name = pipeline.name.replace("_", "-")
        out = self.folder / (f"{name}-{form}" if pipeline.name == "correctness" else name)
        # Otherwise an earlier demo's journal would be resumed: its settings hold the model's name, not the weights.
        journal_path(out, 0, 1).unlink(missing_ok=True)
        summary = runner.run(
            pipeline, self.engine, self.folder / f"{form}.jsonl", out, block_size=_BLOCK_SIZE, limit=limit,
            image_root=str(self.folder), stream=self.stream,
        )  # fmt: skip
        assert summary is not None  # this is the only process
        self.summaries[out.name] = summary
        outputs = [output for output in pipeline.outputs if output != "unsolved"]
        return [pair for output in outputs for pair in read_made(out / f"{output}.jsonl", self.folder)]


def make_pairs(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: Settings,
    rng: np.random.Generator,
    folder: Path,
    *,
    stream: TextIO | None = None,
) -> MadePairs:
    """Makes and returns three kinds of pairs from the model's answers to questions about grids of training digits.

    Writes to ``folder``: the questions (``images``, ``direct.jsonl``, ``cot.jsonl``), a folder for each sampling run,
    ``pairs.jsonl``, ``check.json`` and ``pairs.html``. The image paths in the files are relative to ``folder``.

    Args:
        model: The SFT model.
        processor: Processor of the model.
        settings: Settings of the demo.
        rng: Generator that draws the questions, and the pairs with direct answers.
        folder: Folder to write to.
        stream: Output of the progress display; None disables the display.

    Raises:
        RuntimeError: If the answers give no pair, or ``check_pairs`` finds a defect in the pairs.
    """
    engine = TransformersEngine(model, processor, name=f"digits demo, seed {settings.seed}", batch_size=BATCH_SIZE)
    sampling = SamplingConfig(temperature=settings.temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    sampler = _Sampler(engine, folder, stream)
    pairs: list[Pair] = []
    left_out: dict[str, int] = {}
    for form in digits.FORMS:
        write_items(folder, form, digits.sample_tasks(digits.load_digits()["train"], settings.questions, rng, form))
        common: dict[str, Any] = {"sampling": sampling, "seed": settings.seed, "matcher": digits.MATCHER}
        common["style"] = digits.STYLES[form]
        config = CorrectnessConfig(samples=settings.samples, pairs_per_question=settings.pairs_per_question, **common)
        form_pairs = sampler.run(Correctness(config), form)
        if form == "direct":
            picked = sorted(rng.permutation(len(form_pairs))[: settings.direct_pairs])
            left_out["direct pairs above the limit"] = len(form_pairs) - len(picked)
            form_pairs = [form_pairs[index] for index in picked]
        else:
            blind = DropoutNTPConfig(keep=settings.keep, sample_chosen=True, **common)
            form_pairs += sampler.run(DropoutNTP(blind), form, settings.dropout_ntp_questions)
        pairs += form_pairs
    distinct = {pair.key(): pair for pair in pairs}
    left_out["equal to another pair"] = len(pairs) - len(distinct)
    if not distinct:
        raise RuntimeError("the SFT model gave no right answer to make a pair from")
    path = folder / "pairs.jsonl"
    write_pairs(path, map(_with_subset, distinct.values()))
    report = _check(path)
    title = "Preference pairs of the digits demo"
    write_view(path.with_suffix(".html"), open_pairs(path), title=title, limit=_SHOWN_PAIRS, seed=settings.seed)
    counts = collections.Counter(f"{pair.extra['form']} {pair.provenance['pipeline']}" for pair in distinct.values())
    return MadePairs(path, dict(counts), left_out, sampler.summaries, report)


def write_items(folder: Path, form: str, tasks: Sequence[digits.Task]) -> None:
    """Writes questions to ``FORM.jsonl``, an input file of ``mpo_ext.generate``, and their images to PNG files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{form}.jsonl") as file:
        for number, task in enumerate(tasks):
            if task.picture is None:
                raise ValueError(f"tasks must have images, got none in task {number}")
            image = f"images/{form}-{number:05d}.png"
            task.picture.save(folder / image)
            item = {"image": image, "question": task.question, "answer_gt": str(task.answer)}
            file.write(dump_line({**item, "form": form, "digits": list(task.values)}))


def read_made(path: Path, folder: Path) -> Iterator[Pair]:
    """Yields the pairs in a file of a sampling run, with image paths relative to ``folder``."""
    for pair in read_pairs(path):
        images = (os.path.relpath(path.parent.resolve() / image, folder.resolve()) for image in pair.images)
        yield dataclasses.replace(pair, images=tuple(images))


def _with_subset(pair: Pair) -> Pair:
    """Returns the pair with its form as its subset, because the check and the HTML page group pairs by subset."""
    return dataclasses.replace(pair, extra={**pair.extra, SOURCE: {"subset": pair.extra["form"]}})


def _check(path: Path) -> CheckReport:
    report = check_pairs(open_pairs(path))
    write_json(path.with_name("check.json"), report.to_dict())
    if not report.is_clean:
        raise RuntimeError(f"{path} must pass its check, got {dict(report.totals())}")
    return report
