"""Other preference losses in the place of the DPO term: ``loss.preference`` of a recipe."""

import torch
from torch import Tensor

from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.eager import sequence_sums
from mpo_ext.loss.functions import MPOOutput
from mpo_ext.loss.preference import LOSSES, preference_loss
from mpo_ext.train.batch import Batch


def preference_output(name: str, logp: Tensor, batch: Batch, ref_logp: Tensor, config: MPOConfig) -> MPOOutput:
    """The loss ``dpo_weight * mean(preference loss) + ntp_weight * NTP`` of a micro-batch.

    Args:
        name: Key of ``mpo_ext.loss.preference.LOSSES``.
        logp: ``[N]``, differentiable: log-probs of the batch's labels.
        batch: Its labels and ``cu_seqlens``, on the device of ``logp``.
        ref_logp: ``[2B]`` float64, summed log-probs under the reference; not looked at where there is none.
        config: Weights, beta, label smoothing and the average of the next-token term.

    Returns:
        As ``mpo_loss``: the mean preference loss stands as ``dpo_loss``; there are no statistics and no reward shift.
    """
    labels = batch.labels.to(logp.device)
    is_scored = labels != config.ignore_index
    tokens = sequence_sums(is_scored.double(), batch.cu_seqlens).long()
    sums = sequence_sums(logp.double(), batch.cu_seqlens)
    chosen, rejected = sums.chunk(2)
    chosen_tokens, rejected_tokens = tokens.chunk(2)
    ref_chosen, ref_rejected = ref_logp.to(sums).chunk(2)
    pairs = preference_loss(
        name, chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
        beta=config.beta, label_smoothing=config.label_smoothing,
    )  # fmt: skip
    preference = pairs.sum() / max(len(pairs), 1)
    if config.ntp_average == "token":
        ntp = -chosen.sum() / chosen_tokens.sum().clamp(min=1)
    else:
        has_tokens = chosen_tokens > 0
        ntp = -(chosen / chosen_tokens.clamp(min=1)).sum() / has_tokens.sum().clamp(min=1)
    has_both = (chosen_tokens > 0) & (rejected_tokens > 0)
    reference = torch.cat([ref_chosen, ref_rejected]) if LOSSES[name].needs_reference else torch.zeros_like(sums)
    rewards = torch.where(has_both.repeat(2), config.beta * (sums.detach() - reference), 0.0).float()
    return MPOOutput(
        loss=(config.dpo_weight * preference + config.ntp_weight * ntp).to(logp.dtype),
        dpo_loss=preference.detach().float(),
        bco_loss=preference.new_zeros((), dtype=torch.float32),
        ntp_loss=ntp.detach().float(),
        chosen_logp=chosen.detach().float(),
        rejected_logp=rejected.detach().float(),
        chosen_reward=rewards[: len(pairs)],
        rejected_reward=rewards[len(pairs) :],
        reward_shift=preference.new_zeros((), dtype=torch.float32),
        tokens=tokens,
        stats={},
        backend="",
    )
