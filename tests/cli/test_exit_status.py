"""Tests the exit statuses of the commands.

Status 1: the work failed, or a check found a defect. Status 2: the user must change arguments, settings or paths.
"""

from __future__ import annotations

import argparse
import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_recipe import write_text_run

from mpo_ext.checks import DefectError, LinesError
from mpo_ext.cli import convert_model, data, demo, doctor, evaluate, plan, sample, train
from mpo_ext.cli.main import main
from mpo_ext.cli.shared import exit_status
from mpo_ext.data.reader import BadLine
from mpo_ext.files import LockedError
from mpo_ext.images import ImageError
from mpo_ext.journal import SettingsMismatchError
from mpo_ext.train.checkpoint_files import CheckpointError
from mpo_ext.train.encode import BadPairError

PAIR = {"question": "Read row 1 .", "chosen": "3 , 3", "rejected": "4"}
ITEM = {"question": "Read row 1 .", "answer_gt": "3", "chosen": "3"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("status")
    write_text_run(folder)
    (folder / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
    (folder / "bad.jsonl").write_text(json.dumps(PAIR) + "\n{\n")
    (folder / "no-answers.jsonl").write_text('{"question": "Q"}\n')
    (folder / "broken.yaml").write_text("a: [\n")
    (folder / "file").write_text("")
    (folder / "nothing.json").write_text("{}")
    (folder / "empty").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "mine" / "pairs.jsonl").write_text("mine")
    return folder


@pytest.fixture
def place(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes ``written`` the working directory and returns it. The folder has a model, data and a recipe.

    Also blocks access to the Hugging Face hub.
    """
    monkeypatch.chdir(written)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return written


TRAIN = ["train", "recipe.yaml"]
SAMPLE = ["sample", "dropout-ntp", "items.jsonl", "sampled", "--model", "model"]
EVALUATE = ["evaluate", "model", "--data", "items.jsonl", "--out", "evaluated"]
RLAIF_V = ["sample", "rlaif-v", "items.jsonl", "sampled", "--model", "model"]
LORA = "model.lora={rank: 2}"

# Arguments, exit status, words of the message.
TABLE: list[tuple[list[str], int, str]] = [
    ([], 2, "the following arguments are required: SUBCOMMAND"),
    (["tarin"], 2, "invalid choice"),
    (["--version"], 0, "mpo-ext"),
    (["doctor"], 0, "backends"),
    (["doctor", "model"], 0, "valid"),
    (["doctor", "gone"], 2, "model must be a folder"),
    (["doctor", "empty"], 2, "model must be a folder with config.json"),
    (["data", "check", "pairs.jsonl"], 0, "No findings"),
    (["data", "check", "bad.jsonl"], 1, "bad JSON"),
    (["data", "check", "gone.jsonl"], 2, "path must exist, got gone.jsonl"),
    (["data", "check", "pairs.jsonl", "--model", "gone"], 2, "model must be a folder"),
    (["data", "stats", "pairs.jsonl"], 0, "pairs"),
    (["data", "stats", "gone.jsonl"], 2, "path must exist"),
    (["data", "stats", "pairs.jsonl", "--split", "train"], 2, "split must be None"),
    (["data", "convert", "bad.jsonl", "out.jsonl", "--to", "trl"], 1, "--skip-bad"),
    (["data", "convert", "gone.jsonl", "out.jsonl", "--to", "trl"], 2, "path must exist"),
    (["data", "convert", "pairs.jsonl", "file", "--to", "trl"], 2, "out must not exist without --force"),
    (["data", "view", "gone.jsonl"], 2, "path must exist"),
    (["data", "view", "pairs.jsonl", "--out", "file"], 2, "--out must be a new place"),
    (["convert-model", "gone/model", "converted"], 2, "IN must be"),
    (["convert-model", "./gone", "converted"], 2, "IN must be"),
    (["convert-model", "empty", "converted"], 2, "IN must be a folder with config.json"),
    (["convert-model", "model", "converted"], 2, "model_type"),
    (["convert-model", "model", "mine"], 2, "OUT must be a new or empty folder"),
    (["sample"], 2, "PIPELINE"),
    ([*SAMPLE, "--keep", "2"], 2, "keep must be in [0, 1)"),
    ([*SAMPLE[:-1], "gone"], 2, "model must be a folder here or a model of the Hugging Face hub"),
    ([*SAMPLE[:-1], "./gone"], 2, "--model must be a folder here"),
    (["sample", "dropout-ntp", "gone.jsonl", "sampled", "--model", "model"], 2, "source must exist"),
    (["sample", "correctness", "no-answers.jsonl", "sampled", "--model", "model"], 2, "must have a true answer"),
    (["sample", "judge", "items.jsonl", "file", "--model", "model"], 2, "out must be a folder"),
    (["sample", "rlaif-v", "items.jsonl", "mine", "--model", "model"], 2, "out must be a new place"),
    ([*SAMPLE, "--engine", "openai"], 2, "--base-url must be given"),
    (["sample", "judge", "nothing.json", "sampled", "--model", "model"], 2, "got a meta file that lists no items"),
    ([*RLAIF_V, "--max-list-tokens", "0"], 2, "max_list_tokens must be at least 1, got 0"),
    ([*EVALUATE, "--batch-size", "0"], 2, "batch_size must be at least 1, got 0"),
    (["plan", "recipe.yaml", "--bandwidth", "inf", "--tflops", "1"], 2, "--bandwidth must be positive and finite"),
    (["plan", "recipe.yaml", "--bandwidth", "1", "--tflops", "nan"], 2, "--tflops must be positive"),
    ([*SAMPLE, "--matcher-option", "accept=1", "--matcher-option", "accept=0"], 2, "got accept twice"),
    ([*SAMPLE, "--dtype", "bf16"], 2, "invalid choice: 'bf16'"),
    ([*EVALUATE, "--dtype", "float99"], 2, "invalid choice: 'float99'"),
    ([*SAMPLE, "--device", "cuda:77"], 2, "device must be a device of this machine, got 'cuda:77'"),
    ([*EVALUATE, "--device", "nothing"], 2, "device must be a device of this machine, got 'nothing'"),
    ([*SAMPLE, "--chat-template", "gone.jinja"], 2, "gone.jinja"),
    ([*EVALUATE, "--prompt", "shout"], 2, "must be one of direct"),
    (["evaluate", "gone", "--data", "items.jsonl", "--out", "evaluated"], 2, "model must be a folder"),
    (["evaluate", "model", "--data", "gone.jsonl", "--out", "evaluated"], 2, "gone.jsonl"),
    (["evaluate", "model", "--data", "no-answers.jsonl", "--out", "evaluated"], 2, "with a true answer"),
    (["plan", "recipe.yaml", "--gpu", "H100"], 0, "PREDICTED"),
    (["plan", "gone.yaml"], 2, "recipe must exist"),
    (["plan", "broken.yaml"], 2, "must be YAML"),
    (["plan", "recipe.yaml", "data.train=gone.jsonl"], 2, "data.train: path must exist, got gone.jsonl"),
    (["plan", "recipe.yaml", "--gpu", "Z80"], 2, "Z80"),
    ([*TRAIN, "--dry-run"], 0, "pairs.jsonl"),
    ([*TRAIN, "--dry-run", "data.train=bad.jsonl"], 1, "NOT VALID"),
    ([*TRAIN, "optim.epochs=0"], 2, "optim.epochs must be at least 1"),
    ([*TRAIN, "--world", "2"], 2, "--world must come with --dry-run"),
    ([*TRAIN, "model.freeze=[vision_tower]"], 2, "freeze must name parts that the model has"),
    (
        [*TRAIN, "loss.router_aux_loss_coef=0.1", "output.dir=routers"],
        2,
        "loss.router_aux_loss_coef must be null or 0",
    ),
    (["demo", "--out", "file"], 2, "--out must be a writable folder"),
    (["demo", "--out", "mine"], 2, "--out must be a new or empty folder"),
    (["demo", "--seeds", "0"], 2, "must be an integer of at least 1"),
    # What the run needs is checked by a dry run, too.
    *(
        ([*TRAIN, *options, *settings], 2, words)
        for options in ([], ["--dry-run"])
        for settings, words in (
            (["data.train=gone.jsonl"], "data.train: path must exist, got gone.jsonl"),
            (["data.train=gone/meta.json"], "relative paths start in"),
            (["data.eval=gone.jsonl"], "data.eval: path must exist, got gone.jsonl"),
            (["model.path=gone"], "model.path must be a folder here or a model of the Hugging Face hub"),
            (["reference.path=./gone"], "reference.path must be a folder here"),
            (["output.eval_generate=gone.jsonl"], "output.eval_generate.path must be a file of questions"),
            (["output.eval_generate=."], "output.eval_generate.path must be a file of questions, got the folder ."),
            (["output.push_to_hub=me/model"], "output.push_to_hub"),
            (["output.trackers=[nothing]"], "output.trackers must name trackers"),
            (["output.dir=file/run"], "output.dir must be a folder"),
            (["output.resume=gone"], "output.resume must be"),
            (
                ["data.train=gone.jsonl", "data.eval=lost.jsonl", "model.path=./gone"],
                "3 settings of the recipe cannot be used:\n  model.path",
            ),
        )
    ),
    ([*TRAIN, "--dry-run", "output.eval_generate=no-answers.jsonl"], 2, "output.eval_generate.path: data must hold"),
    ([*TRAIN, "--dry-run", "output.eval_generate=items.jsonl"], 0, "1 lines of questions for output.eval_generate"),
    ([*TRAIN, "--dry-run", "loss.router_aux_loss_coef=0.1"], 2, "loss.router_aux_loss_coef must be null or 0"),
]


def status_of(arguments: list[str]) -> Any:
    try:
        return main(arguments)
    except SystemExit as stopped:  # argparse
        return stopped.code


@pytest.mark.parametrize(
    ("arguments", "status", "words"), TABLE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_status(arguments: list[str], status: int, words: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    got = status_of(arguments)
    text = "".join(capfd.readouterr())
    assert got == status, text
    assert words in text
    assert "Traceback" not in text


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(("package", "setting", "extra"), [
    ("peft", LORA, "lora"), ("bitsandbytes", "model.lora={rank: 2, quantization: 4bit}", "qlora"),
])  # fmt: skip
def test_a_package_that_a_setting_needs(
    options: list[str], package: str, setting: str, extra: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from mpo_ext.train import preflight

    find = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    assert main([*TRAIN, *options, setting]) == 2
    assert f"needs {package}: install the extra '{extra}' of mpo-ext" in capsys.readouterr().err


def test_the_table_has_every_command() -> None:
    parser = argparse.ArgumentParser()
    subcommands = parser.add_subparsers()
    for module in (doctor, data, convert_model, sample, train, plan, evaluate, demo):
        module.add_parser(subcommands)

    def commands(parser: argparse.ArgumentParser, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:
            yield names
        for action in nested:
            for name, inner in action.choices.items():
                yield from commands(inner, (*names, name))

    in_table = {tuple(arguments[: len(names)]) for arguments, *_ in TABLE for names in commands(parser)}
    assert set(commands(parser)) <= in_table
    statuses = {
        names[0]: {status for arguments, status, _ in TABLE if arguments[:1] == [names[0]]}
        for names in commands(parser)
    }
    assert all(2 in found for found in statuses.values()), statuses


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), 2),
        (TypeError("x"), 2),
        (ImportError("x"), 2),
        (FileNotFoundError("x"), 2),
        (OSError(errno.ENOTDIR, "x"), 2),
        (OSError("no folder with a model"), 2),
        (ImageError("x"), 2),
        (LinesError("x"), 2),
        (SettingsMismatchError(Path("x"), []), 2),
        (OSError(errno.ENOSPC, "x"), 1),
        (OSError(errno.EIO, "x"), 1),
        (RuntimeError("x"), 1),
        (FloatingPointError("x"), 1),
        (LockedError("x"), 1),
        (CheckpointError("x"), 1),
        (DefectError("x"), 1),
        (BadPairError("x"), 1),
        (BadLine(None, "kind", "x"), 1),  # type: ignore[arg-type]
    ],
    ids=lambda value: repr(value) if isinstance(value, Exception) else "",
)
def test_the_status_of_an_error(error: Exception, status: int) -> None:
    assert exit_status(error) == status


def test_an_interruption(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: object, **options: object) -> Callable[..., Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mpo_ext.cli.sample"], "load_engine", interrupt)
    assert main(SAMPLE) == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err


def test_a_fresh_process_checks_a_local_model_and_names_the_model_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    (tmp_path / "p.jsonl").write_text('{"question": "q", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "r.yaml").write_text(f"model: {{path: {tmp_path}/run}}\ndata: {{train: {tmp_path}/p.jsonl}}\n")
    command = [sys.executable, "-m", "mpo_ext", "train", str(tmp_path / "r.yaml"), f"output.dir={tmp_path}/out"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False), run.stderr
    assert f"got {tmp_path}/run, of a run whose model is {tmp_path}/run/final" in run.stderr
    run = subprocess.run([*command, f"model.path={tmp_path}/run/final"], capture_output=True, text=True, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False), run.stderr


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        ("train r.yaml --dryrun", "--dryrun; did you mean 'dry-run'?"),
        ("data check --form trl p", "--form p; did you mean 'from'?"),
        ("data check p --nonsense", "--nonsense"),
        (
            "train r.yaml --learning-rate 1e-3",
            "--learning-rate 1e-3; settings of a recipe have no dashes: optim.learning_rate=VALUE",
        ),
        ("data check p --learning-rate 1", "--learning-rate 1"),
        ("data check p q", "q"),
    ],
)
def test_an_unknown_option_gets_the_nearest_one(words: str, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {ending}\n")
