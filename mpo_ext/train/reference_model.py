"""The reference model: a frozen copy, the policy without its adapters, or log-probs that were computed once."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpo_ext.files import atomic_write
from mpo_ext.journal import Journal, encode_line, read_header, read_records
from mpo_ext.loss.eager import sequence_sums
from mpo_ext.loss.functions import linear_token_logp, token_logp
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.train.batch import Batch
from mpo_ext.train.forward import forward, forward_logits
from mpo_ext.train.model import reshard
from mpo_ext.train.recipe import LossRecipe

NO_PAIR = ""  # digest of what a rank that has no more pairs computes beside the others


class Reference(Protocol):
    """What the loop asks of a reference."""

    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Summed log-probs of the 2B responses of a batch on the device: ``[2B]`` float64."""

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Moves the reference towards the policy: ``mix`` of it (TR-DPO, arXiv 2404.09656)."""


def label_logp(model: nn.Module, batch: Batch, recipe: LossRecipe) -> Tensor:
    """Log-probs of the labels of a batch: ``[N]`` float32, differentiable.

    Args:
        model: As in ``layout.forward``.
        batch: On the model's device.
        recipe: Says how logits are made.
    """
    if recipe.from_logits:
        logits = forward_logits(model, batch)
        return token_logp(logits, batch.labels.to(logits.device), backend=recipe.backend)
    out = forward(model, batch)
    return linear_token_logp(
        out.hidden, out.weight, batch.labels, memory_budget=budget(recipe), recompute=recipe.recompute,
        backend=recipe.backend, **out.options,
    )  # fmt: skip


def sequence_logp(model: nn.Module, batch: Batch, recipe: LossRecipe) -> Tensor:
    """Summed log-probs of the 2B responses of a batch, by the arithmetic of the policy's own: ``[2B]`` float64."""
    return sequence_sums(label_logp(model, batch, recipe).double(), batch.cu_seqlens)


def budget(recipe: LossRecipe) -> int | None:
    """``memory_budget`` in bytes."""
    return None if recipe.memory_budget_mib is None else recipe.memory_budget_mib << 20


class CopyReference:
    """A second model, which does not learn.

    Args:
        model: On its device, wrapped where it is sharded.
        recipe: Of the loss.
        autocast: Gives the context in which the policy's forward runs.
    """

    def __init__(
        self, model: nn.Module, recipe: LossRecipe, autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._recipe, self._autocast = recipe, autocast

    @torch.no_grad()
    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """As in ``Reference``."""
        with self._autocast():
            return sequence_logp(self.model, batch, self._recipe)

    @torch.no_grad()
    def sync(self, policy: nn.Module, mix: float) -> None:
        """As in ``Reference``. Parameters move, in float32 at least and rounded once; buffers stay, as in TRL.

        Each rank moves what it has: under DDP all of it, under FSDP2 its shards, which are those of the policy.
        """
        target, source = unwrap_model(self.model), unwrap_model(policy)
        for model in (target, source):
            reshard(model)
        theirs = dict(source.named_parameters())
        for name, parameter in target.named_parameters():
            if not parameter.is_floating_point():  # 4-bit weights: frozen, so equal to the policy's
                continue
            mine, other = _local(parameter), _local(theirs[name])
            wide = functools.reduce(torch.promote_types, (mine.dtype, other.dtype), torch.float32)
            mine.copy_(torch.lerp(mine.to(wide), other.to(wide), mix))


def check_can_follow(reference: nn.Module, policy: nn.Module, every: int) -> None:
    """Raises ``ValueError``, with a parameter that differs, unless both models have the same, of the same shapes.

    Args:
        reference: That is to move.
        policy: That it is to follow.
        every: ``reference.sync_every``, for the message.
    """
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in unwrap_model(model).named_parameters()}
        for model in (reference, policy)
    ]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        mine, other = (one.get(name, "none") for one in shapes)
        if mine != other:
            raise ValueError(
                "reference.sync_every must be 0 unless reference.path has the parameters of model.path, got "
                f"{every} with {name}: {mine} in the reference, {other} in the policy"
            )


class AdapterReference:
    """The policy with its LoRA adapters switched off: no second model.

    Args:
        recipe: Of the loss.
        autocast: As in ``CopyReference``.
    """

    def __init__(self, recipe: LossRecipe, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._recipe, self._autocast = recipe, autocast

    @torch.no_grad()
    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """As in ``Reference``."""
        with self._autocast(), _peft_of(policy).disable_adapter():
            return sequence_logp(policy, batch, self._recipe)

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Raises: there is no second model that could move."""
        raise ValueError("sync_every must be 0 for a reference of kind 'adapter'")


class PrecomputedReference:
    """Log-probs out of a file, found by what the model would be fed: ``Sample.digest``.

    Args:
        path: As ``precompute`` wrote it.
        settings: What they depend on besides the samples; those in the file must be equal.

    Raises:
        ValueError: If the file was made with other settings.
        OSError: If there is no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        check_settings(path, settings)
        self._logp = {NO_PAIR: [0.0, 0.0], **{record["key"]: record["logp"] for record in read_records(path)}}

    def __contains__(self, digest: str) -> bool:
        return digest in self._logp

    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """As in ``Reference``.

        Raises:
            ValueError: If a pair is not in the file.
        """
        for name, digest in zip(batch.names, batch.digests, strict=True):
            if digest not in self._logp:
                raise ValueError(
                    f"reference.file must hold the pair {name}, got none with its tokens and pixels in {self.path}: "
                    "the data or its preprocessing has changed; delete the file to compute it anew"
                )
        both = torch.tensor([self._logp[digest] for digest in batch.digests], dtype=torch.float64)
        return both.T.flatten().to(batch.index.device)

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Raises: what was computed once cannot move."""
        raise ValueError("sync_every must be 0 for a reference of kind 'precomputed'")


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises ``ValueError``, with what differs, unless the file was made with these settings."""
    old, new = read_header(path) or {}, json.loads(json.dumps(settings))
    differing = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if differing:
        lines = "".join(f"\n  {name} was {old.get(name)!r}, is {new.get(name)!r}" for name in differing)
        raise ValueError(
            f"reference.file must have been made for this run, but {path} is stale:{lines}\n"
            "delete it to compute it anew, or name another file"
        )


def precompute(
    path: Path,
    settings: Mapping[str, Any],
    batches: Iterable[Batch],
    logp: Callable[[Batch], Tensor],
    *,
    rank: int,
) -> Iterator[int]:
    """Computes a rank's share of the log-probs into a journal beside ``path``. A kill costs the batch at work.

    Args:
        path: Of the file that ``merge`` will write.
        settings: As in ``PrecomputedReference``.
        batches: This rank's. What any journal holds already is best left out of them (``known_digests``).
        logp: Gives ``[2B]`` for a batch.
        rank: Of this process.

    Yields:
        The number of pairs of each batch done.
    """
    with Journal(_part(path, rank), settings) as journal:
        for batch in batches:
            both = logp(batch).view(2, -1).T.tolist()
            found = {digest: pair for digest, pair in zip(batch.digests, both, strict=True) if digest != NO_PAIR}
            journal.append([{"key": digest, "logp": pair} for digest, pair in found.items()])
            yield len(both)


def known_digests(path: Path, settings: Mapping[str, Any]) -> set[str]:
    """Digests that journals of an interrupted run hold.

    Raises:
        ValueError: If they were begun with other settings.
    """
    known: set[str] = set()
    for part in _parts(path):
        if read_header(part) is not None:
            check_settings(part, settings)
            known.update(record["key"] for record in read_records(part))
    return known


def merge(path: Path, settings: Mapping[str, Any]) -> int:
    """Makes one file of all ranks' journals, which then go. One process calls it. Returns the number of pairs."""
    found = {record["key"]: record["logp"] for part in _parts(path) for record in read_records(part)}
    with atomic_write(path, is_locked=True) as file:
        file.write(encode_line({"format": "mpo_ext.journal/1", "settings": dict(settings)}))
        for digest in sorted(found):
            file.write(encode_line({"key": digest, "logp": found[digest]}))
    for part in _parts(path):
        part.unlink()
        part.with_name(f"{part.name}.lock").unlink(missing_ok=True)
    return len(found)


def data_fingerprint(keys: Iterable[str]) -> str:
    """Hash of the pairs that a file of log-probs is for, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(keys):
        digest.update(key.encode())
    return digest.hexdigest()


def loss_settings(recipe: LossRecipe) -> dict[str, Any]:
    """What of the loss the log-probs depend on."""
    return {"from_logits": recipe.from_logits}


def _parts(path: Path) -> list[Path]:
    return sorted(part for part in path.parent.glob(f"{path.name}.part-*") if part.suffix != ".lock")


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.part-{rank:05d}")


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of a parameter."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _peft_of(model: nn.Module) -> Any:
    """The peft model inside of whatever wraps it."""
    inner: Any = model
    while not hasattr(type(inner), "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return inner
