"""Rates of machines, and the time that a stage of work takes at these rates.

A stage is a part of the work, such as a forward pass. Three kinds of work are assumed to overlap: (1) matmuls and
attention, (2) memory traffic, (3) arithmetic on logits. The slowest of the three determines the time. The times of
page faults on a CPU and of kernel launches on a GPU are added. The rates do not depend on how the loss is computed.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

#: Fractions of a GPU's peak rates that large kernels reach. The fraction of bandwidth is assumed. The fraction of
#: matmuls follows from the 42 ms that TRL measured on an H100 for the three bfloat16 products of 8,192 rows, D = 4,096
#: and V = 151,936: 728 TFLOP/s on average, and 0.76 of the peak while all multiprocessors work.
BANDWIDTH_SHARE, PRODUCT_SHARE = 0.9, 0.76
_LAUNCH_SECONDS = 2e-6  # assumed time between two kernels of a GPU
#: Assumed fractions of a GPU's peak rate that attention kernels reach. Without a mask: between FlashAttention-2 (0.35)
#: and FlashAttention-3 (0.75) on an H100 (arXiv 2407.08608). With a dense mask: from the 14.9 ms that OpenPipe/ART,
#: pull request 586, measured for SDPA with 16,384 tokens and 32 heads of 128; the GPU is assumed to be an H100.
ATTENTION_SHARES = {"plain": 0.5, "masked": 0.3}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the work, such as a forward pass. The stages run one after the other.

    Attributes:
        name: Name of the stage in reports.
        flop: Number of floating-point operations in the matmuls.
        dtype: Dtype of the inputs of the matmuls and attention kernels.
        shortest: Smallest of the three sizes m, n, k of the matmuls. On a CPU, small matmuls are slower.
        attention: Number of floating-point operations in attention kernels.
        attention_kind: Key of ``Machine.attention_rates``.
        moved: Number of bytes that are read or written.
        kernel: Number of logits that the kernels of mpo_ext process. The forward kernel counts 1/2 per logit, and so
            does the backward kernel.
        softmax: Number of logits that torch's softmax processes, counted like ``kernel``.
        fresh: Number of bytes of newly allocated memory in small pages.
        huge: Number of bytes of newly allocated memory in huge pages.
        launches: Number of kernels that a GPU runs one after the other.
    """

    name: str
    flop: float = 0.0
    dtype: str = "float32"
    shortest: float = math.inf
    attention: float = 0.0
    attention_kind: str = "plain"
    moved: float = 0.0
    kernel: float = 0.0
    softmax: float = 0.0
    fresh: float = 0.0
    huge: float = 0.0
    launches: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of a machine. If a rate is infinite, the predicted time of this kind of work is 0.

    Attributes:
        name: Name of the machine in reports.
        is_gpu: Whether the machine is a GPU. The stages of a loss differ between CPU and GPU.
        bandwidth: Bytes per second of memory reads and writes, without page faults.
        matmul_rates: FLOP per second of large matmuls, by dtype.
        matmul_shares: Fraction of the rate in ``matmul_rates`` that a matmul reaches. The key is the smallest of the
            matmul's sizes m, n and k. Between two keys, the fraction is interpolated over the logarithm of the size.
            Empty: every matmul reaches the full rate.
        attention_rates: FLOP per second of attention kernels, by kind and dtype. If a rate is missing, the rate of
            matmuls is used. Kind "plain" is causal or full attention; FLOP are counted only for scores that the result
            needs. Kind "masked" is attention with a dense mask; FLOP are counted for all scores.
        kernel_rate: Logits per second that mpo_ext's kernels process forward and backward, if memory is not the limit.
        softmax_rate: Logits per second that torch's log_softmax processes forward and backward, in cache.
        fresh: Bytes per second at which the operating system provides new memory in small pages (page faults). Writing
            to the memory is not included.
        huge: As ``fresh``, but in huge pages.
        overhead: Constant number of seconds added to each forward plus backward.
        launch: Seconds between two kernels of a GPU.
        multiprocessors: Number of multiprocessors of a GPU. 0: unknown; idle multiprocessors are then not counted.
        memory: Bytes of a GPU's memory, from which the default memory budget of tiles follows. 0: unknown.
        source: Origin of the rates, for reports.
    """

    name: str
    is_gpu: bool
    bandwidth: float
    matmul_rates: Mapping[str, float]
    matmul_shares: Mapping[int, float] = dataclasses.field(default_factory=dict)
    attention_rates: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    kernel_rate: float = math.inf
    softmax_rate: float = math.inf
    fresh: float = math.inf
    huge: float = math.inf
    overhead: float = 0.0
    launch: float = 0.0
    multiprocessors: int = 0
    memory: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        rates = {name: getattr(self, name) for name in ("bandwidth", "kernel_rate", "softmax_rate", "fresh", "huge")}
        rates |= {f"matmul_rates[{name!r}]": rate for name, rate in self.matmul_rates.items()}
        rates |= {f"matmul_shares[{size}]": share for size, share in self.matmul_shares.items()}
        for kind, by_dtype in self.attention_rates.items():
            rates |= {f"attention_rates[{kind!r}][{name!r}]": rate for name, rate in by_dtype.items()}
        for name, rate in rates.items():
            if not rate > 0:  # also catches NaN
                raise ValueError(f"{name} must be positive, got {rate}")
        if not 0 <= self.overhead < math.inf:
            raise ValueError(f"overhead must be finite and not negative, got {self.overhead}")

    def seconds(self, stage: Stage) -> float:
        """Returns the seconds of a stage of work. Raises ``ValueError`` if the dtype of the stage has no rate."""
        if (stage.flop or stage.attention) and stage.dtype not in self.matmul_rates:
            raise ValueError(
                f"dtype must be one of {', '.join(self.matmul_rates)} on {self.name}, got {stage.dtype!r}"
            )
        computing = 0.0
        if stage.flop:
            computing += stage.flop / (self.matmul_rates[stage.dtype] * self.matmul_share(stage.shortest))
        if stage.attention:
            rates = self.attention_rates.get(stage.attention_kind, {})
            computing += stage.attention / rates.get(stage.dtype, self.matmul_rates[stage.dtype])
        work = max(
            computing,
            stage.moved / self.bandwidth,
            stage.kernel / self.kernel_rate + stage.softmax / self.softmax_rate,
        )
        return work + stage.fresh / self.fresh + stage.huge / self.huge + stage.launches * self.launch

    def matmul_share(self, shortest: float) -> float:
        """Returns the rate of a matmul as a fraction of the rate in ``matmul_rates``.

        ``shortest`` is the smallest of the sizes m, n and k of the matmul.
        """
        points = sorted(self.matmul_shares.items())
        if not points:
            return 1.0
        if shortest <= points[0][0]:
            return points[0][1] * shortest / points[0][0]
        for (small, low), (large, high) in itertools.pairwise(points):
            if shortest <= large:
                return low + (high - low) * math.log(shortest / small) / math.log(large / small)
        return points[-1][1]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """Figures of a GPU from its vendor's data sheet.

    Attributes:
        bandwidth: Peak bytes per second.
        matmul_rates: Peak FLOP per second by dtype, for dense matrices. The float32 rate is without tensor cores.
        clock: Clock in hertz.
        memory: Bytes of memory.
        unconfirmed: Names of the figures that no document of the vendor confirms.
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


#: The data sheets of Hopper and Blackwell print the rates with sparsity; the dense rates here are half of them. At the
#: given clocks, the float32 lanes reach the printed float32 peak. Tensor cores of Hopper and Blackwell run slower.
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
    """Returns a machine for the GPU ``name``, a key of ``GPUS``.

    The bandwidth and the rates of matmuls and attention are assumed fractions of the peaks in the data sheet. The
    ``kernel_rate`` follows from the clock and the number of multiprocessors. Raises ValueError for an unknown name.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    sheet = GPUS[name]
    exponentials = 16 * sheet.multiprocessors * sheet.clock  # a logit needs two, for forward and backward
    return dataclasses.replace(
        peaks(sheet.bandwidth, sheet.matmul_rates, name),
        kernel_rate=exponentials / 2,
        multiprocessors=sheet.multiprocessors,
        memory=sheet.memory,
        source=sheet.source,
    )


def peaks(bandwidth: float, matmul_rates: Mapping[str, float], name: str = "GPU") -> Machine:
    """Returns a machine for a GPU with the given peak rates.

    Its rates are the fractions ``BANDWIDTH_SHARE``, ``PRODUCT_SHARE`` and ``ATTENTION_SHARES`` of the peaks.

    Args:
        bandwidth: Peak bytes per second.
        matmul_rates: Peak FLOP per second by dtype.
        name: Name of the machine in reports.
    """
    return Machine(
        name=name,
        is_gpu=True,
        bandwidth=BANDWIDTH_SHARE * bandwidth,
        matmul_rates={dtype: PRODUCT_SHARE * rate for dtype, rate in matmul_rates.items()},
        attention_rates={
            kind: {dtype: share * rate for dtype, rate in matmul_rates.items()}
            for kind, share in ATTENTION_SHARES.items()
        },
        overhead=50e-6,  # assumed time of the launches of a forward and a backward
        launch=_LAUNCH_SECONDS,
        source="peaks as given",
    )
