"""Reads preference rows of ms-swift.

``messages`` holds the whole chosen conversation. The rejected response is in ``rejected_response`` (a text, or the
turns after the last question) or in ``rejected_messages`` (the whole conversation). Older rows have ``query``,
``response``, ``rejected_response`` and ``history`` instead. Each row may have ``system`` and ``images``.
"""

from collections.abc import Mapping
from typing import Any

from mpo_ext.checks import shorten, type_and_value
from mpo_ext.data.media import is_empty
from mpo_ext.data.messages import (
    is_conversation,
    pair_of_turns,
    read_history,
    read_response,
    read_system,
    read_turns,
    refuse_meaning,
    split_common,
)
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import Pair
from mpo_ext.data.row_media import (
    MEDIA_COLUMNS,
    Images,
    SaveImage,
    row_images,
    row_rejected_images,
    row_videos,
)
from mpo_ext.data.tools import read_tools, refuse_tools

_FIELDS = {
    *("messages", "rejected_response", "rejected_messages", "system", *MEDIA_COLUMNS, "tools"),
    *("query", "response", "history"),
}
_USER = ("user", "human")


def from_swift(row: Mapping[str, Any], *, save_image: SaveImage | None = None) -> Pair:
    """Converts a row of ms-swift to a pair. Unknown fields go into ``Pair.extra``.

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a field is missing or invalid. The message names the field, the rule and the value.
    """
    refuse_tools(row, known={"tools"})
    refuse_meaning(row, "objects", "chat_template_kwargs", "rejected_tools", "rejected_objects")
    rejected = [name for name in ("rejected_response", "rejected_messages") if row.get(name) is not None]
    if len(rejected) == 2:  # a table has both columns, and an empty text where there is no value
        rejected = [name for name in rejected if not is_empty(row[name])]
    if len(rejected) != 1:
        raise FieldError(
            f"rejected_response or rejected_messages must be given, got fields {', '.join(map(repr, row))}"
        )
    images = Images(row_images(row, save_image), save_image, row_videos(row, save_image))
    if row.get("messages") is None:
        prompt, chosen_side, rejected_side = _legacy(row, images)
    else:
        refuse_meaning(row, "query", "response", "history")
        messages = _messages("messages", row["messages"])
        if rejected[0] == "rejected_messages":
            whole = _messages("rejected_messages", row["rejected_messages"])
            size = split_common(messages, whole)
            chosen_side, rejected_side = messages[size:], whole[size:]
        else:
            size = 1 + max((index for index, turn in enumerate(messages) if _role(turn) in _USER), default=-1)
            chosen_side, rejected_side = messages[size:], _rejected(row["rejected_response"])
        prompt = read_turns("messages", messages[:size], images)
    return pair_of_turns(
        read_system(row, prompt),
        read_response("messages", chosen_side),
        read_response(rejected[0], rejected_side),
        images.paths("messages"),
        tools=read_tools("tools", row.get("tools")),
        extra={name: value for name, value in row.items() if name not in _FIELDS},
        videos=images.videos("messages"),
        rejected_images=row_rejected_images(row, save_image),
    )


def _legacy(row: Mapping[str, Any], images: Images) -> tuple[Any, Any, Any]:
    for name in ("query", "response", "rejected_response"):
        if not isinstance(row.get(name), str):
            raise FieldError(f"{name} must be text where messages is not given, got {type_and_value(row.get(name))}")
    history = read_history(row, images)
    images.add_marks("query", row["query"])
    return [*history, {"role": "user", "content": row["query"]}], row["response"], row["rejected_response"]


def _messages(name: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not is_conversation(value):
        raise FieldError(f"{name} must be a list of messages, got {shorten(value)}")
    return value


def _role(message: Mapping[str, Any]) -> object:
    return message.get("role", message.get("from"))


def _rejected(value: Any) -> Any:
    """Returns the value of the field ``rejected_response``. If the value is a list with one text, returns the text.

    Raises FieldError for a list of several texts.
    """
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        if len(value) > 1:
            raise FieldError(
                f"rejected_response must be one response, got {len(value)}: write one row for each of them"
            )
        return value[0]
    return value
