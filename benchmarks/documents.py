"""Writes the generated blocks of README.md and docs/ from the result files in results/.

A block begins with the line ``<!-- results: NAME -->`` and ends with the line ``<!-- end of results -->``. Blocks
named "predicted..." show predictions of mpo_ext.plan instead of measurements. A test fails if a block is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    audit,
    hardware,
    integrations,
    machine_code,
    matrix,
    measure,
    model_tables,
    pipelines,
    predictions,
    schema,
    tables,
)
from benchmarks.gpu import tables as gpu_tables
from benchmarks.study import tables as study
from benchmarks.tables import Documents

_BLOCK = re.compile(r"^<!-- results: (\S+) -->\n(.*?)^<!-- end of results -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^\s*<!-- (?:results:|end of results)", re.MULTILINE)

#: Result files that a block needs and the function that returns its text, by name of the block.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[[Documents], str]]] = {
    "readme_logits": (("logits",), tables.readme_logits),
    "readme_step": (("train_step",), tables.readme_step),
    "logits": (("logits",), partial(tables.full_table, "logits")),
    "logits_sweeps": (("logits",), partial(tables.sweeps, "logits")),
    "linear": (("linear",), partial(tables.full_table, "linear")),
    "linear_sweeps": (("linear",), partial(tables.sweeps, "linear")),
    "train_step": (("train_step",), tables.steps),
    "train_step_attention": (("train_step",), tables.attention_steps),
    "sampling": (("sampling",), tables.sampling),
    "rates": (("cost_model",), model_tables.rates),
    "cost_model": (("cost_model",), model_tables.cost_model),
    "instructions": (("machine_code",), model_tables.instruction_counts),
    "registers": (("machine_code",), model_tables.registers),
    "predicted_paths": ((), predictions.paths),
    "predicted_steps": ((), predictions.step_times),
    "predicted_vocabularies": ((), predictions.vocabularies),
    "predicted_published": ((), predictions.published),
    "predicted_losses": ((), predictions.losses),
    "predicted_floors": ((), predictions.floors),
    "predicted_issue": (("machine_code",), predictions.issue),
    "predicted_gpus": ((), hardware.gpus),
    "data_sheets": ((), predictions.data_sheets),
    "audit": (("audit",), audit.table),
    "matrix": ((), matrix.table),
    "pipelines": (("pipelines",), pipelines.table),
    "gpu": ((), gpu_tables.measured),
    "integrations_runs": (("integrations",), integrations.runs),
    "integrations_tests": (("integrations",), integrations.tests),
    **study.BLOCKS,
}


def load(folder: Path) -> dict[str, Any]:
    """Reads and checks the result files that a folder has. Returns their contents by name, such as "logits"."""
    loaders = {
        **dict.fromkeys(schema.BENCHMARKS, schema.load),
        "machine_code": machine_code.load,
        "matrix": matrix.load,
        "audit": audit.load,
        "pipelines": pipelines.load,
    }
    loaders |= dict.fromkeys(("study", "study_prior"), study.load)
    loaders["integrations"] = integrations.load
    paths = {name: folder / f"{name}.json" for name in loaders}
    return {name: loaders[name](path) for name, path in paths.items() if path.exists()}


def pages(root: Path) -> list[Path]:
    """Returns the paths of the README files and of all pages in docs/."""
    return [*sorted(root.glob("README*.md")), *sorted((root / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the content of each generated block (text between two markers) in ``text``.

    Raises:
        ValueError: If a begin marker has no end marker, or an end marker has no begin marker.
    """
    matches = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(matches):
        raise ValueError(f"markers must come in pairs, got {len(_MARKER.findall(text))} for {len(matches)} blocks")
    yield from ((match[1], match[2]) for match in matches)


def render(name: str, documents: Documents) -> str:
    """Generates and returns the text between the two markers of the block ``name``.

    Raises:
        ValueError: If the name is unknown, or a result file is missing.
    """
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {name!r}")
    files, make = BLOCKS[name]
    for file in files:
        if file not in documents:
            raise ValueError(f"block {name!r} must have results/{file}.json, got {', '.join(documents) or 'no file'}")
    return f"\n{make(documents).strip()}\n\n"


def rewrite(text: str, documents: Documents, failed: list[str] | None = None) -> str:
    """Returns the text of a page with all its generated blocks (texts between two markers) updated.

    Args:
        text: Text of the page.
        documents: Contents of the result files by name.
        failed: List to which error messages are added. A block that cannot be generated then stays unchanged. If
            None, the error is raised instead.

    Raises:
        ValueError: If a marker lacks its partner, or a block cannot be generated and ``failed`` is None.
    """
    list(blocks(text))

    def make_block(match: re.Match[str]) -> str:
        try:
            content = render(match[1], documents)
        except ValueError as error:
            if failed is None:
                raise
            failed.append(str(error))
            content = match[2]
        return f"<!-- results: {match[1]} -->\n{content}<!-- end of results -->"

    return _BLOCK.sub(make_block, text)


def write_pages(documents: Documents, root: Path = Path()) -> int:
    """Updates the generated blocks (texts between two markers) of all pages in the folder ``root``.

    Returns 1 if a block could not be generated, else 0.
    """
    failed: list[str] = []
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        new = rewrite(text, documents, failed)
        if new != text:
            measure.write_text(path, new)
            print(path)
    for reason in failed:
        print(f"left as it was: {reason}", file=sys.stderr)
    return 1 if failed else 0
