"""Checks of the machine code in the built module; see check_sass.py."""

import gzip
from pathlib import Path

import check_sass
import pytest

from mpo_ext.ops.native import compiled


def test_the_machine_code_neither_spills_nor_loads_by_halves() -> None:
    cuobjdump = check_sass.find_cuobjdump()
    if not compiled().has_cuda:
        pytest.skip("needs a build with CUDA kernels: MPO_CUDA=ON")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, on PATH or in the triton package")
    assert check_sass.problems(compiled().__file__, cuobjdump) == []


def test_the_module_is_small_enough_for_a_wheel() -> None:
    assert len(gzip.compress(Path(compiled().__file__).read_bytes())) < 8 * 2**20
