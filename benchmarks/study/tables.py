"""Reads result files of the study and makes their tables.

A result file has two lists. ``results`` has an entry for each seed and each model. A model is a starting model or the
result of a training run. ``starts`` has an entry for each seed: facts about the default starting model and its pairs.

``TASKS`` declares the training runs and the tables.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from benchmarks.study import helps, labels, sentences
from benchmarks.study.declare import COLUMNS, SFT, START, TEXT, StudyTable
from benchmarks.study.figures import (
    NOT_RUN,
    OLD_TASK,
    QUANTITIES,
    TASKS,
    differences,
    prefix_of,
    question_error,
    spread,
    start_of,
    task_of,
    values,
)
from mpo_ext.demo.digits import FORMS
from mpo_ext.report import markdown_table

SCHEMA = 1


# ---------------------------------------------------------------------------------------------------------- documents


def load(path: Path, *, has_all: bool = True) -> dict[str, Any]:
    """Reads and checks a result file of the study, and returns its content.

    With ``has_all=False``, the file may lack some of the declared runs.

    Raises:
        ValueError: If the file has a wrong format. The message names the file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check(document, has_all=has_all)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return document


def check(document: Mapping[str, Any], *, has_all: bool = True) -> None:
    """Raises ValueError if the content of a result file has a wrong format.

    If ``has_all`` is True, a result must exist for each seed and run.
    """

    def must(holds: bool, where: str, rule: str, value: object) -> None:
        if not holds:
            raise ValueError(f"{where} must be {rule}, got {value!r}")

    must(isinstance(document, Mapping), "the file", "an object", document)
    keys = {"schema", "benchmark", "quick", "environment", "settings", "seconds", "seeds", "starts", "results"}
    must(set(document) - {"task"} == keys, "the file", f"an object of {', '.join(sorted(keys))}", sorted(document))
    must(document["schema"] == SCHEMA, "schema", str(SCHEMA), document["schema"])
    must(document["benchmark"] == "study", "benchmark", "'study'", document["benchmark"])
    seeds = document["seeds"]
    must(bool(seeds) and len(set(seeds)) == len(seeds), "seeds", "a list of seeds, each once", seeds)
    name = document.get("task", OLD_TASK)
    must(name in TASKS, "task", f"one of {', '.join(TASKS)}", name)
    expected = {(seed, row) for seed in seeds for row in (*TASKS[name].starts, *TASKS[name].rows)}
    seen: set[tuple[int, str]] = set()
    for index, result in enumerate(document["results"]):
        where = f"results[{index}]"
        key = (result.get("seed"), result.get("row"))
        must(key in expected and key not in seen, where, "of a seed and a row, once", key)
        seen.add(key)
        must(result["status"] in ("measured", "failed"), f"{where}.status", "'measured' or 'failed'", result["status"])
        if result["status"] == "failed":
            must(bool(result.get("reason")), f"{where}.reason", "given", result.get("reason"))
            continue
        for column in COLUMNS:
            for quantity in QUANTITIES:
                value = result["evaluation"][column][quantity]
                is_number = isinstance(value, Real) and not isinstance(value, bool)
                is_share = quantity != "tokens"
                fits = is_number and 0 <= value < math.inf and (value <= 1 or not is_share)
                rule = "a share" if is_share else "finite and not negative"
                must(fits, f"{where}.evaluation.{column}.{quantity}", rule, value)
    must(seen == expected or not has_all, "results", "complete", sorted(map(str, expected - seen))[:3])
    must([start["seed"] for start in document["starts"]] == list(seeds), "starts", "one per seed", document["starts"])


# ------------------------------------------------------------------------------------------------------------- tables


def tables(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the generated Markdown blocks of docs/, as a dict from name to text.

    Examples of names are "study_setup" and "prior_differences". ``prefix_of`` returns the first word of a name.
    """
    prefix, task = prefix_of(document), task_of(document)
    blocks = {f"{prefix}_setup": _setup(document)}
    for name, table in task.tables.items():
        blocks[f"{prefix}_{name}"] = _table(document, table)
    differences = _differences if prefix == "study" else _verdicts
    if task.paper:
        blocks |= {f"{prefix}_labels": labels.table(document), f"{prefix}_cost": labels.cost(document)}
        blocks[f"{prefix}_findings"] = sentences.findings(document)
        blocks[f"{prefix}_best_rates"] = sentences.best_rates(document)
    return {**blocks, f"{prefix}_differences": differences(document)}


_HEADER = [
    "row", "direct", "CoT", TEXT, "CoT - start", "CoT - SFT", "direct - SFT", "unparsable", "CoT tokens", "seeds",
]  # fmt: skip


def _table(document: Mapping[str, Any], table: StudyTable) -> str:
    shown = [(label, row) for label, row in table.rows if values(document, row, "cot")]
    if not shown:
        return "Not run yet.\n"
    rows = [_cells(document, label, row) for label, row in shown]
    header = [*_HEADER[:-1], *(name for name, _, _ in task_of(document).columns), _HEADER[-1]]
    if not table.paper:
        return markdown_table(header, rows)
    theirs = [table.paper.get(row, "") for _, row in shown]
    return markdown_table((*header, "paper"), [[*ours, other] for ours, other in zip(rows, theirs, strict=True)])


def _cells(document: Mapping[str, Any], label: str, row: str) -> list[str]:
    task = task_of(document)
    start = start_of(task, row)
    sft = f"{SFT}{start.removeprefix(START)}"

    def difference(other: str, column: str) -> str:
        return "" if row == other else spread(differences(document, row, other, column), signed=True)

    def mean(column: str, quantity: str) -> str:
        numbers = values(document, row, column, quantity).values()
        return f"{statistics.fmean(numbers):.1f}" if numbers else ""

    unparsable = [mean(column, "unparsable") for column in FORMS]
    return [
        label,
        *(spread(list(values(document, row, column).values())) for column in COLUMNS),
        difference(start, "cot"),
        difference(sft, "cot"),
        difference(sft, "direct"),
        " / ".join(unparsable) if all(unparsable) else "",
        mean("cot", "tokens"),
        *(mean(form, quantity) for _, form, quantity in task.columns),
        str(len(values(document, row, "cot"))),
    ]


_NOISE = 2.5  # standard deviations; a mean of three seeds beyond them differs from zero at the 5 % level


def _differences(document: Mapping[str, Any]) -> str:
    """Returns a table of accuracy differences: mean, standard deviation, minimum and maximum over the seeds."""
    rows = []
    for row, other, column in task_of(document).differences["all"]:
        numbers = differences(document, row, other, column)
        if not numbers:
            continue
        is_noise = len(numbers) < 2 or abs(statistics.fmean(numbers)) < _NOISE * statistics.stdev(numbers)
        ends = [f"{number:+.1f}" for number in (min(numbers), max(numbers))]
        name = sentences.COLUMN_NAMES[column]
        rows.append([row, other, name, spread(numbers, signed=True), *ends, "no" if is_noise else "yes"])
    header = ["row", "compared with", "column", "difference", "smallest", "largest", "significant"]
    return markdown_table(header, rows)


def _verdicts(document: Mapping[str, Any]) -> str:
    """Returns a table of accuracy differences with p values and verdicts, in the order of the study's tables."""
    rows = []
    for name in task_of(document).differences:
        for (row, other, column), numbers, verdict in sentences.family_of(document, name):
            if not numbers:
                continue
            error = f" ± {verdict.error:.1f}" if verdict.error is not None else ""
            questions = question_error(document, row, other) if len(numbers) == 1 and column == "cot" else None
            if questions is not None:
                error = f" ± {questions:.1f} (questions)"
            p = "" if verdict.p is None else "<0.001" if verdict.p < 0.001 else f"{verdict.p:.3f}"
            title, shown = task_of(document).tables[name].title, sentences.COLUMN_NAMES[column]
            mean = f"{statistics.fmean(numbers):+.1f}{error}"
            paper = task_of(document).paper.get((row, other, column), "")
            rows.append(
                [title, row, other, shown, mean, str(len(numbers)), p, sentences.group_of(numbers, verdict), paper]
            )
    header = [
        "table",
        "row",
        "compared with",
        "column",
        "difference",
        "seeds",
        "corrected p value",
        "verdict",
        "paper",
    ]
    return markdown_table(header, rows) if rows else "Not run yet.\n"


def _block(file: str, name: str, documents: Mapping[str, Mapping[str, Any]]) -> str:
    return tables(documents[file])[name]


#: Result files that a block needs, and the function that returns its text, by name of the block.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Mapping[str, Any]]], str]]] = {
    f"{prefix}_{name}": ((file,), functools.partial(_block, file, f"{prefix}_{name}"))
    for file, prefix, task in (("study", "study", "perception"), ("study_prior", "prior", "language-prior"))
    for name in (
        "setup",
        "differences",
        *(("labels", "cost", "findings", "best_rates") if TASKS[task].paper else ()),
        *(table for table, declared in TASKS[task].tables.items() if declared.is_on_page),
    )
} | {
    "when_mpo_helps": (("study", "study_prior"), helps.table),
    "when_form": (("study_prior",), lambda documents: sentences.unparsable(documents["study_prior"])),
}


def _setup(document: Mapping[str, Any]) -> str:
    """Returns a table of settings and machine, a table of the numbers of pairs, and a list of the failed runs."""
    environment, settings = document["environment"], document["settings"]
    count, task = settings["evaluation_tasks"], task_of(document)
    measured = [result for result in document["results"] if result["status"] == "measured"]
    commits = dict.fromkeys(result.get("commit", environment["commit"]) for result in measured) or [
        environment["commit"]
    ]
    cpu = environment["cpu"].rsplit(" x ", 1)[0]
    facts = [
        ["training runs", str(sum(result["row"] not in task.starts for result in measured))],
        ["steps of a run", f"{settings['branch_steps']}, with {settings['branch_batch']} pairs each"],
        ["held-out CoT questions", f"{count:,}; standard error of a CoT accuracy: at most {50 / math.sqrt(count):.1f} "
                                   "points"],
        ["time", f"{document['seconds'] / 60:.0f} minutes of one core"],
        ["machine", f"{cpu}, {environment['cores']} cores, torch {environment['versions']['torch']}"],
        ["code", f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
                 f"{' with changes' if environment['modified'] else ''}, {environment['started'][:10]}"],
        ["command", f"`{environment['command']}`"],
    ]  # fmt: skip
    lines = ["| fact | value |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in facts)]
    starts = document["starts"]
    rows = [[name, *(str(start.get("pairs", {}).get(name, "")) for start in starts)] for name in task.pair_files]
    header = ["pairs", *(f"seed {start['seed']}" for start in starts)]
    lines.append(f"Number of pairs:\n\n{markdown_table(header, rows)}")
    failed = [
        f"{result['row']} (seed {result['seed']}: {_plain(result['reason'])})"
        for result in document["results"]
        if result["status"] == "failed" and result["reason"] != NOT_RUN
    ]
    lines.append(f"Failed: {'; '.join(failed)}." if failed else "No run failed.")
    not_run = sum(result.get("reason") == NOT_RUN for result in document["results"])
    if not_run:
        lines[-1] += (
            f' {not_run} declared runs were not made. The column "seeds" has the number of runs of each row. The '
            "tables leave out rows without a run."
        )
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "").replace(">", "").replace("\n", " ").rstrip(".")


def markdown(document: Mapping[str, Any]) -> str:
    """Returns all tables as Markdown sections."""
    prefix, titles = prefix_of(document), {"setup": "The study", "differences": "Differences"}
    if task_of(document).paper:
        titles |= {
            "labels": "Labels of the pairs",
            "cost": "Tokens per pair",
            "findings": "Directions of the paper",
            "best_rates": "Best learning rates",
        }
    titles |= {name: table.title for name, table in task_of(document).tables.items()}
    blocks = tables(document)
    return "\n".join(f"## {title}\n\n{blocks[f'{prefix}_{name}']}" for name, title in titles.items())
