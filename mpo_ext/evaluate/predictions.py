"""Writes and reads ``predictions-MODEL.jsonl``, and writes the files for other evaluation toolkits."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.evaluate.cells import Cell
from mpo_ext.evaluate.exports import EXPORTS, vlmevalkit_columns
from mpo_ext.evaluate.scoring import ScoredResponse
from mpo_ext.files import atomic_write
from mpo_ext.generate.items import Item
from mpo_ext.images import describe_source, is_data_url
from mpo_ext.journal import encode_line

_SCORED = ("answer", "correct", "unreadable", "rule", "tokens", "finish")


def write_predictions(
    cells: Sequence[Cell],
    out: Path,
    *,
    exports: Sequence[str],
    model_files: Mapping[str, str],
    data_files: Mapping[str, str],
    world_size: int,
) -> None:
    """Writes the sampled responses of each model to ``predictions-MODEL.jsonl``.

    Also sets the ``scores`` and the ``offsets`` of each cell.

    Args:
        cells: Cells of the evaluation. A cell combines a model, a file of questions and a prompt. Cells of the same
            model must be adjacent.
        out: Folder of the evaluation.
        exports: Names of evaluation toolkits, keys of ``EXPORTS``. Files for these toolkits are written, too.
        model_files: Dict from the name of each model to its short text for file names.
        data_files: Dict from the name of each file of questions to its short text for file names.
        world_size: Number of processes that sampled responses.

    Raises:
        IncompleteRunError: If a process has not sampled all its responses for a model. The files of the models before
            this model have been written by then.
    """
    columns: dict[str, list[str]] = {}
    for model, model_cells in itertools.groupby(cells, key=lambda cell: cell.model):
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(atomic_write(predictions_path(out, model_files[model])))
            for cell in model_cells:
                data = cell.data.name
                if data not in columns:
                    columns[data] = vlmevalkit_columns(cell.data.source.items()) if "vlmevalkit" in exports else []
                task, samples = f"{data_files[data]}-{cell.evaluation.prompt}", cell.evaluation.questions.samples
                adders = [
                    stack.enter_context(EXPORTS[kit](out, model_files[model], task, samples, columns[data]))
                    for kit in exports
                ]
                for index, (item, problem, responses) in enumerate(cell.read(world_size)):
                    cell.scores.append(cell.evaluation.question_score(item, problem, responses))
                    cell.offsets.append(file.tell())
                    file.writelines(map(encode_line, _lines(cell, index, item, problem, responses)))
                    if not problem:
                        for add in adders:
                            add(index, item, cell.evaluation.questions.prompt(item), responses)


def predictions_path(out: Path, model_file: str) -> Path:
    return out / f"predictions-{model_file}.jsonl"


def read_predictions(path: Path, cell: Cell, indices: Iterable[int]) -> Iterator[list[dict[str, Any]]]:
    """Yields the stored responses to each question, as a list of dicts.

    If a question could not be asked, the list has one dict, with the reason under the key "problem".

    Args:
        path: File with the predictions of a model.
        cell: The model, file of questions and prompt to which the predictions belong. ``write_predictions`` must have
            set the scores and offsets of the cell.
        indices: Positions of the questions in the file of questions.
    """
    with open(path, "rb") as file:
        for index in indices:
            file.seek(cell.offsets[index])
            count = cell.evaluation.questions.samples if cell.scores[index].problem is None else 1
            yield [json.loads(file.readline()) for _ in range(count)]


def _lines(
    cell: Cell, index: int, item: Item, problem: str | None, responses: Sequence[ScoredResponse]
) -> Iterator[dict[str, Any]]:
    """Yields a line for each response to a question. If ``problem`` is set, yields a single line with the problem."""
    shared = {
        "data": cell.data.name,
        "prompt": cell.evaluation.prompt,
        "index": index,
        "question": item.question,
        **({"messages": list(item.messages)} if item.messages else {}),
        **({"tools": list(item.tools)} if item.tools else {}),
        "images": [describe_source(image) if is_data_url(image) else image for image in item.pair_images],
        **({"videos": [video.to_value() for video in item.pair_videos]} if item.videos else {}),
        "truth": list(item.truths),
    }
    if problem:
        yield {**shared, "problem": problem}
    for sample, response in enumerate(responses):
        scored = {
            name: getattr(response, name) for name in ("answer", "correct", "unreadable", "rule", "tokens", "finish")
        }
        yield {**shared, "sample": sample, "response": response.text, **scored}
