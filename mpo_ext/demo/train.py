"""The demo's training runs (SFT, then a run per method on the pairs) and the evaluation of its models."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import InternVLForConditionalGeneration

from mpo_ext.answers import extract_answer, matcher
from mpo_ext.data import Pair, write_pairs
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS
from mpo_ext.demo.settings import Settings
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.train import recipe as recipes
from mpo_ext.train.loop import train

METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"dpo_weight": 0, "bco_weight": 0, "ntp_weight": 1},
    "DPO": {"dpo_weight": 1, "bco_weight": 0, "ntp_weight": 0},
    "MPO": {"dpo_weight": 0.8, "bco_weight": 0.2, "ntp_weight": 1},
}


def train_sft(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: Settings,
    rng: np.random.Generator,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains on correct responses up to a target accuracy or a step limit, then decays the learning rate to zero.

    Writes ``sft.jsonl`` (questions with responses) and the runs ``runs/SFT-start`` and ``runs/SFT-end``.

    Returns:
        The log, one dict per step. Every ``sft_check_steps``-th dict has ``accuracy``, the fraction of validation
        questions that the model answers correctly step by step.
    """
    splits = digits.load_digits()
    validation = digits.sample_tasks(splits["validation"], settings.validation_tasks, np.random.default_rng(0), "cot")
    tasks = digits.sample_tasks(splits["train"], settings.sft_questions, rng)
    blind = int(settings.sft_blind_share * len(tasks))
    tasks[:blind] = map(digits.without_image, tasks[:blind])
    path = write_sft(folder, tasks)
    curve: list[dict[str, float]] = []

    def on_step(step: int, line: Any) -> bool:
        curve.append({**line, "step": len(curve) + 1})
        if step % settings.sft_check_steps:
            return False
        curve[-1]["accuracy"] = evaluate(model, processor, validation)["cot"]["accuracy"]
        return curve[-1]["accuracy"] >= settings.sft_target

    for name, steps, schedule in (
        ("SFT-start", settings.sft_most_steps, "constant"),
        ("SFT-end", settings.sft_decay_steps, "linear"),
    ):
        recipe = make_recipe(
            path, folder / "runs" / name, loss=METHODS["SFT"], steps=steps, batch=settings.sft_batch,
            rate=settings.sft_rate, schedule=schedule, settings=settings,
        )  # fmt: skip
        _train(recipe, model, processor, on_step)
    return curve


def train_branch(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    pairs: Path,
    method: str,
    settings: Settings,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains the SFT model further on the pairs, with the loss weights of a method.

    All methods share the pairs, their order, the number of steps and the learning rate. The reference is the SFT
    model; the first branch that needs its log-probabilities writes them to ``reference.jsonl`` in ``folder``.

    Args:
        model: The SFT model, which is changed.
        processor: Processor of the model.
        pairs: Path of the file of pairs.
        method: Key of ``METHODS``.
        settings: Settings of the demo.
        folder: Folder of the demo. The run is written to ``runs/METHOD`` in this folder.

    Returns:
        The log, one dict per step.
    """
    curve: list[dict[str, float]] = []
    recipe = make_recipe(
        pairs, folder / "runs" / method, loss=METHODS[method], steps=settings.branch_steps,
        batch=settings.branch_batch, rate=settings.branch_rate, schedule="cosine", settings=settings,
        reference=folder / "reference.jsonl",
    )  # fmt: skip
    _train(recipe, model, processor, lambda _, line: curve.append(dict(line)))
    return curve


def _train(
    recipe: recipes.Recipe,
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    on_step: Callable[[int, Any], object],
) -> None:
    if train(recipe, model=model, processor=processor, on_step=on_step) != 0:
        raise KeyboardInterrupt  # the trainer caught a signal and stopped


def make_recipe(
    pairs: Path,
    out: Path,
    *,
    loss: dict[str, Any],
    steps: int,
    batch: int,
    rate: float,
    schedule: Any,
    settings: Settings,
    reference: Path | None = None,
) -> recipes.Recipe:
    """Returns the recipe of a training run, and deletes the folder ``out`` that an earlier demo may have left.

    Args:
        pairs: Path of the file of pairs.
        out: Folder of the run.
        loss: Weights of the loss.
        steps: Number of steps.
        batch: Number of pairs per step.
        rate: Learning rate.
        schedule: Schedule of the learning rate, as in ``OptimRecipe``.
        settings: Settings of the demo.
        reference: File of the reference model's log-probabilities. None: the default ``ReferenceRecipe``.
    """
    shutil.rmtree(out, ignore_errors=True)
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
            warmup_ratio=min(settings.warmup_steps / steps, 0.5),
            schedule=schedule,
            seed=settings.seed,
        ),
        output=recipes.OutputRecipe(dir=str(out), save_every=0, keep_last=1, resume="never"),
    )


def write_sft(folder: Path, tasks: Sequence[digits.Task]) -> Path:
    """Writes questions to ``sft.jsonl`` in ``folder``, and returns the path of this file.

    Each question becomes a pair of a correct chosen response and an empty rejected response.
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


def evaluate(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    tasks: Sequence[digits.Task],
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Lets the model answer the questions by greedy decoding, and returns statistics of the answers by form.

    ``on_batch`` is called after each batch with the number of questions of the batch.

    Returns:
        For each form: ``accuracy`` and ``unparsable`` (fractions of the questions), ``tokens`` (mean number of tokens
        of a response) and ``count`` (number of questions).
    """
    engine = TransformersEngine(model, processor, batch_size=BATCH_SIZE)
    is_right = matcher(**digits.MATCHER)
    greedy = SamplingConfig(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    result = {}
    for form in digits.FORMS:
        form_tasks = [task for task in tasks if task.form == form]
        if not form_tasks:
            continue
        requests = [Request(question=task.question, images=_pictures(task), sampling=greedy) for task in form_tasks]
        answers: list[str | None] = []
        tokens = 0
        for start in range(0, len(requests), BATCH_SIZE):
            generations = engine.generate(requests[start : start + BATCH_SIZE])
            answers += [extract_answer(generation.text, digits.STYLES[form]) for generation in generations]
            tokens += sum(len(generation.token_ids) for generation in generations)
            on_batch(len(generations))
        right = [
            answer is not None and bool(is_right(answer, str(task.answer)).correct)
            for answer, task in zip(answers, form_tasks, strict=True)
        ]
        result[form] = {
            "accuracy": sum(right) / len(form_tasks),
            "unparsable": sum(answer is None for answer in answers) / len(form_tasks),
            "tokens": tokens / len(form_tasks),
            "count": len(form_tasks),
        }
    return result


def _pictures(task: digits.Task) -> tuple[Image.Image, ...]:
    return () if task.picture is None else (task.picture,)
