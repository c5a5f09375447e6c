"""From any format of pairs into any other."""

import os
from collections.abc import Iterator
from pathlib import Path

from mpo_ext.data.hf import Kind, save_dataset, write_trl
from mpo_ext.data.jsonl import BadLine, Location, Skipped, write_pairs
from mpo_ext.data.mmpr import write_mmpr
from mpo_ext.data.records import Pair, find_url
from mpo_ext.data.sources import FORMATS, Format, Source


def convert(
    source: Source,
    out: str | os.PathLike[str],
    format: Format,
    *,
    kind: Kind = "standard",
    skip_bad: bool = False,
    root: str | os.PathLike[str] | None = None,
    name: str = "pairs",
) -> tuple[int, Skipped]:
    """Writes the pairs in another format, whole or not at all.

    Images are written with absolute paths. In the formats "pairs" and "trl" relative ones stay relative where ``out``
    lies in the folder that they start at, or in one above them.

    Args:
        source: The pairs.
        out: A folder for "mmpr" and "hf", a file for "pairs" and "trl".
        format: What to write.
        kind: Of TRL's format.
        skip_bad: Whether lines that hold no pair, or for a dataset one with an image that cannot be read, are left
            out; else the first one ends it and nothing is written.
        root: Image folder of pairs that are new to MMPR.
        name: Of the subset that such pairs form.

    Returns:
        The number of pairs written, and what was left out.

    Raises:
        BadLine: If a line holds no pair, unless ``skip_bad``.
        ValueError: If the format is unknown or cannot hold a pair.
        OSError: If it cannot be written, or an image not read that goes into a dataset.
        ImportError: If Hugging Face datasets is needed and missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    skipped = Skipped()

    def pairs() -> Iterator[Pair]:
        nonlocal skipped
        skipped = Skipped()  # a dataset is gone through twice
        is_file = format in ("pairs", "trl")
        for where, pair in source.scan_for(Path(out).absolute().parent) if is_file else source.scan():
            if skip_bad and format == "hf" and not isinstance(pair, BadLine):
                pair = _with_readable_images(where, pair)
            if not isinstance(pair, BadLine):
                yield pair
            elif skip_bad:
                skipped.add(pair)
            else:
                raise pair

    if format == "mmpr":
        count = sum(write_mmpr(out, pairs(), root=root, name=name).values())
    elif format == "pairs":
        count = write_pairs(out, pairs())
    elif format == "trl":
        has_images = any(pair.images for pair in pairs()) if kind == "conversational" else False
        count = write_trl(out, pairs(), kind, structured=has_images)
    else:
        count = save_dataset(Path(out), pairs, kind)
    return count, skipped


def _with_readable_images(where: Location, pair: Pair) -> Pair | BadLine:
    """The pair, or what is wrong with it where an image cannot go into a dataset."""
    for image in pair.images:
        try:
            with open(image, "rb"):
                pass
        except OSError as error:
            url = find_url(image)
            if url is not None:
                return BadLine(where, "image is a URL", f"URLs are not fetched: download the image, got {url}")
            return BadLine(where, "unreadable image", f"images must be files to read, got {image}: {error.strerror}")
    return pair
