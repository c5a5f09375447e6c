"""Tests questions with several turns: sampling, evaluation and training give the ids of the chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zoo_processors as processors
import zoo_templates as templates
import zoo_tokenizers as tokenizers
from PIL import Image
from scripted_model import FakeVLLM, ScriptedModel
from test_engines import engines, pair_of
from test_families import ENCODED, clock, load, responses_of  # noqa: F401 - clock is a fixture
from zoo_families import IMAGE_FAMILIES, LLAMA3_TOKENS, Family, with_template
from zoo_oracle import messages_of, template_ids

from mpo_ext.chat import ChatEncoder, ChatError, Conversation
from mpo_ext.data.messages import read_turns
from mpo_ext.data.records import Pair
from mpo_ext.evaluate.scoring import Evaluation, EvaluationConfig
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.items import Item
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.proof import prove

SAMPLING = SamplingConfig(max_new_tokens=60)
TURNS = [
    {"role": "user", "content": "What is shown?"},
    {"role": "assistant", "content": "A red square."},
    {"role": "user", "content": "How many?"},
]


def prompts_of_item(item: Item, engine: TransformersEngine, answers: Sequence[list[int]]) -> tuple[list[Any], Pair]:
    """Runs the evaluation and the correctness pipeline on a question. Returns all prompts, and the pipeline's pair."""
    model: Any = engine.model
    evaluation = Evaluation(EvaluationConfig(prompts=("none",), max_new_tokens=60), "none")
    pipeline = Correctness(CorrectnessConfig(samples=2, sampling=SAMPLING))
    model.prompts, model.scripts = [], [list(answers[0]), *map(list, answers)]
    evaluation.questions.sample([item], engine)
    (records,) = pipeline.sample([item], engine)
    pairs = [pair_of(line) for output, line in pipeline.make_pairs(item, records, "model").lines if output == "pairs"]
    assert len(pairs) == 1, json.dumps(records)
    return model.prompts, pairs[0]


def answers_of(family: Family, chat: ChatEncoder, item: Item) -> list[list[int]]:
    thought = "<think>\nCount.\n</think>\n\n" if family.needs_thoughts else ""
    request = Request(question=item.question, messages=item.messages, tools=item.tools, images=item.images)
    return [chat.response_ids(request, f"{thought}I see.\n\nFinal answer: {answer}") for answer in (7, 8)]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ENCODED)
def test_sampling_evaluation_and_training_have_the_prompt_of_the_template(
    name: str, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, engine, _, _ = engines(name, monkeypatch)
    if system is not None and (not family.system or "system" in family.refused):
        pytest.skip("the family refuses a system's turn")
    item = Item.from_dict({"messages": TURNS, "answer_gt": "7"}, system=system)
    assert item.problem is None
    prompts, pair = prompts_of_item(item, engine, answers_of(family, engine.chat, item))
    sample = Encoder(engine.processor, **family.options).encode(pair, "pairs.jsonl:1")
    assert isinstance(sample, Sample)
    assert prompts == [sample.prompt_ids.tolist()] * 3
    turns = [("system", system)] if system else []
    messages = messages_of(engine.processor, [*turns, *((turn["role"], turn["content"]) for turn in TURNS)])
    expected = template_ids(engine.processor, messages, generation_prompt=True, **family.template_kwargs)
    if not engine.chat.form.ignores_generation_prompt:
        assert prompts[0] == expected
    assert pair.question == "How many?"
    assert pair.source["messages"] == [*([{"role": "system", "content": system}] if system else []), *TURNS]


@pytest.mark.parametrize("name", [name for name in ENCODED if name in IMAGE_FAMILIES])
def test_images_stand_in_any_turn_of_the_user(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family, engine, _, _ = engines(name, monkeypatch)
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    parts = [{"type": "image_url", "image_url": {"url": paths[1]}}, {"type": "text", "text": "And how many here?"}]
    turns = [
        {"role": "user", "content": f"<image>\n{TURNS[0]['content']}"},
        TURNS[1],
        {"role": "user", "content": parts},
    ]
    item = Item.from_dict({"messages": turns, "images": paths[:1], "answer_gt": "7"})
    assert (item.problem, item.images) == (None, tuple(paths))
    prompts, pair = prompts_of_item(item, engine, answers_of(family, engine.chat, item))
    sample = Encoder(engine.processor, **family.options).encode(pair, "pairs.jsonl:1")
    assert isinstance(sample, Sample)
    assert prompts == [sample.prompt_ids.tolist()] * 3
    shown = [("user", [pictures[0], TURNS[0]["content"]]), ("assistant", "A red square."),
             ("user", [pictures[1], "And how many here?"])]  # fmt: skip
    messages = messages_of(engine.processor, shown)
    expected = template_ids(engine.processor, messages, generation_prompt=True, **family.template_kwargs)
    assert prompts[0] == expected


@pytest.mark.parametrize("name", ["Qwen2.5", "Llama 2", "Qwen2.5-VL", "SmolVLM"])
def test_dropout_ntp_continues_a_conversation_without_its_images(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    family, engine, other, fake = engines(name, monkeypatch)
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    first = {"role": "user", "content": f"<image>\n{TURNS[0]['content']}"}
    item = Item.from_dict({"messages": [first, *TURNS[1:]], "image": str(path), "chosen": "It is seven of them."})
    pipeline = DropoutNTP(DropoutNTPConfig(sampling=SAMPLING, matcher=None))
    script = engine.chat.response_ids(Conversation(messages=tuple(TURNS)), "Nine.")
    engine.model.prompts, engine.model.script, fake.script = [], list(script), list(script)
    ((record,),) = pipeline.sample([item], engine)
    pipeline.sample([item], other)
    messages = messages_of(engine.processor, [(turn["role"], turn["content"]) for turn in TURNS])
    prompt = template_ids(engine.processor, messages, generation_prompt=True, **family.template_kwargs)
    begun = engine.chat.response_ids(Conversation(messages=tuple(TURNS)), "It is seven of them.")
    expected = [*prompt, *begun[: record["cut"]["tokens"]]]
    assert engine.model.prompts == [expected]
    assert fake.prompts[-1]["prompt_token_ids"] == expected
    line = pipeline.make_pairs(item, [record], "model").lines[0][1]
    assert line["extra"]["$source"]["messages"][0] == first


# ---- Tools

TOOL = {
    "type": "function",
    "function": {
        "name": "find_city",
        "description": "Finds a city.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "find_city", "arguments": {"name": 'Köln "am Rhein"', "n": 3}}}
CALLED = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "find_city", "content": '{"lat": 50.9}'},
]
TOOL_TEMPLATES = {
    "Qwen2.5": lambda: with_template(tokenizers.qwen, templates.QWEN25_TOOLS),
    "Llama 3.1": lambda: with_template(lambda: tokenizers.llama3(*LLAMA3_TOKENS), templates.LLAMA31_TOOLS),
    "Qwen3-VL": lambda: _with_tools(processors.qwen3_vl()),
}


def _with_tools(processor: Any) -> Any:
    processor.chat_template = templates.QWEN3_VL_TOOLS
    return processor


def own_messages(processor: Any, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    bare = messages_of(processor, [(turn["role"], turn["content"]) for turn in turns])
    whole = [{**turn, **message} for turn, message in zip(turns, bare, strict=True)]
    return [{**turn, "content": []} if turn["content"] == [{"type": "text", "text": ""}] else turn for turn in whole]


def engine_of(processor: Any) -> TransformersEngine:
    model = ScriptedModel(len(getattr(processor, "tokenizer", processor)))
    model.generation_config.eos_token_id = None
    return TransformersEngine(model, processor, batch_size=1)


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("ending", ["result", "question", "tools only"])
def test_calls_and_results_of_tools_are_those_of_the_template(name: str, ending: str) -> None:
    processor = TOOL_TEMPLATES[name]()
    turns: list[dict[str, Any]] = {
        "result": CALLED,
        "question": [*CALLED, {"role": "assistant", "content": "In the west."}, {"role": "user", "content": "Sure?"}],
        "tools only": CALLED[:1],
    }[ending]
    engine = engine_of(processor)
    raw = [dict(turn) for turn in turns]
    if len(raw) > 1:  # the form of OpenAI's interface, in which arguments are JSON in a text
        function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
        raw[1] = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    item = Item.from_dict({"messages": raw, "tools": json.dumps([TOOL]), "answer_gt": "7"})
    assert item.problem is None
    request = Request(question=item.question, messages=item.messages, tools=item.tools)
    answers = [engine.chat.response_ids(request, f"Final answer: {answer}") for answer in (7, 8)]
    prompts, pair = prompts_of_item(item, engine, answers)
    messages = own_messages(processor, turns)
    assert prompts == [template_ids(processor, messages, generation_prompt=True, tools=[TOOL])] * 3
    encoder = Encoder(processor)
    proof = prove(encoder, [(pair, "pairs.jsonl:1")])
    assert (proof.skipped, proof.problems, len(proof.pairs)) == ((), (), 1)
    sample = encoder.encode(pair, "pairs.jsonl:1")
    assert isinstance(sample, Sample)
    assert sample.prompt_ids.tolist() == prompts[0]
    assert Item.from_dict(json.loads(json.dumps(item.to_dict()))).digest == item.digest


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_response_may_call_a_tool(name: str) -> None:
    processor = TOOL_TEMPLATES[name]()
    encoder = ChatEncoder(processor)
    conversation = Conversation(messages=tuple(CALLED[:1]), tools=(TOOL,))
    last = {"role": "assistant", "content": "In the west."}
    for response in ([CALLED[1]], [*CALLED[1:], last]):
        encoded = encoder.response(conversation, response)
        messages = own_messages(processor, [*CALLED[:1], *response])
        whole = template_ids(processor, messages, tools=[TOOL])
        prompt = template_ids(processor, messages[:1], generation_prompt=True, tools=[TOOL])
        assert encoder.prompt_ids(conversation) == prompt
        end = len(prompt) + len(encoded.ids)
        assert [*prompt, *encoded.ids] == whole[:end]
        assert encoded.ids[-1] == encoder.end_id
        first = encoded.ids.index(encoder.end_id) + 1
        text = processor.decode(encoded.ids[:first])
        assert "find_city" in text
        assert encoded.is_target[:first] == [True] * first
        if len(response) > 1:
            start = len(template_ids(processor, messages[:-1], generation_prompt=True, tools=[TOOL])) - len(prompt)
            assert encoded.is_target == [
                *[True] * first,
                *[False] * (start - first),
                *[True] * (len(encoded.ids) - start),
            ]


@pytest.mark.parametrize(
    ("turns", "tools", "message"),
    [
        (CALLED[:1], (TOOL,), "must write the tools"),
        (CALLED, (), "must write the tool calls"),
    ],
)
def test_what_a_template_leaves_out_is_refused(turns: list[Any], tools: tuple[Any, ...], message: str) -> None:
    _, _, encoder = load("Qwen2.5")
    with pytest.raises(ChatError, match=message):
        encoder.prompt(Conversation(messages=tuple(turns), tools=tools))


def test_content_beside_a_call_that_the_template_leaves_out_is_refused() -> None:
    encoder = ChatEncoder(TOOL_TEMPLATES["Llama 3.1"]())
    turns = [CALLED[0], {**CALLED[1], "content": "Let me look."}, CALLED[2]]
    with pytest.raises(ChatError, match=r"got no 'Let me look\.' of the assistant"):
        encoder.prompt(Conversation(messages=tuple(turns), tools=(TOOL,)))
    with pytest.raises(ChatError, match="single tool-calls only"):
        encoder.prompt(Conversation(messages=(CALLED[0], {**CALLED[1], "tool_calls": [CALL, CALL]}, *CALLED[2:])))


def test_vllm_gets_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mpo_ext.generate.vllm_engine import VLLMEngine

    processor = TOOL_TEMPLATES["Qwen2.5"]()
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = VLLMEngine("some/model", processor=processor)
    fake.script = [engine.chat.end_id]
    turns = read_turns("messages", CALLED, None)
    engine.generate([Request(messages=tuple(turns), tools=(TOOL,), sampling=SAMPLING)])
    expected = template_ids(processor, own_messages(processor, CALLED), generation_prompt=True, tools=[TOOL])
    assert fake.prompts[-1]["prompt_token_ids"] == expected


# ---- The exported model


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-VL"])
def test_an_exported_processor_makes_the_prompts_of_training(name: str, tmp_path: Path) -> None:
    import transformers

    from mpo_ext.train.export import with_chat_settings
    from mpo_ext.train.recipe import ModelRecipe

    _, processor, _ = load(name)
    template = f"{{{{ note }}}}{{% for e in extra %}}{{{{ e.x }}}}{{% endfor %}}{processor.chat_template}"
    variables = {"enable_thinking": False, "note": 'a"b\n', "extra": [{"x": None}, {"x": 2.5}]}
    settings = ModelRecipe(path="m", chat_template=template, chat_template_kwargs=variables)
    load_class = transformers.AutoTokenizer if name == "Qwen3" else type(processor)
    question = Conversation(question="Q")
    for start in ("\n", "  ", "\n  {% if true %}\n{% endif %}", "\r\n", "{{ eos_token }}\n"):
        given = {"enable_thinking": False, "eos_token": ""}
        other = ModelRecipe(path="m", chat_template=start + processor.chat_template, chat_template_kwargs=given)
        with_chat_settings(processor, other).save_pretrained(tmp_path / "start")
        chat = ChatEncoder(processor, chat_template=other.chat_template, chat_template_kwargs=given)
        loaded = ChatEncoder(load_class.from_pretrained(tmp_path / "start"))
        assert loaded.prompt_text(question) == chat.prompt_text(question)
    original = processor.chat_template
    with_chat_settings(processor, settings).save_pretrained(tmp_path)
    assert processor.chat_template == original
    assert with_chat_settings(processor, ModelRecipe(path="m")) is processor
    exported = load_class.from_pretrained(tmp_path)
    trained = ChatEncoder(processor, chat_template=template, chat_template_kwargs=variables)
    conversation = Conversation(messages=tuple(TURNS))
    assert ChatEncoder(exported).prompt_ids(conversation) == trained.prompt_ids(conversation)
    assert trained.prompt_text(conversation).startswith('a"b\nNone2.5')
    other = ChatEncoder(exported, chat_template_kwargs={"note": "c"})
    assert other.prompt_text(conversation).startswith("cNone2.5")
