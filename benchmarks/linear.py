"""Speed and memory of ``linear_mpo_loss`` against the peers: ``python -m benchmarks.linear``.

One pair, forward and backward. The same MPO loss for everyone, from each peer's per-token log-probs by the pair loss
in plain torch, but for Liger, which has no such log-probs and runs its own chunked DPO. The floor is the bare matrix
products of the same size in float32, hidden by head and the two of the backward, timed in the same run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.logits import DTYPES
from benchmarks.measure import environment, interleaved, peak_bytes, write_json
from mpo_ext import MPOConfig, linear_mpo_loss
from mpo_ext.loss import eager as reference
from mpo_ext.loss.reward_shift import HOLD

OURS = {
    "mpo_ext": {},
    "mpo_ext, recompute=False": {"recompute": False},
    "mpo_ext, frozen head": {},
}
FROZEN = "mpo_ext, frozen head"
#: The least memory that is worth its time; compared with the peers, not swept.
SMALL = {"mpo_ext, memory_budget of 512 KiB": {"memory_budget": 512 << 10}}


class Batch:
    """One pair: hidden ``[2, T, D]``, head ``[V, D]``, labels ``[2, T]`` of which the last ``share`` are labelled."""

    def __init__(
        self, dtype: torch.dtype, tokens: int, depth: int, vocab: int, share: float, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(2, tokens, depth, generator=generator).to(dtype)
        self.weight = (torch.randn(vocab, depth, generator=generator) / depth**0.5).to(dtype)
        self.labels = torch.randint(vocab, (2, tokens), generator=generator)
        self.labels[:, : tokens - round(tokens * share)] = -100
        self.ref_logp = torch.full((2,), -12.0 * tokens * share, device=device)
        self.hidden, self.weight = self.hidden.to(device), self.weight.to(device)
        self.labels_on_cpu, self.labels = self.labels, self.labels.to(device)

    def inputs(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)


def _mpo_of_tokens(logp: Tensor, batch: Batch) -> Tensor:
    state = torch.zeros(2, dtype=torch.float64, device=logp.device)
    return reference.pair_loss(logp, batch.labels, batch.ref_logp, state, HOLD, False, 0.0, None, MPOConfig()).loss


def ours(batch: Batch, frozen: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients by ``linear_mpo_loss``."""
    hidden, weight = batch.inputs(frozen)
    loss = linear_mpo_loss(hidden, weight, batch.labels_on_cpu, batch.ref_logp, shift=False, **options).loss
    return loss.detach(), *torch.autograd.grad(loss, (hidden,) if frozen else (hidden, weight))


def _from_tokens(token_logp: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Batch], tuple[Tensor, ...]]:
    """A peer that gives the log-probs of ``[n, D]`` hidden states with ``[n]`` labels, some of them -100."""

    def run(batch: Batch) -> tuple[Tensor, ...]:
        hidden, weight = batch.inputs()
        logp = token_logp(hidden.flatten(0, 1), weight, batch.labels.flatten())
        loss = _mpo_of_tokens(logp.view(batch.labels.shape), batch)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return run


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return reference.token_logp(reference.linear_logits(hidden, weight), labels)


def _torch_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()

    return token_logp


def _trl() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # As its trainers do on a CPU: every position is scored, and masked afterwards. 32,768 is their chunk.
        logp = ChunkedLogProbFunction.apply(hidden, weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())[0]
        return torch.where(labels == -100, 0.0, logp)

    return token_logp


def _cut_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile").float()

    return token_logp


def _quack() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from quack.cross_entropy import cross_entropy

    def token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Its own linear cross entropy gives sums only: the logits are materialised for its kernel.
        return -cross_entropy(F.linear(hidden, weight), labels, reduction="none", ignore_index=-100)

    return token_logp


def _liger() -> Callable[[Batch], tuple[Tensor, ...]]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_of = LigerFusedLinearDPOLoss(compiled=False, compute_nll_loss=True, use_ref_model=False)

    def run(batch: Batch) -> tuple[Tensor, ...]:
        hidden, weight = batch.inputs()
        loss = loss_of(weight, hidden, batch.labels)[0]
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return run


def _compiled() -> Callable[[Batch], tuple[Tensor, ...]]:
    return _from_tokens(torch.compile(_eager, dynamic=False))


RIVALS: dict[str, Callable[[], Callable[[Batch], tuple[Tensor, ...]]]] = {
    "eager": lambda: _from_tokens(_eager),
    "torch.compile": _compiled,
    "F.linear_cross_entropy": lambda: _from_tokens(_torch_linear_cross_entropy()),
    "trl ChunkedLogProb": lambda: _from_tokens(_trl()),
    "cut-cross-entropy torch_compile": lambda: _from_tokens(_cut_cross_entropy()),
    "liger chunked DPO": _liger,
    "quack": lambda: _from_tokens(_quack()),
}


def provider(name: str) -> Callable[[Batch], tuple[Tensor, ...]]:
    """A case by its name; raises whatever a peer raises that is absent or broken."""
    options = (OURS | SMALL).get(name)
    return RIVALS[name]() if options is None else functools.partial(ours, frozen=name == FROZEN, **options)


def providers(
    names: list[str], device: str = "cpu"
) -> tuple[dict[str, Callable[[Batch], tuple[Tensor, ...]]], dict[str, str]]:
    """The cases that can run, and why the others cannot."""
    cases: dict[str, Callable[[Batch], tuple[Tensor, ...]]] = {}
    missing: dict[str, str] = {}
    small = Batch(torch.float32, 4, 16, 64, 1.0, device)
    for name in names:
        try:
            cases[name] = provider(name)
            cases[name](small)
        except Exception as error:  # a peer that is absent or broken is listed, whatever it raises
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            cases.pop(name, None)
    return cases, missing


def floor_cases(batch: Batch) -> dict[str, Callable[[], Any]]:
    """The three matrix products of the labelled rows into memory that is there already; in float32 on a CPU."""
    rows = batch.hidden.flatten(0, 1)[batch.labels.flatten() != -100]
    weight = batch.weight
    if rows.device.type == "cpu":
        rows, weight = rows.float(), weight.float()
    logits = rows.new_zeros(rows.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(rows), torch.empty_like(weight)
    return {
        "mm forward": lambda: torch.mm(rows, weight.T, out=logits),
        "mm d hidden": lambda: torch.mm(logits, weight, out=d_hidden),
        "mm d weight": lambda: torch.mm(logits.T, rows, out=d_weight),
    }


def time_case(dtype: str, share: float, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Times all cases of one dtype and share of labelled rows, interleaved, and prints them."""
    batch = Batch(DTYPES[dtype], args.tokens, args.depth, args.vocab, share, args.device)
    cases, missing = providers(names, args.device)
    synchronize = getattr(torch, args.device.partition(":")[0]).synchronize

    def timed_to_its_end(run: Callable[[], Any]) -> Callable[[], Any]:
        def whole() -> Any:
            result = run()
            synchronize()
            return result

        return whole

    runs = {name: functools.partial(run, batch) for name, run in cases.items()} | floor_cases(batch)
    timed = {name: (synchronize, timed_to_its_end(run)) for name, run in runs.items()}
    timings = interleaved(timed, args.runs)
    median = {name: timing.median_s for name, timing in timings.items()}
    forward, d_hidden, d_weight = (median[name] for name in ("mm forward", "mm d hidden", "mm d weight"))
    recomputing = 2 * forward + d_hidden + d_weight
    floors = {
        "mpo_ext": recomputing,
        **dict.fromkeys(SMALL, recomputing),
        "mpo_ext, recompute=False": forward + d_hidden + d_weight,
        FROZEN: forward + d_hidden,
    }
    labelled = int((batch.labels != -100).sum())
    print(f"\n{dtype}, {labelled} of {batch.labels.numel()} rows labelled, forward + backward, {args.runs} runs")
    print(f"{'case':<34}{'median':>9}{'p20 .. p80':>18}{'/ recompute=False':>19}{'/ its products':>16}")
    base = median.get("mpo_ext, recompute=False", float("nan"))
    for name, timing in timings.items():
        low, high = timing.spread_s
        floor = f"{median[name] / floors[name]:.2f}" if name in floors else ""
        spread = f"{low:.2f} .. {high:.2f} s"
        print(f"{name:<34}{median[name]:>7.2f} s{spread:>18}{median[name] / base:>19.2f}{floor:>16}")
    for name, reason in missing.items():
        print(f"{name:<34}not run: {reason}")
    return {
        "labelled": labelled,
        "rows": batch.labels.numel(),
        "median_s": median,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "over_floor": {name: median[name] / floor for name, floor in floors.items() if name in median},
        "missing": missing,
    }


def _gpu_peak(run: Callable[[Batch], Any], dtype: str, share: float, args: argparse.Namespace) -> int:
    batch = Batch(DTYPES[dtype], args.tokens, args.depth, args.vocab, share, args.device)
    run(batch)  # compiled, and torch's own workspaces allocated
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _memory_target(begin: Callable[[], None], name: str, dtype: str, share: float, sizes: tuple[int, ...]) -> None:
    cases, missing = providers([name])
    if name in missing:
        raise RuntimeError(missing[name])
    if "compile" in name:  # the real shape must be seen to be compiled
        cases[name](Batch(DTYPES[dtype], *sizes, share))
    # On a small batch it has run already, so what a first call sets up counts for nobody.
    batch = Batch(DTYPES[dtype], *sizes, share)
    begin()
    cases[name](batch)


def measure_memory(dtype: str, share: float, names: list[str], args: argparse.Namespace) -> dict[str, int | str]:
    """Peak memory beyond inputs and gradients, in bytes: resident in a fresh process, or allocated on the GPU."""
    sizes = (args.tokens, args.depth, args.vocab)
    width = DTYPES[dtype].itemsize
    d_hidden, d_weight = 2 * args.tokens * args.depth * width, args.vocab * args.depth * width
    cases, missing = providers(names, args.device)
    print(f"\n{dtype}, peak memory beyond inputs and gradients, MiB")
    results: dict[str, int | str] = dict(missing)
    for name, run in cases.items():
        try:
            if args.device == "cpu":
                peak = peak_bytes(_memory_target, name, dtype, share, sizes)
            else:
                peak = _gpu_peak(run, dtype, share, args)
        except RuntimeError as error:
            missing[name] = results[name] = str(error)
            continue
        beyond = peak - d_hidden - (0 if name == FROZEN else d_weight)
        results[name] = beyond
        print(f"{name:<34}{beyond / 2**20:>9.1f}")
    for name, reason in missing.items():
        print(f"{name:<34}not run: {reason}")
    return results


def main() -> None:
    """Prints the tables, and writes them as JSON if asked."""
    everyone = [*OURS, *SMALL, *RIVALS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="T, the length of each of the two sequences")
    parser.add_argument("--depth", type=int, default=896, help="D, the size of a hidden state")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, where the fused backend is the default one")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.15], help="shares of rows with a label")
    parser.add_argument("--cases", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory table")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"one pair, T {args.tokens}, D {args.depth}, V {args.vocab}")
    results: dict[str, Any] = {
        "tokens": args.tokens,
        "depth": args.depth,
        "vocab": args.vocab,
        "time": {},
        "memory": {},
    }
    for dtype in args.dtypes:
        results["time"][dtype] = {str(share): time_case(dtype, share, args.cases, args) for share in args.shares}
    if not args.no_memory:
        for dtype in args.dtypes:
            results["memory"][dtype] = measure_memory(dtype, 1.0, args.cases, args)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
