"""Triton version of exp_logits: the exponentials of a tile of logits, for the gradient of hidden states."""

import triton
import triton.language as tl
from torch import Tensor

from .rows import VECTOR_BYTES, aligned_rows, blocks, row_offset

_STRIDES = ["misalignment", "inner", "outer_stride", "row_stride"]
_INTEGERS = ["vocab", "first", "hidden_size", *_STRIDES, "out_misalignment"]


@triton.jit
def rescale_part(sums_ptr, scale, size, BLOCK: tl.constexpr):
    """Multiplies a row of ``size`` sums by ``scale``. Each program multiplies a part of the row."""
    stop = size * (tl.program_id(1) + 1) // tl.num_programs(1)
    for at in range(size * tl.program_id(1) // tl.num_programs(1), stop, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        sums = tl.load(sums_ptr + columns, mask=columns < stop)
        tl.store(sums_ptr + columns, sums * scale, mask=columns < stop)


@triton.jit(do_not_specialize=_INTEGERS)
def exp_logits_kernel(
    logits_ptr,  # float32, 16-byte aligned; rows.py describes the rows
    labels_ptr,  # [rows] int64
    row_max_ptr,  # [rows] float32, over this tile and all earlier ones
    reference_ptr,  # [rows] float32, of the earlier tiles; unused if IS_FIRST
    new_reference_ptr,  # [rows] float32, out
    sums_ptr,  # [rows, hidden_size] float32, in and out; unused if IS_FIRST
    out_ptr,  # [rows, vocab] contiguous, 16-byte aligned; may be the logits
    slack: tl.float32,
    hidden_size: tl.int64,
    vocab: tl.int32,
    first: tl.int64,  # the vocabulary entry of column 0
    misalignment: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    out_misalignment: tl.int64,
    VECTOR: tl.constexpr,  # elements of the output in 16 bytes
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_ALIKE: tl.constexpr,  # whether rows of the output and of the logits have the same misalignment
    IS_FIRST: tl.constexpr,  # whether this is the first tile of the rows
):
    """Writes exp(z - reference) for each logit z in CHUNK columns of a row, and 0 for the label.

    Each row has a reference. If the row's largest logit so far exceeds the reference by more than ``slack``, this
    logit becomes the new reference. The sums of the row are then multiplied by exp(old reference - new reference).
    Each program of the row multiplies a part of the sums.

    Grid    (rows, chunks)
    Reads   each logit once
    Writes  each element once, in 16-byte vectors except near the ends of the row
    """
    row = tl.program_id(0)
    row_max = tl.load(row_max_ptr + row)
    old = tl.minimum(row_max, -float("inf"))
    if not IS_FIRST:
        old = tl.load(reference_ptr + row)
    is_raised = row_max - old > slack  # false if both are -inf
    reference = tl.where(is_raised, row_max, old)
    if tl.program_id(1) == 0:
        tl.store(new_reference_ptr + row, reference)
    safe_reference = tl.where(reference == -float("inf"), 0.0, reference)

    out_start = out_misalignment + row.to(tl.int64) * vocab
    shift = (out_start % VECTOR).to(tl.int32)  # positions are aligned like the output
    out_row_ptr = out_ptr + tl.multiple_of(out_start - shift, VECTOR)
    start = row_offset(row, misalignment, inner, outer_stride, row_stride)
    if IS_ALIKE:
        row_ptr = logits_ptr + tl.multiple_of(start - shift, VECTOR)
    else:
        row_ptr = logits_ptr + (start - shift)
    end = vocab + shift
    begin = tl.program_id(1) * CHUNK
    label_at = tl.load(labels_ptr + row) - first + shift  # outside of all columns if the label is in another tile
    for at in range(begin, tl.minimum(begin + CHUNK, end), BLOCK):
        at = tl.multiple_of(at, BLOCK)
        positions = at + tl.arange(0, BLOCK)
        is_whole = (at >= shift) & (at + BLOCK <= end)
        if is_whole:
            z = tl.load(row_ptr + positions)
        else:
            mask = (positions >= shift) & (positions < end)
            z = tl.load(row_ptr + positions, mask=mask, other=-float("inf"))
        e = tl.exp(z - safe_reference)
        if (label_at >= at) & (label_at < at + BLOCK):
            e = tl.where(positions == label_at, 0.0, e)
        e = e.to(out_ptr.dtype.element_ty)
        if is_whole:
            tl.store(out_row_ptr + positions, e)
        else:
            tl.store(out_row_ptr + positions, e, mask=(positions >= shift) & (positions < end))

    if not IS_FIRST:
        if is_raised:
            scale = tl.where(old == -float("inf"), 0.0, tl.exp(old - reference))
            rescale_part(sums_ptr + row.to(tl.int64) * hidden_size, scale, hidden_size, BLOCK)


def exp_logits(
    layout: tuple[Tensor, int, int, int],
    labels: Tensor,
    first: int,
    row_max: Tensor,
    reference: Tensor | None,
    new_reference: Tensor,
    slack: float,
    sums: Tensor,
    out: Tensor,
) -> None:
    """Runs ``exp_logits_kernel`` in one launch. ``mpo_ext.ops.exp_logits.write_exp_logits`` calls this function.

    ``layout`` is the ``RowLayout`` of the logits (see ``mpo_ext.ops.memory``). Each row has a reference, which is
    subtracted from the logits before exp. The exponentials are written to ``out``, and the new references to
    ``new_reference``. If the reference of a row rises, the row of ``sums`` is rescaled in place. ``out`` and ``sums``
    are contiguous.
    """
    vocab = out.shape[-1]
    rows, target = aligned_rows(layout), aligned_rows((out, labels.numel(), 0, vocab))
    sizes = blocks(vocab, layout[0].dtype)
    vector = VECTOR_BYTES // out.dtype.itemsize
    is_alike = rows.inner >= labels.numel() and all(
        (ours - theirs) % vector == 0
        for ours, theirs in ((rows.misalignment, target.misalignment), (rows.row_stride, vocab))
    )
    exp_logits_kernel[(labels.numel(), sizes.programs(vocab, out.dtype))](
        rows.base,
        labels,
        row_max,
        row_max if reference is None else reference,
        new_reference,
        sums,
        target.base,
        slack,
        sums.shape[-1],
        vocab,
        first,
        *rows[1:],
        target.misalignment,
        VECTOR=vector,
        BLOCK=sizes.block,
        CHUNK=sizes.chunk,
        IS_ALIKE=is_alike,
        IS_FIRST=reference is None,
        num_warps=sizes.num_warps,
    )
