"""Tests that the code on the documentation pages runs.

The code blocks of a page run in order, in a fresh folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import page
import pytest

pytest.importorskip("sklearn", reason="the pages use the extra demo")
pytest.importorskip("peft", reason="the pages use the extra lora")

PAGES = [
    page.ROOT / "README.md",
    *(page.ROOT / "docs" / name for name in ("index.md", "tutorial.md", "troubleshooting.md")),
    *sorted((page.ROOT / "docs" / "how-to").glob("*.md")),
    page.ROOT / "docs" / "reference" / "cli.md",
    *sorted((page.ROOT / "docs" / "explanation").glob("*.md")),
]


@pytest.fixture(scope="module")
def server() -> Iterator[page.Server]:
    server = page.Server()
    yield server
    server.close()


def name(path: Path) -> str:
    return path.relative_to(page.ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_blocks_of_a_page_run(path: Path, server: page.Server, tmp_path: Path) -> None:
    shutil.copytree(page.ROOT / "recipes", tmp_path / "recipes")
    for block in page.blocks(path):
        if block.reason is None and (block.language in page.RUN or block.title is not None):
            server.run(block, tmp_path)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_is_run_written_or_says_why_not(path: Path) -> None:
    for block in page.blocks(path):
        known = block.language in page.RUN or block.title is not None or block.language in ("", "text")
        assert known or block.reason, f"{block}: {block.language} is neither run nor a file: give a title or a reason"
        if block.reason is not None:
            assert len(block.reason) > 10, f"{block}: a reason must say why, got {block.reason!r}"


def test_every_prelude_belongs_to_a_block() -> None:
    expected = {
        f"{block.page.replace('/', '-').removesuffix('.md')}-{block.number}.py"
        for path in PAGES
        for block in page.blocks(path)
        if block.language == "python" and block.reason is None
    }
    assert {path.name for path in page.PRELUDES.glob("*.py")} <= expected


def test_blocks_and_reasons_are_read_as_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    path = tmp_path / "a.md"
    path.write_text(
        '```python\na\n```\n\n<!-- not run: needs a GPU -->\n```bash\nb\n```\n\n```yaml title="r.yaml"\nc\n```\n'
        "```bash\nd\n```\n<!-- not run: takes hours -->\n"
    )
    first, second, third, fourth = page.blocks(path)
    assert (first.language, first.reason, first.number, first.text) == ("python", None, 1, "a\n")
    assert (second.reason, second.line) == ("needs a GPU", 6)
    assert (third.title, third.reason) == ("r.yaml", None)
    assert (fourth.reason, fourth.number) == ("takes hours", 2)


def test_commands_are_calls_or_lines_for_a_shell() -> None:
    text = "# note\nmpo-ext train r.yaml \\\n  a=1 # why\nhead -3 x | cat\npython -m a | tail\n"
    assert list(page.commands(text)) == [
        ["mpo-ext", "train", "r.yaml", "a=1"],
        "head -3 x | cat",
        "python -m a | tail",
    ]


def test_a_block_that_fails_is_found(server: page.Server, tmp_path: Path) -> None:
    def block(language: str, text: str) -> page.Block:
        return page.Block("a.md", 1, language, None, text, None, 1)

    assert "7" in server.run(block("python", "print(3 + 4)"), tmp_path)
    for language, text in (
        ("python", "raise ValueError"),
        ("bash", "false"),
        ("bash", "mpo-ext data check missing.jsonl"),
        ("bash", "mpo-ext doctor\npython missing.py"),
    ):
        with pytest.raises(AssertionError, match=r"a\.md:1"):
            server.run(block(language, text), tmp_path)
