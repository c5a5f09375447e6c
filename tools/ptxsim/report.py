"""The report of a launch: counts, traffic, races, printf output."""

from collections import Counter, namedtuple

Race = namedtuple("Race", "message line instr")


def source_of(files, ins):
    if ins.loc is None or ins.loc[1] == 0:
        return None
    return files.get(ins.loc[0], "?"), ins.loc[1]


class Report:
    def __init__(self, machine):
        self._m = machine
        self.kernel = machine.k.name
        self.grid, self.block = machine.grid, machine.block
        self.barriers = 0  # block-wide barriers completed, summed over blocks
        self.races = []
        self.notes = Counter()
        self.output = ""
        self.opcodes = {}  # opcode -> warp instructions issued
        self.opcodes_thread = {}  # opcode -> thread instructions
        self.accesses = []
        self.buffers = []
        self.seconds = 0.0

    def add_race(self, message, ins):
        self.races.append(Race(message, ins.line, ins.text))

    def note(self, where, what, n):
        self.notes[what, where] += n

    def finish(self, seconds):
        m = self._m
        self.seconds = seconds
        warps, lanes = Counter(), Counter()
        w = t = 0
        for pc, ins in enumerate(m.k.code):
            w += m.exec_warps[pc]
            t += m.exec_lanes[pc]
            if ins.op != "call.end" and w:
                warps[ins.op] += w
                lanes[ins.op] += t
        self.opcodes = dict(warps.most_common())
        self.opcodes_thread = dict(lanes.most_common())
        self.accesses = [a for a in m.accesses if a.requests]
        stats = m.mem.stats
        order = {b.base: i for i, b in enumerate(m.arg_buffers)}
        self.buffers = sorted(stats.values(), key=lambda s: order.get(s.buffer.base, 1 << 30))
        self._files = m.k.module.parsed.files
        m.accesses = []
        self._m = None

    def source_of(self, ins):
        """Returns (file, line) of the source code of an instruction, or None."""
        return source_of(self._files, ins)

    def _sum(self, space, kinds, field):
        return sum(getattr(a, field) for a in self.accesses if a.space == space and a.kind in kinds)

    @property
    def instructions(self):
        """The number of issued instructions. An instruction of a warp counts once, not once per thread."""
        return sum(self.opcodes.values())

    @property
    def global_bytes_loaded(self):
        return self._sum("global", ("load",), "bytes")

    @property
    def global_bytes_stored(self):
        return self._sum("global", ("store",), "bytes")

    @property
    def global_load_sectors(self):
        return self._sum("global", ("load",), "sectors")

    @property
    def global_store_sectors(self):
        return self._sum("global", ("store",), "sectors")

    @property
    def global_atomics(self):
        """The number of `atom` and `red` operations on global memory, summed over the threads that execute them."""
        return self._sum("global", ("atomic",), "lanes")

    @property
    def shared_atomics(self):
        return self._sum("shared", ("atomic",), "lanes")

    @property
    def shared_bytes_loaded(self):
        return self._sum("shared", ("load",), "bytes")

    @property
    def shared_bytes_stored(self):
        return self._sum("shared", ("store",), "bytes")

    @property
    def bank_conflicts(self):
        """The number of extra shared-memory wavefronts that bank conflicts cause."""
        return sum(a.wavefronts - a.ideal_wavefronts for a in self.accesses if a.space == "shared")

    @property
    def max_bank_ways(self):
        return max([a.max_ways for a in self.accesses if a.space == "shared"], default=0)

    def buffer(self, name):
        """Returns the BufferStats of a buffer. name: a Buffer, or its name, such as 'arg0' for the first argument."""
        for b in self.buffers:
            if b.name == name or b.buffer is name:
                return b
        raise KeyError(name)

    def summary(self, accesses=False):
        """Returns a text with tables of the counts. With accesses=True, it has a line for each memory instruction."""
        g = f"{self.kernel[:60]}  grid {self.grid} block {self.block}  ({self.seconds:.2f} s simulated)"
        out = [
            g,
            f"  warp instructions {self.instructions}, barriers {self.barriers}, "
            f"global atomics {self.global_atomics}, shared atomics {self.shared_atomics}",
            f"  {'global':8}{'bytes':>14}{'sectors':>12}{'sector bytes':>14}{'efficiency':>12}",
        ]
        for what, kind in (("loads", "load"), ("stores", "store"), ("atomics", "atomic")):
            b, s = self._sum("global", (kind,), "bytes"), self._sum("global", (kind,), "sectors")
            out.append(f"  {what:8}{b:>14}{s:>12}{32 * s:>14}{b / (32 * s) if s else 1:>12.2f}")
        out.append(
            f"  shared: {self.shared_bytes_loaded} bytes loaded, {self.shared_bytes_stored} stored, "
            f"{self.bank_conflicts} extra wavefronts (worst {self.max_bank_ways}-way)"
        )
        out.append(f"  {'buffer':20}{'size':>12}{'read':>14}{'passes':>8}{'written':>14}{'passes':>8}")
        for b in self.buffers:
            out.append(
                f"  {b.name[:20]:20}{b.nbytes:>12}{b.bytes_read:>14}{b.read_passes:>8.2f}"
                f"{b.bytes_written:>14}{b.write_passes:>8.2f}"
            )
        if accesses:
            out.append(f"  {'line':>6} {'requests':>10}{'bytes':>12}{'sectors':>10}{'eff':>6}{'ways':>6}  instruction")
            for a in self.accesses:
                eff = f"{a.efficiency:.2f}" if a.space == "global" else "-"
                src = self.source_of(a.ins)
                out.append(
                    f"  {a.ins.line:>6} {a.requests:>10}{a.bytes:>12}{a.sectors:>10}{eff:>6}"
                    f"{a.max_ways or '-':>6}  {a.ins.text[:70]}" + (f"  [{src[1]}]" if src else "")
                )
        for (what, where), n in self.notes.items():
            out.append(f"  note: {what} ({n} times); {where}")
        for r in self.races:
            out.append("  " + r.message)
        return "\n".join(out)
