"""Triton kernels for the tests. They are in a file because Triton reads their source code."""

import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    om, on, ok = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(
            a + om[:, None] * sa + (k + ok)[None, :], mask=(om < M)[:, None] & (k + ok < K)[None, :], other=0.0
        )
        y = tl.load(
            b + (k + ok)[:, None] * sb + on[None, :], mask=(on < N)[None, :] & (k + ok < K)[:, None], other=0.0
        )
        acc = tl.dot(x, y, acc)
    tl.store(c + om[:, None] * sc + on[None, :], acc.to(OUT), mask=(om < M)[:, None] & (on < N)[None, :])


@triton.jit
def ce_forward(logits, target, loss, lse, stride, V, ignore, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = logits + row * stride
    t = tl.load(target + row)
    m = -float("inf")
    s = 0.0
    for i in range(0, V, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        x = tl.load(p + offs, mask=offs < V, other=-float("inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        s = s * tl.exp(m - top) + tl.sum(tl.exp(x - top), 0)
        m = top
    z = m + tl.log(s)
    tl.store(lse + row, z)
    if t == ignore:
        tl.store(loss + row, 0.0)
    else:
        tl.store(loss + row, z - tl.load(p + t).to(tl.float32))


@triton.jit
def ce_backward(logits, target, lse, count, scale, stride, V, ignore, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = logits + row * stride + offs
    t = tl.load(target + row)
    z = tl.load(lse + row)
    x = tl.load(p, mask=offs < V, other=-float("inf")).to(tl.float32)
    g = (tl.exp(x - z) - tl.where(offs == t, 1.0, 0.0)) * scale
    g = tl.where(t == ignore, 0.0, g)
    tl.store(p, g.to(tl.bfloat16), mask=offs < V)
    tl.atomic_add(count, tl.where(tl.program_id(1) == 0, 1, 0))


@triton.jit
def column_sums(x, out, counts, M, N, BM: tl.constexpr, BN: tl.constexpr):
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    on = tl.program_id(1) * BN + tl.arange(0, BN)
    v = tl.load(x + om[:, None] * N + on[None, :], mask=(om < M)[:, None] & (on < N)[None, :], other=0.0)
    tl.atomic_add(out + on, tl.sum(v, 0), mask=on < N)
    tl.atomic_max(counts, tl.max(om, 0))


@triton.jit
def softmax(x, y, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    v = tl.load(x + row * N + offs, mask=offs < N, other=-float("inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * N + offs, v / tl.sum(v, 0), mask=offs < N)


@triton.jit
def scan_sort(x, y, z, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    v = tl.load(x + offs)
    tl.store(y + offs, tl.cumsum(v, 0))
    tl.store(z + offs, tl.sort(v))


@triton.jit
def matmul_f16(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), out_dtype=tl.float16))
