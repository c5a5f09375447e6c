"""Tests that killed or signalled runs resume, and end with the same bits as an uninterrupted run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import digits_run
import pytest
import torch
from run_recipe import (
    Job,
    all_of,
    count_reference_pairs,
    die_at_event,
    finish,
    log_of,
    program,
    result_of,
    run,
    signal_at_forward,
    start,
    text_of,
    write_text_run,
)
from safetensors.torch import load_file

from mpo_ext.train.export import is_exported, mark_exported

KILLS = int(os.environ.get("MPO_KILLS", "3"))
SEED = os.environ.get("MPO_KILLS", "0")
INTERRUPTED = 143
_BASE = {
    "optim__batch_size": 5,
    "optim__micro_batch_size": 2,
    "optim__epochs": 2,
    "output__save_every": 2,
    "data__group_prompts": False,
}
# They differ in the reference, the reward shift, and other parts with a state.
RUNS: dict[str, dict[str, Any]] = {
    "copy": {"output__keep_last": 1},
    "adapter": {
        "model__lora__rank": 2,
        "model__lora__dropout": 0.1,
        "reward_shift__mode": "ema",
        "reward_shift__decay": 0.7,
        "output__save_every": 1,
    },
    "precomputed": {
        "reference__kind": "precomputed",
        "reward_shift__mode": "ema",
        "reward_shift__update": "after",
        "reward_shift__per": "optimizer_step",
    },
    "moving": {
        "reference__sync_every": 2,
        "reference__sync_mix": 0.5,
        "output__save_every": 3,
        "reward_shift__update": "after",
        "reward_shift__per": "optimizer_step",
    },
    "fixed": {
        "reward_shift__mode": "fixed",
        "reward_shift__value": 0.3,
        "loss__average_over": "micro_batch",
        "loss__shared_prefix": False,
        "model__freeze": ["vision_tower"],
    },
    "after": {
        "reward_shift__update": "after",
        "loss__from_logits": True,
        "data__group_prompts": True,
        "optim__micro_batch_size": 1,
        "optim__micro_batch_tokens": 300,
    },
}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with twelve pairs for training and four for evaluation. The last step of an epoch is short."""
    folder = tmp_path_factory.mktemp("resume")
    digits_run.write_pairs(folder / "train", 12, text_only=3)
    digits_run.write_pairs(folder / "eval", 4, seed=1)
    return folder


@pytest.fixture(scope="module")
def job_of(folder: Path) -> Callable[..., Job]:
    def job_of(out: str, name: str = "copy", **settings: Any) -> Job:
        evaluation = {"data__eval": [str(folder / "eval" / "pairs.jsonl")], "output__eval_every": 2}
        settings = {**_BASE, **(evaluation if name == "copy" else {}), **RUNS[name], **settings}
        return Job(folder / "runs" / out, folder / "train" / "pairs.jsonl", settings)

    return job_of


@pytest.fixture(scope="module")
def whole(job_of: Callable[..., Job]) -> Callable[[str], Job]:
    """Returns a function that takes a job's name, and runs the job without interruption. The results are cached.

    The number of events in the run, such as optimizer updates, is written to the job's file ``.events``.
    """

    @functools.lru_cache(None)
    def whole(name: str) -> Job:
        job = job_of(f"{name}-whole", name)
        hook = functools.partial(die_at_event, None, job.beside("events"))
        began_s = time.monotonic()
        assert run(dataclasses.replace(job, hook=hook)) == [0], text_of(job)
        job.beside("seconds").write_text(str(time.monotonic() - began_s))
        assert [line["step"] for line in log_of(job) if "loss" in line] == [1, 2, 3, 4, 5, 6]
        return job

    return whole


def assert_same(job: Job, truth: Job) -> None:
    """Checks that two runs have the same exported weights, log, reward shift and checkpoints."""
    names = [path.name for path in sorted((truth.out / "final").glob("*.safetensors"))]
    assert names
    for name in names:
        ours, theirs = (load_file(one.out / "final" / name) for one in (job, truth))
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert log_of(job) == log_of(truth)
    assert result_of(job)["reward_shift"] == result_of(truth)["reward_shift"]
    assert checkpoints(job) == checkpoints(truth)


def checkpoints(job: Job) -> dict[str, float | None]:
    """Returns a dict from the names of a run's checkpoints to their scores."""
    folders = [path for path in (job.out / "checkpoints").glob("step-*") if "." not in path.name]
    return {path.name: json.loads((path / "manifest.json").read_text())["score"] for path in folders}


def kill_repeatedly(name: str, job_of: Callable[..., Job], truth: Job, kills: int) -> Counter[str]:
    """Kills and resumes runs, ``kills`` times in all, and checks that each run ends like ``truth``.

    Some kills are right before a random event, others at a random time. Returns two counts: the kills during the write
    of a checkpoint, and all other kills.
    """
    rng = random.Random(f"{name} {SEED}")
    events, seconds = int(truth.beside("events").read_text()), float(truth.beside("seconds").read_text())
    done: Counter[str] = Counter()
    for attempt in range(4 * kills + 4):
        job = job_of(f"{name}-killed-{attempt}", name)
        for _ in range(3):
            if sum(done.values()) >= kills:
                break
            by_clock = rng.random() < 0.3
            number = None if by_clock else rng.randrange(events)
            hook = functools.partial(die_at_event, number, job.beside("events"))
            processes = start(dataclasses.replace(job, hook=hook))
            if by_clock:
                processes[0].join(rng.uniform(0.1, 1) * seconds)
                processes[0].kill()
            (code,) = finish(processes)
            assert code in (0, -signal.SIGKILL), text_of(job)
            if code == 0:
                break
            checkpoints_seen = job.out / "checkpoints"
            writes = checkpoints_seen.exists() and any(".tmp-" in path.name for path in checkpoints_seen.iterdir())
            done["in a checkpoint's write" if writes else "elsewhere"] += 1
        assert run(job) == [0], text_of(job)
        assert_same(job, truth)
        if sum(done.values()) >= kills:
            break
    print(f"{name}: {dict(done)}")
    return done


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_bits(
    name: str, job_of: Callable[..., Job], whole: Callable[[str], Job], record_property: Callable[[str, Any], None]
) -> None:
    done = kill_repeatedly(name, job_of, whole(name), KILLS)
    assert sum(done.values()) >= KILLS
    record_property("cases", sum(done.values()))


def test_the_compared_runs_have_learned(whole: Callable[[str], Job], folder: Path) -> None:
    ends = [result_of(whole(name)) for name in ("copy", "after", "moving")]
    begin = digits_run.weights(digits_run.tiny()[0])
    for end in ends:
        assert not [name for name, value in end["weights"].items() if torch.equal(value, begin[name])]
    assert not torch.equal(*(ends[place]["weights"]["model.language_model.norm.weight"] for place in (0, 2)))
    assert len({round(result_of(whole(name))["reward_shift"]["value"], 9) for name in RUNS}) == len(RUNS)


@pytest.mark.parametrize("at", ["rename", "fsync", "manifest"])
def test_a_kill_in_the_write_of_a_checkpoint(at: str, job_of: Callable[..., Job], whole: Callable[[str], Job]) -> None:
    job = job_of(f"write-{at}", "copy")
    assert run(dataclasses.replace(job, hook=functools.partial(die_in_write, at, 2))) == [-signal.SIGKILL]
    assert any(".tmp-" in path.name for path in (job.out / "checkpoints").iterdir())
    assert run(job) == [0], text_of(job)
    assert "after step 2" in text_of(job)
    assert_same(job, whole("copy"))


def die_in_write(at: str, number: int, rank: int) -> None:
    """Makes the process kill itself while it writes its checkpoint ``number``, counted from 1.

    The process dies right before the step ``at`` of the write: "rename", "fsync" or "manifest".
    """
    from mpo_ext.train import checkpoint

    target, name = {
        "rename": (checkpoint, "move_into_place"),
        "fsync": (checkpoint, "sync_tree"),
        "manifest": (checkpoint.Checkpoints, "_publish"),
    }[at]
    original = getattr(target, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(target, name, dying)


# Precomputed log-probs


def test_a_kill_while_log_probs_are_computed_costs_the_current_batch(
    job_of: Callable[..., Job], whole: Callable[[str], Job], folder: Path
) -> None:
    job = job_of("once", "precomputed")
    computed = job.beside("computed")
    count = functools.partial(count_reference_pairs, computed)
    rng = random.Random(SEED)
    kills = 0
    for number in range(KILLS):
        # The folder of the run, the journal and its header come before the first batch.
        hook = functools.partial(
            all_of, [count, functools.partial(die_in_precompute, rng.randrange(1, 4) if number else 2)]
        )
        (code,) = run(dataclasses.replace(job, hook=hook))
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        assert not (job.out / "reference.jsonl").exists()
    assert kills
    assert run(dataclasses.replace(job, hook=count)) == [0], text_of(job)
    twice = [pair for pair, times in Counter(computed.read_text().split()).items() if times > 1]
    assert len(twice) <= kills * job.settings["optim__micro_batch_size"]
    assert (job.out / "reference.jsonl").read_bytes() == (whole("precomputed").out / "reference.jsonl").read_bytes()
    assert sorted(path.name for path in job.out.glob("reference.jsonl*")) == ["reference.jsonl"]
    assert_same(job, whole("precomputed"))


def die_in_precompute(number: int, rank: int) -> None:
    """Makes the process kill itself before it saves the reference log-probs of batch ``number``, counted from 1."""
    from mpo_ext.train import reference_file as reference

    original = reference.Journal.append
    calls = 0

    def dying(self: Any, records: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, records)

    reference.Journal.append = dying


# Signals


@pytest.mark.parametrize(("name", "forward"), [("copy", 4), ("copy", 17), ("adapter", 7), ("moving", 10)])
def test_sigterm_ends_after_the_current_step_and_the_run_resumes(
    name: str, forward: int, job_of: Callable[..., Job], whole: Callable[[str], Job]
) -> None:
    job = job_of(f"{name}-term-{forward}", name)
    hook = functools.partial(signal_at_forward, forward, [signal.SIGTERM], None)
    assert run(dataclasses.replace(job, hook=hook)) == [INTERRUPTED], text_of(job)
    match = re.search(r"SIGTERM: ended after step (\d) of 6; the same command resumes from here", text_of(job))
    assert match, text_of(job)
    step = int(match[1])
    assert max(checkpoints(job)) == f"step-{step:08d}"
    assert log_of(job)[-1]["step"] == step
    assert not (job.out / "final").exists()
    assert run(job) == [0], text_of(job)
    assert f"step-{step:08d} after step {step}" in text_of(job)
    assert_same_but_extra_checkpoints(job, whole(name))


def assert_same_but_extra_checkpoints(job: Job, truth: Job) -> None:
    """Compares two runs. Checkpoints that only one run has are ignored, such as a checkpoint made by a signal."""
    ours, theirs = checkpoints(job), checkpoints(truth)
    assert max(ours) == max(theirs)
    assert all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    for name in ours.keys() ^ theirs.keys():
        for path in (one.out / "checkpoints" / name for one in (job, truth)):
            if path.exists():
                path.rename(path.with_name(f"{name}.aside"))
    try:
        assert_same(job, truth)
    finally:
        for one in (job, truth):
            for path in (one.out / "checkpoints").glob("*.aside"):
                path.rename(path.with_suffix(""))


def test_a_second_sigint_ends_at_once(job_of: Callable[..., Job], whole: Callable[[str], Job]) -> None:
    job = job_of("int", "copy")
    hook = functools.partial(signal_at_forward, 4, [signal.SIGINT, signal.SIGINT], None)  # in step 2
    assert run(dataclasses.replace(job, hook=hook)) == [1]
    assert "KeyboardInterrupt" in text_of(job)
    assert not checkpoints(job)
    hook = functools.partial(signal_at_forward, 4, [signal.SIGINT], None)
    assert run(dataclasses.replace(job, hook=hook)) == [128 + signal.SIGINT]
    assert "SIGINT: ended after step 2 of 6" in text_of(job)
    assert run(job) == [0], text_of(job)
    assert_same_but_extra_checkpoints(job, whole("copy"))


def test_signals_and_kills_with_workers(job_of: Callable[..., Job], whole: Callable[[str], Job]) -> None:
    """Sends the signal to the run and also to its data workers. Clusters and terminals do the same."""
    job = job_of("workers", "after", data__workers=1)
    hook = functools.partial(signal_group_at_forward, 1, signal.SIGTERM)  # each step has one micro-batch
    assert run(dataclasses.replace(job, hook=hook)) == [INTERRUPTED], text_of(job)
    assert "SIGTERM: ended after step 2 of 6" in text_of(job)
    hook = functools.partial(die_in_write, "fsync", 1)
    assert run(dataclasses.replace(job, hook=hook)) == [-signal.SIGKILL]
    assert run(job) == [0], text_of(job)
    assert_same(job, whole("after"))


def signal_group_at_forward(number: int, one: int, rank: int) -> None:
    from mpo_ext.train import batch_loss

    os.setpgid(0, 0)
    original, passes = batch_loss.mpo_loss, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        if passes == number:
            os.killpg(0, one)
            time.sleep(0.5)
        passes += 1
        return original(*args, **kwargs)

    batch_loss.mpo_loss = counted


# The checkpoint that a run resumes from


def test_a_resumed_run_must_be_the_same_run(job_of: Callable[..., Job], whole: Callable[[str], Job]) -> None:
    again = job_of("same", "copy", output__resume="never")
    shutil.copytree(whole("copy").out, again.out)
    before = again.out.stat().st_mtime_ns
    assert run(again) == [1]
    assert 'resume must be "auto" or a checkpoint if the folder has a checkpoint' in text_of(again)
    changed = job_of("same", "copy", optim__learning_rate=2e-3, loss__beta=0.2, data__workers=0)
    assert run(changed) == [1]
    for words in (
        "optim.learning_rate was 0.001, is 0.002\n",
        "loss.beta was 0.1, is 0.2\n",
        "use another output.dir",
    ):
        assert words in text_of(changed)
    assert again.out.stat().st_mtime_ns == before
    assert run(job_of("never", "copy", output__resume="never", optim__max_steps=1)) == [0]


def test_a_run_resumes_from_the_named_checkpoint(job_of: Callable[..., Job], whole: Callable[[str], Job]) -> None:
    job = job_of("named", "copy", output__keep_last=9)
    assert run(job) == [0], text_of(job)
    path = job.out / "checkpoints" / "step-00000002"
    named = job_of("named", "copy", output__keep_last=1, output__resume=str(path))
    assert run(named) == [0], text_of(named)
    assert f"resumes from {path} after step 2" in text_of(named)
    assert "since the checkpoint: output.keep_last was 9, is 1" in text_of(named)
    assert_same(named, whole("copy"))


def test_a_longer_run_resumes_from_the_end_of_a_shorter_run(job_of: Callable[..., Job]) -> None:
    settings = {"optim__schedule": "constant", "optim__warmup_ratio": 0.0}
    short, long = (job_of("grows", "after", optim__max_steps=steps, **settings) for steps in (3, 5))
    straight = job_of("straight", "after", optim__max_steps=5, output__save_every=3, **settings)
    for job in (short, long, straight):
        assert run(job) == [0], text_of(job)
    assert "since the checkpoint: optim.max_steps was 3, is 5" in text_of(long)
    ours, theirs = (load_file(one.out / "final" / "model.safetensors") for one in (long, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_of(long) == log_of(straight)


def test_a_finished_run_ends_as_it_did(job_of: Callable[..., Job], whole: Callable[[str], Job]) -> None:
    job = job_of("finished", "copy")
    final, told = job.out / "final", f"already finished (step {STEPS} of {STEPS}): the model is in"
    inodes = []
    for number in range(3):
        assert run(job) == [0], text_of(job)
        assert_same(job, whole("copy"))
        inodes.append((final / "config.json").stat().st_ino)
        assert text_of(job).count(told) == min(number, 1)
        if number == 1:
            assert inodes[0] == inodes[1]  # it stands as it stood
            shutil.move(final, job.out / "gone")
    shorter = job_of("finished", "copy", optim__max_steps=STEPS - 1)
    assert run(shorter) == [0], text_of(shorter)
    assert f"the recipe asks for {STEPS - 1} steps, but the model has {STEPS}" in text_of(shorter)
    assert (final / "config.json").stat().st_ino == inodes[-1]  # its card names the recipe that made it


def test_the_clock_does_not_tell_whether_a_model_is_exported(tmp_path: Path) -> None:
    """Checks that file times do not decide whether the model of a checkpoint counts as exported."""
    folder, accelerator = tmp_path / "final", accelerate.Accelerator(cpu=True)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    old, new = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(path.name)
    os.utime(folder / "config.json", (4e9, 4e9))  # exported with a clock in the future
    assert is_exported(accelerator, folder, old)  # without a record, as runs of earlier versions
    mark_exported(accelerator, folder, old)
    assert is_exported(accelerator, folder, old)
    assert not is_exported(accelerator, folder, new)  # was True: the model of the shorter run counted as the new one
    mark_exported(accelerator, folder, new)
    os.utime(folder / "config.json", (1, 1))
    assert is_exported(accelerator, folder, new)
    (tmp_path / "exported.json").write_text("{")
    assert not is_exported(accelerator, folder, new)
    mark_exported(accelerator, folder, new)
    (folder / "config.json").unlink()
    assert not is_exported(accelerator, folder, new)


def test_a_run_that_starts_again_says_so(job_of: Callable[..., Job]) -> None:
    job = job_of("again", "copy", optim__max_steps=1)
    job.out.mkdir(parents=True)
    (job.out / "run.lock").touch()
    (job.out / "log.jsonl").write_text('{"step": 1, "loss": 9}\n')
    assert run(job) == [0], text_of(job)
    assert f"no checkpoint in {job.out / 'checkpoints'} yet: starts from the beginning" in text_of(job)
    assert all(line.get("loss") != 9 for line in log_of(job))


# The command line


def test_the_command_on_two_processes(tmp_path: Path) -> None:
    recipe = write_text_run(tmp_path)
    # accelerate's own launcher starts more than one process on a CPU through MPI only.
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mpo_ext.train",
        str(recipe), "optim.max_steps=2",
    ]  # fmt: skip
    with program(command, tmp_path / "text") as process:
        assert process.wait(120) == 0, (tmp_path / "text").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["pairs"] for line in lines] == [4, 4]
    for step in (1, 2):
        manifest = tmp_path / "out" / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        assert json.loads(manifest.read_text())["world_size"] == 2
    assert (tmp_path / "out" / "final" / "README.md").exists()
