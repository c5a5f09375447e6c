"""Tiny models that take videos, with transformers' processor classes.

The video processors of transformers need torchvision. ``QwenVideoStandIn`` replaces them, and uses an image processor.
If torchvision is installed, test_video_processors.py compares ``QwenVideoStandIn`` with the real video processors.
"""

import importlib.util
from typing import Any

import numpy as np
import torch
import transformers
import zoo_processors as processors
from torch import nn
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata, make_batched_videos

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "pad_token_id": 0,
}
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
MIN_PIXELS, MAX_PIXELS = 28 * 28, 84 * 84


class QwenVideoStandIn:
    """Replaces transformers' Qwen2-VL and Qwen3-VL video processors without torchvision.

    It expects frames that are already sampled from the video.
    """

    merge_size, temporal_patch_size = 2, 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.calls = 0

    def __call__(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        do_sample_frames: bool = True,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        assert do_sample_frames is False  # the frames are chosen already
        self.calls += 1
        pixels, grids = [], []
        for video in make_batched_videos(videos):
            frames = list(video) + [video[-1]] * (-len(video) % self.temporal_patch_size)
            out = self.image_processor(images=frames, return_tensors="pt")
            (_, height, width), *_ = out["image_grid_thw"].tolist()
            size = self.image_processor.patch_size
            # The image processor repeats a frame; a patch of a video holds consecutive frames.
            values = out["pixel_values"].view(len(frames), height * width, 3, self.temporal_patch_size, size, size)
            grouped = values.view(-1, self.temporal_patch_size, *values.shape[1:])
            steps = [grouped[:, step, :, :, step] for step in range(self.temporal_patch_size)]
            pixels.append(torch.stack(steps, dim=3).flatten(0, 1).flatten(1))
            grids.append([len(grouped), height, width])
        data = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
        if return_metadata:
            data["video_metadata"] = [VideoMetadata(**metadata) for metadata in video_metadata]
        return BatchFeature(data)

    def to_dict(self) -> dict[str, Any]:
        return {"video_processor_type": type(self).__name__}


def _with_stand_in(processor: Any) -> Any:
    processor.video_processor = QwenVideoStandIn(processor.image_processor)
    processor.chat_template = with_videos(processor.chat_template)
    return processor


def with_videos(template: str) -> str:
    """Returns a Qwen-VL chat template, changed so that messages may contain videos."""
    image = "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    assert image in template
    return template.replace(image, image + "{% elif p.type == 'video' %}" + image.replace("image", "video"))


def _tokens(processor: Any) -> dict[str, int]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    texts = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    ids = processor.tokenizer.convert_tokens_to_ids(texts)
    return {f"{name}_id": token for name, token in zip(names, ids, strict=True)}


def qwen25_vl(processor: Any = None) -> tuple[nn.Module, Any]:
    processor = processor or _with_stand_in(processors.qwen25_vl())
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
            **{"fullatt_block_indexes": [1], "tokens_per_second": 2},
        },
        text_config={
            "vocab_size": len(processor.tokenizer),
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        **_tokens(processor),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(processor: Any = None) -> tuple[nn.Module, Any]:
    processor = processor or _with_stand_in(processors.qwen3_vl())
    config = transformers.Qwen3VLConfig(
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
            **{"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        text_config={
            "vocab_size": len(processor.tokenizer),
            **TEXT,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        **_tokens(processor),
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def internvl35() -> tuple[nn.Module, Any]:
    """Returns an InternVL3.5 and its processor.

    The processor has no video processor. The encoder shows frames as numbered images.
    """
    processor = processors.internvl35()
    config = transformers.InternVLConfig(
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"image_size": [16, 16], "patch_size": [4, 4]},
        },
        text_config={"model_type": "qwen2", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


BUILDERS = {"Qwen2.5-VL": qwen25_vl, "Qwen3-VL": qwen3_vl, "InternVL3.5": internvl35}


def gradient_picture(size: tuple[int, int], shift: int) -> np.ndarray:
    """Returns an RGB image ``[H, W, 3]`` with color gradients; each ``shift`` gives another image."""
    width, height = size
    columns = (np.arange(width) * 5 + shift * 31) % 256
    rows = (np.arange(height) * 3 + shift * 17) % 256
    return np.stack(
        [np.broadcast_to(columns, (height, width)), np.broadcast_to(rows[:, None], (height, width)),
         np.full((height, width), shift * 40 % 256)], axis=-1,
    ).astype(np.uint8)  # fmt: skip
