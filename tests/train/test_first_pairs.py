"""Tests the check of the first pairs at the start of a run. Also tests pairs whose responses have several turns."""

# ruff: noqa: E402 - these packages come with an extra
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("transformers", "tokenizers", "PIL"):
    pytest.importorskip(package)

import torch
from digits_run import recipe, tiny, write_pairs
from PIL import Image
from tiny_processors import QWEN, SPECIAL, build_tokenizer, gemma3, idefics3, internvl, llava, qwen, with_template

from mpo_ext.checks import LinesError
from mpo_ext.data.records import Pair
from mpo_ext.train.batch import collate
from mpo_ext.train.encode import BadPairError, Encoder, Sample
from mpo_ext.train.loop import train
from mpo_ext.train.proof import prove

SEVERAL = [
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "b1!"},
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tuple(str(folder / f"{number}.png") for number in range(2))


def several(**sides: Any) -> Pair:
    messages = {f"{side}_messages": turns for side, turns in sides.items()}
    return Pair("multi", "a1\n\nb1!", "no", extra={"$source": messages})


@pytest.mark.parametrize("family", [internvl, qwen, llava, idefics3, gemma3])
def test_the_first_pairs_are_those_of_the_processor(family: Any, images: tuple[str, ...]) -> None:
    pairs = [
        (Pair("What <image>\nand <image>?", "Two.", "Three", images), "f:1"),
        (Pair("No image", "Yes", " No "), "f:2"),
        *([] if family is llava else [(several(chosen=SEVERAL), "f:3")]),  # LLaVA's template ends no turn
    ]
    proof = prove(Encoder(family()), pairs)
    assert proof.problems == proof.skipped == ()
    assert not any("compared" in notice for notice in proof.notices)
    assert [pair.name for pair in proof.pairs] == [name for _, name in pairs]
    assert "<image> x " in proof.pairs[0].prompt
    assert proof.pairs[0].chosen.startswith("[[")
    assert proof.pairs[1].sizes.endswith("of rejected")


def test_other_ids_than_those_of_the_processor_are_refused(images: tuple[str, ...]) -> None:
    class Wrong(Encoder):
        def _prompt(self, conversation: Any, name: str) -> Any:
            ids, *inputs = super()._prompt(conversation, name)
            return torch.cat([ids[:-1], ids[-1:] + 1]), *inputs

    proof = prove(Wrong(internvl()), [(Pair("<image>?", "Two.", "Three", images[:1]), "f:1")])
    assert len(proof.problems) == 3  # the prompt, and the prompt with each response
    with pytest.raises(LinesError, match="must be those of the model's processor, but:\n  f:1: the ids of the prompt"):
        proof.check()


def test_a_response_that_decodes_to_another_text_is_refused() -> None:
    encoder = Encoder(with_template(build_tokenizer(SPECIAL[QWEN]), QWEN))
    encoder.chat.response_text = lambda conversation, ids: "Twx."  # type: ignore[method-assign]
    proof = prove(encoder, [(Pair("?", "Two.", "Twx."), "f:1")])
    (problem,) = proof.problems
    assert problem == "f:1: the ids of chosen must decode to the response, got 'Twx.' for 'Two.'"


def test_only_the_turns_of_the_assistant_are_targets() -> None:
    encoder = Encoder(with_template(build_tokenizer(SPECIAL[QWEN]), QWEN))
    sample = encoder.encode(several(chosen=SEVERAL, rejected=[*SEVERAL[:2], SEVERAL[0]]), "f:1")
    assert isinstance(sample, Sample)
    assert sample.chosen_targets is not None
    text = encoder.tokenizer.decode(sample.chosen_ids)
    assert text == "a1<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nb1!<|im_end|>"
    assert encoder.tokenizer.decode(sample.chosen_ids[sample.chosen_targets]) == "a1<|im_end|>b1!<|im_end|>"
    messages = [{"role": "user", "content": "multi"}, *SEVERAL]
    whole = encoder.tokenizer.apply_chat_template(messages, return_dict=False)
    ours = [*sample.prompt_ids.tolist(), *sample.chosen_ids.tolist()]
    assert whole[: len(ours)] == ours
    assert sample.n_chosen_targets == 7
    for layout in ("shared", "separate"):
        batch = collate([sample], layout, pad_id=0)  # type: ignore[arg-type]
        labels = batch.labels[: int(batch.cu_seqlens[1])]
        assert torch.equal(labels != -100, sample.chosen_targets)
        assert torch.equal(labels[labels != -100], sample.chosen_ids[sample.chosen_targets])
        assert batch.projected_rows == 7 + 6


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        (SEVERAL[:2], "must begin and end with an assistant's turn, got assistant, user"),
        (SEVERAL[1:], "must begin and end with an assistant's turn, got user, assistant"),
        ([], "messages must be a list of messages"),
        ([{"role": "assistant"}], "content must be text or a list"),
        ([{**SEVERAL[0], "content": "a<|im_end|>"}, *SEVERAL[1:]], "must keep earlier turns|end of the turn"),
    ],
)
def test_faulty_responses_of_several_turns_are_refused(turns: list[Any], match: str) -> None:
    encoder = Encoder(with_template(build_tokenizer(SPECIAL[QWEN]), QWEN))
    with pytest.raises(BadPairError, match=f"^f:1: chosen must fit the chat template, got .*({match})"):
        encoder.encode(several(chosen=turns), "f:1")


def test_a_run_shows_its_first_pairs_and_exports_its_stop_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path, 8)
    model, processor = tiny()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = 2  # the checkpoint does not know the template's end of turn
    settings = recipe(tmp_path / "out", pairs, optim__max_steps=1)
    assert train(settings, model=model, processor=processor) == 0
    said = capsys.readouterr().err
    assert "chosen:   [[" in said
    text = (tmp_path / "out" / "first_pairs.txt").read_text()
    assert text.count("of rejected") == 3
    assert "<image> x 4" in text
    exported = json.loads((tmp_path / "out" / "final" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [2, end]


def test_a_run_warns_of_text_that_the_tokenizer_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path, 8)
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for name, suffix in (("known", ""), ("unknown", " zebra")):
        pairs.write_text("".join(json.dumps({**line, "question": line["question"] + suffix}) + "\n" for line in lines))
        model, processor = tiny()
        settings = recipe(tmp_path / name, pairs, optim__max_steps=1)
        assert train(settings, model=model, processor=processor) == 0
        said = capsys.readouterr().err
        warning = "WARNING: the tokenizer does not know all characters: 8 x <unk> in 8 of 8 pairs, such as 'zebra' in"
        assert (warning in said) == bool(suffix)
        assert ("does not know all characters" in said) == bool(suffix)


def test_an_id_beyond_the_embedding_is_refused_at_the_start(tmp_path: Path) -> None:
    """The tokenizer has more tokens than the embedding has rows."""
    pairs = write_pairs(tmp_path, 8)
    model, processor = tiny()
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"must be below the 20 rows of the model's embedding, got \d+ \('.*'\)"):
        train(recipe(tmp_path / "out", pairs), model=model, processor=processor)
