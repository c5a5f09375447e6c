"""The operators on hidden states. They compute logits of labelled rows only, in tiles (``tiles.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpo_ext.ops.checks import STATS, check_head, check_kernel, check_labels, check_logits, check_rows, check_scale
from mpo_ext.ops.cuda import check_not_capturing
from mpo_ext.ops.exp_logits import write_exp_logits
from mpo_ext.ops.logits import RowOutputs, score, token_logp_outputs, write_grad
from mpo_ext.ops.matmul import accumulate
from mpo_ext.ops.memory import ROW_STATE, Tile, VocabShard, empty_row_state, result_dtype
from mpo_ext.ops.tiles import Head, TiledRows, head_grad_memory, labelled_rows, scatter_rows

#: Tensors that ``linear_token_logp`` keeps for backward: none, the unscaled gradient of hidden states, or the logits.
KEEP_NOTHING, KEEP_HIDDEN_GRAD, KEEP_LOGITS = 0, 1, 2


class LinearOptions(NamedTuple):
    """The last arguments of ``linear_token_logp`` and of ``linear_grad``. Both functions take them in this order."""

    ignore_index: int  # label of rows that are not projected and give 0
    head_scales: list[float]  # logit_scale, softcap (0 for none) and temperature of Head
    memory_budget: int  # bytes for a tile and the tensors computed from it
    matmul_dtype: torch.dtype  # dtype of the inputs of matrix products, a result of matmul.matmul_dtype
    backend: str  # a result of choose_backend other than "reference"
    only_fitting: bool = False  # whether to keep only the logits that fit into the memory of the gradient of weight


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
    only_fitting: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the log-probability of each label, computed from hidden states. Only labelled tokens get logits.

    The arguments after ``keep`` are the fields of ``LinearOptions``.

    Returns:
        ``(logp, row_max, row_sum, row_stats, kept)``. The first four are the outputs of ``logits.token_logp``, on the
        device of ``hidden``. ``keep`` determines ``kept``. KEEP_NOTHING: an empty tensor. KEEP_HIDDEN_GRAD: d logp /
        d hidden of the n labelled rows, ``[n, D]``. KEEP_LOGITS: the bytes of the logits, uint8; see ``KeptLogits``.
    """
    _check_hidden(hidden, weight, bias, labels, head_scales, memory_budget, matmul_dtype, backend)
    if not 0 <= stats < 1 << len(STATS) or keep not in (KEEP_NOTHING, KEEP_HIDDEN_GRAD, KEEP_LOGITS):
        raise ValueError(f"stats must be below {1 << len(STATS)}, and keep 0, 1 or 2, got {stats} and {keep}")
    options = LinearOptions(ignore_index, list(head_scales), memory_budget, matmul_dtype, backend, only_fitting)
    tiles = _tiled_rows(hidden, weight, bias, labels, keep, options)
    device_labels = tiles.like.new_empty(labels.shape, dtype=torch.int64)  # only their shape and device are used
    outputs = token_logp_outputs(tiles.like, device_labels, stats)
    for output in outputs:
        output.zero_()
    chunks, kept = _score_tiles(tiles, stats, keep, options)
    for target, *parts in zip(outputs, *(chunk.outputs for chunk in chunks), strict=True) if chunks else ():
        # Merging the axes of the labels makes the rows the last axis of each output.
        flat = target.view(*target.shape[: target.ndim - labels.ndim], labels.numel())
        flat[..., tiles.index] = torch.cat(parts, -1)
    if keep == KEEP_HIDDEN_GRAD:
        for chunk in chunks:
            logp, _, row_sum, _ = chunk.outputs
            _finish_hidden_grad(tiles.head, chunk.labels, logp, row_sum, chunk.state[:, -1], kept[chunk.rows])
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


def _check_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head_scales: Sequence[float],
    memory_budget: int,
    matmul_dtype: torch.dtype,
    backend: str,
) -> None:
    """Raises if an argument is invalid, or if the arguments do not fit each other; see ``linear_token_logp``."""
    check_logits("hidden", hidden, "feature")
    check_labels(hidden, labels, "hidden", may_be_on_cpu=True)
    check_head(hidden, weight, bias)
    check_kernel(backend, hidden, "hidden")
    if len(head_scales) != 3 or memory_budget < 1 or not matmul_dtype.is_floating_point:
        raise ValueError(
            "head_scales must be 3 numbers, memory_budget at least 1 and matmul_dtype a floating-point dtype, got "
            f"{list(head_scales)}, {memory_budget} and {matmul_dtype}"
        )


def linear_token_logp_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    stats: int,
    keep: int,
    options: LinearOptions,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Returns ``(state, kept)``: each token's softmax state over a shard of the vocabulary, and a tensor for backward.

    ``weight`` and ``bias`` are this rank's shard of the head. Labels are ids of the whole vocabulary. The other
    arguments are those of ``linear_token_logp``. ``logits.merge_shards`` merges the states of all shards. With
    KEEP_HIDDEN_GRAD, ``finish_shard_hidden_grad`` must complete ``kept``.
    """
    tiles = _tiled_rows(hidden, weight, bias, labels, keep, options)
    chunks, kept = _score_tiles(tiles, stats, keep, options, shard)
    state = empty_row_state(tiles.like.new_empty(labels.shape, dtype=torch.int64))
    if chunks:
        state.view(-1, ROW_STATE)[tiles.index] = torch.cat([chunk.state for chunk in chunks])
    return state, kept


def _head(weight: Tensor, bias: Tensor | None, head_scales: Sequence[float], matmul_dtype: torch.dtype) -> Head:
    logit_scale, softcap, temperature = head_scales
    return Head(weight, bias, logit_scale, softcap, temperature, matmul_dtype)


def _tiled_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, keep: int, options: LinearOptions
) -> TiledRows:
    head = _head(weight, bias, options.head_scales, options.matmul_dtype)
    keeps = {"keeps_logits": keep == KEEP_LOGITS, "only_fitting": options.only_fitting}
    return TiledRows(hidden, labels, head, options.ignore_index, options.memory_budget, **keeps)


@dataclass
class _Chunk:
    """Labelled tokens that are scored together, and their results from the tiles computed so far."""

    rows: slice  # of the n labelled rows
    labels: Tensor  # of these rows
    outputs: RowOutputs  # as logits.token_logp returns them
    state: Tensor  # [rows, ROW_STATE]
    reference: Tensor | None = None  # [rows], the result of write_exp_logits


def _score_tiles(
    tiles: TiledRows, stats: int, keep: int, options: LinearOptions, shard: VocabShard | None = None
) -> tuple[list[_Chunk], Tensor]:
    """Computes the log-probs of the labelled tokens, tile by tile.

    Returns:
        (chunks, kept): a ``_Chunk`` for each group of tokens, and a tensor for backward. With KEEP_HIDDEN_GRAD,
        ``_finish_hidden_grad`` must complete ``kept``.
    """
    shard = shard or VocabShard(0, tiles.vocab)
    if keep == KEEP_LOGITS:
        kept = head_grad_memory(tiles.like, (tiles.kept_logits.size,), torch.uint8)
    else:
        kept = tiles.like.new_empty(tiles.rows.shape if keep == KEEP_HIDDEN_GRAD else (0,))
    if tiles.rows.shape[0] == 0:
        return [], kept
    chunks = [
        _Chunk(rows, labels, token_logp_outputs(tiles.like, labels, stats), empty_row_state(labels))
        for rows, labels in tiles.chunks()
    ]
    folds = keep == KEEP_HIDDEN_GRAD
    for first, end in tiles.columns():
        weight_rows = tiles.weight_rows(first, end)
        tile = Tile(shard.first + first, shard.total, None)
        is_kept = keep == KEEP_LOGITS and first < tiles.kept_logits.stop
        in_place = is_kept and tiles.keeps_in_place
        for chunk in chunks:
            out = tiles.kept_logits.tile(kept, chunk.rows, first, end) if in_place else None
            logits, tanh = tiles.logits(chunk.rows, weight_rows, first, end, out)
            in_kernel = folds and options.backend == "cpu"
            old_max = chunk.outputs[1].clone() if in_kernel else None
            score(
                logits, chunk.labels, options.ignore_index, stats, options.backend, chunk.outputs,
                tile._replace(state=chunk.state), exp_logits=logits if in_kernel else None,
            )  # fmt: skip
            if is_kept and not in_place:
                tiles.kept_logits.store_(kept, chunk.rows, first, end, logits, chunk.outputs[1])
            if not folds:
                continue
            total = kept[chunk.rows]
            if old_max is not None:
                exp_logits = logits
                _rescale_(total, old_max, chunk.outputs[1], is_first=first == 0)
            else:
                exp_logits = tiles.grad_target(logits, is_input=tanh is None)
                chunk.reference = write_exp_logits(
                    logits, chunk.labels, chunk.outputs[1], chunk.reference, total, options.backend, exp_logits, tile,
                    is_last=end == tiles.vocab,
                )  # fmt: skip
            # exp_logits is 0 for the label; _finish_hidden_grad adds the label's part as 1 - p to avoid cancellation.
            _multiply_by_tanh_slope_(exp_logits, tanh)
            accumulate(total, tiles.as_input(exp_logits), weight_rows, is_first=first == 0)
    return chunks, kept


def _rescale_(total: Tensor, old_max: Tensor, row_max: Tensor, *, is_first: bool) -> None:
    """Multiplies the rows of ``total`` by ``exp(old_max - row_max)``, in place. If ``is_first``, does nothing."""
    if not is_first:
        total.mul_(torch.where(old_max == -math.inf, 0.0, torch.exp(old_max - row_max)).unsqueeze(1))


def _finish_hidden_grad(
    head: Head, columns: Tensor, logp: Tensor, row_sum: Tensor, z_label: Tensor, total: Tensor
) -> None:
    """Completes ``total`` in place: it then holds the gradient d logp / d hidden.

    Let y be the label, p_y its probability, and t_v the derivative of the softcap's tanh (1 without a softcap). Before
    the call, ``total`` holds S, the sum of ``exp(z_v - row_max) * t_v * weight_v`` over all columns v except y.
    Afterwards, ``total`` holds ``head.slope * ((1 - p_y) * t_y * weight_y - S / row_sum)``. ``columns`` holds y as an
    index of ``head.weight``. If the index is out of range, y lies in another shard, and the term of y is 0.
    """
    label_factor = -torch.expm1(logp)
    if head.softcap:
        tanh = z_label / head.outer_scale
        label_factor = label_factor * (1 - tanh.square()).to(label_factor.dtype)
    size = head.weight.shape[0]
    has_label = (columns >= 0) & (columns < size)
    label_factor = torch.where(has_label | logp.isnan(), label_factor, 0.0)  # NaN: the label is out of range
    label_rows = head.weight[columns.clamp(0, size - 1)]
    total.mul_(-head.slope / row_sum.unsqueeze(1)).addcmul_(label_rows, head.slope * label_factor.unsqueeze(1))


def finish_shard_hidden_grad(
    kept: Tensor,
    weight: Tensor,
    labels: Tensor,
    state: Tensor,
    outputs: RowOutputs,
    options: LinearOptions,
    shard: VocabShard,
) -> None:
    """Completes ``kept`` in place: it then holds this shard's part of d logp / d hidden, ``[n, D]``.

    ``kept`` and ``state`` are the results of ``linear_token_logp_shard``. ``outputs`` is the result of
    ``merge_shards``.
    """
    index = labelled_rows(labels, options.ignore_index)
    columns = labels.reshape(-1)[index].to(kept.device) - shard.first
    index = index.to(kept.device)
    logp, row_max, row_sum = (values.reshape(-1)[index] for values in outputs[:3])
    shard_max, z_label = (state.view(-1, ROW_STATE)[index][:, part] for part in (0, -1))
    scale = torch.where(shard_max == -math.inf, 0.0, torch.exp(shard_max - row_max)).to(kept.dtype)
    kept.mul_(scale.unsqueeze(1))
    _finish_hidden_grad(
        _head(weight, None, options.head_scales, options.matmul_dtype), columns, logp, row_sum, z_label, kept
    )


@torch.library.custom_op("mpo_ext::kept_hidden_grad", mutates_args=())
def kept_hidden_grad(
    hidden: Tensor, labels: Tensor, kept: Tensor, row_weight: Tensor, scale: Tensor | None, ignore_index: int
) -> Tensor:
    """Returns the gradient of ``scale * (row_weight * logp).sum()`` with respect to ``hidden``.

    ``kept`` is an output of ``linear_token_logp``: d logp / d hidden, ``[n, D]``. The values of ``hidden`` are not
    read. The other arguments are those of ``linear_grad``.
    """
    check_logits("hidden", hidden, "feature")
    check_labels(hidden, labels, "hidden", may_be_on_cpu=True)
    check_rows(labels, kept.dtype, hidden.device, row_weight=row_weight)
    check_scale(scale, hidden)
    index, rows = kept_hidden_rows(hidden, labels, kept, row_weight, scale, ignore_index, hidden.dtype)
    return scatter_rows(rows, index, hidden)


@kept_hidden_grad.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def kept_hidden_rows(
    hidden: Tensor,
    labels: Tensor,
    kept: Tensor,
    row_weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the flat indices of the n labelled rows, and the gradient ``[n, D]`` of their hidden states.

    ``dtype`` is the dtype of the gradient. None: the dtype of ``kept``. ``kept_hidden_grad`` describes the gradient
    and the other arguments.
    """
    check_not_capturing(hidden)
    index = labelled_rows(labels, ignore_index).to(hidden.device, non_blocking=True)
    if kept.shape != (len(index), hidden.shape[-1]):
        raise ValueError(f"kept must be [n, D] = {(len(index), hidden.shape[-1])}, got {tuple(kept.shape)}")
    factor = row_weight.reshape(-1)[index]
    if scale is not None:
        factor = factor * scale.to(factor.dtype)
    return index, torch.mul(kept, factor[:, None], out=kept.new_empty(kept.shape, dtype=dtype))


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
    only_fitting: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``scale * (row_weight * logp).sum()`` with respect to hidden states, weight and bias.

    The arguments after ``wanted`` are the fields of ``LinearOptions``. If ``kept`` is not None, the call overwrites
    ``kept``. If the gradient of ``weight`` is also wanted, ``kept`` then holds this gradient, and ``kept_weight_grad``
    returns it. Sums over tiles are float32 (float64 for float64 inputs), and are rounded once.

    Returns:
        The gradients of hidden, weight and bias, contiguous, each in the shape of its input. An empty tensor ``[0]``
        stands for a gradient that is not wanted, and for a gradient in ``kept``.
    """
    _check_hidden(hidden, weight, bias, labels, head_scales, memory_budget, matmul_dtype, backend)
    rows = {"row_max": row_max, "row_sum": row_sum, "row_weight": row_weight}
    check_rows(labels, result_dtype(hidden, weight), hidden.device, **rows)
    check_scale(scale, hidden)
    options = LinearOptions(ignore_index, list(head_scales), memory_budget, matmul_dtype, backend, only_fitting)
    index, rows_grad, d_weight, d_bias = linear_grad_rows(
        hidden, weight, bias, labels, (row_max, row_sum, row_weight), scale, kept, wanted, options
    )
    d_hidden = scatter_rows(rows_grad, index, hidden) if wanted[0] else rows_grad
    return d_hidden, d_weight if kept is None else rows_grad.new_empty(0), d_bias


def linear_grad_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_values: Sequence[Tensor],
    scale: Tensor | None,
    kept: Tensor | None,
    wanted: Sequence[bool],
    options: LinearOptions,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like ``linear_grad``, but the gradient of the hidden states has only the n labelled rows.

    The arguments are those of ``linear_grad``. ``row_values`` are row_max, row_sum and row_weight. With ``shard``,
    weight and bias are a rank's shard. The caller must then sum the gradient of the hidden states over the ranks.

    Returns:
        The flat indices of the n labelled rows, the unrounded gradient of their hidden states ``[n, D]``, and the
        gradients of weight and bias.
    """
    head = _head(weight, bias, options.head_scales, options.matmul_dtype)
    keeps = {"keeps_logits": kept is not None, "only_fitting": options.only_fitting}
    keeps["converts_weight_grad"] = wanted[1]
    tiles = TiledRows(hidden, labels, head, options.ignore_index, options.memory_budget, **keeps)
    if kept is not None and (kept.dtype != torch.uint8 or kept.shape != (tiles.kept_logits.size,)):
        raise ValueError(
            f"kept must be {tiles.kept_logits.size:,} bytes of torch.uint8, got {kept.dtype} of shape "
            f"{tuple(kept.shape)}"
        )
    _, d_weight, d_bias = _empty_gradients(hidden, weight, bias, (False, False, wanted[2]))
    if wanted[1]:
        d_weight = (
            head_grad_memory(hidden, weight.shape, weight.dtype) if kept is None else kept_weight_grad(kept, weight)
        )
    if tiles.rows.shape[0] == 0:
        for gradient in (d_weight, d_bias):
            gradient.zero_()
        return tiles.index, tiles.like.new_empty(tiles.rows.shape if wanted[0] else (0,)), d_weight, d_bias
    # All gradients have the slope of the head and the scale of the loss as a factor.
    factor = tiles.like.new_full((), head.slope, dtype=torch.float64)
    if scale is not None:
        factor = factor * scale.to(torch.float64)
    values = [numbers.reshape(-1)[tiles.index] for numbers in row_values]
    shard = shard or VocabShard(0, tiles.vocab)
    rows_grad = _fill_gradients(tiles, values, factor, kept, wanted, (d_weight, d_bias), options, shard)
    return tiles.index, rows_grad, d_weight, d_bias


def _fill_gradients(
    tiles: TiledRows,
    row_values: Sequence[Tensor],
    factor: Tensor,
    kept: Tensor | None,
    wanted: Sequence[bool],
    head_grads: tuple[Tensor, Tensor],
    options: LinearOptions,
    shard: VocabShard,
) -> Tensor:
    """Writes the gradients of weight and bias to ``head_grads``. Returns the gradient of hidden states, ``[n, D]``.

    ``row_values`` are row_max, row_sum and row_weight of the n labelled rows. ``factor``, a 0-d tensor, multiplies
    each gradient. ``wanted`` holds three bools: whether to compute the gradients of hidden states, weight and bias.
    Without a gradient of hidden states, the result is empty.
    """
    row_max, row_sum, row_weight = row_values
    d_weight, d_bias = head_grads
    rows_grad = tiles.like.new_empty(tiles.rows.shape if wanted[0] else (0,))
    chunks = list(tiles.chunks())
    for first, end in tiles.columns():
        weight_rows = tiles.weight_rows(first, end)
        for number, (rows, labels) in enumerate(chunks):
            place = {"is_first": number == 0, "is_last": number == len(chunks) - 1}
            maxima = row_max[rows]
            if kept is None or first >= tiles.kept_logits.stop:
                logits, tanh = tiles.logits(rows, weight_rows, first, end)
            elif tiles.reads_kept:
                logits, tanh = tiles.kept_logits.tile(kept, rows, first, end), None
                maxima = maxima - tiles.kept_logits.tile_max(kept, rows, first).squeeze(1)
            else:
                logits, tanh = tiles.restored_logits(kept, rows, first, end)
            # The slope of tanh and the gradient of bias are computed from the gradient before it is rounded.
            grad = tiles.grad_target(logits, is_input=tanh is None and not wanted[2])
            write_grad(
                logits, labels, maxima, row_sum[rows], row_weight[rows], factor, options.ignore_index,
                options.backend, grad, tile=Tile(shard.first + first, shard.total, None),
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
    """Returns a view of ``kept``: the gradient of ``weight``, ``[V, D]``, which ``linear_grad`` has written there."""
    size = weight.numel() * weight.dtype.itemsize
    return kept.as_strided((size,), (1,)).view(weight.dtype).view(weight.shape)  # torch.compile cannot trace a slice


def _multiply_by_tanh_slope_(grad: Tensor, tanh: Tensor | None) -> None:
    """Multiplies ``grad`` in place by the derivative of tanh, ``1 - tanh**2``.

    ``tanh`` holds the values of tanh and is overwritten. If ``tanh`` is None (no softcap), ``grad`` does not change.
    """
    if tanh is not None:
        grad.addcmul_(grad, tanh.square_(), value=-1)
