"""Triton version of pair_loss: the loss of B pairs from the log-probs of their tokens.

The kernels compute in float64 and add in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS_BLOCK = 1024
_PAIRS_BLOCK = 64
_HOLD, _CUMULATIVE = tl.constexpr(0), tl.constexpr(1)  # rules of mpo_ext/loss/reward_shift.py; any other number is EMA


@triton.jit(do_not_specialize=["ignore_index"])
def sequence_sums_kernel(
    logp_ptr,  # [rows] float32
    labels_ptr,  # [rows] int64
    offsets_ptr,  # [2B + 1] int64
    sums_ptr,  # [2B] float64, out
    tokens_ptr,  # [2B] int64, out
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):
    """Sums the log-probs and counts the labelled tokens of each sequence. Grid (2B,): one program per sequence."""
    sequence = tl.program_id(0)
    begin = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    tokens = tl.zeros((BLOCK,), tl.int64)
    for at in range(begin, end, BLOCK):
        rows = at + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + rows, mask=rows < end, other=ignore_index)
        is_labelled = label != ignore_index
        total += tl.load(logp_ptr + rows, mask=is_labelled, other=0.0).to(tl.float64)
        tokens += is_labelled.to(tl.int64)
    tl.store(sums_ptr + sequence, tl.sum(total, axis=0))
    tl.store(tokens_ptr + sequence, tl.sum(tokens, axis=0))


@triton.jit
def sigmoids(x):
    """Returns log sigmoid(x), log sigmoid(-x), sigmoid(x) and sigmoid(-x) without overflow."""
    small = tl.exp(-tl.abs(x))
    log_sum = tl.log(1.0 + small)  # in double, 1 + small has all digits of a float32 result
    above = tl.where(x < 0, small, 1.0) / (1.0 + small)
    below = tl.where(x < 0, 1.0, small) / (1.0 + small)
    return tl.minimum(x, 0.0) - log_sum, tl.minimum(-x, 0.0) - log_sum, above, below


@triton.jit(do_not_specialize=["pairs"])
def pair_rewards_kernel(
    sums_ptr,  # [2B] float64
    tokens_ptr,  # [2B] int64
    ref_logp_ptr,  # [2B] float64
    state_ptr,  # [2] float64: delta and its number of updates
    rewards_ptr,  # [2B] float64, out
    scalars_ptr,  # [4] float64, out: delta, the NTP term, its denominator, and the number of sums that are NaN
    reward_shift_ptr,  # [1] float32, out
    out_sums_ptr,  # [2B] float32, out
    out_rewards_ptr,  # [2B] float32, out
    new_state_ptr,  # [2] float64, out
    batch_ptr,  # [2] float64, out: sum and count of the rewards
    pairs: tl.int64,
    beta: tl.float64,
    decay: tl.float64,
    AVERAGE_SEQUENCES: tl.constexpr,
    RULE: tl.constexpr,
    UPDATE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the rewards, the NTP term and delta. Grid (1,)."""
    reward_sum = tl.zeros((BLOCK,), tl.float64)
    reward_count = tl.zeros((BLOCK,), tl.float64)
    ntp_sum = tl.zeros((BLOCK,), tl.float64)  # log-probs of the chosen responses, or their means
    ntp_count = tl.zeros((BLOCK,), tl.float64)  # number of tokens of the chosen responses, or of the responses
    nan_count = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, pairs, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        mask = pair < pairs
        chosen_sum = tl.load(sums_ptr + pair, mask=mask, other=0.0)
        rejected_sum = tl.load(sums_ptr + pairs + pair, mask=mask, other=0.0)
        chosen_tokens = tl.load(tokens_ptr + pair, mask=mask, other=0)
        rejected_tokens = tl.load(tokens_ptr + pairs + pair, mask=mask, other=0)
        chosen_ref = tl.load(ref_logp_ptr + pair, mask=mask, other=0.0)
        rejected_ref = tl.load(ref_logp_ptr + pairs + pair, mask=mask, other=0.0)
        has_both = (chosen_tokens > 0) & (rejected_tokens > 0)  # otherwise, both rewards are 0
        chosen = tl.where(has_both, beta * (chosen_sum - chosen_ref), 0.0)
        rejected = tl.where(has_both, beta * (rejected_sum - rejected_ref), 0.0)
        tl.store(rewards_ptr + pair, chosen, mask=mask)
        tl.store(rewards_ptr + pairs + pair, rejected, mask=mask)
        tl.store(out_rewards_ptr + pair, chosen.to(tl.float32), mask=mask)
        tl.store(out_rewards_ptr + pairs + pair, rejected.to(tl.float32), mask=mask)
        tl.store(out_sums_ptr + pair, chosen_sum.to(tl.float32), mask=mask)
        tl.store(out_sums_ptr + pairs + pair, rejected_sum.to(tl.float32), mask=mask)
        nan_count += tl.where(chosen_sum != chosen_sum, 1.0, 0.0) + tl.where(rejected_sum != rejected_sum, 1.0, 0.0)
        reward_sum += chosen + rejected
        reward_count += tl.where(has_both, 2.0, 0.0)
        if AVERAGE_SEQUENCES:
            ntp_sum += tl.where(chosen_tokens > 0, chosen_sum / tl.maximum(chosen_tokens, 1).to(tl.float64), 0.0)
            ntp_count += tl.where(chosen_tokens > 0, 1.0, 0.0)
        else:
            ntp_sum += chosen_sum
            ntp_count += chosen_tokens.to(tl.float64)
    batch_sum = tl.sum(reward_sum, axis=0)
    batch_count = tl.sum(reward_count, axis=0)
    ntp_denominator = tl.maximum(tl.sum(ntp_count, axis=0), 1.0)

    before = tl.load(state_ptr)
    updates = tl.load(state_ptr + 1)
    after = before
    if RULE != _HOLD:
        mean = batch_sum / tl.maximum(batch_count, 1.0)
        if RULE == _CUMULATIVE:
            moved = before + (mean - before) / (updates + 1.0)
        else:
            moved = decay * before + (1.0 - decay) * mean
        after = tl.where(batch_count > 0, moved, before)
        updates = tl.where(batch_count > 0, updates + 1.0, updates)
    delta = after if UPDATE_FIRST else before
    tl.store(new_state_ptr, after)
    tl.store(new_state_ptr + 1, updates)
    tl.store(batch_ptr, batch_sum)
    tl.store(batch_ptr + 1, batch_count)
    tl.store(reward_shift_ptr, delta.to(tl.float32))
    tl.store(scalars_ptr, delta)
    tl.store(scalars_ptr + 1, -tl.sum(ntp_sum, axis=0) / ntp_denominator)
    tl.store(scalars_ptr + 2, ntp_denominator)
    tl.store(scalars_ptr + 3, tl.sum(nan_count, axis=0))


@triton.jit(do_not_specialize=["pairs"])
def pair_loss_kernel(
    rewards_ptr,  # [2B] float64
    tokens_ptr,  # [2B] int64
    scalars_ptr,  # [4] float64 from pair_rewards_kernel
    loss_ptr,  # [1] float32, out
    terms_ptr,  # [3] float32, out
    coefficients_ptr,  # [2B] float64, out: d loss / d logp of the rows of each sequence
    pairs: tl.int64,
    beta: tl.float64,
    dpo_weight: tl.float64,
    bco_weight: tl.float64,
    ntp_weight: tl.float64,
    smoothing: tl.float64,
    AVERAGE_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the DPO term, the BCO term and the loss. Also computes d loss / d logp, one number per sequence.

    Grid (1,): one program for all pairs, because the work is small.
    """
    delta = tl.load(scalars_ptr)
    ntp = tl.load(scalars_ptr + 1)
    ntp_denominator = tl.load(scalars_ptr + 2)
    dpo_sum = tl.zeros((BLOCK,), tl.float64)
    bco_sum = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, pairs, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        mask = pair < pairs
        chosen = tl.load(rewards_ptr + pair, mask=mask, other=0.0)
        rejected = tl.load(rewards_ptr + pairs + pair, mask=mask, other=0.0)
        chosen_tokens = tl.load(tokens_ptr + pair, mask=mask, other=0)
        has_both = (chosen_tokens > 0) & (tl.load(tokens_ptr + pairs + pair, mask=mask, other=0) > 0)
        log_wins, log_loses, wins, loses = sigmoids(chosen - rejected)
        dpo = -(1.0 - smoothing) * log_wins
        dpo = tl.where(smoothing > 0, dpo - smoothing * log_loses, dpo)  # 0 * inf would be NaN
        dpo_sum += tl.where(mask, dpo, 0.0)
        dpo_grad = tl.where(dpo_weight > 0, dpo_weight * (smoothing * wins - (1.0 - smoothing) * loses), 0.0)
        log_good, _, _, not_good = sigmoids(chosen - delta)
        _, log_bad, not_bad, _ = sigmoids(rejected - delta)
        bco_sum += tl.where(mask, -log_good - log_bad, 0.0)
        chosen_grad = dpo_grad - tl.where(bco_weight > 0, bco_weight * not_good, 0.0)
        rejected_grad = -dpo_grad + tl.where(bco_weight > 0, bco_weight * not_bad, 0.0)
        chosen_grad = tl.where(has_both, chosen_grad * beta / pairs, 0.0)
        rejected_grad = tl.where(has_both, rejected_grad * beta / pairs, 0.0)
        ntp_grad = ntp_weight / ntp_denominator
        if AVERAGE_SEQUENCES:
            ntp_grad = ntp_grad / tl.maximum(chosen_tokens, 1).to(tl.float64)
        tl.store(coefficients_ptr + pair, chosen_grad - ntp_grad, mask=mask)
        tl.store(coefficients_ptr + pairs + pair, rejected_grad, mask=mask)
    dpo = tl.sum(dpo_sum, axis=0) / pairs
    bco = tl.sum(bco_sum, axis=0) / pairs

    # A term with weight 0 is left out, because 0 * inf would be NaN.
    loss = tl.where(dpo_weight > 0, dpo_weight * dpo, 0.0)
    loss += tl.where(bco_weight > 0, bco_weight * bco, 0.0)
    loss += tl.where(ntp_weight > 0, ntp_weight * ntp, 0.0)
    # A bad label must not give a finite loss, even if every term leaves its response out.
    loss = tl.where(tl.load(scalars_ptr + 3) > 0, float("nan"), loss)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(terms_ptr, dpo.to(tl.float32))
    tl.store(terms_ptr + 1, bco.to(tl.float32))
    tl.store(terms_ptr + 2, ntp.to(tl.float32))


@triton.jit(do_not_specialize=["ignore_index"])
def row_weights_kernel(
    labels_ptr,  # [rows] int64
    offsets_ptr,  # [2B + 1] int64
    coefficients_ptr,  # [2B] float64
    weight_ptr,  # [rows] float32, out
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):
    """Writes d loss / d logp of each token: the coefficient of its sequence, or 0 without a label. Grid (2B,)."""
    sequence = tl.program_id(0)
    begin = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    coefficient = tl.load(coefficients_ptr + sequence).to(tl.float32)
    for at in range(begin, end, BLOCK):
        rows = at + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + rows, mask=rows < end, other=ignore_index)
        tl.store(weight_ptr + rows, tl.where(label == ignore_index, 0.0, coefficient), mask=rows < end)


class PairLossOutputs(NamedTuple):
    """The output tensors of ``pair_loss``, in the order in which the operator returns them."""

    loss: Tensor
    terms: Tensor
    reward_shift: Tensor
    logp: Tensor
    reward: Tensor
    tokens: Tensor
    state: Tensor
    batch: Tensor
    weight: Tensor


def pair_loss(
    logp: Tensor,
    labels: Tensor,
    offsets: Tensor,
    ref_logp: Tensor,
    state: Tensor,
    settings: tuple[float, float, float, float, float, float],
    rule: int,
    update_first: bool,
    average_sequences: bool,
    ignore_index: int,
    out: PairLossOutputs,
    check_offsets: bool,
) -> None:
    """Writes the outputs of the operator ``pair_loss`` to ``out`` without synchronisation.

    ``offsets`` are the starts of the sequences, followed by the number of rows. With ``check_offsets``, invalid
    offsets give NaN, and leave the reward shift as it is. ``settings`` are beta, the weights of
    DPO, BCO and NTP, the label smoothing, and the decay of the moving average. ``rule``, ``update_first`` and
    ``average_sequences`` are fields of ``PairLossSettings``. The other arguments are those of the operator.
    """
    sequences = ref_logp.shape[0]
    if check_offsets:
        is_valid = (offsets[0] == 0) & (offsets[-1] == logp.numel()) & (offsets.diff() > 0).all()
        offsets = torch.where(is_valid, offsets, 0)  # the kernels then read no rows
    sums = ref_logp.new_empty(sequences, dtype=torch.float64)
    rewards, coefficients, scalars = torch.empty_like(sums), torch.empty_like(sums), sums.new_empty(4)
    sequence_sums_kernel[(sequences,)](
        logp, labels, offsets, sums, out.tokens, ignore_index, BLOCK=_ROWS_BLOCK, num_warps=4
    )
    beta, *weights, smoothing, decay = settings
    pair_rewards_kernel[(1,)](
        sums,
        out.tokens,
        ref_logp,
        state,
        rewards,
        scalars,
        out.reward_shift,
        out.logp,
        out.reward,
        out.state,
        out.batch,
        sequences // 2,
        beta,
        decay,
        AVERAGE_SEQUENCES=average_sequences,
        RULE=rule,
        UPDATE_FIRST=update_first,
        BLOCK=_PAIRS_BLOCK,
        num_warps=1,
    )
    pair_loss_kernel[(1,)](
        rewards,
        out.tokens,
        scalars,
        out.loss,
        out.terms,
        coefficients,
        sequences // 2,
        beta,
        *weights,
        smoothing,
        AVERAGE_SEQUENCES=average_sequences,
        BLOCK=_PAIRS_BLOCK,
        num_warps=1,
    )
    row_weights_kernel[(sequences,)](
        labels, offsets, coefficients, out.weight, ignore_index, BLOCK=_ROWS_BLOCK, num_warps=4
    )
    if check_offsets:
        for output in (out.loss, out.terms, out.reward_shift, out.logp, out.reward, out.weight):
            output.masked_fill_(~is_valid, torch.nan)
        torch.where(is_valid, out.state, state, out=out.state)
