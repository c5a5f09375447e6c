"""Tests questions with several turns, a system prompt, a history or tools.

The tests cover reading, refusals, sampling and output files.
"""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stub_engine import StubEngine
from test_judged_pipelines import ScriptedEngine

from mpo_ext.chat import Conversation
from mpo_ext.data.records import Pair
from mpo_ext.evaluate.exports import lmms_eval, vlmevalkit_columns
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.generate.items import Item, open_items
from mpo_ext.generate.judge import Judge, JudgeConfig
from mpo_ext.generate.questions import QuestionSampler
from mpo_ext.generate.rlaif_v import RlaifV, RlaifVConfig
from mpo_ext.generate.runner import run
from mpo_ext.train.encode import conversation_of


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [user("What is it?"), assistant("A cat."), user("How old?")]
TOOLS = [{"type": "function", "function": {"name": "age", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "age", "arguments": {"of": "cat"}}}
CALLED = [user("How old?"), {**assistant(""), "tool_calls": [CALL]}, {"role": "tool", "content": "7"}]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": TURNS}, TURNS),
        ({"messages": TURNS, "question": "How old?"}, TURNS),
        ({"messages": [SYSTEM, *TURNS]}, [SYSTEM, *TURNS]),
        ({"messages": TURNS, "system": "Be brief."}, [SYSTEM, *TURNS]),
        ({"question": "How old?", "system": "Be brief."}, [SYSTEM, TURNS[2]]),
        ({"question": "How old?", "history": [["What is it?", "A cat."]]}, TURNS),
        ({"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."},
                            {"from": "human", "value": "How old?"}]}, TURNS),
        ({"messages": [user("How old?")]}, []),
        ({"messages": CALLED, "tools": TOOLS}, CALLED),
        ({"conversations": [{"from": "human", "value": "How old?"},
                            {"from": "function_call", "value": json.dumps(CALL["function"])},
                            {"from": "observation", "value": "7"}], "tools": json.dumps(TOOLS)}, CALLED),
        ({"question": "How old?", "extra": {"$source": {"messages": TURNS}, "id": 3}}, TURNS),
    ],
)  # fmt: skip
def test_the_turns_of_an_item(row: dict[str, Any], turns: list[Any]) -> None:
    item = Item.from_dict({**row, "answer_gt": "7"})
    assert (item.problem, list(item.messages), item.question) == (None, turns, "How old?")
    assert list(item.tools) == (TOOLS if "tools" in row else [])
    assert not {"messages", "system", "history", "tools", "conversations"} & item.extra.keys()
    again = Item.from_dict(json.loads(json.dumps(item.to_dict())))
    assert (again.messages, again.tools, again.digest) == (item.messages, item.tools, item.digest)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": TURNS[:2]}, "messages must end with the user's turn: put the last turn into chosen"),
        ({"messages": [TURNS[0], TURNS[2]]}, "prompt must be turns of user and assistant that alternate"),
        ({"messages": TURNS, "question": "Other?"}, "question must be left out beside messages"),
        ({"messages": TURNS, "conversations": TURNS}, "messages must be given once"),
        ({"messages": "How old?"}, "messages must be text or a list of messages"),
        ({"messages": [user([{"type": "video", "video": "a.mp4"}])]}, "number of <video> is not that of the videos"),
        ({"messages": [user([{"type": "image"}])]}, "messages must have an image for each image part"),
        ({"messages": [user("<image> q")]}, "messages must have an image for each image part"),
        ({"messages": [{**user("q"), "weight": 0}]}, "messages must have content and role"),
        ({"messages": [user("q"), {"role": "tool", "content": "7"}]}, "prompt must be turns"),
        ({"messages": [SYSTEM, user("q")], "system": "Other."}, "system must agree with the first turn"),
        ({"question": "q", "system": 3}, "system must be text"),
        ({"question": "q", "tools": [{"type": "function"}]}, "tools must be functions with a name"),
        ({"question": "q", "functions": [{"name": "age"}]}, "an item must be without tools"),
        ({"question": "q", "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs must be given"),
        ({"question": "q", "chosen": [assistant("a"), user("b"), assistant("c")]}, "chosen must be a response of one"),
        ({"question": "q", "extra": {"$source": {"chosen_messages": TURNS}}}, "chosen must be a response of one turn"),
    ],
)
def test_what_is_no_prompt_is_refused(row: dict[str, Any], problem: str) -> None:
    found = Item.from_dict({"answer_gt": "7", **row}).problem
    assert found is not None
    assert found.startswith(problem)


def test_a_chosen_message_is_a_response() -> None:
    assert Item.from_dict({"question": "q", "chosen": [assistant("a")]}).chosen == "a"


def test_images_of_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "b.png"
    Image.new("RGB", (4, 4)).save(path)
    content = path.read_bytes()
    row = {"messages": [user("<image>\nOne?"), assistant("Yes."), user([{"type": "image", "image": content}])],
           "image": "a.png", "answer_gt": "1"}  # fmt: skip
    item = Item.from_dict(row)
    assert (item.problem, item.question) == (None, "<image>\n")
    assert item.images == ("a.png", f"data:image/png;base64,{base64.b64encode(content).decode()}")
    early = [{"role": "system", "content": "Look at <image 1>."}, user("What?")]
    item = Item.from_dict({"messages": early, "image_1": "a.png", "image_2": "b.png"})
    assert [turn["content"] for turn in item.messages] == ["Look at <image>.", "<image>\nWhat?"]
    assert item.images == ("a.png", "b.png")
    numbered = [user("<image 2> or <image 1>?"), assistant("Yes."), user("Why?")]
    item = Item.from_dict({"messages": numbered, "image_1": "a.png", "image_2": "b.png"})
    assert item.problem is None
    assert item.images == ("b.png", "a.png")
    assert item.messages[0]["content"] == "<image> or <image>?"


def test_options_and_templates_belong_to_the_last_user_turn() -> None:
    item = Item.from_dict({"messages": TURNS, "options": ["1", "2"], "answer": "A", "hint": "Look."})
    turns = Correctness(CorrectnessConfig(samples=2)).questions
    assert turns.prompt(item) == "Look.\nHow old?\nA. 1\nB. 2"
    direct = Correctness(CorrectnessConfig(samples=2, template="direct_letter")).questions
    engine = StubEngine()
    direct.sample([item], engine)
    messages = engine.requests[0].messages
    assert messages[:2] == tuple(TURNS[:2])
    assert messages[2]["content"] == direct.prompt(item) == engine.requests[0].question
    assert "Reply with the letter" in messages[2]["content"]


def test_a_system_prompt_of_the_run_is_that_of_items_without_one() -> None:
    other = {"role": "system", "content": "Be long."}
    assert Item.from_dict({"question": "q"}, system="Be brief.").messages == (SYSTEM, user("q"))
    assert Item.from_dict({"messages": [other, user("q")]}, system="Be brief.").messages == (other, user("q"))
    plain, named = Item.from_dict({"question": "q"}), Item.from_dict({"question": "q"}, system="Be brief.")
    assert plain.digest != named.digest


def test_the_settings_of_a_run_name_the_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "q", "answer_gt": "7"}\n')
    plain, named = open_items(path).settings(), open_items(path, system="Be brief.").settings()
    assert named == {**plain, "system": "Be brief."}
    assert next(open_items(path, system="Be brief.").items()).messages == (SYSTEM, user("q"))


PIPELINES = {
    "correctness": lambda: Correctness(CorrectnessConfig(samples=4)),
    "dropout_ntp": lambda: DropoutNTP(DropoutNTPConfig(allow_truncated=True)),
    "rlaif_v": lambda: RlaifV(RlaifVConfig(samples=6)),
    "judge": lambda: Judge(JudgeConfig(samples=4)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pairs_have_the_whole_prompt(name: str, tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, *CALLED, assistant("It is 7."), user(f"Sure? {n}")], "tools": TOOLS,
             "answer_gt": "7", "chosen": "Yes, I am sure. It says 7."} for n in range(8)]  # fmt: skip
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = StubEngine()
    run(PIPELINES[name](), engine, path, tmp_path / "out")
    pairs = [Pair.from_dict(json.loads(line)) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    asked = [request for request in engine.requests if request.role == "answer"]
    for pair in pairs:
        conversation = conversation_of(pair, "pair")
        assert list(conversation.tools) == TOOLS
        assert pair.question == conversation.messages[-1]["content"]
        assert any(
            (conversation.messages, conversation.tools) == (request.messages, request.tools) for request in asked
        )
    for request in engine.requests:
        if request.role == "judge" and "Be brief." not in request.question:
            assert "Statements:" in request.question or request.choices or name == "rlaif_v"


def test_a_judge_reads_the_whole_conversation() -> None:
    seen: list[Request] = []

    def judge(request: Request) -> str:
        seen.append(request)
        return "A"

    item = Item.from_dict({"messages": [SYSTEM, *TURNS], "answer_gt": "7"})
    pipeline = Judge(JudgeConfig(samples=2))
    pipeline.sample([item], ScriptedEngine(["Seven.", "Eight."], judge))
    assert "system: Be brief.\n\nuser: What is it?\n\nassistant: A cat.\n\nuser: How old?" in seen[0].question
    assert seen[0].messages == ()


def test_an_unsolved_conversation_is_an_item_again() -> None:
    item = Item.from_dict({"messages": [SYSTEM, *TURNS], "answer_gt": "7", "options": None})
    wrong = Generation((1,), "Final answer: 8", "stop")
    pipeline = Correctness(CorrectnessConfig(samples=2, template="cot"))
    keys = pipeline.keys(item)
    (records,) = pipeline.sample([item], StubEngine(script=dict.fromkeys(keys, wrong)))
    ((output, line),) = pipeline.make_pairs(item, records, "model").lines
    again = Item.from_dict(json.loads(json.dumps(line)))
    assert (output, again.problem) == ("unsolved", None)
    assert again.messages == item.turns(pipeline.questions.prompt(item))
    assert "Reason step by step" in again.messages[-1]["content"]


def test_a_conversation_without_its_images() -> None:
    turns = [user("<image>\nWhat is it?"), assistant("A cat."), user("How old?")]
    item = Item.from_dict({"messages": turns, "image": "a.png", "answer_gt": "7"})
    sampler = QuestionSampler("name", 1, DropoutNTPConfig().sampling, 0, with_image=False)
    engine = StubEngine()
    sampler.sample([item], engine)
    assert engine.requests[0].messages == tuple(TURNS)
    assert engine.requests[0].images == ()
    conversations: list[Conversation] = []

    class Engine(StubEngine):
        def encode_response(self, conversation: Conversation, response: str) -> list[int]:
            conversations.append(conversation)
            return super().encode_response(conversation, response)

    pipeline = DropoutNTP(DropoutNTPConfig())
    pipeline.sample([dataclasses.replace(item, chosen="Yes, it is a cat.")], Engine())
    assert {conversation.messages == tuple(TURNS) for conversation in conversations} == {True}


def test_exports_of_an_evaluation_show_all_turns(tmp_path: Path) -> None:
    item = Item.from_dict({"messages": [SYSTEM, *TURNS], "answer_gt": "7"})
    assert "question" in vlmevalkit_columns(iter([item]))
    with lmms_eval(tmp_path, "m", "t", 1, []) as add:
        add(0, item, "How old, please?", [])
    (path,) = tmp_path.rglob("*.jsonl")
    expected = "system: Be brief.\n\nuser: What is it?\n\nassistant: A cat.\n\nuser: How old, please?"
    assert json.loads(path.read_text())["input"] == expected
