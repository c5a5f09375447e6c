"""The matcher for mathematical expressions."""

import dataclasses
import importlib.util
import re
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict
from mpo_ext.answers.math_process import math_process
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold
from mpo_ext.answers.number_text import FROM_RAISED, Number, parse_number
from mpo_ext.answers.number_words import LARGE
from mpo_ext.answers.numbers import NumberRule, number_text
from mpo_ext.answers.readings import (
    compare_readings,
    have_same_letters,
    in_radians,
    is_interval_unclear,
    is_symbol,
    with_fractions,
    with_repeating_fractions,
    without_dots,
    without_point,
    without_unknown_unit,
)
from mpo_ext.answers.units import compare_units, is_case_off, parse_unit
from mpo_ext.answers.word_answers import compare_texts, is_no_answer, without_lead
from mpo_ext.answers.word_forms import is_same_time
from mpo_ext.checks import check_number, install_hint

_NUMBERS = NumberRule(relative=1e-6, absolute=1e-9, percent="either", units="any")
_PROSE = re.compile(r"[^\W\d_]{2,}(?:\W+[^\W\d_]+)*")
_FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt frac pi max min lim det mod gcd"
)
_FUNCTIONS += (
    " lcm infty cup cap left right text mathrm emptyset alpha beta gamma theta lambda sigma omega varnothing inf"
)
_NOT_WORDS = frozenset(_FUNCTIONS.split())
_WORDS = "a an the is are was not no if so to of at by we it or and cm mm km kg for with than"
_SENTENCE_WORDS = frozenset(_WORDS.split())
_TRAILING_UNIT = re.compile(
    r"(?:\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}|(?:\s|(?<=[)}0-9]))([^\W\d_]{1,4}))\s*(?:\^\s*\{?([23])\}?)?$"
)
_ROOT = re.compile(
    r"(?:(\u221b)|\u221a|\\sqrt(?=\s*[(0-9])|(?<![\\A-Za-z])sqrt(?![A-Za-z]))\s*"
    r"(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\u03c0))"
)
_SPACE = re.compile(r"(?<!\\)\\[ ,;:!]|~")
_RAISED = re.compile("\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_TRIGONOMETRIC = re.compile(r"(?<!arc)(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_SCALE = re.compile(rf"\b(?:{'|'.join(LARGE)}|hundred|dozen)s?\b")
_ASCII_NAMES = re.compile(r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sin|cos|tan|log|ln|exp|pi|infty)(?![A-Za-z])")
_SYMBOLS = {"\u221e": "\\infty ", "\u03c0": "\\pi ", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u00f7": "\\div "}
_SYMBOLS |= {
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u222a": "\\cup ",
    "\u2229": "\\cap ",
    "**": "^",
    "\u2260": "\\ne ",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MathMatcher(Matcher):
    """Compares mathematical expressions with the package math-verify (the extra ``math``).

    Numbers are compared by the rules of ``NumberMatcher``, with two differences. A unit may be missing after one of
    the numbers ("7" equals "7 cm"), and 50% equals both 50 and 0.5.

    Words are compared as text. As expressions, "no" and "on" would be equal products of letters.

    If the truth is an expression, an answer that is a sentence is unreadable. An answer is also unreadable if
    math-verify cannot read the answer or the truth.

    Expressions are compared in a helper process, which can be stopped at the time limit.

    Attributes:
        seconds: Time limit of a comparison, in seconds. At the limit, the answer is unreadable (rule
            "math:unfinished").
    """

    kind: ClassVar[str] = "math"
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, "(0, inf)")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(f"the matcher 'math' needs the package math-verify: {install_hint('math')}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        verdict = self._compare_forms(prediction, truth)
        if verdict.correct is not False:
            return verdict
        correct, rule = compare_readings(prediction, truth)
        if correct is not False:
            return self._verdict(correct, rule, verdict.prediction, verdict.truth)
        are_times = is_same_time(fold(prediction), fold(truth))
        if are_times or have_same_letters(prediction, truth) or is_interval_unclear(prediction, truth):
            return self._verdict(None, "reading", verdict.prediction, verdict.truth)
        for change in (without_unknown_unit, in_radians, with_fractions, without_point, without_dots):
            texts = change(prediction), change(truth)
            if texts != (prediction, truth) and all(texts) and self._compare_forms(*texts).correct is not False:
                rule = "unit" if change is without_unknown_unit else "reading"
                return self._verdict(None, rule, verdict.prediction, verdict.truth)
        return verdict

    def _compare_forms(self, prediction: str, truth: str) -> Verdict:
        first, second = parse_number(prediction), parse_number(truth)
        if first and second and _are_numbers(first, second):
            correct, rule = _NUMBERS.compare(first, second)
            return self._verdict(correct, rule, number_text(first), number_text(second))
        prediction, truth = (clean_answer(_lower(text.translate(TO_ASCII))) for text in (prediction, truth))
        if is_case_off(prediction, truth) or (first and second and _is_other_unit(first, second)):
            return self._verdict(None, "case", prediction, truth)
        if fold(prediction) == fold(truth) != "":
            return self._verdict(True, "text", fold(prediction), fold(truth))
        if _PROSE.fullmatch(truth) and not _is_named(truth):
            return self._verdict(compare_texts(prediction, truth), "text", fold(prediction), fold(truth))
        prediction = without_lead(prediction)
        bare, unit = _split_unit(prediction)
        bare_truth, true_unit = _split_unit(truth)
        if not prediction or not truth or is_no_answer(fold(prediction)) or _is_sentence(bare):
            return self._verdict(None, "text", fold(prediction), fold(truth))
        if unit and true_unit:  # math-verify drops units
            factor = compare_units(unit, true_unit)
            if factor == "different":
                return self._verdict(False, "unit", prediction, truth)
            if isinstance(factor, str):
                return self._verdict(None, "unit", prediction, truth)
            if factor != 1:
                bare = f"\\frac{{{factor.numerator}}}{{{factor.denominator}}} \\cdot ({bare})"
        result = math_process().compare(_latex(bare), _latex(bare_truth), self.seconds)
        correct = {"equal": True, "different": False}.get(result)
        rule = "equivalence" if result in ("equal", "different") else result
        return self._verdict(correct, rule, prediction, truth)


def _are_numbers(first: Number, second: Number) -> bool:
    """Returns whether two numbers can be compared by value.

    Returns False for numbers of different variables, such as "x = 7" and "y = 7". Also returns False for different
    units if one of the units may be a variable, as in "2a" and "2b".
    """
    if first.name != second.name and first.name and second.name:
        return False
    return first.unit == second.unit or not (is_symbol(first) or is_symbol(second))


def _is_other_unit(first: Number, second: Number) -> bool:
    """Returns whether the unit names of two numbers differ only in case, but may mean different units.

    True for "m/s" and "m/S". False for "Metre" and "metre", which mean the same unit.
    """
    is_same_text = first.unit.casefold() == second.unit.casefold()
    return first.unit != second.unit and is_same_text and compare_units(first.unit, second.unit) != 1


def _is_named(text: str) -> bool:
    return text.casefold() in _NOT_WORDS


def _is_sentence(text: str) -> bool:
    """Returns whether a text has words of ordinary language. Names of functions and symbols ("sin x") do not count."""
    if re.search(r"\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*\b(?:or|and)\b", text):
        text = re.sub(r"\b(?:or|and)\b", "", text)  # "x = 1 \text{ or } x = 2"
    if re.fullmatch(r"[^\W\d_]+(?:\s+[^\W\d_]+)+", text) and re.search(r"[^\W\d_]{3}", text):
        return any(len(word) > 1 and word.casefold() not in _NOT_WORDS for word in text.split())
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    words = [word.casefold() for word in words]
    return any(word not in _NOT_WORDS and (len(word) > 4 or word in _SENTENCE_WORDS) for word in words)


def _split_unit(text: str) -> tuple[str, str]:
    r"""Splits a unit off the end of an expression. Returns (expression, unit). Without a unit, the unit is "".

    "\sqrt{2} \text{ m}" gives "\sqrt{2}" and "m". An unknown unit must be in "\text{}".
    """
    match = _TRAILING_UNIT.search(text)
    if match is None or not text[: match.start()].strip(" ({[$"):
        return text, ""
    unit = (match[1] or match[2] or "").strip() + (f"^{match[3]}" if match[3] else "")
    parsed = parse_unit(unit) if unit else None
    is_scale = bool(_SCALE.search(unit))
    if parsed is None or is_scale or (match[2] and (not parsed.is_known or len(match[2]) == 1)):
        return text, ""  # letters outside \\text{} may be variables
    return text[: match.start()].strip(), unit


def _lower(text: str) -> str:
    r"""Returns a text with exponents such as "²" written as "^{2}", and spaces such as "\," as " "."""
    return _RAISED.sub(lambda raised: f"^{{{raised[0].translate(FROM_RAISED)}}}", _SPACE.sub(" ", text))


def _latex(text: str) -> str:
    r"""Returns an expression with names and symbols replaced by LaTeX commands: "pi" becomes "\pi"."""
    text = _ROOT.sub(lambda root: f"\\sqrt{'[3]' if root[1] else ''}{{{root[2] or root[3] or root[4]}}}", text)
    text = with_repeating_fractions(text)
    if _TRIGONOMETRIC.search(text):
        text = in_radians(text)
    for symbol, name in _SYMBOLS.items():
        text = text.replace(symbol, name)
    return _ASCII_NAMES.sub(r"\\\1 ", text)
