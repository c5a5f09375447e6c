"""Settings of the study: sizes of the model and the data, learning rates and numbers of steps."""

import dataclasses
from typing import ClassVar

from mpo_ext.demo.settings import RunSettings, Settings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings(RunSettings):
    """Settings of the task "perception" (adding digits) for one seed.

    They were chosen on the validation digits. The SFT trains the starting model.

    Attributes:
        sft_steps: Number of SFT steps. The learning rate falls to zero at the end.
        sft_warmup: Fraction of the SFT steps in which the learning rate rises from zero.
        sft_check_steps: Number of SFT steps between two measurements of the validation accuracy.
        sft_blind_share: Fraction of the SFT questions from which the image is removed.
        validation_tasks: Number of validation questions per measurement.
        sft_digits: Number of training digits for the SFT. The pairs use the other training digits.
        sft_text_share: Fraction of the SFT questions that state the digits and have no image.
        text_questions: Number of questions without an image. The pairs of the file "text" are made from them.
        late_continuations: Number of continuations that DropoutNTP samples after the first 75% of an answer. Most
            continuations are correct, but a pair needs a wrong continuation. After a smaller part of an answer,
            DropoutNTP samples only one continuation.
        pairs: Maximum number of pairs in the file "mixed". The file "text" has the same maximum.
        mixed_shares: Fractions of three kinds of pairs in the file "mixed". The kinds are correctness pairs with
            direct answers, correctness pairs with step-by-step answers, and DropoutNTP pairs.
        kind_pairs: Maximum number of pairs in each of these files: "correctness", "correctness and DropoutNTP", and
            the files that ``perception.KEEPS`` names. All of these files have equally many pairs.
    """

    task: ClassVar[str] = "perception"

    hidden_size: int = 128
    layers: int = 3
    sft_batch: int = 64
    sft_questions: int = 16000
    sft_digits: int = 700
    sft_steps: int = 700
    sft_warmup: float = 10 / 700
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
    branch_warmup: float = 0.125
    evaluation_tasks: int = 500
    validation_tasks: int = 300

    @classmethod
    def quick(cls, seed: int = 0) -> "StudySettings":
        """Returns the settings of a test of the study. The test takes a minute and only checks that all parts work."""
        return cls(
            seed=seed, hidden_size=64, layers=1, sft_rate=5e-3, sft_questions=500, sft_check_steps=40,
            sft_steps=40, sft_warmup=0.025, questions=400, direct_questions=60, samples=4, temperature=0.7,
            dropout_ntp_questions=400, text_questions=100, pairs=40, kind_pairs=20, branch_steps=4, branch_batch=4,
            branch_warmup=0.25, evaluation_tasks=8, validation_tasks=20,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PriorSettings(Settings):
    """Settings of the task "language-prior" for one seed: the demo's settings, and sizes of further pair files.

    Attributes:
        kind_questions: Number of step-by-step questions for correctness pairs. DropoutNTP pairs use as many other
            questions. RLAIF-V pairs use the questions of the DropoutNTP pairs.
        kind_pairs: Maximum number of pairs in each file from "correctness" to "DropoutNTP 0.75" in
            ``language_prior.PAIR_FILES``. These files have equally many pairs.
        text_questions: Number of questions without an image. The pairs of the file "text" are made from them.
        text_evaluation_tasks: Number of held-out questions that state the digits and have no image.
    """

    task: ClassVar[str] = "language-prior"

    uses_shipped_start: bool = False
    kind_questions: int = 1000
    kind_pairs: int = 1000
    text_questions: int = 500
    text_evaluation_tasks: int = 500

    @classmethod
    def quick(cls, seed: int = 0) -> "PriorSettings":
        """Returns the settings of a study that takes a minute and only checks that all parts work."""
        return cls(
            seed=seed, hidden_size=64, layers=1, sft_rate=5e-3, sft_questions=500, sft_steps=40, questions=60,
            direct_questions=40, dropout_ntp_questions=40, samples=4, branch_steps=4, branch_batch=4,
            evaluation_tasks=8, direct_evaluation_tasks=8, kind_questions=200, kind_pairs=20, text_questions=60,
            text_evaluation_tasks=8,
        )  # fmt: skip


#: Classes of the settings by name of the task.
SETTINGS: dict[str, type[StudySettings] | type[PriorSettings]] = {
    each.task: each for each in (PriorSettings, StudySettings)
}
AnySettings = StudySettings | PriorSettings
