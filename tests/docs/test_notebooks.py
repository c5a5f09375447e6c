"""Tests the notebooks: the code parses, the links exist, and no outputs are stored. ``make notebook`` runs them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import page
import pytest

from mpo_ext.train import recipe

NOTEBOOKS = sorted((page.ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_code_that_parses_and_no_outputs(path: Path) -> None:
    assert all(not cell.get("outputs") for cell in json.loads(path.read_text())["cells"])
    for text in cells(path, "code"):
        ast.parse(re.sub(r"^( *)[!%].*$", r"\1pass", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_links_of_a_notebook_lead_to_pages(path: Path) -> None:
    links = [link for text in cells(path, "markdown") for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert links
    for link in links:
        assert (path.parent / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_recipes_in_a_notebook_are_recipes(path: Path, tmp_path: Path) -> None:
    pattern = re.compile(r'write\(f?"""\n(model:.*?)"""', re.DOTALL)
    texts = [text for cell in cells(path, "code") for text in pattern.findall(cell)]
    assert texts
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text.replace("{{", "{").replace("}}", "}").replace("{MODEL}", "tiny"))
        assert recipe.load_recipe(file, []).output.dir


def test_the_pages_lead_to_the_notebooks() -> None:
    for name in ("README.md", "docs/index.md"):
        text = (page.ROOT / name).read_text(encoding="utf-8")
        for path in NOTEBOOKS:
            assert f"notebooks/{path.name})" in text, name
