"""Runs a Hugging Face model up to its output head, for ``linear_mpo_loss``: the logits are never computed.

The model is run as the user passes it, wrapper and all: a forward of the module inside of a DDP would leave DDP's
reducer un-armed, and the ranks would drift apart. Only the ``forward`` of the head is replaced for the call, by one
that notes what it is given and returns a few known numbers, the probe, in place of logits. What the model makes of
them afterwards tells the factor and the softcap that it puts on its logits.

Neither transformers nor peft is imported: models are told by their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Exact in bfloat16. The large ones tell softcaps apart, the small ones factors.
_PROBE = (-40.0, -3.0, -0.5, 0.0, 0.25, 1.0, 7.0, 60.0)
_INSTEAD = "use mpo_loss(model(...).logits, ...) instead"

# What has been read off the probe of a model, by what its config said then: reading waits for the device.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[float, float | None]]] = WeakKeyDictionary()


class HiddenAndHead(NamedTuple):
    """What ``hidden_and_head`` returns: arguments of ``linear_mpo_loss`` under the names that they have there.

    Attributes:
        hidden: ``[B, T, D]``, what the output head was given, with its graph.
        weight: ``[V, D]`` of the head, as it is during forward.
        bias: ``[V]`` of the head, or None.
        logit_scale: Factor that the model puts on the head's product.
        softcap: Bound that the model puts on its logits, or None.
        outputs: The model's own output. Its ``logits`` are a probe, of no use to anyone.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    outputs: Any

    @property
    def options(self) -> dict[str, Any]:
        """Bias, logit_scale and softcap, to be passed on as ``**head.options`` so that none is forgotten."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def hidden_and_head(model: nn.Module, /, *positional: Any, **inputs: Any) -> HiddenAndHead:
    """Runs the model without its output head, and gets what ``linear_mpo_loss`` needs.

    The logits that the model would have returned are ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) /
    softcap)``, without the tanh if there is no softcap. The factor and the softcap are read off a probe that goes
    through the model once in place of logits; the first call with a model therefore waits for the device.

    Backward must go through ``hidden``: wrappers wait there for the gradient of the outputs. Where the model runs
    under autocast of its own (accelerate), call ``linear_mpo_loss`` under autocast too, or the product is in float32.

    Args:
        model: A Hugging Face model with a linear output head, as it is trained: in DDP, FSDP or what accelerate makes
            of it, with or without LoRA adapters, but not on the head. FSDP must shard the head with the root module.
        positional: None: the model's inputs go by keyword.
        inputs: What ``model(...)`` is called with, without labels, as in ``input_ids=input_ids``.

    Returns:
        A ``HiddenAndHead``.

    Raises:
        TypeError: If the model has no output head, or one that is not a plain linear layer; if inputs are not passed
            by keyword.
        ValueError: If labels are among the inputs.
        RuntimeError: If the forward does not call the head once, does something unknown to its logits, or leaves no
            weight behind, being sharded.
    """
    if positional:
        raise TypeError(
            "inputs must be passed by keyword, as in hidden_and_head(model, input_ids=input_ids), got "
            f"{len(positional)} without: {', '.join(type(one).__name__ for one in positional)}"
        )
    if inputs.get("labels") is not None:
        raise ValueError(
            "inputs must not hold labels, since the model would compute its own loss from what stands in for logits, "
            f"got labels of type {type(inputs['labels']).__name__}: pass them to linear_mpo_loss"
        )
    inner = unwrap_model(model)
    layers = _linear_layers(inner)
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
    dtypes: list[torch.dtype] = []

    with _tapped(layers, calls, dtypes):
        try:
            outputs = model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not calls:  # the model's own affair
                raise
            raise RuntimeError(
                f"model must take {len(_PROBE)} numbers per token in place of its logits, got {type(error).__name__} "
                f"after the output head was called: {_INSTEAD}"
            ) from error

    if len(calls) != 1:
        raise RuntimeError(
            f"model must call its output head once in a forward, got {len(calls)} calls in that of "
            f"{type(inner).__name__}: {_INSTEAD}"
        )
    hidden, weight, bias = calls[0]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and _is_gone(tensor):
            raise RuntimeError(
                f"model must keep the {name} of its output head whole until backward, got one that was freed after "
                "the head's own forward: shard the head together with the root module (FSDP: do not wrap the head by "
                "itself, and do not reshard the root after forward; ZeRO-3: gather the parameter around forward and "
                f"loss), or {_INSTEAD}"
            )
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise RuntimeError(
            f"model must return an object with logits, got {type(outputs).__name__} (return_dict must not be False): "
            f"or {_INSTEAD}"
        )
    if logits.shape != (*hidden.shape[:-1], len(_PROBE)):
        raise _unknown(inner, f"shape {tuple(logits.shape)} from {(*hidden.shape[:-1], len(_PROBE))}")
    numbers = _config_numbers(inner)
    known = _KNOWN.setdefault(inner, {})
    key = (type(inner), *dtypes, logits.dtype, *numbers)
    if key not in known and logits.numel():
        known[key] = _read_probe(inner, logits, numbers, dtypes)
    logit_scale, softcap = known.get(key, (1.0, None))  # without a token nothing can be read, and nothing matters
    if hidden.requires_grad and logits.requires_grad:
        hidden = _Tie.apply(hidden, logits)
    return HiddenAndHead(hidden, weight, bias, logit_scale, softcap, outputs)


class _Probe(torch.autograd.Function):
    """The numbers of ``_PROBE`` for every token, in place of logits.

    Its inputs are those of the head for the graph's sake: DDP with find_unused_parameters looks from the outputs for
    the parameters that will get a gradient. No gradient passes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # In float64, where the device has it, the model's factor can be read exactly. Not expanded: models may write
        # into their logits.
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        return torch.tensor(_PROBE, dtype=dtype, device=hidden.device).repeat(*hidden.shape[:-1], 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        return None, None, None


class _Tie(torch.autograd.Function):
    """Hidden states whose backward passes by the model's outputs, with a gradient of zero.

    Wrappers hang hooks on the outputs that start their part of the backward: FSDP's gathering of parameters, DDP's
    static graph. Without this they would not run, as the loss does not come from the outputs.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype, logits.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad_outputs[0], torch.zeros((), dtype=dtype, device=device).expand(shape)


@contextmanager
def _tapped(
    layers: list[nn.Linear], calls: list[tuple[Tensor, Tensor, Tensor | None]], dtypes: list[torch.dtype]
) -> Iterator[None]:
    """Replaces the forward of the layers by one that notes hidden, weight and bias, and returns the probe."""

    def tap(layer: nn.Linear) -> Any:
        def forward(input: Tensor) -> Tensor:
            # Here and not before: FSDP and ZeRO-3 put the whole parameters in place for the forward only.
            weight, bias = layer.weight, layer.bias
            if hasattr(weight, "full_tensor"):
                raise RuntimeError(
                    f"model must have an output head whose weight is whole during forward, got "
                    f"{type(weight).__name__} with placements {getattr(weight, 'placements', None)}: {_INSTEAD}"
                )
            calls.append((input, weight, bias))
            dtypes.append(input.dtype)
            if torch.is_autocast_enabled(input.device.type):
                dtypes.append(torch.get_autocast_dtype(input.device.type))
            return _Probe.apply(input, weight, bias)

        return forward

    # accelerate's offloading has its own forward on the layer, which brings the weight and then calls this one.
    names = ["_old_forward" if hasattr(layer, "_hf_hook") else "forward" for layer in layers]
    before = [vars(layer).get(name) for layer, name in zip(layers, names, strict=True)]
    try:
        for layer, name in zip(layers, names, strict=True):
            object.__setattr__(layer, name, tap(layer))
        yield
    finally:
        for layer, name, own in zip(layers, names, before, strict=True):
            if own is not None:
                object.__setattr__(layer, name, own)
            else:
                vars(layer).pop(name, None)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the Hugging Face model inside DDP, FSDP1, DeepSpeed, torch.compile and peft wrappers."""
    inner = model
    while not hasattr(type(inner), "get_output_embeddings"):
        if callable(getattr(type(inner), "get_base_model", None)):
            inner = inner.get_base_model()  # type: ignore[operator]
            continue
        for name in ("_orig_mod", "module"):
            if isinstance(getattr(inner, name, None), nn.Module):
                inner = getattr(inner, name)
                break
        else:
            raise TypeError(
                f"model must have get_output_embeddings(), as models of transformers do, got {type(model).__name__}: "
                f"{_INSTEAD}"
            )
    return inner


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers one of which is the model's head: one, or those of peft's ModulesToSaveWrapper."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise TypeError(
            f"model must have an output head, got None from {type(model).__name__}.get_output_embeddings()"
        )
    while isinstance(getattr(head, "_fsdp_wrapped_module", None), nn.Module):
        head = head._fsdp_wrapped_module
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        layers = [head.original_module, *head.modules_to_save.values()]
    else:
        layers = [head]
    for layer in layers:
        own_forward = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
        adapted = hasattr(layer, "base_layer")
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or own_forward or adapted:
            what = "an adapter on it (leave it out of target_modules)" if adapted else "another forward"
            raise TypeError(
                "model must have a plain torch.nn.Linear as output head, got "
                f"{type(layer).__module__}.{type(layer).__qualname__}, with {what}: {_INSTEAD}"
            )
        if not layer.weight.is_floating_point():
            raise TypeError(
                f"model must have an output head with floating-point weight, got {layer.weight.dtype}: do not "
                f"quantise the head, or {_INSTEAD}"
            )
    return layers


def _is_gone(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or tensor.is_meta or tensor.untyped_storage().size() == 0


def _config_numbers(model: nn.Module) -> tuple[float, ...]:
    """What the config may say about factors and softcaps: the probe tells which of the numbers are in use."""
    config: Any = getattr(model, "config", None)
    numbers: dict[float, None] = {}
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    for source in (config, text_config):
        for name, value in vars(source).items() if source is not None else ():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_named_so = any(part in name for part in ("logit", "softcap", "soft_cap", "multiplier"))
            if is_number and is_named_so and math.isfinite(value) and value > 0:
                numbers[float(value)] = None
    return tuple(numbers)


def _read_probe(
    model: nn.Module, logits: Tensor, numbers: tuple[float, ...], dtypes: list[torch.dtype]
) -> tuple[float, float | None]:
    """Finds the logit_scale and the softcap with which the probe becomes what the model has returned."""
    rows = logits.detach().reshape(-1, len(_PROBE)).double()
    low, high = torch.stack([rows.amin(0), rows.amax(0)]).cpu()
    if not torch.equal(low, high):  # NaN included
        raise _unknown(model, f"another value in each row, of {_PROBE} between {low.tolist()} and {high.tolist()}")
    probe = torch.tensor(_PROBE, dtype=torch.float64)
    # A probe that is still in float64 has been rounded by nobody.
    seen = [logits.dtype] if logits.dtype == torch.float64 else [logits.dtype, *dtypes]
    tolerance = 2 * max(torch.finfo(dtype).eps for dtype in seen)
    softcaps = (None, *numbers)
    # A number of the config, where it fits, is the factor without the rounding of what was measured.
    stated = [(scale, cap) for cap in softcaps for scale in (1.0, *numbers, *(1 / number for number in numbers))]
    measured = [(_measured_scale(low, cap), cap) for cap in softcaps]
    for candidates in (stated, measured):
        errors = [_probe_error(low, probe, *candidate) for candidate in candidates]
        if min(errors) <= tolerance:
            return candidates[errors.index(min(errors))]
    raise _unknown(model, f"{low.tolist()} from {list(_PROBE)}")


def _probe_error(logits: Tensor, probe: Tensor, scale: float, softcap: float | None) -> float:
    """Largest relative error of what the probe would become; infinite for a factor that is none."""
    if scale == 0 or not math.isfinite(scale):
        return math.inf
    expected = scale * probe
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    return ((logits - expected).abs() / expected.abs().clamp_min(1e-300)).max().item()


def _measured_scale(logits: Tensor, softcap: float | None) -> float:
    """The factor that explains what has become of the probe's 0.25, which a softcap bends the least."""
    value = logits[_PROBE.index(0.25)].item()
    if softcap is not None:
        value = softcap * math.atanh(value / softcap) if abs(value) < softcap else math.nan
    return value / 0.25


def _unknown(model: nn.Module, what: str) -> RuntimeError:
    return RuntimeError(
        "model must return its output head's product times a factor and with a softcap, or as it is, got something "
        f"that {type(model).__name__} does to its logits and that is not known here ({what}): {_INSTEAD}"
    )
