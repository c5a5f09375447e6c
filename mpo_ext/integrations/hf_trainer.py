"""The MPO loss for subclasses of transformers' Trainer, on the batches of ``mpo_ext.train.batch``."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from mpo_ext.integrations.metrics import loss_metrics
from mpo_ext.integrations.reward_shift_state import RewardShiftCheckpoints, RewardShiftStep, check_reward_shift
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.eager import sequence_sums
from mpo_ext.loss.functions import linear_mpo_loss, linear_token_logp
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train.batch import Batch, RowLayout
from mpo_ext.train.dataset import Collator
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.forward import forward
from mpo_ext.train.masks import prompt_positions, use_split_attention
from mpo_ext.train.settings import SharedPrefix
from mpo_ext.train.shared_prefix import check_shared_prefix, shared_layouts

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_DEFAULT_CONFIG = MPOConfig()
#: For each layout that ``PairCollator.for_model`` takes, the setting of ``shared_layouts``; None: the first that fits.
_SETTINGS: dict[RowLayout | None, SharedPrefix] = {
    None: True, "packed": True, "shared": "padded", "masked": "masked", "separate": False
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PairCollator:
    """Collates samples of ``mpo_ext.train.encode.Encoder`` into ``{"batch": Batch}`` for ``MPOLossMixin``."""

    collator: Collator

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        encoder: Encoder,
        samples: Sequence[Sample],
        *,
        layout: RowLayout | None = None,
    ) -> PairCollator:
        """Returns a collator for a model.

        If the model supports it, the two responses of a pair share their prompt. The prompt is then computed only
        once.

        Args:
            model: The model that will be trained, before any wrapper.
            encoder: The encoder that made the samples.
            samples: One or two samples, on which a layout is tested. The log-probs must equal the log-probs of the
                layout "separate". If the data has images, one of the samples must have images.
            layout: Arrangement of prompts and responses in rows: "packed", "shared", "masked" or "separate"; see
                ``mpo_ext.train.batch.Batch``. None: the first of "packed", "shared" and "masked" that passes the test,
                otherwise "separate".

        Raises:
            ValueError: If ``layout`` is unknown, the model does not support it, or there are no samples.
        """
        if not samples:
            raise ValueError("samples must be one or two samples, got none")
        if layout not in _SETTINGS:
            known = ", ".join(name for name in _SETTINGS if name is not None)
            raise ValueError(f"layout must be one of {known}, got {layout!r}")
        pad_id = encoder.tokenizer.pad_token_id
        pad_id = encoder.end_id if pad_id is None else pad_id
        positions = prompt_positions(model)
        device = next(model.parameters()).device
        reasons: list[str] = []
        for candidate in shared_layouts([model], _SETTINGS[layout], reasons):
            if layout not in (None, candidate):
                break
            reason = check_shared_prefix(
                model, samples, pad_id=pad_id, positions=positions, device=device, layout=candidate
            )
            if reason is None:
                return cls(Collator(candidate, pad_id, with_rejected=True, positions=positions))
            reasons.append(reason)
        if layout not in (None, "separate"):
            raise ValueError(f"layout must be a layout that the model supports, got {layout!r}: {reasons[-1]}")
        return cls(Collator("separate", pad_id, with_rejected=True, positions=positions))

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {"batch": self.collator(samples)}


class MPOLossMixin(RewardShiftCheckpoints, _Base):
    """Gives a subclass of transformers' Trainer the MPO loss: ``class PairTrainer(MPOLossMixin, Trainer)``.

    The data set holds samples of ``mpo_ext.train.encode.Encoder``; ``data_collator`` is a ``PairCollator``. A batch
    may hold ``ref_logp``, ``[2B]``: the summed log-probs under the reference model, chosen responses first. Without
    ``ref_logp``, the trainer computes these log-probs with the reference model.

    Checkpoints also save the reward shift. The log shows each term of the loss. As in Trainer, all micro-batches of an
    optimizer step have the same weight.

    Args:
        *args: As in Trainer.
        mpo_config: Weights, beta and the other settings of the loss.
        reward_shift: The reward shift. None: ``RewardShift()``, as in the authors' code.
        ref_model: Reference model. None: the policy without its LoRA adapters. For a policy without adapters, None
            stands for a copy of the initial policy.
        **kwargs: As in Trainer.

    Raises:
        ValueError: If the reference is a second model under FSDP or DeepSpeed, because Trainer cannot shard it.
    """

    def __init__(
        self,
        *args: Any,
        mpo_config: MPOConfig = _DEFAULT_CONFIG,
        reward_shift: RewardShift | None = None,
        ref_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mpo_config, self.reward_shift = mpo_config, check_reward_shift(reward_shift) or RewardShift()
        if ref_model is not None and ref_model is self.model:
            raise ValueError("ref_model must be another model than the policy, which training changes: leave it None")
        self._prefix = "eval"  # of the metrics of the current evaluation
        self._terms: dict[str, dict[str, list[float]]] = {
            mode: collections.defaultdict(list) for mode in ("train", "eval")
        }
        if ref_model is None and not is_peft_model(self.model):
            ref_model = copy.deepcopy(self.model)
        if ref_model is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "model must have LoRA adapters under FSDP and DeepSpeed, got a reference that is a second model: "
                "mpo-ext train and MPOTrainer of mpo_ext.integrations.trl shard it"
            )
        self.ref_model = ref_model
        if ref_model is not None:
            use_split_attention(ref_model)  # as in the policy, for which the collator chose the layout
            ref_model.eval().requires_grad_(False)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.add_callback(RewardShiftStep(self.reward_shift))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Returns the MPO loss of a batch; with ``return_outputs`` also the ``MPOOutput``."""
        is_training = self.model.training
        self.reward_shift.train(is_training)
        batch = inputs["batch"].to(self.accelerator.device)
        ref_logp = inputs.get("ref_logp")
        if ref_logp is None:
            ref_logp = self._reference_logp(batch)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            rows = forward(model, batch)
            out = linear_mpo_loss(
                rows.hidden, rows.weight, batch.labels, ref_logp.to(rows.hidden.device), config=self.mpo_config,
                reward_shift=self.reward_shift, cu_seqlens=batch.cu_seqlens, shift=False, **rows.options,
            )  # fmt: skip
        self._add_terms("train" if is_training else "eval", out)
        return (out.loss, out) if return_outputs else out.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the means of ``loss_metrics`` since the last call, in addition to the trainer's own values."""
        mode = "train" if self.model.training else "eval"
        prefix = f"{self._prefix}_" if mode == "eval" else ""
        means = {f"{prefix}{name}": sum(values) / len(values) for name, values in self._terms[mode].items()}
        self._terms[mode].clear()
        logs.update(means)  # in place, so that ``evaluate`` returns the means, too
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Works as in Trainer. The result also has the means of ``loss_metrics``."""
        before = self._prefix
        self._prefix = args[2] if len(args) > 2 else kwargs.get("metric_key_prefix", "eval")
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._prefix = before

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Works as in Trainer. The terms of the loss do not count for the next evaluation."""
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._terms["eval"].clear()

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        """Returns (loss, None, None) for an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    @torch.no_grad()
    def _reference_logp(self, batch: Batch) -> Tensor:
        without_adapters = contextlib.nullcontext()
        if self.ref_model is None:
            without_adapters = self.accelerator.unwrap_model(self.model).disable_adapter()
        model: Any = self.model if self.ref_model is None else self.ref_model
        is_training = model.training
        model.eval()  # the reference has no dropout
        try:
            with without_adapters, self.accelerator.autocast():
                rows = forward(model, batch)
                logp = linear_token_logp(rows.hidden, rows.weight, batch.labels, shift=False, **rows.options)
        finally:
            model.train(is_training)
        return sequence_sums(logp.double(), batch.cu_seqlens)

    def _add_terms(self, mode: str, out: Any) -> None:
        terms = loss_metrics(out)
        values = torch.stack([value.detach().double() for value in terms.values()])
        for name, value in zip(terms, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True):
            self._terms[mode][name].append(value)
