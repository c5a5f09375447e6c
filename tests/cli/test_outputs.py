"""Tests that no command overwrites one of its inputs, or a file that it did not write."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from digits_run import recipe, tiny, write_pairs
from mmpr_files import run_data
from stub_engine import StubEngine

from mpo_ext.cli import demo, sample
from mpo_ext.data import open_pairs
from mpo_ext.data.picks import Picks, pair_digest
from mpo_ext.evaluate.run import evaluate
from mpo_ext.files import FileLock, check_outputs
from mpo_ext.generate.runner import run as run_pipeline
from mpo_ext.journal import Journal
from mpo_ext.train.loop import train

LINE = {"question": "Q", "chosen": "It is\nFinal answer: 7", "rejected": "r", "answer_gt": "7"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Returns a folder with a user's files, which no command may change."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("pairs.jsonl", "summary.json", "results.json", "log.jsonl", "page.html", "notes.txt"):
        (folder / name).write_text(json.dumps(LINE) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _nothing_changes(own: Path) -> Iterator[None]:
    before = contents(own)
    yield
    assert contents(own) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sample, "load_engine", lambda args, model: StubEngine())
    parser = argparse.ArgumentParser()
    sample.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["sample", *map(str, arguments), "--model", "stub"])
    return args.run(args)


@pytest.mark.parametrize("pipeline", ["dropout-ntp", "correctness"])
def test_sample(own: Path, pipeline: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sample(monkeypatch, pipeline, own / "pairs.jsonl", own) == 2
    assert f"out must not replace an input, got the input {own}/pairs.jsonl" in capsys.readouterr().err
    assert run_sample(monkeypatch, pipeline, own / "notes.txt", own) == 2
    assert "out must be a new place or an earlier output of the same command" in capsys.readouterr().err
    (own.parent / "link").symlink_to(own)
    assert run_sample(monkeypatch, pipeline, own / "pairs.jsonl", own.parent / "link") == 2
    items = own.parent / "items.jsonl"
    items.write_text(json.dumps(LINE))
    for _ in range(2):  # the second run replaces the outputs of the first
        assert run_sample(monkeypatch, pipeline, items, own.parent / "run") == 0
    unsolved = own.parent / "run" / "pairs.jsonl"
    with pytest.raises(ValueError, match="must not replace an input"):
        run_pipeline(sample._dropout_ntp(dropout_arguments()), StubEngine(), unsolved, own.parent / "run")


def dropout_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sample.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["sample", "dropout-ntp", "a", "b", "--model", "m"])


@pytest.mark.parametrize("command", ["view", "check", "stats"])
def test_data(own: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--out" if command == "view" else "--json"
    (own.parent / "hard.jsonl").hardlink_to(own / "pairs.jsonl")
    for name in (own / "pairs.jsonl", own.parent / "hard.jsonl"):
        assert run_data(command, own / "pairs.jsonl", option, name) == 2
        assert f"{option} must not replace an input" in capsys.readouterr().err
    for name in ("page.html", "results.json", "notes.txt"):
        assert run_data(command, own / "pairs.jsonl", option, own / name) == 2
        assert f"{option} must be a new place or an earlier output of the same command" in capsys.readouterr().err
    for _ in range(2):
        assert run_data(command, own / "pairs.jsonl", option, own.parent / "report") == 0


def test_annotations_of_a_meta_file_are_inputs(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = own.parent / "meta.json"
    meta.write_text(json.dumps({"one": {"root": "", "annotation": "own/pairs.jsonl"}}))
    assert run_data("view", meta, "--out", own / "pairs.jsonl") == 2
    assert run_data("convert", meta, own / "pairs.jsonl", "--to", "pairs", "--force") == 2
    assert capsys.readouterr().err.count("must not replace an input") == 2


def test_convert(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--force"]):
        assert run_data("convert", own / "pairs.jsonl", own / "pairs.jsonl", "--to", "trl", *options) == 2
    (own / "annotations").mkdir()
    (own / "annotations" / "pairs.jsonl").write_text("mine")
    assert run_data("convert", own / "pairs.jsonl", own, "--to", "mmpr") == 2
    assert "annotations/pairs.jsonl" in capsys.readouterr().err
    (own / "annotations" / "pairs.jsonl").unlink()
    (own / "annotations").rmdir()
    (own / "state.json").write_text("{}")  # as in a dataset
    assert run_data("convert", own / "pairs.jsonl", own, "--to", "hf", "--force") == 2
    assert run_data("convert", own.parent / "own" / "notes.txt", own, "--to", "hf", "--force", "--from", "pairs") == 2
    (own.parent / "other.jsonl").write_text(json.dumps(LINE))
    assert run_data("convert", own.parent / "other.jsonl", own, "--to", "hf", "--force") == 2
    assert "only a dataset" in capsys.readouterr().err
    (own / "state.json").unlink()


def test_picks_are_an_input(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picks = own / "picked.json"
    source = open_pairs(own / "pairs.jsonl")
    Picks(source.path, 1, {0: pair_digest(source.pairs[0])}).write(picks)
    before = picks.read_bytes()
    for option in ("--picked", "--not-picked"):
        assert run_data("convert", own / "pairs.jsonl", picks, "--to", "pairs", "--force", option, picks) == 2
        assert f"out must not replace an input, got the input {picks}" in capsys.readouterr().err
    assert picks.read_bytes() == before
    picks.unlink()


def test_evaluate(own: Path) -> None:
    with pytest.raises(FileExistsError, match="out must be a new place"):
        evaluate({"m": StubEngine()}, {"q": own / "pairs.jsonl"}, own)
    out = own.parent / "run"
    for _ in range(2):
        evaluate({"m": StubEngine()}, {"q": own / "pairs.jsonl"}, out)
    with pytest.raises(ValueError, match="out must not replace an input"):
        evaluate({"m": StubEngine()}, {"q": out / "predictions-m.jsonl"}, out)


def test_train(own: Path) -> None:
    model, processor = tiny()
    pairs = write_pairs(own.parent, 8)
    (own / "final").mkdir()
    before = contents(own)
    with pytest.raises(FileExistsError, match=r"output\.dir must be a new place"):
        train(recipe(own, pairs), model=model, processor=processor)
    (own / "final").rmdir()
    assert contents(own) == before
    with pytest.raises(ValueError, match=r"output\.dir must not replace an input, got the input .*log\.jsonl"):
        train(recipe(own, own / "log.jsonl"), model=model, processor=processor)
    model_folder = own.parent / "run" / "final"
    model_folder.mkdir(parents=True)
    (model_folder / "config.json").touch()
    with pytest.raises(ValueError, match=r"output\.dir must not replace an input"):
        train(recipe(own.parent / "run", pairs, model__path=str(model_folder)), model=model, processor=processor)


def test_demo(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mpo_ext.demo import experiment

    runs: list[Any] = []
    monkeypatch.setattr(experiment, "run", lambda **options: runs.append((options["out"] / "x").touch()))
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers(required=True))

    def run(out: Path) -> int:
        args = parser.parse_args(["demo", "--out", str(out)])
        return args.run(args)

    assert run(own) == 2
    assert "--out must be a new or empty folder" in capsys.readouterr().err
    assert [run(own.parent / "new"), run(own.parent / "new")] == [0, 0]
    assert len(runs) == 2


def test_locks_and_journals_are_not_made_of_other_files(own: Path) -> None:
    with pytest.raises(FileExistsError, match="must be a lock file"), FileLock(own / "notes.txt", "it"):
        pass

    half = own.parent / "half.txt"
    half.write_text("a text without an end of line")
    whole = own.parent / "whole.txt"
    whole.write_bytes((own / "notes.txt").read_bytes())
    for path in (whole, half):
        with pytest.raises(ValueError, match="path must be a journal"), Journal(path, {}):
            pass
    assert half.read_text() == "a text without an end of line"


def test_check_outputs_ignores_what_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    check_outputs("out", [tmp_path / "b"], inputs=[tmp_path / "a", "owner/name"], is_ours=False)
    check_outputs("out", [tmp_path / "a"], inputs=["owner/name"])
    os.symlink(tmp_path / "gone", tmp_path / "broken")
    check_outputs("out", [tmp_path / "broken"], inputs=[tmp_path / "a"])
    with pytest.raises(ValueError, match="must not replace an input"):
        check_outputs("out", [tmp_path], inputs=[tmp_path / "a"])
