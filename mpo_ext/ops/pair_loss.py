"""The operators ``pair_loss`` and ``forward``. ``forward`` also computes the log-probs of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpo_ext.ops import backends, cuda, native
from mpo_ext.ops.checks import check_kernel, check_labels, check_logits, check_pair_inputs, check_pair_rows
from mpo_ext.ops.logits import ROW_OUTPUTS, token_logp, token_logp_outputs
from mpo_ext.ops.memory import addresses, device_guard, row_layout

#: Rules by which a batch updates the state of the reward shift (csrc/mpo/api.h: ShiftRule).
HOLD, CUMULATIVE, EMA = 0, 1, 2
_OUTPUTS = ("loss", "terms", "reward_shift", "sums", "reward", "tokens", "new_state", "batch", "weight")


class PairLossSettings(NamedTuple):
    """Settings of the pair loss. ``numbers`` converts them to a list, because operators cannot take a NamedTuple."""

    beta: float  # temperature of the reward beta * (logp - ref_logp)
    dpo_weight: float
    bco_weight: float
    ntp_weight: float
    label_smoothing: float  # fraction of pairs assumed to be labelled in reverse
    average_sequences: bool  # whether NTP averages the means of the responses instead of all tokens
    rule: int = HOLD  # rule by which this batch updates the reward shift: HOLD, CUMULATIVE or EMA
    update_first: bool = False  # whether the reward shift in use already includes this batch
    decay: float = 0.0  # fraction of the old value that EMA keeps

    def numbers(self) -> list[float]:
        """Returns the settings as a list of numbers. The operators take this list as the argument ``settings``."""
        return [float(value) for value in self]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> PairLossSettings:
        """Returns the settings from the list that the method ``numbers`` returned."""
        beta, dpo, bco, ntp, smoothing, average_sequences, rule, update_first, decay = numbers
        return cls(beta, dpo, bco, ntp, smoothing, bool(average_sequences), int(rule), bool(update_first), decay)


@torch.library.custom_op("mpo_ext::pair_loss", mutates_args=())
def pair_loss(
    logp: Tensor,  # [2B, T], or [1, N] with cu_seqlens: the log-probability of each label
    labels: Tensor,  # like logp, int64
    ref_logp: Tensor,  # [2B] summed log-probs under the reference model
    state: Tensor,  # [2] float64: the reward shift, and the number of its updates
    cu_seqlens: Tensor | None,  # [2B + 1]; None: padded input
    settings: Sequence[float],  # PairLossSettings.numbers()
    ignore_index: int,  # label of rows that are not scored
    backend: str,  # a result of choose_backend other than "reference"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss of B pairs and eight other tensors.

    The first eight of the nine tensors are the fields of ``mpo_ext.loss.eager.PairLoss``. The last tensor is the
    gradient of the loss with respect to ``logp``.
    """
    check_kernel(backend, logp, "logp")
    is_double = logp.dtype == torch.float64 and backend == "cpu"
    check_pair_rows(logp, labels, torch.float64 if is_double else torch.float32)
    check_pair_inputs(labels, ref_logp, state, cu_seqlens, settings)
    outputs = _pair_loss_outputs(logp, ref_logp, state)
    # Held in variables until the call returns: an address does not keep its tensor alive.
    rows, row_labels = logp.contiguous(), labels.contiguous()
    if backend == "cuda":
        shape = native.compiled().cuda_pair_loss_shape(pairs=ref_logp.shape[0] // 2)
        with device_guard(logp):
            scratch = torch.empty(shape["scratch_bytes"], dtype=torch.uint8, device=logp.device)
            arguments, _inputs = _cuda_arguments(outputs, ref_logp, state, cu_seqlens, settings)
            native.compiled().pair_loss_cuda(
                **arguments,
                **addresses(logp=rows, labels=row_labels, scratch=scratch),
                rows=rows.numel(),
                ignore_index=ignore_index,
                stream=cuda.current_stream(logp),
            )
        return outputs
    offsets = cu_seqlens
    if offsets is None:
        offsets = torch.arange(ref_logp.shape[0] + 1, dtype=torch.int64, device=logp.device) * logp.shape[-1]
    offsets, references = offsets.to(torch.int64).contiguous(), ref_logp.double().contiguous()
    old_state, values = state.contiguous(), PairLossSettings.from_numbers(settings)
    if backend == "triton":
        kernels = backends.triton_kernels()
        with device_guard(logp):
            kernels.pair_loss(
                rows, row_labels, offsets, references, old_state, (*values[:5], values.decay), values.rule,
                values.update_first, values.average_sequences, ignore_index, kernels.PairLossOutputs(*outputs),
                check_offsets=cu_seqlens is not None and cu_seqlens.device.type != "cpu",
            )  # fmt: skip
        return outputs
    native.compiled().pair_loss_cpu(
        **addresses(logp=rows, labels=row_labels, offsets=offsets, ref_logp=references, state=old_state),
        **addresses(**dict(zip(_OUTPUTS, outputs, strict=True))),
        **values._asdict(),
        pairs=ref_logp.shape[0] // 2,
        rows=rows.numel(),
        ignore_index=ignore_index,
        is_double=is_double,
    )
    return outputs


@pair_loss.register_fake
def _(logp: Tensor, labels: Tensor, ref_logp: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, ...]:
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
    cu_seqlens: Tensor | None,
    settings: Sequence[float],
    ignore_index: int,
    stats: int,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Returns the four outputs of ``token_logp``, then the nine outputs of ``pair_loss``.

    The arguments are those of the two operators. The backend "cuda" runs both operators in one launch. The results are
    bitwise equal to the results of two launches.
    """
    if backend != "cuda" or labels.numel() == 0:
        rows = token_logp(logits, labels, ignore_index, stats, backend)
        pair = pair_loss(rows[0], labels, ref_logp, state, cu_seqlens, settings, ignore_index, backend)
        return (*rows, *pair)
    check_logits("logits", logits)
    check_labels(logits, labels)
    check_pair_inputs(labels, ref_logp, state, cu_seqlens, settings)
    rows = token_logp_outputs(logits, labels, stats)
    outputs = _pair_loss_outputs(rows[0], ref_logp, state)
    layout, row_labels = row_layout(logits), labels.contiguous()
    with device_guard(logits):
        row_arguments, _work_memory = cuda.forward_arguments(layout, row_labels, ignore_index, ref_logp.shape[0] // 2)
        pair_arguments, _inputs = _cuda_arguments(outputs, ref_logp, state, cu_seqlens, settings)
        native.compiled().forward_cuda(
            **row_arguments,
            **pair_arguments,
            **addresses(**dict(zip(ROW_OUTPUTS, rows, strict=True)), row_state=None),
            stats=stats,
        )
    return (*rows, *outputs)


@forward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    settings: Sequence[float],
    ignore_index: int,
    stats: int,
    *_: Any,
) -> tuple[Tensor, ...]:
    rows = token_logp_outputs(logits, labels, stats)
    return (*rows, *_pair_loss_outputs(rows[0], ref_logp, state))


def _cuda_arguments(
    outputs: tuple[Tensor, ...], ref_logp: Tensor, state: Tensor, cu_seqlens: Tensor | None, settings: Sequence[float]
) -> tuple[dict[str, object], list[Tensor | None]]:
    """Returns arguments of ``pair_loss_cuda`` and ``forward_cuda``, and the input tensors.

    The arguments hold addresses of the input tensors. So the caller must keep these tensors alive until the launch.
    ``ref_logp`` and ``cu_seqlens`` keep their dtypes.
    """
    inputs = [ref_logp.contiguous(), state.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous()]
    arguments: dict[str, object] = {
        **addresses(**dict(zip(_OUTPUTS, outputs, strict=True))),
        **addresses(ref_logp=inputs[0], state=inputs[1], offsets=inputs[2]),
        **PairLossSettings.from_numbers(settings)._asdict(),
        "pairs": ref_logp.shape[0] // 2,
        "ref_is_float": ref_logp.dtype == torch.float32,
        "offsets_are_int32": cu_seqlens is not None and cu_seqlens.dtype == torch.int32,
    }
    return arguments, inputs
