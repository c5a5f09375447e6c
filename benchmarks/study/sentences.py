"""Writes the sentences that state what the tables of the study show.

Each sentence follows from the results by a rule, so that nobody chooses what the page states. ``verdicts.verdicts``
decides whether a difference is higher, lower or "cannot be told". A difference with one seed has no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study import figures
from benchmarks.study.declare import SFT, START, TEXT
from benchmarks.study.verdicts import CANNOT_TELL, DifferenceVerdict, verdicts

Document = Mapping[str, Any]
Difference = tuple[str, str, str]  # row, row to compare with, column
ONE_SEED, NOT_RUN = "one seed, no verdict", "not run"
APPEARS, DOES_NOT_APPEAR = "appears", "does not appear"
_FORMS = {"cot": "step by step", TEXT: "in words", "direct": "directly"}
#: What follows a group of verdicts, in the order of the sentences.
_PREPOSITIONS = {
    "higher": " than", "lower": " than", CANNOT_TELL: " against", ONE_SEED: " against", NOT_RUN: " against",
}  # fmt: skip
#: Rows with a larger percentage of unparsable step-by-step answers are named.
MANY_UNPARSABLE = 1.0


def finding(verdict: str, paper: str) -> str:
    """Compares a verdict with the direction in the paper. Returns "appears" or "does not appear".

    ``paper`` is "higher" or "lower". The verdict "cannot be told" is returned unchanged.
    """
    if verdict == CANNOT_TELL:
        return verdict
    return APPEARS if verdict == paper else DOES_NOT_APPEAR


def family_of(document: Document, name: str) -> list[tuple[Difference, list[float], DifferenceVerdict]]:
    """Returns (difference, its value in each seed, its verdict) for each difference of the table ``name``."""
    family = figures.task_of(document).differences[name]
    measured = [figures.differences(document, *each) for each in family]
    return list(zip(family, measured, verdicts(measured), strict=True))


def group_of(numbers: Sequence[float], verdict: DifferenceVerdict) -> str:
    """Returns the text of a verdict. With one seed or without results, returns a text that says so."""
    if len(numbers) > 1:
        return verdict.text
    return ONE_SEED if numbers else NOT_RUN


def findings(document: Document) -> str:
    """Returns a Markdown list of the paper's claims, grouped by whether they appear in the study."""
    task = figures.task_of(document)
    groups: dict[str, list[str]] = {APPEARS: [], DOES_NOT_APPEAR: [], CANNOT_TELL: [], ONE_SEED: [], NOT_RUN: []}
    for name in task.differences:
        for each, numbers, verdict in family_of(document, name):
            if each not in task.paper:
                continue
            row, other, column = each
            group = group_of(numbers, verdict)
            if len(numbers) > 1:
                group = finding(verdict.text, task.paper[each])
            claim = f"{row} {task.paper[each]} than {other}, {_FORMS[column]}"
            groups[group].append(claim + (f" ({amount(document, each, numbers, verdict)})" if numbers else ""))
    return "".join(
        f"- **{name}**: {'; '.join(claims) or 'none'}.\n"
        for name, claims in groups.items()
        if claims or name in (APPEARS, DOES_NOT_APPEAR, CANNOT_TELL)
    )


def amount(document: Document, each: Difference, numbers: Sequence[float], verdict: DifferenceVerdict) -> str:
    """Returns the text of a mean difference with its standard error, such as "+3.1 ± 0.2, 5 seeds"."""
    row, other, column = each
    error = verdict.error
    unit = f"{len(numbers)} seeds"
    if len(numbers) == 1:
        error, unit = figures.question_error(document, row, other) if column == "cot" else None, "1 seed"
    return f"{statistics.fmean(numbers):+.1f}" + ("" if error is None else f" ± {error:.1f}") + f", {unit}"


def reading(document: Document) -> str:
    """Returns a Markdown list with the verdicts of each table.

    Facts about learning rates, strengths of the prior and unreadable answers follow.
    """
    task = figures.task_of(document)
    lines = [f"- **{task.tables[name].title}.** {' '.join(_verdict_sentences(document, name))}"
             for name in task.differences]  # fmt: skip
    lines += [f"- **{title}.** {text}" for title, text in (
        ("Best rates", best_rates(document)), ("Strengths", strengths(document)), ("Form", unparsable(document)),
    ) if text]  # fmt: skip
    return "\n".join(lines) + "\n"


def _verdict_sentences(document: Document, name: str) -> list[str]:
    """Returns the verdicts of a table as sentences.

    One sentence covers all differences for which ``_topic`` returns the same beginning.
    """
    family = family_of(document, name)
    sentences: dict[tuple[str, bool], dict[str, list[str]]] = {}
    for each, numbers, verdict in family:
        begin, is_subject, item = _topic(each, [difference for difference, _, _ in family])
        text = item + (f" ({amount(document, each, numbers, verdict)})" if numbers else "")
        groups = sentences.setdefault((begin, is_subject), {})
        groups.setdefault(group_of(numbers, verdict), []).append(text)
    made = []
    for (begin, is_subject), groups in sentences.items():
        parts = [
            f"*{group}*{_PREPOSITIONS[group] if is_subject else ':'} {', '.join(groups[group])}"
            for group in _PREPOSITIONS
            if group in groups
        ]
        made.append(f"{begin}: {'; '.join(parts)}.")
    return made


def _topic(difference: Difference, family: Sequence[Difference]) -> tuple[str, bool, str]:
    """Returns the beginning of a sentence about an accuracy difference, and the text that follows the verdict.

    ``family`` holds all differences of the table.

    Returns:
        (beginning, is_subject, text). In "MPO: higher than SFT", the beginning is "MPO", ``is_subject`` is True and
        the text is "SFT". In "Compared with SFT: higher: MPO", ``is_subject`` is False and the text is "MPO".
    """
    row, other, column = difference
    form = _FORMS[column]
    suffix = row.removeprefix("MPO, ")
    if other == f"{SFT}, {suffix}":
        return f"MPO compared with {SFT}, {form}", False, suffix
    if row == f"{other} + SFT":
        return f"With the next-token term compared with the same loss alone, {form}", False, other
    same_row = sum(each[0] == row and each[2] == column for each in family)
    same_other = sum(each[1] == other and each[2] == column for each in family)
    if same_row > same_other:
        return f"{row}, {form}", True, other
    return f"Compared with {other}, {form}", False, row


def best_rates(document: Document) -> str:
    """Returns a sentence with the learning rates at which SFT and MPO have the best step-by-step accuracy.

    Only seeds with results for all rates count. The best rate is chosen on the reported seeds, so the accuracies are
    slightly too high.
    """
    rows = {
        method: {label.removeprefix(f"{method}, "): row for label, row in figures.task_of(document).tables["rate"].rows
                 if label.startswith(f"{method}, x")}
        for method in (SFT, "MPO")
    }  # fmt: skip
    columns = {row: figures.values(document, row, "cot") for labels in rows.values() for row in labels.values()}
    seeds = set.intersection(*(set(column) for column in columns.values()))
    if not seeds:
        return ""
    best: dict[str, str] = {}
    parts = []
    for method, labels in rows.items():
        means = {label: statistics.fmean(columns[row][seed] for seed in seeds) for label, row in labels.items()}
        label = max(means, key=lambda label: means[label])
        best[method] = labels[label]
        direct = statistics.fmean(value for seed, value in figures.values(document, labels[label], "direct").items()
                                  if seed in seeds)  # fmt: skip
        parts.append(f"{method} is best at {label} ({means[label]:.1f} step by step, {direct:.1f} directly)")
    gains = [columns[best["MPO"]][seed] - columns[best[SFT]][seed] for seed in sorted(seeds)]
    (verdict,) = verdicts([gains])
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    error = "" if verdict.error is None else f" ± {verdict.error:.1f}"
    word = group_of(gains, verdict)
    return (
        f"Over {count}, {'; '.join(parts)}. Each at its best rate, MPO minus SFT is {statistics.fmean(gains):+.1f}"
        f"{error} points: *{word}*."
    )


def strengths(document: Document) -> str:
    """Returns a sentence with two accuracy differences for each strength of the language prior.

    They are accuracy(direct) - accuracy(step by step) of the starting model, and accuracy(MPO) - accuracy(SFT).
    """
    parts = []
    for label, row in figures.task_of(document).tables["strength"].rows:
        if not label.startswith(START):
            continue
        suffix = row.removeprefix(START)
        gains = figures.differences(document, f"MPO{suffix}", f"{SFT}{suffix}", "cot")
        steps, direct = figures.values(document, row, "cot"), figures.values(document, row, "direct")
        if gains and steps:
            gap = statistics.fmean(direct[seed] - steps[seed] for seed in steps)
            count = f"{len(gains)} seed{'s' * (len(gains) > 1)}"
            parts.append(
                f"{label.removeprefix(START + ', ')}: gap {gap:+.1f}, gain {statistics.fmean(gains):+.1f} ({count})"
            )
    if not parts:
        return ""
    return f"Gap and gain in points, by prior: {'; '.join(parts)}."


def unparsable(document: Document) -> str:
    """Returns a sentence that names the models with many unreadable step-by-step answers."""
    task = figures.task_of(document)
    shares = {row: figures.values(document, row, "cot", "unparsable") for row in (*task.starts, *task.rows)}
    means = {row: statistics.fmean(values.values()) for row, values in shares.items() if values}
    named = [f"{row} ({mean:.1f} %, {len(shares[row])} seed{'s' * (len(shares[row]) > 1)})"
             for row, mean in means.items() if mean > MANY_UNPARSABLE]  # fmt: skip
    return (
        f"Rows with more than {MANY_UNPARSABLE:.0f} % of step-by-step answers unreadable: "
        f"{', '.join(named) or 'none'}, of {len(means)} rows."
    )
