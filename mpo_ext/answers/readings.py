"""Compares mathematical answers under less common readings, such as "7,0" read as 7.0.

An answer that equals the truth under one of these readings is not counted as wrong.
"""

import dataclasses
import re
from fractions import Fraction
from typing import Literal

from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold
from mpo_ext.answers.number_text import Number, parse_number
from mpo_ext.answers.numbers import NumberRule
from mpo_ext.answers.units import compare_units, parse_unit

_RULE = NumberRule(relative=1e-6, absolute=1e-9, percent="either", units="any")
_ZERO = frozenset(("none", "nil", "nothing", "null", "no", "no solution", "no solutions"))
_COMMA = re.compile(r"(?<![0-9,])([0-9]{1,3}(?:[. ][0-9]{3})+|[0-9]+),([0-9]+)(?![0-9,])")
_MIXED = re.compile(r"(?<![0-9.])([0-9]{1,30})-([0-9]{1,30}\s*/\s*[0-9]{1,30})(?![0-9.])")
_MAGNITUDE = re.compile(r"(?<=[0-9])\s?(k|K|M|m|MM|mn|mln|Mio|B|b|bn|Mrd|G|T|t|tn)(?![^\W_])\.?")
_WORDS = {"k": "thousand", "m": "million", "b": "billion", "g": "billion", "t": "trillion"}
_PART = re.compile(
    r"([0-9]+(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?)\s*([^\W\d_]+\.?|''|[\u00b0'\"\u2032\u2033])(?:\s*,)?(?:\s+and\b)?\s*"
)
_FEET = {"'": "ft", "\u2032": "ft", '"': "inch", "\u2033": "inch"}
_ANGLES = {"'": Fraction(1, 60), "\u2032": Fraction(1, 60), '"': Fraction(1, 3600), "\u2033": Fraction(1, 3600)}
_UNIT = re.compile(
    r"(?:\\[,;:! ]|~|\s)*(?:\\(?:text|mathrm|textrm|mbox)\s*\{\s*([^{}]*?)\s*\}"
    r"|(?<=[\s0-9)}])([^\W\d_]+(?:\s*/\s*[^\W\d_]+)?))"
    r"\s*(?:\^\s*\{?[23]\}?)?\s*$"
)
_POINT = re.compile(r"^[A-Z]['\u2032]?\s*=?\s*(?=(?:\\left\s*)?\([^()]*,)")


def is_symbol(number: Number) -> bool:
    """Returns whether the unit of a number may consist of variables, as in "2b" and "5 xy"."""
    if not number.unit or number.is_currency or number.unit == "%":
        return False
    unit = parse_unit(number.unit)
    return unit is None or (not unit.is_known and len(number.unit) < 4)


def compare_readings(prediction: str, truth: str) -> tuple[bool | None, str]:
    """Compares two answers under further readings. Call this for answers that differ as expressions.

    The readings are:

    - letters as an unknown unit ("7 pcs")
    - a decimal comma ("7,0")
    - a magnitude ("1.5M")
    - a mixed number ("1-1/4")
    - a quantity in several units ("5 ft 6 in")
    - a word for 0 ("none")

    Returns:
        (is_equal, rule). ``is_equal`` is True for equal quantities in several units. The other readings are guesses:
        if the answers are equal under a guess, ``is_equal`` is None. If the units of a quantity do not fit together,
        ``is_equal`` is None, too. If the answers differ under all readings, ``is_equal`` is False. ``rule`` names the
        comparison that decided, such as "value" or "unit".
    """
    prediction, truth = (clean_answer(text.translate(TO_ASCII)) for text in (prediction, truth))
    first, second = parse_number(prediction), parse_number(truth)
    is_quantity = first and second and (_may_have_unit(first, prediction) or _may_have_unit(second, truth))
    if first and second and is_quantity and (first.name == second.name or not (first.name and second.name)):
        return (None, "unit") if _RULE.compare(first, second)[0] is not False else (False, "value")
    sums = _sum(prediction), _sum(truth)
    if "unclear" in sums:
        return None, "reading"
    left, right = sums[0] or first, sums[1] or second
    if any(sums) and isinstance(left, Number) and isinstance(right, Number):
        return _RULE.compare(left, right)
    words = {fold(prediction), fold(truth)}
    if words <= _ZERO:  # "no" also answers a question with yes or no
        return (False, "text") if "no" in words else (None, "reading")
    if (first and is_symbol(first)) or (second and is_symbol(second)):
        return False, "value"  # the number is multiplied by a variable
    for left in (first, *_readings(prediction, first)):
        for right in (second, *_readings(truth, second)):
            if (
                (left is not first or right is not second)
                and left
                and right
                and _RULE.compare(left, right)[0] is not False
            ):
                return None, "reading"
    return False, "value"


def without_unclear_unit(text: str) -> str:
    r"""Removes letters from the end of an expression if they may be a unit: "\sqrt{2} pcs" becomes "\sqrt{2}".

    These letters are an unknown unit, or a known unit that may also be variables ("5m", "m/s").
    """
    text = clean_answer(text)
    match = _UNIT.search(text)
    unit = match and (match[1] or match[2])
    if not match or not unit or not re.search(r"[0-9}]", text[: match.start()]):
        return text
    parsed = parse_unit(unit)
    if parsed is None:
        return text
    if match[2] and len(unit) == 1:
        is_variable = re.sub(r"\\[A-Za-z]+", "", text).count(unit) > 1
        is_unclear = parsed.is_known and not is_variable and parse_number(text) is None
    else:
        is_unclear = not parsed.is_known or "/" in (match[2] or "")
    return text[: match.start()].strip() if is_unclear else text


def without_point(text: str) -> str:
    """Removes the name of a point: "A(2,3)" becomes "(2,3)"."""
    return _POINT.sub("", text)


def with_magnitude(text: str) -> str:
    """Returns a text with a letter such as "M" after a number as a word: "1.5 million" for "1.5M"."""
    magnitude = _MAGNITUDE.search(text)
    if magnitude is None:
        return text
    word = _WORDS[magnitude[1][0].casefold()]
    return f"{text[: magnitude.start()]} {word} {text[magnitude.end() :]}".strip()


def _may_have_unit(number: Number, text: str) -> bool:
    """Returns whether the letters after a number may be an unknown unit: True for "7 pcs", False for "2b"."""
    if not is_symbol(number):
        return False
    is_variable = len(number.unit) == 1 and number.unit.islower() and re.search(rf"[0-9]{number.unit}", text)
    return not is_variable


def _readings(text: str, number: Number | None) -> list[Number | None]:
    if fold(text) in _ZERO:
        return [Number(Fraction(0))]
    texts = [_COMMA.sub(lambda match: re.sub("[. ]", "", match[1]) + f".{match[2]}", text), _MIXED.sub(r"\1 \2", text)]
    readings = [parse_number(each) for each in texts if each != text]
    for each in () if number else (text, texts[0]):
        magnitude = _MAGNITUDE.search(each)
        if magnitude:
            reading = parse_number(with_magnitude(each))
            if reading and magnitude[1] in ("b", "t", "m"):  # "2b" is 2 billion or has the variable b; it is never 2
                reading = dataclasses.replace(reading, others=())
            readings.append(reading)
    return readings


def _sum(text: str) -> Number | Literal["unclear"] | None:
    """Converts a quantity in several units to a number in the first unit: "5 ft 6 in" becomes 5.5 ft.

    Returns "unclear" if the units do not fit together, and None if the text is not such a quantity.
    """
    sign = -1 if text.startswith("-") else 1
    position, parts = len(text) - len(text.lstrip("-")), []
    while position < len(text):
        match = _PART.match(text, position)
        number = match and parse_number(match[1])
        if match is None or number is None:
            return None
        parts.append((number.value, match[2].replace("''", '"')))
        position = match.end()
    if len(parts) < 2 or not any(_is_unit(name) for _, name in parts):
        return None
    is_angle = parts[0][1] == "\u00b0"
    unit = _FEET.get(parts[0][1], parts[0][1])
    total, last = parts[0][0], Fraction(1)
    for value, name in parts[1:]:
        factor = _ANGLES.get(name, "unclear") if is_angle else compare_units(_FEET.get(name, name), unit)
        if isinstance(factor, str) or not factor < last:
            return "unclear"
        total, last = total + value * factor, factor
    return Number(sign * total, unit) if _is_unit(unit) else "unclear"


def _is_unit(name: str) -> bool:
    parsed = parse_unit(_FEET.get(name, name))
    return parsed is not None and parsed.is_known
