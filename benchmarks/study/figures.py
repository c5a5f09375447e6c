"""Functions that return values, such as accuracies and their differences, from a result file of the study."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study import language_prior, perception
from benchmarks.study.declare import StudyTask

QUANTITIES = ("accuracy", "unparsable", "tokens")
NOT_RUN = "not run"  # reason for a run that an interrupted study has not reached
TASKS: dict[str, StudyTask] = {"language-prior": language_prior.TASK, "perception": perception.TASK}
OLD_TASK = "perception"  # the task of result files that do not name it


def task_of(document: Mapping[str, Any]) -> StudyTask:
    """Returns the study's task to which a result file belongs."""
    return TASKS[document.get("task", OLD_TASK)]


def prefix_of(document: Mapping[str, Any]) -> str:
    """Returns "study" for the task "perception", and "prior" for the task "language-prior".

    The names of a result file's tables in docs/ begin with this prefix.
    """
    return "study" if document.get("task", OLD_TASK) == OLD_TASK else "prior"


def values(document: Mapping[str, Any], row: str, column: str, quantity: str = "accuracy") -> dict[int, float]:
    """Returns a dict from seed to the value of ``quantity``.

    Seeds without a measured result are left out. Fractions are returned in percent.

    Args:
        document: Content of a result file of the study.
        row: Name of a training run or of a starting model.
        column: Kind of questions, one of ``COLUMNS``.
        quantity: One of ``QUANTITIES``, or a quantity in ``StudyTask.columns``.
    """
    factor = 1 if quantity == "tokens" else 100
    return {
        result["seed"]: factor * result["evaluation"][column][quantity]
        for result in document["results"]
        if result["row"] == row and result["status"] == "measured"
    }


def differences(document: Mapping[str, Any], row: str, other: str, column: str) -> list[float]:
    """Returns accuracy(``row``) - accuracy(``other``) in percentage points, for each seed that has both results."""
    ours, theirs = values(document, row, column), values(document, other, column)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def question_error(document: Mapping[str, Any], row: str, other: str) -> float | None:
    """Returns the standard error of accuracy(``row``) - accuracy(``other``), in percentage points.

    The error comes from the differences between the two answers to each step-by-step question ("cot"). It is computed
    for the first seed with results of both rows. Without such a seed, returns None. Also returns None if the file does
    not record which answers are correct.
    """
    answers: dict[str, dict[int, str | None]] = {row: {}, other: {}}
    for result in document["results"]:
        if result["row"] in answers and result["status"] == "measured":
            answers[result["row"]][result["seed"]] = result["evaluation"]["cot"].get("right")
    common = [seed for seed in answers[row] if seed in answers[other]]
    chosen = [answers[name][common[0]] for name in (row, other)] if common else []
    bits = [[int(bit) for bit in f"{int(right, 16):b}"[1:]] for right in chosen if right is not None]
    if len(bits) < 2:
        return None
    changes = [ours - theirs for ours, theirs in zip(*bits, strict=True)]
    return 100 * statistics.stdev(changes) / math.sqrt(len(changes))


def spread(numbers: Sequence[float], *, signed: bool = False) -> str:
    """Returns a text such as "71.3 ± 0.8", the mean and the sample standard deviation.

    For a single number, returns only the mean. For no numbers, returns "".
    """
    if not numbers:
        return ""
    mean = f"{statistics.fmean(numbers):{'+' if signed else ''}.1f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.1f}"


def start_of(task: StudyTask, row: str) -> str:
    """Returns the name of the model from which the run ``row`` begins. If ``row`` is a starting model, returns it."""
    return row if row in task.starts else task.rows[row].start
