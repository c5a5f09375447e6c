"""The demo's two training loops, SFT and a branch on pairs, and the evaluation they share."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from mpo_ext import MPOConfig, RewardShift, mpo_loss, token_logp
from mpo_ext.data import Pair
from mpo_ext.demo import digits
from mpo_ext.demo.model import IGNORE_INDEX, DigitsProcessor, collate, logits_of
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS
from mpo_ext.demo.settings import Settings
from mpo_ext.generate.answers import extract_answer, matcher
from mpo_ext.generate.engine import Request, SamplingConfig, TransformersEngine, load_image

METHODS = {
    "SFT": MPOConfig(dpo_weight=0, bco_weight=0, ntp_weight=1),
    "DPO": MPOConfig(dpo_weight=1, bco_weight=0, ntp_weight=0),
    "MPO": MPOConfig(),
}


def train_sft(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: Settings,
    rng: np.random.Generator,
    *,
    on_step: Callable[[int, int], None] = lambda step, most: None,
) -> list[dict[str, float]]:
    """Trains on right responses to fresh questions, until validation accuracy reaches the target and the rate is zero.

    Returns:
        One entry per step: ``step``, ``loss``, and where it was looked at ``accuracy`` (step by step, on validation).
    """
    splits = digits.load_digits()
    validation = digits.sample_tasks(splits["validation"], settings.validation_tasks, np.random.default_rng(0), "cot")
    optimizer = _optimizer(model)
    curve: list[dict[str, float]] = []
    decay_left = settings.sft_decay_steps
    decaying = False
    while decay_left > 0:
        step = len(curve) + 1
        if decaying:
            decay_left -= 1
        rate = min(1.0, step / settings.warmup_steps) * (decay_left / settings.sft_decay_steps)
        tasks = digits.sample_tasks(splits["train"], settings.sft_batch, rng)
        blind = int(settings.sft_blind_share * len(tasks))
        tasks[:blind] = map(digits.without_image, tasks[:blind])
        batch = collate(
            processor,
            [task.question for task in tasks],
            [_pictures(task) for task in tasks],
            [task.response for task in tasks],
        )
        model.train()
        logp = token_logp(logits_of(model, batch), batch["labels"], shift=True, backend=settings.backend)
        loss = -logp.sum() / (batch["labels"] != IGNORE_INDEX).sum()
        _update(model, optimizer, loss, settings.sft_rate * rate)
        curve.append({"step": step, "loss": loss.item()})
        if not decaying and step % settings.sft_check_steps == 0:
            accuracy = evaluate(model, processor, validation)["cot"]["accuracy"]
            curve[-1]["accuracy"] = accuracy
            decaying = accuracy >= settings.sft_target or step >= settings.sft_most_steps
        on_step(step, step + decay_left if decaying else settings.sft_most_steps + decay_left)
    return curve


def reference_logp(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    pairs: Sequence[Pair],
    settings: Settings,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Log-probabilities of all pairs under the reference: ``[N, 2]`` float32, chosen, rejected. Needed once only."""
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(pairs), settings.branch_batch):
            part = pairs[start : start + settings.branch_batch]
            batch = _pair_batch(processor, part)
            logp = token_logp(logits_of(model, batch), batch["labels"], shift=True, backend=settings.backend)
            parts.append(logp.sum(-1).view(2, -1).T)
            on_batch(len(part))
    return torch.cat(parts)


def pair_order(count: int, settings: Settings) -> list[list[int]]:
    """Which pairs each step takes: the same for every branch. All pairs are met before one is met again."""
    rng = np.random.default_rng(settings.seed)
    needed = settings.branch_steps * settings.branch_batch
    order = np.concatenate([rng.permutation(count) for _ in range(math.ceil(needed / count))])
    return order[:needed].reshape(settings.branch_steps, settings.branch_batch).tolist()


def train_branch(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    pairs: Sequence[Pair],
    ref_logp: Tensor,
    config: MPOConfig,
    settings: Settings,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Trains the model further on the pairs with one mixture of the three terms.

    Every branch does the same work: the rejected responses go through the model even where the loss gives them no
    weight, so that the curves show what becomes of them.

    Args:
        model: The SFT model, changed in place.
        processor: Of the model.
        pairs: Length N; their images are opened where their paths say.
        ref_logp: ``[N, 2]`` from ``reference_logp``.
        config: Weights of the terms.
        settings: Steps, batch and rate.
        on_step: Called after each step.

    Returns:
        One entry per step: the terms of the loss, both rewards, both log-probabilities per token, the reward shift.
    """
    optimizer = _optimizer(model)
    reward_shift = RewardShift()
    curve = []
    for step, rows in enumerate(pair_order(len(pairs), settings), start=1):
        batch = _pair_batch(processor, [pairs[row] for row in rows])
        model.train()
        out = mpo_loss(
            logits_of(model, batch),
            batch["labels"],
            ref_logp[rows].T.flatten(),
            config=config,
            reward_shift=reward_shift,
            backend=settings.backend,
        )
        rate = (
            min(1.0, step / settings.warmup_steps) * (1 + math.cos(math.pi * (step - 1) / settings.branch_steps)) / 2
        )
        _update(model, optimizer, out.loss, settings.branch_rate * rate)
        tokens = out.tokens.view(2, -1)
        curve.append(
            {
                "step": step,
                "loss": out.loss.item(),
                "dpo_loss": out.dpo_loss.item(),
                "bco_loss": out.bco_loss.item(),
                "ntp_loss": out.ntp_loss.item(),
                "chosen_reward": out.chosen_reward.mean().item(),
                "rejected_reward": out.rejected_reward.mean().item(),
                "reward_accuracy": (out.chosen_reward > out.rejected_reward).float().mean().item(),
                "chosen_logp": (out.chosen_logp.sum() / tokens[0].sum()).item(),
                "rejected_logp": (out.rejected_logp.sum() / tokens[1].sum()).item(),
                "reward_shift": out.reward_shift.item(),
            }
        )
        on_step()
    return curve


def evaluate(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    tasks: Sequence[digits.Task],
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Answers the questions with the likeliest tokens: for each form ``accuracy``, ``unparsable`` and ``count``."""
    engine = TransformersEngine(model, processor, batch_size=BATCH_SIZE)
    is_right = matcher(**digits.MATCHER)
    greedy = SamplingConfig(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    result = {}
    for form in digits.FORMS:
        asked = [task for task in tasks if task.form == form]
        if not asked:
            continue
        requests = [Request(question=task.question, images=_pictures(task), sampling=greedy) for task in asked]
        answers: list[str | None] = []
        for start in range(0, len(requests), BATCH_SIZE):
            generations = engine.generate(requests[start : start + BATCH_SIZE])
            answers += [extract_answer(generation.text, digits.STYLES[form]) for generation in generations]
            on_batch(len(generations))
        right = [
            answer is not None and is_right(answer, str(task.answer)).correct
            for answer, task in zip(answers, asked, strict=True)
        ]
        result[form] = {
            "accuracy": sum(right) / len(asked),
            "unparsable": sum(answer is None for answer in answers) / len(asked),
            "count": len(asked),
        }
    return result


def _pictures(task: digits.Task) -> tuple[Image.Image, ...]:
    return () if task.picture is None else (task.picture,)


def _pair_batch(processor: DigitsProcessor, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Rows 0 to B-1 hold the chosen responses, rows B to 2B-1 the rejected ones."""
    images = [[load_image(image) for image in pair.images] for pair in pairs]
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(processor, [pair.question for pair in pairs] * 2, images * 2, responses)


def _optimizer(model: InternVLForConditionalGeneration) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)


def _update(
    model: InternVLForConditionalGeneration, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float
) -> None:
    """Takes one step at the given learning rate, with the gradient clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
