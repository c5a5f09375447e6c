"""The checkpoints of a run: where they live, when they become visible, and which of them are kept.

A run resumes from a checkpoint bit for bit. ``checkpoint_state.py`` has what is in it, ``checkpoint_files.py`` how a
folder appears whole or not at all.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mpo_ext.checks import check_integer, check_json
from mpo_ext.files import sync_tree, write_and_sync
from mpo_ext.train.checkpoint_files import (
    LEFTOVER,
    CheckpointError,
    Manifest,
    delete_folder,
    file_sizes,
    free_mib,
    move_into_place,
    remove_leftovers,
    temporary_path,
    together,
)
from mpo_ext.train.checkpoint_state import StateReader, is_deepspeed, save_state

_STATE = "state.json"
_NAME = re.compile(r"step-\d{8,}")
_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run: ``folder/step-00000200`` and so on. All ranks must see the same folder.

    Args:
        folder: Folder of the checkpoints; the first save creates it.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Whether to keep the checkpoint with the best score too. Scores of earlier processes are read from
            the folder.
        higher_is_better: Whether the best score is the highest.

    Raises:
        ValueError: If keep_last is less than 1.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, keep_best: bool = False, higher_is_better: bool = True
    ) -> None:
        check_integer("keep_last", keep_last, least=1)
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.higher_is_better = higher_is_better

    def save(
        self,
        accelerator: Any,
        step: int,
        model: nn.Module,
        optimizer: Any,
        state: dict[str, Any],
        *,
        score: float | None = None,
        reference: nn.Module | None = None,
    ) -> Path:
        """Writes a checkpoint, then deletes the checkpoints that are not kept. All ranks call it.

        It holds the trainable parameters and persistent buffers of the model, the state and settings of the optimizer,
        the state of the loss scaler, ``state``, and the random states of each rank (Python, NumPy, torch, CUDA).
        Saving changes none of them. A checkpoint of the same step is replaced; leftovers of a killed process are
        removed.

        With DeepSpeed its engine writes and reads the tensors. That part follows DeepSpeed's documentation and has not
        been run with DeepSpeed itself.

        Args:
            accelerator: The run's ``Accelerator``.
            step: Optimizer step; names the folder.
            model: Model as ``accelerator.prepare`` returned it.
            optimizer: Optimizer as ``accelerator.prepare`` returned it. Its state must consist of tensors with the
                shape of the parameter or none, like AdamW's.
            state: JSON; the value of the main rank is kept.
            score: Score of the evaluation at this step, finite.
            reference: A reference model that moves during training: all of its parameters are kept too.

        Returns:
            The folder.

        Raises:
            CheckpointError: If any rank fails, for instance because the disk is full. The half-written folder is then
                removed, and all earlier checkpoints remain.
        """
        with together(accelerator):
            _check_arguments(step, state, score)
        path = self.folder / f"step-{step:08d}"
        partial = temporary_path(path)
        try:
            with together(accelerator):
                if accelerator.is_main_process:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    remove_leftovers(self.folder, _NAME)
                    partial.mkdir()
            save_state(accelerator, partial, model, optimizer, reference)
            with together(accelerator):
                if accelerator.is_main_process:
                    write_and_sync(partial / _STATE, json.dumps(state, indent=1).encode())
                    self._publish(accelerator, partial, path, step, score)
        except CheckpointError as error:
            raise CheckpointError(self._after_failure(accelerator, partial, path, error)) from error
        if accelerator.is_main_process:
            self._delete_old()
        accelerator.wait_for_everyone()
        return path

    def load(
        self, accelerator: Any, path: Path, model: nn.Module, optimizer: Any, *, reference: nn.Module | None = None
    ) -> dict[str, Any]:
        """Restores model, optimizer, loss scaler and random states in place, bit for bit. All ranks call it.

        The random states are restored only if the number of ranks is that of the save; otherwise a warning is logged.

        Args:
            accelerator: The run's ``Accelerator``.
            path: A checkpoint, in this folder or elsewhere.
            model: Model as in ``save``, with the same parameters trainable and the same dtypes.
            optimizer: Optimizer as in ``save``, with the same parameter groups. Its state is replaced.
            reference: As in ``save``; must be given if and only if it was given there.

        Returns:
            The state.

        Raises:
            CheckpointError: If files differ from the manifest, or the checkpoint belongs to another model, optimizer
                or precision. Unless reading itself failed, nothing has been changed.
        """
        path = Path(path)
        with together(accelerator):
            manifest = Manifest.read(path)
            state = json.loads((path / _STATE).read_bytes())
            reader = StateReader(accelerator, path, model, optimizer, reference, deepspeed=manifest.deepspeed)
        with together(accelerator):
            reader.restore()
            reader.restore_random_state(manifest.world_size)
        return state

    def state(self, accelerator: Any, path: Path) -> dict[str, Any]:
        """Returns the state that ``load`` would return, and changes nothing. All ranks call it.

        Raises:
            CheckpointError: If files differ from the manifest.
        """
        with together(accelerator):
            Manifest.read(Path(path))
            state: dict[str, Any] = json.loads((Path(path) / _STATE).read_bytes())
        return state

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, or None. Incomplete checkpoints are logged and left out."""
        complete = self._complete()
        return complete[-1][1] if complete else None

    def best(self) -> Path | None:
        """Returns the checkpoint with the best score, the earliest of equal scores, or None without a score."""
        sign = 1 if self.higher_is_better else -1
        scored = [
            (sign * manifest.score, -manifest.number, path)
            for manifest, path in self._complete()
            if manifest.score is not None
        ]
        return max(scored)[2] if scored else None

    def resolve(self, resume: str) -> Path | None:
        """Returns the checkpoint that ``OutputRecipe.resume`` selects, or None for a new run.

        Args:
            resume: "auto" for the newest checkpoint, if any; "never" for none; or the path of a checkpoint.

        Raises:
            FileExistsError: If it is "never" and the folder has a checkpoint.
            CheckpointError: If it is a path without a complete checkpoint.
        """
        if resume == "auto":
            return self.latest()
        if resume == "never":
            latest = self.latest()
            if latest is not None:
                raise FileExistsError(
                    'resume must be "auto" or a checkpoint if the folder has a checkpoint, got "never" with '
                    f"{latest}; or choose another output.dir"
                )
            return None
        try:
            Manifest.read(Path(resume))
        except CheckpointError as error:
            raise CheckpointError(
                f'resume must be "auto", "never" or the path of a checkpoint, got {resume!r}: {error}'
            ) from error
        return Path(resume)

    def _complete(self) -> list[tuple[Manifest, Path]]:
        """Returns the complete checkpoints, oldest first."""
        complete = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            leftover = LEFTOVER.fullmatch(path.name)
            name = path.name
            if leftover is not None and leftover["kind"] == "replaced":  # a process was killed between two renames
                name = leftover["name"]
                if (self.folder / name).exists():
                    continue
            if not _NAME.fullmatch(name):
                continue
            try:
                complete.append((Manifest.read(path), path))
            except CheckpointError as error:
                _LOG.warning("%s is left out: %s", path, error)
        return sorted(complete, key=lambda entry: entry[0].number)

    def _publish(self, accelerator: Any, partial: Path, path: Path, step: int, score: float | None) -> None:
        """Writes the manifest and renames the folder: from now on the checkpoint is visible."""
        number = max((manifest.number for manifest, _ in self._complete()), default=0) + 1
        world_size, files = accelerator.num_processes, file_sizes(partial)
        Manifest(number, step, world_size, score, files, is_deepspeed(accelerator)).write(partial)
        sync_tree(partial)
        move_into_place(partial, path)

    def _after_failure(self, accelerator: Any, partial: Path, path: Path, error: CheckpointError) -> str:
        """Removes the half-written folder, after all ranks have stopped, and returns the message of the error."""
        free = free_mib(self.folder)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        fate = "could not be removed" if partial.exists() else "was removed"
        return (
            f"the checkpoint {path} must be written whole, got {error} ({free:,} MiB free there); the half-written "
            f"folder {fate}; the last good checkpoint is {self.latest()}"
        )

    def _delete_old(self) -> None:
        """Deletes the checkpoints that are not kept. A failure only costs disk space, so it is logged."""
        complete = [path for _, path in self._complete()]
        kept_paths = {*complete[-self.keep_last :], *([self.best()] if self.keep_best else [])}
        for path in complete:
            if path in kept_paths:
                continue
            try:
                delete_folder(path)
            except OSError as error:
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error)


def _check_arguments(step: int, state: dict[str, Any], score: float | None) -> None:
    check_integer("step", step, least=0)
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    check_json("state", state)
    if score is not None and not (isinstance(score, (int, float)) and np.isfinite(score)):
        raise ValueError(f"score must be a finite number or None, got {score!r}")
