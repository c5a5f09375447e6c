"""Samples responses to items (questions), stores them and reads them back, for pipelines and the evaluation.

With N processes, process r handles the items r, r + N, r + 2N and so on. Each process has a file, its journal
(``mpo_ext.journal``). The process appends each sample to the journal as a record (a JSON object), in the order of the
input. Memory does not grow with the number of items.

The engine gets the items in groups, called blocks. The blocks depend only on the input and the block size. If a killed
run has stored a part of a block, the next run samples the whole block again, with the same results. The next run
appends only the missing records.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpo_ext.chat.encoder import with_date
from mpo_ext.checks import check_integer
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.feeding import Steps, run_blocks
from mpo_ext.generate.items import MEDIA_PROBLEMS, Item, ItemSource
from mpo_ext.images import ImageError, describe_source
from mpo_ext.journal import Journal, SettingsMismatchError, differences, read_header, read_records

_LATER_FIELDS = ("processor", "weights")  # journals of earlier versions lack these settings of the engine


class Pipeline(Protocol):
    """The interface of a pipeline that samples responses to items.

    Attributes:
        name: Name of the pipeline, which is stored with the samples.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the samples, as JSON values."""

    def keys(self, item: Item) -> list[str]:
        """Returns the keys that identify the samples of an item, in order."""

    def steps(self, items: Sequence[Item], engine: Engine) -> Steps:
        """Yields lists of requests for the items. The caller passes the generations of each list to ``send``.

        The generator returns a list of records for each item, with a record for each of the item's ``keys``. A record
        is the JSON object of a sample.
        """


class IncompleteRunError(Exception):
    """Raised if samples are missing, because another process of the run has not finished."""


def journal_path(out: Path, rank: int, world_size: int) -> Path:
    return out / f"journal-{rank:05d}-of-{world_size:05d}.jsonl"


def holds_run(folder: Path) -> bool:
    """Returns whether a folder holds files of a run.

    Such files are ``outputs.lock`` in the folder, and journals (files of samples) in the folder or its subfolders.
    """
    if (folder / "outputs.lock").is_file():
        return True
    for path in folder.rglob("journal-*-of-*.jsonl"):
        with contextlib.suppress(ValueError):
            read_header(path)
            return True
    return False


def check_world_size(out: Path, world_size: int) -> None:
    """Raises ValueError if the folder holds samples of a run with a different number of processes."""
    for path in sorted(out.glob("journal-*-of-*.jsonl")):
        begun = int(path.stem.rpartition("-")[2])
        if begun != world_size:
            raise ValueError(f"processes must be the {begun} that {out} was begun with, got {world_size}")


def stored_date(out: Path) -> str | None:
    """Returns the date in the prompts of a stored run in ISO format; None if no date is stored.

    The chat template has written this date. ``out`` is the folder of the run.
    """
    for path in sorted(out.glob("journal-*-of-*.jsonl")):
        engine = (read_header(path) or {}).get("engine", {})
        for settings in (engine, engine.get("judge", {})):
            if date := settings.get("processor", {}).get("date"):
                return date
    return None


def keep_date(engine: Engine, folders: Iterable[Path]) -> None:
    """Sets the date that an engine's chat template writes. A resumed run then has the same prompts.

    The date is the first stored date in ``folders``. Without a stored date, the engine is unchanged.
    """
    set_date(engine, next(filter(None, map(stored_date, folders)), None))


def set_date(engine: Engine, date: str | None) -> None:
    """Sets the date in an engine's chat template. ``date`` has ISO format; None leaves the engine unchanged."""
    chat = getattr(engine, "chat", None)
    if date is not None and chat is not None:
        engine.chat = with_date(chat, datetime.date.fromisoformat(date))  # type: ignore[attr-defined]


def open_journal(
    pipeline: Pipeline,
    engine_settings: Mapping[str, Any],
    source: ItemSource,
    out: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    fsync_s: float = 5.0,
) -> Journal:
    """Returns the journal to which a process appends its samples. Use the journal as a context manager.

    Args:
        pipeline: The pipeline that samples.
        engine_settings: Result of the engine's ``settings()``. An existing journal must have been created with equal
            settings. If an earlier version wrote a journal without "processor" or "weights", these are not compared.
        source: The items.
        out: Folder of the run.
        rank: Rank of the process.
        world_size: Number of processes.
        fsync_s: Seconds between two syncs of the journal to disk.

    Raises:
        SettingsMismatchError: If another process of the run has other settings.
        ValueError: If the rank is out of range, or the run was started with another number of processes.
    """
    check_integer("world_size", world_size, least=1)
    check_integer("rank", rank, least=0)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size ({world_size}), got {rank}")
    check_world_size(out, world_size)
    path = journal_path(out, rank, world_size)
    stored = read_header(path) if path.exists() else None
    if stored is not None:
        engine_settings = _without_later_fields(engine_settings, stored.get("engine", {}))
    settings = {
        "pipeline": {"name": pipeline.name, **pipeline.settings()},
        "engine": dict(engine_settings),
        "input": source.settings(),
        "processes": world_size,
    }
    others = (journal_path(out, other, world_size) for other in range(world_size) if other != rank)
    for other in filter(Path.exists, others):
        _check_same_settings(other, read_header(other), settings)
    return Journal(path, settings, fsync_s=fsync_s)


def _without_later_fields(settings: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an engine without the fields of ``_LATER_FIELDS`` that the settings ``other`` lack."""
    fields = {name: value for name, value in settings.items() if name in other or name not in _LATER_FIELDS}
    if isinstance(fields.get("judge"), Mapping) and isinstance(other.get("judge"), Mapping):
        fields["judge"] = _without_later_fields(fields["judge"], other["judge"])
    return fields


def _check_same_settings(path: Path, stored: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Raises SettingsMismatchError if the settings in the journal ``path`` differ from those of another process.

    If one of the two lacks "processor" or "weights", as in journals of an earlier version, these are not compared.
    ``stored`` is None if the header is not complete yet.
    """
    if stored is None:
        return
    first, second = (json.loads(json.dumps(side)) for side in (stored, settings))
    engines = first.get("engine", {}), second.get("engine", {})
    first["engine"], second["engine"] = _without_later_fields(*engines), _without_later_fields(*reversed(engines))
    if changes := list(differences(first, second)):
        raise SettingsMismatchError(path, changes)


def sample_items(
    pipeline: Pipeline,
    engine: Engine,
    source: ItemSource,
    journal: Journal,
    *,
    block_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Item, list[dict[str, Any]]]]:
    """Yields each item of this process with the list of its samples.

    A sample is a JSON object. Samples that are missing in ``journal`` are generated and appended to it.
    ``block_size``, ``rank`` and ``world_size`` have the same meaning as in ``runner.run``.

    Raises:
        ValueError: If the journal holds samples of other items.
    """
    items = itertools.islice(source.items(), rank, None, world_size)
    stored = stored_blocks(blocks(items, pipeline, block_size), pipeline, journal)
    # Blocks whose records are all stored come first, so that appending does not disturb the reading of the journal.
    to_do = ((block, block.steps(pipeline, engine)) for block in stored)
    for block, sampled in run_blocks(to_do, engine):
        if not block.is_complete:
            block.add(journal, list(itertools.chain.from_iterable(sampled)), pipeline.name)
        rows = iter(block.records)
        for item, item_keys in zip(block.items, block.keys, strict=True):
            yield item, list(itertools.islice(rows, len(item_keys)))


def read_samples(
    pipeline: Pipeline, source: ItemSource, out: Path, *, world_size: int = 1
) -> Iterator[tuple[Item, list[dict[str, Any]]]]:
    """Returns an iterator over (item, samples) for all items, in the order of the input.

    ``samples`` are the stored samples of the item, as JSON objects. The samples come from the journals. Each process
    of the run has a journal.

    Raises:
        IncompleteRunError: If a journal is missing (raised at once) or lacks a sample (raised during iteration).
        SettingsMismatchError: If the journals have different settings (raised at once).
        ValueError: If a journal holds samples of other items (raised during iteration).
    """
    paths = [journal_path(out, rank, world_size) for rank in range(world_size)]
    headers = [read_header(path) if path.exists() else None for path in paths]
    first = headers[0]
    if first is None or None in headers:
        raise IncompleteRunError
    for path, header in zip(paths, headers, strict=True):
        _check_same_settings(path, header, first)

    def samples() -> Iterator[tuple[Item, list[dict[str, Any]]]]:
        journals = [read_records(path) for path in paths]
        for index, item in enumerate(source.items()):
            keys = pipeline.keys(item)
            rank = index % world_size
            records = list(_stored_records(journals[rank], keys, paths[rank]))
            if len(records) < len(keys):
                raise IncompleteRunError
            yield item, records

    return samples()


def blocks(items: Iterable[Item], pipeline: Pipeline, block_size: int) -> Iterator[list[Item]]:
    """Splits items into lists that have at most ``block_size`` samples each.

    A list has at least one item, even if this item has more samples.
    """
    check_integer("block_size", block_size, least=1)
    size = max(1, block_size // max(1, len(pipeline.keys(Item()))))
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


@dataclasses.dataclass(slots=True)
class StoredBlock:
    """A group of items that are sampled together, with the samples that are already stored.

    Attributes:
        items: The items.
        keys: Keys that identify the samples of each item.
        records: The stored samples as JSON objects, in order. Missing samples are always the last ones.
    """

    items: list[Item]
    keys: list[list[str]]
    records: list[dict[str, Any]]

    @property
    def is_complete(self) -> bool:
        return len(self.records) == sum(map(len, self.keys))

    def steps(self, pipeline: Pipeline, engine: Engine) -> Steps:
        return _no_steps() if self.is_complete else pipeline.steps(self.items, engine)

    def add(self, journal: Journal, sampled: list[dict[str, Any]], pipeline: str) -> None:
        """Appends the missing samples to the journal and to ``records``.

        Args:
            journal: The file of stored samples.
            sampled: All samples of the items as JSON objects, beginning with the stored samples.
            pipeline: Name of the pipeline, for an error message.
        """
        check_records(sampled, list(itertools.chain.from_iterable(self.keys)), pipeline)
        missing = sampled[len(self.records) :]
        journal.append(missing)
        self.records += missing


def check_records(sampled: Sequence[Mapping[str, Any]], keys: Sequence[str], pipeline: str) -> None:
    """Raises RuntimeError unless the fields ``key`` of the samples are ``keys``, in the same order.

    ``pipeline`` is the name of the pipeline in the error message.
    """
    if [record["key"] for record in sampled] != list(keys):
        raise RuntimeError(f"{pipeline}.steps must give one record for each key, in order")


def _no_steps() -> Steps:
    yield from ()
    return []


def stored_blocks(item_blocks: Iterator[list[Item]], pipeline: Pipeline, journal: Journal) -> Iterator[StoredBlock]:
    """Yields a ``StoredBlock`` for each list of items, with the samples that the journal already holds.

    Issues a warning if the journal says that an image or video cannot be read, but it can be read now.
    """
    stored, is_warned = journal.records(), False
    for items in item_blocks:
        keys = [pipeline.keys(item) for item in items]
        records = list(_stored_records(stored, itertools.chain.from_iterable(keys), journal.path))
        rows = iter(records)
        for item, item_keys in zip(items, keys, strict=True):
            of_item = list(itertools.islice(rows, len(item_keys)))
            if not is_warned and _has_become_readable(item, of_item):
                is_warned = True
                sources = [*item.image_sources, *(path for video in item.video_sources for path in video.paths)]
                warnings.warn(
                    f"{', '.join(map(describe_source, sources))} could not be read when {journal.path} was written, "
                    "and can be read now: this item and others like it stay skipped. A run in another folder samples "
                    "them",
                    stacklevel=2,
                )
        yield StoredBlock(items, keys, records)


def _has_become_readable(item: Item, records: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether the stored samples of an item report unreadable media that can be read now."""
    problems = {record.get("problem", record.get("failure")) for record in records}
    if not problems & MEDIA_PROBLEMS:
        return False
    try:
        item.load_media()
    except (OSError, ImageError):
        return False
    return True


def _stored_records(records: Iterator[dict[str, Any]], keys: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    """Yields the stored samples ``records`` in order, and checks their keys.

    Raises ValueError if the n-th sample does not have the n-th of ``keys``. The message names the file ``path``. Stops
    after the last sample or the last key.
    """
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
