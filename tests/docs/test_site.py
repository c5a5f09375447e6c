"""Tests that the site builds without dead links, and that files for GitHub and PyPI are valid."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

_CODE = re.compile(r"^(`{3,}).*?^\1\s*$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)(?: +#+)?$", re.MULTILINE)


def links(text: str) -> list[str]:
    return [link for link in _LINK.findall(_CODE.sub("", text)) if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """Returns the anchors that the site gives to the headings of a page; a repeated heading gets the suffix _1."""
    found: set[str] = set()
    for heading in _HEADING.findall(re.sub(r"^(`{3,}).*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.add(slug if slug not in found else f"{slug}_1")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_link_is_dead(path: Path) -> None:
    for link in links(path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link} leads to no file"
        if DOCS in path.parents:
            assert DOCS in target.parents, f"{path.name}: {link} leads out of docs/, where the site has no page"
        if anchor and target.suffix == ".md" and "reference" not in target.parts:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link} leads to no heading"


def test_links_and_anchors_are_read_as_meant() -> None:
    assert links("[a](b.md#c) `[x](y)` [d](https://e) ![i](j.png)\n```\n[f](g)\n```\n[h](k.md)") == [
        "b.md#c",
        "j.png",
        "k.md",
    ]
    assert anchors("# A `b` c: 4.5 %\n```\n# no\n```\n## A training step\n## A training step\n") == {
        "a-b-c-45",
        "a-training-step",
        "a-training-step_1",
    }


def leaves(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [leaf for value in (node.values() if isinstance(node, dict) else node) for leaf in leaves(value)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_documented_name_exists() -> None:
    import importlib

    for path in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            try:
                found = hasattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError:
                found = False
            assert found or importlib.import_module(name), f"{path.name}: {name} is not there"


def row_of(name: str) -> str:
    """Returns a Markdown table row with the name, the first docstring paragraph and the file of a function or class.

    ``name`` is the full name, such as "mpo_ext.mpo_loss".
    """
    import importlib
    import inspect

    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    text = " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
    file = Path(inspect.getfile(documented)).relative_to(ROOT)
    return f"| [`{attribute}`](#{name}) | {text} | `{file.as_posix()}` |"


@pytest.mark.parametrize("path", sorted((DOCS / "reference").glob("*.md")), ids=lambda path: path.stem)
def test_every_documented_name_is_in_the_table_of_its_page(path: Path) -> None:
    """Checks that the table of a page lists the names in its ``:::`` lines, which GitHub does not render."""
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    rows = [row_of(name) for name in names]
    assert re.findall(r"^\| \[`.*$", text, re.MULTILINE) == rows, "\n".join(rows)
    assert not names or "lines that begin with `:::`" in text.partition("::: ")[0]


def test_every_public_name_is_documented() -> None:
    import mpo_ext

    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    for name in mpo_ext.__all__:
        assert name.startswith("_") or re.search(rf"^::: mpo_ext\.[\w.]*\b{name}$", text, re.MULTILINE), name


def commands(
    parser: argparse.ArgumentParser, before: str = "mpo-ext"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields each command that has no subcommands, with its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield before, parser
    for action in below:
        for name, one in action.choices.items():
            yield from commands(one, f"{before} {name}")


def whole_parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Returns the complete argument parser of ``mpo-ext``. No command runs."""
    from mpo_ext.__main__ import main

    class CaughtError(Exception):
        pass

    caught: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        caught.append(self)
        raise CaughtError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(CaughtError):
        main([])
    return caught[0]


def test_every_command_is_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "reference" / "cli.md").read_text()
    found = dict(commands(whole_parser(monkeypatch)))
    assert {"mpo-ext doctor", "mpo-ext plan", "mpo-ext data view", "mpo-ext sample correctness"} <= set(found)
    for command in found:
        assert re.search(rf"^\| `{command}\b[^`]*` \|", text, re.MULTILINE), f"{command} has no line in cli.md"
        assert command == "mpo-ext doctor" or f"\n{command} --help\n" in text, f"cli.md does not try {command} --help"
    listed = re.findall(r"^\| `(mpo-ext(?: [a-z-]+)+)", text, re.MULTILINE)
    assert set(listed) == set(found), "cli.md has a command that is not there"


def test_variables_that_the_commands_read_are_in_the_reference() -> None:
    text = (DOCS / "reference" / "cli.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "mpo_ext").rglob("*.py"))
    for name in {*re.findall(r"""environ(?:\.get\(|\[)"(MPO_\w+)\"""", sources), "OMP_NUM_THREADS"}:
        assert f"`{name}" in text, name


def test_every_extra_is_described_where_the_installation_is() -> None:
    extras = re.findall(
        r"^(\w+) = \[",
        (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2].partition("\n[")[0],
        re.MULTILINE,
    )
    assert "bench" in extras
    assert "(docs/index.md#install)" in (ROOT / "README.md").read_text()
    described = (DOCS / "index.md").read_text().partition("| extra | for |")[2].partition("\n\n")[0]
    for extra in extras:
        assert extra == "dev" or f"`{extra}`" in described, extra


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs (pip install '.[docs]')")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs (pip install '.[docs]')")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "reference" / "loss" / "index.html").exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_well_formed(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"]
    assert workflow[True], "a workflow must say when it runs"  # YAML 1.1 reads `on` as a boolean
    assert workflow["permissions"], "a workflow must say what it may do"
    for name, job in workflow["jobs"].items():
        assert job["runs-on"], name
        assert all("run" in step or "uses" in step for step in job["steps"]), name
        for needed in [job.get("needs", [])] if isinstance(job.get("needs", []), str) else job.get("needs", []):
            assert needed in workflow["jobs"], f"{name} needs {needed}"


def test_ci_runs_what_must_hold_for_every_change() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert any(step.get("run") == ".ci/run" for step in steps)


def test_issue_templates_and_citation_are_well_formed() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) >= 3
    for path in templates:
        form = yaml.safe_load(path.read_text())
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(form), path.name
            assert all(field["type"] == "markdown" or field["attributes"]["label"] for field in form["body"])
    import mpo_ext

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "type"} <= set(citation)
    assert str(citation["version"]) == mpo_ext.__version__


def test_make_docs_installs_the_extra() -> None:
    (extra,) = re.findall(r"^docs = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    for requirement in yaml.safe_load(extra):
        assert f"'{requirement}'" in makefile
