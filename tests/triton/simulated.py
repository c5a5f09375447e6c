"""Runs Triton kernels on CPU tensors: compiles them to PTX, which a simulator executes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ptxsim
import torch
from torch import Tensor

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
FILES = {
    "token_logp": ("token_logp_chunk_kernel", "token_logp_kernel"),
    "pair_loss": ("sequence_sums_kernel", "pair_rewards_kernel", "pair_loss_kernel", "row_weights_kernel"),
    "logits_grad": ("logits_grad_kernel",),
    "exp_logits": ("exp_logits_kernel",),
}


def signature(kernel: Any, tensors: dict[str, Tensor], constexprs: dict[str, Any]) -> dict[str, str]:
    """Returns the type of each kernel argument, as Triton's JIT determines it.

    Types of integers and floats come from the kernel's annotations.
    """
    return {
        parameter.name: POINTERS[tensors[parameter.name].dtype]
        if parameter.name in tensors
        else parameter.annotation_type
        for parameter in kernel.params
        if parameter.name not in constexprs
    }


class Simulated:
    """Replaces a Triton kernel, and runs its launches in the simulator."""

    def __init__(self, kernel: Any, arch: int, options: dict[str, Any], reports: dict) -> None:
        self.kernel, self.arch, self.options, self.reports = kernel, arch, options, reports
        self.compiled: dict[tuple, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constexprs: Any) -> None:
            values = dict(zip(self.kernel.arg_names, args, strict=False))
            tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            aligned = tuple(name for name, tensor in tensors.items() if tensor.data_ptr() % 16 == 0)
            types = signature(self.kernel, tensors, constexprs)
            key = (tuple(types.items()), tuple(constexprs.items()), aligned, num_warps)
            if key not in self.compiled:
                self.compiled[key] = ptxsim.compile_triton(
                    self.kernel, types, constexprs, arch=self.arch, num_warps=num_warps, aligned=aligned
                )
            # One buffer per storage, since tensors may share a storage.
            buffers: dict[int, tuple[Any, np.ndarray]] = {}
            for name, tensor in tensors.items():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in buffers:
                    memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                    buffers[storage.data_ptr()] = (ptxsim.Buffer(memory, name=name), memory)
            arguments = {
                name: buffers[value.untyped_storage().data_ptr()][0]
                + (value.data_ptr() - value.untyped_storage().data_ptr())
                if name in tensors
                else value
                for name, value in values.items()
            }
            report = self.compiled[key].launch(grid, arguments, check_races="raise", **self.options)
            for buffer, memory in buffers.values():
                memory[:] = buffer.raw[: buffer.nbytes]
            self.reports[self.kernel.__name__] = (
                report,
                {name: buffer for name, (buffer, _) in _named(buffers, tensors)},
            )

        return launch


def _named(buffers: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    for name, tensor in tensors.items():
        yield name, buffers[tensor.untyped_storage().data_ptr()]


@contextmanager
def simulation(arch: int = 80, **options: Any) -> Iterator[dict[str, Any]]:
    """Makes ``mpo_ext.kernels`` run in the simulator. Yields a dict with the last launch of each kernel.

    The dict maps the kernel's name to (report, buffers by argument name).
    """
    import importlib

    reports: dict[str, Any] = {}
    replaced = []
    try:
        for file, kernels in FILES.items():
            module = importlib.import_module(f"mpo_ext.kernels.{file}")
            for name in kernels:
                replaced.append((module, name, getattr(module, name)))
                key = (name, arch)
                stand_in = _CACHE.setdefault(key, Simulated(getattr(module, name), arch, {}, {}))
                stand_in.options, stand_in.reports = options, reports
                setattr(module, name, stand_in)
        yield reports
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


_CACHE: dict[tuple[str, int], Simulated] = {}
