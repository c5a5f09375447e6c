"""Tests the commands ``mpo-ext data check``, ``stats``, ``convert`` and ``view``."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from mmpr_files import GOOD, run_data

from mpo_ext.cli import data
from mpo_ext.cli.main import main
from mpo_ext.data import (
    Pair,
    open_pairs,
    write_pairs,
)
from mpo_ext.data.formats import FORMATS
from mpo_ext.data.hf import load_dataset_folder
from mpo_ext.data.trl import Kind
from mpo_ext.data.view import write_view
from mpo_ext.train.mixture import Mixture, stored_lines
from mpo_ext.train.source_recipe import SourceRecipe


def test_check_exits_with_0_1_or_2(
    broken: Path, write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_data("check", write_lines("good", [GOOD])) == 0
    assert "No findings." in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert run_data("check", broken, "--examples", "1", "--json", report, "--max-line-bytes", "100000") == 1
    out = capsys.readouterr().out
    assert f"{tmp_path}/broken.jsonl:2: bad JSON: Unterminated string" in out
    assert "numbers must be finite" not in out
    values = json.loads(report.read_text())
    assert values["findings"]["broken"]["bad JSON"] == 4
    assert run_data("check", tmp_path / "none.json") == 2
    assert capsys.readouterr().err == f"mpo-ext data check: path must exist, got {tmp_path}/none.json\n"
    (tmp_path / "meta.json").write_text('{"x": {"root": "", "annotation": "none.jsonl"}}')
    assert run_data("check", tmp_path / "meta.json") == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert run_data("check", broken, "--root-map", "x") == 2
    assert "root_map must read OLD=NEW, got 'x'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_data("check", broken, "--examples", "-1")


def test_check_and_stats_name_the_format_and_count_pairs_with_images(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"question": "q", "chosen": "c", "rejected": "r"}
    lines = [
        pair,
        {**pair, "images": ["a.png"]},
        {**pair, "images": ["a.png", "sub/b.jpg"], "question": "<image>" * 2 + "q"},
    ]
    (images / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for command in ("check", "stats"):
        assert run_data(command, images / "p.jsonl") == 0
        assert "Format pairs (detected): 2 of 3 pairs with images\n" in capsys.readouterr().out
    assert run_data("stats", images / "p.jsonl", "--from", "pairs") == 0
    assert "Format pairs (set by --from)" in capsys.readouterr().out


def test_a_hostile_file_cannot_control_the_terminal(write_lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_data("check", write_lines("evil", [{**GOOD, "image": "\x1b[2J[bold]\r.png"}])) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert r"\x1b[2J[bold]\r.png" in out


def test_convert_stops_at_a_bad_line_or_skips_it(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run_data("convert", broken, out, "--to", "pairs") == 1
    assert "broken.jsonl:2: bad JSON" in capsys.readouterr().err
    assert not out.exists()
    assert run_data("convert", broken, out, "--to", "pairs", "--skip-bad") == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote 13 pairs to {out}\n"
    assert "skipped 7: bad field" in captured.err
    assert run_data("convert", broken, out, "--to", "pairs", "--skip-bad") == 2
    assert "out must not exist without --force" in capsys.readouterr().err
    assert run_data("convert", broken, out, "--to", "trl", "--skip-bad", "--force") == 0
    assert run_data("convert", out, out, "--to", "pairs", "--force") == 2
    assert "out must not replace an input" in capsys.readouterr().err


def test_convert_leaves_out_what_check_finds(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**GOOD, "question": "<image>\nanother?"}
    lines = [{**GOOD, "image": "none.png"}, GOOD, b"{\n", other, GOOD, {**other, "rejected": other["chosen"]}, other]
    meta, out = write_lines("mixed", lines), tmp_path / "out.jsonl"
    assert run_data("check", meta, "--examples", "1") == 1
    text = capsys.readouterr().out
    assert "and 1 more of 'duplicate' (--examples shows more)\n" in text
    assert "mpo-ext data convert --skip-findings leaves these lines out\n" in text
    assert run_data("convert", meta, out, "--to", "pairs", "--skip-findings") == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote 2 pairs to {out}\n"
    assert captured.err.startswith("left out 5 of 7 lines\nduplicate: 2, for example ")
    assert "equal responses: 1, for example " in captured.err
    assert [json.loads(line)["question"] for line in out.read_text().splitlines()] == [
        GOOD["question"], other["question"],
    ]  # fmt: skip
    assert run_data("check", out) == 0
    bad = write_lines("bad", [b"{\n"])
    wrong = write_lines("wrong", [GOOD])
    wrong.write_text(wrong.read_text().replace('"length": 1', '"length": 9'))
    assert run_data("check", wrong) == 1
    assert "wrong length" in (text := capsys.readouterr().out)
    assert "--skip-findings" not in text
    assert run_data("convert", bad, tmp_path / "none.jsonl", "--to", "pairs", "--skip-findings") == 2
    assert "--skip-findings must leave a line of " in capsys.readouterr().err


def test_convert_writes_a_parquet_file_with_its_images(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra data")
    meta, out = write_lines("good", [GOOD, {**GOOD, "question": "<image>\nanother?"}]), tmp_path / "out.parquet"
    assert run_data("convert", meta, tmp_path / "out.jsonl", "--to", "hf") == 2
    assert "out must be a folder or a file .parquet for the format hf" in capsys.readouterr().err
    assert run_data("convert", meta, out, "--to", "hf") == 0
    assert run_data("convert", meta, out, "--to", "hf") == 2  # the file exists
    assert run_data("convert", meta, out, "--to", "hf", "--force") == 0
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.parquet"]
    rows = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["images"][0].size == (40, 30)
    assert run_data("check", out, "--image-dir", tmp_path / "stored") == 0
    assert run_data("convert", meta, tmp_path / "UPPER.PARQUET", "--to", "hf") == 0
    assert (tmp_path / "UPPER.PARQUET").is_file()
    folder = tmp_path / "spark.parquet"  # other programs write folders of this kind
    folder.mkdir()
    (folder / "part-0.parquet").touch()
    assert run_data("convert", meta, folder, "--to", "hf", "--force") == 2
    assert "out must not be a folder if its name ends with .parquet" in capsys.readouterr().err
    assert (folder / "part-0.parquet").exists()


def test_a_dataset_with_a_missing_image_is_not_written(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets", reason="needs the extra data")
    meta = write_lines("none", [GOOD, {**GOOD, "image": "none.png"}])
    assert run_data("convert", meta, tmp_path / "out", "--to", "hf") == 1
    assert "none.jsonl:2: unreadable image: images must be readable files, got " in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_dataset_skips_and_counts_pairs_with_unreadable_images(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    missing, url = {**GOOD, "image": "none.png"}, {**GOOD, "image": "https://host/a.png"}
    meta = write_lines("none", [missing, GOOD, b"{\n", url])
    assert run_data("convert", meta, tmp_path / "out", "--to", "hf", "--skip-bad") == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote 1 pairs to {tmp_path / 'out'}\n"
    assert "skipped 1: unreadable image" in captured.err
    assert "none.png: No such file or directory" in captured.err
    assert "skipped 1: image is a URL" in captured.err
    assert "skipped 1: bad JSON" in captured.err
    assert len(load_dataset_folder(tmp_path / "out")) == 1


def test_a_url_instead_of_a_path_is_reported(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_data("check", write_lines("web", [{**GOOD, "image": "https://host/a.png"}])) == 1
    words = "image is a URL: URLs are not fetched: download the image and name its file, got https://host/a.png"
    assert words in capsys.readouterr().out
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", ("s3://bucket/a.png",))])
    assert run_data("check", tmp_path / "p.jsonl") == 1
    assert "got s3://bucket/a.png" in capsys.readouterr().out
    write_view(tmp_path / "p.html", open_pairs(tmp_path / "p.jsonl"))
    assert "a URL, not fetched" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize("command", [["check"], ["stats"], ["view"], ["check", "--from", "mmpr"]])
def test_a_folder_without_a_dataset_names_its_files(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rule = "path must be a file of pairs, a folder of parquet files, or a folder that save_to_disk wrote"
    assert run_data(command[0], folder, *command[1:]) == 2
    err = capsys.readouterr().err
    assert f"{rule}, got the folder {folder}, which contains no .jsonl, .json, .csv, .tsv, .parquet file\n" in err
    for name in ("train.jsonl", "meta.json", "rows.csv.gz", "notes.txt"):
        (folder / name).write_text("{}")
    assert run_data(command[0], folder, *command[1:]) == 2
    text = f"got the folder {folder}, which contains meta.json, rows.csv.gz, train.jsonl: name a file\n"
    assert text in capsys.readouterr().err
    source = SourceRecipe(path=str(folder))
    with pytest.raises(ValueError, match=f"^data.train: {rule}, got the folder .* contains meta.json"):
        Mixture([source], name="data.train")


def test_a_folder_in_place_of_another_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").touch()
    expected = f"{tmp_path} must be a file, got the folder {tmp_path}, which contains recipe.yaml: name a file\n"
    assert main(["train", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mpo-ext train: {expected}"


def test_an_empty_file_is_reported_as_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty.jsonl", "empty.json"):
        (tmp_path / name).write_text("\n")
        assert run_data("check", tmp_path / name) == 2
        assert "got an empty file" in capsys.readouterr().err


def test_a_json_error_has_one_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "\t\n')
    assert run_data("check", tmp_path / "p.jsonl", "--from", "pairs") == 1
    assert "Invalid control character at character 14" in capsys.readouterr().out


def test_relative_images_start_at_the_file(images: Path, tmp_path: Path) -> None:
    write_pairs(images / "p.jsonl", [Pair("q", "c", "r", ("a.png",))])
    assert run_data("check", images / "p.jsonl") == 0
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", ("a.png",))])
    assert run_data("check", tmp_path / "p.jsonl") == 1
    assert run_data("check", tmp_path / "p.jsonl", "--root", images) == 0
    assert run_data("convert", images / "p.jsonl", tmp_path / "mmpr", "--to", "mmpr", "--out-root", images) == 0
    assert run_data("check", tmp_path / "mmpr/meta.json") == 0


def test_the_number_of_missing_images_is_in_a_warning(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [Pair(f"q{n}", "c", "r", (name,)) for n, name in enumerate(("a.png", "b.png", "b.png", "sub/b.jpg"))]
    write_pairs(tmp_path / "p.jsonl", pairs)
    convert = ["convert", tmp_path / "out.jsonl", "--to", "trl"]
    for command in (["stats"], convert, ["view", "--out", tmp_path / "p.html"]):
        assert run_data(command[0], tmp_path / "p.jsonl", *command[1:]) == 0
        warning = capsys.readouterr().err
        assert f"warning: 3 of 3 images do not exist as files, as {tmp_path}/a.png: " in warning
        assert warning.endswith(f"relative images start at {tmp_path}: try --root\n")
    assert run_data("check", tmp_path / "p.jsonl", "--examples", "0") == 1
    assert f"\nrelative images start at {tmp_path}: try --root\n" in capsys.readouterr().out
    assert run_data("stats", tmp_path / "p.jsonl", "--root", images) == 0
    assert "warning: 1 of 3 images do not exist as files" in capsys.readouterr().err
    write_pairs(tmp_path / "good.jsonl", [pairs[0]])
    assert run_data("stats", tmp_path / "good.jsonl", "--root", images) == 0
    assert capsys.readouterr().err == ""


def test_missing_images_of_a_meta_file_suggest_root_map(write_lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    meta = write_lines("gone", [{**GOOD, "image": "gone.png"}])
    assert run_data("stats", meta) == 0
    assert capsys.readouterr().err.endswith(": try --root-map\n")
    assert run_data("check", meta) == 1
    assert "\ntry --root-map\n" in capsys.readouterr().out
    assert run_data("check", write_lines("bad", [{**GOOD, "chosen": ""}])) == 1
    assert "try --root" not in capsys.readouterr().out


def test_a_closed_pipe_ends_a_command_quietly(mmpr: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mpo_ext",
        "data",
        "convert",
        str(mmpr),
        str(tmp_path / "out.jsonl"),
        "--to",
        "trl",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        text = process.stderr.read()
    assert "roken pipe" not in text
    assert "Errno" not in text


def test_view_is_a_command(mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    assert run_data("view", mmpr, "--out", tmp_path / "p.html", "--limit", "5") == 0
    assert capsys.readouterr().out == f"wrote 5 of 13 pairs to {tmp_path}/p.html\n"


@pytest.mark.parametrize(("package", "command"), [("rich", "check"), ("jinja2", "view"), ("datasets", "convert")])
def test_a_missing_package_is_named(package: str, command: str, mmpr: Path, tmp_path: Path) -> None:
    rest = {"convert": [str(tmp_path / "out"), "--to", "hf"]}.get(command, [])
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from mpo_ext.cli.main import main; sys.exit(main({['data', command, str(mmpr), *rest]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert package in done.stderr
    assert "pip install '.[data]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_options_offer_every_format_and_kind() -> None:
    assert data._FORMATS == FORMATS
    assert get_args(Kind) == data._KINDS


@pytest.fixture
def rows_with_bytes(tmp_path: Path) -> Path:
    """Returns the folder of a saved dataset with one row, which stores its image as bytes."""
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    buffer = io.BytesIO()
    pytest.importorskip("PIL.Image").new("RGB", (8, 8)).save(buffer, "PNG")
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "image": {"bytes": buffer.getvalue(), "path": None}}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"


def test_each_command_names_the_folder_of_the_images_in_rows_once(
    rows_with_bytes: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = tmp_path / "stored", tmp_path / "p.html"
    for command in (["check"], ["stats"], ["view", "--out", page]):
        assert run_data(command[0], rows_with_bytes, *command[1:], "--image-dir", folder) == 0
        said = capsys.readouterr()
        assert f"images that the rows hold as bytes are stored in {folder}\n" in said.err
        assert (said.out + said.err).count(str(folder)) == 1
    write_pairs(images / "p.jsonl", [Pair("q", "c", "r", ("a.png",))])
    for command in (["check"], ["stats"], ["view", "--out", page]):
        assert run_data(command[0], images / "p.jsonl", *command[1:], "--image-dir", images) == 0
        assert "stored in" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("format", ["pairs", "trl", "mmpr", "hf"])
def test_convert_names_the_images_that_the_written_pairs_need(
    format: str, rows_with_bytes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "stored"
    assert run_data("convert", rows_with_bytes, out, "--to", format, "--image-dir", folder) == 0
    place = out / "meta.json" if format == "mmpr" else out
    said = capsys.readouterr()
    if format == "hf":  # contains the images
        assert said.out == f"wrote 1 pairs to {out}\n"
        assert f"images that the rows hold as bytes are stored in {folder}\n" in said.err
        return
    assert said.out == (
        f"wrote 1 pairs to {place}, which need the images in {folder} (--image-dir sets another folder)\n"
    )
    ((_, pair),) = open_pairs(place).scan()
    assert isinstance(pair, Pair)
    assert [Path(image).parent for image in pair.images] == [folder]


def test_a_dry_run_names_the_folder_of_the_images_in_rows(rows_with_bytes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    source = SourceRecipe(path=str(rows_with_bytes), image_dir=str(folder))
    overviews = [*Mixture([source]).inspect(), *Mixture([source]).inspect()]
    assert stored_lines(overviews) == [f"images that the rows hold as bytes are stored in {folder}"]


@pytest.mark.parametrize(
    ("to", "option"),
    [("pairs", "--kind"), ("mmpr", "--kind"), ("trl", "--out-root"), ("hf", "--name"), ("pairs", "--name")],
)
def test_options_without_effect_are_refused(
    to: str, option: str, mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_data("convert", mmpr, tmp_path / "out", "--to", to, option, "standard") == 2
    assert f"{option} must be left out with --to {to}, got standard\n" in capsys.readouterr().err
    assert run_data("stats", mmpr, "--root", tmp_path) == 2
    assert "--root must be left out for a meta file, which names the image folders" in capsys.readouterr().err
    for option in ("--name", "--out-root"):
        assert run_data("convert", mmpr, tmp_path / "out", "--to", "mmpr", option, "x") == 2
        reason = f"{option} must be left out for pairs in the format mmpr, which keep their subset, got x"
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--root", "--image-dir", "--out-root", "--picked"])
def test_an_empty_path_is_not_the_current_folder(option: str, mmpr: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_data("convert", mmpr, "out", "--to", "mmpr", option, "")
    assert f"argument {option}: must be a path, got an empty text" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_data("convert", mmpr, "", "--to", "mmpr")
    assert "argument out: must be a path, got an empty text" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "stats"])
def test_pipes_are_refused(command: str, mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert run_data(command, tmp_path / "pipe") == 2
    assert f"path must be a file or a folder, got {tmp_path}/pipe, a pipe or device" in capsys.readouterr().err
    assert run_data(command, mmpr, "--json", tmp_path / "pipe") == 2
    assert "--json must be a new place or an earlier output of the same command" in capsys.readouterr().err
    if command == "check":
        assert run_data("view", mmpr, "--out", tmp_path / "pipe") == 2
        assert "--out must be a new place or an earlier output of the same command" in capsys.readouterr().err
    assert run_data("view", mmpr, "--serve", "--pick-into", tmp_path / "pipe") == 2
    assert f"picks must be a file or a folder, got {tmp_path}/pipe, a pipe or device" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe.jsonl")
    meta = tmp_path / "piped.json"
    meta.write_text(json.dumps({"one": {"root": "", "annotation": "pipe.jsonl"}}))
    assert run_data(command, meta) == 2
    assert "/pipe.jsonl, a pipe or device: write its rows to a file" in capsys.readouterr().err
