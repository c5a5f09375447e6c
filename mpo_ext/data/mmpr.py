"""MMPR as published: a meta file that names subsets, and one file of JSON lines for each.

The meta file maps a subset's name to ``root`` (folder of its images), ``annotation`` (its .jsonl file), ``length``,
``repeat_time``, ``data_augment`` and ``max_dynamic_patch``. A line has ``question``, ``chosen``, ``rejected``, mostly
``image`` (a path below root, a list of them, "" or nothing) and often ``answer_gt``.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mpo_ext.data.jsonl import MAX_LINE_BYTES, FieldError, LineFile, Location, Pairs, dump_line, map_root, parse_object
from mpo_ext.data.records import SOURCE, Pair
from mpo_ext.files import atomic_write

_FIELDS = ("image", "question", "chosen", "rejected", "answer_gt", "provenance")
_PER_RUN = ("annotation", "length")  # settings of a subset that a written copy has values of its own for


class Subset(NamedTuple):
    """An entry of a meta file.

    Attributes:
        name: Of the subset.
        root: Absolute folder of its images.
        annotation: Absolute path of its lines.
        repeat_time: Below 1 the share of lines that counts, above it how often each counts.
        length: Number of lines that the meta file promises, None if it doesn't say.
        settings: The entry as it stands in the file.
    """

    name: str
    root: str
    annotation: str
    repeat_time: float
    length: int | None
    settings: dict[str, Any]


def read_meta(path: str | os.PathLike[str], *, root_map: Sequence[tuple[str, str]] = ()) -> list[Subset]:
    """Reads and checks a meta file.

    Args:
        path: The meta file. Relative paths in it start at its folder.
        root_map: Pairs of prefixes (old, new) for ``root`` and ``annotation``.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a meta file. The message names the subset, the setting, the rule and the value.
    """
    folder = Path(path).resolve().parent
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.strip():
            raise ValueError("an empty file")
        entries = parse_object(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} must be a meta file in JSON, got {error}") from None
    return [_subset(name, entry, folder, root_map) for name, entry in entries.items()]


def _subset(name: str, entry: object, folder: Path, root_map: Sequence[tuple[str, str]]) -> Subset:
    def refuse(setting: str, rule: str) -> ValueError:
        value = entry.get(setting) if isinstance(entry, dict) else entry
        return ValueError(f"{name}: {setting} must be {rule}, got {value!r}")

    if not isinstance(entry, dict):
        raise refuse("the entry", "an object")
    places = {}
    for setting in ("root", "annotation"):
        value = entry.get(setting)
        if not isinstance(value, str) or "\0" in value:
            raise refuse(setting, "a path")
        places[setting] = os.path.normpath(os.path.join(folder, map_root(value, root_map)))
    if not places["annotation"].endswith(".jsonl"):
        raise refuse("annotation", "a .jsonl file")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not repeat > 0:
        raise refuse("repeat_time", "a positive number")
    if repeat > 1 and repeat != int(repeat):
        raise refuse("repeat_time", "below 1 or a whole number")
    length = entry.get("length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
        raise refuse("length", "a number of lines")
    return Subset(name, places["root"], places["annotation"], repeat, length, entry)


class MMPRDataset(Pairs):
    """The pairs of a meta file, read one by one.

    Args:
        meta: The meta file.
        root_map: Pairs of prefixes (old, new): where the folders in it have moved to.
        repeat: Whether ``repeat_time`` counts. Without it each line is met once.
        seed: Of the subsets drawn for a ``repeat_time`` below 1: the same seed draws the same lines.
        max_line_bytes: A longer line is a bad one.

    Attributes:
        subsets: The entries of the meta file.
        files: Their lines.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If the meta file is none.
    """

    def __init__(
        self,
        meta: str | os.PathLike[str],
        *,
        root_map: Sequence[tuple[str, str]] = (),
        repeat: bool = True,
        seed: int = 0,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self.subsets = read_meta(meta, root_map=root_map)
        self.files = [read_annotation(subset, max_line_bytes=max_line_bytes) for subset in self.subsets]
        self._repeat, self._seed = repeat, seed
        self._picked: list[np.ndarray | None] = []
        self._ends: list[int] | None = None

    def __len__(self) -> int:
        ends = self._sizes()
        return ends[-1] if ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        file, line = self._place(index)
        return file[line]

    def locate(self, index: int) -> Location:
        """Says where a pair stands."""
        file, line = self._place(index)
        return file.locate(line)

    def _place(self, index: int) -> tuple[LineFile, int]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index must be in [{-size}, {size}), got {index}")
        index %= size
        ends = self._sizes()
        subset = bisect.bisect_right(ends, index)
        file, picked = self.files[subset], self._picked[subset]
        position = index - (ends[subset - 1] if subset else 0)
        return file, int(picked[position]) if picked is not None else position % len(file)

    def _sizes(self) -> list[int]:
        """Where each subset ends; indexes the files at its first call."""
        if self._ends is None:
            sizes = []
            for subset, file in zip(self.subsets, self.files, strict=True):
                picked, size = None, len(file)
                if self._repeat and subset.repeat_time < 1:
                    # Of its own generator each, so that a subset's lines don't depend on the others.
                    rng = np.random.default_rng([self._seed, zlib.crc32(subset.name.encode())])
                    picked = np.sort(rng.permutation(size)[: int(size * subset.repeat_time)])
                    size = len(picked)
                elif self._repeat:
                    size *= int(subset.repeat_time)
                self._picked.append(picked)
                sizes.append(size)
            self._ends = list(itertools.accumulate(sizes))
        return self._ends


def read_annotation(subset: Subset, *, max_line_bytes: int = MAX_LINE_BYTES) -> LineFile:
    """Opens the lines of one subset, each once."""
    settings = {name: value for name, value in subset.settings.items() if name not in _PER_RUN}
    parse = _LineParser(subset.name, subset.root, {**settings, "root": subset.root})
    return LineFile(subset.annotation, parse, subset=subset.name, max_line_bytes=max_line_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class _LineParser:
    subset: str
    root: str
    settings: dict[str, Any]

    def __call__(self, values: dict[str, Any], line: str) -> Pair:
        source: dict[str, Any] = {"format": "mmpr", "subset": self.subset, **_prefixed(self.settings)}
        extra = {name: value for name, value in values.items() if name not in _FIELDS}
        if SOURCE in extra:
            raise FieldError("bad field", f"the field {SOURCE!r} must be left to the reader, got {extra[SOURCE]!r}")
        for name in ("question", "chosen", "rejected"):
            if name not in values:
                raise FieldError("bad field", f"{name} must be given, got fields {', '.join(map(repr, values))}")
        if values.get("images"):  # as a field nobody knows it would go along, and no image would be seen
            raise FieldError(
                "bad field",
                f"images of an MMPR line must be named by 'image', got 'images' {str(values['images'])[:80]}: "
                "a file of such lines is read with the format 'pairs' (--from pairs, in a recipe format: pairs)",
            )
        relative, source["image"] = _images(values)
        images = tuple(resolve_image(image, self.root) for image in relative)
        if [_below(image, self.root) for image in images] != relative:
            source["paths"] = relative
        answer = values.get("answer_gt")
        if "answer_gt" in values and not isinstance(answer, str):
            source["answer_gt"] = answer
            answer = None if answer is None else json.dumps(answer, ensure_ascii=False)
        provenance = values.get("provenance", {})
        if not isinstance(provenance, dict) or ("provenance" in values and not provenance):
            extra["provenance"], provenance = provenance, {}
        if line.isascii() and "\\u" in line:
            source["ascii"] = True
        pair = Pair(values["question"], values["chosen"], values["rejected"], images, answer, provenance, extra)
        if list(values) != list(_line(pair, relative, source)):
            source["fields"] = list(values)
        return Pair(pair.question, pair.chosen, pair.rejected, images, answer, provenance, {**extra, SOURCE: source})


def _prefixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The root stands beside the other settings, where a root_map finds it."""
    rest = {name: value for name, value in settings.items() if name != "root"}
    return {"root": settings["root"], **({"settings": rest} if rest else {})}


def _images(values: Mapping[str, Any]) -> tuple[list[str], str]:
    """The images of a line, and the way it writes them."""
    if "image" not in values:
        return [], "absent"
    image = values["image"]
    if image is None:
        return [], "null"
    if isinstance(image, str):
        return ([image], "string") if image else ([], "empty")
    if not isinstance(image, list) or not all(isinstance(path, str) and path for path in image):
        raise FieldError("bad field", f"image must be a path or a list of paths, got {str(image)[:80]!r}")
    return list(image), "list"


def resolve_image(image: str, root: str) -> str:
    """Joins the path of an image to its root.

    Raises:
        FieldError: If it leads out of the root, or is no path.
    """
    joined = os.path.join(root, image)
    normal, base = os.path.normpath(joined), os.path.normpath(root)
    inside = normal.startswith(base if base.endswith("/") else base + "/")
    if not inside or "\0" in image:
        raise FieldError("bad image path", f"image must stay inside {root}, got {image[:120]!r}")
    return joined


def _below(image: str, root: str) -> str | None:
    prefix = root if root.endswith("/") else root + "/"
    return image[len(prefix) :] if image.startswith(prefix) else None


def _line(pair: Pair, relative: Sequence[str], source: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line, in the order of the authors' files."""
    form = source.get("image", "string" if len(relative) == 1 else "list" if relative else "absent")
    if form in ("string", "empty", "null", "absent") and len(relative) != (form == "string"):
        form = "string" if len(relative) == 1 else "list"  # the images are no longer those of the source
    values: dict[str, Any] = {}
    if form != "absent":
        values["image"] = {"string": relative[0] if relative else "", "empty": "", "null": None}.get(form, relative)
    values |= {"question": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    if "answer_gt" in source and pair.answer_gt == _as_text(source["answer_gt"]):
        values["answer_gt"] = source["answer_gt"]
    elif pair.answer_gt is not None:
        values["answer_gt"] = pair.answer_gt
    for name, value in pair.extra.items():
        if name != SOURCE:
            if name in values:
                raise ValueError(f"extra must not hold {name!r}, which the pair itself writes, got {value!r}")
            values[name] = value
    if pair.provenance:
        if "provenance" in values:
            raise ValueError(f"extra must not hold 'provenance' beside the pair's own, got {values['provenance']!r}")
        values["provenance"] = pair.provenance
    return values


def _as_text(answer: object) -> str | None:
    return None if answer is None else json.dumps(answer, ensure_ascii=False)


def to_line(pair: Pair, root: str) -> bytes:
    """Returns the pair as a line of MMPR. A pair that came from such a line gives the same bytes.

    The same bytes if they were written by ``json.dumps`` with its own separators; else the same values.

    Args:
        pair: The pair. Its provenance goes into a field of this name, which other readers pass over.
        root: Absolute folder that the written paths start at.

    Raises:
        ValueError: If an image is not below root, or a field of ``extra`` meets one of the pair.
    """
    source = pair.source
    written = source.get("paths")
    if not written or tuple(os.path.join(root, path) for path in written) != pair.images:
        written = []
        for image in pair.images:
            relative = _below(os.path.normpath(os.path.join(root, image)), root)
            plain = _below(image, root)
            if relative is None:
                raise ValueError(f"images must be below the root {root}, got {image!r}")
            written.append(relative if plain is None else plain)
    values = _line(pair, written, source)
    order = source.get("fields")
    if order and set(order) == set(values):
        values = {name: values[name] for name in order}
    return dump_line(values, ensure_ascii=bool(source.get("ascii")))


def write_mmpr(
    folder: str | os.PathLike[str],
    pairs: Iterable[Pair],
    *,
    root: str | os.PathLike[str] | None = None,
    name: str = "pairs",
) -> dict[str, int]:
    """Writes ``folder/meta.json`` and one file of lines per subset, each whole or not at all, the meta file last.

    Args:
        folder: Where to write.
        pairs: Pairs that were read from MMPR go back into their subsets, with their settings; the others into one.
        root: Image folder of that one; without it "/". Relative images start there.
        name: Of that one.

    Returns:
        The number of pairs of each subset.

    Raises:
        ValueError: If two subsets of one name differ in their settings, or an image is not below its root.
    """
    target = Path(folder)
    default_root = "/" if root is None else os.path.abspath(root)
    metas: dict[str, dict[str, Any]] = {}
    files: dict[str, IO[bytes]] = {}
    taken: set[str] = set()
    with contextlib.ExitStack() as stack:
        for pair in pairs:
            source = pair.source if _has_subset(pair.source) else {}
            subset = source.get("subset", name)
            if root is None and not source and any(not os.path.isabs(image) for image in pair.images):
                raise ValueError(f"images must be absolute where no root is given, got {pair.images}")
            settings = {"root": source.get("root", default_root), **source.get("settings", {})}
            if not source:
                settings |= {"data_augment": False, "repeat_time": 1}
            if subset not in metas:
                annotation = _file_name(subset, taken)
                metas[subset] = {**settings, "annotation": f"annotations/{annotation}", "length": 0}
                files[subset] = stack.enter_context(atomic_write(target / "annotations" / annotation))
            meta = metas[subset]
            if {key: value for key, value in meta.items() if key not in _PER_RUN} != settings:
                raise ValueError(f"{subset}: pairs of one subset must share its settings, got {settings} and {meta}")
            files[subset].write(to_line(pair, settings["root"]))
            meta["length"] += 1
    with atomic_write(target / "meta.json") as file:
        file.write(json.dumps(metas, ensure_ascii=False, indent=2).encode() + b"\n")
    return {subset: meta["length"] for subset, meta in metas.items()}


def _has_subset(source: Mapping[str, Any]) -> bool:
    texts = isinstance(source.get("subset"), str) and isinstance(source.get("root"), str)
    return texts and isinstance(source.get("settings", {}), dict)


def _file_name(subset: str, taken: set[str]) -> str:
    """A name of a file for a subset, whatever the subset is called."""
    plain = re.sub(r"[^\w.-]", "_", subset, flags=re.ASCII).lstrip(".")[:100] or "subset"
    for suffix in itertools.chain([""], (f"_{number}" for number in itertools.count(2))):
        if (candidate := f"{plain}{suffix}.jsonl").lower() not in taken:
            taken.add(candidate.lower())
            return candidate
    raise AssertionError
