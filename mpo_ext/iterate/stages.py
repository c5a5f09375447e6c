"""The stages of a run of several rounds: the command of each stage, and the files that it reads and writes."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.iterate.recipe import IterateRecipe, PipelineRecipe

_TEMPLATE = "chat_template.jinja"
#: Options of ``mpo-ext sample`` that are settings with the same name.
_OPTIONS = {
    "correctness": (
        *("samples", "temperature", "top_k", "top_p", "max_new_tokens", "allow_truncated", "template", "style"),
        *("pairs_per_question", "accuracy", "length_balance", "reuse_limit", "keep_duplicates"),
    ),
    "dropout-ntp": (
        *("samples", "temperature", "top_k", "top_p", "max_new_tokens", "allow_truncated", "style"),
        *("keep", "unit", "with_image", "sample_chosen", "allow_wrong_chosen"),
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class RoundStage:
    """A stage of a round: a command, such as sampling or training.

    Attributes:
        round: Number of the round; 0 is the evaluation of the first model.
        name: "evaluate", "train", the name of a pipeline, or "page of NAME". The stage "page of NAME" writes the HTML
            page with the pairs of the pipeline NAME.
        module: Module that Python runs.
        arguments: Arguments of the module.
        launcher: Words of the command before ``-m MODULE``; empty: the Python of this process.
        product: File or folder that the stage must have written when it ends.
    """

    round: int
    name: str
    module: str
    arguments: tuple[str, ...]
    launcher: tuple[str, ...]
    product: Path

    @property
    def command(self) -> list[str]:
        """The command line of the stage, as a list of words."""
        return [*(self.launcher or (sys.executable,)), "-m", self.module, *self.arguments]

    @property
    def title(self) -> str:
        """The number of the round and the name of the stage, for messages."""
        return f"round {self.round}, {self.name}"

    def __str__(self) -> str:
        return shlex.join([*(self.launcher or ("python",)), "-m", self.module, *self.arguments])


def sample_stage(recipe: IterateRecipe, number: int, name: str) -> RoundStage:
    """Returns the stage in which the pipeline ``name`` makes pairs for the round ``number`` (from 1)."""
    pipeline = recipe.sample.pipelines[name]
    questions = recipe.sample.questions_of(pipeline)
    out = recipe.round_folder(number) / name
    arguments = ["sample", name, questions.path_of(number), str(out), "--model", recipe.model_of(number - 1)]
    arguments += ["--seed", str(recipe.seed + number - 1), *_engine_options(recipe, number - 1)]
    arguments += _place_options(questions.image_root, questions.root_map, questions.limit)
    for option in _OPTIONS[name]:
        arguments += _option(option, getattr(pipeline, option))
    arguments += _matcher_options(pipeline.matcher)
    return RoundStage(number, name, "mpo_ext", tuple(arguments), recipe.launch.sample, out / "summary.json")


def page_stage(recipe: IterateRecipe, number: int, name: str) -> RoundStage:
    """Returns the stage that writes the HTML page with the pairs of the pipeline ``name``."""
    source, page = pairs_path(recipe, number, name), page_path(recipe, number, name)
    title = f"Round {number}, {name}"
    arguments = ("data", "view", str(source), "--out", str(page), "--limit", str(recipe.page_pairs), "--title", title)
    return RoundStage(number, f"page of {name}", "mpo_ext", arguments, (), page)


def train_stage(recipe: IterateRecipe, number: int) -> RoundStage:
    """Returns the stage that trains the model of the round ``number``."""
    arguments = (str(train_recipe_path(recipe, number)),)
    product = Path(recipe.model_of(number)) / "config.json"
    return RoundStage(number, "train", "mpo_ext.train", arguments, recipe.launch.train, product)


def evaluate_stage(recipe: IterateRecipe, number: int) -> RoundStage:
    """Returns the stage that evaluates the model of the round ``number`` (from 0)."""
    settings, out = recipe.evaluate, recipe.round_folder(number) / "evaluation"
    arguments = ["evaluate", f"{model_name(number)}={recipe.model_of(number)}", "--out", str(out)]
    for name, path in settings.data.items():
        arguments += ["--data", f"{name}={path}"]
    arguments += ["--prompt", *settings.prompts, "--seed", str(settings.seed), *_engine_options(recipe, number)]
    arguments += _place_options(settings.image_root, settings.root_map, settings.limit)
    for option in ("samples", "temperature", "top_k", "top_p", "max_new_tokens", "style"):
        arguments += _option(option, getattr(settings, option))
    arguments += _matcher_options(settings.matcher)
    return RoundStage(number, "evaluate", "mpo_ext", tuple(arguments), recipe.launch.evaluate, out / "results.json")


def all_stages(recipe: IterateRecipe) -> Iterator[RoundStage]:
    """Yields the stages of all rounds in the order in which they run."""
    for number in range(recipe.rounds + 1):
        if number:
            for name in recipe.sample.pipelines:
                yield sample_stage(recipe, number, name)
                if recipe.page_pairs:
                    yield page_stage(recipe, number, name)
            yield train_stage(recipe, number)
        yield evaluate_stage(recipe, number)


def model_name(number: int) -> str:
    """Returns the name that the model of a round has in the evaluation results."""
    return f"round-{number}"


def pairs_path(recipe: IterateRecipe, number: int, name: str) -> Path:
    """Returns the path of the file into which the pipeline ``name`` writes its pairs in the round ``number``."""
    return recipe.round_folder(number) / name / "pairs.jsonl"


def page_path(recipe: IterateRecipe, number: int, name: str) -> Path:
    """Returns the path of the HTML page that shows the pairs of the pipeline ``name`` from the round ``number``."""
    return recipe.round_folder(number) / f"{name}.html"


def train_recipe_path(recipe: IterateRecipe, number: int) -> Path:
    """Returns the path of the training recipe of a round."""
    return recipe.round_folder(number) / "recipe.yaml"


def chat_template_path(recipe: IterateRecipe) -> Path:
    """Returns the path of the file from which sampling and evaluation read the chat template.

    The file exists only if the recipe sets ``train.model.chat_template``.
    """
    return recipe.folder / _TEMPLATE


def round_sources(recipe: IterateRecipe, number: int) -> list[dict[str, Any]]:
    """Returns a dict for each file of pairs in a round, with ``pipeline``, ``path``, ``pairs`` and ``repeat_time``.

    ``pairs`` is the number of pairs in the file. ``repeat_time`` is the average number of visits to a pair in an
    epoch, or 0 if the file is empty.
    """
    sources = []
    for name, pipeline in recipe.sample.pipelines.items():
        folder = recipe.round_folder(number) / name
        lines = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["lines"]
        outputs = ["pairs", *(["format_pairs"] if getattr(pipeline, "format_pairs", False) else [])]
        total = sum(lines.get(output, 0) for output in outputs)
        for output in outputs:
            count = lines.get(output, 0)
            sources.append(
                {
                    "pipeline": name,
                    "path": str(folder / f"{output}.jsonl"),
                    "pairs": count,
                    "repeat_time": _repeat_time(pipeline, total) if count else 0.0,
                }
            )
    return sources


def _repeat_time(pipeline: PipelineRecipe, pairs: int) -> float:
    """Returns how often an epoch visits each pair on average.

    This is the pipeline's ``repeat_time``, or less if an epoch would have more than ``max_pairs`` pairs. ``pairs`` is
    the number of pairs that the pipeline has made.
    """
    if pipeline.max_pairs is None:
        return pipeline.repeat_time
    return min(pipeline.repeat_time, pipeline.max_pairs / pairs)


def _engine_options(recipe: IterateRecipe, model: int) -> list[str]:
    """Returns the command-line options for the engine and the chat template.

    If ``model`` is 0, the engine loads the first model. Otherwise it loads the model that the round ``model`` trained.
    """
    engine, chat = recipe.engine, recipe.chat
    arguments = ["--engine", engine.name, "--block-size", str(engine.block_size)]
    for option in ("dtype", "device", "batch_size"):
        arguments += _option(option, getattr(engine, option))
    options = dict(engine.options)
    if model == 0 and chat["revision"] is not None:
        options["revision"] = chat["revision"]
    for name, value in options.items():
        arguments += ["--engine-option", f"{name}={json.dumps(value)}"]
    arguments += _option("trust_remote_code", chat["trust_remote_code"])
    if chat["chat_template"] is not None:
        arguments += ["--chat-template", str(chat_template_path(recipe))]
    if chat["chat_template_kwargs"]:
        arguments += ["--chat-template-kwargs", json.dumps(chat["chat_template_kwargs"])]
    return arguments


def _place_options(image_root: str, root_map: Sequence[tuple[str, str]], limit: int | None) -> list[str]:
    arguments = [*(["--image-root", image_root] if image_root else []), *_option("limit", limit)]
    for old, new in root_map:
        arguments += ["--root-map", f"{old}={new}"]
    return arguments


def _matcher_options(matcher: Mapping[str, Any]) -> list[str]:
    arguments = ["--matcher", matcher["kind"]]
    for name, value in matcher.items():
        arguments += [] if name == "kind" else ["--matcher-option", f"{name}={json.dumps(value)}"]
    return arguments


def _option(name: str, value: Any) -> list[str]:
    """Returns a command-line option as a list of words.

    True gives the option without a value. None and False give an empty list.
    """
    if value is None or value is False:
        return []
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    return [option, *map(str, value if isinstance(value, (list, tuple)) else [value])]
