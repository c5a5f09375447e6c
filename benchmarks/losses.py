"""Measures implementations of a loss, for ``benchmarks.logits`` and ``benchmarks.linear``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from benchmarks.measure import (
    Run,
    Timing,
    environment,
    gpu_peak_bytes,
    interleaved,
    nothing,
    peak_bytes,
    use_cpu_time,
    write_json,
)
from mpo_ext.plan.roofline import LossShape

#: Function that runs forward and backward on a batch and returns the gradients.
Provider = Callable[[Any], Any]

DTYPES = ("float32", "bfloat16")
_TOO_LONG = "would take too long"
_TRIAL = 16  # the rows and the vocabulary of a trial are smaller by this factor


@dataclasses.dataclass(frozen=True)
class LossBenchmark:
    """A benchmark of the loss that takes logits, or of the loss that takes hidden states.

    A provider is an implementation of the loss, in mpo_ext or in another library. Each provider has a floor: the time
    of the necessary work, such as the matmuls. No provider can be faster than its floor.

    Attributes:
        name: "logits" or "linear".
        providers: For each name, a function that returns the provider. If a library is missing or broken, the function
            may raise any exception.
        make_batch: Function that returns random inputs for a shape on a device.
        floor_runs: Function that takes a batch and returns a dict from name to function. Each of these functions does
            a part of the necessary work, and may overwrite the batch.
        floor_seconds: Function that returns the floor of a provider in seconds. The first argument is the provider's
            name. The second argument maps the names from ``floor_runs`` to median seconds.
        floor: Description of the floor, for the result files.
        overwriting: Names of the providers that overwrite the logits of the batch.
        frozen: Names of the providers that compute no gradient of the head.
    """

    name: str
    providers: Mapping[str, Callable[[], Provider]]
    make_batch: Callable[[LossShape, str], Any]
    floor_runs: Callable[[Any], dict[str, Callable[[], Any]]]
    floor_seconds: Callable[[str, Mapping[str, float]], float]
    floor: str
    overwriting: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()

    def gradient_bytes(self, name: str, loss: LossShape) -> int:
        """Returns the bytes of the gradients that the implementation ``name`` allocates."""
        if name in self.overwriting:
            return 0
        if loss.hidden is None:
            return loss.size * loss.rows * loss.vocab
        return loss.size * loss.hidden * (loss.rows + loss.vocab * (name not in self.frozen))


def reason_of(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def usable(
    benchmark: LossBenchmark,
    names: Iterable[str],
    loss: LossShape,
    *,
    device: str = "cpu",
    most_seconds: float = math.inf,
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Returns the providers that can run on the shape ``loss``.

    Each provider that is not compiled first runs on a small shape. Providers of other libraries must also be fast: a
    run on the shape ``loss`` may take at most ``most_seconds``.

    Returns:
        Two dicts. The first maps the name of each usable provider to the provider. The second maps the name of each
        rejected provider to the reason.
    """
    trial = dataclasses.replace(
        loss, tokens=max(loss.tokens // _TRIAL, 8), vocab=max(loss.vocab // _TRIAL, 512), share=1.0
    )
    larger = loss.rows * loss.vocab / (trial.rows * trial.vocab)
    torch.compiler.reset()  # torch.compile gives up after eight shapes of one function
    batch = benchmark.make_batch(trial, device)
    cases: dict[str, Provider] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            run = benchmark.providers[name]()
            is_ours, is_compiled = name.startswith("mpo_ext"), "compile" in name
            if is_compiled and missing.get("eager", "").startswith(_TOO_LONG):
                missing[name] = "not compiled, because the same loss in eager torch would take too long"
                continue
            if not is_compiled:  # a compiled program would be compiled for the trial, too
                run(batch)  # the first call includes setup
                elapsed = min(_elapsed(run, batch) for _ in range(2))
                # Fixed costs dominate a trial of ours, so the estimate would be too high.
                if elapsed * larger > most_seconds and not is_ours:
                    missing[name] = (
                        f"{_TOO_LONG}: {elapsed:.2f} s in a trial of T = {trial.tokens}, V = {trial.vocab:,}, and a "
                        f"run has {larger:.0f} times its work"
                    )
                    continue
            # A slow matrix product may be fast in the cache of a trial.
            if is_compiled or (not is_ours and most_seconds < math.inf):
                whole = benchmark.make_batch(loss, device)
                if is_compiled:
                    run(whole)
                if most_seconds < math.inf and (elapsed := _elapsed(run, whole)) > most_seconds:
                    missing[name] = f"{_TOO_LONG}: {elapsed:.1f} s for a run"
                    continue
        except Exception as error:  # a peer that is absent or broken is listed, whatever it raises
            missing[name] = reason_of(error)
            continue
        cases[name] = run
    return cases, missing


def _elapsed(run: Provider, batch: Any) -> float:
    begin = time.perf_counter()
    run(batch)
    return time.perf_counter() - begin


def runs_of(
    benchmark: LossBenchmark, cases: Mapping[str, Provider], loss: LossShape, *, device: str = "cpu"
) -> dict[str, Run]:
    """Returns the functions to measure: a dict from name to (prepare, run).

    The dict has an entry for each implementation in ``cases``, and for each function in ``benchmark.floor_runs``. The
    inputs of ``run`` have the shape ``loss``. If an implementation overwrites the logits, ``prepare`` restores them.
    """
    batch = benchmark.make_batch(loss, device)
    work = batch if loss.hidden is not None else benchmark.make_batch(loss, device)
    runs: dict[str, Run] = {}
    for name, run in cases.items():
        if name in benchmark.overwriting:
            runs[name] = functools.partial(work.logits.copy_, batch.logits), functools.partial(run, work)
        else:
            runs[name] = nothing, functools.partial(run, batch)
    return runs | {name: (nothing, run) for name, run in benchmark.floor_runs(work).items()}


def floors_of(benchmark: LossBenchmark, names: Iterable[str], timings: Mapping[str, Timing]) -> dict[str, float]:
    """Returns a lower bound of the time of each implementation, in seconds.

    ``timings`` are the measured times of the runs that ``runs_of`` returns.
    """
    medians = {name: timing.median_s for name, timing in timings.items()}
    return {name: benchmark.floor_seconds(name, medians) for name in names}


def peak_of(benchmark: LossBenchmark, name: str, run: Provider, loss: LossShape, device: str = "cpu") -> int:
    """Returns the peak bytes that a run of the implementation ``name`` allocates, with gradients and without inputs.

    Raises OSError or RuntimeError if the memory cannot be measured.
    """
    if device == "cpu":
        return peak_bytes(memory_target, benchmark, name, loss, torch.get_num_threads())
    batch = benchmark.make_batch(loss, device)
    run(batch)  # compiles, and lets torch allocate its workspaces
    return gpu_peak_bytes(functools.partial(run, batch))


def memory_target(
    begin: Callable[[], None], benchmark: LossBenchmark, name: str, loss: LossShape, threads: int
) -> None:
    """Runs the implementation ``name`` on the shape ``loss``. ``peak_bytes`` calls this function in a fresh process.

    Before this run, a first run does the setup. ``begin`` is called between both runs.
    """
    torch.set_num_threads(threads)
    run = benchmark.providers[name]()
    small = {"tokens": 4, "share": 1.0} if loss.hidden is None else {"tokens": 4, "hidden": 16, "vocab": 64}
    # A compiled provider must see the real shape to be compiled for it.
    run(benchmark.make_batch(loss if "compile" in name else dataclasses.replace(loss, **small), "cpu"))
    batch = benchmark.make_batch(loss, "cpu")
    begin()
    run(batch)


# ---------------------------------------------------------------------------------------------------------- commands


def parser(description: str, benchmark: LossBenchmark, *, cases: Iterable[str], runs: int, shares: list[float]) -> Any:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--tokens", type=int, default=512, help="T, length of each of the two responses")
    if benchmark.name == "linear":
        made.add_argument("--hidden-size", "--depth", type=int, default=896, help="D, size of a hidden state")
    made.add_argument("--vocab", type=int, default=151936, help="V, size of the vocabulary")
    made.add_argument("--runs", type=int, default=runs, help="counted runs of each case")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument("--cpu-time", action="store_true", help="measure CPU time, for a machine with other work")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    made.add_argument("--shares", nargs="+", type=float, default=shares, help="shares of the rows that have a label")
    made.add_argument("--cases", nargs="+", choices=benchmark.providers, default=list(cases))
    made.add_argument("--no-memory", action="store_true", help="do not measure memory")
    made.add_argument("--json", metavar="FILE", help="write the results to this file")
    return made


def command(benchmark: LossBenchmark, args: argparse.Namespace) -> None:
    """Measures the time and memory that the loss takes for one preference pair, and prints tables.

    Writes the results as JSON if ``--json`` is given.
    """
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        use_cpu_time()
    hidden = getattr(args, "hidden_size", None)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"one pair, T {args.tokens}, {'' if hidden is None else f'D {hidden}, '}V {args.vocab}")
    results: dict[str, Any] = {"tokens": args.tokens, "vocab": args.vocab, "hidden": hidden, "time": {}, "memory": {}}
    for dtype in args.dtypes:
        loss = LossShape(tokens=args.tokens, vocab=args.vocab, hidden=hidden, dtype=dtype)
        results["time"][dtype] = {
            str(share): time_cases(benchmark, dataclasses.replace(loss, share=share), args) for share in args.shares
        }
    if not args.no_memory:
        for dtype in args.dtypes:
            loss = LossShape(tokens=args.tokens, vocab=args.vocab, hidden=hidden, dtype=dtype)
            results["memory"][dtype] = memory_of_cases(benchmark, loss, args)
    if args.json:
        write_json(args.json, results)


def time_cases(benchmark: LossBenchmark, loss: LossShape, args: argparse.Namespace) -> dict[str, Any]:
    """Times the implementations in alternating runs, prints a table, and returns the results for the JSON file."""
    cases, missing = usable(benchmark, args.cases, loss, device=args.device)
    timings = interleaved(runs_of(benchmark, cases, loss, device=args.device), args.runs, device=args.device)
    floors = floors_of(benchmark, cases, timings)
    base = timings["mpo_ext"].median_s if "mpo_ext" in timings else math.nan
    print(f"\n{loss.dtype}, {loss.labelled} of {loss.rows} rows labelled, forward + backward, {args.runs} runs")
    print(f"{'case':<36}{'median':>10}{'p20 .. p80':>22}{'/ mpo_ext':>11}{'/ floor':>9}")
    for name, timing in timings.items():
        low, high = timing.spread_s
        floor = f"{timing.median_s / floors[name]:.2f}" if name in floors else ""
        spread = f"{low * 1e3:.1f} .. {high * 1e3:.1f} ms"
        print(f"{name:<36}{timing.median_s * 1e3:>7.1f} ms{spread:>22}{timing.median_s / base:>11.2f}{floor:>9}")
    _print_missing(missing)
    return {
        "labelled": loss.labelled,
        "rows": loss.rows,
        "median_s": {name: timing.median_s for name, timing in timings.items()},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "over_floor": {name: timings[name].median_s / floor for name, floor in floors.items()},
        "missing": missing,
    }


def memory_of_cases(benchmark: LossBenchmark, loss: LossShape, args: argparse.Namespace) -> dict[str, int | str]:
    """Measures and prints the peak memory of each implementation.

    On a CPU, the peak is the increase of the resident memory of a fresh process. On a GPU, it is the allocated memory.

    Returns:
        A dict. A key is the name of an implementation. A value is the peak bytes beyond inputs and gradients, or the
        reason why the peak was not measured.
    """
    trial = dataclasses.replace(loss, tokens=min(loss.tokens, 8), vocab=min(loss.vocab, 512))
    cases, missing = usable(benchmark, args.cases, trial, device=args.device)
    print(f"\n{loss.dtype}, peak memory, MiB")
    print(f"{'case':<36}{'beyond inputs':>15}{'beyond inputs and gradients':>29}")
    results: dict[str, int | str] = {}
    for name, run in cases.items():
        try:
            peak = peak_of(benchmark, name, run, loss, args.device)
        except (OSError, RuntimeError) as error:
            missing[name] = str(error)
            continue
        results[name] = peak - benchmark.gradient_bytes(name, loss)
        print(f"{name:<36}{peak / 2**20:>15.1f}{results[name] / 2**20:>29.1f}")
    _print_missing(missing)
    return results | missing


def _print_missing(missing: Mapping[str, str]) -> None:
    for name, reason in missing.items():
        print(f"{name:<36}not run: {reason}")
