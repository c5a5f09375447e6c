"""Fixtures: the files of ``mmpr_files``, and a separate cache folder for each test."""

from pathlib import Path

import pytest
from mmpr_files import broken, images, mmpr, write_lines  # noqa: F401


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the cache folder of the test, which stores converted files and images of datasets."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    try:
        import datasets
    except ImportError:
        pass
    else:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
    return folder / "mpo_ext"
