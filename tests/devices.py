"""Device and supported dtypes of each backend in the tests."""

import os
from typing import Any

import torch


def device_of(backend: str) -> str:
    """Returns the device on which the tests run a backend."""
    on_gpu = backend == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return "cuda" if on_gpu else "cpu"


def is_left_out(parameters: dict[str, Any]) -> bool:
    """Returns whether a test case combines float64 with the backend "cuda" or "triton".

    The kernels of these backends do not support float64.
    """
    backends = [value for name, value in parameters.items() if name in ("backend", "engine", "kernel")]
    values = [*parameters.values()]
    values += [each for value in values if isinstance(value, dict) for each in value.values()]
    has_double = any(value is torch.float64 for value in values)
    return has_double and not {"cuda", "triton"}.isdisjoint(backends)
