"""Tests the operators as PyTorch custom operators: schemas, fake kernels, torch.compile, special autograd cases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpo_ext import MPOConfig, MPOOutput, RewardShift, mpo_loss, token_logp
from mpo_ext.ops import linear
from mpo_ext.ops import logits as ops
from mpo_ext.ops.checks import STATS, check_kernel
from mpo_ext.ops.pair_loss import CUMULATIVE, PairLossSettings, forward, pair_loss

VOCAB = 101


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (4, 9))
    labels[0, :3] = -100
    return torch.randn(4, 9, VOCAB), labels


def test_opcheck_passes_for_every_operator(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows
    logp, row_max, row_sum, _ = ops.token_logp(logits, labels, -100, 0, "cpu")
    references = (torch.zeros(4), torch.zeros(2, dtype=torch.float64))
    moving = PairLossSettings(0.1, 0.8, 0.2, 1.0, 0.0, False, CUMULATIVE, True, 0.99).numbers()
    still = PairLossSettings(0.1, 0.8, 0.2, 1.0, 0.0, False).numbers()
    offsets = torch.tensor([0, 5, 16, 20, 36])
    grad_args = (logits, labels, row_max, row_sum, torch.randn_like(logp))
    cases = [
        (ops.token_logp, (logits, labels, -100, 0, "cpu")),
        (ops.token_logp, (logits.bfloat16()[:, 1:], labels[:, 1:], -100, ops.stats_mask(STATS), "cpu")),
        (pair_loss, (logp, labels, *references, None, moving, -100, "cpu")),
        (pair_loss, (logp, labels, *references, offsets, still, -100, "cpu")),
        (forward, (logits, labels, *references, None, moving, -100, 0, "cpu")),
        (ops.logits_grad, (*grad_args, torch.tensor(2.0), -100, "cpu")),
        (ops.logits_grad, (*grad_args, None, -100, "cpu")),
        (ops.logits_grad_, (logits.clone(), *grad_args[1:], None, -100, "cpu")),
    ]
    for operator, args in cases:
        result = torch.library.opcheck(operator, args)
        assert set(result.values()) == {"SUCCESS"}, (operator, result)


def operator_calls() -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    """Returns a function and valid arguments for each operator, by name."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 9, VOCAB), torch.randint(VOCAB, (4, 9))
    logp, row_max, row_sum, _ = ops.token_logp(logits, labels, -100, 0, "cpu")
    hidden, weight, bias = torch.randn(4, 9, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)
    pair = {
        "ref_logp": torch.zeros(4),
        "state": torch.zeros(2, dtype=torch.float64),
        "cu_seqlens": None,
        "settings": PairLossSettings(0.1, 0.8, 0.2, 1.0, 0.0, False).numbers(),
        "ignore_index": -100,
    }
    grad = {"row_max": row_max, "row_sum": row_sum, "weight": logp, "scale": None, "ignore_index": -100}
    options = {"ignore_index": -100, "head_scales": [1.0, 0.0, 1.0], "memory_budget": 1 << 20}
    options |= {"matmul_dtype": torch.float32, "backend": "cpu"}
    head = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}
    rows = {"row_max": row_max, "row_sum": row_sum, "row_weight": logp, "scale": None, "kept": None}
    kept = {"kept": hidden.reshape(36, 8), "row_weight": logp, "scale": None, "ignore_index": -100}
    logit_rows = {"logits": logits, "labels": labels}
    return {
        "token_logp": (ops.token_logp, logit_rows | {"ignore_index": -100, "stats": 0, "backend": "cpu"}),
        "pair_loss": (pair_loss, {"logp": logp, "labels": labels, **pair, "backend": "cpu"}),
        "forward": (forward, logit_rows | pair | {"stats": 0, "backend": "cpu"}),
        "logits_grad": (ops.logits_grad, logit_rows | grad | {"backend": "cpu"}),
        "logits_grad_": (ops.logits_grad_, logit_rows | grad | {"backend": "cpu"}),
        "linear_token_logp": (linear.linear_token_logp, head | {"stats": 0, "keep": 0} | options),
        "linear_grad": (linear.linear_grad, head | rows | {"wanted": [True] * 3} | options),
        "kept_hidden_grad": (linear.kept_hidden_grad, {"hidden": hidden, "labels": labels} | kept),
    }


# For each argument that an operator passes to a kernel: values that would be read wrongly or out of bounds.
_DOUBLES, _FEW = torch.zeros(4, 9, dtype=torch.float64), torch.zeros(4, 8)
_ROWS = (_DOUBLES, _DOUBLES.half(), _FEW, torch.zeros(0))
BAD_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "logits": (torch.zeros(4, 8, VOCAB), torch.zeros(4, 9, VOCAB, dtype=torch.int32), torch.zeros(4, 9, 0)),
    "logp": (_DOUBLES.half(), _FEW, torch.zeros(0)),
    "labels": (_FEW.long(), _DOUBLES.int(), _DOUBLES),
    "ref_logp": (torch.zeros(2), torch.zeros(3), torch.zeros(0), torch.zeros(4).half(), torch.zeros(())),
    "state": (torch.zeros(2), torch.zeros(1, dtype=torch.float64)),
    "cu_seqlens": (
        torch.tensor([0, 9, 18, 36]),
        torch.tensor([0, 9, 18, 27, 99]),
        torch.tensor([0, -9, 18, 27, 36]),
        torch.zeros(5),
    ),
    "settings": ([], [0.1] * 8),
    "stats": (16, -1),
    "keep": (3, -1),
    "row_max": _ROWS,
    "row_sum": _ROWS,
    "row_weight": _ROWS,
    "scale": (torch.zeros(0), torch.zeros(2), torch.tensor(1)),
    "hidden": (torch.zeros(4, 9, 7), torch.zeros(4, 8, 8)),
    "bias": (torch.zeros(3),),
    "head_scales": ([], [1.0, 0.0]),
    "memory_budget": (0,),
    "kept": (torch.zeros(3), torch.zeros(35, 8)),
    "backend": ("reference", "gpu", ""),
}


@pytest.mark.parametrize("name", operator_calls())
def test_operators_refuse(name: str) -> None:
    operator, arguments = operator_calls()[name]
    operator(**arguments)
    bad = {**BAD_ARGUMENTS, "weight": (torch.zeros(VOCAB, 7),) if "hidden" in arguments else _ROWS}
    for argument, values in bad.items():
        for value in values if argument in arguments else ():
            with pytest.raises((TypeError, ValueError, RuntimeError), match=r"must|labels|needs") as caught:
                operator(**{**arguments, argument: value})
            assert "INTERNAL" not in str(caught.value), (argument, value)


def test_the_cpu_kernels_refuse_tensors_of_another_device() -> None:
    with pytest.raises(RuntimeError, match="backend 'cpu' needs logits on the CPU, got logits on meta"):
        check_kernel("cpu", torch.zeros(2, 3, 5, device="meta"))


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


@pytest.mark.parametrize(
    "options", [{}, {"reuse_logits": True}, {"packed": True}, {"stats": ("entropy", "top1")}], ids=str
)
def test_a_compiled_model_gives_the_numbers_of_eager(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    options = dict(options)
    is_packed = options.pop("packed", False)
    model = TinyModel()
    ids = torch.randint(VOCAB, (36,) if is_packed else (4, 9))
    labels = ids.clone()
    labels[..., :3] = -100
    if is_packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 16, 20, 36])

    def step(shift: RewardShift) -> MPOOutput:
        return mpo_loss(model(ids), labels, torch.full((4,), -20.0), reward_shift=shift, **options)

    compiled = torch.compile(step, fullgraph=True)
    eager_shift, compiled_shift = RewardShift(), RewardShift()
    for _ in range(2):  # in the second step the reward shift has moved
        eager, ours = step(eager_shift), compiled(compiled_shift)
        torch.testing.assert_close(ours.loss, eager.loss, rtol=1e-6, atol=0)
        eager_grads = torch.autograd.grad(eager.loss, list(model.parameters()))
        for ours_grad, grad in zip(torch.autograd.grad(ours.loss, list(model.parameters())), eager_grads, strict=True):
            torch.testing.assert_close(ours_grad, grad, rtol=1e-5, atol=1e-6)
        assert compiled_shift.value == pytest.approx(eager_shift.value, rel=1e-6)
        assert ours.backend == "cpu"
        assert ours.stats.keys() == eager.stats.keys()


def test_compiling_does_not_start_over_while_the_reward_shift_moves() -> None:
    model = TinyModel()
    ids = torch.randint(VOCAB, (4, 9))
    compiled = torch.compile(
        lambda shift: mpo_loss(model(ids), ids, torch.zeros(4), reward_shift=shift).loss, fullgraph=True
    )
    shift = RewardShift()
    compiled(shift).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(shift).backward()


def test_a_second_derivative_raises_even_where_only_the_logits_ask_for_it(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows[0].requires_grad_(), rows[1]
    for value in (mpo_loss(logits, labels, torch.zeros(4)).loss, token_logp(logits, labels, shift=False).sum()):
        (grad,) = torch.autograd.grad(value, logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated once.*on one rank use backend='reference'"):
            torch.autograd.grad(grad.square().sum(), logits)


def test_the_reference_backend_can_be_differentiated_twice(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows[0].double().requires_grad_(), rows[1]
    loss = mpo_loss(logits, labels, torch.zeros(4), backend="reference").loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    assert second.abs().sum() > 0


def test_another_loss_on_the_same_logits_sees_them_unharmed(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows[0].requires_grad_(), rows[1]
    before = logits.detach().clone()
    z = logits * 1
    (mpo_loss(z, labels, torch.zeros(4)).loss + z.square().mean()).backward()
    assert torch.equal(logits.detach(), before)


def test_large_gradients_of_few_labelled_rows_touch_few_pages() -> None:
    logits = torch.randn(2, 64, 30000)
    labels = torch.full((2, 64), -100)
    labels[:, -2:] = 5
    _, row_max, row_sum, _ = ops.token_logp(logits, labels, -100, 0, "cpu")
    grad = ops.logits_grad(logits, labels, row_max, row_sum, torch.ones(2, 64), None, -100, "cpu")
    assert not grad[:, :-2].any()
    assert grad[:, -2:].any()
    assert grad.is_contiguous()
    grad.add_(1)  # it is ordinary memory


def test_rows_of_many_axes_and_a_strided_vocabulary_are_taken(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows
    expected = token_logp(logits, labels, shift=False)
    assert torch.equal(token_logp(logits.transpose(1, 2).contiguous().transpose(1, 2), labels, shift=False), expected)
    wide = torch.full((2, 3, 4, 9, 3, VOCAB + 5), torch.nan)
    wide[1, :2, :2, :, 0, :VOCAB] = logits.view(2, 2, 9, VOCAB)
    view = wide[1, :2, :2, :, 0, :VOCAB]
    assert torch.equal(token_logp(view, labels.view(2, 2, 9), shift=False), expected.view(2, 2, 9))


def test_an_isa_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, rows: tuple[Tensor, Tensor]) -> None:
    monkeypatch.setenv("MPO_CPU_ISA", "neon2")
    with pytest.raises(ValueError, match=r"MPO_CPU_ISA must be one of .*portable.*, got 'neon2'"):
        token_logp(*rows)


_FORK = """
import os
import torch
from mpo_ext import token_logp

torch.set_num_threads(2)
logits, labels = torch.arange(4.0 * 65536).view(4, 65536).sin(), torch.arange(4)  # by two threads
expected = token_logp(logits, labels, backend="reference", shift=False)
child = os.fork()  # before our kernels had anything to do
found = token_logp(logits, labels, shift=False)
if child == 0:
    os._exit(max(abs(a - b) for a, b in zip(found.tolist(), expected.tolist())) > 1e-4)
grandchild = os.fork()
if grandchild == 0:
    os._exit(not torch.equal(token_logp(logits, labels, shift=False), found))
raise SystemExit(any(os.waitpid(one, 0)[1] for one in (child, grandchild)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes_with_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=60)


def test_an_empty_batch_of_rows_gives_an_empty_result() -> None:
    assert token_logp(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), shift=False).shape == (0,)
    out = mpo_loss(torch.zeros(2, 0, 5, requires_grad=True), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2))
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_the_config_reaches_the_kernels(rows: tuple[Tensor, Tensor]) -> None:
    logits, labels = rows
    ref = torch.full((4,), -30.0)
    for config in (
        MPOConfig(beta=0.3, dpo_weight=1, bco_weight=0, ntp_weight=0),
        MPOConfig(dpo_weight=0, bco_weight=2, ntp_weight=0.5, ntp_average="sequence"),
        MPOConfig(label_smoothing=0.2, ignore_index=7),
    ):
        ours = mpo_loss(logits, labels.clamp(min=0), ref, config=config)
        plain = mpo_loss(logits, labels.clamp(min=0), ref, config=config, backend="reference")
        torch.testing.assert_close(ours.loss, plain.loss)
