"""Tests tools/matrix.py, which runs the tests with several versions of Python and torch.

If a combination of versions cannot run, its result has a reason. Results of earlier calls are kept.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import matrix as matrix_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import matrix

    return matrix


def test_a_python_that_is_missing_is_not_run(matrix: object, tmp_path: Path) -> None:
    cell = matrix.run_cell("2.9", "2.13", ["tests"], tmp_path / "cell")
    assert (cell["status"], cell["reason"]) == ("not run", "there is no Python 2.9 on this machine")
    version = "{}.{}".format(*sys.version_info)
    assert matrix.find_python(version) is not None


def test_the_import_of_a_cell_prints_the_version_of_torch(matrix: object) -> None:
    done = subprocess.run([sys.executable, "-c", matrix._IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == torch.__version__


def test_a_step_that_fails_names_itself(matrix: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_tree(target: Path) -> None:
        target.mkdir(parents=True)

    monkeypatch.setattr(matrix, "_copy_tree", copy_tree)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    version = "{}.{}".format(*sys.version_info)
    cell = matrix.run_cell(version, "0.0", [], tmp_path / "cell")
    assert cell["status"] == "not run"
    assert cell["reason"].startswith("torch: ERROR:")
    assert not (tmp_path / "cell" / "environment").exists()


def test_every_cell_is_written_and_kept(matrix: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_cell(python: str, torch: str, tests: list[str], folder: Path) -> dict[str, object]:
        status = "failed" if python == "3.12" else "passed"
        reason = "build: error: x" if status == "failed" else "7 passed in 1.00s"
        return {"python": python, "torch": torch, "date": "2026-01-01", "status": status, "reason": reason}

    monkeypatch.setattr(matrix, "run_cell", run_cell)
    out = tmp_path / "matrix.json"
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--out", str(out), "--cells", "3.12:2.11"])
    assert matrix.main() == 1
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--out", str(out), "--cells", "3.10:2.8"])
    assert matrix.main() == 0
    document = matrix_table.load(out)
    text = matrix_table.table({"matrix": document})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert cells[0] == ["torch", "Python 3.10", "Python 3.12"]
    assert cells[2:] == [["2.8", "passed: 7 passed, 2026-01-01", ""], ["2.11", "", "failed, 2026-01-01"]]
    assert "- torch 2.11, Python 3.12: build: error: x" in text
    out.write_text(json.dumps({**document, "cells": [{"python": "3.12"}]}))
    with pytest.raises(ValueError, match=r"matrix\.json: a cell must have"):
        matrix_table.load(out)
