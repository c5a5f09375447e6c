"""Builds the memory instructions ld, st, atom, red and cp.async."""

import numpy as np

from . import numerics as nm
from .ops import NotImplementedPTX, dtype_of, is_float, op
from .parser import Pair, Reg, Sym, Vec, type_size

_SPACES = ("global", "shared", "local", "param", "const")
STRONG = ("relaxed", "acquire", "release", "acq_rel", "mmio")


def space_of(ins):
    for p in ins.parts[1:]:
        head = p.split("::")[0]
        if head in _SPACES:
            if p == "shared::cluster" and ins.parts[0] not in ("ld", "st", "atom", "red"):
                raise NotImplementedPTX(ins, "clusters")
            return head
    return "generic"


def vec_of(ins):
    for p in ins.parts[1:]:
        if p in ("v2", "v4", "v8"):
            return int(p[1:])
    return 1


def _items(arg, n):
    items = arg.items if isinstance(arg, Vec) else (arg,)
    if len(items) != n:
        raise ValueError("vector length")
    return items


@op("ld", "ldu")
def _ld(b, ins):
    typ, vec, space = ins.parts[-1], vec_of(ins), space_of(ins)
    width = type_size(typ)
    if width == 16:
        raise NotImplementedPTX(ins, "128-bit type")
    mem = ins.args[1]
    if isinstance(ins.args[0], Pair):
        raise NotImplementedPTX(ins, "predicate destination")
    items = _items(ins.args[0], vec)
    Ds = [b.dst(x, typ) for x in items]
    dt = dtype_of(typ)[0]
    if space == "param" and isinstance(mem.base, Sym):
        cols = [b.param_view(mem.base.name, mem.base.offset + mem.offset + width * k, dt) for k in range(vec)]

        def run_param(s):
            for D, c in zip(Ds, cols):
                D[s] = c[s]

        return run_param
    addr = b.address(mem, space)
    load = b.loader(ins, space, width, vec)
    same = dtype_of("u" + str(8 * width))[0] is dt
    lanes = b.lanes
    if vec == 1:
        (D,) = Ds

        def run(s):
            (v,) = load(addr(s), lanes[s])
            D[s] = v if same else v.view(dt)

        return run

    def runv(s):
        for D, v in zip(Ds, load(addr(s), lanes[s])):
            D[s] = v if same else np.ascontiguousarray(v).view(dt)

    return runv


@op("st")
def _st(b, ins):
    typ, vec, space = ins.parts[-1], vec_of(ins), space_of(ins)
    width = type_size(typ)
    if width == 16 or "async" in ins.parts or "bulk" in ins.parts:
        raise NotImplementedPTX(ins)
    mem = ins.args[0]
    utyp = "u" + str(8 * width)
    srcs = [b.src(x, utyp) for x in _items(ins.args[1], vec)]
    if space == "param" and isinstance(mem.base, Sym):
        dt = dtype_of(utyp)[0]
        cols = [b.param_view(mem.base.name, mem.base.offset + mem.offset + width * k, dt) for k in range(vec)]

        def run_param(s):
            for c, v in zip(cols, srcs):
                c[s] = v[s]

        return run_param
    addr = b.address(mem, space)
    store = b.storer(ins, space, width, vec)
    lanes = b.lanes

    def run(s):
        store(addr(s), lanes[s], [v[s] for v in srcs])

    return run


# ------------------------------------------------------------------- atomics


def _serial(view, ix, fn, b, c, need_old):
    """Executes the atomic operation ``view[i] = fn(view[i], b, c)`` for each lane. Returns the old values.

    ``ix`` holds the index i of each lane. Lanes with equal indices run one after the other.
    """
    n = ix.size
    order = np.argsort(ix, kind="stable")
    sx = ix[order]
    first = np.empty(n, bool)
    first[0] = True
    np.not_equal(sx[1:], sx[:-1], out=first[1:])
    if first.all():
        old = view[ix]
        view[ix] = fn(old, b, c)
        return old
    start = np.maximum.accumulate(np.where(first, np.arange(n), 0))
    rank = np.arange(n) - start
    old = np.empty(n, view.dtype)
    by_rank = np.argsort(rank, kind="stable")  # k-th access of every address together
    bounds = np.searchsorted(rank[by_rank], np.arange(rank.max() + 2))
    for k in range(bounds.size - 1):
        at = order[by_rank[bounds[k] : bounds[k + 1]]]
        o = view[ix[at]]
        old[at] = o
        view[ix[at]] = fn(o, b[at], None if c is None else c[at])
    return old


def _int_add(view, ix, b, need_old):
    if not need_old:
        np.add.at(view, ix, b)
        return None
    order = np.argsort(ix, kind="stable")
    sx, sb = ix[order], b[order]
    first = np.empty(ix.size, bool)
    first[0] = True
    np.not_equal(sx[1:], sx[:-1], out=first[1:])
    before = np.cumsum(sb, dtype=view.dtype) - sb  # wraps like the hardware
    start = np.flatnonzero(first)
    group = np.cumsum(first) - 1
    old = np.empty(ix.size, view.dtype)
    old[order] = view[sx] + (before - before[start][group])
    np.add.at(view, ix, b)
    return old


def _atomic_fn(name, typ, ins):
    if name == "exch":
        return lambda o, b, c: b
    if name == "cas":
        return lambda o, b, c: np.where(o == b, c, o)
    if name == "inc":
        return lambda o, b, c: np.where(o >= b, o.dtype.type(0), o + o.dtype.type(1))
    if name == "dec":
        return lambda o, b, c: np.where((o == 0) | (o > b), b, o - o.dtype.type(1))
    if name in ("and", "or", "xor"):
        f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
        return lambda o, b, c: f(o, b)
    if name in ("add", "min", "max"):
        f = {
            "add": np.add,
            "min": np.fmin if is_float(typ) else np.minimum,
            "max": np.fmax if is_float(typ) else np.maximum,
        }[name]
        if typ == "bf16":
            return lambda o, b, c: nm.bf16_encode(f(nm.bf16_decode(o), nm.bf16_decode(b)))
        return lambda o, b, c: f(o, b)
    raise NotImplementedPTX(ins)


_ATOMS = ("add", "exch", "cas", "min", "max", "inc", "dec", "and", "or", "xor")


@op("atom", "red")
def _atom(b, ins):
    parts, space, vec = ins.parts, space_of(ins), vec_of(ins)
    if parts[1] == "async" or "bulk" in parts:
        raise NotImplementedPTX(ins)
    is_atom = parts[0] == "atom"
    name = next(p for p in parts[1:] if p in _ATOMS)
    typ = parts[-1]
    if typ in _ATOMS:  # older order: atom.global.v2.f32.add
        typ = next(p for p in parts[::-1] if p not in _ATOMS)
    if type_size(typ) == 16:
        raise NotImplementedPTX(ins, "128-bit type")
    packed = 2 if typ.endswith("x2") else 1
    el = typ[:-2] if packed == 2 else typ
    dt = dtype_of(el)[0]
    width = np.dtype(dt).itemsize
    args = ins.args[1:] if is_atom else ins.args
    dests = _items(ins.args[0], vec) if is_atom else ()
    need_old = bool(is_atom and any(not (isinstance(d, Sym) and d.name == "_") for d in dests))
    Ds = [b.dst(d, typ) for d in dests]
    Bs = [b.src(x, typ) for x in _items(args[1], vec)]
    C = b.src(args[2], typ) if name == "cas" else None
    addr, lanes = b.address(args[0], space), b.lanes
    fn = _atomic_fn(name, el, ins)
    touch = b.atomic(ins, space, type_size(typ) * vec, width)

    def run(s):
        ln = lanes[s]
        pieces = touch(addr(s), ln)  # (unsigned view, element index, positions)
        for k in range(vec):
            for h in range(packed):
                bv = Bs[k][s]
                bv = bv[:, h] if packed == 2 else bv
                cv = C[s] if C is not None else None
                old_all = np.empty(ln.size, dt) if need_old else None
                for view, ix, at in pieces:
                    v = view.view(dt)
                    bb, cc = (bv, cv) if at is None else (bv[at], None if cv is None else cv[at])
                    i = ix + (k * packed + h)
                    if name == "add" and not is_float(el):
                        old = _int_add(v, i, bb, need_old)
                    elif name == "add" and el in ("f32", "f64") and not need_old:
                        np.add.at(v, i, bb)  # sequential, rounds after each add
                        continue
                    else:
                        old = _serial(v, i, fn, bb, cc, need_old)
                    if need_old:
                        if at is None:
                            old_all = old
                        else:
                            old_all[at] = old
                if need_old:
                    if packed == 2:
                        Ds[k][s, h] = old_all
                    else:
                        Ds[k][s] = old_all

    return run


# ------------------------------------------------------------------ cp.async


@op("cp")
def _cp(b, ins):
    parts = ins.parts
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts or "reduce" in parts:
        raise NotImplementedPTX(ins)
    if parts[2] == "commit_group":
        return b.cp_commit
    if parts[2] in ("wait_group", "wait_all"):
        wait_all = parts[2] == "wait_all"
        keep = 0 if wait_all else ins.args[0].value

        def run_wait(s):
            if wait_all:
                b.cp_commit(s)
            b.cp_wait(ins, s, keep)

        return run_wait
    if "shared" not in (parts[3].split("::")[0],):
        raise NotImplementedPTX(ins)
    dst, src = b.address(ins.args[0], "shared"), b.address(ins.args[1], "global")
    size = ins.args[2].value
    extra = ins.args[3:]
    if any("cache_hint" in p for p in parts):
        extra = extra[:-1]
    ignore = nbytes = None
    if extra:
        kind = b.reg_type(extra[0]) if isinstance(extra[0], Reg) else None
        if kind == "pred":
            ignore = b.src(extra[0], "pred")
        else:
            nbytes = b.src(extra[0], "u32")
    lanes = b.lanes
    issue = b.cp_issue(ins, size)

    def run(s):
        ln = lanes[s]
        d, a = dst(s), src(s)
        if ignore is not None:
            take = np.where(ignore[s], 0, size)
        elif nbytes is not None:
            take = np.minimum(nbytes[s], np.uint32(size)).astype(np.int64)
        else:
            take = None
        issue(ln, d, a, take)

    return run
