"""Runs all checks that need a GPU, and writes a report (``make gpu-check``, or ``python -m benchmarks.gpu_check``).

Builds the CUDA kernels, runs all tests on every backend, runs tests/gpu (also under compute-sanitizer), and measures.
The report folder holds report.md, results.json and logs. If a step fails, the other steps still run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import logits
from benchmarks.losses import reason_of
from benchmarks.measure import Run, Timing, environment, gpu_peak_bytes, interleaved, nothing, versions, write_text
from mpo_ext.plan.roofline import LossShape
from mpo_ext.report import markdown_table

STEPS = ("build", "tests", "sanitizer", "hardware", "measure", "linear")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PEERS = ("triton", "liger-kernel", "trl", "quack-kernels", "cut-cross-entropy")
PROVIDERS = (
    "mpo_ext, cuda", "mpo_ext, triton", "eager", "torch.compile", "Liger cross entropy", "TRL selective_log_softmax",
    "quack cross entropy",
)  # fmt: skip
SHAPES = (
    LossShape(tokens=4096, vocab=151_936),
    LossShape(tokens=4096, vocab=151_936, share=0.1),
    LossShape(tokens=4096, vocab=151_936, dtype="float32"),
    LossShape(tokens=4096, vocab=151_674),
    LossShape(tokens=2048, vocab=92_553),
    LossShape(tokens=512, vocab=151_936, share=0.05),
)

#: Timings by pass ("forward", "backward" or "both") and by provider.
Timings = Mapping[str, Mapping[str, Timing]]


@dataclasses.dataclass
class StepResult:
    """Result of one step of the check, such as "build" or "tests"."""

    name: str
    passed: bool
    seconds: float
    notes: list[str] = dataclasses.field(default_factory=list)  # a line for each command that failed


# -------------------------------------------------------------------------------------------------------------- steps


def commands(step: str, root: Path) -> dict[str, list[str]]:
    """Returns the commands of a step, by the name of the log file of each command. ``root`` is the repository."""
    python = sys.executable
    pytest = [python, "-m", "pytest"]
    if step == "build":
        return {"build": [python, "-m", "pip", "install", "-c", "constraints.txt", "-e", ".[dev]"]}
    if step == "tests":
        return {"tests": [*pytest, str(root / "tests"), "--ignore", str(root / "tests" / "gpu")]}
    if step == "hardware":
        return {"hardware": [*pytest, str(root / "tests" / "gpu")]}
    if step == "sanitizer":
        program = [*pytest, str(root / "tests" / "gpu" / "test_against_torch.py"), "-k", "cuda"]
        return {f"sanitizer-{tool}": ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
                for tool in SANITIZERS}  # fmt: skip
    if step == "linear":  # one pair of two responses of 4,096 tokens
        sizes = ["--tokens", "4096", "--hidden-size", "4096", "--shares", "1.0", "0.1", "--dtypes", "bfloat16"]
        return {"linear": [python, "-m", "benchmarks.linear", "--device", "cuda", "--runs", "10", *sizes]}
    raise ValueError(f"step must be build, tests, hardware, sanitizer or linear, got {step!r}")


def step_environment(step: str) -> dict[str, str]:
    """Returns the environment variables for the commands of a step."""
    env = dict(os.environ)
    if step == "build":
        env |= {"MPO_CUDA": "ON", "MPO_WERROR": "ON"}
    if step == "tests":
        triton = ",triton" if importlib.util.find_spec("triton") else ""
        env |= {"MPO_TEST_BACKENDS": f"reference,cpu,cuda{triton}"}
    if step == "sanitizer":
        env |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # with caching, an overrun stays in the allocator's block
    return env


def run_step(step: str, root: Path, out: Path) -> StepResult:
    """Runs the commands of a step, writes a log for each command to the folder ``out``, and returns the result."""
    start = time.perf_counter()
    notes = []
    for name, command in commands(step, root).items():
        if shutil.which(command[0]) is None:
            notes.append(f"{name}: {command[0]} is not on PATH")
            continue
        with (out / f"{name}.log").open("w") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            status = subprocess.run(
                command, cwd=root, env=step_environment(step), stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        if status != 0:
            notes.append(f"{name}: exit status {status}, see {name}.log")
    return StepResult(step, not notes, time.perf_counter() - start, notes)


# ------------------------------------------------------------------------------------------------------- measurements


def bytes_needed(loss: LossShape, what: str) -> int:
    """Returns the bytes that any method must move in forward, in backward, or in both (``what``).

    Each of the two passes reads the labelled logits, and backward writes the gradient.
    """
    row = loss.vocab * loss.size
    forward = loss.labelled * row
    backward = forward + loss.rows * row
    return {"forward": forward, "backward": backward, "both": forward + backward}[what]


def title(loss: LossShape) -> str:
    return f"[2, {loss.tokens}, {loss.vocab}] {loss.dtype}, {loss.share:.0%} labelled"


def copy_bandwidth(device: str, nbytes: int = 1 << 30) -> float:
    """Copies a large tensor, and returns the bytes read and written per second."""
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    timing = interleaved({"copy": (nothing, lambda: target.copy_(source))}, 10, device=device)["copy"]
    return 2 * nbytes / timing.median_s


def measure(
    loss: LossShape, device: str, names: Sequence[str], runs: int
) -> tuple[dict[str, dict[str, Timing]], dict[str, int]]:
    """Measures forward, backward and both together for each provider, ``runs`` times.

    If a provider fails, the error is printed and the provider is left out.

    Returns:
        The timings by pass and provider, and the peak bytes of forward and backward by provider (0 on a CPU).
    """
    batch = logits.LogitsBatch(loss, device)
    runs_by_name: dict[str, dict[str, Run]] = {}
    pristine = batch.logits.clone() if logits.OVERWRITING & set(names) else None
    for name in names:
        try:
            passes = _passes(logits.LOSSES[name](), batch, pristine if name in logits.OVERWRITING else None)
            passes["both"][1]()
        except Exception as error:  # a provider that is absent or cannot run this shape
            print(f"  {name} cannot run {title(loss)}: {reason_of(error)}")
            continue
        finally:
            if pristine is not None:
                batch.logits.copy_(pristine)
        runs_by_name[name] = passes
    timings = {
        what: interleaved({name: passes[what] for name, passes in runs_by_name.items()}, runs, device=device)
        for what in ("forward", "backward", "both")
    }
    peaks = dict.fromkeys(runs_by_name, 0)
    if device != "cpu":
        for name, passes in runs_by_name.items():
            prepare, run = passes["both"]
            prepare()
            peaks[name] = gpu_peak_bytes(run)
    return timings, peaks


def _passes(loss_of: logits.LossOf, batch: logits.LogitsBatch, pristine: Tensor | None) -> dict[str, Run]:
    """Returns the runs of forward, of backward and of both together, for one provider.

    ``pristine`` is a copy of the logits for a provider that overwrites them; each run then starts from this copy.
    """
    leaf = batch.logits.detach().requires_grad_()
    losses: list[Tensor] = []
    restore: Callable[[], Any] = nothing if pristine is None else functools.partial(batch.logits.copy_, pristine)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss_of(leaf, batch)

    def prepare_backward() -> None:
        restore()
        losses.append(loss_of(leaf, batch))

    def backward() -> None:
        torch.autograd.grad(losses.pop(), leaf)

    def both() -> None:
        torch.autograd.grad(loss_of(leaf, batch), leaf)

    return {"forward": (restore, forward), "backward": (prepare_backward, backward), "both": (restore, both)}


# ------------------------------------------------------------------------------------------------------------- report


def render_table(loss: LossShape, timings: Timings, peaks: Mapping[str, int], bandwidth: float) -> str:
    rows = []
    for what, by_name in timings.items():
        needed = bytes_needed(loss, what)
        for name, timing in by_name.items():
            rate = needed / timing.median_s
            low, high = (1e3 * seconds for seconds in timing.spread_s)
            memory = f"{peaks[name] / 2**20:.1f}" if what == "both" else ""
            times = f"{1e3 * timing.median_s:.3f} ({low:.3f} .. {high:.3f})"
            rows.append([f"{what}, {name}", times, f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}", memory])
    header = ["pass, provider", "ms, median (p20 .. p80)", "GB/s", "share of copy", "peak memory, MiB"]
    return f"### {title(loss)}\n\n{markdown_table(header, rows)}"


def render_report(
    facts: Mapping[str, str], steps: Sequence[StepResult], bandwidth: float | None, tables: Sequence[str]
) -> str:
    results = [[step.name, "passed" if step.passed else "FAILED", f"{step.seconds:.0f}"] for step in steps]
    parts = [
        f"# mpo_ext on a GPU\n\n{markdown_table(['fact', 'value'], [list(fact) for fact in facts.items()])}",
        f"## Steps\n\n{markdown_table(['step', 'result', 'seconds'], results)}",
        "\n".join(f"- {step.name}: {note}" for step in steps for note in step.notes),
    ]
    if bandwidth is not None:
        parts += [
            f"## Speed\n\nA copy moves {bandwidth / 1e9:.0f} GB/s in this run, read and written bytes together. GB/s "
            "below are the bytes that any method must move over its time. The second-level cache is empty before "
            "each run. The last column is the peak in addition to the logits.",
            *tables,
        ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def gpu_facts() -> dict[str, str]:
    """Returns the hardware, the driver, the versions and the command, for the report."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": driver.splitlines()[0] if driver else "unknown",
        "torch's CUDA": str(torch.version.cuda),
        **environment(),
        **versions(PEERS),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the steps, and returns 0 if all steps passed, 1 if a step failed, and 2 without a GPU."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--runs", type=int, default=20, help="counted runs of each measurement")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check needs an NVIDIA GPU and a torch that sees it; torch.cuda.is_available() is False")
        return 2
    root = Path(__file__).parents[1]
    args.out.mkdir(parents=True, exist_ok=True)
    steps: list[StepResult] = []
    bandwidth, tables, shapes = None, [], []
    for name in STEPS:
        if name not in args.steps:
            continue
        print(f"{name} ...", flush=True)
        if name != "measure":
            steps.append(run_step(name, root, args.out))
            continue
        start = time.perf_counter()
        bandwidth = copy_bandwidth("cuda")
        for loss in SHAPES:
            timings, peaks = measure(loss, "cuda", PROVIDERS, args.runs)
            tables.append(render_table(loss, timings, peaks, bandwidth))
            seconds = {what: {who: timing.seconds for who, timing in row.items()} for what, row in timings.items()}
            shapes.append({**dataclasses.asdict(loss), "seconds": seconds, "peak_bytes": peaks})
            torch.cuda.empty_cache()
        steps.append(StepResult("measure", True, time.perf_counter() - start))
    facts = gpu_facts()
    write_text(args.out / "report.md", render_report(facts, steps, bandwidth, tables))
    results = {"facts": facts, "steps": [dataclasses.asdict(step) for step in steps],
               "copy_bytes_per_s": bandwidth, "shapes": shapes}  # fmt: skip
    write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"{args.out / 'report.md'}: " + ", ".join(f"{s.name} {'passed' if s.passed else 'FAILED'}" for s in steps))
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
