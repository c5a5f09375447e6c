"""Two kinds of reference model: "copy", a separate frozen model, and "adapter", the policy without its LoRA adapters.

``reference_file.py`` implements the third kind, "precomputed".
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
from mpo_ext.train.forward import HiddenRows, forward, forward_logits
from mpo_ext.train.model import reshard
from mpo_ext.train.recipe import LossRecipe

Inspect = Callable[[Tensor | HiddenRows], None]


class Reference(Protocol):
    """Interface of the sources of reference log-probs. Only ``CopyReference`` supports ``sync``."""

    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Returns the summed log-probs of the B chosen and then the B rejected responses: ``[2B]`` float64."""

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Sets the reference's parameters to ``(1 - mix) * reference + mix * policy`` (TR-DPO, arXiv 2404.09656)."""


def label_logp(model: nn.Module, batch: Batch, recipe: LossRecipe, inspect: Inspect | None = None) -> Tensor:
    """Returns the log-probs of the N labels of a batch: ``[N]`` on the model's device, differentiable.

    The log-probs are float32, or float64 for float64 models. With ``recipe.from_logits``, ``inspect`` is called with
    the logits. Otherwise, ``inspect`` is called with the ``HiddenRows``.
    """
    if recipe.from_logits:
        logits = forward_logits(model, batch)
        if inspect is not None:
            inspect(logits)
        return token_logp(logits, batch.labels.to(logits.device), shift=False, backend=recipe.backend)
    out = forward(model, batch)
    if inspect is not None:
        inspect(out)
    return linear_token_logp(
        out.hidden, out.weight, batch.labels, memory_budget=memory_budget(recipe), recompute=recipe.recompute,
        shift=False, backend=recipe.backend, **out.options,
    )  # fmt: skip


def sequence_logp(model: nn.Module, batch: Batch, recipe: LossRecipe) -> Tensor:
    """Returns the summed log-probs of the 2B responses of a batch, ``[2B]`` float64."""
    return sequence_sums(label_logp(model, batch, recipe).double(), batch.cu_seqlens)


def memory_budget(recipe: LossRecipe) -> int | None:
    """Returns ``loss.memory_budget_mib`` in bytes, or None for the default budget."""
    return None if recipe.memory_budget_mib is None else recipe.memory_budget_mib << 20


class CopyReference:
    """Computes reference log-probs with a separate frozen model, prepared by accelerate."""

    def __init__(
        self, model: nn.Module, recipe: LossRecipe, autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        model.eval()  # not chained: DeepSpeed's engine returns None
        self.model = model.requires_grad_(False)
        self._recipe, self._autocast = recipe, autocast

    @torch.no_grad()
    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        with self._autocast():
            return sequence_logp(self.model, batch, self._recipe)

    @torch.no_grad()
    def sync(self, policy: nn.Module, mix: float) -> None:
        """Sets the parameters to ``(1 - mix) * reference + mix * policy``. Buffers do not change, as in TRL.

        The computation is in float32, or in float64 for float64 models. Under DDP, each rank updates the whole model.
        Under FSDP2, each rank updates its shards.
        """
        target, source = unwrap_model(self.model), unwrap_model(policy)
        for model in (target, source):
            reshard(model)
        policy_parameters = dict(source.named_parameters())
        for name, parameter in target.named_parameters():
            if not parameter.is_floating_point():  # 4-bit weights are frozen, so both models have the same
                continue
            moving, goal = _local_tensor(parameter), _local_tensor(policy_parameters[name])
            dtype = functools.reduce(torch.promote_types, (moving.dtype, goal.dtype), torch.float32)
            moving.copy_(torch.lerp(moving.to(dtype), goal.to(dtype), mix))


def check_can_follow(reference: nn.Module, policy: nn.Module, every: int) -> None:
    """Raises ``ValueError`` if reference and policy differ in the names or shapes of their parameters.

    ``every`` is ``reference.sync_every``, for the message.
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
    """Computes reference log-probs with the policy while its LoRA adapters are disabled."""

    def __init__(self, recipe: LossRecipe, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._recipe, self._autocast = recipe, autocast

    @torch.no_grad()
    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        with self._autocast(), _peft_model(policy).disable_adapter():
            return sequence_logp(policy, batch, self._recipe)

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Raises ``ValueError``, because a reference without separate parameters cannot be updated."""
        raise ValueError("sync_every must be 0 for a reference of kind 'adapter'")


def _local_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _peft_model(model: nn.Module) -> Any:
    """Returns the peft model inside the wrappers of torch.compile and DDP."""
    inner: Any = model
    while not hasattr(type(inner), "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return inner
