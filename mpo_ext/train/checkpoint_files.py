"""Folders that all ranks write and that appear whole or not at all: those of checkpoints and of the exported model.

A folder is written under a temporary name (``.tmp-``) and renamed once all of it is on the disk. A folder that it
replaces is renamed first (``.replaced-``) and deleted last.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from mpo_ext.files import sync_folder, write_and_sync

LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|replaced|deleted)-[0-9a-f]{12}")
_FORMAT = "mpo_ext.checkpoint/1"
_MANIFEST = "manifest.json"
_LISTED_NAMES = 5


class CheckpointError(RuntimeError):
    """A checkpoint or an export could not be written or read. All ranks raise it when one of them fails."""


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """The list of a checkpoint's files. A folder is a checkpoint if it has one.

    Attributes:
        number: Counts the checkpoints of a folder in the order of writing; the newest has the highest.
        step: Optimizer step after which it was written.
        world_size: Number of ranks that wrote it.
        score: Score of the evaluation at this step.
        files: Sizes in bytes by path within the folder.
        deepspeed: Whether DeepSpeed wrote the tensors.
    """

    number: int
    step: int
    world_size: int
    score: float | None
    files: dict[str, int]
    deepspeed: bool

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a folder and compares the sizes of its files.

        Raises:
            CheckpointError: If the manifest is missing or malformed, or a file is missing or has another size.
        """
        path = folder / _MANIFEST
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"a checkpoint must have a manifest, got {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"a manifest must be JSON, got {error} in {path}") from error
        version = values.pop("format", None) if isinstance(values, dict) else None
        if version != _FORMAT:
            raise CheckpointError(f"a checkpoint must be of format {_FORMAT!r}, got {version!r} in {path}")
        try:
            manifest = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"a manifest must have the fields of {_FORMAT}, got {error} in {path}") from error
        for name, size in manifest.files.items():
            try:
                actual = f"{(folder / name).stat().st_size:,} bytes"
            except OSError as error:
                actual = str(error.strerror)
            if actual != f"{size:,} bytes":
                raise CheckpointError(
                    f"files of a checkpoint must be as its manifest says, {size:,} bytes in {folder / name}, "
                    f"got {actual}"
                )
        return manifest

    def write(self, folder: Path) -> None:
        """Writes the manifest into a folder that has none."""
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1, allow_nan=False)
        write_and_sync(folder / _MANIFEST, text.encode())


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of every file below a folder, by its path within the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@contextlib.contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Runs the block on every rank, then raises on all of them the errors of any.

    Raises:
        CheckpointError: With the errors of all ranks.
    """
    from accelerate.utils import gather_object

    caught: BaseException | None = None
    texts: list[str] = []
    try:
        yield
    except (Exception, CheckpointException) as error:
        caught, texts = error, _error_texts(error, accelerator)
    failures = dict.fromkeys(gather_object(texts))
    if failures:
        raise CheckpointError("; ".join(failures)) from caught


def _error_texts(error: BaseException, accelerator: Any) -> list[str]:
    """Returns type, message and rank of an error; torch collects the errors of several ranks in one exception."""
    if isinstance(error, CheckpointException):
        failures = {rank: inner for rank, (inner, _) in error.failures.items()}
    else:
        failures = {accelerator.process_index: error}
    texts = []
    for rank, inner in failures.items():
        text = str(inner) if isinstance(inner, CheckpointError) else f"{type(inner).__name__}: {inner}"
        texts.append(f"{text} (rank {rank})" if accelerator.num_processes > 1 else text)
    return texts


def temporary_path(path: Path) -> Path:
    """Returns a temporary name beside a path, the same on all ranks. All ranks call it."""
    from accelerate.utils import broadcast_object_list

    return _beside(path, "tmp", broadcast_object_list([secrets.token_hex(6)])[0])


def _beside(path: Path, kind: str, token: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{token}")


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Removes the leftovers of a killed process, or finishes its renaming.

    Args:
        folder: Folder to look in.
        names: Final names of the leftovers to remove.
    """
    for path in list(folder.iterdir()):
        leftover = LEFTOVER.fullmatch(path.name)
        if leftover is None or not names.fullmatch(leftover["name"]):
            continue
        target = folder / leftover["name"]
        if leftover["kind"] == "replaced" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path)


def move_into_place(partial: Path, path: Path) -> None:
    """Renames a complete folder, synced to the disk, to its final name: now it is visible.

    A folder that has the name is deleted afterwards; if the process is killed between, ``remove_leftovers`` does it.
    """
    old = _beside(path, "replaced", secrets.token_hex(6))
    replaces = path.exists()
    if replaces:
        os.rename(path, old)
    os.rename(partial, path)
    sync_folder(path.parent)
    if replaces:
        shutil.rmtree(old)


def delete_folder(path: Path) -> None:
    """Renames a folder, so that it disappears at once, and deletes it."""
    doomed = _beside(path, "deleted", secrets.token_hex(6))
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def to_bytes(value: Any) -> bytes:
    """Serializes with ``torch.save``, in memory: a full disk then raises OSError instead of an error of torch."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def free_mib(folder: Path) -> int:
    """Returns the free space of the disk that a folder, existing or not, is on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def list_names(names: Iterable[str]) -> str:
    """Returns the first names in order, and the number of the others, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED_NAMES} more" if len(ordered) > _LISTED_NAMES else ""
    return ", ".join(ordered[:_LISTED_NAMES]) + more
