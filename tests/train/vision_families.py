"""Small LLaVA, Qwen2.5-VL and Idefics3 models, which take the inputs that ``tiny_processors`` makes."""

from typing import Any

import tiny_processors
import transformers
from torch import nn

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def llava() -> tuple[nn.Module, Any]:
    processor = tiny_processors.llava()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_index=image,
        image_token_id=image,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[nn.Module, Any]:
    processor = tiny_processors.qwen()
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = processor.tokenizer.convert_tokens_to_ids(list(names))
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": len(processor.tokenizer),
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def idefics3() -> tuple[nn.Module, Any]:
    processor = tiny_processors.idefics3()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.Idefics3Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=image,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


BUILDERS = {"LLaVA": llava, "Qwen2.5-VL": qwen2_5_vl, "Idefics3": idefics3}
