"""Compares the oracle with torch's autograd in float64. Also tests that its error bounds reject wrong kernels.

Nothing here uses the package.
"""

import itertools

import numpy as np
import pytest
import torch
from oracle import (
    FIELDS,
    LAYOUTS,
    LOG_2,
    STATS,
    Case,
    ExactShift,
    accumulation_eps,
    assert_as_accurate,
    assert_gradient_as_accurate,
    lay_out,
    make_case,
    make_logits,
    mpo_exact,
    token_logp_eager,
    token_logp_exact,
)
from torch import Tensor

OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"ntp_average": "sequence"},
    {"beta": 0.7, "dpo_weight": 0.3, "bco_weight": 1.5, "ntp_weight": 0.2},
    {"dpo_weight": 0.0},
    {"bco_weight": 0.0, "ntp_weight": 0.0, "label_smoothing": 0.4},
]


@pytest.mark.parametrize(("packed", "shift"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "defaults")
def test_the_oracle_agrees_with_autograd_in_float64(packed: bool, shift: bool, options: dict[str, float]) -> None:
    base = make_case(torch.float64, 13, pairs=3, packed=packed)
    case = Case(base.logits, base.labels, base.ref_logp, cu_seqlens=base.cu_seqlens, shift=shift, options=options)
    exact, autograd = case.exact(0.4), case.eager(0.4)
    for name in FIELDS:
        np.testing.assert_allclose(
            autograd[name].numpy(), getattr(exact, name).astype(float), rtol=1e-12, err_msg=name
        )
    for name in STATS:
        np.testing.assert_allclose(autograd["stats"][name].numpy(), exact.stats[name].astype(float), rtol=1e-12)
    np.testing.assert_allclose(autograd["gradient"].numpy(), exact.gradient.astype(float), rtol=1e-10, atol=1e-16)


def test_the_oracle_agrees_with_autograd_on_reference_logits_and_empty_sides() -> None:
    base = make_case(torch.float64, 7, pairs=4, length=5)
    labels = base.labels.clone()
    labels[1] = -100  # no chosen token
    labels[6] = -100  # no rejected token
    labels[3] = labels[7] = -100  # neither
    case = Case(base.logits, labels, ref_logits=base.logits.flip(-1) / 2)
    exact, autograd = case.exact(-0.3), case.eager(-0.3)
    for name in FIELDS:
        np.testing.assert_allclose(
            autograd[name].numpy(), getattr(exact, name).astype(float), rtol=1e-12, err_msg=name
        )
    np.testing.assert_allclose(autograd["gradient"].numpy(), exact.gradient.astype(float), rtol=1e-10, atol=1e-16)
    assert not exact.gradient[[1, 3, 5, 6, 7]].any()  # 5 is the rejected side whose chosen side is empty
    assert exact.gradient[2].any()  # its chosen tokens still count in NTP
    assert exact.tokens[[1, 3, 6, 7]].tolist() == [0, 0, 0, 0]


def test_the_oracle_on_a_pair_worked_out_by_hand() -> None:
    logits = torch.zeros(2, 2, 4, dtype=torch.float64)
    labels = torch.tensor([[-100, 1], [-100, 3]])
    exact = mpo_exact(logits, labels, torch.tensor([-1.0, -2.0]))
    chosen, rejected = 0.1 * (1 - np.log(4)), 0.1 * (2 - np.log(4))
    dpo = np.log1p(np.exp(rejected - chosen))
    bco = np.log1p(np.exp(-chosen)) + np.log1p(np.exp(rejected))
    np.testing.assert_allclose(float(exact.loss), 0.8 * dpo + 0.2 * bco + np.log(4), rtol=1e-14)
    assert exact.stats["top1"] == 1  # all logits tie, so the label is among the largest
    np.testing.assert_allclose(float(exact.stats["entropy"]), np.log(4), rtol=1e-14)
    np.testing.assert_allclose(float(exact.stats["sum_p_squared"]), 1 / 4, rtol=1e-14)
    assert not exact.gradient[:, 1].any()  # the last position has no target


def test_the_oracle_on_a_batch_without_tokens() -> None:
    exact = mpo_exact(torch.randn(2, 3, 5), torch.full((2, 3), -100), torch.tensor([-7.0, 3.0]))
    np.testing.assert_allclose(float(exact.loss), 0.8 * LOG_2 + 0.2 * 2 * LOG_2, rtol=1e-14)
    assert exact.ntp_loss == 0
    assert not exact.gradient.any()


def test_the_reward_shift_of_the_oracle() -> None:
    cumulative = ExactShift()
    assert [cumulative(2.0, 2), cumulative(6.0, 2), cumulative(0.0, 0)] == [1.0, 2.0, 2.0]
    previous = ExactShift("ema", decay=0.5, update="after", value=1.0, per="optimizer_step")
    assert [previous(-2.0, 1), previous(-8.0, 3)] == [1.0, 1.0]
    previous.step()
    assert previous.value == -0.75


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_keeps_the_values(layout: str) -> None:
    values = torch.randn(2, 3, 5)
    view = lay_out(values, layout)
    torch.testing.assert_close(view, values, rtol=0, atol=0)
    if layout != "contiguous":
        assert view.stride() != values.stride()
        assert view.untyped_storage().nbytes() > values.untyped_storage().nbytes()


# Wrong on purpose.


def wrong_gradient(name: str, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Returns a deliberately wrong gradient of the weighted log-probs.

    ``name`` is the mistake, such as "no label". With "nothing", the gradient is right.
    """
    p = logits.float().softmax(-1)
    onehot = torch.zeros_like(p).scatter(-1, labels.unsqueeze(-1), 1.0)
    gradient = weight.unsqueeze(-1) * (onehot - p)
    if name == "zeros off the label":
        gradient = gradient * onehot
    elif name == "no label":
        gradient = -weight.unsqueeze(-1) * p
    elif name == "rounded before the label is added":
        probability = (-weight.unsqueeze(-1) * p).to(logits.dtype)
        return probability + (weight.unsqueeze(-1) * onehot).to(logits.dtype)
    elif name == "last column skipped":
        gradient[:, -1] = 0
    elif name == "one row's weight taken for another":
        gradient = weight.roll(1).unsqueeze(-1) * (onehot - p)
    else:
        assert name == "nothing"
    return gradient.to(logits.dtype)


MISTAKES = [
    "zeros off the label",
    "no label",
    "rounded before the label is added",
    "last column skipped",
    "one row's weight taken for another",
]


MISTAKES_BY_DTYPE = [
    pytest.param(mistake, dtype, id=f"{mistake}-{str(dtype)[6:]}")
    for mistake, dtype in itertools.product(["nothing", *MISTAKES], [torch.float32, torch.bfloat16, torch.float16])
    if not (mistake == "rounded before the label is added" and dtype == torch.float32)  # where nothing is rounded
]


@pytest.mark.parametrize("vocab", [1003, 92553])
@pytest.mark.parametrize(("mistake", "dtype"), MISTAKES_BY_DTYPE)
def test_a_wrong_gradient_is_found(mistake: str, dtype: torch.dtype, vocab: int) -> None:
    labels = torch.tensor([0, 5, vocab - 1, 17])
    logits = make_logits(4, vocab, dtype, "flat", labels, seed=1)
    weight = torch.tensor([0.5, -1.0, 0.25, 2.0])
    if mistake == "rounded before the label is added":
        logits[range(4), labels] = 16  # confident, so that onehot - p cancels
    _, exact, share = token_logp_exact(logits, labels, weight)
    _, eager = token_logp_eager(logits, labels, weight)
    actual = wrong_gradient(mistake, logits, labels, weight)
    if mistake == "nothing":
        assert_gradient_as_accurate(actual, eager, exact, share)
    else:
        with pytest.raises(AssertionError, match=r"error .* allowed"):
            assert_gradient_as_accurate(actual, eager, exact, share)


def test_a_running_float32_sum_is_found() -> None:
    labels = torch.arange(3)
    logits = make_logits(3, 151674, torch.float32, "flat", labels, seed=2)
    exact, _, _ = token_logp_exact(logits, labels)
    eager, _ = token_logp_eager(logits, labels)
    largest = logits.amax(-1)
    running = (logits - largest.unsqueeze(-1)).exp().numpy().cumsum(-1, dtype=np.float32)[:, -1]
    wrong = logits[range(3), labels] - largest - torch.from_numpy(running).log()
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        assert_as_accurate(wrong, eager, exact)


def test_a_logarithm_added_to_a_large_maximum_is_found() -> None:
    labels = torch.arange(4)
    logits = make_logits(4, 100, torch.float32, "offset", labels, seed=3)
    exact, _, _ = token_logp_exact(logits, labels)
    eager, _ = token_logp_eager(logits, labels)
    wrong = logits[range(4), labels] - logits.logsumexp(-1)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        assert_as_accurate(wrong, eager, exact)


def test_the_bound_minds_shape_infinity_and_nan() -> None:
    exact = np.array([1.0, -np.inf, np.nan])
    good = torch.tensor([1.0, -torch.inf, torch.nan])
    assert_as_accurate(good, good, exact)
    for wrong in ([1.0, torch.inf, torch.nan], [1.0, -torch.inf, 0.0], [torch.nan, -torch.inf, torch.nan]):
        with pytest.raises(AssertionError, match=r"result\[\d\]: got"):
            assert_as_accurate(torch.tensor(wrong), good, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(good[:2], good[:2], exact)


def test_float64_is_judged_by_more_than_float64() -> None:
    exact, gradient, _ = token_logp_exact(torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 3]))
    assert exact.dtype == gradient.dtype == np.longdouble
    assert accumulation_eps(torch.float64) < 1e-15 < accumulation_eps(torch.bfloat16)
