"""Tests Parquet files, saved datasets, and datasets of the Hugging Face hub."""

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import run_data
from rows import assistant, system, user

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.hub import hub_id

datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
ORIGIN = {"ds_name": "d", "origin_dataset": "o", "origin_split": '{"model": "m"}', "idx": "0", "image_path": "x/a.png"}


def rlaif_v(images: Path, count: int = 2, first: int = 0) -> Any:
    """Returns a dataset with the columns of RLAIF-V: ``count`` rows, numbered from ``first``."""
    features = datasets.Features(
        {
            **dict.fromkeys(("question", "chosen", "rejected", *ORIGIN), datasets.Value("string")),
            "image": datasets.Image(),
        }
    )
    image = {"bytes": (images / "a.png").read_bytes(), "path": "a.png"}
    numbers = range(first, first + count)
    rows = [{"question": f"q{i}", "chosen": "c", "rejected": "r", "image": image, **ORIGIN} for i in numbers]
    return datasets.Dataset.from_list(rows, features=features)


def hub_folder(folder: Path, images: Path) -> Path:
    """Writes a folder in the layout of a dataset on the hub, with two splits."""
    (folder / "data").mkdir(parents=True)
    rlaif_v(images, 3).to_parquet(str(folder / "data/train-00000-of-00002.parquet"))
    rlaif_v(images, 2, 3).to_parquet(str(folder / "data/train-00001-of-00002.parquet"))
    rlaif_v(images, 1, 9).to_parquet(str(folder / "data/test-00000-of-00001.parquet"))
    (folder / "README.md").write_text("# A dataset\n")
    return folder


def check_rlaif_v(source: Any, images: Path, cache: Path, count: int) -> None:
    assert source.format == "rlaif-v"
    pairs = list(source.pairs)
    assert [pair.question for pair in pairs] == [f"q{index}" for index in range(count)]
    (image,) = pairs[0].images
    assert Path(image).parent == cache / "images"
    assert Path(image).read_bytes() == (images / "a.png").read_bytes()
    assert pairs[0] == Pair("q0", "c", "r", (image,), provenance=ORIGIN)


def test_parquet_files_are_read_and_images_are_stored(
    images: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rlaif_v(images).to_parquet(str(tmp_path / "RLAIF-V-Dataset_000.parquet"))
    source = open_pairs(tmp_path / "RLAIF-V-Dataset_000.parquet")
    check_rlaif_v(source, images, cache, 2)
    assert str(source.pairs.locate(1)) == f"{tmp_path / 'RLAIF-V-Dataset_000.parquet'}:2"
    other = open_pairs(tmp_path / "RLAIF-V-Dataset_000.parquet", image_dir=tmp_path / "out")
    assert Path(other.pairs[0].images[0]).parent == tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    (_, pair), _ = open_pairs(tmp_path / "RLAIF-V-Dataset_000.parquet", image_dir="out", root=tmp_path / "root").scan()
    assert pair.images[0] == other.pairs[0].images[0]  # not below the root


def test_a_folder_of_shards_is_one_table(images: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        rlaif_v(images, 2, 2 * shard).to_parquet(str(tmp_path / f"shards/RLAIF-V-Dataset_00{shard}.parquet"))
    rlaif_v(images).select([]).to_parquet(str(tmp_path / "shards/RLAIF-V-Dataset_002.parquet"))
    check_rlaif_v(open_pairs(tmp_path / "shards"), images, cache, 4)


@pytest.mark.parametrize("names", [("batch1", "batch2_train"), ("part-0", "part-1-test")])
def test_files_of_a_folder_that_no_split_takes_are_refused(
    names: tuple[str, str], images: Path, tmp_path: Path, cache: Path
) -> None:
    for name in names:
        rlaif_v(images, 2).to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(ValueError, match=rf"of which {names[0]}.parquet would be left out"):
        open_pairs(tmp_path)
    (tmp_path / f"{names[1]}.parquet").rename(tmp_path / "other.parquet")
    assert len(open_pairs(tmp_path).pairs) == 4


def test_a_folder_with_several_splits_must_be_given_one(images: Path, tmp_path: Path, cache: Path) -> None:
    folder = hub_folder(tmp_path / "repository", images)
    with pytest.raises(ValueError, match=r"split must be one of train, test for .*repository, got None"):
        open_pairs(folder)
    with pytest.raises(ValueError, match=r"split must be one of train, test for .*repository, got eval"):
        open_pairs(folder, split="eval")
    check_rlaif_v(open_pairs(folder, split="train"), images, cache, 5)
    assert len(open_pairs(folder, split="test").pairs) == 1


def test_shards_of_different_columns_lose_no_image_silently(images: Path, tmp_path: Path) -> None:
    text = datasets.Dataset.from_list([{"question": "<image>", "chosen": "c", "rejected": "r"}])
    for name, shards in (("a", (text, rlaif_v(images))), ("b", (rlaif_v(images), text))):
        (tmp_path / name).mkdir()
        for number, shard in enumerate(shards):
            shard.to_parquet(str(tmp_path / name / f"{number}.parquet"))
    with pytest.raises(ValueError, match=r"path must hold parquet files, got .*a: Couldn't cast .* ds_name"):
        open_pairs(tmp_path / "a")
    *good, bad = (pair for _, pair in open_pairs(tmp_path / "b").pairs.scan())
    assert all(pair.images for pair in good)
    assert isinstance(bad, BadLine)
    assert bad.kind == "no image"


@pytest.mark.parametrize(
    ("format", "row", "pair"),
    [
        (
            "trl",
            {"prompt": [system("s"), user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
            Pair("q", "c", "r", extra={"$source": {"messages": [system("s"), user("q")]}}),
        ),
        ("trl", {"prompt": "q", "chosen": "c", "rejected": "r", "image": None}, Pair("q", "c", "r")),
        ("trl", {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}, Pair("q", "c", "r")),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "c"},
                "rejected": {"from": "gpt", "value": "r"},
            },
            Pair("q", "c", "r"),
        ),
        ("swift", {"messages": [user("q"), assistant("c")], "rejected_response": "r"}, Pair("q", "c", "r")),
        (
            "alpaca",
            {
                "instruction": "q",
                "input": "",
                "chosen": "c",
                "rejected": "r",
                "n": 2.5,
                "no": float("nan"),
                "when": datetime.date(2026, 1, 2),
            },
            Pair("q", "c", "r", extra={"n": 2.5, "no": None, "when": "2026-01-02"}),
        ),
        (
            "sharegpt",
            {"conversations": {"from": ["human"], "value": ["q"]}, "chosen": "c", "rejected": "r"},
            Pair("q", "c", "r"),
        ),
        (
            "pairs",
            {"question": "q", "chosen": "c", "rejected": "r", "images": ["a.png"]},
            Pair("q", "c", "r", ("a.png",)),
        ),
    ],
)
def test_tables_hold_rows_of_every_format(format: str, row: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([row])
    dataset.to_parquet(str(tmp_path / "t.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    source = open_pairs(tmp_path / "t.parquet")
    assert (source.format, source.pairs[0]) == (format, pair)
    source = open_pairs(tmp_path / "saved")
    assert (source.format, source.pairs[0]) == ("hf", pair)


def test_the_column_image_of_a_dataset_is_taken(images: Path, tmp_path: Path, cache: Path) -> None:
    features = {**dict.fromkeys(("prompt", "chosen", "rejected"), datasets.Value("string")), "image": datasets.Image()}
    image = {"bytes": (images / "a.png").read_bytes(), "path": None}
    row = {"prompt": "q", "chosen": "c", "rejected": "r"}
    rows = [{**row, "image": image}, {**row, "image": None}, {**row, "prompt": "<image>", "image": None}]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "saved"))
    first, second, third = (pair for _, pair in open_pairs(tmp_path / "saved").pairs.scan())
    assert Path(first.images[0]).parent == cache / "images"
    assert second == Pair("q", "c", "r")
    assert isinstance(third, BadLine)
    assert third.kind == "no image"


@pytest.mark.parametrize("with_path", [True, False])
def test_images_of_parquet_files_without_features(with_path: bool, images: Path, tmp_path: Path, cache: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which dev installs")
    content = (images / "a.png").read_bytes()
    image = {"bytes": content, "path": "a.png"} if with_path else content
    table = {"prompt": ["q"], "chosen": ["c"], "rejected": ["r"], "image": [image]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    (image_path,) = open_pairs(tmp_path / "t.parquet").pairs[0].images
    assert Path(image_path).parent == cache / "images"
    assert Path(image_path).read_bytes() == content


@pytest.mark.parametrize("column", ["image", "images"])
def test_binary_columns_are_images(column: str, images: Path, tmp_path: Path, cache: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which dev installs")
    content = (images / "a.png").read_bytes()
    value = content if column == "image" else [content]
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        array = pyarrow.array([value], kind if column == "image" else pyarrow.list_(kind))
        table = {"question": ["q"], "chosen": ["c"], "rejected": ["r"], column: array}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
        source = open_pairs(tmp_path / "t.parquet")
        assert source.format == "rlaif-v"
        assert Path(source.pairs[0].images[0]).read_bytes() == content


@pytest.mark.parametrize(("field", "value"), [("system", "s"), ("history", [["p", "a"]])])
def test_a_used_system_prompt_decides_the_format(field: str, value: Any, tmp_path: Path) -> None:
    row = {"question": "q", "chosen": "c", "rejected": "r", "image": "a.png"}
    empty = type(value)()
    for rows, format in (([empty, value], "rlaif-v"), ([empty, empty], "mmpr"), ([None, value], "rlaif-v")):
        dataset = datasets.Dataset.from_list([{**row, field: part} for part in rows])
        dataset.to_parquet(str(tmp_path / "t.parquet"))
        source = open_pairs(tmp_path / "t.parquet")
        assert (source.format, len(source.pairs[0].images)) == (format, 1)
        assert ("messages" in source.pairs[1].source) == (format == "rlaif-v")


def test_images_inside_messages_of_a_dataset_are_not_decoded(images: Path, tmp_path: Path) -> None:
    text = datasets.Value("string")
    part = {"type": text, "text": text, "image": datasets.Image()}
    messages = datasets.List({"role": text, "content": datasets.List(part)})
    image = {"bytes": (images / "a.png").read_bytes(), "path": None}
    content = [{"type": "image", "text": None, "image": image}, {"type": "text", "text": "q", "image": None}]
    answer = [assistant([{"type": "text", "text": "c", "image": None}])]
    features = datasets.Features({"prompt": messages, "chosen": messages, "rejected": messages})
    rows = [{"prompt": [user(content)], "chosen": answer, "rejected": answer}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "t.parquet"))
    pair = open_pairs(tmp_path / "t.parquet").pairs[0]
    assert (pair.question, len(pair.images)) == ("<image>\nq", 1)
    assert Path(pair.images[0]).read_bytes() == image["bytes"]


@pytest.mark.parametrize("column", ["video_path", "audio_path", "picture", "image_path"])
def test_an_unread_column_is_refused(column: str, tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", column: "a"}
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(BadLine, match=f"unread field: .* got the field '{column}' 'a'"):
        open_pairs(tmp_path / "t.parquet").pairs[0]
    assert open_pairs(tmp_path / "t.parquet", ignore=[column]).pairs[0] == Pair("q", "c", "r")


def test_a_saved_dataset_of_several_splits(images: Path, tmp_path: Path, cache: Path) -> None:
    splits = datasets.DatasetDict({"train": rlaif_v(images), "test": rlaif_v(images, 1)})
    splits.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"set split \(--split\), or name its folder, to one of train, test"):
        open_pairs(tmp_path / "saved")
    assert len(open_pairs(tmp_path / "saved", split="train").pairs) == 2
    with pytest.raises(ValueError, match="split must be one of train, test, got 'tset'"):
        open_pairs(tmp_path / "saved", split="tset")
    datasets.DatasetDict({"train": rlaif_v(images)}).save_to_disk(str(tmp_path / "one"))
    assert len(open_pairs(tmp_path / "one").pairs) == 2


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("openbmb/RLAIF-V-Dataset", "openbmb/RLAIF-V-Dataset"),
        ("OpenGVLab/MMPR-v1.2", "OpenGVLab/MMPR-v1.2"),
        ("hf://owner/name", "owner/name"),
        ("hf://datasets/owner/name.jsonl", "owner/name.jsonl"),
        ("owner/name.jsonl", None),
        ("owner/name.parquet", None),
        ("owner/train.jsnol", None),
        ("here/name", None),
        ("here/there", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("name", None),
    ],
)
def test_which_paths_are_ids_of_the_hub(
    path: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/there").mkdir(parents=True)
    assert hub_id(path) == name
    if name is None and path != "here/there":
        with pytest.raises(FileNotFoundError, match="path must exist, got ") as error:
            open_pairs(path)
        assert ("hf://" in str(error.value)) == (path == "here/name"), error.value
    with pytest.raises(ValueError, match="path must read hf://owner/name, got hf://owner"):
        hub_id("hf://owner")


@pytest.fixture
def hub(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes ``datasets.load_dataset("owner/name")`` read a local folder. Returns the options of each call."""
    folder, load, calls = hub_folder(tmp_path / "hub/owner/name", images), datasets.load_dataset, []

    def load_dataset(path: str, **options: Any) -> Any:
        if path != "owner/name":
            return load(path, **options)
        calls.append(options)
        return load(str(folder))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_dataset_of_the_hub_is_read(hub: list[dict[str, Any]], images: Path, cache: Path) -> None:
    for path in ("owner/name", "hf://owner/name"):
        source = open_pairs(path, split="train", revision="v1", config="default")
        check_rlaif_v(source, images, cache, 5)
        assert source.path == "hf://owner/name"
        assert str(source.pairs.locate(0)) == "hf://owner/name:1"
    assert hub == [{"name": "default", "revision": "v1"}] * 2
    with pytest.raises(ValueError, match="split must be one of train, test for owner/name, got None"):
        open_pairs("owner/name")


def test_commands_and_the_trainer_take_a_dataset_of_the_hub(
    hub: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpo_ext.train.mixture import Mixture
    from mpo_ext.train.source_recipe import SourceRecipe

    assert run_data("check", "owner/name", "--split", "train", "--revision", "main") == 0
    assert "hf://owner/name: Format rlaif-v (detected): 5 of 5 pairs with images" in capsys.readouterr().out
    assert run_data("convert", "hf://owner/name", tmp_path / "p.jsonl", "--to", "pairs", "--split", "test") == 0
    assert open_pairs(tmp_path / "p.jsonl").pairs[0].question == "q9"
    mixture = Mixture([SourceRecipe(path="owner/name", split="train", ignore=["idx"])])
    assert (len(mixture), mixture[0].question) == (5, "q0")
    assert "idx" not in mixture[0].provenance
    (overview,) = mixture.inspect()
    assert str(overview) == "hf://owner/name: format rlaif-v (detected); 5 of 5 pairs with images"


def test_settings_of_the_hub_are_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "c", "rejected": "r"}\n')
    for setting in ("revision", "config", "split"):
        with pytest.raises(ValueError, match=f"{setting} must be None for .*a.jsonl"):
            open_pairs(tmp_path / "a.jsonl", **{setting: "x"})  # type: ignore[arg-type]


def test_errors_of_the_hub_name_the_setting_and_both_readings(tmp_path: Path) -> None:
    code = """
from mpo_ext.data import open_pairs
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.source_recipe import SourceRecipe
for open_source in (
    lambda: open_pairs("opnbmb/RLAIF-V"),
    lambda: open_pairs("hf://opnbmb/RLAIF-V"),
    lambda: Mixture([SourceRecipe(path="opnbmb/RLAIF-V")], name="data.train"),
    lambda: Mixture([SourceRecipe(path="gone/train.jsonl")], name="data.eval"),
):
    try:
        open_source()
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    here, prefixed, train, gone = done.stdout.splitlines()
    offline = "the hub is offline (HF_HUB_OFFLINE) and the cache does not hold it"
    both = "path must be a file or folder here, or a dataset of the Hugging Face hub, got "
    assert here.startswith(
        f"ValueError {both}opnbmb/RLAIF-V: no file or folder opnbmb/RLAIF-V exists here, and {offline}"
    )
    assert prefixed.startswith(f"ValueError {both}hf://opnbmb/RLAIF-V: {offline}")
    assert train.startswith(f"ValueError data.train: {both}opnbmb/RLAIF-V: no file or folder")
    assert gone.startswith("FileNotFoundError data.eval: path must exist, got gone/train.jsonl: relative paths start")
    assert "hf://" not in gone  # data with an extension are hardly a dataset of the hub


def test_a_missing_package_names_the_extra(tmp_path: Path, images: Path) -> None:
    rlaif_v(images).to_parquet(str(tmp_path / "t.parquet"))
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from mpo_ext.data import open_pairs\n"
        "for path in ('t.parquet', 'owner/name'):\n"
        "    try: open_pairs(path)\n"
        "    except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout.count("Hugging Face datasets is missing: install the extra 'data' of mpo-ext") == 2, done.stderr


def write_answer(path: Path, answer: str) -> None:
    """Writes a parquet file with a pair whose chosen response is ``answer``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"question": "q", "chosen": answer, "rejected": "r", "image": ""}
    with open(path, "wb") as file:  # the package datasets would split a name with "::"
        datasets.Dataset.from_list([row]).to_parquet(file)


def answers(path: Path, split: str | None = None) -> list[str]:
    return [pair.chosen for pair in open_pairs(path, split=split).pairs]


README = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n# Pairs\n"


@pytest.mark.parametrize("readme", [None, "# Pairs\n", "---\nlicense: mit\n---\n# Pairs\n", README])
def test_only_a_list_in_the_readme_leaves_out_files(readme: str | None, tmp_path: Path) -> None:
    for name in ("train", "more"):
        write_answer(tmp_path / f"{name}.parquet", name)
    if readme is not None:
        (tmp_path / "README.md").write_text(readme.replace("{files}", "more.parquet"))
    if readme is README:
        assert answers(tmp_path) == ["more"]
        return
    with pytest.raises(ValueError, match=r"of which more.parquet would be left out: rename the files, or list the"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("readme", [None, "# Pairs\n"])
def test_images_in_a_folder_of_parquet_files_are_no_rows(readme: str | None, images: Path, tmp_path: Path) -> None:
    write_answer(images / "data.parquet", "c")
    for name in ("train/1.png", "train/2.png", "3.png"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes((images / "a.png").read_bytes())
    if readme is not None:
        (images / "README.md").write_text(readme)
    assert answers(images) == ["c"]


@pytest.mark.parametrize("name", ["x.jsonl", "sub/x.csv", "x.jsonl.gz"])
def test_rows_beside_parquet_files_are_refused(name: str, tmp_path: Path) -> None:
    write_answer(tmp_path / "data.parquet", "c")
    (tmp_path / "sub").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"only parquet files have rows, got .*, of which {name} would be left out"):
        open_pairs(tmp_path)
    (tmp_path / "README.md").write_text(README.replace("{files}", "data.parquet"))
    assert answers(tmp_path) == ["c"]
    (tmp_path / "README.md").write_text(README.replace("{files}", "../*/*.parquet"))
    with pytest.raises(ValueError, match=r"path must (be a folder whose README.md lists|hold) parquet files"):
        open_pairs(tmp_path)


def test_a_file_in_two_splits_is_refused_and_no_row_is_read_twice(tmp_path: Path) -> None:
    write_answer(tmp_path / "one/train/train_1/train.parquet", "a")
    assert answers(tmp_path / "one") == ["a"]
    write_answer(tmp_path / "two/train/a.parquet", "a")
    write_answer(tmp_path / "two/test/train/b.parquet", "b")
    with pytest.raises(ValueError, match=r"test/train/b.parquet belongs to several of train, test"):
        open_pairs(tmp_path / "two", split="train")


def test_linked_folders_and_names_in_upper_case_are_read(tmp_path: Path) -> None:
    write_answer(tmp_path / "big/b.parquet", "b")
    write_answer(tmp_path / "here/A.PARQUET", "a")
    (tmp_path / "here/linked").symlink_to(tmp_path / "big")
    (tmp_path / "big/loop").symlink_to(tmp_path / "here")
    assert answers(tmp_path / "here") == ["a", "b"]


@pytest.mark.parametrize("name", ["run[1].parquet", "y*.parquet", "a?.parquet", "x[2]/b.parquet", "é #"])
def test_a_path_is_no_pattern(name: str, tmp_path: Path) -> None:
    for other in ("run1.parquet", "y2.parquet", "ab.parquet", "x2/b.parquet"):
        write_answer(tmp_path / other, "other")
    write_answer(tmp_path / name, "c")
    assert answers(tmp_path / name) == ["c"]
    if "/" in name:
        assert answers((tmp_path / name).parent) == ["c"]
    write_answer(tmp_path / name, "changed")
    write_answer(tmp_path / "y", "other")
    write_answer(tmp_path / "y::b", "c")
    with pytest.raises(ValueError, match="the path of a parquet file must not hold '::', got"):
        open_pairs(tmp_path / "y::b")
    assert answers(tmp_path / name) == ["changed"]


def test_a_folder_whose_name_looks_like_a_pattern_and_that_lists_files(tmp_path: Path) -> None:
    write_answer(tmp_path / "x2/b.parquet", "other")
    write_answer(tmp_path / "x[2]/b.parquet", "c")
    (tmp_path / "x[2]/README.md").write_text(README.replace("{files}", "b.parquet"))
    with pytest.raises(ValueError, match=r"a folder whose README\.md lists parquet files of this folder, got"):
        open_pairs(tmp_path / "x[2]")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(ValueError, match=r"path must be a file or a folder, got .*, a pipe or device: write its"):
            open_pairs(path)
