"""The public loss functions: autograd functions over the operators token_logp, pair_loss and logits_grad."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_ext import ops, reference
from mpo_ext.config import MPOConfig
from mpo_ext.reward_shift import HOLD, RewardShift

_PUBLIC_STATS = ("entropy", "mean_logit", "top1")
_DEFAULT_CONFIG = MPOConfig()


class MPOOutput(NamedTuple):
    """What ``mpo_loss`` returns. Only ``loss`` is differentiable.

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
        weight = logits  # replaced by the call below

        def pairs(state: Tensor, rule: int, update_first: bool, decay: float) -> reference.PairLoss:
            nonlocal scored, weight
            settings = (
                ref_logp, state, rule, update_first, decay, cu_seqlens, config.beta, config.dpo_weight,
                config.bco_weight, config.ntp_weight, config.label_smoothing, config.ntp_average == "sequence",
                config.ignore_index,
            )  # fmt: skip
            if scored is None:
                outputs = ops.forward(detached, labels, *settings, mask, chosen_backend)
                scored, outputs = outputs[:4], outputs[4:]
            else:
                outputs = ops.pair_loss(scored[0], labels, *settings, chosen_backend)
            *pair, weight = outputs
            return reference.PairLoss(*pair)

        pair = _with_reward_shift(pairs, reward_shift, logits.device)
        assert scored is not None  # pairs has seen to it
        _, row_max, row_sum, row_stats = scored
        loss = _Loss.apply(
            logits, pair.loss, labels, row_max, row_sum, weight, config.ignore_index, reuse_logits, chosen_backend
        )

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
        chosen_backend,
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


class _OnceDifferentiable(torch.autograd.Function):
    """Passes a gradient through, and refuses to be differentiated itself.

    ``once_differentiable`` of torch would not do: where only the saved logits ask for a gradient, and not the incoming
    one, it returns a constant, and a gradient penalty would be silently incomplete.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, logits: Tensor, grad_output: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "mpo_ext's kernels can be differentiated once, got a double backward: use backend='reference', which is "
            "plain torch"
        )


def _once_differentiable(grad: Tensor, logits: Tensor, grad_output: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # which it is under create_graph=True only
        return grad
    return _OnceDifferentiable.apply(grad, logits, grad_output)


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
