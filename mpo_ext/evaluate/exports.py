"""Writes predictions in the formats of other evaluation toolkits, which can then score the same responses."""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.answers import label_options
from mpo_ext.data.messages import turns_text
from mpo_ext.evaluate.scoring import ScoredResponse
from mpo_ext.files import atomic_write
from mpo_ext.generate.items import Item
from mpo_ext.journal import encode_line

Add = Callable[[int, Item, str, Sequence[ScoredResponse]], None]
_NO_ANSWER = "[invalid]"  # the value of lm-eval's and lmms-eval's filters for a missing answer


@contextlib.contextmanager
def vlmevalkit(out: Path, model: str, task: str, samples: int, columns: Sequence[str]) -> Iterator[Add]:
    """Writes VLMEvalKit's prediction tables into the folder ``vlmevalkit/MODEL``.

    With one sample per question, there is one table, ``MODEL_TASK.tsv``. With several samples, the table
    ``MODEL_TASK_sampleN.tsv`` holds sample N of each question, counted from 0.

    The context manager yields a function that adds a question to the tables. The columns are:

    - index: the question's field ``index``. Without this field, the position of the question in the file.
    - question, the options A, B, ..., and all other scalar fields of the question except ``image``.
    - answer: the true answer. Several true answers are written as a Python list.
    - prediction: the whole response.
    - extracted: the extracted answer. VLMEvalKit does not have this column.
    - hit: 1 if the extracted answer is correct, otherwise 0. VLMEvalKit does not have this column.

    Args:
        out: Folder of the evaluation.
        model: Name of the model in file names.
        task: Name of the data and the prompt in file names.
        samples: Number of samples per question.
        columns: Result of ``vlmevalkit_columns``.
    """
    with contextlib.ExitStack() as stack:
        tables = []
        for sample in range(samples):
            suffix = f"_sample{sample}" if samples > 1 else ""
            binary = stack.enter_context(atomic_write(out / "vlmevalkit" / model / f"{model}_{task}{suffix}.tsv"))
            text = stack.enter_context(_text_of(binary))
            table = csv.DictWriter(text, columns, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
            table.writeheader()
            tables.append(table)

        def add(number: int, item: Item, prompt: str, responses: Sequence[ScoredResponse]) -> None:
            fields = _fields(number, item)
            for table, response in zip(tables, responses, strict=True):
                ours = {"prediction": response.text, "extracted": response.answer or "", "hit": int(response.correct)}
                table.writerow(fields | ours)

        yield add


def vlmevalkit_columns(items: Iterator[Item]) -> list[str]:
    """Returns the column names of VLMEvalKit's prediction table for the questions ``items``."""
    between: dict[str, None] = {}
    for number, item in enumerate(items):
        between.update(dict.fromkeys(_fields(number, item)))
    names = [name for name in between if name not in ("index", "question", "answer")]
    return ["index", "question", *names, "answer", "prediction", "extracted", "hit"]


@contextlib.contextmanager
def lmms_eval(out: Path, model: str, task: str, samples: int, columns: Sequence[str]) -> Iterator[Add]:
    """Writes lmms-eval's sample log, with a line for each question.

    The path is ``lmms-eval/MODEL/mpo-ext_samples_TASK.jsonl``. A line has lmms-eval's fields doc_id, target, input,
    resps, filtered_resps (the extracted answers), doc_hash, prompt_hash and target_hash. The field exact_match is the
    fraction of correct responses.

    ``vlmevalkit`` describes the arguments and the yielded function. ``columns`` is not used.
    """
    with atomic_write(out / "lmms-eval" / model / f"mpo-ext_samples_{task}.jsonl") as file:

        def add(number: int, item: Item, prompt: str, responses: Sequence[ScoredResponse]) -> None:
            prompt = turns_text(item.turns(prompt) or None, item.tools, prompt)
            target = item.truths[0] if len(item.truths) == 1 else str(list(item.truths))
            answers = [_NO_ANSWER if response.answer is None else response.answer for response in responses]
            line = {
                "doc_id": number,
                "target": target,
                "input": prompt,
                "resps": [[response.text for response in responses]],
                "filtered_resps": answers if samples == 1 else [answers],
                "doc_hash": _hash(json.dumps(item.to_dict(), indent=2, ensure_ascii=False)),
                "prompt_hash": _hash(prompt),
                "target_hash": _hash(target),
                "exact_match": sum(response.correct for response in responses) / samples,
            }
            file.write(encode_line(line))

        yield add


EXPORTS = {"vlmevalkit": vlmevalkit, "lmms-eval": lmms_eval}


@contextlib.contextmanager
def _text_of(binary: Any) -> Iterator[io.TextIOWrapper]:
    text = io.TextIOWrapper(binary, encoding="utf-8", errors="replace", newline="")  # lone surrogates
    try:
        yield text
    finally:
        text.detach()  # flushes, and leaves the file open


def _fields(number: int, item: Item) -> dict[str, Any]:
    """Returns the scalar fields and the answer options of a question, by column name.

    The fields ``prediction``, ``extracted``, ``hit`` and ``image`` are left out. ``number`` is the position of the
    question in the file.
    """
    options = item.extra.get("options")
    options_by_label = label_options(options) if isinstance(options, (list, tuple, Mapping)) and options else {}
    scalars = {
        name: value
        for name, value in item.extra.items()
        if isinstance(value, (str, int, float)) and name not in ("prediction", "extracted", "hit", "image")
    }
    answer = item.truths[0] if len(item.truths) == 1 else str(list(item.truths))
    question = item.prompt_text if item.messages or item.tools else item.question
    return {"index": number, **options_by_label, **scalars, "question": question, "answer": answer}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
