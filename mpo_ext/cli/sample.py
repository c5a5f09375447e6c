"""Defines the command ``mpo-ext sample``. Its dependencies are imported only when it runs."""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from mpo_ext.checks import check_integer, check_model_path
from mpo_ext.cli import shared
from mpo_ext.cli.shared import command, load_engine


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
    _add_answers(dropout)
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
    _add_answers(correctness)
    _add_template(correctness)
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
    _add_rlaif_v(pipelines)
    _add_judge(pipelines)


def _add_rlaif_v(pipelines: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pipelines.add_parser(
        "rlaif-v",
        help="check the claims of several responses one by one, and pair responses by their errors",
        description="Samples responses, splits each into claims, asks a yes-or-no question with the image about each "
        "claim, and pairs responses by their numbers of rejected claims (RLAIF-V, arXiv 2405.17220). Writes "
        "OUT/pairs.jsonl.",
    )
    _add_common(parser, samples=10, max_new_tokens=2048)
    _add_template(parser)
    parser.add_argument(
        "--claims", choices=("model", "sentences"), default="model",
        help="what splits a response: the model, or the ends of its sentences (default: model)",
    )  # fmt: skip
    parser.add_argument(
        "--questions", choices=("model", "statement"), default="model",
        help="how a claim becomes a question: rewritten by the model, or quoted as a statement (default: model)",
    )  # fmt: skip
    parser.add_argument(
        "--max-list-tokens", type=int, default=512,
        help="maximum number of tokens in the list of claims, and in the list of questions, of a response "
        "(default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--min-gap", type=int, default=1, help="minimum difference of the numbers of rejected claims (default: 1)"
    )
    _add_judged(parser)
    parser.set_defaults(run=run_sample, build=_rlaif_v)


def _add_judge(pipelines: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = pipelines.add_parser(
        "judge",
        help="let a model compare or rate whole responses",
        description="Samples responses and lets a model compare two of them, in both orders, or rate each. Two "
        "responses whose comparison depends on the order give no pair. Writes OUT/pairs.jsonl.",
    )
    _add_common(parser, samples=4, max_new_tokens=2048)
    _add_template(parser)
    parser.add_argument(
        "--mode", choices=("pairwise", "pointwise"), default="pairwise",
        help="compare two responses, or rate each response (default: pairwise)",
    )  # fmt: skip
    parser.add_argument("--best-rating", type=int, help="best rating of pointwise, 2 to 9 (default: 5)")
    parser.add_argument(
        "--min-gap", type=float, help="minimum difference of two ratings of a pair, with pointwise (default: 0.5)"
    )
    _add_judged(parser)
    parser.set_defaults(run=run_sample, build=_judge, max_shorter=None)


def _add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template", type=lambda name: None if name == "none" else name,
        help="prompt template of the questions, or none: the question with its options (default: none)",
    )  # fmt: skip


def _add_judged(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the pipelines in which a model judges responses."""
    parser.add_argument(
        "--pairs-per-question", type=int, default=2, help="maximum pairs per question; 0 takes all (default: 2)"
    )
    parser.add_argument(
        "--max-shorter", type=float, default=1.0, metavar="FRACTION",
        help="leave out a pair whose chosen response has fewer words than the rejected one by more than this "
        "fraction; 1 leaves out none (default: 1); judge: with pointwise",
    )  # fmt: skip
    parser.add_argument(
        "--judge-model", metavar="MODEL", help="model that judges, run like --model (default: the model itself)"
    )


def _add_common(parser: argparse.ArgumentParser, *, samples: int, max_new_tokens: int) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="file of items (.jsonl, .json, .tsv, .csv, .parquet, also .gz; question, image, chosen or answer_gt), or "
        "a meta file (.json) that lists such files, in the format of MMPR's prompts",
    )
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument(
        "--model", required=True,
        help="folder of a model, of a run of mpo-ext train or of LoRA adapters, or a name; openai: its name at the "
        "server",
    )  # fmt: skip
    shared.add_engine(parser)
    parser.add_argument("--image-root", default="", help="root of relative image paths; a meta file names its own")
    shared.add_root_map(parser)
    shared.add_system(parser)
    parser.add_argument("--limit", type=int, help="take only the first items")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    parser.add_argument("--samples", type=int, default=samples, help=f"responses per item (default: {samples})")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-k", type=int, default=50, help="0 draws from all tokens (default: 50)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens,
        help=f"maximum number of tokens of a response (default: {max_new_tokens})",
    )  # fmt: skip
    parser.add_argument("--allow-truncated", action="store_true", help="use responses that --max-new-tokens cut off")
    _add_ray(parser)
    shared.add_image_limit(parser)
    shared.add_debug(parser)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="run engines on a Ray cluster: its address, 'auto' for the cluster of this machine, or 'local' for a new "
        "one on this machine",
    )  # fmt: skip
    parser.add_argument("--engines", type=int, help="number of engines, with --ray (default: 1)")
    parser.add_argument("--gpus-per-engine", type=float, help="number of GPUs of an engine, with --ray (default: 0)")


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the pipelines that compare answers with true answers."""
    parser.add_argument(
        "--style",
        help="form of the answers: final_answer, boxed, answer, direct, regex:... (default: the form of the "
        "template, or final_answer)",
    )
    shared.add_matcher(parser)


@command("sample", extra="generate")
def run_sample(args: argparse.Namespace) -> int:
    """Runs ``mpo-ext sample`` and returns the exit status."""
    from mpo_ext.generate import ray_stages
    from mpo_ext.generate.engine import rank_and_world_size
    from mpo_ext.generate.runner import check_run, run

    rank, world_size = rank_and_world_size()
    _check_ray(args, world_size)
    _check_judge(args)
    for name, value in (("block_size", args.block_size), ("batch_size", args.batch_size), ("limit", args.limit)):
        if value is not None:
            check_integer(name, value, least=1)
    pipeline = args.build(args)
    place = {"image_root": args.image_root, "root_map": shared.root_map(args), "system": args.system}
    # Checked before the model is loaded, because loading may take minutes.
    check_run(pipeline, args.source, args.out, world_size=world_size, **place)
    if args.engine != "openai":  # the model names of a server are not paths
        check_model_path("--model", args.model)
        if getattr(args, "judge_model", None) is not None:
            check_model_path("--judge-model", args.judge_model)
    settings = {"block_size": args.block_size, "limit": args.limit, "stream": sys.stderr}
    summary: Any
    if args.ray is not None:
        summary = ray_stages.run(
            pipeline, functools.partial(_load_in_actor, args), args.source, args.out, address=args.ray,
            engines=1 if args.engines is None else args.engines, gpus_per_engine=args.gpus_per_engine or 0,
            **settings, **place,
        )  # fmt: skip
    else:
        settings |= {"rank": rank, "world_size": world_size}
        summary = run(pipeline, _load_engines(args), args.source, args.out, **settings, **place)
    waiting = f"process {rank} of {world_size} is done, others are not"
    print(waiting if summary is None else summary, file=sys.stderr)
    if summary is not None and not any(summary.lines.values()):
        reasons = ", ".join(
            f"{count} with {summary.describe(reason)}" for reason, count in summary.skipped.most_common()
        )
        print(f"mpo-ext sample: no pair was made from {summary.items} items: {reasons}", file=sys.stderr)
        return 1
    return 0


def _check_ray(args: argparse.Namespace, world_size: int) -> None:
    if args.ray is None:
        for name in ("engines", "gpus_per_engine"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"--{name.replace('_', '-')} must be left out without --ray, got {value}")
    elif world_size > 1:
        raise ValueError(f"--ray must run in one process, which is the driver, got {world_size} processes")
    elif args.engines is not None:
        check_integer("engines", args.engines, least=1)


def _check_judge(args: argparse.Namespace) -> None:
    """Raises ValueError if the prompts of a judge at a server would be written with the tokenizer of another model."""
    judge = getattr(args, "judge_model", None)
    if args.engine != "openai" or judge in (None, args.model):
        return
    tokenizer = shared.engine_options(args).get("tokenizer", "")
    if tokenizer not in ("", "none"):
        raise ValueError(
            f"tokenizer must be none with another --judge-model, got {tokenizer!r} for {args.model} and {judge}: "
            "leave it out to use the tokenizer of each name, or give --engine-option tokenizer=none"
        )


def _load_in_actor(args: argparse.Namespace) -> Any:
    """Loads the engines in a Ray actor, after applying the options for images and videos to its process."""
    shared.apply_media_options(args)
    return _load_engines(args)


def _load_engines(args: argparse.Namespace) -> Any:
    """Loads the model and returns its engine. If a judge model is given, the engine runs both models."""
    engine = _load_engine(args, args.model)
    if getattr(args, "judge_model", None) is None:
        return engine
    from mpo_ext.generate.routing import RoutedEngine

    return RoutedEngine(engine, _load_engine(args, args.judge_model))


def _load_engine(args: argparse.Namespace, model: str) -> Any:
    """Loads a model into an engine, and returns the engine.

    ``model`` is a hub name, or the folder of a model, of a run, or of adapters. With ``--engine openai``, it is the
    server's name of the model.
    """
    from mpo_ext.evaluate.models import ModelSource, find_model
    from mpo_ext.evaluate.models import load_engine as load_source

    is_folder = args.engine != "openai" and Path(model).is_dir()
    source = find_model(model) if is_folder else ModelSource(model)
    return load_source(source, functools.partial(load_engine, args))


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    from mpo_ext.generate.engine import SamplingConfig

    sampling = SamplingConfig(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_new_tokens=args.max_new_tokens
    )
    settings = {name: getattr(args, name) for name in ("samples", "seed", "allow_truncated")}
    return {**settings, "sampling": sampling}


def _dropout_ntp(args: argparse.Namespace) -> Any:
    from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig

    names = ("keep", "unit", "with_image", "sample_chosen", "allow_wrong_chosen")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"style": args.style or "final_answer", "matcher": shared.matcher_settings(args)}
    return DropoutNTP(DropoutNTPConfig(**settings, **_shared(args)))


def _correctness(args: argparse.Namespace) -> Any:
    from mpo_ext.generate.correctness import Correctness, CorrectnessConfig

    names = ("template", "pairs_per_question", "length_balance", "reuse_limit", "style")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"accuracy": tuple(args.accuracy), "dedupe": not args.keep_duplicates}
    settings["matcher"] = shared.matcher_settings(args)
    return Correctness(CorrectnessConfig(**settings, **_shared(args)))


def _rlaif_v(args: argparse.Namespace) -> Any:
    from mpo_ext.generate.rlaif_v import RlaifV, RlaifVConfig

    names = ("template", "claims", "questions", "min_gap", "pairs_per_question", "max_shorter")
    settings = {name: getattr(args, name) for name in names}
    check_integer("max_list_tokens", args.max_list_tokens, least=1)
    rewriting = dataclasses.replace(RlaifVConfig().rewriting, max_new_tokens=args.max_list_tokens)
    return RlaifV(RlaifVConfig(**settings, rewriting=rewriting, judge=args.judge_model, **_shared(args)))


def _judge(args: argparse.Namespace) -> Any:
    from mpo_ext.generate.judge import Judge, JudgeConfig

    settings = {name: getattr(args, name) for name in ("template", "mode", "pairs_per_question")}
    for name in ("best_rating", "min_gap", "max_shorter"):  # JudgeConfig has the defaults
        if (value := getattr(args, name)) is None:
            continue
        if args.mode != "pointwise":
            raise ValueError(f"--{name.replace('_', '-')} must be left out without --mode pointwise, got {value}")
        settings[name] = value
    return Judge(JudgeConfig(**settings, judge=args.judge_model, **_shared(args)))
