"""Tests the class Pair and its validation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import PAIR

from mpo_ext.data import (
    Pair,
    read_pairs,
)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"question": 1}, TypeError, "question must be a str, got int 1"),
        ({"chosen": None}, TypeError, "chosen must be a str, got NoneType None"),
        ({"rejected": ["r"]}, TypeError, "rejected must be a str, got list"),
        ({"chosen": "\ud800"}, ValueError, "chosen must be text that UTF-8 can hold"),
        ({"images": "a.png"}, TypeError, "images must be a list of paths, got str"),
        ({"images": ["a", 1]}, TypeError, r"images\[1\] must be a str, got int 1"),
        ({"images": [""]}, ValueError, r"images\[0\] must be a path"),
        ({"answer_gt": True}, TypeError, "answer_gt must be a str or None, got bool True"),
        ({"answer_gt": float("inf")}, TypeError, "answer_gt must be a str or None, got float inf"),
        ({"provenance": []}, TypeError, r"provenance must be a dict, got list \[\]"),
        ({"provenance": {"a": [0, float("nan")]}}, ValueError, r"provenance.a\[1\] must be finite, got nan"),
        ({"extra": {"a": {1: 2}}}, TypeError, r"extra.a must have keys of type str, got int 1"),
        ({"extra": {"a": (1,)}}, TypeError, r"extra.a must be JSON"),
        ({"extra": {"$source": 1}}, TypeError, r"extra.\$source must be a dict, got int 1"),
        ({"qestion": "x"}, ValueError, "unknown field 'qestion'; known fields: question"),
    ],
)
def test_a_bad_field_of_a_pair_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Pair.from_dict({**PAIR.to_dict(), **change})


def test_a_pair_needs_question_and_both_responses() -> None:
    with pytest.raises(ValueError, match="rejected must be given, got an object with 'question', 'chosen'"):
        Pair.from_dict({"question": "q", "chosen": "c"})
    with pytest.raises(TypeError, match="a pair must be an object"):
        Pair.from_dict([])  # type: ignore[arg-type]
    assert Pair.from_dict({"question": "q", "chosen": "c", "rejected": "r"}) == PAIR


def test_an_answer_that_is_a_number_becomes_its_text(tmp_path: Path) -> None:
    for number, text in ((3, "3"), (0.5, "0.5"), (-1e30, "-1e+30")):
        assert Pair.from_dict({**PAIR.to_dict(), "answer_gt": number}) == dataclasses.replace(PAIR, answer_gt=text)
    (tmp_path / "p.jsonl").write_text(json.dumps({**PAIR.to_dict(), "answer_gt": 7}) + "\n")
    assert read_pairs(tmp_path / "p.jsonl")[0].answer_gt == "7"


def test_the_key_depends_only_on_question_responses_and_images() -> None:
    assert PAIR.key() == "0a833e499bf22937df1018a114a10751"
    other = dataclasses.replace(PAIR, answer_gt="x", provenance={"seed": 1}, extra={"a": 1})
    assert other.key() == PAIR.key()
    keys = {dataclasses.replace(PAIR, **{name: "x"}).key() for name in ("question", "chosen", "rejected")}
    keys |= {PAIR.key(), dataclasses.replace(PAIR, images=("x",)).key(), Pair("qc", "", "r").key()}
    assert len(keys) == 6
    assert len({PAIR, other}) == 2


def test_other_images_change_nothing_else() -> None:
    pair = Pair("q", "c", "r", ("a.png",), "7", {"seed": 1}, {"a": [1]})
    assert pair.map_paths(lambda path: f"root/{path}") == dataclasses.replace(pair, images=("root/a.png",))
    assert pair.images == ("a.png",)
    for image, message in (
        (7, "must be a str, got int 7"),
        ("", "must be a path, got str ''"),
        ("a\0", "must be a path"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"images\[0\] {message}"):
            pair.map_paths(lambda _, image=image: image)  # type: ignore[misc]
