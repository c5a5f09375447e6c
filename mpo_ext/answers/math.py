"""The matcher for mathematical expressions."""

import dataclasses
import importlib.util
import re
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict
from mpo_ext.answers.equations import is_value_of_equation_unclear
from mpo_ext.answers.latex import (
    canonical,
    has_prime,
    in_radians,
    is_notation_unclear,
    is_readable,
    is_same_but_case,
    is_word,
    may_be_range_or_time,
    rename_capitals,
    to_latex,
    with_fractions,
    without_derivative,
)
from mpo_ext.answers.math_process import math_process
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold
from mpo_ext.answers.number_text import Number, parse_number
from mpo_ext.answers.number_words import LARGE
from mpo_ext.answers.numbers import NumberRule, number_text
from mpo_ext.answers.readings import compare_readings, is_symbol, without_point, without_unclear_unit
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
    r"(?:\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}|(?:\s|(?<=[)}]))([^\W\d_]{1,4}))\s*(?:\^\s*\{?([23])\}?)?$"
)
_SPACE = re.compile(r"(?<!\\)\\[ ,;:!]|~")
_SCALE = re.compile(rf"\b(?:{'|'.join(LARGE)}|hundred|dozen)s?\b")
_NAME = re.compile(r"(?<![A-Za-z])(?:arcsin|arccos|arctan|sinh?|cosh?|tanh?|cot|sec|csc|log|ln|exp|sqrt)(?![A-Za-z])")
_OPERATOR_AT_END = re.compile(r"(?:[-+*/^=<>,]|\\(?:cdot|times|div|pm|mp|frac|sqrt))$")
_OPERATOR = re.compile(r"[-+*/=<>^|]|\\[A-Za-z]")
_ABBREVIATIONS = {"dne": "does not exist", "d.n.e": "does not exist", "d.n.e.": "does not exist"}
_NO_SOLUTION = re.compile(r"(?:no|none|empty|there\s+(?:is|are)\s+no)\b.*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MathMatcher(Matcher):
    """Compares mathematical expressions with the package math-verify (the extra ``math``).

    Numbers are compared by the rules of ``NumberMatcher``, with two differences. A unit may be missing after one of
    the numbers ("7" equals "7 cm"), and 50% equals both 50 and 0.5.

    Words are compared as text. As expressions, "no" and "on" would be equal products of letters. Case counts in
    expressions: an answer that differs from the truth only in the case of variables is unreadable.

    If one text is an equation that computes with an unknown ("2x = 6"), and the other text is a value ("6"), the
    answer is unreadable, unless all sides are equal.

    If the truth is an expression, an answer that is a sentence is unreadable. An answer is also unreadable if
    math-verify cannot read all parts of the answer and the truth. Labels such as an angle or a transposed matrix,
    number bases and dates equal only the same text. A range such as "2010-2012" equals no other range.

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
        whole = _whole(prediction), _whole(truth)
        if is_value_of_equation_unclear(*whole):
            return self._verdict(self._is_identity(*whole) or None, "equation", *whole)
        verdict = self._compare_forms(prediction, truth)
        if verdict.correct or (verdict.correct is None and verdict.rule != "math:unread"):
            return verdict
        correct, rule = compare_readings(prediction, truth)
        if verdict.correct is None:
            return self._verdict(True, rule, verdict.prediction, verdict.truth) if correct else verdict
        if correct is not False:
            return self._verdict(correct, rule, verdict.prediction, verdict.truth)
        for change, rule in ((without_unclear_unit, "unit"), (without_point, "reading")):
            texts = change(prediction), change(truth)
            if texts != (prediction, truth) and all(texts) and self._compare_forms(*texts).correct is not False:
                return self._verdict(None, rule, verdict.prediction, verdict.truth)
        return verdict

    def _is_identity(self, first: str, second: str) -> bool:
        """Returns whether all sides of an equation equal the other text: "x^2-1 = (x-1)(x+1)" and "x^2-1"."""
        *sides, value = (side.strip() for text in (first, second) for side in text.split("="))
        return all(self._compare_forms(side, value).correct for side in sides)

    def _compare_forms(self, prediction: str, truth: str) -> Verdict:
        first, second = parse_number(prediction), parse_number(truth)
        is_primed = prediction != truth and (has_prime(prediction) or has_prime(truth))
        if first and second and _are_numbers(first, second) and not is_primed:
            correct, rule = _NUMBERS.compare(first, second)
            if _are_other_equations(prediction, truth):
                verdict = self._compare_expressions(_whole(prediction), _whole(truth))
                if verdict.correct is not False or not correct:
                    return verdict
                correct, rule = None, "equation"
            return self._verdict(correct, rule, number_text(first), number_text(second))
        prediction, truth = (_whole(text) for text in (prediction, truth))
        if is_case_off(prediction, truth) or (first and second and _is_other_unit(first, second)):
            return self._verdict(None, "case", prediction, truth)
        if is_same_but_case(without_lead(prediction), without_lead(truth)):
            return self._verdict(None, "case", prediction, truth)
        if fold(prediction) == fold(truth) != "":
            return self._verdict(True, "text", fold(prediction), fold(truth))
        is_same = is_same_time(fold(prediction), fold(truth))
        if is_same or (is_same is False and "m" in fold(prediction + truth)):  # "1:15" may be a ratio, "1 pm" not
            return self._verdict(None if is_same else False, "time", prediction, truth)
        if _PROSE.fullmatch(to_latex(truth)) and not _is_named(truth):
            correct = compare_texts(prediction, truth)
            if correct is True or not (_is_formula(truth) or (_is_run(truth) and _is_formula(prediction))):
                return self._verdict(self._compare_words(prediction, truth), "text", fold(prediction), fold(truth))
        return self._compare_expressions(without_lead(prediction), truth)

    def _compare_words(self, prediction: str, truth: str) -> bool | None:
        """Compares an answer with a truth in words. Anagrams such as "yx" and "xy" may be equal products."""
        correct = compare_texts(prediction, truth)
        if correct is False and _is_run(prediction) and _is_run(truth) and sorted(prediction) == sorted(truth):
            return False if is_word(prediction) or is_word(truth) else None
        is_empty_set = re.fullmatch(r"\\emptyset|\\\{\s*\\\}", to_latex(prediction)) is not None
        return None if is_empty_set and _NO_SOLUTION.fullmatch(fold(truth)) else correct

    def _compare_expressions(self, prediction: str, truth: str) -> Verdict:
        bare, unit = _split_unit(prediction)
        bare_truth, true_unit = _split_unit(truth)
        latex, true_latex = without_derivative(to_latex(bare), to_latex(bare_truth))
        if not prediction or not truth or is_no_answer(fold(prediction)) or _is_sentence(latex):
            return self._verdict(None, "text", fold(prediction), fold(truth))
        if canonical(to_latex(prediction)) == canonical(to_latex(truth)):
            return self._verdict(True, "text", prediction, truth)
        if is_notation_unclear(latex, true_latex):
            return self._verdict(None, "notation", prediction, truth)
        if not is_readable(latex) or not is_readable(true_latex):
            return self._verdict(None, "unread", prediction, truth)
        if unit and true_unit:  # math-verify drops units
            factor = compare_units(unit, true_unit)
            if factor == "different":
                return self._verdict(False, "unit", prediction, truth)
            if isinstance(factor, str):
                return self._verdict(None, "unit", prediction, truth)
            if factor != 1:
                latex = f"\\frac{{{factor.numerator}}}{{{factor.denominator}}} \\cdot ({latex})"
        result = self._compare_latex(latex, true_latex)
        if result == "different" and (bare, bare_truth) != (prediction, truth):
            latex, true_latex = to_latex(prediction), to_latex(truth)  # "mg" may be a unit or a product
            is_text = "\\text" in latex + true_latex or "\\mathrm" in latex + true_latex
            if not is_text and self._compare_latex(latex, true_latex) == "equal":
                result = "unread"
        if result == "equal" and may_be_range_or_time(bare, bare_truth):
            result = "unread"
        correct = {"equal": True, "different": False}.get(result)
        rule = "equivalence" if result in ("equal", "different") else result
        return self._verdict(correct, rule, prediction, truth)

    def _compare_latex(self, prediction: str, truth: str) -> str:
        """Returns the result of math-verify. Expressions that are equal only under a guess are "unread"."""
        radians = in_radians(prediction, truth), in_radians(truth, prediction)
        guesses = [radians, (prediction, truth), (with_fractions(prediction), with_fractions(truth))]
        if r"\ln" in prediction + truth and r"\log" in prediction + truth:
            guesses.append((prediction.replace(r"\log", r"\ln"), truth.replace(r"\log", r"\ln")))
        for guess in dict.fromkeys(guesses):
            named = rename_capitals(*guess)
            result = "unread" if named is None else math_process().compare(named[0], named[1], self.seconds)
            if guess == radians and result != "different":
                return result
            if result == "equal" or named is None:
                return "unread"
        return "different"


def _whole(text: str) -> str:
    """Returns an answer without markup, with plain spaces, and with abbreviations in full."""
    text = text.translate(TO_ASCII)
    text = clean_answer(_SPACE.sub(" ", text)) or text
    return _ABBREVIATIONS.get(text.casefold(), text)


def _is_run(text: str) -> bool:
    """Returns whether a text is a run of at most three letters: a word such as "red", or a product such as "mgh"."""
    return re.fullmatch(r"[^\W\d_]{2,3}", text) is not None


def _is_formula(text: str) -> bool:
    """Returns whether a text is an expression with an operator, a function or letters side by side, and has no words.

    "m g h", "mx + b" and "sin x" are formulas. "mgh" and "up and down" are not.
    """
    text = to_latex(text)
    runs = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", text)
    if not text.isascii() or _is_sentence(text) or any(len(run) > 3 and not _is_named(run) for run in runs):
        return False
    if any(len(run) > 1 and not _is_named(run) and is_word(run) for run in runs):
        return False
    is_product = len(runs) > 1 and all(len(run) == 1 for run in runs)
    return is_product or _OPERATOR.search(text) is not None or _NAME.search(text) is not None


def _are_numbers(first: Number, second: Number) -> bool:
    """Returns whether two numbers can be compared by value.

    Returns False for numbers of different variables, such as "x = 7" and "y = 7". Also returns False for different
    units if one of the units may be a variable, as in "2a" and "2b".
    """
    if first.name != second.name and first.name and second.name:
        return False
    return first.unit == second.unit or not (is_symbol(first) or is_symbol(second))


def _are_other_equations(first: str, second: str) -> bool:
    """Returns whether two texts are equations with different expressions on the left side.

    True for "x + y = 1" and "x - y = 1". False if a left side has words or no letters.
    """
    sides = [to_latex(text.translate(TO_ASCII)).partition("=")[0] for text in (first, second) if "=" in text]
    are_expressions = all(re.search("[A-Za-z]", side) and not re.search("[A-Za-z]{3}", side) for side in sides)
    return len(sides) == 2 and are_expressions and canonical(sides[0]) != canonical(sides[1])


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
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\(?:begin|end)\s*\{\w+\}|\\[A-Za-z]+", " ", text))
    words = [word.casefold() for word in words]
    return any(word not in _NOT_WORDS and (len(word) > 4 or word in _SENTENCE_WORDS) for word in words)


def _split_unit(text: str) -> tuple[str, str]:
    r"""Splits a unit off the end of an expression. Returns (expression, unit). Without a unit, the unit is "".

    "\sqrt{2} \text{ m}" gives "\sqrt{2}" and "m".
    """
    match = _TRAILING_UNIT.search(text)
    before = "" if match is None else text[: match.start()].strip(" ({[$")
    if match is None or not before or _OPERATOR_AT_END.search(before):
        return text, ""
    unit = (match[1] or match[2] or "").strip() + (f"^{match[3]}" if match[3] else "")
    parsed = parse_unit(unit) if unit else None
    has_variables = re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", before)) is not None
    is_unit = parsed is not None and (parsed.is_known or (match[1] and not has_variables))
    if not is_unit or _SCALE.search(unit) or (match[2] and len(match[2]) == 1):  # a single letter is a variable
        return text, ""
    return text[: match.start()].strip(), unit
