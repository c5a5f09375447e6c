"""Evaluates models on questions with a known answer: asks what is not in the journals yet, then writes the results.

Each model has a journal for each file of questions and each prompt (``mpo_ext.generate.runner.run``), so an ended
evaluation goes on, and models, files and prompts can be added to a folder one by one. All results are made from the
journals alone.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import mpo_ext
from mpo_ext.checks import check_integer
from mpo_ext.evaluate import report as pages
from mpo_ext.evaluate.exports import EXPORTS, vlmevalkit_columns
from mpo_ext.evaluate.models import Fingerprinted, find_model, load_engine
from mpo_ext.evaluate.scoring import Evaluation, EvaluationConfig, Question, Response
from mpo_ext.evaluate.statistics import Comparison, compare, mean_and_error, pass_at_k, wilson
from mpo_ext.files import FileLock, atomic_write
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.items import Item, ItemSource, open_items
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.generate.sampler import IncompleteRunError, open_journal, read_samples, sample_items
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.journal import encode_line

FORMAT = "mpo_ext.evaluation/1"
ALL = "all"
_PACKAGES = ("torch", "transformers")


@dataclasses.dataclass(frozen=True, slots=True)
class Questions:
    """One file of questions.

    Attributes:
        name: For the results.
        path: As it was given.
        source: The questions.
    """

    name: str
    path: str
    source: ItemSource


@dataclasses.dataclass(slots=True)
class Cell:
    """The answers of one model to one file of questions under one prompt.

    Attributes:
        model: Name of the model.
        data: The questions.
        evaluation: Scores the answers.
        folder: Of its journal.
        questions: What the numbers need, in the order of the file, once the journal was read.
    """

    model: str
    data: Questions
    evaluation: Evaluation
    folder: Path
    questions: list[Question] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is called in the results."""
        return self.model, self.data.name, self.evaluation.prompt

    def read(self, world: int) -> Iterator[tuple[Item, str | None, list[Response]]]:
        """Yields every item with its problem, or None, and its scored responses.

        Raises:
            IncompleteRunError: If a process has not finished yet.
        """
        for item, records in read_samples(self.evaluation, self.data.source, self.folder, world_size=world):
            yield item, *self.evaluation.score(item, records)


def evaluate(
    models: Mapping[str, str | os.PathLike[str] | Engine],
    data: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    config: EvaluationConfig | None = None,
    limit: int | None = None,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    exports: Sequence[str] = (),
    make_engine: Callable[[str], Engine] = TransformersEngine.from_pretrained,
    block_size: int = 64,
    page_limit: int = 5000,
    rank: int = 0,
    world: int = 1,
    stream: TextIO | None = None,
) -> dict[str, Any] | None:
    """Asks every model every question under every prompt, and writes the results into a folder.

    Args:
        models: Names for the results, and for each a folder (of a model, of a run with ``final``, of adapters), a name
            on the hub, or an engine. They are loaded one after the other.
        data: Names for the results, and for each a JSONL file of items or a meta file (.json) of such files.
        out: Folder of the evaluation.
        config: How questions are put and answers compared.
        limit: Takes the first questions of each file only.
        image_root: Folder that relative image paths of JSONL files start from.
        root_map: Pairs of prefixes (old, new): where the folders in meta files have moved to.
        exports: Any of "vlmevalkit" and "lmms-eval".
        make_engine: Makes an engine of the path of a whole model.
        block_size: Responses that are asked for at a time, and the most that a kill can cost.
        page_limit: Most questions in the page of failures; of more, so many are drawn at random.
        rank: Number of this process; it takes the questions whose number leaves this remainder.
        world: Number of processes. They need not run at the same time.
        stream: Where progress is shown, as ``sys.stderr``; None shows none.

    Returns:
        What is in ``results.json``; None where other processes are not done yet.

    Raises:
        SettingsMismatchError: If the folder holds answers of other weights, settings or questions under a name.
        ValueError: If an argument is out of its range, a model is none or a file has no question to ask.
        ImportError: If a package is missing.
    """
    config, out = config or EvaluationConfig(), Path(out)
    check_integer("page_limit", page_limit, least=1)
    if limit is not None:
        check_integer("limit", limit, least=1)
    for export in exports:
        if export not in EXPORTS:
            raise ValueError(f"exports must be among {', '.join(EXPORTS)}, got {export!r}")
    model_files, data_files = _file_names("models", models), _file_names("data", data)
    sources = {name: find_model(os.fspath(one)) for name, one in models.items() if isinstance(one, (str, os.PathLike))}
    questions = [_questions(name, path, limit, image_root, root_map) for name, path in data.items()]
    cells = [
        Cell(model, each, Evaluation(config, prompt), out / "journals" / model_files[model] / f"{file}-{prompt}")
        for model in models
        for each, file in zip(questions, data_files.values(), strict=True)
        for prompt in config.prompts
    ]
    engines: dict[str, dict[str, Any]] = {}
    for model, one in models.items():
        engine = load_engine(sources[model], make_engine) if model in sources else one
        if isinstance(engine, TransformersEngine):
            engine = Fingerprinted(engine)
        assert not isinstance(engine, (str, os.PathLike))
        engines[model] = engine.settings()
        for cell in cells:
            if cell.model == model:
                _ask(cell, engine, block_size, rank, world, stream)
        del engine
        _free()
    with FileLock(out / "outputs.lock", str(out), wait=True):
        if not _write_predictions(cells, out, exports, model_files, data_files, world):
            return None
        results = _results(cells, config, limit, engines)
        left_out = pages.write(cells, results, out, limit=page_limit, world=world, seed=config.seed)
        for text in left_out:
            if stream is not None:
                print(text, file=stream)
        with atomic_write(out / "results.json") as file:
            file.write(json.dumps(results, indent=2, ensure_ascii=False).encode() + b"\n")
    return results


def _ask(cell: Cell, engine: Engine, block_size: int, rank: int, world: int, stream: TextIO | None) -> None:
    """Fills the journal of a cell."""
    evaluation, source, ranks = cell.evaluation, cell.data.source, {"rank": rank, "world_size": world}
    right, answered, skipped = 0.0, 0, 0
    with (
        open_journal(evaluation, engine.settings(), source, cell.folder, **ranks) as journal,
        SamplingProgress(" ".join(cell.key), len(range(rank, source.count, world)), stream) as progress,
    ):
        for item, records in sample_items(evaluation, engine, source, journal, block_size=block_size, **ranks):
            problem, responses = evaluation.score(item, records)
            skipped += problem is not None
            if responses:
                answered += 1
                right += sum(response.correct for response in responses) / len(responses)
            counts = f"{100 * right / answered:.1f} % right" if answered else "none answered"
            progress.advance(counts + (f", {skipped} skipped" if skipped else ""))


def _free() -> None:
    """Gives the memory of a model back before the next is loaded."""
    gc.collect()
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _file_names(what: str, named: Mapping[str, Any]) -> dict[str, str]:
    """For each name one that a file can have."""
    if not named:
        raise ValueError(f"{what} must name at least one, got none")
    files = {name: re.sub(r"[^\w.-]+", "-", name).strip(".-") for name in named}
    for name, file in files.items():
        if not file or name == ALL:
            raise ValueError(f"{what} must have names with letters or digits, and not {ALL!r}, got {name!r}")
    if len({file.casefold() for file in files.values()}) < len(files):
        raise ValueError(f"{what} must have names that differ as names of files, got {', '.join(map(repr, named))}")
    return files


def _questions(
    name: str, path: str | os.PathLike[str], limit: int | None, image_root: str, root_map: Sequence[tuple[str, str]]
) -> Questions:
    is_meta = Path(path).suffix == ".json"
    roots: dict[str, Any] = {"root_map": tuple(root_map)} if is_meta else {"image_root": image_root}
    source = open_items(os.fspath(path), limit=limit, **roots)
    problems = collections.Counter(
        item.problem or ("" if item.truths else "no true answer") for item in source.items()
    )
    if not problems[""]:
        found = ", ".join(f"{number} with {problem}" for problem, number in problems.most_common()) or "no line"
        raise ValueError(f"data must hold questions with a true answer, got {os.fspath(path)}: {found}")
    return Questions(name, os.fspath(path), source)


def _write_predictions(
    cells: Sequence[Cell],
    out: Path,
    exports: Sequence[str],
    model_files: Mapping[str, str],
    data_files: Mapping[str, str],
    world: int,
) -> bool:
    """Writes a line for each response, and the exports, and keeps what the numbers need."""
    columns: dict[str, list[str]] = {}
    for model, own in itertools.groupby(cells, key=lambda cell: cell.model):
        with contextlib.suppress(IncompleteRunError), contextlib.ExitStack() as stack:
            predictions = stack.enter_context(atomic_write(out / f"predictions-{model_files[model]}.jsonl"))
            for cell in own:
                name = cell.data.name
                if name not in columns:
                    columns[name] = vlmevalkit_columns(cell.data.source.items()) if "vlmevalkit" in exports else []
                task, samples = f"{data_files[name]}-{cell.evaluation.prompt}", cell.evaluation.questions.samples
                adders = [
                    stack.enter_context(EXPORTS[each](out, model_files[model], task, samples, columns[name]))
                    for each in exports
                ]

                for number, (item, problem, responses) in enumerate(cell.read(world)):
                    cell.questions.append(cell.evaluation.question(problem, responses))
                    for line in _lines(cell, number, item, problem, responses):
                        predictions.write(encode_line(line))
                    if not problem:
                        for add in adders:
                            add(number, item, cell.evaluation.questions.prompt(item), responses)
            continue
        return False
    return True


def _lines(
    cell: Cell, number: int, item: Item, problem: str | None, responses: Sequence[Response]
) -> Iterator[dict[str, Any]]:
    """A question in the predictions: a line for each sample, or one that says why it was not asked."""
    shared = {
        "data": cell.data.name,
        "prompt": cell.evaluation.prompt,
        "index": number,
        "question": item.question,
        "images": list(item.pair_images),
        "truth": list(item.truths),
    }
    if problem:
        yield {**shared, "problem": problem}
    for sample, response in enumerate(responses):
        yield {
            **shared,
            "sample": sample,
            "response": response.text,
            "answer": response.answer,
            "correct": response.correct,
            "rule": response.rule,
            "tokens": response.tokens,
            "finish": response.finish,
        }


def _results(
    cells: Sequence[Cell], config: EvaluationConfig, limit: int | None, engines: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All numbers of an evaluation, as JSON can hold them."""
    asked = {cell.key: cell.questions for cell in cells}
    models = list(dict.fromkeys(cell.model for cell in cells))
    names = list(dict.fromkeys(cell.data.name for cell in cells))
    if len(names) > 1:
        for model, prompt in itertools.product(models, config.prompts):
            asked[model, ALL, prompt] = list(
                itertools.chain.from_iterable(asked[model, name, prompt] for name in names)
            )
        names.append(ALL)
    evaluations = {cell.evaluation.prompt: cell.evaluation for cell in cells}
    return {
        "format": FORMAT,
        "versions": _versions(),
        "settings": {
            "models": {name: dict(settings) for name, settings in engines.items()},
            "data": {
                cell.data.name: {
                    "path": cell.data.path,
                    "blake2b": cell.data.source.digest,
                    "questions": cell.data.source.count,
                }
                for cell in cells
            },
            "prompts": {
                prompt: {
                    "template": each.template.text if each.template else None,
                    "style": each.scorer.style,
                    "max_new_tokens": each.questions.sampling.max_new_tokens,
                }
                for prompt, each in evaluations.items()
            },
            "matcher": dict(config.matcher),
            "samples": config.samples,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "seed": config.seed,
            "limit": limit,
        },
        "results": [
            {"model": model, "data": name, "prompt": prompt, **_numbers(asked[model, name, prompt], config.samples)}
            for name, prompt, model in itertools.product(names, config.prompts, models)
        ],
        "comparisons": list(_comparisons(asked, models, names, config)),
    }


def _numbers(questions: Sequence[Question], samples: int) -> dict[str, Any]:
    answered = [question for question in questions if question.problem is None]
    responses = max(1, len(answered) * samples)
    accuracy, error = mean_and_error([question.share for question in answered])
    numbers: dict[str, Any] = {
        "questions": len(answered),
        "refused": dict(sorted(collections.Counter(each.problem for each in questions if each.problem).items())),
        "accuracy": accuracy,
        "standard_error": error,
        "interval": None if accuracy is None else list(wilson(accuracy, len(answered))),
        "unreadable": sum(question.unreadable for question in answered) / responses,
        "cut_off": sum(question.cut_off for question in answered) / responses,
        "tokens_per_response": sum(question.tokens for question in answered) / responses,
    }
    if samples > 1:
        counts = sorted({samples, *itertools.takewhile(lambda k: k < samples, (2**n for n in itertools.count(1)))})
        numbers["pass_at"] = {
            str(k): _estimate([pass_at_k(samples, sum(question.right), k) for question in answered]) for k in counts
        }
        numbers["majority"] = _estimate([float(question.majority) for question in answered])
    return numbers


def _estimate(values: Sequence[float]) -> dict[str, float | None]:
    mean, error = mean_and_error(values)
    return {"accuracy": mean, "standard_error": error}


def _comparisons(
    asked: Mapping[tuple[str, str, str], Sequence[Question]],
    models: Sequence[str],
    names: Sequence[str],
    config: EvaluationConfig,
) -> Iterator[dict[str, Any]]:
    """Every two models under a prompt, and every two prompts of a model."""
    for name in names:
        sides = [
            *(
                ((one, prompt), (other, prompt))
                for prompt in config.prompts
                for one, other in itertools.combinations(models, 2)
            ),
            *(
                ((model, one), (model, other))
                for model in models
                for one, other in itertools.combinations(config.prompts, 2)
            ),
        ]
        for (first_model, first_prompt), (second_model, second_prompt) in sides:
            compared = _compare(
                asked[first_model, name, first_prompt], asked[second_model, name, second_prompt], config.samples
            )
            yield {
                "data": name,
                "first": {"model": first_model, "prompt": first_prompt},
                "second": {"model": second_model, "prompt": second_prompt},
                **dataclasses.asdict(compared),
            }


def _compare(first: Sequence[Question], second: Sequence[Question], samples: int) -> Comparison:
    both = [
        (one.share, other.share)
        for one, other in zip(first, second, strict=True)
        if one.problem is None and other.problem is None
    ]
    return compare([one for one, _ in both], [other for _, other in both], samples=samples)


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"mpo_ext": mpo_ext.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
