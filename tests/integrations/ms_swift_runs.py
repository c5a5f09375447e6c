"""Runs ``swift rlhf --rlhf_type dpo`` on tiny models, with ms-swift's loss or with mpo_ext's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_data(path: Path, pairs: Any) -> None:
    """Writes pairs in ms-swift's format."""
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


@contextlib.contextmanager
def patched(kind: str, **options: Any) -> Iterator[None]:
    import mpo_ext

    if kind == "mpo":
        mpo_ext.patch("ms-swift", **options)
    elif options:  # ms-swift's own loss with a reward shift that stays 0
        assert options == {"reward_shift": {"mode": "fixed"}}
        from swift.rlhf_trainers.dpo_trainer import RunningMoments

        own_update, RunningMoments.update = RunningMoments.update, lambda self, values: (0.0, 1.0)
    try:
        yield
    finally:
        if kind == "mpo":
            mpo_ext.unpatch("ms-swift")
        elif options:
            RunningMoments.update = own_update


def run(
    kind: str, model: Path, out: Path, pairs: Any, *arguments: Any, shift: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Trains a model and returns the logged values of each step.

    ``kind`` selects the loss: "own" is the loss built into ms-swift, and "mpo" is mpo_ext's loss.
    ``shift`` has mpo_ext's settings of the reward shift.
    """
    from swift.pipelines import rlhf_main

    write_data(out.parent / "pairs.jsonl", pairs)
    with patched(kind, **({} if shift is None else {"reward_shift": shift})):
        rlhf_main(words(model, out, *arguments))
    lines = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def words(model: Path, out: Path, *arguments: Any) -> list[str]:
    """Returns the command-line arguments of a run. ``arguments`` are name, value, name, value, and so on."""
    values: dict[str, Any] = {
        "rlhf_type": "dpo", "model": model, "dataset": out.parent / "pairs.jsonl", "output_dir": out,
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "rpo_alpha": 0.0, "beta": 0.1,
        "tuner_type": "full", "torch_dtype": "float32", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_steps": 10, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "warmup_ratio": 0, "weight_decay": 0, "adam_beta2": 0.999, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "seed": 0, "use_cpu": "true", "gradient_checkpointing": "false",
        "bf16": "false", "split_dataset_ratio": 0, "dataloader_num_workers": 0, "dataset_num_proc": 1,
        "add_version": "false", "use_hf": "true", "check_model": "false", "eval_strategy": "no",
        "model_type": "qwen2", "template": "qwen2_5",
    }  # fmt: skip
    values |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    found = []
    for name, value in values.items():
        if value is not None:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found
