"""Tests models that bring Python code: they are rejected unless the recipe has ``trust_remote_code``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_folders
import pytest
from digits_run import recipe

from mpo_ext.__main__ import main
from mpo_ext.plan.planner import plan
from mpo_ext.train.loop import Trainer
from mpo_ext.train.model import load_model

CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class OwnConfig(Qwen2Config):
    model_type = "own_qwen"


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    path = model_folders.write_qwen2(folder / "model") / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = "own_qwen"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    path.write_text(json.dumps(config))
    (folder / "model" / "own.py").write_text(CODE)
    model_folders.write_pairs(folder / "pairs", 6, images=False)
    return folder


def own_recipe(folder: Path, out: Path, **settings: Any) -> Any:
    common = {"model__path": str(folder / "model"), "optim__batch_size": 4, "optim__max_steps": 1}
    return recipe(out, folder / "pairs" / "pairs.jsonl", **common, **settings)


def test_code_does_not_run_unless_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    untrusted = own_recipe(folder, tmp_path / "no")
    for call in (lambda: load_model(untrusted.model), lambda: plan(untrusted), lambda: Trainer(untrusted)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            call()


def test_a_trusted_model_is_planned_trained_and_exported(folder: Path, tmp_path: Path) -> None:
    trusted = own_recipe(folder, tmp_path / "yes", model__trust_remote_code=True)
    assert plan(trusted).model_class == "OwnForCausalLM"
    trainer = Trainer(trusted)
    assert type(trainer.model).__name__ == "OwnForCausalLM"
    assert trainer.run() == 0
    assert (tmp_path / "yes" / "final" / "own.py").exists()


def test_a_reference_with_code_needs_the_same_trust(folder: Path, tmp_path: Path) -> None:
    model_folders.write_qwen2(folder / "plain")
    settings = {"model__path": str(folder / "plain"), "reference__path": str(folder / "model")}
    settings |= {"optim__batch_size": 4, "optim__max_steps": 1}
    pairs = folder / "pairs" / "pairs.jsonl"
    with pytest.raises(ValueError, match="trust_remote_code"):
        Trainer(recipe(tmp_path / "no", pairs, **settings))
    trainer = Trainer(recipe(tmp_path / "yes", pairs, **settings, model__trust_remote_code=True))
    assert type(trainer.reference_model).__name__ == "OwnForCausalLM"


def test_the_command_names_the_setting(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_recipe(folder, tmp_path / "run")
    assert main(["train", str(tmp_path / "run.yaml"), f"model.path={folder / 'model'}", "--dry-run"]) == 2
    assert "model.trust_remote_code=true does so" in capsys.readouterr().err
