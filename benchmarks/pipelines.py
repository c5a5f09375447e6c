"""Compares the pipelines that make preference pairs, on the demo's digits task: ``python -m benchmarks.pipelines``.

The demo's SFT model answers questions about grids of unseen digits, step by step. Three results are measured for each
pipeline: generated tokens per pair, pairs per CPU second, and the fraction of pairs with a wrong label. The RLAIF-V
responses are judged by ``benchmarks.study.reading_judge``.

Slow imports are inside the measuring functions, because ``benchmarks.documents`` imports this module for its table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import now, provenance, write_text
from benchmarks.study import labels
from benchmarks.tables import Documents
from mpo_ext.report import markdown_table

CORRECTNESS, DROPOUT_NTP, RLAIF_V = "correctness", "dropout-ntp", "rlaif-v"
RESULTS = Path("results/pipelines.json")
_FIELDS = {"environment", "settings", "results"}


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs the pipelines in turn, ``args.repeat`` times, each time with another seed.

    Returns:
        A dict from the name of each pipeline to its results. The results are ``runs`` (pairs, tokens and seconds of
        each run), and the fractions that ``label_shares`` returns for the pairs of all runs.
    """
    import numpy as np

    from benchmarks.study import reading_judge
    from mpo_ext.demo import digits, reading
    from mpo_ext.demo.pairs import BATCH_SIZE, sample, write_items
    from mpo_ext.demo.settings import Settings
    from mpo_ext.demo.start import load_shipped, new_model, shipped_start
    from mpo_ext.generate.routing import RoutedEngine
    from mpo_ext.generate.transformers_engine import TransformersEngine

    settings = Settings(seed=1)
    model, processor = new_model(settings)
    info = shipped_start(settings)
    if info is None:
        raise ValueError(f"the package must contain the start of seed {settings.seed}")
    load_shipped(model, info)
    engine = TransformersEngine(model, processor, name="start of the digits demo", batch_size=BATCH_SIZE)
    unseen = digits.part(digits.load_digits()["train"], settings.sft_digits, None)
    tasks = reading.sample_tasks(unseen, args.questions, np.random.default_rng(args.seed), "cot", side=settings.side)
    shutil.rmtree(args.out, ignore_errors=True)  # a journal of an earlier run would be resumed
    write_items(args.out, "answered", tasks)
    write_items(args.out, "open", tasks, has_truth=False)
    pairs: dict[str, list[Any]] = {}
    runs: dict[str, list[dict[str, float]]] = {}
    for repeat in range(args.repeat):
        for name, make in pipelines(args, args.seed + repeat).items():
            judge = reading_judge.ReadingJudge(engine, settings.side)
            routed = RoutedEngine(engine, judge) if name == RLAIF_V else engine
            items = "answered" if name == CORRECTNESS else "open"
            pipeline, begin, cpu = make(), time.perf_counter(), time.process_time()
            made, summary = sample(pipeline, routed, args.out, f"{name}-{repeat}", items=items)
            seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
            counts = {"pairs": len(made), "tokens": summary.generated_tokens, "claim_tokens": judge.claim_tokens}
            pairs.setdefault(name, []).extend(made)
            runs.setdefault(name, []).append(seconds | counts)
            print(name, runs[name][-1], flush=True)
    return {name: {"runs": runs[name], **labels.label_shares(pairs[name])} for name in runs}


def pipelines(args: argparse.Namespace, seed: int) -> dict[str, Callable[[], Any]]:
    """Returns a dict from the name of each pipeline to a function that creates it.

    The pipelines have the sampling settings of the demo.
    """
    from benchmarks.study import reading_judge
    from mpo_ext.demo import digits
    from mpo_ext.demo.pairs import MAX_NEW_TOKENS
    from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
    from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
    from mpo_ext.generate.engine import SamplingConfig
    from mpo_ext.generate.rlaif_v import RlaifV

    sampling = SamplingConfig(temperature=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    common: dict[str, Any] = {"seed": seed, "sampling": sampling, "style": digits.STYLES["cot"]}
    common |= {"matcher": digits.MATCHER}
    limits = {"samples": args.samples, "pairs_per_question": 2}
    judged = reading_judge.config(temperature=1.0, seed=seed, **limits)
    return {
        CORRECTNESS: lambda: Correctness(CorrectnessConfig(**limits, **common)),
        DROPOUT_NTP: lambda: DropoutNTP(DropoutNTPConfig(sample_chosen=True, **common)),
        RLAIF_V: lambda: RlaifV(judged),
    }


def table(documents: Documents) -> str:
    """Returns the table of results/pipelines.json, and sentences that compare the token numbers with the MPO paper."""
    document: dict[str, Any] = documents["pipelines"]
    results, environment, settings = (document[name] for name in ("results", "environment", "settings"))
    rows, tokens = [], {}
    for name, figures in results.items():
        runs = figures["runs"]
        n_pairs = sum(run["pairs"] for run in runs)
        written = sum(run["tokens"] + 2 * run["claim_tokens"] for run in runs) / n_pairs
        tokens[name] = sum(run["tokens"] for run in runs) / n_pairs, written
        rows.append(
            [
                f"`{name}`", f"{n_pairs:,}", *(f"{count:.1f}" for count in tokens[name]),
                f"{statistics.median(run['pairs'] / run['cpu_seconds'] for run in runs):.1f}",
                *(f"{100 * figures[share]:.1f}" for share in ("right", "equal", "wrong", "chosen_right")),
            ]
        )  # fmt: skip
    header = ["pipeline", "pairs", "tokens per pair", "tokens per pair, with claims", "pairs per CPU second"]
    text = markdown_table([*header, *(f"{name}, %" for name in labels.SHARES.values())], rows)
    generated, written = (100 * tokens[DROPOUT_NTP][at] / tokens[RLAIF_V][at] for at in (0, 1))
    loads = [environment["load_before"][0], environment["load_after"][0]]
    return (
        f"{text}\n{settings['questions']} questions, {settings['samples']} responses per question, "
        f"{settings['repeat']} runs of each pipeline. Measured on {environment['threads']} thread of "
        f"{environment['cpu'].rsplit(' x ', 1)[0]} ({environment['cores']} cores), load average {min(loads):.1f} to "
        f"{max(loads):.1f}, commit {environment['commit']}, {environment['started'][:10]}: "
        f"`{environment['command']}`.\n\n"
        f"DropoutNTP generated {generated:.0f} % of the tokens per pair of RLAIF-V ({written:.0f} % with claims). In "
        f"the MPO paper, the ratio is {100 * labels.PAPER[0] / labels.PAPER[1]:.1f} %.\n"
    )


def load(path: Path) -> dict[str, Any]:
    """Reads results/pipelines.json, checks its format, and returns its content."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if set(document) != _FIELDS or set(document["results"]) != {CORRECTNESS, DROPOUT_NTP, RLAIF_V}:
        raise ValueError(f"{path} must be written by python -m benchmarks.pipelines, got {sorted(document)}")
    return document


def main(argv: list[str] | None = None) -> int:
    """Runs the pipelines, prints the table and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipelines", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/pipelines"), help="folder to write to, which is emptied first"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"file of the results (default: {RESULTS})")
    parser.add_argument("--questions", type=int, default=500, help="questions for each run (default: 500)")
    parser.add_argument("--samples", type=int, default=8, help="responses per question (default: 8)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each pipeline (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions and of the first run (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    start = now()
    results = measure(args)
    settings = {name: getattr(args, name) for name in ("questions", "samples", "repeat", "seed", "threads")}
    document = {"environment": provenance("python -m benchmarks.pipelines", *start), "settings": settings}
    document["results"] = results
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.results, json.dumps(document, indent=1) + "\n")
    print(table({"pipelines": document}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
