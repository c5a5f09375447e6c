"""Tests ``root_map``, which replaces the first folders of the image paths that a file of pairs contains."""

import json
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import LINES

from mpo_ext.data import (
    Pair,
    open_pairs,
    read_pairs,
    write_pairs,
)
from mpo_ext.data.mmpr import to_line
from mpo_ext.data.paths import map_root, parse_root_map


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


def test_root_map_moves_the_absolute_paths_of_lines_of_mmpr(images: Path, write_lines: Any) -> None:
    line = {"question": "q", "chosen": "c", "rejected": "r", "image": ["/old/a.png", "sub/b.jpg"]}
    line |= {"rejected_image": ["/old/sub/b.jpg", "a.png"], "video": [["/old/a.png"]]}
    meta = write_lines("moved", [line])
    (images / "moved.jsonl").write_text(json.dumps(line))
    moved = (f"{images}/a.png", f"{images}/sub/b.jpg")
    for path in (meta, images / "moved.jsonl"):
        for source in (open_pairs(path, root_map=[("/old", str(images))]), open_pairs(path)):
            _, pair = source.read(0)
            if isinstance(pair, Pair):
                assert (pair.images, pair.rejected_images, pair.videos[0].paths) == (moved, moved[::-1], moved[:1])
                written = json.loads(to_line(pair, str(images)))
                assert written["image"] == ["a.png", "sub/b.jpg"]
            else:
                assert "image must stay inside" in pair.reason
    assert isinstance(open_pairs(meta, root_map=[("/old", str(images))]).read(0)[1], Pair)
    relative = write_lines("relative", [{**line, "image": ["a.png", "sub/b.jpg"], "rejected_image": [], "video": ""}])
    assert open_pairs(relative, root_map=[("sub", "/new")]).pairs[0].images == moved


@pytest.mark.parametrize("is_table", [False, True])
def test_root_map_moves_a_path_of_mmpr_once(is_table: bool, images: Path) -> None:
    line = {"question": "q", "chosen": "c", "rejected": "r", "image": f"{images.parent}/a.png"}
    path = images / "pairs.jsonl"
    path.write_text(json.dumps(line))
    if is_table:
        datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
        path = images / "pairs.parquet"
        datasets.Dataset.from_list([line]).to_parquet(path)
    source = open_pairs(path, format="mmpr", root_map=[(str(images.parent), str(images))])
    assert source.pairs[0].images == (f"{images}/a.png",)


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
