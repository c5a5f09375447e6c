"""Tests the encoding of pairs with the processors and chat templates of several model families."""

# ruff: noqa: E402 - these packages come with an extra; the Chinese punctuation is meant
import dataclasses
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

for package in ("transformers", "tokenizers", "PIL"):
    pytest.importorskip(package)

import torch
from PIL import Image
from tiny_processors import (
    ENDS,
    GEMMA,
    LLAMA3,
    PADDING,
    QWEN,
    SPECIAL,
    VICUNA,
    ZEPHYR,
    TinyInternVLProcessor,
    build_tokenizer,
    gemma3,
    idefics3,
    internvl,
    llava,
    qwen,
    with_template,
)
from torch.utils.data import DataLoader
from transformers import (
    Idefics3Config,
    LlavaProcessor,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3Model

from mpo_ext.chat import Conversation
from mpo_ext.data.reader import BadLine, Location
from mpo_ext.data.records import Pair
from mpo_ext.generate.engine import Request
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.train.encode import (
    BAD_PAIR,
    EMPTY,
    EQUAL,
    EQUAL_CUT,
    NO_ROOM,
    TOO_LONG,
    BadPairError,
    Encoder,
    Sample,
    SkippedPair,
    prompt_key,
)
from mpo_ext.train.pair_counts import PairCounts


def text_encoder(template: str = QWEN, **options: Any) -> Encoder:
    bos = "<s>" if "bos_token" in template else None
    return Encoder(with_template(build_tokenizer(SPECIAL[template], bos=bos), template), **options)


FAMILIES = [internvl, qwen, llava, idefics3, gemma3]
IMAGE_TOKENS = {
    "internvl": "<IMG_CONTEXT>",
    "qwen": "<|image_pad|>",
    "llava": "<image>",
    "idefics3": "<image>",
    "gemma3": "<image_soft_token>",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Writes images of several sizes and modes, and returns their paths."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(40, 50), (60, 30), (33, 90)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    Image.new("L", (50, 40), 128).save(folder / "grey.png")
    return tuple(str(folder / name) for name in ("0.png", "1.png", "2.png", "grey.png"))


def sample(encoder: Encoder, pair: Pair, name: str = "f.jsonl:1") -> Sample:
    result = encoder.encode(pair, name)
    assert isinstance(result, Sample), result
    return result


def dropped(encoder: Encoder, pair: Pair) -> str:
    result = encoder.encode(pair, "f.jsonl:1")
    assert isinstance(result, SkippedPair)
    assert result.name == "f.jsonl:1"
    return result.reason


def turns(*messages: tuple[str, Any], question: str = "the last", images: tuple[str, ...] = ()) -> Pair:
    """Returns a pair whose prompt consists of the turns ``messages``."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    return Pair(question, "yes", "no", images, extra={"$source": {"messages": conversation}})


def stub_engine(processor: Any) -> TransformersEngine:
    """Returns an engine without a model, which can only render prompts."""
    model: Any = SimpleNamespace(
        config=SimpleNamespace(_name_or_path="stub"),
        generation_config=SimpleNamespace(eos_token_id=1),
        device="cpu",
        dtype=torch.float32,
    )
    model.eval = lambda: model
    return TransformersEngine(model, processor)


# What the templates write before and after a response; Vicuna's writes no end of turn, so "</s>" follows.
LEADS = {VICUNA: " "}
TAILS = {ZEPHYR: " "}


@pytest.mark.parametrize("template", list(SPECIAL), ids=["qwen", "llama3", "gemma", "zephyr", "vicuna"])
@pytest.mark.parametrize("response", ["a plain answer", "答案是“二”。\n因此", "", " led by a space\n"])
def test_a_response_is_what_the_template_writes_and_the_end_of_the_turn(template: str, response: str) -> None:
    encoder = text_encoder(template)
    got = sample(encoder, Pair("为什么?", response + "x", response))
    assert got.chosen_ids.dtype == got.rejected_ids.dtype == got.prompt_ids.dtype == torch.int64
    for ids, text in ((got.chosen_ids, response + "x"), (got.rejected_ids, response)):
        written = LEADS.get(template, "") + text + TAILS.get(template, "")
        assert encoder.tokenizer.decode(ids) == written + ENDS[template]
        assert ids[-1] == encoder.end_id
        assert encoder.chat.response_text(Conversation(question="为什么?"), ids[:-1].tolist()) == text
    assert not got.is_cut
    assert not got.is_split


@pytest.mark.parametrize("template", list(SPECIAL), ids=["qwen", "llama3", "gemma", "zephyr", "vicuna"])
def test_prompt_and_response_are_the_ids_of_the_template(template: str) -> None:
    encoder = text_encoder(template)
    pair = Pair("Why?\n1 < 2!", "because", "dunno")
    got = sample(encoder, pair)
    messages = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": "because"}]
    whole = encoder.tokenizer.apply_chat_template(messages, return_dict=False)
    ours = torch.cat([got.prompt_ids, got.chosen_ids]).tolist()
    if template is VICUNA:
        ours, whole = ours[:-1], whole[:-1]  # the template ends with a space instead of "</s>"
    assert whole[: len(ours)] == ours
    assert encoder.tokenizer.decode(whole[len(ours) :]).strip() == ""
    beginnings = (got.prompt_ids == encoder.tokenizer.convert_tokens_to_ids("<s>")).sum()
    assert beginnings == (template in (LLAMA3, GEMMA))


def test_without_a_template_the_question_is_a_line_and_eos_ends_it() -> None:
    tokenizer = build_tokenizer([], bos="<s>")
    got = sample(Encoder(tokenizer), Pair("Why?", "because", "dunno"))
    assert tokenizer.decode(got.prompt_ids) == "<s>Why?\n"
    assert tokenizer.decode(got.chosen_ids) == "because</s>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end of a turn must be known"):
        Encoder(tokenizer)


def test_a_template_must_write_responses_and_may_be_replaced() -> None:
    tokenizer = with_template(build_tokenizer(SPECIAL[QWEN]), "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="chat_template must write the assistant's response"):
        Encoder(tokenizer)
    assert tokenizer.decode(Encoder(tokenizer, chat_template=QWEN).end_id) == "<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_prompt_is_the_one_that_is_sampled_from(family: Any, count: int, images: tuple[str, ...]) -> None:
    processor = family()
    question = "<image>\nWhat 是 this?!" if count == 1 else "First <image> then <image>\nand <image>!!" * (count > 0)
    pair = Pair(question or "No picture!", "yes", "no", images[:count])
    got = sample(Encoder(processor), pair)
    engine = stub_engine(processor)
    request = Request(question=pair.question, images=pair.images)
    inputs = engine._inputs([request], [engine.chat.prompt(request)])
    assert got.prompt_ids.tolist() == inputs.pop("input_ids")[0].tolist()
    assert (got.prompt_ids == 0).sum() == pair.question.count(PADDING)
    inputs.pop("attention_mask")
    assert set(inputs) == {*got.token_inputs, *got.image_inputs}
    for name, values in got.token_inputs.items():
        assert values.tolist() == inputs[name][0].tolist()
    for name, values in got.image_inputs.items():
        assert values.flatten().tolist() == inputs[name].flatten().tolist()
    assert bool(got.image_inputs) == (count > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_stand_where_the_question_has_them(family: Any, images: tuple[str, ...]) -> None:
    """Checks that image tokens replace each ``<image>`` of a question.

    The image inputs must equal the concatenated inputs of the single images.
    """
    encoder = Encoder(family())
    got = sample(encoder, Pair("<image>\none <image>\ntwo <image>\nthree", "yes", "no", images[1:]))
    token = IMAGE_TOKENS[family.__name__]
    assert encoder.image_token_id == encoder.tokenizer.convert_tokens_to_ids(token)
    text = encoder.tokenizer.decode(got.prompt_ids)
    before, after = re.split("one", text)
    middle, rest = re.split("two", after)
    assert before.count(token)
    assert middle.count(token)
    assert rest.split("three")[0].count(token)
    assert not rest.split("three")[1].count(token)
    for values in got.token_inputs.values():
        assert values.shape == got.prompt_ids.shape
    single = [sample(encoder, Pair("?", "yes", "no", (path,))) for path in images[1:]]
    for name, values in got.image_inputs.items():
        assert torch.equal(torch.cat([one.image_inputs[name] for one in single]), values)
    assert sum(int((one.prompt_ids == encoder.image_token_id).sum()) for one in single) == text.count(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_without_a_place_comes_first(family: Any, images: tuple[str, ...]) -> None:
    encoder = Encoder(family())
    bare = sample(encoder, Pair("What?", "yes", "no", images[:1]))
    placed = sample(encoder, Pair("<image>\nWhat?", "yes", "no", images[:1]))
    assert bare.prompt_ids.tolist() == placed.prompt_ids.tolist()
    assert bare.digest == placed.digest
    assert bare.prompt_key != placed.prompt_key  # equal keys need the same question


def test_nested_images_lie_as_the_model_flattens_them(images: tuple[str, ...]) -> None:
    """Checks that Idefics3 computes the same features for ``[N, 1, ...]`` and ``[1, N, ...]``.

    The encoder makes ``[N, 1, ...]``: N rows with one image each. The processor makes ``[1, N, ...]``: one row.
    """
    processor = idefics3()
    both = sample(Encoder(processor), Pair("?", "yes", "no", images[:2])).image_inputs
    assert both["pixel_values"].shape[1:] == (1, 3, 32, 32)
    assert both["pixel_attention_mask"].shape[1:] == (1, 32, 32)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**small, "num_key_value_heads": 2, "vocab_size": 400, "model_type": "llama", "pad_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = Idefics3Config(vision_config=vision, text_config=text, scale_factor=2, image_token_id=1, pad_token_id=0)
    model = Idefics3Model(config).eval()
    with torch.no_grad():
        nested = {name: values.transpose(0, 1) for name, values in both.items()}
        expected = torch.cat(model.get_image_features(**nested, return_dict=True).pooler_output)
        got = torch.cat(model.get_image_features(**both, return_dict=True).pooler_output)
    assert len(expected) == 4 * len(both["pixel_values"])
    torch.testing.assert_close(got, expected)


def test_cross_attention_and_ragged_images_are_refused(images: tuple[str, ...]) -> None:
    processor = internvl()
    encoder, call = Encoder(processor), TinyInternVLProcessor.__call__
    pair = Pair("?", "yes", "no", images[:1])

    def run(extra: Any) -> None:
        class Faulty(TinyInternVLProcessor):
            def __call__(self, **options: Any) -> Any:
                found = dict(call(self, **options))
                return {**found, "odd": extra(found["input_ids"])}

        encoder.processor.__class__ = Faulty
        encoder.encode(pair, "f:1")

    with pytest.raises(TypeError, match=r"cross-attention to them, got 'odd' of shape \(1, "):
        run(lambda ids: torch.zeros(*ids.shape, 1, 4))
    with pytest.raises(TypeError, match="must return tensors, got list for 'odd'"):
        run(lambda ids: [1])


@pytest.mark.parametrize("family", FAMILIES)
def test_faulty_images_are_named(family: Any, images: tuple[str, ...], tmp_path: Path) -> None:
    encoder = Encoder(family())
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images[0]).read_bytes()[:400])

    def refuse(question: str, paths: tuple[str, ...], match: str, **sides: str) -> None:
        pair = Pair(question, sides.get("chosen", "yes"), sides.get("rejected", "no"), paths)
        with pytest.raises(BadPairError, match=f"^f.jsonl:7: {match}") as caught:
            encoder.encode(pair, "f.jsonl:7")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    token = IMAGE_TOKENS[family.__name__]
    refuse("?", (str(tmp_path / "none.png"),), r"images\[0\] must be an image that can be read, got .*none.png")
    refuse("?", (images[0], str(broken)), r"images\[1\] must be an image that can be read, got .*broken.png")
    refuse("<image> <image>", images[:1], "the prompt must fit the chat template, got question must have one <image>")
    refuse("<image>", images[:2], "the prompt must fit the chat template, got question must have one <image>")
    rule = "fit the chat template, got question must have one <image>" if token == "<image>" else "have 0 image tokens"
    refuse(f"what is {token}?", (), f"the prompt must {rule} .*for .* 0 images, got ")
    refuse("?", images[:1], "chosen must not hold an image, video or audio token", chosen=f"see {token}")
    refuse("?", images[:1], "rejected must not hold an image, video or audio token", rejected=f"{token}")
    if token != "<image>":  # "<image>" is the place of an image
        refuse(f"<image>what is {token}?", images[:1], "the prompt ")


def test_a_processor_that_loses_image_tokens_is_found_out(images: tuple[str, ...]) -> None:
    """Checks that the encoder rejects a truncated output of the processor, because image tokens are missing."""
    for family in (internvl, qwen, llava):
        processor = family()
        encoder, call = Encoder(processor), type(processor).__call__

        class Truncating(type(processor)):  # type: ignore[misc]
            def __call__(self, **options: Any) -> Any:
                found = dict(call(self, **options))  # noqa: B023 - called before the next one is made
                last = int((found["input_ids"] == encoder.image_token_id).nonzero()[-1, 1])  # noqa: B023
                cut = last if not isinstance(self, LlavaProcessor) else 3
                return {n: v[:, :cut] if n in ("input_ids", "attention_mask") else v for n, v in found.items()}

        encoder.processor.__class__ = Truncating
        with pytest.raises(BadPairError, match=r"^f:1: the prompt must have .* image tokens .* for its 1 images, got"):
            encoder.encode(Pair("?", "yes", "no", images[:1]), "f:1")


def test_markup_of_special_tokens_stays_in_responses_but_an_end_of_turn_does_not() -> None:
    encoder = Encoder(internvl())
    text = "the cat <box>[[1, 2, 3, 4]]</box>"
    got = sample(encoder, Pair("Where?", text, "no"))
    assert encoder.tokenizer.convert_tokens_to_ids("<box>") in got.chosen_ids
    assert encoder.tokenizer.decode(got.chosen_ids) == text + "<|im_end|>"
    with pytest.raises(
        BadPairError, match="f:1: rejected must fit the chat template, got a response must not hold an end"
    ):
        encoder.encode(Pair("Where?", "yes", "no<|im_end|>\n"), "f:1")


def test_tokens_that_are_also_padding_are_kept() -> None:
    got = sample(text_encoder(), Pair("!Why!", "!!!", "no!"))
    assert got.chosen_ids.tolist()[:3] == [0, 0, 0]
    assert (got.prompt_ids == 0).sum() == 2
    assert (got.rejected_ids == 0).sum() == 1


@pytest.mark.parametrize("template", [QWEN, LLAMA3, GEMMA], ids=["qwen", "llama3", "gemma"])
def test_a_prompt_of_several_turns_is_rendered_as_it_was(template: str) -> None:
    encoder = text_encoder(template)
    conversation = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?")]
    got = sample(encoder, turns(*conversation))
    expected = encoder.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in conversation],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert encoder.tokenizer.decode(got.prompt_ids) == expected
    in_parts = turns(*((role, [{"type": "text", "text": text}]) for role, text in conversation))
    assert sample(encoder, in_parts).prompt_ids.tolist() == got.prompt_ids.tolist()
    assert sample(encoder, turns(("user", "Two?"))).prompt_key != got.prompt_key
    assert sample(encoder, turns(("user", "Two?"))).prompt_ids.tolist() != got.prompt_ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_several_turns(family: Any, images: tuple[str, ...]) -> None:
    encoder = Encoder(family())
    texts = turns(("user", "<image>\nOne?"), ("assistant", "1"), ("user", "Two <image>?"), images=images[:2])
    block = {"type": "image", "text": None}  # the form in a column of a dataset
    first = [block, {"type": "text", "text": "One?"}]
    second = [{"type": "text", "text": "Two "}, block, {"type": "text", "text": "?"}]
    blocks = turns(("user", first), ("assistant", "1"), ("user", second), images=images[:2])
    got, same = sample(encoder, texts), sample(encoder, blocks)
    assert got.digest == same.digest
    before, after = encoder.tokenizer.decode(got.prompt_ids).split("One?")
    token = IMAGE_TOKENS[family.__name__]
    assert before.count(token)
    assert token not in after.split("Two ")[0]
    assert after.split("Two ")[1].count(token)
    unplaced = turns(("user", "One?"), ("assistant", "1"), ("user", "Two?"), images=images[:2])
    assert token not in encoder.tokenizer.decode(sample(encoder, unplaced).prompt_ids).split("One?")[1]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([("user", "?"), ("assistant", "!")], "must end before the assistant's response"),
        ([("user", 3)], "content must be text or a list of texts, images and videos, got '3'"),
        ([("user", [{"type": "audio"}])], "content must be text or a list"),
        ([("user", "<image><image>")], "one place for each of the 1 images, got 2"),
        ([], "messages must be a list of messages"),
    ],
)
def test_faulty_conversations_are_named(messages: list[Any], match: str, images: tuple[str, ...]) -> None:
    with pytest.raises(BadPairError, match=f"^f:1: the prompt must fit the chat template, got .*{match}"):
        Encoder(internvl()).encode(turns(*messages, images=images[:1]), "f:1")
    with pytest.raises(
        BadPairError,
        match=r"^f:1: the prompt must .* a conversation of 1 messages must have a chat template, got none",
    ):
        Encoder(build_tokenizer([])).encode(turns(("user", "?")), "f:1")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"chosen_messages": None}, "chosen_messages must be a list of messages, got NoneType None"),
        ({"rejected_messages": "no"}, "rejected_messages must be a list of messages, got str 'no'"),
        ({"chosen_messages": {}}, "chosen_messages must be a list of messages, got dict {}"),
        ({"chosen_messages": []}, "chosen must fit the chat template, got messages must be a list of messages"),
        ({"tools": [{"type": "function", "function": None}]}, "tools must be functions with a name, got {'type'"),
        ({"tools": [{"function": {"name": None}}]}, "tools must be functions with a name, got {'function'"),
        ({"tools": [{"function": {"name": ""}}]}, "tools must be functions with a name, got {'function'"),
        ({"tools": [{}]}, "tools must be functions with a name, got {}"),
    ],
)
def test_faulty_turns_and_tools_are_named(source: dict[str, Any], problem: str) -> None:
    rule = f"^f:1: (the prompt must fit the chat template, got )?{re.escape(problem)}"
    with pytest.raises(BadPairError, match=rule):
        text_encoder().encode(Pair("?", "yes", "no", extra={"$source": source}), "f:1")


def test_a_model_of_text_only_takes_no_images(images: tuple[str, ...]) -> None:
    with pytest.raises(BadPairError, match="f:1: images must be none for a text model, got 2"):
        text_encoder().encode(Pair("?", "yes", "no", images[:2]), "f:1")
    got = sample(text_encoder(), Pair("what does <image> mean?", "yes", "no"))  # not a token of this model
    assert "<image>" in text_encoder().tokenizer.decode(got.prompt_ids)


def test_max_length_bounds_the_prompt_with_the_longer_response() -> None:
    pair = Pair("Why?", "abcdef", "uvwxyz0123")
    whole = sample(text_encoder(), pair)
    size = len(whole.prompt_ids)
    assert len(whole.rejected_ids) == 11
    for policy in ("drop", "truncate"):
        exact = sample(text_encoder(max_length=size + 11, too_long=policy), pair)
        assert (exact.digest, exact.is_cut) == (whole.digest, False)
        assert dropped(text_encoder(max_length=size, too_long=policy), pair) == NO_ROOM
    assert dropped(text_encoder(max_length=size + 10), pair) == TOO_LONG
    assert dropped(text_encoder(max_length=size + 10), Pair("Why?", "uvwxyz0123", "abc")) == TOO_LONG


@pytest.mark.parametrize("room", range(1, 12))
def test_truncation_cuts_the_ends_of_responses_only(room: int) -> None:
    pair = Pair("Why?", "abcdef", "uvwxyz0123")
    whole = sample(text_encoder(), pair)
    encoder = text_encoder(max_length=len(whole.prompt_ids) + room, too_long="truncate")
    got = sample(encoder, pair)
    assert torch.equal(got.prompt_ids, whole.prompt_ids)
    assert got.chosen_ids.tolist() == whole.chosen_ids[:room].tolist()
    assert got.rejected_ids.tolist() == whole.rejected_ids[:room].tolist()
    assert (got.chosen_ids[-1] == encoder.end_id) == (room >= 7)  # a response that fits keeps its end
    assert got.is_cut == (room < 11)
    assert (got.digest == whole.digest) == (room == 11)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_never_cuts_images(family: Any, images: tuple[str, ...]) -> None:
    pair = Pair("?", "a" * 30, "b" * 20, images[:2])
    whole = sample(Encoder(family()), pair)
    room = 2  # LLaVA's template writes a space before each response
    got = sample(Encoder(family(), max_length=len(whole.prompt_ids) + room, too_long="truncate"), pair)
    assert torch.equal(got.prompt_ids, whole.prompt_ids)
    assert len(got.chosen_ids) == len(got.rejected_ids) == room
    for length in (2, len(whole.prompt_ids) // 2, len(whole.prompt_ids)):
        assert dropped(Encoder(family(), max_length=length, too_long="truncate"), pair) == NO_ROOM


@pytest.mark.parametrize("chosen", ["", " \n"])
def test_an_empty_chosen_response_is_dropped_but_not_an_empty_rejected_one(chosen: str) -> None:
    assert dropped(text_encoder(), Pair("Why?", chosen, "because")) == EMPTY
    assert len(sample(text_encoder(), Pair("Why?", "because", "")).rejected_ids) == 1


def test_equal_responses_are_dropped() -> None:
    assert dropped(text_encoder(), Pair("Why?", "the same", "the same")) == EQUAL
    pair = Pair("Why?", "the same a", "the same b")
    size = len(sample(text_encoder(), pair).prompt_ids)
    assert dropped(text_encoder(max_length=size + 9, too_long="truncate"), pair) == EQUAL_CUT
    assert sample(text_encoder(max_length=size + 10, too_long="truncate"), pair).is_cut


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_length": 5.0}, "max_length must be an integer, got 5.0"),
        ({"too_long": "cut"}, "too_long must be 'drop' or 'truncate', got 'cut'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        text_encoder(**options)


def test_the_digest_changes_if_and_only_if_the_inputs_do(images: tuple[str, ...], tmp_path: Path) -> None:
    encoder = Encoder(qwen())
    pair = Pair("Why?", "yes", "no", images[:1])
    base = sample(encoder, pair, "a:1")
    copied = tmp_path / "copy.png"
    copied.write_bytes(Path(images[0]).read_bytes())
    renamed = dataclasses.replace(pair, images=(str(copied),), answer_gt="7", provenance={"a": 1})
    same = sample(Encoder(qwen()), renamed, "b:2")
    assert same.digest == base.digest
    assert same.prompt_key != base.prompt_key
    changes = [{"question": "Why"}, {"chosen": "yes!"}, {"rejected": "no!"}, {"images": images[1:2]}, {"images": ()}]
    changes += [{"chosen": "no", "rejected": "yes"}, {"images": images[:2]}, {"images": images[1::-1]}]
    digests = [base.digest, *(sample(encoder, dataclasses.replace(pair, **change)).digest for change in changes)]
    assert len(set(digests)) == len(digests)
    with Image.open(images[0]) as opened:
        opened.putpixel((0, 0), (0, 0, 255) if opened.getpixel((0, 0)) != (0, 0, 255) else (0, 255, 0))
        opened.save(copied)
    touched = sample(encoder, renamed)
    assert touched.prompt_ids.tolist() == base.prompt_ids.tolist()
    assert touched.digest != base.digest


def test_the_digest_tells_apart_where_one_response_ends() -> None:
    """Checks that a token moved from the prompt to a response changes a sample's digest.

    Another name, shape or dtype of a tensor also changes the digest. Another memory layout does not.
    """
    encoder = text_encoder()
    fields = {"prompt": [5, 6], "chosen": [7], "rejected": [8]}
    from mpo_ext.train.encode import _digest

    def digest(tokens: Any = None, images: Any = None, dtype: Any = torch.int64, **ids: list[int]) -> str:
        rows = {name: torch.tensor(row, dtype=dtype) for name, row in {**fields, **ids}.items()}
        return _digest(rows, tokens or {}, images or {})

    zeros = torch.zeros(2, 3)
    found = [
        digest(),
        digest(prompt=[5], chosen=[6, 7]),
        digest(chosen=[], rejected=[7, 8]),
        digest(dtype=torch.int32),
        digest({"a": zeros}),
        digest(None, {"a": zeros}),
        digest(None, {"b": zeros}),
        digest(None, {"a": zeros.T}),
        digest(None, {"a": zeros.to(torch.bfloat16)}),
        digest(None, {"a": zeros.bool()}),
        digest(None, {"a": torch.zeros(0, 3)}),
    ]
    assert len(set(found)) == len(found)
    values = torch.arange(6.0).view(2, 3)
    assert digest(None, {"a": values.T.contiguous().T}) == digest(None, {"a": values})
    assert digest(None, {"a": values, "b": zeros}) == digest(None, {"b": zeros, "a": values})
    assert sample(encoder, Pair("a", "b", "c")).digest != sample(encoder, Pair("a", "c", "b")).digest


def test_keys(images: tuple[str, ...]) -> None:
    encoder = Encoder(internvl())
    pair = Pair("Why?", "yes", "no", images[:1], extra={"difficulty": 3})
    got = sample(encoder, pair)
    other = sample(encoder, Pair("Why?", "maybe", "never", images[:1]))
    assert got.key == pair.key() != other.key
    assert got.prompt_key == other.prompt_key == prompt_key(pair)
    assert torch.equal(got.prompt_ids, other.prompt_ids)
    assert torch.equal(got.image_inputs["pixel_values"], other.image_inputs["pixel_values"])
    assert prompt_key(Pair("Why?", "yes", "no", images[1:2])) != prompt_key(pair)
    assert prompt_key(Pair("Why", "yes", "no", images[:1])) != prompt_key(pair)
    assert prompt_key(Pair("a", "", "", ("b", "c"))) != prompt_key(Pair("a", "", "", ("c", "b")))


class Encoded(torch.utils.data.Dataset):
    def __init__(self, encoder: Encoder, pairs: list[Pair]) -> None:
        self.encoder, self.pairs = encoder, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.encoder.encode(self.pairs[index], f"f:{index}")


def first(items: list[Any]) -> Any:
    return items[0]


def test_workers_encode_as_the_process_does(images: tuple[str, ...]) -> None:
    encoder = Encoder(internvl(), max_length=400)
    pairs = [Pair("<image>\n?", "yes" * 1, "no", images[:1]), Pair("?", "y" * 500, "no"), Pair("?", "y", "n")]
    loader = DataLoader(Encoded(encoder, pairs), batch_size=1, collate_fn=first, num_workers=1)
    alone = [pickle.loads(pickle.dumps(encoder)).encode(pair, f"f:{index}") for index, pair in enumerate(pairs)]
    for got, expected in zip(loader, alone, strict=True):
        assert type(got) is type(expected)
        assert getattr(got, "digest", got) == getattr(expected, "digest", expected)


def test_the_tally_counts_by_reason(images: tuple[str, ...]) -> None:
    pairs = [Pair("Why?", "abcdef", "uvwxyz"), Pair("?", "abc", "abd"), Pair("?" * 99, "a", "b"), Pair("?", "a", "a")]
    encoder = text_encoder(max_length=60, too_long="truncate")
    tally = PairCounts()
    for index, pair in enumerate(pairs):
        tally.add(encoder.encode(pair, f"f:{index}"))
    pairs_cut = text_encoder(max_length=len(sample(encoder, pairs[0]).prompt_ids) + 3, too_long="truncate")
    tally.add(pairs_cut.encode(pairs[0], "f:0"))
    tally.add(BadPairError("f:4: chosen must not hold an image"))
    tally.add(BadLine(Location("f", "f", 5), "bad JSON", "nothing"))
    tally.add(BadLine(Location("f", "f", 6), "bad JSON", "nothing"))
    assert (tally.kept, tally.cut) == (3, 1)
    assert tally.skipped == {NO_ROOM: 1, EQUAL: 1, BAD_PAIR: 1, "bad JSON": 2}
    lines = list(tally.lines())
    assert lines[0] == "cut the responses of 1 pairs"
    assert lines[1] == "skipped 2: bad JSON, for example f:5: bad JSON: nothing"
    assert list(tally.lines(2))[1] == "skipped 2 in 2 epochs: bad JSON, for example f:5: bad JSON: nothing"
    assert any(
        line.startswith(f"skipped 1: {NO_ROOM}, for example f:2: ") and "max_length is 60" in line for line in lines
    )
    assert len(json.dumps(lines)) < 1000


@pytest.mark.parametrize(
    ("family", "token"),
    [
        (gemma3, "<start_of_image>"),
        (gemma3, "<end_of_image>"),
        (internvl, "<IMG_CONTEXT>"),
        (internvl, "<img>"),
        (qwen, "<|video_pad|>"),
    ],
)
def test_a_token_of_media_in_the_text_of_a_pair_without_images_is_refused(family: Any, token: str) -> None:
    processor = family()
    with pytest.raises(
        BadPairError, match=rf"^f:1: the prompt must have 0 image tokens for its 0 images, got '{re.escape(token)}'"
    ):
        Encoder(processor).encode(Pair(f"{token}\nWhy?", "yes", "no"), "f:1")
    with pytest.raises(BadPairError, match=r"^f:1: chosen must not hold an image, video or audio token"):
        Encoder(processor).encode(Pair("Why?", f"see {token}", "no"), "f:1")
