"""The results of the demo with one seed."""

import dataclasses
from typing import Any

from mpo_ext.demo.settings import Settings


@dataclasses.dataclass(slots=True)
class DemoResult:
    """Results of a run with one seed.

    Attributes:
        settings: Settings of the run.
        seconds: Duration of each stage in seconds.
        start: Description of the SFT model in the package; None if the run trained the SFT model itself.
        sft_curve: Training log of the SFT model; empty if the model was loaded from the package.
        pair_counts: Number of pairs by form and pipeline, as in ``MadePairs.counts``.
        pairs_left_out: Number of pairs that were made but not used, by reason.
        sampling: Summary of each sampling run, by the run's folder.
        branch_curves: Training log of the model of each method.
        accuracy: Result of ``measure`` on held-out questions, by method; the key ``tables.START`` is the SFT model.
    """

    settings: Settings
    seconds: dict[str, float]
    start: dict[str, Any] | None
    sft_curve: list[dict[str, float]]
    pair_counts: dict[str, int]
    pairs_left_out: dict[str, int]
    sampling: dict[str, dict[str, Any]]
    branch_curves: dict[str, list[dict[str, float]]]
    accuracy: dict[str, dict[str, dict[str, Any]]]
