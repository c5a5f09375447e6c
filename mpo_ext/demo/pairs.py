"""Preference pairs from the model's own samples: right with wrong answers, and DropoutNTP continuations."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from mpo_ext.demo import digits
from mpo_ext.demo.model import generate
from mpo_ext.demo.settings import Settings

KEEP_RATIO = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A question with a response to prefer and one to avoid, as token ids without the end token.

    Attributes:
        task: The question, with its image.
        chosen: The response to prefer. Its answer is right.
        rejected: The response to avoid. Its answer is wrong or cannot be read.
        source: "correctness" (wrong answer), "format" (no readable answer) or "dropout_ntp".
        cut: Number of tokens of ``chosen`` that DropoutNTP kept, 0 for the other sources.
    """

    task: digits.Task
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    source: str
    cut: int = 0


def correctness_pairs(
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[digits.Task],
    samples: Sequence[Sequence[Sequence[int]]],
    rng: np.random.Generator,
    *,
    pairs_per_question: int,
) -> list[Pair]:
    """Pairs right samples with wrong and with unreadable ones. A question without both gives none.

    Args:
        tokenizer: Turns the samples into text.
        tasks: The questions.
        samples: For each question its samples, as token ids.
        rng: Picks among the possible pairs.
        pairs_per_question: Most pairs that one question gives.
    """
    pairs: list[Pair] = []
    for task, responses in zip(tasks, samples, strict=True):
        right, bad = [], []
        for response in map(tuple, responses):
            answer = digits.parse_answer(tokenizer.decode(response), task.form)
            if answer == task.answer:
                right.append(response)
            else:
                bad.append((response, "format" if answer is None else "correctness"))
        # Picked before doubles are dropped: what the model says often should be met often.
        candidates = [Pair(task, chosen, rejected, source) for chosen in right for rejected, source in bad]
        picked = [candidates[index] for index in rng.permutation(len(candidates))[:pairs_per_question]]
        pairs += {(pair.chosen, pair.rejected): pair for pair in picked}.values()
    return pairs


def prefix_length(chosen: Sequence[int], keep_ratio: float = KEEP_RATIO) -> int:
    """How many tokens of a chosen response DropoutNTP keeps."""
    return int(len(chosen) * keep_ratio)


def dropout_ntp_pairs(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[digits.Task],
    chosen: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Pair]:
    """Cuts each chosen response in half and lets the model finish it without the image.

    A continuation makes no pair where it is empty, where it repeats the chosen response, or where its answer is right
    all the same. A response too short to keep a token of makes none either.

    Args:
        model: Continues the responses.
        tokenizer: Of the model.
        tasks: The questions.
        chosen: Their right responses, as token ids.
        temperature: Of the continuation.
        on_batch: Called with the number of rows of each finished batch.
    """
    kept = [index for index, response in enumerate(chosen) if prefix_length(response) > 0]
    on_batch(len(chosen) - len(kept))
    tasks = [tasks[index] for index in kept]
    chosen = [tuple(chosen[index]) for index in kept]
    prefixes = [response[: prefix_length(response)] for response in chosen]
    blind = [digits.without_image(task) for task in tasks]
    continued = generate(model, tokenizer, blind, prefixes=prefixes, temperature=temperature, on_batch=on_batch)
    pairs = []
    for task, preferred, prefix, response in zip(tasks, chosen, prefixes, continued, strict=True):
        pair = Pair(task, tuple(preferred), tuple(response), "dropout_ntp", cut=len(prefix))
        if is_dropout_ntp_pair(tokenizer, pair):
            pairs.append(pair)
    return pairs


def is_dropout_ntp_pair(tokenizer: PreTrainedTokenizerFast, pair: Pair) -> bool:
    """Says whether a continuation is a negative: not empty, not the chosen response, and not right after all."""
    if len(pair.rejected) == pair.cut or pair.rejected == pair.chosen:
        return False
    return digits.parse_answer(tokenizer.decode(pair.rejected), pair.task.form) != pair.task.answer


def make_pairs(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    rng: np.random.Generator,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Pair]:
    """Lets the model answer fresh questions about training grids and makes pairs of both kinds from its answers.

    Args:
        model: The SFT model.
        tokenizer: Of the model.
        settings: How much of each.
        rng: Source of questions and choices; the sampling itself follows torch's generator.
        on_batch: Called with the number of responses of each finished batch, ``most_responses`` in all at most.
    """
    pairs = []
    for form in digits.FORMS:
        tasks = digits.sample_tasks(digits.load_digits()["train"], settings.questions, rng, form)
        repeated = [task for task in tasks for _ in range(settings.samples)]
        flat = generate(model, tokenizer, repeated, temperature=settings.temperature, on_batch=on_batch)
        samples = [flat[start : start + settings.samples] for start in range(0, len(flat), settings.samples)]
        correctness = correctness_pairs(tokenizer, tasks, samples, rng, pairs_per_question=settings.pairs_per_question)
        if form == "direct":
            pairs += correctness[: settings.direct_pairs]
            continue
        pairs += correctness
        right = [
            (task, response)
            for task, response in zip(repeated, flat, strict=True)
            if digits.parse_answer(tokenizer.decode(response), form) == task.answer
        ]
        picked = [right[index] for index in rng.permutation(len(right))[: settings.dropout_ntp_pairs]]
        blind_tasks, chosen = [task for task, _ in picked], [response for _, response in picked]
        pairs += dropout_ntp_pairs(
            model, tokenizer, blind_tasks, chosen, temperature=settings.temperature, on_batch=on_batch
        )
    return pairs


def most_responses(settings: Settings) -> int:
    """How many responses ``make_pairs`` asks of the model, at most."""
    return len(digits.FORMS) * settings.questions * settings.samples + settings.dropout_ntp_pairs
