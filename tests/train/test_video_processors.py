"""Tests with the video processors of transformers, which need torchvision: `make video-check` runs them.

Other tests replace these processors by stand-ins. Here both must give the same prompts, and the same pixels for frames
that need no resizing.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_ext.processors import torchvision_problem

pytest.importorskip("av", reason="needs the extra video")
if (problem := torchvision_problem()) is not None:
    pytest.skip(f"needs torchvision, which {problem}: make video-check", allow_module_level=True)

import transformers
import video_models
import zoo_processors as zoo
import zoo_templates as templates
import zoo_tokenizers as tokenizers
from test_video_training import make_encoder, trained_from, write_clips
from transformers.image_utils import OPENAI_CLIP_MEAN as CLIP_MEAN
from transformers.image_utils import OPENAI_CLIP_STD as CLIP_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from video_files import write_frames

from mpo_ext.data.records import Pair
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.proof import prove
from mpo_ext.videos import Video


def qwen25_vl() -> Any:
    return transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizers.qwen(*zoo.VISION_TOKENS),
        Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84}),
        chat_template=video_models.with_videos(templates.QWEN25_VL),
    )


def qwen3_vl() -> Any:
    size = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84 * 64}
    return transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizers.qwen(*zoo.VISION_TOKENS, plain=("<think>", "</think>")),
        Qwen3VLVideoProcessor(size=size, patch_size=14, image_mean=CLIP_MEAN, image_std=CLIP_STD),
        chat_template=video_models.with_videos(templates.QWEN3_VL),
    )


def internvl35() -> Any:
    return transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4),
        tokenizers.qwen(*zoo.INTERNVL_TOKENS, plain=("<think>", "</think>"), extra_special_tokens=zoo.INTERNVL_NAMES),
        InternVLVideoProcessor(size={"height": 16, "width": 16}),
        image_seq_length=4,
        chat_template=templates.INTERNVL.replace(
            "{{ '<IMG_CONTEXT>\\n' }}", "{{ '<IMG_CONTEXT>\\n' }}{% elif p.type == 'video' %}{{ '<video>\\n' }}"
        ),
    )


def llava_onevision() -> Any:
    size = {"height": 28, "width": 28}
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    videos = "{% for p in m.content | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
    texts = "{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    assert texts in templates.LLAVA_ONEVISION
    return transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        tokenizers.qwen("<image>", "<video>"),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION.replace(texts, videos + texts),
    )


PROCESSORS = {
    "Qwen2.5-VL": qwen25_vl, "Qwen3-VL": qwen3_vl, "InternVL3.5": internvl35, "LLaVA-OneVision": llava_onevision,
}  # fmt: skip


def encode(encoder: Encoder, pair: Pair) -> Sample:
    sample = encoder.encode(pair, "f:1")
    assert isinstance(sample, Sample), sample
    return sample


@pytest.mark.parametrize("family", PROCESSORS)
def test_prompts_are_those_of_the_processor(family: str, tmp_path: Path) -> None:
    processor = PROCESSORS[family]()
    encoder = Encoder(processor)
    paths = tuple(write_frames(tmp_path, 4, size=(56, 56)))
    pairs = [
        Pair("<video>\nWhat?", "It moves.", "No.", videos=(Video(frames=paths),)),
        Pair("<image>\nCompare with <video>.", "It moves.", "No.", (paths[0],), videos=(Video(frames=paths[:3]),)),
        Pair("<video> and <video>", "c", "r", videos=(Video(frames=paths[:2]), Video(frames=paths[2:]))),
    ]
    proof = prove(encoder, [(pair, f"f:{number}") for number, pair in enumerate(pairs)])
    assert not proof.problems
    assert not proof.skipped
    assert not [notice for notice in proof.notices if "compared" in notice]
    assert len(proof.pairs) == 3


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen3-VL"])
def test_the_stand_in_gives_the_same_inputs(family: str, tmp_path: Path) -> None:
    """Compares token ids and pixels of the stand-in with those of the real video processor.

    The frames need no resizing, so the pixels agree too.
    """
    _, stand_in = video_models.BUILDERS[family]()
    paths = tuple(write_frames(tmp_path, 5, size=(56, 84)))
    pair = Pair("<video>\nWhat?", "It moves.", "No.", videos=(Video(frames=paths, fps=3.0),))
    real, other = (encode(Encoder(processor), pair) for processor in (PROCESSORS[family](), stand_in))
    assert torch.equal(real.prompt_ids, other.prompt_ids)
    assert real.image_inputs.keys() == other.image_inputs.keys()
    for name, values in real.image_inputs.items():
        assert torch.allclose(values.double(), other.image_inputs[name].double(), atol=1e-5), name


def test_an_epoch_with_the_real_processor_equals_separate_rows(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", 20)
    results = []
    for shared in (True, False):
        torch.manual_seed(0)
        model, processor = video_models.qwen25_vl(qwen25_vl())
        assert make_encoder(model, processor).chat.is_multimodal
        results.append(
            trained_from(model, processor, clips, tmp_path / str(shared), optim__eps=1e-4, loss__shared_prefix=shared)
        )
    (first, log, _), (second, expected, layout) = results
    assert layout == "separate"
    for line, other in zip(log, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for (name, weight), value in zip(first.named_parameters(), second.parameters(), strict=True):
        assert (weight - value).abs().max() < 1e-5, name
