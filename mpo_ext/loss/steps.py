"""Steps that the public loss functions share: they shift labels, check arguments and build the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_ext.loss import eager
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import BatchShift, RewardShift, end_batch
from mpo_ext.ops import backends, checks
from mpo_ext.ops import linear as linear_ops
from mpo_ext.ops import pair_loss as pair_ops
from mpo_ext.ops.matmul import matmul_dtype
from mpo_ext.ops.tiles import default_memory_budget


class MPOOutput(NamedTuple):
    """The result of ``mpo_loss`` and ``linear_mpo_loss``. Only ``loss`` is differentiable.

    Attributes:
        loss: 0-d loss, float32 (float64 for float64 logits, hidden states or head).
        dpo_loss: 0-d DPO term, averaged over pairs, unweighted.
        bco_loss: 0-d BCO term, averaged over pairs, unweighted.
        ntp_loss: 0-d cross entropy of the chosen responses in nats, unweighted.
        chosen_logp: ``[B]`` summed log-prob of each chosen response under the policy, in nats.
        rejected_logp: ``[B]`` summed log-prob of each rejected response under the policy, in nats.
        chosen_reward: ``[B]`` ``beta * (logp - ref_logp)``; 0 if a response of the pair has no labelled token.
        rejected_reward: ``[B]`` reward of each rejected response, defined like ``chosen_reward``.
        reward_shift: 0-d reward shift delta that the loss used.
        tokens: ``[2B]`` int64 number of labelled tokens of each sequence.
        stats: Dict from the name of a requested statistic to its mean over the labelled tokens of the batch. Each mean
            is 0-d; without labelled tokens, it is 0.
        backend: Name of the backend that ran.
    """

    loss: Tensor
    dpo_loss: Tensor
    bco_loss: Tensor
    ntp_loss: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    reward_shift: Tensor
    tokens: Tensor
    stats: dict[str, Tensor]
    backend: str


def shift_labels(labels: Tensor, ignore_index: int = -100, cu_seqlens: Tensor | None = None) -> Tensor:
    """Returns each label at the position whose logits predict it: ``out[..., t] = labels[..., t + 1]``.

    The last position of each sequence gets ``ignore_index``. With ``cu_seqlens``, the last axis holds packed
    sequences.
    """
    shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if cu_seqlens is not None:
        last = cu_seqlens[1:].long() - 1
        last = torch.where(last < 0, last + shifted.shape[-1], last)  # the end of an empty first sequence
        last = last.clamp(max=shifted.shape[-1] - 1)  # offsets on a GPU are checked later, by ``pair_loss``
        # Not index_fill, whose graph inductor cannot compile in torch 2.11.
        shifted = shifted.scatter(-1, last.expand(*shifted.shape[:-1], -1), ignore_index)
    return shifted


def shifted_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """Returns ``shift_labels(labels, ignore_index)``; raises ValueError if the labels are 0-d."""
    if labels.ndim == 0:
        raise ValueError("shift needs labels with at least one axis, got shape ()")
    return shift_labels(labels, ignore_index)


class LossOptions(NamedTuple):
    """Arguments that ``mpo_loss`` and ``linear_mpo_loss`` have in common."""

    config: MPOConfig
    reward_shift: RewardShift | Tensor | float | None
    cu_seqlens: Tensor | None
    shift: bool
    stats: Sequence[str]
    backend: str | None


class HeadOptions(NamedTuple):
    """Arguments of ``linear_mpo_loss`` and ``linear_token_logp`` about the output head, memory and recomputation."""

    logit_scale: float
    softcap: float | None
    temperature: float
    memory_budget: int | None
    recompute: bool | None

    @property
    def scales(self) -> tuple[float, float | None, float]:
        """The numbers that scale the logits: ``(logit_scale, softcap, temperature)``."""
        return self.logit_scale, self.softcap, self.temperature


class HiddenReference(NamedTuple):
    """Arguments of ``linear_mpo_loss`` that describe the reference model."""

    ref_logp: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None


class LossPlan(NamedTuple):
    """The results of the argument checks of a loss function: number of sequences, statistics and backend."""

    sequences: int  # 2B
    names: tuple[str, ...]  # of the requested statistics
    backend: str


def check_logits_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    ref_logits: Tensor | None,
    options: LossOptions,
    reuse_logits: bool,
    *,
    is_part: bool = False,
) -> LossPlan:
    """Checks the arguments of ``mpo_loss``. Returns the number of sequences, the statistics and the backend.

    Raises if an argument is invalid. ``is_part`` says whether this rank holds only a part of each sequence.
    """
    _check_config(options.config)
    sequences = checks.check_pairs(logits, labels, options.cu_seqlens, is_part=is_part)
    checks.check_reference(logits, sequences, ref_logp, ref_logits)
    names = checks.check_stats(options.stats)
    if reuse_logits:
        checks.check_reuse(logits)
    return LossPlan(sequences, names, backends.choose_backend(options.backend, logits))


def check_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reference: HiddenReference,
    head: HeadOptions,
    options: LossOptions,
    *,
    is_part: bool = False,
) -> tuple[LossPlan, HiddenReference]:
    """Checks the arguments of ``linear_mpo_loss``. Raises if an argument is invalid.

    ``is_part``: whether this rank holds only a part of each sequence.

    Returns:
        The ``LossPlan`` of the call, and the reference. A reference with hidden states but without a head gets the
        head of the policy.
    """
    _check_config(options.config)
    sequences = checks.check_pairs(hidden, labels, options.cu_seqlens, "hidden", is_part=is_part)
    checks.check_head(hidden, weight, bias)
    checks.check_head_options(*head)
    ref_logp, ref_hidden, ref_weight, ref_bias = reference
    checks.check_reference(hidden, sequences, ref_logp, ref_hidden, "hidden")
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias go with ref_hidden, got one of them without it")
    else:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        checks.check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    names = checks.check_stats(options.stats)
    plan = LossPlan(sequences, names, backends.choose_backend(options.backend, hidden, "hidden"))
    return plan, HiddenReference(ref_logp, ref_hidden, ref_weight, ref_bias)


def check_linear_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: HeadOptions, backend: str | None
) -> str:
    """Checks the arguments of ``linear_token_logp`` and returns the backend. Raises if an argument is invalid."""
    checks.check_logits("hidden", hidden, "feature")
    checks.check_labels(hidden, labels, "hidden", may_be_on_cpu=True)
    checks.check_head(hidden, weight, bias)
    checks.check_head_options(*head)
    return backends.choose_backend(backend, hidden, "hidden")


def _check_config(config: MPOConfig) -> None:
    if not isinstance(config, MPOConfig):
        raise TypeError(f"config must be an MPOConfig, got {type(config).__name__}")


class PairInputs(NamedTuple):
    """Arguments that the operators ``pair_loss`` and ``forward`` share, in the order of the operators' parameters."""

    ref_logp: Tensor
    state: Tensor
    cu_seqlens: Tensor | None
    settings: list[float]
    ignore_index: int


def pair_inputs(ref_logp: Tensor, shift: BatchShift, cu_seqlens: Tensor | None, config: MPOConfig) -> PairInputs:
    """Returns the ``PairInputs`` of a batch. ``shift`` is the reward shift of the batch."""
    settings = pair_ops.PairLossSettings(
        config.beta, config.dpo_weight, config.bco_weight, config.ntp_weight, config.label_smoothing,
        config.ntp_average == "sequence", shift.rule, shift.update_first, shift.decay,
    )  # fmt: skip
    return PairInputs(ref_logp.detach(), shift.state, cu_seqlens, settings.numbers(), config.ignore_index)


def end_pairs(
    outputs: Sequence[Tensor],
    logp: Tensor,
    labels: Tensor,
    inputs: PairInputs,
    reward_shift: RewardShift | Tensor | float | None,
    shift: BatchShift,
    backend: str,
) -> tuple[eager.PairLoss, Tensor]:
    """Updates the reward shift with a batch. Returns the pair loss, and d loss / d logp of each token.

    ``outputs`` are the outputs of the operator ``pair_loss`` for ``inputs``. On several ranks with
    ``update="before"``, the pair loss is computed again with the new reward shift.
    """
    *fields, weight = outputs
    pair = eager.PairLoss(*fields)
    pooled = end_batch(reward_shift, shift, pair.state, pair.batch)
    if pooled is not None:
        *fields, weight = pair_ops.pair_loss(logp, labels, *inputs._replace(state=pooled), backend)
        pair = eager.PairLoss(*fields)
    return pair, weight


def loss_output(
    loss: Tensor, pair: eager.PairLoss, names: Sequence[str], row_stats: Tensor, backend: str
) -> MPOOutput:
    """Returns the ``MPOOutput`` of a loss.

    ``row_stats`` has the shape ``[len(names), ...]``: a value of each statistic for each token. The ``MPOOutput`` has
    the mean of each statistic over the labelled tokens.
    """
    dpo_loss, bco_loss, ntp_loss = pair.terms.unbind()
    chosen_logp, rejected_logp = pair.logp.chunk(2)
    chosen_reward, rejected_reward = pair.reward.chunk(2)
    tokens = pair.tokens.sum().clamp(min=1)
    averages = [rows.double().sum().div(tokens).to(pair.terms.dtype) for rows in row_stats]
    return MPOOutput(
        loss, dpo_loss, bco_loss, ntp_loss, chosen_logp, rejected_logp, chosen_reward, rejected_reward,
        pair.reward_shift, pair.tokens, dict(zip(names, averages, strict=True)), backend,
    )  # fmt: skip


def score_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    stats: int,
    keep: int,
    options: linear_ops.LinearOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Calls the operator ``linear_token_logp`` with detached tensors and returns its outputs."""
    head = weight.detach(), None if bias is None else bias.detach()
    return linear_ops.linear_token_logp(hidden.detach(), *head, labels, stats, keep, *options)


def what_to_keep(hidden: Tensor, weight: Tensor, bias: Tensor | None, recompute: bool | None) -> int:
    """Returns a ``KEEP_`` constant of ``mpo_ext.ops.linear``: the tensor that forward keeps for backward."""
    head_needs_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_needs_grad or hidden.requires_grad):
        return linear_ops.KEEP_NOTHING
    if not head_needs_grad:
        return linear_ops.KEEP_HIDDEN_GRAD
    # Kept logits lie in the memory of the gradient of weight. On a GPU, their small tiles make the products slow.
    keeps = hidden.device.type == "cpu" if recompute is None else not recompute
    return linear_ops.KEEP_LOGITS if weight.requires_grad and keeps else linear_ops.KEEP_NOTHING


def linear_options(
    hidden: Tensor, weight: Tensor, ignore_index: int, head: HeadOptions, backend: str
) -> linear_ops.LinearOptions:
    """Returns the ``LinearOptions`` of a call, with default values in place of None."""
    device, memory_budget = hidden.device, head.memory_budget
    head_scales = [float(head.logit_scale), float(head.softcap or 0), float(head.temperature)]
    if memory_budget is None:
        memory_budget = default_memory_budget(device)
    memory_budget = min(memory_budget, 1 << 62)  # an operator's argument is a 64-bit integer
    dtype = torch.promote_types(hidden.dtype, weight.dtype)  # the dtype of the model's own head product
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    dtype = matmul_dtype(dtype, device)
    only_fitting = head.recompute is None
    return linear_ops.LinearOptions(ignore_index, head_scales, memory_budget, dtype, backend, only_fitting)
