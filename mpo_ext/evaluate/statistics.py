"""Means with their errors, and comparisons of two models that answered the same questions."""

import dataclasses
import math
from collections.abc import Callable, Sequence

_Z95 = 1.959963984540054


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None for what too few values (0 and 1) cannot tell.

    The values are those of questions, not of samples: samples of one question hang together.
    """
    count = len(values)
    if count == 0:
        return None, None
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share of ``count`` questions; it has a width at 0 and 1 too.

    For means over several samples it is wider than need be.
    """
    square = _Z95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of ``k`` samples is right, drawn without replacement from those there are.

    It is the unbiased estimate of arXiv 2107.03374.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in [1, {samples}], got {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None], is_same: Callable[[str, str], bool]) -> int | None:
    """Number of the sample that first gave the most frequent answer; of equally frequent ones the earliest.

    Args:
        answers: None stands for an answer that cannot be read, which has no vote.
        is_same: Says whether two answers are one.

    Returns:
        None where no answer can be read.
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
    """Two-sided p of McNemar's exact test: that of ``gained`` and ``lost`` if each were as likely as the other."""
    count = gained + lost
    term = total = 1
    for number in range(min(gained, lost)):
        term = term * (count - number) // (number + 1)
        total += term
    return min(1.0, 2 * total / 2**count)


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A second model less a first one, on the questions that both answered.

    Attributes:
        questions: How many those are.
        difference: Of the accuracies; positive where the second is better.
        standard_error: Of the difference, from the differences of the single questions; None for fewer than 2.
        gained: Questions that the second has right more often.
        lost: Questions that the first has right more often.
        p: Two-sided; None where there is nothing to tell it from.
        test: "mcnemar" (exact, one sample per question) or "normal" (difference over its standard error).
    """

    questions: int
    difference: float | None
    standard_error: float | None
    gained: int
    lost: int
    p: float | None
    test: str


def compare(first: Sequence[float], second: Sequence[float], *, samples: int) -> Comparison:
    """Compares two models.

    Args:
        first: For each question the share of right samples.
        second: The same of the other model, in the same order.
        samples: Per question.
    """
    differences = [late - early for early, late in zip(first, second, strict=True)]
    difference, error = mean_and_error(differences)
    gained, lost = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    p: float | None = None
    if samples == 1:
        p = mcnemar(gained, lost) if differences else None
    elif difference is not None and error is not None:
        if error > 0:
            p = math.erfc(abs(difference) / error / math.sqrt(2))
        elif difference == 0:
            p = 1.0
    return Comparison(len(differences), difference, error, gained, lost, p, "mcnemar" if samples == 1 else "normal")
