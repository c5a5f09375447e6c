"""Compiles CUDA C++ or Triton source to PTX, without a GPU."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .module import Module


class CompileError(Exception):
    pass


def find_nvcc():
    """Returns the path of nvcc, from PATH or the pip package nvidia-cuda-nvcc; None if neither has it."""
    if path := shutil.which("nvcc"):
        return path
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations or () if package else ()
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob("cu*/bin/nvcc"))), None)


def compile_cuda(
    source, arch="sm_90", include_dirs=(), defines=(), std="c++17", entry=None, flags=(), lineinfo=True, nvcc=None
):
    """Compiles CUDA source to PTX with `nvcc -ptx`. Returns the PTX.

    source: a path, or the source text.
    defines: names, "NAME=value" strings, or a dict.
    entry: name of a kernel that the PTX must have, or a part of the name.
    flags: more nvcc options.

    Raises CompileError if nvcc is missing or fails, or if the PTX lacks the kernel.
    """
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc is neither on PATH nor installed from the pip package nvidia-cuda-nvcc")
    items = [f"{k}={v}" for k, v in defines.items()] if isinstance(defines, dict) else list(defines)
    with tempfile.TemporaryDirectory() as tmp:
        text = str(source)
        if "\n" not in text and os.path.exists(text):
            path = text
        else:
            path = os.path.join(tmp, "kernel.cu")
            with open(path, "w") as f:
                f.write(text)
        out = os.path.join(tmp, "kernel.ptx")
        cmd = [nvcc, "-ptx", f"-arch={arch}", f"-std={std}", "-o", out, path]
        cmd += ["-lineinfo"] if lineinfo else []
        cmd += [f"-I{d}" for d in include_dirs] + [f"-D{d}" for d in items] + list(flags)
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise CompileError(r.stderr or r.stdout)
        with open(out) as f:
            ptx = f.read()
    if entry is not None and not any(entry in n for n in Module(ptx).entries):
        raise CompileError(f"no kernel {entry!r} in the PTX; it has {Module(ptx).entries}")
    return ptx


@dataclass
class CompiledTriton:
    """A Triton kernel compiled to PTX.

    Triton adds parameters for scratch memory after the kernel's own parameters. launch() fills them in.
    """

    ptx: str
    name: str
    shared_bytes: int
    num_warps: int
    arg_types: dict  # the run-time arguments, in order, and their Triton types
    metadata: object = None
    asm: dict = field(default_factory=dict, repr=False)
    _kernel: object = field(default=None, repr=False)

    @property
    def arg_names(self):
        return list(self.arg_types)

    @property
    def kernel(self):
        if self._kernel is None:
            self._kernel = Module(self.ptx).kernel(self.name)
        return self._kernel

    @property
    def hidden_params(self):
        """The number of parameters for scratch memory that Triton has appended."""
        return len(self.kernel.fn.params) - len(self.arg_names)

    def launch(self, grid, args, **options):
        """Runs the kernel in the simulator. Returns the report.

        args: a sequence in the order of the signature, or a dict by name.
        options: further arguments of Kernel.launch.
        """
        if isinstance(args, dict):
            args = [args[n] for n in self.arg_names]
        args = list(args)
        if len(args) != len(self.arg_names):
            raise TypeError(f"{self.name} takes {self.arg_names}, got {len(args)} arguments")
        args = [
            float(a) if t in ("fp16", "bf16", "fp32", "fp64") else a for a, t in zip(args, self.arg_types.values())
        ]
        scratch = getattr(self.metadata, "global_scratch_size", 0) or 0
        extra = [None] * self.hidden_params
        if scratch and extra:
            from .memory import Buffer

            g = (grid,) if isinstance(grid, int) else tuple(grid)
            n = 1
            for x in g:
                n *= x
            extra[0] = Buffer(nbytes=scratch * n, name="global_scratch")
        return self.kernel.launch(grid, 32 * self.num_warps, args + extra, dynamic_shared=self.shared_bytes, **options)


def compile_triton(jit_fn, signature, constexprs=None, arch=80, num_warps=4, num_stages=None, aligned=(), **options):
    """Compiles a @triton.jit function ahead of time. Returns a CompiledTriton.

    signature: Triton types by argument, such as {"x": "*bf16", "n": "i32"}. Arguments in constexprs may be left out.
    constexprs: values of the tl.constexpr arguments, by name.
    aligned: names of arguments that are multiples of 16. Triton can then vectorise. (Its JIT detects such arguments.)
    arch: 80, 90, 100 ... The simulator runs a kernel with tl.dot only for 80 (mma.sync).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = dict(constexprs or {})
    sig = {n: "constexpr" if n in constexprs else signature[n] for n in jit_fn.arg_names}
    attrs = {(jit_fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    opts = dict(options, num_warps=num_warps)
    if num_stages is not None:
        opts["num_stages"] = num_stages
    src = ASTSource(fn=jit_fn, signature=sig, constexprs=constexprs, attrs=attrs)
    c = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=opts)
    md = c.metadata
    types = {n: t for n, t in sig.items() if t != "constexpr"}
    return CompiledTriton(c.asm["ptx"], md.name, md.shared, md.num_warps, types, md, dict(c.asm))
