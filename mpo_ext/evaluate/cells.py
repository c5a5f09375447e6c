"""The cells of an evaluation. A cell combines a model, a file of questions and a prompt."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mpo_ext.checks import check_integer
from mpo_ext.evaluate.scoring import Evaluation, QuestionScore, ScoredResponse
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.items import Item, ItemSource, is_meta, open_items
from mpo_ext.generate.outputs import problem_detail
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.generate.sampler import open_journal, read_samples, sample_items


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRun:
    """Settings of one process of an evaluation. They do not change the results.

    Attributes:
        block_size: Maximum number of responses in a block. The responses of a block are saved together. All responses
            to a question are in the same block. A question with more responses makes a larger block. A killed process
            loses its unfinished block. With vLLM or an OpenAI server, several blocks may be unfinished.
        rank: Rank of this process. For example, rank 1 of 4 processes asks the questions 1, 5, 9, ..., counted from 0.
        world_size: Number of processes. The processes need not run at the same time.
        stream: Output of the progress display, for example ``sys.stderr``; None disables the display.
    """

    block_size: int = 64
    rank: int = 0
    world_size: int = 1
    stream: TextIO | None = None

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, least=1)
        check_integer("world_size", self.world_size, least=1)
        check_integer("rank", self.rank, least=0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size ({self.world_size}), got {self.rank}")


@dataclasses.dataclass(frozen=True, slots=True)
class QuestionFile:
    """A file of questions.

    Attributes:
        name: Name of the file in the results.
        path: Path of the file, to record in the results.
        source: Reader of the questions.
    """

    name: str
    path: str
    source: ItemSource


@dataclasses.dataclass(slots=True)
class Cell:
    """A combination of a model, a file of questions and a prompt template, with its scores.

    Attributes:
        model: Name of the model.
        data: The file of questions.
        evaluation: Asks the questions with the prompt template and scores the responses.
        folder: Folder of the files to which sampled responses are appended (the journals).
        scores: Score of each question, in the order of the file; empty until the responses are read.
        details: For each reason why questions could not be asked, the details of the first such question.
        offsets: Byte offset of each question's lines in ``predictions-MODEL.jsonl``; empty until this file is written.
    """

    model: str
    data: QuestionFile
    evaluation: Evaluation
    folder: Path
    scores: list[QuestionScore] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    details: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """Returns the names of the model, the file of questions and the prompt."""
        return self.model, self.data.name, self.evaluation.prompt

    @property
    def with_image(self) -> bool:
        """Returns whether the model sees the images of the questions."""
        return self.evaluation.questions.with_image

    def ask(self, engine: Engine, run: EvaluationRun) -> None:
        """Asks the questions of this process that have not been asked yet, and saves the responses."""
        evaluation, source = self.evaluation, self.data.source
        ranks = {"rank": run.rank, "world_size": run.world_size}
        right, answered, skipped = 0.0, 0, 0
        total = len(range(run.rank, source.count, run.world_size))
        with (
            open_journal(evaluation, engine.settings(), source, self.folder, **ranks) as journal,
            SamplingProgress(" ".join(self.key), total, run.stream) as progress,
        ):
            samples = sample_items(evaluation, engine, source, journal, block_size=run.block_size, **ranks)
            for item, records in samples:
                problem, responses = evaluation.score(item, records)
                skipped += problem is not None
                if responses:
                    answered += 1
                    right += sum(response.correct for response in responses) / len(responses)
                counts = f"{100 * right / answered:.1f} % right" if answered else "none answered"
                progress.advance(counts + (f", {skipped} skipped" if skipped else ""))

    def read(self, world_size: int) -> Iterator[tuple[Item, str | None, list[ScoredResponse]]]:
        """Reads and scores the responses that all ``world_size`` processes have sampled. Also fills ``details``.

        Yields:
            (question, problem, responses) for each question. ``problem`` is the reason why the question could not be
            asked, or None.

        Raises:
            IncompleteRunError: If a process has not sampled all its responses.
        """
        for item, records in read_samples(self.evaluation, self.data.source, self.folder, world_size=world_size):
            for record in records:
                if "problem" in record and (detail := problem_detail(record)):
                    self.details.setdefault(record["problem"], detail)
            yield item, *self.evaluation.score(item, records)


def open_questions(
    name: str,
    path: str | os.PathLike[str],
    *,
    limit: int | None,
    image_root: str,
    root_map: Sequence[tuple[str, str]],
    system: str | None = None,
) -> QuestionFile:
    """Opens and returns a file of questions.

    Args:
        name: Name of the file in the results.
        path: Path of a file of questions, or of a meta file (.json) that lists such files.
        limit: Maximum number of questions; None: all.
        image_root: Folder of relative image paths; not used for a meta file.
        root_map: Tuples (old, new) for a meta file: paths in the folder ``old`` are looked up in the folder ``new``.
        system: System prompt for questions without a system prompt; None: no system prompt.

    Raises:
        ValueError: If no question has a true answer.
    """
    roots: Mapping[str, Any] = {"root_map": tuple(root_map)} if is_meta(path) else {"image_root": image_root}
    source = open_items(os.fspath(path), limit=limit, system=system, **roots)
    problems: collections.Counter[str] = collections.Counter()
    details: dict[str, str] = {}
    for item in source.items():
        problem = item.problem or ("" if item.truths else "no true answer")
        problems[problem] += 1
        if item.detail is not None:
            details.setdefault(problem, f" ({item.detail})")
    if not problems[""]:
        counts = ", ".join(f"{count} with {name}{details.get(name, '')}" for name, count in problems.most_common())
        counts = counts or "no line"
        raise ValueError(f"data must hold questions with a true answer, got {os.fspath(path)}: {counts}")
    return QuestionFile(name, os.fspath(path), source)
