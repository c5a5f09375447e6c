"""The sizes of tiles of logits: how many rows and columns fit a memory budget and keep a GPU busy. Needs no torch."""

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
    """Returns the default memory budget of tiles on a GPU with ``memory`` bytes, in bytes.

    Each tile reads and writes the float32 gradient of all hidden states, so larger tiles save time. The budget is
    1/160 of the memory (0.5 GiB on an H100), but at least 256 MiB and at most 1 GiB.
    """
    return int(min(max(memory / _GPU_BUDGET_SHARE, _LEAST_GPU_BUDGET), _LARGEST_GPU_BUDGET))


def tile_shape(
    rows: int, vocab: int, *, per_element: int, per_column: int, budget: int, preferred: int, step: int = _COLUMN_STEP
) -> tuple[int, int]:
    """Returns the number of rows and columns of a tile.

    A tile has all rows and as many columns as fit. If fewer than 256 columns would fit, it has fewer rows. It has at
    least one row and one column, whatever the budget.

    Args:
        rows: Number of labelled rows.
        vocab: Number of columns of the vocabulary.
        per_element: Bytes per element of a tile.
        per_column: Further bytes per column of a tile.
        budget: Bytes that a tile may take.
        preferred: Number of bytes ``rows * columns * per_element`` above which larger tiles are not faster.
        step: The number of columns is a multiple of ``step``, unless it is smaller or is the whole vocabulary.
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
    """Returns the rows and columns of a tile on a GPU. The arguments are those of ``tile_shape`` and ``fewest_waves``.

    If ``multiprocessors`` is 0 (unknown), the number of columns is the largest that fits.
    """
    sizes = {"per_element": per_element, "per_column": per_column, "budget": budget, "preferred": budget}
    height, width = tile_shape(rows, vocab, **sizes, step=_GPU_COLUMN_STEP)
    if width >= vocab or not multiprocessors:
        return height, width
    return height, fewest_waves(height, vocab, hidden_size, width, multiprocessors)


def product_waves(height: int, width: int, multiprocessors: int) -> int:
    """Returns the number of waves in which a GPU computes a product ``[height, width]``.

    A multiprocessor computes a block of 128 x 256 elements at a time. In a wave, each multiprocessor computes a block.
    """
    blocks = -(-height // _BLOCK_ROWS) * -(-width // _BLOCK_COLUMNS)
    return -(-blocks // multiprocessors)


def fewest_waves(rows: int, vocab: int, hidden_size: int, widest: int, multiprocessors: int) -> int:
    """Returns the number of columns of a tile, at most ``widest``, that keeps the multiprocessors of a GPU busiest.

    A wave takes the same time however few multiprocessors work in it. The result is a multiple of 512 above 3/4 of
    ``widest``, or ``widest`` if no such multiple exists.
    """

    def seconds(columns: int) -> int:
        """Returns the time of the logits and of the gradient of weight in all tiles, in arbitrary units."""
        total = 0
        for width, count in ((columns, vocab // columns), (vocab % columns, 1)):
            logits = product_waves(rows, width, multiprocessors) * hidden_size
            total += count * (logits + product_waves(width, hidden_size, multiprocessors) * rows)
        return total

    largest = widest // _GPU_COLUMN_STEP * _GPU_COLUMN_STEP
    candidates = range(largest, widest * 3 // 4, -_GPU_COLUMN_STEP)  # descending, so that min prefers wide tiles
    return min(candidates, key=seconds, default=widest)
