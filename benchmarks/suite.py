"""What ``python -m benchmarks`` measures: the groups of each benchmark, and the points that come of them.

All providers of a group, its floor and the programs of ``benchmarks.machine`` take turns, run by run. A provider that
is missing, that fails or that would take too long is a point with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear, logits, machine, train_step
from benchmarks.measure import Timing, interleaved, peak_bytes
from mpo_ext import MPOConfig
from mpo_ext.loss import eager as reference
from mpo_ext.loss.reward_shift import HOLD
from mpo_ext.ops.linear import product_dtype
from mpo_ext.plan.roofline import LossShape

STATISTICS = "mpo_ext, all statistics"
_TRIAL = 16  # a trial has this fraction of rows and of vocabulary
_RUN_SECONDS = 20.0  # that a run may take, if it takes as much longer than its trial as its work is larger


@dataclasses.dataclass(frozen=True)
class Group:
    """Providers that take turns on one shape.

    Attributes:
        sweep: What varies: "base" or the name of an axis.
        loss: The shape.
        providers: By name.
        runs: Counted rounds.
        memory: Of which of them peak memory is measured too, each in a process of its own.
    """

    sweep: str
    loss: LossShape
    providers: tuple[str, ...]
    runs: int = 5
    memory: tuple[str, ...] = ()


@dataclasses.dataclass
class Results:
    """What a benchmark has found so far."""

    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    beside: dict[str, float] = dataclasses.field(default_factory=dict)  # medians in the rounds of the last group

    def add_machine(self, seconds: Mapping[str, Sequence[float]]) -> None:
        """Keeps the seconds of the machine's programs."""
        self.beside = {}
        for name, values in seconds.items():
            if name.startswith("machine: "):
                self.machine.setdefault(name, []).extend(values)
                self.beside[name] = statistics.median(values)


def point(sweep: str, provider: str, loss: LossShape | None, **values: Any) -> dict[str, Any]:
    """A point of a result file; without ``seconds``, ``reason`` says why."""
    shape = {name: getattr(loss, name, None) for name in ("dtype", "pairs", "tokens", "vocab", "hidden", "share")}
    one = {"sweep": sweep, "provider": provider, **shape, "status": "measured", "reason": "", **values}
    seconds = one.get("seconds")
    if seconds:
        timing = Timing(list(seconds))
        low, high = timing.spread_s
        one |= {"median_s": timing.median_s, "p20_s": low, "p80_s": high}
    elif one.get("peak_bytes") is None:
        one["status"] = "not run"
    place = "/".join(f"{name}={value}" for name, value in shape.items() if value is not None)
    return {"id": "/".join(part for part in (sweep, provider, place) if part), **one}


# ---------------------------------------------------------------------------------------------------------- the groups


def _around(base: LossShape, axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, LossShape]]:
    for axis, values in axes.items():
        for value in values:
            changes = dict(value) if isinstance(value, dict) else {axis: value}
            yield axis, dataclasses.replace(base, **changes)


def logits_groups(*, quick: bool) -> list[Group]:
    """From logits: the base in two dtypes, then labelled share, V, T and B."""
    rivals = ("eager", "torch.compile", "TRL selective_log_softmax", "Liger cross entropy", "quack cross entropy")
    everyone = ("mpo_ext", "mpo_ext, reuse_logits", STATISTICS, *rivals, "mpo_ext, cuda", "mpo_ext, triton")
    ours = ("mpo_ext", "mpo_ext, reuse_logits")
    base = LossShape(tokens=64, vocab=16384) if quick else LossShape(tokens=512, vocab=151936)
    small = dataclasses.replace(base, tokens=base.tokens // 2)
    runs = 2 if quick else 4
    groups = []
    for dtype in ("float32", "bfloat16"):
        measured = everyone if not quick else ("mpo_ext", "eager") if dtype == "float32" else ()
        groups.append(Group("base", dataclasses.replace(base, dtype=dtype), everyone, runs, memory=measured))
    vocabs = (8192, 32768) if quick else (32768, 65536, 131072, 262144)
    tokens = (32, 128) if quick else (64, 128, 256, 1024)
    pairs = [{"pairs": count, "tokens": small.tokens // 4} for count in ((2,) if quick else (1, 2, 4, 8))]
    for dtype in ("float32", "bfloat16"):
        of_small, of_base = (dataclasses.replace(one, dtype=dtype) for one in (small, base))
        for sweep, loss in _around(of_base, {"share": (0.1,) if quick else (0.05, 0.1, 0.25, 0.5)}):
            groups.append(Group(sweep, loss, ours, runs))
        for sweep, loss in _around(of_small, {"vocab": vocabs}):
            # Compiling takes longer than all runs: at both ends only.
            is_end = not quick and dtype == "float32" and loss.vocab in (vocabs[0], vocabs[-1])
            compiled = ("torch.compile",) if is_end else ()
            groups.append(Group(sweep, loss, (*ours, "eager", *compiled), 2 if quick else 3))
        for sweep, loss in _around(of_base, {"tokens": tokens}):
            groups.append(Group(sweep, loss, (*ours, "eager") if loss.tokens <= 256 else ours, runs))
        for sweep, loss in _around(of_small, {"pairs": pairs}):
            groups.append(Group(sweep, loss, ours, runs))
    half = dataclasses.replace(small, dtype="float16")
    groups.append(Group("dtype", half, (*ours, "eager"), runs))
    return groups


def linear_groups(*, quick: bool) -> list[Group]:
    """From hidden states: everyone on the base, ours on the sweeps, everyone where few rows have a label."""
    # F.linear_cross_entropy takes seconds even on these small shapes; the full run has a trial of it.
    rivals = tuple(name for name in linear.RIVALS if not (quick and name == "F.linear_cross_entropy"))
    ours, everyone = tuple(linear.OURS), (*linear.OURS, *linear.SMALL, *rivals)
    base = LossShape(tokens=64, vocab=16384, hidden=256) if quick else LossShape(tokens=128, vocab=151936, hidden=896)
    runs = 2
    groups = [
        Group(
            "base", dataclasses.replace(base, dtype="float32"), everyone, runs, memory=ours[:1] if quick else everyone
        ),
        Group("base", dataclasses.replace(base, dtype="bfloat16"), everyone, runs),
    ]
    few = dataclasses.replace(base, share=0.15, dtype="float32")
    groups.append(Group("share", few, ours if quick else everyone, 2))
    half = dataclasses.replace(base, tokens=base.tokens // 2)
    axes: dict[str, Sequence[Any]] = {
        "vocab": (8192,) if quick else (32768, 65536, 262144),
        "hidden": (128,) if quick else (448, 1792),
        "tokens": (32,) if quick else (32, 256),
        "pairs": () if quick else ({"pairs": 2, "tokens": 32}, {"pairs": 4, "tokens": 16}),
    }
    for dtype in ("bfloat16", "float32"):
        for sweep, loss in _around(dataclasses.replace(half, dtype=dtype), axes):
            groups.append(Group(sweep, loss, ours, 2))
    groups.append(Group("share", dataclasses.replace(base, share=0.15, dtype="bfloat16"), ours, 2))
    return groups


# ----------------------------------------------------------------------------------------------------- from the logits


class Pairs:
    """Logits ``[2B, T, V]``, labels of which the last ``share`` are labelled, ref_logp ``[2B]``."""

    def __init__(self, loss: LossShape) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (2 * loss.pairs, loss.tokens)
        # The same values for each row: drawing them all takes longer than measuring.
        row = torch.randn(1, 1, loss.vocab, generator=generator).to(getattr(torch, loss.dtype))
        self.logits = row.expand(*shape, loss.vocab).contiguous()
        self.labels = torch.randint(loss.vocab, shape, generator=generator)
        self.labels[:, : loss.tokens - round(loss.tokens * loss.share)] = -100
        self.ref_logp = torch.full(shape[:1], -12.0 * loss.tokens * loss.share)


def _token_provider(token_logp: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pairs], Tensor]:
    """A peer that gives log-probs of labels that are all in the vocabulary; the pair loss is plain torch."""

    def run(batch: Pairs) -> Tensor:
        values = batch.logits.detach().requires_grad_()
        logp = torch.where(batch.labels == -100, 0.0, token_logp(values, batch.labels.clamp(min=0)).float())
        state = torch.zeros(2, dtype=torch.float64)
        config = MPOConfig()
        loss = reference.pair_loss(logp, batch.labels, batch.ref_logp, state, HOLD, False, 0.0, None, config).loss
        return torch.autograd.grad(loss, values)[0]

    return run


def _selective_log_softmax() -> Callable[[Pairs], Tensor]:
    from trl.trainer.utils import selective_log_softmax

    return _token_provider(selective_log_softmax)


def _liger() -> Callable[[Pairs], Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def token_logp(values: Tensor, labels: Tensor) -> Tensor:
        flat = liger_cross_entropy(values.flatten(0, 1), labels.flatten(), reduction="none")
        return -flat.view(labels.shape)

    return _token_provider(token_logp)


def _quack() -> Callable[[Pairs], Tensor]:
    from quack.cross_entropy import cross_entropy

    def token_logp(values: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(values.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    return _token_provider(token_logp)


def _ours(**options: Any) -> Callable[[], Callable[[Pairs], Tensor]]:
    def make() -> Callable[[Pairs], Tensor]:
        def run(batch: Pairs) -> Tensor:
            return logits.loss_and_grad(batch.logits, batch.labels, batch.ref_logp, **options)

        return run

    return make


def _compiled() -> Callable[[Pairs], Tensor]:
    run = logits._compiled()
    return lambda batch: run(batch.logits, batch.labels, batch.ref_logp)


LOGITS_PROVIDERS: dict[str, Callable[[], Callable[[Pairs], Tensor]]] = {
    "mpo_ext": _ours(),
    "mpo_ext, reuse_logits": _ours(reuse_logits=True),
    STATISTICS: _ours(stats=logits.STATS),
    "mpo_ext, cuda": _ours(backend="cuda"),
    "mpo_ext, triton": _ours(backend="triton"),
    "eager": _ours(backend="reference"),
    "torch.compile": _compiled,
    "TRL selective_log_softmax": _selective_log_softmax,
    "Liger cross entropy": _liger,
    "quack cross entropy": _quack,
}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _logits_cases(group: Group) -> tuple[dict[str, Callable[[Any], Any]], dict[str, str]]:
    return _usable(group, {name: LOGITS_PROVIDERS[name] for name in group.providers}, Pairs)


def _linear_cases(group: Group) -> tuple[dict[str, Callable[[Any], Any]], dict[str, str]]:
    makers = {name: functools.partial(linear.provider, name) for name in group.providers}
    return _usable(group, makers, linear_batch)


def linear_batch(loss: LossShape) -> linear.Batch:
    """The batch of ``benchmarks.linear``; B pairs of T tokens are one of B T, which the products cannot tell."""
    return linear.Batch(getattr(torch, loss.dtype), loss.pairs * loss.tokens, loss.hidden_size, loss.vocab, loss.share)


def _usable(
    group: Group, makers: Mapping[str, Callable[[], Callable[[Any], Any]]], batch_of: Callable[[LossShape], Any]
) -> tuple[dict[str, Callable[[Any], Any]], dict[str, str]]:
    """The providers that can run on the group's shape in a reasonable time, and why the others cannot."""
    loss = group.loss
    trial = dataclasses.replace(
        loss, tokens=max(loss.tokens // _TRIAL, 8), vocab=max(loss.vocab // _TRIAL, 512), share=1.0
    )
    larger = loss.rows * loss.vocab / (trial.rows * trial.vocab)
    torch._dynamo.reset()  # it gives up after eight shapes of one function
    batch = batch_of(trial)
    cases: dict[str, Callable[[Any], Any]] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            run = make()
            if "compile" in name:  # once, for the shape that is measured
                run(batch_of(loss))
                cases[name] = run
                continue
            run(batch)  # set up
            elapsed = min(_elapsed(run, batch) for _ in range(2))
        except Exception as error:  # a peer that is absent or broken is listed, whatever it raises
            missing[name] = _reason(error)
            continue
        if elapsed * larger > _RUN_SECONDS and not name.startswith("mpo_ext"):  # our fixed part is no reason
            missing[name] = (
                f"would take too long: {elapsed:.2f} s in a trial of T = {trial.tokens}, V = {trial.vocab:,}, and a "
                f"run has {larger:.0f} times its work"
            )
        else:
            cases[name] = run
    return cases, missing


def _elapsed(run: Callable[[Any], Any], batch: Any) -> float:
    begin = time.perf_counter()
    run(batch)
    return time.perf_counter() - begin


def _logits_floor(loss: LossShape, batch: Pairs) -> dict[str, Callable[[], Any]]:
    """What any method does to the bytes: labelled rows read, read again and written in place, as float32."""
    labelled = batch.logits[:, loss.tokens - round(loss.tokens * loss.share) :]
    return {"floor": lambda: (labelled.view(torch.float32).sum(), labelled.view(torch.float32).mul_(1.0))}


def run_logits(group: Group, results: Results, seconds_in_all: float) -> None:
    """Measures a group from logits."""
    cases, missing = _logits_cases(group)
    batch = Pairs(group.loss)
    work = Pairs(group.loss)
    prepared: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, run in cases.items():
        if "reuse" in name:
            prepared[name] = functools.partial(work.logits.copy_, batch.logits), functools.partial(run, work)
        else:
            prepared[name] = _nothing, functools.partial(run, batch)
    prepared |= {name: (_nothing, run) for name, run in _logits_floor(group.loss, work).items()}
    timings = _timed(group, prepared, results, seconds_in_all)
    floor = timings["floor"].median_s
    peaks = _peaks(group, cases, _logits_memory, seconds_in_all)
    for name in group.providers:
        values: dict[str, Any] = {"floor": "one read, then one read and one write of the labelled logits"}
        _add_point(results, group, name, timings, missing, peaks, {**values, "floor_s": floor})


def run_linear(group: Group, results: Results, seconds_in_all: float) -> None:
    """Measures a group from hidden states."""
    cases, missing = _linear_cases(group)
    batch = linear_batch(group.loss)
    prepared: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        name: (_nothing, functools.partial(run, batch)) for name, run in cases.items()
    }
    prepared |= {name: (_nothing, run) for name, run in _products(batch).items()}
    timings = _timed(group, prepared, results, seconds_in_all)
    forward, d_hidden, d_weight = (timings[name].median_s for name in ("mm forward", "mm d hidden", "mm d weight"))
    # What the gradients take at least, whoever computes them: a frozen head needs none of its own.
    least = {True: forward + d_hidden, False: forward + d_hidden + d_weight}
    peaks = _peaks(group, cases, _linear_memory, seconds_in_all)
    product = str(product_dtype(batch.hidden.dtype, batch.hidden.device)).removeprefix("torch.")
    for name in group.providers:
        values: dict[str, Any] = {"floor": "the matrix products of the labelled rows", "product": product}
        _add_point(results, group, name, timings, missing, peaks, {**values, "floor_s": least[name == linear.FROZEN]})


def _products(batch: linear.Batch) -> dict[str, Callable[[], Any]]:
    """The three products of the labelled rows, of the type that our own operands have."""
    kind = product_dtype(batch.hidden.dtype, batch.hidden.device)
    rows = batch.hidden.flatten(0, 1)[batch.labels.flatten() != -100].to(kind)
    weight = batch.weight.to(kind)
    out = rows.new_zeros(rows.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(rows), torch.empty_like(weight)
    return {
        "mm forward": lambda: torch.mm(rows, weight.T, out=out),
        "mm d hidden": lambda: torch.mm(out, weight, out=d_hidden),
        "mm d weight": lambda: torch.mm(out.T, rows, out=d_weight),
    }


def _nothing() -> None:
    pass


def _timed(group: Group, prepared: Mapping[str, Any], results: Results, seconds_in_all: float) -> dict[str, Timing]:
    programs = machine.programs()
    timings = interleaved({**prepared, **programs}, group.runs, seconds_in_all=seconds_in_all)
    results.add_machine({name: timings[name].seconds for name in programs})
    return timings


def _peaks(
    group: Group, cases: Mapping[str, Any], target: Callable[..., None], seconds_in_all: float
) -> dict[str, int | str]:
    """Peak memory of each provider beyond its inputs, gradients included; a reason where it cannot be had."""
    found: dict[str, int | str] = {}
    begin = time.perf_counter()
    for name in group.memory:
        if name not in cases:
            continue
        if time.perf_counter() - begin > seconds_in_all:
            found[name] = f"the {seconds_in_all:.0f} s for memory were over"
            continue
        try:
            found[name] = peak_bytes(target, name, group, torch.get_num_threads())
        except (OSError, RuntimeError) as error:
            found[name] = _reason(error)
    return found


def _logits_memory(begin: Callable[[], None], name: str, group: Group, threads: int) -> None:
    torch.set_num_threads(threads)
    run = LOGITS_PROVIDERS[name]()
    # The compiled case must see the real shape to be compiled.
    run(Pairs(group.loss if "compile" in name else dataclasses.replace(group.loss, tokens=4)))
    batch = Pairs(group.loss)
    begin()
    run(batch)


def _linear_memory(begin: Callable[[], None], name: str, group: Group, threads: int) -> None:
    torch.set_num_threads(threads)
    loss = group.loss
    linear._memory_target(begin, name, loss.dtype, loss.share, (loss.pairs * loss.tokens, loss.hidden_size, loss.vocab))


def _add_point(
    results: Results,
    group: Group,
    name: str,
    timings: Mapping[str, Timing],
    missing: Mapping[str, str],
    peaks: Mapping[str, int | str],
    values: dict[str, Any],
) -> None:
    if name in missing:
        results.missing.setdefault(name, missing[name])
        results.points.append(point(group.sweep, name, group.loss, reason=missing[name]))
        return
    values["seconds"] = timings[name].seconds
    values["beside"] = results.beside
    values["share_of_floor"] = values["floor_s"] / timings[name].median_s
    peak = peaks.get(name)
    if isinstance(peak, str):
        values["memory_reason"] = peak
    else:
        values["peak_bytes"] = peak
    results.points.append(point(group.sweep, name, group.loss, **values))


def run_groups(
    groups: Sequence[Group], run: Callable[[Group, Results, float], None], seconds: float, log: Callable[[str], None]
) -> Results:
    """Measures the groups one after the other.

    Args:
        groups: The most important ones first.
        run: ``run_logits`` or ``run_linear``.
        seconds: For all of them. Once they are gone, the groups that are left become points with that reason.
        log: Takes a line per group.
    """
    results = Results()
    begin = time.perf_counter()
    for number, group in enumerate(groups, start=1):
        elapsed = time.perf_counter() - begin
        if elapsed > seconds and number > 1:
            reason = f"the {seconds:.0f} s of this benchmark were over"
            results.points += [point(group.sweep, name, group.loss, reason=reason) for name in group.providers]
            continue
        log(f"{number}/{len(groups)} {group.sweep} {group.loss}")
        share = (seconds - elapsed) / 3 if group.sweep == "base" else seconds / 12
        run(group, results, share)
    return results


# ------------------------------------------------------------------------------------------------------ training steps

_TINY = train_step.Sizes(
    vocab=4096, hidden=64, layers=1, images=1, image_tokens=16, vision_hidden=64, response=16, least_response=16
)


def step_groups(*, quick: bool) -> list[tuple[str, train_step.Sizes, tuple[str, ...], int]]:
    """Sweep, sizes, cases and counted steps."""
    ours, cases = ("mpo_ext", "mpo_ext, precomputed"), ("TRL", "TRL, precomputed", "mpo_ext", "mpo_ext, precomputed")
    if quick:
        return [("base", _TINY, cases, 2)]
    base = train_step.Sizes()
    return [
        ("base", base, cases, 3),
        ("image tokens", dataclasses.replace(base, images=1), ours, 3),
        ("image tokens", dataclasses.replace(base, images=2), ours, 3),
    ]


def run_train_step(*, quick: bool, seconds: float, threads: int, log: Callable[[str], None]) -> Results:
    """Measures whole training steps."""
    results = Results()
    begin = time.perf_counter()
    for number, (sweep, sizes, names, steps) in enumerate(step_groups(quick=quick), start=1):
        where = f"{sweep}={sizes.images * sizes.image_tokens}"
        if time.perf_counter() - begin > seconds and number > 1:
            reason = f"the {seconds:.0f} s of this benchmark were over"
            results.points += [point(where, name, None, reason=reason) for name in names]
            continue
        log(f"{number} {where} {', '.join(names)}")
        results.add_machine(machine.sample(3))
        found, failed = train_step.run_cases(
            {name: train_step.CASES[name] for name in names}, sizes, steps + 1, threads=threads
        )
        for name in names:
            shape = {**dataclasses.asdict(sizes), "tokens": None, "dtype": "float32"}
            if name in failed:
                results.missing.setdefault(name, failed[name])
                results.points.append(point(where, name, None, **shape, reason=failed[name]))
                continue
            summary = train_step.summary(found[name])
            counted = [step.seconds for step in found[name][1:]]
            extra = {key: summary[key] for key in ("median_cpu_s", "peak_of_steps", "losses")}
            results.points.append(
                point(
                    where,
                    name,
                    None,
                    **{**shape, **extra, "seconds": counted, "peak_bytes": summary["peak"], "beside": results.beside},
                )
            )
    results.add_machine(machine.sample(3))
    return results


def run_sampling(*, quick: bool, log: Callable[[str], None]) -> Results:
    """Runs ``benchmarks.sampling`` in a process of its own and reads its figures."""
    size = ["--items", "64", "--single", "16", "--repeat", "1"] if quick else ["--items", "256", "--repeat", "2"]
    command = [sys.executable, "-m", "benchmarks.sampling", "--json", "-", *size]
    log(" ".join(["python", *command[1:]]))
    results = Results()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        results.missing["mpo_ext"] = lines[-1]
        results.points.append(point("base", "mpo_ext", None, reason=lines[-1]))
        return results
    import json

    for name, values in json.loads(done.stdout.splitlines()[-1]).items():
        results.points.append(point("base", name, None, **values))
    return results


def machine_points(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The programs of the machine as points."""
    return [point("machine", name.removeprefix("machine: "), None, seconds=list(one)) for name, one in seconds.items()]


def middle(values: Sequence[float]) -> float:
    """The median; of nothing, NaN."""
    return statistics.median(values) if values else float("nan")


def parser() -> argparse.ArgumentParser:
    """Of ``python -m benchmarks``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="All benchmarks, into one form of file.")
    parser.add_argument("--quick", action="store_true", help="small shapes: a check that all of it works, in minutes")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="logits, linear, train_step, sampling (default: all)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder (default: results, or build/benchmarks with --quick)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=19.0, help="for all benchmarks; groups beyond are listed")
    parser.add_argument("--docs", action="store_true", help="rewrite the marked blocks of README.md and docs/")
    parser.add_argument("--render", action="store_true", help="measure nothing: plots and --docs from the files there")
    return parser
