"""Batches: how prompts and responses lie in the rows that go through the model, and what comes out for the loss."""

import dataclasses
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.functions import linear_token_logp
from mpo_ext.loss.hf_head import hidden_and_head, unwrap_model
from mpo_ext.train.encode import Sample

Layout = Literal["shared", "separate"]

_IGNORED = MPOConfig().ignore_index
_FULL, _SLIDING = "full_attention", "sliding_attention"
_IMPLEMENTATIONS = ("sdpa", "eager")
_GRIDS = ("image_grid_thw", "video_grid_thw")
_BY_LAYER = "deepstack_features"
_FEATURES = ("get_image_features", "get_video_features")


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """B pairs, on the CPU until ``to``.

    Attributes:
        layout: "shared": a row is ``[prompt | chosen | rejected]``, or, where several pairs have one prompt,
            ``[prompt | chosen | rejected | chosen | rejected ...]``; "separate": rows are ``[prompt | response]``, the
            chosen ones first, and images are given once for both.
        inputs: What the model is called with, but for attention masks: ``input_ids`` ``[R, L]``, ``position_ids``
            where the layout needs them, per-token inputs, ``pixel_values`` ...
        segments: ``[R, L]`` int32: 0 for the prompt, 1, 2, ... for the responses of the row, -1 for padding.
        index: ``[N]`` int64, where in the flattened rows ``[R * L]`` each label is predicted.
        labels: ``[N]`` int64, the tokens of the responses: those of the B chosen ones, then those of the rejected. An
            empty response has one label, -100, since the loss functions want no sequence without a row.
        cu_seqlens: ``[2B + 1]`` int64, where each response begins in ``labels``.
        names: B names, for messages.
        keys: B keys of the pairs.
        digests: B digests of the samples.
        copies: Rows of each prompt: 2 in the layout "separate" with rejected responses, else 1.
    """

    layout: Layout
    inputs: dict[str, Tensor]
    segments: Tensor
    index: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    names: tuple[str, ...]
    keys: tuple[str, ...]
    digests: tuple[str, ...]
    copies: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device, but for ``labels``, which stay where they are.

        ``linear_mpo_loss`` wants them on the CPU, so as not to wait for a GPU; ``mpo_loss`` wants
        ``labels.to(logits.device)``.
        """
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), but="labels")

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; a DataLoader with ``pin_memory`` calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor], but: str | None = None) -> "Batch":
        changed: dict[str, Any] = {"inputs": {name: change(tensor) for name, tensor in self.inputs.items()}}
        for name in ("segments", "index", "labels", "cu_seqlens"):
            if name != but:
                changed[name] = change(getattr(self, name))
        return dataclasses.replace(self, **changed)

    @property
    def pairs(self) -> int:
        """B."""
        return len(self.names)

    @property
    def rows(self) -> int:
        """R, the rows that go through the model."""
        return self.segments.shape[0]

    @property
    def positions(self) -> int:
        """R * L, the positions that go through the decoder, padding included."""
        return self.segments.numel()

    @property
    def projected_rows(self) -> int:
        """Labelled positions: the rows that ``linear_mpo_loss`` projects on the vocabulary."""
        return int((self.labels != _IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Positions without padding. Ask before ``to``: on a GPU it waits for the device."""
        return int((self.segments >= 0).sum())


class HiddenRows(NamedTuple):
    """What ``forward`` returns: arguments of ``linear_mpo_loss``.

    Attributes:
        hidden: ``[N, D]``, the hidden states that predict ``batch.labels``, with their graph.
        weight: ``[V, D]`` of the output head.
        options: bias, logit_scale and softcap, to be passed on as ``**options``.
    """

    hidden: Tensor
    weight: Tensor
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class PromptPositions:
    """Positions of a prompt on the axes of a model with multimodal rotary positions; picklable, without weights.

    Attributes:
        kind: Class that has the ``get_rope_index``.
        config: Of that class.
    """

    kind: type[nn.Module]
    config: Any

    def __call__(self, sample: Sample) -> Tensor:
        """Computes the positions.

        Returns:
            ``[A, P]`` int64, A axes (time, height and width in Qwen2-VL).

        Raises:
            ValueError: If the sample has images but not the ``mm_token_type_ids`` that the model asks for.
        """
        owner = self.kind.__new__(self.kind)
        nn.Module.__init__(owner)
        owner.config = self.config
        wanted = inspect.signature(self.kind.get_rope_index).parameters  # type: ignore[attr-defined]
        prompt = sample.prompt_ids.unsqueeze(0)
        arguments: dict[str, Any] = {
            name: value
            for name, value in sample.image_inputs.items()
            if name in wanted and name in (*_GRIDS, "second_per_grid_ts")
        }
        if "mm_token_type_ids" in wanted:
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
    """What ``collate`` needs as ``positions`` for this model: None where positions are the numbers of the tokens.

    Args:
        model: A Hugging Face model, bare or wrapped.
    """
    for module in unwrap_model(model).modules():
        if callable(getattr(type(module), "get_rope_index", None)):
            return PromptPositions(type(module), module.config)
    return None


class _Response(NamedTuple):
    """Where a response lies: its row, its beginning there, the length of its prompt, its segment, and its tokens."""

    row: int
    start: int
    prompt: int
    segment: int
    ids: Tensor


def collate(
    samples: Sequence[Sample],
    layout: Layout,
    *,
    pad_id: int,
    with_rejected: bool = True,
    positions: Callable[[Sample], Tensor] | None = None,
    blank: Sample | None = None,
) -> Batch:
    """Puts pairs together into a batch. Works on the CPU, and in the worker of a DataLoader.

    Samples whose ``prompt_key`` is the same share a row and its images in the layout "shared". Trailing axes of image
    inputs are padded with zeros to the largest, as processors do.

    Args:
        samples: At least one. Empty responses are fine: they contribute nothing.
        layout: "shared" or "separate"; see ``Batch``.
        pad_id: Token to the right of shorter rows. It is never seen, but must be one that the model can embed, and
            not one that stands for an image.
        with_rejected: Whether rejected responses go through the model; without, they count as empty.
        positions: ``prompt_positions(model)``.
        blank: A sample with images; its prompt gets a row of its own in a batch without any image. Nothing is scored
            there: ranks that share a model must all run its vision tower, or none.

    Returns:
        A ``Batch`` on the CPU.

    Raises:
        TypeError: If token ids are not int64.
        ValueError: If there is no sample, the layout is unknown, shapes do not fit each other, a response has no
            prompt, or samples of one ``prompt_key`` have different prompts.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    for sample in samples:
        _check_sample(sample)
    blanks = [blank] if blank is not None and not any(sample.image_inputs for sample in samples) else []

    pairs = [
        (sample.chosen_ids, sample.rejected_ids if with_rejected else sample.rejected_ids[:0]) for sample in samples
    ]
    chosen: list[_Response] = []
    rejected: list[_Response] = []
    if layout == "separate":
        owners = [*samples, *blanks]  # whose prompt and images the rows have
        chosen = [
            _Response(row, len(sample.prompt_ids), len(sample.prompt_ids), 1, pair[0])
            for row, (sample, pair) in enumerate(zip(samples, pairs, strict=True))
        ]
        rejected = [
            one._replace(row=one.row + len(owners), ids=pair[1]) for one, pair in zip(chosen, pairs, strict=True)
        ]
        row_owners = owners * 2 if with_rejected else owners
    else:
        row_of: dict[str, int] = {}
        owners, ends, segments_of = [], [], []
        for sample, pair in zip(samples, pairs, strict=True):
            row = row_of.setdefault(sample.prompt_key, len(owners))
            if row == len(owners):
                owners.append(sample)
                ends.append(len(sample.prompt_ids))
                segments_of.append(0)
            _check_same_prompt(owners[row], sample)
            for ids, side in zip(pair, (chosen, rejected), strict=True):
                segments_of[row] += 1
                side.append(_Response(row, ends[row], len(sample.prompt_ids), segments_of[row], ids))
                ends[row] += len(ids)
        owners += blanks
        row_owners = owners

    responses = chosen + rejected
    rows, copies = len(row_owners), len(row_owners) // len(owners)
    used = [one for one in responses if one.row < rows]
    length = max(1, *(len(owner.prompt_ids) for owner in owners), *(one.start + len(one.ids) for one in used))
    input_ids = torch.full((rows, length), pad_id, dtype=torch.int64)
    segments = torch.full((rows, length), -1, dtype=torch.int32)
    for row, owner in enumerate(row_owners):
        prompt = len(owner.prompt_ids)
        input_ids[row, :prompt] = owner.prompt_ids
        segments[row, :prompt] = 0
    for one in used:
        place = slice(one.start, one.start + len(one.ids))
        input_ids[one.row, place] = one.ids
        segments[one.row, place] = one.segment

    inputs = {"input_ids": input_ids}
    if positions is not None:
        prompts = [positions(owner) for owner in owners]
        inputs["position_ids"] = _positions(prompts * copies, used, rows, length)
    elif layout == "shared":
        inputs["position_ids"] = _sequence_positions(segments)
    inputs |= _token_inputs(row_owners, rows, length)
    inputs |= _image_inputs(owners)

    index, labels, lengths = [], [], []
    for one in responses:
        # The last token of the prompt predicts the first one of each of its responses.
        first = min(one.row, rows - 1) * length + max(one.prompt - 1, 0)
        places = torch.arange(len(one.ids) or 1) + (one.row * length + one.start - 1)
        places[0] = first
        index.append(places)
        labels.append(one.ids if len(one.ids) else torch.tensor([_IGNORED]))
        lengths.append(len(labels[-1]))
    return Batch(
        layout=layout,
        inputs=inputs,
        segments=segments,
        index=torch.cat(index),
        labels=torch.cat(labels),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        names=tuple(sample.name for sample in samples),
        keys=tuple(sample.key for sample in samples),
        digests=tuple(sample.digest for sample in samples),
        copies=copies,
    )


def forward(model: nn.Module, batch: Batch) -> HiddenRows:
    """Runs the model on a batch without its output head, once, and takes the hidden states that predict the labels.

    ``linear_mpo_loss(out.hidden, out.weight, batch.labels, ..., cu_seqlens=batch.cu_seqlens, shift=False,
    **out.options)`` is the loss. What is said in ``hidden_and_head`` of wrappers holds here.

    Args:
        model: As it is trained: in DDP, FSDP or what accelerate makes of it, with or without adapters.
        batch: On the model's device.

    Returns:
        A ``HiddenRows``.

    Raises:
        ValueError: If the model cannot have the layout, or its positions are missing in the batch.
        RuntimeError: If the model does not return one hidden state for each position.
    """
    inner = unwrap_model(model)
    with _images_encoded_once(inner, batch) as inputs:
        out = hidden_and_head(model, **inputs)
    return HiddenRows(_rows(out.hidden, batch), out.weight, out.options)


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own logits that predict the labels: the twin of ``forward`` for ``mpo_loss``.

    ``mpo_loss(logits, batch.labels.to(logits.device), ..., cu_seqlens=batch.cu_seqlens, shift=False)`` is the loss.
    All ``[R, L, V]`` logits are computed.

    Args:
        model: As in ``forward``.
        batch: As in ``forward``.

    Returns:
        ``[N, V]``.

    Raises:
        ValueError: As in ``forward``.
        RuntimeError: As in ``forward``.
    """
    with _images_encoded_once(unwrap_model(model), batch) as inputs:
        logits = model(**inputs).logits
    return _rows(logits, batch)


def supports_shared_prefix(model: nn.Module) -> str | None:
    """Whether a model can have the layout "shared", as far as its config and its code tell.

    Args:
        model: A Hugging Face model, bare or wrapped.

    Returns:
        None where it can, or else the reason.
    """
    inner = unwrap_model(model)
    name = type(inner).__name__
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        return f"{type(peft_config).__name__} puts tokens of its own before each row"
    plan = _mask_plan(inner)
    if isinstance(plan, str):
        return plan
    config = _text_config(inner)
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder and a decoder"
    if getattr(config, "cross_attention_layers", None):
        return f"{name} looks at images through cross attention"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return f"{name} has attention that is not causal"
    for module in inner.modules():
        kind = type(module)
        if getattr(kind, "_is_stateful", False):
            return f"{kind.__name__} has recurrent layers, which no mask keeps apart"
        # Gemma 3: a mask that is given takes the place of the one in which the tokens of an image see each other.
        if hasattr(kind, "get_image_features") and "block_sequence_ids" in _source(kind):
            return f"tokens of an image see each other in {kind.__name__}"
    return None


def check_shared_prefix(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    pad_id: int,
    positions: Callable[[Sample], Tensor] | None = None,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
) -> str | None:
    """Tries the layout "shared" on a few pairs: whether log-probs are those of the layout "separate".

    The model runs three times in evaluation mode, without gradients; the third time responses see each other, to
    know how much that would change. A sliding window is made smaller than the sequences meanwhile. All of it is as
    before afterwards. Ranks that share a model must call it together, and agree on the answer.

    Args:
        model: As in ``forward``.
        samples: At least one, better with images where there will be images.
        pad_id: As in ``collate``.
        positions: As in ``collate``.
        device: Of the model; None takes that of its first parameter.
        tolerance: Largest root mean square of the differences of log-probs, in nats; None for 16 times the precision
            of the arithmetic, 1e-3 at least. Half of what a broken mask would change is too much too, unless that is
            less than a quarter of this.

    Returns:
        None where they agree, or else the reason.

    Raises:
        torch.OutOfMemoryError: If memory ends.
        Exception: What the model raises in the layout "separate".
    """
    reason = supports_shared_prefix(model)
    if reason is not None:
        return reason
    device = next(model.parameters()).device if device is None else device
    shared = collate(samples, "shared", pad_id=pad_id, positions=positions)
    separate = collate(samples, "separate", pad_id=pad_id, positions=positions)
    labelled = shared.labels != _IGNORED
    if not labelled.any():
        return None
    longest = int((separate.segments >= 0).sum(1).max())
    with _as_before(model, max(1, longest // 2)), torch.no_grad():
        truth, epsilon = _logp(model, separate.to(device))
        try:
            ours, _ = _logp(model, shared.to(device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__} in the forward of {type(unwrap_model(model)).__name__}: {error}"
        leaking = dataclasses.replace(shared, segments=shared.segments.clamp(max=1))
        broken, _ = _logp(model, leaking.to(device))
    differences = (ours - truth)[labelled].abs()
    rms = _rms(differences)
    leak = _rms((broken - truth)[labelled])
    bound = max(16 * epsilon, 1e-3) if tolerance is None else tolerance
    limit = min(bound, max(leak / 2, bound / 4))
    if rms <= limit:
        return None
    worst = int(torch.where(labelled)[0][differences.nan_to_num(math.inf).argmax()])
    name = samples[(int(torch.searchsorted(shared.cu_seqlens, worst, right=True)) - 1) % len(samples)].name
    return (
        f"log-probs of {type(unwrap_model(model)).__name__} differ by {rms:.2g} nats (root mean square; "
        f"{differences.max().item():.2g} at most, in {name}) from those of separate rows, which is more than "
        f"{limit:.2g}; responses that see each other would change them by {leak:.2g}"
    )


# Collation.


def _check_sample(sample: Sample) -> None:
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = getattr(sample, name)
        if ids.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {ids.dtype} in {sample.name}")
        if ids.ndim != 1:
            raise ValueError(f"{name} must have one axis, got shape {tuple(ids.shape)} in {sample.name}")
    if not len(sample.prompt_ids) and (len(sample.chosen_ids) or len(sample.rejected_ids)):
        raise ValueError(f"prompt_ids must hold a token to predict the response from, got none in {sample.name}")
    for name, values in sample.token_inputs.items():
        if values.shape != sample.prompt_ids.shape:
            raise ValueError(
                f"{name} must have the shape of prompt_ids, {tuple(sample.prompt_ids.shape)}, got "
                f"{tuple(values.shape)} in {sample.name}"
            )


def _check_same_prompt(first: Sample, other: Sample) -> None:
    shapes = [{name: values.shape for name, values in one.image_inputs.items()} for one in (first, other)]
    if not torch.equal(first.prompt_ids, other.prompt_ids) or shapes[0] != shapes[1]:
        raise ValueError(
            f"samples with one prompt_key must have one prompt, got two for {first.prompt_key!r}: in {first.name} and "
            f"in {other.name}"
        )


def _sequence_positions(segments: Tensor) -> Tensor:
    """Where each token of ``[R, L]`` stands in its own prompt and response; 0 for padding."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = places.masked_fill(~begins, 0).cummax(1).values
    prompt = (segments == 0).sum(1, keepdim=True)
    return (places - start + prompt * (segments > 0)).masked_fill(segments < 0, 0)


def _positions(prompts: Sequence[Tensor], responses: Iterable[_Response], rows: int, length: int) -> Tensor:
    """``[A, R, L]`` int64: those of the prompts ``[A, P]``, and from their largest on for the responses."""
    positions = torch.zeros(prompts[0].shape[0], rows, length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        positions[:, row, : prompt.shape[1]] = prompt
    for one in responses:
        begin = int(prompts[one.row].max()) + 1 if one.prompt else 0
        positions[:, one.row, one.start : one.start + len(one.ids)] = torch.arange(begin, begin + len(one.ids))
    return positions


def _token_inputs(owners: Sequence[Sample], rows: int, length: int) -> dict[str, Tensor]:
    """Further inputs of the prompts' tokens, ``[R, L]`` each: 0 for responses, padding, and prompts without them."""
    inputs: dict[str, Tensor] = {}
    for row, owner in enumerate(owners):
        for name, values in owner.token_inputs.items():
            if name not in inputs:
                inputs[name] = values.new_zeros(rows, length)
            inputs[name][row, : len(values)] = values
    return inputs


def _image_inputs(owners: Sequence[Sample]) -> dict[str, Tensor]:
    """The image inputs of all prompts that have images, one after the other."""
    with_images = [owner for owner in owners if owner.image_inputs]
    if not with_images:
        return {}
    names = list(with_images[0].image_inputs)
    for owner in with_images:
        if set(owner.image_inputs) != set(names):
            raise ValueError(
                f"image_inputs must have the same names in all samples of a batch, got {sorted(names)} in "
                f"{with_images[0].name} and {sorted(owner.image_inputs)} in {owner.name}"
            )
    return {name: _padded_cat(name, [owner.image_inputs[name] for owner in with_images]) for name in names}


def _padded_cat(name: str, tensors: Sequence[Tensor]) -> Tensor:
    axes, dtypes = {tensor.ndim for tensor in tensors}, {tensor.dtype for tensor in tensors}
    if len(axes) > 1 or len(dtypes) > 1 or 0 in axes:
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(f"{name} must have the same axes, at least one, and dtype in all samples, got {shapes}")
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    if all(list(tensor.shape[1:]) == sizes for tensor in tensors):
        return torch.cat(list(tensors))
    out = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *sizes)
    begin = 0
    for tensor in tensors:
        place = (slice(begin, begin + len(tensor)), *map(slice, tensor.shape[1:]))
        out[place] = tensor
        begin += len(tensor)
    return out


# The forward.


def _rows(values: Tensor, batch: Batch) -> Tensor:
    if values.shape[:2] != batch.segments.shape:
        raise RuntimeError(
            f"model must return one hidden state for each of {tuple(batch.segments.shape)} tokens, got shape "
            f"{tuple(values.shape)}"
        )
    # Not index_select: its backward adds in no particular order on a GPU, and the last token of a prompt is met twice.
    return values.flatten(0, 1)[batch.index]


def _text_config(inner: nn.Module) -> Any:
    """The config that the decoder has; that of the whole model may be another copy."""
    get_decoder: Any = getattr(inner, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    config: Any = getattr(decoder, "config", None) or getattr(inner, "config", None)
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


class _MaskPlan(NamedTuple):
    """Which masks the layers want, and in which form."""

    kinds: frozenset[str]
    window: int | None
    implementation: str


def _mask_plan(inner: nn.Module) -> _MaskPlan | str:
    """The masks of a model, or the reason why it cannot be given any."""
    name, config = type(inner).__name__, _text_config(inner)
    if config is None:
        return f"{name} has no config"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        why = "takes no such mask" if "flash" in str(implementation) else "is none that masks are made for"
        return f"attention {implementation!r} {why}: set model.attention to {' or '.join(_IMPLEMENTATIONS)}"
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        kinds = frozenset(types[: getattr(config, "num_hidden_layers", None)])
        unknown = sorted(kinds - {_FULL, _SLIDING})
        if unknown:
            return f"{name} has layers of {', '.join(unknown)}"
    elif window is not None and any(
        hasattr(sys.modules.get(type(module).__module__), "create_sliding_window_causal_mask")
        for module in inner.modules()
    ):
        kinds = frozenset({_SLIDING})  # Mistral, Phi 3: all layers, where there is a window
    else:
        kinds = frozenset({_FULL})
    if _SLIDING in kinds and window is None:
        return f"{name} has sliding attention, but its config does not say how far"
    others = {
        key: value
        for key, value in vars(config).items()
        if key in ("attention_types", "attention_layers", "attention_window", "window_size") and value
    }
    if others and types is None:
        return f"{name} has attention of a kind that is not known: its config says {others}"
    return _MaskPlan(kinds, window, implementation)


def _masks(inner: nn.Module, segments: Tensor) -> Tensor | dict[str, Tensor]:
    """The attention masks ``[R, 1, L, L]`` of rows with several responses, as the model's layers want them."""
    plan = _mask_plan(inner)
    if isinstance(plan, str):
        raise ValueError(f'layout must be "separate" for this model, got "shared": {plan}')
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & (query >= 0) & ((key == 0) | (key == query))
    # Padding sees itself, since the softmax of nothing is NaN.
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    masks = {_FULL: seen | itself}
    if _SLIDING in plan.kinds and plan.window is not None:
        # By places and not by rotary positions, which an image advances by less than its tokens.
        places = _sequence_positions(segments)
        masks[_SLIDING] = (seen & (places.unsqueeze(2) - places.unsqueeze(1) < plan.window)) | itself
    if plan.implementation == "sdpa":
        ready = {kind: masks[kind].unsqueeze(1) for kind in plan.kinds}
    else:
        dtype = _dtype(inner)
        ready = {
            kind: torch.zeros_like(masks[kind], dtype=dtype)
            .masked_fill_(~masks[kind], torch.finfo(dtype).min)
            .unsqueeze(1)
            for kind in plan.kinds
        }
    # One tensor serves models that know one kind only; those that mix kinds ask for each by its name.
    return ready if len(ready) > 1 else next(iter(ready.values()))


def _dtype(inner: nn.Module) -> torch.dtype:
    dtype = inner.get_input_embeddings().weight.dtype  # type: ignore[operator]
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


@contextmanager
def _images_encoded_once(inner: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """The inputs of the model; inside, it takes each image for the chosen and for the rejected row of a pair."""
    inputs: dict[str, Any] = dict(batch.inputs)
    has_grid = any(name in inputs for name in _GRIDS)
    if has_grid and prompt_positions(inner) is not None and getattr(inputs.get("position_ids"), "ndim", 0) < 3:
        raise ValueError(
            f"batch must have the positions of {type(inner).__name__}, got none: collate(..., "
            "positions=prompt_positions(model))"
        )
    for name, values in inputs.items():
        if name.startswith("pixel_values") and values.is_floating_point():
            inputs[name] = values.to(_dtype(inner))
    masks = _masks(inner, batch.segments) if batch.layout == "shared" else (batch.segments >= 0).long()
    inputs |= {"attention_mask": masks, "use_cache": False}
    per_token = batch.segments.shape
    images = [
        name
        for name, values in batch.inputs.items()
        if name not in ("input_ids", "position_ids") and values.shape != per_token
    ]
    if batch.copies == 1 or not images:
        yield inputs
        return
    owners = [(module, name) for name in _FEATURES for module in _encoders(inner, name)]
    if not owners:
        _warn_of_two(inner)
        yield inputs | {name: _twice(inputs[name]) for name in images}
        return
    before = [vars(module).get(name) for module, name in owners]
    try:
        for module, name in owners:
            object.__setattr__(module, name, _features_twice(getattr(module, name), module))
        yield inputs
    finally:
        for (module, name), own in zip(owners, before, strict=True):
            if own is None:
                vars(module).pop(name, None)
            else:
                object.__setattr__(module, name, own)


def _encoders(inner: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose forward calls ``self.get_image_features``, and not those that hand it on."""
    return [
        module
        for module in inner.modules()
        if callable(getattr(type(module), name, None)) and name in _names_in_forward(module)
    ]


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()


def _features_twice(encode: Callable[..., Any], owner: nn.Module) -> Callable[..., Any]:
    """``get_image_features`` with the features of all images, and then the same once more."""

    def encode_once(*args: Any, **kwargs: Any) -> Any:
        features = encode(*args, **kwargs)
        if _is_tensors(features):
            return _twice(features)
        if isinstance(features, dict):
            read = _read_by(owner, features)
            if read and all(
                all(map(_is_tensors, features[name])) if name == _BY_LAYER else _is_tensors(features[name])
                for name in read
            ):
                for name in read:
                    value = features[name]
                    setattr(features, name, [_twice(layer) for layer in value] if name == _BY_LAYER else _twice(value))
                return features
        _warn_of_two(owner)
        return encode(*map(_twice, args), **{name: _twice(value) for name, value in kwargs.items()})

    return encode_once


def _read_by(owner: nn.Module, features: dict[str, Any]) -> list[str]:
    """Which of the features of images the forward of their owner takes."""
    names = {name for name in _names_in_forward(owner) if features.get(name) is not None}
    names -= {"hidden_states", "attentions"}  # those of the decoder, which the forward hands on
    if "pooler_output" in names:
        names.discard("last_hidden_state")
    return sorted(names)


def _is_tensors(values: Any) -> bool:
    """Whether this is a tensor, or a sequence of tensors, one for each image."""
    return isinstance(values, Tensor) or (
        isinstance(values, (list, tuple)) and all(isinstance(value, Tensor) for value in values)
    )


def _twice(values: Any) -> Any:
    """A tensor along its first axis, or a sequence, twice in a row; anything else as it is."""
    if isinstance(values, Tensor):
        return torch.cat([values, values])
    return values * 2 if isinstance(values, (list, tuple)) else values


def _warn_of_two(owner: nn.Module) -> None:
    warnings.warn(
        f"{type(owner).__name__} gives no known features of images by itself: each image is encoded twice per pair in "
        'the layout "separate"',
        stacklevel=3,
    )


# Support and check.


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # the check on a batch will tell
        return ""


def _logp(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """Log-probs of the labels on the CPU, and the precision of the arithmetic that they come from."""
    dtypes: list[torch.dtype] = []

    def note(module: nn.Module, args: Any) -> None:  # autocast may be on inside of the model only
        dtypes.append(module.weight.dtype)  # type: ignore[arg-type]
        device = cast(Tensor, module.weight).device.type
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))

    inner = unwrap_model(model)
    handle = inner.get_input_embeddings().register_forward_pre_hook(note)  # type: ignore[operator]
    try:
        out = forward(model, batch)
    finally:
        handle.remove()
    floats = [dtype for dtype in (*dtypes, out.hidden.dtype, out.weight.dtype) if dtype.is_floating_point]
    epsilon = max(torch.finfo(dtype).eps for dtype in floats)
    if out.hidden.is_cuda and torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, torch.finfo(torch.float16).eps)  # TF32 has its mantissa
    logp = linear_token_logp(out.hidden, out.weight.to(out.hidden.device), batch.labels, **out.options)
    return logp.double().cpu(), epsilon


def _rms(differences: Tensor) -> float:
    return differences.square().mean().sqrt().item()


@contextmanager
def _as_before(model: nn.Module, window: int) -> Iterator[None]:
    """Evaluation mode, and sliding windows no larger than ``window``; undoes both."""
    training = [(module, module.training) for module in model.modules()]
    configs: dict[int, tuple[Any, int]] = {}
    for module in unwrap_model(model).modules():
        config: Any = getattr(module, "config", None)
        for one in (config, getattr(config, "text_config", None)):
            size = getattr(one, "sliding_window", None)
            if isinstance(size, int) and size > window:
                configs.setdefault(id(one), (one, size))
    try:
        model.eval()
        for config, _ in configs.values():
            config.sliding_window = window
        yield
    finally:
        for config, size in configs.values():
            config.sliding_window = size
        for module, mode in training:
            module.training = mode
