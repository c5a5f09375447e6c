"""The preference losses that the MPO paper compares, on log-probs of whole responses: plain torch, one loss per pair.

``mpo_loss`` computes MPO itself. These losses are for custom training loops and for comparisons with MPO.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_ext.checks import check_number, did_you_mean

#: Temperature of the mixing weight in "discopop", as in its paper and in TRL by default.
DISCOPOP_TAU = 0.05


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The checked inputs of a loss, with 0 for every number of a pair that lacks a side.

    S is the sum of a response's label log-probs, n the number of its labels, and ``h = S - S^ref`` its log-ratio.

    Attributes:
        chosen_logp: ``[B]``, S_c.
        rejected_logp: ``[B]``, S_r.
        ref_chosen_logp: ``[B]``, S_c^ref without gradient; zeros for a loss without reference.
        ref_rejected_logp: ``[B]``, S_r^ref without gradient; zeros for a loss without reference.
        chosen_tokens: ``[B]``, n_c in the dtype of the log-probs, at least 1.
        rejected_tokens: ``[B]``, n_r in the dtype of the log-probs, at least 1.
        has_both_sides: ``[B]``, bool.
        beta: Temperature, as in ``preference_loss``.
        label_smoothing: Fraction of pairs assumed to be labelled in reverse, in ``[0, 0.5)``.
        delta: Reward shift: a number, or a 0-d tensor without gradient.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    ref_chosen_logp: Tensor
    ref_rejected_logp: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    has_both_sides: Tensor
    beta: float
    label_smoothing: float
    delta: float | Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """h_c, ``[B]``."""
        return self.chosen_logp - self.ref_chosen_logp

    @property
    def rejected_ratio(self) -> Tensor:
        """h_r, ``[B]``."""
        return self.rejected_logp - self.ref_rejected_logp

    @property
    def margin(self) -> Tensor:
        """``m = beta * (h_c - h_r)``, ``[B]``."""
        return self.beta * (self.chosen_ratio - self.rejected_ratio)

    @property
    def mean_margin(self) -> Tensor:
        """``h_c / n_c - h_r / n_r``, ``[B]``: the margin per token, without beta."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """A loss, and the arguments that it supports.

    Attributes:
        function: Returns the loss of each pair, ``[B]``. Its value for a pair without both sides is ignored.
        needs_reference: Whether it compares with a reference model.
        whole_batch: Whether a pair's loss depends on the other pairs of the call, and so on the micro-batch.
        label_smoothing: Whether ``label_smoothing`` must be 0, may be positive, or must be positive.
        takes_delta: Whether it has a reward shift.
    """

    function: Callable[[Pairs], Tensor]
    needs_reference: bool = True
    whole_batch: bool = False
    label_smoothing: Literal["zero", "optional", "positive"] = "zero"
    takes_delta: bool = False


def preference_loss(
    name: str,
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    delta: float | Tensor = 0.0,
) -> Tensor:
    """Returns the preference loss of each pair, in nats; the paper of each loss minimises its mean over pairs.

    A pair with an empty side is not compared: its loss and gradient are 0 whatever its log-probs are, and no other
    pair is compared with it. (In the DPO and BCO of ``mpo_loss`` such a pair is a constant, with the same gradient.)
    A NaN among the log-probs makes the loss of its pair, or the mean over the batch, not finite.

    Args:
        name: A key of ``LOSSES``: the usual name, and that of TRL 1.16 if TRL has the loss.
        chosen_logp: ``[B]``, float32 or float64: the sum of the label log-probs of each chosen response.
        rejected_logp: ``[B]``: the same for the rejected responses, in the same dtype.
        ref_chosen_logp: ``[B]``: the same under the reference model, without gradient. A loss that needs no reference
            accepts None, and ignores a tensor.
        ref_rejected_logp: ``[B]``: the same for the rejected responses.
        chosen_tokens: ``[B]``, int32 or int64: the number of labels of each chosen response.
        rejected_tokens: ``[B]``: the same for the rejected responses.
        beta: Temperature of the implicit reward ``beta * h``; tau in "ipo", 1 / eta in "sppo_hard", and the weight
            lambda in "orpo".
        label_smoothing: Fraction of pairs assumed to be labelled in reverse, in ``[0, 0.5)``.
        delta: Reward shift of "bco_pair": a number, or a 0-d tensor, which the host does not wait for.

    Returns:
        ``[B]``, in the dtype of the log-probs.

    Raises:
        TypeError: If an argument is of the wrong type or dtype.
        ValueError: If the name is unknown, a shape, device or number is wrong, or the loss does not support the given
            ``label_smoothing`` or ``delta``.
    """
    loss = _find(name)
    _check_tensor("chosen_logp", chosen_logp, (torch.float32, torch.float64))
    _check_tensor("rejected_logp", rejected_logp, (chosen_logp.dtype,), chosen_logp)
    if loss.needs_reference:
        _check_tensor("ref_chosen_logp", ref_chosen_logp, (chosen_logp.dtype,), chosen_logp)
        _check_tensor("ref_rejected_logp", ref_rejected_logp, (chosen_logp.dtype,), chosen_logp)
    _check_tensor("chosen_tokens", chosen_tokens, (torch.int32, torch.int64), chosen_logp)
    _check_tensor("rejected_tokens", rejected_tokens, (torch.int32, torch.int64), chosen_logp)
    _check_settings(loss, name, beta, label_smoothing, delta)

    has_both_sides = (chosen_tokens > 0) & (rejected_tokens > 0)
    zeros = torch.zeros_like(chosen_logp)

    def masked(logp: Tensor | None) -> Tensor:
        # Before the loss, so that a NaN of an empty side does not reach a gradient.
        return zeros if logp is None else torch.where(has_both_sides, logp, zeros)

    references = (ref_chosen_logp, ref_rejected_logp) if loss.needs_reference else (None, None)
    ref_chosen, ref_rejected = (None if logp is None else logp.detach() for logp in references)
    pairs = Pairs(
        chosen_logp=masked(chosen_logp),
        rejected_logp=masked(rejected_logp),
        ref_chosen_logp=masked(ref_chosen),
        ref_rejected_logp=masked(ref_rejected),
        chosen_tokens=chosen_tokens.clamp(min=1).to(chosen_logp.dtype),
        rejected_tokens=rejected_tokens.clamp(min=1).to(chosen_logp.dtype),
        has_both_sides=has_both_sides,
        beta=float(beta),
        label_smoothing=float(label_smoothing),
        delta=delta.detach() if isinstance(delta, Tensor) else float(delta),
    )
    return torch.where(has_both_sides, loss.function(pairs), zeros)


def _logistic(pairs: Pairs, margin: Tensor) -> Tensor:
    """Returns ``-(1 - e) * log sigmoid(m) - e * log sigmoid(-m)`` for a label smoothing e."""
    smoothing = pairs.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _sigmoid(pairs: Pairs) -> Tensor:
    """DPO (arXiv 2305.18290): ``-log sigmoid(m)``.

    With label smoothing e it is conservative DPO (a note of E. Mitchell, 2023, without arXiv number):
    ``-(1 - e) * log sigmoid(m) - e * log sigmoid(-m)``, as in TRL before 0.29.
    """
    return _logistic(pairs, pairs.margin)


def _bco_pair(pairs: Pairs) -> Tensor:
    """BCO (arXiv 2404.04656) on pairs: ``-log sigmoid(beta * h_c - delta) - log sigmoid(delta - beta * h_r)``.

    In TRL since 0.29, delta is 0.
    """
    chosen_reward, rejected_reward = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen_reward - pairs.delta) - F.logsigmoid(pairs.delta - rejected_reward)


def _ipo(pairs: Pairs) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): ``(h_c / n_c - h_r / n_r - 1 / (2 * beta))^2``.

    The log-ratios are per token, as in TRL, on the advice of the paper's authors; the paper writes sums.
    """
    return (pairs.mean_margin - 1 / (2 * pairs.beta)).square()


def _robust(pairs: Pairs) -> Tensor:
    """Robust DPO (arXiv 2403.00409): ``((1 - e) * -log sigmoid(m) - e * -log sigmoid(-m)) / (1 - 2e)``.

    It is an unbiased estimate of DPO's loss if a fraction e of the labels is flipped, and negative for a large m.
    """
    smoothing = pairs.label_smoothing
    clean, flipped = -F.logsigmoid(pairs.margin), -F.logsigmoid(-pairs.margin)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def _hinge(pairs: Pairs) -> Tensor:
    """Hinge loss of RSO (arXiv 2309.06657): ``max(0, 1 - m)``."""
    return torch.relu(1 - pairs.margin)


def _sppo_hard(pairs: Pairs) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) with win probabilities 1 and 0.

    ``(h_c - 1 / (2 * beta))^2 + (h_r + 1 / (2 * beta))^2``
    """
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def _aot(pairs: Pairs) -> Tensor:
    """AOT for paired data (arXiv 2406.05882): the policy's margins against the reference's, both sorted.

    ``-log sigmoid(beta * (a_(k) - b_(k)))`` with ``a = S_c - S_r``, ``b = S_c^ref - S_r^ref`` and rank k; label
    smoothing as in conservative DPO.
    """
    return _sorted_logistic(
        pairs, pairs.chosen_logp - pairs.rejected_logp, pairs.ref_chosen_logp - pairs.ref_rejected_logp
    )


def _aot_unpaired(pairs: Pairs) -> Tensor:
    """AOT for unpaired data (arXiv 2406.05882): chosen against rejected log-ratios, both sorted.

    As "aot" with ``a = h_c`` and ``b = h_r``. Earlier TRL calls this loss "aot_pair".
    """
    return _sorted_logistic(pairs, pairs.chosen_ratio, pairs.rejected_ratio)


def _sorted_logistic(pairs: Pairs, better: Tensor, worse: Tensor) -> Tensor:
    """Compares two ``[B]`` rank by rank over the pairs with both sides. Returns for each pair the loss of its rank.

    The rank of a pair is that of its value in ``better``.
    """
    better, order = torch.where(pairs.has_both_sides, better, torch.inf).sort()
    worse = torch.where(pairs.has_both_sides, worse, torch.inf).sort().values
    is_filler = (better == torch.inf) & (worse == torch.inf)
    gap = torch.where(is_filler, 0.0, better - worse)
    return torch.zeros_like(gap).scatter(0, order, _logistic(pairs, pairs.beta * gap))


def _orpo(pairs: Pairs) -> Tensor:
    """Odds-ratio term of ORPO (arXiv 2403.07691): ``-beta * log sigmoid(log odds_c - log odds_r)``.

    ``odds = p / (1 - p)`` with ``log p = S / n``, the mean log-prob. The caller adds the cross entropy of the chosen
    responses, which ORPO has with weight 1. ``1 - p`` is at least the dtype's epsilon.
    """
    return -pairs.beta * F.logsigmoid(
        _log_odds(pairs.chosen_logp / pairs.chosen_tokens) - _log_odds(pairs.rejected_logp / pairs.rejected_tokens)
    )


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _exo_pair(pairs: Pairs) -> Tensor:
    """EXO on pairs (arXiv 2402.00856, eq. 16): the KL divergence of ``(sigmoid(m), sigmoid(-m))`` from ``(1 - e, e)``.

    ``sigmoid(m) * (log sigmoid(m) - log(1 - e)) + sigmoid(-m) * (log sigmoid(-m) - log e)``; e = 1e-3 in the paper.
    """
    margin, smoothing = pairs.margin, pairs.label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))


def _nca_pair(pairs: Pairs) -> Tensor:
    """NCA on pairs (arXiv 2402.05369), with ``r = beta * h``.

    ``-log sigmoid(r_c) - log sigmoid(-r_c) / 2 - log sigmoid(-r_r) / 2``
    """
    chosen_reward, rejected_reward = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen_reward) - (F.logsigmoid(-chosen_reward) + F.logsigmoid(-rejected_reward)) / 2


def _apo_zero(pairs: Pairs) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): ``1 - sigmoid(beta * h_c) + sigmoid(beta * h_r)``.

    For chosen responses that are better than the model's own.
    """
    return torch.sigmoid(-pairs.beta * pairs.chosen_ratio) + torch.sigmoid(pairs.beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): ``sigmoid(beta * h_c) + 1 - sigmoid(m)``.

    For chosen responses that are worse than the model's own.
    """
    return torch.sigmoid(pairs.beta * pairs.chosen_ratio) + torch.sigmoid(-pairs.margin)


def _discopop(pairs: Pairs) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): ``-(1 - s) * log sigmoid(m) + s * exp(-m)``, ``s = sigmoid(m / 0.05)``."""
    margin = pairs.margin
    ratio = margin / DISCOPOP_TAU
    exponential = torch.exp(F.logsigmoid(ratio) - margin)  # as a product it is 0 * inf for a margin far below 0
    return exponential - torch.sigmoid(-ratio) * F.logsigmoid(margin)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    """Length-normalised DPO (arXiv 2411.15124): ``-log sigmoid(beta * (h_c / n_c - h_r / n_r))``."""
    return -F.logsigmoid(pairs.beta * pairs.mean_margin)


#: Every loss by name. TRL's "sft" has no rejected side and is missing here; ``mpo_loss`` has it, with either average.
LOSSES: Mapping[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(function=_sigmoid, label_smoothing="optional"),
    "bco_pair": PreferenceLoss(function=_bco_pair, takes_delta=True),
    "ipo": PreferenceLoss(function=_ipo),
    "robust": PreferenceLoss(function=_robust, label_smoothing="optional"),
    "hinge": PreferenceLoss(function=_hinge),
    "sppo_hard": PreferenceLoss(function=_sppo_hard),
    "aot": PreferenceLoss(function=_aot, whole_batch=True, label_smoothing="optional"),
    "aot_unpaired": PreferenceLoss(function=_aot_unpaired, whole_batch=True, label_smoothing="optional"),
    "orpo": PreferenceLoss(function=_orpo, needs_reference=False),
    "exo_pair": PreferenceLoss(function=_exo_pair, label_smoothing="positive"),
    "nca_pair": PreferenceLoss(function=_nca_pair),
    "apo_zero": PreferenceLoss(function=_apo_zero),
    "apo_down": PreferenceLoss(function=_apo_down),
    "discopop": PreferenceLoss(function=_discopop),
    "sigmoid_norm": PreferenceLoss(function=_sigmoid_norm),
}


def _find(name: str) -> PreferenceLoss:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name not in LOSSES:
        hint = did_you_mean(name, LOSSES, f"; known losses: {', '.join(LOSSES)}")
        raise ValueError(f"unknown loss {name!r}{hint}")
    return LOSSES[name]


def _check_tensor(
    name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None
) -> None:
    """Raises unless the tensor is ``[B]``, has one of the dtypes, and has the shape and device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be [B], got shape {list(tensor.shape)}")
    if like is None:
        return
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must be [{like.shape[0]}] as chosen_logp is, got shape {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of chosen_logp, {like.device}, got {tensor.device}")


def _check_settings(
    loss: PreferenceLoss, name: str, beta: float, label_smoothing: float, delta: float | Tensor
) -> None:
    check_number("beta", beta, "(0, inf)")
    check_number("label_smoothing", label_smoothing, "[0, 0.5)")
    if loss.label_smoothing == "zero" and label_smoothing != 0:
        raise ValueError(f"label_smoothing must be 0 for the loss {name!r}, which has none, got {label_smoothing}")
    if loss.label_smoothing == "positive" and label_smoothing == 0:
        raise ValueError(f"label_smoothing must be positive for the loss {name!r} (say 0.001), got 0")
    if isinstance(delta, Tensor):
        if delta.ndim != 0:
            raise ValueError(f"delta must be a number or a 0-d tensor, got shape {list(delta.shape)}")
    else:
        check_number("delta", delta, "(-inf, inf)")
    if not loss.takes_delta and (isinstance(delta, Tensor) or delta != 0):
        raise ValueError(f"delta must be 0 for the loss {name!r}, which has no reward shift, got {delta}")
