"""Saves the reward shift in checkpoints of transformers' Trainer and of its subclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mpo_ext.files import write_json
from mpo_ext.integrations.checkpoint_weights import renamed_weights_loaded
from mpo_ext.loss.reward_shift import RewardShift

STATE_FILE = "reward_shift.json"


class RewardShiftStep(TrainerCallback):
    """Calls ``RewardShift.step`` after each optimizer step."""

    def __init__(self, reward_shift: RewardShift) -> None:
        self.reward_shift = reward_shift

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reward_shift.step()


class RewardShiftCheckpoints:
    """Mixin for subclasses of Trainer: checkpoints save and restore the attribute ``reward_shift``.

    It also restores weights that ``save_pretrained`` has renamed. Trainer itself does not restore them.
    """

    reward_shift: RewardShift
    model: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save_reward_shift(self, self.reward_shift, trial)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with renamed_weights_loaded(self, self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        with renamed_weights_loaded(self, self.model, self.state.best_model_checkpoint):
            super()._load_best_model()  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            load_reward_shift(self.reward_shift, checkpoint)


def make_reward_shift(settings: Mapping[str, Any]) -> RewardShift:
    """Returns a ``RewardShift`` with the given settings.

    Raises:
        TypeError: If ``settings`` is not a mapping or has an unknown key, or ``decay`` or ``value`` is not a number.
        ValueError: If a setting has a value that is not allowed.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"reward_shift must be a mapping of the settings of RewardShift, got {settings!r}")
    known = ("mode", "decay", "update", "value", "per")
    if unknown := [key for key in settings if key not in known]:
        raise TypeError(f"reward_shift must have keys among {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return RewardShift(**settings)


def check_reward_shift(reward_shift: object) -> RewardShift | None:
    """Returns the argument. Raises TypeError if it is neither a ``RewardShift`` nor None."""
    if reward_shift is None or isinstance(reward_shift, RewardShift):
        return reward_shift
    raise TypeError(
        f"reward_shift must be a RewardShift or None, got {reward_shift!r}: a fixed number is "
        "RewardShift('fixed', value=...)"
    )


def save_reward_shift(trainer: Any, reward_shift: RewardShift, trial: Any) -> None:
    """Writes the state of the reward shift to the folder of the checkpoint that ``trainer`` is about to save.

    Call this before the trainer's own ``_save_checkpoint``, so that every complete checkpoint has the state. ``trial``
    is the argument of ``_save_checkpoint``.
    """
    if trainer.args.should_save:
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        write_json(folder / STATE_FILE, reward_shift.state_dict())


def load_reward_shift(reward_shift: RewardShift, checkpoint: str) -> None:
    """Restores the state of the reward shift from a checkpoint's folder.

    Raises:
        ValueError: If a ``RewardShift`` with other settings saved the state. Also raised if the folder has no state,
            except for the mode "fixed".
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        if reward_shift.mode == "fixed":
            return
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint with a reward shift, got {checkpoint} without {STATE_FILE}: "
            "it comes from a run without mpo_ext. Start a new run from its weights, or fix the reward shift"
        )
    try:
        reward_shift.load_state_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} must hold the state of this run's reward shift: {error}") from error
