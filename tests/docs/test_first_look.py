"""Runs the code of docs/how-to/loss-only.md on wrong batches.

This code must detect mistakes that do not change the first loss value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import page
import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra train")

PAGE = page.ROOT / "docs" / "how-to" / "loss-only.md"


def block(text: str) -> page.Block:
    (found,) = [one for one in page.blocks(PAGE) if one.language == "python" and text in one.text]
    return found


def look(change: Callable[[dict[str, Any]], None] = lambda names: None) -> None:
    found, names = block("is_scored"), {}
    exec(found.prelude, names)
    change(names)
    exec(found.text, names)


def reorder(order: list[int]) -> Callable[[dict[str, Any]], None]:
    def change(names: dict[str, Any]) -> None:
        names["input_ids"], names["labels"] = names["input_ids"][order], names["labels"][order]

    return change


def test_it_shows_prompts_and_responses(capsys: pytest.CaptureFixture[str]) -> None:
    look()
    assert capsys.readouterr().out.splitlines() == [
        "tokens [2, 2, 2, 2], next-token loss 2.30",
        "chosen: 'one plus one ?' -> 'two <end>'",
        "rejected: 'one plus one ?' -> 'four <end>'",
        "chosen: 'two plus one ?' -> 'three <end>'",
        "rejected: 'two plus one ?' -> 'no <end>'",
    ]
    look(reorder([2, 3, 0, 1]))  # rejected first: shown, to be read
    assert "chosen: 'one plus one ?' -> 'four <end>'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reorder([0, 2, 1, 3]), "rows 0 and 2 have different prompts: are chosen and rejected rows interleaved"),
        (lambda names: names.update(labels=names["labels"].roll(-1, -1)), "labels are not aligned with input_ids"),
        (lambda names: names.update(labels=names["input_ids"]), "the prompt of row 0 is not masked"),
        (lambda names: names.update(labels=torch.full_like(names["labels"], -100)), "a row has no labelled token"),
    ],
    ids=["interleaved", "shifted", "unmasked", "empty"],
)
def test_it_finds_what_the_first_loss_cannot_see(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        look(change)


def test_a_label_outside_of_the_vocabulary_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    found, names = block("bad.nonzero"), {}
    exec(found.prelude + found.text, names)
    assert capsys.readouterr().out == "row 1, position 2: label 10 is not in [0, 10)\n"
