"""The recipe: all that a training run is told, as frozen dataclasses. ``load_recipe`` reads one from YAML.

Each section of a recipe file is one dataclass here; what a file leaves out has the default that stands here.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mpo_ext.checks import install_hint
from mpo_ext.loss.config import MPOConfig

#: What ``ModelRecipe.freeze`` may name.
FREEZABLE = ("vision_tower", "projector", "language_model")

_BACKENDS = ("cpu", "cuda", "triton", "reference")


class _Section:
    """A part of a recipe: values are brought to the types of their fields, then checked.

    A message begins with the name of the field, so that ``load_recipe`` can put the section before it.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, _convert(getattr(self, name), hint, name))
        self._check()

    def _check(self) -> None:
        """Raises ValueError where a value is out of its range, or two do not go together."""

    def _check_range(self, rule: str, *names: str) -> None:
        """Raises ValueError unless each of the fields is finite and fits a rule as ``">= 1"``, or is None."""
        sign, bound = rule.split()
        fits = {">=": lambda value: value >= float(bound), ">": lambda value: value > float(bound)}[sign]
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                words = {">= 0": "finite and not negative", "> 0": "positive and finite"}
                raise ValueError(f"{name} must be {words.get(rule, f'at least {bound}')}, got {value}")

    def _check_not_empty(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) in ("", ()):
                raise ValueError(f"{name} must not be empty, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe(_Section):
    """Low-rank adapters through peft (arXiv 2106.09685).

    Attributes:
        rank: Of the adapters.
        alpha: The adapters' product is scaled by ``alpha / rank``.
        dropout: On the adapters' input. Must be 0 for policy and reference to agree at step 0.
        target: Names of the layers that get one, or "all-linear": all linear layers of the language model but the
            output head.
        quantization: None, or "4bit": the base weights in NF4 through bitsandbytes (QLoRA, arXiv 2305.14314).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: str | tuple[str, ...] = "all-linear"
    quantization: Literal["4bit"] | None = None

    def _check(self) -> None:
        self._check_range(">= 1", "rank")
        self._check_range("> 0", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        self._check_not_empty("target")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe(_Section):
    """What is trained.

    Attributes:
        path: Folder or name of a Hugging Face causal or image-text-to-text model.
        revision: Of a model from the hub.
        dtype: Of the parameters: "float32", "bfloat16", "float16", or "auto" (as saved).
        attention: Implementation, as transformers names it: "sdpa" or "eager"; with others ("flash_attention_2",
            "flex_attention"), for which no masks are made, the two responses run as two rows.
        freeze: Parts that are not trained: any of "vision_tower", "projector", "language_model".
        lora: Adapters in place of the full weights; None trains the weights.
        gradient_checkpointing: Whether backward computes the activations of each layer again.
        chat_template: Replaces the template of the processor.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: str = "sdpa"
    freeze: tuple[str, ...] = ()
    lora: LoraRecipe | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None

    def _check(self) -> None:
        self._check_not_empty("path", "attention")
        for part in self.freeze:
            if part not in FREEZABLE:
                raise ValueError(
                    f"freeze must name parts among {', '.join(FREEZABLE)}, got {part!r}{_hint(part, FREEZABLE)}"
                )
        if set(self.freeze) == set(FREEZABLE):
            raise ValueError(f"freeze must leave something to train, got {', '.join(self.freeze)}")
        if self.lora is not None and self.freeze:
            raise ValueError(
                f"freeze must be empty with lora, which freezes all but the adapters, got {', '.join(self.freeze)}"
            )
        if self.dtype == "float16" and self.lora is None:
            raise ValueError(
                "dtype must be 'float32' (or 'bfloat16') where the weights themselves are trained, got 'float16': the "
                "loss scaler of precision fp16 needs float32 master weights"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecipe(_Section):
    """One file or folder of pairs, as ``mpo_ext.data.open_pairs`` takes it.

    Attributes:
        path: MMPR meta file or lines, pairs of ``mpo-ext sample``, TRL lines, or the folder of a Hugging Face dataset.
        format: "mmpr", "pairs", "trl" or "hf"; None finds out.
        root: Folder that relative images start at.
        root_map: (old, new) prefixes of images and annotations that have moved.
        image_dir: Where images of a Hugging Face dataset that have no path are kept.
        repeat_time: How often an epoch meets each pair: 0.5 takes half of them at random, 2 each twice. Multiplies the
            ``repeat_time`` of each subset of an MMPR meta file.
    """

    path: str
    format: Literal["mmpr", "pairs", "trl", "hf"] | None = None
    root: str | None = None
    root_map: tuple[tuple[str, str], ...] = ()
    image_dir: str | None = None
    repeat_time: float = 1.0

    def _check(self) -> None:
        self._check_not_empty("path")
        self._check_range("> 0", "repeat_time")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe(_Section):
    """What it is trained on.

    Attributes:
        train: Sources, mixed by their ``repeat_time``.
        eval: Sources to evaluate on; none is no evaluation.
        max_length: Most tokens of a prompt with the longer of its responses; None sets no limit.
        too_long: What becomes of a longer pair: "drop" leaves it out and counts it; "truncate" cuts the ends of the
            responses (never the prompt, which holds the images), and drops it where the prompt leaves no room.
        skip_bad: Leaves out and counts pairs that cannot be read (a bad line, a missing image), in place of an error.
        group_prompts: Puts the pairs of one question next to each other, so that they share its prompt.
        workers: Processes that read and encode pairs ahead; 0 does it in the training process.
    """

    train: tuple[SourceRecipe, ...]
    eval: tuple[SourceRecipe, ...] = ()
    max_length: int | None = 4096
    too_long: Literal["drop", "truncate"] = "drop"
    skip_bad: bool = False
    group_prompts: bool = False
    workers: int = 0

    def _check(self) -> None:
        self._check_not_empty("train")
        self._check_range(">= 2", "max_length")
        self._check_range(">= 0", "workers")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossRecipe(_Section):
    """The loss. The first six are those of ``MPOConfig``.

    Attributes:
        beta: As in ``MPOConfig``, like the next five.
        dpo_weight: With ``bco_weight`` 0 too it is SFT: no reference, and rejected responses are not computed.
        bco_weight: See there.
        ntp_weight: See there.
        label_smoothing: See there.
        ntp_average: See there.
        preference: Name of a loss of ``mpo_ext.loss.preference`` that takes the place of the DPO term; None is DPO.
        average_over: "step" averages over all pairs and chosen tokens of an optimizer step, on whatever ranks and in
            whatever micro-batches they are; "micro_batch" averages the means of the micro-batches, as the authors'
            code does.
        from_logits: Takes ``mpo_loss`` on the model's logits in place of ``linear_mpo_loss``.
        shared_prefix: One sequence ``[prompt | chosen | rejected]`` per pair, where the model allows it; False runs
            the two responses as two rows.
        recompute: As in ``linear_mpo_loss``.
        memory_budget_mib: As in ``linear_mpo_loss``, in MiB.
        backend: As in ``mpo_loss``.
    """

    beta: float = 0.1
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    ntp_weight: float = 1.0
    label_smoothing: float = 0.0
    ntp_average: Literal["token", "sequence"] = "token"
    preference: str | None = None
    average_over: Literal["step", "micro_batch"] = "step"
    from_logits: bool = False
    shared_prefix: bool = True
    recompute: bool = True
    memory_budget_mib: int | None = None
    backend: str | None = None

    def _check(self) -> None:
        if not (self.dpo_weight or self.bco_weight or self.ntp_weight):
            raise ValueError("dpo_weight, bco_weight or ntp_weight must be positive, got 0 for all")
        _ = self.config  # has checks of its own
        if self.preference is not None:
            self._check_preference(self.preference)
        self._check_range(">= 1", "memory_budget_mib")
        if self.from_logits:
            if self.memory_budget_mib is not None:
                raise ValueError(
                    "memory_budget_mib must be None with from_logits, which makes all logits at once, got "
                    f"{self.memory_budget_mib}"
                )
            if not self.recompute:
                raise ValueError("recompute must be True with from_logits, which keeps the logits anyway, got False")
        if self.backend is not None and self.backend not in _BACKENDS:
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, _BACKENDS))}, got {self.backend!r}")

    def _check_preference(self, name: str) -> None:
        import torch

        from mpo_ext.loss.preference import preference_loss

        none, no_tokens = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        try:  # of no pair, for its checks
            preference_loss(
                name,
                none,
                none,
                none,
                none,
                no_tokens,
                no_tokens,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
            )
        except ValueError as error:
            raise ValueError(f"preference: {error}") from None
        if self.bco_weight or not self.dpo_weight:
            raise ValueError(
                "preference needs a positive dpo_weight, which is its weight, and bco_weight 0, got "
                f"{self.dpo_weight} and {self.bco_weight}"
            )

    @property
    def config(self) -> MPOConfig:
        """The part that the loss functions take."""
        names = [field.name for field in dataclasses.fields(MPOConfig) if field.name != "ignore_index"]
        return MPOConfig(**{name: getattr(self, name) for name in names})

    @property
    def has_preference(self) -> bool:
        """Whether rejected responses and a reference are needed."""
        return self.dpo_weight > 0 or self.bco_weight > 0

    @property
    def needs_reference(self) -> bool:
        """Whether the preference compares with a reference."""
        if self.preference is None:
            return self.has_preference
        from mpo_ext.loss.preference import LOSSES  # imports torch

        return LOSSES[self.preference].needs_reference


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardShiftRecipe(_Section):
    """Arguments of ``RewardShift``; the default is the authors' code."""

    mode: Literal["cumulative", "ema", "fixed"] = "cumulative"
    decay: float = 0.99
    update: Literal["before", "after"] = "before"
    value: float = 0.0
    per: Literal["micro_batch", "optimizer_step"] = "micro_batch"

    def _check(self) -> None:
        from mpo_ext.loss.reward_shift import RewardShift  # imports torch

        RewardShift(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRecipe(_Section):
    """The reference model.

    Attributes:
        kind: "copy" keeps the starting model in memory; "adapter" is the model with its LoRA adapters switched off;
            "precomputed" computes the log-probs of all pairs once, into ``file``, and needs no second model then.
            None takes "adapter" with LoRA and "copy" without.
        path: Another model for "copy" and "precomputed"; None takes the one that is trained, as it is at the start.
        file: Where "precomputed" keeps the log-probs; None is ``reference.jsonl`` in the output folder.
        sync_every: Steps between two moves of a "copy" towards the policy (TR-DPO, arXiv 2404.09656); 0 never. TRL's
            ``ref_model_sync_steps``.
        sync_mix: Share of the policy in such a move: ``mix * policy + (1 - mix) * reference``, of each parameter; 1 is
            the paper's hard update. TRL's ``ref_model_mixup_alpha``.
    """

    kind: Literal["copy", "adapter", "precomputed"] | None = None
    path: str | None = None
    file: str | None = None
    sync_every: int = 0
    sync_mix: float = 0.6

    def _check(self) -> None:
        self._check_range(">= 0", "sync_every")
        if not 0 < self.sync_mix <= 1:
            raise ValueError(f"sync_mix must be in (0, 1], got {self.sync_mix}")
        for name in ("path", "file"):
            self._check_not_empty(name)
        if self.path is not None and self.kind == "adapter":
            raise ValueError(f"path must be None for kind 'adapter', which is the model itself, got {self.path!r}")
        if self.file is not None and self.kind != "precomputed":
            raise ValueError(f"file must be None unless kind is 'precomputed', got {self.file!r} with {self.kind!r}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimRecipe(_Section):
    """AdamW and its schedule. The defaults are the authors' (InternVL2.5-MPO).

    Attributes:
        learning_rate: At its highest.
        batch_size: Pairs of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: Pairs that go through the model at a time, on each rank.
        epochs: Passes over the data.
        max_steps: Ends earlier; None does not. The schedule is that of the steps which are really run.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW, on matrices only: no biases, no norms.
        warmup_ratio: Share of the steps in which the rate rises from 0.
        schedule: What the rate does then: "cosine" to 0, "linear" to 0, or "constant".
        max_grad_norm: The gradient is clipped to this norm; 0 does not clip.
        seed: Of the order of the pairs, and of everything random.
    """

    learning_rate: float = 1e-6
    batch_size: int = 256
    micro_batch_size: int = 1
    epochs: int = 1
    max_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    seed: int = 0

    def _check(self) -> None:
        self._check_range(">= 0", "learning_rate", "weight_decay", "max_grad_norm", "seed")
        self._check_range(">= 1", "batch_size", "micro_batch_size", "epochs", "max_steps")
        self._check_range("> 0", "eps")
        if self.batch_size < self.micro_batch_size:
            raise ValueError(
                f"batch_size must be at least micro_batch_size {self.micro_batch_size}, got {self.batch_size}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputRecipe(_Section):
    """What is written, and when.

    Attributes:
        dir: The folder of the run.
        save_every: Steps between two checkpoints; 0 writes one at the end only.
        keep_last: Checkpoints that are kept.
        keep_best: Keeps the checkpoint with the best evaluation besides; needs ``data.eval``.
        eval_every: Steps between two evaluations; 0 evaluates at the end only.
        best_metric: "reward_accuracy" (higher is better) or "loss" (lower is better).
        log_every: Steps between two lines in the log.
        trackers: As accelerate names them: "tensorboard", "wandb", ...
        resume: "auto" goes on from the newest checkpoint in ``dir``; "never" refuses a folder that has one; or the
            path of a checkpoint.
        on_nonfinite: At a loss or gradient that is not finite: "stop", or "skip" the step and count it.
        save_merged: With LoRA, writes the merged model besides the adapters.
    """

    dir: str
    save_every: int = 200
    keep_last: int = 2
    keep_best: bool = False
    eval_every: int = 0
    best_metric: Literal["reward_accuracy", "loss"] = "reward_accuracy"
    log_every: int = 1
    trackers: tuple[str, ...] = ()
    resume: str = "auto"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    save_merged: bool = False

    def _check(self) -> None:
        self._check_not_empty("dir", "resume")
        self._check_range(">= 0", "save_every", "eval_every")
        self._check_range(">= 1", "keep_last", "log_every")
        if "" in self.trackers:
            raise ValueError(f"trackers must not hold an empty name, got {self.trackers}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(_Section):
    """A training run.

    Attributes:
        model: What is trained.
        data: What it is trained on.
        output: What is written, and when.
        loss: The loss.
        reward_shift: delta of its BCO term.
        reference: The reference model.
        optim: Optimizer, batch and schedule.
        precision: Arithmetic of the model: "fp32", "bf16" or "fp16" (autocast; the parameters keep ``model.dtype``).
    """

    model: ModelRecipe
    data: DataRecipe
    output: OutputRecipe
    loss: LossRecipe = dataclasses.field(default_factory=LossRecipe)
    reward_shift: RewardShiftRecipe = dataclasses.field(default_factory=RewardShiftRecipe)
    reference: ReferenceRecipe = dataclasses.field(default_factory=ReferenceRecipe)
    optim: OptimRecipe = dataclasses.field(default_factory=OptimRecipe)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def _check(self) -> None:
        kind = self.reference_kind
        if self.reference.kind == "adapter" and self.model.lora is None:
            raise ValueError("reference.kind must be 'copy' or 'precomputed' without model.lora, got 'adapter'")
        if kind == "adapter" and self.reference.path is not None:
            raise ValueError(
                "reference.kind must be 'copy' or 'precomputed' for a model of reference.path, got "
                f"{self.reference.kind!r}, which is 'adapter' with model.lora"
            )
        if self.reference.sync_every and kind != "copy":
            raise ValueError(
                f"reference.sync_every must be 0 unless the reference is a 'copy', got {self.reference.sync_every} "
                f"with {'none, since the loss needs none' if kind is None else repr(kind)}"
            )
        if self.reference.sync_every and self.model.lora is not None and self.reference.path is not None:
            raise ValueError(
                "reference.sync_every must be 0 with model.lora and reference.path, whose model has no adapters that "
                f"could follow, got {self.reference.sync_every} with {self.reference.path!r}"
            )
        if not self.data.eval:
            for name in ("keep_best", "eval_every"):
                value = getattr(self.output, name)
                if value:
                    raise ValueError(f"output.{name} must be {type(value)()} without data.eval, got {value}")
        if self.output.keep_best and self.output.best_metric == "reward_accuracy" and kind is None:
            raise ValueError(
                "output.best_metric must be 'loss' with keep_best where the loss has no preference term, got "
                "'reward_accuracy'"
            )
        if self.output.save_merged and self.model.lora is None:
            raise ValueError("output.save_merged must be False without model.lora, got True")

    @property
    def reference_kind(self) -> str | None:
        """The reference that is taken; None where the loss needs none."""
        if not self.loss.needs_reference:
            return None
        return self.reference.kind or ("adapter" if self.model.lora is not None else "copy")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values (dicts, lists, numbers, strings), as ``load_recipe`` reads it from YAML."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The recipe as a file for ``load_recipe``, defaults included. Needs PyYAML."""
        yaml = _import_yaml()
        return yaml.dump(self.to_dict(), Dumper=_yaml_classes()[1], sort_keys=False, allow_unicode=True, width=100)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file.

    Numbers and booleans are those of YAML 1.2: ``1e-6`` is a number, ``no`` a string. Relative paths in a recipe start
    at the current folder, not at that of the file. ``data.train`` and ``data.eval`` may be one path or section, or a
    list of them.

    Args:
        path: Of the file.
        overrides: ``"optim.learning_rate=1e-6"`` puts a value in place of the file's; values are YAML
            (``"data.train=[a.jsonl, b.jsonl]"``). The last of several for one setting counts.

    Returns:
        The recipe.

    Raises:
        OSError: If the file cannot be read.
        ImportError: If PyYAML is missing.
        ValueError: If it is no YAML, a setting is unknown, missing or there twice, a value is out of its range, or
            two do not go together. Messages name the file, the setting in full, the rule and the value.
        TypeError: If a value is of the wrong type.
    """
    yaml = _import_yaml()
    loader = _yaml_classes()[0]
    source = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"recipe must exist, got {source}")
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: a recipe must be YAML: {error}") from error
    if overrides:
        source = f"{source} with {' '.join(overrides)}"
    try:
        if not isinstance(values, Mapping):
            raise TypeError(f"a recipe must be a mapping of sections, got {_shown(values)}")
        for override in overrides:
            _override(values, override, functools.partial(yaml.load, Loader=loader), yaml.YAMLError)
        return _section(values, Recipe, "")
    except (TypeError, ValueError) as error:
        raise _renamed(error, f"{source}: ") from error


def _override(values: Any, override: str, parse: Any, yaml_error: type[Exception]) -> None:
    """Puts ``KEY=VALUE`` into the parsed file."""
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not all((*sections, name)):
        raise ValueError(f"an override must read KEY=VALUE, got {override!r}")
    try:
        value = parse(text)
    except yaml_error as error:
        raise ValueError(f"{key} must have a value in YAML, got {text!r}: {error}") from error
    for depth, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ValueError(
                f"{key} must be in a section, but {'.'.join(sections[:depth])} is {_shown(values)}: give it whole"
            )
    values[name] = value


def _section(values: Mapping[Any, Any], kind: type, where: str) -> Any:
    """Builds a dataclass from a mapping; ``where`` is its dotted name, empty for the recipe itself."""
    prefix = f"{where}." if where else ""
    hints = _hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown setting {prefix}{key}{_unknown_hint(str(key), where, hints)}")
    arguments = {}
    for field in dataclasses.fields(kind):
        name, hint = field.name, hints[field.name]
        is_section = dataclasses.is_dataclass(hint)
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        value = values.get(name)
        if is_section and value is None and (name in values or not has_default):
            value = {}  # a section whose lines are all comments
        elif name not in values:
            if not has_default:
                raise ValueError(f"{prefix}{name} must be given")
            continue
        arguments[name] = _convert(value, hint, f"{prefix}{name}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise _renamed(error, prefix) from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Brings a value to a type: lists become tuples, ints floats where floats belong, mappings sections."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        is_list = isinstance(value, (list, tuple))
        fitting = [option for option in options if (typing.get_origin(option) is tuple) == is_list]
        if len(options) > 1 and not (fitting and (is_list or isinstance(value, fitting[0]))):
            raise TypeError(f"{where} must be {_describe(hint)}, got {_shown(value)}")
        return _convert(value, options[0] if len(options) == 1 else fitting[0], where)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise (ValueError if isinstance(value, str) else TypeError)(
                f"{where} must be {_describe(hint)}, got {_shown(value)}"
            )
        return value
    if origin is tuple:
        if arguments[0] is SourceRecipe and isinstance(value, (str, Mapping, SourceRecipe)):
            value = [value]
        variable = arguments[-1] is Ellipsis
        if not isinstance(value, (list, tuple)) or not (variable or len(value) == len(arguments)):
            raise TypeError(f"{where} must be {_describe(hint)}, got {_shown(value)}")
        elements = (arguments[0],) * len(value) if variable else arguments
        return tuple(
            _convert(element, kind, f"{where}[{index}]")
            for index, (element, kind) in enumerate(zip(value, elements, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if hint is SourceRecipe and isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} must be {_describe(hint)}, got {_shown(value)}")
        return _section(value, typing.cast(type, hint), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        quote = ": put it in quotes" if hint is str and isinstance(value, (bool, int, float)) else ""
        raise TypeError(f"{where} must be {_describe(hint)}, got {_shown(value)}{quote}")
    return value


def _describe(hint: Any, *, many: bool = False) -> str:
    """A type in words."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if option is type(None) else _describe(option, many=many) for option in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        number = "" if arguments[-1] is Ellipsis else f" {len(arguments)}"
        return f"{'lists' if many else 'a list'} of{number} {_describe(arguments[0], many=True)}"
    if hint is SourceRecipe:
        return "paths or sections" if many else "a path or a section"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    word = words.get(hint, "a section")
    return f"{word.partition(' ')[2]}s" if many else word


def _unknown_hint(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """What may have been meant by an unknown setting: one of its section, or of the same name in another."""
    prefix = f"{where}." if where else ""
    everywhere = dict.fromkeys([*(f"{prefix}{name}" for name in hints), *_known_settings()])
    close = _close(key, hints)
    if close is not None:
        return f"; did you mean {prefix}{close}?"
    elsewhere = [name for name in everywhere if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known settings: {', '.join(f'{prefix}{name}' for name in hints)}"


def _known_settings(kind: type | None = None, prefix: str = "") -> list[str]:
    """The dotted names of all settings."""
    found = []
    for name, hint in _hints(kind or Recipe).items():
        found.append(f"{prefix}{name}")
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                found += _known_settings(typing.cast(type, option), f"{prefix}{name}.")
    return found


def _renamed(error: Exception, prefix: str) -> Exception:
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{prefix}{error}")


def _hint(word: str, known: Sequence[str]) -> str:
    close = _close(word, known)
    return f"; did you mean {close!r}?" if close is not None else ""


def _close(word: str, known: typing.Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, (list, tuple)) else value


def _import_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"recipes need PyYAML: {install_hint('train')}") from error
    return yaml


@functools.cache
def _yaml_classes() -> tuple[Any, Any]:
    """Loader and dumper. By PyYAML's own rules, of YAML 1.1, 1e-6 is a string, ``no`` a boolean, and 1:30 ninety."""
    yaml = _import_yaml()
    core = {  # the core schema of YAML 1.2
        "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""], lambda text: None),
        "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF"), lambda text: text.lower() == "true"),
        "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789"), _parse_int),
        "float": (
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
            list("-+.0123456789"),
            lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
        ),
    }

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"a setting must be given once, got {key.value!r} again", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        """Quotes what either version of YAML would not read as a string."""

    for name, (pattern, first, parse) in core.items():
        tag = f"tag:yaml.org,2002:{name}"
        for kind in (Loader, Dumper):
            kind.add_implicit_resolver(tag, re.compile(f"^{pattern}$"), first)
        Loader.add_constructor(tag, lambda loader, node, parse=parse: parse(loader.construct_scalar(node)))
    return Loader, Dumper


def _parse_int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)
