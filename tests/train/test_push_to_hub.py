"""Tests the upload of the final model (``output.push_to_hub``), with a fake hub and with the real client offline."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from digits_run import recipe, tiny, write_pairs
from run_recipe import Job, run, text_of

from mpo_ext.train import model_card
from mpo_ext.train.loop import Trainer
from mpo_ext.train.recipe import OutputRecipe


class Hub:
    """A fake of ``huggingface_hub.HfApi`` that keeps repositories in memory."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.uploads: list[tuple[str, list[str]]] = []
        self.files: dict[str, set[str]] = {}
        self.error: Exception | None = None

    def __call__(self) -> "Hub":
        return self

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(repo_id, private)

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> Any:
        if self.error is not None:
            raise self.error
        files = sorted(path.name for path in folder_path.iterdir())
        earlier = self.files.get(repo_id, set())
        deleted = set(huggingface_hub.utils.filter_repo_objects(earlier, allow_patterns=delete_patterns))
        paths = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        self.files[repo_id] = (earlier - deleted) | paths
        self.uploads.append((repo_id, files))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{len(self.uploads)}")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 4)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Installs a fake hub that has a token, and returns the hub. The model card is an empty file."""
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_card, "write_card", lambda folder, **values: (folder / "README.md").touch())
    return hub


def trainer_of(out: Path, pairs: Path, name: Any = "me/model", **settings: Any) -> Trainer:
    model, processor = tiny()
    return Trainer(recipe(out, pairs, output__push_to_hub=name, **settings), model=model, processor=processor)


def test_the_final_model_is_uploaded(tmp_path: Path, pairs: Path, hub: Hub, capsys: Any) -> None:
    assert trainer_of(tmp_path / "out", pairs).run() == 0
    assert hub.private == {"me/model": True}
    ((name, files),) = hub.uploads
    assert name == "me/model"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "the model is on the hub: https://hub/me/model/commit/1" in capsys.readouterr().err


def test_an_upload_replaces_the_files_of_an_earlier_model(tmp_path: Path, pairs: Path, hub: Hub) -> None:
    pytest.importorskip("peft", reason="needs peft, which dev installs")
    adapters: dict[str, Any] = {"model__lora": {"rank": 2}, "output__save_merged": True}
    assert trainer_of(tmp_path / "adapters", pairs, **adapters).run() == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "merged/config.json"} <= hub.files["me/model"]
    others = {".gitattributes", "results.json", "plots/loss.png", "a/model.safetensors", "a/processor_config.json"}
    hub.files["me/model"] |= others | {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert trainer_of(tmp_path / "whole", pairs).run() == 0
    final = tmp_path / "whole" / "final"
    assert hub.files["me/model"] == others | {str(path.relative_to(final)) for path in final.rglob("*")}
    assert "adapter_config.json" not in hub.files["me/model"]
    assert trainer_of(tmp_path / "again", pairs, **adapters).run() == 0
    assert not {"config.json", "model.safetensors"} & hub.files["me/model"]


def test_a_failed_upload_is_repeated_by_the_same_command(tmp_path: Path, pairs: Path, hub: Hub) -> None:
    hub.error = ConnectionError("no route")
    with pytest.raises(RuntimeError, match=r"the upload of .*final failed: ConnectionError: no route; the model is"):
        trainer_of(tmp_path / "out", pairs).run()
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()
    hub.error = None
    assert trainer_of(tmp_path / "out", pairs).run() == 0
    assert len(hub.uploads) == 1


def test_a_name_without_owner_belongs_to_the_owner_of_the_token(tmp_path: Path, pairs: Path, hub: Hub) -> None:
    assert trainer_of(tmp_path / "out", pairs, {"repo_id": "model", "private": False}).run() == 0
    assert hub.private == {"me/model": False}
    assert hub.uploads[0][0] == "me/model"


def test_a_private_model_is_not_written_into_a_public_repository(tmp_path: Path, pairs: Path, hub: Hub) -> None:
    hub.private["me/model"] = False
    with pytest.raises(ValueError, match="private must be false for 'me/model', which exists and is public, got true"):
        trainer_of(tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


def test_a_run_that_saves_nothing_asks_no_hub(tmp_path: Path, pairs: Path, hub: Hub) -> None:
    model, processor = tiny()
    settings = recipe(tmp_path / "out", pairs, output__push_to_hub="me/model")
    assert Trainer(settings, model=model, processor=processor, save=False).run() == 0
    assert not hub.private
    assert not hub.uploads


def test_no_token_is_said_before_training(
    tmp_path: Path, pairs: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push_to_hub needs a token of the hub for 'me/model': set HF_TOKEN"):
        trainer_of(tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


def use_hub_of_rank_0(error: Exception | None, uploads: Path, rank: int) -> None:
    """Installs a fake hub on rank 0 that writes its uploads into a file. Other ranks exit if they use the hub."""

    class Recorded(Hub):
        def __call__(self) -> Hub:
            if rank:
                os._exit(3)  # an exception would be caught and left out
            return self

        def upload_folder(self, **options: Any) -> Any:
            commit = super().upload_folder(**options)
            uploads.write_text(json.dumps(self.uploads))
            return commit

    hub = Recorded()
    hub.error = error
    huggingface_hub.HfApi = hub  # type: ignore[misc]
    huggingface_hub.get_token = lambda: "hf_token"
    huggingface_hub.constants.HF_HUB_OFFLINE = False


def test_one_of_two_ranks_talks_to_the_hub(tmp_path: Path, pairs: Path) -> None:
    uploads = tmp_path / "uploads.json"
    job = Job(tmp_path / "out", pairs, {"output__push_to_hub": "me/model"}, world_size=2)
    failing = partial(use_hub_of_rank_0, ConnectionError("no route"), uploads)
    assert run(dataclasses.replace(job, hook=failing)) == [1, 1]
    assert text_of(job).count("RuntimeError: output.push_to_hub: the upload of") == 2  # all ranks raise the error
    assert not uploads.exists()
    assert run(dataclasses.replace(job, hook=partial(use_hub_of_rank_0, None, uploads))) == [0, 0], text_of(job)
    ((name, _),) = json.loads(uploads.read_text())
    assert name == "me/model"


# The real client, which is offline here.


@pytest.mark.parametrize("offline", [True, False])
def test_the_client_offline_is_said_before_training(
    offline: bool, tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    # Nothing listens on this port.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = "must be None with HF_HUB_OFFLINE=1" if offline else "'me/model' cannot be created or read on the hub: "
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "push_to_hub must be a string or a section, got 3"),
        ({"private": True}, "push_to_hub.repo_id must be given"),
        ({"repo_id": "a/b", "privat": True}, "did you mean push_to_hub.private?"),
    ],
)
def test_wrong_settings_are_named(value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        OutputRecipe(dir="out", push_to_hub=value)
    assert message in str(error.value)
