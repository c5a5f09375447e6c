"""Tests that a parser of GitHub's Markdown recognizes the tables that mpo_ext writes."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from mpo_ext.report import Line, Panel, markdown_table, save_panels, text_table

markdown_it = pytest.importorskip("markdown_it")


def parse(text: str) -> list[list[str]]:
    """Parses a Markdown text with one table, and returns the cells of its rows."""
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
    assert text_table(["part", "time", "why"], []) == "  part  time  why"


@pytest.mark.parametrize("rounds", [[0], [0, 1], [1, 2, 3]])
def test_lines_have_error_bars_and_whole_numbers_as_ticks(
    rounds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **options: drawn.append(self) or save(self, *args))
    accuracies = [50.5 + number for number in rounds]
    line = Line("a", rounds, accuracies, errors=[3.0] * len(rounds))
    save_panels(tmp_path / "a.png", "", [Panel("Accuracy", "round", "accuracy (%)", [line])])
    (axes,) = drawn[0].axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    (bars,) = (drawn for drawn in axes.collections if hasattr(drawn, "get_segments"))
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[y - 3, y + 3] for y in accuracies]
