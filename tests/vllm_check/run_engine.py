"""Answers requests and runs pipelines with an engine. Tests start this script as a separate process.

The separate process is needed because vLLM can start only once in a process.

Usage: ``python run_engine.py ENGINE MODEL ITEMS OUT OPTIONS``. ENGINE is "vllm" or "openai", and OPTIONS is JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Engine, Request, SamplingConfig
from mpo_ext.generate.runner import run
from mpo_ext.generate.transformers_engine import TransformersEngine

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
DRAWN = SamplingConfig(temperature=1.0, top_k=50, max_new_tokens=12)
#: vLLM's options for a CPU. Seeded requests whose prompt is computed in parts end vLLM on CPUs, hence the last one.
VLLM = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_batched_tokens": 65536}
ANSWERS = {"matcher": {"kind": "exact"}, "style": "regex:([a-z])", "allow_truncated": True}
#: Pipelines by the name of their output folder.
PIPELINES: dict[str, Any] = {
    "dropout_ntp": DropoutNTP(DropoutNTPConfig(sampling=GREEDY, **ANSWERS)),
    "dropout_ntp_with_image": DropoutNTP(DropoutNTPConfig(sampling=GREEDY, with_image=True, **ANSWERS)),
    "correctness": Correctness(CorrectnessConfig(samples=2, sampling=GREEDY, **ANSWERS)),
    "drawn": Correctness(CorrectnessConfig(samples=8, sampling=DRAWN, **ANSWERS)),
}
N_ITEMS = 60  # number of items of the pipelines


def requests_of(items: Path) -> list[Request]:
    """Returns requests for greedy sampling. Their prefixes have 0 to 4 tokens.

    The prompt of the last request is longer than the model's context.
    """
    requests = []
    for number, line in enumerate(map(json.loads, items.read_text().splitlines())):
        images = tuple(str(items.parent / name) for name in line.get("images", ()))
        prefix = tuple(range(66, 66 + number % 5))
        requests.append(
            Request(key=str(number), question=line["question"], images=images, prefix_ids=prefix, sampling=GREEDY)
        )
    return [*requests, Request(key="long", question="long " * 300, sampling=GREEDY)]


def conversations_of(items: Path) -> list[Request]:
    """Returns requests for greedy sampling. Each request has several turns. Some requests have a system prompt.

    Requests about images have images in two turns. Of the other requests, some have tools, and some have tool calls.
    """
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "It is red."}
    tool = {"type": "function", "function": {"name": "age", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "age", "arguments": {"of": "Z\u00fcrich", "n": 2}}}
    called = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "7 years"}]
    has_images, requests = items.stem == "image", []
    for number in range(12):
        question, last = (f"{word} {number}?" for word in ("What", "Why"))
        if has_images:
            question, last = f"<image>\n{question}", f"<image>\n{last}"
        middle = [answer] if has_images or number % 2 else [*called, answer]
        turns = [{"role": "user", "content": question}, *middle, {"role": "user", "content": last}]
        requests.append(
            Request(
                key=f"conversation {number}",
                messages=(system, *turns) if number % 3 else tuple(turns),
                tools=() if has_images or number % 4 else (tool,),
                images=tuple(str(items.parent / f"1-{place}.png") for place in range(2)) if has_images else (),
                prefix_ids=tuple(range(66, 66 + number % 3)),
                sampling=GREEDY,
            )
        )
    return requests


def run_all(engine: Engine, items: Path, out: Path) -> None:
    """Runs the requests and the pipelines, and writes all results into the folder ``out``.

    TransformersEngine skips the request that is too long, and the pipeline "drawn".
    """
    out.mkdir(parents=True, exist_ok=True)
    # TransformersEngine has no context limit, and its random samples differ from vLLM's.
    is_ours = isinstance(engine, TransformersEngine)
    generations = engine.generate(requests_of(items)[: -1 if is_ours else None])
    lines = [[list(made.token_ids), made.text, made.finish_reason, made.refusal] for made in generations]
    (out / "generations.json").write_text(json.dumps(lines))
    turns = engine.generate(conversations_of(items))
    lines = [[list(made.token_ids), made.text, made.finish_reason, made.refusal] for made in turns]
    (out / "conversations.json").write_text(json.dumps(lines))
    for name, pipeline in PIPELINES.items():
        if name != "drawn" or not is_ours:
            run(pipeline, engine, items, out / name, image_root=str(items.parent), limit=N_ITEMS)


def main() -> None:
    """Runs vLLM in this process, or sends the requests to a server."""
    name, model, items, out, options = sys.argv[1:]
    settings = json.loads(options)
    if name == "vllm":
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        from mpo_ext.generate.vllm_engine import VLLMEngine

        engine: Any = VLLMEngine(model, **{**VLLM, "distributed_executor_backend": "uni", **settings})
    else:
        from mpo_ext.generate.openai_engine import OpenAIEngine

        engine = OpenAIEngine("served", tokenizer=model, **settings)
    run_all(engine, Path(items), Path(out))


if __name__ == "__main__":
    main()
