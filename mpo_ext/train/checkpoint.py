"""The checkpoints of a run: saving, loading, listing and deleting. A run resumes from a checkpoint bit for bit.

``checkpoint_state.py`` defines the contents of a checkpoint, ``checkpoint_files.py`` writes its folder atomically.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable
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
    file_digests,
    file_sizes,
    free_mib,
    move_into_place,
    remove_leftovers,
    temporary_path,
    together,
)
from mpo_ext.train.checkpoint_state import StateReader, save_state
from mpo_ext.train.ranks import gather
from mpo_ext.train.zero import is_deepspeed

_STATE = "state.json"
_NAME = re.compile(r"step-\d{8,}")
_LOG = logging.getLogger(__name__)


class Checkpoints:
    """Manages the checkpoints of a run, such as ``folder/step-00000200``. All ranks must see the same folder.

    A checkpoint is complete if its manifest is valid and all files exist with the sizes in the manifest. A complete
    checkpoint is damaged if the SHA-256 of a file differs from the manifest.

    Args:
        folder: Folder of the checkpoints; the first save creates the folder.
        keep_last: Number of newest checkpoints to keep, at least 1.
        keep_best: Whether to also keep the checkpoint with the best score.
        higher_is_better: True: the highest score is the best. False: the lowest score is the best.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, keep_best: bool = False, higher_is_better: bool = True
    ) -> None:
        check_integer("keep_last", keep_last, least=1)
        self.folder = Path(folder)
        self.keep_last, self.keep_best, self.higher_is_better = keep_last, keep_best, higher_is_better
        self._checked: set[Path] = set()  # checkpoints whose contents this process has compared with their digests

    def save(
        self,
        accelerator: Any,
        step: int,
        model: nn.Module,
        optimizer: Any,
        state: dict[str, Any],
        *,
        score: float | None = None,
        evaluation: int = 0,
        reference: nn.Module | None = None,
    ) -> Path:
        """Writes a checkpoint, deletes old checkpoints and returns the new folder. All ranks must call this method.

        A checkpoint holds the model's trainable parameters and persistent buffers, the optimizer's state and settings,
        the loss scaler's state, ``state``, and each rank's random states (Python, NumPy, torch, CUDA). An existing
        checkpoint of the same step is replaced.

        Under DeepSpeed, the DeepSpeed engine writes the tensors.

        Args:
            accelerator: accelerate's ``Accelerator``.
            step: Number of optimizer steps done; names the folder.
            model: Model as ``accelerator.prepare`` returned it.
            optimizer: Optimizer as ``accelerator.prepare`` returned it. If parameters are sharded, each tensor of its
                state must be a scalar or have the shape of the parameter, as with AdamW.
            state: Further state of the run as JSON values. Only the main rank's ``state`` is written.
            score: Finite evaluation score at this step; None: no score.
            evaluation: Number of the evaluation that gives the score, such as a result of ``next_number``. Only scores
                of the same evaluation are compared.
            reference: Reference model if training updates it, so that the checkpoint must store it; otherwise None.

        Raises:
            CheckpointError: If any rank fails, for instance because the disk is full. The half-written folder is
                removed and all earlier checkpoints remain.
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
            names = gather(accelerator, sorted(file_sizes(partial)) if accelerator.is_main_process else [])[0]
            with together(accelerator):
                digests = file_digests(accelerator, partial, names)
            parts = gather(accelerator, digests)
            with together(accelerator):
                if accelerator.is_main_process:
                    self._publish(accelerator, partial, path, (step, score, evaluation), parts)
        except CheckpointError as error:
            raise CheckpointError(self._after_failure(accelerator, partial, path, error)) from error
        self._checked.discard(path)
        if accelerator.is_main_process:
            self._delete_old()
        accelerator.wait_for_everyone()
        return path

    def load(
        self, accelerator: Any, path: Path, model: nn.Module, optimizer: Any, *, reference: nn.Module | None = None
    ) -> dict[str, Any]:
        """Restores a checkpoint in place, bit for bit, and returns its ``state``. All ranks must call this method.

        If the number of ranks has changed since the save, random states are not restored, and a warning is logged.
        DeepSpeed cannot load the checkpoint with another number of ranks.

        Args:
            accelerator: accelerate's ``Accelerator``.
            path: Folder of the checkpoint. It may lie outside ``self.folder``.
            model: Model as in ``save``, with the same trainable parameters and dtypes.
            optimizer: Optimizer as in ``save``, with the same parameter groups.
            reference: Reference model; None if the checkpoint was saved without a reference model.

        Raises:
            CheckpointError: If a file has changed since the save, or the checkpoint belongs to another model,
                optimizer or precision. In these cases, the run stays unchanged. If the tensors cannot be read, the
                run may be partly restored.
        """
        path = Path(path)
        with together(accelerator):
            manifest = Manifest.read(path)
        self._check_contents(accelerator, manifest, path)
        with together(accelerator):
            state = read_state(path)
            reader = StateReader(accelerator, path, model, optimizer, reference, manifest=manifest)
        with together(accelerator):
            reader.restore()
            reader.restore_random_state()
        return state

    def state(self, accelerator: Any, path: Path) -> dict[str, Any]:
        """Returns the ``state`` that was given to ``save`` for this checkpoint. All ranks must call this method.

        Raises:
            CheckpointError: If the checkpoint is incomplete or damaged.
        """
        with together(accelerator):
            manifest = Manifest.read(Path(path))
        self._check_contents(accelerator, manifest, Path(path))
        with together(accelerator):
            state = read_state(Path(path))
        return state

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, or None. Logs a warning for each incomplete checkpoint."""
        complete = self._complete()
        return complete[-1][1] if complete else None

    def next_number(self) -> int:
        """Returns the number of the next checkpoint. It is higher than the numbers of all complete checkpoints."""
        return max((manifest.number for manifest, _ in self._complete()), default=0) + 1

    def best(self) -> Path | None:
        """Returns the complete checkpoint with the best score, or None if no checkpoint has a score.

        Only checkpoints of the same evaluation as the newest checkpoint are compared. Of several checkpoints with the
        best score, the earliest is returned.
        """
        sign = 1 if self.higher_is_better else -1
        complete = self._complete()
        scored = [
            (sign * manifest.score, -manifest.number, path)
            for manifest, path in complete
            if manifest.score is not None and manifest.evaluation == complete[-1][0].evaluation
        ]
        return max(scored)[2] if scored else None

    def resolve(self, accelerator: Any, resume: str) -> Path | None:
        """Returns the checkpoint that ``OutputRecipe.resume`` selects, or None for a new run.

        All ranks must call this method. Compares the files of the checkpoint with the SHA-256 values in its manifest.

        Args:
            accelerator: accelerate's ``Accelerator``.
            resume: "auto", "never", or the path of a checkpoint. "auto" selects the newest complete checkpoint that is
                not damaged. "never" stands for a new run. If the folder has no checkpoint, "auto" also stands for a
                new run.

        Raises:
            FileExistsError: If ``resume`` is "never" and the folder has a checkpoint.
            CheckpointError: If ``resume`` is "auto" and all checkpoints in the folder are incomplete or damaged.
            ValueError: If ``resume`` is a path without a checkpoint, or its checkpoint is incomplete or damaged. Also
                raised if the path lies outside the folder, but the folder has a checkpoint.
        """
        if resume == "auto":
            complete, incomplete = self._scan()
            for manifest, path in reversed(complete):
                try:
                    self._check_contents(accelerator, manifest, path)
                except CheckpointError as error:
                    _LOG.warning("%s is left out: %s", path, error)
                else:
                    return path
            if complete or incomplete:
                raise _no_intact(self.folder, len(complete) + len(incomplete))
            return None
        found = self.find(resume)
        if found is not None:
            try:
                self._check_contents(accelerator, Manifest.read(found), found)
            except CheckpointError as error:
                raise _bad_resume(resume, error) from error
        return found

    def find(self, resume: str) -> Path | None:
        """Returns the checkpoint that ``resume`` selects, or None for a new run; see ``resolve``.

        Unlike ``resolve``, this method does not read the files, so it may return a damaged checkpoint. Otherwise, it
        raises the same errors.
        """
        if resume in ("auto", "never"):
            complete, incomplete = self._scan()
            paths = [*incomplete, *(path for _, path in complete)]
            if resume == "never" and paths:
                raise FileExistsError(
                    'resume must be "auto" or a checkpoint if the folder has a checkpoint, got "never" with '
                    f"{paths[-1]}; or choose another output.dir"
                )
            if incomplete and not complete:
                raise _no_intact(self.folder, len(incomplete))
            return paths[-1] if paths else None
        try:
            Manifest.read(Path(resume))
        except CheckpointError as error:
            raise _bad_resume(resume, error) from error
        if not self.contains(Path(resume)) and any(self._scan()):
            raise _foreign_resume(self.folder, resume)
        return Path(resume)

    def contains(self, path: Path) -> bool:
        """Returns whether ``path`` lies directly in the folder of the checkpoints."""
        return self.folder.resolve() in (path.resolve().parent, path.parent.resolve())

    def _check_contents(self, accelerator: Any, manifest: Manifest, path: Path) -> None:
        """Raises ``CheckpointError`` if a file of a checkpoint differs from its recorded digest.

        A checkpoint that has passed this check is not checked again.
        """
        if path not in self._checked:
            manifest.check_contents(accelerator, path)
            self._checked.add(path)

    def _complete(self) -> list[tuple[Manifest, Path]]:
        """Returns the manifests and paths of the complete checkpoints, oldest first."""
        return self._scan()[0]

    def _scan(self) -> tuple[list[tuple[Manifest, Path]], list[Path]]:
        """Returns the complete checkpoints and the incomplete checkpoints in the folder, as two lists.

        A complete checkpoint is given as (manifest, path), the oldest first. An incomplete checkpoint is given as its
        path, and is logged with a warning.
        """
        complete, incomplete = [], []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            leftover = LEFTOVER.fullmatch(path.name)
            name = path.name
            if leftover is not None and leftover["kind"] == "replaced":  # killed between two renames
                name = leftover["name"]
                if (self.folder / name).exists():
                    continue
            if not _NAME.fullmatch(name):
                continue
            try:
                complete.append((Manifest.read(path), path))
            except CheckpointError as error:
                _LOG.warning("%s is left out: %s", path, error)
                incomplete.append(path)
        return sorted(complete, key=lambda entry: entry[0].number), incomplete

    def _publish(
        self,
        accelerator: Any,
        partial: Path,
        path: Path,
        evaluated: tuple[int, float | None, int],
        digests: Iterable[dict[str, str]],
    ) -> None:
        """Writes the manifest into the folder ``partial`` and renames the folder to ``path``.

        ``evaluated`` is (step, score, evaluation) of ``save``. ``digests`` has the ``file_digests`` of each rank.
        """
        step, score, evaluation = evaluated
        world_size, files = accelerator.num_processes, file_sizes(partial)
        merged = {name: digest for part in digests for name, digest in part.items()}
        number, uses_deepspeed = self.next_number(), is_deepspeed(accelerator)
        Manifest(number, step, world_size, score, files, uses_deepspeed, merged, evaluation).write(partial)
        sync_tree(partial)
        move_into_place(partial, path)

    def _after_failure(self, accelerator: Any, partial: Path, path: Path, error: CheckpointError) -> str:
        """Removes the half-written folder and returns the error message for a failed save."""
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
        """Deletes checkpoints that ``keep_last`` and ``keep_best`` do not keep. Logs a warning if a deletion fails."""
        complete = [path for _, path in self._complete()]
        kept_paths = {*complete[-self.keep_last :], *([self.best()] if self.keep_best else [])}
        for path in complete:
            if path in kept_paths:
                continue
            try:
                delete_folder(path)
            except OSError as error:
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error)


def read_state(path: Path) -> dict[str, Any]:
    """Returns the ``state`` of the checkpoint in a folder. Does not check whether the checkpoint is damaged."""
    state: dict[str, Any] = json.loads((path / _STATE).read_bytes())
    return state


def _no_intact(folder: Path, count: int) -> CheckpointError:
    return CheckpointError(
        f"one checkpoint in {folder} must be intact, got {count} damaged checkpoints: choose another output.dir to "
        "start a new run"
    )


def _foreign_resume(folder: Path, resume: str) -> ValueError:
    return ValueError(
        f"resume must be a checkpoint in {folder}, which has the checkpoints of a run, got {resume!r}: choose another "
        'output.dir, or "auto" to resume the run of this folder'
    )


def _bad_resume(resume: str, error: CheckpointError) -> ValueError:
    return ValueError(f'resume must be "auto", "never" or the path of a checkpoint, got {resume!r}: {error}')


def _check_arguments(step: int, state: dict[str, Any], score: float | None) -> None:
    check_integer("step", step, least=0)
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    check_json("state", state)
    if score is not None and not (isinstance(score, (int, float)) and np.isfinite(score)):
        raise ValueError(f"score must be a finite number or None, got {score!r}")
