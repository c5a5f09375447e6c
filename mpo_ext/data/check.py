"""Finds what is wrong with preference pairs before a training finds it."""

import collections
import dataclasses
import os
import warnings
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mpo_ext.checks import install_hint
from mpo_ext.data.hf import PLACEHOLDER
from mpo_ext.data.jsonl import BadLine, Location
from mpo_ext.data.records import Pair, find_url
from mpo_ext.data.sources import Source
from mpo_ext.data.stats import SubsetStats, count_words
from mpo_ext.files import write_json

ImageCheck = Literal["verify", "decode", "exists", "skip"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong.

    Attributes:
        kind: One of few words, such as "missing image".
        where: File and line.
        message: What exactly.
    """

    kind: str
    where: Location
    message: str


@dataclasses.dataclass(slots=True)
class Report:
    """What a check found.

    Attributes:
        counts: Number of findings by subset and kind, all of them.
        examples: The first findings of each kind.
        stats: Lengths and shares by subset.
    """

    counts: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[Finding]] = dataclasses.field(default_factory=dict)
    stats: dict[str, SubsetStats] = dataclasses.field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not any(counts.total() for counts in self.counts.values())

    def totals(self) -> collections.Counter[str]:
        """Number of findings by kind."""
        return sum(self.counts.values(), collections.Counter())

    def add(self, finding: Finding, keep: int) -> None:
        """Counts a finding, and keeps it if it is among the first of its kind."""
        self.counts.setdefault(finding.where.subset, collections.Counter())[finding.kind] += 1
        examples = self.examples.setdefault(finding.kind, [])
        if len(examples) < keep:
            examples.append(finding)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        examples = [
            {"kind": one.kind, "subset": one.where.subset, "file": one.where.file, "line": one.where.line}
            | {"message": one.message}
            for findings in self.examples.values()
            for one in findings
        ]
        return {
            "clean": self.is_clean,
            "findings": {subset: dict(counts) for subset, counts in self.counts.items()},
            "examples": examples,
            "subsets": {subset: stats.to_dict() for subset, stats in self.stats.items()},
        }


def check_pairs(
    source: Source,
    *,
    images: ImageCheck = "verify",
    keep: int = 5,
    length: Callable[[str], int] = count_words,
    on_line: Callable[[], None] = lambda: None,
) -> Report:
    """Reads all pairs once and says what is wrong with them.

    Args:
        source: The pairs.
        images: "verify" opens each image file once and lets PIL verify it, "decode" decodes it whole, "exists" only
            looks whether it is there, "skip" doesn't look.
        keep: Number of examples to keep of each kind.
        length: Measures a text for the statistics.
        on_line: Called after each line.

    Raises:
        ValueError: If ``images`` is something else, or ``keep`` negative.
        ImportError: If PIL is needed and missing.
    """
    if images not in get_args(ImageCheck):
        raise ValueError(f"images must be one of {', '.join(get_args(ImageCheck))}, got {images!r}")
    if keep < 0:
        raise ValueError(f"keep must not be negative, got {keep}")
    report = Report(stats={name: SubsetStats() for name in source.subsets})
    look = _ImageLooker(images)
    seen = _Seen()
    for where, pair in source.scan():
        stats = report.stats.setdefault(where.subset, SubsetStats())
        if isinstance(pair, BadLine):
            stats.skipped += 1
            report.add(Finding(pair.kind, where, pair.reason), keep)
        else:
            stats.add(pair, length)
            seen.add(pair, where)
            for kind, message in _defects(pair, look):
                report.add(Finding(kind, where, message), keep)
        on_line()
    for where, first in seen.duplicates():
        report.add(Finding("duplicate", where, f"the same images, question and responses as {first}"), keep)
    for name, subset in source.subsets.items():
        lines = report.stats[name].pairs + report.stats[name].skipped
        if subset.length is not None and subset.length != lines:
            message = f"length must be the number of lines, {lines:,}, got {subset.length:,}"
            report.add(Finding("wrong length", Location(name, source.path, 1), message), keep)
    return report


def _defects(pair: Pair, look: "_ImageLooker") -> Iterator[tuple[str, str]]:
    for name in ("question", "chosen", "rejected"):
        if not getattr(pair, name).strip():
            yield f"empty {name}", f"{name} must hold text, got {getattr(pair, name)!r}"
    if pair.chosen == pair.rejected and pair.chosen.strip():
        yield "equal responses", f"chosen and rejected must differ, got {pair.chosen[:60]!r} twice"
    placeholders, images = pair.question.count(PLACEHOLDER), len(pair.images)
    if placeholders != images and (images, placeholders) != (1, 0):
        allowed = "0 or 1" if images == 1 else str(images)
        yield (
            "placeholders",
            f"question must hold {PLACEHOLDER} {allowed} times for {images} images, got {placeholders}",
        )
    if "answer_gt" in pair.source and pair.source["answer_gt"] is not None:
        yield "answer_gt", f"answer_gt must be a text, got {pair.source['answer_gt']!r:.60}"
    for image in pair.images:
        problem = look(image)
        if problem is not None:
            yield problem


class _ImageLooker:
    """Looks at each image file once, however many pairs name it."""

    def __init__(self, how: ImageCheck) -> None:
        self._how = how
        self._known: dict[int, tuple[str, str] | None] = {}
        if how in ("verify", "decode"):
            try:
                import PIL.Image  # noqa: F401
            except ImportError as error:
                raise ImportError(f"PIL is missing: {install_hint('data')}") from error

    def __call__(self, path: str) -> tuple[str, str] | None:
        if self._how == "skip":
            return None
        key = hash(path)
        if key not in self._known:
            self._known[key] = self._look(path)
        return self._known[key]

    def _look(self, path: str) -> tuple[str, str] | None:
        if not os.path.isfile(path):
            url = find_url(path)
            if url is not None:
                return "image is a URL", f"URLs are not fetched: download the image and name its file, got {url}"
            return "missing image", f"an image must be a file, got {path}"
        if self._how == "exists":
            return None
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a large image is not a broken one
                with Image.open(path) as image:
                    if self._how == "decode":
                        image.load()
                    else:
                        image.verify()
        except Exception as error:  # PIL's plugins raise almost anything
            reason = str(error).splitlines()[0][:120] if str(error) else ""
            return "broken image", f"an image must open, got {path}: {type(error).__name__} {reason}".rstrip()
        return None


class _Seen:
    """Finds equal pairs at the end, by 64 bits of their hashes: 24 bytes per pair."""

    def __init__(self) -> None:
        self._keys, self._lines, self._files = array("Q"), array("Q"), array("L")
        self._places: dict[tuple[str, str], int] = {}

    def add(self, pair: Pair, where: Location) -> None:
        self._keys.append(int(pair.key()[:16], 16))
        self._lines.append(where.line)
        self._files.append(self._places.setdefault((where.subset, where.file), len(self._places)))

    def duplicates(self) -> Iterator[tuple[Location, Location]]:
        """Yields each pair that was there before, and where, in the order of the source."""
        keys = np.array(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        starts = np.searchsorted(ordered, ordered[again])
        places = list(self._places)

        def locate(index: int) -> Location:
            subset, file = places[self._files[index]]
            return Location(subset, file, self._lines[index])

        for index, first in sorted(zip(order[again].tolist(), order[starts].tolist(), strict=True)):
            yield locate(index), locate(first)


def write_report(path: Path, report: Report) -> None:
    """Writes the report as JSON, atomically."""
    write_json(path, report.to_dict())
