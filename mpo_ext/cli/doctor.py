"""Defines the command ``mpo-ext doctor``, which prints installed versions and usable backends even if imports fail."""

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
from mpo_ext.cli import shared

_PACKAGES = ("torch", "numpy", "transformers", "accelerate", "triton")
_BACKENDS = "mpo_ext.ops.backends"
_VISION = "the processors of some vision models need it (extra 'vision')"


def add_parser(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "doctor",
        help="print what is installed and which backends can run here, and check a model's chat template",
        description="Prints what is installed and which backends can run here. With MODEL, also encodes a question as "
        "training does and compares the token ids with those of the model's processor; weights are not loaded.",
    )
    parser.add_argument("model", nargs="?", help="folder of a model, of a run or of adapters, or a name on the hub")
    shared.add_chat(parser)
    shared.add_debug(parser)
    parser.set_defaults(run=doctor)


@shared.command("doctor", extra="train", failure=2)
def doctor(args: argparse.Namespace) -> int:
    """Prints facts for a bug report, one per line. If ``args.model`` is given, also checks the model's processor.

    Returns:
        The exit status: 1 if the CPU kernels cannot run or the check of the processor finds a problem, 2 if the
        processor cannot be checked, otherwise 0.
    """
    for name, fact in _facts():
        print(f"{name:<20}{fact}")
    status = 0 if _try(lambda: importlib.import_module(_BACKENDS).cpu_isa())[0] else 1
    return status if args.model is None else max(status, _check_model(args))


def _check_model(args: argparse.Namespace) -> int:
    from mpo_ext.cli.processor import check_processor

    report = check_processor(args, args.model)
    print()
    print("\n".join(report.text_lines()))
    print("NOT VALID: " + "; ".join(report.problems) if report.problems else "valid: the ids are the processor's")
    return 1 if report.problems else 0


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

        problem = importlib.import_module("mpo_ext.processors").torchvision_problem()
        version = _try(functools.partial(importlib.metadata.version, "torchvision"))[1]
        yield "torchvision", version if problem is None else f"{problem}: {_VISION}"

    has_native, file_or_error = _try(lambda: importlib.import_module("mpo_ext.ops.native").compiled().__file__)
    yield "native module", file_or_error
    if not has_native:
        yield "backends", "reference" if has_torch else "none"
        return
    native = importlib.import_module("mpo_ext.ops.native")
    compiled = native.compiled()
    yield "compiled by", compiled.compiler
    yield "CPU kernels", f"run here as {', '.join(native.cpu_isas())}"
    has_isa, isa = True, native.cpu_isas()[0]
    if torch is not None:
        has_isa, isa = _try(lambda: importlib.import_module(_BACKENDS).cpu_isa())
    yield "in use", f"{isa} (MPO_CPU_ISA={os.environ.get('MPO_CPU_ISA', '')})"
    archs = compiled.cuda_archs
    yield "CUDA architectures", f"{archs}, {compiled.cuda_compiler}" if archs else "none: built without CUDA kernels"
    if torch is None:
        yield "backends", "none: torch is missing"
    else:
        yield from _backend_facts(torch, has_cpu=has_isa, has_cuda_kernels=bool(archs))


def _backend_facts(torch: Any, *, has_cpu: bool, has_cuda_kernels: bool) -> Iterator[tuple[str, str]]:
    ops = importlib.import_module(_BACKENDS)
    backends = ["cpu (tensors on the CPU)", "reference (any device)"] if has_cpu else ["reference (any device)"]
    device = "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cuda"
    triton_problem = ops.triton_problem(device)
    if triton_problem is None and not (torch.cuda.is_available() or device == "xpu"):
        triton_problem = "torch sees no GPU"
    if triton_problem is None:
        backends.insert(0, f"triton (tensors on {device})")
    cuda_problem = ops.cuda_problem(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if cuda_problem is None:
        backends.insert(0, "cuda (tensors on cuda)")
    if has_cuda_kernels and not torch.cuda.is_available():
        cuda_problem = "built; no GPU here" + (", and a torch without CUDA" if torch.version.cuda is None else "")
    yield "CUDA kernels", cuda_problem or "can run"
    yield "Triton kernels", triton_problem or "can run"
    yield "backends", ", ".join(backends)


def _try(fact: Callable[[], object]) -> tuple[bool, str]:
    """Calls ``fact``. Returns (True, result as text), or (False, error as text) if the call fails."""
    try:
        return True, str(fact())
    except importlib.metadata.PackageNotFoundError:
        return False, "not installed"
    except Exception as error:  # an import can raise any exception type
        return False, f"{type(error).__name__}: {error}"
