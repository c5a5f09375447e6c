"""Tests conversions between all formats, and the errors of writers."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import PAIR

from mpo_ext.data import (
    BadLine,
    Pair,
    open_pairs,
    read_meta,
    write_mmpr,
    write_pairs,
)
from mpo_ext.data.convert import convert
from mpo_ext.data.hf import to_dataset
from mpo_ext.data.trl import write_trl
from mpo_ext.images import ImageError


def assert_same_mmpr(meta: Path, other: Path) -> None:
    """Asserts that two MMPR datasets have the same lines and the same settings. Only ``annotation`` may differ."""
    assert [subset.name for subset in read_meta(meta)] == [subset.name for subset in read_meta(other)]
    for one, two in zip(read_meta(meta), read_meta(other), strict=True):
        assert Path(one.annotation).read_bytes() == Path(two.annotation).read_bytes()
        assert {**one.settings, "annotation": ""} == {**two.settings, "annotation": ""}


def test_mmpr_survives_conversion_through_every_format(mmpr: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    pairs = list(open_pairs(mmpr).pairs)
    steps: list[tuple[str, str, str]] = [
        ("1.jsonl", "pairs", "standard"),
        ("2", "hf", "standard"),
        ("3.jsonl", "trl", "standard"),
        ("4", "hf", "conversational"),
        ("5.jsonl", "trl", "conversational"),
        ("6.jsonl", "pairs", "standard"),
        ("7", "mmpr", "standard"),
    ]
    place = mmpr
    for name, format, kind in steps:
        out = tmp_path / name
        count, skipped = convert(open_pairs(place), out, format, kind=kind)
        assert (count, skipped.total) == (len(pairs), 0), name
        place = out / "meta.json" if format == "mmpr" else out
        assert list(open_pairs(place).pairs) == pairs, name
        assert format == open_pairs(place).format
    assert_same_mmpr(mmpr, place)


def test_relative_images_stay_relative_where_possible(images: Path, tmp_path: Path) -> None:
    absolute = (str(images / "a.png"), str(images / "sub/b.jpg"))
    pairs = [Pair("q", "c", "r", ("a.png", "sub/b.jpg")), Pair("p", "c", "r", absolute), Pair("t", "c", "r")]
    write_pairs(images / "p.jsonl", pairs)

    def there_and_back(folder: Path) -> list[Any]:
        convert(open_pairs(images / "p.jsonl"), folder / "t.jsonl", "trl")
        convert(open_pairs(folder / "t.jsonl"), folder / "back.jsonl", "pairs")
        back = open_pairs(folder / "back.jsonl")
        assert [back.read(index)[1].images for index in range(3)] == [absolute, absolute, ()]
        return [pair.images for pair in back.pairs]

    assert there_and_back(images) == [pair.images for pair in pairs]
    assert (images / "back.jsonl").read_bytes() == (images / "p.jsonl").read_bytes()
    above = there_and_back(tmp_path)
    assert above == [("images/a.png", "images/sub/b.jpg"), absolute, ()]
    (tmp_path / "beside").mkdir()
    assert there_and_back(tmp_path / "beside")[0] == absolute


@pytest.mark.parametrize("format", ["pairs", "trl"])
def test_relative_images_of_mmpr_stay_relative_in_the_root(format: Any, images: Path, tmp_path: Path) -> None:
    row = {"question": "<image>\n<image>", "chosen": "c", "rejected": "r", "image": ["a.png", f"{images}/c.png"]}
    media = {"rejected_image": ["sub/b.jpg", "a.png"], "video": "v.mp4"} if format == "pairs" else {}
    (images / "m.jsonl").write_text(json.dumps(row | media))
    meta = {"s": {"root": "images", "annotation": "images/m.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for source in (open_pairs(images / "m.jsonl", format="mmpr"), open_pairs(tmp_path / "meta.json")):
        (absolute,) = (pair for _, pair in source.scan())
        convert(source, images / "out.jsonl", format)
        (pair,) = open_pairs(images / "out.jsonl").pairs
        assert pair.images == ("a.png", f"{images}/c.png")
        assert (pair.rejected_images, [video.path for video in pair.videos]) == (
            (("sub/b.jpg", "a.png"), ["v.mp4"]) if media else ((), [])
        )
        assert open_pairs(images / "out.jsonl").read(0)[1] == absolute
        convert(source, tmp_path / "out.jsonl", format)
        assert open_pairs(tmp_path / "out.jsonl").pairs[0] == absolute


def test_a_writer_that_fails_keeps_the_existing_files(tmp_path: Path, mmpr: Path) -> None:
    def failing() -> Any:
        yield PAIR
        raise KeyError("stop")

    for name, write in (("a", write_pairs), ("b", write_trl), ("c", write_mmpr)):
        out = tmp_path / "out" / name
        if write is write_mmpr:
            write_mmpr(out, [PAIR])
        else:
            write(out, [PAIR])
        before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
        with pytest.raises(KeyError):
            write(out, failing())
        assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before


def test_only_images_are_copied_into_a_dataset(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (tmp_path / "link.png").symlink_to(secret)
    for image in (str(secret), "link.png", f"data:image/png;base64,{base64.b64encode(b'no image').decode()}"):
        write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", (image,))])
        with pytest.raises(BadLine, match="image must be in a format"):
            convert(open_pairs(tmp_path / "p.jsonl"), tmp_path / "out", "hf")
        with pytest.raises(ImageError, match="image must be in a format"):
            to_dataset([Pair("q", "c", "r", (str(tmp_path / image) if "data" not in image else image,))], embed=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["pairs", "trl"])
@pytest.mark.parametrize("name", ["back.parquet", "back.jsonl.gz", "BACK.CSV"])
def test_lines_are_not_written_under_the_name_of_another_kind_of_file(
    name: str, format: Any, mmpr: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="out must be the name of a JSON lines file"):
        convert(open_pairs(mmpr), tmp_path / name, format)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("format", ["trl", "hf"])
def test_without_a_kind_the_prompt_is_a_message(mmpr: Path, tmp_path: Path, format: str) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    out = tmp_path / ("out.jsonl" if format == "trl" else "out")
    convert(open_pairs(str(mmpr)), out, format)
    is_file = format == "trl"
    row = json.loads(out.read_text().splitlines()[0]) if is_file else datasets.load_from_disk(str(out))[0]
    assert [turn["role"] for turn in row["prompt"]] == ["user"]


FORMATS = ("mmpr", "pairs", "trl", "hf")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["file_name", "original"])
def test_the_name_of_an_image_in_a_row_never_makes_the_written_line_bad(
    format: Any, name: str, tmp_path: Path, images: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    row = {"prompt": "q", "chosen": "c", "rejected": "r", name: "0001.png"}
    row["image"] = {"bytes": (images / "a.png").read_bytes(), "path": "0001.png"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    source = open_pairs(tmp_path / "rows.parquet", image_dir=tmp_path / "stored")
    _, pair = source.read(0)
    if name == "original":
        with pytest.raises(BadLine, match=f"{format} cannot hold the pair: .* 'original' '0001.png'"):
            convert(source, tmp_path / "out", format)
        return
    convert(source, tmp_path / "out", format)
    _, written = open_pairs(tmp_path / "out/meta.json" if format == "mmpr" else tmp_path / "out").read(0)
    assert isinstance(pair, Pair)
    assert isinstance(written, Pair), written
    assert (written.images, written.extra["file_name"]) == (pair.images, "0001.png")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "field", [{"messages": [{"role": "user", "content": "q"}]}, {"system": "s"}, {"functions": [1]}, {"images": ["b"]}]
)
def test_fields_that_mmpr_cannot_hold_are_named(format: Any, field: dict[str, Any], tmp_path: Path) -> None:
    if format == "hf":
        pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    write_pairs(tmp_path / "in.jsonl", [Pair("q", "c", "r", extra=field)])
    source = open_pairs(tmp_path / "in.jsonl")
    if format == "mmpr":
        with pytest.raises(BadLine, match="mmpr cannot hold the pair: "):
            convert(source, tmp_path / "out", format)
        return
    convert(source, tmp_path / "out", format)
    assert open_pairs(tmp_path / "out").read(0)[1] == source.read(0)[1]


def test_mmpr_holds_only_pairs_that_can_be_read_again(images: Path, tmp_path: Path) -> None:
    good = Pair("q", "c", "r", (str(images / "a.png"),))
    bad = [
        (Pair("q", "c", "r", (str(tmp_path / "a.png"),)), "images must be below the root"),
        (Pair("q", "c", "r", extra={"messages": [{"role": "user", "content": "q"}]}), "messages must be empty"),
        (Pair("q", "c", "r", extra={"image": "a.png"}), "extra must not hold a field that the line itself has"),
        (Pair("q", "c", "r", extra={"provenance": {"by": 1}}), "provenance would be read as {'by': 1}, got {}"),
    ]
    for pair, reason in bad:
        write_pairs(tmp_path / "p.jsonl", [good, pair, good])
        if "image" not in pair.extra:
            with pytest.raises(BadLine, match=f"p.jsonl:2: bad field: mmpr cannot hold the pair: .*{reason}"):
                convert(open_pairs(tmp_path / "p.jsonl"), tmp_path / "out", "mmpr", root=images)
        count, skipped = convert(
            open_pairs(tmp_path / "p.jsonl"), tmp_path / "out", "mmpr", root=images, skip_bad=True
        )
        assert (count, skipped.total) == (2, 1)
        assert [pair.images for pair in open_pairs(tmp_path / "out/meta.json").pairs] == [good.images] * 2


@pytest.mark.parametrize("format", ["trl", "hf"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"images": ["a.png"] * 3},
            "{format} cannot hold the pair: prompt must have no or 3 places for its images, got 2",
        ),
        ({"chosen": "other"}, "chosen must be the text of all turns .*, got 'other' beside 'c'"),
        ({"question": "other"}, "question must be the last user turn .*, got 'other' beside '<image>q'"),
    ],
)
def test_turns_that_contradict_a_pair_are_refused(
    format: Any, change: dict[str, Any], reason: str, images: Path, tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "<image>p"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "<image>q"},
    ]
    source = {"messages": turns, "chosen_messages": [{"role": "assistant", "content": "c"}]}
    good = {"question": "<image>q", "chosen": "c", "rejected": "r", "images": ["a.png", "sub/b.jpg"]}
    good["extra"] = {"$source": source}
    path = images / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change})))
    out = tmp_path / ("out.jsonl" if format == "trl" else "out")
    with pytest.raises(BadLine, match=f"p.jsonl:2: bad field: {reason.format(format=format)}"):
        convert(open_pairs(path), out, format)
    count, skipped = convert(open_pairs(path), out, format, skip_bad=True)
    assert (count, skipped.total) == (1, 1)
    assert [pair.source["messages"] for pair in open_pairs(out).pairs] == [turns]


@pytest.mark.parametrize(
    "messages", ["x", [1], [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]]
)
@pytest.mark.parametrize("format", ["trl", "hf"])
def test_turns_without_a_text_are_bad_lines(format: Any, messages: Any, tmp_path: Path) -> None:
    row = {"question": "q", "chosen": "c", "rejected": "r", "extra": {"$source": {"messages": messages}}}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadLine, match=r"bad field: (messages: |question must be the last user turn)"):
        convert(open_pairs(tmp_path / "p.jsonl", format="pairs"), tmp_path / "out", format)


def test_a_single_turn_keeps_its_exact_question(tmp_path: Path) -> None:
    question = "see <image> here"
    extra = {"$source": {"messages": [{"role": "user", "content": question}]}}
    write_pairs(tmp_path / "p.jsonl", [Pair(question, "c", "r", ("/a.png",), extra=extra)])
    convert(open_pairs(tmp_path / "p.jsonl"), tmp_path / "trl.jsonl", "trl")
    assert [pair.question for pair in open_pairs(tmp_path / "trl.jsonl").pairs] == [question]


def test_an_image_of_a_pair_is_not_replaced(images: Path, tmp_path: Path) -> None:
    content = (images / "a.png").read_bytes()
    (tmp_path / "link").symlink_to(images)
    for path in ("a.png", str(tmp_path / "link/a.png")):
        write_pairs(images / "p.jsonl", [Pair("q", "c", "r"), Pair("q", "c", "r", (path,))])
        for format in ("pairs", "trl"):
            with pytest.raises(ValueError, match=r"out must not replace an input, got .*a.png, an image .*p.jsonl:2"):
                convert(open_pairs(images / "p.jsonl"), images / "a.png", format)  # type: ignore[arg-type]
    assert (images / "a.png").read_bytes() == content


def test_an_output_of_another_kind_is_refused(mmpr: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    source = open_pairs(mmpr)
    for format in ("pairs", "trl"):
        with pytest.raises(FileExistsError, match=f"out must be a file for the format {format}, got the folder"):
            convert(source, tmp_path / "folder", format)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="out must be a folder for the format mmpr, got the file"):
        convert(source, tmp_path / "file", "mmpr")
    for name in ("meta.json", "pairs.jsonl", "pairs.parquet"):
        with pytest.raises(ValueError, match=f"out must be a folder for the format mmpr, got .*{name}"):
            convert(source, tmp_path / "new" / name, "mmpr")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match=r"out must be a file or a folder, got .*, a pipe or device"):
            convert(source, place, "pairs")


def test_a_dataset_without_a_good_pair_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", ("none.png",))] * 2)
    with pytest.raises(
        ValueError, match=r"at least one pair, got none of 2 lines; the first: .*p.jsonl:1: unreadable"
    ):
        convert(open_pairs(tmp_path / "p.jsonl"), tmp_path / "out", "hf", skip_bad=True)
    assert not (tmp_path / "out").exists()
