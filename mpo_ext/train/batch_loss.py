"""Computes the loss of a micro-batch. The losses of all micro-batches of a step add up to the loss of the step."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.eager import nan_factor, sequence_sums
from mpo_ext.loss.functions import linear_mpo_loss, mpo_loss
from mpo_ext.loss.preference import LOSSES, preference_loss
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.loss.steps import MPOOutput
from mpo_ext.train.batch import Batch
from mpo_ext.train.dataset import NO_PAIR, BatchCounts, StepSize
from mpo_ext.train.first_batch import FirstBatchCheck
from mpo_ext.train.forward import HiddenRows, forward, forward_logits
from mpo_ext.train.recipe import LossRecipe, Recipe
from mpo_ext.train.reference_model import Reference, label_logp, memory_budget
from mpo_ext.train.router_loss import RouterLoss

STATS = ("entropy", "top1")


class BatchLoss:
    """Computes the loss of micro-batches.

    Args:
        recipe: Settings of the loss.
        accelerator: The ``accelerate.Accelerator`` of the run.
        reference: Source of the log-probs of the reference model; None if the loss needs no reference.
        routers: Auxiliary loss of the policy's mixture-of-experts routers; None: no such loss.

    Attributes:
        first_batch: Check that runs on each micro-batch with pairs; None: no check. The trainer uses a check only in
            the first step.
    """

    def __init__(
        self, recipe: LossRecipe, accelerator: Any, reference: Reference | None, routers: RouterLoss | None = None
    ) -> None:
        self.recipe, self.accelerator, self.reference, self.routers = recipe, accelerator, reference, routers
        self.first_batch: FirstBatchCheck | None = None

    @property
    def router_coef(self) -> float:
        """Weight of the auxiliary router loss in the loss of a step; 0 if the run has no such loss."""
        return 0.0 if self.routers is None else self.routers.coef

    def __call__(
        self, model: nn.Module, batch: Batch, config: MPOConfig, reward_shift: RewardShift, router_weight: float = 0.0
    ) -> MPOOutput:
        """Returns the policy's loss on a micro-batch.

        Args:
            model: Policy.
            batch: Micro-batch of B pairs.
            config: Settings of the loss, with the weights of its terms for this micro-batch.
            reward_shift: Reward shift of the BCO term. In training mode, the loss updates it.
            router_weight: Weight of the auxiliary router loss for this micro-batch. If the weight is positive, the
                returned loss includes the router loss, and ``stats`` has two more entries. ``router_aux_loss`` is the
                router loss without the weight. ``routed_tokens`` is the number of tokens in the average of the router
                loss.
        """
        batch = batch.to(self.accelerator.device)
        if self.reference is not None:
            ref_logp = self.reference.logp(model, batch)
        else:
            ref_logp = torch.zeros(2 * batch.pairs, dtype=torch.float64, device=self.accelerator.device)
        shift = reward_shift if self.reference is not None else None
        if self.routers is None or not router_weight:
            with self.accelerator.autocast():
                return self._policy_loss(model, batch, ref_logp, config, shift)
        with self.routers.recorded() as logits, self.accelerator.autocast():
            out = self._policy_loss(model, batch, ref_logp, config, shift)
        aux_loss = self.routers(logits, batch.is_routed()).to(out.loss)
        stats = {"router_aux_loss": aux_loss.detach(), "routed_tokens": torch.tensor(batch.routed_tokens)}
        return out._replace(loss=out.loss + router_weight * aux_loss, stats={**out.stats, **stats})

    def _policy_loss(
        self, model: nn.Module, batch: Batch, ref_logp: Tensor, config: MPOConfig, shift: RewardShift | None
    ) -> MPOOutput:
        recipe = self.recipe
        if recipe.preference is not None:
            logp = label_logp(model, batch, recipe, functools.partial(self._inspect, batch, ref_logp))
            return preference_output(recipe.preference, logp, batch, ref_logp, config)
        if recipe.from_logits:
            logits = forward_logits(model, batch)
            self._inspect(batch, ref_logp, logits)
            return mpo_loss(
                logits, batch.labels.to(logits.device), ref_logp, config=config, reward_shift=shift,
                cu_seqlens=batch.cu_seqlens, shift=False, stats=STATS, backend=recipe.backend,
            )  # fmt: skip
        out = forward(model, batch)
        self._inspect(batch, ref_logp, out)
        return linear_mpo_loss(
            out.hidden, out.weight, batch.labels, ref_logp, config=config, reward_shift=shift,
            cu_seqlens=batch.cu_seqlens, shift=False, stats=STATS, backend=recipe.backend,
            memory_budget=memory_budget(recipe), recompute=recipe.recompute, **out.options,
        )  # fmt: skip

    def _inspect(self, batch: Batch, ref_logp: Tensor, output: Tensor | HiddenRows) -> None:
        if self.first_batch is not None and batch.digests != (NO_PAIR,):
            self.first_batch.check(batch, output, None if self.reference is None else ref_logp)


def weighted_config(recipe: Recipe, counts: BatchCounts | None, size: StepSize, world_size: int) -> MPOConfig | None:
    """Returns the loss settings for a micro-batch, with scaled weights of the loss terms.

    Each weight is multiplied by two factors. The first factor is the micro-batch's fraction of the step. The second
    factor is ``world_size``, because accelerate averages gradients over the ranks.

    The setting ``loss.average_over`` selects how the fraction is computed. For example, with "step", the fraction for
    DPO and BCO is (pairs in the micro-batch) / (pairs in the step).

    Args:
        recipe: The recipe of the run.
        counts: Sizes of the micro-batch; None for a dummy batch (``RunData.dummy_batch``).
        size: Size of the step over all ranks.
        world_size: Number of ranks.

    Returns:
        The settings, or None if all scaled weights are 0. A dummy batch gives None. ``ntp_average`` may differ from
        the recipe; see ``with_logged_average``.
    """
    if counts is None:
        return None
    config = recipe.loss.config
    if recipe.loss.average_over == "micro_batch" and recipe.optim.micro_batch_tokens is not None:
        # The number of pairs of a micro-batch depends on lengths here, so each pair counts as a micro-batch.
        config = dataclasses.replace(config, ntp_average="sequence")
        scale = world_size * counts.pairs / size.counts.pairs
        ntp_scale = world_size * counts.chosen_responses / size.counts.pairs
    elif recipe.loss.average_over == "micro_batch":
        scale = ntp_scale = world_size / size.micro_batches
    else:
        scale = world_size * counts.pairs / size.counts.pairs
        ntp_parts, ntp_total = (sizes.ntp_parts(config.ntp_average) for sizes in (counts, size.counts))
        ntp_scale = world_size * ntp_parts / max(ntp_total, 1)
    dpo_weight, bco_weight = config.dpo_weight * scale, config.bco_weight * scale
    ntp_weight = config.ntp_weight * ntp_scale
    if not (dpo_weight or bco_weight or ntp_weight):
        return None
    return dataclasses.replace(config, dpo_weight=dpo_weight, bco_weight=bco_weight, ntp_weight=ntp_weight)


def router_weight(recipe: Recipe, coef: float, counts: BatchCounts | None, size: StepSize, world_size: int) -> float:
    """Returns the weight of the auxiliary router loss for a micro-batch.

    The weight is ``coef * world_size * fraction``. If ``loss.average_over`` is "step", ``fraction`` is n / N: n tokens
    of the micro-batch and N tokens of the whole step enter the router loss. If ``loss.average_over`` is "micro_batch",
    ``fraction`` is the same as for the DPO and BCO terms; see ``weighted_config``.

    Args:
        recipe: The recipe of the run.
        coef: Weight of the router loss in the loss of a step.
        counts: Sizes of the micro-batch; None for a dummy batch (``RunData.dummy_batch``), whose weight is 0.
        size: Size of the step over all ranks.
        world_size: Number of ranks.
    """
    if counts is None:
        return 0.0
    if recipe.loss.average_over == "step":
        share = counts.routed_tokens / max(size.counts.routed_tokens, 1)
    elif recipe.optim.micro_batch_tokens is not None:
        share = counts.pairs / size.counts.pairs
    else:
        share = 1 / size.micro_batches
    return coef * world_size * share


def with_logged_average(out: MPOOutput, used: MPOConfig, recipe: LossRecipe, counts: BatchCounts) -> MPOOutput:
    """Returns ``out`` with the ``ntp_loss`` for the log, averaged according to ``recipe.ntp_average``.

    Args:
        out: Output of the loss for a micro-batch.
        used: Settings of this loss, from ``weighted_config``. Their ``ntp_average`` may be "sequence" although the
            recipe has "token".
        recipe: Loss settings of the recipe.
        counts: Sizes of the micro-batch.
    """
    if used.ntp_average == recipe.ntp_average:
        return out
    return out._replace(ntp_loss=-out.chosen_logp.sum() / max(counts.chosen_tokens, 1))


def preference_output(name: str, logp: Tensor, batch: Batch, ref_logp: Tensor, config: MPOConfig) -> MPOOutput:
    """Computes the loss ``dpo_weight * mean(preference loss) + ntp_weight * next-token loss`` from log-probs.

    Args:
        name: Key of ``mpo_ext.loss.preference.LOSSES``.
        logp: ``[N]`` log-probs of the labels, on the device of ``batch.cu_seqlens``.
        batch: The batch of B pairs.
        ref_logp: ``[2B]`` float64 summed log-probs of the responses under the reference model.
        config: Weights, beta and the other settings of the loss.

    Returns:
        An ``MPOOutput``. ``dpo_loss`` is the mean preference loss. ``bco_loss`` and the reward shift are 0. ``stats``
        is empty.
    """
    labels = batch.labels.to(logp.device)
    is_scored = labels != config.ignore_index
    tokens = sequence_sums(is_scored.double(), batch.cu_seqlens).long()
    sums = sequence_sums(logp.double(), batch.cu_seqlens)
    chosen, rejected = sums.chunk(2)
    chosen_tokens, rejected_tokens = tokens.chunk(2)
    ref_chosen, ref_rejected = ref_logp.to(sums).chunk(2)
    pair_losses = preference_loss(
        name, chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens,
        beta=config.beta, label_smoothing=config.label_smoothing,
    )  # fmt: skip
    n_pairs = len(pair_losses)
    preference = pair_losses.sum() / max(n_pairs, 1)
    if config.ntp_average == "token":
        ntp = -chosen.sum() / chosen_tokens.sum().clamp(min=1)
    else:
        has_tokens = chosen_tokens > 0
        ntp = -(chosen / chosen_tokens.clamp(min=1)).sum() / has_tokens.sum().clamp(min=1)
    has_both = (chosen_tokens > 0) & (rejected_tokens > 0)
    reference = torch.cat([ref_chosen, ref_rejected]) if LOSSES[name].needs_reference else torch.zeros_like(sums)
    rewards = torch.where(has_both.repeat(2), config.beta * (sums.detach() - reference), 0.0).float()
    return MPOOutput(
        loss=(nan_factor(sums) * (config.dpo_weight * preference + config.ntp_weight * ntp)).to(logp.dtype),
        dpo_loss=preference.detach().float(),
        bco_loss=preference.new_zeros((), dtype=torch.float32),
        ntp_loss=ntp.detach().float(),
        chosen_logp=chosen.detach().float(),
        rejected_logp=rejected.detach().float(),
        chosen_reward=rewards[:n_pairs],
        rejected_reward=rewards[n_pairs:],
        reward_shift=preference.new_zeros((), dtype=torch.float32),
        tokens=tokens,
        stats={},
        backend="",
    )


def _micro_batch_setting(recipe: Recipe) -> str:
    name = "micro_batch_size" if recipe.optim.micro_batch_tokens is None else "micro_batch_tokens"
    return f"optim.{name} (now {getattr(recipe.optim, name)})"


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, recipe: Recipe, step: int) -> Iterator[None]:
    """Adds advice to the message of an out-of-memory error in the ``with`` block, and raises ``RuntimeError``.

    The message also names ``step``, counted from 1, and the sizes of ``batch``.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        pixels = batch.inputs.get("pixel_values")
        images = "none" if pixels is None else " x ".join(map(str, pixels.shape))
        raise RuntimeError(
            f"out of memory in step {step} with {batch.pairs} pairs in {batch.rows} rows of "
            f"{batch.segments.shape[1]} positions ({batch.projected_rows} labelled), images {images}: "
            f"{', '.join(batch.names[:4])}. These settings need less memory: a smaller "
            f"{_micro_batch_setting(recipe)}, model.gradient_checkpointing=true, a smaller data.max_length (now "
            f"{recipe.data.max_length}), reference.kind=precomputed, model.lora, a smaller loss.memory_budget_mib, "
            f"sharding through accelerate. {error}"
        ) from error
