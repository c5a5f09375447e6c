"""The optimizer of a run: parameter groups, optimizers by name, learning-rate schedule and gradient clipping."""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mpo_ext.checks import did_you_mean, install_hint, shorten
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.loss.weights import full_shape
from mpo_ext.train.model import has_vision, modules_of
from mpo_ext.train.optim_recipe import OptimRecipe
from mpo_ext.train.settings import MODEL_PARTS

#: Optimizers that cannot train sharded parameters, by the kind of sharding.
_NOT_ON_SHARDS = {
    "DEEPSPEED": ("adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"),
    "FSDP": ("adamw_8bit", "paged_adamw_8bit", "adafactor"),
}

Maker = Callable[[list[dict[str, Any]], dict[str, Any], nn.Module], torch.optim.Optimizer]


class ParameterGroup(NamedTuple):
    """A group of parameters with the same optimizer settings.

    Attributes:
        part: Name of the model part in ``optim.groups``; "" for parameters that use the settings of ``optim``.
        parameters: The trainable parameters.
        learning_rate: Maximum learning rate.
        weight_decay: Weight decay.
        orthogonalized: Whether Muon updates the parameters. Always False if ``optim.name`` is not "muon".
    """

    part: str
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float
    orthogonalized: bool = False


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> list[ParameterGroup]:
    """Divides the trainable parameters into groups with equal optimizer settings.

    Parameters with fewer than two axes, such as biases and norms, have no weight decay.

    Raises:
        ValueError: If ``optim.groups`` names a part that the model lacks or does not train.
    """
    parts = _part_of_parameters(model, recipe.groups)
    hidden = {id(matrix) for matrix in hidden_matrices(model)} if recipe.name == "muon" else set()
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {
        (part, orthogonalized, has_decay): []
        for part in ("", *recipe.groups)
        for orthogonalized in (True, False)
        for has_decay in (True, False)
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = parts.get(id(parameter), ""), id(parameter) in hidden, len(full_shape(parameter)) >= 2
            groups[key].append(parameter)
    for part in recipe.groups:
        if not any(parameters for (name, *_), parameters in groups.items() if name == part):
            raise ValueError(f"optim.groups must name parts that are trained, got {part!r}, which is frozen")
    made = []
    for (part, orthogonalized, has_decay), parameters in groups.items():
        own = recipe.groups.get(part)
        rate = recipe.learning_rate if own is None or own.learning_rate is None else own.learning_rate
        decay = recipe.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        if parameters:
            made.append(ParameterGroup(part, parameters, rate, decay if has_decay else 0.0, orthogonalized))
    return made


def _part_of_parameters(model: nn.Module, parts: Iterable[str]) -> dict[int, str]:
    """Returns a dict from ``id(parameter)`` to the model part of the parameter, such as "language_model".

    The dict contains only the parameters of the parts in ``parts``.
    """
    inner: Any = unwrap_model(model)
    found: dict[int, str] = {}
    for part in MODEL_PARTS:  # in Qwen2-VL the projector is a submodule of the vision tower
        modules = [module for _, module in modules_of(inner, part)]
        if part == "language_model":
            modules = [inner] if not has_vision(inner) else [*modules, inner.get_output_embeddings()]
        if part in parts and not modules:
            kind = type(inner).__name__
            raise ValueError(f"optim.groups must name parts that the model has, got {part!r}, not found in {kind}")
        found |= {id(parameter): part for module in modules for parameter in module.parameters()}
    return {key: part for key, part in found.items() if part in parts}


def hidden_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields all parameters with two axes, except the weights of embeddings and of the output head."""
    inner: Any = unwrap_model(model)
    head = inner.get_output_embeddings()
    outer = [module for module in inner.modules() if isinstance(module, nn.Embedding) or module is head]
    excluded = {id(parameter) for module in outer for parameter in module.parameters()}
    for parameter in inner.parameters():
        if len(full_shape(parameter)) == 2 and id(parameter) not in excluded:
            yield parameter


def make_optimizer(
    groups: Sequence[ParameterGroup], recipe: OptimRecipe, model: nn.Module, accelerator: Any
) -> torch.optim.Optimizer:
    """Returns the optimizer that the recipe names. Its parameter groups have the order of ``groups``.

    Raises:
        ImportError: If the package of the optimizer is not installed.
        TypeError: If the optimizer rejects ``optim.args``, or ``optim.name`` is not an optimizer.
        ValueError: If the name is unknown, or the optimizer does not support the device, the sharding of the run, the
            installed torch or a weight decay.
    """
    _check_ranks(recipe, accelerator)
    options: dict[str, Any] = {"lr": recipe.learning_rate}
    if recipe.takes_betas:
        options |= {"betas": recipe.betas, "eps": recipe.eps}
    if recipe.name == "adamw":
        # Without the fused implementation, AdamW on a CPU allocates a tensor for each intermediate result.
        options["fused"] = accelerator.device.type in ("cpu", "cuda") or None
    options |= recipe.args
    described = [
        {"params": group.parameters, "weight_decay": group.weight_decay}
        | ({"orthogonalized": group.orthogonalized} if recipe.name == "muon" else {})
        for group in groups
    ]
    make = _MAKERS.get(recipe.name) or _importing(recipe.name)
    try:
        made = make(described, options, model)
    except TypeError as error:
        text = f"optim.args must be arguments of {recipe.name}, got {shorten(recipe.args)}: {error}"
        raise TypeError(text) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optim.name must be a torch.optim.Optimizer, got {recipe.name} ({type(made).__name__})")
    decays = {group.weight_decay for group in groups} - {0.0}
    if decays and recipe.name not in _MAKERS and "weight_decay" not in made.defaults:
        raise ValueError(f"optim.weight_decay must be 0 with {recipe.name}, which has none, got {max(decays)}")
    return made


def _check_ranks(recipe: OptimRecipe, accelerator: Any) -> None:
    """Raises ``ValueError`` if the run shards parameters over ranks in a way that the optimizer does not support."""
    sharding = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if recipe.name in _NOT_ON_SHARDS.get(sharding, ()):
        raise ValueError(
            f"optim.name must be an optimizer that works on shards of parameters under {sharding}, got {recipe.name!r}"
        )


def _importing(path: str) -> Maker:
    """Returns a function that makes an optimizer of the class ``path``, such as "torch.optim.SGD"."""
    module, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"optim.name must be the import path of a class, got {path!r}: {error}") from error
    kind = getattr(owner, name, None)
    if kind is None:
        known = {other.lower(): other for other in vars(owner)}
        hint = did_you_mean(known.get(name.lower(), name), vars(owner))
        raise ValueError(f"optim.name must be the import path of a class, got {path!r}, not in {module}{hint}")
    return lambda groups, options, model: kind(groups, **options)


def _make_adamw(groups: list[dict[str, Any]], options: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **options)


def _make_adamw_8bit(
    groups: list[dict[str, Any]], options: dict[str, Any], model: nn.Module, *, paged: bool = False
) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f"optim.name {_8BIT[paged]!r} needs bitsandbytes: {install_hint('qlora')}") from error
    device = next(parameter.device for group in groups for parameter in group["params"])
    if paged and device.type != "cuda":
        raise ValueError(f"optim.name must be 'adamw_8bit' on {device.type}, which has no pages, got {_8BIT[True]!r}")
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    made = kind(groups, **options)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():  # 8 bits are too few for embeddings, whose gradients are sparse (arXiv 2110.02861)
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return made


def _make_adafactor(groups: list[dict[str, Any]], options: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, **{"scale_parameter": False, "relative_step": False, **options})


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for all other parameters.

    ``torch.optim.Muon`` updates the groups with ``orthogonalized=True``. ``torch.optim.AdamW`` updates all other
    groups. By default, ``adjust_lr_fn`` scales Muon's updates to the size of AdamW's updates, so that both optimizers
    can use the same learning rate.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adjust_lr_fn: str = "match_rms_adamw",
        **options: Any,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optim.name 'muon' needs torch 2.9 or later, got {torch.__version__}")
        groups = list(params)
        sides = {side: [group for group in groups if group["orthogonalized"] == side] for side in (True, False)}
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if sides[True]:
            self._parts[True] = torch.optim.Muon(sides[True], lr=lr, adjust_lr_fn=adjust_lr_fn, **options)
        if sides[False]:
            self._parts[False] = torch.optim.AdamW(sides[False], lr=lr, betas=betas, eps=eps)
        super().__init__(groups, {"lr": lr})  # Muon and AdamW have already filled their defaults into the groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates all parameters. Returns the result of ``closure``; None without ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for side, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["orthogonalized"] == side]
            part.state = self.state  # set in each step, because load_state_dict replaces param_groups and state
            part.step()
        return loss


def _make_muon(groups: list[dict[str, Any]], options: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return Muon(groups, **options)


_8BIT = {False: "adamw_8bit", True: "paged_adamw_8bit"}
_MAKERS: dict[str, Maker] = {
    "adamw": _make_adamw,
    "adamw_8bit": _make_adamw_8bit,
    "paged_adamw_8bit": lambda *arguments: _make_adamw_8bit(*arguments, paged=True),
    "adafactor": _make_adafactor,
    "muon": _make_muon,
}


def scheduled_learning_rate(recipe: OptimRecipe, maximum: float, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step. Steps are counted from 0.

    ``maximum`` is the learning rate at the end of warmup. ``recipe`` defines warmup and schedule.
    """
    warmup_steps = recipe.warmup_steps(total_steps)
    if step < warmup_steps:
        return maximum * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if recipe.schedule == "cosine":
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    elif recipe.schedule == "linear":
        fraction = 1 - progress
    elif recipe.schedule == "wsd":
        # Both numbers of steps are rounded up, so they could overlap.
        decay_steps = max(1, min(math.ceil(total_steps * recipe.decay_ratio), total_steps - warmup_steps))
        fraction = min(1.0, (total_steps - step) / decay_steps)
    else:
        fraction = 1.0
    return maximum * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * fraction)


def set_learning_rates(
    optimizer: Any, groups: Sequence[ParameterGroup], recipe: OptimRecipe, step: int, total_steps: int
) -> dict[str, float]:
    """Sets the learning rates of a step, and returns them as entries for the log.

    ``step`` counts from 0. Each part in ``optim.groups`` has an entry, such as ``learning_rate_projector``. The entry
    ``learning_rate`` is for all other parameters. Without other parameters, the entry is missing.

    Call this function before backward: under DeepSpeed, accelerate runs the optimizer step in backward.
    """
    for group, made in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = scheduled_learning_rate(recipe, made.learning_rate, step, total_steps)
    rates = {"learning_rate": recipe.learning_rate} if any(not group.part for group in groups) else {}
    rates |= {f"learning_rate_{group.part}": group.learning_rate for group in groups if group.part}
    return {name: scheduled_learning_rate(recipe, rate, step, total_steps) for name, rate in rates.items()}


def clip_gradients(accelerator: Any, model: nn.Module, max_grad_norm: float) -> float:
    """Clips the gradient norm to ``max_grad_norm`` (0: no clipping), and returns the norm before clipping.

    DeepSpeed clips the gradients itself. With DeepSpeed, this function only returns the norm that DeepSpeed reports.

    Raises:
        RuntimeError: If DeepSpeed reports no norm. A settings file of DeepSpeed can disable the norm.
    """
    max_norm = max_grad_norm if max_grad_norm > 0 else math.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    if norm is None:  # the result of DeepSpeed before its first step
        norm = model.get_global_grad_norm() if hasattr(model, "get_global_grad_norm") else None  # type: ignore[operator]
        if norm is None:
            raise RuntimeError(
                "the gradient norm must be computed, got None from DeepSpeed: enable it in its settings"
            )
    return float(norm)
