"""The base class of all matchers, and the verdict that a matcher returns."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The result of comparing an answer with the truth.

    Attributes:
        correct: Whether the answer counts as correct.
        score: Score in [0, 1]; 0 or 1 if the matcher only accepts or rejects.
        rule: Kind of the matcher and the comparison that decided, for example "choice:letter".
        prediction: The answer in the form that was compared.
        truth: The best-matching true answer in the form that was compared.
    """

    correct: bool
    score: float
    rule: str
    prediction: str
    truth: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matcher(abc.ABC):
    """The base class of all matchers. A subclass has its options as attributes and compares an answer with a truth."""

    kind: ClassVar[str]

    def __call__(self, prediction: str, truth: str | Sequence[str]) -> Verdict:
        """Compares an answer with the truth, or with each of several truths, and returns the best verdict.

        Args:
            prediction: The extracted answer. None, which stands for an unreadable answer, raises a TypeError.
            truth: The true answer, or a list of answers that are all right.
        """
        truths = self._check(prediction, truth)
        if not prediction.strip():
            return Verdict(False, 0.0, f"{self.kind}:empty", prediction, truths[0])
        verdicts = [self._compare(prediction, each) for each in truths]
        return max(verdicts, key=lambda verdict: (verdict.correct, verdict.score))

    def _check(self, prediction: str, truth: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(prediction, str):
            raise TypeError(f"prediction must be a string, got {prediction!r}")
        truths = (truth,) if isinstance(truth, str) else truth
        if not isinstance(truths, Sequence) or not all(isinstance(text, str) for text in truths):
            raise TypeError(f"truth must be a string or a list of strings, got {truth!r}")
        if not truths:
            raise ValueError(f"truth must hold at least one answer, got {truth!r}")
        return tuple(truths)

    @abc.abstractmethod
    def _compare(self, prediction: str, truth: str) -> Verdict: ...

    def _verdict(self, correct: bool, rule: str, prediction: object, truth: object) -> Verdict:
        return Verdict(correct, float(correct), f"{self.kind}:{rule}", str(prediction), str(truth))


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
