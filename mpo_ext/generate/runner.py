"""Runs a pipeline over a file of items (questions), and writes the output files.

The engine gets the items in groups. A killed run loses at most the samples of unfinished groups.

Each process of a run stores its samples in a file, its journal (``mpo_ext.generate.sampler``). One process completes
the last journal. This process then reads all journals, and writes the output files in the order of the input. No
random numbers are drawn in this step, so the output files depend only on the journals.
"""

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from mpo_ext.checks import check_integer
from mpo_ext.files import check_outputs
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.items import Item, ItemFile, ItemSource, is_meta, item_files, open_items, read_items
from mpo_ext.generate.outputs import ItemResult, PairOutputs, Summary
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.generate.sampler import (
    IncompleteRunError,
    Pipeline,
    check_world_size,
    holds_run,
    keep_date,
    open_journal,
    read_samples,
    sample_items,
)

_CHECKED_ITEMS = 100


class PairPipeline(Pipeline, Protocol):
    """The interface of a pipeline: ``steps`` draws samples, and ``make_pairs`` makes pairs from the samples.

    Attributes:
        needs_truths: Whether the items must have a true answer.
    """

    needs_truths: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output files, without ".jsonl"."""

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Makes the output lines of an item from its samples, without drawing random numbers.

        ``records`` are the stored samples as JSON objects. ``model`` is the model's name, which is written into the
        pairs.
        """


def run(
    pipeline: PairPipeline,
    engine: Engine,
    source: str | Path,
    out: str | Path,
    *,
    block_size: int = 64,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    fsync_s: float = 5.0,
    stream: TextIO | None = None,
    **place: Any,
) -> Summary | None:
    """Samples the responses that are not yet in the output folder, and writes the output files.

    If several processes sample, the last process to finish writes the output files.

    Args:
        pipeline: The pipeline, such as ``DropoutNTP`` or ``Correctness``.
        engine: Engine that answers the requests.
        source: File of items, or an MMPR meta file (.json) that lists such files; see ``item_files``.
        out: Folder of the run.
        block_size: Maximum number of samples in a group. The samples of a group are drawn and stored together. All
            samples of an item are in the same group, even if they exceed this number. A killed run loses its
            unfinished groups.
        limit: Maximum number of items, taken from the beginning; None: all items. A later run may take more.
        rank: Rank of this process. The process takes the items at the positions ``rank``, ``rank + world_size``, and
            so on.
        world_size: Number of processes, which need not run at the same time.
        fsync_s: Seconds between two syncs of the stored samples to disk.
        stream: Output of the progress display, for example ``sys.stderr``; None disables the display.
        **place: Arguments ``image_root``, ``root_map`` and ``system`` of ``item_files``.

    Returns:
        The summary of the run, as in ``summary.json``. None if other processes have not finished yet.

    Raises:
        SettingsMismatchError: If the folder holds a run with other settings or another input.
        LockedError: If another process already handles the items of this rank.
        FileExistsError: If ``out`` holds a file with the name of an output file, but no run.
        ValueError: If an argument is invalid, or the stored samples belong to other items.
    """
    check_integer("block_size", block_size, least=1)
    if limit is not None:
        check_integer("limit", limit, least=1)
    out = Path(out)
    check_output_files(pipeline, source, item_files(source, **place), out)
    items = open_items(source, limit=limit, **place)
    ranks = {"rank": rank, "world_size": world_size}
    keep_date(engine, [out])
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(open_journal(pipeline, engine.settings(), items, out, fsync_s=fsync_s, **ranks))
        # A single process sees every record, so it writes the outputs while it samples.
        outputs = stack.enter_context(PairOutputs(pipeline.outputs, out)) if world_size == 1 else None
        total = len(range(rank, items.count, world_size))
        progress = stack.enter_context(SamplingProgress(pipeline.name, total, stream))
        summary = Summary()
        for item, records in sample_items(pipeline, engine, items, journal, block_size=block_size, **ranks):
            result = pipeline.make_pairs(item, records, engine.name)
            summary.add(result, len(records))
            progress.advance(summary.counts())
            if outputs is not None:
                outputs.add(item, result, len(records))
        if outputs is None:
            return write_outputs(pipeline, items, out, world_size=world_size, model=engine.name)
    return outputs.summary


def check_output_files(pipeline: PairPipeline, source: str | Path, files: Sequence[ItemFile], out: Path) -> None:
    """Raises an error if an output file would replace an input, or an existing file that no run has written."""
    outputs = [out / f"{name}.jsonl" for name in pipeline.outputs] + [out / "summary.json"]
    inputs = [source, *(item_file.path for item_file in files)]
    check_outputs("out", outputs, inputs=inputs, is_ours=holds_run(out))


def write_outputs(
    pipeline: PairPipeline, source: ItemSource, out: Path, *, world_size: int = 1, model: str = ""
) -> Summary | None:
    """Writes the output files ``<name>.jsonl`` and ``summary.json`` from the stored samples of a complete run.

    Args:
        pipeline: The pipeline.
        source: The items.
        out: Folder of the run.
        world_size: Number of processes that have sampled. Each has stored its samples in one file.
        model: Name of the model that is written into the pairs.

    Returns:
        The summary of the run. None if a sample is missing; then no file is written.
    """
    with contextlib.suppress(IncompleteRunError):
        samples = read_samples(pipeline, source, out, world_size=world_size)
        with PairOutputs(pipeline.outputs, out) as outputs:
            for item, records in samples:
                outputs.add(item, pipeline.make_pairs(item, records, model), len(records))
        return outputs.summary
    return None


def check_run(
    pipeline: PairPipeline, source: str | Path, out: str | Path, *, world_size: int = 1, **place: Any
) -> None:
    """Checks the arguments of ``run`` before a model is loaded.

    Reads the first 100 items of the source. At least one of them must be usable. If the pipeline needs true answers,
    at least one must have a true answer.

    Raises:
        OSError: If a file is missing or the folder is not writable.
        ValueError: If none of these items is usable, or if an argument is invalid.
    """
    if not Path(source).exists():
        raise FileNotFoundError(f"source must exist, got {source}")
    files = item_files(source, **place)
    for item_file in files:
        if not os.path.isfile(item_file.path):
            raise FileNotFoundError(f"source must be a file of items, got {item_file.path}: this file does not exist")
    check_output_files(pipeline, source, files, Path(out))
    first = list(itertools.islice(read_items(files), _CHECKED_ITEMS))
    if not first:
        content = "a meta file that lists no items" if is_meta(source) else "an empty file"
        raise ValueError(f"source must hold items, got {content}: {source}")
    if all(item.problem for item in first):
        detail = f" ({first[0].detail})" if first[0].detail else ""
        raise ValueError(
            f"source must hold items (question, image, and chosen or answer_gt), one JSON object a line, got none "
            f"among the first {len(first)} of {source}: {first[0].problem}{detail}"
        )
    if pipeline.needs_truths and not any(item.truths for item in first):
        raise ValueError(
            f"items must have a true answer (answer_gt), got none among the first {len(first)} of {source}"
        )
    folder = Path(os.path.abspath(out))
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got {out}: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"out must be a writable folder, got {out}")
    check_world_size(Path(out), world_size)
