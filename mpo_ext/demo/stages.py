"""Runs the stages of the demo, such as the SFT, and stores their results, so that an interrupted demo resumes."""

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mpo_ext
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.train import START as START_RUN
from mpo_ext.files import write_json

Advance = Callable[[int], None]
START_STAGE = "SFT start"
_KEYS = "settings.json"


class Stages:
    """Runs stages of the demo, such as the SFT, and stores the result of each stage in a file in ``folder/stages``.

    A stage that already has a file is not run again. Each other stage prints an explanation, a progress bar and its
    duration.

    The constructor deletes files of runs with other settings or another version of mpo_ext. The SFT model is kept if
    the settings of the SFT and the version are the same.

    Attributes:
        seconds: Duration of each stage in seconds, including stages that an earlier run finished.
    """

    def __init__(self, console: Console, folder: Path, settings: Settings) -> None:
        self.console, self.folder = console, folder / "stages"
        self.seconds: dict[str, float] = {}
        values = dataclasses.asdict(settings)
        start = {**settings.start_settings(), **{name: values[name] for name in ("backend", "uses_shipped_start")}}
        keys = {"start": _key(start), "all": _key(values)}
        path = self.folder / _KEYS
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known != keys:
            clear(folder, keep_start=known.get("start") == keys["start"])
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, keys)

    def run(self, name: str, explanation: str, make: Callable[[Advance], Any], *, total: int | None = None) -> Any:
        """Runs a stage and returns its result, a JSON value. A stage that has already finished is not run again.

        Args:
            name: Name of the stage. The dict ``seconds`` stores the duration under this name.
            explanation: Text to print before the stage.
            make: Function that runs the stage and returns its result. It receives a function ``advance``. A call
                ``advance(n)`` moves the progress bar by n steps.
            total: Number of steps of the progress bar; None: no progress bar.
        """
        path = self.folder / _file(name)
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


def clear(folder: Path, *, keep_start: bool) -> None:
    """Deletes the results of an earlier demo run in ``folder``.

    These are the results of stages, training runs and sampling runs, and the log-probs of the reference model. If
    ``keep_start`` is True, the SFT model is kept.
    """
    kept = {_file(START_STAGE), START_RUN} if keep_start else set()
    for name in ("runs", "stages"):
        for path in (folder / name).glob("*"):
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("correctness-direct", "correctness-cot", "dropout-ntp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "reference.jsonl").unlink(missing_ok=True)


def _key(settings: dict[str, Any]) -> str:
    content = json.dumps([mpo_ext.__version__, settings], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _file(stage: str) -> str:
    """Returns the name of the file that stores the result of a stage."""
    return f"{re.sub(r'[^a-z0-9]+', '-', stage.lower())}.json"
