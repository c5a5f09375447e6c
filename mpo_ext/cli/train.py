"""The ``mpo-ext train`` command. What it needs is imported when it runs."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from mpo_ext.cli.shared import accept_late_settings, report_error

if TYPE_CHECKING:
    from mpo_ext.train.recipe import Recipe


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers ``mpo-ext train``."""
    parser = subcommands.add_parser(
        "train",
        help="train a model on preference pairs as a recipe says",
        description="Trains a model as a recipe says. A run that was ended goes on when the same command is given "
        "again. On several GPUs: accelerate launch -m mpo_ext.train RECIPE [KEY=VALUE ...].",
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``mpo-ext train`` and ``python -m mpo_ext.train`` take."""
    parser.add_argument("recipe", help="YAML file; relative paths in it start at the current folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="setting in place of the recipe's, as in optim.learning_rate=1e-6 or 'data.train=[a.jsonl, b.jsonl]'",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="check recipe, model and data, say what the run needs, and end"
    )
    parser.add_argument(
        "--world", type=int, metavar="N", help="processes that --dry-run plans for (default: those launched)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run_train)
    accept_late_settings(parser)


def run_train(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        What ``loop.train`` returns; 0 after a dry run; 1 where the run cannot begin or go on.
    """
    try:
        from mpo_ext.train.recipe import load_recipe

        recipe = load_recipe(args.recipe, args.overrides)
        if not args.dry_run:
            if args.world is not None:
                raise ValueError(f"--world must come with --dry-run, got {args.world} without it")
            from mpo_ext.train.loop import train

            return train(recipe) or 0
        from mpo_ext.plan.planner import plan
        from mpo_ext.plan.report import print_plan

        planned = plan(recipe, world=args.world or int(os.environ.get("WORLD_SIZE", "1")))
        if int(os.environ.get("RANK", "0")) == 0:
            print_plan(planned)
            is_sound = print_look(recipe)
            sys.stdout.flush()
            return 0 if is_sound else 1
        return 0
    except (ImportError, OSError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        return report_error("train", error, debug=args.debug)


def print_look(recipe: "Recipe") -> bool:
    """Prints what a first look at the data finds: formats, pairs with images, lines and images that are not there.

    Returns:
        Whether the trainer can go through it; with ``data.skip_bad`` that takes one good pair.
    """
    from mpo_ext.train.mixture import Mixture

    is_sound, is_whole = True, True
    print("\nData, looked at")
    for sources in filter(None, (recipe.data.train, recipe.data.eval)):
        looks = Mixture(sources, seed=recipe.optim.seed).look()
        for look in looks:
            print(f"  {look}")
            if look.images:
                found = f"{look.missing:,} MISSING" if look.missing else "all there"
                print(f"    {look.images:,} different images: {found}")
            for example in look.examples:
                print(f"    {example}")
            if look.missing and look.path.endswith(".json"):
                print("    root_map moves the folders of a meta file: {path: ..., root_map: ...}")
            elif look.missing:
                print(
                    f"    relative images start at {look.root}; root names another folder, as in "
                    f"{{path: {look.path}, root: .}}"
                )
        bad = sum(look.bad + look.pairs_missing for look in looks)
        read = sum(look.looked_at for look in looks)
        is_whole &= all(look.looked_at == look.lines for look in looks)
        is_sound &= bad == 0 or (recipe.data.skip_bad and bad < read)
    rest = "" if is_whole else ", and the lines between those that were read"
    print(f"  not looked at: whether images can be opened (mpo-ext data check does that), lengths in tokens{rest}")
    if not is_sound:
        end = "every pair would be left out" if recipe.data.skip_bad else "the run would end at the first of them"
        print(f"  NOT SOUND: {end}")
    return is_sound


def main(argv: list[str] | None = None) -> int:
    """Runs ``python -m mpo_ext.train`` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpo_ext.train", description="Trains a model as a recipe says: mpo-ext train for launchers."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return args.run(args)
