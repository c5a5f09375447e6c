"""Converts pairs to TRL's preference format and back without loss, and reads and writes files in this format.

TRL has the columns ``prompt``, ``chosen``, ``rejected``, ``tools``, and ``images`` or ``image``. This module adds:

- ``answer_gt`` (text or null),
- ``image_paths`` (list of texts), in datasets but not in files, because a dataset's ``images`` may hold bytes. The
  reader takes it from files, too, and refuses ``images`` with other paths,
- ``question`` (text or null), the original question if it cannot be recovered from ``prompt``,
- ``provenance`` and ``extra``, as JSON texts, because all values in a dataset column have the same type.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import check_choice, shorten, type_and_value
from mpo_ext.data.jsonl import LineFile, parse_object, write_lines
from mpo_ext.data.marks import has_mark
from mpo_ext.data.media import is_empty
from mpo_ext.data.messages import (
    Turn,
    is_conversation,
    is_response_role,
    pair_of_turns,
    read_response,
    read_turns,
    refuse_meaning,
    split_common,
    unbundled,
)
from mpo_ext.data.paths import RootMap
from mpo_ext.data.reader import MAX_LINE_BYTES, FieldError
from mpo_ext.data.records import CHOSEN_TURNS, PROMPT_TOOLS, PROMPT_TURNS, REJECTED_TURNS, SOURCE, TURNS, Pair
from mpo_ext.data.row_media import (
    Images,
    SaveImage,
    image_path,
    row_images,
    row_rejected_images,
    row_videos,
)
from mpo_ext.data.stored_turns import text_turns
from mpo_ext.data.tools import read_tools, refuse_tools

Kind = Literal["standard", "conversational"]
_COLUMNS = (
    *("prompt", "chosen", "rejected", "tools", "image", "images", "image_paths", "video", "videos", "rejected_images"),
    *("answer_gt", "question", "provenance", "extra"),
)


def to_trl(pair: Pair, kind: Kind = "conversational", *, has_images: bool = True) -> dict[str, Any]:
    """Converts a pair to a row of TRL's preference format.

    Args:
        pair: Pair to convert.
        kind: "standard": the prompt is the question. "conversational": the prompt consists of the turns of the pair,
            or of a user message with the question.
        has_images: Whether any row of the file or dataset has images. The value must be the same for all rows.

            - True: The row has the column ``images``. The content of prompt messages is a list of parts, which image
              models expect. Each ``<image>`` becomes an image part. A line break after ``<image>`` is removed. If the
              number of ``<image>`` differs from the number of images, the image parts come first, and the text is
              unchanged.
            - False: The row has no column ``images``. The content of prompt messages is text.

    Raises:
        ValueError: If the pair has videos or rejected images, or has images while ``has_images`` is False. For
            "standard", also if the pair has tools or several turns.
    """
    check_choice("kind", kind, get_args(Kind))
    for name in ("videos", "rejected_images"):
        if getattr(pair, name):
            raise ValueError(f"{name} must be empty for TRL, whose format has none, got {len(getattr(pair, name))}")
    if pair.images and not has_images:
        raise ValueError(f"has_images must be True for a pair with images, got {shorten(pair.images)}")
    if kind == "standard":
        if several := [name for name in (*TURNS, PROMPT_TOOLS) if name in pair.source]:
            raise ValueError(f"kind must be 'conversational' for several turns in {', '.join(several)}, got {kind!r}")
        row: dict[str, Any] = {"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    else:
        row = {
            "prompt": _prompt_messages(pair, has_images=has_images),
            **{
                field: text_turns(
                    name, pair.source.get(name) or [{"role": "assistant", "content": getattr(pair, field)}]
                )
                for field, name in (("chosen", CHOSEN_TURNS), ("rejected", REJECTED_TURNS))
            },
        }
    if tools := pair.source.get(PROMPT_TOOLS):
        row["tools"] = json.dumps(tools, ensure_ascii=False)  # a dataset would merge the keys of all tools
    if has_images:
        row["images"] = list(pair.images)
    row |= {"answer_gt": pair.answer_gt, "question": None}
    if kind == "conversational" and len(row["prompt"]) == 1:
        (content,), (exact,) = ([turn["content"] for turn in turns] for turns in (row["prompt"], _prompt(pair)))
        if isinstance(content, list) and _join_blocks(content) != exact:
            row["question"] = exact
    row["provenance"] = json.dumps(pair.provenance, ensure_ascii=False) if pair.provenance else None
    row["extra"] = json.dumps(pair.extra, ensure_ascii=False) if pair.extra else None
    return row


def _prompt(pair: Pair) -> list[Turn]:
    """Returns the turns of the prompt, with text as content."""
    if stored := pair.source.get(PROMPT_TURNS):
        return text_turns(PROMPT_TURNS, stored)
    return [{"role": "user", "content": pair.question}]


def _prompt_messages(pair: Pair, *, has_images: bool) -> list[dict[str, Any]]:
    turns = _prompt(pair)
    if not has_images:
        return turns
    if len(turns) == 1:
        return [{**turns[0], "content": _blocks(turns[0]["content"], len(pair.images))}]
    has_places = any(IMAGE_PLACEHOLDER in turn["content"] for turn in turns)
    first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), 0)
    counts = [
        turn["content"].count(IMAGE_PLACEHOLDER) if has_places else len(pair.images) * (index == first)
        for index, turn in enumerate(turns)
    ]
    return [{**turn, "content": _blocks(turn["content"], count)} for turn, count in zip(turns, counts, strict=True)]


def from_trl(row: Mapping[str, Any], *, save_image: SaveImage | None = None) -> Pair:
    """Converts a row of TRL's preference format to a pair.

    If ``chosen`` and ``rejected`` are whole conversations, both begin with the turns of the prompt. The column
    ``prompt`` may then be missing. It may also hold these turns, or the text of one turn.

    Args:
        row: Row with a text or messages as prompt. Unknown columns go into ``Pair.extra``.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a column is missing or invalid. The message names the column, the rule and the value.
        TypeError: If a column has the wrong type.
    """
    refuse_tools(row, known={"tools"})
    refuse_meaning(row, "system", "history", "chat_template_kwargs")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise FieldError(f"{name} must be given, got columns {', '.join(map(repr, row))}")
    prompt, chosen, rejected = _split(row)
    columns = _image_columns(row, save_image)
    columns_of_videos = row_videos(row, save_image)
    images = Images(columns, save_image, columns_of_videos)
    turns = _prompt_turns(prompt, images, row.get("question"))
    extra = {**_json("extra", row.get("extra")), **{name: row[name] for name in row if name not in _COLUMNS}}
    # ``to_trl`` writes ``question`` only beside a prompt of messages; beside a text, it is an unknown column.
    if isinstance(prompt, str) and row.get("question") is not None:
        extra["question"] = row["question"]
    answers = {"chosen": read_response("chosen", chosen), "rejected": read_response("rejected", rejected)}
    source = extra.get(SOURCE)
    if isinstance(source, dict) and len(turns) > 1 and _is_same_prompt(source.get(PROMPT_TURNS), prompt):
        turns = source[PROMPT_TURNS]
    return pair_of_turns(
        turns,
        answers["chosen"],
        answers["rejected"],
        columns if isinstance(prompt, str) else images.paths("prompt"),
        tools=read_tools("tools", row.get("tools")),
        answer_gt=row.get("answer_gt"),
        provenance=_json("provenance", row.get("provenance")),
        extra=extra,
        videos=columns_of_videos if isinstance(prompt, str) else images.videos("prompt"),
        rejected_images=row_rejected_images(row, save_image),
    )


def _image_columns(row: Mapping[str, Any], save_image: SaveImage | None) -> list[Any]:
    """Returns the paths of the images in ``image_paths``, or in ``images`` and ``image`` if ``image_paths`` is empty.

    Raises FieldError if ``images`` or ``image`` names other paths than ``image_paths``. Images with bytes
    agree with any path.
    """
    given = row.get("image_paths")
    if is_empty(given):
        return row_images(row, save_image)
    if not isinstance(given, (list, tuple)):
        raise FieldError(f"image_paths must be a list, got {type_and_value(given)}")
    paths = list(given)
    for name in ("image", "images"):
        images = row.get(name)
        if is_empty(images):
            continue
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if len(images) != len(paths):
            raise FieldError(f"image_paths must name each of {len(images)} images, got {len(paths)} paths")
        named = [
            paths[index] if has_bytes(image) else image_path(name, image, save_image)
            for index, image in enumerate(images)
        ]
        if named != paths:
            raise FieldError(
                f"image_paths must agree with {name}, got {shorten(paths)} and {shorten(named)}: remove one of the two"
            )
    return paths


def has_bytes(image: object) -> bool:
    """Returns whether an image of a row is given by its bytes."""
    return isinstance(image, bytes) or (isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes))


def _split(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Returns the prompt, the chosen response and the rejected response of a row.

    If ``chosen`` and ``rejected`` are whole conversations, their common first turns are the prompt.
    """
    prompt, chosen, rejected = map(unbundled, (row.get("prompt"), row["chosen"], row["rejected"]))
    are_conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if isinstance(prompt, list) and are_conversations and prompt:
        size = len(prompt)
        if chosen[:size] == prompt == rejected[:size]:
            return prompt, chosen[size:], rejected[size:]
    if isinstance(prompt, list) or not are_conversations or (prompt is not None and _begins_with_response(chosen)):
        if prompt is None:
            raise FieldError(
                f"prompt must be given unless chosen and rejected are conversations, got {type_and_value(chosen)} "
                f"in columns {', '.join(map(repr, row))}"
            )
        return prompt, chosen, rejected
    size = split_common(chosen, rejected)
    common = chosen[:size]
    if prompt is not None:
        contents = [message.get("content", message.get("value")) for message in common if isinstance(message, dict)]
        if prompt not in contents:
            raise FieldError(f"prompt must agree with the turns of chosen and rejected, got {shorten(prompt)}")
    return common, chosen[size:], rejected[size:]


def _begins_with_response(chosen: list[Any]) -> bool:
    first = chosen[0] if chosen and isinstance(chosen[0], dict) else {}
    return is_response_role(first.get("role", first.get("from")))


def _prompt_turns(prompt: object, images: Images, question: object) -> list[Turn]:
    """Converts the prompt of a row to turns.

    Args:
        prompt: Column ``prompt``, a text or messages.
        images: Object that collects the images of the prompt.
        question: Column ``question``, the original text of a single-turn prompt. ``to_trl`` writes both columns. If
            ``prompt`` was edited later, ``question`` is ignored.
    """
    if isinstance(prompt, str):
        return _placed([{"role": "user", "content": prompt}], images.count)
    if prompt != [] and not is_conversation(prompt):
        raise FieldError(f"prompt must be text or a list of messages, got {shorten(prompt)}")
    turns = read_turns("prompt", prompt, images)
    if len(turns) == 1 and isinstance(question, str) and isinstance(prompt, list):
        content = prompt[0].get("content", prompt[0].get("value"))
        blocks = content if isinstance(content, str) else _plain(content)
        # Otherwise the prompt was edited after ``to_trl`` wrote it, and takes precedence over the original question.
        if blocks in (question, _blocks(question, images.count)):
            return [{**turns[0], "content": question}]
    return _placed(turns, images.count)


def _placed(turns: list[Turn], count: int) -> list[Turn]:
    """Adds ``count`` placeholders ``<image>`` before the text of the first user turn, as TRL does.

    ``count`` is the number of images. The turns stay unchanged if ``count`` is below 2, if a turn already has a
    placeholder, or if there is no user turn.
    """
    first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
    if count < 2 or first is None or any(has_mark(turn["content"]) for turn in turns):
        return turns
    marked = {**turns[first], "content": IMAGE_PLACEHOLDER * count + turns[first]["content"]}
    return [*turns[:first], marked, *turns[first + 1 :]]


def _is_same_prompt(original: object, prompt: object) -> bool:
    """Returns whether ``to_trl`` would convert the turns ``original`` to the messages ``prompt``."""
    if not is_conversation(original) or not isinstance(original, list) or not isinstance(prompt, list):
        return False
    if not all(isinstance(turn.get("content"), str) and isinstance(turn.get("role"), str) for turn in original):
        return False
    if not all("content" in message for message in prompt):
        return False
    plain = [
        {**message, "content": _plain(message["content"])} if isinstance(message["content"], list) else message
        for message in prompt
    ]
    count = sum(block["type"] == "image" for turn in plain for block in turn["content"] if isinstance(block, dict))
    pair = Pair("", "", "", ("image",) * count, extra={SOURCE: {PROMPT_TURNS: original}})
    try:
        return plain in (original, _prompt_messages(pair, has_images=True))
    except FieldError:  # turns that no reader stored, such as turns with malformed calls
        return False


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
    return [_text_block(b["text"]) if b.get("type") == "text" else _image_block() for b in content]


def _join_blocks(content: Iterable[Mapping[str, Any]]) -> str:
    """Joins the text and image parts of a message to a text. Each image part becomes ``<image>`` and a line break."""
    return "".join(IMAGE_PLACEHOLDER + "\n" if block["type"] == "image" else block["text"] for block in content)


def _json(name: str, value: object) -> dict[str, Any]:
    """Returns the object in the column ``name``, which holds it as JSON text; {} for an empty column."""
    if isinstance(value, str) and not value.strip():  # an empty cell of a CSV file
        return {}
    if isinstance(value, str):
        try:
            value = parse_object(value)
        except (ValueError, TypeError) as error:
            raise FieldError(
                f"{name} must be an object in JSON, got {type_and_value(value)} ({error}): rename the column, or name "
                "it in ignore (--ignore) if it does not matter"
            ) from None
    if value is not None and not isinstance(value, dict):
        raise FieldError(f"{name} must be an object in JSON, got {type_and_value(value)}")
    return value or {}


def read_trl(
    path: str | os.PathLike[str], *, root_map: RootMap = (), max_line_bytes: int = MAX_LINE_BYTES
) -> LineFile:
    """Opens a JSON lines file with rows in TRL's preference format, standard or conversational.

    Args:
        path: Path of the file.
        root_map: A tuple (old path, new path) for each folder that has moved.
        max_line_bytes: Maximum length of a line in bytes. Reading a longer line raises BadLine.
    """
    return LineFile(path, _parse_row, root_map=root_map, max_line_bytes=max_line_bytes)


def _parse_row(values: dict[str, Any], line: str) -> Pair:
    return from_trl(values)


def write_trl(
    path: str | os.PathLike[str], pairs: Iterable[Pair], kind: Kind = "conversational", **options: Any
) -> int:
    """Atomically writes pairs to a JSON lines file with rows in TRL's preference format. Returns the number of pairs.

    ``options`` are arguments of ``to_trl``. With the default ``has_images=True``, every row has a list ``images``.
    """
    return write_lines(path, (to_trl(pair, kind, **options) for pair in pairs))
