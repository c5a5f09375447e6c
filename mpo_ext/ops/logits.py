"""The kernels as torch operators: every check, every allocation and the choice of backend live here and nowhere below.

Each operator is functional (it returns fresh tensors and writes to no input), but for ``logits_grad_``, which says so
in its name. So ``torch.compile`` can trace past them, and no caller finds its logits overwritten without having asked.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpo_ext.checks import install_hint

BACKENDS = ("cpu", "cuda", "triton", "reference")
#: Statistics of a row of logits, in the order of the bits that ask for them (csrc/mpo/api.h: RowStats).
STATS = ("entropy", "mean_logit", "top1", "sum_p_squared")
#: Numbers in the state of a row that tiles of its vocabulary hand on (csrc/mpo/math.h: RowState).
ROW_STATE = 6
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROW_OUTPUTS = ("logp", "row_max", "row_sum", "row_stats")
_FRESH_PAGES_BYTES = 1 << 20


# ------------------------------------------------------------------------------------------------------------ backends


def choose_backend(backend: str | None, logits: Tensor, name: str = "logits") -> str:
    """Returns the backend that serves these logits, or what they come from.

    Raises:
        TypeError: If the backend does not take their dtype.
        ValueError: If ``backend`` is not the name of one.
        RuntimeError: If it cannot run here, or not on their device.
    """
    device = logits.device.type
    if device == "meta":
        raise RuntimeError(f"{name} must be on a device that holds data, got device meta")
    if backend is None:
        if device == "cpu":
            return "cpu"
        if logits.dtype == torch.float64:
            return "reference"
        if cuda_problem(logits.device) is None:
            return "cuda"
        return "triton" if triton_problem(device) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "cuda":
        problem = cuda_problem(logits.device)
        if problem is not None:
            raise RuntimeError(f"backend 'cuda' cannot run: {problem}")
        if logits.dtype == torch.float64:
            raise TypeError(f"{name} must not be torch.float64 with backend 'cuda', got torch.float64")
    if backend == "cpu" and device != "cpu":
        raise RuntimeError(f"backend 'cpu' needs {name} on the CPU, got {name} on {logits.device}")
    if backend == "triton":
        problem = triton_problem(device)
        if problem is not None:
            raise RuntimeError(f"backend 'triton' cannot run: {problem}")
        if logits.dtype == torch.float64:
            raise TypeError(f"{name} must not be torch.float64 with backend 'triton', got torch.float64")
    return backend


@torch.compiler.assume_constant_result  # torch.compile need not trace what the driver is asked
def cuda_problem(device: torch.device) -> str | None:
    """Says why the CUDA kernels cannot run on tensors of this device, or returns None if they can."""
    try:
        has_cuda = bool(_native().has_cuda)
    except ImportError as error:
        return str(error)
    if not has_cuda:
        return "this mpo_ext was built without CUDA kernels; with nvcc on PATH, MPO_CUDA=ON pip install . builds them"
    if device.type != "cuda":
        seen = "" if torch.cuda.is_available() else ", and torch sees no GPU"
        return f"it needs tensors on an NVIDIA GPU, got device {device}{seen}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, got an AMD one"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs a GPU of compute capability 8.0 or newer, got {major}.{minor}"
    return None


def triton_problem(device: str) -> str | None:
    """Says why the Triton kernels cannot run on tensors of this device type, or returns None if they can."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {install_hint('triton')}"
    if device in ("cuda", "xpu"):
        return None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs tensors on a GPU, got device {device} (TRITON_INTERPRET=1 runs its interpreter on a CPU)"


# -------------------------------------------------------------------------------------------------------------- checks


def check_logits(name: str, logits: Tensor, axis: str = "vocabulary") -> None:
    """Raises unless these are logits that the kernels take, or hidden states whose last axis is called otherwise."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have a {axis} axis of at least 1 at the end, got shape {_shape(logits)}")


def check_labels(logits: Tensor, labels: Tensor, name: str = "logits", *, may_be_on_cpu: bool = False) -> None:
    """Raises unless ``labels`` is int64, of the logits' leading shape and on their device, or on the CPU if it may."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of {name} without the last axis, got {name} {_shape(logits)} and labels "
            f"{_shape(labels)}"
        )
    if labels.device != logits.device and not (may_be_on_cpu and labels.device.type == "cpu"):
        raise ValueError(f"labels must be on the device of {name}, {logits.device}, got {labels.device}")


def check_pairs(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, name: str = "logits") -> int:
    """Raises unless logits and labels hold whole pairs, padded or packed; returns the number of sequences, 2B.

    With the name "hidden" they are hidden states, whose labels may be on the CPU.
    """
    size, axis = ("D", "feature") if name == "hidden" else ("V", "vocabulary")
    check_logits(name, logits, axis)
    if cu_seqlens is None:
        if logits.ndim != 3:
            raise ValueError(
                f"{name} must be [2B, T, {size}], or [N, {size}] with cu_seqlens, got shape {_shape(logits)}"
            )
        check_labels(logits, labels, name, may_be_on_cpu=name == "hidden")
        sequences = logits.shape[0]
        if sequences == 0 or sequences % 2:
            raise ValueError(
                f"{name} must hold 2B sequences, B chosen and then B rejected, B at least 1, got {sequences}"
            )
        return sequences
    if logits.ndim != 2:
        raise ValueError(f"{name} must be [N, {size}] when cu_seqlens is given, got shape {_shape(logits)}")
    check_labels(logits, labels, name, may_be_on_cpu=name == "hidden")
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != logits.device:
        raise ValueError(f"cu_seqlens must be on the device of {name}, {logits.device}, got {cu_seqlens.device}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 3 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            f"cu_seqlens must be [2B + 1] for B chosen and B rejected sequences, B at least 1, got shape "
            f"{_shape(cu_seqlens)}"
        )
    # Looking at the values would wait for a GPU; there pair_loss gives NaN instead.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offsets(cu_seqlens, logits.shape[0])
    return cu_seqlens.shape[0] - 1


def check_offsets(cu_seqlens: Tensor, rows: int) -> None:
    """Raises unless the offsets run from 0 to the number of rows and increase at every step."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
    for before, after in itertools.pairwise(offsets):
        if after <= before:
            raise ValueError(f"cu_seqlens must increase at every step, got {before} followed by {after}")
    if offsets[-1] != rows:
        raise ValueError(f"cu_seqlens must end at N, the number of rows, {rows}, got {offsets[-1]}")


def check_reference(
    logits: Tensor, sequences: int, ref_logp: Tensor | None, ref_logits: Tensor | None, name: str = "logits"
) -> None:
    """Raises unless exactly one of the two references is given, and fits; ``ref_hidden`` may have its own width."""
    ref_name = f"ref_{name}"
    if (ref_logp is None) == (ref_logits is None):
        got = "neither" if ref_logp is None else "both"
        raise ValueError(f"exactly one of ref_logp and {ref_name} must be given, got {got}")
    if ref_logits is not None:
        check_logits(ref_name, ref_logits, "feature" if name == "hidden" else "vocabulary")
        if ref_logits.shape[:-1] != logits.shape[:-1] or (name == "logits" and ref_logits.shape != logits.shape):
            but = " but for the last axis" if name == "hidden" else ""
            raise ValueError(
                f"{ref_name} must have the shape of {name}{but}, {_shape(logits)}, got {_shape(ref_logits)}"
            )
        if ref_logits.device != logits.device:
            raise ValueError(f"{ref_name} must be on the device of {name}, {logits.device}, got {ref_logits.device}")
        return
    if not isinstance(ref_logp, Tensor):
        raise TypeError(f"ref_logp must be a torch.Tensor, got {type(ref_logp).__name__}")
    if ref_logp.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ref_logp must be torch.float32 or torch.float64 (half precision rounds a sum of hundreds of "
            f"log-probs to whole nats), got {ref_logp.dtype}"
        )
    if tuple(ref_logp.shape) != (sequences,):
        raise ValueError(f"ref_logp must be [2B] = [{sequences}], got shape {_shape(ref_logp)}")
    if ref_logp.device != logits.device:
        raise ValueError(f"ref_logp must be on the device of {name}, {logits.device}, got {ref_logp.device}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    memory_budget: int | None,
    recompute: bool = True,
    *,
    prefix: str = "",
) -> None:
    """Raises unless these are a head for the hidden states, and numbers that it can be used with."""
    for name, tensor in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is None and name.endswith("bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            names = ", ".join(str(dtype) for dtype in _DTYPES)
            raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of {prefix}hidden, {hidden.device}, got {tensor.device}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must be [V, D] with D that of {prefix}hidden, {hidden.shape[-1]}, got shape "
            f"{_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [V] = [{weight.shape[0]}], got shape {_shape(bias)}")
    for name, value, rule in (
        ("logit_scale", logit_scale, lambda x: x != 0),
        ("softcap", softcap, lambda x: x > 0),
        ("temperature", temperature, lambda x: x > 0),
    ):
        if value is None and name == "softcap":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or not rule(value):
            raise ValueError(
                f"{name} must be finite and {'not 0' if name == 'logit_scale' else 'above 0'}, got {value}"
            )
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {recompute!r}")
    if memory_budget is None:
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget must be an int, a number of bytes, got {memory_budget!r}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")


def check_stats(stats: Sequence[str], allowed: Sequence[str] = STATS) -> tuple[str, ...]:
    """Returns the statistics in the order of ``STATS``, without repetitions.

    Raises:
        TypeError: If it is no sequence of names.
        ValueError: If one is unknown.
    """
    if isinstance(stats, str):
        raise TypeError(f"stats must be a sequence of names, got the single string {stats!r}")
    if not isinstance(stats, Collection):
        raise TypeError(f"stats must be a sequence of names out of {', '.join(map(repr, allowed))}, got {stats!r}")
    for name in stats:
        if name not in allowed:
            raise ValueError(f"stats must be names out of {', '.join(map(repr, allowed))}, got {name!r}")
    return tuple(name for name in STATS if name in stats)


def stats_mask(stats: Sequence[str]) -> int:
    """Returns the bits by which ``token_logp`` is asked for these statistics."""
    return sum(1 << STATS.index(name) for name in set(stats))


def check_reuse(logits: Tensor) -> None:
    """Raises unless a gradient of these logits can be written into their own memory."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"reuse_logits needs logits whose vocabulary axis has stride 1, got strides {tuple(logits.stride())}"
        )
    span = 1
    for size, stride in sorted(zip(logits.shape, logits.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1 and stride < span:
            raise ValueError(
                f"reuse_logits needs logits whose rows do not overlap, got shape {_shape(logits)} with strides "
                f"{tuple(logits.stride())}"
            )
        span += (size - 1) * stride


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("mpo_ext::token_logp", mutates_args=())
def token_logp(
    logits: Tensor, labels: Tensor, ignore_index: int, stats: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each label under its row of logits. Reads each logit of a labelled row once.

    Args:
        logits: ``[..., V]``. Copied only if V is not the contiguous axis, or the rows need more than two strides.
        labels: ``[...]`` int64, in ``[0, V)`` or equal to ``ignore_index``; any other value gives NaN.
        ignore_index: Label of the rows that are not read and give 0.
        stats: Statistics wanted: bit i asks for ``STATS[i]``.
        backend: What ``choose_backend`` returned, but for "reference".

    Returns:
        ``(logp, row_max, row_sum, row_stats)``: three of ``[...]`` with ``sum_v exp(z_v - row_max) == row_sum``, and
        ``[number of statistics, ...]``, in the order of ``STATS``; float32, or float64 for float64 logits.
    """
    check_logits("logits", logits)
    check_labels(logits, labels)
    outputs = token_logp_outputs(logits, labels, stats)
    score(logits, labels, ignore_index, stats, backend, outputs)
    return outputs


@token_logp.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, stats: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return token_logp_outputs(logits, labels, stats)


def token_logp_outputs(logits: Tensor, labels: Tensor, stats: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _result_dtype(logits)
    logp, row_max, row_sum = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(3))
    return logp, row_max, row_sum, logits.new_empty((stats.bit_count(), *labels.shape), dtype=dtype)


class Tile(NamedTuple):
    """Says that logits are columns ``first`` .. ``first + V - 1`` of ``total``; labels count from the first of all.

    Attributes:
        first: The tiles of a row are scored in their order, so this is the columns scored before.
        total: Size of the whole vocabulary.
        state: ``[rows, ROW_STATE]`` float64, what the tiles hand on; any contents before the first one. ``write_grad``
            needs none.
    """

    first: int
    total: int
    state: Tensor | None


def score(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: int,
    backend: str,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    tile: Tile | None = None,
    *,
    leaves_exp_logits: bool = False,
) -> None:
    """Fills the outputs of ``token_logp``; with a tile, as of the vocabulary up to the tile's end.

    With ``leaves_exp_logits`` the logits become ``exp(z - row_max)``, with ``row_max`` as of this tile, and 0 for the
    label; where a row's label is bad, or its logp NaN, what they become is not defined.
    """
    if labels.numel() == 0:
        return
    layout, row_labels = _row_layout(logits), labels.contiguous()
    addresses = _addresses(
        **dict(zip(_ROW_OUTPUTS, outputs, strict=True)), row_state=None if tile is None else tile.state
    )
    if backend == "triton":
        with _device_guard(logits):
            _kernels().token_logp(layout, row_labels, logits.shape[-1], ignore_index, stats, *outputs, tile)
    elif backend == "cuda":
        with _device_guard(logits):
            arguments, _kept = _cuda_forward_arguments(layout, row_labels, ignore_index, 0, tile)
            _native().token_logp_cuda(**arguments, **addresses, stats=stats)
    else:
        _native().token_logp_cpu(
            **_row_arguments(layout, row_labels, ignore_index, tile),
            **addresses,
            stats=stats,
            exp_logits=layout.tensor.data_ptr() if leaves_exp_logits else 0,
            threads=torch.get_num_threads(),
            isa=cpu_isa(),
        )
        return
    if leaves_exp_logits:
        _write_exp_logits(logits, labels, outputs[1], ignore_index, backend, tile)


def _write_exp_logits(
    logits: Tensor, labels: Tensor, row_max: Tensor, ignore_index: int, backend: str, tile: Tile | None
) -> None:
    """What ``score`` says of ``leaves_exp_logits``, by a pass of its own."""
    safe = torch.where(row_max == -math.inf, 0.0, row_max)  # nothing but -inf so far
    ones = torch.ones_like(safe)
    write_grad(logits, labels, safe, ones, -ones, None, ignore_index, backend, logits, tile=tile)
    column = (labels - (0 if tile is None else tile.first)).unsqueeze(-1)
    is_here = (column >= 0) & (column < logits.shape[-1])
    column = column.clamp(0, logits.shape[-1] - 1)
    logits.scatter_(-1, column, torch.where(is_here, 0.0, logits.gather(-1, column)))


@torch.library.custom_op("mpo_ext::pair_loss", mutates_args=())
def pair_loss(
    logp: Tensor,
    labels: Tensor,
    ref_logp: Tensor,
    state: Tensor,
    rule: int,
    update_first: bool,
    decay: float,
    cu_seqlens: Tensor | None,
    beta: float,
    dpo_weight: float,
    bco_weight: float,
    ntp_weight: float,
    label_smoothing: float,
    average_sequences: bool,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of B pairs, and the weight that each row's gradient gets. Reads nothing of the size of the logits.

    Args and definition as in ``reference.pair_loss``.

    Returns:
        ``(loss, terms, reward_shift, logp, reward, tokens, state, batch)`` as in ``reference.PairLoss``, then
        ``weight``, shaped like the input ``logp``: d loss / d logp of each row.
    """
    outputs = _pair_loss_outputs(logp, ref_logp, state)
    if backend == "cuda":
        rows, row_labels = logp.contiguous(), labels.contiguous()
        shape = _native().cuda_pair_loss_shape(pairs=ref_logp.shape[0] // 2)
        with _device_guard(logp):
            scratch = torch.empty(shape["scratch_bytes"], dtype=torch.uint8, device=logp.device)
            arguments, _kept = _cuda_pair_arguments(
                outputs, ref_logp, state, rule, update_first, decay, cu_seqlens, beta, dpo_weight, bco_weight,
                ntp_weight, label_smoothing, average_sequences,
            )  # fmt: skip
            _native().pair_loss_cuda(
                **arguments,
                **_addresses(logp=rows, labels=row_labels, scratch=scratch),
                rows=rows.numel(),
                ignore_index=ignore_index,
                stream=_current_stream(logp),
            )
        return outputs
    loss, terms, reward_shift, sums, reward, tokens, new_state, batch, weight = outputs
    sequences = ref_logp.shape[0]
    offsets = cu_seqlens
    if offsets is None:
        offsets = torch.arange(sequences + 1, dtype=torch.int64, device=logp.device) * logp.shape[-1]
    elif offsets.device.type == "cpu":  # on a GPU, looking at them would wait for it
        check_offsets(offsets, logp.numel())
    # Held in names until the call is over: an address does not keep its tensor alive.
    rows, row_labels, references = logp.contiguous(), labels.contiguous(), ref_logp.double().contiguous()
    offsets, old_state = offsets.to(torch.int64).contiguous(), state.contiguous()
    if backend == "triton":
        kernels = _kernels()
        with _device_guard(logp):
            kernels.pair_loss(
                rows, row_labels, offsets, references, old_state,
                (beta, dpo_weight, bco_weight, ntp_weight, label_smoothing, decay),
                rule, update_first, average_sequences, ignore_index, kernels.PairLossOutputs(*outputs),
            )  # fmt: skip
        return outputs
    _native().pair_loss_cpu(
        logp=rows.data_ptr(),
        labels=row_labels.data_ptr(),
        offsets=offsets.data_ptr(),
        ref_logp=references.data_ptr(),
        state=old_state.data_ptr(),
        loss=loss.data_ptr(),
        terms=terms.data_ptr(),
        reward_shift=reward_shift.data_ptr(),
        sums=sums.data_ptr(),
        reward=reward.data_ptr(),
        tokens=tokens.data_ptr(),
        new_state=new_state.data_ptr(),
        batch=batch.data_ptr(),
        weight=weight.data_ptr(),
        pairs=sequences // 2,
        rows=rows.numel(),
        ignore_index=ignore_index,
        rule=rule,
        update_first=update_first,
        decay=decay,
        beta=beta,
        dpo_weight=dpo_weight,
        bco_weight=bco_weight,
        ntp_weight=ntp_weight,
        label_smoothing=label_smoothing,
        average_sequences=average_sequences,
        is_double=logp.dtype == torch.float64,
    )
    return outputs


@pair_loss.register_fake
def _(
    logp: Tensor,
    labels: Tensor,
    ref_logp: Tensor,
    state: Tensor,
    rule: int,
    update_first: bool,
    decay: float,
    cu_seqlens: Tensor | None,
    beta: float,
    dpo_weight: float,
    bco_weight: float,
    ntp_weight: float,
    label_smoothing: float,
    average_sequences: bool,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _pair_loss_outputs(logp, ref_logp, state)


def _pair_loss_outputs(
    logp: Tensor, ref_logp: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences = ref_logp.shape[0]
    return (
        logp.new_empty(()),
        logp.new_empty(3),
        logp.new_empty(()),
        logp.new_empty(sequences),
        logp.new_empty(sequences),
        logp.new_empty(sequences, dtype=torch.int64),
        state.new_empty(2),
        state.new_empty(2),
        logp.new_empty(logp.shape),
    )


@torch.library.custom_op("mpo_ext::forward", mutates_args=())
def forward(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor,
    state: Tensor,
    rule: int,
    update_first: bool,
    decay: float,
    cu_seqlens: Tensor | None,
    beta: float,
    dpo_weight: float,
    bco_weight: float,
    ntp_weight: float,
    label_smoothing: float,
    average_sequences: bool,
    ignore_index: int,
    stats: int,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """``token_logp`` and ``pair_loss`` one after the other; with backend "cuda" in one launch, with the same bits.

    For where nothing has to be pooled over ranks in between. Args as of the two.

    Returns:
        The four outputs of ``token_logp``, then the nine of ``pair_loss``.
    """
    if backend != "cuda" or labels.numel() == 0:
        rows = token_logp(logits, labels, ignore_index, stats, backend)
        pair = pair_loss(
            rows[0], labels, ref_logp, state, rule, update_first, decay, cu_seqlens, beta, dpo_weight, bco_weight,
            ntp_weight, label_smoothing, average_sequences, ignore_index, backend,
        )  # fmt: skip
        return (*rows, *pair)
    check_logits("logits", logits)
    check_labels(logits, labels)
    rows = token_logp_outputs(logits, labels, stats)
    outputs = _pair_loss_outputs(rows[0], ref_logp, state)
    layout, row_labels = _row_layout(logits), labels.contiguous()
    with _device_guard(logits):
        row_arguments, _kept = _cuda_forward_arguments(layout, row_labels, ignore_index, ref_logp.shape[0] // 2)
        pair_arguments, _kept_too = _cuda_pair_arguments(
            outputs, ref_logp, state, rule, update_first, decay, cu_seqlens, beta, dpo_weight, bco_weight, ntp_weight,
            label_smoothing, average_sequences,
        )  # fmt: skip
        _native().forward_cuda(
            **row_arguments,
            **pair_arguments,
            **_addresses(**dict(zip(_ROW_OUTPUTS, rows, strict=True)), row_state=None),
            stats=stats,
        )
    return (*rows, *outputs)


@forward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor,
    state: Tensor,
    rule: int,
    update_first: bool,
    decay: float,
    cu_seqlens: Tensor | None,
    beta: float,
    dpo_weight: float,
    bco_weight: float,
    ntp_weight: float,
    label_smoothing: float,
    average_sequences: bool,
    ignore_index: int,
    stats: int,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    rows = token_logp_outputs(logits, labels, stats)
    return (*rows, *_pair_loss_outputs(rows[0], ref_logp, state))


@torch.library.custom_op("mpo_ext::logits_grad", mutates_args=())
def logits_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The gradient ``scale * weight * (onehot(label) - softmax(logits))``; 0 in rows that are ignored.

    Reads each logit of a labelled row once and writes once; rows of zeros are pages that the system hands out zeroed
    and that nobody touches.

    Args:
        logits: ``[..., V]`` as given to ``token_logp``.
        labels: ``[...]`` int64.
        row_max: ``[...]`` from ``token_logp``.
        row_sum: ``[...]`` from ``token_logp``.
        weight: ``[...]`` d loss / d logp.
        scale: 0-d factor on all of it, or None for 1.
        ignore_index: Label of the rows without a gradient.
        backend: What ``choose_backend`` returned, but for "reference".

    Returns:
        ``[..., V]`` in the logits' dtype, contiguous.
    """
    _check_grad(logits, labels, row_max, row_sum, weight)
    is_zeroed = backend == "cpu"
    grad = fresh_zeros(logits.shape, logits.dtype) if is_zeroed else logits.new_empty(logits.shape)
    write_grad(logits, labels, row_max, row_sum, weight, scale, ignore_index, backend, grad, is_zeroed=is_zeroed)
    return grad


@logits_grad.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("mpo_ext::logits_grad_", mutates_args=("logits",))
def logits_grad_(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    backend: str,
) -> None:
    """Turns the logits into their gradient, in place. Arguments as in ``logits_grad``; see ``check_reuse``."""
    _check_grad(logits, labels, row_max, row_sum, weight)
    check_reuse(logits)
    if _row_layout(logits).tensor is not logits:
        raise ValueError(f"logits must have rows that two strides describe, got strides {tuple(logits.stride())}")
    write_grad(logits, labels, row_max, row_sum, weight, scale, ignore_index, backend, logits)


def _check_grad(logits: Tensor, labels: Tensor, row_max: Tensor, row_sum: Tensor, weight: Tensor) -> None:
    check_logits("logits", logits)
    check_labels(logits, labels)
    dtype = _result_dtype(logits)
    for name, tensor in (("row_max", row_max), ("row_sum", row_sum), ("weight", weight)):
        if tensor.shape != labels.shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} of the shape of labels, {_shape(labels)}, got {tensor.dtype} of shape "
                f"{_shape(tensor)}"
            )


def write_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    backend: str,
    grad: Tensor,
    *,
    is_zeroed: bool = False,
    tile: Tile | None = None,
) -> None:
    """Fills the gradient of ``logits_grad``, of a tile where these are not all columns.

    Args:
        logits: As of ``logits_grad``, and so the next six.
        labels: See ``logits``.
        row_max: See ``logits``.
        row_sum: See ``logits``.
        weight: See ``logits``.
        scale: See ``logits``.
        ignore_index: See ``logits``.
        backend: What ``choose_backend`` returned, but for "reference".
        grad: Like the logits; may be the logits.
        is_zeroed: The gradient holds zeros already, which spares writing those of ignored rows.
        tile: Where these columns lie, if they are not all.
    """
    if labels.numel() == 0:
        return
    # Held in names until the call is over: an address does not keep its tensor alive.
    rows = [tensor.contiguous() for tensor in (row_max, row_sum, weight)]
    layout, row_labels, out = _row_layout(logits), labels.contiguous(), _row_layout(grad)
    if backend == "triton":
        with _device_guard(logits):
            _kernels().logits_grad(layout, row_labels, logits.shape[-1], ignore_index, *rows, scale, out, tile)
        return
    if backend == "cuda":
        if scale is not None and scale.dtype not in (torch.float32, torch.float64):
            scale = scale.double()
        with _device_guard(logits):
            _native().logits_grad_cuda(
                **_row_arguments(layout, row_labels, ignore_index, tile),
                **_addresses(row_max=rows[0], row_sum=rows[1], weight=rows[2], scale=scale, grad=out.tensor),
                grad_inner=out.inner,
                grad_outer_stride=out.outer_stride,
                grad_row_stride=out.row_stride,
                is_zeroed=is_zeroed,
                scale_is_float=scale is not None and scale.dtype == torch.float32,
                multiprocessors=_multiprocessors(logits.device),
                stream=_current_stream(logits),
            )
        return
    factor = None if scale is None else scale.to(torch.float64)
    _native().logits_grad_cpu(
        **_row_arguments(layout, row_labels, ignore_index, tile),
        row_max=rows[0].data_ptr(),
        row_sum=rows[1].data_ptr(),
        weight=rows[2].data_ptr(),
        scale=0 if factor is None else factor.data_ptr(),
        grad=out.tensor.data_ptr(),
        grad_inner=out.inner,
        grad_outer_stride=out.outer_stride,
        grad_row_stride=out.row_stride,
        is_zeroed=is_zeroed,
        threads=torch.get_num_threads(),
        isa=cpu_isa(),
    )


# --------------------------------------------------------------------------------------------------------------- CUDA


def _cuda_forward_arguments(
    layout: RowLayout, labels: Tensor, ignore_index: int, pairs: int, tile: Tile | None = None
) -> tuple[dict[str, object], list[Tensor]]:
    """The inputs of token_logp and forward, and the memory they work in, which the caller holds until the launch."""
    rows = _row_arguments(layout, labels, ignore_index, tile)
    size = {"multiprocessors": _multiprocessors(labels.device)}
    shape = _native().cuda_forward_shape(
        rows=rows["rows"], vocab=rows["vocab"], dtype=rows["dtype"], pairs=pairs, **size
    )
    scratch = torch.empty(shape["scratch_bytes"], dtype=torch.uint8, device=labels.device)
    counters = _counters(shape["counters"], labels)
    rows |= {**_addresses(scratch=scratch, counters=counters), **size, "stream": _current_stream(labels)}
    return rows, [scratch, counters]


def _cuda_pair_arguments(
    outputs: tuple[Tensor, ...],
    ref_logp: Tensor,
    state: Tensor,
    rule: int,
    update_first: bool,
    decay: float,
    cu_seqlens: Tensor | None,
    beta: float,
    dpo_weight: float,
    bco_weight: float,
    ntp_weight: float,
    label_smoothing: float,
    average_sequences: bool,
) -> tuple[dict[str, object], list[Tensor | None]]:
    """What pair_loss and forward take beyond rows, and the tensors behind it, which the caller holds until the launch.

    ref_logp and cu_seqlens go in with the type they have: converting them would be launches of their own.
    """
    names = ("loss", "terms", "reward_shift", "sums", "reward", "tokens", "new_state", "batch", "weight")
    kept = [ref_logp.contiguous(), state.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous()]
    arguments: dict[str, object] = {
        **_addresses(**dict(zip(names, outputs, strict=True))),
        **_addresses(ref_logp=kept[0], state=kept[1], offsets=kept[2]),
        "pairs": ref_logp.shape[0] // 2,
        "ref_is_float": ref_logp.dtype == torch.float32,
        "offsets_are_int32": cu_seqlens is not None and cu_seqlens.dtype == torch.int32,
        "rule": rule,
        "update_first": update_first,
        "decay": decay,
        "beta": beta,
        "dpo_weight": dpo_weight,
        "bco_weight": bco_weight,
        "ntp_weight": ntp_weight,
        "label_smoothing": label_smoothing,
        "average_sequences": average_sequences,
    }
    return arguments, kept


def _addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _current_stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


_stream_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counters(count: int, like: Tensor) -> Tensor:
    """Zeros in which a kernel counts its blocks; it leaves zeros behind, so one tensor serves a stream for good.

    A launch that is being captured into a CUDA graph gets zeros of its own, zeroed at each replay: a graph may be
    replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.device, _current_stream(like))
    counters = _stream_counters.get(key)
    if counters is None or counters.numel() < count:
        counters = _stream_counters[key] = torch.zeros(count, dtype=torch.int32, device=like.device)
    return counters


# ------------------------------------------------------------------------------------------------------------- helpers


def cpu_isa() -> str:
    """Returns the instruction set of the CPU kernels: the best that runs here, or what MPO_CPU_ISA names.

    Raises:
        ValueError: If MPO_CPU_ISA names none that can run here.
    """
    runnable = _native().cpu_isas()
    wanted = os.environ.get("MPO_CPU_ISA")
    if wanted and wanted not in runnable:
        raise ValueError(f"MPO_CPU_ISA must be one of {', '.join(runnable)} on this machine, got {wanted!r}")
    return wanted or runnable[0]


def _kernels() -> Any:
    # Imported late, since triton is optional.
    from mpo_ext import kernels

    return kernels


def _device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, to which launches go."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def _native() -> Any:
    # Where it is used, so that the package imports without its compiled part.
    from mpo_ext.ops.native import _C

    return _C


with suppress(ImportError):
    _native()  # now already: it has to know of every fork from here on


def _result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def fresh_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, contiguous. Large ones are fresh pages of the system, untouched and huge.

    On a CPU the page faults of a fresh gradient cost more than computing it. numpy's calloc gets zeroed pages that are
    not touched until written, and asks for huge ones; torch.zeros writes them all.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _FRESH_PAGES_BYTES:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(dtype).view(shape)


class RowLayout(NamedTuple):
    """Rows in memory: row i starts at ``(i // inner) * outer_stride + (i % inner) * row_stride`` elements."""

    tensor: Tensor
    inner: int
    outer_stride: int
    row_stride: int


def _row_layout(tensor: Tensor) -> RowLayout:
    """Describes the rows of ``[..., V]``; copies them if V is not contiguous or two strides do not suffice."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    axes: list[
        tuple[int, int]
    ] = []  # (size, stride) of the leading axes from the right, merged where strides allow it
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return _row_layout(tensor.contiguous())
    inner, row_stride = axes[0] if axes else (1, 0)
    return RowLayout(tensor, inner, axes[1][1] if len(axes) == 2 else 0, row_stride)


def _row_arguments(
    layout: RowLayout, labels: Tensor, ignore_index: int, tile: Tile | None = None
) -> dict[str, object]:
    """The arguments that token_logp and logits_grad share. The caller holds both tensors until the call is over."""
    return {
        "logits": layout.tensor.data_ptr(),
        "labels": labels.data_ptr(),
        "rows": labels.numel(),
        "inner": layout.inner,
        "outer_stride": layout.outer_stride,
        "row_stride": layout.row_stride,
        "vocab": layout.tensor.shape[-1],
        "first": 0 if tile is None else tile.first,
        "total": layout.tensor.shape[-1] if tile is None else tile.total,
        "ignore_index": ignore_index,
        "dtype": str(layout.tensor.dtype).removeprefix("torch."),
    }
