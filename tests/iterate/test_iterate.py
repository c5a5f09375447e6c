"""Tests the command for rounds of MPO on a tiny model: results, kills, interruptions, and failing steps.

A round samples pairs, trains and evaluates, each in a separate process.
"""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import digits_rounds
import pytest
from run_recipe import ENVIRONMENT, TIMING
from safetensors.torch import load_file

from mpo_ext.cli.main import main
from mpo_ext.data import open_pairs
from mpo_ext.train.recipe import load_recipe

pytest.importorskip("sklearn", reason="the images of digits need the extra demo")
pytest.importorskip("jinja2", reason="the page needs the extra data")

SEED = os.environ.get("MPO_KILLS", "0")
#: Files that the stages of a round write while they run.
STAGE_FILES = (
    "out/round-{}/correctness/journal-*.jsonl",
    "out/round-{}/dropout-ntp/journal-*.jsonl",
    "out/round-{}/train/log.jsonl",
    "out/round-{}/evaluation/journals/*/*/journal-*.jsonl",
)
#: Numbers of rounds of the killed run, one after the other; the second is a run of one round that is continued.
ROUNDS = (1, 2) if "MPO_KILLS" in os.environ else (1,)
LIMIT_S = 550
#: Files of the run that depend on the clock, on how often it was killed, or on the number of rounds.
NOT_COMPARED = (".lock", "log.jsonl", "settings.json", "exported.json")  # the last: a digest of the log's times


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits_rounds.write_model(folder / "model")
    digits_rounds.write_questions(folder, "train", 24, seed=1)
    digits_rounds.write_questions(folder, "test", 20, seed=2)
    return folder


def start(cwd: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mpo_ext", "iterate", *words]
    environment = {**os.environ, **ENVIRONMENT}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def run(cwd: Path, *words: str) -> tuple[int, str]:
    process = start(cwd, *words)
    text, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, text


def write_recipe(folder: Path, cwd: Path, **settings: Any) -> str:
    cwd.mkdir(exist_ok=True)
    path = digits_rounds.recipe(folder, cwd / "out", **{"output": "out", **settings})
    return path.name


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an uninterrupted run of two rounds."""
    cwd = tmp_path_factory.mktemp("whole")
    status, text = run(cwd, write_recipe(folder, cwd))
    assert status == 0, text
    assert text.splitlines()[-1] == "written to out/iterate.html"
    return cwd / "out"


def contents(out: Path) -> dict[str, bytes]:
    """Returns the files that must be equal in every run, as a dict from path to content.

    Lines with times are removed from the model cards.
    """
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in paths
        if not path.name.endswith(NOT_COMPARED) and not path.name.startswith("journal")
    }
    for name in files:
        if name.endswith("README.md"):
            lines = files[name].splitlines()
            files[name] = b"\n".join(line for line in lines if not any(key.encode() in line for key in TIMING))
    return files


def kill_when(cwd: Path, pattern: str, delay_s: float, *words: str) -> None:
    """Runs the command with the arguments ``words``. Kills it ``delay_s`` seconds after a file is written.

    The file matches ``pattern`` and is not empty. Fails if the command ends before the file is written.
    """
    process = start(cwd, *words)
    while not any(path.stat().st_size for path in cwd.glob(pattern)):
        assert process.poll() is None, f"{pattern}: {process.communicate()[0]}"
        time.sleep(0.01)
    time.sleep(delay_s)
    process.kill()
    process.communicate()


def losses(out: Path, number: int) -> list[dict[str, Any]]:
    lines = (out / f"round-{number}" / "train" / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


def test_each_round_samples_trains_and_evaluates_the_model_of_the_round_before(whole: Path, folder: Path) -> None:
    results = json.loads((whole / "rounds.json").read_text())
    assert [values["round"] for values in results["rounds"]] == [0, 1, 2]
    models = [folder / "model", *(whole / f"round-{number}" / "train" / "final" for number in (1, 2))]
    weights = [load_file(path / "model.safetensors") for path in models]
    for before, after in itertools.pairwise(weights):
        assert any(not before[name].equal(after[name]) for name in after)
    for number, values in enumerate(results["rounds"]):
        (row,) = values["accuracy"]
        evaluation = json.loads((whole / f"round-{number}" / "evaluation" / "results.json").read_text())
        assert row == {name: value for name, value in evaluation["results"][0].items() if name != "model"}
        assert 0 < row["accuracy"] < 1
        if number == 0:
            continue
        assert [compared["with_round"] for compared in values["comparisons"]] == sorted({0, number - 1})
        before = results["rounds"][0]["accuracy"][0]["accuracy"]
        assert values["comparisons"][0]["difference"] == pytest.approx(row["accuracy"] - before)
        recipe = load_recipe(whole / f"round-{number}" / "recipe.yaml")
        assert recipe.model.path == (str(folder / "model") if number == 1 else "out/round-1/train/final")
        assert (recipe.reference.path, recipe.reference_kind) == (None, "copy")
        assert len(recipe.data.train) == sum(source["pairs"] > 0 for source in values["sources"])
        for source in values["sources"]:
            lines = open_pairs(whole.parent / source["path"]).pairs if source["pairs"] else []
            assert len(lines) == source["pairs"]
            for pair in lines:
                assert pair.provenance["model"] == recipe.model.path
        assert values["sources"][1]["pairs_per_epoch"] <= 8
        steps = losses(whole, number)
        assert steps[0]["pairs"] <= 8
        assert values["training"]["steps"] == steps[-1]["step"]
        assert values["training"]["reward_accuracy"] == pytest.approx(steps[-1]["reward_accuracy"])
        # The reference is the model that the round starts from, so the first loss is that of equal models.
        assert steps[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-4)
        assert not (whole / f"round-{number}" / "train" / "checkpoints").exists()


def test_the_page_shows_the_rounds_and_links_to_existing_files(whole: Path) -> None:
    page = (whole / "iterate.html").read_text()
    results = json.loads((whole / "rounds.json").read_text())
    for values in results["rounds"]:
        row = values["accuracy"][0]
        assert f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}" in page
        if training := values.get("training"):
            share, count = training["reward_accuracy"], training["averaged_pairs"]
            assert f"<td>{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / (count - 1)):.1f}</td>" in page
    assert "<th>reward_accuracy in %</th>" in page
    links = [part.partition('"')[0] for part in page.split('href="')[1:]]
    assert {"round-2/correctness.html", "round-1/dropout-ntp.html", "round-2/evaluation/failures.html"} <= set(links)
    assert all((whole / link).exists() for link in links)
    assert "data:image/png;base64," in page
    assert "script" not in page


def test_a_run_that_is_killed_anywhere_gives_the_same_bytes(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Kills the command while it samples, trains or evaluates. Its child process must end, too.

    The environment variable MPO_KILLS is the seed of the random delays before the kills. If MPO_KILLS exists, the test
    continues the run with a second round, and kills the command in that round, too.
    """
    name = write_recipe(folder, tmp_path)
    rng = random.Random(SEED)
    for rounds in ROUNDS:
        for pattern in STAGE_FILES:
            kill_when(tmp_path, pattern.format(rounds), rng.uniform(0, 0.3), name, f"rounds={rounds}")
        status, text = run(tmp_path, name, f"rounds={rounds}")
        assert status == 0, text
    one, other = contents(tmp_path / "out"), contents(whole)
    if rounds == 1:  # the page and the results of two rounds differ
        one, other = (
            {path: files[path] for path in files if path.startswith(("round-0", "round-1"))} for files in (one, other)
        )
        results = [json.loads((out / "rounds.json").read_text())["rounds"][:2] for out in (tmp_path / "out", whole)]
        assert results[0] == results[1]
    assert one.keys() == other.keys()
    assert [path for path in one if one[path] != other[path]] == []
    for number in range(1, rounds + 1):
        assert losses(tmp_path / "out", number) == losses(whole, number)


def test_a_signal_ends_the_stage_and_nothing_is_left_running(folder: Path, tmp_path: Path) -> None:
    name = write_recipe(folder, tmp_path)
    process = start(tmp_path, name)
    assert process.stdout is not None
    while "evaluate" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert "interrupted by SIGTERM; the same command resumes the run" in text
    assert not (tmp_path / "out" / "round-0" / "evaluate.done").exists()
    left = subprocess.run(["pgrep", "-f", f"{folder}/model"], capture_output=True, text=True)
    assert left.stdout == ""


def test_other_settings_or_questions_are_refused(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    name = write_recipe(folder, tmp_path)
    assert main(["iterate", name, "train.optim.learning_rate=1e-3"]) == 2
    error = capsys.readouterr().err
    assert "settings must be the settings that out/settings.json was begun with" in error
    assert "recipe.train.optim.learning_rate: 0.0001 in the file, 0.001 now" in error
    assert main(["iterate", name, f"launch.train=[{sys.executable}]", "page_pairs=3", "engine.batch_size=2"]) == 0
    shutil.copytree(folder, tmp_path / "copy")
    with open(tmp_path / "copy" / "train.jsonl", "a") as file:
        file.write((folder / "test.jsonl").read_text().splitlines()[0])
    values = json.loads((tmp_path / "out" / "settings.json").read_text())
    values["inputs"][str(folder / "train.jsonl")]["items"] = 23
    (tmp_path / "out" / "settings.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["iterate", name]) == 2
    assert "train.jsonl.items: 23 in the file, 24 now" in capsys.readouterr().err


def test_a_folder_of_other_files_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "iterate.html").write_text("mine")
    assert main(["iterate", write_recipe(folder, tmp_path)]) == 2
    assert "output must be a new place or an earlier output of the same command" in capsys.readouterr().err
    assert (tmp_path / "out" / "iterate.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "./none"}, "model must be a folder here or a hub id, got ./none"),
        ({"evaluate": {"data": "none.jsonl"}}, "evaluate.data.none must be a file of questions, got none.jsonl"),
        ({"evaluate": {"data": {"d": "."}}}, "path must be a file of items or questions, got the folder ., which"),
        ({"sample": {"questions": "none.jsonl", "correctness": {}}}, "source must exist, got none.jsonl"),
        (
            {"sample": {"questions": {"path": "q.jsonl", "root_map": [["a", "b"]]}, "correctness": {}}},
            "root_map must be left out unless source is a meta file",
        ),
        (
            {"launch": {"train": ["no-such-launcher"]}},
            "launch.train must begin with a program, got 'no-such-launcher'",
        ),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "run"])
def test_inputs_are_checked_before_the_first_stage(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any], message: str, dry: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question": "a?", "answer_gt": "b"}\n')
    assert main(["iterate", write_recipe(folder, tmp_path, **settings), *dry]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_each_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = write_recipe(folder, tmp_path, launch={"train": [sys.executable, "-B"]})
    assert main(["iterate", name, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}/train.jsonl: 24 questions"
    titles = [line.partition(":")[0] for line in lines[3:]]
    each = ["correctness", "page of correctness", "dropout-ntp", "page of dropout-ntp", "train", "evaluate"]
    assert titles == ["round 0, evaluate", *(f"round {number}, {stage}" for number in (1, 2) for stage in each)]
    assert f"round 2, train: {sys.executable} -B -m mpo_ext.train out/round-2/recipe.yaml" in lines
    assert not (tmp_path / "out").exists()


def test_a_failed_stage_is_named(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = write_recipe(folder, tmp_path, launch={"evaluate": [shutil.which("false") or "false"]})
    assert main(["iterate", name]) == 1
    error = capfd.readouterr().err
    assert "mpo-ext iterate: round 0, evaluate must end with exit status 0, but ended with exit status 1: " in error
    assert main(["iterate", name, f"launch.evaluate=[{shutil.which('true')}]"]) == 1
    assert "but has not written out/round-0/evaluation/results.json" in capfd.readouterr().err


def test_a_round_without_pairs_is_refused(
    folder: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(whole / "round-0", out / "round-0")
    name = write_recipe(folder, tmp_path)
    for pipeline in ("correctness", "dropout-ntp"):
        shutil.copytree(whole / "round-1" / pipeline, out / "round-1" / pipeline)
        (out / "round-1" / f"{pipeline}.done").write_text("{}")
        summary = json.loads((out / "round-1" / pipeline / "summary.json").read_text())
        summary["lines"] = dict.fromkeys(summary["lines"], 0)
        (out / "round-1" / pipeline / "summary.json").write_text(json.dumps(summary))
        (out / "round-1" / pipeline / "pairs.jsonl").write_text("")
    assert main(["iterate", name]) == 2
    error = capfd.readouterr().err
    assert "round 1: out/round-1/correctness/pairs.jsonl has no pairs and is left out" not in error
    assert "round 1 must have pairs, got none from its pipelines: out/round-1/correctness/summary.json, " in error


def test_only_one_process_runs_the_rounds_of_a_folder(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo_ext.files import FileLock

    monkeypatch.chdir(whole.parent)
    with FileLock(whole / "iterate.lock", "x"):
        assert main(["iterate", "out.yaml"]) == 1
    assert f"out must have one writer, but process {os.getpid()} is writing it" in capsys.readouterr().err
