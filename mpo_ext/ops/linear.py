"""The operators from hidden states: logits exist one tile at a time.

A tile is some labelled rows by some part of the vocabulary. It is projected by torch's matrix product, and scored or
turned into its gradient by the kernels of ``mpo_ext.ops.logits`` while it is hot. Tiles go over the vocabulary first and over
rows within, so that each part of the head is read, and widened, once for all rows, and the gradient of that part is
complete when its tiles are done.

On a CPU bfloat16 and float16 operands are widened to float32 part by part, which is exact, where the CPU multiplies
them no faster than float32; where it does, tiles are of their type, as a model's own logits are. On a GPU the operands
keep their type and the product comes out in float32; only its gradient is rounded to that type, as the operand of the
next products.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_ext.ops import logits as ops

#: What ``linear_token_logp`` keeps for the backward: nothing, the unscaled gradient by the hidden states, the logits.
KEEP_NOTHING, KEEP_HIDDEN_GRAD, KEEP_LOGITS = 0, 1, 2
_CPU_TILE_BYTES = 16 << 20  # of logits: they stay in the last-level cache, and are enough for the matrix product
# Of columns of kept logits: the room that backward needs to get out of its own way.
_CPU_KEPT_BYTES, _GPU_KEPT_BYTES = 32 << 20, 64 << 20
_ALIGNMENT = 64  # bytes: where kept logits may begin
_MIN_COLUMNS = 256  # of a tile, where there are so many: narrower products are slow
_COLUMN_STEP = 64


class Head(NamedTuple):
    """How logits come from hidden states: ``cap * tanh(z / cap) / temperature``, or ``z / temperature`` without a cap.

    ``z = logit_scale * (hidden @ weight.T + bias)``.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    temperature: float
    product: torch.dtype  # of the operands of the matrix products

    @property
    def inner_scale(self) -> float:
        """Factor on the product before tanh, or on all of it where there is no tanh."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def outer_scale(self) -> float:
        """Factor on tanh; 1 where there is none."""
        return 1.0 if self.softcap is None else self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """Derivative of a logit by the product, but for the derivative of tanh."""
        return self.logit_scale / self.temperature


@torch.library.custom_op("mpo_ext::linear_token_logp", mutates_args=())
def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int,
    stats: int,
    keep: int,
    product: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each label from hidden states; only labelled rows are projected.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]`` of the head, of any floating-point dtype.
        bias: ``[V]`` of the head, or None.
        labels: ``[...]`` int64, on the device of ``hidden`` or on the CPU. On a GPU, labels that are there too make
            the host wait until it can count them; labels on the CPU do not.
        ignore_index: Label of the rows that cost nothing and give 0.
        logit_scale: See ``Head``.
        softcap: See ``Head``.
        temperature: See ``Head``.
        memory_budget: Bytes that a tile, and what is computed from it, may take.
        stats: As of ``ops.token_logp``.
        keep: ``KEEP_NOTHING``, ``KEEP_HIDDEN_GRAD`` or ``KEEP_LOGITS``.
        product: dtype of the operands of the matrix products, from ``product_dtype``.
        backend: What ``ops.choose_backend`` returned, but for "reference".

    Returns:
        The four outputs of ``ops.token_logp``, on the device of ``hidden``; and what was to be kept of the n labelled
        rows: ``[0]``, ``[n, D]`` d logp / d hidden, or bytes with their logits as ``KeptLogits`` lays them out.
    """
    head = Head(weight, bias, logit_scale, softcap, temperature, product)
    work = _Work(hidden, labels, head, ignore_index, memory_budget, backend, keeps_logits=keep == KEEP_LOGITS)
    full = ops.token_logp_outputs(work.like, work.labels_like(labels), stats)
    for output in full:
        output.zero_()
    if keep == KEEP_LOGITS:
        kept = _fresh(work.like, (work.kept_logits.size,), torch.uint8)
    else:
        kept = work.like.new_empty(work.rows.shape if keep == KEEP_HIDDEN_GRAD else (0,))
    if work.rows.shape[0] == 0:
        return *full, kept

    chunks = [
        _Chunk(rows, labels, ops.token_logp_outputs(work.like, labels, stats), _new_state(labels))
        for rows, labels in work.chunks()
    ]
    total = work.vocab
    for first, end in work.columns():
        operand = work.operand(first, end)
        for chunk in chunks:
            out = work.kept_logits.tile(kept, chunk.rows, first, end) if work.keeps_in_place else None
            logits, tanh = work.logits(chunk.rows, operand, first, end, out)
            tile = ops.Tile(first, total, chunk.state)
            folds = keep == KEEP_HIDDEN_GRAD
            old_max = chunk.outputs[1].clone() if folds else None
            ops.score(logits, chunk.labels, ignore_index, stats, backend, chunk.outputs, tile, leaves_exp_logits=folds)
            if keep == KEEP_LOGITS and not work.keeps_in_place:
                work.kept_logits.store_(kept, chunk.rows, first, end, logits, chunk.outputs[1])
            if old_max is not None:
                _fold_hidden_grad(work, chunk, logits, tanh, operand, old_max, kept[chunk.rows], is_first=first == 0)
    for target, *parts in zip(full, *(chunk.outputs for chunk in chunks), strict=True):
        # Rows are the last axis of each output once the leading axes of the labels are one.
        target.view(*target.shape[: target.ndim - labels.ndim], labels.numel())[..., work.index] = torch.cat(parts, -1)
    if keep == KEEP_HIDDEN_GRAD:
        for chunk in chunks:
            _finish_hidden_grad(work, chunk, kept[chunk.rows])
    return *full, kept


@linear_token_logp.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int,
    stats: int,
    keep: int,
    product: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = hidden.new_empty((1, 1), dtype=_result_dtype(hidden, weight))
    outputs = ops.token_logp_outputs(like, hidden.new_empty(labels.shape, dtype=torch.int64), stats)
    if keep == KEEP_NOTHING:
        return *outputs, like.new_empty(0)
    size = torch.library.get_ctx().new_dynamic_size()
    if keep == KEEP_HIDDEN_GRAD:
        return *outputs, like.new_empty(size, hidden.shape[-1])
    return *outputs, like.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("mpo_ext::linear_grad", mutates_args=())
def linear_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_weight: Tensor,
    scale: Tensor | None,
    hidden_grad: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int,
    product: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``scale * (row_weight * logp).sum()`` by hidden states and head.

    Tiles are projected again and turned into their gradient in place. Sums are formed in float32 (float64 for
    float64) and rounded once.

    Args:
        hidden: As given to ``linear_token_logp``, and so where nothing else is said.
        weight: See there.
        bias: See there.
        labels: See there.
        row_max: ``[...]`` from ``linear_token_logp``.
        row_sum: ``[...]`` from ``linear_token_logp``.
        row_weight: ``[...]`` d loss / d logp.
        scale: 0-d factor on all of it, or None for 1.
        hidden_grad: What ``linear_token_logp`` kept with ``KEEP_HIDDEN_GRAD``: then nothing is projected, and the
            gradient by hidden is the only one to be had. Else None.
        ignore_index: See there.
        logit_scale: See there.
        softcap: See there.
        temperature: See there.
        memory_budget: See there.
        product: See there.
        wants_hidden: Whether the gradient by hidden is computed.
        wants_weight: Likewise.
        wants_bias: Likewise.
        backend: See there.

    Returns:
        Gradients by hidden, weight and bias, each like its tensor and contiguous, or ``[0]`` where it is not wanted.
    """
    head = Head(weight, bias, logit_scale, softcap, temperature, product)
    work = _Work(hidden, labels, head, ignore_index, memory_budget, backend, converts_weight_grad=wants_weight)
    wanted = (wants_hidden, wants_weight, wants_bias)
    if hidden_grad is None:
        return _gradients(work, hidden, row_max, row_sum, row_weight, scale, None, wanted)
    factor = row_weight.reshape(-1)[work.index]
    if scale is not None:
        factor = factor * scale.to(factor.dtype)
    return work.scattered(hidden_grad * factor[:, None], hidden), work.like.new_empty(0), work.like.new_empty(0)


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
    hidden_grad: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int,
    product: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, bias, (wants_hidden, wants_weight, wants_bias))


@torch.library.custom_op("mpo_ext::linear_grad_", mutates_args=("logits",))
def linear_grad_(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_weight: Tensor,
    scale: Tensor | None,
    logits: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int,
    product: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_grad`` from logits that ``linear_token_logp`` kept.

    They are used up: the gradient by them takes their place, and the gradient by weight, where it is wanted, takes
    that of all of it. ``kept_weight_grad`` finds it there; what is returned for it is ``[0]``.
    """
    head = Head(weight, bias, logit_scale, softcap, temperature, product)
    work = _Work(hidden, labels, head, ignore_index, memory_budget, backend, keeps_logits=True)
    wanted = (wants_hidden, wants_weight, wants_bias)
    d_hidden, _, d_bias = _gradients(work, hidden, row_max, row_sum, row_weight, scale, logits, wanted)
    return d_hidden, work.like.new_empty(0), d_bias


def kept_weight_grad(logits: Tensor, weight: Tensor) -> Tensor:
    """The gradient by weight, ``[V, D]``, in the memory of kept logits that ``linear_grad_`` has used up."""
    size = weight.numel() * weight.dtype.itemsize
    return logits.as_strided((size,), (1,)).view(weight.dtype).view(weight.shape)  # a slice cannot be compiled


@linear_grad_.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_weight: Tensor,
    scale: Tensor | None,
    logits: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int,
    product: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, bias, (wants_hidden, False, wants_bias))


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _result_dtype(hidden, weight)
    d_hidden, d_weight, d_bias = (
        tensor.new_empty(tensor.shape) if is_wanted and tensor is not None else hidden.new_empty(0, dtype=dtype)
        for tensor, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _gradients(
    work: _Work,
    hidden: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    row_weight: Tensor,
    scale: Tensor | None,
    kept: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from tiles that are projected again, or from kept ones, which are overwritten."""
    head = work.head
    wants_hidden, wants_weight, wants_bias = wanted
    d_hidden, d_weight, d_bias = _empty_gradients(hidden, head.weight, head.bias, (wants_hidden, False, wants_bias))
    if wants_weight:
        weight = head.weight
        d_weight = _fresh(work.like, weight.shape, weight.dtype) if kept is None else kept_weight_grad(kept, weight)
    if work.rows.shape[0] == 0:
        return d_hidden.zero_(), d_weight.zero_(), d_bias.zero_()

    # One factor for all of it. Only here, and not in the tiles, the scale of the loss comes in.
    factor = work.like.new_full((), head.slope, dtype=torch.float64)
    if scale is not None:
        factor = factor * scale.to(torch.float64)
    row_weights, maxima, sums = (rows.reshape(-1)[work.index] for rows in (row_weight, row_max, row_sum))
    d_rows = work.like.new_empty(work.rows.shape) if wants_hidden else d_hidden
    chunks = list(work.chunks())
    for first, end in work.columns():
        operand = work.operand(first, end)
        for number, (rows, labels) in enumerate(chunks):
            place = {"is_first": number == 0, "is_last": number == len(chunks) - 1}
            if kept is None:
                grad, tanh = work.logits(rows, operand, first, end)
            else:
                grad = work.kept(kept, rows, first, end)
                tanh = work.tanh_of(grad)
            ops.write_grad(
                grad, labels, maxima[rows], sums[rows], row_weights[rows], factor, work.ignore_index, work.backend,
                grad, tile=ops.Tile(first, work.vocab, None),
            )  # fmt: skip
            _through_tanh_(grad, tanh)
            if wants_bias and head.bias is not None:
                work.add_bias_grad(d_bias[first:end], grad, **place)
            grad = work.as_operand(grad)
            if wants_hidden:
                _accumulate(d_rows[rows], grad, operand, is_first=first == 0)
            if wants_weight:
                work.add_weight_grad(d_weight[first:end], grad, rows, **place)
    return work.scattered(d_rows, hidden) if wants_hidden else d_hidden, d_weight, d_bias


# --------------------------------------------------------------------------------------------------------------- tiles


@dataclass
class _Chunk:
    """Labelled rows that share tiles, and what is known of them so far."""

    rows: slice
    labels: Tensor
    outputs: tuple[Tensor, Tensor, Tensor, Tensor]
    state: Tensor


class KeptLogits:
    """Where kept logits lie, in memory that the gradient by the head takes over while they are used up.

    Columns are used up from the first to the last, and the gradient by them is written to the front. So the logits
    begin as far behind as it takes that the gradient by a tile's columns ends before the logits of that tile: with
    n labelled rows the memory is that of ``max(n, D)`` rows and a tile, not of ``n + D``.

    In float16, which is for gradients in bfloat16, a logit is kept as what it lies below the largest one that its row
    had so far, which lies behind the logits. That errs by 2^-12 of itself, so exp(logit) errs by less than a rounding
    to bfloat16 where it is above 3e-4 of the largest, and by little of the whole elsewhere.

    Args:
        rows: n.
        vocab: Columns in all.
        columns: Of a tile.
        grad_bytes: Of the gradient by a column.
        dtype: Of the logits.

    Attributes:
        size: Bytes of it all.
    """

    def __init__(self, rows: int, vocab: int, columns: int, grad_bytes: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._rows, self._columns = rows, columns
        self._column_bytes = rows * dtype.itemsize
        last = (vocab - 1) // columns * columns
        # What a tile asks for changes evenly from the first to the last full one; one that is not full may follow.
        tight = {0, max(last - columns, 0), last}
        self._begin = _aligned(
            max(min(first + columns, vocab) * grad_bytes - first * self._column_bytes for first in tight)
        )
        self._maxima = _aligned(self._begin + vocab * self._column_bytes)
        tiles = -(-vocab // columns) if dtype == torch.float16 else 0
        self.size = self._maxima + tiles * rows * torch.float32.itemsize

    def tile(self, memory: Tensor, rows: slice, first: int, end: int) -> Tensor:
        """The logits of a tile, next to each other: rows of the whole would lie on as many pages."""
        width = end - first
        begin = self._begin + self._column_bytes * first + rows.start * width * self.dtype.itemsize
        return _typed(memory, begin, (rows.stop - rows.start, width), self.dtype)

    def store_(self, memory: Tensor, rows: slice, first: int, end: int, logits: Tensor, largest: Tensor) -> None:
        """Keeps a tile of float32 logits, which it uses up, in float16; ``largest`` is that of each row so far."""
        safe = self._largest(memory, rows, first)
        safe.copy_(torch.where(largest == -math.inf, 0.0, largest).unsqueeze(1))
        self.tile(memory, rows, first, end).copy_(logits.sub_(safe))

    def restore(self, memory: Tensor, rows: slice, first: int, end: int, out: Tensor) -> Tensor:
        """Puts a tile that ``store_`` has kept into ``out``, in float32."""
        return out.copy_(self.tile(memory, rows, first, end)).add_(self._largest(memory, rows, first))

    def _largest(self, memory: Tensor, rows: slice, first: int) -> Tensor:
        begin = self._maxima + (first // self._columns * self._rows + rows.start) * torch.float32.itemsize
        return _typed(memory, begin, (rows.stop - rows.start, 1), torch.float32)


def _fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of the size of a head, any contents: on a CPU in huge pages, since small ones fault more often."""
    return ops.fresh_zeros(shape, dtype) if like.device.type == "cpu" else like.new_empty(shape, dtype=dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _typed(memory: Tensor, begin: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A matrix in memory given as bytes."""
    return memory[begin : begin + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


class _Work:
    """The labelled rows of one call, the cut into tiles, and the buffers that all tiles share."""

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: Head,
        ignore_index: int,
        memory_budget: int,
        backend: str,
        *,
        converts_weight_grad: bool = False,
        keeps_logits: bool = False,
    ) -> None:
        self.head, self.ignore_index, self.backend = head, ignore_index, backend
        self.vocab, depth = head.weight.shape
        self.like = hidden.new_empty((1, 1), dtype=_result_dtype(hidden, head.weight))
        # The type of the operands: what a product on this device takes without rounding its result to less.
        on_cpu = hidden.device.type == "cpu"
        self.operand_dtype = head.product if on_cpu or _widens_results(hidden.device) else self.like.dtype
        self.tile_dtype = self.operand_dtype if on_cpu else self.like.dtype
        is_labelled = labels.reshape(-1) != ignore_index
        index = is_labelled.nonzero().squeeze(-1)  # on a GPU this waits, unless the labels are on the CPU
        self.is_whole = index.shape[0] == labels.numel()
        self.index = index.to(hidden.device, non_blocking=True)
        self.labels = labels.reshape(-1)[index].to(hidden.device, non_blocking=True)
        rows = hidden.reshape(-1, depth)
        self.rows = (rows if self.is_whole else rows.index_select(0, self.index)).to(self.operand_dtype)
        self._buffers: dict[str, Tensor] = {}
        widens = head.weight.dtype != self.operand_dtype
        # Kept logits lie tile by tile, so forward and backward must cut the same tiles.
        converts = (converts_weight_grad or keeps_logits) and head.weight.dtype != self.like.dtype
        # A product of half precision is a tensor of its own, and so is the gradient as operand of the next two.
        is_narrow = self.operand_dtype != self.tile_dtype
        # Gradients in bfloat16 are rounded to fewer bits than float16 has.
        is_rounded = hidden.dtype == head.weight.dtype == torch.bfloat16
        kept_dtype = torch.float16 if is_rounded and self.tile_dtype == torch.float32 else self.tile_dtype
        self.keeps_in_place = keeps_logits and kept_dtype == self.tile_dtype
        planes = (not self.keeps_in_place) + (head.softcap is not None) + 2 * is_narrow
        per_column = (widens * self.operand_dtype.itemsize + converts * self.like.dtype.itemsize) * depth
        preferred = _CPU_TILE_BYTES if on_cpu else memory_budget
        count = self.rows.shape[0]
        grad_bytes = depth * head.weight.dtype.itemsize
        if keeps_logits:
            per_column += min(count * kept_dtype.itemsize, grad_bytes)  # of the room that ``KeptLogits`` leaves free
            memory_budget = min(memory_budget, _CPU_KEPT_BYTES if on_cpu else _GPU_KEPT_BYTES)
        self._chunk_rows, self._chunk_columns = tile_shape(
            count,
            self.vocab,
            per_element=planes * self.tile_dtype.itemsize,
            per_column=per_column,
            budget=memory_budget,
            preferred=preferred,
        )
        self.kept_logits = KeptLogits(count, self.vocab, self._chunk_columns, grad_bytes, kept_dtype)

    def labels_like(self, labels: Tensor) -> Tensor:
        """Labels of the shape of ``labels`` on the device of the rows; their values mean nothing."""
        return self.like.new_empty(labels.shape, dtype=torch.int64)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows, in equal pieces, with their labels."""
        for begin in range(0, self.rows.shape[0], self._chunk_rows):
            rows = slice(begin, min(begin + self._chunk_rows, self.rows.shape[0]))
            yield rows, self.labels[rows]

    def columns(self) -> Iterator[tuple[int, int]]:
        """The vocabulary, in pieces."""
        for first in range(0, self.vocab, self._chunk_columns):
            yield first, min(first + self._chunk_columns, self.vocab)

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory of two axes that stays from tile to tile, any contents; of the type of a tile by default."""
        rows, columns = shape
        dtype = dtype or self.tile_dtype
        memory = self._buffers.get(name)
        if memory is None or memory.numel() < rows * columns:
            memory = self._buffers[name] = self.like.new_empty(rows * columns, dtype=dtype)
        return memory[: rows * columns].view(rows, columns)

    def operand(self, first: int, end: int) -> Tensor:
        """Rows first .. end - 1 of the head, in the type of the operands."""
        part = self.head.weight[first:end]
        if part.dtype == self.operand_dtype:
            return part
        return self.buffer("operand", part.shape, self.operand_dtype).copy_(part)

    def as_operand(self, grad: Tensor) -> Tensor:
        """The gradient of a tile as operand of a product."""
        if grad.dtype == self.operand_dtype:
            return grad
        return self.buffer("grad operand", grad.shape, self.operand_dtype).copy_(grad)

    def logits(
        self, rows: slice, operand: Tensor, first: int, end: int, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of a tile, and tanh where there is a cap; in buffers that the next tile takes, or in ``out``."""
        if out is None:
            out = self.buffer("logits", (rows.stop - rows.start, end - first))
        head = self.head
        raw = out if head.softcap is None else self.buffer("tanh", out.shape)
        bias = None if head.bias is None else head.bias[first:end].to(raw.dtype)
        _product(self.rows[rows], operand.T, raw, head.inner_scale, bias)
        if head.softcap is None:
            return out, None
        raw.tanh_()
        torch.mul(raw, head.outer_scale, out=out)
        return out, raw

    def kept(self, memory: Tensor, rows: slice, first: int, end: int) -> Tensor:
        """The logits of a tile that were kept: where they lie, or in the buffer of all tiles."""
        if self.keeps_in_place:
            return self.kept_logits.tile(memory, rows, first, end)
        out = self.buffer("logits", (rows.stop - rows.start, end - first))
        return self.kept_logits.restore(memory, rows, first, end, out)

    def tanh_of(self, logits: Tensor) -> Tensor | None:
        """Tanh of logits that were kept, where there is a cap."""
        if self.head.softcap is None:
            return None
        return torch.mul(logits, 1 / self.head.outer_scale, out=self.buffer("tanh", logits.shape))

    def add_weight_grad(self, target: Tensor, grad: Tensor, rows: slice, *, is_first: bool, is_last: bool) -> None:
        """Adds the part of a tile to the gradient of its columns; the last chunk of rows rounds and stores it."""
        # One product may be rounded by itself; the sum of several is formed in float32.
        direct = target.dtype == (grad.dtype if is_first and is_last else self.like.dtype)
        total = target if direct else self.buffer("weight grad", target.shape, self.like.dtype)
        _accumulate(total, grad.T, self.rows[rows], is_first=is_first)
        if is_last and not direct:
            target.copy_(total)

    def add_bias_grad(self, target: Tensor, grad: Tensor, *, is_first: bool, is_last: bool) -> None:
        """The same for the bias."""
        total = self.buffer("bias grad", (1, target.shape[0]), self.like.dtype)[0]
        if is_first:
            total.zero_()
        total.add_(grad.sum(0, dtype=total.dtype))
        if is_last:
            target.copy_(total)

    def scattered(self, rows: Tensor, like: Tensor) -> Tensor:
        """A value per labelled row as a tensor shaped like ``like``, zeros elsewhere."""
        rows = rows.to(like.dtype)
        if self.is_whole:
            return rows.view(like.shape)
        full = torch.zeros_like(like, memory_format=torch.contiguous_format)
        full.view(-1, like.shape[-1])[self.index] = rows
        return full


def tile_shape(
    rows: int, vocab: int, *, per_element: int, per_column: int, budget: int, preferred: int
) -> tuple[int, int]:
    """Rows and columns of a tile.

    All rows and as many columns as fit; where that leaves fewer than 256 columns, fewer rows. One row and one column
    are the least, whatever the budget.

    Args:
        rows: Labelled rows.
        vocab: Columns in all.
        per_element: Bytes that an element of a tile costs.
        per_column: Bytes that a column of a tile costs besides.
        budget: Bytes that a tile may cost.
        preferred: Bytes of ``rows * columns * per_element`` beyond which a tile does not get faster.
    """
    columns = min(vocab, _MIN_COLUMNS)
    if per_column:  # at most half of the budget goes into what does not depend on the rows
        columns = max(min(columns, budget // (2 * per_column)), 1)
    chunk = max(rows, 1)
    if per_element:
        room = max(min(budget - columns * per_column, preferred), 0)
        pieces = -(-chunk // max(room // (columns * per_element), 1))
        chunk = -(-chunk // pieces)
    cost = chunk * per_element + per_column
    widest = min(budget // cost if cost else vocab, preferred // (chunk * per_element) if per_element else vocab)
    if widest >= vocab:
        return chunk, vocab
    return chunk, max(widest // _COLUMN_STEP * _COLUMN_STEP, min(widest, _COLUMN_STEP), 1)


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float, bias: Tensor | None) -> None:
    """Computes ``out = scale * (a @ b + bias)``, in the type of ``out`` whatever that of the operands."""
    if a.dtype == out.dtype:
        if bias is not None:
            torch.addmm(bias, a, b, beta=scale, alpha=scale, out=out)
        elif scale != 1:
            torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
        else:
            torch.mm(a, b, out=out)
        return
    product = torch.mm(a, b, out_dtype=out.dtype)
    if bias is not None:
        product.add_(bias)
    torch.mul(product, scale, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """Adds ``a @ b`` in the type of ``total`` whatever that of the operands; at first what is there does not count."""
    if a.dtype == total.dtype:
        if is_first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    product = torch.mm(a, b) if a.device.type == "cpu" else torch.mm(a, b, out_dtype=total.dtype)
    if is_first:
        total.copy_(product)
    else:
        total.add_(product)


def _through_tanh_(grad: Tensor, tanh: Tensor | None) -> None:
    """Takes a gradient by ``tanh(x)`` to one by ``x``; uses up ``tanh``."""
    if tanh is not None:
        grad.addcmul_(grad, tanh.square_(), value=-1)


def _fold_hidden_grad(
    work: _Work,
    chunk: _Chunk,
    exp_logits: Tensor,
    tanh: Tensor | None,
    operand: Tensor,
    old_max: Tensor,
    total: Tensor,
    *,
    is_first: bool,
) -> None:
    """Adds ``exp_logits @ weight`` of a tile to what the tiles before gave under their maximum.

    The label's own numerator is 0, since it joins with ``1 - p``, which would cancel.
    """
    _through_tanh_(exp_logits, tanh)
    if not is_first:
        scale = torch.exp(old_max - chunk.outputs[1])
        total.mul_(torch.where(old_max == -math.inf, 0.0, scale).unsqueeze(1))
    _accumulate(total, work.as_operand(exp_logits), operand, is_first=is_first)


def _finish_hidden_grad(work: _Work, chunk: _Chunk, total: Tensor) -> None:
    """Completes d logp / d hidden = slope * ((1 - p_y) * tanh'_y * weight_y - the sum over the others)."""
    logp, _, row_sum, _ = chunk.outputs
    head = work.head
    own = -torch.expm1(logp)
    if head.softcap is not None:
        tanh = chunk.state[:, -1] / head.outer_scale
        own = own * (1 - tanh.square()).to(own.dtype)
    label_rows = head.weight[chunk.labels.clamp(0, work.vocab - 1)].to(total.dtype)
    total.div_(-row_sum.unsqueeze(1)).addcmul_(label_rows, own.unsqueeze(1)).mul_(head.slope)


def _new_state(labels: Tensor) -> Tensor:
    return torch.empty(labels.shape[0], ops.ROW_STATE, dtype=torch.float64, device=labels.device)


def _result_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which operands of this type are multiplied: on a CPU the faster one of it and float32.

    MPO_CPU_PRODUCT decides in place of the clock: "float32" widens always (logits are then rounded nowhere), "native"
    never.

    Raises:
        ValueError: If MPO_CPU_PRODUCT is neither.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    wanted = os.environ.get("MPO_CPU_PRODUCT")
    if wanted not in (None, "", "float32", "native"):
        raise ValueError(f"MPO_CPU_PRODUCT must be 'float32' or 'native', got {wanted!r}")
    is_native = _is_fast_on_cpu(dtype) if not wanted else wanted == "native"
    return dtype if is_native else torch.float32


@torch.compiler.assume_constant_result  # torch.compile need not trace a stopwatch
@functools.cache
def _is_fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this type clearly faster than of float32; measured once."""

    def seconds(kind: torch.dtype) -> float:
        a, b = torch.ones(256, 512, dtype=kind), torch.ones(512, 2048, dtype=kind)
        best = math.inf
        for _ in range(4):  # the first one sets the library up
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(dtype) < seconds(torch.float32) / 1.2


def _widens_results(device: torch.device) -> bool:
    """Whether products on this device take operands of half precision and give float32."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads()
