"""Measures the CPU time that a training step spends on logging: ``python -m benchmarks.log_overhead``.

The steps are complete steps of mpo_ext's trainer, from reading pairs to the optimizer. Logging has four measured
parts: sums of metrics, the log line, the console, and the log file with the trackers. CPU time is measured because
other programs hardly change it.

The time of the statistics entropy and top1 is measured separately. It is the time of loss calls with statistics minus
the time of loss calls without them. Run this benchmark on a CPU. On a GPU, some parts also wait for the device.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import environment
from benchmarks.step_inputs import Sizes, build, make_pairs, make_recipe
from mpo_ext.train import batch_loss, loop
from mpo_ext.train.metrics import Totals
from mpo_ext.train.output import RunOutput
from mpo_ext.train.progress import Console

SIZES = Sizes(vocab=32768, hidden=256, layers=4, images=0, text=192, response=64, least_response=64, batch=8,
              micro_batch=2)  # fmt: skip
_ROUNDS = 15
#: For each part of the log, the functions that only log: the object that holds the function, and its name.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "sums of metrics": [(Totals, "__init__"), (Totals, "add"), (Totals, "reduce"), (loop, "with_logged_average")],
    "log line": [(loop, "log_line"), (loop, "speed"), (loop, "peak_memory_mib")],
    "console": [(Console, "step")],
    "log file and trackers": [(RunOutput, "log_step")],
}


class LogClock:
    """Measures the CPU seconds that each training step spends in each part of logging."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self.steps: list[tuple[float, dict[str, float]]] = []
        self._begin_s = time.process_time()

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += time.process_time() - start

        return timed

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Measures the logging functions, listed in ``PARTS``, inside the ``with`` block."""
        with contextlib.ExitStack() as stack:
            for part, functions in PARTS.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.wrap(part, getattr(owner, name))))
            yield

    def end_step(self) -> None:
        """Stores the CPU seconds of the step and of its logging parts, and starts the next step."""
        now = time.process_time()
        self.steps.append((now - self._begin_s, dict(self.seconds)))
        self._begin_s = now
        self.seconds.clear()


def measure(sizes: Sizes, steps: int, trackers: list[str]) -> tuple[list[tuple[float, dict[str, float]]], float]:
    """Runs ``steps`` + 1 training steps. Measures all steps except the first.

    Returns:
        A list with an entry for each measured step, and a number. An entry has the CPU seconds of the step, and a dict
        with the CPU seconds of each part of logging. The number is the CPU seconds per step for ``entropy`` and
        ``top1``.
    """
    clock = LogClock()
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    whole = batch_loss.linear_mpo_loss

    def keep_first(*args: Any, **kwargs: Any) -> Any:
        if not arguments:
            arguments.append((args, kwargs))
        return whole(*args, **kwargs)

    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        pairs = make_pairs(Path(folder), sizes, (steps + 1) * sizes.batch)
        recipe = make_recipe(Path(folder), pairs, sizes, steps + 1, {"output.trackers": trackers})
        model, processor = build(sizes)
        # The file and the trackers get a line after ``on_step``, so their seconds count for the next step.
        trainer = loop.Trainer(
            recipe, model=model, processor=processor, save=False,
            on_step=lambda step, line: clock.end_step(),
        )  # fmt: skip
        with clock.installed(), mock.patch.object(batch_loss, "linear_mpo_loss", keep_first):
            trainer.run()
        statistics_s = _statistics_seconds(*arguments[0]) * sizes.batch / sizes.micro_batch
    return clock.steps[1:], statistics_s


def _statistics_seconds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Returns the additional CPU seconds of a loss call that also computes entropy and top1."""
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]

    def seconds(stats: tuple[str, ...]) -> float:
        start = time.process_time()
        batch_loss.linear_mpo_loss(*detached, **{**kwargs, "stats": stats, "reward_shift": None})
        return time.process_time() - start

    return statistics.median(seconds(batch_loss.STATS) - seconds(()) for _ in range(_ROUNDS))


def main() -> None:
    """Measures the steps, and prints a table with the CPU time that each part of the logging takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("vocab", "hidden", "layers", "text", "response", "batch", "micro_batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(SIZES, name))
    parser.add_argument("--steps", type=int, default=10, help="counted steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trackers", nargs="*", default=["tensorboard"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = {field.name for field in dataclasses.fields(Sizes)} & set(vars(args))
    sizes = dataclasses.replace(SIZES, least_response=args.response, **{name: getattr(args, name) for name in names})
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(sizes).items()))
    steps, statistics_s = measure(sizes, args.steps, args.trackers)
    step_s = statistics.median(seconds for seconds, _ in steps)
    rows = {part: statistics.median(parts.get(part, 0.0) for _, parts in steps) for part in PARTS}
    rows["entropy and top1"] = max(statistics_s, 0.0)
    rows["all"] = sum(rows.values())
    print(f"{'part':<24}{'CPU ms a step':>14}{'of a step':>12}")
    for part, seconds in rows.items():
        print(f"{part:<24}{1e3 * seconds:>14.3f}{seconds / step_s:>12.3%}")
    print(f"{'step':<24}{1e3 * step_s:>14.1f}")


if __name__ == "__main__":
    main()
