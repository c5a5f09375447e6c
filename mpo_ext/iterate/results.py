"""The results of a run of several rounds (``rounds.json``), and the page that shows them."""

import base64
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.evaluate.statistics import compare
from mpo_ext.iterate import stages
from mpo_ext.iterate.recipe import IterateRecipe
from mpo_ext.report import Line, Panel, save_page, save_panels

RESULTS = "rounds.json"
_FORMAT = "mpo_ext.rounds/1"
_TEMPLATE = "iterate.html.j2"
_LAST = 10  # training metrics are means over the last 1 / _LAST of the logged steps
_METRICS = ("reward_accuracy", "reward_margin", "loss", "ntp_loss")
_COUNTS = ("steps", "averaged_steps", "averaged_pairs")  # of the values of ``_training``
_SHARES = ("accuracy", "unreadable", "cut_off")  # ends of the names of metrics that are shares
# For each accuracy of pairs, the number of its pairs.
_PAIRS_OF = {"reward_accuracy": "averaged_pairs", "eval_reward_accuracy": "eval_pairs"}


def collect_results(recipe: IterateRecipe, numbers: Sequence[int]) -> dict[str, Any]:
    """Returns the content of ``rounds.json`` as JSON values. The rounds ``numbers`` must be finished.

    Each round has the following entries; round 0 has only the first three:

    - ``round``: its number.
    - ``model``: the path of its model.
    - ``accuracy``: the accuracies, in the format of an evaluation's ``results.json``.
    - ``sources``: a dict for each file of pairs (``_source_rows``).
    - ``training``: the training metrics.
    - ``comparisons``: comparisons with the model of the previous round and with the first model, on the same
      questions.
    """
    rounds: list[dict[str, Any]] = []
    shares: list[dict[tuple[str, str], dict[int, float]]] = []
    for number in numbers:
        folder = recipe.round_folder(number)
        evaluation = read_json(folder / "evaluation" / "results.json")
        shares.append(_question_accuracies(folder / "evaluation" / f"predictions-{stages.model_name(number)}.jsonl"))
        values: dict[str, Any] = {"round": number, "model": recipe.model_of(number)}
        if number:
            values |= {"sources": _source_rows(recipe, number), "training": _training(folder / "train" / "log.jsonl")}
        values["accuracy"] = [
            {name: value for name, value in row.items() if name != "model"} for row in evaluation["results"]
        ]
        if number:
            others = sorted({0, number - 1})
            values["comparisons"] = [
                {"with_round": other, **row}
                for other in others
                for row in _compare(shares[other], shares[number], recipe.evaluate.samples)
            ]
        rounds.append(values)
    return {"format": _FORMAT, "reference": recipe.reference, "rounds": rounds}


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _question_accuracies(path: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Reads a file of predictions, and returns the fraction of correct responses to each question.

    The result has the form ``{(data, prompt): {index of the question: fraction}}``.
    """
    right: dict[tuple[str, str], dict[int, list[bool]]] = {}
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            if "problem" not in line:
                questions = right.setdefault((line["data"], line["prompt"]), {})
                questions.setdefault(line["index"], []).append(line["correct"])
    return {
        case: {index: sum(values) / len(values) for index, values in questions.items()}
        for case, questions in right.items()
    }


def _compare(
    first: Mapping[tuple[str, str], Mapping[int, float]],
    second: Mapping[tuple[str, str], Mapping[int, float]],
    samples: int,
) -> list[dict[str, Any]]:
    rows = []
    for (data, prompt), questions in second.items():
        before = first.get((data, prompt), {})
        both = sorted(questions.keys() & before.keys())
        comparison = compare([before[index] for index in both], [questions[index] for index in both], samples=samples)
        names = ("questions", "difference", "standard_error", "gained", "lost", "p")
        rows.append({"data": data, "prompt": prompt, **{name: getattr(comparison, name) for name in names}})
    return rows


def _source_rows(recipe: IterateRecipe, number: int) -> list[dict[str, Any]]:
    """Returns a dict for each file of pairs in a round.

    The dict holds the fields of ``round_sources``, the number of pairs per epoch, and the counts from sampling.
    """
    rows = []
    for source in stages.round_sources(recipe, number):
        summary = read_json(recipe.round_folder(number) / source["pipeline"] / "summary.json")
        rows.append(
            {
                **source,
                "pairs_per_epoch": int(source["pairs"] * source["repeat_time"] + 1e-6),
                "items": summary["items"],
                "samples": summary["records"],
                "skipped": summary["refused"],
                "generated_tokens_per_pair": summary["generated_tokens_per_pair"],
            }
        )
    return rows


def _training(path: Path) -> dict[str, Any]:
    """Returns the last step, the mean metrics, and the metrics of the last evaluation from a training log.

    The metrics are averaged over the last tenth of the logged steps. Each step is weighted by its number of pairs.
    ``averaged_pairs`` is the number of pairs in all averaged steps.
    """
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    steps = [line for line in lines if "loss" in line]
    last = steps[-max(1, len(steps) // _LAST) :]
    pairs = round(sum(line.get("pairs", 1) for line in last))
    means = {
        name: sum(line[name] * line.get("pairs", 1) for line in last) / pairs
        for name in _METRICS
        if pairs and all(isinstance(line.get(name), (int, float)) for line in last)
    }
    evaluations = [line for line in lines if any(name.startswith("eval_") for name in line)]
    evaluation = {name: value for line in evaluations[-1:] for name, value in line.items() if name.startswith("eval_")}
    counts = {"steps": steps[-1]["step"] if steps else 0, "averaged_steps": len(last), "averaged_pairs": pairs}
    return {**counts, **means, **evaluation}


def accuracy_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table of accuracies in %.

    Each row belongs to a file and a prompt, and each column to a round.
    """
    rounds = results["rounds"]
    cells: dict[str, dict[int, str]] = {}
    for values in rounds:
        for row in values["accuracy"]:
            cells.setdefault(f"{row['data']}, {row['prompt']}", {})[values["round"]] = percent(row)
    header = ["accuracy in %", *(f"round {values['round']}" for values in rounds)]
    return header, [[case, *(row.get(values["round"], "-") for values in rounds)] for case, row in cells.items()]


def percent(row: Mapping[str, Any], name: str = "accuracy", sign: str = "") -> str:
    """Returns a fraction in percent with its standard error, such as "53.1 ± 2.0"; "-" for None.

    The fraction is ``row[name]``. ``sign`` is the sign option of the number format: "+" for differences.
    """
    if row[name] is None:
        return "-"
    error = row["standard_error"]
    return f"{100 * row[name]:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _training_cells(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the name and the text of each training metric except counts, such as ("loss", "0.5123").

    Fractions are shown in percent, such as ("reward_accuracy in %", "71.2 ± 1.3").
    """
    cells = []
    for name, value in training.items():
        if name in _COUNTS:
            continue
        if not isinstance(value, (int, float)):  # the log holds numbers that are not finite as texts
            cells.append((name, str(value)))
        elif name.endswith(_SHARES):
            cells.append(
                (f"{name} in %", percent({"accuracy": value, "standard_error": _share_error(training, name)}))
            )
        else:
            cells.append((name, f"{value:.4g}"))
    return cells


def _share_error(training: Mapping[str, Any], name: str) -> float | None:
    """Returns the standard error of a metric that is a fraction, such as "reward_accuracy"; None if it is unknown."""
    if name == "eval_answer_accuracy":
        return training.get("eval_answer_standard_error")
    count = training.get(_PAIRS_OF.get(name, ""), 0)
    return math.sqrt(training[name] * (1 - training[name]) / (count - 1)) if count > 1 else None


def write_rounds_page(path: Path, recipe: IterateRecipe, results: Mapping[str, Any]) -> None:
    """Writes the HTML page of the rounds if jinja2 is installed. The plot on the page requires matplotlib.

    Links on the page are relative, so the folder of the run can be moved.
    """
    if importlib.util.find_spec("jinja2") is None:
        return
    header, rows = accuracy_rows(results)
    values = {
        "title": f"MPO in rounds: {recipe.model}",
        "recipe": recipe,
        "picture": _picture(results) if importlib.util.find_spec("matplotlib") is not None else None,
        "accuracy_header": header,
        "accuracy_rows": rows,
        "rounds": [_page_round(recipe, values) for values in results["rounds"]],
    }
    save_page(path, _TEMPLATE, values)


def _page_round(recipe: IterateRecipe, values: Mapping[str, Any]) -> dict[str, Any]:
    number = values["round"]
    folder = f"round-{number}"
    comparisons = [
        {
            **row,
            "difference_text": percent(row, "difference", "+"),
            "p_text": "-" if row["p"] is None else "<0.0001" if row["p"] < 0.0001 else f"{row['p']:.4f}",
        }
        for row in values.get("comparisons", [])
    ]
    sources = [
        {
            **source,
            "page": _link(recipe, stages.page_path(recipe, number, source["pipeline"])),
            "file": _link(recipe, Path(source["path"])),
            "skipped": sorted(source["skipped"].items(), key=lambda item: -item[1]),
        }
        for source in values.get("sources", [])
    ]
    training = _training_cells(values["training"]) if number else []
    links = [("model card", f"{folder}/train/final/README.md"), ("training log", f"{folder}/train/log.jsonl")]
    links = [("training recipe", f"{folder}/recipe.yaml"), *links] if number else []
    links += [("wrong answers", f"{folder}/evaluation/failures.html"), ("results", f"{folder}/evaluation/table.md")]
    links = [(name, link) for name, link in links if (recipe.folder / link).exists()]
    page = {"comparisons": comparisons, "sources": sources, "training_cells": training, "links": links}
    return {**values, **page}


def _link(recipe: IterateRecipe, path: Path) -> str | None:
    """Returns the path of a file relative to the folder of the run, or None if it does not exist."""
    return os.path.relpath(path, recipe.folder).replace(os.sep, "/") if path.exists() else None


def _picture(results: Mapping[str, Any]) -> str:
    """Returns a plot as a data URL: accuracy, number of pairs and reward accuracy of each round."""
    rounds = results["rounds"]
    numbers = [values["round"] for values in rounds]
    accuracies: dict[str, list[tuple[int, float, float]]] = {}
    pairs: dict[str, list[tuple[int, float]]] = {}
    rewards: list[tuple[int, float, float]] = []
    for values in rounds:
        for row in values["accuracy"]:
            if row["accuracy"] is not None:
                name = f"{row['data']}, {row['prompt']}"
                point = (values["round"], 100 * row["accuracy"], 100 * (row["standard_error"] or 0))
                accuracies.setdefault(name, []).append(point)
        for source in values.get("sources", []):
            name = f"{source['pipeline']}, {Path(source['path']).stem}"
            pairs.setdefault(name, []).append((values["round"], source["pairs"]))
        if "reward_accuracy" in values.get("training", {}):
            error = _share_error(values["training"], "reward_accuracy") or 0
            rewards.append((values["round"], 100 * values["training"]["reward_accuracy"], 100 * error))
    panels = [
        Panel("Accuracy", "round", "accuracy (%)", _lines(accuracies)),
        Panel("Pairs", "round", "pairs", _lines(pairs)),
    ]
    if rewards:
        lines = _lines({"reward accuracy": rewards})
        panels.append(Panel("Reward accuracy in training", "round", "reward accuracy (%)", lines))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.png"
        save_panels(path, f"Rounds {numbers[0]} to {numbers[-1]}, with standard errors", panels)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _lines(named: Mapping[str, Sequence[tuple[float, ...]]]) -> list[Line]:
    """Returns a plot line for each name. A point is (x, y) or (x, y, standard error)."""
    lines = []
    for number, (name, points) in enumerate(named.items()):
        x, y, *errors = zip(*points, strict=True)
        lines.append(Line(name, x, y, color=f"C{number % 10}", errors=errors[0] if errors else None))
    return lines
