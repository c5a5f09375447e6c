"""Checks the turns of a conversation, and checks that a chat template has written all of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat.conversation import message_turns
from mpo_ext.chat.decoding import squash
from mpo_ext.chat.template import OPEN_TAG, ChatError, Tools
from mpo_ext.checks import shorten


def response_turns(turns: Sequence[Mapping[str, Any]], tokenizer: Any, end_id: int) -> list[dict[str, Any]]:
    """Checks the turns of a response, and converts the content of each turn to a list of text parts."""
    try:
        parts = message_turns(list(turns) if isinstance(turns, Sequence) else turns, split=False)
    except ValueError as error:
        raise ChatError(str(error)) from error
    roles = [turn["role"] for turn in parts]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        raise ChatError(f"a response must begin and end with an assistant's turn, got {', '.join(roles)[:80]}")
    for turn in parts:
        if end_id in tokenizer.encode(
            json.dumps(turn.get("tool_calls", ""), ensure_ascii=False), add_special_tokens=False
        ):
            raise ChatError(f"a response must not hold an end of the turn, got {str(turn['tool_calls'])[:80]!r}")
    for part in (part for turn in parts for part in turn["content"]):
        if part["type"] != "text":
            raise ChatError(f"a response must hold text, got a part of type {part['type']!r}")
        if end_id in tokenizer.encode(part["text"], add_special_tokens=False):
            raise ChatError(f"a response must not hold an end of the turn, got {part['text'][:80]!r}")
    return parts


def check_written(response: str, prompt: str, whole: str) -> None:
    """Raises ``ChatError`` if the template has changed the response.

    ``whole`` is the text that the template has written for prompt and response. Differences in white space and in the
    Unicode form are ignored.
    """
    block = OPEN_TAG.search(prompt)  # a response may begin with the block that the prompt opens
    if squash(response) not in squash(whole[block.start() if block else len(prompt) :]):
        raise ChatError(
            f"the chat template must write the response unchanged, got {whole[len(prompt) :][:80]!r} for "
            f"{response[:80]!r}"
        )


def renderings(response: str, opened: str) -> list[str]:
    """Returns the texts to try as the response in the chat template, in this order.

    The first text is the response. The second text is ``opened``, such as ``<think>``, followed by the response. There
    is a second text only if the response closes the tag without opening it.
    """
    tag = OPEN_TAG.search(opened)
    if tag and f"</{tag[1]}>" in response and not response.lstrip().startswith(f"<{tag[1]}>"):
        return [response, opened + response]
    return [response]


def check_turns(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises ``ChatError`` if the rendered prompt ``text`` is incomplete.

    ``text`` must contain the content and the tool calls of each turn in ``messages``. In an assistant's turn, the
    reasoning (up to ``</think>``) may be missing.
    """
    written = squash(text)

    def is_written(part: str) -> bool:
        # Some templates write the results and arguments of tools as JSON.
        return any(squash(form) in written for form in (part, json.dumps(part)[1:-1], _json_text(part)))

    for message in messages:
        content, role = message["content"], message["role"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
        for part in parts:
            expected = part.rpartition("</think>")[2] if role == "assistant" else part
            if not (is_written(expected) if role == "tool" else squash(expected) in written):
                raise ChatError(
                    f"the chat template must write the text of each turn, got no {part[:80]!r} of the {role}: "
                    "leave the turn out, or pass another chat_template"
                )
        for call in message.get("tool_calls", ()):
            for part in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
                if not is_written(part):
                    raise ChatError(
                        f"the chat template must write the tool calls of each turn, got no {part[:80]!r}: pass a "
                        "chat_template that writes them"
                    )


def check_response_turn(turn: Mapping[str, Any], before: str, whole: str) -> None:
    """Raises ``ChatError`` if the rendered conversation ``whole`` lacks the content or a tool call of ``turn``.

    ``turn`` belongs to the response. ``before`` is the part of ``whole`` before this turn. The texts in all other
    fields of an assistant's turn, such as ``reasoning_content``, must also be in ``whole``.
    """
    content = turn["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if turn["role"] != "tool":
        check_written(text, before, whole)
    check_turns([{**turn, "content": text if turn["role"] == "tool" else ""}], whole[len(before) :])
    for name in turn.keys() - {"role", "content", "tool_calls"} if turn["role"] == "assistant" else ():
        for part in _leaves(turn[name]):
            if squash(part) not in squash(whole[len(before) :]):
                raise ChatError(
                    f"the chat template must write the field {name!r} of the assistant's turn, got no {part[:80]!r}: "
                    "leave the field out, or pass another chat_template"
                )


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def check_tools(tools: Tools, text: str) -> None:
    """Raises ``ChatError`` if a tool has no name, or the rendered prompt ``text`` lacks the name."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ChatError(f"tools must be functions with a name, got {shorten(tool)}")
        if name not in text:
            raise ChatError(
                f"the chat template must write the tools, got no {name[:80]!r}: pass a chat_template that writes them"
            )


def _leaves(value: Any) -> list[str]:
    """Returns all names, texts and numbers in the arguments of a tool call, as a flat list of texts."""
    if isinstance(value, Mapping):
        return [text for name, part in value.items() for text in (str(name), *_leaves(part))]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in _leaves(part)]
    return [] if value is None or isinstance(value, bool) else [str(value)]
