"""Defines the command ``mpo-ext demo``. Its dependencies are imported only when it runs."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any, NoReturn

from mpo_ext.checks import install_hint
from mpo_ext.cli.shared import add_debug, at_least, command

_NEEDS = {
    "sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2", "PIL": "pillow", "rich": "rich",
    "transformers": "transformers", "accelerate": "accelerate", "ruamel": "ruamel.yaml", "pydantic": "pydantic",
    "tokenizers": "tokenizers",
}  # fmt: skip


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser(
        "demo",
        help="show on a tiny multimodal model what hallucinations are and how MPO mends them",
        description="Takes a tiny InternVL model that reads handwritten digits and hallucinates, lets it make "
        "preference pairs, trains it further by SFT, DPO and MPO, and writes demo.html, tables, curves, a page of "
        "pairs and the models. The same command resumes an interrupted demo.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write to (default: demo-out)")
    parser.add_argument(
        "--seed", type=at_least(0), default=1, help="seed of the first run (default: 1, whose start is in the package)"
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="number of runs, each with the next seed")
    parser.add_argument(
        "--threads", type=at_least(1), default=1,
        help="number of CPU threads (default: 1, because the model is small, and several threads wait for each other "
        "if the machine has other work)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("cpu", "reference"), help="backend of the loss (default: the best that is installed)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="check in seconds that all parts work; the model learns nothing, by design",
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the start, although the package contains that of seed 1"
    )
    parser.add_argument("--study", nargs=0, action=_Removed, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", action=_Removed, help=argparse.SUPPRESS)
    add_debug(parser)
    parser.set_defaults(run=demo)


class _Removed(argparse.Action):
    """Reports an error for an option of the removed ``demo --study``, and names the replacement."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parser.error(
            f"{self.option_strings[0]} must be left out: the study is a benchmark now; run python -m benchmarks.study "
            "in a checkout of the repository"
        )


@command("demo", extra="demo")
def demo(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit status."""
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: {install_hint('demo')}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--out must be a writable folder, got {args.out}: {error.strerror}") from error
    lock = args.out / "demo.lock"
    if any(args.out.iterdir()) and not lock.exists():
        raise ValueError(f"--out must be a new or empty folder, or that of an earlier demo, got {args.out}")
    from mpo_ext.demo import experiment
    from mpo_ext.files import FileLock

    with FileLock(lock, f"--out: {args.out}"):
        experiment.run(
            out=args.out,
            seeds=range(args.seed, args.seed + args.seeds),
            quick=args.quick,
            threads=args.threads,
            backend=args.backend,
            from_scratch=args.from_scratch,
            command=_command(args),
        )
    return 0


def _command(args: argparse.Namespace) -> str:
    """Returns the command line for the results file, without the output folder."""
    given = {"--seed": (args.seed, 1), "--seeds": (args.seeds, 1), "--threads": (args.threads, 1),
             "--backend": (args.backend, None)}  # fmt: skip
    options = [f"{name} {value}" for name, (value, default) in given.items() if value != default]
    switches = {"--quick": args.quick, "--from-scratch": args.from_scratch}
    return " ".join(["mpo-ext demo", *options, *(name for name, is_given in switches.items() if is_given)])
