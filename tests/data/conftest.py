"""Fixtures of the files in ``mmpr_files``, and a cache for each test."""

from pathlib import Path

import pytest
from mmpr_files import broken, images, mmpr, write_lines  # noqa: F401


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which converted files and images of datasets are stored."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    try:
        import datasets
    except ImportError:
        pass
    else:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
    return folder / "mpo_ext"
