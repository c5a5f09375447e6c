"""Reads the messages and images of a row in any format, and builds a pair from them.

A turn is ``{"role": ..., "content": ...}``. Its content is text, with placeholders ``<image>`` and ``<video>`` for
images and videos. A turn of the assistant may also have ``tool_calls``. A turn with the role "tool" holds the result
of a tool call.
"""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.checks import shorten, type_and_value
from mpo_ext.data.media import TOOLS, VIDEO, is_empty, is_unset
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import CHOSEN_TURNS, PROMPT_TOOLS, PROMPT_TURNS, REJECTED_TURNS, SOURCE, TURNS, Pair
from mpo_ext.data.row_media import PART_FIELDS, VIDEO_FIELDS, VIDEO_SETTINGS, Images, refuse_fields
from mpo_ext.data.tools import call_in_content, refuse_tools, tool_calls
from mpo_ext.videos import Video

Turn = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant")),
    **{"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"},
}
_MARKS: dict[object, str] = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
_RESULT_ROLES = {"tool", "tool_response", "function", "function_response", "observation"}
_CALL_ROLES = {"tool_call", "function_call"}  # ShareGPT and ms-swift; the content is the call in JSON
#: Roles that may follow a turn; "call" is a turn of the assistant with tool calls.
_FOLLOWING = {
    "user": {"assistant", "call"},
    "assistant": {"user"},
    "call": {"tool"},
    "tool": {"tool", "assistant", "call", "user"},
}


def is_response_role(role: object) -> bool:
    """Returns whether a message with this role is a response of the model."""
    return isinstance(role, str) and (_ROLES.get(role) or role) == "assistant"


def read_turns(name: str, value: object, images: Images | None) -> list[Turn]:
    """Converts a message, or a list of messages, to turns.

    A message has ``role`` and ``content``, or ``from`` and ``value``. Content is text, or a list of parts of type
    text, image and video. A message with a role such as "function_call", whose content is a tool call in JSON, becomes
    ``tool_calls`` of the assistant's turn.

    Args:
        name: Name of the field, for error messages.
        value: List of messages, or a message.
        images: Collects the images and videos of the messages, from parts and from the placeholders ``<image>`` and
            ``<video>``. None: a part with an image or a video raises FieldError.

    Raises:
        FieldError: If a message is invalid, or has a part or a field that this package does not use.
    """
    messages = unbundled(value)
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise FieldError(f"{name} must be text or a list of messages, got {shorten(value)}")
    turns: list[Turn] = []
    for message in messages:
        turn = _turn(name, message, images)
        before = turns[-1] if turns else {}
        if turn.pop("is_call", False) and before.get("role") == "assistant":
            before["tool_calls"] = [*before.get("tool_calls", ()), *turn["tool_calls"]]
        else:
            turns.append(turn)
    return turns


def unbundled(value: Any) -> Any:
    """Converts a message to a list with this message, and a dict of lists to a list of messages.

    Older datasets store messages as a dict of two lists, such as ``{"role": [...], "content": [...]}``. Any value that
    is not a dict is returned unchanged.
    """
    if not isinstance(value, Mapping):
        return value
    columns = list(value.values())
    is_bundle = value.keys() in ({"from", "value"}, {"role", "content"}) and all(isinstance(c, list) for c in columns)
    if is_bundle and len(columns[0]) == len(columns[1]):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def _turn(name: str, message: Mapping[str, Any], images: Images | None) -> Turn:
    """Converts a message to a turn.

    If the whole message is a tool call, the turn also has the key ``is_call``, which the caller removes.
    """
    refuse_tools(message, name, known={"tool_calls", "tool_call_id"})
    is_sharegpt = "from" in message and "role" not in message
    role_field, content_field = ("from", "value") if is_sharegpt else ("role", "content")
    role, content = message.get(role_field), message.get(content_field)
    plain = role.replace("-", "_") if isinstance(role, str) else ""
    if plain in _CALL_ROLES:
        refuse_fields(name, message, {role_field, content_field})
        return {"role": "assistant", "content": "", "tool_calls": call_in_content(name, content), "is_call": True}
    if plain in _RESULT_ROLES:
        refuse_fields(name, message, {role_field, content_field, "name", "tool_call_id"})
        ids = {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
        return {"role": "tool", **ids, "content": _content(name, content, images)}
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join([*_ROLES, "tool"])
        raise FieldError(f"{name} must be messages of {known}, got the role {shorten(role)}")
    turn = {"role": _ROLES[role] or role}
    if turn["role"] != "assistant":
        refuse_tools(message, name)
    refuse_fields(name, message, {role_field, content_field, "tool_calls"})
    calls = tool_calls(name, message.get("tool_calls"))
    if not calls:
        return {**turn, "content": _content(name, content, images)}
    return {**turn, "content": _content(name, content or "", images), "tool_calls": calls}


def refuse_stored_turns(extra: Mapping[str, Any]) -> None:
    """Raises FieldError if a row that is not in the format "pairs" stores turns or tools like a row of this format.

    ``extra`` are the fields of the row that its reader does not use. The reader would leave the turns out.
    """
    pair_extra = extra.get("extra")
    source = pair_extra.get(SOURCE) if isinstance(pair_extra, Mapping) else None
    if not isinstance(source, Mapping):
        return
    if names := [name for name in (*TURNS, PROMPT_TOOLS) if not is_empty(source.get(name))]:
        raise FieldError(
            f"extra.{SOURCE} must be without turns and tools, which only the format 'pairs' reads, got "
            f"{', '.join(names)}: remove the fields that a pair does not have, or name the format (--from pairs, in a "
            "recipe format: pairs)"
        )


def refuse_meaning(row: Mapping[str, Any], *names: str) -> None:
    """Raises FieldError if a row has a non-empty field in ``names``, or a non-empty field ``system_prompt``.

    The format of the row does not have these fields, so the reader of the row would ignore them. In other formats,
    such fields change the prompt, for example ``system``.
    """
    for name in (*names, "system_prompt"):
        # In chat_template_kwargs, false counts as a value: {"enable_thinking": false} changes the prompt.
        if not (is_unset if name == "chat_template_kwargs" else is_empty)(row.get(name)):
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
    """Converts a response to turns. The response is a text, a message or a list of messages.

    The first and the last turn must be turns of the assistant. User and assistant alternate. Tool results must follow
    tool calls, except for tool calls in the last turn.

    Raises:
        FieldError: If a message is invalid, or the turns break one of these rules.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = read_turns(name, value, None)
    if not is_sequence(turns, first={"assistant", "call"}, last={"assistant", "call"}):
        roles = [turn["role"] for turn in turns]
        raise FieldError(
            f"{name} must be text or one message of the assistant, or turns that alternate from assistant to "
            f"assistant, got roles {shorten(roles)}"
        )
    return turns


def is_sequence(turns: Sequence[Turn], *, first: Collection[str], last: Collection[str]) -> bool:
    """Returns whether the roles of the turns are in a valid order.

    Args:
        turns: The turns.
        first: Roles that the first turn may have. "call" is an assistant's turn with tool calls.
        last: Roles that the last turn may have.
    """
    roles = ["call" if turn.get("tool_calls") else turn["role"] for turn in turns]
    if not roles or roles[0] not in first or roles[-1] not in last:
        return False
    return all(after in _FOLLOWING.get(before, ()) for before, after in itertools.pairwise(roles))


def check_prompt_turns(prompt: Sequence[Turn], n_images: int, n_videos: int = 0) -> None:
    """Raises FieldError if the turns do not form a valid prompt.

    The first turn may be a system turn. Then user and assistant alternate. An assistant's turn with tool calls is
    followed by the tool results. The last turn is a user's turn or a tool result. If there are several turns, they
    have either no ``<image>`` or ``n_images`` of them. The same holds for ``<video>`` and ``n_videos``.
    """
    if not prompt:
        raise FieldError("prompt must be text or messages, got none")
    rest = prompt[1:] if prompt and prompt[0]["role"] in ("system", "developer") else prompt
    if not is_sequence(rest, first={"user", "assistant"}, last={"user", "tool"}):
        raise FieldError(
            "prompt must be turns of user and assistant that alternate and end with one message of the user (or the "
            "result of a tool call), after one system turn at most, got roles "
            f"{shorten([turn['role'] for turn in prompt])}",
            kind=TOOLS if any(turn["role"] == "tool" or "tool_calls" in turn for turn in prompt) else "bad field",
        )
    for mark, kind, count in ((IMAGE_PLACEHOLDER, "images", n_images), (VIDEO_PLACEHOLDER, "videos", n_videos)):
        places = sum(turn["content"].count(mark) for turn in prompt)
        if len(prompt) > 1 and places not in (0, count):
            raise FieldError(f"prompt must hold {mark} 0 or {count} times for its {kind}, got {places}")


def last_question(prompt: Sequence[Turn]) -> str:
    """Returns the content of the last user turn."""
    return next(turn["content"] for turn in reversed(prompt) if turn["role"] == "user")


def with_question(prompt: Sequence[Mapping[str, Any]], question: str) -> list[Turn]:
    """Returns a copy of the prompt in which ``question`` is the content of the last user turn."""
    place = max(number for number, turn in enumerate(prompt) if turn["role"] == "user")
    return [{**turn, "content": question} if number == place else dict(turn) for number, turn in enumerate(prompt)]


def split_common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Returns the number of messages at the beginning that both conversations share.

    The last message of each conversation does not count, because it is the response.
    """
    most = max(0, min(len(chosen), len(rejected)) - 1)
    return next((index for index in range(most) if chosen[index] != rejected[index]), most)


def read_system(row: Mapping[str, Any], prompt: Sequence[Turn]) -> list[Turn]:
    """Returns the turns of a prompt. A text in the row's field ``system`` becomes the first turn.

    Raises FieldError if the prompt already begins with another system text.
    """
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
    """Converts the row's field ``history``, a list of ``[question, response]`` lists, to turns."""
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
    tools: Sequence[Mapping[str, Any]] = (),
    answer_gt: str | None = None,
    provenance: dict[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    videos: Sequence[Video] = (),
    rejected_images: Sequence[str] = (),
) -> Pair:
    """Builds a pair from turns.

    The last user turn becomes ``question``. A prompt with several turns or with tool calls is also stored in
    ``Pair.source``, as a list of turns. The same applies to each response.

    Args:
        prompt: Turns before the response; see ``check_prompt_turns``.
        chosen: Turns of the chosen response.
        rejected: Turns of the rejected response.
        images: Image paths in the order of their placeholders in the prompt.
        tools: The functions that the assistant may call, from ``read_tools``.
        answer_gt: As in ``Pair``.
        provenance: As in ``Pair``.
        extra: As in ``Pair``.
        videos: Videos in the order of their placeholders in the prompt.
        rejected_images: As in ``Pair``.

    Raises:
        FieldError: If ``prompt`` is not a valid prompt; see ``check_prompt_turns``. If ``refuse_stored_turns`` raises
            it for ``extra``.
    """
    check_prompt_turns(prompt, len(images), len(videos))
    refuse_stored_turns(extra or {})
    turns = {PROMPT_TURNS: prompt, CHOSEN_TURNS: chosen, REJECTED_TURNS: rejected}
    several: dict[str, Any] = {
        name: [dict(turn) for turn in value]
        for name, value in turns.items()
        if len(value) > 1 or any("tool_calls" in turn for turn in value)
    }
    if tools:
        several[PROMPT_TOOLS] = [dict(tool) for tool in tools]
    values = dict(extra or {})
    source = values.get(SOURCE, {})
    if isinstance(source, dict) and (several or SOURCE in values):
        source = {name: value for name, value in source.items() if name not in (*turns, PROMPT_TOOLS)}
        values[SOURCE] = {**source, **several}
        if not values[SOURCE] and (extra or {}).get(SOURCE):
            del values[SOURCE]
    return Pair(
        question=last_question(prompt),
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
    """Returns a response as one text: the contents and tool calls of all turns, separated by empty lines."""
    return "\n\n".join(_shown(turn) for turn in turns)


def _shown(turn: Mapping[str, Any]) -> str:
    """Returns the content of a turn, followed by a line of JSON for each tool call."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join([*([turn["content"]] if turn["content"] or not calls else []), *calls])


def prompt_text(pair: Pair) -> str:
    """Returns the prompt of a pair as readable text.

    Without ``messages`` and ``tools`` in ``pair.source``, the text is the question. Otherwise, the text has the tools
    and all turns with their roles.
    """
    return turns_text(pair.source.get(PROMPT_TURNS), pair.source.get(PROMPT_TOOLS), pair.question)


def turns_text(messages: object, tools: object, question: str) -> str:
    """Returns the tools and turns as readable text, such as "user: What is this?" for a turn.

    If ``messages`` is not a list of turns, the text has ``question`` instead of the turns.
    """
    lines = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        return "\n\n".join([*lines, f"user: {question}"]) if lines else question
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = (part if isinstance(part, dict) else {} for part in content)
            content = "".join(_MARKS.get(part.get("type"), str(part.get("text") or "")) for part in parts)
        calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
        lines.append(f"{message.get('role')}: {' '.join(filter(None, (str(content or ''), calls)))}")
    return "\n\n".join(lines)
