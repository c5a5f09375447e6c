"""Counts the encoded and the skipped pairs of a run."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from mpo_ext.data.reader import BadLine
from mpo_ext.train.encode import BAD_PAIR, BadPairError, Sample, SkippedPair


class PairCounts:
    """Counts encoded and skipped pairs, with an example for each reason to skip pairs.

    Attributes:
        kept: Number of encoded pairs.
        cut: Number of encoded pairs with a truncated response.
        split: Number of encoded pairs with a response that was tokenized separately from the prompt.
        skipped: Dict from reason, such as "bad JSON", to the number of skipped pairs.
        examples: Dict from reason to the message about the first pair that was skipped for this reason.
    """

    def __init__(self) -> None:
        self.kept = 0
        self.cut = 0
        self.split = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def add(self, result: Sample | SkippedPair | BadLine | BadPairError) -> None:
        """Counts the result of reading and encoding a pair."""
        if isinstance(result, Sample):
            self.kept += 1
            self.cut += result.is_cut
            self.split += result.is_split
            return
        if isinstance(result, SkippedPair):
            reason, message = result.reason, f"{result.name}: {result.detail}"
        else:
            reason, message = result.kind if isinstance(result, BadLine) else BAD_PAIR, str(result)
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message)

    def merge(self, other: "PairCounts") -> None:
        """Adds the counts of ``other``. Takes examples from ``other`` only for reasons without an example."""
        self.kept += other.kept
        self.cut += other.cut
        self.split += other.split
        self.skipped.update(other.skipped)
        self.examples = {**other.examples, **self.examples}

    @property
    def n_skipped(self) -> int:
        """Number of skipped pairs, summed over all reasons."""
        return self.skipped.total()

    def lines(self, epochs: float = 1) -> Iterator[str]:
        """Yields lines of text with the counts and the examples. The counts cover ``epochs`` epochs."""
        during = in_epochs(epochs)
        if self.cut:
            yield f"cut the responses of {self.cut:,} pairs{during}"
        if self.split:
            yield (
                f"tokenized the responses of {self.split:,} pairs apart{during}: the tokenizer merges prompt and "
                "response"
            )
        for reason, count in self.skipped.most_common():
            yield f"skipped {count:,}{during}: {reason}, for example {self.examples[reason]}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and the examples as JSON values, for a checkpoint."""
        return {
            "kept": self.kept,
            "cut": self.cut,
            "split": self.split,
            "dropped": dict(self.skipped),
            "examples": self.examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept, self.cut, self.split = state["kept"], state["cut"], state.get("split", 0)
        self.skipped = collections.Counter(state["dropped"])
        self.examples = dict(state["examples"])


def in_epochs(epochs: float) -> str:
    """Returns the end of a message, such as " in 3 epochs"; "" for at most one epoch."""
    return f" in {epochs:.3g} epochs" if epochs > 1 else ""
