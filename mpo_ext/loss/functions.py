"""The public loss functions: autograd functions over the operators of ops.py and linear_ops.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_ext.loss import eager as reference
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import HOLD, RewardShift
from mpo_ext.ops import linear as linear_ops
from mpo_ext.ops import logits as ops

_PUBLIC_STATS = ("entropy", "mean_logit", "top1")
_DEFAULT_CONFIG = MPOConfig()
_CPU_MEMORY_BUDGET = 64 << 20
_GPU_MEMORY_BUDGET = 256 << 20


class MPOOutput(NamedTuple):
    """What ``mpo_loss`` and ``linear_mpo_loss`` return. Only ``loss`` is differentiable.

    Attributes:
        loss: 0-d, float32 (float64 for float64 logits).
        dpo_loss: 0-d, mean over pairs, without its weight.
        bco_loss: 0-d, mean over pairs, without its weight.
        ntp_loss: 0-d, cross entropy of the chosen responses in nats, without its weight.
        chosen_logp: ``[B]`` summed log-prob of each chosen response under the policy, in nats.
        rejected_logp: ``[B]`` likewise for the rejected ones.
        chosen_reward: ``[B]`` ``beta * (logp - ref_logp)``; 0 for a pair with an empty side.
        rejected_reward: ``[B]`` likewise.
        reward_shift: 0-d, the delta that was used.
        tokens: ``[2B]`` int64, the labelled tokens of each sequence.
        stats: Each statistic asked for, 0-d, averaged over the labelled tokens of the batch; 0 if there are none.
        backend: The backend that ran.
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
) -> MPOOutput:
    """Mixed Preference Optimization: ``dpo_weight * DPO + bco_weight * BCO + ntp_weight * NTP`` (arXiv 2411.10442).

    Forward reads each logit of a labelled row once, backward reads it once more and writes its gradient once. Rows
    whose label is ``config.ignore_index`` are never read. A pair with an empty side contributes its constant to DPO
    and BCO and no gradient; a batch without a chosen token has an NTP term of 0.

    Args:
        logits: ``[2B, T, V]``, the B chosen sequences first, sequences i and B + i being a pair; or packed ``[N, V]``
            with ``cu_seqlens``. float32, bfloat16, float16, or float64. Any strides; -inf is fine (a banned token).
        labels: ``[2B, T]`` or ``[N]`` int64, ``config.ignore_index`` where nothing is to be scored. A label that is
            neither that nor in ``[0, V)`` makes the loss NaN.
        ref_logp: ``[2B]`` float32 or float64, summed log-probs of the same tokens under the reference model, as
            ``token_logp(ref_logits, labels, shift=True).sum(-1)`` gives them for padded input under no_grad, or
        ref_logits: the reference model's logits, like ``logits``; exactly one of the two. Neither gets a gradient.
        config: Weights, beta and the rest.
        reward_shift: delta of the BCO term: None for 0, a number, a 0-d tensor, or a ``RewardShift``, which is updated
            in training.
        cu_seqlens: ``[2B + 1]`` int32 or int64 for packed input: where each sequence starts, and N at the end.
        shift: Scores position t against ``labels[t + 1]``, as Hugging Face models do, never across sequences. False
            if the labels are already aligned with the logits.
        stats: Any of "entropy" (nats), "mean_logit" and "top1" (the label has the row's largest logit), computed in
            the same read.
        reuse_logits: Lets backward write the gradient into the logits' own memory, which must then serve nobody
            else: a loss that has saved them raises torch's "modified by an inplace operation". A second backward
            raises. Nothing to the backend "reference", whose backward is autograd's.
        backend: None for the best one available, or "cpu", "cuda", "triton", or "reference" (plain torch).

    Returns:
        An ``MPOOutput``. With policy == reference and delta 0 its loss is 0.831777 + NTP.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here; in backward, if it is differentiated twice, or run again after
            ``reuse_logits``.
    """
    if not isinstance(config, MPOConfig):
        raise TypeError(f"config must be an MPOConfig, got {type(config).__name__}")
    sequences = ops.check_pairs(logits, labels, cu_seqlens)
    ops.check_reference(logits, sequences, ref_logp, ref_logits)
    names = ops.check_stats(stats, _PUBLIC_STATS)
    if reuse_logits:
        ops.check_reuse(logits)
    chosen_backend = ops.choose_backend(backend, logits)
    if cu_seqlens is not None:  # packed rows are one sequence of rows to the kernels
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
        ref_logits = None if ref_logits is None else ref_logits.unsqueeze(0)
    if shift:
        labels = shift_labels(labels, config.ignore_index, cu_seqlens).contiguous()  # once, also for the backward

    if ref_logits is not None:
        with torch.no_grad():
            rows = token_logp(ref_logits, labels, ignore_index=config.ignore_index, backend=chosen_backend)
            ref_logp = reference.sequence_sums(rows.double(), cu_seqlens)
    assert ref_logp is not None  # check_reference has seen to it
    ref_logp = ref_logp.detach()

    if chosen_backend == "reference":
        logp = reference.token_logp(logits, labels, config.ignore_index)
        row_stats = reference.token_stats(logits, labels, names, config.ignore_index)

        def pairs(state: Tensor, rule: int, update_first: bool, decay: float) -> reference.PairLoss:
            return reference.pair_loss(logp, labels, ref_logp, state, rule, update_first, decay, cu_seqlens, config)

        pair = _with_reward_shift(pairs, reward_shift, logits.device)
        loss = pair.loss
    else:
        detached = logits.detach()
        mask = ops.stats_mask(names)
        scored: tuple[Tensor, ...] | None = None
        if chosen_backend != "cuda":  # where it comes with the first pair loss, in one launch
            scored = ops.token_logp(detached, labels, config.ignore_index, mask, chosen_backend)

        def score_with(*settings: Any) -> tuple[Tensor, ...]:
            return ops.forward(detached, labels, *settings, mask, chosen_backend)

        pair, weight, (_, row_max, row_sum, row_stats) = _kernel_pairs(
            scored, score_with, labels, ref_logp, config, reward_shift, cu_seqlens, chosen_backend
        )
        loss = _Loss.apply(
            logits, pair.loss, labels, row_max, row_sum, weight, config.ignore_index, reuse_logits, chosen_backend
        )
    return _output(loss, pair, names, row_stats, chosen_backend)


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
    recompute: bool = True,
    config: MPOConfig = _DEFAULT_CONFIG,
    reward_shift: RewardShift | Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    stats: Sequence[str] = (),
    backend: str | None = None,
) -> MPOOutput:
    """``mpo_loss`` from hidden states and the output head: the logits never exist as a whole.

    The logits are ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``, without the
    tanh if there is no softcap. Only labelled rows are projected, in tiles of rows by vocabulary; the loss is that of
    ``mpo_loss`` on the logits before they are rounded to the hidden states' dtype, but on a CPU that multiplies that
    dtype faster than float32, where they are rounded (MPO_CPU_PRODUCT=float32 avoids it). ``hidden_and_head`` gets
    the arguments out of a Hugging Face model.

    Matrix products of n labelled rows by the whole head: one forward and three backward; where neither weight nor
    bias needs a gradient two forward and none backward; with ``recompute=False`` one and two. Memory beyond
    inputs and gradients: ``memory_budget``, up to two copies of the n rows of ``hidden`` in float32, and what torch's
    products take themselves (on a CPU most where they multiply bfloat16 natively). With ``recompute=False`` the n
    rows of logits besides, from forward to backward; but the gradient by ``weight`` then takes their memory, so that
    beyond gradients it is what n rows of logits take more than ``weight``.

    Args:
        hidden: ``[2B, T, D]``, final hidden states of B chosen and then B rejected sequences; or packed ``[N, D]``
            with ``cu_seqlens``. float32, bfloat16, float16, or float64.
        weight: ``[V, D]`` of the output head; its dtype may differ (float32 parameters under autocast).
        labels: As in ``mpo_loss``. On a GPU pass labels that are still on the CPU, best in pinned memory, to spare
            the host the wait for their number; either works.
        ref_logp: As in ``mpo_loss``, or
        ref_hidden: hidden states of the reference model, ``[2B, T, D']`` or ``[N, D']``; exactly one of the two.
        ref_weight: ``[V', D']`` head of the reference model; None for ``weight``. Neither gets a gradient.
        bias: ``[V]`` of the head, or None.
        ref_bias: Of the reference head. None for none, and for ``bias`` where there is no ``ref_weight``.
        logit_scale: Factor on the product (Cohere), not 0. The reference's logits are scaled and capped alike.
        softcap: Bound of the logits (Gemma 2), above 0, or None.
        temperature: Divides the logits at last, above 0.
        memory_budget: Bytes for a tile and what is computed from it; None for 64 MiB on a CPU, 256 MiB on a GPU. It
            changes speed, and the result by rounding only. A CPU stays fast down to some 4 MiB and usable to some
            256 KiB; a budget of bytes makes tiles of a few numbers, and takes as long as that sounds.
        recompute: Whether backward computes the tiles again. False keeps the logits of the labelled rows, which saves
            one product in four. They are kept as tiles are, in float32 mostly; with bfloat16 hidden states and weight
            in float16, as their distance from the row's largest. The gradient by weight is formed in the same memory,
            whose size is that of the larger of both and a tile; a second backward computes the logits again. Means
            nothing where ``weight`` needs no gradient.
        config: As in ``mpo_loss``.
        reward_shift: As in ``mpo_loss``.
        cu_seqlens: As in ``mpo_loss``.
        shift: As in ``mpo_loss``.
        stats: As in ``mpo_loss``.
        backend: As in ``mpo_loss``. "reference" materialises the logits in plain torch.

    Returns:
        An ``MPOOutput``. Its loss is differentiable by hidden, weight and bias.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here; in backward, if it is differentiated twice.
    """
    if not isinstance(config, MPOConfig):
        raise TypeError(f"config must be an MPOConfig, got {type(config).__name__}")
    sequences = ops.check_pairs(hidden, labels, cu_seqlens, "hidden")
    ops.check_head(hidden, weight, bias, logit_scale, softcap, temperature, memory_budget, recompute)
    ops.check_reference(hidden, sequences, ref_logp, ref_hidden, "hidden")
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias go with ref_hidden, got one of them without it")
    else:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        ops.check_head(ref_hidden, ref_weight, ref_bias, logit_scale, softcap, temperature, None, prefix="ref_")
    names = ops.check_stats(stats, _PUBLIC_STATS)
    chosen_backend = ops.choose_backend(backend, hidden, "hidden")

    if chosen_backend == "reference":
        labels = labels.to(hidden.device)
        logits = reference.linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
        if ref_hidden is not None:
            assert ref_weight is not None
            with torch.no_grad():
                rows = reference.linear_logits(ref_hidden, ref_weight, ref_bias, logit_scale, softcap, temperature)
                aligned = shift_labels(labels, config.ignore_index, cu_seqlens) if shift else labels
                ref_logp = reference.sequence_sums(
                    reference.token_logp(rows, aligned, config.ignore_index).double(), cu_seqlens
                )
        return mpo_loss(
            logits, labels, ref_logp, config=config, reward_shift=reward_shift, cu_seqlens=cu_seqlens, shift=shift,
            stats=stats, backend="reference",
        )  # fmt: skip

    if cu_seqlens is not None:  # packed rows are one sequence of rows to the kernels
        hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
        ref_hidden = None if ref_hidden is None else ref_hidden.unsqueeze(0)
    if shift:
        offsets = None if cu_seqlens is None else cu_seqlens.to(labels.device)
        labels = shift_labels(labels, config.ignore_index, offsets).contiguous()
    options = (config.ignore_index, logit_scale, softcap, temperature, _memory_budget(memory_budget, hidden.device))
    if ref_hidden is not None:
        assert ref_weight is not None
        rows, *_ = linear_ops.linear_token_logp(
            ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach(), labels,
            *options, 0, linear_ops.KEEP_NOTHING, _product_dtype(ref_hidden, ref_weight), chosen_backend,
        )  # fmt: skip
        ref_logp = reference.sequence_sums(rows.double(), cu_seqlens)
    assert ref_logp is not None  # check_reference has seen to it

    keep = _what_to_keep(hidden, weight, bias, recompute)
    product = _product_dtype(hidden, weight)
    *scored, kept = linear_ops.linear_token_logp(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(), labels, *options,
        ops.stats_mask(names), keep, product, chosen_backend,
    )  # fmt: skip
    device_labels = labels.to(hidden.device, non_blocking=True)
    pair, row_weight, (_, row_max, row_sum, row_stats) = _kernel_pairs(
        tuple(scored), None, device_labels, ref_logp.detach(), config, reward_shift, cu_seqlens, chosen_backend
    )
    loss = _Linear.apply(
        hidden, weight, bias, pair.loss, labels, row_max, row_sum, row_weight, kept, *options, keep, product,
        chosen_backend,
    )  # fmt: skip
    return _output(loss, pair, names, row_stats, chosen_backend)


def _kernel_pairs(
    scored: tuple[Tensor, ...] | None,
    score_with: Callable[..., tuple[Tensor, ...]] | None,
    labels: Tensor,
    ref_logp: Tensor,
    config: MPOConfig,
    reward_shift: RewardShift | Tensor | float | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[reference.PairLoss, Tensor, tuple[Tensor, ...]]:
    """The pair loss of rows that are scored, or that ``score_with`` scores with the first pair loss in one launch.

    Returns:
        The pair loss, the weight of each row, and the outputs of ``ops.token_logp``.
    """
    weight = ref_logp  # replaced by the call below

    def pairs(state: Tensor, rule: int, update_first: bool, decay: float) -> reference.PairLoss:
        nonlocal scored, weight
        settings = (
            ref_logp, state, rule, update_first, decay, cu_seqlens, config.beta, config.dpo_weight,
            config.bco_weight, config.ntp_weight, config.label_smoothing, config.ntp_average == "sequence",
            config.ignore_index,
        )  # fmt: skip
        if scored is None:
            assert score_with is not None
            outputs = score_with(*settings)
            scored, outputs = outputs[:4], outputs[4:]
        else:
            outputs = ops.pair_loss(scored[0], labels, *settings, backend)
        *pair, weight = outputs
        return reference.PairLoss(*pair)

    pair = _with_reward_shift(pairs, reward_shift, ref_logp.device)
    assert scored is not None  # pairs has seen to it
    return pair, weight, scored


def _output(
    loss: Tensor, pair: reference.PairLoss, names: Sequence[str], row_stats: Tensor, backend: str
) -> MPOOutput:
    chosen_logp, rejected_logp = pair.logp.chunk(2)
    chosen_reward, rejected_reward = pair.reward.chunk(2)
    dpo_loss, bco_loss, ntp_loss = pair.terms.unbind()
    tokens = pair.tokens.sum().clamp(min=1)
    averages = [rows.double().sum().div(tokens).to(pair.terms.dtype) for rows in row_stats]
    return MPOOutput(
        loss,
        dpo_loss,
        bco_loss,
        ntp_loss,
        chosen_logp,
        rejected_logp,
        chosen_reward,
        rejected_reward,
        pair.reward_shift,
        pair.tokens,
        dict(zip(names, averages, strict=True)),
        backend,
    )


def token_logp(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each label, differentiable, without a float32 copy of the logits.

    Mind that ``shift`` is off here and on in ``mpo_loss``, and that it knows of no packed sequences: pass
    ``shift_labels(labels, cu_seqlens=cu_seqlens)`` for those, with ``shift=False``.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64, any strides.
        labels: ``[...]`` int64, in ``[0, V)`` or ``ignore_index``.
        shift: Scores position t of the last axis of labels against ``labels[t + 1]``; the last position gives 0.
        ignore_index: Label of the positions that are not read and give 0.
        backend: As in ``mpo_loss``.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), in nats; NaN where a label is neither ``ignore_index`` nor in
        ``[0, V)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here, or the result is differentiated twice.
    """
    ops.check_logits("logits", logits)
    ops.check_labels(logits, labels)
    chosen_backend = ops.choose_backend(backend, logits)
    if shift:
        if labels.ndim == 0:
            raise ValueError("shift needs labels with at least one axis, got shape ()")
        labels = shift_labels(labels, ignore_index)
    if chosen_backend == "reference":
        return reference.token_logp(logits, labels, ignore_index)
    logp, row_max, row_sum, _ = ops.token_logp(logits.detach(), labels, ignore_index, 0, chosen_backend)
    return _TokenLogp.apply(logits, logp, labels, row_max, row_sum, ignore_index, chosen_backend)


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
    recompute: bool = True,
    shift: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """``token_logp`` from hidden states and the output head: the logits never exist as a whole.

    What is said in ``linear_mpo_loss`` of the logits, of products and of memory holds here.

    Args:
        hidden: ``[..., D]`` float32, bfloat16, float16 or float64.
        weight: ``[V, D]``.
        labels: ``[...]`` int64, in ``[0, V)`` or ``ignore_index``; on a GPU they may be on the CPU.
        bias: ``[V]``, or None.
        logit_scale: As in ``linear_mpo_loss``.
        softcap: As in ``linear_mpo_loss``.
        temperature: As in ``linear_mpo_loss``.
        memory_budget: As in ``linear_mpo_loss``.
        recompute: As in ``linear_mpo_loss``.
        shift: As in ``token_logp``.
        ignore_index: As in ``token_logp``.
        backend: As in ``mpo_loss``.

    Returns:
        ``[...]`` float32 (float64 if hidden or weight is float64), in nats, differentiable by hidden, weight and
        bias; NaN where a label is neither ``ignore_index`` nor in ``[0, V)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or value is wrong.
        RuntimeError: If the backend cannot run here, or the result is differentiated twice.
    """
    ops.check_logits("hidden", hidden, "feature")
    ops.check_labels(hidden, labels, "hidden", may_be_on_cpu=True)
    ops.check_head(hidden, weight, bias, logit_scale, softcap, temperature, memory_budget, recompute)
    chosen_backend = ops.choose_backend(backend, hidden, "hidden")
    if shift:
        if labels.ndim == 0:
            raise ValueError("shift needs labels with at least one axis, got shape ()")
        labels = shift_labels(labels, ignore_index)
    if chosen_backend == "reference":
        logits = reference.linear_logits(hidden, weight, bias, logit_scale, softcap, temperature)
        return reference.token_logp(logits, labels.to(hidden.device), ignore_index)
    keep = _what_to_keep(hidden, weight, bias, recompute)
    product = _product_dtype(hidden, weight)
    options = (ignore_index, logit_scale, softcap, temperature, _memory_budget(memory_budget, hidden.device))
    logp, row_max, row_sum, _, kept = linear_ops.linear_token_logp(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(), labels, *options, 0, keep, product,
        chosen_backend,
    )  # fmt: skip
    return _Linear.apply(
        hidden, weight, bias, logp, labels, row_max, row_sum, None, kept, *options, keep, product, chosen_backend
    )


def shift_labels(labels: Tensor, ignore_index: int = -100, cu_seqlens: Tensor | None = None) -> Tensor:
    """Aligns labels with the logits that predict them: ``out[..., t] = labels[..., t + 1]``.

    The last position of each sequence gets ``ignore_index``; with ``cu_seqlens`` the sequences lie one after the other
    along the last axis.
    """
    shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if cu_seqlens is not None:
        shifted = shifted.index_fill(-1, cu_seqlens[1:].long() - 1, ignore_index)
    return shifted


class _Loss(torch.autograd.Function):
    """Hangs the gradient on a loss that the operators have computed already.

    The weight of every row, d loss / d logp, is known then, so backward is one operator: weight times
    ``onehot(label) - softmax(logits)``. Saved are the logits themselves, the labels, two numbers and a weight per row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        loss: Tensor,
        labels: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        weight: Tensor,
        ignore_index: int,
        reuse_logits: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, row_max, row_sum, weight)
        ctx.ignore_index = ignore_index
        ctx.reuse_logits = reuse_logits
        ctx.backend = backend
        ctx.is_spent = False
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError(
                "reuse_logits=True lets backward run once, since it writes the gradient over the logits; got a second "
                "backward: use reuse_logits=False with retain_graph"
            )
        logits, *rows = ctx.saved_tensors
        grad = logits.detach()
        # grad_loss stays on the device: comparing it with 1 to save a multiplication would wait for it.
        if ctx.reuse_logits:
            ctx.is_spent = True
            ops.logits_grad_(grad, *rows, grad_loss.detach(), ctx.ignore_index, ctx.backend)
        else:
            grad = ops.logits_grad(grad, *rows, grad_loss.detach(), ctx.ignore_index, ctx.backend)
        return _once_differentiable(grad, logits, grad_loss), *[None] * 8


class _TokenLogp(torch.autograd.Function):
    """Hangs the gradient on log-probs that the operator has computed already; each row brings its own weight."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        logp: Tensor,
        labels: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        ignore_index: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, row_max, row_sum)
        ctx.ignore_index = ignore_index
        ctx.backend = backend
        return logp.clone()

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor) -> tuple[Tensor | None, ...]:
        logits, *rows = ctx.saved_tensors
        grad = ops.logits_grad(logits.detach(), *rows, grad_logp.detach(), None, ctx.ignore_index, ctx.backend)
        return _once_differentiable(grad, logits, grad_logp), *[None] * 6


class _Linear(torch.autograd.Function):
    """Hangs the gradients by hidden states and head on a loss, or on log-probs, that the operators have computed.

    A loss comes with the weight of each row, d loss / d logp; of log-probs the incoming gradient is that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: Tensor,
        labels: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        row_weight: Tensor | None,
        kept: Tensor,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
        temperature: float,
        memory_budget: int,
        keep: int,
        product: torch.dtype,
        backend: str,
    ) -> Tensor:
        hidden_grad = kept if keep == linear_ops.KEEP_HIDDEN_GRAD else None
        ctx.save_for_backward(hidden, weight, bias, labels, row_max, row_sum, row_weight, hidden_grad)
        # Not among the saved, since backward overwrites and then frees it.
        ctx.logits = kept if keep == linear_ops.KEEP_LOGITS else None
        ctx.options = (ignore_index, logit_scale, softcap, temperature, memory_budget, product)
        ctx.backend = backend
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, row_max, row_sum, row_weight, hidden_grad = ctx.saved_tensors
        incoming = grad_value.detach()
        row_weight, scale = (incoming, None) if row_weight is None else (row_weight, incoming)
        wanted = ctx.needs_input_grad[:3]
        logits, ctx.logits = ctx.logits, None
        # A second backward finds no logits, and computes them again.
        operator, kept = (linear_ops.linear_grad, hidden_grad) if logits is None else (linear_ops.linear_grad_, logits)
        gradients = operator(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach(), labels, row_max, row_sum,
            row_weight, scale, kept, *ctx.options, *wanted, ctx.backend,
        )  # fmt: skip
        if logits is not None and wanted[1]:
            d_hidden, _, d_bias = gradients
            gradients = d_hidden, linear_ops.kept_weight_grad(logits, weight.detach()), d_bias
        sources = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        return (
            *(
                _once_differentiable(gradient, *sources, grad_value) if is_wanted else None
                for gradient, is_wanted in zip(gradients, wanted, strict=True)
            ),
            *[None] * 14,
        )


def _what_to_keep(hidden: Tensor, weight: Tensor, bias: Tensor | None, recompute: bool) -> int:
    """What the forward keeps for the backward (linear_ops.py)."""
    head_needs_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_needs_grad or hidden.requires_grad):
        return linear_ops.KEEP_NOTHING
    if not head_needs_grad:
        return linear_ops.KEEP_HIDDEN_GRAD
    # Kept logits lie in the memory of the gradient by weight.
    return linear_ops.KEEP_LOGITS if weight.requires_grad and not recompute else linear_ops.KEEP_NOTHING


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type that a model's own head would multiply in."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return linear_ops.product_dtype(dtype, hidden.device)


def _memory_budget(memory_budget: int | None, device: torch.device) -> int:
    if memory_budget is not None:
        return min(memory_budget, 1 << 62)  # what an operator's argument holds
    return _CPU_MEMORY_BUDGET if device.type == "cpu" else _GPU_MEMORY_BUDGET


class _OnceDifferentiable(torch.autograd.Function):
    """Passes a gradient through, and refuses to be differentiated itself.

    ``once_differentiable`` of torch would not do: where only the saved logits ask for a gradient, and not the incoming
    one, it returns a constant, and a gradient penalty would be silently incomplete.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "mpo_ext's kernels can be differentiated once, got a double backward: use backend='reference', which is "
            "plain torch"
        )


def _once_differentiable(grad: Tensor, *sources: Tensor) -> Tensor:
    """A gradient that raises if it is differentiated by what it was computed from."""
    if not torch.is_grad_enabled():  # which it is under create_graph=True only
        return grad
    return _OnceDifferentiable.apply(grad, *sources)


def _with_reward_shift(
    pairs: Callable[[Tensor, int, bool, float], reference.PairLoss],
    reward_shift: RewardShift | Tensor | float | None,
    device: torch.device,
) -> reference.PairLoss:
    """Calls the pair loss with the right delta, and moves the RewardShift if this call is to."""
    if not isinstance(reward_shift, RewardShift):
        return pairs(_fixed_state(reward_shift, device), HOLD, False, 0.0)
    state, is_updating = reward_shift._begin(device)
    if not is_updating:
        return pairs(state, HOLD, False, 0.0)
    is_first = reward_shift.update_order == "before"
    rule = reward_shift._kernel_rule()
    if rule != HOLD:
        pair = pairs(state, rule, is_first, reward_shift.decay)
        reward_shift._state = pair.state
        return pair
    # Rewards of other ranks or of the whole optimizer step come in between.
    pair = pairs(state, HOLD, False, 0.0)
    reward_shift.update(pair.batch[0], pair.batch[1])
    return pairs(reward_shift._state, HOLD, False, 0.0) if is_first else pair


def _fixed_state(delta: Tensor | float | None, device: torch.device) -> Tensor:
    """The state of a delta that the caller gives: [2] float64."""
    if isinstance(delta, Tensor):
        if delta.ndim != 0 or not delta.is_floating_point():
            raise ValueError(
                f"reward_shift must be a 0-d floating-point tensor when it is a tensor, got {delta.dtype} of shape "
                f"{tuple(delta.shape)}"
            )
        return F.pad(delta.detach().to(device=device, dtype=torch.float64).reshape(1), (0, 1))
    if delta is None:
        delta = 0.0
    if isinstance(delta, bool) or not isinstance(delta, int | float):
        raise TypeError(
            f"reward_shift must be None, a number, a 0-d tensor or a RewardShift, got {type(delta).__name__}"
        )
    if not math.isfinite(delta):
        raise ValueError(f"reward_shift must be finite, got {delta}")
    return torch.full((2,), float(delta), dtype=torch.float64, device=device)
