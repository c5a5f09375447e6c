"""Tests reading, showing and writing pairs with tool calls and tool results."""

import json
from pathlib import Path
from typing import Any

import pytest
from rows import open_rows

from mpo_ext.data.check import check_pairs
from mpo_ext.data.convert import convert
from mpo_ext.data.messages import prompt_text
from mpo_ext.data.reader import BadLine
from mpo_ext.data.sources import open_pairs
from mpo_ext.data.stats import collect_stats
from mpo_ext.data.view import write_view
from mpo_ext.train.encode import prompt_key

FUNCTION = {"name": "age", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"name": "age", "arguments": {"of": "cat"}}
CALLS = [{"type": "function", "function": CALL}]
TEXT_CALLS = [{"type": "function", "function": {"name": "age", "arguments": '{"of": "cat"}'}}]
USER, ANSWERS = {"role": "user", "content": "How old?"}, {"chosen": "7", "rejected": "8"}
TURNS = [USER, {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "7"}]
WITH_TEXT = [{**TURNS[1], "content": None, "tool_calls": TEXT_CALLS}, TURNS[2]]
ASSISTANT = {side: [{"role": "assistant", "content": text}] for side, text in ANSWERS.items()}
ROWS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": [USER, *WITH_TEXT], **ASSISTANT, "tools": TOOLS},
    "openai": {
        "input": {"messages": [USER, *WITH_TEXT], "tools": TOOLS},
        "preferred_output": ASSISTANT["chosen"],
        "non_preferred_output": ASSISTANT["rejected"],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "How old?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "7"},
        ],
        **{side: {"from": "gpt", "value": text} for side, text in ANSWERS.items()},
        "tools": json.dumps([FUNCTION]),
    },
    "swift": {
        "messages": [
            USER,
            {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": "7"},
            *ASSISTANT["chosen"],
        ],
        "rejected_messages": [
            USER,
            {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": "7"},
            *ASSISTANT["rejected"],
        ],
        "tools": json.dumps(TOOLS),
    },
}


@pytest.mark.parametrize("format", ROWS)
def test_each_format_gives_the_same_pair(format: str, tmp_path: Path) -> None:
    source = open_rows(tmp_path, [ROWS[format]], format=format)
    pair = source.pairs[0]
    assert (pair.question, pair.chosen, pair.rejected) == ("How old?", "7", "8")
    assert pair.source["messages"] == TURNS
    assert pair.source["tools"] == TOOLS


def test_calls_side_by_side_are_calls_of_one_turn(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "Let me look."},
             *[{"role": "tool_call", "content": json.dumps(CALL)}] * 2,
             *[{"role": "tool_response", "content": "7"}] * 2, *ASSISTANT["chosen"]]  # fmt: skip
    source = open_rows(tmp_path, [{"messages": turns, "rejected_response": "8"}], format="swift")
    called = source.pairs[0].source["chosen_messages"]
    assert called[0] == {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS * 2}
    assert [turn["role"] for turn in called] == ["assistant", "tool", "tool", "assistant"]


def test_a_response_that_calls_is_shown_as_json(tmp_path: Path) -> None:
    row = {**ROWS["trl"], "prompt": [USER], "chosen": [{**TURNS[1], "content": "So:"}]}
    pair = open_rows(tmp_path, [row], format="trl").pairs[0]
    assert pair.chosen == 'So:\n{"name": "age", "arguments": {"of": "cat"}}'
    assert pair.source["chosen_messages"] == [{**TURNS[1], "content": "So:"}]


def test_commands_show_and_keep_tools(tmp_path: Path) -> None:
    source = open_rows(tmp_path, [ROWS["trl"]], format="trl")
    pair = source.pairs[0]
    text = prompt_text(pair)
    assert text.startswith("tools: [")
    assert '"arguments": {"of": "cat"}' in text
    assert text.endswith("tool: 7")
    assert check_pairs(source).is_clean
    assert collect_stats(source)["rows"].question.most > 20
    assert write_view(tmp_path / "view.html", source)[0] == 1
    assert "tool: 7" in (tmp_path / "view.html").read_text()
    for format, kind in (("pairs", "standard"), ("trl", "conversational")):
        assert convert(source, tmp_path / f"{format}.jsonl", format, kind=kind)[0] == 1
        again = open_pairs(tmp_path / f"{format}.jsonl").pairs[0]
        assert (again.source["messages"], again.source["tools"]) == (TURNS, TOOLS)
        assert (again.key(), prompt_key(again)) == (pair.key(), prompt_key(pair))
    for format, kind, words in (
        ("mmpr", "standard", "several turns"),
        ("hf", "conversational", "tools: pairs holds them"),
        ("hf", "standard", "tools: pairs holds them"),
    ):
        with pytest.raises(BadLine, match=words):
            convert(source, tmp_path / format, format, kind=kind)


def test_tools_belong_to_the_prompt(tmp_path: Path) -> None:
    row = {"prompt": [USER], **ASSISTANT}
    other = [{"type": "function", "function": {**FUNCTION, "name": "size"}}]
    rows = [row, {**row, "tools": TOOLS}, {**row, "tools": other}, {**row, "tools": []}, {**row, "tools": None}]
    pairs = list(open_rows(tmp_path, rows, format="trl").pairs)
    assert len({pair.key() for pair in pairs}) == len({prompt_key(pair) for pair in pairs}) == 3
    with pytest.raises(BadLine, match="no tools, got several in tools"):
        convert(open_rows(tmp_path, rows[1:2], format="trl"), tmp_path / "out", "mmpr")


@pytest.mark.parametrize("field", [{"tools": TOOLS}, {"messages": TURNS}, {"chat_template_kwargs": {"x": False}}])
def test_a_line_of_mmpr_has_no_conversation(field: dict[str, Any], tmp_path: Path) -> None:
    source = open_rows(tmp_path, [{"question": "q", **ANSWERS, **field}], format="mmpr")
    with pytest.raises(BadLine, match=next(iter(field))):
        source.pairs[0]
