"""Tests the kernel exp_logits in the simulator: results, memory traffic, and the same bits under every schedule."""

import pytest
import torch
from ptxsim.testing import need_nvcc
from simulator import SimulatedNative, simulated_backend
from tiles import check_exp_logits, exp_logits_case

from mpo_ext.ops import exp_logits
from mpo_ext.ops.memory import Tile

need_nvcc()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(native: SimulatedNative, dtype: torch.dtype, vocab: int) -> bytes:
    """Runs exp_logits on the first two tiles of the vocabulary, and returns the bytes of all outputs."""
    logits, labels, edges = exp_logits_case(vocab)
    sums = torch.ones(len(labels), 37)
    reference, outputs = None, []
    with simulated_backend(native):
        for first, end in ((0, edges[1]), (edges[1], edges[2])):
            tile = logits[:, first:end].contiguous()
            out = torch.empty(tile.shape, dtype=dtype)
            row_max = logits[:, :end].amax(1)
            place = Tile(first, vocab, None)
            reference = exp_logits.write_exp_logits(
                tile, labels, row_max, reference, sums, "cuda", out, place, is_last=False
            )
            outputs += [out, reference.clone()]
    return b"".join(each.view(torch.uint8).numpy().tobytes() for each in (*outputs, sums))


@pytest.mark.parametrize("vocab", [13, 1003, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_exponentials_are_those_of_float64(arch: str, dtype: torch.dtype, vocab: int) -> None:
    with simulated_backend(SimulatedNative(arch)):
        check_exp_logits("cuda", dtype, vocab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schedules_leave_the_bits_as_they_are(dtype: torch.dtype) -> None:
    expected = run(SimulatedNative(traffic=False), dtype, 9001)
    for seed in range(20):
        assert run(SimulatedNative(schedule="random", seed=seed, traffic=False), dtype, 9001) == expected, seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_logit_is_read_once_and_each_exponential_written_once(dtype: torch.dtype) -> None:
    native = SimulatedNative()
    columns = 8192
    labels = torch.arange(5) * 1000
    logits, sums = torch.randn(5, columns), torch.randn(5, 64)
    with simulated_backend(native):
        row_max = logits.amax(1)
        out = torch.empty(5, columns, dtype=dtype)
        place = Tile(0, columns, None)
        exp_logits.write_exp_logits(
            logits, labels, row_max, row_max - 1, sums, "cuda", out, place, is_last=dtype == torch.float16
        )
    _, report = native.reports[-1]
    # The kernel reads the logits most, and writes the exponentials most.
    read = max(buffer.bytes_read for buffer in report.buffers)
    written = max(buffer.bytes_written for buffer in report.buffers)
    assert 5 * 4 * columns <= read <= 1.01 * 5 * 4 * columns
    assert 5 * dtype.itemsize * columns <= written <= 1.01 * 5 * dtype.itemsize * columns
    rescaled = [buffer for buffer in report.buffers if buffer.bytes_read and buffer.bytes_written]
    raised = dtype == torch.float16  # all rows read and write their sums once
    assert [(buffer.bytes_read, buffer.bytes_written) for buffer in rescaled] == [(5 * 256, 5 * 256)] * raised
