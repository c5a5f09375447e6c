"""The matcher of mathematical expressions."""

import dataclasses
import importlib.util
import math
import re
from typing import ClassVar

from mpo_ext.answers.base import Matcher, Verdict
from mpo_ext.answers.math_process import math_process
from mpo_ext.answers.normalize import ASCII_FORMS, clean_answer, fold
from mpo_ext.checks import check_number, install_hint


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
        prediction, truth = clean_answer(prediction.translate(ASCII_FORMS)), clean_answer(truth.translate(ASCII_FORMS))
        is_prose = any(re.fullmatch(r"[^\W\d_]{2,}(?:\W+[^\W\d_]+)*", text) for text in (prediction, truth))
        if is_prose or fold(prediction) == fold(truth):
            return self._verdict(fold(prediction) == fold(truth) != "", "text", fold(prediction), fold(truth))
        if not prediction or not truth:
            return self._verdict(False, "empty", prediction, truth)
        equal = math_process().equal(prediction, truth, self.seconds)
        return self._verdict(bool(equal), "unfinished" if equal is None else "equivalence", prediction, truth)
