"""Defines fixtures with MMPR files: lines in each published form, and lines with each kind of defect."""

# ruff: noqa: RUF001 - Chinese has its own punctuation
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpo_ext.cli.main import main
from mpo_ext.data import Pair

LINES: dict[str, list[dict[str, Any]]] = {
    "m3cot pairs/correctness": [
        {"image": "a.png", "question": "<image>\nHow many?", "chosen": "Two.", "rejected": "Three.", "answer_gt": "2"},
        {"image": "a.png", "question": "How many?", "chosen": "Two. Final answer: 2", "rejected": "One"},
        {"image": "sub/b.jpg", "question": "see <image> here\n", "chosen": "yes\n\nit is", "rejected": " no "},
        {
            "image": "sub/b.jpg",
            "question": "<image>\n图中有几个人？",
            "chosen": "两个人。\n最终答案：2",
            "rejected": "三个人。",
            "answer_gt": "2",
            "chosen_meta": {"score": 0.5, "tags": ["x", None, True]},
        },
    ],
    "multi": [
        {
            "image": ["a.png", "sub/b.jpg"],
            "question": "<image>\n<image>\nSame?",
            "chosen": 'They are "equal"\t\\o/',
            "rejected": "It's </script> \u2028 😀",
        },
        {"image": ["a.png"], "question": "<image>\nOne in a list", "chosen": "c", "rejected": "d", "answer_gt": None},
        {"image": ["a.png", "a.png"], "question": "1: <image>, 2: <image>.", "chosen": "c", "rejected": "e"},
    ],
    "text": [
        {"question": "1 + 1?", "chosen": "2", "rejected": "3", "answer_gt": 2},
        {"image": "", "question": "2 + 1?", "chosen": "3", "rejected": "4", "answer_gt": ["3", "three"]},
        {"image": None, "question": "3 + 1?", "chosen": "4", "rejected": "5", "answer_gt": ""},
        {"image": [], "question": "4 + 1?", "chosen": "5", "rejected": "6", "provenance": {}},
        {"id": 7, "question": "5 + 1?", "chosen": "6", "rejected": "7", "provenance": {"pipeline": "correctness"}},
        {"chosen": "8", "rejected": "9", "question": "字段顺序", "notes": ["kept"], "extra": 1},
    ],
}

SETTINGS: dict[str, dict[str, Any]] = {
    "m3cot pairs/correctness": {"data_augment": False, "max_dynamic_patch": 12, "repeat_time": 1},
    "multi": {"data_augment": True, "repeat_time": 3},
    "text": {"data_augment": False, "repeat_time": 0.5, "note": "文"},
}


GOOD = {"image": "a.png", "question": "<image>\nq", "chosen": "c", "rejected": "r"}

DEFECTS: list[tuple[str, Any, str]] = [
    ("bad JSON", b'{"question": "q", "chosen\n', "Unterminated string"),
    ("bad JSON", b'{"question": NaN}\n', "numbers must be finite, got NaN"),
    ("bad JSON", b"{} {}\n", "Extra data"),
    ("bad JSON", b"[" * 50_000 + b"\n", "nested too deeply"),
    ("bad UTF-8", b'{"question": "\xff"}\n', r"invalid start byte at byte 14, b'\xff'"),
    ("huge line", b"x" * 200_000 + b"\n", "must be at most 100,000 bytes long, got 200,001"),
    ("bad field", b"[1]\n", "a line must hold an object, got list"),
    ("bad field", b'{"chosen": "a", "chosen": "b"}\n', "a field must be given once, got 'chosen' twice"),
    ("bad field", {"question": "q", "chosen": "c"}, "rejected must be given"),
    ("bad field", {**GOOD, "chosen": 5}, "chosen must be a str, got int 5"),
    ("bad field", {**GOOD, "image": {"path": "a.png"}}, "image must be a path or a list of paths"),
    ("bad field", {**GOOD, "image": ["a.png", ""]}, "image must be a path or a list of paths"),
    ("bad field", {**GOOD, "$source": 1}, "must be left to the reader"),
    ("bad image path", {**GOOD, "image": "../a.png"}, "image must stay inside"),
    ("missing image", {**GOOD, "image": "none.png"}, "an image must be a file"),
    ("missing image", {**GOOD, "image": "sub"}, "an image must be a file"),
    ("broken image", {**GOOD, "image": "broken.png"}, "such as PNG or JPEG"),
    ("placeholders", {**GOOD, "question": "<image><image>q"}, "0 or 1 times for 1 images, got 2"),
    ("placeholders", {**GOOD, "image": ["a.png", "a.png"]}, "2 times for 2 images, got 1"),
    ("no image", {"question": "<image>", "chosen": "c", "rejected": "r"}, "0 times for 0 images, got 1"),
    ("empty question", {**GOOD, "question": " ", "chosen": "1"}, "question must hold text, got ' '"),
    ("empty question", {**GOOD, "question": "<image>\n", "chosen": "2"}, r"question must hold text, got '<image>\n'"),
    ("empty chosen", {**GOOD, "chosen": ""}, "chosen must hold text, got ''"),
    ("empty rejected", {**GOOD, "rejected": "\n"}, r"rejected must hold text, got '\n'"),
    ("equal responses", {**GOOD, "rejected": "c"}, "chosen and rejected must differ, got 'c' twice"),
    ("answer_gt", {**GOOD, "chosen": "d", "answer_gt": 7}, "answer_gt must be text, got 7"),
    ("duplicate", {**GOOD, "answer_gt": "the pair is the same"}, ":1"),
]

PAIR = Pair("q", "c", "r")


WriteLines = Callable[[str, Iterable[dict[str, Any] | bytes]], Path]


def encode(line: dict[str, Any] | bytes, *, ascii: bool = False) -> bytes:
    return line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=ascii).encode() + b"\n"


def run_data(*arguments: str | os.PathLike[str]) -> int:
    """Runs a command of ``mpo-ext data`` and returns the exit status."""
    return main(["data", *map(os.fspath, arguments)])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Returns a folder with the images a.png and sub/b.jpg."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(root / "a.png")
    Image.new("L", (30, 50), 128).save(root / "sub" / "b.jpg")
    return root


@pytest.fixture
def mmpr(tmp_path: Path, images: Path) -> Path:
    """Returns the path of an MMPR meta file, which lists the data files made from ``LINES``.

    The data file "text" has JSON escapes in place of non-ASCII characters.
    """
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
    """Returns a function that writes a data file and its MMPR meta file.

    The function returns the path of the meta file.
    """

    def write(name: str, lines: Iterable[dict[str, Any] | bytes]) -> Path:
        encoded = [encode(line) for line in lines]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(encoded))
        meta = {name: {"root": str(images), "annotation": f"{name}.jsonl", "length": len(encoded)}}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(meta), encoding="utf-8")
        return path

    return write


@pytest.fixture
def broken(write_lines: Any, images: Path) -> Path:
    """Returns a meta file. Its data file has one good line, followed by the bad line of each entry in ``DEFECTS``."""
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:40])
    return write_lines("broken", [GOOD, *(line for _, line, _ in DEFECTS)])
