"""Checks the turns and tools that ``Pair.source`` stores, and converts their content to text."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.chat.conversation import message_turns
from mpo_ext.checks import shorten
from mpo_ext.data.media import TOOLS as TOOLS_DEFECT
from mpo_ext.data.messages import Turn, is_sequence, response_text
from mpo_ext.data.reader import FieldError
from mpo_ext.data.records import CHOSEN_TURNS, PROMPT_TOOLS, PROMPT_TURNS, REJECTED_TURNS, SOURCE, TURNS, Pair
from mpo_ext.data.tools import read_tools

_MARKS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
_MARK = re.compile("(" + "|".join(_MARKS.values()) + ")\n?")


def text_turns(name: str, messages: object) -> list[Turn]:
    """Converts stored messages to turns whose content is text, with a placeholder for each image or video part.

    Args:
        name: Key of the messages in ``Pair.source``, for error messages.
        messages: Messages as in ``mpo_ext.chat.Conversation``.

    Raises:
        FieldError: If a message is malformed. If a list of parts has ``<image>`` or ``<video>`` in a text, which would
            stay text there, but would be a place in the converted turn.
    """
    try:
        turns = message_turns(messages, split=False)
    except ValueError as error:
        raise FieldError(f"{name}: {error}") from None
    assert isinstance(messages, (list, tuple))
    for turn, message in zip(turns, messages, strict=True):
        if isinstance(message.get("content"), (list, tuple)):
            for part in turn["content"]:
                if mark := _MARK.search(part.get("text", "")):
                    raise FieldError(
                        f"{name} must have a separate part for each image and video, got {mark[1]} in the text "
                        f"{shorten(part['text'])}"
                    )
        turn["content"] = "".join(
            _MARKS[part["type"]] + "\n" if part["type"] in _MARKS else part["text"] for part in turn["content"]
        )
    return turns


def read_stored_turns(pair: Pair) -> Pair:
    """Checks the turns and tools in ``pair.source``, and that the texts of the pair agree with the turns.

    Training uses the turns, but the texts are shown, and are easier to edit. Without this check, an edited text would
    have no effect.

    Returns:
        The pair, without those entries of ``pair.source`` that are None. A table has such entries, because all its
        rows have the same fields.

    Raises:
        FieldError: If messages or tools are malformed. If ``question`` is not the last user turn. If ``chosen`` or
            ``rejected`` is not the text of its turns; see ``response_text``.
    """
    names = (*TURNS, PROMPT_TOOLS)
    if not any(name in pair.source for name in names):
        return pair
    source = {name: value for name, value in pair.source.items() if value is not None or name not in names}
    if PROMPT_TURNS in source:
        _check_prompt(pair.question, source[PROMPT_TURNS])
    for field, name in (("chosen", CHOSEN_TURNS), ("rejected", REJECTED_TURNS)):
        if name in source:
            _check_response(field, getattr(pair, field), name, source[name])
    tools = source.get(PROMPT_TOOLS) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise FieldError(f"{PROMPT_TOOLS} must be a list of objects, got {shorten(tools)}", kind=TOOLS_DEFECT)
    read_tools(PROMPT_TOOLS, tools)
    return pair if len(source) == len(pair.source) else dataclasses.replace(pair, extra={**pair.extra, SOURCE: source})


def _check_prompt(question: str, messages: Any) -> None:
    """Raises FieldError if ``messages`` is not a prompt, or if its last user turn is not the text ``question``."""
    turns = text_turns(PROMPT_TURNS, messages)
    places = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    if not places or turns[-1]["role"] == "assistant":
        raise FieldError(
            f"{PROMPT_TURNS} must have a turn of the user, and must not end with a turn of the assistant, got roles "
            f"{shorten([turn['role'] for turn in turns])}"
        )
    text = turns[places[-1]]["content"]
    if question == text:
        return
    # Beside a list of parts, the question was written by hand: with a placeholder for each image and video, or none.
    is_list = not isinstance(messages[places[-1]].get("content"), str)
    if not is_list or (_MARK.sub(r"\1", question) != _MARK.sub(r"\1", text) and question != _MARK.sub("", text)):
        raise _disagreement("question", question, "last user turn", PROMPT_TURNS, text)


def _check_response(field: str, response: str, name: str, messages: Any) -> None:
    """Raises FieldError if ``messages`` is not a response, or if its text is not ``response``.

    ``field`` and ``name`` name the two in error messages.
    """
    turns = text_turns(name, messages)
    if not is_sequence(turns, first={"assistant", "call"}, last={"assistant", "call"}):
        roles = [turn["role"] for turn in turns]
        raise FieldError(f"{name} must alternate from assistant to assistant, got roles {shorten(roles)}")
    if response != (text := response_text(turns)):
        raise _disagreement(field, response, "text of all turns", name, text)


def _disagreement(field: str, value: str, part: str, name: str, text: str) -> FieldError:
    return FieldError(
        f"{field} must be the {part} in extra.{SOURCE}.{name}, which training uses, got {shorten(value)} beside "
        f"{shorten(text)}: change both"
    )
