"""The matchers for numbers."""

import dataclasses
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

from mpo_ext.answers.base import Matcher, Verdict, check_flag
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold
from mpo_ext.checks import check_choice, check_number

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

_YEAR = re.compile(r"[0-9]{4}")
_YEARS = range(1800, 2101)


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """A number from a text, and its currency, percent sign or unit; "" if the number has no unit."""

    value: Fraction
    unit: str = ""


def parse_number(text: str, *, units: Sequence[str] | Literal["any"] = ()) -> Number | None:
    r"""Returns the number in a text, or None if the text contains anything else.

    A number may have a sign, thousands separators ("1,234"), decimals, a power of ten ("1e-3", "2 x 10^5"), a fraction
    ("3/4", "1 1/2", ``\frac{3}{4}``), a currency sign in front, and at the end a percent sign or one of the ``units``.
    ``units="any"`` accepts any one or two words as the unit.
    """
    text = clean_answer(text.translate(TO_ASCII))
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
    return Fraction(repr(float(value)))  # exact decimal: 0.05 is 1/20, so 105 is within 5 % of 100


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
    """Compares numbers with a tolerance, and other answers as text without regard to case.

    A number is correct if ``|prediction - truth| <= max(absolute, relative * |truth|)``. If both numbers have a unit
    or a currency, the two units must be the same.

    Attributes:
        relative: Tolerance as a fraction of the truth. With the authors' 1e-3, 2023 matches 2024.
        absolute: Absolute tolerance, which decides if the truth is 0.
        percent: "ignore" drops the percent sign, "ratio" reads 5% as 0.05, "keep" reads the sign as a unit that both
            numbers or neither number must have.
        degrees: Whether a degree sign or the word "degree", "degrees" or "deg" may follow the number.
        units: Further units that may follow the number; "any" accepts any one or two words.
    """

    kind: ClassVar[str] = "number"
    relative: float = 1e-6
    absolute: float = 1e-9
    percent: Literal["ignore", "ratio", "keep"] = "ignore"
    degrees: bool = True
    units: Sequence[str] | Literal["any"] = ()

    def __post_init__(self) -> None:
        check_number("relative", self.relative, "[0, 1]")
        check_number("absolute", self.absolute, "[0, inf)")
        check_choice("percent", self.percent, ("ignore", "ratio", "keep"))
        check_flag("degrees", self.degrees)
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
        same_unit = len(units - {""}) <= 1 and units != {"", "%"}
        correct = same_unit and _within(predicted.value, true.value, self.relative, self.absolute)
        rule = "value" if same_unit else "unit"
        return self._verdict(correct, rule, _number_text(predicted), _number_text(true))

    def _read(self, text: str) -> Number | None:
        units: Sequence[str] | Literal["any"] = self.units
        if units != "any" and self.degrees:
            units = (*units, *_DEGREES)
        number = parse_number(text, units=units)
        if number is None or number.unit != "%" or self.percent == "keep":
            return number
        return Number(number.value / 100 if self.percent == "ratio" else number.value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChartMatcher(Matcher):
    """Applies the relaxed accuracy of ChartQA: numbers within 5 % of the truth; other answers as text, ignoring case.

    Attributes:
        relative: Tolerance as a fraction of the truth.
        absolute: Absolute tolerance, which decides if the truth is 0.
        years: "auto" compares exactly if the truth has four digits and lies between 1800 and 2100. "exact" compares
            every answer exactly, as ChartQAPro's script does with answers that its data marks as years. "relaxed"
            treats a year like any other number, as the ChartQA paper does.
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
        if self.years == "exact" or predicted is None or true is None:
            return self._verdict(plain_prediction == plain_truth != "", "text", plain_prediction, plain_truth)
        currencies = {predicted.unit, true.unit} - {"", "%"}
        if len(currencies) > 1:
            return self._verdict(False, "unit", _number_text(predicted), _number_text(true))
        if self.years == "auto" and _YEAR.fullmatch(plain_truth) and int(plain_truth) in _YEARS:
            return self._verdict(predicted.value == true.value, "year", _number_text(predicted), plain_truth)
        correct = _within(predicted.value, true.value, self.relative, self.absolute)
        return self._verdict(correct, "value", _number_text(predicted), _number_text(true))
