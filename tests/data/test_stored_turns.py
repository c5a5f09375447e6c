"""Tests that the texts of a pair in the format "pairs" agree with its stored turns, and that all turns are valid."""

import json
from pathlib import Path
from typing import Any

import pytest
from rows import assistant, open_rows, read_row, system, text, user

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.data.convert import convert
from mpo_ext.data.trl import from_trl, to_trl
from mpo_ext.train.encode import conversation_of

CALL = {"type": "function", "function": {"name": "age", "arguments": {"of": "cat"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "age", "parameters": {}}}
EARLIER = [user("a"), assistant("b"), user("q")]
SEVERAL = [assistant("c"), user("d"), assistant("e")]
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def line(source: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"question": "q", "chosen": "c", "rejected": "r", **fields, "extra": {"$source": source}}


@pytest.mark.parametrize(
    "row",
    [
        line({"messages": EARLIER}),
        line({"messages": [system("s"), user("q")]}),
        line({"messages": [user("before"), user("q")]}),
        line({"messages": [user("q"), CALLING, {"role": "tool", "content": "7"}], "tools": [TOOL]}),
        line({"chosen_messages": SEVERAL}, chosen="c\n\nd\n\ne"),
        line({"rejected_messages": [CALLING]}, rejected=json.dumps(CALL["function"])),
        line({"messages": [user("<image>\na"), assistant("b"), user("q")]}, images=["a.png"]),
        line({"messages": [user([IMAGE, text("q")])]}, images=["a.png"]),
        line({"messages": [user([IMAGE, text("q")])]}, images=["a.png"], question="<image>q"),
        line({"messages": [user([IMAGE, text("q")])]}, images=["a.png"], question="<image>\nq"),
        line({"messages": [user([text("q"), IMAGE])]}, images=["a.png"]),
        line({"messages": [user([VIDEO, text("q")])]}, videos=["a.mp4"]),
        line({"messages": [user([text("a"), text("b")])]}, question="ab"),
        line({"messages": [user("<image 1> a"), assistant("b"), user("q <image 2>")]},
             images=["a.png", "b.png"], question="q <image 2>"),
        line({"subset": "s", "other": 3}),
    ],
)  # fmt: skip
def test_turns_that_agree_with_the_texts_are_read(row: dict[str, Any], tmp_path: Path) -> None:
    pair = read_row(tmp_path, row, format="pairs")
    assert isinstance(pair, Pair), pair
    convert(open_pairs(tmp_path / "rows.jsonl", format="pairs"), tmp_path / "again.jsonl", "pairs")
    assert open_pairs(tmp_path / "again.jsonl", format="pairs").pairs[0] == pair


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            line({"messages": EARLIER}, question="edited"),
            "question must be the last user turn in extra.$source.messages",
        ),
        (line({"messages": EARLIER}, question="<image>q", images=["a.png"]), "question must be the last user turn"),
        (line({"messages": [user([IMAGE, text("q")])]}, images=["a.png"], question="p"), "question must be"),
        (line({"messages": [user([IMAGE, text("q")])]}, images=["a.png"], question="q<image>"), "question must be"),
        (
            line({"chosen_messages": SEVERAL}, chosen="c"),
            "chosen must be the text of all turns in extra.$source.chosen_messages",
        ),
        (line({"rejected_messages": [assistant("R")]}), "rejected must be the text of all turns"),
        (line({"messages": "hello"}), "messages: messages must be a list of messages, got 'hello'"),
        (line({"messages": []}), "messages must be a list of messages"),
        (line({"messages": 3}), "messages must be a list of messages"),
        (line({"messages": [{"content": "q"}]}), "each message must have a role"),
        (line({"messages": [{"role": "user"}]}), "content must be text or a list"),
        (line({"messages": [*EARLIER, assistant("x")]}), "must not end with a turn of the assistant"),
        (line({"messages": [system("q")]}), "must have a turn of the user"),
        (line({"messages": [{**CALLING, "tool_calls": [1]}, *EARLIER]}), "tool_calls must have a function"),
        (line({"messages": [user([IMAGE, text("a <image>")])]}, images=["a.png"]), "a separate part for each image"),
        (line({"chosen_messages": [user("c")]}), "chosen_messages must alternate from assistant to assistant"),
        (line({"chosen_messages": "c"}), "chosen_messages: messages must be a list"),
        (line({"tools": "x"}), "tools must be a list of objects"),
        (line({"tools": [{"type": "function"}]}), "tools must be functions with a name"),
    ],
)
def test_turns_that_disagree_with_the_texts_refuse_the_line(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    bad = read_row(tmp_path, row, format="pairs")
    assert isinstance(bad, BadLine), bad
    assert words in bad.reason
    assert not check_pairs(open_pairs(tmp_path / "rows.jsonl", format="pairs")).is_clean


@pytest.mark.parametrize("source", [{"messages": EARLIER}, {"rejected_messages": SEVERAL}, {"tools": [TOOL]}])
@pytest.mark.parametrize("fields", [{"id": 7}, {"id": 7, "images": []}, {"image": ""}])
def test_turns_in_another_format_refuse_the_line(
    fields: dict[str, Any], source: dict[str, Any], tmp_path: Path
) -> None:
    bad = read_row(tmp_path, line(source, **fields))
    assert isinstance(bad, BadLine), bad
    assert "without turns and tools, which only the format 'pairs' reads" in bad.reason
    assert isinstance(read_row(tmp_path, line({"subset": "s"}, **fields)), Pair)


def test_entries_of_a_table_without_turns_are_left_out(tmp_path: Path) -> None:
    empty = dict.fromkeys(("messages", "chosen_messages", "rejected_messages", "tools"))
    pair = read_row(tmp_path, line({**empty, "subset": "s"}), format="pairs")
    assert pair == Pair("q", "c", "r", extra={"$source": {"subset": "s"}})


@pytest.mark.parametrize(
    ("content", "question", "expected"),
    [
        ([IMAGE, text("q")], "q", "<image>\nq"),
        ([text("q"), IMAGE], "q", "q<image>\n"),
        ([text("q "), IMAGE, text("r")], "q <image>r", "q <image>\nr"),
    ],
)
@pytest.mark.parametrize(
    "earlier", [[], [system([text("s")])], [user("a"), CALLING, {"role": "tool", "content": "7"}]]
)
def test_parts_are_converted_to_trl_with_their_places(
    content: Any, question: str, expected: str, earlier: list[Any], tmp_path: Path
) -> None:
    row = line({"messages": [*earlier, user(content)]}, images=["a.png"], question=question)
    source = open_rows(tmp_path, [row], format="pairs")
    convert(source, tmp_path / "trl.jsonl", "trl")
    pair = open_pairs(tmp_path / "trl.jsonl").pairs[0]
    assert (pair.question, pair.images) == (expected, ("a.png",))
    if earlier:
        assert pair.source["messages"][-1] == user(expected)
        assert len(conversation_of(pair, "pair").messages) == len(earlier) + 1


def test_parts_of_responses_are_converted_to_text() -> None:
    pair = Pair("q", "c", "r", extra={"$source": {"chosen_messages": [assistant([text("c")])]}})
    for has_images in (True, False):
        row = to_trl(pair, has_images=has_images)
        assert row["chosen"] == [assistant("c")]
        assert from_trl(row) == Pair("q", "c", "r")


def test_stored_turns_of_a_table_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    rows = [line({"messages": EARLIER}), {**line({}), "extra": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    pairs = [pair for _, pair in open_pairs(tmp_path / "rows.parquet").scan()]
    assert pairs == [Pair("q", "c", "r", extra={"$source": {"messages": EARLIER}}), Pair("q", "c", "r")]
