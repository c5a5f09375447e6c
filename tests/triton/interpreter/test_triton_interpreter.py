"""Runs the Triton kernels in Triton's interpreter, through the public functions. Compares them with the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import STATS, Case, assert_output_as_accurate, lay_out, make_case
from shards import check_shards
from tiles import (
    LINEAR_OPTIONS,
    UNSEEN_BAD_LABELS,
    check_exp_logits,
    check_linear,
    check_tiles,
    check_unseen_bad_label,
)

from mpo_ext import MPOConfig, RewardShift, mpo_loss, token_logp
from mpo_ext.ops import backends
from mpo_ext.ops import logits as ops
from mpo_ext.ops.pair_loss import EMA, PairLossSettings, pair_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(case: Case, layout: str = "contiguous", delta: float = 0.0, **options: Any) -> None:
    """Checks loss and gradient of a case, with the error bound of the CPU kernels."""
    logits = lay_out(case.logits, layout).requires_grad_()
    output = mpo_loss(
        logits,
        case.labels,
        case.ref_logp,
        None if case.ref_logits is None else lay_out(case.ref_logits, layout),
        config=MPOConfig(**case.options),
        reward_shift=delta,
        cu_seqlens=case.cu_seqlens,
        shift=case.shift,
        backend="triton",
        **options,
    )
    assert output.backend == "triton"
    (gradient,) = torch.autograd.grad(output.loss, logits)
    detached = output._replace(loss=output.loss.detach())
    assert_output_as_accurate(detached, gradient, case.exact(delta), case.eager(delta), stats=options.get("stats", ()))


@pytest.mark.parametrize("vocab", [1, 2, 7, 1003, 4096, 5003, 40001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_vocabulary(dtype: torch.dtype, vocab: int) -> None:
    check(make_case(dtype, vocab, pairs=1, length=4), stats=STATS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "edges"), [(203, (64, 65, 128)), (9001, (5000,))], ids=["narrow", "many chunks"])
def test_tiles_of_a_vocabulary_give_what_the_whole_gives(dtype: torch.dtype, vocab: int, edges: tuple) -> None:
    check_tiles("triton", dtype, vocab, edges)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "edges"), [(203, (64, 65, 128)), (9001, (5000,))], ids=["narrow", "many chunks"])
def test_merged_shards_of_a_vocabulary_equal_the_whole(dtype: torch.dtype, vocab: int, edges: tuple) -> None:
    check_shards("triton", dtype, vocab, edges)


@pytest.mark.parametrize("vocab", [13, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponentials_are_those_of_float64(dtype: torch.dtype, vocab: int) -> None:
    check_exp_logits("triton", dtype, vocab)


@pytest.mark.parametrize("options", LINEAR_OPTIONS, ids=str)
def test_the_loss_from_hidden_states_is_that_of_the_cpu(options: dict) -> None:
    check_linear("triton", torch.float32, **options)


@pytest.mark.parametrize("layout", ["sliced", "unaligned", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_stride_and_alignment(dtype: torch.dtype, layout: str) -> None:
    check(make_case(dtype, 1003), layout)
    check(make_case(dtype, 92553, pairs=1, length=2), layout)


@pytest.mark.parametrize("kind", ["flat", "offset"])
def test_flat_and_offset_logits(kind: str) -> None:
    check(make_case(torch.float32, 1003, kind), stats=STATS)


@pytest.mark.parametrize("labelled", [0.0, 0.05, 1.0])
def test_any_share_of_rows_may_be_labelled(labelled: float) -> None:
    check(make_case(torch.bfloat16, 257, pairs=3, length=9, labelled=labelled))


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"ntp_average": "sequence"},
        {"dpo_weight": 0.0},
        {"bco_weight": 0.0, "beta": 0.5},
        {"ntp_weight": 0.0},
        {"ignore_index": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_option(options: dict[str, Any], packed: bool) -> None:
    case = make_case(torch.float32, 67, pairs=3, packed=packed)
    labels = case.labels.where(case.labels != -100, options.get("ignore_index", -100))
    check(Case(case.logits, labels, case.ref_logp, cu_seqlens=case.cu_seqlens, options=options), delta=0.3)


def test_reference_logits_and_reused_logits() -> None:
    case = make_case(torch.bfloat16, 1003)
    other = make_case(torch.bfloat16, 1003, seed=1)
    check(Case(case.logits, case.labels, ref_logits=other.logits, shift=False))
    logits = case.logits.clone().requires_grad_()
    (reused,) = torch.autograd.grad(
        mpo_loss(logits, case.labels, case.ref_logp, reuse_logits=True, backend="triton").loss, logits
    )
    assert reused.data_ptr() == logits.data_ptr()
    fresh = case.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mpo_loss(fresh, case.labels, case.ref_logp, backend="triton").loss, fresh)
    assert torch.equal(reused, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update": "after"},
        {"mode": "ema", "decay": 0.5},
        {"mode": "ema", "update": "after"},
        {"mode": "fixed", "value": 1},
    ],
    ids=str,
)
def test_the_reward_shift_moves_as_on_the_cpu(settings: dict[str, Any]) -> None:
    ours, cpu = RewardShift(**settings), RewardShift(**settings)
    for seed in range(3):
        case = make_case(torch.float32, 67, seed=seed)
        outputs = [
            mpo_loss(case.logits, case.labels, case.ref_logp, reward_shift=shift, backend=backend)
            for shift, backend in ((ours, "triton"), (cpu, "cpu"))
        ]
        torch.testing.assert_close(outputs[0].reward_shift, outputs[1].reward_shift)
        assert ours.value == pytest.approx(cpu.value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_agree_with_the_cpu_kernels(dtype: torch.dtype) -> None:
    """Compares the Triton kernels with the CPU kernels on unusual inputs. NaN results must also agree.

    The inputs have labels out of range, logits of -inf, and rows with NaN or +inf.
    """
    torch.manual_seed(0)
    logits = (4 * torch.randn(9, 1003)).to(dtype)
    labels = torch.randint(1003, (9,))
    labels[0], labels[1], labels[2] = -100, 1003, -1
    logits[3, ::2] = -torch.inf
    logits[3, labels[3]] = 1
    logits[4, labels[4]] = -torch.inf
    logits[5] = -torch.inf
    logits[6, 500] = torch.nan
    logits[7, 1002] = torch.inf
    mask = ops.stats_mask(STATS)
    results = []
    for backend in ("triton", "cpu"):
        forward = ops.token_logp(logits, labels, -100, mask, backend)
        gradient = ops.logits_grad(logits, labels, forward[1], forward[2], torch.ones(9), None, -100, backend)
        # The maximum and the sum of a row with a NaN are not compared.
        results.append((forward[0], forward[3][:, :6], gradient))
    for ours, cpu in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, cpu, equal_nan=True, rtol=2e-2 if ours.dtype != torch.float32 else 1e-5, atol=1e-6
        )
    assert (results[0][2][3, ::2][logits[3, ::2] == -torch.inf] == 0).all()


@pytest.mark.parametrize("name", UNSEEN_BAD_LABELS)
def test_a_bad_label_makes_the_loss_nan_even_if_no_term_contains_it(name: str) -> None:
    check_unseen_bad_label(name, "triton")


def test_ignored_rows_are_never_read() -> None:
    logits = torch.full((2, 6, 1003), torch.nan)
    labels = torch.full((2, 6), -100)
    logits[:, 3:] = torch.randn(2, 3, 1003)
    labels[:, 3:] = 5
    logits.requires_grad_()
    out = mpo_loss(logits, labels, torch.full((2,), -20.0), shift=False, backend="triton")
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert torch.isfinite(out.loss)
    assert not gradient[:, :3].any()
    assert torch.isfinite(gradient).all()


def test_two_calls_give_the_same_bits() -> None:
    case = make_case(torch.bfloat16, 5003)
    first, second = (token_logp(case.logits, case.labels, backend="triton", shift=False) for _ in range(2))
    assert torch.equal(first, second)


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match=r"logits must not be torch\.float64 with backend 'triton'"):
        mpo_loss(
            torch.zeros(2, 3, 4, dtype=torch.float64),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2),
            backend="triton",
        )


@pytest.mark.parametrize(
    ("offsets", "is_valid"),
    [
        ([0, 3, 8, 11, 16], True),
        ([0, 3, 5, 9, 12], False),
        ([0, 3, 5, 9, 20], False),
        ([0, 8, 4, 9, 16], False),
        ([0, 8, 8, 9, 16], False),
        ([1, 3, 5, 9, 16], False),
    ],
)
def test_invalid_offsets_on_a_gpu_give_nan(offsets: list[int], is_valid: bool) -> None:
    """Calls the launcher directly, because the operator checks the offsets of tensors on a CPU by itself."""
    kernels = backends.triton_kernels()
    logp, labels = -torch.rand(16), torch.arange(16) % 5
    references, state = -torch.rand(4, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    settings = PairLossSettings(0.1, 0.8, 0.2, 1.0, 0.0, False, EMA, False, 0.9)
    expected = pair_loss(logp[None], labels[None], references, state, torch.tensor([0, 3, 8, 11, 16]),
                         settings.numbers(), -100, "cpu")  # fmt: skip
    results = kernels.PairLossOutputs(*(torch.full_like(value, 7) for value in expected))
    kernels.pair_loss(
        logp, labels, torch.tensor(offsets), references, state, (*settings[:5], settings.decay), settings.rule,
        settings.update_first, settings.average_sequences, -100, results, check_offsets=True,
    )  # fmt: skip
    if is_valid:
        for result, value in zip(results, expected, strict=True):
            assert torch.allclose(result, value)
        return
    for name in ("loss", "terms", "reward_shift", "logp", "reward", "weight"):
        assert getattr(results, name).isnan().all(), name
    assert torch.equal(results.state, state)
    assert results.batch.tolist() == [0, 0]
    assert results.tokens.tolist() == [0] * 4
