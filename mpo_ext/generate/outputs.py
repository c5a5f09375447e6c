"""The result of a pipeline for each item, the summary of a run, and the writer of the output files."""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.files import FileLock, atomic_write
from mpo_ext.generate.items import Item
from mpo_ext.images import is_url
from mpo_ext.journal import encode_line
from mpo_ext.videos import Video

_REPEATED = "pairs of questions that occur more than once"  # note in the summary


@dataclasses.dataclass(slots=True)
class ItemResult:
    """The pairs that a pipeline has made from an item, and the reasons for skipped samples.

    Attributes:
        lines: Tuples (name, JSON object) of the output lines. The name is that of the output file, without ".jsonl".
        skipped: Dict from a reason to the number of samples and pairs that were skipped for this reason. If the item
            as a whole is skipped, its reason counts once, too.
        is_skipped: Whether the item as a whole is skipped.
        notes: Dict from a remark to the number of pairs or comparisons with this remark.
        tokens: Number of generated tokens.
        stage_tokens: Dict from a step of the pipeline, such as "responses" or "verdicts", to the number of tokens
            generated in this step; empty for a pipeline with one step.
        details: Dict from a reason in ``skipped`` to an example, such as the path of an unreadable image. Some reasons
            have no example.
    """

    lines: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    is_skipped: bool = False
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0
    stage_tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    details: dict[str, str] = dataclasses.field(default_factory=dict)

    def skip(self, reason: str) -> "ItemResult":
        """Marks the item as skipped, counts the reason in ``skipped``, and returns ``self``."""
        self.skipped[reason] += 1
        self.is_skipped = True
        return self

    def skip_problem(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Marks the item as skipped if a sample has a ``problem``. Returns whether a sample has a ``problem``.

        ``records`` are the samples as JSON objects.
        """
        record = next((record for record in records if "problem" in record), None)
        if record is None:
            return False
        if detail := problem_detail(record):
            self.details[record["problem"]] = detail
        self.skip(record["problem"])
        return True


def problem_detail(record: Mapping[str, Any]) -> str | None:
    """Returns the details of a sample's problem, such as the path of an image, or None without details."""
    return record.get("detail") or record.get("refusal")


@dataclasses.dataclass(slots=True)
class Summary:
    """The counts of a run. A run that was interrupted and resumed has the same counts as other runs.

    Attributes:
        items: Number of items.
        records: Number of samples.
        generated_tokens: Number of generated tokens in all samples.
        lines: Dict from the name of an output file, without ".jsonl", to its number of lines.
        chosen_chars: Number of characters in the chosen responses of all pairs.
        rejected_chars: Number of characters in the rejected responses of all pairs.
        skipped: Dict from a reason to the number of items, samples and pairs that were skipped for this reason.
        skipped_items: Number of items skipped as a whole.
        notes: Dict from a remark to the number of pairs or comparisons with this remark.
        stage_tokens: Dict from a step of the pipeline, such as "responses" or "verdicts", to the number of tokens
            generated in this step; empty for a pipeline with one step.
        examples: Dict from a reason in ``skipped`` to its first example. Some reasons have no example.
    """

    items: int = 0
    records: int = 0
    generated_tokens: int = 0
    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    chosen_chars: int = 0
    rejected_chars: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    skipped_items: int = 0
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    stage_tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def skipped_samples(self) -> int:
        """Number of skipped samples and pairs. Items that are skipped as a whole do not count."""
        return self.skipped.total() - self.skipped_items

    @property
    def pairs(self) -> int:
        """Number of pairs in all output files."""
        return sum(count for name, count in self.lines.items() if name != "unsolved")

    def add(self, result: ItemResult, records: int) -> None:
        """Adds the counts of an item; ``records`` is the number of its samples."""
        self.items += 1
        self.records += records
        self.generated_tokens += result.tokens
        self.skipped.update(result.skipped)
        self.skipped_items += result.is_skipped
        self.notes.update(result.notes)
        self.stage_tokens.update(result.stage_tokens)
        self.examples = {**result.details, **self.examples}
        for name, line in result.lines:
            self.lines[name] = self.lines.get(name, 0) + 1
            if name != "unsolved":
                self.chosen_chars += len(line["chosen"])
                self.rejected_chars += len(line["rejected"])

    def counts(self) -> str:
        """Returns a short text with the numbers of pairs and skips, for the progress display."""
        return f"{self.pairs} pairs, {self.skipped_items} items without a pair, {self.skipped_samples} samples skipped"

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON values, for ``summary.json``."""
        pairs = max(self.pairs, 1)
        return {
            "items": self.items,
            "records": self.records,
            "lines": dict(self.lines),
            "refused": dict(sorted(self.skipped.items())),
            "refused_items": self.skipped_items,
            "refused_samples": self.skipped_samples,
            **({"examples": dict(sorted(self.examples.items()))} if self.examples else {}),
            "notes": dict(sorted(self.notes.items())),
            "generated_tokens": self.generated_tokens,
            **({"generated_tokens_by_stage": dict(self.stage_tokens)} if self.stage_tokens else {}),
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
        if self.skipped:
            text += f"\n  {self.skipped_items} items without a pair, {self.skipped_samples} samples skipped:"
        for reason, count in self.skipped.most_common():
            text += f"\n  skipped {count:>7}  {self.describe(reason)}"
        return text

    def describe(self, reason: str) -> str:
        """Returns ``reason`` as text. If an example of this reason is stored, the text ends with the example."""
        return f"{reason}, for example: {self.examples[reason]}" if reason in self.examples else reason


class PairOutputs:
    """A context manager that writes the output files and ``summary.json`` of a run.

    Existing files are replaced only if the ``with`` block ends without an error. In the files of pairs, relative paths
    of images and videos are relative to ``out``.

    Args:
        names: Names of the output files without ".jsonl".
        out: Folder of the run.

    Attributes:
        summary: The counts of the run so far.
    """

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self.names, self.out = names, out
        self.summary = Summary(lines=dict.fromkeys(names, 0))
        self._folder = os.path.realpath(out)  # ".." after a link to a folder leads to the parent of the real folder
        self._files: dict[str, Any] = {}
        self._seen: set[int] = set()  # hashes of the items with pairs
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "PairOutputs":
        self._stack.enter_context(FileLock(self.out / "outputs.lock", str(self.out), wait=True))
        for name in self.names:
            self._files[name] = self._stack.enter_context(atomic_write(self.out / f"{name}.jsonl", is_locked=True))
        self._report = self._stack.enter_context(atomic_write(self.out / "summary.json", is_locked=True))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._report.write(json.dumps(self.summary.to_dict(), indent=2, ensure_ascii=False).encode() + b"\n")
        self._stack.__exit__(kind, error, trace)

    def add(self, item: Item, result: ItemResult, records: int) -> None:
        """Writes the output lines of an item, and adds its counts to the summary.

        ``records`` is the number of samples of the item.
        """
        self.summary.add(result, records)
        pairs = sum(name != "unsolved" for name, _ in result.lines)
        if pairs:
            # Equal items have equal seeds, and so equal samples.
            content = hash((item.digest, item.question_with_options))
            if content in self._seen:
                self.summary.notes[_REPEATED] += pairs
            self._seen.add(content)
        for name, line in result.lines:
            if line.get("images"):
                line = {**line, "images": [self._relative_path(image, item.image_root) for image in line["images"]]}
            # The paths in a line of "unsolved" are those of the input.
            if line.get("videos") and name != "unsolved":
                videos = (Video.from_value(video) for video in line["videos"])
                moved = (v.map_paths(lambda path: self._relative_path(path, item.image_root)) for v in videos)
                line = {**line, "videos": [video.to_value() for video in moved]}
            self._files[name].write(encode_line(line))

    def _relative_path(self, image: str, root: str) -> str:
        """Returns the path of an image or video relative to the output folder.

        ``image`` is the path relative to ``root``. Absolute paths and URLs are returned unchanged.
        """
        if os.path.isabs(image) or is_url(image):
            return image
        path = os.path.relpath(os.path.abspath(os.path.join(root, image)), self._folder)
        return path.replace(os.sep, "/")
