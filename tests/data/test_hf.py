"""Tests pairs read from Hugging Face datasets."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import PAIR

from mpo_ext.data import (
    BadLine,
    open_pairs,
)
from mpo_ext.data.hf import DatasetPairs, load_dataset_folder, to_dataset

KINDS = ("standard", "conversational")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_opens_its_images(kind: Any, mmpr: Path) -> None:
    pytest.importorskip("datasets")
    pairs = list(open_pairs(mmpr).pairs)
    dataset = to_dataset(pairs, kind)
    assert [image.size for image in dataset[4]["images"]] == [(40, 30), (30, 50)]
    assert dataset[7]["images"] == []
    assert list(DatasetPairs(dataset)) == pairs


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_without_images_has_no_column_for_them(kind: Any) -> None:
    pytest.importorskip("datasets")
    dataset = to_dataset([PAIR], kind)
    assert "images" not in dataset.column_names
    prompt = dataset[0]["prompt"]
    assert prompt == ("q" if kind == "standard" else [{"role": "user", "content": "q"}])
    assert list(DatasetPairs(dataset)) == [PAIR]


def test_a_dataset_has_no_tools() -> None:
    pytest.importorskip("datasets")
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    pair = dataclasses.replace(PAIR, extra={"$source": {"tools": [tool]}})
    with pytest.raises(ValueError, match="pairs of a dataset must have no tools, got"):
        to_dataset([PAIR, pair])


def test_images_of_a_foreign_dataset_are_written_out(images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {**dict.fromkeys(("prompt", "chosen", "rejected"), datasets.Value("string"))}
        | {"images": datasets.List(datasets.Image())}
    )
    content = (images / "a.png").read_bytes()
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "images": [{"bytes": content, "path": None}]}
    dataset = datasets.Dataset.from_list([row, row], features=features)
    dataset.save_to_disk(str(tmp_path / "foreign"))
    with pytest.raises(BadLine, match="images must be paths unless image_dir is given"):
        load_dataset_folder(tmp_path / "foreign")[0]
    one, two = load_dataset_folder(tmp_path / "foreign", image_dir=tmp_path / "out")
    assert one == two
    assert Path(one.images[0]).suffix == ".png"
    assert Path(one.images[0]).read_bytes() == content


def test_an_empty_image_paths_does_not_hide_the_images_of_a_table(images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = {"bytes": (images / "a.png").read_bytes(), "path": None}
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "images": [image]}
    paths: list[Any] = [["/b.png"], [], None, [None], [""]]
    dataset = datasets.Dataset.from_list([{**row, "image_paths": value} for value in paths])
    given, *stored = DatasetPairs(dataset, image_dir=tmp_path / "out")
    assert given.images == ("/b.png",)
    for pair in stored:
        assert Path(pair.images[0]).read_bytes() == image["bytes"]


def test_datasets_is_only_needed_for_datasets() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "import mpo_ext.data, mpo_ext.data.hf as hf, mpo_ext.cli.data\n"
        "try: hf.to_dataset([])\n"
        "except ImportError as error: print(error)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    advice = "install the extra 'data' of mpo-ext (in its source tree: pip install '.[data]')"
    assert done.stdout.strip() == f"Hugging Face datasets is missing: {advice}", done.stderr
