"""Chooses the backend that runs an operator, and explains why a backend cannot run."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mpo_ext.checks import install_hint
from mpo_ext.ops import native

BACKENDS = ("cpu", "cuda", "triton", "reference")

with suppress(ImportError):
    native.compiled()  # loaded now, because its fork handler must see every later fork


def choose_backend(backend: str | None, logits: Tensor, name: str = "logits") -> str:
    """Returns ``backend``, or the fastest backend for ``logits`` if ``backend`` is None.

    ``logits`` may also be hidden states. ``name`` is the name of this tensor in error messages.

    Raises:
        TypeError: If the backend does not support the dtype of ``logits``.
        ValueError: If ``backend`` is not the name of a backend.
        RuntimeError: If the backend cannot run on this machine or on the device of ``logits``.
    """
    device = logits.device.type
    if device == "meta":
        raise RuntimeError(f"{name} must be on a device that holds data, got device meta")
    if backend is None:
        if device == "cpu":
            return "reference" if native.PURE_PYTHON else "cpu"
        if logits.dtype == torch.float64:
            return "reference"
        if cuda_problem(logits.device) is None:
            return "cuda"
        return "triton" if triton_problem(device) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "cpu" and device != "cpu":
        raise RuntimeError(f"backend 'cpu' needs {name} on the CPU, got {name} on {logits.device}")
    if backend in ("cuda", "triton"):
        problem = cuda_problem(logits.device) if backend == "cuda" else triton_problem(device)
        if problem is not None:
            raise RuntimeError(f"backend {backend!r} cannot run: {problem}")
        if logits.dtype == torch.float64:
            raise TypeError(f"{name} must not be torch.float64 with backend {backend!r}, got torch.float64")
    return backend


@torch.compiler.assume_constant_result  # keeps torch.compile from tracing the driver queries
def cuda_problem(device: torch.device) -> str | None:
    """Returns the reason why the CUDA kernels cannot run on this device, or None if they can."""
    try:
        has_cuda = bool(native.compiled().has_cuda)
    except ImportError as error:
        return str(error)
    if not has_cuda:
        return "this mpo_ext was built without CUDA kernels; with nvcc on PATH, MPO_CUDA=ON pip install . builds them"
    if device.type != "cuda":
        seen = "" if torch.cuda.is_available() else ", and torch sees no GPU"
        return f"it needs tensors on an NVIDIA GPU, got device {device}{seen}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, got an AMD GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs a GPU of compute capability 8.0 or newer, got {major}.{minor}"
    return _device_problem(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_problem(index: int) -> str | None:
    """Returns the reason why the CUDA runtime cannot load the kernels of this build on a GPU, or None if it can.

    The result is cached for each GPU. If the kernels do not load, a warning gives the reason.
    """
    with torch.cuda.device(index):
        error = native.compiled().cuda_device_error()
    if not error:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    built = f"they were built for {native.compiled().cuda_archs} by {native.compiled().cuda_compiler}"
    problem = f"its kernels do not load on cuda:{index}, compute capability {major}.{minor}: {error}; {built}"
    warnings.warn(f"mpo_ext does not use its backend 'cuda': {problem}", stacklevel=2)
    return problem


def triton_problem(device: str) -> str | None:
    """Returns the reason why the Triton kernels cannot run on this device type, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {install_hint('triton')}"
    if device in ("cuda", "xpu"):
        return None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs tensors on a GPU, got device {device} (TRITON_INTERPRET=1 runs its interpreter on a CPU)"


def cpu_isa() -> str:
    """Returns the name of the instruction set that the CPU kernels use.

    The environment variable MPO_CPU_ISA selects the instruction set. Without this variable, the CPU kernels use the
    best instruction set of this machine.

    Raises:
        ValueError: If MPO_CPU_ISA does not name an instruction set that this machine can run.
    """
    runnable = native.cpu_isas()
    requested = os.environ.get("MPO_CPU_ISA")
    if requested and requested not in runnable:
        raise ValueError(f"MPO_CPU_ISA must be one of {', '.join(runnable)} on this machine, got {requested!r}")
    return requested or runnable[0]


def triton_kernels() -> Any:
    """Returns the module ``mpo_ext.kernels``, imported on first use because triton is optional."""
    from mpo_ext import kernels

    return kernels
