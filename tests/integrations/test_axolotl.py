"""Tests axolotl's DPO trainer with axolotl's loss and with mpo_ext's loss.

``make integrations`` runs this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import tiny_models

import mpo_ext

trl = pytest.importorskip("trl", reason="needs the extra trl")


@pytest.fixture(scope="module")
def trainer_type() -> Any:
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("make integrations runs this file in an environment with axolotl")
    return load_trainer_type()


def load_trainer_type() -> Any:
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
    return loss_lines(trainer.state.log_history)


def loss_lines(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if "loss" in line]


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
    assert len(ours) == 10
    check_same_steps(ours, theirs)
    assert (dict(vars(trl.DPOTrainer)), dict(vars(trainer_type))) == before


def check_same_steps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5, abs=1e-5)
    assert "loss/dpo" in ours[0]
    assert "loss/dpo" not in theirs[0]


PLUGIN = """
import mpo_ext

mpo_ext.patch("axolotl")
from axolotl.integrations.base import BasePlugin


class MPOPlugin(BasePlugin):
    pass
"""


def train_with_command(model: Path, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    tiny_models.pairs().to_json(folder / "pairs.jsonl")
    Path(folder, "mpo_plugin.py").write_text(PLUGIN)
    data = {"path": "pairs.jsonl", "type": "chat_template.default", "field_messages": "prompt"}
    values: dict[str, Any] = {
        "base_model": str(model), "datasets": [data], "rl": "dpo", "dpo_loss_type": ["sigmoid", "bco_pair", "sft"],
        "dpo_loss_weights": [0.8, 0.2, 1.0], "sequence_len": 512, "micro_batch_size": 2, "max_steps": 4,
        "learning_rate": 1e-3, "logging_steps": 1, "output_dir": "out", "bf16": False, "seed": 0,
    }  # fmt: skip
    Path(folder, "axolotl.yaml").write_text(json.dumps({**values, **settings}))
    commands = Path(sys.executable).parent
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    command = [commands / "axolotl", "train", "axolotl.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((folder / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    return loss_lines(state["log_history"])


@pytest.mark.usefixtures("trainer_type")
def test_the_command_has_the_losses_of_axolotl(model: Path, tmp_path: Path) -> None:
    theirs = train_with_command(model, tmp_path / "theirs")
    ours = train_with_command(model, tmp_path / "ours", plugins=["mpo_plugin.MPOPlugin"])
    assert len(ours) == 4
    check_same_steps(ours, theirs)


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
