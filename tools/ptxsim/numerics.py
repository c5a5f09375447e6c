"""Vectorised float functions that numpy lacks, with correct rounding.

"Rounded to odd" means that the last bit of an inexact result is 1. Such a result can be rounded again to fewer bits
without a second rounding error.
"""

from fractions import Fraction

import numpy as np

f16, f32, f64 = np.float16, np.float32, np.float64
_TINY32 = 2.0**-126


def bf16_decode(raw):
    return (raw.astype(np.uint32) << np.uint32(16)).view(f32)


def bf16_encode(x, mode="rn"):
    """Converts float32 or float64 to bf16 bits (uint16), correctly rounded."""
    if x.dtype == f64:
        x = to_f32_odd(x)
    u = x.view(np.uint32)
    if mode == "rn":
        r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    elif mode == "rz":
        r = u >> np.uint32(16)
    else:
        up = (u >> np.uint32(31) == 1) if mode == "rm" else (u >> np.uint32(31) == 0)
        r = (u >> np.uint32(16)) + (up & ((u & np.uint32(0xFFFF)) != 0))
    nan = np.isnan(x)
    r = r.astype(np.uint16)
    return np.where(nan, np.uint16(0x7FFF), r) if nan.any() else r


def to_bf16(x):
    """Converts numpy floats to bf16 bits (uint16), rounded to nearest even."""
    x = np.asarray(x)
    x = x.astype(f32) if x.dtype != f64 else x
    return bf16_encode(np.ascontiguousarray(x).reshape(-1)).reshape(x.shape)


def from_bf16(raw):
    """Converts bf16 bits (uint16) to float32."""
    return bf16_decode(np.ascontiguousarray(raw, np.uint16))


# ---- round to odd: keeps "was inexact" in the last bit, so a second rounding is harmless


def to_f32_odd(x):
    r = x.astype(f32)
    back = r.astype(f64)
    if not ((back != x) & (x == x)).any():
        return r
    over = np.abs(back) > np.abs(x)
    t = np.where(over, np.nextafter(r, f32(0)), r)  # towards zero
    u = t.view(np.uint32) | ((t.astype(f64) != x) & (x == x)).astype(np.uint32)
    return u.view(f32)


def _odd_add(p, c):
    """Returns p + c in float64, rounded to odd."""
    s = p + c
    bb = s - p
    err = (p - (s - bb)) + (c - bb)
    fix = (err != 0) & np.isfinite(s) & np.isfinite(err) & ((s.view(np.int64) & 1) == 0)
    if fix.any():
        s = np.where(fix, np.nextafter(s, np.where(err > 0, np.inf, -np.inf)), s)
    return s


def narrow(x, mode):
    """Rounds float64 to float32 in the rounding mode "rn", "rz", "rm" or "rp". x must be exact or rounded to odd."""
    r = x.astype(f32)
    if mode == "rn":
        return r
    b = r.astype(f64)
    if mode == "rz":
        bad, to = np.abs(b) > np.abs(x), f32(0)
    elif mode == "rm":
        bad, to = b > x, f32(-np.inf)
    else:
        bad, to = b < x, f32(np.inf)
    return np.where(bad, np.nextafter(r, to), r)


def fma32(a, b, c):
    p = a.astype(f64) * b.astype(f64)  # exact
    c = c.astype(f64)
    s = p + c
    # rounding twice is only wrong from an exact float32 halfway point, or into denormals
    hard = (s.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    tiny = np.abs(s) < _TINY32
    if tiny.any():
        hard |= tiny & (s != 0)
    if hard.any():
        s[hard] = _odd_add(p[hard], c[hard])
    return s.astype(f32)


def fma32_mode(mode):
    def fn(a, b, c):
        return narrow(_odd_add(a.astype(f64) * b.astype(f64), c.astype(f64)), mode)

    return fn


def fma_small(a, b, c):
    """Returns a * b + c in float64, rounded to odd. The inputs are float32 arrays with f16 or bf16 values."""
    return _odd_add(a.astype(f64) * b.astype(f64), c.astype(f64))


def add32_mode(mode):
    return lambda a, b: narrow(_odd_add(a.astype(f64), b.astype(f64)), mode)


def mul32_mode(mode):
    return lambda a, b: narrow(a.astype(f64) * b.astype(f64), mode)


def div32_mode(mode):
    def fn(a, b):
        a, b = a.astype(f64), b.astype(f64)
        q = a / b
        rem = fma64(-q, b, a)  # sign of the true remainder
        fix = (rem != 0) & np.isfinite(q) & ((q.view(np.int64) & 1) == 0)
        up = (rem > 0) == (b > 0)
        q = np.where(fix, np.nextafter(q, np.where(up, np.inf, -np.inf)), q)
        return narrow(q, mode)

    return fn


def sqrt32_mode(mode):
    def fn(a):
        a = a.astype(f64)
        q = np.sqrt(a)
        rem = fma64(-q, q, a)
        fix = (rem != 0) & np.isfinite(q) & ((q.view(np.int64) & 1) == 0)
        q = np.where(fix, np.nextafter(q, np.where(rem > 0, np.inf, -np.inf)), q)
        return narrow(q, mode)

    return fn


def _two_prod(a, b):
    def split(x):
        t = x * 134217729.0
        hi = t - (t - x)
        return hi, x - hi

    p = a * b
    ah, al = split(a)
    bh, bl = split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _two_sum(a, b):
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def fma64(a, b, c):
    """Returns a * b + c in float64, correctly rounded (Boldo-Melquiond). Extreme values use exact fractions."""
    a, b, c = np.broadcast_arrays(a, b, c)
    uh, ul = _two_prod(a, b)
    th, tl = _two_sum(c, ul)
    vh, vl = _two_sum(uh, th)
    r = vh + _odd_add(tl, vl)
    plain = a * b + c
    m = np.maximum(np.abs(uh), np.abs(c))
    big = np.maximum(np.abs(a), np.abs(b))
    easy = (m < 1e290) & (big < 1e290) & ((m > 1e-250) | (a == 0) | (b == 0)) & (np.abs(uh) > 1e-250)
    special = ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c) | (a == 0) | (b == 0)
    r = np.where(special, plain, r)
    for k in np.flatnonzero(~(easy | special)):
        v = Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(float(c[k]))
        try:
            r[k] = float(v) if v else plain[k]
        except OverflowError:
            r[k] = np.inf if v > 0 else -np.inf
    return r


def flush(x):
    """Replaces float32 denormals by zeros of the same sign."""
    d = np.abs(x) < f32(_TINY32)
    return np.where(d, np.copysign(f32(0), x), x) if d.any() else x


def flush16(x):
    """Replaces float16 denormals by zeros of the same sign."""
    return np.where(np.abs(x) < np.finfo(f16).smallest_normal, np.copysign(f16(0), x), x)


def saturate(x):
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))  # NaN -> 0


# ------------------------------------------------------------------- fp8


class Fp8:
    """Converts to and from a float8 format, e4m3fn or e5m2, with a table."""

    def __init__(self, ebits, bias, nan, top):
        mbits = 7 - ebits
        code = np.arange(128)
        e, m = code >> mbits, code & ((1 << mbits) - 1)
        val = np.where(e == 0, m * 2.0 ** (1 - bias - mbits), (1 + m / 2.0**mbits) * 2.0 ** (e.astype(f64) - bias))
        val[nan] = np.nan
        if ebits == 5:
            val[0x7C] = np.inf
        self.table = np.concatenate([val, -val]).astype(f32)
        self.top, self.nan = top, nan.start
        self.mid = (val[:top] + val[1 : top + 1]) / 2

    def decode(self, raw):
        return self.table[raw]

    def encode(self, x):
        """Converts to float8, rounded to nearest even. Values that are too large become the largest finite value."""
        x = x.astype(f64)
        a = np.abs(x)
        k = np.searchsorted(self.mid, a, "left")
        tie = (k < self.top) & (a == self.mid[np.minimum(k, self.top - 1)])
        k = k + (tie & (k & 1 == 1))
        k = np.where(np.isnan(x), self.nan | 0x7F, k | (np.signbit(x) << 7))
        return k.astype(np.uint8)


FP8 = {"e4m3": Fp8(4, 7, slice(0x7F, 0x80), 0x7E), "e5m2": Fp8(5, 15, slice(0x7D, 0x80), 0x7B)}


# ------------------------------------------------------------ wide integers


def mulhi_u64(a, b):
    m = np.uint64(0xFFFFFFFF)
    sh = np.uint64(32)
    al, ah, bl, bh = a & m, a >> sh, b & m, b >> sh
    mid = (al * bl >> sh) + (ah * bl & m) + (al * bh & m)
    return ah * bh + (ah * bl >> sh) + (al * bh >> sh) + (mid >> sh)


def mulhi_s64(a, b):
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    r = mulhi_u64(ua, ub)
    zero = np.uint64(0)
    return (r - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)).view(np.int64)
