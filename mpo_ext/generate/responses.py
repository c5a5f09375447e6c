"""Filters sampled responses, and chooses pairs of responses by their scores."""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from mpo_ext.generate.items import Item
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.repetition import is_degenerate


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


Response = TypeVar("Response", bound=_HasText)


@dataclasses.dataclass(frozen=True, slots=True)
class RatedResponse:
    """A response and its score. Better responses have higher scores.

    Attributes:
        text: The response.
        score: The score.
        record: JSON object of the response, as stored on disk.
    """

    text: str
    score: float
    record: Mapping[str, Any]


def skip_reason(record: Mapping[str, Any], *, allow_truncated: bool, allow_degenerate: bool) -> str | None:
    """Returns the reason to skip a sampled response, or None if it can be used.

    ``record`` is the JSON object in which the response is stored.
    """
    if record["finish"] == "length" and not allow_truncated:
        return "sample cut off at max_new_tokens"
    if not record["text"].strip():
        return "sample is empty"
    if not allow_degenerate and is_degenerate(record["text"]):
        return "sample repeats itself"
    return None


def normalized(text: str) -> str:
    """Strips a text and replaces each run of white space by one space, so that responses can be compared."""
    return " ".join(text.split())


def distinct(samples: Sequence[Response], result: ItemResult) -> list[Response]:
    """Returns the first of each group of equal responses. Adds the number of duplicates to ``result.skipped``.

    White space has no effect on the comparison.
    """
    first_by_text: dict[str, Response] = {}
    for sample in samples:
        first_by_text.setdefault(normalized(sample.text), sample)
    if len(first_by_text) < len(samples):
        result.skipped["sample is a duplicate"] += len(samples) - len(first_by_text)
    return list(first_by_text.values())


def choice_hash(seed: int, item: Item, *texts: str) -> bytes:
    """Returns a hash of the seed, the item and the texts.

    Pipelines use the hash to choose samples or pairs of an item. So the choice does not depend on the order of items
    or samples.
    """
    parts = (seed, item.digest, *texts)
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).digest()


def pairs_by_score(
    item: Item,
    responses: Sequence[RatedResponse],
    result: ItemResult,
    *,
    min_gap: float,
    max_shorter: float,
    limit: int,
    seed: int,
) -> list[tuple[RatedResponse, RatedResponse]]:
    """Returns (chosen, rejected) pairs of responses, where ``chosen`` has the higher score.

    If there are more than ``limit`` pairs, a hash selects them.

    Args:
        item: The question.
        responses: The responses, which must be distinct.
        result: Result of the item. Its ``notes`` count the pairs that violate ``min_gap`` or ``max_shorter``.
        min_gap: Minimum difference between the two scores.
        max_shorter: Limit for shorter chosen responses. A chosen response must have at least ``1 - max_shorter`` times
            as many words as the rejected response. 1: no limit.
        limit: Maximum number of pairs; 0: no limit.
        seed: Seed of the hash.
    """
    notes: collections.Counter[str] = collections.Counter()
    pairs = []
    for responses_of_pair in itertools.combinations(responses, 2):
        rejected, chosen = sorted(responses_of_pair, key=lambda response: response.score)
        n_chosen, n_rejected = len(chosen.text.split()), len(rejected.text.split())
        if chosen.score - rejected.score < max(min_gap, 1e-9):
            notes["possible pairs left out: scores are too similar"] += 1
        elif n_rejected - n_chosen > max_shorter * n_rejected:
            notes["possible pairs left out: chosen response is much shorter"] += 1
        else:
            pairs.append((chosen, rejected))
    result.notes.update(notes)
    pairs.sort(key=lambda pair: choice_hash(seed, item, pair[0].text, pair[1].text))
    return pairs[: limit or None]
