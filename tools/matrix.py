"""Tests mpo_ext with several versions of Python and torch: ``python tools/matrix.py``.

For each combination, a fresh environment in build/matrix gets torch and the test tools. The native module is built
without CUDA, the tests of operators and losses run, and the environment is deleted. Each result is added to
results/matrix.json. ``python -m benchmarks.gpu --docs`` writes the results into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.12", "3.14")
TORCHES = ("2.8", "2.11", "2.13", "2.15")
#: Tests of the operators and of the public functions of the loss.
TESTS = ("tests/ops", "tests/loss/test_loss.py", "tests/loss/test_linear.py", "tests/loss/test_reward_shift.py")
_TOOLS = ("pybind11>=2.13", "cmake>=3.24", "ninja", "numpy", "pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")
_CELL_SECONDS = 3600
_IMPORT = (
    "import torch; from mpo_ext import mpo_loss; from mpo_ext.ops.native import compiled; compiled(); "
    "print(torch.__version__)"
)


def find_python(version: str) -> str | None:
    """Returns the path of Python in a version such as "3.12", from pyenv or PATH; None if it is not installed."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*sorted(versions.glob(f"{version}.*/bin/python{version}")), shutil.which(f"python{version}")]
    for candidate in filter(None, candidates):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        found = subprocess.run([str(candidate), "-c", code], capture_output=True, text=True, check=False)
        if found.stdout.strip() == version:
            return str(candidate)
    return None


def run_cell(python: str, torch: str, tests: Sequence[str], folder: Path) -> dict[str, Any]:
    """Builds and tests mpo_ext with one version of Python and one of torch.

    Returns an entry of results/matrix.json: ``status`` ("passed", "failed" or "not run"), ``reason`` and other fields.
    """
    cell: dict[str, Any] = {"python": python, "torch": torch, "date": datetime.date.today().isoformat()}
    interpreter = find_python(python)
    if interpreter is None:
        return cell | {"status": "not run", "reason": f"there is no Python {python} on this machine"}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    try:
        reason = _steps(interpreter, torch, tests, folder, cell)
    finally:
        shutil.rmtree(folder / "environment", ignore_errors=True)
    return cell | {"status": cell.pop("status", "failed"), "reason": reason, "took_s": time.perf_counter() - begin}


def _steps(interpreter: str, torch: str, tests: Sequence[str], folder: Path, cell: dict[str, Any]) -> str:
    """Builds and tests in a new environment, and adds fields such as ``status`` to ``cell``.

    Returns the last line that pytest prints. If a step fails, returns the name of the step and the last line of its
    log.
    """
    binaries, source = folder / "environment" / "bin", folder / "source"
    python = str(binaries / "python")
    _copy_tree(source)
    extension = [f"-DPython_EXECUTABLE={python}", f"-DMPO_OUTPUT_DIR={source / 'mpo_ext'}", "-DMPO_CUDA=OFF"]
    steps = {
        "environment": [interpreter, "-m", "venv", str(folder / "environment")],
        "torch": [python, "-m", "pip", "install", "--quiet", f"torch=={torch}.*", *_TOOLS],
        "configure": ["cmake", "-G", "Ninja", "-S", ".", "-B", str(folder / "build"), *extension],
        "build": ["cmake", "--build", str(folder / "build")],
        "import": [python, "-c", _IMPORT],
        "tests": [python, "-m", "pytest", "-p", "no:cacheprovider", *tests],
    }
    paths = os.pathsep.join([str(binaries), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": paths, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    last = ""
    for name, command in steps.items():
        log = folder / f"{name}.log"
        with log.open("w") as file:
            options = {"cwd": source, "env": env, "stdout": file, "stderr": subprocess.STDOUT}
            try:
                status = subprocess.run(command, check=False, timeout=_CELL_SECONDS, **options).returncode
            except subprocess.TimeoutExpired:
                return f"{name}: stopped after {_CELL_SECONDS} s"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if name == "import" and status == 0:
            cell["torch_version"] = last
        if status != 0:
            if name == "torch":
                cell["status"] = "not run"  # there is no such wheel for this Python
            return f"{name}: {last}"[:300]
    cell["status"] = "passed"
    return last


def _copy_tree(target: Path) -> None:
    """Copies the working tree to ``target``, without the files that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    (target / "mpo_ext" / "kernels").symlink_to(Path("..") / "kernels" / "mpo_triton")


def main() -> int:
    """Tests the combinations chosen on the command line. Returns 1 if one failed, otherwise 0."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cells", nargs="*", metavar="PYTHON:TORCH", help='such as "3.12:2.11" (default: all)')
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="test files and folders")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="environments and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "matrix.json", help="the result file")
    args = parser.parse_args()
    cells = args.cells or [f"{python}:{torch}" for torch in TORCHES for python in PYTHONS]
    results = (
        {(cell["python"], cell["torch"]): cell for cell in json.loads(args.out.read_text())["cells"]}
        if (args.out.exists())
        else {}
    )
    failed = False
    for name in cells:
        python, _, torch = name.partition(":")
        cell = run_cell(python, torch, args.tests, args.folder.resolve() / name.replace(":", "-"))
        print(f"Python {python}, torch {torch}: {cell['status']}: {cell['reason']}", flush=True)
        failed |= cell["status"] == "failed"
        results[python, torch] = cell
        document = {"schema": 1, "command": "python tools/matrix.py", "cells": list(results.values())}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
