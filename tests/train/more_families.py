"""Model families besides those of ``families.py``, for ``check_split_attention.py``.

They are too many for the regular tests, which use only a few of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import families
import torch
import transformers
from families import IMAGE, PAD, TEXT, VISION, Family, patches, qwen2_5_vl, text_model, tiles
from torch import nn

SLIDING = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}


def llava_onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", **VISION, "image_size": 8, "patch_size": 4, "num_channels": 1,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        image_grid_pinpoints=[[8, 8]],
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def onevision_images(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Returns the token ids of ``count`` random images, and the inputs of LLaVA-OneVision for these images."""
    pixels = torch.randn(count, 2, 1, 8, 8, generator=generator)
    inputs = {"image_sizes": torch.full((count, 2), 8), "batch_num_images": torch.tensor([count])}
    # A single image has four tokens, and its only tile has six, with line breaks. Of several images, each has four
    # tokens and a line break.
    return [[IMAGE] * (10 if count == 1 else 5)] * count, {"pixel_values": pixels, **inputs}


def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model", **VISION, "image_size": 8, "patch_size": 4, "num_channels": 1,
            "projection_dim": 16,
        },
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[8, 8]],
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config)


def next_images(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    pixels = torch.randn(count, 2, 1, 8, 8, generator=generator)
    return [[IMAGE] * 10] * count, {"pixel_values": pixels, "image_sizes": torch.full((count, 2), 8)}


def idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "num_channels": 1},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def with_window(name: str, window: int) -> nn.Module:
    text: dict[str, Any] = {"sliding_window": window}
    if name == "Qwen2":
        text |= {"use_sliding_window": True, "max_window_layers": 1}
    elif name != "Mistral":
        text |= {"layer_types": SLIDING}
    if name.startswith("Gemma"):
        text |= {"head_dim": 8}
    if name == "Gemma2":
        text |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0}
    if name == "GptOss":
        text |= {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return text_model(name, **text)


MORE: dict[str, Family] = {
    "qwen3": Family(partial(text_model, "Qwen3", head_dim=8)),
    "phi": Family(partial(text_model, "Phi")),
    "phi3": Family(partial(text_model, "Phi3")),
    "olmo2": Family(partial(text_model, "Olmo2")),
    "granite": Family(partial(text_model, "Granite", attention_multiplier=0.3, residual_multiplier=0.7)),
    "smollm3": Family(partial(text_model, "SmolLM3", no_rope_layers=[1, 0])),
    "glm4": Family(partial(text_model, "Glm4", head_dim=8)),
    "starcoder2": Family(partial(text_model, "Starcoder2", sliding_window=None)),
    "ministral3": Family(partial(text_model, "Ministral3", head_dim=8)),
    "hunyuan": Family(partial(text_model, "HunYuanDenseV1", head_dim=8)),
    "seed_oss": Family(partial(text_model, "SeedOss", head_dim=8)),
    "apertus": Family(partial(text_model, "Apertus")),
    "qwen3_moe": Family(partial(text_model, "Qwen3Moe", head_dim=8, **EXPERTS)),
    "deepseek_v3": Family(
        partial(
            text_model, "DeepseekV3", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=8,
            first_k_dense_replace=1, num_key_value_heads=2, head_dim=4,
        )
    ),
    "llava_onevision": Family(llava_onevision, onevision_images, tower="model.vision_tower"),
    "llava_next": Family(llava_next, next_images, tower="model.vision_tower"),
    "idefics3": Family(idefics3, tiles(1, axis=True), tower="model.vision_model"),
    **{
        f"{name.lower()}, window {window}": Family(partial(with_window, name, window))
        for name in ("Mistral", "Qwen2", "Gemma3Text", "Cohere2", "Olmo3", "Exaone4", "Gemma2", "GptOss")
        for window in (4, 13, 64)
    },
    **{
        f"qwen2_5_vl, window {window}": Family(
            partial(qwen2_5_vl, use_sliding_window=True, sliding_window=window, max_window_layers=1),
            patches,
            "mm_token_type_ids",
            "model.visual",
        )
        for window in (13, 64)
    },
}  # fmt: skip
families.ALL.update(MORE)  # ``build`` and ``sample`` find them there
