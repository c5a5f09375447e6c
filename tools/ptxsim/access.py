"""The part of the simulated machine that accesses memory: loads, stores, atomics and cp.async."""

import numpy as np

from .memops import STRONG
from .memory import LOCAL_BASE, SHARED_BASE, WINDOW, Access, MemoryFault, PTXError, RaceError, _Bad
from .ops import dtype_of
from .report import source_of


class MemoryAccess:
    """A base class of Machine: executes memory instructions and raises their faults."""

    def _counters(self, ins, kind):
        """Returns a function ``get`` for an instruction: ``get(space)`` returns its counters in a state space.

        ``get`` returns None if accesses to the space are not counted. ``kind``: "load", "store" or "atomic".
        """
        memo = {}

        def get(space):
            if not self.traffic or space not in ("global", "shared"):
                return None
            if space not in memo:
                memo[space] = Access(ins, space, kind)
                self.accesses.append(memo[space])
            return memo[space]

        return get

    def _split(self, space, addr):
        """Splits an array of addresses by state space. Returns (space, positions, addresses) tuples.

        positions: indices into addr. None if the space has all addresses.
        addresses: the addresses in the space. For shared and local memory, they count from the start of the space.
        """
        if space != "generic":
            return ((space, None, addr),)
        if int(addr.max()) < SHARED_BASE:
            return (("global", None, addr),)
        out = []
        for sp, lo in (("shared", SHARED_BASE), ("local", LOCAL_BASE)):
            m = (addr >= lo) & (addr < lo + WINDOW)
            if m.all():
                return ((sp, None, addr - lo),)
            if m.any():
                at = np.flatnonzero(m)
                out.append((sp, at, addr[at] - lo))
        rest = np.flatnonzero((addr < SHARED_BASE) | (addr >= LOCAL_BASE + WINDOW))
        if rest.size:
            out.append(("global", rest, addr[rest]))
        return out

    def _local_index(self, addr, ln, size):
        bad = (addr < 0) | (addr + size > self.local_size)
        low = (addr & (size - 1)) != 0
        if bad.any() or low.any():
            k = int(np.flatnonzero(bad | low)[0])
            raise _Bad("out of bounds" if bad[k] else "misaligned", "local", k, addr[k], size)
        return ln * self.local_stride + addr

    def loader(self, ins, space, width, vec):
        counter = self._counters(ins, "load")
        size = width * vec
        dt = dtype_of(f"u{8 * width}")[0]

        def one(sp, addr, ln):
            if sp in ("global", "const", "param"):
                return self.mem.load(addr, ln, width, vec, counter(sp))
            if sp == "shared":
                out = self.shared.load(addr, self.smem_base[ln], ln, width, vec, counter(sp))
                if self.shared.races is not None:
                    self._race(ins, addr, ln, size, strong or "r")
                return out
            at = self._local_index(addr, ln, size)
            v = self.local.view(dt)
            return [v[(at + width * k) // width] for k in range(vec)]

        strong = "a" if any(p in STRONG for p in ins.parts) else None

        def load(addr, ln):
            at = None
            try:
                parts = self._split(space, addr)
                if len(parts) == 1:
                    return one(parts[0][0], parts[0][2], ln)
                out = [np.empty(ln.size, dt) for _ in range(vec)]
                for sp, at, a in parts:
                    for o, v in zip(out, one(sp, a, ln[at])):
                        o[at] = v
                return out
            except _Bad as e:
                raise self._fault(ins, e, ln if at is None else ln[at]) from None

        return load

    def storer(self, ins, space, width, vec):
        counter = self._counters(ins, "store")
        size = width * vec
        strong = "a" if any(p in STRONG for p in ins.parts) else None

        def one(sp, addr, ln, vals):
            if sp == "global":
                self.mem.store(addr, ln, width, vals, counter(sp))
            elif sp == "shared":
                acc = counter(sp)
                if self.shared.races is None:
                    self.shared.store(addr, self.smem_base[ln], ln, width, vals, acc)
                    return
                self.shared.check(addr, size)
                at = addr + self.smem_base[ln]
                old = self.shared.bytes_at(at, size)
                self.shared.store(addr, self.smem_base[ln], ln, width, vals, acc)
                mine = np.stack(vals, 1).view(np.uint8).reshape(ln.size, size)
                self._race(ins, addr, ln, size, strong or "w", old == mine, self.shared.bytes_at(at, size) != mine)
            elif sp == "local":
                at = self._local_index(addr, ln, size)
                v = self.local.view(dtype_of(f"u{8 * width}")[0])
                for k, x in enumerate(vals):
                    v[(at + width * k) // width] = x
            else:
                raise _Bad("write to read-only space", sp, 0, addr[0], size)

        def store(addr, ln, vals):
            at = None
            try:
                parts = self._split(space, addr)
                if len(parts) == 1:
                    one(parts[0][0], parts[0][2], ln, vals)
                else:
                    for sp, at, a in parts:
                        one(sp, a, ln[at], [v[at] for v in vals])
            except _Bad as e:
                raise self._fault(ins, e, ln if at is None else ln[at]) from None

        return store

    def atomic(self, ins, space, size, width):
        counter = self._counters(ins, "atomic")
        udt = dtype_of(f"u{8 * width}")[0]

        def touch(addr, ln):
            at = None
            out = []
            try:
                for sp, at, a in self._split(space, addr):
                    l2 = ln if at is None else ln[at]
                    acc = counter(sp)
                    if sp == "global":
                        pieces = self.mem.locate(a, size, True)
                        if acc is not None:
                            self.mem.count(acc, pieces, l2, size, "atomic")
                        for b, p, off in pieces:
                            if b.valid is not None:
                                b.valid[off[:, None] + np.arange(size)] = 1
                            out.append((b.view(udt), off // width, p if at is None else at if p is None else at[p]))
                    elif sp == "shared":
                        self.shared.check(a, size)
                        if acc is not None:
                            self.shared.count(acc, a, l2, size)
                        ix = a + self.smem_base[l2]
                        if self.shared.valid is not None:
                            self.shared.valid[ix[:, None] + np.arange(size)] = True
                        if self.shared.races is not None:
                            self._race(ins, a, l2, size, "a")
                        out.append((self.shared.raw.view(udt), ix // width, at))
                    else:
                        raise _Bad("atomic", sp, 0, a[0], size)
            except _Bad as e:
                raise self._fault(ins, e, ln if at is None else ln[at]) from None
            return out

        return touch

    def _race(self, ins, addr, ln, size, kind, silent=None, lost=None):
        slot = self.slot[ln]
        hit = self.shared.races.access(addr + self.smem_base[ln], size, kind, self.epoch[slot], ln >> 5, silent, lost)
        if hit is None:
            return
        k, other, how = hit
        verb = {"r": "read", "w": "write", "a": "atomic"}
        who = "several warps" if other < 0 else f"warp {other % self.wpb}"
        lane = int(ln[k])
        msg = (
            f"shared-memory race: {verb[kind]} of byte {int(addr[k])} by {self._who(lane)} "
            f"(warp {(lane >> 5) % self.wpb}) and {verb[how]} by {who}, no barrier between; "
            f"{self._where(ins)}"
        )
        if self.check_races == "raise":
            raise RaceError(msg)
        if not any(r.line == ins.line for r in self.report.races) and len(self.report.races) < 100:
            self.report.add_race(msg, ins)

    # ---- cp.async: the copy lands in shared memory only at the matching wait
    def cp_issue(self, ins, size):
        ga, sa = self._counters(ins, "load")("global"), self._counters(ins, "store")("shared")

        def issue(ln, dst, src, take):
            lnr = ln
            try:
                self.shared.check(dst, size)
                data = np.zeros((ln.size, size), np.uint8)
                if take is None:
                    words = self.mem.load(src, ln, 4, size // 4, ga)
                    data[:] = np.stack(words, 1).view(np.uint8)
                else:
                    for n in np.unique(take):
                        if n == 0:
                            continue
                        at = np.flatnonzero(take == n)
                        lnr = ln[at]
                        a = src[at]
                        low = a & (size - 1)
                        if low.any():
                            k = int(np.flatnonzero(low)[0])
                            raise _Bad("misaligned", "global", k, a[k], size)
                        if n == size:
                            data[at] = np.stack(self.mem.load(a, lnr, 4, size // 4, ga), 1).view(np.uint8)
                        else:
                            for j in range(int(n)):
                                data[at, j] = self.mem.load(a + j, lnr, 1, 1, None)[0]
                            if ga is not None:
                                self.mem.count(ga, self.mem.locate(a, 1, False), lnr, int(n), "load")
                    lnr = ln
                if sa is not None:
                    self.shared.count(sa, dst, ln, size)
                if self.shared.races is not None:  # against reads; values are compared on landing
                    yes = np.ones((ln.size, size), bool)
                    self._race(ins, dst, ln, size, "w", yes, ~yes)
            except _Bad as e:
                raise self._fault(ins, e, lnr) from None
            at = dst + self.smem_base[ln]
            if self.shared.valid is not None:  # not readable until waited for
                self.shared.valid[at[:, None] + np.arange(size)] = False
            self.cpq.append((ins, ln, self.cp_count[ln], dst, at, data))

        return issue

    def cp_commit(self, s):
        self.cp_count[s] += 1

    def cp_wait(self, ins, s, keep):
        ln = self.lanes[s]
        limit = np.full(self.L, -1, np.int64)
        limit[ln] = self.cp_count[ln] - keep
        rest = []
        for rec in self.cpq:
            cins, l2, group, dst, at, data = rec
            m = group < limit[l2]
            if not m.any():
                rest.append(rec)
                continue
            pos = at[m][:, None] + np.arange(data.shape[1])
            old = self.shared.raw[pos]
            self.shared.raw[pos] = data[m]
            if self.shared.valid is not None:
                self.shared.valid[pos] = True
            if self.shared.races is not None:
                self._race(cins, dst[m], l2[m], data.shape[1], "w", old == data[m], self.shared.raw[pos] != data[m])
            if not m.all():
                m = ~m
                rest.append((cins, l2[m], group[m], dst[m], at[m], data[m]))
        self.cpq = rest

    # ---- messages
    def _who(self, lane):
        b = tuple(int(self.ctaid[i][lane]) for i in range(3))
        t = tuple(int(self.tid[i][lane]) for i in range(3))
        return f"block {b} thread {t}"

    def _where(self, ins):
        text = f"PTX line {ins.line}: {ins.text}"
        src = self.source_of(ins)
        return text + (f" [{src[0]}:{src[1]}]" if src else "")

    def source_of(self, ins):
        return source_of(self.k.module.parsed.files, ins)

    def _fault(self, ins, e, ln):
        lane = int(ln[min(e.where, ln.size - 1)])
        msg = (
            f"{e.kind}: {e.size}-byte {e.space} access at 0x{e.address & (2**64 - 1):x} by {self._who(lane)}"
            + (f" ({e.detail})" if e.detail else "")
            + f"; {self._where(ins)}"
        )
        return MemoryFault(
            msg,
            kind=e.kind,
            space=e.space,
            address=e.address,
            size=e.size,
            block=tuple(int(c[lane]) for c in self.ctaid),
            thread=tuple(int(t[lane]) for t in self.tid),
            instr=ins.text,
            line=ins.line,
            source=self.source_of(ins),
        )

    def fail(self, ins, why, lane):
        raise PTXError(f"{why}: {self._who(int(lane))}; {self._where(ins)}")

    def note(self, ins, what, n):
        self.report.note(self._where(ins), what, n)

    def all_present(self, s):
        """Returns whether the lanes ``s`` are whole warps. A lane can then read from any other lane of its warp."""
        return isinstance(s, slice) and s.start & 31 == 0 and s.stop & 31 == 0
