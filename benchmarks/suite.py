"""Declares the measurements of ``python -m benchmarks``, and makes the entries (points) of the result files.

A group is a set of implementations that run in turn on inputs of one shape. Between the implementations, small
programs run. Some of these programs measure the speed of the machine. Others measure a floor: a lower bound of the
time of the implementations. If an implementation could not be measured, its point has the reason.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import linear, logits, losses, machine, train_step
from benchmarks.measure import Timing, interleaved, is_cpu_time
from mpo_ext.ops.matmul import matmul_dtype
from mpo_ext.plan.roofline import LossShape

_RUN_SECONDS = 20.0  # a peer whose run would take longer is not measured


@dataclasses.dataclass(frozen=True)
class Group:
    """Implementations of the loss that are measured together on inputs of one shape.

    In each round, every implementation runs once.

    Attributes:
        sweep: Name of the size that is varied, such as "vocab"; "base" for the base shape.
        loss: Shape of the inputs.
        providers: Names of the implementations.
        runs: Number of counted rounds.
        memory: Names of the implementations whose peak memory is also measured. Each is measured in a fresh process.
    """

    sweep: str
    loss: LossShape
    providers: tuple[str, ...]
    runs: int = 5
    memory: tuple[str, ...] = ()


@dataclasses.dataclass
class Results:
    """Results of a benchmark so far.

    Attributes:
        points: Entries of the result file.
        missing: Dict with the name of each implementation that could not run, and the reason.
        machine: Dict with the name of each program that measures the machine, and the seconds of its runs.
        beside: Dict with the name of each such program, and its median seconds in the latest call of ``add_machine``.
    """

    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    beside: dict[str, float] = dataclasses.field(default_factory=dict)

    def add_machine(self, seconds: Mapping[str, Sequence[float]]) -> None:
        """Stores the seconds of the programs that measure the machine, such as "machine: read".

        Other names in ``seconds`` are ignored.
        """
        self.beside = {}
        for name, values in seconds.items():
            if name.startswith("machine: "):
                self.machine.setdefault(name, []).extend(values)
                self.beside[name] = statistics.median(values)

    def skip(self, name: str, reason: str, sweep: str, loss: LossShape | None, **values: Any) -> None:
        """Adds an entry with a ``reason`` instead of measurements, for an implementation that could not run."""
        self.missing.setdefault(name, reason)
        self.points.append(point(sweep, name, loss, **values, reason=reason))


def point(sweep: str, provider: str, loss: LossShape | None, **values: Any) -> dict[str, Any]:
    """Returns an entry of a result file: the measurements of the implementation ``provider`` on one shape.

    ``values`` are further fields. A measured entry must have ``seconds`` or ``peak_bytes``. Any other entry must have
    ``reason``.
    """
    shape = {name: getattr(loss, name, None) for name in ("dtype", "pairs", "tokens", "vocab", "hidden", "share")}
    made = {"sweep": sweep, "provider": provider, **shape, "status": "measured", "reason": "", **values}
    if made.get("seconds"):
        timing = Timing(list(made["seconds"]))
        low, high = timing.spread_s
        made |= {"median_s": timing.median_s, "p20_s": low, "p80_s": high}
    elif made.get("peak_bytes") is None:
        made["status"] = "not run"
    place = "/".join(f"{name}={value}" for name, value in shape.items() if value is not None)
    return {"id": "/".join(part for part in (sweep, provider, place) if part), **made}


# ---------------------------------------------------------------------------------------------------------- the groups


def _around(base: LossShape, axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, LossShape]]:
    for axis, values in axes.items():
        for value in values:
            changes = dict(value) if isinstance(value, dict) else {axis: value}
            yield axis, dataclasses.replace(base, **changes)


def logits_groups(*, quick: bool) -> list[Group]:
    """Returns the groups to measure in the benchmark of the loss on logits. A group has implementations and a shape.

    The first groups have the base shape. Later groups vary the labelled fraction, the vocabulary, the number of
    tokens or pairs, or the dtype. ``quick`` selects small shapes.
    """
    rivals = ("eager", "torch.compile", "TRL selective_log_softmax", "Liger cross entropy", "quack cross entropy")
    everyone = ("mpo_ext", "mpo_ext, reuse_logits", logits.STATISTICS, *rivals, "mpo_ext, cuda", "mpo_ext, triton")
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
            # Compiling takes longer than all runs, so only both ends of the sweep are compiled.
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
    """Returns the groups of measurements for the loss that takes hidden states.

    A group measures several implementations on one shape. The first groups have the base shape. Later groups vary the
    labelled fraction, the vocabulary, the hidden size, or the number of tokens or pairs. Most of these later groups
    measure only mpo_ext. ``quick`` selects small shapes.
    """
    # F.linear_cross_entropy takes seconds even on the small shapes of a quick run.
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


# ------------------------------------------------------------------------------------------------------------ a group


def run_group(benchmark: losses.LossBenchmark, group: Group, results: Results, seconds_in_all: float) -> None:
    """Measures a group of implementations in rounds, and adds the measurements to ``results``.

    A round runs each implementation once. At least two rounds are counted. Later rounds begin only within
    ``seconds_in_all`` seconds.
    """
    loss = group.loss
    cases, missing = losses.usable(benchmark, group.providers, loss, most_seconds=_RUN_SECONDS)
    runs = losses.runs_of(benchmark, cases, loss)
    programs = machine.programs()
    timings = interleaved({**runs, **programs}, group.runs, seconds_in_all=seconds_in_all)
    results.add_machine({name: timings[name].seconds for name in programs})
    floors = losses.floors_of(benchmark, cases, timings)
    peaks = _peaks(benchmark, group, cases, seconds_in_all)
    common: dict[str, Any] = {"floor": benchmark.floor}
    if loss.hidden is not None:
        dtype = matmul_dtype(getattr(torch, loss.dtype), torch.device("cpu"))
        common["matmul_dtype"] = str(dtype).removeprefix("torch.")
    for name in group.providers:
        if name in missing:
            results.skip(name, missing[name], group.sweep, loss)
            continue
        values = {**common, "floor_s": floors[name], "share_of_floor": floors[name] / timings[name].median_s}
        values |= {"seconds": timings[name].seconds, "beside": results.beside}
        peak = peaks.get(name)
        values["memory_reason" if isinstance(peak, str) else "peak_bytes"] = peak
        results.points.append(point(group.sweep, name, loss, **values))


def _peaks(
    benchmark: losses.LossBenchmark, group: Group, cases: Mapping[str, losses.Provider], seconds_in_all: float
) -> dict[str, int | str]:
    """Returns the peak bytes of each implementation in ``group.memory``.

    Implementations that are not in ``cases`` are left out. If an implementation was not measured, the reason stands in
    place of its bytes.
    """
    peaks: dict[str, int | str] = {}
    begin = time.perf_counter()
    for name in group.memory:
        if name not in cases:
            continue
        if time.perf_counter() - begin > seconds_in_all:
            peaks[name] = f"the {seconds_in_all:.0f} s for memory were over"
            continue
        try:
            peaks[name] = losses.peak_of(benchmark, name, cases[name], group.loss)
        except (OSError, RuntimeError) as error:
            peaks[name] = losses.reason_of(error)
    return peaks


def run_groups(
    benchmark: losses.LossBenchmark, groups: Sequence[Group], seconds: float, log: Callable[[str], None]
) -> Results:
    """Measures the groups in order, and returns the results.

    After ``seconds``, no further group begins. The entries of the remaining groups have a ``reason`` instead of
    measurements. ``log`` is called with a line of text before each group.
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
        run_group(benchmark, group, results, (seconds - elapsed) / 3 if group.sweep == "base" else seconds / 12)
    return results


# ------------------------------------------------------------------------------------------------------ training steps

TINY = train_step.Sizes(
    vocab=4096, hidden=64, layers=1, images=1, image_tokens=16, vision_hidden=64, response=16, least_response=16
)


#: Prompts of the steps whose attention is expensive, in tokens, and the longest prompt with which TRL is measured.
PROMPTS, _TRL_PROMPT = (1024, 2048, 4096, 8192), 2048


def step_groups(
    *, quick: bool, prompts: Sequence[int] = PROMPTS
) -> list[tuple[str, train_step.Sizes, tuple[str, ...], int]]:
    """Returns the groups of training steps to measure, as tuples (sweep, sizes, cases, steps).

    ``sweep`` is the name of the varied size. ``cases`` are keys of ``train_step.CASES``. ``steps`` is the number of
    counted steps. In the sweep "prompt", prompts are long, and attention takes much of the time. ``prompts`` are the
    prompt lengths of this sweep, in tokens.
    """
    ours, cases = ("mpo_ext", "mpo_ext, precomputed"), ("TRL", "TRL, precomputed", "mpo_ext", "mpo_ext, precomputed")
    if quick:
        return [("base", TINY, cases, 2)]
    base = train_step.Sizes()
    rivals = ("TRL", "TRL, torch_compile")
    return [
        ("base", base, cases, 3),
        ("image tokens", dataclasses.replace(base, images=1), ours, 3),
        ("image tokens", dataclasses.replace(base, images=2), ours, 3),
        *(
            (
                "prompt",
                train_step.attention_sizes(tokens),
                (*(rivals if tokens <= _TRL_PROMPT else ()), *train_step.ATTENTION_CASES),
                2,
            )
            for tokens in prompts
        ),
    ]


def run_train_step(
    *, quick: bool, seconds: float, threads: int, log: Callable[[str], None], prompts: Sequence[int] = PROMPTS
) -> Results:
    """Measures complete training steps of mpo_ext's trainer and of TRL's trainer, and returns the results.

    After ``seconds``, no further group of steps begins. ``step_groups`` describes ``prompts``.
    """
    results = Results()
    begin = time.perf_counter()
    for number, (sweep, sizes, names, steps) in enumerate(step_groups(quick=quick, prompts=prompts), start=1):
        where = f"{sweep}={sizes.prompt if sweep == 'prompt' else sizes.images * sizes.image_tokens}"
        if time.perf_counter() - begin > seconds and number > 1:
            reason = f"the {seconds:.0f} s of this benchmark were over"
            results.points += [point(where, name, None, reason=reason) for name in names]
            continue
        log(f"{number} {where} {', '.join(names)}")
        results.add_machine(machine.sample(3))
        cases = {name: train_step.CASES[name] for name in names}
        measured, failed = train_step.run_cases(cases, sizes, steps + 1, threads=threads)
        shape = {**dataclasses.asdict(sizes), "tokens": None, "dtype": "float32"}
        for name in names:
            if name in failed:
                results.skip(name, failed[name], where, None, **shape)
                continue
            summary = train_step.summary(measured[name])
            values = {key: summary[key] for key in ("median_cpu_s", "peak_of_steps", "losses")}
            counted = measured[name][1:]
            times = [step.cpu_seconds if is_cpu_time() else step.seconds for step in counted]
            values |= {"seconds": times, "peak_bytes": summary["peak"]}
            results.points.append(point(where, name, None, **shape, **values, beside=results.beside))
    results.add_machine(machine.sample(3))
    return results


def run_sampling(*, quick: bool, threads: int, log: Callable[[str], None]) -> Results:
    """Runs ``benchmarks.sampling`` in a fresh process, and returns its results."""
    size = "--items 256 --repeat 2"
    if quick:
        size = "--items 64 --single 16 --repeat 1 --samples 4 --hidden 64 --layers 1"
    command = [sys.executable, "-m", "benchmarks.sampling", "--json", "-", "--threads", str(threads), *size.split()]
    log(" ".join(["python", *command[1:]]))
    results = Results()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        results.skip("mpo_ext", lines[-1], "base", None)
        return results
    for name, values in json.loads(done.stdout.splitlines()[-1]).items():
        results.points.append(point("base", name, None, **values))
    return results


def machine_points(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Makes the entries of machine.json. Each program that measures the machine has an entry.

    ``seconds`` maps the name of each program to the seconds of its runs.
    """
    return [
        point("machine", name.removeprefix("machine: "), None, seconds=list(values))
        for name, values in seconds.items()
    ]
