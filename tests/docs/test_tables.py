"""Tests that a parser of GitHub's Markdown recognizes every table in the pages."""

import re

import pytest
from markdown_it import MarkdownIt
from test_site import PAGES, ROOT

PARSER = MarkdownIt("gfm-like", {"linkify": False})


def broken_tables(text: str) -> list[int]:
    """Returns the indices of lines that start with ``|``, except lines in a table or code block."""
    covered: set[int] = set()
    for token in PARSER.parse(text):
        if token.type in ("table_open", "fence", "code_block") and token.map:
            covered.update(range(*token.map))
    return [
        number
        for number, line in enumerate(text.splitlines())
        if re.match(r"\s{0,3}\|", line) and number not in covered
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_all_tables_are_tables(path) -> None:
    assert broken_tables(path.read_text(encoding="utf-8")) == []


def test_a_delimiter_without_a_dash_is_found() -> None:
    assert broken_tables("| a | b |\n| --- | : |\n| 1 | 2 |\n") == [0, 1, 2]
    assert broken_tables("| a | b |\n| --- | -: |\n| 1 | 2 |\n") == []
