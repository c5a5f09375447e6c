"""Settings of the study: sizes of the model and the data, learning rates and numbers of steps."""

import dataclasses

from mpo_ext.demo.settings import Settings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings(Settings):
    """Sizes and learning rates of one seed of the study, chosen on the validation digits.

    The first training run has ``sft_most_steps`` steps, and its learning rate falls to zero. The study ignores the
    demo's ``sft_target``, ``sft_decay_steps``, ``direct_pairs`` and ``keep``.

    Attributes:
        sft_digits: Number of training digits in the first training run. The other training digits make the pairs.
        direct_questions: Number of direct questions that make pairs; ``questions`` counts step-by-step questions.
        sft_text_share: Fraction of the first training run's questions that name the digits and have no image.
        text_questions: Number of questions without an image that make pairs.
        late_continuations: Number of times that DropoutNTP continues an answer if it keeps 0.75 of the answer. Few of
            these continuations are wrong, because the kept part names all digits. If less of an answer is kept, the
            answer is continued once.
        pairs: Number of mixed pairs.
        mixed_shares: Fractions of the mixed pairs that come from three sources: correctness pairs with direct
            answers, correctness pairs with step-by-step answers, and DropoutNTP pairs.
        kind_pairs: Largest number of pairs in each of the files that compare kinds of pairs.
    """

    sft_digits: int = 700
    sft_most_steps: int = 700
    sft_check_steps: int = 50
    sft_blind_share: float = 0.0625
    sft_text_share: float = 0.2
    questions: int = 2000
    direct_questions: int = 800
    samples: int = 6
    temperature: float = 1.0
    dropout_ntp_questions: int = 2000
    late_continuations: int = 6
    text_questions: int = 1000
    pairs: int = 2560
    mixed_shares: tuple[float, float, float] = (0.25, 0.5, 0.25)
    kind_pairs: int = 1280
    branch_steps: int = 80
    branch_batch: int = 32
    branch_rate: float = 1e-4
    evaluation_tasks: int = 500

    @classmethod
    def quick(cls, seed: int = 0) -> "StudySettings":
        """Returns the settings of a study that takes a minute and only checks that all parts work."""
        return cls(
            seed=seed, hidden_size=64, layers=1, sft_rate=5e-3, sft_questions=500, sft_check_steps=40,
            sft_most_steps=40, questions=400, direct_questions=60, samples=4, temperature=0.7,
            dropout_ntp_questions=400, text_questions=100, pairs=40, kind_pairs=20, branch_steps=4, branch_batch=4,
            warmup_steps=1, evaluation_tasks=8, validation_tasks=20,
        )  # fmt: skip
