"""All settings of the demo."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes and rates of a run. The defaults were chosen on the validation digits, never on the held-out digits.

    Attributes:
        seed: Seed of the weights, the questions, the samples and the order of the pairs. It does not change the split
            of the digits.
        hidden_size: Hidden size of the language model.
        layers: Number of layers of the language model.
        sft_rate: Learning rate of the SFT.
        sft_batch: Questions per step of the SFT.
        sft_questions: Questions of the SFT, which takes several passes over them.
        sft_blind_share: Fraction of those questions that come without their image. A large model has read many texts
            without images; with these questions, this model too has seen prompts like those of DropoutNTP.
        sft_target: Step-by-step accuracy on validation grids at which the learning rate begins to decay.
        sft_check_steps: Steps between two measurements of that accuracy.
        sft_decay_steps: Steps in which the learning rate decays to zero.
        sft_most_steps: Largest number of steps before the decay begins.
        questions: Questions per form that the model answers to make pairs.
        samples: Answers per question.
        temperature: Temperature of these answers and of the blind continuations.
        pairs_per_question: Most pairs of a question with a wrong answer, and most pairs with an unreadable answer.
        direct_pairs: Most pairs with direct answers.
        dropout_ntp_questions: Step-by-step questions for DropoutNTP, which cuts a right answer and lets the model
            continue it without the image. Some of the questions give no pair.
        keep: Fraction of the tokens of such an answer that are kept.
        branch_steps: Steps of each of the three branches.
        branch_batch: Pairs per step of a branch.
        branch_rate: Learning rate of all branches.
        warmup_steps: Steps in which a learning rate rises from zero.
        evaluation_tasks: Held-out questions per form.
        validation_tasks: Validation questions for a measurement during training.
        backend: Kernels of the loss, see ``mpo_loss``; None takes the best backend that is installed.
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
        """Returns the settings of a run that takes seconds and learns almost nothing, to show that all parts work."""
        return cls(
            seed=seed,
            hidden_size=64,
            layers=1,
            sft_rate=5e-3,
            sft_questions=500,
            sft_target=1.0,
            sft_check_steps=20,
            sft_decay_steps=10,
            sft_most_steps=20,
            questions=100,
            samples=4,
            direct_pairs=30,
            dropout_ntp_questions=100,
            branch_steps=3,
            branch_batch=8,
            warmup_steps=2,
            evaluation_tasks=20,
            validation_tasks=20,
        )
