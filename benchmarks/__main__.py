"""All benchmarks: ``python -m benchmarks``, ``--quick`` for a check in minutes, ``make bench`` for the documents."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import check_model, machine, numbers, plots, schema, suite
from benchmarks.measure import provenance
from mpo_ext.files import atomic_write

#: Benchmark to its share of the time.
SHARES = {"logits": 0.3, "linear": 0.4, "train_step": 0.26, "sampling": 0.04}


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the files, draws, and returns the exit status."""
    parser = suite.parser()
    args = parser.parse_args(argv)
    chosen = args.only or list(SHARES)
    for name in chosen:
        if name not in SHARES:
            parser.error(f"--only must be any of {', '.join(SHARES)}, got {name}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    if args.docs and args.quick:
        parser.error("--docs must not be given with --quick: documents show full runs")
    torch.set_num_threads(args.threads)
    out = Path(args.out or ("build/benchmarks" if args.quick else "results"))
    out.mkdir(parents=True, exist_ok=True)
    if not args.render:
        _measure(chosen, out, args, argv if argv is not None else sys.argv[1:])
    documents = numbers.load(out)
    for path in plots.draw(documents, numbers.PLOTS if args.docs else out / "plots"):
        print(path)
    return _write_documents(documents) if args.docs else 0


def _write_documents(documents: numbers.Documents) -> int:
    """Makes the blocks of all documents anew. One that cannot be made stays as it is, and the status is 1."""
    failed: list[str] = []
    for path in numbers.pages(Path()):
        text = path.read_text(encoding="utf-8")
        new = numbers.rewrite(text, documents, failed)
        if new != text:
            _write(path, new)
            print(path)
    for reason in failed:
        print(f"left as it was: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _measure(chosen: list[str], out: Path, args: Any, argv: list[str]) -> None:
    command = " ".join(["python -m benchmarks", *argv])
    begin = time.perf_counter()
    minutes = min(args.minutes, 4.0) if args.quick else args.minutes
    whole = sum(SHARES[name] for name in chosen)
    seconds: dict[str, list[float]] = {}

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)

    def write(name: str, points: list[dict[str, Any]], **rest: Any) -> None:
        document = {
            "schema": schema.VERSION,
            "benchmark": name,
            "quick": args.quick,
            "environment": provenance(command, started, load),
            "settings": {},
            "missing": {},
            "points": points,
            **rest,
        }
        schema.check(document, name)
        _write(out / f"{name}.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
        log(f"{out / name}.json, {len(points)} points")

    all_started, all_load = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), os.getloadavg()
    for name in chosen:
        started, load = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), os.getloadavg()
        budget = 60 * minutes * SHARES[name] / whole
        log(f"{name}, {budget:.0f} s, load {load[0]:.1f}")
        if name == "logits":
            results = suite.run_groups(suite.logits_groups(quick=args.quick), suite.run_logits, budget, log)
        elif name == "linear":
            results = suite.run_groups(suite.linear_groups(quick=args.quick), suite.run_linear, budget, log)
        elif name == "train_step":
            results = suite.run_train_step(quick=args.quick, seconds=budget, threads=args.threads, log=log)
        else:
            results = suite.run_sampling(quick=args.quick, log=log)
        for key, values in results.machine.items():
            seconds.setdefault(key, []).extend(values)
        write(name, results.points, missing=results.missing)
    started, load = all_started, all_load
    if not seconds:
        return
    write("machine", suite.machine_points(seconds))
    rates = machine.rates(seconds)
    points = check_model.compared(numbers.load(out))
    if points:
        summary = list(check_model.summary(points))
        write("cost_model", points, settings={"rates": dataclasses.asdict(rates), "summary": summary})
        for one in summary:
            print("  ".join(f"{key} {value}" for key, value in one.items()))


if __name__ == "__main__":
    sys.exit(main())
