"""The ``mpo-ext demo`` command. Only the standard library is imported here: the rest comes when the demo runs."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from mpo_ext.checks import install_hint
from mpo_ext.cli.shared import at_least

_NEEDS = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "PIL": "pillow",
    "rich": "rich",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "yaml": "pyyaml",
    "tokenizers": "tokenizers",
}


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers ``mpo-ext demo``."""
    parser = subcommands.add_parser(
        "demo",
        help="train a tiny multimodal model on digits three ways and compare",
        description="Trains a tiny InternVL model on 2x2 grids of handwritten digits, lets it make its own preference "
        "pairs, trains it further by SFT, DPO and MPO, and writes a table, curves, a page of pairs and the models. "
        "With --study it compares many more losses, data and settings, and writes tables and a plot.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where to write (default: demo-out)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the first run (default: 0)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="number of runs, each with the next seed")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: as torch decides)")
    parser.add_argument(
        "--backend", choices=("cpu", "reference"), help="backend of the loss (default: the best that is installed)"
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that all parts work")
    parser.add_argument(
        "--study", action="store_true", help="run the paper's ablations in small; goes on where it was ended"
    )
    parser.add_argument("--jobs", type=at_least(1), help="processes of the study (default: 1)")
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """Runs the demo or the study.

    Returns:
        0; 1 where a package is missing, the folder cannot be written or a run of the study failed; 130 where it
        was interrupted.
    """
    if args.jobs is not None and not args.study:
        print(f"--jobs must be left out without --study, got {args.jobs}", file=sys.stderr)
        return 1
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"mpo-ext demo needs {', '.join(missing)}: {install_hint('demo')}", file=sys.stderr)
        return 1
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out must be a folder that can be written, got {args.out}: {error.strerror}", file=sys.stderr)
        return 1

    seeds = range(args.seed, args.seed + args.seeds)
    common = {"out": args.out, "seeds": seeds, "quick": args.quick, "threads": args.threads, "backend": args.backend}
    if args.study:
        return _study(common, args)
    from mpo_ext.demo import experiment

    try:
        experiment.run(**common)
    except KeyboardInterrupt:
        print("interrupted; the same command begins anew", file=sys.stderr)
        return 130
    return 0


def _study(common: dict[str, Any], args: argparse.Namespace) -> int:
    from benchmarks.study import runs as study_run

    given = {"--seed": args.seed, "--seeds": args.seeds, "--jobs": args.jobs, "--threads": args.threads,
             "--backend": args.backend, "--quick": args.quick}  # fmt: skip
    options = [f"{name} {value}" for name, value in given.items() if value and value is not True]
    options += ["--quick"] if args.quick else []
    try:
        return study_run.run(**common, jobs=args.jobs or 1, command=" ".join(["mpo-ext demo --study", *options]))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
