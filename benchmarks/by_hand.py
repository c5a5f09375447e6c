"""Finds quantities in the prose of the documents, and says where each comes from: ``results/by_hand.json``.

Blocks that benchmarks.numbers makes, fenced code and comments are left out. tests/benchmarks/test_numbers.py fails on
a quantity without an entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: What an entry of each kind must say besides document, text and kind.
KINDS = {
    "measured": ("command", "machine", "date"),
    "arithmetic": ("formula",),
    "paper": ("source",),
    "setting": ("source",),
}
_FIELDS = ("document", "text", "kind", "command", "machine", "date", "formula", "source")

_LEFT_OUT = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^(?P=fence)[ ]*$"  # code
    r"|^<!-- results: \S+ -->$.*?^<!-- end of results -->$"
    r"|<!--.*?-->",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_COUNT = r"(?:half an?|an?|one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|several|few)"
_UNIT = (
    r"(?:(?:ns|us|µs|ms|s|min|h)\b|(?:seconds?|minutes?|hours?|days?)\b|[kKMGT]i?B(?:/s)?\b|[kMGTP]?FLOPS?(?:/s)?\b"
    r"|%|(?:percent|per cent|percentage points?|points?|nats?)\b|[kMG]Hz\b|tokens?/s\b"
    r"|(?:generated )?tokens per\b|of the (?:memory|time)\b"
    r"|times\b|x(?= (?:as|faster|slower|less|more|smaller|larger)\b))"
)
_QUANTITY = re.compile(
    # A range or list of numbers with one unit; "2.1x"; a number word with a unit of time or a share.
    rf"(?<![\w.,]){_NUMBER}(?:\s(?:to|or|and|\.\.)\s{_NUMBER})*(?:\s{{0,6}}|-){_UNIT}"
    rf"|(?<![\w.,]){_NUMBER}x\b"
    rf"|\b{_COUNT}\s(?:few\s|dozen\s)?(?:seconds|minutes?|hours?|days?|percent|per cent)\b"
    rf"|\b{_COUNT}\stimes\s(?:as|faster|slower|less|more)\b"
    rf"|\b(?:quarter|half|third)\sof\san\shour\b",
)
#: A cell of a table that is a number and nothing else, with decimals or a sign of an error.
_CELL = re.compile(r"(?<=\|)\s*[+-]?\d[\d,]*\.\d+(?:\s*(?:±|\+-)\s*\d[\d.]*)?\s*(?=\|)")


def load(path: Path) -> list[dict[str, str]]:
    """Reads and checks the entries.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If an entry is not as it should be.
    """
    entries: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    for number, entry in enumerate(entries):
        check(entry, f"{path.name}: entry {number}")
    return entries


def check(entry: Mapping[str, Any], name: str) -> None:
    """Checks an entry.

    Raises:
        ValueError: If a field is unknown, missing or empty.
    """
    if entry.get("kind") not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {entry.get('kind')!r}")
    for field in ("document", "text", *KINDS[entry["kind"]]):
        if not (isinstance(entry.get(field), str) and entry[field].strip()):
            raise ValueError(f"{name}: an entry of kind {entry['kind']} must say {field}, got {entry.get(field)!r}")
    if not set(entry) <= set(_FIELDS):
        raise ValueError(f"{name}: fields must be among {', '.join(_FIELDS)}, got {sorted(entry)}")


def quantities(text: str) -> Iterator[tuple[int, int]]:
    """Yields begin and end of each quantity in the prose and the tables of a page."""
    prose = _LEFT_OUT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    spans = {found.span() for pattern in (_QUANTITY, _CELL) for found in pattern.finditer(prose)}
    yield from sorted(spans)


def places(quote: str, text: str) -> list[tuple[int, int]]:
    """Where a passage stands in a page, however its lines are broken."""
    pattern = r"\s+".join(map(re.escape, quote.split()))
    return [found.span() for found in re.finditer(pattern, text)]


def problems(document: str, text: str, entries: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yields what is wrong with a page: quantities that no entry quotes, and entries that it does not hold."""
    quoted: list[tuple[int, int]] = []
    for entry in entries:
        if entry["document"] == document:
            found = places(entry["text"], text)
            quoted += found
            if not found:
                yield f"{document}: results/by_hand.json quotes what does not stand there: {entry['text']!r}"
            elif not any(begin <= a and b <= end for begin, end in found for a, b in quantities(text)):
                yield f"{document}: results/by_hand.json quotes no quantity: {entry['text']!r}"
    for begin, end in quantities(text):
        if not any(first <= begin and end <= last for first, last in quoted):
            line = text.count("\n", 0, begin) + 1
            around = " ".join(text[max(0, begin - 50) : end + 30].split())
            yield f"{document}:{line}: {' '.join(text[begin:end].split())!r} has no source: {around!r}"
