"""Tests the reward shift over two ranks (two local processes with gloo)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mpo_ext import RewardShift, mpo_loss

STEPS = 3


def make_batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (logits, labels, ref_logp) of a rank's batch: one pair on rank 0, two pairs on rank 1.

    In the last step, the rejected responses of rank 1 have no labels, so rank 1 has no complete pair.
    """
    generator = torch.Generator().manual_seed(10 * rank + step)
    sequences = 4 if rank else 2
    logits = 2 * torch.randn(sequences, 5, 31, generator=generator)
    labels = torch.randint(31, (sequences, 5), generator=generator)
    if rank and step == STEPS - 1:
        labels[sequences // 2 :] = -100
    return logits, labels, -15 - 5 * torch.rand(sequences, generator=generator)


def worker(rank: int, folder: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shift = RewardShift(**settings)
    log = []
    for step in range(STEPS):
        logits, labels, ref_logp = make_batch(rank, step)
        out = mpo_loss(logits.requires_grad_(), labels, ref_logp, reward_shift=shift)
        log.append({"used": out.reward_shift.item()})
        shift.step()
        log[-1]["value"] = shift.value
    Path(folder, f"{rank}.json").write_text(json.dumps(log))
    dist.destroy_process_group()


def rewards(rank: int, step: int) -> list[float]:
    """Returns the rewards of a rank's complete pairs in a step."""
    logits, labels, ref_logp = make_batch(rank, step)
    out = mpo_loss(logits, labels, ref_logp, backend="reference")
    has_both = (out.tokens.chunk(2)[0] > 0) & (out.tokens.chunk(2)[1] > 0)
    return [*out.chosen_reward[has_both].tolist(), *out.rejected_reward[has_both].tolist()]


def expected(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Returns two values of the reward shift for each step: "used" in the loss, and "value" after the step.

    By default, a step has one mean reward for each rank. The shift is the average of all these means so far. With
    "ema" or "optimizer_step", a step has a single mean over the rewards of both ranks.
    """
    value, log, means = 0.0, [], []
    for step in range(STEPS):
        before = value
        by_rank = [rewards(rank, step) for rank in range(2)]
        pooled = by_rank[0] + by_rank[1]
        if settings.get("mode") == "ema":
            value = settings["decay"] * value + (1 - settings["decay"]) * sum(pooled) / len(pooled)
        elif settings.get("per") == "optimizer_step":
            means.append(sum(pooled) / len(pooled))
            value = sum(means) / len(means)
        else:
            means += [sum(values) / len(values) for values in by_rank if values]
            value = sum(means) / len(means)
        log.append({"used": value if settings.get("update", "before") == "before" else before, "value": value})
    return log


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update": "after"},
        {"mode": "ema", "decay": 0.5, "update": "after"},
        {"update": "after", "per": "optimizer_step"},
    ],
    ids=str,
)
def test_two_ranks_agree_on_the_reward_shift_of_both(tmp_path: Path, settings: dict[str, Any]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(worker, args=(str(tmp_path), settings), nprocs=2)
    logs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for ours, truth in zip(logs[0], expected(settings), strict=True):
        assert ours["used"] == pytest.approx(truth["used"], rel=1e-5, abs=1e-6)
        assert ours["value"] == pytest.approx(truth["value"], rel=1e-5, abs=1e-6)
    assert [entry["value"] for entry in logs[0]] == [entry["value"] for entry in logs[1]]
