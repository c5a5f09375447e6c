"""Runs a notebook from top to bottom in an empty folder, and prints the outputs of its cells.

Usage: ``python tools/run_notebook.py docs/notebooks/first_run.ipynb``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def print_outputs(cell: Any, cell_index: int, **_: Any) -> None:
    """Prints the outputs of a cell after its execution."""
    for output in cell.get("outputs", ()):
        print(output.get("text") or output.get("data", {}).get("text/plain", ""), end="")


def main(path: str) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    start = time.monotonic()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for mpo-ext
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=resources, on_cell_executed=print_outputs).execute()
    print(f"{path} ran in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
