"""ms-swift's DPO with its own loss and with that of mpo_ext. ``make integrations`` runs this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("swift.rlhf_trainers", reason="make integrations runs this file in an environment with ms-swift")

import plain_runs
import tiny_models
from ms_swift_runs import NO_SHIFT, PADDING_FREE_WITH_SDPA, RECORD, run

PADDING_FREE = ("padding_free", "true", "attn_impl", "sdpa")
IMAGES = ("model_type", "llava1_5_hf", "template", "llava1_5_hf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_text_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pairs() -> Any:
    return tiny_models.pairs()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ten_steps_are_those_of_ms_swift(model: Path, tmp_path: Path, pairs: Any, tuning: str) -> None:
    theirs = run("own", model, tmp_path / "own", pairs, "tuner_type", tuning)
    ours = run("mpo", model, tmp_path / "mpo", pairs, "tuner_type", tuning)
    assert len(ours) == len(theirs) == 10
    for our_line, their_line in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "nll_loss"):
            assert our_line[name] == pytest.approx(their_line[name], rel=1e-5, abs=1e-5), name
        # ms-swift multiplies rewards by the sum of the loss weights.
        assert 2 * our_line["rewards/margins"] == pytest.approx(their_line["rewards/margins"], rel=1e-4, abs=1e-5)
    assert ours[-1]["reward_shift"] != 0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ten_steps_without_a_reward_shift_are_those_of_ms_swift(
    model: Path, tmp_path: Path, pairs: Any, tuning: str
) -> None:
    theirs = run("own", model, tmp_path / "own", pairs, "tuner_type", tuning, plugin=NO_SHIFT)
    ours = run("mpo", model, tmp_path / "mpo", pairs, "tuner_type", tuning, shift={"mode": "fixed"})
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert len(ours) == 10
    assert all(line["reward_shift"] == 0 for line in ours)


def test_the_authors_reward_shift_is_that_of_plain_float64(model: Path, tmp_path: Path, pairs: Any) -> None:
    path = tmp_path / "batches.jsonl"
    log = run("mpo", model, tmp_path / "mpo", pairs, plugin=RECORD.replace("BATCHES", str(path)))
    batches = [json.loads(line) for line in path.read_text().splitlines()]
    truth = plain_runs.train(model, batches)
    assert len(log) == len(truth) == 10
    for line, expected in zip(log, truth, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["reward_shift"] == pytest.approx(expected["reward_shift"], abs=1e-5)
        assert line["rewards/margins"] == pytest.approx(expected["reward_margin"], abs=1e-5)


def test_images_are_those_of_ms_swift(tmp_path: Path) -> None:
    model, pairs = tiny_models.save_image_model(tmp_path / "model"), tiny_models.pairs(images=True)
    theirs = run("own", model, tmp_path / "own", pairs, *IMAGES)
    ours = run("mpo", model, tmp_path / "mpo", pairs, *IMAGES)
    assert len(ours) == 10
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


def test_padding_free_batches_are_those_of_ms_swift_and_of_padded_batches(
    model: Path, tmp_path: Path, pairs: Any
) -> None:
    theirs = run("own", model, tmp_path / "own", pairs, *PADDING_FREE, plugin=PADDING_FREE_WITH_SDPA)
    ours = run("mpo", model, tmp_path / "mpo", pairs, *PADDING_FREE, plugin=PADDING_FREE_WITH_SDPA)
    padded = run("mpo", model, tmp_path / "padded", pairs)
    assert len(ours) == 10
    for other in (theirs, padded):
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in other], rel=1e-5)
    assert ours[-1]["reward_shift"] == pytest.approx(padded[-1]["reward_shift"], rel=1e-4)


@pytest.mark.parametrize("setting", [("packing", "true"), ("ld_alpha", "0.5")], ids=["packing", "ld_alpha"])
def test_what_is_not_supported_stays_ms_swifts(
    model: Path, tmp_path: Path, pairs: Any, setting: tuple[str, str]
) -> None:
    run("mpo", model, tmp_path / "mpo", pairs, "max_steps", 1, *PADDING_FREE, *setting, plugin=PADDING_FREE_WITH_SDPA)
    assert f"keeps its own loss, because {setting[0]} must be" in (tmp_path / "mpo.text").read_text()


def test_a_resumed_run_is_the_uninterrupted_run(model: Path, tmp_path: Path, pairs: Any) -> None:
    settings = ("max_steps", 6, "save_steps", 3)
    log = run("mpo", model, tmp_path / "out", pairs, *settings)
    checkpoint = next((tmp_path / "out").glob("**/checkpoint-3"))
    assert json.loads((checkpoint / "reward_shift.json").read_text())["count"] == 3
    resumed = run("mpo", model, tmp_path / "again", pairs, *settings, "resume_from_checkpoint", checkpoint)
    for name in ("loss", "reward_shift"):
        assert [line[name] for line in resumed[-3:]] == [line[name] for line in log[-3:]]


def test_other_losses_stay_ms_swifts(model: Path, tmp_path: Path, pairs: Any) -> None:
    settings = ("max_steps", 2, "loss_type", "hinge", "loss_weights", None)
    theirs = run("own", model, tmp_path / "own", pairs, *settings)
    ours = run("mpo", model, tmp_path / "mpo", pairs, *settings)
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    text = (tmp_path / "mpo.text").read_text()
    assert "keeps its own loss, because loss_type must be among sigmoid, bco_pair, sft, got hinge" in text
