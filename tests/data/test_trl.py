"""Rows of TRL's preference format."""

import json
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import PAIR

from mpo_ext.data import (
    BadLine,
    Pair,
    open_pairs,
)
from mpo_ext.data.reader import FieldError
from mpo_ext.data.trl import from_trl, read_trl, to_trl

KINDS = ("standard", "conversational")


@pytest.mark.parametrize("kind", KINDS)
def test_trl_can_read_the_rows(kind: Any, mmpr: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    for pair in open_pairs(mmpr).pairs:
        row = to_trl(pair, kind)
        assert data_utils.is_conversational(row) == (kind == "conversational")
        if kind == "conversational":
            messages = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
            placed = [block["image"] for block in messages[0]["content"] if block["type"] == "image"]
            assert placed == list(pair.images)
            assert data_utils.prepare_multimodal_messages(row["chosen"])[0]["content"][0]["text"] == pair.chosen
        assert from_trl(row) == pair


def test_image_blocks_are_at_the_places_of_the_placeholders() -> None:
    def blocks(question: str, images: int) -> list[str]:
        row = to_trl(Pair(question, "c", "r", ("x",) * images), "conversational")
        assert from_trl(row).question == question
        return [block["text"] or "IMAGE" for block in row["prompt"][0]["content"]]

    assert blocks("<image>\nq", 1) == ["IMAGE", "q"]
    assert blocks("q", 1) == ["IMAGE", "q"]
    assert blocks("a <image> b <image>\n", 2) == ["a ", "IMAGE", " b ", "IMAGE"]
    assert blocks("<image><image>", 1) == ["IMAGE", "<image><image>"]
    assert blocks("<image>", 0) == ["<image>"]


def test_an_edited_prompt_takes_precedence() -> None:
    row = to_trl(Pair("a <image>", "c", "r", ("x",)), "conversational")
    assert row["question"] == "a <image>"
    row["prompt"][0]["content"][0]["text"] = "b "
    assert from_trl(row).question == "b <image>\n"


def test_rows_of_other_writers_are_read_or_rejected() -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "score": 0.5}
    assert from_trl(row) == Pair("q", "c", "r", extra={"score": 0.5})
    user = {"role": "user", "content": "q"}
    for prompt in ([user, user], [user, {"role": "system", "content": "s"}], [], [1], 3, None, [{"role": "user"}]):
        with pytest.raises(FieldError, match="prompt must"):
            from_trl({**row, "prompt": prompt})
    with pytest.raises(FieldError, match="chosen must be text or one message"):
        from_trl({**row, "chosen": [user]})
    with pytest.raises(FieldError, match="images must be paths unless image_dir is given"):
        from_trl({**row, "images": [{"bytes": b"x", "path": None}]})


def test_a_trl_line_without_a_pair_is_a_bad_line(tmp_path: Path) -> None:
    rows = [to_trl(PAIR), {**to_trl(PAIR), "extra": "{"}, {**to_trl(PAIR), "provenance": "[]"}, {"prompt": "q"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = [result for _, result in read_trl(tmp_path / "t.jsonl").scan()]
    assert results[0] == PAIR
    assert all(isinstance(result, BadLine) for result in results[1:])
