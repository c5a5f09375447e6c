"""Compares mpo_loss with the oracle on random shapes, dtypes, strides, packings, labels and options.

MPO_PROPERTY_CASES sets the number of examples per backend. Every run draws the same examples.
"""

import os
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from oracle import LAYOUTS, STATS, Case, ExactShift, assert_output_as_accurate, lay_out

from mpo_ext import MPOConfig, RewardShift, mpo_loss

CASES = int(os.environ.get("MPO_PROPERTY_CASES", "150"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORE_INDICES = [-100, -1, 0]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draws keyword arguments of MPOConfig."""
    weights = draw(st.tuples(*[st.sampled_from([0.0, 0.2, 0.8, 1.0, 2.5])] * 3).filter(any))
    return {
        "beta": draw(st.sampled_from([0.1, 0.01, 1.0])),
        **dict(zip(("dpo_weight", "bco_weight", "ntp_weight"), weights, strict=True)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.49])),
        "ntp_average": draw(st.sampled_from(["token", "sequence"])),
        "ignore_index": draw(st.sampled_from(IGNORE_INDICES)),
    }


@st.composite
def shifts(draw: st.DrawFn) -> dict[str, Any] | float | None:
    """Draws a reward shift: None, a constant, or keyword arguments of RewardShift."""
    if draw(st.booleans()):
        return draw(st.sampled_from([None, 0.0, 0.6, -2]))
    mode = draw(st.sampled_from(["cumulative", "ema", "fixed"]))
    update = draw(st.sampled_from(["before", "after"]))
    per = draw(st.sampled_from(["micro_batch", "optimizer_step"])) if update == "after" else "micro_batch"
    value = draw(st.sampled_from([0.0, 0.6]))
    return {"mode": mode, "decay": draw(st.sampled_from([0.99, 0.5])), "update": update, "per": per, "value": value}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws inputs of mpo_loss."""
    dtype = draw(st.sampled_from(DTYPES))
    pairs = draw(st.integers(1, 3))
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 130, 257, 1003])))
    options = draw(configs())
    packed = draw(st.booleans())
    if packed:
        lengths = draw(st.lists(st.integers(1, 7), min_size=2 * pairs, max_size=2 * pairs))
    else:
        lengths = [draw(st.integers(1, 7))] * (2 * pairs)
    labelled = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0]), min_size=2 * pairs, max_size=2 * pairs))
    spread = draw(st.sampled_from([0.1, 3.0, 12.0]))
    offset = draw(st.sampled_from([0.0, 0.0, 100.0] if dtype.itemsize == 2 else [0.0, 0.0, 1e4]))
    forbidden = draw(st.sampled_from([0.0, 0.0, 0.3]))  # fraction of logits at -inf
    with_ref_logits = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    rows = sum(lengths)
    ignore_index = options["ignore_index"]
    labels = torch.randint(vocab, (rows,), generator=generator)
    share = torch.tensor(labelled).repeat_interleave(torch.tensor(lengths))
    labels = torch.where(torch.rand(rows, generator=generator) < share, labels, ignore_index)

    def draw_logits() -> torch.Tensor:
        logits = spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) + offset
        banned = torch.rand(rows, vocab, generator=generator) < forbidden
        for position in (labels, labels.roll(-1)):  # whatever the alignment, a label is never banned
            banned.scatter_(-1, position.clamp(min=0).unsqueeze(-1), False)
        return logits.masked_fill(banned, -torch.inf).to(dtype)

    logits = draw_logits()
    ref_logits = draw_logits() if with_ref_logits else None
    # Close to the log-probs of the policy, so that not all rewards are saturated.
    ref_logp = -torch.tensor(lengths) * spread * (1 + torch.randn(2 * pairs, generator=generator))
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
    else:
        logits, labels = logits.view(2 * pairs, -1, vocab), labels.view(2 * pairs, -1)
        ref_logits = None if ref_logits is None else ref_logits.view_as(logits)
    return Case(
        logits,
        labels,
        ref_logp=None if with_ref_logits else ref_logp,
        ref_logits=ref_logits,
        cu_seqlens=cu_seqlens,
        shift=draw(st.booleans()),
        options=options,
    )


@settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    case=cases(),
    reward_shift=shifts(),
    layout=st.sampled_from(LAYOUTS),
    ref_layout=st.sampled_from(LAYOUTS),
    stats=st.lists(st.sampled_from(STATS), unique=True),
    reuse_logits=st.booleans(),
    upstream=st.sampled_from([1.0, -2.5]),
)
def test_any_call_matches_the_definition(
    engine: str,
    device: str,
    case: Case,
    reward_shift: dict[str, Any] | float | None,
    layout: str,
    ref_layout: str,
    stats: list[str],
    reuse_logits: bool,
    upstream: float,
) -> None:
    if isinstance(reward_shift, dict):
        shift, exact_shift = RewardShift(**reward_shift), ExactShift(**reward_shift)
        exact = case.exact(exact_shift)
    else:
        shift = reward_shift
        exact = case.exact(reward_shift or 0.0)
    eager = case.eager(float(exact.reward_shift))

    z = lay_out(case.logits.to(device), layout).requires_grad_()
    output = mpo_loss(
        z,
        case.labels.to(device),
        None if case.ref_logp is None else case.ref_logp.to(device),
        None if case.ref_logits is None else lay_out(case.ref_logits.to(device), ref_layout),
        config=MPOConfig(**case.options),
        reward_shift=shift,
        cu_seqlens=None if case.cu_seqlens is None else case.cu_seqlens.to(device),
        shift=case.shift,
        stats=stats,
        reuse_logits=reuse_logits and layout != "transposed",
        backend=engine,
    )
    (gradient,) = torch.autograd.grad(output.loss, z, torch.tensor(upstream, dtype=output.loss.dtype, device=device))
    cpu = type(output)(*[value.detach().cpu() if isinstance(value, torch.Tensor) else value for value in output])
    assert_output_as_accurate(cpu, gradient.cpu(), exact, eager, stats=stats, upstream=upstream)
    if isinstance(shift, RewardShift):
        shift.step()
        exact_shift.step()
        assert abs(shift.value - exact_shift.value) <= exact.noise["reward_shift"] + 1e-6 * abs(exact_shift.value)
