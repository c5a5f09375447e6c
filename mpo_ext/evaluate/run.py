"""Evaluates models on questions with a known answer: samples the missing responses and writes the results.

Each combination of a model, a file of questions and a prompt has separate journals, to which sampled responses are
appended (``mpo_ext.generate.sampler``). Therefore an interrupted evaluation can resume, and models, files and prompts
can be added later. All results are computed from the journals.
"""

import contextlib
import gc
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mpo_ext.checks import check_integer
from mpo_ext.evaluate.cells import Cell, EvaluationRun, open_questions
from mpo_ext.evaluate.exports import EXPORTS
from mpo_ext.evaluate.models import find_model, load_engine, set_weights
from mpo_ext.evaluate.predictions import predictions_path, write_predictions
from mpo_ext.evaluate.report import write_reports
from mpo_ext.evaluate.results import ALL, compute_results
from mpo_ext.evaluate.scoring import EvaluationConfig
from mpo_ext.files import FileLock, check_outputs, write_json
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.items import is_meta, item_files
from mpo_ext.generate.sampler import IncompleteRunError, holds_run, keep_date
from mpo_ext.generate.transformers_engine import TransformersEngine

_OUTPUTS = ("results.json", "table.md", "accuracy.png", "accuracy.svg", "failures.html", *EXPORTS)


def evaluate(
    models: Mapping[str, str | os.PathLike[str] | Engine],
    data: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    config: EvaluationConfig | None = None,
    limit: int | None = None,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    exports: Sequence[str] = (),
    page_limit: int = 5000,
    make_engine: Callable[[str], Engine] = TransformersEngine.from_pretrained,
    run: EvaluationRun | None = None,
) -> dict[str, Any] | None:
    """Asks every model every question with every prompt template, and writes the results into a folder.

    Args:
        models: Models by their name in the results. A model is a folder (a model, adapters, or a training run with
            ``final/``), a name on the hub, or an engine. The models are loaded one after the other.
        data: Question files by their name in the results. ``item_files`` describes the kinds of files.
        out: Folder of the evaluation.
        config: Prompts, sampling and matcher; None: the default ``EvaluationConfig``.
        limit: Maximum number of questions per file; None: all questions.
        image_root: Folder of relative image paths. Not used for a meta file (.json), which names its own folders.
        root_map: Tuples (old, new) for meta files: paths in the folder ``old`` are looked up in the folder ``new``.
        system: System prompt for questions without a system prompt; None: no system prompt.
        exports: Formats in which predictions are also written: "vlmevalkit", "lmms-eval".
        page_limit: Maximum number of wrong answers on ``failures.html``. If there are more, a random sample is shown.
        make_engine: Function that creates an engine from the path of a whole model.
        run: Processes, progress display, and how often responses are saved; None: the default ``EvaluationRun``.

    Returns:
        The content of ``results.json``; None if other processes have not finished yet.

    Raises:
        SettingsMismatchError: If the folder holds responses for other weights, settings or questions.
        ValueError: If an argument is out of range, a model cannot be loaded, or a file has no question with an answer.
        ImportError: If a package is missing.
    """
    config, run, out = config or EvaluationConfig(), run or EvaluationRun(), Path(out)
    for number_name, number in (("page_limit", page_limit), ("limit", limit)):
        if number is not None:
            check_integer(number_name, number, least=1)
    if unknown := [kit for kit in exports if kit not in EXPORTS]:
        raise ValueError(f"exports must be among {', '.join(EXPORTS)}, got {unknown[0]!r}")
    model_files, data_files = _file_names("models", models), _file_names("data", data)
    _check_outputs(out, model_files.values(), data.values(), root_map)
    sources = {
        name: find_model(os.fspath(model)) for name, model in models.items() if isinstance(model, (str, os.PathLike))
    }
    place: dict[str, Any] = {"image_root": image_root, "root_map": root_map, "system": system}
    questions = [open_questions(name, path, limit=limit, **place) for name, path in data.items()]
    cells = [
        Cell(model, file, evaluation, out / "journals" / model_files[model] / f"{stem}-{evaluation.prompt}")
        for model in models
        for file, stem in zip(questions, data_files.values(), strict=True)
        for evaluation in config.evaluations()
    ]
    engines: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        engine: Any = load_engine(sources[name], make_engine) if name in sources else set_weights(cast(Engine, model))
        keep_date(engine, [cell.folder for cell in cells if cell.model == name])
        engines[name] = engine.settings()
        for cell in cells:
            if cell.model == name:
                cell.ask(engine, run)
        del engine
        _free_memory()
    with FileLock(out / "outputs.lock", str(out), wait=True), contextlib.suppress(IncompleteRunError):
        file_names = {"model_files": model_files, "data_files": data_files}
        write_predictions(cells, out, exports=exports, world_size=run.world_size, **file_names)
        results = compute_results(cells, config, limit, engines)
        for warning in write_reports(cells, results, out, model_files=model_files, limit=page_limit, seed=config.seed):
            if run.stream is not None:
                print(warning, file=run.stream)
        write_json(out / "results.json", results)
        return results
    return None


def _check_outputs(
    out: Path,
    model_files: Iterable[str],
    data: Iterable[str | os.PathLike[str]],
    root_map: Sequence[tuple[str, str]],
) -> None:
    """Raises an error if the evaluation would replace an input, or a file that no evaluation has written."""
    inputs: list[str | os.PathLike[str]] = []
    for path in data:
        files = item_files(os.fspath(path), root_map=root_map if is_meta(path) else ())
        inputs += [path, *(item_file.path for item_file in files)]
    outputs = [*(predictions_path(out, file) for file in model_files), *(out / name for name in _OUTPUTS)]
    check_outputs("out", outputs, inputs=inputs, is_ours=holds_run(out))


def _free_memory() -> None:
    gc.collect()
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _file_names(what: str, named: Mapping[str, Any]) -> dict[str, str]:
    """Returns a dict from each name to its form in file names: "a-b-c" for "a b/c".

    ``what`` is the name of the argument in error messages. Raises ValueError in each of these cases: there is no
    name, a name is "all", a name has no usable characters, or two names have the same form, ignoring case.
    """
    if not named:
        raise ValueError(f"{what} must name at least one, got none")
    files = {name: re.sub(r"[^\w.-]+", "-", name).strip(".-") for name in named}
    for name, file in files.items():
        if not file or name == ALL:
            raise ValueError(f"{what} must have names with letters or digits, and not {ALL!r}, got {name!r}")
    if len({file.casefold() for file in files.values()}) < len(files):
        raise ValueError(f"{what} must have names that differ as names of files, got {', '.join(map(repr, named))}")
    return files
