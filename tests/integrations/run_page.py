"""Runs code blocks of docs/how-to/other-trainers.md with this Python, as a new user would.

    PYTHON tests/integrations/run_page.py SECTION...

Runs the section "A toy model" and then each given section, in an empty folder. This includes blocks that tests/docs
skips because they need another environment. Fails if a block fails, or if a section logs no terms of the loss.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "docs"))

import page  # noqa: E402

PAGE = ROOT / "docs" / "how-to" / "other-trainers.md"


def sections() -> dict[str, list[page.Block]]:
    """Returns a dict from each second-level heading of the page to the blocks of code under it."""
    starts = [
        (number, line.removeprefix("## "))
        for number, line in enumerate(PAGE.read_text().splitlines(), start=1)
        if line.startswith("## ")
    ]
    found: dict[str, list[page.Block]] = {title: [] for _, title in starts}
    for block in page.blocks(PAGE):
        title = next((title for number, title in reversed(starts) if number < block.line), None)
        if title is not None:
            found[title].append(block)
    return found


def run(block: page.Block, folder: Path) -> str:
    """Runs a block of code and returns its output.

    A block with a title is the content of a file. It is only written to this file, and the result is "".
    """
    if block.title is not None:
        path = folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        return ""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = {"python": [sys.executable, "-c"], "bash": ["bash", "-ec"]}[block.language]
    done = subprocess.run(
        [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode:
        sys.exit(f"{block} ended with {done.returncode}:\n{said[-4000:]}")
    return said


def main(*titles: str) -> None:
    known = sections()
    with tempfile.TemporaryDirectory() as folder:
        for title in ("A toy model", *titles):
            said = "".join(run(block, Path(folder)) for block in known[title])
            if title != "A toy model" and "'loss/dpo'" not in said:
                sys.exit(f"the log of {title} must have the terms of the loss, got:\n{said[-4000:]}")
            print(f"{title}: {len(known[title])} blocks run as they stand")


if __name__ == "__main__":
    main(*sys.argv[1:])
