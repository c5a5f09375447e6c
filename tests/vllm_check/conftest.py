"""Fixtures for the tests with vLLM, which are skipped if vLLM is missing; ``make vllm-check`` installs it."""

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the models ``text``, ``image``, ``suppressed`` and ``adapter``, and files of questions."""
    import vllm_models

    folder = tmp_path_factory.mktemp("vllm")
    vllm_models.write_text_model(folder / "text")
    vllm_models.write_image_model(folder / "image")
    vllm_models.write_suppressed(folder / "text", folder / "suppressed")
    vllm_models.write_adapter(folder / "text", folder / "adapter")
    for kind in ("text", "image"):
        lines = vllm_models.items_of(folder, 200, images=kind == "image")
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
