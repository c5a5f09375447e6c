"""Opens preference pairs in any supported format."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ext.checks import check_choice
from mpo_ext.data.containers import as_lines, cache_folder, is_parquet
from mpo_ext.data.formats import FORMATS, ROW_READERS, Format, detect_columns, detect_lines
from mpo_ext.data.hf import DatasetPairs, is_saved_dataset, save_bytes, saved_dataset
from mpo_ext.data.hub import describe_folder, has_parquet, hub_id, load_hub, load_parquet, missing_path
from mpo_ext.data.jsonl import LineFile, parse_pair
from mpo_ext.data.media import is_stored_name
from mpo_ext.data.mmpr import MMPRDataset, MMPRSubset, line_parser, read_annotation
from mpo_ext.data.paths import RootMap, absolute_path, below, path_from, real_path
from mpo_ext.data.reader import MAX_LINE_BYTES, BadLine, Location, PairSequence
from mpo_ext.data.records import Pair
from mpo_ext.images import describe_source, image_exists, local_path, missing_image_advice


@dataclasses.dataclass(frozen=True, slots=True)
class PairSource:
    """The pairs of an opened file, folder or dataset.

    Attributes:
        path: Path that was opened, or ``hf://owner/name``.
        format: Format of the rows; "hf" for all rows of a folder that ``save_to_disk`` wrote.
        pairs: The pairs. Each line occurs once; the ``repeat_time`` of MMPR data sets is ignored.
        root: Folder to which relative image paths are joined.
        subsets: Data sets that an MMPR meta file lists, by name; empty without a meta file.
        on_pair: Function that is called with each pair that is read; None: no call. The pair has absolute image paths.
        is_dataset: Whether the pairs are rows of a dataset or of parquet files. Such rows may hold images as bytes.
        image_dir: Folder for the images and videos that rows hold as bytes; "" if the rows cannot hold bytes.
        selected: Ascending int64 indices ``[n]`` of the lines that ``scan`` and ``scan_for`` visit; None: all lines.
    """

    path: str
    format: Format
    pairs: PairSequence
    root: str
    subsets: dict[str, MMPRSubset]
    on_pair: Callable[[Pair], object] | None = None
    is_dataset: bool = False
    image_dir: str = ""
    selected: np.ndarray | None = None

    @property
    def indices(self) -> Sequence[int] | np.ndarray:
        """Indices of the lines that ``scan`` visits."""
        return range(len(self.pairs)) if self.selected is None else self.selected

    @property
    def files(self) -> list[str]:
        """Paths of the files from which the pairs are read."""
        stored = self.pairs.files if isinstance(self.pairs, DatasetPairs) else []
        return [self.path, *(subset.annotation for subset in self.subsets.values()), *stored]

    def scan(self) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields (location, pair) with absolute image paths, or (location, BadLine), for each line in ``indices``."""
        return map(self.read, map(int, self.indices))

    def read(self, index: int) -> tuple[Location, Pair | BadLine]:
        """Reads the line at an index. Returns (location, pair) with absolute image paths, or (location, BadLine)."""
        where, _, pair = self._read(index)
        return where, pair

    def scan_for(self, folder: str | os.PathLike[str]) -> Iterator[tuple[Location, Pair | BadLine]]:
        """Yields the same as ``scan``, but with the paths of images and videos for a file in ``folder``.

        If ``folder`` is the folder ``root``, all paths stay as in the source. Otherwise, a relative path of the source
        is joined to ``root``. If the joined path lies in ``folder``, it becomes relative to ``folder``. If not, it
        stays absolute. Absolute paths and URLs stay unchanged.

        In MMPR, each subset has its own root. Relative paths stay as in the source if ``folder`` is this root.
        Otherwise, they become absolute.
        """
        folder = os.path.realpath(folder)
        for index in map(int, self.indices):
            where, paths, pair = self._read(index)
            if not isinstance(pair, BadLine) and self.format == "mmpr" and folder == real_path(pair.source["root"]):
                pair = _with_line_paths(pair)
            elif not isinstance(pair, BadLine) and paths != pair.media_paths:
                is_root = folder == real_path(self.root)
                relative = [
                    original if is_root or os.path.isabs(original) else path_from(folder, path)
                    for original, path in zip(paths, pair.media_paths, strict=True)
                ]
                pair = pair.map_paths(dict(zip(pair.media_paths, relative, strict=True)).__getitem__)
            yield where, pair

    def _read(self, index: int) -> tuple[Location, tuple[str, ...], Pair | BadLine]:
        """Reads the line at an index.

        Returns:
            (location, paths, pair). ``paths`` are the media paths as written in the line. The paths in ``pair`` are
            absolute. If the line is bad, ``pair`` is a BadLine.
        """
        where = self.pairs.locate(index)
        try:
            pair = self.pairs.read(index)
        except BadLine as bad:
            return where, (), bad
        paths = pair.media_paths
        if not all(map(os.path.isabs, paths)):
            pair = pair.map_paths(lambda path: absolute_path(path, self.root))
        if self.on_pair is not None:
            self.on_pair(pair)
        subset = pair.source.get("subset")
        if self.format != "mmpr" and isinstance(subset, str):  # the pair was converted from a subset of this name
            where = dataclasses.replace(where, subset=subset)
        return where, paths, pair


def _with_line_paths(pair: Pair) -> Pair:
    """Returns a copy of a pair from MMPR with paths relative to its root. Paths that are absolute in the line stay."""
    source = pair.source
    given = set(_texts([source.get(name) for name in ("paths", "rejected_image", "video")]))
    return pair.map_paths(lambda path: path if path in given else below(path, source["root"]) or path)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield local_path(value)
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


class MissingImages:
    """Counts the missing image and video files of pairs. A file that several pairs use counts once.

    Pass ``add`` as ``on_pair`` to a ``PairSource``.

    Attributes:
        first: Description of the first missing file; "" if no file is missing.
    """

    def __init__(self) -> None:
        self.first = ""
        self._exists: dict[int, bool] = {}
        self._has_videos = False

    def add(self, pair: Pair) -> None:
        """Checks whether the images and videos of a pair exist."""
        self._has_videos = self._has_videos or bool(pair.videos)
        for image in pair.media_paths:
            key = hash(image)
            if key not in self._exists:
                self._exists[key] = image_exists(image)
                if not self._exists[key]:
                    self.first = self.first or f"{describe_source(image)}{missing_image_advice(image)}"

    def warning(self, source: PairSource) -> str | None:
        """Returns a warning with the number of missing files, or None if no file is missing."""
        missing = sum(not exists for exists in self._exists.values())
        if not missing:
            return None
        media = "images and videos" if self._has_videos else "images"
        text = f"warning: {missing:,} of {len(self._exists):,} {media} do not exist as files, as {self.first}"
        return f"{text}: {root_hint(source, media)}"


def root_hint(source: PairSource, media: str) -> str:
    """Returns advice about missing files: the option of ``mpo-ext data`` that sets the folder of the files.

    ``media`` is the kind of files, such as "images".
    """
    if source.format == "hf" or source.subsets:
        return "try --root-map"
    return f"relative {media} start at {source.root}: try --root"


class StoredMedia:
    """Detects whether pairs use images or videos that a ``PairSource`` stored in its folder ``image_dir``.

    A ``PairSource`` stores images and videos there if rows hold them as bytes. Call ``add`` with each pair that is
    read, for example as ``on_pair`` of the source.

    Attributes:
        folder: "" until a pair with a stored image or video is read. After that, ``image_dir``.
    """

    def __init__(self, source: PairSource) -> None:
        self.folder = ""
        self._image_dir = source.image_dir

    def add(self, pair: Pair) -> None:
        """Sets ``folder`` to ``image_dir`` if an image or video of the pair was stored in ``image_dir``."""
        if self._image_dir and not self.folder and any(map(self._is_stored, pair.media_paths)):
            self.folder = self._image_dir

    def _is_stored(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return folder == self._image_dir and is_stored_name(name)


def stored_note(folder: str) -> str:
    """Returns a message that tells the user in which folder images were stored."""
    return f"images that the rows hold as bytes are stored in {folder}"


def open_pairs(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    root: str | os.PathLike[str] | None = None,
    root_map: RootMap = (),
    image_dir: str | os.PathLike[str] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    ignore: Collection[str] = (),
) -> PairSource:
    """Opens preference pairs in any supported format. The returned source reads each pair on access.

    Args:
        path: Path of the pairs, which may be:

            - a file of rows: JSON lines, a JSON array, CSV, TSV or parquet. Text files may be compressed.
            - an MMPR meta file (.json), which lists data sets.
            - a folder of parquet files.
            - a folder that ``save_to_disk`` wrote.
            - a dataset of the Hugging Face hub: ``hf://owner/name`` or ``owner/name`` (see ``hub.hub_id``).

        format: Format of the rows; None: it is detected from the fields. A row in another format raises BadLine when
            it is read.
        root: Folder to which relative image paths are joined. None: the folder that contains ``path``. Exceptions: if
            ``path`` is a folder of parquet files, None means this folder. For a dataset of the hub, None means the
            current folder. Not used for a meta file, which names the image folders.
        root_map: A tuple (old path, new path) for each folder of images or data that has moved.
        image_dir: Folder for storing images and videos that a row holds as bytes. None: ``images`` in
            ``cache_folder()``.
        max_line_bytes: Maximum length of a line in bytes. Reading a longer line raises BadLine.
        split: Name of the split of a dataset; None: the only split.
        revision: Branch, tag or commit of a dataset of the hub; None: the default branch.
        config: Configuration of a dataset of the hub; None: the only or default configuration.
        ignore: Names of fields to remove, at any depth, before a row is converted to a pair.

    Raises:
        OSError: If a file cannot be read, or a converted file cannot be written into the cache.
        ValueError: If an argument is invalid, the format cannot be detected, or the hub has no such dataset.
        ImportError: If the pairs are parquet files or a dataset, and the package datasets is not installed.
    """
    if format is not None:
        check_choice("format", format, FORMATS)
    name = os.fspath(path)
    options = _ReadOptions(
        root_map=tuple(root_map),
        image_dir=Path(image_dir if image_dir is not None else cache_folder() / "images").absolute(),
        max_line_bytes=max_line_bytes,
        ignore=frozenset(ignore),
    )
    dataset_id = hub_id(name)
    if dataset_id is None and not os.path.exists(name):
        raise missing_path(name)
    for setting, value in (("revision", revision), ("config", config)):
        if dataset_id is None and value is not None:
            raise ValueError(f"{setting} must be None for {name}, which is not on the Hugging Face hub, got {value!r}")
    folder = os.path.abspath(os.path.dirname(name) if root is None else root)
    if dataset_id is not None:
        dataset = load_hub(name, dataset_id, split=split, revision=revision, config=config)
        folder = os.path.abspath("." if root is None else root)
        return _open_table(f"hf://{dataset_id}", dataset, format, folder, options)
    if os.path.isdir(name):
        if is_saved_dataset(name):
            return _open_table(name, saved_dataset(name, split), format, folder, options, is_saved=True)
        if not has_parquet(name):
            raise ValueError(
                "path must be a file of pairs, a folder of parquet files, or a folder that save_to_disk wrote, got "
                f"{describe_folder(name)}"
            )
        folder = os.path.abspath(name if root is None else root)
        return _open_table(name, load_parquet(name, split=split), format, folder, options)
    if os.path.isfile(name) and is_parquet(name):
        return _open_table(name, load_parquet(name, split=split), format, folder, options)
    if split is not None:
        raise ValueError(f"split must be None for {name}, which has no splits, got {split!r}")
    return _open_file(name, format, folder, options)


@dataclasses.dataclass(frozen=True, slots=True)
class _ReadOptions:
    root_map: RootMap
    image_dir: Path
    max_line_bytes: int
    ignore: frozenset[str]


def _open_file(name: str, format: Format | None, folder: str, options: _ReadOptions) -> PairSource:
    """Opens a file of rows, or an MMPR meta file, which lists data sets.

    Args:
        name: Path of the file.
        format: Format of the rows; None: it is detected.
        folder: Folder to which relative image paths are joined.
        options: Further options.
    """
    if format == "hf":
        raise ValueError(f"{name} must be a folder that save_to_disk wrote for the format 'hf', got a file")
    lines = as_lines(name, is_meta_allowed=format in (None, "mmpr"))
    if lines is None:
        meta = MMPRDataset(
            name,
            root_map=options.root_map,
            repeat=False,
            max_line_bytes=options.max_line_bytes,
            ignore=options.ignore,
        )
        return PairSource(name, "mmpr", meta, folder, {subset.name: subset for subset in meta.subsets})
    line_options: dict[str, Any] = {
        "max_line_bytes": options.max_line_bytes,
        "name": name,
        "ignore": options.ignore,
    }
    if format is None:
        format = detect_lines(LineFile(lines, _no_pair, **line_options))
    if format == "mmpr":
        pairs = read_annotation(_subset_of(name, folder, lines), root_map=options.root_map, **line_options)
        return PairSource(name, format, pairs, folder, {})
    parse = parse_pair if format == "pairs" else _RowParser(format, options.image_dir)
    pairs = LineFile(lines, parse, root_map=options.root_map, **line_options)
    return PairSource(name, format, pairs, folder, {}, image_dir="" if format == "pairs" else str(options.image_dir))


def _no_pair(values: dict[str, Any], line: str) -> Pair:
    raise AssertionError("a format is detected from the objects of lines")


def _subset_of(name: str, folder: str, annotation: str = "") -> MMPRSubset:
    settings: dict[str, Any] = {"data_augment": False, "repeat_time": 1}
    return MMPRSubset(Path(name).stem, folder, os.path.abspath(annotation), 1, None, settings)


@dataclasses.dataclass(frozen=True, slots=True)
class _RowParser:
    """Converts a row in the format ``format`` to a pair. ``LineFile`` takes an instance as its ``parse`` function."""

    format: str
    image_dir: Path

    def __call__(self, values: dict[str, Any], line: str) -> Pair:
        return ROW_READERS[self.format](values, save_image=functools.partial(save_bytes, self.image_dir))


def _open_table(
    name: str, dataset: Any, format: Format | None, folder: str, options: _ReadOptions, *, is_saved: bool = False
) -> PairSource:
    """Opens the rows of a loaded dataset.

    Args:
        name: Path or hub id of the dataset, for locations and error messages.
        dataset: The dataset.
        format: Format of the rows; None or "hf": it is detected from the columns.
        folder: Folder to which relative image paths are joined.
        options: Further options.
        is_saved: Whether ``save_to_disk`` wrote the dataset.
    """
    table_options: dict[str, Any] = {"name": name, "image_dir": options.image_dir, "ignore": options.ignore}
    pairs = DatasetPairs(dataset, root_map=options.root_map, **table_options)
    if format == "hf" and not is_saved:
        raise ValueError(f"{name} must be a folder that save_to_disk wrote for the format 'hf', got another source")
    rows = format if format not in (None, "hf") else detect_columns(pairs.sample_row(), name)
    if rows == "mmpr":
        pairs = DatasetPairs(dataset, **table_options)  # its parser already applies root_map
        pairs.parse = functools.partial(_parse_mmpr_row, line_parser(_subset_of(name, folder), options.root_map))
    else:
        pairs.parse = _parse_pairs_row if rows == "pairs" else ROW_READERS[rows]
    image_dir = str(options.image_dir)
    return PairSource(name, "hf" if is_saved else rows, pairs, folder, {}, is_dataset=True, image_dir=image_dir)


def _parse_mmpr_row(parse: Callable[[dict[str, Any], str], Pair], row: dict[str, Any], *, save_image: object) -> Pair:
    return parse(row, "")


def _parse_pairs_row(row: dict[str, Any], *, save_image: object) -> Pair:
    return parse_pair(row, "")
