"""Reads Alpaca rows with a preference, in the format of LLaMA-Factory.

A row has ``instruction``, ``chosen`` and ``rejected``, and optionally ``input`` (appended to the instruction after a
line break), ``system``, ``history`` and ``images``.
"""

from collections.abc import Mapping
from typing import Any

from mpo_ext.checks import type_and_value
from mpo_ext.data.messages import pair_of_turns, read_history, read_response, read_system, refuse_meaning
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
from mpo_ext.data.tools import refuse_tools

_FIELDS = {"instruction", "input", "chosen", "rejected", "system", "history", *MEDIA_COLUMNS, "tools"}


def from_alpaca(row: Mapping[str, Any], *, save_image: SaveImage | None = None) -> Pair:
    """Converts an Alpaca row to a pair. Unknown fields go into ``Pair.extra``.

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a field is missing or invalid. The message names the field, the rule and the value.
    """
    refuse_tools(row)
    refuse_meaning(row, "objects", "chat_template_kwargs")
    for name in ("instruction", "chosen", "rejected"):
        if row.get(name) is None:
            raise FieldError(f"{name} must be given, got fields {', '.join(map(repr, row))}")
    parts = [row["instruction"], row.get("input") or ""]
    for name, text in zip(("instruction", "input"), parts, strict=True):
        if not isinstance(text, str):
            raise FieldError(f"{name} must be text, got {type_and_value(text)}")
    question = "\n".join(filter(None, parts))
    images = Images(row_images(row, save_image), save_image, row_videos(row, save_image))
    history = read_history(row, images)
    images.add_marks("instruction", question)
    return pair_of_turns(
        read_system(row, [*history, {"role": "user", "content": question}]),
        read_response("chosen", row["chosen"]),
        read_response("rejected", row["rejected"]),
        images.paths("instruction"),
        extra={name: value for name, value in row.items() if name not in _FIELDS},
        videos=images.videos("instruction"),
        rejected_images=row_rejected_images(row, save_image),
    )
