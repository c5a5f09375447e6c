"""Runs LLaMA-Factory's DPO stage on tiny models, with LLaMA-Factory's loss or with mpo_ext's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DISABLE_VERSION_CHECK", "1")


def write_data(folder: Path, pairs: Any) -> None:
    """Writes pairs in ShareGPT format, and the file that registers the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, row in enumerate(pairs):
        images = []
        for place, image in enumerate(row.get("images", ())):
            path = folder / f"{number}-{place}.png"
            image.save(path)
            images.append(str(path))
        question = "<image>" * len(images) + row["prompt"][0]["content"]
        rows.append(
            {
                "conversations": [{"from": "human", "value": question}],
                "chosen": {"from": "gpt", "value": row["chosen"][0]["content"]},
                "rejected": {"from": "gpt", "value": row["rejected"][0]["content"]},
                **({"images": images} if images else {}),
            }
        )
    (folder / "pairs.json").write_text(json.dumps(rows))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    if rows and "images" in rows[0]:
        columns["images"] = "images"
    entry = {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": entry}))


@contextlib.contextmanager
def patched(kind: str, **options: Any) -> Iterator[None]:
    import mpo_ext

    if kind == "mpo":
        mpo_ext.patch("llama-factory", **options)
    elif options:  # their own loss with a reward shift that stays 0
        assert options == {"reward_shift": {"mode": "fixed"}}
        from trl.trainer import RunningMoments

        own_update, RunningMoments.update = RunningMoments.update, lambda self, values: (0.0, 1.0)
    try:
        yield
    finally:
        if kind == "mpo":
            mpo_ext.unpatch("llama-factory")
        elif options:
            RunningMoments.update = own_update


def run(
    kind: str,
    model: Path,
    out: Path,
    pairs: Any,
    *,
    callbacks: Any = None,
    shift: dict[str, Any] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Trains a model and returns the logged values of each step.

    ``kind`` selects the loss: "own" is the loss built into LLaMA-Factory, and "mpo" is mpo_ext's loss.
    ``shift`` has mpo_ext's settings of the reward shift.
    """
    from llamafactory.train.tuner import run_exp

    write_data(out.parent / "data", pairs)
    values: dict[str, Any] = {
        "stage": "dpo", "do_train": True, "model_name_or_path": str(model), "template": "qwen",
        "finetuning_type": "full", "dataset": "pairs", "dataset_dir": str(out.parent / "data"),
        "output_dir": str(out), "pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 1.0, "pref_bco_weight": 0.25,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 5, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0,
        "use_cpu": True, "cutoff_len": 2048, "weight_decay": 0.0, "disable_gradient_checkpointing": True,
        "overwrite_cache": True, "bf16": False, "fp16": False, "optim": "adamw_torch",
        "image_max_pixels": 784, "image_min_pixels": 784, "preprocessing_num_workers": 1,
    }  # fmt: skip
    with patched(kind, **({} if shift is None else {"reward_shift": shift})):
        run_exp({**values, **settings}, callbacks=callbacks)
    state = json.loads((out / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]
