"""All settings of the demo."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Settings that the demo shares with the study of the paper's ablations (``benchmarks.study``).

    The SFT is the first training run. A branch is a later run: it trains the SFT model further, with one method.

    Attributes:
        seed: Seed of weights, questions, sampled answers and the order of pairs; the split of the digits is fixed.
        hidden_size: Hidden size of the language model.
        layers: Number of layers of the language model.
        sft_rate: Peak learning rate of the SFT.
        sft_batch: Number of questions per step of the SFT.
        sft_questions: Number of different questions of the SFT. If the steps need more, the questions are used again.
        questions: Number of step-by-step questions for correctness pairs.
        direct_questions: Number of direct questions for correctness pairs.
        dropout_ntp_questions: Number of step-by-step questions for DropoutNTP. Some of them give no pair.
        samples: Number of answers to each question for correctness pairs.
        temperature: Sampling temperature of the answers and of the continuations without an image.
        pairs_per_question: Maximum number of correctness pairs per question. The same maximum holds for format pairs,
            whose rejected answer is unreadable.
        branch_steps: Number of steps of each branch.
        branch_batch: Number of pairs per step of a branch.
        branch_rate: Peak learning rate of all branches.
        branch_warmup: Length of the warmup (the learning rate rises from zero), as a fraction of a branch's steps.
        evaluation_tasks: Number of held-out questions.
        backend: Backend of the loss, see ``mpo_loss``; None: the best installed backend.
    """

    seed: int = 0
    hidden_size: int = 96
    layers: int = 2
    sft_rate: float = 2e-3
    sft_batch: int = 32
    sft_questions: int = 30000
    questions: int = 1000
    direct_questions: int = 400
    dropout_ntp_questions: int = 1200
    samples: int = 8
    temperature: float = 1.0
    pairs_per_question: int = 2
    branch_steps: int = 160
    branch_batch: int = 32
    branch_rate: float = 5e-4
    branch_warmup: float = 0.05
    evaluation_tasks: int = 2000
    backend: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings(RunSettings):
    """Settings of a run of the demo. The defaults were chosen on the validation digits, never on the held-out digits.

    The SFT model in the package was trained with the default seed.

    Attributes:
        side: Number of rows and columns of a grid.
        prior: Strength of the language prior in the step-by-step texts of the SFT. It is the probability that a digit
            is (previous digit + ``prior_step``) modulo 10. Otherwise the digit is drawn uniformly.
        prior_step: Difference of two digits that follow the language prior.
        sft_digits: Number of training digits in the SFT. The pairs use the remaining training digits.
        sft_steps: Number of steps of the SFT. Its learning rate falls to zero.
        sft_warmup: Fraction of the SFT's steps in which the learning rate rises from zero.
        sft_named_share: Fraction of the SFT questions that state the digits and have no image. These questions teach
            the model to answer from its own text.
        sft_direct_share: Fraction of the remaining SFT questions that ask for a direct answer. All others are
            step-by-step questions.
        sft_blind_share: Fraction of these step-by-step questions that have no image. They teach the model to continue
            a response without an image, as DropoutNTP requires.
        keep: Fraction of the tokens of a sampled response that DropoutNTP keeps.
        evaluation_tasks: Number of held-out step-by-step questions.
        direct_evaluation_tasks: Number of held-out direct questions.
        uses_shipped_start: Whether to load the SFT model in the package, if it was trained with these settings.
    """

    seed: int = 1
    side: int = 2
    prior: float = 0.9
    prior_step: int = 1
    sft_digits: int = 700
    sft_steps: int = 1600
    sft_warmup: float = 0.0125
    sft_named_share: float = 0.12
    sft_direct_share: float = 0.32
    sft_blind_share: float = 0.15
    keep: float = 0.5
    evaluation_tasks: int = 4000
    direct_evaluation_tasks: int = 1000
    uses_shipped_start: bool = True

    def start_settings(self) -> dict[str, Any]:
        """Returns the settings that determine the trained SFT model, as JSON values."""
        names = [name for name in Settings.__dataclass_fields__ if name.startswith("sft_")]
        names += ["seed", "hidden_size", "layers", "side", "prior", "prior_step"]
        return {name: getattr(self, name) for name in sorted(names)}

    @classmethod
    def quick(cls, seed: int = 1) -> "Settings":
        """Returns the settings of a run of a few seconds, which checks that all parts work.

        By design, the model learns nothing: the SFT is too short, and the branches have three steps.
        """
        return cls(
            seed=seed, hidden_size=64, layers=1, sft_rate=5e-3, sft_questions=500, sft_steps=30, questions=80,
            direct_questions=40, dropout_ntp_questions=60, samples=4, branch_steps=3, branch_batch=8,
            evaluation_tasks=20, direct_evaluation_tasks=20,
        )  # fmt: skip
