"""Writes ``demo.html``, a self-contained page with examples of digits that the SFT model hallucinates."""

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext import report
from mpo_ext.answers import extract_answer
from mpo_ext.data import Pair, open_pairs
from mpo_ext.demo import digits, tables
from mpo_ext.demo.measures import paired_difference, standard_error
from mpo_ext.demo.reading import ReadingTask, hallucinated_cells, read_digits
from mpo_ext.demo.results import DemoResult
from mpo_ext.demo.tables import LABELS, START
from mpo_ext.demo.train import score

_TEMPLATE = "demo.html.j2"
_SCALE = 6  # the page shows each pixel as a square of this width
_MENDED, _BROKEN = 7, 2  # maximum numbers of examples; the first mended example is at the top of the page


@dataclasses.dataclass(frozen=True, slots=True)
class Examples:
    """Indices of step-by-step questions that either only the SFT model or only the MPO model answered correctly.

    Attributes:
        mended: Questions that only the MPO model answered correctly.
        broken: Questions that only the SFT model answered correctly.
        shown: The first few questions of ``mended`` that fulfil two conditions. The SFT model hallucinated a digit,
            and the MPO model named all digits correctly.
    """

    mended: list[int]
    broken: list[int]
    shown: list[int]


def find_examples(
    tasks: Sequence[ReadingTask], before: Sequence[str], after: Sequence[str], prior_step: int
) -> Examples:
    """Returns the step-by-step questions that only the SFT model or only the MPO model answered correctly.

    ``before`` are the responses of the SFT model to ``tasks``, and ``after`` are the responses of the MPO model.
    """
    old, new = score(tasks, before), score(tasks, after)
    stepwise = [index for index, task in enumerate(tasks) if task.form == "cot"]
    mended = [index for index in stepwise if old[index] is not True and new[index] is True]
    shown = [
        index
        for index in mended
        if hallucinated_cells(tasks[index], before[index], prior_step)
        and read_digits(after[index], tasks[index].cells) == list(tasks[index].values)
    ]
    broken = [index for index in stepwise if old[index] is True and new[index] is not True]
    return Examples(mended, broken, shown[:_MENDED])


def save(
    path: Path,
    result: DemoResult,
    tasks: Sequence[ReadingTask],
    responses: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    note: str = "",
) -> None:
    """Writes ``demo.html``.

    Args:
        path: Path of the page.
        result: Results of a run.
        tasks: Held-out questions.
        responses: Responses to the questions by method.
        folder: Folder of the run, with ``pairs.jsonl``. ``curves.png`` must be in the same folder as the page.
        note: Warning at the top of the page; an empty text adds none.
    """
    step = result.settings.prior_step
    examples = find_examples(tasks, responses[START], responses["MPO"], step)

    def example(index: int) -> dict[str, Any]:
        task = tasks[index]
        names = (START, "MPO")
        answers = [{"name": name, **_reading(task, responses[name][index], step)} for name in names]
        return {"image": _data_url(task.picture), "size": _size(task), "question": task.question, "truth": task.answer,
                "digits": ", ".join(map(str, task.values)), "answers": answers}  # fmt: skip

    accuracy = {name: 100 * result.accuracy[name]["cot"]["accuracy"] for name in LABELS}
    gain, error = paired_difference(result.accuracy["MPO"]["cot"], result.accuracy["SFT"]["cot"])
    values = {
        "note": note,
        "settings": result.settings,
        "step": step,
        "shown": [example(index) for index in examples.shown],
        "broken": [example(index) for index in examples.broken[:_BROKEN]],
        "counts": {"mended": len(examples.mended), "broken": len(examples.broken)},
        "accuracy": {name: f"{value:.1f}" for name, value in accuracy.items()},
        "bars": [_bar(result, name, label) for name, label in LABELS.items()],
        "hallucinated": {name: f"{100 * result.accuracy[name]['cot']['hallucinated']:.1f}" for name in LABELS},
        "gain": f"{gain:+.1f}",
        "error": f"{error:.1f}",
        "is_certain": gain > 2 * error,
        "pair": _dropout_pair(folder),
        "pair_counts": sorted(result.pair_counts.items()),
        "measures": tables.measures_table([result]),
        "differences": tables.differences_table([result]),
        "curves": _encode(path.with_name("curves.png").read_bytes()),
        "seconds": {name: f"{seconds:.0f}" for name, seconds in result.seconds.items()},
        "total": f"{sum(result.seconds.values()):.0f}",
    }
    report.save_page(path, _TEMPLATE, values)


def _reading(task: ReadingTask, response: str, step: int) -> dict[str, Any]:
    """Returns the parts of a step-by-step response for the page, such as the named digits and the final answer.

    ``step`` is the setting ``prior_step``.
    """
    wrong = hallucinated_cells(task, response, step)
    read = read_digits(response, task.cells)
    answer = extract_answer(response, digits.STYLES["cot"])
    return {
        "text": response,
        "digits": [
            {"cell": cell, "digit": digit, "truth": value, "is_right": digit == value, "is_hallucinated": n in wrong}
            for n, (cell, digit, value) in enumerate(zip(task.cells, read, task.values, strict=True))
        ],
        "answer": answer,
        "is_right": answer == str(task.answer),
        "before": [(read[n - 1], read[n], task.cells[n], task.values[n]) for n in wrong],
    }


def _bar(result: DemoResult, method: str, label: str) -> dict[str, Any]:
    forms = result.accuracy[method]
    return {
        "name": label,
        "forms": [
            {"name": tables.FORM_NAMES[form], "key": form, "value": f"{100 * forms[form]['accuracy']:.1f}",
             "error": f"{standard_error(**forms[form]):.1f}"}
            for form in digits.FORMS
        ],
    }  # fmt: skip


def _dropout_pair(folder: Path) -> dict[str, Any] | None:
    """Returns the first DropoutNTP pair for the page, or None if there is no such pair.

    The result has the image, the question and three texts. ``kept`` is the common beginning of both responses.
    ``chosen`` is the rest of the chosen response. ``rejected`` is the rest of the rejected response.
    """
    for _, pair in open_pairs(folder / "pairs.jsonl").scan():
        if not isinstance(pair, Pair) or (pair.provenance or {}).get("pipeline") != "dropout_ntp":
            continue
        assert pair.provenance is not None
        kept = pair.provenance["cut"]["tokens"]  # one token is one word
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        return {
            "image": _encode(Path(pair.images[0]).read_bytes()),
            "question": pair.question,
            "kept": " ".join(chosen[:kept]),
            "chosen": " ".join(chosen[kept:]),
            "rejected": " ".join(rejected[kept:]),
        }
    return None


def _data_url(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return _encode(data.getvalue())


def _encode(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _size(task: ReadingTask) -> int:
    return _SCALE * (0 if task.image is None else task.image.shape[0])
