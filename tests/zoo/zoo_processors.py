"""Tiny processors of the real classes. They have no video processors, because video processors need torchvision."""

import re
import types
from typing import Any

import transformers
import zoo_templates as templates
import zoo_tokenizers as tokenizers
from transformers import ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<box>", "</box>")
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
PLACES = tuple(f"<row_{row + 1}_col_{column + 1}>" for row in range(4) for column in range(4))


class _NoVideo:
    """A mixin for processors that have only an image processor and a tokenizer."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def without_video(base: type, **attributes: Any) -> Any:
    """Returns a subclass of ``base`` without a video processor. Its constructor sets ``attributes``."""

    def build(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        for name, value in attributes.items():
            setattr(self, name, value)
            if name.endswith("_token"):
                setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(value))

    return type(base.__name__, (_NoVideo, base), {"__init__": build})


def _qwen_vl(base: type, tokenizer: Any, template: str) -> Any:
    attributes = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    attributes |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84)
    return without_video(base, **attributes)(image_processor, tokenizer, template)


def qwen25_vl() -> Any:
    return _qwen_vl(transformers.Qwen2_5_VLProcessor, tokenizers.qwen(*VISION_TOKENS), templates.QWEN25_VL)


def qwen3_vl() -> Any:
    tokenizer = tokenizers.qwen(*VISION_TOKENS, plain=("<think>", "</think>"))
    return _qwen_vl(transformers.Qwen3VLProcessor, tokenizer, templates.QWEN3_VL)


def _internvl(tokenizer: Any) -> Any:
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    attributes = {"image_token": "<IMG_CONTEXT>", "video_token": "<video>", "image_seq_length": 4, **names}
    attributes["multimodal_pattern"] = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    image_processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    processor = without_video(transformers.InternVLProcessor, **attributes)
    return processor(image_processor, tokenizer, templates.INTERNVL)


def internvl25() -> Any:
    """Returns the processor of InternVL2.5-2B and 8B. Its tokenizer is InternLM2's, which prepends no space."""
    special = ("<|im_start|>", "<|im_end|>", *INTERNVL_TOKENS)
    return _internvl(tokenizers.sentencepiece(*special, scheme="never", pad_token="</s>"))


def internvl3() -> Any:
    return _internvl(tokenizers.qwen(*INTERNVL_TOKENS))


def internvl35() -> Any:
    """Returns the processor of InternVL3.5: Qwen3's tokenizer, with ``<think>`` and ``</think>`` as added tokens."""
    return _internvl(tokenizers.qwen(*INTERNVL_TOKENS, plain=("<think>", "</think>")))


def smolvlm() -> Any:
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *PLACES)
    tokenizer = tokenizers.gpt2(*special, eos_token="<end_of_utterance>")
    image_processor = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    attributes = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "image_seq_len": 4}
    attributes |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    attributes |= {"video_token": "<video>", "video_processor": types.SimpleNamespace(num_frames=None, fps=None)}
    return without_video(transformers.SmolVLMProcessor, **attributes)(image_processor, tokenizer, templates.SMOLVLM)


def idefics3() -> Any:
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *PLACES)
    tokenizer = tokenizers.llama3(*special, eos="<|end_of_text|>", pad_token="<|end_of_text|>")
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return transformers.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=4, chat_template=templates.IDEFICS3
    )


def llava15() -> Any:
    size = {"height": 28, "width": 28}
    return transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        tokenizers.sentencepiece("<image>", "<pad>", scheme="legacy", pad_token="<pad>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_15,
    )


def llava_next() -> Any:
    size = {"height": 28, "width": 28}
    return transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
        ),
        tokenizers.sentencepiece("<image>", "<pad>", scheme="legacy", pad_token="<pad>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_NEXT_MISTRAL,
    )


def llava_onevision() -> Any:
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]
    )
    attributes = {"image_token": "<image>", "video_token": "<video>", "num_image_tokens": 4}
    attributes |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    tokenizer = tokenizers.qwen("<image>", "<video>")
    processor = without_video(transformers.LlavaOnevisionProcessor, **attributes)
    return processor(image_processor, tokenizer, templates.LLAVA_ONEVISION)


def gemma3() -> Any:
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ("<start_of_turn>", "<end_of_turn>", *tokens.values())
    tokenizer = tokenizers.gemma(*special, extra_special_tokens=tokens)
    image_processor = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=templates.GEMMA3)


def paligemma() -> Any:
    tokenizer = tokenizers.gemma("<image>")
    image_processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    return transformers.PaliGemmaProcessor(image_processor, tokenizer)


def glm4v() -> Any:
    special = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    special += ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
    special += ("<|begin_of_video|>", "<|end_of_video|>")
    tokenizer = tokenizers.qwen(additional_special_tokens=list(special), eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    image_processor = Glm4vImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84}, temporal_patch_size=1
    )
    attributes = {"image_token": "<|image|>", "video_token": "<|video|>"}
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin_of_video|>", "<|end_of_video|>"])
    processor = without_video(transformers.Glm4vProcessor, **attributes, video_start_id=begin, video_end_id=end)
    return processor(image_processor, tokenizer, templates.GLM41V_THINKING)


def minicpm_v() -> Any:
    names = {"image_start_token": "<image>", "image_end_token": "</image>", "slice_start_token": "<slice>"}
    names |= {"slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    names |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tokenizers.qwen(*names.values(), plain=("<think>", "</think>"))
    image_processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=1, scale_resolution=56)
    attributes = {"slice_mode": True, "default_use_image_id": True, "image_token_divisor": 16, **names}
    processor = without_video(MiniCPMV4_6Processor, **attributes)
    return processor(image_processor, tokenizer, templates.MINICPM_V)
