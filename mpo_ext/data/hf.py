"""Reads Hugging Face datasets with rows of any supported format, and writes datasets in TRL's preference format."""

import copy
import datetime
import decimal
import functools
import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mpo_ext.checks import check_choice, check_index, install_hint, shorten
from mpo_ext.data.media import check_media, drop_fields, refuse_bytes
from mpo_ext.data.paths import RootMap, map_root, map_roots
from mpo_ext.data.reader import Location, PairSequence, raise_bad_line
from mpo_ext.data.records import Pair
from mpo_ext.data.trl import Kind, from_trl, has_bytes, to_trl
from mpo_ext.files import atomic_write, check_replaceable, sync_folder, sync_tree
from mpo_ext.images import image_exists, is_url, local_path, read_image

if TYPE_CHECKING:
    import datasets

PARQUET = ".parquet"
_SAMPLED_ROWS = 1000
_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "webp": ".webp", "gif": ".gif", "bmp": ".bmp"}


def require_datasets() -> Any:
    """Imports the package ``datasets``, and returns the module.

    Raises:
        ImportError: If the package is missing. The message tells how to install it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Hugging Face datasets is missing: {install_hint('data')}") from error
    return datasets


def to_dataset(
    pairs: Callable[[], Iterator[Pair]] | Sequence[Pair],
    kind: Kind = "conversational",
    *,
    embed: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "datasets.Dataset":
    """Builds a dataset for TRL's trainers. The dataset is stored on disk and memory-mapped.

    Args:
        pairs: The pairs, or a function that returns a new iterator over the pairs. The pairs are read several times.
        kind: "standard" or "conversational".
        embed: Whether image files are stored as bytes. False: they are stored as paths. Images that are given as URLs
            are always stored as bytes.
        cache_dir: Folder in which to build the dataset. None: a temporary folder, deleted when the process exits.

    Returns:
        The dataset. If no pair has images, the dataset has no column ``images``, because TRL requires an image model
        for a dataset with this column.

    Raises:
        ImportError: If Hugging Face datasets is not installed.
        OSError: If an image to store as bytes cannot be read.
        ImageError: If an image to store as bytes is not a valid image.
        ValueError: If there are no pairs, if a pair has tools, or if ``to_trl`` raises ValueError for a pair.
    """
    datasets = require_datasets()
    check_choice("kind", kind, get_args(Kind))
    read_all = pairs if callable(pairs) else lambda: iter(pairs)
    if next(iter(read_all()), None) is None:  # the package could not read the dataset
        raise ValueError("pairs of a dataset must hold at least one pair, got none")
    has_images = any(pair.images for pair in read_all())
    text = datasets.Value("string")
    content = datasets.List({"type": text, "text": text}) if has_images else text
    conversational = kind == "conversational"
    columns = {
        "prompt": datasets.List({"role": text, "content": content}) if conversational else text,
        "chosen": datasets.List({"role": text, "content": text}) if conversational else text,
        "rejected": datasets.List({"role": text, "content": text}) if conversational else text,
        **({"images": datasets.List(datasets.Image()), "image_paths": datasets.List(text)} if has_images else {}),
        **dict.fromkeys(("answer_gt", "question", "provenance", "extra"), text),
    }

    def rows() -> Iterator[dict[str, Any]]:
        for pair in read_all():
            row = to_trl(pair, kind, has_images=has_images)
            if "tools" in row:  # their arguments would share columns
                raise ValueError(f"pairs of a dataset must have no tools, got {shorten(row['tools'])}")
            if has_images:
                row["image_paths"] = row["images"]
                row["images"] = [_encoded(path, embed) for path in row["images"]]
            yield {name: row[name] for name in columns}

    if cache_dir is None:
        folder = tempfile.TemporaryDirectory(prefix="mpo-ext-")
        _temporary_folders.append(folder)
        cache_dir = folder.name
    try:
        return datasets.Dataset.from_generator(
            rows,
            features=datasets.Features(columns),
            cache_dir=os.fspath(cache_dir),
            fingerprint=os.urandom(8).hex(),  # the default would pickle the generator with all pairs
            writer_batch_size=100,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # the cause names the pair or the image


_temporary_folders: list[tempfile.TemporaryDirectory] = []


def _encoded(path: str, embed: bool) -> dict[str, Any]:
    if is_url(path):
        return {"path": None, "bytes": read_image(path)}
    if not embed:
        return {"path": path, "bytes": None}
    return {"path": os.path.basename(path), "bytes": read_image(path)}


def save_dataset(
    folder: str | os.PathLike[str], pairs: Callable[[], Iterator[Pair]] | Sequence[Pair], kind: Kind = "conversational"
) -> int:
    """Writes a dataset with its images for ``datasets.load_from_disk``, or a parquet file.

    The output appears only when it is complete. If the writing fails, an existing output stays unchanged.

    Args:
        folder: Folder of the dataset. An existing folder is replaced if it holds only a dataset. If the name ends with
            ".parquet", a parquet file is written instead, for ``datasets.load_dataset``. It replaces an existing file.
            If ``folder`` is a link, the folder or file that it names is written.
        pairs: The pairs, or a function that returns a new iterator over the pairs.
        kind: "standard" or "conversational".

    Returns:
        The number of rows.

    Raises:
        FileExistsError: If ``folder`` is a file, or a folder that holds anything besides a dataset. Also raised if a
            parquet file would replace a folder.
        ValueError: If ``folder`` is the current folder or a mount point. Also raised if ``to_dataset`` raises it.
    """
    target = Path(os.path.realpath(folder))
    is_parquet = Path(folder).suffix.lower() == PARQUET
    if is_parquet and target.is_dir():
        raise FileExistsError(f"out must not be a folder if its name ends with {PARQUET}, got {target}")
    if not is_parquet and target.exists() and not (target.is_dir() and all(map(_is_dataset_file, target.iterdir()))):
        raise FileExistsError(f"folder must be empty or hold only a dataset, got {target}")
    check_replaceable("out", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name[:200]}.", suffix=".tmp", dir=target.parent) as work:
        dataset = to_dataset(pairs, kind, embed=True, cache_dir=Path(work, "cache"))
        written = Path(work, "dataset")
        if is_parquet:
            dataset.to_parquet(str(written))
        else:
            dataset.save_to_disk(str(written))
        sync_tree(written)
        _swap(written, target, Path(work, "old"))
    sync_folder(target.parent)
    return len(dataset)


def _swap(written: Path, target: Path, old: Path) -> None:
    """Renames ``written`` to ``target``. An existing folder ``target`` is first renamed to ``old``.

    A folder cannot be replaced in one step. If the process is killed between the two steps, both folders still exist.
    """
    try:
        if target.is_dir():
            os.rename(target, old)
        os.replace(written, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def _is_dataset_file(path: Path) -> bool:
    """Returns whether a path is a file of a saved dataset: an .arrow file, ``state.json`` or ``dataset_info.json``."""
    return path.is_file() and (path.suffix == ".arrow" or path.name in ("state.json", "dataset_info.json"))


class DatasetPairs(PairSequence):
    """The pairs of a Hugging Face dataset, each read on access.

    Args:
        dataset: The dataset. Its images are not decoded.
        name: Path or name of the dataset, for locations and error messages.
        image_dir: Folder for storing images and videos that rows hold as bytes. None: reading such a row raises
            BadLine.
        root_map: A tuple (old path, new path) for each folder that has moved.
        parse: Function that converts a row to a pair; its argument ``save_image`` stores the bytes of an image.
        ignore: Names of columns and nested fields to remove before a row is parsed.

    Attributes:
        parse: The argument ``parse``; it may be replaced before the first read.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        *,
        name: str = "dataset",
        image_dir: str | os.PathLike[str] | None = None,
        root_map: RootMap = (),
        parse: Callable[..., Pair] = from_trl,
        ignore: Collection[str] = (),
    ) -> None:
        dataset = dataset.remove_columns([column for column in dataset.column_names if column in ignore])
        self._features = _undecoded(dataset.features)
        dataset = dataset.with_format("arrow")  # the stored values, without opening the images
        self._images: datasets.Dataset | None = None
        if "image_paths" in dataset.features and "images" in dataset.features:  # the bytes are seldom needed
            self._images = dataset.select_columns(["images"])
            dataset = dataset.remove_columns(["images"])
        self._dataset = dataset
        self._name, self._root_map = name, tuple(root_map)
        self._image_dir = None if image_dir is None else Path(image_dir)
        self.parse, self._ignore = parse, frozenset(ignore)

    @property
    def files(self) -> list[str]:
        """Paths of the files that hold the rows; empty for a dataset in memory."""
        return [entry["filename"] for entry in self._dataset.cache_files]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> Pair:
        where = self.locate(index)
        with raise_bad_line(where):
            row = self._row(self._dataset, where.line - 1)
            if self._images is not None:
                row = self._with_images(row, self._images, where.line - 1)
            if self._ignore:
                row = drop_fields(row, self._ignore)
            save_image = None if self._image_dir is None else functools.partial(save_bytes, self._image_dir)
            refuse_bytes(row)
            pair = check_media(row, self.parse(row, save_image=save_image))
            return map_roots(pair, self._root_map)

    def _row(self, dataset: "datasets.Dataset", index: int) -> dict[str, Any]:
        stored = dataset[index].to_pylist()[0]
        return {name: _plain(value) for name, value in self._features.decode_example(stored).items()}

    def _with_images(self, row: dict[str, Any], dataset: "datasets.Dataset", index: int) -> dict[str, Any]:
        """Returns a row of a dataset with the columns ``images`` and ``image_paths``, with the images to read.

        ``to_dataset`` writes both columns. For an image whose file exists, the path is used, otherwise the bytes.

        Args:
            row: The row without ``images``.
            dataset: The column ``images``.
            index: Index of the row.
        """
        paths = row.get("image_paths") or []
        if self.parse is not from_trl:  # the other formats have no column ``image_paths``
            return {**row, **self._row(dataset, index)}
        if paths and (not isinstance(paths, list) or all(map(self._exists, paths))):  # from_trl refuses a text
            return row
        images = self._row(dataset, index)["images"] or []
        if len(paths) not in (0, len(images)) or (paths and self._image_dir is None):  # the bytes cannot be stored
            return {**row, "images": images}  # from_trl checks the number of images
        chosen = [
            path if path and (self._exists(path) or not has_bytes(image)) else image
            for path, image in zip(paths or [None] * len(images), images, strict=True)
        ]
        return {**row, "images": chosen, "image_paths": None}

    def _exists(self, path: object) -> bool:
        """Returns whether a path of the column ``image_paths`` is absolute and exists."""
        if not isinstance(path, str):
            return False
        path = map_root(local_path(path), self._root_map)
        return (os.path.isabs(path) or is_url(path)) and image_exists(path)

    def locate(self, index: int) -> Location:
        return Location(Path(self._name).name, self._name, check_index(index, len(self)) + 1)

    def sample_row(self) -> dict[str, Any]:
        """Returns an example row for detecting the format.

        Each column has an empty value, such as "" for a text. Only ``system`` and ``history`` have their first value
        that is not empty, because the format depends on whether they are used.
        """
        row = {name: _empty_value(feature) for name, feature in self._features.items()}
        for name in {"system", "history"} & row.keys():
            values = self._dataset.select_columns([name])[:_SAMPLED_ROWS][name].to_pylist()
            row[name] = next(filter(None, values), None)
        return row


def _undecoded(features: Any) -> Any:
    """Returns a copy of a dataset's features in which the decoding of images, audio and video is disabled."""
    if isinstance(features, dict):
        return type(features)({name: _undecoded(feature) for name, feature in features.items()})
    if isinstance(features, list):
        return [_undecoded(feature) for feature in features]
    features = copy.copy(features)
    if hasattr(features, "feature"):
        features.feature = _undecoded(features.feature)
    if hasattr(features, "decode"):
        features.decode = False
    return features


def _empty_value(feature: Any) -> Any:
    is_binary = "binary" in str(getattr(feature, "dtype", ""))
    if type(feature).__name__ in ("Image", "Video") or is_binary:
        return {"bytes": None}
    if isinstance(feature, dict):
        return dict.fromkeys(feature)
    if isinstance(feature, list) or hasattr(feature, "feature"):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return [_empty_value(inner)]
    return ""


def _plain(value: Any) -> Any:
    """Converts a stored value to a JSON value: dates and decimal numbers become texts, and NaN becomes None."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, (datetime.timedelta, decimal.Decimal)) else value


def save_bytes(folder: Path, content: bytes) -> str:
    """Writes the bytes of an image or video to a file named after their hash. Returns the file's absolute path."""
    folder = folder.absolute()  # a relative image path would be read as a path below the root of the source
    suffix = _SUFFIXES.get(_mime(content).removeprefix("image/"), "")
    path = folder / f"{hashlib.blake2b(content, digest_size=12).hexdigest()}{suffix}"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(content)
    return str(path)


def _mime(content: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.get_format_mimetype() or ""
    except Exception:  # PIL raises many types; ``check_pairs`` will report the broken image
        return ""


def load_dataset_folder(path: str | os.PathLike[str], **options: Any) -> DatasetPairs:
    """Opens a dataset folder that ``save_to_disk`` wrote, and returns its pairs.

    ``options`` are arguments of ``DatasetPairs``.

    Raises:
        ImportError: If Hugging Face datasets is not installed.
        ValueError: If the folder does not hold a dataset, or holds a dataset with splits.
    """
    return DatasetPairs(saved_dataset(path), name=os.fspath(path), **options)


def is_saved_dataset(folder: str) -> bool:
    """Returns whether a folder holds a dataset that ``save_to_disk`` of Hugging Face datasets wrote."""
    return any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def saved_dataset(path: str | os.PathLike[str], split: str | None = None) -> "datasets.Dataset":
    """Loads a dataset that ``save_to_disk`` wrote, or one of its splits.

    Args:
        path: Folder of the dataset.
        split: Name of the split; None for a dataset without splits or with one split.

    Raises:
        ImportError: If Hugging Face datasets is not installed.
        ValueError: If the folder does not hold a dataset, or ``split`` does not fit it.
    """
    datasets = require_datasets()
    try:
        dataset = datasets.load_from_disk(os.fspath(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{os.fspath(path)} must be a folder that save_to_disk wrote, or hold parquet files, got {error}"
        ) from None
    if isinstance(dataset, datasets.Dataset):
        if split is not None:
            raise ValueError(f"split must be None for the dataset without splits {os.fspath(path)}, got {split!r}")
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split is None:
        raise ValueError(
            f"{os.fspath(path)} must hold one split: set split (--split), or name its folder, to one of "
            f"{', '.join(map(str, dataset))}"
        )
    check_choice("split", split, map(str, dataset))
    return dataset[split]
