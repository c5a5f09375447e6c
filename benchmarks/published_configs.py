"""Model configs for the recipes in recipes/, with the published sizes of the models.

Sources of the sizes: arXiv 2505.09388 (Qwen3, tables 1 and 2), 2511.21631 (Qwen3-VL), 2503.19786 (Gemma 3), and
2508.18265 (the vision tower InternViT-300M). Other values, such as token ids, are mostly the defaults of transformers.

Three configs were compared with the ``config.json`` of the model or of a fine-tuned model: Qwen3-VL-8B, and the
language models of InternVL3.5-1B and Qwen3.5-9B. The others could not be compared: InternVL3.5-8B and 30B-A3B,
Qwen3-VL-2B and 30B-A3B, Gemma 3 4B, and the vision tower of Qwen3.5-9B.
"""

from typing import Any

import transformers

_QWEN3 = {"head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960}
_EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
}


def _text(hidden: int, inner: int, layers: int, heads: int, key_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **others,
    }


def _internvl(text: dict[str, Any], kind: str = "qwen3") -> Any:
    vision = {"attention_bias": True, "image_size": 448, "patch_size": 14}  # the other defaults are InternViT-300M
    return transformers.InternVLConfig(
        text_config={"model_type": kind, **_QWEN3, "tie_word_embeddings": False, **text},
        vision_config=vision,
        tie_word_embeddings=False,
    )


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any], kind: Any = None, *, tied: bool = False) -> Any:
    text = {**_QWEN3, "max_position_embeddings": 262_144, "tie_word_embeddings": tied, **text}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text["rope_parameters"] = rope
    vision = {**vision, "out_hidden_size": text["hidden_size"]}
    kind = kind or transformers.Qwen3VLConfig
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied)


_TOWER_400M = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
_TOWER_300M = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}


def internvl35_1b() -> Any:
    return _internvl(_text(1024, 3072, 28, 16, 8))


def internvl35_8b() -> Any:
    return _internvl(_text(4096, 12288, 36, 32, 8))


def internvl35_30b_a3b() -> Any:
    return _internvl(_text(2048, 6144, 48, 32, 4, **_EXPERTS), "qwen3_moe")


def qwen3_vl_2b() -> Any:
    return _qwen3_vl(_text(2048, 6144, 28, 16, 8), _TOWER_300M, tied=True)


def qwen3_vl_8b() -> Any:
    return _qwen3_vl(_text(4096, 12288, 36, 32, 8), _TOWER_400M)


def qwen3_vl_30b_a3b() -> Any:
    return _qwen3_vl(_text(2048, 6144, 48, 32, 4, **_EXPERTS), _TOWER_400M, transformers.Qwen3VLMoeConfig)


def qwen35_9b() -> Any:
    text = transformers.Qwen3_5TextConfig(max_position_embeddings=262_144).to_dict()  # the defaults are those of 9B
    return transformers.Qwen3_5Config(text_config=text, vision_config={"out_hidden_size": 4096})


def gemma3_4b() -> Any:
    text = _text(2560, 10240, 34, 8, 4, head_dim=256, vocab_size=262_208, max_position_embeddings=131_072)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


#: For each recipe: the config, and the published numbers of all parameters and of active parameters per token, in
#: billions. No numbers were found for Qwen3.5-9B; its numbers come from transformers' default config.
PUBLISHED = {
    "internvl3.5-1b": (internvl35_1b, 1.1, 1.1),
    "internvl3.5-8b": (internvl35_8b, 8.5, 8.5),
    "internvl3.5-30b-a3b": (internvl35_30b_a3b, 30.8, 3.3 + 0.3),
    "qwen3-vl-2b": (qwen3_vl_2b, 2.1, 2.1),
    "qwen3-vl-8b": (qwen3_vl_8b, 8.8, 8.8),
    "qwen3-vl-30b-a3b": (qwen3_vl_30b_a3b, 31.1, 3.3 + 0.6),
    "qwen3.5-9b": (qwen35_9b, 9.4, 9.4),
    "gemma3-4b": (gemma3_4b, 4.3, 4.3),
}
