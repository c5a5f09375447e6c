"""Checks of paths, packages and access that a recipe needs, before the model and the data are loaded."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mpo_ext.checks import LinesError, check_is_no_run, check_model_path, install_hint
from mpo_ext.data.hub import describe_folder, hub_id, missing_path
from mpo_ext.processors import check_on_hub
from mpo_ext.train.hub import check_access
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.trackers import check_trackers

_EXPECTED = (ImportError, OSError, ValueError)


def check_needs(recipe: Recipe) -> None:
    """Checks that a recipe's paths exist, its packages are installed, and its outputs can be written.

    The error lists all problems. This check does not contact the hub.

    Raises:
        ImportError: If the only problem is a package that is not installed.
        OSError: If the only problem is a path that cannot be read or written.
        ValueError: If the only problem is the value of a setting.
        LinesError: If there are several problems. The class is a subclass of ``ValueError``.
    """
    errors = []
    for check in _checks(recipe):
        try:
            check()
        except _EXPECTED as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        texts = dict.fromkeys(" ".join(str(error).split()) for error in errors)
        raise LinesError("\n  ".join([f"{len(texts)} settings of the recipe cannot be used:", *texts]))


def _checks(recipe: Recipe) -> Iterator[Callable[[], None]]:
    model, output = recipe.model, recipe.output
    for name, part in (("model.path", model), ("reference.path", recipe.reference)):
        if part.path is not None:
            yield lambda name=name, part=part: _check_model(name, part.path, part.revision)  # type: ignore[misc]
    for name, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for source in sources:
            yield lambda name=name, path=source.path: _check_source(name, path)  # type: ignore[misc]
    if model.lora is not None:
        yield lambda: _check_package("peft", "model.lora", "lora")
        if model.lora.quantization is not None:
            yield lambda: _check_package("bitsandbytes", "model.lora.quantization", "qlora")
    yield lambda: _check_output(output.dir)
    yield lambda: check_trackers(output.trackers)
    if output.eval_generate is not None:
        questions = output.eval_generate.path
        yield lambda: _check_file("output.eval_generate.path must be a file of questions", questions)
    if output.resume not in ("auto", "never"):
        rule = 'output.resume must be "auto", "never" or the folder of a checkpoint'
        yield lambda: _check_exists(rule, output.resume)
    if output.push_to_hub is not None:
        hub = output.push_to_hub
        yield lambda: check_access(hub)


def _check_model(name: str, path: str, revision: str | None) -> None:
    check_model_path(name, path, revision)
    check_is_no_run(name, path)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # otherwise loading the model contacts the hub
        check_on_hub(name, path, revision=revision)


def _check_source(name: str, path: str) -> None:
    try:
        is_on_hub = hub_id(path) is not None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not is_on_hub and not os.path.exists(path):
        raise FileNotFoundError(f"{name}: {missing_path(path)}")


def _check_package(package: str, setting: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{setting} needs {package}: {install_hint(extra)}")


def _check_exists(rule: str, path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{rule}, got {path}: it does not exist")


def _check_file(rule: str, path: str) -> None:
    _check_exists(rule, path)
    if os.path.isdir(path):
        raise ValueError(f"{rule}, got {describe_folder(path)}")


def _check_output(folder: str) -> None:
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"output.dir must be a folder, got {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"output.dir must be a writable folder, got {folder}: {place} cannot be written")
