"""How the Triton kernels see rows of logits: 16-byte vectors from aligned addresses, whatever the row's own start.

A row of an odd vocabulary starts off the 16-byte grid. So a row is read from the grid point before its start: position
``a`` along the row stands for column ``a - misalignment``, with a misalignment of less than one vector, and all blocks
of positions but the first and the last need no mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16


class AlignedRows(NamedTuple):
    """Rows from a base that is aligned to 16 bytes.

    Row i starts ``misalignment + (i // inner) * outer_stride + (i % inner) * row_stride`` elements behind it.
    """

    base: Tensor
    misalignment: int
    inner: int
    outer_stride: int
    row_stride: int


def aligned_rows(layout: tuple[Tensor, int, int, int]) -> AlignedRows:
    """Gives an ``ops.RowLayout`` an aligned base."""
    tensor, *strides = layout
    offset = tensor.data_ptr() % VECTOR_BYTES // tensor.element_size()
    if offset == 0:
        return AlignedRows(tensor, 0, *strides)
    # A view from the grid point before: it lies in the same storage, whose own start is aligned.
    base = torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() - offset)
    return AlignedRows(base, offset, *strides)


class Blocks(NamedTuple):
    """How many columns a program takes: ``chunk`` of them, ``block`` at a time, and the warps that do it."""

    block: int
    chunk: int
    num_warps: int

    def count(self, vocab: int, dtype: torch.dtype) -> int:
        """Programs per row; one more vector than the row has, for its misalignment."""
        return triton.cdiv(vocab + VECTOR_BYTES // dtype.itemsize - 1, self.chunk)


def blocks(vocab: int, dtype: torch.dtype) -> Blocks:
    """The rule for block sizes: by vocabulary and dtype alone, so nothing is tuned or compiled again while training.

    A thread holds 32 elements (float32: 16), several 16-byte loads in flight. A row is cut into chunks of four blocks,
    so that a handful of labelled rows fill a GPU as well as thousands do.
    """
    elements_per_warp = 32 * (16 if dtype.itemsize == 4 else 32)
    num_warps = 4
    while num_warps > 1 and elements_per_warp * num_warps // 2 >= vocab:
        num_warps //= 2
    block = elements_per_warp * num_warps
    return Blocks(block, 4 * block, num_warps)


@triton.jit
def row_offset(row, misalignment, inner, outer_stride, row_stride):
    """Elements from the aligned base to the start of a row, in 64 bits: rows * vocab passes 2**31 in practice."""
    row = row.to(tl.int64)
    return misalignment + (row // inner) * outer_stride + (row % inner) * row_stride
