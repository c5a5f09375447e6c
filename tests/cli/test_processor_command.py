"""Tests ``mpo-ext doctor MODEL`` and ``mpo-ext data check --model MODEL`` on models without weights."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import json
import string
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

import tokenizers
import torch
import transformers
from tiny_processors import QWEN, SPECIAL, ZEPHYR, build_tokenizer, with_template

from mpo_ext.__main__ import main
from mpo_ext.demo.model import build_model, build_processor

CHAT = QWEN.replace("IMAGE", "<image>")


def ascii_tokenizer(unknown: str = "") -> Any:
    """Returns a tokenizer with a token for each printable ASCII character, except those in ``unknown``.

    Every other character becomes <unk>.
    """
    tokens = [*(letter for letter in string.printable if letter not in unknown), "<unk>", "<pad>", "</s>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[QWEN], **special
    )


def save(
    folder: Path,
    template: str = CHAT,
    *,
    rows: int | None = None,
    stop: int | None = None,
    tokenizer: Any = None,
) -> Path:
    """Saves config and tokenizer of a text model without weights. Returns the folder.

    Args:
        folder: Where to save.
        template: Chat template.
        rows: Number of rows of the embedding; None: the number of tokens of the tokenizer plus 1.
        stop: Id of the stop token; None: the id of <|im_end|>.
        tokenizer: Tokenizer to save; None: a Qwen2 tokenizer.
    """
    kind = "Qwen2" if tokenizer is None else "Granite"  # transformers rebuilds the tokenizers of Qwen2
    tokenizer = with_template(tokenizer or build_tokenizer(SPECIAL[QWEN]), template)
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(vocab_size=rows or len(tokenizer) + 1, num_hidden_layers=1)
    config.architectures = [f"{kind}ForCausalLM"]
    config.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if stop is None else stop
    transformers.GenerationConfig(eos_token_id=end).save_pretrained(folder)
    return folder


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PAIR = {"question": "How many?", "chosen": "Two.", "rejected": "Three."}
EQUAL = {**PAIR, "rejected": "Two."}


def test_doctor_proves_a_model_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(save(tmp_path / "model"))]) == 0
    out = capsys.readouterr().out
    for line in (
        f"model               {tmp_path}/model (Qwen2ForCausalLM)",
        "end of a turn       <|im_end|> (259)",
        "sampling stops at   </s> (257), <|im_end|> (259)",
        "token ids           up to 260; the embedding has 261 rows",
        "  chosen:   [[3<|im_end|>]]",
        "  rejected: [[2<|im_end|>]]",
        "valid: the ids are the processor's",
    ):
        assert f"\n{line}\n" in out
    assert "prompt:   <|im_start|>user\\nWhat is larger, 2 or 3?<|im_end|>\\n<|im_start|>assistant\\n" in out


def test_doctor_proves_a_model_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    processor = build_processor()
    build_model(processor.tokenizer, hidden_size=32, layers=1).config.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    assert main(["doctor", str(tmp_path), "--trust-remote-code"]) == 0  # the folder of a run
    out = capsys.readouterr().out
    assert "<image> x 4" in out
    assert "DigitsProcessor, GotOcr2ImageProcessor" in out
    assert main(["doctor", str(tmp_path)]) == 2
    assert "--trust-remote-code does so" in capsys.readouterr().err


def test_doctor_says_where_other_programs_may_not_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(save(tmp_path / "model", stop=257))]) == 0
    out = capsys.readouterr().out
    assert "sampling stops at   </s> (257), <|im_end|> (259)" in out
    assert "the end of a turn is not in generation_config.json" in out


def test_doctor_refuses_ids_beyond_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(save(tmp_path / "model", rows=258))]) == 2
    out = capsys.readouterr()
    assert "258 rows" in out.out + out.err
    assert "<|im_" in out.out + out.err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "chat_template must",
        ),
        ("{{ messages.nothing.at_all }}", "must fit the chat template"),
        ("{% for m in messages %}{{ strftime_now(m.role) }}{{ m.content }}{% endfor %}", "strftime_now"),
    ],
    ids=["drops the response", "fails", "date of another form"],
)
def test_doctor_refuses_a_template(
    tmp_path: Path, template: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(save(tmp_path / "model", template))]) == 2
    assert words in capsys.readouterr().err


def test_another_template_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", "{{ nothing.at_all }}")
    (tmp_path / "chat.jinja").write_text(ZEPHYR)
    assert main(["doctor", str(folder), "--chat-template", str(tmp_path / "chat.jinja")]) == 0
    assert "end of a turn       </s> (257)" in capsys.readouterr().out


def test_doctor_without_such_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert f"model must be a folder or a name on the hub, got '{tmp_path}/none'" in capsys.readouterr().err


def test_check_encodes_the_first_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, report = save(tmp_path / "model"), tmp_path / "report.json"
    pairs = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "question": "Who?", "chosen": "She."})
    assert main(["data", "check", str(pairs), "--model", str(model), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert f"{pairs}:1: " in out
    assert "  chosen:   [[Two.<|im_end|>]]" in out
    assert "  chosen:   [[She.<|im_end|>]]" in out
    values = json.loads(report.read_text())["model"]
    assert values["problems"] == []
    assert values["facts"]["end of a turn"] == "<|im_end|> (259)"


def test_check_finds_pairs_that_a_model_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    pairs = write(
        tmp_path / "pairs.jsonl", {**PAIR, "chosen": "Two.<|im_end|> or three"}, {**PAIR, "question": "Who?"}
    )
    assert main(["data", "check", str(pairs), "--model", str(model)]) == 0
    assert f"not encoded: {pairs}:1: chosen must fit the chat template" in capsys.readouterr().out
    pairs = write(tmp_path / "pairs.jsonl", {**PAIR, "chosen": "Two.<|im_end|> or three"})
    assert main(["data", "check", str(pairs), "--model", str(model)]) == 1
    expected = "NOT VALID: no pair could be encoded: 1 x chosen must fit the chat template\n"
    assert expected in capsys.readouterr().out
    pairs = write(tmp_path / "pairs.jsonl", *({**PAIR, "images": [f"{n}.png"]} for n in range(2)), EQUAL)
    assert main(["data", "check", str(pairs), "--model", str(model), "--images", "skip"]) == 1
    out = capsys.readouterr().out
    reasons = "2 x images must be none for a text model; 1 x chosen and rejected are equal"
    assert f"NOT VALID: no pair could be encoded: {reasons}\n" in out
    assert f"not encoded: {pairs}:3: chosen and rejected are equal: both responses are the same 5 tokens" in out
    pairs = write(tmp_path / "pairs.jsonl", {**PAIR, "chosen": 5})
    assert main(["data", "check", str(pairs), "--model", str(model)]) == 1
    assert "NOT VALID: no pair could be encoded: the data has no valid pair\n" in capsys.readouterr().out
    small = save(tmp_path / "small", rows=200)
    pairs = write(tmp_path / "pairs.jsonl", PAIR)
    assert main(["data", "check", str(pairs), "--model", str(small)]) == 2
    assert "must be below the 200 rows of the model's embedding, got 259" in capsys.readouterr().err
    assert main(["data", "check", str(pairs)]) == 0


def test_check_warns_of_text_that_the_tokenizer_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, report = save(tmp_path / "model", tokenizer=ascii_tokenizer()), tmp_path / "report.json"
    known = [{**PAIR, "question": f"How many in {number}?"} for number in range(4)]
    pairs = write(tmp_path / "pairs.jsonl", *known)
    assert main(["data", "check", str(pairs), "--model", str(model)]) == 0
    assert "WARNING" not in capsys.readouterr().out
    pairs = write(tmp_path / "pairs.jsonl", *known, {**PAIR, "question": "<unk> Äpfel?", "chosen": "Zwei: 2½."})
    assert main(["data", "check", str(pairs), "--model", str(model), "--json", str(report)]) == 0
    counts = f"2 x <unk> in 1 of 5 pairs, such as 'Ä' in the prompt of {pairs}:5"
    warning = f"the tokenizer does not know all characters: {counts}"
    assert f"\nWARNING: {warning}\n" in capsys.readouterr().out
    assert json.loads(report.read_text())["model"]["warnings"] == [warning]


def test_doctor_says_why_no_pair_could_be_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model", tokenizer=ascii_tokenizer(unknown="23"))
    assert main(["doctor", str(model)]) == 1
    out = capsys.readouterr().out
    assert "no pair could be encoded: 1 x chosen and rejected are equal\n" in out
    assert "WARNING: the tokenizer does not know all characters: 4 x <unk> in 1 of 1 pairs, such as '2'" in out
