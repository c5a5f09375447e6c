"""Defines the command ``mpo-ext train``. Its dependencies are imported only when it runs."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpo_ext.checks import environment_integer
from mpo_ext.cli.shared import add_debug, add_recipe, command

if TYPE_CHECKING:
    from mpo_ext.evaluate.cells import QuestionFile
    from mpo_ext.train.mixture import Mixture
    from mpo_ext.train.recipe import Recipe


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    """Runs ``mpo-ext train`` and returns the exit status; a dry run returns 1 if the trainer cannot use the data."""
    from mpo_ext.images import set_max_pixels
    from mpo_ext.train.preflight import check_needs
    from mpo_ext.train.recipe import load_recipe
    from mpo_ext.videos import set_video_defaults

    recipe = load_recipe(args.recipe, args.overrides)
    if args.world is not None and not args.dry_run:
        raise ValueError(f"--world must come with --dry-run, got {args.world} without it")
    check_needs(recipe)
    if recipe.data.max_image_pixels is not None:
        set_max_pixels(recipe.data.max_image_pixels)
    set_video_defaults(recipe.data.video_fps, recipe.data.video_max_frames)
    if not args.dry_run:
        from mpo_ext.train.loop import train

        return train(recipe) or 0
    from mpo_ext.plan.planner import plan
    from mpo_ext.plan.report import print_plan
    from mpo_ext.processors import check_model

    planned = plan(recipe, world=args.world or environment_integer("WORLD_SIZE", 1))
    if environment_integer("RANK", 0) != 0:
        return 0
    check_model(recipe.model.path, **recipe.model.hub_options)
    if recipe.reference.path is not None:
        check_model(recipe.reference.path, **recipe.reference_hub_options)
    questions = _open_questions(recipe)
    print_plan(planned)
    mixtures = open_mixtures(recipe)
    is_valid = print_data(recipe, mixtures)
    from mpo_ext.train.dry_run import check_encoding, check_resume, find_checkpoint, load_encoder

    checkpoint = find_checkpoint(recipe)
    encoder = load_encoder(recipe, checkpoint)
    encoding = check_encoding(recipe, mixtures[0], encoder)
    print("".join(f"  {line}\n" for line in encoding.text_lines()), end="")
    if questions is not None:
        print(f"  {questions.path}: {questions.source.count:,} lines of questions for output.eval_generate")
    print("\nOutput")
    for line in check_resume(recipe, checkpoint, encoder, planned.steps):
        print(f"  {line}")
    is_valid = is_valid and not encoding.problems
    print(f"\nResult: {'no problems found' if is_valid else 'NOT VALID, see above'}")
    return 0 if is_valid else 1


def _open_questions(recipe: "Recipe") -> "QuestionFile | None":
    if recipe.output.eval_generate is None:
        return None
    from mpo_ext.train.answer_evaluation import open_eval_questions  # needs the extra "generate"

    return open_eval_questions(recipe.output.eval_generate)


def open_mixtures(recipe: "Recipe") -> "list[Mixture]":
    """Returns the training data of a recipe, and its evaluation data if it has any."""
    from mpo_ext.train.mixture import Mixture

    parts = (("data.train", recipe.data.train), ("data.eval", recipe.data.eval))
    return [Mixture(sources, seed=recipe.optim.seed, name=name) for name, sources in parts if sources]


def print_data(recipe: "Recipe", mixtures: "Sequence[Mixture]") -> bool:
    """Prints the format, the number of images and the defects of each source. ``mixtures`` are the recipe's data.

    Defects are bad lines, pairs with a missing image or video, and pairs whose placeholders (such as ``<image>``) do
    not match their images or videos.

    Returns:
        Whether the trainer can use the data. Without ``data.skip_bad``, there must be no defects. With
        ``data.skip_bad``, a pair without defects is enough. ``data.train`` and ``data.eval`` are checked separately.
    """
    from mpo_ext.train.mixture import SourceOverview, root_advice, stored_lines

    is_valid, is_complete = True, True
    inspected: list[SourceOverview] = []
    print("\nData")
    for mixture in mixtures:
        overviews = mixture.inspect()
        inspected += overviews
        for overview in overviews:
            print(f"  {overview}")
            if overview.images:
                status = f"{overview.missing:,} MISSING" if overview.missing else "all exist"
                media = "images and videos" if overview.with_videos else "images"
                print(f"    {overview.images:,} different {media}: {status}")
            for example in overview.examples:
                print(f"    {example}")
            if overview.missing:
                print(f"    {root_advice(overview.path, overview.root)}")
        bad = sum(overview.bad + overview.misplaced + overview.pairs_missing for overview in overviews)
        read = sum(overview.lines_read for overview in overviews)
        is_complete &= all(overview.lines_read == overview.lines for overview in overviews)
        is_valid &= bad == 0 or (recipe.data.skip_bad and bad < read)
    for line in stored_lines(inspected):
        print(f"  {line}")
    rest = "" if is_complete else ", and the lines between those that were read"
    print(f"  not checked: whether images can be opened (mpo-ext data check does that){rest}")
    if not is_valid:
        result = "would skip every pair" if recipe.data.skip_bad else "would stop at the first of them"
        print(f"  NOT VALID: the run {result}")
    return is_valid


def main(argv: list[str] | None = None) -> int:
    """Runs ``python -m mpo_ext.train`` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpo_ext.train", description="Trains a model as a recipe says: mpo-ext train for launchers."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return args.run(args)
