"""Computes the losses on several ranks that split the vocabulary, the sequences, or both.

The public functions in ``mpo_ext.loss.functions`` call the functions of the same names here. The kernels are the same
as in one process. All ranks compute the loss from the same numbers in the same order. Therefore, the loss is bitwise
the same on all ranks.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpo_ext.loss import eager
from mpo_ext.loss.autograd import HiddenPlan, LogpOfLogits, LossOfLogits, ValueOfHidden
from mpo_ext.loss.rank_groups import RankFacts, RankGroups, SumGradients
from mpo_ext.loss.reward_shift import BatchShift, RewardShift, begin_batch, end_batch
from mpo_ext.loss.steps import (
    HeadOptions,
    HiddenReference,
    LossOptions,
    LossPlan,
    MPOOutput,
    check_linear_logp,
    check_linear_loss,
    check_logits_loss,
    linear_options,
    loss_output,
    pair_inputs,
    score_hidden,
    shift_labels,
    shifted_rows,
    what_to_keep,
)
from mpo_ext.ops import backends, checks
from mpo_ext.ops import linear as linear_ops
from mpo_ext.ops import logits as logits_ops
from mpo_ext.ops import pair_loss as pair_ops
from mpo_ext.ops.memory import VocabShard, result_dtype


class _Rows(NamedTuple):
    """Log-probs and statistics of this rank's tokens, computed over the whole vocabulary.

    The fields are the outputs of ``ops.linear.linear_token_logp``, in the same order.
    """

    logp: Tensor
    row_max: Tensor
    row_sum: Tensor
    row_stats: Tensor
    kept: Tensor  # the tensor for backward; empty if the rows come from logits


@torch.compiler.disable
def mpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    ref_logits: Tensor | None,
    options: LossOptions,
    reuse_logits: bool,
    vocab_parallel: Any,
    sequence_parallel: Any,
) -> MPOOutput:
    """Returns the MPO loss of logits that several ranks hold together.

    A rank of ``vocab_parallel`` has some columns of the logits. A rank of ``sequence_parallel`` has a part of each
    sequence. At least one of the two process groups is given.
    """
    groups = RankGroups(vocab_parallel, sequence_parallel)
    config, is_part = options.config, groups.sequence is not None

    def check() -> tuple[LossPlan, Tensor, BatchShift]:
        plan = check_logits_loss(logits, labels, ref_logp, ref_logits, options, reuse_logits, is_part=is_part)
        return plan, _aligned_labels(labels, options, groups), begin_batch(options.reward_shift, logits.device)

    def facts(checked: tuple[LossPlan, Tensor, BatchShift]) -> RankFacts:
        return RankFacts(
            columns=logits.shape[-1],
            ref_columns=0 if ref_logits is None else ref_logits.shape[-1],
            sequences=checked[0].sequences,
            settings=_checksum(options, *checked[0][1:], logits.dtype, ref_logits is None),
            rows=labels.numel(),
        )

    (plan, rows_labels, batch_shift), shard, ref_shard = groups.agree(check, facts)
    if ref_logits is not None:
        with torch.no_grad():
            ref = _score_logits(groups, ref_shard, ref_logits, rows_labels, {}, (), config.ignore_index, plan.backend)
            ref_logp = eager.sequence_sums(ref.logp.double(), options.cu_seqlens)
    assert ref_logp is not None  # the checks require ref_logp or ref_logits
    same = {"ref_logp": ref_logp, "reward_shift": batch_shift.state}
    rows = _score_logits(groups, shard, logits, rows_labels, same, plan.names, config.ignore_index, plan.backend)
    reference = _ReferenceSums(ref_logp, is_partial=ref_logits is not None)
    pair, weight, row_stats = _pair_loss(groups, rows, rows_labels, reference, options, batch_shift, plan.backend)
    loss = pair.loss
    if plan.backend != "reference":
        loss = LossOfLogits.apply(
            logits, loss, rows_labels, rows.row_max, rows.row_sum, weight, config.ignore_index, reuse_logits,
            plan.backend, shard,
        )  # fmt: skip
    return loss_output(loss, pair, plan.names, row_stats, plan.backend)


@torch.compiler.disable
def linear_mpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reference: HiddenReference,
    head: HeadOptions,
    options: LossOptions,
    vocab_parallel: Any,
    sequence_parallel: Any,
) -> MPOOutput:
    """Returns the MPO loss. ``vocab_parallel`` splits the rows of the head, ``sequence_parallel`` the sequences.

    At least one of the two process groups is given.
    """
    groups = RankGroups(vocab_parallel, sequence_parallel)
    config, is_part = options.config, groups.sequence is not None

    def check() -> tuple[LossPlan, HiddenReference, Tensor, BatchShift]:
        checked = check_linear_loss(hidden, weight, bias, labels, reference, head, options, is_part=is_part)
        return *checked, _aligned_labels(labels, options, groups), begin_batch(options.reward_shift, hidden.device)

    def facts(checked: tuple[LossPlan, HiddenReference, Tensor, BatchShift]) -> RankFacts:
        plan, whole, aligned, _ = checked
        shown = hidden.dtype, weight.dtype, whole.ref_hidden is None, head.scales, bias is None
        return RankFacts(
            columns=weight.shape[0],
            ref_columns=0 if whole.ref_weight is None else whole.ref_weight.shape[0],
            sequences=plan.sequences,
            settings=_checksum(options, *plan[1:], *shown),  # names of the statistics, backend
            rows=labels.numel(),
            labelled=int((aligned != config.ignore_index).sum()),
            requires_grad=int(hidden.requires_grad and torch.is_grad_enabled()),
        )

    (plan, whole, rows_labels, batch_shift), shard, ref_shard = groups.agree(check, facts)
    ref_logp, ref_hidden, ref_weight, ref_bias = whole
    if ref_hidden is not None:
        assert ref_weight is not None
        with torch.no_grad():
            ref_inputs = ref_hidden, ref_weight, ref_bias
            ref_options = linear_options(ref_hidden, ref_weight, config.ignore_index, head, plan.backend)
            ref = _score_hidden(groups, ref_shard, ref_inputs, rows_labels, {}, (), head, ref_options)
            ref_logp = eager.sequence_sums(ref.logp.double(), options.cu_seqlens)
    assert ref_logp is not None  # the checks require ref_logp or ref_hidden
    inputs, same = (hidden, weight, bias), {"ref_logp": ref_logp, "reward_shift": batch_shift.state}
    linear = linear_options(hidden, weight, config.ignore_index, head, plan.backend)
    rows = _score_hidden(groups, shard, inputs, rows_labels, same, plan.names, head, linear)
    device_labels = rows_labels.to(hidden.device, non_blocking=True)
    ref_sums = _ReferenceSums(ref_logp, is_partial=ref_hidden is not None)
    pair, row_weight, row_stats = _pair_loss(groups, rows, device_labels, ref_sums, options, batch_shift, plan.backend)
    loss = pair.loss
    if plan.backend != "reference":
        loss = _attach_to_hidden(
            (hidden, weight, bias), loss, rows_labels, rows, row_weight, head, linear, shard, groups
        )
    return loss_output(loss, pair, plan.names, row_stats, plan.backend)


@torch.compiler.disable
def token_logp(
    logits: Tensor,
    labels: Tensor,
    shift: bool,
    ignore_index: int,
    reuse_logits: bool,
    backend: str | None,
    vocab_parallel: Any,
) -> Tensor:
    """Returns the log-prob of each label; each rank of ``vocab_parallel`` holds some columns of the logits."""
    groups = RankGroups(vocab_parallel, None)

    def check() -> tuple[str, Tensor]:
        checks.check_logits("logits", logits)
        checks.check_labels(logits, labels)
        if reuse_logits:
            checks.check_reuse(logits)
        aligned = shifted_rows(labels, ignore_index) if shift else labels
        return backends.choose_backend(backend, logits), aligned

    def facts(checked: tuple[str, Tensor]) -> RankFacts:
        settings = _checksum(logits.dtype, shift, ignore_index, checked[0])
        return RankFacts(columns=logits.shape[-1], settings=settings, rows=labels.numel())

    (chosen_backend, aligned), shard, _ = groups.agree(check, facts)
    rows = _score_logits(groups, shard, logits, aligned, {}, (), ignore_index, chosen_backend)
    if chosen_backend == "reference":
        return rows.logp
    return LogpOfLogits.apply(
        logits, rows.logp, aligned, rows.row_max, rows.row_sum, ignore_index, reuse_logits, chosen_backend, shard
    )


@torch.compiler.disable
def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadOptions,
    shift: bool,
    ignore_index: int,
    backend: str | None,
    vocab_parallel: Any,
) -> Tensor:
    """Returns the log-prob of each label for an output head that is sharded over ranks.

    Each rank of the process group ``vocab_parallel`` holds some rows of the head's weight.
    """
    groups = RankGroups(vocab_parallel, None)

    def check() -> tuple[str, Tensor]:
        chosen_backend = check_linear_logp(hidden, weight, bias, labels, head, backend)
        return chosen_backend, shifted_rows(labels, ignore_index) if shift else labels

    def facts(checked: tuple[str, Tensor]) -> RankFacts:
        shown = hidden.dtype, weight.dtype, shift, ignore_index, head.scales, bias is None, checked[0]
        return RankFacts(
            columns=weight.shape[0],
            settings=_checksum(*shown),
            rows=labels.numel(),
            labelled=int((checked[1] != ignore_index).sum()),
            requires_grad=int(hidden.requires_grad and torch.is_grad_enabled()),
        )

    (chosen_backend, aligned), shard, _ = groups.agree(check, facts)
    linear = linear_options(hidden, weight, ignore_index, head, chosen_backend)
    inputs = hidden, weight, bias
    rows = _score_hidden(groups, shard, inputs, aligned, {}, (), head, linear)
    if chosen_backend == "reference":
        return rows.logp
    return _attach_to_hidden(inputs, rows.logp, aligned, rows, None, head, linear, shard, groups)


def _aligned_labels(labels: Tensor, options: LossOptions, groups: RankGroups) -> Tensor:
    """Returns the labels, shifted if ``options.shift`` is True. Each label is at the position whose logits predict it.

    Raises:
        ValueError: If ``shift`` is True with ``sequence_parallel``. A shift would need labels of another rank.
    """
    if not options.shift:
        return labels
    if groups.sequence is not None:
        raise ValueError(
            "shift must be False with sequence_parallel, since the label of a rank's last position is on another "
            "rank, got True: split shift_labels(labels) like the logits"
        )
    cu_seqlens = options.cu_seqlens
    offsets = None if cu_seqlens is None else cu_seqlens.to(labels.device)
    return shift_labels(labels, options.config.ignore_index, offsets).contiguous()


def _checksum(*settings: Any) -> int:
    """Returns a checksum of settings. Ignores the values of tensors, because reading them would wait for the GPU."""
    shown = []
    for value in settings:
        if isinstance(value, LossOptions):
            shift = value.reward_shift
            if isinstance(shift, RewardShift):
                shift = (shift.mode, shift.decay, shift.update_order, shift.per, shift.training)  # type: ignore[assignment]
            is_packed = value.cu_seqlens is not None
            value = value.config, shift if not isinstance(shift, Tensor) else "tensor", is_packed, value.shift
        shown.append(value)
    return zlib.crc32(repr(shown).encode())


def _score_logits(
    groups: RankGroups,
    shard: VocabShard | None,
    logits: Tensor,
    labels: Tensor,
    same: Mapping[str, Tensor],
    names: tuple[str, ...],
    ignore_index: int,
    backend: str,
) -> _Rows:
    """Computes the log-probs and statistics of this rank's tokens from logits.

    The softmax covers the whole vocabulary. ``shard`` is the part of the vocabulary that this rank's logits cover
    (None: all). The tensors in ``same`` must be equal on all ranks of ``vocab_parallel``. ``names`` are the requested
    statistics.
    """
    mask, empty = logits_ops.stats_mask(names), logits.new_empty(0)
    if shard is not None:
        if backend == "reference":
            state = eager.shard_state(logits, labels, shard.first)
        else:
            state = logits_ops.token_logp_shard(logits.detach(), labels, ignore_index, mask, backend, shard)
        outputs = groups.merged_rows(state, labels, same, ignore_index, mask, shard, result_dtype(logits))
    elif backend == "reference":
        logp = eager.token_logp(logits, labels, ignore_index)
        outputs = logp, empty, empty, eager.token_stats(logits, labels, names, ignore_index)
    else:
        outputs = logits_ops.token_logp(logits.detach(), labels, ignore_index, mask, backend)
    logp, row_max, row_sum, row_stats = outputs
    return _Rows(logp, row_max, row_sum, row_stats, empty)


def _score_hidden(
    groups: RankGroups,
    shard: VocabShard | None,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    same: Mapping[str, Tensor],
    names: tuple[str, ...],
    head: HeadOptions,
    options: linear_ops.LinearOptions,
) -> _Rows:
    """Computes the log-probs and statistics of this rank's tokens from hidden states.

    The softmax covers the whole vocabulary. ``inputs`` are the hidden states, weight and bias. The result also holds
    the tensor that forward keeps for backward. ``shard``, ``same`` and ``names`` are explained in ``_score_logits``.
    """
    hidden, weight, bias = inputs
    if options.backend == "reference":
        if shard is not None:
            hidden = SumGradients.apply(hidden, groups.vocab)
        logits = eager.linear_logits(hidden, weight, bias, *head.scales)
        labels = labels.to(hidden.device)
        return _score_logits(groups, shard, logits, labels, same, names, options.ignore_index, "reference")
    mask, keep = logits_ops.stats_mask(names), what_to_keep(hidden, weight, bias, head.recompute)
    if shard is None:
        return _Rows(*score_hidden(hidden, weight, bias, labels, mask, keep, options))
    parts = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    state, kept = linear_ops.linear_token_logp_shard(*parts, labels, mask, keep, options, shard)
    device_labels, dtype = labels.to(hidden.device, non_blocking=True), result_dtype(hidden, weight)
    outputs = groups.merged_rows(state, device_labels, same, options.ignore_index, mask, shard, dtype)
    if keep == linear_ops.KEEP_HIDDEN_GRAD:
        linear_ops.finish_shard_hidden_grad(kept, parts[1], labels, state, outputs, options, shard)
    return _Rows(*outputs, kept)


def _attach_to_hidden(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    value: Tensor,
    labels: Tensor,
    rows: _Rows,
    row_weight: Tensor | None,
    head: HeadOptions,
    options: linear_ops.LinearOptions,
    shard: VocabShard | None,
    groups: RankGroups,
) -> Tensor:
    plan = HiddenPlan(what_to_keep(*inputs, head.recompute), options, shard, groups.vocab)
    return ValueOfHidden.apply(*inputs, value, labels, rows.row_max, rows.row_sum, row_weight, rows.kept, plan)


class _ReferenceSums(NamedTuple):
    """Summed log-probs of the sequences under the reference model."""

    logp: Tensor  # [2B]
    is_partial: bool  # whether logp sums only this rank's rows (matters if a sequence lies on several ranks)


def _pair_loss(
    groups: RankGroups,
    rows: _Rows,
    labels: Tensor,
    reference: _ReferenceSums,
    options: LossOptions,
    shift: BatchShift,
    backend: str,
) -> tuple[eager.PairLoss, Tensor | None, Tensor]:
    """Computes the loss of the pairs and updates the reward shift.

    Several ranks may have the same pairs. Only the first of these ranks adds the rewards to the reward shift.

    Returns:
        A tuple of three results. The first is the pair loss. The second is the gradient of the loss with respect to
        the log-prob of each token, or None for the backend "reference". The third has the statistics of each token.
        With ``sequence_parallel``, the third result has the sums of the statistics over the tokens of all ranks.
    """
    row_stats = rows.row_stats
    if groups.sequence is None:
        compute = functools.partial(_loss_of_rows, rows.logp, labels, reference.logp, options, backend)
    else:
        sums, tokens, ref_logp, row_stats = _totals(groups, rows, labels, reference, options, shift)
        compute = functools.partial(_loss_of_sums, rows.logp.dtype, labels, (sums, tokens, ref_logp), options, backend)
    pair, weight = compute(shift)
    batch = pair.batch if groups.is_first else torch.zeros_like(pair.batch)
    pooled = end_batch(options.reward_shift, shift, pair.state, batch)
    if pooled is not None:
        pair, weight = compute(BatchShift(pooled))
    return pair, weight, row_stats


def _totals(
    groups: RankGroups,
    rows: _Rows,
    labels: Tensor,
    reference: _ReferenceSums,
    options: LossOptions,
    shift: BatchShift,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns sums over all ranks of ``sequence_parallel``.

    Returns:
        (log-probs, numbers of labels, reference log-probs, statistics). The first three have a sum for each sequence,
        ``[2B]``. The statistics are summed over all tokens, ``[number of statistics, 1]``.
    """
    cu_seqlens = options.cu_seqlens
    sums = eager.sequence_sums(rows.logp.double(), cu_seqlens)
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":  # the host has not checked offsets on a GPU
        is_valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == labels.numel()) & (cu_seqlens.diff() >= 0).all()
        sums = torch.where(is_valid, sums, torch.nan)
    tokens = eager.sequence_sums((labels != options.config.ignore_index).double(), cu_seqlens)
    ref_logp = reference.logp.detach().double()
    others = [tokens, ref_logp if reference.is_partial else ref_logp.new_zeros(0)]
    sizes = [len(tokens), len(others[1]), len(rows.row_stats)]
    others.append(rows.row_stats.double().flatten(1).sum(1) if sizes[2] else sums.new_zeros(0))
    same = (
        {"reward_shift": shift.state} if reference.is_partial else {"ref_logp": ref_logp, "reward_shift": shift.state}
    )
    sums, total = groups.sequence_totals(sums, torch.cat(others), same)
    tokens, ref_total, stats = total.split(sizes)
    return sums, tokens.long(), ref_total if reference.is_partial else ref_logp, stats.unsqueeze(1)


def _loss_of_rows(
    logp: Tensor, labels: Tensor, ref_logp: Tensor, options: LossOptions, backend: str, shift: BatchShift
) -> tuple[eager.PairLoss, Tensor | None]:
    """Computes the pair loss on ranks that hold whole sequences. ``logp`` are the log-probs of the tokens.

    Returns the pair loss, and the gradient with respect to ``logp``. The gradient is None for the backend "reference".
    """
    if backend == "reference":
        pair = eager.pair_loss(logp, labels, ref_logp.detach(), shift, options.config, options.cu_seqlens)
        return pair, None
    inputs = pair_inputs(ref_logp, shift, options.cu_seqlens, options.config)
    *fields, weight = pair_ops.pair_loss(logp, labels, *inputs, backend)
    return eager.PairLoss(*fields), weight


def _loss_of_sums(
    dtype: torch.dtype,
    labels: Tensor,
    totals: tuple[Tensor, Tensor, Tensor],
    options: LossOptions,
    backend: str,
    shift: BatchShift,
) -> tuple[eager.PairLoss, Tensor | None]:
    """Returns the pair loss, and its gradient with respect to the log-probs of this rank's tokens.

    Each rank holds only a part of each sequence. For the backend "reference", the gradient is None. ``totals`` are the
    first three results of ``_totals``.
    """
    sums, tokens, ref_logp = totals
    config = options.config
    if backend == "reference":
        return _in_dtype(eager.pair_loss_of_sums(sums, tokens, ref_logp, shift, config), dtype), None
    with torch.inference_mode(False), torch.enable_grad():
        leaf = sums.detach().clone().requires_grad_()
        pair = eager.pair_loss_of_sums(leaf, tokens, ref_logp, shift, config)
        (coefficients,) = torch.autograd.grad(pair.loss, leaf)
    of_rows = _sequence_values(coefficients, labels, options.cu_seqlens)
    weight = torch.where(labels == config.ignore_index, 0.0, of_rows).to(dtype)
    return _in_dtype(pair._replace(loss=pair.loss.detach()), dtype), weight


def _in_dtype(pair: eager.PairLoss, dtype: torch.dtype) -> eager.PairLoss:
    """Returns the pair loss with its results converted to ``dtype``. The state of the reward shift stays float64."""
    names = ("loss", "terms", "reward_shift", "logp", "reward")
    return pair._replace(**{name: getattr(pair, name).to(dtype) for name in names})


def _sequence_values(values: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Repeats the value of each sequence, ``[2B]``, for all its tokens. The result has the shape of ``labels``."""
    if cu_seqlens is None:
        return values.unsqueeze(1).expand(labels.shape)
    positions = torch.arange(labels.numel(), device=labels.device)
    sequence = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
    return values[sequence.clamp(0, values.shape[0] - 1)].view(labels.shape)
