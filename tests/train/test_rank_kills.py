"""Tests two ranks when one is killed: the launcher ends the other rank, and a rerun gives the same bits."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits_run
import pytest
import torch
from run_recipe import LIMIT_S, Job, die_at_event, finish, log_of, result_of, run, start, text_of
from safetensors.torch import load_file

KILLS = int(os.environ.get("MPO_KILLS", "2"))
SETTINGS = {
    "optim__batch_size": 5,
    "optim__micro_batch_size": 2,
    "optim__epochs": 2,
    "output__save_every": 1,
    "output__keep_last": 2,
}


def die_on_rank(victim: int, number: int | None, events: Path, rank: int) -> None:
    """Calls ``run_recipe.die_at_event`` with the other arguments if ``rank`` is ``victim``."""
    if rank == victim:
        die_at_event(number, events, rank)


def end_like_a_launcher(processes: list[Any]) -> list[int]:
    """Waits for all processes. If one fails, kills all processes, as torchrun does. Returns the exit codes."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and all(process.exitcode in (None, 0) for process in processes):
        if all(process.exitcode == 0 for process in processes):
            break
        time.sleep(0.02)
    if any(process.exitcode not in (None, 0) for process in processes):
        for process in processes:
            process.kill()
    return finish(processes)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_of_which_one_is_killed_end_with_the_same_bits(
    sharded: bool, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    digits_run.write_pairs(tmp_path / "train", 11, text_only=3)
    whole = Job(tmp_path / "whole", tmp_path / "train" / "pairs.jsonl", SETTINGS, world_size=2, sharded=sharded)
    hooks = [functools.partial(die_on_rank, rank, None, whole.beside(f"events{rank}")) for rank in range(2)]
    assert run(dataclasses.replace(whole, hook=hooks[0])) == [0, 0], text_of(whole)
    events = int(whole.beside("events0").read_text())
    assert events > 20
    rng, kills, attempt = random.Random(f"{sharded} {KILLS}"), 0, 0
    while kills < KILLS:
        job = dataclasses.replace(whole, out=tmp_path / f"killed-{attempt}")
        attempt += 1
        for _ in range(3):
            # The other rank has fewer events, because only the main process writes files.
            victim = rng.randrange(2)
            number = rng.randrange(events if victim == 0 else events // 3)
            hook = functools.partial(die_on_rank, victim, number, job.beside("events"))
            codes = end_like_a_launcher(start(dataclasses.replace(job, hook=hook)))
            if codes == [0, 0]:
                break
            assert codes[victim] == -signal.SIGKILL, text_of(job)
            kills += 1
        assert run(job) == [0, 0], text_of(job)
        assert_same(job, whole)
    record_property("cases", kills)


def assert_same(job: Job, whole: Job) -> None:
    """Checks that two runs agree bit for bit: parameters of both ranks, final model, log and reward shift."""
    for rank in range(2):
        ours, theirs = result_of(job, rank), result_of(whole, rank)
        assert [
            name for name, value in theirs["weights"].items() if not torch.equal(ours["weights"][name], value)
        ] == []
        assert ours["reward_shift"] == theirs["reward_shift"]
    ours, theirs = (load_file(one.out / "final" / "model.safetensors") for one in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_of(job) == log_of(whole)
