"""Device memory: buffers between guard ranges, traffic counters, and detection of races."""

import bisect
import ctypes
import weakref

import numpy as np

POISON = 0xFF  # every float format reads this as NaN, every int as -1
GLOBAL_BASE = 0x10_0000_0000
SHARED_BASE = 0x4000_0000_0000  # generic windows of the other spaces
LOCAL_BASE = 0x5000_0000_0000
WINDOW = 0x1000_0000_0000
GUARD = 1 << 33  # unmapped space after each buffer: more than a wrapped 32-bit index reaches
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class PTXError(Exception):
    """Base class of the errors that stop a simulated kernel."""


class MemoryFault(PTXError):
    """An illegal memory access; its fields name the thread, the instruction and the address."""

    def __init__(
        self,
        message,
        *,
        kind="",
        space="",
        address=None,
        size=None,
        block=None,
        thread=None,
        instr=None,
        line=None,
        source=None,
    ):
        super().__init__(message)
        self.kind, self.space, self.address, self.size = kind, space, address, size
        self.block, self.thread = block, thread
        self.instr, self.line, self.source = instr, line, source


class RaceError(PTXError):
    pass


class _Bad(Exception):
    """A fault of one lane. The machine turns it into a MemoryFault that also names the thread and the source line."""

    def __init__(self, kind, space, where, address, size, detail=""):
        self.kind, self.space, self.where = kind, space, where
        self.address, self.size, self.detail = int(address), size, detail


# ------------------------------------------------------------------ buffers

_live = weakref.WeakValueDictionary()  # base address -> Buffer
_next = GLOBAL_BASE


def _allocate(nbytes):
    """Returns the address of a new buffer. An unused guard range follows each buffer, so that overruns are faults.

    Addresses of freed buffers are reused only when no new addresses are left.
    """
    global _next
    span = (nbytes + 255) // 256 * 256 + GUARD
    base = _next
    while True:
        if base + span > SHARED_BASE:
            base = GLOBAL_BASE
        hit = [b for b in _live.values() if b.base < base + span and base < b.base + b.nbytes + GUARD]
        if not hit:
            _next = base + span
            return base
        base = max((b.end + 255) // 256 * 256 + GUARD for b in hit)


class Buffer:
    """A buffer in device memory.

    ``Buffer(array)`` copies the array. ``Buffer(nbytes=n)`` is zeroed. ``Buffer(nbytes=n, init=None)`` is poisoned:
    its bytes are 0xFF and count as unwritten. With ``check_poison=True``, a launch raises a fault if it reads an
    unwritten byte. ``buffer + k`` is a device pointer to byte k.
    """

    def __init__(self, array=None, *, nbytes=None, init=0, name=None, readonly=False):
        if array is not None:
            src = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            nbytes = src.size
            self.dtype, self.shape = np.asarray(array).dtype, np.shape(array)
        else:
            self.dtype, self.shape = np.dtype(np.uint8), (nbytes,)
        self.nbytes = int(nbytes)
        self.name = name
        self.readonly = readonly
        self.base = _allocate(self.nbytes)
        self.raw = np.zeros((self.nbytes + 63) // 32 * 32, np.uint8)
        self.valid = None
        if array is not None:
            self.raw[: self.nbytes] = src
        elif init is None:
            self.raw[:] = POISON
            self.valid = np.zeros(self.raw.size, np.uint8)
        else:
            self.raw[:] = init
        self._views = {}
        _live[self.base] = self

    @property
    def address(self):
        return self.base

    @property
    def end(self):
        return self.base + self.nbytes

    def view(self, dtype):
        v = self._views.get(dtype)
        if v is None:
            v = self._views[dtype] = self.raw.view(dtype)
        return v

    def array(self, dtype=None, shape=None):
        """Returns the contents as a numpy array that shares the buffer's memory."""
        a = self.raw[: self.nbytes].view(dtype or self.dtype)
        if shape is not None:
            return a.reshape(shape)
        return a.reshape(self.shape) if dtype is None else a

    def __add__(self, offset):
        return Pointer(self, int(offset))

    def __repr__(self):
        return f"<Buffer {self.name or hex(self.base)} {self.nbytes} bytes>"


class Pointer:
    """A pointer to a byte of a Buffer, usable as a kernel argument."""

    def __init__(self, buffer, offset):
        self.buffer, self.offset = buffer, offset

    @property
    def address(self):
        return self.buffer.base + self.offset

    def __add__(self, offset):
        return Pointer(self.buffer, self.offset + int(offset))


def host_view(arg):
    """Returns a numpy view of an argument in host memory; None for other arguments.

    A numpy array is returned unchanged. A torch tensor gives a flat uint8 array. Raises ValueError if the tensor is
    not contiguous or not on the CPU.
    """
    if isinstance(arg, np.ndarray):
        return arg
    if hasattr(arg, "data_ptr") and hasattr(arg, "is_contiguous"):  # torch, without importing it
        if arg.device.type != "cpu" or not arg.is_contiguous():
            raise ValueError("tensor arguments must be contiguous and on the CPU")
        n = arg.numel() * arg.element_size()
        if n == 0:
            return np.zeros(0, np.uint8)
        return np.frombuffer((ctypes.c_uint8 * n).from_address(arg.data_ptr()), np.uint8)
    return None


# ------------------------------------------------------------------ counters


class BufferStats:
    """Memory traffic of one buffer during a launch."""

    def __init__(self, buf):
        self.buffer = buf
        self.bytes_read = self.bytes_written = self.atomics = 0
        self.sectors_read = self.sectors_written = 0
        n = buf.raw.size // 32
        self._rd, self._wr = np.zeros(n, bool), np.zeros(n, bool)

    @property
    def name(self):
        return self.buffer.name or hex(self.buffer.base)

    @property
    def nbytes(self):
        return self.buffer.nbytes

    @property
    def read_passes(self):
        """The number of times that each byte was read, on average."""
        return self.bytes_read / max(1, self.nbytes)

    @property
    def write_passes(self):
        return self.bytes_written / max(1, self.nbytes)

    @property
    def unique_bytes_read(self):
        """Bytes of all 32-byte sectors that were read. Each sector counts once, as with a perfect cache."""
        return min(int(self._rd.sum()) * 32, self.nbytes)

    @property
    def unique_bytes_written(self):
        return min(int(self._wr.sum()) * 32, self.nbytes)


class Access:
    """Counters of one memory instruction in one state space, during a launch."""

    def __init__(self, ins, space, kind):
        self.ins, self.space, self.kind = ins, space, kind
        self.requests = self.lanes = self.bytes = self.sectors = 0
        self.wavefronts = self.ideal_wavefronts = self.max_ways = 0

    @property
    def efficiency(self):
        """Requested bytes divided by the bytes of all touched 32-byte sectors. 1.0 is fully coalesced."""
        return self.bytes / (32 * self.sectors) if self.sectors else 1.0


def warps_in(s):
    """Returns the number of warps that have lanes in s, a slice or a sorted index array."""
    if isinstance(s, slice):
        return (s.stop - 1 >> 5) - (s.start >> 5) + 1
    w = s >> 5
    return 1 + int(np.count_nonzero(w[1:] != w[:-1])) if w.size else 0


def _unique_pairs(group, val, shift):
    key = (group << shift) | val
    d = key[1:] < key[:-1]
    if d.any():
        key = np.sort(key)
    keep = np.empty(key.size, bool)
    keep[0] = True
    np.not_equal(key[1:], key[:-1], out=keep[1:])
    return key, keep


# -------------------------------------------------------------- global space


class GlobalMemory:
    """The global memory of a launch. All live buffers are in one 64-bit address space."""

    def __init__(self, check_poison=False, traffic=True):
        self.bufs = sorted(_live.values(), key=lambda b: b.base)
        self.bases = [b.base for b in self.bufs]
        self.bases_np = np.array(self.bases, np.int64)
        self.ends_np = np.array([b.end for b in self.bufs], np.int64)
        self.check_poison, self.traffic = check_poison, traffic
        self.stats = {}

    def locate(self, addr, size, write):
        """Finds the buffers of the addresses addr. Returns (buffer, positions, offsets) tuples.

        positions: indices into addr; None if all addresses are in this buffer.
        offsets: bytes from the start of the buffer.

        Raises a fault for misaligned addresses, addresses outside of buffers, and writes to read-only buffers.
        """
        if size > 1:
            low = addr & (size - 1)
            if low.any():
                k = int(np.flatnonzero(low)[0])
                raise _Bad("misaligned", "global", k, addr[k], size)
        lo, hi = int(addr.min()), int(addr.max())
        i = bisect.bisect_right(self.bases, lo) - 1
        if i >= 0 and hi + size <= self.bufs[i].end:
            b = self.bufs[i]
            if write and b.readonly:
                raise _Bad("write to read-only buffer", "global", 0, addr[0], size, self.near(addr[0]))
            return ((b, None, addr - b.base),)
        which = np.searchsorted(self.bases_np, addr, "right") - 1
        bad = which < 0
        if self.bufs:
            bad |= addr + size > self.ends_np[which]
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            a = int(addr[k])
            kind = "null pointer" if 0 <= a < 65536 else "out of bounds"
            raise _Bad(kind, "global", k, a, size, self.near(a))
        out = []
        for i in np.unique(which):
            b, at = self.bufs[i], np.flatnonzero(which == i)
            if write and b.readonly:
                raise _Bad("write to read-only buffer", "global", at[0], addr[at[0]], size, self.near(addr[at[0]]))
            out.append((b, at, addr[at] - b.base))
        return out

    def near(self, a):
        """Returns a text that locates an address, such as "4 bytes past the end of <Buffer x 64 bytes>"."""
        a = int(a)
        if not GLOBAL_BASE - GUARD < a < SHARED_BASE or not self.bufs:
            return ""
        i = bisect.bisect_right(self.bases, a) - 1
        if i >= 0 and a < self.bufs[i].end:
            return f"byte {a - self.bases[i]} of {self.bufs[i]!r}"
        options = []
        if i >= 0:
            options.append((a - self.bufs[i].end, f"past the end of {self.bufs[i]!r}"))
        if i + 1 < len(self.bufs):
            options.append((self.bases[i + 1] - a, f"before {self.bufs[i + 1]!r}"))
        d, text = min(options)
        return f"{d} bytes {text}"

    def count(self, access, pieces, lanes, size, kind):
        """Counts the traffic of one instruction.

        access: counters of the instruction.
        pieces: the accessed parts of buffers, from locate().
        lanes: numbers of the accessing lanes.
        size: bytes per lane.
        kind: "load", "store" or "atomic".
        """
        access.lanes += lanes.size
        access.bytes += lanes.size * size
        warp = lanes >> 5
        access.requests += 1 + int(np.count_nonzero(warp[1:] != warp[:-1]))
        for b, at, off in pieces:
            st = self.stats.get(b.base)
            if st is None:
                st = self.stats[b.base] = BufferStats(b)
            key, keep = _unique_pairs(warp if at is None else warp[at], off >> 5, 40)
            n = int(np.count_nonzero(keep))
            access.sectors += n
            touched = key[keep] & ((1 << 40) - 1)
            if kind != "store":
                st.bytes_read += off.size * size
                st.sectors_read += n
                st._rd[touched] = True
            if kind != "load":
                st.bytes_written += off.size * size
                st.sectors_written += n
                st._wr[touched] = True
            if kind == "atomic":
                st.atomics += off.size

    def load(self, addr, lanes, width, vec, access):
        """Loads ``vec`` elements of ``width`` bytes for each lane.

        Returns one array of unsigned integers per element, so ``vec`` arrays.
        """
        size = width * vec
        pieces = self.locate(addr, size, False)
        if self.traffic and access is not None:
            self.count(access, pieces, lanes, size, "load")
        sh = width.bit_length() - 1
        out = None
        for b, at, off in pieces:
            if self.check_poison and b.valid is not None:
                ok = b.valid.reshape(-1)[off[:, None] + np.arange(size)].all(1)
                if not ok.all():
                    k = int(np.flatnonzero(~ok)[0])
                    raise _Bad(
                        "read of uninitialised bytes",
                        "global",
                        k if at is None else at[k],
                        off[k] + b.base,
                        size,
                        self.near(off[k] + b.base),
                    )
            v = b.view(_UINT[width])
            ix = off >> sh
            got = [v[ix]] if vec == 1 else list(v.reshape(-1, vec)[ix >> (vec.bit_length() - 1)].T)
            if at is None:
                return got
            if out is None:
                out = [np.empty(addr.size, _UINT[width]) for _ in range(vec)]
            for o, g in zip(out, got):
                o[at] = g
        return out

    def store(self, addr, lanes, width, values, access):
        size = width * len(values)
        pieces = self.locate(addr, size, True)
        if self.traffic and access is not None:
            self.count(access, pieces, lanes, size, "store")
        sh = width.bit_length() - 1
        for b, at, off in pieces:
            v, ix = b.view(_UINT[width]), off >> sh
            for k, val in enumerate(values):
                v[ix + k if k else ix] = val if at is None else val[at]
            if b.valid is not None:
                b.valid[off[:, None] + np.arange(size)] = 1


# -------------------------------------------------------------- shared space


class SharedMemory:
    """The shared memory of all resident blocks. It is an array of bytes. Each block has an equal part."""

    def __init__(self, nslots, size, ranges, check_poison=False, check_races=False, banks=True):
        self.size = size
        self.stride = (size + 127) // 128 * 128 + 128
        self.raw = np.empty(nslots * self.stride, np.uint8)
        self.views = {w: self.raw.view(t) for w, t in _UINT.items()}
        self.ranges = sorted(ranges)  # (start, end, name) of each variable
        self.owner = np.zeros(self.stride, np.int16)  # 0: no variable there
        for i, (a, b, _) in enumerate(self.ranges):
            self.owner[a:b] = i + 1
        self.valid = np.zeros(self.raw.size, bool) if check_poison else None
        self.races = RaceDetector(nslots * self.stride) if check_races else None
        self.banks = banks

    def reset(self):
        self.raw[:] = POISON
        if self.valid is not None:
            self.valid[:] = False
        if self.races is not None:
            self.races.reset()

    def check(self, addr, size):
        if size > 1:
            low = addr & (size - 1)
            if low.any():
                k = int(np.flatnonzero(low)[0])
                raise _Bad("misaligned", "shared", k, addr[k], size)
        lo, hi = int(addr.min()), int(addr.max()) + size
        if len(self.ranges) == 1 and lo >= self.ranges[0][0] and hi <= self.ranges[0][1]:
            return
        bad = (addr < 0) | (addr + size > self.size)
        if not bad.any():
            first = self.owner[addr]
            bad = (first == 0) | (first != self.owner[addr + (size - 1)])
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            have = ", ".join(f"{n}: {a}..{b - 1}" for a, b, n in self.ranges) or "none declared"
            raise _Bad("out of bounds", "shared", k, addr[k], size, f"shared variables: {have}")

    def bytes_at(self, at, size):
        return self.raw[at[:, None] + np.arange(size)]

    def poison_check(self, at, addr, size):
        ok = self.valid[at[:, None] + np.arange(size)].all(1)
        if not ok.all():
            k = int(np.flatnonzero(~ok)[0])
            raise _Bad("read of uninitialised bytes", "shared", k, addr[k], size)

    def count(self, access, addr, lanes, size):
        """Counts the requests, bytes and bank conflicts of one instruction. A warp transfers 128 bytes at a time."""
        access.lanes += lanes.size
        access.bytes += lanes.size * size
        warp = lanes >> 5
        access.requests += 1 + int(np.count_nonzero(warp[1:] != warp[:-1]))
        if not self.banks:
            return
        unit = max(4, size)
        nb = 128 // unit  # lanes, and banks of that width, per phase
        sh = unit.bit_length() - 1
        phase = lanes // nb
        phase -= phase[0]
        key, keep = _unique_pairs(phase, addr >> sh, 32)
        key = key[keep]
        ways = np.bincount((key >> 32) * nb + (key & (nb - 1)), minlength=nb)
        ways = np.pad(ways, (0, -ways.size % nb)).reshape(-1, nb).max(1)
        access.wavefronts += int(ways.sum())
        access.ideal_wavefronts += int(np.count_nonzero(ways))
        access.max_ways = max(access.max_ways, int(ways.max()))

    def load(self, addr, base, lanes, width, vec, access):
        size = width * vec
        self.check(addr, size)
        if access is not None:
            self.count(access, addr, lanes, size)
        at = addr + base
        if self.valid is not None:
            self.poison_check(at, addr, size)
        sh = width.bit_length() - 1
        v, ix = self.views[width], at >> sh
        if vec == 1:
            return [v[ix]]
        return list(v.reshape(-1, vec)[ix >> (vec.bit_length() - 1)].T)

    def store(self, addr, base, lanes, width, values, access):
        size = width * len(values)
        self.check(addr, size)
        if access is not None:
            self.count(access, addr, lanes, size)
        at = addr + base
        sh = width.bit_length() - 1
        v, ix = self.views[width], at >> sh
        for k, val in enumerate(values):
            v[ix + k if k else ix] = val
        if self.valid is not None:
            self.valid[at[:, None] + np.arange(size)] = True


class RaceDetector:
    """Finds races in shared memory.

    In a race, two warps of a block access the same byte, and no barrier separates the accesses. At least one of them
    is a write. Atomics count as writes, but two atomics do not race. Two writes of the same value are not reported.
    """

    MANY = -2

    def __init__(self, nbytes):
        # epochs of the last plain read, plain write and atomic, and the warps that did them
        self.epoch = {k: np.empty(nbytes, np.int64) for k in "rwa"}
        self.warp = {k: np.empty(nbytes, np.int32) for k in "rwa"}
        self.reset()

    def reset(self):
        for k in "rwa":
            self.epoch[k][:] = -1
            self.warp[k][:] = -1

    def access(self, at, size, kind, epoch, warp, silent=None, lost=None):
        """Records an access. Returns None, or a race with an earlier access.

        A race is (lane position, other warp, kind of the other access). MANY stands for several other warps.

        at: byte positions of the lanes.
        kind: 'r' (read), 'w' (write) or 'a' (atomic).
        epoch: number of the barrier interval, per lane.
        silent: for writes, whether the memory already had the value, per lane and byte.
        lost: for writes, whether another lane's value replaced it, per lane and byte.
        """
        a = (at[:, None] + np.arange(size)).reshape(-1)
        epoch, warp = np.repeat(epoch, size), np.repeat(warp, size)
        hit = None
        for other in {"r": "wa", "w": "rwa", "a": "rw"}[kind]:
            clash = (self.epoch[other][a] == epoch) & (self.warp[other][a] != warp)
            if other == "w" and silent is not None:
                clash &= ~silent.reshape(-1)
            if hit is None and clash.any():
                k = int(np.flatnonzero(clash)[0])
                hit = (k // size, int(self.warp[other][a[k]]), other)
        ep, wp = self.epoch[kind], self.warp[kind]
        wp[a] = np.where((ep[a] == epoch) & (wp[a] != warp), self.MANY, warp)
        ep[a] = epoch
        # lanes of different warps in this same instruction
        mixed = (wp[a] != warp) & (wp[a] != self.MANY)
        if mixed.any():
            bad = mixed if lost is None else mixed & lost.reshape(-1)
            if kind == "w" and hit is None and bad.any():
                k = int(np.flatnonzero(bad)[0])
                hit = (k // size, int(wp[a[k]]), "w")
            wp[a[mixed]] = self.MANY
        return hit
