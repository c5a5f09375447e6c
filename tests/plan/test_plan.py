"""Tests that ``mpo-ext plan`` agrees with the trainer, and estimates memory close to the size of real tensors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import families
import pytest
import torch
import transformers
from families import IMAGE, TEXT, VISION, VOCAB
from model_folders import write_llava, write_qwen2
from PIL import Image
from torch import nn

from mpo_ext.__main__ import main
from mpo_ext.checks import LinesError, check_model_path
from mpo_ext.data.jsonl import write_pairs
from mpo_ext.data.records import Pair
from mpo_ext.plan import machines, roofline
from mpo_ext.plan.memory import Memory, MemoryEstimate
from mpo_ext.plan.planner import plan
from mpo_ext.plan.report import Plan, format_bytes
from mpo_ext.train.checkpoint_files import Manifest
from mpo_ext.train.dataset import Collator, RunData
from mpo_ext.train.dry_run import load_encoder
from mpo_ext.train.inputs import collect_inputs
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.model import prepare_model
from mpo_ext.train.recipe import Recipe, load_recipe
from mpo_ext.train.resume import plain_values
from mpo_ext.train.sampler import StepSampler, micro_batches

GIB = 1 << 30


def write_model(folder: Path, family: str = "Qwen2", **settings: Any) -> Path:
    """Writes a model folder with a config and no weights."""
    if family == "internvl":
        config = families.internvl().config
    else:
        config = getattr(transformers, f"{family}Config")(**{**TEXT, **settings})
    config.save_pretrained(folder)
    return folder


def write_data(path: Path, pairs: int) -> Path:
    write_pairs(path, [Pair(f"q{index}", "yes", "no", ("no_such_image.png",)) for index in range(pairs)])
    return path


def make(folder: Path, *overrides: str, family: str = "Qwen2", pairs: int = 50, **settings: Any) -> Recipe:
    write_model(folder / "model", family, **settings)
    write_data(folder / "a.jsonl", pairs)
    (folder / "r.yaml").write_text(
        f"model: {{path: {folder / 'model'}}}\ndata: {{train: {folder / 'a.jsonl'}, max_length: 64}}\n"
        f"output: {{dir: {folder / 'out'}}}\noptim: {{batch_size: 8}}\n"
    )
    return load_recipe(folder / "r.yaml", overrides)


def make_llava(folder: Path) -> Recipe:
    """Writes a model with its processor, an image, and a recipe; returns the recipe."""
    recipe = make(folder)
    write_llava(folder / "model")
    Image.new("RGB", (30, 20), "red").save(folder / "no_such_image.png")
    return recipe


def real_model(recipe: Recipe) -> nn.Module:
    """Returns a recipe's model with real weight tensors, prepared as in the trainer."""
    config = transformers.AutoConfig.from_pretrained(recipe.model.path)
    kind = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        kind = transformers.AutoModelForImageTextToText
    return prepare_model(kind.from_config(config, attn_implementation=recipe.model.attention), recipe.model)


def part(planned: Plan, name: str) -> Memory:
    (found,) = [part for part in planned.memory if part.name == name]
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.freeze=[vision_tower]",),
        ("model.freeze=[vision_tower, projector]",),
        ("model.freeze=[language_model]",),
        ("model.lora.rank=2",),
        ("model.lora={rank: 3, target: [q_proj]}",),
        ("model.gradient_checkpointing=true",),
    ],
    ids=" ".join,
)
def test_the_model_is_that_of_the_trainer(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = make(tmp_path, *overrides, family="internvl")
    planned, model = plan(recipe), real_model(recipe)
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (planned.vocab_size, planned.hidden_size, planned.layers) == (VOCAB, 16, 2)
    assert planned.model_class == "InternVLForConditionalGeneration"
    assert part(planned, "parameters").bytes == sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters()
    )
    assert part(planned, "gradients").bytes == 4 * planned.trainable
    assert part(planned, "optimizer state").bytes == 8 * planned.trainable


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_are_counted_once(tmp_path: Path, tied: bool) -> None:
    planned = plan(make(tmp_path, tie_word_embeddings=tied))
    assert planned.parameters == sum(
        parameter.numel() for parameter in transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path / "model")
        ).parameters()
    )  # fmt: skip
    assert planned.model_class == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("world", "micro", "batch", "epochs"), [(1, 1, 8, 1), (3, 2, 8, 3), (2, 3, 50, 2), (4, 1, 64, 1)]
)
def test_steps_and_micro_batches_are_those_of_the_sampler(
    tmp_path: Path, world: int, micro: int, batch: int, epochs: int
) -> None:
    recipe = make(
        tmp_path, f"optim.batch_size={batch}", f"optim.micro_batch_size={micro}", f"optim.epochs={epochs}",
        f"data.train=[{{path: {tmp_path / 'a.jsonl'}, repeat_time: 0.5}}, {tmp_path / 'b.jsonl'}]"
        if write_data(tmp_path / "b.jsonl", 7) else "",
    )  # fmt: skip
    planned = plan(recipe, world=world)
    sampler = StepSampler(Mixture(recipe.data.train).epoch, batch_size=batch)
    assert planned.pairs_per_epoch == sampler.pairs_per_epoch == 32
    assert [subset.pairs for subset in planned.subsets] == [25, 7]
    assert planned.steps_per_epoch == sampler.steps_per_epoch
    assert planned.steps == epochs * sampler.steps_per_epoch
    shares = [
        len(sampler.rank_slice(step, rank, world)) for step in range(sampler.steps_per_epoch) for rank in range(world)
    ]
    assert planned.pairs_per_rank == max(shares)
    assert planned.micro_batches == max(len(micro_batches([1] * share, micro)) for share in shares)


@pytest.mark.parametrize(
    ("overrides", "steps", "warmup"),
    [
        ((), 7, 1),
        (("optim.max_steps=3",), 3, 1),
        (("optim.max_steps=300",), 7, 1),
        (("optim.epochs=10", "optim.warmup_ratio=0.1"), 70, 7),
        (("optim.epochs=10", "optim.warmup_ratio=0.11"), 70, 8),
        (("optim.warmup_ratio=0",), 7, 0),
        (("optim.max_steps=1",), 1, 0),
    ],
)
def test_the_schedule(tmp_path: Path, overrides: tuple[str, ...], steps: int, warmup: int) -> None:
    planned = plan(make(tmp_path, *overrides))
    assert (planned.steps, planned.warmup_steps) == (steps, warmup)


def test_the_layout_comes_with_its_reason(tmp_path: Path) -> None:
    shared = plan(make(tmp_path, pairs=240))
    assert (shared.layout, shared.tokens, shared.positions, shared.notes) == ("shared", 64, 48 + 32, ())
    separate = plan(make(tmp_path, "loss.shared_prefix=false", pairs=240))
    assert (separate.layout, separate.positions) == ("separate", 128)
    assert separate.notes == ("layout separate: loss.shared_prefix is false",)
    assert plan(make(tmp_path, "model.attention=flash_attention_2", pairs=240)).layout == "shared"
    for settings in (("flash_attention_2", "masked"), ("flex_attention", "true")):
        refused = plan(make(tmp_path, f"model.attention={settings[0]}", f"loss.shared_prefix={settings[1]}"))
        assert refused.layout == "separate"
        assert f"{settings[0]!r}" in refused.notes[0]
    sft = plan(make(tmp_path, "loss.dpo_weight=0", "loss.bco_weight=0", "optim.micro_batch_size=2"))
    assert sft.positions == 2 * 64


def test_a_hybrid_model_shares_prefixes_with_split_attention(tmp_path: Path) -> None:
    hybrid: dict[str, Any] = {"family": "Qwen3_5Text", **families.DELTA_NET}
    shared = plan(make(tmp_path, pairs=240, **hybrid))
    assert (shared.layout, shared.positions, shared.notes) == ("shared", 48 + 32, ())
    separate = plan(make(tmp_path, "loss.shared_prefix=masked", **hybrid))
    assert separate.layout == "separate"
    assert "Qwen3_5ForCausalLM has layers of linear_attention" in separate.notes[0]


def test_a_model_that_cannot_share_prefixes_says_why(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=8, n_groups=1
    )
    recipe = make(tmp_path, "model.attention=eager")
    config.save_pretrained(tmp_path / "model")
    planned = plan(recipe)
    assert planned.layout == "separate"
    assert planned.notes[0].startswith("layout separate: ")


def test_notes_say_what_the_numbers_cannot(tmp_path: Path) -> None:
    planned = plan(
        make(tmp_path, "model.dtype=bfloat16", "data.max_length=null", "optim.batch_size=3"), world=4
    )  # fmt: skip
    text = "\n".join(planned.notes)
    assert "only 17 steps: the margin needs about 30 to show a trend" in text
    assert "most updates at a learning rate of 1e-06 are rounded away" in text
    assert "leaves some of the 4 processes without a pair" in text
    assert plan(make(tmp_path, "optim.batch_size=4", pairs=120), world=4).notes == ()
    assert plan(make(tmp_path, "model.dtype=bfloat16", "model.lora={}", pairs=240)).notes == ()
    assert plan(make(tmp_path, "loss.dpo_weight=0", "loss.bco_weight=0")).notes == ()  # SFT has no margin


def test_a_pair_has_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    short = plan(make(tmp_path, "data.max_length=null", pairs=240))
    assert (short.tokens, short.positions, short.cost_step.prompt) == (128, 96 + 2 * 32, 96)
    message = ", and the model has 128 positions: pairs are assumed to fill them"
    assert short.notes == (f"data.max_length is not set{message}",)
    set_too_long = plan(make(tmp_path, "data.max_length=4096", pairs=240))
    assert (set_too_long.tokens, set_too_long.notes) == (128, (f"data.max_length is 4,096{message}",))
    long = plan(make(tmp_path, "data.max_length=null", pairs=240, max_position_embeddings=8192))
    assert long.tokens == 4096
    assert long.notes == ("data.max_length is not set: pairs are assumed to have 4,096 tokens",)
    fits = plan(make(tmp_path, "data.max_length=128", pairs=240))
    assert (fits.tokens, fits.notes) == (128, ())
    images = plan(make(tmp_path, "data.max_length=null", family="internvl"))
    assert images.tokens == 128


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("model.lora={}",), ("reference.kind=precomputed",), ("reference.kind=precomputed", "model.lora={}"),
        ("reference.sync_every=2",), ("loss.recompute=false",), ("loss.from_logits=true",), ("precision=bf16",),
        ("model.gradient_checkpointing=true",), ("loss.dpo_weight=0", "loss.bco_weight=0"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_there_is_one_figure_of_memory(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    planned = plan(make(tmp_path, *overrides, **WIDE))
    rows = {name: memory for name, *_, memory in planned.times(machines.gpu("H100"))}
    assert rows["this recipe"] == format_bytes(planned.total_bytes)
    assert "TRL's DPOTrainer" in rows
    for variant in planned.variants[1:-1]:  # equal to the plan of the changed recipe
        changed = [one for one in overrides if not one.startswith(("reference.", variant.name.partition("=")[0]))]
        if variant.name == "loss.from_logits=true":
            changed = [one for one in changed if one != "loss.recompute=false"]
        kept = [one for one in overrides if one.startswith("reference.") and not variant.name.startswith("reference.")]
        other = plan(make(tmp_path, *changed, *kept, variant.name, **WIDE))
        assert variant.bytes == other.total_bytes, variant.name
        assert rows[variant.name] == format_bytes(other.total_bytes)


def test_advice_about_from_logits_agrees_with_its_row(tmp_path: Path) -> None:
    planned, machine = plan(make(tmp_path, **WIDE)), machines.gpu("H100")
    ratio = next(row[2] for row in planned.times(machine) if row[0] == "loss.from_logits=true")
    advice = next(line for line in planned.advice(machine) if line.startswith("loss.from_logits=true"))
    assert f"it takes {ratio} of the time of this recipe and " in advice
    assert "faster" not in advice


def test_the_loss_needs_no_more_tiles_than_it_has_logits(tmp_path: Path) -> None:
    few = plan(make(tmp_path))
    assert part(few, "loss").formula.startswith("one tile + ")
    many = plan(make(tmp_path, "data.max_length=4000", vocab_size=80000, max_position_embeddings=4096))
    assert part(many, "loss").formula.startswith("budget + ")
    assert part(many, "loss").bytes == roofline.GPU_TILES + 2 * 4 * 2000 * 16 + 4 * 80000 * 16


def test_memory_by_part(tmp_path: Path) -> None:
    plain = plan(make(tmp_path))
    weights = 4 * plain.parameters
    assert part(plain, "reference").bytes == weights
    assert "half-precision copies" not in [one.name for one in plain.memory]
    rows = 2 * 16
    tiles = 4 * rows * VOCAB
    assert part(plain, "loss").bytes == tiles + 2 * 4 * rows * 16 + 4 * VOCAB * 16
    assert plain.total_bytes == sum(one.bytes for one in plain.memory)
    assert plain.eager_loss == 2 * 64 * VOCAB * 16

    half = plan(make(tmp_path, "precision=bf16"))
    matrices = sum(parameter.numel() for parameter in real_model(half.recipe).parameters() if parameter.ndim > 1)
    assert part(half, "half-precision copies").bytes == 2 * matrices
    assert half.eager_loss == 2 * 64 * VOCAB * 18
    assert part(plan(make(tmp_path, "model.dtype=bfloat16")), "parameters").bytes == 2 * plain.parameters

    # The gradient of a tile and a copy of the head in half precision, in addition to the gradient of the float32 head.
    assert part(half, "loss").bytes == 6 * rows * VOCAB + 2 * VOCAB * 16 + 2 * 4 * rows * 16 + 4 * VOCAB * 16

    kept = plan(make(tmp_path, "loss.memory_budget_mib=3", "loss.recompute=false", vocab_size=50000))
    logits, grad = 4 * rows * 50000, 4 * 50000 * 16  # they share memory, so the larger counts
    assert part(kept, "loss").bytes == (3 << 20) + 2 * 4 * rows * 16 + grad + (logits - grad)
    logits = plan(make(tmp_path, "loss.from_logits=true"))
    assert part(logits, "loss").bytes == 2 * 4 * VOCAB * (80 + rows)
    lora = plan(make(tmp_path, "model.lora={}"))
    assert part(lora, "reference").bytes == 0
    assert part(lora, "loss").bytes == tiles + 2 * 4 * rows * 16
    assert part(plan(make(tmp_path, "reference.kind=precomputed")), "reference").bytes == 0
    assert part(plan(make(tmp_path, "model.lora={}", "reference.kind=copy")), "reference").bytes == 4 * lora.parameters


def test_another_reference_has_its_own_size(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", hidden_size=32, num_hidden_layers=3)
    planned = plan(make(tmp_path, f"reference.path={other}", "model.freeze=[]"))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(other))
    assert part(planned, "reference").bytes == sum(4 * parameter.numel() for parameter in model.parameters())


def test_sharding_divides_what_it_shards(tmp_path: Path) -> None:
    alone, four = plan(make(tmp_path)), plan(make(tmp_path), world=4)
    for name in ("parameters", "gradients", "optimizer state", "reference"):
        assert part(four, name).bytes == part(alone, name).bytes
        assert part(four, name).sharded == -(-part(alone, name).bytes // 4)
    assert part(four, "activations").sharded == part(alone, "activations").bytes
    assert part(four, "buckets or gathered layers").bytes == part(alone, "gradients").bytes
    layers = [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in real_model(four.recipe).model.layers
    ]
    outside = four.parameters - sum(layers)
    assert part(four, "buckets or gathered layers").sharded == 4 * (2 * layers[0] + outside)
    assert four.total_sharded < four.total_bytes


def test_4_bit_weights(tmp_path: Path) -> None:
    planned = plan(make(tmp_path, "model.lora={rank: 2, quantization: 4bit}", "model.dtype=bfloat16"))
    model = real_model(make(tmp_path, "model.lora={rank: 2}"))
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name
    )
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    others = 2 * (planned.parameters - linear - adapters) + 4 * adapters
    assert part(planned, "parameters").bytes == round(4.127 / 8 * linear) + others


def saved_bytes(model: nn.Module, positions: int, *, images: bool = False) -> int:
    """Returns the bytes of the tensors that autograd saves, without parameters and logits.

    A storage shared by several tensors is counted once.
    """
    kept: dict[int, int] = {}
    skipped = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs: dict[str, Any] = {"input_ids": torch.randint(2, 50, (1, positions))}
    if images:
        inputs["input_ids"][0, 2] = IMAGE
        inputs["pixel_values"] = torch.randn(1, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # keeps the storages alive
    assert hidden.requires_grad
    return sum(kept.values())


WIDE = {
    "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Qwen3"])
def test_activations_are_near_what_autograd_keeps(tmp_path: Path, family: str, checkpointed: bool) -> None:
    recipe = make(tmp_path, f"model.gradient_checkpointing={checkpointed}".lower(), family=family, **WIDE)
    planned = plan(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_length=512)))
    model = real_model(recipe)
    real = saved_bytes(model, planned.positions)
    estimated = part(planned, "activations").bytes
    if checkpointed:  # autograd does not keep the layer that backward recomputes
        estimate = MemoryEstimate(recipe, model, "shared", 1)
        estimated -= planned.positions * estimate.bytes_per_position(estimate.decoder[0])
    print(f"kept {real:,}, estimated {estimated:,}")
    assert real * 0.8 <= estimated <= real * 1.2
    assert (planned.other_activations > estimated) == checkpointed


def test_the_norms_of_queries_and_keys_read_all_heads(tmp_path: Path) -> None:
    recipe = make(tmp_path, family="Qwen3", **WIDE)
    model = real_model(recipe)
    estimate = MemoryEstimate(recipe, model, "shared", 1)
    with_norms, without = copy.deepcopy(estimate.decoder[0]), copy.deepcopy(estimate.decoder[0])
    attention: Any = without.self_attn
    attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()
    moved = estimate.bytes_moved_per_position(with_norms) - estimate.bytes_moved_per_position(without)
    features = attention.q_proj.out_features + attention.k_proj.out_features
    assert moved == estimate.compute_bytes * 7 * features > 0


def test_a_micro_batch_has_at_most_the_pairs_of_a_rank(tmp_path: Path) -> None:
    sizes = "optim.batch_size=8", "optim.micro_batch_size=8"
    assert plan(make(tmp_path, *sizes), world=8).positions * 8 == plan(make(tmp_path, *sizes)).positions
    tokens = plan(make(tmp_path, "optim.batch_size=2", "optim.micro_batch_tokens=100000"))
    assert tokens.positions == plan(make(tmp_path, "optim.batch_size=2", "optim.micro_batch_size=2")).positions


def test_frozen_layers_keep_no_inputs(tmp_path: Path) -> None:
    full = plan(make(tmp_path, **WIDE))
    recipe = make(tmp_path, "model.lora={rank: 1, target: [q_proj]}", **WIDE)
    lora = plan(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_length=512)))
    assert part(plan(recipe), "activations").bytes < 0.9 * part(full, "activations").bytes
    real = saved_bytes(real_model(recipe).get_base_model(), lora.positions)
    assert real * 0.7 <= part(lora, "activations").bytes <= real * 1.4


def test_the_vision_tower_costs_nothing_where_it_is_frozen(tmp_path: Path) -> None:
    whole = plan(make(tmp_path, family="internvl"))
    frozen = plan(make(tmp_path, "model.freeze=[vision_tower]", family="internvl"))
    model = real_model(whole.recipe)
    estimate = MemoryEstimate(whole.recipe, model, "shared", 1)
    assert len(estimate.vision) == VISION["num_hidden_layers"]
    difference = part(whole, "activations").bytes - part(frozen, "activations").bytes
    patches = 4 * 48  # four patches per image token
    assert difference == patches * sum(map(estimate.bytes_per_position, estimate.vision)) > 0


def test_eager_attention_keeps_its_scores(tmp_path: Path) -> None:
    sdpa, eager = plan(make(tmp_path)), plan(make(tmp_path, "model.attention=eager"))
    difference = part(eager, "activations").bytes - part(sdpa, "activations").bytes
    assert difference == 2 * 2 * 64 * 80 * (4 + 4)  # layers, heads, scores, bytes
    masked = plan(make(tmp_path, "model.attention=eager", "loss.shared_prefix=masked"))
    assert part(masked, "activations").bytes - part(sdpa, "activations").bytes == 2 * 2 * 80 * 80 * (4 + 4)


def test_micro_batches_filled_by_tokens_have_this_number_of_positions(tmp_path: Path) -> None:
    planned = plan(make(tmp_path, "optim.micro_batch_tokens=200"))
    assert (planned.positions, planned.micro_batches) == (200, 4)  # eight pairs of 80 positions, two in a micro-batch
    two = plan(make(tmp_path, "optim.micro_batch_size=2"))
    for name in ("activations", "loss"):
        assert part(planned, name).bytes >= part(two, name).bytes
    assert part(planned, "activations").bytes == part(two, "activations").bytes * 200 // 160
    assert plan(make(tmp_path, "optim.micro_batch_tokens=10")).positions == 80
    assert plan(make(tmp_path, "optim.micro_batch_tokens=200", "loss.shared_prefix=false")).positions == 200


def test_the_text_is_complete(tmp_path: Path) -> None:
    recipe = make(tmp_path, f"data.eval={tmp_path / 'a.jsonl'}", "model.gradient_checkpointing=true")
    planned = plan(recipe, world=2)
    text = str(planned)
    for expected in (
        "Qwen2ForCausalLM", f"{planned.parameters:,}", "(100.00%)", f"{VOCAB:,} x 16", "eval: a.jsonl",
        "7 (7 per epoch", "4 in 4 micro-batches", "64 tokens, 80 positions", "one copy per rank", "sharded",
        "activations without gradient checkpointing", "an estimate", "total",
    ):  # fmt: skip
        assert expected in text, expected
    assert "sharded" not in str(plan(recipe))
    assert "activations with gradient checkpointing" in str(plan(make(tmp_path)))
    assert max(map(len, text.splitlines())) < 120


def test_sizes_are_readable() -> None:
    assert [format_bytes(size) for size in (0, 1 << 20, 3 * GIB // 2, 1500 * GIB)] == [
        "0", "1.0 MiB", "1.50 GiB", "1,500.0 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_prints_the_plan_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    recipe = make_llava(tmp_path)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "mpo_ext.train.loop", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run", "--world", "2"]) == 0
    text = capsys.readouterr().out
    assert "Memory per rank (an estimate)" in text
    assert "LlavaForConditionalGeneration" in text
    if not terminal:
        assert text.startswith(f"{plan(recipe, world=2)}\n")
    assert "a.jsonl: format pairs (detected); 50 of 50 pairs with images\n    1 different images: all exist" in text
    assert "not checked: whether images can be opened (mpo-ext data check does that)\n" in text
    assert "50 pairs were encoded: 50 can be trained, " in text
    assert text.endswith(f"Output\n  {tmp_path / 'out'}: a new run of 7 steps\n\nResult: no problems found\n")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    assert ("processes" in capsys.readouterr().out) == ("processes" in text)
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("step", "told"), [(3, "the run would resume after step 3 of 7"), (7, "already finished (step 7 of 7)")]
)
def test_a_dry_run_tells_where_the_run_stands(
    step: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_llava(tmp_path)
    encoder = load_encoder(recipe, None)
    inputs = collect_inputs(
        RunData(recipe, accelerate.Accelerator(cpu=True), encoder, Collator("separate", 0, True, None)), None, {}
    )
    folder = tmp_path / "out" / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = {"step": step, "recipe": plain_values(recipe.to_dict()), "inputs": inputs}
    (folder / "state.json").write_text(json.dumps(state))
    Manifest(number=1, step=step, world_size=1, score=None, files={}, deepspeed=False, digests={}).write(folder)
    run = ["train", str(tmp_path / "r.yaml"), "--dry-run"]
    assert main(run) == 0
    assert f"Output\n  {tmp_path / 'out'}: {told}" in capsys.readouterr().out
    assert main([*run, "optim.learning_rate=0.5", "output.keep_last=5"]) == 2
    assert "optim.learning_rate was" in (refused := capsys.readouterr().err)
    assert "output.keep_last" not in refused
    assert main([*run, "output.keep_last=5"]) == 0
    assert "since the checkpoint: output.keep_last was 2, is 5" in capsys.readouterr().out
    assert main([*run, "output.resume=never"]) == 2
    assert '"auto" or a checkpoint if the folder has a checkpoint, got "never"' in capsys.readouterr().err
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([*lines[:4], lines[4].replace("yes", "yeah"), *lines[5:]]))
    assert main(run) == 2
    assert "the first change is line 5" in capsys.readouterr().err
    assert main([*run, "output.resume_changed_data=true"]) == 0
    assert "accepted by output.resume_changed_data" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(run) == 0
    assert f"not compared: the data and those of {folder} (a dry run without a launcher" in capsys.readouterr().out
    (folder / "state.json").write_text(json.dumps({**state, "inputs": None}))
    assert main(run) == 0
    assert f"not compared: the data of {folder}, which an earlier version" in capsys.readouterr().out


def test_a_dry_run_finds_pairs_that_the_model_cannot_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llava(tmp_path)
    run = ["train", str(tmp_path / "r.yaml"), "--dry-run"]
    assert main([*run, "data.max_length=5"]) == 1
    text = capsys.readouterr().out
    assert "50 pairs were encoded: 0 can be trained\n  skipped 50: " in text
    assert "NOT VALID: no pair can be trained" in text
    shutil.rmtree(tmp_path / "model")
    write_qwen2(tmp_path / "model")
    pairs = [Pair(f"q{index}", "yes", "no", ("no_such_image.png",) * (index == 7)) for index in range(50)]
    write_pairs(tmp_path / "a.jsonl", pairs)
    assert main(run) == 1
    text = capsys.readouterr().out
    assert "a.jsonl:8: images must be none for a text model, got 1" in text
    assert "NOT VALID: the run would stop at the first pair that cannot be encoded" in text
    assert text.endswith("\nResult: NOT VALID, see above\n")
    assert main([*run, "data.skip_bad=true"]) == 0
    assert "49 can be trained" in capsys.readouterr().out


def test_a_dry_run_finds_images_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llava(tmp_path)
    write_pairs(tmp_path / "b.jsonl", [Pair("q", "yes", "no", (f"{number}.png",)) for number in range(30)])
    for number in range(20):
        shutil.copy(tmp_path / "no_such_image.png", tmp_path / f"{number}.png")
    (tmp_path / "no_such_image.png").unlink()
    run = ["train", str(tmp_path / "r.yaml"), "--dry-run", f"data.train={tmp_path / 'b.jsonl'}"]
    assert main(run) == 1
    text = capsys.readouterr().out
    assert "30 different images: 10 MISSING" in text
    assert f"b.jsonl:21: no such image: {tmp_path}/20.png" in text
    assert f"{{path: {tmp_path / 'b.jsonl'}, root: .}}" in text
    assert "the run would stop at the first of them" in text
    assert main([*run, "data.skip_bad=true"]) == 0
    (tmp_path / "images").mkdir()
    assert main([*run[:-1], f"data.train={{path: {tmp_path / 'b.jsonl'}, root: {tmp_path / 'images'}}}"]) == 1
    assert main([*run[:-1], "data.skip_bad=true"]) == 1
    assert "the run would skip every pair" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text("{\n")
    assert main([*run, "model.dtype=float32"]) == 2  # no line tells the format


def test_a_reader_that_leaves_ends_a_dry_run_quietly(tmp_path: Path) -> None:
    make(tmp_path)
    command = [sys.executable, "-m", "mpo_ext", "train", str(tmp_path / "r.yaml"), "--dry-run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()  # as head does, before anything is written
        assert process.stderr is not None
        assert "Broken pipe" not in (text := process.stderr.read())
        assert "Errno" not in text


def test_an_error_shows_how_to_write_settings_with_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    for command in ("train", "plan"):
        with pytest.raises(SystemExit, match="2"):
            main([command, str(tmp_path / "r.yaml"), "--optim.learning_rate=1e-5"])
        assert "KEY=VALUE without dashes, as optim.learning_rate=1e-5" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(tmp_path / "r.yaml"), "--optim.seed", "1"])
    assert "as optim.seed=VALUE" in capsys.readouterr().err


def test_each_setting_that_has_changed_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo_ext.train import loop

    def refuse(recipe: Recipe) -> int:
        raise LinesError("the recipe must be the same, but:\n  loss.beta was 0.1, is 0.2\n  optim.seed was 0, is 1")

    make(tmp_path)
    monkeypatch.setattr(loop, "train", refuse)
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    assert "but:\n  loss.beta was 0.1, is 0.2\n  optim.seed was 0, is 1\n" in capsys.readouterr().err


def test_a_missing_recipe_and_a_missing_model_are_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    assert main(["train", "nope.yaml"]) == 2
    assert capsys.readouterr().err == "mpo-ext train: recipe must exist, got nope.yaml\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/nope", "./nope", "~/nope", "/nope", "a/b/c"):
        message = f"model.path must be a folder here or a hub id, got {path}: the folder does not exist"
        for command in (["train"], ["train", "--dry-run"], ["plan"]):
            assert main([*command[:1], "r.yaml", f"model.path={path}", *command[1:]]) == 2
            assert message in capsys.readouterr().err
        assert main(["train", "r.yaml", f"reference.path={path}"]) == 2
        assert message.replace("model", "reference", 1) in capsys.readouterr().err
    check_model_path("model.path", "OpenGVLab/InternVL3-1B-hf")
    check_model_path("model.path", "gpt2")


def test_errors_of_model_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    run = ["train", str(tmp_path / "r.yaml"), "--dry-run"]
    assert main([*run, f"model.path={tmp_path / 'gone'}"]) == 2
    assert "gone" in capsys.readouterr().err
    assert main([*run, "data.train=gone.jsonl"]) == 2
    assert capsys.readouterr().err == "mpo-ext train: data.train: path must exist, got gone.jsonl\n"
    assert main([*run, "model.freeze=[vision_tower]"]) == 2
    assert "freeze must name parts that the model has, got 'vision_tower'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="world must be a positive int, got 0"):
        plan(load_recipe(tmp_path / "r.yaml"), world=0)


def test_a_missing_transformers_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    assert "install the extra 'train' of mpo-ext" in capsys.readouterr().err


def test_the_module_can_be_launched(tmp_path: Path) -> None:
    make(tmp_path)
    command = [sys.executable, "-m", "mpo_ext.train", str(tmp_path / "r.yaml"), "--dry-run", "optim.seed=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("optim.seed must be an integer, got 'x'")


def test_large_models_need_no_memory(tmp_path: Path) -> None:
    large = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
    planned = plan(make(tmp_path, **large, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False))
    assert planned.parameters == 72_706_203_648  # Qwen2-72B
    assert part(planned, "parameters").bytes == 4 * planned.parameters
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 80


def test_the_tables_show_groups_schedule_and_output(tmp_path: Path) -> None:
    items = "{path: items.jsonl, every: 50, max_items: 20}"
    recipe = make(
        tmp_path, "optim.schedule=wsd", "optim.decay_ratio=0.5", "optim.min_lr_ratio=0.1", "optim.learning_rate=1e-4",
        "optim.groups={vision_tower: {learning_rate: 2e-6}, projector: {weight_decay: 0}}", "optim.epochs=2",
        f"data.eval={tmp_path / 'a.jsonl'}", "output.eval_every=5", f"output.eval_generate={items}",
        "output.best_metric=answer_accuracy", "output.early_stopping=3", "output.keep_best=true",
        "output.trackers=[wandb]", "output.push_to_hub=me/model", family="internvl",
    )  # fmt: skip
    planned = plan(recipe)
    text = " ".join(str(planned).split())
    decay = math.ceil(planned.steps / 2)
    for words in (
        f"learning rate 0.0001, then wsd: constant, and linear in the last {decay} steps, down to 1e-05",
        "vision_tower 2e-06, weight decay 0.05 projector 0.0001, weight decay 0",
        "evaluation every 5 steps",
        "evaluation by generation items.jsonl, every 50 steps, at most 20 questions",
        "best checkpoint kept, by answer_accuracy",
        "early stopping after 3 evaluations in a row without a better answer_accuracy",
        "trackers wandb",
        "upload to the hub me/model (private)",
    ):
        assert words in text
