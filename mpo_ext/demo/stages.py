"""Runs the stages of the demo, and keeps their results, so that an interrupted demo resumes."""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mpo_ext
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.train import clear
from mpo_ext.files import write_json

Advance = Callable[[int], None]


class Stages:
    """Prints an explanation before each stage, a progress bar during it, and its duration after it.

    The result of each stage is a file in ``folder/stages``. A stage whose file exists is not run again. If the folder
    holds the results of other settings or of another version, they are deleted.

    Attributes:
        seconds: Duration of each stage in seconds, also of the stages of the interrupted run.
    """

    def __init__(self, console: Console, folder: Path, settings: Settings) -> None:
        self.console, self.folder = console, folder / "stages"
        self.seconds: dict[str, float] = {}
        content = json.dumps([mpo_ext.__version__, dataclasses.asdict(settings)], sort_keys=True)
        self._key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        key = self.folder / "key"
        if not key.exists() or key.read_text() != self._key:
            clear(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            key.write_text(self._key)

    def run(self, name: str, explanation: str, make: Callable[[Advance], Any], *, total: int | None = None) -> Any:
        """Returns the result of a stage, a JSON value.

        Args:
            name: Name of the stage, the key of its duration in ``seconds``.
            explanation: Text to print before the stage.
            make: Runs the stage, and returns its result. Its argument is a function that advances the progress bar.
            total: Number of steps of the progress bar; None: no progress bar.
        """
        path = self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
        if path.exists():
            stage = json.loads(path.read_text(encoding="utf-8"))
            self.seconds[name] = stage["seconds"]
            self.console.print(f"[bold]{name}[/bold]: finished in an earlier run, in {stage['seconds']:.1f} s")
            return stage["result"]
        self.console.print(f"[bold]{name}[/bold]: {explanation}")
        start = time.perf_counter()
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        is_hidden = total is None or not self.console.is_terminal
        with Progress(*columns, *times, console=self.console, transient=True, disable=is_hidden) as progress:
            bar = progress.add_task(name, total=total)
            result = make(lambda steps: progress.update(bar, advance=steps))
        self.seconds[name] = time.perf_counter() - start
        write_json(path, {"seconds": self.seconds[name], "result": result})
        self.console.print(f"  {self.seconds[name]:.1f} s")
        return result
