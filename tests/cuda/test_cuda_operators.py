"""Tests backend="cuda" from the public functions down to the kernels, which ptxsim runs."""

from types import SimpleNamespace

import pytest
import torch
from ptxsim.testing import need_nvcc
from shards import check_shards
from simulator import SimulatedNative, simulated_backend
from tiles import (
    GPU_TILES,
    LINEAR_OPTIONS,
    UNSEEN_BAD_LABELS,
    check_gpu_tiles,
    check_linear,
    check_tiles,
    check_unseen_bad_label,
)

from mpo_ext import MPOConfig, RewardShift, mpo_loss, token_logp
from mpo_ext.loss.reward_shift import BatchShift
from mpo_ext.ops import backends, cuda, native
from mpo_ext.ops import logits as logits_ops

need_nvcc()


def make_batch(dtype: torch.dtype, pairs: int = 2, length: int = 5, vocab: int = 203) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (2 * torch.randn(2 * pairs, length, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (2 * pairs, length), generator=generator)
    labels[:, :2] = -100
    return logits, labels, torch.linspace(-30, -10, 2 * pairs)


def run(backend: str, logits: torch.Tensor, *args: torch.Tensor, **options: object) -> tuple[object, torch.Tensor]:
    logits = logits.detach().clone().requires_grad_()
    output = mpo_loss(logits, *args, backend=backend, **options)
    (3 * output.loss).backward()
    return output, logits.grad


def assert_same(ours: object, expected: object) -> None:
    """Checks that two backends give the same results, except for rounding. The backends sum in different orders."""
    for name in ("loss", "dpo_loss", "bco_loss", "ntp_loss", "chosen_logp", "rejected_logp", "reward_shift", "tokens"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.stats, expected.stats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_and_its_gradient_are_those_of_the_cpu(dtype: torch.dtype, shift: bool) -> None:
    batch = make_batch(dtype)
    stats = ("entropy", "mean_logit", "top1") if shift else ()
    with simulated_backend(SimulatedNative()) as native:
        ours, grad = run("cuda", *batch, shift=shift, stats=stats)
    assert ours.backend == "cuda"
    assert [name for name, _ in native.reports] == ["forward", "logits_grad"], "one launch forward, one backward"
    expected, expected_grad = run("cpu", *batch, shift=shift, stats=stats)
    assert_same(ours, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=torch.finfo(dtype).eps * 1.01 + 1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "edges"), [(203, (64, 65, 128)), (9001, (5000,))], ids=["narrow", "split rows"])
def test_tiles_of_a_vocabulary_give_what_the_whole_gives(dtype: torch.dtype, vocab: int, edges: tuple) -> None:
    with simulated_backend(SimulatedNative()):
        check_tiles("cuda", dtype, vocab, edges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "edges"), [(203, (64, 65, 128)), (9001, (5000,))], ids=["narrow", "split rows"])
def test_merged_shards_of_a_vocabulary_equal_the_whole(dtype: torch.dtype, vocab: int, edges: tuple) -> None:
    with simulated_backend(SimulatedNative()):
        check_shards("cuda", dtype, vocab, edges)


@pytest.mark.parametrize("options", LINEAR_OPTIONS, ids=str)
def test_the_loss_from_hidden_states_is_that_of_the_cpu(options: dict) -> None:
    with simulated_backend(SimulatedNative()):
        check_linear("cuda", torch.bfloat16, **options)


@pytest.mark.parametrize("options", GPU_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_of_a_gpu_give_the_loss_and_gradients_of_float64(
    dtype: torch.dtype, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated_backend(SimulatedNative(traffic=False)):
        check_gpu_tiles("cuda", dtype, monkeypatch, **options)


def test_packed_sequences_and_every_kind_of_offset() -> None:
    logits, labels, ref_logp = make_batch(torch.bfloat16)
    logits, labels = logits.flatten(0, 1), labels.flatten()
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor([0, 3, 9, 16, 20], dtype=dtype)
        with simulated_backend(SimulatedNative()):
            ours, grad = run("cuda", logits, labels, ref_logp.double(), cu_seqlens=cu_seqlens)
        expected, expected_grad = run("cpu", logits, labels, ref_logp.double(), cu_seqlens=cu_seqlens)
        assert_same(ours, expected)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-2, atol=1e-7)


def test_reused_logits_and_strided_logits() -> None:
    logits, labels, ref_logp = make_batch(torch.bfloat16)
    wide = torch.full((4, 7, 211), torch.nan, dtype=torch.bfloat16)
    wide[:, :5, :203] = logits
    _, expected = run("cpu", logits, labels, ref_logp)
    for reuse in (False, True):
        leaf = wide.clone().requires_grad_()
        view = leaf[:, :5, :203]
        with simulated_backend(SimulatedNative()):
            output = mpo_loss(view, labels, ref_logp, backend="cuda", reuse_logits=reuse)
            (grad,) = torch.autograd.grad(3 * output.loss, view)
        torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "ema", "update": "after"},
        {"per": "optimizer_step", "update": "after"},
        {"mode": "fixed", "value": 0.3},
    ],
    ids=str,
)
def test_the_reward_shift_moves_as_on_the_cpu(options: dict[str, object]) -> None:
    batch = make_batch(torch.float32)
    shifts = [RewardShift(**options), RewardShift(**options)]
    for _ in range(2):
        with simulated_backend(SimulatedNative()) as native:
            ours, _ = run("cuda", *batch, reward_shift=shifts[0])
        assert [name for name, _ in native.reports] == ["forward", "logits_grad"]
        expected, _ = run("cpu", *batch, reward_shift=shifts[1])
        assert_same(ours, expected)
        for shift in shifts:
            shift.step()
    assert shifts[0].value == pytest.approx(shifts[1].value, rel=1e-6)


def test_pooling_over_ranks_costs_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = lambda self, device: BatchShift(self._state, is_pooled=True)  # noqa: E731  # as if ranks were pooled
    monkeypatch.setattr(RewardShift, "begin_batch", pooled)
    with simulated_backend(SimulatedNative()) as native:
        ours, _ = run("cuda", *make_batch(torch.float32), reward_shift=RewardShift())
    assert [name for name, _ in native.reports] == ["forward", "pair_loss", "logits_grad"]
    expected, _ = run("cpu", *make_batch(torch.float32), reward_shift=RewardShift())
    assert_same(ours, expected)


def test_the_config_reaches_the_kernel() -> None:
    config = MPOConfig(
        beta=0.3, dpo_weight=0.5, bco_weight=0.0, ntp_weight=0.7, label_smoothing=0.1, ntp_average="sequence"
    )
    batch = make_batch(torch.float32)
    with simulated_backend(SimulatedNative()):
        ours, grad = run("cuda", *batch, config=config)
    expected, expected_grad = run("cpu", *batch, config=config)
    assert_same(ours, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", UNSEEN_BAD_LABELS)
def test_a_bad_label_makes_the_loss_nan_even_if_no_term_contains_it(name: str) -> None:
    with simulated_backend(SimulatedNative()):
        check_unseen_bad_label(name, "cuda")


def test_token_logp_and_reference_logits() -> None:
    logits, labels, _ = make_batch(torch.bfloat16)
    with simulated_backend(SimulatedNative()) as native:
        ours = token_logp(logits, labels, backend="cuda", shift=False)
        output = mpo_loss(logits, labels, ref_logits=logits, backend="cuda")
    assert [name for name, _ in native.reports] == ["token_logp", "token_logp", "forward"]
    torch.testing.assert_close(ours, token_logp(logits, labels, backend="cpu", shift=False), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.chosen_reward, torch.zeros(2), rtol=0, atol=1e-6)


def test_no_rows_at_all() -> None:
    with simulated_backend(SimulatedNative()) as native:
        output = mpo_loss(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2), backend="cuda")
    assert [name for name, _ in native.reports] == ["pair_loss"]
    assert output.ntp_loss == 0
    assert torch.isfinite(output.loss)


# ------------------------------------------------------------------------------------------------- choice of backend


def test_without_a_gpu_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiled", lambda: SimpleNamespace(has_cuda=True))
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot run: it needs tensors on an NVIDIA GPU, got device cpu"
    ):
        backends.choose_backend("cuda", torch.zeros(2, 3))


def test_without_the_kernels_the_error_says_how_to_build_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiled", lambda: SimpleNamespace(has_cuda=False))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: this mpo_ext was built without CUDA kernels"):
        backends.choose_backend("cuda", torch.zeros(2, 3))


def test_cuda_serves_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cuda_problem", lambda device: None)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert backends.choose_backend(None, on_gpu) == "cuda"
    assert backends.choose_backend("cuda", on_gpu) == "cuda"
    on_gpu.dtype = torch.float64
    assert backends.choose_backend(None, on_gpu) == "reference"
    with pytest.raises(TypeError, match="float64"):
        backends.choose_backend("cuda", on_gpu)


def test_a_launch_without_a_driver_is_an_error_in_words() -> None:
    if not native.compiled().has_cuda:
        pytest.skip("needs a build with CUDA kernels: MPO_CUDA=ON")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    logits, labels, _ = make_batch(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "current_stream", lambda tensor: 0)
        patch.setattr(cuda, "multiprocessors", lambda device: 2)
        patch.setattr(cuda, "counters", lambda count, like: torch.zeros(count, dtype=torch.int32))
        with pytest.raises(RuntimeError, match=r"token_logp: .*(driver|device)"):
            logits_ops.token_logp(logits, labels, -100, 0, "cuda")
