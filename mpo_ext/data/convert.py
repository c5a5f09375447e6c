"""Converts pairs from any readable format to a format in ``formats.WRITABLE``."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo_ext.checks import check_choice
from mpo_ext.data.formats import WRITABLE, Format
from mpo_ext.data.hf import PARQUET, save_dataset
from mpo_ext.data.jsonl import write_pairs
from mpo_ext.data.media import check_media
from mpo_ext.data.mmpr import refuse_line_fields, write_mmpr
from mpo_ext.data.reader import BadLine, FieldError, Location, Skipped
from mpo_ext.data.records import PROMPT_TOOLS, SOURCE, TURNS, Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.data.trl import Kind, write_trl
from mpo_ext.files import check_outputs
from mpo_ext.images import ImageError, describe_source, is_remote, missing_image_advice, read_image

_MMPR_FIELDS = {"image", "video", "rejected_image", "question", "chosen", "rejected", "answer_gt"}

# Suffixes of files that the readers do not read as JSON lines.
_OTHER_SUFFIXES = {".arrow", ".bz2", ".csv", ".gz", PARQUET, ".tsv", ".xlsx", ".xz", ".zip", ".zst"}


def convert(
    source: PairSource,
    out: str | os.PathLike[str],
    format: Format,
    *,
    kind: Kind = "conversational",
    skip_bad: bool = False,
    root: str | os.PathLike[str] | None = None,
    name: str = "pairs",
) -> tuple[int, Skipped]:
    """Writes the pairs of a source in another format. The output appears only when it is complete.

    The formats "pairs" and "trl" have absolute image paths, with one exception. Let F be the folder of ``out``. If F
    is ``source.root`` or contains the image, a relative path of the source becomes relative to F.

    A pair with several turns or with tools does not fit every format. "pairs" holds all such pairs, "mmpr" holds none.
    "trl" and "hf" hold them only with ``kind="conversational"``. "hf" never holds a pair with tools.

    Args:
        source: Pairs to write.
        out: Path of the output. "mmpr" and "hf" write a folder, "pairs" and "trl" write a file. If the path ends with
            .parquet, "hf" writes a file.
        format: Format to write, one of ``WRITABLE``.
        kind: For "trl" and "hf": "standard" or "conversational".
        skip_bad: Whether to skip bad lines and pairs that the format cannot hold. "hf" also skips pairs with an
            unreadable image. False: the first such line or pair raises BadLine, and nothing is written.
        root: For "mmpr": image folder of all pairs that were not read from MMPR; see ``write_mmpr``.
        name: For "mmpr": name of the data set for all pairs that were not read from MMPR.

    Returns:
        The number of pairs written, and the skipped lines.

    Raises:
        BadLine: If ``skip_bad`` is False and a line would be skipped.
        ValueError: If the format is unknown. If ``out`` would replace an input. If the suffix of ``out`` does not fit
            the format. For "mmpr", also if ``write_mmpr`` raises it.
        OSError: If the output cannot be written.
        ImportError: If Hugging Face datasets is required but not installed.
    """
    check_choice("format", format, WRITABLE)
    suffix = Path(out).suffix.lower()
    if format == "hf" and suffix in (_OTHER_SUFFIXES | {".json", ".jsonl"}) - {PARQUET}:
        raise ValueError(f"out must be a folder or a file .parquet for the format hf, got {os.fspath(out)}")
    if format in ("pairs", "trl") and suffix in _OTHER_SUFFIXES:
        raise ValueError(
            f"out must be the name of a JSON lines file, such as pairs.jsonl, for the format {format}, got "
            f"{os.fspath(out)}"
        )
    check_outputs("out", written_paths(out, format), inputs=source.files)
    skipped = Skipped()

    def pairs() -> Iterator[Pair]:
        nonlocal skipped
        skipped = Skipped()  # some formats read the pairs twice; each bad line counts once
        is_file = format in ("pairs", "trl")
        for where, pair in source.scan_for(Path(out).absolute().parent) if is_file else source.scan():
            if not isinstance(pair, BadLine):
                pair = _holdable(where, pair, format, kind)
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
        has_images = any(pair.images for pair in pairs())
        count = write_trl(out, pairs(), kind, has_images=has_images)
    else:
        count = save_dataset(Path(out), pairs, kind)
    return count, skipped


def written_paths(out: str | os.PathLike[str], format: Format) -> list[Path]:
    """Returns the existing files and folders that ``convert`` may replace when it writes ``format`` to ``out``."""
    out = Path(out)
    places = [out / "meta.json", *out.glob("annotations/*.jsonl")] if format == "mmpr" else [out]
    return [place for place in places if os.path.lexists(place)]


def _holdable(where: Location, pair: Pair, format: Format, kind: Kind) -> Pair | BadLine:
    """Returns the pair, or a BadLine if ``format`` cannot hold the pair.

    For example, a pair in the format "hf" must have no tools and no videos.
    """
    for name in ("videos", "rejected_images"):
        if getattr(pair, name) and format in ("trl", "hf"):
            reason = (
                f"{format} must have pairs without {name}, got {len(getattr(pair, name))}: pairs and mmpr hold them"
            )
            return BadLine(where, name, reason)
    turns = [name for name in (*TURNS, PROMPT_TOOLS) if name in pair.source]
    if turns and format != "pairs" and (format == "mmpr" or kind == "standard"):
        advice = "pairs holds them" if format == "mmpr" else "the kind conversational holds them"
        reason = (
            f"{format} must have a prompt and responses of one turn and no tools, got several in {', '.join(turns)}: "
            f"{advice}"
        )
        return BadLine(where, "several turns", reason)
    if format == "hf" and (PROMPT_TOOLS in turns or any("tool_calls" in turn for turn in _turns(pair))):
        reason = "hf must have pairs without tools, whose arguments would share columns, got tools: pairs holds them"
        return BadLine(where, "tools", reason)
    if format == "mmpr" and (names := sorted(pair.extra.keys() & _MMPR_FIELDS)):
        reason = f"extra must not hold a field that the line itself has, got {', '.join(map(repr, names))}"
        return BadLine(where, "bad field", reason)
    try:
        _check_extra(pair, format)
    except FieldError as error:
        return BadLine(where, error.kind, f"{format} must have fields that its reader takes: {error}")
    return _with_readable_images(where, pair) if format == "hf" else pair


def _check_extra(pair: Pair, format: Format) -> None:
    """Raises FieldError if a reader of ``format`` would refuse the fields of ``pair.extra``.

    For example, a field may have the name that an image had in the source.
    """
    fields = {}
    if format == "mmpr":  # the fields are those of the line
        fields = {name: value for name, value in pair.extra.items() if name != SOURCE}
        refuse_line_fields(fields)
    check_media(fields, pair)


def _turns(pair: Pair) -> list[dict[str, Any]]:
    """Returns the turns in ``Pair.source`` as one list: the turns of the prompt and of both responses."""
    return [turn for name in TURNS for turn in pair.source.get(name, ()) if isinstance(turn, dict)]


def _with_readable_images(where: Location, pair: Pair) -> Pair | BadLine:
    """Returns the pair, or a BadLine if an image of the pair cannot be read."""
    for image in pair.images:
        try:
            read_image(image)
        except ImageError as error:
            return BadLine(where, "image is a URL" if is_remote(image) else "unreadable image", str(error))
        except OSError as error:
            reason = f"images must be readable files, got {describe_source(image)}: {error.strerror}"
            return BadLine(where, "unreadable image", f"{reason}{missing_image_advice(image)}")
    return pair
