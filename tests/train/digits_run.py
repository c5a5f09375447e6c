"""A tiny InternVL for images of digits, and a file of pairs. A training step takes milliseconds."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mpo_ext.demo import digits
from mpo_ext.demo.model import build_model, build_processor
from mpo_ext.train.recipe import Recipe, load_recipe


def write_pairs(folder: Path, count: int, *, seed: int = 0, text_only: int = 0, repeats: int = 1) -> Path:
    """Writes pairs about images of digit grids, with a wrong rejected response. Returns the file.

    Args:
        folder: Where to write.
        count: Number of tasks.
        seed: Seed of the tasks.
        text_only: Every ``text_only``-th task has no image; 0: each task has an image.
        repeats: Number of pairs for each task.
    """
    rng = np.random.default_rng(seed)
    tasks = digits.sample_tasks(digits.load_digits()["train"], count, rng)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, task in enumerate(tasks):
        assert task.image is not None
        image = folder / f"{seed}-{number}.png"
        Image.fromarray((task.image[0].numpy() * 255).astype(np.uint8)).save(image)
        for _ in range(repeats):
            wrong = " , ".join(str(rng.integers(10)) for _ in range(rng.integers(1, 6)))
            has_image = not text_only or number % text_only
            lines.append(
                {
                    "question": task.question,
                    "chosen": task.response,
                    "rejected": wrong,
                    "images": [image.name] if has_image else [],
                }
            )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Returns the tiny model with random weights, and its processor."""
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor.tokenizer, hidden_size=32, layers=2)
    return model.to(dtype), processor


def recipe(out: Path, pairs: Path, **overrides: Any) -> Recipe:
    """Returns a recipe for a few steps of 8 pairs; ``overrides`` are settings such as ``optim__batch_size=4``."""
    settings = {
        "optim.batch_size": 8,
        "optim.micro_batch_size": 4,
        "optim.learning_rate": 1e-3,
        "output.save_every": 0,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    path = out.with_name(f"{out.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    base = {"model": {"path": "unused"}, "data": {"train": [str(pairs)]}, "output": {"dir": str(out)}}
    path.write_text(json.dumps(base))
    return load_recipe(path, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Returns copies of the parameters, by name."""
    return {name: copy.deepcopy(parameter.detach()) for name, parameter in model.named_parameters()}
