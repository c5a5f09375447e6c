"""Loads the model to train, freezes parts or adds LoRA adapters, and disables dropout."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mpo_ext.checks import check_model_path, did_you_mean, install_hint
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.processors import check_on_hub, load_config, load_processor, takes_images
from mpo_ext.train.masks import use_split_attention
from mpo_ext.train.quantization import disable_weight_packing, quantization_config
from mpo_ext.train.recipe import LoraRecipe, ModelRecipe, Recipe
from mpo_ext.train.zero import is_partitioned, without_partitioning

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# For each part that a recipe names, its possible submodule names in transformers' models. A model may have several.
PARTS = {
    "vision_tower": (
        "vision_tower", "visual", "vision_model", "vision_embed_tokens", "vision_encoder", "image_tower",
        "video_tower", "high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj",
    ),
    "projector": (
        "multi_modal_projector", "connector", "visual.merger", "visual.deepstack_merger_list", "visual.merger_list",
        "aligner", "embed_vision", "projector", "mm_projector", "merger", "resampler_model", "vision_adapter",
        "vision_projection", "vision_tower.merger", "vision_tower.patch_merger", "vision_model.merger",
        "vision_model.connector",
    ),
    "language_model": ("language_model", "text_model"),
}  # fmt: skip


def load_model(recipe: ModelRecipe) -> tuple[nn.Module, Any]:
    """Returns the model, prepared for training, and its processor. A text model has a tokenizer instead.

    The model is on the CPU, with one exception: if there is a GPU, a quantized model is on the GPU.
    """
    check_model_path("model.path", recipe.path, recipe.revision)
    check_on_hub("model.path", recipe.path, **recipe.hub_options)
    config = load_config(recipe.path, **recipe.hub_options)
    processor = load_processor(recipe.path, config, **recipe.hub_options)  # first, because it fails within seconds
    options: dict[str, Any] = {}
    if recipe.lora is not None and recipe.lora.quantization is not None:
        options["quantization_config"] = _quantization(recipe, config)
    # With ZeRO-3, loading may draw random numbers. The initial values of adapters must not depend on that.
    with torch.random.fork_rng(devices=[]):
        model = loader_of(config).from_pretrained(
            recipe.path,
            **recipe.hub_options,
            dtype=recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
            attn_implementation=recipe.attention,
            **options,
        )
    disable_weight_packing(model)
    if is_partitioned(model):
        # With ZeRO-3, transformers also records renamings that the checkpoint did not need; a save would undo them.
        renamings = getattr(model, "_weight_conversions", ())
        model._weight_conversions = [entry for entry in renamings if entry.was_used()]  # noqa: SLF001
    return prepare_model(model, recipe), processor


def loader_of(config: Any) -> Any:
    """Returns the auto class of transformers that loads models with this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def prepare_model(model: nn.Module, recipe: ModelRecipe) -> nn.Module:
    """Prepares a model for training as the recipe says, and returns the model to train.

    Disables dropout. Freezes parts of the model, or adds adapters. If the model supports split attention, enables it
    (``use_split_attention``). If the recipe says so, enables gradient checkpointing.

    Raises:
        ValueError: If all parameters are frozen.
    """
    switch_off_dropout(model)
    use_split_attention(model)
    config: Any = model.config
    config.use_cache = False
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora, revision=recipe.revision)
    else:
        freeze_parts(model, recipe.freeze)
    if recipe.gradient_checkpointing:
        inner: Any = unwrap_model(model)
        # Reentrant checkpointing fails with frozen embeddings, because none of its inputs requires a gradient.
        enable = getattr(inner, "activation_checkpointing_enable", None)  # the name in later versions of transformers
        if enable is not None:
            enable({"use_reentrant": False})
        else:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze must leave something to train, got {', '.join(recipe.freeze)}")
    return model.train()


def switch_off_dropout(model: nn.Module) -> None:
    """Sets all dropout and drop path rates to 0, so that policy and reference agree at the first step.

    The trainer of the MPO authors keeps the drop path of the vision tower, so its first rewards are not 0.
    """
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "drop_prob" in name or "drop_path" in name):
                setattr(module, name, 0.0)


def freeze_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Freezes the named parts of a model. "language_model" includes the embeddings and the output head.

    Raises:
        ValueError: If a part is unknown, the model lacks it, or it is the language model of a text model.
    """
    inner: Any = unwrap_model(model)
    kind = type(inner).__name__
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"freeze must name parts among {', '.join(PARTS)}, got {part!r}")
        if part == "language_model" and not has_vision(inner):
            raise ValueError(f"freeze must leave something to train, got {part!r} of the text model {kind}")
        modules = [module for _, module in modules_of(inner, part)]
        if not modules:
            raise ValueError(f"freeze must name parts that the model has, got {part!r}, not found in {kind}")
        if part == "language_model":
            modules += [inner.get_output_embeddings(), inner.get_input_embeddings()]
        for module in modules:
            module.requires_grad_(False)
        if part == "vision_tower":  # in Qwen2-VL the projector is a submodule of the vision tower
            for _, module in modules_of(inner, "projector"):
                module.requires_grad_("projector" not in parts)


def has_vision(model: nn.Module) -> bool:
    return bool(list(modules_of(unwrap_model(model), "vision_tower")))


def add_lora(model: nn.Module, recipe: LoraRecipe, *, revision: str | None = None) -> nn.Module:
    """Adds LoRA adapters to a model, freezes all other parameters and returns peft's model.

    ``revision`` is the revision of the model on the hub. The config of the adapters names it, so that they are merged
    into the weights that they were trained with.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If a name in the list ``lora.target`` is that of no layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"model.lora needs peft: {install_hint('lora')}") from error
    inner: Any = unwrap_model(model)
    target: str | list[str] = recipe.target if isinstance(recipe.target, str) else list(recipe.target)
    names = [f".{name}" for name, _ in inner.named_modules()]
    for part in () if isinstance(target, str) else target:  # peft only reports a list without any match
        if not any(name.endswith(f".{part}") for name in names):
            hint = did_you_mean(part, {name.rpartition(".")[2] for name in names})
            raise ValueError(f"lora.target must name layers of the model, got {part!r}{hint}")
    if target == "all-linear":
        target = language_linears(inner)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft takes a float
        lora_dropout=recipe.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def language_linears(model: nn.Module) -> list[str]:
    """Returns the names of the language model's linear layers, except the output head and LoRA adapters."""
    inner: Any = unwrap_model(model)
    roots = [f"{name}." for name, _ in modules_of(inner, "language_model")] if has_vision(inner) else [""]
    head = inner.get_output_embeddings()
    return [
        name
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and "lora_" not in name
        and name.startswith(tuple(roots))
    ]


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters that FSDP2 keeps in memory after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def modules_of(inner: nn.Module, part: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a part of the model, such as "vision_tower", as tuples (name, module).

    Qwen3-VL, for example, has a projector after the vision tower, and others after some of its layers. Yields nothing
    if the model lacks the part.
    """
    for prefix in ("model.", "", "model.model."):
        found: dict[int, tuple[str, nn.Module]] = {}
        for name in PARTS[part]:
            with contextlib.suppress(AttributeError):
                module = inner.get_submodule(f"{prefix}{name}")
                found.setdefault(id(module), (f"{prefix}{name}", module))  # a property may be a second name
        if found:
            yield from found.values()
            return


def _quantization(recipe: ModelRecipe, config: Any) -> Any:
    with without_partitioning(), torch.device("meta"):
        model = loader_of(config).from_config(config, trust_remote_code=recipe.trust_remote_code)
    quantized = set(language_linears(model))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return quantization_config(recipe.dtype, [name for name in linears if name not in quantized])


def reference_recipe(recipe: Recipe) -> ModelRecipe:
    """Returns the recipe of the model at ``reference.path``: without ``lora``, ``freeze`` and checkpointing."""
    path, revision = recipe.reference.path, recipe.reference.revision
    assert path is not None
    return dataclasses.replace(
        recipe.model, path=path, revision=revision, lora=None, freeze=(), gradient_checkpointing=False
    )
