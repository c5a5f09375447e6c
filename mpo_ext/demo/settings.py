"""Every number of the demo that is a choice, in one place."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes and rates of one run. The defaults were chosen on the validation digits, never on the held-out ones.

    Attributes:
        seed: Of the weights, the questions, the samples and the order of the pairs. The split of the digits is fixed.
        hidden_size: Width of the language model.
        layers: Depth of the language model.
        sft_rate: Learning rate of the first training.
        sft_batch: Questions per step of the first training.
        sft_questions: Questions of the first training, which meets them again and again.
        sft_blind_share: Share of those questions that come without their image. A large model has read plenty of text
            without images; so this one too has met such prompts before it makes DropoutNTP pairs.
        sft_target: Step-by-step accuracy on validation grids at which the first training begins to end.
        sft_check_steps: Steps between two looks at that accuracy.
        sft_decay_steps: Steps in which the learning rate then falls to zero.
        sft_most_steps: Where the first training ends in any case, the fall of the rate not counted.
        questions: Questions per form that the model answers to make pairs.
        samples: Answers per question.
        temperature: Of these answers and of the blind continuations.
        pairs_per_question: Most pairs that one question gives to each of two kinds: wrong answers, unreadable ones.
        direct_pairs: Most pairs with direct answers.
        dropout_ntp_questions: Step-by-step questions whose answer is cut and finished blindly, if it is right; some of
            them give no pair.
        keep: Share of the tokens of such an answer that is kept.
        branch_steps: Steps of each of the three branches.
        branch_batch: Pairs per step.
        branch_rate: Learning rate of the three branches, one for all.
        warmup_steps: Steps in which a learning rate rises from zero.
        evaluation_tasks: Held-out questions per form.
        validation_tasks: Validation questions for one look during training.
        backend: Kernels of the loss, as in ``mpo_loss``; None takes the best that is installed.
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
        """Builds the settings of a run that takes seconds and learns next to nothing: it shows that all parts work."""
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
