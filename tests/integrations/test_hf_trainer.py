"""Tests a transformers Trainer that uses MPOLossMixin.

Compares the Trainer with MPO in plain float64 torch. Kills and resumes runs.
"""

from __future__ import annotations

import copy
import json
import random
import types
from pathlib import Path
from typing import Any

import killed_runs
import peft
import plain
import pytest
import tiny_models
import torch
import transformers

from mpo_ext import RewardShift
from mpo_ext.data.records import Pair
from mpo_ext.integrations import MPOLossMixin, PairCollator
from mpo_ext.integrations.checkpoint_weights import renamed_weights_loaded
from mpo_ext.integrations.reward_shift_state import load_reward_shift
from mpo_ext.train.encode import Encoder, Sample


class PairTrainer(MPOLossMixin, transformers.Trainer):
    """The subclass of Trainer in docs/how-to/other-trainers.md."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def samples(encoder: Encoder) -> list[Sample]:
    return make_samples(encoder)


def make_samples(encoder: Encoder) -> list[Sample]:
    draw = random.Random(0)
    pairs = [Pair(f"{draw.randrange(99)} + 2?", "sum " * draw.randrange(1, 4), f"No {number}") for number in range(24)]
    return [encoder.encode(pair, f"pair {number}") for number, pair in enumerate(pairs)]  # type: ignore[misc]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def make(
    model: Any, encoder: Encoder, samples: list[Sample], out: Path, *, layout: Any = None, **settings: Any
) -> Any:
    options = {name: settings.pop(name) for name in ("reward_shift", "ref_model") if name in settings}
    values: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    return PairTrainer(
        model, transformers.TrainingArguments(str(out), **{**values, **settings}), train_dataset=samples,
        data_collator=PairCollator.for_model(model, encoder, samples[:2]), **options,
    )  # fmt: skip


def train(trainer: Any, **options: Any) -> list[dict[str, Any]]:
    trainer.train(**options)
    return [line for line in trainer.state.log_history if "loss" in line]


def test_a_run_is_that_of_plain_float64(folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path) -> None:
    model = plain.widen(load(folder))
    truth_model, truth_reference = copy.deepcopy(model), copy.deepcopy(model)
    trainer = make(model, encoder, samples, tmp_path)
    assert trainer.data_collator.collator.layout == "packed"
    batches: list[list[plain.Pair]] = []
    collate = trainer.data_collator

    def record(batch: list[Sample]) -> Any:
        ids = [(sample.prompt_ids, sample.chosen_ids, sample.rejected_ids) for sample in batch]
        batches.append([plain.Pair(*(tuple(part.tolist()) for part in parts), None) for parts in ids])
        return collate(batch)

    trainer.data_collator = record
    log = train(trainer)
    settings = plain.Settings(
        average_over="micro_batch", weight_decay=0.0, warmup_ratio=0.0, schedule="constant"
    )  # fmt: skip
    steps = [batches[first : first + 2] for first in range(0, 12, 2)]
    truth = list(plain.train(truth_model, truth_reference, steps, settings))
    for line, expected in zip(log, truth, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["rewards/margins"] == pytest.approx(expected["reward_margin"], abs=1e-6)
    assert trainer.reward_shift.value == pytest.approx(truth[-1]["reward_shift"], rel=1e-6)
    for (name, one), two in zip(model.named_parameters(), truth_model.parameters(), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-7, msg=name)


def saved(folder: Path, encoder: Encoder, out: Path) -> Any:
    shift = RewardShift("ema", update="after", per="optimizer_step")
    settings = {"reward_shift": shift, "save_strategy": "steps", "save_steps": 3}
    return make(load(folder), encoder, make_samples(encoder), out, **settings)


def run_until_killed(folder: str, out: str) -> None:
    train(saved(Path(folder), Encoder(transformers.AutoTokenizer.from_pretrained(folder)), Path(out)))


def test_a_killed_run_resumes_as_the_uninterrupted_run(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    whole = saved(folder, encoder, tmp_path / "whole")
    log = train(whole)
    killed_runs.kill_in_step(6, "test_hf_trainer", folder, tmp_path)
    assert json.loads((tmp_path / "checkpoint-3" / "reward_shift.json").read_text())["count"] == 3
    again = saved(folder, encoder, tmp_path)
    resumed = train(again, resume_from_checkpoint=True)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in log]
    assert again.reward_shift.state_dict() == whole.reward_shift.state_dict()
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_policy_without_its_adapters_is_the_reference(
    folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    logs = []
    for ref_model in (None, load(folder)):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(load(folder), config)
        options = {} if ref_model is None else {"ref_model": ref_model}
        trainer = make(model, encoder, samples, tmp_path, learning_rate=1e-2, **options)
        assert (trainer.ref_model is None) == (ref_model is None)
        logs.append([line["loss"] for line in train(trainer)])
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)
    assert logs[0][0] != logs[0][-1]


def test_an_evaluation_leaves_the_reward_shift(
    folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    trainer = make(load(folder), encoder, samples, tmp_path, max_steps=2)
    train(trainer)
    before = trainer.reward_shift.state_dict()
    metrics = trainer.evaluate(samples[:4])
    assert trainer.reward_shift.state_dict() == before
    assert metrics["eval_loss"] > 0
    line = next(line for line in trainer.state.log_history if "eval_loss/dpo" in line)
    assert line["eval_reward_shift"] == pytest.approx(before["value"])


def test_reference_log_probs_in_the_batch_are_used(
    folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    trainer = make(load(folder), encoder, samples, tmp_path)
    batch = trainer.data_collator(samples[:2])
    own = trainer.compute_loss(trainer.model, batch)
    ref_logp = trainer._reference_logp(batch["batch"])
    assert trainer.compute_loss(trainer.model, {**batch, "ref_logp": ref_logp}).item() == own.item()
    assert trainer.compute_loss(trainer.model, {**batch, "ref_logp": ref_logp + torch.arange(4)}).item() != own.item()


def test_a_layout_that_the_model_does_not_support_is_refused(encoder: Encoder, samples: list[Sample]) -> None:
    config = transformers.MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match="layout must be a layout that the model supports, got 'shared'"):
        PairCollator.for_model(model, encoder, samples[:2], layout="shared")
    assert PairCollator.for_model(model, encoder, samples[:2]).collator.layout == "separate"
    with pytest.raises(ValueError, match="layout must be one of"):
        PairCollator.for_model(model, encoder, samples[:2], layout="one")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, torch.tensor(0.5), {"mode": "fixed"}])
def test_only_a_reward_shift_is_a_reward_shift(
    value: Any, folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="reward_shift must be a RewardShift or None, got"):
        make(load(folder), encoder, samples, tmp_path, reward_shift=value)


def test_the_policy_is_not_its_own_reference(
    folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="ref_model must be another model than the policy"):
        make(model, encoder, samples, tmp_path, ref_model=model)
    with pytest.raises(ValueError, match="samples must be one or two samples, got none"):
        PairCollator.for_model(model, encoder, [])


def test_an_evaluation_returns_the_terms_of_its_pairs(
    folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    trainer = make(load(folder), encoder, samples, tmp_path)
    whole = trainer.evaluate(samples[:8])
    assert whole["eval_loss/ntp"] > 0
    assert trainer.evaluate(samples[:8], metric_key_prefix="test")["test_loss/ntp"] == whole["eval_loss/ntp"]
    trainer.predict(samples[8:])
    assert trainer.evaluate(samples[:8])["eval_loss/ntp"] == whole["eval_loss/ntp"]
    both = trainer.evaluate({"a": samples[:8], "b": samples[8:16]})
    assert both["eval_a_loss/ntp"] == whole["eval_loss/ntp"] != both["eval_b_loss/ntp"]


@pytest.mark.parametrize("text", ["", '{"mode": "cumul'])
def test_a_damaged_reward_shift_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "reward_shift.json").write_text(text)
    with pytest.raises(ValueError, match=r"reward_shift\.json must hold the state of this run's reward shift"):
        load_reward_shift(RewardShift(), str(tmp_path))


def test_two_patches_of_a_loading_trainer_are_undone_in_order() -> None:
    trainer = types.SimpleNamespace(**{"_issue_warnings_after_load": lambda result: None})
    bound = trainer._issue_warnings_after_load
    model = torch.nn.Linear(1, 1)
    with renamed_weights_loaded(trainer, model, "folder"):  # type: ignore[arg-type]
        outer = trainer._issue_warnings_after_load
        with renamed_weights_loaded(trainer, model, "folder"):  # type: ignore[arg-type]
            assert trainer._issue_warnings_after_load is not outer
        assert trainer._issue_warnings_after_load is outer
    assert trainer.__dict__.get("_issue_warnings_after_load", bound) is bound


def test_the_reference_without_adapters_has_no_dropout(
    folder: Path, encoder: Encoder, samples: list[Sample], tmp_path: Path
) -> None:
    model = load(folder)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make(peft.get_peft_model(model, config), encoder, samples, tmp_path)
    batch = trainer.data_collator(samples[:2])["batch"]
    trainer.model.train()
    first, second = trainer._reference_logp(batch), trainer._reference_logp(batch)
    assert trainer.model.training
    assert torch.equal(first, second)
