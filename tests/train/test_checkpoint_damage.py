"""Tests that damage to any file of a checkpoint is detected, and that the run resumes from the older checkpoint."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from checkpoint_ranks import optimizer_of
from torch import nn

from mpo_ext.train.checkpoint import Checkpoints
from mpo_ext.train.checkpoint_files import CheckpointError

FILES = ("manifest.json", "state.json", "trainer.pt", "rng-00000.pt", "tensors/.metadata", "tensors/__0_0.distcp")


def flip(place: float) -> Callable[[Path, Path], None]:
    """Returns a function that flips a bit of a file, at the relative position ``place`` between 0 and 1."""

    def damage(file: Path, older: Path) -> None:
        content = bytearray(file.read_bytes())
        content[min(int(place * len(content)), len(content) - 1)] ^= 1 << random.Random(place).randrange(8)
        file.write_bytes(content)

    return damage


def cut(keep: float, *, more: int = 0) -> Callable[[Path, Path], None]:
    def damage(file: Path, older: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) + more])

    return damage


def zero_block(file: Path, older: Path) -> None:
    content = bytearray(file.read_bytes())
    middle, size = len(content) // 2, min(64, len(content) // 4)
    content[middle : middle + size] = bytes(size)
    file.write_bytes(content)


def exchange_blocks(file: Path, older: Path) -> None:
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[half:] + content[:half])


def append_byte(file: Path, older: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def take_older(file: Path, older: Path) -> None:
    shutil.copyfile(older, file)


def link_to_older(file: Path, older: Path) -> None:
    file.unlink()
    file.symlink_to(older)


def remove(file: Path, older: Path) -> None:
    file.unlink()


def replace_by_folder(file: Path, older: Path) -> None:
    file.unlink()
    file.mkdir()


def random_content(file: Path, older: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "first byte": flip(0.0),
    "byte at a third": flip(1 / 3),
    "byte at two thirds": flip(2 / 3),
    "last byte": flip(1.0),
    "empty": cut(0.0),
    "half": cut(0.5),
    "one byte less": cut(1.0, more=-1),
    "one byte more": append_byte,
    "zeros": zero_block,
    "blocks exchanged": exchange_blocks,
    "random bytes": random_content,
    "older file": take_older,
    "link to the older file": link_to_older,
    "missing": remove,
    "folder": replace_by_folder,
}


def fill(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    model(torch.full((1, 8), float(value))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_no_damage_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, Any], None]
) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator, model = accelerate.Accelerator(cpu=True), nn.Linear(8, 8)
    optimizer = optimizer_of(model)
    store = Checkpoints(tmp_path / "checkpoints")
    saved = []
    for step in (1, 2):
        fill(model, optimizer, step)
        torch.rand(step)  # another state of the generator
        saved.append(store.save(accelerator, step, model, optimizer, {"step": step}))
    older, newest = saved
    assert {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()} == set(FILES)
    shutil.copytree(newest, tmp_path / "intact")
    cases = 0
    for name in FILES:
        for kind, damage in DAMAGES.items():
            damage(newest / name, older / name)
            file, intact = newest / name, tmp_path / "intact" / name
            if not file.is_file() or file.read_bytes() != intact.read_bytes():
                cases += 1
                check_one(store, accelerator, older, newest, f"{name}: {kind}", caplog)
            shutil.rmtree(newest)
            shutil.copytree(tmp_path / "intact", newest)
    assert Checkpoints(store.folder).resolve(accelerator, "auto") == newest
    assert cases >= 80
    record_property("cases", cases)
    accelerate.state.AcceleratorState._reset_state(True)


def check_one(
    store: Checkpoints, accelerator: Any, older: Path, newest: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Asserts that a damaged checkpoint is rejected, and that ``resume="auto"`` takes the older checkpoint instead.

    The rejected load must not change the model.
    """
    other = nn.Linear(8, 8)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError):
        Checkpoints(store.folder).load(accelerator, newest, other, optimizer_of(other))
    assert all(map(torch.equal, before, other.parameters())), case
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(store.folder).resolve(accelerator, "auto") == older, case
    assert f"{newest} is left out" in caplog.text, case
    with pytest.raises(ValueError, match='resume must be "auto"'):
        Checkpoints(store.folder).resolve(accelerator, str(newest))
    Checkpoints(store.folder).load(accelerator, older, other, optimizer_of(other))
    assert all(bool((parameter == 1).all()) for parameter in other.parameters()), case
