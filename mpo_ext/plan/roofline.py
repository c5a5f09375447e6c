"""What a loss or a training step costs, predicted: a roofline over few rates of a machine. Nothing here measures.

A method is a list of stages. A stage takes as long as its matrix products, its memory traffic or its arithmetic takes,
whichever is longest; what is first written to fresh memory of the system costs page faults on top, on a CPU. The rates
are those of the machine and the same for every method; nothing is fitted to a method. docs/performance.md compares the
predictions with measurements on a CPU; those for GPUs are compared with nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

#: Shares of a GPU's peak that large kernels are taken to reach: assumptions, not measurements.
BANDWIDTH_SHARE, PRODUCT_SHARE = 0.9, 0.7

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_TILES = 256 << 20  #: Default memory_budget of linear_mpo_loss on a GPU, in bytes.
_CPU_TILES = 16 << 20
_TRL_ROWS, _TRL_COLUMNS = 4096, 32768  # of a tile of TRL's ChunkedLogProb


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of a machine. ``inf`` is a cost that it does not have.

    Attributes:
        name: For tables.
        is_gpu: Whether methods do what they do on a GPU.
        bandwidth: Bytes per second, read or written, of memory that is in use already.
        products: FLOP per second of large matrix products, by dtype.
        kernel_rate: Logits per second that our kernels compute, forward and backward together, where memory keeps up.
        softmax_rate: Logits per second that torch's log_softmax and its backward compute in cache, together.
        fresh: Bytes per second that small pages of fresh memory cost besides being written.
        huge: The same for huge pages.
        overhead: Seconds that forward and backward of a loss take whatever their size.
        source: Where the rates come from.
    """

    name: str
    is_gpu: bool
    bandwidth: float
    products: Mapping[str, float]
    kernel_rate: float = math.inf
    softmax_rate: float = math.inf
    fresh: float = math.inf
    huge: float = math.inf
    overhead: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        rates = {name: getattr(self, name) for name in ("bandwidth", "kernel_rate", "softmax_rate", "fresh", "huge")}
        rates |= {f"products[{name!r}]": rate for name, rate in self.products.items()}
        for name, rate in rates.items():
            if not rate > 0:  # also catches NaN
                raise ValueError(f"{name} must be positive, got {rate}")
        if not 0 <= self.overhead < math.inf:
            raise ValueError(f"overhead must be finite and not negative, got {self.overhead}")

    def seconds(self, stage: "Stage") -> float:
        """Time of a stage.

        Raises:
            ValueError: If no rate is known for the dtype of its products.
        """
        if stage.flop and stage.dtype not in self.products:
            raise ValueError(f"dtype must be one of {', '.join(self.products)} on {self.name}, got {stage.dtype!r}")
        work = max(
            stage.flop / self.products[stage.dtype] if stage.flop else 0.0,
            stage.moved / self.bandwidth,
            stage.kernel / self.kernel_rate + stage.softmax / self.softmax_rate,
        )
        return work + stage.fresh / self.fresh + stage.huge / self.huge


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the work that overlaps with no other.

    Attributes:
        name: Of the part.
        flop: Floating-point operations of its matrix products.
        dtype: Of their operands.
        moved: Bytes read and written.
        kernel: Logits that our kernels take forward and backward; one direction counts half.
        softmax: Logits that torch's softmax takes forward and backward; one direction counts half.
        fresh: Bytes of small pages of fresh memory.
        huge: Bytes of huge pages of fresh memory.
    """

    name: str
    flop: float = 0.0
    dtype: str = "float32"
    moved: float = 0.0
    kernel: float = 0.0
    softmax: float = 0.0
    fresh: float = 0.0
    huge: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """A prediction.

    Attributes:
        seconds: Of all stages.
        memory: Peak bytes beyond inputs and parameters; gradients are included.
        parts: Seconds by stage.
    """

    seconds: float
    memory: float
    parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Figures of a vendor's data sheet.

    Attributes:
        bandwidth: Peak bytes per second.
        products: Peak dense FLOP per second, by dtype; of float32 without tensor cores.
        multiprocessors: Number.
        clock: Hertz.
        memory: Bytes.
        source: Name of the data sheet.
        unconfirmed: Figures that are in no document of the vendor that was looked at.
    """

    bandwidth: float
    products: Mapping[str, float]
    multiprocessors: int
    clock: float
    memory: float
    source: str
    unconfirmed: tuple[str, ...] = ()


def _halves(dense: float, float32: float) -> dict[str, float]:
    return {"float32": float32, "bfloat16": dense, "float16": dense}


#: Dense figures: the sheets of Hopper and Blackwell print those with sparsity, twice as much. Clocks are those at
#: which the float32 lanes reach the sheet's float32 peak; the tensor cores of Hopper and Blackwell clock lower.
GPUS = {
    "A100": Gpu(bandwidth=2.039e12, products=_halves(312e12, 19.5e12), multiprocessors=108, clock=1.41e9, memory=80e9,
                source="NVIDIA A100 data sheet, SXM 80 GB; A100 architecture white paper"),
    "H100": Gpu(bandwidth=3.35e12, products=_halves(989e12, 67e12), multiprocessors=132, clock=1.98e9, memory=80e9,
                source="NVIDIA H100 data sheet, SXM; H100 architecture white paper"),
    "H200": Gpu(bandwidth=4.8e12, products=_halves(989e12, 67e12), multiprocessors=132, clock=1.98e9, memory=141e9,
                source="NVIDIA H200 data sheet, SXM", unconfirmed=("multiprocessors", "clock")),
    "B200": Gpu(bandwidth=7.7e12, products=_halves(2250e12, 75e12), multiprocessors=148, clock=1.98e9, memory=180e9,
                source="NVIDIA Blackwell data sheet, HGX B200", unconfirmed=("multiprocessors", "clock")),
}  # fmt: skip


def gpu(name: str) -> Machine:
    """The machine that a data sheet promises, at ``BANDWIDTH_SHARE`` and ``PRODUCT_SHARE`` of its peaks.

    Raises:
        ValueError: If the GPU is not in ``GPUS``.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    sheet = GPUS[name]
    exponentials = 16 * sheet.multiprocessors * sheet.clock  # a logit takes one forward and one backward
    return dataclasses.replace(
        peaks(sheet.bandwidth, sheet.products, name), kernel_rate=exponentials / 2, source=sheet.source
    )


def peaks(bandwidth: float, products: Mapping[str, float], name: str = "GPU") -> Machine:
    """A GPU of these peaks: bytes per second, and FLOP per second by dtype; the same shares of them are reached."""
    return Machine(
        name=name,
        is_gpu=True,
        bandwidth=BANDWIDTH_SHARE * bandwidth,
        products={dtype: PRODUCT_SHARE * rate for dtype, rate in products.items()},
        overhead=50e-6,  # launches of a forward and a backward: a guess
        source="peaks as given",
    )


# ---------------------------------------------------------------------------------------------------------- the losses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a loss is computed of.

    Attributes:
        pairs: B; there are 2 B sequences.
        tokens: T, of each.
        vocab: V.
        hidden: D; None where the loss starts from logits.
        share: Of the rows that have a label.
        dtype: Of the logits, or of hidden states and head.
        product: Of the operands of our matrix products, where not ``dtype``: a CPU may widen them.
    """

    pairs: int = 1
    tokens: int
    vocab: int
    hidden: int | None = None
    share: float = 1.0
    dtype: str = "bfloat16"
    product: str | None = None

    def __post_init__(self) -> None:
        for name in ("pairs", "tokens", "vocab") + (() if self.hidden is None else ("hidden",)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")
        for dtype in (self.dtype, *([] if self.product is None else [self.product])):
            if dtype not in _SIZES:
                raise ValueError(f"dtype must be one of {', '.join(_SIZES)}, got {dtype!r}")

    @property
    def rows(self) -> int:
        """All rows, ``2 B T``."""
        return 2 * self.pairs * self.tokens

    @property
    def labelled(self) -> int:
        """Rows with a label."""
        return 2 * self.pairs * round(self.tokens * self.share)

    @property
    def width(self) -> int:
        """D.

        Raises:
            ValueError: If the loss starts from logits.
        """
        if self.hidden is None:
            raise ValueError("hidden must be given for a loss from hidden states, got None")
        return self.hidden

    @property
    def size(self) -> int:
        """Bytes of a logit, of an element of the hidden states, and of one of the head."""
        return _SIZES[self.dtype]


_Parts = tuple[list[Stage], float]  # the stages, and the peak memory beyond inputs, gradients included


def _logits_ours(loss: Loss, machine: Machine) -> _Parts:
    labelled, every = loss.labelled * loss.vocab, loss.rows * loss.vocab
    # On a CPU ignored rows of the gradient are pages of zeros that nobody touches.
    written = loss.size * (every if machine.is_gpu else labelled)
    forward = Stage(name="forward", moved=loss.size * labelled, kernel=labelled / 2)
    backward = Stage(name="backward", moved=loss.size * labelled + written, kernel=labelled / 2, huge=written)
    return [forward, backward], written


def _logits_in_place(loss: Loss, machine: Machine) -> _Parts:
    labelled, every = loss.labelled * loss.vocab, loss.rows * loss.vocab
    forward = Stage(name="forward", moved=loss.size * labelled, kernel=labelled / 2)
    return [forward, Stage(name="backward", moved=loss.size * (labelled + every), kernel=labelled / 2)], 0.0


def _logits_eager(loss: Loss, machine: Machine) -> _Parts:
    # log_softmax, the zeros that gather's backward fills, the gradient; of half precision a widened copy and the
    # gradient rounded, too. All of them are float32 and none is used twice.
    logits, size = loss.rows * loss.vocab, loss.size
    wide = size < 4
    new = 12 + (4 + size if wide else 0)
    moved = size + 4 + 4 + 4 + 12 + (4 + 4 + size if wide else 0)
    stage = Stage(name="forward and backward", moved=moved * logits, softmax=logits, fresh=new * logits)
    return [stage], (16 if wide else 12) * logits


def _logits_compiled(loss: Loss, machine: Machine) -> _Parts:
    # log_softmax in float32 is kept; reads of the logits for the maximum, the sum, the result; the gradient.
    logits, size = loss.rows * loss.vocab, loss.size
    moved = 3 * size + 4 + 4 + size
    stage = Stage(name="forward and backward", moved=moved * logits, softmax=1.5 * logits, fresh=(4 + size) * logits)
    return [stage], (4 + size) * logits


def _products(loss: Loss, rows: int, count: int, name: str, dtype: str) -> Stage:
    """Matrix products of rows by head; each reads the head or writes something of its size."""
    flop = 2.0 * count * rows * loss.vocab * loss.width
    return Stage(name=name, flop=flop, dtype=dtype, moved=count * _SIZES[dtype] * loss.vocab * loss.width)


def _gradients(loss: Loss, *, has_head: bool = True) -> float:
    return loss.size * loss.width * (loss.rows + (loss.vocab if has_head else 0))


def _linear_ours(loss: Loss, machine: Machine, *, products: int, keeps: bool = False, has_head: bool = True) -> _Parts:
    product = loss.dtype if loss.product is None or machine.is_gpu else loss.product
    logits = loss.labelled * loss.vocab
    # On a GPU a tile is larger than the cache: float32 out of the product, through the kernel, and in half precision
    # into the next ones. On a CPU it stays in the cache.
    tile = {True: 4 * 6 + 2 * 3 if loss.size < 4 else 4 * 8, False: 0}[machine.is_gpu]
    moved = tile * logits
    widened = 0 if product == loss.dtype else products * (loss.size + _SIZES[product]) * loss.vocab * loss.width
    grads = _gradients(loss, has_head=has_head)
    held = grads
    if keeps:
        # The gradient by the head takes the memory of the logits; in half of float32's width they are a copy, else
        # the tile itself.
        width = 4 if machine.is_gpu or product == "float32" else loss.size
        is_narrow = width == 4 and loss.dtype == "bfloat16"
        width = 2 if is_narrow else width
        moved += (2 if is_narrow else 5) * width * logits * (not machine.is_gpu)
        held += max(width * logits - loss.size * loss.vocab * loss.width, 0)
    budget = GPU_TILES if machine.is_gpu else _CPU_TILES
    stages = [
        _products(loss, loss.labelled, products, "matrix products", product),
        Stage(name="kernels", moved=moved, kernel=logits),
        Stage(name="gradients and copies", moved=grads + widened, huge=held),
    ]
    tiles = tile_bytes(loss.labelled, loss.vocab, budget=budget)
    return stages, held + tiles + 8 * loss.labelled * loss.width


def tile_bytes(rows: int, vocab: int, *, budget: int, is_half: bool = False, converted: int = 0) -> int:
    """Memory of the tiles of ``linear_mpo_loss``: its budget, or what all of the logits would take if that is less.

    Args:
        rows: Labelled rows.
        vocab: V.
        budget: ``memory_budget``, in bytes.
        is_half: Whether the operands of the products are of half precision: a tile then has two more copies.
        converted: Bytes of the head in the type of the products, where it is of another.
    """
    return min(budget, (12 if is_half else 4) * rows * vocab + converted)


def _linear_recompute(loss: Loss, machine: Machine) -> _Parts:
    return _linear_ours(loss, machine, products=4)


def _linear_kept(loss: Loss, machine: Machine) -> _Parts:
    return _linear_ours(loss, machine, products=3, keeps=True)


def _linear_frozen(loss: Loss, machine: Machine) -> _Parts:
    return _linear_ours(loss, machine, products=2, has_head=False)


def _linear_of_logits(of_logits: Callable[[Loss, Machine], _Parts]) -> Callable[[Loss, Machine], _Parts]:
    """Materialised logits of all rows, three products, and a method on the logits."""

    def method(loss: Loss, machine: Machine) -> _Parts:
        stages, memory = of_logits(loss, machine)
        logits, grads = loss.size * loss.rows * loss.vocab, _gradients(loss)
        first = _products(loss, loss.rows, 3, "matrix products", loss.dtype)
        return [first, Stage(name="logits", moved=3 * logits, fresh=logits + grads), *stages], memory + logits + grads

    return method


def _linear_trl(loss: Loss, machine: Machine) -> _Parts:
    grads = _gradients(loss)
    sums = 4 * loss.width * (loss.rows + loss.vocab)  # float32, whatever the dtype
    if machine.is_gpu:
        logits = loss.labelled * loss.vocab
        tile = loss.size * min(loss.labelled, _TRL_ROWS) * min(loss.vocab, _TRL_COLUMNS)
        kernels = Stage(name="kernels", moved=7 * loss.size * logits, kernel=logits)
        return [_products(loss, loss.labelled, 4, "matrix products", loss.dtype), kernels], grads + sums + tile
    # On a CPU every row is scored, by torch operations that make a float32 tensor each: 4 forward, 10 backward. The
    # two products of the backward take float32 operands.
    logits = loss.rows * loss.vocab
    tile = min(loss.rows, _TRL_ROWS) * min(loss.vocab, _TRL_COLUMNS)
    stages = [
        _products(loss, loss.rows, 2, "matrix products of logits", loss.dtype),
        _products(loss, loss.rows, 2, "matrix products of gradients", "float32"),
        Stage(name="operations", moved=14 * 8 * logits, softmax=logits, fresh=14 * 4 * logits),
        Stage(name="gradients", moved=3 * sums, fresh=sums + (grads if loss.size < 4 else 0)),
    ]
    return stages, sums + (grads if loss.size < 4 else 0) + (loss.size + 6 * 4) * tile


def _linear_cce(loss: Loss, machine: Machine) -> _Parts:
    grads = _gradients(loss)
    if machine.is_gpu:  # tiles that never leave the chip; its filter of small gradients is left out
        return [_products(loss, loss.labelled, 4, "matrix products", loss.dtype)], grads
    # Its torch_compile: ignored rows are dropped, logits are materialised.
    logits = loss.labelled * loss.vocab
    stages = [
        _products(loss, loss.labelled, 3, "matrix products", loss.dtype),
        Stage(name="loss", moved=6 * loss.size * logits, softmax=1.5 * logits, fresh=2 * loss.size * logits),
        Stage(name="gradients", moved=grads, fresh=grads),
    ]
    return stages, grads + 2 * loss.size * logits


def _linear_torch(loss: Loss, machine: Machine) -> _Parts:
    # F.linear_cross_entropy with reduction="none": chunks of rows, which backward computes again.
    logits, grads = loss.rows * loss.vocab, _gradients(loss)
    stages = [
        _products(loss, loss.rows, 4, "matrix products", loss.dtype),
        Stage(name="loss", moved=7 * 4 * logits, softmax=1.5 * logits),
        Stage(name="gradients", moved=grads, fresh=grads),
    ]
    return stages, grads + _CPU_TILES


def _linear_liger(loss: Loss, machine: Machine) -> _Parts:
    # Chunks are whole pairs: its logits, their log_softmax in float32, and the gradients of both.
    logits, pair, grads = loss.rows * loss.vocab, 2 * loss.tokens * loss.vocab, _gradients(loss)
    stages = [
        _products(loss, loss.rows, 3, "matrix products", loss.dtype),
        Stage(name="loss", moved=2 * 16 * logits, softmax=logits, fresh=(2 * loss.size + 8) * logits),
        Stage(name="gradients", moved=3 * grads, fresh=2 * grads),
    ]
    return stages, 2 * grads + (2 * loss.size + 8) * pair


#: Methods that start from logits, under the names that benchmarks.logits has for them.
LOGITS: dict[str, Callable[[Loss, Machine], _Parts]] = {
    "mpo_ext": _logits_ours,
    "mpo_ext, reuse_logits": _logits_in_place,
    "torch.compile": _logits_compiled,
    "eager": _logits_eager,
}

#: Methods that start from hidden states, under the names that benchmarks.linear has for them where it has them.
LINEAR: dict[str, Callable[[Loss, Machine], _Parts]] = {
    "mpo_ext": _linear_recompute,
    "mpo_ext, recompute=False": _linear_kept,
    "mpo_ext, frozen head": _linear_frozen,
    "eager": _linear_of_logits(_logits_eager),
    "torch.compile": _linear_of_logits(_logits_compiled),
    "mpo_ext, from logits": _linear_of_logits(_logits_ours),
    "mpo_ext, from logits, reuse_logits": _linear_of_logits(_logits_in_place),
    "F.linear_cross_entropy": _linear_torch,
    "trl ChunkedLogProb": _linear_trl,
    "cut-cross-entropy torch_compile": _linear_cce,
    "liger chunked DPO": _linear_liger,
}


def loss_cost(method: str, loss: Loss, machine: Machine) -> Cost:
    """Forward and backward of the MPO loss.

    Args:
        method: A key of ``LINEAR`` where ``loss.hidden`` is given, else one of ``LOGITS``.
        loss: What it is computed of.
        machine: On what.

    Raises:
        ValueError: If the method is unknown, or the machine has no rate for the dtype.
    """
    methods = LOGITS if loss.hidden is None else LINEAR
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    stages, memory = methods[method](loss, machine)
    return _cost(stages, memory, machine)


def _cost(stages: Sequence[Stage], memory: float, machine: Machine) -> Cost:
    parts = {stage.name: machine.seconds(stage) for stage in stages}
    if len(parts) != len(stages):
        raise ValueError(f"stages must have different names, got {[stage.name for stage in stages]}")
    parts["fixed"] = machine.overhead
    return Cost(sum(parts.values()), memory, parts)


# ----------------------------------------------------------------------------------------------------- a training step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the cost of a step depends on.

    Attributes:
        parameters: All of them.
        trainable: Those that learn.
        decoder: Weights of the decoder's linear layers, the head left out.
        layers: Of the decoder.
        width: Of the decoder, D.
        vocab: V.
        kept: Bytes that the decoder's layers keep of a position for backward.
        vision: Weights of the linear layers of vision tower and projector.
        vision_layers: Of the tower.
        vision_width: Of the tower.
        vision_kept: Bytes that it keeps of a patch.
        vision_learns: Whether it has a backward.
        head_learns: Whether the head's weight has a gradient.
        dtype: Of the parameters.
        compute: Of the operands of matrix products.
    """

    parameters: int
    trainable: int
    decoder: int
    layers: int
    width: int
    vocab: int
    kept: int = 0
    vision: int = 0
    vision_layers: int = 0
    vision_width: int = 0
    vision_kept: int = 0
    vision_learns: bool = True
    head_learns: bool = True
    dtype: str = "float32"
    compute: str = "bfloat16"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An optimizer step of one device.

    Attributes:
        prompt: Tokens of a prompt, those of its images included.
        response: Tokens of a response, all of them with a label.
        pairs: Of a micro-batch.
        micro_batches: Of the step.
        image_tokens: Of the prompt.
        patches: Of the vision tower for one image token.
        image_size: Patches that attend to each other in the tower; all those of a prompt by default.
        checkpointing: Whether layers are computed again in backward.
        precomputed: Whether the reference costs nothing in a step.
        has_reference: Whether there is one.
        shards: Over how many devices parameters, gradients and optimizer are spread.
    """

    prompt: int
    response: int
    pairs: int = 1
    micro_batches: int = 1
    image_tokens: int = 0
    patches: int = 4
    image_size: int | None = None
    checkpointing: bool = False
    precomputed: bool = False
    has_reference: bool = True
    shards: int = 1


#: How trainers make a step: the method of their loss, and whether the responses share a row with their prompt.
STEPS = {
    "mpo_ext": ("mpo_ext", True),
    "mpo_ext, recompute=False": ("mpo_ext, recompute=False", True),
    "mpo_ext, separate rows": ("mpo_ext", False),
    "mpo_ext, from logits": ("mpo_ext", True),
    "mpo_ext, separate rows, from logits": ("mpo_ext", False),
    "TRL": ("trl ChunkedLogProb", False),
}


def step_cost(trainer: str, model: Model, step: Step, machine: Machine) -> Cost:
    """A training step: layers, loss, reference, gradient norm and AdamW. Communication is left out.

    Args:
        trainer: A key of ``STEPS``.
        model: What is trained.
        step: On what.
        machine: By what.

    Raises:
        ValueError: If the trainer is unknown, or the machine has no rate for the dtype.
    """
    if trainer not in STEPS:
        raise ValueError(f"trainer must be one of {', '.join(STEPS)}, got {trainer!r}")
    method, is_shared = STEPS[trainer]
    row = step.prompt + 2 * step.response if is_shared else step.prompt + step.response
    rows = step.pairs * (1 if is_shared else 2)
    positions = rows * row
    patches = rows * step.image_tokens * step.patches
    passes = 3 + step.checkpointing  # forward, and twice as much backward
    wide = _SIZES[model.compute]

    def layers(name: str, times: float, vision_times: float) -> list[Stage]:
        scores = 4.0 * model.layers * model.width * row * positions
        among = step.image_size or step.image_tokens * step.patches
        vision_scores = 4.0 * model.vision_layers * model.vision_width * among * patches
        decoder = Stage(
            name=f"decoder, {name}",
            flop=times * (2.0 * model.decoder * positions + scores),
            dtype=model.compute,
            moved=times * (model.kept * positions + wide * model.decoder),
            fresh=times * model.kept * positions / 2,
        )
        vision = Stage(
            name=f"vision, {name}",
            flop=vision_times * (2.0 * model.vision * patches + vision_scores),
            dtype=model.compute,
            moved=vision_times * (model.vision_kept * patches + wide * model.vision),
            fresh=vision_times * model.vision_kept * patches / 2,
        )
        return [decoder, vision]

    scored = Loss(
        pairs=step.pairs,
        tokens=row if not is_shared else step.response,
        vocab=model.vocab,
        hidden=model.width,
        share=1.0 if is_shared else step.response / row,
        dtype=model.compute,
    )
    if trainer.endswith("from logits"):
        stages, loss_memory = _logits_of_all(scored, positions, machine)
    else:
        if not model.head_learns and method.startswith("mpo_ext"):
            method = "mpo_ext, frozen head"
        stages, loss_memory = LINEAR[method](scored, machine)
    stages = [*layers("policy", passes, passes if model.vision_learns else 1), *stages]
    if step.has_reference and not step.precomputed:
        stages += layers("reference", 1, 1)
        counted = scored.rows if trainer == "TRL" and not machine.is_gpu else scored.labelled
        stages.append(_products(scored, counted, 1, "head, reference", model.compute))
        if trainer == "TRL" and not machine.is_gpu:
            logits = counted * model.vocab
            stages.append(Stage(name="loss, reference", moved=32 * logits, softmax=logits / 2, fresh=16 * logits))
    one = _cost(stages, 0.0, machine)
    parts = {name: step.micro_batches * seconds for name, seconds in one.parts.items()}

    learnt = _SIZES[model.dtype] * model.trainable / step.shards
    # AdamW reads parameters, gradients and two moments and writes three of them; the norm reads gradients and scales.
    optimizer = Stage(name="optimizer", moved=(7 + 3) * learnt, fresh=learnt)
    parts["optimizer"] = machine.seconds(optimizer)
    weights = _SIZES[model.dtype] * model.parameters / step.shards
    kept: float = model.kept * positions + (model.vision_kept * patches if model.vision_learns else 0)
    if step.checkpointing:
        kept = kept / max(model.layers, 1) + wide * model.layers * model.width * positions
    # A copy as the reference is there unless log-probs were computed before.
    copies = weights if step.has_reference and not step.precomputed else 0.0
    memory = weights + 3 * learnt + copies + kept + loss_memory
    return Cost(sum(parts.values()), memory, parts)


def _logits_of_all(loss: Loss, positions: int, machine: Machine) -> _Parts:
    """The model's own logits of all positions, then ours in place of the labelled rows."""
    stages, _ = _logits_ours(loss, machine)
    every, grads = loss.size * positions * loss.vocab, _gradients(loss)
    products = _products(loss, positions, 3, "matrix products", loss.dtype)
    memory = 2 * every + 2 * loss.size * loss.labelled * loss.vocab + grads
    return [products, Stage(name="logits", moved=2 * every, fresh=2 * every + grads), *stages], memory
