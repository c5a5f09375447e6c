"""Tests the experiment trackers with their real packages; wandb runs offline."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from accelerate.state import AcceleratorState
from digits_run import recipe, tiny, write_pairs

from mpo_ext.checks import install_hint
from mpo_ext.train import model_card
from mpo_ext.train.loop import Trainer
from mpo_ext.train.setup import make_accelerator
from mpo_ext.train.trackers import check_trackers


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs two steps and an evaluation with a tracker. It returns the lines of the log."""
    monkeypatch.setattr(model_card, "write_card", lambda *args, **values: None)
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(True)

    def run_with(tracker: str) -> list[dict[str, Any]]:
        pairs = write_pairs(tmp_path / "pairs", 8)
        settings = {"output__trackers": [tracker], "data__eval": [str(pairs)], "optim__batch_size": 4}
        model, processor = tiny()
        assert Trainer(recipe(tmp_path / "out", pairs, **settings), model=model, processor=processor).run() == 0
        return [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]

    return run_with


def test_tensorboard_has_all_values(run: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second, evaluation = run("tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "mpo_ext"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, pytest.approx(first["loss"])), (2, pytest.approx(second["loss"]))]
    assert set(events.Tags()["scalars"]) >= {f"train/{name}" for name in first}
    (accuracy,) = events.Scalars("eval/reward_accuracy")
    assert (accuracy.step, accuracy.value) == (2, pytest.approx(evaluation["eval_reward_accuracy"]))
    (settings,) = (tmp_path / "out" / "mpo_ext").rglob("hparams.yml")
    assert "optim.batch_size: 4\n" in settings.read_text()


def test_wandb_has_all_values_offline(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second, evaluation = run("wandb")
    wandb.teardown()  # its process writes the end of the file
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    history, config = read_wandb(file)
    assert [row["_step"] for row in history] == [1, 2]
    assert [row["train/loss"] for row in history] == pytest.approx([first["loss"], second["loss"]])
    assert history[1]["eval/reward_accuracy"] == evaluation["eval_reward_accuracy"]
    assert config["optim.batch_size"] == 4
    assert not (tmp_path / "wandb").exists()  # nothing in the current folder


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a wandb file, which has the format of LevelDB's log.

    The file consists of blocks of 32 KiB. A record that does not fit into a block has parts in several blocks.
    """
    block, place, whole = 1 << 15, 7, b""  # the file begins with 7 other bytes
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for the head of a part
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the only or the last part
            yield whole
            whole = b""


def read_wandb(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the file of an offline wandb run. Returns (history rows, settings)."""
    from wandb.proto import wandb_internal_pb2

    def values(items: Any) -> dict[str, Any]:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    history, config = [], {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if row := values(record.history.item):
            history.append(row)
        config |= values([*record.config.update, *record.run.config.update])
    return history, config


def test_trackio_has_all_values(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    first, second, evaluation = run("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("mpo_ext")
    rows = SQLiteStorage.get_logs("mpo_ext", name)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == pytest.approx({1: first["loss"], 2: second["loss"]})
    (accuracy,) = [row["eval/reward_accuracy"] for row in rows if "eval/reward_accuracy" in row]
    assert accuracy == evaluation["eval_reward_accuracy"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_refused_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [kind for kind in tracking.get_available_trackers() if str(kind.value) != name]
    monkeypatch.setattr(tracking, "_available_trackers", others)
    with pytest.raises(ImportError) as error:
        make_accelerator(recipe(tmp_path / "out", tmp_path / "pairs.jsonl", output__trackers=[name]))
    assert str(error.value) == f"output.trackers: {name} needs its package: {install_hint(name)}"


def test_trackers_without_an_extra_name_their_package_and_unknown_ones_are_refused() -> None:
    check_trackers(["tensorboard"])
    if "mlflow" not in sys.modules:
        with pytest.raises(ImportError, match=r"output\.trackers: mlflow needs its package: pip install mlflow"):
            check_trackers(["tensorboard", "mlflow"])
    with pytest.raises(
        ValueError, match=r"must name trackers of accelerate .*got 'tensorbord'; did you mean 'tensorb"
    ):
        check_trackers(["tensorbord"])
