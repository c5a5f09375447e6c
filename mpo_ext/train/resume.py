"""Resuming a run: the state that a checkpoint holds besides tensors, and the settings that may change since then."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo_ext.checks import LinesError
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train.dataset import StepSlice
from mpo_ext.train.encode import PairCounts
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe

# Settings that may change between a checkpoint and the run that resumes from it: they change the trained model by
# rounding only, or how long it is trained, or (micro-batches) the user must be free to change them if memory runs out.
_FREE_SETTINGS = (
    "output.", "data.eval", "data.workers", "optim.epochs", "optim.max_steps", "optim.micro_batch_size",
    "loss.memory_budget_mib", "loss.recompute", "loss.shared_prefix", "loss.from_logits", "loss.backend",
    "model.attention", "model.gradient_checkpointing", "reference.file",
)  # fmt: skip


class RunState:
    """The state of a run between two steps, except for tensors and random states.

    Args:
        recipe: Recipe of the run.
        accelerator: The run's ``Accelerator``.

    Attributes:
        step: Number of steps done.
        n_skipped_steps: Number of them that did not update the model: their loss or gradient was not finite.
        pair_counts: This rank's counts of trained and skipped pairs; the main rank's include earlier processes.
        evaluation: Line of the log of the latest evaluation, or None.
        reward_shift: Reward shift of the loss.
    """

    def __init__(self, recipe: Recipe, accelerator: Any) -> None:
        self._recipe, self._accelerator = recipe, accelerator
        self.step = 0
        self.n_skipped_steps = 0
        self.pair_counts = PairCounts()
        self.evaluation: dict[str, float] | None = None
        self.reward_shift = RewardShift(**dataclasses.asdict(recipe.reward_shift))

    def count_pairs(self, step_slice: StepSlice) -> None:
        """Counts the pairs of this rank's slice of a step."""
        for skipped in step_slice.skipped:
            self.pair_counts.add(skipped)
        self.pair_counts.kept += sum(counts.pairs for counts in step_slice.counts)
        self.pair_counts.cut += step_slice.n_cut

    def check_trained_on_pairs(self) -> None:
        """Raises ``LinesError`` if every pair was skipped: the model would be saved unchanged."""
        counts = self.pair_counts_of_all_ranks()
        if counts.kept == 0 and self.step > 0:
            raise LinesError(
                "every pair was skipped, so nothing was learned and no model is saved:\n  "
                + "\n  ".join(counts.lines())
            )

    def pair_counts_of_all_ranks(self) -> PairCounts:
        """Returns the counts of all ranks, which call it together."""
        merged = PairCounts()
        for counts in gather(self._accelerator, self.pair_counts):
            merged.merge(counts)
        return merged

    def current_evaluation(self) -> dict[str, float] | None:
        """Returns the line of an evaluation after this very step, or None; it may precede the checkpoint."""
        line = self.evaluation
        return line if line is not None and line["step"] == self.step else None

    def state_dict(self, log_position: int) -> dict[str, Any]:
        """Returns the state as JSON. All ranks call it.

        Args:
            log_position: Size of the log in bytes.
        """
        counts = self.pair_counts_of_all_ranks()
        return {
            "step": self.step,
            "reward_shift": self.reward_shift.state_dict(),
            "recipe": plain_values(self._recipe.to_dict()),
            "log_position": log_position,
            "skipped_steps": self.n_skipped_steps,
            "evaluation": self.current_evaluation(),
            "tally": counts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, keep_evaluation: bool) -> None:
        """Restores a state; the counts of all ranks go to the main rank.

        Args:
            state: State from ``state_dict``.
            keep_evaluation: Whether the evaluation is still valid: the evaluation pairs are the same.
        """
        self.step = state["step"]
        if keep_evaluation:
            self.evaluation = state["evaluation"]
        if self._accelerator.is_main_process:
            self.pair_counts.load_state_dict(state["tally"])
        self.n_skipped_steps = state["skipped_steps"]
        self.reward_shift.load_state_dict(state["reward_shift"])


def changed_settings(state: Mapping[str, Any], recipe: Recipe, path: Path) -> dict[str, str]:
    """Returns the settings that have changed since a checkpoint, each with a text that shows how.

    Args:
        state: State of the checkpoint.
        recipe: Recipe of the resumed run.
        path: Path of the checkpoint, for the message.

    Raises:
        LinesError: If a setting has changed that must not change within a run.
    """
    old, new = flat_settings(state["recipe"]), flat_settings(plain_values(recipe.to_dict()))
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
    """Returns the values as they are after a round trip through JSON."""
    if isinstance(values, Mapping):
        return {str(key): plain_values(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain_values(value) for value in values]
    return os.fspath(values) if isinstance(values, os.PathLike) else values


def flat_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings by their dotted names."""
    return dict(_flatten(values, ""))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
