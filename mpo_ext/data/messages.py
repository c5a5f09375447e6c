"""Turns of conversations: reads the messages and images of a row in any format, and builds a pair from them.

A turn is ``{"role": ..., "content": ...}`` whose content is text with ``<image>`` at the place of each image.
"""

import base64
import binascii
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.checks import shorten, type_and_value
from mpo_ext.data.marks import NO_IMAGE
from mpo_ext.data.media import TOOLS, VIDEO, is_empty
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import CHOSEN_TURNS, PROMPT_TURNS, REJECTED_TURNS, SOURCE, Pair

Turn = dict[str, str]
SaveImage = Callable[[bytes], str]

_ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant")),
    **{"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"},
}
_TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "function_response", "observation"}
_TOOL_FIELDS = {"tools", "functions", "tool_calls", "tool_call_id", "function_call", "tool_choice"}
_PATH_FIELDS = ("image", "path", "url", "image_url", "base64", "source")
_PART_FIELDS = {"type", "text", "detail", *_PATH_FIELDS}


def row_images(row: Mapping[str, Any], save_image: SaveImage | None) -> list[str]:
    """Returns the image paths in the fields ``image`` and ``images`` of a row.

    Either field may hold an image or a list of images. An image is a path, bytes, or an object with ``bytes``,
    ``path`` or ``url``. ``save_image`` stores bytes and returns the path. If it is None, bytes raise FieldError.

    Raises:
        FieldError: If a value is not an image, or the two fields differ.
    """
    found = {}
    for name in ("image", "images"):
        value = row.get(name)
        images = list(value) if isinstance(value, (list, tuple)) else [] if is_empty(value) else [value]
        if not images:
            continue
        found[name] = [image_path("images", image, save_image) for image in images]
    if len(found) == 2 and found["image"] != found["images"]:
        raise FieldError(
            f"image and images must not both be given, got {shorten(row['image'])} and {shorten(row['images'])}"
        )
    return next(iter(found.values()), [])


def image_path(name: str, image: object, save_image: SaveImage | None) -> str:
    """Returns the path of an image in a form that ``row_images`` describes; ``name`` is the field in messages."""
    if isinstance(image, bytes):
        image = {"bytes": image}
    if isinstance(image, str) and image:
        return image
    if isinstance(image, Mapping):
        content = image.get("bytes")
        if content is not None and not isinstance(content, bytes):
            raise FieldError(f"{name}: bytes must be binary, got {type_and_value(content)}")
        if content is not None and save_image is not None:
            return save_image(content)
        for field in ("path", "url"):
            if content is None and isinstance(image.get(field), str) and image[field]:
                return image[field]
        if content is not None:
            raise FieldError(f"{name} must be paths unless image_dir is given, got {len(content):,} bytes")
    raise FieldError(f"{name} must be paths, or objects with bytes, path or url, got {type_and_value(image)}")


class Images:
    """The images of a row in the order of their places in the prompt.

    Args:
        columns: Paths from the row's fields ``image`` and ``images``. They fill, in order, the places without a path.
        save_image: As in ``row_images``.
    """

    def __init__(self, columns: Sequence[str] = (), save_image: SaveImage | None = None) -> None:
        self._waiting = list(columns)
        self._save_image = save_image
        self._placed: list[str] = []
        self._n_places = 0

    def add_part(self, name: str, part: Mapping[str, Any]) -> None:
        """Adds the image of a message part: the image that the part names, or the next image of the columns.

        ``name`` is the field in messages.
        """
        self._n_places += 1
        path = self._part_path(name, part)
        if path is None:
            if not self._waiting:
                raise FieldError(
                    f"{name} must have an image for each image part, got {self._n_places} parts or more and "
                    f"{len(self._placed)} images",
                    kind=NO_IMAGE,
                )
            path = self._waiting.pop(0)
        self._placed.append(path)

    def add_marks(self, name: str, text: str) -> None:
        """Adds the next image of the columns for each ``<image>`` in a text; ``name`` is the field in messages."""
        for _ in range(text.count(IMAGE_PLACEHOLDER)):
            self.add_part(name, {})

    @property
    def count(self) -> int:
        """Number of all images, with or without a place in the prompt."""
        return len(self._placed) + len(self._waiting)

    def paths(self, name: str) -> tuple[str, ...]:
        """Returns all paths in the order of their places; without places, all paths of the columns.

        Raises FieldError if some, but not all, images have a place. ``name`` is the field in the message.
        """
        if self._waiting and self._n_places:
            raise FieldError(f"{name} must have no or {self.count} places for its images, got {self._n_places}")
        return (*self._placed, *self._waiting)

    def _part_path(self, name: str, part: Mapping[str, Any]) -> str | None:
        found = []
        for field in _PATH_FIELDS:
            value = part.get(field)
            if is_empty(value):
                continue
            if field == "base64":
                value = {"bytes": _decode(name, value)}
            elif field == "source":
                value = _anthropic_source(name, value)
            elif field == "image_url" and isinstance(value, Mapping):
                refuse_fields(name, value, {"url", "detail"})
                value = value.get("url")
            found.append(image_path(name, value, self._save_image))
        if len(set(found)) > 1:
            raise FieldError(f"{name} must name one image in an image part, got {shorten(found)}")
        return found[0] if found else None


def _decode(name: str, value: object) -> bytes:
    try:
        return base64.b64decode(str(value), validate=True)
    except binascii.Error:
        raise FieldError(f"{name}: base64 must be a base64 text, got {type_and_value(value)}") from None


def _anthropic_source(name: str, source: object) -> object:
    if isinstance(source, Mapping):
        if source.get("type") == "base64":
            return {"bytes": _decode(name, source.get("data"))}
        if source.get("type") == "url":
            return source.get("url")
    raise FieldError(f"{name}: the source of an image must have type base64 or url, got {shorten(source)}")


def read_turns(name: str, value: object, images: Images | None) -> list[Turn]:
    """Returns the turns of a list of messages, or of a single message.

    A message has ``role`` and ``content``, or ``from`` and ``value``. Content is text, or a list of parts of type
    text and image.

    Args:
        name: Name of the field, for messages.
        value: List of messages, or a message.
        images: Object that collects the images of parts and of ``<image>`` marks. None: an image part raises
            FieldError.

    Raises:
        FieldError: If a message is invalid, calls a tool, or has a part or a field that this package does not use.
    """
    messages = _unbundled(value)
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise FieldError(f"{name} must be text or a list of messages, got {shorten(value)}")
    return [_turn(name, message, images) for message in messages]


def _unbundled(value: object) -> object:
    """Returns a list of messages for a single message, or for a dict of lists such as ``{"role": [], "content": []}``.

    Older datasets store messages as a dict of lists. Any other value is returned unchanged.
    """
    if not isinstance(value, Mapping):
        return value
    columns = list(value.values())
    is_bundle = value.keys() in ({"from", "value"}, {"role", "content"}) and all(isinstance(c, list) for c in columns)
    if is_bundle and len(columns[0]) == len(columns[1]):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def _turn(name: str, message: Mapping[str, Any], images: Images | None) -> Turn:
    refuse_tools(message, name)
    is_sharegpt = "from" in message and "role" not in message
    role_field, content_field = ("from", "value") if is_sharegpt else ("role", "content")
    role = message.get(role_field)
    if isinstance(role, str) and role.replace("-", "_") in _TOOL_ROLES:
        raise FieldError(f"{name} must be turns without tools, got a turn of {role!r}", kind=TOOLS)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise FieldError(f"{name} must be messages of {known}, got the role {shorten(role)}")
    refuse_fields(name, message, {role_field, content_field})
    return {"role": _ROLES[role] or role, "content": _content(name, message.get(content_field), images)}


def refuse_fields(name: str, values: Mapping[str, Any], known: set[str]) -> None:
    """Raises FieldError if ``values`` has a field that is not in ``known`` and not empty."""
    for field, value in values.items():
        if field not in known and value not in (None, "", [], {}):  # 0 may be a weight
            raise FieldError(
                f"{name} must have {' and '.join(sorted(known))} only, got the field {field!r} {shorten(value)}: "
                "remove it, or name it in ignore (--ignore) if it does not matter"
            )


def refuse_tools(values: Mapping[str, Any], name: str = "a row") -> None:
    """Raises FieldError if a row or a message calls tools, which are not supported."""
    for field in sorted(_TOOL_FIELDS & values.keys()):
        if not is_empty(values[field]) and values[field] != "[]":
            raise FieldError(
                f"{name} must be without tools, got the field {field!r} {shorten(values[field])}", kind=TOOLS
            )


def refuse_meaning(row: Mapping[str, Any], *names: str) -> None:
    """Raises FieldError if one of the fields ``names`` is not empty.

    The format of the row does not read these fields, but in other formats or programs they change the prompt.
    """
    for name in names:
        if not is_empty(row.get(name)):
            raise FieldError(
                f"{name} must be empty, because this format would leave it out, got {type_and_value(row[name])}: "
                "name it in ignore (--ignore) if it does not matter"
            )


def _content(name: str, content: object, images: Images | None) -> str:
    if isinstance(content, str):
        if images is not None:
            images.add_marks(name, content)
        return content
    if not isinstance(content, (list, tuple)):
        raise FieldError(f"{name} must have text or a list of blocks as content, got {type_and_value(content)}")
    return "".join(_part(name, part, images) for part in content)


def _part(name: str, part: object, images: Images | None) -> str:
    if not isinstance(part, Mapping):
        raise FieldError(f"{name} must have blocks of text and images, got {shorten(part)}")
    kind = part.get("type") or next((field for field in ("text", "image") if not is_empty(part.get(field))), None)
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        refuse_fields(name, part, {"type", "text"})
        return part["text"]
    if kind in ("image", "image_url", "input_image"):
        refuse_fields(name, part, _PART_FIELDS - {"text"})
        if images is None:
            raise FieldError(f"{name} must be without images, which belong in the prompt, got {shorten(part)}")
        images.add_part(name, part)
        return IMAGE_PLACEHOLDER + "\n"
    is_media = isinstance(kind, str) and any(word in kind for word in ("video", "audio"))
    raise FieldError(
        f"{name} must have blocks of text and images, got {shorten(part)}", kind=VIDEO if is_media else "bad field"
    )


def is_conversation(value: object) -> bool:
    """Returns whether a value is a message or a list of messages."""
    messages = [value] if isinstance(value, Mapping) else value
    return isinstance(messages, (list, tuple)) and bool(messages) and all(isinstance(m, Mapping) for m in messages)


def read_response(name: str, value: object) -> list[Turn]:
    """Returns the turns of a response, which is a text, a message, or a list of messages.

    Raises FieldError unless the turns alternate, and begin and end with the assistant.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = read_turns(name, value, None)
    roles = [turn["role"] for turn in turns]
    if roles != [("assistant", "user")[index % 2] for index in range(len(roles))] or len(roles) % 2 == 0:
        raise FieldError(
            f"{name} must be text or one message of the assistant, or turns that alternate from assistant to "
            f"assistant, got roles {shorten(roles)}"
        )
    return turns


def split_common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Returns the number of leading messages that two conversations share, at most all but the last of each."""
    most = max(0, min(len(chosen), len(rejected)) - 1)
    return next((index for index in range(most) if chosen[index] != rejected[index]), most)


def read_system(row: Mapping[str, Any], prompt: Sequence[Turn]) -> list[Turn]:
    """Returns the turns of a prompt with the row's field ``system``, if it is not empty, as the first turn."""
    system = row.get("system")
    if is_empty(system):
        return list(prompt)
    if not isinstance(system, str):
        raise FieldError(f"system must be text, got {type_and_value(system)}")
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise FieldError(f"system must agree with the first turn, got {shorten(system)}")
    return list(prompt)


def read_history(row: Mapping[str, Any], images: Images) -> list[Turn]:
    """Returns the turns of the row's field ``history``, a list of lists of a question and a response."""
    history = row.get("history")
    if is_empty(history):
        return []
    if not isinstance(history, (list, tuple)):
        raise FieldError(f"history must be a list, got {type_and_value(history)}")
    turns = []
    for entry in history:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(text, str) for text in entry):
            raise FieldError(f"history must hold lists of a question and a response, got {shorten(entry)}")
        for role, text in zip(("user", "assistant"), entry, strict=True):
            images.add_marks("history", text)
            turns.append({"role": role, "content": text})
    return turns


def pair_of_turns(
    prompt: Sequence[Turn],
    chosen: Sequence[Turn],
    rejected: Sequence[Turn],
    images: Sequence[str],
    *,
    answer_gt: str | None = None,
    provenance: dict[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Pair:
    """Builds and returns a pair from turns.

    ``question`` is the last turn of the prompt. A prompt or response of several turns is also stored, with all its
    turns, in ``Pair.source``.

    Args:
        prompt: Turns before the response: at most one system turn, then turns that alternate and end with the user.
        chosen: Turns of the chosen response.
        rejected: Turns of the rejected response.
        images: Image paths in the order of their places.
        answer_gt: As in ``Pair``.
        provenance: As in ``Pair``.
        extra: As in ``Pair``.

    Raises:
        FieldError: If the prompt has other turns than these, or places for a wrong number of images.
    """
    roles = [turn["role"] for turn in prompt]
    rest = roles[1:] if roles and roles[0] in ("system", "developer") else roles
    is_alternating = all(one != two for one, two in itertools.pairwise(rest))
    if not rest or rest[-1] != "user" or not is_alternating or not set(rest) <= {"user", "assistant"}:
        raise FieldError(
            "prompt must be turns of user and assistant that alternate and end with one message of the user, after "
            f"one system turn at most, got roles {shorten(roles)}"
        )
    places = sum(turn["content"].count(IMAGE_PLACEHOLDER) for turn in prompt)
    if len(prompt) > 1 and places not in (0, len(images)):
        raise FieldError(f"prompt must hold {IMAGE_PLACEHOLDER} 0 or {len(images)} times for its images, got {places}")
    turns = {PROMPT_TURNS: prompt, CHOSEN_TURNS: chosen, REJECTED_TURNS: rejected}
    several = {name: [dict(turn) for turn in value] for name, value in turns.items() if len(value) > 1}
    values = dict(extra or {})
    source = values.get(SOURCE, {})
    if isinstance(source, dict) and (several or SOURCE in values):
        source = {name: value for name, value in source.items() if name not in turns}
        values[SOURCE] = {**source, **several}
        if not values[SOURCE] and (extra or {}).get(SOURCE):
            del values[SOURCE]
    return Pair(
        question=prompt[-1]["content"],
        chosen=response_text(chosen),
        rejected=response_text(rejected),
        images=tuple(images),
        answer_gt=answer_gt,
        provenance=provenance or {},
        extra=values,
    )


def response_text(turns: Sequence[Turn]) -> str:
    """Returns the contents of a response's turns, separated by empty lines."""
    return "\n\n".join(turn["content"] for turn in turns)


def prompt_text(pair: Pair) -> str:
    """Returns the prompt of a pair as a readable text: the question, or all turns, each after its role."""
    messages = pair.source.get(PROMPT_TURNS)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return pair.question
    lines = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = (part if isinstance(part, dict) else {} for part in content)
            content = "".join(
                IMAGE_PLACEHOLDER if part.get("type") == "image" else str(part.get("text") or "") for part in parts
            )
        lines.append(f"{message.get('role')}: {content}")
    return "\n\n".join(lines)
