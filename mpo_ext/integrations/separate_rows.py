"""Computes the loss for the batches of other trainers, which have a separate row for each response."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpo_ext.integrations.checkpoint_weights import renamed_weights_loaded
from mpo_ext.integrations.patching import Replacement
from mpo_ext.integrations.reward_shift_state import (
    RewardShiftStep,
    load_reward_shift,
    make_reward_shift,
    save_reward_shift,
)
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.eager import sequence_sums
from mpo_ext.loss.functions import linear_mpo_loss, linear_token_logp
from mpo_ext.loss.hf_head import HiddenAndHead, value_in_forward
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.loss.steps import MPOOutput, shift_labels


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Settings of a trainer's loss. ``options`` are keyword arguments of ``linear_mpo_loss``."""

    config: MPOConfig
    reward_shift: RewardShift
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def settings_function(
    other_loss: Callable[[Any], str | None], config_of: Callable[[Any], MPOConfig], reward_shift: Mapping[str, Any]
) -> Callable[[Any], LossSettings | None]:
    """Returns a function that takes a trainer, and returns the ``LossSettings`` of this trainer.

    The returned function first calls ``other_loss(trainer)``. If the result is a reason, the function prints the
    reason once per trainer, and returns None. The trainer then computes its own loss.

    Args:
        other_loss: Function that takes a trainer. It returns the reason why mpo_ext cannot compute the trainer's loss,
            or None if mpo_ext can compute it.
        config_of: Function that takes a trainer, and returns the ``MPOConfig`` of its loss.
        reward_shift: Settings of ``RewardShift``.

    Raises:
        TypeError: As in ``make_reward_shift``.
        ValueError: As in ``make_reward_shift``.
    """
    make_reward_shift(reward_shift)  # so that bad settings raise now, not in the first step

    def settings(trainer: Any) -> LossSettings | None:
        reason = other_loss(trainer)
        if reason is not None:
            keep_own_loss(trainer, reason)
            return None
        if not hasattr(trainer, "mpo"):
            trainer.mpo = LossSettings(config_of(trainer), make_reward_shift(reward_shift))
            trainer.add_callback(RewardShiftStep(trainer.mpo.reward_shift))
            if trainer.mpo.config.bco_weight == 0 and trainer.mpo.reward_shift.mode != "fixed":
                warnings.warn(
                    f"the loss of {type(trainer).__name__} has no BCO term, so the reward shift of the patch does not "
                    "change it: MPO has the terms DPO, BCO and SFT",
                    stacklevel=2,
                )
        return trainer.mpo

    return settings


def loss_of_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    ref_logp: Tensor,
    mpo: LossSettings,
    *,
    stats: Sequence[str] = (),
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, MPOOutput, Any]:
    """Runs the model on a batch. Returns the differentiable loss, the ``MPOOutput`` and the model's output.

    Args:
        model: The model.
        inputs: Keyword arguments of the model.
        labels: ``[2B, T]`` (the B chosen rows first), or ``[1, N]`` for a packed row. Aligned with ``input_ids``.
        ref_logp: ``[2B]``, the summed log-probs of the responses under the reference model.
        mpo: Settings of the loss.
        stats: Statistics to compute, as in ``mpo_loss``.
        cu_seqlens: ``[2B + 1]``, the starts of the sequences in a packed row, and N at the end. None: not packed.
    """
    results: list[MPOOutput] = []

    def compute(head: HiddenAndHead) -> Tensor:
        device = head.hidden.device
        rows, targets = _token_rows(head, labels), labels.to(device)
        if cu_seqlens is not None:
            rows, targets = rows[0], targets[0]
        out = linear_mpo_loss(
            rows, head.weight, targets, ref_logp.to(device), config=mpo.config, reward_shift=mpo.reward_shift,
            cu_seqlens=cu_seqlens, stats=stats, **head.options, **mpo.options,
        )  # fmt: skip
        results.append(out)
        return out.loss

    loss, outputs = value_in_forward(model, compute, **inputs)
    return loss, results[0], outputs


@torch.no_grad()
def logp_of_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    options: Mapping[str, Any],
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Returns the summed log-probs of the labels of each response, ``[2B]`` float64, without gradient.

    ``options`` are keyword arguments of ``linear_token_logp``. For the other arguments, see ``loss_of_rows``.
    """
    targets = shift_labels(labels, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(labels.device))

    def compute(head: HiddenAndHead) -> Tensor:
        return linear_token_logp(
            _token_rows(head, labels), head.weight, targets.to(head.hidden.device), shift=False,
            **head.options, **options,
        )  # fmt: skip

    logp, _ = value_in_forward(model, compute, **inputs)
    return logp.double().sum(-1) if cu_seqlens is None else sequence_sums(logp[0].double(), cu_seqlens)


def keep_own_loss(trainer: Any, reason: str) -> None:
    """Prints the reason why a trainer computes its own loss. Prints only once per trainer."""
    if not hasattr(trainer, "mpo_notice") and trainer.is_world_process_zero():
        print(f"mpo_ext: {type(trainer).__name__} keeps its own loss, because {reason}", file=sys.stderr)
    trainer.mpo_notice = reason


def _token_rows(head: HiddenAndHead, labels: Tensor) -> Tensor:
    """Returns the hidden states of the tokens, without the virtual tokens that prompt tuning prepends."""
    return head.hidden[:, head.hidden.shape[1] - labels.shape[1] :]


def checkpoint_replacements(owner: Any, settings: Callable[[Any], LossSettings | None]) -> list[Replacement]:
    """Returns replacements for the checkpoint methods of a Trainer class, such as ``_save_checkpoint``.

    The new methods also save and load the reward shift. If ``save_pretrained`` has renamed weights, the new methods
    still load them. ``settings`` is a result of ``settings_function``.
    """

    def inherited(name: str) -> Callable[..., Any]:
        """Returns a function that calls the original method ``name`` of ``owner``."""
        own: Any = vars(owner).get(name)

        def call(self: Any, *arguments: Any) -> Any:
            return getattr(super(owner, self), name)(*arguments) if own is None else own(self, *arguments)

        return call

    own_save, own_load_state = inherited("_save_checkpoint"), inherited("_load_optimizer_and_scheduler")
    own_load_weights, own_load_best = inherited("_load_from_checkpoint"), inherited("_load_best_model")

    def save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        if (mpo := settings(self)) is not None:
            save_reward_shift(self, mpo.reward_shift, trial)
        own_save(self, model, trial)

    def load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        own_load_state(self, checkpoint)
        if checkpoint is not None and (mpo := settings(self)) is not None:
            load_reward_shift(mpo.reward_shift, checkpoint)

    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with renamed_weights_loaded(self, self.model if model is None else model, resume_from_checkpoint):
            own_load_weights(self, resume_from_checkpoint, model)

    def load_best_model(self: Any) -> None:
        with renamed_weights_loaded(self, self.model, self.state.best_model_checkpoint):
            own_load_best(self)

    return [
        Replacement(owner, "_save_checkpoint", save_checkpoint),
        Replacement(owner, "_load_from_checkpoint", load_from_checkpoint),
        Replacement(owner, "_load_best_model", load_best_model),
        Replacement(owner, "_load_optimizer_and_scheduler", load_optimizer_and_scheduler),
    ]
