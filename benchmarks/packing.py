"""Compares training with padded rows and with a packed row: ``python -m benchmarks.packing``.

A padded row holds one prompt and its two responses. A packed row holds all prompts and responses of a micro-batch,
without padding. A micro-batch has 8 text pairs of random lengths. Both cases run complete steps of mpo_ext's trainer,
from reading pairs to the optimizer. Attention is causal, without a mask (split attention).
"""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks.measure import environment, write_json
from benchmarks.step_inputs import Sizes
from benchmarks.train_step import TrainerCase, loss_gap, run_cases, summary

CASES = {
    "padded rows": TrainerCase(False, {"loss.shared_prefix": "padded"}),
    "packed row": TrainerCase(False),
}
SIZES = Sizes(
    vocab=1024, hidden=256, layers=4, images=0, text=1024, least_text=64, response=256, least_response=16, batch=8,
    micro_batch=8,
)  # fmt: skip


def main() -> None:
    """Measures padded rows and a packed row, prints a table, and writes the results as JSON if ``--json`` is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("hidden", "layers", "text", "least_text", "response", "least_response"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(SIZES, name))
    parser.add_argument("--pairs", type=int, default=SIZES.batch, help="pairs of a step, which are one micro-batch")
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    names = {field.name for field in dataclasses.fields(Sizes)} & set(vars(args))
    sizes = dataclasses.replace(
        SIZES, batch=args.pairs, micro_batch=args.pairs, **{name: getattr(args, name) for name in names}
    )
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(sizes).items()))
    steps, failed = run_cases(CASES, sizes, args.steps + 1, threads=args.threads)
    results = {name: summary(measured) for name, measured in steps.items()}
    base = results.get("padded rows")
    print(
        f"{'case':<16}{'step':>9}{'p20 .. p80':>18}{'of padded':>11}{'CPU s':>8}{'of padded':>11}{'peak MiB':>10}"
        f"{'loss gap':>10}"
    )
    for name, result in results.items():
        low, high = result["spread_s"]
        line = f"{name:<16}{result['median_s']:>7.2f} s{f'{low:.2f} .. {high:.2f} s':>18}"
        wall, cpu, gap = float("nan"), float("nan"), float("nan")
        if base is not None:
            wall, cpu = (result[key] / base[key] for key in ("median_s", "median_cpu_s"))
            gap = loss_gap(result["losses"], base["losses"])
        line += f"{wall:>11.2f}{result['median_cpu_s']:>8.2f}{cpu:>11.2f}"
        print(f"{line}{result['peak'] / 2**20:>10.0f}{gap:>10.1e}")
    for name, reason in failed.items():
        print(f"{name:<16}not run: {reason}")
    if args.json:
        write_json(args.json, {"sizes": dataclasses.asdict(sizes), "results": results, "failed": failed})


if __name__ == "__main__":
    main()
