"""Makes the table of the page "When does MPO help?".

A row of the table has the errors of a starting model, and the accuracy gain of MPO over SFT.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study import figures, sentences
from benchmarks.study.declare import SFT, START
from benchmarks.study.verdicts import verdicts
from mpo_ext.report import markdown_table

_HEADER = [
    "start", "direct - CoT", "made up", "MPO - SFT, CoT", "verdict", "MPO - SFT, direct", "seeds",
]  # fmt: skip


def table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table with a line for each starting model.

    A starting model is left out if no seed has results of both runs, SFT and MPO.
    The significance tests are corrected for the number of lines.

    ``documents`` maps the name of a result file to its content.
    """
    lines = [line for name in ("study_prior", "study") for line in _lines(documents[name])]
    found = verdicts([gains for _, gains, _, _ in lines])
    rows = []
    for (begin, gains, questions, end), verdict in zip(lines, found, strict=True):
        error = verdict.error if verdict.error is not None else questions
        gain = f"{statistics.fmean(gains):+.1f}" + ("" if error is None else f" ± {error:.1f}")
        rows.append([*begin, gain, sentences.group_of(gains, verdict), *end, str(len(gains))])
    rows.sort(key=lambda row: -float(row[1]))
    return markdown_table(_HEADER, rows)


def _lines(document: Mapping[str, Any]) -> list[tuple[list[str], Sequence[float], float | None, list[str]]]:
    """Returns (first cells, gains, error, last cells) for each starting model in ``document``.

    ``gains`` are MPO's accuracy gains over SFT, one for each seed. With a single seed, ``error`` is the standard error
    of the gain, from ``figures.question_error``. With several seeds, ``error`` is None.
    """
    lines: list[tuple[list[str], Sequence[float], float | None, list[str]]] = []
    task = figures.task_of(document)
    for start in task.starts:
        suffix = start.removeprefix(START)
        ours, sft = f"MPO{suffix}", f"{SFT}{suffix}"
        gains = figures.differences(document, ours, sft, "cot")
        if not gains:
            continue
        seeds = figures.values(document, ours, "cot").keys() & figures.values(document, sft, "cot").keys()
        steps, direct = (figures.values(document, start, column) for column in ("cot", "direct"))
        gap = statistics.fmean(direct[seed] - steps[seed] for seed in seeds)
        made_up = ""
        if task.columns:
            shares = figures.values(document, start, "cot", "hallucinated")
            made_up = f"{statistics.fmean(shares[seed] for seed in seeds):.1f}"
        label = suffix.removeprefix(", ") or ("prior 0.9" if task.columns else "misreads digits and adds wrongly")
        losses = figures.differences(document, ours, sft, "direct")
        questions = figures.question_error(document, ours, sft) if len(gains) == 1 else None
        lines.append(([label, f"{gap:+.1f}", made_up], gains, questions, [f"{statistics.fmean(losses):+.1f}"]))
    return lines
