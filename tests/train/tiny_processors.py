"""Small tokenizers, chat templates and processors of several model families."""

import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# A message's content may be a text or a list of parts, as in the templates of the families themselves.
TEXT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + TEXT + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    + TEXT
    + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + TEXT
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n" + TEXT + " {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (  # writes only a space after the assistant's turn
    "{% for m in messages %}{{ m.role.upper() }}: " + TEXT + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = {
    QWEN: ["<|im_start|>", "<|im_end|>"],
    LLAMA3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    GEMMA: ["<start_of_turn>", "<end_of_turn>"],
    ZEPHYR: [],
    VICUNA: [],
}
ENDS = {QWEN: "<|im_end|>", LLAMA3: "<|eot_id|>", GEMMA: "<end_of_turn>", ZEPHYR: "</s>", VICUNA: "</s>"}
PADDING = "!"  # a token of ordinary text, as Qwen's id 0 is


def build_tokenizer(special: list[str], *, bos: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with a token for each byte. Padding has the same id as "!"."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    assert vocabulary[PADDING] == 0
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(["<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $0", None, [(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="</s>",
        pad_token=PADDING,
        additional_special_tokens=special,
        **options,
    )


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


class TinyInternVLProcessor(InternVLProcessor):
    """InternVL's processor without the video processor, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = 4
        self.start_image_token, self.end_image_token = "<img>", "</img>"
        self.start_image_token_id, self.end_image_token_id = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        self.image_token, self.video_token = "<IMG_CONTEXT>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class TinyQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without the video processor, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def internvl() -> Any:
    image_processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    tokens = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<box>", "</box>", *SPECIAL[QWEN]]
    return TinyInternVLProcessor(image_processor, build_tokenizer(tokens), QWEN.replace("IMAGE", "<IMG_CONTEXT>\n"))


def qwen() -> Any:
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    tokens = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", *SPECIAL[QWEN]]
    template = QWEN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return TinyQwenProcessor(image_processor, build_tokenizer(tokens), template)


def llava() -> Any:
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        build_tokenizer(["<image>"], bos="<s>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA.replace("IMAGE", "<image>\n"),
    )


def idefics3() -> Any:
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokenizer = build_tokenizer(
        ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *places], bos="<s>"
    )
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = ZEPHYR.replace(" {{ eos_token }}", "<end_of_utterance>").replace("IMAGE", "<image>")
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=template)


def gemma3() -> Any:
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = build_tokenizer([*tokens.values()], bos="<s>", extra_special_tokens=tokens)
    tokenizer.add_tokens(SPECIAL[GEMMA], special_tokens=True)
    image_processor = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = GEMMA.replace("IMAGE", "<start_of_image>")
    return Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=template)
