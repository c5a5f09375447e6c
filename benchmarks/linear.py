"""Compares ``linear_mpo_loss`` with other libraries (rivals): ``python -m benchmarks.linear``.

A rival computes log-probs, and ``logits.pair_loss`` then computes the MPO loss. Liger is an exception: it returns no
log-probs, so its chunked DPO loss is measured. The tables also show the floor, a lower bound of the time. The floor is
the time of the necessary matmuls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import losses
from benchmarks.logits import pair_loss
from mpo_ext import linear_mpo_loss
from mpo_ext.loss import eager
from mpo_ext.ops.matmul import matmul_dtype
from mpo_ext.plan.roofline import LossShape

FROZEN = "mpo_ext, frozen head"
OURS: dict[str, dict[str, Any]] = {
    "mpo_ext": {},
    "mpo_ext, recompute=True": {"recompute": True},
    "mpo_ext, recompute=False": {"recompute": False},
    FROZEN: {},
}
#: Our providers that need a GPU.
OURS_ON_GPU: dict[str, dict[str, Any]] = {"mpo_ext, triton": {"backend": "triton"}}
#: The smallest useful memory budget. It is not measured on every shape.
SMALL: dict[str, dict[str, Any]] = {"mpo_ext, memory_budget of 512 KiB": {"memory_budget": 512 << 10}}


class HiddenBatch:
    """Random inputs of the loss that takes hidden states, for B pairs with T tokens per sequence.

    The B pairs are joined to one pair of two sequences with ``B * T`` tokens each. The sizes of the matmuls stay the
    same. D is the hidden size, and V is the vocabulary size. The shapes are: hidden states ``[2, B * T, D]``, head
    ``[V, D]``, labels ``[2, B * T]``, ref_logp ``[2]``. In each sequence, only the last fraction ``share`` has labels.
    All other labels are -100.
    """

    def __init__(self, loss: LossShape, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype, tokens, hidden_size = getattr(torch, loss.dtype), loss.pairs * loss.tokens, loss.hidden_size
        on_device = {"generator": generator, "device": device}
        self.hidden = torch.randn(2, tokens, hidden_size, **on_device).to(dtype)
        self.weight = (torch.randn(loss.vocab, hidden_size, **on_device) / hidden_size**0.5).to(dtype)
        self.labels_on_cpu = torch.randint(loss.vocab, (2, tokens), **on_device).cpu()
        self.labels_on_cpu[:, : tokens - round(tokens * loss.share)] = -100
        self.labels = self.labels_on_cpu.to(device)
        self.ref_logp = torch.full((2,), -12.0 * tokens * loss.share, device=device)

    def inputs(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the hidden states and the head. Both require a gradient, but a ``frozen`` head does not."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)


def ours(batch: HiddenBatch, frozen: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Returns the loss of ``linear_mpo_loss``, and the gradients of the hidden states and the head.

    A ``frozen`` head has no gradient.
    """
    hidden, weight = batch.inputs(frozen)
    loss = linear_mpo_loss(hidden, weight, batch.labels_on_cpu, batch.ref_logp, shift=False, **options).loss
    return loss.detach(), *torch.autograd.grad(loss, (hidden,) if frozen else (hidden, weight))


def _from_tokens(token_logp: Callable[[Tensor, Tensor, Tensor], Tensor]) -> losses.Provider:
    """Returns a function that computes the MPO loss of a batch and its gradients, with another library's log-probs.

    ``token_logp(hidden, head, labels)`` is a function of the other library. It returns the log-prob of each label,
    ``[n]``. The shapes of its arguments are ``[n, D]``, ``[V, D]`` and ``[n]``. Some labels are -100.
    """

    def run(batch: HiddenBatch) -> tuple[Tensor, ...]:
        hidden, weight = batch.inputs()
        logp = token_logp(hidden.flatten(0, 1), weight, batch.labels.flatten())
        loss = pair_loss(logp.view(batch.labels.shape), batch.labels, batch.ref_logp)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return run


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager.token_logp(eager.linear_logits(hidden, weight), labels)


def _torch_linear_cross_entropy() -> losses.Provider:
    options = torch.nn.LinearCrossEntropyOptions()

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()

    return _from_tokens(token_logp)


def _trl() -> losses.Provider:
    from trl.kernels import ChunkedLogProbFunction

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # TRL's trainers on a CPU do the same: they score every position, in chunks of 32,768, and mask afterwards.
        logp = ChunkedLogProbFunction.apply(hidden, weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())[0]
        return torch.where(labels == -100, 0.0, logp)

    return _from_tokens(token_logp)


def _cut_cross_entropy(implementation: str) -> Callable[[], losses.Provider]:
    def make() -> losses.Provider:
        from cut_cross_entropy import linear_cross_entropy

        def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=implementation).float()

        return _from_tokens(token_logp)

    return make


def _quack() -> losses.Provider:
    from quack.cross_entropy import cross_entropy

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # quack's linear cross entropy returns sums only, so quack's kernel for logits is measured.
        return -cross_entropy(F.linear(hidden, weight), labels, reduction="none", ignore_index=-100)

    return _from_tokens(token_logp)


def _liger() -> losses.Provider:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_of = LigerFusedLinearDPOLoss(compiled=False, compute_nll_loss=True, use_ref_model=False)

    def run(batch: HiddenBatch) -> tuple[Tensor, ...]:
        hidden, weight = batch.inputs()
        loss = loss_of(weight, hidden, batch.labels)[0]
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return run


RIVALS: dict[str, Callable[[], losses.Provider]] = {
    "eager": lambda: _from_tokens(_eager),
    "torch.compile": lambda: _from_tokens(torch.compile(_eager, dynamic=False)),
    "F.linear_cross_entropy": _torch_linear_cross_entropy,
    "trl ChunkedLogProb": _trl,
    "cut-cross-entropy torch_compile": _cut_cross_entropy("torch_compile"),
    "liger chunked DPO": _liger,
    "quack": _quack,
}
#: Rivals that need a GPU.
GPU_RIVALS = {"cut-cross-entropy": _cut_cross_entropy("cce")}


def provider(name: str) -> losses.Provider:
    """Returns the implementation ``name``: a function of a batch that returns the loss and its gradients.

    A missing or broken library may raise any exception.
    """
    options = (OURS | SMALL | OURS_ON_GPU).get(name)
    if options is None:
        return (RIVALS | GPU_RIVALS)[name]()
    return functools.partial(ours, frozen=name == FROZEN, **options)


def _floor_runs(batch: HiddenBatch) -> dict[str, Callable[[], Any]]:
    """Returns the three matmuls that the loss needs, as functions by name.

    The sum of their times is a lower bound of the time that the loss takes. They multiply only the labelled rows, in
    the dtype that mpo_ext uses, and write to preallocated memory.
    """
    dtype = matmul_dtype(batch.hidden.dtype, batch.hidden.device)
    rows = batch.hidden.flatten(0, 1)[batch.labels.flatten() != -100].to(dtype)
    weight = batch.weight.to(dtype)
    out = rows.new_zeros(rows.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(rows), torch.empty_like(weight)
    return {
        "mm forward": lambda: torch.mm(rows, weight.T, out=out),
        "mm d hidden": lambda: torch.mm(out, weight, out=d_hidden),
        "mm d weight": lambda: torch.mm(out.T, rows, out=d_weight),
    }


def _floor_seconds(name: str, medians: Mapping[str, float]) -> float:
    """Returns a lower bound of the time of the implementation ``name``: the seconds of its matmuls.

    ``medians`` are the median seconds of the runs of ``_floor_runs``. A frozen head needs one matmul less.
    """
    forward_and_hidden = medians["mm forward"] + medians["mm d hidden"]
    return forward_and_hidden if name == FROZEN else forward_and_hidden + medians["mm d weight"]


BENCHMARK = losses.LossBenchmark(
    name="linear",
    providers={
        name: functools.partial(provider, name) for name in (*OURS, *SMALL, *OURS_ON_GPU, *RIVALS, *GPU_RIVALS)
    },
    make_batch=HiddenBatch,
    floor_runs=_floor_runs,
    floor_seconds=_floor_seconds,
    floor="the matrix products of the labelled rows",
    frozen=frozenset({FROZEN}),
)


def main() -> None:
    """Measures all methods, prints the tables, and writes the results as JSON if ``--json`` is given."""
    cases = (*OURS, *SMALL, *RIVALS)
    parser = losses.parser(str(__doc__).splitlines()[0], BENCHMARK, cases=cases, runs=5, shares=[1.0, 0.15])
    losses.command(BENCHMARK, parser.parse_args())


if __name__ == "__main__":
    main()
