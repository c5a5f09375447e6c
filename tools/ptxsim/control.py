"""Control flow: branches, calls, barriers, exit, printf and assert.

Each instruction becomes a function of (s, pc). s selects lanes, and pc is the program counter of these lanes. The
function returns their next pc. It returns None if it has set the state of each lane itself.
"""

import re
import struct
import sys

import numpy as np

from .memory import PTXError
from .ops import NotImplementedPTX, dtype_of
from .parser import Group, Imm, Reg, Sym, type_size

BIG = np.int32(2**31 - 1)  # pc of a lane that cannot run
RUN, BAR, SYNC, DONE = 0, 1, 2, 3  # lane states


class DeviceTrap(PTXError):
    """Raised for the instruction trap, and for a failed device assert."""


def _bra(m, ins):
    target = m.k.target(m.cur, ins.args[0])
    return lambda s, p: target


def _exit(m, ins):
    def run(s, p):
        m.exit_lanes(s)
        return None

    return run


def _ret(m, ins):
    if m.cur.entry:
        return _exit(m, ins)

    def run(s, p):
        ln = m.lanes[s]
        m.depth[ln] -= 1
        back = m.ret[m.depth[ln], ln]
        if (back == back[0]).all():
            return int(back[0])
        m.pc[ln] = back
        return None

    return run


def _trap(m, ins):
    def run(s, p):
        raise DeviceTrap(f"trap: {m._who(int(m.lanes[s][0]))}; {m._where(ins)}")

    return run


def _brx(m, ins):
    index, table = m.src(ins.args[0], "u32"), ins.args[1]
    name = table[1] if isinstance(table, tuple) else table.name
    fn = m.cur
    targets = np.array(
        [m.k.target(fn, ("label", t, table[2] if isinstance(table, tuple) else ())) for t in fn.tables[name]], np.int32
    )

    def run(s, p):
        i = index[s]
        if (i >= targets.size).any():
            m.fail(ins, "brx.idx out of its table", m.lanes[s][0])
        t = targets[i]
        if (t == t[0]).all():
            return int(t[0])
        m.pc[s] = t
        return None

    return run


def _bar(m, ins):
    """Builds the barrier instructions bar and barrier, with .sync, .arrive or .red."""
    parts = [p for p in ins.parts[1:] if p not in ("aligned", "cta")]
    what = parts[0]
    if what not in ("sync", "arrive", "red"):
        raise NotImplementedPTX(ins)
    args = list(ins.args)
    D = op_name = P = None
    if what == "red":
        op_name = parts[1]
        D = m.dst(args.pop(0), "u32" if op_name == "popc" else "pred")
        P = m.src(args.pop(), "pred")
    ident, count = args[0], args[1] if len(args) > 1 else None
    fixed = ident.value if isinstance(ident, Imm) else None
    I = m.src(ident, "u32") if fixed is None else None
    C = m.src(count, "u32") if count is not None else None
    if fixed is not None and not 0 <= fixed < 16:
        raise ValueError("barrier number")

    def result(flags, slot):
        """Reduces the flags of each resident block to one value, with "popc", "or" or "and".

        slot: for each flag, the index of its block.
        """
        yes = np.bincount(slot[flags], minlength=m.R)
        return yes if op_name == "popc" else yes > 0 if op_name == "or" else yes == np.bincount(slot, minlength=m.R)

    if what == "red":

        def finish(at, everyone):
            D[at] = result(m.bar_val[everyone], m.slot[everyone])[m.slot[at]]

        m.bar_red[m.pc_now] = finish

    def run(s, p):
        if m._alone and C is None and what != "arrive" and fixed is not None:
            n = s.stop - s.start if isinstance(s, slice) else s.size
            if n == m.nlive and not m.arrived.any():
                slot = m.slot[s]
                if what == "red":
                    D[s] = result(P[s], slot)[slot]
                m._barrier_passed(np.flatnonzero(m.live_in_slot))
                return p + 1
        count = C[s].astype(np.int64) if C is not None else None
        if what == "red":
            m.bar_val[s] = P[s]
        ids = m._bar_arrive(s, fixed if fixed is not None else I[s], count)
        if what != "arrive":
            m.st[s] = BAR
            m.wpc[s] = p
            m.pc[s] = BIG
            m.bar_id[s] = fixed if fixed is not None else I[s]
        else:
            m.pc[s] = p + 1
        for i in ids:
            m._bar_check(i)
        return None

    return run


def _call_parts(m, ins):
    """Returns (return operands, function name, argument operands) of a call instruction."""
    if any(isinstance(a, Reg) for a in ins.args):
        raise NotImplementedPTX(ins, "indirect call")
    at, name = next((i, a.name) for i, a in enumerate(ins.args) if isinstance(a, Sym))
    before, after = ([a.items for a in part if isinstance(a, Group)] for part in (ins.args[:at], ins.args[at + 1 :]))
    return before[0] if before else (), name, after[0] if after else ()


def _link(m, callee, formal, caller, actual, back):
    """Returns a function that copies an argument into the callee or, if ``back``, a result into the caller."""

    def end(fn, x, typ):
        if isinstance(x, Sym) and (fn.name, x.name) in m.fparams:
            return m.fparams[fn.name, x.name]
        cur, m.cur = m.cur, fn
        try:
            return (m.dst if (fn is caller) == back else m.src)(x, typ)
        finally:
            m.cur = cur

    typ = formal.type
    inner = m.fparams[callee.name, formal.name] if formal.space == "param" else end(callee, Reg(formal.name), typ)
    outer = end(caller, actual, typ)
    if inner.ndim == 2 and getattr(outer, "ndim", 1) == 1:  # .param on one side, register on the other
        inner = inner[:, : type_size(typ)].view(dtype_of(typ)[0])[:, 0]
    elif inner.ndim == 1 and getattr(outer, "ndim", 1) == 2:
        outer = outer[:, : type_size(typ)].view(dtype_of(typ)[0])[:, 0]

    def copy(s):
        if back:
            outer[s] = inner[s]
        else:
            inner[s] = outer[s]

    return copy


def _call(m, ins):
    rets, name, args = _call_parts(m, ins)
    callee = m.k.callee(ins)
    if callee is None:
        return _external(m, ins, name, rets, args)
    copies = [_link(m, callee, f, m.cur, a, False) for f, a in zip(callee.params, args)]
    entry = m.k.start[callee.name]

    def run(s, p):
        for c in copies:
            c(s)
        ln = m.lanes[s]
        m.ret[m.depth[ln], ln] = p + 1
        m.depth[ln] += 1
        return entry

    return run


def _call_end(m, ins):
    rets, _, _ = _call_parts(m, ins)
    callee = m.k.callee(ins)
    copies = [_link(m, callee, f, m.cur, a, True) for f, a in zip(callee.rets, rets)]

    def run(s, p):
        for c in copies:
            c(s)
        return p + 1

    return run


# ---- printf and assert


def _c_string(m, addr, lane):
    out = bytearray()
    while len(out) < 4096:
        (b,) = m.mem.load(np.array([addr + len(out)], np.int64), np.array([lane]), 1, 1, None)
        if b[0] == 0:
            break
        out.append(int(b[0]))
    return out.decode(errors="replace")


_FORMAT = re.compile(r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+))?(hh|h|ll|l|z|j|t|L)?([diouxXeEfFgGaAcsp%])")


def _printf_text(m, fmt, read, lane):
    """Returns the text that one thread prints.

    ``read(size)`` returns the bytes of the next argument, and ``read(size, True)`` returns them as an integer.
    """

    def sub(k):
        flags, width, prec, length, conv = k.groups()
        if conv == "%":
            return "%"
        width = str(read(4, True)) if width == "*" else width or ""
        prec = "." + str(read(4, True)) if prec == "*" else "." + prec if prec is not None else ""
        spec = "%" + flags + width + prec
        if conv in "eEfFgG":
            return (spec + conv) % struct.unpack("<d", read(8))[0]
        if conv in "aA":
            return struct.unpack("<d", read(8))[0].hex()
        if conv == "s":
            return (spec + "s") % _c_string(m, int.from_bytes(read(8), "little"), lane)
        if conv == "p":
            return (spec + "s") % hex(int.from_bytes(read(8), "little"))
        size = 8 if length in ("ll", "l", "z", "j", "t") else 4
        v = int.from_bytes(read(size), "little", signed=conv in "di")
        if conv == "c":
            return (spec + "c") % chr(v & 255)
        return (spec + ("d" if conv in "iu" else conv)) % v

    return _FORMAT.sub(sub, fmt)


def _external(m, ins, name, rets, args):
    known = ("vprintf", "__assertfail", "__nv_cuda_assertfail")
    if name not in known:
        raise NotImplementedPTX(ins, f"external function {name}")
    vals = []
    for a in args:
        if isinstance(a, Sym):
            arr = m.fparams[m.cur.name, a.name]
            vals.append(arr[:, :8].view(np.uint64)[:, 0])
        else:
            vals.append(m.src(a, "u64"))
    out = None
    if rets:
        r = rets[0]
        out = m.fparams[m.cur.name, r.name] if isinstance(r, Sym) else m.dst(r, "b32")

    def generic_bytes(addr, lane, n):
        ln = np.array([lane])
        got = [m._byte_loader(np.array([addr + i], np.int64), ln)[0][0] for i in range(n)]
        return bytes(int(x) for x in got)

    def run(s, p):
        for lane in m.lanes[s]:
            lane = int(lane)
            if name != "vprintf":
                text = [_c_string(m, int(v[lane]), lane) if int(v[lane]) else "?" for v in (vals[0], vals[1], vals[3])]
                line = int(vals[2][lane]) & 0xFFFFFFFF
                raise DeviceTrap(f"device assert failed: {text[0]} at {text[1]}:{line} in {text[2]}; {m._who(lane)}")
            pos = [int(vals[1][lane])]

            def read(n, as_int=False):
                pos[0] = (pos[0] + n - 1) // n * n
                raw = generic_bytes(pos[0], lane, n)
                pos[0] += n
                return int.from_bytes(raw, "little", signed=True) if as_int else raw

            text = _printf_text(m, _c_string(m, int(vals[0][lane]), lane), read, lane)
            m.report.output += text
            (m.stdout or sys.stdout).write(text)
        if out is not None:
            if out.ndim == 2:
                out[s, :4] = 0
            else:
                out[s] = 0
        return p + 1

    m._byte_loader = m.loader(ins, "generic", 1, 1)
    return run


CONTROL = {
    "bra": _bra,
    "exit": _exit,
    "ret": _ret,
    "trap": _trap,
    "brx": _brx,
    "bar": _bar,
    "barrier": _bar,
    "call": _call,
    "call.end": _call_end,
}
