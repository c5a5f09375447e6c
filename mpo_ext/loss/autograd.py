"""Autograd functions of the losses: each attaches a gradient to a value that the operators have already computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mpo_ext.ops import linear
from mpo_ext.ops.logits import logits_grad, logits_grad_
from mpo_ext.ops.memory import VocabShard

_WHOLE = VocabShard(0, 0)  # for operators, a total of 0 means that the logits are the whole vocabulary


class LossOfLogits(torch.autograd.Function):
    """Makes a precomputed loss differentiable with respect to the logits.

    Backward returns ``grad_loss * weight * (onehot(label) - softmax(logits))``. ``weight`` is d loss / d logp of each
    token. Forward saves the logits (without a copy), the labels, and three values per token: ``row_max``, ``row_sum``
    and ``weight``. ``shard`` is the part of the vocabulary that the logits cover; None means the whole vocabulary.
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
        shard: VocabShard | None = None,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, row_max, row_sum, weight)
        ctx.ignore_index = ignore_index
        ctx.reuse_logits = reuse_logits
        ctx.backend = backend
        ctx.shard = shard or _WHOLE
        ctx.is_spent = False
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Comparing grad_loss with 1 on the host, to save a multiplication, would wait for the device.
        logits, labels, row_max, row_sum, weight = _saved_rows(ctx)
        grad = _logits_grad(ctx, logits, labels, row_max, row_sum, weight, grad_loss.detach())
        return _once_differentiable(grad, logits, grad_loss), *[None] * 9


class LogpOfLogits(torch.autograd.Function):
    """Makes the precomputed log-probs of the labels differentiable with respect to the logits.

    Backward computes ``weight * (onehot(label) - softmax(logits))``, as in ``LossOfLogits``. The weight of a row
    (token position) is the incoming gradient of its log-prob.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        logp: Tensor,
        labels: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        ignore_index: int,
        reuse_logits: bool,
        backend: str,
        shard: VocabShard | None = None,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, row_max, row_sum)
        ctx.ignore_index = ignore_index
        ctx.reuse_logits = reuse_logits
        ctx.backend = backend
        ctx.shard = shard or _WHOLE
        ctx.is_spent = False
        return logp.clone()

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, row_max, row_sum = _saved_rows(ctx)
        grad = _logits_grad(ctx, logits, labels, row_max, row_sum, grad_logp.detach(), None)
        return _once_differentiable(grad, logits, grad_logp), *[None] * 8


def _saved_rows(ctx: Any) -> tuple[Tensor, ...]:
    """Returns the tensors saved for backward; raises if an earlier backward has overwritten the logits."""
    if ctx.is_spent:
        raise RuntimeError(
            "reuse_logits=True lets backward run once, since it writes the gradient over the logits; got a second "
            "backward: use reuse_logits=False with retain_graph"
        )
    return tuple(ctx.saved_tensors)


def _logits_grad(ctx: Any, logits: Tensor, *rows: Tensor | None) -> Tensor:
    """Returns the gradient with respect to the logits. With ``reuse_logits``, it is written over the logits."""
    grad = logits.detach()
    if not ctx.reuse_logits:
        return logits_grad(grad, *rows, ctx.ignore_index, ctx.backend, *ctx.shard)
    ctx.is_spent = True
    logits_grad_(grad, *rows, ctx.ignore_index, ctx.backend, *ctx.shard)
    return grad


class HiddenPlan(NamedTuple):
    """The settings for computing the gradients of hidden states and output head in backward."""

    keep: int  # a KEEP_ constant of mpo_ext.ops.linear
    options: linear.LinearOptions
    shard: VocabShard | None = None  # this rank's part of the vocabulary; None: weight and bias are the whole head
    group: dist.ProcessGroup | None = None  # with a shard: the ranks that sum the gradient of the hidden states


class ValueOfHidden(torch.autograd.Function):
    """Makes a precomputed value differentiable with respect to hidden states, weight and bias.

    If ``value`` is a loss, ``row_weight`` is d loss / d logp of each token. If ``value`` holds the log-prob of each
    token, ``row_weight`` is None, and backward uses the incoming gradient instead. ``kept`` is the last output of
    ``linear_token_logp`` or ``linear_token_logp_shard`` in ``ops.linear``.
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
        plan: HiddenPlan,
    ) -> Tensor:
        hidden_grad = kept if plan.keep == linear.KEEP_HIDDEN_GRAD else None
        ctx.save_for_backward(hidden, weight, bias, labels, row_max, row_sum, row_weight, hidden_grad)
        # Not a saved tensor, because backward overwrites and then frees these logits.
        ctx.logits = kept if plan.keep == linear.KEEP_LOGITS else None
        ctx.plan = plan
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, row_max, row_sum, row_weight, hidden_grad = ctx.saved_tensors
        incoming = grad_value.detach()
        row_weight, scale = (incoming, None) if row_weight is None else (row_weight, incoming)
        wanted = ctx.needs_input_grad[:3]
        logits, ctx.logits = ctx.logits, None  # this backward overwrites the logits; a second one recomputes them
        rows = (row_max, row_sum, row_weight)
        gradients: tuple[Tensor | None, ...]
        if ctx.plan.shard is not None:
            gradients = _gradients_over_ranks(
                ctx, (hidden.detach(), weight.detach(), None if bias is None else bias.detach()), labels, rows, scale,
                hidden_grad, logits,
            )  # fmt: skip
        elif hidden_grad is not None:
            ignore_index = ctx.plan.options.ignore_index
            d_hidden = linear.kept_hidden_grad(hidden.detach(), labels, hidden_grad, row_weight, scale, ignore_index)
            gradients = d_hidden, None, None
        else:
            head = weight.detach(), None if bias is None else bias.detach()
            d_hidden, d_weight, d_bias = linear.linear_grad(
                hidden.detach(), *head, labels, *rows, scale, logits, wanted, *ctx.plan.options
            )
            if logits is not None and wanted[1]:
                d_weight = linear.kept_weight_grad(logits, head[0])
            gradients = d_hidden, d_weight, d_bias
        sources = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        return (
            *(
                _once_differentiable(gradient, *sources, grad_value) if is_wanted and gradient is not None else None
                for gradient, is_wanted in zip(gradients, wanted, strict=True)
            ),
            *[None] * 7,
        )


def _gradients_over_ranks(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    scale: Tensor | None,
    hidden_grad: Tensor | None,
    logits: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the hidden states, the weight and the bias of a head that is sharded over the ranks.

    A gradient that is not needed is None or empty. The gradient of the hidden states is summed over the ranks, and
    then rounded to the dtype of ``hidden``. It is 0 for tokens without a label.

    Args:
        ctx: Context of the autograd function.
        inputs: Hidden states, weight and bias.
        labels: Labels of the tokens.
        rows: ``(row_max, row_sum, row_weight)``.
        scale: As in ``linear_grad_rows``.
        hidden_grad: d logp / d hidden if forward kept it, otherwise None.
        logits: The logits if forward kept them, otherwise None.
    """
    hidden, wanted = inputs[0], ctx.needs_input_grad[:3]
    d_weight, d_bias = None, None
    if hidden_grad is not None:
        ignore_index = ctx.plan.options.ignore_index
        index, grad = linear.kept_hidden_rows(hidden, labels, hidden_grad, rows[2], scale, ignore_index)
    else:
        index, grad, d_weight, d_bias = linear.linear_grad_rows(
            *inputs, labels, rows, scale, logits, wanted, ctx.plan.options, ctx.plan.shard
        )
    if not wanted[0]:
        return None, d_weight, d_bias
    dist.all_reduce(grad, group=ctx.plan.group)
    return linear.scatter_rows(grad, index, hidden), d_weight, d_bias


class OnceDifferentiable(torch.autograd.Function):
    """Returns a gradient unchanged; differentiating the result again raises an error.

    torch's ``once_differentiable`` raises only if the incoming gradient requires a gradient. Otherwise, backward
    returns a gradient without an autograd graph. A gradient penalty is then wrong, but no error is raised. This class
    raises in both cases.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "mpo_ext's kernels and its losses over several ranks can be differentiated once, got a double backward: "
            "on one rank use backend='reference', which is plain torch"
        )


def _once_differentiable(grad: Tensor, *sources: Tensor) -> Tensor:
    """Returns ``grad``. A second derivative with respect to ``sources`` then raises an error."""
    if not torch.is_grad_enabled():  # backward enables gradients only under create_graph=True
        return grad
    return OnceDifferentiable.apply(grad, *sources)
