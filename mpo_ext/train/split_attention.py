"""Split attention computes attention in rows ``[prompt | response | response ...]`` without a mask over the row.

The attention of a row takes several causal calls of an attention function. The first call covers the prompt and the
first response. Each further response has a separate call. In this call, the queries are the tokens of the response,
and the keys are the tokens of the prompt and the response. If a row holds several prompts, each prompt and its
responses have such calls. flash-attn and ``joint_attention`` compute all calls at once.

The functions of this module are registered in transformers' ``AttentionInterface`` under the names in ``NAMES``.
Without the keyword argument ``row_segments``, they call the original function of transformers.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpo_ext.train.joint_attention import TokenPart, can_join, joint_attention, joint_calls

#: The registered name for each attention implementation of transformers that has a split form.
NAMES = {
    "sdpa": "mpo_split_sdpa",
    "eager": "mpo_split_eager",
    "flash_attention_2": "mpo_split_flash_attention_2",
    "flash_attention_3": "mpo_split_flash_attention_3",
}
_BASES = {name: base for base, name in NAMES.items()}

#: Maximum number of queries of a call if a sliding window is shorter than the sequence. It limits the call's mask.
WINDOW_QUERIES = 512

#: Name of the eager attention function in the modeling files of transformers. It also computes sinks and soft caps.
_EAGER = "eager_attention_forward"

#: Arguments that change attention and that SDPA does not support.
_NOT_IN_SDPA = ("softcap", "s_aux", "position_bias")


class _Part(NamedTuple):
    """A part of a row: the query tokens of one causal attention call, or the padding at the end of the row.

    Attributes:
        size: Number of tokens.
        prompt: For a second or later response to a prompt, the index of the part that begins with the prompt. None for
            any other part.
        prompt_length: Number of tokens of the prompt in that earlier part; 0 if ``prompt`` is None.
        is_padding: Whether the part is padding. Attention is not computed for padding.
        blocks: (start, end) of each image whose tokens attend to each other, as token indices in the part. The end is
            exclusive.
    """

    size: int
    prompt: int | None = None
    prompt_length: int = 0
    is_padding: bool = False
    blocks: tuple[tuple[int, int], ...] = ()


class RowSegments:
    """The sequence rows of a batch, divided into parts for attention calls.

    A prompt and its first response form a part. Each later response is a part. The last part of a row is its padding,
    which may be empty.

    Attributes:
        parts: The parts of all rows, in order.
        sizes: The number of tokens of each part. The sum is R * L, for R rows of L token positions.
        cu_seqlens: Two int32 tensors ``[C + 1]``, where C is the number of calls: the offsets of the calls in the
            packed queries, and their offsets in the packed keys.
        longest: Maximum number of queries of a call, and maximum number of keys of a call.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[Sequence[int]]],
        length: int,
        device: torch.device,
        blocks: Sequence[Sequence[tuple[tuple[int, int], ...]]] = (),
    ) -> None:
        """Divides the rows into parts.

        Args:
            lengths: ``Batch.segment_lengths`` of the R rows.
            length: Number of token positions of a row, L.
            device: Device of ``cu_seqlens``.
            blocks: ``Batch.image_blocks``. Empty if the tokens of an image do not attend to each other in the model.
        """
        self.parts: list[_Part] = []
        for row, prompts in enumerate(lengths):
            for number, sizes in enumerate(prompts):
                first = len(self.parts)
                if sizes:
                    self.parts.append(_Part(sum(sizes[:2]), blocks=blocks[row][number] if blocks else ()))
                self.parts += [_Part(size, first, sizes[0]) for size in sizes[2:]]
            self.parts.append(_Part(length - sum(map(sum, prompts)), is_padding=True))
        self.sizes = [part.size for part in self.parts]
        calls = [part for part in self.parts if not part.is_padding]
        counts = [part.size for part in calls], [part.size + part.prompt_length for part in calls]
        self.longest = max(counts[0]), max(counts[1])
        self.cu_seqlens = tuple(
            torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True) for sizes in counts
        )


def token_blocks(token_types: Tensor) -> tuple[tuple[int, int], ...]:
    """Returns the start and the end (exclusive) of each run of image tokens (type 1) in ``token_type_ids``."""
    edges = F.pad((token_types == 1).int(), (1, 1)).diff()  # 1 where a run begins, -1 after its last token
    starts, stops = ((edges == edge).nonzero().flatten().tolist() for edge in (1, -1))
    return tuple(zip(starts, stops, strict=True))


def base_implementation(name: str | None) -> str | None:
    """Returns the original attention implementation, such as "sdpa", for the name of a split implementation.

    Any other name is returned unchanged.
    """
    return _BASES.get(str(name), name)


def is_split(name: str | None) -> bool:
    """Returns whether ``name`` is the name of a split attention implementation, a value of ``NAMES``."""
    return name in _BASES


def join_decoder(config: Any) -> None:
    """Undoes ``split_decoder``. ``config`` is the config that the decoder's layers read."""
    name = getattr(config, "_attn_implementation", None)
    if is_split(name):
        config._attn_implementation = base_implementation(name)  # noqa: SLF001 - as in split_decoder


def split_decoder(decoder: nn.Module, config: Any) -> str | None:
    """Switches the attention implementation of a decoder to split attention.

    With split attention, rows with several responses need no mask. Calls without ``row_segments`` still run the
    previous implementation. The name of the split implementation is not saved with the model.

    Args:
        decoder: Decoder of a Hugging Face model.
        config: Config that the layers of the decoder read.

    Returns:
        None if the decoder now uses split attention. Otherwise, the decoder is unchanged, and the result is the reason
        why it does not support split attention.
    """
    base = base_implementation(getattr(config, "_attn_implementation", None))
    if base not in NAMES:
        return f"attention {base!r} has no split form"
    try:
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return "transformers has no AttentionInterface"
    try:
        code = inspect.getsource(sys.modules[type(decoder).__module__])
    except (KeyError, OSError, TypeError):
        code = ""
    # A model that compares the name of its attention would not recognise the registered name.
    compared = rf"_attn_implementation\s*(==|!=|in|not in)\s*.?[\"'](sdpa|{base})"
    if "ALL_ATTENTION_FUNCTIONS" not in code or re.search(compared, code):
        return f"attention of {type(decoder).__name__} does not go through AttentionInterface"
    if base not in ALL_ATTENTION_FUNCTIONS and f"def {_EAGER}(" not in code:
        return f"attention {base!r} is not known to transformers"
    if base.startswith("flash"):
        from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

        if flash_attn_supports_top_left_mask():
            return f"attention {base!r} aligns its causal mask to the first key instead of the last"
    name = NAMES[base]
    AttentionInterface.register(name, {"sdpa": _split_sdpa, "eager": _split_eager}.get(base, _split_flash))
    _register_mask(name, base)
    config._attn_implementation = name  # noqa: SLF001 - the public setter would also change the vision tower
    return None


def _register_mask(name: str, base: str) -> None:
    """Makes transformers build the same masks for the attention implementation ``name`` as for ``base``."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    except ImportError:  # before transformers 4.53 models build their masks themselves
        return
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def window_marker(rows: int, window: int | None, device: torch.device) -> Tensor:
    """Returns an empty mask with the shape ``[R, 1, 0, window]``, or ``[R, 1, 0, 0]`` without a sliding window.

    Models pass a 4-D mask unchanged to each layer. Split attention reads the window from the shape of this mask.
    Other attention functions fail on this shape instead of computing wrong results. ``rows`` is R.
    """
    return torch.empty(rows, 1, 0, window or 0, dtype=torch.bool, device=device)


def is_marker(mask: Any) -> bool:
    """Returns whether a mask is a marker made by ``window_marker``."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == 0


def _base_of(module: nn.Module) -> tuple[str, Callable[..., tuple[Tensor, Any]]]:
    """Returns the original attention implementation of a module: its name and its function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _BASES[getattr(module.config, "_attn_implementation", "")]
    if name == "eager":
        return name, getattr(sys.modules[type(module).__module__], _EAGER)
    return name, ALL_ATTENTION_FUNCTIONS[name]


#: Function that returns attention ``[1, H, n, D]`` of n queries over m keys and m values ``[1, G, m, D]``;
#: its keyword arguments are ``attn_mask``, boolean ``[n, m]`` or None, and ``is_causal``.
_Attend = Callable[..., Tensor]


class _Call(NamedTuple):
    """The arguments of a split attention call. ``window`` is the length of the sliding window, or None."""

    segments: RowSegments
    window: int | None


def _checked_call(module: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> _Call | None:
    """Returns the rows and the window of a split attention call, or None for an ordinary call.

    An ordinary call has no ``row_segments``. ``mask`` is an attention mask or a marker made by ``window_marker``. The
    function removes ``row_segments`` from ``kwargs``. For a split attention call, it also removes ``is_causal``.

    Raises:
        RuntimeError: If only one of a marker and ``row_segments`` is given.
        ValueError: If both are given, but attention is not causal.
    """
    segments = kwargs.pop("row_segments", None)
    if not is_marker(mask) and segments is None:
        return None
    if not is_marker(mask) or segments is None:
        missing = "row_segments" if segments is None else "the marker in place of a mask"
        raise RuntimeError(f"the model must pass {missing} on to {type(module).__name__}, got none")
    if not (getattr(module, "is_causal", True) and kwargs.pop("is_causal", None) in (None, True)):
        raise ValueError(f"attention must be causal in rows with several responses, got {type(module).__name__}")
    assert mask is not None
    return _Call(segments, mask.shape[3] or None)


def _split_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Computes split attention with ``scaled_dot_product_attention``. ``AttentionInterface`` calls this function.

    Shapes: ``query`` is ``[R, H, L, D]``. ``key`` and ``value`` are ``[R, G, L, D]``, and H is a multiple of G.
    Returns the output, ``[R, L, H, D]``, and None in place of attention weights. The output is 0 at padding.
    """
    call = _checked_call(module, attention_mask, kwargs)
    if call is None:
        return _base_of(module)[1](module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name in _NOT_IN_SDPA if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"attention must be without {', '.join(unknown)}, got it in {type(module).__name__}")
    query, key, value = _autocast(query, key, value)
    options: dict[str, Any] = {"dropout_p": kwargs.get("dropout") or 0.0, "scale": kwargs.get("scaling")}
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # The flash kernel of CUDA shares keys between heads; other kernels need a copy of the keys for each head.
        if query.is_cuda and query.dtype != torch.float32 and query.shape[3] <= 256 and call.window is None:
            options["enable_gqa"] = True
        else:
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    if _joins(query, value, call, options["dropout_p"]):
        parts = [TokenPart(*part[:4]) for part in call.segments.parts]
        tensors = _tokens(query), _tokens(key), _tokens(value)
        out = joint_attention(*tensors, joint_calls(parts), options["scale"])
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None
    return _attend_to_parts(call, query, key, value, partial(F.scaled_dot_product_attention, **options)), None


def _split_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Computes split attention with the model's own eager attention; a function for ``AttentionInterface``.

    Arguments and result are the same as in ``_split_sdpa``. Attention sinks and soft caps are also supported.
    """
    _, base = _base_of(module)
    call = _checked_call(module, attention_mask, kwargs)
    if call is None:
        return base(module, query, key, value, attention_mask, **kwargs)

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if is_causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, torch.finfo(q.dtype).min)
            attn_mask = attn_mask[None, None]
        return base(module, q, k, v, attn_mask, **kwargs)[0].transpose(1, 2)

    return _attend_to_parts(call, query, key, value, attend), None


def _attend_to_parts(call: _Call, query: Tensor, key: Tensor, value: Tensor, attend: _Attend) -> Tensor:
    """Returns the attention output ``[R, L, H, D]`` of sequence rows. Calls ``attend`` for each part of the rows."""
    rows, heads, length, _ = query.shape
    sizes = call.segments.sizes
    queries, keys, values = (_tokens(tensor).split(sizes) for tensor in (query, key, value))
    prompts: dict[int, tuple[Tensor, Tensor]] = {}
    outputs = []
    for i, part in enumerate(call.segments.parts):
        if part.is_padding:
            outputs.append(values[i].new_zeros(part.size, heads, value.shape[3]))
            continue
        own = keys[i], values[i]
        if part.prompt is not None:
            if part.prompt not in prompts:  # sliced once, because the backward of each slice fills the whole part
                # With a window, a response sees at most the last ``window - 1`` tokens of the prompt.
                start = 0 if call.window is None else max(0, part.prompt_length + 1 - call.window)
                seen = slice(start, part.prompt_length)
                prompts[part.prompt] = keys[part.prompt][seen], values[part.prompt][seen]
            own = tuple(map(torch.cat, zip(prompts[part.prompt], own, strict=True)))  # type: ignore[assignment]
        out = _causal(queries[i], *own, call.window, attend)
        outputs += _with_blocks(out, part.blocks, queries[i], *own, call.window, attend) if part.blocks else [out]
    return torch.cat(outputs).view(rows, length, heads, value.shape[3])


def _joins(query: Tensor, value: Tensor, call: _Call, dropout: float) -> bool:
    """Returns whether one call of ``joint_attention`` replaces the attention calls of all parts.

    This needs a part that attends to a prompt in another part, and tensors that ``joint_attention`` supports. Dropout,
    sliding windows and images whose tokens attend to each other are not supported.
    """
    parts = call.segments.parts
    is_plain = not dropout and call.window is None and not any(part.blocks for part in parts)
    return is_plain and any(part.prompt is not None for part in parts) and can_join(query, value)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Converts tensors to autocast's dtype if autocast is enabled. Float64 tensors are not converted.

    Torch converts queries, keys and values itself, but not for attention with a ``causal_lower_right`` mask.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _has_aligned_kernels(query: Tensor, attend: _Attend) -> bool:
    """Returns whether the attention function supports ``causal_lower_right``, which replaces a mask tensor."""
    return query.is_cuda and isinstance(attend, partial)  # a partial is SDPA; eager attention is a function


def _tokens(tensor: Tensor) -> Tensor:
    """Joins rows and positions: ``[R, H, L, D]`` becomes ``[R * L, H, D]``."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, attend: _Attend) -> Tensor:
    """Returns causal attention ``[n, H, D]`` of n queries over m keys, with the function ``attend``.

    The queries belong to the last n of the m tokens. ``window`` is the number of tokens of the sliding window, or
    None.
    """
    count, total = len(query), len(key)
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    if window is not None and total > window:
        pieces = [
            attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask)
            for queries, keys, mask in _windows(count, total, window, query.device)
        ]
        out = torch.cat(pieces, 2)
    elif count == total:
        out = attend(q, k, v, is_causal=True)
    elif _has_aligned_kernels(query, attend):
        from torch.nn.attention.bias import causal_lower_right

        # The flash kernel aligns to the last key; is_causal of scaled_dot_product_attention aligns to the first.
        out = attend(q, k, v, attn_mask=causal_lower_right(count, total))
    else:
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
        out = attend(q, k, v, attn_mask=mask)
    return out.squeeze(0).transpose(0, 1)


def _with_blocks(
    out: Tensor,
    blocks: Sequence[tuple[int, int]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    attend: _Attend,
) -> Iterator[Tensor]:
    """Yields the pieces of the attention output ``[n, H, D]``, in order. The tokens of an image attend to each other.

    ``out`` is the causal attention output. Tokens outside images keep this output. ``blocks`` has the (start, end) of
    each image; the end is exclusive.
    """
    edges = [0, *(edge for block in blocks for edge in block), len(out)]
    between = out.split([stop - start for start, stop in pairwise(edges)])[::2]
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    yield between[0]
    for (start, stop), text in zip(blocks, between[1:], strict=True):
        if window is None or stop <= window:
            groups: Any = [(slice(0, stop - start), slice(0, stop), None)]
        else:
            groups = _windows(stop - start, stop, window, query.device, causal=False)
        for queries, keys, mask in groups:
            rows = slice(start + queries.start, start + queries.stop)
            attended = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask)
            yield attended.squeeze(0).transpose(0, 1)
        yield text


def _windows(
    count: int, total: int, window: int, device: torch.device, *, causal: bool = True
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Divides the queries of sliding-window attention into groups, because a mask for all queries would be large.

    Yields ``(queries, keys, mask)`` for each group: the slice of the queries, the slice of the keys that these queries
    see, and the mask. The queries are the last ``count`` of ``total`` tokens. A query sees itself and the ``window -
    1`` previous tokens. If ``causal`` is False, a query also sees all later tokens.
    """
    for start in range(0, count, WINDOW_QUERIES):
        stop = min(start + WINDOW_QUERIES, count)
        place = total - count + start  # position of the first query among the keys
        first, last = max(0, place - window + 1), total - count + stop if causal else total
        mask = torch.ones(stop - start, last - first, dtype=torch.bool, device=device).triu(place - first - window + 1)
        yield slice(start, stop), slice(first, last), mask.tril(place - first) if causal else mask


class _WithBase:
    """Has the attributes of ``module``, with some of them replaced by ``values``. ``module`` itself is unchanged."""

    def __init__(self, module: Any, **values: Any) -> None:
        self._module = module
        self._values = values

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__["_values"]
        return values[name] if name in values else getattr(self.__dict__["_module"], name)


def _split_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Computes split attention like ``_split_sdpa``, with the same arguments, but in a single flash-attn call.

    The parts are packed as sequences of variable length.
    """
    name, base = _base_of(module)
    with_base = _WithBase(module, config=_WithBase(module.config, _attn_implementation=name))
    call = _checked_call(module, attention_mask, kwargs)
    if call is None:
        return base(with_base, query, key, value, attention_mask, **kwargs)
    rows, _, length, _ = query.shape
    segments = call.segments
    if any(part.blocks for part in segments.parts):
        raise ValueError(f"attention of images must be causal for flash-attn, got {type(module).__name__}")
    queries, keys, values = (_tokens(tensor).split(segments.sizes) for tensor in (query, key, value))
    calls = [(i, part) for i, part in enumerate(segments.parts) if not part.is_padding]
    packed = torch.cat([queries[i] for i, _ in calls])
    packed_keys, packed_values = (
        torch.cat(
            [
                piece
                for i, part in calls
                for piece in ([] if part.prompt is None else [pieces[part.prompt][: part.prompt_length]]) + [pieces[i]]
            ]
        )
        for pieces in (keys, values)
    )
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (packed, packed_keys, packed_values))
    kwargs |= {"sliding_window": call.window, "position_ids": None}
    out, _ = base(
        with_base, q, k, v, None, **kwargs,
        cu_seq_lens_q=segments.cu_seqlens[0], cu_seq_lens_k=segments.cu_seqlens[1],
        max_length_q=segments.longest[0], max_length_k=segments.longest[1],
    )  # fmt: skip
    results = iter(out.squeeze(0).split([part.size for _, part in calls]))
    outputs = [
        out.new_zeros(part.size, *out.shape[2:]) if part.is_padding else next(results) for part in segments.parts
    ]
    return torch.cat(outputs).view(rows, length, *out.shape[2:]), None
