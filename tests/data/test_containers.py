"""Tests data files: compressed files, JSON arrays, CSV, other encodings, and files with a wrong suffix."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import GOOD, LINES, run_data

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.containers import cache_folder
from mpo_ext.data.sources import PairSource

ROWS: list[dict[str, Any]] = [
    {"prompt": "多少? é", "chosen": "c\n\u2028", "rejected": "r", "images": ["a.png"], "n": 1},
    {"prompt": "q", "chosen": "2024-01-01", "rejected": "007"},
]
PAIRS = [
    Pair("多少? é", "c\n\u2028", "r", ("a.png",), extra={"n": 1}),
    Pair("q", "2024-01-01", "007"),
]
LINES_TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY_TEXT = json.dumps(ROWS, ensure_ascii=False, indent=2)


def pairs_of(source: PairSource) -> list[Any]:
    return [pair for _, pair in source.pairs.scan()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES_TEXT.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES_TEXT.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES_TEXT.encode())),
        ("a.jsonl.xz", lzma.compress(LINES_TEXT.encode())),
        ("a.json", ARRAY_TEXT.encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json.gz", gzip.compress(ARRAY_TEXT.encode(), mtime=0)),
        ("a.json", LINES_TEXT.encode()),
        ("a.json.gz", gzip.compress(LINES_TEXT.encode(), mtime=0)),
        ("a.jsonl", LINES_TEXT.encode("utf-8-sig")),
        ("a.jsonl", LINES_TEXT.encode("utf-16")),
        ("a.jsonl", LINES_TEXT.encode("utf-16-le")),
        ("a.jsonl", LINES_TEXT.encode("utf-16-be")),
        ("a.jsonl", LINES_TEXT.encode("utf-32")),
        ("a.json", ARRAY_TEXT.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES_TEXT.encode("utf-16"), mtime=0)),
        ("a.txt", LINES_TEXT.encode()),
    ],
)
def test_a_file_of_rows_is_read_in_its_form(name: str, content: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for _ in range(2):
        source = open_pairs(path)
        assert source.format == "trl"
        assert pairs_of(source) == PAIRS
        assert str(source.pairs.locate(1)) == f"{path}:2"
        assert source.read(0)[1].images == (str(tmp_path / "a.png"),)
    assert {file.parent for file in tmp_path.iterdir()} == {tmp_path}
    assert cache_folder() == cache


def test_a_changed_file_is_converted_again(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for rows in (ROWS, ROWS[:1]):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0))
        assert pairs_of(open_pairs(path)) == PAIRS[: len(rows)]
    assert len(list((cache / "lines").iterdir())) == 2


def test_mmpr_lines_and_meta_files_are_read_as_before(mmpr: Path, tmp_path: Path, images: Path) -> None:
    assert open_pairs(mmpr).subsets.keys() == LINES.keys()
    mmpr.write_text(json.dumps(json.loads(mmpr.read_text()), indent=1))
    assert open_pairs(mmpr).subsets.keys() == LINES.keys()
    rows = LINES["multi"]
    (images / "m.json").write_text(json.dumps(rows))
    (images / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from_array, from_lines = (open_pairs(images / name) for name in ("m.json", "m.jsonl"))
    assert from_array.format == from_lines.format == "mmpr"
    assert pairs_of(from_array) == pairs_of(from_lines)
    (images / "one.json").write_text(json.dumps(GOOD))
    assert pairs_of(open_pairs(images / "one.json"))[0].images == (str(images / "a.png"),)


def test_each_item_of_an_array_is_read_strictly(tmp_path: Path) -> None:
    items = [
        '{"prompt": "q",\r\n "chosen": "c", "rejected": "r"}',
        "3",
        '{"prompt": 1, "prompt": 2}',
        '{"prompt": NaN}',
    ]
    (tmp_path / "a.json").write_text(f"[{', '.join(items)} ]\n")
    good, *bad = pairs_of(open_pairs(tmp_path / "a.json"))
    assert good == Pair("q", "c", "r")
    assert [one.kind for one in bad] == ["bad field", "bad field", "bad JSON"]
    assert "a line must hold an object, got int" in bad[0].reason
    assert str(bad[2]).startswith(f"{tmp_path / 'a.json'}:4: ")


def write_csv(path: Path, header: list[str], *records: list[str], **options: Any) -> Path:
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *records])
    return path


def test_csv_cells_are_texts_lists_and_messages(tmp_path: Path) -> None:
    header = ["prompt", "chosen", "rejected", "images", "score"]
    messages = [{"role": "user", "content": "q"}]
    path = write_csv(
        tmp_path / "a.csv",
        header,
        ["line 1\nline 2", "007", "NA", "", "1e3"],
        [json.dumps(messages), "c", "r", '["a.png", "b.png"]', ""],
        [repr(messages), '{"answer": 4}', "[1]", "a.png", "x" * 200_000],
    )
    assert pairs_of(open_pairs(path)) == [
        Pair("line 1\nline 2", "007", "NA", extra={"score": "1e3"}),
        Pair("<image><image>q", "c", "r", ("a.png", "b.png"), extra={"score": ""}),
        Pair("q", '{"answer": 4}', "[1]", ("a.png",), extra={"score": "x" * 200_000}),
    ]
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_csv_cells_with_images_videos_and_input_are_parsed(write: Callable[[Any], str], tmp_path: Path) -> None:
    header = ["messages", "rejected_response", "images", "rejected_images", "videos"]
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
    row = [write(dialogue), "r"]
    path = write_csv(
        tmp_path / "swift.csv",
        header,
        [*row, write(["a.png"]), write(["b.png"]), ""],
        [*row, "a.png", "b.png", write(["a.mp4"])],
        [*row, "", "", write([["0.png", "1.png"]])],
    )
    pairs = pairs_of(open_pairs(path))
    assert [(pair.images, pair.rejected_images) for pair in pairs] == [(("a.png",), ("b.png",))] * 2 + [((), ())]
    assert [[video.paths for video in pair.videos] for pair in pairs] == [[], [("a.mp4",)], [("0.png", "1.png")]]
    path = write_csv(
        tmp_path / "mmpr.csv",
        ["question", "chosen", "rejected", "image", "rejected_image", "video"],
        ["q", "c", "r", write(["a.png"]), write(["b.png"]), write(["a.mp4"])],
        ["q", "c", "r", "", "", ""],
    )
    names = [[Path(name).name for name in pair.media_paths] for pair in pairs_of(open_pairs(path))]
    assert names == [["a.png", "b.png", "a.mp4"], []]
    prompt = {"messages": dialogue[:1], "tools": []}
    responses = [[{"role": "assistant", "content": text}] for text in "cr"]
    path = write_csv(
        tmp_path / "openai.csv",
        ["input", "preferred_output", "non_preferred_output"],
        [write(prompt), *map(write, responses)],
    )
    assert pairs_of(open_pairs(path)) == [Pair("q", "c", "r")]
    path = write_csv(
        tmp_path / "trl.csv",
        ["prompt", "chosen", "rejected", "images", "image_paths"],
        ["q", "c", "r", "", write(["a.png"])],
        ["q", "c", "r", write(["a.png"]), ""],
    )
    assert pairs_of(open_pairs(path)) == [Pair("q", "c", "r", ("a.png",))] * 2
    path = write_csv(
        tmp_path / "alpaca.csv", ["instruction", "input", "chosen", "rejected"], ["Sort.", write([3, 1]), "c", "r"]
    )
    assert pairs_of(open_pairs(path)) == [Pair("Sort.\n[3, 1]", "c", "r")]


@pytest.mark.parametrize(
    "header", [["question", "chosen", "rejected", "answer_gt"], ["prompt", "chosen", "rejected", "answer_gt"]]
)
def test_an_empty_cell_is_no_answer_and_no_object(header: list[str], tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", header, ["q", "c", "r", ""], ["q", "c", "r", "7"], ["q", "c", "r", "[7]"])
    assert [pair.answer_gt for pair in pairs_of(open_pairs(path))] == [None, "7", "[7]"]
    row = ["q", "c", "r", "", "", ""]
    path = write_csv(tmp_path / "b.csv", ["prompt", "chosen", "rejected", "answer_gt", "provenance", "extra"], row)
    assert pairs_of(open_pairs(path)) == [Pair("q", "c", "r")]


def test_a_csv_file_of_pairs_may_have_empty_cells(tmp_path: Path) -> None:
    header = ["question", "chosen", "rejected", "images", "answer_gt", "provenance", "extra", "videos"]
    pair = Pair("q", "c", "r", ("a.png",), "7", {"seed": 1}, {"id": 2})
    values = [json.dumps(["a.png"]), "7", "{'seed': 1}", json.dumps({"id": 2}), "[]"]
    path = write_csv(tmp_path / "a.csv", header, ["q", "c", "r", "", "", "", "", ""], ["q", "c", "r", *values])
    assert pairs_of(open_pairs(path)) == [Pair("q", "c", "r"), pair]


@pytest.mark.parametrize(
    "content", ["\n{}\n{}\n", "\n\n{}", '{{"prompt": \n{}\n{}\n', "x\n{}\n{}\n{}\n", "{}\n\n{}\n"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_json_lines_with_an_empty_or_broken_first_line_are_rows(content: str, encoding: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "q", "chosen": "c", "rejected": "r"})
    text = content.format(*[row] * 3)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    good = [pair for pair in pairs_of(open_pairs(tmp_path / "a.json")) if isinstance(pair, Pair)]
    assert good == [Pair("q", "c", "r")] * content.count("{}")


@pytest.mark.parametrize("content", ['{{"data": [\n{}', '{{"data": [\n{},\n{},\n{}', "x\n{}\ny\n", "", "\n", "x\n"])
def test_a_broken_object_is_not_read_as_rows(content: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "q", "chosen": "c", "rejected": "r"})
    (tmp_path / "a.json").write_text(content.format(*[row] * 3))
    with pytest.raises(ValueError, match="must be a meta file in JSON"):
        open_pairs(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.csv", {"encoding": "utf-16"}), ("a.csv", {"encoding": "utf-8-sig"}), ("a.tsv", {"delimiter": "\t"})],
)
def test_csv_of_other_programs(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / name, ["question", "chosen", "rejected", "image"], ["q, é", "c", "r", "a.png"], **options
    )
    source = open_pairs(path)
    assert source.format == "mmpr"
    assert (source.pairs[0].question, source.pairs[0].images) == ("q, é", (str(tmp_path / "a.png"),))
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    assert open_pairs(zipped).pairs[0].question == "q, é"


def test_a_csv_record_of_another_width_is_a_bad_line(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv", ["prompt", "chosen", "rejected"], ["q", "c"], ["q", "c", "r"], ["q", "c", "r", "x"]
    )
    first, good, last = pairs_of(open_pairs(path))
    assert good == Pair("q", "c", "r")
    for bad, words in ((first, "3 columns, got 2 up to line 2"), (last, "3 columns, got 4 up to line 4")):
        assert isinstance(bad, BadLine)
        assert words in bad.reason


def test_a_csv_record_of_another_width_does_not_decide_the_format(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["question", "chosen", "rejected"], ["q", "c"], ["q", "c", "r"])
    assert open_pairs(path).format == "mmpr"
    path = write_csv(tmp_path / "b.csv", ["question", "chosen", "rejected"], ["q", "c"])
    with pytest.raises(ValueError, match=r"b.csv:1: bad field: a record must have 3 columns, got 2 up to line 2"):
        open_pairs(path)


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jsonl", LINES_TEXT)
    return buffer.getvalue()


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINES_TEXT.encode())
        file.addfile(member, io.BytesIO(LINES_TEXT.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", zip_file(), "which is a zip file"),
        ("a.tar", tar_file(), "which is a tar archive"),
        ("a.tar.gz", gzip.compress(tar_file()), "which is a tar archive"),
        ("a.tgz", gzip.compress(tar_file()), "which is a tar archive"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "compressed by zstd"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow file: name the folder"),
        ("a.arrow", b"\xff\xff\xff\xff\x88\x02\0\0", "an Arrow file: name the folder"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "an HTML page"),
        ("a.parquet", LINES_TEXT.encode(), "must be a parquet file by its content too"),
        ("a.parquet", b"PAR1 and no more", "must hold parquet files"),
        ("a.jsonl.gz", gzip.compress(LINES_TEXT.encode(), mtime=0)[:-9], "must be a complete .gz file"),
        ("a.jsonl.xz", lzma.compress(LINES_TEXT.encode())[:-9], "must be a complete .xz file"),
        ("a.jsonl", LINES_TEXT.splitlines()[0].encode("gb18030"), "one JSON object per line, got .*:1: bad UTF-8"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), "one JSON object per line, got .*:1: bad UTF-8"),
        ("a.json", ARRAY_TEXT.encode("gb18030"), "text in UTF-8, or in UTF-16 or UTF-32 .*: convert it with iconv"),
        ("a.csv", "prompt,chosen,rejected\né,c,r\n".encode("latin-1"), "convert it with iconv"),
        ("a.jsonl", ARRAY_TEXT.encode(), "the file is a JSON array: rename it to .json"),
        ("a.jsonl", json.dumps(ROWS).encode(), "the file is a JSON array: rename it to .json"),
        ("a.json", ARRAY_TEXT.encode()[:-2], "must be a JSON array, got .*: item 3 is not JSON|Expecting"),
        ("a.json", b"[] []", "must be one JSON array, got .* with more text"),
        ("a.json", b"[]", "must hold pairs, got an empty file"),
        ("a.jsonl", b"", "must hold pairs, got an empty file"),
        ("a.csv", b"", "must have a header"),
        ("a.csv", b"prompt;chosen;rejected\nq;c;r\n", "must separate columns by ','"),
        ("a.csv", b"prompt,prompt,chosen\n", "must name each column once"),
        ("a.csv", b'prompt,chosen,rejected\n"q"x,c,r\n', "must be CSV, got .*line 2"),
        ("a.csv", b"a,b\n1,2\n", r"format must be clear from the fields, got 'a' \(str\), 'b' \(str\)"),
    ],
)
def test_the_real_cause_is_named(name: str, content: bytes, words: str, tmp_path: Path, cache: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        open_pairs(tmp_path / name)
    assert name in str(error.value)
    assert "told apart" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert not list((cache / "lines").glob("*")) or words.startswith(("must hold", "format"))


def test_a_format_that_is_given_is_used_in_any_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"question": "q", "chosen": "c", "rejected": "r"}]))
    for format in ("mmpr", "pairs", "rlaif-v"):
        source = open_pairs(tmp_path / "a.json", format=format)  # type: ignore[arg-type]
        assert (source.format, source.pairs[0].question) == (format, "q")
    with pytest.raises(ValueError, match="must be a folder that save_to_disk wrote for the format 'hf', got a file"):
        open_pairs(tmp_path / "a.json", format="hf")


@pytest.mark.parametrize("write", [lambda rows: json.dumps(rows), lambda rows: "\n".join(map(json.dumps, rows))])
def test_commands_take_every_file(
    write: Callable[[Any], str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "q", "chosen": "c", "rejected": "r", "images": ["a.png"]}]
    (images / "a.json.gz").write_bytes(gzip.compress(write(rows).encode(), mtime=0))
    assert run_data("check", images / "a.json.gz") == 0
    assert "Format alpaca (detected): 1 of 1 pairs with images" in capsys.readouterr().out
    assert run_data("convert", images / "a.json.gz", tmp_path / "p.jsonl", "--to", "pairs") == 0
    assert open_pairs(tmp_path / "p.jsonl").read(0)[1].images == (str(images / "a.png"),)


@pytest.mark.parametrize("format", [None, "trl"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"data": [{"prompt": "q" * 500, "chosen": "c", "rejected": "r"}] * 100}), "100 rows in 'data'"),
        (json.dumps({"train": [{"prompt": "q"}], "version": "1"}, indent=2), "1 rows in 'train'"),
        (json.dumps({"rows": {}, "a" * 500: [{"x": "y" * 500}]}), "1 rows in 'aaa"),
        (json.dumps({"prompt": "q" * 500, "chosen": "c", "rejected": "r"}, indent=2), "fields 'prompt, chosen, rej"),
    ],
)
def test_rows_inside_an_object_are_named_briefly(content: str, words: str, format: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match="rows are expected as one JSON array, or as one object per line") as caught:
        open_pairs(tmp_path / "rows.json", format=format)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [{"data": ["text" * 500]}, {"data": "text" * 500}, {"d" * 900: {"root": 3}}])
def test_a_wrong_meta_file_is_named_briefly(content: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be") as caught:
        open_pairs(tmp_path / "rows.json")
    assert len(str(caught.value)) < 400


def test_a_cell_with_a_list_as_numpy_writes_it(tmp_path: Path, cache: Path) -> None:
    """Reads the CSV cell ``['a.png' 'b.png']``. numpy prints a list in this way, without commas.

    Python would read this text as a list of one string, ``a.pngb.png``.
    """
    path = tmp_path / "a.csv"
    path.write_text("question,chosen,rejected,images\n<image> or <image>?,c,r,\"['a.png' 'b.png']\"\n")
    (_, pair), *_ = open_pairs(path).scan()
    assert not isinstance(pair, BadLine), pair
    assert pair.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
