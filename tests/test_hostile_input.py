"""Tests inputs that once made a command crash, hang, or use up all file handles."""

import contextlib
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from digits_run import recipe
from mmpr_files import GOOD
from stub_engine import StubEngine
from test_trainer import text_tokenizer

from mpo_ext.chat import ChatEncoder, template
from mpo_ext.chat.time_limit import time_limit
from mpo_ext.checks import environment_integer, is_nested_deeply
from mpo_ext.cli.main import main
from mpo_ext.data import MMPRDataset, open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.runner import run
from mpo_ext.processors import check_on_hub
from mpo_ext.train.preflight import check_needs
from mpo_ext.train.setup import make_accelerator


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [99, 101, 300, 900, 100_000])
def test_deeply_nested_lines_are_bad_lines(depth: int, tmp_path: Path) -> None:
    good = {"question": "q", "chosen": "It is seven", "rejected": "r"}
    bad = json.dumps({**good, "question": "another"})[:-1] + f', "extra": {nested(depth - 1)}}}'
    items = tmp_path / "items.jsonl"
    items.write_text(f"{json.dumps(good)}\n{bad}\n")
    is_bad = depth > 100
    report = check_pairs(open_pairs(items, format="pairs"))
    assert report.totals() == ({"bad JSON": 1} if is_bad else {})
    summary = run(DropoutNTP(DropoutNTPConfig()), StubEngine(), items, tmp_path / "out")
    assert summary is not None
    assert summary.skipped["unreadable line"] == is_bad


def test_depth_is_measured_without_recursion() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [{"a": value}]
    assert is_nested_deeply(value)
    assert not is_nested_deeply({"a": [1, {"b": [2]}]})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_bad_rank_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv(name, "x")
    message = f"{name} must be an integer of at least 0 in the environment, got 'x'"
    assert main(["sample", "dropout-ntp", "a.jsonl", str(tmp_path), "--model", "m"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        make_accelerator(recipe(tmp_path / "out", tmp_path / "p.jsonl"))
    monkeypatch.setenv("LOCAL_RANK", " 3 ")
    assert environment_integer("LOCAL_RANK", 0) == 3


def test_a_meta_file_of_many_subsets_keeps_few_files_open(tmp_path: Path) -> None:
    entries = {}
    for number in range(300):
        line = {**GOOD, "image": "", "question": f"q{number}"}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(line) + "\n")
        entries[f"s{number}"] = {"root": "", "annotation": f"{number}.jsonl"}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    before = len(os.listdir("/proc/self/fd"))
    dataset = MMPRDataset(tmp_path / "meta.json")
    for _ in range(2):
        assert [pair.question for pair in dataset] == [f"q{number}" for number in range(300)]
    assert len(os.listdir("/proc/self/fd")) < before + 80


def test_an_endless_chat_template_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "RENDER_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(template.ChatError, match=r"the chat template must end within 0.2 seconds"):
        ChatEncoder(text_tokenizer(), chat_template=loop)


def test_the_time_limit_ends_only_its_own_block() -> None:
    with time_limit(60, "it"):
        pass
    raised = []

    def work() -> None:
        try:
            with time_limit(0.05, "work in a thread"):
                while True:
                    time.sleep(0.001)
        except TimeoutError as error:
            raised.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert raised == ["work in a thread must end within 0.05 seconds, got no end"]


def test_a_wrong_model_path_is_refused_after_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(url: str, **options: Any) -> SimpleNamespace:
        asked.append(url)
        raise ConnectionError("no network\nhere")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = (
        "--model must be a folder here or a model of the Hugging Face hub, got my-model: no folder my-model exists in "
        f"{tmp_path}, and "
    )
    with pytest.raises(
        FileNotFoundError, match=f"{message}the hub .* {re.escape('(ConnectionError: no network here)')}"
    ):
        check_on_hub("--model", "my-model")
    assert len(asked) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{message}HF_HUB_OFFLINE is set, and the cache does not hold"):
        check_on_hub("--model", "my-model")
    assert len(asked) == 1
    with pytest.raises(FileNotFoundError, match="no folder a b exists"):
        check_on_hub("--model", "a b")
    (tmp_path / "my-model").mkdir()
    check_on_hub("--model", "my-model")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **options: "/cache/config.json")
    check_on_hub("--model", "owner/cached")


def test_a_model_is_looked_for_with_the_options_that_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def answer(url: str, *, token: Any = None, **options: Any) -> SimpleNamespace:
        asked.append((url, token))
        return SimpleNamespace()

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    cached = tmp_path / "models--owner--name"
    (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("a" * 40) / "config.json").write_text("{}", encoding="utf-8")
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("a" * 40, encoding="utf-8")
    cache = {"cache_dir": str(tmp_path)}
    check_on_hub("model", "owner/name", revision="v1", local_files_only=True, attn_implementation="sdpa", **cache)
    check_on_hub("model", "owner/name", revision="a" * 40, **cache)
    assert not asked
    for options, problem in (
        ({"revision": "v2"}, "local_files_only is set, and the cache does not hold the model at the revision 'v2'"),
        ({}, "local_files_only is set, and the cache does not hold the model$"),
    ):
        with pytest.raises(FileNotFoundError, match=problem):
            check_on_hub("model", "owner/name", local_files_only=True, **cache, **options)
    check_on_hub("model", "owner/name", revision="v2", token="hf_mine", **cache)
    assert asked == [("https://huggingface.co/owner/name/resolve/v2/config.json", "hf_mine")]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "pairs.jsonl").touch()
    for revision in ("v1", "v2"):
        settings = {"model__path": "owner/name", "model__revision": revision}
        with contextlib.nullcontext() if revision == "v1" else pytest.raises(FileNotFoundError, match="'v2'"):
            check_needs(recipe(tmp_path / "out", tmp_path / "pairs.jsonl", **settings))
