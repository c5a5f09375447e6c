"""Runs the CUDA backend without a GPU. The simulator ptxsim executes the compiled PTX of the kernels.

``SimulatedNative`` replaces ``mpo_ext._C``. As on a GPU, the real module chooses the grid, the block size and the
kernel arguments of each launch. Tests launch kernels directly, or through ``mpo_ext.ops``. In direct launches, it is
an error to read a byte that was never written.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ptxsim
import pytest
import torch

from mpo_ext.files import FileLock, atomic_write

ROOT = Path(__file__).parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MANGLED = {"float32": "f", "bfloat16": "13__nv_bfloat16", "float16": "6__half"}
#: Pairs of dtypes of logits and gradient, other than equal ones, for which there is a kernel.
NARROWED = [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")]
_FILES = {"token_logp": "token_logp", "forward": "token_logp", "pair_loss": "pair_loss", "logits_grad": "logits_grad",
          "exp_logits": "logits_grad"}  # fmt: skip
MULTIPROCESSORS = 2  # of the simulated GPU; a real GPU has about a hundred


@functools.cache
def ptx(file: str, arch: str = "sm_90", edit: tuple[str, str] | None = None) -> str:
    """Returns the compiled PTX of a kernel file.

    ``edit`` is (old text, new text): it puts a mistake into the source or a header. The old text must occur exactly
    once. With ``edit``, only the bfloat16 kernels are compiled.
    """
    source = ROOT / "csrc" / "mpo" / "cuda" / f"{file}.cu"
    if edit is None:
        return _compile(source.read_text(), arch)
    text = source.read_text()
    # The headers are copied into the source, so that they can be edited too.
    for header in ("pair_loss.cuh", "rows.cuh", "reduce.cuh", "formats.cuh"):
        body = (source.parent / header).read_text().replace("#pragma once", "")
        text = text.replace(f'#include "mpo/cuda/{header}"', body, 1)
        text = text.replace(f'#include "mpo/cuda/{header}"', "")
    assert text.count(edit[0]) == 1, f"the text to replace must occur once: {edit[0]!r}"
    # Compile bfloat16 only.
    text = re.sub(r"case (DType::kFloat(16|32)|types\(k(Float|Half), k\w+\)): status = launch.*", "", text)
    return _compile(text.replace(*edit), arch)


def _compile(text: str, arch: str) -> str:
    """Compiles CUDA source to PTX. ``build/ptx`` caches the PTX for all test processes and later runs."""
    nvcc = ptxsim.find_nvcc()
    headers = [path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.*h"))]
    compiler = (nvcc, os.stat(nvcc).st_mtime_ns) if nvcc else None
    key = hashlib.blake2b(repr((text, arch, headers, compiler)).encode(), digest_size=16).hexdigest()
    folder = ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.ptx"
    with FileLock(folder / f"{key}.lock", str(path), wait=True):
        if not path.exists():
            compiled = ptxsim.compile_cuda(text, arch=arch, include_dirs=[ROOT / "csrc"])
            with atomic_write(path) as file:
                file.write(compiled.encode())
    return path.read_text()


@functools.cache
def module(file: str, arch: str = "sm_90", edit: tuple[str, str] | None = None) -> Any:
    return ptxsim.Module(ptx(file, arch, edit))


def _mangled_pair(dtype: str, grad_dtype: str) -> str:
    """Returns the dtypes of logits and gradient as they are encoded in the mangled C++ name of a kernel."""
    # C++ abbreviates a class that occurs a second time.
    second = _MANGLED[grad_dtype] if dtype != grad_dtype else "f" if dtype == "float32" else "S"
    return _MANGLED[dtype] + second


class SimulatedNative:
    """Replaces ``mpo_ext._C`` and runs its functions with the suffix ``_cuda`` on ptxsim.

    ``options`` are passed to ``Kernel.launch``. ``reports`` collects (function, report of the launch).
    """

    def __init__(self, arch: str = "sm_90", edit: tuple[str, str] | None = None, **options: Any) -> None:
        from mpo_ext.ops.native import compiled

        self.real = compiled()
        self.arch = arch
        self.edit = edit
        self.options = options
        self.reports: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name in {f"{kernel}_cuda" for kernel in _FILES}:
            return functools.partial(self.launch_on_host_memory, name.removesuffix("_cuda"))
        return {"has_cuda": True}.get(name) or getattr(self.real, name)

    def launch(self, name: str, arguments: dict[str, Any]) -> Any:
        """Runs a kernel on ptxsim and returns its report. ``arguments`` has addresses of ptxsim buffers."""
        launch = getattr(self.real, f"describe_{name}_cuda")(**arguments)
        kernel = {
            "token_logp": lambda: f"I{_MANGLED[arguments['dtype']]}Lb{int(arguments['stats'] != 0)}ELb0E",
            "forward": lambda: f"I{_MANGLED[arguments['dtype']]}Lb{int(arguments['stats'] != 0)}ELb1E",
            "pair_loss": lambda: "",
            "logits_grad": lambda: f"I{_mangled_pair(arguments['dtype'], arguments['grad_dtype'])}",
            "exp_logits": lambda: f"I{_MANGLED[arguments['dtype']]}E",
        }[name]()
        edit = self.edit
        entry = module(_FILES[name], self.arch, edit).kernel(launch["kernel"] + kernel)
        options = {"check_races": "raise", "check_poison": True, **self.options}
        report = entry.launch(launch["grid"], launch["block"], [launch["args"]], **options)
        self.reports.append((name, report))
        return report

    def launch_on_host_memory(self, name: str, **arguments: Any) -> None:
        """Runs a kernel on buffers in host memory. Copies them to the simulator, and back after the run."""
        arguments.pop("stream")
        sizes = {key: size for key, size in _sizes(self.real, name, arguments).items() if arguments.get(key)}
        extents: dict[int, int] = {}  # the gradient may be the logits
        for key, size in sizes.items():
            extents[arguments[key]] = max(size, extents.get(arguments[key], 0))
        buffers = {}
        for address, size in extents.items():
            # At the same offset within a line as on the host, so that the alignment is the same.
            shift = address % 128
            buffer = ptxsim.Buffer(nbytes=size + shift)
            host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            buffer.raw[shift : shift + size] = host
            buffers[address] = (buffer, shift, host)
        moved = {
            key: buffers[value][0].address + buffers[value][1] if key in sizes else value
            for key, value in arguments.items()
        }
        self.launch(name, moved)
        for buffer, shift, host in buffers.values():
            host[:] = buffer.raw[shift : shift + len(host)]


def _sizes(native: Any, name: str, a: dict[str, Any]) -> dict[str, int]:
    """Maps each pointer argument of a launch to the size in bytes of its buffer."""
    rows = a["rows"]
    sizes = {"labels": 8 * rows, **dict.fromkeys(("logp", "row_max", "row_sum", "weight"), 4 * rows)}
    if name == "exp_logits":
        sizes |= {"reference": 4 * rows, "new_reference": 4 * rows, "sums": 4 * rows * a["hidden_size"]}
        sizes["exp_logits"] = rows * a["vocab"] * DTYPES[a["dtype"]].itemsize
    if "vocab" in a:
        width = 4 if name == "exp_logits" else DTYPES[a["dtype"]].itemsize

        def extent(inner: int, outer_stride: int, row_stride: int) -> int:
            return width * ((rows - 1) // inner * outer_stride + (min(rows, inner) - 1) * row_stride + a["vocab"])

        sizes["logits"] = extent(a["inner"], a["outer_stride"], a["row_stride"])
        sizes["row_state"] = 48 * rows
        sizes["row_stats"] = 4 * rows * a.get("stats", 0).bit_count()
        if "grad" in a:
            of_grad = extent(a["grad_inner"], a["grad_outer_stride"], a["grad_row_stride"])
            sizes["grad"] = of_grad // width * DTYPES[a["grad_dtype"]].itemsize
            sizes["scale"] = 4 if a["scale_is_float"] else 8
    if "pairs" in a:
        pairs = a["pairs"]
        sizes |= {"loss": 4, "terms": 12, "reward_shift": 4, "state": 16, "new_state": 16, "batch": 16}
        sizes |= {"sums": 8 * pairs, "reward": 8 * pairs, "tokens": 16 * pairs}
        sizes["ref_logp"] = 2 * pairs * (4 if a["ref_is_float"] else 8)
        sizes["offsets"] = (2 * pairs + 1) * (4 if a["offsets_are_int32"] else 8)
    if name == "pair_loss":
        sizes["scratch"] = native.cuda_pair_loss_shape(pairs=a["pairs"])["scratch_bytes"]
    elif name in ("token_logp", "forward"):
        shape = native.cuda_forward_shape(
            rows=rows,
            vocab=a["vocab"],
            dtype=a["dtype"],
            pairs=a.get("pairs", 0),
            multiprocessors=a["multiprocessors"],
        )
        sizes["scratch"], sizes["counters"] = shape["scratch_bytes"], 4 * shape["counters"]
    return sizes


class Rows:
    """Random logits in a buffer for a kernel. The kernel may read only the rows with a valid label.

    The simulator raises if the kernel reads another row, a gap between rows, or the bytes before the first row.
    """

    def __init__(self, dtype: str, labels: list[int], vocab: int, stride: int, offset: int = 0, seed: int = 0) -> None:
        self.dtype, self.vocab, self.stride, self.offset = dtype, vocab, stride, offset
        self.labels = np.array(labels, np.int64)
        self.rows = len(labels)
        self.width = DTYPES[dtype].itemsize
        generator = torch.Generator().manual_seed(seed)
        values = 3 * torch.randn(self.rows, vocab, generator=generator)
        for row, label in enumerate(labels):
            if row % 4 == 1 and 0 <= label < vocab:
                values[row, label] += 12  # a confident row, in which 1 - p cancels
        self.values = values.to(DTYPES[dtype])
        self.buffer = ptxsim.Buffer(nbytes=(offset + self.rows * stride) * self.width, init=None)
        self.write()

    @property
    def is_scored(self) -> np.ndarray:
        return (self.labels >= 0) & (self.labels < self.vocab)

    @property
    def exact(self) -> np.ndarray:
        return self.values.double().numpy()

    def place(self, row: int) -> slice:
        start = (self.offset + row * self.stride) * self.width
        return slice(start, start + self.vocab * self.width)

    def write(self) -> None:
        """Writes the rows with a valid label to the buffer, and marks them as readable."""
        for row in np.flatnonzero(self.is_scored):
            self.buffer.raw[self.place(row)] = self.values[row].view(torch.uint8).numpy()
            self.buffer.valid[self.place(row)] = 1

    def read(self, buffer: Any, row: int) -> np.ndarray:
        """Returns a row of another buffer with the same layout, as float64."""
        data = torch.from_numpy(buffer.raw[self.place(row)].copy()).view(DTYPES[self.dtype])
        return data.double().numpy()

    def arguments(self) -> dict[str, Any]:
        self.label_buffer = ptxsim.Buffer(self.labels)
        return {
            "logits": self.buffer.address + self.offset * self.width,
            "labels": self.label_buffer.address,
            "rows": self.rows,
            "vocab": self.vocab,
            "first": 0,
            "total": self.vocab,
            "inner": self.rows,
            "outer_stride": 0,
            "row_stride": self.stride,
            "ignore_index": -100,
            "dtype": self.dtype,
        }


def poisoned(nbytes: int) -> Any:
    """Returns a buffer of uninitialized memory, which kernels must not read before they write it."""
    return ptxsim.Buffer(nbytes=nbytes, init=None)


def run_token_logp(
    native: SimulatedNative, rows: Rows, stats: int = 0, multiprocessors: int = MULTIPROCESSORS
) -> dict[str, np.ndarray]:
    """Launches token_logp and returns its outputs. Fails if a part of an output was not written.

    ``stats`` is a bit mask: bit i requests ``mpo_ext.ops.checks.STATS[i]``.
    """
    shape = native.real.cuda_forward_shape(
        rows=rows.rows, vocab=rows.vocab, dtype=rows.dtype, pairs=0, multiprocessors=multiprocessors
    )
    counters = ptxsim.Buffer(np.zeros(shape["counters"], np.uint32))
    out = {name: poisoned(4 * rows.rows) for name in ("logp", "row_max", "row_sum")}
    out["row_stats"] = poisoned(4 * rows.rows * stats.bit_count())
    scratch = poisoned(shape["scratch_bytes"])
    native.launch(
        "token_logp",
        rows.arguments()
        | {name: buffer.address for name, buffer in out.items()}
        | {"stats": stats, "scratch": scratch.address, "counters": counters.address}
        | {"multiprocessors": multiprocessors, "row_state": 0},
    )
    assert not counters.array().any(), "a counter was not reset"
    return {name: written(buffer, np.float32) for name, buffer in out.items()}


PAIR_OUTPUTS = {  # bytes per pair, further bytes, and dtype
    "loss": (0, 4, np.float32),
    "terms": (0, 12, np.float32),
    "reward_shift": (0, 4, np.float32),
    "sums": (8, 0, np.float32),
    "reward": (8, 0, np.float32),
    "tokens": (16, 0, np.int64),
    "new_state": (0, 16, np.float64),
    "batch": (0, 16, np.float64),
}
CONFIG = {
    "beta": 0.1, "dpo_weight": 0.8, "bco_weight": 0.2, "ntp_weight": 1.0, "label_smoothing": 0.0,
    "average_sequences": False, "rule": 1, "update_first": True, "decay": 0.99,
}  # fmt: skip


class Pairs:
    """Inputs of the kernel pair_loss, and uninitialized buffers for its outputs."""

    def __init__(
        self,
        rows: int,
        ref_logp: np.ndarray,
        offsets: np.ndarray | None = None,
        state: tuple[float, float] = (0.2, 3.0),
    ) -> None:
        self.pairs = len(ref_logp) // 2
        self.inputs = {"ref_logp": ptxsim.Buffer(ref_logp), "state": ptxsim.Buffer(np.array(state))}
        if offsets is not None:
            self.inputs["offsets"] = ptxsim.Buffer(offsets)
        self.out = {name: poisoned(each * self.pairs + once) for name, (each, once, _) in PAIR_OUTPUTS.items()}
        self.out["weight"] = poisoned(4 * rows)
        self.types = {
            "ref_is_float": ref_logp.dtype == np.float32,
            "offsets_are_int32": offsets is not None and offsets.dtype == np.int32,
        }

    def arguments(self, **config: Any) -> dict[str, Any]:
        buffers = {name: buffer.address for name, buffer in (self.inputs | self.out).items()}
        return {"offsets": 0, "pairs": self.pairs, **buffers, **self.types, **CONFIG, **config}

    def results(self) -> dict[str, np.ndarray]:
        found = {name: written(self.out[name], dtype) for name, (_, _, dtype) in PAIR_OUTPUTS.items()}
        return found | {"weight": written(self.out["weight"], np.float32)}


def run_forward(
    native: SimulatedNative, rows: Rows, pairs: Pairs, stats: int = 0, multiprocessors: int = MULTIPROCESSORS,
    **config: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Launches the fused forward kernel (log-probs and pair loss) and returns all its outputs.

    ``stats`` is a bit mask: bit i requests ``mpo_ext.ops.checks.STATS[i]``.
    """
    shape = native.real.cuda_forward_shape(
        rows=rows.rows, vocab=rows.vocab, dtype=rows.dtype, pairs=pairs.pairs, multiprocessors=multiprocessors
    )
    counters = ptxsim.Buffer(np.zeros(shape["counters"], np.uint32))
    out = {name: poisoned(4 * rows.rows) for name in ("logp", "row_max", "row_sum")}
    out["row_stats"] = poisoned(4 * rows.rows * stats.bit_count())
    scratch = poisoned(shape["scratch_bytes"])
    native.launch(
        "forward",
        rows.arguments()
        | pairs.arguments(**config)
        | {name: buffer.address for name, buffer in out.items()}
        | {"stats": stats, "scratch": scratch.address, "counters": counters.address}
        | {"multiprocessors": multiprocessors, "row_state": 0},
    )
    assert not counters.array().any(), "a counter was not reset"
    return {name: written(buffer, np.float32) for name, buffer in out.items()} | pairs.results()


def run_pair_loss(
    native: SimulatedNative, logp: np.ndarray, labels: np.ndarray, pairs: Pairs, **config: Any
) -> dict[str, np.ndarray]:
    """Launches the kernel pair_loss alone and returns its outputs."""
    scratch = poisoned(native.real.cuda_pair_loss_shape(pairs=pairs.pairs)["scratch_bytes"])
    inputs = ptxsim.Buffer(logp), ptxsim.Buffer(labels)
    native.launch(
        "pair_loss",
        pairs.arguments(**config)
        | {"logp": inputs[0].address, "labels": inputs[1].address, "rows": len(logp), "ignore_index": -100}
        | {"scratch": scratch.address},
    )
    return pairs.results()


def run_logits_grad(
    native: SimulatedNative,
    rows: Rows,
    row_max: np.ndarray,
    row_sum: np.ndarray,
    weight: np.ndarray,
    *,
    scale: np.ndarray | None = None,
    grad: Rows | None = None,
    is_in_place: bool = False,
    is_zeroed: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> Any:
    """Launches logits_grad and returns the buffer of the gradient.

    The gradient has the dtype and layout of ``grad``. None: the gradient has the dtype and layout of the logits. With
    ``is_zeroed``, the kernel does not write rows with an ignored label.
    """
    inputs = [ptxsim.Buffer(np.ascontiguousarray(rows_)) for rows_ in (row_max, row_sum, weight)]
    factor = None if scale is None else ptxsim.Buffer(scale)
    place = grad or rows
    out = rows.buffer if is_in_place else poisoned((place.offset + place.rows * place.stride) * place.width)
    native.launch(
        "logits_grad",
        rows.arguments()
        | {"row_max": inputs[0].address, "row_sum": inputs[1].address, "weight": inputs[2].address}
        | {"scale": 0 if factor is None else factor.address, "grad": out.address + place.offset * place.width}
        | {"scale_is_float": scale is not None and scale.dtype == np.float32, "is_zeroed": is_zeroed}
        | {"grad_dtype": place.dtype}
        | {"grad_inner": rows.rows, "grad_outer_stride": 0, "grad_row_stride": place.stride}
        | {"multiprocessors": multiprocessors},
    )
    return out


def written(buffer: Any, dtype: Any) -> np.ndarray:
    """Returns the contents of a buffer. Fails if a part of it was not written."""
    assert buffer.valid[: buffer.nbytes].all(), "part of an output was not written"
    return buffer.array(dtype).copy()


@contextlib.contextmanager
def simulated_backend(native: SimulatedNative) -> Iterator[SimulatedNative]:
    """Makes ``mpo_ext`` run its CUDA backend on the simulator, with tensors on the CPU."""
    from mpo_ext.ops import backends, cuda
    from mpo_ext.ops import native as native_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_module, "compiled", lambda: native)
        patch.setattr(cuda, "current_stream", lambda tensor: 0)
        patch.setattr(cuda, "multiprocessors", lambda device: MULTIPROCESSORS)
        patch.setattr(backends, "choose_backend", lambda backend, logits, name="logits": backend or "cuda")
        patch.setattr(cuda, "counters", lambda size, tensor: torch.zeros(size, dtype=torch.int32))
        yield native


def exact_rows(rows: Rows) -> dict[str, np.ndarray]:
    """Computes log-probs, probabilities and statistics of each row in float64, from their definitions.

    If the label of a row is ignored, all results of the row are 0. If the label is invalid, they are NaN.
    """
    n = rows.rows
    found = {name: np.zeros(n) for name in ("logp", "entropy", "mean_logit", "top1", "sum_p_squared")}
    found["p"] = np.zeros((n, rows.vocab))
    for row, label in enumerate(rows.labels):
        if label == -100:
            continue
        if not rows.is_scored[row]:
            for name in found:
                found[name][row] = math.nan
            continue
        z = rows.exact[row]
        with np.errstate(invalid="ignore"):
            shifted = z - z.max()
            logp = shifted - np.log(np.exp(shifted).sum())
            p = np.exp(logp)
            found["entropy"][row] = -np.where(p > 0, p * logp, np.where(np.isnan(p), p, 0)).sum()
        found["p"][row], found["logp"][row] = p, logp[label]
        found["mean_logit"][row], found["sum_p_squared"][row] = z.mean(), (p * p).sum()
        found["top1"][row] = float(z[label] == z.max())
    return found
