"""Reads the conversations of items from messages, a system prompt, a history and tools."""

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.data.media import is_empty, is_unset
from mpo_ext.data.messages import (
    Images,
    Turn,
    check_prompt_turns,
    last_question,
    read_history,
    read_response,
    read_system,
    read_turns,
)
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import CHOSEN_TURNS, PROMPT_TOOLS, PROMPT_TURNS, SOURCE
from mpo_ext.data.tools import read_tools, refuse_tools
from mpo_ext.generate.item_options import FormError, is_null, shows_options

NO_QUESTION = "no question"  # the problem of an item; journals hold this text
_MESSAGES = ("messages", "conversations", "conversation")
_FIELDS = (*_MESSAGES, "system", "history", "tools")


@dataclasses.dataclass(slots=True)
class ItemTurns:
    """The prompt of an item as a list of turns.

    Attributes:
        turns: Turns of the prompt. The last user turn is the question.
        tools: The functions that the assistant may call.
        images: Images in the order of their ``<image>`` placeholders.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]]
    images: list[Any]


def take_conversation(rest: dict[str, Any]) -> dict[str, Any]:
    """Removes the conversation fields, such as ``messages``, from the fields ``rest`` of an item, and returns them.

    Empty fields are not returned. The item may be a preference pair that this package wrote. The turns and tools of
    such a pair are taken from ``extra``.

    Raises:
        FormError: If several fields hold messages. If the chosen response of a pair has a tool call or several turns.
            If the item has an unsupported field that would change the prompt, such as ``functions``.
    """
    if not is_unset(rest.get("chat_template_kwargs")):
        raise FormError("chat_template_kwargs must be given for the whole run (--chat-template-kwargs)")
    found = {name: value for name in _FIELDS if not is_empty(value := rest.pop(name, None)) and not is_null(value)}
    extra = rest.get("extra")
    source = extra.get(SOURCE) if isinstance(extra, Mapping) else None
    if isinstance(extra, Mapping) and isinstance(source, Mapping):
        if not is_empty(source.get(CHOSEN_TURNS)):
            raise FormError("chosen must be a response of one turn, without tools")
        stored = {name: source[name] for name in (PROMPT_TURNS, PROMPT_TOOLS) if not is_empty(source.get(name))}
        if stored:
            rest["extra"] = {name: value for name, value in extra.items() if name != SOURCE}
            found = {**found, **stored}
    if len([name for name in _MESSAGES if name in found]) > 1:
        raise FormError("messages must be given once, got several fields of messages")
    try:
        refuse_tools(rest, "an item", known={"tools"})
    except FieldError as error:
        raise FormError(str(error).partition(", got ")[0]) from None
    return found


def read_conversation(
    fields: Mapping[str, Any],
    question: Any,
    options: list[str] | dict[str, str] | None,
    columns: Sequence[Any],
    data_url: Callable[[str], str],
) -> ItemTurns:
    """Builds the conversation of an item from its fields.

    Args:
        fields: Fields from ``take_conversation``.
        question: Without messages in ``fields``: the question, which becomes the last user turn. With messages: None,
            or the text of the last user turn. White space and ``<image>`` may differ from the turn.
        options: The answer options. They may contain ``<image>``.
        columns: Images from the item's image fields.
        data_url: Function that converts a base64 text to a data URL.

    Raises:
        FormError: If the conversation cannot be used as a prompt. The message contains no values of the item. Items
            with the same problem therefore have the same message.
    """
    name = next((name for name in _MESSAGES if name in fields), None)
    images = Images(columns, lambda content: data_url(base64.b64encode(content).decode()))
    try:
        turns = read_history(fields, images)
        if name is not None:
            turns = [*turns, *read_turns(name, fields[name], images)]
            if turns and turns[-1]["role"] == "assistant":
                raise FormError(f"{name} must end with the user's turn: put the last turn into chosen")
        elif isinstance(question, str):
            images.add_marks("question", question)
            turns.append({"role": "user", "content": question})
        else:
            raise FormError(NO_QUESTION)
        has_question = any(turn["role"] == "user" for turn in turns)
        is_shown = options is not None and has_question and shows_options(last_question(turns), options)
        texts = [] if is_shown else list(options.values() if isinstance(options, dict) else options or ())
        n_places = images.count - sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
        for text in texts:
            images.add_marks("options", text)
        turns = read_system(fields, turns)
        check_prompt_turns(turns, n_places)
        if name is not None and isinstance(question, str) and _words(question) != _words(last_question(turns)):
            raise FormError(f"question must be left out beside {name}, or be its last user turn")
        return ItemTurns(turns, read_tools("tools", fields.get("tools")), list(images.paths(name or "question")))
    except FieldError as error:
        raise FormError(str(error).partition(", got ")[0]) from None


def read_chosen(chosen: Any) -> str | None:
    """Returns the text of a chosen response: a text, a message, or a list with one message.

    Returns None if the response is missing or empty.

    Raises:
        FormError: If the value has another type, a message cannot be read, there are several messages, or the message
            has tool calls.
    """
    if is_null(chosen) or (isinstance(chosen, (Mapping, list, tuple)) and not chosen):
        return None
    if isinstance(chosen, str):
        return chosen
    if not isinstance(chosen, (Mapping, list, tuple)):
        raise FormError("chosen must be text or a list of messages")
    try:
        turns = read_response("chosen", chosen)
    except FieldError as error:
        raise FormError(str(error).partition(", got ")[0]) from None
    if len(turns) != 1 or "tool_calls" in turns[0]:
        raise FormError("chosen must be a response of one turn, without tools")
    return str(turns[0]["content"])


def _words(text: str) -> list[str]:
    return text.replace(IMAGE_PLACEHOLDER, " ").split()
