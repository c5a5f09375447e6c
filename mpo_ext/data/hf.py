"""Reads Hugging Face datasets with rows of any supported format, and writes datasets in TRL's preference format."""

import copy
import datetime
import decimal
import functools
import hashlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mpo_ext.checks import check_choice, check_index, install_hint, shorten
from mpo_ext.data.media import check_media, drop_fields, is_empty, refuse_bytes
from mpo_ext.data.paths import RootMap, map_roots
from mpo_ext.data.reader import Location, PairSequence, raise_bad_line
from mpo_ext.data.records import Pair
from mpo_ext.data.trl import Kind, from_trl, to_trl
from mpo_ext.files import atomic_write, sync_folder, sync_tree
from mpo_ext.images import is_url, read_image

if TYPE_CHECKING:
    import datasets

PARQUET = ".parquet"
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
        pairs: The pairs, or a function that returns a new iterator over the pairs. The pairs are read twice.
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
    if next(iter(read_all()), None) is None:
        raise ValueError("pairs must hold at least one pair for a dataset, got none")
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

    The output appears only when it is complete.

    Args:
        folder: Folder of the dataset. An existing folder is replaced if it holds only a dataset. If the name ends with
            ".parquet", a parquet file is written instead, for ``datasets.load_dataset``. It replaces an existing file.
        pairs: The pairs, or a function that returns a new iterator over the pairs.
        kind: "standard" or "conversational".

    Returns:
        The number of rows.

    Raises:
        FileExistsError: If ``folder`` is a file, or a folder that holds anything besides a dataset. Also raised if a
            parquet file would replace a folder.
    """
    target = Path(folder)
    is_parquet = target.suffix.lower() == PARQUET
    if is_parquet and target.is_dir():
        raise FileExistsError(f"out must not be a folder if its name ends with {PARQUET}, got {target}")
    if not is_parquet and target.exists() and not (target.is_dir() and all(map(_is_dataset_file, target.iterdir()))):
        raise FileExistsError(f"folder must be empty or hold only a dataset, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as work:
        dataset = to_dataset(pairs, kind, embed=True, cache_dir=Path(work, "cache"))
        written = Path(work, "dataset")
        if is_parquet:
            dataset.to_parquet(str(written))
        else:
            dataset.save_to_disk(str(written))
        sync_tree(written)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(written, target)
    sync_folder(target.parent)
    return len(dataset)


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
        self._dataset = dataset.with_format("arrow")  # the stored values, without opening the images
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
            stored = self._dataset[where.line - 1]
            columns = {"images", "image_paths"} & self._features.keys() if self.parse is from_trl else ()
            if len(columns) == 2 and not is_empty(stored["image_paths"].to_pylist()):  # the bytes are not needed
                stored = stored.drop_columns(["images"])
            example = self._features.decode_example(stored.to_pylist()[0])
            row = {name: _plain(value) for name, value in example.items()}
            if self._ignore:
                row = drop_fields(row, self._ignore)
            save_image = None if self._image_dir is None else functools.partial(save_bytes, self._image_dir)
            refuse_bytes(row)
            pair = check_media(row, self.parse(row, save_image=save_image))
            return map_roots(pair, self._root_map)

    def locate(self, index: int) -> Location:
        return Location(Path(self._name).name, self._name, check_index(index, len(self)) + 1)

    def sample_row(self) -> dict[str, Any]:
        """Returns an example row for detecting the format. Each column has an empty value, such as "" for a text."""
        return {name: _empty_value(feature) for name, feature in self._features.items() if name not in self._ignore}


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
    if type(feature).__name__ in ("Image", "Video"):
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
