"""Tiles of logits: how labelled rows and vocabulary are divided into tiles, and how tiles are computed and kept.

A tile holds the logits of some labelled rows (token positions) for some columns of the vocabulary. A torch matmul
computes the tile. The kernels then compute log-probs from the tile, or overwrite it with its gradient. The outer loop
runs over the vocabulary, and the inner loop over rows. Each slice of the weight is therefore read and converted only
once. At the end of the inner loop, the gradient of this slice is complete.

The dtypes depend on the device:

- GPU: tiles are float32. The inputs of the matmuls keep their dtype if matmuls can write float32 results
  (``wide_matmuls``).
- CPU that multiplies half precision faster than float32: inputs and tiles keep the dtype of the inputs.
- Other CPUs: half-precision inputs are converted to float32, which is exact, and tiles are float32.

The next matmuls take the gradient of a tile as input. The gradient is therefore converted to the dtype of the inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_ext.ops import cuda
from mpo_ext.ops.matmul import accumulate, scaled_matmul, wide_matmuls
from mpo_ext.ops.memory import is_on_cpu, result_dtype, reused_memory
from mpo_ext.ops.tile_shape import GPU_KEPT_BYTES, gpu_memory_budget, gpu_tile_shape, tile_shape

_CPU_MEMORY_BUDGET = 64 << 20
_CPU_TILE_BYTES = 16 << 20  # logits of a tile: fits the last-level cache, large enough for fast products
# Largest budget of a tile on a CPU if logits are kept: each column of a tile adds to the memory of kept logits.
_CPU_KEPT_BYTES = 32 << 20
_ALIGNMENT = 64  # bytes: kept logits begin at a multiple of it


@torch.compiler.assume_constant_result  # keeps torch.compile from tracing the driver query
def default_memory_budget(device: torch.device) -> int:
    """Returns the default memory budget of tiles, in bytes: 64 MiB on a CPU, ``gpu_memory_budget`` on a GPU."""
    return _CPU_MEMORY_BUDGET if device.type == "cpu" else gpu_memory_budget(_memory(device))


@functools.cache
def _memory(device: torch.device) -> int:
    """Returns the total memory of a GPU in bytes, or 0 if torch cannot query it."""
    runtime = getattr(torch, device.type, None)
    if runtime is None or not hasattr(runtime, "get_device_properties") or not runtime.is_available():
        return 0
    return runtime.get_device_properties(device).total_memory


class Head(NamedTuple):
    """An output head.

    With ``z = logit_scale * (hidden @ weight.T + bias)``, the logits are ``softcap * tanh(z / softcap) /
    temperature``, or ``z / temperature`` without a softcap.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float  # 0 for none
    temperature: float
    matmul_dtype: torch.dtype  # dtype of the inputs of the matrix products

    @property
    def inner_scale(self) -> float:
        """Factor by which ``hidden @ weight.T + bias`` is multiplied.

        Without a softcap, the result is the logit. With a softcap, the result is the argument of tanh.
        """
        return self.logit_scale / (self.softcap or self.temperature)

    @property
    def outer_scale(self) -> float:
        """Factor by which tanh is multiplied; 1 without a softcap."""
        return self.softcap / self.temperature if self.softcap else 1.0

    @property
    def slope(self) -> float:
        """Derivative of a logit with respect to ``hidden @ weight.T + bias``, without a softcap.

        With a softcap, the derivative is this number times the derivative of tanh.
        """
        return self.logit_scale / self.temperature


class KeptLogits:
    """The layout of a buffer that holds logits, and later the gradient of the head's weight.

    Forward stores logits in the buffer. Backward reads the logits tile by tile, from the first columns to the last.
    After each tile, backward writes the gradient for the columns of the tile into the same buffer. The gradient starts
    at byte 0, and the logits start at an offset. With this offset, the gradient never overwrites logits that backward
    has not read yet.

    Let n be the number of labelled rows (token positions), and D the hidden size. If a logit and a gradient value have
    equal size, the buffer holds ``vocab * max(n, D)`` values, and at most ``columns * min(n, D)`` additional values.
    With ``only_fitting`` and n larger than D, the buffer holds only the ``vocab * D`` values of the gradient. The
    buffer is then too small for all logits, so forward keeps only the logits of the first columns.

    ``store_`` stores float32 logits in float16. It stores each logit as its distance from a maximum: the row's maximum
    over this tile and all earlier tiles. The maxima lie after the logits. Rounding changes a distance by at most 2^-11
    of its value. For distances up to 7.8, the relative error of exp(logit) is therefore below 2^-8. This is the
    rounding error of bfloat16.

    Args:
        rows: Number of labelled rows, n.
        vocab: Size of the vocabulary.
        columns: Number of columns of a tile.
        grad_bytes: Bytes of the weight's gradient for one column of the vocabulary.
        dtype: dtype of the kept logits.
        only_fitting: Whether to keep no more columns than fit into the memory of the gradient.

    Attributes:
        size: Bytes of the buffer.
        stop: Number of columns whose logits are kept: columns 0 to ``stop - 1``.
    """

    def __init__(
        self, rows: int, vocab: int, columns: int, grad_bytes: int, dtype: torch.dtype, *, only_fitting: bool = False
    ) -> None:
        self.dtype = dtype
        self._rows, self._columns = rows, columns
        self._column_bytes = rows * dtype.itemsize
        self.stop = vocab
        if only_fitting and self._column_bytes > grad_bytes:
            # The logits start after the gradient of the first tile. Reading them stays ahead of writing the gradient.
            self.stop = (vocab - columns) * grad_bytes // self._column_bytes // columns * columns
        last = max(self.stop - 1, 0) // columns * columns
        # The required offset is linear from the first full tile to the last, and a partial tile may follow. The
        # largest is therefore that of the first tile or of one of the last two.
        tight = {0, max(last - columns, 0), last}
        self._begin = _aligned(
            max(min(first + columns, self.stop) * grad_bytes - first * self._column_bytes for first in tight)
        )
        self._maxima = _aligned(max(self._begin + self.stop * self._column_bytes, vocab * grad_bytes))
        tiles = -(-self.stop // columns) if dtype == torch.float16 else 0
        self.size = self._maxima + tiles * rows * torch.float32.itemsize

    def tile(self, memory: Tensor, rows: slice, first: int, end: int) -> Tensor:
        """Returns a contiguous view of a tile's logits in ``memory``.

        The tile has the slice ``rows`` of the labelled rows, and the columns ``first`` to ``end - 1``.
        """
        width = end - first
        begin = self._begin + self._column_bytes * first + rows.start * width * self.dtype.itemsize
        return _typed(memory, begin, (rows.stop - rows.start, width), self.dtype)

    def store_(self, memory: Tensor, rows: slice, first: int, end: int, logits: Tensor, row_max: Tensor) -> None:
        """Stores ``logits - row_max`` of a tile in float16. May overwrite ``logits``.

        ``logits`` are float32. ``row_max`` is the maximum of each row over this tile and all earlier tiles.
        """
        safe_max = self.tile_max(memory, rows, first)
        safe_max.copy_(torch.where(row_max == -math.inf, 0.0, row_max).unsqueeze(1))
        target = self.tile(memory, rows, first, end)
        if is_on_cpu(logits):
            target.copy_(logits.sub_(safe_max))
        else:  # one pass over the logits; on a CPU, torch would allocate a float32 copy of the difference
            torch.sub(logits, safe_max, out=target)

    def restore(self, memory: Tensor, rows: slice, first: int, end: int, out: Tensor) -> Tensor:
        """Writes the logits of a stored tile to the float32 tensor ``out``, and returns ``out``."""
        return out.copy_(self.tile(memory, rows, first, end)).add_(self.tile_max(memory, rows, first))

    def tile_max(self, memory: Tensor, rows: slice, first: int) -> Tensor:
        """Returns a view of the row maxima ``[rows, 1]`` that ``store_`` subtracted from the logits of a tile."""
        begin = self._maxima + (first // self._columns * self._rows + rows.start) * torch.float32.itemsize
        return _typed(memory, begin, (rows.stop - rows.start, 1), torch.float32)


class TiledRows:
    """Divides the labelled rows (token positions) of an operator call into tiles, and holds the buffers of a tile.

    Args:
        hidden: ``[..., D]`` hidden states.
        labels: ``[...]`` int64.
        head: Output head.
        ignore_index: Label of rows that are skipped.
        memory_budget: Bytes for a tile and the tensors computed from it.
        converts_weight_grad: Whether the gradient of ``head.weight`` is computed. A float32 sum of this gradient takes
            a part of the memory budget, unless the weight is float32, too.
        keeps_logits: Whether forward keeps logits for backward.
        only_fitting: As in ``KeptLogits``.
    """

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: Head,
        ignore_index: int,
        memory_budget: int,
        *,
        converts_weight_grad: bool = False,
        keeps_logits: bool = False,
        only_fitting: bool = False,
    ) -> None:
        self.head = head
        self.vocab, hidden_size = head.weight.shape
        cuda.check_not_capturing(hidden)
        self.like = hidden.new_empty((1, 1), dtype=result_dtype(hidden, head.weight))
        # A GPU whose matmuls would round their results to the dtype of half-precision inputs gets float32 inputs.
        on_cpu = is_on_cpu(hidden)
        can_widen = on_cpu or wide_matmuls(hidden.device, head.matmul_dtype).writes
        self.input_dtype = head.matmul_dtype if can_widen else self.like.dtype
        self.tile_dtype = self.input_dtype if on_cpu else self.like.dtype
        index = labelled_rows(labels, ignore_index)
        self.index = index.to(hidden.device, non_blocking=True)
        self.labels = labels.reshape(-1)[index].to(hidden.device, non_blocking=True)
        rows = hidden.reshape(-1, hidden_size)
        is_whole = index.shape[0] == labels.numel()
        self.rows = (rows if is_whole else rows.index_select(0, self.index)).to(self.input_dtype)
        self._buffers: dict[str, Tensor] = {}
        # float16 logits suffice if the gradients are bfloat16, which has fewer significant bits.
        is_rounded = hidden.dtype == head.weight.dtype == torch.bfloat16
        kept_dtype = torch.float16 if is_rounded and self.tile_dtype == torch.float32 else self.tile_dtype
        self.keeps_in_place = keeps_logits and kept_dtype == self.tile_dtype
        #: Whether the kernels read the stored float16 distances directly, so that backward needs no tile of logits.
        self.reads_kept = keeps_logits and not on_cpu and kept_dtype == torch.float16
        self.reads_kept &= not head.softcap and head.bias is None
        grad_bytes = hidden_size * head.weight.dtype.itemsize
        size = _TileSize(self, kept_dtype, grad_bytes, keeps_logits, only_fitting)
        self._chunk_rows, self._chunk_columns = size.shape(memory_budget, converts_weight_grad or keeps_logits)
        self.kept_logits = KeptLogits(
            self.rows.shape[0], self.vocab, self._chunk_columns, grad_bytes, kept_dtype, only_fitting=only_fitting
        )

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of the labelled rows and the labels in each. All slices except the last have the same size."""
        for begin in range(0, self.rows.shape[0], self._chunk_rows):
            rows = slice(begin, min(begin + self._chunk_rows, self.rows.shape[0]))
            yield rows, self.labels[rows]

    def columns(self) -> Iterator[tuple[int, int]]:
        """Yields ``(first, end)`` for each part of the vocabulary: columns ``first`` to ``end - 1``."""
        for first in range(0, self.vocab, self._chunk_columns):
            yield first, min(first + self._chunk_columns, self.vocab)

    def weight_rows(self, first: int, end: int) -> Tensor:
        """Returns rows ``first`` to ``end - 1`` of the head's weight, converted to the dtype of the matmul inputs."""
        part = self.head.weight[first:end]
        if part.dtype == self.input_dtype:
            return part
        return self._buffer("weight", part.shape, self.input_dtype).copy_(part)

    def as_input(self, grad: Tensor) -> Tensor:
        """Returns the gradient of a tile in ``input_dtype``, the dtype of the matmul inputs."""
        if grad.dtype == self.input_dtype:
            return grad
        return self._buffer("grad input", grad.shape, self.input_dtype).copy_(grad)

    def logits(
        self, rows: slice, weight_rows: Tensor, first: int, end: int, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the logits of a tile, and the tanh that the softcap computes. Without a softcap, the tanh is None.

        Args:
            rows: Slice of the labelled rows.
            weight_rows: Result of ``self.weight_rows(first, end)``.
            first: First column of the tile.
            end: Column after the last column of the tile.
            out: Tensor for the logits; None: a buffer, which the next tile overwrites. The tanh always lies in such a
                buffer.
        """
        if out is None:
            out = self._buffer("logits", (rows.stop - rows.start, end - first))
        head = self.head
        raw = self._buffer("tanh", out.shape) if head.softcap else out
        bias = None if head.bias is None else head.bias[first:end].to(raw.dtype)
        scaled_matmul(self.rows[rows], weight_rows.T, raw, head.inner_scale, bias)
        if not head.softcap:
            return out, None
        raw.tanh_()
        torch.mul(raw, head.outer_scale, out=out)
        return out, raw

    def grad_target(self, logits: Tensor, *, is_input: bool) -> Tensor:
        """Returns the tensor to which the gradient of a tile is written.

        By default, this tensor is ``logits``. With ``is_input``, the gradient is used only as a matmul input, and is
        written in ``input_dtype``. If ``logits`` have another dtype, the tensor is then a buffer.
        """
        if not is_input or logits.dtype == self.input_dtype:
            return logits
        return self._buffer("grad input", logits.shape, self.input_dtype)

    def restored_logits(self, memory: Tensor, rows: slice, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Returns the kept logits of a tile, and the tanh values of the softcap.

        Without a softcap, the second result is None.
        """
        if self.keeps_in_place:
            logits = self.kept_logits.tile(memory, rows, first, end)
        else:
            out = self._buffer("logits", (rows.stop - rows.start, end - first))
            logits = self.kept_logits.restore(memory, rows, first, end, out)
        if not self.head.softcap:
            return logits, None
        return logits, torch.mul(logits, 1 / self.head.outer_scale, out=self._buffer("tanh", logits.shape))

    def add_weight_grad(self, target: Tensor, grad: Tensor, rows: slice, *, is_first: bool, is_last: bool) -> None:
        """Adds ``grad.T @ self.rows[rows]`` to ``target``, the gradient of a slice of the weight.

        Call this method for each slice of rows from ``chunks``. ``target`` holds the sum only after the last call
        (``is_last``).
        """
        # A single product may be rounded directly; the sum of several products is formed in float32.
        is_direct = target.dtype == (grad.dtype if is_first and is_last else self.like.dtype)
        total = target if is_direct else self._buffer("weight grad", target.shape, self.like.dtype)
        accumulate(total, grad.T, self.rows[rows], is_first=is_first)
        if is_last and not is_direct:
            target.copy_(total)

    def add_bias_grad(self, target: Tensor, grad: Tensor, *, is_first: bool, is_last: bool) -> None:
        """Computes the gradient of the elements of ``bias`` that a tile covers: the sum of ``grad`` over all rows.

        Call this method for each slice of rows from ``chunks``. The sum is formed in a buffer. The last call
        (``is_last``) writes the sum to ``target``.
        """
        total = self._buffer("bias grad", (1, target.shape[0]), self.like.dtype)[0]
        if is_first:
            total.zero_()
        total.add_(grad.sum(0, dtype=total.dtype))
        if is_last:
            target.copy_(total)

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Returns an uninitialised matrix, by default in the tile's dtype. Calls with the same name share memory."""
        rows, columns = shape
        memory = self._buffers.get(name)
        if memory is None or memory.numel() < rows * columns:
            memory = self._buffers[name] = self.like.new_empty(rows * columns, dtype=dtype or self.tile_dtype)
        return memory[: rows * columns].view(rows, columns)


def labelled_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """Returns the flat indices of the labels to score, ``[n]``. If labels are on a GPU, the host waits for the GPU."""
    return (labels.reshape(-1) != ignore_index).nonzero().squeeze(-1)


def scatter_rows(rows: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Returns zeros in the shape of ``like``, with ``rows`` written to the flat row indices ``index``."""
    rows = rows.to(like.dtype)
    if rows.numel() == like.numel():
        return rows.view(like.shape)
    full = torch.zeros_like(like, memory_format=torch.contiguous_format)
    full.view(-1, like.shape[-1])[index] = rows
    return full


class _TileSize:
    """Computes the number of rows and columns of a tile, so that the tile fits into a memory budget.

    ``kept_dtype`` is the dtype of kept logits. ``TiledRows`` explains ``keeps_logits``. ``KeptLogits`` explains
    ``grad_bytes`` and ``only_fitting``.
    """

    def __init__(
        self, rows: TiledRows, kept_dtype: torch.dtype, grad_bytes: int, keeps_logits: bool, only_fitting: bool
    ) -> None:
        head, count = rows.head, rows.rows.shape[0]
        self._rows, self._on_cpu, self._keeps = rows, is_on_cpu(rows.rows), keeps_logits
        tile, narrow = rows.tile_dtype.itemsize, rows.input_dtype.itemsize
        keeps_all = not only_fitting or count * kept_dtype.itemsize <= grad_bytes
        planes = (not (rows.keeps_in_place and keeps_all)) + bool(head.softcap)
        # A gradient in another dtype than the tile takes a separate tensor, unless backward has no tile of logits.
        has_narrow = rows.input_dtype != rows.tile_dtype and not rows.reads_kept
        self._per_element = planes * tile + has_narrow * narrow
        self._per_column = (head.weight.dtype != rows.input_dtype) * narrow * head.weight.shape[1]
        if keeps_logits:
            self._per_column += min(count * kept_dtype.itemsize, grad_bytes)  # offset of the logits in ``KeptLogits``

    def shape(self, budget: int, has_weight_grad: bool) -> tuple[int, int]:
        """Returns the number of rows and columns of a tile.

        ``budget`` is the memory budget in bytes. ``has_weight_grad`` says whether the gradient of ``head.weight`` is
        computed in tiles of this shape. If logits are kept, forward and backward must pass the same arguments, so that
        their tiles have the same shape.
        """
        rows, head = self._rows, self._rows.head
        count, hidden_size = rows.rows.shape
        sum_bytes = has_weight_grad * (head.weight.dtype != rows.like.dtype) * rows.like.dtype.itemsize * hidden_size
        if self._keeps:
            budget = min(budget, _CPU_KEPT_BYTES if self._on_cpu else GPU_KEPT_BYTES)
        sizes = {"per_element": self._per_element, "per_column": self._per_column, "budget": budget}
        if self._on_cpu:
            sizes["per_column"] += sum_bytes
            return tile_shape(count, rows.vocab, **sizes, preferred=_CPU_TILE_BYTES)
        device = rows.rows.device
        sizes["multiprocessors"] = cuda.multiprocessors(device)
        height, width = gpu_tile_shape(count, rows.vocab, hidden_size, **sizes)
        # A gradient of weight that is one product is rounded directly; otherwise it is summed in a float32 tensor.
        if sum_bytes and (height < count or head.weight.dtype != rows.input_dtype):
            sizes["per_column"] += sum_bytes
            height, width = gpu_tile_shape(count, rows.vocab, hidden_size, **sizes)
        return height, width


def head_grad_memory(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns uninitialised memory for the gradient of a head, on the device of ``like``.

    On a CPU, the memory comes from ``reused_memory``.
    """
    return reused_memory(shape, dtype) if is_on_cpu(like) else like.new_empty(shape, dtype=dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _typed(memory: Tensor, begin: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns a matrix that is a view of the bytes of ``memory``, starting at byte ``begin``."""
    return memory[begin : begin + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)
