"""Runs the study: for each seed a start with its pairs, then every row of ``benchmarks.study.tables`` from that start.

Each result is a file that appears when it is whole, so a study that was ended goes on where it was. Starts and rows of
several seeds may run side by side, each in a process of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import InternVLForConditionalGeneration

from benchmarks.study import tables as study
from benchmarks.study.tables import Row
from benchmarks.study.workers import Workers, sigterm_as_interrupt
from mpo_ext import report
from mpo_ext.data import Pair, write_pairs
from mpo_ext.data.jsonl import dump_line
from mpo_ext.demo import digits
from mpo_ext.demo.model import DigitsProcessor, build_model, build_processor
from mpo_ext.demo.pairs import BATCH_SIZE, MAX_NEW_TOKENS, read_made, write_items
from mpo_ext.demo.settings import StudySettings
from mpo_ext.demo.train import METHODS, evaluate, make_recipe, write_sft
from mpo_ext.files import atomic_write
from mpo_ext.generate import runner
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.train.encode import Encoder, Sample, SkippedPair
from mpo_ext.train.loop import Trainer
from mpo_ext.train.recipe import Recipe, ReferenceRecipe, RewardShiftRecipe

_EVALUATION_SEED = 1  # the same held-out questions for every seed and row
_WRITE_S = 10.0
_LATE = 0.5  # share of an answer behind which few blind continuations go wrong
_LOGGED = 5  # steps at either end whose mean is kept of a run's log
_LOG_KEYS = ("loss", "dpo_loss", "bco_loss", "ntp_loss", "reward_accuracy", "chosen_reward", "rejected_reward",
             "grad_norm", "reward_shift")  # fmt: skip
_PACKAGES = ("torch", "mpo-ext", "transformers", "accelerate", "scikit-learn", "numpy", "pillow")
_BLOCK_SIZE = 2048
_FORMATS = ("png", "svg")
_NO_START = "no start"
_RESULTS = "results"  # folder of a seed's results


# ---------------------------------------------------------------------------------------------------------- one study


def run(
    *, out: Path, seeds: Sequence[int], quick: bool, threads: int | None, backend: str | None, jobs: int, command: str
) -> int:
    """Runs what is missing of the study and writes ``study.json``, ``study.md``, ``study.png`` and ``study.svg``.

    Args:
        out: Existing folder; each seed has a folder in it.
        seeds: Of the starts.
        quick: Takes ``StudySettings.quick``.
        threads: CPU threads of each process; None shares the cores out.
        backend: Of the loss, None for the best that is installed.
        jobs: Processes; 1 runs all in this one.
        command: That was given, for the result file.

    Returns:
        0, or 1 where a run failed.

    Raises:
        KeyboardInterrupt: At SIGINT or SIGTERM. Results that are whole stay.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    make = StudySettings.quick if quick else StudySettings
    settings = {seed: dataclasses.replace(make(seed=seed), backend=backend) for seed in seeds}
    environment = _environment(command, threads)
    say = functools.partial(Console().print, markup=False, highlight=False, soft_wrap=True)
    results = {(seed, row): found for seed, one in settings.items() for row in (study.START, *study.ROWS)
               if (found := _read(out, one, row)) is not None}  # fmt: skip
    todo = {seed: [row for row in study.ROWS if not _is_measured(results.get((seed, row)))] for seed in seeds}
    left = sum(map(len, todo.values()))
    say(f"{len(study.ROWS)} rows for each of {len(seeds)} seeds; {left} of these runs are still to do")
    began = written = time.monotonic()
    rows = [study.START, *study.ROWS]
    main = {row for name in study.MAIN for _, row in study.TABLES[name].rows}

    def document() -> dict[str, Any]:
        return _document(results, settings, environment, quick)

    def order(run: tuple[int, str]) -> tuple[int, int, int]:
        """The main rows over all seeds, then the others seed by seed: an early end costs other rows' seeds first."""
        seed, row = run
        place = rows.index(row)
        return (0, place, seed) if row in main else (1, seed, place)

    def finish(seed: int, row: str, result: dict[str, Any]) -> None:
        nonlocal left, written
        results[seed, row] = result
        left -= row != study.START
        say(f"{(time.monotonic() - began) / 60:5.1f} min, {left} to do: seed {seed}, {row}: {_told(result)}")
        if row == study.START and _is_measured(result):
            queue.extend((seed, other) for other in todo[seed])
            queue.sort(key=order)
        elif row == study.START:
            for other in todo[seed]:
                failure = {"status": "failed", "reason": f"{_NO_START}: {result['reason']}"}
                results[seed, other] = _named(settings[seed], other, failure)
            left -= len(todo[seed])
        if time.monotonic() - written > _WRITE_S:
            _write(out, document())
            written = time.monotonic()

    queue = [(seed, study.START) for seed in seeds if todo[seed] or (seed, study.START) not in results]
    pending: dict[concurrent.futures.Future[dict[str, Any]], tuple[int, str]] = {}
    try:
        with Workers(jobs, _begin_process, threads) as workers, sigterm_as_interrupt():
            while queue or pending:
                while queue and len(pending) < jobs:
                    seed, row = queue.pop(0)
                    task = prepare if row == study.START else run_row
                    pending[workers.submit(task, out / f"seed-{seed}", settings[seed], row)] = seed, row
                for future in concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    seed, row = pending.pop(future)
                    error = future.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    if error is None:
                        finish(seed, row, future.result())
                    else:
                        failure = {"status": "failed", "reason": _reason(error)}
                        finish(seed, row, _named(settings[seed], row, failure))
    finally:
        _write(out, document())
    for suffix in _FORMATS:
        save_plot(out / f"study.{suffix}", document())
    failed = [result for result in results.values() if not _is_measured(result)]
    for result in failed:
        if not result["reason"].startswith(_NO_START):
            say(f"failed: seed {result['seed']}, {result['row']}: {result['reason']}")
    say(f"{(time.monotonic() - began) / 60:.1f} minutes; tables and plot are in {out}")
    return 1 if failed else 0


def _begin_process(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the model is too small for a GPU to pay


def _told(result: Mapping[str, Any]) -> str:
    if result["status"] == "failed":
        return f"failed: {result['reason']}"
    shown = ", ".join(f"{column} {100 * result['evaluation'][column]['accuracy']:.1f} %" for column in study.COLUMNS)
    return f"{shown} ({result['seconds']:.0f} s)"


def _reason(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


# ------------------------------------------------------------------------------------------------------------- results


def _key(settings: StudySettings, row: str) -> str:
    """Names all that a result depends on."""
    parts = [dataclasses.asdict(settings), None if row == study.START else dataclasses.asdict(study.ROWS[row])]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _result_file(out: Path, settings: StudySettings, row: str) -> Path:
    return out / f"seed-{settings.seed}" / _RESULTS / f"{slug(row)}.json"


def slug(name: str) -> str:
    """The name as a file may have it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _read(out: Path, settings: StudySettings, row: str) -> dict[str, Any] | None:
    """The result of a run with these settings; None where there is none. Failures are kept in no file of their own."""
    path = _result_file(out, settings, row)
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["key"] == _key(settings, row) else None


def _is_measured(result: Mapping[str, Any] | None) -> bool:
    return result is not None and result["status"] == "measured"


def _named(settings: StudySettings, row: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {"key": _key(settings, row), "seed": settings.seed, "row": row, **result}


def _save(out: Path, settings: StudySettings, row: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the result of a run, which appears when it is whole."""
    named = _named(settings, row, result)
    with atomic_write(_result_file(out, settings, row)) as file:
        file.write(json.dumps(named, indent=1, allow_nan=False).encode())
    return named


def _document(
    found: Mapping[tuple[int, str], Mapping[str, Any]],
    settings: Mapping[int, StudySettings],
    environment: Mapping[str, Any],
    quick: bool,
) -> dict[str, Any]:
    """The result file as far as there are results."""
    missing = {"status": "failed", "reason": study.NOT_RUN}
    starts, results = [], []
    for seed in settings:
        for row in (study.START, *study.ROWS):
            result = dict(found.get((seed, row), {"seed": seed, "row": row, **missing}))
            result.pop("key", None)
            if row == study.START:
                starts.append(
                    {"seed": seed, **{name: result.pop(name, {}) for name in ("pairs", "sampling", "curve")}}
                )
            results.append(result)
    shared = {name: value for name, value in dataclasses.asdict(next(iter(settings.values()))).items()
              if name != "seed"}  # fmt: skip
    return {
        "schema": study.SCHEMA,
        "benchmark": "study",
        "quick": quick,
        "environment": {**environment, **_now("ended", "load_after")},
        "settings": shared,
        "seconds": sum(result.get("cpu_seconds", 0.0) for result in results),
        "seeds": list(settings),
        "starts": starts,
        "results": results,
    }


def _write(out: Path, document: Mapping[str, Any]) -> None:
    with atomic_write(out / "study.json") as file:
        file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    with atomic_write(out / "study.md") as file:
        file.write(study.markdown(document).encode())


def _environment(command: str, threads: int) -> dict[str, Any]:
    """Hardware, versions, commit and command."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "modified": bool(changed) or changed is None,
        "command": command,
        **_now("started", "load_before"),
    }


def _now(time_name: str, load_name: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {time_name: now, load_name: [round(value, 2) for value in os.getloadavg()]}


def save_plot(path: Path, document: Mapping[str, Any]) -> None:
    """Draws held-out accuracy of the rows of each table: means over seeds, with their standard deviations.

    Args:
        path: Of the figure; its suffix is the format.
        document: As ``study.load`` returns it.
    """
    panels = []
    for table in study.TABLES.values():
        content = []
        for column, color in zip(study.COLUMNS, ("C0", "C2", "C1"), strict=True):
            labels, means, errors = [], [], []
            for label, row in table.rows:
                numbers = list(study.values(document, row, column).values())
                if numbers:
                    labels.append(label)
                    means.append(statistics.fmean(numbers))
                    errors.append(statistics.stdev(numbers) if len(numbers) > 1 else 0.0)
            if labels:
                content.append(report.Bars(column, labels, means, errors, color))
        if content:
            panels.append(report.Panel(table.title, "%, held out", "", content, is_horizontal=True))
    if panels:
        report.save_panels(path, f"The study, {len(document['seeds'])} seeds", panels)


# -------------------------------------------------------------------------------------------------- a start, its pairs


def prepare(folder: Path, settings: StudySettings, row: str = study.START) -> dict[str, Any]:
    """Makes the start of a seed and its files of pairs with the reference's log-probs, unless they are there.

    Args:
        folder: Of the seed.
        settings: Of the seed.
        row: ``study.START``.

    Returns:
        The result of the start: ``evaluation``, ``pairs`` (their number by file), ``sampling``, ``curve``.

    Raises:
        RuntimeError: If the model's answers gave none of the pairs of a file.
    """
    found = _read(folder.parent, settings, row)
    if found is not None and _start_file(folder).exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # what another start has left does not belong to this one; results know their own
        if path.name != _RESULTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _known.clear()
    with _logged(folder), _Clock() as clock:
        torch.manual_seed(settings.seed)
        rng = np.random.default_rng(settings.seed)
        processor = build_processor()
        model = build_model(processor.tokenizer, hidden_size=settings.hidden_size, layers=settings.layers)
        curve = _train_start(model, processor, settings, rng, folder)
        pool, summaries = _sample(model, processor, settings, rng, folder)
        files = choose(pool, settings, rng)
        for name, pairs in files.items():
            write_pairs(_pair_file(folder, name), pairs)
            _compute_reference(model, processor, settings, name, folder)
        evaluation = _evaluate(model, processor, settings)
        torch.save(model.state_dict(), _start_file(folder))
    _known.clear()  # most of it was of the first training
    return _save(
        folder.parent,
        settings,
        row,
        {
            "status": "measured",
            "evaluation": evaluation,
            "pairs": {name: len(pairs) for name, pairs in files.items()},
            "sampling": summaries,
            "curve": curve,
            **clock.seconds,
        },
    )


def _start_file(folder: Path) -> Path:
    return folder / "start.pt"


def _pair_file(folder: Path, name: str) -> Path:
    return folder / f"pairs-{slug(name)}.jsonl"


def _reference_file(folder: Path, name: str) -> Path:
    return folder / f"reference-{slug(name)}.jsonl"


def _train_start(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains on right responses, some to questions without their image, some to questions that name the digits.

    Returns:
        ``step``, ``loss`` and validation accuracy of each column, at each look.
    """
    splits = digits.load_digits()
    tasks = digits.sample_tasks(_part(splits["train"], 0, settings.sft_digits), settings.sft_questions, rng)
    blind = int(settings.sft_blind_share * len(tasks))
    named = blind + int(settings.sft_text_share * len(tasks))
    tasks[:blind] = map(digits.without_image, tasks[:blind])
    tasks[blind:named] = map(digits.in_words, tasks[blind:named])
    validation = asked(splits["validation"], settings.validation_tasks)
    curve: list[dict[str, float]] = []

    def note(step: int, line: Mapping[str, float]) -> None:
        if step % settings.sft_check_steps == 0 or step == settings.sft_most_steps:
            looked = look(model, processor, validation)
            accuracy = {column: numbers["accuracy"] for column, numbers in looked.items()}
            curve.append({"step": step, "loss": line["loss"], **accuracy})

    recipe = make_recipe(
        write_sft(folder, tasks),
        folder / "runs" / "start",
        loss=METHODS["SFT"],
        steps=settings.sft_most_steps,
        batch=settings.sft_batch,
        rate=settings.sft_rate,
        schedule="linear",
        settings=settings,
    )
    _train(recipe, model, processor, on_step=note)
    return curve


def _part(split: digits.Digits, begin: int, end: int | None) -> digits.Digits:
    """Some digits of a split."""
    part = slice(begin, end)
    return digits.Digits(split.images[part], split.values[part], split.indices[part])


def _sample(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    rng: np.random.Generator,
    folder: Path,
) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
    """Lets the start answer questions about training digits that are new to it: pairs by kind, and their sampling."""
    engine = TransformersEngine(model, processor, name=f"digits study, seed {settings.seed}", batch_size=BATCH_SIZE)
    unseen = _part(digits.load_digits()["train"], settings.sft_digits, None)
    for form, count in (("direct", settings.direct_questions), ("cot", settings.questions)):
        write_items(folder, form, digits.sample_tasks(unseen, count, rng, form))
    with atomic_write(folder / f"{study.TEXT}.jsonl") as file:
        for task in digits.sample_tasks(unseen, settings.text_questions, rng, "cot"):
            item = {"question": digits.in_words(task).question, "answer_gt": str(task.answer), "form": "cot"}
            file.write(dump_line(item))
    drawn = SamplingConfig(temperature=settings.temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    common: dict[str, Any] = {"sampling": drawn, "seed": settings.seed, "matcher": digits.MATCHER}
    pool: dict[str, list[Pair]] = {}
    summaries: dict[str, Any] = {}

    def sample(name: str, source: str, pipeline: runner.PairPipeline, limit: int | None = None) -> None:
        out = folder / f"sample-{slug(name)}"
        summary = runner.run(pipeline, engine, folder / f"{source}.jsonl", out, block_size=_BLOCK_SIZE, limit=limit,
                               image_root=str(folder))  # fmt: skip
        assert summary is not None  # it is the only process
        summaries[name] = summary.to_dict()
        outputs = [output for output in pipeline.outputs if output != "unsolved"]
        found = [pair for output in outputs for pair in read_made(out / f"{output}.jsonl", folder)]
        pool[name] = list({pair.key(): pair for pair in found}.values())

    for source, form in (*zip(digits.FORMS, digits.FORMS, strict=True), (study.TEXT, "cot")):
        config = CorrectnessConfig(samples=settings.samples, pairs_per_question=settings.pairs_per_question,
                                   style=digits.STYLES[form], **common)  # fmt: skip
        sample(source, source, Correctness(config))
    for name, keep in study.KEEPS.items():
        continuations = settings.late_continuations if keep > _LATE else 1
        blind = DropoutNTPConfig(keep=keep, samples=continuations, sample_chosen=True, style=digits.STYLES["cot"],
                                 **common)  # fmt: skip
        sample(name, "cot", DropoutNTP(blind), settings.dropout_ntp_questions)
    return pool, summaries


def choose(
    pool: Mapping[str, Sequence[Pair]], settings: StudySettings, rng: np.random.Generator
) -> dict[str, list[Pair]]:
    """Takes the pairs of each file of ``study.PAIR_FILES`` from those that were made.

    Args:
        pool: Pairs by kind: "direct", "cot", "text" and the keys of ``study.KEEPS``.
        settings: How many.
        rng: Source of the choice and the order.

    Raises:
        RuntimeError: If a file would be empty.
    """
    mixed_kinds = ("direct", "cot", "DropoutNTP 0.5")
    drawn = {name: [pool[name][index] for index in rng.permutation(len(pool[name]))] for name in pool}
    wanted = [round(share * settings.pairs) for share in settings.mixed_shares]
    taken = [pair for name, count in zip(mixed_kinds, wanted, strict=True) for pair in drawn[name][:count]]
    mixed = list({pair.key(): pair for pair in taken}.values())
    mixed = [mixed[index] for index in rng.permutation(len(mixed))]
    count = min(settings.kind_pairs, *(len(drawn[name]) for name in ("cot", *study.KEEPS)))
    files = {
        "mixed": mixed,
        **{name: mixed[: round(share * len(mixed))] for name, share in study.SHARES.items()},
        "correctness": drawn["cot"][:count],
        "correctness and DropoutNTP": [*drawn["cot"][: count - count // 2], *drawn["DropoutNTP 0.5"][: count // 2]],
        **{name: drawn[name][:count] for name in study.KEEPS},
        study.TEXT: drawn[study.TEXT][: settings.pairs],
    }
    for name, pairs in files.items():
        if not pairs:
            made = ", ".join(f"{len(found)} {kind}" for kind, found in pool.items())
            raise RuntimeError(f"pairs {name!r} must be at least one, got none of {made}")
    return files


def _compute_reference(
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    settings: StudySettings,
    name: str,
    folder: Path,
) -> None:
    """Computes the start's log-probs of a file of pairs once for all rows: by a step that changes nothing."""
    recipe = make_recipe(
        _pair_file(folder, name), folder / "runs" / "reference", loss=METHODS["MPO"], steps=1,
        batch=settings.branch_batch, rate=0.0, schedule="constant", settings=settings,
        reference=_reference_file(folder, name),
    )  # fmt: skip
    _train(recipe, copy.deepcopy(model), processor)


# --------------------------------------------------------------------------------------------------------------- a row


def run_row(folder: Path, settings: StudySettings, row: str) -> dict[str, Any]:
    """Trains the start of a seed as a row says, evaluates what comes of it, and writes the result.

    Args:
        folder: Of the seed, as ``prepare`` left it.
        settings: Of the seed.
        row: Key of ``study.ROWS``.

    Returns:
        The result: ``evaluation``, and ``log`` with means of the first and the last steps.
    """
    run = study.ROWS[row]
    lines: list[Mapping[str, float]] = []
    with _logged(folder), _Clock() as clock:
        processor = build_processor()
        model = build_model(processor.tokenizer, hidden_size=settings.hidden_size, layers=settings.layers)
        model.load_state_dict(torch.load(_start_file(folder), weights_only=True))
        recipe = row_recipe(run, settings, folder, folder / "runs" / slug(row))
        _train(recipe, model, processor, on_step=lambda _, line: lines.append(dict(line)))
        evaluation = _evaluate(model, processor, settings)
    log = {"first": _means(lines[:_LOGGED]), "last": _means(lines[-_LOGGED:])}
    result = {"status": "measured", "evaluation": evaluation, "log": log, "steps": len(lines), **clock.seconds}
    return _save(folder.parent, settings, row, result)


def row_recipe(row: Row, settings: StudySettings, folder: Path, out: Path) -> Recipe:
    """The recipe of a row.

    Args:
        row: What to run.
        settings: Of the seed.
        folder: Of the seed.
        out: Folder of the run.
    """
    recipe = make_recipe(
        _pair_file(folder, row.pairs), out, loss=dict(row.loss), steps=settings.branch_steps,
        batch=settings.branch_batch, rate=settings.branch_rate * row.rate, schedule="cosine", settings=settings,
        reference=_reference_file(folder, row.pairs),
    )  # fmt: skip
    reference = recipe.reference
    if row.is_synced:
        every = max(1, settings.branch_steps // study.STEPS_BETWEEN_SYNCS)
        reference = ReferenceRecipe(kind="copy", sync_every=every, sync_mix=0.6)
    shift = RewardShiftRecipe(**row.reward_shift)
    return dataclasses.replace(recipe, reference=reference, reward_shift=shift)


def _means(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = [key for key in _LOG_KEYS if all(key in line for line in lines)]
    return {key: statistics.fmean(line[key] for line in lines) for key in keys}


# ----------------------------------------------------------------------------------------------------- what they share

_known: dict[str, Sample | SkippedPair] = {}  # what this process has encoded, by the pair and the path of its image


class _RememberingEncoder(Encoder):
    """An encoder that does not do twice what every row does: it takes a quarter of a step.

    Args:
        encoder: Does what is new.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(vars(encoder))

    def encode(self, pair: Pair, name: str) -> Sample | SkippedPair:
        """As in ``Encoder``."""
        key = pair.key()  # its images are absolute paths
        if key not in _known:
            _known[key] = super().encode(pair, name)
        return dataclasses.replace(_known[key], name=name)


class _Run(Trainer):
    """A run whose model is evaluated and forgotten: no checkpoint, no folder of the model, no card with its curves."""

    def _build(self, model: Any, processor: Any) -> None:
        super()._build(model, processor)
        self.encoder = _RememberingEncoder(self.encoder)

    def _save(self, *, is_end: bool = False) -> None:
        pass

    def _finish(self, evaluation: Mapping[str, float] | None) -> None:
        self._close()


def _train(
    recipe: Recipe,
    model: InternVLForConditionalGeneration,
    processor: DigitsProcessor,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
) -> None:
    """One run of the trainer. What it writes is removed."""
    if _Run(recipe, model=model, processor=processor, on_step=on_step).run() != 0:
        raise KeyboardInterrupt  # the trainer has caught the signal
    shutil.rmtree(recipe.output.dir, ignore_errors=True)


def asked(split: digits.Digits, count: int) -> dict[str, list[digits.Task]]:
    """The questions of each column, always the same."""
    rng = np.random.default_rng(_EVALUATION_SEED)
    tasks = {form: digits.sample_tasks(split, count, rng, form) for form in digits.FORMS}
    return {**tasks, study.TEXT: list(map(digits.in_words, digits.sample_tasks(split, count, rng, "cot")))}


def look(
    model: InternVLForConditionalGeneration, processor: DigitsProcessor, tasks: Mapping[str, Sequence[digits.Task]]
) -> dict[str, dict[str, float]]:
    """Greedy answers to the questions of each column: ``accuracy``, ``unparsable``, ``tokens`` and ``count``."""
    return {column: next(iter(evaluate(model, processor, some).values())) for column, some in tasks.items()}


def _evaluate(
    model: InternVLForConditionalGeneration, processor: DigitsProcessor, settings: StudySettings
) -> dict[str, dict[str, float]]:
    return look(model, processor, asked(digits.load_digits()["held-out"], settings.evaluation_tasks))


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Puts what trainer and engine say into ``log.txt`` of the seed; several rows may share it."""
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        yield


class _Clock:
    """Takes the time of a block: wall clock, and of this process' CPU."""

    def __enter__(self) -> _Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.seconds = {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
