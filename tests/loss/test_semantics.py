"""Compares mpo_loss with the MPO losses of four trainers.

Each trainer's loss is reimplemented here, from the trainer's code or description. A function computes float64
log-probs with torch, and then follows the order of operations in its trainer. The functions use no code of the
package. They share little code with each other, so a mistake does not affect all of them.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_ext import MPOConfig, RewardShift, mpo_loss

STEPS = 4
IGNORED = -100


class RunningMoments:
    """The mean of all numbers so far, like the class of this name in TRL 0.9 to 0.28."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.count = 1e-24

    def update(self, values: Tensor) -> None:
        """Adds the numbers of a micro-batch."""
        difference = values.mean().item() - self.mean
        self.count += values.numel()
        self.mean += difference * values.numel() / self.count


class Batch:
    """A micro-batch: logits in float64, labels, and the reference log-probs of the sequences."""

    def __init__(self, seed: int, pairs: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pairs = pairs
        self.logits = 2 * torch.randn(2 * pairs, 9, 31, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(31, (2 * pairs, 9), generator=generator)
        for row, tokens in enumerate(torch.randint(2, 9, (2 * pairs,), generator=generator).tolist()):
            self.labels[row, : 9 - tokens] = IGNORED  # the prompt
            if row % 2:
                self.labels[row, -1] = IGNORED  # padding
        drift = 4 * torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
        self.ref_logp = (self.sums() + drift).float().double()

    def token_logp(self, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the label log-probs and the mask of labelled positions, both ``[2B, T - 1]``."""
        logits = self.logits if logits is None else logits
        targets = self.labels[:, 1:]
        mask = targets != IGNORED
        logp = F.log_softmax(logits[:, :-1], dim=-1)
        return logp.gather(2, targets.masked_fill(~mask, 0).unsqueeze(2)).squeeze(2) * mask, mask

    def sums(self, logits: Tensor | None = None) -> Tensor:
        """Returns the log-prob of each sequence, ``[2B]``."""
        return self.token_logp(logits)[0].sum(1)


@pytest.fixture
def run() -> list[Batch]:
    """Returns a few steps of a training run, with batches of different sizes."""
    return [Batch(seed, pairs=1 + seed % 3) for seed in range(STEPS)]


def assert_steps_match(
    run: list[Batch], expected: list[tuple[Tensor, Tensor]], backend: str, device: str, shift: Any, config: MPOConfig
) -> None:
    """Runs mpo_loss on the batches of ``run``. Compares each loss and gradient with the values in ``expected``.

    Computes in float64 on a CPU, and in float32 on a GPU.
    """
    dtype = torch.float64 if device == "cpu" else torch.float32
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-7}
    for batch, (loss, gradient) in zip(run, expected, strict=True):
        logits = batch.logits.to(device, dtype, copy=True).requires_grad_()
        labels, ref_logp = batch.labels.to(device), batch.ref_logp.float().to(device)
        output = mpo_loss(logits, labels, ref_logp, config=config, reward_shift=shift, backend=backend)
        output.loss.backward()
        assert logits.grad is not None
        torch.testing.assert_close(output.loss.detach().cpu().double(), loss, **tolerance)
        torch.testing.assert_close(logits.grad.cpu().double(), gradient, **tolerance)
        if isinstance(shift, RewardShift):
            shift.step()


def with_gradient(loss_of: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns (loss, gradient of the logits) of a batch."""
    logits = batch.logits.clone().requires_grad_()
    loss = loss_of(logits)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def test_the_authors(run: list[Batch], backend: str, device: str) -> None:
    """Compares mpo_loss with the loss in the training code of InternVL 2.5 and 3.

    InternVL's reward shift is cumulative, and is updated before the loss uses it. The NTP loss is a mean over tokens.
    """
    running = RunningMoments()

    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        n = batch.pairs
        sums = batch.sums(logits)
        policy_chosen, policy_rejected = sums[:n], sums[n:]
        reference_chosen, reference_rejected = batch.ref_logp[:n], batch.ref_logp[n:]
        # "sigmoid"
        difference = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        losses = 0.8 * -F.logsigmoid(0.1 * difference)
        # "bco_pair"
        chosen_rewards = 0.1 * (policy_chosen - reference_chosen)
        rejected_rewards = 0.1 * (policy_rejected - reference_rejected)
        running.update(torch.cat((chosen_rewards, rejected_rewards)).mean().detach())
        delta = running.mean
        losses = losses + 0.2 * (-F.logsigmoid(chosen_rewards - delta) - F.logsigmoid(-(rejected_rewards - delta)))
        # "rpo_alpha" times the cross entropy of the chosen half
        nll = F.cross_entropy(logits[:n, :-1].reshape(-1, 31), batch.labels[:n, 1:].reshape(-1))
        return (losses + 1.0 * nll).mean()

    expected = [with_gradient(lambda z, batch=batch: loss_of(batch, z), batch) for batch in run]
    shift = RewardShift()
    assert_steps_match(run, expected, backend, device, shift, MPOConfig())
    assert shift.value == pytest.approx(running.mean, rel=1e-5)


def test_trl_since_0_29(run: list[Batch], backend: str, device: str) -> None:
    """Compares mpo_loss with TRL since 0.29: loss_type ["sigmoid", "bco_pair", "sft"], without a reward shift."""

    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        logp, mask = batch.token_logp(logits)
        scores = 0.1 * (logp.sum(1) - batch.ref_logp)
        chosen, rejected = scores.chunk(2)
        sigmoid = F.softplus(-(chosen - rejected)).mean()
        bco_pair = (F.softplus(-chosen) + F.softplus(rejected)).mean()
        sft = -logp[: batch.pairs][mask[: batch.pairs]].mean()
        return 0.8 * sigmoid + 0.2 * bco_pair + 1.0 * sft

    expected = [with_gradient(lambda z, batch=batch: loss_of(batch, z), batch) for batch in run]
    assert_steps_match(run, expected, backend, device, None, MPOConfig())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_llama_factory(run: list[Batch], backend: str, device: str, label_smoothing: float) -> None:
    """Compares mpo_loss with LLaMA-Factory's loss.

    That loss is (dpo + w * bco) / (1 + w) + pref_ftx * ntp, where w is ``pref_bco_weight``. The NTP loss is averaged
    over each response, and then over the responses.
    """
    pref_bco_weight, pref_ftx, beta = 0.25, 0.6, 0.2
    running = RunningMoments()

    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        logp, mask = batch.token_logp(logits)
        chosen, rejected = logp.sum(1).split(batch.pairs)
        chosen_ref, rejected_ref = batch.ref_logp.split(batch.pairs)
        margin = beta * ((chosen - chosen_ref) - (rejected - rejected_ref))
        dpo = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
        rewards = beta * torch.cat([chosen - chosen_ref, rejected - rejected_ref])
        running.update(rewards.mean().detach())
        chosen_reward, rejected_reward = rewards.split(batch.pairs)
        bco = -F.logsigmoid(chosen_reward - running.mean) - F.logsigmoid(running.mean - rejected_reward)
        losses = (dpo + bco * pref_bco_weight) / (1.0 + pref_bco_weight)
        sft = -(logp.sum(1) / mask.sum(1))[: batch.pairs]
        return (losses + pref_ftx * sft).mean()

    expected = [with_gradient(lambda z, batch=batch: loss_of(batch, z), batch) for batch in run]
    config = MPOConfig(
        beta=beta,
        dpo_weight=1 / (1 + pref_bco_weight),
        bco_weight=pref_bco_weight / (1 + pref_bco_weight),
        ntp_weight=pref_ftx,
        ntp_average="sequence",
        label_smoothing=label_smoothing,
    )
    shift = RewardShift()
    assert_steps_match(run, expected, backend, device, shift, config)
    assert shift.value == pytest.approx(running.mean, rel=1e-5)


def test_nemo_rl(run: list[Batch], backend: str, device: str) -> None:
    """Compares mpo_loss with NeMo-RL's loss.

    NeMo-RL's reward shift is a moving average. An optimizer step computes the loss first, and then updates the
    average.
    """
    momentum, beta = 0.9, 0.05
    value = 0.3

    def loss_of(batch: Batch, logits: Tensor, reward_shift: float) -> tuple[Tensor, Tensor]:
        logp, mask = batch.token_logp(logits)
        rewards = beta * (logp.sum(1) - batch.ref_logp)
        chosen, rejected = rewards[: batch.pairs], rewards[batch.pairs :]
        preference = -F.logsigmoid(chosen - rejected).mean()
        quality = (-F.logsigmoid(chosen - reward_shift) - F.logsigmoid(reward_shift - rejected)).mean()
        generation = -(logp[: batch.pairs].sum(1) / mask[: batch.pairs].sum(1)).mean()
        return preference + quality + 0.5 * generation, rewards.detach()

    expected = []
    for batch in run:
        _, rewards = loss_of(batch, batch.logits, value)
        expected.append(with_gradient(lambda z, batch=batch, value=value: loss_of(batch, z, value)[0], batch))
        value = momentum * value + (1 - momentum) * (rewards.sum() / rewards.numel()).item()
    config = MPOConfig(beta=beta, dpo_weight=1.0, bco_weight=1.0, ntp_weight=0.5, ntp_average="sequence")
    shift = RewardShift(mode="ema", decay=momentum, update="after", value=0.3, per="optimizer_step")
    assert_steps_match(run, expected, backend, device, shift, config)
    assert shift.value == pytest.approx(value, rel=1e-5)


def test_one_pair_makes_the_two_averages_equal(backend: str, device: str) -> None:
    batch = Batch(seed=5, pairs=1)
    arguments = (batch.logits.float().to(device), batch.labels.to(device), batch.ref_logp.float().to(device))
    token = mpo_loss(*arguments, config=MPOConfig(ntp_average="token"), backend=backend)
    sequence = mpo_loss(*arguments, config=MPOConfig(ntp_average="sequence"), backend=backend)
    torch.testing.assert_close(token.loss, sequence.loss, rtol=1e-6, atol=0)


def test_gradient_accumulation_with_a_fixed_shift_equals_one_large_batch(backend: str, device: str) -> None:
    """Compares the gradient of a batch of two pairs with the mean gradient of two micro-batches of one pair.

    The reward shift is fixed, and the NTP loss is averaged over responses.
    """
    batch = Batch(seed=6, pairs=2)
    config = MPOConfig(ntp_average="sequence")
    logits, labels = batch.logits.float().to(device), batch.labels.to(device)
    ref_logp = batch.ref_logp.float().to(device)
    whole = logits.clone().requires_grad_()
    mpo_loss(whole, labels, ref_logp, config=config, reward_shift=0.2, backend=backend).loss.backward()
    parts = logits.clone().requires_grad_()
    for i in range(2):
        rows = [i, 2 + i]
        part = mpo_loss(parts[rows], labels[rows], ref_logp[rows], config=config, reward_shift=0.2, backend=backend)
        (part.loss / 2).backward()
    assert whole.grad is not None
    assert parts.grad is not None
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-8)
