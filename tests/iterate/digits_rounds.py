"""A model, questions and a recipe for rounds of MPO on images of digits.

A round samples pairs, trains and evaluates.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ext.demo import digits, reading
from mpo_ext.demo.pairs import write_items
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.start import load_shipped, new_model, shipped_start


def write_model(folder: Path) -> Path:
    """Saves the demo's pretrained model to a folder. The processor's Python code is saved with it."""
    settings = Settings()
    model, processor = new_model(settings)
    info = shipped_start(settings)
    assert info is not None
    load_shipped(model, info)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_questions(folder: Path, name: str, count: int, *, seed: int) -> Path:
    """Writes a file of questions that ask for step-by-step responses. Returns its path.

    Each question has an image and the correct answer. Image paths are relative to ``folder``.
    """
    split = digits.load_digits()["train"]
    tasks = reading.sample_tasks(split, count, np.random.default_rng(seed), "cot")
    write_items(folder, name, tasks)
    return folder / f"{name}.jsonl"


def recipe(folder: Path, out: Path, **settings: Any) -> Path:
    """Writes a recipe for two rounds next to ``out``, and returns its path.

    A round samples pairs with the pipelines Correctness and DropoutNTP, trains, and evaluates.
    """
    short = {"max_new_tokens": 40, "matcher": "number"}
    values = {
        "model": str(folder / "model"),
        "output": str(out),
        "rounds": 2,
        "sample": {
            "questions": {"path": str(folder / "train.jsonl"), "image_root": str(folder)},
            "correctness": {"samples": 4, "temperature": 1.0, **short},
            "dropout_ntp": {"temperature": 1.0, "max_pairs": 8, **short},
        },
        "train": {
            "model": {"trust_remote_code": True},
            "optim": {"learning_rate": 1e-4, "batch_size": 8, "micro_batch_size": 8},
            "output": {"save_every": 1},
        },
        "evaluate": {"data": str(folder / "test.jsonl"), "image_root": str(folder), "prompts": ["none"], **short},
        **settings,
    }
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(json.dumps(values))
    return path
