"""Estimates the memory of a training run per rank, from a model on the meta device.

docs/train.md has the formulas.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpo_ext.checks import check_model_path, install_hint
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.plan import roofline, steps
from mpo_ext.plan.matrices import Matrix, matrices
from mpo_ext.processors import check_on_hub, load_config
from mpo_ext.train import model as models
from mpo_ext.train.batch import RowLayout
from mpo_ext.train.masks import decoder_config
from mpo_ext.train.optimizer import hidden_matrices
from mpo_ext.train.recipe import ModelRecipe, Recipe
from mpo_ext.train.reference_model import check_can_follow
from mpo_ext.train.router_loss import make_router_loss
from mpo_ext.train.split_attention import is_split

#: Assumed length of each response as a fraction of the longest pair; the rest is a prompt full of image tokens.
RESPONSE_SHARE = 0.25
ASSUMED_LENGTH = 4096  #: Assumed number of tokens of the longest pair if the recipe sets no limit.

_LEAST_8BIT = 4096  # smaller parameters have a state of float32 in bitsandbytes
_NF4_BYTES = 4.127 / 8  # per weight, with its part of the doubly quantized scales
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # settings of configs
_EAGER_BYTES = {2: 18, 4: 16, 8: 32}  # peak bytes per logit in plain torch, by the bytes of a logit


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """The estimated bytes of a part of a rank's memory, such as the parameters.

    Attributes:
        bytes: Number of bytes if each rank holds everything (one process, DDP).
        sharded: Number of bytes if the ranks shard parameters, gradients and optimizer state (FSDP2, ZeRO-3).
    """

    name: str
    bytes: int
    sharded: int
    formula: str


class MemoryEstimate:
    """Estimates the peak memory of a rank in a training step. All sizes are in bytes.

    ``model`` is the prepared policy, with frozen parts and adapters; it may be on the meta device.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, layout: RowLayout, world_size: int) -> None:
        self.recipe, self.model, self.layout, self.world_size = recipe, model, layout, world_size
        self.head: Any = unwrap_model(model).get_output_embeddings()  # type: ignore[operator]
        self.head_weight = self.head.weight
        self.vocab, self.hidden_size = self.head_weight.shape
        self.weight_bytes: int = self.head_weight.element_size()
        self.compute_bytes = self.weight_bytes if recipe.precision == "fp32" else 2
        self.decoder, self.vision = _layers(model)
        self.router_notes: list[str] = []
        self.router_loss = make_router_loss(model, recipe.loss.router_aux_loss_coef, self.router_notes.append)
        self.rows: steps.Rows = "separate" if layout == "separate" else "masked"
        if layout != "separate" and recipe.loss.shared_prefix != "masked" and has_split_attention(model):
            self.rows = "split"
        self.tokens = longest_pair(recipe, model)
        sides = 2 if recipe.loss.has_preference else 1
        self.response = round(self.tokens * RESPONSE_SHARE)
        prompt, labelled, separate = self.tokens - self.response, sides * self.response, sides * self.tokens
        positions = prompt + labelled if layout == "shared" else separate
        limit, pairs = recipe.optim.micro_batch_tokens, float(recipe.optim.micro_batch_size)
        if limit is not None:  # shorter pairs fill a micro-batch up to the limit
            pairs = max(1.0, limit / positions)
        pairs = min(pairs, math.ceil(recipe.optim.batch_size / world_size))  # a rank's part of a step
        self.micro_batch = int(pairs)
        self.prompt_positions, self.labelled = round(pairs * prompt), round(pairs * labelled)
        self.separate_positions, self.positions = round(pairs * separate), round(pairs * positions)
        self.row = positions

    def parts(self) -> Iterator[Memory]:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = sum(map(_bytes, trainable))
        weights = self._weights()
        yield self._over_ranks("parameters", weights, "number x size of model.dtype")
        yield self._over_ranks("gradients", gradients, "trainable x size of their dtype")
        yield self._over_ranks("optimizer state", *self._optimizer_state(trainable))
        if self.world_size > 1:
            yield Memory(
                "buckets or gathered layers", gradients, self._gathered(), "DDP: gradients; FSDP2: 2 layers, head"
            )
        if self.recipe.precision != "fp32":
            matrices = (each for each in trainable if each.dtype == torch.float32 and each.ndim > 1)
            copies = 2 * sum(matrix.numel() for matrix in matrices)
            yield Memory("half-precision copies", copies, 0, "2 x trainable float32 matrices (autocast)")
        yield self._over_ranks(*self._reference(weights))
        size, formula = self._loss()
        yield Memory("loss", size, size, formula)
        checkpointed = self.recipe.model.gradient_checkpointing
        size = self.activations(checkpointed=checkpointed)
        formula = "inputs of layers + 1 whole layer" if checkpointed else "tensors that linear layers and norms keep"
        yield Memory("activations", size, size, f"{formula}; {self.positions:,} positions")

    def _optimizer_state(self, trainable: Sequence[nn.Parameter]) -> tuple[int, str]:
        """Returns the bytes of the optimizer's state, and a description of the formula."""
        name = self.recipe.optim.name
        if name == "muon":
            once = sum(_bytes(matrix) for matrix in hidden_matrices(self.model) if matrix.requires_grad)
            return 2 * sum(map(_bytes, trainable)) - once, "muon: 1 x gradients of hidden matrices, 2 x others"
        if name == "adafactor":
            sizes = (sum(p.shape[-2:]) * math.prod(p.shape[:-2]) if p.ndim > 1 else p.numel() for p in trainable)
            return 4 * sum(sizes), "adafactor: 4 bytes per row and column"
        if name in ("adamw_8bit", "paged_adamw_8bit"):
            wide = {id(m.weight) for m in unwrap_model(self.model).modules() if isinstance(m, nn.Embedding)}
            narrow = sum(p.numel() for p in trainable if id(p) not in wide and p.numel() >= _LEAST_8BIT)
            others = sum(p.numel() for p in trainable) - narrow
            return round(narrow * (2 + 8 / 256)) + 8 * others, f"{name}: 2.03 bytes per weight, 8 in embeddings"
        return 2 * sum(map(_bytes, trainable)), "2 x gradients" if name == "adamw" else "as AdamW: 2 x gradients"

    def activations(self, *, checkpointed: bool) -> int:
        """Returns the bytes of the activations that a micro-batch keeps for backward."""
        total = self._activations(self.decoder, self.positions, checkpointed=checkpointed)
        total += (4 + self.compute_bytes) * self.hidden_size * self.positions  # the final norm
        if self.recipe.model.attention == "eager":
            is_dense = self.layout == "shared" and self.recipe.loss.shared_prefix == "masked"
            row = self.row if is_dense else self.tokens
            scores = getattr(_text_config(self.model), "num_attention_heads", 1) * row * self.positions
            total += (4 + self.compute_bytes) * scores * (1 if checkpointed else len(self.decoder))
        elif self.rows == "masked":  # SDPA keeps the mask in the dtype of the scores for each layer
            row = self.positions // self.micro_batch
            total += self.compute_bytes * row * self.positions * (1 if checkpointed else len(self.decoder))
        if self.router_loss is not None:  # the auxiliary loss keeps all router logits
            config = _text_config(self.model)
            experts = next((n for name in _EXPERT_COUNTS if (n := getattr(config, name, None))), 0)
            total += self.compute_bytes * experts * len(self.router_loss.routers) * self.positions
        if any(parameter.requires_grad for layer in self.vision for parameter in layer.parameters()):
            patches = self.prompt_positions * _patches_per_token(unwrap_model(self.model).config)
            total += self._activations(self.vision, patches, checkpointed=checkpointed)
        return total

    def cost_model(self) -> steps.ModelShape:
        """Returns the sizes and dtypes of the model for ``mpo_ext.plan.steps``."""
        parameters = list(self.model.parameters())
        experts = [matrix for matrix in self.matrices(self.decoder) if matrix.is_expert]
        weights = sum(matrix.weights for matrix in experts)
        compute = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.recipe.precision]
        return steps.ModelShape(
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            decoder=sum(matrix.weights for matrix in self.matrices(self.decoder) if not matrix.is_expert),
            experts=weights,
            expert_share=sum(matrix.weights * matrix.active / matrix.number for matrix in experts) / max(weights, 1),
            expert_width=min((min(matrix.inputs, matrix.outputs) for matrix in experts), default=0),
            layers=len(self.decoder),
            width=self.hidden_size,
            vocab=self.vocab,
            heads=getattr(_text_config(self.model), "num_attention_heads", 1),
            kept=sum(map(self.bytes_per_position, self.decoder)),
            moved=sum(map(self.bytes_moved_per_position, self.decoder)),
            vision=sum(matrix.weights for matrix in self.matrices(self.vision)),
            vision_layers=len(self.vision),
            vision_width=max(map(_width, self.vision), default=0),
            vision_kept=sum(map(self.bytes_per_position, self.vision)),
            vision_moved=sum(self.bytes_moved_per_position(layer, has_rotary=False) for layer in self.vision),
            vision_learns=any(parameter.requires_grad for layer in self.vision for parameter in layer.parameters()),
            head_learns=self.head_weight.requires_grad,
            dtype=str(self.head_weight.dtype).removeprefix("torch."),
            compute=compute,
        )

    def cost_step(self, micro_batches: int) -> steps.StepShape:
        """Returns the shape of a training step in which all pairs have the maximum length.

        For a model with a vision tower, all prompt tokens are assumed to be image tokens.
        """
        kind = self.recipe.reference_kind
        config = unwrap_model(self.model).config
        return steps.StepShape(
            prompt=self.tokens - self.response,
            response=self.response,
            pairs=self.micro_batch,
            micro_batches=micro_batches,
            image_tokens=self.tokens - self.response if self.vision else 0,
            patches=_patches_per_token(config) if self.vision else 1,
            image_size=_patches_per_image(config),
            checkpointing=self.recipe.model.gradient_checkpointing,
            precomputed=kind == "precomputed",
            has_reference=kind is not None,
            has_eager_attention=self.recipe.model.attention == "eager",
        )

    def eager_loss(self) -> int:
        """Returns the peak bytes of a plain torch loss on the logits of all positions.

        Each response is assumed to be in a separate row.
        """
        return self.separate_positions * self.vocab * _EAGER_BYTES[self.compute_bytes]

    def matrices(self, layers: Sequence[nn.Module]) -> list[Matrix]:
        """Returns the weight matrices of the layers."""
        per_token = getattr(_text_config(self.model), "num_experts_per_tok", None)
        return [matrix for layer in layers for matrix in matrices(layer, per_token)]

    def bytes_per_position(self, layer: nn.Module) -> int:
        """Returns the bytes of activations that a layer keeps for backward, per token position."""
        total = 0
        for matrix in self.matrices([layer]):
            kept = matrix.outputs + (matrix.inputs if matrix.learns else 0)
            total += round(self.compute_bytes * matrix.active * kept)
        return total + (4 + self.compute_bytes) * sum(width for _, width in _norms(layer))

    def bytes_moved_per_position(self, layer: nn.Module, *, has_rotary: bool = True) -> int:
        """Returns how many bytes a layer reads and writes in a forward pass, divided by the number of token positions.

        Reads and writes of attention kernels are not counted. The counts are those of transformers' models without
        torch.compile. In this list, a pass reads or writes each element once:

        - A linear layer: 1 pass over its inputs, and 1 pass over its outputs.
        - An RMS norm: 7 passes over its elements. A layer norm: 2 passes.
        - Rotary embedding: 10 passes over queries and keys.
        - Activation and gate of the MLP: 5 passes over its inner features.
        - Both residual additions together: 6 passes over the hidden states.
        """
        total = 0
        for matrix in self.matrices([layer]):
            passes = matrix.inputs + matrix.outputs
            if has_rotary and matrix.name.endswith(("q_proj", "k_proj")):
                passes += 10 * matrix.outputs
            if matrix.name.endswith(("down_proj", "fc2")):
                passes += 5 * matrix.inputs
            total += round(matrix.active * passes)
        for module, width in _norms(layer):
            total += (2 if isinstance(module, nn.LayerNorm) else 7) * width
        return self.compute_bytes * (total + 6 * _width(layer))

    def _activations(self, layers: Sequence[nn.Module], positions: int, *, checkpointed: bool) -> int:
        whole = [positions * self.bytes_per_position(layer) for layer in layers]
        if checkpointed:
            return max(whole, default=0) + sum(positions * self.weight_bytes * _width(layer) for layer in layers)
        return sum(whole)

    def _weights(self) -> int:
        """Returns the bytes of the parameters. With QLoRA, the language model's linear layers are quantized."""
        lora = self.recipe.model.lora
        if lora is None or lora.quantization is None:
            return sum(map(_bytes, self.model.parameters()))
        inner = unwrap_model(self.model)
        layers = [inner.get_submodule(name) for name in models.language_linears(self.model)]
        quantized = {id(layer.weight): layer.weight.numel() for layer in layers}  # type: ignore[union-attr,operator]
        others = sum(_bytes(parameter) for parameter in self.model.parameters() if id(parameter) not in quantized)
        return round(_NF4_BYTES * sum(quantized.values())) + others

    def _reference(self, weights: int) -> tuple[str, int, str]:
        kind, path = self.recipe.reference_kind, self.recipe.reference.path
        if kind != "copy":
            why = {"adapter": "adapters off", "precomputed": "log-probs in a file", None: "the loss needs none"}[kind]
            return "reference", 0, why
        if path is None:
            return "reference", weights, "a copy: as parameters"
        check_model_path("reference.path", path, self.recipe.reference.revision)
        other = meta_model(models.reference_recipe(self.recipe))
        if self.recipe.reference.sync_every:
            check_can_follow(other, self.model, self.recipe.reference.sync_every)
        return "reference", sum(map(_bytes, other.parameters())), "reference.path: number x size of model.dtype"

    def _loss(self) -> tuple[int, str]:
        loss = self.recipe.loss
        if loss.from_logits:
            size = 2 * self.compute_bytes * self.vocab * (self.positions + self.labelled)
            return size, "logits of all positions and of the labelled rows, with gradients"
        budget = roofline.GPU_TILES if loss.memory_budget_mib is None else loss.memory_budget_mib << 20
        needs_copy = self.compute_bytes != self.weight_bytes
        converted = self.compute_bytes * self.vocab * self.hidden_size if needs_copy else 0
        tiles = roofline.tile_bytes(
            self.labelled, self.vocab, budget=budget, is_half=self.compute_bytes == 2, converted=converted
        )
        size = tiles + 2 * 4 * self.labelled * self.hidden_size
        formula = "budget" if tiles == budget else "one tile"
        formula += f" + 2 x float32 hidden rows ({self.labelled:,})"
        if self.head_weight.requires_grad:
            size += _bytes(self.head_weight)
            formula += " + head's gradient"
            if loss.recompute is False:  # None keeps no more than fits into the head's gradient
                # The kept logits share the memory of the head's gradient; for a bfloat16 model they have 2 bytes each.
                width = 2 if self.compute_bytes == 2 and self.head_weight.dtype == torch.bfloat16 else 4
                size += max(0, width * self.labelled * self.vocab - _bytes(self.head_weight))
                formula += f" or {8 * width}-bit logits"
        return size, formula

    def _gathered(self) -> int:
        """Returns the bytes of parameters that FSDP2 holds unsharded at a time.

        These are the parameters of two layers, and all parameters outside the layers.
        """
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in (*self.decoder, *self.vision)]
        inside = {id(parameter) for layer in (*self.decoder, *self.vision) for parameter in layer.parameters()}
        outside = sum(parameter.numel() for parameter in self.model.parameters() if id(parameter) not in inside)
        return self.compute_bytes * (2 * max(sizes, default=0) + outside)

    def _over_ranks(self, name: str, size: int, formula: str) -> Memory:
        return Memory(name, size, math.ceil(size / self.world_size), formula)


def has_split_attention(model: nn.Module) -> bool:
    """Returns whether the decoder uses split attention (``mpo_ext.train.split_attention``).

    With split attention, a row with a prompt and several responses needs no mask.
    """
    return is_split(getattr(decoder_config(unwrap_model(model)), "_attn_implementation", None))


def longest_pair(recipe: Recipe, model: nn.Module) -> int:
    """Returns the assumed length of a prompt plus a response, in tokens.

    The length is ``data.max_length``, or 4096 if the recipe does not set it. The number of positions of the model is
    an upper limit.
    """
    tokens = recipe.data.max_length or ASSUMED_LENGTH
    return min(tokens, getattr(_text_config(model), "max_position_embeddings", None) or tokens)


def meta_model(recipe: ModelRecipe) -> nn.Module:
    """Returns the model on the meta device, with the adapters and frozen parts of a training run.

    The base weights are not quantized.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training needs transformers: {install_hint('train')}") from error

    check_model_path("model.path", recipe.path, recipe.revision)
    check_on_hub("model.path", recipe.path, **recipe.hub_options)
    config = load_config(recipe.path, **recipe.hub_options)
    loader = models.loader_of(config)
    if recipe.dtype == "auto":
        named = getattr(config, "dtype", None)
        dtype = named if isinstance(named, torch.dtype) else torch.float32
    else:
        dtype = getattr(torch, recipe.dtype)
    # transformers rejects flash attention without a GPU; sdpa needs as much memory.
    attention = recipe.attention if recipe.attention in ("sdpa", "eager") else "sdpa"
    with torch.device("meta"):
        model = loader.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=recipe.trust_remote_code
        )
        if recipe.lora is not None:
            recipe = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, quantization=None))
        return models.prepare_model(model, recipe)


def _layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns the layers of the decoder and the layers of the vision tower.

    Layers are the entries of an ``nn.ModuleList`` with linear layers. Lists inside such a list do not count.
    """
    inner = unwrap_model(model)
    vision_roots = tuple(f"{name}." for name, _ in models.modules_of(inner, "vision_tower"))
    lists: dict[str, list[nn.Module]] = {}
    for name, module in inner.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if any(isinstance(part, nn.Linear) for part in module.modules()):
            lists[name] = list(module)
    vision = [layer for name, layers in lists.items() if name.startswith(vision_roots) for layer in layers]
    decoder = [layer for name, layers in lists.items() if not name.startswith(vision_roots) for layer in layers]
    return decoder, vision


def _norms(layer: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yields each norm of a layer and the number of features per token position that the norm reads."""
    modules = dict(layer.named_modules())
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor):
            # The weight of q_norm covers a single attention head.
            projection = modules.get(f"{name.removesuffix('_norm')}_proj")
            yield module, getattr(projection, "out_features", weight.numel())


def _width(layer: nn.Module) -> int:
    """Returns the hidden size of a layer: the size of its first norm, or the input size of its first linear layer."""
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor):
            return weight.numel()
    return next((module.in_features for module in layer.modules() if isinstance(module, nn.Linear)), 0)


def _patches_per_image(config: Any) -> int | None:
    """Returns the number of patches per image in the vision tower, or None if the config does not state it."""
    vision = getattr(config, "vision_config", None)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if image is None or patch is None:
        return None
    height, width = image if isinstance(image, list | tuple) else (image, image)
    patch_height, patch_width = patch if isinstance(patch, list | tuple) else (patch, patch)
    return (height // patch_height) * (width // patch_width)


def _patches_per_token(config: Any) -> int:
    """Returns the number of vision tower patches that are merged to one image token of the prompt."""
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
