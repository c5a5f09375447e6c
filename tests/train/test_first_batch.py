"""Tests the check of a run's first batch: it accepts correct batches, and names the mistake in wrong batches."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_folders
import pytest
import torch
from accelerate.state import AcceleratorState
from digits_run import recipe, tiny, write_pairs

from mpo_ext.checks import LinesError
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train import loop, model_card
from mpo_ext.train.batch import Batch
from mpo_ext.train.batch_loss import BatchLoss
from mpo_ext.train.first_batch import FirstBatchCheck, batch_sequences
from mpo_ext.train.loop import Trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file of twenty pairs, which give steps of 8, 8 and 4 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 20, text_only=4)


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_card, "write_card", lambda *args, **values: None)


def prepared(out: Path, pairs: Path, **settings: Any) -> Trainer:
    """Returns a trainer that is ready for its first step; its ``batch_loss`` computes the loss of a batch."""
    model, processor = tiny() if "model__path" not in settings else (None, None)
    trainer = Trainer(recipe(out, pairs, **settings), model=model, processor=processor)
    trainer._prepare()
    trainer.batch_loss = BatchLoss(trainer.recipe.loss, trainer.accelerator, trainer.make_reference())
    return trainer


def findings(trainer: Trainer, batch: Batch) -> list[str]:
    """Runs the check of a first batch, and returns its messages."""
    check = FirstBatchCheck(trainer.recipe, trainer.processor)
    trainer.batch_loss.first_batch = check
    trainer.batch_loss(trainer.model, batch, trainer.recipe.loss.config, RewardShift())
    return [str(finding) for finding in check.findings]


RIGHT: dict[str, dict[str, Any]] = {
    "image, packed": {"optim__micro_batch_size": 2},
    "image, padded rows": {"loss__shared_prefix": "padded"},
    "image, a row per response": {"loss__shared_prefix": False, "optim__micro_batch_size": 3},
    "image, logits": {"loss__from_logits": True, "optim__micro_batch_size": 2},
    "image, bf16": {"precision": "bf16"},
    "LoRA": {"model__lora": {"rank": 2}, "optim__micro_batch_size": 2},
    "LoRA with dropout": {"model__lora": {"rank": 2, "dropout": 0.1}},
    "tokens per batch": {"optim__micro_batch_tokens": 150, "optim__micro_batch_size": 1},
    "another loss": {"loss__preference": "ipo", "loss__bco_weight": 0.0},
    "no reference": {"loss__preference": "orpo", "loss__bco_weight": 0.0},
    "precomputed": {"reference__kind": "precomputed"},
    "SFT": {"loss__dpo_weight": 0.0, "loss__bco_weight": 0.0},
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_batches_have_no_findings(name: str, tmp_path: Path, pairs: Path) -> None:
    trainer = prepared(tmp_path / "out", pairs, **RIGHT[name])
    sizes = []
    for step_slice in trainer.data.load_steps(0):
        for batch in step_slice.batches:
            assert findings(trainer, batch) == []
            sizes.append(batch.pairs)
    assert sum(sizes) == 20
    if name == "image, a row per response":
        assert min(sizes) < max(sizes)  # the last batch of a step is smaller


def test_right_batches_of_text_have_no_findings(tmp_path: Path) -> None:
    folder = model_folders.write_qwen2(tmp_path / "model")
    data = model_folders.write_pairs(tmp_path / "data", 20, images=False)
    trainer = prepared(tmp_path / "out", data, model__path=str(folder), optim__micro_batch_size=2)
    batches = [batch for step_slice in trainer.data.load_steps(0) for batch in step_slice.batches]
    assert len(batches) == 10
    assert all(findings(trainer, batch) == [] for batch in batches)


def test_a_right_run_prints_no_warning_and_checks_its_first_step_only(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checked: list[int] = []
    check = FirstBatchCheck.check

    def note(self: FirstBatchCheck, batch: Batch, *args: Any) -> None:
        checked.append(batch.pairs)
        check(self, batch, *args)

    monkeypatch.setattr(FirstBatchCheck, "check", note)
    model, processor = tiny()
    assert loop.train(recipe(tmp_path / "out", pairs), model=model, processor=processor) == 0
    assert checked == [4, 4]
    assert "WARNING" not in capsys.readouterr().err


def test_sequences_are_prompts_with_their_responses(tmp_path: Path, pairs: Path) -> None:
    trainer = prepared(tmp_path / "out", pairs)
    (first, *_) = trainer.data.load_steps(0)
    batch = first.batches[0]
    assert batch.layout == "packed"
    places = torch.arange(len(batch.labels)).unsqueeze(1)
    sequences = list(batch_sequences(batch, 100, lambda rows: places[rows]))
    by_name = {}
    for line, values in enumerate(map(json.loads, pairs.read_text().splitlines()), 1):
        by_name[f"{pairs}:{line}"] = values
    tokenizer = trainer.processor.tokenizer
    for number, sequence in enumerate(sequences):
        side, name = ("chosen", "rejected")[number >= batch.pairs], batch.names[number % batch.pairs]
        assert sequence.name == f"{side} of {name}"
        text = tokenizer.decode(sequence.ids)
        values = by_name[name]
        assert values["question"].split()[-1] in text
        assert text.split("<|assistant|>")[-1].split()[:-1] == values[side].split()
        scored = (sequence.labels != -100).nonzero().squeeze(1)
        assert torch.equal(sequence.labels[scored], sequence.ids[scored + 1])
        begin = int(batch.cu_seqlens[number])
        assert sequence.logits_at(scored).squeeze(1).tolist() == list(range(begin, begin + len(scored)))


# Mistakes.


def first_batch(trainer: Trainer) -> Batch:
    (first, *_) = trainer.data.load_steps(0)
    return first.batches[0]


def test_mistakes_are_found(tmp_path: Path, pairs: Path) -> None:
    trainer = prepared(tmp_path / "out", pairs)
    batch = first_batch(trainer)
    rows = trainer.model.get_output_embeddings().weight.shape[0]

    def found(**changes: Any) -> str:
        (text,) = findings(trainer, dataclasses.replace(batch, **changes))
        return text

    text = found(labels=batch.labels.index_fill(0, torch.tensor([3]), rows))
    assert text.startswith(f"label out of range: 1 labels of {pairs}:")
    assert f"are not in [0, {rows}), the rows of the output head, such as {rows}: the loss is NaN" in text
    nothing = torch.where(torch.arange(len(batch.labels)) < batch.cu_seqlens[1], -100, batch.labels)
    assert found(labels=nothing).startswith("no labels: all labels are -100 in chosen of ")
    assert found(labels=batch.labels.roll(1)).startswith("labels shifted")


def test_a_reference_of_other_tokens_is_found_unless_it_is_another_model(tmp_path: Path, pairs: Path) -> None:
    trainer = prepared(tmp_path / "out", pairs)
    batch = first_batch(trainer)
    reference: Any = trainer.batch_loss.reference
    logp = type(reference).logp
    changed = type("Changed", (), {"logp": lambda self, policy, batch: 3 * logp(reference, policy, batch)})()
    trainer.batch_loss.reference = changed
    (text,) = findings(trainer, batch)
    assert text.startswith("reference of other tokens: ref_logp is ")
    other = dataclasses.replace(trainer.recipe.reference, path="elsewhere")
    trainer.recipe = dataclasses.replace(trainer.recipe, reference=other)
    assert findings(trainer, batch) == []


def without_labels(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes the encoder exclude all response tokens of its first ``count`` pairs from the loss."""
    from mpo_ext.train.encode import Encoder

    encode, seen = Encoder.encode, [0]

    def without(self: Any, pair: Any, name: str) -> Any:
        sample = encode(self, pair, name)
        seen[0] += 1
        if seen[0] > count:
            return sample
        targets = {
            f"{side}_targets": torch.zeros(len(getattr(sample, f"{side}_ids")), dtype=torch.bool)
            for side in ("chosen", "rejected")
        }
        return dataclasses.replace(sample, **targets)

    monkeypatch.setattr(Encoder, "encode", without)


def test_a_run_without_labels_is_refused_before_the_model_changes(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_labels(monkeypatch, 10**9)
    model, processor = tiny()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(LinesError, match=r"cannot be trained on:\n  no labels: no token of .*:\d+.* \(8 pairs\)"):
        loop.train(recipe(tmp_path / "out", pairs), model=model, processor=processor)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_batch_with_some_responses_without_labels_is_a_warning(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trainer = Trainer(recipe(tmp_path / "out", pairs), model=(made := tiny())[0], processor=made[1])
    data = trainer.data
    load = data.load_steps

    def load_steps(first: int) -> Iterator[Any]:
        for step_slice in load(first):
            batch = step_slice.batches[0]
            labels = torch.where(torch.arange(len(batch.labels)) < batch.cu_seqlens[1], -100, batch.labels)
            batches = (dataclasses.replace(batch, labels=labels), *step_slice.batches[1:])
            yield dataclasses.replace(step_slice, batches=batches)

    monkeypatch.setattr(data, "load_steps", load_steps)
    assert trainer.run() == 0
    text = capsys.readouterr().err
    assert text.count("WARNING: first batch: no labels: all labels are -100 in chosen of ") == 1
