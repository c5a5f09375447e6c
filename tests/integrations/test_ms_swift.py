"""Tests ms-swift's DPO with its own loss and with mpo_ext's. ``make integrations`` runs this file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("swift.rlhf_trainers", reason="make integrations runs this file in an environment with ms-swift")

import killed_runs
import plain_runs
import tiny_models
import torch
from ms_swift_runs import run, words, write_data
from swift.arguments import RLHFArguments

from mpo_ext.integrations import ms_swift

PADDING_FREE = ("padding_free", "true", "attn_impl", "sdpa")
IMAGES = ("model_type", "llava1_5_hf", "template", "llava1_5_hf")
SAVED = ("max_steps", 6, "save_strategy", "steps", "save_steps", 3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_text_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_image_model(tmp_path_factory.mktemp("image-models"))


@pytest.fixture(scope="module")
def pairs() -> Any:
    return tiny_models.pairs()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list to which the patched trainer appends its batches."""
    found: list[Any] = []
    own = ms_swift._loss

    def recorded(trainer: Any, mpo: Any, model: Any, batch: dict[str, Any], train_eval: str) -> Any:
        found.append([batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")])
        return own(trainer, mpo, model, batch, train_eval)

    monkeypatch.setattr(ms_swift, "_loss", recorded)
    return found


@pytest.fixture
def padding_free_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows padding-free batches with sdpa instead of flash attention, which needs a GPU."""
    monkeypatch.setattr(RLHFArguments, "_check_padding_free", lambda self: None)


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


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ten_steps_without_a_reward_shift_are_those_of_ms_swift(
    model: Path, image_model: Path, tmp_path: Path, tuning: str, images: bool
) -> None:
    settings = ("tuner_type", tuning, *(IMAGES if images else ()))
    start, pairs = image_model if images else model, tiny_models.pairs(images=images)
    theirs = run("own", start, tmp_path / "own", pairs, *settings, shift={"mode": "fixed"})
    ours = run("mpo", start, tmp_path / "mpo", pairs, *settings, shift={"mode": "fixed"})
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert len(ours) == 10
    assert all(line["reward_shift"] == 0 for line in ours)
    if tuning == "full":  # adapters move too little in ten steps
        shifted = run("own", start, tmp_path / "shifted", pairs, *settings)
        assert [line["loss"] for line in ours] != pytest.approx([line["loss"] for line in shifted], rel=1e-5)


def test_the_authors_reward_shift_is_that_of_plain_float64(
    model: Path, tmp_path: Path, pairs: Any, batches: list[Any]
) -> None:
    log = run("mpo", model, tmp_path / "mpo", pairs)
    truth = plain_runs.train(model, batches)
    assert len(log) == len(truth) == 10
    for line, expected in zip(log, truth, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["reward_shift"] == pytest.approx(expected["reward_shift"], abs=1e-5)
        assert line["rewards/margins"] == pytest.approx(expected["reward_margin"], abs=1e-5)


def test_images_are_those_of_ms_swift(image_model: Path, tmp_path: Path) -> None:
    pairs = tiny_models.pairs(images=True)
    theirs = run("own", image_model, tmp_path / "own", pairs, *IMAGES)
    ours = run("mpo", image_model, tmp_path / "mpo", pairs, *IMAGES)
    assert len(ours) == 10
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert ours[-1]["reward_shift"] != 0


@pytest.mark.usefixtures("padding_free_with_sdpa")
def test_padding_free_batches_are_those_of_ms_swift_and_of_padded_batches(
    model: Path, tmp_path: Path, pairs: Any
) -> None:
    theirs = run("own", model, tmp_path / "own", pairs, *PADDING_FREE)
    ours = run("mpo", model, tmp_path / "mpo", pairs, *PADDING_FREE)
    padded = run("mpo", model, tmp_path / "padded", pairs)
    assert len(ours) == 10
    for other in (theirs, padded):
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in other], rel=1e-5)
    assert ours[-1]["reward_shift"] == pytest.approx(padded[-1]["reward_shift"], rel=1e-4)


@pytest.mark.usefixtures("padding_free_with_sdpa")
@pytest.mark.parametrize("setting", [("packing", "true"), ("ld_alpha", "0.5")], ids=["packing", "ld_alpha"])
def test_what_is_not_supported_stays_ms_swifts(
    model: Path, tmp_path: Path, pairs: Any, setting: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    run("mpo", model, tmp_path / "mpo", pairs, "max_steps", 1, *PADDING_FREE, *setting)
    assert f"keeps its own loss, because {setting[0]} must be" in capfd.readouterr().err


def test_an_evaluation_logs_the_terms_and_leaves_the_reward_shift(model: Path, tmp_path: Path, pairs: Any) -> None:
    evaluating = ("val_dataset", tmp_path / "pairs.jsonl", "eval_strategy", "steps", "eval_steps", 2)
    log = run("mpo", model, tmp_path / "mpo", pairs, "max_steps", 4, *evaluating)
    evaluations = [
        line for line in map(json.loads, (tmp_path / "mpo" / "logging.jsonl").read_text().splitlines())
        if "eval_loss/dpo" in line
    ]  # fmt: skip
    without = run("mpo", model, tmp_path / "without", pairs, "max_steps", 4)
    assert len(evaluations) == 2
    assert evaluations[0]["eval_reward_shift"] == pytest.approx(log[1]["reward_shift"])
    assert [line["reward_shift"] for line in log] == [line["reward_shift"] for line in without]


def run_until_killed(model: str, out: str) -> None:
    run("mpo", Path(model), Path(out), tiny_models.pairs(), *SAVED)


def test_a_killed_run_resumes_as_the_uninterrupted_run(model: Path, tmp_path: Path, pairs: Any) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    log = run("mpo", model, whole, pairs, *SAVED)
    killed_runs.kill_in_step(6, "test_ms_swift", model, out)
    assert json.loads((out / "checkpoint-3" / "reward_shift.json").read_text())["count"] == 3
    run("mpo", model, out, pairs, *SAVED, "resume_from_checkpoint", out / "checkpoint-3")
    resumed = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    resumed = [line for line in resumed if "loss" in line][-3:]
    for name in ("loss", "grad_norm", "reward_shift"):
        assert [line[name] for line in resumed] == [line[name] for line in log[-3:]]
    states = [json.loads((folder / "checkpoint-6" / "reward_shift.json").read_text()) for folder in (whole, out)]
    assert states[0] == states[1]
    assert states[0]["count"] == 6


def test_other_losses_stay_ms_swifts(
    model: Path, tmp_path: Path, pairs: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("max_steps", 2, "loss_type", "hinge", "loss_weights", None)
    theirs = run("own", model, tmp_path / "own", pairs, *settings)
    ours = run("mpo", model, tmp_path / "mpo", pairs, *settings)
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    text = capfd.readouterr().err
    assert "keeps its own loss, because loss_type must be among sigmoid, bco_pair, sft, got hinge" in text


def start(model: Path, out: Path, pairs: Any, plugin: str, *arguments: Any, ranks: int = 1) -> str:
    """Runs the command line of ms-swift with a plugin. Returns its output."""
    write_data(out.parent / "pairs.jsonl", pairs)
    path = out.with_name(f"{out.name}_plugin.py")
    path.write_text(plugin)
    command = [sys.executable, "-m", "swift.cli.rlhf", *words(model, out, *arguments, "external_plugins", path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"NPROC_PER_NODE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=out.parent)
    assert done.returncode != -signal.SIGKILL
    return done.stdout + done.stderr


def test_a_plugin_patches_the_command_line(model: Path, tmp_path: Path, pairs: Any) -> None:
    plugin = "import mpo_ext\n\nmpo_ext.patch('ms-swift')\n"
    text = start(model, tmp_path / "plugin", pairs, plugin, "max_steps", 2)
    assert "ms-swift 4.6.0 patched: rlhf_type dpo" in text, text[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "plugin" / "logging.jsonl").read_text().splitlines()]
    log = run("mpo", model, tmp_path / "mpo", pairs, "max_steps", 2)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx([line["loss"] for line in log])
