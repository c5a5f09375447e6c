"""The progress display of a sampling run or an evaluation."""

import contextlib
import time
from collections.abc import Callable
from typing import TextIO

_INTERVAL_S = 30.0


class SamplingProgress:
    """Shows the number of finished items, as a bar on a terminal or as a line every 30 seconds.

    The bar requires the package rich; without it, a terminal shows lines, too.

    Args:
        name: Label of the display.
        total: Number of items.
        stream: Output of the display; None disables the display.
    """

    def __init__(self, name: str, total: int, stream: TextIO | None) -> None:
        self.name, self.total, self.stream = name, total, stream
        self.done = 0
        self._begin_s = self._shown_s = time.monotonic()
        self._show: Callable[[str], None] = lambda counts: None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "SamplingProgress":
        if self.stream is not None:
            self._show = self._show_line
            if self.stream.isatty():
                with contextlib.suppress(ImportError):
                    self._show = self._start_bar()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def advance(self, counts: str) -> None:
        """Counts one more finished item, and shows the text ``counts`` in the display."""
        self.done += 1
        self._show(counts)

    def _start_bar(self) -> Callable[[str], None]:
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

        def update(counts: str) -> None:
            bar.update(task, completed=self.done, rate=self._rate(), counts=counts)

        return update

    def _show_line(self, counts: str) -> None:
        now = time.monotonic()
        if now - self._shown_s < _INTERVAL_S and self.done < self.total:
            return
        self._shown_s = now
        left_s = (self.total - self.done) / self._rate()
        print(
            f"{self.name}: {self.done}/{self.total} items, {self._rate():.1f}/s, {left_s:.0f} s left, {counts}",
            file=self.stream,
            flush=True,
        )

    def _rate(self) -> float:
        return self.done / max(time.monotonic() - self._begin_s, 1e-9)
