"""Evaluates the policy on the evaluation pairs (``data.eval`` in the recipe)."""

import torch
from torch import nn

from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train.batch_loss import BatchLoss
from mpo_ext.train.dataset import RunData, size_over_ranks
from mpo_ext.train.encode import PairCounts
from mpo_ext.train.metrics import Totals, log_line


@torch.no_grad()
def evaluate(
    model: nn.Module, data: RunData, batch_loss: BatchLoss, reward_shift: RewardShift
) -> tuple[dict[str, float], PairCounts]:
    """Returns the metrics over the evaluation pairs of all ranks, and the counts of this rank's skipped pairs.

    All ranks must call this function.
    """
    config, coef, accelerator = batch_loss.recipe.config, batch_loss.router_coef, data.accelerator
    totals, pair_counts = Totals(accelerator.device), PairCounts()
    model.eval()
    reward_shift.eval()
    for step_slice in data.load_evaluation():
        size = size_over_ranks(accelerator, step_slice)
        for skipped in step_slice.skipped:
            pair_counts.add(skipped)
        for batch, counts in data.equal_batches(step_slice, size):
            out = batch_loss(model, batch, config, reward_shift, coef)
            if counts is not None:
                totals.add(out, ntp_parts=counts.ntp_parts(config.ntp_average), tokens=batch.tokens)
    model.train()
    reward_shift.train()
    return log_line(totals.reduce(accelerator), batch_loss.recipe, reward_shift, coef), pair_counts
