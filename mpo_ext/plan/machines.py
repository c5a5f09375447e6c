"""Rates of machines, and the time that a stage of work takes on them: the base of ``mpo_ext.plan.roofline``.

A stage takes as long as its matrix products, its memory traffic or its arithmetic, whichever takes longest. On a CPU,
page faults of fresh memory are added. The rates belong to the machine; they are the same for every method.
"""

import dataclasses
import math
from collections.abc import Mapping

#: Fractions of a GPU's peak rates that large kernels are assumed to reach. Not measured.
BANDWIDTH_SHARE, PRODUCT_SHARE = 0.9, 0.7


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the work that does not overlap with any other part.

    Attributes:
        name: Name of the part.
        flop: Floating-point operations of its matrix products.
        dtype: Dtype of the inputs of its matrix products.
        moved: Bytes read and written.
        kernel: Logits that our kernels process forward and backward; one direction counts half.
        softmax: Logits that torch's softmax processes forward and backward; one direction counts half.
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of a machine. A rate of ``inf`` means that the machine spends no time on this kind of work.

    Attributes:
        name: Name in tables.
        is_gpu: Whether methods run their GPU implementation.
        bandwidth: Bytes per second that are read from or written to memory already in use.
        matmul_rates: FLOP per second of large matrix products, by dtype.
        kernel_rate: Logits per second of our kernels, forward and backward together, where memory is not the limit.
        softmax_rate: Logits per second of torch's log_softmax and its backward together, in cache.
        fresh: Bytes per second at which small pages of fresh memory become available; writing them is extra.
        huge: The same rate for huge pages.
        overhead: Seconds of a forward and backward of any size.
        source: Origin of the rates.
    """

    name: str
    is_gpu: bool
    bandwidth: float
    matmul_rates: Mapping[str, float]
    kernel_rate: float = math.inf
    softmax_rate: float = math.inf
    fresh: float = math.inf
    huge: float = math.inf
    overhead: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        rates = {name: getattr(self, name) for name in ("bandwidth", "kernel_rate", "softmax_rate", "fresh", "huge")}
        rates |= {f"matmul_rates[{name!r}]": rate for name, rate in self.matmul_rates.items()}
        for name, rate in rates.items():
            if not rate > 0:  # also catches NaN
                raise ValueError(f"{name} must be positive, got {rate}")
        if not 0 <= self.overhead < math.inf:
            raise ValueError(f"overhead must be finite and not negative, got {self.overhead}")

    def seconds(self, stage: Stage) -> float:
        """Returns the time of a stage.

        Raises:
            ValueError: If the machine has no rate for the dtype of the stage's matrix products.
        """
        if stage.flop and stage.dtype not in self.matmul_rates:
            raise ValueError(
                f"dtype must be one of {', '.join(self.matmul_rates)} on {self.name}, got {stage.dtype!r}"
            )
        work = max(
            stage.flop / self.matmul_rates[stage.dtype] if stage.flop else 0.0,
            stage.moved / self.bandwidth,
            stage.kernel / self.kernel_rate + stage.softmax / self.softmax_rate,
        )
        return work + stage.fresh / self.fresh + stage.huge / self.huge


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """Figures of a GPU from its vendor's data sheet.

    Attributes:
        bandwidth: Peak bytes per second.
        matmul_rates: Peak dense FLOP per second, by dtype; the float32 rate is without tensor cores.
        multiprocessors: Number of multiprocessors.
        clock: Clock rate in hertz.
        memory: Bytes of memory.
        source: Name of the data sheet.
        unconfirmed: Figures that none of the vendor's documents confirmed.
    """

    bandwidth: float
    matmul_rates: Mapping[str, float]
    multiprocessors: int
    clock: float
    memory: float
    source: str
    unconfirmed: tuple[str, ...] = ()


def _rates(half: float, float32: float) -> dict[str, float]:
    return {"float32": float32, "bfloat16": half, "float16": half}


#: Dense figures: the data sheets of Hopper and Blackwell print the figures with sparsity, twice as large. The clocks
#: are those at which the float32 lanes reach the printed float32 peak; the tensor cores of Hopper and Blackwell clock
#: lower.
GPUS = {
    "A100": DataSheet(
        bandwidth=2.039e12, matmul_rates=_rates(312e12, 19.5e12), multiprocessors=108, clock=1.41e9, memory=80e9,
        source="NVIDIA A100 data sheet, SXM 80 GB; A100 architecture white paper",
    ),
    "H100": DataSheet(
        bandwidth=3.35e12, matmul_rates=_rates(989e12, 67e12), multiprocessors=132, clock=1.98e9, memory=80e9,
        source="NVIDIA H100 data sheet, SXM; H100 architecture white paper",
    ),
    "H200": DataSheet(
        bandwidth=4.8e12, matmul_rates=_rates(989e12, 67e12), multiprocessors=132, clock=1.98e9, memory=141e9,
        source="NVIDIA H200 data sheet, SXM", unconfirmed=("multiprocessors", "clock"),
    ),
    "B200": DataSheet(
        bandwidth=7.7e12, matmul_rates=_rates(2250e12, 75e12), multiprocessors=148, clock=1.98e9, memory=180e9,
        source="NVIDIA Blackwell data sheet, HGX B200", unconfirmed=("multiprocessors", "clock"),
    ),
}  # fmt: skip


def gpu(name: str) -> Machine:
    """Returns the machine of a data sheet, at ``BANDWIDTH_SHARE`` and ``PRODUCT_SHARE`` of its peaks.

    Raises:
        ValueError: If ``GPUS`` does not contain the name.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    sheet = GPUS[name]
    exponentials = 16 * sheet.multiprocessors * sheet.clock  # a logit takes one forward and one backward
    return dataclasses.replace(
        peaks(sheet.bandwidth, sheet.matmul_rates, name), kernel_rate=exponentials / 2, source=sheet.source
    )


def peaks(bandwidth: float, matmul_rates: Mapping[str, float], name: str = "GPU") -> Machine:
    """Returns a GPU with the given peaks, of which it reaches the same fractions as the GPUs of ``GPUS``.

    Args:
        bandwidth: Peak bytes per second.
        matmul_rates: Peak FLOP per second, by dtype.
        name: Name in tables.
    """
    return Machine(
        name=name,
        is_gpu=True,
        bandwidth=BANDWIDTH_SHARE * bandwidth,
        matmul_rates={dtype: PRODUCT_SHARE * rate for dtype, rate in matmul_rates.items()},
        overhead=50e-6,  # the launches of a forward and a backward; a guess
        source="peaks as given",
    )
