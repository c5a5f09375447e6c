"""The base class of all matchers, and the verdict that a matcher returns."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpo_ext.answers.normalize import fold
from mpo_ext.checks import shorten

#: Version of the verdicts. It changes whenever a matcher may decide differently. Journals store it with each verdict.
VERDICT_VERSION = 5
#: Longest answer, in characters, that matchers compare: their time grows with the square of the length.
LONGEST_ANSWER = 2000


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The result of comparing an answer with the truth.

    Attributes:
        correct: True if the answer is right, False if it is certainly wrong, None if it is unreadable. "Unreadable"
            means that the matcher cannot read the answer, or cannot tell whether the answer equals the truth.
        score: Score in [0, 1]; 0 or 1 if the matcher gives no partial credit.
        rule: Kind of the matcher and name of the deciding comparison, such as "choice:letter".
        prediction: The answer, in the form that the matcher compared.
        truth: The true answer, in the form that the matcher compared. If there are several true answers, the best
            match.
    """

    correct: bool | None
    score: float
    rule: str
    prediction: str
    truth: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matcher(abc.ABC):
    """The base class of all matchers. A matcher compares an answer with the true answer.

    The fields of a subclass are its options.

    Attributes:
        kind: Name of the matcher, the key in ``MATCHERS``.
        longest: Maximum length in characters of the texts that are compared; None: no limit.
    """

    kind: ClassVar[str]
    longest: ClassVar[int | None] = LONGEST_ANSWER  # characters; None suits matchers that take linear time

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Compares an answer with the truth, and returns the verdict. With several truths, returns the best verdict.

        The order of the verdicts is right, unreadable, wrong.

        Args:
            prediction: The extracted answer.
            truth: The true answer, or a list of true answers.

        Raises:
            TypeError: If an argument has another type. A missing answer (None) is not allowed.
            ValueError: If the list of true answers is empty.
        """
        truths = self._check(prediction, truth)
        if (verdict := self._early_verdict(prediction, truths)) is not None:
            return verdict
        if len(truths) == 1:
            return self._compare(prediction, truths[0])
        return max((self._compare(prediction, each) for each in truths), key=rank)

    def _early_verdict(self, prediction: str, truths: Sequence[str]) -> Verdict | None:
        """Returns the verdict if a text is blank or too long to compare, otherwise None.

        If the answer is blank, or all truths are blank, the answer is unreadable.

        A text is too long if it has more than ``longest`` characters. The answer is then right if it equals a truth
        apart from case and spaces. Otherwise, the answer is unreadable.
        """
        if is_empty(prediction, truths):
            return self._verdict(None, "empty", prediction, truths[0])
        if self.longest is None or max(len(prediction), *map(len, truths)) <= self.longest:
            return None
        folded = fold(prediction)
        same = [truth for truth in truths if fold(truth) == folded]
        return self._verdict(True if same else None, "length", folded, [*same, *truths][0])

    def with_options(self, options: Sequence[str] | Mapping[str, str]) -> "Matcher":
        """Returns a matcher for a question with these answer options.

        ``ChoiceMatcher`` uses the options. ``AnyMatcher`` passes the options on to its matchers. All other matchers
        return themselves unchanged.
        """
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
    """Returns True if the answer is blank, or if all true answers are blank."""
    return not prediction.strip() or not any(truth.strip() for truth in truths)


def rank(verdict: Verdict) -> tuple[int, float]:
    """Returns the sort key of a verdict. Wrong answers come first, then unreadable answers, then right answers."""
    return {True: 2, None: 1, False: 0}[verdict.correct], verdict.score


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a bool; ``name`` is the argument in the message."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
