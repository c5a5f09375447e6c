"""Defines the command ``mpo-ext evaluate``. Its dependencies are imported only when it runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_ext.checks import check_integer
from mpo_ext.cli import shared
from mpo_ext.cli.shared import command, load_engine

_PROMPTS = {"both": ("direct", "cot")}


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser(
        "evaluate",
        help="measure and compare how many questions models answer right",
        description="Asks models questions with a known answer, and writes tables, predictions, a picture and a "
        "page of failures into a folder. The same command resumes an interrupted evaluation; models, data and prompts "
        "can be added to it.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="folder of a model, of a run of mpo-ext train or of LoRA adapters, or a name on the hub; NAME=MODEL "
        "sets its name in the results",
    )  # fmt: skip
    parser.add_argument(
        "--data", action="append", required=True, metavar="[NAME=]PATH",
        help="file of items (.jsonl, .json, .tsv, .csv, .parquet, also .gz; question, image, answer_gt or answer), or "
        "a meta file (.json) of such files; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluation")
    parser.add_argument(
        "--prompt", nargs="+", default=["direct"], metavar="PROMPT",
        help="direct, cot, both, another template's name, or none: the question with its options (default: direct)",
    )  # fmt: skip
    parser.add_argument(
        "--without-image", action="store_true",
        help="also ask each question with an image without it, and show how many answers stay the same",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, help="responses per question (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    parser.add_argument(
        "--top-k", type=int, default=50, help="number of most likely tokens to draw from, 0 for all (default: 50)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="probability of the tokens to draw from (default: 1)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="(default: 100 for prompts that ask for the answer only, else 4096)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    parser.add_argument(
        "--style",
        help="style of answers: final_answer, boxed, answer, direct, regex:... (default: the style of the template)",
    )
    shared.add_matcher(parser)
    parser.add_argument("--limit", type=int, help="take only the first questions of each file")
    parser.add_argument(
        "--image-root", default="", help="folder that image paths start from; a meta file names its own"
    )
    shared.add_root_map(parser)
    shared.add_system(parser)
    parser.add_argument(
        "--export", nargs="+", default=[], metavar="KIT", help="also write predictions for vlmevalkit or lmms-eval"
    )
    parser.add_argument(
        "--page-limit",
        type=int,
        default=5000,
        help="largest number of questions on the page of failures (default: 5000)",
    )
    shared.add_engine(parser)
    shared.add_image_limit(parser)
    shared.add_debug(parser)
    parser.set_defaults(run=run_evaluate)


@command("evaluate", extra="generate")
def run_evaluate(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext evaluate`` and returns the exit status."""
    from mpo_ext.evaluate.cells import EvaluationRun
    from mpo_ext.evaluate.report import accuracy_table, console_notes, without_image_table
    from mpo_ext.evaluate.run import evaluate
    from mpo_ext.evaluate.scoring import EvaluationConfig
    from mpo_ext.generate.engine import rank_and_world_size

    rank, world_size = rank_and_world_size()
    if args.batch_size is not None:
        check_integer("batch_size", args.batch_size, least=1)
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "style", "without_image")
    settings = {name: getattr(args, name) for name in names}
    config = EvaluationConfig(prompts=_prompts(args.prompt), matcher=shared.matcher_settings(args), **settings)
    models, data, root_map = _named("MODEL", args.models), _named("--data", args.data), shared.root_map(args)
    results = evaluate(
        models,
        data,
        args.out,
        config=config,
        limit=args.limit,
        image_root=args.image_root,
        root_map=root_map,
        system=args.system,
        exports=list(dict.fromkeys(args.export)),
        make_engine=lambda path: load_engine(args, path),
        page_limit=args.page_limit,
        run=EvaluationRun(block_size=args.block_size, rank=rank, world_size=world_size, stream=sys.stderr),
    )
    if results is None:
        print(f"process {rank} of {world_size} has finished, others have not", file=sys.stderr)
    else:
        print(accuracy_table(results), end="")
        if args.without_image:
            print(f"\n{without_image_table(results)}", end="")
        print(f"written to {args.out}", file=sys.stderr)
        if not any(result["questions"] for result in results["results"]):
            details = results.get("refused_examples", {})
            reasons = sorted({reason for result in results["results"] for reason in result["refused"]})
            reasons = [f"{reason} ({details[reason]})" if reason in details else reason for reason in reasons]
            print(f"mpo-ext evaluate: no question was asked: {', '.join(reasons)}", file=sys.stderr)
            return 1
        print("".join(f"{note}\n" for note in console_notes(results)), end="", file=sys.stderr)
    return 0


def _prompts(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(prompt for name in names for prompt in _PROMPTS.get(name, (name,))))


def _named(what: str, texts: Sequence[str]) -> dict[str, str]:
    """Parses arguments of the form NAME=PATH or PATH, and returns a dict that maps each name to its path.

    Args:
        what: Name of the argument in error messages.
        texts: The arguments. Without NAME, the name comes from PATH: the file ``data/vqa.jsonl`` is called "vqa". The
            folders ``runs/mpo`` and ``runs/mpo/final`` are called "mpo".
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            path, place = text, Path(text).absolute()
            name = place.stem if place.is_file() else place.parent.name if place.name == "final" else place.name
        if not name or not path:
            raise ValueError(f"{what} must read NAME=PATH or PATH, got {text!r}")
        if name in named:
            raise ValueError(f"{what} must have different names, got {name!r} twice: give them as NAME=PATH")
        named[name] = path
    return named
