"""Converts checkpoints of InternVL's authors (model type ``internvl_chat``) to transformers' InternVL.

The weights keep their values. They are renamed, and joint projections of queries, keys and values are split. An
InternLM2 language model becomes an equivalent Llama. The new names are those of ``convert_internvl_weights_to_hf.py``
in transformers. Unlike that script, this module also converts InternVL3.5.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.checks import shorten
from mpo_ext.convert.internvl_names import EMBEDDING, HEAD, INTERNLM2, converted
from mpo_ext.convert.spm_tokenizer import load_spm_tokenizer
from mpo_ext.files import check_replaceable, sync_tree, write_json

MODEL_TYPE = "internvl_chat"

#: Model types of transformers by the class of the language model; other classes are rejected.
_LANGUAGE_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
    INTERNLM2: "llama",
}
#: Advice for some of the other language models.
_HINTS = {
    "GptOssForCausalLM": "take OpenGVLab/InternVL3_5-GPT-OSS-20B-A4B-Preview-HF",
    "InternLM3ForCausalLM": "take OpenGVLab/InternVL3-9B-hf",
}
#: Text after a turn, by the name of the authors' template (``conversation.py`` in github.com/OpenGVLab/InternVL).
_TURN_ENDS = {"internvl2_5": "<|im_end|>\n", "internlm2-chat": "<|im_end|>", "Hermes-2": "<|im_end|>"}
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
    "{{ TURN_END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def convert_internvl(source: Path, out: Path, *, say: Callable[[str], object] = print) -> None:
    """Converts a checkpoint of InternVL's authors to a checkpoint of ``InternVLForConditionalGeneration``.

    One file of weights is in memory at a time. The dtype is kept.

    Args:
        source: Folder with ``config.json``, tokenizer and weights (safetensors).
        out: New or empty folder for the result. The files appear when the conversion is complete.
        say: Called with each line of progress output.

    Raises:
        FileExistsError: If ``out`` is a file, or a folder that is not empty.
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If the format or the language model is not supported, or the weights do not fit the config. Also
            raised if ``out`` is the current folder or a mount point.
    """
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"OUT must be a new or empty folder, got {out}")
    check_replaceable("OUT", out)
    values = _read_config(source)
    language = values["llm_config"]
    _check_config(values)
    files = _weight_files(source)
    shapes = {name: shape for file in files for name, shape in _shapes(file, language).items()}
    tokenizer = _load_tokenizer(source, values)
    is_tied = _is_tied(values, files, shapes)
    config = internvl_config(values, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), is_tied=is_tied)
    if config.image_token_id >= config.text_config.vocab_size:
        raise ValueError(
            f"the id of <IMG_CONTEXT> must be below llm_config.vocab_size, {config.text_config.vocab_size}, got "
            f"{config.image_token_id}: the tokenizer belongs to another model"
        )
    skipped = {HEAD} if is_tied else set()
    _check_weights(config, {name: shape for name, shape in shapes.items() if name not in skipped})
    partial = out.with_name(f".{out.name}.{secrets.token_hex(6)}")
    partial.mkdir(parents=True)
    try:
        _write_weights(files, partial, language, skipped, say)
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
        is_tied: Whether the output head shares its weights with the embedding.

    Raises:
        ValueError: If the checkpoint cannot be converted.
    """
    import transformers

    _check_config(values)
    language, vision = values["llm_config"], values["vision_config"]
    kind = _LANGUAGE_MODELS[_architecture(values)]
    text = _llama_settings(language) if _architecture(values) == INTERNLM2 else _settings_of_model(language)
    text |= {"use_cache": True, "tie_word_embeddings": is_tied}
    size = vision["image_size"]
    ratio, dropout = values.get("downsample_ratio", 0.5), vision.get("attention_dropout", 0.0)
    return transformers.InternVLConfig(
        text_config=transformers.AutoConfig.for_model(kind, **text).to_dict(),
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


def _architecture(values: Mapping[str, Any]) -> str:
    return str((values["llm_config"].get("architectures") or [None])[0])


def _check_config(values: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if the config requires a feature that transformers' InternVL does not support."""
    architecture = _architecture(values)
    if architecture not in _LANGUAGE_MODELS:
        hint = _HINTS.get(architecture, "the hub has converted checkpoints of many InternVL models under OpenGVLab, "
                          "with -hf or -HF at the end of their names")  # fmt: skip
        raise ValueError(
            f"llm_config.architectures must be one of {', '.join(_LANGUAGE_MODELS)}, got {architecture}: {hint}"
        )
    for name, expected in (
        ("ps_version", "v2"),
        ("use_backbone_lora", 0),
        ("use_llm_lora", 0),
        ("use_thumbnail", True),
        ("dynamic_image_size", True),
    ):
        if values.get(name, expected) != expected:
            raise ValueError(
                f"{name} must be {expected!r}, got {values[name]!r}: transformers' InternVL supports no other"
            )
    if (template := values.get("template")) not in _TURN_ENDS:
        raise ValueError(
            f"template must be one of {', '.join(_TURN_ENDS)}, got {template}: other templates end turns differently"
        )
    size = values["vision_config"]["image_size"]
    if (forced := values.get("force_image_size") or size) != size:
        raise ValueError(f"force_image_size must be vision_config.image_size, {size}, got {forced}")
    if (version := values["llm_config"].get("rope_pos_id_version", "default")) != "default":
        raise ValueError(f"llm_config.rope_pos_id_version must be default, got {version}: Llama supports no other")


#: Settings of an InternLM2 that a Llama has too, with the defaults of ``configuration_internlm2.py``.
_INTERNLM2_SETTINGS = {
    "vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": None, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _llama_settings(language: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config values of a Llama that is equivalent to the InternLM2 with the config ``language``."""
    settings = {name: language.get(name, default) for name, default in _INTERNLM2_SETTINGS.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    if (scaling := settings.pop("rope_scaling", None)) is not None:
        if scaling.get("type") not in ("linear", "dynamic"):
            raise ValueError(f"llm_config.rope_scaling.type must be linear or dynamic, got {scaling}")
        settings["rope_scaling"] = {"rope_type": scaling["type"], "factor": scaling["factor"]}
    return settings | {"attention_bias": language.get("bias", True)}


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
    """Returns the entries of a config that define the architecture, and the ids of special tokens.

    Entries that every model's config has are left out. So are entries with the value None, and entries whose name
    begins with "_".
    """
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
    values = _read_object(path)
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type of {path} must be {MODEL_TYPE!r}, got {values.get('model_type')!r}")
    for name in ("llm_config", "vision_config"):
        if not isinstance(values.get(name), dict):
            raise ValueError(f"{path} must have a section {name}, got {values.get(name)!r}")
    return values


def _read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises ValueError if the file holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON in UTF-8, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shorten(values)}")
    return values


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        files_by_weight = _read_object(index).get("weight_map")
        if not isinstance(files_by_weight, dict) or not all(
            isinstance(name, str) for name in files_by_weight.values()
        ):
            raise ValueError(
                f"weight_map of {index} must name the file of each weight, got {shorten(files_by_weight)}"
            )
        names = sorted(set(files_by_weight.values()))
    files = [source / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"IN must hold its weights as safetensors, got {source} without {file.name}")
    return files


def _shapes(file: Path, language: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the converted tensors in a file of weights, by new name. Reads no weights."""
    import torch
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            empty = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
            shapes |= {new: tuple(part.shape) for new, part in converted(name, empty, language).items()}
    return shapes


def _load_tokenizer(source: Path, values: Mapping[str, Any]) -> Any:
    """Loads the tokenizer, and sets the special tokens and the chat template that ``InternVLProcessor`` requires."""
    import transformers

    if _architecture(values) == INTERNLM2:
        tokenizer = load_spm_tokenizer(source, extra_special_tokens=_TOKENS)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, extra_special_tokens=_TOKENS
        )
    tokenizer.chat_template = _TEMPLATE.replace("TURN_END", repr(_TURN_ENDS[values["template"]]))
    return tokenizer


def _is_tied(values: Mapping[str, Any], files: Sequence[Path], shapes: Mapping[str, Any]) -> bool:
    """Returns whether the output head shares its weights with the embedding.

    This is True only if the config ties both weights. If the checkpoint stores a head, the head must also be equal to
    the embedding.
    """
    language = values["llm_config"]
    if not language.get("tie_word_embeddings", values.get("tie_word_embeddings", False)):
        return False
    if HEAD not in shapes:
        return True
    head, embedding = (_read_tensor(files, name, language) for name in (HEAD, EMBEDDING))
    return bool((head == embedding).all())


def _read_tensor(files: Sequence[Path], name: str, language: Mapping[str, Any]) -> Any:
    """Returns the tensor of the authors' checkpoint that becomes the tensor ``name`` of the converted model.

    Use this function only for tensors that the conversion renames, not for tensors that it splits.
    """
    import torch
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            for original in tensors.keys():  # noqa: SIM118
                empty = torch.empty(tensors.get_slice(original).get_shape(), device="meta")
                if name in converted(original, empty, language):
                    return tensors.get_tensor(original)
    raise ValueError(f"the weights must hold {name}, got none")


def _check_weights(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``ValueError`` unless the converted weights have the names and shapes that the config requires.

    For MoE experts, only the number of matrices is checked. Their names and shapes depend on the version of
    transformers.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    found = dict(shapes)
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


def _write_weights(
    files: Sequence[Path], out: Path, language: Mapping[str, Any], skipped: set[str], say: Callable[[str], object]
) -> None:
    from safetensors.torch import load_file, save_file

    places: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        target = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Any] = {}
        for name, tensor in load_file(file).items():
            parts = converted(name, tensor, language)
            tensors |= {new: part.clone() for new, part in parts.items() if new not in skipped}
        save_file(tensors, out / target, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, target)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        say(f"{file.name}: {len(tensors)} tensors ({number} of {len(files)} files)")
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(out / "model.safetensors.index.json", index)


def _write_settings(config: Any, values: Mapping[str, Any], tokenizer: Any, out: Path) -> None:
    """Writes the tokenizer and all config files to the folder ``out``."""
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
