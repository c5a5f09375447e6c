"""Makes texts and tables that summarise the results of the study.

The texts are generated from the results. ``verdicts.verdicts`` decides whether a difference is significantly positive,
significantly negative, or not significant. With one seed, a difference has no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study import figures
from benchmarks.study.declare import SFT, TEXT
from benchmarks.study.verdicts import NOT_SIGNIFICANT, DifferenceVerdict, verdicts
from mpo_ext.report import markdown_table

Document = Mapping[str, Any]
Difference = tuple[str, str, str]  # row, row to compare with, column
ONE_SEED, NOT_RUN = "one seed, no verdict", "not run"
SAME, OPPOSITE = "same", "opposite"
COLUMN_NAMES = {"cot": "CoT", TEXT: "text", "direct": "direct"}
#: ``unparsable`` shows the rows with a larger percentage of unparsable step-by-step answers.
MANY_UNPARSABLE = 1.0


def finding(verdict: str, paper: str) -> str:
    """Compares a verdict with the direction in the paper. Returns "same", "opposite" or "not significant"."""
    if verdict == NOT_SIGNIFICANT:
        return verdict
    return SAME if verdict == paper else OPPOSITE


def family_of(document: Document, name: str) -> list[tuple[Difference, list[float], DifferenceVerdict]]:
    """Returns the comparisons that the study declares for the table ``name``, with their results.

    Each entry is a tuple (comparison, values, verdict). ``values`` has the difference in accuracy for each seed, in
    percentage points.
    """
    family = figures.task_of(document).differences[name]
    measured = [figures.differences(document, *each) for each in family]
    return list(zip(family, measured, verdicts(measured), strict=True))


def group_of(numbers: Sequence[float], verdict: DifferenceVerdict) -> str:
    """Returns the text of a verdict. With one number, returns "one seed, no verdict"; without numbers, "not run"."""
    if len(numbers) > 1:
        return verdict.text
    return ONE_SEED if numbers else NOT_RUN


def findings(document: Document) -> str:
    """Returns two tables about the differences that the paper reports, such as MPO being better than SFT.

    The first table lists the differences that are significant in the study. The second table counts the other
    differences by reason: "not significant", "one seed, no verdict" or "not run".
    """
    task = figures.task_of(document)
    rows: dict[str, list[list[str]]] = {SAME: [], OPPOSITE: []}
    counts = dict.fromkeys((NOT_SIGNIFICANT, ONE_SEED, NOT_RUN), 0)
    for name in task.differences:
        for each, numbers, verdict in family_of(document, name):
            if each not in task.paper:
                continue
            group = group_of(numbers, verdict)
            if group in counts:
                counts[group] += 1
                continue
            result = finding(group, task.paper[each])
            row, other, column = each
            mean = f"{statistics.fmean(numbers):+.1f} ± {verdict.error:.1f}"
            cells = [row, other, COLUMN_NAMES[column], task.paper[each], group, result, mean, str(len(numbers))]
            rows[result].append(cells)
    header = ["row", "compared with", "column", "paper", "study", "directions", "difference", "seeds"]
    shown = [*rows[SAME], *rows[OPPOSITE]]
    lines = [markdown_table(header, shown)] if shown else []
    lines.append("The other directions in the paper have no significant result in the study:\n")
    lines.append(markdown_table(["reason", "number"], [[name, str(count)] for name, count in counts.items() if count]))
    return "\n".join(lines)


def best_rates(document: Document) -> str:
    """Returns a table and a sentence about the best learning rates of SFT and MPO.

    The best learning rate has the highest accuracy on "cot" questions. Only seeds with results for all learning rates
    count. The highest accuracy is a little too high, because the same seeds select the learning rate.
    """
    rows = {
        method: {label.removeprefix(f"{method}, "): row for label, row in figures.task_of(document).tables["rate"].rows
                 if label.startswith(f"{method}, x")}
        for method in (SFT, "MPO")
    }  # fmt: skip
    columns = {row: figures.values(document, row, "cot") for labels in rows.values() for row in labels.values()}
    seeds = set.intersection(*(set(column) for column in columns.values()))
    if not seeds:
        return "Not run yet.\n"
    best: dict[str, str] = {}
    parts: list[list[str]] = []
    for method, labels in rows.items():
        means = {label: statistics.fmean(columns[row][seed] for seed in seeds) for label, row in labels.items()}
        label = max(means, key=lambda label: means[label])
        best[method] = labels[label]
        direct = statistics.fmean(value for seed, value in figures.values(document, labels[label], "direct").items()
                                  if seed in seeds)  # fmt: skip
        parts.append([method, label, f"{means[label]:.1f}", f"{direct:.1f}"])
    gains = [columns[best["MPO"]][seed] - columns[best[SFT]][seed] for seed in sorted(seeds)]
    (verdict,) = verdicts([gains])
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    error = "" if verdict.error is None else f" ± {verdict.error:.1f}"
    word = group_of(gains, verdict)
    table = markdown_table(["row", "best learning rate", "CoT", "direct"], parts)
    return (
        f"{table}\nWith these learning rates, the CoT accuracy of MPO minus the CoT accuracy of SFT is "
        f"{statistics.fmean(gains):+.1f}{error} points ({count}). The verdict is *{word}*.\n"
    )


def unparsable(document: Document) -> str:
    """Returns a table of the runs and starting models with more than 1 % unparsable answers.

    Only step-by-step answers count.
    """
    task = figures.task_of(document)
    shares = {row: figures.values(document, row, "cot", "unparsable") for row in (*task.starts, *task.rows)}
    means = {row: statistics.fmean(values.values()) for row, values in shares.items() if values}
    named = [[row, f"{mean:.1f}", str(len(shares[row]))] for row, mean in means.items() if mean > MANY_UNPARSABLE]
    text = f"{len(named)} of {len(means)} rows have more than {MANY_UNPARSABLE:.0f} % unparsable step-by-step answers"
    return f"{text}:\n\n{markdown_table(['row', 'unparsable, %', 'seeds'], named)}" if named else f"{text}.\n"
