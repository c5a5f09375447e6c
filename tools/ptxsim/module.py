"""Loads PTX text into modules and kernels."""

import re
import struct

import numpy as np

from .memory import Buffer
from .ops import NotImplementedPTX, dtype_of
from .parser import Instr, Sym, parse, type_size


class Module:
    """A parsed PTX module with its module-level variables in memory."""

    def __init__(self, ptx):
        self.parsed = parse(ptx)
        self.symbols = {}
        todo = []
        for v in self.parsed.vars.values():
            if v.space in ("global", "const") and not v.extern:
                buf = Buffer(nbytes=v.nbytes, name=v.name)
                buf.dtype = np.dtype(dtype_of(v.type)[0])
                buf.shape = (v.nbytes // buf.dtype.itemsize,)
                self.symbols[v.name] = buf
                todo.append((v, buf))
        for v, buf in todo:
            if v.init is not None:
                self._initialise(v, buf)

    def _initialise(self, v, buf):
        size = type_size(v.type)
        data = bytearray()
        for item in re.findall(r"[^\s,{}][^,{}]*", v.init):
            item = item.strip()
            shift, mask = 0, None
            m = re.match(r"(0x[0-9A-Fa-f]+)\s*\((.*)\)$", item)
            if m:  # 0xFF00(symbol): some bytes of an address
                mask = int(m.group(1), 16)
                shift, item = (mask & -mask).bit_length() - 1, m.group(2)
            m = re.match(r"generic\s*\((.*)\)$", item)
            item = m.group(1) if m else item
            m = re.match(r"([A-Za-z_$%][\w$]*)\s*([+-]\s*\d+)?$", item)
            if m:
                if m.group(1) not in self.symbols:
                    raise NotImplementedPTX(f".{v.space} {v.name} = {item}", "address of a function or unknown symbol")
                val = self.symbols[m.group(1)].base + int((m.group(2) or "0").replace(" ", ""))
            elif item[:2] in ("0f", "0F", "0d", "0D"):
                val = int(item[2:], 16)
            elif re.fullmatch(r"-?\d+\.\d*([eE][+-]?\d+)?|-?\d+[eE][+-]?\d+", item):
                val = int.from_bytes(struct.pack("<f" if size == 4 else "<d", float(item)), "little")
            else:
                val = int(item.rstrip("U"), 0)
            if mask is not None:
                val = (val & mask) >> shift
            data += (val & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        buf.raw[: len(data)] = np.frombuffer(bytes(data), np.uint8)

    @property
    def entries(self):
        return [f.name for f in self.parsed.functions.values() if f.entry]

    def kernel(self, name=None):
        """Returns a kernel of the module.

        ``name`` is the kernel's name, or a part of this name that no other kernel's name has. With None, the module
        must have only one kernel.
        """
        names = self.entries
        hits = [n for n in names if name is None or n == name] or [n for n in names if name in n]
        if len(hits) != 1:
            raise KeyError(f"{len(hits)} entries match {name!r} among {names}")
        return Kernel(self, hits[0])


class Kernel:
    def __init__(self, module, name):
        self.module, self.name = module, name
        self.fn = module.parsed.functions[name]
        self.code, self.owner, self.start = [], [], {}
        order, stack = [], []

        def visit(fn):
            if fn.name in stack:
                raise NotImplementedPTX(f"call {fn.name}", "recursion")
            if fn in order:
                return
            stack.append(fn.name)
            for ins in fn.body:
                if ins.parts[0] == "call":
                    callee = self.callee(ins)
                    if callee is not None:
                        visit(callee)
            stack.pop()
            order.append(fn)

        visit(self.fn)
        # callees first, so that lanes inside a call run before lanes that wait for them
        for fn in order:
            self.start[fn.name] = len(self.code)
            for ins in fn.body:
                self.code.append(ins)
                self.owner.append(fn)
            end = fn.body[-1].line if fn.body else 0
            self.code.append(Instr("ret", ("ret",), (), None, end, "ret (end of function)"))
            self.owner.append(fn)
        # a call is followed by fetching its results: keep that as a second instruction
        code, owner, where = [], [], []
        for ins, fn in zip(self.code, self.owner):
            where.append(len(code))
            code.append(ins)
            owner.append(fn)
            if ins.parts[0] == "call" and self.callee(ins) is not None:
                code.append(Instr("call.end", ("call.end",), ins.args, ins.pred, ins.line, ins.text, ins.loc))
                owner.append(fn)
        self.code, self.owner = code, owner
        self.labels = {}
        for fn in order:
            for label, k in fn.labels.items():
                self.labels[fn.name, label] = where[self.start[fn.name] + k]
            self.start[fn.name] = where[self.start[fn.name]]
        self.functions = order

    def callee(self, ins):
        """Returns the function that a call instruction calls; None for external functions and indirect calls."""
        for a in ins.args:
            if isinstance(a, Sym):
                f = self.module.parsed.functions.get(a.name)
                return f if f is not None and f.defined else None
        return None

    def target(self, fn, arg):
        """Returns the pc of the label that the operand ``arg`` names. ``fn`` is the function with the operand."""
        _, name, scopes = arg
        for sc in reversed(scopes):
            if ":" + name in sc:
                return self.labels[fn.name, sc[":" + name]]
        return self.labels[fn.name, name]

    def unsupported(self):
        """Returns a text for each instruction that cannot be simulated. A launch works if it runs none of them."""
        from .machine import Machine

        args = [b"\0" * v.nbytes if v.dims else 0 for v in self.fn.params]
        block = dim3(self.fn.directives.get("reqntid", 32))
        m = Machine(self, (1, 1, 1), block, args, 1 << 16)
        return list(m.unsupported)

    def launch(
        self,
        grid,
        block,
        args,
        dynamic_shared=0,
        schedule="lockstep",
        seed=0,
        *,
        resident=None,
        check_poison=False,
        check_races=False,
        traffic=True,
        max_steps=50_000_000,
        stdout=None,
    ):
        """Runs the kernel and returns the report. Numpy arrays and torch tensors in ``args`` are updated in place.

        resident: number of blocks that run at once. Default: as many as fit into 8,192 lanes (65,536 for the schedule
            random) and 512 MiB, at least one.
        check_poison: raise a fault if a byte is read that was never written (init=None buffers, shared memory).
        check_races: record shared-memory races in report.races; 'raise' stops at the first.
        traffic: count sectors and bank conflicts. False is faster.
        stdout: file to which printf writes (default sys.stdout). The text is also in report.output.
        """
        from .machine import Machine

        m = Machine(
            self,
            dim3(grid),
            dim3(block),
            args,
            dynamic_shared,
            schedule,
            seed,
            resident,
            check_poison,
            check_races,
            traffic,
            max_steps,
            stdout,
        )
        return m.run()


def dim3(x):
    x = (x,) if isinstance(x, (int, np.integer)) else tuple(x)
    return tuple(int(v) for v in x) + (1,) * (3 - len(x))
