"""Time and memory, measured so that a noisy machine does not decide: interleaved runs, medians, fresh processes."""

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_ext.ops import logits as ops

_FREE_BYTES = 1 << 30  # what most cases allocate
_KEPT_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds of the counted runs of one case, in the order they were taken."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float]:
        """20th and 80th percentile."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]


def interleaved(
    cases: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]],
    runs: int,
    *,
    seconds_in_all: float = math.inf,
    least: int = 2,
) -> dict[str, Timing]:
    """Times each case once per round, in turn, after a round that is not counted.

    After a slow case free memory is touched: the host of a virtual machine takes it back after a second or two, and
    the next case would pay for fetching it.

    Args:
        cases: Name to ``(prepare, run)``; only ``run`` is timed, its result is freed outside of the timed part.
        runs: Counted rounds.
        seconds_in_all: Once this has gone by no further round begins, but ``least`` are always counted.
        least: See there.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    begin = time.perf_counter()
    for round_number in range(runs + 1):
        if round_number > least and time.perf_counter() - begin > seconds_in_all:
            break
        for name, (prepare, run) in cases.items():
            prepare()
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            del result
            if elapsed > _KEPT_SECONDS:
                _touch_free_memory()
            if round_number > 0:
                seconds[name].append(elapsed)
    return {name: Timing(values) for name, values in seconds.items()}


def _touch_free_memory() -> None:
    ops.fresh_zeros((_FREE_BYTES,), torch.uint8).fill_(1)


def peak_bytes(target: Callable[..., None], *args: object) -> int:
    """Peak resident memory that ``target(begin, *args)`` adds after it calls ``begin()``, in a process of its own."""
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
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before.append(_resident("VmRSS"))

    target(begin, *args)
    sender.send(_resident("VmHWM") - before[0])


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def environment() -> dict[str, str]:
    """What a figure must be quoted with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(
            ["python -m", Path(sys.argv[0]).parent.name + "." + Path(sys.argv[0]).stem, *sys.argv[1:]]
        ),
    }


_DISTRIBUTIONS = (
    "torch", "mpo-ext", "numpy", "transformers", "accelerate", "triton", "trl", "liger-kernel", "cut-cross-entropy",
    "quack-kernels",
)  # fmt: skip


def provenance(command: str, started: str, load_before: tuple[float, ...]) -> dict[str, Any]:
    """Hardware, versions, commit and command, as ``benchmarks.schema`` wants them.

    Args:
        command: That was given.
        started: When, in ISO 8601.
        load_before: The load average then.
    """
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    short = environment()
    # But for what a run itself writes.
    changed = subprocess.run(
        ["git", "status", "--porcelain", ":!results", ":!docs", ":!README.md"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "cpu": short["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": short["commit"],
        "modified": bool(changed.stdout.strip()) or changed.returncode != 0,
        "command": command,
        "started": started,
        "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_before": [round(value, 2) for value in load_before],
        "load_after": [round(value, 2) for value in os.getloadavg()],
    }


def write_json(path: str, results: dict[str, Any]) -> None:
    """Writes the results beside the environment they came from."""
    Path(path).write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
