"""Compares mpo_loss with the oracle for every term, option and layout. Also tests mpo_loss in an autograd graph."""

import functools
import math
from typing import Any

import pytest
import torch
from oracle import (
    LAYOUTS,
    LOG_2,
    STATS,
    Case,
    assert_as_accurate,
    assert_gradient_as_accurate,
    assert_output_as_accurate,
    lay_out,
    make_case,
)
from tiles import UNSEEN_BAD_LABELS, check_unseen_bad_label
from torch import Tensor

from mpo_ext import MPOConfig, MPOOutput, RewardShift, mpo_loss, token_logp

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABS = [1, 2, 7, 1003, 32768, 92553, 151674]


def name_of(value: object) -> str:
    """Returns a test id, such as `float32` for ``torch.float32``."""
    return str(value).removeprefix("torch.")


def run(case: Case, backend: str, device: str = "cpu", layout: str = "contiguous", **overrides: Any) -> tuple:
    """Runs mpo_loss for a case on ``device``. Returns (output, gradient of the logits), copied to the CPU."""
    z = lay_out(case.logits.to(device), layout).requires_grad_()
    arguments = {
        "ref_logp": None if case.ref_logp is None else case.ref_logp.to(device),
        "ref_logits": None if case.ref_logits is None else lay_out(case.ref_logits.to(device), layout),
        "config": MPOConfig(**case.options),
        "cu_seqlens": None if case.cu_seqlens is None else case.cu_seqlens.to(device),
        "shift": case.shift,
        "backend": backend,
        **overrides,
    }
    output = mpo_loss(z, case.labels.to(device), **arguments)
    (gradient,) = torch.autograd.grad(output.loss, z)
    return on_cpu(output), gradient.cpu()


def leaf(case: Case, device: str) -> Tensor:
    """Returns a copy of the case's logits that requires a gradient."""
    return case.logits.to(device, copy=True).requires_grad_()


def on_cpu(output: MPOOutput) -> Any:
    """Returns an object with the fields of the output, detached and on the CPU."""

    class Fields:
        pass

    fields = Fields()
    for name in MPOOutput._fields:
        value = getattr(output, name)
        if isinstance(value, Tensor):
            value = value.detach().cpu()
        elif isinstance(value, dict):
            value = {key: entry.cpu() for key, entry in value.items()}
        setattr(fields, name, value)
    return fields


def by_sequence(rows: Tensor, case: Case) -> list[Tensor]:
    """Returns a list with a view of each sequence's rows."""
    return list(rows) if case.cu_seqlens is None else list(rows.tensor_split(case.cu_seqlens[1:-1].long()))


@functools.lru_cache(maxsize=2)
def judged(dtype: torch.dtype, vocab: int, kind: str, packed: bool, length: int, labelled: float = 0.5) -> tuple:
    """Returns (case, exact result, eager result), cached for all backends."""
    case = make_case(dtype, vocab, kind, length=length, packed=packed, labelled=labelled)
    return case, case.exact(0.25), case.eager(0.25)


# Accuracy.


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_matches_the_definition(engine: str, device: str, dtype: torch.dtype, packed: bool, vocab: int) -> None:
    case, exact, eager = judged(dtype, vocab, "peaked", packed, length=8 if vocab < 30000 else 3)
    output, gradient = run(case, engine, device, reward_shift=0.25, stats=STATS)
    assert_output_as_accurate(output, gradient, exact, eager, stats=STATS)
    assert output.backend == engine


@pytest.mark.parametrize("kind", ["flat", "offset"])
@pytest.mark.parametrize("vocab", [7, 1003, 92553])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_flat_and_offset_logits_match_too(engine: str, device: str, dtype: torch.dtype, vocab: int, kind: str) -> None:
    if kind == "offset" and dtype.itemsize == 2:
        kind = "peaked"  # half precision cannot hold differences at an offset of 10,000
    case, exact, eager = judged(dtype, vocab, kind, packed=False, length=4)
    output, gradient = run(case, engine, device, "sliced", reward_shift=0.25, stats=STATS)
    assert_output_as_accurate(output, gradient, exact, eager, stats=STATS)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab", [7, 1003])
def test_any_stride_is_read_in_place(
    engine: str, device: str, vocab: int, dtype: torch.dtype, packed: bool, layout: str
) -> None:
    case, exact, eager = judged(dtype, vocab, "peaked", packed, length=8)
    output, gradient = run(case, engine, device, layout, reward_shift=0.25, stats=STATS)
    assert_output_as_accurate(output, gradient, exact, eager, stats=STATS)


@pytest.mark.parametrize("labelled", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_share_of_rows_may_be_labelled(engine: str, device: str, dtype: torch.dtype, labelled: float) -> None:
    case, exact, eager = judged(dtype, 131, "peaked", packed=False, length=40, labelled=labelled)
    output, gradient = run(case, engine, device, reward_shift=0.25, stats=STATS)
    assert_output_as_accurate(output, gradient, exact, eager, stats=STATS)


OPTIONS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.49, "ntp_weight": 0.0},
    {"ntp_average": "sequence"},
    {"beta": 0.01},
    {"beta": 2.0},
    {"dpo_weight": 0.0},
    {"bco_weight": 0.0},
    {"ntp_weight": 0.0},
    {"dpo_weight": 0.0, "bco_weight": 0.0},
    {"dpo_weight": 3.0, "bco_weight": 2.0, "ntp_weight": 0.1, "ntp_average": "sequence", "label_smoothing": 0.3},
    {"ignore_index": 0},
    {"ignore_index": -1},
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
def test_every_option_matches_the_definition(backend: str, device: str, options: dict[str, Any], packed: bool) -> None:
    base = make_case(torch.float32, 67, pairs=3, length=7, packed=packed)
    labels = base.labels.where(base.labels != -100, options.get("ignore_index", -100))
    for shift in (True, False):
        case = Case(base.logits, labels, base.ref_logp, cu_seqlens=base.cu_seqlens, shift=shift, options=options)
        output, gradient = run(case, backend, device, reward_shift=-0.5, stats=STATS)
        assert_output_as_accurate(output, gradient, case.exact(-0.5), case.eager(-0.5), stats=STATS)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_reference_logits_serve_as_the_reference(engine: str, device: str, dtype: torch.dtype, packed: bool) -> None:
    base = make_case(dtype, 1003, pairs=2, packed=packed)
    other = make_case(dtype, 1003, pairs=2, packed=packed, seed=1).logits
    case = Case(base.logits, base.labels, ref_logits=other, cu_seqlens=base.cu_seqlens)
    for layout in ("contiguous", "unaligned"):
        output, gradient = run(case, engine, device, layout)
        assert_output_as_accurate(output, gradient, case.exact(), case.eager())


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
def test_the_gradient_of_a_confident_label_keeps_its_digits(
    engine: str, device: str, dtype: torch.dtype, probability: float
) -> None:
    vocab = 1003
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, vocab, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, 17], [-100, 1002]])
    for i in range(2):
        logits[i, 0, labels[i, 1]] = -torch.inf
        logits[i, 0, labels[i, 1]] = logits[i, 0].logsumexp(-1) + math.log(probability / (1 - probability))
    case = Case(logits.to(dtype), labels, torch.tensor([-0.5, 0.5]))
    _, gradient = run(case, engine, device)
    exact, eager = case.exact(), case.eager()
    picked = ([0, 1], [0, 0], [17, 1002])
    factor = 2.0 if dtype == torch.float32 else 1.0
    for side in range(2):
        one = tuple(axis[side] for axis in picked)
        # 1 - p comes from a float32 logarithm, whose rounding is visible in float32 and never in half precision.
        weight = abs(exact.gradient[one] / exact.share[one])
        noise = exact.noise["gradient"] * exact.share[one] + torch.finfo(torch.float32).eps * weight
        assert_as_accurate(gradient[one], eager["gradient"][one], exact.gradient[one], factor, noise=noise)


# Constants of the definition.


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_policy_equal_to_reference_gives_0_831777_plus_nll(engine: str, device: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, 1003, pairs=3, length=9)
    same = Case(case.logits, case.labels, ref_logits=case.logits)
    for reward_shift in (None, RewardShift(), 0.0):
        output, _ = run(same, engine, device, reward_shift=reward_shift)
        nll = float(same.exact().ntp_loss)
        assert float(output.loss) == pytest.approx(0.831777 + nll, abs=1e-5)
        assert float(output.dpo_loss) == pytest.approx(LOG_2, abs=1e-6)
        assert float(output.bco_loss) == pytest.approx(2 * LOG_2, abs=1e-6)
        assert float(output.reward_shift) == pytest.approx(0, abs=1e-6)
        rewards = torch.cat([output.chosen_reward, output.rejected_reward])
        if engine == "reference" or dtype == torch.float64:  # it forms the two sums in different orders
            assert rewards.abs().max() <= same.exact().noise["chosen_reward"]
        else:
            assert not rewards.any()  # otherwise a pair would count as won before the first step


def test_the_reference_may_come_as_log_probabilities_of_the_same_kernel(backend: str, device: str) -> None:
    case = make_case(torch.bfloat16, 1003, pairs=2)
    first, _ = run(case, backend, device)
    own = torch.cat([first.chosen_logp, first.rejected_logp])
    same = Case(case.logits, case.labels, own)
    again, _ = run(same, backend, device)
    rewards = torch.cat([again.chosen_reward, again.rejected_reward])
    assert rewards.abs().max() <= same.exact().noise["chosen_reward"]
    assert float(again.loss) == pytest.approx(0.831777 + float(again.ntp_loss), abs=1e-5)


@pytest.mark.parametrize("reward_shift", [0.0, 0.7])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_pair_with_an_empty_side_is_no_comparison(
    engine: str, device: str, packed: bool, reward_shift: float
) -> None:
    base = make_case(torch.float32, 67, pairs=4, length=5, packed=packed)
    labels = base.labels.clone()
    rows = by_sequence(labels, base)
    rows[1].fill_(-100)  # pair 1 lacks its chosen side
    rows[6].fill_(-100)  # pair 2 lacks its rejected side
    rows[3].fill_(-100)  # pair 3 lacks both
    rows[7].fill_(-100)
    case = Case(base.logits, labels, base.ref_logp, cu_seqlens=base.cu_seqlens)
    exact = case.exact(reward_shift)
    output, gradient = run(case, engine, device, reward_shift=reward_shift)
    assert_output_as_accurate(output, gradient, exact, case.eager(reward_shift))
    assert output.chosen_reward[0] != 0
    assert not output.chosen_reward[1:].any()
    assert not output.rejected_reward[1:].any()
    has_gradient = [bool(rows.any()) for rows in by_sequence(gradient, base)]
    assert has_gradient == [True, False, True, False, True, False, False, False]


@pytest.mark.parametrize("ref", [0.0, -50.0, math.nan, -math.inf, 1e30])
def test_the_reference_of_a_masked_pair_does_not_matter(backend: str, device: str, ref: float) -> None:
    base = make_case(torch.float32, 67, pairs=2, length=5)
    labels = base.labels.clone()
    labels[2] = -100
    plain = Case(base.logits, labels, base.ref_logp)
    odd = Case(base.logits, labels, base.ref_logp.clone())
    odd.ref_logp[0] = odd.ref_logp[2] = ref
    (expected, expected_gradient), (output, gradient) = run(plain, backend, device), run(odd, backend, device)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_a_batch_without_any_token_is_finite(engine: str, device: str) -> None:
    base = make_case(torch.float32, 67, pairs=2, length=5)
    case = Case(base.logits, torch.full_like(base.labels, -100), base.ref_logp)
    delta = 0.3
    output, gradient = run(case, engine, device, reward_shift=delta, stats=STATS)
    bco = math.log1p(math.exp(delta)) + math.log1p(math.exp(-delta))
    assert float(output.loss) == pytest.approx(0.8 * LOG_2 + 0.2 * bco, rel=1e-6)
    assert float(output.ntp_loss) == 0
    assert [float(value) for value in output.stats.values()] == [0] * len(STATS)
    assert output.tokens.tolist() == [0] * 4
    assert not gradient.any()


def test_a_batch_with_rejected_tokens_only_has_no_ntp(engine: str, device: str) -> None:
    base = make_case(torch.float32, 67, pairs=2, length=5)
    labels = base.labels.clone()
    labels[:2] = -100
    output, gradient = run(Case(base.logits, labels, base.ref_logp), engine, device)
    assert float(output.loss) == pytest.approx(0.831777, abs=1e-5)
    assert float(output.ntp_loss) == 0
    assert not gradient.any()


def test_token_id_zero_is_an_ordinary_token(backend: str, device: str) -> None:
    base = make_case(torch.float32, 67, pairs=2, length=5)
    labels = torch.zeros_like(base.labels)
    case = Case(base.logits, labels, base.ref_logp)
    output, gradient = run(case, backend, device)
    assert output.tokens.tolist() == [4] * 4
    assert_output_as_accurate(output, gradient, case.exact(), case.eager())


def test_packing_never_shifts_across_sequences(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4, 2]  # a sequence of one position has no target
    logits = torch.randn(sum(lengths), 11, generator=generator)
    labels = torch.randint(11, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, 3, 4, 8, 10])
    case = Case(logits, labels, torch.zeros(4), cu_seqlens=cu_seqlens)
    output, gradient = run(case, backend, device)
    assert output.tokens.tolist() == [2, 0, 3, 1]
    assert not gradient[cu_seqlens[1:] - 1].any()
    assert_output_as_accurate(output, gradient, case.exact(), case.eager())
    unshifted = Case(logits, labels, torch.zeros(4), cu_seqlens=cu_seqlens.int(), shift=False)
    output, gradient = run(unshifted, backend, device)
    assert output.tokens.tolist() == lengths
    assert_output_as_accurate(output, gradient, unshifted.exact(), unshifted.eager())


def test_padded_and_packed_agree(engine: str, device: str) -> None:
    padded = make_case(torch.float32, 131, pairs=2, length=6)
    cu_seqlens = torch.arange(0, 25, 6)
    packed = Case(padded.logits.flatten(0, 1), padded.labels.flatten(), padded.ref_logp, cu_seqlens=cu_seqlens)
    (first, first_gradient), (second, second_gradient) = run(padded, engine, device), run(packed, engine, device)
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(first.chosen_logp, second.chosen_logp, rtol=1e-6, atol=0)
    torch.testing.assert_close(first_gradient.flatten(0, 1), second_gradient, rtol=1e-5, atol=1e-9)


def test_shifting_by_hand_is_the_same(engine: str, device: str) -> None:
    case = make_case(torch.bfloat16, 131, pairs=2, length=6)
    shifted, gradient = run(case, engine, device)
    by_hand = Case(case.logits[:, :-1], case.labels[:, 1:], case.ref_logp, shift=False)
    z = leaf(case, device)
    output = mpo_loss(z[:, :-1], by_hand.labels.to(device), by_hand.ref_logp.to(device), shift=False, backend=engine)
    output.loss.backward()
    assert torch.equal(output.loss.detach().cpu(), shifted.loss)
    assert z.grad is not None
    assert torch.equal(z.grad.cpu(), gradient)


# The output.


def test_all_but_the_loss_is_detached(backend: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    z = leaf(case, device)
    output = mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), stats=STATS, backend=backend)
    assert output.loss.requires_grad
    names = ["dpo_loss", "bco_loss", "ntp_loss", "chosen_logp", "rejected_logp"]
    names += ["chosen_reward", "rejected_reward", "reward_shift", "tokens"]
    for name in names:
        value = getattr(output, name)
        assert not value.requires_grad, name
        assert value.shape == {"tokens": (4,)}.get(name, (2,) if name.split("_")[0] in ("chosen", "rejected") else ())
    for value in output.stats.values():
        assert not value.requires_grad
        assert value.shape == ()


@pytest.mark.parametrize("stats", [(), ("entropy",), ("top1", "mean_logit"), ["entropy"], STATS], ids=str)
def test_only_the_statistics_asked_for_are_returned(engine: str, device: str, stats: tuple[str, ...]) -> None:
    case = make_case(torch.bfloat16, 1003)
    output, gradient = run(case, engine, device, stats=stats)
    assert_output_as_accurate(output, gradient, case.exact(), case.eager(), stats=stats)


def test_ties_count_as_hits(engine: str, device: str) -> None:
    logits = torch.zeros(2, 3, 67)
    logits[1, :, 5] = 1
    case = Case(logits, torch.tensor([[-100, 66, 0], [-100, 5, 6]]), torch.zeros(2))
    output, _ = run(case, engine, device, stats=("top1",))
    assert float(output.stats["top1"]) == 0.75


def test_minus_infinity_among_the_logits_is_harmless(engine: str, device: str) -> None:
    base = make_case(torch.float32, 131)
    logits = base.logits.clone()
    targets = base.labels[:, 1:].clamp(min=0)
    keep = logits[:, :-1].gather(-1, targets.unsqueeze(-1))
    logits[..., 60:] = -torch.inf
    logits[..., 0:20] = -torch.inf
    logits[:, :-1].scatter_(-1, targets.unsqueeze(-1), keep)
    case = Case(logits, base.labels, base.ref_logp)
    output, gradient = run(case, engine, device, stats=STATS)
    assert_output_as_accurate(output, gradient, case.exact(), case.eager(), stats=STATS)
    assert float(output.stats["mean_logit"]) == -math.inf
    assert not gradient[logits == -torch.inf].any()


@pytest.mark.parametrize("label", [-1, 67, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan_and_spares_the_other_pair(
    engine: str, device: str, label: int
) -> None:
    base = make_case(torch.float32, 67, pairs=2)
    labels = base.labels.clone()
    labels[0, 3] = label
    output, _ = run(Case(base.logits, labels, base.ref_logp), engine, device, reward_shift=0.0)
    clean, _ = run(Case(base.logits, base.labels, base.ref_logp), engine, device, reward_shift=0.0)
    assert torch.isnan(output.loss)
    assert torch.isnan(output.chosen_logp).tolist() == [True, False]
    assert torch.equal(output.rejected_logp, clean.rejected_logp)
    assert torch.equal(output.chosen_logp[1], clean.chosen_logp[1])


@pytest.mark.parametrize("name", UNSEEN_BAD_LABELS)
def test_a_bad_label_makes_the_loss_nan_even_if_no_term_contains_it(engine: str, device: str, name: str) -> None:
    check_unseen_bad_label(name, engine, device)


# A node of a graph.


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"ntp_average": "sequence"}, {"dpo_weight": 0.0}, {"beta": 1.5, "bco_weight": 2.0}],
    ids=lambda options: ",".join(options) or "defaults",
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "aligned"])
@pytest.mark.parametrize("with_logits", [False, True], ids=["ref_logp", "ref_logits"])
def test_gradcheck(
    backend: str, device: str, options: dict[str, Any], packed: bool, shift: bool, with_logits: bool
) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    case = make_case(torch.float64, 5, "flat", pairs=2, length=3, packed=packed, labelled=0.8)
    reference = {"ref_logits": case.logits.flip(-1)} if with_logits else {"ref_logp": case.ref_logp}

    def loss(z: Tensor) -> Tensor:
        return mpo_loss(
            z,
            case.labels,
            **reference,
            config=MPOConfig(**options),
            reward_shift=0.2,
            cu_seqlens=case.cu_seqlens,
            shift=shift,
            backend=backend,
        ).loss

    assert torch.autograd.gradcheck(loss, (case.logits.clone().requires_grad_(),))


@pytest.mark.parametrize("mode", ["cumulative", "ema", "fixed"])
def test_gradcheck_with_a_reward_shift_at_rest(backend: str, device: str, mode: str) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    case = make_case(torch.float64, 5, "flat", pairs=2, length=3)
    reward_shift = RewardShift(mode=mode, value=0.4)
    reward_shift.eval()
    assert torch.autograd.gradcheck(
        lambda z: mpo_loss(z, case.labels, case.ref_logp, reward_shift=reward_shift, backend=backend).loss,
        (case.logits.clone().requires_grad_(),),
    )
    assert reward_shift.value == pytest.approx(0.4, rel=1e-6)


def test_no_gradient_flows_through_the_reward_shift(engine: str, device: str) -> None:
    case = make_case(torch.float32, 67, pairs=2)
    reward_shift = RewardShift()  # cumulative, updated before use: delta is this batch's own mean reward
    output, gradient = run(case, engine, device, reward_shift=reward_shift)
    delta = float(output.reward_shift)
    assert delta != 0
    assert_output_as_accurate(output, gradient, case.exact(delta), case.eager(delta))


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_upstream_gradient_scales_the_gradient(
    engine: str, device: str, dtype: torch.dtype, upstream: float
) -> None:
    case = make_case(dtype, 1003)
    z = leaf(case, device)
    output = mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), backend=engine)
    (gradient,) = torch.autograd.grad(output.loss * upstream, z)
    exact, eager = case.exact(), case.eager()
    assert_gradient_as_accurate(
        gradient.cpu(),
        (eager["gradient"] * upstream).to(dtype),
        upstream * exact.gradient,
        exact.share,
        noise=abs(upstream) * exact.noise["gradient"],
    )


def test_gradients_accumulate(backend: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    _, gradient = run(case, backend, device)
    z = leaf(case, device)
    for _ in range(2):
        mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), backend=backend).loss.backward()
    assert z.grad is not None
    assert torch.equal(z.grad.cpu(), 2 * gradient)


def test_the_logits_may_serve_another_loss(backend: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    _, gradient = run(case, backend, device)
    z = leaf(case, device)
    logits = z * 1.0
    loss = mpo_loss(logits, case.labels.to(device), case.ref_logp.to(device), backend=backend).loss
    (loss + logits.square().sum()).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad.cpu(), gradient + 2 * case.logits, rtol=1e-6, atol=1e-9)
    assert torch.equal(logits.detach().cpu(), case.logits)


def test_a_retained_graph_gives_the_same_gradient_again(backend: str, device: str) -> None:
    case = make_case(torch.bfloat16, 67)
    z = leaf(case, device)
    loss = mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), backend=backend).loss
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_a_second_derivative_is_refused(kernel: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    z = leaf(case, device)
    loss = mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), backend=kernel).loss
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    penalty = gradient.square().sum()
    with pytest.raises(RuntimeError):
        (penalty + z.sum()).backward()  # beside another term, it must not be taken for a constant


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "unaligned"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_reuse_logits_gives_the_same_gradient_in_their_memory(
    kernel: str, device: str, dtype: torch.dtype, packed: bool, layout: str
) -> None:
    case = make_case(dtype, 1003, packed=packed)
    _, expected = run(case, kernel, device, layout)
    logits = lay_out(case.logits.to(device), layout).requires_grad_()
    address = logits.data_ptr()
    arguments: dict[str, Any] = {"reuse_logits": True, "backend": kernel}
    if case.cu_seqlens is not None:
        arguments["cu_seqlens"] = case.cu_seqlens.to(device)
    loss = mpo_loss(logits, case.labels.to(device), case.ref_logp.to(device), **arguments).loss
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(gradient.cpu(), expected)
    assert gradient.data_ptr() == address
    with pytest.raises(RuntimeError, match="reuse_logits"):
        torch.autograd.grad(loss, logits)


def test_reuse_logits_reaches_the_layers_below(backend: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    y, ref = case.labels.to(device), case.ref_logp.to(device)
    hidden = torch.randn(4, 6, 16, device=device)
    gradients = []
    for reuse_logits in (False, True):
        weight = torch.linspace(-1, 1, 67 * 16, device=device).view(67, 16).requires_grad_()
        mpo_loss(hidden @ weight.t(), y, ref, reuse_logits=reuse_logits, backend=backend).loss.backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_token_logp_writes_the_gradient_into_the_memory_of_the_logits(
    kernel: str, device: str, dtype: torch.dtype, layout: str
) -> None:
    case = make_case(dtype, 1003)
    labels = case.labels.to(device)
    incoming = torch.linspace(-1, 1, labels.numel(), device=device).view(labels.shape)
    gradients = []
    for reuse_logits in (False, True):
        logits = lay_out(case.logits.to(device), layout).requires_grad_()
        address = logits.data_ptr()
        logp = token_logp(logits, labels, reuse_logits=reuse_logits, backend=kernel)
        (gradient,) = torch.autograd.grad(logp, logits, incoming, retain_graph=True)
        assert (gradient.data_ptr() == address) == reuse_logits
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert gradients[0].any()
    with pytest.raises(RuntimeError, match="reuse_logits"):
        torch.autograd.grad(logp, logits, incoming)


def test_token_logp_does_not_overwrite_logits_that_another_backward_needs(kernel: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    leaf_logits = leaf(case, device)
    logits = leaf_logits.tanh()  # its backward reads the logits
    labels = case.labels.to(device)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logp(logits, labels, reuse_logits=True, backend=kernel).sum().backward()


def test_logits_changed_in_place_before_backward_are_noticed(kernel: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    logits = leaf(case, device) * 1.0
    loss = mpo_loss(logits, case.labels.to(device), case.ref_logp.to(device), backend=kernel).loss
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ignored_rows_are_never_read(kernel: str, device: str) -> None:
    for packed in (False, True):
        base = make_case(torch.bfloat16, 131, pairs=2, length=7, packed=packed)
        exact = base.exact()
        ignored = torch.from_numpy(~exact.share.any(-1))
        assert ignored.any()
        logits = base.logits.clone()
        logits[ignored] = torch.nan
        poisoned = Case(logits, base.labels, base.ref_logp, cu_seqlens=base.cu_seqlens)
        expected, expected_gradient = run(base, kernel, device, stats=STATS)
        output, gradient = run(poisoned, kernel, device, stats=STATS)
        assert torch.equal(output.loss, expected.loss)
        assert output.stats == expected.stats
        assert torch.equal(gradient, expected_gradient)
        assert not gradient[ignored].any()


@pytest.mark.parametrize("vocab", [67, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_two_runs_and_any_number_of_threads_give_the_same_bits(
    engine: str, device: str, dtype: torch.dtype, vocab: int, threads: None
) -> None:
    case = make_case(dtype, vocab, pairs=3, length=5, labelled=0.7)
    results = []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, engine, device, stats=STATS))
    for output, gradient in results[1:]:
        assert torch.equal(gradient, results[0][1])
        for name in ("loss", "dpo_loss", "bco_loss", "ntp_loss", "chosen_logp", "rejected_reward"):
            assert torch.equal(getattr(output, name), getattr(results[0][0], name)), name
        assert output.stats == results[0][0].stats


def test_inference_mode_and_no_grad_give_the_same_loss(engine: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    expected, _ = run(case, engine, device)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            z = case.logits.to(device).clone()
            output = mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), stats=STATS, backend=engine)
        assert not output.loss.requires_grad
        assert torch.equal(output.loss.cpu(), expected.loss)
    with torch.no_grad():
        z = leaf(case, device)
        assert not mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), backend=engine).loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_autocast_changes_nothing(backend: str, device: str, dtype: torch.dtype) -> None:
    case = make_case(dtype, 67)
    expected, expected_gradient = run(case, backend, device)
    z = leaf(case, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = mpo_loss(z, case.labels.to(device), case.ref_logp.to(device), backend=backend)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss.detach().cpu(), expected.loss)
    assert z.grad is not None
    assert torch.equal(z.grad.cpu(), expected_gradient)


def test_nothing_given_is_changed(engine: str, device: str) -> None:
    case = make_case(torch.float32, 67, packed=True)
    before = (case.logits.clone(), case.labels.clone(), case.ref_logp.clone(), case.cu_seqlens.clone())
    run(case, engine, device)
    for now, then in zip((case.logits, case.labels, case.ref_logp, case.cu_seqlens), before, strict=True):
        assert torch.equal(now, then)


def test_the_backend_is_chosen_when_none_is_named() -> None:
    case = make_case(torch.float32, 67)
    output = mpo_loss(case.logits, case.labels, case.ref_logp)
    assert output.backend == "cpu"
    exact, eager = case.exact(), case.eager()
    assert_as_accurate(output.loss, eager["loss"], exact.loss, noise=exact.noise["loss"])


def test_labels_may_have_any_stride(engine: str, device: str) -> None:
    case = make_case(torch.float32, 67)
    expected, expected_gradient = run(case, engine, device)
    columns = case.labels.t().contiguous().t()
    assert not columns.is_contiguous()
    wide = torch.stack([case.ref_logp, case.ref_logp], dim=-1)[:, 0]
    output, gradient = run(Case(case.logits, columns, wide), engine, device)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
