"""Tests the parts of the GPU code that run without a GPU: backend choice, counters, graph capture, launches."""

from types import SimpleNamespace
from typing import Any

import gpu_counts
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mpo_ext import RewardShift, mpo_loss
from mpo_ext.loss import eager
from mpo_ext.loss.steps import shift_labels
from mpo_ext.ops import backends, cuda, linear, matmul, native, tile_shape, tiles
from mpo_ext.plan import machines, roofline

LOSS = roofline.LossShape(tokens=4096, vocab=151_936, hidden=4096)
COST_NAMES = {
    "recompute": "mpo_ext, recompute=True",
    "keep": "mpo_ext, recompute=False",
    "frozen": "mpo_ext, frozen head",
}
GPU = torch.device("cuda", 0)
NEEDS_ADDING = pytest.mark.skipif(
    not matmul.wide_matmuls(torch.device("meta"), torch.bfloat16).adds,
    reason="the counts are for products added to float32 tensors, which this torch cannot do on the meta device",
)


# The linear path.


@NEEDS_ADDING
@pytest.mark.parametrize(
    ("mode", "launches", "products", "gigabytes", "passes", "gibibytes"),
    [("recompute", 128, 68, 12.7, 34, 1.8), ("keep", 213, 51, 17.7, 34, 2.9), ("frozen", 105, 34, 13.6, 40, 0.7)],
)  # fmt: skip
def test_the_linear_path_does_no_more_than_it_must(
    mode: str, launches: int, products: int, gigabytes: float, passes: int, gibibytes: float
) -> None:
    found = gpu_counts.count(mode, LOSS.labelled, 4096, LOSS.vocab)
    assert found.tile[0] == LOSS.labelled
    assert found.tile[1] % 512 == 0
    assert found.products == products
    assert found.launches <= launches
    assert found.moved <= gigabytes * 1e9
    assert found.passes <= passes
    assert found.peak <= gibibytes * 2**30


@NEEDS_ADDING
@pytest.mark.parametrize("mode", gpu_counts.MODES)
def test_the_cost_model_counts_what_is_done(mode: str) -> None:
    machine = machines.gpu("H100")
    found = gpu_counts.count(mode, LOSS.labelled, 4096, LOSS.vocab)
    planned = roofline.GpuTiles.of(LOSS, machine, keeps_logits=mode == "keep")
    assert (planned.rows, planned.columns) == found.tile
    cost = roofline.loss_cost(COST_NAMES[mode], LOSS, machine)
    stages, _ = roofline.LINEAR[COST_NAMES[mode]](LOSS, machine)
    launches = sum(stage.launches for stage in stages)
    assert launches <= found.launches <= launches + 40, "a fixed number besides those of the tiles"
    moved = sum(stage.moved for stage in stages if stage.name != "matrix products")
    by_products = 8 * LOSS.labelled * 4096 * (planned.slices - 1)  # the sums that products read and write
    assert moved - by_products == pytest.approx(found.moved, rel=0.05)
    assert cost.memory == pytest.approx(found.peak, rel=0.1)


def test_the_predicted_time_and_memory_stay_within_their_bounds() -> None:
    costs = {mode: roofline.loss_cost(name, LOSS, machines.gpu("H100")) for mode, name in COST_NAMES.items()}
    assert costs["recompute"].seconds <= 66e-3
    assert costs["keep"].seconds <= 50e-3
    assert max(cost.memory for cost in costs.values()) <= 2.9 * 2**30


@pytest.mark.parametrize("widest", [512, 600, 2000, 9728, 16_896])
def test_the_columns_of_a_tile_fill_the_waves(widest: int) -> None:
    columns = tile_shape.fewest_waves(8192, 151_936, 4096, widest, 132)
    assert widest * 3 // 4 < columns <= widest
    assert columns % 512 == 0
    waves = {c: tile_shape.product_waves(8192, c, 132) * -(-151_936 // c) for c in (columns, widest // 512 * 512)}
    assert waves[columns] <= waves[widest // 512 * 512] * 1.02


def test_without_a_multiple_of_512_a_tile_is_as_wide_as_fits() -> None:
    assert tile_shape.fewest_waves(8192, 151_936, 4096, 300, 132) == 300


def test_the_default_budget_grows_with_the_memory_of_the_gpu() -> None:
    assert [tile_shape.gpu_memory_budget(size) >> 20 for size in (0, 24e9, 80e9, 141e9, 288e9)] == [
        256,
        256,
        476,
        840,
        1024,
    ]
    assert tiles.default_memory_budget(torch.device("cpu")) == 64 << 20
    assert tiles.default_memory_budget(torch.device("meta")) == 256 << 20


@pytest.mark.parametrize("can", [(True, True), (True, False), (False, False)], ids=str)
def test_products_are_added_as_torch_allows(can: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 7), (7, 3)))
    calls: list[str] = []

    def wide(name: str) -> Any:
        def call(*tensors: Any, out_dtype: Any = None, out: Any = None) -> Any:
            calls.append(name)
            wide_tensors = [tensor.float() for tensor in tensors]
            result = getattr(torch, name)(*wide_tensors)
            return result if out is None else out.copy_(result)

        return call

    monkeypatch.setattr(matmul, "wide_matmuls", lambda device, dtype: matmul.WideMatmuls(*can))
    monkeypatch.setattr(matmul, "torch", SimpleNamespace(mm=wide("mm"), addmm=wide("addmm")))
    total = torch.full((5, 3), torch.nan)
    for is_first in (True, False, False):
        matmul.accumulate(total, a, b, is_first=is_first)
    torch.testing.assert_close(total, 3 * (a.float() @ b.float()))
    assert calls == ["mm", "addmm", "addmm"] if can[1] else calls == ["mm"] * 3
    out = torch.full((5, 3), torch.nan)
    matmul.scaled_matmul(a, b, out, 0.5, torch.ones(3))
    torch.testing.assert_close(out, 0.5 * (a.float() @ b.float() + 1))


def test_what_torch_can_do_is_asked_once() -> None:
    assert matmul.wide_matmuls(torch.device("cpu"), torch.bfloat16) == (False, False)
    assert matmul.wide_matmuls(torch.device("meta"), torch.float32) == (False, False)
    assert not matmul._gives(1, torch.zeros(2), lambda: torch.mm(torch.ones(2), torch.ones(2)))  # raises
    total = torch.zeros(2)
    assert not matmul._gives(2, total, lambda: total.fill_(1))  # another value
    assert matmul._gives(2, total, lambda: total.fill_(2))
    with pytest.raises(torch.OutOfMemoryError):
        matmul._gives(1, total, out_of_memory)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("no memory")


# CUDA graphs and torch.compile.


def test_a_reward_shift_keeps_its_memory() -> None:
    """Checks that the tensors of a reward shift keep their addresses. A CUDA graph needs fixed addresses."""
    logits, labels, ref_logp = torch.randn(2, 3, 7), torch.ones(2, 3, dtype=torch.int64), torch.tensor([-9.0, -4.0])
    for options in ({}, {"mode": "ema"}, {"per": "optimizer_step", "update": "after"}):
        shift = RewardShift(**options)
        places = shift._state.data_ptr(), shift._pending.data_ptr()
        for backend in ("cpu", "reference"):
            before = shift.value
            leaf = logits.clone().requires_grad_()
            output = mpo_loss(leaf, labels, ref_logp, shift=False, reward_shift=shift, backend=backend)
            used = float(output.reward_shift)
            shift.step()
            assert shift.value != before
            assert float(output.reward_shift) == used, "an output must not change later"
        shift.update(1.0, 2)
        shift.load_state_dict(shift.state_dict())
        assert (shift._state.data_ptr(), shift._pending.data_ptr()) == places


def test_hidden_states_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must not be captured into a CUDA graph, got a capture"):
        cuda.check_not_capturing(SimpleNamespace(device=GPU))
    cuda.check_not_capturing(torch.zeros(1))
    called: list[object] = []
    monkeypatch.setattr(cuda, "check_not_capturing", called.append)
    monkeypatch.setattr(linear, "check_not_capturing", called.append)
    hidden, labels = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    linear.kept_hidden_rows(hidden, labels, hidden, torch.zeros(3), None, -100)
    tiles.TiledRows(hidden, labels, linear._head(hidden, None, [1.0, 0.0, 1.0], torch.float32), -100, 1 << 20)
    assert len(called) == 2


def test_packed_labels_are_shifted_without_index_fill() -> None:
    """Checks that packed labels are shifted by scatter. Inductor of torch 2.11 cannot compile index_fill."""
    labels, offsets = torch.arange(12), torch.tensor([0, 3, 7, 12], dtype=torch.int32)
    for cu_seqlens in (offsets, offsets.long(), torch.tensor([0, 0, 7, 12])):
        expected = torch.tensor([*range(1, 12), -100]).index_fill(0, cu_seqlens[1:].long() - 1, -100)
        assert torch.equal(shift_labels(labels, -100, cu_seqlens), expected)
        assert torch.equal(shift_labels(labels.view(1, 12), -100, cu_seqlens), expected.view(1, 12))
    past = torch.tensor([0, 3, 20])  # invalid: on a GPU, ``pair_loss`` gives NaN for these offsets
    assert shift_labels(labels, -100, past).tolist() == [1, 2, -100, *range(4, 12), -100]
    graph = make_fx(shift_labels)(labels, -100, offsets)
    assert "index_fill" not in graph.code
    assert "scatter" in graph.code


def test_sums_of_packed_rows_are_those_of_index_add() -> None:
    rows = torch.randn(12, dtype=torch.float64, requires_grad=True)
    sequence = torch.tensor([0] * 3 + [2] * 4 + [1] * 5)
    sums = eager.sums_by_mask(rows, sequence, 4)
    torch.testing.assert_close(sums, torch.zeros(4, dtype=torch.float64).index_add(0, sequence, rows))
    assert torch.equal(torch.autograd.grad(sums.sum(), rows)[0], torch.ones(12, dtype=torch.float64))


# The CUDA backend.


def test_counters_lie_outside_of_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []

    def cuda_counters(**arguments: int) -> int:
        asked.append(arguments)
        return 1000 * len(asked)

    stream = 7
    monkeypatch.setattr(native, "compiled", lambda: SimpleNamespace(cuda_counters=cuda_counters))
    monkeypatch.setattr(cuda, "_stream_counters", {})
    monkeypatch.setattr(cuda, "current_stream", lambda tensor: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    like = SimpleNamespace(device=GPU)
    assert [cuda.counters(size, like) for size in (5, 400, 3)] == [1000, 1000, 1000]
    assert cuda.counters(10_000, like) == 2000
    assert cuda.counters(5, SimpleNamespace(device=torch.device("cuda", 1))) == 3000
    stream = cuda._PER_THREAD_STREAM
    assert cuda.counters(5, like) == 4000
    monkeypatch.setattr(cuda, "threading", SimpleNamespace(get_ident=lambda: -1))
    assert cuda.counters(5, like) == 5000, "the stream of each thread has counters for each thread"
    assert asked[0] == {"count": 4096, "stream": 7}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = cuda.counters(5, torch.zeros(1))
    assert isinstance(captured, torch.Tensor)
    assert not captured.any()
    assert len(asked) == 5


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulates a GPU of compute capability 9.0. Returns a list with one string.

    The string is the CUDA error that the simulated GPU reports; "" means no error. Tests replace it.
    """
    error = [""]
    built = SimpleNamespace(
        has_cuda=True, cuda_archs="80 and PTX", cuda_compiler="nvcc 13", cuda_device_error=lambda: error[0]
    )
    monkeypatch.setattr(native, "compiled", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    backends._device_problem.cache_clear()
    yield error
    backends._device_problem.cache_clear()


def test_kernels_that_the_gpu_cannot_load_leave_the_gpu_to_triton(a_gpu: list[str]) -> None:
    on_gpu = SimpleNamespace(device=GPU, dtype=torch.bfloat16)
    a_gpu[0] = "no kernel image is available for execution on the device"
    with pytest.warns(
        UserWarning, match="does not use its backend 'cuda': its kernels do not load on cuda:0, compute"
    ):
        chosen = backends.choose_backend(None, on_gpu)
    assert chosen == ("triton" if backends.triton_problem("cuda") is None else "reference")
    assert "no kernel image" in str(backends.cuda_problem(GPU))
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run: .*no kernel image.*built for 80 and PTX"):
        backends.choose_backend("cuda", on_gpu)
    a_gpu[0] = ""
    assert backends.choose_backend(None, on_gpu) == chosen, "the runtime is asked once for each GPU"


def test_kernels_that_load_are_used(a_gpu: list[str]) -> None:
    assert backends.choose_backend(None, SimpleNamespace(device=GPU, dtype=torch.bfloat16)) == "cuda"
