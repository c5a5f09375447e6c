"""Tests the encoder on random templates, tokenizers and conversations.

The encoder must return the ids of the chat template, or raise an error.
"""

import collections
import os
import re
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis, which dev installs")

import transformers
from hypothesis import HealthCheck, given, settings
from PIL import Image
from test_families import load
from zoo_cases import Case, ImageCase, cases, image_cases
from zoo_families import IMAGE_FAMILIES
from zoo_oracle import compare, conversation_of, messages_of
from zoo_tokenizers import METASPACE

from mpo_ext.chat import ChatError
from mpo_ext.data.records import Pair
from mpo_ext.train.encode import BadPairError, Encoder, Sample
from mpo_ext.train.proof import prove

# MPO_ZOO_CASES=2000 runs the long version. The short one takes the same cases each time.
CASES = int(os.environ.get("MPO_ZOO_CASES", "200"))
ENCODED, REFUSED = "encoded", "refused"
OTHER = "<think>\nNo.\n</think>\n\nSomething else."  # the rejected response

transformers.logging.set_verbosity_error()


def responses_of(case: Any) -> tuple[str, str]:
    """Returns (chosen, rejected). The chosen response is the case's response, and the rejected response is ``OTHER``.

    If the case's response is empty, the two are exchanged.
    """
    return (case.response, OTHER) if case.response.strip() else (OTHER, case.response)


def encode(case: Case) -> str:
    """Encodes a case and checks that the ids are those of the chat template.

    Returns ENCODED, or REFUSED if the encoder raises an error.
    """
    processor: Any = case.tokenizer.build()
    template = case.template.jinja()
    messages = messages_of(processor, case.turns)
    response = written(case, processor, messages)
    conversation = conversation_of(messages)
    chosen, rejected = responses_of(case)
    pair = Pair("", chosen, rejected, extra={"$source": {"messages": list(conversation.messages)}})
    try:
        trainer = Encoder(processor, chat_template=template)
        sample = trainer.encode(pair, "pairs.jsonl:1")
    except (ChatError, BadPairError):
        return REFUSED
    assert isinstance(sample, Sample)
    encoder = trainer.chat
    encoded = encoder.response(conversation, case.response)
    assert (sample.chosen_ids if chosen == case.response else sample.rejected_ids).tolist() == encoded.ids
    suffix = case.tokenizer.suffix if case.tokenizer.in_processor else 0
    compare(
        encoder,
        messages,
        response,
        sample.prompt_ids.tolist(),
        encoded.ids,
        is_split=encoded.is_split,
        adds_header=case.template.adds_header,
        suffix=suffix,
        chat_template=template,
    )
    assert all(encoded.is_target)
    assert prove(trainer, [(pair, "pairs.jsonl:1")]).problems == ()
    # SentencePiece cannot tell its sign for a space from a space, and no text says which of two blocks a prompt opens.
    if METASPACE not in case.response and case.response.count("<think>") < 2:
        text = encoder.response_text(conversation, encoded.ids[:-1])
        try:
            ids = encoder.response_ids(conversation, text)
        except ChatError as error:  # sampled thoughts without an end are not trained
            if "must close the block" not in str(error):
                raise
        else:
            assert ids == encoded.ids
    return ENCODED


def written(case: Case, processor: Any, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the assistant's message of a case.

    If the prompt ends with ``<think>``, the response may have only the closing tag ``</think>``. This function then
    adds ``<think>`` to the message, unless the template does so.
    """
    (plain,) = messages_of(processor, [("assistant", case.response)])
    block = re.search(r"<think>\s*$", case.template.generation or "")
    continues = "</think>" in case.response and not case.response.lstrip().startswith("<think>")
    if case.template.ignores != "no" or not block or not continues:
        return plain
    options = {"chat_template": case.template.jinja(), "tokenize": False}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    if processor.apply_chat_template([*messages, plain], **options).startswith(prompt):
        return plain
    (closed,) = messages_of(processor, [("assistant", block[0] + case.response)])
    return closed


def test_the_ids_are_the_template_s_or_the_encoder_refuses() -> None:
    counts: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=CASES == 200,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        counts[encode(case)] += 1

    run()
    print(f"{counts[ENCODED]} encoded, {counts[REFUSED]} refused, 0 wrong")
    assert counts[ENCODED] > CASES / 3
    assert counts[REFUSED] > CASES / 20


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    """Returns (path, image) of images of several shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(64, 48), (40, 70), (56, 56), (90, 30)]
    images = [Image.new("RGB", size, (50 * number, 99, 180)) for number, size in enumerate(sizes)]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return [(str(folder / f"{number}.png"), image) for number, image in enumerate(images)]


def test_the_ids_with_images_are_those_of_the_processor(pictures: list[tuple[str, Any]]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    families = [name for name, family in IMAGE_FAMILIES.items() if not family.refused and not family.needs_thoughts]

    @settings(
        max_examples=CASES // 2,
        deadline=None,
        derandomize=CASES == 200,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(image_cases(families, len(pictures)))
    def run(case: ImageCase) -> None:
        counts[encode_images(case, pictures)] += 1

    run()
    print(f"with images: {counts[ENCODED]} encoded, {counts[REFUSED]} refused, 0 wrong")
    assert counts[ENCODED] > CASES / 4


def encode_images(case: ImageCase, pictures: list[tuple[str, Any]]) -> str:
    """Encodes a case with images and checks that the ids are those of the processor.

    Returns ENCODED, or REFUSED if the encoder raises an error.
    """
    _, processor, _ = load(case.family)
    used = [part for _, parts in case.turns for part in parts if isinstance(part, int)]
    turns = [
        (role, [pictures[part][1] if isinstance(part, int) else part for part in parts]) for role, parts in case.turns
    ]
    messages = messages_of(processor, turns)
    (response,) = messages_of(processor, [("assistant", case.response)])
    source = {"messages": list(conversation_of(messages).messages)}
    paths = tuple(pictures[number][0] for number in used)
    chosen, rejected = responses_of(case)
    pair = Pair("", chosen, rejected, paths, extra={"$source": source})
    trainer = Encoder(processor)
    try:
        sample = trainer.encode(pair, "pairs.jsonl:1")
    except BadPairError:
        return REFUSED
    assert isinstance(sample, Sample)
    ids = sample.chosen_ids if chosen == case.response else sample.rejected_ids
    compare(trainer.chat, messages, response, sample.prompt_ids.tolist(), ids.tolist())
    assert prove(trainer, [(pair, "pairs.jsonl:1")]).problems == ()
    return ENCODED
