"""Predictions in the files of other evaluation kits, so that their scores can be compared with ours."""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.answers import label_options
from mpo_ext.evaluate.scoring import Response
from mpo_ext.files import atomic_write
from mpo_ext.generate.items import Item
from mpo_ext.journal import encode_line

Add = Callable[[int, Item, str, Sequence[Response]], None]
_NO_ANSWER = "[invalid]"  # what the extraction filters of lm-eval and lmms-eval put there


@contextlib.contextmanager
def vlmevalkit(out: Path, model: str, task: str, samples: int, columns: Sequence[str]) -> Iterator[Add]:
    """VLMEvalKit's prediction tables, ``vlmevalkit/MODEL/MODEL_TASK.tsv``: a file for each sample of the questions.

    Columns: index, question, the options, all plain fields of the item, answer, prediction (the whole response), and
    ``extracted`` and ``hit``, which are ours. ``index`` is that of the item where it has one, else its number.

    Args:
        out: Folder of the evaluation.
        model: Name of the model, fit for a file.
        task: Name of data and prompt, fit for a file.
        samples: Per question.
        columns: From ``vlmevalkit_columns``.
    """
    with contextlib.ExitStack() as stack:
        tables = []
        for sample in range(samples):
            suffix = f"_sample{sample}" if samples > 1 else ""
            path = out / "vlmevalkit" / model / f"{model}_{task}{suffix}.tsv"
            binary = stack.enter_context(atomic_write(path))
            text = stack.enter_context(_text_of(binary))
            table = csv.DictWriter(text, columns, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
            table.writeheader()
            tables.append(table)

        def add(number: int, item: Item, prompt: str, responses: Sequence[Response]) -> None:
            fields = _fields(number, item)
            for table, response in zip(tables, responses, strict=True):
                found = {"prediction": response.text, "extracted": response.answer or "", "hit": int(response.correct)}
                table.writerow({**fields, **found})

        yield add


def vlmevalkit_columns(items: Iterator[Item]) -> list[str]:
    """The columns of a table that holds these items."""
    between: dict[str, None] = {}
    for number, item in enumerate(items):
        between.update(dict.fromkeys(_fields(number, item)))
    names = [name for name in between if name not in ("index", "question", "answer")]
    return ["index", "question", *names, "answer", "prediction", "extracted", "hit"]


@contextlib.contextmanager
def lmms_eval(out: Path, model: str, task: str, samples: int, columns: Sequence[str]) -> Iterator[Add]:
    """lmms-eval's log of samples, ``lmms-eval/MODEL/mpo-ext_samples_TASK.jsonl``: a line for each question.

    Keys: doc_id, target, input, resps, filtered_resps (the extracted answers), doc_hash, prompt_hash and target_hash
    as lmms-eval makes them, and the metric exact_match, here the share of right samples under our matcher.

    Args:
        out: Folder of the evaluation.
        model: Name of the model, fit for a file.
        task: Name of data and prompt, fit for a file.
        samples: Per question.
        columns: Not needed.
    """
    with atomic_write(out / "lmms-eval" / model / f"mpo-ext_samples_{task}.jsonl") as file:

        def add(number: int, item: Item, prompt: str, responses: Sequence[Response]) -> None:
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
    text = io.TextIOWrapper(binary, encoding="utf-8", newline="")
    try:
        yield text
    finally:
        text.detach()  # flushes; the file is closed by whom it belongs to


def _fields(number: int, item: Item) -> dict[str, Any]:
    """An item as a row: what is no plain value has no place in a table."""
    options = item.extra.get("options")
    labelled = label_options(options) if isinstance(options, (list, tuple, Mapping)) and options else {}
    plain = {
        name: value
        for name, value in item.extra.items()
        if isinstance(value, (str, int, float)) and name not in ("prediction", "extracted", "hit", "image")
    }
    answer = item.truths[0] if len(item.truths) == 1 else str(list(item.truths))
    return {"index": number, **labelled, **plain, "question": item.question, "answer": answer}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
