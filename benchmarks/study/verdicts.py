"""A significance test. It decides whether a difference in the study is "higher", "lower" or "not significant"."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

LEVEL = 0.05
NOT_SIGNIFICANT = "not significant"


@dataclasses.dataclass(frozen=True, slots=True)
class DifferenceVerdict:
    """The verdict on a difference over several seeds.

    Attributes:
        error: Standard error of the mean difference, computed over the seeds; None for fewer than 2 seeds.
        p: Two-sided p value of a t test over the seeds, corrected by Holm's method; None for fewer than 2 seeds.
        text: "higher", "lower" or "not significant".
    """

    error: float | None
    p: float | None
    text: str


def verdicts(family: Sequence[Sequence[float]]) -> list[DifferenceVerdict]:
    """Tests several paired differences together, and returns the verdict on each.

    A difference is "higher" or "lower" if its mean over the seeds differs from zero at the 5 % level. The p values are
    corrected by Holm's method for the number of tested differences. A difference with fewer than 2 seeds is not
    tested.

    Args:
        family: A list for each difference, with a value for each seed.
    """
    raw = [_p_value(values) for values in family]
    order = sorted((p, index) for index, p in enumerate(raw) if p is not None)
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    result = []
    for index, values in enumerate(family):
        adjusted = corrected.get(index)
        is_certain = adjusted is not None and adjusted < LEVEL
        sign = "higher" if is_certain and statistics.fmean(values) > 0 else "lower"
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        result.append(DifferenceVerdict(error, adjusted, sign if is_certain else NOT_SIGNIFICANT))
    return result


def _p_value(values: Sequence[float]) -> float | None:
    """Returns the two-sided p value of a t test of the mean against zero; None for fewer than 2 values."""
    if len(values) < 2:
        return None
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return t_test_p(mean / deviation * math.sqrt(len(values)), len(values) - 1)


def t_test_p(t: float, freedom: int) -> float:
    """Returns P(|T| > |t|) for Student's t distribution with ``freedom`` degrees of freedom.

    The formulas are 26.7.3 and 26.7.4 of Abramowitz and Stegun.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    # The sum has the terms 1, (2/3) cos^2, (2*4)/(3*5) cos^4, ... (odd) or 1, (1/2) cos^2, (1*3)/(2*4) cos^4, ...
    term = total = math.cos(angle) if is_odd else 1.0
    for index in range(3 if is_odd else 2, freedom - 1, 2):
        term *= square * (index - 1) / index
        total += term
    if freedom == 1:
        total = 0.0
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
    return max(0.0, 1 - inside)
