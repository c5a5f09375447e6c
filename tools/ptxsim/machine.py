"""The machine that simulates a kernel.

Thread blocks run group by group. The blocks of the running group are called resident. Each thread of a resident block
is a lane. Numpy arrays hold the values of all lanes, one element per lane. Blocks are padded to whole warps, so warp w
owns the lanes 32w..32w+31. Each lane has a program counter (pc). The schedule `lockstep` repeatedly runs all lanes
with the lowest pc. The schedule `random` repeatedly picks a random warp. In this warp, it runs the lanes with the
lowest pc, for a random number of instructions.
"""

import random
import struct
import time

import numpy as np

from . import memops, warpops  # noqa: F401, their import registers instructions
from .access import MemoryAccess
from .control import BAR, BIG, CONTROL, DONE, RUN, SYNC
from .memory import (
    GLOBAL_BASE,
    LOCAL_BASE,
    SHARED_BASE,
    WINDOW,
    Buffer,
    GlobalMemory,
    Pointer,
    PTXError,
    SharedMemory,
    host_view,
    warps_in,
)
from .module import dim3
from .ops import BUILD, NotImplementedPTX, dtype_of, is_float
from .parser import Imm, Mem, Reg, Special, Sym, type_size
from .report import Report
from .warpops import ballot, member_mask

PLAIN, WARP, BRANCH = 0, 1, 2  # kinds of instruction


class DeadlockError(PTXError):
    """Raised if some lanes have not exited, but none of them can run."""


class LaunchTimeout(PTXError):
    """Raised if a launch needs more than max_steps instructions."""


class _Sink:
    def __setitem__(self, s, v):
        pass


class _Not:
    def __init__(self, a):
        self.a = a

    def __getitem__(self, s):
        return ~self.a[s]


class Machine(MemoryAccess):
    """Executes one kernel launch. Holds its state, such as registers, memory and program counters."""

    def __init__(
        self,
        kernel,
        grid,
        block,
        args,
        dynamic_shared=0,
        schedule="lockstep",
        seed=0,
        resident=None,
        check_poison=False,
        check_races=False,
        traffic=True,
        max_steps=50_000_000,
        stdout=None,
    ):
        if schedule not in ("lockstep", "random"):
            raise ValueError("schedule must be 'lockstep' or 'random'")
        self.k, self.grid, self.block = kernel, grid, block
        self.schedule, self.rng = schedule, random.Random(seed)
        self.check_races, self.traffic, self.stdout = check_races, traffic, stdout
        self.max_steps, self.steps = max_steps, 0
        self.threads = block[0] * block[1] * block[2]
        self.nblocks = grid[0] * grid[1] * grid[2]
        d = kernel.fn.directives
        if not 0 < self.threads <= 1024 or min(block) < 1 or min(grid) < 1:
            raise ValueError(f"bad launch shape grid={grid} block={block}")
        if "reqntid" in d and tuple(dim3(d["reqntid"])) != tuple(block):
            raise ValueError(f"kernel requires block {dim3(d['reqntid'])}, launched with {block}")
        if "maxntid" in d and self.threads > np.prod(d["maxntid"]):
            raise ValueError(f"kernel is limited to {np.prod(d['maxntid'])} threads per block")
        self.wpb = (self.threads + 31) // 32  # warps per block
        self.lpb = 32 * self.wpb
        ranges = self._shared_layout(dynamic_shared)
        self._local_layout()
        if resident is None:  # so many threads, within half a GB
            nregs = sum(len(f.regs) for f in kernel.functions)
            each = self.lpb * (8 * nregs + self.local_stride) + self.total_shared * (40 if check_races else 2)
            most = 8192 if schedule == "lockstep" else 1 << 16
            resident = max(1, min(most // self.lpb, (512 << 20) // max(1, each)))
        self.R = min(resident, self.nblocks)
        self.L = self.R * self.lpb

        self.writeback = []
        self.workspace = None
        self._params(args)
        self.mem = GlobalMemory(check_poison, traffic)
        self.shared = SharedMemory(self.R, self.total_shared, ranges, check_poison, check_races, traffic)
        self._lanes()
        self._private()
        self.report = Report(self)
        self.accesses = []
        self.unsupported = []
        self.bar_red = {}  # pc of a bar.red -> its completion
        self.cpq = []  # cp.async copies not yet waited for
        self.cp_count = np.zeros(self.L, np.int64)
        self.reset_each_chunk = []
        self._bind()

    # ---- set-up
    def _params(self, args):
        fn = self.k.fn
        if len(args) != len(fn.params):
            raise TypeError(
                f"{fn.name} takes {len(fn.params)} arguments "
                f"({', '.join('.' + v.type + (str(list(v.dims)) if v.dims else '') for v in fn.params)}), "
                f"got {len(args)}"
            )
        offset, at = 0, {}
        for v in fn.params:
            offset = (offset + v.align - 1) // v.align * v.align
            at[v.name] = offset
            offset += v.nbytes
        data = bytearray(offset)
        spans = []
        self.keep = []
        self.arg_buffers = []
        for i, (v, a) in enumerate(zip(fn.params, args)):
            host = host_view(a)
            if isinstance(a, Buffer):
                if a.name is None:
                    a.name = f"arg{i}"
                self.arg_buffers.append(a)
            elif isinstance(a, Pointer):
                self.arg_buffers.append(a.buffer)
            if isinstance(a, (Buffer, Pointer)):
                raw = a.address.to_bytes(8, "little")
            elif host is not None:
                raw = self._array_arg(host, i, spans).to_bytes(8, "little")
            elif isinstance(a, (bytes, bytearray, memoryview)) or (isinstance(a, np.void) and v.dims):
                raw = bytes(a) if not isinstance(a, np.void) else a.tobytes()
            elif a is None:
                raw = bytes(8)
            elif v.dims:
                raise TypeError(f"argument {i} is a {v.nbytes}-byte struct: pass bytes")
            elif v.type[0] == "f" or isinstance(a, (float, np.floating)):
                if v.type[0] == "u" or v.type[0] == "s":
                    raise TypeError(f"argument {i} is .{v.type}, got a float")
                raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[v.nbytes], float(a))
            else:
                raw = (int(a) & ((1 << 8 * v.nbytes) - 1)).to_bytes(v.nbytes, "little")
            if len(raw) != v.nbytes:
                raise TypeError(f"argument {i}: parameter .{v.type} {v.name} has {v.nbytes} bytes, got {len(raw)}")
            data[at[v.name] : at[v.name] + v.nbytes] = raw
        if any("%envreg" in ins.text for ins in self.k.code):  # cooperative launch: grid.sync() workspace
            if self.nblocks > self.R:
                raise ValueError(f"grid-wide sync needs all blocks in flight: pass resident={self.nblocks}")
            self.workspace = Buffer(nbytes=256, name="grid workspace")
        self.pbuf = Buffer(np.frombuffer(bytes(data) or b"\0", np.uint8), name="kernel parameters", readonly=True)
        self.param_at = at

    def _array_arg(self, a, i, spans):
        if not a.flags.c_contiguous:
            raise ValueError(f"argument {i}: array arguments must be C-contiguous")
        lo = a.__array_interface__["data"][0]
        key = (lo, a.nbytes)
        for k, buf in spans:
            if k == key:
                return buf.base
            if lo < k[0] + k[1] and k[0] < lo + a.nbytes and a.nbytes:
                raise ValueError(f"argument {i} overlaps another array argument: pass a ptxsim.Buffer and offsets")
        buf = Buffer(a, name=f"arg{i}", readonly=not a.flags.writeable)
        spans.append((key, buf))
        self.keep.append(buf)
        self.arg_buffers.append(buf)
        if a.flags.writeable:
            self.writeback.append((a, buf))
        return buf.base

    def _shared_layout(self, dynamic):
        """Places the shared variables in the shared memory of a block. Returns [(start, end, name)] in bytes."""
        used = set()
        for ins in self.k.code:
            for a in ins.args:
                for x in a.items if hasattr(a, "items") else (a,):
                    x = x.base if isinstance(x, Mem) else x
                    if isinstance(x, Sym):
                        used.add(x.name)
        self.shared_at, ranges, offset, unsized = {}, [], 0, []
        pool = dict(self.k.module.parsed.vars)
        for f in self.k.functions:
            pool.update(f.vars)
        for v in pool.values():
            if v.space != "shared" or v.name not in used:
                continue
            if v.extern or v.nbytes == 0:
                unsized.append(v)
                continue
            offset = (offset + v.align - 1) // v.align * v.align
            self.shared_at[v.name] = offset
            ranges.append((offset, offset + v.nbytes, v.name))
            offset += v.nbytes
            # keep neighbours 128 bytes apart so an overrun is seen (bank mapping unchanged)
            offset += 128
        if unsized:
            align = max(max(v.align for v in unsized), 16)
            offset = (offset + align - 1) // align * align
            for v in unsized:
                self.shared_at[v.name] = offset
            ranges.append((offset, offset + dynamic, unsized[0].name))
            offset += dynamic
        if sum(b - a for a, b, _ in ranges) > 227 << 10:
            raise ValueError("more than 227 KB of shared memory per block")
        self.dynamic_shared, self.total_shared = dynamic, offset
        return ranges

    def _lanes(self):
        L = self.L
        self.lanes = np.arange(L)
        self.slot = self.lanes // self.lpb
        self.smem_base = self.slot * self.shared.stride
        t = self.lanes % self.lpb
        self.in_block = t < self.threads
        bx, by, _ = self.block
        tid = [t % bx, t // bx % by, t // (bx * by)]
        self.tid = tid
        self.ctaid = [np.zeros(L, np.uint32) for _ in range(3)]
        u = lambda x: np.broadcast_to(np.uint32(x), (L,))
        lane = self.lanes & 31
        sp = {
            "%laneid": lane,
            "%warpid": t >> 5,
            "%nwarpid": u(self.wpb),
            "%smid": self.slot % 132,
            "%nsmid": u(132),
            "%gridid": u(1),
            "%dynamic_smem_size": u(self.dynamic_shared),
            "%total_smem_size": u(self.total_shared),
            "%aggr_smem_size": u(self.total_shared),
            "%reserved_smem_offset_begin": u(0),
            "%lanemask_eq": 1 << lane,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_ge": (0xFFFFFFFF << lane) & 0xFFFFFFFF,
            "%lanemask_gt": (0xFFFFFFFE << lane) & 0xFFFFFFFF,
            "%is_explicit_cluster": np.zeros(L, bool),
            "%cluster_ctarank": u(0),
            "%cluster_nctarank": u(1),
        }
        for i, c in enumerate("xyz"):
            sp[f"%tid.{c}"], sp[f"%ntid.{c}"] = tid[i], u(self.block[i])
            sp[f"%nctaid.{c}"] = u(self.grid[i])
            sp[f"%cluster_ctaid.{c}"], sp[f"%cluster_nctaid.{c}"] = u(0), u(1)
            sp[f"%nclusterid.{c}"] = u(self.grid[i])
        if self.workspace is not None:
            sp["%envreg1"], sp["%envreg2"] = u(self.workspace.base >> 32), u(self.workspace.base & 0xFFFFFFFF)
        self.special = {k: v if v.dtype in (np.uint32, bool) else v.astype(np.uint32) for k, v in sp.items()}
        for i, c in enumerate("xyz"):  # filled in per chunk
            self.special[f"%ctaid.{c}"] = self.special[f"%clusterid.{c}"] = self.ctaid[i]

    def _local_layout(self):
        self.local_at, offset = {}, 0
        for f in self.k.functions:
            for v in f.vars.values():
                if v.space == "local":
                    offset = (offset + v.align - 1) // v.align * v.align
                    self.local_at[f.name, v.name] = offset
                    offset += v.nbytes
        self.local_size = offset
        self.local_stride = (offset + 15) // 16 * 16

    def _private(self):
        """Allocates the memory that each lane has for itself: local memory, and the .param variables of calls."""
        self.local = np.zeros(max(16, self.L * self.local_stride), np.uint8)
        self.fparams = {}
        for f in self.k.functions:
            for v in f.vars.values():
                if v.space == "param" and not (f.entry and v in f.params):
                    width = max(8, (v.nbytes + 7) // 8 * 8)
                    self.fparams[f.name, v.name] = np.zeros((self.L, width), np.uint8)

    # ---- binding: operands -> arrays
    def _bind(self):
        self._arrays = {}  # (function, register) -> one value per lane
        self._carry = None
        n = len(self.k.code)
        self.fns, self.kind, self.mask, self.whole = [None] * n, [PLAIN] * n, [None] * n, [False] * n
        for pc, ins in enumerate(self.k.code):
            self.cur, self.pc_now = self.k.owner[pc], pc
            try:
                self._bind_one(pc, ins)
            except NotImplementedPTX as e:
                self.unsupported.append(str(e))
                self.fns[pc], self.kind[pc] = self._raiser(e), BRANCH
            except (IndexError, AttributeError, ValueError, KeyError, TypeError) as e:
                err = NotImplementedPTX(ins, f"{type(e).__name__}: {e}")
                self.unsupported.append(str(err))
                self.fns[pc], self.kind[pc] = self._raiser(err), BRANCH
        self.next_stop = [0] * (n + 1)
        self.next_stop[n] = n
        for pc in range(n - 1, -1, -1):
            self.next_stop[pc] = pc if self.kind[pc] != PLAIN else self.next_stop[pc + 1]

    @staticmethod
    def _raiser(e):
        def run(s, p):
            raise e

        return run

    def _bind_one(self, pc, ins):
        name = ins.parts[0]
        control = CONTROL.get(name)
        if name in ("bar", "barrier") and ins.parts[1] == "warp":
            control = None
        if control is not None:
            self.kind[pc] = BRANCH
            self.fns[pc] = self._guard_control(ins, control(self, ins))
            return
        if name == "bar":  # bar.warp.sync
            fn = _nothing
        else:
            build = BUILD.get(name)
            if build is None:
                raise NotImplementedPTX(ins)
            fn = build(self, ins)
        m = member_mask(ins)
        if m is not None:
            self.mask[pc] = self.src(m, "b32")
            self.whole[pc] = isinstance(m, Imm) and m.as_int(32) == 0xFFFFFFFF
            if ins.pred is None:
                self.kind[pc] = WARP
                self.fns[pc] = fn
            else:  # predicated: lanes that skip it move on
                self.kind[pc] = BRANCH
                self.fns[pc] = self._guard_control(ins, self._warp_control(fn))
            return
        self.fns[pc] = fn if ins.pred is None else self._guard(ins, fn)

    def _guard(self, ins, fn):
        P, lanes, neg = self.src(Reg(ins.pred.name), "pred"), self.lanes, ins.pred.neg

        def run(s):
            m = ~P[s] if neg else P[s]
            k = np.count_nonzero(m)
            if k == m.size:
                fn(s)
            elif k:
                fn(lanes[s][m])

        return run

    def _guard_control(self, ins, fn):
        if ins.pred is None:
            return fn
        P, lanes, neg = self.src(Reg(ins.pred.name), "pred"), self.lanes, ins.pred.neg

        def run(s, p):
            m = ~P[s] if neg else P[s]
            k = np.count_nonzero(m)
            if k == m.size:
                return fn(s, p)
            if k == 0:
                return p + 1
            ln = lanes[s]
            self.pc[ln[~m]] = p + 1
            yes = ln[m]
            t = fn(yes, p)
            if t is not None:
                self.pc[yes] = t
            return None

        return run

    def _warp_control(self, fn):
        def run(s, p):
            ready = self._gather_warp(s, p)
            if ready is not None:
                fn(ready)
                self.pc[ready] = p + 1
            return None

        return run

    def array(self, name):
        key = (self.cur.name, name)
        a = self._arrays.get(key)
        if a is None:
            typ = self.cur.regs[name]
            n = type_size(typ)
            if n > 8:
                raise ValueError("128-bit registers")
            dt = np.bool_ if typ == "pred" else dtype_of(f"u{8 * n}")[0]
            a = self._arrays[key] = np.zeros(self.L, dt)
        return a

    def reg_type(self, r):
        return self.cur.regs[r.name]

    @property
    def carry(self):
        if self._carry is None:
            self._carry = np.zeros(self.L, bool)
        return self._carry

    def _view(self, a, typ, write):
        dt, packed = dtype_of(typ)
        size = np.dtype(dt).itemsize * (2 if packed else 1)
        if dt is np.bool_ or a.dtype == np.bool_:
            if not (dt is np.bool_ and a.dtype == np.bool_):
                raise ValueError("predicate where a value is needed, or the reverse")
            return a
        if a.dtype.itemsize == size:
            return a.view(dt).reshape(-1, 2) if packed else a.view(dt)
        if a.dtype.itemsize < size:
            raise ValueError("register too narrow")
        if write:  # extend into the wide register
            if typ[0] == "s":
                return a.view(f"i{a.dtype.itemsize}")
            if is_float(typ) and typ != "bf16":
                raise ValueError("register too wide")
            return a
        return a.view(dt)[:: a.dtype.itemsize // size]

    def src(self, arg, typ):
        """Returns the values of an operand as an array with one value per lane. typ: PTX type of the values."""
        dt, packed = dtype_of(typ)
        if isinstance(arg, Reg):
            a = self._view(self.array(arg.name), typ, False)
            return _Not(a) if arg.neg else a
        if isinstance(arg, Special):
            if arg.name not in self.special:
                raise ValueError(f"special register {arg.name}")
            a = self.special[arg.name]
            if dt is np.bool_:
                return a
            want = np.dtype(dt)
            if a.dtype == np.bool_ or want.itemsize != 4:
                if arg.name.startswith(("%ctaid", "%clusterid")):
                    wide = np.zeros(self.L, want)  # refreshed with the chunk
                    self.reset_each_chunk.append(lambda: wide.__setitem__(slice(None), a))
                    return wide
                return a.astype(want)
            return a.view(dt)
        if isinstance(arg, Imm):
            if dt is np.bool_:
                v = np.bool_(arg.value)
            elif dt in (np.float16, np.float32, np.float64) and not packed:
                n = np.dtype(dt).itemsize * 8
                v = (
                    dt(arg.as_float(n))
                    if isinstance(arg.value, float) or arg.bits not in (0, n)
                    else np.array(arg.as_int(n), f"u{n // 8}").view(dt)[()]
                )
            else:
                n = np.dtype(dt).itemsize * 8 * (2 if packed else 1)
                raw = np.array(arg.as_int(n), f"u{n // 8}")
                if packed:
                    return np.broadcast_to(raw.reshape(1).view(dt), (self.L, 2))
                v = raw.view(dt)[()]
            return np.broadcast_to(v, (self.L,))
        if isinstance(arg, Sym):
            v = np.array(self.symbol(arg), np.uint64)
            v = v.astype(np.uint32) if np.dtype(dt).itemsize == 4 else v
            return np.broadcast_to(v.view(dt)[()], (self.L,))
        raise ValueError(f"operand {arg}")

    def dst(self, arg, typ):
        if isinstance(arg, Reg):
            return self._view(self.array(arg.name), typ, True)
        if isinstance(arg, Sym) and arg.name == "_":
            return _Sink()
        raise ValueError(f"destination {arg}")

    def symbol(self, sym):
        """Returns the address of a variable. The address of a shared or local variable is an offset into that memory."""
        n = sym.name
        if n in self.shared_at:
            return self.shared_at[n] + sym.offset
        if (self.cur.name, n) in self.local_at:
            return self.local_at[self.cur.name, n] + sym.offset
        if n in self.k.module.symbols:
            return self.k.module.symbols[n].base + sym.offset
        if self.cur.entry and n in self.param_at:
            return self.pbuf.base + self.param_at[n] + sym.offset
        raise ValueError(f"address of {n}")

    def window(self, space):
        return {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)

    def window_range(self, space):
        if space in ("shared", "local"):
            return self.window(space), self.window(space) + WINDOW
        if space == "global":
            return GLOBAL_BASE, SHARED_BASE
        return 1, 1

    def clock(self):
        return self.steps * 4 + 1

    def param_view(self, name, offset, dt):
        """Reads a value of dtype dt at offset in a .param variable. Returns an array with the value of each lane."""
        if (self.cur.name, name) in self.fparams:
            a = self.fparams[self.cur.name, name]
            return a[:, offset : offset + np.dtype(dt).itemsize].view(dt)[:, 0]
        at = self.param_at[name] + offset
        raw = self.pbuf.raw[at : at + np.dtype(dt).itemsize].view(dt)
        return np.broadcast_to(raw[0], (self.L,))

    def address(self, mem, space):
        """Returns a function from selected lanes to their int64 addresses for the operand mem."""
        base, off = mem.base, np.int64(mem.offset)
        if isinstance(base, (Sym, Imm)):
            v = self.symbol(base) if isinstance(base, Sym) else base.value
            a = np.broadcast_to(np.int64(v + mem.offset), (self.L,))
            return lambda s: a[s]
        if not isinstance(base, Reg):
            raise ValueError("address")
        if type_size(self.reg_type(base)) == 4:
            A = self.src(base, "u32")
            return lambda s: A[s].astype(np.int64) + off
        A = self.src(base, "s64")
        if mem.offset:
            return lambda s: A[s] + off
        return lambda s: A[s].copy()

    # ------------------------------------------------------------ execution
    def run(self):
        t0 = time.perf_counter()
        n = len(self.k.code)
        self.exec_lanes, self.exec_warps = [0] * (n + 1), [0] * (n + 1)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, self.nblocks, self.R):
                    self._start_chunk(first)
                    if self.schedule == "lockstep":
                        self._run_lockstep()
                    else:
                        self._run_random()
        finally:
            for host, buf in self.writeback:
                if buf.nbytes:
                    host[...] = buf.raw[: buf.nbytes].view(host.dtype).reshape(host.shape)
        self.report.finish(time.perf_counter() - t0)
        return self.report

    def _start_chunk(self, first):
        count = min(self.R, self.nblocks - first)
        gx, gy, _ = self.grid
        b = first + self.slot
        b = np.minimum(b, self.nblocks - 1)
        self.ctaid[0][:], self.ctaid[1][:], self.ctaid[2][:] = b % gx, b // gx % gy, b // (gx * gy)
        for f in self.reset_each_chunk:
            f()
        live = self.in_block & (self.slot < count)
        self.live = live
        self.nlive = int(live.sum())
        self.live_in_slot = np.bincount(self.slot[live], minlength=self.R)
        self.st = np.where(live, RUN, DONE).astype(np.uint8)
        self.pc = np.where(live, np.int32(self.k.start[self.k.fn.name]), BIG)
        self.wpc = np.zeros(self.L, np.int32)  # pc of a blocked lane
        self.depth = np.zeros(self.L, np.int32)
        self.ret = np.zeros((len(self.k.functions) + 1, self.L), np.int32)
        self.bar_id = np.zeros(self.L, np.int32)
        self.bar_val = np.zeros(self.L, bool)
        self.arrived = np.zeros((16, self.R))
        self.need = np.zeros((16, self.R), np.int64)  # 0: all live threads
        self.epoch = np.zeros(self.R, np.int64)
        self.cpq.clear()
        self.cp_count[:] = 0
        self.shared.reset()
        self.local[:] = 0xFF
        self.woken = set()
        self.patience = 1000 if self.schedule == "lockstep" else 10

    def _run_lockstep(self):
        self._alone = True  # this group holds all lanes
        while self.nlive:
            self._advance(0, self.L, 1 << 60)
            if self.nlive:
                self._deadlock()

    def _run_random(self):
        self._alone = False
        rng = self.rng
        nw = self.L // 32
        warps = [w for w in range(nw) if self.live[32 * w : 32 * w + 32].any()]
        index = {w: i for i, w in enumerate(warps)}
        while self.nlive:
            if not warps:
                self._deadlock()
            # often stay with one warp for long, so that warps drift far apart
            w = warps[rng.randrange(len(warps))]
            budget = int(2 ** rng.uniform(0, 8)) if rng.random() < 0.9 else 2000
            self._advance(32 * w, 32 * w + 32, budget)
            if int(self.pc[32 * w : 32 * w + 32].min()) == BIG:
                i = index.pop(w)
                last = warps.pop()
                if last != w:
                    warps[i] = last
                    index[last] = i
            if self.woken:
                for x in self.woken:
                    if x not in index and int(self.pc[32 * x : 32 * x + 32].min()) != BIG:
                        index[x] = len(warps)
                        warps.append(x)
                self.woken.clear()

    def _deadlock(self):
        lines = []
        for st, what in ((BAR, "at barrier"), (SYNC, "at warp-synchronous")):
            at = np.flatnonzero(self.st == st)
            for p in np.unique(self.wpc[at])[:5]:
                ln = at[self.wpc[at] == p]
                lines.append(
                    f"{ln.size} threads wait {what} [{self._where(self.k.code[p])}], e.g. {self._who(int(ln[0]))}"
                )
        raise DeadlockError("deadlock: no thread can run; " + "; ".join(lines))

    def _select(self, eq, lo, n):
        idx = np.flatnonzero(eq)
        a, z = int(idx[0]), int(idx[-1])
        if z - a + 1 == n:
            return slice(lo + a, lo + z + 1)
        idx += lo
        return idx

    def _advance(self, lo, hi, budget):
        """Runs the lanes lo to hi - 1 until none of them can run, or until about `budget` instructions have run."""
        fns, kind, stop = self.fns, self.kind, self.next_stop
        el, ew = self.exec_lanes, self.exec_warps
        starving = 0
        self.group_live = self.nlive if self._alone else int(np.count_nonzero(self.live[lo:hi]))
        while budget > 0:
            pcs = self.pc[lo:hi]
            if hi - lo == 32:  # one warp: plain Python is quicker
                row = pcs.tolist()
                p = min(row)
                n = row.count(p)
                limit = int(BIG) if n == 32 else min(x for x in row if x != p)
            else:
                p = int(pcs.min())
                eq = pcs == p
                n = int(np.count_nonzero(eq))
                limit = int(np.where(eq, BIG, pcs).min())
            if p == BIG:
                return
            once = False
            if limit != BIG:
                starving += 1
                if starving > self.patience or (not self._alone and self.rng.random() < 0.05):
                    # let a waiting group move: the lowest pc may be spinning on it
                    later = np.unique(pcs[(pcs != p) & (pcs != BIG)])
                    p = int(later[self.rng.randrange(later.size)])
                    n = int(np.count_nonzero(pcs == p))
                    later = later[later > p]
                    limit = int(later[0]) if later.size else int(BIG)
                    once, starving, self.patience = True, 0, min(self.patience, 50)
            else:
                starving = 0
            s = slice(lo, hi) if n == hi - lo else self._select(pcs == p, lo, n)
            nw = 1 if hi - lo == 32 else warps_in(s)
            while True:
                e = stop[p]
                if e > limit:
                    e = limit
                if e - p > budget:
                    e = p + budget
                if e > p:
                    for i in range(p, e):
                        fns[i](s)
                    el[p] += n
                    el[e] -= n
                    ew[p] += nw
                    ew[e] -= nw
                    budget -= e - p
                    self.steps += e - p
                    p = e
                if p == limit or budget <= 0:
                    self.pc[s] = p
                    break
                budget -= 1
                self.steps += 1
                if self.steps > self.max_steps:
                    raise LaunchTimeout(f"more than {self.max_steps} steps; now at {self._where(self.k.code[p])}")
                el[p] += n
                el[p + 1] -= n
                ew[p] += nw
                ew[p + 1] -= nw
                if kind[p] == WARP:
                    if n == self.group_live and self.whole[p]:
                        fns[p](s)
                        p += 1
                        if once:
                            self.pc[s] = p
                            break
                        continue
                    ready = self._gather_warp(s, p)
                    if ready is not None:
                        fns[p](ready)
                        self.pc[ready] = p + 1
                    break
                t = fns[p](s, p)
                if t is None:
                    break
                if t <= p:  # looping
                    if limit != BIG:
                        starving += 1  # while other lanes wait
                    if not self._alone and self.rng.random() < 0.05:
                        budget = 0  # perhaps spinning on another warp
                p = t
                if p >= limit or once or budget <= 0 or starving > self.patience:
                    self.pc[s] = p
                    break

    def _gather_warp(self, s, p):
        """Makes lanes wait at a warp-synchronous instruction until all lanes of the member mask have arrived.

        s: the lanes. p: pc of the instruction. Returns the lanes that may now execute it (a slice or index array), or None.
        """
        ln = self.lanes[s]
        w = ln >> 5
        # lanes already waiting here, in the same warps
        lo, hi = int(w[0]) * 32, (int(w[-1]) + 1) * 32
        waiting = np.flatnonzero((self.st[lo:hi] == SYNC) & (self.wpc[lo:hi] == p)) + lo
        if waiting.size:
            mine = np.zeros(self.L // 32, bool)
            mine[w] = True
            waiting = waiting[mine[waiting >> 5]]
            if waiting.size:
                ln = np.sort(np.concatenate([ln, waiting]))
                w = ln >> 5
        here = ballot(self, ln, True)
        alive = np.packbits(self.live.reshape(-1, 32), axis=1, bitorder="little").view("<u4")[:, 0]
        m = self.mask[p][ln]
        me = (m >> (ln & 31).astype(np.uint32)) & np.uint32(1)
        if not me.all():
            k = int(np.flatnonzero(me == 0)[0])
            self.fail(self.k.code[p], f"member mask 0x{int(m[k]):08x} does not name the executing lane", ln[k])
        ok = (m & alive[w] & ~here[w]) == 0
        if not ok.all():
            wait = ln[~ok]
            self.st[wait] = SYNC
            self.wpc[wait] = p
            self.pc[wait] = BIG
            ln = ln[ok]
            if ln.size == 0:
                return None
        self.st[ln] = RUN
        a, z = int(ln[0]), int(ln[-1])
        return slice(a, z + 1) if z - a + 1 == ln.size else ln

    # ---- control flow
    def exit_lanes(self, s):
        self.pc[s] = BIG
        self.st[s] = DONE
        self.live[s] = False
        ln = self.lanes[s]
        self.nlive -= ln.size
        self.group_live -= ln.size
        slots = np.bincount(self.slot[ln], minlength=self.R)
        self.live_in_slot -= slots
        if self.nlive:
            # fewer lanes to wait for: barriers and warp syncs may now be complete
            if self.arrived.any():
                for i in np.flatnonzero((self.arrived[:, slots > 0] > 0).any(1)):
                    self._bar_check(int(i))
            waiting = self.st == SYNC
            if waiting.any():
                mine = np.zeros(self.L // 32, bool)
                mine[ln >> 5] = True
                at = np.flatnonzero(waiting)
                at = at[mine[at >> 5]]
                self.st[at] = RUN
                self.pc[at] = self.wpc[at]

    def _bar_arrive(self, s, ids, count):
        """Counts arrivals of the lanes s at a barrier. Returns the barrier numbers.

        ids: barrier number of all lanes (an int) or of each lane (an array).
        count: for each lane, the number of threads for which the barrier waits; 0 or None: all threads.
        """
        slot = self.slot[s]
        todo = [(int(ids), None)] if np.ndim(ids) == 0 else [(int(i), ids == i) for i in np.unique(ids)]
        for i, at in todo:
            sl = slot if at is None else slot[at]
            weight = None
            if count is not None:  # counts are in whole warps: exited lanes count too
                w = self.lanes[s] >> 5
                weight = (32 / self.live.reshape(-1, 32).sum(1))[w if at is None else w[at]]
            self.arrived[i] += np.bincount(sl, weight, minlength=self.R)
            if count is not None:
                self.need[i][sl] = count if at is None else count[at]
            else:
                self.need[i][sl] = 0
        return [i for i, _ in todo]

    def _bar_check(self, i):
        arr = self.arrived[i]
        want = np.where(self.need[i] > 0, self.need[i], self.live_in_slot)
        done = (arr > 0) & (arr > want - 0.5)
        if not done.any():
            return
        slots = np.flatnonzero(done)
        lo, hi = int(slots[0]) * self.lpb, (int(slots[-1]) + 1) * self.lpb
        m = (self.st[lo:hi] == BAR) & (self.bar_id[lo:hi] == i) & done[self.slot[lo:hi]]
        ln = np.flatnonzero(m) + lo
        pcs = np.unique(self.wpc[ln])
        for sl in slots if pcs.size > 1 else ():
            here = np.unique(self.wpc[ln[self.slot[ln] == sl]])
            if here.size > 1 and self.need[i][sl] == 0:
                other = self.k.code[here[1]].line
                self.note(self.k.code[here[0]], f"barrier met by threads at another one (PTX line {other})", 1)
        for p in pcs:
            fin = self.bar_red.get(int(p))
            if fin is not None:
                at = ln[self.wpc[ln] == p]
                fin(at, ln)
        self.pc[ln] = self.wpc[ln] + 1
        self.st[ln] = RUN
        arr[done] = 0
        self._barrier_passed(slots)
        if not self._alone:
            self.woken.update(int(x) for x in np.unique(ln >> 5))

    def _barrier_passed(self, slots):
        self.epoch[slots] += 1
        self.report.barriers += int(np.size(slots))


def _nothing(s):
    pass
