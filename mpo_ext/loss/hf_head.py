"""Runs a Hugging Face model up to its output head, for ``linear_mpo_loss``: the logits are never computed.

The model is called through its wrappers, such as DDP. During the call, only the ``forward`` of the head is replaced.
The replacement records its arguments and returns a few known numbers, the probe, in place of logits. The model's
output for the probe reveals the factor and the softcap that the model applies to its logits.

Neither transformers nor peft is imported: models are recognised by their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Exact in bfloat16. Large numbers distinguish softcaps, small numbers distinguish factors.
_PROBE = (-40.0, -3.0, -0.5, 0.0, 0.25, 1.0, 7.0, 60.0)
_INSTEAD = "use mpo_loss(model(...).logits, ...) instead"

# Factor and softcap by model, dtypes and config numbers. Cached, because reading the probe waits for the device.
_Known = WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[float, float | None]]]
_KNOWN: _Known = WeakKeyDictionary()
_KNOWN_IN_FORWARD: _Known = WeakKeyDictionary()  # without the dtypes, for ``value_in_forward``


class HiddenAndHead(NamedTuple):
    """The result of ``hidden_and_head``. Except for ``outputs``, the attributes are arguments of ``linear_mpo_loss``.

    Attributes:
        hidden: ``[B, T, D]`` input of the output head, with its autograd graph.
        weight: ``[V, D]`` weight of the head, as FSDP or ZeRO gathers it for forward.
        bias: ``[V]`` bias of the head, or None.
        logit_scale: Factor by which the model multiplies the head's output.
        softcap: Bound that the model applies to its logits, or None.
        outputs: The model's output. Its ``logits`` are placeholders and must not be used.
        vocab_parallel: None, or the process group of a head that is sharded along the vocabulary (``colwise``). With a
            sharded head, ``weight`` and ``bias`` are the rows of this rank.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    outputs: Any
    vocab_parallel: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``linear_mpo_loss``: bias, logit_scale, softcap, and vocab_parallel if the head is sharded."""
        options = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return options if self.vocab_parallel is None else {**options, "vocab_parallel": self.vocab_parallel}


def hidden_and_head(model: nn.Module, /, *positional: Any, **inputs: Any) -> HiddenAndHead:
    """Runs the model without its output head, and returns the arguments of ``linear_mpo_loss``.

    The model's logits would be ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``, without the
    tanh if softcap is None. Instead of logits, the head returns a few known numbers, the probe. From the probe, the
    model computes its output ``logits``, which show ``logit_scale`` and ``softcap``. The first call with a model
    reads these logits, and therefore waits for the device.

    Compute the loss from ``hidden``. The backward of the loss then runs the backward hooks of wrappers such as FSDP.
    If accelerate runs the model under autocast, call ``linear_mpo_loss`` under autocast, too. Otherwise, the matmul
    with the head is float32.

    Args:
        model: Hugging Face model with a linear output head. DDP, FSDP or accelerate may wrap the model. LoRA adapters
            are allowed, but not on the head. FSDP must shard the head with the root module. ZeRO-3 may partition the
            head. Tensor parallelism may shard the head over the vocabulary: by ``tp_plan`` of transformers, or by
            torch's ``ColwiseParallel`` with ``output_layouts=Replicate()``.
        positional: Must be empty: the model's inputs are keyword arguments.
        inputs: Keyword arguments of ``model(...)``, such as ``input_ids=input_ids``, without labels.

    Raises:
        TypeError: If the model has no output head, the head is not a plain linear layer, or an input is positional.
        ValueError: If labels are among the inputs.
        RuntimeError: If the model's forward does not call the head exactly once, returns no ``logits``, or changes the
            logits in an unknown way. Also if a wrapper such as FSDP frees the head's weight before backward.
    """
    if positional:
        raise TypeError(
            "inputs must be passed by keyword, as in hidden_and_head(model, input_ids=input_ids), got "
            f"{len(positional)} without: {', '.join(type(value).__name__ for value in positional)}"
        )
    inner = unwrap_model(model)
    call, outputs = _run(model, inner, inputs, _record)
    for name, tensor in (("weight", call.weight), ("bias", call.bias)):
        _check_is_whole(name, tensor)
    logits = outputs.logits
    logit_scale, softcap = _scale_and_softcap(inner, logits, call.dtypes)
    hidden = call.hidden
    if hidden.requires_grad and logits.requires_grad:
        hidden = _Tie.apply(hidden, logits)
    return HiddenAndHead(hidden, call.weight, call.bias, logit_scale, softcap, outputs, call.vocab_parallel)


def value_in_forward(
    model: nn.Module, compute: Callable[[HiddenAndHead], Tensor], /, **inputs: Any
) -> tuple[Tensor, Any]:
    """Runs the model with ``compute`` in place of its output head, and returns the value that ``compute`` returns.

    ``compute`` runs inside the head's forward, while wrappers hold the head's whole weight. So this function also
    works if FSDP2 reshards the root module after forward. In this case, ``hidden_and_head`` raises. The gradient of
    the value goes through the model's output, so the backward hooks of wrappers run first.

    The first call with a model runs an additional forward without gradient, to find ``logit_scale`` and ``softcap``.

    Args:
        model: As in ``hidden_and_head``.
        compute: Takes a ``HiddenAndHead`` with ``outputs=None``, and returns a value, such as a loss. Called once.
        inputs: As in ``hidden_and_head``, without past_key_values: the additional forward would extend them.

    Returns:
        The value and the model's output. The ``logits`` of the output are placeholders and must not be used.

    Raises:
        TypeError: As in ``hidden_and_head``.
        ValueError: If labels or past_key_values are among the inputs.
        RuntimeError: If the model's forward does not call the head exactly once, returns no ``logits``, or changes the
            logits in an unknown way. If a wrapper, such as FSDP2, does not hold the whole weight in its forward.
    """
    if inputs.get("past_key_values") is not None:
        raise ValueError("inputs must not hold past_key_values with value_in_forward: use hidden_and_head")
    inner = unwrap_model(model)
    known = _KNOWN_IN_FORWARD.setdefault(inner, {})
    numbers = _config_numbers(inner)
    if numbers not in known:
        devices = {parameter.device for parameter in inner.parameters() if parameter.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            call, outputs = _run(model, inner, inputs, _record)
        known[numbers] = _scale_and_softcap(inner, outputs.logits, call.dtypes)
        if not outputs.logits.numel():  # the probe was empty
            return compute(_head_of(call, known.pop(numbers))), outputs
    values: list[tuple[Tensor, _GradientCell]] = []

    def compute_in_head(call: _HeadCall) -> Tensor:
        value = compute(_head_of(call, known[numbers]))
        cell = _GradientCell()
        values.append((value, cell))
        return _LossProbe.apply(value, call.hidden, cell)

    _, outputs = _run(model, inner, inputs, compute_in_head)
    value, cell = values[0]
    if value.requires_grad and outputs.logits.requires_grad:
        value = _LossOfLogits.apply(outputs.logits, value.detach(), cell)
    return value, outputs


class _HeadCall(NamedTuple):
    """A recorded call of the output head.

    ``dtypes`` holds the dtype of the hidden states and, under autocast, also the autocast dtype.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtypes: list[torch.dtype]
    vocab_parallel: Any  # process group whose ranks hold the head's rows, or None


def _head_of(call: _HeadCall, numbers: tuple[float, float | None]) -> HiddenAndHead:
    return HiddenAndHead(call.hidden, call.weight, call.bias, *numbers, None, call.vocab_parallel)


def _record(call: _HeadCall) -> Tensor:
    return _Probe.apply(call.hidden, call.weight, call.bias)


def _run(
    model: nn.Module, inner: nn.Module, inputs: dict[str, Any], in_head: Callable[[_HeadCall], Tensor]
) -> tuple[_HeadCall, Any]:
    """Runs the model with ``in_head`` in place of the head's forward. Returns (call of the head, model output)."""
    if inputs.get("labels") is not None:
        raise ValueError(
            "inputs must not hold labels, since the model would compute its own loss from what stands in for logits, "
            f"got labels of type {type(inputs['labels']).__name__}: pass them to linear_mpo_loss"
        )
    calls: list[_HeadCall] = []
    returned: list[Tensor] = []
    with _probed(_linear_layers(inner), in_head, calls, returned):
        try:
            outputs = model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not returned:  # the error is unrelated to the numbers in place of logits
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
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise RuntimeError(
            f"model must return an object with logits, got {type(outputs).__name__} (return_dict must not be False): "
            f"or {_INSTEAD}"
        )
    expected = (*calls[0].hidden.shape[:-1], len(_PROBE))
    if logits.shape != expected:
        raise _unknown(inner, f"shape {tuple(logits.shape)} from {expected}")
    return calls[0], outputs


def _check_is_whole(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and (tensor.numel() == 0 or tensor.is_meta or tensor.untyped_storage().size() == 0):
        raise RuntimeError(
            f"model must keep the {name} of its output head whole until backward, got a {name} that was freed after "
            "the head's own forward: shard the head together with the root module (FSDP: do not wrap the head by "
            f"itself, and do not reshard the root after forward), or {_INSTEAD}"
        )


class _Probe(torch.autograd.Function):
    """Replaces the head. Forward returns the probe: a few fixed numbers. Backward returns no gradient.

    The probe belongs to the autograd graph. DDP's ``find_unused_parameters`` searches this graph for parameters.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _probe_rows(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        return None, None, None


class _Tie(torch.autograd.Function):
    """Forward returns ``hidden`` unchanged. Backward also returns a gradient of zeros for ``logits``.

    ``logits`` are the model's output, which the loss does not use. FSDP and DDP place backward hooks on this output.
    Without the zeros, these hooks would not run.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype, logits.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad_outputs[0], torch.zeros((), dtype=dtype, device=device).expand(shape)


class _GradientCell:
    """Carries a gradient from the backward of ``_LossOfLogits`` to the backward of ``_LossProbe``."""

    gradient: Tensor


class _LossProbe(torch.autograd.Function):
    """Forward returns the probe, like ``_Probe``. Backward returns ``cell.gradient`` as the gradient of ``value``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, hidden: Tensor, cell: _GradientCell) -> Tensor:
        ctx.cell = cell
        return _probe_rows(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.cell.gradient, None, None


class _LossOfLogits(torch.autograd.Function):
    """Returns ``value``. Backward stores the gradient of ``value`` in ``cell``. The gradient of ``logits`` is 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, cell: _GradientCell) -> Tensor:
        ctx.cell = cell
        ctx.like = logits.shape, logits.dtype, logits.device
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        ctx.cell.gradient = grad_outputs[0]
        shape, dtype, device = ctx.like
        return torch.zeros((), dtype=dtype, device=device).expand(shape), None, None


def _probe_rows(hidden: Tensor) -> Tensor:
    # float64, if the device has it, shows the model's factor exactly. Not expanded, because models may write into
    # their logits.
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    return torch.tensor(_PROBE, dtype=dtype, device=hidden.device).repeat(*hidden.shape[:-1], 1)


def _held(parameter: Any) -> Any:
    """Returns the parameter. Under ZeRO-3, returns a view of the parameter. A view keeps the gathered values."""
    return parameter.view_as(parameter) if hasattr(parameter, "ds_id") else parameter


@contextmanager
def _probed(
    layers: list[nn.Linear],
    in_head: Callable[[_HeadCall], Tensor],
    calls: list[_HeadCall],
    returned: list[Tensor],
) -> Iterator[None]:
    """Makes each layer return ``in_head(call)`` instead of its output, in the ``with`` block.

    The calls are appended to ``calls``. The results of ``in_head`` are appended to ``returned``.
    """

    def probing(layer: nn.Linear) -> Any:
        is_sharded = _is_forward_of_tp_plan(layer)

        def forward(input: Tensor) -> Tensor:
            # Read during the call: FSDP and ZeRO-3 gather the whole parameters for the forward only.
            hidden, weight, bias, group = _local_head(layer, input, is_sharded)
            dtypes = [hidden.dtype]
            if torch.is_autocast_enabled(hidden.device.type):
                dtypes.append(torch.get_autocast_dtype(hidden.device.type))
            calls.append(_HeadCall(hidden, weight, bias, dtypes, group))
            returned.append(in_head(calls[-1]))
            if hidden is input:
                return returned[-1]
            mesh: Any = input.device_mesh  # type: ignore[attr-defined]
            placements: Any = input.placements  # type: ignore[attr-defined]
            return type(input).from_local(returned[-1], mesh, placements, run_check=False)  # type: ignore[attr-defined]

        return forward

    # With accelerate's offloading, the layer's forward loads the weight and then calls ``_old_forward``.
    names = ["_old_forward" if hasattr(layer, "_hf_hook") else "forward" for layer in layers]
    before = [vars(layer).get(name) for layer, name in zip(layers, names, strict=True)]
    try:
        for layer, name in zip(layers, names, strict=True):
            object.__setattr__(layer, name, probing(layer))
        yield
    finally:
        for layer, name, old_forward in zip(layers, names, before, strict=True):
            if old_forward is not None:
                object.__setattr__(layer, name, old_forward)
            else:
                vars(layer).pop(name, None)


def _is_forward_of_tp_plan(layer: nn.Linear) -> bool:
    """Returns whether transformers has replaced the forward of the layer, as it does for layers in ``tp_plan``."""
    return getattr(vars(layer).get("forward"), "__module__", "") == "transformers.distributed.tensor_parallel"


def _local_head(
    layer: nn.Linear, input: Any, is_forward_of_tp_plan: bool
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Returns the head's input, weight and bias on this rank, and the process group that splits the vocabulary.

    Without tensor parallelism, the group is None. A weight that FSDP2 still shards raises RuntimeError. The reason is
    that the ranks of FSDP2 have different hidden states.
    """
    weight, bias = _held(layer.weight), _held(layer.bias)
    if not hasattr(weight, "full_tensor"):
        return input, weight, bias, None
    is_replicated = hasattr(input, "full_tensor") and all(place.is_replicate() for place in input.placements)
    is_colwise = weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)
    if not is_colwise or not (is_replicated or (is_forward_of_tp_plan and not hasattr(input, "full_tensor"))):
        raise RuntimeError(
            "model must have an output head whose weight is whole during forward, or sharded over the vocabulary by "
            f"tensor parallelism, got {type(weight).__name__} with placements {weight.placements}: {_INSTEAD}"
        )
    hidden = input.to_local() if is_replicated else input
    return hidden, weight.to_local(), None if bias is None else bias.to_local(), weight.device_mesh.get_group()


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the Hugging Face model inside DDP, FSDP1, DeepSpeed, torch.compile and peft, or raises TypeError."""
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
    """Returns the head, or all layers of a head in peft's ModulesToSaveWrapper. Raises TypeError for other heads."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise TypeError(
            f"model must have an output head, got None from {type(model).__name__}.get_output_embeddings()"
        )
    while isinstance(inner := getattr(head, "_fsdp_wrapped_module", None), nn.Module):
        head = inner
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        layers = [head.original_module, *head.modules_to_save.values()]
    else:
        layers = [head]
    for layer in layers:
        is_patched = "forward" in vars(layer) and not hasattr(layer, "_hf_hook") and not _is_forward_of_tp_plan(layer)
        is_adapted = hasattr(layer, "base_layer")
        is_plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if not is_plain or is_patched or is_adapted:
            reason = "an adapter on it (leave it out of target_modules)" if is_adapted else "another forward"
            raise TypeError(
                "model must have a plain torch.nn.Linear as output head, got "
                f"{type(layer).__module__}.{type(layer).__qualname__}, with {reason}: {_INSTEAD}"
            )
        if not layer.weight.is_floating_point():
            raise TypeError(
                f"model must have an output head with floating-point weight, got {layer.weight.dtype}: do not "
                f"quantise the head, or {_INSTEAD}"
            )
    return layers


def _scale_and_softcap(model: nn.Module, logits: Tensor, dtypes: list[torch.dtype]) -> tuple[float, float | None]:
    """Returns the logit scale and softcap. ``logits`` are the model's logits for the probe. The result is cached."""
    numbers = _config_numbers(model)
    known = _KNOWN.setdefault(model, {})
    key = (type(model), *dtypes, logits.dtype, *numbers)
    if key not in known and logits.numel():
        known[key] = _read_probe(model, logits, numbers, dtypes)
    return known.get(key, (1.0, None))  # without tokens the probe is empty, and no result depends on it


def _config_numbers(model: nn.Module) -> tuple[float, ...]:
    """Returns the numbers of the model and its config that may be a logit scale or a softcap."""
    config: Any = getattr(model, "config", None)
    numbers: dict[float, None] = {}
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    for source in (config, text_config, model):
        for name, value in vars(source).items() if source is not None else ():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_named_so = any(part in name for part in ("logit", "softcap", "soft_cap", "multiplier"))
            if is_number and is_named_so and math.isfinite(value) and value > 0:
                numbers[float(value)] = None
    return tuple(numbers)


def _read_probe(
    model: nn.Module, logits: Tensor, numbers: tuple[float, ...], dtypes: list[torch.dtype]
) -> tuple[float, float | None]:
    """Returns the logit scale and the softcap of the model, which has turned the probe into ``logits``."""
    rows = logits.detach().reshape(-1, len(_PROBE)).double()
    low, high = torch.stack([rows.amin(0), rows.amax(0)]).cpu()
    if not torch.equal(low, high):  # NaN also raises
        raise _unknown(model, f"rows that differ, from {_PROBE} between {low.tolist()} and {high.tolist()}")
    probe = torch.tensor(_PROBE, dtype=torch.float64)
    # A probe that is still in float64 was never rounded.
    seen = [logits.dtype] if logits.dtype == torch.float64 else [logits.dtype, *dtypes]
    tolerance = 2 * max(torch.finfo(dtype).eps for dtype in seen)
    softcaps = (None, *numbers)
    # If a number of the config fits, it is the exact factor; a measured factor is rounded.
    stated = [(scale, cap) for cap in softcaps for scale in (1.0, *numbers, *(1 / number for number in numbers))]
    measured = [(_measured_scale(low, cap), cap) for cap in softcaps]
    for candidates in (stated, measured):
        errors = [_probe_error(low, probe, *candidate) for candidate in candidates]
        if min(errors) <= tolerance:
            return candidates[errors.index(min(errors))]
    raise _unknown(model, f"{low.tolist()} from {list(_PROBE)}")


def _probe_error(logits: Tensor, probe: Tensor, scale: float, softcap: float | None) -> float:
    """Returns the largest relative error of ``logits`` against ``softcap * tanh(scale * probe / softcap)``.

    The error is infinite if ``scale`` is 0 or not finite.
    """
    if scale == 0 or not math.isfinite(scale):
        return math.inf
    expected = scale * probe
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    return ((logits - expected).abs() / expected.abs().clamp_min(1e-300)).max().item()


def _measured_scale(logits: Tensor, softcap: float | None) -> float:
    """Returns the logit scale, computed from ``softcap`` and from the model's logit for the probe value 0.25."""
    value = logits[_PROBE.index(0.25)].item()
    if softcap is not None:
        value = softcap * math.atanh(value / softcap) if abs(value) < softcap else math.nan
    return value / 0.25


def _unknown(model: nn.Module, what: str) -> RuntimeError:
    return RuntimeError(
        "model must return its output head's product times a factor and with a softcap, or unchanged, got an unknown "
        f"change that {type(model).__name__} makes to its logits ({what}): {_INSTEAD}"
    )
