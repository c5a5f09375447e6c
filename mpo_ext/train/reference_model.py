"""The reference model: a frozen copy of the policy, or the policy without its adapters.

``reference_file.py`` has the third kind: log-probabilities that are computed once.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpo_ext.loss.eager import sequence_sums
from mpo_ext.loss.functions import linear_token_logp, token_logp
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.train.batch import Batch
from mpo_ext.train.forward import forward, forward_logits
from mpo_ext.train.model import reshard
from mpo_ext.train.recipe import LossRecipe


class Reference(Protocol):
    """Interface of the reference in the training loop."""

    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Returns the summed log-probs of the 2B responses of a batch on the device: ``[2B]`` float64."""

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Moves the reference towards the policy, by ``mix`` of the way (TR-DPO, arXiv 2404.09656)."""


def label_logp(model: nn.Module, batch: Batch, recipe: LossRecipe) -> Tensor:
    """Returns the log-probs of the labels of a batch: ``[N]`` float32, differentiable.

    Args:
        model: See ``forward.forward``.
        batch: Batch on the model's device.
        recipe: Says whether logits are materialized, and gives the memory budget and the backend.
    """
    if recipe.from_logits:
        logits = forward_logits(model, batch)
        return token_logp(logits, batch.labels.to(logits.device), backend=recipe.backend)
    out = forward(model, batch)
    return linear_token_logp(
        out.hidden, out.weight, batch.labels, memory_budget=memory_budget(recipe), recompute=recipe.recompute,
        backend=recipe.backend, **out.options,
    )  # fmt: skip


def sequence_logp(model: nn.Module, batch: Batch, recipe: LossRecipe) -> Tensor:
    """Returns the summed log-probs of the 2B responses, with the policy's arithmetic: ``[2B]`` float64."""
    return sequence_sums(label_logp(model, batch, recipe).double(), batch.cu_seqlens)


def memory_budget(recipe: LossRecipe) -> int | None:
    """Returns the ``memory_budget`` of the loss in bytes, or None for its default."""
    return None if recipe.memory_budget_mib is None else recipe.memory_budget_mib << 20


class CopyReference:
    """A second model that is not trained.

    Args:
        model: The model on its device, with the wrapper of its sharding.
        recipe: The ``loss`` section of the recipe.
        autocast: Returns the context in which the policy's forward runs.
    """

    def __init__(
        self, model: nn.Module, recipe: LossRecipe, autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._recipe, self._autocast = recipe, autocast

    @torch.no_grad()
    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """See ``Reference``."""
        with self._autocast():
            return sequence_logp(self.model, batch, self._recipe)

    @torch.no_grad()
    def sync(self, policy: nn.Module, mix: float) -> None:
        """See ``Reference``. Parameters move, in at least float32, and are rounded once; buffers stay, as in TRL.

        Each rank moves its part: under DDP the whole model, under FSDP2 its shards, which are those of the policy.
        """
        target, source = unwrap_model(self.model), unwrap_model(policy)
        for model in (target, source):
            reshard(model)
        policy_parameters = dict(source.named_parameters())
        for name, parameter in target.named_parameters():
            if not parameter.is_floating_point():  # 4-bit weights: frozen, so equal to the policy's
                continue
            moving, goal = _local_tensor(parameter), _local_tensor(policy_parameters[name])
            dtype = functools.reduce(torch.promote_types, (moving.dtype, goal.dtype), torch.float32)
            moving.copy_(torch.lerp(moving.to(dtype), goal.to(dtype), mix))


def check_can_follow(reference: nn.Module, policy: nn.Module, every: int) -> None:
    """Raises ``ValueError`` with the first parameter that differs, unless both models have the same shapes.

    Args:
        reference: The reference, which is to move.
        policy: The policy, which it is to follow.
        every: ``reference.sync_every``, for the message.
    """
    reference_shapes, policy_shapes = (
        {name: tuple(parameter.shape) for name, parameter in unwrap_model(model).named_parameters()}
        for model in (reference, policy)
    )
    for name in dict.fromkeys([*reference_shapes, *policy_shapes]):
        reference_shape, policy_shape = reference_shapes.get(name, "none"), policy_shapes.get(name, "none")
        if reference_shape != policy_shape:
            raise ValueError(
                "reference.sync_every must be 0 unless reference.path has the parameters of model.path, got "
                f"{every} with {name}: {reference_shape} in the reference, {policy_shape} in the policy"
            )


class AdapterReference:
    """The policy with its LoRA adapters switched off: no second model.

    Args:
        recipe: The ``loss`` section of the recipe.
        autocast: As in ``CopyReference``.
    """

    def __init__(self, recipe: LossRecipe, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._recipe, self._autocast = recipe, autocast

    @torch.no_grad()
    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """See ``Reference``."""
        with self._autocast(), _peft_model(policy).disable_adapter():
            return sequence_logp(policy, batch, self._recipe)

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Raises ``ValueError``: only a second model could move."""
        raise ValueError("sync_every must be 0 for a reference of kind 'adapter'")


def _local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a parameter."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _peft_model(model: nn.Module) -> Any:
    """Returns the peft model inside its wrappers."""
    inner: Any = model
    while not hasattr(type(inner), "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return inner
