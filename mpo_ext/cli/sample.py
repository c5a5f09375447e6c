"""The ``mpo-ext sample`` command, which imports its dependencies when it runs."""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from mpo_ext.checks import check_integer, check_model_path
from mpo_ext.cli import shared
from mpo_ext.cli.shared import command, load_engine, settings_errors


def add_parser(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subcommands.add_parser(
        "sample",
        help="make preference pairs from a model's own responses",
        description="Makes preference pairs from a model's own responses. An interrupted run resumes "
        "when the same command is given again.",
    )
    pipelines = parser.add_subparsers(required=True, metavar="PIPELINE")
    dropout = pipelines.add_parser(
        "dropout-ntp",
        help="cut good responses and let the model continue them without the image",
        description="Cuts the chosen response of each item and lets the model continue it without the image. The "
        "continuation becomes the rejected response. Writes OUT/pairs.jsonl.",
    )
    _add_common(dropout, samples=1, max_new_tokens=2048)
    dropout.add_argument("--keep", type=float, default=0.5, help="fraction of the response to keep (default: 0.5)")
    dropout.add_argument(
        "--unit", choices=("tokens", "words"), default="tokens", help="unit of --keep (default: tokens)"
    )
    dropout.add_argument("--with-image", action="store_true", help="leave the image in the question")
    dropout.add_argument(
        "--sample-chosen", action="store_true", help="let the model first answer items that have no chosen response"
    )
    dropout.add_argument(
        "--allow-wrong-chosen", action="store_true",
        help="use items whose chosen response is a wrong sample, as 'correctness' writes them into unsolved.jsonl "
        "(default: such items are skipped and counted)",
    )  # fmt: skip
    dropout.set_defaults(run=run_sample, build=_dropout_ntp)

    correctness = pipelines.add_parser(
        "correctness",
        help="pair samples with a right answer and samples with a wrong answer",
        description="Samples responses to questions with a known answer and pairs right samples with wrong samples. "
        "Writes OUT/pairs.jsonl, OUT/format_pairs.jsonl (rejected: no answer) and OUT/unsolved.jsonl (no right "
        "sample), which 'mpo-ext sample dropout-ntp' reads.",
    )
    _add_common(correctness, samples=32, max_new_tokens=4096)
    correctness.add_argument("--template", help="prompt template that questions are put in (default: none)")
    correctness.add_argument(
        "--pairs-per-question", type=int, default=15, help="maximum pairs per question; 0 takes all (default: 15)"
    )
    correctness.add_argument(
        "--accuracy", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="range of the fraction of right samples in which a question gives pairs (default: 0 1)",
    )  # fmt: skip
    correctness.add_argument("--length-balance", action="store_true", help="prefer pairs of similar lengths")
    correctness.add_argument(
        "--reuse-limit", type=int, default=0, help="maximum number of pairs per response; 0 sets no limit (default: 0)"
    )
    correctness.add_argument("--keep-duplicates", action="store_true", help="use equal responses more than once")
    correctness.set_defaults(run=run_sample, build=_correctness)


def _add_common(parser: argparse.ArgumentParser, *, samples: int, max_new_tokens: int) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="file of items (.jsonl, .json, .tsv, .csv, .parquet, also .gz; question, image, chosen or answer_gt), or "
        "a meta file (.json) that lists such files, in the format of MMPR's prompts",
    )
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument(
        "--model", required=True, help="folder of a model, of a run of mpo-ext train or of LoRA adapters, or a name"
    )
    shared.add_engine(parser)
    parser.add_argument("--image-root", default="", help="root of relative image paths; a meta file names its own")
    shared.add_root_map(parser)
    parser.add_argument("--limit", type=int, help="take only the first items")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    parser.add_argument("--samples", type=int, default=samples, help=f"responses per item (default: {samples})")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-k", type=int, default=50, help="0 draws from all tokens (default: 50)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"(default: {max_new_tokens})")
    parser.add_argument("--allow-truncated", action="store_true", help="use responses that --max-new-tokens cut off")
    parser.add_argument(
        "--style",
        help="form of the answers: final_answer, boxed, answer, direct, regex:... (default: the form of the "
        "template, or final_answer)",
    )
    shared.add_matcher(parser)
    shared.add_image_limit(parser)
    shared.add_debug(parser)


@command("sample", extra="generate")
def run_sample(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext sample`` and returns the exit status."""
    from mpo_ext.evaluate.models import ModelSource, find_model
    from mpo_ext.evaluate.models import load_engine as load_source
    from mpo_ext.generate.engine import rank_and_world_size
    from mpo_ext.generate.runner import check_run, run

    rank, world_size = rank_and_world_size()
    with settings_errors():
        for name, value in (("block_size", args.block_size), ("batch_size", args.batch_size), ("limit", args.limit)):
            if value is not None:
                check_integer(name, value, least=1)
        pipeline = args.build(args)
        place = {"image_root": args.image_root, "root_map": shared.root_map(args), "world_size": world_size}
    # Checked before the model is loaded, because loading may take minutes.
    check_run(pipeline, args.source, args.out, **place)
    check_model_path("--model", args.model)
    source = find_model(args.model) if Path(args.model).is_dir() else ModelSource(args.model)
    settings = {"block_size": args.block_size, "limit": args.limit, "rank": rank, "stream": sys.stderr}
    engine = load_source(source, functools.partial(load_engine, args))
    summary = run(pipeline, engine, args.source, args.out, **settings, **place)
    waiting = f"process {rank} of {world_size} is done, others are not"
    print(waiting if summary is None else summary, file=sys.stderr)
    return 0


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    from mpo_ext.generate.engine import SamplingConfig

    sampling = SamplingConfig(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_new_tokens=args.max_new_tokens
    )
    settings = {name: getattr(args, name) for name in ("samples", "seed", "allow_truncated")}
    return {**settings, "sampling": sampling, "matcher": shared.matcher_settings(args)}


def _dropout_ntp(args: argparse.Namespace) -> Any:
    from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig

    names = ("keep", "unit", "with_image", "sample_chosen", "allow_wrong_chosen")
    settings = {name: getattr(args, name) for name in names}
    return DropoutNTP(DropoutNTPConfig(**settings, style=args.style or "final_answer", **_shared(args)))


def _correctness(args: argparse.Namespace) -> Any:
    from mpo_ext.generate.correctness import Correctness, CorrectnessConfig

    names = ("template", "pairs_per_question", "length_balance", "reuse_limit", "style")
    settings = {name: getattr(args, name) for name in names}
    accuracy, dedupe = tuple(args.accuracy), not args.keep_duplicates
    return Correctness(CorrectnessConfig(**settings, accuracy=accuracy, dedupe=dedupe, **_shared(args)))
