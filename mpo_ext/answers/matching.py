"""Reads the answer out of a response and says whether it is the right one.

A matcher decides by one rule and says which. Two answers that differ are never taken for equal because one is part of
the other; what cannot be read is None, never a word. docs/answers.md lists the rules and where they come from.
"""

import abc
import atexit
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast

from mpo_ext.checks import check_number, install_hint

STYLES = ("final_answer", "boxed", "answer", "direct")
REGEX_PREFIX = "regex:"

_EMPHASIS = r"(?:\*\*|__|\*|_)"
_MARKERS = {
    "final_answer": re.compile(rf"(?<!\w)final\s+answer{_EMPHASIS}?(?:\s+is)?\s*{_EMPHASIS}?\s*[:\uff1a]", re.I),
    "answer": re.compile(rf"(?<![^\W_])answer{_EMPHASIS}?(?:\s+is)?\s*{_EMPHASIS}?\s*[:\uff1a]", re.I),
}
_CLOSED_EMPHASIS = re.compile(rf"{_EMPHASIS}(?=\s|$)")
_MATH_BLOCKS = (("\\[", "\\]"), ("$$", "$$"))
_WRAPPERS = (("**", "**"), ("*", "*"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT_COMMAND = re.compile(r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*(?=\{)")
# Full-width forms and the signs that stand for a minus, without what NFKC would do to 5 and its superscript.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0x2212: "-",
    0xFE63: "-",
    0x2010: "-",
    0x2011: "-",
    0x2012: "-",
    0x2013: "-",
}


# ---- Extraction


def extract_answer(response: str, style: str | re.Pattern[str] = "final_answer") -> str | None:
    r"""Reads the answer out of a response.

    Args:
        response: What the model wrote.
        style: How the answer was asked for. "final_answer" and "answer" take what follows the last "Final answer:" or
            "Answer:", up to the end of the line (of the next one where the line is empty); "boxed" takes the last
            ``\boxed{...}``; "direct" takes the whole response; ``regex:...``, or a compiled pattern, takes the one
            group of its last match.

    Returns:
        The answer without markdown, math delimiters and a final period, or None where there is none to read: no
        marker, a box that is missing or not closed, nothing after the marker.
    """
    if not isinstance(response, str):
        raise TypeError(f"response must be a string, got {response!r}")
    if isinstance(style, re.Pattern):
        found = _last_group(style, response)
    elif not isinstance(style, str):
        raise TypeError(f"style must be a string or a compiled pattern, got {style!r}")
    elif style.startswith(REGEX_PREFIX):
        found = _last_group(_compile(style.removeprefix(REGEX_PREFIX)), response)
    elif style == "boxed":
        found = _last_box(response)
    elif style == "direct":
        found = response
    elif style in _MARKERS:
        found = _after_marker(_MARKERS[style], response)
    else:
        raise ValueError(f"style must be one of {', '.join(STYLES)} or '{REGEX_PREFIX}...', got {style!r}")
    answer = clean_answer(found or "")
    return answer if answer.strip(".\u2026 \"'\u201d") else None  # dots alone are an echo of the instruction


def clean_answer(answer: str) -> str:
    r"""Takes off what wraps an answer: markdown, math delimiters, a box, ``\text{}``, a final period."""
    before = None
    while answer != before:
        before = answer
        answer = answer.strip()
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner.strip() and left not in inner:
                answer = inner
                break
        if answer.count("**") == 1:  # its partner stood before the marker
            answer = answer.removeprefix("**").removesuffix("**")
        command = _TEXT_COMMAND.match(answer)
        if command and _closing_brace(answer, command.end()) == len(answer) - 1:
            answer = answer[command.end() + 1 : -1]
        is_abbreviation = re.search(r"[^\W\d]\.[^\W\d]\.$", answer)
        if answer.endswith((".", "\u3002")) and not answer.endswith("..") and not is_abbreviation:
            answer = answer[:-1]
    return answer


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"style must hold a regular expression, got {pattern!r}: {error}") from None


def _last_group(pattern: re.Pattern[str], response: str) -> str | None:
    if pattern.groups != 1:
        raise ValueError(f"style must have exactly one group, got {pattern.pattern!r} with {pattern.groups}")
    matches = list(pattern.finditer(response))
    return matches[-1].group(1) if matches else None


def _closing_brace(text: str, opening: int) -> int | None:
    """Position of the brace that closes the one at ``opening``; escaped braces do not count."""
    depth = 0
    position = opening
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _last_box(response: str) -> str | None:
    boxes = list(re.finditer(r"\\boxed\s*(?=\{)", response))
    if not boxes:
        return None
    opening = boxes[-1].end()
    closing = _closing_brace(response, opening)
    return None if closing is None else response[opening + 1 : closing]


def _after_marker(marker: re.Pattern[str], response: str) -> str | None:
    markers = list(marker.finditer(response))
    if not markers:
        return None
    rest = response[markers[-1].end() :]
    closed = _CLOSED_EMPHASIS.match(rest)
    rest = rest[closed.end() :].lstrip() if closed else rest.lstrip()
    for opening, closing in _MATH_BLOCKS:
        inner, found, _ = rest.removeprefix(opening).partition(closing)
        if rest.startswith(opening) and found:
            return " ".join(inner.split())
    box = re.match(r"\\boxed\s*(?=\{)", rest)
    if box:
        end = _closing_brace(rest, box.end())
        return None if end is None else rest[box.end() + 1 : end] if not rest[end + 1 :].strip() else rest[: end + 1]
    for line in rest.splitlines():
        if line.strip("*_` \t"):
            return line
    return None


# ---- Matchers


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What a matcher says about one answer.

    Attributes:
        correct: Whether the answer counts as right.
        score: In [0, 1]; what the rule measures, 0 or 1 where it only says yes or no.
        rule: Kind of the matcher and the part of it that decided, as in "choice:letter".
        prediction: The answer in the form that was compared.
        truth: The truth that fits best, in the form that was compared.
    """

    correct: bool
    score: float
    rule: str
    prediction: str
    truth: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matcher(abc.ABC):
    """Compares answers by one rule. Subclasses hold its options and compare one pair of texts."""

    kind: ClassVar[str]

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Compares an answer with the truth, or with each of several and keeps the best verdict.

        Args:
            prediction: The answer, as ``extract_answer`` gives it. What could not be read (None) is not compared.
            truth: The true answer, or a list of answers of which each is right.
        """
        truths = self._check(prediction, truth)
        if not prediction.strip():
            return Verdict(False, 0.0, f"{self.kind}:empty", prediction, truths[0])
        verdicts = [self._compare(prediction, each) for each in truths]
        return max(verdicts, key=lambda verdict: (verdict.correct, verdict.score))

    def _check(self, prediction: str, truth: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(prediction, str):
            raise TypeError(f"prediction must be a string, got {prediction!r}")
        truths = (truth,) if isinstance(truth, str) else truth
        if not isinstance(truths, Sequence) or not all(isinstance(each, str) for each in truths):
            raise TypeError(f"truth must be a string or a list of strings, got {truth!r}")
        if not truths:
            raise ValueError(f"truth must hold at least one answer, got {truth!r}")
        return tuple(truths)

    @abc.abstractmethod
    def _compare(self, prediction: str, truth: str) -> Verdict: ...

    def _verdict(self, correct: bool, rule: str, prediction: object, truth: object) -> Verdict:
        return Verdict(correct, float(correct), f"{self.kind}:{rule}", str(prediction), str(truth))


def _check_in(name: str, value: float, low: float, high: float) -> None:
    check_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def fold(text: str) -> str:
    """Lower case, single spaces, plain forms of full-width characters and of minus signs."""
    return " ".join(text.translate(_ASCII).casefold().split())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatcher(Matcher):
    """The same text, spaces around it aside.

    Attributes:
        ignore_case: Also takes "Red" for "red".
    """

    kind: ClassVar[str] = "exact"
    ignore_case: bool = False

    def __post_init__(self) -> None:
        _check_flag("ignore_case", self.ignore_case)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        prediction, truth = prediction.strip(), truth.strip()
        if self.ignore_case:
            prediction, truth = prediction.casefold(), truth.casefold()
        return self._verdict(prediction == truth, "text", prediction, truth)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceMatcher(Matcher):
    """Multiple choice: the letter, in any of the ways it is written, or the text of the option.

    Where options are given, a letter with the text of another option ("B. Paris" where Paris is C) is no answer.

    Attributes:
        options: The texts in the order A, B, ..., or a mapping from letter to text; None where they are not known.
    """

    kind: ClassVar[str] = "choice"
    options: Sequence[str] | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.options is None:
            return
        if isinstance(self.options, str) or not isinstance(self.options, Sequence | Mapping):
            raise TypeError(f"options must be a list of texts or a mapping from letter to text, got {self.options!r}")
        label_options(self.options)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        known = {} if self.options is None else label_options(self.options)
        texts = {label: _option_text(text) for label, text in known.items()}
        predicted, predicted_text = _read_choice(prediction, texts)
        true, true_text = _read_choice(truth, texts)
        if predicted and true:
            return self._verdict(predicted == true, "letter", predicted, true)
        same = predicted_text != "" and predicted_text == true_text
        return self._verdict(same, "text", predicted or predicted_text, true or true_text)


def label_options(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Gives each option its letter: A, B, ... in order, or the keys of the mapping."""
    is_labelled = isinstance(options, Mapping)
    texts = list(options.values()) if isinstance(options, Mapping) else list(options)
    labels = list(options) if is_labelled else [chr(ord("A") + index) for index in range(len(texts))]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"options must hold strings, got {options!r}")
    if not 0 < len(labels) <= 26:
        raise ValueError(f"options must hold 1 to 26 texts, got {len(labels)}")
    for label in labels:
        if not isinstance(label, str) or not re.fullmatch("[A-Z]", label):
            raise ValueError(f"options must be labelled with single letters A to Z, got {label!r}")
    return dict(zip(labels, texts, strict=True))


_LONE_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\].:]*")
_NAMED_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Za-z])\)?", re.IGNORECASE
)
_LETTER_AND_TEXT = re.compile(r"(?:[(\[]([A-Za-z])[)\]]\s*[.:]?|([A-Za-z])\s*[).:](?=\s))\s*(.+)", re.S)


def _option_text(text: str) -> str:
    return fold(clean_answer(text.strip().strip("\"'")))


def _read_choice(answer: str, texts: Mapping[str, str]) -> tuple[str | None, str]:
    """The letter that an answer names, None where it names none, and its text.

    "A cat" has an article, not a letter: a letter stands alone, in brackets, or before a point, bracket or colon.
    """
    answer = clean_answer(answer.translate(_ASCII))
    whole = _option_text(answer)
    lone = _LONE_LETTER.fullmatch(answer) or _NAMED_LETTER.fullmatch(answer)
    if lone and (not texts or lone.group(1).upper() in texts):
        return lone.group(1).upper(), whole
    owners = [label for label, text in texts.items() if text == whole and text]
    if len(owners) == 1:
        return owners[0], whole
    both = _LETTER_AND_TEXT.fullmatch(answer)
    if both:
        label, text = (both.group(1) or both.group(2)).upper(), _option_text(both.group(3))
        owners = [owner for owner, known in texts.items() if known == text and text]
        if (not texts or label in texts) and (not owners or label in owners):
            return label, text
    return None, whole


# ---- Numbers

_DEGREES = ("\u00b0", "degree", "degrees", "deg")
_CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9"
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_TIMES_TEN = r"\s*(?:\*|x|\u00d7|\u00b7|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*"
_AMOUNT = re.compile(
    rf"({_DIGITS})(?:[eE]([+-]?[0-9]{{1,3}})|{_TIMES_TEN}(\{{)?([+-]?[0-9]{{1,3}})(?(3)\}}))?(?![0-9,.]*[0-9])"
)
_FRACTION = re.compile(r"(?:([0-9]{1,30})\s+)?([0-9]{1,30})\s*/\s*([0-9]{1,30})(?![0-9.,/])")
_TEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([+-]?[0-9]{1,30})\s*\}\s*\{\s*([0-9]{1,30})\s*\}")
_TEX_NOISE = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}")
_ANY_UNIT = re.compile(r"(?:\u00b0\s*)?[^\W\d_]+(?:[ /][^\W\d_]+)?(?:\^?[23]|[\u00b2\u00b3])?|\u00b0")
_LONGEST_NUMBER = 400


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """A number that was written out, with what stood around it: a currency, a percent sign or a unit."""

    value: Fraction
    unit: str = ""


def parse_number(text: str, *, units: Sequence[str] | Literal["any"] = ()) -> Number | None:
    r"""Reads a text that is a number and nothing else.

    Understood are signs, thousands separators ("1,234"), decimals, powers of ten ("1e-3", "2 x 10^5"), fractions
    ("3/4", "1 1/2", ``\frac{3}{4}``), a currency sign in front, and a percent sign or a unit behind.

    Args:
        text: The text.
        units: Words that may follow the number; "any" lets any one or two words follow.
    """
    text = clean_answer(text.translate(_ASCII))
    text = _TEX_NOISE.sub(r" \1", re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00ba", "\u00b0", text))
    text = " ".join(re.sub(r"\\[,;! ]", " ", text).replace("\\%", "%").replace("\\$", "$").split())
    if len(text) > _LONGEST_NUMBER:
        return None
    head = re.match(rf"([+-]?)\s*([{_CURRENCIES}]?)\s*([+-]?)\s*", text)
    assert head is not None  # every part may be empty
    if head.group(1) and head.group(3):
        return None
    sign = -1 if "-" in head.group(1) + head.group(3) else 1
    text = text[head.end() :]
    if match := _TEX_FRACTION.match(text):
        numerator, denominator = int(match.group(1)), int(match.group(2))
        value = Fraction(numerator, denominator) if denominator else None
    elif match := _FRACTION.match(text):
        whole, numerator, denominator = int(match.group(1) or 0), int(match.group(2)), int(match.group(3))
        value = whole + Fraction(numerator, denominator) if denominator else None
    elif match := _AMOUNT.match(text):
        value = Fraction(match.group(1).replace(",", "")) * Fraction(10) ** int(match.group(2) or match.group(4) or 0)
    else:
        return None
    unit = text[match.end() :].strip()
    is_known = unit in ("", "%") or (_ANY_UNIT.fullmatch(unit) if units == "any" else fold(unit) in map(fold, units))
    if value is None or not is_known or (unit and head.group(2)):
        return None
    unit = head.group(2) or fold(unit)
    return Number(sign * value, _DEGREES[0] if unit in _DEGREES else unit)


def _within(prediction: Fraction, truth: Fraction, relative: float, absolute: float) -> bool:
    return abs(prediction - truth) <= max(_as_written(absolute), _as_written(relative) * abs(truth))


def _as_written(value: float) -> Fraction:
    return Fraction(repr(float(value)))  # 0.05 is a twentieth, so 105 is within 5 % of 100


def _number_text(number: Number) -> str:
    value = number.value
    written = str(value.numerator) if value.denominator == 1 else repr(_to_float(value))
    return f"{written} {number.unit}".strip()


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NumberMatcher(Matcher):
    """Numbers up to a tolerance; the sign counts. What is no number is compared as text, case aside.

    An answer is right if ``|prediction - truth| <= max(absolute, relative * |truth|)``. Two units that are both given
    must be the same, and so must two currencies.

    Attributes:
        relative: Tolerance as a share of the truth. The authors' 1e-3 takes 2023 for 2024.
        absolute: Tolerance as it is; what counts where the truth is 0.
        percent: "ignore" drops the sign, "ratio" takes 5% for 0.05, "keep" takes it for a unit that both or neither
            must have.
        degrees: Lets a degree sign or word follow.
        units: Further units that may follow, or "any".
    """

    kind: ClassVar[str] = "number"
    relative: float = 1e-6
    absolute: float = 1e-9
    percent: Literal["ignore", "ratio", "keep"] = "ignore"
    degrees: bool = True
    units: Sequence[str] | Literal["any"] = ()

    def __post_init__(self) -> None:
        _check_in("relative", self.relative, 0, 1)
        _check_in("absolute", self.absolute, 0, sys.float_info.max)
        _check_choice("percent", self.percent, ("ignore", "ratio", "keep"))
        _check_flag("degrees", self.degrees)
        if self.units != "any" and (
            isinstance(self.units, str) or not all(isinstance(unit, str) and unit.strip() for unit in self.units)
        ):
            raise ValueError(f"units must be 'any' or a list of units, got {self.units!r}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        predicted, true = self._read(prediction), self._read(truth)
        if predicted is None or true is None:
            prediction, truth = fold(clean_answer(prediction)), fold(clean_answer(truth))
            return self._verdict(prediction == truth != "", "text", prediction, truth)
        units = {predicted.unit, true.unit}
        fits = len(units - {""}) <= 1 and units != {"", "%"}
        correct = fits and _within(predicted.value, true.value, self.relative, self.absolute)
        rule = "value" if fits else "unit"
        return self._verdict(correct, rule, _number_text(predicted), _number_text(true))

    def _read(self, text: str) -> Number | None:
        units: Sequence[str] | Literal["any"] = self.units
        if units != "any" and self.degrees:
            units = (*units, *_DEGREES)
        number = parse_number(text, units=units)
        if number is None or number.unit != "%" or self.percent == "keep":
            return number
        return Number(number.value / 100 if self.percent == "ratio" else number.value)


_YEAR = re.compile(r"[0-9]{4}")
_YEARS = range(1800, 2101)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChartMatcher(Matcher):
    """Relaxed accuracy of ChartQA: numbers within 5 % of the truth, anything else the same text, case aside.

    Attributes:
        relative: Tolerance as a share of the truth.
        absolute: Tolerance as it is; what counts where the truth is 0.
        years: "auto" wants a truth of four digits from 1800 to 2100 exactly, "exact" wants every answer exactly (what
            ChartQAPro's script does with the answers that its data marks as years), "relaxed" takes a year for a
            number like any other, as the ChartQA paper does.
    """

    kind: ClassVar[str] = "chart"
    relative: float = 0.05
    absolute: float = 0.0
    years: Literal["auto", "exact", "relaxed"] = "auto"

    def __post_init__(self) -> None:
        _check_in("relative", self.relative, 0, 1)
        _check_in("absolute", self.absolute, 0, sys.float_info.max)
        _check_choice("years", self.years, ("auto", "exact", "relaxed"))

    def _compare(self, prediction: str, truth: str) -> Verdict:
        plain_prediction, plain_truth = fold(clean_answer(prediction)), fold(clean_answer(truth))
        predicted, true = parse_number(prediction), parse_number(truth)
        if self.years == "exact" or predicted is None or true is None:
            return self._verdict(plain_prediction == plain_truth != "", "text", plain_prediction, plain_truth)
        currencies = {predicted.unit, true.unit} - {"", "%"}
        if len(currencies) > 1:
            return self._verdict(False, "unit", _number_text(predicted), _number_text(true))
        if self.years == "auto" and _YEAR.fullmatch(plain_truth) and int(plain_truth) in _YEARS:
            return self._verdict(predicted.value == true.value, "year", _number_text(predicted), plain_truth)
        correct = _within(predicted.value, true.value, self.relative, self.absolute)
        return self._verdict(correct, "value", _number_text(predicted), _number_text(true))


# ---- ANLS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnlsMatcher(Matcher):
    """Normalised Levenshtein similarity of DocVQA: ``1 - distance / length of the longer``, 0 below a threshold.

    Attributes:
        threshold: Similarities below it score 0.
        accept: Similarity from which on an answer counts as right.
        exact_digits: Also wants the same digits: "10 May 2001" is near to "10 May 2011" and still wrong. Changes what
            is correct, not the score.
    """

    kind: ClassVar[str] = "anls"
    threshold: float = 0.5
    accept: float = 0.9
    exact_digits: bool = True

    def __post_init__(self) -> None:
        _check_in("threshold", self.threshold, 0, 1)
        _check_in("accept", self.accept, 0, 1)
        _check_flag("exact_digits", self.exact_digits)
        if self.accept <= 0:
            raise ValueError(f"accept must be positive, or every answer is right, got {self.accept!r}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        prediction, truth = fold(prediction), fold(truth)
        score = anls(prediction, truth, self.threshold)
        same_digits = not self.exact_digits or re.findall("[0-9]+", prediction) == re.findall("[0-9]+", truth)
        rule = "similarity" if same_digits else "digits"
        return Verdict(score >= self.accept and same_digits, score, f"{self.kind}:{rule}", prediction, truth)


def anls(prediction: str, truth: str, threshold: float = 0.5) -> float:
    """Similarity of two texts: 1 where they are equal, 0 where it is below the threshold."""
    longer = max(len(prediction), len(truth))
    if longer == 0:
        return 0.0
    if 1 - abs(len(prediction) - len(truth)) / longer < threshold:  # at least as many insertions are needed
        return 0.0
    similarity = 1 - levenshtein(prediction, truth) / longer
    return similarity if similarity >= threshold else 0.0


def levenshtein(left: str, right: str) -> int:
    """Least number of insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(right) + 1))
    for count, mine in enumerate(left, start=1):
        diagonal, row[0] = row[0], count
        for index, other in enumerate(right, start=1):
            diagonal, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, diagonal + (mine != other))
    return row[-1]


# ---- VQA

_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORD_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_NEGATED = [
    "ai",
    "are",
    "ca",
    "could",
    "did",
    "do",
    "does",
    "had",
    "has",
    "have",
    "is",
    "might",
    "must",
    "need",
    "sha",
    "should",
    "was",
    "were",
    "wo",
    "would",
]
# Only where the word without its apostrophe is no other word: "were", "well", "its", "hell" and the like stay.
_JOINED = {
    "ve": ["could", "i", "might", "must", "should", "they", "we", "where", "who", "would", "you"],
    "re": ["how", "that", "there", "they", "what", "who", "why", "you"],
    "ll": ["how", "it", "that", "there", "they", "this", "what", "who", "why", "you"],
    "d": ["how", "it", "she", "that", "there", "they", "where", "who", "why", "you"],
    "s": ["he", "here", "how", "she", "that", "there", "what", "when", "where", "who", "why"],
    "m": ["i"],
}
_CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in _NEGATED} | {
    f"{stem}{ending}": f"{stem}'{ending}" for ending, stems in _JOINED.items() for stem in stems
}


def normalize_vqa(text: str) -> str:
    """Normal form of VQA's evaluation code: case, punctuation, number words, articles and contractions.

    Differs from it where it changes meaning: a minus sign before a number, a decimal point, a slash between digits and
    "<" and ">" stay, and an article is only one where a word follows ("vitamin A").
    """
    text = fold(text).replace("\u2019", "'")
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<![0-9])/|/(?![0-9])", " ", text)
    text = re.sub(r"-(?!\.?[0-9])|(?<=[^\W_])-|(?<=\))-", " ", text)
    text = re.sub(r"[;\[\]\"{}()=+\\_@`,?!*]", " ", text)
    text = re.sub(r"\.(?![0-9])", "", text)
    words = [_WORD_DIGITS.get(word, word) for word in text.split()]
    words = [word for index, word in enumerate(words) if word not in _ARTICLES or index == len(words) - 1]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VqaMatcher(Matcher):
    """VQA accuracy: equal normal forms; of a list of annotators' answers three in ten must agree for a full score.

    ``min(n / 3, 1)`` for n of ten annotators; of a list of another length n is scaled to ten, so that one truth is
    simply right or wrong. An answer whose normal form is empty is compared as it was written.

    Attributes:
        accept: Score from which on an answer counts as right.
    """

    kind: ClassVar[str] = "vqa"
    accept: float = 1.0

    def __post_init__(self) -> None:
        _check_in("accept", self.accept, 0, 1)
        if self.accept <= 0:
            raise ValueError(f"accept must be positive, or every answer is right, got {self.accept!r}")

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Compares an answer with those of all annotators together, see ``Matcher``."""
        truths = self._check(prediction, truth)
        if not prediction.strip():
            return Verdict(False, 0.0, f"{self.kind}:empty", prediction, truths[0])
        verdicts = [self._compare(prediction, each) for each in truths]
        agreeing = sum(verdict.correct for verdict in verdicts)
        score = min(10 * agreeing / (3 * len(truths)), 1.0)
        best = max(verdicts, key=lambda verdict: verdict.correct)
        return dataclasses.replace(best, correct=score >= self.accept, score=score)

    def _compare(self, prediction: str, truth: str) -> Verdict:
        predicted, true = normalize_vqa(prediction), normalize_vqa(truth)
        if predicted and true:
            return self._verdict(predicted == true, "normalized", predicted, true)
        predicted, true = fold(prediction), fold(truth)
        return self._verdict(predicted == true, "raw", predicted, true)


# ---- Mathematics


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MathMatcher(Matcher):
    """Mathematical equivalence by the package math-verify (the extra ``math``).

    The expressions are compared in a process of their own, one per Python process: it can be stopped whatever it does,
    in any thread and under any number of workers. Words are compared as text: as products of letters "no" is "on".

    Attributes:
        seconds: Time after which two expressions count as different (rule "math:unfinished").
    """

    kind: ClassVar[str] = "math"
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds)
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, got {self.seconds!r}")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(f"the matcher 'math' needs the package math-verify: {install_hint('math')}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        prediction, truth = clean_answer(prediction.translate(_ASCII)), clean_answer(truth.translate(_ASCII))
        is_prose = any(re.fullmatch(r"[^\W\d_]{2,}(?:\W+[^\W\d_]+)*", text) for text in (prediction, truth))
        if is_prose or fold(prediction) == fold(truth):
            return self._verdict(fold(prediction) == fold(truth) != "", "text", fold(prediction), fold(truth))
        if not prediction or not truth:
            return self._verdict(False, "empty", prediction, truth)
        equal = _math_worker().equal(prediction, truth, self.seconds)
        return self._verdict(bool(equal), "unfinished" if equal is None else "equivalence", prediction, truth)


def _serve_math() -> None:
    """Answers one line of JSON per pair. Runs in a process of its own, which ``_MathWorker`` starts."""
    import logging
    import signal

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, also within a long C call
    except (ImportError, AttributeError, ValueError, OSError):
        pass
    logging.disable(logging.CRITICAL)
    try:
        from math_verify import parse, verify
    except Exception as error:
        print(json.dumps({"error": repr(error)}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)

    def read(text: str) -> list:
        has_delimiters = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
        options = {"fallback_mode": "no_fallback", "parsing_timeout": None}
        return parse(text if has_delimiters else f"${text}$", **options) or parse(text, **options)

    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            truth, prediction = read(request["truth"]), read(request["prediction"])
            equal = bool(truth and prediction and verify(truth, prediction, timeout_seconds=None))
        except Exception:
            equal = False
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"equal": equal}), flush=True)


class _MathWorker:
    """The process that compares expressions. One request at a time; it is started when first needed."""

    START = (
        f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import _serve_math; _serve_math()"
    )
    START_SECONDS = 120.0
    GRACE_SECONDS = 1.0  # the process ends itself first; this is for where it cannot

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, prediction: str, truth: str, seconds: float) -> bool | None:
        """Whether two expressions are equal; None where time or memory did not suffice."""
        request = {"prediction": prediction, "truth": truth, "seconds": seconds}
        with self._lock:
            process = self._started()
            reply = self._ask(process, json.dumps(request), seconds + self.GRACE_SECONDS)
            if reply is None:
                self._stop()
                return None
            return bool(reply["equal"])

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, "-c", self.START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            reply = self._ask(self._process, None, self.START_SECONDS)
            if reply is None or "error" in reply:
                self._stop()
                raise RuntimeError(f"math-verify did not start: {(reply or {}).get('error', 'its process ended')}")
        return self._process

    @staticmethod
    def _ask(process: subprocess.Popen[str], line: str | None, seconds: float) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:
            return None
        finally:
            timer.cancel()
        return json.loads(reply) if reply.endswith("\n") else None

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a request that was never taken
                    pipe.close()

    def close(self) -> None:
        with self._lock:
            self._stop()


_inherited: list[_MathWorker] = []  # workers of a parent process: kept, so that nothing here ends or awaits them


@functools.cache
def _math_worker() -> _MathWorker:
    worker = _MathWorker()
    atexit.register(worker.close)
    return worker


def _forget_worker() -> None:
    if _math_worker.cache_info().currsize:
        worker = _math_worker()
        atexit.unregister(worker.close)
        _inherited.append(worker)
        _math_worker.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_worker)


# ---- Functions of the user, and several rules at once


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CustomMatcher(Matcher):
    """A function of the user: ``function(prediction, truth)`` gives a bool, a score in [0, 1] or a Verdict.

    Attributes:
        function: The function, or its name as "module:function" (which can be sent to other processes).
        accept: Score from which on an answer counts as right.
    """

    kind: ClassVar[str] = "custom"
    function: str | Callable[[str, str], bool | float | Verdict]
    accept: float = 1.0

    def __post_init__(self) -> None:
        _check_in("accept", self.accept, 0, 1)
        if isinstance(self.function, str):
            load_function(self.function)
        elif not callable(self.function):
            raise TypeError(f"function must be callable or 'module:function', got {self.function!r}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        function = load_function(self.function) if isinstance(self.function, str) else self.function
        name = self.function if isinstance(self.function, str) else getattr(function, "__name__", "function")
        result = function(prediction, truth)
        if isinstance(result, Verdict):
            return result
        if isinstance(result, bool):
            return self._verdict(result, name, prediction, truth)
        check_number(f"the score of {name}", result)
        if not 0 <= result <= 1:
            raise ValueError(f"the score of {name} must be in [0, 1], got {result!r}")
        return Verdict(result >= self.accept, float(result), f"{self.kind}:{name}", prediction, truth)


@functools.cache
def load_function(name: str) -> Callable[[str, str], bool | float | Verdict]:
    """Imports a function by its name, "module:function"."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"function must be named as 'module:function', got {name!r}")
    try:
        found = functools.reduce(getattr, attribute.split("."), cast(Any, importlib.import_module(module)))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"function must name a function that can be imported, got {name!r}: {error}") from error
    if not callable(found):
        raise TypeError(f"function must name a function, got {name!r}, a {type(found).__name__}")
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnyMatcher(Matcher):
    """Right by at least one of several rules, asked in order until one says yes. No later rule takes that back.

    Attributes:
        matchers: The rules: matchers, kinds, or mappings of a ``kind`` and its options.
    """

    kind: ClassVar[str] = "any"
    matchers: Sequence[Matcher | str | Mapping[str, Any]]

    def __post_init__(self) -> None:
        if isinstance(self.matchers, str) or not isinstance(self.matchers, Sequence) or not self.matchers:
            raise ValueError(f"matchers must be a list of at least one matcher, got {self.matchers!r}")
        object.__setattr__(self, "matchers", tuple(map(_build, self.matchers)))

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Asks each rule about all truths together, see ``Matcher``."""
        best: Verdict | None = None
        for each in cast(Sequence[Matcher], self.matchers):
            verdict = each(prediction, truth)
            if verdict.correct:
                return verdict
            if best is None or verdict.score > best.score:
                best = verdict
        assert best is not None
        return best

    def _compare(self, prediction: str, truth: str) -> Verdict:
        return self(prediction, truth)


def _build(value: Matcher | str | Mapping[str, Any]) -> Matcher:
    if isinstance(value, Matcher):
        return value
    if isinstance(value, str):
        return matcher(value)
    if not isinstance(value, Mapping) or "kind" not in value:
        raise TypeError(f"matchers must hold matchers, kinds or mappings with a kind, got {value!r}")
    return matcher(**value)


MATCHERS: dict[str, type[Matcher]] = {
    each.kind: each
    for each in (
        ExactMatcher,
        ChoiceMatcher,
        NumberMatcher,
        ChartMatcher,
        AnlsMatcher,
        VqaMatcher,
        MathMatcher,
        CustomMatcher,
        AnyMatcher,
    )
}


def matcher(kind: str, **options: Any) -> Matcher:
    """Builds the matcher of a kind. An unknown kind or option is an error, not a silent default.

    Args:
        kind: Key of ``MATCHERS``.
        options: The attributes of that matcher.

    Raises:
        ImportError: If the kind is "math" and math-verify is not installed.
    """
    if kind not in MATCHERS:
        raise ValueError(f"kind must be one of {', '.join(MATCHERS)}, got {kind!r}{_hint(kind, list(MATCHERS))}")
    fields = {field.name: field for field in dataclasses.fields(MATCHERS[kind])}
    for name in options:
        if name not in fields:
            known = f"; its options: {', '.join(fields)}" if fields else "; it has none"
            raise ValueError(f"unknown option {name!r} of the matcher {kind!r}{_hint(name, list(fields)) or known}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in options:
            raise ValueError(f"the matcher {kind!r} needs the option {name!r}")
    return MATCHERS[kind](**options)


def _hint(name: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_same_answer(first: str | None, second: str | None, matcher: Matcher) -> bool:
    """Says whether two answers are one under a rule, asked both ways round. A pair must not have it on both sides.

    An answer that could not be read (None) is the same as no other, whatever the other says: "None" included.
    """
    if first is None or second is None:
        return False
    return fold(first) == fold(second) or matcher(first, second).correct or matcher(second, first).correct
