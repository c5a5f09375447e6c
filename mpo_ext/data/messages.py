"""Turns of conversations: reads the messages and images of a row in any format, and builds a pair from them.

A turn is ``{"role": ..., "content": ...}`` whose content is text with ``<image>`` at the place of each image and
``<video>`` at the place of each video.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.checks import shorten, type_and_value
from mpo_ext.data.media import TOOLS, VIDEO, is_empty
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import CHOSEN_TURNS, PROMPT_TURNS, REJECTED_TURNS, SOURCE, Pair
from mpo_ext.data.row_media import PART_FIELDS, VIDEO_FIELDS, VIDEO_SETTINGS, Images, refuse_fields
from mpo_ext.videos import Video

Turn = dict[str, str]

_ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant")),
    **{"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"},
}
_MARKS: dict[object, str] = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
_TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "function_response", "observation"}
_TOOL_FIELDS = {"tools", "functions", "tool_calls", "tool_call_id", "function_call", "tool_choice"}


def read_turns(name: str, value: object, images: Images | None) -> list[Turn]:
    """Returns the turns of a list of messages, or of a single message.

    A message has ``role`` and ``content``, or ``from`` and ``value``. Content is text, or a list of parts of type
    text, image and video.

    Args:
        name: Name of the field, for messages.
        value: List of messages, or a message.
        images: Object that collects the media of parts and of ``<image>`` and ``<video>`` marks. None: a part with an
            image or a video raises FieldError.

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
    fields = ("text", "image", "video")
    kind = part.get("type") or next((field for field in fields if not is_empty(part.get(field))), None)
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        refuse_fields(name, part, {"type", "text"})
        return part["text"]
    if kind in ("image", "image_url", "input_image"):
        refuse_fields(name, part, PART_FIELDS - {"text"})
        if images is None:
            raise FieldError(f"{name} must be without images, which belong in the prompt, got {shorten(part)}")
        images.add_part(name, part)
        return IMAGE_PLACEHOLDER + "\n"
    if kind in ("video", "video_url", "input_video"):
        refuse_fields(name, part, {"type", *VIDEO_FIELDS, *VIDEO_SETTINGS})
        if images is None:
            raise FieldError(f"{name} must be without videos, which belong in the prompt, got {shorten(part)}")
        images.add_video(name, part)
        return VIDEO_PLACEHOLDER + "\n"
    is_media = isinstance(kind, str) and any(word in kind for word in ("video", "audio"))
    raise FieldError(
        f"{name} must have blocks of text, images and videos, got {shorten(part)}",
        kind=VIDEO if is_media else "bad field",
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
    videos: Sequence[Video] = (),
    rejected_images: Sequence[str] = (),
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
        videos: Videos in the order of their places.
        rejected_images: As in ``Pair``.

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
    for mark, kind, count in (
        (IMAGE_PLACEHOLDER, "images", len(images)),
        (VIDEO_PLACEHOLDER, "videos", len(videos)),
    ):
        places = sum(turn["content"].count(mark) for turn in prompt)
        if len(prompt) > 1 and places not in (0, count):
            raise FieldError(f"prompt must hold {mark} 0 or {count} times for its {kind}, got {places}")
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
        videos=tuple(videos),
        rejected_images=tuple(rejected_images),
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
            content = "".join(_MARKS.get(part.get("type"), str(part.get("text") or "")) for part in parts)
        lines.append(f"{message.get('role')}: {content}")
    return "\n\n".join(lines)
