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
    Pair,
    open_pairs,
)
from mpo_ext.data.hf import DatasetPairs, load_dataset_folder, save_dataset, to_dataset

KINDS = ("standard", "conversational")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_opens_its_images(kind: Any, mmpr: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    pairs = list(open_pairs(mmpr).pairs)
    dataset = to_dataset(pairs, kind)
    assert [image.size for image in dataset[4]["images"]] == [(40, 30), (30, 50)]
    assert dataset[7]["images"] == []
    assert list(DatasetPairs(dataset)) == pairs


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_without_images_has_no_column_for_them(kind: Any) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    dataset = to_dataset([PAIR], kind)
    assert "images" not in dataset.column_names
    prompt = dataset[0]["prompt"]
    assert prompt == ("q" if kind == "standard" else [{"role": "user", "content": "q"}])
    assert list(DatasetPairs(dataset)) == [PAIR]


def test_a_dataset_has_no_tools() -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    pair = dataclasses.replace(PAIR, extra={"$source": {"tools": [tool]}})
    with pytest.raises(ValueError, match="pairs of a dataset must have no tools, got"):
        to_dataset([PAIR, pair])


def test_images_of_a_foreign_dataset_are_written_out(images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
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
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    image = {"bytes": (images / "a.png").read_bytes(), "path": None}
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "images": [image]}
    existing = str(images / "a.png")
    paths: list[Any] = [[existing], ["/missing.png"], [], None, [None], [""]]
    dataset = datasets.Dataset.from_list([{**row, "image_paths": value} for value in paths])
    given, *stored = DatasetPairs(dataset, image_dir=tmp_path / "out")
    assert given.images == (existing,)
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


@pytest.fixture
def written(images: Path, tmp_path: Path) -> Path:
    """Returns a dataset with three rows: two images, no images, one image."""
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    a, b = str(images / "a.png"), str(images / "sub/b.jpg")
    pairs = [Pair("<image><image>q", "c", "r", (a, b)), PAIR, Pair("q", "c", "r", (b,))]
    save_dataset(tmp_path / "written", pairs)
    return tmp_path / "written"


def contents(place: Path, **options: Any) -> list[list[bytes]]:
    """Returns the bytes of the images of each pair."""
    return [
        [Path(image).read_bytes() for image in open_pairs(place, **options).read(index)[1].images]
        for index in range(3)
    ]


def test_a_dataset_contains_its_images(written: Path, images: Path, cache: Path) -> None:
    pairs = list(open_pairs(written).pairs)
    a, b = (images / "a.png").read_bytes(), (images / "sub/b.jpg").read_bytes()
    assert contents(written, ignore=["image_paths"]) == [[a, b], [], [b]]
    assert [pair.images for pair in open_pairs(written, ignore=["images"]).pairs] == [pair.images for pair in pairs]
    images.rename(images.with_name("moved"))
    assert contents(written, root_map=[(str(images), str(images.with_name("moved")))]) == [[a, b], [], [b]]
    moved = open_pairs(written, root_map=[(str(images), str(images.with_name("moved")))]).pairs[0]
    assert moved.images == (str(images.with_name("moved") / "a.png"), str(images.with_name("moved") / "sub/b.jpg"))
    assert contents(written) == [[a, b], [], [b]]
    (images / "sub").mkdir(parents=True)
    images.with_name("moved").joinpath("sub/b.jpg").rename(images / "sub/b.jpg")
    assert contents(written) == [[a, b], [], [b]]
    first = open_pairs(written).pairs[0]
    assert first.images[1:] == pairs[0].images[1:]
    assert Path(first.images[0]).parent == cache / "images"


@pytest.mark.parametrize("paths", [None, [], [None], ["relative.png"], ["a.png", "b.png"]])
def test_image_paths_that_name_no_file_do_not_hide_images(
    paths: Any, written: Path, images: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    dataset = datasets.load_from_disk(str(written)).cast_column("images", datasets.List(datasets.Image(decode=False)))
    features = dataset.features
    rows = [{**row, "image_paths": paths if index == 2 else row["image_paths"]} for index, row in enumerate(dataset)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "t.parquet"))
    if paths is not None and len(paths) == 2:
        with pytest.raises(BadLine, match="image_paths must name each of 1 images, got 2 paths"):
            open_pairs(tmp_path / "t.parquet").pairs[2]
    else:
        assert contents(tmp_path / "t.parquet")[2] == [(images / "sub/b.jpg").read_bytes()]


def test_an_output_is_replaced_only_by_a_complete_dataset(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written)
    for place in (".", "../written", str(written)):
        with pytest.raises(ValueError, match="out must not be the current folder, got"):
            save_dataset(place, [PAIR])
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: str(path) == str(written))
        with pytest.raises(ValueError, match=r"out must not be a mount point, got .*: name a folder inside it"):
            save_dataset(written, [PAIR])
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda one, two: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_dataset(written, [PAIR])
    assert len(open_pairs(written).pairs) == 3
    (tmp_path / "link").symlink_to("written")
    assert save_dataset(tmp_path / "link", [PAIR]) == 1
    assert (tmp_path / "link").is_symlink()
    assert [len(open_pairs(tmp_path / name).pairs) for name in ("link", "written")] == [1, 1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_dataset_has_at_least_one_pair(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    with pytest.raises(ValueError, match="pairs of a dataset must hold at least one pair, got none"):
        save_dataset(tmp_path / "out", [])
    assert not list(tmp_path.iterdir())
