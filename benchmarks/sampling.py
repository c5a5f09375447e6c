"""Measures the speed of sampling: ``python -m benchmarks.sampling``.

Prints three results. Each result is computed from medians of alternating runs.

1. The speed of batches, relative to single prompts. The model is the untrained InternVL of the digits demo.
2. The overhead of a sampling run: the time outside ``TransformersEngine.generate``, divided by the time inside. For
   example, filters and writing files take time outside.
3. The speed of one shared prefill for all samples of a question, relative to one prefill per sample. The model is an
   untrained InternVL with as many patches and image tokens as the released models. The question has images.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import interleaved, nothing
from benchmarks.step_inputs import Sizes, build
from mpo_ext.demo import digits
from mpo_ext.demo.model import build_model, build_tokenizer
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.runner import run
from mpo_ext.generate.transformers_engine import TransformersEngine

SHARED, APART = "one prefill per question", "one prefill per sample"


class TimedEngine(TransformersEngine):
    """An engine that adds up the wall-clock seconds spent in ``generate``."""

    seconds = 0.0

    def generate(self, requests: Any) -> Any:
        begin = time.perf_counter()
        try:
            return super().generate(requests)
        finally:
            self.seconds += time.perf_counter() - begin


def main() -> None:
    """Measures all cases, prints the results, and writes them as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--single", type=int, default=64, help="number of prompts that are compared one by one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each sample")
    parser.add_argument("--samples", type=int, default=32, help="samples of the question with images; 0: leave it out")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the question with images")
    parser.add_argument("--images", type=int, default=2, help="images of the question, of 256 tokens each")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the model with images")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the model with images")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", metavar="FILE", help="write the results to this file; - prints them as the last line"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = _batches_and_overhead(args)
    if args.samples:
        results |= _shared_prefill(args)
    if args.json == "-":
        print(json.dumps(results))
    elif args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def _batches_and_overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Compares batches with single prompts, and measures the overhead of a sampling run. Prints both results.

    Returns a dict from the name of a case to its seconds and sizes.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.generation_config.eos_token_id = None  # all responses have the same length
    tokenizer.eos_token = None
    sampling = SamplingConfig(temperature=1.0, top_k=0, max_new_tokens=args.tokens)
    tasks = digits.sample_tasks(digits.load_digits()["train"], args.items, np.random.default_rng(0), "cot")
    requests = [Request(question=task.question, seed=row, sampling=sampling) for row, task in enumerate(tasks)]

    engines = {size: TransformersEngine(model, tokenizer, batch_size=size) for size in (1, args.batch_size)}
    for engine in engines.values():
        engine.shares_prefill = False  # some questions are equal and would share a prefill
    cases: dict[str, Callable[[], object]] = {
        "one by one": lambda: engines[1].generate(requests[: args.single]),
        f"batches of {args.batch_size}": lambda: engines[args.batch_size].generate(requests[: args.single]),
    }
    overheads: list[float] = []

    def add_overhead() -> None:
        overheads.append(_overhead(model, tokenizer, tasks, sampling, args.batch_size))

    runs = {name: (nothing, run) for name, run in {**cases, "overhead": add_overhead}.items()}
    timings = interleaved(runs, args.repeat)
    single, batched = (timings[name].median_s for name in cases)
    overhead = statistics.median(overheads[1:])
    for name in cases:
        median = 1e3 * timings[name].median_s
        print(f"{name:<26} {median:8.1f} ms for {args.single} prompts of {args.tokens} new tokens")
    print(f"{'ratio':<26} {single / batched:8.2f} x")
    print(f"{'overhead of a run':<26} {100 * overhead:8.2f} % of its generation")
    shape = {"prompts": args.single, "new_tokens": args.tokens, "batch_size": args.batch_size}
    results: dict[str, Any] = {name: {"seconds": timings[name].seconds, **shape} for name in cases}
    results[f"batches of {args.batch_size}"]["overhead_share"] = overhead
    return results


def _overhead(model: Any, tokenizer: Any, tasks: Any, sampling: SamplingConfig, batch_size: int) -> float:
    """Runs a sampling pipeline. Returns the time outside generation divided by the time of generation."""
    engine = TimedEngine(model, tokenizer, batch_size=batch_size)
    pipeline = DropoutNTP(DropoutNTPConfig(sampling=sampling, allow_truncated=True, matcher={"kind": "number"}))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "items.jsonl")
        lines = ({"question": t.question, "chosen": t.response, "answer_gt": str(t.answer)} for t in tasks)
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        begin = time.perf_counter()
        run(pipeline, engine, source, Path(folder, "out"), block_size=batch_size)
        return (time.perf_counter() - begin) / engine.seconds - 1


def _shared_prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Compares two ways to sample: one shared prefill per question, and one prefill per sample. Prints the result.

    Returns a dict from the name of a case to its seconds and sizes.
    """
    sizes = Sizes(vocab=4096, hidden=args.hidden, layers=args.layers, images=args.images, vision_hidden=256)
    model, processor = build(sizes)
    processor.tokenizer.eos_token = None  # all responses have the same length
    engines = {}
    for name in (APART, SHARED):
        engines[name] = TransformersEngine(model, processor, batch_size=max(1, args.samples))
        engines[name].shares_prefill = name == SHARED
    requests = _samples(engines[SHARED], sizes, args)
    responses: dict[str, Any] = {}

    def answer(name: str) -> None:
        responses[name] = engines[name].generate(requests)

    timings = interleaved({name: (nothing, functools.partial(answer, name)) for name in engines}, args.repeat)
    n_equal = sum(map(operator.eq, responses[APART], responses[SHARED]))
    for name in engines:
        print(f"{name:<26} {timings[name].median_s:8.2f} s for {args.samples} samples of {args.tokens} new tokens")
    ratio = timings[APART].median_s / timings[SHARED].median_s
    print(f"{'ratio':<26} {ratio:8.2f} x with a prompt of {args.prompt} tokens and {args.images} images")
    print(f"{'equal samples':<26} {n_equal:8d} of {args.samples}")
    shape = {"prompts": 1, "samples": args.samples, "prompt_tokens": args.prompt, "images": args.images}
    shape |= {"new_tokens": args.tokens, "batch_size": args.samples, "hidden": args.hidden, "layers": args.layers}
    return {name: {"seconds": timings[name].seconds, **shape} for name in engines}


def _samples(engine: TransformersEngine, sizes: Sizes, args: argparse.Namespace) -> list[Request]:
    """Returns ``args.samples`` requests with the same question and different seeds.

    The question has images and random words. Its prompt has ``args.prompt`` tokens.
    """
    rng = np.random.default_rng(0)
    shape = (sizes.images, sizes.pixels, sizes.pixels, 3)
    images = tuple(Image.fromarray(pixels) for pixels in rng.integers(256, size=shape, dtype=np.uint8))
    words = sorted(digits.vocabulary())
    bare = Request(question="<image>" * sizes.images + " ", images=images)
    text = engine.chat.prompt_text(bare)
    used = len(engine.processor(text=[text], images=[list(images)] if images else None)["input_ids"][0])
    if used > args.prompt:
        raise ValueError(f"prompt must be at least {used}, the tokens without a word, got {args.prompt}")
    question = bare.question + " ".join(rng.choice(words, args.prompt - used))
    sampling = SamplingConfig(temperature=1.0, top_k=0, max_new_tokens=args.tokens)
    return [Request(question=question, images=images, seed=seed, sampling=sampling) for seed in range(args.samples)]


if __name__ == "__main__":
    main()
