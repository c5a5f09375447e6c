"""Tests the matchers on the table of answers, and on random numbers.

Python's ``fractions`` computes the expected results for the random numbers exactly.
"""

import decimal
import importlib.util
from fractions import Fraction
from typing import Any

import pytest
from answer_table import CHOICES, MATHEMATICS, NUMBERS, TEXTS
from expression_table import EXPRESSIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_ext.answers import is_same_answer, matcher
from mpo_ext.answers.number_text import parse_number
from mpo_ext.answers.units import compare_units

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify (the extra math)"
)
MOST = settings(max_examples=200, deadline=None)


@pytest.mark.parametrize(("options", "truth", "answer", "expected"), NUMBERS)
def test_numbers(options: dict[str, Any], truth: str, answer: str, expected: bool | None) -> None:
    verdict = matcher("number", **options)(answer, truth)
    assert verdict.correct is expected, verdict


@pytest.mark.parametrize(("options", "truth", "answer", "expected"), CHOICES)
def test_choices(options: dict[str, Any], truth: str, answer: str, expected: bool | None) -> None:
    verdict = matcher("choice", **options)(answer, truth)
    assert verdict.correct is expected, verdict


@pytest.mark.parametrize(("kind", "options", "truth", "answer", "expected"), TEXTS)
def test_texts(kind: str, options: dict[str, Any], truth: str, answer: str, expected: bool | None) -> None:
    verdict = matcher(kind, **options)(answer, truth)
    assert verdict.correct is expected, verdict


@needs_math_verify
@pytest.mark.parametrize(("truth", "answer", "expected"), MATHEMATICS + EXPRESSIONS)
def test_mathematics(truth: str, answer: str, expected: bool | None) -> None:
    verdict = matcher("math")(answer, truth)
    assert verdict.correct is expected, verdict


@pytest.mark.parametrize("kind", ["number", "choice", "chart", "anls", "vqa"])
@pytest.mark.parametrize("answer", ["", "  ", "?", "N/A", "I don't know", "It cannot be determined", "unclear"])
def test_no_answer_is_unreadable(kind: str, answer: str) -> None:
    for truth in ("7", "B", "red", "Paris is the capital"):
        assert matcher(kind)(answer, truth).correct is None
        assert not is_same_answer(answer, truth, matcher(kind))


def test_an_answer_is_wrong_only_if_it_is_wrong_for_every_truth() -> None:
    assert matcher("number")("8", ["7", "6"]).correct is False
    assert matcher("number")("8 m", ["7", "8"]).correct is None
    assert matcher("number")("8 m", ["7", "8", "8 m"]).correct is True


def test_options_of_an_item_reach_the_matchers_of_choices() -> None:
    rule = matcher("any", matchers=["choice", "number"])
    assert rule("Paris", "B").correct is None
    assert rule.with_options(["Rome", "Paris"])("Paris", "B").correct is True
    assert matcher("choice", options=["Paris", "Rome"]).with_options(["Rome", "Paris"])("Paris", "A").correct is True
    assert matcher("number").with_options(["Rome"]) == matcher("number")


def test_a_custom_function_may_find_an_answer_unreadable() -> None:
    assert matcher("custom", function=lambda answer, truth: None)("x", "y").correct is None


# ---- An oracle for numbers: decimal and fractions instead of our own reading

RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
decimals = st.decimals(-(10**6), 10**6, allow_nan=False, allow_infinity=False, places=4)


@MOST
@given(value=decimals, exponent=st.integers(-30, 30))
def test_all_spellings_of_a_number_have_its_value(value: decimal.Decimal, exponent: int) -> None:
    exact = Fraction(value) * Fraction(10) ** exponent
    mantissa = f"{value:f}"
    raised = str(exponent).translate(RAISED)
    spellings = [
        f"{mantissa}e{exponent}",
        f"{mantissa}E{exponent:+d}",
        f"{mantissa} x 10^{exponent}",
        f"{mantissa}\\times 10^{{{exponent}}}",
        f"{mantissa}\u00d710{raised}",
        f"{mantissa} \u00b7 10**({exponent})",
        f"x = ${mantissa} \\cdot 10^{{{exponent}}}$",
        f"The answer is {mantissa}e{exponent}.".replace("-", "\u2212"),
    ]
    for text in spellings:
        number = parse_number(text)
        assert number is not None, text
        assert number.value == exact, text


@MOST
@given(value=decimals)
def test_thousands_separators_do_not_change_the_value(value: decimal.Decimal) -> None:
    for separator in (",", "\u202f", " ", "'"):
        number = parse_number(f"{value:,f}".replace(",", separator))
        assert number is not None
        assert number.value == Fraction(value)


@MOST
@given(whole=st.integers(0, 999), numerator=st.integers(1, 99), denominator=st.integers(2, 99))
def test_mixed_numbers(whole: int, numerator: int, denominator: int) -> None:
    exact = whole + Fraction(numerator, denominator)
    for text in (f"{whole} {numerator}/{denominator}", f"{whole}\\frac{{{numerator}}}{{{denominator}}}"):
        number = parse_number(text)
        if numerator >= denominator and "\\" not in text:
            assert number is None
        else:
            assert number is not None
            assert number.value == exact


@MOST
@given(truth=decimals, answer=decimals, exponent=st.integers(-40, 40))
def test_a_verdict_depends_on_the_ratio_and_not_on_the_size(
    truth: decimal.Decimal, answer: decimal.Decimal, exponent: int
) -> None:
    is_close = abs(Fraction(answer) - Fraction(truth)) <= Fraction(1, 10**6) * abs(Fraction(truth))
    verdict = matcher("number")(f"{answer}e{exponent}", f"{truth}e{exponent}")
    if truth != 0:
        assert verdict.correct is is_close, verdict


@MOST
@given(value=st.integers(-(10**9), 10**9))
def test_number_words_are_read(value: int) -> None:
    number = parse_number(_in_words(value))
    assert number is not None, _in_words(value)
    assert number.value == value


def _in_words(value: int) -> str:
    """Returns an integer spelled out in English."""
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    names = f"{small} seventeen eighteen nineteen".split()
    names_of_tens = "_ _ twenty thirty forty fifty sixty seventy eighty ninety"
    tens = names_of_tens.split()
    if value < 0:
        return f"minus {_in_words(-value)}"
    if value < 20:
        return names[value]
    if value < 100:
        return tens[value // 10] + (f"-{names[value % 10]}" if value % 10 else "")
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if value >= size:
            rest = value % size
            joint = " and " if size == 100 else " "
            return f"{_in_words(value // size)} {name}" + (f"{joint}{_in_words(rest)}" if rest else "")
    raise AssertionError(value)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("m", "cm", 100),
        ("km/h", "m/s", Fraction(5, 18)),
        ("kWh", "J", 3_600_000),
        ("L", "cm^3", 1000),
        ("MW", "mW", 10**9),
        ("feet", "inches", 12),
        ("N m", "J", 1),
        ("kg", "m", "different"),
        ("m", "m^2", "different"),
        ("apples", "m", "unclear"),
        ("months", "days", "unclear"),
        ("m", "min", "unclear"),
    ],
)
def test_units(first: str, second: str, expected: Any) -> None:
    assert compare_units(first, second) == expected
    factor = compare_units(second, first)
    assert factor == (expected if isinstance(expected, str) else 1 / Fraction(expected))
