"""Measures the time and memory of a trainer on a CPU, with the trainer's loss and with mpo_ext's loss.

    python tests/integrations/side_by_side.py trl [--rounds 3] [--steps 4] [--length 4] [--pairs 2] [--save]

Both losses have the same value on the same data, because mpo_ext uses the trainer's rule for the reward shift. The
model is a Qwen2 with two layers, hidden size 256, and a vocabulary of 151,936 tokens. Each run is a separate process
with one thread. Runs with the two losses alternate.

Prints the median wall time and CPU time of a step, without the first step of each run. Also prints the median peak
memory of a process.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VOCAB, HIDDEN = 151_936, 256


def steps_recorder() -> Any:
    import transformers

    class StepTimes(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.cpu_times: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter() - self.start[0])
            self.cpu_times.append(time.process_time() - self.start[1])

    return StepTimes()


def run_trl(kind: str, model: Path, options: argparse.Namespace) -> tuple[Any, list[float]]:
    import tiny_models
    import trl

    from mpo_ext.integrations.trl import MPOTrainer, MPOTrainingConfig

    settings: dict[str, Any] = {
        "output_dir": str(model / "out"), "per_device_train_batch_size": options.pairs, "max_steps": options.steps,
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "max_length": None,
        "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-4,
    }  # fmt: skip
    times = steps_recorder()
    if kind == "own":
        args, trainer_type = trl.DPOConfig(**settings), trl.DPOTrainer
    else:
        args, trainer_type = MPOTrainingConfig(reward_shift="fixed", **settings), MPOTrainer
    trainer = trainer_type(
        str(model), args=args, train_dataset=tiny_models.pairs(length=options.length), callbacks=[times]
    )
    trainer.train()
    return times, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def run_llama_factory(kind: str, model: Path, options: argparse.Namespace) -> tuple[Any, list[float]]:
    import tiny_models
    from llama_factory_runs import run

    times = steps_recorder()
    settings = {"per_device_train_batch_size": options.pairs, "max_steps": options.steps, "learning_rate": 1e-4}
    out = Path(tempfile.mkdtemp(dir=model)) / "out"
    log = run(kind, model, out, tiny_models.pairs(length=options.length), callbacks=[times], **settings)
    return times, [line["loss"] for line in log]


def run_ms_swift(kind: str, model: Path, options: argparse.Namespace) -> tuple[Any, list[float]]:
    import ms_swift_runs
    import tiny_models
    from swift.callbacks import callbacks_map

    times = steps_recorder()
    callbacks_map["step_times"] = lambda args, trainer: times
    settings: tuple[Any, ...] = ("per_device_train_batch_size", options.pairs, "max_steps", options.steps)
    settings += ("learning_rate", 1e-4, "callbacks", "step_times")
    out = Path(tempfile.mkdtemp(dir=model)) / "out"
    pairs = tiny_models.pairs(length=options.length)
    log = ms_swift_runs.run(kind, model, out, pairs, *settings)
    return times, [line["loss"] for line in log]


RUNS = {"trl": run_trl, "llama-factory": run_llama_factory, "ms-swift": run_ms_swift}
PACKAGES = {"trl": "trl", "llama-factory": "llamafactory", "ms-swift": "ms-swift"}


def child(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    times, losses = RUNS[options.trainer](options.child, Path(options.model), options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print()  # the trainers end with an incomplete line
    print(json.dumps({"times": times.times, "cpu_times": times.cpu_times, "losses": losses, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trainer", choices=RUNS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=4, help="factor of the length of the responses")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a step")
    parser.add_argument("--save", action="store_true", help="put the figures into results/integrations.json")
    parser.add_argument("--child", choices=("own", "mpo"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    import tiny_models

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    results: dict[str, list[dict[str, Any]]] = {"own": [], "mpo": []}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.save_text_model(
            Path(folder), vocab=VOCAB, hidden=HIDDEN, tie_word_embeddings=True
        )  # fmt: skip
        for _ in range(options.rounds):
            for kind, runs in results.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, "--model", str(model)]
                process = subprocess.run(command, env=environment, capture_output=True, text=True)
                if process.returncode:
                    sys.exit(process.stderr)
                runs.append(json.loads(process.stdout.splitlines()[-1]))
    report(options, results)


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the medians over all runs. With ``--save``, also writes them into results/integrations.json."""
    package = PACKAGES[options.trainer]
    version = importlib.metadata.version(package)
    print(f"{package} {version}, {options.rounds} runs of {options.steps} steps each")
    medians: dict[str, dict[str, float]] = {}
    for kind, runs in results.items():
        seconds = [value for run in runs for value in run["times"][1:]]
        medians[kind] = {
            "seconds": statistics.median(seconds),
            "cpu_seconds": statistics.median(value for run in runs for value in run["cpu_times"][1:]),
            "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        }
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(
            f"{kind}: {medians[kind]['seconds']:.2f} s a step ({spread}), {medians[kind]['cpu_seconds']:.2f} s of CPU "
            f"time, peak {medians[kind]['peak_mib']:,.0f} MiB"
        )
    own, mpo = medians["own"], medians["mpo"]
    faster, less = (own[name] / mpo[name] for name in ("seconds", "cpu_seconds"))
    memory = mpo["peak_mib"] / own["peak_mib"]
    print(f"{faster:.1f} times faster, {less:.1f} times less CPU time, {memory:.2f} x memory")
    pairs = zip(results["own"][0]["losses"], results["mpo"][0]["losses"], strict=True)
    difference = max(abs(one - two) for one, two in pairs)
    print(f"last loss {results['own'][0]['losses'][-1]:.6f}; largest difference: {difference:.1e}")
    if options.save:
        import results as results_file

        words = " ".join(word for word in sys.argv[1:] if word != "--save")
        entry = {
            "command": f"python tests/integrations/side_by_side.py {words}", "version": version, "own": own,
            "mpo": mpo, "largest_loss_difference": difference, "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        results_file.save("runs", f"{package} {version}", entry)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "train")]
    main()
