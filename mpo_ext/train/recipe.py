"""The recipe of a training run as frozen dataclasses. ``load_recipe`` reads a recipe from a YAML file.

Each class defines a section of the file and the defaults of the settings that the file omits.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import StrictBool, StrictStr

from mpo_ext.chat.variables import check_variables
from mpo_ext.checks import did_you_mean
from mpo_ext.loss.config import MPOConfig
from mpo_ext.train.optim_recipe import OptimRecipe as OptimRecipe
from mpo_ext.train.output_recipe import OutputRecipe as OutputRecipe
from mpo_ext.train.recipe_file import dump_yaml, read_recipe_file
from mpo_ext.train.settings import (
    MODEL_PARTS,
    NOT_EMPTY,
    Count,
    Fraction,
    Length,
    NotNegative,
    Number,
    Positive,
    PositiveCount,
    PositiveFraction,
    Section,
    SharedPrefix,
    StringOrStrings,
    Strings,
    Text,
    section,
)
from mpo_ext.train.source_recipe import SourceRecipe as SourceRecipe  # for users of this module
from mpo_ext.train.source_recipe import Sources

BackendName = Literal["cpu", "cuda", "triton", "reference"]


@section
class LoraRecipe:
    """Settings of low-rank adapters, which peft adds to the model (LoRA, arXiv 2106.09685).

    Attributes:
        rank: Rank of each adapter.
        alpha: Each adapter's output is scaled by ``alpha / rank``.
        dropout: Dropout probability on the input of each adapter; above 0, the policy's log-probs are random.
        target: Layers that get an adapter: a list of names, a regular expression that matches full names, or
            "all-linear" (all linear layers of the language model except the output head).
        quantization: "4bit" stores the base weights in NF4 (bitsandbytes; QLoRA, arXiv 2305.14314). None: the base
            weights are not quantized.
    """

    rank: PositiveCount = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    target: StringOrStrings = "all-linear"
    quantization: Literal["4bit"] | None = None


@section
class ModelRecipe:
    """Settings of the model to train.

    Attributes:
        path: Folder or hub id of a Hugging Face causal or image-text-to-text model.
        revision: Revision of the model on the hub; None: the default revision.
        trust_remote_code: Whether to run Python code that comes with the model or with ``reference.path``. This code
            has all rights of the user: read it first, and set ``revision`` (and ``reference.revision``) to a commit.
        dtype: Dtype of the parameters: "float32", "bfloat16", "float16", or "auto" (the dtype of the saved model).
        attention: Name of the attention implementation in transformers. "sdpa", "eager", "flash_attention_2" and
            "flash_attention_3" support ``loss.shared_prefix``.
        freeze: Parts of the model that are not trained: any of "vision_tower", "projector", "language_model".
        lora: Adapters to train; all other weights are then frozen. None: the weights are trained.
        gradient_checkpointing: Whether backward recomputes the activations of each layer.
        chat_template: Chat template (Jinja text); None: the template of the processor.
        chat_template_kwargs: Variables for the chat template, such as ``{enable_thinking: false}``.
    """

    path: Text
    revision: StrictStr | None = None
    trust_remote_code: StrictBool = False
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: Text = "sdpa"
    freeze: Strings = ()
    lora: Section[LoraRecipe] | None = None
    gradient_checkpointing: StrictBool = False
    chat_template: StrictStr | None = None
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_variables(self.chat_template_kwargs)
        if self.chat_template is not None and not self.chat_template.strip():
            raise ValueError(f"chat_template must be the text of a chat template, got {self.chat_template!r}")
        for part in self.freeze:
            if part not in MODEL_PARTS:
                raise ValueError(
                    f"freeze must name parts among {', '.join(MODEL_PARTS)}, got {part!r}"
                    f"{did_you_mean(part, MODEL_PARTS)}"
                )
        if set(self.freeze) == set(MODEL_PARTS):
            raise ValueError(f"freeze must leave something to train, got {', '.join(self.freeze)}")
        if self.lora is not None and self.freeze:
            raise ValueError(
                f"freeze must be empty with lora, which freezes all but the adapters, got {', '.join(self.freeze)}"
            )
        if self.dtype == "float16" and self.lora is None:
            raise ValueError(
                "dtype must be 'float32' (or 'bfloat16') if the weights themselves are trained, got 'float16': the "
                "loss scaler of precision fp16 needs float32 master weights"
            )

    @property
    def hub_options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for the config, the processor and the weights."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@section
class DataRecipe:
    """Settings of the data for training and evaluation.

    Attributes:
        train: Sources of training pairs. The ``repeat_time`` of a source scales its number of pairs per epoch.
        eval: Sources of evaluation pairs; an empty list disables the evaluation on pairs.
        max_length: Maximum number of tokens of a prompt plus its longer response; None: no limit.
        too_long: Treatment of longer pairs. "drop" skips and counts them. "truncate" cuts the ends of the responses,
            but not the prompt. It skips a pair if the prompt leaves no room, or if the cut responses are equal.
        skip_bad: Whether to skip and count pairs that cannot be read, such as a bad line or a missing image. If False,
            such a pair stops the run.
        group_prompts: Whether pairs with the same prompt are placed next to each other. They can then share a copy of
            the prompt in a micro-batch.
        workers: Number of processes that read and encode pairs in advance; 0: the training process reads them itself.
        max_image_pixels: Maximum number of pixels of an image; a pair with a larger image cannot be read. None: the
            environment variable MPO_MAX_IMAGE_PIXELS, by default 8192 x 8192.
        video_fps: Frames per second of videos that do not set ``fps``. None: the environment variable MPO_VIDEO_FPS,
            by default 2.
        video_max_frames: Maximum number of frames of videos that do not set ``max_frames``. None: the environment
            variable MPO_VIDEO_MAX_FRAMES, by default 64.
    """

    train: Annotated[Sources, NOT_EMPTY]
    eval: Sources = ()
    max_length: Length | None = 4096
    too_long: Literal["drop", "truncate"] = "drop"
    skip_bad: StrictBool = False
    group_prompts: StrictBool = False
    workers: Count = 0
    max_image_pixels: Length | None = None
    video_fps: Positive | None = None
    video_max_frames: PositiveCount | None = None


@section
class LossRecipe:
    """Settings of the loss function.

    Attributes:
        beta: See ``MPOConfig``.
        dpo_weight: See ``MPOConfig``. If ``dpo_weight`` and ``bco_weight`` are 0, training is SFT, without a reference
            and without the rejected responses.
        bco_weight: See ``MPOConfig``.
        ntp_weight: See ``MPOConfig``.
        label_smoothing: See ``MPOConfig``.
        ntp_average: See ``MPOConfig``.
        preference: Name of a loss in ``mpo_ext.loss.preference`` that replaces the DPO term; None: the DPO term.
        router_aux_loss_coef: Weight of the load-balancing loss of mixture-of-experts routers; 0 disables this loss.
            None: ``router_aux_loss_coef`` of the model's config.
        average_over: "step": the DPO and BCO terms are averaged over the pairs of an optimizer step. The NTP term is
            averaged over the step's tokens or sequences; see ``ntp_average``.
            "micro_batch": the losses of the micro-batches are averaged, as in the authors' code. If
            ``optim.micro_batch_tokens`` is set, each pair counts as a micro-batch.
        from_logits: True: the model computes all logits for ``mpo_loss``. False: ``linear_mpo_loss`` computes the loss
            from the hidden states.
        shared_prefix: Arrangement of a pair in ``input_ids``. If the model does not support a value, the next value in
            this list is used.
            True: both responses follow a single copy of the prompt (``[prompt | chosen | rejected]``). All pairs of a
            micro-batch are joined to one row.
            "padded": like True, but each prompt has a separate row, padded to the longest row (for comparisons).
            "masked": like "padded", with a dense attention mask (for comparisons).
            False: each response has a separate row with its prompt.
        recompute: See ``linear_mpo_loss``.
        memory_budget_mib: ``memory_budget`` of ``linear_mpo_loss``, in MiB.
        backend: See ``mpo_loss``.
    """

    beta: Number = 0.1
    dpo_weight: Number = 0.8
    bco_weight: Number = 0.2
    ntp_weight: Number = 1.0
    label_smoothing: Number = 0.0
    ntp_average: Literal["token", "sequence"] = "token"
    preference: StrictStr | None = None
    router_aux_loss_coef: NotNegative | None = None
    average_over: Literal["step", "micro_batch"] = "step"
    from_logits: StrictBool = False
    shared_prefix: SharedPrefix = True
    recompute: StrictBool | None = None
    memory_budget_mib: PositiveCount | None = None
    backend: BackendName | None = None

    def __post_init__(self) -> None:
        if not (self.dpo_weight or self.bco_weight or self.ntp_weight):
            raise ValueError("dpo_weight, bco_weight or ntp_weight must be positive, got 0 for all")
        _ = self.config  # MPOConfig checks its values
        if self.preference is not None:
            self._check_preference(self.preference)
        if self.from_logits:
            if self.memory_budget_mib is not None:
                raise ValueError(
                    "memory_budget_mib must be None with from_logits, which computes all logits at once, got "
                    f"{self.memory_budget_mib}"
                )
            if self.recompute is False:
                raise ValueError("recompute must be None with from_logits, which keeps the logits anyway, got False")

    def _check_preference(self, name: str) -> None:
        import torch

        from mpo_ext.loss.preference import preference_loss

        empty, no_tokens = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        options = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        try:  # a call without pairs only checks the options
            preference_loss(name, empty, empty, empty, empty, no_tokens, no_tokens, **options)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"preference: {error}") from None
        if self.bco_weight or not self.dpo_weight:
            raise ValueError(
                "preference needs a positive dpo_weight, which is its weight, and bco_weight 0, got "
                f"{self.dpo_weight} and {self.bco_weight}"
            )

    @property
    def config(self) -> MPOConfig:
        """The ``MPOConfig`` with the settings of this recipe section."""
        names = [field.name for field in dataclasses.fields(MPOConfig) if field.name != "ignore_index"]
        return MPOConfig(**{name: getattr(self, name) for name in names})

    @property
    def has_preference(self) -> bool:
        """True if the loss needs rejected responses."""
        return self.dpo_weight > 0 or self.bco_weight > 0

    @property
    def needs_reference(self) -> bool:
        """True if the loss needs the log-probs of a reference."""
        if self.preference is None:
            return self.has_preference
        from mpo_ext.loss.preference import LOSSES  # imports torch

        return LOSSES[self.preference].needs_reference


@section
class RewardShiftRecipe:
    """Arguments of ``RewardShift``. The defaults are the values in the code of the MPO authors."""

    mode: Literal["cumulative", "ema", "fixed"] = "cumulative"
    decay: Number = 0.99
    update: Literal["before", "after"] = "before"
    value: Number = 0.0
    per: Literal["micro_batch", "optimizer_step"] = "micro_batch"

    def __post_init__(self) -> None:
        from mpo_ext.loss.reward_shift import RewardShift  # imports torch

        RewardShift(**dataclasses.asdict(self))  # type: ignore[call-overload]
        if self.mode != "ema" and self.decay != 0.99:
            raise ValueError(f"decay must be left out unless mode is 'ema', got {self.decay} with {self.mode!r}")


@section
class ReferenceRecipe:
    """Settings of the reference model.

    Attributes:
        kind: "copy": a second model in memory. "adapter": the trained model with its LoRA adapters disabled.
            "precomputed": log-probs that are computed once before training and stored in ``file``. None: "adapter"
            with LoRA, otherwise "copy".
        path: Model to use for "copy" and "precomputed"; None: the starting state of the trained model. Its tokenizer
            must give the tokens of the trained model the same ids.
        revision: Revision of ``path`` on the hub; None: the default revision.
        file: File of the log-probs of "precomputed"; None: ``reference.jsonl`` in the output folder.
        sync_every: Number of steps between two updates of the reference model towards the policy; 0: no updates. Only
            for the kind "copy". See TR-DPO (arXiv 2404.09656), and ``ref_model_sync_steps`` of TRL.
        sync_mix: Weight w of the policy in an update. Each parameter of the reference model becomes
            ``w * policy + (1 - w) * reference``. w = 1 is the hard update of TR-DPO. TRL has the same setting,
            ``ref_model_mixup_alpha``.
    """

    kind: Literal["copy", "adapter", "precomputed"] | None = None
    path: Text | None = None
    revision: StrictStr | None = None
    file: Text | None = None
    sync_every: Count = 0
    sync_mix: PositiveFraction = 0.6

    def __post_init__(self) -> None:
        if self.path is not None and self.kind == "adapter":
            raise ValueError(f"path must be None for kind 'adapter', which is the model itself, got {self.path!r}")
        if self.revision is not None and self.path is None:
            raise ValueError(f"revision must be None without path, got {self.revision!r}")
        if self.file is not None and self.kind != "precomputed":
            raise ValueError(f"file must be None unless kind is 'precomputed', got {self.file!r} with {self.kind!r}")


@section
class Recipe:
    """Settings of a training run.

    Attributes:
        model: Settings of the model to train.
        data: Settings of the data for training and evaluation.
        output: Settings of the files that the run writes.
        loss: Settings of the loss function.
        reward_shift: Settings of the reward shift in the BCO term.
        reference: Settings of the reference model.
        optim: Settings of optimizer, batch size and schedule.
        precision: "bf16" and "fp16" enable autocast to this dtype; "fp32" disables autocast. Parameters keep
            ``model.dtype``.
    """

    model: Section[ModelRecipe]
    data: Section[DataRecipe]
    output: Section[OutputRecipe]
    loss: Section[LossRecipe] = dataclasses.field(default_factory=LossRecipe)
    reward_shift: Section[RewardShiftRecipe] = dataclasses.field(default_factory=RewardShiftRecipe)
    reference: Section[ReferenceRecipe] = dataclasses.field(default_factory=ReferenceRecipe)
    optim: Section[OptimRecipe] = dataclasses.field(default_factory=OptimRecipe)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        self._check_reference()
        metric = self.output.best_metric
        if not self.data.eval:
            for name in ("eval_every",) if metric == "answer_accuracy" else ("keep_best", "eval_every"):
                value = getattr(self.output, name)
                if value:
                    raise ValueError(f"output.{name} must be {type(value)()} without data.eval, got {value}")
        if metric == "reward_accuracy" and not self.loss.has_preference:
            for name in ("keep_best", "early_stopping"):
                if getattr(self.output, name):
                    raise ValueError(
                        f"output.best_metric must be 'loss' with {name} if the loss has no preference term, got "
                        f"{metric!r}"
                    )
        if self.output.save_merged and self.model.lora is None:
            raise ValueError("output.save_merged must be False without model.lora, got True")

    def _check_reference(self) -> None:
        kind, reference = self.reference_kind, self.reference
        if reference.path == self.model.path and self.model.revision is not None and reference.revision is None:
            raise ValueError(
                "reference.revision must be given if reference.path is model.path and model.revision is set, got None "
                f"with {self.model.revision!r}"
            )
        if reference.kind == "adapter" and self.model.lora is None:
            raise ValueError("reference.kind must be 'copy' or 'precomputed' without model.lora, got 'adapter'")
        if kind == "adapter" and reference.path is not None:
            raise ValueError(
                "reference.kind must be 'copy' or 'precomputed' with reference.path, got "
                f"{reference.kind!r}, which is 'adapter' with model.lora"
            )
        if reference.sync_every and kind != "copy":
            raise ValueError(
                f"reference.sync_every must be 0 unless the reference is a 'copy', got {reference.sync_every} "
                f"with {'none, since the loss needs none' if kind is None else repr(kind)}"
            )
        if reference.sync_every and self.model.lora is not None and reference.path is not None:
            raise ValueError(
                "reference.sync_every must be 0 with model.lora and reference.path, whose model has no adapters to "
                f"update, got {reference.sync_every} with {reference.path!r}"
            )

    @property
    def reference_kind(self) -> str | None:
        """The kind of reference that the run uses; None if the loss does not need a reference."""
        if not self.loss.needs_reference:
            return None
        return self.reference.kind or ("adapter" if self.model.lora is not None else "copy")

    @property
    def reference_hub_options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for the model at ``reference.path``."""
        return {"revision": self.reference.revision, "trust_remote_code": self.model.trust_remote_code}

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested dicts of JSON values, in the form of a recipe file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    def to_yaml(self) -> str:
        """Returns the recipe, defaults included, as YAML text that ``load_recipe`` reads. Needs ruamel.yaml."""
        return dump_yaml(self.to_dict())


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML file and returns its recipe.

    Numbers and booleans follow YAML 1.2: ``1e-6`` is a number, ``no`` is a string. Relative paths in a recipe start at
    the current working directory, not at the folder of the file. ``data.train`` and ``data.eval`` take a source or a
    list of sources. A source is a path or a section.

    Args:
        path: Path of the file.
        overrides: Settings that replace those of the file, such as ``"optim.learning_rate=1e-6"``. Values are YAML, as
            in ``"data.train=[a.jsonl, b.jsonl]"``. The last override of a setting takes precedence.

    Raises:
        OSError: If the file cannot be read.
        ImportError: If ruamel.yaml is not installed.
        ValueError: If the file is not YAML, or a setting is unknown, missing or duplicate. Also raised if values are
            out of range or incompatible. The message names the file, the setting, the rule and the value.
        TypeError: If a value has the wrong type.
    """
    required: dict[str, Any] = {"model": {}, "data": {}, "output": {}}  # makes errors name the missing setting
    return read_recipe_file(path, overrides, lambda values: Recipe(**required | values))
