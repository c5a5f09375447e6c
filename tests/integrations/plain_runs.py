"""Computes MPO in plain float64 torch on the batches of another trainer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plain
import transformers


def pairs_of_batch(rows: Sequence[Sequence[Sequence[int]]]) -> list[plain.Pair]:
    """Returns the pairs of a padded batch.

    ``rows`` is ``[input_ids, attention_mask, labels]``, with the chosen sequences before the rejected ones.
    """
    found = []
    for ids, mask, labels in zip(*rows, strict=True):
        kept = [(token, label) for token, is_kept, label in zip(ids, mask, labels, strict=True) if is_kept]
        start = next(place for place, (_, label) in enumerate(kept) if label != -100)
        tokens = tuple(token for token, _ in kept)
        end = max(place for place, (_, label) in enumerate(kept) if label != -100) + 1
        assert all(token == label for token, label in kept[start:end]), "a response has no gaps"
        found.append((tokens[:start], tokens[start:end]))
    half = len(found) // 2
    pairs = []
    for (prompt, chosen), (other, rejected) in zip(found[:half], found[half:], strict=True):
        assert prompt == other
        pairs.append(plain.Pair(prompt, chosen, rejected, None))
    return pairs


def train(model: Path, batches: Sequence[Any], **settings: Any) -> list[dict[str, float]]:
    """Trains a saved model in float64, with one step for each batch. Returns the metrics of each step."""
    policy = plain.widen(transformers.AutoModelForCausalLM.from_pretrained(model))
    steps = [[pairs_of_batch(batch)] for batch in batches]
    values: dict[str, Any] = {
        "average_over": "micro_batch", "weight_decay": 0.0, "warmup_ratio": 0.0, "schedule": "constant", **settings
    }  # fmt: skip
    return list(plain.train(policy, copy.deepcopy(policy), steps, plain.Settings(**values)))
