"""Plans a training run without loading weights.

The model is built on the meta device, and the lines of the data are counted.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.plan.memory import ASSUMED_LENGTH, Memory, MemoryEstimate, meta_model
from mpo_ext.plan.report import Plan, Variant, format_bytes
from mpo_ext.plan.steps import ROW_NAMES
from mpo_ext.train.masks import no_mask, undo_split_attention, use_split_attention
from mpo_ext.train.mixture import Mixture, MixtureSubset
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.shared_prefix import supports_shared_prefix
from mpo_ext.train.split_attention import NAMES

_FEW_STEPS = 30  # the margin shows no trend in fewer steps


def plan(recipe: Recipe, *, world: int = 1) -> Plan:
    """Returns the predicted steps and memory of a training run with ``world`` processes. Reads no weights or images.

    Raises:
        OSError: If the model's config or a file of pairs cannot be read.
        ImportError: If transformers, or peft for LoRA, is missing.
        ValueError: If ``world`` is not positive, or the recipe does not fit the model or the data.
    """
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ValueError(f"world must be a positive int, got {world!r}")
    optim = recipe.optim
    mixture = Mixture(recipe.data.train, seed=optim.seed, name="data.train")
    eval_subsets: tuple[MixtureSubset, ...] = ()
    if recipe.data.eval:
        eval_subsets = Mixture(recipe.data.eval, seed=optim.seed, name="data.eval").subsets
    model = meta_model(recipe.model)
    parameters = list(model.parameters())
    steps_per_epoch = math.ceil(mixture.pairs / optim.batch_size)
    steps = optim.epochs * steps_per_epoch
    if optim.max_steps is not None:
        steps = min(steps, optim.max_steps)
    pairs_per_rank = math.ceil(min(optim.batch_size, mixture.pairs) / world)
    reason = _separate_reason(model, recipe)
    estimate = MemoryEstimate(recipe, model, "separate" if reason is not None else "shared", world)
    micro_batches = math.ceil(pairs_per_rank / estimate.micro_batch)
    memory, cost_model = tuple(estimate.parts()), estimate.cost_model()
    notes = [] if reason is None else [f"layout separate: {reason}"]
    notes += [*estimate.router_notes, *_notes(recipe, estimate.tokens, steps)]
    if pairs_per_rank * (world - 1) >= optim.batch_size:
        notes.append(f"optim.batch_size {optim.batch_size} leaves some of the {world} processes without a pair")
    notes += _sync_notes(recipe, memory)
    return Plan(
        recipe=recipe,
        model_class=type(unwrap_model(model)).__name__,
        parameters=cost_model.parameters,
        active=cost_model.parameters - round((1 - cost_model.expert_share) * cost_model.experts),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        vocab_size=estimate.vocab,
        hidden_size=estimate.hidden_size,
        layers=len(estimate.decoder),
        subsets=mixture.subsets,
        eval_subsets=eval_subsets,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=optim.warmup_steps(steps),
        world=world,
        pairs_per_rank=pairs_per_rank,
        micro_batches=micro_batches,
        layout=estimate.layout,
        tokens=estimate.tokens,
        positions=estimate.positions,
        memory=memory,
        other_activations=estimate.activations(checkpointed=not recipe.model.gradient_checkpointing),
        eager_loss=estimate.eager_loss(),
        cost_model=cost_model,
        cost_step=estimate.cost_step(micro_batches),
        variants=tuple(_variants(estimate)),
        notes=tuple(notes),
    )


def _separate_reason(model: nn.Module, recipe: Recipe) -> str | None:
    """Returns the reason why both responses of a pair cannot share a copy of the prompt; None if they can.

    May turn the split attention of ``model`` on or off.
    """
    if not recipe.loss.shared_prefix:
        return "loss.shared_prefix is false"
    attention = recipe.model.attention
    if attention in NAMES and recipe.loss.shared_prefix != "masked":
        reason = use_split_attention(model)  # the model on the meta device has sdpa
        if reason is not None and attention != "sdpa":
            return reason
    elif attention in ("sdpa", "eager"):
        undo_split_attention(model)
    else:
        return no_mask(attention)
    return supports_shared_prefix(model)


def _notes(recipe: Recipe, tokens: int, steps: int) -> Iterator[str]:
    max_length = recipe.data.max_length
    limit = "is not set" if max_length is None else f"is {max_length:,}"
    if tokens < (max_length or ASSUMED_LENGTH):
        yield f"data.max_length {limit}, and the model has {tokens:,} positions: pairs are assumed to fill them"
    elif max_length is None:
        yield f"data.max_length {limit}: pairs are assumed to have {tokens:,} tokens"
    if recipe.model.dtype == "bfloat16" and recipe.model.lora is None:
        yield (
            "model.dtype bfloat16 has 8 significant bits: most updates at a learning rate of "
            f"{recipe.optim.learning_rate:g} are rounded away; use float32 with precision bf16"
        )
    if steps < _FEW_STEPS and recipe.loss.has_preference:
        yield f"only {steps} steps: the margin needs about {_FEW_STEPS} to show a trend"


def _sync_notes(recipe: Recipe, memory: Sequence[Memory]) -> Iterator[str]:
    if not recipe.reference.sync_every:
        return
    size = next(part.bytes for part in memory if part.name == "reference")
    yield f"reference.sync_every: each checkpoint also contains the reference, {format_bytes(size)} more on disk"
    if recipe.output.keep_best:
        yield (
            "output.keep_best compares evaluations under different references: set output.eval_every so that each "
            "evaluation comes equally many steps after the reference moved"
        )


def _variants(estimate: MemoryEstimate) -> Iterator[Variant]:
    """Yields the planned run, then variants of this run with one changed setting each, then TRL's trainer."""
    recipe, loss, kind = estimate.recipe, estimate.recipe.loss, estimate.recipe.reference_kind
    yield _variant(estimate, "this recipe")
    if kind is not None:
        other = "precomputed"
        if kind == "precomputed":
            other = "adapter" if recipe.model.lora is not None and recipe.reference.path is None else "copy"
        reference = dataclasses.replace(recipe.reference, kind=other, file=None, sync_every=0)  # type: ignore[arg-type]
        changes = {"precomputed": other == "precomputed"}
        yield _variant(estimate, f"reference.kind={other}", changes, reference=reference)
    if not loss.from_logits:
        if estimate.head_weight.requires_grad:
            flipped = dataclasses.replace(loss, recompute=loss.recompute is False)  # None is True on a GPU
            yield _variant(estimate, f"loss.recompute={str(flipped.recompute).lower()}", loss=flipped)
        from_logits = dataclasses.replace(loss, from_logits=True, recompute=None, memory_budget_mib=None)
        yield _variant(estimate, "loss.from_logits=true", loss=from_logits)
    checkpointing = not recipe.model.gradient_checkpointing
    model = dataclasses.replace(recipe.model, gradient_checkpointing=checkpointing)
    name = f"model.gradient_checkpointing={str(checkpointing).lower()}"
    yield _variant(estimate, name, {"checkpointing": checkpointing}, model=model)
    yield Variant("TRL's DPOTrainer", "TRL", {"precomputed": False}, None)


def _variant(estimate: MemoryEstimate, name: str, changes: dict[str, Any] | None = None, **sections: Any) -> Variant:
    """Returns a variant of the planned run with changed settings.

    Args:
        estimate: The planned run.
        name: Name of the variant in tables.
        changes: Fields of ``Plan.cost_step`` to replace, as a dict from name to value.
        **sections: Sections of the recipe that replace those of the planned run.
    """
    recipe = dataclasses.replace(estimate.recipe, **sections)
    other = MemoryEstimate(recipe, estimate.model, estimate.layout, estimate.world_size)
    loss = ""
    if recipe.loss.from_logits:
        loss = ", from logits"
    elif recipe.loss.recompute is not None:
        loss = f", recompute={recipe.loss.recompute}"
    trainer = f"mpo_ext{ROW_NAMES[other.rows]}{loss}"
    return Variant(name, trainer, changes or {}, sum(part.bytes for part in other.parts()))
