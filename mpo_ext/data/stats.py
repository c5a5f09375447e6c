"""Counts and lengths of preference pairs, by data set."""

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

from mpo_ext.checks import install_hint
from mpo_ext.data.messages import prompt_text
from mpo_ext.data.reader import Skipped
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.processors import check_on_hub

# Chinese, Japanese and Korean are counted by character, because spaces do not separate all of their words.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_CJK_CHARACTER = re.compile(f"[{_CJK}]")


@dataclasses.dataclass(slots=True)
class LengthStats:
    """Count, sum, minimum and maximum of the lengths of texts.

    Attributes:
        count: Number of texts.
        total: Sum of the lengths.
        least: Smallest length; 0 without texts.
        most: Largest length; 0 without texts.
    """

    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, length: int) -> None:
        self.least = min(self.least, length) if self.count else length
        self.most = max(self.most, length)
        self.count += 1
        self.total += length

    @property
    def mean(self) -> float:
        """Mean length; 0 if there are no texts."""
        return self.total / self.count if self.count else 0.0

    def to_dict(self) -> dict[str, float]:
        return {"min": self.least, "mean": round(self.mean, 2), "max": self.most}


@dataclasses.dataclass(slots=True)
class SubsetStats:
    """Statistics of the pairs in a data set.

    Attributes:
        pairs: Number of good pairs.
        skipped: Number of bad lines.
        images: Number of images; an image that several pairs use counts several times.
        videos: Number of videos; a video that several pairs use counts several times.
        text_only: Number of pairs without images and videos.
        rejected_images: Number of pairs with ``rejected_images``.
        with_answer: Number of pairs with a true answer.
        rejected_longer: Number of pairs whose rejected response is longer than the chosen response.
        question: Lengths of the prompts. A prompt of several turns is measured as one text with all turns and roles.
        chosen: Lengths of the chosen responses.
        rejected: Lengths of the rejected responses.
    """

    pairs: int = 0
    skipped: int = 0
    images: int = 0
    videos: int = 0
    text_only: int = 0
    rejected_images: int = 0
    with_answer: int = 0
    rejected_longer: int = 0
    question: LengthStats = dataclasses.field(default_factory=LengthStats)
    chosen: LengthStats = dataclasses.field(default_factory=LengthStats)
    rejected: LengthStats = dataclasses.field(default_factory=LengthStats)

    def add(self, pair: Pair, length: Callable[[str], int]) -> None:
        """Adds a pair to the statistics. ``length`` is the function that measures a text."""
        chosen, rejected = length(pair.chosen), length(pair.rejected)
        self.pairs += 1
        self.images += len(pair.images)
        self.videos += len(pair.videos)
        self.text_only += not (pair.images or pair.videos)
        self.rejected_images += bool(pair.rejected_images)
        self.with_answer += pair.answer_gt is not None
        self.rejected_longer += rejected > chosen
        self.question.add(length(prompt_text(pair)))
        self.chosen.add(chosen)
        self.rejected.add(rejected)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.to_dict() if isinstance(value, LengthStats) else value for name, value in values.items()}


def count_words(text: str) -> int:
    """Returns the number of words in a text. Each Chinese, Japanese or Korean character counts as one word."""
    if text.isascii() or _CJK_CHARACTER.search(text) is None:  # ``split`` is much faster than the regular expression
        return len(text.split())
    return sum(1 for _ in _WORD.finditer(text))


def token_counter(tokenizer: str | os.PathLike[str] | None) -> tuple[Callable[[str], int], str]:
    """Returns a function that measures the length of a text, and the name of the unit of length.

    ``tokenizer`` is the name or folder of a transformers tokenizer. The unit is then "tokens of NAME". None: the
    function counts words.

    Raises:
        ImportError: If transformers is not installed.
        FileNotFoundError: If the tokenizer is not found.
        ValueError: If the tokenizer cannot be loaded.
    """
    if tokenizer is None:
        return count_words, "words (each Chinese, Japanese or Korean character is one)"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"transformers is missing: {install_hint('train')}") from error
    check_on_hub("tokenizer", os.fspath(tokenizer))
    try:
        loaded: Any = AutoTokenizer.from_pretrained(os.fspath(tokenizer))
    except Exception as error:  # many types: missing folder, unknown hub id, broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"tokenizer must be loadable by transformers, got {tokenizer}: {reason}") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False, verbose=False)), f"tokens of {tokenizer}"


def collect_stats(
    source: PairSource, length: Callable[[str], int] = count_words, skipped: Skipped | None = None
) -> dict[str, SubsetStats]:
    """Reads every pair of a source, and returns the statistics of each data set, by name.

    A pair counts under the name of its MMPR data set. A pair without such a data set counts under the name of its file
    or dataset.

    Args:
        source: The pairs.
        length: Function that returns the length of a text.
        skipped: Collects the bad lines. None: bad lines are only counted.
    """
    stats = {name: SubsetStats() for name in source.subsets}
    for where, pair in source.scan():
        subset = stats.setdefault(where.subset, SubsetStats())
        if isinstance(pair, Pair):
            subset.add(pair, length)
        else:
            subset.skipped += 1
            if skipped is not None:
                skipped.add(pair)
    return stats
