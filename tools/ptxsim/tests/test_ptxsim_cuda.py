"""Compares kernels compiled by nvcc with float64 numpy."""

import io
import math
import struct
import sys

import numpy as np
import ptxsim
import pytest
from ptxsim import Buffer, from_bf16, to_bf16

SCHED = ["lockstep", "random"]


@pytest.mark.parametrize("schedule", SCHED)
def test_vec_add(cuda, schedule):
    n = 1000
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, n)).astype(np.float32)
    c = np.zeros(n, np.float32)
    rep = cuda.kernel("vec_add").launch(4, 256, [a, b, c, n], schedule=schedule)
    assert np.array_equal(c, a + b)
    assert rep.global_bytes_loaded == 8 * n and rep.global_bytes_stored == 4 * n
    assert rep.global_load_sectors == 2 * 125
    assert rep.buffer("arg0").read_passes == 1.0 and rep.buffer("arg2").bytes_written == 4 * n
    assert "vec_add" in rep.summary(accesses=True)
    assert rep.opcodes["st.global.f32"] == 32  # warps 0..31 have active lanes


@pytest.mark.parametrize("resident", [1, 3, None])
def test_odd_block_size_and_in_place(cuda, resident):
    n = 1234
    a = np.arange(n, dtype=np.float32)
    rep = cuda.kernel("vec_add").launch(13, 100, [a, a, a, n], resident=resident)  # the same array three times
    assert np.array_equal(a, 2 * np.arange(n, dtype=np.float32))
    assert rep.buffer("arg0").read_passes == 2.0


class FakeTorch:
    """A stand-in for a torch tensor, with only the attributes and methods that ptxsim uses."""

    device = type("Device", (), {"type": "cpu"})

    def __init__(self, array):
        self.array = array
        self.tolist, self.numel, self.element_size = array.tolist, lambda: array.size, lambda: array.itemsize
        self.data_ptr, self.is_contiguous = lambda: array.ctypes.data, lambda: True

    ones = classmethod(lambda cls, n: cls(np.ones(n, np.float32)))
    zeros = classmethod(lambda cls, n: cls(np.zeros(n, np.float32)))


def test_torch_tensors(cuda):
    torch = sys.modules.get("torch") or FakeTorch  # importing it takes long
    a, b, c = torch.ones(64), torch.ones(64), torch.zeros(64)
    cuda.kernel("vec_add").launch(2, 32, [a, b, c, 64])
    assert set(c.tolist()) == {2.0}


def make(dtype, x):
    if dtype == "bf16":
        r = to_bf16(x)
        return r, from_bf16(r).astype(np.float64)
    r = x.astype({"f16": np.float16, "f32": np.float32}[dtype])
    return r, r.astype(np.float64)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "schedule,rows,cols,stride,offset",
    [
        ("lockstep", 8, 4096, 4096, 0),
        ("lockstep", 5, 1003, 1009, 3),
        ("random", 2, 301, 302, 1),
        ("lockstep", 2, 3, 7, 5),
    ],
)
def test_logsumexp(cuda, dtype, schedule, rows, cols, stride, offset):
    rng = np.random.default_rng(cols)
    flat = rng.normal(size=rows * stride + offset) * 4
    flat[offset + 1] = -np.inf
    raw, val = make(dtype, flat)
    buf, out = Buffer(raw), np.zeros(rows, np.float32)
    k = cuda.kernel("lse_" + dtype)
    rep = k.launch(
        rows,
        128,
        [buf + offset * raw.itemsize, out, cols, stride],
        schedule=schedule,
        seed=cols,
        check_races=True,
        check_poison=True,
    )
    x = val[offset:].reshape(rows, stride)[:, :cols]
    m = x.max(1, keepdims=True)
    ref = m[:, 0] + np.log(np.exp(x - m).sum(1))
    assert np.abs(out - ref).max() < 2e-5 * np.abs(ref).max()
    assert rep.global_bytes_loaded == rows * cols * raw.itemsize  # every element exactly once
    assert all(rep.source_of(a.ins)[0].endswith("kernels.cu") for a in rep.accesses)  # not a header
    assert not rep.races
    assert rep.barriers == rows


def test_logsumexp_speed(cuda):
    if cuda.arch != "sm_90":
        pytest.skip("once is enough")
    rng = np.random.default_rng(1)
    raw, val = make("bf16", rng.normal(size=(8, 32768)))
    out = np.zeros(8, np.float32)
    rep = cuda.kernel("lse_bf16").launch(8, 512, [raw, out, 32768, 32768])
    assert np.abs(out - np.log(np.exp(val).sum(1))).max() < 1e-5
    assert rep.buffer("arg0").read_passes == 1.0
    assert rep.seconds < 10


@pytest.mark.parametrize("schedule", SCHED)
def test_softmax_grad_in_place(cuda, schedule):
    rows, cols = 4, 1000
    rng = np.random.default_rng(2)
    raw, val = make("bf16", rng.normal(size=(rows, cols)) * 3)
    lse = np.log(np.exp(val).sum(1))
    target = rng.integers(0, cols, rows)
    k = cuda.kernel("softmax_grad")
    rep = k.launch(rows, 96, [raw, lse.astype(np.float32), target, 0.25, cols], schedule=schedule)
    ref = (np.exp(val - lse[:, None]) - (np.arange(cols) == target[:, None])) * 0.25
    got = from_bf16(raw)
    assert np.all(np.abs(got - ref) <= 2**-8 * np.abs(ref) + 1e-9)
    b = rep.buffer("arg0")
    assert (b.read_passes, b.write_passes) == (1.0, 1.0)


# ------------------------------------------------------------ reductions


def grid_sum(cuda, name, seed, schedule="random", **kw):
    x = np.random.default_rng(seed).normal(size=3000).astype(np.float32)
    out, done, part = np.zeros(1, np.float32), np.zeros(1, np.uint32), Buffer(nbytes=4 * 9, init=None)
    rep = cuda.kernel(name).launch(
        9, 128, [x, x.size, part, done, out], schedule=schedule, seed=seed, check_poison=True, **kw
    )
    return rep, abs(float(out[0]) - float(x.astype(np.float64).sum())) < 1e-3, done[0]


@pytest.mark.parametrize("schedule", SCHED)
def test_last_block_reduction(cuda, schedule):
    for seed in range(2):
        rep, ok, done = grid_sum(cuda, "grid_sum_ok", seed, schedule, check_races=True)
        assert ok and done == 0 and not rep.races
        assert rep.global_atomics == 9


def test_missing_syncthreads_is_exposed(cuda):
    assert not all(grid_sum(cuda, "grid_sum_racy", seed)[1] for seed in range(5))  # by the schedule
    rep, _, _ = grid_sum(cuda, "grid_sum_racy", 0, "lockstep", check_races=True)  # by the detector
    assert rep.races and "no barrier between" in rep.races[0].message
    with pytest.raises(ptxsim.RaceError):
        grid_sum(cuda, "grid_sum_racy", 0, "lockstep", check_races="raise")


def test_assumed_block_order_is_exposed(cuda):
    x = np.arange(20, dtype=np.float32)
    got = set()
    for seed in range(4):
        out, part = np.zeros(1, np.float32), np.full(20, 1000, np.float32)
        cuda.kernel("assumes_block_order").launch(20, 32, [x, part, out], schedule="random", seed=seed)
        got.add(float(out[0]))
    assert got != {190.0}


@pytest.mark.parametrize("schedule,reverse", [("random", 0), ("random", 1), ("lockstep", 0)])
def test_spin_on_another_block(cuda, schedule, reverse):
    x = np.arange(1, 17, dtype=np.int32)
    s, ready = np.zeros_like(x), np.zeros_like(x)
    cuda.kernel("chained_scan").launch(16, 32, [x, s, ready, reverse], schedule=schedule)
    assert np.array_equal(s, np.cumsum(x))


@pytest.mark.parametrize("schedule", SCHED)
def test_spin_lock_within_a_warp(cuda, schedule):
    lock, count = np.zeros(1, np.int32), np.zeros(1, np.int32)
    cuda.kernel("spin_lock").launch(2, 20, [lock, count], schedule=schedule)
    assert count[0] == 40


# ---------------------------------------------------------------- faults


def fault(cuda, name, grid, block, args, **kw):
    with pytest.raises(ptxsim.MemoryFault) as e:
        cuda.kernel(name).launch(grid, block, args, **kw)
    return e.value


@pytest.mark.parametrize("schedule", SCHED)
def test_out_of_bounds(cuda, schedule):
    a, c = np.ones(200, np.float32), np.zeros(200, np.float32)
    e = fault(cuda, "off_by_one", 2, 128, [a, c, 200], schedule=schedule)
    assert e.kind == "out of bounds" and e.block == (1, 0, 0) and e.thread == (72, 0, 0)
    assert e.instr.startswith("ld.global") and "0 bytes past the end of <Buffer arg0" in str(e)
    assert e.source[0].endswith("kernels.cu") and f"PTX line {e.line}" in str(e)


def test_other_faults(cuda):
    a, c = np.ones(256, np.float32), np.zeros(256, np.float32)
    assert fault(cuda, "misaligned", 1, 4, [a, c]).kind == "misaligned"
    assert fault(cuda, "null_deref", 1, 32, [None, c]).kind == "null pointer"
    e = fault(cuda, "shared_overrun", 1, 128, [c])
    assert e.space == "shared" and e.thread == (64, 0, 0)
    c.flags.writeable = False
    assert "read-only" in fault(cuda, "copy", 1, 32, [a, c]).kind


def test_poison(cuda):
    src, dst = Buffer(nbytes=128, init=None), np.zeros(32, np.float32)
    cuda.kernel("copy").launch(1, 32, [src, dst])
    assert np.isnan(dst).all()
    assert "uninitialised" in fault(cuda, "copy", 1, 32, [src, dst], check_poison=True).kind
    cuda.kernel("copy").launch(1, 32, [np.ones(32, np.float32), src])
    cuda.kernel("copy").launch(1, 32, [src, dst], check_poison=True)
    assert (dst == 1).all()


def test_divergent_barrier_deadlocks(cuda):
    with pytest.raises((ptxsim.DeadlockError, ptxsim.LaunchTimeout)):
        cuda.kernel("divergent_barrier").launch(1, 64, [np.zeros(4, np.int32)], max_steps=4000)


def test_bad_arguments(cuda):
    k = cuda.kernel("vec_add")
    x = np.zeros(64, np.float32)
    with pytest.raises(TypeError):
        k.launch(1, 32, [x, x, x])
    with pytest.raises(ValueError, match="overlaps"):
        k.launch(1, 32, [x[:40], x[8:], x, 8])
    with pytest.raises(ValueError, match="contiguous"):
        k.launch(1, 32, [x[::2], x, x, 8])
    with pytest.raises(ValueError):
        k.launch(1, 2048, [x, x, x, 8])


# -------------------------------------------------------------- cp.async


@pytest.mark.parametrize("schedule", SCHED)
@pytest.mark.parametrize("name", ["colsum2", "colsum4"])
def test_cp_async(cuda, name, schedule):
    rows, cols, stride = 21, 146, 148  # rows are 16-byte aligned, their ends are not
    x = np.random.default_rng(3).normal(size=(rows, stride)).astype(np.float32)
    out = np.zeros(cols, np.float32)
    rep = cuda.kernel(name).launch(
        2, 128, [x, out, rows, cols, stride], schedule=schedule, check_races=True, check_poison=True
    )
    assert np.allclose(out, x.astype(np.float64).sum(0)[:cols], atol=1e-4)
    assert not rep.races and rep.global_bytes_loaded == rep.buffer("arg0").bytes_read == 4 * rows * cols


def test_cp_async_missing_wait(cuda):
    x = np.ones((32, 128), np.float32)
    out = np.zeros(128, np.float32)
    cuda.kernel("colsum_nowait").launch(1, 128, [x, out, 32, 128, 128])
    assert not np.allclose(out, 32)
    with pytest.raises(ptxsim.MemoryFault, match="uninitialised"):
        cuda.kernel("colsum_nowait").launch(1, 128, [x, out, 32, 128, 128], check_poison=True)


# ------------------------------------------------------- language corners


@pytest.mark.parametrize("schedule", SCHED)
def test_corners(cuda, schedule):
    n = 64
    table = np.array([1.5, -2, 3.25, 1e-3], np.float32)
    p = struct.pack("<qf3f", 1000, 2.5, 1, 2, 3)
    iout, fout = np.zeros(n, np.int32), np.zeros(n, np.float32)
    dout, uout = np.zeros(4 * n), np.zeros(6 * n, np.uint64)
    before = int(cuda.symbols["counter"].array(np.int32)[0])
    text = io.StringIO()
    rep = cuda.kernel("corners").launch(1, n, [p, iout, fout, dout, uout], schedule=schedule, stdout=text)
    assert text.getvalue() == rep.output == "t=3 f=1.50 s=hello u=1099511627776 %\n"
    assert cuda.symbols["counter"].array(np.int32)[0] == before + 5
    f = np.float32
    m64 = 2**64 - 1
    for t in range(n):
        assert iout[t] == 1000 + t + (t * 5 + 3) % 8 * t
        r = f(2.5) * table[t % 4]
        r = r + f(f(t) * f(t) + f(1)) if t & 1 else r - (f(0.5 * t) * f(0.5 * t) + f(1))
        r = [
            lambda: r + 10,
            lambda: r * 3,
            lambda: math.sqrt(abs(r)),
            lambda: math.floor(r * f(1.7)),
            lambda: math.fmod(r, 1.25),
            lambda: round(float(r * f(0.3))),
            lambda: r / f(7),
        ][t % 7]()
        assert abs(fout[t] - r) <= 1e-6 * max(1, abs(r)), t
        d = 0.1 * t + 0.01
        assert np.allclose(dout[4 * t : 4 * t + 3], [math.exp(-d), math.log(d), math.sin(d) / (d + 1e-9)], rtol=1e-14)
        u = 0x9E3779B97F4A7C15 * (t + 1) & m64
        w = u * (u ^ 0x123456789ABCDEF) + u
        su = u - 2**64 if u >> 63 else u

        def tdiv(a, b):
            q = abs(a) // abs(b)
            return -q if (a < 0) != (b < 0) else q

        clz = 64 - (u >> (t % 50)).bit_length()
        s = u << (t % 60) & m64
        ffs = (s & -s).bit_length()
        both = u.to_bytes(8, "little")
        sel = 0x2537 + t
        perm = [
            both[sel >> 4 * i & 7] if not sel >> 4 * i & 8 else 255 * (both[sel >> 4 * i & 7] >> 7) for i in range(4)
        ]
        lo, hi = u & 0xFFFFFFFF, u >> 32
        fun = ((hi << 32 | lo) << (t & 31)) >> 32 & 0xFFFFFFFF
        want = [
            w >> 64 & m64,
            w & m64,
            u // (t + 3) + u % (t + 11) & m64,
            tdiv(su, -(t + 3)) + (su - tdiv(su, t + 5) * (t + 5)) & m64,
            int(f"{u:064b}"[::-1], 2) ^ clz ^ bin(u).count("1") ^ ffs,
            int.from_bytes(bytes(perm), "little") << 32 | fun,
        ]
        # __byte_perm masks its selector to 3 bits per nibble, so compare without sign replication
        perm0 = [both[sel >> 4 * i & 7] for i in range(4)]
        got = [int(x) for x in uout[6 * t : 6 * t + 6]]
        assert got[:5] == want[:5], t
        assert got[5] in (want[5], int.from_bytes(bytes(perm0), "little") << 32 | fun), t


@pytest.mark.parametrize("schedule", SCHED)
def test_generic_pointers_and_struct_of_pointers(cuda, schedule):
    a, out = Buffer(np.arange(4, dtype=np.float32)), Buffer(nbytes=4 * 64)
    cuda.kernel("generic_pointers").launch(
        1, 64, [struct.pack("<QQi4x", a.address, out.address, 5)], schedule=schedule
    )
    t = np.arange(64)
    want = np.choose(t % 3, [t % 4, 100.0 + t % 4, 205.0 + t % 4])
    got = out.array(np.float32)
    # s[t % 4] may have been incremented by its owner (t odd) before another warp read it
    d = got - (want + 100 + t + 205 + t % 4 + 1000)
    assert set(np.unique(d)) <= {0.0, 1000.0} and (d[t % 3 != 1] == 0).all()


def test_constants_recursion_and_timeout(cuda):
    x = np.ones(8, np.float32)
    table = cuda.symbols["table"].array(np.float32)
    old = table.copy()
    table[:] = [1, 2, 3, 4]  # cudaMemcpyToSymbol
    cuda.kernel("scale_by_table").launch(1, 8, [x])
    table[:] = old
    assert x.tolist() == [1, 2, 3, 4] * 2
    with pytest.raises(ptxsim.NotImplementedPTX, match="recursion"):
        cuda.kernel("recursive")
    for schedule in SCHED:
        with pytest.raises(ptxsim.LaunchTimeout, match="PTX line"):
            cuda.kernel("endless").launch(1, 32, [np.zeros(1, np.int32)], schedule=schedule, max_steps=5000)


@pytest.mark.parametrize("schedule", SCHED)
@pytest.mark.parametrize("pitch", [32, 33])
def test_transpose(cuda, schedule, pitch):
    x = np.random.default_rng(11).normal(size=(2, 40, 35)).astype(np.float32)
    y = np.zeros((2, 35, 40), np.float32)
    rep = cuda.kernel(f"transpose{pitch}").launch(
        (2, 2, 2), (32, 4), [x, y, 40, 35], schedule=schedule, check_races=True
    )
    assert np.array_equal(y, x.transpose(0, 2, 1)) and not rep.races
    assert rep.max_bank_ways == (1 if pitch == 33 else 32)
    assert rep.buffer("arg0").unique_bytes_read == x.nbytes


def test_assert_and_notes(cuda):
    x = np.ones(32, np.int32)
    cuda.kernel("check_positive").launch(1, 32, [x])
    x[9] = 0
    with pytest.raises(ptxsim.DeviceTrap, match=r"x\[threadIdx.x\] > 0 at .*kernels.cu.*thread \(9, 0, 0\)"):
        cuda.kernel("check_positive").launch(1, 32, [x])


@pytest.mark.parametrize("schedule", SCHED)
def test_warp_ops(cuda, schedule):
    n = 64
    x = np.random.default_rng(4).integers(0, 100, n).astype(np.int32)
    out = np.zeros((n, 16), np.int32)
    cuda.kernel("warp_ops").launch(1, n, [x, out], schedule=schedule)
    for t in range(n):
        base, lane = t & ~31, t & 31
        w = [int(v) for v in x[base : base + 32]]
        bits = lambda f: sum(1 << i for i in range(32) if f(i))
        sg = lambda v: v - 2**32 if v >= 2**31 else v
        xor = 0
        for v in w:
            xor ^= v
        seg8, seg16 = lane & ~7, lane & ~15

        def step(i):
            v = w[i]
            for _ in range((base + i) & 7):
                v = v * 3 + 1
            return v

        want = [
            sg(bits(lambda i: w[i] & 1)),
            int(5 in w) | int(min(w) >= 0) << 1,
            sg(bits(lambda i: w[i] % 4 == w[lane] % 4)),
            sg((2**32 - 1 + 1) % 2**32),
            sum(w),
            max(w),
            xor,
            w[seg8 + (t + 3) % 8],
            w[lane - 2 if lane - 2 >= seg16 else lane],
            w[lane + 5 if lane + 5 < 32 else lane],
            w[lane ^ 9],
        ]
        assert out[t, :11].tolist() == want, t
        assert out[t, 11] == (sum((base + i) % 3 == 0 for i in range(32)) if t % 3 == 0 else -1)
        assert out[t, 12] == (step(lane ^ 2) if t % 2 else w[lane ^ 4])
        assert out[t, 13:].tolist() == [int((x & 1).sum()), int(77 in x), 1]


@pytest.mark.parametrize("schedule", SCHED)
def test_atomics(cuda, schedule):
    n = 256
    x = np.random.default_rng(5).normal(size=n).astype(np.float32)
    f, d = np.zeros(4, np.float32), np.zeros(1)
    i, u = np.array([5, 0, 9, 0], np.int32), np.array([0, 0, 0, 0xFFFFFFFF], np.uint32)
    ull = np.zeros(2, np.uint64)
    h, b, old = np.zeros(2, np.float16), np.zeros(2, np.uint16), np.zeros(n, np.int32)
    rep = cuda.kernel("atomics").launch(4, 64, [x, f, d, i, u, ull, h, b, old], schedule=schedule, check_races=True)
    t = np.arange(n)
    assert np.allclose(f[:3], [x[t % 3 == k].sum() for k in range(3)], atol=1e-5) and f[3] == n / 2
    assert np.allclose(d, x.astype(np.float64).sum())
    assert i.tolist() == [5 + t.sum(), ((t * 37) % 101).max(), ((t * 37) % 101 - 50).min(), n]
    order = np.argsort(old, kind="stable")  # a serial order of the adds exists
    nz = order[t[order] > 0]
    assert np.array_equal(old[nz], 5 + np.cumsum(t[nz]) - t[nz])
    assert u.tolist() == [n % 10, 0xFFFFFFFF, int(np.bitwise_xor.reduce(t)), 0xFFFFFFE0]
    assert ull.tolist() == [int(t.sum()) << 30, 255 << 33]
    assert h.tolist() == [256, 128] and from_bf16(b).tolist() == [256, 512]
    assert rep.shared_atomics > 0 and not rep.races


def test_half_math(cuda):
    n = 40
    rng = np.random.default_rng(6)
    a, bv = rng.normal(size=(n + 1, 2)).astype(np.float16), to_bf16(rng.normal(size=(n + 1, 2)))
    ho, bo = np.zeros((n, 4, 2), np.float16), np.zeros((n, 4, 2), np.uint16)
    cuda.kernel("half_math").launch(1, n, [a, bv, ho, bo])
    x, y = a[:-1].astype(np.float64), a[1:].astype(np.float64)
    b = from_bf16(bv).astype(np.float64)
    u, v = b[:-1], b[1:]
    assert np.array_equal(ho[:, 0], (x * y + 0.25).astype(np.float16))
    assert np.array_equal(ho[:, 1], np.maximum(x, -y).astype(np.float16))
    assert np.abs(ho[:, 2] - np.exp2(x)).max() < 4e-3
    assert np.array_equal(ho[:, 3], (x > y).astype(np.float16))
    for k, r in enumerate([u * v + u, u + v, u * v, np.minimum(u, v)]):
        assert np.array_equal(bo[:, k], to_bf16(r)), k


def test_coalescing_and_bank_conflicts(cuda):
    k, n = cuda.kernel("strided"), 64
    x, y = np.arange(64 * 32, dtype=np.float32), np.zeros(n, np.float32)
    rep1 = k.launch(1, n, [x, y, 1], dynamic_shared=4 * n)
    rep8 = k.launch(1, n, [x, y, 8], dynamic_shared=4 * n)
    assert rep1.global_load_sectors == n // 8 and rep8.global_load_sectors == n
    assert rep1.max_bank_ways == 1 and rep8.max_bank_ways == 2 and rep8.bank_conflicts > 0
    with pytest.raises(ptxsim.MemoryFault):
        k.launch(1, n, [x, y, 1], dynamic_shared=4 * n - 4)
