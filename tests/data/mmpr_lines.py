"""Every variant of a line that published MMPR files hold, and more."""

# ruff: noqa: RUF001 - Chinese has its own punctuation
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
        {"chosen": "8", "rejected": "9", "question": "字段顺序", "pictures": ["kept"], "extra": 1},
    ],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "m3cot pairs/correctness": {"data_augment": False, "max_dynamic_patch": 12, "repeat_time": 1},
    "multi": {"data_augment": True, "repeat_time": 3},
    "text": {"data_augment": False, "repeat_time": 0.5, "note": "文"},
}

WriteLines = Callable[[str, Iterable[dict[str, Any] | bytes]], Path]


def encode(line: dict[str, Any] | bytes, *, ascii: bool = False) -> bytes:
    return line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=ascii).encode() + b"\n"
