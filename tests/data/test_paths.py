"""Tests ``root_map``, which replaces the first folders of the image paths that a file of pairs contains."""

import json
from pathlib import Path

import pytest
from mmpr_files import LINES

from mpo_ext.data import (
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
