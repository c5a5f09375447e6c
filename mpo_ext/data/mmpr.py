"""Reads and writes the MMPR format: a meta file that lists data sets (subsets), and a JSON lines file for each subset.

The meta file maps the name of each subset to an object. The object has the fields ``root`` (folder of the images),
``annotation`` (path of the .jsonl file), ``length``, ``repeat_time``, ``data_augment`` and ``max_dynamic_patch``.

A line of a .jsonl file has ``question``, ``chosen`` and ``rejected``. Usually it has ``image``: a path, a list of
paths, "" or null. Often it has ``answer_gt``.

This package adds two optional fields to a line. The field ``video`` holds a video or a list of videos. A video is a
path or an object as in ``Video.from_value``. In a list of videos, a video may also be a list of frame paths. The field
``rejected_image`` holds the images of the rejected response, as a path or a list of paths. All paths are relative to
``root``.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mpo_ext.checks import check_index, shorten
from mpo_ext.data.containers import ROWS_ADVICE, refuse_rows
from mpo_ext.data.jsonl import LineFile, dump_line, parse_object
from mpo_ext.data.messages import refuse_meaning, refuse_stored_turns
from mpo_ext.data.paths import RootMap, absolute_path, below, map_root, real_path
from mpo_ext.data.reader import MAX_LINE_BYTES, FieldError, Location, PairSequence
from mpo_ext.data.records import SOURCE, Pair
from mpo_ext.data.row_media import read_video
from mpo_ext.data.tools import refuse_tools
from mpo_ext.files import atomic_write, write_json
from mpo_ext.images import describe_source, is_url, local_path
from mpo_ext.videos import Video

_FIELDS = ("image", "video", "rejected_image", "question", "chosen", "rejected", "answer_gt", "provenance")
_FILE_SETTINGS = ("annotation", "length")  # settings that a written copy of a subset changes


class MMPRSubset(NamedTuple):
    """A data set (subset) that an MMPR meta file lists.

    Attributes:
        name: Name of the subset.
        root: Absolute path of the subset's image folder.
        annotation: Absolute path of the subset's .jsonl file.
        repeat_time: Number of times that each line is used. Below 1: fraction of the lines to use.
        length: Number of lines according to the meta file, or None.
        settings: The subset's entry in the meta file, unchanged.
    """

    name: str
    root: str
    annotation: str
    repeat_time: float
    length: int | None
    settings: dict[str, Any]


def read_meta(path: str | os.PathLike[str], *, root_map: RootMap = ()) -> list[MMPRSubset]:
    """Reads and checks an MMPR meta file, and returns the data sets (subsets) that it lists.

    Args:
        path: Path of the meta file. Relative paths in the file are joined to its folder.
        root_map: A tuple (old path, new path) for each folder that has moved. Old paths are replaced in ``root`` and
            ``annotation``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is not a valid meta file. The message names the subset, the setting and the rule.
    """
    folder = Path(path).resolve().parent
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.strip():
            raise ValueError("an empty file")
        entries = parse_object(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} must be a meta file in JSON, got {error}: {ROWS_ADVICE}") from None
    refuse_rows(os.fspath(path), entries)
    return [_subset(name, entry, folder, root_map) for name, entry in entries.items()]


def _subset(name: str, entry: object, folder: Path, root_map: RootMap) -> MMPRSubset:
    def error(setting: str, rule: str) -> ValueError:
        value = entry.get(setting) if isinstance(entry, dict) else entry
        is_path = isinstance(entry, dict) and isinstance(value, str)
        shown = repr(describe_source(value)) if is_path else shorten(value)
        return ValueError(f"{name[:80]}: {setting} must be {rule}, got {shown}")

    if not isinstance(entry, dict):
        raise error("the entry", f"an object with root and annotation ({ROWS_ADVICE})")
    paths = {}
    for setting in ("root", "annotation"):
        value = entry.get(setting)
        if not isinstance(value, str) or "\0" in value:
            raise error(setting, "a path")
        paths[setting] = os.path.normpath(os.path.join(folder, map_root(value, root_map)))
    if not paths["annotation"].endswith(".jsonl"):
        raise error("annotation", "a .jsonl file")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not repeat > 0:
        raise error("repeat_time", "a positive number")
    if repeat > 1 and repeat != int(repeat):
        raise error("repeat_time", "below 1 or a whole number")
    length = entry.get("length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
        raise error("length", "a number of lines")
    return MMPRSubset(name, paths["root"], paths["annotation"], repeat, length, entry)


class MMPRDataset(PairSequence):
    """The pairs of all data sets (subsets) that an MMPR meta file lists, each read on access.

    Args:
        meta: Path of the meta file.
        root_map: A tuple (old path, new path) for each folder that has moved.
        repeat: Whether to apply ``repeat_time``. False: each line is used once.
        seed: Seed for drawing lines from subsets with a ``repeat_time`` below 1.
        max_line_bytes: Maximum length of a line in bytes. Reading a longer line raises BadLine.
        ignore: As in ``LineFile``.

    Attributes:
        subsets: The subsets of the meta file.
        files: One ``LineFile`` per subset.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If ``meta`` is not a valid meta file.
    """

    def __init__(
        self,
        meta: str | os.PathLike[str],
        *,
        root_map: RootMap = (),
        repeat: bool = True,
        seed: int = 0,
        max_line_bytes: int = MAX_LINE_BYTES,
        ignore: Collection[str] = (),
    ) -> None:
        self.subsets = read_meta(meta, root_map=root_map)
        options: dict[str, Any] = {"max_line_bytes": max_line_bytes, "ignore": ignore}
        self.files = [read_annotation(subset, root_map=root_map, **options) for subset in self.subsets]
        self._repeat, self._seed = repeat, seed
        self._drawn: list[np.ndarray | None] = []
        self._ends: list[int] | None = None

    def __len__(self) -> int:
        ends = self._subset_ends()
        return ends[-1] if ends else 0

    def read(self, index: int) -> Pair:
        """Returns the pair at an index, or raises BadLine if the line does not hold a valid pair."""
        file, line = self._find(index)
        return file.read(line)

    def locate(self, index: int) -> Location:
        """Returns the location of the pair at an index."""
        file, line = self._find(index)
        return file.locate(line)

    def _find(self, index: int) -> tuple[LineFile, int]:
        index = check_index(index, len(self))
        ends = self._subset_ends()
        subset = bisect.bisect_right(ends, index)
        file, drawn = self.files[subset], self._drawn[subset]
        position = index - (ends[subset - 1] if subset else 0)
        return file, int(drawn[position]) if drawn is not None else position % len(file)

    def _subset_ends(self) -> list[int]:
        """Returns, for each data set (subset), the index after its last pair.

        The first call indexes the files, and selects random lines of subsets with a ``repeat_time`` below 1.
        """
        if self._ends is None:
            sizes = []
            for subset, file in zip(self.subsets, self.files, strict=True):
                drawn, size = None, len(file)
                if self._repeat and subset.repeat_time < 1:
                    # Each subset has its own generator, so its draw does not depend on the other subsets.
                    rng = np.random.default_rng([self._seed, zlib.crc32(subset.name.encode())])
                    drawn = np.sort(rng.permutation(size)[: int(size * subset.repeat_time)])
                    size = len(drawn)
                elif self._repeat:
                    size *= int(subset.repeat_time)
                self._drawn.append(drawn)
                sizes.append(size)
            self._ends = list(itertools.accumulate(sizes))
        return self._ends


def read_annotation(subset: MMPRSubset, *, root_map: RootMap = (), **options: Any) -> LineFile:
    """Opens the JSON lines file of an MMPR data set.

    The result has each line once; the ``repeat_time`` of the data set is ignored.

    Args:
        subset: The data set.
        root_map: A tuple (old path, new path) for each folder that has moved. Old paths are replaced in absolute paths
            of images and videos, before they are checked to be inside the root.
        options: Further arguments of ``LineFile``.
    """
    return LineFile(subset.annotation, line_parser(subset, root_map), **{"subset": subset.name, **options})


def line_parser(subset: MMPRSubset, root_map: RootMap = ()) -> Callable[[dict[str, Any], str], Pair]:
    """Returns a function that converts a line of an MMPR data set to a pair, for ``parse`` of ``LineFile``.

    ``root_map`` is the argument of ``read_annotation``.
    """
    settings = {name: value for name, value in subset.settings.items() if name not in (*_FILE_SETTINGS, "root")}
    # The root lies beside the settings, because ``map_roots`` changes ``source["root"]``.
    source = {"format": "mmpr", "subset": subset.name, "root": subset.root}
    return _LineParser(subset.root, {**source, "settings": settings} if settings else source, tuple(root_map))


@dataclasses.dataclass(frozen=True, slots=True)
class _LineParser:
    root: str
    source: dict[str, Any]
    root_map: RootMap = ()

    def _resolved(self, path: str) -> str:
        path = local_path(path)
        return resolve_image(map_root(path, self.root_map) if os.path.isabs(path) else path, self.root)

    def __call__(self, values: dict[str, Any], line: str) -> Pair:
        source = dict(self.source)
        extra = {name: value for name, value in values.items() if name not in _FIELDS}
        if SOURCE in extra:
            raise FieldError(f"the field {SOURCE!r} must be left to the reader, got {shorten(extra[SOURCE])}")
        for name in ("question", "chosen", "rejected"):
            if name not in values:
                raise FieldError(f"{name} must be given, got fields {', '.join(map(repr, values))}")
        refuse_line_fields(values)
        relative, source["image"] = _images(values)
        images = tuple(map(self._resolved, relative))
        if [below(image, self.root) for image in images] != relative:
            source["paths"] = relative
        videos = tuple(video.map_paths(self._resolved) for video in _videos(values))
        rejected = tuple(map(self._resolved, _paths("rejected_image", values.get("rejected_image") or [])))
        for name, form in (("video", _video_values(videos, self.root)),
                           ("rejected_image", [_relative(image, self.root) for image in rejected])):  # fmt: skip
            if name in values and (not form or values[name] != _compact(form)):
                source[name] = values[name]
        answer = values.get("answer_gt")
        if "answer_gt" in values and not isinstance(answer, str):
            source["answer_gt"] = answer
            answer = _as_text(answer)
        provenance = values.get("provenance", {})
        if not isinstance(provenance, dict) or ("provenance" in values and not provenance):
            extra["provenance"], provenance = provenance, {}
        if line.isascii() and "\\u" in line:
            source["ascii"] = True
        extra[SOURCE] = source
        texts = values["question"], values["chosen"], values["rejected"]
        pair = Pair(*texts, images, answer, provenance, extra, videos, rejected)
        if list(values) != list(_line(pair, relative, source, self.root)):
            source["fields"] = list(values)
        return pair


def refuse_line_fields(values: Mapping[str, Any]) -> None:
    """Raises FieldError if ``values`` has a field that an MMPR line must not have, such as ``system`` or ``tools``."""
    if values.get("images"):
        raise FieldError(
            f"images of an MMPR line must be named by 'image', got 'images' {shorten(values['images'])}: "
            "a file of such lines is read with the format 'pairs' (--from pairs, in a recipe format: pairs)"
        )
    refuse_meaning(values, "system", "history", "messages", "chat_template_kwargs", "videos", "rejected_images")
    refuse_tools(values)
    refuse_stored_turns(values)


def _images(values: Mapping[str, Any]) -> tuple[list[str], str]:
    """Returns the image paths of a line, and how its field ``image`` was written.

    The second value is "absent", "null", "empty" (the text ""), "string" or "list".
    """
    if "image" not in values:
        return [], "absent"
    image = values["image"]
    if image is None:
        return [], "null"
    if isinstance(image, str):
        return ([image], "string") if image else ([], "empty")
    if not isinstance(image, list) or not all(isinstance(path, str) and path for path in image):
        raise FieldError(f"image must be a path or a list of paths, got {shorten(image)}")
    return list(image), "list"


def _paths(name: str, value: object) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise FieldError(f"{name} must be a path or a list of paths, got {shorten(value)}")
    return list(paths)


def _compact(media: list[Any]) -> Any:
    """Returns "a" for the list ``["a"]``. Other lists, such as ``["a", "b"]`` and ``[["a"]]``, are unchanged."""
    return media[0] if len(media) == 1 and not isinstance(media[0], list) else media


def _videos(values: Mapping[str, Any]) -> list[Video]:
    value = values.get("video")
    entries = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [read_video("video", entry, None) for entry in entries]


def _video_values(videos: Iterable[Video], root: str) -> list[Any]:
    return [video.map_paths(lambda path: _relative(path, root)).to_value() for video in videos]


def resolve_image(image: str, root: str) -> str:
    """Returns the absolute path of an image or video from a path relative to ``root``. A URL is returned unchanged.

    Raises FieldError if the path, or the target of a link, is outside ``root``.
    """
    image = local_path(image)
    if is_url(image):
        return image
    joined = os.path.join(root, image)
    normal, base = os.path.normpath(joined), os.path.normpath(root)
    if below(normal, base) is None or "\0" in image:
        raise FieldError(f"image must stay inside {root}, got {describe_source(image)!r}", kind="bad image path")
    folder, name = os.path.split(joined)
    real = os.path.realpath(joined) if os.path.islink(joined) else os.path.join(real_path(folder), name)
    if below(real, real_path(root)) is None:
        raise FieldError(
            f"image must stay inside {root}, got {describe_source(image)!r}, a link to {describe_source(real)}: name "
            "the folder of the files as root (or with root_map), or copy them",
            kind="bad image path",
        )
    return joined


def _line(pair: Pair, relative: Sequence[str], source: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Returns the fields of an MMPR line for a pair, in the order of the published files.

    Args:
        pair: The pair.
        relative: The pair's image paths, relative to the root.
        source: ``pair.source``. It describes the original line: for example, whether ``image`` was a list.
        root: Absolute path of the root.
    """
    form = source.get("image", "string" if len(relative) == 1 else "list" if relative else "absent")
    if form in ("string", "empty", "null", "absent") and len(relative) != (form == "string"):
        form = "string" if len(relative) == 1 else "list"  # the images were changed after reading
    values: dict[str, Any] = {}
    if form != "absent":
        values["image"] = {"string": relative[0] if relative else "", "empty": "", "null": None}.get(form, relative)

    def resolved(path: str) -> str:
        return absolute_path(path, root)

    for name, media, old, read in (
        ("video", _video_values(pair.videos, root), pair.videos,
         lambda given: [video.map_paths(resolved) for video in _videos({"video": given})]),
        ("rejected_image", [_relative(image, root) for image in pair.rejected_images], pair.rejected_images,
         lambda given: map(resolved, _paths("", given or []))),
    ):  # fmt: skip
        if name in source and tuple(read(source[name])) == old:
            values[name] = source[name]
        elif media:
            values[name] = _compact(media)
    values |= {"question": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    if "answer_gt" in source and pair.answer_gt == _as_text(source["answer_gt"]):
        values["answer_gt"] = source["answer_gt"]
    elif pair.answer_gt is not None:
        values["answer_gt"] = pair.answer_gt
    for name, value in pair.extra.items():
        if name != SOURCE:
            if name in values:
                raise ValueError(f"extra must not hold {name!r}, which the pair itself writes, got {shorten(value)}")
            values[name] = value
    if pair.provenance:
        if "provenance" in values:
            raise ValueError(
                f"extra must not hold 'provenance' beside the pair's own, got {shorten(values['provenance'])}"
            )
        values["provenance"] = pair.provenance
    return values


def _as_text(answer: object) -> str | None:
    return None if answer is None else json.dumps(answer, ensure_ascii=False)


def to_line(pair: Pair, root: str) -> bytes:
    """Returns a pair as a line of an MMPR file.

    If the pair was read from MMPR, the line has the same values as the original line. If ``json.dumps`` wrote the
    original line with its default separators, the bytes are also the same.

    Args:
        pair: Pair to write. Its provenance becomes the field ``provenance``, which other readers ignore.
        root: Absolute path of a folder. The written image paths are relative to this folder.

    Raises:
        ValueError: If an image is outside ``root``, or a field of ``extra`` has the name of a field of the pair.
    """
    source = pair.source
    paths = source.get("paths")
    if not paths or tuple(absolute_path(path, root) for path in paths) != pair.images:
        paths = [_relative(image, root) for image in pair.images]
    values = _line(pair, paths, source, root)
    order = source.get("fields")
    if order and set(order) == set(values):
        values = {name: values[name] for name in order}
    return dump_line(values, ensure_ascii=bool(source.get("ascii")))


def _relative(path: str, root: str) -> str:
    """Returns the path of an image or video relative to ``root``. A URL is returned unchanged."""
    if is_url(path):
        return path
    normal = below(os.path.normpath(os.path.join(root, path)), root)
    unchanged = below(path, root)
    if normal is None:
        raise ValueError(f"images must be below the root {root}, got {describe_source(path)!r}")
    return normal if unchanged is None else unchanged


def write_mmpr(
    folder: str | os.PathLike[str],
    pairs: Iterable[Pair],
    *,
    root: str | os.PathLike[str] | None = None,
    name: str = "pairs",
) -> dict[str, int]:
    """Writes pairs as an MMPR folder: a meta file, and a JSON lines file for each data set.

    A data set is called a subset. Each file is written atomically, and the meta file last.

    Args:
        folder: Folder to write. The meta file is ``meta.json`` in this folder.
        pairs: Pairs to write. A pair that was read from MMPR stays in its subset, with the settings of the subset.
            All other pairs form one new subset.
        root: Image folder of the new subset. None: the folder is "/", and the new subset must have absolute paths.
        name: Name of the new subset.

    Returns:
        A dict from the name of a subset to its number of pairs.

    Raises:
        ValueError: If pairs of one subset have different settings. If ``root`` is None and the new subset has a
            relative path. If ``to_line`` raises it, for example for an image outside the image folder.
    """
    target = Path(folder)
    default_root = "/" if root is None else os.path.abspath(root)
    metas: dict[str, dict[str, Any]] = {}
    files: dict[str, IO[bytes]] = {}
    taken: set[str] = set()
    with contextlib.ExitStack() as stack:
        for pair in pairs:
            source = pair.source if has_subset(pair.source) else {}
            subset = source.get("subset", name)
            if (
                root is None
                and not source
                and (relative := [path for path in pair.media_paths if not os.path.isabs(path) and not is_url(path)])
            ):
                raise ValueError(f"images must be absolute where no root is given, got {describe_source(relative[0])}")
            settings = {"root": source.get("root", default_root), **source.get("settings", {})}
            if not source:
                settings |= {"data_augment": False, "repeat_time": 1}
            if subset not in metas:
                annotation = _file_name(subset, taken)
                metas[subset] = {**settings, "annotation": f"annotations/{annotation}", "length": 0}
                files[subset] = stack.enter_context(atomic_write(target / "annotations" / annotation))
            meta = metas[subset]
            if {key: value for key, value in meta.items() if key not in _FILE_SETTINGS} != settings:
                raise ValueError(f"{subset}: pairs of one subset must share its settings, got {settings} and {meta}")
            files[subset].write(to_line(pair, settings["root"]))
            meta["length"] += 1
    write_json(target / "meta.json", metas)
    return {subset: meta["length"] for subset, meta in metas.items()}


def has_subset(source: Mapping[str, Any]) -> bool:
    """Returns whether ``Pair.source`` names the MMPR subset that a pair was read from."""
    texts = isinstance(source.get("subset"), str) and isinstance(source.get("root"), str)
    return texts and isinstance(source.get("settings", {}), dict)


def _file_name(subset: str, taken: set[str]) -> str:
    """Returns a file name for a data set, different from all names in ``taken``, and adds it to ``taken``."""
    plain = re.sub(r"[^\w.-]", "_", subset, flags=re.ASCII).lstrip(".")[:100] or "subset"
    for suffix in itertools.chain([""], (f"_{number}" for number in itertools.count(2))):
        if (candidate := f"{plain}{suffix}.jsonl").lower() not in taken:
            taken.add(candidate.lower())
            return candidate
    raise AssertionError
