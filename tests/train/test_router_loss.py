"""Compares the auxiliary router loss with transformers' ``load_balancing_loss_func``, on text and on images."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import model_folders
import more_families
import pytest
import tiny_processors
import torch
import transformers
from accelerate import Accelerator
from digits_run import recipe
from families import EXPERTS, PAD, QWEN3_VISION, QWEN_TOKENS, TEXT, Family, build, patches, sample, text_model
from run_recipe import Job, log_of, result_of, text_of
from run_recipe import run as run_ranks
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train.batch import RowLayout, collate
from mpo_ext.train.batch_loss import BatchLoss, router_weight
from mpo_ext.train.dataset import BatchCounts, StepSize, without_responses
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward
from mpo_ext.train.loop import Trainer
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.model import prepare_model
from mpo_ext.train.recipe import LoraRecipe, LossRecipe, ModelRecipe
from mpo_ext.train.router_loss import RouterLoss, find_routers, make_router_loss

MOE = {**EXPERTS, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "router_aux_loss_coef": 0.01}


def qwen3_vl_moe() -> nn.Module:
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, **MOE, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    config = transformers.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def internvl_moe() -> nn.Module:
    """Returns an InternVL with a mixture-of-experts language model; its forward lacks ``output_router_logits``."""
    config = families.internvl().config.to_dict()
    config["text_config"] = {**TEXT, **MOE, "model_type": "qwen3_moe"}
    return transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(**config))


families.ALL.update(
    {
        **{name: more_families.MORE[name] for name in ("qwen3", "deepseek_v3")},
        "moe": Family(partial(text_model, "Qwen3Moe", **MOE)),
        "vl_moe": Family(qwen3_vl_moe, patches, "mm_token_type_ids", "model.visual"),
    }
)
LAYOUTS: list[tuple[RowLayout, str]] = [("separate", "sdpa"), ("shared", "split sdpa"), ("packed", "split sdpa")]


def pairs(family: str) -> list[Sample]:
    images = 1 if family == "vl_moe" else 0
    return [
        sample(family, 1, text=8, chosen=6, rejected=3, images=images),
        sample(family, 2, text=4, chosen=2, rejected=5),
        sample(family, 3, text=6, chosen=4, rejected=4, images=2 * images),
    ]


def logits_of(model: nn.Module, one: Sample, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the model's router logits for a prompt followed by a response."""
    tokens = torch.cat([one.prompt_ids, ids]).unsqueeze(0)
    inputs = dict(one.image_inputs)
    for name, values in one.token_inputs.items():
        inputs[name] = torch.cat([values, values.new_zeros(len(ids))]).unsqueeze(0)
    return model(input_ids=tokens, use_cache=False, output_router_logits=True, **inputs).router_logits


def expected_loss(model: nn.Module, samples: Sequence[Sample], layout: RowLayout) -> torch.Tensor:
    """Returns transformers' router loss over the tokens of all rows.

    If both responses of a pair are in one row, the tokens of the prompt are counted once.
    """
    layers: list[list[torch.Tensor]] = [[] for _ in find_routers(model)]
    for one in samples:
        chosen, rejected = (logits_of(model, one, ids) for ids in (one.chosen_ids, one.rejected_ids))
        first = 0 if layout == "separate" else len(one.prompt_ids)
        for layer, (of_chosen, of_rejected) in zip(layers, zip(chosen, rejected, strict=True), strict=True):
            layer += [of_chosen, of_rejected[first:]]
    config = model.config.get_text_config()  # type: ignore[union-attr]
    joined = tuple(torch.cat(layer) for layer in layers)
    return load_balancing_loss_func(joined, config.num_experts, config.num_experts_per_tok)


def loss_and_gradients(model: nn.Module, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [model.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {name: each for name, each in zip(names, gradients, strict=True) if each is not None}
    return loss.item(), found


def assert_equal(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert expected[1]
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(actual[1][name] / scale, gradient / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("layout", "attention"), LAYOUTS)
@pytest.mark.parametrize("family", ["moe", "vl_moe"])
def test_loss_and_gradients_are_those_of_transformers(
    family: str, layout: RowLayout, attention: str, checkpointing: bool
) -> None:
    model, samples = build(family, attention), pairs(family)
    expected = loss_and_gradients(model, expected_loss(model, samples, layout))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    lines: list[str] = []
    routers = make_router_loss(model, None, lines.append)
    assert routers is not None
    assert lines == ["auxiliary loss of 2 routers with weight 0.01 (router_aux_loss_coef of the model's config)"]
    batch = collate(samples, layout, pad_id=PAD, positions=prompt_positions(model))
    with routers.recorded() as logits:
        hidden = forward(model, batch).hidden
    assert len(logits) == 2
    loss = routers(logits, batch.is_routed())
    (hidden.sum() * 0 + loss).backward(retain_graph=True)  # runs the routers again if gradients are checkpointed
    assert len(logits) == 2
    actual = loss.item(), {name: p.grad for name, p in model.named_parameters() if name in expected[1]}
    assert_equal(actual, expected)
    weights = [name for name in expected[1] if name.endswith("mlp.gate.weight")]
    assert len(weights) == 2
    assert all(expected[1][name].abs().max() > 1e-4 for name in weights)


def test_a_whole_loss_is_that_of_transformers() -> None:
    """Compares the loss of SFT with the loss that transformers computes with ``output_router_logits=True``."""
    model, one = build("moe", "split sdpa"), sample("moe", 5, text=6, chosen=9)
    tokens = torch.cat([one.prompt_ids, one.chosen_ids]).unsqueeze(0)
    labels = tokens.clone()
    labels[:, :6] = -100
    out = model(input_ids=tokens, labels=labels, use_cache=False, output_router_logits=True)
    expected = loss_and_gradients(model, out.loss)
    settings = LossRecipe(dpo_weight=0, bco_weight=0)
    routers = make_router_loss(model, None, print)
    batch_loss = BatchLoss(settings, Accelerator(cpu=True), None, routers)
    batch = collate([one], "packed", pad_id=PAD, with_rejected=False)
    actual = batch_loss(model, batch, settings.config, RewardShift(), batch_loss.router_coef)
    assert_equal(loss_and_gradients(model, actual.loss), expected)
    assert actual.stats["router_aux_loss"].item() == pytest.approx(out.aux_loss.item(), rel=1e-6)
    without = batch_loss(model, batch, settings.config, RewardShift())
    assert actual.loss.item() - without.loss.item() == pytest.approx(0.01 * out.aux_loss.item(), rel=1e-3)
    assert "router_aux_loss" not in without.stats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_logits_and_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [torch.randn(2, 7, 6, dtype=dtype).mul(3).requires_grad_() for _ in range(3)]
    is_counted = torch.rand(14) < 0.6
    wide = [layer.detach().double().flatten(0, 1).requires_grad_() for layer in layers]
    expected = load_balancing_loss_func(tuple(wide), 6, 2, is_counted.view(2, 7))
    loss = RouterLoss([], 2, 1.0)(layers, is_counted)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # theirs adds in float32
    torch.testing.assert_close(loss.double(), expected.double(), rtol=min(tolerance, 1e-6), atol=0)
    loss.backward()
    expected.backward()
    for layer, other in zip(layers, wide, strict=True):
        assert layer.grad is not None
        assert other.grad is not None
        assert layer.grad.dtype == dtype
        scale = other.grad.abs().max()
        torch.testing.assert_close(
            layer.grad.flatten(0, 1).double() / scale, other.grad / scale, rtol=0, atol=tolerance
        )
    if dtype == torch.float64:
        exact = [layer.detach().requires_grad_() for layer in layers]
        assert torch.autograd.gradcheck(lambda *each: RouterLoss([], 2, 1.0)(each, is_counted), exact)


def test_equal_use_gives_the_number_of_experts_per_token() -> None:
    logits = torch.eye(4).repeat(5, 1) * 1e-4
    assert RouterLoss([], 1, 1.0)([logits], torch.ones(20, dtype=torch.bool)).item() == pytest.approx(1, abs=1e-6)
    assert RouterLoss([], 1, 1.0)([logits], torch.zeros(20, dtype=torch.bool)).item() == 0


def test_padding_and_blank_images_do_not_count() -> None:
    model = build("vl_moe", "split sdpa")
    with_images, one, two = pairs("vl_moe")[0], sample("vl_moe", 2, text=4, chosen=2, rejected=9), sample("vl_moe", 7)
    routers = make_router_loss(model, None, print)
    assert routers is not None
    values = []
    for layout, blank in (("packed", None), ("packed", without_responses(with_images)), ("shared", None)):
        batch = collate([one, two], layout, pad_id=PAD, positions=prompt_positions(model), blank=blank)  # type: ignore[arg-type]
        assert batch.routed_tokens == int(batch.is_routed().sum()) == (4 + 2 + 9) + (5 + 4 + 3)
        with routers.recorded() as logits, torch.no_grad():
            forward(model, batch)
        values.append(routers(logits, batch.is_routed()).item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "coef", "line"),
    [
        ("qwen3", None, None),
        ("deepseek_v3", None, "no auxiliary loss of the routers: transformers has none for DeepseekV3PreTrainedModel"),
        ("moe", 0, "no auxiliary loss of the routers: router_aux_loss_coef of the recipe is 0"),
        ("moe", 0.5, "auxiliary loss of 2 routers with weight 0.5 (router_aux_loss_coef of the recipe)"),
    ],
)
def test_models_with_and_without_the_loss(name: str, coef: float | None, line: str | None) -> None:
    lines: list[str] = []
    routers = make_router_loss(build(name, None), coef, lines.append)
    assert lines == ([] if line is None else [line])
    assert (routers is None) == (coef != 0.5)


@pytest.mark.parametrize(
    ("name", "reason"), [("qwen3", "it has no routers"), ("deepseek_v3", "transformers has none")]
)
def test_a_weight_without_a_loss_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"router_aux_loss_coef must be null or 0 .*, got 0.1: .*: {reason}"):
        make_router_loss(build(name, None), 0.1, print)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"logits of shape \(6, experts\), one row for each token, got \(5, 4\)"):
        RouterLoss([], 1, 1.0)([torch.zeros(5, 4)], torch.ones(6, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="got none"):
        RouterLoss([], 1, 1.0)([], torch.ones(6, dtype=torch.bool))


def test_logits_are_taken_from_their_position_in_the_result() -> None:
    class Second(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x

    class Model(nn.Module):
        _can_record_outputs = {"router_logits": Second}  # noqa: RUF012 - as transformers writes it

        def __init__(self) -> None:
            super().__init__()
            self.gate = Second()

        def get_output_embeddings(self) -> None:
            return None

    model, x = Model(), torch.zeros(3, 4)
    (router,) = find_routers(model)
    assert (router.module, router.position, router.owner) == (model.gate, 1, Model)
    with RouterLoss([router], 1, 1.0).recorded() as logits:
        model.gate(x)
    assert logits[0] is x


def test_the_name_of_a_layer_selects_routers() -> None:
    class Model(nn.Module):
        spec = SimpleNamespace(target_class=nn.Linear, class_name=None, layer_name="mlp.gate", index=0)
        _can_record_outputs = {"router_logits": spec}  # noqa: RUF012 - as transformers writes it

        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"gate": nn.Linear(2, 2), "gate_proj": nn.Linear(2, 2)})
            self.gate = nn.Linear(2, 2)

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    assert [(router.module, router.position) for router in find_routers(model)] == [(model.mlp["gate"], 0)]


def test_internvl_with_experts_has_the_loss() -> None:
    routers = make_router_loss(internvl_moe(), None, print)
    assert routers is not None
    assert (len(routers.routers), routers.experts_per_token, routers.coef) == (2, 2, 0.01)


def test_adapters_train_under_the_loss_of_the_policy_only() -> None:
    model = prepare_model(build("moe", None), ModelRecipe(path="unused", lora=LoraRecipe(rank=2)))
    routers = make_router_loss(model, None, print)
    assert routers is not None
    batch = collate(pairs("moe"), "packed", pad_id=PAD)
    with routers.recorded() as logits:
        forward(model, batch)
    assert len(logits) == 2
    _, gradients = loss_and_gradients(model, routers(logits, batch.is_routed()))
    assert any("layers.0" in name and each.abs().max() > 0 for name, each in gradients.items() if "lora_B" in name)


# Weights of micro-batches, and runs.


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        ({"loss__average_over": "step"}, [0.3, 0.1, 0.6]),
        ({"loss__average_over": "micro_batch"}, [1 / 3] * 3),
        (
            {"loss__average_over": "micro_batch", "optim__micro_batch_size": 1, "optim__micro_batch_tokens": 100},
            [0.4, 0.2, 0.4],
        ),
    ],
)
def test_the_weights_of_all_micro_batches_add_up(
    tmp_path: Path, overrides: dict[str, Any], share: list[float]
) -> None:
    counts = [BatchCounts(2, 5, 2, 30), BatchCounts(1, 9, 1, 10), BatchCounts(2, 1, 1, 60)]
    size = StepSize(BatchCounts(5, 15, 4, 100), micro_steps=2, micro_batches=3)
    settings = recipe(tmp_path, tmp_path / "p", **overrides)
    weights = [router_weight(settings, 0.02, each, size, world_size=2) for each in counts]
    assert sum(weights) == pytest.approx(2 * 0.02)
    assert weights == pytest.approx([2 * 0.02 * each for each in share])
    assert router_weight(settings, 0.02, None, size, world_size=2) == 0


def write_moe(folder: Path) -> Path:
    torch.manual_seed(0)
    template = tiny_processors.QWEN
    tokenizer = tiny_processors.build_tokenizer(tiny_processors.SPECIAL[template])
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = transformers.Qwen3MoeConfig(
        **{**TEXT, **MOE, "vocab_size": 264, "max_position_embeddings": 256, "eos_token_id": end}
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, out: str, **settings: Any) -> list[dict[str, Any]]:
    common = {"model__path": str(folder / "model"), "optim__batch_size": 6, "optim__max_steps": 2}
    source = folder / "pairs" / "pairs.jsonl"
    trainer = Trainer(recipe(folder / out, source, **{**common, **settings}), save=False)
    assert trainer.run() == 0
    return [json.loads(line) for line in trainer.output.log.path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    write_moe(folder / "model")
    model_folders.write_pairs(folder / "pairs", 12, images=False)
    return folder


def test_a_run_logs_the_loss_and_trains_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = {"data__eval": [str(folder / "pairs" / "pairs.jsonl")], "optim__micro_batch_size": 6}
    lines = run(folder, "on", **evaluated)
    said = capsys.readouterr().err
    assert "auxiliary loss of 2 routers with weight 0.01 (router_aux_loss_coef of the model's config)" in said
    assert "(next token and routers): policy and reference agree" in said
    first, *_, last = lines
    terms = 0.8 * first["dpo_loss"] + 0.2 * first["bco_loss"] + first["ntp_loss"]
    assert first["loss"] == pytest.approx(terms + 0.01 * first["router_aux_loss"], rel=1e-6)
    assert 1.5 < first["router_aux_loss"] < 5  # 2 experts per token if all are used equally
    assert last["eval_loss"] == pytest.approx(
        0.8 * last["eval_dpo_loss"] + 0.2 * last["eval_bco_loss"] + last["eval_ntp_loss"]
        + 0.01 * last["eval_router_aux_loss"], rel=1e-6
    )  # fmt: skip

    off = run(folder, "off", loss__router_aux_loss_coef=0, **evaluated)
    assert "router_aux_loss" not in off[0]
    assert off[0]["loss"] == pytest.approx(terms, rel=1e-6)
    assert not math.isclose(off[0]["grad_norm"], lines[0]["grad_norm"], rel_tol=1e-6)


def test_accumulation_has_the_gradient_of_one_micro_batch_up_to_the_use_of_experts(folder: Path) -> None:
    """Compares micro-batches of one pair with a micro-batch of six pairs.

    The DPO and next-token losses agree to a relative error of 1e-5. The router loss uses the expert load of its
    micro-batch. So the router loss and the gradient norm may differ by up to 5%.
    """
    coef = {"loss__router_aux_loss_coef": 1.0, "reward_shift__mode": "fixed"}
    whole, parts = (run(folder, f"{size}", optim__micro_batch_size=size, **coef)[0] for size in (6, 1))
    assert parts["dpo_loss"] == pytest.approx(whole["dpo_loss"], rel=1e-5)
    assert parts["ntp_loss"] == pytest.approx(whole["ntp_loss"], rel=1e-5)
    assert parts["router_aux_loss"] == pytest.approx(whole["router_aux_loss"], rel=0.05)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.05)
    assert parts["loss"] == pytest.approx(
        0.8 * parts["dpo_loss"] + 0.2 * parts["bco_loss"] + parts["ntp_loss"] + parts["router_aux_loss"], rel=1e-6
    )


def test_two_ranks_train_as_one_does(folder: Path) -> None:
    """Compares a run on two ranks with a run on one rank. Each micro-batch is one pair.

    With larger micro-batches, the two runs would group the pairs differently, so the expert loads would differ. A step
    has five pairs, so one of the two ranks has one pair less.
    """
    settings = {
        "loss__router_aux_loss_coef": 1.0, "reward_shift__mode": "fixed", "optim__batch_size": 5,
        "optim__micro_batch_size": 1, "optim__max_steps": 2, "data__eval": [str(folder / "pairs" / "pairs.jsonl")],
    }  # fmt: skip
    one = Job(folder / "one", folder / "pairs" / "pairs.jsonl", settings, model=folder / "model")
    two = dataclasses.replace(one, out=folder / "two", world_size=2)
    assert run_ranks(one) == [0], text_of(one)
    assert run_ranks(two) == [0, 0], text_of(two)
    for line, other in zip(log_of(two), log_of(one), strict=True):
        assert line == {name: pytest.approx(value, abs=1e-5, rel=1e-5) for name, value in other.items()}
    weights, truth = (result_of(job)["weights"] for job in (two, one))
    for name, value in truth.items():
        torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=0, msg=name)


def test_a_dense_model_refuses_the_weight(folder: Path) -> None:
    model_folders.write_qwen2(folder / "dense")
    with pytest.raises(ValueError, match="router_aux_loss_coef must be null or 0"):
        run(folder, "dense-out", loss__router_aux_loss_coef=0.1, model__path=str(folder / "dense"))


def test_a_dummy_batch_has_no_weight_and_counts_no_token() -> None:
    one = without_responses(sample("moe", 1))
    batch = collate([dataclasses.replace(one, name="no pair")], "packed", pad_id=PAD)
    assert batch.routed_tokens == 0
    assert not batch.is_routed().any()
