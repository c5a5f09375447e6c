"""Runs the stages (commands, such as sampling or training) of all rounds in order.

A stage is done if it has ended with status 0 and has written its result. A file ``STAGE.done`` marks a stage as done.
To resume an interrupted or killed run, call ``run_rounds`` again with the same recipe. The new call starts only the
stages that are not done. An interrupted stage resumes from the files that it has written.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mpo_ext.checks import check_is_no_run, check_model_path
from mpo_ext.evaluate.cells import open_questions
from mpo_ext.files import atomic_write, check_outputs, write_json
from mpo_ext.generate.items import open_items
from mpo_ext.generate.runner import check_run
from mpo_ext.iterate import stages
from mpo_ext.iterate.processes import StageRunner
from mpo_ext.iterate.recipe import IterateRecipe
from mpo_ext.iterate.results import RESULTS, collect_results, read_json, write_rounds_page
from mpo_ext.iterate.stages import RoundStage
from mpo_ext.journal import SettingsMismatchError, differences
from mpo_ext.processors import check_model

PAGE = "iterate.html"
_SETTINGS = "settings.json"
#: Settings that may change while a run is interrupted, because no result depends on them.
_FREE = ("rounds", "launch", "page_pairs", "keep_checkpoints", "engine.batch_size", "engine.block_size")


def run_rounds(recipe: IterateRecipe, *, stream: TextIO | None = None) -> dict[str, Any]:
    """Runs all stages (such as training) that are not done, writes the results after each round, and returns them.

    Args:
        recipe: Settings of the run. ``recipe.output`` may hold an interrupted run, or a finished run of fewer rounds.
        stream: Output of the titles and commands of the stages; None: no output.

    Raises:
        SettingsMismatchError: If the folder holds a run with other settings or other files of questions.
        FileExistsError: If the folder holds files that are not from a run of rounds.
        LockedError: If another process runs stages in the same folder.
        OSError: If a file of questions, the model or a program of ``launch`` is missing.
        InterruptedStageError: If this process has received SIGINT or SIGTERM. It is raised after the running stage
            has ended.
        RuntimeError: If a stage fails. Its messages are on stderr.
        ValueError: If a file of questions cannot be used, or a round has no pairs.
    """
    folder, results = recipe.folder, folder_results(recipe)
    is_ours = (folder / _SETTINGS).exists()
    check_outputs("output", [folder / name for name in (PAGE, RESULTS, _SETTINGS)], is_ours=is_ours)
    inputs = check_inputs(recipe)
    check_launchers(recipe)
    with StageRunner(folder) as runner:
        check_settings(recipe, inputs)
        if (template := recipe.chat["chat_template"]) is not None:
            with atomic_write(stages.chat_template_path(recipe)) as file:
                file.write(template.encode())
        for stage in stages.all_stages(recipe):
            if not _done_path(recipe, stage).exists():
                if stage.name == "train":
                    _write_train_recipe(recipe, stage.round, stream)
                _run_stage(runner, recipe, stage, stream)
            if stage.name == "train" and not recipe.keep_checkpoints:
                shutil.rmtree(recipe.round_folder(stage.round) / "train" / "checkpoints", ignore_errors=True)
            if stage.name == "evaluate":
                results = folder_results(recipe)
                write_json(folder / RESULTS, results)
                write_rounds_page(folder / PAGE, recipe, results)
    return results


def folder_results(recipe: IterateRecipe) -> dict[str, Any]:
    """Returns the content of ``rounds.json`` for the rounds that have been evaluated."""
    numbers = []
    for number in range(recipe.rounds + 1):
        if not _done_path(recipe, stages.evaluate_stage(recipe, number)).exists():
            break
        numbers.append(number)
    return collect_results(recipe, numbers)


def check_inputs(recipe: IterateRecipe) -> dict[str, dict[str, Any]]:
    """Checks the model and all files of questions. Does not read the weights of the model.

    Returns:
        For each file: ``{path: {"items": number of questions, "blake2b": hash of the file}}``.

    Raises:
        OSError: If a file or the model is missing.
        ValueError: If a file has no usable question, or the model is not supported.
    """
    check_model_path("model", recipe.model)
    check_is_no_run("model", recipe.model)
    check_model(recipe.model, trust_remote_code=recipe.chat["trust_remote_code"], revision=recipe.chat["revision"])
    inputs: dict[str, dict[str, Any]] = {}
    for name, pipeline in recipe.sample.pipelines.items():
        questions = recipe.sample.questions_of(pipeline)
        checked: set[str] = set()  # of this pipeline: another pipeline makes other demands on the same file
        for number in range(1, recipe.rounds + 1):
            path = questions.path_of(number)
            roots: dict[str, Any] = {"root_map": questions.root_map, "image_root": questions.image_root}
            if path in checked:
                continue
            checked.add(path)
            check_run(pipeline.pipeline(recipe.seed), path, recipe.round_folder(number) / name, **roots)
            source = open_items(path, limit=questions.limit, **roots)
            inputs[path] = {"items": source.count, "blake2b": source.digest}
    settings = recipe.evaluate
    places: dict[str, Any] = {name: getattr(settings, name) for name in ("limit", "image_root", "root_map")}
    for name, path in settings.data.items():
        if not Path(path).exists():
            raise FileNotFoundError(f"evaluate.data.{name} must be a file of questions, got {path}: it does not exist")
        file = open_questions(name, path, **places)
        inputs[path] = {"items": file.source.count, "blake2b": file.source.digest}
    return inputs


def check_launchers(recipe: IterateRecipe) -> None:
    """Raises FileNotFoundError if a program of ``launch`` does not exist."""
    for name in ("sample", "train", "evaluate"):
        words = getattr(recipe.launch, name)
        if words and shutil.which(words[0]) is None:
            raise FileNotFoundError(f"launch.{name} must begin with a program, got {words[0]!r}, which is not found")


def describe(recipe: IterateRecipe) -> Iterator[str]:
    """Checks the inputs like ``run_rounds``. Yields lines that describe the inputs and the command of each stage."""
    for path, values in check_inputs(recipe).items():
        yield f"{path}: {values['items']:,} questions"
    check_launchers(recipe)
    reference = "the model that it starts from" if recipe.reference == "round" else recipe.model
    yield f"reference model of each round: {reference}"
    for stage in stages.all_stages(recipe):
        is_done = _done_path(recipe, stage).exists()
        yield f"{stage.title}{' (done)' if is_done else ''}: {stage}"


def check_settings(recipe: IterateRecipe, inputs: dict[str, Any]) -> None:
    """Compares the settings with those stored in the run's folder, and then stores them.

    Raises:
        SettingsMismatchError: If a setting differs that must not change.
    """
    path = recipe.folder / _SETTINGS
    settings = {"recipe": recipe.to_dict(), "inputs": inputs}
    if path.exists():
        old = read_json(path)
        settings["inputs"] = {**old["inputs"], **inputs}
        known = {**settings, "inputs": {name: settings["inputs"][name] for name in old["inputs"]}}
        free = tuple(f"recipe.{name}" for name in _FREE)
        changes = [
            (name, before, after)
            for name, before, after in differences(old, known)
            if not name.startswith(free) and not (_is_question_files(name) and _is_longer_list(before, after))
        ]
        if changes:
            raise SettingsMismatchError(path, changes)
    write_json(path, settings)


def _is_question_files(name: str) -> bool:
    """Returns whether a setting is a list of question files, one per round. More rounds need a longer list."""
    return name.startswith("recipe.sample.") and name.endswith((".questions", ".questions.path"))


def _is_longer_list(before: Any, after: Any) -> bool:
    """Returns whether both values are lists and ``after`` begins with ``before``."""
    return isinstance(before, list) and isinstance(after, list) and after[: len(before)] == before


def _write_train_recipe(recipe: IterateRecipe, number: int, stream: TextIO | None) -> None:
    """Writes the training recipe of a round. Its training data are the pairs that the round's pipelines have made.

    Raises:
        ValueError: If no pipeline has made a pair.
    """
    sources = stages.round_sources(recipe, number)
    used = [source for source in sources if source["pairs"]]
    if not used:
        names = ", ".join(str(Path(source["path"]).parent / "summary.json") for source in sources)
        raise ValueError(f"round {number} must have pairs, got none from its pipelines: {names} give the reasons")
    for source in sources:
        if stream is not None and not source["pairs"]:
            print(f"round {number}: {source['path']} has no pairs and is left out", file=stream)
    entries = [{"path": source["path"], "repeat_time": source["repeat_time"]} for source in used]
    with atomic_write(stages.train_recipe_path(recipe, number)) as file:
        file.write(recipe.train_recipe(number, entries).to_yaml().encode())


def _run_stage(runner: StageRunner, recipe: IterateRecipe, stage: RoundStage, stream: TextIO | None) -> None:
    """Runs a stage and marks the stage as done.

    Skips the HTML page of a pipeline that has no pairs.
    """
    is_page = stage.name.startswith("page of ")
    if is_page and Path(stage.arguments[2]).stat().st_size == 0:
        return
    if stream is not None:
        print(f"round {stage.round} of {recipe.rounds}, {stage.name}: {stage}", file=stream, flush=True)
    status = runner.run(stage.command)
    if status != 0 or not stage.product.exists():
        reason = f"ended with exit status {status}" if status else f"has not written {stage.product}"
        raise RuntimeError(
            f"{stage.title} must end with exit status 0, but {reason}: {stage}; correct the cause, and repeat the "
            "command mpo-ext iterate"
        )
    write_json(_done_path(recipe, stage), {"command": list(stage.arguments)})


def _done_path(recipe: IterateRecipe, stage: RoundStage) -> Path:
    return recipe.round_folder(stage.round) / f"{stage.name.replace(' ', '-')}.done"


def print_rounds(results: dict[str, Any]) -> None:
    """Prints the accuracies of all rounds as a table."""
    from mpo_ext.iterate.results import accuracy_rows
    from mpo_ext.report import text_table

    header, rows = accuracy_rows(results)
    print(text_table(header, rows))
