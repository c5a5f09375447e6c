"""The reward shift delta of the BCO term, and its state during training."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mpo_ext.checks import check_choice, check_number
from mpo_ext.ops.pair_loss import CUMULATIVE, EMA, HOLD


class BatchShift(NamedTuple):
    """The reward shift that the pair loss of a batch uses, and the rule for its update."""

    state: Tensor  # [2] float64: delta, and the number of its updates so far
    rule: int = HOLD  # HOLD, CUMULATIVE or EMA: how the pair loss itself updates the state
    update_first: bool = False  # whether the delta in use already includes this batch
    decay: float = 0.0  # fraction of the old value that EMA keeps
    is_pooled: bool = False  # whether the pooled rewards of ranks or micro-batches update the state later


class RewardShift:
    """The reward shift delta: a moving average of rewards, and the threshold of the BCO term (arXiv 2411.10442).

    Pass the same instance to every call of ``mpo_loss``, which then updates delta. After ``eval()``, or without
    gradients (``torch.no_grad``), delta stays unchanged. The state stays on the device of the rewards, so no call
    waits for the device. If ``torch.distributed`` is initialised, the rewards of all ranks update the state.

    An update uses the mean reward of the chosen and rejected responses of its batch. Pairs in which a response has no
    labelled token do not count. After a reward that is not finite, delta stays NaN or infinite. To undo such a step,
    load a ``state_dict()`` from before the step, as the trainer of mpo_ext does.

    Args:
        mode: "cumulative": delta is the average of the mean rewards of all updates so far. With ``per="micro_batch"``,
            each rank's mean has the same weight, as in the authors' code. "ema": an update gives
            ``decay * delta + (1 - decay) * mean`` with the mean over all rewards of all ranks, as in NeMo-RL. "fixed":
            delta is always ``value``.
        decay: Fraction of the old value that "ema" keeps, in ``[0, 1)``.
        update: "before": a call updates delta with its own rewards and then uses it, as in the authors' code. "after":
            a call uses delta first and updates it afterwards.
        value: Initial delta. The first update of "cumulative" discards it.
        per: "micro_batch": every call updates delta. "optimizer_step": calls collect rewards, and ``step()`` updates
            delta. The result is then independent of gradient accumulation. This needs ``update="after"``.

    Raises:
        TypeError: If ``decay`` or ``value`` is not a number.
        ValueError: If an argument has a value that is not allowed.

    Settings that reproduce other implementations::

        RewardShift()                                                     # the authors' code, ms-swift, LLaMA-Factory
        RewardShift("ema", update="after", per="optimizer_step")          # NeMo-RL
        None, or RewardShift("fixed")                                     # TRL >= 0.29: no shift
    """

    def __init__(
        self,
        mode: Literal["cumulative", "ema", "fixed"] = "cumulative",
        *,
        decay: float = 0.99,
        update: Literal["before", "after"] = "before",
        value: float = 0.0,
        per: Literal["micro_batch", "optimizer_step"] = "micro_batch",
    ) -> None:
        check_choice("mode", mode, ("cumulative", "ema", "fixed"))
        check_choice("update", update, ("before", "after"))
        check_choice("per", per, ("micro_batch", "optimizer_step"))
        check_number("decay", decay, "[0, 1)")
        check_number("value", value, "(-inf, inf)")
        if per == "optimizer_step" and update == "before" and mode != "fixed":
            raise ValueError(
                "update must be 'after' when per is 'optimizer_step' (the step's rewards are known at its end), "
                "got 'before'"
            )
        self.mode = mode
        self.decay = float(decay)
        self.update_order = update
        self.per = per
        self.training = True
        # float64, because after 1e5 steps a cumulative mean moves by less than float32 resolves. Both tensors are
        # updated in place, because a replayed CUDA graph reads and writes the memory that it captured.
        with torch.inference_mode(False):  # tensors of inference mode could not be updated in training
            self._state = torch.tensor([float(value), 0.0], dtype=torch.float64)  # delta, number of updates
            self._pending = torch.zeros(2, dtype=torch.float64)  # sum and count of the rewards since the last step()

    def __repr__(self) -> str:
        return (
            f"RewardShift(mode={self.mode!r}, decay={self.decay}, update={self.update_order!r}, per={self.per!r}, "
            f"value={self.value})"
        )

    @property
    def value(self) -> float:
        """The current delta. Reading it waits for the device."""
        return float(self._state[0])

    def train(self, mode: bool = True) -> RewardShift:
        """Turns updates on or off, and returns the instance."""
        self.training = mode
        return self

    def eval(self) -> RewardShift:
        """Turns updates off for an evaluation, and returns the instance. Losses then use delta without changing it."""
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Returns the settings and the state that a resumed run needs, as plain Python values."""
        value, count = self._state.tolist()
        reward_sum, reward_count = self._pending.tolist()
        return {
            **self._settings(),
            "value": value,
            "count": count,
            "pending_sum": reward_sum,
            "pending_count": reward_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state that ``state_dict`` returned.

        Raises:
            TypeError: If the state is not a dict, or its value, count, pending_sum or pending_count is not a number.
            ValueError: If a key is missing, or the state comes from an instance with other settings.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be what RewardShift.state_dict() returned, got {state!r}")
        settings = self._settings()
        missing = [key for key in (*settings, "value", "count", "pending_sum", "pending_count") if key not in state]
        if missing:
            raise ValueError(f"state must be what RewardShift.state_dict() returned, lacks {', '.join(missing)}")
        for name in ("value", "count", "pending_sum", "pending_count"):
            check_number(name, state[name])
        for name, ours in settings.items():
            if state[name] != ours:
                raise ValueError(f"state must come from a RewardShift with {name}={ours!r}, got {state[name]!r}")
        if self.mode == "fixed" and state["value"] != self.value:
            raise ValueError(f"state must come from a RewardShift with value={self.value}, got {state['value']}")
        self._state.copy_(torch.tensor([state["value"], state["count"]], dtype=torch.float64))
        self._pending.copy_(torch.tensor([state["pending_sum"], state["pending_count"]], dtype=torch.float64))

    def update(self, reward_sum: float | Tensor, count: float | Tensor) -> None:
        """Updates delta with the rewards of this rank's micro-batch, also after ``eval()``.

        Call this method only in loops without ``mpo_loss``, because ``mpo_loss`` updates delta itself. All ranks must
        call this method together. With ``per="optimizer_step"``, the method only collects the rewards, and ``step()``
        updates delta. A ``count`` of 0 contributes nothing. In mode "fixed", the method does nothing.

        Args:
            reward_sum: Sum of the rewards, a number or a 0-d tensor.
            count: Number of rewards, a number or a 0-d tensor.
        """
        if self.mode == "fixed":
            return
        batch = torch.stack([self._on_device(reward_sum), self._on_device(count)])
        if self.per == "optimizer_step":
            self._pending.add_(batch)
            return
        self._apply(batch, each_rank_counts=self.mode == "cumulative")

    def step(self) -> None:
        """Updates delta at the end of an optimizer step, with the rewards since the last call.

        Has an effect only with ``per="optimizer_step"`` and a mode other than "fixed". All ranks must call this method
        together.
        """
        if self.mode == "fixed" or self.per != "optimizer_step":
            return
        self._apply(self._pending, each_rank_counts=False)
        self._pending.zero_()

    def begin_batch(self, device: torch.device) -> BatchShift:
        """Returns the reward shift for the pair loss of a batch. ``mpo_loss`` calls this before the pair loss."""
        if self._state.device != device:
            with torch.inference_mode(False):
                self._state = self._state.to(device)
                self._pending = self._pending.to(device)
        if not self.training or self.mode == "fixed" or not torch.is_grad_enabled():
            return BatchShift(self._state)
        if _is_in_backward():
            raise RuntimeError(
                "reward_shift must not be updated twice for a batch, but backward computes the loss again: leave the "
                "loss out of activation checkpointing (torch.utils.checkpoint)"
            )
        if self.per == "optimizer_step" or _is_distributed():
            return BatchShift(self._state, is_pooled=True)
        rule = CUMULATIVE if self.mode == "cumulative" else EMA
        return BatchShift(self._state, rule, self.update_order == "before", self.decay)

    def end_batch(self, shift: BatchShift, new_state: Tensor, batch: Tensor) -> Tensor | None:
        """Stores the state after a batch. ``mpo_loss`` calls this method after the pair loss.

        Args:
            shift: Result of ``begin_batch``.
            new_state: ``[2]`` state that the pair loss returned.
            batch: ``[2]`` sum and number of the rewards in this rank's batch.

        Returns:
            None if the pair loss is final. Otherwise, the updated state, whose delta includes the rewards of all
            ranks. The caller must then compute the pair loss again with this state.
        """
        if shift.rule != HOLD:
            self._state.copy_(new_state)
        elif shift.is_pooled:
            self.update(batch[0], batch[1])
            if self.update_order == "before":
                return self._state
        return None

    def _settings(self) -> dict[str, Any]:
        return {"mode": self.mode, "decay": self.decay, "update": self.update_order, "per": self.per}

    def _on_device(self, number: float | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number.detach().to(device=self._state.device, dtype=torch.float64)
        return torch.tensor(float(number), dtype=torch.float64, device=self._state.device)

    def _apply(self, batch: Tensor, *, each_rank_counts: bool) -> None:
        """Updates the state with the rewards of a batch. ``batch``, ``[2]``, holds their sum and count on this rank.

        If ``each_rank_counts``, the mean rewards of the ranks have equal weights. Otherwise, all rewards have equal
        weights.
        """
        if each_rank_counts:  # the authors' code averages the ranks' means, unweighted by numbers of pairs
            has_pairs = (batch[1] > 0).double()
            batch = torch.stack([batch[0] / batch[1].clamp(min=1), has_pairs])
        if _is_distributed():
            batch = batch.clone()
            dist.all_reduce(batch)
        value, updates = self._state
        mean = batch[0] / batch[1].clamp(min=1)
        if self.mode == "cumulative":
            weight = batch[1] if each_rank_counts else (batch[1] > 0).double()
            moved = value + (mean - value) * weight / (updates + weight).clamp(min=1)
            updates = updates + weight
        else:
            moved = self.decay * value + (1 - self.decay) * mean
            updates = updates + (batch[1] > 0)
        self._state.copy_(torch.stack([torch.where(batch[1] > 0, moved, value), updates]))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def begin_batch(reward_shift: RewardShift | Tensor | float | None, device: torch.device) -> BatchShift:
    """Returns the reward shift for the pair loss of a batch, from any type that ``mpo_loss`` accepts.

    Raises:
        TypeError: If ``reward_shift`` has another type.
        ValueError: If the number is not finite, or the tensor is not 0-d floating point.
    """
    if isinstance(reward_shift, RewardShift):
        return reward_shift.begin_batch(device)
    if isinstance(reward_shift, Tensor):
        if reward_shift.ndim != 0 or not reward_shift.is_floating_point():
            raise ValueError(
                "reward_shift must be a 0-d floating-point tensor when it is a tensor, got "
                f"{reward_shift.dtype} of shape {tuple(reward_shift.shape)}"
            )
        delta = reward_shift.detach().to(device=device, dtype=torch.float64)
        return BatchShift(F.pad(delta.reshape(1), (0, 1)))
    if reward_shift is None:
        reward_shift = 0.0
    if isinstance(reward_shift, bool) or not isinstance(reward_shift, int | float):
        raise TypeError(
            f"reward_shift must be None, a number, a 0-d tensor or a RewardShift, got {type(reward_shift).__name__}"
        )
    if not math.isfinite(reward_shift):
        raise ValueError(f"reward_shift must be finite, got {reward_shift}")
    return BatchShift(torch.full((2,), float(reward_shift), dtype=torch.float64, device=device))


def end_batch(
    reward_shift: RewardShift | Tensor | float | None, shift: BatchShift, new_state: Tensor, batch: Tensor
) -> Tensor | None:
    """Returns the result of ``RewardShift.end_batch``, or None if ``reward_shift`` is a number, a tensor or None."""
    return reward_shift.end_batch(shift, new_state, batch) if isinstance(reward_shift, RewardShift) else None


def _is_in_backward() -> bool:
    # torch has no public function for this.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # noqa: SLF001
