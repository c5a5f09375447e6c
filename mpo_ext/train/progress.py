"""The console output of a run: the progress of the steps and the check of the first step's loss."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import torch

from mpo_ext.train.batch import Batch
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe, RewardShiftRecipe

_PRINT_EVERY_S = 30.0
_RATE = "learning_rate"
_SHOWN = {"loss": ("loss", ".4f"), "accuracy": ("reward_accuracy", ".2f"), "margin": ("reward_margin", ".3f")}
_FIRST_LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}


def resume_advice(resume: str) -> str:
    """Returns the end of the message of an interrupted run: how to resume from its last checkpoint.

    ``resume`` is ``output.resume`` of the run.
    """
    # With another value, the same command would start again from an older checkpoint, or refuse to resume.
    return f"; {'the same command' if resume == 'auto' else 'output.resume=auto'} resumes from here"


def busy_cpu_line(device: torch.device) -> str | None:
    """Returns a hint about OMP_NUM_THREADS if the run uses several threads of a busy CPU; otherwise None."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load < 0.75 * (os.cpu_count() or 1):
        return None
    return (
        f"the load average of this machine is {load:.1f}: if other programs run, OMP_NUM_THREADS=1 may be several "
        f"times faster than the {threads} threads of this run"
    )


class Console:
    """Shows the progress of a run: a bar on a terminal, otherwise a line at most every 30 seconds.

    ``total`` is the number of steps of the run, ``done`` the number of finished steps. If ``stream`` is None, nothing
    is printed.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None) -> None:
        self.total, self.done, self.stream = total, done, stream
        self._first: tuple[int, float] | None = None  # number and end time of the first step of this process
        self._printed_s = -math.inf
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
        """Prints a line of text."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.stream is not None:
            print(text, file=self.stream, flush=True)

    def step(self, step: int, line: Mapping[str, float]) -> None:
        """Shows the progress after a step. ``step`` is counted from 1; ``line`` is the log line of the step."""
        self.done = step
        parts = [f"{name} {line[key]:{form}}" for name, (key, form) in _SHOWN.items() if key in line]
        text = ", ".join([*(parts or ["no pairs"]), *_rates(line)])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=text)
            return
        now = time.monotonic()
        if self._first is None:  # the first step is slow, so the time estimate starts after it
            self._first = step, now
        if self.stream is None or (now - self._printed_s < _PRINT_EVERY_S and step < self.total):
            return
        self._printed_s = now
        first, first_s = self._first
        left = f", {(self.total - step) * (now - first_s) / (step - first):.0f} s left" if step > first else ""
        print(f"step {step}/{self.total}{left}: {text}", file=self.stream, flush=True)


def _rates(line: Mapping[str, float]) -> list[str]:
    """Returns the learning rates in a log line as texts, such as "rate 1.00e-06" or "projector rate 2.00e-06"."""
    names = [name for name in line if name.startswith(_RATE)]
    return [f"{name.removeprefix(_RATE).lstrip('_')} rate {line[name]:.2e}".lstrip() for name in names]


def first_step_lines(
    accelerator: Any, recipe: Recipe, step: int, line: Mapping[str, float], batches: Sequence[Batch]
) -> Iterator[str]:
    """Yields the console lines that follow the first step with pairs and a finite loss.

    All ranks must call this function and read all lines.

    Args:
        accelerator: accelerate's ``Accelerator``.
        recipe: Recipe of the run.
        step: Number of the step, counted from 1.
        line: Log line of the step.
        batches: Micro-batches of this rank.
    """
    if text := lone_pairs(recipe.optim.micro_batch_tokens, batches):
        yield text
    if recipe.reference_kind is None or recipe.reference.path is not None:
        return
    if recipe.loss.preference is None:
        ranks = gather(accelerator, [batch.pairs for batch in batches])
        pairs = [sum(counts) for counts in itertools.zip_longest(*ranks, fillvalue=0)]
        yield compare_first_loss(recipe, step, line, pairs)
    if abs(line["reward_margin"]) <= _FIRST_LOSS_TOLERANCE[recipe.precision]:
        yield (
            f"step {step}: the policy still equals the reference, so the reward accuracy, "
            f"{line['reward_accuracy']:.2f}, is rounding noise until the first update"
        )


def lone_pairs(limit: int | None, batches: Sequence[Batch]) -> str | None:
    """Returns a console line if every pair of the first step is longer than ``limit``; otherwise None.

    In this case, each micro-batch has only one pair. ``limit`` is ``optim.micro_batch_tokens``. ``batches`` are the
    micro-batches of the first step.
    """
    if limit is None or not batches or not all(batch.pairs == 1 and batch.positions > limit for batch in batches):
        return None
    smallest = min(batch.positions for batch in batches)
    return (
        f"optim.micro_batch_tokens is {limit:,}, less than every pair of the first step (at least {smallest:,} "
        "positions): each pair is a micro-batch"
    )


def first_deltas(shift: RewardShiftRecipe, count: int) -> list[float]:
    """Returns the reward shift that each of the first ``count`` micro-batches uses if all rewards are 0."""
    if shift.mode == "fixed" or shift.per == "optimizer_step":
        return [shift.value] * count
    keep = shift.decay if shift.mode == "ema" else 0.0  # the first update of "cumulative" discards the value
    n_updates = range(count) if shift.update == "after" else range(1, count + 1)
    return [shift.value * keep**number for number in n_updates]


def compare_first_loss(recipe: Recipe, step: int, line: Mapping[str, float], pairs: Sequence[int]) -> str:
    """Returns a console line that compares the loss of the first step with its expected value.

    Before the first update, the policy equals the reference. All rewards are then 0, so the expected DPO and BCO terms
    are known. ``pairs`` has the number of pairs of each micro-batch, summed over the ranks. For the other arguments,
    see ``first_step_lines``.
    """
    config = recipe.loss.config
    # softplus(delta) + softplus(-delta), in a form that does not overflow
    terms = [
        abs(delta) + 2 * math.log1p(math.exp(-abs(delta))) for delta in first_deltas(recipe.reward_shift, len(pairs))
    ]
    bco = sum(count * term for count, term in zip(pairs, terms, strict=True)) / max(sum(pairs), 1)
    expected = config.dpo_weight * math.log(2) + config.bco_weight * bco
    measured = config.dpo_weight * line["dpo_loss"] + config.bco_weight * line["bco_loss"]
    ntp = line["loss"] - measured
    others = "next token and routers" if "router_aux_loss" in line else "next token"
    text = f"step {step}: loss {line['loss']:.4f}, expected {expected:.4f} + {ntp:.4f} ({others})"
    if abs(measured - expected) <= _FIRST_LOSS_TOLERANCE[recipe.precision] * max(1.0, expected):
        return f"{text}: policy and reference agree"
    cause = "the reference is not the model that is trained"
    if recipe.model.lora is not None and recipe.model.lora.dropout > 0:
        cause = "the adapters' dropout (model.lora.dropout) is on"
    return (
        f"{text}: policy and reference DIFFER. Mean rewards are {line['chosen_reward']:.4f} (chosen) and "
        f"{line['rejected_reward']:.4f} (rejected) where 0 was expected: {cause}"
    )
