"""Parses and runs the fenced code blocks of documentation pages. Python code runs in processes forked by server.py."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELUDES = Path(__file__).parent / "preludes"
RUN = ("python", "bash")  # other languages are files, which need a title, or no code

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')
# The reason is in a comment on the line before or after the block.
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]*\S) -->")
# Adds words to the one command of the next block, to shorten it; the page mentions it too.
_CHECKED_WITH = re.compile(r"<!-- checked with: (?P<words>[^>]*\S) -->")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block of a documentation page.

    Attributes:
        page: Path of the page from the root of the repository.
        line: Line number of the fence, from 1.
        language: Language after the fence; "" for none.
        title: Name of the file to which the block is written; None: the block is run instead.
        text: Content of the block.
        reason: Why the tests skip the block; None: the tests run the block.
        number: Number of the block among the page's blocks of the same language, from 1.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str
    reason: str | None
    number: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def prelude(self) -> str:
        """Returns the setup code of this block, which defines names for the block; "" without setup code."""
        path = PRELUDES / f"{self.page.replace('/', '-').removesuffix('.md')}-{self.number}.py"
        return path.read_text() if self.language == "python" and path.exists() else ""


def blocks(page: Path) -> list[Block]:
    """Returns all fenced code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        after = text[match.end() :].lstrip("\n").partition("\n")[0]
        # A comment between two blocks belongs to the adjacent block.
        touches = text[match.end() : match.end() + 2] != "\n\n"
        smaller = _CHECKED_WITH.fullmatch(before)
        reason = _NOT_RUN.fullmatch(before) or (_NOT_RUN.fullmatch(after) if touches else None)
        language, _, rest = match["info"].strip().partition(" ")
        title = _TITLE.search(rest)
        found.append(
            Block(
                page=page.relative_to(ROOT).as_posix(),
                line=text.count("\n", 0, match.start()) + 1,
                language=language,
                title=title[1] if title else None,
                text=match["text"].rstrip("\n") + f" {smaller['words']}\n" if smaller else match["text"],
                reason=reason["reason"] if reason else None,
                number=1 + sum(block.language == language for block in found),
            )
        )
    return found


def commands(text: str) -> Iterator[list[str] | str]:
    """Yields the commands of a bash block.

    A simple call of mpo-ext or python becomes a list of words. Any other line, such as a pipe, stays a string.
    """
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = shlex.split(line, comments=True)
        is_plain = words[0] in ("mpo-ext", "python") and not set(words) & {"|", ">", "<", "&&", "||", ";", "&"}
        yield words if is_plain else line


class Server:
    """Runs code blocks in separate processes."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(ROOT),
        }
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def run(self, block: Block, folder: Path) -> str:
        """Writes or runs a code block of a page, and returns its output.

        A block with a title is written to the file ``folder / block.title``. Its output is "". Any other block runs
        with ``folder`` as the working directory.

        Raises:
            AssertionError: If the block fails. The message ends with the block's output.
        """
        if block.title is not None:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "python":
            return self._ask(block, folder, ["-c", block.prelude + block.text])
        said = ""
        for command in commands(block.text):
            if isinstance(command, str):
                done = subprocess.run(
                    ["bash", "-ec", command], cwd=folder, env=self.environment,
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{block}: {command}\n{done.stdout}\n{done.stderr}"
                said += done.stdout + done.stderr
            else:
                said += self._ask(block, folder, command)
        return said

    def _ask(self, block: Block, folder: Path, words: list[str]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        output = folder / ".printed"
        self.process.stdin.write(json.dumps([words, str(folder), str(output)]) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        said = output.read_text(encoding="utf-8", errors="replace")
        assert code == "0", f"{block} ended with {code!r}: {' '.join(words[:3])[:200]}\n{said[-3000:]}"
        return said

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
