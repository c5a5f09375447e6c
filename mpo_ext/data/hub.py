"""Loads parquet files, and datasets of the Hugging Face hub, with the package datasets."""

import collections
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_ext.data.containers import COMPRESSIONS
from mpo_ext.data.hf import PARQUET, is_saved_dataset, require_datasets
from mpo_ext.files import check_no_pipe

if TYPE_CHECKING:
    import datasets

_PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_READ_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml")  # of pairs, questions or settings
_ROW_FILES = (".jsonl", ".csv", ".tsv")
_SHOWN_FILES = 10
_BATCH_ROWS = 1000  # without a number, the package datasets raises an error for a file of 0 rows
_EXTENSION = re.compile(r"\.[A-Za-z]\w*$")


def hub_id(path: str) -> str | None:
    """Returns the id of a dataset on the Hugging Face hub, or None if ``path`` means a local path.

    ``hf://owner/name`` and ``hf://datasets/owner/name`` always mean the dataset ``owner/name``. Without ``hf://``,
    ``owner/name`` means a dataset only if three conditions hold: ``name`` has no file extension, no file or folder
    ``owner/name`` exists, and no folder ``owner`` exists.

    Raises:
        ValueError: If the path begins with ``hf://`` but does not name a dataset. Also raised if the path is a pipe or
            a device, because files are read more than once.
    """
    if path.startswith(_PREFIX):
        name = path.removeprefix(_PREFIX).removeprefix("datasets/").strip("/")
        if not _ID.fullmatch(name):
            raise ValueError(f"path must read hf://owner/name, got {path}")
        return name
    check_no_pipe("path", path, ": write its rows to a file")
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
            belongs to the split "test". If a README.md lists the files of each split (``configs``), only these files
            are read. A file has only the split "train".
        split: Name of the split; None: the only split.
        config: Name of the configuration of a folder; None: the only or default configuration.

    Raises:
        ImportError: If Hugging Face datasets is not installed.
        ValueError: If the files cannot be read as one table, or there is no split with the name ``split``. Also raised
            if ``split`` is None and there are several splits. Without a list in README.md, also raised if a file
            belongs to no split or to several splits, or the folder has rows in other files, such as .jsonl files.
    """
    datasets = require_datasets()
    problem = None
    options = {"batch_size": _BATCH_ROWS}
    try:
        if not os.path.isdir(path):
            builder = datasets.load_dataset_builder("parquet", data_files=_exact_files({"train": [path]}), **options)
            split = None if split == "train" else split
        elif _lists_files(path):
            builder = datasets.load_dataset_builder(path, name=config)
            problem = _listed_problem(builder, path)
        else:
            files = _files_by_split(path)
            problem = _split_problem(files, path)
            builder = datasets.load_dataset_builder("parquet", data_files=_exact_files(files), **options)
        if problem is None:
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    except Exception as error:  # datasets and pyarrow raise many types
        cause = error.__cause__ or error
        raise ValueError(f"path must hold parquet files, got {path}: {_one_line(cause)}") from error
    if problem is not None:
        raise ValueError(problem)
    return pick_split(path, loaded, split)


def _exact_files(files: dict[str, list[str]]) -> Any:
    """Returns the argument ``data_files`` of the package datasets for the files of each split.

    The package reads texts as patterns: ``run[1].parquet`` would mean ``run1.parquet``. This function returns lists of
    files, each with its modification time, by which the cache of the package detects a changed file.
    """
    from datasets.data_files import DataFilesList

    for path in (path for paths in files.values() for path in paths):
        if "::" in os.path.abspath(path):  # the package would read the file whose path is the text before "::"
            raise ValueError(f"the path of a parquet file must not hold '::', got {path}")
    return {
        split: DataFilesList(list(map(os.path.abspath, paths)), [(str(os.stat(path).st_mtime),) for path in paths])
        for split, paths in files.items()
    }


def _lists_files(folder: str) -> bool:
    """Returns whether a folder has a README.md that lists the data files of each split, in ``configs``."""
    from huggingface_hub import DatasetCard

    readme = Path(folder, "README.md")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    configs = DatasetCard(text).data.to_dict().get("configs") if "configs" in text else None
    return any("data_files" in entry or "data_dir" in entry for entry in configs or ())


def _listed_problem(builder: Any, folder: str) -> str | None:
    """Returns an error message if a README.md lists other files than parquet files of its folder, otherwise None.

    ``builder`` is the dataset builder of the folder.
    """
    files = [str(file) for files in builder.config.data_files.values() for file in files]
    inside = os.path.join(os.path.realpath(folder), "")
    for file in files:
        # Not inside, for example, if the name of the folder has a pattern such as "[1]".
        if not file.lower().endswith(PARQUET) or not file.startswith(inside):
            return f"path must be a folder whose README.md lists parquet files of this folder, got {folder}: {file}"
    if len(files) > len(set(files)):
        return f"path must be a folder whose README.md lists each file once, got {folder}"
    return None


def _files_by_split(folder: str) -> dict[str, list[str]]:
    """Returns the parquet files of a folder by split, in the order in which the package datasets reads them.

    A file is in each split whose name is in the path of the file. A parquet file may be in no split.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    with tempfile.TemporaryDirectory(prefix="mpo-ext-") as mirror:  # the package would also count other files
        mirror = os.path.realpath(mirror)
        for name in _parquet_files(folder):
            place = Path(mirror, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        splits = DataFilesDict.from_patterns(get_data_patterns(mirror), base_path=mirror)
    names = {split: dict.fromkeys(os.path.relpath(file, mirror) for file in files) for split, files in splits.items()}
    return {str(split): [os.path.join(folder, name) for name in files] for split, files in names.items()}


def _split_problem(files: dict[str, list[str]], folder: str) -> str | None:
    """Returns an error message if the rows of a file are in no split or in several splits, otherwise None.

    ``files`` are the parquet files of the folder by split.
    """
    used = collections.Counter(file for names in files.values() for file in names)
    ignored = [name for name in _parquet_files(folder) if os.path.join(folder, name) not in used]
    advice = "rename the files, or list the files of each split in README.md (configs)"
    if ignored:
        return (
            f"path must be a folder in which the name of each parquet file has a split, such as train or test, or no "
            f"name has one; got {folder}, of which {', '.join(sorted(ignored)[:3])} would be left out: {advice}"
        )
    if shared := [os.path.relpath(file, folder) for file, count in used.items() if count > 1]:
        names = ", ".join(files)
        return (
            f"path must be a folder in which each parquet file belongs to one split, got {folder}, of which "
            f"{', '.join(sorted(shared)[:3])} belongs to several of {names}: {advice}"
        )
    if others := sorted(name for name in _file_names(folder) if _suffix(name) in _ROW_FILES):
        return (
            f"path must be a folder in which only parquet files have rows, got {folder}, of which "
            f"{', '.join(others[:3])} would be left out: name a file, or list the files in README.md (configs)"
        )
    return None


def _file_names(folder: str) -> Iterator[str]:
    """Yields the relative path of each file of a folder at any depth, also in linked folders. Skips hidden files."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(place, name)):
                yield os.path.relpath(os.path.join(place, name), folder)


def _parquet_files(folder: str) -> Iterator[str]:
    return (name for name in _file_names(folder) if name.lower().endswith(PARQUET))


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
    return next(_parquet_files(folder), None) is not None


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
    return _suffix(name) in _READ_FILES


def _suffix(name: str) -> str:
    """Returns the suffix of a file name in lower case. The suffix of a compression, such as ".gz", is ignored."""
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem if suffix in COMPRESSIONS else name)[1].lower()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
