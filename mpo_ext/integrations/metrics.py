"""Metrics of a batch, under the names that TRL and similar trainers use in their logs."""

from __future__ import annotations

from torch import Tensor

from mpo_ext.loss.steps import MPOOutput


def loss_metrics(out: MPOOutput) -> dict[str, Tensor]:
    """Returns the terms of the loss, the reward shift, and metrics of rewards and log-probs.

    The result is a dict from the name of a metric to a 0-d tensor. Metrics of rewards and log-probs are means over the
    pairs.
    """
    margins = out.chosen_reward - out.rejected_reward
    return {
        "loss/dpo": out.dpo_loss,
        "loss/bco": out.bco_loss,
        "loss/ntp": out.ntp_loss,
        "reward_shift": out.reward_shift,
        "rewards/chosen": out.chosen_reward.mean(),
        "rewards/rejected": out.rejected_reward.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "logps/chosen": out.chosen_logp.mean(),
        "logps/rejected": out.rejected_logp.mean(),
    }
