"""Small untrained models that vLLM can run on a CPU, and questions for them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny_processors
import torch
import transformers
from PIL import Image

#: vLLM's attention on CPUs needs heads of at least 32 dimensions. The large spread of the weights keeps logits apart.
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
#: The template of Qwen, with tools.
TOOL_TEMPLATE = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + (
    tiny_processors.QWEN.replace(
        "<|im_end|>\n{% endfor %}",
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}",
    )
)
SUPPRESSED = [101, 102, 103, 114]


def keep_letters(head: torch.nn.Linear, tokenizer: Any) -> None:
    """Sets the output weights of most tokens to 0, so that responses mainly have ASCII characters and end tokens."""
    tokens = tokenizer.convert_ids_to_tokens(range(head.out_features))
    ends = (tokenizer.eos_token, "<|im_end|>", "<end_of_utterance>")
    others = [
        row
        for row, token in enumerate(tokens)
        if token is None or not ("!" < token <= "~" or token == "\u0120" or token in ends)
    ]
    with torch.no_grad():
        head.weight[others] = 0.0


def write_text_model(folder: Path) -> None:
    torch.manual_seed(0)
    special = tiny_processors.SPECIAL[tiny_processors.QWEN]
    tokenizer = tiny_processors.with_template(tiny_processors.build_tokenizer(special), TOOL_TEMPLATE)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = transformers.Qwen2Config(vocab_size=264, bos_token_id=None, eos_token_id=end, **TEXT)
    model = transformers.Qwen2ForCausalLM(config)
    keep_letters(model.lm_head, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_image_model(folder: Path) -> None:
    """Writes an Idefics3 model with its processor.

    The tokenizer adds a token before each text. The chat template takes lists of parts.
    """
    torch.manual_seed(0)
    processor = tiny_processors.idefics3()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.Idefics3Config(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), "bos_token_id": None, **TEXT},
        image_token_id=image,
        scale_factor=2,
        pad_token_id=0,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    keep_letters(model.lm_head, processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_suppressed(model: Path, folder: Path) -> None:
    """Copies a model, with some frequent tokens suppressed by its generation config."""
    shutil.copytree(model, folder)
    path = folder / "generation_config.json"
    settings = {**json.loads(path.read_text()), "suppress_tokens": SUPPRESSED[:2]}
    path.write_text(json.dumps({**settings, "bad_words_ids": [[token] for token in SUPPRESSED[2:]]}))


def write_adapter(model: Path, folder: Path) -> None:
    """Writes LoRA adapters with large weights for a model."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(folder)


def items_of(folder: Path, count: int, *, images: bool) -> list[dict[str, Any]]:
    """Returns questions of several lengths. With ``images``, two of three have one or two images in ``folder``."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        words = " ".join(rng.choice(["red", "green", "seven", "why", "12"], int(rng.integers(2, 12))))
        line: dict[str, Any] = {"question": f"{words} {number}?", "answer_gt": "e"}
        line["chosen"] = " ".join(rng.choice(["It", "is", "seven", "\u4e09", "red."], int(rng.integers(3, 9))))
        if images and number % 3:
            names = [f"{number}-{place}.png" for place in range(1 + number % 2)]
            for name in names:
                size = (int(rng.integers(20, 70)), int(rng.integers(20, 70)))
                pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name)
            line["images"] = names
        lines.append(line)
    return lines
