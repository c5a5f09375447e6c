"""Tests that the CI workflows run only pinned code: actions by commit, tools by version."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_only_pinned_code(path: Path) -> None:
    text = path.read_text()
    for action in re.findall(r"uses:\s*(.*)", text):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action
    for tool in re.findall(r"pipx run (\S+)", text):
        assert re.fullmatch(r"[\w-]+==[\d.]+", tool), tool


def test_the_versions_that_ci_uses_are_exact() -> None:
    text = (ROOT / ".github" / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r'[\w.-]+==[\w.+!-]+(; python_version >= "3\.\d+")?', line), line
