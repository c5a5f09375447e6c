"""Conversations with images and videos, and their conversion to messages for a chat template."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
_PLACES = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The turns of a conversation before the assistant's response.

    Attributes:
        key: Name of the conversation in error messages.
        question: The user's question. ``<image>`` and ``<video>`` mark the positions of images and videos. Without
            these placeholders, the images come first, and then the videos.
        messages: All turns, as mappings with ``role`` and ``content``. Without messages, the question is the only
            turn. With messages, ``question`` is ignored. The content is text with the same placeholders, or a list of
            ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and ``{"type": "video"}``. An assistant's turn may
            have ``tool_calls``, as in OpenAI's API. A turn with the role "tool" holds the result of a call.
        images: Images in the order of their positions, in any form that ``mpo_ext.images.load_image`` takes.
        tools: Descriptions of the functions that the assistant may call, in the form that chat templates take:
            ``{"type": "function", "function": {"name": ..., "parameters": ...}}``.
        videos: Videos in the order of their positions, in any form that ``mpo_ext.videos.load_video`` takes.
    """

    key: str = ""
    question: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    videos: tuple[Any, ...] = ()


def chat_messages(conversation: Conversation, *, as_parts: bool) -> list[dict[str, Any]]:
    """Returns a conversation as messages for a chat template.

    Args:
        conversation: The conversation.
        as_parts: True: the content of each message is a list of texts, images and videos, as multimodal models expect.
            False: the content is text, and the conversation must have no images or videos.

    Raises:
        ValueError: If a message is malformed, for example without a role. If the last message is from the assistant.
            If the conversation has images or videos, and ``as_parts`` is False. If the messages have placeholders,
            and their number differs from the number of images and videos.
    """
    counts = {"image": len(conversation.images), "video": len(conversation.videos)}
    for kind, count in counts.items():
        if not as_parts and count:
            raise ValueError(f"{kind}s must be empty for a text model, got {count} in {conversation.key!r}")
    messages = conversation.messages or ({"role": "user", "content": conversation.question},)
    turns = message_turns(messages, split=as_parts)
    if turns[-1]["role"] == "assistant":
        raise ValueError("messages must end before the assistant's response, got an assistant message at the end")
    unplaced: list[dict[str, Any]] = []
    for mark, kind in _PLACES.items():
        count, places = counts[kind], sum(part["type"] == kind for turn in turns for part in turn["content"])
        if count and not places:
            unplaced += [{"type": kind}] * count
        elif places != count:
            rule = "messages must have one place" if conversation.messages else f"question must have one {mark}"
            raise ValueError(f"{rule} for each of the {count} {kind}s, got {places} in {conversation.key!r}")
    if unplaced:
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        first["content"] = unplaced + first["content"]
    return turns if as_parts else [{**turn, "content": _text(turn["content"])} for turn in turns]


def message_turns(messages: object, *, split: bool) -> list[dict[str, Any]]:
    """Checks messages, and converts the content of each message to a list of texts, images and videos.

    If ``split`` is True, ``<image>`` and ``<video>`` in a text become images and videos. If ``split`` is False, they
    stay text. Raises ValueError for malformed messages.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of messages, got {str(messages)[:80]!r}")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"each message must have a role and content, got {str(message)[:80]!r}")
        turn = {name: value for name, value in message.items() if name != "tool_calls"}
        content = message.get("content")
        if calls := read_tool_calls(message.get("tool_calls")):
            turn["tool_calls"] = calls
            content = content or ""
        turns.append({**turn, "content": _parts(content, split=split)})
    return turns


def read_tool_calls(calls: object) -> list[dict[str, Any]]:
    """Converts the tool calls of an assistant's turn to the form that chat templates take.

    ``calls`` is None or a list of calls. A call is ``{"name": ..., "arguments": ...}``. As in OpenAI's API, a call may
    also hold this object in its field ``function``, and the arguments may be JSON text.

    Raises:
        ValueError: If ``calls`` has another form.
    """
    if calls is None:
        return []
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"tool_calls must be a list of calls, got {str(calls)[:80]!r}")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
            raise ValueError(
                "tool_calls must have a function with a name and an object of arguments in each call, got "
                f"{str(call)[:80]!r}"
            )
        ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({**ids, "type": "function", "function": {"name": name, "arguments": dict(arguments)}})
    return read


def _parts(content: object, *, split: bool) -> list[dict[str, Any]]:
    """Converts the content of a message to a list of parts: texts, images and videos.

    ``split`` True: ``<image>`` and ``<video>`` in a text become parts. False: they stay in the text.
    """
    if isinstance(content, str):
        pieces = re.split(f"({'|'.join(_PLACES)})", content) if split else [content]
        parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            text = piece.removeprefix("\n")  # the templates write a line break after an image
            parts += [{"type": _PLACES[mark]}, *([{"type": "text", "text": text}] if text else [])]
        return parts
    if not isinstance(content, Sequence):
        raise ValueError(f"content must be text or a list of texts, images and videos, got {str(content)[:80]!r}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "video"):
            parts.append({"type": kind})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"content must be text or a list of texts, images and videos, got {str(part)[:80]!r}")
    return parts


def _text(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)
