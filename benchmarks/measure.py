"""Measures time and memory on a machine that other programs also use.

The cases are run in turn, and their times are medians. On a CPU, peak memory is measured in fresh processes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_ext.files import atomic_write
from mpo_ext.ops.memory import fresh_zeros

#: An untimed call that prepares a run, and the timed run.
Run = tuple[Callable[[], Any], Callable[[], Any]]

_FREE_BYTES = 1 << 30  # as much as most cases allocate
_SLOW_SECONDS = 1.0
_L2_BYTES = 256 << 20  # more than the second-level cache of any GPU
_SPIN_CYCLES = 3_000_000  # about 1.5 ms, in which the host enqueues a forward and backward from logits
_PACKAGES = (
    "torch", "mpo-ext", "numpy", "transformers", "accelerate", "triton", "trl", "liger-kernel", "cut-cross-entropy",
    "quack-kernels",
)  # fmt: skip


_clock: Callable[[], float] = time.perf_counter


def use_cpu_time() -> None:
    """Makes ``interleaved`` measure CPU time instead of elapsed time, because other programs disturb it less.

    The CPU times of all threads are added. So the CPU time of a run with several threads must not be compared with an
    elapsed time.
    """
    global _clock
    _clock = time.process_time


def is_cpu_time() -> bool:
    """Returns whether ``use_cpu_time`` has been called."""
    return _clock is time.process_time


def nothing() -> None:
    """Does nothing. It is the ``prepare`` function of a run that needs no preparation."""


@dataclass(frozen=True)
class Timing:
    """The measured times of a case: the seconds of each counted run, in order."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float]:
        """The 20th and the 80th percentile in seconds."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]


def interleaved(
    cases: Mapping[str, Run], runs: int, *, seconds_in_all: float = math.inf, least: int = 2, device: str = "cpu"
) -> dict[str, Timing]:
    """Times the cases in rounds. A round runs each case once. The first round is not counted.

    Args:
        cases: ``(prepare, run)`` by name. Only ``run`` is timed.
        runs: Number of counted rounds.
        seconds_in_all: Time limit in seconds, after which no further round begins.
        least: Minimum number of counted rounds, regardless of the time limit.
        device: "cpu" or "cuda". On a GPU, times are measured with CUDA events, and the L2 cache is emptied before each
            run.

    Returns:
        The times of each case by name.
    """
    clock = _gpu_clock(device) if device.startswith("cuda") else _cpu_clock
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    begin = time.perf_counter()
    for round_number in range(runs + 1):
        if round_number > least and time.perf_counter() - begin > seconds_in_all:
            break
        elapsed = {}
        for name, (prepare, run) in cases.items():
            prepare()
            elapsed[name] = clock(run)
        for name, read in elapsed.items():
            value = read()
            if round_number > 0:
                seconds[name].append(value)
    return {name: Timing(values) for name, values in seconds.items()}


def _cpu_clock(run: Callable[[], Any]) -> Callable[[], float]:
    start = _clock()
    result = run()
    elapsed = _clock() - start
    del result
    if elapsed > _SLOW_SECONDS:
        _touch_free_memory()
    return lambda: elapsed


def _touch_free_memory() -> None:
    """Writes to 1 GiB of new memory, and frees the memory.

    In a virtual machine, the host must then provide the memory now, and not during the next timed run.
    """
    fresh_zeros((_FREE_BYTES,), torch.uint8).fill_(1)


def _gpu_clock(device: str) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    """Returns a function ``clock`` that measures GPU time.

    ``read = clock(run)`` enqueues ``run`` on the GPU. ``read()`` waits for the end of ``run``, and returns its GPU
    time in seconds. The GPU spins until ``run`` is enqueued, so the time of the host is not included.
    """
    cache = torch.empty(_L2_BYTES, dtype=torch.uint8, device=device)

    def clock(run: Callable[[], Any]) -> Callable[[], float]:
        cache.zero_()
        torch.cuda._sleep(_SPIN_CYCLES)  # noqa: SLF001  # torch has no public kernel that waits
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()

        def read() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return read

    return clock


def gpu_peak_bytes(run: Callable[[], Any]) -> int:
    """Returns the peak bytes of GPU memory that ``run`` allocates in addition to the memory allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(target: Callable[..., None], *args: object) -> int:
    """Calls ``target(begin, *args)`` in a fresh process, and returns the peak increase of its resident bytes.

    The measurement starts when ``target`` calls ``begin()``. Raises RuntimeError if the process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, target, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the measured process of {target.__name__}{args} ended without a result") from None
    finally:
        process.join()


def _report_peak(sender: Any, target: Callable[..., None], args: tuple[object, ...]) -> None:
    before: list[int] = []

    def begin() -> None:
        reset_peak()
        before.append(resident_bytes("VmRSS"))

    target(begin, *args)
    sender.send(resident_bytes("VmHWM") - before[0])


def reset_peak() -> None:
    """Resets ``VmHWM``, the peak resident memory of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> int:
    """Returns the resident bytes of this process: ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {field}")


def output_of(command: Sequence[str]) -> str | None:
    """Returns the output of a program, or None if the program is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, str]:
    """Returns the CPU, the number of threads, the versions of torch and Python, the commit and the command line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": output_of(["git", "rev-parse", "--short", "HEAD"]) or "unknown",
        "command": " ".join(
            ["python -m", Path(sys.argv[0]).parent.name + "." + Path(sys.argv[0]).stem, *sys.argv[1:]]
        ),
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Returns the installed version of each package, or "not installed"."""

    def pairs() -> Iterator[tuple[str, str]]:
        for name in packages:
            try:
                yield name, importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                yield name, "not installed"

    return dict(pairs())


def now() -> tuple[str, tuple[float, ...]]:
    """Returns the current time in ISO 8601, and the load averages of the machine."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), os.getloadavg()


def provenance(command: str, started: str, load_before: tuple[float, ...]) -> dict[str, Any]:
    """Returns the field ``environment`` of a result file.

    The field describes the machine, the software, the times and the system loads of a run. ``command`` is the command
    line. ``started`` and ``load_before`` are the results that ``now`` returned at the start of the run.
    """
    short = environment()
    # A run writes these files itself, so they do not count as modified.
    changed = output_of(["git", "status", "--porcelain", ":!results", ":!docs", ":!README.md"])
    ended, load_after = now()
    return {
        "cpu": short["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": short["commit"],
        "modified": changed is None or bool(changed),
        "command": command,
        "started": started,
        "ended": ended,
        "load_before": [round(value, 2) for value in load_before],
        "load_after": [round(value, 2) for value in load_after],
    }


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: first to a temporary file, which then replaces the file."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str, results: dict[str, Any]) -> None:
    """Writes the results and the environment of this process as JSON."""
    write_text(Path(path), json.dumps({"environment": environment(), **results}, indent=2) + "\n")
