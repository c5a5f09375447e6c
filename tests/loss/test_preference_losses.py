"""Compares the preference losses with the formulas of their papers, and with TRL. Also tests extreme inputs."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import make_case
from torch import Tensor

from mpo_ext import MPOConfig, linear_mpo_loss, mpo_loss
from mpo_ext.loss.preference import LOSSES, preference_loss

BETA = 0.1
SMOOTHING = {name: 0.2 for name, loss in LOSSES.items() if loss.label_smoothing != "zero"}
DELTA = {name: -0.75 for name, loss in LOSSES.items() if loss.takes_delta}
LOGPS = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
TOKENS = ("chosen_tokens", "rejected_tokens")

Case = dict[str, Tensor]


def make_pairs(seed: int = 0, pairs: int = 6, dtype: torch.dtype = torch.float64) -> Case:
    """Returns token counts, and log-probs of a policy and its reference. The policy has -2 to -0.1 nats per token."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(pairs, generator=generator, dtype=torch.float64)

    case = {name: torch.randint(1, 60, (pairs,), generator=generator) for name in TOKENS}
    for side in ("chosen", "rejected"):
        case[f"{side}_logp"] = case[f"{side}_tokens"] * uniform(-2, -0.1)
        case[f"ref_{side}_logp"] = case[f"{side}_logp"] + uniform(-30, 30).clamp(max=0.9 * -case[f"{side}_logp"])
    return {name: value.to(dtype) if name in LOGPS else value for name, value in case.items()}


def compute(name: str, case: Case, beta: float = BETA, **settings: Any) -> Tensor:
    """Computes a loss with mpo_ext. ``settings`` replace the tests' default label smoothing and delta."""
    defaults = {"label_smoothing": SMOOTHING.get(name, 0.0), "delta": DELTA.get(name, 0.0)}
    return preference_loss(name, **case, beta=beta, **{**defaults, **settings})


def with_gradient(case: Case) -> Case:
    """Returns copies of the inputs, in which the policy's log-probs require a gradient."""
    return {name: value.clone().requires_grad_(name in LOGPS[:2]) for name, value in case.items()}


# The formulas of the papers, in decimal numbers of 60 digits: nothing overflows, so they need no rearranging.

Number = Decimal
Row = SimpleNamespace  # chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected of one pair


def sigmoid(x: Number) -> Number:
    return 1 / (1 + (-x).exp())


def log_sigmoid(x: Number) -> Number:
    # Closer to 1 than 60 digits, the logarithm of 1 / (1 + exp(-x)) is -exp(-x).
    return -(-x).exp() if x > 60 else sigmoid(x).ln()


def dpo_margin(p: Row, beta: Number) -> Number:
    return beta * (p.chosen - p.ref_chosen) - beta * (p.rejected - p.ref_rejected)


def conservative(margin: Number, e: Number) -> Number:
    return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def dpo(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    return conservative(dpo_margin(p, beta), e)


def bco(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    good = -log_sigmoid(beta * (p.chosen - p.ref_chosen) - delta)
    bad = -log_sigmoid(-(beta * (p.rejected - p.ref_rejected) - delta))
    return good + bad


def mean_gap(p: Row) -> Number:
    return (p.chosen / p.n_chosen - p.ref_chosen / p.n_chosen) - (
        p.rejected / p.n_rejected - p.ref_rejected / p.n_rejected
    )


def ipo(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    return (mean_gap(p) - 1 / (2 * beta)) ** 2


def robust(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    right, wrong = -log_sigmoid(dpo_margin(p, beta)), -log_sigmoid(-dpo_margin(p, beta))
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)


def rso_hinge(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    return max(Decimal(0), 1 - dpo_margin(p, beta))


def sppo(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    eta = 1 / beta
    won = (p.chosen - p.ref_chosen - eta * (1 - Decimal("0.5"))) ** 2
    lost = (p.rejected - p.ref_rejected - eta * (0 - Decimal("0.5"))) ** 2
    return won + lost


def orpo(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    p_chosen, p_rejected = (p.chosen / p.n_chosen).exp(), (p.rejected / p.n_rejected).exp()
    odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
    return -beta * log_sigmoid(odds_ratio.ln())


def exo(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    win, loss = sigmoid(dpo_margin(p, beta)), sigmoid(-dpo_margin(p, beta))
    return win * (win / (1 - e)).ln() + loss * (loss / e).ln()


def nca(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    good, bad = beta * (p.chosen - p.ref_chosen), beta * (p.rejected - p.ref_rejected)
    return -(log_sigmoid(good) + (log_sigmoid(-good) + log_sigmoid(-bad)) / 2)


def apo_zero(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    return -sigmoid(beta * (p.chosen - p.ref_chosen)) + sigmoid(beta * (p.rejected - p.ref_rejected)) + 1


def apo_down(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    return sigmoid(beta * (p.chosen - p.ref_chosen)) + 1 - sigmoid(dpo_margin(p, beta))


def discopop(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    margin = dpo_margin(p, beta)
    share = sigmoid(margin / Decimal("0.05"))
    return (1 - share) * -log_sigmoid(margin) + share * (-margin).exp()


def normalised_dpo(p: Row, beta: Number, e: Number, delta: Number) -> Number:
    return -log_sigmoid(beta * mean_gap(p))


PER_PAIR: dict[str, Callable[[Row, Number, Number, Number], Number]] = {
    "sigmoid": dpo,
    "bco_pair": bco,
    "ipo": ipo,
    "robust": robust,
    "hinge": rso_hinge,
    "sppo_hard": sppo,
    "orpo": orpo,
    "exo_pair": exo,
    "nca_pair": nca,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": normalised_dpo,
}


def aot(better: Sequence[Number], worse: Sequence[Number], beta: Number, e: Number) -> list[Number]:
    """Computes the AOT losses with label smoothing ``e``.

    The k-th smallest value of ``better`` is compared with the k-th smallest value of ``worse``.
    """
    losses = []
    for value in better:
        rank = sum(other < value for other in better)
        losses.append(conservative(beta * (value - sorted(worse)[rank]), e))
    return losses


def exact(name: str, rows: Sequence[Row], beta: float, label_smoothing: float, delta: float) -> list[Number]:
    """Returns the loss of each pair; 0 for a pair without chosen or without rejected tokens."""
    b, e, d = Decimal(beta), Decimal(label_smoothing), Decimal(delta)
    whole = [row for row in rows if row.n_chosen and row.n_rejected]
    if name == "aot":
        policy = [row.chosen - row.rejected for row in whole]
        reference = [row.ref_chosen - row.ref_rejected for row in whole]
        losses = aot(policy, reference, b, e)
    elif name == "aot_unpaired":
        good = [row.chosen - row.ref_chosen for row in whole]
        bad = [row.rejected - row.ref_rejected for row in whole]
        losses = aot(good, bad, b, e)
    else:
        losses = [PER_PAIR[name](row, b, e, d) for row in whole]
    filled = iter(losses)
    return [next(filled) if row.n_chosen and row.n_rejected else Decimal(0) for row in rows]


def rows_of(case: Case) -> list[Row]:
    keys = ("chosen", "rejected", "ref_chosen", "ref_rejected", "n_chosen", "n_rejected")
    columns = [[Decimal(number) for number in case[name].tolist()] for name in (*LOGPS, *TOKENS)]
    return [SimpleNamespace(**dict(zip(keys, row, strict=True))) for row in zip(*columns, strict=True)]


def exact_with_gradient(name: str, case: Case, beta: float = BETA, **settings: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (losses, gradient of the chosen log-probs, gradient of the rejected log-probs).

    The gradients are those of the sum of the losses. They are central differences with 60 decimal digits.
    """
    values = {"label_smoothing": SMOOTHING.get(name, 0.0), "delta": DELTA.get(name, 0.0), **settings}
    with localcontext() as context:
        context.prec = 60
        context.Emax, context.Emin = 10**9, -(10**9)
        step = Decimal("1e-20")
        rows = rows_of(case)
        losses = exact(name, rows, beta, **values)
        gradients = []
        for side in ("chosen", "rejected"):
            slopes = []
            for row in rows:
                middle = getattr(row, side)
                sums = []
                for moved in (middle + step, middle - step):
                    setattr(row, side, moved)
                    sums.append(sum(exact(name, rows, beta, **values)))
                setattr(row, side, middle)
                slopes.append(float((sums[0] - sums[1]) / (2 * step)))
            gradients.append(torch.tensor(slopes, dtype=torch.float64))
        return torch.tensor([float(loss) for loss in losses], dtype=torch.float64), gradients[0], gradients[1]


def assert_exact(name: str, case: Case, rtol: float, atol: float, beta: float = BETA, **settings: float) -> None:
    leaves = with_gradient(case)
    losses = compute(name, leaves, beta, **settings)
    assert losses.dtype == case["chosen_logp"].dtype
    losses.sum().backward()
    wanted = exact_with_gradient(name, case, beta, **settings)
    found = (losses.detach(), leaves["chosen_logp"].grad, leaves["rejected_logp"].grad)
    for part, ours, theirs in zip(("loss", "d chosen", "d rejected"), found, wanted, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=rtol, atol=atol, msg=lambda text, part=part: f"{name}, {part}: {text}"
        )


def test_every_loss_has_a_formula_here() -> None:
    assert set(LOSSES) == {*PER_PAIR, "aot", "aot_unpaired"}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses_and_gradients_are_those_of_the_paper(name: str, beta: float) -> None:
    assert_exact(name, make_pairs(), rtol=1e-12, atol=1e-13, beta=beta)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32_and_close(name: str) -> None:
    assert_exact(name, make_pairs(dtype=torch.float32), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", SMOOTHING)
def test_label_smoothing(name: str) -> None:
    least = [0.0] if LOSSES[name].label_smoothing == "optional" else []
    for share in (*least, 0.001, 0.45):
        assert_exact(name, make_pairs(1), rtol=1e-11, atol=1e-13, label_smoothing=share)


@pytest.mark.parametrize("name", LOSSES)
def test_int32_tokens_and_no_pairs(name: str) -> None:
    case = make_pairs()
    narrow = {key: value.int() if key in TOKENS else value for key, value in case.items()}
    assert compute(name, narrow).equal(compute(name, case))
    assert compute(name, {key: value[:0] for key, value in case.items()}).shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    case = with_gradient(make_pairs(2, pairs=4))
    case["rejected_tokens"][1] = 0

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return compute(name, {**case, "chosen_logp": chosen, "rejected_logp": rejected})

    assert torch.autograd.gradcheck(losses, (case["chosen_logp"], case["rejected_logp"]))


@pytest.mark.parametrize("tensor", [False, True])
def test_delta_is_a_constant_of_the_loss(tensor: bool) -> None:
    delta = torch.tensor(2.5, dtype=torch.float64, requires_grad=True) if tensor else 2.5
    case = with_gradient(make_pairs())
    losses = compute("bco_pair", case, delta=delta)
    torch.testing.assert_close(losses.detach(), exact_with_gradient("bco_pair", make_pairs(), delta=2.5)[0])
    losses.sum().backward()
    assert not tensor or delta.grad is None
    single = {name: value.float() if name in LOGPS else value for name, value in make_pairs().items()}
    assert compute("bco_pair", single, delta=delta).dtype == torch.float32


def test_ipo_is_of_log_ratios_per_token() -> None:
    one = dict(zip(LOGPS, torch.tensor([[-8.0], [-9.0], [-20.0], [-6.0]]), strict=True))
    one |= dict(zip(TOKENS, torch.tensor([[4], [3]]), strict=True))
    assert compute("ipo", one).item() == pytest.approx((12 / 4 - -3 / 3 - 5) ** 2)  # the paper's sums: (12 + 3 - 5)^2


# Extreme inputs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_margins_of_ten_thousand_nats(name: str, dtype: torch.dtype) -> None:
    far = 10_000
    sums = [(c, r, rc, rr) for c in (-1, -far) for r in (-2, -far) for rc in (-1, -far) for rr in (-2, -far)]
    # All pairs differ: the gradient of sorting equal numbers is ambiguous.
    sums = [(c - i, r - 3 * i, rc - 5 * i, rr - 11 * i) for i, (c, r, rc, rr) in enumerate(sums)]
    case = dict(zip(LOGPS, torch.tensor(sums, dtype=dtype).unbind(1), strict=True))
    case |= {name: torch.full((len(sums),), tokens) for name, tokens in zip(TOKENS, (1, 4), strict=True)}
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_exact(name, case, rtol=tolerance, atol=tolerance, beta=1.0)
    assert_exact(name, case, rtol=tolerance, atol=tolerance, beta=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, 0.0), (0.0, -7.0), (-7.0, 0.0), (-1e-30, -1e4), (-1e-4, -7.0)])
def test_orpo_survives_certainty(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    leaves = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (chosen, rejected)]
    tokens = torch.tensor([2])
    loss = preference_loss("orpo", *leaves, None, None, tokens, tokens, beta=BETA)
    loss.backward()
    log_odds = [min(value / 2, -eps) for value in (chosen, rejected)]
    log_odds = [value - math.log(-math.expm1(value)) for value in log_odds]
    assert loss.item() == pytest.approx(BETA * math.log1p(math.exp(log_odds[1] - log_odds[0])), rel=1e-5)
    assert all(leaf.grad.isfinite() for leaf in leaves)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.0, -25.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_with_an_empty_side_is_as_if_it_were_not_there(name: str, value: float) -> None:
    rest = make_pairs(3, pairs=4)
    leaves = with_gradient(rest)
    wanted = compute(name, leaves)
    wanted.sum().backward()

    places = torch.tensor([1, 3, 4, 6])  # pairs 0, 2 and 5 lack the chosen side, the rejected side, or both
    case = {key: torch.full((7,), value).to(column.dtype) for key, column in rest.items() if key in LOGPS}
    case["chosen_tokens"] = torch.tensor([0, 0, 5, 0, 0, 0, 0])
    case["rejected_tokens"] = torch.tensor([3, 0, 0, 0, 0, 0, 0])
    case = with_gradient({key: column.index_copy(0, places, rest[key]) for key, column in case.items()})
    with torch.autograd.set_detect_anomaly(True):
        found = compute(name, case)
        found.sum().backward()
    for ours, theirs in (
        (found, wanted),
        (case["chosen_logp"].grad, leaves["chosen_logp"].grad),
        (case["rejected_logp"].grad, leaves["rejected_logp"].grad),
    ):
        assert ours[places].equal(theirs)
        assert ours[[0, 2, 5]].equal(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_nothing_but_empty_pairs_is_zero(name: str) -> None:
    case = with_gradient(make_pairs())
    case["chosen_tokens"].zero_()
    losses = compute(name, case)
    losses.sum().backward()
    assert not losses.any()
    assert not case["chosen_logp"].grad.any()
    assert not case["rejected_logp"].grad.any()


@pytest.mark.parametrize("argument", LOGPS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_shows(name: str, argument: str) -> None:
    case = make_pairs()
    case["chosen_tokens"][4] = 0
    case[argument][2] = math.nan
    losses = compute(name, case)
    if argument.startswith("ref") and not LOSSES[name].needs_reference:
        assert losses.isfinite().all()
    else:
        assert not losses.sum().isfinite()
        assert LOSSES[name].whole_batch or losses.isnan().tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigmoid", math.log(2)),
        ("bco_pair", math.log1p(math.exp(-0.75)) + math.log1p(math.exp(0.75))),
        ("ipo", 25.0),
        ("robust", math.log(2)),
        ("hinge", 1.0),
        ("sppo_hard", 50.0),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("exo_pair", math.log(1.25)),  # (log(1 / 2 / 0.8) + log(1 / 2 / 0.2)) / 2
        ("nca_pair", 2 * math.log(2)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", (math.log(2) + 1) / 2),
        ("sigmoid_norm", math.log(2)),
    ],
)
def test_at_the_reference_policy(name: str, value: float) -> None:
    case = make_pairs()
    case |= {"ref_chosen_logp": case["chosen_logp"], "ref_rejected_logp": case["rejected_logp"]}
    torch.testing.assert_close(compute(name, case), torch.full((6,), value, dtype=torch.float64))


def test_orpo_of_equal_probabilities() -> None:
    case = make_pairs()
    case |= {"rejected_logp": 2 * case["chosen_logp"], "rejected_tokens": 2 * case["chosen_tokens"]}
    torch.testing.assert_close(compute("orpo", case), torch.full((6,), BETA * math.log(2), dtype=torch.float64))


# The registry of losses.


@pytest.mark.parametrize("name", LOSSES)
def test_needs_reference(name: str) -> None:
    case = make_pairs()
    without = {**case, "ref_chosen_logp": None, "ref_rejected_logp": None}
    if LOSSES[name].needs_reference:
        for argument in LOGPS[2:]:
            with pytest.raises(TypeError, match=f"^{argument} must be a torch.Tensor, got NoneType"):
                compute(name, {**case, argument: None})
    else:
        assert compute(name, without).equal(compute(name, case))


@pytest.mark.parametrize("name", LOSSES)
def test_whole_batch(name: str) -> None:
    case = make_pairs(4)
    halves = [compute(name, {key: value[part] for key, value in case.items()}) for part in (slice(3), slice(3, None))]
    assert compute(name, case).allclose(torch.cat(halves), rtol=1e-12) == (not LOSSES[name].whole_batch)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_does_not_depend_on_the_order_of_pairs(name: str) -> None:
    case = make_pairs(5)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = {key: value[order] for key, value in case.items()}
    torch.testing.assert_close(compute(name, shuffled), compute(name, case)[order])


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_gets_no_gradient(name: str) -> None:
    case = {key: value.clone().requires_grad_(key in LOGPS) for key, value in make_pairs().items()}
    compute(name, case).sum().backward()
    assert case["ref_chosen_logp"].grad is None
    assert case["ref_rejected_logp"].grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_a_call_leaves_its_arguments_alone(name: str) -> None:
    case = make_pairs()
    case["chosen_tokens"][0] = 0
    before = {key: value.clone() for key, value in case.items()}
    compute(name, case)
    assert all(case[key].equal(value) for key, value in before.items())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_terms_of_mpo_loss(label_smoothing: float) -> None:
    case = make_case(torch.float64, 31, pairs=3)
    config = MPOConfig(beta=0.3, label_smoothing=label_smoothing)
    output = mpo_loss(case.logits, case.labels, case.ref_logp, config=config, reward_shift=0.4)
    sides = (output.chosen_logp, output.rejected_logp, *case.ref_logp.double().split(3), *output.tokens.split(3))
    dpo_losses = preference_loss("sigmoid", *sides, beta=0.3, label_smoothing=label_smoothing)
    bco_losses = preference_loss("bco_pair", *sides, beta=0.3, delta=0.4)
    assert output.tokens.all()
    torch.testing.assert_close(dpo_losses.mean(), output.dpo_loss)
    torch.testing.assert_close(bco_losses.mean(), output.bco_loss)


# TRL.

TRL_INPUT = {
    "chosen_logp": [-31.5, -7.25, -60.0, -18.0],
    "rejected_logp": [-44.0, -5.5, -52.5, -26.0],
    "ref_chosen_logp": [-40.0, -6.0, -58.0, -23.0],
    "ref_rejected_logp": [-39.0, -9.0, -47.0, -28.5],
    "chosen_tokens": [24, 5, 61, 9],
    "rejected_tokens": [30, 7, 40, 13],
}

# Results of TRL 1.16.0 for each pair of TRL_INPUT at beta 0.1; for losses over the whole batch, the mean.
# Label smoothing is 0.2 if TRL supports it; TRL has no delta. "orpo" is -losses of ORPOTrainer.odds_ratio_loss.
TRL_OUTPUT = {
    "sigmoid": [0.230508571364, 0.958589087871, 0.533382155419, 0.575939419879],
    "bco_pair": [0.829942052622, 1.64098119074, 1.25363135084, 1.30001640406],
    "ipo": [20.0629340278, 33.0625, 23.9638336889, 21.4994703777],
    "robust": [-0.219491428636, 1.1169224212, 0.416715488752, 0.492606086546],
    "hinge": [0.0, 1.475, 0.65, 0.75],
    "sppo_hard": [12.25, 111.3125, 49.25, 56.25],
    "aot": [0.609248832328],
    "aot_unpaired": [0.600380455904],
    "orpo": [0.0595692172647, 0.131720885634, 0.0480265133083, 0.0693147182465],
    "exo_pair": [0.000106928780608, 0.412166244461, 0.118147286944, 0.144700524197],
    "nca_pair": [1.19583609475, 1.51558963069, 1.3249545448, 1.37408518621],
    "apo_zero": [0.676973526324, 1.11782695229, 0.915698406302, 0.939717169684],
    "apo_down": [0.906437514275, 1.08535713115, 0.86354842377, 1.06028283032],
    "discopop": [0.259240260646, 0.95863769489, 0.704532021243, 0.777443062209],
    "sigmoid_norm": [0.667444559776, 0.731350140827, 0.687925230805, 0.675149714593],
}

# TRL rounds these to float32 for float64 log-probs: all of ORPO, and the label smoothing of EXO.
TRL_ERROR = {"orpo": 2e-7, "exo_pair": 5e-8}


def trl_case() -> Case:
    return {
        name: torch.tensor(values, dtype=torch.float64 if name in LOGPS else torch.int64)
        for name, values in TRL_INPUT.items()
    }


def as_in_trl(name: str) -> dict[str, float]:
    """Returns arguments for the same loss as in TRL: delta 0, and no label smoothing for "sigmoid"."""
    return {"delta": 0.0, "label_smoothing": 0.0} if name == "sigmoid" else {"delta": 0.0}


def trl_loss(name: str, case: Case, label_smoothing: float) -> float:
    """Returns the mean loss that a method of TRL's trainer computes. The trainer and the model are fake objects."""
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
        means = [case[f"{side}_logp"] / case[f"{side}_tokens"] for side in ("chosen", "rejected")]
        return -ORPOTrainer.odds_ratio_loss(trainer, *means)[0].double().mean().item()
    from trl import DPOTrainer

    sums = torch.cat([case["chosen_logp"], case["rejected_logp"]])
    tokens = torch.cat([case["chosen_tokens"], case["rejected_tokens"]])
    mask = torch.arange(int(tokens.max()) + 1) <= tokens[:, None]
    mask[:, 0] = False  # a prompt of one token
    per_token = mask[:, 1:] * (sums / tokens)[:, None]
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=0.05),
        beta=BETA,
        label_smoothing=label_smoothing,
        loss_types=[name],
        loss_weights=[1.0],
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.int64),
        "attention_mask": mask.long(),
        "completion_mask": mask.long(),
        "ref_chosen_logps": case["ref_chosen_logp"],
        "ref_rejected_logps": case["ref_rejected_logp"],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()


def trl_losses(name: str, case: Case) -> list[float]:
    """Returns TRL's loss of each pair, computed in batches of one pair.

    If the loss is defined only on a whole batch, returns a list with one number, the loss of the batch.
    """
    label_smoothing = 0.0 if name == "sigmoid" else SMOOTHING.get(name, 0.0)
    if LOSSES[name].whole_batch:
        return [trl_loss(name, case, label_smoothing)]
    pairs = range(len(case["chosen_logp"]))
    return [trl_loss(name, {key: value[i : i + 1] for key, value in case.items()}, label_smoothing) for i in pairs]


def our_losses(name: str, case: Case) -> list[float]:
    losses = compute(name, case, **as_in_trl(name))
    return [losses.mean().item()] if LOSSES[name].whole_batch else losses.tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_values_of_trl_1_16(name: str) -> None:
    assert our_losses(name, trl_case()) == pytest.approx(TRL_OUTPUT[name], rel=1e-11, abs=TRL_ERROR.get(name, 0.0))


@pytest.mark.parametrize("name", LOSSES)
def test_the_installed_trl(name: str) -> None:
    trl = pytest.importorskip("trl", reason="trl is not a dependency of the package")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"trl_loss() calls a private method of TRL 1.16, and this is {trl.__version__}")
    for case in (trl_case(), make_pairs(6)):
        assert our_losses(name, case) == pytest.approx(trl_losses(name, case), rel=1e-11, abs=TRL_ERROR.get(name, 0.0))


# Bad input.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sigmod", "unknown loss 'sigmod'; did you mean 'sigmoid'?"),
        ("aot_pair", "unknown loss 'aot_pair'; did you mean 'aot_unpaired'?"),
        ("sft", f"unknown loss 'sft'; known losses: {', '.join(LOSSES)}"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        preference_loss(name, **make_pairs(), beta=BETA)
    assert str(error.value) == message


def test_a_name_that_is_no_string() -> None:
    with pytest.raises(TypeError, match=r"^name must be a string, got \['sigmoid'\]"):
        preference_loss(["sigmoid"], **make_pairs(), beta=BETA)


@pytest.mark.parametrize("argument", [*LOGPS, *TOKENS])
def test_a_wrong_tensor_is_named(argument: str) -> None:
    case = make_pairs()
    shorter = {**case, argument: case[argument][:5]}
    first = "rejected_logp" if argument == "chosen_logp" else argument  # the others are compared with chosen_logp
    with pytest.raises(ValueError, match=rf"^{first} must be \[{5 if first != argument else 6}\] as chosen_logp is"):
        compute("sigmoid", shorter)
    with pytest.raises(ValueError, match=rf"^{argument} must be \[B\], got shape \[6, 1\]"):
        compute("sigmoid", {**case, argument: case[argument][:, None]})
    with pytest.raises(TypeError, match=rf"^{argument} must be torch.*, got torch.bool"):
        compute("sigmoid", {**case, argument: case[argument].bool()})
    with pytest.raises(TypeError, match=rf"^{argument} must be a torch.Tensor, got list"):
        compute("sigmoid", {**case, argument: case[argument].tolist()})
    if argument != "chosen_logp":
        with pytest.raises(ValueError, match=rf"^{argument} must be on the device of chosen_logp, cpu, got meta"):
            compute("sigmoid", {**case, argument: case[argument].to("meta")})


@pytest.mark.parametrize("argument", LOGPS)
def test_log_probs_of_several_dtypes_are_refused(argument: str) -> None:
    case = make_pairs()
    with pytest.raises(TypeError, match=r"^\w+_logp must be torch\.float"):
        compute("sigmoid", {**case, argument: case[argument].float()})
    with pytest.raises(TypeError, match=f"^{argument} must be torch.float"):
        compute("sigmoid", {**case, argument: case[argument].bfloat16()})


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("sigmoid", {"beta": 0.0}, ValueError, "beta must be positive and finite, got 0.0"),
        ("sigmoid", {"beta": math.nan}, ValueError, "beta must be positive and finite, got nan"),
        ("sigmoid", {"beta": "0.1"}, TypeError, "beta must be a number, got '0.1'"),
        ("sigmoid", {"label_smoothing": 0.5}, ValueError, "label_smoothing must be in [0, 0.5), got 0.5"),
        ("sigmoid", {"label_smoothing": None}, TypeError, "label_smoothing must be a number, got None"),
        (
            "hinge",
            {"label_smoothing": 0.1},
            ValueError,
            "label_smoothing must be 0 for the loss 'hinge', which has none, got 0.1",
        ),
        (
            "exo_pair",
            {"label_smoothing": 0},
            ValueError,
            "label_smoothing must be positive for the loss 'exo_pair' (say 0.001), got 0",
        ),
        ("bco_pair", {"delta": math.inf}, ValueError, "delta must be finite, got inf"),
        ("bco_pair", {"delta": "0"}, TypeError, "delta must be a number, got '0'"),
        (
            "bco_pair",
            {"delta": torch.zeros(2)},
            ValueError,
            "delta must be a number or a 0-d tensor, got shape [2]",
        ),
        (
            "sigmoid",
            {"delta": 0.5},
            ValueError,
            "delta must be 0 for the loss 'sigmoid', which has no reward shift, got 0.5",
        ),
        (
            "nca_pair",
            {"delta": torch.tensor(0.5)},
            ValueError,
            "delta must be 0 for the loss 'nca_pair', which has no reward shift, got 0.5",
        ),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        preference_loss(name, **make_pairs(), **{"beta": BETA, **settings})
    assert str(raised.value) == message


def test_the_former_name_of_the_module_still_works() -> None:
    import mpo_ext
    from mpo_ext import losses
    from mpo_ext.loss import mpo_loss

    assert losses.preference_loss is mpo_ext.losses.preference_loss is preference_loss
    assert mpo_loss is mpo_ext.mpo_loss


def test_an_impossible_rejected_response_gives_no_nan() -> None:
    """A rejected response of probability 0 has the margin infinity, and no loss without label smoothing."""
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-torch.inf, -3.0])
    references = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -3.0])
    tokens = torch.tensor([3, 3])
    loss = preference_loss("sigmoid", chosen, rejected, *references, tokens, tokens, beta=0.1)
    assert loss.tolist() == pytest.approx([0.0, math.log(2)])


def test_the_reference_backend_takes_an_impossible_label_and_a_wider_bias() -> None:
    torch.manual_seed(0)
    labels, reference = torch.randint(5, (2, 3)), torch.full((2,), -3.0)
    logits = torch.randn(2, 3, 5)
    logits[1, 1, labels[1, 1]] = -torch.inf
    losses = [mpo_loss(logits, labels, reference, shift=False, backend=name).loss for name in ("reference", "cpu")]
    assert losses[0].isfinite()
    torch.testing.assert_close(*losses)
    hidden, weight, bias = torch.randn(2, 3, 4).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(5)
    losses = [
        linear_mpo_loss(hidden, weight, labels, reference, bias=bias, shift=False, backend=name).loss
        for name in ("reference", "cpu")
    ]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
