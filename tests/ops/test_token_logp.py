"""Compares token_logp with the oracle, on every backend and instruction set that this machine supports."""

import functools
import math

import pytest
import torch
from oracle import (
    LAYOUTS,
    assert_as_accurate,
    assert_gradient_as_accurate,
    lay_out,
    make_logits,
    token_logp_eager,
    token_logp_exact,
)
from torch import Tensor

from mpo_ext import sequence_sums, token_logp

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 1, 2 and 7: shorter than a vector. 1003: unaligned rows, whose head and tail hold several elements. 32768: full
# vectors only. 92553 and 151674: InternVL over InternLM2 and over Qwen2.5, neither a multiple of 8.
VOCABS = [1, 2, 7, 1003, 32768, 92553, 151674]
# Half precision cannot hold differences at an offset of 10,000.
KINDS = [
    (dtype, kind)
    for dtype in DTYPES
    for kind in ("flat", "peaked", "offset")
    if kind != "offset" or dtype.itemsize > 2
]


def name_of(value: object) -> str:
    """Returns a test id, such as `float32` for ``torch.float32``."""
    return str(value).removeprefix("torch.")


@functools.lru_cache(maxsize=2)
def judged(dtype: torch.dtype, vocab: int, kind: str, rows: int, labelled: float = 0.7) -> tuple:
    """Returns (logits, labels, upstream gradient, exact result, eager result) of a random case.

    A cache keeps the last cases, so that the tests of all backends share them.
    """
    generator = torch.Generator().manual_seed(vocab)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[: min(2, rows)] = torch.tensor([0, vocab - 1])[: min(2, rows)]  # the first and the last column
    logits = make_logits(rows, vocab, dtype, kind, labels, seed=vocab)
    labels[torch.rand(rows, generator=generator) >= labelled] = -100
    weight = torch.randn(rows, generator=generator, dtype=torch.float64)
    weight = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact, eager = token_logp_exact(logits, labels, weight), token_logp_eager(logits, labels, weight)
    return logits, labels, weight, exact, eager


def check(engine: str, device: str, layout: str, case: tuple) -> None:
    """Checks the log-probs and the gradient of a case. ``layout`` is the memory layout of the logits."""
    logits, labels, weight, (exact, exact_gradient, share), (eager, eager_gradient) = case
    z = lay_out(logits.to(device), layout).requires_grad_()
    logp = token_logp(z, labels.to(device), backend=engine, shift=False)
    (gradient,) = torch.autograd.grad(logp, z, weight.to(device))
    assert logp.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == logits.dtype
    assert_as_accurate(logp.detach().cpu(), eager, exact, name="logp")
    assert_gradient_as_accurate(gradient.cpu(), eager_gradient, exact_gradient, share)
    ignored = labels == -100
    assert not logp.detach().cpu()[ignored].any()
    assert not gradient.cpu()[ignored].any()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=name_of)
def test_matches_the_definition(engine: str, device: str, dtype: torch.dtype, kind: str, vocab: int) -> None:
    case = judged(dtype, vocab, kind, rows=12 if vocab < 30000 else 4)
    check(engine, device, "contiguous", case)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab", [2, 67, 1003, 32768])
def test_any_stride_is_read_in_place(engine: str, device: str, dtype: torch.dtype, vocab: int, layout: str) -> None:
    check(engine, device, layout, judged(dtype, vocab, "peaked", rows=5))


@pytest.mark.parametrize(
    "vocab", [*range(3, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1025, 4099]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_every_remainder_of_a_vector_is_handled(engine: str, device: str, dtype: torch.dtype, vocab: int) -> None:
    check(engine, device, "unaligned", judged(dtype, vocab, "flat", rows=3, labelled=1.0))


@pytest.mark.parametrize("labelled", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_share_of_rows_may_be_labelled(engine: str, device: str, dtype: torch.dtype, labelled: float) -> None:
    check(engine, device, "contiguous", judged(dtype, 1003, "peaked", rows=60, labelled=labelled))


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("vocab", [2, 1003, 151674])
def test_the_gradient_of_a_confident_label_keeps_its_digits(
    engine: str, device: str, vocab: int, dtype: torch.dtype, probability: float
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, vocab // 2])
    for row, label in enumerate(labels.tolist()):
        logits[row, label] = -torch.inf
        logits[row, label] = logits[row].logsumexp(-1) + math.log(probability / (1 - probability))
    logits = logits.to(dtype)
    _, exact, _ = token_logp_exact(logits, labels)
    _, eager = token_logp_eager(logits, labels)
    factor = 2.0 if dtype == torch.float32 else 1.0
    z = logits.to(device).requires_grad_()
    token_logp(z, labels.to(device), backend=engine, shift=False).sum().backward()
    assert z.grad is not None
    for one in enumerate(labels.tolist()):
        # 1 - p comes from a float32 logarithm, whose rounding is visible in float32 and never in half precision.
        noise = torch.finfo(torch.float32).eps
        assert_as_accurate(z.grad.cpu()[one], eager[one], exact[one], factor, noise=noise)


def test_an_upstream_gradient_may_have_any_stride(engine: str, device: str) -> None:
    logits, labels, *_ = judged(torch.float32, 67, "peaked", rows=12)
    z = logits.view(3, 4, 67).to(device).requires_grad_()
    y = labels.view(3, 4).to(device)
    weight = torch.randn(4, 3, device=device).t()
    (expected,) = torch.autograd.grad(token_logp(z, y, backend=engine, shift=False), z, weight.contiguous())
    (strided,) = torch.autograd.grad(token_logp(z, y, backend=engine, shift=False), z, weight)
    assert torch.equal(strided, expected)
    (expected,) = torch.autograd.grad(token_logp(z, y, backend=engine, shift=False), z, torch.full_like(weight, 0.25))
    (expanded,) = torch.autograd.grad((0.25 * token_logp(z, y, backend=engine, shift=False)).sum(), z)
    assert torch.equal(expanded, expected)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_number_of_axes_will_do(backend: str, device: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 7, device=device, requires_grad=True)
    labels = torch.randint(7, shape, device=device)
    exact, exact_gradient, share = token_logp_exact(logits, labels)
    eager, eager_gradient = token_logp_eager(logits, labels)
    logp = token_logp(logits, labels, backend=backend, shift=False)
    assert_as_accurate(logp.detach().cpu(), eager.cpu(), exact)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    if labels.numel():
        assert_gradient_as_accurate(gradient.cpu(), eager_gradient.cpu(), exact_gradient, share)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 2, 4), (3, 1)], ids=str)
def test_shift_scores_each_position_against_the_next_label(backend: str, device: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*shape, 11, generator=generator)
    labels = torch.randint(11, shape, generator=generator)
    labels[..., shape[-1] // 2] = -100
    exact, exact_gradient, share = token_logp_exact(logits, labels, shift=True)
    eager, eager_gradient = token_logp_eager(logits, labels, shift=True)
    z = logits.to(device).requires_grad_()
    logp = token_logp(z, labels.to(device), shift=True, backend=backend)
    (gradient,) = torch.autograd.grad(logp.sum(), z)
    assert_as_accurate(logp.detach().cpu(), eager, exact)
    assert_gradient_as_accurate(gradient.cpu(), eager_gradient, exact_gradient, share)
    assert not logp[..., -1].any()
    unshifted = token_logp(z[..., :-1, :], labels[..., 1:].to(device), backend=backend, shift=False)
    assert torch.equal(logp[..., :-1], unshifted)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 4])
def test_ignore_index_may_be_any_label(backend: str, device: str, ignore_index: int) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 1, 4, ignore_index, 3, 0])
    exact, _, _ = token_logp_exact(logits, labels, ignore_index=ignore_index)
    eager, _ = token_logp_eager(logits, labels, ignore_index=ignore_index)
    logp = token_logp(logits.to(device), labels.to(device), ignore_index=ignore_index, backend=backend, shift=False)
    assert_as_accurate(logp.cpu(), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("label", [-1, -101, 67, 2**31 + 1, 2**40, -(2**63), 2**63 - 1])
def test_a_label_out_of_range_gives_nan_in_its_row_only(
    engine: str, device: str, label: int, dtype: torch.dtype
) -> None:
    logits = torch.randn(4, 67).to(dtype).to(device).requires_grad_()
    labels = torch.tensor([3, label, -100, 66], device=device)
    logp = token_logp(logits, labels, backend=engine, shift=False)
    assert torch.isnan(logp).tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(logp[[0, 2, 3]].sum(), logits)
    others = gradient[[0, 2, 3]]
    assert torch.isfinite(others).all()
    assert others[[0, 2]].any()
    good = torch.tensor([3, -100, -100, 66], device=device)
    torch.testing.assert_close(
        logp[[0, 2, 3]], token_logp(logits, good, backend=engine, shift=False)[[0, 2, 3]], rtol=0, atol=0
    )


def masked_logits(dtype: torch.dtype, vocab: int) -> Tensor:
    """Returns three rows of logits, each with some logits of -inf.

    The first half of row 0 is -inf. In row 1, only the first and the last logit are finite. In row 2, every second
    logit is -inf.
    """
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[0, : vocab // 2] = -torch.inf
    logits[1, 1:-1] = -torch.inf
    logits[2, ::2] = -torch.inf
    return logits


@pytest.mark.parametrize("vocab", [7, 64, 1003])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_minus_infinity_is_a_probability_of_zero(engine: str, device: str, dtype: torch.dtype, vocab: int) -> None:
    logits = masked_logits(dtype, vocab)
    labels = torch.tensor([vocab - 1, 0, 1])
    exact, exact_gradient, share = token_logp_exact(logits, labels)
    eager, eager_gradient = token_logp_eager(logits, labels)
    z = logits.to(device).requires_grad_()
    logp = token_logp(z, labels.to(device), backend=engine, shift=False)
    (gradient,) = torch.autograd.grad(logp.sum(), z)
    assert_as_accurate(logp.detach().cpu(), eager, exact)
    assert_gradient_as_accurate(gradient.cpu(), eager_gradient, exact_gradient, share)
    assert not gradient.cpu()[logits == -torch.inf].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_forbidden_label_has_logp_minus_infinity(engine: str, device: str, dtype: torch.dtype) -> None:
    logits = masked_logits(dtype, 67).to(device)
    labels = torch.tensor([3, 20, 2], device=device)
    assert token_logp(logits, labels, backend=engine, shift=False).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("column", [0, 5, 40, 66])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_and_infinity_in_a_row_give_nan_in_that_row(
    engine: str, device: str, dtype: torch.dtype, column: int, bad: float
) -> None:
    logits = torch.randn(3, 67, generator=torch.Generator().manual_seed(column)).to(dtype)
    logits[1, column] = bad
    z = logits.to(device).requires_grad_()
    logp = token_logp(z, torch.tensor([5, 5, 5], device=device), backend=engine, shift=False)
    assert torch.isnan(logp).tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(logp.sum(), z)
    assert torch.isfinite(gradient[[0, 2]]).all()
    assert torch.isnan(gradient[1]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab", [7, 1003])
def test_ignored_rows_are_never_read(kernel: str, device: str, vocab: int, dtype: torch.dtype) -> None:
    logits, labels, *_ = judged(dtype, vocab, "peaked", rows=12)
    ignored = labels == -100
    assert ignored.any()
    poisoned = logits.clone()
    poisoned[ignored] = torch.nan
    z = poisoned.to(device).requires_grad_()
    logp = token_logp(z, labels.to(device), backend=kernel, shift=False)
    (gradient,) = torch.autograd.grad(logp.sum(), z)
    clean = token_logp(logits.to(device), labels.to(device), backend=kernel, shift=False)
    assert torch.equal(logp.detach(), clean)
    assert torch.isfinite(gradient).all()
    assert not gradient.cpu()[ignored].any()


@pytest.mark.parametrize("vocab", [67, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_two_runs_and_any_number_of_threads_give_the_same_bits(
    engine: str, device: str, dtype: torch.dtype, vocab: int, threads: None
) -> None:
    logits, labels, weight, *_ = judged(dtype, vocab, "peaked", rows=12)
    z = logits.to(device).requires_grad_()
    results = []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        logp = token_logp(z, labels.to(device), backend=engine, shift=False)
        (gradient,) = torch.autograd.grad(logp, z, weight.to(device))
        results.append((logp.detach(), gradient))
    for logp, gradient in results[1:]:
        assert torch.equal(logp, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_a_row_does_not_depend_on_its_neighbours(engine: str, device: str) -> None:
    logits, labels, *_ = judged(torch.float32, 1003, "peaked", rows=12, labelled=1.0)
    z, y = logits.to(device), labels.to(device)
    together = token_logp(z, y, backend=engine, shift=False)
    alone = torch.stack([token_logp(z[i], y[i], backend=engine, shift=False) for i in range(12)])
    assert torch.equal(together, alone)


def test_logits_without_grad_give_logp_without_grad(backend: str, device: str) -> None:
    logits = torch.randn(3, 5, device=device)
    labels = torch.tensor([1, 2, 3], device=device)
    assert not token_logp(logits, labels, backend=backend, shift=False).requires_grad
    with torch.no_grad():
        assert not token_logp(logits.requires_grad_(), labels, backend=backend, shift=False).requires_grad


def test_gradcheck(backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, -100, 4], [2, 2, 1]])
    for shift in (False, True):
        assert torch.autograd.gradcheck(
            lambda z, shift=shift: token_logp(z, labels, shift=shift, backend=backend), (logits,)
        )


def test_a_second_derivative_is_refused(kernel: str, device: str) -> None:
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    logp = token_logp(logits, torch.tensor([1, 2], device=device), backend=kernel, shift=False)
    (gradient,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        (gradient.square().sum() + logits.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sums_of_packed_sequences_are_those_of_padded_ones(dtype: torch.dtype) -> None:
    lengths = [4, 0, 1, 7]
    cu_seqlens = torch.tensor([0, 4, 4, 5, 12], dtype=dtype)
    rows = torch.randn(12, dtype=torch.float64, requires_grad=True)
    padded = torch.nn.utils.rnn.pad_sequence(rows.split(lengths), batch_first=True)
    for packed in (rows, rows[None]):
        sums = sequence_sums(packed, cu_seqlens)
        torch.testing.assert_close(sums, sequence_sums(padded))
    assert sums.dtype == torch.float64
    (grad,) = torch.autograd.grad(sums @ torch.arange(4.0).double(), rows)
    assert grad.tolist() == [0.0] * 4 + [2.0] + [3.0] * 7


def test_sums_of_packed_sequences_refuse_padded_rows() -> None:
    with pytest.raises(ValueError, match=r"rows must be \[N\] or \[1, N\] .*, got shape \(2, 3\)"):
        sequence_sums(torch.zeros(2, 3), torch.tensor([0, 3, 6]))
