"""Runs compiled GPU kernels (PTX) on the CPU with numpy."""

from .compile import CompiledTriton, CompileError, compile_cuda, compile_triton, find_nvcc
from .control import DeviceTrap
from .machine import DeadlockError, LaunchTimeout
from .memory import Buffer, MemoryFault, Pointer, PTXError, RaceError
from .module import Kernel, Module
from .numerics import from_bf16, to_bf16
from .ops import NotImplementedPTX
from .parser import PTXSyntaxError
from .report import Report

__all__ = [
    "Buffer",
    "CompileError",
    "CompiledTriton",
    "DeadlockError",
    "DeviceTrap",
    "Kernel",
    "LaunchTimeout",
    "MemoryFault",
    "Module",
    "NotImplementedPTX",
    "PTXError",
    "PTXSyntaxError",
    "Pointer",
    "RaceError",
    "Report",
    "compile_cuda",
    "compile_triton",
    "find_nvcc",
    "from_bf16",
    "to_bf16",
]
