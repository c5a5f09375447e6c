"""The recipe of ``mpo-ext iterate``: frozen dataclasses that are read from a YAML file.

Each class defines a section of the file and the defaults of the settings that the file omits.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StrictBool, StrictStr

from mpo_ext.checks import shorten
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.train.output_recipe import to_matcher
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.recipe_file import read_recipe_file
from mpo_ext.train.settings import (
    NOT_EMPTY,
    Count,
    Number,
    Positive,
    PositiveCount,
    Section,
    StringOrStrings,
    Strings,
    Text,
    TwoStrings,
    list_of,
    section,
    wrong_type,
)

#: Settings of a training recipe that each round sets.
_SET_BY_ROUNDS = (
    *("model.path", "output.dir", "output.resume", "output.push_to_hub", "reference.path", "reference.file"),
)
_Matcher = Annotated[dict[str, Any], BeforeValidator(to_matcher)]
_RootMap = Annotated[tuple[TwoStrings, ...], list_of("lists of 2 strings")]


def _to_given_section(value: Any) -> Any:
    if not isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
        raise wrong_type("a section ({} takes its defaults)")
    return value


def _to_questions(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        return {"path": value}
    if not isinstance(value, (Mapping, QuestionsRecipe)):
        raise wrong_type("a path, a list of paths or a section")
    return value


def _to_data(value: Any) -> Any:
    """Converts a path, or a list of paths, to a mapping from names to paths.

    The names are the file names without suffix.
    """
    paths = [value] if isinstance(value, str) else value
    if isinstance(paths, Mapping):
        return paths
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise wrong_type("a path, a list of paths or a mapping from names to paths")
    named = {Path(path).stem: path for path in paths}
    if len(named) < len(paths):
        raise ValueError(f"paths must have different file names, or names as in {{test: a/test.jsonl}}, got {paths}")
    return named


def _check_matcher(settings: Mapping[str, Any]) -> None:
    from mpo_ext.answers import matcher

    try:
        matcher(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"matcher: {error}") from error


@section
class QuestionsRecipe:
    """Settings of the questions for which a pipeline samples responses.

    Attributes:
        path: File of questions, or meta file (.json) that lists such files, as for ``mpo-ext sample``. A list has a
            path for each round.
        image_root: Folder at which relative image paths start. A meta file names its own folders instead.
        root_map: Tuples (old, new) for a meta file: paths in the folder ``old`` are looked up in the folder ``new``.
        limit: Maximum number of questions, taken from the beginning of the file; None: all.
    """

    path: StringOrStrings
    image_root: StrictStr = ""
    root_map: _RootMap = ()
    limit: PositiveCount | None = None

    def path_of(self, number: int) -> str:
        """Returns the file of questions for the round ``number``, counted from 1."""
        return self.path if isinstance(self.path, str) else self.path[number - 1]


_Questions = Annotated[QuestionsRecipe, BeforeValidator(_to_questions)]


@section
class CorrectnessRecipe:
    """Settings of the pipeline "correctness". It makes pairs of a correct and a wrong response.

    Fields not listed here are options of ``mpo-ext sample correctness``.

    Attributes:
        questions: Questions of this pipeline; None: ``sample.questions``.
        format_pairs: Whether to train also on the pairs in ``format_pairs.jsonl``. Their rejected responses have no
            answer in the form that ``style`` requires.
        repeat_time: Average number of times that an epoch visits each pair.
        max_pairs: Maximum number of pairs per epoch; None: no limit. Each epoch draws a new random selection.
    """

    questions: _Questions | None = None
    samples: PositiveCount = 32
    temperature: Number = 0.7
    top_k: Count = 50
    top_p: Number = 1.0
    max_new_tokens: PositiveCount = 4096
    allow_truncated: StrictBool = False
    template: Text | None = None
    style: Text | None = None
    matcher: _Matcher = dataclasses.field(default_factory=lambda: {"kind": "vqa"}, hash=False)
    pairs_per_question: Count = 15
    accuracy: Annotated[tuple[Number, Number], list_of("numbers", 2)] = (0.0, 1.0)
    length_balance: StrictBool = False
    reuse_limit: Count = 0
    keep_duplicates: StrictBool = False
    format_pairs: StrictBool = False
    repeat_time: Positive = 1.0
    max_pairs: PositiveCount | None = None

    def __post_init__(self) -> None:
        _check_matcher(self.matcher)
        _ = self.pipeline(0)  # checks the values

    def pipeline(self, seed: int) -> Any:
        """Creates the pipeline of ``mpo_ext.generate`` with these settings and the sampling seed ``seed``."""
        from mpo_ext.generate.correctness import Correctness, CorrectnessConfig

        names = ("samples", "template", "style", "matcher", "pairs_per_question", "accuracy", "length_balance")
        settings = {name: getattr(self, name) for name in (*names, "reuse_limit", "allow_truncated")}
        settings |= {"sampling": _sampling(self), "seed": seed, "dedupe": not self.keep_duplicates}
        return Correctness(CorrectnessConfig(**settings))


@section
class DropoutNTPRecipe:
    """Settings of the pipeline "dropout-ntp".

    The model continues the beginning of the chosen response, by default without seeing the image. The result is the
    rejected response. Fields not listed here are options of ``mpo-ext sample dropout-ntp``.

    Attributes:
        questions: Questions of this pipeline; None: ``sample.questions``.
        sample_chosen: Whether the round's model generates a chosen response for each question without a chosen
            response.
        repeat_time: Average number of times that an epoch visits each pair.
        max_pairs: Maximum number of pairs per epoch; None: no limit. Each epoch draws a new random selection.
    """

    questions: _Questions | None = None
    samples: PositiveCount = 1
    temperature: Number = 0.7
    top_k: Count = 50
    top_p: Number = 1.0
    max_new_tokens: PositiveCount = 2048
    allow_truncated: StrictBool = False
    keep: Number = 0.5
    unit: Literal["tokens", "words"] = "tokens"
    with_image: StrictBool = False
    sample_chosen: StrictBool = True
    allow_wrong_chosen: StrictBool = False
    style: Text | None = None
    matcher: _Matcher = dataclasses.field(default_factory=lambda: {"kind": "vqa"}, hash=False)
    repeat_time: Positive = 1.0
    max_pairs: PositiveCount | None = None

    def __post_init__(self) -> None:
        _check_matcher(self.matcher)
        _ = self.pipeline(0)  # checks the values

    def pipeline(self, seed: int) -> Any:
        """Creates the pipeline of ``mpo_ext.generate`` with these settings and the sampling seed ``seed``."""
        from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig

        names = ("samples", "keep", "unit", "with_image", "sample_chosen", "allow_wrong_chosen", "allow_truncated")
        settings = {name: getattr(self, name) for name in (*names, "matcher")}
        settings |= {"sampling": _sampling(self), "seed": seed, "style": self.style or "final_answer"}
        return DropoutNTP(DropoutNTPConfig(**settings))


PipelineRecipe = CorrectnessRecipe | DropoutNTPRecipe


def _sampling(recipe: "PipelineRecipe | RoundEvaluationRecipe") -> SamplingConfig:
    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    return SamplingConfig(**{name: getattr(recipe, name) for name in names})


@section
class SampleRecipe:
    """Settings of the pipelines that make the pairs of a round. At least one pipeline must be set.

    Attributes:
        questions: A file of questions, a list with a file for each round, or a section ``QuestionsRecipe``. None: each
            pipeline has its own ``questions``.
        correctness: Settings of the pipeline "correctness"; ``{}``: the default settings. None disables the pipeline.
        dropout_ntp: Settings of the pipeline "dropout-ntp"; ``{}``: the default settings. None disables the pipeline.
    """

    questions: _Questions | None = None
    correctness: Annotated[CorrectnessRecipe | None, BeforeValidator(_to_given_section)] = None
    dropout_ntp: Annotated[DropoutNTPRecipe | None, BeforeValidator(_to_given_section)] = None

    def __post_init__(self) -> None:
        if not self.pipelines:
            raise ValueError("correctness or dropout_ntp must be given, got neither ({} takes the defaults)")
        for name, pipeline in self.pipelines.items():
            if self.questions is None and pipeline.questions is None:
                raise ValueError(f"questions must be given, or {name.replace('-', '_')}.questions, got neither")

    @property
    def pipelines(self) -> dict[str, PipelineRecipe]:
        """The settings of the enabled pipelines, by the name "correctness" or "dropout-ntp"."""
        given = {"correctness": self.correctness, "dropout-ntp": self.dropout_ntp}
        return {name: pipeline for name, pipeline in given.items() if pipeline is not None}

    def questions_of(self, pipeline: PipelineRecipe) -> QuestionsRecipe:
        """Returns the questions of a pipeline. Without ``pipeline.questions``, returns the field ``questions``."""
        questions = pipeline.questions or self.questions
        assert questions is not None
        return questions


@section
class EngineRecipe:
    """Settings of the engine for sampling and evaluation.

    Attributes:
        name: "transformers" or "vllm". "openai" is not allowed, because a server does not load the model of a round.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: Device of "transformers"; None: the GPU of the process, or the CPU if there is no GPU.
        batch_size: Samples per batch of "transformers"; None: 16.
        block_size: Maximum number of responses in a block. The responses of a block are saved together. All responses
            to a question are in the same block, even if they exceed this number. A killed process loses its
            unfinished blocks: usually at most one block, or several with "vllm".
        options: Arguments of ``from_pretrained`` or ``VLLMEngine``, such as ``{tensor_parallel_size: 2}``.
    """

    name: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Text | None = None
    batch_size: PositiveCount | None = None
    block_size: PositiveCount = 64
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("device", "batch_size") if self.name == "vllm" else ():
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} must be left out with the engine 'vllm', got {value!r}: use options")
        for name in self.options:
            if not name.isidentifier() or name in ("trust_remote_code", "revision"):
                raise ValueError(f"options must be other arguments than those of train.model, got {name!r}")


@section
class RoundEvaluationRecipe:
    """Settings of the evaluation of each round. Fields not listed here are options of ``mpo-ext evaluate``.

    Attributes:
        data: Files of questions, or meta files (.json) that list such files: a path, a list of paths, or a mapping
            from names to paths.
        prompts: Names of prompt templates; "none" asks the question without a template.
        image_root: Folder at which relative image paths start. A meta file names its own folders instead.
        root_map: Tuples (old, new) for meta files: paths in the folder ``old`` are looked up in the folder ``new``.
        limit: Maximum number of questions of each file; None: all.
    """

    data: Annotated[dict[str, Text], NOT_EMPTY, BeforeValidator(_to_data)]
    prompts: Annotated[Strings, NOT_EMPTY] = ("direct",)
    samples: PositiveCount = 1
    temperature: Number = 0.0
    top_k: Count = 50
    top_p: Number = 1.0
    max_new_tokens: PositiveCount | None = None
    seed: Count = 0
    style: Text | None = None
    matcher: _Matcher = dataclasses.field(default_factory=lambda: {"kind": "vqa"}, hash=False)
    image_root: StrictStr = ""
    root_map: _RootMap = ()
    limit: PositiveCount | None = None

    def __post_init__(self) -> None:
        from mpo_ext.evaluate.scoring import EvaluationConfig

        _check_matcher(self.matcher)
        names = ("prompts", "samples", "temperature", "top_k", "top_p", "max_new_tokens", "seed", "style", "matcher")
        _ = EvaluationConfig(**{name: getattr(self, name) for name in names}).evaluations()  # checks the values
        if bad := [name for name in self.data if "=" in name or not name]:
            raise ValueError(f"data must have names without '=', got {bad[0]!r}")


@section
class LaunchRecipe:
    """Commands that launch the stages, such as ``[torchrun, --nproc-per-node, "4"]``.

    ``-m MODULE`` and the arguments of the module are added to a command. An empty list starts a single process with
    the current Python.

    Attributes:
        sample: Launch command of the pipelines that make pairs.
        train: Launch command of training, such as ``[accelerate, launch, --config_file, fsdp2.yaml]``.
        evaluate: Launch command of the evaluation.
    """

    sample: Strings = ()
    train: Strings = ()
    evaluate: Strings = ()


@section
class IterateRecipe:
    """Settings of a run of several rounds.

    Attributes:
        model: Folder or hub id of the model that the first round starts from.
        output: Folder of the run.
        rounds: Number of rounds. A finished run continues if this number is raised.
        sample: Settings of the pipelines that make pairs.
        train: Sections of a training recipe (``mpo_ext.train.recipe``), without the settings that each round sets.
            Sources in ``data.train`` are mixed with the pairs of each round.
        evaluate: Settings of the evaluation of ``model`` and of the model of each round.
        reference: Reference model of a round: "round" is the model that the round starts from, as in on-policy DPO;
            "first" is the model that the first round starts from.
        seed: Sampling seed of the first round. The seed increases by 1 from round to round.
        engine: Settings of the engine that samples and evaluates.
        launch: Launch commands for sampling, training and evaluation on several GPUs.
        page_pairs: Maximum number of pairs per HTML page; 0 writes no pages. A page shows the pairs that a pipeline
            made in a round.
        keep_checkpoints: Whether the checkpoints of a round are kept after its training. Final models are always kept.
    """

    model: Text
    output: Text
    rounds: PositiveCount
    sample: Section[SampleRecipe]
    train: Annotated[dict[str, Any], BeforeValidator(_to_given_section)] = dataclasses.field(hash=False)
    evaluate: Section[RoundEvaluationRecipe]
    reference: Literal["round", "first"] = "round"
    seed: Count = 0
    engine: Section[EngineRecipe] = dataclasses.field(default_factory=EngineRecipe)
    launch: Section[LaunchRecipe] = dataclasses.field(default_factory=LaunchRecipe)
    page_pairs: Count = 500
    keep_checkpoints: StrictBool = False

    def __post_init__(self) -> None:
        for name in _SET_BY_ROUNDS:
            if (value := _setting(self.train, name)) is not None:
                raise ValueError(f"train.{name} must be left out, because each round sets it, got {shorten(value)}")
        if _setting(self.train, "model.lora") is not None and _setting(self.train, "output.save_merged") is False:
            raise ValueError(
                "train.output.save_merged must be true or left out with lora, got false: the next round starts from "
                "the merged model"
            )
        revision = _setting(self.train, "model.revision")
        if self.reference == "first" and revision is not None:
            raise ValueError(
                f"reference must be 'round' with train.model.revision, got 'first' with {revision!r}: download the "
                "model, and name its folder"
            )
        for number in (1, 2):
            _ = self.train_recipe(number, [{"path": "pairs.jsonl"}])  # checks the values
        for name, pipeline in self.sample.pipelines.items():
            paths = self.sample.questions_of(pipeline).path
            if not isinstance(paths, str) and len(paths) < self.rounds:
                raise ValueError(
                    f"sample.questions of {name} must have a file for each of the {self.rounds} rounds, got "
                    f"{len(paths)} files"
                )

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output)

    def round_folder(self, number: int) -> Path:
        """Returns the folder of a round. Round 0 is the evaluation of the first model."""
        return self.folder / f"round-{number}"

    def model_of(self, number: int) -> str:
        """Returns the path of the model that results from round ``number``.

        For ``number`` 0, returns ``model``, the model with which the first round starts.
        """
        if number == 0:
            return self.model
        final = self.round_folder(number) / "train" / "final"
        return str(final / "merged" if _setting(self.train, "model.lora") is not None else final)

    def train_recipe(self, number: int, sources: Sequence[Mapping[str, Any]]) -> Recipe:
        """Returns the training recipe of a round.

        Args:
            number: Number of the round, from 1.
            sources: Settings of each file of the round's pairs, such as ``{"path": ..., "repeat_time": 1.0}``. The
                sources in ``train.data.train`` are appended.
        """
        values = copy.deepcopy(self.train)
        for name in ("model", "data", "output", "reference"):
            if values.get(name) is None:
                values[name] = {}
            if not isinstance(values[name], dict):
                raise TypeError(f"train.{name} must be a section, got {shorten(values[name])}")
        values["model"]["path"] = self.model_of(number - 1)
        values["output"]["dir"] = str(self.round_folder(number) / "train")
        more = values["data"].get("train") or []
        values["data"]["train"] = [*sources, *([more] if isinstance(more, (str, Mapping)) else more)]
        if number > 1:
            values["model"].pop("revision", None)
        if values["model"].get("lora") is not None:
            values["output"]["save_merged"] = True
        if self.reference == "first" and number > 1:
            values["reference"]["path"] = self.model
            if values["model"].get("lora") is not None and values["reference"].get("kind") is None:
                values["reference"]["kind"] = "copy"
        try:
            recipe = Recipe(**values)
            if self.reference == "first" and not recipe.loss.needs_reference:
                raise ValueError("reference must be 'round' for a loss that needs none, got 'first'")
            return recipe
        except (TypeError, ValueError) as error:
            raise type(error)(f"train: {error}") from error

    @property
    def chat(self) -> dict[str, Any]:
        """Settings of ``train.model`` that sampling and evaluation use, too, such as ``chat_template``."""
        model = self.train_recipe(1, [{"path": "pairs.jsonl"}]).model
        names = ("trust_remote_code", "chat_template", "chat_template_kwargs", "revision")
        return {name: getattr(model, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as nested dicts, lists, numbers and strings, in the form of a recipe file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]


def _setting(values: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a dotted name, such as "model.lora", in nested mappings; None if it is missing."""
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def load_iterate_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> IterateRecipe:
    """Reads a YAML file and returns its recipe, as ``mpo_ext.train.recipe.load_recipe`` does for training.

    Args:
        path: Path of the file.
        overrides: Settings that replace those of the file, such as ``"rounds=5"``.

    Raises:
        OSError: If the file cannot be read.
        ImportError: If ruamel.yaml, or a package of the extra "generate", is not installed.
        ValueError: If the file is not YAML, a setting is unknown, missing or duplicate, or values are out of range or
            incompatible. The message names the file, the setting with its section, the rule and the value.
        TypeError: If a value has the wrong type.
    """
    required: dict[str, Any] = {"sample": {}, "evaluate": {}}  # makes errors name the missing setting
    return read_recipe_file(path, overrides, lambda values: IterateRecipe(**required | values))
