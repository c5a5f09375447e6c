"""Tests the evaluation command: its options reach the evaluation, and an error is printed as a single line."""

import argparse
import json
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, write_lines
from stub_engine import StubEngine

from mpo_ext.cli import evaluate as cli


@pytest.fixture
def items(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return write_lines(tmp_path / "items.jsonl", [{"question": f"Q{n}", "answer_gt": "7"} for n in range(6)])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, engine: StubEngine | None = None) -> int:
    monkeypatch.setattr(cli, "load_engine", lambda args, model: engine or StubEngine())
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["evaluate", *map(str, arguments)])
    return args.run(args)


def test_options_reach_the_evaluation(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--prompt", "both", "cot_boxed", "--samples", 3, "--temperature", 0.5, "--top-p", 0.9, "--top-k", 7]
    options += ["--max-new-tokens", 9, "--seed", 4, "--matcher", "number", "--matcher-option", "relative=0.05"]
    options += ["--limit", 4, "--export", "vlmevalkit", "lmms-eval"]
    model = items.parent / "model"
    assert run(monkeypatch, model, f"b={model}", "--data", items, "--data", f"e={items}", "--out", tmp_path / "o",
               *options) == 0  # fmt: skip
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    settings = results["settings"]
    assert list(settings["models"]) == ["model", "b"]
    assert {name: each["questions"] for name, each in settings["data"].items()} == {"items": 4, "e": 4}
    assert {name: each["max_new_tokens"] for name, each in settings["prompts"].items()} == {
        "direct": 9, "cot": 9, "cot_boxed": 9
    }  # fmt: skip
    assert settings["matcher"] == {"kind": "number", "relative": 0.05}
    values = [settings[name] for name in ("samples", "temperature", "top_p", "top_k", "seed", "limit")]
    assert values == [3, 0.5, 0.9, 7, 4, 4]
    assert len(list((tmp_path / "o" / "vlmevalkit").rglob("*.tsv"))) == 2 * 2 * 3 * 3
    assert len(list((tmp_path / "o" / "lmms-eval").rglob("*.jsonl"))) == 2 * 2 * 3


def test_a_folder_of_questions_names_its_files(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = items.parent
    arguments = (folder / "model", "--data", folder, "--out", tmp_path / "o")
    assert run(monkeypatch, *arguments) == 2
    expected = (
        f"path must be a file of items or questions, got the folder {folder}, which contains items.jsonl: name a"
    )
    assert expected in capsys.readouterr().err
    (folder / "state.json").touch()
    assert run(monkeypatch, *arguments) == 2
    assert "of a dataset that save_to_disk wrote: write it as a file with the dataset's to_parquet" in (
        capsys.readouterr().err
    )


def test_all_models_are_located_before_the_first_is_asked(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/nope", "model/final/it", "./nope"):
        assert run(monkeypatch, "a=model", f"b={name}", "--data", items, "--out", tmp_path / "o") == 2
        assert "the folder does not exist" in capsys.readouterr().err
        assert not (tmp_path / "o" / "journals").exists()


def test_models_are_named_by_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a=b" / "final").mkdir(parents=True)
    (tmp_path / "items.v2.jsonl").touch()
    assert cli._named("MODEL", [str(tmp_path / "a=b"), "x=org/name", "org/other.1"]) == {
        "a=b": str(tmp_path / "a=b"), "x": "org/name", "other.1": "org/other.1"
    }  # fmt: skip
    assert cli._named("MODEL", [str(tmp_path / "a=b" / "final")]) == {"a=b": str(tmp_path / "a=b" / "final")}
    assert cli._named("--data", [str(tmp_path / "items.v2.jsonl")]) == {"items.v2": str(tmp_path / "items.v2.jsonl")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "2"], "samples must be 1 at temperature 0"),
        (["--prompt", "cott"], "did you mean 'cot'?"),
        (["--matcher", "numbers"], "--matcher must be one of exact, choice, number"),
        (["--matcher-option", "tolerance"], "--matcher-option must read NAME=JSON, got 'tolerance'"),
        (["--data", "items.jsonl", "--data", "x/items.jsonl"], "--data must have different names"),
        (["--data", "=items.jsonl"], "--data must read NAME=PATH or PATH, got '=items.jsonl'"),
        (["--root-map", "a"], "root_map must read OLD=NEW, got 'a'"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(monkeypatch, items.parent / "model", "--data", f"d={items}", "--out", tmp_path / "o", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("mpo-ext evaluate: ")
    assert message in error


def test_a_process_reports_that_others_have_not_finished(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, items.parent / "model", "--data", items, "--out", tmp_path / "o") == 0
    assert "process 0 of 2 has finished, others have not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--export", "excel"], "exports must be among vlmevalkit, lmms-eval, got 'excel'"),
        (["--data", "x=none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_inputs_are_named(
    options: list[str], message: str, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(monkeypatch, items.parent / "model", "--data", f"d={items}", "--out", tmp_path / "o", *options) == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_that_asks_nothing_fails(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question": "Q", "image": "gone.png", "answer_gt": "7"}] * 2
    path = write_lines(tmp_path / "gone.jsonl", lines)
    assert run(monkeypatch, items.parent / "model", "--data", path, "--out", tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert "mpo-ext evaluate: no question was asked: image cannot be read (image must be a file that exists" in error
    assert "gone.png: relative paths start at image_root (--image-root))\n" in error
    assert (tmp_path / "o" / "results.json").exists()


def test_unreadable_responses_and_skipped_questions_are_told(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"question": "Q", "image": "gone.png", "answer_gt": "7"}
    asked = [{"question": each, "answer_gt": "7"} for each in "abcd"]
    data = write_lines(tmp_path / "d.jsonl", [*asked, gone, gone])
    other = write_lines(tmp_path / "e.jsonl", asked)
    answers = {each: ["Final answer: 7" if each == "a" else "?"] for each in "abcd"}
    arguments = (f"m={items.parent / 'model'}", "--data", data, "--data", other, "--prompt", "cot")
    status = run(monkeypatch, *arguments, "--out", tmp_path / "o", engine=ScriptedEngine(answers))
    assert status == 0
    *_, unreadable, skipped, number = capsys.readouterr().err.splitlines()
    assert unreadable == (
        "m, cot: 75.0 % of the responses unreadable: do --prompt, --style and --matcher fit the model? "
        "failures.html shows the responses"
    )
    assert skipped.startswith("d: 2 questions not asked: image cannot be read, for example: image must be a file that")
    assert "gone.png" in skipped
    assert number == "d: the accuracy is over 4 of 6 questions"


def test_nothing_is_told_about_readable_answers_to_all_questions(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine({f"Q{n}": ["7"] for n in range(6)})
    assert run(monkeypatch, items.parent / "model", "--data", items, "--out", tmp_path / "o", engine=engine) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"written to {tmp_path / 'o'}"
