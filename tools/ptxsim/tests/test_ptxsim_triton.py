"""Compares kernels compiled by Triton with float64 numpy."""

import numpy as np
import ptxsim
import pytest
from ptxsim import from_bf16, to_bf16

pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
import ptxsim_triton_kernels as tk

SCHED = ["lockstep", "random"]


def gemm(dtype, M, N, K, bm, bn, bk, stages, warps=4, pad=0, seed=0, **kw):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(M, K + pad)), rng.normal(size=(K, N + pad))
    conv = {"bf16": to_bf16, "fp16": lambda x: x.astype(np.float16), "fp32": lambda x: x.astype(np.float32)}[dtype]
    A, B = conv(a), conv(b)
    back = from_bf16 if dtype == "bf16" else lambda x: x
    ref = back(A)[:, :K].astype(np.float64) @ back(B)[:, :N].astype(np.float64)
    C = np.zeros((M, N + pad), np.float32)
    p = "*" + dtype
    k = ptxsim.compile_triton(
        tk.matmul,
        {"a": p, "b": p, "c": "*fp32", **dict.fromkeys(("M", "N", "K", "sa", "sb", "sc"), "i32")},
        {"BM": bm, "BN": bn, "BK": bk, "OUT": tl.float32},
        arch=80,
        num_warps=warps,
        num_stages=stages,
        aligned=("a", "b", "c") + (("sa", "sb", "sc", "N", "K") if pad == 0 else ()),
    )
    grid = (-(-M // bm), -(-N // bn))
    rep = k.launch(grid, [A, B, C, M, N, K, K + pad, N + pad, N + pad], **kw)
    err = np.abs(C[:, :N] - ref).max() / np.abs(ref).max()
    return k, rep, err


@pytest.mark.parametrize(
    "stages,tile",
    [
        (1, (16, 16, 16)),
        (1, (64, 64, 32)),
        (2, (128, 64, 64)),
        (3, (64, 64, 32)),
        (3, (32, 64, 16)),
        (4, (16, 16, 32)),
        (4, (128, 64, 64)),
    ],
)
def test_matmul_bf16(stages, tile):
    k, rep, err = gemm("bf16", 100, 96, 160, *tile, stages)
    assert err < 1e-6
    assert k.ptx.count("mma.sync") and k.hidden_params == 2
    if stages > 1:
        assert "cp.async" in k.ptx
    blocks = -(-100 // tile[0]) * -(-96 // tile[1])
    assert blocks > 1 or tile[0] > 64
    # masked loads fetch every element of a once per column of tiles, and of b once per row of tiles
    assert rep.buffer("arg0").read_passes == -(-96 // tile[1])
    assert rep.buffer("arg1").read_passes == -(-100 // tile[0])


@pytest.mark.parametrize(
    "dtype,tile,tol", [("fp16", (32, 32, 32), 1e-6), ("fp32", (32, 32, 16), 2e-3), ("bf16", (64, 32, 16), 1e-6)]
)
@pytest.mark.parametrize("schedule", SCHED)
def test_matmul_types_and_schedules(dtype, tile, tol, schedule):
    _, rep, err = gemm(
        dtype, 50, 40, 48, *tile, 3, pad=3, schedule=schedule, seed=1, check_races=True, check_poison=True
    )
    assert err < tol  # fp32 goes through tf32
    assert not rep.races


def test_matmul_half_accumulator():
    a, b = np.random.default_rng(3).normal(size=(2, 64, 64)).astype(np.float16)
    c = np.zeros((64, 64), np.float16)
    k = ptxsim.compile_triton(tk.matmul_f16, {"a": "*fp16", "b": "*fp16", "c": "*fp16"}, {"N": 64}, arch=80)
    assert ".f16.f16.f16.f16" in k.ptx
    k.launch(1, [a, b, c])
    assert np.abs(c - a.astype(np.float64) @ b.astype(np.float64)).max() < 0.1


@pytest.mark.parametrize(
    "arch,schedule,V,block,warps",
    [
        (80, "lockstep", 5000, 1024, 4),
        (90, "lockstep", 5000, 1024, 4),
        (100, "lockstep", 5000, 1024, 4),
        (90, "lockstep", 4096, 4096, 8),
        (80, "random", 700, 256, 2),
        (100, "random", 700, 256, 2),
    ],
)
def test_cross_entropy(arch, schedule, V, block, warps):
    rows = 6
    rng = np.random.default_rng(V)
    x = to_bf16(rng.normal(size=(rows, V)) * 3)
    xf = from_bf16(x).astype(np.float64)
    t = rng.integers(0, V, rows)
    t[2] = -100
    loss, lse = np.full(rows, np.nan, np.float32), np.full(rows, np.nan, np.float32)
    fwd = ptxsim.compile_triton(
        tk.ce_forward,
        {
            "logits": "*bf16",
            "target": "*i64",
            "loss": "*fp32",
            "lse": "*fp32",
            "stride": "i64",
            "V": "i32",
            "ignore": "i64",
        },
        {"BLOCK": block},
        arch=arch,
        num_warps=warps,
        aligned=("logits", "stride"),
    )
    rep = fwd.launch(rows, [x, t, loss, lse, V, V, -100], schedule=schedule, check_races=True, check_poison=True)
    zref = np.log(np.exp(xf).sum(1))
    lref = np.where(t < 0, 0, zref - xf[np.arange(rows), t])
    assert np.abs(lse - zref).max() < 1e-5 and np.abs(loss - lref).max() < 1e-5
    # one pass over the row, and every thread of the 5 kept rows loads the target's logit
    assert rep.buffer("arg0").bytes_read == 2 * V * rows + 5 * 2 * 32 * warps
    assert not rep.races
    bwd = ptxsim.compile_triton(
        tk.ce_backward,
        {
            "logits": "*bf16",
            "target": "*i64",
            "lse": "*fp32",
            "count": "*i32",
            "scale": "fp32",
            "stride": "i64",
            "V": "i32",
            "ignore": "i64",
        },
        {"BLOCK": block},
        arch=arch,
        num_warps=warps,
        aligned=("logits", "stride"),
    )
    count = np.zeros(1, np.int32)
    rep = bwd.launch(
        (rows, -(-V // block)),
        dict(logits=x, target=t, lse=lse, count=count, scale=0.5, stride=V, V=V, ignore=-100),
        schedule=schedule,
    )
    g = (np.exp(xf - zref[:, None]) - (np.arange(V) == t[:, None])) * 0.5
    g[t < 0] = 0
    assert np.all(np.abs(from_bf16(x) - g) <= 2**-8 * np.abs(g) + 1e-7)
    assert count[0] == rows
    b = rep.buffer("arg0")
    assert (b.read_passes, b.write_passes) == (1.0, 1.0)


@pytest.mark.parametrize("schedule", SCHED)
def test_atomic_add(schedule):
    M, N = 70, 90
    x = np.random.default_rng(7).normal(size=(M, N)).astype(np.float32)
    out, top = np.zeros(N, np.float32), np.zeros(1, np.int32)
    k = ptxsim.compile_triton(
        tk.column_sums, {"x": "*fp32", "out": "*fp32", "counts": "*i32", "M": "i32", "N": "i32"}, {"BM": 16, "BN": 32}
    )
    rep = k.launch((5, 3), [x, out, top, M, N], schedule=schedule)
    assert np.allclose(out, x.astype(np.float64).sum(0), atol=1e-5) and top[0] == 79
    assert rep.buffer("arg1").atomics == 5 * N


@pytest.mark.parametrize("arch", [80, 100])
def test_softmax_scan_sort(arch):
    x = np.random.default_rng(8).normal(size=(3, 500)).astype(np.float32)
    y = np.zeros_like(x)
    k = ptxsim.compile_triton(tk.softmax, {"x": "*fp32", "y": "*fp32", "N": "i32"}, {"BLOCK": 512}, arch=arch)
    k.launch(3, [x, y, 500])
    e = np.exp(x.astype(np.float64))
    assert np.allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5)
    v = np.random.default_rng(9).integers(-1000, 1000, 256).astype(np.int32)
    a, b = np.zeros_like(v), np.zeros_like(v)
    k = ptxsim.compile_triton(tk.scan_sort, {"x": "*i32", "y": "*i32", "z": "*i32"}, {"BLOCK": 256}, arch=arch)
    k.launch(1, [v, a, b])
    assert np.array_equal(a, np.cumsum(v)) and np.array_equal(b, np.sort(v))


def test_unsupported_is_named():
    k = ptxsim.compile_triton(
        tk.matmul,
        {"a": "*bf16", "b": "*bf16", "c": "*fp32", **dict.fromkeys(("M", "N", "K", "sa", "sb", "sc"), "i32")},
        {"BM": 64, "BN": 64, "BK": 32, "OUT": tl.float32},
        arch=90,
    )
    assert any("wgmma" in u for u in k.kernel.unsupported())
    z = np.zeros((64, 64), np.uint16)
    with pytest.raises(ptxsim.NotImplementedPTX, match="wgmma"):
        k.launch(1, [z, z.copy(), np.zeros((64, 64), np.float32), 64, 64, 64, 64, 64, 64])
