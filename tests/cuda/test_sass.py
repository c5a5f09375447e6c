"""Tests the machine code in the built module with check_sass.py."""

import gzip
from pathlib import Path

import check_sass
import pytest

from mpo_ext.ops.native import compiled


def test_no_loop_spills_or_loads_by_halves() -> None:
    cuobjdump = check_sass.find_cuobjdump()
    if not compiled().has_cuda:
        pytest.skip("needs a build with CUDA kernels: MPO_CUDA=ON")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, on PATH or in the triton package")
    assert check_sass.problems(compiled().__file__, cuobjdump) == []


def test_spills_are_counted_in_loops_only() -> None:
    code = [(0, "STL [R1], R2"), (16, "@P0 LDL R2, [R1]"), (32, "MUFU.EX2 R3, R3"), (48, "@P1 BRA 0x10"), (64, "EXIT")]
    (loop,) = check_sass.innermost_loops(code)
    assert check_sass.spills(loop) == 1
    assert check_sass.spills([text for _, text in code]) == 2
    assert check_sass.innermost_loops([*code, (80, "BRA 0x0")]) == [loop]


def test_the_module_is_small_enough_for_a_wheel() -> None:
    assert len(gzip.compress(Path(compiled().__file__).read_bytes())) < 8 * 2**20
