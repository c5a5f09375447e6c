"""Compares the sampling speed of batches and of single prompts: ``python -m benchmarks.sampling``.

The model is the untrained InternVL of the digits demo. The items are questions about grids of digits with correct
step-by-step responses. The overhead of a run is the time spent outside ``TransformersEngine.generate``: cutting and
joining responses, filters, journal syncs and outputs. All cases run in turn in one process; the results are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import interleaved, nothing
from mpo_ext.demo import digits
from mpo_ext.demo.model import build_model, build_tokenizer
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.runner import run
from mpo_ext.generate.transformers_engine import TransformersEngine


class TimedEngine(TransformersEngine):
    """An engine that adds up the time spent in ``generate``."""

    seconds = 0.0

    def generate(self, requests: Any) -> Any:
        begin = time.perf_counter()
        try:
            return super().generate(requests)
        finally:
            self.seconds += time.perf_counter() - begin


def main() -> None:
    """Prints the results, and writes them as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--single", type=int, default=64, help="number of prompts that are compared one by one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", metavar="FILE", help="write the results to this file; - prints them as the last line"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.generation_config.eos_token_id = None  # all responses have the same length
    tokenizer.eos_token = None
    sampling = SamplingConfig(temperature=1.0, top_k=0, max_new_tokens=args.tokens)
    tasks = digits.sample_tasks(digits.load_digits()["train"], args.items, np.random.default_rng(0), "cot")
    requests = [Request(question=task.question, seed=row, sampling=sampling) for row, task in enumerate(tasks)]

    engines = {size: TransformersEngine(model, tokenizer, batch_size=size) for size in (1, args.batch_size)}
    cases: dict[str, Callable[[], object]] = {
        "one by one": lambda: engines[1].generate(requests[: args.single]),
        f"batches of {args.batch_size}": lambda: engines[args.batch_size].generate(requests[: args.single]),
    }
    overheads: list[float] = []

    def add_overhead() -> None:
        overheads.append(_overhead(model, tokenizer, tasks, sampling, args.batch_size))

    runs = {name: (nothing, run) for name, run in {**cases, "overhead": add_overhead}.items()}
    timings = interleaved(runs, args.repeat)
    medians = {name: timings[name].median_s for name in cases}
    single, batched = medians.values()
    overhead = statistics.median(overheads[1:])
    for name, value in medians.items():
        print(f"{name:<20} {1e3 * value:8.1f} ms for {args.single} prompts of {args.tokens} new tokens")
    print(f"{'ratio':<20} {single / batched:8.2f} x")
    print(f"{'overhead of a run':<20} {100 * overhead:8.2f} % of its generation")
    if args.json:
        shape = {"prompts": args.single, "new_tokens": args.tokens, "batch_size": args.batch_size}
        results: dict[str, Any] = {name: {"seconds": timings[name].seconds, **shape} for name in cases}
        results[f"batches of {args.batch_size}"]["overhead_share"] = overhead
        if args.json == "-":
            print(json.dumps(results))
        else:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def _overhead(model: Any, tokenizer: Any, tasks: Any, sampling: SamplingConfig, batch_size: int) -> float:
    """Returns the time that a run spends outside generation, as a fraction of its generation time."""
    engine = TimedEngine(model, tokenizer, batch_size=batch_size)
    pipeline = DropoutNTP(DropoutNTPConfig(sampling=sampling, allow_truncated=True, matcher={"kind": "number"}))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "items.jsonl")
        lines = ({"question": t.question, "chosen": t.response, "answer_gt": str(t.answer)} for t in tasks)
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        begin = time.perf_counter()
        run(pipeline, engine, source, Path(folder, "out"), block_size=batch_size)
        return (time.perf_counter() - begin) / engine.seconds - 1


if __name__ == "__main__":
    main()
