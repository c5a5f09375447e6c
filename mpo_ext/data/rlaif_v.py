"""Reads rows of RLAIF-V, and other rows with ``question``, ``chosen`` and ``rejected``.

``image`` or ``images`` holds paths, or objects with ``bytes`` or ``path``. ``system``, ``history`` and ``answer_gt``
are optional.
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

_ORIGIN = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")
_FIELDS = {"question", "chosen", "rejected", *MEDIA_COLUMNS, "system", "history", "answer_gt", "tools"}


def from_rlaif_v(row: Mapping[str, Any], *, save_image: SaveImage | None = None) -> Pair:
    """Converts a row of RLAIF-V to a pair.

    The fields that describe the row's origin go into ``provenance``: ``ds_name``, ``origin_dataset``,
    ``origin_split``, ``idx`` and, if the row has an image, ``image_path``. Unknown fields go into ``Pair.extra``.

    Args:
        row: Fields of the row.
        save_image: Function that stores the bytes of an image and returns the path. None: such bytes raise FieldError.

    Raises:
        FieldError: If a field is missing or invalid. The message names the field, the rule and the value.
    """
    refuse_tools(row)
    refuse_meaning(row, "objects", "chat_template_kwargs")
    for name in ("question", "chosen", "rejected"):
        if row.get(name) is None:
            raise FieldError(f"{name} must be given, got fields {', '.join(map(repr, row))}")
    question = row["question"]
    if not isinstance(question, str):
        raise FieldError(f"question must be text, got {type_and_value(question)}")
    images = Images(row_images(row, save_image), save_image, row_videos(row, save_image))
    history = read_history(row, images)
    images.add_marks("question", question)
    paths = images.paths("question")
    origin = {name for name in _ORIGIN if row.get(name) is not None and (name != "image_path" or paths)}
    return pair_of_turns(
        read_system(row, [*history, {"role": "user", "content": question}]),
        read_response("chosen", row["chosen"]),
        read_response("rejected", row["rejected"]),
        paths,
        answer_gt=row.get("answer_gt"),
        provenance={name: row[name] for name in row if name in origin},
        extra={name: value for name, value in row.items() if name not in _FIELDS and name not in origin},
        videos=images.videos("question"),
        rejected_images=row_rejected_images(row, save_image),
    )
