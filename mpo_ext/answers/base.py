"""The base class of all matchers, and the verdict that a matcher returns."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpo_ext.answers.normalize import fold
from mpo_ext.checks import shorten

#: Version of the verdicts, which changes if a matcher may decide in another way; journals store it with each verdict.
VERDICT_VERSION = 4
#: Length in characters up to which matchers compare answers, because their time grows with the square of the length.
LONGEST_ANSWER = 2000


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The result of comparing an answer with the truth.

    Attributes:
        correct: True if the answer is right, False if it is surely wrong, and None if it is unreadable: the matcher
            cannot read an answer, or cannot tell whether the answer means the truth.
        score: Score in [0, 1]; 0 or 1 if the matcher gives no partial credit.
        rule: Kind of the matcher and the comparison that decided, for example "choice:letter".
        prediction: The answer in the form that was compared.
        truth: The best-matching true answer in the form that was compared.
    """

    correct: bool | None
    score: float
    rule: str
    prediction: str
    truth: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matcher(abc.ABC):
    """The base class of all matchers. A subclass has its options as attributes and compares an answer with a truth."""

    kind: ClassVar[str]
    longest: ClassVar[int | None] = LONGEST_ANSWER  # characters; None: the time is linear

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Compares an answer with the truth, or with each of several truths, and returns the best verdict.

        An answer is wrong only if it is wrong for every truth.

        Args:
            prediction: The extracted answer. None, which stands for a missing answer, raises a TypeError.
            truth: The true answer, or a list of answers that are all right.
        """
        truths = self._check(prediction, truth)
        if (verdict := self._early_verdict(prediction, truths)) is not None:
            return verdict
        if len(truths) == 1:
            return self._compare(prediction, truths[0])
        return max((self._compare(prediction, each) for each in truths), key=rank)

    def _early_verdict(self, prediction: str, truths: Sequence[str]) -> Verdict | None:
        """Returns the verdict on texts that are blank or too long to compare; None for all others.

        Longer texts are equal if they are the same apart from case and spaces; otherwise, the answer is unreadable.
        """
        if is_empty(prediction, truths):
            return self._verdict(None, "empty", prediction, truths[0])
        if self.longest is None or max(len(prediction), *map(len, truths)) <= self.longest:
            return None
        folded = fold(prediction)
        same = [truth for truth in truths if fold(truth) == folded]
        return self._verdict(True if same else None, "length", folded, [*same, *truths][0])

    def with_options(self, options: Sequence[str] | Mapping[str, str]) -> "Matcher":
        """Returns the matcher for a question with these options; only matchers of choices depend on them."""
        return self

    def _check(self, prediction: str, truth: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(prediction, str):
            raise TypeError(f"prediction must be a string, got {shorten(prediction)}")
        truths = (truth,) if isinstance(truth, str) else truth
        if not isinstance(truths, Sequence) or not all(isinstance(text, str) for text in truths):
            raise TypeError(f"truth must be a string or a list of strings, got {shorten(truth)}")
        if not truths:
            raise ValueError(f"truth must hold at least one answer, got {truth!r}")
        return tuple(truths)

    @abc.abstractmethod
    def _compare(self, prediction: str, truth: str) -> Verdict: ...

    def _verdict(self, correct: bool | None, rule: str, prediction: object, truth: object) -> Verdict:
        return Verdict(correct, float(bool(correct)), f"{self.kind}:{rule}", str(prediction), str(truth))


def is_empty(prediction: str, truths: Sequence[str]) -> bool:
    """Returns whether an answer, or every true answer, is blank."""
    return not prediction.strip() or not any(truth.strip() for truth in truths)


def rank(verdict: Verdict) -> tuple[int, float]:
    """Returns the key by which verdicts are ordered: right, then unreadable, then wrong."""
    return {True: 2, None: 1, False: 0}[verdict.correct], verdict.score


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
