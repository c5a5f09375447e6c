"""The optimizer of a run: parameter groups, learning-rate schedule and gradient clipping."""

import math
from typing import Any

import torch
from torch import nn

from mpo_ext.train.recipe import OptimRecipe


def make_optimizer(model: nn.Module, recipe: OptimRecipe, device: torch.device) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable parameters; only parameters with at least two axes have weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=device.type == "cuda" or None,
    )


def scheduled_learning_rate(recipe: OptimRecipe, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step, counted from 0. The warm-up starts at 0, as in transformers."""
    warmup_steps = math.ceil(total_steps * recipe.warmup_ratio)
    if step < warmup_steps:
        return recipe.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * (1 - progress if recipe.schedule == "linear" else 1)


def clip_gradients(accelerator: Any, model: nn.Module, max_grad_norm: float) -> float:
    """Clips the gradients unless ``max_grad_norm`` is 0; returns the gradient norm before clipping."""
    max_norm = max_grad_norm if max_grad_norm > 0 else math.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    if norm is None:  # DeepSpeed clips by itself
        return model.get_global_grad_norm() if hasattr(model, "get_global_grad_norm") else math.nan  # type: ignore[operator]
    return float(norm)
