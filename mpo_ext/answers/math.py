"""The matcher for mathematical expressions."""

import dataclasses
import importlib.util
import re
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict
from mpo_ext.answers.math_process import math_process
from mpo_ext.answers.normalize import TO_ASCII, clean_answer, fold
from mpo_ext.checks import check_number, install_hint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MathMatcher(Matcher):
    """Compares mathematical expressions with the package math-verify (the extra ``math``).

    The comparison runs in a helper process, because a process can be stopped at any time and from any thread. Words
    are compared as text, because as products of letters "no" equals "on".

    Attributes:
        seconds: Time limit in seconds, after which two expressions count as different (rule "math:unfinished").
    """

    kind: ClassVar[str] = "math"
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, "(0, inf)")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(f"the matcher 'math' needs the package math-verify: {install_hint('math')}")

    def _compare(self, prediction: str, truth: str) -> Verdict:
        prediction, truth = clean_answer(prediction.translate(TO_ASCII)), clean_answer(truth.translate(TO_ASCII))
        is_prose = any(re.fullmatch(r"[^\W\d_]{2,}(?:\W+[^\W\d_]+)*", text) for text in (prediction, truth))
        if is_prose or fold(prediction) == fold(truth):
            return self._verdict(fold(prediction) == fold(truth) != "", "text", fold(prediction), fold(truth))
        if not prediction or not truth:
            return self._verdict(False, "empty", prediction, truth)
        equal = math_process().equal(prediction, truth, self.seconds)
        return self._verdict(bool(equal), "unfinished" if equal is None else "equivalence", prediction, truth)
