"""Arguments of CUDA kernel launches: the stream, the workspace, and the counters of finished blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mpo_ext.ops import native
from mpo_ext.ops.memory import RowLayout, Tile, addresses, row_arguments

_stream_counters: dict[tuple[torch.device, int], Tensor] = {}


def forward_arguments(
    layout: RowLayout, labels: Tensor, ignore_index: int, pairs: int, tile: Tile | None = None
) -> tuple[dict[str, object], list[Tensor]]:
    """Returns the input arguments of the kernels token_logp and forward, and their workspace.

    The caller keeps the workspace tensors alive until the launch. ``pairs`` is the number of pairs B, or 0 for
    token_logp alone. ``tile`` is the part of the vocabulary that the logits cover; None: all.
    """
    rows = row_arguments(layout, labels, ignore_index, tile)
    size = {"multiprocessors": multiprocessors(labels.device)}
    shape = native.compiled().cuda_forward_shape(
        rows=rows["rows"], vocab=rows["vocab"], dtype=rows["dtype"], pairs=pairs, **size
    )
    scratch = torch.empty(shape["scratch_bytes"], dtype=torch.uint8, device=labels.device)
    block_counters = counters(shape["counters"], labels)
    rows |= {**addresses(scratch=scratch, counters=block_counters), **size, "stream": current_stream(labels)}
    return rows, [scratch, block_counters]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_stream(tensor: Tensor) -> int:
    """Returns the address of the current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def counters(count: int, like: Tensor) -> Tensor:
    """Returns at least ``count`` int32 counters of finished blocks, all 0, on the device of ``like``.

    Kernels reset the counters to 0 after use. All launches on a stream can therefore share one tensor. A launch that
    is captured into a CUDA graph gets a separate tensor, because a graph may be replayed on any stream. Each replay
    sets this tensor to 0.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.device, current_stream(like))
    cached = _stream_counters.get(key)
    if cached is None or cached.numel() < count:
        cached = _stream_counters[key] = torch.zeros(count, dtype=torch.int32, device=like.device)
    return cached
