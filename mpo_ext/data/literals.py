"""Parses values that a table stores as text in Python notation."""

import ast
import io
import itertools
import json
import re
import tokenize
from typing import Any

_MESSAGE = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|content|from|value)["']""")
_SPACES = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)


def read_literal(text: str) -> Any:
    """Parses a literal in Python notation, or a printed numpy array of strings such as ``['cat' 'dog']``.

    Raises:
        ValueError: If the text cannot be parsed. Also raised for ``'a' 'b'`` and ``['a''b']``, which may lack a comma:
            Python would join the two strings.
    """
    text = text.strip()
    try:
        value = ast.literal_eval(text)
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in _SPACES]
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(str(error)) from None
    adjacent = [
        first.end != second.start
        for first, second in itertools.pairwise(tokens)
        if first.type == second.type == tokenize.STRING
    ]
    if not adjacent:
        return value
    strings = [token.string for token in tokens if token.type == tokenize.STRING]
    others = [token.string for token in tokens if token.type != tokenize.STRING and token.string]
    if others != ["[", "]"] or not all(adjacent):
        raise ValueError("texts must be separated by commas")
    return [ast.literal_eval(string) for string in strings]


def are_messages(value: object) -> bool:
    """Returns whether a parsed value is a message, or a list of messages."""
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(
        isinstance(message, dict) and ("role" in message or "from" in message) for message in messages
    )


def is_text_of_messages(text: str) -> bool:
    """Returns whether a text consists of messages in JSON or in Python notation. The assistant's message is the last.

    Each message must have a role and content. JSON of another kind may also have a field ``role``.
    """
    if _MESSAGE.match(text) is None:
        return False
    for parse in (json.loads, read_literal):
        try:
            value = parse(text)
        except (ValueError, RecursionError):
            continue
        messages = value if isinstance(value, list) else [value]
        if not are_messages(messages) or not all("content" in turn or "value" in turn for turn in messages):
            return False
        return messages[-1].get("role", messages[-1].get("from")) in ("assistant", "gpt")
    return False
