"""Position ids and attention masks of sequence rows ``[prompt | response | response ...]``."""

import dataclasses
import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.train.encode import Sample
from mpo_ext.train.split_attention import (
    base_implementation,
    is_split,
    join_decoder,
    split_decoder,
    window_marker,
)
from mpo_ext.train.split_recurrence import has_split_layers, join_layers, split_layers

#: Model inputs that hold the grid sizes of images and videos.
GRIDS = ("image_grid_thw", "video_grid_thw")

_FULL, _SLIDING = "full_attention", "sliding_attention"
_IMPLEMENTATIONS = ("sdpa", "eager")

#: Layers with states instead of attention, by their type in transformers' configs.
_WITH_STATES = frozenset({"linear_attention", "conv"})

#: The kinds of masks that a layer type needs: two if the layer combines kinds, none if the layer mixes no tokens.
_COMBINED = {
    "hybrid": (_FULL, "linear_attention"),
    "hybrid_sliding": (_SLIDING, "linear_attention"),
    "mlp": (),
    "moe": (),
}


def sequence_positions(segments: Tensor) -> Tensor:
    """Returns the position of each token in its sequence ``[prompt | response]``, ``[R, L]`` int64.

    ``segments`` is ``Batch.segments``; each row must have a single prompt. For example, ``[0, 0, 1, 1, 2, -1]`` is a
    row with a prompt of two tokens, two responses and padding. Its positions are ``[0, 1, 2, 3, 2, 0]``.
    """
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_first = torch.ones_like(segments, dtype=torch.bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = places.masked_fill(~is_first, 0).cummax(1).values
    prompt_lengths = (segments == 0).sum(1, keepdim=True)
    return (places - start + prompt_lengths * (segments > 0)).masked_fill(segments < 0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class PromptPositions:
    """Computes the position ids of a prompt for a model with multimodal RoPE.

    An instance holds no weights and can be pickled, for DataLoader workers.

    Attributes:
        kind: Class of the module that defines ``get_rope_index``.
        config: Config of this module.
    """

    kind: type[nn.Module]
    config: Any

    def __call__(self, sample: Sample) -> Tensor:
        """Returns the position ids of a prompt of P tokens: ``[A, P]`` int64 with A axes (3 in Qwen2-VL).

        Raises:
            ValueError: If the sample has images but lacks the ``mm_token_type_ids`` that the model needs.
        """
        owner = self.kind.__new__(self.kind)
        nn.Module.__init__(owner)
        owner.config = self.config
        parameters = inspect.signature(self.kind.get_rope_index).parameters  # type: ignore[attr-defined]
        prompt = sample.prompt_ids.unsqueeze(0)
        arguments: dict[str, Any] = {
            name: value
            for name, value in sample.image_inputs.items()
            if name in parameters and name in (*GRIDS, "second_per_grid_ts")
        }
        if "mm_token_type_ids" in parameters:
            types = sample.token_inputs.get("mm_token_type_ids")
            if types is None and sample.image_inputs:
                raise ValueError(
                    f"token_inputs must hold mm_token_type_ids, which {self.kind.__name__} takes positions from, got "
                    f"{sorted(sample.token_inputs)} in {sample.name}"
                )
            arguments["mm_token_type_ids"] = torch.zeros_like(prompt) if types is None else types.unsqueeze(0)
        positions, _ = owner.get_rope_index(prompt, **arguments)  # type: ignore[operator]
        return positions[:, 0].long()


def prompt_positions(model: nn.Module) -> PromptPositions | None:
    """Returns the function that computes a prompt's position ids; None if the model numbers tokens from 0.

    The function is the argument ``positions`` of ``collate``.
    """
    for module in unwrap_model(model).modules():
        if callable(getattr(type(module), "get_rope_index", None)):
            return PromptPositions(type(module), module.config)
    return None


class MaskPlan(NamedTuple):
    """The attention masks that a model needs.

    Attributes:
        kinds: Kinds of layers that need a mask, by their names in transformers' configs, such as "full_attention". If
            ``is_split`` is True, recurrent and convolutional layers are included.
        window: Number of tokens of the sliding window, or None.
        implementation: Name of the attention implementation in transformers.
        is_split: Whether ``use_split_attention`` has changed the model.
    """

    kinds: frozenset[str]
    window: int | None
    implementation: str
    is_split: bool


def plan_masks(inner: nn.Module) -> MaskPlan | str:
    """Returns the masks that a model needs, or a string with the reason why they cannot be built."""
    name, config = type(inner).__name__, decoder_config(inner)
    if config is None:
        return f"{name} has no config"
    name_of_attention = getattr(config, "_attn_implementation", None)
    implementation = base_implementation(name_of_attention)
    if implementation not in _IMPLEMENTATIONS and not is_split(name_of_attention):
        return no_mask(implementation)
    assert implementation is not None
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    known = {_FULL, _SLIDING}
    if types is not None:
        kinds = frozenset(types[: getattr(config, "num_hidden_layers", None)])
        if has_split_layers(_decoder(inner) or inner):
            kinds = frozenset(part for kind in kinds for part in _COMBINED.get(kind, (kind,)))
            known = {_FULL, _SLIDING, *_WITH_STATES}
        unknown = sorted(kinds - known)
        if unknown:
            return f"{name} has layers of {', '.join(unknown)}"
    elif window is not None and any(
        hasattr(sys.modules.get(type(module).__module__), "create_sliding_window_causal_mask")
        for module in inner.modules()
    ):
        kinds = frozenset({_SLIDING})  # Mistral, Phi 3: all layers use the window in the config
    else:
        kinds = frozenset({_FULL})
    if _SLIDING in kinds and window is None:
        return f"{name} has sliding attention, but its config does not give the window"
    unknown_settings = {
        key: value
        for key, value in vars(config).items()
        if key in ("attention_types", "attention_layers", "attention_window", "window_size") and value
    }
    if unknown_settings and types is None:
        return f"{name} has an unknown kind of attention: its config has {unknown_settings}"
    return MaskPlan(kinds, window, implementation, is_split(name_of_attention))


def plan_or_raise(inner: nn.Module) -> MaskPlan:
    """Returns the masks that a model needs; see ``plan_masks``.

    Raises:
        ValueError: If the model does not support rows with several responses.
    """
    plan = plan_masks(inner)
    if isinstance(plan, str):
        raise ValueError(f'layout must be "separate" for this model, got "shared": {plan}')
    return plan


def no_mask(implementation: str | None) -> str:
    """Returns the message for an attention implementation that cannot use the masks of ``attention_masks``."""
    why = "takes no such mask" if "flash" in str(implementation) else "is not supported"
    return f"attention {implementation!r} {why}: set model.attention to {' or '.join(_IMPLEMENTATIONS)}"


def mask_markers(plan: MaskPlan, rows: int, device: torch.device) -> Tensor | dict[str, Tensor]:
    """Returns markers in place of masks, for split attention. A marker is an empty tensor, see ``window_marker``.

    If the model has several kinds of layers, returns a dict from kind to marker. Otherwise returns one marker.
    ``rows`` is the number of sequence rows, R.
    """
    windows = {_SLIDING: plan.window}
    return _by_kind({kind: window_marker(rows, windows.get(kind), device) for kind in plan.kinds})


def has_image_blocks(inner: nn.Module) -> bool:
    """Returns whether all tokens of an image attend to each other, as in Gemma 3.

    Only models that mark image tokens by 1 in ``token_type_ids`` are recognised.
    """
    return any(
        hasattr(type(module), "get_image_features")
        and "get_block_sequence_ids_for_mask(token_type_ids" in forward_source(type(module))
        for module in inner.modules()
    )


def forward_source(kind: type) -> str:
    """Returns the source code of a module's forward, or "" if it is not available."""
    try:
        return inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return ""


def attention_masks(
    inner: nn.Module, segments: Tensor, token_types: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """Returns the attention masks ``[R, 1, L, L]`` of sequence rows with several responses to a prompt.

    If the model has several kinds of layers, the result is a dict from kind to mask. Otherwise, it is one mask. For
    SDPA, masks are bool. For eager attention, masks have the dtype of the embeddings: 0 for visible tokens, otherwise
    the lowest number.

    - A token attends to itself, and to the earlier tokens of its prompt and its response. A sliding window limits how
      far back it attends.
    - ``token_types`` is the model input ``token_type_ids``. A run of tokens of type 1 is an image. The tokens of an
      image also attend to later tokens of the image.
    - A padding token attends only to itself, because a softmax over an empty set is NaN.

    ``segments`` is ``Batch.segments``. Each row must have a single prompt.

    Raises:
        ValueError: If masks cannot separate the responses in this model.
    """
    plan = plan_or_raise(inner)
    if plan.implementation not in _IMPLEMENTATIONS:
        raise ValueError(f'layout must be "separate" for this model, got "masked": {no_mask(plan.implementation)}')
    if with_states := sorted(plan.kinds & _WITH_STATES):
        raise ValueError(
            f'layout must be "shared" or "separate" for this model, got "masked": no mask separates responses in '
            f"layers of {', '.join(with_states)}"
        )
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = causal & (query >= 0) & ((key == 0) | (key == query))
    if token_types is not None:
        is_image = token_types == 1
        is_first = is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]
        number = is_first.cumsum(1).masked_fill(~is_image, 0)
        visible |= (number.unsqueeze(2) == number.unsqueeze(1)) & (number > 0).unsqueeze(2)
    diagonal = torch.eye(length, dtype=torch.bool, device=segments.device)
    masks = {_FULL: visible | diagonal}
    if _SLIDING in plan.kinds and plan.window is not None:
        # A window counts tokens. Rotary positions would not do: an image advances them by less than its tokens.
        places = sequence_positions(segments)
        masks[_SLIDING] = (visible & (places.unsqueeze(2) - places.unsqueeze(1) < plan.window)) | diagonal
    formatted = {kind: masks[kind].unsqueeze(1) for kind in plan.kinds}
    if plan.implementation == "eager":
        dtype = embedding_dtype(inner)
        lowest = torch.finfo(dtype).min
        formatted = {
            kind: torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest) for kind, mask in formatted.items()
        }
    return _by_kind(formatted)


def _by_kind(masks: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    # Models with one kind of layer take a single tensor; models that mix kinds look their masks up by name.
    return masks if len(masks) > 1 else next(iter(masks.values()))


def use_split_attention(model: nn.Module) -> str | None:
    """Changes a model so that rows with several responses need no mask.

    In such rows, attention is computed in several calls, so that no response attends to another response. At the start
    of each response, recurrent and convolutional layers get their states from the end of the prompt. The output for
    all other rows is unchanged.

    The model may be wrapped. The name of its attention implementation becomes one of ``split_attention.NAMES``;
    ``save_pretrained`` does not save this name.

    Returns:
        None if the model was changed. Otherwise, the reason why the model cannot be changed. The model is then
        unchanged.
    """
    inner = unwrap_model(model)
    decoder = _decoder(inner) or inner
    reason = split_layers(decoder) or split_decoder(decoder, decoder_config(inner))
    if reason is not None:
        join_layers(decoder)
    return reason


def undo_split_attention(model: nn.Module) -> None:
    """Undoes ``use_split_attention``; does nothing for an unchanged model."""
    inner = unwrap_model(model)
    join_layers(_decoder(inner) or inner)
    join_decoder(decoder_config(inner))


def _decoder(inner: nn.Module) -> Any:
    get_decoder: Any = getattr(inner, "get_decoder", None)
    return get_decoder() if callable(get_decoder) else None


def decoder_config(inner: nn.Module) -> Any:
    """Returns the config that the decoder uses, or None if the model has no config.

    The model's own text config may be a different object.
    """
    decoder = _decoder(inner)
    config: Any = getattr(decoder, "config", None) or getattr(inner, "config", None)
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def embedding_dtype(inner: nn.Module) -> torch.dtype:
    """Returns the dtype of the input embeddings, or torch's default dtype if the embeddings are quantized."""
    dtype = inner.get_input_embeddings().weight.dtype  # type: ignore[operator]
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
