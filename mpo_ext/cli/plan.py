"""Defines the command ``mpo-ext plan``. Its dependencies are imported only when it runs."""

import argparse
import math
from typing import TYPE_CHECKING

from mpo_ext.cli.shared import add_debug, add_recipe, command

if TYPE_CHECKING:
    from mpo_ext.plan.machines import Machine


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser(
        "plan",
        help="predict time and memory of a recipe on a GPU",
        description="Prints the tables of mpo-ext train --dry-run and the predicted time of a step on a GPU, with the "
        "recipe's settings and with alternatives. Nothing is measured.",
    )
    add_recipe(parser)
    parser.add_argument(
        "--gpu", metavar="NAME",
        help="A100, H100, H200 or B200, from its data sheet (default: H100); describe other GPUs by --bandwidth and "
        "--tflops",
    )  # fmt: skip
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="peak memory bandwidth, instead of --gpu")
    parser.add_argument("--tflops", type=float, help="peak dense TFLOP/s in the recipe's precision, with --bandwidth")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="number of processes (default: 1)")
    add_debug(parser)
    parser.set_defaults(run=run_plan)


@command("plan", extra="train")
def run_plan(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext plan`` and returns the exit status."""
    from mpo_ext.plan.planner import plan
    from mpo_ext.plan.report import print_plan, print_times
    from mpo_ext.train.preflight import check_needs
    from mpo_ext.train.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    check_needs(recipe)
    planned = plan(recipe, world=args.world)
    machine = _machine(args, planned.cost_model.compute)
    print_plan(planned)
    print_times(planned, machine)
    return 0


def _machine(args: argparse.Namespace, dtype: str) -> "Machine":
    """Returns the GPU that the options describe: by its name, or by ``--bandwidth`` and ``--tflops``.

    ``dtype`` is the dtype to which ``--tflops`` applies.

    Raises:
        ValueError: If the GPU is unknown, an option is invalid or missing, or two options exclude each other.
    """
    from mpo_ext.plan import machines

    peaks = {"--bandwidth": args.bandwidth, "--tflops": args.tflops}
    if args.bandwidth is None and args.tflops is None:
        try:
            return machines.gpu(args.gpu or "H100")
        except ValueError as error:
            raise ValueError(f"{error}: describe another GPU by its peaks, with --bandwidth and --tflops") from error
    if args.gpu is not None:
        raise ValueError(f"--gpu must not come with --bandwidth or --tflops, got {args.gpu!r} with them")
    for name, value in peaks.items():
        if value is None:
            given = ", ".join(option for option, peak in peaks.items() if peak)
            raise ValueError(f"{name} must be given too, got only {given}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive{'' if value < math.inf else ' and finite'}, got {value}")
    name = f"GPU of {args.bandwidth:g} TB/s and {args.tflops:g} TFLOP/s"
    return machines.peaks(args.bandwidth * 1e12, {dtype: args.tflops * 1e12}, name)
