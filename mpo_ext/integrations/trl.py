"""The loss of mpo_ext in TRL's ``DPOTrainer``. Defines ``MPOTrainer``, and implements ``mpo_ext.patch("trl")``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, hash_module, use_adapter

from mpo_ext.integrations.patching import Replacement, check_sources
from mpo_ext.integrations.reward_shift_state import (
    RewardShiftCheckpoints,
    RewardShiftStep,
    check_reward_shift,
    make_reward_shift,
)
from mpo_ext.integrations.separate_rows import (
    LossSettings,
    checkpoint_replacements,
    logp_of_rows,
    loss_of_rows,
    settings_function,
)
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.loss.steps import MPOOutput
from mpo_ext.train.model_card import CITATION

#: Weights of MPOConfig by TRL's names of the terms of the loss.
_TERMS = {"sigmoid": "dpo_weight", "bco_pair": "bco_weight", "sft": "ntp_weight"}
_NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_STATS = ("entropy", "top1", "mean_logit")


@dataclasses.dataclass
class MPOTrainingConfig(DPOConfig):
    """Arguments of ``MPOTrainer``: those of TRL's ``DPOConfig``, with the paper's loss as default.

    Attributes:
        loss_type: Any of "sigmoid" (DPO), "bco_pair" (BCO) and "sft" (next-token loss).
        loss_weights: Weight of each term; None: 1 for each.
        label_smoothing: Assumed fraction of pairs with swapped responses (conservative DPO), in ``[0, 0.5)``.
        reward_shift: Mode of ``RewardShift``: "cumulative", "ema" or "fixed".
        reward_shift_update: "before" or "after", see ``RewardShift``.
        reward_shift_per: "micro_batch" or "optimizer_step", see ``RewardShift``.
        reward_shift_decay: Fraction of the old value that "ema" keeps.
        reward_shift_value: Initial reward shift.
        ntp_average: "token" or "sequence", see ``MPOConfig``.
        memory_budget_mib: MiB for a tile of logits; None: the default of ``linear_mpo_loss``.
        recompute: Whether backward computes the tiles of logits again, see ``linear_mpo_loss``.
    """

    loss_type: list[str] = dataclasses.field(
        default_factory=lambda: list(_TERMS), metadata={"help": "Terms of the loss: sigmoid, bco_pair, sft."}
    )
    loss_weights: list[float] | None = dataclasses.field(
        default_factory=lambda: [0.8, 0.2, 1.0], metadata={"help": "Weight of each term."}
    )
    reward_shift: str = dataclasses.field(
        default="cumulative", metadata={"help": "Mode of the reward shift: cumulative, ema or fixed."}
    )
    reward_shift_update: str = dataclasses.field(
        default="before", metadata={"help": "Whether the reward shift moves before or after its use."}
    )
    reward_shift_per: str = dataclasses.field(
        default="micro_batch", metadata={"help": "The reward shift moves per micro_batch or per optimizer_step."}
    )
    reward_shift_decay: float = dataclasses.field(
        default=0.99, metadata={"help": "Fraction of the old reward shift that the mode ema keeps."}
    )
    reward_shift_value: float = dataclasses.field(default=0.0, metadata={"help": "Initial reward shift."})
    ntp_average: str = dataclasses.field(
        default="token", metadata={"help": "Next-token loss: mean over all tokens, or over each sequence first."}
    )
    memory_budget_mib: int | None = dataclasses.field(
        default=None,
        metadata={"help": "MiB for a tile of logits. None: 64 on a CPU; 1/160 of the memory of a GPU, 256 to 1024."},
    )
    recompute: bool = dataclasses.field(
        default=True, metadata={"help": "Whether backward computes the tiles of logits again."}
    )

    def __post_init__(self) -> None:
        if reason := _other_terms(self):  # before DPOConfig compares the number of weights
            raise ValueError(f"{reason}; otherwise use trl.DPOTrainer and trl.DPOConfig")
        super().__post_init__()
        _settings_of(self)
        _reward_shift_of(self)


class MPOTrainer(RewardShiftCheckpoints, DPOTrainer):
    """TRL's ``DPOTrainer`` with the MPO loss of mpo_ext, computed from hidden states without logits.

    The trainer supports full training and LoRA, with text and images. It runs with DDP, FSDP2 and DeepSpeed's ZeRO. It
    adds the reward shift of the MPO paper, and saves the shift in checkpoints. ``precompute_ref_log_probs`` also works
    with images. The log has each term of the loss (``loss/dpo``, ``loss/bco``, ``loss/ntp``), and ``reward_shift``.

    Args:
        model: As in ``DPOTrainer``.
        ref_model: As in ``DPOTrainer``.
        args: ``MPOTrainingConfig``, or a ``DPOConfig`` whose ``loss_type`` has only "sigmoid", "bco_pair" and "sft".
            None: the default ``MPOTrainingConfig``.
        *rest: Further positional arguments of ``DPOTrainer``.
        reward_shift: The reward shift. None: the reward shift in ``args``, or ``RewardShift()`` for a ``DPOConfig``.
        **kwargs: Further arguments of ``DPOTrainer``.

    Raises:
        RuntimeError: If TRL has a version or source that mpo_ext does not know.
        ValueError: If ``args`` sets ``use_liger_kernel``, or asks for a loss that is not a sum of MPO's terms. Also
            raised for ``precompute_ref_log_probs`` with images under FSDP or DeepSpeed, or with TRL before 1.14.
    """

    ref_model: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    _tag_names = ["trl", "dpo", "mpo"]  # noqa: RUF012
    _name = "MPO"
    _paper = {  # noqa: RUF012
        "title": "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference "
        "Optimization",
        "id": "2411.10442",
        "citation": CITATION,
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *rest: Any,
        reward_shift: RewardShift | None = None,
        **kwargs: Any,
    ) -> None:
        check_sources("trl")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = MPOTrainingConfig(f"{name.split('/')[-1]}-MPO")
        config, options = _settings_of(args)
        if not isinstance(args, MPOTrainingConfig) and set(_terms_of(args)) != set(_TERMS):
            warnings.warn(
                f"MPOTrainer computes the terms of loss_type alone, got {_terms_of(args)} in a "
                f"{type(args).__name__}: MPOTrainingConfig has the three terms of MPO as default",
                stacklevel=2,
            )
        self.reward_shift = check_reward_shift(reward_shift) or _reward_shift_of(args)
        self.mpo = LossSettings(config, self.reward_shift, options)
        precompute = _has_images(kwargs.get("train_dataset", rest[1] if len(rest) > 1 else None))
        precompute = precompute and args.precompute_ref_log_probs
        if precompute:  # TRL does not support this; ``_precompute_with_images`` does it below
            args = copy.copy(args)
            args.precompute_ref_log_probs = False
        super().__init__(model, ref_model, args, *rest, **kwargs)
        self.add_callback(RewardShiftStep(self.reward_shift))
        if precompute:
            self._precompute_with_images()

    def compute_ref_log_probs(self, *model_and_inputs: Any) -> tuple[Tensor, ...]:
        """Returns the summed log-probs of the chosen and of the rejected responses under the reference model."""
        return reference_logp(self, self.mpo, *_model_and_inputs(self, *model_and_inputs)).chunk(2)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        return loss_of_batch(self, self.mpo, model, inputs, return_outputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in _NOT_FOR_MODEL[1:]:
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def _precompute_with_images(self) -> None:
        """Adds columns with the reference log-probs to data sets with images. Then drops the reference model."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "precompute_ref_log_probs must be False for images under FSDP or DeepSpeed, got True: compute the "
                "log-probs in a run without them first (TRL caches them with the data set), or keep the reference"
            )
        if not hasattr(self, "_precompute_model_hash"):
            raise ValueError(
                "precompute_ref_log_probs must be False for images with TRL before 1.14, got True: its cache does not "
                "notice another processor or length; pip install --upgrade trl"
            )
        self.args.precompute_ref_log_probs = self.precompute_ref_logps = True
        # The cache must not serve another processor or length: TRL's fingerprint covers data and model only.
        text_tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        templates = [getattr(part, "chat_template", None) for part in (self.processing_class, text_tokenizer)]
        encoding = [str(self.processing_class), *templates, sorted(text_tokenizer.get_vocab().items())]
        model_hash = hash_module(self.ref_model or self.model)
        self._precompute_model_hash = Hasher.hash([model_hash, self.args.max_length, json.dumps(encoding)])
        sizes = self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size
        train_size, eval_size = (self.args.precompute_ref_batch_size or size for size in sizes)
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", train_size)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._precompute_ref_logps(dataset, name, eval_size)
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", eval_size)
        self.data_collator = _WithReference(self.data_collator)
        self.ref_model = None


@dataclasses.dataclass(frozen=True)
class _WithReference:
    """Wraps a collator: adds the precomputed reference log-probs of the examples to each batch."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in _NOT_FOR_MODEL[1:]:
            if missing := sum(name not in example for example in examples):
                raise ValueError(
                    f"each example must have {name}, got {missing} without: with precompute_ref_log_probs and "
                    "images, pass every data set to MPOTrainer itself, not to evaluate()"
                )
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch


def loss_of_batch(
    trainer: Any, mpo: LossSettings, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
) -> Any:
    """Returns the loss of a batch. With ``return_outputs``, also returns the model's output.

    Replaces ``DPOTrainer._compute_loss``. The logits of the output come from a second forward, without gradient.
    """
    is_training = trainer.model.training
    mpo.reward_shift.train(is_training)
    if trainer.precompute_ref_logps:
        ref_logp = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        ref_logp = reference_logp(trainer, mpo, trainer.ref_model or trainer.model, inputs)
    labels, model_inputs = _labels_and_inputs(inputs)
    has_aux_loss = getattr(trainer, "aux_loss_enabled", False)  # TRL before 1.8 has no such loss
    if has_aux_loss:
        model_inputs["output_router_logits"] = True
    loss, out, outputs = loss_of_rows(model, model_inputs, labels, ref_logp, mpo, stats=_STATS)
    terms = _log_sums(out, mpo.config)
    if has_aux_loss:
        aux_loss = outputs.aux_loss.to(loss.device)
        loss = loss + trainer.router_aux_loss_coef * aux_loss
        terms["aux_loss"] = (aux_loss.detach(), torch.ones_like(aux_loss))
    _log(trainer, "train" if is_training else "eval", terms, inputs)
    if not return_outputs:
        return loss
    with torch.no_grad():  # for compute_metrics, as TRL does
        return loss, model(**model_inputs)


def reference_logp(trainer: Any, mpo: LossSettings, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Returns the summed log-probs of the responses under the reference model: ``[2B]`` float64, chosen first.

    ``model`` is the reference model. If the trainer has no reference model, ``model`` is the policy. A policy with
    adapters then runs with its adapter "ref", or without adapters if "ref" does not exist.

    Replaces ``DPOTrainer.compute_ref_log_probs``.
    """
    labels, model_inputs = _labels_and_inputs(inputs)
    checkpointing = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    with torch.no_grad(), checkpointing, _without_adapters(trainer), trainer.accelerator.autocast():
        return logp_of_rows(model, model_inputs, labels, mpo.options)


def _model_and_inputs(trainer: Any, *model_and_inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Returns (model, inputs) from the arguments of ``compute_ref_log_probs``.

    TRL before 1.9 passes no model. The result then has ``trainer.ref_model``. Without a reference model, the result
    has the policy, ``trainer.model``.
    """
    *model, inputs = model_and_inputs
    return (model[0] if model else trainer.ref_model or trainer.model), inputs


@contextlib.contextmanager
def _without_adapters(trainer: Any) -> Iterator[None]:
    if trainer.ref_model is not None or not is_peft_model(trainer.model):
        yield
        return
    inner = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(inner, adapter_name="ref" if "ref" in inner.peft_config else None):
        yield


def _labels_and_inputs(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    model_inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_MODEL}
    return labels, model_inputs | {"use_cache": False}


def _log_sums(out: MPOOutput, config: MPOConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the sum and the count of each metric over this rank's batch; ``sum / count`` is its mean."""
    n_pairs = out.tokens.new_tensor(len(out.chosen_logp))
    tokens, chosen_tokens = out.tokens.sum(), out.tokens[: len(out.chosen_logp)].sum()
    margins = out.chosen_reward - out.rejected_reward
    sums = {
        "rewards/chosen": (out.chosen_reward.sum(), n_pairs),
        "rewards/rejected": (out.rejected_reward.sum(), n_pairs),
        "rewards/accuracies": ((margins > 0).sum(), n_pairs),
        "rewards/margins": (margins.sum(), n_pairs),
        "logps/chosen": (out.chosen_logp.sum(), n_pairs),
        "logps/rejected": (out.rejected_logp.sum(), n_pairs),
        "loss/dpo": (out.dpo_loss * n_pairs, n_pairs),
        "loss/bco": (out.bco_loss * n_pairs, n_pairs),
        "reward_shift": (out.reward_shift, torch.ones_like(n_pairs)),
        "entropy": (out.stats["entropy"] * tokens, tokens),
        "mean_logit": (out.stats["mean_logit"] * tokens, tokens),
        "token_accuracy": (out.stats["top1"] * tokens, tokens),
    }
    n_parts = chosen_tokens if config.ntp_average == "token" else n_pairs
    return sums | {"loss/ntp": (out.ntp_loss * n_parts, n_parts)}


def _log(trainer: Any, mode: str, terms: dict[str, tuple[Tensor, Tensor]], inputs: dict[str, Any]) -> None:
    """Averages the metrics over all ranks, and adds the means to the trainer's metrics. Waits for the device once.

    ``mode`` is "train" or "eval". ``terms`` is a result of ``_log_sums`` for the batch ``inputs``.
    """
    numbers = [value.double() for pair in terms.values() for value in pair]
    numbers.append(inputs["attention_mask"].sum().to(numbers[0]))
    *values, n_tokens = trainer.accelerator.reduce(torch.stack(numbers), reduction="sum").tolist()
    for name, total, count in zip(terms, values[::2], values[1::2], strict=True):
        trainer._metrics[mode][name].append(total / count if count else 0.0)
    if mode == "train":
        trainer._total_train_tokens += int(n_tokens) // getattr(trainer, "_tp_size", 1)
    trainer._metrics[mode]["num_tokens"] = [trainer._total_train_tokens]


def _settings_of(args: DPOConfig) -> tuple[MPOConfig, dict[str, Any]]:
    """Returns the ``MPOConfig`` and the other keyword arguments of ``linear_mpo_loss``.

    Raises:
        ValueError: If ``args`` asks for a loss that is not a sum of MPO's terms, or sets ``use_liger_kernel``.
    """
    if reason := _other_loss(args):
        raise ValueError(f"{reason}; otherwise use trl.DPOTrainer")
    budget = getattr(args, "memory_budget_mib", None)
    options = {
        "memory_budget": None if budget is None else budget << 20,
        "recompute": getattr(args, "recompute", True),
    }
    ntp_average = getattr(args, "ntp_average", "token")
    return _config_of(args, ntp_average=ntp_average, label_smoothing=args.label_smoothing), options


def _config_of(args: DPOConfig, **settings: Any) -> MPOConfig:
    weights: dict[str, Any] = dict.fromkeys(_TERMS.values(), 0.0)
    for name, weight in zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True):
        weights[_TERMS[name]] += weight
    return MPOConfig(beta=args.beta, **weights, **settings)


def _terms_of(args: DPOConfig) -> list[str]:
    return [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)


def _other_terms(args: DPOConfig) -> str | None:
    other = [name for name in _terms_of(args) if name not in _TERMS]
    return f"loss_type must be among {', '.join(_TERMS)}, got {', '.join(other)}" if other else None


def _other_loss(args: DPOConfig) -> str | None:
    """Returns why mpo_ext cannot compute the loss, such as "ld_alpha must be None, got 0.5".

    Returns None if mpo_ext computes the loss.
    """
    if reason := _other_terms(args):
        return reason
    if args.use_liger_kernel:
        return (
            "use_liger_kernel must be False, got True (Liger replaces the forward of the model, which must return "
            "hidden states; the loss of mpo_ext needs no logits anyway)"
        )
    if args.ld_alpha is not None:
        return f"ld_alpha must be None, got {args.ld_alpha}"
    if args.f_divergence_type != "reverse_kl":
        return f"f_divergence_type must be 'reverse_kl', got {args.f_divergence_type!r}"
    if args.use_weighting:
        return "use_weighting must be False, got True"
    return None


def _other_loss_of(trainer: Any) -> str | None:
    """Returns why mpo_ext cannot compute the loss of a patched ``DPOTrainer``, or None if mpo_ext can compute it."""
    weights = trainer.loss_weights
    if min(weights) < 0 or not any(weights):
        return _other_loss(trainer.args) or f"loss_weights must be at least 0, and one of them positive, got {weights}"
    return _other_loss(trainer.args)


def _reward_shift_of(args: DPOConfig) -> RewardShift:
    if not isinstance(args, MPOTrainingConfig):
        return RewardShift()
    names = {"mode": "reward_shift", "update": "reward_shift_update", "per": "reward_shift_per",
             "decay": "reward_shift_decay", "value": "reward_shift_value"}  # fmt: skip
    try:
        return make_reward_shift({key: getattr(args, name) for key, name in names.items()})
    except (TypeError, ValueError) as error:  # the message begins with the name that RewardShift has for the setting
        key, _, rule = str(error).partition(" ")
        raise type(error)(f"{names.get(key, key)} {rule}") from None


def _has_images(dataset: Any) -> bool:
    return bool({"image", "images"} & set(getattr(dataset, "column_names", None) or ()))


def replacements(*, reward_shift: Mapping[str, Any] | None = None) -> tuple[list[Replacement], str]:
    """Returns the attributes that ``mpo_ext.patch("trl")`` replaces, and a line that describes the change.

    The replaced attributes are methods of ``DPOTrainer``. The new methods compute losses with the terms "sigmoid",
    "bco_pair" and "sft". TRL still computes all other losses. TRL also computes losses with options that mpo_ext
    lacks, such as ``use_weighting``.
    """
    shift_settings = {"mode": "fixed"} if reward_shift is None else reward_shift
    settings_of_dpo = settings_function(_other_loss_of, lambda trainer: _config_of(trainer.args), shift_settings)
    own = {name: getattr(DPOTrainer, name) for name in ("_compute_loss", "compute_ref_log_probs")}

    def settings(trainer: Any) -> LossSettings | None:
        return None if isinstance(trainer, MPOTrainer) else settings_of_dpo(trainer)

    def compute_ref_log_probs(self: Any, *model_and_inputs: Any) -> Any:
        if (mpo := settings(self)) is None:
            return own["compute_ref_log_probs"](self, *model_and_inputs)
        return reference_logp(self, mpo, *_model_and_inputs(self, *model_and_inputs)).chunk(2)

    def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        if (mpo := settings(self)) is None:
            return own["_compute_loss"](self, model, inputs, return_outputs)
        return loss_of_batch(self, mpo, model, inputs, return_outputs)

    functions = {"compute_ref_log_probs": compute_ref_log_probs, "_compute_loss": compute_loss}
    changes = [Replacement(DPOTrainer, name, function) for name, function in functions.items()]
    changes += checkpoint_replacements(DPOTrainer, settings)
    shown = ", ".join(f"{key}={value!r}" for key, value in shift_settings.items())
    return changes, (
        f"DPOTrainer computes the terms sigmoid, bco_pair and sft without logits (reward shift: {shown}); "
        "other losses stay TRL's"
    )
