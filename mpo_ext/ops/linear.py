"""The operators on hidden states. They compute the logits of labelled rows only, one tile at a time (``tiles.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpo_ext.ops.checks import (
    STATS,
    check_head,
    check_kernel,
    check_labels,
    check_logits,
    check_rows,
    check_scale,
)
from mpo_ext.ops.logits import RowOutputs, score, token_logp_outputs, write_grad
from mpo_ext.ops.memory import ROW_STATE, Tile, result_dtype
from mpo_ext.ops.tiles import Head, TiledRows, accumulate, fresh_memory, labelled_rows, scatter_rows

#: Tensors that ``linear_token_logp`` keeps for backward: none, the unscaled gradient of hidden states, or the logits.
KEEP_NOTHING, KEEP_HIDDEN_GRAD, KEEP_LOGITS = 0, 1, 2


class LinearOptions(NamedTuple):
    """The last arguments of ``linear_token_logp`` and ``linear_grad``."""

    ignore_index: int  # label of rows that are not projected and give 0
    head_scales: list[float]  # logit_scale, softcap (0 for none) and temperature of Head
    memory_budget: int  # bytes for a tile and the tensors computed from it
    matmul_dtype: torch.dtype  # dtype of the inputs of matrix products, a result of tiles.matmul_dtype
    backend: str  # a result of choose_backend other than "reference"


@torch.library.custom_op("mpo_ext::linear_token_logp", mutates_args=())
def linear_token_logp(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D], any floating-point dtype
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [...] int64, on the device of hidden or on the CPU; the host waits for labels on a GPU
    stats: int,  # as in logits.token_logp
    keep: int,  # KEEP_NOTHING, KEEP_HIDDEN_GRAD or KEEP_LOGITS
    ignore_index: int,  # this and the next arguments: LinearOptions
    head_scales: Sequence[float],
    memory_budget: int,
    matmul_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the log-probability of each label from hidden states. Only logits of labelled rows are computed.

    Returns:
        ``(logp, row_max, row_sum, row_stats, kept)``: the outputs of ``logits.token_logp``, on the device of
        ``hidden``, and the tensor for backward. With n labelled rows, ``kept`` is ``[0]`` (KEEP_NOTHING), d logp /
        d hidden ``[n, D]`` (KEEP_HIDDEN_GRAD), or logits as bytes in the layout of ``KeptLogits`` (KEEP_LOGITS).
    """
    head = _checked_head(hidden, weight, bias, labels, head_scales, memory_budget, matmul_dtype, backend)
    if not 0 <= stats < 1 << len(STATS) or keep not in (KEEP_NOTHING, KEEP_HIDDEN_GRAD, KEEP_LOGITS):
        raise ValueError(f"stats must be below {1 << len(STATS)}, and keep 0, 1 or 2, got {stats} and {keep}")
    tiles = TiledRows(hidden, labels, head, ignore_index, memory_budget, keeps_logits=keep == KEEP_LOGITS)
    device_labels = tiles.like.new_empty(labels.shape, dtype=torch.int64)  # only their shape and device are used
    outputs = token_logp_outputs(tiles.like, device_labels, stats)
    for output in outputs:
        output.zero_()
    if keep == KEEP_LOGITS:
        kept = fresh_memory(tiles.like, (tiles.kept_logits.size,), torch.uint8)
    else:
        kept = tiles.like.new_empty(tiles.rows.shape if keep == KEEP_HIDDEN_GRAD else (0,))
    if tiles.rows.shape[0] == 0:
        return *outputs, kept

    chunks = [
        _Chunk(rows, chunk_labels, token_logp_outputs(tiles.like, chunk_labels, stats), _new_state(chunk_labels))
        for rows, chunk_labels in tiles.chunks()
    ]
    folds = keep == KEEP_HIDDEN_GRAD
    for first, end in tiles.columns():
        weight_rows = tiles.weight_rows(first, end)
        for chunk in chunks:
            out = tiles.kept_logits.tile(kept, chunk.rows, first, end) if tiles.keeps_in_place else None
            logits, tanh = tiles.logits(chunk.rows, weight_rows, first, end, out)
            tile = Tile(first, tiles.vocab, chunk.state)
            old_max = chunk.outputs[1].clone() if folds else None
            score(logits, chunk.labels, ignore_index, stats, backend, chunk.outputs, tile, leaves_exp_logits=folds)
            if keep == KEEP_LOGITS and not tiles.keeps_in_place:
                tiles.kept_logits.store_(kept, chunk.rows, first, end, logits, chunk.outputs[1])
            if old_max is not None:
                total = kept[chunk.rows]
                _fold_hidden_grad(tiles, chunk, logits, tanh, weight_rows, old_max, total, is_first=first == 0)
    for target, *parts in zip(outputs, *(chunk.outputs for chunk in chunks), strict=True):
        # Merging the axes of the labels makes the rows the last axis of each output.
        flat = target.view(*target.shape[: target.ndim - labels.ndim], labels.numel())
        flat[..., tiles.index] = torch.cat(parts, -1)
    if folds:
        for chunk in chunks:
            _finish_hidden_grad(tiles, chunk, kept[chunk.rows])
    return *outputs, kept


@linear_token_logp.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, stats: int, keep: int, *_: Any
) -> tuple[Tensor, ...]:
    like = hidden.new_empty((1, 1), dtype=result_dtype(hidden, weight))
    outputs = token_logp_outputs(like, hidden.new_empty(labels.shape, dtype=torch.int64), stats)
    if keep == KEEP_NOTHING:
        return *outputs, like.new_empty(0)
    size = torch.library.get_ctx().new_dynamic_size()
    if keep == KEEP_HIDDEN_GRAD:
        return *outputs, like.new_empty(size, hidden.shape[-1])
    return *outputs, like.new_empty(size, dtype=torch.uint8)


def _checked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head_scales: Sequence[float],
    memory_budget: int,
    matmul_dtype: torch.dtype,
    backend: str,
) -> Head:
    """Returns the head, and raises unless tensors and options fit each other."""
    check_logits("hidden", hidden, "feature")
    check_labels(hidden, labels, "hidden", may_be_on_cpu=True)
    check_head(hidden, weight, bias)
    check_kernel(backend, hidden, "hidden")
    if len(head_scales) != 3 or memory_budget < 1 or not matmul_dtype.is_floating_point:
        raise ValueError(
            "head_scales must be 3 numbers, memory_budget at least 1 and matmul_dtype a floating-point dtype, got "
            f"{list(head_scales)}, {memory_budget} and {matmul_dtype}"
        )
    logit_scale, softcap, temperature = head_scales
    return Head(weight, bias, logit_scale, softcap, temperature, matmul_dtype)


@dataclass
class _Chunk:
    """Labelled rows that are scored together, and their results over the tiles so far."""

    rows: slice
    labels: Tensor
    outputs: RowOutputs
    state: Tensor


def _new_state(labels: Tensor) -> Tensor:
    return torch.empty(labels.shape[0], ROW_STATE, dtype=torch.float64, device=labels.device)


def _fold_hidden_grad(
    tiles: TiledRows,
    chunk: _Chunk,
    exp_logits: Tensor,
    tanh: Tensor | None,
    weight_rows: Tensor,
    old_max: Tensor,
    total: Tensor,
    *,
    is_first: bool,
) -> None:
    """Rescales ``total``, the sum of earlier tiles, to the new row maximum, and adds a tile's ``exp_logits @ weight``.

    ``exp_logits`` is 0 for the label. ``_finish_hidden_grad`` adds the label's part as ``1 - p`` to avoid
    cancellation.
    """
    _multiply_by_tanh_slope_(exp_logits, tanh)
    if not is_first:
        scale = torch.exp(old_max - chunk.outputs[1])
        total.mul_(torch.where(old_max == -math.inf, 0.0, scale).unsqueeze(1))
    accumulate(total, tiles.as_input(exp_logits), weight_rows, is_first=is_first)


def _finish_hidden_grad(tiles: TiledRows, chunk: _Chunk, total: Tensor) -> None:
    """Completes d logp / d hidden = slope * ((1 - p_y) * tanh'_y * weight_y - the sum over the other columns)."""
    logp, _, row_sum, _ = chunk.outputs
    head = tiles.head
    label_factor = -torch.expm1(logp)
    if head.softcap:
        tanh = chunk.state[:, -1] / head.outer_scale
        label_factor = label_factor * (1 - tanh.square()).to(label_factor.dtype)
    label_rows = head.weight[chunk.labels.clamp(0, tiles.vocab - 1)].to(total.dtype)
    total.div_(-row_sum.unsqueeze(1)).addcmul_(label_rows, label_factor.unsqueeze(1)).mul_(head.slope)


@torch.library.custom_op("mpo_ext::kept_hidden_grad", mutates_args=())
def kept_hidden_grad(
    hidden: Tensor, labels: Tensor, kept: Tensor, row_weight: Tensor, scale: Tensor | None, ignore_index: int
) -> Tensor:
    """Returns the gradient of ``scale * (row_weight * logp).sum()`` with respect to the hidden states.

    ``kept`` is the d logp / d hidden, ``[n, D]``, that ``linear_token_logp`` returned. Only the shape and dtype of
    ``hidden`` are used. The other arguments are those of ``linear_grad``.
    """
    check_logits("hidden", hidden, "feature")
    check_labels(hidden, labels, "hidden", may_be_on_cpu=True)
    check_rows(labels, kept.dtype, hidden.device, row_weight=row_weight)
    check_scale(scale, hidden)
    index = labelled_rows(labels, ignore_index).to(hidden.device, non_blocking=True)
    if kept.shape != (len(index), hidden.shape[-1]):
        raise ValueError(f"kept must be [n, D] = {(len(index), hidden.shape[-1])}, got {tuple(kept.shape)}")
    factor = row_weight.reshape(-1)[index]
    if scale is not None:
        factor = factor * scale.to(factor.dtype)
    return scatter_rows(kept * factor[:, None], index, hidden)


@kept_hidden_grad.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("mpo_ext::linear_grad", mutates_args=("kept",))
def linear_grad(
    hidden: Tensor,  # this and the next three arguments: linear_token_logp
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,  # [...] from linear_token_logp, as is row_sum
    row_sum: Tensor,
    row_weight: Tensor,  # [...] d loss / d logp
    scale: Tensor | None,  # 0-d factor of the gradients; None: 1
    kept: Tensor | None,  # logits that linear_token_logp kept
    wanted: Sequence[bool],  # whether the gradients of hidden, weight and bias are computed
    ignore_index: int,  # this and the next arguments: LinearOptions
    head_scales: Sequence[float],
    memory_budget: int,
    matmul_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``scale * (row_weight * logp).sum()`` with respect to hidden states, weight and bias.

    The logits of each tile are computed again, or restored from ``kept``, and overwritten with their gradient. Sums
    over tiles are formed in float32 (float64 for float64 inputs) and rounded once. ``kept`` is overwritten; if
    the gradient of weight is wanted, it is written there, and ``kept_weight_grad`` returns it.

    Returns:
        The gradients of hidden, weight and bias, contiguous, each in the shape of its input. A gradient that is not
        wanted, or that lies in ``kept``, is returned as an empty tensor ``[0]``.
    """
    head = _checked_head(hidden, weight, bias, labels, head_scales, memory_budget, matmul_dtype, backend)
    rows = {"row_max": row_max, "row_sum": row_sum, "row_weight": row_weight}
    check_rows(labels, result_dtype(hidden, weight), hidden.device, **rows)
    check_scale(scale, hidden)
    options = {"converts_weight_grad": wanted[1], "keeps_logits": kept is not None}
    tiles = TiledRows(hidden, labels, head, ignore_index, memory_budget, **options)
    if kept is not None and (kept.dtype != torch.uint8 or kept.shape != (tiles.kept_logits.size,)):
        raise ValueError(
            f"kept must be {tiles.kept_logits.size:,} bytes of torch.uint8, got {kept.dtype} of shape "
            f"{tuple(kept.shape)}"
        )
    d_hidden, d_weight, d_bias = _empty_gradients(hidden, weight, bias, (wanted[0], False, wanted[2]))
    if wanted[1]:
        d_weight = fresh_memory(hidden, weight.shape, weight.dtype) if kept is None else kept_weight_grad(kept, weight)
    if tiles.rows.shape[0] == 0:
        for gradient in (d_hidden, d_weight, d_bias):
            gradient.zero_()
    else:
        # All gradients have the slope of the head and the scale of the loss as a factor.
        factor = tiles.like.new_full((), head.slope, dtype=torch.float64)
        if scale is not None:
            factor = factor * scale.to(torch.float64)
        row_values = [values.reshape(-1)[tiles.index] for values in (row_max, row_sum, row_weight)]
        rows_grad = _fill_gradients(tiles, row_values, factor, kept, wanted, (d_weight, d_bias), ignore_index, backend)
        if wanted[0]:
            d_hidden = scatter_rows(rows_grad, tiles.index, hidden)
    return d_hidden, d_weight if kept is None else tiles.like.new_empty(0), d_bias


def _fill_gradients(
    tiles: TiledRows,
    row_values: Sequence[Tensor],
    factor: Tensor,
    kept: Tensor | None,
    wanted: Sequence[bool],
    head_grads: tuple[Tensor, Tensor],
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Writes the gradients of weight and bias, and returns the gradient of the labelled rows of hidden states.

    ``row_values`` are the maximum, the sum and the weight of each labelled row. Unwanted gradients are not written.
    """
    row_max, row_sum, row_weight = row_values
    d_weight, d_bias = head_grads
    rows_grad = tiles.like.new_empty(tiles.rows.shape if wanted[0] else (0,))
    chunks = list(tiles.chunks())
    for first, end in tiles.columns():
        weight_rows = tiles.weight_rows(first, end)
        for number, (rows, labels) in enumerate(chunks):
            place = {"is_first": number == 0, "is_last": number == len(chunks) - 1}
            if kept is None:
                grad, tanh = tiles.logits(rows, weight_rows, first, end)
            else:
                grad, tanh = tiles.restored_logits(kept, rows, first, end)
            write_grad(
                grad, labels, row_max[rows], row_sum[rows], row_weight[rows], factor, ignore_index, backend, grad,
                tile=Tile(first, tiles.vocab, None),
            )  # fmt: skip
            _multiply_by_tanh_slope_(grad, tanh)
            if wanted[2] and tiles.head.bias is not None:
                tiles.add_bias_grad(d_bias[first:end], grad, **place)
            grad = tiles.as_input(grad)
            if wanted[0]:
                accumulate(rows_grad[rows], grad, weight_rows, is_first=first == 0)
            if wanted[1]:
                tiles.add_weight_grad(d_weight[first:end], grad, rows, **place)
    return rows_grad


@linear_grad.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_weight: Tensor,
    scale: Tensor | None,
    kept: Tensor | None,
    wanted: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    return _empty_gradients(hidden, weight, bias, (wanted[0], wanted[1] and kept is None, wanted[2]))


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result_dtype(hidden, weight)
    d_hidden, d_weight, d_bias = (
        tensor.new_empty(tensor.shape) if is_wanted and tensor is not None else hidden.new_empty(0, dtype=dtype)
        for tensor, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
    )
    return d_hidden, d_weight, d_bias


def kept_weight_grad(kept: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient of weight, ``[V, D]``, as a view of the memory of ``kept`` after ``linear_grad``."""
    size = weight.numel() * weight.dtype.itemsize
    return kept.as_strided((size,), (1,)).view(weight.dtype).view(weight.shape)  # torch.compile cannot trace a slice


def _multiply_by_tanh_slope_(grad: Tensor, tanh: Tensor | None) -> None:
    """Turns the gradient with respect to ``tanh(x)`` into the gradient with respect to ``x``; overwrites ``tanh``."""
    if tanh is not None:
        grad.addcmul_(grad, tanh.square_(), value=-1)
