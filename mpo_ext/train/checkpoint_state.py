"""The contents of a checkpoint: tensors, optimizer, loss scaler and random states.

Tensors are stored by name in the format of torch.distributed.checkpoint. The format is the same for one process, DDP
and FSDP2, so a run may resume with another number of ranks.

This module does not use ``torch.distributed.checkpoint.state_dict``. If the optimizer has no state yet, the functions
of that module call ``optimizer.step()``. If a parameter has no optimizer state, the functions fail.
"""

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from mpo_ext.files import write_and_sync
from mpo_ext.train.checkpoint_files import CheckpointError, Manifest, list_names, to_bytes, together
from mpo_ext.train.model import reshard
from mpo_ext.train.zero import is_deepspeed

_TRAINER, _TENSORS, _DEEPSPEED = "trainer.pt", "tensors", "deepspeed"
_LOG = logging.getLogger(__name__)


def save_state(
    accelerator: Any, folder: Path, model: nn.Module, optimizer: Any, reference: nn.Module | None = None
) -> None:
    """Writes the state of model, optimizer, loss scaler, random generators and reference model into a folder.

    All ranks must call this function. Raises ``CheckpointError`` if any rank fails.
    """
    tensors: dict[str, Tensor] = {}
    with together(accelerator):
        write_and_sync(folder / _random_name(accelerator), to_bytes(random_state(accelerator)))
        if not is_deepspeed(accelerator):
            optimizer = _inner_optimizer(optimizer)
            parameters = _named_parameters(accelerator, model)
            tensors = _model_tensors(accelerator, model, reference)
            tensors.update(_optimizer_tensors(optimizer, parameters))
            if accelerator.is_main_process:
                # The parameters of each group are stored by name.
                groups = zip(optimizer.param_groups, _names_in_groups(optimizer, parameters), strict=True)
                named = [{**group, "params": names} for group, names in groups]
                trainer = {"groups": named, "scaler": _scaler_state(accelerator)}
                trainer["values"] = _optimizer_values(optimizer, parameters)
                write_and_sync(folder / _TRAINER, to_bytes(trainer))
        elif reference is not None:
            raise CheckpointError("reference must be None with DeepSpeed, which has no part for it")
    with together(accelerator):
        if is_deepspeed(accelerator):
            model.save_checkpoint(  # type: ignore[operator]
                str(folder), tag=_DEEPSPEED, save_latest=False, exclude_frozen_parameters=True
            )
        else:
            with _without_warning():
                dcp.save(tensors, storage_writer=_TensorWriter(folder / _TENSORS))


class StateReader:
    """Restores the model and the optimizer of a run from a checkpoint. All ranks must call each method.

    The constructor raises ``CheckpointError`` if the checkpoint does not fit the model or the optimizer. ``folder`` is
    the folder of the checkpoint, and ``manifest`` describes the checkpoint. For the other arguments, see
    ``Checkpoints.load``.
    """

    def __init__(
        self,
        accelerator: Any,
        folder: Path,
        model: nn.Module,
        optimizer: Any,
        reference: nn.Module | None,
        *,
        manifest: Manifest,
    ) -> None:
        self.accelerator, self.folder, self.model, self.reference = accelerator, folder, model, reference
        self.deepspeed = is_deepspeed(accelerator)
        self.world_size = manifest.world_size
        if manifest.deepspeed != self.deepspeed:
            kinds = {True: "DeepSpeed", False: "one process, DDP or FSDP2"}
            raise CheckpointError(
                f"a checkpoint must be resumed under {kinds[manifest.deepspeed]}, as it was saved, got "
                f"{kinds[self.deepspeed]}: {folder}"
            )
        if self.deepspeed:
            if self.world_size != accelerator.num_processes:
                raise CheckpointError(
                    f"a checkpoint of DeepSpeed must be resumed by the {self.world_size} processes that saved it, got "
                    f"{accelerator.num_processes}: {folder}"
                )
            return
        trainer = torch.load(folder / _TRAINER, weights_only=True)
        self.reader = dcp.FileSystemReader(folder / _TENSORS)
        saved = self.reader.read_metadata().state_dict_metadata
        self.optimizer = _inner_optimizer(optimizer)
        parameters = _named_parameters(accelerator, model)
        self.groups = _matched_groups(self.optimizer, parameters, trainer["groups"])
        self.values: dict[str, Any] = trainer.get("values", {})  # checkpoints of AdamW may lack this entry
        self.tensors = _model_tensors(accelerator, model, reference)
        self.tensors.update(_empty_optimizer_tensors(parameters, saved))
        _check_tensors(self.tensors, saved, folder)
        self.scaler: dict[str, Any] = trainer["scaler"]
        _check_scaler(accelerator, self.scaler, folder)

    def restore(self) -> None:
        """Restores model, optimizer, loss scaler and reference model in place, bit for bit."""
        if self.deepspeed:
            _load_deepspeed(self.model, self.folder, self.reference)
            return
        with _without_warning():
            dcp.load(self.tensors, storage_reader=self.reader)
        _load_optimizer(self.optimizer, self.groups, self.tensors, self.values)
        if self.scaler:
            self.accelerator.scaler.load_state_dict(self.scaler)

    def restore_random_state(self) -> None:
        """Restores this rank's random states. If the number of ranks has changed, logs a warning instead."""
        if self.world_size == self.accelerator.num_processes:
            state = torch.load(self.folder / _random_name(self.accelerator), weights_only=True)
            restore_random_state(self.accelerator, state)
        elif self.accelerator.is_main_process:
            text = "random states are not restored: %s was saved by %d ranks, and there are %d now"
            _LOG.warning(text, self.folder, self.world_size, self.accelerator.num_processes)


class _TensorWriter(dcp.FileSystemWriter):
    """A ``dcp.FileSystemWriter`` that raises ``OSError`` on a full disk, where the base class raises RuntimeError."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def unwrapped(accelerator: Any, model: nn.Module) -> Any:
    """Returns the model without the wrappers of ``accelerator.prepare`` and torch.compile.

    Raises ``CheckpointError`` for FSDP 1.
    """
    if accelerator.distributed_type == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise CheckpointError("fsdp_version must be 2, got 1: checkpoints cannot hold its flattened parameters")
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _model_tensors(accelerator: Any, model: nn.Module, reference: nn.Module | None) -> dict[str, Tensor]:
    """Returns the tensors that a checkpoint stores, by name.

    The names are ``model.NAME`` and ``reference.NAME``. The tensors share memory with the models, so loading a
    checkpoint into the tensors changes the models.
    """
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
    """Returns all parameters by name, without wrapper prefixes. A tied parameter occurs once, under its first name."""
    inner = unwrapped(accelerator, model)
    reshard(inner)
    return {_plain_name(name): parameter for name, parameter in inner.named_parameters()}


def _named_buffers(accelerator: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the tensor of each buffer in the state dict.

    Raises ``CheckpointError`` if a module has extra state (``get_extra_state``).
    """
    inner = unwrapped(accelerator, model)
    persistent = {_plain_name(name) for name in inner.state_dict(keep_vars=True)}
    for prefix, module in inner.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"modules must keep their state in tensors, got {type(module).__name__} {prefix}")
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if _plain_name(name) in persistent:
                yield _plain_name(name), buffer


def _plain_name(name: str) -> str:
    """Returns a parameter name without the prefixes that torch.compile and activation checkpointing add."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _names_in_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Returns the parameter names of each group of the optimizer.

    Raises ``CheckpointError`` if the optimizer has a parameter that is not in ``parameters``.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"parameters of the optimizer must be the model's, got another of shape {tuple(parameter.shape)}"
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Yields ``("optimizer.NAME.KEY", parameter, value)`` for each entry of the optimizer's state.

    NAME is the name of the parameter and KEY the key of the entry, such as ``exp_avg``.
    """
    for group, names in zip(optimizer.param_groups, _names_in_groups(optimizer, parameters), strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{name}.{key}", parameter, value


def _optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns a dict from name to value for the entries of the optimizer's state that are tensors."""
    tensors = {}
    for name, parameter, value in _optimizer_state(optimizer, parameters):
        if not isinstance(value, Tensor):
            continue
        if isinstance(parameter, DTensor) and value.shape not in {parameter.shape, torch.Size()}:
            raise CheckpointError(
                "optimizer must have a state with the shape of the parameter or none if parameters are sharded, got "
                f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
            )
        tensors[name] = value
    return tensors


def _optimizer_values(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Returns a dict from name to value for the entries of the optimizer's state that are numbers, strings or None."""
    values = {}
    for name, _, value in _optimizer_state(optimizer, parameters):
        if isinstance(value, Tensor):
            continue
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise CheckpointError(f"optimizer must have a state of tensors and numbers, got {type(value)} for {name}")
        values[name] = value
    return values


def _empty_optimizer_tensors(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns uninitialized tensors by name, into which the saved optimizer state can be loaded.

    ``saved`` is the metadata of the saved tensors. If a tensor has the shape of its parameter, the tensor is sharded
    like the parameter.
    """
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
    """Sorts the saved parameter groups in the order of the optimizer's groups, and returns them.

    Raises ``CheckpointError`` if the optimizer's groups hold other parameters than the saved groups.
    """
    names_now = _names_in_groups(optimizer, parameters)
    by_names = {frozenset(group["params"]): group for group in groups}
    if len(names_now) != len(groups) or any(frozenset(names) not in by_names for names in names_now):
        names_saved = [group["params"] for group in groups]
        different = {name for names in names_now for name in names} ^ {name for names in names_saved for name in names}
        raise CheckpointError(
            f"optimizer must have the parameter groups of the checkpoint, of {[len(names) for names in names_saved]} "
            f"parameters, got groups of {[len(names) for names in names_now]}; one of the two lacks "
            f"{list_names(different) or 'none'}"
        )
    return [{**by_names[frozenset(names)], "params": names} for names in names_now]


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Loads the saved parameter groups and the saved state into the optimizer. The state keeps its saved dtypes."""
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for full_name, value in (*tensors.items(), *values.items()):
        if full_name.startswith("optimizer."):
            name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
            state.setdefault(numbers[name], {})[key] = value
    numbered = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in state.items():
        loaded = optimizer.state[ordered[number]]
        for key, value in entries.items():
            # torch casts the state to the dtype of the parameter, which rounds float32 states of bfloat16 parameters.
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def _check_tensors(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], path: Path) -> None:
    """Raises ``CheckpointError`` unless the saved tensors match ``tensors`` in names, shapes and dtypes.

    ``saved`` maps the name of each saved tensor to its metadata.
    """
    missing, unknown = tensors.keys() - saved.keys(), saved.keys() - tensors.keys()
    if missing or unknown:
        raise CheckpointError(
            f"the model must be trained in the parameters that {path} has, got {len(missing)} that it lacks "
            f"({list_names(missing)}) and {len(unknown)} that only it has ({list_names(unknown)})"
        )
    for name, tensor in tensors.items():
        entry = saved[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"a checkpoint must hold tensors, got {type(entry).__name__} for {name} in {path}")
        shape, dtype = tuple(entry.size), entry.properties.dtype
        if (shape, dtype) != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(
                f"{name} must be of shape {shape} and {dtype} as in {path}, got {tuple(tensor.shape)} and "
                f"{tensor.dtype}"
            )


def _scaler_state(accelerator: Any) -> dict[str, Any]:
    return {} if accelerator.scaler is None else accelerator.scaler.state_dict()


def _check_scaler(accelerator: Any, saved: dict[str, Any], path: Path) -> None:
    if bool(saved) != bool(_scaler_state(accelerator)):
        names = {True: "with a loss scaler (fp16)", False: "without a loss scaler"}
        raise CheckpointError(f"precision must be that of {path}, {names[bool(saved)]}, got a run {names[not saved]}")


def _load_deepspeed(model: Any, path: Path, reference: nn.Module | None) -> None:
    if reference is not None:
        raise CheckpointError("reference must be None with DeepSpeed, which has no part for it")
    folder, _ = model.load_checkpoint(str(path), tag=_DEEPSPEED, load_module_strict=False)
    if folder is None:
        raise CheckpointError(f"DeepSpeed must find its part of the checkpoint, got none in {path / _DEEPSPEED}")


def _random_name(accelerator: Any) -> str:
    return f"rng-{accelerator.process_index:05d}.pt"


def random_state(accelerator: Any) -> dict[str, Any]:
    """Returns the states of this rank's random generators in types that ``torch.load(weights_only=True)`` reads."""
    numpy = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),  # type: ignore[index,union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(accelerator.device) if accelerator.device.type == "cuda" else None,
    }


def restore_random_state(accelerator: Any, state: Mapping[str, Any]) -> None:
    """Restores the states of this rank's random generators from the result of ``random_state``."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if (state["cuda"] is not None) != (accelerator.device.type == "cuda"):
        _LOG.warning("the random state of CUDA is not restored: the run has changed between CPU and GPU")
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Suppresses torch's warning "torch.distributed is disabled" during the ``with`` block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
