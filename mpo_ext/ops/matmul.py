"""Chooses the dtype for the inputs of matrix products, and computes float32 products of half-precision inputs."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class WideMatmuls(NamedTuple):
    """Describes whether half-precision matmuls on a device support a float32 output."""

    writes: bool  # whether a matmul can write its product to a float32 tensor
    adds: bool  # whether a matmul can add its product to a float32 tensor


@functools.cache
def wide_matmuls(device: torch.device, dtype: torch.dtype) -> WideMatmuls:
    """Returns whether half-precision matmuls can write to a float32 tensor, and whether they can add to it.

    ``dtype`` is the dtype of the inputs. If it is not half-precision, both answers are False. A CPU supports neither.
    NVIDIA GPUs can write since torch 2.8, and add since torch 2.10. The answers are found by small trial products and
    cached.
    """
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return WideMatmuls(False, False)
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    writes = _gives(16, total, lambda: torch.mm(ones, ones, out_dtype=torch.float32, out=total))
    adds = writes and _gives(32, total, lambda: torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total))
    return WideMatmuls(writes, adds)


def _gives(value: float, out: Tensor, call: Callable[[], object]) -> bool:
    """Returns whether ``call`` runs without an error and sets all elements of ``out`` to ``value``.

    If ``out`` is a meta tensor, its elements are not checked.
    """
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError):  # a missing overload, device or combination of dtypes
        return False
    return out.is_meta or bool((out == value).all())


def scaled_matmul(a: Tensor, b: Tensor, out: Tensor, scale: float, bias: Tensor | None) -> None:
    """Writes ``scale * (a @ b + bias)`` to ``out``.

    ``out`` must have the dtype of ``a`` and ``b``. There is one exception: if ``wide_matmuls`` returns
    ``writes=True``, ``out`` may be float32 while ``a`` and ``b`` are half-precision.
    """
    if a.dtype == out.dtype:
        if bias is not None:
            torch.addmm(bias, a, b, beta=scale, alpha=scale, out=out)
        elif scale != 1:
            torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
        else:
            torch.mm(a, b, out=out)
        return
    torch.mm(a, b, out_dtype=out.dtype, out=out)
    if scale != 1:
        out.mul_(scale)
    if bias is not None:
        out.add_(bias, alpha=scale)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """Adds ``a @ b`` to ``total``. If ``is_first`` is True, sets ``total`` to ``a @ b``. ``total`` keeps its dtype."""
    if a.dtype == total.dtype:
        if is_first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    can = wide_matmuls(a.device, a.dtype)
    if can.writes and is_first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
        return
    if can.adds:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    product = torch.mm(a, b, out_dtype=total.dtype) if can.writes else torch.mm(a, b)
    if is_first:
        total.copy_(product)
    else:
        total.add_(product)


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype to which inputs of ``dtype`` are converted for matmuls.

    A GPU keeps every dtype. A CPU keeps float32 and float64. A CPU keeps bfloat16 or float16 only if matmuls in this
    dtype are faster than in float32. Otherwise, the result is float32.

    By default, a measurement finds the faster dtype. The environment variable MPO_CPU_MATMUL replaces the measurement.
    With "float32", half precision is always converted, so logits are never rounded. With "native", no dtype is
    converted.

    Raises:
        ValueError: If MPO_CPU_MATMUL has another value.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    requested = os.environ.get("MPO_CPU_MATMUL")
    if requested not in (None, "", "float32", "native"):
        raise ValueError(f"MPO_CPU_MATMUL must be 'float32' or 'native', got {requested!r}")
    is_native = requested == "native" if requested else _is_fast_on_cpu(dtype)
    return dtype if is_native else torch.float32


@torch.compiler.assume_constant_result  # keeps torch.compile from tracing the stopwatch
@functools.cache
def _is_fast_on_cpu(dtype: torch.dtype) -> bool:
    """Returns whether matmuls of ``dtype`` are at least 1.2 times as fast as float32 on this CPU; measured once."""

    def seconds(kind: torch.dtype) -> float:
        a, b = torch.ones(256, 512, dtype=kind), torch.ones(512, 2048, dtype=kind)
        best = math.inf
        for _ in range(4):  # the first product initialises the library
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(dtype) < seconds(torch.float32) / 1.2
