"""The load-balancing loss of mixture-of-experts models. It makes the routers use all experts.

The loss is that of Switch Transformers (arXiv 2101.03961, equations 4 to 6), as computed by
``load_balancing_loss_func`` of transformers. Hooks record the logits of the routers. The model argument
``output_router_logits`` is not used, because it needs a dense attention mask. Also, some models do not return the
logits.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.train.masks import decoder_config

#: Parameters of ``load_balancing_loss_func`` in the models whose auxiliary loss is that of this module.
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


class Router(NamedTuple):
    """A module of a mixture-of-experts model that computes router logits.

    If the module returns a tuple, entry ``position`` of the tuple holds the logits. ``owner`` is the transformers
    class whose ``_can_record_outputs`` declares the module.
    """

    module: nn.Module
    position: int
    owner: type


class RouterLoss:
    """The load-balancing loss of a model's routers: ``E * sum_e f_e * P_e``.

    E is the number of experts, and k is the number of experts per token. f_e is the fraction of tokens that have
    expert e among their k most likely experts. f_e has no gradient. P_e is the mean probability of expert e. Both are
    computed over all tokens and routers. If all experts are used equally, the loss is k.

    Attributes:
        routers: Modules that return the router logits.
        experts_per_token: Number of experts per token, k.
        coef: Weight of this loss in the loss of a step.
    """

    def __init__(self, routers: Sequence[Router], experts_per_token: int, coef: float) -> None:
        self.routers, self.experts_per_token, self.coef = tuple(routers), experts_per_token, coef

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Context manager that yields a list. During the ``with`` block, routers append their logits to it.

        Run backward after the block. With gradient checkpointing, backward runs the routers again. Their logits must
        not be appended a second time.
        """
        logits: list[Tensor] = []
        handles = [router.module.register_forward_hook(_recorder(router.position, logits)) for router in self.routers]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, logits: Sequence[Tensor], is_counted: Tensor) -> Tensor:
        """Returns the loss as a scalar tensor that is differentiable in the logits.

        The dtype is float32, or float64 for float64 logits.

        Args:
            logits: Logits of each router for N tokens, ``[N, E]`` or ``[R, L, E]`` with ``R * L = N``.
            is_counted: ``[N]`` bool; False for tokens that the loss ignores, such as padding.

        Raises:
            RuntimeError: If no logits were recorded, or their shapes do not match.
        """
        flat = [layer.flatten(0, -2) for layer in logits]
        is_counted = is_counted.to(flat[0].device, non_blocking=True) if flat else is_counted
        expected = {(len(is_counted), layer.shape[-1]) for layer in flat[:1]}
        if {tuple(layer.shape) for layer in flat} != expected or not flat:
            shapes = ", ".join(sorted({str(tuple(layer.shape)) for layer in flat})) or "none"
            raise RuntimeError(
                f"routers must return logits of shape ({len(is_counted)}, experts), one row for each token, got "
                f"{shapes}: loss.router_aux_loss_coef=0 trains without the auxiliary loss"
            )
        return _LoadBalancing.apply(is_counted, self.experts_per_token, *flat)


def make_router_loss(model: nn.Module, coef: float | None, say: Callable[[str], object]) -> RouterLoss | None:
    """Returns the auxiliary router loss of a model, or None if the loss is disabled.

    The loss is disabled if its weight is 0, or if ``coef`` is None and the model has no such loss.

    Args:
        model: Model, possibly wrapped (DDP, FSDP, DeepSpeed, peft).
        coef: Weight of the loss. None: ``router_aux_loss_coef`` of the model's config.
        say: Function that prints a line; called if the model has routers.

    Raises:
        ValueError: If ``coef`` is positive and the model has no such loss.
    """
    routers = find_routers(model)
    reason = _unknown_loss(model, routers) if routers else "it has no routers"
    if coef and reason is not None:
        raise ValueError(
            "loss.router_aux_loss_coef must be null or 0 for a model without an auxiliary loss, got "
            f"{coef}: {type(unwrap_model(model)).__name__}: {reason}"
        )
    if not routers:
        return None
    config = decoder_config(unwrap_model(model))
    source = "the model's config" if coef is None else "the recipe"
    weight: Any = getattr(config, "router_aux_loss_coef", None) if coef is None else coef
    if reason is None and not weight:
        reason = f"router_aux_loss_coef of {source} is {weight}"
    if reason is not None:
        say(f"no auxiliary loss of the routers: {reason}")
        return None
    loss = RouterLoss(routers, config.num_experts_per_tok, float(weight))
    say(f"auxiliary loss of {len(routers)} routers with weight {loss.coef:g} (router_aux_loss_coef of {source})")
    return loss


def find_routers(model: nn.Module) -> list[Router]:
    """Returns the modules whose outputs transformers records as ``router_logits``; [] for a model without routers."""
    routers: dict[int, Router] = {}
    for owner in unwrap_model(model).modules():
        specs = (getattr(type(owner), "_can_record_outputs", None) or {}).get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            for name, module in owner.named_modules():
                if id(module) not in routers and _matches(spec, name, module):
                    # If spec is a class instead of an OutputRecorder, the logits are the second result of its modules.
                    routers[id(module)] = Router(module, getattr(spec, "index", 1), type(owner))
    return list(routers.values())


def _matches(spec: Any, name: str, module: nn.Module) -> bool:
    """Returns whether ``spec`` declares that the module ``name`` is a router.

    ``spec`` is an entry of ``_can_record_outputs``, in which transformers declares the router outputs of a model.
    """
    kind = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
    suffix = spec if isinstance(spec, str) else getattr(spec, "class_name", None)
    is_target = (kind is not None and isinstance(module, kind)) or (suffix is not None and name.endswith(suffix))
    layer = getattr(spec, "layer_name", None)
    return is_target and (layer is None or f".{layer.strip('.')}." in f".{name}.")


def _unknown_loss(model: nn.Module, routers: Sequence[Router]) -> str | None:
    """Returns why ``RouterLoss`` differs from the loss in transformers for the model; None if they agree."""
    owner = next(kind for kind in routers[0].owner.__mro__ if "_can_record_outputs" in vars(kind))
    function = getattr(sys.modules[owner.__module__], "load_balancing_loss_func", None)
    if function is None:
        return f"transformers has none for {owner.__name__}"
    if list(inspect.signature(function).parameters) != _PARAMETERS:
        return f"transformers has another one for {owner.__name__}"
    if not isinstance(getattr(decoder_config(unwrap_model(model)), "num_experts_per_tok", None), int):
        return "its config has no num_experts_per_tok"
    return None


def _recorder(position: int, logits: list[Tensor]) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        logits.append(output[position] if isinstance(output, tuple) else output)

    return record


class _LoadBalancing(torch.autograd.Function):
    """Autograd function of ``RouterLoss``. It does not store the probabilities; backward computes them again.

    For logits z with probabilities p, the gradient is d loss / d z[t,j] = E / T * p[t,j] * (f_j - sum_e f_e * p[t,e]).
    T is the number of counted tokens times the number of routers; E and f are explained in ``RouterLoss``.
    """

    @staticmethod
    def forward(ctx: Any, is_counted: Tensor, experts_per_token: int, *logits: Tensor) -> Tensor:
        used = probability = _probabilities(logits[0][:0]).sum(0)
        device = used.device
        for layer in logits:
            probabilities, counted = _probabilities(layer), is_counted.to(layer.device).unsqueeze(1)
            top = probabilities.topk(experts_per_token, dim=-1).indices
            hits = torch.zeros_like(probabilities).scatter_(1, top, 1.0)
            used = used + (hits * counted).sum(0).to(device)
            probability = probability + (probabilities * counted).sum(0).to(device)
        total = (is_counted.sum() * len(logits)).clamp(min=1).to(device)
        share = used / total
        ctx.save_for_backward(is_counted, share, total, *logits)
        return len(share) * (share * (probability / total)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        is_counted, share, total, *logits = ctx.saved_tensors
        factor = grad_outputs[0] * len(share) / total
        gradients: list[Tensor | None] = [None, None]
        for layer, needed in zip(logits, ctx.needs_input_grad[2:], strict=True):
            if not needed:
                gradients.append(None)
                continue
            probabilities, share_here = _probabilities(layer), share.to(layer.device)
            mean = (probabilities * share_here).sum(-1, keepdim=True)
            scale = factor.to(layer.device) * is_counted.to(layer.device).unsqueeze(1)
            gradients.append((scale * probabilities * (share_here - mean)).to(layer.dtype))
        return tuple(gradients)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
