"""Tests how the study counts errors in responses about digit grids.

A pair's labels are wrong if its chosen response has more errors than its rejected response.
"""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import pytest

for package in ("torch", "transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

from benchmarks.study.labels import cost, count_errors, label_shares, table
from mpo_ext.data import Pair

VALUES = [3, 4, 5, 9]
RIGHT = "top-left 3 , top-right 4 , bottom-left 5 , bottom-right 9 . Final answer: 9"
LARGEST, CELL = "Which digit is largest ? Think stepwise.", "Which digit is top-right ? Think stepwise."


@pytest.mark.parametrize(
    ("response", "question", "errors"),
    [
        (RIGHT, LARGEST, 0),
        (RIGHT, CELL, 1),
        (RIGHT.replace(": 9", ": 4"), CELL, 0),
        (RIGHT.replace("bottom-right 9", "bottom-right 6"), LARGEST, 1),
        ("top-left 3 , top-right 4 . Final answer: 9", LARGEST, 2),
        ("nothing", LARGEST, 5),
    ],
)
def test_errors_are_wrong_or_missing_digits_and_a_wrong_answer(response: str, question: str, errors: int) -> None:
    assert count_errors(response, question, VALUES) == errors


def test_a_label_is_wrong_if_the_chosen_response_has_more_errors() -> None:
    worse, worst = RIGHT.replace("top-left 3", "top-left 8"), "nothing"
    common = {"images": ("grid.png",), "extra": {"form": "cot", "digits": VALUES}}
    sides = [(RIGHT, worse), (RIGHT, worst), (worse, worst), (worse, worse.replace("8", "7")), (worst, RIGHT)]
    pairs = [Pair(LARGEST, chosen, rejected, **common) for chosen, rejected in sides]
    direct = Pair(LARGEST, "9", "8", images=("grid.png",), extra={"form": "direct", "digits": VALUES})
    in_words = Pair(LARGEST, "9", "8", extra={"form": "cot"})
    shares = label_shares([*pairs, direct, in_words])
    assert shares == {"right": 0.6, "equal": 0.2, "wrong": 0.2, "chosen_right": 0.4}
    assert label_shares([direct, in_words]) == {}


def test_the_table_has_tokens_for_each_pair_that_was_made() -> None:
    shares = {"right": 0.8, "equal": 0.1, "wrong": 0.1, "chosen_right": 0.5}
    summaries = [{"generated_tokens": 1200, "lines": {"pairs": 10, "format_pairs": 2, "unsolved": 4}},
                 {"generated_tokens": 600, "lines": {"pairs": 12}}]  # fmt: skip
    starts = [{"labels": {"correctness": shares}, "sampling": {"correctness": each}} for each in summaries]
    lines = table({"starts": [*starts, {"labels": {}, "sampling": {}}, {}]}).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "correctness", "75.0", "80.0", "10.0", "10.0", "50.0", "2",
    ]  # fmt: skip
    assert len(lines) == 3


def test_the_cost_is_compared_with_the_paper() -> None:
    shares = {"right": 0.8, "equal": 0.1, "wrong": 0.1, "chosen_right": 0.5}
    stages = {"responses": 1500, "claims": 0, "questions": 0, "verdicts": 500}
    rlaif_v = {"generated_tokens": 2000, "generated_tokens_by_stage": stages, "records": 100, "lines": {"pairs": 20}}
    sampling = {"RLAIF-V": rlaif_v, "DropoutNTP 0.5": {"generated_tokens": 500, "lines": {"pairs": 10}}}
    text = cost({"starts": [{"labels": {"RLAIF-V": shares}, "sampling": sampling}, {"labels": {}}]})
    assert text.startswith("DropoutNTP generates 50.0 tokens per pair, and RLAIF-V 100.0. The ratio is 50 %. In")
    assert "571.2 and 992.7, with a ratio of 57.5 %. A response has 15 tokens on average." in text
    assert "25.0 % of the tokens of RLAIF-V are such judgements." in text
    assert cost({"starts": [{"labels": {}}]}) == "Not run yet.\n"
