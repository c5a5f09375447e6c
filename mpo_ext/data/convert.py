"""Converts pairs from any readable format to a format in ``formats.WRITABLE``."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo_ext.checks import check_choice, shorten
from mpo_ext.data.formats import WRITABLE, Format
from mpo_ext.data.hf import PARQUET, save_dataset
from mpo_ext.data.jsonl import parse_object, parse_pair, write_pairs
from mpo_ext.data.media import check_media
from mpo_ext.data.mmpr import MMPRSubset, has_subset, line_parser, to_line, write_mmpr
from mpo_ext.data.reader import BadLine, Location, Skipped, raise_bad_line
from mpo_ext.data.records import PROMPT_TOOLS, SOURCE, TURNS, Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.data.trl import Kind, from_trl, to_trl, write_trl
from mpo_ext.files import check_no_pipe, check_outputs
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
            unreadable image, and "mmpr" pairs with an image outside the image folder. False: the first such line or
            pair raises BadLine, and nothing is written.
        root: For "mmpr": image folder of all pairs that were not read from MMPR; see ``write_mmpr``.
        name: For "mmpr": name of the data set for all pairs that were not read from MMPR.

    Returns:
        The number of pairs written, and the skipped lines.

    Raises:
        BadLine: If ``skip_bad`` is False and a line would be skipped.
        ValueError: If the format is unknown. If ``out`` would replace an input or an image of a pair, or is a pipe or
            a device. If the suffix of ``out`` does not fit the format. For "mmpr", also if ``write_mmpr`` raises it.
            For "hf", also if there is no pair to write.
        FileExistsError: If ``out`` is a folder instead of a file, or a file instead of a folder. For "hf", also if
            ``save_dataset`` raises it.
        OSError: If the output cannot be written.
        ImportError: If Hugging Face datasets is required but not installed.
    """
    check_choice("format", format, WRITABLE)
    _check_place(Path(out), format)
    check_outputs("out", written_paths(out, format), inputs=source.files)
    skipped = Skipped()
    replaced = Path(out).absolute() if os.path.isfile(out) else None

    def pairs() -> Iterator[Pair]:
        nonlocal skipped
        skipped = Skipped()  # some formats read the pairs twice; each bad line counts once
        is_file = format in ("pairs", "trl")
        for where, pair in source.scan_for(Path(out).absolute().parent) if is_file else source.scan():
            if not isinstance(pair, BadLine):
                _check_not_replaced(replaced, where, pair)
                pair = _holdable(where, pair, format, kind, root)
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
        if next(pairs(), None) is None:
            first = next((bad for examples in skipped.examples.values() for bad in examples), "no lines")
            raise ValueError(
                f"the format hf must have at least one pair, got none of {skipped.total:,} lines; the first: {first}"
            )
        count = save_dataset(Path(out), pairs, kind)
    return count, skipped


def _check_not_replaced(out: Path | None, where: Location, pair: Pair) -> None:
    """Raises ValueError if the existing file ``out`` is an image or video of a pair. None: no file exists.

    ``where`` is the location of the pair, whose relative paths start at the folder of ``out``.
    """
    if out is not None and os.path.realpath(out) in (os.path.realpath(out.parent / path) for path in pair.media_paths):
        raise ValueError(f"out must not replace an input, got {out}, an image or video of the pair at {where}")


def _check_place(out: Path, format: Format) -> None:
    """Raises an error if the suffix of ``out`` does not fit the format.

    Also raises an error if ``out`` exists, but is not of the kind, file or folder, that the format replaces.
    """
    suffix = out.suffix.lower()
    if format == "hf" and suffix in (_OTHER_SUFFIXES | {".json", ".jsonl"}) - {PARQUET}:
        raise ValueError(f"out must be a folder or a file .parquet for the format hf, got {out}")
    if format in ("pairs", "trl") and suffix in _OTHER_SUFFIXES:
        raise ValueError(
            f"out must be the name of a JSON lines file, such as pairs.jsonl, for the format {format}, got {out}"
        )
    if format == "mmpr" and not out.is_dir() and suffix in _OTHER_SUFFIXES | {".json", ".jsonl"}:
        raise ValueError(f"out must be a folder for the format mmpr, got {out}")
    if not out.exists():
        return
    check_no_pipe("out", out)
    if format in ("pairs", "trl") and out.is_dir():
        raise FileExistsError(f"out must be a file for the format {format}, got the folder {out}")
    if format == "mmpr" and not out.is_dir():
        raise FileExistsError(f"out must be a folder for the format mmpr, got the file {out}")


def written_paths(out: str | os.PathLike[str], format: Format) -> list[Path]:
    """Returns the existing files and folders that ``convert`` may replace when it writes ``format`` to ``out``."""
    out = Path(out)
    places = [out / "meta.json", *out.glob("annotations/*.jsonl")] if format == "mmpr" else [out]
    return [place for place in places if os.path.lexists(place)]


def _holdable(
    where: Location, pair: Pair, format: Format, kind: Kind, root: str | os.PathLike[str] | None
) -> Pair | BadLine:
    """Returns the pair, or a BadLine if ``format`` cannot hold the pair.

    For example, a pair in the format "hf" must have no tools and no videos. ``root`` is the image folder of the format
    "mmpr".
    """
    for name in ("videos", "rejected_images"):
        if getattr(pair, name) and format in ("trl", "hf"):
            reason = (
                f"{format} must have pairs without {name}, got {len(getattr(pair, name))}: pairs and mmpr hold them"
            )
            return BadLine(where, name, reason)
    turns = [name for name in (*TURNS, PROMPT_TOOLS) if name in pair.source]
    if format == "hf" and (PROMPT_TOOLS in turns or any("tool_calls" in turn for turn in _turns(pair))):
        reason = "hf must have pairs without tools, whose arguments would share columns, got tools: pairs holds them"
        return BadLine(where, "tools", reason)
    if turns and format != "pairs" and (format == "mmpr" or kind == "standard"):
        advice = "pairs holds them" if format == "mmpr" else "the kind conversational holds them"
        reason = (
            f"{format} must have a prompt and responses of one turn and no tools, got several in {', '.join(turns)}: "
            f"{advice}"
        )
        return BadLine(where, "several turns", reason)
    if (problem := _reread_problem(where, pair, format, kind, root)) is not None:
        return problem
    return _with_readable_images(where, pair) if format == "hf" else pair


def _reread_problem(
    where: Location, pair: Pair, format: Format, kind: Kind, root: str | os.PathLike[str] | None
) -> BadLine | None:
    """Returns a BadLine if the row of a pair in ``format`` could not be read again as the same pair, otherwise None.

    The question is not compared: TRL puts images without placeholders before the text.
    """
    try:
        with raise_bad_line(where):
            if format == "mmpr":
                again = _through_mmpr(pair, root)
            elif format == "pairs":
                values = pair.to_dict()
                again = check_media(values, parse_pair(values, ""))
            else:
                row = to_trl(pair, kind, has_images=bool(pair.images))
                again = check_media(row, from_trl(row))
    except BadLine as bad:
        return BadLine(where, bad.kind, f"{format} cannot hold the pair: {bad.reason}")
    for name in ("chosen", "rejected", "answer_gt", "provenance"):
        before, after = getattr(pair, name), getattr(again, name)
        if before != after:
            reason = f"{format} cannot hold the pair: {name} would be read as {shorten(after)}, got {shorten(before)}"
            return BadLine(where, "bad field", reason)
    extra = [{name: value for name, value in one.extra.items() if name != SOURCE} for one in (pair, again)]
    if extra[0] != extra[1]:
        reason = f"{format} cannot hold the pair: extra would be read as {shorten(extra[1])}, got {shorten(extra[0])}"
        return BadLine(where, "bad field", reason)
    return None


def _through_mmpr(pair: Pair, root: str | os.PathLike[str] | None) -> Pair:
    """Writes a pair as a line of MMPR, and returns the pair that this line holds.

    ``root`` is the image folder of pairs that were not read from MMPR; None: "/".
    """
    if names := sorted(pair.extra.keys() & _MMPR_FIELDS):
        raise ValueError(f"extra must not hold a field that the line itself has, got {', '.join(map(repr, names))}")
    folder = pair.source["root"] if has_subset(pair.source) else "/" if root is None else os.path.abspath(root)
    text = to_line(pair, folder).decode()
    values = parse_object(text)
    return check_media(values, line_parser(MMPRSubset("", folder, "", 1, None, {}))(values, text))


def _turns(pair: Pair) -> list[dict[str, Any]]:
    """Returns the turns in ``Pair.source`` as one list: the turns of the prompt and of both responses."""
    lists = [turns for name in TURNS if isinstance(turns := pair.source.get(name), list)]
    return [turn for turns in lists for turn in turns if isinstance(turn, dict)]


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
