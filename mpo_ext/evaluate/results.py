"""Computes the results of an evaluation: accuracies with standard errors, and comparisons of models and prompts."""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import mpo_ext
from mpo_ext.answers import label_options
from mpo_ext.answers.choices import read_choice
from mpo_ext.evaluate.cells import Cell
from mpo_ext.evaluate.scoring import WITHOUT_IMAGE, EvaluationConfig, QuestionScore
from mpo_ext.evaluate.statistics import Comparison, compare, mean_and_error, pass_at_k, wilson
from mpo_ext.generate.items import Item

FORMAT = "mpo_ext.evaluation/1"
ALL = "all"  #: Name of the results over all files of questions.
_PACKAGES = ("torch", "transformers")


class _Answered(NamedTuple):
    """The true answers of a question. ``is_same``: whether the model answers the same with and without the image."""

    is_same: bool
    truths: tuple[str, ...]


def compute_results(
    cells: Sequence[Cell], config: EvaluationConfig, limit: int | None, engines: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the content of ``results.json``: settings, accuracies and comparisons, as JSON values.

    Args:
        cells: Cells (combinations of model, file of questions and prompt), with scores.
        config: Settings of the evaluation.
        limit: Maximum number of questions per file; None: all.
        engines: Settings of the engine of each model, by the model's name.
    """
    scores = {cell.key: cell.scores for cell in cells}
    models = list(dict.fromkeys(cell.model for cell in cells))
    names = list(dict.fromkeys(cell.data.name for cell in cells))
    evaluations = {evaluation.prompt: evaluation for evaluation in config.evaluations()}
    same = _unchanged(cells, config) if config.without_image else {}
    if len(names) > 1:
        for model, prompt in itertools.product(models, evaluations):
            scores[model, ALL, prompt] = [score for name in names for score in scores[model, name, prompt]]
        for model, prompt in itertools.product(models, config.prompts if same else ()):
            same[model, ALL, prompt] = [value for name in names for value in same[model, name, prompt]]
        names.append(ALL)
    results = {
        "format": FORMAT,
        "versions": _versions(),
        "settings": {
            "models": {name: dict(settings) for name, settings in engines.items()},
            "data": {
                file.name: {"path": file.path, **file.source.settings(), "questions": file.source.count}
                for file in (cell.data for cell in cells)
            },
            "prompts": {
                prompt: {
                    "template": evaluation.template.text if evaluation.template else None,
                    "style": evaluation.scorer.style,
                    "max_new_tokens": evaluation.questions.sampling.max_new_tokens,
                }
                for prompt, evaluation in evaluations.items()
            },
            "matcher": dict(config.matcher),
            **{name: getattr(config, name) for name in ("samples", "temperature", "top_p", "top_k", "seed")},
            "limit": limit,
        },
        "results": [
            {"model": model, "data": name, "prompt": prompt, **_numbers(scores[model, name, prompt], config.samples)}
            for name, prompt, model in itertools.product(names, evaluations, models)
        ],
        "comparisons": list(_comparisons(scores, models, names, config)),
    }
    details = {reason: detail for cell in reversed(cells) for reason, detail in cell.details.items()}
    if details:
        results["refused_examples"] = details
    if config.without_image:
        results["without_image"] = [
            {
                "model": model,
                "data": name,
                "prompt": prompt,
                **_without_image(scores, same, (model, name, prompt), config),
            }
            for name, prompt, model in itertools.product(names, config.prompts, models)
        ]
    return results


def _unchanged(cells: Sequence[Cell], config: EvaluationConfig) -> dict[tuple[str, str, str], list[_Answered]]:
    """Compares each answer that a model gave with an image to the answer without the image.

    Returns a dict from (model, file, prompt) to a list of results. The list has an entry for each question that could
    be asked both ways.
    """
    by_key = {cell.key: cell for cell in cells}
    same: dict[tuple[str, str, str], list[_Answered]] = {}
    for (model, name, prompt), cell in by_key.items():
        if prompt not in config.prompts:
            continue
        pairs = zip(cell.scores, by_key[model, name, f"{prompt}{WITHOUT_IMAGE}"].scores, strict=True)
        same[model, name, prompt] = [
            _Answered(cell.evaluation.is_same(item, seen, blind), _truths(item))
            for item, (seen, blind) in zip(cell.data.source.items(), pairs, strict=True)
            if seen.problem is None and blind.problem is None
        ]
    return same


def _truths(item: Item) -> tuple[str, ...]:
    """Returns the true answers of an item. Answers that select options become letters: "B" for "Rome" or "B. Rome"."""
    options = item.extra.get("options")
    labels = () if options is None else tuple(label_options(options).items())
    return tuple((read_choice(truth, labels).letters if labels else "") or truth for truth in item.truths)


def _without_image(
    scores: Mapping[tuple[str, str, str], Sequence[QuestionScore]],
    same: Mapping[tuple[str, str, str], Sequence[_Answered]],
    key: tuple[str, str, str],
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Compares the accuracies of a model with the image and without the image.

    Only questions that could be asked both ways count. ``same`` is the result of ``_unchanged``. ``key`` is (model,
    file, prompt). Two entries of the returned dict are:

    - ``unchanged``: Fraction of questions with the same answer both ways, and its standard error.
    - ``most_frequent_truth``: Accuracy of always giving the most frequent true answer. None if
      there are no questions, or a question has several true answers.
    """
    model, name, prompt = key
    both = zip(scores[key], scores[model, name, f"{prompt}{WITHOUT_IMAGE}"], strict=True)
    pairs = [(seen, blind) for seen, blind in both if seen.problem is None and blind.problem is None]
    seen, blind = [seen.accuracy for seen, _ in pairs], [blind.accuracy for _, blind in pairs]
    unchanged = [float(question.is_same) for question in same[key]]
    truths = collections.Counter(question.truths for question in same[key])
    is_single = bool(truths) and all(len(each) == 1 for each in truths)
    return {
        "questions": len(pairs),
        "with_image": _estimate(seen),
        "without_image": _estimate(blind),
        "unchanged": dict(zip(("share", "standard_error"), mean_and_error(unchanged), strict=True)),
        "most_frequent_truth": max(truths.values()) / len(pairs) if is_single else None,
        "comparison": dataclasses.asdict(compare(blind, seen, samples=config.samples)),
    }


def _numbers(scores: Sequence[QuestionScore], samples: int) -> dict[str, Any]:
    answered = [score for score in scores if score.problem is None]
    responses = max(1, len(answered) * samples)
    accuracy, error = mean_and_error([score.accuracy for score in answered])
    numbers: dict[str, Any] = {
        "questions": len(answered),
        "refused": dict(sorted(collections.Counter(score.problem for score in scores if score.problem).items())),
        "accuracy": accuracy,
        "standard_error": error,
        "interval": None if accuracy is None else list(wilson(accuracy, len(answered))),
        "unreadable": sum(score.unreadable for score in answered) / responses,
        "cut_off": sum(score.cut_off for score in answered) / responses,
        "tokens_per_response": sum(score.tokens for score in answered) / responses,
    }
    if samples > 1:
        counts = sorted({samples, *itertools.takewhile(lambda k: k < samples, (2**n for n in itertools.count(1)))})
        numbers["pass_at"] = {
            str(k): _estimate([pass_at_k(samples, sum(score.right), k) for score in answered]) for k in counts
        }
        numbers["majority"] = _estimate([float(score.majority) for score in answered])
    return numbers


def _estimate(values: Sequence[float]) -> dict[str, float | None]:
    mean, error = mean_and_error(values)
    return {"accuracy": mean, "standard_error": error}


def _comparisons(
    scores: Mapping[tuple[str, str, str], Sequence[QuestionScore]],
    models: Sequence[str],
    names: Sequence[str],
    config: EvaluationConfig,
) -> Iterator[dict[str, Any]]:
    """Yields the comparisons on each file. A comparison has two models and a prompt, or a model and two prompts."""
    prompts = config.prompts
    sides = [((first, prompt), (second, prompt)) for prompt in prompts for first, second in combinations(models, 2)]
    sides += [((model, first), (model, second)) for model in models for first, second in combinations(prompts, 2)]
    for name, ((first_model, first_prompt), (second_model, second_prompt)) in itertools.product(names, sides):
        comparison = _compare(
            scores[first_model, name, first_prompt], scores[second_model, name, second_prompt], config.samples
        )
        yield {
            "data": name,
            "first": {"model": first_model, "prompt": first_prompt},
            "second": {"model": second_model, "prompt": second_prompt},
            **dataclasses.asdict(comparison),
        }


def _compare(first: Sequence[QuestionScore], second: Sequence[QuestionScore], samples: int) -> Comparison:
    pairs = zip(first, second, strict=True)
    both = [(one.accuracy, other.accuracy) for one, other in pairs if one.problem is None and other.problem is None]
    return compare([one for one, _ in both], [other for _, other in both], samples=samples)


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"mpo_ext": mpo_ext.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
