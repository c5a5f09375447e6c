"""Validates preference pairs before training."""

import collections
import dataclasses
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.checks import check_choice, check_integer
from mpo_ext.data.media import place_problem
from mpo_ext.data.reader import BadLine, Location
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.data.stats import SubsetStats, count_words
from mpo_ext.images import (
    ImageError,
    check_image,
    describe_source,
    image_exists,
    is_remote,
    missing_image_advice,
)
from mpo_ext.videos import Video, VideoError, check_video, describe_video

ImageCheck = Literal["verify", "decode", "exists", "skip"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A defect in the data.

    Attributes:
        kind: Kind of the defect, such as "missing image".
        where: File and line of the pair.
        message: Description for the user.
    """

    kind: str
    where: Location
    message: str


@dataclasses.dataclass(slots=True)
class CheckReport:
    """The result of ``check_pairs``.

    Attributes:
        counts: For each data set (``Location.subset``), the number of defects of each kind.
        examples: For each kind of defect, the first defects that were found.
        stats: For each data set, the statistics of its pairs.
        is_sound: Bool array ``[n]`` in the order of ``PairSource.indices``: True for each line without a defect.
    """

    counts: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[Finding]] = dataclasses.field(default_factory=dict)
    stats: dict[str, SubsetStats] = dataclasses.field(default_factory=dict)
    is_sound: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, bool))

    @property
    def is_clean(self) -> bool:
        """True if the check found no defects."""
        return not any(counts.total() for counts in self.counts.values())

    def totals(self) -> collections.Counter[str]:
        """Returns the number of defects of each kind in all data sets together."""
        return sum(self.counts.values(), collections.Counter())

    def add(self, finding: Finding, keep: int) -> None:
        """Counts a defect. Stores it as an example, unless ``keep`` examples of the same kind are already stored."""
        self.counts.setdefault(finding.where.subset, collections.Counter())[finding.kind] += 1
        examples = self.examples.setdefault(finding.kind, [])
        if len(examples) < keep:
            examples.append(finding)

    def to_dict(self) -> dict[str, Any]:
        examples = [
            {"kind": finding.kind, **dataclasses.asdict(finding.where), "message": finding.message}
            for findings in self.examples.values()
            for finding in findings
        ]
        return {
            "clean": self.is_clean,
            "findings": {subset: dict(counts) for subset, counts in self.counts.items()},
            "examples": examples,
            "subsets": {subset: stats.to_dict() for subset, stats in self.stats.items()},
        }


def check_pairs(
    source: PairSource,
    *,
    images: ImageCheck = "verify",
    keep: int = 5,
    length: Callable[[str], int] = count_words,
    on_line: Callable[[], None] = lambda: None,
) -> CheckReport:
    """Checks every pair of a source, and returns a report of defects and statistics.

    Args:
        source: Pairs to check.
        images: How to check images and videos. Each check includes the checks before it.
            "skip": no check.
            "exists": the files must exist.
            "verify": PIL verifies each image. The first frame of each video file is decoded. If a video is a list of
            frame images, the frames are decoded.
            "decode": whole images are decoded. Of each video file, all frames that a model would get are decoded.
        keep: Maximum number of examples in the report for each kind of defect.
        length: Function that returns the length of a text, for the statistics.
        on_line: Function that is called after each line.

    Raises:
        ValueError: If an argument is invalid.
        ImportError: If PIL is missing and ``images`` requires it, or PyAV is missing and a video file requires it.
    """
    check_choice("images", images, get_args(ImageCheck))
    check_integer("keep", keep, least=0)
    report = CheckReport(stats={name: SubsetStats() for name in source.subsets})
    checker = _MediaChecker(images)
    duplicates = _Duplicates()
    is_pair, is_sound = (np.ones(len(source.indices), dtype=bool) for _ in range(2))
    for number, (where, pair) in enumerate(source.scan()):
        stats = report.stats.setdefault(where.subset, SubsetStats())
        if isinstance(pair, BadLine):
            stats.skipped += 1
            is_pair[number] = is_sound[number] = False
            report.add(Finding(pair.kind, where, pair.reason), keep)
        else:
            stats.add(pair, length)
            duplicates.add(pair, where)
            for kind, message in _defects(pair, checker):
                is_sound[number] = False
                report.add(Finding(kind, where, message), keep)
        on_line()
    numbers = np.flatnonzero(is_pair)
    for index, where, first in duplicates.find():
        is_sound[numbers[index]] = False
        report.add(Finding("duplicate", where, f"the same images, question and responses as {first}"), keep)
    report.is_sound = is_sound
    for name, subset in source.subsets.items():
        lines = report.stats[name].pairs + report.stats[name].skipped
        if subset.length is not None and subset.length != lines and source.selected is None:
            message = f"length must be the number of lines, {lines:,}, got {subset.length:,}"
            report.add(Finding("wrong length", Location(name, source.path, 1), message), keep)
    return report


def _defects(pair: Pair, checker: "_MediaChecker") -> Iterator[tuple[str, str]]:
    for name in ("question", "chosen", "rejected"):
        text = getattr(pair, name)
        if not text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip():
            yield f"empty {name}", f"{name} must hold text, got {text!r}"
    if pair.has_equal_responses and pair.chosen.strip():
        yield "equal responses", f"chosen and rejected must differ, got {pair.chosen[:60]!r} twice"
    if (problem := place_problem(pair)) is not None:
        yield "placeholders", problem
    if "answer_gt" in pair.source and pair.source["answer_gt"] is not None:
        yield "answer_gt", f"answer_gt must be text, got {pair.source['answer_gt']!r:.60}"
    sources: tuple[str | Video, ...] = (*pair.images, *pair.rejected_images, *pair.videos)
    for source in sources:
        yield from checker(source)


class _MediaChecker:
    """Checks images and videos. A call returns a list with (kind, message) for each defect of one image or video.

    Each image or video is checked only once, even if several pairs use it.
    """

    def __init__(self, mode: ImageCheck) -> None:
        self._mode = mode
        self._defects: dict[int, list[tuple[str, str]]] = {}

    def __call__(self, source: str | Video) -> list[tuple[str, str]]:
        if self._mode == "skip":
            return []
        key = hash(source)
        if key not in self._defects:
            self._defects[key] = self._check_video(source) if isinstance(source, Video) else self._check(source)
        return self._defects[key]

    def _check_video(self, video: Video) -> list[tuple[str, str]]:
        kind = "video" if video.path else "frame of a video"
        for path in video.paths:
            if is_remote(path):
                text = f"URLs are not fetched: download the {kind} and name its file, got {describe_source(path)}"
                return [(f"{kind} is a URL", text)]
            if not image_exists(path):
                return [(f"missing {kind}", f"a {kind} must be a file, got {describe_source(path)}")]
        if self._mode == "exists":
            return []
        try:
            return check_video(video, decode=self._mode == "decode")
        except VideoError as error:
            return [("broken video", str(error))]
        except ImageError as error:
            return [("broken video", f"{error}, a frame of the video {describe_video(video)}")]

    def _check(self, source: str) -> list[tuple[str, str]]:
        name = describe_source(source)
        if is_remote(source):
            return [("image is a URL", f"URLs are not fetched: download the image and name its file, got {name}")]
        if not image_exists(source):
            return [("missing image", f"an image must be a file, got {name}{missing_image_advice(source)}")]
        if self._mode == "exists":
            return []
        try:
            return check_image(source, decode=self._mode == "decode")
        except ImageError as error:
            return [("broken image", str(error))]


class _Duplicates:
    """Finds pairs that occur more than once. Stores 24 bytes per pair: a 64-bit hash and the location of the pair."""

    def __init__(self) -> None:
        self._keys, self._lines, self._files = array("Q"), array("Q"), array("L")
        self._places: dict[tuple[str, str], int] = {}

    def add(self, pair: Pair, where: Location) -> None:
        self._keys.append(int(pair.key()[:16], 16))
        self._lines.append(where.line)
        self._files.append(self._places.setdefault((where.subset, where.file), len(self._places)))

    def find(self) -> Iterator[tuple[int, Location, Location]]:
        """Yields (index, location, location of the first occurrence) for each pair that repeats an earlier pair.

        The index counts all added pairs from 0. The yielded indices ascend.
        """
        keys = np.array(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        starts = np.searchsorted(ordered, ordered[repeats])
        places = list(self._places)

        def locate(index: int) -> Location:
            subset, file = places[self._files[index]]
            return Location(subset, file, self._lines[index])

        for index, first in sorted(zip(order[repeats].tolist(), order[starts].tolist(), strict=True)):
            yield index, locate(index), locate(first)
