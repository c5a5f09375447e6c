"""Implements ``mpo_ext.patch("ms-swift")``: ms-swift's ``--rlhf_type dpo`` then computes its loss with mpo_ext."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from swift.rlhf_trainers.dpo_trainer import DPOTrainer
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

#: Weights of MPOConfig by ms-swift's names of the terms of the loss.
_TERMS = {"sigmoid": "dpo_weight", "bco_pair": "bco_weight", "sft": "ntp_weight"}
_NOT_FOR_MODEL = ("labels", "text_position_ids", "ref_chosen_logps", "ref_rejected_logps")


def replacements(*, reward_shift: Mapping[str, Any] | None = None) -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("ms-swift")`` replaces, and a line that describes the change.

    The replaced methods belong to ``DPOTrainer``. The new methods compute losses with the terms "sigmoid", "bco_pair"
    and "sft". ms-swift still computes all other losses. It also computes losses with options that mpo_ext lacks, such
    as packing.
    """
    shift_settings = {"mode": "cumulative"} if reward_shift is None else reward_shift
    settings = settings_function(_other_loss, _config_of, shift_settings)
    own_reference, own_loss = DPOTrainer.compute_ref_log_probs, DPOTrainer.get_batch_loss_metrics

    def compute_ref_log_probs(self: Any, batch: dict[str, Any]) -> Any:
        mpo = settings(self)
        return own_reference(self, batch) if mpo is None else _reference_logp(self, mpo, batch).chunk(2)

    def get_batch_loss_metrics(
        self: Any, model: nn.Module, batch: dict[str, Any], train_eval: str = "train", pair_loss_scale: Any = None
    ) -> Any:
        mpo = settings(self)
        if mpo is None:
            return own_loss(self, model, batch, train_eval, pair_loss_scale)
        return _loss(self, mpo, model, batch, train_eval)

    changes = [
        Replacement(DPOTrainer, "compute_ref_log_probs", compute_ref_log_probs),
        Replacement(DPOTrainer, "get_batch_loss_metrics", get_batch_loss_metrics),
        *checkpoint_replacements(DPOTrainer, settings),
    ]
    shown = ", ".join(f"{key}={value!r}" for key, value in shift_settings.items())
    return changes, (
        f"rlhf_type dpo with the terms sigmoid, bco_pair and sft computes no logits (reward shift: {shown}, also in "
        "checkpoints); other losses stay ms-swift's"
    )


def _other_loss(trainer: Any) -> str | None:
    """Returns why mpo_ext cannot compute the loss, such as "ld_alpha must be None, got 0.5".

    Returns None if mpo_ext computes the loss.
    """
    weights = _weights(trainer)
    if other := [name for name in weights if name not in _TERMS]:
        return f"loss_type must be among {', '.join(_TERMS)}, got {', '.join(other)}"
    if min(weights.values()) < 0 or not any(weights.values()):
        return f"loss_weights must be at least 0, and one of them positive, got {list(weights.values())}"
    if trainer.args.ld_alpha is not None:
        return f"ld_alpha must be None, got {trainer.args.ld_alpha}"
    if str(getattr(trainer.f_divergence_type, "value", trainer.f_divergence_type)) != "reverse_kl":
        return f"f_divergence_type must be reverse_kl, got {trainer.f_divergence_type}"
    if trainer.reference_free:
        return "reference_free must be False, got True"
    if trainer.template.sequence_parallel_size > 1:
        return f"sequence_parallel_size must be 1, got {trainer.template.sequence_parallel_size}"
    if trainer.template.packing:
        return "packing must be False, got True"
    if trainer.is_encoder_decoder:
        return "the model must be a decoder, got an encoder-decoder"
    return None


def _weights(trainer: Any) -> dict[str, float]:
    names = trainer.loss_type if isinstance(trainer.loss_type, list) else [trainer.loss_type]
    weights = dict.fromkeys(names, 0.0)
    for name, weight in zip(names, getattr(trainer, "loss_weights", None) or [1.0] * len(names), strict=True):
        weights[name] += weight
    if trainer.args.rpo_alpha:
        weights["sft"] = weights.get("sft", 0.0) + trainer.args.rpo_alpha
    return weights


def _config_of(trainer: Any) -> MPOConfig:
    weights: dict[str, Any] = dict.fromkeys(_TERMS.values(), 0.0)
    weights |= {_TERMS[name]: value for name, value in _weights(trainer).items()}
    return MPOConfig(beta=trainer.beta, label_smoothing=trainer.label_smoothing, **weights)


def _loss(
    trainer: Any, mpo: LossSettings, model: nn.Module, batch: dict[str, Any], train_eval: str
) -> tuple[Tensor, dict[str, float]]:
    mpo.reward_shift.train(train_eval == "train")
    ref_logp = _reference_logp(trainer, mpo, batch)
    inputs = _model_inputs(batch)
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    cu_seqlens = _cu_seqlens(trainer, batch)
    loss, out, outputs = loss_of_rows(model, inputs, batch["labels"], ref_logp, mpo, cu_seqlens=cu_seqlens)
    metrics = loss_metrics(out)
    metrics["nll_loss"] = metrics.pop("loss/ntp")
    if trainer.aux_loss_enabled:
        metrics["aux_loss"] = outputs.aux_loss
        loss = loss + trainer.aux_loss_coef * outputs.aux_loss
    values = torch.stack([value.detach().double() for value in metrics.values()])
    means = trainer.accelerator.reduce(values, reduction="mean").tolist()
    prefix = "eval_" if train_eval == "eval" else ""
    return loss, {f"{prefix}{name}": value for name, value in zip(metrics, means, strict=True)}


def _reference_logp(trainer: Any, mpo: LossSettings, batch: dict[str, Any]) -> Tensor:
    without_adapters = trainer.null_ref_context() if trainer.ref_model is None else contextlib.nullcontext()
    reference = trainer.model if trainer.ref_model is None else trainer.ref_model
    with torch.no_grad(), without_adapters:
        cu_seqlens = _cu_seqlens(trainer, batch)
        return logp_of_rows(reference, _model_inputs(batch), batch["labels"], mpo.options, cu_seqlens=cu_seqlens)


def _cu_seqlens(trainer: Any, batch: dict[str, Any]) -> Tensor | None:
    """Returns ``cu_seqlens``, the starts of the packed sequences. Without ``--padding_free``, returns None."""
    if not trainer.template.padding_free:
        return None
    positions = batch.get("text_position_ids")
    return trainer.get_cu_seqlens(batch["position_ids"] if positions is None else positions, None)


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_MODEL} | {"use_cache": False}
