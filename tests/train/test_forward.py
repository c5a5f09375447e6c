"""Tests the forward of a batch: loss and gradients equal those of separate forwards.

Also tests that a row with both responses of a pair computes the images and the prompt once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, PAD, VOCAB, build, image_rows, sample, samples_of
from single_forwards import (
    CASES,
    LAYOUTS,
    VISION,
    assert_as_plain,
    assert_same,
    batch_of,
    default_attention,
    gradients,
    loss_of,
    plain_loss,
    ref_logp,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mpo_ext import mpo_loss
from mpo_ext.train.batch import collate
from mpo_ext.train.forward import forward, forward_logits, model_inputs
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.shared_prefix import check_shared_prefix


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
    model = build(family, "eager" if family == "gemma2" else "split sdpa")
    some = 1 if family in VISION else 0
    assert_as_plain(model, [sample(family, 5, images=3 * some)])
    assert_as_plain(model, [sample(family, 6), sample(family, 7, text=1, chosen=9)])
    question = {"prompt": 3, "images": some}
    assert_as_plain(model, [sample(family, seed, chosen=seed, rejected=9 - seed, **question) for seed in (1, 2, 8)])


@pytest.mark.parametrize("family", ["qwen3_next"])
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
    """Records each operator that returns a tensor of at least the size of all logits, with a vocabulary axis."""

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
    assert mode.found  # the mode detects them


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("family", "attention"), [("internvl", "split sdpa"), ("qwen2_vl", "sdpa")])
def test_the_forward_goes_through_the_wrapper(group: None, family: str, attention: str, wrapper: str) -> None:
    inner = build(family, attention)
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


@pytest.mark.parametrize("attention", ["sdpa", "split sdpa"])
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "gemma3"])
def test_adapters_and_gradient_checkpointing_work(family: str, attention: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not a dependency of the package")
    inner = build(family, attention)
    inner.gradient_checkpointing_enable()
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(inner, config)
    assert_as_plain(model, samples_of(family))
    assert check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=prompt_positions(model)) is None


FEATURES = torch.arange(6.0).view(3, 2)


class Reader(nn.Module):
    """A model whose ``get_image_features`` returns features in a form such as "tensor" or "list".

    mpo_ext supports all forms except "strange" and "tensor and list".
    """

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


def test_missing_positions_are_refused() -> None:
    model = build("qwen2_vl")
    samples = samples_of("qwen2_vl")
    for kind in LAYOUTS:
        with pytest.raises(ValueError, match=r"positions of Qwen2VLForConditionalGeneration, got none: collate"):
            forward(model, collate(samples, kind, pad_id=PAD))
    blind = [dataclasses.replace(pair, token_inputs={}) for pair in samples]
    with pytest.raises(ValueError, match=r"must hold mm_token_type_ids.*Qwen2VLModel.*got \[\] in file:1"):
        batch_of(model, blind, "shared")
