"""Loads parquet files, and datasets of the Hugging Face hub, with the package datasets."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_ext.data.containers import COMPRESSIONS
from mpo_ext.data.hf import is_saved_dataset, require_datasets

if TYPE_CHECKING:
    import datasets

_PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_READ_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml")  # of pairs, questions or settings
_SHOWN_FILES = 10
_EXTENSION = re.compile(r"\.[A-Za-z]\w*$")


def hub_id(path: str) -> str | None:
    """Returns the id of a dataset on the Hugging Face hub, or None if ``path`` means a local path.

    ``hf://owner/name`` and ``hf://datasets/owner/name`` always mean the dataset ``owner/name``. Without ``hf://``,
    ``owner/name`` means a dataset only if three conditions hold: ``name`` has no file extension, no file or folder
    ``owner/name`` exists, and no folder ``owner`` exists.

    Raises:
        ValueError: If the path begins with ``hf://`` but does not name a dataset.
    """
    if path.startswith(_PREFIX):
        name = path.removeprefix(_PREFIX).removeprefix("datasets/").strip("/")
        if not _ID.fullmatch(name):
            raise ValueError(f"path must read hf://owner/name, got {path}")
        return name
    is_id = _ID.fullmatch(path) is not None and _EXTENSION.search(path) is None
    return path if is_id and not os.path.exists(path) and not os.path.isdir(path.split("/")[0]) else None


def missing_path(path: str) -> FileNotFoundError:
    """Returns a FileNotFoundError for a path that does not exist.

    The message gives a hint if the path may mean a dataset on the Hugging Face hub.
    """
    owner = path.split("/")[0]
    if _ID.fullmatch(path) is None:
        return FileNotFoundError(f"path must exist, got {path}")
    if _EXTENSION.search(path) is not None and not os.path.isdir(owner):  # a missing file, not a dataset of the hub
        return FileNotFoundError(f"path must exist, got {path}: relative paths start in {os.getcwd()}")
    return FileNotFoundError(
        f"path must exist, got {path}: no file or folder has this path, and it is not read as a dataset of the "
        f"Hugging Face hub, because {owner} is a folder here; "
        f"hf://{path} names the dataset of the hub"
    )


def load_hub(
    path: str, name: str, *, split: str | None, revision: str | None, config: str | None
) -> "datasets.Dataset":
    """Loads a split of a dataset from the Hugging Face hub, or from the cache of the package datasets.

    Args:
        path: Path that the user gave, for error messages.
        name: Id of the dataset.
        split: Name of the split; None: the only split.
        revision: Branch, tag or commit; None: the default branch.
        config: Name of the configuration; None: the only or default configuration.

    Raises:
        ImportError: If Hugging Face datasets is not installed.
        ValueError: If the dataset cannot be loaded, or has no split with the name ``split``. Also raised if ``split``
            is None and there are several splits.
    """
    datasets = require_datasets()
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        loaded = datasets.load_dataset(name, name=config, revision=revision)
    except Exception as error:  # datasets and huggingface_hub raise many types
        state = "loading it from the hub failed"
        if offline:
            state = "the hub is offline (HF_HUB_OFFLINE) and the cache does not hold it"
        here = "" if path.startswith(_PREFIX) else f"no file or folder {path} exists here, and "
        raise ValueError(
            f"path must be a file or folder here, or a dataset of the Hugging Face hub, got {path}: {here}{state}: "
            f"{type(error).__name__}: {_one_line(error.__cause__ or error)}"
        ) from error
    return pick_split(path, loaded, split)


def load_parquet(path: str, *, split: str | None, config: str | None = None) -> "datasets.Dataset":
    """Loads a split of a parquet file, or of a folder of parquet files, as a dataset.

    Args:
        path: Path of the file or folder. A folder is read like a dataset of the hub: ``test-00000-of-00002.parquet``
            belongs to the split "test". A file has only the split "train".
        split: Name of the split; None: the only split.
        config: Name of the configuration of a folder; None: the only or default configuration.

    Raises:
        ImportError: If Hugging Face datasets is not installed.
        ValueError: If the files cannot be read as one table, a file belongs to no split, or there is no split with the
            name ``split``. Also raised if ``split`` is None and there are several splits.
    """
    datasets = require_datasets()
    loaded: Any = None
    ignored: list[str] = []
    try:
        if os.path.isdir(path):
            builder = datasets.load_dataset_builder(path, name=config)
            ignored = _ignored_files(builder, path)
            if not ignored:
                builder.download_and_prepare()
                loaded = builder.as_dataset()
        else:
            loaded = datasets.load_dataset("parquet", data_files={"train": [os.path.abspath(path)]})
            split = None if split == "train" else split
    except Exception as error:  # datasets and pyarrow raise many types
        cause = error.__cause__ or error
        raise ValueError(f"path must hold parquet files, got {path}: {_one_line(cause)}") from error
    if ignored:
        raise ValueError(
            f"path must be a folder in which the name of each parquet file has a split, such as train or test, or no "
            f"name has one; got {path}, of which {', '.join(ignored[:3])} would be left out: rename the files"
        )
    return pick_split(path, loaded, split)


def _ignored_files(builder: Any, path: str) -> list[str]:
    """Returns the parquet files of a folder that are in no split of the dataset, as relative paths.

    ``builder`` is the dataset builder of the folder. If the folder has a README.md, the result is [], because a
    README.md may list the files of each split.
    """
    if os.path.exists(os.path.join(path, "README.md")):
        return []
    used = {os.path.realpath(str(file)) for files in builder.config.data_files.values() for file in files}
    found = [file for file in Path(path).rglob("*.parquet") if not file.name.startswith(".")]
    return sorted(str(file.relative_to(path)) for file in found if os.path.realpath(file) not in used)


def pick_split(path: str, loaded: Any, split: str | None) -> "datasets.Dataset":
    """Returns a split of a loaded dataset.

    Args:
        path: Path of the dataset in error messages.
        loaded: Splits of the dataset, by name.
        split: Name of the split; None: the only split.

    Raises:
        ValueError: If there is no such split, or ``split`` is None and there are several splits.
    """
    names: Sequence[str] = list(map(str, loaded))
    if split is None and len(names) == 1:
        return loaded[names[0]]
    if split not in names:
        raise ValueError(f"split must be one of {', '.join(names)} for {path}, got {split}: name it (--split, split)")
    return loaded[split]


def has_parquet(folder: str) -> bool:
    """Returns whether a folder holds parquet files, at any depth."""
    return next(Path(folder).rglob("*.parquet"), None) is not None


def describe_folder(folder: str | os.PathLike[str]) -> str:
    """Describes a folder for an error message, when a file was expected instead.

    The description lists files of the folder, or tells how to convert a saved dataset to a file.
    """
    text = f"the folder {os.fspath(folder)}"
    if is_saved_dataset(os.fspath(folder)):
        return f"{text} of a dataset that save_to_disk wrote: write it as a file with the dataset's to_parquet"
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and _is_read(entry.name))
    except OSError:
        return text
    if not names:
        return f"{text}, which contains no {', '.join(_READ_FILES[:5])} file"
    more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
    return f"{text}, which contains {', '.join(names[:_SHOWN_FILES])}{more}: name a file"


def _is_read(name: str) -> bool:
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem if suffix in COMPRESSIONS else name)[1].lower() in _READ_FILES


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
