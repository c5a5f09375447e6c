"""Reads tool calls, and the descriptions of tools. A tool is a function that the assistant may call."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from mpo_ext.chat.conversation import read_tool_calls
from mpo_ext.checks import shorten
from mpo_ext.data.media import TOOLS, is_empty
from mpo_ext.data.reader import FieldError

_FIELDS = {"tools", "functions", "tool_calls", "tool_call_id", "function_call", "tool_choice"}


def refuse_tools(values: Mapping[str, Any], name: str = "a row", *, known: Collection[str] = ()) -> None:
    """Raises FieldError if a row or message has tools that the reader does not use.

    Tools are in fields such as ``functions``. Empty fields raise no error.

    Args:
        values: Fields of the row or message.
        name: Name of the row or field in the error message.
        known: Names of the tool fields that the reader uses.
    """
    for field in sorted((_FIELDS - set(known)) & values.keys()):
        if not is_empty(values[field]) and values[field] != "[]":
            raise FieldError(
                f"{name} must be without tools, got the field {field!r} {shorten(values[field])}", kind=TOOLS
            )


def tool_calls(name: str, calls: object) -> list[dict[str, Any]]:
    """Returns the tool calls in the field ``tool_calls`` of a message; [] for an empty field.

    Raises FieldError if the field is invalid. ``name`` stands for the message in the error text.
    """
    try:
        return [] if is_empty(calls) else read_tool_calls(calls)
    except ValueError as error:
        raise FieldError(f"{name}: {error}", kind=TOOLS) from None


def call_in_content(name: str, content: object) -> list[dict[str, Any]]:
    """Reads the tool calls in the content of a message with the role "function_call".

    The content is a call or a list of calls, usually as JSON text. ``name`` is the name of the message in error
    messages.

    Raises:
        FieldError: If the content is anything else.
    """
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        raise FieldError(
            f"{name} must have a function call in JSON as the content of a turn that calls, got {shorten(content)}",
            kind=TOOLS,
        ) from None
    calls = tool_calls(name, value if isinstance(value, list) else [value])
    if not calls:
        raise FieldError(
            f"{name} must have a function call in JSON as the content of a turn that calls, got {shorten(content)}",
            kind=TOOLS,
        )
    return calls


def read_tools(name: str, value: object) -> list[dict[str, Any]]:
    """Reads the tool descriptions in a field ``tools``. Returns [] for an empty field.

    Each description becomes ``{"type": "function", "function": {"name": ..., ...}}``.

    Args:
        name: Name of the field, for the error message.
        value: Value of the field: a list of descriptions, or this list as JSON text. A description in the list may
            also be JSON text.

    Raises:
        FieldError: If the field is not a list of such descriptions.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
        if is_empty(tools):
            return []
        parsed = (
            [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
            if isinstance(tools, (list, tuple))
            else None
        )
    except ValueError:
        parsed = None
    if parsed is None:
        raise FieldError(f"{name} must be a list of functions, or a list in JSON, got {shorten(value)}", kind=TOOLS)
    found = []
    for tool in parsed:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise FieldError(f"{name} must be functions with a name, got {shorten(tool)}", kind=TOOLS)
        found.append({"type": "function", "function": dict(function)})
    return found
