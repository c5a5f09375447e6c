"""Parses PTX text into a small syntax tree.

The tree has only the parts that execution needs: module variables, functions,
instructions, and the source location of each instruction (from ``.loc``). Debug
sections are skipped.
"""

import re
import struct
from dataclasses import dataclass, field


class PTXSyntaxError(Exception):
    pass


# ---------------------------------------------------------------- operands


@dataclass(frozen=True)
class Reg:
    name: str  # unique within its function
    neg: bool = False  # written as !%p


@dataclass(frozen=True)
class Special:
    name: str  # e.g. "%tid.x"


@dataclass(frozen=True)
class Imm:
    value: object  # int, or float for a decimal literal
    bits: int = 0  # 32 for 0f..., 64 for 0d..., 0 otherwise

    def as_int(self, nbits):
        """Returns the bits of the literal as an integer of nbits bits."""
        if isinstance(self.value, float):
            raw = struct.pack("<f" if nbits == 32 else "<d", self.value)
            return int.from_bytes(raw, "little")
        return self.value & ((1 << nbits) - 1)

    def as_float(self, nbits):
        if isinstance(self.value, float):
            return self.value
        if self.bits == 32:
            return struct.unpack("<f", struct.pack("<I", self.value))[0]
        if self.bits == 64:
            return struct.unpack("<d", struct.pack("<Q", self.value))[0]
        code = {32: ("<I", "<f"), 64: ("<Q", "<d"), 16: ("<H", "<e")}[nbits]
        return struct.unpack(code[1], struct.pack(code[0], self.value & ((1 << nbits) - 1)))[0]


@dataclass(frozen=True)
class Sym:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    base: object  # Reg, Sym or Imm
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Pair:  # d|p
    first: object
    second: object


@dataclass(frozen=True)
class Group:  # call argument list
    items: tuple


# --------------------------------------------------------------- containers


@dataclass
class Instr:
    op: str
    parts: tuple
    args: tuple
    pred: object  # Reg or None
    line: int  # line in the PTX text
    text: str
    loc: object = None  # (file number, line) of the source, if known

    def __str__(self):
        return self.text


@dataclass
class Var:
    name: str
    space: str  # global const shared local param reg
    type: str
    align: int
    dims: tuple  # () scalar, (None,) unsized array
    init: object = None
    extern: bool = False

    @property
    def nbytes(self):
        n = type_size(self.type)
        for d in self.dims:
            n *= d or 0
        return n


@dataclass
class Function:
    name: str
    entry: bool
    params: list
    rets: list
    body: list = field(default_factory=list)  # Instr
    labels: dict = field(default_factory=dict)  # label -> index into body
    regs: dict = field(default_factory=dict)  # register -> type
    vars: dict = field(default_factory=dict)  # local/shared/param variables
    tables: dict = field(default_factory=dict)  # .branchtargets
    directives: dict = field(default_factory=dict)
    defined: bool = False


@dataclass
class ParsedModule:
    version: str = ""
    target: str = ""
    files: dict = field(default_factory=dict)
    vars: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)


_SIZES = {
    "pred": 1,
    "f16x2": 4,
    "bf16x2": 4,
    "bf16": 2,
    "tf32": 4,
    "f32x2": 8,
    "u16x2": 4,
    "s16x2": 4,
    "b128": 16,
    "e4m3x2": 2,
    "e5m2x2": 2,
}


def type_size(t):
    if t in _SIZES:
        return _SIZES[t]
    m = re.fullmatch(r"[busf](\d+)", t)
    if not m:
        raise PTXSyntaxError(f"unknown type .{t}")
    return int(m.group(1)) // 8


# ------------------------------------------------------------------ scanner

_IDENT = r"[A-Za-z_$%][\w$]*"
_LABEL = re.compile(rf"({_IDENT})\s*:(?!:)")
_FUNCTION = re.compile(r"(?:\.(?:visible|extern|weak|common)\s+)*\.(entry|func)\b")
_LINE_DIRECTIVES = ("version", "target", "address_size", "file", "loc")
_NUMBER = re.compile(
    r"(?P<f>0[fF][0-9A-Fa-f]{8}(?![0-9A-Fa-f]))|(?P<d>0[dD][0-9A-Fa-f]{16})"
    r"|(?P<r>\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)"
    r"|(?P<h>0[xX][0-9A-Fa-f]+)U?|(?P<b>0[bB][01]+)U?|(?P<i>\d+)U?"
)


def _strip_comments(text):
    def blank(m):
        return m.group(0) if m.group(0)[0] == '"' else re.sub(r"[^\n]", " ", m.group(0))

    return re.sub(r'"(?:\\.|[^"\\])*"|/\*.*?\*/|//[^\n]*', blank, text, flags=re.S)


class _Parser:
    def __init__(self, text):
        self.text = _strip_comments(text)
        self.pos = 0
        self.mod = ParsedModule()
        self.loc = None
        self.inlined = {}  # place -> where it was inlined
        self._starts = [0] + [m.end() for m in re.finditer("\n", self.text)]

    # ---- helpers
    def line(self, pos=None):
        import bisect

        return bisect.bisect_right(self._starts, self.pos if pos is None else pos)

    def fail(self, msg, pos=None):
        raise PTXSyntaxError(f"PTX line {self.line(pos)}: {msg}")

    def skip(self):
        m = re.compile(r"\s*").match(self.text, self.pos)
        self.pos = m.end()

    def until(self, ch):
        """Returns the text before the next character ch that is not in a string, and moves past ch."""
        i, t = self.pos, self.text
        while i < len(t):
            if t[i] == '"':
                i = re.compile(r'"(?:\\.|[^"\\])*"').match(t, i).end()
                continue
            if t[i] == ch:
                out = t[self.pos : i]
                self.pos = i + 1
                return out
            i += 1
        self.fail(f"missing '{ch}'")

    def skip_block(self):
        """Moves past the '}' that matches the '{' at self.pos."""
        depth = 0
        for m in re.compile(r'"(?:\\.|[^"\\])*"|[{}]').finditer(self.text, self.pos):
            if m.group() == "{":
                depth += 1
            elif m.group() == "}":
                depth -= 1
                if depth == 0:
                    self.pos = m.end()
                    return
        self.fail("unbalanced braces")

    def line_directive(self):
        end = self.text.find("\n", self.pos)
        end = len(self.text) if end < 0 else end
        words = self.text[self.pos : end].split()
        self.pos = end
        if words[0] == ".version":
            self.mod.version = words[1]
        elif words[0] == ".target":
            self.mod.target = words[1].rstrip(",")
        elif words[0] == ".file":
            m = re.match(r'(\d+)\s+"([^"]*)"', " ".join(words[1:]))
            if m:
                self.mod.files[int(m.group(1))] = m.group(2)
        elif words[0] == ".loc":
            # inlined code: follow the call sites outwards to the user's line
            here = tuple(int(w.rstrip(",")) for w in words[1:4])
            m = re.search(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)", " ".join(words))
            if m:
                self.inlined[here] = tuple(int(x) for x in m.groups())
            else:
                self.inlined.pop(here, None)
            for _ in range(50):
                if here not in self.inlined:
                    break
                here = self.inlined[here]
            self.loc = here[:2]

    # ---- module level
    def module(self):
        while True:
            self.skip()
            if self.pos >= len(self.text):
                break
            m = re.compile(r"\.(\w+)").match(self.text, self.pos)
            if not m:
                self.fail("expected a directive, got " + repr(self.text[self.pos : self.pos + 30]))
            word = m.group(1)
            if word in _LINE_DIRECTIVES:
                self.line_directive()
            elif word == "section":
                self.pos = self.text.index("{", self.pos)
                self.skip_block()
            elif word in ("pragma", "alias"):
                self.until(";")
            else:
                head = _FUNCTION.match(self.text, self.pos)
                if head:
                    self.function(head)
                else:
                    for v in self.variables(self.until(";")):
                        old = self.mod.vars.get(v.name)
                        if old is None or old.extern:
                            self.mod.vars[v.name] = v
        return self.mod

    def variables(self, decl):
        """Parses a variable declaration such as `.global .align 4 .b8 name[4] = {..}`, without the ';'."""
        line = self.line()
        init = None
        m = re.match(r"[^={]*=(.*)", decl, re.S)
        if m:
            init, decl = m.group(1).strip(), decl[: decl.index("=")]
        decl = re.sub(r"\.attribute\s*\([^)]*\)", " ", decl)
        space = typ = None
        align, vec, extern = None, 1, False
        rest = decl.strip()
        while rest.startswith("."):
            m = re.match(r"\.(\w+)\s*", rest)
            w, rest = m.group(1), rest[m.end() :]
            if w == "extern":
                extern = True
            elif w in ("global", "const", "shared", "local", "param", "reg"):
                if not (space == "param" and w != "param"):
                    space = w
            elif w == "align":
                m = re.match(r"(\d+)\s*", rest)
                align, rest = int(m.group(1)), rest[m.end() :]
            elif w in ("v2", "v4", "v8"):
                vec = int(w[1:])
            elif w in ("visible", "weak", "common", "ptr", "managed"):
                pass
            else:
                type_size(w)
                typ = w
        if space is None or typ is None:
            raise PTXSyntaxError(f"PTX line {line}: cannot parse declaration {decl.strip()!r}")
        out = []
        for item in rest.split(","):
            m = re.fullmatch(rf"\s*({_IDENT})\s*(<\d+>)?((?:\[\s*\w*\s*\])*)\s*", item)
            if not m:
                raise PTXSyntaxError(f"PTX line {line}: cannot parse declaration {decl.strip()!r}")
            dims = tuple(int(d, 0) if d.strip() else None for d in re.findall(r"\[\s*(\w*)\s*\]", m.group(3)))
            if vec > 1:
                dims += (vec,)
            size = align or type_size(typ) * vec
            if m.group(2):
                for k in range(int(m.group(2)[1:-1])):
                    out.append(Var(f"{m.group(1)}{k}", space, typ, size, dims))
            else:
                out.append(Var(m.group(1), space, typ, size, dims, init, extern))
        return out

    def param_list(self):
        self.skip()
        if self.pos >= len(self.text) or self.text[self.pos] != "(":
            return None
        self.pos += 1
        inner = self.until(")")
        out = []
        for item in inner.split(","):
            if item.strip():
                # ".param .u64 .ptr .global .align 1 name": the .ptr part describes the pointee
                item = re.sub(r"\.ptr\b(\s*\.(global|shared|const|local|param))?(\s*\.align\s+\d+)?", "", item)
                out += self.variables(item)
        return out

    def function(self, head):
        self.pos = head.end()
        kind = head.group(1)
        rets = (self.param_list() or []) if kind == "func" else []
        self.skip()
        m = re.compile(_IDENT).match(self.text, self.pos)
        if not m:
            self.fail("expected a function name")
        name = m.group()
        self.pos = m.end()
        params = self.param_list() or []
        fn = Function(name, kind == "entry", params, rets)
        # performance directives
        while True:
            self.skip()
            if self.text[self.pos] in "{;":
                break
            m = re.compile(r"\.(\w+)([^.{;]*)").match(self.text, self.pos)
            if not m:
                self.fail("unexpected text after function header")
            if m.group(1) in ("pragma",):
                self.until(";")
                continue
            fn.directives[m.group(1)] = [int(x, 0) for x in re.findall(r"\b\d\w*\b", m.group(2))]
            self.pos = m.end()
        if self.text[self.pos] == ";":
            self.pos += 1
            if name not in self.mod.functions:
                self.mod.functions[name] = fn
            return
        self.body(fn)
        fn.defined = True
        self.mod.functions[name] = fn

    # ---- function bodies
    def body(self, fn):
        self.pos += 1
        self.loc = None
        self.inlined.clear()
        base = {v.name: v.name for v in fn.params + fn.rets}
        for v in fn.params + fn.rets:
            if v.space == "reg":
                fn.regs[v.name] = v.type
            else:
                fn.vars[v.name] = v
        scopes = [base]
        pending = []  # label of the next statement
        while True:
            self.skip()
            c = self.text[self.pos]
            if c == "{":
                scopes.append({})
                self.pos += 1
                continue
            if c == "}":
                self.pos += 1
                scopes.pop()
                if not scopes:
                    return
                continue
            if c == ";":
                self.pos += 1
                continue
            if c == ".":
                word = re.compile(r"\.(\w+)").match(self.text, self.pos).group(1)
                if word in _LINE_DIRECTIVES:
                    self.line_directive()
                elif word == "section":
                    self.pos = self.text.index("{", self.pos)
                    self.skip_block()
                elif word == "branchtargets":
                    words = self.until(";").split(None, 1)[1]
                    fn.tables[pending[-1]] = [w.strip() for w in words.split(",")]
                elif word in ("pragma", "callprototype", "calltargets"):
                    self.until(";")
                else:
                    for v in self.variables(self.until(";")):
                        unique = v.name
                        n = 0
                        while unique in fn.regs or unique in fn.vars:
                            n += 1
                            unique = f"{v.name}#{n}"
                        scopes[-1][v.name] = unique
                        if v.space == "reg":
                            fn.regs[unique] = v.type
                        else:
                            v.name = unique
                            fn.vars[unique] = v
                continue
            m = _LABEL.match(self.text, self.pos)
            if m:
                # labels may repeat in sibling scopes; the innermost is visible
                name, n = m.group(1), 0
                while name in fn.labels:
                    n += 1
                    name = f"{m.group(1)}#{n}"
                fn.labels[name] = len(fn.body)
                scopes[-1][":" + m.group(1)] = name
                pending = [m.group(1)]
                self.pos = m.end()
                continue
            start = self.pos
            stmt = self.until(";")
            self.instruction(fn, " ".join(stmt.split()), start, scopes)

    def instruction(self, fn, text, start, scopes):
        line = self.line(start)
        m = re.match(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z_]\w*(?:(?:\.|::)\w+)*)\s*(.*)$", text, re.S)
        if not m:
            self.fail(f"cannot parse instruction {text!r}", start)
        pred = None
        if m.group(2):
            pred = Reg(self.lookup(m.group(2), scopes), bool(m.group(1)))
        op = m.group(3)
        args = _Operands(m.group(4), lambda n: self.lookup(n, scopes), fn).parse(line)
        if op.split(".")[0] in ("bra", "brx"):
            args = tuple(("label", a.name, tuple(scopes)) if isinstance(a, Sym) else a for a in args)
        fn.body.append(Instr(op, tuple(op.split(".")), args, pred, line, text, self.loc))

    @staticmethod
    def lookup(name, scopes):
        for s in reversed(scopes):
            if name in s:
                return s[name]
        return name


class _Operands:
    """A recursive-descent parser of an instruction's operands."""

    def __init__(self, text, lookup, fn):
        self.t, self.i, self.lookup, self.fn = text, 0, lookup, fn

    def parse(self, line):
        out = []
        try:
            while self.peek():
                out.append(self.operand())
                if self.peek() == ",":
                    self.i += 1
                elif self.peek():
                    raise ValueError
        except (ValueError, IndexError):
            raise PTXSyntaxError(f"PTX line {line}: cannot parse operands {self.t!r}") from None
        return tuple(out)

    def peek(self):
        while self.i < len(self.t) and self.t[self.i].isspace():
            self.i += 1
        return self.t[self.i] if self.i < len(self.t) else ""

    def expect(self, c):
        if self.peek() != c:
            raise ValueError
        self.i += 1

    def seq(self, close):
        items = []
        while self.peek() != close:
            items.append(self.operand())
            if self.peek() == ",":
                self.i += 1
        self.i += 1
        return tuple(items)

    def operand(self):
        c = self.peek()
        if c == "[":
            self.i += 1
            a = self.atom()
            if self.peek() == ",":  # tensor coordinates etc.
                self.i += 1
                rest = (self.operand(),)
                while self.peek() == ",":
                    self.i += 1
                    rest += (self.operand(),)
                self.expect("]")
                return Mem(Group((a, *rest)))
            self.expect("]")
            if isinstance(a, Sym):
                return Mem(Sym(a.name), a.offset)
            if isinstance(a, tuple):
                return Mem(a[0], a[1])
            return Mem(a)
        if c == "{":
            self.i += 1
            return Vec(self.seq("}"))
        if c == "(":
            self.i += 1
            return Group(self.seq(")"))
        if c == "!":
            self.i += 1
            r = self.atom()
            return Reg(r.name, True)
        a = self.atom()
        if isinstance(a, tuple):
            raise ValueError
        if self.peek() == "|":
            self.i += 1
            return Pair(a, self.atom())
        return a

    def atom(self):
        """Parses a register, symbol or number, such as "%r1", "name" or "3", plus constants, as in "name+8"."""
        a = self.primary()
        off = 0
        while self.peek() in ("+", "-") and self.peek():
            sign = 1 if self.t[self.i] == "+" else -1
            self.i += 1
            b = self.primary()
            if not isinstance(b, Imm):
                raise ValueError
            off += sign * b.value
        if off == 0:
            return a
        if isinstance(a, Sym):
            return Sym(a.name, a.offset + off)
        if isinstance(a, Imm):
            return Imm(a.value + off)
        return (a, off)

    def primary(self):
        c = self.peek()
        if c == "-":
            self.i += 1
            v = self.primary()
            if not isinstance(v, Imm):
                raise ValueError
            return Imm(-v.as_float(v.bits) if v.bits else -v.value)
        if c == "~":
            self.i += 1
            return Imm(~self.primary().value)
        m = _NUMBER.match(self.t, self.i)
        if m:
            self.i = m.end()
            k, s = m.lastgroup, m.group(m.lastgroup)
            if k == "f":
                return Imm(int(s[2:], 16), 32)
            if k == "d":
                return Imm(int(s[2:], 16), 64)
            if k == "r":
                return Imm(float(s))
            if k == "i" and len(s) > 1 and s[0] == "0":
                return Imm(int(s, 8))
            return Imm(int(s, 0))
        m = re.compile(r"[A-Za-z_$%][\w$]*(?:\.[xyzw])?").match(self.t, self.i)
        if not m:
            raise ValueError
        self.i = m.end()
        name = m.group()
        if name == "WARP_SZ":
            return Imm(32)
        unique = self.lookup(name)
        if unique in self.fn.regs:
            return Reg(unique)
        if name[0] == "%":
            return Special(name)
        return Sym(unique)


def parse(text):
    """Parses PTX text. Returns a ParsedModule."""
    return _Parser(text).module()
