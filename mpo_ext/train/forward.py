"""Runs a model on a batch. The result has the hidden states or logits that predict the labels.

If both responses of a pair have the same images, the vision tower encodes each image once.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpo_ext.loss.hf_head import hidden_and_head, unwrap_model
from mpo_ext.train.batch import Batch
from mpo_ext.train.masks import (
    GRIDS,
    attention_masks,
    embedding_dtype,
    has_image_blocks,
    mask_markers,
    plan_or_raise,
    prompt_positions,
)
from mpo_ext.train.split_attention import RowSegments

_BY_LAYER = "deepstack_features"
_FEATURE_METHODS = ("get_image_features", "get_video_features")


class HiddenRows(NamedTuple):
    """The result of ``forward``. Its fields are arguments of ``linear_mpo_loss``.

    Attributes:
        hidden: ``[N, D]``, the hidden states that predict the N labels of the batch, with their autograd graph.
        weight: ``[V, D]``, the weight of the output head.
        options: Keyword arguments of ``linear_mpo_loss``: ``bias``, ``logit_scale``, ``softcap`` and, for a sharded
            head, ``vocab_parallel``.
    """

    hidden: Tensor
    weight: Tensor
    options: dict[str, Any]


def forward(model: nn.Module, batch: Batch) -> HiddenRows:
    """Returns the hidden states that predict the labels of a batch. The output head of the model is not used.

    With the result ``out``, the loss is ``linear_mpo_loss(out.hidden, out.weight, batch.labels, ...,
    cu_seqlens=batch.cu_seqlens, shift=False, **out.options)``.

    The model may be wrapped by DDP, FSDP, accelerate or peft; see ``hidden_and_head``. The batch must be on the device
    of the model.

    Raises:
        ValueError: If the model does not support the batch's layout, or the batch lacks position ids that the model
            needs.
        RuntimeError: If the model does not return one hidden state per position.
    """
    with model_inputs(unwrap_model(model), batch) as inputs:
        out = hidden_and_head(model, **inputs)
    return HiddenRows(_label_rows(out.hidden, batch), out.weight, out.options)


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Runs the model once on a batch and returns the logits that predict the labels, ``[N, V]``.

    The loss is ``mpo_loss(logits, batch.labels.to(logits.device), ..., cu_seqlens=batch.cu_seqlens, shift=False)``.
    The model computes the logits of all positions, ``[R, L, V]``, although only some of them predict labels. For the
    arguments and errors, see ``forward``.
    """
    with model_inputs(unwrap_model(model), batch) as inputs:
        logits = model(**inputs).logits
    return _label_rows(logits, batch)


def _label_rows(values: Tensor, batch: Batch) -> Tensor:
    if values.shape[:2] != batch.segments.shape:
        raise RuntimeError(
            f"model must return one hidden state for each of {tuple(batch.segments.shape)} tokens, got shape "
            f"{tuple(values.shape)}"
        )
    # Not index_select: on a GPU its backward sums repeated positions (a prompt's last token) in random order.
    return values.flatten(0, 1)[batch.index]


@contextmanager
def model_inputs(inner: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """Context manager that yields the model's keyword arguments for a batch.

    ``inner`` is the model without wrappers. If an image belongs to two sequence rows, the model encodes it only once
    inside the ``with`` block. Some models cannot do so, and a warning is issued.
    """
    inputs: dict[str, Any] = dict(batch.inputs)
    has_grid = any(name in inputs for name in GRIDS)
    if has_grid and prompt_positions(inner) is not None and getattr(inputs.get("position_ids"), "ndim", 0) < 3:
        raise ValueError(
            f"batch must have the positions of {type(inner).__name__}, got none: collate(..., "
            "positions=prompt_positions(model))"
        )
    for name, values in inputs.items():
        if name.startswith("pixel_values") and values.is_floating_point():
            inputs[name] = values.to(embedding_dtype(inner))
    inputs |= _attention_inputs(inner, batch) | {"use_cache": False}
    images = [
        name
        for name, values in batch.inputs.items()
        if name not in ("input_ids", "position_ids") and values.shape != batch.segments.shape
    ]
    if batch.copies == 1 or not images:
        yield inputs
        return
    encoders = [(module, name) for name in _FEATURE_METHODS for module in _encoders(inner, name)]
    if not encoders:
        _warn_encoded_twice(inner)
        yield inputs | {name: _twice(inputs[name]) for name in images}
        return
    before = [vars(module).get(name) for module, name in encoders]
    try:
        running: list[str] = []
        for module, name in encoders:
            object.__setattr__(module, name, _features_twice(getattr(module, name), module, running))
        yield inputs
    finally:
        for (module, name), method in zip(encoders, before, strict=True):
            if method is None:
                vars(module).pop(name, None)
            else:
                object.__setattr__(module, name, method)


def _attention_inputs(inner: nn.Module, batch: Batch) -> dict[str, Any]:
    if batch.layout == "separate":
        return {"attention_mask": (batch.segments >= 0).long()}
    plan = plan_or_raise(inner)
    if batch.layout == "packed" and not plan.is_split:
        raise ValueError(
            f'layout must be "shared" or "masked" for this model, got "packed": {type(inner).__name__} has no split '
            "attention (use_split_attention)"
        )
    has_blocks = bool(batch.image_blocks) and has_image_blocks(inner)
    if batch.layout == "masked" or not plan.is_split:
        types = (batch.inputs["token_type_ids"],) if has_blocks else ()
        return {"attention_mask": attention_masks(inner, batch.segments, *types)}
    rows, length = batch.segments.shape
    device = batch.segments.device
    return {
        "attention_mask": mask_markers(plan, rows, device),
        # Reaches the attention functions through the model's keyword arguments, also when a layer is recomputed.
        "row_segments": RowSegments(batch.segment_lengths, length, device, batch.image_blocks if has_blocks else ()),
    }


def _encoders(inner: nn.Module, name: str) -> list[nn.Module]:
    """Returns the modules of ``inner`` that have a method ``name``, and call this method in their ``forward``."""
    return [
        module
        for module in inner.modules()
        if callable(getattr(type(module), name, None)) and name in _names_in_forward(module)
    ]


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()


def _features_twice(encode: Callable[..., Any], owner: nn.Module, running: list[str]) -> Callable[..., Any]:
    """Returns a wrapper of ``encode`` that returns the image features twice, one copy after the other.

    ``encode`` is a method of ``owner``, such as ``get_image_features``. The wrapper of a method may call the wrapper
    of another method. For example, ``get_video_features`` of Qwen3-VL calls ``get_image_features``. Only the outer
    wrapper then repeats the features. All wrappers of a model share the list ``running``. It is empty while no wrapper
    runs.
    """

    def encode_once(*args: Any, **kwargs: Any) -> Any:
        if running:
            return encode(*args, **kwargs)
        running.append(type(owner).__name__)
        try:
            features = encode(*args, **kwargs)
        finally:
            running.pop()
        if _is_tensors(features):
            return _twice(features)
        if isinstance(features, dict):
            names = _features_read(owner, features)
            if names and all(
                all(map(_is_tensors, features[name])) if name == _BY_LAYER else _is_tensors(features[name])
                for name in names
            ):
                for name in names:
                    value = features[name]
                    setattr(features, name, [_twice(layer) for layer in value] if name == _BY_LAYER else _twice(value))
                return features
        _warn_encoded_twice(owner)
        return encode(*map(_twice, args), **{name: _twice(value) for name, value in kwargs.items()})

    return encode_once


def _features_read(owner: nn.Module, features: dict[str, Any]) -> list[str]:
    """Returns the keys of ``features`` that the forward of ``owner`` uses as image features."""
    names = {name for name in _names_in_forward(owner) if features.get(name) is not None}
    names -= {"hidden_states", "attentions"}  # not image features: the forward passes these outputs on
    if "pooler_output" in names:
        names.discard("last_hidden_state")
    return sorted(names)


def _is_tensors(values: Any) -> bool:
    """Returns whether the value is a tensor or a sequence of tensors (one per image)."""
    return isinstance(values, Tensor) or (
        isinstance(values, (list, tuple)) and all(isinstance(value, Tensor) for value in values)
    )


def _twice(values: Any) -> Any:
    """Returns a tensor concatenated with itself along the first axis, or a sequence repeated twice.

    Any other value is returned unchanged.
    """
    if isinstance(values, Tensor):
        return torch.cat([values, values])
    return values * 2 if isinstance(values, (list, tuple)) else values


def _warn_encoded_twice(owner: nn.Module) -> None:
    warnings.warn(
        f'{type(owner).__name__} does not return image features in a known form: in the layout "separate" each image '
        "is encoded twice per pair",
        stacklevel=3,
    )
