"""Runs the study. For each seed, trains starting models, makes pairs from their answers, and trains other models.

Each result is saved in a file. The same command therefore resumes an interrupted study. Runs can be executed in
parallel processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import measure
from benchmarks.study import results, rows, start, tables
from benchmarks.study.declare import START
from benchmarks.study.settings import SETTINGS, AnySettings
from benchmarks.study.workers import Workers, sigterm_as_interrupt

_WRITE_S = 10.0
_FORMATS = ("png", "svg")
_NO_START = "no start"

StudyRun = tuple[int, str]  # seed and row


class Study:
    """A study in progress: the results so far, and the runs that have no result yet.

    Args:
        out: Existing folder, in which each seed has a subfolder.
        settings: Settings by seed.
        only: Names of the tables or runs to execute. Empty: all.
        quick: Whether ``settings`` are those of a quick study.
        environment: Machine, versions and command, to record in the result file.
        say: Function that prints a line.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[int, AnySettings],
        *,
        only: tuple[str, ...] = (),
        quick: bool,
        environment: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.out, self.settings, self.quick, self.environment, self.say = out, settings, quick, environment, say
        self.task = tables.TASKS[next(iter(settings.values())).task]
        self.rows = self.task.choose(only)
        self.results: dict[StudyRun, dict[str, Any]] = {}
        for seed in settings:
            for row in (*self.task.starts, *self.task.rows):
                result = results.read(out, self.settings_of(seed, row), row)
                if result is not None:
                    self.results[seed, row] = result
        starts = list(dict.fromkeys([START, *(row.start for row in self.rows.values())]))
        self.todo = {
            (seed, start): [
                name
                for name, row in self.rows.items()
                if row.start == start and not results.is_measured(self.results.get((seed, name)))
            ]
            for start in starts
            for seed in settings
        }
        self.left = sum(map(len, self.todo.values()))
        self.queue = [run for run, rows_of_start in self.todo.items() if rows_of_start or run not in self.results]
        self.began = self.written = time.monotonic()

    def run(self, jobs: int, threads: int) -> None:
        """Executes all runs that are left, in ``jobs`` processes with ``threads`` CPU threads each."""
        pending: dict[concurrent.futures.Future[dict[str, Any]], StudyRun] = {}
        with Workers(jobs, _begin_process, threads) as workers, sigterm_as_interrupt():
            while self.queue or pending:
                while self.queue and len(pending) < jobs:
                    seed, row = self.queue.pop(0)
                    task = start.prepare if row in self.task.starts else rows.run_row
                    folder = self.out / self.folder_of(seed, row)
                    pending[workers.submit(task, folder, self.settings_of(seed, row), row)] = seed, row
                for future in concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    seed, row = pending.pop(future)
                    error = future.exception()
                    if error is None:
                        self.finish(seed, row, future.result())
                    elif isinstance(error, Exception):
                        failure = results.failure(_reason(error))
                        self.finish(seed, row, results.complete_result(self.settings_of(seed, row), row, failure))
                    else:
                        raise error

    def finish(self, seed: int, row: str, result: dict[str, Any]) -> None:
        """Stores the result of ``row``, a training run or a starting model.

        When a starting model has been trained, the runs that begin from it are queued. If its training has failed,
        these runs are stored as failed, too.
        """
        self.results[seed, row] = result
        is_start = row in self.task.starts
        self.left -= not is_start
        self.say(f"{self.minutes():5.1f} min, {self.left} to do: seed {seed}, {row}: {_summary(result)}")
        if is_start and results.is_measured(result):
            self.queue.extend((seed, name) for name in self.todo[seed, row])
            self.queue.sort(key=self._order)
        elif is_start:
            failure = results.failure(f"{_NO_START}: {result['reason']}")
            for name in self.todo[seed, row]:
                self.results[seed, name] = results.complete_result(self.settings_of(seed, name), name, failure)
            self.left -= len(self.todo[seed, row])
        if time.monotonic() - self.written > _WRITE_S:
            self.write()

    def settings_of(self, seed: int, row: str) -> AnySettings:
        """Returns the settings of a starting model.

        ``row`` is the name of the starting model, or the name of a run that begins from this model.
        """
        return dataclasses.replace(self.settings[seed], **self.task.starts[tables.start_of(self.task, row)])

    def folder_of(self, seed: int, row: str) -> str:
        """Returns the folder name of a starting model. ``row`` names the model, or a run that begins from it."""
        variant = tables.start_of(self.task, row).removeprefix(START)
        return f"seed-{seed}" + (f"-{results.slug(variant)}" if variant else "")

    def _order(self, run: StudyRun) -> tuple[int, int, int]:
        """Returns the sort key of an entry of the queue. An entry is (seed, name of a training run or starting model).

        The queue has three parts:

        1. Names in the main tables. All seeds of a name come before the next name, so that an interrupted study has
           complete comparisons.
        2. Other training runs, seed by seed.
        3. Other starting models, seed by seed.
        """
        seed, row = run
        place = [*self.task.starts, *self.task.rows].index(row)
        main = {shown for name in self.task.main for _, shown in self.task.tables[name].rows}
        if row in main:
            return 0, place, seed
        return 2 if row in self.task.starts else 1, seed, place

    def write(self) -> None:
        """Writes ``study.json`` and ``study.md`` with the results so far."""
        results.write_document(self.out, self.document())
        self.written = time.monotonic()

    def document(self) -> dict[str, Any]:
        return results.document_of(self.results, self.settings, self.environment, self.quick)

    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def report_failures(self) -> bool:
        """Prints each failed run, and returns whether any run failed.

        Runs that failed because of a failed starting model are not printed.
        """
        failed = [
            result
            for (_, row), result in self.results.items()
            if not results.is_measured(result) and (row in self.rows or row in self.task.starts)
        ]
        for result in failed:
            if not result["reason"].startswith(_NO_START):
                self.say(f"failed: seed {result['seed']}, {result['row']}: {result['reason']}")
        return bool(failed)


def run(
    *,
    out: Path,
    seeds: Sequence[int],
    task: str,
    only: tuple[str, ...] = (),
    quick: bool,
    threads: int | None,
    backend: str | None,
    jobs: int,
    command: str,
) -> int:
    """Executes the runs that are left, and writes ``study.json``, ``study.md`` and the plot (PNG and SVG).

    The arguments are the options of ``python -m benchmarks.study``. ``command`` is the command line to record.

    Returns:
        0, or 1 if a run failed.

    Raises:
        KeyboardInterrupt: On SIGINT or SIGTERM. Complete results are kept.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    settings = _settings(seeds, task, quick, backend)
    environment = {**measure.provenance(command, *measure.now()), "threads": threads}
    say = functools.partial(Console().print, markup=False, highlight=False, soft_wrap=True)
    study = Study(out, settings, only=only, quick=quick, environment=environment, say=say)
    say(f"{len(study.rows)} rows for each of {len(seeds)} seeds; {study.left} of these runs are still to do")
    try:
        study.run(jobs, threads)
    finally:
        study.write()
    for suffix in _FORMATS:
        results.save_plot(out / f"study.{suffix}", study.document())
    has_failed = study.report_failures()
    say(f"{study.minutes():.1f} minutes; tables and plot are in {out}")
    return int(has_failed)


def take_over(out: Path, path: Path, seeds: Sequence[int], task: str, *, quick: bool, backend: str | None) -> None:
    """Copies the results in the file ``path`` to the folder ``out``, so that ``run`` need not repeat them.

    Call ``run`` afterwards, with the same arguments.

    Raises:
        ValueError: If the file has a wrong format, another task or other settings.
    """
    document = tables.load(path, has_all=False)
    if (name := document.get("task", tables.OLD_TASK)) != task:
        raise ValueError(f"--results must be of the task {task}, got {name}")
    count = results.take_over(out, document, _settings(seeds, task, quick, backend))
    print(f"{count} runs of {path} are taken over")


def _settings(seeds: Sequence[int], task: str, quick: bool, backend: str | None) -> dict[int, AnySettings]:
    """Returns the settings of each seed for a task of the study."""
    make = SETTINGS[task].quick if quick else SETTINGS[task]
    return {seed: dataclasses.replace(make(seed=seed), backend=backend) for seed in seeds}


def _begin_process(threads: int) -> None:
    results.current_commit()  # later commits have no part in the results of this process
    torch.set_num_threads(threads)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the model is too small to gain from a GPU


def _summary(result: dict[str, Any]) -> str:
    if result["status"] == "failed":
        return f"failed: {result['reason']}"
    accuracies = [f"{name} {100 * result['evaluation'][name]['accuracy']:.1f} %" for name in tables.COLUMNS]
    return f"{', '.join(accuracies)} ({result['seconds']:.0f} s)"


def _reason(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]
