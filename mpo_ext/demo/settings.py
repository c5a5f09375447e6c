"""All settings of the demo."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a run. The defaults were chosen on the validation digits, never on the held-out digits.

    Attributes:
        seed: Seed of weights, questions, sampled answers and the order of pairs; the split of the digits is fixed.
        hidden_size: Hidden size of the language model.
        layers: Number of layers of the language model.
        sft_rate: Learning rate of the SFT.
        sft_batch: Number of questions per step of the SFT.
        sft_questions: Number of different questions of the SFT, each used in several epochs.
        sft_blind_share: Fraction of the SFT questions without their image, so that the model learns to continue a
            response without an image, as DropoutNTP requires.
        sft_target: Accuracy of step-by-step validation answers at which the learning rate begins to decay.
        sft_check_steps: Number of steps between two measurements of the step-by-step accuracy.
        sft_decay_steps: Number of steps in which the learning rate decays to zero.
        sft_most_steps: Maximum number of steps before the decay begins.
        questions: Number of questions per form that the model answers to make pairs.
        samples: Number of answers per question.
        temperature: Sampling temperature of the answers and of the continuations without an image.
        pairs_per_question: Maximum number, per question, of pairs with a wrong rejected answer. The same maximum
            holds for pairs with an unreadable rejected answer.
        direct_pairs: Maximum number of pairs with direct answers.
        dropout_ntp_questions: Number of step-by-step questions for DropoutNTP, which truncates a correct response and
            lets the model continue it without the image. Some of the questions give no pair.
        keep: Fraction of the tokens of a correct response that DropoutNTP keeps.
        branch_steps: Number of steps of each branch: the three training runs (SFT, DPO, MPO) from the SFT model.
        branch_batch: Number of pairs per step of a branch.
        branch_rate: Learning rate of all branches.
        warmup_steps: Number of steps in which a learning rate rises from zero.
        evaluation_tasks: Number of held-out questions per form.
        validation_tasks: Number of validation questions per measurement during training.
        backend: Backend of the loss, see ``mpo_loss``; None: the best installed backend.
    """

    seed: int = 0
    hidden_size: int = 128
    layers: int = 3
    sft_rate: float = 2e-3
    sft_batch: int = 64
    sft_questions: int = 16000
    sft_blind_share: float = 0.125
    sft_target: float = 0.4
    sft_check_steps: int = 25
    sft_decay_steps: int = 100
    sft_most_steps: int = 800
    questions: int = 2000
    samples: int = 8
    temperature: float = 0.7
    pairs_per_question: int = 2
    direct_pairs: int = 1000
    dropout_ntp_questions: int = 1500
    keep: float = 0.5
    branch_steps: int = 100
    branch_batch: int = 64
    branch_rate: float = 2e-4
    warmup_steps: int = 10
    evaluation_tasks: int = 1500
    validation_tasks: int = 300
    backend: str | None = None

    @classmethod
    def quick(cls, seed: int = 0) -> "Settings":
        """Returns the settings of a run that takes seconds and learns almost nothing, to check that all parts work."""
        return cls(
            seed=seed, hidden_size=64, layers=1, sft_rate=5e-3, sft_questions=500, sft_target=1.0, sft_check_steps=20,
            sft_decay_steps=10, sft_most_steps=20, questions=100, samples=4, direct_pairs=30,
            dropout_ntp_questions=100, branch_steps=3, branch_batch=8, warmup_steps=2, evaluation_tasks=20,
            validation_tasks=20,
        )  # fmt: skip
