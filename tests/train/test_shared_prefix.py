"""Tests rows with a shared prompt: which models support them, and what the check of the first pairs detects."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import PAD, WINDOW, build, sample, samples_of
from single_forwards import (
    CASES,
    batch_of,
    default_attention,
)
from torch import nn

from mpo_ext.train import forward as forward_module
from mpo_ext.train import masks, shared_prefix
from mpo_ext.train.batch import Batch, collate
from mpo_ext.train.forward import forward
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.shared_prefix import check_shared_prefix, label_logp_and_precision, supports_shared_prefix


def checked(model: nn.Module, family: str, **options: Any) -> str | None:
    return check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=prompt_positions(model), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "attention"), [case for case in CASES if case[1] != "eager"] + [("gemma2", "eager")]
)
def test_the_check_passes(family: str, attention: str, dtype: torch.dtype) -> None:
    model = build(family, attention, dtype)
    assert supports_shared_prefix(model) is None
    assert checked(model, family) is None


def test_with_from_logits_the_model_computes_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """``hidden_and_head`` does not support some models. Such models are checked and trained from their logits."""
    model = build("llama", None)
    batch = batch_of(model, samples_of("llama"), "shared")
    expected, logp = (label_logp_and_precision(model, batch, from_logits)[0] for from_logits in (False, True))
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no head")

    monkeypatch.setattr(forward_module, "hidden_and_head", refuse)
    assert checked(model, "llama", from_logits=True) is None
    with pytest.raises(RuntimeError, match="no head"):
        checked(model, "llama")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "layers of linear_attention"),  # without split attention
        ("mamba", "layers of linear_attention"),
        ("jamba", "layers of linear_attention"),
    ],
)
def test_models_that_cannot_share_are_known(family: str, reason: str) -> None:
    model = build(family, None)
    assert reason in (supports_shared_prefix(model) or "")
    assert reason in (checked(model, family) or "")


def test_images_whose_tokens_attend_to_each_other_in_another_way_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3_vlm")
    assert supports_shared_prefix(model) is None
    monkeypatch.setattr(shared_prefix, "has_image_blocks", lambda inner: False)  # as for Gemma 4
    assert supports_shared_prefix(model) == "tokens of an image attend to each other in Gemma3Model"


@pytest.mark.parametrize("attention", ["sdpa", "split sdpa", "eager"])
def test_the_check_finds_images_whose_tokens_do_not_attend_to_each_other(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gemma3_vlm", attention)
    assert checked(model, "gemma3_vlm") is None
    monkeypatch.setattr(forward_module, "has_image_blocks", lambda inner: False)
    assert "differ by" in (checked(model, "gemma3_vlm") or "")


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
    """Builds wrong masks for sliding-window attention. The masks count distances in the row, not in the sequence.

    In a row with two responses, the second response is then too far from the prompt.
    """
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
    _, epsilon = label_logp_and_precision(model, collate(samples, "shared", pad_id=PAD))
    assert epsilon == torch.finfo(torch.bfloat16).eps
    # A negative limit cannot hold: on some CPUs both layouts round bfloat16 alike and do not differ at all.
    reason = check_shared_prefix(model, samples, pad_id=PAD, tolerance=-1.0)
    assert reason is not None
    assert "the limit is -1" in reason


def test_autocast_that_only_its_middle_shows_sets_the_tolerance_too() -> None:
    model = build("llama")
    inner_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(inner_forward)
    model.model.norm.register_forward_hook(lambda module, args, output: output.float())  # as accelerate does
    samples = samples_of("llama")
    assert check_shared_prefix(model, samples, pad_id=PAD) is None
    _, epsilon = label_logp_and_precision(model, collate(samples, "shared", pad_id=PAD))
    assert epsilon == torch.finfo(torch.bfloat16).eps
