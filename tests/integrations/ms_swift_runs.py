"""Runs ``swift rlhf --rlhf_type dpo`` on tiny models, with ms-swift's own loss or with that of mpo_ext."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_data(path: Path, pairs: Any) -> None:
    """Writes pairs in ms-swift's form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(pairs):
        images = []
        for place, image in enumerate(row.get("images", ())):
            images.append(str(path.with_name(f"{number}-{place}.png")))
            image.save(images[-1])
        question = "<image>" * len(images) + row["prompt"][0]["content"]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["chosen"][0]["content"]},
        ]
        line = {"messages": messages, "rejected_response": row["rejected"][0]["content"]}
        lines.append(json.dumps(line | ({"images": images} if images else {})))
    path.write_text("\n".join(lines) + "\n")


#: ms-swift's own loss with a reward shift that stays 0.
NO_SHIFT = """
from swift.rlhf_trainers.dpo_trainer import RunningMoments
RunningMoments.update = lambda self, values: (0.0, 1.0)
"""
#: ms-swift allows padding-free batches for flash attention only, which needs a GPU. sdpa separates the sequences, too.
PADDING_FREE_WITH_SDPA = """
from swift.arguments import RLHFArguments
RLHFArguments._check_padding_free = lambda self: None
"""
#: Writes the batches of the patched trainer to a file.
RECORD = """
import json
from mpo_ext.integrations import ms_swift
def recorded(trainer, mpo, model, batch, train_eval, own=ms_swift._loss):
    with open("BATCHES", "a") as file:
        file.write(json.dumps([batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")]) + "\\n")
    return own(trainer, mpo, model, batch, train_eval)
ms_swift._loss = recorded
"""


def run(
    kind: str,
    model: Path,
    out: Path,
    pairs: Any,
    *arguments: Any,
    shift: dict[str, Any] | None = None,
    plugin: str = "",
) -> list[dict[str, Any]]:
    """Trains in a process, and returns the log's lines of the steps.

    ``kind`` is "own" or "mpo"; ``plugin`` is code that ms-swift runs first.
    """
    process, result = start(kind, model, out, pairs, *arguments, shift=shift, plugin=plugin)
    if process.wait():
        raise RuntimeError(out.with_suffix(".text").read_text()[-3000:])
    return lines_of(result)


def lines_of(out: Path) -> list[dict[str, Any]]:
    state = json.loads(max(out.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime).read_text())
    return [line for line in state["log_history"] if "loss" in line]


def start(kind: str, model: Path, out: Path, pairs: Any, *arguments: Any, **options: Any) -> tuple[Any, Path]:
    """Starts a run, whose output goes to a file beside ``out``."""
    command = [sys.executable, "-m", "swift.cli.rlhf", *words(kind, model, out, pairs, *arguments, **options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with out.with_suffix(".text").open("wb") as text:
        return subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, env=environment), out


def words(
    kind: str,
    model: Path,
    out: Path,
    pairs: Any,
    *arguments: Any,
    shift: dict[str, Any] | None = None,
    plugin: str = "",
) -> list[str]:
    """Writes the data and the plugin of a run, and returns the words of its command line."""
    write_data(out.parent / "pairs.jsonl", pairs)
    if kind == "mpo":
        options = "" if shift is None else f", reward_shift={shift!r}"
        plugin = f'__import__("mpo_ext").patch("ms-swift"{options})\n{plugin}'
    plugins: Sequence[str] = ()
    if plugin:
        path = out.with_name(f"{out.name}_plugin.py")
        path.write_text(plugin)
        plugins = ["--external_plugins", str(path)]
    values: dict[str, Any] = {
        "rlhf_type": "dpo", "model": model, "dataset": out.parent / "pairs.jsonl", "output_dir": out,
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "rpo_alpha": 0.0, "beta": 0.1,
        "tuner_type": "full", "torch_dtype": "float32", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_steps": 10, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "warmup_ratio": 0, "weight_decay": 0, "adam_beta2": 0.999, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 10, "report_to": "none", "seed": 0, "use_cpu": "true", "gradient_checkpointing": "false",
        "bf16": "false", "split_dataset_ratio": 0, "dataloader_num_workers": 0, "dataset_num_proc": 1,
        "add_version": "false", "use_hf": "true", "eval_strategy": "no", "model_type": "qwen2", "template": "qwen2_5",
    }  # fmt: skip
    values |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    found = [*plugins]
    for name, value in values.items():
        if value is not None:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found
