"""Saves tiny models with random weights, and makes pairs, for the tests of other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiny_processors
import torch
import transformers
from PIL import Image

IMAGE_MARK = "<image>\n"


def qwen_tokenizer() -> Any:
    """Returns a tokenizer with a token per byte and Qwen's chat template."""
    tokenizer = tiny_processors.with_template(
        tiny_processors.build_tokenizer(tiny_processors.SPECIAL[tiny_processors.QWEN]), tiny_processors.QWEN
    )
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def save_text_model(folder: Path, *, vocab: int = 320, hidden: int = 32, **settings: Any) -> Path:
    """Saves a two-layer Qwen2 and its tokenizer. Returns the folder."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0, bos_token_id=None,
        **{"tie_word_embeddings": False, **settings},
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_image_model(folder: Path, *, vision_feature_layer: int = -1) -> Path:
    """Saves a two-layer LLaVA with four tokens per image, and its processor. Returns the folder."""
    template = tiny_processors.QWEN.replace("IMAGE", IMAGE_MARK)
    tokenizer = tiny_processors.with_template(
        tiny_processors.build_tokenizer(["<image>", *tiny_processors.SPECIAL[tiny_processors.QWEN]]), template
    )
    tokenizer.eos_token, tokenizer.padding_side = "<|im_end|>", "left"
    size = {"height": 28, "width": 28}
    image_processor = tiny_processors.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    processor = transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14,
                       "projection_dim": 32},
        text_config={"model_type": "llama", "vocab_size": 320, **sizes, "num_key_value_heads": 2,
                     "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id,
                     "bos_token_id": None},
        image_token_index=image_token, image_token_id=image_token, image_seq_length=4,
        vision_feature_layer=vision_feature_layer,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pairs(count: int = 24, *, images: bool = False, length: int = 1) -> datasets.Dataset:
    """Returns conversational pairs in TRL's preference format; ``length`` multiplies the length of the responses."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        first, second = generator.integers(1, 50, 2)
        chosen = f"{first} + {second} = {first + second}. " * int(generator.integers(1, 3)) * length
        rejected = f"It is {first * second}, I think. " * int(generator.integers(1, 4)) * length
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": f"What is {first} plus {second}? Show the sum."}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        if images:
            row["images"] = [Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8))]
        rows.append(row)
    dataset = datasets.Dataset.from_list(rows)
    return dataset.cast_column("images", datasets.Sequence(datasets.Image())) if images else dataset
