"""Trains the starting model of the task "language-prior" and makes its pairs, with the code of the demo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import InternVLForConditionalGeneration

from benchmarks.study import reading_judge, results, training
from benchmarks.study.declare import TEXT
from benchmarks.study.language_prior import HALF, KEEPS, RLAIF_V, SHARES
from benchmarks.study.settings import PriorSettings
from mpo_ext.data import Pair, read_pairs
from mpo_ext.data.jsonl import dump_line
from mpo_ext.demo import digits, reading
from mpo_ext.demo.model import DigitsProcessor
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS, make_pairs, sample, write_items
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.start import load_trained, weights_digest
from mpo_ext.demo.train import START as START_RUN
from mpo_ext.demo.train import start_recipe
from mpo_ext.files import atomic_write, write_json
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.rlaif_v import RlaifV
from mpo_ext.generate.routing import RoutedEngine
from mpo_ext.generate.transformers_engine import TransformersEngine

_CURVE_STEPS = 100  # steps between two logged losses
TRAINED = "trained"  # folder with a starting model that a demo has trained
_SETTINGS = "start.json"


def adopt(out: Path, demo: Path, seeds: Sequence[int]) -> None:
    """Copies SFT models from a run of ``mpo-ext demo --from-scratch``, so that the study need not train them again.

    ``train_start`` later rejects a copied model if its settings differ from the study's settings.

    Args:
        out: Folder of the study.
        demo: Folder of the demo, which may hold several seeds.
        seeds: Seeds of the study.

    Raises:
        FileNotFoundError: If the demo has no SFT model for one of the seeds.
    """
    first, *others = json.loads((demo / "results.json").read_text(encoding="utf-8"))["runs"]
    runs = {run["settings"]["seed"]: (run, demo / f"seed-{run['settings']['seed']}") for run in others}
    runs[first["settings"]["seed"]] = first, demo
    for seed in seeds:
        run, folder = runs.get(seed, (None, demo))
        trained = folder / "runs" / START_RUN
        if run is None or not (trained / "final").is_dir():
            raise FileNotFoundError(f"--demo must hold a trained start of seed {seed}, got {demo}")
        target = out / f"seed-{seed}" / TRAINED
        shutil.copytree(trained / "final", target / "final", dirs_exist_ok=True)
        shutil.copy(trained / "log.jsonl", target)
        names = Settings.__dataclass_fields__
        settings = Settings(**{name: value for name, value in run["settings"].items() if name in names})
        write_json(target / _SETTINGS, settings.start_settings())


def train_start(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: PriorSettings,
    rng: np.random.Generator,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains the starting model in place, as the demo trains its SFT model.

    If ``folder`` has a trained model, which ``adopt`` copied there, loads its weights into ``model`` instead.

    Returns:
        ``step`` and ``loss`` of every hundredth step.

    Raises:
        ValueError: If the copied model was trained with other settings.
    """
    trained = folder / TRAINED
    if (trained / _SETTINGS).exists():
        if json.loads((trained / _SETTINGS).read_text(encoding="utf-8")) != settings.start_settings():
            raise ValueError(f"--demo must hold a start with the settings of the study, got others in {trained}")
        load_trained(model, trained)
        lines = [json.loads(line) for line in (trained / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    else:
        lines = []
        training.train(
            start_recipe(settings, rng, folder), model, processor, on_step=lambda _, line: lines.append(dict(line))
        )
    return [{"step": line["step"], "loss": line["loss"]} for line in lines if line["step"] % _CURVE_STEPS == 0]


def make_files(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: PriorSettings,
    folder: Path,
    *,
    has_all: bool,
) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
    """Makes the pairs of a starting model.

    If ``has_all`` is False, only the file "mixed" is made, with the same pairs as in the demo.

    Returns:
        (pairs, summaries). The first dict has the pairs of each file by file name. The second dict has the summary of
        each sampling run by name.

    Raises:
        RuntimeError: If a file would have no pair.
    """
    name = f"digits study, seed {settings.seed}, weights {weights_digest(model)}"
    made = make_pairs(model, processor, settings, np.random.default_rng([settings.seed, 1]), folder, name=name)
    files = {"mixed": list(read_pairs(made.path))}
    summaries = {run: summary.to_dict() for run, summary in made.summaries.items()}
    if has_all:
        engine = TransformersEngine(model, processor, name=name, batch_size=BATCH_SIZE)
        rng = np.random.default_rng([settings.seed, 2])
        files |= _make_kinds(engine, settings, rng, folder, files["mixed"], summaries)
        files[RLAIF_V] = _make_rlaif_v(engine, settings, folder, len(files["correctness"]), summaries)
    for file, pairs in files.items():
        if not pairs:
            raise RuntimeError(f"pairs {file!r} must be at least one, got none")
    return files, summaries


def _make_kinds(
    engine: TransformersEngine,
    settings: PriorSettings,
    rng: np.random.Generator,
    folder: Path,
    mixed: list[Pair],
    summaries: dict[str, Any],
) -> dict[str, list[Pair]]:
    """Makes the pairs of all files except "mixed" and "RLAIF-V". Returns a dict from file name to pairs.

    ``mixed`` holds the pairs of the file "mixed". Some of the other files are random subsets of these pairs. For the
    rest, ``engine`` samples responses. The summaries of this sampling are added to ``summaries``.
    """
    sampling = SamplingConfig(temperature=settings.temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    common: dict[str, Any] = {"sampling": sampling, "seed": settings.seed, "matcher": digits.MATCHER}
    correctness = Correctness(
        CorrectnessConfig(samples=settings.samples, pairs_per_question=settings.pairs_per_question,
                          style=digits.STYLES["cot"], **common)
    )  # fmt: skip
    unseen = digits.part(digits.load_digits()["train"], settings.sft_digits, None)
    write_items(folder, "kinds", reading.sample_tasks(unseen, settings.kind_questions, rng, "cot", side=settings.side))
    blind = reading.sample_tasks(unseen, settings.kind_questions, rng, "cot", side=settings.side)
    write_items(folder, "blind", blind, has_truth=False)
    named = reading.sample_tasks(unseen, settings.text_questions, rng, "cot", side=settings.side, is_named=True)
    with atomic_write(folder / f"{TEXT}.jsonl") as file:
        for task in named:
            file.write(dump_line({"question": task.question, "answer_gt": str(task.answer), "form": "cot"}))
    pool: dict[str, list[Pair]] = {}
    runs = {"correctness": ("kinds", correctness), TEXT: (TEXT, _text_pipeline(settings, common))}
    for name, keep in KEEPS.items():
        config = DropoutNTPConfig(keep=keep, sample_chosen=True, style=digits.STYLES["cot"], **common)
        runs[name] = ("blind", DropoutNTP(config))  # type: ignore[assignment]
    for name, (items, pipeline) in runs.items():
        pairs, summary = sample(pipeline, engine, folder, f"sample-{results.slug(name)}", items=items)
        summaries[name] = summary.to_dict()
        distinct = list({pair.key(): pair for pair in pairs}.values())
        pool[name] = [distinct[index] for index in rng.permutation(len(distinct))]
    count = min(settings.kind_pairs, *(len(pool[name]) for name in ("correctness", *KEEPS)))
    half = [*pool["correctness"][: count - count // 2], *pool["DropoutNTP 0.5"][: count // 2]]
    shuffled = [mixed[index] for index in rng.permutation(len(mixed))]
    return {
        **{name: shuffled[: round(share * len(mixed))] for name, share in SHARES.items()},
        **{name: pairs if name == TEXT else pairs[:count] for name, pairs in pool.items()},
        HALF: half,
    }


def _make_rlaif_v(
    engine: TransformersEngine, settings: PriorSettings, folder: Path, count: int, summaries: dict[str, Any]
) -> list[Pair]:
    """Samples RLAIF-V pairs, and returns at most ``count`` of them. Adds the sampling summary to ``summaries``.

    The questions are those of the DropoutNTP pairs.
    """
    config = reading_judge.config(
        samples=settings.samples, temperature=settings.temperature, seed=settings.seed,
        pairs_per_question=settings.pairs_per_question,
    )  # fmt: skip
    routed = RoutedEngine(engine, reading_judge.ReadingJudge(engine, settings.side))
    pairs, summary = sample(RlaifV(config), routed, folder, f"sample-{results.slug(RLAIF_V)}", items="blind")
    summaries[RLAIF_V] = summary.to_dict()
    distinct = list({pair.key(): pair for pair in pairs}.values())
    order = np.random.default_rng([settings.seed, 3]).permutation(len(distinct))
    return [distinct[index] for index in order[:count]]


def _text_pipeline(settings: PriorSettings, common: Mapping[str, Any]) -> Correctness:
    """Returns the correctness pipeline for questions that state the digits as text.

    The responses have only a final answer. ``common`` holds further fields of ``CorrectnessConfig``.
    """
    config = CorrectnessConfig(
        samples=settings.samples,
        pairs_per_question=settings.pairs_per_question,
        style=digits.STYLES["final"],
        **common,
    )
    return Correctness(config)
