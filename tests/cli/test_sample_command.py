"""Tests ``mpo-ext sample``: options reach the pipelines, and an error is printed as a single line."""

import argparse
import json
from pathlib import Path

import pytest
from stub_engine import StubEngine

from mpo_ext.answers.matchers import MATCHERS as ALL_MATCHERS
from mpo_ext.cli import sample as cli
from mpo_ext.cli.shared import MATCHERS
from mpo_ext.images import describe_source

OPENAI = ("--engine", "openai", "--base-url", "http://localhost:1/v1", "--engine-option")


@pytest.fixture
def items(tmp_path: Path) -> Path:
    lines = [{"question": f"Q{n}", "chosen": f"It is {n}, as one sees.", "answer_gt": "7"} for n in range(6)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(cli, "load_engine", lambda args, model: StubEngine())
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["sample", *map(str, arguments), "--model", "stub"])
    return args.run(args)


def test_dropout_ntp_takes_its_options(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--keep", "0.25", "--unit", "words", "--samples", "2", "--temperature", "1", "--matcher", "number"]
    assert sample(monkeypatch, "dropout-ntp", items, out, *options, "--matcher-option", "relative=0.05") == 0
    header = json.loads((out / "journal-00000-of-00001.jsonl").read_text().splitlines()[0])["settings"]["pipeline"]
    assert (header["keep"], header["unit"], header["samples"]) == (0.25, "words", 2)
    assert header["sampling"]["temperature"] == 1.0
    assert header["matcher"] == {"kind": "number", "relative": 0.05}
    assert "6 items, 12 samples" in capsys.readouterr().err


def test_correctness_takes_its_options(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    options = ["--samples", "4", "--accuracy", "0.1", "0.9", "--reuse-limit", "2", "--length-balance", "--limit", "3"]
    assert sample(monkeypatch, "correctness", items, out, *options) == 0
    header = json.loads((out / "journal-00000-of-00001.jsonl").read_text().splitlines()[0])["settings"]["pipeline"]
    assert (header["accuracy"], header["reuse_limit"], header["length_balance"]) == ([0.1, 0.9], 2, True)
    assert {path.name for path in out.glob("*s*.json*")} >= {"pairs.jsonl", "format_pairs.jsonl", "summary.json"}
    assert json.loads((out / "summary.json").read_text())["items"] == 3


def test_rlaif_v_takes_its_options(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    options = ["--samples", "9", "--claims", "sentences", "--questions", "statement", "--min-gap", "2"]
    options += ["--pairs-per-question", "5", "--max-shorter", "0.9", "--judge-model", "better", "--template", "none"]
    options += ["--max-list-tokens", "300", "--max-new-tokens", "20"]
    assert sample(monkeypatch, "rlaif-v", items, out, *options) == 0
    header = json.loads((out / "journal-00000-of-00001.jsonl").read_text().splitlines()[0])["settings"]
    settings = header["pipeline"]
    assert (settings["claims"], settings["questions"], settings["samples"]) == ("sentences", "statement", 9)
    assert (settings["min_gap"], settings["pairs_per_question"], settings["max_shorter"]) == (2, 5, 0.9)
    tokens = (settings["sampling"]["max_new_tokens"], settings["rewriting"]["max_new_tokens"])
    assert (settings["template"], tokens) == (None, (20, 300))
    assert (settings["judge"], header["engine"]) == ("better", {"engine": "stub", "judge": {"engine": "stub"}})
    assert json.loads((out / "summary.json").read_text())["generated_tokens_by_stage"]["claims"] == 0


def test_judge_takes_its_options(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    options = ["--mode", "pointwise", "--best-rating", "9", "--min-gap", "0.1", "--samples", "5"]
    assert sample(monkeypatch, "judge", items, out, *options) == 0
    header = json.loads((out / "journal-00000-of-00001.jsonl").read_text().splitlines()[0])["settings"]["pipeline"]
    assert (header["mode"], header["best_rating"], header["min_gap"]) == ("pointwise", 9, 0.1)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    assert all(pair["provenance"]["scores"][0] >= pair["provenance"]["scores"][1] + 0.1 for pair in pairs)


@pytest.mark.parametrize("option", [("--best-rating", 5), ("--min-gap", 0.5), ("--max-shorter", 1.0)])
def test_options_of_ratings_need_pointwise(
    option: tuple[str, object], items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert sample(monkeypatch, "judge", items, tmp_path / "out", *option) == 2
    assert f"{option[0]} must be left out without --mode pointwise, got {option[1]}" in capsys.readouterr().err
    assert sample(monkeypatch, "judge", items, tmp_path / "out", *option, "--mode", "pointwise") == 0
    assert sample(monkeypatch, "judge", items, tmp_path / "out", "--mode", "pointwise") == 0  # these are the defaults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "2"], "--engines must be left out without --ray, got 2"),
        (["--gpus-per-engine", "0.5"], "--gpus-per-engine must be left out without --ray, got 0.5"),
        (["--ray", "local", "--engines", "0"], "engines must be at least 1, got 0"),
    ],
)
def test_options_of_ray_are_checked(
    options: list[str], message: str, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_ray_runs_in_one_process(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out", "--ray", "auto") == 2
    assert "--ray must run in one process, which is the driver, got 2 processes" in capsys.readouterr().err


def test_a_run_of_other_settings_is_refused_in_words(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out") == 0
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out", "--top-k", "20") == 2
    assert "pipeline.sampling.top_k: 50 in the file, 20 now" in capsys.readouterr().err


def test_root_map_moves_a_meta_file(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"one": {"root": "/gone/images", "annotation": "/gone/items.jsonl"}}))
    assert sample(monkeypatch, "dropout-ntp", meta, tmp_path / "out") == 2
    assert "/gone/items.jsonl" in capsys.readouterr().err
    assert sample(monkeypatch, "dropout-ntp", meta, tmp_path / "out", "--root-map", f"/gone={tmp_path}") == 0
    assert "6 items, 6 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "1.5"], "keep must be in [0, 1), got 1.5"),
        (
            ["--matcher", "numbers"],
            "--matcher must be one of exact, choice, number, chart, anls, vqa, math, custom, any, got "
            "'numbers'; did you mean 'number'?",
        ),
        (["--matcher-option", "tolerance"], "--matcher-option must read NAME=JSON, got 'tolerance'"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_what_needs_no_model_is_checked_before_it_is_loaded(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(args: argparse.Namespace, model: str) -> StubEngine:
        raise AssertionError("the model was loaded")

    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    monkeypatch.setattr(cli, "load_engine", load)
    monkeypatch.chdir(tmp_path)

    def refused(pipeline: str, source: object, out: object, *options: object, model: str = "stub") -> str:
        args = parser.parse_args(["sample", pipeline, *map(str, (source, out)), "--model", model, *map(str, options)])
        assert args.run(args) == 2
        return capsys.readouterr().err

    assert refused("correctness", "none.jsonl", "out") == "mpo-ext sample: source must exist, got none.jsonl\n"
    (tmp_path / "pairs.json").write_text("[1, 2]")
    assert "got none among the first 2 of pairs.json: unreadable line" in refused("correctness", "pairs.json", "out")
    (tmp_path / "meta.json").write_text("7")
    assert "must be a meta file in JSON" in refused("correctness", "meta.json", "out")
    (tmp_path / "list.jsonl").write_text('[\n{"a": 1},\n]\n')
    for pipeline in ("correctness", "dropout-ntp"):
        assert "with a JSON array: give it the suffix .json" in refused(pipeline, "list.jsonl", "out")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "got an empty file: empty.jsonl" in refused("dropout-ntp", "empty.jsonl", "out")
    (tmp_path / "truthless.jsonl").write_text('{"question": "Q"}\n')
    assert "must have a true answer" in refused("correctness", "truthless.jsonl", "out")
    assert "out must be a folder, got items.jsonl/sub" in refused("correctness", items, "items.jsonl/sub")
    assert "--matcher must be one of" in refused("dropout-ntp", items, "out", "--matcher", "guess")
    assert "style must be one of" in refused("correctness", items, "out", "--style", "loud")
    assert "block_size must be at least 1, got 0" in refused("correctness", items, "out", "--block-size", 0)
    (tmp_path / "runs").mkdir()
    told = refused("correctness", items, "out", model="runs/nope")
    assert "--model must be a folder here or a hub id, got runs/nope: the folder does not exist" in told
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_command_without_a_traceback(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    whole = StubEngine.generate
    monkeypatch.setattr(StubEngine, "generate", interrupt)
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out") == 130
    assert "mpo-ext sample: interrupted; the same command resumes" in capsys.readouterr().err
    monkeypatch.setattr(StubEngine, "generate", whole)
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--device", "cuda:1"), "--device must be left out with --engine vllm, got cuda:1: set CUDA_VISIBLE_DEVICES"),
        (("--batch-size", "32"), "--batch-size must be left out with --engine vllm, got 32: use --engine-option"),
    ],
)
def test_options_of_transformers_are_refused_with_vllm(
    option: tuple[str, str], message: str, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    command = ["sample", "dropout-ntp", str(items), str(tmp_path / "out"), "--model", "some/model", "--engine", "vllm"]
    args = parser.parse_args([*command, *option])
    assert args.run(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "openai"), "--base-url must be given with --engine openai"),
        (("--engine", "openai", "--dtype", "float16"), "--dtype must be left out with --engine openai, got float16"),
        (("--api-key-env", "NAME"), "--api-key-env must be left out with --engine transformers, got NAME"),
        (
            ("--engine", "openai", "--base-url", "http://localhost:abc/v1", "--engine-option", "tokenizer=none"),
            "base_url must have a valid port",
        ),
        (
            (*OPENAI, 'extra_body={"temperature": 0}'),
            "extra_body must have only fields that the engine does not set, got temperature",
        ),
        ((*OPENAI, "extra_body=abc"), "extra_body must map names of fields to values, got 'abc'"),
    ],
)
def test_options_of_a_server_belong_to_its_engine(
    options: tuple[str, ...], message: str, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    command = ["sample", "dropout-ntp", str(items), str(tmp_path / "out"), "--model", "some/model", *options]
    args = parser.parse_args(command)
    assert args.run(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "tokenizer", "is_refused"),
    [
        ("other", "tokenizer=folder", True), ("other", "tokenizer=none", False), ("other", None, False),
        ("stub", "tokenizer=folder", False),
    ],
)  # fmt: skip
def test_another_judge_at_a_server_has_another_tokenizer(
    judge: str, tokenizer: str | None, is_refused: bool, items: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--engine", "openai", "--judge-model", judge, *(["--engine-option", tokenizer] if tokenizer else [])]
    assert sample(monkeypatch, "judge", items, tmp_path / "out", *options) == (2 if is_refused else 0)
    message = f"tokenizer must be none with another --judge-model, got 'folder' for stub and {judge}"
    assert (message in capsys.readouterr().err) is is_refused


def test_the_help_lists_all_matchers() -> None:
    assert set(MATCHERS) == set(ALL_MATCHERS)


def test_the_model_of_a_run_is_found_in_its_folder(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[str] = []

    def load(args: argparse.Namespace, model: str) -> StubEngine:
        loaded.append(model)
        return StubEngine()

    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    monkeypatch.setattr(cli, "load_engine", load)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    command = ["sample", "dropout-ntp", str(items), str(tmp_path / "out"), "--model", str(run)]
    args = parser.parse_args(command)
    assert args.run(args) == 2
    assert "without final/: repeat its mpo-ext train command" in capsys.readouterr().err
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    assert args.run(args) == 0
    assert loaded == [str(run / "final")]


def test_pairs_of_repeated_questions_are_counted(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items.write_text(items.read_text() * 2)
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "out") == 0
    pairs = (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()
    assert len(pairs) == 2 * len(set(pairs)) > 0
    text = f"\n  pairs of questions that occur more than once: {len(pairs) // 2}\n"
    assert text in capsys.readouterr().err


def test_a_run_without_a_single_pair_fails_with_its_reasons(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question": "Q", "image": f"{n}.png", "answer_gt": "7"} for n in range(2)]
    items.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"question": "Q"}]))
    out = tmp_path / "out"
    assert sample(monkeypatch, "correctness", items, out, "--image-root", tmp_path / "images") == 1
    error = capsys.readouterr().err
    path = tmp_path / "images" / "0.png"
    text = f"image must be a file that exists, got {describe_source(str(path))}"
    text += ": relative paths start at image_root (--image-root)"
    assert f"no pair was made from 3 items: 2 with image cannot be read, for example: {text}" in error
    assert "1 with no true answer" in error
    assert json.loads((out / "summary.json").read_text())["examples"] == {"image cannot be read": text}


def test_a_system_prompt_is_a_setting_of_the_run(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, system = tmp_path / "out", {"role": "system", "content": "Be brief."}
    assert sample(monkeypatch, "dropout-ntp", items, out, "--system", "Be brief.") == 0
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    turns = [pair["extra"]["$source"]["messages"] for pair in pairs]
    assert [pair["question"] for pair in pairs] == [turn[1]["content"] for turn in turns]
    assert all(turn == [system, {"role": "user", "content": turn[1]["content"]}] for turn in turns)
    capsys.readouterr()
    assert sample(monkeypatch, "dropout-ntp", items, out) == 2
    assert "system" in capsys.readouterr().err
    assert sample(monkeypatch, "dropout-ntp", items, tmp_path / "other", "--system", " ") == 2
    assert "system must be a text, got ' '" in capsys.readouterr().err
