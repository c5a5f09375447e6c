"""Tests the compiled Triton kernels: results of their PTX in a simulator, and properties of the code."""

from __future__ import annotations

import gc
import importlib
import os
import re
import tempfile
from typing import Any

import check_sass
import numpy as np
import pytest
import simulator
import torch
import triton
from oracle import Case, assert_output_as_accurate, lay_out, make_case
from ptxsim import find_nvcc
from ptxsim.testing import need_nvcc
from simulated import FILES, signature, simulation
from tiles import (
    GPU_TILES,
    UNSEEN_BAD_LABELS,
    check_exp_logits,
    check_gpu_tiles,
    check_tiles,
    check_unseen_bad_label,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpo_ext import MPOConfig, RewardShift, mpo_loss
from mpo_ext.ops import backends
from mpo_ext.ops import logits as ops

CASES = int(os.environ.get("MPO_AGREE_CASES", "12"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: So that four programs of 128 threads run on a multiprocessor, each with 8 KiB of loads in flight.
MAX_REGISTERS = 128
WIDE_KERNELS = ("token_logp_chunk_kernel", "logits_grad_kernel", "exp_logits_kernel")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@pytest.fixture(autouse=True)
def _on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the operators accept CPU tensors for the backend "triton", because the simulator replaces the GPU."""
    monkeypatch.setattr(backends, "triton_problem", lambda device: None)


def loss_and_grad(case: Case, layout: str = "contiguous", delta: float = 0.0, **options: Any) -> tuple[Any, Tensor]:
    logits = lay_out(case.logits, layout).requires_grad_()
    output = mpo_loss(
        logits,
        case.labels,
        case.ref_logp,
        config=MPOConfig(**case.options),
        reward_shift=delta,
        cu_seqlens=case.cu_seqlens,
        shift=case.shift,
        **{"backend": "triton", **options},
    )
    (gradient,) = torch.autograd.grad(output.loss, logits)
    return output._replace(loss=output.loss.detach()), gradient


def check(case: Case, layout: str = "contiguous", **options: Any) -> tuple[Any, Tensor]:
    output, gradient = loss_and_grad(case, layout, **options)
    assert_output_as_accurate(output, gradient, case.exact(0.0), case.eager(0.0), stats=options.get("stats", ()))
    return output, gradient


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("vocab", [1, 2, 7, 1003, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_ptx_matches_the_definition(dtype: torch.dtype, vocab: int, arch: int) -> None:
    with simulation(arch):
        check(make_case(dtype, vocab, pairs=1, length=4))


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_ptx_takes_any_stride_and_alignment(dtype: torch.dtype, layout: str) -> None:
    with simulation():
        check(make_case(dtype, 1003, pairs=1, length=3), layout, stats=("entropy", "mean_logit", "top1"))


def test_simulated_ptx_takes_packed_sequences_and_any_share_of_labelled_rows() -> None:
    with simulation():
        check(make_case(torch.bfloat16, 259, packed=True))
        check(make_case(torch.bfloat16, 259, labelled=0.0))
        check(make_case(torch.bfloat16, 259, labelled=1.0))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "edges"), [(203, (64, 65, 128)), (9001, (5000,))], ids=["narrow", "many chunks"])
def test_simulated_ptx_scores_tiles_of_a_vocabulary(dtype: torch.dtype, vocab: int, edges: tuple, arch: int) -> None:
    with simulation(arch):
        check_tiles("triton", dtype, vocab, edges)


@pytest.mark.parametrize("vocab", [13, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponentials_are_those_of_float64(dtype: torch.dtype, vocab: int) -> None:
    with simulation():
        check_exp_logits("triton", dtype, vocab)


@pytest.mark.parametrize("options", GPU_TILES[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_of_a_gpu_give_the_loss_and_gradients_of_float64(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulation():
        check_gpu_tiles("triton", dtype, monkeypatch, **options)


@pytest.mark.parametrize("name", UNSEEN_BAD_LABELS)
def test_a_bad_label_makes_the_loss_nan_even_if_no_term_contains_it(name: str) -> None:
    with simulation():
        check_unseen_bad_label(name, "triton")


def test_schedules_leave_the_bits_as_they_are() -> None:
    case = make_case(torch.bfloat16, 5003, pairs=1, length=3)
    for options in ({}, {"reuse_logits": True}):
        with simulation():
            expected = loss_and_grad(case, **options)
        for seed in range(5):
            with simulation(schedule="random", seed=seed):
                output, gradient = loss_and_grad(case, **options)
            assert torch.equal(output.loss, expected[0].loss)
            assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("vocab", [4096, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_labelled_logit_is_read_once_and_written_once(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.full((6, vocab), torch.nan, dtype=dtype)
    labels = torch.full((6,), -100)
    labels[[1, 4, 5]] = torch.randint(vocab, (3,))
    logits[labels != -100] = torch.randn(3, vocab).to(dtype)
    labelled_bytes = 3 * vocab * dtype.itemsize
    with simulation() as reports:
        _, row_max, row_sum, _ = ops.token_logp(logits, labels, -100, 15, "triton")
        read = sum(_bytes_read(reports[name], "logits_ptr") for name in FILES["token_logp"])
        assert labelled_bytes <= read <= 1.01 * labelled_bytes
        grad = ops.logits_grad(logits, labels, row_max, row_sum, torch.ones(6), None, -100, "triton")
        report = reports["logits_grad_kernel"]
        # All 128 threads of a block read the logit of a row's label.
        assert labelled_bytes <= _bytes_read(report, "logits_ptr") <= 1.01 * labelled_bytes + 3 * 512
        assert _stats(report, "grad_ptr").bytes_written == 6 * vocab * dtype.itemsize
    assert torch.isfinite(grad).all()


def test_cuda_triton_and_cpu_kernels_agree_on_random_cases() -> None:
    """Checks random cases with all three kinds of kernels. Compares CUDA and Triton with the CPU kernels."""
    random = np.random.default_rng(0)
    for _ in range(CASES):
        dtype = DTYPES[random.integers(3)]
        vocab = int(random.integers(1, 300))
        pairs, packed = int(random.integers(1, 3)), bool(random.integers(2))
        seed = int(random.integers(1000))
        case = make_case(dtype, vocab, pairs=pairs, length=4, packed=packed, seed=seed)
        results = {}
        with simulation():
            results["triton"] = check(case)
        if find_nvcc():
            with simulator.simulated_backend(simulator.SimulatedNative()):
                results["cuda"] = check(case, backend="cuda")
        results["cpu"] = check(case, backend="cpu")
        cpu, cpu_gradient = results.pop("cpu")
        ulp = torch.finfo(dtype).eps * cpu_gradient.abs().max().item()
        for output, gradient in results.values():
            torch.testing.assert_close(output.loss, cpu.loss, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(output.chosen_reward, cpu.chosen_reward, rtol=2e-6, atol=2e-6)
            assert (gradient.double() - cpu_gradient.double()).abs().max() <= max(ulp, 1e-6)
        gc.collect()  # each new buffer searches all living buffers, and reference cycles keep old buffers alive
    need_nvcc()


def _stats(report: tuple[Any, dict], argument: str) -> Any:
    launched, buffers = report
    return next(stats for stats in launched.buffers if stats.buffer is buffers[argument])


def _bytes_read(report: tuple[Any, dict], argument: str) -> int:
    return _stats(report, argument).bytes_read


def _compile_all(target: GPUTarget, dtype: torch.dtype, vocab: int) -> dict[str, Any]:
    """Compiles every kernel for a target with the operators' launch options. Returns the kernels by name."""
    compiled = {}

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self.launch

        def launch(self, *args: Any, num_warps: int, **constexprs: Any) -> None:
            values = dict(zip(self.kernel.arg_names, args, strict=False))
            tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            types = signature(self.kernel, tensors, constexprs)
            names = self.kernel.arg_names
            source = ASTSource(
                fn=self.kernel,
                signature={name: types.get(name, "constexpr") for name in names},
                constexprs=constexprs,
                attrs={(names.index(name),): [["tt.divisibility", 16]] for name in tensors},
            )
            compiled[self.kernel.__name__] = triton.compile(source, target=target, options={"num_warps": num_warps})

    with pytest.MonkeyPatch.context() as patch:
        for file, kernels in FILES.items():
            module = importlib.import_module(f"mpo_ext.kernels.{file}")
            for name in kernels:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        logits = torch.zeros(2, 3, vocab, dtype=dtype, requires_grad=True)
        labels = torch.zeros(2, 3, dtype=torch.int64)
        out = mpo_loss(
            logits,
            labels,
            torch.zeros(2),
            reward_shift=RewardShift(),
            stats=("entropy", "mean_logit"),
            backend="triton",
        )
        torch.autograd.grad(out.loss, logits)
        row = torch.zeros(6)
        kernels = importlib.import_module("mpo_ext.kernels.exp_logits")
        tile = torch.zeros(6, vocab)
        layout = (tile, 6, 0, vocab)
        kernels.exp_logits(layout, labels, 0, row, row, row, 40.0, torch.zeros(6, 64), tile.to(dtype))
    return compiled


def _registers(kernel: Any) -> int:
    """Returns the number of registers per thread of a compiled kernel; 0 if cuobjdump is missing."""
    cuobjdump = check_sass.find_cuobjdump()
    if cuobjdump is None:
        return 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (use,) = check_sass.resources(file.name, cuobjdump).values()
    return use["REG"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_code_has_wide_loads_and_no_spills(dtype: torch.dtype, target: str) -> None:
    compiled = _compile_all(TARGETS[target], dtype, 151674)
    assert len(compiled) == 8
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= 48 * 1024, name
        if target == "gfx942":
            code = kernel.asm["amdgcn"]
            for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
                assert set(re.findall(rf"\.{field}:\s*(\d+)", code)) == {"0"}, (name, field)
            wide_load, wide_store = "load_dwordx4", "store_dwordx4"
        else:
            code = kernel.asm["ptx"]
            assert ".local" not in code, f"{name} spills"
            # exp_logits takes 147 to 150 registers on sm_120: three blocks of 128 threads fit a multiprocessor.
            most = 160 if (name, target) == ("exp_logits_kernel", "sm_120") else MAX_REGISTERS
            assert _registers(kernel) <= most, name
            wide_load, wide_store = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"
        if name in WIDE_KERNELS:
            assert len(re.findall(wide_load, code)) >= 3, (
                name
            )  # at an odd vocabulary: rows are read from aligned addresses
        if name in ("logits_grad_kernel", "exp_logits_kernel"):
            # A thread of exp_logits has 16 float32 logits, on an AMD GPU 8: one vector of half precision.
            stores = 4 if name == "logits_grad_kernel" else 1 if target == "gfx942" else 2
            assert len(re.findall(wide_store, code)) >= stores, name


def test_training_does_not_recompile() -> None:
    """Checks that 1,000 steps compile at most two variants of each kernel.

    Lengths, labels and the reward shift change from step to step.
    """
    variants: dict[str, set] = {}

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **constexprs: Any) -> None:
                bound = dict(zip(self.kernel.arg_names, args, strict=False))
                key = tuple(
                    _specialisation(parameter, bound[parameter.name])
                    for parameter in self.kernel.params
                    if parameter.name in bound
                )
                variants.setdefault(self.kernel.__name__, set()).add((key, tuple(constexprs.items())))

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for file, kernels in FILES.items():
            module = importlib.import_module(f"mpo_ext.kernels.{file}")
            for name in kernels:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        random = np.random.default_rng(0)
        for _ in range(1000):
            length, vocab = int(random.integers(2, 90)), 67
            logits = torch.zeros(
                2 * int(random.integers(1, 4)), length, vocab, dtype=torch.bfloat16, requires_grad=True
            )
            labels = torch.randint(-1, vocab, logits.shape[:-1])
            out = mpo_loss(
                logits, labels, torch.zeros(len(labels)), reward_shift=float(random.normal()), backend="triton"
            )
            torch.autograd.grad(out.loss, logits, torch.tensor(float(random.normal())))
    assert len(variants) == 7
    for name, kinds in variants.items():
        assert len(kinds) <= 2, (name, kinds)


def _specialisation(parameter: Any, value: Any) -> Any:
    """Returns the properties of an argument that Triton's JIT specializes on, such as dtype and alignment."""
    if isinstance(value, Tensor):
        return (value.dtype, value.data_ptr() % 16 == 0)
    assert parameter.annotation_type, f"{parameter.name} must be annotated, or the JIT specialises on its width"
    if parameter.do_not_specialize or parameter.annotation_type.startswith("fp"):
        return parameter.annotation_type
    return (parameter.annotation_type, value == 1, value % 16 == 0)
