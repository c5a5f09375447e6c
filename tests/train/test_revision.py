"""Tests that a run uses the revisions of the hub that its recipe names. The hub is a cache folder without network."""

import json
from pathlib import Path
from typing import Any

import digits_run
import huggingface_hub.constants as hub
import pytest
import torch
import transformers
from test_trainer import TEXT, text_pairs, text_tokenizer
from torch import Tensor

from mpo_ext.evaluate.models import ModelSource, find_model, load_engine
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.plan.planner import plan
from mpo_ext.train.loop import Trainer, train
from mpo_ext.train.preflight import check_needs

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Writes the model me/m with two revisions into a cache. Returns the weights of both revisions."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    folder, made = tmp_path / "hub" / "models--me--m", {}
    (folder / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(COMMITS.items()):
        torch.manual_seed(seed)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
        model.save_pretrained(folder / "snapshots" / commit)
        text_tokenizer().save_pretrained(folder / "snapshots" / commit)
        (folder / "refs" / name).write_text(commit)
        made[name] = model.state_dict()
    return made


def is_equal(model: Any, weights: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in weights.items())


def recipe(tmp_path: Path, name: str = "out", **settings: Any) -> Any:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 8)
    settings = {"optim__max_steps": 1, "optim__learning_rate": 0.0, **settings}
    return digits_run.recipe(tmp_path / name, pairs, model__path="me/m", **settings)


@pytest.mark.parametrize("revision", ["main", "v2", COMMITS["v2"], None])
def test_adapters_name_the_revision_of_their_base(
    revision: str | None, tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    settings = {"model__lora": {"rank": 2}, "output__save_merged": True, "model__revision": revision}
    assert train(recipe(tmp_path, **settings)) == 0
    expected = weights["main" if revision in ("main", None) else "v2"]
    final = tmp_path / "out" / "final"
    assert json.loads((final / "adapter_config.json").read_text())["revision"] == revision
    assert is_equal(transformers.AutoModelForCausalLM.from_pretrained(final / "merged"), expected)
    card = (final / "README.md").read_text()
    assert (f'from_pretrained("me/m", revision="{revision}", dtype' in card) == (revision is not None)
    (final / "merged").rename(tmp_path / "merged")  # the adapters alone
    source = find_model(str(tmp_path / "out"))
    assert source == ModelSource("me/m", str(final), revision)
    engine = load_engine(source, TransformersEngine.from_pretrained)
    assert isinstance(engine, TransformersEngine)
    assert is_equal(engine.model, expected)


def test_the_reference_has_its_own_revision(tmp_path: Path, weights: dict[str, dict[str, Tensor]]) -> None:
    for number, (model, reference) in enumerate([(None, "v2"), ("v2", "main"), (None, None), ("v2", "v2")]):
        settings = {"model__revision": model, "reference__path": "me/m", "reference__revision": reference}
        if (model, reference) == ("v2", "main"):
            settings |= {"model__lora": {"rank": 2}, "model__dtype": "bfloat16", "reference__kind": "copy"}
        made = recipe(tmp_path, f"out{number}", **settings)
        trainer = Trainer(made)
        expected = {
            name: value.to(getattr(torch, made.model.dtype)) for name, value in weights[reference or "main"].items()
        }
        assert is_equal(trainer.reference_model, expected)
    text = r"reference\.revision must be given if reference\.path is model\.path and model\.revision is set, got None"
    with pytest.raises(ValueError, match=text):
        recipe(tmp_path, reference__path="me/m", model__revision="v2")
    with pytest.raises(ValueError, match=r"reference\.revision must be None without path, got 'v2'"):
        recipe(tmp_path, reference__revision="v2")


@pytest.mark.parametrize("name", ["model", "reference"])
def test_a_folder_has_no_revisions(name: str, tmp_path: Path, weights: dict[str, dict[str, Tensor]]) -> None:
    folder = str(tmp_path / "hub" / "models--me--m" / "snapshots" / COMMITS["main"])
    settings = {f"{name}__path": folder, f"{name}__revision": "v2"}
    pairs = text_pairs(tmp_path / "pairs.jsonl", 8)
    made = digits_run.recipe(tmp_path / "out", pairs, **{"model__path": "me/m", **settings})
    for begin in (Trainer, plan, check_needs):
        with pytest.raises(ValueError, match=rf"{name}\.revision must be None for a folder.* got 'v2' with {folder}"):
            begin(made)
