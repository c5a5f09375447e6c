"""Compares the pipelines that make preference pairs, on the digits task: ``python -m benchmarks.pipelines``.

Three quantities are measured for each pipeline: generated tokens per pair, pairs per second, and the share of pairs
whose label is wrong. The truth is known, so the errors of each response can be counted: digits that are read wrongly,
and a wrong final answer. A label is wrong if the chosen response has more errors than the rejected one.

One model does all tasks: it answers step by step, lists the claims of an answer, turns claims into questions, and
answers these questions with yes or no. A copy that is trained longer serves as a better judge.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import now, provenance
from mpo_ext.answers import extract_answer
from mpo_ext.data import Pair, read_pairs
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor, build_model, build_processor
from mpo_ext.generate.choices import fill
from mpo_ext.generate.claims import CLAIMS_PROMPT, QUESTIONS_PROMPT, VERDICT_PROMPT
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.rlaif_v import RlaifV, RlaifVConfig
from mpo_ext.generate.routing import RoutedEngine
from mpo_ext.generate.runner import run
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.report import markdown_table

PAPER_SHARE = 571.2 / 992.7  # tokens per pair of DropoutNTP divided by those of RLAIF-V, in arXiv 2411.10442
STYLE = digits.STYLES["cot"]
#: Shares of the kinds of training examples.
MIX = {"answer": 0.35, "claims": 0.1, "questions": 0.1, "verdict": 0.45}
_STEP = re.compile(rf"({'|'.join(digits.CELLS)}) (\d+) ")
_UNREADABLE = 99  # number of errors of a response without a readable answer
_BATCH = 256


def claims_of(response: str, region: str) -> list[str]:
    """Returns the claims of a step-by-step response about a region: the digits that it reads, and its answer."""
    claims = [f"the {cell} digit is {value}" for cell, value in _STEP.findall(response)]
    answer = extract_answer(response, STYLE)
    return [*claims, *([f"the sum of the {region} is {answer}"] if answer is not None else [])]


def question_of(claim: str) -> str:
    subject, _, value = claim.rpartition(" is ")
    return f"is {subject} {value} ?"


def count_errors(response: str, task: digits.Task) -> int:
    """Returns the number of wrong digits and answers in a response to a task."""
    answer = extract_answer(response, STYLE)
    if answer is None:
        return _UNREADABLE
    truth = dict(zip(digits.CELLS, task.values, strict=True))
    return sum(int(value) != truth[cell] for cell, value in _STEP.findall(response)) + (int(answer) != task.answer)


def make_example(kind: str, task: digits.Task, rng: np.random.Generator) -> tuple[str, str, bool]:
    """Returns the prompt, the response and whether the prompt has the image, for a training example of a kind."""
    if kind == "answer":
        return task.question, task.response, True
    stated = dataclasses.replace(task, values=tuple(map(int, rng.integers(10, size=4))))  # gives a wrong response
    claims = claims_of(stated.response, task.region)
    listed = "\n".join(f"- {claim}" for claim in claims)
    if kind == "claims":
        return fill(CLAIMS_PROMPT, question=task.question, answer=stated.response), listed, False
    if kind == "questions":
        questions = "\n".join(f"- {question_of(claim)}" for claim in claims)
        return fill(QUESTIONS_PROMPT, claims=listed), questions, False
    claim = str(rng.choice(claims_of(task.response, task.region)))
    is_true = rng.random() < 0.5
    if not is_true:
        subject, _, value = claim.rpartition(" is ")
        others = [number for number in range(10 if "digit" in subject else 37) if number != int(value)]
        weights = np.array([1 / abs(number - int(value)) for number in others])
        claim = f"{subject} is {rng.choice(others, p=weights / weights.sum())}"
    return fill(VERDICT_PROMPT, question=question_of(claim)), "yes" if is_true else "no", True


def make_processor() -> Any:
    """Returns the demo's processor, whose tokenizer also knows the words of the prompts, and the line break."""
    processor = build_processor()
    rng = np.random.default_rng(0)
    tasks = digits.sample_tasks(digits.load_digits()["train"], 64, rng, "cot")
    texts = [" ".join(make_example(kind, task, rng)[:2]) for kind in MIX for task in tasks]
    words = dict.fromkeys(word for text in texts for word in text.split(" ") for word in word.split("\n"))
    backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    for word in ("\n", *filter(None, words)):
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    lines = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split(Regex(" +"), "removed")])
    names = ("user_token", "assistant_token", "context_image_token", "start_image_token", "end_image_token")
    special = {name: getattr(processor.tokenizer, name) for name in ("pad_token", "eos_token", "unk_token")}
    extra = {name: getattr(processor.tokenizer, name) for name in (*names, "video_token")}
    template = processor.tokenizer.chat_template
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=extra, chat_template=template, **special
    )
    return DigitsProcessor(processor.image_processor, fast, chat_template=processor.chat_template)


def pixels_of(processor: Any, images: torch.Tensor) -> torch.Tensor:
    """Returns ``[B, 3, H, W]`` inputs of the vision tower for images ``[B, 1, H, W]`` in [0, 1]."""
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    return ((images - mean) / std).expand(-1, 3, -1, -1)


def teach_reading(model: Any, processor: Any, steps: int, rng: np.random.Generator) -> float:
    """Trains the vision tower and the projector to tell the digits apart, and returns the final accuracy.

    A linear layer, which is discarded afterwards, reads each digit from its image token. A model without this stage
    needs many more steps on text.
    """
    split = digits.load_digits()["train"]
    head = torch.nn.Linear(model.config.text_config.hidden_size, 10)
    parameters = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=3e-3)
    accuracy = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        picked = rng.integers(len(split.values), size=(128, len(digits.CELLS)))
        images = torch.stack([digits.grid_image(split.images[row]) for row in picked])
        logits = head(model.get_image_features(pixel_values=pixels_of(processor, images)).pooler_output)
        values = torch.from_numpy(split.values[picked]).long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracy = float((logits.argmax(-1) == values).float().mean())
    return accuracy


def encode(processor: Any, prompt: str, response: str, *, has_image: bool) -> tuple[list[int], int]:
    """Returns the token ids of a conversation, and the number of its prompt tokens."""
    tokenizer = processor.tokenizer
    message = [{"type": "image"}] * has_image + [{"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    image = (
        tokenizer.start_image_token + processor.image_token * processor.image_seq_length + tokenizer.end_image_token
    )
    ids = tokenizer.encode(text.replace(processor.image_token, image), add_special_tokens=False)
    return [*ids, *tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id], len(ids)


def check_encoding(engine: TransformersEngine, task: digits.Task) -> None:
    """Raises ValueError if the token ids in training differ from the token ids in sampling."""
    request = Request(question=task.question, images=(task.picture,))
    inputs = engine.processor(text=[engine.chat.prompt_text(request)], images=[[task.picture]])
    expected = [*inputs["input_ids"][0], *engine.chat.response_ids(request, task.response)]
    ids, _ = encode(engine.processor, task.question, task.response, has_image=True)
    if ids != expected:
        raise ValueError(f"ids must be those of the engine, {expected}, got {ids}")


def train_model(model: Any, processor: Any, steps: int, args: argparse.Namespace, seed: int) -> None:
    """Trains a model on a mixture of examples for a number of steps."""
    rng = np.random.default_rng(seed)
    split = digits.load_digits()["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = args.rate * min((step + 1) / 10, 1 - step / steps)
        rows, labels, images = [], [], []
        for task in digits.sample_tasks(split, args.batch, rng, "cot"):
            prompt, response, has_image = make_example(str(rng.choice(list(MIX), p=list(MIX.values()))), task, rng)
            ids, n_prompt = encode(processor, prompt, response, has_image=has_image)
            rows.append(torch.tensor(ids))
            labels.append(torch.tensor([-100] * n_prompt + ids[n_prompt:]))
            images += [task.image] * has_image
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        inputs = {"input_ids": pad(rows, padding_value=processor.tokenizer.pad_token_id)}
        inputs |= {"attention_mask": pad([torch.ones_like(row) for row in rows])}
        if images:
            inputs["pixel_values"] = pixels_of(processor, torch.stack(images))
        loss = model(**inputs, labels=pad(labels, padding_value=-100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def verdict_accuracy(engine: TransformersEngine, count: int) -> dict[str, float]:
    """Returns the share of right verdicts about claims on validation digits, and the accuracy of the answers."""
    rng = np.random.default_rng(1)
    tasks = digits.sample_tasks(digits.load_digits()["validation"], count, rng, "cot")
    examples = [make_example("verdict", task, rng) for task in tasks]
    prompts = [prompt for prompt, _, _ in examples]
    verdicts = _greedy(engine, prompts, tasks, 1)
    right = [verdict.strip() == truth for verdict, (_, truth, _) in zip(verdicts, examples, strict=True)]
    answers = _greedy(engine, [task.question for task in tasks], tasks, 40)
    errors = [count_errors(answer, task) for answer, task in zip(answers, tasks, strict=True)]
    return {"verdicts": float(np.mean(right)), "answers": float(np.mean([not error for error in errors]))}


def _greedy(
    engine: TransformersEngine, prompts: Sequence[str], tasks: Sequence[digits.Task], tokens: int
) -> list[str]:
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=tokens)
    requests = [
        Request(question=prompt, images=(task.picture,), sampling=sampling)
        for prompt, task in zip(prompts, tasks, strict=True)
    ]
    return [generation.text for generation in engine.generate(requests)]


def write_questions(folder: Path, tasks: Sequence[digits.Task]) -> None:
    """Writes the questions with answers to ``answered.jsonl``, and the questions alone to ``open.jsonl``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "answered.jsonl", "w") as answered, open(folder / "open.jsonl", "w") as without:
        for number, task in enumerate(tasks):
            image = f"images/{number:05d}.png"
            task.picture.save(folder / image)  # type: ignore[union-attr]
            item = {"image": image, "question": task.question, "number": number}
            without.write(json.dumps(item) + "\n")
            answered.write(json.dumps({**item, "answer_gt": str(task.answer)}) + "\n")


def made_pairs(out: Path) -> Iterator[Pair]:
    for name in ("pairs.jsonl", "format_pairs.jsonl"):
        if (out / name).exists():
            yield from read_pairs(out / name)


def measure(pipeline: Any, engine: Any, source: Path, out: Path, tasks: Sequence[digits.Task]) -> dict[str, Any]:
    """Runs a pipeline, and returns its numbers."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    summary = run(pipeline, engine, source, out, image_root=str(source.parent), block_size=2048)
    seconds = time.perf_counter() - begin
    assert summary is not None
    errors = []
    for pair in made_pairs(out):
        task = tasks[pair.extra["number"]]
        errors.append((count_errors(pair.chosen, task), count_errors(pair.rejected, task)))
    n_pairs = max(1, len(errors))
    return {
        "pairs": len(errors),
        "seconds": seconds,
        "tokens_per_pair": summary.generated_tokens / n_pairs,
        "tokens_by_stage": {stage: count / n_pairs for stage, count in summary.stage_tokens.items()},
        "right": sum(chosen < rejected for chosen, rejected in errors) / n_pairs,
        "equal": sum(chosen == rejected for chosen, rejected in errors) / n_pairs,
        "wrong": sum(chosen > rejected for chosen, rejected in errors) / n_pairs,
        "chosen_correct": sum(chosen == 0 for chosen, _ in errors) / n_pairs,
        "summary": summary.to_dict(),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    header = ["pipeline", "pairs", "tokens per pair", "pairs per second"]
    header += ["label right", "errors equal", "label wrong", "chosen without error"]
    rows = [
        [
            name, str(row["pairs"]), f"{row['tokens_per_pair']:.1f}", f"{row['pairs'] / row['seconds']:.2f}",
            *(f"{100 * row[key]:.1f} %" for key in ("right", "equal", "wrong", "chosen_correct")),
        ]
        for name, row in results.items()
    ]  # fmt: skip
    return markdown_table(header, rows)


def main() -> None:
    """Trains the models, runs the pipelines, prints a table and writes ``results.json``."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/pipelines"), help="folder of all files")
    parser.add_argument("--hidden", type=int, default=96, help="hidden size of the language model")
    parser.add_argument("--layers", type=int, default=2, help="layers of the language model")
    parser.add_argument("--reading-steps", type=int, default=200, help="steps in which the vision tower learns digits")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the model that answers")
    parser.add_argument("--judge-steps", type=int, default=100, help="further steps of the better judge")
    parser.add_argument("--batch", type=int, default=64, help="examples per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--questions", type=int, default=100, help="questions for each pipeline")
    parser.add_argument("--samples", type=int, default=8, help="responses per question of Correctness and RLAIF-V")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = now()
    processor = make_processor()
    model = build_model(processor.tokenizer, hidden_size=args.hidden, layers=args.layers)
    engine = TransformersEngine(model, processor, name="digits", batch_size=_BATCH)
    check_encoding(engine, digits.sample_tasks(digits.load_digits()["train"], 1, np.random.default_rng(0), "cot")[0])
    reading = teach_reading(model, processor, args.reading_steps, np.random.default_rng(args.seed))
    print(f"the vision tower reads {100 * reading:.1f} % of the digits of the last batch", flush=True)
    train_model(model, processor, args.steps, args, args.seed)
    judge = copy.deepcopy(model)
    train_model(judge, processor, args.judge_steps, args, args.seed + 1)
    judge_engine = TransformersEngine(judge, processor, name="digits, trained longer", batch_size=_BATCH)
    accuracy = {"model": verdict_accuracy(engine, 500), "better judge": verdict_accuracy(judge_engine, 500)}
    print(accuracy, flush=True)

    rng = np.random.default_rng(args.seed + 2)
    tasks = digits.sample_tasks(digits.load_digits()["train"], args.questions, rng, "cot")
    write_questions(args.out, tasks)
    common: dict[str, Any] = {"seed": args.seed}
    common["sampling"] = SamplingConfig(temperature=args.temperature, top_k=0, max_new_tokens=40)
    scored = {"style": STYLE, "matcher": digits.MATCHER}
    rewriting = SamplingConfig(temperature=0.0, max_new_tokens=128)
    checked = RlaifV(RlaifVConfig(samples=args.samples, rewriting=rewriting, **common))
    limit = {"samples": args.samples, "pairs_per_question": 2}
    runs: dict[str, tuple[Any, Any, str]] = {
        "Correctness": (Correctness(CorrectnessConfig(**limit, **common, **scored)), engine, "answered"),
        "DropoutNTP": (DropoutNTP(DropoutNTPConfig(sample_chosen=True, **common, **scored)), engine, "open"),
        "RLAIF-V": (checked, engine, "open"),
        "RLAIF-V, better judge": (checked, RoutedEngine(engine, judge_engine), "open"),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, (pipeline, made_with, source) in runs.items():
        out = args.out / name.lower().replace(", ", "-").replace(" ", "-")
        results[name] = measure(pipeline, made_with, args.out / f"{source}.jsonl", out, tasks)
        print(name, json.dumps({key: value for key, value in results[name].items() if key != "summary"}), flush=True)
    share = results["DropoutNTP"]["tokens_per_pair"] / results["RLAIF-V"]["tokens_per_pair"]
    print(table(results))
    print(f"tokens per pair of DropoutNTP: {100 * share:.1f} % of RLAIF-V's, {100 * PAPER_SHARE:.1f} % in the paper")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    document = {"environment": provenance("python -m benchmarks.pipelines", *start), "settings": settings}
    document |= {"accuracy": accuracy, "results": results}
    (args.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
