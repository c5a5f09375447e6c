"""Reads results/matrix.json: the results of ``python tools/matrix.py`` for each version of Python and torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from benchmarks import schema
from mpo_ext.report import markdown_table

VERSION = 1
_KEYS = {"python", "torch", "status", "reason", "date"}
_STATUSES = ("passed", "failed", "not run")


def check(document: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if ``document``, the content of results/matrix.json, has a wrong format.

    ``name`` is the file name, for messages.
    """
    if set(document) != {"schema", "command", "cells"} or document["schema"] != VERSION:
        raise ValueError(f"{name}: must have schema {VERSION}, command and cells, got {sorted(document)}")
    for cell in document["cells"]:
        if not set(cell) >= _KEYS or cell["status"] not in _STATUSES:
            raise ValueError(f"{name}: a cell must have {', '.join(sorted(_KEYS))}, got {cell}")


load = functools.partial(schema.load, check=check)


def table(documents: Mapping[str, Any]) -> str:
    """Returns a table of the test results by version of torch (rows) and of Python (columns).

    Without a result file, returns a message that there are no results.
    """
    document = documents.get("matrix")
    if document is None:
        return "There are no results yet."
    cells = {(cell["torch"], cell["python"]): cell for cell in document["cells"]}

    def order(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    torches = sorted({torch for torch, _ in cells}, key=order)
    pythons = sorted({python for _, python in cells}, key=order)
    rows = [[torch, *(_cell(cells.get((torch, python))) for python in pythons)] for torch in torches]
    others = [cell for cell in document["cells"] if cell["status"] != "passed"]
    reasons = {f"- torch {cell['torch']}, Python {cell['python']}: {cell['reason']}" for cell in others}
    text = f"`{document['command']}` on a CPU:\n\n"
    text += markdown_table(["torch", *(f"Python {python}" for python in pythons)], rows)
    return text + ("\nCombinations that did not pass:\n\n" + "\n".join(sorted(reasons)) if reasons else "")


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    counts = f": {cell['reason'].partition(' in ')[0]}" if cell["status"] == "passed" else ""
    return f"{cell['status']}{counts}, {cell['date']}"
