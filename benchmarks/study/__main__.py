"""Runs or resumes the study: ``python -m benchmarks.study``.

The study repeats ablations of the MPO paper with a tiny model.
"""

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from mpo_ext.checks import install_hint
from mpo_ext.cli.shared import at_least

_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow", "rich": "rich",
             "transformers": "transformers", "accelerate": "accelerate", "yaml": "pyyaml",
             "tokenizers": "tokenizers"}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Trains a tiny multimodal model on digits with many losses, data and settings, and compares them.",
    )
    made.add_argument("--out", type=Path, default=Path("study"), help="output folder (default: study)")
    made.add_argument("--task", choices=("language-prior", "perception"), default="language-prior",
                      help="task of the model (default: language-prior, that of the demo)")  # fmt: skip
    made.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="run only the rows of these tables, or these rows"
    )
    made.add_argument("--demo", type=Path, help="folder of mpo-ext demo --from-scratch; uses its starting models")
    made.add_argument("--results", type=Path, help="study.json of an earlier run, whose runs are not repeated")
    made.add_argument("--seed", type=at_least(0), default=0, help="seed of the first starting model (default: 0)")
    made.add_argument("--seeds", type=at_least(1), default=1, help="number of seeds, each with a starting model")
    made.add_argument("--threads", type=at_least(1), help="CPU threads of each process (default: divides the cores)")
    made.add_argument(
        "--backend", choices=("cpu", "reference"), help="backend of the loss (default: the best that is installed)"
    )
    made.add_argument("--quick", action="store_true", help="checks in a minute that all parts work")
    made.add_argument("--jobs", type=at_least(1), default=1, help="number of processes (default: 1)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the study.

    Returns:
        0 on success; 1 if a run failed or could not start, for example because a package is missing; 130 if
        interrupted.
    """
    args = parser().parse_args(argv)
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"the study needs {', '.join(missing)}: {install_hint('demo')}", file=sys.stderr)
        return 1
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out must be a folder that can be written, got {args.out}: {error.strerror}", file=sys.stderr)
        return 1
    from benchmarks.study import prior_start, runs
    from benchmarks.study.tables import TASKS

    task = TASKS[args.task]
    if unknown := [name for name in args.only if name not in {**task.tables, **task.rows}]:
        print(f"--only must be among {', '.join(task.tables)}, or a row, got {unknown[0]}", file=sys.stderr)
        return 1
    seeds = range(args.seed, args.seed + args.seeds)
    try:
        if args.demo is not None:
            prior_start.adopt(args.out, args.demo, seeds)
        if args.results is not None:
            runs.take_over(args.out, args.results, seeds, args.task, quick=args.quick, backend=args.backend)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1

    try:
        return runs.run(
            out=args.out, seeds=seeds, task=args.task,
            only=tuple(args.only), quick=args.quick, threads=args.threads,
            backend=args.backend, jobs=args.jobs, command=command_of(args),
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; the same command resumes the study", file=sys.stderr)
        return 130


def command_of(args: argparse.Namespace) -> str:
    """Returns the command line to record in the result file, without ``--out``, ``--demo`` and ``--results``."""
    given = {"--task": args.task, "--only": " ".join(map(shlex.quote, args.only)) or None,
             "--seed": args.seed, "--seeds": args.seeds, "--jobs": args.jobs, "--threads": args.threads,
             "--backend": args.backend}  # fmt: skip
    defaults = {"--task": "language-prior", "--seed": 0, "--seeds": 1, "--jobs": 1}
    options = [f"{name} {value}" for name, value in given.items() if value not in (None, defaults.get(name))]
    return " ".join(["python -m benchmarks.study", *options, *(["--quick"] if args.quick else [])])


if __name__ == "__main__":
    sys.exit(main())
