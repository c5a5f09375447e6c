"""The evaluations of a run: on the pairs of ``data.eval``, and by generated answers (``output.eval_generate``)."""

import datetime
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train.batch_loss import BatchLoss
from mpo_ext.train.dataset import RunData, size_over_ranks
from mpo_ext.train.metrics import Totals, log_line
from mpo_ext.train.output import RunOutput
from mpo_ext.train.pair_counts import PairCounts
from mpo_ext.train.ranks import EvaluationAnswerError, EvaluationPairError
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.resume import RunState, count_pairs, counts_of_all_ranks

if TYPE_CHECKING:
    from mpo_ext.train.answer_evaluation import AnswerEvaluation

_OF_ANSWERS = ("eval_answer", "eval_questions")  # beginnings of the names of the metrics of ``AnswerEvaluation``


@torch.no_grad()
def evaluate(
    model: nn.Module, data: RunData, batch_loss: BatchLoss, reward_shift: RewardShift
) -> tuple[dict[str, float], PairCounts]:
    """Computes the metrics on the evaluation pairs of all ranks.

    All ranks must call this function. Returns the metrics, and the pair counts of all ranks. Without pairs, the
    metrics are NaN. Raises ``EvaluationPairError`` if a pair is bad and ``data.skip_bad`` is False.
    """
    config, coef, accelerator = batch_loss.recipe.config, batch_loss.router_coef, data.accelerator
    totals, pair_counts = Totals(accelerator.device), PairCounts()
    model.eval()
    reward_shift.eval()
    try:
        for step_slice in data.load_evaluation():
            try:
                size = size_over_ranks(accelerator, step_slice)
            except ValueError as error:
                raise EvaluationPairError(str(error)) from error
            count_pairs(pair_counts, step_slice)
            for batch, counts in data.equal_batches(step_slice, size):
                out = batch_loss(model, batch, config, reward_shift, coef)
                if counts is not None:
                    totals.add(out, ntp_parts=counts.ntp_parts(config.ntp_average), tokens=batch.tokens)
    finally:
        model.train()
        reward_shift.train()
    line = log_line(totals.reduce(accelerator), batch_loss.recipe, reward_shift, coef)
    return line, counts_of_all_ranks(accelerator, pair_counts)


def fails_on_all_ranks(accelerator: Any, error: Exception) -> bool:
    """Returns whether all ranks raise this error of an evaluation, so that together they can save a checkpoint."""
    return accelerator.num_processes == 1 or isinstance(error, (EvaluationPairError, EvaluationAnswerError))


def open_answers(
    recipe: Recipe, accelerator: Any, model: nn.Module, processor: Any, *, date: datetime.date
) -> "AnswerEvaluation | None":
    """Returns the evaluation by generated answers, or None if ``output.eval_generate`` is None.

    For the arguments, see ``AnswerEvaluation``.
    """
    if recipe.output.eval_generate is None:
        return None
    from mpo_ext.train.answer_evaluation import AnswerEvaluation  # needs the extra "generate"

    return AnswerEvaluation(recipe, accelerator, model, processor, date=date)


def evaluate_if_due(
    state: RunState,
    output: RunOutput,
    data: RunData,
    evaluate_pairs: Callable[[], Mapping[str, float]],
    answers: "AnswerEvaluation | None",
    *,
    is_end: bool,
) -> dict[str, float] | None:
    """Runs the evaluations that are due after the current step. All ranks must call this function.

    Args:
        state: State of the run. It stores the results. If it already has a result for the current step, the evaluation
            is not repeated. This happens in a resumed run.
        output: Output of the run, which reports the results.
        data: Data of the run.
        evaluate_pairs: Function that returns the metrics on the evaluation pairs.
        answers: The evaluation by generated answers, or None.
        is_end: Whether the run ends after this step. All evaluations are then due.

    Returns:
        The log line with the results of all evaluations after this step, or None if no evaluation is due.

    Raises:
        EvaluationPairError: If a pair is bad.
        EvaluationAnswerError: If the generation of answers fails.
    """
    settings, step = data.recipe.output, state.step
    known = state.current_evaluation() or {}
    metrics: dict[str, float] = {}
    is_due = False
    if data.eval_mixture is not None and (is_end or (settings.eval_every and step % settings.eval_every == 0)):
        is_due = True
        if not any(name.startswith("eval_") and not name.startswith(_OF_ANSWERS) for name in known):
            metrics |= evaluate_pairs()
    if answers is not None and settings.eval_generate is not None:
        every = settings.eval_generate.every or data.sampler.steps_per_epoch
        if is_end or step % every == 0:
            is_due = True
            if not any(name.startswith(_OF_ANSWERS) for name in known):
                metrics |= answers.evaluate(step)
    if metrics:
        line = {"step": step, **{f"eval_{name}": value for name, value in metrics.items()}}
        state.record_evaluation(line)
        output.report_evaluation(line)
    return state.current_evaluation() if is_due else None
