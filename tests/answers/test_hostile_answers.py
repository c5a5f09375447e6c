"""Tests that extracting and matching hostile answers stays within a time limit.

``make audit`` tries 10,000 answers with a limit of 50 ms each. The default limit is longer, for busy machines.
"""

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hostile_answers import FOUND, hostile_answer

from mpo_ext.answers import STYLES, extract_answer, matcher
from mpo_ext.answers.extract import all_boxes
from mpo_ext.answers.matchers import MATCHERS
from mpo_ext.answers.math import MathMatcher
from mpo_ext.answers.math_process import MathProcess

CASES = int(os.environ.get("MPO_HOSTILE_ANSWERS", "150"))
SECONDS = float(os.environ.get("MPO_HOSTILE_SECONDS", "1"))
KINDS = [kind for kind in MATCHERS if kind not in ("custom", "any")]
TRUTHS = ("7", "x . . .", "A", "a brown dog", "\\frac{1}{2}", "1,234.5 km")


@pytest.fixture(autouse=True)
def _without_helper_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the helper process of the matcher "math". That process has its own time limit."""
    monkeypatch.setattr(MathProcess, "compare", lambda *arguments: "unfinished")


def seconds_of(answer: str, truths: tuple[str, ...] = TRUTHS) -> dict[str, float]:
    """Measures all extraction styles on ``answer``, and all matchers on the extracted texts and ``answer``.

    The matchers compare these texts with the correct answers ``truths``, and with ``answer`` itself. Returns a dict
    from style or matcher to CPU seconds. For a matcher, this is the time of the slowest comparison.
    """
    seconds = {}

    def measure(name: str, call: object, *arguments: object) -> object:
        start = time.thread_time()
        result = call(*arguments)
        seconds[name] = max(seconds.get(name, 0), time.thread_time() - start)
        return result

    extracted = {measure(style, extract_answer, answer, style) for style in STYLES} | {answer}
    for kind in KINDS:
        rule = matcher(kind)
        for text in extracted - {None, ""}:
            for truth in (*truths, answer):
                measure(kind, rule, text, truth)
                measure(kind, rule, truth, text)
    return seconds


def check(answer: str) -> None:
    slow = {name: taken for name, taken in seconds_of(answer).items() if taken > SECONDS}
    if slow:  # once more, because of what else runs on the machine; the caches are empty for another text
        slow = {name: taken for name, taken in seconds_of(answer + ".").items() if taken > SECONDS}
    assert not slow, (answer[:60], len(answer), slow)


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_the_answers_that_took_long(number: int) -> None:
    check(FOUND[number])


def test_hostile_answers(record_property: Callable[[str, Any], None]) -> None:
    record_property("cases", CASES)
    rng = random.Random(CASES)
    for _ in range(CASES):
        check(hostile_answer(rng))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_answer_is_right_only_if_it_is_the_truth(kind: str) -> None:
    rule, long = matcher(kind), "a brown dog " * 500
    assert rule(long, long.upper() if kind != "exact" else long).correct is True
    verdict = rule(long, long + "x")
    assert (verdict.correct, verdict.rule) == ((False, "exact:text") if kind == "exact" else (None, f"{kind}:length"))
    assert rule(long, "7").correct is (False if kind == "exact" else None)


def test_all_boxes_are_found_in_one_pass() -> None:
    assert all_boxes("\\boxed{a} } \\boxed{b{c}\\}} \\boxed {\\boxed{d}} \\boxed{e") == [
        "a",
        "b{c}\\}",
        "\\boxed{d}",
        "d",
    ]
    assert MathMatcher.longest == 2000
