"""Compares single instructions in hand-written PTX with exact Python arithmetic."""

import math
import random
import struct
from fractions import Fraction

import numpy as np
import ptxsim
import pytest

NP = {
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.uint16,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "u8": np.uint8,
    "s8": np.int8,
}


def run(text, tin, tout, *cols):
    """Runs PTX instructions that compute %d from %a, %b and %c. Returns the values of %d.

    cols: arrays of the inputs; thread i uses element i. tin: types of the inputs. tout: type of %d.
    """
    n = len(cols[0])
    reg = {
        t: t if t[0] in "fb" and t not in ("f16", "bf16", "f16x2", "bf16x2") else f"b{8 * np.dtype(d).itemsize}"
        for t, d in NP.items()
    }
    reg["u8"] = reg["s8"] = "b16"
    ld = {t: t if t in ("u8", "s8") else reg[t] for t in NP}
    lines = [".version 9.0", ".target sm_90", ".address_size 64", ".visible .entry k("]
    lines += [f".param .u64 p{i}," for i in range(len(cols))] + [".param .u64 pd) {"]
    lines += [
        ".reg .b32 %t; .reg .b64 %q, %w; .reg .pred %p, %r; .reg .b32 %t1, %t2, %t3; .reg .b64 %w1;",
        f".reg .{reg[tout]} %d; mov.u32 %t, %tid.x; mad.lo.u32 %t, %ctaid.x, 128, %t;",
        "",
    ]
    lines[-2] = f".reg .{reg[tout]} %d; mov.u32 %t, %ctaid.x; mov.u32 %t1, %tid.x; mad.lo.u32 %t, %t, 128, %t1;"
    for i, t in enumerate(tin):
        r = "%" + "abc"[i]
        size = np.dtype(NP[t]).itemsize
        lines += [
            f".reg .{reg[t]} {r}; ld.param.u64 %q, [p{i}]; mul.wide.u32 %w, %t, {size}; add.s64 %q, %q, %w;",
            f"ld.global.{ld[t]} {r}, [%q];",
        ]
    size = np.dtype(NP[tout]).itemsize
    lines += [
        text,
        f"ld.param.u64 %q, [pd]; mul.wide.u32 %w, %t, {size}; add.s64 %q, %q, %w;",
        f"st.global.{ld[tout]} [%q], %d; ret; }}",
    ]
    pad = -n % 128
    args = [np.concatenate([np.asarray(c, NP[t]), np.zeros(pad, NP[t])]) for c, t in zip(cols, tin)]
    out = np.zeros(n + pad, NP[tout])
    ptxsim.Module("\n".join(lines)).kernel().launch((n + pad) // 128, 128, [*args, out])
    return out[:n]


def ints(t, n=300, seed=0):
    """Returns random integers of type t, with many edge cases."""
    bits = 8 * np.dtype(NP[t]).itemsize
    r = random.Random(f"{t}{seed}")
    edge = [0, 1, 2, 3, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 31, 32, 33, 63, 64, 65]
    v = [r.choice(edge) if r.random() < 0.3 else r.getrandbits(r.randint(1, bits)) for _ in range(n)]
    v = [x & (2**bits - 1) for x in v]
    return [x - 2**bits if NP[t](0).dtype.kind == "i" and x >> (bits - 1) else x for x in v]


def wrap(x, t):
    bits = 8 * np.dtype(NP[t]).itemsize
    x &= 2**bits - 1
    return x - 2**bits if np.dtype(NP[t]).kind == "i" and x >> (bits - 1) else x


def tdiv(a, b):
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def bfe(a, p, n, t):
    bits = 64 if "64" in t else 32
    p, n = p & 255, n & 255
    u = a & (2**bits - 1)
    sign = 0
    if t[0] == "s" and n:
        sign = u >> min(p + n - 1, bits - 1) & 1
    return wrap(sum((u >> (p + i) & 1 if i < n and p + i < bits else sign) << i for i in range(bits)), t)


def bfi(a, b, p, n):
    p, n = p & 255, n & 255
    for i in range(n):
        if p + i < 32:
            b = b & ~(1 << p + i) | (a >> i & 1) << (p + i) if i < 32 else b & ~(1 << p + i)
    return b


def prmt(a, b, c):
    by = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        s = c >> 4 * i & 15
        v = by[s & 7]
        out |= (255 * (v >> 7) if s & 8 else v) << 8 * i
    return out


def lop3(a, b, c, lut):
    return sum((lut >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def rnd_clip(x, lo, hi):
    return max(lo, min(hi, x))


M = 2**32 - 1
INT_CASES = [
    ("add.s32 %d, %a, %b;", "s32 s32", "s32", lambda a, b: a + b),
    ("add.sat.s32 %d, %a, %b;", "s32 s32", "s32", lambda a, b: rnd_clip(a + b, -(2**31), 2**31 - 1)),
    ("sub.u64 %d, %a, %b;", "u64 u64", "u64", lambda a, b: a - b),
    ("mul.lo.s64 %d, %a, %b;", "s64 s64", "s64", lambda a, b: a * b),
    ("mul.hi.s64 %d, %a, %b;", "s64 s64", "s64", lambda a, b: a * b >> 64),
    ("mul.hi.u64 %d, %a, %b;", "u64 u64", "u64", lambda a, b: a * b >> 64),
    ("mul.hi.u32 %d, %a, %b;", "u32 u32", "u32", lambda a, b: a * b >> 32),
    ("mul.hi.s32 %d, %a, %b;", "s32 s32", "s32", lambda a, b: a * b >> 32),
    ("mul.wide.s32 %d, %a, %b;", "s32 s32", "s64", lambda a, b: a * b),
    ("mul.wide.u16 %d, %a, %b;", "u16 u16", "u32", lambda a, b: a * b),
    ("mad.lo.s32 %d, %a, %b, %c;", "s32 s32 s32", "s32", lambda a, b, c: a * b + c),
    ("mad.hi.u32 %d, %a, %b, %c;", "u32 u32 u32", "u32", lambda a, b, c: (a * b >> 32) + c),
    ("mad.wide.u32 %d, %a, %b, %c;", "u32 u32 u64", "u64", lambda a, b, c: a * b + c),
    (
        "mul24.lo.s32 %d, %a, %b;",
        "s32 s32",
        "s32",
        lambda a, b: ((a << 8 & M ^ 2**31) - 2**31 >> 8) * ((b << 8 & M ^ 2**31) - 2**31 >> 8),
    ),
    ("div.s32 %d, %a, %b;", "s32 s32", "s32", lambda a, b: tdiv(a, b) if b else None),
    ("div.u64 %d, %a, %b;", "u64 u64", "u64", lambda a, b: a // b if b else None),
    ("div.s64 %d, %a, %b;", "s64 s64", "s64", lambda a, b: tdiv(a, b) if b else None),
    ("rem.s64 %d, %a, %b;", "s64 s64", "s64", lambda a, b: a - tdiv(a, b) * b if b else None),
    ("rem.u16 %d, %a, %b;", "u16 u16", "u16", lambda a, b: a % b if b else None),
    ("abs.s32 %d, %a;", "s32", "s32", abs),
    ("neg.s16 %d, %a;", "s16", "s16", lambda a: -a),
    ("min.s32 %d, %a, %b;", "s32 s32", "s32", min),
    ("max.u64 %d, %a, %b;", "u64 u64", "u64", max),
    ("sad.s32 %d, %a, %b, %c;", "s32 s32 s32", "s32", lambda a, b, c: c + abs(a - b)),
    ("and.b32 %d, %a, %b;", "b32 b32", "b32", lambda a, b: a & b),
    ("not.b64 %d, %a;", "b64", "b64", lambda a: ~a),
    ("cnot.b32 %d, %a;", "b32", "b32", lambda a: int(a == 0)),
    ("shl.b32 %d, %a, %b;", "b32 u32", "b32", lambda a, b: a << b if b < 32 else 0),
    ("shl.b64 %d, %a, %b;", "b64 u32", "b64", lambda a, b: a << b if b < 64 else 0),
    ("shr.u16 %d, %a, %b;", "u16 u32", "u16", lambda a, b: a >> b if b < 16 else 0),
    ("shr.s32 %d, %a, %b;", "s32 u32", "s32", lambda a, b: a >> min(b, 31)),
    ("shr.s64 %d, %a, %b;", "s64 u32", "s64", lambda a, b: a >> min(b, 63)),
    ("shr.u32 %d, %a, 40;", "u32", "u32", lambda a: 0),
    ("shf.l.wrap.b32 %d, %a, %b, %c;", "b32 b32 u32", "b32", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.clamp.b32 %d, %a, %b, %c;", "b32 b32 u32", "b32", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("shf.r.wrap.b32 %d, %a, %b, %c;", "b32 b32 u32", "b32", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("bfe.u32 %d, %a, %b, %c;", "u32 u32 u32", "u32", lambda a, b, c: bfe(a, b, c, "u32")),
    ("bfe.s32 %d, %a, %b, %c;", "s32 u32 u32", "s32", lambda a, b, c: bfe(a, b, c, "s32")),
    ("bfe.s64 %d, %a, %b, %c;", "s64 u32 u32", "s64", lambda a, b, c: bfe(a, b, c, "s64")),
    ("bfe.u64 %d, %a, %b, %c;", "u64 u32 u32", "u64", lambda a, b, c: bfe(a, b, c, "u64")),
    ("bfi.b32 %d, %a, %b, %c, 9;", "b32 b32 u32", "b32", lambda a, b, c: bfi(a, b, c, 9)),
    ("bfi.b32 %d, %a, %b, 5, %c;", "b32 b32 u32", "b32", lambda a, b, c: bfi(a, b, 5, c)),
    ("prmt.b32 %d, %a, %b, %c;", "b32 b32 b32", "b32", prmt),
    ("prmt.b32.f4e %d, %a, %b, %c;", "b32 b32 b32", "b32", lambda a, b, c: (a | b << 32) >> 8 * (c & 3)),
    ("popc.b64 %d, %a;", "b64", "u32", lambda a: bin(a).count("1")),
    ("clz.b32 %d, %a;", "b32", "u32", lambda a: 32 - a.bit_length()),
    ("clz.b64 %d, %a;", "b64", "u32", lambda a: 64 - a.bit_length()),
    ("brev.b32 %d, %a;", "b32", "b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.u32 %d, %a;", "u32", "u32", lambda a: a.bit_length() - 1),
    ("bfind.shiftamt.s32 %d, %a;", "s32", "u32", lambda a: 31 - (max(a, ~a).bit_length() - 1) if max(a, ~a) else -1),
    (
        "dp4a.s32.u32 %d, %a, %b, %c;",
        "b32 b32 s32",
        "s32",
        lambda a, b, c: (
            c + sum(x * y for x, y in zip(struct.unpack("<4b", struct.pack("<I", a)), struct.pack("<I", b)))
        ),
    ),
    ("lop3.b32 %d, %a, %b, %c, 0xB1;", "b32 b32 b32", "b32", lambda a, b, c: lop3(a, b, c, 0xB1)),
    ("lop3.b32 %d, %a, %b, %c, 0xFE;", "b32 b32 b32", "b32", lambda a, b, c: lop3(a, b, c, 0xFE)),
    ("lop3.b32 %d, %a, %b, %c, 0x96;", "b32 b32 b32", "b32", lambda a, b, c: lop3(a, b, c, 0x96)),
    ("add.cc.u32 %d, %a, %b; addc.u32 %d, %c, 0;", "u32 u32 u32", "u32", lambda a, b, c: c + (a + b >> 32)),
    ("sub.cc.u32 %d, %a, %b; subc.u32 %d, %c, 0;", "u32 u32 u32", "u32", lambda a, b, c: c - (a < b)),
    (
        "mad.lo.cc.u32 %t1, %a, %b, %c; madc.hi.u32 %d, %a, %b, 7;",
        "u32 u32 u32",
        "u32",
        lambda a, b, c: (a * b >> 32) + 7 + ((a * b & M) + c >> 32),
    ),
    ("setp.lt.s32 %p, %a, %b; selp.b32 %d, %a, %b, %p;", "s32 s32", "s32", min),
    (
        "setp.hs.u32 %p|%r, %a, %b; @%p mov.b32 %d, 5; @%r mov.b32 %d, 6;",
        "u32 u32",
        "u32",
        lambda a, b: 5 if a >= b else 6,
    ),
    (
        "setp.eq.s32 %p, %c, 1; setp.gt.or.s32 %p, %a, %b, !%p; selp.s32 %d, 1, 0, %p;",
        "s32 s32 s32",
        "s32",
        lambda a, b, c: int(a > b or c != 1),
    ),
    ("slct.u32.s32 %d, %a, %b, %c;", "u32 u32 s32", "u32", lambda a, b, c: a if c >= 0 else b),
    ("set.le.u32.s32 %d, %a, %b;", "s32 s32", "u32", lambda a, b: M if a <= b else 0),
    ("cvt.s32.s8 %d, %a;", "s8", "s32", lambda a: a),
    ("cvt.u64.u8 %d, %a;", "u8", "u64", lambda a: a),
    ("cvt.s64.s32 %d, %a;", "s32", "s64", lambda a: a),
    ("cvt.u16.u32 %d, %a;", "u32", "u16", lambda a: a),
    ("cvt.s32.s16 %d, %a;", "u32", "s32", lambda a: wrap(a, "s16")),
    ("cvt.sat.u16.s32 %d, %a;", "s32", "u16", lambda a: rnd_clip(a, 0, 65535)),
    ("cvt.sat.s32.u64 %d, %a;", "u64", "s32", lambda a: min(a, 2**31 - 1)),
    (
        "cvt.pack.sat.u8.s32.b32 %d, %a, %b, %c;",
        "s32 s32 b32",
        "b32",
        lambda a, b, c: rnd_clip(b, 0, 255) | rnd_clip(a, 0, 255) << 8 | c << 16,
    ),
    ("mov.b64 {%t1, %t2}, %a; mov.b64 %d, {%t2, %t1};", "b64", "b64", lambda a: a >> 32 | (a & M) << 32),
    ("bmsk.clamp.b32 %d, %a, %b;", "u32 u32", "b32", lambda a, b: (2 ** min(b, 32) - 1) << min(a, 32)),
    (
        "szext.clamp.s32 %d, %a, %b;",
        "s32 u32",
        "s32",
        lambda a, b: (lambda n: 0 if n == 0 else ((a & 2**n - 1) ^ 1 << n - 1) - (1 << n - 1))(min(b, 32)),
    ),
]


@pytest.mark.parametrize("text,tin,tout,ref", INT_CASES, ids=[c[0].split(";")[0] + c[1] for c in INT_CASES])
def test_integer(text, tin, tout, ref):
    tin = tin.split()
    cols = [ints(t, seed=i) for i, t in enumerate(tin)]
    got = run(text, tin, tout, *cols).tolist()
    for g, *row in zip(got, *cols):
        want = ref(*row)
        if want is not None:
            assert g == wrap(want, tout), row


# ----------------------------------------------------------- floating point

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def round_to(v, fmt, mode="rn"):
    """Rounds a Fraction exactly to a value of a float format, in a rounding mode. Returns a Fraction or +-inf."""
    p, emin, emax = FORMATS[fmt]
    if v == 0:
        return Fraction(0)
    neg, a = v < 0, abs(v)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    while Fraction(2) ** e > a:
        e -= 1
    while Fraction(2) ** (e + 1) <= a:
        e += 1
    ulp = Fraction(2) ** (max(e, emin) - p + 1)
    q, rest = divmod(a, ulp)
    up = {
        "rn": rest * 2 > ulp or (rest * 2 == ulp and q % 2),
        "rz": False,
        "rm": neg and rest > 0,
        "rp": not neg and rest > 0,
        "ru": rest > 0,
    }[mode]
    r = (q + up) * ulp
    if r >= Fraction(2) ** (emax + 1):
        big = (Fraction(2) ** p - 1) * Fraction(2) ** (emax - p + 1)
        r = big if mode == "rz" or (mode == "rm" and not neg) or (mode == "rp" and neg) else math.inf
    return -r if neg else r


def decode(raw, t):
    """Converts an array of raw values of type t to Python floats."""
    if t == "bf16":
        return [float(x) for x in ptxsim.from_bf16(np.asarray(raw, np.uint16))]
    if t == "f16":
        return [float(x) for x in np.asarray(raw, np.uint16).view(np.float16)]
    return [float(x) for x in raw]


def floats(t, n=400, seed=0):
    """Returns n random values of float type t (f16 and bf16 as raw bits), such as denormals and infinities."""
    r = random.Random(f"f{t}{seed}")
    bits, man = {"f16": (16, 10), "bf16": (16, 7), "f32": (32, 23), "f64": (64, 52)}[t]
    bias = {"f16": 15, "bf16": 127, "f32": 127, "f64": 1023}[t]
    out = []
    for _ in range(n):
        k = r.random()
        if k < 0.2:
            v = r.getrandbits(bits)
        elif k < 0.3:
            v = r.getrandbits(man) | r.getrandbits(1) << (bits - 1)  # denormal
        else:
            m = r.getrandbits(man) if k < 0.7 else (1 << r.randrange(man)) | r.getrandbits(1)
            v = m | (bias + r.randint(-4, 4)) << man | r.getrandbits(1) << (bits - 1)
        if k > 0.97:
            v = r.choice([0, 1 << (bits - 1), (2 * bias + 1) << man])
        if (v >> man & (2 * bias + 1)) == 2 * bias + 1 and v & ((1 << man) - 1):
            v = 0x3F  # no NaN inputs
        out.append(v)
    return np.array(out, f"u{bits // 8}").view(NP[t] if t in ("f32", "f64") else np.uint16)


def exact(op, xs):
    if op == "fma":
        return xs[0] * xs[1] + xs[2]
    return {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b if b else None,
        "rcp": lambda a: 1 / a if a else None,
    }[op](*xs)


FLOAT_CASES = [(op, m, t) for op in ("add", "sub", "mul", "fma") for m in ("rn", "rz", "rm", "rp") for t in ("f32",)]
FLOAT_CASES += [("div", m, "f32") for m in ("rn", "rz", "rm", "rp")] + [("rcp", "rz", "f32")]
FLOAT_CASES += [(op, "rn", t) for op in ("add", "sub", "mul", "fma") for t in ("f64", "f16", "bf16")] + [
    ("div", "rn", "f64")
]


@pytest.mark.parametrize("op,mode,t", FLOAT_CASES)
def test_float_rounding(op, mode, t):
    n = {"fma": 3, "rcp": 1}.get(op, 2)
    cols = [floats(t, seed=i) for i in range(n)]
    if op == "fma":  # exact cancellation and halfway sums
        cols[2][:100] = floats(t, seed=9)[:100]
    got = decode(run(f"{op}.{mode}.{t} %d, {', '.join(['%a', '%b', '%c'][:n])};", [t] * n, t, *cols), t)
    for g, *xs in zip(got, *(decode(c, t) for c in cols)):
        if any(math.isinf(x) for x in xs):
            continue
        v = exact(op, [Fraction(x) for x in xs])
        if v is None:
            continue
        want = round_to(v, t, mode)
        assert g == want, (xs, g, float(want))


def test_fma_rounds_once():
    e = 2.0**-23
    a, b, c = [2.0**-12 * (1 + e)] * 2, [2.0**-12 * (1 - e)] * 2, [1 + e, -1 - e]  # just beside a tie
    assert run("fma.rn.f32 %d, %a, %b, %c;", ["f32"] * 3, "f32", a, b, c).tolist() == [1 + e, -1 - e]
    tiny = 2.0**-149
    got = run("fma.rn.f32 %d, %a, %b, %c;", ["f32"] * 3, "f32", [2.0**-100 * (1 + e)], [2.0**-50 * (1 - e)], [tiny])
    assert got[0] == tiny  # below half a denormal step beyond it
    one = ptxsim.to_bf16(np.array([1.0078125, -(2.0**-70)]))
    got = run("fma.rn.bf16 %d, %a, %b, %c;", ["bf16"] * 3, "bf16", one[:1], ptxsim.to_bf16(np.array([1.5])), one[1:])
    assert decode(got, "bf16") == [1.5078125]  # 1.51171875 is a tie; the addend breaks it downwards


CVT = [
    ("f32", "f16", "rn"),
    ("f32", "f16", "rz"),
    ("f32", "bf16", "rn"),
    ("f32", "bf16", "rz"),
    ("f64", "f32", "rn"),
    ("f64", "f32", "rp"),
    ("f64", "f16", "rn"),
    ("f64", "bf16", "rn"),
    ("f16", "f32", ""),
    ("bf16", "f32", ""),
    ("f32", "f64", ""),
]


@pytest.mark.parametrize("src,dst,mode", CVT)
def test_float_conversion(src, dst, mode):
    x = floats(src)
    got = decode(run(f"cvt{'.' + mode if mode else ''}.{dst}.{src} %d, %a;", [src], dst, x), dst)
    for g, v in zip(got, decode(x, src)):
        if not math.isinf(v):
            assert g == round_to(Fraction(v), dst, mode or "rn"), v


@pytest.mark.parametrize("mode,fn", [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)])
@pytest.mark.parametrize("t", ["s32", "u32", "s64", "u64", "u16"])
def test_float_to_int(mode, fn, t):
    x = np.concatenate(
        [floats("f32"), np.array([1e10, -1e10, 1e30, -1e30, 0.5, 1.5, -2.5, 2**31, -(2**31)], np.float32)]
    )
    got = run(f"cvt.{mode}.{t}.f32 %d, %a;", ["f32"], t, x)
    info = np.iinfo(NP[t])
    for g, v in zip(got.tolist(), x.tolist()):
        want = (info.max if v > 0 else info.min) if math.isinf(v) else rnd_clip(fn(v), info.min, info.max)
        assert g == want, v
    assert run("cvt.rni.s32.f32 %d, %a;", ["f32"], "s32", [math.nan])[0] == 0


@pytest.mark.parametrize(
    "t,f,mode",
    [("s32", "f32", "rn"), ("u64", "f32", "rn"), ("s64", "f64", "rn"), ("u32", "f16", "rn"), ("s32", "f32", "rz")],
)
def test_int_to_float(t, f, mode):
    x = ints(t)
    got = decode(run(f"cvt.{mode}.{f}.{t} %d, %a;", [t], f, x), f)
    for g, v in zip(got, x):
        assert g == round_to(Fraction(v), f, mode)


def test_minmax_and_comparisons():
    nan, inf = math.nan, math.inf
    a = [1, nan, 0.0, -0.0, inf, nan, -3]
    b = [2, 5, -0.0, 0.0, -inf, nan, nan]
    f = lambda text: run(text, ["f32", "f32"], "f32", a, b)
    assert f("max.f32 %d, %a, %b;").tolist()[:5] == [2, 5, 0, 0, inf] and math.isnan(f("max.f32 %d, %a, %b;")[5])
    assert np.signbit(f("min.f32 %d, %a, %b;")[2:4]).all() and not np.signbit(f("max.f32 %d, %a, %b;")[2:4]).any()
    assert np.isnan(f("max.NaN.f32 %d, %a, %b;")).tolist() == [False, True, False, False, False, True, True]
    for cmp, want in [
        ("lt", [1, 0, 0, 0, 0, 0, 0]),
        ("ltu", [1, 1, 0, 0, 0, 1, 1]),
        ("ne", [1, 0, 0, 0, 1, 0, 0]),
        ("neu", [1, 1, 0, 0, 1, 1, 1]),
        ("equ", [0, 1, 1, 1, 0, 1, 1]),
        ("num", [1, 0, 1, 1, 1, 0, 0]),
        ("nan", [0, 1, 0, 0, 0, 1, 1]),
    ]:
        got = run(f"setp.{cmp}.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", ["f32", "f32"], "u32", a, b)
        assert got.tolist() == want, cmp


def test_ftz_sat_relu():
    d = np.array([1e-40, -1e-40, 2.0, -1.0, math.nan], np.float32)
    assert run("add.ftz.f32 %d, %a, 0f00000000;", ["f32"], "f32", d).tolist()[:3] == [0, 0, 2]
    assert run("mul.f32 %d, %a, 0f3F800000;", ["f32"], "f32", d)[0] == np.float32(1e-40)
    assert run("add.sat.f32 %d, %a, 0f3E800000;", ["f32"], "f32", d).tolist() == [0.25, 0.25, 1, 0, 0]
    tiny, half = np.array([1e-5, -1e-5, 1e-4], np.float16), np.array([2, 2, 0.25], np.float16)
    bits = [
        run(f"mul{ftz}.f16 %d, %a, %b;", ["f16", "f16"], "f16", tiny.view("u2"), half.view("u2"))
        for ftz in (".ftz", "")
    ]
    assert bits[0].tolist() == [0, 0x8000, 0]
    assert decode(bits[1], "f16") == (tiny * half).tolist()
    h = run("cvt.rn.relu.bf16.f32 %d, %a;", ["f32"], "bf16", d)
    assert decode(h, "bf16")[2:4] == [2, 0]
    x = run("cvt.rn.bf16x2.f32 %d, %a, %b;", ["f32", "f32"], "bf16x2", [1.5], [-2.0])
    assert x.tolist() == [0x3FC0C000]  # first operand in the upper half
    t = run("cvt.rna.tf32.f32 %d, %a;", ["f32"], "b32", np.array([0x3F801000, 0x3F800FFF], np.uint32).view(np.float32))
    assert [int(v) & ~0x1FFF for v in t] == [0x3F802000, 0x3F800000]


@pytest.mark.parametrize(
    "op,ref",
    [
        ("ex2.approx.f32", lambda x: 2.0**x),
        ("lg2.approx.f32", lambda x: math.log2(x)),
        ("rsqrt.approx.ftz.f32", lambda x: x**-0.5),
        ("sqrt.rn.f32", math.sqrt),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
        ("tanh.approx.f32", math.tanh),
        ("sin.approx.f32", math.sin),
        ("cos.approx.f32", math.cos),
    ],
)
def test_special_functions(op, ref):
    x = np.random.default_rng(0).uniform(0.01, 9, 300).astype(np.float32)
    got = run(f"{op} %d, %a;", ["f32"], "f32", x)
    assert np.allclose(got, [ref(float(v)) for v in x], rtol=1e-7, atol=1e-12)


def test_fp8():
    x = np.array([0.0, 1.0, -1.0625, 448.0, 1000.0, 0.0009, 17.0, 19.0, -0.3], np.float32)
    got = run("cvt.rn.satfinite.e4m3x2.f32 %d, %a, %a;", ["f32"], "b16", x)
    back = run("cvt.rn.f16x2.e4m3x2 %d, %a;", ["b16"], "f16x2", got)
    vals = (back & 0xFFFF).astype(np.uint16).view(np.float16)
    assert vals.tolist() == [0, 1, -1, 448, 448, 0, 16, 20, -0.3125]
    assert np.array_equal(back >> 16, back & 0xFFFF)


def test_brx_and_atoms():
    ptx = """.version 9.0
.target sm_90
.address_size 64
.global .align 4 .u32 hits[3] = {10, 20, 30};
.global .align 8 .u64 where = generic(hits);
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<6>; .reg .b64 %rd<6>;
  mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; ld.param.u64 %rd1, [out];
  mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
  ld.global.u64 %rd3, [where];
  min.u32 %r2, %r2, 2;
ts: .branchtargets A, B, C;
  brx.idx %r2, ts;
A: atom.global.add.u32 %r3, [%rd3], 1; bra.uni E;
B: atom.global.cas.b32 %r3, [%rd3+4], 20, 99; bra.uni E;
C: red.global.max.s32 [hits+8], %r1; mov.u32 %r3, 7;
E: st.global.u32 [%rd1], %r3; ret; }"""
    m = ptxsim.Module(ptx)
    out = np.zeros(32, np.uint32)
    m.kernel().launch(1, 32, [out])
    assert out[0::4].tolist() == [10 + i for i in range(8)]
    assert out[1::4].tolist() == [20] + [99] * 7
    assert set(out[2::4]) == set(out[3::4]) == {7}
    assert m.symbols["hits"].array(np.uint32).tolist() == [18, 99, 31]


def test_shuffle_from_inactive_lane_is_noted():
    ptx = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<6>; .reg .b64 %rd<6>; .reg .pred %p;
  mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
  setp.ge.u32 %p, %r1, 20; @%p ret;
  shfl.sync.down.b32 %r2, %r1, 4, 31, -1;
  st.global.u32 [%rd1], %r2; ret; }"""
    out = np.zeros(32, np.uint32)
    rep = ptxsim.Module(ptx).kernel().launch(1, 32, [out])
    assert out[:16].tolist() == list(range(4, 20)) and set(out[16:20]) == {0xFFFFFFFF}
    assert rep.notes and "inactive lane" in rep.summary()


def test_member_mask_must_name_the_lane():
    ptx = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k() { .reg .b32 %r<4>; .reg .pred %p; mov.u32 %r1, %tid.x; setp.lt.u32 %p, %r1, 8; @%p bra A; ret;
A: shfl.sync.idx.b32 %r2, %r1, 0, 31, 0xF; ret; }"""
    with pytest.raises(ptxsim.PTXError, match="member mask"):
        ptxsim.Module(ptx).kernel().launch(1, 32, [], schedule="random")
    ptx = ptx.replace("0xF;", "0x1FF;")
    ptxsim.Module(ptx).kernel().launch(1, 32, [])  # lane 8 has exited: not waited for


@pytest.mark.parametrize("exits", [70, 999])
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_named_barriers(schedule, exits):
    # warps 0,1 produce, warp 2 consumes: barrier 1 with 96 threads, producers only arrive
    ptx = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 out) {
  .reg .b32 %r<8>; .reg .b64 %rd<6>; .reg .pred %p;
  .shared .align 4 .b8 buf[256];
  mov.u32 %r1, %tid.x; setp.eq.u32 %p, %r1, EXITS; @%p ret;
  mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [out]; setp.ge.u32 %p, %r1, 64; shl.b32 %r2, %r1, 2; mov.u32 %r3, buf;
  @%p bra consume;
  add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1; barrier.cta.arrive 1, 96; ret;
consume: barrier.cta.sync 1, 96;
  sub.u32 %r2, %r2, 256; add.u32 %r4, %r3, %r2; ld.shared.u32 %r5, [%r4]; ld.shared.u32 %r6, [%r4+128]; add.u32 %r5, %r5, %r6;
  cvt.u64.u32 %rd2, %r2; add.s64 %rd1, %rd1, %rd2; st.global.u32 [%rd1], %r5; ret; }"""
    for seed in range(5):
        out = np.zeros(32, np.uint32)
        k = ptxsim.Module(ptx.replace("EXITS", str(exits))).kernel()
        rep = k.launch(1, 96, [out], schedule=schedule, seed=seed, check_races=True)
        assert out.tolist() == [2 * i + 32 if i != exits - 64 else 0 for i in range(32)]
        assert rep.barriers == 1 and not rep.races


def test_barrier_met_at_another_instruction_is_noted():
    ptx = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k() { .reg .b32 %r1; .reg .pred %p; mov.u32 %r1, %tid.x; setp.lt.u32 %p, %r1, 32; @%p bra A;
bar.sync 0; ret;
A: bar.sync 0; ret; }"""
    for schedule in ("lockstep", "random"):
        rep = ptxsim.Module(ptx).kernel().launch(2, 64, [], schedule=schedule)
        assert sum(rep.notes.values()) == 2 and rep.barriers == 2


def test_int8_mma():
    ptx = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc) {
  .reg .b32 %r<20>; .reg .b64 %rd<12>;
  mov.u32 %r1, %laneid; shr.u32 %r2, %r1, 2; and.b32 %r3, %r1, 3;
  ld.param.u64 %rd1, [pa]; ld.param.u64 %rd2, [pb]; ld.param.u64 %rd3, [pc];
  mad.lo.u32 %r4, %r2, 32, 0; mad.lo.u32 %r4, %r3, 4, %r4; cvt.u64.u32 %rd4, %r4;
  add.s64 %rd5, %rd1, %rd4; ld.global.b32 %r5, [%rd5]; ld.global.b32 %r6, [%rd5+256];
  ld.global.b32 %r7, [%rd5+16]; ld.global.b32 %r8, [%rd5+272];
  add.s64 %rd6, %rd2, %rd4; ld.global.b32 %r9, [%rd6]; ld.global.b32 %r10, [%rd6+16];
  mov.b32 %r11, 1;
  mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r12,%r13,%r14,%r15}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, {%r11,%r11,%r11,%r11};
  mul.lo.u32 %r4, %r2, 32; mad.lo.u32 %r4, %r3, 8, %r4; cvt.u64.u32 %rd4, %r4; add.s64 %rd3, %rd3, %rd4;
  st.global.v2.b32 [%rd3], {%r12,%r13}; st.global.v2.b32 [%rd3+256], {%r14,%r15}; ret; }"""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (8, 32)).astype(np.int8)
    c = np.zeros((16, 8), np.int32)
    ptxsim.Module(ptx).kernel().launch(1, 32, [a, b, c])
    assert np.array_equal(c, a.astype(int) @ b.astype(int).T + 1)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrix_load_store(trans):
    # ldmatrix.x4 then stmatrix.x4: rows come back where they were (transposed 8x8 blocks with .trans)
    ptx = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 py) {
  .reg .b32 %r<12>; .reg .b64 %rd<8>; .shared .align 16 .b8 a[512]; .shared .align 16 .b8 b[512];
  mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd4, %r2;
  ld.param.u64 %rd1, [px]; ld.param.u64 %rd2, [py]; add.s64 %rd1, %rd1, %rd4; add.s64 %rd2, %rd2, %rd4;
  mov.u32 %r3, a; add.u32 %r3, %r3, %r2; mov.u32 %r4, b; add.u32 %r4, %r4, %r2;
  ld.global.v4.b32 {%r5,%r6,%r7,%r8}, [%rd1]; st.shared.v4.b32 [%r3], {%r5,%r6,%r7,%r8};
  bar.warp.sync -1;
  ldmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 {%r5,%r6,%r7,%r8}, [%r3];
  stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r5,%r6,%r7,%r8};
  bar.warp.sync -1;
  ld.shared.v4.b32 {%r5,%r6,%r7,%r8}, [%r4]; st.global.v4.b32 [%rd2], {%r5,%r6,%r7,%r8}; ret; }"""
    x, y = np.arange(256, dtype=np.uint16).reshape(4, 8, 8), np.zeros((4, 8, 8), np.uint16)
    ptxsim.Module(ptx.replace("TRANS", trans)).kernel().launch(1, 32, [x, y])
    assert np.array_equal(y, x.transpose(0, 2, 1) if trans else x)


def test_wide_vectors():
    ptx = """.version 9.0
.target sm_100
.address_size 64
.visible .entry k(.param .u64 px) {
  .reg .b32 %r<12>; .reg .b64 %rd<8>;
  mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 5; cvt.u64.u32 %rd4, %r2; ld.param.u64 %rd1, [px]; add.s64 %rd1, %rd1, %rd4;
  ld.global.L1::no_allocate.L2::256B.v8.b32 {%r2,%r3,%r4,%r5,%r6,%r7,%r8,%r9}, [%rd1];
  st.global.v4.b64 [%rd1+1024], {%rd1,%rd1,%rd1,%rd1};
  st.global.v8.b32 [%rd1+1024], {%r9,%r8,%r7,%r6,%r5,%r4,%r3,%r2};
  add.rn.f32x2 %rd5, %rd1, %rd1; fma.rn.f32x2 %rd5, %rd5, %rd5, %rd5; ret; }"""
    x = np.zeros((2, 32, 8), np.uint32)
    x[0] = np.arange(256).reshape(32, 8)
    rep = ptxsim.Module(ptx).kernel().launch(1, 32, [x])
    assert np.array_equal(x[1], x[0, :, ::-1])
    assert rep.global_load_sectors == 32 and rep.global_bytes_loaded == 1024


def test_unknown_instruction():
    ptx = ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry k() { .reg .b64 %rd1; mbarrier.init.shared.b64 [%rd1], 1; ret; }"
    k = ptxsim.Module(ptx).kernel()
    with pytest.raises(ptxsim.NotImplementedPTX, match=r"mbarrier\.init\.shared\.b64.*line 4"):
        k.launch(1, 32, [])
    assert len(k.unsupported()) == 1
    with pytest.raises(ptxsim.PTXSyntaxError):
        ptxsim.Module(".version 9.0\n.visible .entry k() { add.s32 %r1 %r2; }")
