"""The metrics of a run: sums over micro-batches and ranks, log lines and the log file."""

import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.loss.steps import MPOOutput
from mpo_ext.train.batch_loss import STATS
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import LossRecipe

_SUMS = (
    "pairs", "loss", "dpo_loss", "bco_loss", "ntp_loss", "ntp_parts", "chosen_reward", "rejected_reward",
    "reward_accuracy", "chosen_logp", "rejected_logp", "entropy", "top1", "chosen_tokens", "rejected_tokens", "tokens",
    "longer_chosen", "longer_rejected", "accurate_longer_chosen", "accurate_longer_rejected", "router_aux_loss",
    "routed_tokens",
)  # fmt: skip
_SFT_KEYS = ("loss", "ntp_loss", "router_aux_loss", "chosen_logp", "entropy", "top1", "pairs", "chosen_tokens")


class Totals:
    """Sums of metrics over the micro-batches of a step or an evaluation.

    The sums stay on the device until ``reduce`` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.reward_shift: Tensor | None = None

    def add(self, out: MPOOutput, *, ntp_parts: int, tokens: int) -> None:
        """Adds the metrics of a micro-batch to the sums.

        Args:
            out: Output of the loss for the micro-batch.
            ntp_parts: Number of tokens or responses whose mean is ``out.ntp_loss``; see ``BatchCounts.ntp_parts``.
            tokens: Number of tokens of the micro-batch, without padding.
        """
        pairs = len(out.chosen_reward)
        lengths = out.tokens.view(2, -1)
        labelled, difference = lengths.sum(1), lengths[0] - lengths[1]
        is_accurate = out.chosen_reward > out.rejected_reward
        zero = out.loss.new_zeros(())
        routed_tokens = out.stats.get("routed_tokens", zero)
        values = (
            pairs, out.loss.detach(), out.dpo_loss * pairs, out.bco_loss * pairs, out.ntp_loss * ntp_parts,
            ntp_parts, out.chosen_reward.sum(), out.rejected_reward.sum(),
            is_accurate.sum(), out.chosen_logp.sum(), out.rejected_logp.sum(),
            out.stats.get("entropy", zero) * labelled.sum(), out.stats.get("top1", zero) * labelled.sum(),
            labelled[0], labelled[1], tokens, (difference > 0).sum(), (difference < 0).sum(),
            (is_accurate & (difference > 0)).sum(), (is_accurate & (difference < 0)).sum(),
            out.stats.get("router_aux_loss", zero) * routed_tokens, routed_tokens,
        )  # fmt: skip
        self.sums += torch.stack([torch.as_tensor(value).to(self.sums) for value in values])
        self.reward_shift = out.reward_shift

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """Adds up ``sums`` over all ranks, and returns a dict from name to sum. All ranks must call this method."""
        sums = accelerator.reduce(self.sums, reduction="sum") if accelerator.num_processes > 1 else self.sums
        return dict(zip(_SUMS, sums.tolist(), strict=True))


def means(
    sums: Mapping[str, float], weights: tuple[float, float, float], router_coef: float = 0.0
) -> dict[str, float]:
    """Returns the metrics of a step or an evaluation from the sums of ``Totals.reduce``.

    Most metrics are means over pairs. The other metrics are:

    - ``ntp_loss``: next-token loss, a mean over chosen tokens or chosen responses (``ntp_average``).
    - ``router_aux_loss``: router loss, a mean over the tokens of ``Batch.is_routed``.
    - ``entropy`` and ``top1``: means over labelled tokens. ``top1`` is the fraction of labels with the largest logit.
    - ``balanced_accuracy``: the mean of two values of ``reward_accuracy``. The first value is for pairs with a longer
      chosen response, the second for pairs with a longer rejected response.
    - ``pairs``, ``chosen_tokens`` and ``rejected_tokens``: sums.

    ``reward_accuracy`` is the fraction of pairs whose chosen reward is strictly higher than the rejected reward, as in
    TRL. If the policy equals the reference, all rewards are 0 except for rounding, and ``reward_accuracy`` has no
    meaning. ``length_accuracy`` is the fraction of pairs whose chosen response is longer. A pair with equal lengths
    counts one half.

    Without pairs, all metrics except for the sums are NaN.

    ``loss`` is the weighted sum of the loss terms. ``weights`` holds the weights of the DPO, BCO and next-token terms.
    ``router_coef`` is the weight of the router loss.
    """
    pairs, parts = max(sums["pairs"], 1), max(sums["ntp_parts"], 1)
    labelled = max(sums["chosen_tokens"] + sums["rejected_tokens"], 1)
    line = {name: sums[name] / pairs for name in ("dpo_loss", "bco_loss")}
    line["ntp_loss"] = sums["ntp_loss"] / parts
    loss = sum(weight * value for weight, value in zip(weights, line.values(), strict=True))
    if router_coef:
        line["router_aux_loss"] = sums["router_aux_loss"] / max(sums["routed_tokens"], 1)
        loss += router_coef * line["router_aux_loss"]
    line = {"loss": loss, **line}
    for name in ("chosen_reward", "rejected_reward", "reward_accuracy", "chosen_logp", "rejected_logp"):
        line[name] = sums[name] / pairs
    line["balanced_accuracy"] = _balanced_accuracy(sums, line["reward_accuracy"])
    line["length_accuracy"] = (0.5 * (sums["longer_chosen"] - sums["longer_rejected"]) + 0.5 * sums["pairs"]) / pairs
    line["reward_margin"] = line["chosen_reward"] - line["rejected_reward"]
    line |= {name: sums[name] / labelled for name in ("entropy", "top1")}
    if not sums["pairs"]:
        line = dict.fromkeys(line, math.nan)
    line |= {name: sums[name] for name in ("pairs", "chosen_tokens", "rejected_tokens")}
    return line


def _balanced_accuracy(sums: Mapping[str, float], accuracy: float) -> float:
    """Returns the mean of two reward accuracies, so that the lengths of responses have less effect.

    The first is the accuracy on pairs with a longer chosen response. The second is the accuracy on pairs with a longer
    rejected response. Without pairs of one kind, the result is the other accuracy. Without pairs of both kinds, the
    result is ``accuracy``.
    """
    kinds = [name for name in ("longer_chosen", "longer_rejected") if sums[name]]
    parts = [sums[f"accurate_{name}"] / sums[name] for name in kinds]
    return sum(parts) / len(parts) if parts else accuracy


def log_line(
    sums: Mapping[str, float], recipe: LossRecipe, reward_shift: RewardShift, router_coef: float = 0.0
) -> dict[str, float]:
    """Returns the log line of a step or an evaluation from the sums of ``Totals.reduce``.

    The line has the metrics of ``means`` that apply to the recipe's loss, and the reward shift if the loss has one.
    """
    config = recipe.config
    line = means(sums, (config.dpo_weight, config.bco_weight, config.ntp_weight), router_coef)
    if not recipe.has_preference:
        return {name: line[name] for name in _SFT_KEYS if name in line}
    if recipe.preference is not None:
        return {name: value for name, value in line.items() if name not in STATS}
    return {**line, "reward_shift": reward_shift.value}


def nonfinite_cause(accelerator: Any, losses: Sequence[tuple[Sequence[str], Tensor]], grad_norm: float) -> str:
    """Returns the cause of a step that is not finite: the loss of some pairs, or the gradient of all its pairs.

    All ranks must call this function. ``losses`` has (names of the pairs, loss) for each micro-batch.
    """
    names = [name for names, loss in losses if not math.isfinite(loss.item()) for name in names]
    names = [name for rank in gather(accelerator, names) for name in rank]
    return f"loss of {', '.join(names)}" if names else f"gradient (norm {grad_norm}) of all its pairs"


def speed(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Returns the seconds of a step, the tokens per second and the pairs per second of all ranks together.

    Padding does not count as tokens.
    """
    return {"step_s": seconds, "tokens_per_s": sums["tokens"] / seconds, "pairs_per_s": sums["pairs"] / seconds}


def peak_memory_mib(device: torch.device) -> float:
    """Returns the peak memory of this process in MiB: allocated GPU memory with CUDA, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Log:
    """The log file ``log.jsonl``, with one JSON line per logged step or evaluation. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Appends a line. Non-finite numbers are written as strings because JSON cannot represent them."""
        encoded = json.dumps({key: json_value(value) for key, value in line.items()})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(encoded + "\n")

    def position(self) -> int:
        """Returns the size of the log file in bytes, for ``rewind``; 0 if the file does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, position: int) -> None:
        """Truncates the file to ``position`` bytes. This removes the lines that were written after a checkpoint."""
        if self.position() > position:
            os.truncate(self.path, position)

    def read(self) -> list[dict[str, Any]]:
        """Returns all lines of the log as dicts."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]


def json_value(value: Any) -> Any:
    """Converts a number that is not finite to a string, such as "nan". Returns other values unchanged."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
