"""Parses values that a table stores as text in Python notation."""

import ast
import io
import itertools
import tokenize
from typing import Any

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
