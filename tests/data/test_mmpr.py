"""Tests MMPR files: reading and writing keeps every byte of a line, and bad meta files are rejected."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import GOOD, LINES, PAIR, SETTINGS

from mpo_ext.data import (
    BadLine,
    MMPRDataset,
    Pair,
    open_pairs,
    read_meta,
    write_mmpr,
)
from mpo_ext.data.jsonl import LineFile
from mpo_ext.data.mmpr import read_annotation, resolve_image, to_line


def test_every_line_of_mmpr_returns_byte_for_byte(mmpr: Path) -> None:
    for subset in read_meta(mmpr):
        file = read_annotation(subset)
        assert b"".join(to_line(pair, subset.root) for pair in file) == Path(subset.annotation).read_bytes()


def test_the_fields_of_an_mmpr_line_are_in_the_pair(mmpr: Path, images: Path) -> None:
    pairs = list(MMPRDataset(mmpr, repeat=False))
    lines = [line for lines in LINES.values() for line in lines]
    assert [(pair.question, pair.chosen, pair.rejected) for pair in pairs] == [
        (line["question"], line["chosen"], line["rejected"]) for line in lines
    ]
    assert pairs[4].images == (f"{images}/a.png", f"{images}/sub/b.jpg")
    assert [pair.images for pair in pairs[7:]] == [()] * 6
    assert [pair.answer_gt for pair in pairs[7:10]] == ["2", '["3", "three"]', ""]
    assert pairs[3].extra["chosen_meta"] == {"score": 0.5, "tags": ["x", None, True]}
    assert pairs[11].provenance == {"pipeline": "correctness"}


@pytest.mark.parametrize("image", ["../secret.png", "sub/../../x.png", "/etc/passwd", ".", "a/..", "x\0.png"])
def test_an_image_outside_its_root_is_a_bad_line(image: str, write_lines: Any) -> None:
    line = {"image": image, "question": "q", "chosen": "c", "rejected": "r"}
    dataset = MMPRDataset(write_lines("bad", [line, {**line, "image": ["a.png", image]}]))
    for index in range(2):
        with pytest.raises(BadLine, match="image must stay inside") as caught:
            dataset[index]
        assert (caught.value.kind, caught.value.where.line) == ("bad image path", index + 1)


def test_dots_and_absolute_paths_inside_the_root_are_kept_as_written(images: Path, write_lines: Any) -> None:
    lines = [
        {"image": image, "question": "q", "chosen": "c", "rejected": "r"}
        for image in ("./a.png", "sub/../a.png", f"{images}/a.png", "..a.png")
    ]
    meta = write_lines("odd", lines)
    assert all(os.path.exists(pair.images[0]) for pair in MMPRDataset(meta)[:3])
    write_mmpr(meta.parent / "out", MMPRDataset(meta))
    assert (meta.parent / "out/annotations/odd.jsonl").read_bytes() == (meta.parent / "odd.jsonl").read_bytes()


@pytest.mark.parametrize("image", ["a.png", "{}/a.png", ["{}/a.png"], ["a.png"]])
@pytest.mark.parametrize("rejected", ["sub/b.jpg", "{}/sub/b.jpg", ["{}/sub/b.jpg"], "./sub/b.jpg"])
@pytest.mark.parametrize(
    "video",
    ["v.mp4", "{}/v.mp4", ["{}/v.mp4", "w.mp4"], [["{}/a.png"]], {"video": "{}/v.mp4", "fps": 1.0}, [], "", None],
)
def test_rejected_images_and_videos_return_as_written(
    image: Any, rejected: Any, video: Any, images: Path, write_lines: Any
) -> None:
    row = {"image": image, "video": video, "rejected_image": rejected, "question": "q", "chosen": "c", "rejected": "r"}
    line = json.loads(json.dumps(row).replace("{}/", f"{images}/"))
    meta = write_lines("odd", [line, {**line, "rejected_image": []}, {**line, "rejected_image": None}])
    (pair, *_) = dataset = MMPRDataset(meta)
    assert all(os.path.isabs(path) for path in pair.media_paths)
    write_mmpr(meta.parent / "out", dataset)
    assert (meta.parent / "out/annotations/odd.jsonl").read_bytes() == (meta.parent / "odd.jsonl").read_bytes()


def test_a_link_out_of_the_root_is_a_bad_line(images: Path, tmp_path: Path, write_lines: Any) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "b.png").write_bytes((images / "a.png").read_bytes())
    (images / "file.png").symlink_to(tmp_path / "secret" / "b.png")
    (images / "folder").symlink_to(tmp_path / "secret")
    (images / "inside.png").symlink_to(images / "a.png")
    for image in ("file.png", "folder/b.png"):
        meta = write_lines("links", [{**GOOD, "image": image}])
        with pytest.raises(BadLine, match=r"image must stay inside .*, a link to .*secret/b\.png"):
            list(MMPRDataset(meta))
    (pair,) = MMPRDataset(write_lines("links", [{**GOOD, "image": "inside.png"}]))
    assert pair.images == (f"{images}/inside.png",)


def test_a_root_of_slash_allows_every_absolute_path() -> None:
    assert resolve_image("data/x.png", "/") == "/data/x.png"


def test_repeat_time_repeats_and_draws(mmpr: Path) -> None:
    sizes = [len(lines) for lines in LINES.values()]
    dataset = MMPRDataset(mmpr)
    assert len(dataset) == sizes[0] + 3 * sizes[1] + sizes[2] // 2
    multi = dataset[sizes[0] : sizes[0] + 3 * sizes[1]]
    assert multi == 3 * multi[: sizes[1]]
    drawn = [[pair.question for pair in MMPRDataset(mmpr, seed=seed)[-3:]] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) > 1
    assert all(len(set(one)) == 3 for one in drawn)
    assert dataset[-1] == list(dataset)[-1]
    with pytest.raises(IndexError, match="index must be in"):
        dataset[len(dataset)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("text", "the entry must be an object"),
        ({"annotation": "a.jsonl"}, "root must be a path, got None"),
        ({"root": "", "annotation": "a.json"}, "annotation must be a .jsonl file"),
        ({"root": "", "annotation": "a.jsonl", "repeat_time": 0}, "repeat_time must be a positive number, got 0"),
        ({"root": "", "annotation": "a.jsonl", "repeat_time": "2"}, "repeat_time must be a positive number, got '2'"),
        ({"root": "", "annotation": "a.jsonl", "repeat_time": 1.5}, "repeat_time must be below 1 or a whole number"),
        ({"root": "", "annotation": "a.jsonl", "length": -1}, "length must be a number of lines, got -1"),
    ],
)
def test_a_bad_meta_entry_is_named(entry: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"name": entry}))
    with pytest.raises(ValueError, match=words) as caught:
        read_meta(tmp_path / "meta.json")
    assert str(caught.value).startswith("name: ")


@pytest.mark.parametrize("text", ["", "[]", '{"a": {}, "a": {}}', '{"a": NaN}', "[" * 100_000, "\ufeff{"])
def test_a_file_that_is_not_a_meta_file_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="must be a meta file in JSON"):
        read_meta(tmp_path / "meta.json")


def test_pairs_that_were_not_read_from_mmpr_form_one_subset(tmp_path: Path, images: Path) -> None:
    pairs = [
        Pair("q", "c", "r", (f"{images}/a.png",), provenance={"pipeline": "dropout_ntp", "cut": 1}),
        Pair("q", "c", "r", (f"{images}/a.png", f"{images}/sub/b.jpg")),
        PAIR,
    ]
    assert write_mmpr(tmp_path / "out", pairs, root=images, name="../../../x y") == {"../../../x y": 3}
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.json*")) == ["_.._.._x_y.jsonl", "meta.json"]
    (subset,) = read_meta(tmp_path / "out/meta.json")
    assert (subset.root, subset.length) == (str(images), 3)
    lines = [json.loads(line) for line in Path(subset.annotation).read_text().splitlines()]
    assert [line.get("image") for line in lines] == ["a.png", ["a.png", "sub/b.jpg"], None]
    assert "image" not in lines[2]
    back = list(MMPRDataset(tmp_path / "out/meta.json"))
    assert [dataclasses.replace(pair, extra={}) for pair in back] == pairs
    write_mmpr(tmp_path / "anywhere", pairs)
    assert [pair.images for pair in MMPRDataset(tmp_path / "anywhere/meta.json")] == [pair.images for pair in pairs]


def test_pairs_that_mmpr_cannot_hold_are_rejected(tmp_path: Path, images: Path) -> None:
    outside = Pair("q", "c", "r", ("/elsewhere/a.png",))
    with pytest.raises(ValueError, match="images must be below the root"):
        write_mmpr(tmp_path / "out", [outside], root=images)
    with pytest.raises(ValueError, match="images must be absolute where no root is given"):
        write_mmpr(tmp_path / "out", [Pair("q", "c", "r", ("a.png",))])
    with pytest.raises(ValueError, match="extra must not hold 'chosen'"):
        write_mmpr(tmp_path / "out", [Pair("q", "c", "r", extra={"chosen": 1})])
    source = {"subset": "s", "root": "/r"}
    with pytest.raises(ValueError, match="s: pairs of one subset must share its settings"):
        write_mmpr(
            tmp_path / "out",
            [Pair("q", "c", "r", extra={"$source": {**source, "settings": {"data_augment": one}}}) for one in (0, 1)],
        )
    assert not (tmp_path / "out/meta.json").exists()


def test_new_images_and_answers_take_precedence_over_the_source(mmpr: Path, images: Path) -> None:
    pairs = list(open_pairs(mmpr).pairs)
    changed = dataclasses.replace(pairs[0], images=(f"{images}/sub/b.jpg", f"{images}/a.png"))
    assert json.loads(to_line(changed, str(images)))["image"] == ["sub/b.jpg", "a.png"]
    changed = dataclasses.replace(pairs[8], images=(f"{images}/a.png",), answer_gt="4")
    line = json.loads(to_line(changed, str(images)))
    assert (line["image"], line["answer_gt"]) == ("a.png", "4")


def test_the_settings_of_the_meta_file_are_kept(mmpr: Path) -> None:
    for subset in read_meta(mmpr):
        assert SETTINGS[subset.name].items() <= subset.settings.items()
    assert isinstance(open_pairs(mmpr).pairs, MMPRDataset)
    with pytest.raises(ValueError, match="max_line_bytes must be at least 1, got 0"):
        LineFile(mmpr, lambda values, line: PAIR, max_line_bytes=0)
