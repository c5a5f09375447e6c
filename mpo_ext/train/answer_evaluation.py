"""Evaluates the policy during training by its generated answers to questions (``output.eval_generate``).

Prompts, matchers and scores are the same as in ``mpo_ext.evaluate``.
"""

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_ext.evaluate.cells import QuestionFile, open_questions
from mpo_ext.evaluate.scoring import Evaluation, QuestionScore, ScoredResponse
from mpo_ext.evaluate.statistics import mean_and_error
from mpo_ext.files import atomic_write
from mpo_ext.generate.items import Item
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.images import describe_source, image_exists, missing_image_advice
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.train.output_recipe import GenerationRecipe
from mpo_ext.train.preserve import preserved
from mpo_ext.train.ranks import EvaluationAnswerError, gather
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.zero import zero_stage

_BLOCK = 64  # minimum number of questions whose images are loaded at a time


class AnswerEvaluation:
    """Asks the policy the questions of ``output.eval_generate`` and scores its answers.

    By default, the questions are divided among the ranks. If the parameters are sharded, every rank asks all
    questions, because each forward pass needs all ranks.

    Args:
        recipe: Recipe of the run; its setting ``output.eval_generate`` must not be None.
        accelerator: The ``accelerate.Accelerator`` of the run.
        model: Policy, as ``accelerator.prepare`` returned it.
        processor: Processor of the policy, or the tokenizer of a text model.
        date: Date that the chat template may print in prompts.

    Raises:
        OSError: If the file of questions cannot be read.
        ValueError: If the model is sharded in a way that does not support generation. Also if the file has no question
            with an answer, or an image or video is missing.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Any, model: nn.Module, processor: Any, *, date: datetime.date
    ) -> None:
        settings = recipe.output.eval_generate
        assert settings is not None
        self._in_step = shards_parameters(accelerator, settings.path)
        self._accelerator, self._batch_size = accelerator, settings.batch_size
        self._model = unwrap_model(model)  # a reference to DDP would keep it alive at the end of the run
        self._folder = Path(recipe.output.dir) / "answers"
        self._evaluation = Evaluation(settings.config, settings.prompt)
        self.questions = open_eval_questions(settings)
        with preserved(accelerator, self._model):
            self._engine = TransformersEngine(
                self._model, processor, batch_size=settings.batch_size, date=date,
                chat_template=recipe.model.chat_template, chat_template_kwargs=recipe.model.chat_template_kwargs,
            )  # fmt: skip
        self._engine.inference_mode = not self._in_step

    def evaluate(self, step: int) -> dict[str, float]:
        """Asks all questions, writes the answers to ``answers/step-STEP.jsonl`` and returns the metrics.

        The call does not change the state of training. All ranks must call this method.

        Raises:
            EvaluationAnswerError: If the generation fails on a rank.
        """
        results: list[tuple[QuestionScore, dict[str, Any]]] = []
        error: str | None = None
        with preserved(self._accelerator, self._model), torch.no_grad(), self._accelerator.autocast():
            self._model.eval()
            try:
                results = list(self._ask())
            except (OSError, ValueError, RuntimeError) as failure:  # raised on all ranks below
                error = f"{type(failure).__name__}: {failure}"
        ranks = gather(self._accelerator, (results, error))
        if self._in_step:
            ranks = [(scored if rank == 0 else [], text) for rank, (scored, text) in enumerate(ranks)]
        if errors := [text for _, text in ranks if text is not None]:
            raise EvaluationAnswerError(f"output.eval_generate failed after step {step}: {errors[0]}")
        # Rank r asked the questions r, r + number of ranks, ...
        rows = itertools.zip_longest(*(results for results, _ in ranks))
        whole = [result for row in rows for result in row if result is not None]
        if self._accelerator.is_main_process:
            self._write(self._folder / f"step-{step:08d}.jsonl", [record for _, record in whole])
        return answer_metrics([score for score, _ in whole])

    def _ask(self) -> Iterator[tuple[QuestionScore, dict[str, Any]]]:
        """Asks the questions of this rank. Yields (score, line) for each question.

        ``line`` is a line of the answers file, as a dict.
        """
        accelerator, evaluation = self._accelerator, self._evaluation
        rank, world_size = (0, 1) if self._in_step else (accelerator.process_index, accelerator.num_processes)
        ours = itertools.islice(self.questions.source.items(), rank, None, world_size)
        while block := list(itertools.islice(ours, max(_BLOCK, self._batch_size))):
            for item, records in zip(block, evaluation.questions.sample(block, self._engine), strict=True):
                problem, responses = evaluation.score(item, records)
                yield evaluation.question_score(item, problem, responses), _answer_line(item, problem, responses)

    def _write(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            for line in lines:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))


def open_eval_questions(settings: GenerationRecipe) -> QuestionFile:
    """Opens and returns the questions of ``output.eval_generate``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If no question of the file has an answer, or if an image or a video of a question does not exist.
    """
    try:
        questions = open_questions(
            "answers", settings.path, limit=settings.max_items, image_root=settings.image_root, root_map=(),
            system=settings.system,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else type(error)
        raise kind(f"output.eval_generate.path: {error}") from error
    items = list(questions.source.items())
    sources = dict.fromkeys(image for item in items for image in item.image_sources)
    sources |= dict.fromkeys(path for item in items for video in item.video_sources for path in video.paths)
    missing = [image for image in sources if not image_exists(image)]
    if missing:
        raise ValueError(
            f"output.eval_generate.path must name questions whose images exist, got {settings.path} with "
            f"{len(missing):,} of {len(sources):,} images missing, such as {describe_source(missing[0])}: relative "
            f"paths start at image_root{missing_image_advice(missing[0])}"
        )
    return questions


def shards_parameters(accelerator: Any, path: str) -> bool:
    """Returns whether each rank holds only a part of the parameters, as with FSDP2 and ZeRO-3.

    If True, all ranks must run the same forward passes. ``path`` is the file of questions; the error message names it.

    Raises:
        ValueError: If the model is sharded by a method that does not support generation, such as FSDP 1.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "DEEPSPEED":
        return zero_stage(accelerator) == 3
    if kind == "FSDP" and getattr(accelerator, "is_fsdp2", False):
        return True
    if kind in ("FSDP", "MEGATRON_LM", "TP"):
        raise ValueError(
            f"output.eval_generate must be None under {kind}, got {path!r}: evaluate the final model with mpo-ext "
            "evaluate, or train with DDP, FSDP2 or DeepSpeed"
        )
    return False


def answer_metrics(scores: Sequence[QuestionScore]) -> dict[str, float]:
    """Returns the metrics of generated answers as a dict from name, such as ``answer_accuracy``, to value.

    ``scores`` has a score for each question. A question that could not be asked counts only in ``questions_refused``.
    If no question could be asked, ``answer_accuracy`` is NaN. If fewer than two questions could be asked, there is no
    ``answer_standard_error``.
    """
    answered = [score for score in scores if score.problem is None]
    accuracy, error = mean_and_error([score.accuracy for score in answered])
    count = max(len(answered), 1)
    metrics = {"answer_accuracy": math.nan if accuracy is None else accuracy}
    if error is not None:
        metrics["answer_standard_error"] = error
    return metrics | {
        "answer_unreadable": sum(score.unreadable for score in answered) / count,
        "answer_cut_off": sum(score.cut_off for score in answered) / count,
        "answer_tokens": sum(score.tokens for score in answered) / count,
        "questions": float(len(answered)),
        "questions_refused": float(len(scores) - len(answered)),
    }


def _answer_line(item: Item, problem: str | None, responses: Sequence[ScoredResponse]) -> dict[str, Any]:
    line: dict[str, Any] = {"question": item.question, "answer_gt": list(item.truths)}
    if item.messages:
        line["messages"] = list(item.messages)
    if problem is not None:
        return {**line, "problem": problem}
    (response,) = responses
    return {**line, **{field.name: getattr(response, field.name) for field in dataclasses.fields(response)}}
