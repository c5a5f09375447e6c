"""Measures the answers of the demo's models: accuracy, hallucinated digits, and paired differences of two models."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.demo.digits import FORMS
from mpo_ext.demo.reading import ReadingTask, hallucinated_cells, read_digits
from mpo_ext.demo.train import score


def measure(tasks: Sequence[ReadingTask], responses: Sequence[str], prior_step: int) -> dict[str, dict[str, Any]]:
    """Measures the responses to the questions, separately for each form of question.

    The language prior predicts each digit from the digit before it: (digit before + ``prior_step``) modulo 10.

    Returns:
        A dict for each form, "direct" or "cot":

        - ``accuracy``: Fraction of the questions that are answered correctly.
        - ``unparsable``: Fraction of the questions whose answer is unreadable.
        - ``right``: A string with a character per question: "1" for a correct answer, otherwise "0".
        - ``count``: Number of questions.
        - ``digits_right`` (form "cot" only): Fraction of the images' digits that the responses name correctly.
        - ``hallucinated`` (form "cot" only): Fraction of the responses that name a wrong digit predicted by the prior.
        - ``follow_prior`` (form "cot" only): How often a named digit equals the prior's prediction, as a fraction. A
          digit counts only if the response also names the digit before it. Chance is 0.1.
    """
    result: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        pairs = [(task, text) for task, text in zip(tasks, responses, strict=True) if task.form == form]
        form_tasks, texts = [task for task, _ in pairs], [text for _, text in pairs]
        right = score(form_tasks, texts)
        result[form] = {
            "accuracy": right.count(True) / len(right),
            "unparsable": right.count(None) / len(right),
            "right": "".join(str(int(value is True)) for value in right),
            "count": len(right),
        }
        if form == "cot":
            result[form] |= measure_digits(form_tasks, texts, prior_step)
    return result


def measure_digits(tasks: Sequence[ReadingTask], responses: Sequence[str], prior_step: int) -> dict[str, float]:
    """Returns ``digits_right``, ``hallucinated`` and ``follow_prior`` of step-by-step responses.

    ``measure`` defines these fractions.
    """
    pairs = list(zip(tasks, responses, strict=True))
    named = follow = later = right = 0
    for task, text in pairs:
        read = read_digits(text, task.cells)
        named += len(read)
        right += sum(digit == value for digit, value in zip(read, task.values, strict=True))
        known = [(a, b) for a, b in itertools.pairwise(read) if a is not None and b is not None]
        later += len(known)
        follow += sum(b == (a + prior_step) % 10 for a, b in known)
    hallucinated = sum(bool(hallucinated_cells(task, text, prior_step)) for task, text in pairs)
    return {
        "digits_right": right / named,
        "hallucinated": hallucinated / len(pairs),
        "follow_prior": follow / later if later else 0.0,
    }


def paired_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the accuracy of ``first`` minus the accuracy of ``second``, and the paired standard error.

    Both numbers are in percentage points. ``first`` and ``second`` are results of ``measure`` for one form. They must
    come from the same questions.
    """
    differences = [int(ours) - int(theirs) for ours, theirs in zip(first["right"], second["right"], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return 100 * statistics.fmean(differences), 100 * error


def standard_error(accuracy: float, count: float, **_: Any) -> float:
    """Returns the standard error of an accuracy, in percentage points.

    ``accuracy`` is a fraction, and ``count`` is the number of questions. Other keyword arguments are ignored.
    """
    return 100 * math.sqrt(accuracy * (1 - accuracy) / count)
