"""The MPO loss in plain torch: its readable definition, and the eager baseline of the benchmarks.

Autograd can differentiate this loss on any device and to any order. ``mpo_ext.loss.functions`` uses this module for
``backend="reference"``. Nothing is optimised: as in most trainers, a float32 ``log_softmax`` of all tokens is
materialised. Unlike the kernels, this module also reads the logits of tokens without a label. A NaN in these logits
reaches the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import BatchShift
from mpo_ext.ops.pair_loss import CUMULATIVE, HOLD


class PairLoss(NamedTuple):
    """The loss of a batch of pairs, its terms, and the new state of the reward shift.

    The operator ``pair_loss`` returns the same values in this order, followed by d loss / d logp.
    """

    loss: Tensor  # 0-d
    terms: Tensor  # [3]: DPO, BCO, NTP, without their weights
    reward_shift: Tensor  # 0-d, the delta that the loss used
    logp: Tensor  # [2B] summed log-probs
    reward: Tensor  # [2B] beta * (logp - ref_logp); 0 if a response of the pair has no labelled token
    tokens: Tensor  # [2B] int64, number of labelled tokens
    state: Tensor  # [2] float64, state of the reward shift after this batch
    batch: Tensor  # [2] float64, sum and count of the rewards of this batch


def token_logp(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns the log-prob of each label, ``[...]``: float64 for float64 logits, otherwise float32.

    The logits are ``[..., V]``, and the labels are ``[...]``. The log-prob is 0 for the label ``ignore_index``, and
    NaN for any other label outside ``[0, V)``.
    """
    vocab = logits.shape[-1]
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    picked = logp.gather(-1, labels.clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1)
    picked = torch.where((labels >= 0) & (labels < vocab), picked, torch.nan)
    return torch.where(labels == ignore_index, 0.0, picked)


def shard_state(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Returns the softmax state of each token over a shard of the vocabulary, ``[..., ROW_STATE]`` float64.

    Let z be the logits of the shard, and ``d = z - max(z)``. A state has six values:

    0. ``max(z)``
    1. ``sum(exp(d))``
    2. ``sum(exp(d) * d)``
    3. ``sum(z)``
    4. ``sum(exp(d)^2)``
    5. the logit of the label, or 0 if the label is in another shard

    Only values 1 and 5 are differentiable. ``first`` is the vocabulary id of the first column of ``logits``.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    row_max = z.detach().amax(-1)
    d = z - torch.where(row_max == -torch.inf, 0.0, row_max).unsqueeze(-1)
    e = d.exp()
    e_d = torch.where(e > 0, e * d, torch.where(e.isnan(), e, 0.0))
    column = labels - first
    has_label = (column >= 0) & (column < z.shape[-1])
    z_label = z.gather(-1, column.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    stats = (e_d.sum(-1).detach(), z.detach().sum(-1), e.detach().square().sum(-1))
    state = (row_max, e.sum(-1), *stats, torch.where(has_label, z_label, 0.0))
    return torch.stack([part.double() for part in state], -1)


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Returns the logits of an output head: ``[..., D]`` hidden states and a ``[V, D]`` weight give ``[..., V]``.

    With ``z = logit_scale * (hidden @ weight.T + bias)`` the logits are ``softcap * tanh(z / softcap) / temperature``,
    as in Gemma 2, or ``z / temperature`` if softcap is None.
    """
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        dtype = functools.reduce(torch.promote_types, dtypes)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden, weight, bias)
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits if temperature == 1 else logits / temperature


def sequence_sums(rows: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Returns the sum of ``rows`` over the tokens of each sequence.

    For example, ``rows`` is the result of ``token_logp`` for a reference model. The sums are then the argument
    ``ref_logp`` of ``mpo_loss``.

    Args:
        rows: A value for each token: ``[2B, T]``, or packed ``[N]`` or ``[1, N]`` with ``cu_seqlens``.
        cu_seqlens: ``[2B + 1]`` int32 or int64: the start of each packed sequence, and N. None: the input is padded.

    Returns:
        ``[2B]`` in the dtype of ``rows``, differentiable; 0 for an empty sequence.

    Raises:
        ValueError: If ``cu_seqlens`` is given and ``rows`` is not packed.
    """
    if cu_seqlens is None:
        return rows.sum(-1)
    if rows.ndim == 0 or rows.numel() != rows.shape[-1]:
        raise ValueError(f"rows must be [N] or [1, N] when cu_seqlens is given, got shape {tuple(rows.shape)}")
    positions = torch.arange(rows.shape[-1], device=rows.device)
    sequence = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
    sequences = cu_seqlens.shape[0] - 1
    if rows.device.type == "cpu":
        return rows.new_zeros(sequences).index_add(0, sequence, rows.reshape(-1))
    return sums_by_mask(rows.reshape(-1), sequence, sequences)


def sums_by_mask(rows: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Returns the sum of the values of each sequence, ``[sequences]``.

    The value ``rows[i]`` belongs to the sequence with the number ``sequence[i]``. The result is bitwise reproducible,
    unlike the result of ``index_add`` on a GPU.
    """
    is_member = sequence == torch.arange(sequences, device=rows.device).unsqueeze(1)
    return torch.where(is_member, rows, torch.zeros((), dtype=rows.dtype, device=rows.device)).sum(-1)


def nan_factor(sums: Tensor) -> Tensor:
    """Returns a 0-d factor for the loss: NaN if a summed log-prob is NaN, otherwise 1."""
    return torch.where(sums.detach().isnan().any(), torch.nan, 1.0).to(sums.dtype)


def pair_loss(
    logp: Tensor,  # [2B, T], or [1, N] with cu_seqlens; the chosen sequences come first
    labels: Tensor,  # like logp, int64, aligned with logp
    ref_logp: Tensor,  # [2B] summed log-probs under the reference model
    shift: BatchShift,
    config: MPOConfig,
    cu_seqlens: Tensor | None = None,  # [2B + 1]; None: padded input
) -> PairLoss:
    """Returns the loss of B pairs from the log-probs of their tokens (arXiv 2411.10442, equations 1 to 7).

    The reward of a response is ``beta * (logp - ref_logp)``: r_c of the chosen, r_r of the rejected response. With the
    reward shift delta:

    - DPO is ``-logsigmoid(r_c - r_r)``, averaged over the pairs. With label smoothing e, it is
      ``-(1 - e) * logsigmoid(r_c - r_r) - e * logsigmoid(r_r - r_c)``.
    - BCO is ``-logsigmoid(r_c - delta) - logsigmoid(delta - r_r)``, averaged over the pairs.
    - NTP is the cross entropy of the chosen responses.

    If a response has no labelled token, both rewards of its pair are 0. The DPO and BCO of this pair then have no
    gradient.
    """
    tokens = sequence_sums((labels != config.ignore_index).long(), cu_seqlens)
    return pair_loss_of_sums(sequence_sums(logp, cu_seqlens), tokens, ref_logp, shift, config)


def pair_loss_of_sums(
    sums: Tensor,  # [2B] summed log-probs; the chosen sequences come first
    tokens: Tensor,  # [2B] int64, number of labelled tokens
    ref_logp: Tensor,  # [2B] summed log-probs under the reference model
    shift: BatchShift,
    config: MPOConfig,
) -> PairLoss:
    """Returns the loss of B pairs from the summed log-prob of each response.

    The formulas are those of ``pair_loss``.
    """
    chosen_tokens, rejected_tokens = tokens.chunk(2)
    has_both = (chosen_tokens > 0) & (rejected_tokens > 0)

    reward = config.beta * (sums - ref_logp.to(sums.dtype))
    reward = torch.where(has_both.repeat(2), reward, 0.0)
    chosen_reward, rejected_reward = reward.chunk(2)

    batch = torch.stack([reward.detach().double().sum(), 2.0 * has_both.double().sum()])
    new_state = _moved(shift, batch)
    # A copy, because the state is updated in place later.
    delta = (new_state if shift.update_first else shift.state)[0].to(sums.dtype, copy=True)

    margin = chosen_reward - rejected_reward
    dpo = logistic_loss(margin, config.label_smoothing).mean()
    bco = (-F.logsigmoid(chosen_reward - delta) - F.logsigmoid(delta - rejected_reward)).mean()
    chosen_sums = sums.chunk(2)[0]
    if config.ntp_average == "token":
        ntp = -chosen_sums.sum() / chosen_tokens.sum().clamp(min=1)
    else:
        responses = (chosen_tokens > 0).sum().clamp(min=1)
        ntp = -(chosen_sums / chosen_tokens.clamp(min=1)).sum() / responses

    # A term with weight 0 is left out, because 0 * inf would be NaN.
    weighted = zip((config.dpo_weight, config.bco_weight, config.ntp_weight), (dpo, bco, ntp), strict=True)
    loss = sum((weight * term for weight, term in weighted if weight > 0), sums.new_zeros(()))
    # A bad label must not give a finite loss or gradient, even if every term leaves its response out.
    loss = loss * nan_factor(sums)
    terms = torch.stack([dpo, bco, ntp]).detach()
    return PairLoss(loss, terms, delta, sums.detach(), reward.detach(), tokens, new_state, batch)


def logistic_loss(margin: Tensor, smoothing: float) -> Tensor:
    """Returns ``-(1 - e) * log sigmoid(margin) - e * log sigmoid(-margin)``. e is the label smoothing."""
    loss = -(1 - smoothing) * F.logsigmoid(margin)
    # Without smoothing, 0 * log sigmoid(-inf) would be NaN.
    return loss - smoothing * F.logsigmoid(-margin) if smoothing > 0 else loss


def _moved(shift: BatchShift, batch: Tensor) -> Tensor:
    """Returns the state of the reward shift after a batch, ``[2]``: delta, and the number of updates so far.

    ``batch``, ``[2]``, holds the sum and the number of the rewards. If the number is 0 or the rule is HOLD, the state
    stays unchanged.
    """
    if shift.rule == HOLD:
        return shift.state.clone()
    value, updates = shift.state
    mean = batch[0] / batch[1].clamp(min=1)
    if shift.rule == CUMULATIVE:
        moved = value + (mean - value) / (updates + 1)
    else:
        moved = shift.decay * value + (1 - shift.decay) * mean
    return torch.where(batch[1] > 0, torch.stack([moved, updates + 1]), shift.state)


def token_stats(logits: Tensor, labels: Tensor, stats: Sequence[str], ignore_index: int) -> Tensor:
    """Returns the statistics ``stats`` of the logits of each token, ``[len(stats), ...]``.

    ``stats`` are names from ``ops.checks.STATS``, such as "entropy". For a token with the label ``ignore_index``, all
    statistics are 0. For any other label outside the vocabulary, all statistics are NaN.
    """
    z = logits.detach()
    z = z if z.dtype == torch.float64 else z.float()
    logp = torch.log_softmax(z, dim=-1)
    p = logp.exp()
    picked = z.gather(-1, labels.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    rows = {
        "entropy": lambda: -torch.where(p > 0, p * logp, torch.where(p.isnan(), p, 0.0)).sum(-1),
        "mean_logit": lambda: z.mean(-1),
        "top1": lambda: (picked == z.amax(-1)).to(z.dtype),
        "sum_p_squared": lambda: p.square().sum(-1),
    }
    valid = labels != ignore_index
    out_of_range = (labels < 0) | (labels >= z.shape[-1])
    values = torch.stack([rows[name]() for name in stats]) if stats else z.new_zeros(0, *labels.shape)
    return torch.where(valid, torch.where(out_of_range, torch.nan, values), 0.0)
