"""Reads ShareGPT rows with a preference, in the format of LLaMA-Factory.

The fields of a row are:

- ``conversations`` (or ``conversation``, or ``messages``): the turns of the prompt.
- ``chosen`` and ``rejected``: the responses.
- optional fields, such as ``system`` and ``images``.

A turn has ``from`` and ``value``, or ``role`` and ``content``. ms-swift also writes two turns, a question and its
response, as one entry ``{"human": ..., "assistant": ...}``.
"""

from collections.abc import Mapping
from typing import Any

from mpo_ext.checks import shorten
from mpo_ext.data.messages import pair_of_turns, read_response, read_system, read_turns, refuse_meaning
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

TURNS_FIELDS = ("conversations", "conversation", "messages")
_FIELDS = {*TURNS_FIELDS, "chosen", "rejected", "system", *MEDIA_COLUMNS, "tools"}
_QUESTIONS, _ANSWERS = ("human", "user"), ("assistant", "gpt", "bot")


def from_sharegpt(row: Mapping[str, Any], *, save_image: SaveImage | None = None) -> Pair:
    """Converts a ShareGPT row to a pair. Unknown fields go into ``Pair.extra``.

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a field is missing or invalid. The message names the field, the rule and the value.
    """
    refuse_tools(row, known={"tools"})
    refuse_meaning(row, "history", "objects", "chat_template_kwargs")
    given = [name for name in TURNS_FIELDS if row.get(name) is not None]
    if len(given) != 1:
        raise FieldError(f"conversations must be given once, got fields {', '.join(map(repr, row))}")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise FieldError(f"{name} must be given, got fields {', '.join(map(repr, row))}")
    images = Images(row_images(row, save_image), save_image, row_videos(row, save_image))
    prompt = read_turns(given[0], _expand(row[given[0]]), images)
    return pair_of_turns(
        read_system(row, prompt),
        read_response("chosen", row["chosen"]),
        read_response("rejected", row["rejected"]),
        images.paths(given[0]),
        tools=read_tools("tools", row.get("tools")),
        extra={name: value for name, value in row.items() if name not in _FIELDS},
        videos=images.videos(given[0]),
        rejected_images=row_rejected_images(row, save_image),
    )


def _expand(turns: object) -> object:
    """Replaces each entry ``{"human": ..., "assistant": ...}`` of a conversation by two messages."""
    if not isinstance(turns, (list, tuple)):
        return turns
    messages: list[Any] = []
    for entry in turns:
        if not isinstance(entry, Mapping) or "role" in entry or "from" in entry:
            messages.append(entry)
            continue
        question = [name for name in _QUESTIONS if entry.get(name) is not None]
        answer = [name for name in _ANSWERS if entry.get(name) is not None]
        if len(question) != 1 or len(answer) > 1 or len(question) + len(answer) != len(entry):
            raise FieldError(f"conversations must hold messages or questions with responses, got {shorten(entry)}")
        messages.append({"role": "user", "content": entry[question[0]]})
        messages += [{"role": "assistant", "content": entry[name]} for name in answer]
    return messages
