"""Tests that checkpoints restore all bits, also on another number of ranks.

After a kill during a save, the checkpoint must be complete or absent.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import checkpoint_ranks as ranks
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from checkpoint_ranks import assert_same, optimizer_of, snapshot, tied, train, with_adapters
from families import IMAGE, VOCAB, internvl, text_model
from run_recipe import server
from torch import nn

from mpo_ext.train import checkpoint_state
from mpo_ext.train.checkpoint import Checkpoints
from mpo_ext.train.checkpoint_files import CheckpointError
from mpo_ext.train.export import export_model

KILLS = int(os.environ.get("MPO_KILLS", "5"))


@pytest.fixture(scope="module")
def accelerator() -> Any:
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


class Small(nn.Module):
    """A model with a persistent buffer, a non-persistent buffer, and a layer that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(2), persistent=False)


def moved(model: nn.Module) -> torch.optim.Optimizer:
    """Returns an optimizer after one step in which only the layer ``used`` had a gradient."""
    optimizer = optimizer_of(model)
    model.used(torch.ones(3, dtype=model.used.weight.dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def names_of(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


# Bit for bit


@pytest.mark.parametrize("is_prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("build", [tied, lambda: with_adapters(tied())], ids=["tied", "adapters"])
def test_a_resumed_run_continues_bit_for_bit(
    accelerator: Any, tmp_path: Path, build: Callable[[], nn.Module], is_prepared: bool
) -> None:
    def fresh() -> tuple[nn.Module, Any]:
        model = build()
        optimizer = optimizer_of(model)
        return accelerator.prepare(model, optimizer) if is_prepared else (model, optimizer)

    model, optimizer = fresh()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    train(model, optimizer, 3)
    store = Checkpoints(tmp_path)
    before = snapshot(model, optimizer)
    state = {"step": 3, "reward_shift": {"value": 0.1 + 0.2}, "recipe": {"x": [1, None]}, "log_position": 1 << 40}
    path = store.save(accelerator, 3, model, optimizer, state)
    assert path == tmp_path / "step-00000003"
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, 3)
    drawn = random.random(), np.random.random(), torch.rand(())

    resumed, restored = fresh()
    train(resumed, restored, 1)
    assert Checkpoints(tmp_path).load(accelerator, path, resumed, restored) == state
    assert_same(snapshot(resumed, restored), before)
    train(resumed, restored, 3)
    assert_same(snapshot(resumed, restored), snapshot(model, optimizer))
    assert (random.random(), np.random.random(), torch.rand(())) == drawn


def test_tied_embeddings_are_kept_once_and_stay_tied(accelerator: Any, tmp_path: Path) -> None:
    model = tied()
    path = Checkpoints(tmp_path).save(accelerator, 0, model, optimizer_of(model), {})
    kept = saved_tensors(path)
    assert "model.model.embed_tokens.weight" in kept
    assert "model.lm_head.weight" not in kept
    resumed = text_model("Qwen2", tie_word_embeddings=True)
    Checkpoints(tmp_path).load(accelerator, path, resumed, optimizer_of(resumed))
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    assert torch.equal(resumed.lm_head.weight, model.lm_head.weight)


def saved_tensors(path: Path) -> dict[str, Any]:
    return dcp.FileSystemReader(path / "tensors").read_metadata().state_dict_metadata


def test_of_a_frozen_base_nothing_is_kept(accelerator: Any, tmp_path: Path) -> None:
    model = with_adapters(tied())
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    names = set(saved_tensors(Checkpoints(tmp_path).save(accelerator, 1, model, optimizer, {})))
    assert len([name for name in names if name.startswith("model.")]) == 2 * 2 * 2
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in names)


def test_parameters_without_a_gradient_have_no_state_after_either(accelerator: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = moved(model)
    model.count.fill_(41)
    path = Checkpoints(tmp_path).save(accelerator, 1, model, optimizer, {})
    resumed = Small()
    restored = optimizer_of(resumed)
    sum(parameter.sum() for parameter in resumed.parameters()).backward()
    restored.step()
    Checkpoints(tmp_path).load(accelerator, path, resumed, restored)
    assert resumed.count == 41
    assert "model.table" not in saved_tensors(path)
    assert_same(snapshot(resumed, restored), snapshot(model, optimizer))
    assert not any(key.startswith("unused.weight/") for key in snapshot(resumed, restored))


def test_an_optimizer_that_has_not_stepped_is_not_stepped_by_a_save(accelerator: Any, tmp_path: Path) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    Checkpoints(tmp_path).save(accelerator, 0, model, optimizer, {})
    assert len(optimizer.state) == 0


def test_a_reference_that_moves_is_kept_whole(accelerator: Any, tmp_path: Path) -> None:
    model, reference = Small(), Small().requires_grad_(False)
    path = Checkpoints(tmp_path).save(accelerator, 0, model, optimizer_of(model), {}, reference=reference)
    resumed, other = Small(), Small().requires_grad_(False)
    Checkpoints(tmp_path).load(accelerator, path, resumed, optimizer_of(resumed), reference=other)
    assert all(map(torch.equal, reference.parameters(), other.parameters()))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    with pytest.raises(CheckpointError, match=r"5 that only it has \(reference\.count, reference\.unused"):
        Checkpoints(tmp_path).load(accelerator, path, resumed, optimizer_of(resumed))


def test_the_loss_scaler_is_kept(accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=8.0))
    accelerator.scaler.scale(torch.ones(()))  # it makes its numbers at the first use
    path = Checkpoints(tmp_path).save(accelerator, 0, model, optimizer_of(model), {})
    accelerator.scaler = torch.amp.GradScaler("cpu")
    Checkpoints(tmp_path).load(accelerator, path, model, optimizer_of(model))
    assert accelerator.scaler.get_scale() == 8.0
    accelerator.scaler = None
    with pytest.raises(CheckpointError, match=r"precision must be .* with a loss scaler \(fp16\), got a run without"):
        Checkpoints(tmp_path).load(accelerator, path, model, optimizer_of(model))


# Other models and optimizers


def load_changed(accelerator: Any, tmp_path: Path, change: Callable[[nn.Module], Any]) -> None:
    model = Small()
    path = Checkpoints(tmp_path).save(accelerator, 0, model, optimizer_of(model), {})
    other = Small()
    before = [parameter.detach().clone() for parameter in other.parameters()]
    optimizer = change(other) or optimizer_of(other)
    try:
        Checkpoints(tmp_path).load(accelerator, path, other, optimizer)
    finally:
        if [parameter.dtype for parameter in other.parameters()] == [value.dtype for value in before]:
            assert all(map(torch.equal, before, other.parameters()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: model.unused.requires_grad_(False) and None, r"parameter groups.*\[2, 2\].*\[1, 1\].*unused"),
        (lambda model: model.double() and None, r"used\.weight must be of shape \(3, 3\) and torch.float32"),
        (lambda model: torch.optim.AdamW(model.parameters()), r"groups of the checkpoint, of \[2, 2\].*\[4\].*none"),
        (lambda model: torch.optim.AdamW(Small().parameters()), r"must be the model's, got another of shape \(3, 3\)"),
        (lambda model: model.register_buffer("more", torch.ones(1)), r"1 that it lacks \(model\.more\) and 0 that"),
    ],
    ids=["frozen", "dtype", "groups", "other parameters", "buffer"],
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_is_changed(
    accelerator: Any, tmp_path: Path, change: Callable[[nn.Module], Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        load_changed(accelerator, tmp_path, change)


def test_an_optimizer_state_that_cannot_be_resharded_is_refused(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    optimizer = moved(model)
    optimizer.state[model.used.weight]["row"] = torch.ones(2)
    monkeypatch.setattr(checkpoint_state, "DTensor", torch.nn.Parameter)
    with pytest.raises(
        CheckpointError, match=r"got optimizer\.used\.weight\.row of shape \(2,\) for a parameter of \(3, 3\)"
    ):
        Checkpoints(tmp_path).save(accelerator, 1, model, optimizer, {})


def test_an_optimizer_state_of_any_shape_and_of_numbers_is_restored(accelerator: Any, tmp_path: Path) -> None:
    model = Small().bfloat16()
    optimizer = moved(model)
    tensors = {"row": torch.rand(2), "codes": torch.arange(9, dtype=torch.uint8).view(3, 3)}
    own = {**tensors, "steps": 3, "size": 0.1, "no": None}
    optimizer.state[model.used.weight].update(own)
    path = Checkpoints(tmp_path).save(accelerator, 1, model, optimizer, {})
    again = moved(model)
    Checkpoints(tmp_path).load(accelerator, path, model, again)
    loaded = again.state[model.used.weight]
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            assert loaded[name].dtype == value.dtype  # and not that of the parameter
            assert torch.equal(loaded[name], value)
        else:
            assert loaded[name] == value


def test_an_optimizer_state_of_another_kind_is_refused(accelerator: Any, tmp_path: Path) -> None:
    model = Small()
    optimizer = moved(model)
    optimizer.state[model.used.weight]["hook"] = print
    with pytest.raises(CheckpointError, match=r"tensors and numbers, got .* for optimizer\.used\.weight\.hook"):
        Checkpoints(tmp_path).save(accelerator, 1, model, optimizer, {})


@pytest.mark.parametrize(
    ("step", "state", "score", "match"),
    [
        (-1, {}, None, "step must be at least 0, got -1"),
        (1, {"a": [torch.ones(1)]}, None, r"state\.a\[0\] must be JSON"),
        (1, {}, float("nan"), "score must be a finite number or None, got nan"),
    ],
)
def test_bad_arguments_are_named(
    accelerator: Any, tmp_path: Path, step: int, state: dict[str, Any], score: float | None, match: str
) -> None:
    model = Small()
    with pytest.raises(CheckpointError, match=match):
        Checkpoints(tmp_path).save(accelerator, step, model, optimizer_of(model), state, score=score)
    assert list(tmp_path.iterdir()) == []


# Finding and deleting checkpoints


@pytest.fixture
def save(accelerator: Any) -> Callable[..., Path]:
    model = Small()
    optimizer = moved(model)
    return lambda store, step, **options: store.save(accelerator, step, model, optimizer, {"step": step}, **options)


def test_the_last_ones_are_kept(save: Callable[..., Path], tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "run" / "checkpoints", keep_last=2)
    assert store.latest() is None
    for step in (1, 2, 3, 4):
        assert save(store, step) == store.latest()
    assert names_of(store) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 3)])
def test_the_best_one_is_kept_by_every_process(
    save: Callable[..., Path], tmp_path: Path, higher: bool, best: int
) -> None:
    for step, score in enumerate([None, 0.5, 0.9, 0.1, 0.9, 0.1, None]):
        store = Checkpoints(tmp_path, keep_last=1, keep_best=True, higher_is_better=higher)
        save(store, step, score=score)
    assert names_of(store) == [f"step-{best:08d}", "step-00000006"]
    assert store.best() == tmp_path / f"step-{best:08d}"
    save(store, 7, score=2.0 if higher else -1)
    assert names_of(store) == ["step-00000007"]


def test_scores_of_another_evaluation_are_not_compared(save: Callable[..., Path], tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=1, keep_best=True)
    assert store.next_number() == 1
    save(store, 1, score=0.9)
    number = store.next_number()
    save(store, 2, score=0.3, evaluation=number)  # was deleted in favour of step 1, whose score is of another metric
    save(store, 3, score=0.2, evaluation=number)
    assert names_of(store) == ["step-00000002", "step-00000003"]
    assert store.best() == tmp_path / "step-00000002"
    save(store, 4, evaluation=store.next_number())
    assert store.best() is None
    assert names_of(store) == ["step-00000004"]


def test_after_going_back_the_newest_is_the_last_that_was_written(save: Callable[..., Path], tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        save(store, step)
    old = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    path = save(store, 2)
    assert json.loads((path / "manifest.json").read_text())["number"] == old["number"] + 2
    assert store.latest() == path
    assert names_of(store) == ["step-00000002", "step-00000003"]


def test_resume_finds_what_it_says(accelerator: Any, save: Callable[..., Path], tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "a")
    assert store.resolve(accelerator, "auto") is None
    assert store.resolve(accelerator, "never") is None
    assert store.find("auto") is store.find("never") is None
    path, newest = save(store, 1), save(store, 2)
    assert store.resolve(accelerator, "auto") == newest
    assert store.resolve(accelerator, str(path)) == path
    assert (store.find("auto"), store.find(str(path))) == (newest, path)
    for resolve in (lambda resume: store.resolve(accelerator, resume), store.find):
        with pytest.raises(FileExistsError, match=r'"auto" or a checkpoint .* got "never" with .*step-00000002'):
            resolve("never")
        with pytest.raises(ValueError, match=r'"auto", "never" or the path of a checkpoint, got .*manifest\.json'):
            resolve(str(store.folder))


def test_a_checkpoint_of_another_folder_starts_only_a_new_run(
    accelerator: Any, save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b")
    other = str(save(theirs, 1))
    assert ours.find(other) == ours.resolve(accelerator, other) == Path(other)
    own = save(ours, 2)
    for resolve in (lambda resume: ours.resolve(accelerator, resume), ours.find):
        with pytest.raises(
            ValueError, match=r"must be a checkpoint in .*b, which has the checkpoints of a run, got .*a"
        ):
            resolve(other)
    (tmp_path / "link").symlink_to(own)
    for path in (own, f"{own}/", tmp_path / "link", tmp_path / "a" / ".." / "b" / own.name):
        assert ours.find(str(path)) == Path(path)
    monkeypatch.chdir(own)
    assert ours.find(".") == Path()


def damaged(path: Path) -> None:
    with open(next((path / "tensors").glob("*.distcp")), "ab") as file:
        file.truncate(100)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damaged, r"in .*step-00000002/tensors/__0_0\.distcp, got 100 bytes"),
        (lambda path: (path / "rng-00000.pt").unlink(), r"rng-00000\.pt, got No such file"),
        (lambda path: (path / "manifest.json").unlink(), r"must have a manifest, got .*manifest\.json: No such file"),
        (
            lambda path: (path / "manifest.json").write_text("{"),
            r"a manifest must be JSON as it was written, got .* in .*manifest\.json",
        ),
        (lambda path: (path / "manifest.json").write_text('{"format": 2}'), r"must be of format .*/1', got 2 in"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": "mpo_ext.checkpoint/1"}'),
            r"must have the fields of .* in .*manifest\.json",
        ),
    ],
    ids=["cut", "missing", "no manifest", "no JSON", "another format", "no fields"],
)
def test_a_damaged_one_is_refused_by_name_and_passed_over(
    accelerator: Any,
    save: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], Any],
    match: str,
) -> None:
    store = Checkpoints(tmp_path)
    good, path = save(store, 1), save(store, 2)
    damage(path)
    model = Small()
    with pytest.raises(CheckpointError, match=match):
        store.load(accelerator, path, model, optimizer_of(model))
    with caplog.at_level(logging.WARNING):
        assert store.latest() == good
    assert f"{path} is left out" in caplog.text
    save(store, 2)
    assert store.latest() == path


def test_a_changed_byte_in_any_file_is_noticed_and_an_older_checkpoint_is_taken(
    accelerator: Any, save: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Checkpoints(tmp_path)
    good, path = save(store, 1), save(store, 2)
    rng = random.Random(0)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {"manifest.json", "state.json", "trainer.pt", ".metadata", "__0_0.distcp"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        for place in [0, len(content) - 1, *rng.choices(range(len(content)), k=6)]:
            changed = bytes([content[place] ^ 1 << rng.randrange(8)])
            file.write_bytes(content[:place] + changed + content[place + 1 :])
            model = Small()
            with pytest.raises(CheckpointError, match=r"got other contents in|manifest|bytes in|a checkpoint must be"):
                Checkpoints(tmp_path).load(accelerator, path, model, optimizer_of(model))
            assert Checkpoints(tmp_path).resolve(accelerator, "auto") == good, (file.name, place)
            with pytest.raises(ValueError, match='resume must be "auto"'):
                Checkpoints(tmp_path).resolve(accelerator, str(path))
        file.write_bytes(content)
    assert Checkpoints(tmp_path).resolve(accelerator, "auto") == path
    assert "got other contents in" in caplog.text


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no manifest"])
def test_a_run_does_not_start_again_beside_damaged_checkpoints(
    accelerator: Any, save: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    path = save(Checkpoints(tmp_path), 1)
    file = path / ("manifest.json" if damage == "no manifest" else "state.json")
    content = file.read_bytes()
    if damage in ("missing", "no manifest"):
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content.replace(b"1", b"2"))
    with pytest.raises(CheckpointError, match="must be intact, got 1 damaged"):
        Checkpoints(tmp_path).resolve(accelerator, "auto")
    if damage != "changed":  # ``find`` does not read the files
        with pytest.raises(CheckpointError, match="must be intact, got 1 damaged"):
            Checkpoints(tmp_path).find("auto")
    with pytest.raises(FileExistsError, match=f'got "never" with {path}'):
        Checkpoints(tmp_path).resolve(accelerator, "never")
    newer = save(Checkpoints(tmp_path), 2)
    assert Checkpoints(tmp_path).resolve(accelerator, "auto") == newer
    assert Checkpoints(tmp_path).find("auto") == newer


def test_a_checkpoint_without_digests_still_resumes(
    accelerator: Any, save: Callable[..., Path], tmp_path: Path
) -> None:
    path = save(Checkpoints(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"], manifest["digests"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    model = Small()
    assert Checkpoints(tmp_path).resolve(accelerator, "auto") == path
    assert Checkpoints(tmp_path).load(accelerator, path, model, optimizer_of(model)) == {"step": 1}


def test_another_number_of_ranks_is_logged(
    accelerator: Any, save: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(Checkpoints(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "world_size": 3}))
    model = Small()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Checkpoints(tmp_path).load(accelerator, path, model, optimizer_of(model))
    assert torch.equal(before, torch.get_rng_state())
    assert "saved by 3 ranks, and there are 1 now" in caplog.text


def test_leftovers_of_a_death_are_removed_or_finished(save: Callable[..., Path], tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    path = save(store, 1)
    path.rename(tmp_path / "step-00000001.replaced-0123456789ab")
    (tmp_path / "step-00000002.tmp-0123456789ab" / "tensors").mkdir(parents=True)
    (tmp_path / "step-00000000.deleted-0123456789ab").mkdir()
    (tmp_path / "notes.tmp-0123456789ab").mkdir()
    assert store.latest() == tmp_path / "step-00000001.replaced-0123456789ab"
    save(store, 3)
    assert names_of(store) == ["notes.tmp-0123456789ab", "step-00000001", "step-00000003"]


# Kills and full disks


def save_forever(folder: Path, first: int) -> None:
    """Saves checkpoints in a loop. All parameter values of a checkpoint are the number of the save.

    Every third save replaces the previous checkpoint.
    """
    accelerator = accelerate.Accelerator(cpu=True)
    store = Checkpoints(folder, keep_last=1)
    model = Small()
    optimizer = moved(model)
    for count in range(first, first + 10_000):
        step = count - (count % 3 == 0)
        with torch.no_grad():
            for value in (*model.parameters(), optimizer.state[model.used.weight]["exp_avg"]):
                value.fill_(count)
        store.save(accelerator, step, model, optimizer, {"count": count})
        (folder / "saved").write_text(str(count))


def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_whole(
    accelerator: Any, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    record_property("cases", KILLS)
    rng = random.Random(os.environ.get("MPO_KILLS", "0"))
    context = server()
    told = 0
    for _ in range(KILLS):
        process = context.Process(target=save_forever, args=(tmp_path, told + 1))
        process.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "saved").exists() and time.monotonic() < deadline:  # on a busy machine it begins late
            time.sleep(0.01)
        process.join(rng.uniform(0.1, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -9
        latest = Checkpoints(tmp_path).latest()
        said = tmp_path / "saved"
        if not said.exists():
            continue
        assert latest is not None
        model = Small()
        optimizer = optimizer_of(model)
        count = Checkpoints(tmp_path).load(accelerator, latest, model, optimizer)["count"]
        assert count >= max(told, int(said.read_text() or 0))
        told = count
        for value in (*model.parameters(), optimizer.state[model.used.weight]["exp_avg"]):
            assert (value == count).all()
    assert told > 0


def die_at(folder: Path, number: int, step: int) -> None:
    """Saves a checkpoint of ``step``, and exits right before the change on disk with the index ``number``.

    A change is a call of ``os.rename``, ``os.unlink``, ``os.rmdir`` or ``os.mkdir``. The first change has index 0.
    """
    store = Checkpoints(folder, keep_last=1)
    model = Small()
    optimizer = moved(model)
    accelerator = accelerate.Accelerator(cpu=True)
    calls = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapped

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    store.save(accelerator, step, model, optimizer, {"new": True})
    os._exit(0)


@pytest.mark.parametrize("step", [1, 2], ids=["replaces", "follows"])
def test_a_death_before_any_change_on_the_disk_leaves_a_whole_checkpoint(
    accelerator: Any, save: Callable[..., Path], tmp_path: Path, step: int
) -> None:
    seen = set()
    for number in itertools.count():
        store = Checkpoints(tmp_path / str(number), keep_last=1)
        save(store, 1)
        process = server().Process(target=die_at, args=(store.folder, number, step))
        process.start()
        process.join(60)
        latest = store.latest()
        assert latest is not None, number
        model = Small()
        is_new = "new" in store.load(accelerator, latest, model, optimizer_of(model))
        assert is_new or True not in seen, number
        seen.add(is_new)
        if process.exitcode == 0:
            break
        path = save(store, 3)
        assert names_of(store) == [path.name], number
    assert seen == {False, True}
    assert number > 8


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Large(Small):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(1 << 18))


def test_a_full_disk_costs_the_new_checkpoint_only(accelerator: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1536k"):
        store = Checkpoints(tmp_path / "disk" / "checkpoints")
        model = Large()
        optimizer = optimizer_of(model)
        good = store.save(accelerator, 1, model, optimizer, {})
        with pytest.raises(
            CheckpointError,
            match=rf"step-00000002 must be written whole, got .*No space left.*was removed; .* checkpoint is {good}",
        ):
            store.save(accelerator, 2, model, optimizer, {})
        assert names_of(store) == [good.name]
        store.load(accelerator, good, model, optimizer)
        with pytest.raises(CheckpointError, match="No space left"):
            export_model(accelerator, text_model("Qwen2", vocab_size=20_000), None, tmp_path / "disk" / "model")
        assert os.listdir(tmp_path / "disk") == ["checkpoints"]


def write_past_a_limit(folder: Path, limit: int, result: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    store = Checkpoints(folder)
    model = Large()
    optimizer = optimizer_of(model)
    store.save(accelerator, 1, model, optimizer, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        store.save(accelerator, 2, model, optimizer, {})
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        result.write_text(str(error))


@pytest.mark.parametrize("limit", [500_000, 3000], ids=["tensors", "random state"])
def test_a_write_that_fails_costs_the_new_checkpoint_only(accelerator: Any, tmp_path: Path, limit: int) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    process = server().Process(target=write_past_a_limit, args=(store.folder, limit, tmp_path / "result"))
    process.start()
    process.join(60)
    text = (tmp_path / "result").read_text()
    assert os.strerror(errno.EFBIG) in text
    assert f"the last good checkpoint is {store.folder / 'step-00000001'}" in text
    assert names_of(store) == ["step-00000001"]
    model = Large()
    store.load(accelerator, store.resolve(accelerator, "auto"), model, optimizer_of(model))


def test_all_is_on_the_disk_before_it_has_its_name(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def note_sync(file: int) -> None:
        sync(file)
        events.append(("sync", os.readlink(f"/proc/self/fd/{file}")))

    def note_rename(old: Any, new: Any) -> None:
        rename(old, new)
        events.append(("rename", str(new)))

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    path = save(Checkpoints(tmp_path), 1)
    place = events.index(("rename", str(path)))
    synced = {Path(name).relative_to(tmp_path).parts[1:] for kind, name in events[:place] if kind == "sync"}
    assert synced >= {file.relative_to(path).parts for file in [path, *path.rglob("*")]}
    assert ("sync", str(tmp_path)) in events[place:]


# Two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    accelerate.state.AcceleratorState._reset_state(True)
    single = accelerate.Accelerator(cpu=True)
    model = tied()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    Checkpoints(folder / "single").save(single, 2, model, optimizer, {})
    torch.save(snapshot(model, optimizer), folder / "single.truth")
    ranks.run_all(folder)
    return folder


@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks(two_ranks: Path, case: str) -> None:
    for rank in range(2):
        error = two_ranks / f"{case}.error{rank}"
        assert not error.exists(), error.read_text()
    end = two_ranks / "end"
    assert all((two_ranks / f"{case}.done{rank}").exists() for rank in range(2)), end.exists() and end.read_text()


@pytest.mark.parametrize("name", [*ranks.WRAPPERS, "adapters"])
def test_one_process_resumes_what_two_have_saved(
    accelerator: Any, two_ranks: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = text_model("Qwen2", tie_word_embeddings=True)
    if name == "adapters":
        model = with_adapters(tied())
    optimizer = optimizer_of(model)
    path = two_ranks / name / "step-00000002"
    Checkpoints(two_ranks / name).load(accelerator, path, model, optimizer)
    assert_same(snapshot(model, optimizer), torch.load(two_ranks / f"{name}.truth"))
    assert "random states are not restored" in caplog.text
    if name == "adapters":
        assert all(".lora_" in key for key in saved_tensors(path))


# DeepSpeed, replaced by a stand-in with the methods that the code calls


class Engine(nn.Module):
    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest
        assert exclude_frozen_parameters
        Path(folder, tag).mkdir()
        Path(folder, tag, "zero_0.pt").write_text("states")

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str | None, dict[str, Any]]:
        assert not load_module_strict
        self.loaded = Path(folder, tag, "zero_0.pt").read_text()
        return folder, {}


def test_deepspeed_gets_a_separate_folder(accelerator: Any, save: Callable[..., Path], tmp_path: Path) -> None:
    deepspeed = SimpleNamespace(
        distributed_type=accelerate.DistributedType.DEEPSPEED,
        **{
            name: getattr(accelerator, name)
            for name in ("process_index", "num_processes", "is_main_process", "device")
        },
        wait_for_everyone=accelerator.wait_for_everyone,
    )
    engine = Engine()
    store = Checkpoints(tmp_path)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    path = store.save(deepspeed, 1, engine, None, {"step": 1})
    drawn = random.random(), np.random.random(), torch.rand(())
    assert "deepspeed/zero_0.pt" in json.loads((path / "manifest.json").read_text())["files"]
    assert store.load(deepspeed, path, engine, None) == {"step": 1}
    assert engine.loaded == "states"
    assert (random.random(), np.random.random(), torch.rand(())) == drawn
    with pytest.raises(CheckpointError, match="resumed under DeepSpeed, as it was saved, got one process, DDP"):
        store.load(accelerator, path, Small(), None)
    with pytest.raises(CheckpointError, match="resumed under one process, DDP or FSDP2, as it was saved, got DeepSp"):
        store.load(deepspeed, save(store, 2), engine, None)


# Exports


class Processor:
    def save_pretrained(self, folder: Path) -> None:
        Path(folder, "processor_config.json").write_text("{}")


@torch.no_grad()
def logits_of(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(2, 10)[None] % VOCAB
    return model.eval()(input_ids=inputs.pop("input_ids", ids), **inputs).logits


def test_an_export_is_what_was_trained(accelerator: Any, tmp_path: Path) -> None:
    model = tied()
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    export_model(accelerator, accelerator.prepare(model), Processor(), tmp_path / "out" / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.generation_config.temperature == 0.25
    assert (tmp_path / "out" / "model" / "processor_config.json").exists()


def test_an_export_of_a_model_with_images_is_what_was_trained(accelerator: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = internvl()
    export_model(accelerator, model, None, tmp_path / "model")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert_same(loaded.state_dict(), model.state_dict())
    ids = torch.tensor([[3, IMAGE, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 1, 8, 8)}
    torch.testing.assert_close(logits_of(loaded, **inputs), logits_of(model, **inputs), rtol=1e-5, atol=1e-6)


@pytest.fixture
def adapted(tmp_path: Path) -> nn.Module:
    """Returns a model with adapters. Its base model was loaded from a folder."""
    tied().save_pretrained(tmp_path / "base")
    return with_adapters(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))


def test_adapters_are_exported_and_merged(accelerator: Any, adapted: nn.Module, tmp_path: Path) -> None:
    import peft

    adapted.get_base_model().generation_config.update(do_sample=True, top_k=7)
    export_model(accelerator, adapted, Processor(), tmp_path / "model", merged=True)
    truth = logits_of(adapted)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits_of(base), truth, atol=1e-3)
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "model")), truth)
    assert torch.equal(logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")), truth)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits_of(merged), truth, rtol=1e-4, atol=1e-5)
    assert merged.generation_config.top_k == 7
    for folder in (tmp_path / "model", tmp_path / "model" / "merged"):
        assert (folder / "processor_config.json").exists()
        assert json.loads((folder / "generation_config.json").read_text())["top_k"] == 7
    export_model(accelerator, adapted, None, tmp_path / "model")
    assert not (tmp_path / "model" / "merged").exists()


def test_trained_parameters_that_peft_would_lose_are_refused(
    accelerator: Any, adapted: nn.Module, tmp_path: Path
) -> None:
    adapted.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"must be in modules_to_save .* got base_model\.model\.model\.norm"):
        export_model(accelerator, adapted, None, tmp_path / "model")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "adapters"])
def test_one_process_reads_what_two_have_exported(two_ranks: Path, name: str) -> None:
    folder = two_ranks / f"export-{name}"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    truth = logits_of(with_adapters(tied()) if name == "adapters" else tied())
    assert torch.equal(logits_of(loaded), truth)
    if name == "adapters":
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
        torch.testing.assert_close(logits_of(merged), truth, rtol=1e-4, atol=1e-5)
    assert json.loads((two_ranks / "export-fsdp2" / "config.json").read_text())["architectures"] == [
        "Qwen2ForCausalLM"
    ]


def test_only_an_earlier_export_is_replaced(accelerator: Any, tmp_path: Path) -> None:
    model = tied()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    for folder in ("run", "run/config.json"):
        with pytest.raises(CheckpointError, match=r"folder must be new, empty or an earlier export, got .*run"):
            export_model(accelerator, model, None, tmp_path / folder)
    assert (tmp_path / "run" / "checkpoints").is_dir()
    export_model(accelerator, model, None, tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    export_model(accelerator, model, None, tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.model.norm.weight == 0.5).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_an_export_that_fails_leaves_the_earlier_one(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tied()
    export_model(accelerator, model, None, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(Processor, "save_pretrained", ranks.fail)
    with pytest.raises(
        CheckpointError, match=r"written whole into .*model, got OSError: no such luck .*is there still"
    ):
        export_model(accelerator, model, Processor(), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
