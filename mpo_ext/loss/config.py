"""Settings of the loss: one frozen dataclass, checked once, passed whole to every layer that needs it."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from mpo_ext.checks import check_number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MPOConfig:
    """Weights and temperatures of the three terms of Mixed Preference Optimization (arXiv 2411.10442).

    ``loss = dpo_weight * DPO + bco_weight * BCO + ntp_weight * NTP``. The defaults are those of the authors' released
    training.

    Attributes:
        beta: Temperature of the implicit reward ``beta * (logp - ref_logp)``, shared by DPO and BCO.
        dpo_weight: Weight of the pairwise term (Direct Preference Optimization, arXiv 2305.18290).
        bco_weight: Weight of the per-answer term (Binary Classifier Optimization, arXiv 2404.04656).
        ntp_weight: Weight of the next-token cross entropy of the chosen responses.
        label_smoothing: Share of pairs taken to be labelled the wrong way round, in ``[0, 0.5)`` (conservative DPO).
        ntp_average: "token" averages the cross entropy over all chosen tokens of the batch, as the authors' code does;
            "sequence" averages each response's per-token mean over the responses, as the paper writes it. Equal for
            one pair.
        ignore_index: Label of the positions that count for nothing.

    Raises:
        TypeError: If a value is no number where one belongs (YAML reads 1e-1 as a string; write 0.1 or 1.0e-1).
        ValueError: If a value is out of its range. The message names the setting, the rule and the value.
    """

    beta: float = 0.1
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    ntp_weight: float = 1.0
    label_smoothing: float = 0.0
    ntp_average: Literal["token", "sequence"] = "token"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("beta", "dpo_weight", "bco_weight", "ntp_weight", "label_smoothing"):
            check_number(name, getattr(self, name))
        if not 0 < self.beta < math.inf:  # also catches NaN
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        weights = {name: getattr(self, name) for name in ("dpo_weight", "bco_weight", "ntp_weight")}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        if not any(weights.values()):
            raise ValueError("at least one of dpo_weight, bco_weight and ntp_weight must be positive, got all 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.ntp_average not in ("token", "sequence"):
            raise ValueError(f"ntp_average must be 'token' or 'sequence', got {self.ntp_average!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {self.ignore_index!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MPOConfig":
        """Builds the config from a parsed file. An unknown key is an error, not a silent default."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping of settings, got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known settings: {', '.join(known)}"
                raise ValueError(f"unknown setting {key!r}{hint}")
        return cls(**values)
