"""Files for the tests of the data package."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mmpr_lines import LINES, SETTINGS, WriteLines, encode
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a.png and sub/b.jpg."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(root / "a.png")
    Image.new("L", (30, 50), 128).save(root / "sub" / "b.jpg")
    return root


@pytest.fixture
def mmpr(tmp_path: Path, images: Path) -> Path:
    """The meta file of the fixture. The lines of "text" are written with ASCII escapes."""
    meta = {}
    for name, lines in LINES.items():
        file = tmp_path / f"{name.split()[0]}.jsonl"
        file.write_bytes(b"".join(encode(line, ascii=name == "text") for line in lines))
        meta[name] = {"root": str(images), "annotation": file.name, "length": len(lines), **SETTINGS[name]}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta), encoding="utf-8")
    return path


@pytest.fixture
def write_lines(tmp_path: Path, images: Path) -> WriteLines:
    """Writes an annotation file and a meta file with it alone, and returns the meta file."""

    def write(name: str, lines: Iterable[dict[str, Any] | bytes]) -> Path:
        encoded = [encode(line) for line in lines]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(encoded))
        meta = {name: {"root": str(images), "annotation": f"{name}.jsonl", "length": len(encoded)}}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(meta), encoding="utf-8")
        return path

    return write
