"""Settings of the loss, as a frozen dataclass that checks its values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mpo_ext.checks import check_choice, check_integer, check_number, did_you_mean


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MPOConfig:
    """Settings of the MPO loss ``dpo_weight * DPO + bco_weight * BCO + ntp_weight * NTP`` (arXiv 2411.10442).

    The defaults are those of the training code that the authors released.

    Attributes:
        beta: Temperature of the implicit reward ``beta * (logp - ref_logp)``, which DPO and BCO share.
        dpo_weight: Weight of the pairwise term (Direct Preference Optimization, arXiv 2305.18290).
        bco_weight: Weight of the per-response term (Binary Classifier Optimization, arXiv 2404.04656).
        ntp_weight: Weight of the next-token cross entropy of the chosen responses.
        label_smoothing: Assumed fraction of pairs with swapped responses, in ``[0, 0.5)`` (conservative DPO).
        ntp_average: "token": mean cross entropy over all chosen tokens of the batch, as in the authors' code.
            "sequence": mean cross entropy per token of each chosen response, averaged over the responses, as in the
            paper. For a batch of one pair, both averages are equal.
        ignore_index: Label of positions that are not scored.

    Raises:
        TypeError: If a value has the wrong type (YAML reads 1e-1 as a string; write 0.1 or 1.0e-1).
        ValueError: If a value is out of range.
    """

    beta: float = 0.1
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    ntp_weight: float = 1.0
    label_smoothing: float = 0.0
    ntp_average: Literal["token", "sequence"] = "token"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        check_number("beta", self.beta, "(0, inf)")
        for name in ("dpo_weight", "bco_weight", "ntp_weight"):
            check_number(name, getattr(self, name), "[0, inf)")
        if not (self.dpo_weight or self.bco_weight or self.ntp_weight):
            raise ValueError("at least one of dpo_weight, bco_weight and ntp_weight must be positive, got all 0")
        check_number("label_smoothing", self.label_smoothing, "[0, 0.5)")
        check_choice("ntp_average", self.ntp_average, ("token", "sequence"))
        check_integer("ignore_index", self.ignore_index)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MPOConfig":
        """Returns a config with the settings in a mapping (a parsed YAML file); an unknown key raises ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping of settings, got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known, f"; known settings: {', '.join(known)}")
                raise ValueError(f"unknown setting {key!r}{hint}")
        return cls(**values)
