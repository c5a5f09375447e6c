"""The formats of preference data, and the detection of a row's format from its fields.

| format | row | reader |
| --- | --- | --- |
| mmpr | a line of MMPR: question, chosen, rejected, image, video | ``mmpr.py`` |
| pairs | ``Pair.to_dict()`` | ``jsonl.py`` |
| trl | TRL's preference format | ``trl.py`` |
| sharegpt | conversations, chosen, rejected (LLaMA-Factory) | ``sharegpt.py`` |
| alpaca | instruction, input, chosen, rejected (LLaMA-Factory) | ``alpaca.py`` |
| swift | messages, rejected_response (ms-swift) | ``swift.py`` |
| openai | input.messages, preferred_output, non_preferred_output | ``openai.py`` |
| rlaif-v | question, chosen, rejected, image or images as bytes or paths | ``rlaif_v.py`` |
| hf | any of these in a folder that ``save_to_disk`` of Hugging Face datasets wrote | ``hf.py`` |

Rows are stored in text files, in parquet files or in datasets. ``containers.py`` and ``hub.py`` read these.
``sources.py`` opens a path of any format; ``convert.py`` writes the formats in ``WRITABLE``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from mpo_ext.data.alpaca import from_alpaca
from mpo_ext.data.jsonl import LineFile
from mpo_ext.data.messages import is_conversation
from mpo_ext.data.openai import from_openai
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import SOURCE, Pair
from mpo_ext.data.rlaif_v import from_rlaif_v
from mpo_ext.data.sharegpt import TURNS_FIELDS, from_sharegpt
from mpo_ext.data.swift import from_swift
from mpo_ext.data.trl import from_trl

Format = Literal["mmpr", "pairs", "trl", "sharegpt", "alpaca", "swift", "openai", "rlaif-v", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
WRITABLE: tuple[Format, ...] = ("mmpr", "pairs", "trl", "hf")
#: Functions that convert a row to a pair. Their argument ``save_image`` stores the bytes of an image.
ROW_READERS: dict[str, Callable[..., Pair]] = {
    "trl": from_trl,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "swift": from_swift,
    "openai": from_openai,
    "rlaif-v": from_rlaif_v,
}
_PAIR_FIELDS = {
    *("question", "chosen", "rejected", "images", "answer_gt", "provenance", "extra", "videos", "rejected_images"),
}
_SAMPLED_LINES = 1000


def row_format(row: Mapping[str, Any]) -> Format | None:
    """Detects the format of a row from its fields. Returns None if the fields fit several formats or none."""
    if "preferred_output" in row or "non_preferred_output" in row:
        return "openai"
    if "rejected_response" in row or "rejected_messages" in row:
        return "swift"
    if "prompt" in row:
        return "trl"
    if "chosen" in row and "rejected" in row:
        if any(name in row for name in TURNS_FIELDS):
            return "sharegpt"
        if "instruction" in row:
            return "alpaca"
        if "question" not in row:
            return "trl" if is_conversation(row["chosen"]) and is_conversation(row["rejected"]) else None
    return _question_format(row)


def _question_format(row: Mapping[str, Any]) -> Format | None:
    """Returns "mmpr", "pairs" or "rlaif-v" from the fields and images of a row, or None if they are not conclusive."""
    if isinstance(extra := row.get("extra"), Mapping) and SOURCE in extra and row.keys() <= _PAIR_FIELDS:
        return "pairs"
    images = [row[name] for name in ("image", "images", "rejected_image", "rejected_images") if name in row]
    are_paths = all(isinstance(path, str) or path is None for value in images for path in _listed(value))
    responses = [row.get(name, "") for name in ("chosen", "rejected")]
    is_foreign = not are_paths or any(row.get(name) for name in ("system", "history"))
    is_foreign = is_foreign or {"image", "images"} <= row.keys()
    videos = [video for name in ("video", "videos") for video in _listed(row.get(name))]
    is_foreign = is_foreign or any(isinstance(video, Mapping) and "bytes" in video for video in videos)
    if is_foreign or {"ds_name", "origin_dataset"} <= row.keys() or any(map(is_conversation, responses)):
        return "rlaif-v" if "question" in row else None
    if "images" in row or "videos" in row or "rejected_images" in row:
        return "pairs" if row.keys() <= _PAIR_FIELDS else "rlaif-v" if "question" in row else "pairs"
    return "mmpr" if "image" in row or "video" in row else None


def _listed(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else [value]


def detect_lines(file: LineFile) -> Format:
    """Detects the format of a JSON lines file from its first 1000 lines.

    The first row whose fields fit only one format decides. If no row decides, and the first row has ``question``,
    ``chosen`` and ``rejected``, the format is "mmpr".

    Raises:
        ValueError: If the file is empty, if no line is a JSON object, or if no format fits.
    """
    if len(file) == 0:
        raise ValueError(f"path must hold pairs, got an empty file: {file.name}")
    first_bad: BadLine | None = None
    first_row: tuple[int, dict[str, Any]] | None = None
    for index in range(min(len(file), _SAMPLED_LINES)):
        try:
            row = file.read_object(index)
        except BadLine as bad:
            first_bad = first_bad or bad
            continue
        first_row = first_row or (index, row)
        if (format := row_format(row)) is not None:
            return format
    if first_row is None:
        assert first_bad is not None
        advice = ""
        if _begins_with_array(file.path):
            advice = " (the file is a JSON array: rename it to .json, or write one object per line)"
        raise ValueError(f"path must hold one JSON object per line, got {first_bad}{advice}")
    index, row = first_row
    return _undecided(row, str(file.locate(index)))


def _begins_with_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip().startswith(b"[")


def detect_columns(row: Mapping[str, Any], name: str) -> Format:
    """Detects the format of a table from its columns.

    A table with ``question``, ``chosen`` and ``rejected`` is "mmpr" unless other columns identify another format.

    Args:
        row: An example row: a value of the right type for each column, such as "" for text.
        name: Name of the table in error messages.

    Raises:
        ValueError: If the columns fit no format.
    """
    return row_format(row) or _undecided(row, name)


def _undecided(row: Mapping[str, Any], where: str) -> Format:
    """Returns "mmpr" if a row has ``question``, ``chosen`` and ``rejected``. Raises ValueError otherwise.

    ``where`` names the row in the error message.
    """
    if {"question", "chosen", "rejected"} <= row.keys():
        return "mmpr"
    fields = ", ".join(f"{field!r} ({type(value).__name__})" for field, value in row.items()) or "no fields"
    raise ValueError(
        f"format must be clear from the fields, got {shorten_text(fields)} in {where}: a row has chosen and rejected, "
        "and prompt, question, instruction, conversations or whole conversations; or the fields of ms-swift "
        f"(rejected_response) or OpenAI (preferred_output); --from or a recipe's format names one of "
        f"{', '.join(FORMATS)}"
    )


def shorten_text(text: str, limit: int = 300) -> str:
    """Truncates a text to ``limit`` characters, for a message."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
