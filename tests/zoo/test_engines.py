"""Tests that sampling uses the same prompts and stop tokens as training, for each model family."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scripted_model import FakeVLLM, ScriptedModel
from test_families import ENCODED, ONE_TURN, clock, load, prompts_of, responses_of  # noqa: F401 - clock is a fixture
from zoo_families import IMAGE_FAMILIES, Family
from zoo_oracle import conversation_of, messages_of, template_ids

from mpo_ext.data.records import Pair
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.items import Item
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.generate.vllm_engine import VLLMEngine
from mpo_ext.train.encode import Encoder, Sample

SAMPLING = SamplingConfig(max_new_tokens=60)


def engines(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Family, TransformersEngine, VLLMEngine, FakeVLLM]:
    family, processor, encoder = load(name)
    model = ScriptedModel(len(encoder.tokenizer))
    model.generation_config.eos_token_id = None
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    ours = TransformersEngine(model, processor, batch_size=1, **family.options)
    return family, ours, VLLMEngine("some/model", processor=processor, chat_options=family.options), fake


def pair_of(line: dict[str, Any]) -> Pair:
    return Pair(**{**line, "images": tuple(line["images"])})


def request_of(processor: Any, turns: Any = ONE_TURN, **options: Any) -> Request:
    conversation = conversation_of(messages_of(processor, turns))
    return Request(messages=conversation.messages, sampling=SAMPLING, **options)


@pytest.mark.parametrize("name", ENCODED)
def test_both_engines_get_the_ids_of_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, ours, theirs, fake = engines(name, monkeypatch)
    processor, encoder = ours.processor, ours.chat
    ours.model.script = fake.script = [encoder.end_id]
    trainer = Encoder(processor, **family.options)
    for number, turns in enumerate(prompts_of(family)):
        request = request_of(processor, turns, prefix_ids=(11, 12, 13)[:number])
        chosen, rejected = (*responses_of(family), "Something else.")[:2]
        pair = Pair("", chosen, rejected, extra={"$source": {"messages": list(request.messages)}})
        sample = trainer.encode(pair, "pairs.jsonl:1")
        assert isinstance(sample, Sample)
        ours.generate([request])
        theirs.generate([request])
        expected = [*sample.prompt_ids.tolist(), *request.prefix_ids]
        assert ours.model.prompts[-1] == expected
        assert fake.prompts[-1]["prompt_token_ids"] == expected


@pytest.mark.parametrize("name", [name for name in ENCODED if name in IMAGE_FAMILIES])
def test_both_engines_get_the_images_of_training(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family, ours, theirs, fake = engines(name, monkeypatch)
    processor, encoder = ours.processor, ours.chat
    image = Image.new("RGB", (64, 48), "red")
    image.save(tmp_path / "red.png")
    ours.model.script = fake.script = [encoder.end_id]
    request = Request(question="<image>\nWhat is shown?", images=(image,), sampling=SAMPLING)
    ours.generate([request])
    theirs.generate([request])
    chosen, rejected = (*responses_of(family), "Something else.")[:2]
    pair = Pair(request.question, chosen, rejected, (str(tmp_path / "red.png"),))
    sample = Encoder(processor, **family.options).encode(pair, "pairs.jsonl:1")
    assert isinstance(sample, Sample)
    assert ours.model.prompts[-1] == sample.prompt_ids.tolist()
    assert fake.prompts[-1]["multi_modal_data"] == {"image": [image]}
    # vLLM expands the one token of each image itself.
    bare = messages_of(processor, [("user", [image, "What is shown?"])])
    text = processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=True, **family.template_kwargs)
    unexpanded = list(encoder.tokenizer.encode(text, add_special_tokens=encoder.adds_special_tokens(text)))
    assert fake.prompts[-1]["prompt_token_ids"] == unexpanded
    assert template_ids(processor, bare, generation_prompt=True, **family.template_kwargs) == ours.model.prompts[-1]


@pytest.mark.parametrize("name", ENCODED)
def test_the_end_of_the_turn_stops_both_engines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that generation ends at the token that ends the turn, although the generation_config has no end token."""
    family, ours, theirs, fake = engines(name, monkeypatch)
    request = request_of(ours.processor)
    for response in responses_of(family):
        ids = ours.chat.response_ids(request, response)
        ours.model.script = fake.script = [*ids, 11, 12, 13]
        for generation in (*ours.generate([request]), *theirs.generate([request])):
            assert generation.token_ids == tuple(ids[:-1])
            assert generation.finish_reason == "stop"
            assert ours.chat.response_ids(request, generation.text) == ids
    ours.model.script = fake.script = [11]
    assert ours.generate([request])[0].finish_reason == "length"
    assert theirs.generate([request])[0].finish_reason == "length"


@pytest.mark.parametrize("name", ENCODED)
def test_sampled_ids_become_the_trained_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the ids with which a rejected response of DropoutNTP is trained: the prefix, then the sampled ids."""
    family, ours, _, _ = engines(name, monkeypatch)
    chosen = (*family.responses, "The cat sat on the mat. It is red.")[0]
    rejected = chosen.replace("red", "blue").replace("7", "8")
    conversation = Request(question="What is shown?")
    whole = {text: ours.chat.response_ids(conversation, text) for text in (chosen, rejected)}
    item = Item(question=conversation.question, chosen=chosen)
    pipeline = DropoutNTP(DropoutNTPConfig(keep=0.3, sampling=SAMPLING, matcher=None))
    count = int((len(whole[chosen]) - 1) * 0.3)
    assert whole[chosen][:count] == whole[rejected][:count], "the texts must differ after the prefix"
    ours.model.script = whole[rejected][count:]
    (records,) = pipeline.sample([item], ours)
    (line,) = pipeline.make_pairs(item, records, "model").lines
    pair = pair_of(line[1])
    assert ours.model.prompts[-1][-count:] == whole[chosen][:count]
    sample = Encoder(ours.processor, **family.options).encode(pair, "pairs.jsonl:1")
    assert isinstance(sample, Sample)
    assert sample.prompt_ids.tolist() == ours.model.prompts[-1][:-count]
    assert sample.chosen_ids.tolist() == whole[chosen]
    assert sample.rejected_ids.tolist() == whole[rejected]


@pytest.mark.parametrize("name", [name for name in ENCODED if not load(name)[0].needs_thoughts])
def test_kept_words_are_the_beginning_of_the_response(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, _, _ = engines(name, monkeypatch)
    chosen = "The answer is 12. It is red."
    ours.model.script = [ours.chat.end_id]
    pipeline = DropoutNTP(DropoutNTPConfig(keep=0.5, unit="words", sampling=SAMPLING, matcher=None))
    ((record,),) = pipeline.sample([Item(question="What is shown?", chosen=chosen)], ours)
    whole = ours.chat.response_ids(Request(question="What is shown?"), chosen)
    kept = ours.model.prompts[-1][-record["cut"]["tokens"] :]
    assert kept == whole[: len(kept)]
    assert ours.chat.response_text(Request(question="What is shown?"), kept).endswith("The answer is")


@pytest.mark.parametrize("name", ENCODED)
def test_samples_of_the_correctness_pipeline_are_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, ours, _, _ = engines(name, monkeypatch)
    thought = "<think>\nCount.\n</think>\n\n" if family.needs_thoughts else ""
    texts = [f"{thought}Count the squares.\n\nFinal answer: {answer}" for answer in (7, 8)]
    item = Item(question="How many squares?", truths=("7",))
    conversation = Request(question=item.question)
    whole = [ours.chat.response_ids(conversation, text) for text in texts]
    ours.model.scripts = [list(ids) for ids in whole]
    pipeline = Correctness(CorrectnessConfig(samples=2, sampling=SAMPLING))
    (records,) = pipeline.sample([item], ours)
    pairs = [pair_of(line) for output, line in pipeline.make_pairs(item, records, "model").lines if output == "pairs"]
    assert len(pairs) == 1, json.dumps(records)
    sample = Encoder(ours.processor, **family.options).encode(pairs[0], "pairs.jsonl:1")
    assert isinstance(sample, Sample)
    assert [sample.chosen_ids.tolist(), sample.rejected_ids.tolist()] == whole
    assert torch.equal(sample.prompt_ids, torch.tensor(ours.model.prompts[0]))
