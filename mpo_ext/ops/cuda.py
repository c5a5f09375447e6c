"""Arguments of CUDA kernel launches: the stream, the workspace, and the counters of finished thread blocks."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from mpo_ext.ops import native
from mpo_ext.ops.memory import RowLayout, Tile, addresses, row_arguments

_PER_THREAD_STREAM = 2  # the handle that names a separate stream in each thread (cudaStreamPerThread)
_MIN_COUNTERS = 4096  # more than the number of blocks that any GPU runs at once
#: Address and number of the counters, by device, stream and thread (0 for streams that threads share).
_stream_counters: dict[tuple[torch.device, int, int], tuple[int, int]] = {}


def forward_arguments(
    layout: RowLayout, labels: Tensor, ignore_index: int, pairs: int, tile: Tile | None = None
) -> tuple[dict[str, object], list[Tensor]]:
    """Returns the input arguments of the kernels token_logp and forward, and their workspace tensors.

    The caller must keep the workspace tensors alive until the launch. ``layout`` describes the logits. ``pairs`` is
    the number of pairs B, or 0 for token_logp. ``tile`` is the part of the vocabulary that the logits cover; None
    means the whole vocabulary.
    """
    rows = row_arguments(layout, labels, ignore_index, tile)
    size = {"multiprocessors": multiprocessors(labels.device)}
    shape = native.compiled().cuda_forward_shape(
        rows=rows["rows"], vocab=rows["vocab"], dtype=rows["dtype"], pairs=pairs, **size
    )
    scratch = torch.empty(shape["scratch_bytes"], dtype=torch.uint8, device=labels.device)
    block_counters = counters(shape["counters"], labels)
    work_memory = [scratch]
    if isinstance(block_counters, Tensor):
        work_memory.append(block_counters)
        block_counters = block_counters.data_ptr()
    rows |= {**addresses(scratch=scratch), "counters": block_counters, **size, "stream": current_stream(labels)}
    return rows, work_memory


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of an NVIDIA or AMD GPU, 0 for other devices."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_stream(tensor: Tensor) -> int:
    """Returns the address of the current CUDA stream on the device of the tensor."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def counters(count: int, like: Tensor) -> int | Tensor:
    """Returns at least ``count`` int32 counters on the device of ``like``, all 0.

    A kernel counts its finished thread blocks, and then sets the counters to 0 again. All launches on a stream can
    therefore share the counters.

    Returns:
        The address of the counters. During the capture of a CUDA graph, the result is a new tensor of zeros instead.
        Each replay of the graph sets this tensor to 0, so replays on any stream are safe.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    stream = current_stream(like)
    key = (like.device, stream, threading.get_ident() if stream == _PER_THREAD_STREAM else 0)
    address, size = _stream_counters.get(key, (0, 0))
    if size < count:  # the smaller array stays allocated, because earlier launches may still use it
        size = max(count, _MIN_COUNTERS)
        # Not a torch tensor: torch.compile's CUDA graphs raise an error if a call leaves one in their memory pool.
        address = native.compiled().cuda_counters(count=size, stream=stream)
        _stream_counters[key] = address, size
    return address


def check_not_capturing(tensor: Tensor) -> None:
    """Raises RuntimeError if the current stream on the tensor's device is being captured into a CUDA graph."""
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a loss from hidden states must not be captured into a CUDA graph, got a capture: its work depends on the "
            "number of labels other than ignore_index, which the host must know; capture mpo_loss instead"
        )
