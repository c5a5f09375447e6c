"""The ``mpo-ext train`` command. What it needs is imported when it runs."""

import argparse
import os
from typing import TYPE_CHECKING

from mpo_ext.cli.shared import add_debug, add_recipe, command

if TYPE_CHECKING:
    from mpo_ext.train.recipe import Recipe


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers ``mpo-ext train``."""
    parser = subcommands.add_parser(
        "train",
        help="train a model on preference pairs as a recipe says",
        description="Trains a model as a recipe says. Run the same command again to resume an "
        "interrupted run. On several GPUs: accelerate launch -m mpo_ext.train RECIPE [KEY=VALUE ...].",
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``mpo-ext train`` and ``python -m mpo_ext.train``."""
    add_recipe(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check recipe, model and data, print what the run needs, and exit"
    )
    parser.add_argument(
        "--world", type=int, metavar="N", help="processes that --dry-run plans for (default: those launched)"
    )
    add_debug(parser)
    parser.set_defaults(run=run_train)


@command("train", extra="train")
def run_train(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext train``.

    Returns:
        The exit status: that of ``loop.train``, or after a dry run 1 if the data has a defect.
    """
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
    if int(os.environ.get("RANK", "0")) != 0:
        return 0
    print_plan(planned)
    return 0 if print_look(recipe) else 1


def print_look(recipe: "Recipe") -> bool:
    """Prints what a first look at the data finds: formats, pairs with images, lines and images that are not there.

    Returns:
        Whether the trainer can go through it; with ``data.skip_bad`` that takes one good pair.
    """
    from mpo_ext.train.mixture import Mixture

    is_sound, is_whole = True, True
    print("\nData, looked at")
    for sources in filter(None, (recipe.data.train, recipe.data.eval)):
        looks = Mixture(sources, seed=recipe.optim.seed).inspect()
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
        read = sum(look.lines_read for look in looks)
        is_whole &= all(look.lines_read == look.lines for look in looks)
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
