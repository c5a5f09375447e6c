"""Predicts the time and the memory of a loss from a few rates of a machine, such as FLOP per second (a roofline).

A method is a way to compute the loss. It is described as a list of stages, the parts of its work. All methods use the
same rates. ``mpo_ext.plan.steps`` adds the layers of the model.

docs/performance.md compares the predictions with measurements on a CPU. Predictions for GPUs have not been compared
with measurements.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from mpo_ext.checks import check_choice
from mpo_ext.ops.tile_shape import BLOCK_ELEMENTS, GPU_KEPT_BYTES, gpu_memory_budget, gpu_tile_shape, product_waves
from mpo_ext.plan.machines import Machine, Stage

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_TILES = gpu_memory_budget(80e9)  #: Default memory_budget of linear_mpo_loss on a GPU of 80 GB, in bytes.
_CPU_TILES = 16 << 20
_TRL_ROWS, _TRL_COLUMNS = 4096, 32768  # size of a tile in TRL's ChunkedLogProb


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """The predicted cost of a loss or of a training step.

    Attributes:
        seconds: Total seconds of all stages.
        memory: Peak bytes. For a loss, gradients are included, and inputs are not. For a step, parameters and
            optimizer state are included.
        parts: Dict from the name of a stage to its seconds.
    """

    seconds: float
    memory: float
    parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossShape:
    """Sizes and dtypes of a loss.

    Attributes:
        pairs: Number of pairs, B; there are 2 B sequences.
        tokens: Number of tokens of each sequence, T.
        vocab: Size of the vocabulary, V.
        hidden: Size of the hidden states, D; None if the inputs of the loss are logits.
        share: Fraction of the rows (token positions) that have a label.
        dtype: Dtype of the inputs: the logits, or the hidden states and the head.
        matmul_dtype: Dtype to which mpo_ext converts the inputs of matmuls on a CPU; None: ``dtype``.
    """

    pairs: int = 1
    tokens: int
    vocab: int
    hidden: int | None = None
    share: float = 1.0
    dtype: str = "bfloat16"
    matmul_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("pairs", "tokens", "vocab") + (() if self.hidden is None else ("hidden",)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")
        for dtype in (self.dtype, *([] if self.matmul_dtype is None else [self.matmul_dtype])):
            check_choice("dtype", dtype, SIZES)

    @property
    def rows(self) -> int:
        """Number of rows (token positions), ``2 B T``."""
        return 2 * self.pairs * self.tokens

    @property
    def labelled(self) -> int:
        """Number of rows with a label."""
        return 2 * self.pairs * round(self.tokens * self.share)

    @property
    def hidden_size(self) -> int:
        """Size of the hidden states, D; raises ``ValueError`` if the inputs of the loss are logits."""
        if self.hidden is None:
            raise ValueError("hidden must be given for a loss from hidden states, got None")
        return self.hidden

    @property
    def size(self) -> int:
        """Bytes of an element of ``dtype``."""
        return SIZES[self.dtype]


Parts = tuple[list[Stage], float]  # the stages, and the peak bytes beyond inputs, gradients included
_Method = Callable[[LossShape, Machine], Parts]


def logits_ours(loss: LossShape, machine: Machine) -> Parts:
    labelled, every = loss.labelled * loss.vocab, loss.rows * loss.vocab
    # On a CPU, the gradients of ignored rows are zero pages that are never touched.
    written = loss.size * (every if machine.is_gpu else labelled)
    forward = Stage(name="forward", moved=loss.size * labelled, kernel=labelled / 2)
    backward = Stage(name="backward", moved=loss.size * labelled + written, kernel=labelled / 2, huge=written)
    return [forward, backward], written


def _logits_in_place(loss: LossShape, machine: Machine) -> Parts:
    labelled, every = loss.labelled * loss.vocab, loss.rows * loss.vocab
    forward = Stage(name="forward", moved=loss.size * labelled, kernel=labelled / 2)
    return [forward, Stage(name="backward", moved=loss.size * (labelled + every), kernel=labelled / 2)], 0.0


def _logits_eager(loss: LossShape, machine: Machine) -> Parts:
    # Three new float32 tensors: log_softmax, the zeros that gather's backward fills, and the gradient. Half precision
    # adds a widened copy of the logits and the rounded gradient.
    logits, size = loss.rows * loss.vocab, loss.size
    wide = size < 4
    new = 12 + (4 + size if wide else 0)
    moved = size + 4 + 4 + 4 + 12 + (4 + 4 + size if wide else 0)
    stage = Stage(name="forward and backward", moved=moved * logits, softmax=logits, fresh=new * logits)
    return [stage], (16 if wide else 12) * logits


def _logits_compiled(loss: LossShape, machine: Machine) -> Parts:
    # Three reads of the logits (maximum, sum, result), the kept float32 log_softmax, and the gradient.
    logits, size = loss.rows * loss.vocab, loss.size
    moved = 3 * size + 4 + 4 + size
    stage = Stage(name="forward and backward", moved=moved * logits, softmax=1.5 * logits, fresh=(4 + size) * logits)
    return [stage], (4 + size) * logits


def head_products(loss: LossShape, rows: int, count: float, name: str, dtype: str) -> Stage:
    """Returns a stage of ``count`` matrix products. Each has ``rows * vocab * hidden_size`` multiplications.

    Each product computes the logits, the gradient of the hidden states or the gradient of the head. Its memory traffic
    is one tensor of the head's size. ``dtype`` is the dtype of the inputs.
    """
    flop = 2.0 * count * rows * loss.vocab * loss.hidden_size
    moved = count * SIZES[dtype] * loss.vocab * loss.hidden_size
    return Stage(name=name, flop=flop, dtype=dtype, shortest=min(rows, loss.vocab, loss.hidden_size), moved=moved)


def loss_gradients(loss: LossShape, *, has_head: bool = True) -> float:
    return loss.size * loss.hidden_size * (loss.rows + (loss.vocab if has_head else 0))


def _kept_width(loss: LossShape, machine: Machine) -> int:
    """Returns the size in bytes of a logit that is kept between forward and backward.

    For bfloat16 inputs, the size is 2. Otherwise, it is the size of a logit in a tile.
    """
    product = loss.dtype if loss.matmul_dtype is None else loss.matmul_dtype
    width = 4 if machine.is_gpu or product == "float32" else loss.size
    return 2 if loss.dtype == "bfloat16" else width


def _linear_default(loss: LossShape, machine: Machine) -> Parts:
    # On a CPU, forward keeps the logits that fit into the memory of the head's gradient.
    logits, grad = loss.labelled * _kept_width(loss, machine), loss.hidden_size * loss.size
    if machine.is_gpu:
        return _linear_on_gpu(loss, machine)
    kept = min(1.0, grad / logits) if logits else 1.0
    return _linear_ours(loss, machine, products=4 - kept, kept=kept)


def _linear_ours(
    loss: LossShape, machine: Machine, *, products: float, kept: float = 0.0, has_head: bool = True
) -> Parts:
    if machine.is_gpu:
        return _linear_on_gpu(loss, machine, keeps_logits=bool(kept), has_head=has_head)
    product = loss.dtype if loss.matmul_dtype is None else loss.matmul_dtype
    logits = loss.labelled * loss.vocab
    moved = 0.0  # a tile stays in the cache
    widened = 0 if product == loss.dtype else products * (loss.size + SIZES[product]) * loss.vocab * loss.hidden_size
    grads = loss_gradients(loss, has_head=has_head)
    held = grads
    if kept:
        # The head's gradient reuses the memory of the kept logits, which are the tiles or float16 copies of them.
        width = _kept_width(loss, machine)
        is_copied = loss.dtype == "bfloat16" and product == "float32"
        moved += (2 if is_copied else 5) * width * kept * logits
        held += max(width * kept * logits - loss.size * loss.vocab * loss.hidden_size, 0)
    stages = [
        head_products(loss, loss.labelled, products, "matrix products", product),
        Stage(name="kernels", moved=moved, kernel=logits),
        Stage(name="gradients and copies", moved=grads + widened, huge=held),
    ]
    tiles = tile_bytes(loss.labelled, loss.vocab, budget=_CPU_TILES)
    return stages, held + tiles + 8 * loss.labelled * loss.hidden_size


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """The tiles of ``linear_mpo_loss`` on a GPU. A tile holds the logits of some rows for a part of the vocabulary.

    Attributes:
        rows: Number of labelled rows (token positions) of a tile.
        columns: Number of vocabulary entries of a tile.
        chunks: Number of parts into which the labelled rows are divided.
        slices: Number of parts into which the vocabulary is divided.
        bytes: Bytes of the tensors of one tile, such as its logits and their gradient.
    """

    rows: int
    columns: int
    chunks: int
    slices: int
    bytes: int

    @classmethod
    def of(cls, loss: LossShape, machine: Machine, *, keeps_logits: bool) -> GpuTiles:
        """Returns the tiles of a loss with the default memory budget.

        ``keeps_logits`` is True if forward keeps the logits for backward (``recompute=False``).
        """
        budget, rows = gpu_memory_budget(machine.memory), max(loss.labelled, 1)
        is_half, keeps_half = loss.size < 4, keeps_logits and loss.dtype == "bfloat16"
        # A float32 tile, unless forward keeps it, and its half-precision gradient, unless backward has no tile.
        per_element = 4 * (keeps_half or not keeps_logits) + 2 * (is_half and not keeps_half)
        per_column = 0
        if keeps_logits:
            budget = min(budget, GPU_KEPT_BYTES)
            per_column = min(rows * (2 if keeps_half else 4), loss.size * loss.hidden_size)
        sizes = {"per_element": per_element, "per_column": per_column, "budget": budget}
        sizes["multiprocessors"] = machine.multiprocessors
        height, width = gpu_tile_shape(rows, loss.vocab, loss.hidden_size, **sizes)
        return cls(height, width, -(-rows // height), -(-loss.vocab // width), height * width * per_element)


#: Kernels of each tile of ``linear_mpo_loss`` on a GPU, counted by tests/ops/gpu_counts.py: forward and backward.
_TILE_LAUNCHES = {"recompute": 2 + 4, "keep": 7 + 4, "frozen": 4}


def _linear_on_gpu(loss: LossShape, machine: Machine, *, keeps_logits: bool = False, has_head: bool = True) -> Parts:
    """Returns the stages of ``linear_mpo_loss`` on a GPU, and its peak bytes.

    With ``keeps_logits``, forward keeps the logits for backward (``recompute=False``). With ``has_head``, backward
    computes the gradient of the head's weight. ``has_head`` is False for a frozen head.
    """
    tiles = GpuTiles.of(loss, machine, keeps_logits=keeps_logits)
    logits, hidden = loss.labelled * loss.vocab, loss.labelled * loss.hidden_size
    head, size = loss.vocab * loss.hidden_size, loss.size
    kept_size = 2 if loss.dtype == "bfloat16" else 4
    # Bytes per logit. Tiles do not fit into the cache: a matmul writes a tile in float32, and kernels read the tile
    # and write its gradient in the dtype of the inputs.
    if not has_head:
        mode, passes = "frozen", 4 + 4 + size  # forward reads a tile, and reads it again to write its exponentials
    elif not keeps_logits:
        mode, passes = "recompute", 4 + 4 + size
    else:
        is_copied = kept_size == 2  # otherwise the product writes the tile to the memory of the kept logits
        mode, passes = "keep", 4 + is_copied * (4 + kept_size) + kept_size + size
    # All tiles of the vocabulary but the first also read and write the float32 gradient of the hidden states.
    sums = 8 * hidden * (tiles.slices - 1)
    # A frozen head rescales the sums in the last tile, and completes them at the end.
    sums += (4 + size) * hidden + (not has_head) * (8 + 16 + 3 * size) * hidden
    if has_head and tiles.chunks > 1:
        sums += (8 * (tiles.chunks - 1) + size) * head
    products = [("forward", "d hidden"), ("forward", "d hidden", "d weight"), ("forward",)]
    names = products[0] if not has_head else products[1] if keeps_logits else (*products[2], *products[1])
    kernels = _TILE_LAUNCHES[mode] * tiles.chunks * tiles.slices
    stages = [
        Stage(name="matrix products", flop=sum(_wave_flop(loss, tiles, machine, name) for name in names),
              dtype=loss.dtype, moved=len(names) * size * head),
        Stage(name="kernels", moved=passes * logits, kernel=logits, launches=kernels if logits else 0),
        Stage(name="sums of gradients", moved=sums),
    ]  # fmt: skip
    held = float(loss_gradients(loss, has_head=has_head))
    if keeps_logits:
        # As KeptLogits: logits and gradient share memory, with a tile between them, and maxima follow the logits.
        logit_bytes, grad_bytes = kept_size * loss.labelled, size * loss.hidden_size
        kept = max(logit_bytes, grad_bytes) * loss.vocab + min(logit_bytes, grad_bytes) * tiles.columns
        held += kept - size * head + 4 * loss.labelled * tiles.slices * (kept_size == 2)
    held += (4 + size * (loss.labelled < loss.rows)) * hidden  # float32 sums, and a copy of the labelled rows
    return stages, held + tiles.bytes + (4 * tiles.columns * loss.hidden_size if tiles.chunks > 1 else 0)


def _wave_flop(loss: LossShape, tiles: GpuTiles, machine: Machine, name: str) -> float:
    """Returns the FLOP of a matmul over all tiles. Idle multiprocessors count as if they computed.

    ``name`` is "forward" (the logits), "d hidden" or "d weight" (the gradients).
    """
    labelled, vocab, hidden = loss.labelled, loss.vocab, loss.hidden_size
    if not machine.multiprocessors:
        return 2.0 * labelled * vocab * hidden
    total = 0.0
    for rows, n_rows in ((tiles.rows, labelled // tiles.rows), (labelled % tiles.rows, 1)):
        for columns, n_columns in ((tiles.columns, vocab // tiles.columns), (vocab % tiles.columns, 1)):
            shape = {"forward": (rows, columns), "d hidden": (rows, hidden), "d weight": (columns, hidden)}[name]
            inner = rows * columns * hidden // (shape[0] * shape[1]) if rows and columns else 0
            waves = product_waves(*shape, machine.multiprocessors)
            total += n_rows * n_columns * 2.0 * waves * machine.multiprocessors * BLOCK_ELEMENTS * inner
    return total


def tile_bytes(rows: int, vocab: int, *, budget: int, is_half: bool = False, converted: int = 0) -> int:
    """Returns the bytes of the tiles of ``linear_mpo_loss``: ``budget``, or fewer if all logits need less.

    Args:
        rows: Number of labelled rows (token positions).
        vocab: Size of the vocabulary.
        budget: The argument ``memory_budget`` of ``linear_mpo_loss``, in bytes.
        is_half: Whether the inputs of matmuls are half precision. The gradient of a tile is then a separate tensor.
        converted: Bytes of a copy of the head in the dtype of the matmuls; 0 without a copy.
    """
    return min(budget, (6 if is_half else 4) * rows * vocab + converted)


def _linear_of_logits(of_logits: _Method) -> _Method:
    """Returns a function that predicts the costs of a loss from hidden states.

    ``of_logits`` predicts the costs of a loss from logits. The new function adds the costs of computing all logits.
    """

    def method(loss: LossShape, machine: Machine) -> Parts:
        stages, memory = of_logits(loss, machine)
        logits, grads = loss.size * loss.rows * loss.vocab, loss_gradients(loss)
        first = head_products(loss, loss.rows, 3, "matrix products", loss.dtype)
        return [first, Stage(name="logits", moved=3 * logits, fresh=logits + grads), *stages], memory + logits + grads

    return method


def _linear_trl(loss: LossShape, machine: Machine) -> Parts:
    grads = loss_gradients(loss)
    sums = 4 * loss.hidden_size * (loss.rows + loss.vocab)  # float32 for every dtype
    if machine.is_gpu:
        logits = loss.labelled * loss.vocab
        tile = loss.size * min(loss.labelled, _TRL_ROWS) * min(loss.vocab, _TRL_COLUMNS)
        kernels = Stage(name="kernels", moved=7 * loss.size * logits, kernel=logits)
        return [head_products(loss, loss.labelled, 4, "matrix products", loss.dtype), kernels], grads + sums + tile
    # On a CPU, torch operations score every row. Each operation creates a float32 tensor: 4 forward, 10 backward. The
    # two matrix products of the backward have float32 inputs.
    logits = loss.rows * loss.vocab
    tile = min(loss.rows, _TRL_ROWS) * min(loss.vocab, _TRL_COLUMNS)
    stages = [
        head_products(loss, loss.rows, 2, "matrix products of logits", loss.dtype),
        head_products(loss, loss.rows, 2, "matrix products of gradients", "float32"),
        Stage(name="operations", moved=14 * 8 * logits, softmax=logits, fresh=14 * 4 * logits),
        Stage(name="gradients", moved=3 * sums, fresh=sums + (grads if loss.size < 4 else 0)),
    ]
    return stages, sums + (grads if loss.size < 4 else 0) + (loss.size + 6 * 4) * tile


def _linear_cce(loss: LossShape, machine: Machine) -> Parts:
    grads = loss_gradients(loss)
    if machine.is_gpu:  # tiles stay on the chip; the filter of small gradients is not modelled
        return [head_products(loss, loss.labelled, 4, "matrix products", loss.dtype)], grads
    # On a CPU, the torch_compile implementation drops ignored rows and materialises the logits.
    logits = loss.labelled * loss.vocab
    stages = [
        head_products(loss, loss.labelled, 3, "matrix products", loss.dtype),
        Stage(name="loss", moved=6 * loss.size * logits, softmax=1.5 * logits, fresh=2 * loss.size * logits),
        Stage(name="gradients", moved=grads, fresh=grads),
    ]
    return stages, grads + 2 * loss.size * logits


def _linear_torch(loss: LossShape, machine: Machine) -> Parts:
    # F.linear_cross_entropy with reduction="none" works on chunks of rows, which backward recomputes.
    logits, grads = loss.rows * loss.vocab, loss_gradients(loss)
    stages = [
        head_products(loss, loss.rows, 4, "matrix products", loss.dtype),
        Stage(name="loss", moved=7 * 4 * logits, softmax=1.5 * logits),
        Stage(name="gradients", moved=grads, fresh=grads),
    ]
    return stages, grads + _CPU_TILES


def _linear_liger(loss: LossShape, machine: Machine) -> Parts:
    # A chunk is one pair, with its logits, their float32 log_softmax, and the gradients of both.
    logits, pair, grads = loss.rows * loss.vocab, 2 * loss.tokens * loss.vocab, loss_gradients(loss)
    stages = [
        head_products(loss, loss.rows, 3, "matrix products", loss.dtype),
        Stage(name="loss", moved=2 * 16 * logits, softmax=logits, fresh=(2 * loss.size + 8) * logits),
        Stage(name="gradients", moved=3 * grads, fresh=2 * grads),
    ]
    return stages, 2 * grads + (2 * loss.size + 8) * pair


#: Methods that start from logits, by their name in benchmarks.logits.
LOGITS: dict[str, _Method] = {
    "mpo_ext": logits_ours,
    "mpo_ext, reuse_logits": _logits_in_place,
    "torch.compile": _logits_compiled,
    "eager": _logits_eager,
}

#: Methods that start from hidden states; a method that benchmarks.linear measures has the same name there.
LINEAR: dict[str, _Method] = {
    "mpo_ext": _linear_default,
    "mpo_ext, recompute=True": functools.partial(_linear_ours, products=4),
    "mpo_ext, recompute=False": functools.partial(_linear_ours, products=3, kept=1.0),
    "mpo_ext, frozen head": functools.partial(_linear_ours, products=2, has_head=False),
    "eager": _linear_of_logits(_logits_eager),
    "torch.compile": _linear_of_logits(_logits_compiled),
    "mpo_ext, from logits": _linear_of_logits(logits_ours),
    "mpo_ext, from logits, reuse_logits": _linear_of_logits(_logits_in_place),
    "F.linear_cross_entropy": _linear_torch,
    "trl ChunkedLogProb": _linear_trl,
    "cut-cross-entropy torch_compile": _linear_cce,
    "liger chunked DPO": _linear_liger,
}


def loss_cost(method: str, loss: LossShape, machine: Machine) -> Cost:
    """Returns the predicted cost of the MPO loss, forward and backward, on the machine.

    ``method`` is a key of ``LINEAR``, or of ``LOGITS`` if ``loss.hidden`` is None.
    """
    methods = LOGITS if loss.hidden is None else LINEAR
    check_choice("method", method, methods)
    stages, memory = methods[method](loss, machine)
    return cost_of(stages, memory, machine)


def cost_of(stages: Sequence[Stage], memory: float, machine: Machine) -> Cost:
    parts = {stage.name: machine.seconds(stage) for stage in stages}
    if len(parts) != len(stages):
        raise ValueError(f"stages must have different names, got {[stage.name for stage in stages]}")
    parts["fixed"] = machine.overhead
    return Cost(sum(parts.values()), memory, parts)
