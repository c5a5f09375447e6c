"""Progress of a sampling run."""

import contextlib
import time
from collections.abc import Callable
from typing import TextIO

from mpo_ext.generate.outputs import ItemResult, Summary

_REPORT_S = 30.0


class SamplingProgress:
    """Shows how far a run is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, name: str, total: int, stream: TextIO | None) -> None:
        self.name, self.total, self.stream = name, total, stream
        self.summary = Summary()
        self._begin_s = self._shown_s = time.monotonic()
        self._update: Callable[[], None] = lambda: None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "SamplingProgress":
        if self.stream is None:
            return self
        self._update = self._line
        if self.stream.isatty():
            with contextlib.suppress(ImportError):
                self._update = self._bar()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def add(self, outcome: ItemResult, records: int) -> None:
        self.summary.add(outcome, records)
        self._update()

    def _counts(self) -> str:
        items, samples = self.summary.refused_items, self.summary.refused_samples
        return f"{self.summary.pairs} pairs, {items} items without a pair, {samples} samples refused"

    def _bar(self) -> Callable[[], None]:
        from rich import console, progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]:.1f}/s"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[counts]}"),
        )
        bar = progress.Progress(*columns, console=console.Console(file=self.stream))
        task = self._exit.enter_context(bar).add_task(self.name, total=self.total, rate=0.0, counts="")

        def update() -> None:
            rate = self.summary.items / max(time.monotonic() - self._begin_s, 1e-9)
            bar.update(task, completed=self.summary.items, rate=rate, counts=self._counts())

        return update

    def _line(self) -> None:
        now = time.monotonic()
        is_last = self.summary.items == self.total
        if now - self._shown_s < _REPORT_S and not is_last:
            return
        self._shown_s = now
        rate = self.summary.items / max(now - self._begin_s, 1e-9)
        left = (self.total - self.summary.items) / rate
        print(
            f"{self.name}: {self.summary.items}/{self.total} items, {rate:.1f}/s, {left:.0f} s left, {self._counts()}",
            file=self.stream,
            flush=True,
        )
