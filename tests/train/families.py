"""Small transformers models with random weights, and samples with images in their processors' format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from mpo_ext.train.encode import Sample
from mpo_ext.train.masks import use_split_attention

VOCAB = 61
IMAGE = 60  # the token that stands for a piece of an image
PAD = 0
WINDOW = 4  # of sliding attention

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": PAD,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE - 1,
    "vision_start_token_id": IMAGE - 2,
    "vision_end_token_id": IMAGE - 3,
}


def text_model(family: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**TEXT, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)


def internvl() -> nn.Module:
    vision = {**VISION, "image_size": [8, 8], "patch_size": [4, 4], "num_channels": 1, "layer_scale_init_value": 1.0}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = {**VISION, "image_size": 8, "patch_size": 4, "num_channels": 1, "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_channels": 1,
        "patch_size": 4,
        "temporal_patch_size": 1,
    }
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(**text: Any) -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "in_channels": 1,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "out_hidden_size": 16,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    text = {**TEXT, **text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_channels": 1,
    "patch_size": 4,
    "temporal_patch_size": 1,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
}


def qwen3_vl() -> nn.Module:
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    config = transformers.SmolVLMConfig(
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "num_channels": 1},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gemma3_vlm() -> nn.Module:
    config = transformers.Gemma3Config(
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "num_channels": 1},
        text_config={
            **TEXT,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=IMAGE - 1,
        eoi_token_index=IMAGE - 2,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 without a checkpoint
    return model


Images = Callable[[int, torch.Generator], tuple[list[list[int]], dict[str, torch.Tensor]]]


def tiles(tokens: int, *, axis: bool = False) -> Images:
    """Returns a function that makes 8 x 8 images with ``tokens`` image tokens each.

    With ``axis``, the pixel values have an additional leading axis of size 1, which Idefics needs.
    """

    def images(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        pixels = torch.randn(count, 1, 8, 8, generator=generator)
        return [[IMAGE] * tokens] * count, {"pixel_values": pixels.unsqueeze(0) if axis else pixels}

    return images


def patches(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Returns images of several sizes in Qwen-VL's format.

    The first result is a list with the token ids of each image. The second result is a dict of model inputs for all
    images. Each image token stands for 2 x 2 patches.
    """
    grids = [[1, 2 * int(side), 4] for side in torch.randint(1, 4, (count,), generator=generator)]
    total = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(total, 16, generator=generator)
    ids = [[IMAGE - 2, *[IMAGE] * (t * h * w // 4), IMAGE - 3] for t, h, w in grids]
    return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model: Function that builds the model.
        images: Function that makes images; None: the model takes no images.
        types: Name of the model input that is 1 at image tokens; None: the model has no such input.
        tower: Module name of the vision tower; "": the model has none.
    """

    model: Callable[[], nn.Module]
    images: Images | None = None
    types: str | None = None
    tower: str = ""


GEMMA = {"head_dim": 8, "sliding_window": WINDOW}
FAMILIES: dict[str, Family] = {
    "internvl": Family(internvl, tiles(1), tower="model.vision_tower"),
    "llava": Family(llava, tiles(4), tower="model.vision_tower"),
    "qwen2_vl": Family(qwen2_vl, patches, "mm_token_type_ids", "model.visual"),
    "qwen2_5_vl": Family(qwen2_5_vl, patches, "mm_token_type_ids", "model.visual"),
    "qwen2_5_vl-sliding": Family(
        partial(qwen2_5_vl, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        patches,
        "mm_token_type_ids",
        "model.visual",
    ),
    "qwen3_vl": Family(qwen3_vl, patches, "mm_token_type_ids", "model.visual"),
    "smolvlm": Family(smolvlm, tiles(1, axis=True), tower="model.vision_model"),
    "qwen2": Family(partial(text_model, "Qwen2")),
    "llama": Family(partial(text_model, "Llama")),
    "cohere": Family(partial(text_model, "Cohere", logit_scale=0.3)),
    "gemma2": Family(partial(text_model, "Gemma2", **GEMMA, final_logit_softcapping=9.0, attn_logit_softcapping=3.0)),
    "gemma3": Family(
        partial(text_model, "Gemma3Text", **GEMMA, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gemma3_vlm": Family(gemma3_vlm, tiles(4), "token_type_ids", "model.vision_tower"),
    "mistral": Family(partial(text_model, "Mistral", sliding_window=WINDOW)),
    "qwen2-sliding": Family(
        partial(text_model, "Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET = {
    **MIXED,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_expand": 2, "mamba_chunk_size": 4}


def qwen3_5_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    text = {**TEXT, **DELTA_NET, "rope_parameters": rope}
    config = transformers.Qwen3_5Config(vision_config=QWEN3_VISION, text_config=text, **QWEN_TOKENS)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def nemotron_h() -> nn.Module:
    config = transformers.NemotronHConfig(
        **{name: value for name, value in TEXT.items() if name != "num_hidden_layers"},
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        head_dim=8,
        ssm_state_size=4,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
    )
    return transformers.NemotronHForCausalLM(config)


#: Models with states, which only split rows can separate.
HYBRID: dict[str, Family] = {
    "qwen3_next": Family(partial(text_model, "Qwen3Next", **DELTA_NET, **EXPERTS)),
    "qwen3_5": Family(partial(text_model, "Qwen3_5Text", **DELTA_NET)),
    "qwen3_5_vl": Family(qwen3_5_vl, patches, "mm_token_type_ids", "model.visual"),
    "qwen3_5_moe": Family(partial(text_model, "Qwen3_5MoeText", **DELTA_NET, **EXPERTS)),
    "olmo_hybrid": Family(
        partial(text_model, "OlmoHybrid", **{**DELTA_NET, "linear_num_key_heads": 4, "num_key_value_heads": 2})
    ),
    "kimi_linear": Family(
        partial(
            text_model,
            "KimiLinear",
            **MIXED,
            num_key_value_heads=2,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=2,
            num_local_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
        )
    ),
    "falcon_h1": Family(partial(text_model, "FalconH1", **MAMBA, mamba_d_ssm=32)),
    "bamba": Family(partial(text_model, "Bamba", **MAMBA, attn_layer_indices=[1])),
    "granitemoehybrid": Family(
        partial(
            text_model,
            "GraniteMoeHybrid",
            **MIXED,
            **MAMBA,
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=8,
        )
    ),
    "nemotron_h": Family(nemotron_h),
    "zamba2": Family(
        partial(
            text_model,
            "Zamba2",
            layers_block_type=["linear_attention", "hybrid"],
            num_key_value_heads=2,
            mamba_d_state=4,
            n_mamba_heads=4,
            chunk_size=4,
        )
    ),
    "lfm2": Family(partial(text_model, "Lfm2", layer_types=["conv", "full_attention"])),
}
REFUSED: dict[str, Family] = {
    "mamba": Family(
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2, pad_token_id=PAD
            )
        )
    ),
    "jamba": Family(
        partial(
            text_model,
            "Jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            num_experts=2,
            num_experts_per_tok=1,
        )
    ),
}
ALL = {**FAMILIES, **HYBRID, **REFUSED}


def build(name: str, attention: str | None = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = ALL[name].model().to(dtype).train()
    if attention is not None:
        model.set_attn_implementation(attention.removeprefix("split "))
        if attention.startswith("split "):
            assert use_split_attention(model) is None
    with torch.no_grad():  # as they are initialised, no token would look at any other in particular
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.fill_(-2)  # states that last longer than a prompt
            elif parameter.ndim > 1:
                parameter.mul_(8)
    return model


def sample(
    family: str,
    seed: int,
    *,
    text: int = 5,
    chosen: int = 4,
    rejected: int = 3,
    images: int = 0,
    prompt: int | None = None,
    name: str = "",
) -> Sample:
    """Returns a random pair.

    Args:
        family: Name of the model family.
        seed: Seed of the responses.
        text: Number of text tokens in the prompt.
        chosen: Number of tokens in the chosen response.
        rejected: Number of tokens in the rejected response.
        images: Number of images in the prompt.
        prompt: Seed of the prompt; None: ``seed``. Pairs with the same seed of the prompt share the prompt.
        name: Name of the pair in messages.
    """
    generator = torch.Generator().manual_seed(1000 + (seed if prompt is None else prompt))
    family_of = ALL[family]
    ids = torch.randint(2, 50, (text,), generator=generator).tolist()
    image_inputs: dict[str, torch.Tensor] = {}
    if images:
        assert family_of.images is not None
        pieces, image_inputs = family_of.images(images, generator)
        for place in reversed(range(images)):
            at = 1 + place * (text // (images + 1))
            ids[at:at] = pieces[place]
    prompt_ids = torch.tensor(ids, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    responses = [torch.randint(2, 50, (count,), generator=generator) for count in (chosen, rejected)]
    return Sample(
        key=f"key{seed}",
        name=name or f"file:{seed}",
        prompt_key=f"prompt{seed if prompt is None else prompt}",
        prompt_ids=prompt_ids,
        chosen_ids=responses[0],
        rejected_ids=responses[1],
        token_inputs={family_of.types: (prompt_ids == IMAGE).long()} if family_of.types else {},
        image_inputs=image_inputs,
        digest=f"digest{seed}",
    )


def samples_of(family: str) -> list[Sample]:
    """Returns four pairs of unequal lengths.

    The first and the third pair share a prompt with two images. The second pair has no image, and the fourth has one.
    If the family does not take images, no pair has an image.
    """
    some = 1 if ALL[family].images else 0
    return [
        sample(family, 1, prompt=9, text=8, chosen=6, rejected=3, images=2 * some),
        sample(family, 2, text=4, chosen=1, rejected=5),
        sample(family, 3, prompt=9, text=8, chosen=2, rejected=7, images=2 * some),
        sample(family, 4, text=6, chosen=5, rejected=1, images=some),
    ]


def image_rows(samples: Sequence[Sample]) -> int:
    """Returns the number of images, tiles or patches in the pixel values.

    The model family determines which of these are counted.
    """
    return sum(
        value.shape[0] * (value.shape[1] if value.ndim == 5 else 1)
        for one in samples
        for name, value in one.image_inputs.items()
        if name == "pixel_values"
    )
