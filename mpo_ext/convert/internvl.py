"""Converts checkpoints of InternVL's authors (model type ``internvl_chat``) to transformers' InternVL.

The weights keep their values; they are renamed, and the projections of queries, keys and values of the vision tower
are separated. The mapping is that of ``convert_internvl_weights_to_hf.py`` in transformers, with InternVL3.5 added.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.files import sync_tree, write_json

MODEL_TYPE = "internvl_chat"

#: Model types of transformers by the class of the language model; other classes are refused.
_LANGUAGE_MODELS = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
           "video_token": "<video>"}  # fmt: skip
_END_OF_TURN = "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TOWER, _LAYER = "model.vision_tower", r"vision_model\.encoder\.layers\.(\d+)"
_NEW_LAYER = rf"{_TOWER}.encoder.layer.\1"
#: Patterns of the authors' names and the names in transformers.
_NAMES = [
    (r"vision_model\.embeddings\.class_embedding", rf"{_TOWER}.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", rf"{_TOWER}.embeddings.position_embeddings"),
    (
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        rf"{_TOWER}.embeddings.patch_embeddings.projection.\1",
    ),
    (rf"{_LAYER}\.attn\.proj\.(weight|bias)", rf"{_NEW_LAYER}.attention.projection_layer.\2"),
    (rf"{_LAYER}\.attn\.([qk]_norm)\.weight", rf"{_NEW_LAYER}.attention.\2.weight"),
    (rf"{_LAYER}\.norm1\.(weight|bias)", rf"{_NEW_LAYER}.layernorm_before.\2"),
    (rf"{_LAYER}\.norm2\.(weight|bias)", rf"{_NEW_LAYER}.layernorm_after.\2"),
    (rf"{_LAYER}\.ls([12])", rf"{_NEW_LAYER}.lambda_\2"),
    (rf"{_LAYER}\.(mlp\.fc[12])\.(weight|bias)", rf"{_NEW_LAYER}.\2.\3"),
    (r"mlp1\.0\.(weight|bias)", r"model.multi_modal_projector.layer_norm.\1"),
    (r"mlp1\.1\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"mlp1\.3\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"language_model\.lm_head\.weight", r"lm_head.weight"),
]
_QKV = re.compile(rf"{_LAYER}\.attn\.qkv\.(weight|bias)")
_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def convert_internvl(source: Path, out: Path, *, say: Callable[[str], object] = print) -> None:
    """Writes an InternVL checkpoint of its authors as a checkpoint of ``InternVLForConditionalGeneration``.

    One file of weights is in memory at a time. The dtype stays that of the checkpoint.

    Args:
        source: Folder with ``config.json``, tokenizer and weights (safetensors).
        out: Folder to write, which must not exist or be empty. It appears when the conversion is complete.
        say: Called with lines about the progress.

    Raises:
        FileExistsError: If ``out`` is a file, or a folder that is not empty.
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If the checkpoint has another format or language model, or its weights are not those of its config.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"OUT must be a new or empty folder, got {out}")
    values = _read_config(source)
    files = _weight_files(source)
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    tokenizer = _load_tokenizer(source)
    is_tied = _is_tied(values, files, shapes)
    config = internvl_config(values, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), is_tied=is_tied)
    skipped = {_HEAD} if is_tied else set()
    _check_weights(config, {name: shape for name, shape in shapes.items() if name not in skipped})
    partial = out.with_name(f".{out.name}.{secrets.token_hex(6)}")
    partial.mkdir(parents=True)
    try:
        _write_weights(files, partial, skipped, say)
        _write_settings(config, values, tokenizer, partial)
        sync_tree(partial)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def internvl_config(values: Mapping[str, Any], image_token_id: int, *, is_tied: bool) -> Any:
    """Returns the ``InternVLConfig`` for the ``config.json`` of an ``internvl_chat`` checkpoint.

    Args:
        values: Content of ``config.json``.
        image_token_id: Id of the token ``<IMG_CONTEXT>``.
        is_tied: Whether the output head has the weights of the embedding.

    Raises:
        ValueError: If the checkpoint cannot be converted.
    """
    import transformers

    language, vision = values["llm_config"], values["vision_config"]
    architecture = (language.get("architectures") or [None])[0]
    if architecture not in _LANGUAGE_MODELS:
        raise ValueError(
            f"llm_config.architectures must be one of {', '.join(_LANGUAGE_MODELS)}, got {architecture}: the hub has "
            "converted checkpoints of many InternVL models under OpenGVLab, with -hf or -HF at the end of their names"
        )
    for name, expected in (("ps_version", "v2"), ("use_backbone_lora", 0), ("use_llm_lora", 0)):
        if values.get(name, expected) != expected:
            raise ValueError(f"{name} must be {expected!r}, got {values[name]!r}: transformers' InternVL has no other")
    size = vision["image_size"]
    if (forced := values.get("force_image_size") or size) != size:
        raise ValueError(f"force_image_size must be vision_config.image_size, {size}, got {forced}")
    text = {**_settings_of_model(language), "use_cache": True, "tie_word_embeddings": is_tied}
    ratio, dropout = values.get("downsample_ratio", 0.5), vision.get("attention_dropout", 0.0)
    return transformers.InternVLConfig(
        text_config=transformers.AutoConfig.for_model(_LANGUAGE_MODELS[architecture], **text).to_dict(),
        vision_config={
            **{name: vision[name] for name in _VISION_SETTINGS if name in vision},
            "model_type": "internvl_vision",
            "attention_bias": vision.get("qkv_bias", False),
            "use_qk_norm": vision.get("qk_normalization", False),
            "layer_scale_init_value": vision.get("initializer_factor", 0.1),
            "attention_dropout": dropout,
            "projection_dropout": vision.get("dropout", 0.0),
        },
        image_token_id=image_token_id,
        image_seq_length=round((size // vision["patch_size"]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=values.get("select_layer", -1),
        tie_word_embeddings=is_tied,
        architectures=["InternVLForConditionalGeneration"],
        dtype=values.get("torch_dtype") or values.get("dtype"),
    )


_VISION_SETTINGS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_channels", "image_size",
    "patch_size", "hidden_act", "norm_type", "layer_norm_eps", "initializer_range",
)  # fmt: skip
_TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
#: Settings of all models in the versions of transformers that wrote the authors' configs.
_OF_ALL_MODELS = {
    "add_cross_attention", "auto_map", "is_decoder", "pruned_heads", "tf_legacy_loss", "tie_encoder_decoder",
    "torch_dtype", "torchscript", "use_bfloat16",
}  # fmt: skip


def _settings_of_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config without those that all models have, and without those of generation."""
    import transformers

    others = {*transformers.PretrainedConfig().to_dict(), *vars(transformers.GenerationConfig()), *_OF_ALL_MODELS}
    others -= _TOKEN_IDS
    return {
        name: value
        for name, value in values.items()
        if value is not None and not name.startswith("_") and name not in others
    }


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"IN must be a folder with config.json, got {source}")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type of {path} must be {MODEL_TYPE!r}, got {values.get('model_type')!r}")
    for name in ("llm_config", "vision_config"):
        if not isinstance(values.get(name), dict):
            raise ValueError(f"{path} must have a section {name}, got {values.get(name)!r}")
    return values


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [source / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"IN must hold its weights as safetensors, got {source} without {file.name}")
    return files


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _load_tokenizer(source: Path) -> Any:
    """Loads the tokenizer and adds the tokens, names and chat template that ``InternVLProcessor`` reads."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        source, trust_remote_code=False, extra_special_tokens=_TOKENS
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _is_tied(values: Mapping[str, Any], files: Sequence[Path], shapes: Mapping[str, Any]) -> bool:
    """Returns whether the head shares the weights of the embedding: if the config says so, and no others are there."""
    language = values["llm_config"]
    if not language.get("tie_word_embeddings", values.get("tie_word_embeddings", False)):
        return False
    return _HEAD not in shapes or bool((_read_tensor(files, _HEAD) == _read_tensor(files, _EMBEDDING)).all())


def _read_tensor(files: Sequence[Path], name: str) -> Any:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    raise ValueError(f"the weights must hold {name}, got none")


def renamed(name: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the names in transformers of one of the authors' tensors, each with its shape.

    The tensors divide the first axis of the authors' tensor equally; there are three for queries, keys and values.

    Raises:
        ValueError: If the name is unknown.
    """
    if match := _QKV.fullmatch(name):
        layer, kind = match.groups()
        for part in "qkv":
            yield f"{_TOWER}.encoder.layer.{layer}.attention.{part}_proj.{kind}", (shape[0] // 3, *shape[1:])
        return
    for pattern, new in _NAMES:
        if match := re.fullmatch(pattern, name):
            yield match.expand(new), tuple(shape)
            return
    raise ValueError(f"the weights must be those of an InternVL model, got {name}, which transformers' InternVL lacks")


def _check_weights(config: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ``ValueError`` unless names and shapes of the renamed weights are those of the model.

    Versions of transformers store the weights of experts differently, so these are counted only.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    found = dict(entry for name, shape in shapes.items() for entry in renamed(name, shape))
    experts = [name for name in found if ".experts." in name]
    n_expected = (
        3
        * getattr(config.text_config, "num_experts", 0)
        * len({name.partition(".experts.")[0] for name in expected if ".experts." in name})
    )
    if len(experts) != n_expected:
        raise ValueError(f"the weights must hold {n_expected} matrices of experts, got {len(experts)}")
    expected, found = ({key: each for key, each in names.items() if ".experts." not in key}
                       for names in (expected, found))  # fmt: skip
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"the weights must fit the config, got {name} with shape {found.get(name, 'none')} instead of "
                f"{expected.get(name, 'none')}"
            )


def _write_weights(files: Sequence[Path], out: Path, skipped: set[str], say: Callable[[str], object]) -> None:
    from safetensors.torch import load_file, save_file

    places: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        target = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Any] = {}
        for name, tensor in load_file(file).items():
            if name in skipped:
                continue
            new = [key for key, _ in renamed(name, tensor.shape)]
            tensors |= {key: part.clone() for key, part in zip(new, tensor.chunk(len(new)), strict=True)}
        save_file(tensors, out / target, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, target)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        say(f"{file.name}: {len(tensors)} tensors ({number} of {len(files)} files)")
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(out / "model.safetensors.index.json", index)


def _write_settings(config: Any, values: Mapping[str, Any], tokenizer: Any, out: Path) -> None:
    """Writes the configs of the model, of generation and of the processor, and the tokenizer."""
    from transformers import GenerationConfig

    config.save_pretrained(out)
    end = tokenizer.convert_tokens_to_ids(_END_OF_TURN)
    GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)
    tokenizer.save_pretrained(out)
    edge = values["vision_config"]["image_size"]
    images = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": edge, "width": edge},
    }
    tiles = {
        "crop_to_patches": True,
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "min_patches": values.get("min_dynamic_patch", 1),
        "max_patches": values.get("max_dynamic_patch", 12),
    }
    write_json(out / "preprocessor_config.json", images | tiles)
    write_json(out / "video_preprocessor_config.json", images | {"video_processor_type": "InternVLVideoProcessor"})
    write_json(
        out / "processor_config.json",
        {"image_seq_length": config.image_seq_length, "processor_class": "InternVLProcessor"},
    )
