"""Attention without a mask tensor for rows with several responses to a prompt, on a CPU.

In a row ``[prompt | chosen | rejected]``, a rejected token attends to the prompt and to earlier rejected tokens. It
does not attend to the chosen response. SDPA's flash kernel on the CPU cannot compute this in a single causal call. So
this module calls the kernel several times. In a causal call, a prompt or a response attends to itself. In a
non-causal call, the responses attend to their prompt.

Each call returns its output and lse, the log-sum-exp of each query's scores. With ``joint = logaddexp(lse_1, lse_2)``,
the attention output is ``exp(lse_1 - joint) * output_1 + exp(lse_2 - joint) * output_2``. In backward, each kernel
call receives the attention output and ``joint`` in place of its output and its lse. This gives the exact gradients
(FlashAttention-2, arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenPart(NamedTuple):
    """Consecutive tokens of a sequence row: tokens that attend causally to each other, or padding.

    Attributes:
        size: Number of tokens.
        prompt: Index of another part, which begins with the prompt of these tokens. The tokens also attend to this
            prompt. None: the tokens attend to no other part.
        prompt_length: Number of tokens of the prompt.
        is_padding: Whether the tokens are padding. Padding attends to nothing.
    """

    size: int
    prompt: int | None
    prompt_length: int
    is_padding: bool


class JointCalls(NamedTuple):
    """The token ranges of all kernel calls. The stop of a range is exclusive.

    Attributes:
        own: ``(start, stop)`` of each causal call. The tokens in this range are both queries and keys. The ranges do
            not overlap.
        shared: ``(start, stop, key start, key stop)`` of each non-causal call: the range of its queries, then the
            range of its keys.
    """

    own: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int, int, int], ...]


def joint_calls(parts: Sequence[TokenPart]) -> JointCalls:
    """Returns the kernel calls for all parts. Adjacent parts with the same prompt attend to it in one call."""
    own: list[tuple[int, int]] = []
    shared: list[tuple[int, int, int, int]] = []
    starts: list[int] = []
    start = 0
    for i, part in enumerate(parts):
        starts.append(start)
        stop = start + part.size
        if part.is_padding or not part.size:
            start = stop
            continue
        if part.prompt is not None and part.prompt_length:
            first = starts[part.prompt]
            keys = first, first + min(part.prompt_length, parts[part.prompt].size)
            if shared and shared[-1][1:] == (start, *keys):
                shared[-1] = shared[-1][0], stop, *keys
            elif part.prompt == i - 1:  # the call also takes the first response, which is in the part of the prompt
                if keys[1] < start:
                    own[-1:] = [keys, (keys[1], start)]
                shared.append((keys[1], stop, *keys))
            else:
                shared.append((start, stop, *keys))
        own.append((start, stop))
        start = stop
    return JointCalls(tuple(own), tuple(shared))


def can_join(query: Tensor, value: Tensor) -> bool:
    """Returns whether ``joint_attention`` supports the device, the dtype and the head sizes of these tensors."""
    # Half precision would round the result of each call before the results are joined.
    is_exact = query.dtype in (torch.float32, torch.float64)
    has_kernel = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    return query.device.type == "cpu" and is_exact and has_kernel and query.shape[-1] == value.shape[-1]


def joint_attention(query: Tensor, key: Tensor, value: Tensor, calls: JointCalls, scale: float | None) -> Tensor:
    """Returns the attention output ``[T, H, D]`` of T tokens. It is zero for padding tokens.

    Args:
        query: ``[T, H, D]``, float32 or float64, on the CPU.
        key: ``[T, H, D]``, same dtype and device.
        value: ``[T, H, D]``, same dtype and device.
        calls: Kernel calls, from ``joint_calls``.
        scale: Factor of the scores; None: ``D ** -0.5``.

    Raises:
        RuntimeError: In double backward, which is not supported.
    """
    tensors = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    out: Tensor = _JointAttention.apply(*tensors, calls, scale)
    return out


def _heads(tensor: Tensor) -> Tensor:
    """Returns a view: ``[n, H, D]`` becomes ``[1, H, n, D]``, and ``[n, H]`` becomes ``[1, H, n]``."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _tokens(tensor: Tensor) -> Tensor:
    """Returns a view: ``[1, H, n, D]`` becomes ``[n, H, D]``, and ``[1, H, n]`` becomes ``[n, H]``."""
    return tensor.squeeze(0).transpose(0, 1)


class _JointAttention(torch.autograd.Function):
    """Autograd function of ``joint_attention``. Double backward raises ``RuntimeError``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: JointCalls, scale: float | None) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - alone returns the lse
        out = query.new_zeros(query.shape)
        lse = query.new_zeros(query.shape[:2])
        for start, stop in calls.own:
            own = (_heads(tensor[start:stop]) for tensor in (query, key, value))
            part, part_lse = kernel(*own, 0.0, True, scale=scale)
            out[start:stop], lse[start:stop] = _tokens(part), _tokens(part_lse)
        for start, stop, first, end in calls.shared:
            prompt = (_heads(tensor[first:end]) for tensor in (key, value))
            part, part_lse = kernel(_heads(query[start:stop]), *prompt, 0.0, False, scale=scale)
            rows, rows_lse, part_lse = out[start:stop], lse[start:stop], _tokens(part_lse)
            joint = torch.logaddexp(rows_lse, part_lse)
            rows.mul_((rows_lse - joint).exp_().unsqueeze(-1))
            rows.addcmul_(_tokens(part), (part_lse - joint).exp_().unsqueeze(-1))
            rows_lse.copy_(joint)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        grads = tuple(tensor.new_zeros(tensor.shape) for tensor in (query, key, value))

        def add(start: int, stop: int, first: int, end: int, is_causal: bool) -> None:
            inputs = query[start:stop], key[first:end], value[first:end], out[start:stop], lse[start:stop]
            parts = kernel(
                _heads(grad_out[start:stop]), *map(_heads, inputs), 0.0, is_causal, scale=ctx.scale
            )  # fmt: skip
            for grad, part, rows in zip(grads, parts, (slice(start, stop), *[slice(first, end)] * 2), strict=True):
                if is_causal:  # these calls come first and do not overlap
                    grad[rows] = _tokens(part)
                else:
                    grad[rows] += _tokens(part)

        for start, stop in ctx.calls.own:
            add(start, stop, start, stop, True)
        for start, stop, first, end in ctx.calls.shared:
            add(start, stop, first, end, False)
        return *grads, None, None
