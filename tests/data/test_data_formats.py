"""Records, files and datasets: every way there and back, byte for byte where that is promised."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from mmpr_lines import LINES, SETTINGS

from mpo_ext.data import (
    BadLine,
    MMPRDataset,
    Pair,
    Skipped,
    open_pairs,
    read_meta,
    read_pairs,
    write_mmpr,
    write_pairs,
)
from mpo_ext.data.convert import convert
from mpo_ext.data.hf import DatasetPairs, load_dataset_folder, to_dataset
from mpo_ext.data.jsonl import LineFile
from mpo_ext.data.mmpr import read_annotation, resolve_image, to_line
from mpo_ext.data.paths import map_root, parse_root_map
from mpo_ext.data.reader import FieldError
from mpo_ext.data.trl import from_trl, read_trl, to_trl, write_trl
from mpo_ext.files import atomic_write

KINDS = ("standard", "conversational")
PAIR = Pair("q", "c", "r")


def assert_same_mmpr(meta: Path, other: Path) -> None:
    """The lines are equal byte for byte, the settings but for the place of the lines."""
    assert [subset.name for subset in read_meta(meta)] == [subset.name for subset in read_meta(other)]
    for one, two in zip(read_meta(meta), read_meta(other), strict=True):
        assert Path(one.annotation).read_bytes() == Path(two.annotation).read_bytes()
        assert {**one.settings, "annotation": ""} == {**two.settings, "annotation": ""}


def test_mmpr_comes_back_through_every_format(mmpr: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
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


def test_every_line_of_mmpr_comes_back_byte_for_byte(mmpr: Path) -> None:
    for subset in read_meta(mmpr):
        file = read_annotation(subset)
        assert b"".join(to_line(pair, subset.root) for pair in file) == Path(subset.annotation).read_bytes()


def test_what_an_mmpr_line_holds_is_in_the_pair(mmpr: Path, images: Path) -> None:
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
def test_an_image_outside_its_root_is_refused(image: str, write_lines: Any) -> None:
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


def test_root_map_moves_roots_annotations_and_images(mmpr: Path, images: Path, tmp_path: Path) -> None:
    meta = json.loads(mmpr.read_text())
    for entry in meta.values():
        entry["root"] = "/mnt/petrelfs/data/images"
        entry["annotation"] = f"/mnt/petrelfs/data/{entry['annotation']}"
    mmpr.write_text(json.dumps(meta))
    root_map = [parse_root_map(f"/mnt/petrelfs/data={tmp_path}")]
    pairs = list(open_pairs(mmpr, root_map=root_map).pairs)
    assert pairs[0].images == (f"{images}/a.png",)
    write_pairs(tmp_path / "ours.jsonl", pairs)
    moved = list(read_pairs(tmp_path / "ours.jsonl", root_map=[(str(images), "/new")]))
    assert moved[4].images == ("/new/a.png", "/new/sub/b.jpg")
    assert json.loads(to_line(moved[4], "/new")) == LINES["multi"][0]
    assert moved[4].source["root"] == "/new"


def test_root_map_ends_at_a_folder() -> None:
    assert map_root("/data2/x", [("/data", "/new")]) == "/data2/x"
    assert [map_root(path, [("/data/", "/new/")]) for path in ("/data", "/data/", "/data/x")] == [
        "/new/",
        "/new/",
        "/new/x",
    ]
    assert map_root("/a/x", [("/a", "/b"), ("/b", "/c")]) == "/b/x"
    for text in ("nothing", "=x", "x="):
        with pytest.raises(ValueError, match="root_map must read OLD=NEW"):
            parse_root_map(text)


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
def test_what_is_no_meta_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="must be a meta file in JSON"):
        read_meta(tmp_path / "meta.json")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"question": 1}, TypeError, "question must be a str, got int 1"),
        ({"chosen": None}, TypeError, "chosen must be a str, got NoneType None"),
        ({"rejected": ["r"]}, TypeError, "rejected must be a str, got list"),
        ({"chosen": "\ud800"}, ValueError, "chosen must be text that UTF-8 can hold"),
        ({"images": "a.png"}, TypeError, "images must be a list of paths, got str"),
        ({"images": ["a", 1]}, TypeError, r"images\[1\] must be a str, got int 1"),
        ({"images": [""]}, ValueError, r"images\[0\] must be a path"),
        ({"answer_gt": True}, TypeError, "answer_gt must be a str or None, got bool True"),
        ({"answer_gt": float("inf")}, TypeError, "answer_gt must be a str or None, got float inf"),
        ({"provenance": []}, TypeError, r"provenance must be a dict, got list \[\]"),
        ({"provenance": {"a": [0, float("nan")]}}, ValueError, r"provenance.a\[1\] must be finite, got nan"),
        ({"extra": {"a": {1: 2}}}, TypeError, r"extra.a must have keys of type str, got int 1"),
        ({"extra": {"a": (1,)}}, TypeError, r"extra.a must be JSON"),
        ({"extra": {"$source": 1}}, TypeError, r"extra.\$source must be a dict, got int 1"),
        ({"qestion": "x"}, ValueError, "unknown field 'qestion'; known fields: question"),
    ],
)
def test_a_bad_field_of_a_pair_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Pair.from_dict({**PAIR.to_dict(), **change})


def test_a_pair_needs_question_and_both_responses() -> None:
    with pytest.raises(ValueError, match="rejected must be given, got an object with 'question', 'chosen'"):
        Pair.from_dict({"question": "q", "chosen": "c"})
    with pytest.raises(TypeError, match="a pair must be an object"):
        Pair.from_dict([])  # type: ignore[arg-type]
    assert Pair.from_dict({"question": "q", "chosen": "c", "rejected": "r"}) == PAIR


def test_an_answer_that_is_a_number_becomes_its_text(tmp_path: Path) -> None:
    for number, text in ((3, "3"), (0.5, "0.5"), (-1e30, "-1e+30")):
        assert Pair.from_dict({**PAIR.to_dict(), "answer_gt": number}) == dataclasses.replace(PAIR, answer_gt=text)
    (tmp_path / "p.jsonl").write_text(json.dumps({**PAIR.to_dict(), "answer_gt": 7}) + "\n")
    assert read_pairs(tmp_path / "p.jsonl")[0].answer_gt == "7"


def test_the_key_hangs_on_question_responses_and_images_alone() -> None:
    assert PAIR.key() == "0a833e499bf22937df1018a114a10751"
    other = dataclasses.replace(PAIR, answer_gt="x", provenance={"seed": 1}, extra={"a": 1})
    assert other.key() == PAIR.key()
    keys = {dataclasses.replace(PAIR, **{name: "x"}).key() for name in ("question", "chosen", "rejected")}
    keys |= {PAIR.key(), dataclasses.replace(PAIR, images=("x",)).key(), Pair("qc", "", "r").key()}
    assert len(keys) == 6
    assert len({PAIR, other}) == 2


def test_our_own_lines_come_back(tmp_path: Path) -> None:
    pairs = [
        PAIR,
        Pair(
            '問\n"q"\u2028',
            "c\r\n",
            "\t",
            ("a", "/b"),
            "",
            {"cut": {"characters": 3}},
            {"x": [1.5, None, {"y": 2**70}]},
        ),
    ]
    assert write_pairs(tmp_path / "p.jsonl", iter(pairs)) == 2
    assert list(read_pairs(tmp_path / "p.jsonl")) == pairs


@pytest.mark.parametrize("kind", KINDS)
def test_a_trl_row_holds_what_trl_reads(kind: Any, mmpr: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    for pair in open_pairs(mmpr).pairs:
        row = to_trl(pair, kind)
        assert data_utils.is_conversational(row) == (kind == "conversational")
        if kind == "conversational":
            messages = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
            placed = [block["image"] for block in messages[0]["content"] if block["type"] == "image"]
            assert placed == list(pair.images)
            assert data_utils.prepare_multimodal_messages(row["chosen"])[0]["content"][0]["text"] == pair.chosen
        assert from_trl(row) == pair


def test_images_stand_where_the_question_has_them() -> None:
    def blocks(question: str, images: int) -> list[str]:
        row = to_trl(Pair(question, "c", "r", ("x",) * images), "conversational")
        assert from_trl(row).question == question
        return [block["text"] or "IMAGE" for block in row["prompt"][0]["content"]]

    assert blocks("<image>\nq", 1) == ["IMAGE", "q"]
    assert blocks("q", 1) == ["IMAGE", "q"]
    assert blocks("a <image> b <image>\n", 2) == ["a ", "IMAGE", " b ", "IMAGE"]
    assert blocks("<image><image>", 1) == ["IMAGE", "<image><image>"]
    assert blocks("<image>", 0) == ["<image>"]


def test_a_changed_prompt_has_the_last_word() -> None:
    row = to_trl(Pair("a <image>", "c", "r", ("x",)), "conversational")
    assert row["question"] == "a <image>"
    row["prompt"][0]["content"][0]["text"] = "b "
    assert from_trl(row).question == "b <image>\n"


def test_rows_of_others_are_read_or_refused() -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "score": 0.5}
    assert from_trl(row) == Pair("q", "c", "r", extra={"score": 0.5})
    user = {"role": "user", "content": "q"}
    for prompt in ([user, user], [{"role": "system", "content": "s"}, user], [], [1], 3, None, [{"role": "user"}]):
        with pytest.raises(FieldError, match="prompt must"):
            from_trl({**row, "prompt": prompt})
    with pytest.raises(FieldError, match="chosen must be text or one message"):
        from_trl({**row, "chosen": [user]})
    with pytest.raises(FieldError, match="images must be paths unless image_dir is given"):
        from_trl({**row, "images": [{"bytes": b"x", "path": None}]})


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


def test_a_writer_that_fails_leaves_what_stood_there(tmp_path: Path, mmpr: Path) -> None:
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


def test_a_killed_writer_leaves_no_half_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom mpo_ext.data import Pair, write_pairs\n"
        "def pairs():\n"
        "    for index in range(10**6):\n"
        "        if index == 5000: os._exit(9)\n"
        "        yield Pair('q' * 100, 'c', 'r')\n"
        f"write_pairs({str(tmp_path / 'p.jsonl')!r}, pairs())"
    )
    write_pairs(tmp_path / "p.jsonl", [PAIR])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list(read_pairs(tmp_path / "p.jsonl")) == [PAIR]


def test_atomic_write_keeps_the_permissions_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_pairs_made_here_go_into_a_subset_of_their_own(tmp_path: Path, images: Path) -> None:
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


def test_pairs_that_mmpr_cannot_hold_are_refused(tmp_path: Path, images: Path) -> None:
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


def test_new_images_and_answers_win_over_the_memory_of_the_source(mmpr: Path, images: Path) -> None:
    pairs = list(open_pairs(mmpr).pairs)
    changed = dataclasses.replace(pairs[0], images=(f"{images}/sub/b.jpg", f"{images}/a.png"))
    assert json.loads(to_line(changed, str(images)))["image"] == ["sub/b.jpg", "a.png"]
    changed = dataclasses.replace(pairs[8], images=(f"{images}/a.png",), answer_gt="4")
    line = json.loads(to_line(changed, str(images)))
    assert (line["image"], line["answer_gt"]) == ("a.png", "4")


def test_empty_lines_a_byte_order_mark_and_a_missing_end_are_no_defects(tmp_path: Path) -> None:
    line = json.dumps(PAIR.to_dict()).encode()
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n\r\n" + line + b"\n\n" + line)
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert list(pairs) == [PAIR] * 3
    assert [pairs.locate(index).line for index in range(3)] == [1, 4, 6]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert len(read_pairs(tmp_path / "empty.jsonl")) == 0
    assert list(read_pairs(tmp_path / "empty.jsonl").scan()) == []


def test_skipped_lines_are_counted_with_their_reasons(tmp_path: Path) -> None:
    line = json.dumps(PAIR.to_dict()).encode()
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([line, b"{", line, b"[]", b"{}"] + [b"x"] * 9))
    pairs, skipped = read_pairs(tmp_path / "p.jsonl"), Skipped(keep=2)
    assert list(pairs.good(skipped)) == [PAIR] * 2
    assert skipped.counts == {"bad JSON": 10, "bad field": 2}
    assert [bad.where.line for bad in skipped.examples["bad JSON"]] == [2, 6]
    assert next(skipped.lines()) == "skipped 10: bad JSON"
    with pytest.raises(BadLine, match=r"p.jsonl:2: bad JSON"):
        list(pairs)


def test_a_reader_works_in_another_process(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", [dataclasses.replace(PAIR, question=str(index)) for index in range(50)])
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert pairs[7].question == "7"
    assert pickle.loads(pickle.dumps(pairs))[8].question == "8"
    bad = BadLine(pairs.locate(0), "bad JSON", "why")
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", [PAIR] * 3)
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert len(pairs) == 3
    os.truncate(tmp_path / "p.jsonl", 10)
    with pytest.raises(RuntimeError, match="must not change while it is read"):
        pairs[2]


@pytest.mark.parametrize("lines", [100_000])
def test_memory_stays_flat_over_a_long_file(lines: int, tmp_path: Path) -> None:
    line = json.dumps({**PAIR.to_dict(), "chosen": "c" * 400}).encode() + b"\n"
    with open(tmp_path / "p.jsonl", "wb") as file:
        for _ in range(lines // 1000):
            file.write(line * 1000)
    tracemalloc.start()
    with contextlib.closing(read_pairs(tmp_path / "p.jsonl")) as pairs:
        assert len(pairs) == lines
        assert pairs[lines - 1] == pairs[lines // 2] == pairs[0]
        assert sum(1 for index in range(0, lines, 50) if pairs[index].chosen) == lines // 50
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "p.jsonl").stat().st_size
    assert size > 50e6
    assert peak < 8e6, f"{peak:,} bytes for a file of {size:,}"


def test_a_huge_line_is_never_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "p.jsonl", "wb") as file:
        file.write(b'{"question": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + json.dumps(PAIR.to_dict()).encode())
    tracemalloc.start()
    pairs = list(read_pairs(tmp_path / "p.jsonl").scan())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(pairs[0][1], BadLine)
    assert pairs[0][1].kind == "huge line"
    assert pairs[1][1] == PAIR
    assert peak < 8e6


def test_the_format_is_found_out(mmpr: Path, tmp_path: Path) -> None:
    subset = tmp_path / "multi.jsonl"
    source = open_pairs(subset, root=tmp_path / "images")
    assert source.format == "mmpr"
    assert source.pairs[0].images[0] == str(tmp_path / "images/a.png")
    (tmp_path / "bad.jsonl").write_bytes(b"{\n[]\n")
    with pytest.raises(ValueError, match="format must be told apart by a good line"):
        open_pairs(tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match="path must exist"):
        open_pairs(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="format must be one of mmpr, pairs, trl, hf, got 'csv'"):
        open_pairs(mmpr, format="csv")  # type: ignore[arg-type]


def test_relative_images_come_back_relative(images: Path, tmp_path: Path) -> None:
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


TEXT_ONLY = {"question": "1 + 1?", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("fields", "format"), [({"images": ["a.png"]}, "pairs"), ({"image": "a.png"}, "mmpr"), ({}, "mmpr")]
)
def test_the_format_is_told_by_the_first_line_that_can(fields: dict[str, Any], format: str, tmp_path: Path) -> None:
    lines = [TEXT_ONLY, {**TEXT_ONLY, "answer_gt": "2"}, {**TEXT_ONLY, **fields}, TEXT_ONLY]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_pairs(tmp_path / "p.jsonl")
    assert source.format == format
    pairs = [pair for _, pair in source.scan()]
    assert [len(pair.images) for pair in pairs if isinstance(pair, Pair)] == [0, 0, len(fields), 0]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"image": "a.png"}, {"images": ["b.png"]}, "named by 'image', got 'images' .*--from pairs"),
        ({"images": ["b.png"]}, {"image": "a.png"}, "named 'images', got 'image' 'a.png'.*--from mmpr"),
    ],
)
def test_a_line_of_the_other_format_is_a_bad_line_and_loses_no_image_in_silence(
    first: dict[str, Any], second: dict[str, Any], words: str, tmp_path: Path
) -> None:
    lines = [TEXT_ONLY, {**TEXT_ONLY, **first}, {**TEXT_ONLY, **second}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good, bad = [result for _, result in open_pairs(tmp_path / "p.jsonl").scan()][1:]
    assert isinstance(good, Pair)
    assert len(good.images) == 1
    assert isinstance(bad, BadLine)
    assert re.search(words, bad.reason)


def test_a_format_that_is_told_too_late_costs_an_error_and_no_image(tmp_path: Path) -> None:
    lines = [TEXT_ONLY] * 1000 + [{**TEXT_ONLY, "images": ["a.png"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_pairs(tmp_path / "p.jsonl")
    assert source.format == "mmpr"
    with pytest.raises(BadLine, match="--from pairs"):
        source.pairs[1000]
    assert open_pairs(tmp_path / "p.jsonl", format="pairs").pairs[1000].images == ("a.png",)


def test_a_trl_line_that_holds_no_pair_is_a_bad_line(tmp_path: Path) -> None:
    rows = [to_trl(PAIR), {**to_trl(PAIR), "extra": "{"}, {**to_trl(PAIR), "provenance": "[]"}, {"prompt": "q"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = [result for _, result in read_trl(tmp_path / "t.jsonl").scan()]
    assert results[0] == PAIR
    assert all(isinstance(result, BadLine) for result in results[1:])


def test_settings_of_the_fixture_are_those_read(mmpr: Path) -> None:
    for subset in read_meta(mmpr):
        assert SETTINGS[subset.name].items() <= subset.settings.items()
    assert isinstance(open_pairs(mmpr).pairs, MMPRDataset)
    with pytest.raises(ValueError, match="max_line_bytes must be at least 1, got 0"):
        LineFile(mmpr, lambda values, line: PAIR, max_line_bytes=0)
