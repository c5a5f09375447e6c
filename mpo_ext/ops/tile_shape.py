"""Computes how many rows and columns a tile of logits has, from the memory budget and the GPU. Needs no torch."""

from __future__ import annotations

#: Largest budget of a tile on a GPU if logits are kept: each column of a tile adds to the memory of kept logits.
GPU_KEPT_BYTES = 384 << 20
_LEAST_GPU_BUDGET, _LARGEST_GPU_BUDGET = 256 << 20, 1 << 30
_GPU_BUDGET_SHARE = 160  # a GPU's default budget is its memory over this number, within these limits
_MIN_COLUMNS = 256  # of a tile, unless the vocabulary is smaller: narrower products are slow
_COLUMN_STEP, _GPU_COLUMN_STEP = 64, 512
_BLOCK_ROWS, _BLOCK_COLUMNS = 128, 256  # part of a product that one multiprocessor computes (cuBLAS on Hopper)
BLOCK_ELEMENTS = _BLOCK_ROWS * _BLOCK_COLUMNS


def gpu_memory_budget(memory: float) -> int:
    """Returns the default memory budget of tiles, in bytes, on a GPU with ``memory`` bytes.

    The budget is 1/160 of the memory (0.5 GiB on an H100), but at least 256 MiB and at most 1 GiB.
    """
    return int(min(max(memory / _GPU_BUDGET_SHARE, _LEAST_GPU_BUDGET), _LARGEST_GPU_BUDGET))


def tile_shape(
    rows: int, vocab: int, *, per_element: int, per_column: int, budget: int, preferred: int, step: int = _COLUMN_STEP
) -> tuple[int, int]:
    """Returns the number of rows and columns of a tile.

    A tile has all rows and as many columns as fit. If fewer than 256 columns would fit, the tile has fewer rows. A
    tile always has at least one row and one column.

    Args:
        rows: Number of labelled rows (token positions).
        vocab: Number of columns of the vocabulary.
        per_element: Bytes per element of a tile.
        per_column: Additional bytes per column of a tile.
        budget: Maximum bytes of a tile: ``columns * (rows * per_element + per_column)``.
        preferred: Maximum bytes of the elements alone, ``rows * columns * per_element``. Larger tiles are not faster.
        step: A number of columns above ``step`` is rounded down to a multiple of ``step``. The whole vocabulary is not
            rounded.
    """
    columns = min(vocab, _MIN_COLUMNS)
    if per_column:  # at most half of the budget for memory that does not depend on the rows
        columns = max(min(columns, budget // (2 * per_column)), 1)
    chunk = max(rows, 1)
    if per_element:
        available = max(min(budget - columns * per_column, preferred), 0)
        pieces = -(-chunk // max(available // (columns * per_element), 1))
        chunk = -(-chunk // pieces)
    cost = chunk * per_element + per_column
    widest = min(budget // cost if cost else vocab, preferred // (chunk * per_element) if per_element else vocab)
    if widest >= vocab:
        return chunk, vocab
    return chunk, max(widest // step * step, min(widest, step), 1)


def gpu_tile_shape(
    rows: int, vocab: int, hidden_size: int, *, per_element: int, per_column: int, budget: int, multiprocessors: int
) -> tuple[int, int]:
    """Returns the number of rows and columns of a tile on a GPU.

    ``multiprocessors`` is the number of multiprocessors of the GPU. With 0 (unknown), the tile has as many columns as
    fit. Otherwise, ``fewest_waves`` chooses the number of columns. The other arguments are those of ``tile_shape``.
    """
    sizes = {"per_element": per_element, "per_column": per_column, "budget": budget, "preferred": budget}
    height, width = tile_shape(rows, vocab, **sizes, step=_GPU_COLUMN_STEP)
    if width >= vocab or not multiprocessors:
        return height, width
    return height, fewest_waves(height, vocab, hidden_size, width, multiprocessors)


def product_waves(height: int, width: int, multiprocessors: int) -> int:
    """Returns the number of waves in which a GPU computes a matrix product of shape ``[height, width]``.

    In a wave, each multiprocessor computes a block of 128 x 256 elements.
    """
    blocks = -(-height // _BLOCK_ROWS) * -(-width // _BLOCK_COLUMNS)
    return -(-blocks // multiprocessors)


def fewest_waves(rows: int, vocab: int, hidden_size: int, widest: int, multiprocessors: int) -> int:
    """Returns the number of columns of a tile for which the matmuls on a GPU take the least time.

    A GPU computes a matmul in waves (see ``product_waves``). A wave takes its full time even if some multiprocessors
    are idle. ``widest`` is the largest number of columns that fits. The result is a multiple of 512 above 3/4 of
    ``widest``. If there is no such multiple, the result is ``widest``.
    """

    def seconds(columns: int) -> int:
        """Returns the total time of the matmuls (logits and gradient of the weight) in an arbitrary unit."""
        total = 0
        for width, count in ((columns, vocab // columns), (vocab % columns, 1)):
            logits = product_waves(rows, width, multiprocessors) * hidden_size
            total += count * (logits + product_waves(width, hidden_size, multiprocessors) * rows)
        return total

    largest = widest // _GPU_COLUMN_STEP * _GPU_COLUMN_STEP
    candidates = range(largest, widest * 3 // 4, -_GPU_COLUMN_STEP)  # descending, so that min prefers wide tiles
    return min(candidates, key=seconds, default=widest)
