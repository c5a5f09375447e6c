"""Trains the demo's models (SFT, then one run per method on the pairs), and lets them answer questions."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import InternVLForConditionalGeneration

from mpo_ext.answers import extract_answer, matcher
from mpo_ext.data import Pair, write_pairs
from mpo_ext.demo import digits, reading
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS
from mpo_ext.demo.settings import RunSettings, Settings
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.train import recipe as recipes
from mpo_ext.train.loop import train

METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"dpo_weight": 0, "bco_weight": 0, "ntp_weight": 1},
    "DPO": {"dpo_weight": 1, "bco_weight": 0, "ntp_weight": 0},
    "MPO": {"dpo_weight": 0.8, "bco_weight": 0.2, "ntp_weight": 1},
}
START = "SFT-start"  # folder of the run that trains the start
_SAVE_EVERY = 200  # steps between two checkpoints of the run START


def train_start(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: Settings,
    rng: np.random.Generator,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains an untrained model by SFT, in place, on the questions of ``sample_corpus`` and their correct responses.

    Writes ``sft.jsonl`` (the corpus) and the run ``runs/SFT-start`` to ``folder``. An interrupted run resumes.

    Returns:
        The log, one dict per step.
    """
    return _train(start_recipe(settings, rng, folder), model, processor)


def start_recipe(settings: Settings, rng: np.random.Generator, folder: Path) -> recipes.Recipe:
    """Writes the SFT corpus to ``folder``, and returns the recipe of the SFT."""
    split = digits.part(digits.load_digits()["train"], 0, settings.sft_digits)
    return make_recipe(
        write_sft(folder, sample_corpus(split, settings, rng)), folder / "runs" / START, loss=METHODS["SFT"],
        steps=settings.sft_steps, batch=settings.sft_batch, rate=settings.sft_rate, schedule="cosine",
        settings=settings, warmup=settings.sft_warmup, save_every=_SAVE_EVERY,
    )  # fmt: skip


def sample_corpus(split: digits.Digits, settings: Settings, rng: np.random.Generator) -> list[reading.ReadingTask]:
    """Returns the questions for the SFT of the demo.

    There are step-by-step questions, direct questions, and named questions, whose text states the digits. Some of the
    step-by-step questions have no image. The language prior holds only for the digits of the step-by-step questions.
    """
    named = int(settings.sft_named_share * settings.sft_questions)
    direct = int(settings.sft_direct_share * (settings.sft_questions - named))
    stepwise = settings.sft_questions - named - direct
    prior = {"prior": settings.prior, "prior_step": settings.prior_step}
    tasks = reading.sample_tasks(split, stepwise, rng, "cot", side=settings.side, **prior)  # type: ignore[arg-type]
    blind = int(settings.sft_blind_share * stepwise)
    tasks[:blind] = map(reading.without_image, tasks[:blind])
    tasks += reading.sample_tasks(split, direct, rng, "direct", side=settings.side)
    tasks += reading.sample_tasks(split, named, rng, "cot", side=settings.side, is_named=True)
    return tasks


def train_branch(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    pairs: Path,
    method: str,
    settings: Settings,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains the SFT model further on the pairs, with the loss weights of a method. An interrupted run resumes.

    All methods use the same pairs in the same order, the same number of steps and the same learning rate. The
    reference model is the SFT model. Its log-probabilities are stored in ``folder/reference.jsonl``.

    Args:
        model: The SFT model, which is trained in place.
        processor: Processor of the model.
        pairs: Path of the file of pairs.
        method: Key of ``METHODS``.
        settings: Settings of the demo.
        folder: Folder of the demo. The run is written to ``runs/METHOD`` in this folder.

    Returns:
        The log, one dict per step.
    """
    recipe = make_recipe(
        pairs, folder / "runs" / method, loss=METHODS[method], steps=settings.branch_steps,
        batch=settings.branch_batch, rate=settings.branch_rate, schedule="cosine", settings=settings,
        warmup=settings.branch_warmup, reference=folder / "reference.jsonl",
    )  # fmt: skip
    return _train(recipe, model, processor)


def _train(
    recipe: recipes.Recipe, model: InternVLForConditionalGeneration, processor: DigitsProcessor
) -> list[dict[str, float]]:
    """Runs or resumes a training run, and returns its log. Raises KeyboardInterrupt if a signal stopped the run."""
    if train(recipe, model=model, processor=processor) != 0:
        raise KeyboardInterrupt  # the trainer caught a signal and stopped
    log = Path(recipe.output.dir) / "log.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def make_recipe(
    pairs: Path,
    out: Path,
    *,
    loss: Mapping[str, Any],
    steps: int,
    batch: int,
    rate: float,
    schedule: Any,
    settings: RunSettings,
    warmup: float,
    reference: Path | None = None,
    save_every: int = 0,
) -> recipes.Recipe:
    """Returns the recipe of a training run in the folder ``out``. An interrupted run resumes.

    Args:
        pairs: Path of the file of pairs.
        out: Folder of the run.
        loss: Weights of the loss.
        steps: Number of steps.
        batch: Number of pairs per step.
        rate: Peak learning rate.
        schedule: Schedule of the learning rate, as in ``OptimRecipe``.
        settings: Settings of the demo or the study. Only the seed and the backend of the loss are used.
        warmup: Length of the warmup (the learning rate rises from zero), as a fraction of the steps.
        reference: File of the reference model's log-probabilities. None: the recipe has the default
            ``ReferenceRecipe``.
        save_every: Number of steps between two checkpoints; 0: only a checkpoint at the end or after a signal.
    """
    return recipes.Recipe(
        model=recipes.ModelRecipe(path=f"digits demo, seed {settings.seed}"),
        data=recipes.DataRecipe(train=(recipes.SourceRecipe(path=str(pairs)),), max_length=None),
        loss=recipes.LossRecipe(**loss, backend=settings.backend),  # type: ignore[arg-type]  # the recipe checks it
        reference=recipes.ReferenceRecipe(kind="precomputed", file=str(reference))
        if reference
        else recipes.ReferenceRecipe(),
        optim=recipes.OptimRecipe(
            learning_rate=rate,
            batch_size=batch,
            micro_batch_size=batch,
            epochs=steps,  # max_steps ends the run earlier
            max_steps=steps,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            warmup_ratio=warmup,
            schedule=schedule,
            seed=settings.seed,
        ),
        output=recipes.OutputRecipe(dir=str(out), save_every=save_every, keep_last=1),
    )


def write_sft(folder: Path, tasks: Sequence[digits.GridTask]) -> Path:
    """Writes questions and their correct responses to ``sft.jsonl`` in ``folder``, and returns the path of this file.

    Each line is a pair: the chosen response is correct, and the rejected response is empty.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pairs = []
    for number, task in enumerate(tasks):
        images: tuple[str, ...] = ()
        if task.picture is not None:
            images = (f"images/sft-{number:05d}.png",)
            task.picture.save(folder / images[0])
        pairs.append(Pair(task.question, task.response, "", images, answer_gt=str(task.answer)))
    path = folder / "sft.jsonl"
    write_pairs(path, pairs)
    return path


def respond(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    tasks: Sequence[digits.GridTask],
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[tuple[str, int]]:
    """Lets the model answer the questions by greedy decoding. Returns (response, number of tokens) per question.

    After each batch, ``on_batch`` is called with the number of questions in the batch.
    """
    engine = TransformersEngine(model, processor, batch_size=BATCH_SIZE)
    greedy = SamplingConfig(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    requests = [Request(question=task.question, images=_pictures(task), sampling=greedy) for task in tasks]
    responses = []
    for start in range(0, len(requests), BATCH_SIZE):
        generations = engine.generate(requests[start : start + BATCH_SIZE])
        responses += [(generation.text, len(generation.token_ids)) for generation in generations]
        on_batch(len(generations))
    return responses


def score(tasks: Sequence[digits.GridTask], responses: Sequence[str]) -> list[bool | None]:
    """Returns whether the answer of each response is correct. A response without a readable answer gives None."""
    is_right = matcher(**digits.MATCHER)
    answers = [extract_answer(text, task.style) for task, text in zip(tasks, responses, strict=True)]
    return [
        None if answer is None else bool(is_right(answer, str(task.answer)).correct)
        for answer, task in zip(answers, tasks, strict=True)
    ]


def evaluate(
    model: InternVLForConditionalGeneration, processor: DigitsProcessor, tasks: Sequence[digits.GridTask]
) -> dict[str, dict[str, float]]:
    """Lets the model answer the questions by greedy decoding, and returns statistics for each form of question.

    Returns:
        For each form that occurs, "direct" or "cot", a dict with the following keys:

        - ``accuracy``: Fraction of correct answers.
        - ``unparsable``: Fraction of unreadable answers.
        - ``tokens``: Mean number of tokens of a response.
        - ``count``: Number of questions.
    """
    result = {}
    for form in digits.FORMS:
        form_tasks = [task for task in tasks if task.form == form]
        if form_tasks:
            result[form] = summarize(form_tasks, respond(model, processor, form_tasks))
    return result


def summarize(tasks: Sequence[digits.GridTask], responses: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Returns the statistics of one form of questions. ``evaluate`` describes these statistics.

    ``responses`` is the output of ``respond`` for ``tasks``.
    """
    right = score(tasks, [text for text, _ in responses])
    return {
        "accuracy": right.count(True) / len(right),
        "unparsable": right.count(None) / len(right),
        "tokens": sum(tokens for _, tokens in responses) / len(responses),
        "count": len(right),
    }


def _pictures(task: digits.GridTask) -> tuple[Image.Image, ...]:
    return () if task.picture is None else (task.picture,)
