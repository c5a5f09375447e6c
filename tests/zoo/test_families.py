"""Tests the encoder on each model family. It must return the ids of the chat template, or raise an error."""

import datetime
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from zoo_families import DATE, FAMILIES, IMAGE_FAMILIES, THOUGHT, Family, meta_model, table
from zoo_oracle import Turn, compare, conversation_of, messages_of, template_ids

from mpo_ext.chat import ChatEncoder, ChatError, Conversation
from mpo_ext.data.records import Pair
from mpo_ext.processors import check_supported
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.masks import use_split_attention
from mpo_ext.train.proof import prove
from mpo_ext.train.shared_prefix import supports_shared_prefix

RESPONSES = (
    "The answer is 12.",
    "The cat sat on the mat.\n\nIt is red.",
    " red ",
    "12\n",
    "红色 🙂",
    "a  b\tc",
)
ONE_TURN: tuple[Turn, ...] = (("user", "What is shown here?"),)
PROMPTS: dict[str, tuple[Turn, ...]] = {
    "one turn": ONE_TURN,
    "spaces": (("user", "  Which colour?\n\n"),),
    "several turns": (*ONE_TURN, ("assistant", "A red square."), ("user", "Is it red?\nAnswer with one word.")),
    "system": (("system", "Be brief."), *ONE_TURN),
    "system and several turns": (("system", "Be brief."), *ONE_TURN, ("assistant", "A cat."), ("user", "And here?")),
}
ENCODED = [name for name, family in FAMILIES.items() if "family" not in family.refused]
LOADED: dict[str, tuple[Any, ChatEncoder]] = {}

transformers.logging.set_verbosity_error()


class _Clock(datetime.datetime):
    """A clock that always shows the date used in the families' prompts."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Clock":
        return cls(DATE.year, DATE.month, DATE.day, 12, tzinfo=tz)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _Clock)


def load(name: str) -> tuple[Family, Any, ChatEncoder]:
    """Returns a family, its processor and an encoder; the last two are cached."""
    family = FAMILIES[name]
    if name not in LOADED:
        processor = family.build()
        LOADED[name] = processor, ChatEncoder(processor, **family.options)
    return family, *LOADED[name]


def is_header_added(encoder: ChatEncoder) -> bool:
    return any("ignores add_generation_prompt" in notice for notice in encoder.notices)


def responses_of(family: Family) -> tuple[str, ...]:
    return family.responses if family.needs_thoughts else (*RESPONSES, *family.responses)


def written(family: Family, response: str) -> str:
    """Returns the response. Adds ``<think>`` before it if the family needs thoughts and the tag is missing."""
    return f"<think>{response}" if family.needs_thoughts and not response.startswith("<think>") else response


def squash(text: str) -> str:
    return "".join(text.split())


def prompts_of(family: Family) -> Iterator[tuple[Turn, ...]]:
    for name, turns in PROMPTS.items():
        if "system" not in name or (family.system and "system" not in family.refused):
            yield turns


@pytest.mark.parametrize("name", ENCODED)
def test_the_ids_are_those_of_the_chat_template(name: str) -> None:
    family, processor, encoder = load(name)
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_id) == family.end
    for turns in prompts_of(family):
        messages = messages_of(processor, turns)
        conversation = conversation_of(messages)
        for text in responses_of(family):
            (response,) = messages_of(processor, [("assistant", written(family, text))])
            encoded = encoder.response(conversation, text)
            compare(
                encoder,
                messages,
                response,
                encoder.prompt_ids(conversation),
                encoded.ids,
                is_split=encoded.is_split,
                adds_header=is_header_added(encoder),
                **family.template_kwargs,
            )


@pytest.mark.parametrize("name", ENCODED)
def test_the_text_of_sampled_ids_encodes_as_the_same_ids(name: str) -> None:
    family, processor, encoder = load(name)
    for turns in prompts_of(family):
        conversation = conversation_of(messages_of(processor, turns))
        for response in responses_of(family):
            ids = encoder.response_ids(conversation, response)
            text = encoder.response_text(conversation, ids[:-1])
            assert encoder.response_ids(conversation, text) == ids
            assert squash(response).removeprefix("<think>") in squash(text)


@pytest.mark.parametrize("name", ENCODED)
def test_a_response_keeps_its_text(name: str) -> None:
    """Encoding and decoding a response gives the same text, if it has no white space at its ends."""
    family, processor, encoder = load(name)
    conversation = conversation_of(messages_of(processor, ONE_TURN))
    for response in responses_of(family):
        if response == response.strip() and response not in family.responses:
            text = encoder.response_text(conversation, encoder.response_ids(conversation, response)[:-1])
            assert text.removeprefix("<think>\n\n</think>\n\n").removeprefix("\n</think>\n\n") == response


SEVERAL: tuple[Turn, ...] = (
    ("assistant", "A red square."),
    ("user", "Is it red?"),
    ("assistant", "The answer is 12.\n\nYes."),
)
NO_SEVERAL = {  # families that refuse a response of several turns
    "Qwen3 without thinking": "keep earlier turns",
    "Qwen3 2507 thinking": "keep earlier turns",
    "GLM-4": "template that ends turns",
    "LLaVA 1.5": "template that ends turns",
    "GLM-4V": "template that ends turns",
}


@pytest.mark.parametrize("name", ENCODED)
def test_a_response_of_several_turns_has_the_ids_of_the_template(name: str) -> None:
    family, processor, encoder = load(name)
    messages, response = messages_of(processor, ONE_TURN), messages_of(processor, SEVERAL)
    conversation = conversation_of(messages)
    if name in NO_SEVERAL:
        with pytest.raises(ChatError, match=NO_SEVERAL[name]):
            encoder.response(conversation, response)
        return
    encoded = encoder.response(conversation, response)
    whole = template_ids(processor, [*messages, *response], **family.template_kwargs)
    is_target = [False] * len(whole)
    end = 0
    for number in (0, 2):
        before = [*messages, *response[:number]]
        if is_header_added(encoder):
            start = len(encoder.prompt_ids(conversation_of(before)))
        else:
            start = len(template_ids(processor, before, generation_prompt=True, **family.template_kwargs))
        end = whole.index(encoder.end_id, start) + 1
        is_target[start:end] = [True] * (end - start)
    size = len(encoder.prompt_ids(conversation))
    assert encoded.ids == whole[size:end]
    assert encoded.is_target == is_target[size:end]


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("Qwen3", [("assistant", THOUGHT), *SEVERAL[1:]]),  # drops the thoughts of earlier turns
        ("DeepSeek R1 first", [*SEVERAL[:2], ("assistant", THOUGHT)]),  # drops all thoughts
        ("Phi-3 first", [SEVERAL[0], ("system", "Be brief."), *SEVERAL[1:]]),  # drops the system's turns
    ],
)
def test_a_response_of_several_turns_is_written_as_a_whole(name: str, turns: list[Turn]) -> None:
    _, processor, encoder = load(name)
    conversation = conversation_of(messages_of(processor, ONE_TURN))
    with pytest.raises(ChatError, match="write the response unchanged"):
        encoder.response(conversation, messages_of(processor, turns))


@pytest.mark.parametrize("name", ENCODED)
def test_the_notices_are_those_of_the_family(name: str) -> None:
    family, _, encoder = load(name)
    assert len(encoder.notices) == len(family.notices), encoder.notices
    for notice, pattern in zip(encoder.notices, family.notices, strict=True):
        assert re.search(pattern, notice)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refused or not family.system])
def test_a_refusal_says_why(name: str) -> None:
    family = FAMILIES[name]
    processor = family.build()
    if pattern := family.refused.get("family"):
        with pytest.raises(ValueError, match=pattern):  # noqa: PT012 - either of them refuses the family
            check_supported(getattr(transformers, f"{family.config}Config")(), processor)
            ChatEncoder(processor, **family.options)
        return
    encoder = ChatEncoder(processor, **family.options)
    system = conversation_of(messages_of(processor, PROMPTS["system"]))
    for response, pattern in family.refused.items():
        case = (system, RESPONSES[0]) if response == "system" else (Conversation(question="What?"), response)
        with pytest.raises(ChatError, match=pattern):
            encoder.response_ids(*case)
    if not family.system:
        with pytest.raises(ChatError, match=r"[Ss]ystem"):
            encoder.response_ids(system, RESPONSES[0])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (size, colour) in enumerate([((64, 48), "red"), ((40, 70), "blue")]):
        paths.append(str(folder / f"{number}.png"))
        Image.new("RGB", size, colour).save(paths[-1])
    return paths


def image_prompts(pictures: list[str]) -> Iterator[tuple[str, list[Any], list[Turn]]]:
    """Yields (question, image paths, turns) for prompts with one or two images.

    ``question`` is a text, or a list of turns as in a file of pairs. ``turns`` is the same conversation with loaded
    images, for the chat template.
    """
    first, second = ([path, Image.open(path).convert("RGB")] for path in pictures)
    yield "<image>\nWhat is shown?", [first[0]], [("user", [first[1], "What is shown?"])]
    yield "What is shown?", [first[0]], [("user", [first[1], "What is shown?"])]
    yield "<image>\n<image>\nWhat differs?", [first[0], second[0]], [("user", [first[1], second[1], "What differs?"])]
    yield (
        [
            {"role": "user", "content": "<image>\nWhat is shown?"},
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here?"}]},
        ],
        [first[0], second[0]],
        [
            ("user", [first[1], "What is shown?"]),
            ("assistant", "A square."),
            ("user", [second[1], "And here?"]),
        ],
    )


@pytest.mark.parametrize("name", [name for name in ENCODED if name in IMAGE_FAMILIES])
def test_the_ids_with_images_are_those_of_the_processor(name: str, pictures: list[str]) -> None:
    family, processor, _ = load(name)
    encoder = Encoder(processor, **family.options)
    for prompt, images, turns in image_prompts(pictures):
        source = {} if isinstance(prompt, str) else {"messages": prompt}
        question = prompt if isinstance(prompt, str) else ""
        text, other = (*responses_of(family), "Something else entirely.")[0:2]
        pair = Pair(question=question, chosen=text, rejected=other, images=tuple(images), extra={"$source": source})
        sample = encoder.encode(pair, "pairs.jsonl:1")
        assert isinstance(sample, Sample)
        assert_proved(encoder, pair)
        messages = messages_of(processor, turns)
        for side, ids in ((text, sample.chosen_ids), (other, sample.rejected_ids)):
            (response,) = messages_of(processor, [("assistant", written(family, side))])
            compare(
                encoder.chat,
                messages,
                response,
                sample.prompt_ids.tolist(),
                ids.tolist(),
                adds_header=is_header_added(encoder.chat),
                **family.template_kwargs,
            )


@pytest.mark.parametrize("name", ENCODED)
def test_the_proof_at_the_start_of_a_run_finds_no_fault(name: str) -> None:
    family, processor, _ = load(name)
    encoder = Encoder(processor, **family.options)
    for turns in prompts_of(family):
        conversation = conversation_of(messages_of(processor, turns))
        for chosen, rejected in itertools.pairwise((*responses_of(family), *responses_of(family)[:1])):
            source = {"messages": list(conversation.messages)}
            assert_proved(encoder, Pair("", chosen, rejected, extra={"$source": source}))


def assert_proved(encoder: Encoder, pair: Pair) -> None:
    proof = prove(encoder, [(pair, "pairs.jsonl:1")])
    assert proof.notices == encoder.chat.notices
    # A template may drop the reasoning in which two responses differ.
    assert set(proof.reasons) <= {"chosen and rejected are equal"}
    assert not proof.problems


def test_the_page_has_the_table_of_the_registry() -> None:
    """Checks the table in docs/families.md.

    ``PYTHONPATH=.:tests/zoo python tests/zoo/zoo_families.py`` prints the table.
    """
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- families -->\n")[2].partition("<!-- /families -->")[0]
    assert shown == table()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_the_table_are_those_of_the_trainer(name: str) -> None:
    model = meta_model(FAMILIES[name])
    use_split_attention(model)
    reason = supports_shared_prefix(model)
    separate = FAMILIES[name].separate_rows
    assert separate in reason if reason else not separate
