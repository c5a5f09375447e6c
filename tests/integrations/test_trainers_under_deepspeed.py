"""Tests MPOTrainer and MPOLossMixin under DeepSpeed on two ranks.

MPOTrainer is compared with TRL's DPOTrainer, which also runs under DeepSpeed. A Trainer with MPOLossMixin is compared
with the same Trainer under DDP.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import test_hf_trainer
import tiny_models
import torch
import transformers
import two_ranks

if os.environ.get("CI") != "true":
    for package in ("trl", "deepspeed"):
        pytest.importorskip(package, reason="needs the extras trl and deepspeed, which dev installs")

from accelerate.state import DistributedType, PartialState
from test_trl_trainer import SAME_NAMES, make, train
from trl import DPOTrainer

from mpo_ext import RewardShift
from mpo_ext.integrations.trl import MPOTrainer
from mpo_ext.train.encode import Encoder

# Fields of the log that DeepSpeed defines in the same way for both trainers.
_NAMES = sorted({*SAME_NAMES} - {"rewards/accuracies"})


def _join(rank: int, folder: str, stage: int) -> dict[str, Any]:
    """Makes this process one of two ranks that train under DeepSpeed on a CPU. Returns the DeepSpeed settings."""
    two_ranks.join(rank, folder)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # tests of the same process set it; DeepSpeed is then ignored
    torch.distributed.init_process_group("gloo")
    # On a CPU, accelerate knows no backend for DeepSpeed, and would count one process.
    PartialState._prepare_backend = lambda self, cpu=False, *_: (
        "gloo", DistributedType.MULTI_CPU if cpu else DistributedType.NO
    )  # fmt: skip
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }


def _rank(rank: int, folder: str, model: str, family: str, stage: int, lora: bool) -> None:
    config = _join(rank, folder, stage)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = {"max_steps": 4, "use_cpu": False, "deepspeed": config, "lora": lora}
    models, logs = {family: Path(model)}, {}
    runs: dict[str, tuple[type, dict[str, Any]]] = {
        "theirs": (DPOTrainer, {}),
        "ours": (MPOTrainer, {"shift": RewardShift("fixed")}),
        "whole": (MPOTrainer, {"save_strategy": "steps", "save_steps": 2}),
        "resumed": (MPOTrainer, {}),
    }
    for name, (kind, options) in runs.items():
        trainer = make(kind, models, family, Path(folder, "out"), **settings, **options)
        resume = {"resume_from_checkpoint": str(Path(folder, "out", "checkpoint-2"))} if name == "resumed" else {}
        logs[name] = train(trainer, **resume)
        assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        assert trainer.accelerator.num_processes == 2
        if kind is MPOTrainer:
            logs[f"shift of {name}"] = trainer.reward_shift.state_dict()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(logs))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("family", "stage", "lora"), [("text", 2, True), ("text", 3, False), ("images", 3, False)])
def test_two_ranks_are_those_of_trl_and_resume(family: str, stage: int, lora: bool, tmp_path: Path) -> None:
    save = {"text": tiny_models.save_text_model, "images": tiny_models.save_image_model}[family]
    model = save(tmp_path / "model")
    two_ranks.spawn(_rank, tmp_path, str(model), family, stage, lora)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert len(first["theirs"]) == 4
    for ours, theirs in zip(first["ours"], first["theirs"], strict=True):
        for name in _NAMES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert [line["loss"] for line in first["resumed"]] == [line["loss"] for line in first["whole"]]
    shift = first["shift of whole"]
    assert shift["count"] == 8, "each of two ranks counts in each of four steps"
    assert shift["value"] != 0
    assert first["shift of resumed"] == second["shift of resumed"] == second["shift of whole"] == shift


def _pair_rank(rank: int, folder: str, model: str) -> None:
    config = _join(rank, folder, stage=3)
    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(model))
    samples = test_hf_trainer.make_samples(encoder)
    runs = {"ddp": {"use_cpu": True}, "zero3": {"use_cpu": False, "deepspeed": config}}
    logs = {}
    for name, settings in runs.items():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        policy = peft.get_peft_model(test_hf_trainer.load(Path(model)), lora)
        if name == "zero3":
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        trainer = test_hf_trainer.make(
            policy, encoder, samples, Path(folder, "out"), learning_rate=1e-2, gradient_accumulation_steps=1,
            **settings,
        )  # fmt: skip
        logs[name] = [line["loss"] for line in train(trainer)]
        assert (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine") == (name == "zero3")
        assert trainer.accelerator.num_processes == 2
        logs[f"shift of {name}"] = trainer.reward_shift.value
    Path(folder, f"rank{rank}.json").write_text(json.dumps(logs))
    torch.distributed.destroy_process_group()


def test_the_mixin_trains_adapters_under_zero3_as_under_ddp(tmp_path: Path) -> None:
    two_ranks.spawn(_pair_rank, tmp_path, str(tiny_models.save_text_model(tmp_path / "model")))
    logs = json.loads((tmp_path / "rank0.json").read_text())
    assert logs["zero3"] == pytest.approx(logs["ddp"], rel=1e-5)
    assert logs["zero3"][-1] < logs["zero3"][0]
    assert logs["shift of zero3"] == pytest.approx(logs["shift of ddp"], rel=1e-4)
