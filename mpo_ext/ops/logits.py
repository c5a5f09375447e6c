"""The operators on logits: ``token_logp`` returns log-probs of labels, ``logits_grad`` the gradient of the logits.

Each operator allocates its outputs and calls the kernel of a backend. ``logits_grad_`` overwrites the logits. All
other operators return new tensors and do not write to their inputs, so ``torch.compile`` can trace past them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpo_ext.ops import backends, cuda, native
from mpo_ext.ops.checks import (
    STATS,
    check_kernel,
    check_labels,
    check_logits,
    check_reuse,
    check_row_values,
    check_scale,
)
from mpo_ext.ops.memory import (
    REUSED_BYTES,
    Tile,
    VocabShard,
    addresses,
    device_guard,
    empty_row_state,
    fresh_zeros,
    result_dtype,
    reused_memory,
    row_arguments,
    row_layout,
)

#: Names of the outputs of ``token_logp`` in the kernels.
ROW_OUTPUTS = ("logp", "row_max", "row_sum", "row_stats")
RowOutputs = tuple[Tensor, Tensor, Tensor, Tensor]


def stats_mask(stats: Sequence[str]) -> int:
    """Returns the requested statistics as a bit mask: bit i is set if ``stats`` contains the name ``STATS[i]``."""
    return sum(1 << STATS.index(name) for name in set(stats))


@torch.library.custom_op("mpo_ext::token_logp", mutates_args=())
def token_logp(
    logits: Tensor,  # [..., V]; copied only if V is not the contiguous axis, or if the rows need more than two strides
    labels: Tensor,  # [...] int64, in [0, V) or equal to ignore_index; any other value gives NaN
    ignore_index: int,  # label of rows that are not read and give 0
    stats: int,  # requested statistics: bit i requests STATS[i]
    backend: str,  # a result of choose_backend other than "reference"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the log-probability of each label. Reads each logit of a labelled token once.

    Returns:
        ``(logp, row_max, row_sum, row_stats)``, float32, or float64 for float64 logits. The first three are ``[...]``:
        the log-prob of the label, the token's largest logit, and the sum of ``exp(z - row_max)`` over the token's
        logits z. ``row_stats`` is ``[number of statistics, ...]`` in the order of ``STATS``.
    """
    check_logits("logits", logits)
    check_labels(logits, labels)
    check_kernel(backend, logits)
    if not 0 <= stats < 1 << len(STATS):
        raise ValueError(f"stats must be at least 0 and below {1 << len(STATS)}, got {stats}")
    outputs = token_logp_outputs(logits, labels, stats)
    score(logits, labels, ignore_index, stats, backend, outputs)
    return outputs


@token_logp.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int, stats: int, backend: str) -> RowOutputs:
    return token_logp_outputs(logits, labels, stats)


def token_logp_outputs(logits: Tensor, labels: Tensor, stats: int) -> RowOutputs:
    dtype = result_dtype(logits)
    logp, row_max, row_sum = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(3))
    return logp, row_max, row_sum, logits.new_empty((stats.bit_count(), *labels.shape), dtype=dtype)


def token_logp_shard(
    logits: Tensor, labels: Tensor, ignore_index: int, stats: int, backend: str, shard: VocabShard
) -> Tensor:
    """Returns the softmax state of each token over a shard of the vocabulary, ``[..., ROW_STATE]``.

    ``mpo_ext.loss.eager.shard_state`` describes a state. ``merge_shards`` merges the states of all shards.

    The arguments are as in ``token_logp``, but ``logits`` has only the columns of the shard. Labels are ids of the
    whole vocabulary.
    """
    state = empty_row_state(labels)
    outputs = token_logp_outputs(logits, labels, stats)
    score(logits, labels, ignore_index, stats, backend, outputs, Tile(shard.first, shard.total, state))
    return state


def merge_shards(
    states: Tensor, labels: Tensor, ignore_index: int, stats: int, total: int, dtype: torch.dtype
) -> RowOutputs:
    """Computes the outputs of ``token_logp`` from the states of all shards, ``[shards, ..., ROW_STATE]``.

    ``mpo_ext.loss.eager.shard_state`` explains a state. ``total`` is the size of the whole vocabulary. ``dtype`` is
    the dtype of the outputs. Only the output logp is differentiable.
    """
    maxima, sums, e_d, z_sum, squared, z_label = states.unbind(-1)
    maxima = maxima.detach()
    row_max = maxima.amax(0)
    gap = torch.where(maxima == -math.inf, 0.0, maxima - row_max)  # a shard without a maximum has a sum of 0
    scale = gap.exp()
    row_sum, label = (sums * scale).sum(0), z_label.sum(0)
    logp = (label - row_max) - row_sum.log()
    values = {
        "entropy": lambda: row_sum.log() - ((e_d + gap * sums) * scale).sum(0) / row_sum,
        "mean_logit": lambda: z_sum.sum(0) / total,
        "top1": lambda: (label == row_max).to(row_sum.dtype) + (row_sum - row_sum),  # NaN if the row has a NaN
        "sum_p_squared": lambda: (squared * scale.square()).sum(0) / row_sum.square(),
    }
    rows = [values[name]().detach() for bit, name in enumerate(STATS) if stats >> bit & 1]
    is_ignored = labels == ignore_index
    is_valid = ~is_ignored & (labels >= 0) & (labels < total)
    filler = torch.where(is_ignored, 0.0, torch.nan).to(logp.dtype)
    logp, *row_stats = (torch.where(is_valid, numbers, filler).to(dtype) for numbers in (logp, *rows))
    row_max, row_sum = (torch.where(is_valid, numbers, 0.0).to(dtype) for numbers in (row_max, row_sum))
    empty = logp.new_empty((0, *labels.shape))
    return logp, row_max, row_sum.detach(), torch.stack(row_stats) if row_stats else empty


def score(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: int,
    backend: str,
    outputs: RowOutputs,
    tile: Tile | None = None,
    *,
    exp_logits: Tensor | None = None,
) -> None:
    """Writes the results of ``token_logp`` to ``outputs``. The first five arguments are those of ``token_logp``.

    With ``tile``, ``logits`` cover only a part of the vocabulary. The results then cover this tile and all earlier
    tiles. Tiles must be passed in order.

    If ``exp_logits`` is the tensor ``logits``, the call also overwrites the logits. The label's logit becomes 0. Each
    other logit z becomes ``exp(z - row_max)``, where ``row_max`` is the maximum over this tile and all earlier tiles.
    In a row with an out-of-range label or a NaN logp, the new values are undefined. Only the backend "cpu" supports
    ``exp_logits``. With other backends, use ``write_exp_logits``.
    """
    if labels.numel() == 0:
        return
    layout, row_labels = row_layout(logits), labels.contiguous()
    out = addresses(**dict(zip(ROW_OUTPUTS, outputs, strict=True)), row_state=None if tile is None else tile.state)
    if backend == "triton":
        with device_guard(logits):
            kernels = backends.triton_kernels()
            kernels.token_logp(layout, row_labels, logits.shape[-1], ignore_index, stats, *outputs, tile)
    elif backend == "cuda":
        with device_guard(logits):
            arguments, _work_memory = cuda.forward_arguments(layout, row_labels, ignore_index, 0, tile)
            native.compiled().token_logp_cuda(**arguments, **out, stats=stats)
    else:
        native.compiled().token_logp_cpu(
            **row_arguments(layout, row_labels, ignore_index, tile),
            **out,
            stats=stats,
            exp_logits=0 if exp_logits is None else layout.tensor.data_ptr(),
            threads=torch.get_num_threads(),
            isa=backends.cpu_isa(),
        )


@torch.library.custom_op("mpo_ext::logits_grad", mutates_args=())
def logits_grad(
    logits: Tensor,  # [..., V] as given to token_logp
    labels: Tensor,  # [...] int64
    row_max: Tensor,  # [...] from token_logp, as is row_sum
    row_sum: Tensor,
    weight: Tensor,  # [...] d loss / d logp
    scale: Tensor | None,  # 0-d factor of the gradient; None: 1
    ignore_index: int,  # label of rows whose gradient is 0
    backend: str,  # a result of choose_backend other than "reference"
    first: int = 0,  # the vocabulary id of column 0, if the logits are a shard
    total: int = 0,  # size of the whole vocabulary; 0: that of the logits
) -> Tensor:
    """Returns the gradient of the logits, ``scale * weight * (onehot(label) - softmax(logits))``.

    The gradient of a row is 0 if the label is ignored, and NaN if the label is out of range. The result is contiguous
    and has the shape and dtype of the logits. Each logit of a labelled token is read once, and its gradient is written
    once. On a CPU, a large gradient may reuse the memory of an earlier gradient.

    If ``total`` is not 0, the logits are a shard of a vocabulary of ``total`` ids. ``first`` is then the first id of
    the shard.
    """
    _check_grad_inputs(logits, labels, row_max, row_sum, weight, scale, backend)
    grad, is_zeroed = _grad_memory(logits, labels, ignore_index, backend)
    tile = Tile(first, total, None) if total else None
    write_grad(
        logits, labels, row_max, row_sum, weight, scale, ignore_index, backend, grad, is_zeroed=is_zeroed, tile=tile
    )
    return grad


def _grad_memory(logits: Tensor, labels: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, bool]:
    """Returns a tensor for the gradient of the logits, and whether it is filled with zeros."""
    if backend != "cpu":
        return logits.new_empty(logits.shape), False
    # New memory costs page faults in the labelled rows; reused memory must be zeroed in the ignored rows. With a fifth
    # of the rows labelled, reuse was faster: the loss took 0.016 s instead of 0.020 s.
    is_large = logits.numel() * logits.dtype.itemsize >= REUSED_BYTES
    if is_large and int((labels != ignore_index).sum()) * 6 > labels.numel():
        return reused_memory(logits.shape, logits.dtype), False
    return fresh_zeros(logits.shape, logits.dtype), True


@logits_grad.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("mpo_ext::logits_grad_", mutates_args=("logits",))
def logits_grad_(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    backend: str,
    first: int = 0,
    total: int = 0,
) -> None:
    """Overwrites the logits with their gradient. The arguments are those of ``logits_grad``.

    Raises ValueError if ``check_reuse`` rejects the logits, or if two strides cannot describe their rows.
    """
    _check_grad_inputs(logits, labels, row_max, row_sum, weight, scale, backend)
    check_reuse(logits)
    if row_layout(logits).tensor is not logits:
        raise ValueError(f"logits must have rows that two strides describe, got strides {tuple(logits.stride())}")
    tile = Tile(first, total, None) if total else None
    write_grad(logits, labels, row_max, row_sum, weight, scale, ignore_index, backend, logits, tile=tile)


def _check_grad_inputs(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    backend: str,
) -> None:
    check_row_values(logits, labels, result_dtype(logits), row_max=row_max, row_sum=row_sum, weight=weight)
    check_scale(scale, logits)
    check_kernel(backend, logits)


def write_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    backend: str,
    grad: Tensor,
    *,
    is_zeroed: bool = False,
    tile: Tile | None = None,
) -> None:
    """Writes the result of ``logits_grad`` to ``grad``. The first eight arguments are those of ``logits_grad``.

    ``grad`` has the shape of the logits, and may be the logits themselves. On a CPU, it has the dtype of the logits. A
    GPU also allows float16 or bfloat16 for float32 logits, and bfloat16 for float16 logits. If the caller has filled
    ``grad`` with zeros, pass ``is_zeroed``: ignored rows are then not written. ``tile`` is the part of the vocabulary
    that the logits cover; None means the whole vocabulary.
    """
    if labels.numel() == 0:
        return
    # Held in variables until the call returns: an address does not keep its tensor alive.
    rows = [tensor.contiguous() for tensor in (row_max, row_sum, weight)]
    layout, row_labels, out = row_layout(logits), labels.contiguous(), row_layout(grad)
    if backend == "triton":
        with device_guard(logits):
            kernels = backends.triton_kernels()
            kernels.logits_grad(layout, row_labels, logits.shape[-1], ignore_index, *rows, scale, out, tile)
        return
    if scale is not None and (backend == "cpu" or scale.dtype not in (torch.float32, torch.float64)):
        scale = scale.double()
    arguments = {
        **row_arguments(layout, row_labels, ignore_index, tile),
        **addresses(row_max=rows[0], row_sum=rows[1], weight=rows[2], scale=scale, grad=out.tensor),
        "grad_inner": out.inner,
        "grad_outer_stride": out.outer_stride,
        "grad_row_stride": out.row_stride,
        "is_zeroed": is_zeroed,
    }
    if backend == "cpu":
        native.compiled().logits_grad_cpu(**arguments, threads=torch.get_num_threads(), isa=backends.cpu_isa())
        return
    with device_guard(logits):
        native.compiled().logits_grad_cuda(
            **arguments,
            grad_dtype=str(grad.dtype).removeprefix("torch."),
            scale_is_float=scale is not None and scale.dtype == torch.float32,
            multiprocessors=cuda.multiprocessors(logits.device),
            stream=cuda.current_stream(logits),
        )
