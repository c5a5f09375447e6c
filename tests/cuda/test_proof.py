"""Tests memory traffic and fences of the CUDA kernels. Also tests that deliberate mistakes in kernels are detected."""

import re

import numpy as np
import ptxsim
import pytest
from ptxsim.testing import need_nvcc
from simulator import (
    NARROWED,
    Pairs,
    Rows,
    SimulatedNative,
    ptx,
    run_forward,
    run_logits_grad,
    run_token_logp,
)

need_nvcc()


# ---------------------------------------------------------------------------------------------------------- traffic


def bytes_of(report: object, buffer: object) -> tuple[int, int]:
    found = [b for b in report.buffers if b.buffer is buffer]
    return (found[0].bytes_read, found[0].bytes_written) if found else (0, 0)


def efficiency(report: object, kind: str, width: int) -> float:
    """Returns the requested bytes divided by the bytes of the accessed memory sectors. A sector has 32 bytes.

    Only vector accesses to global memory count. ``kind`` is "load" or "store", and ``width`` is the size of a vector
    in bytes.
    """
    accesses = [
        a for a in report.accesses if a.space == "global" and a.kind == kind and f".v{width // 4}." in a.ins.text
    ]
    return sum(a.bytes for a in accesses) / (32 * sum(a.sectors for a in accesses))


@pytest.mark.parametrize(("vocab", "at_least"), [(4096, 0.95), (5003, 0.9), (15001, 0.9)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_labelled_logit_is_read_once_and_each_gradient_written_once(
    dtype: str, vocab: int, at_least: float
) -> None:
    labels = [-100] * 6 + [3, -100, vocab - 1, 700, -100, 0]
    rows = Rows(dtype, labels, vocab, vocab)
    native = SimulatedNative()
    out = run_forward(native, rows, Pairs(rows.rows, np.array([-20.0, -30.0])))
    labelled_bytes = int(rows.is_scored.sum()) * vocab * rows.width
    _, forward = native.reports[-1]
    read, _ = bytes_of(forward, rows.buffer)
    assert labelled_bytes <= read <= 1.01 * labelled_bytes
    assert forward.global_bytes_stored <= 64 * rows.rows + 64 * forward.grid[0] + 512
    assert efficiency(forward, "load", 16) >= at_least

    grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], out["weight"])
    _, backward = native.reports[-1]
    read, _ = bytes_of(backward, rows.buffer)
    _, write = bytes_of(backward, grad)
    assert labelled_bytes <= read <= 1.01 * labelled_bytes
    assert rows.rows * vocab * rows.width <= write <= 1.01 * rows.rows * vocab * rows.width
    assert efficiency(backward, "load", 16) >= at_least
    assert efficiency(backward, "store", 16) >= at_least


@pytest.mark.parametrize(("dtype", "grad_dtype"), NARROWED)
@pytest.mark.parametrize("vocab", [4096, 15_004])
def test_a_narrow_gradient_is_written_in_one_pass(dtype: str, grad_dtype: str, vocab: int) -> None:
    rows = Rows(dtype, [3, vocab - 1, 700, 0], vocab, vocab)
    place = Rows(grad_dtype, [0] * 4, vocab, vocab)
    native = SimulatedNative()
    out = run_token_logp(native, rows)
    grad = run_logits_grad(native, rows, out["row_max"], out["row_sum"], np.ones(4, np.float32), grad=place)
    _, report = native.reports[-1]
    read, written = bytes_of(report, rows.buffer)[0], bytes_of(report, grad)[1]
    assert 4 * vocab * rows.width <= read <= 1.01 * 4 * vocab * rows.width
    assert 4 * vocab * place.width <= written <= 1.01 * 4 * vocab * place.width
    assert efficiency(report, "load", 16) >= 0.9
    words = 4 * place.width // rows.width  # of 32 bits, for the 16 bytes of logits that a thread loads
    assert efficiency(report, "store", 4 * words) >= 0.9


def test_labelled_rows_are_cut_evenly_wherever_they_lie() -> None:
    vocab = 9001
    rows = Rows("bfloat16", [-100] * 40 + [5] * 13, vocab, vocab)
    native = SimulatedNative()
    run_token_logp(native, rows)
    _, report = native.reports[-1]
    assert report.grid[0] == 8
    # 13 rows in 8 parts: all seven cuts fall into a row, and each piece increments an arrival counter.
    assert report.global_atomics == 14


# ----------------------------------------------------------------------------------------------------------- fences


def fence_problems(text: str) -> list[str]:
    """Returns a message for each missing fence in PTX text. Each increment of an arrival counter needs two fences.

    No write or barrier may lie between the first fence and the increment. No read or barrier may lie between the
    increment and the second fence.
    """
    # A thread block writes its results, increments a counter, and then reads the results of other blocks.
    publishes = re.compile(r"\b(st\.global|st\.shared|bar\.sync|barrier\.sync)|\bst\.v\d")
    reads = re.compile(r"\b(ld\.global|bar\.sync|barrier\.sync|bar\.warp)")
    fence = re.compile(r"\b(membar\.gl|fence\.(acq_rel|sc)\.gpu)\b")
    problems = []
    for kernel in re.split(r"\.entry", text)[1:]:
        lines = [line.strip() for line in kernel.splitlines()]
        lines = [line for line in lines if line and not line.startswith((".loc", "//"))]
        arrivals = [i for i, line in enumerate(lines) if re.search(r"\batom\.\S*inc", line)]
        is_fused = "Lb1EEEv" in kernel.split("(")[0]
        assert len(arrivals) == (2 if is_fused else 1)
        for arrival in arrivals:
            before = next(
                i for i in range(arrival - 1, -1, -1) if publishes.search(lines[i]) or fence.search(lines[i])
            )
            after = next(i for i in range(arrival + 1, len(lines)) if reads.search(lines[i]) or fence.search(lines[i]))
            problems += [f"{lines[i]} next to {lines[arrival]}" for i in (before, after) if not fence.search(lines[i])]
    return problems


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_each_arrival_is_between_two_fences(arch: str) -> None:
    """Checks the PTX text, because the simulator's memory is sequentially consistent and hides a missing fence."""
    text = ptx("token_logp", arch)
    assert len(re.findall(r"\.entry", text)) == 12
    assert fence_problems(text) == []


@pytest.mark.parametrize(
    "line",
    [
        "__threadfence();  // the piece is visible before the arrival is",
        "__threadfence();  // no piece is read before the last arrival",
        "__threadfence();  // this block's rows are visible before its arrival is",
        "__threadfence();  // no row is read before the last arrival",
    ],
)
def test_a_missing_fence_is_detected(line: str) -> None:
    assert fence_problems(ptx("token_logp", "sm_90", (line, ""))) != []


# --------------------------------------------------------------------------------------------------- broken kernels


def results(edit: tuple[str, str] | None, vocab: int = 9001, **options: object) -> dict[str, np.ndarray]:
    rows = Rows("bfloat16", [3, -100, 5, vocab - 1], vocab, vocab)
    return run_forward(SimulatedNative(edit=edit, traffic=False, **options), rows, Pairs(4, np.array([-20.0, -30.0])))


def test_an_edit_without_effect_leaves_the_results_as_they_are() -> None:
    untouched = results(("constexpr int kWords = 4;", "constexpr int kWords = 2 + 2;"))
    assert {k: v.tobytes() for k, v in results(None).items()} == {k: v.tobytes() for k, v in untouched.items()}


def test_a_missing_barrier_is_caught() -> None:
    barrier = (
        "    // The slots are complete, and all warps have read the other buffer, which the next pieces overwrite.\n"
    )
    with pytest.raises(ptxsim.RaceError):
        results((barrier + "    __syncthreads();\n", ""))


def test_a_tail_that_is_off_by_one_is_caught() -> None:
    broken = results(
        ("g.tail = max(g.skip + vocab - g.end * kVec, 0);", "g.tail = max(g.skip + vocab - g.end * kVec - 1, 0);")
    )
    whole = results(None)
    assert not np.array_equal(broken["row_sum"], whole["row_sum"])


def test_a_head_that_is_off_by_one_is_caught() -> None:
    with pytest.raises(ptxsim.MemoryFault):
        results(("g.head = min(vocab, g.begin * kVec - g.skip);", "g.head = min(vocab, g.begin * kVec - g.skip) - 1;"
                 "\n    g.base -= 2;"))  # fmt: skip


@pytest.mark.parametrize(
    "edit",
    [
        ("atomicInc(a.arrivals + gridDim.x, gridDim.x - 1)", "atomicAdd(a.arrivals + gridDim.x, 1u)"),
        (
            "atomicInc(a.arrivals + first, static_cast<unsigned>(last - first))",
            "atomicAdd(a.arrivals + first, 1u)",
        ),
    ],
    ids=["of the grid", "of a row"],
)
def test_a_counter_that_is_not_reset_is_caught(edit: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="a counter was not reset"):
        results(edit)


def test_a_last_block_that_is_not_the_last_is_caught() -> None:
    arrival = "shared.is_last = atomicInc(a.arrivals + gridDim.x, gridDim.x - 1) == gridDim.x - 1;"
    with pytest.raises(ptxsim.MemoryFault):  # it reads results that other blocks have not written yet
        results((arrival, arrival.replace("== gridDim.x - 1;", "== 0;")), resident=1)
