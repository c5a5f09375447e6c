"""Speed and memory of ``mpo_loss`` from logits: ``python -m benchmarks.logits``.

One pair, forward and backward, all rows labelled unless said otherwise. Rivals on the same task: the same loss in
plain torch (``backend="reference"``), eager and under ``torch.compile``. The floor is what any method must at least
do to the logits' bytes: read them once, then read and write them once (``sum`` and ``mul_`` of the same memory as
float32); with 10 % labelled, that for those rows, and zeros into the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Timing, environment, interleaved, peak_bytes, write_json
from mpo_ext import MPOOutput, mpo_loss

STATS = ("entropy", "mean_logit", "top1")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_batch(dtype: torch.dtype, tokens: int, vocab: int, share: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """One pair: logits ``[2, T, V]``, labels ``[2, T]`` of which the last ``share`` are labelled, ref_logp ``[2]``."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tokens, vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (2, tokens), generator=generator)
    labels[:, : tokens - round(tokens * share)] = -100
    return logits, labels, torch.full((2,), -10.0 * tokens)


def loss_and_grad(logits: Tensor, labels: Tensor, ref_logp: Tensor, **options: Any) -> Tensor:
    """Forward and backward; returns the gradient."""
    logits = logits.detach().requires_grad_()
    output: MPOOutput = mpo_loss(logits, labels, ref_logp, shift=False, **options)
    return torch.autograd.grad(output.loss, logits)[0]


def _compiled() -> Callable[..., Tensor]:
    def reference_loss(logits: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
        return mpo_loss(logits, labels, ref_logp, shift=False, backend="reference").loss

    compiled = torch.compile(reference_loss, dynamic=False)

    def run(logits: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(compiled(logits, labels, ref_logp), logits)[0]

    return run


def time_dtype(name: str, tokens: int, vocab: int, runs: int) -> dict[str, Timing]:
    """Times every case of one dtype, interleaved."""
    logits, labels, ref_logp = make_batch(DTYPES[name], tokens, vocab)
    tenth = make_batch(DTYPES[name], tokens, vocab, 0.1)[1]
    work = logits.clone()  # the cases that overwrite their logits work here
    words = work.view(torch.float32)
    head = tokens - round(tokens * 0.1)
    compiled = _compiled()

    def nothing() -> None:
        pass

    def restore() -> None:
        work.copy_(logits)

    cases = {
        "mpo_ext": (nothing, lambda: loss_and_grad(logits, labels, ref_logp)),
        "mpo_ext, reuse_logits": (restore, lambda: loss_and_grad(work, labels, ref_logp, reuse_logits=True)),
        "mpo_ext, all statistics": (nothing, lambda: loss_and_grad(logits, labels, ref_logp, stats=STATS)),
        "mpo_ext, 10 % labelled": (nothing, lambda: loss_and_grad(logits, tenth, ref_logp)),
        "mpo_ext, reuse_logits, 10 % labelled": (
            restore,
            lambda: loss_and_grad(work, tenth, ref_logp, reuse_logits=True),
        ),
        "eager": (nothing, lambda: loss_and_grad(logits, labels, ref_logp, backend="reference")),
        "torch.compile": (nothing, lambda: compiled(logits, labels, ref_logp)),
        "floor": (restore, lambda: (words.sum(), words.mul_(1.0))),
        "floor, 10 % labelled, in place": (
            restore,
            lambda: (words[:, head:].sum(), words[:, head:].mul_(1.0), words[:, :head].zero_()),
        ),
    }
    return interleaved(cases, runs)


def _memory_target(begin: Callable[[], None], case: str, dtype: str, tokens: int, vocab: int) -> None:
    options = {"eager": {"backend": "reference"}, "mpo_ext, reuse_logits": {"reuse_logits": True}}.get(case, {})
    run = _compiled() if case == "torch.compile" else loss_and_grad
    # Imports, compilation and thread pools come first; the compiled case must see the real shape to be compiled.
    small = make_batch(DTYPES[dtype], tokens if case == "torch.compile" else 4, vocab)
    run(*small, **options)
    del small
    batch = make_batch(DTYPES[dtype], tokens, vocab)
    begin()
    run(*batch, **options)


def main() -> None:
    """Prints the tables, and writes them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="T, the length of each of the two sequences")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--runs", type=int, default=11, help="counted runs of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    results: dict[str, Any] = {"tokens": args.tokens, "vocab": args.vocab, "time": {}, "memory": {}}
    for name in args.dtypes:
        timings = time_dtype(name, args.tokens, args.vocab, args.runs)
        ours = timings["mpo_ext"].median_s
        print(f"\n{name}, [2, {args.tokens}, {args.vocab}], forward + backward, {args.runs} runs")
        print(f"{'case':<38}{'median':>10}{'p20 .. p80':>20}{'/ mpo_ext':>11}")
        for case, timing in timings.items():
            low, high = timing.spread_s
            print(
                f"{case:<38}{timing.median_s * 1e3:>7.1f} ms{f'{low * 1e3:.1f} .. {high * 1e3:.1f} ms':>20}"
                f"{timing.median_s / ours:>11.2f}"
            )
        reuse, floor = timings["mpo_ext, reuse_logits"].median_s, timings["floor"].median_s
        ratios = {
            "eager / mpo_ext": timings["eager"].median_s / ours,
            "torch.compile / mpo_ext": timings["torch.compile"].median_s / ours,
            "torch.compile / reuse_logits": timings["torch.compile"].median_s / reuse,
            "reuse_logits / floor": reuse / floor,
            "10 % labelled / all": timings["mpo_ext, 10 % labelled"].median_s / ours,
            "reuse_logits, 10 % labelled / its floor": timings["mpo_ext, reuse_logits, 10 % labelled"].median_s
            / timings["floor, 10 % labelled, in place"].median_s,
            "reuse_logits, 10 % labelled / all": timings["mpo_ext, reuse_logits, 10 % labelled"].median_s / reuse,
            "all statistics / none": timings["mpo_ext, all statistics"].median_s / ours,
        }
        print("  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
        results["time"][name] = {
            "median_s": {case: timing.median_s for case, timing in timings.items()},
            "seconds": {case: timing.seconds for case, timing in timings.items()},
            "ratios": ratios,
        }
    print(f"\nPeak resident memory of a fresh process, MiB ({args.tokens} tokens, vocabulary {args.vocab})")
    print(f"{'dtype':<10}{'case':<26}{'beyond logits':>15}{'beyond logits and gradient':>29}")
    for name in args.dtypes:
        grad = 2 * args.tokens * args.vocab * DTYPES[name].itemsize
        for case in ("mpo_ext", "mpo_ext, reuse_logits", "torch.compile", "eager"):
            peak = peak_bytes(_memory_target, case, name, args.tokens, args.vocab)
            # With reuse_logits the gradient is no memory of its own.
            beyond = peak if case == "mpo_ext, reuse_logits" else peak - grad
            print(f"{name:<10}{case:<26}{peak / 2**20:>15.1f}{beyond / 2**20:>29.1f}")
            results["memory"].setdefault(name, {})[case] = {"peak_bytes": peak, "beyond_gradient_bytes": beyond}
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
