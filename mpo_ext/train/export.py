"""Exports the trained model in Hugging Face format, optionally with the LoRA adapters merged into it."""

import copy
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from mpo_ext.chat.template import find_chat_template
from mpo_ext.chat.variables import bake_variables
from mpo_ext.files import sync_tree, write_json
from mpo_ext.train.checkpoint_files import (
    CheckpointError,
    free_mib,
    list_names,
    move_into_place,
    remove_leftovers,
    temporary_path,
    together,
)
from mpo_ext.train.checkpoint_state import unwrapped
from mpo_ext.train.model import reshard
from mpo_ext.train.quantization import load_dequantized, quantized_layers
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import ModelRecipe
from mpo_ext.train.zero import full_state_dict, is_deepspeed, is_partitioned, without_partitioning


def with_chat_settings(processor: Any, settings: ModelRecipe) -> Any:
    """Returns a copy of the processor with the chat template and the template variables of the recipe.

    The exported processor then makes the same prompts as training. If the recipe sets no template and no variables,
    or if there is no template at all, the processor is not copied.
    """
    template = find_chat_template(processor, settings.chat_template)
    if template is None or not (settings.chat_template or settings.chat_template_kwargs):
        return processor
    processor = copy.copy(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = getattr(tokenizer, "special_tokens_map", {})  # transformers passes these to every template
    processor.chat_template = bake_variables(template, settings.chat_template_kwargs, tokens)
    return processor


def export_model(accelerator: Any, model: nn.Module, processor: Any, folder: Path, *, merged: bool = False) -> None:
    """Writes the model in Hugging Face format for ``from_pretrained``. All ranks must call this function.

    With LoRA, the export contains the adapters. With ``merged``, ``folder/merged`` also contains the merged model. To
    merge, the main rank loads the base model again, in the dtype of training. This needs memory for a second model. If
    the base model is quantized, the merged model has the dequantized weights.

    A base model without a name or path cannot be loaded again. In this case, the model in memory is copied and merged.
    A sharded or quantized model cannot be copied: ``CheckpointError`` is raised.

    Args:
        accelerator: accelerate's ``Accelerator``.
        model: Model as ``accelerator.prepare`` returned it.
        processor: Processor or tokenizer to write; None: write none.
        folder: Folder of the export; an earlier export in this folder is replaced completely.
        merged: Whether to write the merged model, too; ignored without LoRA.

    Raises:
        CheckpointError: If any rank fails. For example, the folder holds files other than an export, the disk is full,
            or parameters besides the adapters were trained. The folder stays unchanged.
    """
    folder = Path(os.path.abspath(folder))
    partial = temporary_path(folder)
    with together(accelerator):
        if accelerator.is_main_process:
            _check_replaceable(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent, re.compile(re.escape(folder.name)))
        inner = unwrapped(accelerator, model)
        if hasattr(inner, "peft_config"):
            _check_only_adapters(inner)
        reshard(inner)
    try:
        with together(accelerator):
            state_dict: dict[str, Any] | None = None
            if is_deepspeed(accelerator):
                state_dict = full_state_dict(inner, is_main=accelerator.is_main_process)
            elif _is_sharded(inner):
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                state_dict = get_model_state_dict(inner, options=options)
        with together(accelerator):
            if accelerator.is_main_process:
                with without_partitioning():
                    _write_export(inner, state_dict, processor, partial, merged)
                sync_tree(partial)
                move_into_place(partial, folder)
    except CheckpointError as error:
        free = free_mib(folder.parent)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the model must be written whole into {folder}, got {error} ({free:,} MiB free there); what was there "
            "before is there still"
        ) from error


def mark_exported(accelerator: Any, folder: Path, checkpoint: Path | None) -> None:
    """Records that the export in ``folder`` is the model of ``checkpoint``. Does nothing if ``checkpoint`` is None."""
    if accelerator.is_main_process and checkpoint is not None:
        write_json(_mark_of(folder), {"checkpoint": checkpoint.name, "manifest": _manifest_digest(checkpoint)})


def is_exported(accelerator: Any, folder: Path, checkpoint: Path) -> bool:
    """Returns whether ``folder`` holds the exported model of a checkpoint.

    All ranks must call this function. All ranks get the same result. The function compares the record of
    ``mark_exported`` with the checkpoint. Earlier versions of mpo_ext wrote no record. Without a record, the result is
    True if the exported files are at least as new as the checkpoint.
    """
    configs = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]
    try:
        is_that = json.loads(_mark_of(folder).read_bytes())["manifest"] == _manifest_digest(checkpoint)
    except FileNotFoundError:
        saved_ns = checkpoint.stat().st_mtime_ns
        is_that = any(config.stat().st_mtime_ns >= saved_ns for config in configs)
    except (KeyError, TypeError, ValueError):  # a damaged record
        is_that = False
    return all(gather(accelerator, is_that and bool(configs)))


def _mark_of(folder: Path) -> Path:
    return folder.with_name("exported.json")


def _manifest_digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def check_mergeable(model: nn.Module) -> None:
    """Raises ``CheckpointError`` if ``export_model`` cannot merge the LoRA adapters of the model."""
    peft_model: Any = next(module for module in model.modules() if hasattr(module, "peft_config"))
    is_named = peft_model.peft_config[peft_model.active_adapter].base_model_name_or_path
    kind = "sharded" if _is_sharded(model) else "quantized" if any(quantized_layers(model)) else None
    if kind is not None and not is_named:
        raise CheckpointError(
            f"a {kind} model to be merged must have come from from_pretrained, got a model without a name"
        )


def _is_sharded(model: nn.Module) -> bool:
    return is_partitioned(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def _write_export(
    inner: Any, state_dict: dict[str, Tensor] | None, processor: Any, partial: Path, merged: bool
) -> None:
    inner.save_pretrained(partial, state_dict=state_dict)
    if processor is not None:
        processor.save_pretrained(partial)
    if not hasattr(inner, "peft_config"):
        return
    base = inner.get_base_model()
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(partial)
    if merged:
        _merge(inner, base, partial, state_dict).save_pretrained(partial / "merged")
        if processor is not None:
            processor.save_pretrained(partial / "merged")


def _merge(inner: Any, base: Any, adapters: Path, state_dict: dict[str, Tensor] | None) -> Any:
    """Returns a copy of the base model with the adapters merged into its weights.

    4-bit weights of the base model are dequantized.
    """
    from peft import PeftModel

    config = inner.peft_config[inner.active_adapter]
    source = config.base_model_name_or_path
    if not source:
        check_mergeable(inner)
        return copy.deepcopy(inner).merge_and_unload(safe_merge=True)
    whole = type(base).from_pretrained(source, revision=config.revision, dtype=base.dtype)
    load_dequantized(whole, base, state_dict)
    whole.generation_config = base.generation_config
    return PeftModel.from_pretrained(whole, adapters).merge_and_unload(safe_merge=True)  # type: ignore[operator]


def _check_replaceable(folder: Path) -> None:
    """Raises ``CheckpointError`` if the folder exists, is not empty, and is not an earlier export."""
    if not folder.exists():
        return
    entries = list(folder.iterdir()) if folder.is_dir() else []
    names = {path.name for path in entries} if folder.is_dir() else {"a file"}
    subfolders = {path.name for path in entries if path.is_dir()}
    if names and (not names & {"config.json", "adapter_config.json"} or subfolders - {"merged"}):
        raise CheckpointError(f"folder must be new, empty or an earlier export, got {folder} with {list_names(names)}")


def _check_only_adapters(inner: Any) -> None:
    """Raises ``CheckpointError`` if a parameter was trained that peft does not export."""
    config = inner.peft_config[inner.active_adapter]
    lost = {
        name
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and inner.active_adapter not in name.split(".")
    }
    if lost and getattr(config, "bias", "none") == "none":
        raise CheckpointError(
            f"parameters that are trained besides the adapters must be in modules_to_save of the LoRA config, or they "
            f"are not exported, got {list_names(lost)}"
        )
