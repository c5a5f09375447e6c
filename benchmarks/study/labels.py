"""Checks whether the chosen response of a pair is better than the rejected response.

The check uses the true digits of the grid. The pairs store these digits, but the pipelines that make the pairs do not
use them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.language_prior import KEEPS, RLAIF_V
from mpo_ext.answers import extract_answer
from mpo_ext.data import Pair
from mpo_ext.demo.digits import STYLES
from mpo_ext.demo.reading import CELLS, LARGEST, read_digits
from mpo_ext.report import markdown_table

PAPER = (571.2, 992.7)  # tokens per pair of DropoutNTP and of RLAIF-V in arXiv 2411.10442
DROPOUT_NTP = "DropoutNTP 0.5"
#: Names of the columns by share of ``label_shares``.
SHARES = {
    "right": "chosen has fewer errors",
    "equal": "both have equally many errors",
    "wrong": "chosen has more errors",
    "chosen_right": "chosen has no errors",
}


def count_errors(response: str, question: str, values: Sequence[int]) -> int:
    """Counts the wrong and missing digits in a response. A wrong or missing final answer counts as one more error.

    Args:
        response: Step-by-step response.
        question: The question, which asks for the digit in a cell or for the largest digit.
        values: True digits of the grid, in the order of the cells.
    """
    cells = CELLS[round(len(values) ** 0.5)]
    asked = question.removeprefix("Which digit is ").partition(" ? ")[0]
    truth = max(values) if asked == LARGEST else values[cells.index(asked)]
    wrong = sum(read != value for read, value in zip(read_digits(response, cells), values, strict=True))
    return wrong + (extract_answer(response, STYLES["cot"]) != str(truth))


def label_shares(pairs: Sequence[Pair]) -> dict[str, float]:
    """Returns four fractions of the pairs, by the numbers of errors in the responses.

    - "right": the chosen response has fewer errors than the rejected response.
    - "equal": both responses have the same number of errors.
    - "wrong": the chosen response has more errors than the rejected response.
    - "chosen_right": the chosen response has no errors.

    Only step-by-step pairs with images count. Without such pairs, the result is {}.
    """
    errors = [
        tuple(count_errors(text, pair.question, pair.extra["digits"]) for text in (pair.chosen, pair.rejected))
        for pair in pairs
        if pair.images and pair.extra["form"] == "cot"
    ]
    if not errors:
        return {}
    return {
        "right": sum(chosen < rejected for chosen, rejected in errors) / len(errors),
        "equal": sum(chosen == rejected for chosen, rejected in errors) / len(errors),
        "wrong": sum(chosen > rejected for chosen, rejected in errors) / len(errors),
        "chosen_right": sum(chosen == 0 for chosen, _ in errors) / len(errors),
    }


def table(document: Mapping[str, Any]) -> str:
    """Returns a Markdown table with a row for each kind of pairs, or "Not run yet." if there are no pairs.

    A row has the generated tokens per pair, the fractions of ``label_shares`` in percent, and the number of seeds.
    Tokens and fractions are means over the seeds.
    """
    rows = []
    for name in ("correctness", *KEEPS, RLAIF_V):
        starts = _starts(document, name)
        if starts:
            shares = [statistics.fmean(start["labels"][name][share] for start in starts) for share in SHARES]
            tokens = f"{_tokens_per_pair(starts, name):.1f}"
            rows.append([name, tokens, *(f"{100 * share:.1f}" for share in shares), str(len(starts))])
    header = ["pairs", "tokens per pair", *(f"{name}, %" for name in SHARES.values()), "seeds"]
    return markdown_table(header, rows) if rows else "Not run yet.\n"


def cost(document: Mapping[str, Any]) -> str:
    """Returns sentences on how many tokens DropoutNTP and RLAIF-V generate per pair, in the study and in the paper."""
    starts = _starts(document, RLAIF_V)
    if not starts:
        return "Not run yet.\n"
    ours, theirs = (_tokens_per_pair(starts, name) for name in (DROPOUT_NTP, RLAIF_V))
    stages = [start["sampling"][RLAIF_V]["generated_tokens_by_stage"] for start in starts]
    verdicts = sum(stage["verdicts"] for stage in stages) / sum(sum(stage.values()) for stage in stages)
    length = statistics.fmean(
        start["sampling"][RLAIF_V]["generated_tokens_by_stage"]["responses"] / start["sampling"][RLAIF_V]["records"]
        for start in starts
    )
    return (
        f"DropoutNTP generates {ours:.1f} tokens per pair, and RLAIF-V {theirs:.1f}. The ratio is "
        f"{100 * ours / theirs:.0f} %. In the paper, the numbers are {PAPER[0]} and {PAPER[1]}, with a ratio of "
        f"{100 * PAPER[0] / PAPER[1]:.1f} %. A response has {length:.0f} tokens on average. In RLAIF-V, the start "
        "model judges each claim of a response; "
        f"{100 * verdicts:.1f} % of the tokens of RLAIF-V are such judgements.\n"
    )


def _starts(document: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Returns the starting models in ``document`` that have label fractions for the pair file ``name``."""
    return [start for start in document["starts"] if start.get("labels", {}).get(name)]


def _tokens_per_pair(starts: Sequence[Mapping[str, Any]], name: str) -> float:
    """Returns how many tokens the sampling run ``name`` generated per pair, as the mean over ``starts``."""
    runs = [start["sampling"][name] for start in starts]
    made = [sum(count for output, count in run["lines"].items() if output.endswith("pairs")) for run in runs]
    return statistics.fmean(run["generated_tokens"] / count for run, count in zip(runs, made, strict=True))
