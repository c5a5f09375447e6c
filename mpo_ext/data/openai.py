"""Reads rows of OpenAI's preference fine-tuning.

A row has the turns of the prompt in ``input.messages``, and the responses in ``preferred_output`` and
``non_preferred_output``. Each response is a list of messages.
"""

from collections.abc import Mapping
from typing import Any

from mpo_ext.checks import shorten
from mpo_ext.data.messages import pair_of_turns, read_response, read_turns
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import Pair
from mpo_ext.data.row_media import (
    Images,
    SaveImage,
    refuse_fields,
)
from mpo_ext.data.tools import read_tools, refuse_tools

_FIELDS = {"input", "preferred_output", "non_preferred_output"}


def from_openai(row: Mapping[str, Any], *, save_image: SaveImage | None = None) -> Pair:
    """Converts a row of OpenAI's preference fine-tuning to a pair. Unknown fields go into ``Pair.extra``.

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a field is missing or invalid. The message names the field, the rule and the value.
    """
    for name in ("input", "preferred_output", "non_preferred_output"):
        if row.get(name) is None:
            raise FieldError(f"{name} must be given, got fields {', '.join(map(repr, row))}")
    prompt = row["input"]
    if not isinstance(prompt, Mapping) or prompt.get("messages") is None:
        raise FieldError(f"input must be an object with messages, got {shorten(prompt)}")
    refuse_tools(row)
    refuse_tools(prompt, "input", known={"tools"})
    refuse_fields("input", prompt, {"messages", "tools", "functions", "parallel_tool_calls"})
    images = Images((), save_image)
    turns = read_turns("input.messages", prompt["messages"], images)
    return pair_of_turns(
        turns,
        read_response("preferred_output", row["preferred_output"]),
        read_response("non_preferred_output", row["non_preferred_output"]),
        images.paths("input.messages"),
        tools=read_tools("input.tools", prompt.get("tools")),
        videos=images.videos("input.messages"),
        extra={name: value for name, value in row.items() if name not in _FIELDS},
    )
