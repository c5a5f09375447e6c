"""The results of items, the summary of a run, and the files that a run writes."""

import collections
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from mpo_ext.data.records import find_url
from mpo_ext.files import FileLock, atomic_write
from mpo_ext.generate.items import Item
from mpo_ext.journal import encode_line


@dataclasses.dataclass(slots=True)
class ItemResult:
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

    def refuse(self, reason: str) -> "ItemResult":
        """Refuses the item as a whole. Returns this."""
        self.refused[reason] += 1
        self.is_refused = True
        return self


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

    def add(self, outcome: ItemResult, records: int) -> None:
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


class PairOutputs:
    """The outputs and the summary; they take their places when the block ends well, and else stay as they were.

    Journals and ``unsolved``, which is an input again, keep images as the input names them. In the files of pairs
    relative images start at the folder of the file, as every reader of pairs takes them.
    """

    def __init__(self, names: tuple[str, ...], out: Path) -> None:
        self.names, self.out = names, out
        self._folder = os.path.realpath(out)  # what ".." leads out of
        self.summary = Summary(lines=dict.fromkeys(names, 0))
        self._files: dict[str, Any] = {}
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

    def add(self, item: Item, outcome: ItemResult, records: int) -> None:
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
