"""Checks of the tensors and numbers that are passed to the loss functions and operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mpo_ext.checks import check_integer, check_number

#: Statistics of a row of logits. Bit i of an operator's argument ``stats`` requests ``STATS[i]`` (csrc/mpo/api.h:
#: RowStats).
STATS = ("entropy", "mean_logit", "top1", "sum_p_squared")
#: Number of values in ``ops.pair_loss.PairLossSettings``.
N_SETTINGS = 9
#: Backends that run kernels.
KERNELS = ("cpu", "cuda", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(name: str, logits: Tensor, axis: str = "vocabulary") -> None:
    """Checks that a tensor of logits or hidden states has a supported dtype and a last axis that is not empty.

    Error messages call the tensor ``name`` and its last axis ``axis``. Raises TypeError or ValueError.
    """
    _check_float_tensor(name, logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have a {axis} axis of at least 1 at the end, got shape {_shape(logits)}")


def check_labels(logits: Tensor, labels: Tensor, name: str = "logits", *, may_be_on_cpu: bool = False) -> None:
    """Raises unless ``labels`` is int64, has the shape ``logits.shape[:-1]``, and is on the device of the logits.

    With ``may_be_on_cpu``, labels on the CPU are also allowed. ``name`` is the name of the logits in error messages.
    """
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


def check_pairs(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, name: str = "logits", *, is_part: bool = False
) -> int:
    """Raises unless ``logits`` and ``labels`` hold B pairs, padded or packed. Returns 2B, the number of sequences.

    If ``name`` is "hidden", ``logits`` are hidden states, and labels may be on the CPU. If ``is_part`` is True, each
    sequence is split over several ranks. A packed sequence may then have no token on this rank.
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
    _check_cu_seqlens(cu_seqlens, logits, name, is_part)
    return cu_seqlens.shape[0] - 1


def _check_cu_seqlens(cu_seqlens: Tensor, logits: Tensor, name: str, is_part: bool) -> None:
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
    # Reading offsets from a GPU would make the host wait. If they are bad, pair_loss returns NaN instead.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offsets(cu_seqlens, logits.shape[0], is_part=is_part)


def check_offsets(cu_seqlens: Tensor, rows: int, *, is_part: bool = False) -> None:
    """Raises unless the offsets of packed sequences increase from 0 to ``rows``, the number of tokens.

    With ``is_part``, sequences are split over ranks. Neighbouring offsets may then be equal.
    """
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
    for before, after in itertools.pairwise(offsets):
        if after < before or (after == before and not is_part):
            rule = "not decrease" if is_part else "increase at every step"
            raise ValueError(f"cu_seqlens must {rule}, got {before} followed by {after}")
    if offsets[-1] != rows:
        raise ValueError(f"cu_seqlens must end at N, the number of rows, {rows}, got {offsets[-1]}")


def check_reference(
    logits: Tensor, sequences: int, ref_logp: Tensor | None, ref_logits: Tensor | None, name: str = "logits"
) -> None:
    """Raises unless exactly one valid reference is given: ``ref_logp`` (summed log-probs) or ``ref_logits``.

    ``sequences`` is the number of sequences, 2B. With ``name`` "hidden", ``logits`` and ``ref_logits`` are hidden
    states. Their hidden sizes may differ.
    """
    ref_name = f"ref_{name}"
    if (ref_logp is None) == (ref_logits is None):
        got = "neither" if ref_logp is None else "both"
        raise ValueError(f"exactly one of ref_logp and {ref_name} must be given, got {got}")
    if ref_logits is not None:
        check_logits(ref_name, ref_logits, "feature" if name == "hidden" else "vocabulary")
        if ref_logits.shape[:-1] != logits.shape[:-1] or (name == "logits" and ref_logits.shape != logits.shape):
            exception = " except for the last axis" if name == "hidden" else ""
            raise ValueError(
                f"{ref_name} must have the shape of {name}{exception}, {_shape(logits)}, got {_shape(ref_logits)}"
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


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """Raises unless the weight and bias of the head fit the hidden states.

    Error messages put ``prefix`` before the argument names.
    """
    tensors = {f"{prefix}weight": weight} if bias is None else {f"{prefix}weight": weight, f"{prefix}bias": bias}
    for name, tensor in tensors.items():
        _check_float_tensor(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of {prefix}hidden, {hidden.device}, got {tensor.device}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must be [V, D] with D that of {prefix}hidden, {hidden.shape[-1]}, got shape "
            f"{_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [V] = [{weight.shape[0]}], got shape {_shape(bias)}")


def check_head_options(
    logit_scale: float, softcap: float | None, temperature: float, memory_budget: int | None, recompute: bool | None
) -> None:
    """Raises unless the settings of the head, the memory budget and ``recompute`` are valid."""
    check_number("logit_scale", logit_scale)
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    if softcap is not None:
        check_number("softcap", softcap, "(0, inf)")
    check_number("temperature", temperature, "(0, inf)")
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool or None, got {recompute!r}")
    if memory_budget is not None:
        check_integer("memory_budget", memory_budget, least=1)


def check_stats(stats: Sequence[str]) -> tuple[str, ...]:
    """Returns the requested statistics in the order of ``STATS``, without repetitions.

    Raises:
        TypeError: If ``stats`` is not a sequence of names.
        ValueError: If a name is unknown.
    """
    if isinstance(stats, str):
        raise TypeError(f"stats must be a sequence of names, got the single string {stats!r}")
    if not isinstance(stats, Collection):
        raise TypeError(f"stats must be a sequence of names out of {', '.join(map(repr, STATS))}, got {stats!r}")
    for name in stats:
        if name not in STATS:
            raise ValueError(f"stats must be names out of {', '.join(map(repr, STATS))}, got {name!r}")
    return tuple(name for name in STATS if name in stats)


def check_reuse(logits: Tensor) -> None:
    """Raises unless the gradient can overwrite the logits.

    The vocabulary axis must be contiguous, and the logits of two tokens must not overlap in memory.
    """
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


def check_row_values(logits: Tensor, labels: Tensor, dtype: torch.dtype, **values: Tensor) -> None:
    """Checks that ``labels`` fit ``logits``, and that each of the tensors ``values`` fits ``labels``.

    A tensor in ``values`` must have the shape of ``labels``, the dtype ``dtype``, and the device of ``logits``.
    """
    check_logits("logits", logits)
    check_labels(logits, labels)
    check_rows(labels, dtype, logits.device, **values)


def check_rows(labels: Tensor, dtype: torch.dtype, device: torch.device, **values: Tensor) -> None:
    """Raises unless each tensor in ``values`` has the shape of ``labels``, and the given dtype and device."""
    for name, tensor in values.items():
        if tensor.shape != labels.shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must be {dtype} of the shape of labels, {_shape(labels)}, on {device}, got {tensor.dtype} of "
                f"shape {_shape(tensor)} on {tensor.device}"
            )


def check_kernel(backend: str, tensor: Tensor, name: str = "logits") -> None:
    """Checks that ``backend`` is in ``KERNELS``. With the backend "cpu", ``tensor`` must be on the CPU.

    ``name`` is the name of the tensor in error messages.
    """
    if backend not in KERNELS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, KERNELS))}, got {backend!r}")
    if backend == "cpu" and tensor.device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' needs {name} on the CPU, got {name} on {tensor.device}")


def check_pair_rows(rows: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    """Raises unless ``rows``, the log-probs, have the dtype ``dtype`` and the shape of the labels."""
    if rows.dtype != dtype:
        raise TypeError(f"logp must be {dtype}, got {rows.dtype}")
    check_labels(rows.unsqueeze(-1), labels, "logp")


def check_pair_inputs(
    labels: Tensor, ref_logp: Tensor, state: Tensor, cu_seqlens: Tensor | None, settings: Sequence[float]
) -> None:
    """Raises unless these arguments of the operator ``pair_loss`` are valid and fit each other."""
    if ref_logp.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"ref_logp must be torch.float32 or torch.float64, got {ref_logp.dtype}")
    sequences = ref_logp.shape[0] if ref_logp.ndim == 1 else 0
    if sequences == 0 or sequences % 2:
        raise ValueError(f"ref_logp must be [2B], B at least 1, got shape {_shape(ref_logp)}")
    if state.dtype != torch.float64 or state.shape != (2,):
        raise ValueError(f"state must be torch.float64 of shape (2,), got {state.dtype} of shape {_shape(state)}")
    if len(settings) != N_SETTINGS:
        raise ValueError(f"settings must be {N_SETTINGS} numbers, got {len(settings)}")
    if cu_seqlens is None:
        if labels.ndim != 2 or labels.shape[0] != sequences:
            raise ValueError(f"labels must be [2B, T] with 2B = {sequences}, got shape {_shape(labels)}")
    else:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be torch.int32 or torch.int64, got {cu_seqlens.dtype}")
        if cu_seqlens.shape != (sequences + 1,):
            raise ValueError(f"cu_seqlens must be [2B + 1] = [{sequences + 1}], got shape {_shape(cu_seqlens)}")
        if cu_seqlens.device.type == "cpu":
            check_offsets(cu_seqlens, labels.numel())
    for name, tensor in (("ref_logp", ref_logp), ("state", state), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.device != labels.device:
            raise ValueError(f"{name} must be on the device of labels, {labels.device}, got {tensor.device}")


def check_scale(scale: Tensor | None, logits: Tensor) -> None:
    """Raises unless ``scale`` is None or a 0-d floating-point tensor on the device of the logits."""
    if scale is not None and (scale.ndim != 0 or not scale.is_floating_point() or scale.device != logits.device):
        raise ValueError(
            f"scale must be a 0-d floating-point tensor on {logits.device}, got {scale.dtype} of shape "
            f"{_shape(scale)} on {scale.device}"
        )


def _check_float_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
