"""Batches: both layouts have the loss and gradients of single forwards, and compute nothing twice."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, PAD, REFUSED, VOCAB, WINDOW, build, image_rows, sample, samples_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mpo_ext import linear_mpo_loss, mpo_loss
from mpo_ext.train import forward as forward_module
from mpo_ext.train import masks
from mpo_ext.train.batch import Batch, collate
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward, forward_logits, model_inputs
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.shared_prefix import check_shared_prefix, label_logp_and_precision, supports_shared_prefix

LAYOUTS = ("shared", "separate")
# transformers has no sdpa for a softcap on attention.
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")
]
VISION = [family for family in FAMILIES if FAMILIES[family].tower]


def default_attention(family: str) -> str:
    return "eager" if family == "gemma2" else "sdpa"


def ref_logp(samples: Sequence[Sample]) -> torch.Tensor:
    return -torch.linspace(3, 9, 2 * len(samples))


def batch_of(model: nn.Module, samples: Sequence[Sample], kind: Any, **options: Any) -> Batch:
    return collate(samples, kind, pad_id=PAD, positions=prompt_positions(model), **options)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    out = forward(model, batch)
    return linear_mpo_loss(
        out.hidden, out.weight, batch.labels, -torch.linspace(3, 9, 2 * batch.pairs), cu_seqlens=batch.cu_seqlens,
        shift=False, **out.options,
    ).loss  # fmt: skip


def plain_loss(model: nn.Module, samples: Sequence[Sample], with_rejected: bool = True) -> torch.Tensor:
    """Each [prompt | response] in a forward of its own, with its own images: the model's logits."""
    logits, labels, lengths = [], [], [0]
    for side in ("chosen_ids", "rejected_ids"):
        for one in samples:
            response = getattr(one, side)
            if not len(response) or (side == "rejected_ids" and not with_rejected):
                logits.append(torch.zeros(1, VOCAB))
                labels.append(torch.tensor([-100]))
                lengths.append(1)
                continue
            inputs = {
                name: torch.cat([values, values.new_zeros(len(response))]).unsqueeze(0)
                for name, values in one.token_inputs.items()
            }
            ids = torch.cat([one.prompt_ids, response]).unsqueeze(0)
            found = model(input_ids=ids, **inputs, **one.image_inputs, use_cache=False).logits[0]
            logits.append(found[len(one.prompt_ids) - 1 : -1])
            labels.append(response)
            lengths.append(len(response))
    return mpo_loss(
        torch.cat(logits), torch.cat(labels), ref_logp(samples), cu_seqlens=torch.tensor(lengths).cumsum(0),
        shift=False, backend="reference",
    ).loss  # fmt: skip


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name without what wrappers put before it, zeros where there is no gradient; cleared for the next one."""
    loss.backward()
    found = {
        name.removeprefix("module."): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return found


def assert_same(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tol: float = 1e-5) -> None:
    assert ours.keys() == truth.keys()
    largest = max(grad.abs().max().item() for grad in truth.values())
    assert largest > 0
    for name in truth:
        worst = (ours[name] - truth[name]).abs().max().item()
        assert worst <= tol * largest, f"{name}: {worst / largest:.2g} of the largest gradient"


def assert_as_plain(model: nn.Module, samples: Sequence[Sample], kinds: Sequence[str] = LAYOUTS) -> None:
    truth = plain_loss(model, samples)
    expected = gradients(model, truth)
    for kind in kinds:
        loss = loss_of(model, batch_of(model, samples, kind))
        torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
        assert_same(gradients(model, loss), expected)


# Loss and gradients.


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_both_layouts_have_the_loss_and_all_gradients_of_single_forwards(family: str, attention: str) -> None:
    model = build(family, attention)
    samples = samples_of(family)
    assert_as_plain(model, samples)
    if family in VISION:
        grads = gradients(model, loss_of(model, batch_of(model, samples, "shared")))
        assert any(grad.any() for name, grad in grads.items() if name.startswith(FAMILIES[family].tower))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_batches(family: str) -> None:
    model = build(family, default_attention(family))
    some = 1 if family in VISION else 0
    assert_as_plain(model, [sample(family, 5, images=3 * some)])
    assert_as_plain(model, [sample(family, 6), sample(family, 7, text=1, chosen=9)])
    question = {"prompt": 3, "images": some}
    assert_as_plain(model, [sample(family, seed, chosen=seed, rejected=9 - seed, **question) for seed in (1, 2, 8)])


@pytest.mark.parametrize("family", ["gemma3_vlm", "qwen3_next"])
def test_a_model_that_cannot_share_has_separate_rows(family: str) -> None:
    assert_as_plain(build(family), samples_of(family), ["separate"])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma2"])
def test_logits_have_the_same_loss(family: str, kind: str) -> None:
    model = build(family, default_attention(family))
    samples = samples_of(family)
    batch = batch_of(model, samples, kind)
    logits = forward_logits(model, batch)
    assert logits.shape == (len(batch.labels), VOCAB)
    loss = mpo_loss(logits, batch.labels, ref_logp(samples), cu_seqlens=batch.cu_seqlens, shift=False).loss
    truth = plain_loss(model, samples)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, loss), gradients(model, truth))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_empty_responses_contribute_nothing(kind: str) -> None:
    model = build("internvl")
    empty = {"chosen": 0, "rejected": 0, "images": 1}
    samples = [
        sample("internvl", 1, images=1),
        sample("internvl", 2, **empty),
        sample("internvl", 3, rejected=0),
        sample("internvl", 4, chosen=0, prompt=1, images=1),
    ]
    assert_as_plain(model, samples, [kind])
    assert batch_of(model, samples, kind).projected_rows == 4 + 3 + 4 + 3
    alone = gradients(model, loss_of(model, batch_of(model, [sample("internvl", 2, **empty)], kind)))
    assert not any(grad.any() for grad in alone.values())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_without_rejected_responses_only_the_chosen_ones_run(family: str, kind: str) -> None:
    model = build(family)
    samples = samples_of(family)
    batch = batch_of(model, samples, kind, with_rejected=False)
    assert batch.cu_seqlens.shape == (2 * len(samples) + 1,)
    assert batch.projected_rows == sum(len(one.chosen_ids) for one in samples)
    assert batch.rows == (3 if kind == "shared" else 4)
    truth = plain_loss(model, samples, with_rejected=False)
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, loss), gradients(model, truth))


def test_dtype_of_pixels_is_that_of_the_model() -> None:
    model = build("llava", dtype=torch.bfloat16)
    for kind in LAYOUTS:
        batch = batch_of(model, samples_of("llava"), kind)
        with model_inputs(model, batch) as inputs:
            assert inputs["pixel_values"].dtype == torch.bfloat16
        out = forward(model, batch)
        assert out.hidden.dtype == torch.bfloat16
        assert out.hidden.isfinite().all()


def test_a_blank_image_runs_the_tower_and_changes_nothing() -> None:
    model = build("internvl")
    samples = [sample("internvl", 1), sample("internvl", 2, chosen=1, rejected=6)]
    blank = dataclasses.replace(sample("internvl", 3, images=2, chosen=0, rejected=0), name="blank")
    expected = gradients(model, plain_loss(model, samples))
    for kind, rows in (("shared", 3), ("separate", 6)):
        batch = batch_of(model, samples, kind, blank=blank)
        assert (batch.rows, batch.pairs) == (rows, 2)
        assert len(batch.inputs["pixel_values"]) == 2
        assert_same(gradients(model, loss_of(model, batch)), expected)
        chosen = batch_of(model, samples, kind, blank=blank, with_rejected=False)
        assert (chosen.rows, len(chosen.inputs["pixel_values"])) == (3, 2)
        loss = loss_of(model, chosen)
        torch.testing.assert_close(loss, plain_loss(model, samples, with_rejected=False), rtol=1e-5, atol=1e-6)
        with_image = [samples[0], sample("internvl", 4, images=1)]
        own, plain = (batch_of(model, with_image, kind, **one) for one in ({"blank": blank}, {}))
        assert own.rows == plain.rows
        assert len(own.inputs["pixel_values"]) == 1


def test_separate_rows_come_with_a_mask_of_their_padding() -> None:
    batch = collate([sample("llama", 1, chosen=6), sample("llama", 2, chosen=2)], "separate", pad_id=PAD)
    with model_inputs(build("llama"), batch) as inputs:
        mask = inputs["attention_mask"]
    assert torch.equal(mask, (batch.segments >= 0).long())
    assert not mask.all()


# What is computed.


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_prompts_are_computed_once(family: str) -> None:
    model = build(family, default_attention(family))
    samples = samples_of(family)
    images: list[int] = []
    positions: list[int] = []
    layers = next(module for name, module in model.named_modules() if name.endswith("layers") and "vis" not in name)
    layers[0].register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[0] * args[0].shape[1]))

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        pixels = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        images.append(len(pixels))

    if family in VISION:
        model.get_submodule(FAMILIES[family].tower).register_forward_pre_hook(count, with_kwargs=True)
    questions = [samples[0], samples[1], samples[3]]
    prompts = sum(len(one.prompt_ids) for one in questions)
    responses = sum(len(one.chosen_ids) + len(one.rejected_ids) for one in samples)

    shared = batch_of(model, samples, "shared")
    forward(model, shared)
    assert shared.rows == 3
    assert shared.tokens == prompts + responses
    assert positions == [shared.positions]
    longest = [
        len(samples[0].prompt_ids) + 6 + 3 + 2 + 7,
        len(samples[1].prompt_ids) + 6,
        len(samples[3].prompt_ids) + 6,
    ]
    assert shared.positions == 3 * max(longest)
    assert images == ([image_rows(questions)] if family in VISION else [])

    images.clear()
    positions.clear()
    separate = batch_of(model, samples, "separate")
    forward(model, separate)
    assert separate.rows == 2 * len(samples)
    assert separate.tokens == 2 * sum(len(one.prompt_ids) for one in samples) + responses
    assert positions == [separate.positions]
    assert images == ([image_rows(samples)] if family in VISION else [])
    for batch in (shared, separate):
        assert batch.projected_rows == len(batch.labels) == responses
        assert len(forward(model, batch).hidden) == responses


def test_positions_of_rotary_axes_run_no_vision_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2_5_vl")
    monkeypatch.setattr(model.model.visual, "forward", lambda *args, **kwargs: 1 / 0)
    batch = batch_of(model, samples_of("qwen2_5_vl"), "shared")
    assert batch.inputs["position_ids"].shape == (3, *batch.segments.shape)
    assert batch.inputs["position_ids"][1].lt(torch.arange(batch.segments.shape[1])).any()


class LargeOutputs(TorchDispatchMode):
    """Notes the outputs of all operators that are as wide as the vocabulary and have a row for each position."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor) and VOCAB in tensor.shape and tensor.numel() >= self.positions * VOCAB:
                self.found.append(f"{func}: {tuple(tensor.shape)}")
        return out


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", ["internvl", "gemma2"])
def test_logits_of_all_positions_never_exist(family: str, kind: str) -> None:
    model = build(family, default_attention(family))
    batch = batch_of(model, samples_of(family), kind)
    with LargeOutputs(batch.positions) as mode:
        loss_of(model, batch).backward()
    assert not mode.found
    with LargeOutputs(batch.positions) as mode:
        forward_logits(model, batch)
    assert mode.found  # it would have been seen


# Models as they are trained.


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_the_forward_goes_through_the_wrapper(group: None, family: str, wrapper: str) -> None:
    inner = build(family)
    samples = samples_of(family)
    truth = gradients(inner, plain_loss(inner, samples))
    if wrapper == "ddp":
        model: nn.Module = nn.parallel.DistributedDataParallel(inner)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in inner.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(inner, mesh=mesh, reshard_after_forward=False)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    for kind in LAYOUTS:
        ours = gradients(model, loss_of(model, batch_of(model, samples, kind)))
        assert_same({name: getattr(grad, "full_tensor", lambda g=grad: g)() for name, grad in ours.items()}, truth)
        assert len(calls) == 1
        calls.clear()
    assert check_shared_prefix(model, samples, pad_id=PAD, positions=prompt_positions(model)) is None


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_adapters_and_gradient_checkpointing_work(family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not a dependency of the package")
    inner = build(family)
    inner.gradient_checkpointing_enable()
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(inner, config)
    assert_as_plain(model, samples_of(family))
    assert check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=prompt_positions(model)) is None


def test_tokens_that_an_adapter_puts_before_rows_are_found() -> None:
    peft = pytest.importorskip("peft", reason="peft is not a dependency of the package")
    model = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "virtual tokens" in (supports_shared_prefix(model) or "")
    with pytest.raises(RuntimeError, match=r"one hidden state for each of \(8, \d+\) tokens, got shape"):
        forward(model, batch_of(model, samples_of("llama"), "separate"))


def test_autocast_within_the_model_sets_the_tolerance_of_the_check() -> None:
    model = build("internvl")
    inner_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(inner_forward)  # as accelerate does
    samples = samples_of("internvl")
    assert check_shared_prefix(model, samples, pad_id=PAD) is None
    reason = check_shared_prefix(model, samples, pad_id=PAD, tolerance=1e-6)
    assert reason is not None
    assert "the limit is 1e-06" in reason


def test_autocast_that_only_its_middle_shows_sets_the_tolerance_too() -> None:
    model = build("llama")
    inner_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(inner_forward)
    model.model.norm.register_forward_hook(lambda module, args, output: output.float())  # as accelerate does
    samples = samples_of("llama")
    assert check_shared_prefix(model, samples, pad_id=PAD) is None
    _, epsilon = label_logp_and_precision(model, collate(samples, "shared", pad_id=PAD))
    assert epsilon == torch.finfo(torch.bfloat16).eps


# Features of images that come in other forms.


FEATURES = torch.arange(6.0).view(3, 2)


class Reader(nn.Module):
    """Has the features of 3 images in one of the forms that transformers has had, and a forward that takes them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(VOCAB, 2)
        self.seen: list[int] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_image_features(self, pixel_values: torch.Tensor, scale: float = 1.0) -> Any:
        self.seen.append(len(pixel_values))
        features = FEATURES.repeat(len(pixel_values) // 3, 1)
        if self.form in ("tensor", "list"):
            return features if self.form == "tensor" else list(features.split(1))
        if self.form == "tensor and list":
            return features, [[features]]
        out = BaseModelOutputWithPooling(last_hidden_state=features)
        if self.form != "last":
            out["pooler_output"] = {"features": features} if self.form == "strange" else tuple(features.split(1))
        return out

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.get_image_features(pixel_values, scale=2.0)
        if self.form == "tensor and list":
            return found[0]
        if self.form in ("pooled", "strange"):
            found = found.pooler_output
        if self.form == "strange":
            return found["features"]
        return torch.cat(found) if self.form in ("list", "pooled") else found


class LastReader(Reader):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.get_image_features(pixel_values).last_hidden_state


@pytest.mark.parametrize("form", ["tensor", "list", "pooled", "last", "strange", "tensor and list"])
def test_features_of_images_may_have_several_forms(form: str) -> None:
    reader = LastReader(form) if form == "last" else Reader(form)
    batch = collate([sample("internvl", 1, images=3)], "separate", pad_id=PAD)
    is_known = form not in ("strange", "tensor and list")
    says = (
        nullcontext()
        if is_known
        else pytest.warns(UserWarning, match="Reader does not return image features in a known form.*twice")
    )
    with model_inputs(reader, batch) as inputs, says:
        found = reader(inputs["pixel_values"])
    assert torch.equal(found, torch.cat([FEATURES, FEATURES]))
    assert reader.seen == ([3] if is_known else [3, 6])
    reader.seen.clear()
    assert torch.equal(reader(batch.inputs["pixel_values"]), FEATURES)


def test_a_model_that_hides_its_features_is_given_the_images_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("internvl")
    samples = samples_of("internvl")
    truth = gradients(model, plain_loss(model, samples))
    kind = type(model.model)
    inner_forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: inner_forward(self, *args, **kwargs))
    with pytest.warns(UserWarning, match="InternVLForConditionalGeneration does not return image features"):
        loss = loss_of(model, batch_of(model, samples, "separate"))
    assert_same(gradients(model, loss), truth)


def test_no_patch_is_left_behind() -> None:
    model = build("internvl")
    batch = batch_of(model, samples_of("internvl"), "separate")
    forward(model, batch)
    model.model.language_model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, batch)
    assert "get_image_features" not in vars(model.model)


# The check.


def checked(model: nn.Module, family: str, **options: Any) -> str | None:
    return check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=prompt_positions(model), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes(family: str, dtype: torch.dtype) -> None:
    model = build(family, default_attention(family), dtype)
    assert supports_shared_prefix(model) is None
    assert checked(model, family) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3_vlm", "tokens of an image attend to each other in Gemma3Model"),
        ("qwen3_next", "layers of linear_attention"),
        ("mamba", "layers of linear_attention"),
    ],
)
def test_models_that_cannot_share_are_known(family: str, reason: str) -> None:
    assert set(REFUSED) >= {family}
    model = build(family, None)
    assert reason in (supports_shared_prefix(model) or "")
    assert reason in (checked(model, family) or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "'flash_attention_2' takes no such mask: set model.attention"),
        ({"_attn_implementation": "mine"}, "'mine' is not supported"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layers of chunked_attention"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "does not give the window"),
        ({"use_bidirectional_attention": True}, "not causal"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"cross_attention_layers": [1]}, "cross attention"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configs_that_cannot_share_are_known(change: dict[str, Any], reason: str) -> None:
    model = build("qwen2")
    for name, value in change.items():
        setattr(model.config, name, value)
        setattr(model.model.config, name, value)
    assert reason in (supports_shared_prefix(model) or "")


def test_attention_of_a_kind_that_is_not_known_is_refused() -> None:
    model = build("cohere")
    assert getattr(model.config, "layer_types", None) is None
    model.config.attention_types = [[["global", "local"], 1]]
    assert model.config is model.model.config
    assert "an unknown kind of attention" in (supports_shared_prefix(model) or "")


def test_each_token_sees_itself_and_padding_nothing_else() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 2, -1, -1, -1]], dtype=torch.int32)
    mask = masks.attention_masks(build("llama"), segments)
    assert mask.int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 0, 0, 1, 0],
                [1, 1, 0, 0, 1, 1],
            ]
        ],
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 0, 1, 0, 0, 0],
                [0, 0, 0, 1, 0, 0],
                [0, 0, 0, 0, 1, 0],
                [0, 0, 0, 0, 0, 1],
            ]
        ],
    ]


def test_a_recurrent_model_is_known_whatever_its_config_says() -> None:
    model = build("qwen2")
    type(model.model)._is_stateful = True
    try:
        assert "Qwen2Model has recurrent layers" in (supports_shared_prefix(model) or "")
    finally:
        del type(model.model)._is_stateful


def test_shared_rows_are_refused_where_there_is_no_mask_for_them() -> None:
    model = build("qwen3_next")
    with pytest.raises(ValueError, match=r'layout must be "separate".*got "shared".*linear_attention'):
        forward(model, batch_of(model, samples_of("qwen3_next"), "shared"))


def leaking(inner: nn.Module, segments: torch.Tensor) -> Any:
    return MASKS(inner, segments.clamp(max=1))


def by_row(inner: nn.Module, segments: torch.Tensor) -> Any:
    """Counts the distance of sliding attention in the row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "sequence_positions", lambda s: torch.arange(s.shape[1]).expand_as(s))
        return MASKS(inner, segments)


def without_window(inner: nn.Module, segments: torch.Tensor) -> Any:
    built = MASKS(inner, segments)
    full = built["full_attention"] if isinstance(built, dict) else built
    return {"full_attention": full, "sliding_attention": full}


MASKS = masks.attention_masks


@pytest.mark.parametrize(
    ("family", "build_masks"),
    [
        ("llama", leaking),
        ("qwen2_5_vl", leaking),
        ("gemma2", by_row),
        ("mistral", by_row),
        ("gemma2", without_window),
        ("qwen2-sliding", without_window),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_check_finds_a_wrong_mask(
    monkeypatch: pytest.MonkeyPatch, family: str, build_masks: Callable[..., Any], dtype: torch.dtype
) -> None:
    model = build(family, default_attention(family), dtype)
    monkeypatch.setattr(forward_module, "attention_masks", build_masks)
    assert "differ by" in (checked(model, family) or "")


def test_the_check_finds_a_lost_window_that_no_sequence_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2", "eager")
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        config.sliding_window = 50
    assert checked(model, "gemma2") is None
    monkeypatch.setattr(forward_module, "attention_masks", without_window)
    assert "differ by" in (checked(model, "gemma2") or "")
    assert model.config.sliding_window == 50


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_the_check_finds_wrong_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)

    def shifted(batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        if batch.layout == "shared":
            batch.inputs["position_ids"][..., batch.segments == 2] += 3
        return batch

    monkeypatch.setattr(Batch, "to", shifted)
    assert "differ by" in (checked(model, family) or "")


def test_the_check_finds_a_model_that_takes_no_mask() -> None:
    model = build("llama")
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    assert "differ by" in (checked(model, "llama") or "")


def test_the_check_measures_what_a_leak_would_change() -> None:
    reason = checked(build("llama"), "llama", tolerance=1e-12)
    assert reason is not None
    ours, leak = (float(re.search(rf"{words} ([^ ;]+)", reason)[1]) for words in ("differ by", "change them by"))  # type: ignore[index]
    assert ours < 1e-4
    assert leak > 0.1


def test_the_check_leaves_nothing_behind_where_the_model_raises() -> None:
    model = build("llama")
    embed = model.get_input_embeddings()
    model.model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checked(model, "llama")
    assert not embed._forward_pre_hooks
    assert model.training


def test_the_check_is_without_dropout() -> None:
    model = build("llama")
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: nn.functional.dropout(output, 0.5, module.training)
    )
    assert checked(model, "llama") is None


def test_the_check_says_what_the_model_has_raised() -> None:
    model = build("llama")

    def refuse(layer: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["attention_mask"] is not None and kwargs["attention_mask"].shape[0] == 3:
            raise ValueError("only my own masks")

    model.model.layers[0].register_forward_pre_hook(refuse, with_kwargs=True)
    assert "ValueError in the forward of LlamaForCausalLM: only my own masks" in (checked(model, "llama") or "")


def test_the_check_finds_numbers_that_are_not_finite() -> None:
    model = build("llama")

    def spoil(layer: nn.Module, args: Any, output: torch.Tensor) -> Any:
        return output * torch.nan if output.shape[0] == 3 else output

    model.model.norm.register_forward_hook(spoil)
    assert "differ by nan" in (checked(model, "llama") or "")


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = build("qwen2_5_vl-sliding")
    model.model.visual.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    windows = [getattr(getattr(module, "config", None), "sliding_window", None) for module in model.modules()]
    assert WINDOW in windows
    random = torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert checked(model, "qwen2_5_vl-sliding") is None
    assert [module.training for module in model.modules()] == modes
    assert windows == [getattr(getattr(module, "config", None), "sliding_window", None) for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), random)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert model.model.rope_deltas is None


def test_the_check_of_nothing_passes() -> None:
    model = build("llama")
    nothing = [sample("llama", 1, chosen=0, rejected=0)]
    assert check_shared_prefix(model, nothing, pad_id=PAD) is None


# Collation.


def test_the_rows_of_both_layouts() -> None:
    one = sample("llama", 1, prompt=1, text=3, chosen=2, rejected=1)
    two = sample("llama", 2, prompt=2, text=2, chosen=1, rejected=3)
    three = sample("llama", 3, prompt=1, text=3, chosen=1, rejected=1)
    batch = collate([one, two, three], "shared", pad_id=PAD)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4], [0, 0, 1, 2, 2, 2, -1, -1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 3, 3], [0, 1, 2, 2, 3, 4, 0, 0]]
    assert batch.inputs["input_ids"][0].tolist() == torch.cat(
        [one.prompt_ids, one.chosen_ids, one.rejected_ids, three.chosen_ids, three.rejected_ids]
    ).tolist()  # fmt: skip
    assert batch.inputs["input_ids"][1, 6:].tolist() == [PAD, PAD]
    assert batch.index.tolist() == [2, 3, 9, 2, 2, 9, 11, 12, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 5, 8, 9]
    labels = [one.chosen_ids, two.chosen_ids, three.chosen_ids, one.rejected_ids, two.rejected_ids, three.rejected_ids]
    assert torch.equal(batch.labels, torch.cat(labels))
    assert batch.names == ("file:1", "file:2", "file:3")
    assert batch.keys == ("key1", "key2", "key3")
    assert batch.digests == ("digest1", "digest2", "digest3")
    assert (batch.pairs, batch.rows, batch.positions, batch.tokens, batch.projected_rows) == (3, 2, 16, 14, 9)

    batch = collate([one, two], "separate", pad_id=PAD)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, -1, -1], [0, 0, 0, 1, -1], [0, 0, 1, 1, 1]]
    assert set(batch.inputs) == {"input_ids"}
    assert batch.index.tolist() == [2, 3, 6, 12, 16, 17, 18]
    assert torch.equal(
        batch.labels, torch.cat([one.chosen_ids, two.chosen_ids, one.rejected_ids, two.rejected_ids])
    )  # fmt: skip


def test_collation_can_go_to_a_worker_and_its_batch_come_back() -> None:
    model = build("qwen2_vl")
    samples = samples_of("qwen2_vl")
    work = partial(collate, layout="shared", pad_id=PAD, positions=prompt_positions(model))
    pickled = pickle.dumps(work)
    assert len(pickled) < 20_000  # no weights
    batch = pickle.loads(pickle.dumps(pickle.loads(pickled)(samples)))
    assert_same(
        gradients(model, loss_of(model, batch)),
        gradients(model, loss_of(model, batch_of(model, samples, "shared"))),
        0,
    )


def test_to_moves_all_but_the_labels() -> None:
    batch = collate([sample("internvl", 1, images=1)], "shared", pad_id=PAD)
    moved = batch.to("meta")
    tensors = [moved.segments, moved.index, moved.cu_seqlens, *moved.inputs.values()]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.labels is batch.labels
    assert dataclasses.replace(moved, inputs={}).names == batch.names


def test_image_inputs_of_unequal_sizes_are_padded_with_zeros() -> None:
    samples = [sample("smolvlm", 1, images=2), sample("smolvlm", 2), sample("smolvlm", 3, images=3)]
    batch = collate(samples, "shared", pad_id=PAD)
    assert batch.inputs["pixel_values"].shape == (2, 3, 1, 8, 8)
    assert torch.equal(batch.inputs["pixel_values"][0, :2], samples[0].image_inputs["pixel_values"][0])
    assert not batch.inputs["pixel_values"][0, 2].any()


def changed(one: Sample, **values: Any) -> Sample:
    return dataclasses.replace(one, **values)


FIRST = sample("internvl", 1, images=1)


@pytest.mark.parametrize(
    ("samples", "kind", "error", "message"),
    [
        ([], "shared", ValueError, "samples must hold at least one sample, got none"),
        ([FIRST], "packed", ValueError, "layout must be one of shared, separate, got 'packed'"),
        (
            [changed(FIRST, chosen_ids=FIRST.chosen_ids.int())],
            "shared",
            TypeError,
            "chosen_ids must be int64, got torch.int32 in file:1",
        ),
        (
            [changed(FIRST, prompt_ids=FIRST.prompt_ids.unsqueeze(0))],
            "shared",
            ValueError,
            r"prompt_ids must have one axis, got shape \(1, 6\) in file:1",
        ),
        (
            [changed(FIRST, prompt_ids=FIRST.prompt_ids[:0])],
            "separate",
            ValueError,
            "prompt_ids must hold a token to predict the response from, got none in file:1",
        ),
        (
            [changed(FIRST, token_inputs={"types": torch.zeros(2)})],
            "separate",
            ValueError,
            r"types must have the shape of prompt_ids, \(6,\), got \(2,\) in file:1",
        ),
        (
            [FIRST, changed(FIRST, prompt_ids=FIRST.prompt_ids[1:], name="other")],
            "shared",
            ValueError,
            "one prompt_key must have one prompt, got two for 'prompt1': in file:1 and in other",
        ),
        (
            [FIRST, changed(FIRST, image_inputs={"pixel_values": torch.zeros(2, 1, 8, 8)}, name="other")],
            "shared",
            ValueError,
            "one prompt_key must have one prompt, got two for 'prompt1': in file:1 and in other",
        ),
        (
            [FIRST, changed(FIRST, image_inputs={"pixels": torch.zeros(1)}, name="other")],
            "separate",
            ValueError,
            r"image_inputs must have the same names.*\['pixel_values'\] in file:1 and \['pixels'\] in other",
        ),
        (
            [FIRST, changed(FIRST, image_inputs={"pixel_values": torch.zeros(1, 8)})],
            "separate",
            ValueError,
            r"pixel_values must have the same axes.*got \(1, 1, 8, 8\) torch.float32, \(1, 8\)",
        ),
    ],
)
def test_bad_samples_are_refused(samples: list[Sample], kind: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collate(samples, kind, pad_id=PAD)


def test_missing_positions_are_refused() -> None:
    model = build("qwen2_vl")
    samples = samples_of("qwen2_vl")
    for kind in LAYOUTS:
        with pytest.raises(ValueError, match=r"positions of Qwen2VLForConditionalGeneration, got none: collate"):
            forward(model, collate(samples, kind, pad_id=PAD))
    blind = [changed(one, token_inputs={}) for one in samples]
    with pytest.raises(ValueError, match=r"must hold mm_token_type_ids.*Qwen2VLModel.*got \[\] in file:1"):
        batch_of(model, blind, "shared")
