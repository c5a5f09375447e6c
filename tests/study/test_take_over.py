"""Tests that a study can reuse the results of an earlier result file.

If the starting model is trained again, its results must equal the earlier results.
"""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "transformers", "sklearn", "matplotlib", "rich", "PIL", "accelerate", "yaml"):
    pytest.importorskip(package)

from benchmarks.study import __main__ as command
from benchmarks.study import results, rows, runs, start, tables
from benchmarks.study.declare import START
from benchmarks.study.settings import PriorSettings
from mpo_ext.data import Pair

ARGUMENTS = {"task": "language-prior", "quick": True, "threads": 1, "backend": "reference", "jobs": 1}
EVALUATION = {
    column: {"accuracy": 0.5, "unparsable": 0.0, "tokens": 3.0, "hallucinated": 0.1, "follow_prior": 0.2}
    for column in ("direct", "cot", "text")
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Replaces the study's runs by instant runs. Returns a list that collects (seed, name) of each run."""
    runs_asked: list[tuple[int, str]] = []

    def task(folder: Path, settings: PriorSettings, row: str) -> dict[str, Any]:
        runs_asked.append((settings.seed, row))
        result = {"status": "measured", "evaluation": EVALUATION, "seconds": 1.0, "sampling": {}, "curve": []}
        return results.save(folder.parent, settings, row, {**result, "pairs": {"mixed": 3}})

    monkeypatch.setattr(start, "prepare", task)
    monkeypatch.setattr(rows, "run_row", task)
    monkeypatch.setattr(results, "save_plot", lambda path, document: path.write_text(""))
    return runs_asked


def measured(document: dict[str, Any]) -> dict[tuple[int, str], dict[str, Any]]:
    return {(each["seed"], each["row"]): each for each in document["results"] if each["status"] == "measured"}


def make_study(out: Path, seeds: range, only: tuple[str, ...]) -> dict[str, Any]:
    assert runs.run(out=out, seeds=seeds, only=only, command="python -m benchmarks.study", **ARGUMENTS) == 0
    return tables.load(out / "study.json")


def test_runs_of_an_earlier_file_are_not_repeated(asked: list[tuple[int, str]], tmp_path: Path) -> None:
    before = make_study(tmp_path / "old", range(1, 3), ("main", "SFT, 3x3 grid"))
    for each in before["results"]:
        each.pop("commit", None)
    before["environment"]["commit"] = "abc1234"
    before["results"] = [each for each in before["results"] if each["row"] != "MPO, RLAIF-V"]  # declared later
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(before))
    asked.clear()
    common = {"quick": True, "backend": "reference"}
    runs.take_over(tmp_path / "new", path, range(2, 4), "language-prior", **common)
    after = measured(make_study(tmp_path / "new", range(2, 4), ("main", "SFT, 3x3 grid")))
    assert {seed for seed, _ in asked} == {3}  # seed 2 is complete
    assert after[2, "MPO"] == {**measured(before)[2, "MPO"], "commit": "abc1234"}
    assert after[2, f"{START}, 3x3 grid"]["pairs"] == {"mixed": 3}
    assert after[3, "MPO"]["commit"] == results.current_commit()


def test_runs_with_other_settings_are_not_taken_over(asked: list[tuple[int, str]], tmp_path: Path) -> None:
    make_study(tmp_path / "old", range(1, 2), ("main",))
    path = tmp_path / "old" / "study.json"
    with pytest.raises(ValueError, match=r"--results must have the settings of the study, got other .*branch_steps"):
        runs.take_over(tmp_path / "new", path, range(1, 2), "language-prior", quick=False, backend="reference")
    with pytest.raises(ValueError, match="--results must be of the task perception, got language-prior"):
        runs.take_over(tmp_path / "new", path, range(1, 2), "perception", quick=True, backend="reference")


def test_rows_can_be_named(asked: list[tuple[int, str]], tmp_path: Path, capsys) -> None:
    make_study(tmp_path, range(1, 2), ("BCO", "delta"))
    assert asked == [(1, START), (1, "MPO"), (1, "BCO"), (1, "MPO, delta 0"), (1, "MPO, delta ema")]
    assert command.main(["--only", "BCO", "no such row", "--out", str(tmp_path)]) == 1
    assert "--only must be among main, losses, " in (error := capsys.readouterr().err)
    assert "or a row, got no such row" in error
    args = command.parser().parse_args(["--only", "BCO", "BCO + SFT"])
    assert command.command_of(args) == "python -m benchmarks.study --only BCO 'BCO + SFT'"


def test_a_start_that_is_made_again_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(PriorSettings.quick(seed=1), backend="reference")
    pairs = {"mixed": [Pair("a question", "right", "wrong")]}
    answers = copy.deepcopy(EVALUATION)
    monkeypatch.setattr(start.prior_start, "train_start", lambda *_: [])
    monkeypatch.setattr(start.prior_start, "make_files", lambda *_, **__: (pairs, {}))
    monkeypatch.setattr(start, "_compute_reference", lambda *_: None)
    monkeypatch.setattr(start.training, "evaluate_held_out", lambda *_: answers)
    folder = tmp_path / "seed-1"
    start.prepare(folder, settings)
    (folder / "start.pt").unlink()
    assert start.prepare(folder, settings)["pairs"] == {"mixed": 1}  # the start is there again
    assert (folder / "start.pt").exists()
    (folder / "start.pt").unlink()
    answers["cot"]["accuracy"] = 0.51
    with pytest.raises(RuntimeError, match=r"a start that is made again must equal .* seed 1"):
        start.prepare(folder, settings)
    assert not (folder / "start.pt").exists()
    answers["cot"]["accuracy"] = 0.5
    pairs["mixed"] *= 2
    with pytest.raises(RuntimeError, match="a start that is made again must equal the measured start"):
        start.prepare(folder, settings)
