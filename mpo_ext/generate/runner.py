"""Runs a pipeline over a file of items, so that a kill at any moment costs at most the block being generated.

A run has a folder. Each of its processes takes every n-th item and writes what it samples into a journal of its own
(``mpo_ext.journal``). Whoever finds all journals complete turns them into the outputs, item by item in the
order of the input; that step draws nothing, so the outputs depend on the journals alone. Memory does not grow with the
number of items.

Items go through the engine in blocks whose bounds depend on the input and the block size only. A block that a kill
left half written is generated again as a whole, with the same arithmetic, and only what is missing is appended.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from mpo_ext.checks import check_integer
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.items import Item, item_files, scan, take
from mpo_ext.generate.outputs import ItemResult, PairOutputs, Summary
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.journal import Journal, read_header, read_records

_CHECKED_ITEMS = 100


class Pipeline(Protocol):
    """A way to make pairs. ``sample`` asks the engine, ``make_pairs`` draws nothing and asks nobody."""

    name: str

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, each a file of lines."""

    def settings(self) -> dict[str, Any]:
        """What the records and the outputs depend on, as JSON can hold it."""

    def keys(self, item: Item) -> list[str]:
        """Names of the records of an item, in their order."""

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """For each item its records, one for each of its keys."""

    def make_pairs(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> ItemResult:
        """Turns the records of an item into pairs."""


def run(
    pipeline: Pipeline,
    engine: Engine,
    source: str | Path,
    out: str | Path,
    *,
    block_size: int = 64,
    limit: int | None = None,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    rank: int = 0,
    world_size: int = 1,
    fsync_s: float = 5.0,
    stream: TextIO | None = None,
) -> Summary | None:
    """Samples what is still missing, and writes the outputs when nothing is missing any more.

    Args:
        pipeline: ``DropoutNTP`` or ``Correctness``.
        engine: Answers the requests.
        source: JSONL file of items, or a meta file (.json) of such files, as MMPR's prompts are published.
        out: Folder of the run.
        block_size: Samples that are asked for at a time, and the most that a kill can cost.
        limit: Takes the first items only; a later run may take more.
        image_root: Folder that relative image paths start from; a meta file has its own.
        root_map: Pairs of prefixes (old, new): where the folders in a meta file have moved to.
        rank: Number of this process; it takes the items whose number leaves this remainder.
        world_size: Number of processes. They need not run at the same time.
        fsync_s: Seconds between two syncs of the journal to disk.
        stream: Where progress is shown, as ``sys.stderr``; None shows none.

    Returns:
        What the run came to; None where other processes are not done yet.

    Raises:
        SettingsMismatchError: If the folder holds a run with other settings or another input.
        LockedError: If another process is at work on this one's share.
        ValueError: If an argument is out of its range, or the journal does not fit the input.
    """
    check_integer("block_size", block_size, least=1)
    check_integer("world_size", world_size, least=1)
    check_integer("rank", rank, least=0)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size ({world_size}), got {rank}")
    if limit is not None:
        check_integer("limit", limit, least=1)
    out = Path(out)
    files = item_files(source, image_root=image_root, root_map=root_map)
    digest, total = scan(files)
    total = total if limit is None else min(total, limit)
    settings = run_settings(pipeline, engine.settings(), digest, world_size)
    _check_world_size(out, world_size)
    items = functools.partial(take, files, limit)
    mine = range(rank, total, world_size)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(journal_path(out, rank, world_size), settings, fsync_s=fsync_s))
        # One process meets every record on its way, so it writes the outputs as it goes.
        outputs = stack.enter_context(PairOutputs(pipeline.outputs, out)) if world_size == 1 else None
        progress = stack.enter_context(SamplingProgress(pipeline.name, len(mine), stream))
        own_items = itertools.islice(items(), rank, None, world_size)
        per_block = max(1, block_size // max(1, len(pipeline.keys(Item()))))
        done = journal.records()
        for block in blocks(own_items, per_block):
            records = _sample_block(pipeline, engine, block, done, journal)
            for item, own in zip(block, records, strict=True):
                outcome = pipeline.make_pairs(item, own, engine.name)
                progress.add(outcome, len(own))
                if outputs is not None:
                    outputs.add(item, outcome, len(own))
        if outputs is None:
            return write_outputs(pipeline, items(), out, world_size=world_size, model=engine.name)
    return outputs.summary


def check_run(
    pipeline: Pipeline,
    source: str | Path,
    out: str | Path,
    *,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    world_size: int = 1,
) -> None:
    """Raises for what ``run`` would stumble over, without a model.

    Args:
        pipeline: As in ``run``.
        source: As in ``run``. One of its first lines must hold an item that can be used.
        out: As in ``run``.
        image_root: As in ``run``.
        root_map: As in ``run``.
        world_size: As in ``run``.

    Raises:
        OSError: If a file is missing or the folder cannot be written.
        ValueError: If no line holds an item, or an argument does not fit.
    """
    if not Path(source).exists():
        raise FileNotFoundError(f"source must exist, got {source}")
    files = item_files(source, image_root=image_root, root_map=root_map)
    for each in files:
        if not os.path.isfile(each.path):
            raise FileNotFoundError(f"source must be a file of items, got {each.path}: there is no such file")
    first = list(take(files, _CHECKED_ITEMS))
    if not first:
        raise ValueError(f"source must hold items, got an empty file: {source}")
    if all(item.problem for item in first):
        raise ValueError(
            f"source must hold items (question, image, and chosen or answer_gt), one JSON object a line, got none "
            f"among the first {len(first)} of {source}: {first[0].problem}"
        )
    if pipeline.name == "correctness" and not any(item.truths for item in first):
        raise ValueError(
            f"items must have a true answer (answer_gt), got none among the first {len(first)} of {source}"
        )
    place = Path(os.path.abspath(out))
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"out must be a folder, got {out}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"out must be a folder that can be written, got {out}")
    _check_world_size(Path(out), world_size)


def journal_path(out: Path, rank: int, world_size: int) -> Path:
    """Where a process keeps its journal."""
    return out / f"journal-{rank:05d}-of-{world_size:05d}.jsonl"


def write_outputs(
    pipeline: Pipeline, items: Iterable[Item], out: Path, *, world_size: int = 1, model: str = ""
) -> Summary | None:
    """Turns complete journals into the outputs: ``<name>.jsonl`` each, and ``summary.json``.

    Args:
        pipeline: As the journals were written with.
        items: All items of the input.
        out: Folder of the run.
        world_size: Number of journals.
        model: Name of the model, for the provenance.

    Returns:
        What the run came to; None where a record is missing, and then nothing is written.
    """
    paths = [journal_path(out, rank, world_size) for rank in range(world_size)]
    if not all(path.exists() and read_header(path) is not None for path in paths):
        return None
    journals = [read_records(path) for path in paths]
    with contextlib.suppress(IncompleteRunError), PairOutputs(pipeline.outputs, out) as outputs:
        for number, item in enumerate(items):
            keys, path = pipeline.keys(item), paths[number % world_size]
            records = list(_stored(journals[number % world_size], keys, path))
            if len(records) < len(keys):
                raise IncompleteRunError
            outputs.add(item, pipeline.make_pairs(item, records, model), len(records))
        return outputs.summary
    return None


class IncompleteRunError(Exception):
    """A journal does not hold all records yet."""


def _sample_block(
    pipeline: Pipeline, engine: Engine, block: Sequence[Item], done: Iterator[dict[str, Any]], journal: Journal
) -> list[list[dict[str, Any]]]:
    """The records of a block: from the journal where it has all of them, else sampled, and what it lacks appended."""
    keys = [pipeline.keys(item) for item in block]
    stored = list(_stored(done, itertools.chain.from_iterable(keys), journal.path))
    count = sum(map(len, keys))
    if len(stored) < count:
        sampled = list(itertools.chain.from_iterable(pipeline.sample(block, engine)))
        if [record["key"] for record in sampled] != list(itertools.chain.from_iterable(keys)):
            raise RuntimeError(f"{pipeline.name}.sample must give one record for each key, in order")
        journal.append(sampled[len(stored) :])
        stored += sampled[len(stored) :]
    rows = iter(stored)
    return [list(itertools.islice(rows, len(own))) for own in keys]


def _stored(records: Iterator[dict[str, Any]], keys: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    """Takes the next records of a journal, as many as there are keys or records left; they must be the ones named."""
    for key in keys:
        record = next(records, None)
        if record is None:
            return
        if record.get("key") != key:
            raise ValueError(
                f"{path} must hold the records of this input in its order, got {record.get('key')!r}"
                f" where {key!r} belongs"
            )
        yield record


def run_settings(pipeline: Pipeline, engine: Mapping[str, Any], digest: str, world_size: int) -> dict[str, Any]:
    """All that the journals of a run depend on."""
    return {
        "pipeline": {"name": pipeline.name, **pipeline.settings()},
        "engine": dict(engine),
        "input": {"blake2b": digest},
        "processes": world_size,
    }


def blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in the blocks that go through the engine together."""
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def _check_world_size(out: Path, world_size: int) -> None:
    for path in sorted(out.glob("journal-*-of-*.jsonl")):
        begun = int(path.stem.rpartition("-")[2])
        if begun != world_size:
            raise ValueError(f"processes must be the {begun} that {out} was begun with, got {world_size}")
