"""The ``mpo-ext doctor`` command: what is installed and which backends can run. Works on a broken installation."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import mpo_ext

_PACKAGES = ("torch", "numpy", "transformers", "accelerate", "triton")


def add_parser(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers ``mpo-ext doctor``."""
    parser = subcommands.add_parser("doctor", help="say what is installed and which backends can run here")
    parser.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Prints a fact a line, for a bug report. Returns 1 if not even the CPU kernels can run."""
    for name, fact in _facts():
        print(f"{name:<20}{fact}")
    return 0 if _try(lambda: importlib.import_module("mpo_ext.ops.backends").cpu_isa())[0] else 1


def _facts() -> Iterator[tuple[str, str]]:
    yield "mpo_ext", f"{mpo_ext.__version__} in {os.path.dirname(mpo_ext.__file__)}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield package, _try(functools.partial(importlib.metadata.version, package))[1]
    has_torch, torch_error = _try(lambda: importlib.import_module("torch").__version__)
    torch: Any = importlib.import_module("torch") if has_torch else None
    if torch is None:
        yield "torch import", torch_error
    else:
        yield "torch's CUDA", f"{torch.version.cuda or 'none'}, {torch.cuda.device_count()} GPU(s)"

    has_native, text = _try(lambda: importlib.import_module("mpo_ext.ops.native").compiled().__file__)
    yield "native module", text
    if not has_native:
        yield "backends", "reference" if has_torch else "none"
        return
    native = importlib.import_module("mpo_ext.ops.native")
    yield "compiled by", native.compiled().compiler
    yield "CPU kernels", f"run here as {', '.join(native.cpu_isas())}"
    has_isa, in_use = True, native.cpu_isas()[0]
    if has_torch:
        has_isa, in_use = _try(lambda: importlib.import_module("mpo_ext.ops.backends").cpu_isa())
    yield "in use", f"{in_use} (MPO_CPU_ISA={os.environ.get('MPO_CPU_ISA', '')})"
    archs = native.compiled().cuda_archs
    yield "CUDA architectures", f"{archs}, {native.compiled().cuda_compiler}" if archs else "none: built without CUDA kernels"
    if not has_torch:
        yield "backends", "none: torch is missing"
        return
    ops = importlib.import_module("mpo_ext.ops.backends")
    backends = ["cpu (tensors on the CPU)", "reference (any device)"] if has_isa else ["reference (any device)"]
    device = "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cuda"
    problem = ops.triton_problem(device)
    if problem is None and not (torch.cuda.is_available() or device == "xpu"):
        problem = "torch sees no GPU"
    if problem is None:
        backends.insert(0, f"triton (tensors on {device})")
    cuda_problem = ops.cuda_problem(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if cuda_problem is None:
        backends.insert(0, "cuda (tensors on cuda)")
    if archs and not torch.cuda.is_available():
        cuda_problem = "built; no GPU here" + (", and a torch without CUDA" if torch.version.cuda is None else "")
    yield "CUDA kernels", cuda_problem or "can run"
    yield "Triton kernels", problem or "can run"
    yield "backends", ", ".join(backends)


def _try(fact: Callable[[], object]) -> tuple[bool, str]:
    """Returns whether it could be had, and the fact or what went wrong; a doctor works when half of it is broken."""
    try:
        return True, str(fact())
    except importlib.metadata.PackageNotFoundError:
        return False, "not installed"
    except Exception as error:  # whatever an import may raise
        return False, f"{type(error).__name__}: {error}"
