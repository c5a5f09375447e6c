"""Preference losses, such as IPO and ORPO, computed from summed log-probs in plain torch.

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
from mpo_ext.loss.eager import logistic_loss

#: Temperature of the mixing weight in "discopop", the default of its paper and of TRL.
DISCOPOP_TAU = 0.05


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The checked inputs of a preference loss.

    If a response of a pair has no label, all log-probs of the pair are replaced by 0. The formulas in the docstrings
    of the losses use these attribute names.

    Attributes:
        chosen_logp: ``[B]`` summed log-probs of the chosen responses.
        rejected_logp: ``[B]`` summed log-probs of the rejected responses.
        ref_chosen_logp: ``[B]`` summed log-probs of the chosen responses under the reference model, without gradient.
            If the loss needs no reference model, they are 0.
        ref_rejected_logp: ``[B]`` summed log-probs of the rejected responses, otherwise like ``ref_chosen_logp``.
        chosen_tokens: ``[B]`` number of labels in each chosen response, or 1 for a response without labels. The dtype
            is that of the log-probs.
        rejected_tokens: ``[B]`` number of labels in each rejected response, otherwise like ``chosen_tokens``.
        has_both_sides: ``[B]`` bool, whether both responses of the pair have labels.
        beta: Temperature, as in ``preference_loss``.
        label_smoothing: Assumed fraction of pairs with swapped responses, in ``[0, 0.5)``.
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
        """Log-ratios ``chosen_logp - ref_chosen_logp``, ``[B]``."""
        return self.chosen_logp - self.ref_chosen_logp

    @property
    def rejected_ratio(self) -> Tensor:
        """Log-ratios ``rejected_logp - ref_rejected_logp``, ``[B]``."""
        return self.rejected_logp - self.ref_rejected_logp

    @property
    def margin(self) -> Tensor:
        """Margins ``beta * (chosen_ratio - rejected_ratio)``, ``[B]``."""
        return self.beta * (self.chosen_ratio - self.rejected_ratio)

    @property
    def mean_margin(self) -> Tensor:
        """Differences ``chosen_ratio / chosen_tokens - rejected_ratio / rejected_tokens``, ``[B]``."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """A preference loss and the arguments that it supports."""

    function: Callable[[Pairs], Tensor]  # returns each pair's loss, [B]; ignored for a pair with an empty side
    needs_reference: bool = True  # whether the loss compares with a reference model
    whole_batch: bool = False  # whether a pair's loss depends on the other pairs of the call (the micro-batch)
    label_smoothing: Literal["zero", "optional", "positive"] = "zero"  # must be 0, may be positive, must be positive
    takes_delta: bool = False  # whether the loss has a reward shift


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
    """Returns the preference loss ``name`` of each pair. Training minimises the mean over pairs.

    If a response has no label, the loss and the gradient of its pair are 0. The pair then has no effect on other
    pairs. ``mpo_loss`` differs: the DPO and BCO terms of such a pair are constants above 0, with gradient 0. In any
    other pair, a NaN log-prob makes the mean over the batch NaN or infinite.

    Args:
        name: Key of ``LOSSES``, such as "ipo". Losses that also exist in TRL 1.16 have the same names there.
        chosen_logp: ``[B]`` float32 or float64. Sum of the label log-probs of each chosen response.
        rejected_logp: ``[B]``, same dtype. The same sum for each rejected response.
        ref_chosen_logp: ``[B]``, same dtype, without gradient. The sum for each chosen response under the reference
            model. Losses without a reference model ignore this argument, and accept None.
        ref_rejected_logp: ``[B]``. As ``ref_chosen_logp``, for each rejected response.
        chosen_tokens: ``[B]`` int32 or int64 number of labels of each chosen response.
        rejected_tokens: ``[B]`` int32 or int64 number of labels of each rejected response.
        beta: Temperature of the implicit reward ``beta * (logp - ref_logp)``. "ipo" uses ``beta`` as tau,
            "sppo_hard" as 1 / eta, and "orpo" as the weight lambda.
        label_smoothing: Assumed fraction of pairs with swapped responses, in ``[0, 0.5)``.
        delta: Reward shift of "bco_pair": a number or a 0-d tensor. The host does not wait for the tensor's value.

    Returns:
        ``[B]`` in the dtype of the log-probs.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
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
        # Masked before the loss, so that a NaN of an empty side does not reach a gradient.
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
    """Returns ``-(1 - e) * log sigmoid(margin) - e * log sigmoid(-margin)``. e is the label smoothing."""
    return logistic_loss(margin, pairs.label_smoothing)


def _sigmoid(pairs: Pairs) -> Tensor:
    """Returns the DPO loss (arXiv 2305.18290): ``-log sigmoid(margin)``.

    With label smoothing e, the loss is conservative DPO (E. Mitchell, 2023): ``-(1 - e) * log sigmoid(margin) - e *
    log sigmoid(-margin)``, as in TRL before 0.29.
    """
    return _logistic(pairs, pairs.margin)


def _bco_pair(pairs: Pairs) -> Tensor:
    """Returns the BCO loss of pairs (arXiv 2404.04656). A reward is ``beta`` times a log-ratio.

    The loss is ``-log sigmoid(chosen_reward - delta) - log sigmoid(delta - rejected_reward)``. ``delta`` is the reward
    shift. TRL has no reward shift since version 0.29: its ``delta`` is always 0.
    """
    chosen_reward, rejected_reward = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen_reward - pairs.delta) - F.logsigmoid(pairs.delta - rejected_reward)


def _ipo(pairs: Pairs) -> Tensor:
    """Returns the IPO loss (arXiv 2310.12036, eq. 17): ``(mean_margin - 1 / (2 * beta))^2``.

    Log-ratios are divided by the number of tokens, as in TRL and as the authors advise. The paper uses sums.
    """
    return (pairs.mean_margin - 1 / (2 * pairs.beta)).square()


def _robust(pairs: Pairs) -> Tensor:
    """Returns the robust DPO loss (arXiv 2403.00409) with label smoothing e.

    The loss is ``((1 - e) * -log sigmoid(margin) - e * -log sigmoid(-margin)) / (1 - 2e)``. If the responses of a
    fraction e of the pairs are swapped, the loss is an unbiased estimate of the DPO loss on correct pairs. If e is not
    0, the loss is negative for a large margin.
    """
    smoothing = pairs.label_smoothing
    clean, flipped = -F.logsigmoid(pairs.margin), -F.logsigmoid(-pairs.margin)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def _hinge(pairs: Pairs) -> Tensor:
    """Returns the hinge loss of RSO (arXiv 2309.06657): ``max(0, 1 - margin)``."""
    return torch.relu(1 - pairs.margin)


def _sppo_hard(pairs: Pairs) -> Tensor:
    """Returns the SPPO loss (arXiv 2405.00675, eq. 4.7) with win probabilities 1 and 0.

    The loss is ``(chosen_ratio - 1 / (2 * beta))^2 + (rejected_ratio + 1 / (2 * beta))^2``.
    """
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def _aot(pairs: Pairs) -> Tensor:
    """Returns the AOT loss for paired data (arXiv 2406.05882): sorted policy margins against sorted reference margins.

    The policy margins ``a`` are ``chosen_logp - rejected_logp``, and the reference margins ``b`` are
    ``ref_chosen_logp - ref_rejected_logp``. Let ``a[k]`` and ``b[k]`` be their k-th smallest values. The pair to which
    ``a[k]`` belongs has the loss ``-log sigmoid(beta * (a[k] - b[k]))``. Label smoothing works as in ``_sigmoid``.
    """
    return _sorted_logistic(
        pairs, pairs.chosen_logp - pairs.rejected_logp, pairs.ref_chosen_logp - pairs.ref_rejected_logp
    )


def _aot_unpaired(pairs: Pairs) -> Tensor:
    """Returns the AOT loss for unpaired data (arXiv 2406.05882): sorted chosen against sorted rejected log-ratios.

    The formula is that of ``_aot`` with ``a = chosen_ratio`` and ``b = rejected_ratio``. Older versions of TRL call
    this loss "aot_pair", although it is for unpaired data.
    """
    return _sorted_logistic(pairs, pairs.chosen_ratio, pairs.rejected_ratio)


def _sorted_logistic(pairs: Pairs, better: Tensor, worse: Tensor) -> Tensor:
    """Returns logistic losses, ``[B]``, that compare the values of ``better`` with the values of ``worse``.

    Both tensors are sorted. The k-th smallest value of ``better`` is compared with the k-th smallest value of
    ``worse``. The loss of ``better[i]`` is entry i of the result. Pairs with an empty response are not compared.
    """
    better, order = torch.where(pairs.has_both_sides, better, torch.inf).sort()
    worse = torch.where(pairs.has_both_sides, worse, torch.inf).sort().values
    is_filler = (better == torch.inf) & (worse == torch.inf)
    gap = torch.where(is_filler, 0.0, better - worse)
    return torch.zeros_like(gap).scatter(0, order, _logistic(pairs, pairs.beta * gap))


def _orpo(pairs: Pairs) -> Tensor:
    """Returns the odds-ratio term of ORPO (arXiv 2403.07691).

    The term is ``-beta * log sigmoid(log chosen_odds - log rejected_odds)``. The odds of a response are ``p / (1 -
    p)``. Here, ``log p`` is the mean log-prob of the labels, and ``1 - p`` is at least the dtype's epsilon. The caller
    adds the cross entropy of the chosen responses, which has weight 1 in ORPO.
    """
    return -pairs.beta * F.logsigmoid(
        _log_odds(pairs.chosen_logp / pairs.chosen_tokens) - _log_odds(pairs.rejected_logp / pairs.rejected_tokens)
    )


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _exo_pair(pairs: Pairs) -> Tensor:
    """Returns the EXO loss of pairs (arXiv 2402.00856, eq. 16). The paper sets the label smoothing e to 1e-3.

    The loss is the KL divergence of ``(p, 1 - p)`` from ``(1 - e, e)``, where ``p = sigmoid(margin)``:
    ``p * (log p - log(1 - e)) + (1 - p) * (log(1 - p) - log e)``.
    """
    margin, smoothing = pairs.margin, pairs.label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))


def _nca_pair(pairs: Pairs) -> Tensor:
    """Returns the NCA loss of pairs (arXiv 2402.05369). A reward is ``beta`` times a log-ratio.

    The loss is ``-log sigmoid(chosen_reward) - log sigmoid(-chosen_reward) / 2 - log sigmoid(-rejected_reward) / 2``.
    """
    chosen_reward, rejected_reward = pairs.beta * pairs.chosen_ratio, pairs.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen_reward) - (F.logsigmoid(-chosen_reward) + F.logsigmoid(-rejected_reward)) / 2


def _apo_zero(pairs: Pairs) -> Tensor:
    """Returns the APO-zero loss (arXiv 2408.06266, eq. 7).

    The loss is ``1 - sigmoid(beta * chosen_ratio) + sigmoid(beta * rejected_ratio)``. The paper advises it if the
    chosen responses are better than the model's own responses.
    """
    return torch.sigmoid(-pairs.beta * pairs.chosen_ratio) + torch.sigmoid(pairs.beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs) -> Tensor:
    """Returns the APO-down loss (arXiv 2408.06266, eq. 8): ``sigmoid(beta * chosen_ratio) + 1 - sigmoid(margin)``.

    The paper advises this loss if the chosen responses are worse than the model's own responses.
    """
    return torch.sigmoid(pairs.beta * pairs.chosen_ratio) + torch.sigmoid(-pairs.margin)


def _discopop(pairs: Pairs) -> Tensor:
    """Returns the DiscoPOP loss (arXiv 2406.08414, eq. 5) with the mixing weight ``s = sigmoid(margin / 0.05)``.

    The loss is ``-(1 - s) * log sigmoid(margin) + s * exp(-margin)``.
    """
    margin = pairs.margin
    ratio = margin / DISCOPOP_TAU
    exponential = torch.exp(F.logsigmoid(ratio) - margin)  # s * exp(-margin) would be 0 * inf for a margin far below 0
    return exponential - torch.sigmoid(-ratio) * F.logsigmoid(margin)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    """Returns length-normalised DPO (arXiv 2411.15124): ``-log sigmoid(beta * mean_margin)``."""
    return -F.logsigmoid(pairs.beta * pairs.mean_margin)


#: Every loss by name. TRL's "sft" is missing, since it uses no rejected responses; it is the NTP term of ``mpo_loss``.
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
    """Raises unless the tensor is ``[B]`` and has one of the dtypes.

    With ``like``, the tensor must also have the shape and the device of ``like``.
    """
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
