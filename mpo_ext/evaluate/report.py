"""Writes the human-readable reports of an evaluation: tables, plots, and a page of wrongly answered questions."""

import hashlib
import importlib.util
import math
import random
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.checks import install_hint
from mpo_ext.data.view import Thumbnails, count_names, cut_text, script_json
from mpo_ext.evaluate.cells import Cell
from mpo_ext.evaluate.predictions import predictions_path, read_predictions
from mpo_ext.evaluate.results import ALL
from mpo_ext.evaluate.scoring import WITHOUT_IMAGE
from mpo_ext.files import atomic_path, atomic_write
from mpo_ext.report import Bars, Panel, markdown_table, save_page, save_panels

_UNREADABLE = (
    "Unreadable: no answer can be extracted, or the matcher can call it neither right nor wrong. "
    "The accuracy counts these responses as not right.\n"
)
_WITHOUT_IMAGE = (
    "The same questions with and without their image, for the questions that have one. Same answer: the share of the "
    "questions whose readable answer is equal with and without the image; for several samples, the most frequent "
    "answer. Difference: accuracy with the image less accuracy without it, in points.\n"
)
_MOST_FREQUENT = "A model that always gives this answer is right as often, without an image."
_TEMPLATE = "failures_view.html.j2"
_THUMBNAIL = 320
_IMAGE_BUDGET = 64 << 20
_MAX_CHARACTERS = 8000  # maximum length of a text on the page
_MAX_SAMPLES = 8  # maximum number per question and column on the page


def write_reports(
    cells: Sequence[Cell],
    results: Mapping[str, Any],
    out: Path,
    *,
    model_files: Mapping[str, str],
    limit: int,
    seed: int,
) -> list[str]:
    """Writes ``table.md``, ``accuracy.png``, ``accuracy.svg`` and ``failures.html``, and returns warnings.

    A warning names a report that is not written because a package is missing.

    Args:
        cells: Cells with scores. A cell is a combination of model, file of questions and prompt.
        results: Content of ``results.json``.
        out: Folder of the evaluation.
        model_files: A dict from the name of a model to the text that stands for the model in file names.
        limit: Maximum number of questions in ``failures.html``. If more questions have a wrong answer, a random
            selection of them is shown.
        seed: Seed of the random selection.
    """
    with atomic_write(out / "table.md") as file:
        file.write(markdown_report(results).encode(errors="replace"))
    warnings = []
    if importlib.util.find_spec("matplotlib") is None:
        warnings.append("no picture of the accuracies: matplotlib is not installed (pip install matplotlib)")
    else:
        _write_pictures(results, out)
    if importlib.util.find_spec("jinja2") is None:
        warnings.append(f"no page of failures: jinja2 is not installed: {install_hint('data')}")
    else:
        _write_page(cells, out, model_files=model_files, limit=limit, seed=seed)
    return warnings


def markdown_report(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown tables: accuracies, counts and pass@k, and comparisons."""
    models = list(results["settings"]["models"])
    rows = results["results"]
    texts = ["# Evaluation\n", "Accuracy in %, ± its standard error.\n", accuracy_table(results)]
    header = ["", "model", "questions", "95 % interval", "unreadable %", "cut off %", "tokens"]
    samples = results["settings"]["samples"]
    if samples > 1:
        header += ["majority %", *(f"pass@{k} %" for k in rows[0]["pass_at"])]
    lines = []
    for row in rows:
        interval = "-" if row["interval"] is None else " to ".join(f"{100 * end:.1f}" for end in row["interval"])
        line = [_case(row), row["model"], f"{row['questions']:,}", interval]
        line += [f"{100 * row['unreadable']:.1f}", f"{100 * row['cut_off']:.1f}", f"{row['tokens_per_response']:.1f}"]
        if samples > 1:
            line += [_percent(row["majority"]), *(_percent(each) for each in row["pass_at"].values())]
        lines.append(line)
    texts += ["## Other numbers\n", _UNREADABLE, _markdown(header, lines)]
    if "without_image" in results:
        texts += ["## Without the image\n", _WITHOUT_IMAGE, without_image_table(results)]
    if skipped := _skipped(rows):
        lines = [[data, reason, f"{count:,}"] for (data, reason), count in skipped.items()]
        texts += ["Questions that were not asked:\n", _markdown(["", "reason", "questions"], lines)]
        texts += [f"{reason}, for example: {text}\n" for reason, text in results.get("refused_examples", {}).items()]
    comparisons = [comparison for comparison in results["comparisons"] if _is_shown(comparison, models[0])]
    if comparisons:
        header = ["", "first", "second", "difference", "only second right", "only first right", "p"]
        texts += [
            "## Differences on the same questions\n",
            "In points, second less first, ± the standard error of the paired difference. "
            "p is two-sided and not corrected for the number of comparisons.\n",
            _markdown(header, [_comparison_row(comparison) for comparison in comparisons]),
        ]
        if samples > 1:
            texts += ['"Only right" here counts questions with a larger share of right samples.\n']
    return "\n".join(texts)


def console_notes(results: Mapping[str, Any]) -> list[str]:
    """Returns notes to print below the accuracies, such as the number of questions that were not asked."""
    settings = results["settings"]
    rows = [row for row in results["results"] if not row["prompt"].endswith(WITHOUT_IMAGE)]
    notes = []
    for model, prompt in dict.fromkeys((row["model"], row["prompt"]) for row in rows):
        own = [row for row in rows if (row["model"], row["prompt"]) == (model, prompt) and row["data"] != ALL]
        asked = sum(row["questions"] for row in own)
        unreadable = sum(row["unreadable"] * row["questions"] for row in own)
        if unreadable:
            share = f"{100 * unreadable / asked:.1f} % of the responses unreadable"
            notes.append(
                f"{model}, {prompt}: {share}: do --prompt, --style and --matcher fit the model? failures.html shows "
                "the responses"
            )
    examples = results.get("refused_examples", {})
    for (data, reason), count in _skipped(rows).items():
        if data != ALL:
            example = f", for example: {examples[reason]}" if reason in examples else ""
            notes.append(f"{data}: {count:,} questions not asked: {reason}{example}")
    for data, file in settings["data"].items():
        asked = sorted({row["questions"] for row in rows if row["data"] == data})
        if asked[0] < file["questions"]:
            numbers = " to ".join(f"{number:,}" for number in dict.fromkeys((asked[0], asked[-1])))
            notes.append(f"{data}: the accuracy is over {numbers} of {file['questions']:,} questions")
    return notes


def _skipped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """Returns the number of questions that were not asked, by (file, reason)."""
    skipped: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["prompt"].endswith(WITHOUT_IMAGE):  # questions without an image were asked once
            continue
        for reason, count in row["refused"].items():
            skipped[row["data"], reason] = max(count, skipped.get((row["data"], reason), 0))
    return skipped


def accuracy_table(results: Mapping[str, Any]) -> str:
    """Returns a Markdown table of accuracies. It has a column for each model.

    Each combination of a file of questions and a prompt template has a row.
    """
    models = list(results["settings"]["models"])
    cells: dict[str, dict[str, str]] = {}
    for row in results["results"]:
        cells.setdefault(_case(row), {})[row["model"]] = _percent(row)
    return _markdown(["", *models], [[case, *(row[model] for model in models)] for case, row in cells.items()])


def without_image_table(results: Mapping[str, Any]) -> str:
    """Returns a Markdown table that compares each model's answers with the image and without the image.

    A line has the accuracy with the image, the accuracy without the image, the fraction of equal answers, and the
    difference of the two accuracies. All values are in percent. The text below the table states the accuracy of a
    constant answer: the most frequent true answer.
    """
    lines = []
    for row in results["without_image"]:
        shares = [row["with_image"], row["without_image"], {**row["unchanged"], "accuracy": row["unchanged"]["share"]}]
        difference = _difference(row["comparison"])
        lines.append([_case(row), row["model"], f"{row['questions']:,}", *map(_percent, shares), difference])
    header = ["", "model", "questions", "with image %", "without image %", "same answer %", "difference"]
    frequent = dict.fromkeys(
        f"{row['data']}: most frequent true answer: {100 * row['most_frequent_truth']:.1f} % of the questions.\n"
        for row in results["without_image"]
        if row["most_frequent_truth"] is not None
    )
    return "\n".join([_markdown(header, lines), *frequent, *([f"{_MOST_FREQUENT}\n"] if frequent else [])])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([*map(_cell, header)], [[*map(_cell, row)] for row in rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _case(row: Mapping[str, Any]) -> str:
    return f"{row['data']}, {row['prompt']}"


def _percent(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "-"
    error = row["standard_error"]
    return f"{100 * row['accuracy']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _is_shown(comparison: Mapping[str, Any], baseline: str) -> bool:
    """Returns whether ``table.md`` shows a comparison.

    The table shows comparisons of two prompts for the same model. It also shows comparisons whose first model is
    ``baseline``.
    """
    first, second = comparison["first"], comparison["second"]
    return first["model"] in (baseline, second["model"])


def _comparison_row(comparison: Mapping[str, Any]) -> list[str]:
    first, second = comparison["first"], comparison["second"]
    is_between_models = first["model"] != second["model"]
    case = f"{comparison['data']}, {first['prompt'] if is_between_models else first['model']}"
    names = [side["model"] if is_between_models else side["prompt"] for side in (first, second)]
    text, p = _difference(comparison), comparison["p"]
    p_text = "-" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"
    return [case, *names, text, f"{comparison['gained']:,}", f"{comparison['lost']:,}", p_text]


def _difference(comparison: Mapping[str, Any]) -> str:
    difference, error = comparison["difference"], comparison["standard_error"]
    text = "-" if difference is None else f"{100 * difference:+.1f}"
    return text + ("" if error is None else f" ± {100 * error:.1f}")


def _write_pictures(results: Mapping[str, Any], out: Path) -> None:
    settings = results["settings"]
    prompts = list(settings["prompts"])
    found = {(row["model"], row["data"], row["prompt"]): row for row in results["results"]}
    panels = []
    for data in dict.fromkeys(row["data"] for row in results["results"]):
        bars = []
        for number, model in enumerate(settings["models"]):
            rows = [found[model, data, prompt] for prompt in prompts]
            # Without an asked question there is no accuracy, and NaN draws no bar.
            values = [math.nan if row["accuracy"] is None else 100 * row["accuracy"] for row in rows]
            errors = [100 * (row["standard_error"] or 0) for row in rows]
            bars.append(Bars(model, prompts, values, errors, color=f"C{number % 10}"))
        panels.append(Panel(data, "prompt", "accuracy (%)", bars))
    for name in ("accuracy.png", "accuracy.svg"):
        with atomic_path(out / name) as path:
            save_panels(path, "Accuracy, with standard errors", panels)
            if path.suffix == ".svg":
                path.write_text(_without_chance(path.read_text(encoding="utf-8")), encoding="utf-8")


def _without_chance(svg: str) -> str:
    """Makes an SVG picture reproducible: removes the date, and replaces random ids by fixed ids."""
    svg = re.sub(r"\s*<dc:date>.*?</dc:date>", "", svg, flags=re.S)
    names = dict.fromkeys(re.findall(r'(?:id="|#)([mpC]?[0-9a-f]{10,})\b', svg))
    numbers = {name: f"n{number}" for number, name in enumerate(names)}
    return re.sub(r'(?<=id=")[^"]+(?=")|(?<=#)[mpC]?[0-9a-f]{10,}\b', lambda m: numbers.get(m[0], m[0]), svg)


def _write_page(cells: Sequence[Cell], out: Path, *, model_files: Mapping[str, str], limit: int, seed: int) -> None:
    """Writes ``failures.html``: questions with a wrong answer, and the responses of all models and prompts to them.

    A question is shown only if a model that saw the image answered it wrongly. The page also shows the responses that
    models gave without seeing the image.
    """
    by_data: dict[str, list[Cell]] = {}
    for cell in cells:
        by_data.setdefault(cell.data.name, []).append(cell)
    failed = [
        (data, index)
        for data, data_cells in by_data.items()
        for index in range(data_cells[0].data.source.count)
        if any(not all(cell.scores[index].right) for cell in data_cells if cell.with_image)
    ]
    total = sum(data_cells[0].data.source.count for data_cells in by_data.values())
    notes = [f"{len(failed):,} of {total:,} questions have a wrong answer; the others are not shown."]
    if not all(cell.with_image for cell in cells):
        notes.append(
            f"Answers without the image stand in the columns of the prompts ending in {WITHOUT_IMAGE}. They are for "
            "comparison: a question with only such wrong answers is not shown."
        )
    skipped = sum(
        any(cell.scores[index].problem is not None for cell in data_cells if cell.with_image)
        for data_cells in by_data.values()
        for index in range(data_cells[0].data.source.count)
    )
    if skipped:
        notes.append(f"{skipped:,} questions could not be asked of all models; table.md has the reasons.")
    picked = failed
    if len(failed) > limit:
        picked = [failed[place] for place in sorted(random.Random(seed).sample(range(len(failed)), limit))]
        notes.append(f"{limit:,} of them are shown, drawn at random with seed {seed}.")
    images = Thumbnails(_THUMBNAIL, _IMAGE_BUDGET)
    columns = list(dict.fromkeys((cell.model, cell.evaluation.prompt) for cell in cells))
    entries: list[dict[str, Any]] = []
    for data, data_cells in by_data.items():
        indices = [index for name, index in picked if name == data]
        data_entries = list(_question_entries(data_cells[0], set(indices), images))
        for entry in data_entries:
            entry["answers"] = [None] * len(columns)
        for cell in data_cells:
            column = columns.index((cell.model, cell.evaluation.prompt))
            path = predictions_path(out, model_files[cell.model])
            for entry, lines in zip(data_entries, read_predictions(path, cell, indices), strict=True):
                entry["answers"][column] = _answers(lines)
        entries += data_entries
    if images.omitted:
        notes.append(f"{images.omitted:,} images did not fit into {_IMAGE_BUDGET:,} bytes.")
    column_names = [f"{model}, {prompt}" for model, prompt in columns]
    values = {
        "title": "Failures",
        "notes": notes,
        "data_names": count_names(entry["data"] for entry in entries),
        "columns": column_names,
        "data": script_json({"columns": column_names, "items": entries, "images": images.uris}),
    }
    values["nonce"] = hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
    save_page(out / "failures.html", _TEMPLATE, values)


def _question_entries(cell: Cell, indices: Container[int], images: Thumbnails) -> Iterator[dict[str, Any]]:
    """Yields an entry of ``failures.html`` for each question in ``indices``: its text, true answers and images.

    ``indices`` are positions in the file of questions.
    """
    for index, item in enumerate(cell.data.source.items()):
        if index in indices:
            yield {
                "data": cell.data.name,
                "where": f"{cell.data.name} {index + 1}",
                "question": cut_text(
                    item.prompt_text if item.messages or item.tools else item.question, _MAX_CHARACTERS
                ),
                "truth": cut_text(" | ".join(item.truths), _MAX_CHARACTERS),
                "images": [
                    *map(images.add, item.image_sources),
                    *(frame for video in item.video_sources for frame in images.add_video(video)),
                ],
            }


def _answers(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the responses to a question as a dict for ``failures.html``.

    The dict has counts, and the text of at most ``_MAX_SAMPLES`` responses. Wrong responses are preferred. ``lines``
    are the stored predictions of one model for the question.
    """
    problem = lines[0].get("problem")
    samples = [] if problem else lines
    shown = sorted(range(len(samples)), key=lambda place: samples[place]["correct"])[:_MAX_SAMPLES]
    return {
        "problem": problem,
        "right": sum(sample["correct"] for sample in samples),
        "unreadable": sum(sample["unreadable"] for sample in samples),
        "cutOff": sum(sample["finish"] == "length" for sample in samples),
        "count": len(samples),
        "samples": [
            {
                "text": cut_text(sample["response"], _MAX_CHARACTERS),
                "answer": sample["answer"] and cut_text(sample["answer"], _MAX_CHARACTERS),
                "right": sample["correct"],
                "unreadable": sample["unreadable"],
                "cutOff": sample["finish"] == "length",
            }
            for sample in (samples[place] for place in sorted(shown))
        ],
    }
