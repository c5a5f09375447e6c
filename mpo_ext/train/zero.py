"""Support for DeepSpeed: parameters partitioned by ZeRO-3, engines for frozen models, and batch settings.

ZeRO-3 replaces a parameter by an empty tensor with the attribute ``ds_shape``. Except for ``prepare_frozen``, all
functions can also be called in runs without DeepSpeed.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mpo_ext.loss.weights import gathered
from mpo_ext.train.recipe import Recipe

# The settings that the engine of a frozen model shares with that of the policy.
_SHARED_SETTINGS = ("zero_optimization", "bf16", "fp16", "communication_data_type", "train_micro_batch_size_per_gpu")


def is_deepspeed(accelerator: Any) -> bool:
    return accelerator.distributed_type == "DEEPSPEED"


def zero_stage(accelerator: Any) -> int | None:
    """Returns the ZeRO stage of a run, or None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def check_zero_stage(accelerator: Any) -> None:
    """Raises ValueError for DeepSpeed without ZeRO, which does not report the gradient norm."""
    if is_deepspeed(accelerator) and zero_stage(accelerator) == 0:
        raise ValueError(
            "zero_optimization.stage of DeepSpeed must be 1, 2 or 3, got 0: without ZeRO, use accelerate without "
            "DeepSpeed (DDP)"
        )


def is_partitioned(model: nn.Module) -> bool:
    """Returns whether ZeRO-3 has partitioned the parameters of a model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def without_partitioning() -> Iterator[None]:
    """Disables ZeRO-3 of transformers during the ``with`` block, so that a single rank can load a whole model."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from accelerate.state import AcceleratorState
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(AcceleratorState().deepspeed_plugin.dschf)


def copy_model(model: nn.Module) -> nn.Module:
    """Returns a deep copy of a model. If ZeRO-3 has partitioned the model, the copy is also partitioned.

    All ranks must call this function. Partitioned parameters are gathered one at a time.
    """
    if not is_partitioned(model):
        return copy.deepcopy(model)
    import deepspeed
    from accelerate.state import AcceleratorState

    config = AcceleratorState().deepspeed_plugin.dschf.config
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        holder = nn.Module()
        with gathered(parameter):
            whole = parameter.detach().clone()
        holder.register_parameter("copy", nn.Parameter(whole, requires_grad=parameter.requires_grad))
        deepspeed.zero.Init(module=holder, config_dict_or_path=config)
        copies[id(parameter)] = holder.copy
    return copy.deepcopy(model, copies)


def full_state_dict(model: nn.Module, *, is_main: bool) -> dict[str, Tensor] | None:
    """Returns the unsharded state dict of a model, on the CPU. Ranks other than the main rank get None.

    All ranks must call this function. All names of a tied parameter have the same tensor as their value.
    """
    state = model.state_dict(keep_vars=True)
    whole: dict[int, Any] = {}
    for value in {id(value): value for value in state.values()}.values():
        if not isinstance(value, Tensor):  # bitsandbytes may add strings
            whole[id(value)] = value
            continue
        with gathered(value):
            whole[id(value)] = value.detach().to("cpu", copy=True) if is_main else None
    return {name: whole[id(value)] for name, value in state.items()} if is_main else None


def prepare_frozen(accelerator: Any, model: nn.Module) -> nn.Module:
    """Returns a DeepSpeed engine for a frozen model. Its dtype is the dtype of the policy's engine.

    Under ZeRO-3, the engine also shards the model.
    """
    import deepspeed

    policy_config = accelerator.state.deepspeed_plugin.deepspeed_config
    config = {name: copy.deepcopy(policy_config[name]) for name in _SHARED_SETTINGS if name in policy_config}
    if zero_stage(accelerator) != 3:  # lower stages shard only gradients and states of the optimizer
        config["zero_optimization"] = {"stage": 0}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def set_sizes(recipe: Recipe, accelerator: Any) -> None:
    """Sets DeepSpeed's micro-batch size and gradient clipping from the recipe, and its accumulation steps to 1."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.optim.micro_batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        plugin.deepspeed_config["gradient_clipping"] = recipe.optim.max_grad_norm
