import concurrent.futures
import importlib.util
import itertools
import multiprocessing
import pickle
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_ext.answers import STYLES, Verdict, clean_answer, extract_answer, is_same_answer, matcher, math_process
from mpo_ext.answers.normalize import fold
from mpo_ext.answers.numbers import parse_number
from mpo_ext.answers.text import anls, normalize_vqa

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify (the extra math)"
)

EXTRACTION = [
    # What the prompts ask for: the last marker, its line.
    ("final_answer", "It is red.\nFinal answer: red", "red"),
    ("final_answer", "FINAL ANSWER: Red", "Red"),
    ("final_answer", "final answer:red\n", "red"),
    ("final_answer", "Final answer: A\nNo, wait.\nFinal answer: B", "B"),
    ("final_answer", "Final answer: 12.", "12"),
    ("final_answer", "Final answer: 12.5.", "12.5"),
    ("final_answer", "Final answer: B\n\nI hope this helps!", "B"),
    ("final_answer", "Final answer:\n\nB", "B"),
    ("final_answer", "Final answer is: B", "B"),
    ("final_answer", "Final answer\uff1a B", "B"),
    ("final_answer", "Final answer: the U.S.", "the U.S."),
    ("final_answer", "Final answer: None", "None"),
    # Markdown around the marker, the answer, or both.
    ("final_answer", "**Final answer:** B", "B"),
    ("final_answer", "**Final answer**: B", "B"),
    ("final_answer", "**Final answer: B**", "B"),
    ("final_answer", "**Final answer:** **B**", "B"),
    ("final_answer", "**Final answer:**\n**B**", "B"),
    ("final_answer", "### Final answer: `B`", "B"),
    ("final_answer", "Final answer: 2**3", "2**3"),
    # Mathematics
    ("final_answer", "Final answer: $5$", "5"),
    ("final_answer", "Final answer: $5 and $6", "$5 and $6"),
    ("final_answer", "Final answer: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("final_answer", "Final answer:\n\\[\n5\n\\]", "5"),
    ("final_answer", "Final answer:\n\\boxed{\n5\n}\nDone.", "5"),
    ("final_answer", "Final answer: \\boxed{A}, \\boxed{C}", "\\boxed{A} , \\boxed{C}"),
    ("final_answer", "Final answer: \\boxed{A} or \\boxed{C}.", "\\boxed{A} or \\boxed{C}"),
    ("final_answer", "Final answer: \\boxed{A}. So \\boxed{A} fits.", "A"),
    ("final_answer", "Final answer: \\boxed{7} km.\nDone.", "\\boxed{7} km"),
    ("final_answer", "Final answer: $$7$$ km", "7 km"),
    ("final_answer", "Final answer: \\boxed{7} because it fits", "7"),
    # What continues an answer after its box or block belongs to it.
    ("final_answer", "Final answer: \\boxed{5} \\times 10^3", "5 \\times 10^3"),
    ("final_answer", "Final answer: \\boxed{3}\\pi", "3 \\pi"),
    ("final_answer", "Final answer: \\boxed{a+b}^2", "(a+b) ^2"),
    ("final_answer", "Final answer: \\boxed{-3} \\cdot 2.", "-3 \\cdot 2"),
    ("final_answer", "Final answer: \\boxed{2} or 3", "2 or 3"),
    ("final_answer", "Final answer: \\boxed{A} or B", "A or B"),
    ("final_answer", "Final answer: \\boxed{A}, B", "A , B"),
    ("final_answer", "Final answer: \\boxed{A} and B.", "A and B"),
    ("final_answer", "Final answer: $$7$$ or $$8$$", "7 or $$8$$"),
    ("final_answer", "Final answer: \\boxed{7} million", "7 million"),
    ("final_answer", "Final answer: \\boxed{50}\\%", "50 \\%"),
    ("final_answer", "Final answer: \\boxed{50} %", "50 %"),
    ("final_answer", "Final answer: \\boxed{3}x", "3x"),
    ("final_answer", "Final answer: \\boxed{7} \\text{ apples}", "7 \\text{ apples}"),
    ("final_answer", "Final answer: \\boxed{7} - it fits", "7"),
    ("final_answer", "Final answer: \\boxed{7} (since 3 + 4 is 7)", "7"),
    ("final_answer", "Final answer: \\boxed{7}, which is a prime", "7"),
    ("final_answer", "Final answer: \\boxed{7}. 3 of them are red.", "7"),
    ("final_answer", "Final answer: \\boxed{7} \\quad \\blacksquare", "7"),
    ("final_answer", "Final answer: \\boxed{7}!", "7"),
    ("final_answer", "Final answer: \\boxed{7}**", "7"),
    ("final_answer", "Final answer: \\boxed{5} (or 6)", "5 (or 6)"),
    ("final_answer", "Final answer: \\boxed{A}? or B", "A ? or B"),
    ("final_answer", "Final answer: \\boxed{7}.5", "7.5"),
    ("final_answer", "Final answer: \\boxed{5},000", "5,000"),
    # Lists and emphasis
    ("final_answer", "Final answer:\n- 7", "7"),
    ("final_answer", "Final answer: -7", "-7"),
    ("final_answer", "Final answer:\n-7", "-7"),
    ("final_answer", "Final answer:\n* **B**", "B"),
    ("final_answer", "Final answer:\n- A\n- C\nDone.", "A, C"),
    ("final_answer", "__Final answer:__ 7", "7"),
    ("final_answer", "_Final answer:_ 7", "7"),
    ("final_answer", "***Final answer:*** 7", "7"),
    ("final_answer", "\\textbf{Final answer:} 7", "7"),
    ("final_answer", "Final answer:\n\u2013 7", "7"),
    ("final_answer", "*Final answer: 7*", "7"),
    ("final_answer", "_Final answer: 7_", "7"),
    ("final_answer", "*Final answer*: *7*", "7"),
    # No parsable answer
    ("final_answer", "The answer is red.", None),
    ("final_answer", "Final answer:", None),
    ("final_answer", "Final answer: **", None),
    ("final_answer", 'Please write "Final answer: .."', None),
    ("final_answer", "Final answer: ..", None),
    ("final_answer", "Final answer: A\nFinal answer: ", None),
    ("final_answer", "", None),
    # The box: the last, balanced, closed
    ("boxed", "so \\boxed{5}", "5"),
    ("boxed", "\\boxed{1} and \\boxed{2}", "2"),
    ("boxed", "\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
    ("boxed", "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("boxed", "\\boxed {5}", "5"),
    ("boxed", "\\boxed{\\text{B}}", "B"),
    ("boxed", "\\boxed{\\boxed{5}}", "5"),
    ("boxed", "Answer: \\boxed{$B$}", "B"),
    ("boxed", "\\boxed{}", None),
    ("boxed", "\\boxed{ }", None),
    ("boxed", "\\boxed{5", None),
    ("boxed", "\\boxed{1} then \\boxed{2", None),
    ("boxed", "the answer is 5", None),
    # "Answer:" also ends "Final answer:"
    ("answer", "Answer: \\boxed{5}", "5"),
    ("answer", "Answer: 5\nAnswer: 6", "6"),
    ("answer", "Final answer: 6", "6"),
    ("answer", "Reanswer: 6", None),
    ("direct", "  red.\n", "red"),
    ("direct", "**red**", "red"),
    ("direct", "...", None),
    ("direct", " \n", None),
    # A pattern of the user
    (r"regex:<answer>(.*?)</answer>", "<answer>1</answer><answer>2</answer>", "2"),
    (r"regex:<answer>(.*?)</answer>", "2", None),
    (r"regex:(.*)", "It is 2", "It is 2"),
    (re.compile(r"= (\d+)|never"), "1 + 1 = 2", "2"),
    (re.compile(r"= (\d+)|never"), "never", None),
]

CAPITALS = {"options": ["Rome", "Paris", "A cat", "The end."]}
GIVEN = {"options": ["42", "B", "17"]}

MATCHING = [
    # Letters as models write them; the facts behind the rules are those of multiple-choice benchmarks (MMMU, M3CoT).
    ("choice", {}, "B", "B", True),
    ("choice", {}, "(B)", "B", True),
    ("choice", {}, "B.", "B", True),
    ("choice", {}, "b", "B", True),
    ("choice", {}, "[B]", "B", True),
    ("choice", {}, "B. Paris", "B", True),
    ("choice", {}, "(B) Paris", "B", True),
    ("choice", {}, "B) Paris", "B", True),
    ("choice", {}, "B: Paris", "(B)", True),
    ("choice", {}, "**B**", "B", True),
    ("choice", {}, "\\text{B}", "B", True),
    ("choice", {}, "\uff22", "B", True),
    ("choice", {}, "Option B", "B", True),
    ("choice", {}, "The correct answer is (B)", "B", True),
    ("choice", {}, "C", "B", False),
    ("choice", {}, "B", "AB", False),
    ("choice", {}, "Paris", "B", None),
    ("choice", {}, "B. Paris", "Paris", True),
    ("choice", {}, "Paris", "B. Paris", True),
    # The article "A" is a letter where it stands alone, and only there.
    ("choice", {}, "A", "A", True),
    ("choice", {}, "A.", "A", True),
    ("choice", {}, "A", "(A)", True),
    ("choice", {}, "A", "A. Rome", True),
    ("choice", {}, "A", "B", False),
    ("choice", {}, "A cat", "A", None),
    ("choice", {}, "a cat", "A", None),
    ("choice", CAPITALS, "A cat", "C", True),
    ("choice", CAPITALS, "a CAT.", "C", True),
    # The text of an option
    ("choice", CAPITALS, "paris", "B", True),
    ("choice", CAPITALS, "The end", "D", True),
    ("choice", CAPITALS, "Rome", "B", False),
    ("choice", CAPITALS, "B. Paris", "B", True),
    ("choice", CAPITALS, "B. The city of Paris", "B", True),
    ("choice", CAPITALS, "B. Rome", "B", None),
    ("choice", CAPITALS, "B. Rome", "A", None),
    ("choice", CAPITALS, "F", "B", None),
    ("choice", CAPITALS, "Par", "B", None),
    ("choice", GIVEN, "17", "C", True),
    ("choice", GIVEN, "B", "B", True),
    ("choice", {"options": {"A": "yes", "C": "no"}}, "No.", "C", True),
    ("choice", {"options": ["same", "same"]}, "same", "B", None),
    # Numbers: by hand, exact where written exactly.
    ("number", {}, "5", "5", True),
    ("number", {}, "5.0", "5", True),
    ("number", {}, "5.", "5", True),
    ("number", {}, "+5", "5", True),
    ("number", {}, "-5", "-5", True),
    ("number", {}, "\u22125", "-5", True),
    ("number", {}, "-5", "5", False),
    ("number", {}, "5", "-5", False),
    ("number", {}, "-$5", "$-5", True),
    ("number", {}, "12", "1", False),
    ("number", {}, "1", "12", False),
    ("number", {}, "1,234,567", "1234567", True),
    ("number", {}, "1,23", "123", None),
    ("number", {}, "1,2345", "12345", None),
    ("number", {}, ".5", "0.5", True),
    ("number", {}, "1/2", "0.5", True),
    ("number", {}, "-1/2", "-0.5", True),
    ("number", {}, "1 1/2", "1.5", True),
    ("number", {}, "\\frac{1}{2}", "0.5", True),
    ("number", {}, "1/0", "0", None),
    ("number", {}, "1e-3", "0.001", True),
    ("number", {}, "2.5 x 10^3", "2500", True),
    ("number", {}, "2.5 \\times 10^{3}", "2,500", True),
    ("number", {}, "2.5 \u00d7 10^-3", "0.0025", True),
    ("number", {}, "5\u00b2", "52", False),
    ("number", {}, "five", "5", True),
    ("number", {}, "None", "none", True),
    ("number", {}, "5 or 6", "5", None),
    ("number", {"units": "any"}, "5 or 6", "5", None),
    # Target 0: relative tolerance is none there, the absolute one counts (accuracy_reward.py compares strings).
    ("number", {}, "0.0", "0", True),
    ("number", {}, "-0", "0", True),
    ("number", {}, "0.01", "0", False),
    ("number", {"absolute": 0.01}, "0.01", "0", True),
    # Tolerance. The authors' 1e-3 is an option: it takes 2023 for 2024.
    ("number", {}, "2023", "2024", False),
    ("number", {"relative": 1e-3}, "2023", "2024", True),
    ("number", {"relative": 0.05}, "1.05", "1", True),
    ("number", {"relative": 0.05}, "1.0500001", "1", False),
    ("number", {"relative": 0.05}, "-1.05", "-1", True),
    ("number", {"relative": 0.3}, "1.3", "1", True),  # the double 0.3 is less than 3/10
    # Percent, degrees, units, currencies
    ("number", {}, "50%", "50", True),
    ("number", {}, "50\\%", "50", True),
    ("number", {"percent": "ratio"}, "50%", "0.5", True),
    ("number", {"percent": "ratio"}, "50%", "50", False),
    ("number", {"percent": "keep"}, "50%", "50", False),
    ("number", {"percent": "keep"}, "50%", "50 %", True),
    ("number", {}, "30\u00b0", "30", True),
    ("number", {}, "30^\\circ", "30 degrees", True),
    ("number", {"degrees": False}, "30\u00b0", "30", None),
    ("number", {}, "5 cm", "5", None),
    ("number", {"units": ["cm"]}, "5 cm", "5", True),
    ("number", {"units": ["cm"]}, "5\\text{ cm}", "5 CM", True),
    ("number", {"units": "any"}, "5 apples", "5", True),
    ("number", {"units": "any"}, "5 cm", "5 m", False),
    ("number", {}, "$5", "5", True),
    ("number", {}, "$5", "\u20ac5", False),
    # Chart: ChartQA paper (2203.10244, section 5.1): 5 % for numbers, else the same text; ChartQAPro's
    # evaluate_predictions.py strips "%" and wants years exactly.
    ("chart", {}, "105", "100", True),
    ("chart", {}, "95", "100", True),
    ("chart", {}, "105.1", "100", False),
    ("chart", {}, "-100", "100", False),
    ("chart", {}, "10.2%", "10", True),
    ("chart", {}, "1,020", "1000", True),
    ("chart", {}, "0.0", "0", True),
    ("chart", {}, "0.1", "0", False),
    ("chart", {}, "2010", "2011", False),
    ("chart", {}, "2011", "2011", True),
    ("chart", {"years": "relaxed"}, "2010", "2011", True),
    ("chart", {}, "3010", "3011", True),
    ("chart", {"years": "exact"}, "3010", "3011", False),
    ("chart", {}, "2011.5", "2010.5", True),
    ("chart", {}, "blue", "Blue", True),
    ("chart", {}, "blue", "light blue", None),
    ("chart", {}, "Yes", "no", False),
    # ANLS: DocVQA (2007.00398) and its evaluation script; the direction is the point.
    ("anls", {}, "Total Amount", "total  amount", True),
    ("anls", {}, "Total Amout", "Total Amount", True),
    ("anls", {}, "cat", "dog", False),
    ("anls", {}, "completely different words", "xyz", False),
    ("anls", {}, "kitten", "sitting", None),
    ("anls", {"accept": 0.5}, "kitten", "sitting", True),
    ("anls", {}, "no", "none", None),
    ("anls", {}, "10 May 2001", "10 May 2011", False),
    ("anls", {"exact_digits": False}, "10 May 2001", "10 May 2011", True),
    ("anls", {"accept": 1}, "Total Amout", "Total Amount", None),
    # VQA: processPunctuation and processDigitArticle of VQA's evaluation code
    ("vqa", {}, "The Dog", "dog", True),
    ("vqa", {}, "two", "2", True),
    ("vqa", {}, "none", "0", True),
    ("vqa", {}, "dont know", "don't know", True),
    ("vqa", {}, "Yes!", "yes", True),
    ("vqa", {}, "t-shirt", "t shirt", True),
    ("vqa", {}, "1,000", "1000", True),
    ("vqa", {}, "U.S.A.", "usa", True),
    ("vqa", {}, "well", "we'll", False),
    ("vqa", {}, "dog", "hot dog", None),
    ("vqa", {}, "no", "none", False),
    ("vqa", {}, "one", "none", False),
    # ... and what it loses: signs, points, fractions, answers that are all article or punctuation
    ("vqa", {}, "-5", "5", False),
    ("vqa", {}, "-5", "-5", True),
    ("vqa", {}, "x=-3", "x=3", False),
    ("vqa", {}, "-.5", ".5", False),
    ("vqa", {}, "3.14", "314", False),
    ("vqa", {}, "1/2", "1 2", False),
    ("vqa", {}, "<5", ">5", False),
    ("vqa", {}, "A", "A", True),
    ("vqa", {}, "A", "B", False),
    ("vqa", {}, "vitamin A", "vitamin", None),
    ("vqa", {}, "?", "?", True),
    ("vqa", {}, "?", "!", None),
    ("vqa", {}, "?", "red", None),
    # Text
    ("exact", {}, " Red ", "Red", True),
    ("exact", {}, "red", "Red", False),
    ("exact", {"ignore_case": True}, "red", "Red", True),
    ("exact", {}, "1", "12", False),
    # Several rules
    ("any", {"matchers": ["choice", "number"]}, "5.0", "5", True),
    ("any", {"matchers": ["choice", {"kind": "number", "relative": 0.1}]}, "5.2", "5", True),
    ("any", {"matchers": ["choice", "number", "vqa"]}, "-5", "5", False),
]

MATH = [
    # math-verify's README: equivalence of expressions, sets, intervals, relations; latex and plain text
    ("\\frac{1}{2}", "0.5", True),
    ("1/2", "\\frac{2}{4}", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("\\sqrt{8}", "2\\sqrt{2}", True),
    ("sqrt(2)", "\\sqrt{2}", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("x=5", "5", True),
    ("5", "x=5", True),
    ("12,345", "12345", True),
    ("\\boxed{3}", "3", True),
    ("30^\\circ", "30", True),
    ("-5", "5", False),
    ("x=-3", "x=3", False),
    ("12", "1", False),
    ("1", "12", False),
    ("0.0", "0", True),
    ("3\\pi", "9", False),
    ("A", "A", True),
    ("A", "B", False),
    # Words are not products of letters.
    ("no", "on", False),
    ("\\text{no}", "on", False),
    ("Yes", "yes", True),
    ("no", "none", False),
    ("none", "nil", None),
    ("no solution", "none", None),
    ("sin x", "\\sin x", True),
    ("log x", "sin x", False),
    ("sin of x", "\\sin x", None),
    ("{{{", "5", None),
]


@pytest.mark.parametrize(("style", "response", "answer"), EXTRACTION)
def test_extraction(style, response, answer):
    assert extract_answer(response, style) == answer


@pytest.mark.parametrize(("kind", "options", "prediction", "truth", "correct"), MATCHING)
def test_matching(kind, options, prediction, truth, correct):
    verdict = matcher(kind, **options)(prediction, truth)
    assert verdict.correct is correct, verdict
    assert kind == "any" or verdict.rule.startswith(f"{kind}:")


@needs_math_verify
@pytest.mark.parametrize(("prediction", "truth", "correct"), MATH)
def test_mathematics(prediction, truth, correct):
    assert matcher("math")(prediction, truth).correct is correct


# ---- What the authors' scripts get wrong


def test_anls_falls_with_the_distance():
    anls = matcher("anls", accept=0.5)
    scores = [anls(text, "abcdefghij").score for text in ("abcdefghij", "abcdefghi", "abcdefg", "abcde", "abcd", "z")]
    assert scores == pytest.approx([1, 0.9, 0.7, 0.5, 0, 0])


def test_a_hit_is_not_taken_back_by_a_later_rule():
    kinds = ["custom", "vqa", "choice", "number"]
    rules = [{"kind": kind, **({"function": lambda a, b: True} if kind == "custom" else {})} for kind in kinds]
    for order in itertools.permutations(rules):
        assert matcher("any", matchers=order)("?!", "A").correct


@needs_math_verify
def test_a_hit_of_math_verify_is_not_taken_back_by_a_later_rule():
    for kinds in itertools.permutations(["math", "vqa", "choice", "exact"]):
        verdict = matcher("any", matchers=kinds)("\\sqrt{4}/4", "0.5")
        assert (verdict.correct, verdict.rule) == (True, "math:equivalence")


PLAIN_KINDS = ["exact", "choice", "number", "chart", "anls", "vqa"]


@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize("answer", ["no", "one", "n", "e", "on", "none", "None"])
def test_what_could_not_be_read_is_the_same_as_no_answer(kind, answer):
    assert not is_same_answer(answer, None, matcher(kind))
    assert not is_same_answer(None, None, matcher(kind))
    assert is_same_answer(answer, "None", matcher(kind)) is (answer.lower() == "none")


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_a_part_of_an_answer_is_another_answer(kind):
    assert not is_same_answer("1", "12", matcher(kind))
    assert not is_same_answer("-5", "5", matcher(kind))


@needs_math_verify
def test_a_pair_of_equal_answers_is_found_either_way_round():
    assert is_same_answer("D", "(D)", matcher("choice"))
    assert is_same_answer("105", "100", matcher("chart"))
    assert is_same_answer("95.2", "100", matcher("chart"))
    assert is_same_answer("100", "95.2", matcher("chart"))  # 5.04 % of 95.2, 4.8 % of 100
    assert is_same_answer("\\frac12", "0.5", matcher("math"))
    assert not is_same_answer("D", "C", matcher("choice"))


# ---- Several truths


def test_of_several_truths_one_is_enough():
    verdict = matcher("number")("5.0", ["four", "5", "6"])
    assert (verdict.correct, verdict.truth) == (True, "5")
    assert not matcher("exact")("5", ["four", "6"]).correct


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_vqa_accuracy_counts_annotators(agreeing, score):
    truths = ["the Dog"] * agreeing + ["cat"] * (10 - agreeing)
    verdict = matcher("vqa")("dog", truths)
    assert verdict.score == pytest.approx(score)
    assert verdict.correct is (agreeing >= 3 or (None if agreeing else False))  # a few annotators: neither
    assert matcher("vqa", accept=0.3)("dog", truths).correct is (agreeing >= 1)


def test_one_truth_in_a_list_is_right_or_wrong():
    assert matcher("vqa")("dog", ["Dog"]).score == 1
    assert matcher("vqa")("cat", ["Dog"]).score == 0
    assert matcher("any", matchers=["vqa"])("dog", ["dog"] * 3 + ["cat"] * 7).correct


# ---- Properties

texts = st.text(max_size=40) | st.text("01259.,-+%/e$\\{}()[]*:ABab \n", max_size=20)
ALL_PLAIN = [matcher(kind) for kind in PLAIN_KINDS] + [
    matcher("choice", options=["Rome", "A cat", "-1"]),
    matcher("number", units="any", percent="ratio", relative=0.01),
    matcher("chart", years="exact"),
    matcher("any", matchers=["number", "choice", "vqa"]),
]
MOST = settings(max_examples=150, deadline=None)


@MOST
@given(prediction=texts, truth=texts)
def test_no_text_breaks_a_matcher(prediction, truth):
    for each in ALL_PLAIN:
        verdict = each(prediction, truth)
        assert 0 <= verdict.score <= 1
        assert not verdict.correct or (prediction.strip() and truth.strip())


@MOST
@given(response=texts, wrapped=st.sampled_from(["{}", "Final answer: {}", "**Answer:** {}", "\\boxed{{{}}}"]))
def test_no_text_breaks_extraction(response, wrapped):
    for style in STYLES:
        answer = extract_answer(wrapped.format(response), style)
        assert answer is None or (answer == answer.strip() != "" and clean_answer(answer) == answer)


@MOST
@given(truth=texts)
def test_a_truth_matches_itself(truth):
    answer = extract_answer(truth, "direct")
    if answer is None:
        return
    for each in ALL_PLAIN:
        assert each(answer, answer).correct, each
        assert is_same_answer(answer, answer, each)


@MOST
@given(first=texts, second=texts)
def test_rules_without_a_truth_are_symmetric(first, second):
    for each in ALL_PLAIN:
        assert is_same_answer(first, second, each) == is_same_answer(second, first, each)
    for kind in ("exact", "choice", "anls", "vqa"):
        there, back = matcher(kind)(first, second), matcher(kind)(second, first)
        assert (there.correct, there.score) == (back.correct, back.score)


@MOST
@given(value=st.fractions(-1000, 1000, max_denominator=1000), other=st.integers(-1000, 1000))
def test_numbers_are_read_as_written(value, other):
    number = parse_number(f"{value.numerator}/{value.denominator}" if value.denominator > 1 else str(value))
    assert number is not None
    assert number.value == value
    assert parse_number(f"{other:,}").value == other
    assert parse_number(f"{other / 8!r}").value == Fraction(other, 8)
    assert matcher("number")(str(other), str(value)).correct is (value == other)


@MOST
@given(left=st.text("ab", max_size=6), right=st.text("ab", max_size=6))
def test_anls_counts_the_edits_of_a_shortest_path(left, right):
    def recursive(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, recursive(a[1:], b[1:]) + (a[0] != b[0]))

    longer = max(len(left), len(right))
    assert anls(left, right, threshold=0) == (1 - recursive(left, right) / longer if longer else 0)


@MOST
@given(text=texts)
def test_normal_forms_stay_what_they_are(text):
    once = normalize_vqa(text)
    assert once == once.strip()
    assert fold(fold(text)) == fold(text)


@needs_math_verify
@settings(max_examples=40, deadline=None)
@given(prediction=st.text("0123456789+-*/=().,xyAB \\{}", max_size=12))
def test_no_text_breaks_math(prediction):
    quick = matcher("math", seconds=2)
    assert quick(prediction, "7").score in (0, 1)
    if extract_answer(prediction, "direct"):
        assert quick(prediction, prediction).correct


# ---- math-verify's process


@needs_math_verify
@pytest.mark.parametrize(("seconds", "grace_seconds"), [(1, 60), (60, -59)], ids=["by the kernel", "by the parent"])
@pytest.mark.parametrize("hostile", ["10^{10^{10^{10}}}", "(10^{9})!"])
def test_a_hostile_expression_ends_in_time(hostile, seconds, grace_seconds, monkeypatch):
    assert matcher("math")("\\sqrt{4}/4", "0.5").correct  # the process runs
    monkeypatch.setattr(math_process.MathProcess, "GRACE_SECONDS", grace_seconds)
    start = time.monotonic()
    verdict = matcher("math", seconds=seconds)(hostile, "5")
    assert time.monotonic() - start < 15
    assert (verdict.correct, verdict.rule) == (None, "math:unfinished")
    monkeypatch.undo()
    assert matcher("math", seconds=10)("\\sqrt{4}/4", "0.5").correct  # with a new process


@needs_math_verify
def test_math_in_threads():
    rule = matcher("math")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        right = list(pool.map(lambda index: rule(f"\\sqrt{{{index**2}}}/2", f"{index / 2}").correct, range(20)))
        wrong = list(pool.map(lambda index: rule(f"\\sqrt{{{index**2}}}/2", f"{index / 2 + 1}").correct, range(20)))
    assert all(right)
    assert not any(wrong)


def _math_in_worker(index):
    assert matcher("math")(f"\\sqrt{{{index**2}}}/2", f"{index / 2}").correct
    assert not matcher("math")("\\sqrt{4}/3", "0.4").correct
    return math_process.math_process()._process.pid


@needs_math_verify
def test_math_in_forked_daemon_workers():
    assert matcher("math")("\\sqrt{4}/4", "0.5").correct  # the parent has its process already
    with math_process.math_process()._lock:  # as if another thread of the parent were asking just now
        pool = multiprocessing.get_context("fork").Pool(2)
    with pool:
        theirs = pool.map_async(_math_in_worker, range(6)).get(timeout=60)
    assert math_process.math_process()._process.pid not in theirs
    assert matcher("math")("\\sqrt{4}/4", "0.5").correct


@needs_math_verify
@pytest.mark.parametrize("start", ["-c", "-m"])
def test_the_process_imports_nothing_from_the_current_folder(start, tmp_path):
    code = "from mpo_ext.answers import matcher; print(matcher('math')('\\\\sqrt{4}/4', '0.5').correct)"
    (tmp_path / "started.py").write_text(code)
    for name in ("json", "logging", "sympy", "math_verify"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted code ran')")
    # The parent has imported its modules before it enters the folder.
    enter = f"import json, logging, mpo_ext.answers; import os; os.chdir({str(tmp_path)!r})\n"
    command = [sys.executable, "-c", enter + code]
    if start == "-m":
        command = [sys.executable, "-c", f"{enter}import sys; sys.path.insert(0, ''); exec(open('started.py').read())"]
    root = Path(math_process.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@needs_math_verify
def test_a_dead_process_is_replaced():
    assert matcher("math")("\\sqrt{4}/4", "0.5").correct
    process = math_process.math_process()._process
    process.kill()
    process.wait()
    assert matcher("math")("\\sqrt{4}/4", "0.5").correct


def test_without_math_verify_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"install the extra 'math' of mpo-ext"):
        matcher("math")


# ---- Functions of the user


def half(prediction, truth):
    return 0.5


def test_custom_functions():
    assert matcher("custom", function=lambda a, b: a == b)("x", "x").correct
    assert matcher("custom", function="operator:eq")("x", "x") == Verdict(True, 1.0, "custom:operator:eq", "x", "x")
    assert not matcher("custom", function="operator:eq")("x", "y").correct
    assert not matcher("custom", function=half)("x", "x").correct
    assert matcher("custom", function=half, accept=0.5)("x", "x").score == 0.5
    own = Verdict(True, 0.7, "mine", "a", "b")
    assert matcher("custom", function=lambda a, b: own)("x", "x") is own


@pytest.mark.parametrize(
    ("result", "correct"),
    [(np.float64(1), True), (np.float32(0.5), False), (np.bool_(True), True), (np.int64(0), False)],
)
def test_custom_functions_may_return_numpy_scalars(result, correct):
    verdict = matcher("custom", function=lambda prediction, truth: result)("a", "b")
    assert verdict.correct is correct


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("operator", ValueError, "'module:function', got 'operator'"),
        ("operator:nothing", ValueError, "got 'operator:nothing'"),
        ("no_such_module:f", ValueError, "got 'no_such_module:f'"),
        ("sys:path", TypeError, "got 'sys:path', a list"),
        (5, TypeError, "function must be callable or 'module:function', got 5"),
    ],
)
def test_custom_functions_that_are_none(function, error, message):
    with pytest.raises(error, match=message):
        matcher("custom", function=function)


@pytest.mark.parametrize(("result", "error"), [("yes", TypeError), (2, ValueError), (float("nan"), ValueError)])
def test_custom_results_that_are_no_score(result, error):
    with pytest.raises(error, match=rf"the score of .* must be .*, got {result!r}"):
        matcher("custom", function=lambda a, b: result)("x", "x")


# ---- Errors


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("nmber", {}, ValueError, "did you mean 'number'"),
        (
            "number",
            {"relativ": 1},
            ValueError,
            "unknown option 'relativ' of the matcher 'number'; did you mean 'relative'",
        ),
        ("number", {"zzz": 1}, ValueError, "its options: relative, absolute"),
        ("number", {"relative": "1e-3"}, TypeError, "relative must be a number, got '1e-3'"),
        ("number", {"relative": -1}, ValueError, r"relative must be in \[0, 1\], got -1"),
        ("number", {"absolute": float("nan")}, ValueError, "absolute must be finite and not negative, got nan"),
        ("number", {"percent": "drop"}, ValueError, "percent must be one of ignore, ratio, keep, got 'drop'"),
        ("number", {"units": "cm"}, ValueError, "units must be 'any' or a list of units, got 'cm'"),
        ("number", {"degrees": 1}, TypeError, "degrees must be true or false, got 1"),
        ("chart", {"years": "no"}, ValueError, "years must be one of auto, exact, relaxed, got 'no'"),
        ("anls", {"accept": 0}, ValueError, r"accept must be in \(0, 1\], got 0"),
        ("anls", {"threshold": 2}, ValueError, r"threshold must be in \[0, 1\], got 2"),
        ("vqa", {"accept": 0}, ValueError, r"accept must be in \(0, 1\], got 0"),
        ("choice", {"options": "AB"}, TypeError, "options must be a list of texts"),
        ("choice", {"options": []}, ValueError, "options must hold 1 to 26 texts, got 0"),
        ("choice", {"options": [1]}, TypeError, "options must hold strings"),
        ("choice", {"options": {"1": "x"}}, ValueError, "single letters A to Z, got '1'"),
        ("custom", {}, ValueError, "the matcher 'custom' needs the option 'function'"),
        ("any", {"matchers": []}, ValueError, "matchers must be a list of at least one matcher"),
        ("any", {"matchers": [5]}, TypeError, "matchers must hold matchers, kinds or mappings with a kind, got 5"),
    ],
)
def test_wrong_options_are_named(kind, options, error, message):
    with pytest.raises(error, match=message):
        matcher(kind, **options)


def test_arguments_of_the_wrong_type_are_named():
    with pytest.raises(TypeError, match="prediction must be a string, got None"):
        matcher("exact")(None, "x")
    with pytest.raises(TypeError, match="truth must be a string or a list of strings, got 5"):
        matcher("exact")("x", 5)
    with pytest.raises(ValueError, match="truth must hold at least one answer"):
        matcher("vqa")("x", [])
    with pytest.raises(TypeError, match="response must be a string, got None"):
        extract_answer(None)
    with pytest.raises(TypeError, match="style must be a string or a compiled pattern, got 5"):
        extract_answer("x", 5)


@pytest.mark.parametrize("style", ["final", "regex:no group", "regex:(two)(groups)", "regex:(open"])
def test_a_style_that_is_none_is_named(style):
    with pytest.raises(ValueError, match="style must"):
        extract_answer("x", style)


def test_matchers_can_be_sent_to_workers():
    for each in ALL_PLAIN:
        assert pickle.loads(pickle.dumps(each)) == each


@pytest.mark.parametrize(
    ("options", "truth", "answer", "expected"),
    [
        (["blue", "white", "purple", "yellow"], "D", "D. green", None),
        (["blue", "white", "purple", "yellow"], "D", "D. blue and yellow", None),
        (["blue", "white", "purple", "yellow"], "D", "D. The yellow one", True),
        (["blue", "white", "purple", "yellow"], "B. green", "B", None),
        (["6", "4", "5", "3"], "B", "B. 2", None),
        (["3 m", "4 m", "5 m"], "B", "B. -4 m", None),
        (["3 m", "4 m", "5 m"], "B", "B. 4 metres", True),
        (["3 m", "4 m", "5 m"], "B", "C. 5 m", False),
        (["red", "blue", "red"], "A", "C", None),
        (["red", "blue", "red"], "A", "C. red", None),
        (["red", "blue", "red"], "A", "B", False),
    ],
)
def test_a_letter_with_another_text_is_unclear(
    options: list[str], truth: str, answer: str, expected: bool | None
) -> None:
    assert matcher("choice", options=options)(answer, truth).correct is expected
