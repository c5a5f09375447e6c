"""Tests that unusable models are rejected before their weights are loaded. The model folders here have no weights."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_processors
import transformers
import vision_families
from PIL import Image

from mpo_ext.cli.main import main
from mpo_ext.data import Pair, write_pairs
from mpo_ext.processors import check_model, check_supported, load_processor, torchvision_problem
from mpo_ext.train.loop import train
from mpo_ext.train.model import load_model
from mpo_ext.train.recipe import ModelRecipe, load_recipe

#: Type of the model and class of its processor. In transformers 5 those of the first kind have a part without a Pillow
#: form, as the processor of videos.
NEEDS_TORCHVISION = {
    "internvl": (tiny_processors.internvl, transformers.InternVLConfig, "InternVLProcessor"),
    "qwen2_5_vl": (tiny_processors.qwen, transformers.Qwen2_5_VLConfig, "Qwen2_5_VLProcessor"),
    "qwen2_vl": (tiny_processors.qwen, transformers.Qwen2VLConfig, "Qwen2VLProcessor"),
    "qwen3_vl": (tiny_processors.qwen, transformers.Qwen3VLConfig, "Qwen3VLProcessor"),
    "smolvlm": (tiny_processors.idefics3, transformers.SmolVLMConfig, "SmolVLMProcessor"),
    "llava_onevision": (tiny_processors.llava, transformers.LlavaOnevisionConfig, "LlavaOnevisionProcessor"),
}
NEEDS_PILLOW = {
    "llava": (tiny_processors.llava, transformers.LlavaConfig, "LlavaProcessor"),
    "gemma3": (tiny_processors.gemma3, transformers.Gemma3Config, "Gemma3Processor"),
    "idefics3": (tiny_processors.idefics3, transformers.Idefics3Config, "Idefics3Processor"),
}
NO_TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed, so nothing is missing"
)


def write_folder(folder: Path, build: Callable[[], Any], config: type, processor_class: str) -> Path:
    """Writes a model folder with tokenizer, image processor and config, but no weights."""
    processor = build()
    processor.tokenizer.save_pretrained(folder)
    config().save_pretrained(folder)
    images = {**processor.image_processor.to_dict(), "processor_class": processor_class}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, default=str))
    return folder


def write_recipe(folder: Path, model: Path) -> str:
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    write_pairs(folder / "a.jsonl", [Pair("q", "yes", "no", ("a.png",))] * 2)
    (folder / "r.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {{train: {folder / 'a.jsonl'}}}\noutput: {{dir: {folder / 'out'}}}\n"
        "optim: {batch_size: 2, micro_batch_size: 2}\n"
    )
    return str(folder / "r.yaml")


@NO_TORCHVISION
@pytest.mark.parametrize("name", NEEDS_TORCHVISION)
def test_a_processor_that_needs_torchvision_names_the_extra(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", *NEEDS_TORCHVISION[name])
    for use in (check_model, lambda path: load_model(ModelRecipe(path=path))):
        with pytest.raises(ImportError, match=r"needs torchvision, but torchvision is not installed.* extra 'vision'"):
            use(str(folder))


@pytest.mark.parametrize("name", NEEDS_PILLOW)
def test_a_processor_that_works_without_torchvision_needs_none(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", *NEEDS_PILLOW[name])
    check_model(str(folder))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert hasattr(load_processor(str(folder), config), "image_processor")
    with pytest.raises(OSError, match="no file named"):  # the weights, which come last
        load_model(ModelRecipe(path=str(folder)))


@NO_TORCHVISION
@pytest.mark.parametrize(
    "command", ["train", "dry run", "dry run of the reference", "dropout-ntp", "correctness", "evaluate"]
)
def test_each_command_stops_before_the_weights(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "model", *NEEDS_TORCHVISION["qwen2_5_vl"])
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"question": "q", "answer_gt": "7", "chosen": "7"}) + "\n")
    recipe = write_recipe(tmp_path, folder)
    if command == "dry run of the reference":
        text = write_folder(tmp_path / "llava", *NEEDS_PILLOW["llava"])
        arguments = ["train", recipe, "--dry-run", f"model.path={text}", f"reference.path={folder}"]
    elif command in ("train", "dry run"):
        arguments = ["train", recipe, *(["--dry-run"] if command == "dry run" else [])]
    elif command == "evaluate":
        arguments = ["evaluate", str(folder), "--data", str(items), "--out", str(tmp_path / "o")]
    else:
        arguments = ["sample", command, str(items), str(tmp_path / "o"), "--model", str(folder)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "needs torchvision, but torchvision is not installed: install the extra 'vision' of mpo-ext" in error
    assert "that matches torch 2." in error


def test_a_torchvision_for_another_torch_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    text = "cannot be imported (RuntimeError: operator torchvision::nms does not exist)"
    assert torchvision_problem() == text
    assert main(["doctor"]) == 0
    assert f"torchvision         {text}: the processors of some vision models need it (extra 'vision')\n" in (
        capsys.readouterr().out
    )
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    assert torchvision_problem() is None
    del sys.modules["torchvision"]  # the empty one


def test_the_extra_is_no_part_of_development() -> None:
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    lines = {line.partition(" = ")[0]: line for line in text.splitlines() if " = [" in line}
    assert "torchvision" in lines["vision"]
    assert not any(
        "torchvision" in line or "vision" in line for name, line in lines.items() if name in ("demo", "dev")
    )


# ---------------------------------------------------------------------- models of another kind

REFUSED = {
    "paligemma": (transformers.PaliGemmaConfig, "attends to its prompt in both directions"),
    "mllama": (transformers.MllamaConfig, "attends to images by cross-attention"),
    "florence2": (transformers.Florence2Config, "has an encoder and a decoder"),
    "pix2struct": (transformers.Pix2StructConfig, "has an encoder and a decoder"),
    "t5gemma2": (transformers.T5Gemma2Config, "has an encoder and a decoder"),
    "blip-2": (lambda: transformers.Blip2Config(text_config={"model_type": "t5"}), "has an encoder and a decoder"),
    "bart": (transformers.BartConfig, "has an encoder and a decoder"),
    "t5": (transformers.T5Config, "has an encoder and a decoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_kind_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    config().save_pretrained(tmp_path)
    for use in (check_model, lambda path: load_model(ModelRecipe(path=path))):
        with pytest.raises(ValueError, match=f"got the model type '{name}', which {reason}: it is not supported"):
            use(str(tmp_path))


def test_causal_models_are_accepted() -> None:
    names = ("Llava", "InternVL", "Qwen2_5_VL", "Qwen3VL", "Gemma3", "Idefics3", "SmolVLM", "LlavaOnevision", "Gemma4")
    names += ("Qwen2", "Llama", "Mistral", "Gemma2", "Phi3", "Blip2", "Mistral3", "Qwen3", "OPT", "GPT2")
    for name in names:
        check_supported(getattr(transformers, f"{name}Config")())


def paligemma() -> tuple[Any, Any]:
    """Returns a tiny PaliGemma of transformers, and its processor."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    tokenizer = tiny_processors.build_tokenizer(["<image>"], bos="<s>")
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    vision = {"model_type": "siglip_vision_model", **vision_families.VISION, "image_size": 28, "patch_size": 14}
    text = {"model_type": "gemma", **vision_families.TEXT, "vocab_size": len(tokenizer), "head_dim": 8}
    config = transformers.PaliGemmaConfig(
        vision_config={**vision, "projection_dim": 32}, text_config=text, projection_dim=32,
        image_token_index=processor.image_token_id,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def test_a_paligemma_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model, processor = paligemma()
    outputs = processor(text=["<image>q"], images=[[Image.new("RGB", (28, 28))]], return_tensors="pt")
    assert "labels" in outputs  # why it would fail in mid-run
    recipe = load_recipe(write_recipe(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="got the model type 'paligemma', which attends to its prompt in both"):
        train(recipe, model=model, processor=processor)
    with pytest.raises(ValueError, match=r"'llava', which has a processor that makes labels \(PaliGemmaProcessor\)"):
        check_supported(transformers.LlavaConfig(), processor)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "XLNet"])
def test_an_encoder_is_refused(name: str) -> None:
    """transformers can load encoders as causal language models, but their attention is not causal."""
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(ValueError, match="which attends to its whole text in both directions: it is not supported"):
        check_supported(config)
    if hasattr(config, "is_decoder") and name != "XLNet":
        config.is_decoder = True
        check_supported(config)
