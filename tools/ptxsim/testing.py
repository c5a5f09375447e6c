"""Helpers for tests that compile kernels."""

import os

import pytest

from .compile import find_nvcc

NEEDS_NVCC = (
    "needs nvcc, to compile the kernels to PTX: install the CUDA toolkit and put nvcc on PATH, or run "
    "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' "
    "'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*' (the extra `nvcc` of mpo-ext)"
)


def need_nvcc():
    """Skips the calling test or test module if nvcc is missing. In CI, a missing nvcc is a failure."""
    if find_nvcc() is not None:
        return
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(NEEDS_NVCC, pytrace=False)
    pytest.skip(NEEDS_NVCC, allow_module_level=True)
