"""Defines the expected results of the tests: exact values in numpy, values of eager torch, and the allowed errors.

Nothing here imports the package. Tests use three groups of functions:

- ``mpo_exact`` and ``token_logp_exact`` define the results, in float64. For float64 inputs, they compute in long
  double. Thus float64 results can be checked too. Both loop over sequences and rows, and prefer simplicity to speed.
- ``mpo_eager`` and ``token_logp_eager`` are the code that a user would write in torch: logits upcast to float32,
  ``log_softmax``, ``gather``, autograd. Their errors are the standard for the errors of the kernels.
- ``assert_as_accurate`` and similar functions compare a result with the exact and the eager result.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

LOG_2 = float(np.log(2.0))
STATS = ("entropy", "mean_logit", "top1", "sum_p_squared")
# Options of mpo_exact and mpo_eager, named as in the MPOConfig of the package.
DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "dpo_weight": 0.8,
    "bco_weight": 0.2,
    "ntp_weight": 1.0,
    "label_smoothing": 0.0,
    "ntp_average": "token",
    "ignore_index": -100,
}


def wide(tensor: Tensor | Array) -> Array:
    """Converts a tensor to a wider numpy array: long double for float64, otherwise float64.

    A numpy array is returned unchanged.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    values = tensor.detach().cpu()
    if values.dtype == torch.float64:
        return values.numpy().astype(np.longdouble)
    return values.double().numpy()


def accumulation_eps(dtype: torch.dtype | np.dtype) -> float:
    """Returns the machine epsilon of the dtype in which kernels accumulate: float64 for float64 logits, else float32.

    ``dtype`` is the torch dtype of the logits, or the numpy dtype of their copy from ``wide``.
    """
    # ``wide`` copies float64 logits to long double.
    is_double = dtype == (torch.float64 if isinstance(dtype, torch.dtype) else np.longdouble)
    return torch.finfo(torch.float64 if is_double else torch.float32).eps


# The definition.


@dataclasses.dataclass
class ExactRows:
    """Exact results for each row of logits. If the target of a row is ignored, its results are 0."""

    logp: Array  # [n], NaN for a target outside the vocabulary
    share: Array  # [n, V], d logp / d logits = onehot(target) - softmax
    labelled: np.ndarray  # [n], bool
    entropy: Array  # [n]
    mean_logit: Array  # [n]
    top1: Array  # [n]
    sum_p_squared: Array  # [n]
    largest_logit: float  # largest finite |logit| of the labelled rows


def score_rows(logits: Array, targets: np.ndarray, ignore_index: int) -> ExactRows:
    """Computes log-prob, gradient and statistics of each row."""
    n, vocab = logits.shape
    rows = ExactRows(
        logp=np.zeros(n, logits.dtype),
        share=np.zeros((n, vocab), logits.dtype),
        labelled=targets != ignore_index,
        entropy=np.zeros(n, logits.dtype),
        mean_logit=np.zeros(n, logits.dtype),
        top1=np.zeros(n, logits.dtype),
        sum_p_squared=np.zeros(n, logits.dtype),
        largest_logit=0.0,
    )
    for i in range(n):
        if not rows.labelled[i]:
            continue
        target = int(targets[i])
        if not 0 <= target < vocab:
            rows.logp[i] = np.nan
            rows.share[i] = np.nan
            continue
        row = logits[i]
        with np.errstate(all="ignore"):  # infinities and NaN are part of the contract
            shifted = row - row.max()
            log_p = shifted - np.log(np.exp(shifted).sum())
            p = np.exp(log_p)
            rows.logp[i] = log_p[target]
            rows.share[i] = -p
            rows.share[i, target] = -np.expm1(log_p[target])
            rows.entropy[i] = -(p * np.where(p > 0, log_p, 0)).sum()
            rows.mean_logit[i] = row.mean()
            rows.top1[i] = row[target] == row.max()
            rows.sum_p_squared[i] = np.square(p).sum()
        finite = np.abs(row[np.isfinite(row)])
        rows.largest_logit = max(rows.largest_logit, float(finite.max(initial=0.0)))
    return rows


def shifted_left(labels: np.ndarray, ignore_index: int) -> np.ndarray:
    """Returns the labels shifted by one: position t gets label t + 1, and the last position is ignored."""
    targets = np.full_like(labels, ignore_index)
    targets[:-1] = labels[1:]
    return targets


def token_logp_exact(
    logits: Tensor | Array,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    shift: bool = False,
    ignore_index: int = -100,
) -> tuple[Array, Array, Array]:
    """Computes the log-probabilities of labels, and the gradient of their weighted sum.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]``.
        weight: ``[...]``, the upstream gradient; None means ones.
        shift: Whether position t is scored against label t + 1, along the last axis of ``labels``.
        ignore_index: Positions with this label get log-probability 0.

    Returns:
        ``(logp, gradient, share)``: ``[...]``, ``[..., V]`` and ``[..., V]``. ``share`` is d logp / d logits of each
        position. ``gradient`` is ``weight * share``.
    """
    vocab = logits.shape[-1]
    targets = labels.cpu().numpy()
    if shift:
        targets = np.apply_along_axis(shifted_left, -1, targets, ignore_index) if targets.size else targets
    rows = score_rows(wide(logits).reshape(-1, vocab), targets.reshape(-1), ignore_index)
    scale = np.ones(labels.numel()) if weight is None else wide(weight).reshape(-1)
    gradient = np.where(rows.labelled[:, None], scale[:, None] * rows.share, 0)
    return rows.logp.reshape(labels.shape), gradient.reshape(logits.shape), rows.share.reshape(logits.shape)


class ExactShift:
    """Computes the reward shift with Python numbers, from the definition of RewardShift."""

    def __init__(
        self,
        mode: str = "cumulative",
        decay: float = 0.99,
        update: str = "before",
        value: float = 0.0,
        per: str = "micro_batch",
    ) -> None:
        self.mode, self.decay, self.order, self.value, self.per = mode, decay, update, value, per
        self.means: list[float] = []
        self.pending: list[tuple[float, int]] = []

    def __call__(self, reward_sum: float, count: int) -> float:
        """Adds ``count`` rewards of a micro-batch. Returns delta, the reward shift in the loss of this micro-batch."""
        before = self.value
        self.update(reward_sum, count)
        return self.value if self.order == "before" else before

    def update(self, reward_sum: float, count: int) -> None:
        """Adds the sum of ``count`` rewards. If ``per`` is "micro_batch", also updates the shift with ``step``."""
        self.pending.append((reward_sum, count))
        if self.per == "micro_batch":
            self.step()

    def step(self) -> None:
        """Updates the value with the mean of the rewards added since the last step."""
        total = sum(count for _, count in self.pending)
        reward_sum = sum(reward for reward, _ in self.pending)
        self.pending = []
        if total == 0 or self.mode == "fixed":
            return
        mean = reward_sum / total
        self.means.append(mean)
        if self.mode == "cumulative":
            self.value = sum(self.means) / len(self.means)
        else:
            self.value = self.decay * self.value + (1 - self.decay) * mean


@dataclasses.dataclass
class Exact:
    """The exact results of mpo_loss and its gradient, with the unavoidable rounding error of each result."""

    loss: Array
    dpo_loss: Array
    bco_loss: Array
    ntp_loss: Array
    chosen_logp: Array  # [B]
    rejected_logp: Array  # [B]
    chosen_reward: Array  # [B]
    rejected_reward: Array  # [B]
    reward_shift: Array
    tokens: np.ndarray  # [2B]
    stats: dict[str, Array]
    gradient: Array  # like logits
    share: Array  # like logits, onehot - softmax of the labelled rows
    # Absolute errors that correct arithmetic may make, by name of the result; see `_noise`.
    noise: dict[str, float]


def neg_log_sigmoid(x: Array) -> Array:
    """Returns -log(sigmoid(x)) without overflow."""
    return np.logaddexp(0, -x)


def sigmoid(x: Array) -> Array:
    """Returns 1 / (1 + exp(-x)), with a small relative error at both ends."""
    return np.exp(-neg_log_sigmoid(x))


def sequence_slices(labels: Tensor, cu_seqlens: Tensor | None) -> list[Any]:
    """Returns an index into logits and labels for each sequence: a slice if ``cu_seqlens`` is given, else a number."""
    if cu_seqlens is None:
        return list(range(labels.shape[0]))
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def mpo_exact(
    logits: Tensor | Array,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    ref_logits: Tensor | Array | None = None,
    *,
    reward_shift: float | Callable[[float, int], float] = 0.0,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    **options: Any,
) -> Exact:
    """Computes the exact loss, its terms, and the gradient of the logits.

    Args:
        logits: ``[2B, T, V]``, chosen first; or packed ``[N, V]``.
        labels: ``[2B, T]`` or ``[N]``.
        ref_logp: ``[2B]``, or None if ref_logits is given.
        ref_logits: Like logits.
        reward_shift: Delta, or a function that returns delta. The function's arguments are the sum of the batch's
            rewards, and the number of rewards.
        cu_seqlens: ``[2B + 1]`` for packed logits.
        shift: Whether position t is scored against label t + 1 of the same sequence.
        options: Settings of the loss; DEFAULTS has all of them.
    """
    o = {**DEFAULTS, **options}
    ignore_index = o["ignore_index"]
    where = sequence_slices(labels, cu_seqlens)
    pairs = len(where) // 2
    z, y = wide(logits), labels.cpu().numpy()
    real = z.dtype.type

    # 1. Every sequence: the log-probability of each of its tokens, and their sum.
    scored: list[ExactRows] = []
    for index in where:
        targets = shifted_left(y[index], ignore_index) if shift else y[index]
        scored.append(score_rows(z[index], targets, ignore_index))
    tokens = np.array([int(rows.labelled.sum()) for rows in scored])
    logp = np.array([rows.logp.sum() for rows in scored], z.dtype)

    # 2. The same under the reference.
    eps = accumulation_eps(logits.dtype)
    if ref_logits is not None:
        ref = np.zeros(2 * pairs, z.dtype)
        ref_noise = 0.0
        ref_z = wide(ref_logits)
        for i, index in enumerate(where):
            targets = shifted_left(y[index], ignore_index) if shift else y[index]
            ref_rows = score_rows(ref_z[index], targets, ignore_index)
            ref[i] = ref_rows.logp.sum()
            ref_noise = max(ref_noise, _sum_noise(ref_rows, eps))
    else:
        assert ref_logp is not None
        ref = wide(ref_logp).astype(z.dtype)
        ref_noise = 0.0

    # 3. Rewards. A pair that lacks a side compares nothing: its rewards are 0.
    with np.errstate(invalid="ignore"):
        reward = real(o["beta"]) * (logp - ref)
    valid = np.zeros(pairs, bool)
    for i in range(pairs):
        valid[i] = tokens[i] > 0 and tokens[pairs + i] > 0
        if not valid[i]:
            reward[i] = reward[pairs + i] = 0
    reward_sum = sum(reward[i] + reward[pairs + i] for i in range(pairs) if valid[i])
    delta = real(reward_shift(reward_sum, 2 * int(valid.sum())) if callable(reward_shift) else reward_shift)

    # 4. The terms, and their derivatives with respect to the two rewards of each pair.
    e = real(o["label_smoothing"])
    dpo, bco = real(0), real(0)
    d_reward = np.zeros(2 * pairs, z.dtype)
    for i in range(pairs):
        chosen, rejected = reward[i], reward[pairs + i]
        margin = chosen - rejected
        dpo += ((1 - e) * neg_log_sigmoid(margin) + e * neg_log_sigmoid(-margin)) / pairs
        bco += (neg_log_sigmoid(chosen - delta) + neg_log_sigmoid(-(rejected - delta))) / pairs
        if valid[i]:
            d_margin = real(o["dpo_weight"]) * (e * sigmoid(margin) - (1 - e) * sigmoid(-margin)) / pairs
            d_reward[i] = d_margin - real(o["bco_weight"]) * sigmoid(-(chosen - delta)) / pairs
            d_reward[pairs + i] = -d_margin + real(o["bco_weight"]) * sigmoid(rejected - delta) / pairs

    # 5. Next-token prediction over the chosen side, and the weight in the loss of each token of a sequence.
    d_logp = real(o["beta"]) * d_reward
    ntp = real(0)
    answers = [i for i in range(pairs) if tokens[i] > 0]
    for i in answers:
        divisor = int(tokens[:pairs].sum()) if o["ntp_average"] == "token" else int(tokens[i]) * len(answers)
        ntp -= logp[i] / divisor
        d_logp[i] -= real(o["ntp_weight"]) / divisor

    # 6. The gradient: each labelled row by its token's weight.
    gradient, share = np.zeros_like(z), np.zeros_like(z)
    for i, index in enumerate(where):
        share[index] = scored[i].share
        gradient[index] = np.where(scored[i].labelled[:, None], d_logp[i] * scored[i].share, 0)

    total = max(int(tokens.sum()), 1)
    stats = {name: np.asarray(sum(getattr(rows, name).sum() for rows in scored) / real(total)) for name in STATS}
    loss = real(o["dpo_weight"]) * dpo + real(o["bco_weight"]) * bco + real(o["ntp_weight"]) * ntp
    return Exact(
        loss=np.asarray(loss),
        dpo_loss=np.asarray(dpo),
        bco_loss=np.asarray(bco),
        ntp_loss=np.asarray(ntp),
        chosen_logp=logp[:pairs],
        rejected_logp=logp[pairs:],
        chosen_reward=reward[:pairs],
        rejected_reward=reward[pairs:],
        reward_shift=np.asarray(delta),
        tokens=tokens,
        stats=stats,
        gradient=gradient,
        share=share,
        noise=_noise(scored, tokens, ref, ref_noise, reward, eps, o),
    )


def _sum_noise(rows: ExactRows, eps: float) -> float:
    """Returns the possible error of a sequence's log-prob: ``eps`` times the sum of max(|logp|, 1) over all tokens."""
    # The 1 stands for the rounding of the logarithm's argument.
    finite = np.abs(rows.logp[rows.labelled & np.isfinite(rows.logp)])
    return float(eps * np.maximum(finite, 1).sum())


def _noise(
    scored: list[ExactRows],
    tokens: np.ndarray,
    ref: Array,
    ref_noise: float,
    rewards: Array,
    eps: float,
    o: dict[str, Any],
) -> dict[str, float]:
    """Returns the unavoidable absolute error of each result, by name."""
    # A reward is a small difference of two large sums. Rounding a sum once therefore causes a large relative error of
    # the reward and of the losses computed from it. In a test, the allowed error is a multiple of eager torch's error
    # plus the unavoidable error. Eager torch's error alone is not enough, because it may be small by chance.
    # For each term of the loss, the absolute derivative with respect to a reward is at most 1. The absolute second
    # derivative is at most 1/4. The errors of the terms and of the gradient follow from these two bounds.
    pairs = len(scored) // 2
    logp = max(_sum_noise(rows, eps) for rows in scored)
    reward = o["beta"] * (logp + ref_noise + eps * float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0)))
    longest = max(float(np.abs(rows.logp[np.isfinite(rows.logp)]).max(initial=1.0)) for rows in scored)
    # The shift is a mean of rewards, and possibly of earlier values; BCO contains it twice.
    shift = reward + eps * (1 + float(np.abs(rewards[np.isfinite(rewards)]).max(initial=0.0)))
    dpo, bco, ntp = 2 * reward, 2 * (reward + shift), eps * max(longest, 1.0)
    chosen_tokens = [int(count) for count in tokens[:pairs] if count > 0]
    if o["ntp_average"] == "token":
        divisor = max(sum(chosen_tokens), 1)
    else:
        divisor = min(chosen_tokens, default=1) * max(len(chosen_tokens), 1)
    per_token = o["beta"] / pairs * (o["dpo_weight"] + o["bco_weight"]) * (reward + eps)
    vocab = scored[0].share.shape[1]
    return {
        "chosen_logp": logp,
        "rejected_logp": logp,
        "chosen_reward": reward,
        "rejected_reward": reward,
        "reward_shift": shift,
        "dpo_loss": dpo,
        "bco_loss": bco,
        "ntp_loss": ntp,
        "loss": o["dpo_weight"] * dpo + o["bco_weight"] * bco + o["ntp_weight"] * ntp,
        "gradient": per_token + eps * o["ntp_weight"] / divisor,  # per unit of onehot - softmax
        "entropy": 2 * eps * max(float(np.log(vocab)), 1.0),
        "mean_logit": eps * max(rows.largest_logit for rows in scored),
        "top1": eps,
        "sum_p_squared": 2 * eps,
    }


# Logits from hidden states and an output head.


@dataclasses.dataclass(frozen=True)
class ExactHead:
    """Exact logits of hidden states and a head. Methods compute exact gradients."""

    hidden: Array  # [..., D]
    weight: Array  # [V, D]
    logits: Array  # [..., V]
    slope: Array  # [..., V], d logit / d (hidden @ weight.T + bias)
    magnitude: Array  # [..., V], a logit if no terms of its product cancelled: one rounding of it is allowed

    def gradients(self, gradient: Array) -> dict[str, Array]:
        """Returns the gradients of hidden, weight and bias. ``gradient`` is the gradient of the logits."""
        vocab, depth = self.weight.shape
        used = (gradient != 0).any(-1).reshape(-1)
        by_product = (gradient * self.slope).reshape(-1, vocab)[used]
        by_hidden = np.zeros((used.size, depth), gradient.dtype)
        by_hidden[used] = by_product @ self.weight
        return {
            "hidden": by_hidden.reshape(self.hidden.shape),
            "weight": by_product.T @ self.hidden.reshape(-1, depth)[used],
            "bias": by_product.sum(0),
        }

    def sizes(self, gradient: Array) -> dict[str, Array]:
        """Returns the gradients for the absolute values of all inputs, so that no terms cancel.

        The errors of a kernel may be proportional to these values.
        """
        positive = dataclasses.replace(
            self, hidden=np.abs(self.hidden), weight=np.abs(self.weight), slope=np.abs(self.slope)
        )
        return positive.gradients(np.abs(gradient))


def head_exact(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> ExactHead:
    """Returns the exact logits: cap * tanh(logit_scale * (hidden @ weight.T + bias) / cap) / temperature."""
    is_double = torch.float64 in (hidden.dtype, weight.dtype)
    h, w = (wide(x).astype(np.longdouble if is_double else np.float64) for x in (hidden, weight))
    real = h.dtype.type
    b = np.zeros(w.shape[0], h.dtype) if bias is None else wide(bias).astype(h.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        inner = real(logit_scale) * (h @ w.T + b)
        size = np.abs(real(logit_scale)) * (np.abs(h) @ np.abs(w).T + np.abs(np.where(np.isfinite(b), b, 0)))
        slope = np.full_like(inner, logit_scale)
        if softcap is not None:
            slope = slope / np.cosh(inner / real(softcap)) ** 2
            inner = real(softcap) * np.tanh(inner / real(softcap))
    return ExactHead(h, w, inner / real(temperature), slope / real(temperature), size / real(temperature))


def head_eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Returns differentiable logits, computed by torch in the dtype of the tensors."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


# Eager torch.


def token_logp_eager(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, *, shift: bool = False, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Returns ``(logp, gradient)``, computed by plain torch. The gradient has the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    targets = _eager_targets(labels, shift, ignore_index)
    logp = _eager_logp(leaf, targets, ignore_index)
    (gradient,) = torch.autograd.grad(logp, leaf, torch.ones_like(logp) if weight is None else weight)
    return logp.detach(), gradient


def _eager_targets(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    if not shift:
        return labels
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], dim=-1)


def _eager_logp(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    labelled = targets != ignore_index
    picked = z.log_softmax(-1).gather(-1, torch.where(labelled, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labelled, picked, 0)


def mpo_eager(
    logits: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    ref_logits: Tensor | None = None,
    *,
    reward_shift: float = 0.0,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Computes the loss in plain torch, with the gradient from autograd. Returns a dict with the fields of Exact.

    The arguments are those of mpo_exact, except that reward_shift must be a number.
    """
    o = {**DEFAULTS, **options}
    leaf = logits.detach().clone().requires_grad_()
    where = sequence_slices(labels, cu_seqlens)
    pairs = len(where) // 2
    targets = [_eager_targets(labels[index], shift, o["ignore_index"]) for index in where]
    token_logp = [_eager_logp(leaf[index], y, o["ignore_index"]) for index, y in zip(where, targets, strict=True)]
    logp = torch.stack([row.sum() for row in token_logp])
    if ref_logits is not None:
        with torch.no_grad():
            ref = torch.stack(
                [
                    _eager_logp(ref_logits[index], y, o["ignore_index"]).sum()
                    for index, y in zip(where, targets, strict=True)
                ]
            )
    else:
        assert ref_logp is not None
        ref = ref_logp.to(logp.dtype)
    labelled = [y != o["ignore_index"] for y in targets]
    tokens = torch.stack([row.sum() for row in labelled])
    valid = (tokens[:pairs] > 0) & (tokens[pairs:] > 0)
    reward = o["beta"] * (logp - ref)
    chosen = torch.where(valid, reward[:pairs], 0)
    rejected = torch.where(valid, reward[pairs:], 0)
    margin, e = chosen - rejected, o["label_smoothing"]
    dpo = (-(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)).mean()
    bco = (-F.logsigmoid(chosen - reward_shift) - F.logsigmoid(-(rejected - reward_shift))).mean()
    count = tokens[:pairs]
    if o["ntp_average"] == "token":
        ntp = -logp[:pairs].sum() / count.sum().clamp(min=1)
    else:
        ntp = -(logp[:pairs] / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
    loss = o["dpo_weight"] * dpo + o["bco_weight"] * bco + o["ntp_weight"] * ntp
    (gradient,) = torch.autograd.grad(loss, leaf)

    total = tokens.sum().clamp(min=1)
    stats: dict[str, Any] = dict.fromkeys(STATS, 0)
    for index, y, is_labelled in zip(where, targets, labelled, strict=True):
        z = logits[index] if logits.dtype == torch.float64 else logits[index].float()
        z = z[is_labelled]
        picked = y[is_labelled].unsqueeze(-1)
        log_p = z.log_softmax(-1)
        stats["entropy"] = stats["entropy"] - torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0).sum() / total
        stats["mean_logit"] = stats["mean_logit"] + z.mean(-1).sum() / total
        hits = (z.gather(-1, picked).squeeze(-1) == z.amax(-1)).to(z.dtype)
        stats["top1"] = stats["top1"] + hits.sum() / total
        stats["sum_p_squared"] = stats["sum_p_squared"] + log_p.exp().square().sum() / total
    return {
        "loss": loss.detach(),
        "dpo_loss": dpo.detach(),
        "bco_loss": bco.detach(),
        "ntp_loss": ntp.detach(),
        "chosen_logp": logp[:pairs].detach(),
        "rejected_logp": logp[pairs:].detach(),
        "chosen_reward": chosen.detach(),
        "rejected_reward": rejected.detach(),
        "reward_shift": torch.tensor(float(reward_shift), dtype=logp.dtype),
        "stats": stats,
        "gradient": gradient,
    }


# The bound.


def assert_as_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Array,
    factor: float = 2.0,
    *,
    noise: float = 0.0,
    name: str = "result",
) -> None:
    """Raises if the error of a result exceeds ``factor`` times the error of eager torch in the same dtype.

    Two numbers are added to this limit: ``noise``, the unavoidable absolute error, and the rounding error of the
    largest exact value. Infinities and NaN must match.
    """
    # A fixed atol would hide mistakes. With a vocabulary of 150k, a typical gradient entry is 1e-5, so a kernel that
    # writes zeros would pass atol=5e-5.
    exact = np.asarray(exact)
    assert tuple(actual.shape) == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {exact.shape}"
    if exact.size == 0:
        return
    got, usual = wide(actual), wide(eager)
    finite = np.isfinite(exact)
    same = (got == exact) | (np.isnan(got) & np.isnan(exact))
    wrong = ~np.where(finite, np.isfinite(got), same)
    if wrong.any():
        worst = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(f"{name}{list(worst)}: got {got[worst]}, expected {exact[worst]}")
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - exact), 0)
        usual_error = np.where(finite & np.isfinite(usual), np.abs(usual - exact), 0)
    info = torch.finfo(actual.dtype)
    largest = float(np.abs(exact[finite]).max(initial=0.0))
    allowed = factor * usual_error.max() + info.eps * largest + info.smallest_normal * info.eps + noise
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    assert error[worst] <= allowed, (
        f"{name}{list(worst)} of shape {exact.shape}: error {float(error[worst]):.3e}, allowed {float(allowed):.3e}; "
        f"got {got[worst]!r}, eager {usual[worst]!r}, exact {exact[worst]!r}"
    )


def assert_gradient_as_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Array,
    share: Array,
    factor: float = 2.0,
    *,
    noise: float = 0.0,
    name: str = "gradient",
) -> None:
    """Checks a gradient of logits. Checks the labels' entries, and separately the many small entries of other tokens.

    In half precision, the rounding error of a label's entry can exceed the largest of the other entries. So the other
    entries are also checked by their relative errors. The limit is ``factor`` times the largest relative error of
    eager torch, plus the errors of a few roundings and the effect of ``noise``.

    Args:
        actual: ``[..., V]``, in the dtype of the logits.
        eager: ``[..., V]``, in the dtype of the logits.
        exact: ``[..., V]``.
        share: ``[..., V]``, ``onehot(label) - softmax(logits)``; only the label's entry is positive.
        factor: Allowed multiple of the error of eager torch.
        noise: Unavoidable absolute error of the upstream gradient of a row's log-prob.
        name: Name of the gradient in the failure message.
    """
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, expected {eager.dtype}"
    assert_as_accurate(actual, eager, exact, factor, noise=noise, name=name)
    usable = np.isfinite(exact)
    got, usual = wide(actual), wide(eager)
    on_label = usable & (share > 0)
    if on_label.any():
        # 1 - p of a confident label is only as accurate as the logarithm that it comes from.
        weight = float(np.abs(exact[on_label] / share[on_label]).max())
        assert_as_accurate(
            actual[torch.from_numpy(on_label)],
            eager[torch.from_numpy(on_label)],
            exact[on_label],
            factor,
            noise=noise + accumulation_eps(actual.dtype) * weight,
            name=f"{name} of the labels",
        )
    info = torch.finfo(actual.dtype)
    off_label = usable & ~on_label
    size = np.abs(exact)
    normal = off_label & (size >= info.smallest_normal)
    usual_error = 0.0
    if normal.any():
        usual_error = float((np.abs(usual[normal] - exact[normal]) / size[normal]).max())
    # Float16 is less accurate below its normal numbers. Float32 arithmetic may flush there, for bfloat16 too.
    tiny = info.smallest_normal * (info.eps if actual.dtype == torch.float16 else 1)
    # exp(a) turns one rounding of its argument into |a| roundings of the result; a few entries may not show that.
    with np.errstate(divide="ignore"):
        exponent = np.minimum(np.abs(np.log(np.abs(share))), 1000)
    rounding = info.eps + accumulation_eps(actual.dtype) * (2 + exponent)
    allowed = (factor * usual_error + rounding) * size + noise * np.abs(share) + tiny
    error = np.where(off_label, np.abs(got - exact), 0)
    with np.errstate(invalid="ignore"):
        excess = np.where(off_label, error / allowed, 0)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    assert not excess[worst] > 1, (
        f"{name}{list(worst)} off the label: error {float(error[worst]):.3e}, allowed {float(allowed[worst]):.3e}; "
        f"got {got[worst]!r}, eager {usual[worst]!r}, exact {exact[worst]!r}"
    )


def assert_product_as_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Array,
    size: Array,
    factor: float = 2.0,
    *,
    noise: float = 0.0,
    extra: Array | float = 0.0,
    name: str = "product",
) -> None:
    """Checks a matrix product. An entry of the product is a sum of terms.

    The error of an entry is divided by ``size``, so that the errors of small entries count, too. The largest quotient
    may be ``factor`` times the largest quotient of eager torch, plus the machine epsilon and ``noise``. An entry
    without nonzero terms must be 0.

    Args:
        actual: The product to check, of any shape. The arrays below have the same shape.
        eager: The product that eager torch computes. Its dtype may be wider.
        exact: The exact product.
        size: Sum of the absolute values of each entry's terms.
        factor: Allowed multiple of the error of eager torch.
        noise: Unavoidable relative error of a term.
        extra: Unavoidable absolute error of each entry.
        name: Name of the product in the failure message.
    """
    assert tuple(actual.shape) == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {exact.shape}"
    got, usual = wide(actual), wide(eager)
    info = torch.finfo(actual.dtype)
    has_terms = size > 0
    assert not got[~has_terms].any(), f"{name}: got {got[~has_terms][got[~has_terms] != 0][0]} where nothing adds up"
    safe = np.where(has_terms, size, 1)
    usual_error = float((np.abs(usual - exact) / safe)[has_terms].max(initial=0.0))
    # Float16 is less accurate below its normal numbers; float32 arithmetic may flush there, for bfloat16 too.
    tiny = info.smallest_normal * (info.eps if actual.dtype == torch.float16 else 1)
    allowed = (factor * usual_error + info.eps + noise) * size + extra + tiny
    error = np.abs(got - exact)
    if error.size == 0 or (error <= allowed).all():
        return
    excess = np.where(np.isnan(error), np.inf, error / allowed)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    raise AssertionError(
        f"{name}{list(worst)} of shape {exact.shape}: error {float(error[worst]):.3e}, allowed "
        f"{float(allowed[worst]):.3e}; got {got[worst]!r}, eager {usual[worst]!r}, exact {exact[worst]!r}"
    )


FIELDS = (
    "chosen_logp",
    "rejected_logp",
    "chosen_reward",
    "rejected_reward",
    "reward_shift",
    "dpo_loss",
    "bco_loss",
    "ntp_loss",
    "loss",
)


def assert_output_as_accurate(
    output: Any,
    gradient: Tensor | None,
    exact: Exact,
    eager: dict[str, Any],
    *,
    stats: Sequence[str] = (),
    upstream: float = 1.0,
    factor: float = 2.0,
) -> None:
    """Checks every field of an MPOOutput.

    If ``gradient`` is given, it is compared with the gradient of ``loss`` times ``upstream``.
    """
    dtype = torch.float64 if eager["loss"].dtype == torch.float64 else torch.float32
    for name in FIELDS:
        actual = getattr(output, name)
        assert actual.dtype == dtype, f"{name}: {actual.dtype}, expected {dtype}"
        assert_as_accurate(actual, eager[name], getattr(exact, name), factor, noise=exact.noise[name], name=name)
    assert output.tokens.dtype == torch.int64
    assert output.tokens.tolist() == exact.tokens.tolist()
    assert set(output.stats) == set(stats)
    for name in stats:
        actual = output.stats[name]
        assert actual.dtype == dtype, f"{name}: {actual.dtype}, expected {dtype}"
        assert_as_accurate(
            actual,
            torch.as_tensor(eager["stats"][name]),
            exact.stats[name],
            factor,
            noise=exact.noise[name],
            name=name,
        )
    if gradient is not None:
        scaled = (eager["gradient"] * upstream).to(eager["gradient"].dtype)
        assert_gradient_as_accurate(
            gradient,
            scaled,
            upstream * exact.gradient,
            exact.share,
            factor,
            noise=abs(upstream) * exact.noise["gradient"],
        )


# Data.


@dataclasses.dataclass(frozen=True)
class Case:
    """A test case of mpo_loss: contiguous inputs on the CPU, with methods for the exact and the eager results."""

    logits: Tensor
    labels: Tensor
    ref_logp: Tensor | None = None
    ref_logits: Tensor | None = None
    cu_seqlens: Tensor | None = None
    shift: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def _arguments(self) -> dict[str, Any]:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**arguments, **arguments.pop("options")}

    def exact(self, reward_shift: float | Callable[[float, int], float] = 0.0) -> Exact:
        """Returns the exact results of the oracle."""
        return mpo_exact(**self._arguments(), reward_shift=reward_shift)

    def eager(self, reward_shift: float = 0.0) -> dict[str, Any]:
        """Returns the results of plain torch."""
        return mpo_eager(**self._arguments(), reward_shift=reward_shift)


def make_logits(rows: int, vocab: int, dtype: torch.dtype, kind: str, labels: Tensor, seed: int) -> Tensor:
    """Returns logits ``[rows, V]`` of a kind: "flat", "peaked", or "offset" (peaked, with 10,000 added).

    In a peaked row, a few logits are much larger than the others, as in a trained model. In two of three peaked rows,
    the label has a probability between 0.5 and almost 1.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "flat":
        return torch.randn(rows, vocab, generator=generator, dtype=torch.float64).to(dtype)
    logits = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    peaks = torch.randint(vocab, (rows, 3), generator=generator)
    logits.scatter_(-1, peaks, 12 + torch.randn(rows, 3, generator=generator, dtype=torch.float64))
    for row in range(rows):
        if row % 3 != 0 and 0 <= int(labels[row]) < vocab:
            others = logits[row].logsumexp(-1)
            logits[row, int(labels[row])] = others + 10 * torch.rand((), generator=generator, dtype=torch.float64)
    return (logits + (1e4 if kind == "offset" else 0)).to(dtype)


@functools.lru_cache(maxsize=4)
def make_case(
    dtype: torch.dtype,
    vocab: int,
    kind: str = "peaked",
    pairs: int = 2,
    length: int = 6,
    packed: bool = False,
    labelled: float = 0.5,
    seed: int = 0,
) -> Case:
    """Returns a random test case; ``labelled`` is the approximate fraction of labelled positions.

    If the fraction is strictly between 0 and 1, the last position of every sequence has a label.
    """
    generator = torch.Generator().manual_seed(1000 * seed + vocab)
    if packed:
        lengths = [length - i % 3 if length > 3 else length for i in range(2 * pairs)]
    else:
        lengths = [length] * (2 * pairs)
    rows = sum(lengths)
    labels = torch.randint(vocab, (rows,), generator=generator)
    keep = torch.rand(rows, generator=generator) < labelled
    starts = np.cumsum([0, *lengths])
    if 0 < labelled < 1:
        keep[torch.from_numpy(starts[1:] - 1)] = True
    labels = torch.where(keep, labels, -100)
    targets = torch.cat([labels[1:], labels[:1]])
    logits = make_logits(rows, vocab, dtype, kind, targets, seed)
    # A reference near the policy, so that rewards and their differences are of order 1.
    logp = _eager_logp(logits, targets, -100)
    ref_logp = torch.stack([logp[a:b].sum() for a, b in itertools.pairwise(starts)])
    ref_logp = (ref_logp + 10 * torch.randn(2 * pairs, generator=generator)).float()
    if packed:
        return Case(logits, labels, ref_logp, cu_seqlens=torch.from_numpy(starts).to(torch.int32))
    return Case(logits.view(2 * pairs, length, vocab), labels.view(2 * pairs, length), ref_logp)


LAYOUTS = ("contiguous", "sliced", "unaligned", "transposed")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Copies a tensor into new memory with the given layout. The memory around the values is NaN.

    - "contiguous".
    - "sliced": a view ``[:, :-1]`` of a tensor with one more position per sequence.
    - "unaligned": a view of wider rows. Its rows may start at any address.
    - "transposed": a view whose last axis, V, is not contiguous.
    """
    if layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    *outer, rows, vocab = tensor.shape
    if layout == "sliced":
        memory = torch.full((*outer, rows + 1, vocab), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = memory[..., :-1, :]
    elif layout == "unaligned":
        memory = torch.full((*outer, rows + 2, vocab + 5), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = memory[..., 1:-1, 1 : vocab + 1]
    else:
        memory = torch.full((*outer, vocab, rows + 1), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = memory[..., :, 1:].transpose(-1, -2)
    view.copy_(tensor)
    return view
