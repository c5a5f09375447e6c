"""TRL's preference format as JSON lines; conversion in both directions is lossless.

TRL has the columns ``prompt``, ``chosen``, ``rejected`` and ``images``. This module adds

- ``answer_gt`` (text or null),
- ``image_paths`` (list of texts), only in datasets, because their ``images`` may hold bytes without a path,
- ``question`` (text or null), the original question if ``prompt`` cannot hold it, as with ``<image>`` in mid-line,
- ``provenance`` and ``extra``, JSON as text, because a column of a dataset has one type.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import check_choice, shorten, type_and_value
from mpo_ext.data.jsonl import LineFile, parse_object, write_lines
from mpo_ext.data.paths import RootMap
from mpo_ext.data.reader import MAX_LINE_BYTES, FieldError
from mpo_ext.data.records import Pair

Kind = Literal["standard", "conversational"]
_COLUMNS = ("prompt", "chosen", "rejected", "images", "answer_gt", "image_paths", "question", "provenance", "extra")


def to_trl(pair: Pair, kind: Kind = "standard", *, structured: bool = True) -> dict[str, Any]:
    """Converts a pair to a row of TRL's preference format.

    Args:
        pair: Pair to convert.
        kind: "standard": the prompt is the question. "conversational": the prompt is a user message in which an image
            block replaces each ``<image>`` and one line break after it. If the number of ``<image>`` is not the number
            of images, all image blocks precede the unchanged text.
        structured: Whether the content of the user message is a list of blocks, which image models expect, or text.
            All rows of a dataset must have the same value.

    Returns:
        The row, with paths as ``images``.
    """
    check_choice("kind", kind, get_args(Kind))
    row: dict[str, Any] = {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    if kind == "conversational":
        content = _blocks(pair.question, len(pair.images)) if structured else pair.question
        row = {
            "prompt": [{"role": "user", "content": content}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
    row |= {"images": list(pair.images), "answer_gt": pair.answer_gt, "question": None}
    if kind == "conversational" and _question(row["prompt"][0]["content"]) != pair.question:
        row["question"] = pair.question
    row["provenance"] = json.dumps(pair.provenance, ensure_ascii=False) if pair.provenance else None
    row["extra"] = json.dumps(pair.extra, ensure_ascii=False) if pair.extra else None
    return row


def from_trl(row: Mapping[str, Any], *, save_image: Callable[[bytes], str] | None = None) -> Pair:
    """Converts a row of TRL's preference format to a pair.

    Args:
        row: Row with a text or one user message as prompt. Columns that ``to_trl`` does not write go into ``extra``.
        save_image: Function that stores the bytes of an image and returns the path; None: bytes raise FieldError.

    Raises:
        FieldError: If a column is missing or invalid. The message names the column, the rule and the value.
        TypeError: If a column has the wrong type.
    """
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is None:
            raise FieldError(f"{name} must be given, got columns {', '.join(map(repr, row))}")
    paths = row.get("image_paths")
    images = [_path(image, save_image) for image in _list("images", row.get("images"))] if paths is None else paths
    question = _prompt(row["prompt"])
    original = row.get("question")
    if isinstance(original, str) and isinstance(row["prompt"], list):
        content = row["prompt"][0]["content"]
        # A prompt that was edited later takes precedence over the original question.
        if (content if isinstance(content, str) else _plain(content)) in (original, _blocks(original, len(images))):
            question = original
    extra = {name: value for name, value in row.items() if name not in _COLUMNS}
    return Pair(
        question=question,
        chosen=_response("chosen", row["chosen"]),
        rejected=_response("rejected", row["rejected"]),
        images=tuple(_list("image_paths", images)),
        answer_gt=row.get("answer_gt"),
        provenance=_json("provenance", row.get("provenance")),
        extra={**_json("extra", row.get("extra")), **extra},
    )


def _blocks(question: str, images: int) -> list[dict[str, Any]]:
    pieces = question.split(IMAGE_PLACEHOLDER)
    if len(pieces) - 1 != images:
        return [*[_image_block()] * images, _text_block(question)]
    blocks = [_text_block(pieces[0])] if pieces[0] or not images else []
    for piece in pieces[1:]:
        blocks.append(_image_block())
        text = piece.removeprefix("\n")
        if text:
            blocks.append(_text_block(text))
    return blocks


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_block() -> dict[str, Any]:
    return {"type": "image", "text": None}  # a column of a dataset needs the same keys in every block


def _plain(content: Iterable[Any]) -> list[dict[str, Any]]:
    return [_text_block(b["text"]) if b["type"] == "text" else _image_block() for b in content]


def _question(content: object) -> str:
    """Returns the question in the content of a user message, as the inverse of ``_blocks``."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(f"prompt must have text or a list of blocks as content, got {shorten(content)}")
    parts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "image":
            parts.append(IMAGE_PLACEHOLDER + "\n")
        elif kind == "text" and isinstance(block.get("text"), str):
            parts.append(block["text"])
        else:
            raise FieldError(f"prompt must have blocks of text and images, got {shorten(block)}")
    return "".join(parts)


def _prompt(prompt: object) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise FieldError(f"prompt must be text or a list of messages, got {shorten(prompt)}")
    roles = [message.get("role") for message in prompt]
    if roles != ["user"]:
        raise FieldError(f"prompt must be one message of the user, got roles {shorten(roles)}")
    return _question(prompt[0].get("content"))


def _response(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    message = value[0] if isinstance(value, list) and len(value) == 1 else None
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise FieldError(f"{name} must be text or one message of the assistant, got {shorten(value)}")
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text")
    if not isinstance(content, str):
        raise FieldError(f"{name} must have text as its content, got {shorten(content)}")
    return content


def _list(name: str, value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise FieldError(f"{name} must be a list, got {type_and_value(value)}")
    return list(value)


def _json(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_object(value)
    if value is not None and not isinstance(value, dict):
        raise FieldError(f"{name} must be an object in JSON, got {type_and_value(value)}")
    return value or {}


def _path(image: object, save_image: Callable[[bytes], str] | None) -> str:
    if isinstance(image, str):
        return image
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            if save_image is not None:
                return save_image(image["bytes"])
        elif isinstance(image.get("path"), str):
            return image["path"]
    raise FieldError(f"images must be paths unless image_dir is given, got {type(image).__name__}")


def read_trl(
    path: str | os.PathLike[str], *, root_map: RootMap = (), max_line_bytes: int = MAX_LINE_BYTES
) -> LineFile:
    """Opens a file with one row of TRL's preference format per line, in either kind; see ``read_pairs``."""
    return LineFile(path, _parse_row, root_map=root_map, max_line_bytes=max_line_bytes)


def _parse_row(values: dict[str, Any], line: str) -> Pair:
    return from_trl(values)


def write_trl(path: str | os.PathLike[str], pairs: Iterable[Pair], kind: Kind = "standard", **options: Any) -> int:
    """Writes each pair as a row of ``to_trl``, one per line, atomically, and returns the number of rows."""
    return write_lines(path, (to_trl(pair, kind, **options) for pair in pairs))
