"""Tests LLaMA-Factory's DPO stage with its own loss and with mpo_ext's. ``make integrations`` runs this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llamafactory", reason="make integrations runs this file in an environment with LLaMA-Factory")

import killed_runs
import plain_runs
import tiny_models
from llama_factory_runs import patched, run

import mpo_ext

SAVED: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
NAMES = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "text": tiny_models.save_text_model(folder / "text"),
        "images": tiny_models.save_image_model(folder / "images"),
    }


@pytest.fixture(scope="module")
def pairs() -> Any:
    return tiny_models.pairs()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ten_steps_are_those_of_llama_factory(
    models: dict[str, Path], tmp_path: Path, pairs: Any, tuning: str
) -> None:
    settings: dict[str, Any] = {"max_steps": 10, "finetuning_type": tuning}
    theirs = run("own", models["text"], tmp_path / "own", pairs, **settings)
    ours = run("mpo", models["text"], tmp_path / "mpo", pairs, **settings)
    assert len(ours) == len(theirs) == 10
    for our_line, their_line in zip(ours, theirs, strict=True):
        for name in NAMES:
            assert our_line[name] == pytest.approx(their_line[name], rel=1e-5, abs=1e-5), name
    assert ours[-1]["reward_shift"] != 0


def test_without_a_reward_shift_the_loss_is_the_sum_of_its_terms(
    models: dict[str, Path], tmp_path: Path, pairs: Any
) -> None:
    for line in run("mpo", models["text"], tmp_path / "mpo", pairs, shift={"mode": "fixed"}):
        assert line["reward_shift"] == 0
        terms = 0.8 * line["loss/dpo"] + 0.2 * line["loss/bco"] + line["loss/ntp"]
        assert line["loss"] == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ten_steps_without_a_reward_shift_are_those_of_llama_factory(
    models: dict[str, Path], tmp_path: Path, pairs: Any, tuning: str
) -> None:
    settings: dict[str, Any] = {"max_steps": 10, "finetuning_type": tuning, "shift": {"mode": "fixed"}}
    theirs = run("own", models["text"], tmp_path / "own", pairs, **settings)
    ours = run("mpo", models["text"], tmp_path / "mpo", pairs, **settings)
    assert len(ours) == 10
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    if tuning == "full":  # adapters move too little in ten steps
        shifted = run("own", models["text"], tmp_path / "shift", pairs, **{**settings, "shift": None})
        assert [line["loss"] for line in ours] != pytest.approx([line["loss"] for line in shifted], rel=1e-5)


def test_the_authors_reward_shift_is_that_of_plain_float64(
    models: dict[str, Path], tmp_path: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo_ext.integrations import llama_factory

    batches: list[Any] = []
    own = llama_factory._loss

    def recorded(trainer: Any, mpo: Any, model: Any, batch: dict[str, Any], train_eval: str) -> Any:
        batches.append([batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")])
        return own(trainer, mpo, model, batch, train_eval)

    monkeypatch.setattr(llama_factory, "_loss", recorded)
    log = run("mpo", models["text"], tmp_path / "mpo", pairs, max_steps=10)
    truth = plain_runs.train(models["text"], batches, ntp_average="sequence")
    assert len(log) == len(truth) == 10
    for line, expected in zip(log, truth, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["reward_shift"] == pytest.approx(expected["reward_shift"], abs=1e-5)
        assert line["rewards/margins"] == pytest.approx(expected["reward_margin"], abs=1e-5)


def test_images_are_those_of_llama_factory(models: dict[str, Path], tmp_path: Path) -> None:
    pairs = tiny_models.pairs(images=True)
    settings: dict[str, Any] = {"template": "llava", "max_steps": 5}
    theirs = run("own", models["images"], tmp_path / "own", pairs, **settings)
    ours = run("mpo", models["images"], tmp_path / "mpo", pairs, **settings)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


def run_until_killed(model: str, out: str) -> None:
    run("mpo", Path(model), Path(out), tiny_models.pairs(), **SAVED)


def test_a_killed_run_resumes_as_the_uninterrupted_run(models: dict[str, Path], tmp_path: Path, pairs: Any) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    log = run("mpo", models["text"], whole, pairs, **SAVED)
    killed_runs.kill_in_step(6, "test_llama_factory", models["text"], out)
    assert json.loads((out / "checkpoint-3" / "reward_shift.json").read_text())["count"] == 3
    resumed = run("mpo", models["text"], out, pairs, resume_from_checkpoint=str(out / "checkpoint-3"), **SAVED)
    for name in ("loss", "grad_norm", "reward_shift"):
        assert [line[name] for line in resumed[-3:]] == [line[name] for line in log[-3:]]
    states = [json.loads((folder / "checkpoint-6" / "reward_shift.json").read_text()) for folder in (whole, out)]
    assert states[0] == states[1]
    assert states[0]["count"] == 6


def test_other_losses_stay_llama_factorys(
    models: dict[str, Path], tmp_path: Path, pairs: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "pref_loss": "simpo", "pref_bco_weight": 0.0}
    theirs = run("own", models["text"], tmp_path / "own", pairs, **settings)
    ours = run("mpo", models["text"], tmp_path / "mpo", pairs, **settings)
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert "keeps its own loss, because pref_loss must be 'sigmoid', got 'simpo'" in capfd.readouterr().err


def test_the_patch_is_undone() -> None:
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    before = dict(vars(CustomDPOTrainer))
    with patched("mpo"):
        assert dict(vars(CustomDPOTrainer)) != before
    assert dict(vars(CustomDPOTrainer)) == before
    with pytest.raises(RuntimeError, match="not patched"):
        mpo_ext.unpatch("llama-factory")
