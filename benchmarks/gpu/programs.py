"""Stages that start other programs: the tests, compute-sanitizer, ncu, and builds with other launch settings."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import schema
from benchmarks.gpu.build import ROOT, build
from benchmarks.gpu.session import GpuStage

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: Test files that run kernels on tensors, and the files of tests/gpu.
TESTS = (
    "tests/gpu/test_hardware.py", "tests/gpu/test_against_torch.py", "tests/loss/test_linear.py",
    "tests/loss/test_loss.py", "tests/ops/test_token_logp.py", "tests/loss/test_reward_shift.py",
    "tests/loss/test_semantics.py", "tests/loss/test_property.py", "tests/loss/test_large.py",
    "tests/test_bad_input.py", "tests/ops/test_operators.py", "tests/gpu/test_attention.py",
)  # fmt: skip
_PROGRAM_SECONDS = 240
_VARIANTS = ("256:4:4", "256:3:4", "256:2:8", "512:1:8", "512:2:4", "128:8:4", "256:4:2")  # threads:blocks:unroll
_NCU_SECTIONS = (
    "LaunchStats", "Occupancy", "SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "InstructionStats", "ComputeWorkloadAnalysis",
)  # fmt: skip
_NCU_METRICS = (
    "dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum,gpu__time_duration.sum"
)


def _run(
    stage: GpuStage,
    case: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    provider: str = "mpo_ext",
) -> Path:
    """Runs a program, and adds "passed", "failed" or "not run" to the result file. Returns the path of the log.

    ``env`` adds environment variables. ``provider`` is the name of the tested implementation in the result file.
    """
    log = stage.out / (re.sub(r"\W+", "-", f"{stage.name}-{case}") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    if shutil.which(command[0]) is None:
        stage.add(case, "not run", f"{command[0]} is not on PATH", provider=provider)
        return log
    begin, status = time.perf_counter(), 0
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        settings = {"cwd": ROOT, "env": {**os.environ, **(env or {})}, "stdout": file, "stderr": subprocess.STDOUT}
        try:
            status = subprocess.run(command, timeout=_PROGRAM_SECONDS, check=False, **settings).returncode
        except subprocess.TimeoutExpired:
            status = 124
    took = time.perf_counter() - begin
    lines = log.read_text(errors="replace").splitlines()[1:]
    wrong = [line for line in lines if re.search(r"FAILED|SUMMARY|Error|error:|Invalid|Race reported", line)][:5]
    reason = "" if status == 0 else f"exit status {status}, see {log.name}: {' / '.join(wrong or lines[-2:])}"[:600]
    stage.add(case, "failed" if status else "passed", reason, provider=provider, took_s=took)
    return log


def run_tests(stage: GpuStage) -> None:
    """Runs each file of tests on the backends "cuda" and "triton"."""
    files = TESTS[1:2] if stage.dry else TESTS
    arguments = ["-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["--timeout", "200"]
    if importlib.util.find_spec("xdist") and not stage.dry:
        arguments += ["-n", str(min(os.cpu_count() or 1, 12))]
    arguments += ["-k", "float32 and 1003 and keep"] if stage.dry else []
    env = {"MPO_TEST_BACKENDS": ",".join(stage.backends)}
    for file in files:
        _run(stage, file, [sys.executable, "-m", "pytest", file, *arguments], env=env)


def run_sanitize(stage: GpuStage) -> None:
    """Runs ``benchmarks.gpu.sanitize_target`` under each compute-sanitizer tool, for each backend."""
    program = [sys.executable, "-m", "benchmarks.gpu.sanitize_target"]
    if stage.dry:
        _run(stage, "without a tool", [*program, "--backend", "cpu"])
        return
    # With caching, an overrun would stay in the allocator's block.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZERS:
        for backend in stage.backends:
            # Only our kernels are instrumented; those of Triton have no common name.
            names = ["--kernel-name", "kernel_substring=mpo"] if backend == "cuda" else []
            options = ["--tool", tool, *names, "--error-exitcode", "9", "--launch-timeout", "60"]
            command = ["compute-sanitizer", *options, *program, "--backend", backend]
            _run(stage, f"{tool}, {backend}", command, env=env, provider=f"mpo_ext, {backend}")


def run_ncu(stage: GpuStage) -> None:
    """Profiles the main kernels with ncu, and writes kernels.ncu-rep to the folder of results."""
    program = [sys.executable, "-m", "benchmarks.gpu.ncu_target"]
    if stage.dry:
        _run(stage, "without ncu", [*program, "--dry"])
        return
    report = stage.out / "kernels"
    sections = [word for section in _NCU_SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", *sections, "--metrics", _NCU_METRICS, "--import-source", "yes"]
    options += ["-k", "regex:token_logp|logits_grad|exp_logits", "--launch-skip", "2", "--launch-count", "8"]
    _run(stage, "counters", ["ncu", *options, "--force-overwrite", "-o", str(report), *program])
    if Path(f"{report}.ncu-rep").exists():
        _run(stage, "details", ["ncu", "--import", f"{report}.ncu-rep", "--page", "details"])


def run_tune(stage: GpuStage) -> None:
    """Builds the native module with several launch settings, and times each build in a fresh process."""
    for variant in _VARIANTS[:1] if stage.dry else _VARIANTS:
        folder = ROOT / "build" / f"variant-{variant.replace(':', '-')}"
        source = _edited(folder, variant)
        if stage.dry:  # edits the sources as for a build, but times the existing module
            module = next((ROOT / "mpo_ext").glob("_C*.so"), None)
        else:
            try:
                build(source, folder / "build", folder / "module", stage.out / "tune-build.log")
            except RuntimeError as error:
                stage.add(f"variant {variant}", "not run", str(error).splitlines()[0])
                continue
            module = next((folder / "module").glob("_C*.so"), None)
        if module is None:
            stage.add(f"variant {variant}", "not run", "no built module was found")
            continue
        results = stage.out / f"tune-{variant.replace(':', '-')}"
        target = [sys.executable, "-m", "benchmarks.gpu.tune_target", "--module", str(module), "--out", str(results)]
        _run(stage, f"variant {variant}", [*target, *(["--dry"] if stage.dry else [])])
        if (results / "gpu_tune.json").exists():
            points = schema.load(results / "gpu_tune.json")["points"]
            for point in points:
                name = f"{point['provider']}, {variant}"
                stage.points.append({**point, "id": f"{point['sweep']}, {name}", "provider": name})
            stage.write()


def _edited(folder: Path, variant: str) -> Path:
    """Copies the native sources, and sets the launch settings in the copy. Returns the folder of the copy.

    ``variant`` is "THREADS:BLOCKS:UNROLL": threads per block, blocks per multiprocessor and unrolling factor.
    """
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    threads, blocks, unroll = variant.split(":")
    values = (("launch.h", "kCudaThreads", threads), ("launch.h", "kCudaBlocksPerSm", blocks))
    for file, name, value in (*values, ("rows.cuh", "kUnroll", unroll)):
        path = source / "csrc" / "mpo" / "cuda" / file
        text, count = re.subn(rf"(constexpr int {name} = )\d+;", rf"\g<1>{value};", path.read_text())
        if count != 1:
            raise RuntimeError(f"{file} must define {name} once, got {count} definitions")
        path.write_text(text)
    return source
