"""Builds the demo's model, processor and tokenizer.

The model is an InternVLForConditionalGeneration that is small enough for two CPU cores.
"""

import re
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from mpo_ext.demo import digits, reading

IMAGE_TOKENS = 4  # one per digit: the downsample ratio of 0.5 merges 2x2 of the 4x4 patches of 8x8 pixels
_PIXEL_MEAN, _PIXEL_STD = 0.3, 0.35  # mean and standard deviation of the digits, rounded
_PAD, _END, _USER, _ASSISTANT = "<pad>", "<|im_end|>", "<|user|>", "<|assistant|>"
_IMAGE, _IMAGE_START, _IMAGE_END, _VIDEO = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|> ' if message['role'] == 'user' else '<|assistant|> ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT> ' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


class DigitsProcessor(InternVLProcessor):
    """InternVL's processor without its video processor, which would require torchvision.

    The tokenizer must have the special tokens of ``build_tokenizer``.
    """

    images_kwargs = {"crop_to_patches": False}  # noqa: RUF012 - declared like this in the base class

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = IMAGE_TOKENS,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Skips InternVLProcessor.__init__, which requires a video processor.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_seq_length = image_seq_length
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.video_token = tokenizer.video_token
        self.image_token_id = tokenizer.context_image_token_id
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")


# With this, a saved folder includes the class, and AutoProcessor loads it with trust_remote_code=True.
DigitsProcessor.register_for_auto_class("AutoProcessor")


def build_tokenizer(*, is_reading: bool = False) -> PreTrainedTokenizerFast:
    """Returns a tokenizer in which each word is one token.

    The vocabulary has the words of the adding task. ``is_reading`` adds the words of the reading task.
    """
    special = [_PAD, _END, _IMAGE, _IMAGE_START, _IMAGE_END, _VIDEO, _USER, _ASSISTANT]
    more = reading.vocabulary() if is_reading else ()
    words = list(dict.fromkeys([*special, "<unk>", *digits.vocabulary(), *more]))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token="<unk>",
        extra_special_tokens={
            "user_token": _USER,
            "assistant_token": _ASSISTANT,
            "context_image_token": _IMAGE,
            "start_image_token": _IMAGE_START,
            "end_image_token": _IMAGE_END,
            "video_token": _VIDEO,
        },
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(side: int | None = None) -> DigitsProcessor:
    """Returns the demo's processor, with the tokenizer of ``build_tokenizer``.

    An image has ``side`` rows and ``side`` columns of digits. Each digit has 16x16 pixels and one token. If ``side``
    is None, the processor is for the adding task. An image then has 2x2 digits.
    """
    tokenizer = build_tokenizer(is_reading=side is not None)
    side = side or 2
    pixels = side * digits.CELL_PIXELS
    images = GotOcr2ImageProcessorPil(
        size={"height": pixels, "width": pixels},
        crop_to_patches=False,
        image_mean=[_PIXEL_MEAN] * 3,
        image_std=[_PIXEL_STD] * 3,
    )
    return DigitsProcessor(images, tokenizer, image_seq_length=side**2, chat_template=CHAT_TEMPLATE)


def make_config(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any], *, pixels: int, image_tokens: int
) -> InternVLConfig:
    """Returns the configuration of an InternVL model.

    Args:
        tokenizer: Tokenizer with the special tokens of ``build_tokenizer``.
        text: Values of ``text_config``, at least "hidden_size" and "num_attention_heads".
        vision: Values of ``vision_config``, at least "hidden_size".
        pixels: Height and width of an image in pixels.
        image_tokens: Number of tokens per image.
    """
    return InternVLConfig(
        vision_config={
            "num_hidden_layers": 2,
            "image_size": [pixels] * 2,
            "num_channels": 3,
            "layer_scale_init_value": 1.0,
            "intermediate_size": 4 * vision["hidden_size"],
            **vision,
        },
        text_config={
            "model_type": "qwen2",
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "intermediate_size": 3 * text["hidden_size"],
            "num_key_value_heads": text["num_attention_heads"],
            **text,
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=image_tokens,
        downsample_ratio=0.5,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, layers: int = 3, side: int = 2
) -> InternVLForConditionalGeneration:
    """Returns an untrained model of the demo.

    The model has no dropout and no drop path, so that policy and reference agree at the first step.

    Args:
        tokenizer: Tokenizer of ``build_tokenizer``.
        hidden_size: Hidden size of the language model.
        layers: Number of layers of the language model.
        side: Number of rows and columns of digits in an image.
    """
    text = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    vision: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "patch_size": [8, 8]}
    config = make_config(tokenizer, text, vision, pixels=side * digits.CELL_PIXELS, image_tokens=side**2)
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # A sampled image token would not belong to any image, and the forward pass would reject the response.
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    model.generation_config.suppress_tokens = sorted(special)
    return model
