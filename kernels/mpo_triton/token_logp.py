"""Triton version of token_logp: the log-probability of each label. Reads each logit of a labelled row once."""

import triton
import triton.language as tl
from torch import Tensor

from .rows import VECTOR_BYTES, aligned_rows, blocks, row_offset

_INTEGERS = ["vocab", "total", "misalignment", "inner", "outer_stride", "row_stride", "ignore_index"]
_ROW_STATE = 6  # number of doubles in a RowState (csrc/mpo/math.h), the sums over the tiles so far
_STATE = 2  # number of floats in the state of a chunk: maximum, sum of exponentials
_STATE_WITH_STATS = 5  # with statistics also sum of e * (z - max), sum of z, sum of e * e


@triton.jit
def vector_sums(values, VECTOR: tl.constexpr):
    """Returns the sum of each group of VECTOR consecutive values."""
    return tl.sum(tl.reshape(values, (values.shape[0] // VECTOR, VECTOR)), axis=1)


@triton.jit(do_not_specialize=_INTEGERS)
def token_logp_chunk_kernel(
    logits_ptr,  # 16-byte aligned; rows.py describes the rows
    labels_ptr,  # [rows] int64
    states_ptr,  # [rows, chunks, STATE] float32, out; only rows with a valid label
    vocab: tl.int32,
    total: tl.int64,  # size of the vocabulary
    misalignment: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    ignore_index: tl.int64,
    VECTOR: tl.constexpr,  # elements in 16 bytes
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STATE: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    """Computes the softmax state of CHUNK columns of a row.

    Grid    (rows, chunks); the second axis of a grid is limited to 65,535
    Reads   each logit of a row with a valid label once, in 16-byte vectors except near the ends of the row
    Writes  STATE float32 values per chunk, which ``merge_chunks`` describes
    """
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    if (label == ignore_index) | (label < 0) | (label >= total):
        return
    start = row_offset(row, misalignment, inner, outer_stride, row_stride)
    shift = (start % VECTOR).to(tl.int32)
    row_ptr = logits_ptr + tl.multiple_of(start - shift, VECTOR)
    end = vocab + shift
    begin = tl.program_id(1) * CHUNK

    lanes = tl.arange(0, BLOCK)
    running_max = -float("inf")
    # A sum per vector: a sum per lane would take as many registers as the logits, and a single sum would be a
    # reduction over all warps in each block.
    e_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    e_d = tl.zeros((BLOCK // VECTOR,), tl.float32)
    z_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    squared = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for at in range(begin, tl.minimum(begin + CHUNK, end), BLOCK):
        at = tl.multiple_of(at, BLOCK)
        positions = at + lanes
        if (at >= shift) & (at + BLOCK <= end):
            z = tl.load(row_ptr + positions).to(tl.float32)
            z_or_zero = z
        else:
            mask = (positions >= shift) & (positions < end)
            z = tl.load(row_ptr + positions, mask=mask, other=-float("inf")).to(tl.float32)
            z_or_zero = tl.where(mask, z, 0.0)
        block_max = tl.maximum(running_max, tl.max(z, axis=0))
        # If all logits so far are -inf, 0 takes the place of the maximum, since -inf - -inf is NaN.
        safe_max = tl.where(block_max == -float("inf"), 0.0, block_max)
        gap = tl.where(running_max == -float("inf"), 0.0, running_max - safe_max)
        scale = tl.where(running_max == -float("inf"), 0.0, tl.exp(gap))
        d = z - safe_max
        e = tl.exp(d)
        if HAS_STATS:
            e_d = (e_d + gap * e_sum) * scale + vector_sums(tl.where(e > 0, e * d, 0.0), VECTOR)
            squared = squared * scale * scale + vector_sums(e * e, VECTOR)
            z_sum += vector_sums(z_or_zero, VECTOR)
        e_sum = e_sum * scale + vector_sums(e, VECTOR)
        running_max = block_max

    state_ptr = states_ptr + (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * STATE
    tl.store(state_ptr, running_max)
    tl.store(state_ptr + 1, tl.sum(e_sum, axis=0))
    if HAS_STATS:
        tl.store(state_ptr + 2, tl.sum(e_d, axis=0))
        tl.store(state_ptr + 3, tl.sum(z_sum, axis=0))
        tl.store(state_ptr + 4, tl.sum(squared, axis=0))


@triton.jit
def merge_chunks(
    states_ptr, row, chunks, is_valid, MAX_CHUNKS: tl.constexpr, STATE: tl.constexpr, STATS: tl.constexpr
):
    """Merges the softmax states of the chunks of a row. Returns the state of the whole row in float64.

    The state is row_max, row_sum, e_d, z_sum and squared. row_max is the largest logit z. With d = z - row_max,
    row_sum is sum(exp(d)), e_d is sum(exp(d) * d), z_sum is sum(z), and squared is sum(exp(d)^2).

    If STATS is 0, the values of e_d, z_sum and squared have no meaning.
    """
    lanes = tl.arange(0, MAX_CHUNKS)
    mask = (lanes < chunks) & is_valid
    state_ptr = states_ptr + (row * chunks + lanes) * STATE
    maxima = tl.load(state_ptr, mask=mask, other=-float("inf"))
    row_max = tl.max(maxima, axis=0)
    safe_max = tl.where(row_max == -float("inf"), 0.0, row_max)
    gap = tl.where(maxima == -float("inf"), 0.0, maxima - safe_max)
    scale = tl.where(maxima == -float("inf"), 0.0, tl.exp(gap))
    sums = tl.load(state_ptr + 1, mask=mask, other=0.0)
    # The maximum ignores NaN; the sum does not.
    row_sum = tl.sum(tl.where(sums == sums, sums * scale, sums), axis=0).to(tl.float64)
    e_d = row_sum
    z_sum = row_sum
    squared = row_sum
    if STATS:
        e_d = tl.load(state_ptr + 2, mask=mask, other=0.0)
        e_d = tl.sum((e_d + gap * sums) * scale, axis=0).to(tl.float64)
        z_sum = tl.sum(tl.load(state_ptr + 3, mask=mask, other=0.0), axis=0).to(tl.float64)
        squared = tl.load(state_ptr + 4, mask=mask, other=0.0)
        squared = tl.sum(squared * scale * scale, axis=0).to(tl.float64)
    return row_max.to(tl.float64), row_sum, e_d, z_sum, squared


@triton.jit
def merge_tile(
    row_state_ptr, row_max, row_sum, e_d, z_sum, squared, z_label, is_valid, is_later, has_label, STATS: tl.constexpr
):
    """Updates the stored softmax state of a row with one more tile of the vocabulary. Returns the new state.

    The state is new_max, row_sum, e_d, z_sum, squared and z_label. new_max is the largest logit so far. z_label is the
    logit of the label. ``merge_chunks`` explains the others.

    ``has_label`` is true if the label lies in the tile. ``is_later`` is true if the row is valid and the tile is not
    the first.
    """
    old_max = tl.load(row_state_ptr, mask=is_later, other=-float("inf"))
    old_sum = tl.load(row_state_ptr + 1, mask=is_later, other=0.0)
    old_label = tl.load(row_state_ptr + 5, mask=is_later, other=0.0)
    new_max = tl.maximum(row_max, old_max)
    # If a maximum is -inf, the sum is 0 or NaN. A gap of 0, a scale of 1, leaves it unchanged.
    gap = tl.where(row_max == -float("inf"), 0.0, row_max - new_max)
    old_gap = tl.where(old_max == -float("inf"), 0.0, old_max - new_max)
    scale = tl.exp(gap)
    old_scale = tl.exp(old_gap)
    if STATS:
        old_e_d = tl.load(row_state_ptr + 2, mask=is_later, other=0.0)
        e_d = (e_d + gap * row_sum) * scale + (old_e_d + old_gap * old_sum) * old_scale
        z_sum += tl.load(row_state_ptr + 3, mask=is_later, other=0.0)
        old_squared = tl.load(row_state_ptr + 4, mask=is_later, other=0.0)
        squared = squared * scale * scale + old_squared * old_scale * old_scale
        tl.store(row_state_ptr + 2, e_d, mask=is_valid)
        tl.store(row_state_ptr + 3, z_sum, mask=is_valid)
        tl.store(row_state_ptr + 4, squared, mask=is_valid)
    row_sum = row_sum * scale + old_sum * old_scale
    z_label = tl.where(has_label, z_label, old_label)
    tl.store(row_state_ptr, new_max, mask=is_valid)
    tl.store(row_state_ptr + 1, row_sum, mask=is_valid)
    tl.store(row_state_ptr + 5, z_label, mask=is_valid)
    return new_max, row_sum, e_d, z_sum, squared, z_label


@triton.jit
def store_stats(
    out_ptr,
    rows,
    row_max,
    row_sum,
    log_sum,
    e_d,
    z_sum,
    squared,
    z_label,
    total,
    is_valid,
    filler,
    STATS: tl.constexpr,
):
    """Stores the selected statistics of a row. If the row is invalid, stores ``filler`` instead.

    Each bit of STATS selects a statistic. ``out_ptr`` points to the first statistic of the row. The next statistic
    lies ``rows`` elements further. ``total`` is the size of the vocabulary. ``log_sum`` is the logarithm of
    ``row_sum``. ``z_label`` is the logit of the label. The other arguments are explained in ``merge_chunks``.
    """
    if STATS & 1:
        entropy = log_sum - e_d / row_sum
        tl.store(out_ptr, tl.where(is_valid, entropy, filler).to(tl.float32))
        out_ptr += rows
    if STATS & 2:
        tl.store(out_ptr, tl.where(is_valid, z_sum / total, filler).to(tl.float32))
        out_ptr += rows
    if STATS & 4:
        top1 = tl.where(z_label == row_max, 1.0, 0.0) + (row_sum - row_sum)
        tl.store(out_ptr, tl.where(is_valid, top1, filler).to(tl.float32))
        out_ptr += rows
    if STATS & 8:
        squared = squared / (row_sum * row_sum)
        tl.store(out_ptr, tl.where(is_valid, squared, filler).to(tl.float32))


@triton.jit(do_not_specialize=[*_INTEGERS, "rows", "chunks", "first"])
def token_logp_kernel(
    logits_ptr,
    labels_ptr,  # [rows] int64
    states_ptr,  # [rows, chunks, STATE] float32
    row_states_ptr,  # [rows, ROW_STATE] float64, in (except in the first tile) and out; unused unless IS_TILE
    logp_ptr,  # [rows] float32, out
    row_max_ptr,  # [rows] float32, out
    row_sum_ptr,  # [rows] float32, out
    row_stats_ptr,  # [bits in STATS, rows] float32, out
    rows: tl.int64,
    chunks: tl.int32,
    vocab: tl.int32,
    first: tl.int64,  # the vocabulary entry of column 0
    total: tl.int64,  # size of the vocabulary
    misalignment: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    ignore_index: tl.int64,
    MAX_CHUNKS: tl.constexpr,  # power of two, at least chunks
    STATE: tl.constexpr,
    ROW_STATE: tl.constexpr,
    IS_TILE: tl.constexpr,
    STATS: tl.constexpr,  # bits in the order of STATS in mpo_ext/ops
):
    """Merges the states of a row's chunks. Computes the log-prob of the label, and the statistics of the row.

    For a row with the maximum m, the sum s of exp(z - m) and the label y, the log-prob is (z[y] - m) - log(s).

    Grid    (rows,)
    Reads   the states of the chunks and one logit per row with a valid label
    Writes  logp, row_max, row_sum and one value for each statistic; if IS_TILE, also the row's float64 state
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    is_ignored = label == ignore_index
    is_valid = (label >= 0) & (label < total) & (label != ignore_index)
    filler = tl.where(is_ignored, 0.0, float("nan"))

    row_max, row_sum, e_d, z_sum, squared = merge_chunks(states_ptr, row, chunks, is_valid, MAX_CHUNKS, STATE, STATS)
    start = row_offset(row, misalignment, inner, outer_stride, row_stride)
    column = label - first
    has_label = is_valid & (column >= 0) & (column < vocab)
    z_label = tl.load(logits_ptr + start + column, mask=has_label, other=0.0).to(tl.float64)
    if IS_TILE:
        state_ptr = row_states_ptr + row * ROW_STATE
        is_later = is_valid & (first != 0)
        row_max, row_sum, e_d, z_sum, squared, z_label = merge_tile(
            state_ptr, row_max, row_sum, e_d, z_sum, squared, z_label, is_valid, is_later, has_label, STATS
        )

    # In double, because a GPU's fast logarithm is inaccurate near 1, and row_sum is near 1 for a confident token.
    log_sum = tl.log(row_sum)
    logp = (z_label - row_max) - log_sum
    tl.store(logp_ptr + row, tl.where(is_valid, logp, filler).to(tl.float32))
    tl.store(row_max_ptr + row, tl.where(is_valid, row_max, 0.0).to(tl.float32))
    tl.store(row_sum_ptr + row, tl.where(is_valid, row_sum, 0.0).to(tl.float32))

    stats_ptr = row_stats_ptr + row
    store_stats(
        stats_ptr, rows, row_max, row_sum, log_sum, e_d, z_sum, squared, z_label, total, is_valid, filler, STATS
    )


def token_logp(
    layout: tuple[Tensor, int, int, int],
    labels: Tensor,
    vocab: int,
    ignore_index: int,
    stats: int,
    logp: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_stats: Tensor,
    tile: tuple[int, int, Tensor] | None = None,
) -> None:
    """Writes the outputs of the operator ``token_logp`` in two launches, without synchronisation.

    ``layout`` is the ``RowLayout`` of the logits. If the logits cover only a part of the vocabulary, ``tile``
    describes this part. The outputs then cover this part and all earlier parts. ``mpo_ext.ops.memory`` explains
    ``RowLayout`` and ``Tile``.
    """
    first, total, row_states = tile or (0, vocab, None)
    rows, dtype = aligned_rows(layout), layout[0].dtype
    sizes = blocks(vocab, dtype)
    chunks = sizes.programs(vocab, dtype)
    state_size = _STATE_WITH_STATS if stats else _STATE
    states = logp.new_empty(labels.numel(), chunks, state_size)
    token_logp_chunk_kernel[(labels.numel(), chunks)](
        rows.base,
        labels,
        states,
        vocab,
        total,
        *rows[1:],
        ignore_index,
        VECTOR=VECTOR_BYTES // dtype.itemsize,
        BLOCK=sizes.block,
        CHUNK=sizes.chunk,
        STATE=state_size,
        HAS_STATS=bool(stats),
        num_warps=sizes.num_warps,
    )
    token_logp_kernel[(labels.numel(),)](
        rows.base,
        labels,
        states,
        states if row_states is None else row_states,
        logp,
        row_max,
        row_sum,
        row_stats,
        labels.numel(),
        chunks,
        vocab,
        first,
        total,
        *rows[1:],
        ignore_index,
        MAX_CHUNKS=triton.next_power_of_2(chunks),
        STATE=state_size,
        ROW_STATE=_ROW_STATE,
        IS_TILE=tile is not None,
        STATS=stats,
        num_warps=1,
    )
