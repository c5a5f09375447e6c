"""Atomic writing of folders by all ranks, for checkpoints and the exported model.

A folder is written as ``NAME.tmp-...``. It is renamed to its final name ``NAME`` when all of its files are on disk. An
existing folder ``NAME`` is first renamed to ``NAME.replaced-...``, and deleted at the end.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from mpo_ext.files import sync_folder, write_and_sync

LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|replaced|deleted)-[0-9a-f]{12}")
_FORMAT = "mpo_ext.checkpoint/1"
_MANIFEST = "manifest.json"
_LISTED_NAMES = 5
_CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """Raised if a checkpoint or export cannot be written or read. If one rank fails, all ranks raise this error."""


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Describes a checkpoint and lists its files. A folder without a manifest is not a checkpoint.

    Attributes:
        number: Running number of the checkpoint; the newest checkpoint has the highest number.
        step: Number of optimizer steps done before the save.
        world_size: Number of ranks that wrote the checkpoint.
        score: Evaluation score at this step, or None.
        files: Maps the path of each file within the folder to the size in bytes.
        deepspeed: Whether DeepSpeed wrote the tensors.
        digests: Maps the path of each file within the folder to the SHA-256. None in checkpoints of earlier versions.
        evaluation: Number of the evaluation that gave the score. Scores of different evaluations cannot be compared.
            0 in checkpoints of earlier versions.
    """

    number: int
    step: int
    world_size: int
    score: float | None
    files: dict[str, int]
    deepspeed: bool
    digests: dict[str, str] | None = None
    evaluation: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Returns the manifest of a folder.

        Raises ``CheckpointError`` if the manifest is missing or invalid, or if a listed file is missing or has another
        size. The contents of the files are not read; ``check_contents`` reads them.
        """
        path = folder / _MANIFEST
        try:
            values = json.loads(path.read_bytes())
            digest = values.pop("digest", None) if isinstance(values, dict) else None
            if digest is not None and digest != _digest_of(values):
                raise ValueError("another digest than the file states")
        except OSError as error:
            raise CheckpointError(f"a checkpoint must have a manifest, got {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"a manifest must be JSON as it was written, got {error} in {path}") from error
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
        """Writes the manifest into a folder and syncs it to disk."""
        values = {"format": _FORMAT, **dataclasses.asdict(self)}
        text = json.dumps({**values, "digest": _digest_of(values)}, indent=1, allow_nan=False)
        write_and_sync(folder / _MANIFEST, text.encode())

    def check_contents(self, accelerator: Any, folder: Path) -> None:
        """Raises ``CheckpointError`` on all ranks if the SHA-256 of a file differs from the manifest.

        All ranks must call this method.
        """
        with together(accelerator):
            for name, digest in file_digests(accelerator, folder, sorted(self.digests or ())).items():
                if digest != (self.digests or {})[name]:
                    raise CheckpointError(
                        f"files of a checkpoint must be as they were written, got other contents in {folder / name}"
                    )


def _digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_digests(accelerator: Any, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Hashes this rank's part of the files ``names``. The ranks together hash all files.

    Returns a dict from file name to SHA-256 for this rank's part.
    """
    return {
        name: _file_digest(folder / name) for name in names[accelerator.process_index :: accelerator.num_processes]
    }


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of every file below a folder, by path within the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@contextlib.contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Raises ``CheckpointError`` on all ranks if the ``with`` block fails on any rank.

    The message holds the errors of all ranks. All ranks must run the block.
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
    """Returns the messages of an exception. A ``CheckpointException`` of torch has a message for each failed rank."""
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
    """Returns a new temporary path beside ``path``, the same on all ranks. All ranks must call this function."""
    from accelerate.utils import broadcast_object_list

    return _beside(path, "tmp", broadcast_object_list([secrets.token_hex(6)])[0])


def _beside(path: Path, kind: str, token: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{token}")


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Deletes the temporary folders that a killed process left in ``folder``.

    ``names`` is a pattern for the final folder names, such as ``step-00000200``. If there is no folder ``NAME``, the
    folder ``NAME.replaced-...`` is renamed to ``NAME`` instead.
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
    """Renames the folder ``partial`` to ``path``. If ``path`` already exists, the old folder is deleted.

    ``partial`` must be complete and synced to disk. If this process is killed, ``remove_leftovers`` cleans up later.
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
    """Renames a folder to a temporary name and then deletes it.

    If the process is killed, the temporary name shows that the folder is incomplete.
    """
    doomed = _beside(path, "deleted", secrets.token_hex(6))
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def to_bytes(value: Any) -> bytes:
    """Returns the bytes that ``torch.save`` writes for a value.

    Callers write these bytes to a file themselves, because ``torch.save`` would hide the ``OSError`` of a full disk.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def free_mib(folder: Path) -> int:
    """Returns the free space in MiB on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def list_names(names: Iterable[str]) -> str:
    """Returns the first five names in sorted order as text, such as "a, b, c, d, e and 2 more"."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED_NAMES} more" if len(ordered) > _LISTED_NAMES else ""
    return ", ".join(ordered[:_LISTED_NAMES]) + more
