"""What a run shows of itself: the sums of a step, the log, the console and accelerate's trackers."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mpo_ext.loss.functions import MPOOutput

_REPORT_S = 30.0
_SUMS = (
    "pairs", "loss", "dpo_loss", "bco_loss", "ntp_loss", "ntp_parts", "chosen_reward", "rejected_reward",
    "reward_accuracy", "chosen_logp", "rejected_logp", "entropy", "top1", "chosen_tokens", "rejected_tokens", "tokens",
)  # fmt: skip


class Totals:
    """Sums over the micro-batches of a step (or of an evaluation), on the device; nothing here waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.reward_shift: Tensor | None = None

    def add(self, out: MPOOutput, *, ntp_parts: int, tokens: int) -> None:
        """Takes in a micro-batch.

        Args:
            out: Of the loss.
            ntp_parts: What its next-token term is a mean over: chosen tokens, or chosen responses.
            tokens: Positions that went through the model, without padding.
        """
        pairs = len(out.chosen_reward)
        labelled = out.tokens.view(2, -1).sum(1)
        zero = out.loss.new_zeros(())
        values = (
            pairs, out.loss.detach(), out.dpo_loss * pairs, out.bco_loss * pairs, out.ntp_loss * ntp_parts,
            ntp_parts, out.chosen_reward.sum(), out.rejected_reward.sum(),
            (out.chosen_reward > out.rejected_reward).sum(), out.chosen_logp.sum(), out.rejected_logp.sum(),
            out.stats.get("entropy", zero) * labelled.sum(), out.stats.get("top1", zero) * labelled.sum(),
            labelled[0], labelled[1], tokens,
        )  # fmt: skip
        self.sums += torch.stack([torch.as_tensor(value).to(self.sums) for value in values])
        self.reward_shift = out.reward_shift

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The sums over all ranks, by name. Waits for the device."""
        sums = accelerator.reduce(self.sums, reduction="sum") if accelerator.num_processes > 1 else self.sums
        return dict(zip(_SUMS, sums.tolist(), strict=True))


def means(sums: Mapping[str, float], weights: tuple[float, float, float]) -> dict[str, float]:
    """The line of the log that sums come to: means over pairs, chosen tokens (or responses) and labelled tokens.

    Args:
        sums: From ``Totals.reduce``.
        weights: Of the three terms.
    """
    pairs, parts = max(sums["pairs"], 1), max(sums["ntp_parts"], 1)
    labelled = max(sums["chosen_tokens"] + sums["rejected_tokens"], 1)
    line = {name: sums[name] / pairs for name in ("dpo_loss", "bco_loss")}
    line["ntp_loss"] = sums["ntp_loss"] / parts
    terms = sum(weight * value for weight, value in zip(weights, line.values(), strict=True))
    line = {"loss": terms, **line}
    for name in ("chosen_reward", "rejected_reward", "reward_accuracy", "chosen_logp", "rejected_logp"):
        line[name] = sums[name] / pairs
    line["reward_margin"] = line["chosen_reward"] - line["rejected_reward"]
    line |= {name: sums[name] / labelled for name in ("entropy", "top1")}
    line |= {name: sums[name] for name in ("pairs", "chosen_tokens", "rejected_tokens")}
    return line


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process: of torch's allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Log:
    """``log.jsonl``: a line of JSON for each logged step and evaluation. Only the main process writes.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; numbers that are not finite are spelled out as text, since JSON has none."""
        shown = {key: _json(value) for key, value in line.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(shown) + "\n")

    def position(self) -> int:
        """Its size in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, position: int) -> None:
        """Cuts off what was written after a checkpoint."""
        if self.position() > position:
            os.truncate(self.path, position)

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Shows how far the run is: a bar on a terminal, elsewhere a line now and then.

    Args:
        total: Steps of the run.
        done: Steps that were done before.
        stream: Where to; None shows nothing.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None) -> None:
        self.total, self.done, self.stream = total, done, stream
        self._first: tuple[int, float] | None = None  # step and time of the first that was done here
        self._shown_s = -math.inf
        self._bar: Any = None
        self._task: Any = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Console":
        if self.stream is not None and self.stream.isatty():
            from rich import console, progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[line]}"),
            )
            self._bar = self._exit.enter_context(
                progress.Progress(*columns, console=console.Console(file=self.stream))
            )
            self._task = self._bar.add_task("train", total=self.total, completed=self.done, line="")
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.stream is not None:
            print(text, file=self.stream, flush=True)

    def step(self, step: int, line: Mapping[str, float]) -> None:
        """Shows a step that is done."""
        self.done = step
        shown = {"loss": ("loss", ".4f"), "accuracy": ("reward_accuracy", ".2f"), "margin": ("reward_margin", ".3f")}
        parts = [f"{name} {line[key]:{form}}" for name, (key, form) in shown.items() if key in line]  # SFT has one
        text = ", ".join([*(parts or ["no pairs"]), f"rate {line['learning_rate']:.2e}"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=text)
            return
        now = time.monotonic()
        if self._first is None:  # it takes longer than the others, which are as long as the second
            self._first = step, now
        if self.stream is None or (now - self._shown_s < _REPORT_S and step < self.total):
            return
        self._shown_s = now
        first, first_s = self._first
        left = f", {(self.total - step) * (now - first_s) / (step - first):.0f} s left" if step > first else ""
        print(f"step {step}/{self.total}{left}: {text}", file=self.stream, flush=True)
