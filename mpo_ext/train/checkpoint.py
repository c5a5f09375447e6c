"""Checkpoints of a run, from which it goes on bit for bit, and the export of the trained model.

A checkpoint is a folder that is written under another name and renamed when all of it is on the disk, so that a death
at any moment leaves either the whole of it or what was there before. Its manifest names every file with its size.

Tensors are kept by name in the format of torch.distributed.checkpoint, which one process, DDP and FSDP2 read and write
alike: a run may go on with another number of ranks. They are collected here and not by
``torch.distributed.checkpoint.state_dict``, which steps an optimizer that has no state yet, asks for the state of
parameters that never had a gradient, and saves a frozen head under its second name when embeddings are tied.
"""

import contextlib
import copy
import dataclasses
import io
import json
import logging
import os
import random
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from mpo_ext.checks import check_json
from mpo_ext.files import sync_folder
from mpo_ext.train.model import reshard

_FORMAT = "mpo_ext.checkpoint/1"
_MANIFEST, _STATE, _TRAINER, _TENSORS, _DEEPSPEED = "manifest.json", "state.json", "trainer.pt", "tensors", "deepspeed"
_NAME = re.compile(r"step-\d{8,}")
_LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|replaced|deleted)-[0-9a-f]{12}")
_SHOWN = 5
_LOG = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint or an export could not be written or read. All ranks raise it when one of them fails."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Manifest:
    """What makes a folder a checkpoint.

    Attributes:
        number: Counts the checkpoints of a folder as they are written; the newest has the highest, whatever its step.
        step: Of the optimizer.
        world_size: Number of ranks that wrote it.
        score: Of the evaluation at this step.
        files: Sizes in bytes by path within the folder.
        deepspeed: Whether the tensors are DeepSpeed's.
    """

    number: int
    step: int
    world_size: int
    score: float | None
    files: dict[str, int]
    deepspeed: bool

    @classmethod
    def read(cls, folder: Path) -> "_Manifest":
        """Reads the manifest of a folder and compares the sizes of its files.

        Raises:
            CheckpointError: If there is none, if it cannot be understood, or if a file is missing or of another size.
        """
        path = folder / _MANIFEST
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"a checkpoint must have a manifest, got {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"a manifest must be JSON, got {error} in {path}") from error
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != _FORMAT:
            raise CheckpointError(f"a checkpoint must be of format {_FORMAT!r}, got {found!r} in {path}")
        try:
            manifest = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"a manifest must have the fields of {_FORMAT}, got {error} in {path}") from error
        for name, size in manifest.files.items():
            try:
                got = f"{(folder / name).stat().st_size:,} bytes"
            except OSError as error:
                got = str(error.strerror)
            if got != f"{size:,} bytes":
                raise CheckpointError(
                    f"files of a checkpoint must be as its manifest says, {size:,} bytes in {folder / name}, got {got}"
                )
        return manifest


class Checkpoints:
    """The checkpoints of a run: ``folder/step-00000200`` and so on. All ranks must see the same folder.

    Args:
        folder: Is made when the first one is saved.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Keeps the one with the best score besides. Scores of earlier processes are known from the folder.
        higher_is_better: Whether the best score is the highest.

    Raises:
        ValueError: If keep_last is not a positive int.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, keep_best: bool = False, higher_is_better: bool = True
    ) -> None:
        if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
            raise ValueError(f"keep_last must be a positive int, got {keep_last!r}")
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
        """Writes a checkpoint, then deletes those that are not kept. All ranks call it.

        It holds the trainable parameters and persistent buffers of the model, the state and settings of the optimizer,
        that of the loss scaler, ``state``, and the random states of each rank (Python, NumPy, torch, CUDA). Nothing
        of these is changed by it. A checkpoint of the same step is replaced; what a process that died left unfinished
        is removed.

        With DeepSpeed its engine writes and reads the tensors. That part is as DeepSpeed documents it and has not been
        run with DeepSpeed itself.

        Args:
            accelerator: Of accelerate.
            step: Of the optimizer; names the folder.
            model: As ``accelerator.prepare`` returned it.
            optimizer: Likewise. Its state must be of tensors with the shape of the parameter or none, as AdamW's is.
            state: JSON; that of the main rank is kept.
            score: Of the evaluation at this step, finite.
            reference: A reference model that moves during training: all of its parameters are kept too.

        Returns:
            The folder.

        Raises:
            CheckpointError: If any rank fails, as when the disk is full. What was half written is removed then, and
                all earlier checkpoints are there still.
        """
        with _together(accelerator):
            _check_arguments(step, state, score)
        path = self.folder / f"step-{step:08d}"
        partial = _aside(path, "tmp", _same_token())
        try:
            with _together(accelerator):
                if accelerator.is_main_process:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    _sweep(self.folder, _NAME)
                    partial.mkdir()
            self._write(accelerator, partial, model, optimizer, reference)
            with _together(accelerator):
                if accelerator.is_main_process:
                    _write_file(partial / _STATE, json.dumps(state, indent=1).encode())
                    self._finish(accelerator, partial, path, step, score)
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

        The random states come back only where the number of ranks is that of the save; else a warning is logged.

        Args:
            accelerator: Of accelerate.
            path: Of a checkpoint, in this folder or elsewhere.
            model: As in ``save``, with the same parameters trainable and of the same dtypes.
            optimizer: Likewise, with the same parameter groups. What state it has is replaced.
            reference: Likewise; must be given if and only if it was in ``save``.

        Returns:
            The state.

        Raises:
            CheckpointError: If the files are not as the manifest says, or the checkpoint is of another model,
                optimizer or precision. Unless it was a read that failed, nothing has been changed.
        """
        path = Path(path)
        with _together(accelerator):
            manifest = _Manifest.read(path)
            state = json.loads((path / _STATE).read_bytes())
            is_deepspeed = _is_deepspeed(accelerator)
            if manifest.deepspeed != is_deepspeed:
                kinds = {True: "DeepSpeed", False: "one process, DDP or FSDP2"}
                raise CheckpointError(
                    f"a checkpoint must be resumed under {kinds[manifest.deepspeed]}, as it was saved, got "
                    f"{kinds[is_deepspeed]}: {path}"
                )
            if not is_deepspeed:
                trainer = torch.load(path / _TRAINER, weights_only=True)
                reader = dcp.FileSystemReader(path / _TENSORS)
                saved = reader.read_metadata().state_dict_metadata
                optimizer = _inner_optimizer(optimizer)
                parameters = _named_parameters(accelerator, model)
                groups = _matched_groups(optimizer, parameters, trainer["groups"])
                tensors = _model_tensors(accelerator, model, reference)
                tensors.update(_empty_optimizer_tensors(parameters, saved))
                _compare(tensors, saved, path)
                _check_scaler(accelerator, trainer["scaler"], path)
        with _together(accelerator):
            if is_deepspeed:
                _load_deepspeed(model, path, reference)
            else:
                with _quiet():
                    dcp.load(tensors, storage_reader=reader)
                _load_optimizer(optimizer, groups, tensors)
                if trainer["scaler"]:
                    accelerator.scaler.load_state_dict(trainer["scaler"])
            if manifest.world_size == accelerator.num_processes:
                _restore_random(accelerator, path / _random_name(accelerator))
            elif accelerator.is_main_process:
                _LOG.warning(
                    "random states are not restored: %s was saved by %d ranks, and there are %d now",
                    path,
                    manifest.world_size,
                    accelerator.num_processes,
                )
        return state

    def state(self, accelerator: Any, path: Path) -> dict[str, Any]:
        """Returns the state that ``load`` would, and changes nothing. All ranks call it.

        Raises:
            CheckpointError: If the files are not as the manifest says.
        """
        with _together(accelerator):
            _Manifest.read(Path(path))
            state: dict[str, Any] = json.loads((Path(path) / _STATE).read_bytes())
        return state

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, or None. Those whose files have gone or changed are logged."""
        complete = self._complete()
        return complete[-1][1] if complete else None

    def best(self) -> Path | None:
        """Returns the checkpoint with the best score, the earlier of equal ones, or None if none has a score."""
        sign = 1 if self.higher_is_better else -1
        scored = [
            (sign * manifest.score, -manifest.number, path)
            for manifest, path in self._complete()
            if manifest.score is not None
        ]
        return max(scored)[2] if scored else None

    def resolve(self, resume: str) -> Path | None:
        """Finds the checkpoint that ``OutputRecipe.resume`` asks for.

        Args:
            resume: "auto" for the newest, if any; "never" for none; or the path of a checkpoint.

        Returns:
            The checkpoint, or None for a run that starts anew.

        Raises:
            FileExistsError: If it is "never" and the folder has a checkpoint.
            CheckpointError: If it is a path that is not a complete checkpoint.
        """
        if resume == "auto":
            return self.latest()
        if resume == "never":
            latest = self.latest()
            if latest is not None:
                raise FileExistsError(
                    f'resume must be "auto" or a checkpoint where there is one, or the run go into another folder, '
                    f'got "never" with {latest}'
                )
            return None
        try:
            _Manifest.read(Path(resume))
        except CheckpointError as error:
            raise CheckpointError(
                f'resume must be "auto", "never" or the path of a checkpoint, got {resume!r}: {error}'
            ) from error
        return Path(resume)

    def _complete(self) -> list[tuple[_Manifest, Path]]:
        """The complete checkpoints, oldest first."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            leftover = _LEFTOVER.fullmatch(path.name)
            name = path.name
            if leftover is not None and leftover["kind"] == "replaced":  # a death between two renames
                name = leftover["name"]
                if (self.folder / name).exists():
                    continue
            if not _NAME.fullmatch(name):
                continue
            try:
                found.append((_Manifest.read(path), path))
            except CheckpointError as error:
                _LOG.warning("%s is left aside: %s", path, error)
        return sorted(found, key=lambda entry: entry[0].number)

    def _write(
        self, accelerator: Any, partial: Path, model: nn.Module, optimizer: Any, reference: nn.Module | None
    ) -> None:
        """Writes what every rank has a part in."""
        with _together(accelerator):
            _write_file(partial / _random_name(accelerator), _to_bytes(_random_state(accelerator)))
            if not _is_deepspeed(accelerator):
                optimizer = _inner_optimizer(optimizer)
                parameters = _named_parameters(accelerator, model)
                tensors = _model_tensors(accelerator, model, reference)
                tensors.update(_optimizer_tensors(optimizer, parameters))
                if accelerator.is_main_process:
                    trainer = {"groups": _groups(optimizer, parameters), "scaler": _scaler_state(accelerator)}
                    _write_file(partial / _TRAINER, _to_bytes(trainer))
            elif reference is not None:
                raise CheckpointError("reference must be None with DeepSpeed, which has no part for it")
        with _together(accelerator):
            if _is_deepspeed(accelerator):
                model.save_checkpoint(  # type: ignore[operator]
                    str(partial), tag=_DEEPSPEED, save_latest=False, exclude_frozen_parameters=True
                )
            else:
                with _quiet():
                    dcp.save(tensors, storage_writer=_Writer(partial / _TENSORS))

    def _finish(self, accelerator: Any, partial: Path, path: Path, step: int, score: float | None) -> None:
        """Writes the manifest and gives the folder its name."""
        files = {
            file.relative_to(partial).as_posix(): file.stat().st_size
            for file in sorted(partial.rglob("*"))
            if file.is_file()
        }
        number = max((manifest.number for manifest, _ in self._complete()), default=0) + 1
        manifest = _Manifest(number, step, accelerator.num_processes, score, files, _is_deepspeed(accelerator))
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(manifest)}, indent=1, allow_nan=False)
        _write_file(partial / _MANIFEST, text.encode())
        _sync_tree(partial)
        _put(partial, path)

    def _after_failure(self, accelerator: Any, partial: Path, path: Path, error: CheckpointError) -> str:
        """Removes what is half written, all ranks having stopped, and says what there is."""
        free = _free_mib(self.folder)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        rest = "could not be removed" if partial.exists() else "was removed"
        return (
            f"the checkpoint {path} must be written whole, got {error} ({free:,} MiB free there); the half-written "
            f"folder {rest}; the last good checkpoint is {self.latest()}"
        )

    def _delete_old(self) -> None:
        """Deletes those that are not kept. A failure costs room and nothing else, so it is logged."""
        complete = [path for _, path in self._complete()]
        kept = {*complete[-self.keep_last :], *([self.best()] if self.keep_best else [])}
        for path in complete:
            if path in kept:
                continue
            try:
                doomed = _aside(path, "deleted", _token())
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error)


class _Writer(dcp.FileSystemWriter):
    """Says what the system said where torch's writer, closing a file that is cut short, says something of its own."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def export_model(accelerator: Any, model: nn.Module, processor: Any, folder: Path, *, merged: bool = False) -> None:
    """Writes the model in Hugging Face format, for ``from_pretrained``. All ranks call it; the main one writes.

    With LoRA it is the adapters, and with ``merged`` the whole model in ``folder/merged`` besides. That one is the
    model that the adapters were put on, read again from where it came from, in the dtype that it was trained in: under
    any sharding and quantization, at the price of one copy in memory of the main rank. A model that came from nowhere
    is copied in memory, unless it is sharded: see ``check_mergeable``.

    Args:
        accelerator: Of accelerate.
        model: As ``accelerator.prepare`` returned it.
        processor: Processor or tokenizer, or None. Is written along.
        folder: Is replaced as a whole if it holds an earlier export.
        merged: Has no meaning without LoRA.

    Raises:
        CheckpointError: If any rank fails: folder holds something else than an export, the disk is full, parameters
            besides the adapters were trained, or the model cannot be read again. What was there is left alone.
    """
    folder = Path(os.path.abspath(folder))
    partial = _aside(folder, "tmp", _same_token())
    with _together(accelerator):
        if accelerator.is_main_process:
            _check_replaceable(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder.parent, re.compile(re.escape(folder.name)))
        inner = _unwrapped(accelerator, model)
        if hasattr(inner, "peft_config"):
            _check_only_adapters(inner)
        reshard(inner)
    try:
        with _together(accelerator):
            whole = None
            if _is_deepspeed(accelerator):
                whole = accelerator.get_state_dict(model)
            elif any(isinstance(module, FSDPModule) for module in inner.modules()):
                whole = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        with _together(accelerator):
            if accelerator.is_main_process:
                _write_export(inner, whole, processor, partial, merged)
                _sync_tree(partial)
                _put(partial, folder)
    except CheckpointError as error:
        free = _free_mib(folder.parent)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the model must be written whole into {folder}, got {error} ({free:,} MiB free there); what was there "
            "before is there still"
        ) from error


def _write_export(inner: Any, whole: dict[str, Tensor] | None, processor: Any, partial: Path, merged: bool) -> None:
    """Writes the files of an export."""
    inner.save_pretrained(partial, state_dict=whole)
    if processor is not None:
        processor.save_pretrained(partial)
    if not hasattr(inner, "peft_config"):
        return
    base = inner.get_base_model()
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(partial)
    if merged:
        complete = _merged(inner, base, partial)
        complete.save_pretrained(partial / "merged")
        if processor is not None:
            processor.save_pretrained(partial / "merged")


def _merged(inner: Any, base: Any, adapters: Path) -> Any:
    """The base model, read from where it came from or copied, with the adapters merged into it."""
    from peft import PeftModel

    config = inner.peft_config[inner.active_adapter]
    source = config.base_model_name_or_path
    if not source:
        check_mergeable(inner)
        return copy.deepcopy(inner).merge_and_unload(safe_merge=True)
    whole = type(base).from_pretrained(source, revision=config.revision, dtype=base.dtype)
    whole.generation_config = base.generation_config
    return PeftModel.from_pretrained(whole, adapters).merge_and_unload(safe_merge=True)  # type: ignore[operator]


def check_mergeable(model: nn.Module) -> None:
    """Raises ``CheckpointError`` where ``export_model`` could not merge the adapters of this model, as prepared."""
    owner: Any = next(one for one in model.modules() if hasattr(one, "peft_config"))
    if owner.peft_config[owner.active_adapter].base_model_name_or_path:
        return
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise CheckpointError(
            "a sharded model to be merged must have come from from_pretrained, got one without a name"
        )


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    inside = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    if names and (not names & {"config.json", "adapter_config.json"} or inside - {"merged"}):
        raise CheckpointError(f"folder must be new, empty or an earlier export, got {folder} with {_shown(names)}")


def _check_only_adapters(inner: Any) -> None:
    """Refuses parameters that were trained and that peft would leave out."""
    config = inner.peft_config[inner.active_adapter]
    lost = {
        name
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and inner.active_adapter not in name.split(".")
    }
    if lost and getattr(config, "bias", "none") == "none":
        raise CheckpointError(
            f"parameters that are trained besides the adapters must be in modules_to_save of the LoRA config, or they "
            f"are not exported, got {_shown(lost)}"
        )


def _model_tensors(accelerator: Any, model: nn.Module, reference: nn.Module | None) -> dict[str, Tensor]:
    """What is kept of the models, by name, as views that can be read into."""
    tensors = {
        f"model.{name}": parameter.detach()
        for name, parameter in _named_parameters(accelerator, model).items()
        if parameter.requires_grad
    }
    tensors.update({f"model.{name}": buffer for name, buffer in _named_buffers(accelerator, model)})
    if reference is not None:
        for name, parameter in _named_parameters(accelerator, reference).items():
            tensors[f"reference.{name}"] = parameter.detach()
        tensors.update({f"reference.{name}": buffer for name, buffer in _named_buffers(accelerator, reference)})
    return tensors


def _named_parameters(accelerator: Any, model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, by the name that they have without any wrapper. Tied ones have the first of their names."""
    inner = _unwrapped(accelerator, model)
    reshard(inner)
    return {_plain(name): parameter for name, parameter in inner.named_parameters()}


def _named_buffers(accelerator: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has."""
    for prefix, module in _unwrapped(accelerator, model).named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"modules must keep their state in tensors, got {type(module).__name__} {prefix}")
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _plain(f"{prefix}.{name}" if prefix else name), buffer


def _unwrapped(accelerator: Any, model: nn.Module) -> Any:
    if accelerator.distributed_type == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise CheckpointError("fsdp_version must be 2, got 1: checkpoints do not know its flattened parameters")
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _plain(name: str) -> str:
    """A name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _names_in_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names of the parameters of each group.

    Raises:
        CheckpointError: If a parameter is not one of the model.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"parameters of the optimizer must be the model's, got another of shape {tuple(parameter.shape)}"
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The settings of each group, with names for parameters."""
    names = _names_in_groups(optimizer, parameters)
    return [{**group, "params": members} for group, members in zip(optimizer.param_groups, names, strict=True)]


def _optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of the optimizer by name. A parameter that never had a gradient has none."""
    tensors = {}
    for group, names in zip(optimizer.param_groups, _names_in_groups(optimizer, parameters), strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.shape not in {parameter.shape, torch.Size()}:
                    raise CheckpointError(
                        f"optimizer must have a state of tensors with the parameter's shape {tuple(parameter.shape)} "
                        f"or none, got {key} {getattr(value, 'shape', value)!r} of {name}"
                    )
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _empty_optimizer_tensors(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that the saved state of an optimizer can be read into, sharded as the parameters are now."""
    tensors: dict[str, Tensor] = {}
    for full_name, entry in saved.items():
        name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
        if not full_name.startswith("optimizer.") or name not in parameters:
            continue
        dtype = entry.properties.dtype
        if entry.size == parameters[name].shape and key != "step":
            tensors[full_name] = torch.empty_like(parameters[name].detach(), dtype=dtype)
        else:
            tensors[full_name] = torch.empty(entry.size, dtype=dtype)
    return tensors


def _matched_groups(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups in the order of the optimizer's, with the names in its order.

    Raises:
        CheckpointError: If they are not of the same parameters.
    """
    own = _names_in_groups(optimizer, parameters)
    by_names = {frozenset(group["params"]): group for group in groups}
    if len(own) != len(groups) or any(frozenset(names) not in by_names for names in own):
        saved = [group["params"] for group in groups]
        different = {name for names in own for name in names} ^ {name for names in saved for name in names}
        raise CheckpointError(
            f"optimizer must have the parameter groups of the checkpoint, of {[len(names) for names in saved]} "
            f"parameters, got groups of {[len(names) for names in own]}; one of the two lacks "
            f"{_shown(different) or 'none'}"
        )
    return [{**by_names[frozenset(names)], "params": names} for names in own]


def _load_optimizer(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Gives the optimizer the settings of the groups and the state in the tensors, and no other."""
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
            state.setdefault(numbers[name], {})[key] = tensor
    numbered = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _compare(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], path: Path) -> None:
    """Raises unless the checkpoint has these tensors, of these shapes and dtypes, and no others."""
    missing, unknown = tensors.keys() - saved.keys(), saved.keys() - tensors.keys()
    if missing or unknown:
        raise CheckpointError(
            f"the model must be trained in the parameters that {path} has, got {len(missing)} that it lacks "
            f"({_shown(missing)}) and {len(unknown)} that only it has ({_shown(unknown)})"
        )
    for name, tensor in tensors.items():
        entry = saved[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"a checkpoint must hold tensors, got {type(entry).__name__} for {name} in {path}")
        theirs = tuple(entry.size), entry.properties.dtype
        if theirs != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(
                f"{name} must be of shape {theirs[0]} and {theirs[1]} as in {path}, got {tuple(tensor.shape)} and "
                f"{tensor.dtype}"
            )


def _scaler_state(accelerator: Any) -> dict[str, Any]:
    """Of the loss scaler, empty if there is none or it is switched off."""
    return {} if accelerator.scaler is None else accelerator.scaler.state_dict()


def _check_scaler(accelerator: Any, saved: dict[str, Any], path: Path) -> None:
    if bool(saved) != bool(_scaler_state(accelerator)):
        names = {True: "with a loss scaler (fp16)", False: "without a loss scaler"}
        raise CheckpointError(f"precision must be that of {path}, {names[bool(saved)]}, got a run {names[not saved]}")


def _is_deepspeed(accelerator: Any) -> bool:
    return accelerator.distributed_type == "DEEPSPEED"


def _load_deepspeed(model: Any, path: Path, reference: nn.Module | None) -> None:
    if reference is not None:
        raise CheckpointError("reference must be None with DeepSpeed, which has no part for it")
    found, _ = model.load_checkpoint(str(path), tag=_DEEPSPEED, load_module_strict=False)
    if found is None:
        raise CheckpointError(f"DeepSpeed must find its part of the checkpoint, got none in {path / _DEEPSPEED}")


def _random_name(accelerator: Any) -> str:
    return f"rng-{accelerator.process_index:05d}.pt"


def _random_state(accelerator: Any) -> dict[str, Any]:
    """Of the generators that this rank draws from, as what torch reads without pickle."""
    numpy = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),  # type: ignore[index,union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(accelerator.device) if accelerator.device.type == "cuda" else None,
    }


def _restore_random(accelerator: Any, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if (state["cuda"] is not None) != (accelerator.device.type == "cuda"):
        _LOG.warning("the random state of CUDA is not restored: the run has changed between CPU and GPU")
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)


def _check_arguments(step: int, state: dict[str, Any], score: float | None) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an int of at least 0, got {step!r}")
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    check_json("state", state)
    if score is not None and not (isinstance(score, (int, float)) and np.isfinite(score)):
        raise ValueError(f"score must be a finite number or None, got {score!r}")


@contextlib.contextmanager
def _together(accelerator: Any) -> Iterator[None]:
    """Runs the block on every rank, then raises on all of them what any of them met.

    Raises:
        CheckpointError: With the errors of all ranks.
    """
    from accelerate.utils import gather_object

    caught: BaseException | None = None
    texts: list[str] = []
    try:
        yield
    except (Exception, CheckpointException) as error:
        caught, texts = error, _texts(error, accelerator)
    failed = dict.fromkeys(gather_object(texts))
    if failed:
        raise CheckpointError("; ".join(failed)) from caught


def _texts(error: BaseException, accelerator: Any) -> list[str]:
    """What to say of an error: the kind, the words and the rank, which torch notes for each of several."""
    if isinstance(error, CheckpointException):
        failures = {rank: inner for rank, (inner, _) in error.failures.items()}
    else:
        failures = {accelerator.process_index: error}
    texts = []
    for rank, inner in failures.items():
        text = str(inner) if isinstance(inner, CheckpointError) else f"{type(inner).__name__}: {inner}"
        texts.append(f"{text} (rank {rank})" if accelerator.num_processes > 1 else text)
    return texts


def _same_token() -> str:
    """Letters for a name, the same on all ranks."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([_token()])[0]


def _token() -> str:
    return secrets.token_hex(6)


def _aside(path: Path, kind: str, token: str) -> Path:
    """A name next to path, for what is on its way there or gone from there."""
    return path.with_name(f"{path.name}.{kind}-{token}")


def _sweep(folder: Path, names: re.Pattern[str]) -> None:
    """Removes what a process that died has left of things with such names, or finishes it."""
    for path in list(folder.iterdir()):
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None or not names.fullmatch(leftover["name"]):
            continue
        target = folder / leftover["name"]
        if leftover["kind"] == "replaced" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path)


def _put(partial: Path, path: Path) -> None:
    """Gives a folder its name. One that has it is deleted after; a death in between leaves it for ``_sweep``."""
    old = _aside(path, "replaced", _token())
    replaces = path.exists()
    if replaces:
        os.rename(path, old)
    os.rename(partial, path)
    sync_folder(path.parent)
    if replaces:
        shutil.rmtree(old)


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_tree(folder: Path) -> None:
    """Puts all files of a folder, and their names, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _to_bytes(value: Any) -> bytes:
    """As torch.save writes it. In memory first: a full disk is then told from a bug of the writer."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _free_mib(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def _shown(names: Any) -> str:
    """Some of the names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that there is but one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
