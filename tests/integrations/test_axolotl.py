"""Tests axolotl's DPO trainer with its own loss and with mpo_ext's. ``make integrations`` runs this file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import killed_runs
import pytest
import tiny_models
from bare_packages import add_bare_packages

import mpo_ext

trl = pytest.importorskip("trl", reason="needs the extra trl")


@pytest.fixture(scope="module")
def trainer_type() -> Any:
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("make integrations runs this file in an environment with axolotl")
    return load_trainer_type()


def load_trainer_type() -> Any:
    # The code of these packages needs GPUs and more packages than the trainer.
    trainers = ("axolotl.core", "axolotl.core.trainers", "axolotl.core.trainers.dpo")
    add_bare_packages("axolotl", *trainers, "axolotl.utils.data")
    tokens = ModuleType("axolotl.utils.data.utils")
    tokens.remove_double_bos_token = None  # type: ignore[attr-defined]  # the tokenizer here has no BOS token
    sys.modules.setdefault(tokens.__name__, tokens)
    return importlib.import_module("axolotl.core.trainers.dpo.trainer").AxolotlDPOTrainer


def train(
    trainer_type: Any, model: Path, folder: Path, *, resume: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    values: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 10, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "seed": 0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": None, "disable_tqdm": True, "optim": "adamw_torch",
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0],
    }  # fmt: skip
    config_type = importlib.import_module("axolotl.core.trainers.dpo.args").AxolotlDPOConfig
    args = config_type(**{**values, **settings})
    trainer = trainer_type(str(model), args=args, train_dataset=tiny_models.pairs())
    trainer.train(resume_from_checkpoint=resume)
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_text_model(tmp_path_factory.mktemp("models"))


def test_ten_steps_are_those_of_axolotl_and_the_patch_is_undone(
    trainer_type: Any, model: Path, tmp_path: Path
) -> None:
    theirs = train(trainer_type, model, tmp_path)
    before = dict(vars(trl.DPOTrainer)), dict(vars(trainer_type))
    mpo_ext.patch("axolotl")
    try:
        ours = train(trainer_type, model, tmp_path)
    finally:
        mpo_ext.unpatch("axolotl")
    assert len(ours) == len(theirs) == 10
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5, abs=1e-5)
    assert "loss/dpo" in ours[0]
    assert "loss/dpo" not in theirs[0]
    assert (dict(vars(trl.DPOTrainer)), dict(vars(trainer_type))) == before


SAVED: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def run_until_killed(model: str, folder: str) -> None:
    trainer_type = load_trainer_type()
    mpo_ext.patch("axolotl", reward_shift={"mode": "cumulative"})
    train(trainer_type, Path(model), Path(folder), **SAVED)


def test_a_killed_run_resumes_as_the_uninterrupted_run(trainer_type: Any, model: Path, tmp_path: Path) -> None:
    killed_runs.kill_in_step(6, "test_axolotl", model, tmp_path)
    assert json.loads((tmp_path / "checkpoint-3" / "reward_shift.json").read_text())["count"] == 3
    mpo_ext.patch("axolotl", reward_shift={"mode": "cumulative"})
    try:
        log = train(trainer_type, model, tmp_path / "whole", **SAVED)
        resumed = train(trainer_type, model, tmp_path, resume=True, **SAVED)
    finally:
        mpo_ext.unpatch("axolotl")
    assert log[-1]["reward_shift"] != 0
    for name in ("loss", "grad_norm", "reward_shift"):
        assert [line[name] for line in resumed] == [line[name] for line in log]
    folders = (tmp_path, tmp_path / "whole")
    states = [json.loads((folder / "checkpoint-6" / "reward_shift.json").read_text()) for folder in folders]
    assert states[0] == states[1]
    assert states[0]["count"] == 6
