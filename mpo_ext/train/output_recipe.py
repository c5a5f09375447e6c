"""The section ``output`` of a recipe: files, checkpoints, evaluations, log, trackers and the upload to the hub."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, StrictBool, StrictStr

from mpo_ext.train.settings import Count, PositiveCount, Section, Strings, Text, section, wrong_type

if TYPE_CHECKING:
    from mpo_ext.evaluate.scoring import EvaluationConfig


def to_matcher(value: Any) -> Any:
    """Converts the name of a matcher, such as "vqa", to ``{"kind": "vqa"}``. Returns other values unchanged."""
    return {"kind": value} if isinstance(value, str) else value


@section
class GenerationRecipe:
    """Settings of an evaluation by generation during training. Decoding is greedy, with one response per question.

    Attributes:
        path: File of questions with their answers, in a format of ``mpo-ext evaluate --data``.
        every: Number of steps between two evaluations; 0: an evaluation after each epoch. The run always ends with an
            evaluation.
        max_items: Maximum number of questions, taken from the start of the file; None: all.
        prompt: Name of a prompt template; "none": the question itself is the prompt.
        matcher: Matcher that compares answers: its name, such as "vqa", or a section with ``kind`` and options.
        style: Way to find the answer in a response, such as "boxed"; see ``extract_answer``. None: the style of the
            prompt template.
        max_new_tokens: Maximum number of tokens per response. None: 100 for templates that ask only for the answer,
            4096 for all other prompts.
        batch_size: Maximum number of questions per batch on each rank.
        image_root: Folder against which relative image paths are resolved. Not used if ``path`` is a meta file
            (.json), which names the folders of its images.
        system: System prompt for questions without a system prompt; None: no system prompt.
    """

    path: Text
    every: Count = 0
    max_items: PositiveCount | None = None
    prompt: Text = "direct"
    matcher: Annotated[dict[str, Any], BeforeValidator(to_matcher)] = dataclasses.field(
        default_factory=lambda: {"kind": "vqa"}, hash=False
    )
    style: StrictStr | None = None
    max_new_tokens: PositiveCount | None = None
    batch_size: PositiveCount = 16
    image_root: StrictStr = ""
    system: Text | None = None

    def __post_init__(self) -> None:
        from mpo_ext.answers import matcher  # imports the extra "generate"

        try:
            matcher(**self.matcher)
        except (TypeError, ValueError) as error:
            raise ValueError(f"matcher: {error}") from error
        _ = self.config  # EvaluationConfig checks its values

    @property
    def config(self) -> "EvaluationConfig":
        """The ``EvaluationConfig`` of ``mpo_ext.evaluate`` with the values of this section."""
        from mpo_ext.evaluate.scoring import EvaluationConfig

        return EvaluationConfig(
            prompts=(self.prompt,), matcher=self.matcher, style=self.style, max_new_tokens=self.max_new_tokens
        )


@section
class HubRecipe:
    """Settings of the upload of the final model to the Hugging Face hub.

    Attributes:
        repo_id: Name of the repository, such as "name/my-model"; a name without owner belongs to the owner of the
            token. The repository is created if it does not exist.
        private: Whether to create a private repository. If True, an existing public repository is rejected.
    """

    repo_id: Text
    private: StrictBool = True


def _section_or(name: str) -> BeforeValidator:
    """Returns a validator that converts a string to a section: with the name "path", "a" becomes ``{"path": "a"}``."""

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return {name: value}
        if value is not None and not isinstance(value, (Mapping, GenerationRecipe, HubRecipe)):
            raise wrong_type("a string or a section")
        return value

    return BeforeValidator(convert)


@section
class OutputRecipe:
    """Settings of the files that a run writes.

    Attributes:
        dir: Folder of the run.
        save_every: Number of steps between two checkpoints; 0: no checkpoints at regular steps. The run also writes a
            checkpoint at its end.
        keep_last: Number of latest checkpoints to keep.
        keep_best: Whether to also keep the checkpoint with the best value of ``best_metric``. Each new best value then
            leads to a checkpoint. Needs ``data.eval``, or ``eval_generate`` for "answer_accuracy".
        eval_every: Number of steps between two evaluations on ``data.eval``; 0 evaluates only at the end.
        eval_generate: Evaluation by generation: a file of questions, or a section with ``path`` and other settings.
            None: no such evaluation.
        best_metric: Metric of the best checkpoint. "reward_accuracy" (highest is best) and "loss" (lowest is best) are
            computed on ``data.eval``, "answer_accuracy" (highest is best) by ``eval_generate``.
        early_stopping: Patience: the run ends normally after this number of evaluations in a row without a new best
            value of ``best_metric``. 0 disables early stopping. With "reward_accuracy" and "loss", ``eval_every`` must
            be positive.
        log_every: Number of steps between two lines of the log.
        trackers: Names of trackers in accelerate: "tensorboard", "wandb", "trackio", ...
        push_to_hub: Upload of the final model to the Hugging Face hub: the name of the repository, or a section with
            ``repo_id`` and ``private``. None: no upload.
        resume: "auto" resumes from the newest intact checkpoint in ``dir``; without checkpoints, it starts a new run.
            "never" rejects a folder that contains a checkpoint. Any other value is the path of a checkpoint. If this
            checkpoint is from another folder, ``dir`` must not contain a checkpoint.
        resume_changed_data: Whether a run may resume although its training data, its processor or its starting model
            has changed since the checkpoint.
        on_nonfinite: Reaction to a loss or gradient that is not finite: "stop" ends the run, "skip" skips the step and
            counts it.
        save_merged: Whether to write the model with merged LoRA adapters in addition to the adapters.
    """

    dir: Text
    save_every: Count = 200
    keep_last: PositiveCount = 2
    keep_best: StrictBool = False
    eval_every: Count = 0
    eval_generate: Annotated[Section[GenerationRecipe] | None, _section_or("path")] = None
    best_metric: Literal["reward_accuracy", "loss", "answer_accuracy"] = "reward_accuracy"
    early_stopping: Count = 0
    log_every: PositiveCount = 1
    trackers: Strings = ()
    push_to_hub: Annotated[Section[HubRecipe] | None, _section_or("repo_id")] = None
    resume: Text = "auto"
    resume_changed_data: StrictBool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    save_merged: StrictBool = False

    def __post_init__(self) -> None:
        if self.best_metric == "answer_accuracy":
            if self.eval_generate is None:
                raise ValueError(
                    f"best_metric must be 'reward_accuracy' or 'loss' without eval_generate, got {self.best_metric!r}"
                )
        elif self.early_stopping and not self.eval_every:
            raise ValueError(f"early_stopping must be 0 unless eval_every is positive, got {self.early_stopping}")
        if "" in self.trackers:
            raise ValueError(f"trackers must not hold an empty name, got {self.trackers}")

    @property
    def higher_is_better(self) -> bool:
        """Returns whether the highest value of ``best_metric`` is the best."""
        return self.best_metric != "loss"
