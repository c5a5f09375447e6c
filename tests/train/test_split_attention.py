"""Compares split attention with a dense mask and with separate rows. Loss and gradients must be equal.

Split attention handles a row with several responses to one prompt, without building a mask.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformers
from families import FAMILIES, PAD, WINDOW, build, sample, samples_of, text_model
from flash_stand_in import FlashAttention
from single_forwards import VISION, assert_same, batch_of, gradients, loss_of, plain_loss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_ext.train import forward as forward_module
from mpo_ext.train import split_attention
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward
from mpo_ext.train.masks import attention_masks, prompt_positions, use_split_attention
from mpo_ext.train.shared_prefix import SharedLayout, check_shared_prefix, supports_shared_prefix
from mpo_ext.train.split_attention import RowSegments, token_blocks

SPLIT = [family for family in FAMILIES if family != "gemma2"]  # sdpa in transformers does not support its softcap
FLASH = [family for family in FAMILIES if family not in VISION or family in ("internvl", "qwen2_5_vl-sliding")]


def several_pairs(family: str, count: int) -> list[Sample]:
    """Returns pairs of unequal lengths: ``count`` pairs that share a prompt, and two pairs with other prompts."""
    some = 1 if family in VISION else 0
    shared = [
        sample(family, seed, prompt=3, text=9, chosen=1 + 3 * seed % 7, rejected=6 - seed, images=2 * some)
        for seed in range(count)
    ]
    return [*shared, sample(family, 21, text=2, chosen=8, rejected=2), sample(family, 22, text=7, images=some)]


def assert_as_dense(model: nn.Module, samples: list[Sample], tol: float) -> None:
    expected_loss = loss_of(model, batch_of(model, samples, "masked"))
    expected = gradients(model, expected_loss)
    for layout in ("shared", "packed"):
        loss = loss_of(model, batch_of(model, samples, layout))
        torch.testing.assert_close(loss, expected_loss, rtol=tol, atol=0)
        assert_same(gradients(model, loss), expected, tol)


@pytest.mark.parametrize("queries", [2, split_attention.WINDOW_QUERIES])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", SPLIT)
def test_loss_and_gradients_are_those_of_the_dense_mask(
    family: str, count: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_attention, "WINDOW_QUERIES", queries)
    assert_as_dense(build(family, "split sdpa", torch.float64), several_pairs(family, count), 1e-12)


@pytest.mark.parametrize("family", ["llama", "internvl", "gemma3"])
def test_masks_that_torch_aligns_to_the_last_key_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_attention, "_has_aligned_kernels", lambda query, attend: True)  # as on a GPU
    assert_as_dense(build(family, "split sdpa", torch.float64), several_pairs(family, 2), 1e-12)


def test_autocast_reaches_queries_and_keys_of_another_dtype_than_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_attention, "_has_aligned_kernels", lambda query, attend: True)
    model = build("llama", "split sdpa")
    dtypes = set()

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        dtypes.update({query.dtype, key.dtype, value.dtype})
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(split_attention, "F", SimpleNamespace(scaled_dot_product_attention=note))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch_of(model, samples_of("llama"), "shared"))
    assert loss.isfinite()
    assert dtypes == {torch.bfloat16}


#: Models whose norms compute in the dtype of the model: those of other families round float64 to float32.
LAYER_NORM = {
    "phi": partial(text_model, "Phi"),
    "starcoder2": partial(text_model, "Starcoder2", sliding_window=None),
    "starcoder2, a short window": partial(text_model, "Starcoder2", sliding_window=3),
    "starcoder2, a window as long as a prompt": partial(text_model, "Starcoder2", sliding_window=9),
    "starcoder2, a long window": partial(text_model, "Starcoder2", sliding_window=13),
    "starcoder2, four heads": partial(text_model, "Starcoder2", num_attention_heads=4, num_key_value_heads=2),
}


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("name", LAYER_NORM)
def test_loss_and_gradients_are_those_of_separate_rows(name: str, dtype: torch.dtype, tol: float) -> None:
    torch.manual_seed(0)
    model = LAYER_NORM[name]().to(dtype)
    model.set_attn_implementation("sdpa")
    assert use_split_attention(model) is None
    for count in (1, 3, 4):
        samples = several_pairs("llama", count)
        expected_loss = loss_of(model, batch_of(model, samples, "separate"))
        expected = gradients(model, expected_loss)
        for layout in ("shared", "packed"):
            loss = loss_of(model, batch_of(model, samples, layout))
            torch.testing.assert_close(loss, expected_loss, rtol=tol, atol=0)
            assert_same(gradients(model, loss), expected, tol)
        assert_as_dense(model, samples, tol)


@pytest.mark.parametrize("family", SPLIT)
def test_loss_and_gradients_of_families_are_those_of_separate_rows(family: str) -> None:
    model = build(family, "split sdpa", torch.float64)
    samples = several_pairs(family, 3)
    expected_loss = loss_of(model, batch_of(model, samples, "separate"))
    expected = gradients(model, expected_loss)
    for layout in ("shared", "packed"):
        loss = loss_of(model, batch_of(model, samples, layout))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        assert_same(gradients(model, loss), expected, 1e-12)


@pytest.mark.parametrize("queries", [2, split_attention.WINDOW_QUERIES])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_vlm", "qwen2_5_vl-sliding"])
def test_eager_attention_is_split_too(family: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_attention, "WINDOW_QUERIES", queries)
    model = build(family, "split eager", torch.float64)
    assert model.get_decoder().config._attn_implementation == "mpo_split_eager"
    assert_as_dense(model, several_pairs(family, 2), 1e-12)
    model = build(family, "split eager")
    for layout in get_args(SharedLayout):
        positions = prompt_positions(model)
        assert check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=positions, layout=layout) is None


class Operators(TorchDispatchMode):
    """Records the names of the operators that run, and the shapes of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.shapes |= {
            tuple(t.shape) for t in (out if isinstance(out, (list, tuple)) else (out,)) if hasattr(t, "shape")
        }
        return out

    def squares(self, size: int) -> list[tuple[int, ...]]:
        return [shape for shape in self.shapes if sum(axis >= size for axis in shape) > 1]


def test_eager_attention_of_rows_allocates_no_mask_of_the_row() -> None:
    model = build("gemma2", "split eager")
    for layout in ("shared", "packed"):
        batch = batch_of(model, [sample("gemma2", seed, text=70, chosen=12, rejected=11) for seed in (1, 2)], layout)
        with Operators() as operators:
            loss_of(model, batch).backward()
        assert not operators.squares(70 + 12 + 1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3_vlm", "qwen2-sliding", "internvl"])
def test_no_mask_of_a_row_is_allocated(family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_attention, "WINDOW_QUERIES", 16)
    model = build(family, "split sdpa")
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prompt: Any = {"prompt": 1, "text": 70, "images": 2 if family in VISION else 0}
    samples = [
        sample(family, 1, chosen=9, rejected=11, **prompt),
        sample(family, 2, chosen=13, rejected=1, **prompt),
    ]
    batches = {layout: batch_of(model, samples, layout) for layout in ("shared", "packed", "masked")}
    found = {}
    for layout, batch in batches.items():
        with Operators() as found[layout]:
            loss_of(model, batch).backward()
    for layout in ("shared", "packed"):
        assert not found[layout].squares(70)  # not even the square of the prompt
    assert found["masked"].squares(70 + 9 + 11 + 13 + 1)
    names = found["shared"].names
    assert "_scaled_dot_product_flash_attention_for_cpu" in names
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not any("attention_math" in name for name in names)


def test_recomputed_layers_attend_in_the_same_way() -> None:
    samples = several_pairs("gemma3", 2)
    plain, recomputed = (build("gemma3", "split sdpa") for _ in range(2))
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [loss_of(model, batch_of(model, samples, "shared")) for model in (plain, recomputed)]
    grads = [gradients(model, loss) for model, loss in zip((plain, recomputed), losses, strict=True)]
    assert torch.equal(*losses)
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_a_row_without_a_response_and_one_without_tokens_attend_to_nothing_else() -> None:
    model = build("llama", "split sdpa")
    samples = [
        sample("llama", 1, chosen=0, rejected=0),
        sample("llama", 2, text=0, chosen=0, rejected=0),
        sample("llama", 3, chosen=0, rejected=4),
        sample("llama", 4, prompt=3, chosen=2, rejected=3),
    ]
    batch = batch_of(model, samples, "shared")
    assert batch.segment_lengths == (((5,),), ((),), ((5, 4, 2, 3),))
    assert_as_dense(model, samples, 1e-6)


def test_segments_become_calls() -> None:
    rows = RowSegments((((2, 3, 1, 2),), ((3, 1),), ((),)), 8, torch.device("cpu"))
    assert rows.sizes == [5, 1, 2, 0, 4, 4, 8]
    assert [part.size + part.prompt_length for part in rows.parts if not part.is_padding] == [5, 3, 4, 4]
    assert [offsets.tolist() for offsets in rows.cu_seqlens] == [[0, 5, 6, 8, 12], [0, 5, 8, 12, 16]]
    assert rows.longest == (5, 5)
    packed = RowSegments((((2, 3, 1), (), (4,), (3, 1, 2)),), 16, torch.device("cpu"))
    assert packed.sizes == [5, 1, 4, 4, 2, 0]
    assert [part.prompt for part in packed.parts] == [None, 0, None, None, 3, None]
    assert [offsets.tolist() for offsets in packed.cu_seqlens] == [[0, 5, 6, 10, 14, 16], [0, 5, 8, 12, 16, 21]]
    assert packed.longest == (5, 5)


def test_runs_of_image_tokens_become_blocks() -> None:
    assert token_blocks(torch.tensor([1, 1, 0, 1, 0, 0])) == ((0, 2), (3, 4))
    assert token_blocks(torch.tensor([0, 2, 0, 0, 1, 1])) == ((4, 6),)
    assert token_blocks(torch.tensor([0, 0])) == ()
    samples = [sample("gemma3_vlm", 1, images=2), sample("gemma3_vlm", 2)]
    batch = batch_of(build("gemma3_vlm"), samples, "shared")
    assert [[len(blocks) for blocks in row] for row in batch.image_blocks] == [[2], [0]]
    assert batch_of(build("internvl"), [sample("internvl", 1, images=2)], "shared").image_blocks == ()


def test_rows_without_segments_have_the_attention_of_transformers() -> None:
    ids = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    for family, attention in (("llama", "sdpa"), ("gemma3", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager")):
        ours, theirs = build(family, f"split {attention}"), build(family, attention)
        for options in ({"attention_mask": mask}, {}):
            assert torch.equal(ours(ids, **options).logits, theirs(ids, **options).logits)
        generated = [model.eval().generate(ids, max_new_tokens=4, do_sample=False) for model in (ours, theirs)]
        assert torch.equal(*generated)


def test_the_name_of_split_attention_is_not_saved(tmp_path: Path) -> None:
    model = build("internvl", "split sdpa")
    assert model.model.language_model.config._attn_implementation == "mpo_split_sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert "mpo_split" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.language_model.config._attn_implementation == "sdpa"


def test_models_without_split_attention_say_why() -> None:
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    assert use_split_attention(model) == "attention 'flex_attention' has no split form"
    config = transformers.FalconConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    falcon = transformers.FalconForCausalLM(config)
    falcon.set_attn_implementation("sdpa")
    assert use_split_attention(falcon) == "attention of FalconModel does not go through AttentionInterface"
    assert falcon.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"row_segments": None}, "must pass row_segments on to LlamaAttention"),
        ({"attention_mask": None}, "must pass the marker in place of a mask on to LlamaAttention"),
        ({"softcap": 3.0}, "attention must be without softcap"),
        ({"s_aux": torch.ones(2)}, "attention must be without s_aux"),
        ({"is_causal": False}, "attention must be causal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_model_that_changes_what_attention_needs_is_refused(changed: dict[str, Any], message: str) -> None:
    model = build("llama", "split sdpa")
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda layer, args, kwargs: (args, {**kwargs, **changed}), with_kwargs=True
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        forward(model, batch_of(model, samples_of("llama"), "shared"))
    if "softcap" not in changed:  # which separate rows refuse, too
        assert message in (check_shared_prefix(model, samples_of("llama"), pad_id=PAD) or "")


def test_a_layer_that_takes_the_marker_as_a_mask_raises() -> None:
    model = build("llama", "split sdpa")
    model.model.layers[1].self_attn.config = type(model.config)(attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match=r"expand|size"):
        forward(model, batch_of(model, samples_of("llama"), "shared"))


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        *(
            (family, mistake)
            for family in ("llama", "qwen2_5_vl", "gemma3")
            for mistake in ("no prompt", "other prompt")
        ),
        ("gemma3", "no window"),
        ("mistral", "no window"),
        ("qwen2-sliding", "no window"),
    ],
)
def test_the_check_finds_mistakes(
    family: str, mistake: str, layout: SharedLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> RowSegments:
        rows = RowSegments(*args)
        change = {"prompt_length": 0} if mistake == "no prompt" else {"prompt": 0}
        rows.parts = [part if part.prompt is None else part._replace(**change) for part in rows.parts]
        return rows

    model = build(family, "split sdpa")
    if mistake == "no window":
        monkeypatch.setattr(
            forward_module, "mask_markers", lambda plan, rows, device: MARKERS(plan._replace(window=99), rows, device)
        )
    else:
        monkeypatch.setattr(forward_module, "RowSegments", wrong)
    positions = prompt_positions(model)
    reason = check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=positions, layout=layout)
    assert "differ by" in (reason or "")
    masked = check_shared_prefix(model, samples_of(family), pad_id=PAD, positions=positions, layout="masked")
    assert masked is None


def test_the_check_of_packed_rows_finds_a_prompt_that_attends_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(lengths: Any, *args: Any) -> RowSegments:
        return RowSegments([[tuple(size for prompt in row for size in prompt)] for row in lengths], *args)

    model = build("llama", "split sdpa")
    for samples in ([sample("llama", 1)], [sample("llama", seed, prompt=1) for seed in (1, 2)], samples_of("llama")):
        assert check_shared_prefix(model, samples, pad_id=PAD, layout="packed") is None
        with monkeypatch.context() as patch:
            patch.setattr(forward_module, "RowSegments", joined)
            assert "differ by" in (check_shared_prefix(model, samples, pad_id=PAD, layout="packed") or "")


def test_models_without_split_attention_are_not_packed() -> None:
    model = build("llama", "eager")
    assert "LlamaForCausalLM has no split attention" in (
        check_shared_prefix(model, samples_of("llama"), pad_id=PAD, layout="packed") or ""
    )
    with pytest.raises(ValueError, match=r'must be "shared" or "masked" for this model, got "packed"'):
        forward(model, batch_of(model, samples_of("llama"), "packed"))


MARKERS = forward_module.mask_markers


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    return FlashAttention(monkeypatch)


def flash_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(family, None, dtype)
    decoder = model.get_decoder()
    decoder.config._attn_implementation = "flash_attention_2"  # transformers would look for a GPU
    assert use_split_attention(model) is None
    assert decoder.config._attn_implementation == "mpo_split_flash_attention_2"
    return model


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("family", FLASH)
def test_flash_attention_is_called_with_sequences_of_unequal_lengths(
    flash: FlashAttention, family: str, layout: str
) -> None:
    model = flash_model(family, torch.float64)
    assert supports_shared_prefix(model) is None
    samples = several_pairs(family, 2)
    truth = build(family, "eager" if family == "gemma2" else "sdpa", torch.float64)
    expected_loss = loss_of(truth, batch_of(truth, samples, "masked"))
    loss = loss_of(model, batch := batch_of(model, samples, layout))
    tol = 1e-6 if family == "gemma2" else 1e-12  # eager attention computes its softmax in float32
    torch.testing.assert_close(loss, expected_loss, rtol=tol, atol=0)
    assert_same(gradients(model, loss), gradients(truth, expected_loss), tol)
    prompts = [prompt for row in batch.segment_lengths for prompt in row]
    assert [len(prompt) for prompt in prompts] == [5, 3, 3]
    assert len(flash.calls) == model.get_decoder().config.num_hidden_layers  # one call for all sequences of a layer
    for call in flash.calls:
        assert call["causal"]
        assert call["q"] == [size for prompt, *sizes in prompts for size in (prompt + sizes[0], *sizes[1:])]
        assert call["k"] == [prompt + size for prompt, *sizes in prompts for size in sizes]
        assert sum(call["q"]) == batch.tokens
    windows = {call["window"][0] for call in flash.calls}
    full = set() if family == "mistral" else {-1}
    has_windows = family == "mistral" or family.startswith("gemma") or "sliding" in family
    assert windows == (full | {WINDOW - 1} if has_windows else full)
    assert {call["softcap"] for call in flash.calls} == ({3.0} if family == "gemma2" else {0.0})


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "internvl"])
def test_the_check_passes_with_flash_attention(flash: FlashAttention, family: str) -> None:
    model = flash_model(family)
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    for layout in get_args(SharedLayout)[:2]:
        assert check_shared_prefix(model, samples_of(family), pad_id=PAD, layout=layout) is None
    assert windows == [getattr(module, "sliding_window", None) for module in model.modules()]


def test_flash_attention_has_no_blocks_of_images(flash: FlashAttention) -> None:
    model = flash_model("gemma3_vlm")
    with pytest.raises(ValueError, match="attention of images must be causal for flash-attn, got Gemma3Attention"):
        forward(model, batch_of(model, samples_of("gemma3_vlm"), "shared"))


def test_flash_attention_has_no_dense_mask(flash: FlashAttention) -> None:
    model = flash_model("llama")
    with pytest.raises(ValueError, match=r'"separate" for this model, got "masked": .*takes no such mask'):
        forward(model, batch_of(model, samples_of("llama"), "masked"))
    with pytest.raises(ValueError, match="takes no such mask"):
        attention_masks(model, torch.zeros(1, 3, dtype=torch.int32))
    model.config._attn_implementation = "flash_attention_2"
    assert "takes no such mask" in (supports_shared_prefix(model) or "")
    separate = loss_of(model, batch_of(model, samples_of("llama"), "separate"))
    torch.testing.assert_close(separate, plain_loss(model, samples_of("llama")), rtol=1e-5, atol=1e-6)


def test_flash_attention_that_aligns_to_the_first_key_is_refused(
    flash: FlashAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_flash_attention_utils as utils

    monkeypatch.setattr(utils, "flash_attn_supports_top_left_mask", lambda: True)
    model = build("llama", None)
    model.config._attn_implementation = "flash_attention_2"
    assert "aligns its causal mask to the first key" in (use_split_attention(model) or "")
