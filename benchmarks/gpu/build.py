"""Builds ``mpo_ext._C`` for the GPU of this machine, with CMake and without network.

Does not import mpo_ext before the build.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Program that prints whether a native module loads ("True") and whether it has CUDA kernels, for a fresh process.
_PROBE = "from mpo_ext.ops.native import compiled; print(True, bool(compiled().has_cuda))"


def ensure_built(out: Path, *, needs_cuda: bool, archs: str | None = None) -> str:
    """Builds the native module if it is missing or lacks required CUDA kernels. Returns a message.

    If mpo_ext has no Triton kernels after the build, they are linked into mpo_ext. CMake, ninja, a compiler and
    pybind11 must be installed, because nothing is downloaded.

    Args:
        out: Folder for build.log.
        needs_cuda: Whether the module must have CUDA kernels.
        archs: Compute capabilities to build for, such as "90". Default: the capability of GPU 0.

    Returns:
        "built the native module" or "the native module was built before".

    Raises:
        RuntimeError: If the build fails. The message has the end of build.log.
    """
    found = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0 and (not needs_cuda or found.stdout.split()[-1] == "True"):
        return "the native module was built before"
    build(ROOT, ROOT / "build" / "gpu", ROOT / "mpo_ext", out / "build.log", needs_cuda=needs_cuda, archs=archs)
    link = ROOT / "mpo_ext" / "kernels"
    if importlib.util.find_spec("mpo_ext.kernels") is None and not link.exists():
        link.symlink_to(Path("..") / "kernels" / "mpo_triton")
    return "built the native module"


def build(
    source: Path, folder: Path, target: Path, log: Path, *, needs_cuda: bool = True, archs: str | None = None
) -> None:
    """Configures and builds the CMake project ``source`` in the folder ``folder``. Writes the module to ``target``.

    Appends the output of CMake to ``log``. Raises RuntimeError if a command fails.
    """
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DMPO_OUTPUT_DIR={target}"]
    options.append(f"-DMPO_CUDA={'ON' if needs_cuda else 'OFF'}")
    if needs_cuda:
        # Line information lets ncu show the source of an instruction.
        options += [f"-DMPO_CUDA_ARCHS={archs or _arch()}", "-DCMAKE_CUDA_FLAGS=-lineinfo -Xptxas -v"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        for command in (
            ["cmake", "--fresh", "-G", "Ninja", "-S", str(source), "-B", str(folder), *options],
            ["cmake", "--build", str(folder)],
        ):
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), check=False)
            if status.returncode != 0:
                raise RuntimeError(
                    f"{command[0]} failed, see {log}:\n" + "\n".join(log.read_text().splitlines()[-15:])
                )


def _arch() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _environment() -> dict[str, str]:
    """Returns the environment variables, with the folders of this Python and of nvcc added to PATH."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return {**os.environ, "PATH": os.pathsep.join(folders)}
