"""Tests that the model of ``reference.path`` must read the token ids of the policy as the policy does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import digits_run
import pytest
import transformers
from test_trainer import TEXT, text_pairs
from tokenizers import Tokenizer, models, pre_tokenizers

from mpo_ext.cli.main import main
from mpo_ext.train.loop import Trainer
from mpo_ext.train.setup import check_reference_tokens

SPECIAL = ["<pad>", "<|im_end|>", "<unk>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)


def tokenizer(words: str = "abcdefghij", *, special: list[str] = SPECIAL, added: tuple[str, ...] = ()) -> Any:
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": special[0], "eos_token": special[1], "unk_token": "<unk>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
    wrapped.add_tokens(list(added))
    wrapped.chat_template = TEMPLATE
    return wrapped


def check(policy: Any, reference: Any, *, rows: int | None = 32, policy_rows: int | None = 32) -> None:
    chat: Any = SimpleNamespace(tokenizer=policy, embedding_rows=policy_rows)
    check_reference_tokens("other", chat, reference, rows)


@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        (tokenizer(), tokenizer()),
        (tokenizer(added=("<box>", "</box>")), tokenizer()),  # the rows after the vocabulary are not used otherwise
        (tokenizer(), tokenizer(added=("<box>",))),
        (tokenizer(), SimpleNamespace(tokenizer=tokenizer())),  # a processor
        (tokenizer(special=["<pad>", "<end>", "<unk>"]), tokenizer(special=["<pad>", "<reserved_7>", "<unk>"])),
        (tokenizer(added=("<box>",)), tokenizer(added=("<extra_0>",))),
    ],
    ids=["equal", "added to the policy", "added to the reference", "processor", "renamed", "renamed addition"],
)
def test_a_reference_of_the_same_family_is_accepted(policy: Any, reference: Any) -> None:
    check(policy, reference)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (tokenizer("abcdefghji"), "2 of 13 tokens have another id, such as 'i': 12 instead of 11"),
        (tokenizer("abcdefghix"), "1 of 13 tokens have another id, such as 'j': none instead of 12"),
        (tokenizer(special=["<|im_end|>", "<pad>", "<unk>"]), "2 of 13 tokens .* such as '<pad>': 1 instead of 0"),
    ],
    ids=["exchanged", "replaced", "special tokens exchanged"],
)
def test_another_tokenizer_is_refused(reference: Any, words: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^reference\.path must be a model with the token ids of model\.path, got other, in which {words}$",
    ):
        check(tokenizer(), reference)


def test_each_token_id_needs_an_embedding_row() -> None:
    policy = tokenizer(added=("<box>",))
    check(policy, tokenizer(), rows=14)
    check(policy, tokenizer(), rows=13, policy_rows=13)  # the policy cannot use the last id itself
    check(policy, tokenizer(), rows=None, policy_rows=None)
    text = r"an embedding row for each token id of model\.path, got other with 13 rows for ids up to 13$"
    for policy_rows in (14, None):
        with pytest.raises(ValueError, match=text):
            check(policy, tokenizer(), rows=13, policy_rows=policy_rows)


def write(folder: Path, tokens: Any, config: Any = transformers.Qwen2Config) -> str:
    transformers.AutoModelForCausalLM.from_config(config(**TEXT)).save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return str(folder)


def begin(how: str, out: Path, pairs: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    """Starts a run or a dry run. Returns the message of the error, or "" if there is none."""
    recipe = digits_run.recipe(out, pairs, optim__max_steps=1, **settings)
    if how == "dry run":
        capsys.readouterr()
        status = main(["train", str(out.with_name(f"{out.name}.yaml")), "--dry-run", *_overrides(settings)])
        return capsys.readouterr().err if status else ""
    try:
        Trainer(recipe)
    except ValueError as error:
        return str(error)
    return ""


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]


@pytest.mark.parametrize("kind", ["copy", "precomputed"])
@pytest.mark.parametrize("how", ["run", "dry run"])
def test_a_run_checks_the_tokens_of_its_reference(
    how: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 4)
    one, same = write(tmp_path / "one", tokenizer()), write(tmp_path / "same", tokenizer(added=("<box>",)))
    other = write(tmp_path / "other", tokenizer("jihgfedcba"))
    settings = {"model__path": one, "reference__kind": kind}
    assert begin(how, tmp_path / "a", pairs, capsys, **settings, reference__path=same) == ""
    error = begin(how, tmp_path / "b", pairs, capsys, **settings, reference__path=other)
    assert f"reference.path must be a model with the token ids of model.path, got {other}, in which 10 of 13" in error
    sft = {"model__path": one, "reference__path": other, "loss__dpo_weight": 0, "loss__bco_weight": 0}
    assert begin(how, tmp_path / "c", pairs, capsys, **sft) == ""  # a loss without reference reads no ids


@pytest.mark.parametrize("config", [transformers.Qwen2Config, transformers.LlamaConfig])
@pytest.mark.parametrize("how", ["run", "dry run"])
def test_a_reference_without_tokenizer_files_is_refused(
    how: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 4)
    one, bare = write(tmp_path / "one", tokenizer()), write(tmp_path / "bare", None, config)
    text = f"model must have the files of its tokenizer, such as tokenizer.json, got {bare} without them"
    assert text in begin(how, tmp_path / "a", pairs, capsys, model__path=one, reference__path=bare)
    assert text in begin(how, tmp_path / "b", pairs, capsys, model__path=bare)
