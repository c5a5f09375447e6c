"""Runs all benchmarks: ``python -m benchmarks``. ``--quick`` checks in a few minutes that every benchmark works.

``make bench`` measures, and rewrites the tables in README.md and docs/. ``--render --docs`` rewrites the tables from
the files in results/, without measuring.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import check_model, documents, linear, logits, machine, measure, plots, schema, suite, tables

#: Fraction of the total time by benchmark.
SHARES = {"logits": 0.2, "linear": 0.3, "train_step": 0.46, "sampling": 0.04}
_QUICK_MINUTES = 4.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description="Runs all benchmarks.")
    made.add_argument("--quick", action="store_true", help="small shapes: checks in minutes that all benchmarks work")
    made.add_argument("--only", nargs="+", metavar="NAME", help=f"any of {', '.join(SHARES)} (default: all)")
    made.add_argument("--out", metavar="DIR", help="folder (default: results, or build/benchmarks with --quick)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time of one thread, for a machine with other work"
    )
    made.add_argument("--minutes", type=float, default=30.0, help="time for all benchmarks; later groups are skipped")
    made.add_argument(
        "--prompts", type=int, nargs="*", default=suite.PROMPTS, metavar="TOKENS",
        help="prompts of the training steps with expensive attention",
    )  # fmt: skip
    made.add_argument("--docs", action="store_true", help="write the marked blocks of README.md and docs/")
    made.add_argument("--render", action="store_true", help="measure nothing: read the result files instead")
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks, writes the result files, draws the plots, and returns the exit status."""
    options = parser()
    args = options.parse_args(argv)
    for name in args.only or ():
        if name not in SHARES:
            options.error(f"--only must be any of {', '.join(SHARES)}, got {name}")
    if not args.minutes > 0:
        options.error(f"--minutes must be positive, got {args.minutes}")
    if args.docs and args.quick:
        options.error("--docs must not be given with --quick: documents show full runs")
    if args.cpu_time and args.threads != 1:
        options.error(f"--threads must be 1 with --cpu-time, got {args.threads}")
    if args.cpu_time:
        measure.use_cpu_time()
    torch.set_num_threads(args.threads)
    out = Path(args.out or ("build/benchmarks" if args.quick else "results"))
    out.mkdir(parents=True, exist_ok=True)
    if not args.render:
        command = " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)])
        measure_all(args.only or list(SHARES), out, args, command)
    results = documents.load(out)
    for path in plots.draw(results, tables.PLOTS if args.docs else out / "plots"):
        print(path)
    return documents.write_pages(results) if args.docs else 0


def measure_all(names: list[str], out: Path, args: argparse.Namespace, command: str) -> None:
    """Runs the benchmarks ``names``. Writes the results of each benchmark to NAME.json in the folder ``out``.

    Benchmarks other than "sampling" also write machine.json and cost_model.json. machine.json has the measured speed
    of the machine. cost_model.json has measured and predicted times. ``args`` are the parsed options. ``command`` is
    the command line, which every file records.
    """
    begin, whole = time.perf_counter(), sum(SHARES[name] for name in names)
    minutes = min(args.minutes, _QUICK_MINUTES) if args.quick else args.minutes
    seconds: dict[str, list[float]] = {}

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)

    def write(name: str, start: tuple[str, tuple[float, ...]], points: list[dict[str, Any]], **values: Any) -> None:
        document = {
            "schema": schema.VERSION,
            "benchmark": name,
            "quick": args.quick,
            "environment": measure.provenance(command, *start),
            "settings": {},
            "missing": {},
            "points": points,
            **values,
        }
        schema.check(document, name)
        measure.write_text(out / f"{name}.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
        log(f"{out / name}.json, {len(points)} points")

    start_of_all = measure.now()
    for name in names:
        start = measure.now()
        budget = 60 * minutes * SHARES[name] / whole
        log(f"{name}, {budget:.0f} s, load {start[1][0]:.1f}")
        if name == "logits":
            results = suite.run_groups(logits.BENCHMARK, suite.logits_groups(quick=args.quick), budget, log)
        elif name == "linear":
            results = suite.run_groups(linear.BENCHMARK, suite.linear_groups(quick=args.quick), budget, log)
        elif name == "train_step":
            options = {"threads": args.threads, "prompts": args.prompts, "seconds": budget}
            results = suite.run_train_step(quick=args.quick, log=log, **options)
        else:
            results = suite.run_sampling(quick=args.quick, threads=args.threads, log=log)
        for program, values in results.machine.items():
            seconds.setdefault(program, []).extend(values)
        write(name, start, results.points, missing=results.missing)
    if not seconds:
        return
    write("machine", start_of_all, suite.machine_points(seconds))
    points = check_model.compared(documents.load(out))
    if points:
        summary = list(check_model.summary(points))
        settings = {"rates": dataclasses.asdict(machine.rates(seconds)), "summary": summary}
        write("cost_model", start_of_all, points, settings=settings)
        for kind in summary:
            print("  ".join(f"{key} {value}" for key, value in kind.items()))


if __name__ == "__main__":
    sys.exit(main())
