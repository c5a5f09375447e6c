"""Defines the run state that checkpoints store as JSON, and the settings that may change when a run resumes."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_ext.checks import LinesError
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train.dataset import StepSlice
from mpo_ext.train.metrics import json_value
from mpo_ext.train.pair_counts import PairCounts
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe

# Settings that may change between a checkpoint and the run that resumes. Most of them change the trained model at most
# by rounding. The others set how long it is trained, or (micro-batches) must be adjustable when memory runs out.
_FREE_SETTINGS = (
    "output.", "data.eval", "data.skip_bad", "data.max_image_pixels", "data.workers", "optim.epochs",
    "optim.max_steps", "optim.micro_batch_size", "optim.micro_batch_tokens", "loss.memory_budget_mib",
    "loss.recompute", "loss.shared_prefix", "loss.from_logits", "loss.backend", "model.attention",
    "model.gradient_checkpointing", "reference.file",
)  # fmt: skip


class RunState:
    """The state of a run between two steps, except for model, optimizer and random states.

    Attributes:
        step: Number of steps done.
        n_skipped_steps: Number of steps that did not update the model because the loss or gradient was not finite.
        n_idle_steps: Number of steps without pairs, plus the number of steps before the first update whose loss or
            gradient was not finite.
        pair_counts: Counts of the trained and skipped pairs of this rank. When a run resumes, the counts of the main
            rank start at the totals of all ranks in the checkpoint.
        evaluation: Log line of the latest evaluation; None before the first evaluation.
        best_score: The best value of ``output.best_metric`` so far; None before the first evaluation.
        n_stalled: Number of evaluations since the best evaluation.
        evaluation_number: Number that is the same for checkpoints with comparable scores: 0, or the number of the
            first checkpoint after the metric or the data of the evaluation have changed.
        questions: Hash of the questions of ``output.eval_generate``; None without this setting.
        reward_shift: Reward shift of the BCO term.
    """

    def __init__(self, recipe: Recipe, accelerator: Any) -> None:
        self._recipe, self._accelerator = recipe, accelerator
        self.step = 0
        self.n_skipped_steps = 0
        self.n_idle_steps = 0
        self.pair_counts = PairCounts()
        self.evaluation: dict[str, float] | None = None
        self.best_score: float | None = None
        self.n_stalled = 0
        self.evaluation_number = 0
        self.questions: str | None = None
        self.reward_shift = RewardShift(**dataclasses.asdict(recipe.reward_shift))

    def count_pairs(self, step_slice: StepSlice) -> None:
        """Adds the trained and the skipped pairs of ``step_slice`` to ``pair_counts``."""
        count_pairs(self.pair_counts, step_slice)

    def check_trained_on_pairs(self) -> None:
        """Raises ``LinesError`` if every pair so far was skipped. All ranks must call this method."""
        counts = self.pair_counts_of_all_ranks()
        if counts.kept == 0 and self.step > 0:
            raise LinesError(
                "every pair was skipped, so nothing was learned and no model is saved:\n  "
                + "\n  ".join(counts.lines())
            )

    def pair_counts_of_all_ranks(self) -> PairCounts:
        """Returns the pair counts summed over all ranks. All ranks must call this method."""
        return counts_of_all_ranks(self._accelerator, self.pair_counts)

    def is_first_step(self) -> bool:
        """Returns whether all steps before the current step are counted in ``n_idle_steps``."""
        return self.step == self.n_idle_steps

    def current_evaluation(self) -> dict[str, float] | None:
        """Returns the log line of the evaluation after the current step, or None if there was no such evaluation."""
        line = self.evaluation
        return line if line is not None and line["step"] == self.step else None

    def record_evaluation(self, line: dict[str, float]) -> None:
        """Records the metrics of an evaluation after the current step, and updates the best score.

        A step may have two evaluations: on pairs and by generation. Their metrics are merged to one log line.
        """
        self.evaluation = {**(self.current_evaluation() or {}), **line}
        score = line.get(self._best_key)
        if score is None:  # ``line`` is of the other kind of evaluation, or the loss has no preference term
            return
        best = self.best_score
        # A score that is not a number is never the best.
        is_higher = self._recipe.output.higher_is_better
        is_best = not math.isnan(score) and (best is None or (score > best if is_higher else score < best))
        self.best_score = score if is_best else best
        self.n_stalled = 0 if is_best else self.n_stalled + 1

    @property
    def _best_key(self) -> str:
        return f"eval_{self._recipe.output.best_metric}"

    def score(self) -> float | None:
        """Returns the value of ``output.best_metric`` after the current step; None if it is missing or not finite."""
        score = (self.current_evaluation() or {}).get(self._best_key)
        return score if score is not None and math.isfinite(score) else None

    def is_best(self) -> bool:
        """Returns whether ``output.keep_best`` is True and the evaluation after this step is the best so far."""
        return self._recipe.output.keep_best and self.score() is not None and self.n_stalled == 0

    def has_stalled(self) -> bool:
        """Returns whether early stopping must end the run; see ``output.early_stopping``."""
        patience = self._recipe.output.early_stopping
        return patience > 0 and self.n_stalled >= patience

    def state_dict(self, log_position: int, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns the state as JSON values, with the pair counts of all ranks. All ranks must call this method.

        Args:
            log_position: Size of the log in bytes.
            inputs: Result of ``collect_inputs``.
        """
        return {
            "step": self.step,
            "reward_shift": self.reward_shift.state_dict(),
            "recipe": plain_values(self._recipe.to_dict()),
            "inputs": inputs,
            "log_position": log_position,
            "skipped_steps": self.n_skipped_steps,
            "idle_steps": self.n_idle_steps,
            "evaluation": _to_json(self.current_evaluation()),
            "best_score": json_value(self.best_score),
            "stalled_evaluations": self.n_stalled,
            "evaluation_number": self.evaluation_number,
            "questions": self.questions,
            "tally": self.pair_counts_of_all_ranks().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, keep_evaluation: bool) -> None:
        """Restores the state that ``state_dict`` returned. Only the main rank restores the pair counts.

        If ``keep_evaluation`` is False, the latest evaluation and the best score are not restored. It must be False if
        the evaluation data have changed.
        """
        self.step = state["step"]
        if keep_evaluation:
            self.evaluation = _from_json(state["evaluation"])
            best_score = state.get("best_score")  # None in older checkpoints
            self.best_score = None if best_score is None else float(best_score)
            self.n_stalled = state.get("stalled_evaluations", 0)
            self.evaluation_number = state.get("evaluation_number", 0)
        if self._accelerator.is_main_process:
            self.pair_counts.load_state_dict(state["tally"])
        self.n_skipped_steps = state["skipped_steps"]
        self.n_idle_steps = state.get("idle_steps", 0)
        self.reward_shift.load_state_dict(state["reward_shift"])


def count_pairs(counts: PairCounts, step_slice: StepSlice) -> None:
    """Adds the encoded and the skipped pairs of ``step_slice`` to ``counts``."""
    for skipped in step_slice.skipped:
        counts.add(skipped)
    counts.kept += sum(sizes.pairs for sizes in step_slice.counts)
    counts.cut += step_slice.n_cut
    counts.split += step_slice.n_split


def counts_of_all_ranks(accelerator: Any, counts: PairCounts) -> PairCounts:
    """Returns the pair counts summed over all ranks. All ranks must call this function."""
    merged = PairCounts()
    for ranks_counts in gather(accelerator, counts):
        merged.merge(ranks_counts)
    return merged


def _to_json(line: Mapping[str, float] | None) -> dict[str, Any] | None:
    """Converts a log line to JSON values: numbers that are not finite become strings, such as "nan"."""
    return None if line is None else {name: json_value(value) for name, value in line.items()}


def _from_json(line: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Restores a log line that ``_to_json`` returned."""
    if line is None:
        return None
    return {name: float(value) if isinstance(value, str) else value for name, value in line.items()}


def changed_settings(state: Mapping[str, Any], recipe: Recipe, path: Path) -> dict[str, str]:
    """Returns a message for each setting that differs between a checkpoint and the recipe, by name.

    ``state`` is the ``RunState`` dict in the checkpoint at ``path``. A setting that the checkpoint lacks counts as its
    default. Raises ``LinesError`` if a changed setting must stay the same in a run.
    """
    stored = state["recipe"]
    with contextlib.suppress(TypeError, ValueError):  # the checkpoint may have a setting that no longer exists
        stored = plain_values(Recipe(**stored).to_dict())
    old, new = flat_settings(stored), flat_settings(plain_values(recipe.to_dict()))
    changed = {
        name: f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    }
    refused = [text for name, text in changed.items() if not name.startswith(_FREE_SETTINGS)]
    if refused:
        raise LinesError(
            f"the recipe must be that of {path}, but:\n  " + "\n  ".join(refused) + "\n"
            "use another output.dir to start a new run"
        )
    return changed


def plain_values(values: Any) -> Any:
    """Converts nested values to JSON types: keys to strings, tuples to lists, and paths to strings."""
    if isinstance(values, Mapping):
        return {str(key): plain_values(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain_values(value) for value in values]
    return os.fspath(values) if isinstance(values, os.PathLike) else values


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to a dict from dotted name, such as ``optim.epochs``, to value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flat_settings(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
