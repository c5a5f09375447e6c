"""Images, video and audio that a reader cannot use: their marks in texts, and fields that no reader consumes."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import shorten
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import PROMPT_TURNS, Pair

#: Kinds of bad lines.
NO_IMAGE, IMAGE_IN_RESPONSE, UNREAD_FIELD = "no image", "image in response", "unread field"
VIDEO, TOOLS = "video or audio", "tools"

_MEDIA_NAME = re.compile(
    r"image|img|picture|photo|pixel|screenshot|thumbnail|video|audio|waveform|(?:^|_)pics?(?:_|$)", re.IGNORECASE
)
_OTHER_MARKS = ("<video>", "<audio>")


def is_empty(value: object) -> bool:
    """Returns whether a field has no content: null, false, 0, an empty text, list or object, or a list of such."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    return not value


def check_media(values: Mapping[str, Any], pair: Pair) -> None:
    """Checks that a pair has all images of its row, and nothing in place of images that a model would read as text.

    Args:
        values: Fields of the row. Those that the reader did not consume are in ``pair.extra``.
        pair: The pair that a reader made of the row.

    Raises:
        FieldError: If an unknown field may hold an image, video or audio; if the prompt has ``<image>`` without any
            image, ``<video>`` or ``<audio>``; or if a response has ``<image>``.
    """
    for name, value in values.items():
        if pair.extra.get(name) is value:  # not the field "extra" of a row with an unknown field of this name inside
            _check_field(name, value, has_images=bool(pair.images))
    for text in _prompt_texts(pair):
        if not pair.images and (count := text.count(IMAGE_PLACEHOLDER)):
            raise FieldError(
                f"question must hold {IMAGE_PLACEHOLDER} 0 times for 0 images, got {count}: {shorten(text)}",
                kind=NO_IMAGE,
            )
        for mark in _OTHER_MARKS:
            if mark in text:
                raise FieldError(f"question must not hold {mark}, got {shorten(text)}", kind=VIDEO)
    for name in ("chosen", "rejected"):
        text = getattr(pair, name)
        if IMAGE_PLACEHOLDER in text:
            raise FieldError(
                f"{name} must not hold {IMAGE_PLACEHOLDER}, the mark of an image in a prompt, got {shorten(text)}",
                kind=IMAGE_IN_RESPONSE,
            )


def _check_field(name: str, value: object, *, has_images: bool) -> None:
    """Raises FieldError if an unknown field, or (without images) a field inside it, may hold an image."""
    # Beside the images of the pair, a number is their count, or the width or id of one of them.
    if _MEDIA_NAME.search(name) and not is_empty(value) and not (has_images and isinstance(value, (int, float))):
        raise FieldError(
            f"images must be in image or images (no other media are supported), got the field {name!r} "
            f"{shorten(value)}: rename it, or name it in ignore (--ignore) if it does not matter",
            kind=UNREAD_FIELD,
        )
    if isinstance(value, Mapping) and not has_images:
        for inner, part in value.items():
            _check_field(f"{name}.{inner}", part, has_images=has_images)


def drop_fields(value: Any, names: Collection[str]) -> Any:
    """Returns parsed JSON without the named fields, at any depth."""
    if isinstance(value, Mapping):
        return {name: drop_fields(part, names) for name, part in value.items() if name not in names}
    if isinstance(value, (list, tuple)):
        return [drop_fields(part, names) for part in value]
    return value


def _prompt_texts(pair: Pair) -> list[str]:
    values: list[Any] = [pair.question]
    messages = pair.source.get(PROMPT_TURNS)
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        values += [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [value for value in values if isinstance(value, str)]


def count_places(pair: Pair) -> int:
    """Returns the number of places for images in the prompt of a pair."""
    messages = pair.source.get(PROMPT_TURNS)
    if not isinstance(messages, list):
        return pair.question.count(IMAGE_PLACEHOLDER)
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(content.count(IMAGE_PLACEHOLDER) for content in contents if isinstance(content, str)) + sum(
        isinstance(part, Mapping) and part.get("type") == "image" for part in parts
    )
