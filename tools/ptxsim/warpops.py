"""Warp-level instructions: shuffles, votes, reductions, matrix loads and mma.

A warp-level instruction waits until all lanes in its member mask have arrived. The instruction can then read the
registers of all these lanes.
"""

import numpy as np

from . import numerics as nm
from .ops import NotImplementedPTX, dtype_of, op
from .parser import Imm, Pair

FULL = 0xFFFFFFFF

# opcode -> function(ins) giving the member-mask operand (or an Imm)
SYNC = {}


def sync(*names, mask=-1):
    """Registers opcodes that several lanes of a warp execute together.

    mask: index of the operand with the bit mask of these lanes. None: all lanes of the warp.
    """
    for n in names:
        SYNC[n] = mask


def member_mask(ins):
    m = SYNC.get(ins.parts[0], False)
    if m is False or (ins.parts[0] == "bar" and ins.parts[1] != "warp"):
        return None
    if ins.parts[0] in ("shfl", "vote", "match", "redux", "elect") and "sync" not in ins.parts:
        raise NotImplementedPTX(ins, "form without .sync")
    return Imm(FULL) if m is None else ins.args[m]


sync("shfl", "vote", "match", "redux", "elect")
sync("bar", mask=0)
sync("ldmatrix", "stmatrix", "mma", "movmatrix", mask=None)


def _dp(b, arg, typ):
    """Returns (destination, predicate destination) of an operand such as "%r1|%p1".

    The predicate destination is None if the operand has none.
    """
    if isinstance(arg, Pair):
        return b.dst(arg.first, typ), b.dst(arg.second, "pred")
    return b.dst(arg, typ), None


def present(b, s):
    """Returns a boolean array over all lanes. It is True for the lanes that the slice or index array ``s`` selects."""
    p = np.zeros(b.L, bool)
    p[s] = True
    return p


def ballot(b, s, flag):
    """Returns a 32-bit mask for each warp. The bit of a lane is set if the lane is in s and its flag is true."""
    p = np.zeros(b.L, bool)
    p[s] = flag
    return np.packbits(p.reshape(-1, 32), axis=1, bitorder="little").view("<u4")[:, 0].astype(np.uint32)


@op("shfl")
def _shfl(b, ins):
    mode = ins.parts[2]
    D, P = _dp(b, ins.args[0], "b32")
    A, B, C = (b.src(x, "b32") for x in ins.args[1:4])
    M = b.src(ins.args[4], "b32")
    lanes = b.lanes
    static = isinstance(ins.args[2], Imm) and isinstance(ins.args[3], Imm)

    def source(ln, bv, cv):
        lane = ln & 31
        bv, cv = bv.astype(np.int64) & 31, cv.astype(np.int64)
        seg, clamp = cv >> 8 & 31, cv & 31
        top = (lane & seg) | (clamp & ~seg)
        if mode == "up":
            j = lane - bv
            ok = j >= top
        elif mode == "down":
            j = lane + bv
            ok = j <= top
        elif mode == "bfly":
            j = lane ^ bv
            ok = j <= top
        else:
            j = (lane & seg) | (bv & ~seg)
            ok = j <= top
        return (ln - lane) + np.where(ok, j, lane), ok

    if static:
        SRC, OK = source(lanes, B[:], C[:])
    note = b.note

    def run(s):
        if static:
            src, ok = SRC[s], OK[s]
        else:
            src, ok = source(lanes[s], B[s], C[s])
        v = A[src]
        if not b.all_present(s):
            here = present(b, s)
            named = (M[s] >> (src & 31).astype(np.uint32)) & np.uint32(1) == 1
            bad = ~here[src] | ~named
            if bad.any():
                note(ins, "shfl reads an inactive lane", int(bad.sum()))
                v[bad] = FULL
        D[s] = v
        if P is not None:
            P[s] = ok

    return run


@op("vote")
def _vote(b, ins):
    mode = ins.parts[2]
    A = b.src(ins.args[1], "pred")
    M = b.src(ins.args[2], "b32")
    D = b.dst(ins.args[0], "b32" if mode == "ballot" else "pred")
    lanes = b.lanes

    def run(s):
        w = lanes[s] >> 5
        yes = ballot(b, s, A[s])[w]
        m = M[s]
        if mode == "ballot":
            D[s] = yes & m
        else:
            here = ballot(b, s, True)[w] & m
            got = yes & m
            D[s] = {"all": lambda: got == here, "any": lambda: got != 0, "uni": lambda: (got == here) | (got == 0)}[
                mode
            ]()

    return run


def _by_warp(b, s):
    """Returns (lanes, warps, positions). Lane lanes[i] belongs to the warp warps[positions[i]]."""
    ln = b.lanes[s]
    w = ln >> 5
    rows, inv = np.unique(w, return_inverse=True)
    return ln, rows, inv


@op("match")
def _match(b, ins):
    how, typ = ins.parts[1], ins.parts[-1]
    D, P = _dp(b, ins.args[0], "b32")
    A, M = b.src(ins.args[1], typ), b.src(ins.args[2], "b32")

    def run(s):
        ln, rows, inv = _by_warp(b, s)
        v = np.zeros((rows.size, 32), dtype_of(typ)[0])
        v[inv, ln & 31] = A[s]
        m = M[s]
        here = ballot(b, s, True)[ln >> 5] & m
        member = (here[:, None] >> np.arange(32, dtype=np.uint32)) & 1 == 1
        eq = (v[inv] == A[s][:, None]) & member
        mask = (eq * (np.uint32(1) << np.arange(32, dtype=np.uint32))).sum(1).astype(np.uint32)
        if how == "any":
            D[s] = mask
        else:
            ok = mask == here
            D[s] = np.where(ok, here, 0)
            if P is not None:
                P[s] = ok

    return run


@op("redux")
def _redux(b, ins):
    name, typ = ins.parts[2], ins.parts[-1]
    D, A, M = b.dst(ins.args[0], typ), b.src(ins.args[1], typ), b.src(ins.args[2], "b32")
    dt = dtype_of(typ)[0]
    nan = "NaN" in ins.parts

    f = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.minimum,
        "max": np.maximum,
    }[name]
    if typ == "f32" and not nan:
        f = {"min": np.fmin, "max": np.fmax}[name]

    def run(s):
        ln, v, m = b.lanes[s], A[s], M[s]
        if "abs" in ins.parts:
            v = np.abs(v)
        if v.size % 32 == 0 and (m == np.uint32(FULL)).all() and np.array_equal(ln & 31, np.arange(ln.size) & 31):
            D[s] = np.repeat(f.reduce(v.reshape(-1, 32), axis=1, dtype=dt), 32)
            return
        key = (ln >> 5 << 32) | m
        out = np.empty(v.size, dt)
        for k in np.unique(key):
            at = key == k
            out[at] = f.reduce(v[at], dtype=dt)
        D[s] = out

    return run


@op("elect")
def _elect(b, ins):
    D, P = _dp(b, ins.args[0], "b32")
    M = b.src(ins.args[1], "b32")

    def run(s):
        ln = b.lanes[s]
        here = ballot(b, s, True)[ln >> 5] & M[s]
        low = here & (~here + np.uint32(1))
        leader = np.bitwise_count(low - np.uint32(1)).astype(np.uint32)
        D[s] = leader
        P[s] = (ln & 31) == leader

    return run


@op("activemask")
def _activemask(b, ins):
    D = b.dst(ins.args[0], "b32")

    def run(s):
        D[s] = ballot(b, s, True)[b.lanes[s] >> 5]

    return run


# ------------------------------------------------------------------ matrices


def _matrix_args(b, arg, n, typ, src):
    items = arg.items if hasattr(arg, "items") else (arg,)
    if len(items) != n:
        raise ValueError("fragment size")
    return [b.src(x, typ) if src else b.dst(x, typ) for x in items]


def _matrix_setup(ins):
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise NotImplementedPTX(ins)
    n = int(next(p for p in ins.parts if p in ("x1", "x2", "x4"))[1:])
    return n, "trans" in ins.parts


def _whole_warps(b, ins, s):
    ln = b.lanes[s]
    if ln.size % 32 or not np.array_equal(ln & 31, np.arange(ln.size) & 31):
        b.fail(ins, "needs all 32 lanes of the warp", ln[0])
    return ln


@op("ldmatrix")
def _ldmatrix(b, ins):
    n, trans = _matrix_setup(ins)
    Ds = _matrix_args(b, ins.args[0], n, "b32", False)
    addr = b.address(ins.args[1], "shared")
    load = b.loader(ins, "shared", 4, 4)

    def run(s):
        ln = _whole_warps(b, ins, s)
        a = addr(s).reshape(-1, 32)[:, : 8 * n].reshape(-1)
        rows = ln.reshape(-1, 32)[:, : 8 * n].reshape(-1)
        words = np.stack(load(a, rows), 1)  # (warps*8n, 4) -> 8 halves per row
        m = np.ascontiguousarray(words).view(np.uint16).reshape(-1, n, 8, 8)
        if trans:
            m = m.transpose(0, 1, 3, 2)
        frag = np.ascontiguousarray(m).view(np.uint32).reshape(-1, n, 32)  # lane = row*4 + column pair
        for i, D in enumerate(Ds):
            D[s] = frag[:, i].reshape(-1)

    return run


@op("stmatrix")
def _stmatrix(b, ins):
    n, trans = _matrix_setup(ins)
    addr = b.address(ins.args[0], "shared")
    As = _matrix_args(b, ins.args[1], n, "b32", True)
    store = b.storer(ins, "shared", 4, 4)

    def run(s):
        ln = _whole_warps(b, ins, s)
        a = addr(s).reshape(-1, 32)[:, : 8 * n].reshape(-1)
        rows = ln.reshape(-1, 32)[:, : 8 * n].reshape(-1)
        frag = np.stack([A[s].reshape(-1, 32) for A in As], 1)
        m = np.ascontiguousarray(frag).view(np.uint16).reshape(-1, n, 8, 8)
        if trans:
            m = m.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(m).view(np.uint32).reshape(-1, 4)
        store(a, rows, [words[:, k] for k in range(4)])

    return run


@op("movmatrix")
def _movmatrix(b, ins):
    D, A = b.dst(ins.args[0], "b32"), b.src(ins.args[1], "b32")

    def run(s):
        _whole_warps(b, ins, s)
        m = np.ascontiguousarray(A[s]).view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
        D[s] = np.ascontiguousarray(m).view(np.uint32).reshape(-1)

    return run


def _fragment(shape_mk, per_reg, nreg, kind):
    """Returns two arrays: the row and the column of each element of an mma operand in its matrix.

    Both arrays have the axes [register][element][lane].

    kind: "a", "b" or "c".
    nreg: registers per lane.
    per_reg: elements per register.
    """
    lane = np.arange(32)
    g, t = lane >> 2, lane & 3
    row = np.empty((nreg, per_reg, 32), np.int64)
    col = np.empty_like(row)
    for r in range(nreg):
        for e in range(per_reg):
            if kind == "a":  # rows g, g+8; columns in groups of 4*per_reg
                row[r, e], col[r, e] = g + 8 * (r & 1), t * per_reg + e + 4 * per_reg * (r >> 1)
                if shape_mk[0] == 8:
                    row[r, e], col[r, e] = g, t * per_reg + e + 4 * per_reg * r
            elif kind == "b":
                row[r, e], col[r, e] = t * per_reg + e + 4 * per_reg * r, g
            else:  # c, d: pairs along a row
                i = r * per_reg + e
                row[r, e], col[r, e] = g + 8 * (i >> 1), t * 2 + (i & 1)
    return row, col


_MMA_IN = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1, "f64": 8}


@op("mma")
def _mma(b, ins):
    p = ins.parts
    shape = next((x for x in p if x[0] == "m" and "n" in x and "k" in x), None)
    if (
        shape is None
        or "sp" in p
        or "block_scale" in p
        or "row" not in p
        or "col" not in p
        or p[1] != "sync"
        or "xor" in p
    ):
        raise NotImplementedPTX(ins)
    m, nk = shape[1:].split("n")
    n, k = nk.split("k")
    m, n, k = int(m), int(n), int(k)
    i = p.index("col") + 1
    types = [x for x in p[i:] if x not in ("satfinite", "and", "popc")]
    if len(types) != 4 or n != 8 or (m, types[1] == "f64") not in ((16, False), (8, True)) or types[1] not in _MMA_IN:
        raise NotImplementedPTX(ins)
    dt, at, bt, ct = types
    width = _MMA_IN[at]
    rw = max(4, width)  # register width
    per = rw // width
    na, nb = m * k // 32 // per, k * n // 32 // per
    fa, fb = _fragment((m, k), per, na, "a"), _fragment((k, n), per, nb, "b")
    acc_per = 2 if dt == "f16" else 1
    nc = m * n // 32 // acc_per
    fc = _fragment((m, n), acc_per, nc, "c")
    reg = "b64" if rw == 8 else "b32"
    Ds = _matrix_args(b, ins.args[0], nc, {"f16": "f16x2", "f64": "f64", "f32": "f32", "s32": "s32"}[dt], False)
    As = _matrix_args(b, ins.args[1], na, reg, True)
    Bs = _matrix_args(b, ins.args[2], nb, reg, True)
    Cs = _matrix_args(b, ins.args[3], nc, {"f16": "f16x2", "f64": "f64", "f32": "f32", "s32": "s32"}[ct], True)

    def decoder(t):
        if t == "bf16":
            return lambda u: nm.bf16_decode(u.view(np.uint16))
        if t == "f16":
            return lambda u: u.view(np.float16)
        if t == "tf32":
            return lambda u: (u & np.uint32(0xFFFFE000)).view(np.float32)
        if t in ("s8", "u8"):
            return lambda u: u.view(np.int8 if t == "s8" else np.uint8)
        if t == "f64":
            return lambda u: u.view(np.float64)
        return lambda u: nm.FP8[t].decode(u.view(np.uint8))

    da, db = decoder(at), decoder(bt)

    def gather(regs, s, dec, frag, rows, cols):
        x = np.ascontiguousarray(np.stack([R[s].reshape(-1, 32) for R in regs], 1))  # warps, regs, lanes
        v = dec(x.reshape(-1)).reshape(x.shape[0], len(regs), 32, per)
        out = np.zeros((x.shape[0], rows, cols), np.float64)
        out[:, frag[0], frag[1]] = v.transpose(0, 1, 3, 2)
        return out

    def run(s):
        _whole_warps(b, ins, s)
        A, B = gather(As, s, da, fa, m, k), gather(Bs, s, db, fb, k, n)
        nw = A.shape[0]
        C = np.zeros((nw, m, n))
        cv = np.stack([R[s].reshape(nw, 32, -1) for R in Cs], 1).transpose(0, 1, 3, 2)
        C[:, fc[0], fc[1]] = cv
        R = np.matmul(A, B) + C  # products exact, one rounding at the end
        out = R[:, fc[0], fc[1]]  # warps, regs, per, lanes
        for r, D in enumerate(Ds):
            v = out[:, r].transpose(0, 2, 1).reshape(nw * 32, -1)
            if dt == "s32":
                v = np.clip(v, -(2.0**31), 2.0**31 - 1) if "satfinite" in p else v
                v = v.astype(np.int64).astype(np.int32)
            D[s] = v if acc_per == 2 else v[:, 0]

    return run
