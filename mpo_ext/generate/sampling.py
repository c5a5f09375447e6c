"""Runs a pipeline over a file of items, so that a kill at any moment costs at most the block being generated.

A run has a folder. Each of its processes takes every n-th item and writes what it samples into a journal of its own
(``mpo_ext.journal``). Whoever finds all journals complete turns them into the outputs, item by item in the
order of the input; that step draws nothing, so the outputs depend on the journals alone. Memory does not grow with the
number of items.

Items go through the engine in blocks whose bounds depend on the input and the block size only. A block that a kill
left half written is generated again as a whole, with the same arithmetic, and only what is missing is appended.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from mpo_ext.chat import IMAGE_PLACEHOLDER, load_image
from mpo_ext.checks import check_integer, check_json
from mpo_ext.data.jsonl import FieldError
from mpo_ext.data.mmpr import read_meta, resolve_image
from mpo_ext.data.records import SOURCE, find_url
from mpo_ext.files import FileLock, replaced
from mpo_ext.generate.engine import Engine
from mpo_ext.journal import Journal, encode_line, read_header, read_records

WRONG_SAMPLE = "wrong sample"  # what ``chosen_source`` says of a chosen response that is known to be wrong
_REPORT_S = 30.0
_CHECKED_ITEMS = 100
_PERIODS = 400
_LEAST_REPEATS = 5
_LEAST_REPEATED_CHARS = 60
_GRAM = 6
_LEAST_GRAMS = 60
_UNIT = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\S")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question to make pairs from.

    Attributes:
        question: May hold ``<image>`` where an image belongs.
        images: As the input names them.
        chosen: A response to prefer, for DropoutNTP.
        truths: The true answers, any of which is right; most items have one.
        extra: What else the input says of it.
        image_root: Folder that relative image paths start from.
        subset: Name of its subset where it comes from a meta file; its pairs then have absolute images, and remember
            subset and root. Those of other items have images that start at the folder of the written file.
        problem: Why the item cannot be used.
    """

    question: str = ""
    images: tuple[str, ...] = ()
    chosen: str | None = None
    truths: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_root: str = ""
    subset: str | None = None
    problem: str | None = None

    @property
    def pair_images(self) -> tuple[str, ...]:
        """The images as the input names them, but absolute where a subset has a root."""
        if self.subset is None:
            return self.images
        return tuple(os.path.join(self.image_root, image) for image in self.images)

    @property
    def pair_extra(self) -> dict[str, Any]:
        """What the pairs of the item keep of it beside their own fields."""
        if self.subset is None:
            return dict(self.extra)
        return {**self.extra, SOURCE: {"subset": self.subset, "root": self.image_root}}

    @property
    def answer_gt(self) -> str | None:
        """The first of the true answers."""
        return self.truths[0] if self.truths else None

    @property
    def digest(self) -> str:
        """Names the item by its content, wherever it stands in the input."""
        content = (self.question, self.images, self.chosen, self.truths, self.problem)
        return hashlib.blake2b(repr(content).encode(errors="surrogatepass"), digest_size=8).hexdigest()

    def load_images(self) -> tuple[Any, ...]:
        """Opens the images.

        Raises:
            OSError: If one is missing or cannot be read.
        """
        return tuple(load_image(Path(self.image_root, image)) for image in self.images)

    @classmethod
    def from_dict(cls, values: Any, *, image_root: str = "", subset: str | None = None) -> "Item":
        """Reads an item; one that cannot be used says so in ``problem``.

        Args:
            values: ``question``; ``image`` or ``images``, a path or a list of them; ``chosen``; ``answer_gt`` or
                ``answer``. All else is kept as ``extra``.
            image_root: As in the class.
            subset: As in the class. Its images must stay below ``image_root``.
        """
        if not isinstance(values, Mapping):
            return cls(problem="unreadable line")
        try:
            check_json("item", dict(values))
        except (TypeError, ValueError):
            return cls(problem="unreadable line")
        rest = dict(values)
        source = rest.pop(SOURCE, None)
        question, chosen = rest.pop("question", None), rest.pop("chosen", None)
        images = rest.pop("images", None) or rest.pop("image", None) or ()
        images = (images,) if isinstance(images, str) else images
        answer = rest.pop("answer_gt", None)
        answer = rest.pop("answer", None) if answer is None else answer
        truths = answer if isinstance(answer, (list, tuple)) else () if answer is None else (answer,)
        rest.pop("rejected", None)
        for key in ("image", "images"):
            rest.pop(key, None)
        problem = None
        if subset is None:
            subset, image_root = _known_subset(source, images, image_root)
        if not isinstance(question, str) or not question.strip():
            problem = "no question"
        elif not isinstance(images, (list, tuple)) or not all(map(_is_path, images)):
            problem = "images are no paths"
        elif any(map(find_url, images)):
            problem = "images are URLs, which are not fetched: download them first"
        elif subset is not None and not all(_is_inside(image, image_root) for image in images):
            problem = "image outside the root of its subset"
        elif question.count(IMAGE_PLACEHOLDER) not in {0, len(images)}:
            problem = f"number of {IMAGE_PLACEHOLDER} is not that of the images"
        if problem is not None:
            return cls(question=str(question), problem=problem)
        return cls(
            question=str(question),
            images=tuple(images),
            chosen=chosen if isinstance(chosen, str) and chosen.strip() else None,
            truths=tuple(map(str, truths)),
            extra=rest,
            image_root=image_root,
            subset=subset,
        )

    def to_dict(self) -> dict[str, Any]:
        """The item as ``from_dict`` reads it."""
        values: dict[str, Any] = {"image": list(self.pair_images)} if self.images else {}
        values["question"] = self.question
        if self.chosen is not None:
            values["chosen"] = self.chosen
        if self.truths:
            values["answer_gt"] = self.truths[0] if len(self.truths) == 1 else list(self.truths)
        return {**values, **self.pair_extra}


@dataclasses.dataclass(slots=True)
class Outcome:
    """What the records of one item come to.

    Attributes:
        lines: Lines for the outputs: the name of the output, and the object.
        refused: Reasons, with how often each was met, for samples and for the item as a whole.
        is_refused: Whether the item as a whole is.
        notes: What to know of the lines, with how often.
        tokens: Generated tokens.
    """

    lines: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    is_refused: bool = False
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0

    def refuse(self, reason: str) -> "Outcome":
        """Refuses the item as a whole. Returns this."""
        self.refused[reason] += 1
        self.is_refused = True
        return self


class Pipeline(Protocol):
    """A way to make pairs. ``sample`` asks the engine, ``judge`` draws nothing and asks nobody."""

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

    def judge(self, item: Item, records: Sequence[Mapping[str, Any]], model: str) -> Outcome:
        """Turns the records of an item into pairs."""


@dataclasses.dataclass(slots=True)
class Summary:
    """What a run came to: the same numbers whether it was interrupted or not."""

    items: int = 0
    records: int = 0
    generated_tokens: int = 0
    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    chosen_chars: int = 0
    rejected_chars: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused_items: int = 0
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def refused_samples(self) -> int:
        """Samples that were refused by themselves, not with their item."""
        return self.refused.total() - self.refused_items

    @property
    def pairs(self) -> int:
        """Pairs of all kinds."""
        return sum(count for name, count in self.lines.items() if name != "unsolved")

    def add(self, outcome: Outcome, records: int) -> None:
        """Counts one more item."""
        self.items += 1
        self.records += records
        self.generated_tokens += outcome.tokens
        self.refused.update(outcome.refused)
        self.refused_items += outcome.is_refused
        self.notes.update(outcome.notes)
        for name, line in outcome.lines:
            self.lines[name] = self.lines.get(name, 0) + 1
            if name != "unsolved":
                self.chosen_chars += len(line["chosen"])
                self.rejected_chars += len(line["rejected"])

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON can hold them."""
        pairs = max(self.pairs, 1)
        return {
            "items": self.items,
            "records": self.records,
            "lines": dict(self.lines),
            "refused": dict(sorted(self.refused.items())),
            "refused_items": self.refused_items,
            "refused_samples": self.refused_samples,
            "notes": dict(sorted(self.notes.items())),
            "generated_tokens": self.generated_tokens,
            "generated_tokens_per_pair": round(self.generated_tokens / pairs, 2) if self.pairs else None,
            "chosen_chars_per_pair": round(self.chosen_chars / pairs, 2) if self.pairs else None,
            "rejected_chars_per_pair": round(self.rejected_chars / pairs, 2) if self.pairs else None,
        }

    def __str__(self) -> str:
        outputs = ", ".join(f"{count} {name}" for name, count in self.lines.items()) or "nothing"
        text = f"{self.items} items, {self.records} samples, {self.generated_tokens} generated tokens: {outputs}"
        if self.pairs:
            text += f"; {self.generated_tokens / self.pairs:.1f} generated tokens per pair"
        for note, count in self.notes.most_common():
            text += f"\n  {note}: {count}"
        if self.refused:
            text += f"\n  {self.refused_items} items without a pair, {self.refused_samples} samples refused:"
        for reason, count in self.refused.most_common():
            text += f"\n  refused {count:>7}  {reason}"
        return text


@dataclasses.dataclass(frozen=True, slots=True)
class ItemFile:
    """A file of items.

    Attributes:
        path: The file, one JSON object a line.
        image_root: Folder that relative image paths start from.
        subset: Its name in the meta file that names it; None where there is none.
    """

    path: str
    image_root: str = ""
    subset: str | None = None


def item_files(
    source: str | Path, *, image_root: str = "", root_map: Sequence[tuple[str, str]] = ()
) -> tuple[ItemFile, ...]:
    """The files of items that a source stands for: itself, or the annotations of a meta file (.json) as in MMPR.

    Args:
        source: A JSONL file, or a meta file.
        image_root: Folder that relative image paths start from; a meta file has its own.
        root_map: Pairs of prefixes (old, new): where the folders in a meta file have moved to.

    Raises:
        OSError: If the meta file cannot be read.
        ValueError: If it is none, or an argument does not belong to the kind of the source.
    """
    if Path(source).suffix != ".json":
        if root_map:
            raise ValueError(f"root_map must be left out unless source is a meta file (.json), got {root_map}")
        return (ItemFile(str(source), image_root),)
    if image_root:
        raise ValueError(
            f"image_root must be left out for a meta file, which has roots of its own, got {image_root!r}"
        )
    return tuple(ItemFile(one.annotation, one.root, one.name) for one in read_meta(source, root_map=root_map))


def read_items(files: Sequence[ItemFile]) -> Iterator[Item]:
    """Yields the items of files in their order; a line that cannot be read is an item with a ``problem``."""
    for each in files:
        with open(each.path, "rb") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError:
                    values = None
                yield Item.from_dict(values, image_root=each.image_root, subset=each.subset)


def is_degenerate(text: str) -> bool:
    """Says whether a response got caught in a loop.

    That is so where it ends with one passage over and over (at least 5 times, 60 characters in all), or where more
    than half of its runs of 6 words (or ideographs) are repetitions.
    """
    for period in range(1, min(_PERIODS, len(text) // _LEAST_REPEATS) + 1):
        needed = max(_LEAST_REPEATS * period, _LEAST_REPEATED_CHARS)
        if len(text) < needed or text[-1] != text[-1 - period] or text[-period:] != text[-2 * period : -period]:
            continue
        if text[-needed:-period] == text[-needed + period :] and not text[-period:].isspace():
            return True
    units = _UNIT.findall(text)
    grams = list(zip(*(units[start:] for start in range(_GRAM)), strict=False))
    return len(grams) >= _LEAST_GRAMS and len(set(grams)) * 2 < len(grams)


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
    world: int = 1,
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
        world: Number of processes. They need not run at the same time.
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
    check_integer("world", world, least=1)
    check_integer("rank", rank, least=0)
    if rank >= world:
        raise ValueError(f"rank must be below world ({world}), got {rank}")
    if limit is not None:
        check_integer("limit", limit, least=1)
    out = Path(out)
    files = item_files(source, image_root=image_root, root_map=root_map)
    digest, total = scan(files)
    total = total if limit is None else min(total, limit)
    settings = run_settings(pipeline, engine.settings(), digest, world)
    _refuse_other_world(out, world)
    items = functools.partial(take, files, limit)
    mine = range(rank, total, world)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(journal_path(out, rank, world), settings, fsync_s=fsync_s))
        # One process meets every record on its way, so it writes the outputs as it goes.
        outputs = stack.enter_context(_Outputs(pipeline, out)) if world == 1 else None
        progress = stack.enter_context(Progress(pipeline.name, len(mine), stream))
        own_items = itertools.islice(items(), rank, None, world)
        per_block = max(1, block_size // max(1, len(pipeline.keys(Item()))))
        done = journal.records()
        for block in blocks(own_items, per_block):
            records = _sample_block(pipeline, engine, block, done, journal)
            for item, own in zip(block, records, strict=True):
                outcome = pipeline.judge(item, own, engine.name)
                progress.add(outcome, len(own))
                if outputs is not None:
                    outputs.add(item, outcome, len(own))
        if outputs is None:
            return write_outputs(pipeline, items(), out, world=world, model=engine.name)
    return outputs.summary


def check_run(
    pipeline: Pipeline,
    source: str | Path,
    out: str | Path,
    *,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    world: int = 1,
) -> None:
    """Raises for what ``run`` would stumble over, without a model.

    Args:
        pipeline: As in ``run``.
        source: As in ``run``. One of its first lines must hold an item that can be used.
        out: As in ``run``.
        image_root: As in ``run``.
        root_map: As in ``run``.
        world: As in ``run``.

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
    _refuse_other_world(Path(out), world)


def journal_path(out: Path, rank: int, world: int) -> Path:
    """Where a process keeps its journal."""
    return out / f"journal-{rank:05d}-of-{world:05d}.jsonl"


def write_outputs(
    pipeline: Pipeline, items: Iterable[Item], out: Path, *, world: int = 1, model: str = ""
) -> Summary | None:
    """Turns complete journals into the outputs: ``<name>.jsonl`` each, and ``summary.json``.

    Args:
        pipeline: As the journals were written with.
        items: All items of the input.
        out: Folder of the run.
        world: Number of journals.
        model: Name of the model, for the provenance.

    Returns:
        What the run came to; None where a record is missing, and then nothing is written.
    """
    paths = [journal_path(out, rank, world) for rank in range(world)]
    if not all(path.exists() and read_header(path) is not None for path in paths):
        return None
    journals = [read_records(path) for path in paths]
    with contextlib.suppress(_IncompleteError), _Outputs(pipeline, out) as outputs:
        for number, item in enumerate(items):
            keys, path = pipeline.keys(item), paths[number % world]
            records = list(_stored(journals[number % world], keys, path))
            if len(records) < len(keys):
                raise _IncompleteError
            outputs.add(item, pipeline.judge(item, records, model), len(records))
        return outputs.summary
    return None


class _Outputs:
    """The outputs and the summary; they take their places when the block ends well, and else stay as they were.

    Journals and ``unsolved``, which is an input again, keep images as the input names them. In the files of pairs
    relative images start at the folder of the file, as every reader of pairs takes them.
    """

    def __init__(self, pipeline: Pipeline, out: Path) -> None:
        self.pipeline, self.out = pipeline, out
        self._folder = os.path.realpath(out)  # what ".." leads out of
        self.summary = Summary(lines=dict.fromkeys(pipeline.outputs, 0))
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Outputs":
        self._stack.enter_context(FileLock(self.out / "outputs.lock", str(self.out), wait=True))
        for name in self.pipeline.outputs:
            self._files[name] = self._stack.enter_context(replaced(self.out / f"{name}.jsonl"))
        self._report = self._stack.enter_context(replaced(self.out / "summary.json"))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._report.write(json.dumps(self.summary.to_dict(), indent=2, ensure_ascii=False).encode() + b"\n")
        self._stack.__exit__(kind, error, trace)

    def add(self, item: Item, outcome: Outcome, records: int) -> None:
        self.summary.add(outcome, records)
        for name, line in outcome.lines:
            if line.get("images"):
                line = {**line, "images": [self._from_folder(image, item.image_root) for image in line["images"]]}
            self._files[name].write(encode_line(line))

    def _from_folder(self, image: str, root: str) -> str:
        """The path of an image from the folder of the outputs; an absolute one stays as it is."""
        if os.path.isabs(image) or find_url(image):
            return image
        path = os.path.relpath(os.path.abspath(os.path.join(root, image)), self._folder)
        return path.replace(os.sep, "/")


class _IncompleteError(Exception):
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


def _is_path(image: object) -> bool:
    return isinstance(image, str) and image != "" and "\0" not in image


def _known_subset(source: object, images: object, image_root: str) -> tuple[str | None, str]:
    """The subset and root that a line written here remembers; it does so where its images are absolute."""
    subset, root = (source.get("subset"), source.get("root")) if isinstance(source, dict) else (None, None)
    if not isinstance(subset, str) or not isinstance(root, str) or not isinstance(images, (list, tuple)):
        return None, image_root
    if not all(_is_path(image) and os.path.isabs(image) and _is_inside(image, root) for image in images):
        return None, image_root
    return subset, root


def _is_inside(image: str, root: str) -> bool:
    try:
        resolve_image(image, root)
    except FieldError:
        return False
    return True


def run_settings(pipeline: Pipeline, engine: Mapping[str, Any], digest: str, world: int) -> dict[str, Any]:
    """All that the journals of a run depend on."""
    return {
        "pipeline": {"name": pipeline.name, **pipeline.settings()},
        "engine": dict(engine),
        "input": {"blake2b": digest},
        "processes": world,
    }


def take(files: Sequence[ItemFile], limit: int | None) -> Iterator[Item]:
    """The items of a run."""
    return itertools.islice(read_items(files), limit)


def blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in the blocks that go through the engine together."""
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def scan(files: Sequence[ItemFile]) -> tuple[str, int]:
    """Digest of files and their subsets, wherever they stand, and how many of their lines are not blank."""
    digest, lines = hashlib.blake2b(digest_size=16), 0
    for each in files:
        if each.subset is not None:
            digest.update(repr(each.subset).encode(errors="surrogatepass"))
        with open(each.path, "rb") as file:
            for line in file:
                digest.update(line)
                lines += bool(line.strip())
    return digest.hexdigest(), lines


def _refuse_other_world(out: Path, world: int) -> None:
    for path in sorted(out.glob("journal-*-of-*.jsonl")):
        begun = int(path.stem.rpartition("-")[2])
        if begun != world:
            raise ValueError(f"processes must be the {begun} that {out} was begun with, got {world}")


class Progress:
    """Shows how far a run is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, name: str, total: int, stream: TextIO | None) -> None:
        self.name, self.total, self.stream = name, total, stream
        self.summary = Summary()
        self._begin_s = self._shown_s = time.monotonic()
        self._update: Callable[[], None] = lambda: None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        if self.stream is None:
            return self
        self._update = self._line
        if self.stream.isatty():
            with contextlib.suppress(ImportError):
                self._update = self._bar()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def add(self, outcome: Outcome, records: int) -> None:
        self.summary.add(outcome, records)
        self._update()

    def _counts(self) -> str:
        items, samples = self.summary.refused_items, self.summary.refused_samples
        return f"{self.summary.pairs} pairs, {items} items without a pair, {samples} samples refused"

    def _bar(self) -> Callable[[], None]:
        from rich import console, progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]:.1f}/s"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[counts]}"),
        )
        bar = progress.Progress(*columns, console=console.Console(file=self.stream))
        task = self._exit.enter_context(bar).add_task(self.name, total=self.total, rate=0.0, counts="")

        def update() -> None:
            rate = self.summary.items / max(time.monotonic() - self._begin_s, 1e-9)
            bar.update(task, completed=self.summary.items, rate=rate, counts=self._counts())

        return update

    def _line(self) -> None:
        now = time.monotonic()
        is_last = self.summary.items == self.total
        if now - self._shown_s < _REPORT_S and not is_last:
            return
        self._shown_s = now
        rate = self.summary.items / max(now - self._begin_s, 1e-9)
        left = (self.total - self.summary.items) / rate
        print(
            f"{self.name}: {self.summary.items}/{self.total} items, {rate:.1f}/s, {left:.0f} s left, {self._counts()}",
            file=self.stream,
            flush=True,
        )
