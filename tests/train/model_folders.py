"""Writes folders with tiny transformers models and their processors, and files of pairs for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_processors
import torch
import transformers
from PIL import Image

_TEXT: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def write_qwen2(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Writes a Qwen2 model, whose attention has biases. Returns the folder."""
    torch.manual_seed(seed)
    template = tiny_processors.QWEN
    tokenizer = tiny_processors.with_template(
        tiny_processors.build_tokenizer(tiny_processors.SPECIAL[template]), template
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = transformers.Qwen2Config(**_TEXT, bos_token_id=None, eos_token_id=end, tie_word_embeddings=tied)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    """Writes a LLaVA. Its ``_no_split_modules`` names classes that the model does not contain."""
    torch.manual_seed(0)
    processor = tiny_processors.llava()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **_VISION},
        text_config={"model_type": "llama", "bos_token_id": 257, "eos_token_id": 258, **_TEXT},
        image_token_id=image,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_pairs(folder: Path, count: int, *, images: bool) -> Path:
    """Writes pairs of different lengths. If ``images`` is True, two out of three pairs have an image."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        one, two = rng.integers(1, 50, 2).tolist()
        line = {"question": f"{one} plus {two}?", "chosen": f"{one + two}. " * int(rng.integers(1, 3))}
        line["rejected"] = f"I think {one * two}. " * int(rng.integers(1, 3))
        if images and number % 3:
            Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            line["images"] = [f"{number}.png"]
        lines.append(json.dumps(line) + "\n")
    path = folder / "pairs.jsonl"
    path.write_text("".join(lines))
    return path
