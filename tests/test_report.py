"""Tests of tables: every Markdown table is a table for a GFM parser."""

import itertools

import pytest

from mpo_ext.report import markdown_table, text_table

markdown_it = pytest.importorskip("markdown_it")


def parse(text: str) -> list[list[str]]:
    """Returns the cells of the only table in a text, as a GFM parser reads them."""
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    rows: list[list[str]] = []
    for token, content in itertools.pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append(content.content)
    return rows


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        (["", "n", "time"], [["a", "1", "1.5 s"], ["long name", "2", "-"]]),
        (["", "x"], [["", "1"]]),
        (["m", "k"], [["a", ""]]),
        (["name", ""], [["a", ""]]),
        (["only"], [["a"]]),
        ([""], [["a"]]),
    ],
)
def test_a_markdown_table_of_any_width_is_a_table(header: list[str], rows: list[list[str]]) -> None:
    assert parse(markdown_table(header, rows)) == [header, *rows]


def test_the_first_column_is_left_aligned_and_the_others_right_aligned() -> None:
    assert markdown_table(["", "n"], [["ab", "1"]]) == "|    |  n |\n| -- | -: |\n| ab |  1 |\n"


def test_a_text_table_aligns_numbers_to_the_right() -> None:
    rows = [["a", "1.5 s", "left"], ["bc", "10 s", "text"]]
    assert text_table(["part", "time", "why"], rows) == (
        "  part   time  why\n  a     1.5 s  left\n  bc     10 s  text"
    )  # fmt: skip
    assert text_table(["", ""], [["a", "1"], ["bc", "10"]]) == "  a   1\n  bc  10"
