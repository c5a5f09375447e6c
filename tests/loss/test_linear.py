"""Compares the losses from hidden states with the oracle on float64 logits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import device_of
from oracle import (
    FIELDS,
    STATS,
    Array,
    ExactHead,
    accumulation_eps,
    assert_as_accurate,
    assert_product_as_accurate,
    head_eager,
    head_exact,
    mpo_eager,
    mpo_exact,
    token_logp_eager,
    token_logp_exact,
)
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from mpo_ext import MPOConfig, MPOOutput, RewardShift, linear_mpo_loss, linear_token_logp, mpo_loss
from mpo_ext.ops import checks, matmul
from mpo_ext.ops import linear as linear_ops
from mpo_ext.ops import logits as ops
from mpo_ext.ops import tiles as tile_ops

MODES: dict[str, dict[str, bool]] = {
    "recompute": {"recompute": True, "is_frozen": False},
    "keep": {"recompute": False, "is_frozen": False},
    "frozen": {"recompute": True, "is_frozen": True},
}
ALL = ("hidden", "weight", "bias")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Returns a key of ``MODES``: logits are recomputed or stored for the backward pass, or the head is frozen."""
    return request.param


# Cases.


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A test case of the losses from hidden states.

    Instances compare by identity, so that functions can cache results by instance.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    ref_logp: Tensor | None = None
    cu_seqlens: Tensor | None = None
    shift: bool = True
    head: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that can require a gradient, by name."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def pairing(self) -> dict[str, Any]:
        """The arguments ``ref_logp``, ``cu_seqlens`` and ``shift`` of mpo_loss."""
        return {"ref_logp": self.ref_logp, "cu_seqlens": self.cu_seqlens, "shift": self.shift}

    @functools.cached_property
    def eps(self) -> float:
        """The machine epsilon of the dtype in which the kernels must accumulate."""
        return accumulation_eps(torch.promote_types(self.hidden.dtype, self.weight.dtype))

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of losses and log-probs."""
        return torch.float64 if torch.float64 in (self.hidden.dtype, self.weight.dtype) else torch.float32

    @functools.cached_property
    def exact_head(self) -> ExactHead:
        """The exact logits, with methods for exact gradients."""
        return head_exact(self.hidden, self.weight, self.bias, **self.head)

    @property
    def logit_noise(self) -> float:
        """The scale of the rounding errors of logits: the machine epsilon times the largest ``sum(|h_i w_i|)``."""
        return self.eps * float(self.exact_head.magnitude.max(initial=1.0))


def make_linear(
    dtype: torch.dtype,
    vocab: int,
    depth: int,
    *,
    labelled: float = 0.5,
    packed: bool = False,
    has_bias: bool = False,
    shift: bool = True,
    length: int = 6,
    seed: int = 0,
    **head: Any,
) -> Linear:
    """Returns a test case of two pairs. At every third position, the hidden state makes the label likely."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * vocab + depth)
    lengths = [length - i % 3 for i in range(4)] if packed else [length] * 4
    rows = sum(lengths)
    starts = np.cumsum([0, *lengths])
    labels = torch.randint(vocab, (rows,), generator=generator)
    keep = torch.rand(rows, generator=generator) < labelled
    if 0 < labelled < 1:
        keep[torch.from_numpy(starts[1:] - 1)] = True
    labels = torch.where(keep, labels, -100)
    targets = torch.cat([labels[1:], labels[:1]]) if shift else labels
    weight = torch.randn(vocab, depth, generator=generator, dtype=torch.float64) / math.sqrt(depth)
    hidden = torch.randn(rows, depth, generator=generator, dtype=torch.float64)
    hidden[::3] += 6 * weight[targets.clamp(min=0)][::3] * math.copysign(1, head.get("logit_scale", 1.0))
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype) if has_bias else None
    ref_logp = torch.randn(4, generator=generator) * 5 - 5 * keep.sum() / 4
    cu_seqlens = torch.from_numpy(starts).to(torch.int32) if packed else None
    if not packed:
        hidden, labels = hidden.view(4, length, depth), labels.view(4, length)
    return Linear(hidden.to(dtype), weight.to(dtype), labels, bias, ref_logp, cu_seqlens, shift, head)


def leaves(case: Linear, wanted: tuple[str, ...], layout: Callable[[Tensor], Tensor] = Tensor.clone) -> dict[str, Any]:
    """Returns copies of the tensors of a case by name. The function ``layout`` makes each copy.

    Only the tensors named in ``wanted`` require a gradient.
    """
    return {name: layout(tensor).requires_grad_(name in wanted) for name, tensor in case.tensors.items()}


def gradients_of(value: Tensor, tensors: dict[str, Tensor], upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the gradients of ``value`` by name, for the tensors that require a gradient."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(value, list(wanted.values()), upstream)
    for gradient, tensor in zip(gradients, wanted.values(), strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
    return dict(zip(wanted, gradients, strict=True))


def wanted_in(mode: str) -> tuple[str, ...]:
    """Returns the names of the tensors that need a gradient in a mode."""
    return ("hidden",) if MODES[mode]["is_frozen"] else ALL


def placed(backend: str, *tensors: Tensor | None) -> Any:
    """Moves tensors to the device of a backend. Skips the test if a GPU kernel would get float64."""
    device = device_of(backend)
    if device != "cpu" and backend != "reference" and any(x is not None and x.dtype == torch.float64 for x in tensors):
        pytest.skip("the kernels of a GPU take no float64")
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return moved[0] if len(moved) == 1 else moved


def fetched(output: MPOOutput) -> MPOOutput:
    """Returns an output with all its tensors on the CPU."""
    fields = {name: value.cpu() for name, value in output._asdict().items() if isinstance(value, Tensor)}
    return output._replace(**fields, stats={name: value.cpu() for name, value in output.stats.items()})


def run(
    case: Linear,
    backend: str,
    *,
    wanted: tuple[str, ...] = ALL,
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    **options: Any,
) -> tuple[MPOOutput, dict[str, Tensor]]:
    """Runs linear_mpo_loss on a case. Returns its output and the gradients of its loss."""
    tensors = leaves(case, wanted, layout)
    hidden, weight, bias = placed(backend, tensors["hidden"], tensors["weight"], tensors.get("bias"))
    ref_logp, cu_seqlens = placed(backend, case.ref_logp, case.cu_seqlens)
    output = linear_mpo_loss(
        hidden, weight, case.labels, ref_logp, bias=bias, cu_seqlens=cu_seqlens, shift=case.shift, **case.head,
        backend=backend, **options,
    )  # fmt: skip
    return fetched(output), gradients_of(output.loss, tensors)


def run_rows(
    case: Linear, backend: str, *, wanted: tuple[str, ...] = ALL, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs linear_token_logp on a case. Returns the log-probs, and the gradients by name.

    The upstream gradient is ``upstream_of(case)``.
    """
    tensors = leaves(case, wanted)
    hidden, weight, bias = placed(backend, tensors["hidden"], tensors["weight"], tensors.get("bias"))
    options = {"shift": False, **case.head, **options}
    logp = linear_token_logp(hidden, weight, case.labels, bias=bias, backend=backend, **options).cpu()
    return logp.detach(), gradients_of(logp, tensors, upstream_of(case))


# Comparisons.


def eager_gradients(case: Linear, logits: Tensor, by_logits: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backpropagates ``by_logits``, the gradient of the logits. Returns the gradients of ``tensors`` by name."""
    return dict(zip(tensors, torch.autograd.grad(logits, list(tensors.values()), by_logits), strict=True))


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Reference gradients of hidden, weight and bias, and the scales of the allowed errors.

    The gradient of the logits is ``upstream * (onehot(label) - softmax(logits))``.

    Attributes:
        exact: Exact gradients.
        eager: Gradients of eager torch.
        size: For each gradient entry, the sum of the absolute values of its terms.
        share: Like ``size``, with 1 in place of each nonzero ``upstream``.
        certain: Like ``size``, with ``upstream * onehot(label)`` as the gradient of the logits.
    """

    exact: dict[str, Array]
    eager: dict[str, Tensor]
    size: dict[str, Array]
    share: dict[str, Array]
    certain: dict[str, Array]

    @staticmethod
    def of(case: Linear, logits: Tensor, by_logits: Tensor, tensors: dict[str, Tensor], gradient: Array, share: Array):
        """Returns the reference gradients of a case.

        Args:
            case: Test case with the inputs.
            logits: Logits of eager torch.
            by_logits: Gradient of the logits in eager torch.
            tensors: Inputs from which eager torch computed the logits.
            gradient: Exact gradient of the logits.
            share: ``onehot(label) - softmax(logits)`` of each labelled row.
        """
        used = np.where((gradient != 0).any(-1, keepdims=True), share, 0)
        head = case.exact_head
        eager = dict(zip(tensors, torch.autograd.grad(logits, list(tensors.values()), by_logits), strict=True))
        largest = used.max(-1, keepdims=True)  # that of the label, whose share is the sum of the other shares
        weight = np.abs(gradient).max(-1, keepdims=True) / np.where(largest > 0, largest, 1)
        certain = head.sizes(np.where((used == largest) & (largest > 0), weight, 0))
        return Judgement(head.gradients(gradient), eager, head.sizes(gradient), head.sizes(used), certain)

    def judge(self, case: Linear, gradients: dict[str, Tensor], noise: float) -> None:
        """Raises if a gradient is too inaccurate in comparison with eager torch.

        ``noise`` is the unavoidable error of a row's upstream gradient, d loss / d logp.
        """
        # Eager torch and the kernels round a label's probability p before they compute p - 1. In float64, the error of
        # eager torch may be small by chance, so the limit needs this rounding as a separate term.
        rounding = case.eps / 2 if case.result_dtype == torch.float64 else 0.0
        for name, tensor in gradients.items():
            assert_product_as_accurate(
                tensor,
                self.eager[name],
                self.exact[name],
                self.size[name],
                noise=case.logit_noise + 2 * case.eps,
                extra=noise * self.share[name] + rounding * self.certain[name],
                name=f"gradient by {name}",
            )


def eager_logits(case: Linear, is_widened: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits that plain torch computes, and a dict of the input tensors by name.

    The inputs require a gradient. ``is_widened`` converts half-precision inputs to float32 first. The kernels also
    compute logits in float32, without rounding.
    """
    if is_widened and case.eps > torch.finfo(torch.float64).eps:
        case = dataclasses.replace(case, **{name: tensor.float() for name, tensor in case.tensors.items()})
    tensors = leaves(case, ALL)
    return head_eager(tensors["hidden"], tensors["weight"], tensors.get("bias"), **case.head), tensors


@functools.lru_cache(maxsize=4)
def judged(case: Linear, is_widened: bool, reward_shift: float) -> tuple[Any, dict[str, Any], Judgement]:
    """Returns the exact result, the result of eager torch, and the reference gradients of a case."""
    exact = mpo_exact(case.exact_head.logits, case.labels, **case.pairing, reward_shift=reward_shift)
    logits, tensors = eager_logits(case, is_widened)
    eager = mpo_eager(logits.detach(), case.labels, **case.pairing, reward_shift=reward_shift)
    gradients = Judgement.of(case, logits, eager["gradient"], tensors, exact.gradient, exact.share)
    return exact, eager, gradients


@functools.lru_cache(maxsize=4)
def judged_rows(case: Linear, is_widened: bool, shift: bool) -> tuple[Array, Tensor, Judgement]:
    """Returns (exact log-probs, eager log-probs, reference gradients) of a case.

    The gradients are computed with the upstream gradient ``upstream_of(case)``.
    """
    exact, by_logits, share = token_logp_exact(case.exact_head.logits, case.labels, upstream_of(case), shift=shift)
    logits, tensors = eager_logits(case, is_widened)
    eager, eager_by_logits = token_logp_eager(logits.detach(), case.labels, upstream_of(case), shift=shift)
    return exact, eager, Judgement.of(case, logits, eager_by_logits, tensors, by_logits, share)


def upstream_of(case: Linear) -> Tensor:
    """Returns an upstream gradient for the log-probs of a case."""
    weight = torch.randn(case.labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return weight.to(case.result_dtype)


def assert_matches(
    case: Linear,
    output: MPOOutput,
    gradients: dict[str, Tensor],
    *,
    reward_shift: float = 0.0,
    stats: tuple[str, ...] = (),
) -> None:
    """Checks all fields of the output, and the gradients."""
    exact, eager, judgement = judged(case, output.backend != "reference", reward_shift)
    tokens = int(exact.tokens.max(initial=1))
    row = case.logit_noise
    noise = {name: exact.noise[name] + tokens * row * (0.1 if "reward" in name else 1.0) for name in FIELDS}
    for name in FIELDS:
        value = getattr(output, name)
        assert value.dtype == case.result_dtype, name
        assert_as_accurate(value, eager[name], getattr(exact, name), noise=noise[name], name=name)
    assert output.tokens.tolist() == exact.tokens.tolist()
    assert set(output.stats) == set(stats)
    for name in stats:
        size = row * (1 + math.log(case.weight.shape[0]))
        assert_as_accurate(
            output.stats[name],
            torch.as_tensor(eager["stats"][name]),
            exact.stats[name],
            noise=exact.noise[name] + size,
            name=name,
        )
    judgement.judge(case, gradients, exact.noise["gradient"] + 0.01 * tokens * row)


def assert_rows_match(
    case: Linear, backend: str, logp: Tensor, gradients: dict[str, Tensor], *, shift: bool = False
) -> None:
    """Checks the log-probs and the gradients."""
    exact, eager, judgement = judged_rows(case, backend != "reference", shift)
    assert logp.dtype == case.result_dtype
    assert_as_accurate(logp, eager, exact, noise=case.logit_noise, name="logp")
    judgement.judge(case, gradients, case.eps * float(upstream_of(case).abs().max()))


# Accuracy.

AXES: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "vocab": [1, 2, 7, 301, 1003],
    "depth": [1, 5, 13, 65],
    "labelled": [0.0, 0.2, 0.5, 1.0],
    "packed": [False, True],
    "has_bias": [False, True],
    "shift": [False, True],
    "head": [{}, {"logit_scale": -0.3}, {"softcap": 5.0}, {"logit_scale": 2.0, "softcap": 30.0, "temperature": 0.7}],
    "budget": [1, 3000, 50_000, None],
    "recompute": [True, False, None],
    "wanted": [ALL, ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ("hidden", "weight")],
}


def pairwise(axes: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Returns combinations of values, one value for each axis.

    Every two values of different axes occur together in at least one combination (pairwise testing). With a large
    vocabulary, the budget 1 is replaced by 1500.
    """
    chance = random.Random(seed)
    names = list(axes)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def covered(choice: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}

    chosen = []
    while missing:
        candidates = [{name: chance.randrange(len(axes[name])) for name in names} for _ in range(30)]
        a, i, b, j = min(missing)
        for candidate in candidates:
            candidate[a], candidate[b] = i, j
        best = max(candidates, key=lambda candidate: len(covered(candidate) & missing))
        missing -= covered(best)
        chosen.append({name: axes[name][index] for name, index in best.items()})
    for choice in chosen:
        if choice["budget"] == 1 and choice["vocab"] > 7:
            choice["budget"] = 1500  # tiles of one element take too long here
    return chosen


def id_of(choice: dict[str, Any]) -> str:
    """Returns a test id such as `float32-V301-D5-0.2-...` for a combination of values."""
    head = ",".join(f"{name}={value}" for name, value in choice["head"].items()) or "plain"
    flags = [name for name in ("packed", "has_bias", "shift") if choice[name]]
    flags += {True: ["recompute"], False: ["keep"], None: []}[choice["recompute"]]
    parts = [
        str(choice["dtype"]).removeprefix("torch."),
        f"V{choice['vocab']}",
        f"D{choice['depth']}",
        choice["labelled"],
        head,
        choice["budget"],
        *flags,
        "+".join(choice["wanted"]),
    ]
    return "-".join(map(str, parts))


@functools.lru_cache(maxsize=4)
def _case_of(key: tuple[Any, ...], head: tuple[tuple[str, Any], ...]) -> Linear:
    dtype, vocab, depth, labelled, packed, has_bias, shift = key
    return make_linear(
        dtype, vocab, depth, labelled=labelled, packed=packed, has_bias=has_bias, shift=shift, **dict(head)
    )


def case_of(choice: dict[str, Any]) -> tuple[Linear, dict[str, Any]]:
    """Returns the test case for a combination of values, and the options to run it with."""
    names = ("dtype", "vocab", "depth", "labelled", "packed", "has_bias", "shift")
    case = _case_of(tuple(choice[name] for name in names), tuple(choice["head"].items()))
    wanted = tuple(name for name in choice["wanted"] if name in case.tensors) or ("hidden",)
    return case, {"memory_budget": choice["budget"], "recompute": choice["recompute"], "wanted": wanted}


@pytest.mark.parametrize("choice", pairwise(AXES), ids=id_of)
def test_the_loss_matches_the_definition(engine: str, choice: dict[str, Any]) -> None:
    case, options = case_of(choice)
    output, gradients = run(case, engine, reward_shift=0.25, stats=STATS, **options)
    assert_matches(case, output, gradients, reward_shift=0.25, stats=STATS)
    assert output.backend == engine


@pytest.mark.parametrize("choice", pairwise(AXES, seed=1), ids=id_of)
def test_token_logp_matches_the_definition(engine: str, choice: dict[str, Any]) -> None:
    case, options = case_of(choice)
    # linear_token_logp does not know which packed row is the last of its sequence.
    shift = choice["shift"] and not choice["packed"]
    logp, gradients = run_rows(case, engine, shift=shift, **options)
    assert_rows_match(case, engine, logp, gradients, shift=shift)


def test_the_budget_and_what_is_kept_change_no_result(kernel: str) -> None:
    case = make_linear(torch.bfloat16, 301, 13, labelled=1.0, has_bias=True, softcap=20.0)
    for budget, recompute in itertools.product((2000, 9000, 60_000, 1 << 70, None), (True, False)):
        output, gradients = run(case, kernel, memory_budget=budget, recompute=recompute, stats=STATS)
        assert_matches(case, output, gradients, stats=STATS)
        _, gradients = run(case, kernel, memory_budget=budget, recompute=recompute, wanted=("hidden",))
        assert_matches(case, output, gradients, stats=STATS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_products_are_as_accurate_as_a_models_own_head(
    dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_CPU_MATMUL", "native")
    case = make_linear(dtype, 1003, 65, labelled=1.0, has_bias=True)
    wanted = wanted_in(mode)
    options = {"recompute": MODES[mode]["recompute"], "memory_budget": 40_000}

    def gradients_of(precision: torch.dtype, backend: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
        tensors = {name: tensor.detach().to(precision) for name, tensor in leaves(case, wanted).items()}
        inputs = {name: tensor.requires_grad_(name in wanted) for name, tensor in tensors.items()}
        hidden, weight, bias = inputs.values()
        output = linear_mpo_loss(hidden, weight, case.labels, case.ref_logp, bias=bias, backend=backend, **options)
        return output.chosen_logp, list(torch.autograd.grad(output.loss, [inputs[name] for name in wanted]))

    logp, ours = gradients_of(dtype, "cpu", **options)
    usual_logp, usual = gradients_of(dtype, "reference")
    exact_logp, exact = gradients_of(torch.float64, "reference")
    assert_as_accurate(logp, usual_logp, exact_logp.numpy(), name="logp")
    for gradient, usual_gradient, exact_gradient in zip(ours, usual, exact, strict=True):
        assert_as_accurate(gradient, usual_gradient, exact_gradient.numpy())


def test_the_product_is_chosen_by_measurement_or_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("MPO_CPU_MATMUL")
    assert matmul.matmul_dtype(torch.float64, cpu) == torch.float64
    for is_fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(matmul, "_is_fast_on_cpu", lambda dtype, is_fast=is_fast: is_fast)
        assert matmul.matmul_dtype(torch.bfloat16, cpu) == expected
    monkeypatch.undo()
    assert matmul._is_fast_on_cpu(torch.bfloat16) in (True, False)
    monkeypatch.setenv("MPO_CPU_MATMUL", "fast")
    with pytest.raises(ValueError, match="MPO_CPU_MATMUL must be 'float32' or 'native', got 'fast'"):
        matmul.matmul_dtype(torch.bfloat16, cpu)


def test_backward_cuts_the_same_tiles_as_forward_where_they_are_kept(kernel: str) -> None:
    # The gradient of a bfloat16 head costs backward memory per column that forward does not need.
    case = make_linear(torch.bfloat16, 1003, 257, labelled=1.0)
    for recompute in (True, False):
        output, gradients = run(case, kernel, recompute=recompute, memory_budget=1 << 20)
        assert_matches(case, output, gradients)


def confident(dtype: torch.dtype, probability: float, *, vocab: int = 1003, depth: int = 65) -> Linear:
    """Returns a batch in which each label has about the given probability."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, depth, generator=generator, dtype=torch.float64) / math.sqrt(depth)).to(dtype)
    labels = torch.randint(vocab, (6,), generator=generator)
    labels[:2] = torch.tensor([0, vocab - 1])  # in the first and the last tile
    noise = torch.randn(6, depth, generator=generator, dtype=torch.float64) / 2
    wide = weight.double()
    low, high = torch.zeros(6, 1, dtype=torch.float64), torch.full((6, 1), 60.0, dtype=torch.float64)
    for _ in range(50):
        middle = (low + high) / 2
        p = ((middle * wide[labels] + noise) @ wide.T).softmax(-1).gather(-1, labels.unsqueeze(-1))
        low, high = torch.where(p < probability, middle, low), torch.where(p < probability, high, middle)
    return Linear((low * wide[labels] + noise).to(dtype), weight, labels)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_confident_label_does_not_cancel(
    kernel: str, mode: str, dtype: torch.dtype, probability: float
) -> None:
    case = confident(dtype, probability)
    exact, _, _ = judged_rows(case, True, False)
    assert np.abs(np.log(-np.expm1(exact) / (1 - probability))).max() < 0.7
    for budget in (100_000, None):
        logp, gradients = run_rows(
            case, kernel, memory_budget=budget, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode)[:2]
        )
        assert_rows_match(case, kernel, logp, gradients)
        # The entries themselves are compared too: 1 - p must not consist of rounding errors.
        gradient = gradients["hidden"].double().numpy()
        right = exact_gradient(case)["hidden"]
        digits = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps / (1 - probability)
        assert np.abs(gradient - right).max() <= digits * np.abs(right).max()


def exact_gradient(case: Linear) -> dict[str, Array]:
    """Returns the exact gradients of the log-probs. The upstream gradient is ``upstream_of(case)``."""
    return judged_rows(case, True, False)[2].exact


@pytest.mark.parametrize("softcap", [None, 2e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_common_offset_costs_no_more_than_the_rounding_of_the_logits(
    engine: str, mode: str, dtype: torch.dtype, softcap: float | None
) -> None:
    base = make_linear(dtype, 301, 13, softcap=softcap)
    case = dataclasses.replace(base, bias=torch.full((301,), 1e4, dtype=dtype))
    output, gradients = run(
        case, engine, memory_budget=20_000, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode)
    )
    assert_matches(case, output, gradients)


@pytest.mark.parametrize("banned", ["every other", "the first 200", "all but 3", "a label"])
def test_banned_tokens_have_no_share(engine: str, mode: str, banned: str) -> None:
    base = make_linear(torch.float32, 301, 13)
    bias = torch.randn(301, generator=torch.Generator().manual_seed(0))
    labels = base.labels.clone()
    if banned == "every other":
        bias[::2] = -torch.inf
        labels = torch.where(labels >= 0, labels // 2 * 2 + 1, labels).clamp(max=299)
    elif banned == "the first 200":
        bias[:200] = -torch.inf
        labels = torch.where(labels >= 0, 200 + labels % 100, labels)
    elif banned == "all but 3":
        bias[3:] = -torch.inf
        labels = torch.where(labels >= 0, labels % 3, labels)
    else:
        bias[int(labels[0, -1])] = -torch.inf
    case = dataclasses.replace(base, bias=bias, labels=labels)
    for budget in (3000, None):  # 3000: tiles of banned tokens only
        logp, gradients = run_rows(
            case, engine, memory_budget=budget, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode)
        )
        assert_rows_match(case, engine, logp, gradients)
        assert torch.isinf(logp).any() == (banned == "a label")


def test_a_row_without_any_token_left_is_nan_and_spares_the_others(kernel: str, mode: str) -> None:
    base = make_linear(torch.float32, 67, 5)
    hidden = base.hidden.clone()
    hidden[0, -1] = 1.0
    weight = base.weight.clone()
    weight[:, 0] = -1e30
    hidden[..., 0] = 0
    hidden[0, -1, 0] = 1e30  # every logit of this row overflows to -inf
    case = dataclasses.replace(base, hidden=hidden, weight=weight)
    logp, gradients = run_rows(case, kernel, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode))
    assert torch.isnan(logp).nonzero().tolist() == [[0, 5]]
    assert torch.isnan(gradients["hidden"]).any(-1).nonzero().tolist() == [[0, 5]]


# Rows that are read, and rows that are not.


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_ignored_rows_are_never_read(kernel: str, mode: str, has_bias: bool) -> None:
    case = make_linear(torch.bfloat16, 67, 13, has_bias=has_bias)
    targets = torch.cat([case.labels[:, 1:], torch.full((4, 1), -100)], 1)
    spoiled = dataclasses.replace(case, hidden=torch.where((targets == -100).unsqueeze(-1), torch.nan, case.hidden))
    options = {"recompute": MODES[mode]["recompute"], "wanted": wanted_in(mode), "memory_budget": 2000}
    output, gradients = run(case, kernel, **options)
    same, same_gradients = run(spoiled, kernel, **options)
    assert torch.equal(output.loss, same.loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name
    assert not gradients["hidden"][targets == -100].any()
    assert gradients["hidden"][targets != -100].any(-1).all()


def test_nan_in_a_labelled_row_shows(engine: str, mode: str) -> None:
    case = make_linear(torch.float32, 67, 5, labelled=1.0, has_bias=True)
    case.hidden[1, 2, 3] = torch.nan
    for softcap in (None, 5.0):
        spoiled = dataclasses.replace(case, head={"softcap": softcap})
        logp, gradients = run_rows(
            spoiled, engine, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode), memory_budget=900
        )
        assert torch.isnan(logp).nonzero().tolist() == [[1, 2]]
        assert torch.isnan(gradients["hidden"]).all(-1).nonzero().tolist() == [[1, 2]]
        for name in gradients.keys() - {"hidden"}:
            assert torch.isnan(gradients[name]).all(), name


@pytest.mark.parametrize("label", [-1, 67, 2**40, -(2**62)])
def test_a_label_out_of_range_gives_nan(engine: str, mode: str, label: int) -> None:
    base = make_linear(torch.float32, 67, 5, labelled=1.0, shift=False)
    labels = base.labels.clone()
    labels[1, 2] = label
    case = dataclasses.replace(base, labels=labels)
    options = {"recompute": MODES[mode]["recompute"], "wanted": wanted_in(mode), "memory_budget": 900}
    logp, gradients = run_rows(case, engine, **options)
    clean, clean_gradients = run_rows(base, engine, **options)
    others = torch.arange(24).view(4, 6) != 8
    assert torch.isnan(logp[1, 2])
    assert torch.equal(logp[others], clean[others])
    if engine != "reference":  # for it, torch.where hides the NaN from autograd
        assert torch.isnan(gradients["hidden"][1, 2]).all()
    assert torch.equal(gradients["hidden"][others], clean_gradients["hidden"][others])
    output, _ = run(case, engine, **options)
    assert torch.isnan(output.loss)


# Comparison with mpo_loss.


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reference", ["own width", "own bias", "default head", "default head, bias", "other vocab"])
def test_hidden_states_of_the_reference_model(engine: str, reference: str, packed: bool) -> None:
    case = make_linear(torch.float32, 131, 13, packed=packed, has_bias=True, softcap=9.0, logit_scale=1.5)
    generator = torch.Generator().manual_seed(1)
    depth = 13 if "default" in reference else 7
    vocab = 140 if reference == "other vocab" else 131
    ref_hidden = torch.randn(*case.hidden.shape[:-1], depth, generator=generator)
    weight, bias = torch.randn(vocab, depth, generator=generator), torch.randn(vocab, generator=generator)
    given = {
        "own width": {"ref_weight": weight},
        "own bias": {"ref_weight": weight, "ref_bias": bias},
        "other vocab": {"ref_weight": weight},
        "default head": {},
        "default head, bias": {"ref_bias": bias},
    }[reference]
    used_weight = given.get("ref_weight", case.weight)
    used_bias = given.get("ref_bias", None if "ref_weight" in given else case.bias)
    exact = head_exact(ref_hidden, used_weight, used_bias, **case.head).logits
    slices = [slice(a, b) for a, b in itertools.pairwise(case.cu_seqlens)] if packed else range(4)
    ref_logp = [token_logp_exact(exact[i], case.labels[i], shift=True)[0].sum() for i in slices]
    with_logp = dataclasses.replace(case, ref_logp=torch.tensor(ref_logp))
    tensors = leaves(case, ALL)
    ref_hidden.requires_grad_()
    given = {name: placed(engine, tensor) for name, tensor in given.items()}
    hidden, head, head_bias = placed(engine, *tensors.values())
    output = linear_mpo_loss(
        hidden, head, case.labels, ref_hidden=placed(engine, ref_hidden), bias=head_bias,
        cu_seqlens=placed(engine, case.cu_seqlens), **given, **case.head, backend=engine, memory_budget=4000,
    )  # fmt: skip
    output.loss.backward()
    output = fetched(output)
    assert ref_hidden.grad is None
    exact_loss, eager, judgement = judged(with_logp, engine != "reference", 0.0)
    assert_as_accurate(output.loss, eager["loss"], exact_loss.loss, noise=1e-5)
    gradients = {name: tensor.grad for name, tensor in tensors.items()}
    judgement.judge(with_logp, gradients, exact_loss.noise["gradient"] + 1e-6)


@pytest.mark.parametrize(
    "state",
    [
        {"mode": "cumulative", "update": "before"},
        {"mode": "cumulative", "update": "after"},
        {"mode": "ema", "update": "before"},
        {"mode": "ema", "update": "after"},
        {"mode": "fixed", "value": 0.3},
    ],
    ids=lambda state: "-".join(map(str, state.values())),
)
def test_a_reward_shift_moves_as_in_mpo_loss(engine: str, state: dict[str, Any]) -> None:
    cases = [make_linear(torch.float32, 67, 5, packed=bool(seed % 2), seed=seed) for seed in range(3)]
    ours, theirs = RewardShift(**state), RewardShift(**state)
    for case in cases:
        logits = head_eager(case.hidden, case.weight)
        inputs = placed(engine, logits, case.labels, case.ref_logp, case.cu_seqlens)
        expected = fetched(
            mpo_loss(
                *inputs[:3], cu_seqlens=inputs[3], shift=case.shift, reward_shift=theirs, stats=STATS, backend=engine
            )
        )
        output, _ = run(case, engine, reward_shift=ours, stats=STATS)
        for name in FIELDS:
            torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.stats, expected.stats, rtol=1e-5, atol=1e-5)
        assert ours.value == pytest.approx(theirs.value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stats", [(), ("top1",), ("mean_logit", "entropy"), STATS], ids=str)
def test_only_the_statistics_asked_for_are_returned(engine: str, stats: tuple[str, ...]) -> None:
    case = make_linear(torch.float32, 301, 13, has_bias=True, temperature=0.5)
    output, gradients = run(case, engine, stats=stats, memory_budget=3000)
    assert_matches(case, output, gradients, stats=stats)


def test_policy_equal_to_reference_gives_no_reward(kernel: str) -> None:
    case = make_linear(torch.bfloat16, 301, 13, has_bias=True)
    hidden, weight, bias = placed(kernel, *case.tensors.values())
    output = linear_mpo_loss(hidden, weight, case.labels, ref_hidden=hidden, bias=bias, shift=True, backend=kernel)
    assert not output.chosen_reward.any()
    assert not output.rejected_reward.any()
    assert float(output.loss) == pytest.approx(0.831777 + float(output.ntp_loss), abs=1e-5)


def test_the_config_counts(engine: str) -> None:
    case = make_linear(torch.float32, 67, 5)
    labels = case.labels.where(case.labels != -100, 3)
    config = MPOConfig(beta=0.5, dpo_weight=0.3, ntp_average="sequence", label_smoothing=0.1, ignore_index=3)
    expected = mpo_loss(head_eager(case.hidden, case.weight), labels, case.ref_logp, config=config, shift=True)
    inputs = placed(engine, case.hidden, case.weight, labels, case.ref_logp)
    output = fetched(linear_mpo_loss(*inputs, config=config, shift=True, backend=engine))
    for name in (*FIELDS, "tokens"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


# A node of a graph.


def test_an_input_embedding_may_be_tied_to_the_head(engine: str, mode: str) -> None:
    if MODES[mode]["is_frozen"]:
        pytest.skip("a tied embedding that is trained trains the head")
    case = make_linear(torch.float32, 67, 5)
    ids = torch.randint(67, (4, 6), generator=torch.Generator().manual_seed(0))
    table = case.weight.clone().requires_grad_()
    hidden, head, ref_logp = placed(engine, torch.tanh(F.embedding(ids, table)), table, case.ref_logp)
    linear_mpo_loss(
        hidden, head, case.labels, ref_logp, shift=True, backend=engine, recompute=MODES[mode]["recompute"]
    ).loss.backward()
    exact = case.weight.double().requires_grad_()
    logits = torch.tanh(F.embedding(ids, exact)) @ exact.T
    mpo_loss(logits, case.labels, case.ref_logp, backend="reference").loss.backward()
    torch.testing.assert_close(table.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_micro_batches_accumulate(engine: str) -> None:
    weight = torch.nn.Parameter(make_linear(torch.float32, 67, 5).weight.clone())
    total = torch.zeros_like(weight)
    for seed in range(2):
        case = dataclasses.replace(make_linear(torch.float32, 67, 5, seed=seed), weight=weight.detach())
        _, gradients = run(case, engine, wanted=("weight",))
        total += gradients["weight"]
        hidden, head, ref_logp = placed(engine, case.hidden, weight, case.ref_logp)
        linear_mpo_loss(hidden, head, case.labels, ref_logp, shift=True, backend=engine).loss.backward()
    assert torch.equal(weight.grad, total)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_dtypes_may_differ(engine: str, mode: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base = make_linear(torch.float32, 301, 13, has_bias=True)
    case = dataclasses.replace(base, hidden=base.hidden.to(dtypes[0]), weight=base.weight.to(dtypes[1]))
    output, gradients = run(
        case, engine, memory_budget=20_000, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode)
    )
    assert_matches(case, output, gradients)


def test_float64_on_one_side_gives_float64(engine: str, mode: str) -> None:
    base = make_linear(torch.float64, 67, 5, has_bias=True)
    case = dataclasses.replace(base, hidden=base.hidden.float())
    output, gradients = run(case, engine, recompute=MODES[mode]["recompute"], wanted=wanted_in(mode))
    assert_matches(case, output, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_the_operands_at_most(engine: str, mode: str, dtype: torch.dtype) -> None:
    base = make_linear(torch.float32, 301, 13, has_bias=True)
    case = dataclasses.replace(base, hidden=base.hidden.to(dtype))
    options = {"recompute": MODES[mode]["recompute"], "wanted": wanted_in(mode), "memory_budget": 20_000}
    plain, plain_gradients = run(case, engine, **options)
    with torch.autocast(device_of(engine), torch.bfloat16):
        output, gradients = run(case, engine, **options)  # it checks that dtypes are those of the parameters
    torch.testing.assert_close(output.loss, plain.loss, rtol=2e-2, atol=2e-2)
    assert output.loss.dtype == torch.float32
    for name, gradient in gradients.items():
        size = float(plain_gradients[name].abs().max())
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=0.05, atol=0.02 * size)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1),
    "sliced": lambda x: F.pad(x, (3, 4), value=torch.nan)[..., 3:-4],
    "every other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_any_stride_will_do(engine: str, mode: str, layout: str, labelled: float) -> None:
    case = make_linear(torch.float32, 67, 13, labelled=labelled, has_bias=True, shift=False)
    output, gradients = run(
        case, engine, layout=LAYOUTS[layout], memory_budget=5000, recompute=MODES[mode]["recompute"],
        wanted=wanted_in(mode),
    )  # fmt: skip
    assert_matches(case, output, gradients)


@pytest.mark.parametrize("head", AXES["head"], ids=str)
def test_gradcheck(backend: str, mode: str, head: dict[str, Any]) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("the kernels of a GPU take no float64")
    case = make_linear(torch.float64, 7, 3, length=3, has_bias=True, **head)
    wanted = wanted_in(mode)
    recompute = MODES[mode]["recompute"]

    def rows(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_token_logp(
            hidden,
            weight,
            case.labels,
            bias=bias,
            **head,
            backend=backend,
            recompute=recompute,
            memory_budget=400,
            shift=False,
        )

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_mpo_loss(
            hidden, weight, case.labels, bias=bias, **case.pairing, **head, backend=backend, recompute=recompute,
            reward_shift=0.2, memory_budget=400,
        ).loss  # fmt: skip

    for function in (rows, loss):
        # Kept logits serve one backward; later ones compute them again, in other tiles.
        assert torch.autograd.gradcheck(function, tuple(leaves(case, wanted).values()), nondet_tol=1e-12)


def test_a_second_derivative_is_refused(kernel: str, mode: str) -> None:
    case = make_linear(torch.float32, 67, 5, has_bias=True)
    for name in wanted_in(mode):
        tensors = leaves(case, wanted_in(mode))
        hidden, weight, bias = placed(kernel, *tensors.values())
        options = {"bias": bias, "backend": kernel, "recompute": MODES[mode]["recompute"]}
        losses = (
            linear_mpo_loss(hidden, weight, case.labels, placed(kernel, case.ref_logp), **options).loss,
            linear_token_logp(hidden, weight, case.labels, **options, shift=False).sum(),
        )
        for loss in losses:
            (gradient,) = torch.autograd.grad(loss, tensors[name], create_graph=True)
            for source in wanted_in(mode):
                with pytest.raises(RuntimeError, match="differentiated once"):
                    torch.autograd.grad(gradient.square().sum(), tensors[source], retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_retained_graph_gives_the_same_gradients_again(kernel: str, mode: str, dtype: torch.dtype) -> None:
    case = make_linear(dtype, 301, 13, has_bias=True, softcap=20.0)
    tensors = leaves(case, wanted_in(mode))
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    hidden, weight, bias = placed(kernel, *tensors.values())
    options = {"bias": bias, "backend": kernel, "recompute": MODES[mode]["recompute"], "memory_budget": 20_000}
    output = linear_mpo_loss(hidden, weight, case.labels, placed(kernel, case.ref_logp), **case.head, **options)
    first = torch.autograd.grad(output.loss, wanted, retain_graph=True)
    second = torch.autograd.grad(output.loss, wanted)
    # The kept logits were consumed, so they are computed again in other tiles, which sum in another order; in bfloat16
    # the kept logits had been rounded. How much the order changes depends on the CPU's matrix product.
    eps = torch.finfo(dtype).eps if mode == "keep" else 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * float(a.abs().max()))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.loss, wanted)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_recorded_where_none_is_wanted(engine: str, context: Callable[[], Any]) -> None:
    case = make_linear(torch.float32, 67, 5, has_bias=True)
    expected, _ = run(case, engine)
    for recompute in (True, False):
        with context():
            hidden, weight, bias = placed(engine, *leaves(case, ALL).values())
            options = {"bias": bias, "backend": engine, "recompute": recompute}
            ref_logp = placed(engine, case.ref_logp)
            output = fetched(linear_mpo_loss(hidden, weight, case.labels, ref_logp, shift=True, **options))
            logp = linear_token_logp(hidden, weight, case.labels, **options, shift=False)
        assert torch.equal(output.loss, expected.loss)
        assert not output.loss.requires_grad
        assert not logp.requires_grad


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_runs_give_the_same_bits(kernel: str, mode: str, threads: None, count: int) -> None:
    torch.set_num_threads(count)
    case = make_linear(torch.bfloat16, 1003, 65, labelled=1.0, has_bias=True)
    options = {"recompute": MODES[mode]["recompute"], "wanted": wanted_in(mode), "memory_budget": 100_000}
    (first, gradients), (second, again) = (run(case, kernel, stats=STATS, **options) for _ in range(2))
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name
    assert_matches(case, first, gradients, stats=STATS)


def test_no_input_is_written_to(kernel: str, mode: str) -> None:
    case = make_linear(torch.float32, 67, 5, labelled=1.0, has_bias=True, softcap=5.0, shift=False)
    tensors = {name: placed(kernel, tensor) for name, tensor in leaves(case, wanted_in(mode)).items()}
    hidden, weight, bias = tensors.values()
    labels = case.labels.clone()
    logp = linear_token_logp(
        hidden, weight, labels, bias=bias, **case.head, backend=kernel, recompute=MODES[mode]["recompute"], shift=False
    )
    logp.sum().backward()
    for name, tensor in case.tensors.items():
        assert torch.equal(tensors[name].detach().cpu(), tensor), name
    assert torch.equal(labels, case.labels)


def test_an_empty_batch_gives_zeros() -> None:
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(7, 5, requires_grad=True)
    logp = linear_token_logp(hidden, weight, torch.zeros(0, dtype=torch.int64), shift=False)
    logp.sum().backward()
    assert logp.shape == (0,)
    assert hidden.grad.shape == (0, 5)
    assert not weight.grad.any()
    output = linear_mpo_loss(
        hidden.view(2, 0, 5), weight, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2), stats=STATS
    )
    output.loss.backward()
    assert torch.isfinite(output.loss)


# Checks by PyTorch.


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Makes torch fill uninitialized memory, because opcheck also compares unused parts of outputs."""
    torch.use_deterministic_algorithms(True)  # which fills empty tensors
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("keep", "only_fitting"),
    [
        (linear_ops.KEEP_NOTHING, False), (linear_ops.KEEP_HIDDEN_GRAD, False), (linear_ops.KEEP_LOGITS, False),
        (linear_ops.KEEP_LOGITS, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_opcheck_passes_for_every_operator(
    keep: int, only_fitting: bool, labelled: float, filled_memory: None
) -> None:
    case = make_linear(torch.bfloat16, 67, 13, labelled=labelled, has_bias=True, shift=False)
    hidden, weight, bias = (LAYOUTS["transposed"](tensor) for tensor in case.tensors.values())
    options = linear_ops.LinearOptions(-100, [1.0, 20.0, 1.0], 4000, torch.bfloat16, "cpu", only_fitting)
    forward = (hidden, weight, bias, case.labels, ops.stats_mask(checks.STATS), keep, *options)
    result = torch.library.opcheck(linear_ops.linear_token_logp, forward)
    assert set(result.values()) == {"SUCCESS"}, result
    logp, row_max, row_sum, _, kept = linear_ops.linear_token_logp(*forward)
    row_weight = torch.ones_like(logp)
    rows = (case.labels, row_max, row_sum, row_weight)
    logits = kept if keep == linear_ops.KEEP_LOGITS else None
    for scale in (None, torch.tensor(2.0)):
        if keep == linear_ops.KEEP_HIDDEN_GRAD:
            backward = (hidden, case.labels, kept, row_weight, scale, -100)
            result = torch.library.opcheck(linear_ops.kept_hidden_grad, backward)
            assert set(result.values()) == {"SUCCESS"}, result
            continue
        for wanted in ([True, True, True], [False, False, True]):
            backward = (hidden, weight, bias, *rows, scale, logits, wanted, *options)
            result = torch.library.opcheck(linear_ops.linear_grad, backward)
            assert set(result.values()) == {"SUCCESS"}, result


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 16)
        self.head = nn.Linear(16, 101)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.embedding(ids))


def test_a_compiled_model_gives_the_numbers_of_eager(mode: str) -> None:
    torch.manual_seed(0)
    model = TinyModel()
    model.head.requires_grad_(not MODES[mode]["is_frozen"])
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(101, (4, 9))
    labels = ids.clone()
    labels[:, :3] = -100

    def step(shift: RewardShift) -> MPOOutput:
        return linear_mpo_loss(
            model(ids), model.head.weight, labels, torch.full((4,), -20.0), bias=model.head.bias,
            reward_shift=shift, recompute=MODES[mode]["recompute"], stats=STATS,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if mode == "recompute" else "aot_eager")
    eager_shift, compiled_shift = RewardShift(), RewardShift()
    is_old = TorchVersion(torch.__version__) < (2, 9)  # there, fullgraph=True does not imply this setting
    setting = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True) if is_old else contextlib.nullcontext()
    for _ in range(2):  # in the second step the reward shift has moved
        eager = step(eager_shift)
        with setting:
            ours = compiled(compiled_shift)
        torch.testing.assert_close(ours.loss, eager.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.stats, eager.stats, rtol=1e-6, atol=0)
        gradients = zip(torch.autograd.grad(ours.loss, wanted), torch.autograd.grad(eager.loss, wanted), strict=True)
        for ours_gradient, gradient in gradients:
            torch.testing.assert_close(ours_gradient, gradient, rtol=1e-5, atol=1e-6)
        assert compiled_shift.value == pytest.approx(eager_shift.value, rel=1e-6)


# Tiles.


@pytest.mark.parametrize("preferred", [1, 1000, 10**6, 10**12])
@pytest.mark.parametrize("per_column", [0, 1, 40, 20_000])
@pytest.mark.parametrize("per_element", [4, 24])
def test_tiles_fit_the_budget(per_element: int, per_column: int, preferred: int) -> None:
    sizes = itertools.product(
        (1, 2, 63, 1000, 4097), (1, 7, 64, 255, 300, 151_674), (1, 50, 999, 10**5, 10**7, 10**11)
    )
    for rows, vocab, budget in sizes:
        height, width = tile_ops.tile_shape(
            rows, vocab, per_element=per_element, per_column=per_column, budget=budget, preferred=preferred
        )
        shape = (rows, vocab, budget, height, width)
        assert 1 <= height <= rows, shape
        assert 1 <= width <= vocab, shape
        if (height, width) != (1, 1):
            assert height * width * per_element + width * per_column <= budget, shape
            assert height * width * per_element <= preferred, shape
        pieces = -(-rows // height)
        assert height == -(-rows // pieces), shape  # with this number of pieces, no piece can be lower
        assert width == vocab or width < 64 or width % 64 == 0, shape


def test_an_ample_budget_takes_the_whole() -> None:
    tile = tile_ops.tile_shape(300, 5000, per_element=4, per_column=100, budget=1 << 40, preferred=1 << 40)
    assert tile == (300, 5000)


@pytest.mark.parametrize("only_fitting", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kept_logits_are_not_written_over_before_they_are_used_up(dtype: torch.dtype, only_fitting: bool) -> None:
    # 1000 = 3 * 333 + 1: the last tile has one column.
    sizes = itertools.product((0, 1, 3, 40), (1, 7, 64, 1000), (1, 5, 64, 333, 999), (4, 52, 2000))
    for count, vocab, columns, grad_bytes in sizes:
        columns = min(columns, vocab)
        kept = tile_ops.KeptLogits(count, vocab, columns, grad_bytes, dtype, only_fitting=only_fitting)
        memory = torch.zeros(kept.size, dtype=torch.uint8)
        shape = (count, vocab, columns, grad_bytes)
        half = slice(0, count // 2), slice(count // 2, count)
        tiles = [(first, min(first + columns, vocab)) for first in range(0, kept.stop, columns)]
        for number, (first, end) in enumerate(tiles):
            for rows in half:
                kept.tile(memory, rows, first, end).fill_(number + 1)
                if dtype == torch.float16:
                    kept.tile_max(memory, rows, first).fill_(number + 1)
        for number, (first, end) in enumerate(tiles):
            for rows in half:  # the gradient by these columns is written once their first rows are consumed
                memory[first * grad_bytes : end * grad_bytes] = 255
                assert (kept.tile(memory, rows, first, end) == number + 1).all(), shape
                if dtype == torch.float16:
                    assert (kept.tile_max(memory, rows, first) == number + 1).all(), shape
        assert vocab * grad_bytes <= kept.size, shape
        smaller = min(grad_bytes, count * dtype.itemsize)
        maxima = 4 * count * len(tiles) if dtype == torch.float16 else 0
        if only_fitting and count * dtype.itemsize > grad_bytes:
            assert kept.size <= vocab * grad_bytes + maxima + 128, shape
            fitting = (vocab - columns) * grad_bytes // (count * dtype.itemsize)
            assert fitting - columns < kept.stop <= max(fitting, 0), shape
            continue
        assert kept.stop == vocab, shape
        assert kept.size <= vocab * max(grad_bytes, count * dtype.itemsize) + columns * smaller + maxima + 128, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_by_the_head_takes_the_memory_of_kept_logits(dtype: torch.dtype) -> None:
    case = make_linear(dtype, 301, 13, labelled=1.0)
    hidden, weight = (tensor.clone().requires_grad_() for tensor in list(case.tensors.values())[:2])
    output = linear_mpo_loss(hidden, weight, case.labels, case.ref_logp, recompute=False)
    kept = output.loss.grad_fn.logits
    assert kept.dtype == torch.uint8
    output.loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == kept.data_ptr()
    assert output.loss.grad_fn.logits is None
    whole, _ = run(case, "cpu", recompute=False)
    assert torch.equal(whole.loss, output.loss)


# Memory.


def use_memory(begin: Callable[[], None], dtype: torch.dtype, mode: str, budget: int) -> None:
    torch.set_num_threads(1)
    hidden = torch.randn(2, 128, 256).to(dtype).requires_grad_()
    weight = torch.zeros(60_000, 256, dtype=dtype).fill_(0.01).requires_grad_(not MODES[mode]["is_frozen"])
    labels = torch.randint(60_000, (2, 128))
    small = torch.zeros(64, 256, dtype=dtype, requires_grad=True)
    linear_token_logp(hidden[0], small, labels[0] % 64, shift=False).sum().backward()  # initialises libraries
    begin()
    options = {"memory_budget": budget, "recompute": MODES[mode]["recompute"]}
    linear_mpo_loss(hidden, weight, labels, torch.zeros(2), shift=False, **options).loss.backward()


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.float32, "recompute"), (torch.bfloat16, "recompute"), (torch.bfloat16, "frozen"),
        (torch.float32, "keep"), (torch.bfloat16, "keep"),
    ],
    ids=str,
)  # fmt: skip
def test_memory_stays_within_the_budget(dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    measure = pytest.importorskip("benchmarks.measure")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says what the peak was")
    budget = 4 << 20  # the logits are 59 MiB
    peak = measure.peak_bytes(use_memory, dtype, mode, budget)
    gradients = 0 if MODES[mode]["is_frozen"] else 60_000 * 256 * dtype.itemsize
    assert peak - gradients < budget + (32 << 20), f"{(peak - gradients) / 2**20:.1f} MiB"


# Bad input.


def good(**changes: Any) -> dict[str, Any]:
    """Returns valid arguments of linear_mpo_loss for two pairs of four positions, updated with ``changes``."""
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 4, 5),
        "weight": torch.zeros(7, 5),
        "labels": torch.ones(4, 4, dtype=torch.int64),
        "ref_logp": torch.zeros(4),
    }
    return {**arguments, **changes}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Returns a tensor of zeros."""
    return torch.zeros(*shape, dtype=dtype, device=device)


REF: dict[str, Any] = {"ref_logp": None, "ref_hidden": zeros(4, 4, 5)}
INT64 = torch.int64

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # dtypes
    "hidden int64": (
        {"hidden": zeros(4, 4, 5, dtype=INT64)},
        TypeError,
        r"^hidden must be one of .*, got torch\.int64",
    ),
    "hidden a list": ({"hidden": [[1.0]]}, TypeError, r"^hidden must be a torch\.Tensor, got list"),
    "weight int8": ({"weight": zeros(7, 5, dtype=torch.int8)}, TypeError, r"^weight must be one of .*got torch\.int8"),
    "weight None": ({"weight": None}, TypeError, r"^weight must be a torch\.Tensor, got NoneType"),
    "bias int64": ({"bias": zeros(7, dtype=INT64)}, TypeError, r"^bias must be one of .*got torch\.int64"),
    "bias a number": ({"bias": 0.5}, TypeError, r"^bias must be a torch\.Tensor, got float"),
    "labels int32": ({"labels": zeros(4, 4, dtype=torch.int32)}, TypeError, r"^labels must be .*int64, got .*int32"),
    "ref_hidden int64": ({**REF, "ref_hidden": zeros(4, 4, 5, dtype=INT64)}, TypeError, r"^ref_hidden must .*int64"),
    "ref_weight a list": ({**REF, "ref_weight": [1.0]}, TypeError, r"^ref_weight must be .*got list"),
    "ref_bias int64": ({**REF, "ref_bias": zeros(7, dtype=INT64)}, TypeError, r"^ref_bias must be .*got torch\.int64"),
    "ref_logp bfloat16": ({"ref_logp": zeros(4, dtype=torch.bfloat16)}, TypeError, r"^ref_logp must be .*bfloat16"),
    # shapes
    "hidden flat": ({"hidden": zeros(5)}, ValueError, r"^hidden must be \[2B, T, D\].*\(5,\)"),
    "hidden without features": ({"hidden": zeros(4, 4, 0)}, ValueError, r"^hidden must .*feature.*\(4, 4, 0\)"),
    "hidden of an odd number": (
        {"hidden": zeros(3, 4, 5), "labels": zeros(3, 4, dtype=INT64)},
        ValueError,
        r"^hidden must hold 2B sequences.*got 3",
    ),
    "weight flat": ({"weight": zeros(5)}, ValueError, r"^weight must be \[V, D\] .*, 5, got shape \(5,\)"),
    "weight transposed": ({"weight": zeros(5, 7)}, ValueError, r"^weight must be \[V, D\] .*, 5, got shape \(5, 7\)"),
    "weight empty": ({"weight": zeros(0, 5)}, ValueError, r"^weight must be \[V, D\] .*got shape \(0, 5\)"),
    "bias of the features": ({"bias": zeros(5)}, ValueError, r"^bias must be \[V\] = \[7\], got shape \(5,\)"),
    "bias of two axes": ({"bias": zeros(1, 7)}, ValueError, r"^bias must be \[V\] = \[7\], got shape \(1, 7\)"),
    "labels shorter": ({"labels": zeros(4, 3, dtype=INT64)}, ValueError, r"^labels must .*hidden.*\(4, 3\)"),
    "ref_logp of one side": ({"ref_logp": zeros(2)}, ValueError, r"^ref_logp must be \[2B\] = \[4\].*\(2,\)"),
    "ref_hidden shorter": ({**REF, "ref_hidden": zeros(4, 3, 5)}, ValueError, r"^ref_hidden must .*got \(4, 3, 5\)"),
    "ref_hidden of another width": (
        {**REF, "ref_hidden": zeros(4, 4, 6)},
        ValueError,
        r"^ref_weight must be \[V, D\] with D that of ref_hidden, 6, got shape \(7, 5\)",
    ),
    "ref_bias shorter": ({**REF, "ref_bias": zeros(6)}, ValueError, r"^ref_bias must be \[V\] = \[7\], got .*\(6,\)"),
    # the reference
    "no reference": ({"ref_logp": None}, ValueError, r"ref_logp and ref_hidden must be given, got neither"),
    "two references": ({"ref_hidden": zeros(4, 4, 5)}, ValueError, r"ref_logp and ref_hidden must be given, got both"),
    "ref_weight alone": ({"ref_weight": zeros(7, 5)}, ValueError, r"^ref_weight and ref_bias go with ref_hidden"),
    "ref_bias alone": ({"ref_bias": zeros(7)}, ValueError, r"^ref_weight and ref_bias go with ref_hidden"),
    # numbers
    "logit_scale 0": ({"logit_scale": 0.0}, ValueError, r"^logit_scale must be finite and not 0, got 0\.0"),
    "logit_scale NaN": ({"logit_scale": math.nan}, ValueError, r"^logit_scale must be finite and not 0, got nan"),
    "logit_scale None": ({"logit_scale": None}, TypeError, r"^logit_scale must be a number, got None"),
    "logit_scale a tensor": ({"logit_scale": zeros(1)}, TypeError, r"^logit_scale must be a number, got tensor"),
    "softcap 0": ({"softcap": 0}, ValueError, r"^softcap must be positive and finite, got 0"),
    "softcap negative": ({"softcap": -30.0}, ValueError, r"^softcap must be positive and finite, got -30\.0"),
    "softcap infinite": ({"softcap": math.inf}, ValueError, r"^softcap must be positive and finite, got inf"),
    "softcap True": ({"softcap": True}, TypeError, r"^softcap must be a number, got True"),
    "temperature 0": ({"temperature": 0}, ValueError, r"^temperature must be positive and finite, got 0"),
    "temperature None": ({"temperature": None}, TypeError, r"^temperature must be a number, got None"),
    "memory_budget 0": ({"memory_budget": 0}, ValueError, r"^memory_budget must be at least 1, got 0"),
    "memory_budget negative": ({"memory_budget": -5}, ValueError, r"^memory_budget must be at least 1, got -5"),
    "memory_budget float": (
        {"memory_budget": 1e9},
        TypeError,
        r"^memory_budget must be an integer, got 1000000000\.0",
    ),
    "memory_budget True": ({"memory_budget": True}, TypeError, r"^memory_budget must be an integer, got True"),
    "recompute a string": ({"recompute": "no"}, TypeError, r"^recompute must be a bool or None, got 'no'"),
    "an unknown statistic": ({"stats": ("entropie",)}, ValueError, r"^stats must be names .*got 'entropie'"),
    "an unknown backend": ({"backend": "gpu"}, ValueError, r"^backend must be None or one of .*got 'gpu'"),
    "a config of another kind": ({"config": {}}, TypeError, r"^config must be an MPOConfig, got dict"),
    # devices
    "hidden elsewhere": (
        {"hidden": zeros(4, 4, 5, device="meta")},
        ValueError,
        r"must be on the device of hidden, meta",
    ),
    "weight elsewhere": (
        {"weight": zeros(7, 5, device="meta")},
        ValueError,
        r"^weight must be on the device of hidden, cpu, got meta",
    ),
    "bias elsewhere": (
        {"bias": zeros(7, device="meta")},
        ValueError,
        r"^bias must be on the device of hidden, cpu, got",
    ),
    "labels elsewhere": (
        {"labels": zeros(4, 4, dtype=INT64, device="meta")},
        ValueError,
        r"^labels must be on the device of hidden, cpu, got meta",
    ),
    "ref_logp elsewhere": (
        {"ref_logp": zeros(4, device="meta")},
        ValueError,
        r"^ref_logp must be on the device of hid",
    ),
    "ref_hidden elsewhere": (
        {**REF, "ref_hidden": zeros(4, 4, 5, device="meta")},
        ValueError,
        r"^ref_hidden must be on the device of hidden, cpu, got meta",
    ),
}


@pytest.fixture
def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the operators raise, so that the test detects argument checks that run too late."""

    def called(*args: object, **options: object) -> None:
        raise AssertionError("something was computed before the check")

    monkeypatch.setattr(linear_ops, "linear_token_logp", called)
    monkeypatch.setattr(F, "linear", called)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_computed(mistake: str, computes_nothing: None) -> None:
    changes, error, message = MISTAKES[mistake]
    for backend in (None, "reference"):
        with pytest.raises(error, match=message):
            linear_mpo_loss(**good(**{"backend": backend, **changes}))


OF_ROWS = (
    *("hidden", "weight", "bias", "labels", "logit_scale", "softcap", "temperature"),
    *("memory_budget", "recompute", "backend"),
)


@pytest.mark.parametrize("mistake", [name for name, (changes, *_) in MISTAKES.items() if set(changes) <= {*OF_ROWS}])
def test_token_logp_names_the_same_mistakes(mistake: str, computes_nothing: None) -> None:
    changes, error, message = MISTAKES[mistake]
    if mistake in ("hidden of an odd number", "hidden flat"):
        pytest.skip("rows need no pairs")
    arguments = good(**changes)
    arguments.pop("ref_logp")
    with pytest.raises(error, match=message):
        linear_token_logp(**arguments)


def test_shift_needs_an_axis() -> None:
    with pytest.raises(ValueError, match=r"shift needs labels with at least one axis, got shape \(\)"):
        linear_token_logp(torch.zeros(5), torch.zeros(7, 5), torch.tensor(1), shift=True)
    assert linear_token_logp(torch.zeros(5), torch.zeros(7, 5), torch.tensor(1), shift=False).shape == ()
