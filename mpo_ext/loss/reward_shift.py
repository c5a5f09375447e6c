"""The reward shift delta of the BCO term, and the state that follows it through training."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mpo_ext.checks import check_number

# The rules by which pair_loss moves the state itself, when no collective must come between (api.h: ShiftRule).
HOLD, CUMULATIVE, EMA = 0, 1, 2


class RewardShift:
    """The moving average of rewards, delta, that centres the BCO term (arXiv 2411.10442, after arXiv 2404.04656).

    Pass one instance to every call of ``mpo_loss``; it is updated there, in training only: never after ``eval()`` and
    never where gradients are off. The state stays on the device of the rewards, so no call waits for it, and it is
    reduced over the ranks of ``torch.distributed`` where that is initialised.

    The statistic of one call is the mean reward over both sides of its pairs; pairs with an empty side are left out.

    Args:
        mode: "cumulative" is the mean of the statistics of all updates so far, each rank's counting once, as in the
            authors' code; "ema" is ``decay * delta + (1 - decay) * mean`` with the mean over all rewards of all ranks,
            as in NeMo-RL; "fixed" stays at ``value``.
        decay: Share of the old value that "ema" keeps, in ``[0, 1)``.
        update: "before" lets a call use the value that already includes its own rewards, as the authors' code does;
            "after" lets it use the value of the calls before.
        value: delta before the first update ("cumulative" forgets it then).
        per: "micro_batch" updates at every call; "optimizer_step" collects rewards and updates in ``step()``, so that
            the result does not depend on gradient accumulation (needs ``update="after"``).

    Raises:
        TypeError: If ``decay`` or ``value`` is no number.
        ValueError: If an argument is not one of the above.

    The semantics in use elsewhere, and how to get them::

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
        if mode not in ("cumulative", "ema", "fixed"):
            raise ValueError(f"mode must be 'cumulative', 'ema' or 'fixed', got {mode!r}")
        if update not in ("before", "after"):
            raise ValueError(f"update must be 'before' or 'after', got {update!r}")
        if per not in ("micro_batch", "optimizer_step"):
            raise ValueError(f"per must be 'micro_batch' or 'optimizer_step', got {per!r}")
        check_number("decay", decay)
        check_number("value", value)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not math.isfinite(value):
            raise ValueError(f"value must be finite, got {value}")
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
        # float64, since a cumulative mean over 1e5 steps moves by less than a float32 can tell.
        self._state = torch.tensor([float(value), 0.0], dtype=torch.float64)  # delta, number of updates behind it
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
        """Turns updates on (or off)."""
        self.training = mode
        return self

    def eval(self) -> RewardShift:
        """Turns updates off: a call in evaluation uses delta and leaves it as it is."""
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a resumed run needs, as plain Python values."""
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
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: If a key is missing, or the state was made with other settings than this instance's.
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
        device = self._state.device
        self._state = torch.tensor([state["value"], state["count"]], dtype=torch.float64, device=device)
        self._pending = torch.tensor(
            [state["pending_sum"], state["pending_count"]], dtype=torch.float64, device=device
        )

    def update(self, reward_sum: float | Tensor, count: float | Tensor) -> None:
        """Takes in the rewards of one micro-batch of this rank; ``mpo_loss`` calls it, and so may a loop of your own.

        With ``per="optimizer_step"`` they are collected until ``step()``. All ranks must call it together. A count of
        0 (no pair with two sides) changes nothing.

        Args:
            reward_sum: Sum of the rewards, a number or a 0-d tensor.
            count: How many they are, a number or a 0-d tensor.
        """
        if self.mode == "fixed":
            return
        batch = torch.stack([self._on_device(reward_sum), self._on_device(count)])
        if self.per == "optimizer_step":
            self._pending = self._pending + batch
            return
        self._apply(batch, each_rank_counts=self.mode == "cumulative")

    def step(self) -> None:
        """Ends an optimizer step: with ``per="optimizer_step"``, moves delta by the rewards collected since the last.

        All ranks must call it together. Does nothing for the other settings.
        """
        if self.mode == "fixed" or self.per != "optimizer_step":
            return
        self._apply(self._pending, each_rank_counts=False)
        self._pending = torch.zeros_like(self._pending)

    def _settings(self) -> dict[str, Any]:
        return {"mode": self.mode, "decay": self.decay, "update": self.update_order, "per": self.per}

    def _on_device(self, number: float | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number.detach().to(device=self._state.device, dtype=torch.float64)
        return torch.tensor(float(number), dtype=torch.float64, device=self._state.device)

    def _apply(self, batch: Tensor, *, each_rank_counts: bool) -> None:
        """Moves the state by one statistic. ``batch`` is [2]: sum and count of this rank's rewards."""
        if each_rank_counts:  # the authors reduce each rank's mean, whatever its number of pairs
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
        self._state = torch.stack([torch.where(batch[1] > 0, moved, value), updates])

    def _begin(self, device: torch.device) -> tuple[Tensor, bool]:
        """Returns the state on the rewards' device, and whether this call is to move it."""
        if self._state.device != device:
            self._state = self._state.to(device)
            self._pending = self._pending.to(device)
        return self._state, self.training and self.mode != "fixed" and torch.is_grad_enabled()

    def _kernel_rule(self) -> int:
        """Returns the rule that pair_loss can apply by itself, or HOLD where ranks or steps must be pooled first."""
        if self.per == "optimizer_step" or _is_distributed():
            return HOLD
        return {"cumulative": CUMULATIVE, "ema": EMA, "fixed": HOLD}[self.mode]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
