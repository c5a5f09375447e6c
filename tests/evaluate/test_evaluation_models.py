"""Tests how a model name or folder is resolved, by loading tiny models."""

import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted_engine import write_lines
from stub_engine import StubEngine

from mpo_ext.__main__ import main
from mpo_ext.chat import Conversation
from mpo_ext.evaluate.models import ModelSource, find_model, load_engine
from mpo_ext.evaluate.run import evaluate
from mpo_ext.evaluate.scoring import EvaluationConfig
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.journal import SettingsMismatchError

CONFIG = EvaluationConfig(prompts=("none",), max_new_tokens=3, style="direct", matcher={"kind": "number"})


def save_model(folder: Path, seed: int) -> Path:
    from mpo_ext.demo.model import build_model, build_processor

    torch.manual_seed(seed)
    processor = build_processor()
    build_model(processor.tokenizer, hidden_size=32, layers=2).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two models and questions about images."""
    pytest.importorskip("sklearn", reason="needs sklearn, which dev installs")
    from mpo_ext.demo import digits

    folder = tmp_path_factory.mktemp("digits")
    save_model(folder / "one", 0)
    save_model(folder / "two", 1)
    lines = []
    tasks = digits.sample_tasks(digits.load_digits()["held-out"], 12, np.random.default_rng(0), form="direct")
    for number, task in enumerate(tasks):
        assert task.picture is not None
        task.picture.save(folder / f"{number}.png")
        lines.append({"question": task.question, "image": f"{number}.png", "answer_gt": str(task.answer)})
    write_lines(folder / "questions.jsonl", lines)
    return folder


def make(path: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(path, trust_remote_code=True, device="cpu")


def run(digits_folder: Path, out: Path, **models: Any) -> dict[str, Any]:
    results = evaluate(
        models, {"d": digits_folder / "questions.jsonl"}, out, config=CONFIG, image_root=str(digits_folder),
        make_engine=make,
    )  # fmt: skip
    assert results is not None
    return results


def responses(out: Path, model: str) -> list[str]:
    return [json.loads(line)["response"] for line in (out / f"predictions-{model}.jsonl").read_text().splitlines()]


def test_the_command_compares_two_models_with_images(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate", str(digits_folder / "one"), f"B={digits_folder / 'two'}",
        "--data", f"grids={digits_folder / 'questions.jsonl'}", "--image-root", str(digits_folder),
        "--out", str(tmp_path / "out"), "--prompt", "both", "--max-new-tokens", "3", "--style", "direct",
        "--matcher", "number", "--trust-remote-code", "--device", "cpu", "--limit", "6",
        "--export", "lmms-eval", "vlmevalkit",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in said.out.splitlines()[2:]] == ["grids, direct", "grids, cot"]
    assert "one grids direct: 6/6 items" in said.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["model"], row["prompt"], row["questions"]) for row in results["results"]] == [
        ("one", "direct", 6), ("B", "direct", 6), ("one", "cot", 6), ("B", "cot", 6)
    ]  # fmt: skip
    engine = make(str(digits_folder / "one"))
    assert engine.settings().items() <= results["settings"]["models"]["one"].items()
    assert responses(tmp_path / "out", "one") != responses(tmp_path / "out", "B")
    assert len(list((tmp_path / "out" / "vlmevalkit").rglob("*.tsv"))) == 4


def test_the_command_asks_again_without_the_images(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate", str(digits_folder / "one"), "--data", f"grids={digits_folder / 'questions.jsonl'}",
        "--image-root", str(digits_folder), "--out", str(tmp_path / "out"), "--prompt", "none", "--max-new-tokens",
        "3", "--style", "direct", "--matcher", "number", "--engine-option", "trust_remote_code=true", "--device",
        "cpu", "--without-image",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "| grids, none-without-image |" in said
    assert "same answer %" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["without_image"]
    assert row["questions"] == 12
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions-one.jsonl").read_text().splitlines()]
    blind = [line for line in lines if line["prompt"] == "none-without-image"]
    assert len(lines) == 2 * len(blind) == 24
    pairs = {(line["question"], line["response"]) for line in blind}
    assert len(pairs) == len({line["question"] for line in blind})  # without the image, only the question matters


def test_a_run_stands_for_its_final_model(digits_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_folder / "one", tmp_path / "run" / "final")
    (tmp_path / "run" / "checkpoints").mkdir()
    run(digits_folder, tmp_path / "out", run=tmp_path / "run", model=str(digits_folder / "one"))
    assert responses(tmp_path / "out", "run") == responses(tmp_path / "out", "model")
    assert find_model(str(tmp_path / "run")) == ModelSource(str(tmp_path / "run" / "final"))


def test_other_weights_in_the_same_folder_are_refused(digits_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_folder / "one", tmp_path / "model")
    run(digits_folder, tmp_path / "out", m=tmp_path / "model")
    run(digits_folder, tmp_path / "out", m=tmp_path / "model")
    run(digits_folder, tmp_path / "out", m=make(str(tmp_path / "model")))  # a loaded model is compared, too
    shutil.copytree(digits_folder / "two", tmp_path / "model", dirs_exist_ok=True)
    for model in (tmp_path / "model", make(str(tmp_path / "model"))):
        with pytest.raises(SettingsMismatchError, match=r"engine\.weights"):
            run(digits_folder, tmp_path / "out", m=model)


def test_adapters_are_merged_into_their_base_model(digits_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, which dev installs")
    engine = make(str(digits_folder / "one"))
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(engine.model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    engine.processor.save_pretrained(tmp_path / "whole")
    assert find_model(str(tmp_path / "adapter")) == ModelSource(str(digits_folder / "one"), str(tmp_path / "adapter"))
    out = tmp_path / "out"
    models = {"adapter": tmp_path / "adapter", "whole": tmp_path / "whole", "base": digits_folder / "one"}
    results = run(digits_folder, out, **models)
    assert responses(out, "adapter") == responses(out, "whole") != responses(out, "base")
    assert len({settings["weights"] for settings in results["settings"]["models"].values()}) > 1
    assert results["settings"]["models"]["adapter"]["model"] == str(tmp_path / "adapter")
    engine = load_engine(find_model(str(tmp_path / "adapter")), make)
    template = "{{ 'Note. ' }}" + engine.chat.chat_template
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template)  # as a run with another template writes it
    for chosen, begins in ((None, True), ("{{ '' }}" + engine.chat.chat_template, False)):
        own = functools.partial(
            TransformersEngine.from_pretrained, trust_remote_code=True, chat_options={"chat_template": chosen}
        )
        loaded = load_engine(find_model(str(tmp_path / "adapter")), own)
        text = loaded.chat.prompt_text(Conversation(question="Q"))
        assert text.startswith("Note. ") == begins
    template = "{{ note }}" + engine.chat.chat_template
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template)
    for name in ("note", "notes"):
        options = {"trust_remote_code": True, "chat_options": {"chat_template_kwargs": {name: "N"}}}
        own = functools.partial(TransformersEngine.from_pretrained, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_engine(find_model(str(tmp_path / "adapter")), own)
        texts = [str(warning.message) for warning in caught if "chat_template_kwargs" in str(warning.message)]
        rule = "the chat template does not read these names of chat_template_kwargs: 'notes'; did you mean 'note'?"
        assert texts == ([rule] if name == "notes" else [])
    with pytest.raises(
        ValueError, match=r"must be a whole model for the engine StubEngine, got the adapters '.*adapter'"
    ):
        load_engine(find_model(str(tmp_path / "adapter")), lambda path: StubEngine())
    (tmp_path / "adapter" / "merged").mkdir()
    (tmp_path / "adapter" / "merged" / "config.json").write_text("{}")
    assert find_model(str(tmp_path / "adapter")) == ModelSource(str(tmp_path / "adapter" / "merged"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"checkpoints/step-00000002/manifest.json": "{}"}, "without final/: repeat its mpo-ext train command"),
        ({"manifest.json": "{}"}, "its final/"),
        ({f"{n}.txt": "" for n in range(9)}, "with 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt and 1 more"),
        ({}, "with nothing"),
        ({"adapter_config.json": "{}"}, "must name the base model of the adapters"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "/no/base"}'},
            "must name a base model that exists here",
        ),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "a/b", "revision": 1}'},
            "must be a text or null, got 1",
        ),
    ],
)
def test_an_error_says_how_to_get_a_model(files: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        find_model(str(folder))
    assert message in str(caught.value)


def test_names_without_a_folder(tmp_path: Path) -> None:
    assert find_model("OpenGVLab/InternVL3-1B-hf") == ModelSource("OpenGVLab/InternVL3-1B-hf")
    (tmp_path / "file").touch()
    for name, message in (
        (str(tmp_path / "none"), "the folder does not exist"),
        (str(tmp_path / "file"), "got the file"),
    ):
        with pytest.raises(ValueError, match=message):
            find_model(name)
