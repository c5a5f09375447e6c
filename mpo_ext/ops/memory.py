"""Describes tensors to the kernels (addresses, strides, tiles) and allocates memory for gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Number of values in a row's softmax state, which one tile of the vocabulary passes to the next: the maximum, four
#: sums and the logit of the label (csrc/mpo/math.h: RowState).
ROW_STATE = 6
_HUGE_PAGES_BYTES = 1 << 20
REUSED_BYTES = 16 << 20  # memory of a freed tensor of at least this size is kept for the next tensor of similar size
_free_blocks: list[np.ndarray] = []  # at most one; list operations are atomic, so no lock is needed


class Tile(NamedTuple):
    """The part of the vocabulary in a tile of logits, ``[..., columns]``.

    Labels are ids of the whole vocabulary.
    """

    first: int  # id of the first column; tiles are scored in order, and a tile with first 0 ignores the old state
    total: int  # size of the whole vocabulary
    state: Tensor | None  # [rows, ROW_STATE] float64, passed from tile to tile; write_grad ignores it


class VocabShard(NamedTuple):
    """The consecutive vocabulary ids that a rank holds. Each id is a column of the rank's logits."""

    first: int  # vocabulary id of the rank's first column
    total: int  # size of the whole vocabulary


def empty_row_state(labels: Tensor) -> Tensor:
    """Returns the softmax state of each token before the first tile, ``[..., ROW_STATE]``.

    The state is on the device of the labels.
    """
    state = torch.zeros(*labels.shape, ROW_STATE, dtype=torch.float64, device=labels.device)
    state[..., 0] = -math.inf  # the maximum
    return state


class RowLayout(NamedTuple):
    """The positions of rows in memory. A row is the V logits of one token position.

    Row i starts at element ``(i // inner) * outer_stride + (i % inner) * row_stride``.
    """

    tensor: Tensor
    inner: int
    outer_stride: int
    row_stride: int


def row_layout(tensor: Tensor) -> RowLayout:
    """Returns the positions in memory of the rows of a tensor ``[..., V]``.

    A ``RowLayout`` has two strides. If two strides cannot describe the rows, the tensor is copied to contiguous
    memory. The tensor is also copied if the elements of a row are not contiguous.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    # (size, stride) of the leading axes from the right, merged where the strides allow it.
    axes: list[tuple[int, int]] = []
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return row_layout(tensor.contiguous())
    inner, row_stride = axes[0] if axes else (1, 0)
    return RowLayout(tensor, inner, axes[1][1] if len(axes) == 2 else 0, row_stride)


def row_arguments(layout: RowLayout, labels: Tensor, ignore_index: int, tile: Tile | None = None) -> dict[str, object]:
    """Returns the arguments that the kernels token_logp and logits_grad have in common.

    The result holds addresses as plain numbers. The caller must keep the tensors alive until the kernel call returns.
    """
    return {
        "logits": layout.tensor.data_ptr(),
        "labels": labels.data_ptr(),
        "rows": labels.numel(),
        "inner": layout.inner,
        "outer_stride": layout.outer_stride,
        "row_stride": layout.row_stride,
        "vocab": layout.tensor.shape[-1],
        "first": 0 if tile is None else tile.first,
        "total": layout.tensor.shape[-1] if tile is None else tile.total,
        "ignore_index": ignore_index,
        "dtype": str(layout.tensor.dtype).removeprefix("torch."),
    }


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    """Returns the address of each tensor, and 0 for None.

    The caller must keep the tensors alive while it uses the addresses.
    """
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context manager that makes the tensor's device current. Kernels run on the current device."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def is_on_cpu(tensor: Tensor) -> bool:
    """Returns whether a tensor is on the CPU."""
    return tensor.device.type == "cpu"


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype of log-probs: float64 if a tensor is float64, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def fresh_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns a contiguous tensor of zeros on the CPU.

    A tensor of 1 MiB or more comes from numpy, which gets zeroed huge pages from the system. ``torch.zeros`` would
    write every byte, and cause more page faults.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _HUGE_PAGES_BYTES:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(dtype).view(shape)


def reused_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns a contiguous uninitialised tensor on the CPU, in the memory of an earlier freed tensor if possible.

    The memory is for gradients. In new memory, page faults take longer than writing the gradient. The last freed block
    of at least 16 MiB is therefore kept. The next tensor of at least 16 MiB reuses the block if the tensor fits and
    fills at least half of the block. Otherwise, the block is freed. ``empty_cache`` also frees the block.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < REUSED_BYTES:
        return fresh_zeros(shape, dtype)
    try:
        block = _free_blocks.pop()
    except IndexError:
        block = None
    if block is None or not nbytes <= block.nbytes <= 2 * nbytes:
        block = None  # freed before the new block is allocated
        block = np.zeros(nbytes, dtype=np.uint8)
    lease = block[:nbytes]
    weakref.finalize(lease, _keep_block, block).atexit = False
    return torch.from_numpy(lease).view(dtype).view(shape)


def _keep_block(block: np.ndarray) -> None:
    _free_blocks.append(block)
    del _free_blocks[:-1]


def empty_cache() -> None:
    """Frees the CPU memory that mpo_ext keeps between steps. This is at most one gradient of logits or of a head.

    Call it after training if the process continues. GPU memory belongs to torch's allocator and is not affected.
    """
    _free_blocks.clear()
