"""Process groups whose ranks compute a loss together.

All ranks of a group raise the same error. They exchange only a few numbers for each token position and sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mpo_ext.loss.autograd import OnceDifferentiable
from mpo_ext.ops.logits import RowOutputs, merge_shards
from mpo_ext.ops.memory import ROW_STATE, VocabShard

_Checked = TypeVar("_Checked")
_ERRORS = (TypeError, ValueError, RuntimeError)  # types of errors that ranks send; others are sent as RuntimeError
_MESSAGE_BYTES = 2000


class RankFacts(NamedTuple):
    """Numbers that describe the inputs of a rank. The ranks compare them before the loss is computed.

    The ranks of ``vocab_parallel`` must agree on all numbers except ``columns`` and ``ref_columns``. The ranks of
    ``sequence_parallel`` must agree only on ``sequences`` and ``settings``.
    """

    columns: int = 0  # number of vocabulary columns that this rank's logits or head have
    ref_columns: int = 0  # the same for the logits or head of the reference model; 0 without them
    sequences: int = 0  # number of sequences, 2B
    settings: int = 0  # a checksum of the options of the loss
    rows: int = 0  # number of positions
    labelled: int = 0  # number of labelled positions, if the host knows it
    requires_grad: int = 0  # whether backward sums the gradient of the hidden states over the ranks


_RULES = {
    "sequences": "the batch must have the same number of sequences",
    "settings": "config, stats, dtypes and the other options must be the same",
    "rows": "labels must have the same number of positions",
    "labelled": "labels must be the same, and have the same number of labelled positions",
    "requires_grad": "hidden must require a gradient either on all ranks or on none, and so",
}


class RankGroups:
    """The process groups ``vocab_parallel`` and ``sequence_parallel`` of a call, and the exchanges among their ranks.

    All methods are collective operations: all ranks of both groups must call them in the same order.

    Raises:
        TypeError: If an argument is neither a process group nor None.
        ValueError: If this process is not a member of a group.
    """

    def __init__(self, vocab_parallel: Any, sequence_parallel: Any) -> None:
        self.vocab = _checked_group("vocab_parallel", vocab_parallel)
        self.sequence = _checked_group("sequence_parallel", sequence_parallel)

    @property
    def is_first(self) -> bool:
        """Returns whether this process has rank 0 in each group."""
        return all(dist.get_rank(group) == 0 for _, group in self._named())

    def agree(
        self, check: Callable[[], _Checked], facts: Callable[[_Checked], RankFacts]
    ) -> tuple[_Checked, VocabShard | None, VocabShard | None]:
        """Checks the arguments of a call on all ranks.

        All ranks raise if the check fails on one rank, or if the ranks' inputs do not fit together. The ranks exchange
        CPU tensors. If a process group has no CPU backend (only NCCL), they exchange GPU tensors and the host waits.

        Args:
            check: Function that checks this rank's arguments and returns a result.
            facts: Function that takes the result of ``check``. It returns the numbers that the ranks compare.

        Returns:
            (result, shard, reference shard): the result of ``check``, this rank's shard of the model's vocabulary, and
            this rank's shard of the reference model's vocabulary. Both shards are None without ``vocab_parallel``.
        """
        error: Exception | None = None
        checked, mine = None, RankFacts()
        try:
            checked = check()
            mine = facts(checked)
        except Exception as caught:
            error = caught
        shards: list[VocabShard | None] = [None, None]
        for name, group in self._named():
            facts_of_ranks, remote = _exchange(name, group, mine, error)
            error = error or remote or _difference(name, facts_of_ranks)
            if name == "vocab_parallel" and error is None:
                rank = dist.get_rank(group)
                for position in range(2):
                    columns = [numbers[position] for numbers in facts_of_ranks]
                    shards[position] = VocabShard(sum(columns[:rank]), sum(columns))
        if error is not None:
            raise error
        return checked, *shards  # type: ignore[return-value]

    def merged_rows(
        self,
        state: Tensor,
        labels: Tensor,
        same: Mapping[str, Tensor],
        ignore_index: int,
        stats: int,
        shard: VocabShard,
        dtype: torch.dtype,
    ) -> RowOutputs:
        """Merges the softmax states of all ranks. Returns the outputs of ``token_logp`` for the whole vocabulary.

        ``state``, ``[..., ROW_STATE]``, holds the softmax states over this rank's shard (``eager.shard_state``). The
        output ``logp`` is differentiable with respect to ``state``.

        The labels and the tensors in ``same`` must be equal on all ranks of ``vocab_parallel``. Otherwise, ``logp`` is
        NaN. On a CPU without sequence parallelism, the method raises ValueError instead.
        """
        assert self.vocab is not None
        parts = list(range(ROW_STATE)) if stats else [0, 1, ROW_STATE - 1]
        rows = state[..., parts].reshape(labels.numel(), len(parts))
        of_rows, poison = self._gathered("vocab_parallel", rows, {"labels": labels, **same})
        of_rows = _with_own(of_rows, rows, dist.get_rank(self.vocab)) + poison
        states = of_rows.new_zeros(*of_rows.shape[:2], ROW_STATE)
        states = states.index_copy(2, torch.tensor(parts, device=states.device), of_rows)
        states = states.view(states.shape[0], *labels.shape, ROW_STATE)
        return merge_shards(states, labels, ignore_index, stats, shard.total, dtype)

    def sequence_totals(self, sums: Tensor, others: Tensor, same: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns ``sums`` and ``others``, each summed over the ranks of ``sequence_parallel``.

        ``sums`` is ``[n]`` and ``others`` is ``[m]``; both are float64. The first result is differentiable with
        respect to ``sums``.

        The tensors in ``same`` must be equal on all these ranks. If they differ and no error is raised, the first
        result is NaN.

        Raises:
            ValueError: If tensors in ``same`` differ, ``sums`` is on a CPU, and there is no vocabulary parallelism.
        """
        assert self.sequence is not None
        gathered, poison = self._gathered("sequence_parallel", torch.cat([sums, others]), same)
        of_sums, of_others = gathered.split([len(sums), len(others)], 1)
        return _with_own(of_sums, sums, dist.get_rank(self.sequence)).sum(0) + poison, of_others.sum(0)

    def _gathered(self, name: str, values: Tensor, same: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gathers the float64 ``values`` of all ranks of the group ``name``. Compares the tensors in ``same``.

        Returns:
            The values, ``[ranks, ...]``, and a 0-d tensor that the caller adds to its results. The 0-d tensor is 0 if
            the tensors in ``same`` are equal on all ranks. Otherwise, it is NaN.

        Raises:
            ValueError: If the tensors in ``same`` differ, the values are on a CPU, and the call has only one group.
        """
        group = dict(self._named())[name]
        parts = [values.detach(), *(tensor.detach().to(values.device, torch.float64) for tensor in same.values())]
        gathered = _all_gather(torch.cat([part.reshape(-1) for part in parts]), group)
        of_values, *of_same = gathered.split([part.numel() for part in parts], 1)
        poison = values.new_zeros(())
        for label, of_ranks in zip(same, of_same, strict=True):
            # Two NaN count as equal.
            differs = ((of_ranks != of_ranks[:1]) & ~(of_ranks.isnan() & of_ranks[:1].isnan())).any(1)
            # With two groups, raising is unsafe: ranks outside this group would wait forever for the ranks that raise.
            if values.device.type == "cpu" and (self.vocab is None or self.sequence is None):
                if differs.any():
                    ranks = ", ".join(map(str, differs.nonzero().flatten().tolist()))
                    raise ValueError(
                        f"{label} must be the same on all ranks of {name}, got others on {ranks} than on 0"
                    )
            else:
                poison = torch.where(differs.any(), math.nan, poison)
        return of_values.reshape(len(gathered), *values.shape), poison

    def _named(self) -> Iterator[tuple[str, dist.ProcessGroup]]:
        if self.vocab is not None:
            yield "vocab_parallel", self.vocab
        if self.sequence is not None:
            yield "sequence_parallel", self.sequence


class SumGradients(torch.autograd.Function):
    """Returns hidden states unchanged. In backward, sums the gradients of all ranks of a group."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0]
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _OwnPart(torch.autograd.Function):
    """Returns a tensor unchanged. A second derivative raises an error, because other ranks' parts would be missing."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        ctx.save_for_backward(part)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return grad_outputs[0]
        return OnceDifferentiable.apply(grad_outputs[0], *ctx.saved_tensors)


def _checked_group(name: str, group: Any) -> dist.ProcessGroup | None:
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return group
    if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must be a process group that this process is a member of, got another group")
    raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def _exchange(
    name: str, group: dist.ProcessGroup, mine: RankFacts, error: Exception | None
) -> tuple[list[list[int]], Exception | None]:
    """Gathers the facts and the errors of all ranks of a group.

    Args:
        name: Name of the group in messages.
        group: The group.
        mine: Facts of this rank.
        error: Error of this rank, or None.

    Returns:
        (facts, error). ``facts`` has the facts of each rank. ``error`` is the error of the first rank that failed, or
        None.
    """
    device = _exchange_device(group)
    code = 0 if error is None else next((i for i, kind in enumerate(_ERRORS) if isinstance(error, kind)), 2) + 1
    numbers = _all_gather(torch.tensor([code, *mine], dtype=torch.int64, device=device), group).tolist()
    codes = [number for number, *_ in numbers]
    facts = [rest for _, *rest in numbers]
    if not any(codes):
        return facts, None
    text = ("" if error is None else str(error)).encode()[:_MESSAGE_BYTES]
    padded = torch.tensor(list(text.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device=device)
    messages = _all_gather(padded, group).cpu().numpy()
    rank = next(i for i, number in enumerate(codes) if number)
    message = messages[rank].tobytes().rstrip(b"\0").decode(errors="ignore")
    return facts, _ERRORS[codes[rank] - 1](f"rank {rank} of {name}: {message}")


def _difference(name: str, facts: list[list[int]]) -> ValueError | None:
    """Compares the facts of all ranks in the group ``name``. Returns an error if they differ, otherwise None."""
    fields = ("sequences", "settings") if name == "sequence_parallel" else tuple(_RULES)
    for field in fields:
        values = [numbers[RankFacts._fields.index(field)] for numbers in facts]
        for rank, value in enumerate(values):
            if value != values[0]:
                shown = "other options" if field == "settings" else str(value)
                first = "" if field == "settings" else f"{values[0]} "
                return ValueError(
                    f"{_RULES[field]} on all ranks of {name}, got {shown} on rank {rank}, {first}on rank 0"
                )
    return None


def _exchange_device(group: dist.ProcessGroup) -> torch.device:
    """Returns the device for exchanges: the CPU if the group has a CPU backend, otherwise the current GPU.

    Exchanges on the CPU do not wait for the GPU.
    """
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], getattr(torch, kinds[0]).current_device())


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the tensors of all ranks of the group, stacked in the order of the ranks, ``[ranks, ...]``."""
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=group)
    return gathered


def _with_own(gathered: Tensor, own: Tensor, rank: int) -> Tensor:
    """Returns ``gathered``, ``[ranks, ...]``, but with this rank's part replaced by the differentiable ``own``."""
    if not own.requires_grad:
        return gathered
    return torch.cat([gathered[:rank], _OwnPart.apply(own).unsqueeze(0), gathered[rank + 1 :]])
