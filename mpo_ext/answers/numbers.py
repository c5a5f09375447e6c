"""Matchers for answers that are numbers."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

from mpo_ext.answers.base import Matcher, Verdict, check_flag
from mpo_ext.answers.normalize import clean_answer, fold
from mpo_ext.answers.number_text import Number, parse_number
from mpo_ext.answers.number_words import ANY_WORD
from mpo_ext.answers.units import compare_units, fold_unit, is_case_off, may_be_converted
from mpo_ext.answers.word_answers import compare_texts
from mpo_ext.checks import check_choice, check_number, shorten

_DEGREES = ("\u00b0", "degree", "degrees", "deg")
_NOTHING = ("none", "nil", "nothing", "null", "no")

_CONSTANTS = dict.fromkeys(("\u221e", "\\infty", "+\u221e", "+\\infty", "inf", "infinity"), "infinity")
_CONSTANTS |= {"\u03c0": "pi", "\\pi": "pi", "pi": "pi", "-\u221e": "-inf", "-\\infty": "-inf", "-infinity": "-inf"}
_CONSTANTS |= {"-inf": "-inf", "minus infinity": "-inf", "e": "e"}
_SYMBOL = re.compile(r"\\[A-Za-z]|[\u221a\u221e\u0391-\u03c9]")

_ROMAN = re.compile("[IVXLCDM]{1,9}")
_YEAR = re.compile(r"[0-9]{4}")
_YEARS = range(1800, 2101)


def _within(prediction: Fraction, truth: Fraction, relative: float, absolute: float) -> bool:
    if prediction == truth:
        return True
    if truth == 0:
        return abs(prediction) <= _as_written(absolute)
    return abs(prediction - truth) <= _as_written(relative) * abs(truth)


@functools.lru_cache(maxsize=256)
def _as_written(value: float) -> Fraction:
    return Fraction(repr(float(value)))  # exact decimal: 0.05 is 1/20, so 105 is within 5 % of 100


def number_text(number: Number) -> str:
    """Returns a number and its unit as text, for a ``Verdict``."""
    value = number.value
    written = str(value.numerator) if value.denominator == 1 and abs(value) < 10**21 else repr(_to_float(value))
    return f"{written} {number.unit}" if number.unit else written


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NumberRule:
    """Compares two numbers. ``NumberMatcher`` describes the attributes that are not listed here.

    Attributes:
        percent: As in ``NumberMatcher``. A further value is "either": 50% equals both 0.5 and 50.
        is_rounding_wrong: Whether numbers that are equal only after rounding, such as 3.14 and 3.14159, count as
            different. False: for such numbers, ``compare`` returns None ("unclear").
    """

    relative: float
    absolute: float
    percent: Literal["ignore", "ratio", "keep", "either"] = "ignore"
    degrees: bool = True
    units: Sequence[str] | Literal["any"] = ()
    is_rounding_wrong: bool = False

    def compare(self, prediction: Number, truth: Number) -> tuple[bool | None, str]:
        """Compares two numbers.

        Returns:
            (is_equal, rule). ``is_equal`` is None if it is unclear whether the numbers are equal. ``rule`` names the
            comparison that decided, such as "value" or "unit".
        """
        if prediction.name != truth.name and prediction.name and truth.name:
            return None, "name"
        first, second = self._without_percent(prediction), self._without_percent(truth)
        if first.unit == second.unit:
            return self._values(first, second, prediction, truth)
        if "%" in (prediction.unit, truth.unit) and prediction.unit and truth.unit:  # "50%" and "50 m"
            is_equal = _within(first.value, second.value, self.relative, self.absolute)
            return (None if is_equal else False), "unit"
        if not first.unit or not second.unit:
            return self._one_unit(first, second, prediction, truth)
        if first.is_currency and second.is_currency:
            return False, "unit"
        factor = compare_units(first.unit, second.unit)
        if factor == "different":
            return False, "unit"
        if isinstance(factor, str):
            return None, "unit"
        converted = dataclasses.replace(first, value=first.value * factor, others=(), decimals=0)
        correct, rule = self._values(converted, second, prediction, truth)
        if correct is False and not self.is_rounding_wrong and factor != 1:  # "1.6 km" for "1 mile"
            exact = dataclasses.replace(second, value=second.value / factor, decimals=0)
            if _is_rounded(first, exact) or _is_rounded(second, converted):
                return None, "unclear value"
        return correct, rule

    def _values(self, first: Number, second: Number, prediction: Number, truth: Number) -> tuple[bool | None, str]:
        if _within(first.value, second.value, self.relative, self.absolute):
            return True, "value"
        ratios = _as_ratios(prediction, truth) if self.percent == "either" else None
        if ratios and _within(ratios[0].value, ratios[1].value, self.relative, 0):
            return True, "percent"
        if first.is_approximate or second.is_approximate:
            return None, "approximate"
        return (None, "unclear value") if self._is_unclear(first, second, prediction, truth) else (False, "value")

    def _one_unit(self, first: Number, second: Number, prediction: Number, truth: Number) -> tuple[bool | None, str]:
        """Compares two numbers of which only one has a unit. Returns (is_equal, rule), like ``compare``.

        ``first`` and ``second`` are the results of ``_without_percent`` for ``prediction`` and ``truth``.
        """
        unit = first.unit or second.unit
        if unit == "%":
            return False, "unit"  # percent="keep"
        is_currency = first.is_currency or second.is_currency
        if _within(first.value, second.value, self.relative, self.absolute):
            return (True, "value") if is_currency or self._accepts(unit) else (None, "unit")
        correct, rule = self._values(first, second, prediction, truth)
        money, plain = (first, second) if first.unit else (second, first)
        if is_currency:
            may_be_equal = money.value * 100 == plain.value  # "$0.50" is 50 cents
        else:
            may_be_equal = may_be_converted(first.value, second.value, unit)
        return (None, "unit") if correct is False and may_be_equal else (correct, rule)

    def _is_unclear(self, first: Number, second: Number, prediction: Number, truth: Number) -> bool:
        """Returns whether two different numbers may mean the same number, for example because a number is rounded.

        A number may also have a second reading, such as 1.234 for "1,234". ``_one_unit`` describes the arguments.
        """
        if any(_within(other, second.value, self.relative, self.absolute) for other in first.others):
            return True
        if any(_within(first.value, other, self.relative, self.absolute) for other in second.others):
            return True
        pairs = [(first, second)]
        ratios = _as_ratios(prediction, truth) if self.percent != "keep" else None
        if ratios:
            if _within(ratios[0].value, ratios[1].value, self.relative, 0):
                return True
            pairs.append(ratios)
        return not self.is_rounding_wrong and any(_is_rounded(*pair) or _is_rounded(*pair[::-1]) for pair in pairs)

    def _accepts(self, unit: str) -> bool:
        if self.units == "any" or (self.degrees and fold(unit) in _DEGREES):
            return True
        return fold_unit(unit) in _folded(tuple(self.units))

    def _without_percent(self, number: Number) -> Number:
        if number.unit != "%" or self.percent == "keep":
            return number
        value = number.value / 100 if self.percent == "ratio" else number.value
        decimals = number.decimals + 2 if self.percent == "ratio" and number.decimals else number.decimals
        return Number(value, is_approximate=number.is_approximate, decimals=decimals)


def _as_ratios(prediction: Number, truth: Number) -> tuple[Number, Number] | None:
    """Returns the two numbers, with the percentage as a ratio: 0.5 for "50%".

    Returns None if neither or each of the numbers is a percentage.
    """
    if (prediction.unit == "%") == (truth.unit == "%"):
        return None
    first, second = (
        dataclasses.replace(number, value=number.value / 100, decimals=number.decimals + 2)
        if number.unit == "%"
        else number
        for number in (prediction, truth)
    )
    return first, second


def _is_rounded(rounded: Number, exact: Number) -> bool:
    """Returns whether ``rounded`` is the rounded value of ``exact``, such as 3.14 for 3.14159."""
    if not rounded.decimals or exact.value.denominator == 1 or 0 < exact.decimals <= rounded.decimals:
        return False
    return abs(rounded.value - exact.value) * 2 <= Fraction(1, 10**rounded.decimals)


@functools.lru_cache(maxsize=64)
def _folded(units: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(fold_unit, units))


def _compare_as_texts(prediction: str, truth: str, number: Number | None) -> bool | None:
    """Returns whether an answer equals a truth that is not a number. Returns None if this is unclear.

    ``number`` is the number in the answer, or None.
    """
    if is_case_off(prediction, truth):
        return None
    correct = compare_texts(prediction, truth)
    if correct is not False:
        return correct
    constant, other = (_CONSTANTS.get(fold(clean_answer(text))) for text in (truth, prediction))
    if constant and other:
        return constant == other
    if re.search(r"\d", truth) or ((number or other) and (constant or _SYMBOL.search(truth))):
        return None  # an expression, a range, a list or a date, of which the answer may be another form
    if number is None:
        return None if re.search(r"\d", prediction) else False
    is_number = _ROMAN.fullmatch(truth) or ANY_WORD.search(truth) or (number.value == 0 and fold(truth) in _NOTHING)
    return None if is_number else False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NumberMatcher(Matcher):
    """Compares numbers with a tolerance. If the truth is not a number, compares texts without regard to case.

    A number is right if ``|number - truth| <= relative * |truth|``. If the truth is 0, ``|number| <= absolute`` is
    required instead. Units are converted: if the truth is "7 m", "700 cm" is right, and "7 km" is wrong. A currency
    may be missing: "$7" equals "7".

    If the truth is a number, an answer is unreadable in cases such as the following:

    - The answer has no number, or several numbers.
    - The answer has a decimal comma, such as "1,5".
    - A unit is missing in the answer or in the truth, but both may mean the same quantity: "7" or "700" for "7 m".
      With "m" in ``units``, "7" is right.
    - The numbers are equal only after rounding, such as "3.14" and "3.14159".

    Attributes:
        relative: Tolerance as a fraction of the truth. The authors of MPO use 1e-3, so that 2023 matches 2024.
        absolute: Absolute tolerance, used only if the truth is 0.
        percent: "ignore" drops the percent sign, so 5% equals 5. "ratio" reads 5% as 0.05. "keep" reads the sign as a
            unit: "5%" never equals "5" or "0.05".
        degrees: Whether "°", "degree", "degrees" or "deg" may be missing in the answer or in the truth.
        units: Units that may be missing in the answer or in the truth; "any" means every unit.
    """

    kind: ClassVar[str] = "number"
    relative: float = 1e-6
    absolute: float = 1e-9
    percent: Literal["ignore", "ratio", "keep"] = "ignore"
    degrees: bool = True
    units: Sequence[str] | Literal["any"] = ()
    _rule: NumberRule = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("relative", self.relative, "[0, 1]")
        check_number("absolute", self.absolute, "[0, inf)")
        check_choice("percent", self.percent, ("ignore", "ratio", "keep"))
        check_flag("degrees", self.degrees)
        if self.units != "any" and (
            isinstance(self.units, str) or not all(isinstance(unit, str) and unit.strip() for unit in self.units)
        ):
            raise ValueError(f"units must be 'any' or a list of units, got {shorten(self.units)}")
        names = ("relative", "absolute", "percent", "degrees", "units")
        object.__setattr__(self, "_rule", NumberRule(**{name: getattr(self, name) for name in names}))

    def _compare(self, prediction: str, truth: str) -> Verdict:
        predicted, true = parse_number(prediction), parse_number(truth)
        if predicted is None or true is None:
            folded, folded_truth = fold(clean_answer(prediction)), fold(clean_answer(truth))
            if true is not None:
                is_same = folded == folded_truth and not is_case_off(prediction, truth)
                return self._verdict(True if is_same else None, "text", folded, folded_truth)
            return self._verdict(_compare_as_texts(prediction, truth, predicted), "text", folded, folded_truth)
        correct, name = self._rule.compare(predicted, true)
        return self._verdict(correct, name, number_text(predicted), number_text(true))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChartMatcher(Matcher):
    """Applies the relaxed accuracy of ChartQA: numbers within 5 % of the truth are right.

    If the truth is not a number, the answer is compared as text, ignoring case. Numbers that differ by more than the
    tolerance are wrong, even if they are equal after rounding. Apart from this rule, an answer is unreadable in the
    same cases as for ``NumberMatcher``.

    Attributes:
        relative: Tolerance as a fraction of the truth.
        absolute: Absolute tolerance, used only if the truth is 0.
        years: "relaxed" treats a year like any other number, as the ChartQA paper does. "auto" requires the exact
            number if the truth has four digits and lies between 1800 and 2100. "exact" always requires the text of the
            truth, as ChartQAPro's script does for answers that its data marks as years. With "exact", the same number
            in another form ("2,010") is unreadable.
    """

    kind: ClassVar[str] = "chart"
    relative: float = 0.05
    absolute: float = 0.0
    years: Literal["auto", "exact", "relaxed"] = "auto"

    def __post_init__(self) -> None:
        check_number("relative", self.relative, "[0, 1]")
        check_number("absolute", self.absolute, "[0, inf)")
        check_choice("years", self.years, ("auto", "exact", "relaxed"))

    def _compare(self, prediction: str, truth: str) -> Verdict:
        plain_prediction, plain_truth = fold(clean_answer(prediction)), fold(clean_answer(truth))
        predicted, true = parse_number(prediction), parse_number(truth)
        is_case_equal = not is_case_off(prediction, truth)
        if predicted is None or true is None or (plain_prediction == plain_truth != "" and is_case_equal):
            if true is not None:
                correct = True if plain_prediction == plain_truth and is_case_equal else None
            else:
                correct = _compare_as_texts(prediction, truth, predicted)
            return self._verdict(correct, "text", plain_prediction, plain_truth)
        is_year = bool(_YEAR.fullmatch(plain_truth)) and int(plain_truth) in _YEARS
        is_exact = self.years == "exact" or (self.years == "auto" and is_year)
        relative, absolute = (0.0, 0.0) if is_exact else (self.relative, self.absolute)
        rule = NumberRule(relative=relative, absolute=absolute, is_rounding_wrong=True)
        correct, name = rule.compare(predicted, true)
        if self.years == "exact" and correct:
            correct = None  # "exact" requires the same text, but the answer has the value in another form
        if correct and predicted.value != true.value and "/" in plain_prediction and "/" in plain_truth:
            correct = None  # "10/11" and "11/12" may be dates
        name = "year" if is_exact and name == "value" else name
        return self._verdict(correct, name, number_text(predicted), number_text(true))
