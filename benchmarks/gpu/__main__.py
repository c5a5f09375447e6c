"""Runs checks and benchmarks on a GPU: ``python -m benchmarks.gpu --stage NAME ...`` (``make gpu-check`` runs all).

Nothing is downloaded. If the native module has no CUDA kernels, the module is built again first. Each stage rewrites
its result file gpu_STAGE.json after every case, so a stopped stage keeps its results. ``--dry`` runs every stage with
small sizes on a CPU. ``--docs`` copies the result files to results/, and rewrites the tables in README.md and docs/.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.build import ensure_built
from benchmarks.schema import GPU_STAGES

#: The stages, the most important first, because the time may be short.
ORDER = ("correct", "logits", "linear", "ncu", "sanitize", "tune", "train_step", "tests")
_STAGE_SECONDS = 480


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Runs the stages that need a GPU.")
    made.add_argument("--stage", nargs="+", choices=(*GPU_STAGES, "all"), default=["all"], help="stages to run")
    made.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the result files and logs")
    made.add_argument(
        "--dry", action="store_true", help="run on a CPU with small sizes, to test the stages themselves"
    )
    made.add_argument(
        "--archs", metavar="LIST", help='compute capabilities to build for, such as "90" (default: GPU 0)'
    )
    made.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N",
        help="stop after this time, the build included (default: no limit; a stage stops after 8 minutes in any case)",
    )  # fmt: skip
    made.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # set by ``_run_process``
    made.add_argument(
        "--docs", action="store_true", help="run nothing; copy the results and write the tables of docs/"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the stages. Returns 0 if all checks passed, 1 if a check failed or a stage was stopped, 2 without a GPU."""
    args = parser().parse_args(argv)
    names = list(ORDER) if "all" in args.stage else args.stage
    args.out.mkdir(parents=True, exist_ok=True)
    if args.docs:
        return _write_docs(args.out)
    if args.dry:  # logits are then not rounded to bfloat16, as on a GPU
        os.environ.setdefault("MPO_CPU_MATMUL", "float32")
    else:
        import torch

        if not torch.cuda.is_available():
            print("benchmarks.gpu needs an NVIDIA GPU that torch sees, or --dry; torch.cuda.is_available() is False")
            return 2
    begin = time.perf_counter()
    built = ensure_built(args.out, needs_cuda=not args.dry, archs=args.archs)
    print(f"[{time.perf_counter() - begin:6.1f} s] {built}", flush=True)
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    if args.dry or args.in_process:
        return max([_run_stage(name, args, command.replace(" --in-process", "")) for name in names])
    end = begin + 60 * args.minutes
    return max([_run_process(name, args, min(end - time.perf_counter(), _STAGE_SECONDS)) for name in names])


def _run_process(name: str, args: argparse.Namespace, seconds: float) -> int:
    """Runs a stage in a child process. Returns 0 on success, otherwise 1.

    After ``seconds``, the process group is killed.
    """
    if seconds <= 0:
        print(f"{name}: not started, because the time is over")
        return 1
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--out", str(args.out), "--in-process"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return min(abs(process.wait(seconds)), 1)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {seconds:.0f} s; its results so far are in {args.out}")
        return 1
    finally:  # also after an interrupt, which does not reach the other process group
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _run_stage(name: str, args: argparse.Namespace, command: str) -> int:
    from benchmarks.gpu import correct, linear, logits, programs, train_step
    from benchmarks.gpu.session import GpuStage

    runs = {
        "correct": correct.run, "logits": logits.run, "linear": linear.run, "train_step": train_step.run,
        "tests": programs.run_tests, "sanitize": programs.run_sanitize, "ncu": programs.run_ncu,
        "tune": programs.run_tune,
    }  # fmt: skip
    stage = GpuStage(name, args.out, dry=args.dry, command=command)
    runs[name](stage)
    print(f"{stage.path}: {len(stage.points)} points, {len(stage.failed)} failed", flush=True)
    for line in stage.failed:
        print(f"  {line}")
    return 1 if stage.failed else 0


def _write_docs(out: Path) -> int:
    from benchmarks import documents, schema

    results = Path("results")
    for stage in GPU_STAGES:
        path = out / f"gpu_{stage}.json"
        if not path.exists():
            continue
        if schema.load(path)["quick"]:
            print(f"{path} is from a dry run and is left out")
            continue
        shutil.copy(path, results)
    return documents.write_pages(documents.load(results))


if __name__ == "__main__":
    sys.exit(main())
