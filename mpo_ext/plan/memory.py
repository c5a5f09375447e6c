"""What a run will do and need, told without weights: for ``mpo-ext train --dry-run`` and ``mpo-ext plan``.

All of memory is an estimate, docs/train.md explains the formulas; all of time is a prediction of ``mpo_ext.plan.roofline``.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpo_ext.checks import check_model_path, install_hint
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.plan import roofline as cost
from mpo_ext.train import model as models
from mpo_ext.train.batch import RowLayout
from mpo_ext.train.mixture import Mixture, Subset
from mpo_ext.train.recipe import ModelRecipe, Recipe
from mpo_ext.train.reference_model import check_can_follow
from mpo_ext.train.shared_prefix import supports_shared_prefix

#: Share of ``data.max_length`` that each response is taken to have; the rest is the prompt, full of images.
RESPONSE_SHARE = 0.25

_ASSUMED_LENGTH = 4096  # tokens of a pair, where the recipe sets no limit
_FEW_STEPS = 30  # below which the curves show no trend
_NF4_BYTES = 4.127 / 8  # of a weight, its share of the doubly quantized scales included
_EAGER_BYTES = {2: 18, 4: 16, 8: 32}  # per logit, that plain torch needs at the peak, by the size of a logit


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """One part of a rank's memory, estimated.

    Attributes:
        name: Of the part.
        bytes: With everything on each rank (one process, DDP).
        sharded: With parameters, gradients and optimizer sharded over the ranks (FSDP2, ZeRO-3).
        formula: Where the number comes from.
    """

    name: str
    bytes: int
    sharded: int
    formula: str


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """The run with a setting changed.

    Attributes:
        name: The setting, or "this recipe".
        trainer: Key of ``cost.STEPS``.
        changes: Of ``Plan.cost_step``.
        bytes: Estimated memory of a rank, nothing sharded; None where only ``mpo_ext.plan.roofline`` knows it.
    """

    name: str
    trainer: str
    changes: dict[str, Any]
    bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run before it begins. ``str`` of it is a page of text.

    Attributes:
        recipe: Of the run.
        model_class: Name of the model's class.
        parameters: Number of parameters, adapters included, tied ones counted once.
        trainable: Number of those that learn.
        vocab_size: Rows of the output head.
        hidden_size: Width of the output head.
        layers: Of the decoder.
        subsets: What is trained on; the ``pairs`` are those of an epoch.
        eval_subsets: What is evaluated on.
        steps_per_epoch: Optimizer steps, before pairs are left out.
        steps: In all.
        warmup_steps: Of these.
        world: Number of processes.
        pairs_per_rank: Most pairs of a rank's share of a step.
        micro_batches: Most micro-batches of a rank in a step.
        layout: Of the batches, as far as config and code of the model tell; the trainer tries it on the first pairs.
        tokens: Of the longest pair: prompt and longer response.
        positions: Of a micro-batch of longest pairs, that go through the decoder.
        memory: The parts of a rank's memory.
        other_activations: Activations with gradient checkpointing the other way, in bytes.
        eager_loss: What the same loss on logits of separate rows in plain torch needs, in bytes.
        cost_model: The model as ``mpo_ext.plan.roofline`` takes it.
        cost_step: A rank's step of longest pairs, likewise.
        variants: The run as the recipe has it, then otherwise.
        notes: What to know besides.
    """

    recipe: Recipe
    model_class: str
    parameters: int
    trainable: int
    vocab_size: int
    hidden_size: int
    layers: int
    subsets: tuple[Subset, ...]
    eval_subsets: tuple[Subset, ...]
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    world: int
    pairs_per_rank: int
    micro_batches: int
    layout: RowLayout
    tokens: int
    positions: int
    memory: tuple[Memory, ...]
    other_activations: int
    eager_loss: int
    cost_model: cost.Model
    cost_step: cost.Step
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]

    @property
    def pairs_per_epoch(self) -> int:
        """Number of pairs of an epoch."""
        return sum(subset.pairs for subset in self.subsets)

    @property
    def total_bytes(self) -> int:
        """Estimated memory of a rank, nothing sharded."""
        return sum(part.bytes for part in self.memory)

    @property
    def total_sharded(self) -> int:
        """Estimated memory of a rank, parameters, gradients and optimizer sharded."""
        return sum(part.sharded for part in self.memory)

    def predict(self, trainer: str, machine: cost.Machine, **changes: Any) -> cost.Cost:
        """Predicts a step of a rank on a machine; ``changes`` are those of ``cost_step``."""
        return cost.step_cost(trainer, self.cost_model, dataclasses.replace(self.cost_step, **changes), machine)

    def times(self, machine: cost.Machine) -> list[tuple[str, ...]]:
        """Rows of what a step is predicted to take: as the recipe has it first, then otherwise.

        The memory of "this recipe" is ``total_bytes``.
        """
        found = [self.predict(one.trainer, machine, **one.changes) for one in self.variants]
        first = found[0]
        rows: list[tuple[str, ...]] = []
        for variant, one in zip(self.variants, found, strict=True):
            memory = variant.bytes
            if memory is None:  # of another trainer: what the cost model says that it needs more or less
                memory = max(0, self.total_bytes + round(one.memory - first.memory))
            rows.append((variant.name, _seconds(one.seconds), f"{one.seconds / first.seconds:.2f}", _size(memory)))
        return rows

    def advice(self, machine: cost.Machine) -> Iterator[str]:
        """Yields which path to take when, as predicted for the machine."""
        if self.cost_model.head_learns:
            for other in self.variants:
                if other.name.startswith("loss.recompute") and other.bytes is not None:
                    yield (
                        "loss.recompute=false saves one of four products with the head and takes "
                        f"{_size(abs(other.bytes - self.total_bytes))} more: take it where that memory is free"
                    )
        else:
            yield "the head is frozen: the loss projects once, and loss.recompute changes nothing"
        yield "loss.from_logits=true is for models whose head is no plain linear layer; it is never faster"
        if self.cost_step.has_reference:
            trainer = self.variants[0].trainer
            whole = self.predict(trainer, machine, precomputed=False).seconds
            saved = whole - self.predict(trainer, machine, precomputed=True).seconds
            epochs = self.recipe.optim.epochs
            yield (
                f"reference.kind=precomputed saves {saved / whole:.0%} of a step and the reference's memory, for one "
                f"forward per pair before the first step: in time it pays from the second epoch on (here: {epochs})"
            )

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Yields title, header and rows of each table."""
        recipe, optim = self.recipe, self.recipe.optim
        other = "without" if recipe.model.gradient_checkpointing else "with"
        yield (
            "Model",
            ("", ""),
            [
                ("path", recipe.model.path),
                ("class", self.model_class),
                ("parameters", f"{self.parameters:,}"),
                ("trainable", f"{self.trainable:,} ({self.trainable / self.parameters:.2%})"),
                ("vocabulary x hidden size", f"{self.vocab_size:,} x {self.hidden_size:,}"),
                ("decoder layers", f"{self.layers:,}"),
                ("reference", _reference_text(recipe)),
            ],
        )
        yield "Data", ("subset", "lines", "repeat_time", "pairs"), list(_data_rows(self.subsets, self.eval_subsets))
        yield (
            "Schedule",
            ("", ""),
            [
                ("steps", f"{self.steps:,} ({self.steps_per_epoch:,} per epoch, before pairs are left out)"),
                ("warmup steps", f"{self.warmup_steps:,}"),
                ("learning rate", f"{optim.learning_rate:g}, then {optim.schedule}"),
                ("pairs per step", f"{optim.batch_size:,}"),
                ("processes", f"{self.world:,}"),
                ("pairs per step and rank", f"{self.pairs_per_rank:,} in {self.micro_batches:,} micro-batches"),
                ("layout", self.layout),
                ("longest pair", f"{self.tokens:,} tokens, {self.positions:,} positions per micro-batch"),
            ],
        )
        rows = [self._memory_row(part) for part in self.memory]
        rows.append(self._memory_row(Memory("total", self.total_bytes, self.total_sharded, "")))
        both = ("one copy per rank", "sharded") if self.world > 1 else ("estimate",)
        yield "Memory per rank (an estimate)", ("part", *both, "formula"), rows
        yield (
            "Memory it would take otherwise (an estimate)",
            ("", ""),
            [
                (f"activations {other} gradient checkpointing", _size(self.other_activations)),
                ("the loss in plain torch, on all logits", _size(self.eager_loss)),
            ],
        )

    def _memory_row(self, part: Memory) -> tuple[str, ...]:
        sharded = (_size(part.sharded),) if self.world > 1 else ()
        return (part.name, _size(part.bytes), *sharded, part.formula)

    def __str__(self) -> str:
        texts = []
        for title, header, rows in self.tables():
            lines = [header, *rows] if any(header) else rows
            widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
            numeric = [_is_numeric(rows, column) for column in range(len(header))]
            texts.append(title)
            for line in lines:
                cells = [
                    cell.rjust(width) if right else cell.ljust(width)
                    for cell, width, right in zip(line, widths, numeric, strict=True)
                ]
                texts.append(f"  {'  '.join(cells)}".rstrip())
            texts.append("")
        return "\n".join([*texts, *(f"note: {note}" for note in self.notes)]).rstrip()


def plan(recipe: Recipe, *, world: int = 1) -> Plan:
    """Plans a run: builds the model on the meta device and counts the lines of the data.

    No weights and no images are read.

    Args:
        recipe: Of the run.
        world: Number of processes.

    Returns:
        The plan.

    Raises:
        OSError: If the model's config or a file of pairs cannot be read.
        ImportError: If transformers, or peft for LoRA, is missing.
        ValueError: If the recipe does not fit the model or the data.
    """
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ValueError(f"world must be a positive int, got {world!r}")
    optim = recipe.optim
    mixture = Mixture(recipe.data.train, seed=optim.seed)
    eval_subsets: tuple[Subset, ...] = ()
    if recipe.data.eval:
        eval_subsets = Mixture(recipe.data.eval, seed=optim.seed).subsets
    model = _meta_model(recipe.model)
    head = unwrap_model(model).get_output_embeddings()  # type: ignore[operator]
    steps_per_epoch = math.ceil(mixture.pairs / optim.batch_size)
    steps = optim.epochs * steps_per_epoch
    if optim.max_steps is not None:
        steps = min(steps, optim.max_steps)
    pairs_per_rank = math.ceil(min(optim.batch_size, mixture.pairs) / world)

    notes = []
    reason = _separate_reason(model, recipe)
    if reason is not None:
        notes.append(f"layout separate: {reason}")
    asked, tokens = recipe.data.max_length, _longest(recipe, model)
    limit = "is not set" if asked is None else f"is {asked:,}"
    if tokens < (asked or _ASSUMED_LENGTH):
        notes.append(f"data.max_length {limit}, and the model has {tokens:,} positions: pairs are taken to fill them")
    elif asked is None:
        notes.append(f"data.max_length {limit}: pairs are taken to have {tokens:,} tokens")
    if recipe.model.dtype == "bfloat16" and recipe.model.lora is None:
        notes.append(
            "model.dtype bfloat16 has 8 significant bits: most updates at a learning rate of "
            f"{optim.learning_rate:g} are rounded away; use float32 with precision bf16"
        )
    if steps < _FEW_STEPS and recipe.loss.has_preference:
        notes.append(f"only {steps} steps: the margin needs about {_FEW_STEPS} to show a trend")
    if pairs_per_rank * (world - 1) >= optim.batch_size:
        notes.append(f"optim.batch_size {optim.batch_size} leaves some of the {world} processes without a pair")

    estimate = _Estimate(recipe, model, head, "separate" if reason is not None else "shared", world)
    memory = tuple(estimate.parts())
    if recipe.reference.sync_every:
        size = next(part.bytes for part in memory if part.name == "reference")
        notes.append(f"reference.sync_every: each checkpoint holds the reference, too, {_size(size)} more on the disk")
        if recipe.output.keep_best:
            notes.append(
                "output.keep_best compares evaluations under references that differ: let output.eval_every be so that "
                "all are equally long after a move"
            )
    parameters = list(model.parameters())
    return Plan(
        recipe=recipe,
        model_class=type(unwrap_model(model)).__name__,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        vocab_size=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        layers=len(estimate.decoder),
        subsets=mixture.subsets,
        eval_subsets=eval_subsets,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=math.ceil(steps * optim.warmup_ratio),
        world=world,
        pairs_per_rank=pairs_per_rank,
        micro_batches=math.ceil(pairs_per_rank / optim.micro_batch_size),
        layout=estimate.layout,
        tokens=estimate.tokens,
        positions=estimate.positions,
        memory=memory,
        other_activations=estimate.activations(checkpointed=not recipe.model.gradient_checkpointing),
        eager_loss=estimate.eager_loss(),
        cost_model=estimate.cost_model(),
        cost_step=estimate.cost_step(math.ceil(pairs_per_rank / optim.micro_batch_size)),
        variants=tuple(estimate.variants()),
        notes=tuple(notes),
    )


def _longest(recipe: Recipe, model: nn.Module) -> int:
    """Tokens of the longest pair: no more than the positions that the model has, where its config says so."""
    tokens = recipe.data.max_length or _ASSUMED_LENGTH
    return min(tokens, getattr(_text_config(model), "max_position_embeddings", None) or tokens)


def _reference_text(recipe: Recipe) -> str:
    """The reference in words."""
    moves = recipe.reference
    if moves.sync_every:
        return f"copy, moved by {moves.sync_mix:g} of the way to the policy every {moves.sync_every:,} steps (TR-DPO)"
    return recipe.reference_kind or "none: the loss needs none"


class _Estimate:
    """Memory of a rank. All sizes are in bytes.

    Args:
        recipe: Of the run.
        model: On the meta device, frozen and with adapters as it is trained.
        head: Its output head.
        layout: Of the batches.
        world: Number of processes.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, head: Any, layout: RowLayout, world: int) -> None:
        self.recipe, self.model, self.head, self.layout, self.world = recipe, model, head, layout, world
        self.head_weight = head.weight
        self.vocab, self.width = head.weight.shape
        self.weight_bytes: int = self.head_weight.element_size()
        self.bytes = self.weight_bytes if recipe.precision == "fp32" else 2  # of what layers compute
        self.decoder, self.vision = _layers(model)
        self.tokens = _longest(recipe, model)
        self.micro = recipe.optim.micro_batch_size
        sides = 2 if recipe.loss.has_preference else 1
        response = round(self.tokens * RESPONSE_SHARE)
        self.prompt = self.micro * (self.tokens - response)
        self.rows = self.micro * sides * response  # labelled
        self.separate = self.micro * sides * self.tokens
        self.positions = self.prompt + self.rows if layout == "shared" else self.separate

    def parts(self) -> Iterator[Memory]:
        """Yields the parts."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        learnt = sum(map(_bytes, trainable))
        weights = self._weights()
        yield self._over_ranks("parameters", weights, "number x size of model.dtype")
        yield self._over_ranks("gradients", learnt, "trainable x size of their dtype")
        yield self._over_ranks("AdamW state", 2 * learnt, "2 x gradients")
        if self.world > 1:
            yield Memory(
                "buckets or gathered layers", learnt, self._gathered(), "DDP: gradients; FSDP2: 2 layers, head"
            )
        if self.recipe.precision != "fp32":
            copies = 2 * sum(one.numel() for one in trainable if one.dtype == torch.float32 and one.ndim > 1)
            yield Memory("half-precision copies", copies, 0, "2 x trainable float32 matrices (autocast)")
        yield self._over_ranks(*self._reference(weights))
        size, formula = self._loss()
        yield Memory("loss", size, size, formula)
        checkpointed = self.recipe.model.gradient_checkpointing
        size = self.activations(checkpointed=checkpointed)
        formula = "inputs of layers + 1 whole layer" if checkpointed else "what linear layers and norms keep"
        yield Memory("activations", size, size, f"{formula}; {self.positions:,} positions")

    def activations(self, *, checkpointed: bool) -> int:
        """What backward needs of the layers' forward."""
        total = self._activations(self.decoder, self.positions, checkpointed=checkpointed)
        total += (4 + self.bytes) * self.width * self.positions  # the last norm
        if self.recipe.model.attention == "eager":
            row = self.positions // self.micro if self.layout == "shared" else self.tokens
            scores = getattr(_text_config(self.model), "num_attention_heads", 1) * row * self.positions
            total += (4 + self.bytes) * scores * (1 if checkpointed else len(self.decoder))
        if any(parameter.requires_grad for layer in self.vision for parameter in layer.parameters()):
            patches = self.prompt * _patches_per_token(unwrap_model(self.model).config)
            total += self._activations(self.vision, patches, checkpointed=checkpointed)
        return total

    def cost_model(self) -> cost.Model:
        """The model as ``mpo_ext.plan.roofline`` takes it."""
        parameters = list(self.model.parameters())
        compute = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.recipe.precision]
        dtype = str(self.head_weight.dtype).removeprefix("torch.")
        return cost.Model(
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            decoder=_linear_weights(self.decoder),
            layers=len(self.decoder),
            width=self.width,
            vocab=self.vocab,
            kept=sum(map(self._per_position, self.decoder)),
            vision=_linear_weights(self.vision),
            vision_layers=len(self.vision),
            vision_width=max(map(_width, self.vision), default=0),
            vision_kept=sum(map(self._per_position, self.vision)),
            vision_learns=any(one.requires_grad for layer in self.vision for one in layer.parameters()),
            head_learns=self.head_weight.requires_grad,
            dtype=dtype,
            compute=compute,
        )

    def cost_step(self, micro_batches: int) -> cost.Step:
        """A step of longest pairs, whose prompts are full of images where there is a vision tower."""
        response = round(self.tokens * RESPONSE_SHARE)
        kind = self.recipe.reference_kind
        return cost.Step(
            prompt=self.tokens - response,
            response=response,
            pairs=self.micro,
            micro_batches=micro_batches,
            image_tokens=self.tokens - response if self.vision else 0,
            patches=_patches_per_token(unwrap_model(self.model).config) if self.vision else 1,
            image_size=_patches_per_image(unwrap_model(self.model).config),
            checkpointing=self.recipe.model.gradient_checkpointing,
            precomputed=kind == "precomputed",
            has_reference=kind is not None,
        )

    def variants(self) -> Iterator[Variant]:
        """Yields the run as the recipe has it, then with one setting changed at a time, then by TRL."""
        loss, kind = self.recipe.loss, self.recipe.reference_kind
        trainer = self._trainer(self.recipe)
        yield Variant("this recipe", trainer, {}, self._total(self.recipe))
        if kind is not None:
            recipe, other = self.recipe.reference, "precomputed"
            if kind == "precomputed":
                other = "adapter" if self.recipe.model.lora is not None and recipe.path is None else "copy"
            changed = dataclasses.replace(recipe, kind=other, file=None, sync_every=0)  # type: ignore[arg-type]
            yield self._variant(f"reference.kind={other}", precomputed=other == "precomputed", reference=changed)
        if not loss.from_logits:
            if self.head_weight.requires_grad:
                flipped = dataclasses.replace(loss, recompute=not loss.recompute)
                yield self._variant(f"loss.recompute={str(flipped.recompute).lower()}", loss=flipped)
            logits = dataclasses.replace(loss, from_logits=True, recompute=True, memory_budget_mib=None)
            yield self._variant("loss.from_logits=true", loss=logits)
        checkpointing = not self.recipe.model.gradient_checkpointing
        model = dataclasses.replace(self.recipe.model, gradient_checkpointing=checkpointing)
        name = f"model.gradient_checkpointing={str(checkpointing).lower()}"
        yield self._variant(name, checkpointing=checkpointing, model=model)
        yield Variant("TRL's DPOTrainer", "TRL", {"precomputed": False}, None)

    def _variant(
        self, name: str, *, precomputed: bool | None = None, checkpointing: bool | None = None, **sections: Any
    ) -> Variant:
        recipe = dataclasses.replace(self.recipe, **sections)
        given = {"precomputed": precomputed, "checkpointing": checkpointing}
        changes = {key: value for key, value in given.items() if value is not None}
        return Variant(name, self._trainer(recipe), changes, self._total(recipe))

    def _total(self, recipe: Recipe) -> int:
        other = _Estimate(recipe, self.model, self.head, self.layout, self.world)
        return sum(part.bytes for part in other.parts())

    def _trainer(self, recipe: Recipe) -> str:
        """The key of ``cost.STEPS`` that is like a recipe."""
        name = "mpo_ext" if self.layout == "shared" else "mpo_ext, separate rows"
        if recipe.loss.from_logits:
            return f"{name}, from logits"
        return "mpo_ext, recompute=False" if not recipe.loss.recompute and self.layout == "shared" else name

    def eager_loss(self) -> int:
        """All logits of separate rows, with what log_softmax and its backward make of them."""
        return self.separate * self.vocab * _EAGER_BYTES[self.bytes]

    def _activations(self, layers: Sequence[nn.Module], positions: int, *, checkpointed: bool) -> int:
        whole = [positions * self._per_position(layer) for layer in layers]
        if checkpointed:
            return max(whole, default=0) + sum(positions * self.weight_bytes * _width(layer) for layer in layers)
        return sum(whole)

    def _per_position(self, layer: nn.Module) -> int:
        """Bytes that a layer keeps of each position."""
        total = 0
        modules = dict(layer.named_modules())
        for name, module in modules.items():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                kept = module.out_features + (module.in_features if module.weight.requires_grad else 0)
                total += self.bytes * kept
            elif type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor):
                projection = modules.get(f"{name.removesuffix('_norm')}_proj")  # q_norm has the width of one head
                width = getattr(projection, "out_features", weight.numel())
                total += (4 + self.bytes) * width
        return total

    def _weights(self) -> int:
        """Bytes of the parameters; with 4-bit weights bitsandbytes' own for all linear layers but the head."""
        lora = self.recipe.model.lora
        if lora is None or lora.quantization is None:
            return sum(map(_bytes, self.model.parameters()))
        quantized = {
            id(module.weight): module.weight.numel()
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not self.head and "lora_" not in name
        }
        others = sum(4 * one.numel() for one in self.model.parameters() if id(one) not in quantized)
        return round(_NF4_BYTES * sum(quantized.values())) + others

    def _reference(self, weights: int) -> tuple[str, int, str]:
        kind, path = self.recipe.reference_kind, self.recipe.reference.path
        if kind != "copy":
            why = {"adapter": "adapters off", "precomputed": "log-probs in a file", None: "the loss needs none"}[kind]
            return "reference", 0, why
        if path is None:
            return "reference", weights, "a copy: as parameters"
        check_model_path("reference.path", path)
        other = _meta_model(models.without_adapters(dataclasses.replace(self.recipe.model, path=path, revision=None)))
        if self.recipe.reference.sync_every:
            check_can_follow(other, self.model, self.recipe.reference.sync_every)
        return "reference", sum(map(_bytes, other.parameters())), "reference.path: number x size of model.dtype"

    def _loss(self) -> tuple[int, str]:
        loss = self.recipe.loss
        if loss.from_logits:
            size = 2 * self.bytes * self.vocab * (self.positions + self.rows)
            return size, "logits of all positions and of the labelled rows, with gradients"
        budget = cost.GPU_TILES if loss.memory_budget_mib is None else loss.memory_budget_mib << 20
        tiles = cost.tile_bytes(
            self.rows, self.vocab, budget=budget, is_half=self.bytes == 2,
            converted=0 if self.bytes == self.weight_bytes else self.bytes * self.vocab * self.width,
        )  # fmt: skip
        size = tiles + 2 * 4 * self.rows * self.width
        formula = "budget" if tiles == budget else "one tile"
        formula += f" + 2 x float32 hidden rows ({self.rows:,})"
        if self.head_weight.requires_grad:
            size += _bytes(self.head_weight)
            formula += " + head's gradient"
            if not loss.recompute:
                # They lie in the gradient's memory, in half of float32's width where the model is in bfloat16.
                width = 2 if self.bytes == 2 and self.head_weight.dtype == torch.bfloat16 else 4
                size += max(0, width * self.rows * self.vocab - _bytes(self.head_weight))
                formula += f" or {8 * width}-bit logits"
        return size, formula

    def _gathered(self) -> int:
        """What FSDP2 has whole at a time: the layer at work and the next, and what is outside of the layers."""
        sizes = [sum(one.numel() for one in layer.parameters()) for layer in (*self.decoder, *self.vision)]
        inside = {id(one) for layer in (*self.decoder, *self.vision) for one in layer.parameters()}
        outside = sum(one.numel() for one in self.model.parameters() if id(one) not in inside)
        return self.bytes * (2 * max(sizes, default=0) + outside)

    def _over_ranks(self, name: str, size: int, formula: str) -> Memory:
        return Memory(name, size, math.ceil(size / self.world), formula)


def _meta_model(recipe: ModelRecipe) -> nn.Module:
    """The model as the trainer prepares it, on the meta device."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(f"training needs transformers: {install_hint('train')}") from error

    check_model_path("model.path", recipe.path)
    config = AutoConfig.from_pretrained(recipe.path, revision=recipe.revision)
    loader, _ = models.loader_of(config)
    if recipe.dtype == "auto":
        named = getattr(config, "dtype", None)
        dtype = named if isinstance(named, torch.dtype) else torch.float32
    else:
        dtype = getattr(torch, recipe.dtype)
    # Flash attention is refused where there is no GPU, and its memory is that of sdpa.
    attention = recipe.attention if recipe.attention in ("sdpa", "eager") else "sdpa"
    with torch.device("meta"):
        model = loader.from_config(config, dtype=dtype, attn_implementation=attention)
        if recipe.lora is not None:
            recipe = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, quantization=None))
        return models.prepare_model(model, recipe)


def _separate_reason(model: nn.Module, recipe: Recipe) -> str | None:
    """Why the layout is not "shared"; None where it is."""
    if not recipe.loss.shared_prefix:
        return "loss.shared_prefix is false"
    if recipe.model.attention not in ("sdpa", "eager"):
        return f"attention {recipe.model.attention!r} takes no such mask; sdpa and eager do"
    return supports_shared_prefix(model)


def _layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers of the decoder and of the vision tower: what the outermost lists with linear layers hold."""
    inner = unwrap_model(model)
    vision_roots = tuple(f"{name}." for name, _ in models._modules_of(inner, "vision_tower"))
    found: dict[str, list[nn.Module]] = {}
    for name, module in inner.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if any(isinstance(part, nn.Linear) for part in module.modules()):
            found[name] = list(module)
    vision = [layer for name, layers in found.items() if name.startswith(vision_roots) for layer in layers]
    decoder = [layer for name, layers in found.items() if not name.startswith(vision_roots) for layer in layers]
    return decoder, vision


def _width(layer: nn.Module) -> int:
    """Width of what goes through a layer: that of its first norm, or of what its first linear layer takes."""
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor):
            return weight.numel()
    return next((module.in_features for module in layer.modules() if isinstance(module, nn.Linear)), 0)


def _linear_weights(layers: Sequence[nn.Module]) -> int:
    """Weights of the linear layers."""
    modules = (module for layer in layers for module in layer.modules())
    return sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))


def _patches_per_image(config: Any) -> int | None:
    """How many patches attend to each other in the vision tower; None where the config does not say."""
    vision = getattr(config, "vision_config", None)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if image is None or patch is None:
        return None
    height, width = image if isinstance(image, list | tuple) else (image, image)
    patch_height, patch_width = patch if isinstance(patch, list | tuple) else (patch, patch)
    return (height // patch_height) * (width // patch_width)


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms"


def _patches_per_token(config: Any) -> int:
    """How many patches of the vision tower become one token of the prompt."""
    vision = getattr(config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None)
    if merge is None and (ratio := getattr(config, "downsample_ratio", None)):
        merge = round(1 / ratio)
    return int(merge or 1) ** 2


def _text_config(model: nn.Module) -> Any:
    config: Any = unwrap_model(model).config
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _data_rows(subsets: Sequence[Subset], eval_subsets: Sequence[Subset]) -> Iterator[tuple[str, ...]]:
    for subset in subsets:
        yield subset.label, f"{subset.lines:,}", f"{subset.repeat_time:g}", f"{subset.pairs:,}"
    lines, pairs = sum(subset.lines for subset in subsets), sum(subset.pairs for subset in subsets)
    yield "train, an epoch", f"{lines:,}", "", f"{pairs:,}"
    for subset in eval_subsets:
        yield f"eval: {subset.label}", f"{subset.lines:,}", f"{subset.repeat_time:g}", f"{subset.pairs:,}"


def _is_numeric(rows: Sequence[tuple[str, ...]], column: int) -> bool:
    return column > 0 and all(not row[column] or row[column][0].isdigit() for row in rows) and len(rows[0]) > 2


def _size(size: int) -> str:
    gib = size / 2**30
    if gib < 0.1:
        return f"{size / 2**20:,.1f} MiB" if size else "0"
    return f"{gib:,.1f} GiB" if gib >= 10 else f"{gib:.2f} GiB"
