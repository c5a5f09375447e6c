"""The section ``optim`` of a recipe: optimizer, batch size and learning-rate schedule."""

import dataclasses
import math
from typing import Any, Literal

from mpo_ext.checks import did_you_mean
from mpo_ext.train.settings import (
    MODEL_PARTS,
    Count,
    Fraction,
    NotNegative,
    Positive,
    PositiveCount,
    PositiveFraction,
    Section,
    Text,
    TwoFractions,
    section,
)

#: Optimizers that ``OptimRecipe.name`` knows besides import paths.
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon")
_OWN_ARGUMENTS = ("params", "lr", "weight_decay")


@section
class GroupRecipe:
    """Optimizer settings for one part of the model. A setting that is None takes its value from ``optim``."""

    learning_rate: NotNegative | None = None
    weight_decay: NotNegative | None = None


@section
class OptimRecipe:
    """Settings of the optimizer and of the learning rate schedule. The defaults are those of InternVL2.5-MPO.

    Attributes:
        name: Name of an optimizer in the following list, or the import path of a class, such as "torch.optim.SGD".
            "adamw": AdamW of torch.
            "adamw_8bit", "paged_adamw_8bit": AdamW of bitsandbytes.
            "adafactor": Adafactor of transformers, with ``learning_rate`` instead of relative step sizes.
            "muon": Muon for the matrices of hidden layers, AdamW for all other parameters.
            Import path: the class is called with parameter groups, ``lr`` and ``args``.
        args: Additional keyword arguments of the optimizer.
        learning_rate: Maximum learning rate, reached at the end of warmup.
        groups: Settings for parts of the model, such as ``{vision_tower: {learning_rate: 2e-6}}``. The parts are
            "vision_tower", "projector" and "language_model".
        batch_size: Number of pairs per optimizer step, summed over all ranks and micro-batches.
        micro_batch_size: Number of pairs per forward pass on each rank. With ``micro_batch_tokens``, this setting is
            not used and must keep its default, 1.
        micro_batch_tokens: Maximum number of token positions per forward pass on each rank, padding included. A longer
            pair goes through the model alone. None: ``micro_batch_size`` pairs per forward pass.
        epochs: Number of passes over the data.
        max_steps: Maximum number of steps; None: no limit. The learning-rate schedule ends at the last step.
        betas: ``betas`` of AdamW; used by "adamw", the 8-bit variants and "muon".
        eps: ``eps`` of AdamW; used by the same optimizers as ``betas``.
        weight_decay: Weight decay of matrices. Biases and norms have none.
        warmup_ratio: Fraction of the steps during which the learning rate rises linearly from 0. The last step is
            never a part of the warmup.
        schedule: Learning-rate schedule after warmup: "cosine", "linear", "constant" or "wsd" (warmup, stable, decay;
            arXiv 2404.06395). "wsd" is constant, and falls linearly in the last ``decay_ratio`` of the steps.
        min_lr_ratio: Learning rate at the end of "cosine", "linear" and "wsd", as a fraction of the maximum. A step
            after the last step would have this learning rate.
        decay_ratio: Fraction of the steps during which "wsd" decays.
        max_grad_norm: Norm to which larger gradients are clipped; 0 disables clipping.
        seed: Seed of the pair order and of all other random numbers.
    """

    name: Text = "adamw"
    args: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    learning_rate: NotNegative = 1e-6
    groups: dict[str, Section[GroupRecipe]] = dataclasses.field(default_factory=dict, hash=False)
    batch_size: PositiveCount = 256
    micro_batch_size: PositiveCount = 1
    micro_batch_tokens: PositiveCount | None = None
    epochs: PositiveCount = 1
    max_steps: PositiveCount | None = None
    betas: TwoFractions = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05
    warmup_ratio: Fraction = 0.03
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_lr_ratio: Fraction = 0.0
    decay_ratio: PositiveFraction = 0.1
    max_grad_norm: NotNegative = 1.0
    seed: Count = 0

    def __post_init__(self) -> None:
        if self.batch_size < self.micro_batch_size:
            raise ValueError(
                f"batch_size must be at least micro_batch_size {self.micro_batch_size}, got {self.batch_size}"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_size != 1:
            raise ValueError(
                f"micro_batch_tokens must be None with micro_batch_size {self.micro_batch_size}, got "
                f"{self.micro_batch_tokens}: one of them sets the size of a micro-batch"
            )
        if self.name not in OPTIMIZERS and "." not in self.name:
            raise ValueError(
                f"name must be one of {', '.join(OPTIMIZERS)}, or the import path of a class, got "
                f"{self.name!r}{did_you_mean(self.name, OPTIMIZERS)}"
            )
        for part in self.groups:
            if part not in MODEL_PARTS:
                raise ValueError(
                    f"groups must name parts among {', '.join(MODEL_PARTS)}, got {part!r}"
                    f"{did_you_mean(part, MODEL_PARTS)}"
                )
        own = [name for name in self.args if name in _OWN_ARGUMENTS or (self.takes_betas and name in ("betas", "eps"))]
        if own:
            raise ValueError(f"args must not hold a setting of optim, got {', '.join(own)}")
        if not self.takes_betas and (self.betas, self.eps) != ((0.9, 0.999), 1e-8):
            raise ValueError(
                f"betas and eps must be the defaults with {self.name}, which does not read them (its own go into "
                f"args), got {list(self.betas)} and {self.eps:g}"
            )
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError(f"min_lr_ratio must be 0 with schedule 'constant', got {self.min_lr_ratio}")
        if self.schedule != "wsd" and self.decay_ratio != 0.1:
            raise ValueError(f"decay_ratio must be 0.1 unless schedule is 'wsd', got {self.decay_ratio}")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                "warmup_ratio and decay_ratio must be at most 1 together with schedule 'wsd', got "
                f"{self.warmup_ratio} and {self.decay_ratio}"
            )

    def warmup_steps(self, total_steps: int) -> int:
        """Returns the number of steps during which the learning rate rises.

        At least one step follows the warmup, so that the run reaches the maximum learning rate.
        """
        return min(math.ceil(total_steps * self.warmup_ratio), total_steps - 1)

    @property
    def takes_betas(self) -> bool:
        """True if the optimizer gets ``betas`` and ``eps``."""
        return self.name in OPTIMIZERS and self.name != "adafactor"
