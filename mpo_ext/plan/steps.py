"""Predicts the time and the memory of a training step: layers, attention, loss, reference, gradient norm, AdamW.

The work of the decoder layers has three parts (stages): matrix products, attention, and passes over memory. Experts
add a fourth stage. Communication between devices and data loading are not included.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mpo_ext.checks import check_choice
from mpo_ext.plan.machines import Machine, Stage
from mpo_ext.plan.roofline import (
    LINEAR,
    SIZES,
    Cost,
    LossShape,
    Parts,
    cost_of,
    head_products,
    logits_ours,
    loss_gradients,
)

#: Number of passes over the scores of eager attention, forward and backward together.
_EAGER_PASSES = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes and dtypes of a model that determine the cost of a step.

    Attributes:
        parameters: Number of parameters.
        trainable: Number of parameters that are trained.
        decoder: Number of weights in the decoder's linear layers, without the output head and experts.
        experts: Number of weights in the experts of all mixture-of-experts layers.
        expert_share: Fraction of the experts' weights that process a token.
        expert_width: Smallest number of rows or columns of an expert's matrices.
        layers: Number of decoder layers.
        width: Hidden size of the decoder, D.
        vocab: Size of the vocabulary, V.
        heads: Number of attention heads of the decoder.
        kept: Bytes of activations per token position that the decoder's layers keep for backward.
        moved: Bytes that the decoder's layers read and write in a forward pass, divided by the number of token
            positions. Reads and writes of attention kernels are not counted.
        vision: Number of weights in the linear layers of the vision tower; 0 without a vision tower.
        vision_layers: Number of layers of the vision tower.
        vision_width: Hidden size of the vision tower.
        vision_kept: Bytes of activations per patch that the vision tower keeps for backward.
        vision_moved: Bytes per patch that the vision tower reads and writes in a forward pass.
        vision_learns: Whether the vision tower is trained.
        head_learns: Whether the head's weight is trained.
        dtype: Dtype of the parameters.
        compute: Dtype of the inputs of matmuls.
    """

    parameters: int
    trainable: int
    decoder: int
    layers: int
    width: int
    vocab: int
    heads: int = 1
    experts: int = 0
    expert_share: float = 1.0
    expert_width: int = 0
    kept: int = 0
    moved: int = 0
    vision: int = 0
    vision_layers: int = 0
    vision_width: int = 0
    vision_kept: int = 0
    vision_moved: int = 0
    vision_learns: bool = True
    head_learns: bool = True
    dtype: str = "float32"
    compute: str = "bfloat16"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Shape of an optimizer step on one device.

    Attributes:
        prompt: Number of tokens of a prompt, image tokens included.
        response: Number of tokens of a response; each token has a label.
        pairs: Number of pairs per micro-batch.
        micro_batches: Number of micro-batches per step.
        image_tokens: Number of image tokens of a prompt.
        patches: Number of vision tower patches per image token.
        image_size: Number of patches that attend to each other in the vision tower; None: all patches of a prompt.
        checkpointing: Whether gradient checkpointing is on.
        precomputed: Whether the reference log-probs are computed before training.
        has_reference: Whether the loss needs reference log-probs.
        shards: Number of devices over which parameters, gradients and optimizer state are sharded.
        has_eager_attention: Whether the decoder computes attention with plain torch operations instead of a kernel.
    """

    prompt: int
    response: int
    pairs: int = 1
    micro_batches: int = 1
    image_tokens: int = 0
    patches: int = 4
    image_size: int | None = None
    checkpointing: bool = False
    precomputed: bool = False
    has_reference: bool = True
    shards: int = 1
    has_eager_attention: bool = False


#: Rows of a pair: one row with split attention, one row with a dense mask, or a causal row for each response.
Rows = Literal["split", "masked", "separate"]


class StepMethod(NamedTuple):
    """Describes how a trainer computes the loss, and how it arranges responses in the rows of a batch."""

    method: str  # method of the loss, a key of roofline.LINEAR
    rows: Rows  # how the responses of a pair lie in sequence rows
    from_logits: bool = False  # whether the model computes all logits before the loss
    is_trl: bool = False  # whether the trainer is TRL's


#: The part of a trainer's name that tells its rows.
ROW_NAMES: dict[Rows, str] = {"split": "", "masked": ", dense mask", "separate": ", separate rows"}
#: The trainers by name; the settings of mpo_ext are separated by commas.
STEPS = {
    f"mpo_ext{of_rows}{of_loss}": StepMethod(f"mpo_ext{of_method}", rows, of_loss.endswith("logits"))
    for rows, of_rows in ROW_NAMES.items()
    for of_loss, of_method in {
        "": "",
        ", recompute=False": ", recompute=False",
        ", recompute=True": ", recompute=True",
        ", from logits": "",
    }.items()
} | {"TRL": StepMethod("trl ChunkedLogProb", "separate", is_trl=True)}


class _Positions(NamedTuple):
    """Numbers of rows, tokens and attention scores of a micro-batch."""

    rows: int  # number of rows
    row: int  # number of tokens of a row
    scores: float  # number of attention scores of one head, over all rows
    kind: str  # key of Machine.attention_rates

    @property
    def all(self) -> int:
        return self.rows * self.row


def _positions(step: StepShape, rows: Rows) -> _Positions:
    prompt, response = step.prompt, step.response
    sequence = prompt + response
    shared = prompt + 2 * response
    if rows == "separate":
        scores = sequence**2 if step.has_eager_attention else sequence**2 / 2
        return _Positions(2 * step.pairs, sequence, 2 * step.pairs * scores, "plain")
    if rows == "masked":
        return _Positions(step.pairs, shared, step.pairs * shared**2, "masked")
    scores = sequence**2 / 2 + response * (prompt + response / 2)
    if step.has_eager_attention:
        scores = sequence**2 + response * sequence
    return _Positions(step.pairs, shared, step.pairs * scores, "plain")


class _Layers:
    """Divides the work of the decoder and the vision tower on a micro-batch into stages."""

    def __init__(self, model: ModelShape, step: StepShape, rows: Rows) -> None:
        self.model, self.step = model, step
        self.positions = _positions(step, rows)
        self.patches = self.positions.rows * step.image_tokens * step.patches

    def stages(self, name: str, forwards: int, *, with_backward: bool, of_vision: bool) -> Iterator[Stage]:
        """Yields the stages of ``forwards`` forward passes and, if ``with_backward`` is True, of one backward pass.

        The name of each stage ends in ``name``. In matrix products and memory traffic, a backward pass counts as two
        forward passes. In attention kernels, it counts as 2.5 forward passes (five products instead of two).

        If ``of_vision`` is True, the backward pass includes the vision tower. Without a backward pass through the
        tower, the tower runs only one forward pass, for any ``forwards``.
        """
        model, positions = self.model, self.positions
        times = forwards + 2 * with_backward
        wide, compute = SIZES[model.compute], model.compute
        weights = wide * model.decoder
        yield Stage(
            name=f"decoder, products, {name}", flop=2.0 * times * model.decoder * positions.all, dtype=compute,
            shortest=min(positions.all, model.width), moved=times * weights,
        )  # fmt: skip
        if model.experts:  # a token passes some experts, and a micro-batch reads all of them
            share = model.expert_share
            yield Stage(
                name=f"experts, products, {name}", flop=2.0 * times * share * model.experts * positions.all,
                dtype=compute, shortest=min(share * positions.all, model.expert_width),
                moved=times * wide * model.experts,
            )  # fmt: skip
        yield self._attention(f"decoder, attention, {name}", forwards, with_backward=with_backward)
        yield Stage(
            name=f"decoder, passes, {name}", moved=times * model.moved * positions.all,
            fresh=times * model.kept * positions.all / 2,
        )  # fmt: skip
        if not model.vision:
            return
        learns = with_backward and of_vision
        forwards = forwards if learns else 1
        times = forwards + 2 * learns
        among = self.step.image_size or self.step.image_tokens * self.step.patches
        scores = 4.0 * model.vision_layers * model.vision_width * among * self.patches
        yield Stage(
            name=f"vision, {name}", flop=2.0 * times * model.vision * self.patches, dtype=compute,
            shortest=min(self.patches, model.vision_width), attention=(forwards + 2.5 * learns) * scores,
        )  # fmt: skip
        yield Stage(
            name=f"vision, passes, {name}", moved=times * (model.vision_moved * self.patches + wide * model.vision),
            fresh=times * model.vision_kept * self.patches / 2,
        )  # fmt: skip

    def _attention(self, name: str, forwards: int, *, with_backward: bool) -> Stage:
        model, positions = self.model, self.positions
        scores = 4.0 * model.layers * model.width * positions.scores
        if self.step.has_eager_attention:
            passes = _EAGER_PASSES / 2 * (forwards + with_backward)
            moved = passes * SIZES[model.compute] * model.layers * model.heads * positions.scores
            return Stage(name=name, flop=(forwards + 2 * with_backward) * scores, dtype=model.compute, moved=moved)
        flop = (forwards + 2.5 * with_backward) * scores
        return Stage(name=name, dtype=model.compute, attention=flop, attention_kind=positions.kind)

    def kept(self) -> float:
        """Returns the bytes of activations that the decoder and the vision tower keep for backward."""
        model, positions = self.model, self.positions
        wide = SIZES[model.compute]
        kept: float = model.kept * positions.all
        if self.step.has_eager_attention:
            kept += (4 + wide) * model.layers * model.heads * positions.scores
        elif positions.kind == "masked":  # each layer keeps the mask in the dtype of the scores
            kept += wide * model.layers * positions.scores
        if model.vision_learns:
            kept += model.vision_kept * self.patches
        if self.step.checkpointing:
            kept = kept / max(model.layers, 1) + wide * model.layers * model.width * positions.all
        return kept


def step_cost(trainer: str, model: ModelShape, step: StepShape, machine: Machine) -> Cost:
    """Returns the predicted cost of an optimizer step on a machine. ``trainer`` is a key of ``STEPS``."""
    check_choice("trainer", trainer, STEPS)
    settings = STEPS[trainer]
    layers = _Layers(model, step, settings.rows)
    positions = layers.positions
    is_shared = settings.rows != "separate"
    scored = LossShape(
        pairs=step.pairs,
        tokens=step.response if is_shared else positions.row,
        vocab=model.vocab,
        hidden=model.width,
        share=1.0 if is_shared else step.response / positions.row,
        dtype=model.compute,
    )
    if settings.from_logits:
        loss, loss_memory = _logits_of_all(scored, positions.all, machine)
    else:
        is_frozen = not model.head_learns and not settings.is_trl
        loss, loss_memory = LINEAR["mpo_ext, frozen head" if is_frozen else settings.method](scored, machine)
    learning = layers.stages("policy", 1 + step.checkpointing, with_backward=True, of_vision=model.vision_learns)
    stages = [*learning, *loss]
    if step.has_reference and not step.precomputed:
        stages += layers.stages("reference", 1, with_backward=False, of_vision=False)
        scores_all = settings.is_trl and not machine.is_gpu  # TRL's plain torch path does not skip ignored rows
        counted = scored.rows if scores_all else scored.labelled
        stages.append(head_products(scored, counted, 1, "head, reference", model.compute))
        if scores_all:
            logits = counted * model.vocab
            stages.append(Stage(name="loss, reference", moved=32 * logits, softmax=logits / 2, fresh=16 * logits))
    micro_batch = cost_of(stages, 0.0, machine)
    parts = {name: step.micro_batches * seconds for name, seconds in micro_batch.parts.items()}

    learnt = SIZES[model.dtype] * model.trainable / step.shards
    # AdamW reads parameters, gradients and two moments, and writes all except the gradients. Clipping reads the
    # gradients for their norm, and reads and writes them to scale them.
    optimizer = Stage(name="optimizer", moved=(7 + 3) * learnt, fresh=learnt)
    parts["optimizer"] = machine.seconds(optimizer)
    weights = SIZES[model.dtype] * model.parameters / step.shards
    reference_copy = weights if step.has_reference and not step.precomputed else 0.0
    memory = weights + 3 * learnt + reference_copy + layers.kept() + loss_memory
    return Cost(sum(parts.values()), memory, parts)


def _logits_of_all(loss: LossShape, positions: int, machine: Machine) -> Parts:
    """Returns ``(stages, memory)`` of ``mpo_loss`` for logits of all positions.

    The stages include the matmuls of the head. ``memory`` is the peak in bytes.
    """
    stages, _ = logits_ours(loss, machine)
    every, grads = loss.size * positions * loss.vocab, loss_gradients(loss)
    products = head_products(loss, positions, 3, "matrix products", loss.dtype)
    memory = 2 * every + 2 * loss.size * loss.labelled * loss.vocab + grads
    return [products, Stage(name="logits", moved=2 * every, fresh=2 * every + grads), *stages], memory
