"""Lets Triton kernels read rows of logits in aligned vectors of 16 bytes.

A row may start between two multiples of 16 bytes, for example if the vocabulary size is odd. Kernels therefore number
the elements from the last multiple at or before the start of the row. Column c then has the position ``shift + c``.
For example, ``shift`` is 2 if a float32 row starts 8 bytes after this multiple. Only the first and the last block of
positions need a mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16


class AlignedRows(NamedTuple):
    """The positions of rows in memory, relative to a base address that is aligned to 16 bytes.

    Row i starts ``misalignment + (i // inner) * outer_stride + (i % inner) * row_stride`` elements after the base.
    """

    base: Tensor
    misalignment: int
    inner: int
    outer_stride: int
    row_stride: int


def aligned_rows(layout: tuple[Tensor, int, int, int]) -> AlignedRows:
    """Returns the rows of ``layout`` with a base address that is a multiple of 16 bytes.

    ``layout`` is a ``RowLayout`` of ``mpo_ext.ops.memory``.
    """
    tensor, *strides = layout
    offset = tensor.data_ptr() % VECTOR_BYTES // tensor.element_size()
    if offset == 0:
        return AlignedRows(tensor, 0, *strides)
    # The base is a view of the same storage that starts at the last multiple of 16 bytes before the tensor. The view
    # stays in the storage, because the storage starts at a multiple of 16 bytes.
    base = torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() - offset)
    return AlignedRows(base, offset, *strides)


class Blocks(NamedTuple):
    """The numbers of columns and warps of a Triton program that processes a part of a row."""

    block: int  # number of columns that the program processes at a time
    chunk: int  # number of columns that the program processes in total
    num_warps: int  # number of warps of the program

    def programs(self, vocab: int, dtype: torch.dtype) -> int:
        """Returns the number of programs for a row. It is large enough for any alignment of the row's start."""
        return triton.cdiv(vocab + VECTOR_BYTES // dtype.itemsize - 1, self.chunk)


def blocks(vocab: int, dtype: torch.dtype) -> Blocks:
    """Returns the numbers of columns and warps of a program that processes a part of a row.

    The numbers depend only on the vocabulary and the dtype, so training never recompiles.
    """
    # A thread holds 32 elements (float32: 16), so several 16-byte loads are in flight.
    elements_per_warp = 32 * (16 if dtype.itemsize == 4 else 32)
    num_warps = 4
    while num_warps > 1 and elements_per_warp * num_warps // 2 >= vocab:
        num_warps //= 2
    block = elements_per_warp * num_warps
    # With only four blocks per program, even a few labelled rows have enough programs to fill a GPU.
    return Blocks(block, 4 * block, num_warps)


@triton.jit
def row_offset(row, misalignment, inner, outer_stride, row_stride):
    """Returns the number of elements from the aligned base to the start of a row, as int64."""
    row = row.to(tl.int64)
    return misalignment + (row // inner) * outer_stride + (row % inner) * row_stride
