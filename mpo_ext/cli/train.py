"""The ``mpo-ext train`` command. What it needs is imported when it runs."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from mpo_ext.checks import LinesError, install_hint
from mpo_ext.cli.shared import leave_broken_pipe

if TYPE_CHECKING:
    from mpo_ext.plan.memory import Plan
    from mpo_ext.plan.roofline import Machine
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
    _take_late_settings(parser)


def _take_late_settings(parser: argparse.ArgumentParser) -> None:
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        """Takes the settings behind an option too, which argparse leaves over."""
        namespace, left = parse(args, namespace)
        for text in left:
            if text.startswith("--") and "." in text.partition("=")[0]:
                setting = text.lstrip("-")
                shown = setting if "=" in setting else f"{setting}=VALUE"
                parser.error(f"settings must be given as KEY=VALUE without dashes, as {shown}, got {text}")
        late = [text for text in left if "=" in text and not text.startswith("-")]
        namespace.overrides = [*namespace.overrides, *late]
        return namespace, [text for text in left if text not in late]

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def add_plan_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers ``mpo-ext plan``."""
    parser = subcommands.add_parser(
        "plan",
        help="predict time and memory of a recipe on a GPU",
        description="Says what mpo-ext train --dry-run says, and what a step is predicted to take on a GPU, as the "
        "recipe has it and otherwise. Nothing of it is measured.",
    )
    parser.add_argument("recipe", help="YAML file; relative paths in it start at the current folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="setting in place of the recipe's")
    parser.add_argument(
        "--gpu", metavar="NAME",
        help="A100, H100, H200 or B200, by its data sheet (default: H100); others by --bandwidth and --tflops",
    )  # fmt: skip
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="peak memory bandwidth, in place of --gpu")
    parser.add_argument("--tflops", type=float, help="peak dense TFLOP/s in the recipe's precision, with --bandwidth")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run_plan)
    _take_late_settings(parser)


def run_plan(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext plan``.

    Returns:
        0, or 1 where recipe, model, data or GPU are not as they must be.
    """
    try:
        from mpo_ext.plan.memory import plan
        from mpo_ext.train.recipe import load_recipe

        planned = plan(load_recipe(args.recipe, args.overrides), world=args.world)
        machine = _machine(args, planned.cost_model.compute)
        print_plan(planned)
        article = "an" if machine.name[0] in "AH" else "a"  # an A100, an H200
        title = f"Time of a step on {article} {machine.name}, PREDICTED ({machine.source}; communication and data "
        memory = "memory" if planned.world == 1 else "memory, one copy per rank"
        print_table(f"{title}left out)", ("", "step", "of this recipe", memory), planned.times(machine))
        for line in planned.advice(machine):
            print(f"- {line}")
        sys.stdout.flush()
        return 0
    except ImportError as error:
        hint = "" if "pip install" in str(error) else f": {install_hint('train')}"
        return _fail(args, error, hint, "plan")
    except (OSError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        return _fail(args, error, command="plan")


def _machine(args: argparse.Namespace, dtype: str) -> "Machine":
    """The GPU that the options name.

    Raises:
        ValueError: If they do not name one.
    """
    from mpo_ext.plan import roofline as cost

    given = {"--bandwidth": args.bandwidth, "--tflops": args.tflops}
    if args.bandwidth is None and args.tflops is None:
        try:
            return cost.gpu(args.gpu or "H100")
        except ValueError as error:
            raise ValueError(f"{error}: describe another one by its peaks, with --bandwidth and --tflops") from error
    if args.gpu is not None:
        raise ValueError(f"--gpu must not come with --bandwidth or --tflops, got {args.gpu!r} with them")
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name} must be given too, got only {', '.join(k for k, v in given.items() if v)}")
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    name = f"GPU of {args.bandwidth:g} TB/s and {args.tflops:g} TFLOP/s"
    return cost.peaks(args.bandwidth * 1e12, {dtype: args.tflops * 1e12}, name)


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
        from mpo_ext.plan.memory import plan

        planned = plan(recipe, world=args.world or int(os.environ.get("WORLD_SIZE", "1")))
        if int(os.environ.get("RANK", "0")) == 0:
            print_plan(planned)
            is_sound = print_look(recipe)
            sys.stdout.flush()
            return 0 if is_sound else 1
        return 0
    except ImportError as error:
        hint = "" if "pip install" in str(error) else f": {install_hint('train')}"
        return _fail(args, error, hint)
    except (OSError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        return _fail(args, error)


def print_plan(plan: "Plan") -> None:
    """Prints a plan in tables on a terminal, and as text elsewhere."""
    if not sys.stdout.isatty():
        print(plan)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in plan.tables():
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(header), pad_edge=False)
        for column, name in enumerate(header):
            is_number = column > 0 and all(row[column][:1].isdigit() or not row[column] for row in rows)
            table.add_column(name, justify="right" if is_number and any(header) else "left")
        for row in rows:
            table.add_row(*row, end_section=False)
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


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


def print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table as text."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"  {'  '.join(cells)}".rstrip())
    print()


def _fail(args: argparse.Namespace, error: Exception, hint: str = "", command: str = "train") -> int:
    if args.debug:
        raise error
    if isinstance(error, BrokenPipeError):
        return leave_broken_pipe()
    text = str(error) if isinstance(error, LinesError) else " ".join(str(error).split()) or type(error).__name__
    print(f"mpo-ext {command}: {text}{hint}", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    """Runs ``python -m mpo_ext.train`` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpo_ext.train", description="Trains a model as a recipe says: mpo-ext train for launchers."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return args.run(args)
