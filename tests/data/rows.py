"""Helpers and example rows in the formats of other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.sources import PairSource


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def human(value: str) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def open_rows(folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> PairSource:
    """Writes rows as JSON lines and opens the file."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return open_pairs(path, **options)


def read_row(folder: Path, row: dict[str, Any], **options: Any) -> Pair | BadLine:
    """Reads a row. Returns the pair with the image paths of the row, or a BadLine with the reason."""
    source = open_rows(folder, [row], **options)
    return next(pair for _, pair in source.pairs.scan())
