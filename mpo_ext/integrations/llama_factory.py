"""Implements ``mpo_ext.patch("llama-factory")``: LLaMA-Factory's DPO stage then computes its loss with mpo_ext."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor, nn

from mpo_ext.integrations.metrics import loss_metrics
from mpo_ext.integrations.patching import Replacement
from mpo_ext.integrations.separate_rows import (
    LossSettings,
    checkpoint_replacements,
    logp_of_rows,
    loss_of_rows,
    settings_function,
)
from mpo_ext.loss.config import MPOConfig

_SMALLEST = 1e-6  # LLaMA-Factory leaves out terms with a smaller weight


def replacements(*, reward_shift: Mapping[str, Any] | None = None) -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("llama-factory")`` replaces, and a line that describes the change.

    The replaced methods belong to ``CustomDPOTrainer``. The new methods compute the loss if ``pref_loss`` is "sigmoid"
    and ``ld_alpha`` is not set. LLaMA-Factory computes all other losses.
    """
    shift_settings = {"mode": "cumulative"} if reward_shift is None else reward_shift
    settings = settings_function(_other_loss, _config_of, shift_settings)
    own_reference = CustomDPOTrainer.compute_reference_log_probs
    own_loss = CustomDPOTrainer.get_batch_loss_metrics

    def compute_reference_log_probs(self: Any, model: nn.Module, batch: dict[str, Any]) -> Any:
        mpo = settings(self)
        return own_reference(self, model, batch) if mpo is None else _reference_logp(self, mpo, model, batch).chunk(2)

    def get_batch_loss_metrics(self: Any, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
        mpo = settings(self)
        return own_loss(self, model, batch, train_eval) if mpo is None else _loss(self, mpo, model, batch, train_eval)

    changes = [
        Replacement(CustomDPOTrainer, "compute_reference_log_probs", compute_reference_log_probs),
        Replacement(CustomDPOTrainer, "get_batch_loss_metrics", get_batch_loss_metrics),
        *checkpoint_replacements(CustomDPOTrainer, settings),
    ]
    shown = ", ".join(f"{key}={value!r}" for key, value in shift_settings.items())
    return changes, (
        f"stage dpo with pref_loss sigmoid computes no logits (reward shift: {shown}, also in checkpoints); other "
        "losses stay LLaMA-Factory's"
    )


def _other_loss(trainer: Any) -> str | None:
    """Returns why mpo_ext cannot compute the loss, such as "ld_alpha must be None, got 0.5".

    Returns None if mpo_ext computes the loss.
    """
    if not trainer.finetuning_args.use_ref_model or trainer.loss_type != "sigmoid":
        return f"pref_loss must be 'sigmoid', got {trainer.loss_type!r}"
    if trainer.ld_alpha is not None:
        return f"ld_alpha must be None, got {trainer.ld_alpha}"
    return None


def _config_of(trainer: Any) -> MPOConfig:
    bco_weight = trainer.bco_gemma if trainer.bco_gemma > _SMALLEST else 0.0
    return MPOConfig(
        beta=trainer.beta,
        dpo_weight=1 / (1 + bco_weight),
        bco_weight=bco_weight / (1 + bco_weight),
        ntp_weight=trainer.ftx_gamma if trainer.ftx_gamma > _SMALLEST else 0.0,
        ntp_average="sequence",
        label_smoothing=trainer.label_smoothing,
    )


def _loss(
    trainer: Any, mpo: LossSettings, model: nn.Module, batch: dict[str, Any], train_eval: str
) -> tuple[Tensor, dict[str, float]]:
    mpo.reward_shift.train(train_eval == "train")
    ref_logp = _reference_logp(trainer, mpo, model, batch)
    loss, out, _ = loss_of_rows(model, _model_inputs(batch), batch["labels"], ref_logp, mpo)
    metrics = loss_metrics(out)
    values = torch.stack([value.detach().float() for value in metrics.values()]).tolist()
    prefix = "eval_" if train_eval == "eval" else ""
    return loss, {f"{prefix}{name}": value for name, value in zip(metrics, values, strict=True)}


def _reference_logp(trainer: Any, mpo: LossSettings, model: nn.Module, batch: dict[str, Any]) -> Tensor:
    without_adapters: Any = contextlib.nullcontext()
    if trainer.ref_model is None:
        without_adapters = trainer.accelerator.unwrap_model(model).disable_adapter()
    with torch.no_grad(), without_adapters:
        reference = model if trainer.ref_model is None else trainer.ref_model
        return logp_of_rows(reference, _model_inputs(batch), batch["labels"], mpo.options)


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return inputs | {"return_dict": True, "use_cache": False}
