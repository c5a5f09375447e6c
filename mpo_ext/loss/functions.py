"""The public loss functions: they check arguments, run the operators of ``mpo_ext.ops``, and attach the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor

from mpo_ext.loss import eager, parallel
from mpo_ext.loss.autograd import HiddenPlan, LogpOfLogits, LossOfLogits, ValueOfHidden
from mpo_ext.loss.batch_check import is_debugging, warn_of_mistakes
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import BatchShift, RewardShift, begin_batch, end_batch
from mpo_ext.loss.steps import (
    HeadOptions,
    HiddenReference,
    LossOptions,
    MPOOutput,
    check_linear_logp,
    check_linear_loss,
    check_logits_loss,
    end_pairs,
    linear_options,
    loss_output,
    pair_inputs,
    score_hidden,
    shift_labels,
    shifted_rows,
    what_to_keep,
)
from mpo_ext.ops import backends, checks
from mpo_ext.ops import logits as logits_ops
from mpo_ext.ops import pair_loss as pair_ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DEFAULT_CONFIG = MPOConfig()
_CONFIG_FIELDS = frozenset(field.name for field in fields(MPOConfig))
P = ParamSpec("P")
R = TypeVar("R")


def _names_config_fields(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a loss function raise TypeError for an argument that is a field of MPOConfig, such as ``beta=0.1``.

    The error message shows how to pass the field in ``config``.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        for name in options:
            if name in _CONFIG_FIELDS:
                raise TypeError(
                    f"{name} is a field of MPOConfig: pass config=MPOConfig({name}={options[name]!r}), "
                    f"not {name}={options[name]!r}"
                )
        return function(*args, **options)

    return call


@_names_config_fields
def mpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    ref_logits: Tensor | None = None,
    *,
    config: MPOConfig = _DEFAULT_CONFIG,
    reward_shift: RewardShift | Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    stats: Sequence[str] = (),
    reuse_logits: bool = False,
    backend: str | None = None,
    vocab_parallel: ProcessGroup | None = None,
    sequence_parallel: ProcessGroup | None = None,
) -> MPOOutput:
    """Returns the MPO loss ``dpo_weight * DPO + bco_weight * BCO + ntp_weight * NTP`` (arXiv 2411.10442).

    A row is the V logits of one token position. A row is labelled if its label is not ``config.ignore_index``. The
    kernels read only labelled rows: once in forward, and once in backward.

    If a response has no labelled token, the DPO and BCO terms of its pair are constants without gradient. If no
    chosen response of the batch has a labelled token, NTP is 0.

    Args:
        logits: ``[2B, T, V]``, or packed ``[N, V]`` with ``cu_seqlens``: B chosen sequences, then B rejected
            sequences. Sequences i and B + i are a pair. float32, bfloat16, float16 or float64, any strides. -inf masks
            a token.
        labels: ``[2B, T]`` or ``[N]`` int64; ``config.ignore_index`` at positions that are not scored. Any other label
            outside ``[0, V)`` makes the loss NaN.
        ref_logp: ``[2B]`` float32 or float64: for each sequence, the sum of its labels' log-probs under the reference
            model. For padded sequences, this is ``token_logp(ref_logits, labels).sum(-1)``, without gradient.
        ref_logits: Logits of the reference model, shaped like ``logits``, without gradient. Pass either ``ref_logits``
            or ``ref_logp``.
        config: Weights, beta and the other settings of the loss.
        reward_shift: The delta of the BCO term: a number, a 0-d tensor, or a ``RewardShift``, which the call updates.
            None: 0.
        cu_seqlens: ``[2B + 1]`` int32 or int64: the start of each packed sequence, followed by N. None: the input is
            padded.
        shift: Whether position t is scored against ``labels[t + 1]`` of its sequence, as in Hugging Face models.
        stats: Statistics to compute over the labelled rows, any of "entropy" (in nats), "mean_logit", "top1" (whether
            the label has the largest logit) and "sum_p_squared" (sum of the squared probabilities).
        reuse_logits: Whether backward may write the gradient over the logits. A second backward through the same
            graph then raises. If another operation also needs the logits in its backward, torch raises "modified by an
            inplace operation". The backend "reference" ignores ``reuse_logits``.
        backend: "cpu", "cuda", "triton" or "reference" (plain torch). None: the best available backend.
        vocab_parallel: Process group that splits the vocabulary (tensor parallelism). Each rank holds one or more
            columns of ``logits`` and ``ref_logits``, in the order of the ranks. Labels are ids of the whole
            vocabulary. The other arguments must be the same on all ranks. All ranks get the same loss, and each rank
            gets the gradient of its columns.
        sequence_parallel: Process group that splits every sequence (context parallelism, not Megatron's sequence
            parallelism). ``shift`` must be False. ``cu_seqlens`` holds the starts of this rank's parts. ``ref_logp``
            holds sums over whole sequences. All ranks get the same loss, and each rank gets the gradient of its rows.

    Returns:
        An ``MPOOutput``. With the default weights, its loss is ``1.2 * log(2) + NTP`` = 0.831777 + NTP if the policy
        equals the reference and delta is 0.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here. In backward: if a second derivative is computed, or if backward
            runs again after ``reuse_logits``. On one rank, the backend "reference" allows both.
    """
    options = LossOptions(config, reward_shift, cu_seqlens, shift, stats, backend)
    if vocab_parallel is not None or sequence_parallel is not None:
        return parallel.mpo_loss(
            logits, labels, ref_logp, ref_logits, options, reuse_logits, vocab_parallel, sequence_parallel
        )
    _, names, chosen_backend = check_logits_loss(logits, labels, ref_logp, ref_logits, options, reuse_logits)
    if is_debugging():
        warn_of_mistakes(
            logits, labels, ref_logp, config=config, reward_shift=reward_shift, cu_seqlens=cu_seqlens, shift=shift
        )
    if shift:
        labels = shift_labels(labels, config.ignore_index, cu_seqlens).contiguous()  # one copy, for backward too
    if ref_logits is not None:
        with torch.no_grad():
            rows = token_logp(
                ref_logits, labels, shift=False, ignore_index=config.ignore_index, backend=chosen_backend
            )
            ref_logp = eager.sequence_sums(rows.double(), cu_seqlens)
    assert ref_logp is not None  # check_reference requires ref_logp or ref_logits
    if chosen_backend == "reference":
        return _eager_loss(logits, labels, ref_logp, config, reward_shift, cu_seqlens, names)

    batch_shift = begin_batch(reward_shift, logits.device)
    inputs = pair_inputs(ref_logp, batch_shift, cu_seqlens, config)
    detached, mask = logits.detach(), logits_ops.stats_mask(names)
    if chosen_backend == "cuda":  # rows and pairs in one launch
        outputs = pair_ops.forward(detached, labels, *inputs, mask, chosen_backend)
        row_values, outputs = outputs[:4], outputs[4:]
    else:
        row_values = logits_ops.token_logp(detached, labels, config.ignore_index, mask, chosen_backend)
        outputs = pair_ops.pair_loss(row_values[0], labels, *inputs, chosen_backend)
    logp, row_max, row_sum, row_stats = row_values
    pair, weight = end_pairs(outputs, logp, labels, inputs, reward_shift, batch_shift, chosen_backend)
    loss = LossOfLogits.apply(
        logits, pair.loss, labels, row_max, row_sum, weight, config.ignore_index, reuse_logits, chosen_backend
    )
    return loss_output(loss, pair, names, row_stats, chosen_backend)


@_names_config_fields
def linear_mpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    recompute: bool | None = None,
    config: MPOConfig = _DEFAULT_CONFIG,
    reward_shift: RewardShift | Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    stats: Sequence[str] = (),
    backend: str | None = None,
    vocab_parallel: ProcessGroup | None = None,
    sequence_parallel: ProcessGroup | None = None,
) -> MPOOutput:
    """Returns ``mpo_loss`` from hidden states and the output head, without storing all logits.

    With ``z = logit_scale * (hidden @ weight.T + bias)``, the logits are ``softcap * tanh(z / softcap) /
    temperature``, or ``z / temperature`` if softcap is None. For a Hugging Face model, ``hidden_and_head`` returns all
    arguments of these formulas except ``temperature``.

    Only the logits of labelled rows (token positions) are computed, in tiles. A tile covers some rows and a part of
    the vocabulary. Tiles are float32 (float64 for float64 inputs), with one exception: they are half precision on a
    CPU that multiplies half-precision inputs faster than float32. The environment variable MPO_CPU_MATMUL=float32
    prevents this.

    With n labelled rows, the loss takes four matmuls of size n x D x V: one in forward and three in backward. With
    ``recompute=False``, backward takes two. If only ``hidden`` needs a gradient, forward takes two and backward none.

    In addition to inputs and gradients, the loss takes this memory:

    - ``memory_budget``.
    - Up to two float32 copies of n rows of ``hidden``.
    - The workspace of torch's matmul. It is largest on a CPU that multiplies bfloat16 natively.
    - With ``recompute=False``, n rows of logits. Backward overwrites them with the gradient of ``weight``.

    Args:
        hidden: ``[2B, T, D]``, or packed ``[N, D]`` with ``cu_seqlens``: final hidden states of B chosen sequences,
            then of B rejected sequences. float32, bfloat16, float16 or float64.
        weight: ``[V, D]`` weight of the output head. Its dtype may differ from that of ``hidden`` (float32 parameters
            under autocast).
        labels: As in ``mpo_loss``. If ``hidden`` is on a GPU, keep the labels on the CPU, best in pinned memory: the
            host then knows the number of labelled rows without waiting for the GPU. Labels on the GPU also work.
        ref_logp: As in ``mpo_loss``.
        ref_hidden: ``[2B, T, D']`` or ``[N, D']`` hidden states of the reference model, without gradient. Pass
            either ``ref_hidden`` or ``ref_logp``.
        ref_weight: ``[V', D']`` weight of the reference model's head, without gradient. None: ``weight``.
        bias: ``[V]`` bias of the head, or None.
        ref_bias: ``[V']`` bias of the reference model's head. None: no bias, or ``bias`` if ``ref_weight`` is None.
        logit_scale: Factor of the head's output (Cohere), not 0. ``logit_scale``, ``softcap`` and ``temperature`` also
            apply to the reference model.
        softcap: Bound of the logits (Gemma 2), above 0. None: no bound.
        temperature: Divisor of the final logits, above 0.
        memory_budget: Bytes for a tile and the tensors computed from it. None: 64 MiB on a CPU; on a GPU, 1/160 of its
            memory, at least 256 MiB and at most 1 GiB. The budget changes the speed, and the result only by rounding.
            On a CPU, less than about 4 MiB is slow, and less than about 256 KiB is very slow.
        recompute: Whether backward computes the logits again. False: forward keeps the logits of the labelled rows,
            which saves one matmul. None: on a GPU, the same as True. On a CPU, None makes forward keep as many logits
            as fit into the memory of the gradient of ``weight``, and backward computes the others again. A kept logit
            takes 2 bytes if hidden states and weight are bfloat16, otherwise usually 4. Kept logits and the gradient
            of ``weight`` share one buffer. The buffer is as large as the larger of the two, plus a part of
            ``memory_budget``. If ``weight`` needs no gradient, ``recompute`` has no effect. If ``weight`` needs a
            gradient, a second backward through the same graph (``retain_graph=True``) always computes all logits
            again.
        config: As in ``mpo_loss``.
        reward_shift: As in ``mpo_loss``.
        cu_seqlens: As in ``mpo_loss``.
        shift: As in ``mpo_loss``.
        stats: As in ``mpo_loss``.
        backend: As in ``mpo_loss``. "reference" computes all logits in plain torch.
        vocab_parallel: Process group that splits the vocabulary (tensor parallelism). Each rank holds one or more rows
            of ``weight``, ``bias``, ``ref_weight`` and ``ref_bias``, in the order of the ranks. The other arguments,
            including ``hidden``, must be the same on all ranks. All ranks get the same gradient of ``hidden``, because
            backward sums it over the ranks.
        sequence_parallel: As in ``mpo_loss``.

    Returns:
        An ``MPOOutput``, whose loss is differentiable with respect to hidden, weight and bias.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here. In backward: if a second derivative is computed, unless the
            backend is "reference" on one rank.
    """
    options = LossOptions(config, reward_shift, cu_seqlens, shift, stats, backend)
    head = HeadOptions(logit_scale, softcap, temperature, memory_budget, recompute)
    reference = HiddenReference(ref_logp, ref_hidden, ref_weight, ref_bias)
    if vocab_parallel is not None or sequence_parallel is not None:
        return parallel.linear_mpo_loss(
            hidden, weight, bias, labels, reference, head, options, vocab_parallel, sequence_parallel
        )
    (_, names, chosen_backend), reference = check_linear_loss(hidden, weight, bias, labels, reference, head, options)
    ref_logp, ref_hidden, ref_weight, ref_bias = reference
    if is_debugging():
        warn_of_mistakes(
            hidden, labels, ref_logp, weight=weight, bias=bias, logit_scale=logit_scale, softcap=softcap,
            temperature=temperature, config=config, reward_shift=reward_shift, cu_seqlens=cu_seqlens, shift=shift,
        )  # fmt: skip
    if shift:
        offsets = None if cu_seqlens is None else cu_seqlens.to(labels.device)
        labels = shift_labels(labels, config.ignore_index, offsets).contiguous()
    if ref_hidden is not None:
        assert ref_weight is not None
        with torch.no_grad():
            rows = linear_token_logp(
                ref_hidden, ref_weight, labels, bias=ref_bias, logit_scale=logit_scale, softcap=softcap,
                temperature=temperature, memory_budget=memory_budget, shift=False,
                ignore_index=config.ignore_index, backend=chosen_backend,
            )  # fmt: skip
            ref_logp = eager.sequence_sums(rows.double(), cu_seqlens)
    assert ref_logp is not None  # check_reference requires ref_logp or ref_hidden
    if chosen_backend == "reference":
        logits = eager.linear_logits(hidden, weight, bias, *head.scales)
        return _eager_loss(logits, labels.to(hidden.device), ref_logp, config, reward_shift, cu_seqlens, names)

    batch_shift = begin_batch(reward_shift, hidden.device)
    inputs = pair_inputs(ref_logp, batch_shift, cu_seqlens, config)
    linear = linear_options(hidden, weight, config.ignore_index, head, chosen_backend)
    keep = what_to_keep(hidden, weight, bias, recompute)
    mask = logits_ops.stats_mask(names)
    logp, row_max, row_sum, row_stats, kept = score_hidden(hidden, weight, bias, labels, mask, keep, linear)
    device_labels = labels.to(hidden.device, non_blocking=True)
    outputs = pair_ops.pair_loss(logp, device_labels, *inputs, chosen_backend)
    pair, row_weight = end_pairs(outputs, logp, device_labels, inputs, reward_shift, batch_shift, chosen_backend)
    loss = ValueOfHidden.apply(
        hidden, weight, bias, pair.loss, labels, row_max, row_sum, row_weight, kept, HiddenPlan(keep, linear)
    )
    return loss_output(loss, pair, names, row_stats, chosen_backend)


def token_logp(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    ignore_index: int = -100,
    reuse_logits: bool = False,
    backend: str | None = None,
    vocab_parallel: ProcessGroup | None = None,
) -> Tensor:
    """Returns the log-probability of each label, differentiable, without a float32 copy of the logits.

    For packed sequences, pass ``shift_labels(labels, cu_seqlens=cu_seqlens)`` as labels with ``shift=False``.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64, any strides.
        labels: ``[...]`` int64, in ``[0, V)`` or ``ignore_index``.
        shift: Whether position t of the last axis is scored against ``labels[t + 1]``, as in Hugging Face models; the
            last position gives 0.
        ignore_index: Label of positions that are not read and give 0.
        reuse_logits: As in ``mpo_loss``.
        backend: As in ``mpo_loss``.
        vocab_parallel: As in ``mpo_loss``.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), in nats; NaN where a label is neither ``ignore_index`` nor in
        ``[0, V)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here. In backward: if a second derivative is computed, or if backward
            runs again after ``reuse_logits``. On one rank, the backend "reference" allows both.
    """
    if vocab_parallel is not None:
        return parallel.token_logp(logits, labels, shift, ignore_index, reuse_logits, backend, vocab_parallel)
    checks.check_logits("logits", logits)
    checks.check_labels(logits, labels)
    if reuse_logits:
        checks.check_reuse(logits)
    chosen_backend = backends.choose_backend(backend, logits)
    if shift:
        labels = shifted_rows(labels, ignore_index)
    if chosen_backend == "reference":
        return eager.token_logp(logits, labels, ignore_index)
    logp, row_max, row_sum, _ = logits_ops.token_logp(logits.detach(), labels, ignore_index, 0, chosen_backend)
    return LogpOfLogits.apply(logits, logp, labels, row_max, row_sum, ignore_index, reuse_logits, chosen_backend)


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    recompute: bool | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    backend: str | None = None,
    vocab_parallel: ProcessGroup | None = None,
) -> Tensor:
    """Returns ``token_logp`` from hidden states and the output head, without storing all logits.

    The logits, the number of matmuls and the memory are explained in ``linear_mpo_loss``.

    Args:
        hidden: ``[..., D]`` float32, bfloat16, float16 or float64.
        weight: ``[V, D]`` weight of the head.
        labels: ``[...]`` int64, in ``[0, V)`` or ``ignore_index``; on the device of ``hidden`` or on the CPU.
        bias: ``[V]`` bias of the head, or None.
        logit_scale: As in ``linear_mpo_loss``.
        softcap: As in ``linear_mpo_loss``.
        temperature: As in ``linear_mpo_loss``.
        memory_budget: As in ``linear_mpo_loss``.
        recompute: As in ``linear_mpo_loss``.
        shift: As in ``token_logp``.
        ignore_index: As in ``token_logp``.
        backend: As in ``mpo_loss``.
        vocab_parallel: As in ``linear_mpo_loss``.

    Returns:
        ``[...]`` float32 (float64 if hidden or weight is float64), in nats, differentiable with respect to hidden,
        weight and bias; NaN where a label is neither ``ignore_index`` nor in ``[0, V)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here. In backward: if a second derivative is computed, unless the
            backend is "reference" on one rank.
    """
    head = HeadOptions(logit_scale, softcap, temperature, memory_budget, recompute)
    if vocab_parallel is not None:
        return parallel.linear_token_logp(
            hidden, weight, bias, labels, head, shift, ignore_index, backend, vocab_parallel
        )
    chosen_backend = check_linear_logp(hidden, weight, bias, labels, head, backend)
    if shift:
        labels = shifted_rows(labels, ignore_index)
    if chosen_backend == "reference":
        logits = eager.linear_logits(hidden, weight, bias, *head.scales)
        return eager.token_logp(logits, labels.to(hidden.device), ignore_index)
    linear = linear_options(hidden, weight, ignore_index, head, chosen_backend)
    keep = what_to_keep(hidden, weight, bias, recompute)
    logp, row_max, row_sum, _, kept = score_hidden(hidden, weight, bias, labels, 0, keep, linear)
    plan = HiddenPlan(keep, linear)
    return ValueOfHidden.apply(hidden, weight, bias, logp, labels, row_max, row_sum, None, kept, plan)


def _eager_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor,
    config: MPOConfig,
    reward_shift: RewardShift | Tensor | float | None,
    cu_seqlens: Tensor | None,
    names: Sequence[str],
) -> MPOOutput:
    logp = eager.token_logp(logits, labels, config.ignore_index)
    row_stats = eager.token_stats(logits, labels, names, config.ignore_index)
    shift = begin_batch(reward_shift, logits.device)
    ref_logp = ref_logp.detach()
    pair = eager.pair_loss(logp, labels, ref_logp, shift, config, cu_seqlens)
    pooled = end_batch(reward_shift, shift, pair.state, pair.batch)
    if pooled is not None:
        pair = eager.pair_loss(logp, labels, ref_logp, BatchShift(pooled), config, cu_seqlens)
    return loss_output(pair.loss, pair, names, row_stats, "reference")
