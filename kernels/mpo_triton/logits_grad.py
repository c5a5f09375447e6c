"""Triton version of logits_grad. Reads each logit of a labelled row once; writes each element of the gradient once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import VECTOR_BYTES, aligned_rows, blocks, row_offset

_STRIDES = ["misalignment", "inner", "outer_stride", "row_stride"]
_INTEGERS = ["vocab", "first", "total", *_STRIDES, *(f"grad_{name}" for name in _STRIDES), "ignore_index"]


@triton.jit
def fill_columns(row_ptr, filler, begin, shift, end, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Writes ``filler`` to the columns of a row that lie in one chunk.

    The chunk begins at position ``begin``. The columns of the row have the positions ``shift`` to ``end - 1``, as
    ``rows.py`` explains.
    """
    for at in range(begin, tl.minimum(begin + CHUNK, end), BLOCK):
        at = tl.multiple_of(at, BLOCK)
        positions = at + tl.arange(0, BLOCK)
        if (at >= shift) & (at + BLOCK <= end):
            tl.store(row_ptr + positions, filler)
        else:
            tl.store(row_ptr + positions, filler, mask=(positions >= shift) & (positions < end))


@triton.jit
def grad_of_label(z_label, row_max, row_sum, weight):
    """Returns weight * (1 - p), where p is the probability of the label.

    The result is computed in float64, because 1 - p is inaccurate in float32 if p is near 1.
    """
    logp = (z_label.to(tl.float64) - row_max.to(tl.float64)) - tl.log(row_sum.to(tl.float64))
    return (weight.to(tl.float64) * (1.0 - tl.exp(logp))).to(tl.float32)


@triton.jit(do_not_specialize=_INTEGERS)
def logits_grad_kernel(
    logits_ptr,  # 16-byte aligned; rows.py describes the rows
    labels_ptr,  # [rows] int64
    row_max_ptr,  # [rows] float32
    row_sum_ptr,  # [rows] float32
    weight_ptr,  # [rows] float32, d loss / d logp
    scale_ptr,  # [1] float32, factor on the whole gradient
    grad_ptr,  # out, shape of the logits; may be the logits, or have fewer bits per element
    vocab: tl.int32,
    first: tl.int64,  # the vocabulary entry of column 0
    total: tl.int64,  # size of the vocabulary
    misalignment: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    grad_misalignment: tl.int64,
    grad_inner: tl.int64,
    grad_outer_stride: tl.int64,
    grad_row_stride: tl.int64,
    ignore_index: tl.int64,
    VECTOR: tl.constexpr,  # elements of the gradient in 16 bytes
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_ALIKE: tl.constexpr,  # whether rows of the gradient and of the logits have the same misalignment
):
    """Computes grad[i, v] = scale * weight[i] * (1[v == y_i] - exp(z[i, v] - m_i) / sum_i) for CHUNK columns of a row.

    Row i has the label y_i, the maximum m_i and the sum of exponentials sum_i.

    Grid    (rows, chunks)
    Reads   each logit of a labelled row once
    Writes  each element once, in 16-byte vectors except near the ends of the row; zeros in rows without a label, NaN
            in rows whose label is out of range
    """
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    is_ignored = label == ignore_index
    grad_start = row_offset(row, grad_misalignment, grad_inner, grad_outer_stride, grad_row_stride)
    shift = (grad_start % VECTOR).to(tl.int32)  # positions are aligned like the gradient
    grad_row_ptr = grad_ptr + tl.multiple_of(grad_start - shift, VECTOR)
    start = row_offset(row, misalignment, inner, outer_stride, row_stride)
    if IS_ALIKE:
        row_ptr = logits_ptr + tl.multiple_of(start - shift, VECTOR)
    else:
        row_ptr = logits_ptr + (start - shift)
    end = vocab + shift
    begin = tl.program_id(1) * CHUNK
    lanes = tl.arange(0, BLOCK)

    if is_ignored | (label < 0) | (label >= total):
        filler = tl.full((BLOCK,), 0.0, tl.float32) + tl.where(is_ignored, 0.0, float("nan"))
        fill_columns(grad_row_ptr, filler.to(grad_ptr.dtype.element_ty), begin, shift, end, BLOCK, CHUNK)
        return

    row_max = tl.load(row_max_ptr + row)
    row_sum = tl.load(row_sum_ptr + row)
    weight = tl.load(weight_ptr + row) * tl.load(scale_ptr)
    factor = -weight / row_sum
    label_at = label - first + shift  # outside of all columns if the label is in another tile
    label_grad = 0.0
    if (label_at >= tl.maximum(begin, shift)) & (label_at < tl.minimum(begin + CHUNK, end)):
        label_grad = grad_of_label(tl.load(row_ptr + label_at), row_max, row_sum, weight)
        tl.debug_barrier()  # all warps have read the label's logit before one of them may overwrite it
    for at in range(begin, tl.minimum(begin + CHUNK, end), BLOCK):
        at = tl.multiple_of(at, BLOCK)
        positions = at + lanes
        is_whole = (at >= shift) & (at + BLOCK <= end)
        if is_whole:
            z = tl.load(row_ptr + positions).to(tl.float32)
        else:
            mask = (positions >= shift) & (positions < end)
            z = tl.load(row_ptr + positions, mask=mask, other=-float("inf")).to(tl.float32)
        grad = tl.exp(z - row_max) * factor
        if (label_at >= at) & (label_at < at + BLOCK):
            grad = tl.where(positions == label_at, label_grad, grad)
        grad = grad.to(grad_ptr.dtype.element_ty)
        if is_whole:
            tl.store(grad_row_ptr + positions, grad)
        else:
            tl.store(grad_row_ptr + positions, grad, mask=(positions >= shift) & (positions < end))


def logits_grad(
    layout: tuple[Tensor, int, int, int],
    labels: Tensor,
    vocab: int,
    ignore_index: int,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    grad_layout: tuple[Tensor, int, int, int],
    tile: tuple[int, int, Tensor] | None = None,
) -> None:
    """Writes the result of the operator ``logits_grad`` in one launch.

    ``layout`` is the ``RowLayout`` of the logits, and ``grad_layout`` is the ``RowLayout`` of the result. If the
    logits cover only a part of the vocabulary, ``tile`` describes this part. ``mpo_ext.ops.memory`` explains
    ``RowLayout`` and ``Tile``.
    """
    first, total, _ = tile or (0, vocab, None)
    rows, grad = aligned_rows(layout), aligned_rows(grad_layout)
    grad_dtype = grad_layout[0].dtype  # its elements are not larger than those of the logits
    sizes = blocks(vocab, layout[0].dtype)
    vector = VECTOR_BYTES // grad_dtype.itemsize
    is_alike = rows.inner == grad.inner and all(
        (ours - theirs) % vector == 0 for ours, theirs in zip(rows[1:], grad[1:], strict=True)
    )
    logits_grad_kernel[(labels.numel(), sizes.programs(vocab, grad_dtype))](
        rows.base,
        labels,
        row_max,
        row_sum,
        weight,
        torch.ones_like(row_max.view(-1)[:1]) if scale is None else scale.float(),
        grad.base,
        vocab,
        first,
        total,
        *rows[1:],
        *grad[1:],
        ignore_index,
        VECTOR=vector,
        BLOCK=sizes.block,
        CHUNK=sizes.chunk,
        IS_ALIKE=is_alike,
        num_warps=sizes.num_warps,
    )
