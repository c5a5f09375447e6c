"""What people look at: the table, the picture and the page of failures."""

import hashlib
import importlib.util
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_ext.checks import install_hint
from mpo_ext.data.view import Thumbnails, count_names, cut_text, script_json
from mpo_ext.evaluate.scoring import Response
from mpo_ext.files import atomic_path, atomic_write
from mpo_ext.report import Bars, Panel, markdown_table, save_page, save_panels

if TYPE_CHECKING:
    from mpo_ext.evaluate.run import Cell

_TEMPLATE = "failures_view.html.j2"
_THUMBNAIL = 320
_IMAGE_BUDGET = 64 << 20
_MAX_CHARACTERS = 8000  # of a text in the page
_MAX_SAMPLES = 8  # of a question and model in the page


def write(
    cells: "Sequence[Cell]", results: Mapping[str, Any], out: Path, *, limit: int, world: int, seed: int
) -> list[str]:
    """Writes ``table.md``, ``accuracy.png``, ``accuracy.svg`` and ``failures.html``.

    Args:
        cells: Read ones.
        results: What goes into ``results.json``.
        out: Folder of the evaluation.
        limit: Most questions in the page.
        world: Number of processes.
        seed: Of the draw among more.

    Returns:
        What was left out because a package is missing.
    """
    with atomic_write(out / "table.md") as file:
        file.write(table(results).encode())
    left_out = []
    if importlib.util.find_spec("matplotlib") is None:
        left_out.append("no picture of the accuracies: matplotlib is not installed (pip install matplotlib)")
    else:
        _write_pictures(results, out)
    if importlib.util.find_spec("jinja2") is None:
        left_out.append(f"no page of failures: jinja2 is not installed: {install_hint('data')}")
    else:
        _write_page(cells, out / "failures.html", limit=limit, world=world, seed=seed)
    return left_out


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: accuracies side by side, what else there is to know, and the comparisons."""
    models = list(results["settings"]["models"])
    rows = results["results"]
    texts = ["# Evaluation\n", "Accuracy in %, ± its standard error.\n", accuracy_table(results)]
    header = ["", "model", "questions", "95 % interval", "unreadable %", "cut off %", "tokens"]
    samples = results["settings"]["samples"]
    if samples > 1:
        header += ["majority %", *(f"pass@{k} %" for k in rows[0]["pass_at"])]
    lines = []
    for row in rows:
        low_high = "-" if row["interval"] is None else " to ".join(f"{100 * end:.1f}" for end in row["interval"])
        line = [_case(row), row["model"], f"{row['questions']:,}", low_high]
        line += [f"{100 * row['unreadable']:.1f}", f"{100 * row['cut_off']:.1f}", f"{row['tokens_per_response']:.1f}"]
        if samples > 1:
            line += [_percent(row["majority"]), *(_percent(each) for each in row["pass_at"].values())]
        lines.append(line)
    texts += ["## Beside the accuracy\n", _markdown(header, lines)]
    refused: dict[tuple[str, str], int] = {}
    for row in rows:
        for reason, count in row["refused"].items():
            refused[row["data"], reason] = max(count, refused.get((row["data"], reason), 0))
    if refused:
        lines = [[data, reason, f"{count:,}"] for (data, reason), count in refused.items()]
        texts += ["Questions that were not asked:\n", _markdown(["", "reason", "questions"], lines)]
    compared = [each for each in results["comparisons"] if _is_shown(each, models[0])]
    if compared:
        texts += [
            "## Differences on the same questions\n",
            "In points, second less first, ± the standard error of the paired difference. "
            "p is two-sided and not corrected for the number of comparisons.\n",
            _markdown(
                ["", "first", "second", "difference", "only second right", "only first right", "p"],
                [_compared(each) for each in compared],
            ),
        ]
        if samples > 1:
            texts += ['"Only right" here counts questions with a larger share of right samples.\n']
    return "\n".join(texts)


def accuracy_table(results: Mapping[str, Any]) -> str:
    """A row for each file of questions and prompt, a column for each model."""
    models = list(results["settings"]["models"])
    cells: dict[str, dict[str, str]] = {}
    for row in results["results"]:
        cells.setdefault(_case(row), {})[row["model"]] = _percent(row)
    return _markdown(["", *models], [[case, *(own[model] for model in models)] for case, own in cells.items()])


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
    """In the table each model is compared with the first one, and the prompts of each; the rest is in results.json."""
    first, second = comparison["first"], comparison["second"]
    return first["model"] in (baseline, second["model"])


def _compared(comparison: Mapping[str, Any]) -> list[str]:
    first, second = comparison["first"], comparison["second"]
    is_between_models = first["model"] != second["model"]
    case = f"{comparison['data']}, {first['prompt'] if is_between_models else first['model']}"
    names = [side["model"] if is_between_models else side["prompt"] for side in (first, second)]
    difference, error, p = comparison["difference"], comparison["standard_error"], comparison["p"]
    text = "-" if difference is None else f"{100 * difference:+.1f}"
    text += "" if error is None else f" ± {100 * error:.1f}"
    return [case, *names, text, f"{comparison['gained']:,}", f"{comparison['lost']:,}", "-" if p is None else _p(p)]


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _write_pictures(results: Mapping[str, Any], out: Path) -> None:
    settings = results["settings"]
    prompts = list(settings["prompts"])
    found = {(row["model"], row["data"], row["prompt"]): row for row in results["results"]}
    panels = []
    for data in dict.fromkeys(row["data"] for row in results["results"]):
        bars = []
        for number, model in enumerate(settings["models"]):
            rows = [found[model, data, prompt] for prompt in prompts]
            values = [100 * (row["accuracy"] or 0) for row in rows]
            errors = [100 * (row["standard_error"] or 0) for row in rows]
            bars.append(Bars(model, prompts, values, errors, color=f"C{number % 10}"))
        panels.append(Panel(data, "prompt", "accuracy (%)", bars))
    for name in ("accuracy.png", "accuracy.svg"):
        with atomic_path(out / name) as path:
            save_panels(path, "Accuracy, with standard errors", panels)
            if path.suffix == ".svg":
                path.write_text(_without_chance(path.read_text(encoding="utf-8")), encoding="utf-8")


def _without_chance(svg: str) -> str:
    """The same picture without date, and with names that do not differ from one writing to the next."""
    svg = re.sub(r"\s*<dc:date>.*?</dc:date>", "", svg, flags=re.S)
    names = dict.fromkeys(re.findall(r'(?:id="|#)([mpC]?[0-9a-f]{10,})\b', svg))
    numbers = {name: f"n{number}" for number, name in enumerate(names)}
    return re.sub(r'(?<=id=")[^"]+(?=")|(?<=#)[mpC]?[0-9a-f]{10,}\b', lambda m: numbers.get(m[0], m[0]), svg)


def _write_page(cells: "Sequence[Cell]", path: Path, *, limit: int, world: int, seed: int) -> None:
    """Shows the questions that some response has wrong, with the responses of all models and prompts."""
    by_data: dict[str, list[Cell]] = {}
    for cell in cells:
        by_data.setdefault(cell.data.name, []).append(cell)
    failed = [
        (data, number)
        for data, own in by_data.items()
        for number in range(own[0].data.source.count)
        if any(not all(cell.questions[number].right) for cell in own)
    ]
    total = sum(own[0].data.source.count for own in by_data.values())
    notes = [f"{len(failed):,} of {total:,} questions have a wrong answer; the others are not shown."]
    refused = sum(question.problem is not None for own in by_data.values() for question in own[0].questions)
    if refused:
        notes.append(f"{refused:,} questions could not be asked; table.md has the reasons.")
    picked = failed
    if len(failed) > limit:
        picked = [failed[place] for place in sorted(random.Random(seed).sample(range(len(failed)), limit))]
        notes.append(f"{limit:,} of them are shown, drawn at random with seed {seed}.")
    images = Thumbnails(_THUMBNAIL, _IMAGE_BUDGET)
    columns = list(dict.fromkeys((cell.model, cell.evaluation.prompt) for cell in cells))
    entries: dict[tuple[str, int], dict[str, Any]] = {key: {} for key in picked}
    for cell in cells:
        _add_responses(entries, cell, columns.index((cell.model, cell.evaluation.prompt)), len(columns), images, world)
    if images.omitted:
        notes.append(f"{images.omitted:,} images did not fit into {_IMAGE_BUDGET:,} bytes.")
    shown = [entry for entry in entries.values() if entry]
    values = {
        "title": "Failures",
        "notes": notes,
        "data_names": count_names(entry["data"] for entry in shown),
        "columns": [f"{model}, {prompt}" for model, prompt in columns],
        "data": script_json(
            {"columns": [f"{model}, {prompt}" for model, prompt in columns], "items": shown, "images": images.uris}
        ),
    }
    values["nonce"] = hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
    save_page(path, _TEMPLATE, values)


def _add_responses(
    entries: dict[tuple[str, int], dict[str, Any]],
    cell: "Cell",
    column: int,
    columns: int,
    images: Thumbnails,
    world: int,
) -> None:
    """Puts the responses of a cell into the entries of its questions."""
    for number, (item, problem, responses) in enumerate(cell.read(world)):
        key = (cell.data.name, number)
        if key not in entries:
            continue
        if not entries[key]:
            entries[key] = {
                "data": cell.data.name,
                "where": f"{cell.data.name} {number + 1}",
                "question": cut_text(item.question, _MAX_CHARACTERS),
                "truth": cut_text(" | ".join(item.truths), _MAX_CHARACTERS),
                "images": [images.add(os.path.join(item.image_root, image)) for image in item.images],
                "answers": [None] * columns,
            }
        entries[key]["answers"][column] = _answers(problem, responses)


def _answers(problem: str | None, responses: Sequence[Response]) -> dict[str, Any]:
    """The responses of one column as the page shows them; wrong samples first where there are too many."""
    shown = sorted(range(len(responses)), key=lambda place: responses[place].correct)[:_MAX_SAMPLES]
    return {
        "problem": problem,
        "right": sum(response.correct for response in responses),
        "unreadable": sum(response.answer is None for response in responses),
        "cutOff": sum(response.finish == "length" for response in responses),
        "count": len(responses),
        "samples": [
            {
                "text": cut_text(responses[place].text, _MAX_CHARACTERS),
                "answer": responses[place].answer and cut_text(responses[place].answer or "", _MAX_CHARACTERS),
                "right": responses[place].correct,
                "cutOff": responses[place].finish == "length",
            }
            for place in sorted(shown)
        ],
    }
