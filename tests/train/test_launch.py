"""Tests the config files in ``recipes/accelerate`` with accelerate's launcher, on two ranks without a GPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import model_folders
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from run_recipe import ENVIRONMENT
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
ALL = os.environ.get("MPO_DEEPSPEED_ALL") == "1"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    settings = {
        "model": {"path": str(model_folders.write_llava(folder / "llava"))},
        "data": {"train": str(model_folders.write_pairs(folder / "pairs", 8, images=True))},
        "optim": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
        "reward_shift": {"update": "after", "per": "optimizer_step"},
        "output": {"dir": str(folder / "out"), "save_every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return path


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def train(recipe: Path, out: Path, launcher: list[str]) -> Path:
    command = [sys.executable, *launcher, "-m", "mpo_ext.train", str(recipe), f"output.dir={out}"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree" in done.stderr
    return out


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_config_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")


@pytest.mark.skipif(not ALL, reason="part of make deepspeed-check")
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_config_file_works_as_it_stands(recipe: Path, tmp_path: Path, name: str) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{name}.yaml")]
    launcher += ["--num_processes", "2", "--main_process_port", free_port()]
    one, two = train(recipe, tmp_path / "one", []), train(recipe, tmp_path / "two", launcher)
    weights, truth = (load_file(out / "final" / "model.safetensors") for out in (two, one))
    assert weights.keys() == truth.keys()
    for key, value in truth.items():
        assert (weights[key] - value).abs().max() < 1e-5, key


@pytest.mark.skipif(not ALL, reason="part of make deepspeed-check")
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines(recipe: Path, tmp_path: Path, launcher: str) -> None:
    """Runs the command of docs/how-to/cluster.md twice on this machine, once for each of two machine numbers."""
    port, processes = free_port(), []
    for number in range(2):
        if launcher == "accelerate":
            start = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "fsdp2.yaml")]
            start += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(number)]
            start += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        else:
            start = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            start += ["--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", port]
        command = [sys.executable, *start, "-m", "mpo_ext.train", str(recipe), f"output.dir={tmp_path / 'two'}"]
        processes.append(
            subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True)
        )
    texts = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "agree" in "".join(texts)
    assert load_file(tmp_path / "two" / "final" / "model.safetensors")
