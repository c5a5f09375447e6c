"""Computes means with standard errors, and comparisons of two models on the same questions."""

import dataclasses
import math
from collections.abc import Callable, Sequence

_Z95 = 1.959963984540054


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the mean and its standard error.

    The mean is None if there are no values. The standard error is None for fewer than 2 values.
    Pass one value per question, not per sample, because samples of one question are correlated.
    """
    count = len(values)
    if count == 0:
        return None, None
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """Returns the bounds of Wilson's 95 % interval for an accuracy ``fraction`` on ``count`` questions.

    The interval has a positive width even at 0 and 1. It is conservative if each question has several samples.
    """
    square = _Z95**2 / count
    middle = (fraction + square / 2) / (1 + square)
    half = _Z95 / (1 + square) * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k (arXiv 2107.03374) if ``right`` of ``samples`` responses are correct.

    The estimate is the probability that at least one of ``k`` of these responses, drawn without replacement, is
    correct.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in [1, {samples}], got {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None], is_same: Callable[[str, str], bool]) -> int | None:
    """Returns the index at which the most frequent answer first occurs: 1 for ``["4", "7", "7", None]``.

    ``is_same`` decides whether two answers are equal. Missing answers (None) do not count; if all are missing, the
    result is None. Among equally frequent answers, the earliest wins.
    """
    groups: dict[int, int] = {}
    known: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in known:
            same = (first for first in groups if is_same(answers[first] or "", answer))
            known[answer] = next(same, number)
        groups[known[answer]] = groups.get(known[answer], 0) + 1
    return max(groups, key=lambda first: (groups[first], -first), default=None)


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test of the hypothesis that two models are equally good.

    ``gained`` is the number of questions that only the second model answered correctly. ``lost`` is the number of
    questions that only the first model answered correctly.
    """
    count = gained + lost
    term = total = 1
    for number in range(min(gained, lost)):
        term = term * (count - number) // (number + 1)
        total += term
    return min(1.0, 2 * total / 2**count)


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of the accuracies of two models on the questions that both models answered.

    Attributes:
        questions: Number of questions that both models answered.
        difference: Accuracy of the second model minus accuracy of the first model; None if there are no questions.
        standard_error: Standard error of ``difference`` over the questions; None for fewer than 2 questions.
        gained: Number of questions for which the second model has a higher number of correct responses.
        lost: Number of questions for which the first model has a higher number of correct responses.
        p: Two-sided p-value; None if it cannot be computed from these questions.
        test: "mcnemar" (exact, for one sample per question) or "normal" (difference divided by its standard error).
    """

    questions: int
    difference: float | None
    standard_error: float | None
    gained: int
    lost: int
    p: float | None
    test: str


def compare(first: Sequence[float], second: Sequence[float], *, samples: int) -> Comparison:
    """Compares the accuracy of two models on the same questions.

    Args:
        first: For each question, the fraction of the first model's sampled answers that are correct.
        second: The same fractions for the second model, in the same order.
        samples: Number of sampled answers per question; 1 selects McNemar's test.
    """
    differences = [after - before for before, after in zip(first, second, strict=True)]
    difference, error = mean_and_error(differences)
    gained, lost = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    p: float | None = None
    if samples == 1:
        p = mcnemar(gained, lost) if differences else None
    elif difference is not None and error is not None:
        if error > 0:
            p = math.erfc(abs(difference) / error / math.sqrt(2))
        elif difference == 0:
            p = 1.0
    return Comparison(len(differences), difference, error, gained, lost, p, "mcnemar" if samples == 1 else "normal")
