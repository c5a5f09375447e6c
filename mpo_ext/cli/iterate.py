"""Defines the command ``mpo-ext iterate``. Its dependencies are imported only when it runs."""

import argparse
import signal
import sys

from mpo_ext.cli.shared import add_debug, add_recipe, command


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser(
        "iterate",
        help="repeat sampling, training and evaluation for several rounds",
        description="Runs rounds of on-policy MPO as a recipe says: each round samples pairs from the newest model, "
        "trains it on them and evaluates it. The same command resumes an interrupted run. The page "
        "OUTPUT/iterate.html shows the rounds.",
    )
    add_recipe(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check recipe, model and questions, print all commands, and exit"
    )
    add_debug(parser)
    parser.set_defaults(run=run_iterate)


@command("iterate", extra="train")
def run_iterate(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext iterate`` and returns the exit status."""
    from mpo_ext.iterate import rounds
    from mpo_ext.iterate.processes import InterruptedStageError
    from mpo_ext.iterate.recipe import load_iterate_recipe

    recipe = load_iterate_recipe(args.recipe, args.overrides)
    if args.dry_run:
        for line in rounds.describe(recipe):
            print(line)
        return 0
    try:
        results = rounds.run_rounds(recipe, stream=sys.stderr)
    except InterruptedStageError as error:
        name = signal.Signals(error.number).name
        print(f"mpo-ext iterate: interrupted by {name}; the same command resumes the run", file=sys.stderr)
        return 128 + error.number
    rounds.print_rounds(results)
    print(f"written to {recipe.folder / rounds.PAGE}", file=sys.stderr)
    return 0
