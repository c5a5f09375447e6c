"""Compares ``mpo_loss`` with other libraries (rivals): ``python -m benchmarks.logits``.

mpo_ext and the rivals compute the same MPO loss of one pair, forward and backward. The tables also show a lower bound
of the times, the floor. It is the time to read the logits of labelled tokens twice and to write them once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import losses
from mpo_ext import MPOConfig, mpo_loss
from mpo_ext.loss import eager
from mpo_ext.loss.reward_shift import BatchShift
from mpo_ext.plan.roofline import LossShape

STATISTICS = "mpo_ext, all statistics"
STATS = ("entropy", "mean_logit", "top1")


class LogitsBatch:
    """Random inputs of the loss that takes logits: logits ``[2B, T, V]``, ref_logp ``[2B]``, and labels ``[2B, T]``.

    Only the last fraction ``share`` of each sequence has labels other than -100.
    """

    def __init__(self, loss: LossShape, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (2 * loss.pairs, loss.tokens)
        # All rows have the same values, because drawing values for each row takes longer than the measurement.
        row = torch.randn(1, 1, loss.vocab, generator=generator).to(device, getattr(torch, loss.dtype))
        self.logits = row.expand(*shape, loss.vocab).contiguous()
        self.labels = torch.randint(loss.vocab, shape, generator=generator)
        self.labels[:, : loss.tokens - round(loss.tokens * loss.share)] = -100
        self.labels = self.labels.to(device)
        self.ref_logp = torch.full(shape[:1], -12.0 * loss.tokens * loss.share, device=device)


#: Function that returns the loss; its first argument is the logits, which require a gradient.
LossOf = Callable[[Tensor, LogitsBatch], Tensor]


def gradient(loss_of: LossOf, batch: LogitsBatch) -> Tensor:
    """Runs forward and backward of ``loss_of``, and returns the gradient of the logits."""
    values = batch.logits.detach().requires_grad_()
    return torch.autograd.grad(loss_of(values, batch), values)[0]


def _ours(**options: Any) -> Callable[[], LossOf]:
    def loss_of(values: Tensor, batch: LogitsBatch) -> Tensor:
        return mpo_loss(values, batch.labels, batch.ref_logp, shift=False, **options).loss

    return lambda: loss_of


def _compiled() -> LossOf:
    def reference_loss(values: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
        return mpo_loss(values, labels, ref_logp, shift=False, backend="reference").loss

    compiled = torch.compile(reference_loss, dynamic=False)
    return lambda values, batch: compiled(values, batch.labels, batch.ref_logp)


def pair_loss(logp: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
    """Returns the MPO loss, computed in eager torch from the log-probs ``[2B, T]`` of the labels."""
    state = torch.zeros(2, dtype=torch.float64, device=logp.device)
    return eager.pair_loss(logp, labels, ref_logp, BatchShift(state), MPOConfig()).loss


def _from_tokens(token_logp: Callable[[Tensor, Tensor], Tensor]) -> LossOf:
    """Returns a function that computes the MPO loss with another library's ``token_logp(logits, labels)``.

    Some libraries reject the label -100. The function therefore passes the label 0 instead, and ignores the result.
    """

    def loss_of(values: Tensor, batch: LogitsBatch) -> Tensor:
        logp = token_logp(values, batch.labels.clamp(min=0)).float()
        return pair_loss(torch.where(batch.labels == -100, 0.0, logp), batch.labels, batch.ref_logp)

    return loss_of


def _selective_log_softmax() -> LossOf:
    from trl.trainer.utils import selective_log_softmax

    return _from_tokens(selective_log_softmax)


def _liger() -> LossOf:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def token_logp(values: Tensor, labels: Tensor) -> Tensor:
        flat = liger_cross_entropy(values.flatten(0, 1), labels.flatten(), reduction="none")
        return -flat.view(labels.shape)

    return _from_tokens(token_logp)


def _quack() -> LossOf:
    from quack.cross_entropy import cross_entropy

    def token_logp(values: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(values.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    return _from_tokens(token_logp)


LOSSES: dict[str, Callable[[], LossOf]] = {
    "mpo_ext": _ours(),
    "mpo_ext, reuse_logits": _ours(reuse_logits=True),
    STATISTICS: _ours(stats=STATS),
    "mpo_ext, cuda": _ours(backend="cuda"),
    "mpo_ext, triton": _ours(backend="triton"),
    "eager": _ours(backend="reference"),
    "torch.compile": _compiled,
    "TRL selective_log_softmax": _selective_log_softmax,
    "Liger cross entropy": _liger,
    "quack cross entropy": _quack,
}
#: Providers that write the gradient over the logits.
OVERWRITING = frozenset({"mpo_ext, reuse_logits", "Liger cross entropy"})


def provider(name: str) -> losses.Provider:
    """Returns the implementation ``name``: a function that takes a batch and returns the gradient of the logits.

    A missing or broken library may raise any exception.
    """
    return functools.partial(gradient, LOSSES[name]())


def _floor_runs(batch: LogitsBatch) -> dict[str, Callable[[], Any]]:
    """Returns ``{"floor": run}``. ``run`` reads the logits of labelled tokens twice, and overwrites them once.

    The time of ``run`` is a lower bound of the time that the loss takes.
    """
    labelled = batch.logits[:, int((batch.labels[0] == -100).sum()) :]
    return {"floor": lambda: (labelled.view(torch.float32).sum(), labelled.view(torch.float32).mul_(1.0))}


def _floor_seconds(name: str, medians: Mapping[str, float]) -> float:
    return medians["floor"]


BENCHMARK = losses.LossBenchmark(
    name="logits",
    providers={name: functools.partial(provider, name) for name in LOSSES},
    make_batch=LogitsBatch,
    floor_runs=_floor_runs,
    floor_seconds=_floor_seconds,
    floor="one read, then one read and one write of the labelled logits",
    overwriting=OVERWRITING,
)


def main() -> None:
    """Measures all methods, prints the tables, and writes the results as JSON if ``--json`` is given."""
    ours = ("mpo_ext", "mpo_ext, reuse_logits", STATISTICS, "eager", "torch.compile")
    parser = losses.parser(str(__doc__).splitlines()[0], BENCHMARK, cases=ours, runs=11, shares=[1.0, 0.1])
    losses.command(BENCHMARK, parser.parse_args())


if __name__ == "__main__":
    main()
