"""Saves and resumes small training runs, in this process or on two ranks."""

from __future__ import annotations

import copy
import os
import random
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import VOCAB, text_model
from run_recipe import LIMIT_S, server
from torch import nn

from mpo_ext.train import checkpoint_state
from mpo_ext.train.checkpoint import Checkpoints
from mpo_ext.train.checkpoint_files import CheckpointError
from mpo_ext.train.export import export_model

RATE = 1e-2


def tied() -> nn.Module:
    torch.manual_seed(0)
    return text_model("Qwen2", tie_word_embeddings=True)


def with_adapters(base: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(base, config)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Returns an AdamW with two parameter groups: matrices with weight decay, vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE)


def train(model: nn.Module, optimizer: Any, steps: int, *, rank: int | None = None) -> None:
    """Trains on random tokens.

    With ``rank``, the seed of the tokens depends on the step and the rank. Without ``rank``, the random generators of
    Python, numpy and torch draw the seed.
    """
    for step in range(steps):
        if rank is None:
            torch.manual_seed(random.randrange(1 << 30) + int(np.random.randint(1 << 30)) + int(torch.randint(9, ())))
        else:
            torch.manual_seed(100 * step + rank)
        ids = torch.randint(VOCAB, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Returns unsharded copies of the parameters, the optimizer state and the parameter groups' settings, by name."""
    found = {}
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {parameter: name.removeprefix("module.") for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        found[name] = parameter
        found.update({f"{name}/{key}": value for key, value in inner.state.get(parameter, {}).items()})
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in found.items()}
    whole = {key: value.detach().clone() for key, value in whole.items()}
    for number, group in enumerate(inner.param_groups):
        whole[f"groups/{number}"] = torch.tensor([group["lr"], group["weight_decay"], *group["betas"], group["eps"]])
    return whole


def assert_same(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name in truth:
        assert ours[name].dtype == truth[name].dtype, name
        assert torch.equal(ours[name], truth[name]), name


# Two ranks. Each case is run by both; the folder is shared with the test, which has one process.


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    return model if model is inner else fully_shard(model, mesh=mesh)


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": data_parallel, "fsdp2": shard}


def save_by_two(accelerator: Any, folder: Path) -> None:
    """Tests checkpoints under DDP and FSDP2 on two ranks.

    Saves after two steps and trains another step. A resumed run must reach the same states.
    """
    for name, wrap in WRAPPERS.items():
        model = wrap(tied())
        optimizer = optimizer_of(model)
        train(model, optimizer, 2, rank=accelerator.process_index)
        with torch.no_grad():  # leaves the root of FSDP2 whole
            model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        store = Checkpoints(folder / name)
        random.seed(accelerator.process_index)
        path = store.save(accelerator, 2, model, optimizer, {"step": 2, "rank": accelerator.process_index})
        drawn = random.random(), np.random.random(), torch.rand(())
        truth = snapshot(model, optimizer)
        if accelerator.is_main_process:
            torch.save(truth, folder / f"{name}.truth")
        train(model, optimizer, 1, rank=accelerator.process_index)

        resumed = wrap(text_model("Qwen2", tie_word_embeddings=True))
        fresh = optimizer_of(resumed)
        assert store.load(accelerator, path, resumed, fresh) == {"step": 2, "rank": 0}
        assert (random.random(), np.random.random(), torch.rand(())) == drawn
        assert_same(snapshot(resumed, fresh), truth)
        train(resumed, fresh, 1, rank=accelerator.process_index)
        assert_same(snapshot(resumed, fresh), snapshot(model, optimizer))


def load_by_two(accelerator: Any, folder: Path) -> None:
    """Resumes a one-process checkpoint on two ranks, under DDP and under FSDP2."""
    truth = torch.load(folder / "single.truth")
    for wrap in WRAPPERS.values():
        model = wrap(text_model("Qwen2", tie_word_embeddings=True))
        optimizer = optimizer_of(model)
        torch.manual_seed(7)
        expected = torch.get_rng_state()
        Checkpoints(folder).load(accelerator, folder / "single" / "step-00000002", model, optimizer)
        assert torch.equal(torch.get_rng_state(), expected)
        assert_same(snapshot(model, optimizer), truth)


def adapters_by_two(accelerator: Any, folder: Path) -> None:
    """Saves a checkpoint of sharded LoRA adapters on a frozen base model."""
    model = shard(with_adapters(tied()))
    optimizer = optimizer_of(model)
    train(model, optimizer, 2, rank=accelerator.process_index)
    Checkpoints(folder / "adapters").save(accelerator, 2, model, optimizer, {})
    truth = snapshot(model, optimizer)
    if accelerator.is_main_process:
        torch.save(truth, folder / "adapters.truth")


def export_by_two(accelerator: Any, folder: Path) -> None:
    """Exports a model under DDP, a model under FSDP2, and a sharded model with adapters."""
    for name, wrap in WRAPPERS.items():
        model = wrap(tied())
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        export_model(accelerator, model, None, folder / f"export-{name}")
    base = tied()
    base.config._name_or_path = base.name_or_path = str(folder / "export-ddp")
    model = shard(with_adapters(base))
    model.peft_config["default"].base_model_name_or_path = str(folder / "export-ddp")
    accelerator.wait_for_everyone()
    export_model(accelerator, model, None, folder / "export-adapters", merged=True)


def one_rank_fails(accelerator: Any, folder: Path) -> None:
    """Checks that both ranks raise if rank 1 fails before or during the write of tensors, or in a load."""
    model = data_parallel(tied())
    optimizer = optimizer_of(model)
    store = Checkpoints(folder / "failing")
    good = store.save(accelerator, 1, model, optimizer, {})
    for target, name in ((checkpoint_state, "random_state"), (checkpoint_state.dcp.FileSystemWriter, "write_data")):
        original = getattr(target, name)
        if accelerator.process_index == 1:
            setattr(target, name, fail)
        try:
            with pytest.raises(CheckpointError) as caught:
                store.save(accelerator, 2, model, optimizer, {})
        finally:
            setattr(target, name, original)
        for words in ("OSError: no such luck (rank 1)", "was removed", f"the last good checkpoint is {good}"):
            assert words in str(caught.value)
        assert [path.name for path in store.folder.iterdir()] == [good.name]
    other = copy.deepcopy(model.module)
    if accelerator.process_index == 1:
        other.lm_head.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"^optimizer must have .* \(rank 1\)$"):
        store.load(accelerator, good, other, optimizer_of(other))


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError("no such luck")


CASES = {case.__name__: case for case in (save_by_two, load_by_two, adapters_by_two, export_by_two, one_rank_fails)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    accelerate.state.AcceleratorState._reset_state(True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name, case in CASES.items():
        try:
            case(accelerator, Path(folder))
            dist.barrier()
        except BaseException:
            Path(folder, f"{name}.error{rank}").write_text(traceback.format_exc())
            raise
        Path(folder, f"{name}.done{rank}").touch()
    dist.destroy_process_group()


def run_all(folder: Path) -> None:
    """Runs all cases on two ranks. The first failing case ends the run; its traceback is in a file."""
    server()
    ranks = mp.start_processes(worker, args=(str(folder),), nprocs=2, join=False, start_method="forkserver")
    end_s = time.monotonic() + LIMIT_S
    try:
        while not ranks.join(max(end_s - time.monotonic(), 1)):
            if time.monotonic() > end_s:
                for process in ranks.processes:
                    process.kill()
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        (folder / "end").write_text(str(error))
