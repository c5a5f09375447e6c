"""Matchers for answers that are texts."""

import dataclasses
import functools
import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict, check_flag, rank
from mpo_ext.answers.normalize import fold
from mpo_ext.answers.number_text import parse_number
from mpo_ext.answers.number_words import LARGE, SMALL, TENS
from mpo_ext.answers.numbers import NumberRule
from mpo_ext.answers.readings import with_magnitude
from mpo_ext.answers.units import compare_units, parse_unit
from mpo_ext.answers.word_answers import compare_folded
from mpo_ext.answers.word_forms import MONTHS, WEEKDAYS
from mpo_ext.checks import check_number, install_hint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatcher(Matcher):
    """Compares texts exactly, but ignores spaces around them. With ``ignore_case``, ignores case, too.

    A letter with a separate accent equals the single character for it (both texts get the form NFC).

    Any other text is wrong, even "7 apples" if the truth is "7". Only a blank answer is neither right nor wrong.
    """

    kind: ClassVar[str] = "exact"
    longest: ClassVar[int | None] = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        check_flag("ignore_case", self.ignore_case)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        prediction, truth = (unicodedata.normalize("NFC", text.strip()) for text in (prediction, truth))
        if self.ignore_case:
            prediction, truth = (unicodedata.normalize("NFC", text.casefold()) for text in (prediction, truth))
        return self._verdict(prediction == truth, "text", prediction, truth)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnlsMatcher(Matcher):
    """Scores answers by DocVQA's normalized Levenshtein similarity: ``1 - distance / length of the longer text``.

    An answer is correct if its score is at least ``accept``. With ``exact_digits``, its digits must also equal the
    digits of the truth. Any other answer is wrong, except in three cases. In these cases, it is unreadable (neither
    right nor wrong):

    - It may be another form of the truth ("Total: $5" for "$5").
    - Its score is positive. With ``exact_digits``, its digits must also equal the digits of the truth.
    - It is similar to the truth and has the same digits, but differs in a part that changes the meaning, such as a
      sign, a magnitude, a unit, a month or "not" ("loss of -5 million" for "loss of 5 million"). If both texts are
      numbers, such as "-5 million" and "5 million", it is wrong.

    Attributes:
        threshold: Similarity below which the score is 0.
        accept: Minimum score of a correct answer.
        exact_digits: Whether a correct answer must have the same digits as the truth. If so, "10 May 2001" is not
            correct for "10 May 2011", although it is similar. This option does not change the score.
    """

    kind: ClassVar[str] = "anls"
    threshold: float = 0.5
    accept: float = 0.9
    exact_digits: bool = True

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, "[0, 1]")
        check_number("accept", self.accept, "(0, 1]")
        check_flag("exact_digits", self.exact_digits)
        if importlib.util.find_spec("rapidfuzz") is None:
            raise ImportError(f"the matcher 'anls' needs the package rapidfuzz: {install_hint('math')}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        prediction, truth = fold(prediction), fold(truth)
        score = anls(prediction, truth, self.threshold)
        has_equal_digits = re.findall("[0-9]+", prediction) == re.findall("[0-9]+", truth)
        same_digits = not self.exact_digits or has_equal_digits
        rule = "similarity" if same_digits else "digits"
        correct: bool | None = score >= self.accept and same_digits
        if has_equal_digits and prediction != truth:
            left, right = parse_number(prediction), parse_number(truth)
            if left and right and _ANY_NUMBERS.compare(left, right)[0] is False:
                return Verdict(False, score, f"{self.kind}:value", prediction, truth)
            if correct and _has_other_meaning(prediction, truth):
                return Verdict(None, score, f"{self.kind}:value", prediction, truth)
        if not correct and ((same_digits and score > 0) or _may_be_same(prediction, truth)):
            correct = None
        return Verdict(correct, score, f"{self.kind}:{rule}", prediction, truth)


_DIGIT = re.compile("[0-9]")
_SIGNED = re.compile(r"(?<![^\s(:=])[-(]\s?[$\u20ac\u00a3\u00a5]?\.?(?=[0-9])|[$\u20ac\u00a3\u00a5]-(?=\.?[0-9])")
_CURRENCY = re.compile("[$\u20ac\u00a3\u00a5\u20b9]")
# Words that change the meaning of a text, although the rest of the text is equal
_DECISIVE_WORDS = "left right north south east west male female increase decrease increased decreased more less fewer"
_DECISIVE_WORDS += " before after above below minimum maximum mr mrs ms am pm a.m p.m first second third"
_DECISIVE_WORDS += " hundred dozen hundreds dozens mn bn mln tn"
_DECISIVE = frozenset(
    [*_DECISIVE_WORDS.split(), *SMALL, *TENS, *LARGE, *(f"{name}s" for name in LARGE), *MONTHS, *WEEKDAYS]
)
_NEGATIONS = frozenset(("no", "not", "never", "without", "non", "cannot"))
_ENUMERATOR = re.compile(r"\b(?:[a-z]|[ivx]{2,})\b|[a-z]+(?=[0-9])|(?<=[0-9])[a-z]+")
_COMPARISON = re.compile("[<>\u2264\u2265]")
_OPPOSITES = ("un", "in", "il", "im", "ir", "dis", "non")
_YEARS = re.compile(r"(?<![0-9])([0-9]{2})([0-9]{2})\s?[-/]\s?([0-9]{2})(?![0-9])")
_RANGE = re.compile(r"(?<=[0-9])\s*(?:-|\bto\b)\s*(?=[0-9])")
_UNIT = re.compile(r"(?<=[0-9])\s*([^\W\d_]+)")
_ANY_NUMBERS = NumberRule(relative=0, absolute=0, units="any", is_rounding_wrong=True)


@functools.lru_cache(maxsize=1 << 14)
def _may_be_same(first: str, second: str) -> bool:
    """Returns whether two different texts may be forms of the same answer. Both texts are results of ``fold``."""
    if compare_folded(first, second) is not False:
        return True
    if _plain_form(first) == _plain_form(second):
        return True
    left, right = (parse_number(text) or parse_number(with_magnitude(text)) for text in (first, second))
    if left and right:
        return _ANY_NUMBERS.compare(left, right)[0] is not False
    for text, number in ((first, right), (second, left)):
        inner = parse_number(text[1:-1]) if number and text[:1] + text[-1:] == "()" else None
        if number and inner and abs(number.value) == abs(inner.value):  # "(5)" is -5 in tables of accounts
            return True
    if left is None and right is None and first.isascii() and second.isascii() and not _DIGIT.search(first + second):
        return False
    digits, other_digits = re.sub("[^0-9]", "", first), re.sub("[^0-9]", "", second)
    if digits and other_digits:  # a date, list or range in another form has the same digits
        is_comma = first.replace(",", ".") == second.replace(",", ".")
        return is_comma or (digits == other_digits and len(digits) >= 4)
    return False


def _plain_form(text: str) -> str:
    """Returns a text with other forms of ranges and raised digits: "1980-1985" for "1980 to 85", "co2" for "co₂"."""
    text = unicodedata.normalize("NFKC", _RANGE.sub("-", text))
    return _YEARS.sub(r"\1\2-\1\3", text)


def _has_other_meaning(first: str, second: str) -> bool:
    """Returns whether two similar texts differ in a part that changes the meaning.

    Such parts are signs, currencies, units, single letters ("appendix b"), letters beside digits, negations, and words
    such as "million", "june" and "decrease". A number in parentheses counts as negative, as in tables of accounts.
    Misspelled words do not count. Both texts are results of ``fold``.
    """
    if len(_SIGNED.findall(first)) != len(_SIGNED.findall(second)):
        return True
    words, other_words = (re.findall(r"[^\W\d_]+(?:\.m\b)?", text) for text in (first, second))
    if [word for word in words if word in _NEGATIONS] != [word for word in other_words if word in _NEGATIONS]:
        return True
    pairs = [sorted(pair, key=len) for pair in zip(words, other_words, strict=False) if pair[0] != pair[1]]
    if any(long.endswith(short) and long.removesuffix(short) in _OPPOSITES for short, long in pairs):
        return True
    for pattern in (_CURRENCY, _COMPARISON, _ENUMERATOR):
        parts, other_parts = pattern.findall(first), pattern.findall(second)
        if len(parts) == len(other_parts) and parts != other_parts:
            return True
    units = zip(_UNIT.findall(first), _UNIT.findall(second), strict=False)
    if any(unit != other and _are_different_units(unit, other) for unit, other in units):
        return True
    decisive, other_decisive = ([word for word in each if word in _DECISIVE] for each in (words, other_words))
    is_misspelled = len(decisive) != len(other_decisive) and len(words) == len(other_words)
    return decisive != other_decisive and not is_misspelled


def _are_different_units(first: str, second: str) -> bool:
    units = parse_unit(first), parse_unit(second)
    return all(unit is not None and unit.is_known for unit in units) and compare_units(first, second) != 1


def anls(prediction: str, truth: str, threshold: float = 0.5) -> float:
    """Returns the similarity of two texts, between 0 and 1.

    A similarity below ``threshold`` becomes 0. The similarity of two empty texts is 0.
    """
    longer = max(len(prediction), len(truth))
    if longer == 0:
        return 0.0
    if 1 - abs(len(prediction) - len(truth)) / longer < threshold:  # a bound that avoids the slow distance
        return 0.0
    from rapidfuzz.distance import Levenshtein

    similarity = 1 - Levenshtein.distance(prediction, truth) / longer
    return similarity if similarity >= threshold else 0.0


_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORD_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_NEGATED_VERBS = ["ai", "are", "did", "do", "does", "had", "has", "have", "is", "was", "were"]
_NEGATED_MODALS = ["ca", "could", "might", "must", "need", "sha", "should", "wo", "would"]
# Contractions that spell another word without the apostrophe ("were", "well", "its", "hell") are left out.
_JOINED = {
    "ve": ["could", "i", "might", "must", "should", "they", "we", "where", "who", "would", "you"],
    "re": ["how", "that", "there", "they", "what", "who", "why", "you"],
    "ll": ["how", "it", "that", "there", "they", "this", "what", "who", "why", "you"],
    "d": ["how", "it", "she", "that", "there", "they", "where", "who", "why", "you"],
    "s": ["he", "here", "how", "she", "that", "there", "what", "when", "where", "who", "why"],
    "m": ["i"],
}
_CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in _NEGATED_VERBS + _NEGATED_MODALS} | {
    f"{stem}{ending}": f"{stem}'{ending}" for ending, stems in _JOINED.items() for stem in stems
}


@functools.lru_cache(maxsize=1 << 14)
def normalize_vqa(text: str) -> str:
    """Normalizes a text as VQA's evaluation code does: case, punctuation, number words, articles, contractions.

    Unlike VQA's code, this function keeps characters that change the meaning:

    - a minus sign before a number, a decimal point, and a slash between digits
    - "<" and ">"
    - "+" or "-" after a letter ("A+", "A-")
    - an article at the end of the text ("vitamin A")
    """
    text = fold(text).replace("\u2019", "'")
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<![0-9])/|/(?![0-9])", " ", text)
    text = re.sub(r"-(?!\.?[0-9])(?!(?<=\b[a-z]-)$)|(?<=[^\W_])-(?!$)|(?<=\))-", " ", text)
    text = re.sub(r"[;\[\]\"{}()=\\_@`,?!*]|(?<![^\W_])(?<!\+)\+|\+(?=[^\s+])", " ", text)
    text = re.sub(r"\.(?![0-9])", "", text)
    words = [_WORD_DIGITS.get(word, word) for word in text.split()]
    words = [word for index, word in enumerate(words) if word not in _ARTICLES or index == len(words) - 1]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VqaMatcher(Matcher):
    """Scores answers by the VQA accuracy: ``min(n / 3, 1)`` if n of ten annotators gave the same normalized answer.

    For another number of annotators, n is scaled to ten annotators. With a single truth, the score is 0 or 1. If a
    text is empty after normalization, the original texts are compared.

    An answer with a score of at least ``accept`` is right. With a lower score, the answer is unreadable (neither right
    nor wrong) in the following cases:

    - Some annotators gave the answer.
    - The answer contains a truth ("a brown dog" for "dog"), or a truth contains the answer.
    - The answer and a truth have the same number, or the same four or more digits.
    - The answer or a truth is blank, too long to compare, or declines to answer ("n/a").

    In all other cases, an answer with a lower score is wrong.

    Attributes:
        accept: Minimum score counted as correct.
    """

    kind: ClassVar[str] = "vqa"
    accept: float = 1.0

    def __post_init__(self) -> None:
        check_number("accept", self.accept, "(0, 1]")

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Compares an answer with the answers of all annotators and returns a single verdict."""
        truths = self._check(prediction, truth)
        if (verdict := self._early_verdict(prediction, truths)) is not None:
            return verdict
        verdicts = [self._compare(prediction, text) for text in truths]
        agreeing = sum(verdict.correct is True for verdict in verdicts)
        score = min(10 * agreeing / (3 * len(truths)), 1.0)
        best = max(verdicts, key=rank)
        correct: bool | None = score >= self.accept
        if not correct and best.correct is not False:
            correct = None  # some annotators gave the answer, or may have given it
        return dataclasses.replace(best, correct=correct, score=score)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        predicted, true = normalize_vqa(prediction), normalize_vqa(truth)
        rule = "normalized"
        if not predicted or not true:
            predicted, true, rule = fold(prediction), fold(truth), "raw"
        if predicted == true:
            return self._verdict(True, rule, predicted, true)
        folded, folded_truth = fold(prediction), fold(truth)
        is_unclear = _may_be_same(folded, folded_truth)
        if not is_unclear and (folded, folded_truth) != (predicted, true):
            is_unclear = _may_be_same(predicted, true)
        return self._verdict(None if is_unclear else False, rule, predicted, true)
