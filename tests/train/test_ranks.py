"""Compares runs on two ranks with runs on one rank. The losses must be equal, and all ranks must have the same model.

Also tests that all ranks end if any rank ends.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits_run
import model_folders
import pytest
import torch
from run_recipe import Job, log_of, result_of, run, signal_at_forward, text_of

_BASE = {"optim__batch_size": 5, "optim__micro_batch_size": 2, "optim__epochs": 2, "output__save_every": 2}
_FILLED = {"optim__micro_batch_size": 1, "optim__micro_batch_tokens": 300}
# With these settings delta does not depend on the distribution of the pairs over ranks.
_SHIFT = {"reward_shift__mode": "ema", "reward_shift__update": "after", "reward_shift__per": "optimizer_step"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with eleven pairs for training and three for evaluation.

    The last step of an epoch has one pair. So one rank of two has no pair in this step.
    """
    folder = tmp_path_factory.mktemp("ranks")
    digits_run.write_pairs(folder / "train", 11, text_only=3)
    digits_run.write_pairs(folder / "eval", 3, seed=1)
    return folder


@pytest.fixture(scope="module")
def job_of(folder: Path) -> Callable[..., Job]:
    def job_of(out: str, world_size: int = 1, *, sharded: bool = False, **settings: Any) -> Job:
        settings = {**_BASE, **_SHIFT, "data__eval": [str(folder / "eval" / "pairs.jsonl")], **settings}
        return Job(folder / out, folder / "train" / "pairs.jsonl", settings, world_size=world_size, sharded=sharded)

    return job_of


@pytest.fixture(scope="module")
def single(job_of: Callable[..., Job]) -> Job:
    job = job_of("single")
    assert run(job) == [0], text_of(job)
    return job


def same(one: dict[str, Any], other: dict[str, Any], at_most: float) -> None:
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, other["weights"][name], atol=at_most, rtol=0, msg=name)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_learn_what_one_does(sharded: bool, job_of: Callable[..., Job], single: Job) -> None:
    job = job_of(f"two-{sharded}", 2, sharded=sharded, **_FILLED)
    assert run(job) == [0, 0], text_of(job)
    lines, expected = log_of(job), log_of(single)
    assert len(lines) == len(expected) == 7  # six steps and an evaluation
    assert text_of(job).count("checked on the first pairs") == 1  # one rank speaks
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name in other.keys() - {"micro_batches"}:  # the pairs of a step are distributed otherwise
            assert line[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
    first, second = result_of(job, 0), result_of(job, 1)
    same(first, second, 0.0)
    assert first["reward_shift"] == second["reward_shift"]
    same(first, result_of(single), 2e-5)


def test_fsdp2_finds_the_layers_of_a_model_that_names_missing_classes(folder: Path, tmp_path: Path) -> None:
    """LLaVA's ``_no_split_modules`` names layers of CLIP's text model, which LLaVA does not contain."""
    model = model_folders.write_llava(tmp_path / "llava")
    pairs = model_folders.write_pairs(tmp_path / "pairs", 6, images=True)
    settings = {**_BASE, **_SHIFT, "optim__epochs": 1, "output__save_every": 0}
    one = Job(tmp_path / "one", pairs, settings, model=model)
    two = dataclasses.replace(one, out=tmp_path / "two", world_size=2, sharded=True)
    assert run(one) == [0], text_of(one)
    assert run(two) == [0, 0], text_of(two)
    same(result_of(two), result_of(one), 2e-5)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_what_two_ranks_began_one_ends(sharded: bool, job_of: Callable[..., Job], single: Job) -> None:
    job = job_of(f"begun-{sharded}", 2, sharded=sharded, output__save_every=0)
    hook = functools.partial(signal_at_forward, 3, [signal.SIGTERM], 1)  # only one rank gets the signal
    assert run(dataclasses.replace(job, hook=hook)) == [143, 143], text_of(job)
    done = log_of(job)[-1]["step"]
    assert 0 < done < 6
    assert run(dataclasses.replace(job, world_size=1, sharded=False)) == [0], text_of(job)
    losses = [line["loss"] for line in log_of(job) if "loss" in line]
    assert losses == pytest.approx([line["loss"] for line in log_of(single) if "loss" in line], abs=1e-5)
    same(result_of(job), result_of(single), 2e-5)


def test_a_cumulative_shift_counts_each_rank(job_of: Callable[..., Job]) -> None:
    """Checks the authors' reward shift.

    Each micro-batch of each rank has a mean reward. The reward shift is the average of all these means so far.
    """
    settings = {
        "reward_shift__mode": "cumulative", "reward_shift__update": "before", "reward_shift__per": "micro_batch",
        "optim__batch_size": 4, "optim__max_steps": 3, "optim__warmup_ratio": 0, "data__eval": [],
    }  # fmt: skip
    job = job_of("cumulative", 2, **settings)
    assert run(job) == [0, 0], text_of(job)
    lines = log_of(job)
    means = []
    for line in lines:  # two ranks with two pairs each, in a micro-batch
        means += [(line["chosen_reward"] + line["rejected_reward"]) / 2] * 2 if line["pairs"] == 4 else []
        if line["pairs"] == 4:
            assert line["reward_shift"] == pytest.approx(sum(means) / len(means), abs=1e-6)
    assert len(means) >= 4
    assert lines[1]["reward_shift"] != 0


def test_log_probs_of_two_ranks_serve_one(job_of: Callable[..., Job], folder: Path, single: Job) -> None:
    kept = str(folder / "kept.jsonl")
    two = job_of("kept-two", 2, reference__kind="precomputed", reference__file=kept)
    assert run(two) == [0, 0], text_of(two)
    assert not list(folder.glob("kept.jsonl.part*"))
    one = job_of("kept-one", reference__kind="precomputed", reference__file=kept)
    assert run(one) == [0], text_of(one)
    assert "computed once" not in text_of(one)
    same(result_of(one), result_of(single), 2e-5)


def test_a_bad_pair_of_one_rank_ends_all(job_of: Callable[..., Job], folder: Path) -> None:
    source = folder / "train" / "pairs.jsonl"
    lines = source.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "images": ["gone.png"]})
    bad = source.with_name("bad.jsonl")
    bad.write_text("\n".join(lines) + "\n")
    job = dataclasses.replace(job_of("bad", 2), pairs=bad)
    assert run(job) == [1, 1]
    assert text_of(job).count("bad.jsonl:1") >= 2


def test_a_bad_evaluation_pair_of_one_rank_ends_all_after_a_checkpoint(
    job_of: Callable[..., Job], folder: Path
) -> None:
    source = folder / "eval" / "pairs.jsonl"
    lines = source.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "images": ["bad.png"]})
    (source.parent / "bad.png").write_bytes(b"no image")
    bad = source.with_name("bad.jsonl")
    bad.write_text("\n".join(lines) + "\n")
    job = job_of("bad-evaluation", 2, data__eval=[str(bad)], output__eval_every=1, output__save_every=0)
    assert run(job) == [1, 1], text_of(job)
    assert text_of(job).count("bad.jsonl:1") >= 2
    assert [path.name for path in (job.out / "checkpoints").iterdir()] == ["step-00000001"]


def test_micro_batches_of_two_ranks_are_averaged_as_the_authors_do(job_of: Callable[..., Job]) -> None:
    settings = {"loss__average_over": "micro_batch", "optim__micro_batch_size": 1, "data__eval": []}
    one, two = job_of("mean-one", **settings), job_of("mean-two", 2, **settings)
    assert run(one) == [0], text_of(one)
    assert run(two) == [0, 0], text_of(two)
    for line, other in zip(log_of(one), log_of(two), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    same(result_of(one), result_of(two), 2e-5)


def test_muon_on_shards_learns_what_it_does_on_one_rank(job_of: Callable[..., Job]) -> None:
    settings = {"optim__name": "muon", "optim__groups": {"projector": {"learning_rate": 2e-3}}, "data__eval": []}
    one, two = job_of("muon-one", **settings), job_of("muon-two", 2, sharded=True, **settings)
    assert run(one) == [0], text_of(one)
    assert run(two) == [0, 0], text_of(two)
    for line, other in zip(log_of(one), log_of(two), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)
    same(result_of(one), result_of(two), 1e-3)  # its products are in bfloat16
