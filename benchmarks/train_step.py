"""Compares training steps of mpo_ext and TRL (time, memory, losses): ``python -m benchmarks.train_step``.

Both trainers run completely, from reading pairs to the optimizer. Each runs in its own process. The model, the pairs
and their order are the same. The processes take turns: one makes a step while the others wait. TRL 1.16 computes the
MPO loss as the sum of its losses ``sigmoid``, ``bco_pair`` and ``sft``. It has no reward shift, so mpo_ext's reward
shift is fixed at 0.

The model is a small InternVL with a large vocabulary. A pair has four images of 256 tokens each and responses of 128
tokens. ``--prompt text`` replaces the images with 1,024 tokens of text, because TRL rejects a precomputed reference
for images. A case that fails is listed with its error.

``--attention`` compares three kinds of attention in mpo_ext. The prompt is a long text, and the vocabulary is small.
To compare them with TRL, name TRL and the kinds with ``--cases``. The kinds are:

- a row per pair, with split attention (causal calls without a mask)
- a row per pair, with a dense mask
- a row per response
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Timing, environment, write_json
from benchmarks.step_inputs import Sizes, make_pairs
from benchmarks.trainers import Gate, MeasuredStep, Parts, run_ours, run_trl


@dataclasses.dataclass(frozen=True)
class TrainerCase:
    """A case of the benchmark: a trainer with its settings."""

    is_trl: bool  # whether the trainer is TRL's
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # override recipe or DPOConfig


CASES = {
    "TRL": TrainerCase(True),
    "TRL, precomputed": TrainerCase(True, {"precompute_ref_log_probs": True}),
    "TRL, torch_compile": TrainerCase(True, {"torch_compile": True}),
    "mpo_ext": TrainerCase(False),
    "mpo_ext, precomputed": TrainerCase(False, {"reference.kind": "precomputed"}),
    **{
        f"mpo_ext{rows}{loss}": TrainerCase(False, {**of_rows, **of_loss})
        for rows, of_rows in {
            "": {},
            ", dense mask": {"loss.shared_prefix": "masked"},
            ", separate rows": {"loss.shared_prefix": False},
        }.items()
        for loss, of_loss in {
            "": {},
            ", recompute=False": {"loss.recompute": False},
            ", recompute=True": {"loss.recompute": True},
            ", from logits": {"loss.from_logits": True},
        }.items()
    },
}
DEFAULT_CASES = ("TRL", "TRL, precomputed", "mpo_ext", "mpo_ext, precomputed")
ATTENTION_CASES = ("mpo_ext, dense mask", "mpo_ext", "mpo_ext, separate rows")
#: Longest prompt, in tokens, with eight layers. With longer prompts, two layers keep a process below 5 GiB.
_DEEP_PROMPT = 4096


def attention_sizes(prompt: int) -> Sizes:
    """Returns sizes with which attention takes a large part of a step.

    The vocabulary is small. A prompt consists of ``prompt`` tokens of text, without images.
    """
    layers = 8 if prompt <= _DEEP_PROMPT else 2
    sizes = Sizes(vocab=1024, hidden=512, layers=layers, images=0, response=512, least_response=512)
    return dataclasses.replace(sizes, text=prompt - sizes.prompt)


def _side(
    connection: Any, case: TrainerCase, pairs: Path, sizes: Sizes, steps: int, threads: int, with_parts: bool
) -> None:
    """Trains a case in a child process. Sends a ``MeasuredStep`` to ``connection`` after each step.

    If training fails, sends the error as a text.
    """
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    try:
        import transformers  # noqa: F401

        import mpo_ext.train.loop  # noqa: F401 - imports are not measured

        if case.is_trl:
            import trl.trainer.dpo_trainer  # noqa: F401
        gate = Gate(connection, Parts() if with_parts else None)
        (run_trl if case.is_trl else run_ours)(gate, pairs, sizes, steps, case.settings)
    except EOFError:  # the other process has ended
        return
    except Exception as error:  # every error is reported as a result
        text = " ".join(str(error).split())
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {text[:300]}")


def run_cases(
    cases: Mapping[str, TrainerCase], sizes: Sizes, steps: int, *, threads: int, with_parts: bool = False
) -> tuple[dict[str, list[MeasuredStep]], dict[str, str]]:
    """Trains all cases, each in its own process, and measures their steps. The processes take turns after each step.

    The first step of a case includes its setup.

    Returns:
        Two dicts. The first has the measured steps of each case that succeeded. The second has the error of each case
        that failed.
    """
    context = multiprocessing.get_context("spawn")
    done: dict[str, list[MeasuredStep]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        pairs = make_pairs(Path(folder), sizes, steps * sizes.batch)
        sides: dict[str, tuple[Any, Any]] = {}
        try:
            for step in range(steps):
                for name, case in cases.items():
                    if name in failed:
                        continue
                    if step == 0:  # setup runs in turn too, so that it does not disturb a measured step
                        ours, theirs = context.Pipe()
                        arguments = (theirs, case, pairs, sizes, steps, threads, with_parts)
                        process = context.Process(target=_side, args=arguments)
                        process.start()
                        theirs.close()
                        sides[name] = process, ours
                    try:
                        if step > 0:
                            sides[name][1].send("go")
                        result = sides[name][1].recv()
                    except (EOFError, OSError):
                        sides[name][0].join()
                        result = f"the process ended with code {sides[name][0].exitcode}"
                    if isinstance(result, str):
                        failed[name] = result
                    else:
                        done[name].append(result)
        finally:
            for process, connection in sides.values():
                connection.close()
                process.join()
    return {name: steps for name, steps in done.items() if name not in failed}, failed


def summary(steps: Sequence[MeasuredStep]) -> dict[str, Any]:
    """Summarizes the steps of a case: median times after the first step, peak memory in bytes, and all losses."""
    counted = steps[1:]
    timing = Timing([step.seconds for step in counted])
    parts = {name: statistics.median(step.parts.get(name, 0.0) for step in counted) for name in counted[-1].parts}
    return {
        "median_s": timing.median_s,
        "spread_s": timing.spread_s,
        "median_cpu_s": statistics.median(step.cpu_seconds for step in counted),
        "peak": max(step.peak for step in steps),
        "peak_of_steps": max(step.peak for step in counted),
        "parts_s": parts,
        "losses": [step.loss for step in steps],
    }


def rates(sizes: Sizes, seconds: float) -> dict[str, float]:
    """Returns ``pairs_per_s`` and ``tokens_per_s`` of a step that takes ``seconds``. A prompt counts once per pair."""
    tokens = sizes.prompt + sizes.response + sizes.least_response
    return {"pairs_per_s": sizes.batch / seconds, "tokens_per_s": sizes.batch * tokens / seconds}


def loss_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Compares the losses of two runs step by step, and returns the largest absolute difference."""
    return max(abs(our - their) for our, their in zip(ours, theirs, strict=True))


def table(results: Mapping[str, dict[str, Any]], failed: Mapping[str, str], base: str, sizes: Sizes) -> Iterator[str]:
    """Yields the lines of the result table. Ratios are relative to the case ``base``.

    ``results`` has the ``summary`` of each case that succeeded. ``failed`` has the error of each case that failed.
    """
    yield f"base: {base}"
    yield (
        f"{'case':<36}{'step':>9}{'p20 .. p80':>18}{'pairs/s':>9}{'tokens/s':>10}{'times faster':>14}{'CPU s':>9}"
        f"{'times less':>12}{'peak MiB':>10}{'of base':>8}{'loss gap':>10}"
    )
    first = results.get(base)
    for name, result in results.items():
        low, high = result["spread_s"]
        per_second = rates(sizes, result["median_s"])
        line = f"{name:<36}{result['median_s']:>7.2f} s{f'{low:.2f} .. {high:.2f} s':>18}"
        line += f"{per_second['pairs_per_s']:>9.3f}{per_second['tokens_per_s']:>10.0f}"
        if first is None:
            yield f"{line}{'':>14}{result['median_cpu_s']:>9.2f}{'':>12}{result['peak'] / 2**20:>10.0f}"
            continue
        yield (
            f"{line}{first['median_s'] / result['median_s']:>14.2f}{result['median_cpu_s']:>9.2f}"
            f"{first['median_cpu_s'] / result['median_cpu_s']:>12.2f}{result['peak'] / 2**20:>10.0f}"
            f"{result['peak'] / first['peak']:>8.2f}{loss_gap(result['losses'], first['losses']):>10.1e}"
        )
    for name, reason in failed.items():
        yield f"{name:<36}not run: {reason}"


def parts_table(results: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table with the median seconds of each part of a step."""
    names = dict.fromkeys(name for result in results.values() for name in result["parts_s"])
    yield f"{'part':<22}" + "".join(f"{case:>28}" for case in results)
    for name in names:
        yield f"{name:<22}" + "".join(f"{result['parts_s'].get(name, 0.0):>28.3f}" for result in results.values())
    rest = (result["median_s"] - sum(result["parts_s"].values()) for result in results.values())
    yield f"{'rest':<22}" + "".join(f"{value:>28.3f}" for value in rest)
    yield f"{'step':<22}" + "".join(f"{result['median_s']:>28.3f}" for result in results.values())


def main() -> None:
    """Measures the cases, prints the tables, and writes the results as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Sizes):
        if field.name != "text":
            text = f"default: {field.default}, or with --attention another"
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--prompt", choices=("images", "text"), default="images")
    parser.add_argument(
        "--steps", type=int, default=10, help="counted steps of each case, after a first step that is not counted"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument(
        "--attention", type=int, nargs="?", const=_DEEP_PROMPT, metavar="TOKENS",
        help=f"compare ways to attend, with separate sizes and a prompt of this many tokens (default: {_DEEP_PROMPT})",
    )  # fmt: skip
    parser.add_argument("--parts", action="store_true", help="measure the parts of a step too")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fields = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Sizes)}
    changed = {name: value for name, value in fields.items() if value is not None}
    sizes = dataclasses.replace(attention_sizes(args.attention) if args.attention else Sizes(), **changed)
    if args.prompt == "text":
        sizes = dataclasses.replace(sizes, images=0, text=sizes.images * sizes.image_tokens)
    names = args.cases or list(ATTENTION_CASES if args.attention else DEFAULT_CASES)
    base = "TRL" if "TRL" in names else names[0]

    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(sizes).items()))
    cases = {name: CASES[name] for name in names}
    steps, failed = run_cases(cases, sizes, args.steps + 1, threads=args.threads, with_parts=args.parts)
    results = {name: summary(measured) for name, measured in steps.items()}
    print("\n".join(table(results, failed, base, sizes)))
    if args.parts and results:
        print("\nmedian seconds by part")
        print("\n".join(parts_table(results)))
    if args.json:
        write_json(args.json, {"sizes": dataclasses.asdict(sizes), "results": results, "failed": failed})


if __name__ == "__main__":
    main()
