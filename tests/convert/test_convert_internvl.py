"""Tests the conversion of tiny checkpoints in the format of InternVL's authors.

The expected weight names come from a second mapping in this file, which does not use the converter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mpo_ext.__main__ import main
from mpo_ext.convert.internvl import convert_internvl
from mpo_ext.processors import load_config

LAYERS, WIDTH, EXPERTS = 2, 16, 4
TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>"]
#: Settings that the authors' configs also have.
OTHERS = {
    "_name_or_path": "somewhere", "torch_dtype": "bfloat16", "use_bfloat16": True, "temperature": 0.3, "top_k": 50,
    "max_length": 20, "length_penalty": 1.0, "torchscript": False, "pruned_heads": {}, "bad_words_ids": None,
    "is_decoder": False, "_attn_implementation_autoset": True, "model_type": "x",
}  # fmt: skip


def tokenizer() -> Any:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")
    made.add_tokens(TOKENS, special_tokens=True)
    made.chat_template = "a template of the authors"
    return made


def language_config(kind: str, *, tied: bool) -> dict[str, Any]:
    values = {
        "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "rope_theta": 5e6,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "eos_token_id": 258, "hidden_act": "silu",
    }  # fmt: skip
    if kind not in ("Qwen2", "Llama"):
        values["head_dim"] = 12
    if kind == "Qwen3Moe":
        values |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        values |= {"norm_topk_prob": True, "router_aux_loss_coef": 0.01}
    return values


def vision_config(*, is_large: bool) -> dict[str, Any]:
    """Returns a vision config in the format of InternVL's authors; with ``is_large``, the variant InternViT-6B."""
    return {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": LAYERS,
        "num_channels": 3, "image_size": 56, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm" if is_large else "layer_norm", "qkv_bias": not is_large, "qk_normalization": is_large,
        "attention_dropout": 0.0, "dropout": 0.0, "drop_path_rate": 0.1, "initializer_factor": 0.1,
        "initializer_range": 1e-10, "num_experts": 8, "moe_intermediate_size": 768, "use_moe": False,
        "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "auto_map": {"AutoModel": "x.Y"},
    }  # fmt: skip


def build(kind: str, *, tied: bool = False, is_large: bool = False) -> Any:
    """Returns a transformers InternVL model with random weights. Its config does not come from the converter.

    ``kind`` is the family of the language model, such as "Qwen2".
    """
    vision = vision_config(is_large=is_large)
    config = transformers.InternVLConfig(
        text_config=getattr(transformers, f"{kind}Config")(**language_config(kind, tied=tied)).to_dict(),
        vision_config={
            **{name: vision[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")},
            "num_hidden_layers": LAYERS, "image_size": 56, "patch_size": 14, "norm_type": vision["norm_type"],
            "attention_bias": not is_large, "use_qk_norm": is_large, "layer_norm_eps": 1e-6,
        },
        image_token_id=tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def original_weights(model: Any) -> dict[str, torch.Tensor]:
    """Returns the model's weights under the names of OpenGVLab's code (modeling_internvl_chat.py and its imports)."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tower, out = "model.vision_tower.", {}
    out["vision_model.embeddings.class_embedding"] = state.pop(f"{tower}embeddings.cls_token")
    out["vision_model.embeddings.position_embedding"] = state.pop(f"{tower}embeddings.position_embeddings")
    for part in ("weight", "bias"):
        patches = state.pop(f"{tower}embeddings.patch_embeddings.projection.{part}")
        out[f"vision_model.embeddings.patch_embedding.{part}"] = patches
        for number, name in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            out[f"mlp1.{number}.{part}"] = state.pop(f"model.multi_modal_projector.{name}.{part}")
    for layer in range(LAYERS):
        new, old = f"{tower}encoder.layer.{layer}.", f"vision_model.encoder.layers.{layer}."
        for part in ("weight", "bias"):
            if f"{new}attention.q_proj.{part}" in state:
                out[f"{old}attn.qkv.{part}"] = torch.cat([state.pop(f"{new}attention.{x}_proj.{part}") for x in "qkv"])
        pairs = {"attention.projection_layer": "attn.proj", "attention.q_norm": "attn.q_norm",
                 "attention.k_norm": "attn.k_norm", "layernorm_before": "norm1", "layernorm_after": "norm2",
                 "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
        for name, other in pairs.items():
            for part in ("weight", "bias"):
                if f"{new}{name}.{part}" in state:
                    out[f"{old}{other}.{part}"] = state.pop(f"{new}{name}.{part}")
        out[f"{old}ls1"], out[f"{old}ls2"] = state.pop(f"{new}lambda_1"), state.pop(f"{new}lambda_2")
    for name in list(state):
        tensor = state.pop(name)
        if name == "lm_head.weight":
            out["language_model.lm_head.weight"] = tensor
            continue
        name = f"language_model.model.{name.removeprefix('model.language_model.')}"
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out |= {f"{name[:-13]}.{expert}.gate_proj.weight": gate, f"{name[:-13]}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            out |= {f"{name[:-10]}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            out[name] = tensor
    assert not state
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def write_original(
    folder: Path,
    model: Any,
    kind: str,
    *,
    is_large: bool = False,
    with_head: bool = True,
    files: int = 2,
    **changes: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    language = {
        **language_config(kind, tied=tied),
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": "x",
        **OTHERS,
    }
    values = {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "ps_version": "v2", "select_layer": -1,
        "auto_map": {"AutoConfig": "a.B", "AutoModel": "c.D", "AutoModelForCausalLM": "c.D"}, "downsample_ratio": 0.5,
        "force_image_size": 56, "min_dynamic_patch": 1, "max_dynamic_patch": 6, "template": "internvl2_5",
        "use_backbone_lora": 0, "use_llm_lora": 0, "torch_dtype": "float32", "transformers_version": None,
        "vision_config": {**vision_config(is_large=is_large), **OTHERS}, "llm_config": language, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer().save_pretrained(folder)
    weights = original_weights(model)
    if not with_head:
        del weights["language_model.lm_head.weight"]
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    places = {name: f"model-{1 + index % files}.safetensors" for index, name in enumerate(weights)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    image = model.config.image_token_id
    ids = torch.tensor([[5, 9, *[image] * 4, 40, 41], [7, *[image] * 4, 50, 51, 52]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(2, 3, 56, 56)).logits


@pytest.mark.parametrize(
    ("kind", "tied", "is_large", "files"),
    [
        ("Qwen2", False, False, 1),
        ("Qwen3", True, False, 2),
        ("Qwen3", False, True, 2),
        ("Qwen3Moe", False, False, 3),
        ("Llama", False, True, 2),
    ],
)
def test_a_converted_model_has_the_same_logits(
    tmp_path: Path, kind: str, tied: bool, is_large: bool, files: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(kind, tied=tied, is_large=is_large)
    source = write_original(tmp_path / "in", model, kind, is_large=is_large, files=files)
    out = tmp_path / "out"
    assert main(["convert-model", str(source), str(out)]) == 0
    assert f"model.path={out}" in capsys.readouterr().out
    converted, report = transformers.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(converted).__name__ == "InternVLForConditionalGeneration"
    assert converted.dtype == torch.float32
    torch.testing.assert_close(logits(converted.eval()), logits(model), rtol=0, atol=0)
    assert (converted.lm_head.weight is converted.get_input_embeddings().weight) == tied
    written = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert ("lm_head.weight" in written) != tied
    text = converted.config.text_config
    assert text.rope_parameters["rope_theta"] == 5e6
    assert text.rms_norm_eps == 1e-5
    assert not {"temperature", "top_k", "torchscript", "pruned_heads"} & set(json.loads(text.to_json_string(False)))
    if kind == "Qwen3Moe":
        assert text.router_aux_loss_coef == 0.01


def test_the_tokenizer_and_the_settings_are_those_of_internvl(tmp_path: Path) -> None:
    source = write_original(tmp_path / "in", build("Qwen3"), "Qwen3")
    convert_internvl(source, tmp_path / "out", say=lambda line: None)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    names = [made.start_image_token, made.end_image_token, made.context_image_token, made.video_token]
    assert names == ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    original = tokenizer()
    assert made("a <img><IMG_CONTEXT></img> b")["input_ids"] == original("a <img><IMG_CONTEXT></img> b")["input_ids"]
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Two"}]
    text = made.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\n<IMG_CONTEXT>\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
    prompt = made.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (images["size"], images["crop_to_patches"], images["max_patches"]) == (
        {"height": 56, "width": 56}, True, 6
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_seq_length"] == 4
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == original.convert_tokens_to_ids("<|im_end|>")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("template", ["internlm2-chat", "Hermes-2"])
def test_older_templates_have_no_line_break_after_a_turn(tmp_path: Path, template: str) -> None:
    convert_internvl(write_original(tmp_path / "in", build("Qwen2"), "Qwen2", template=template), tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two"}]
    text = made.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nHow many?<|im_end|><|im_start|>assistant\nTwo<|im_end|>"


def test_a_tied_head_may_be_absent_and_an_unequal_one_is_kept(tmp_path: Path) -> None:
    model = build("Qwen3", tied=True)
    convert_internvl(write_original(tmp_path / "in", model, "Qwen3", with_head=False), tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings
    source = write_original(tmp_path / "other", model, "Qwen3", files=1)
    weights = load_file(source / "model.safetensors")
    weights["language_model.lm_head.weight"] += 1
    save_file(weights, source / "model.safetensors")
    convert_internvl(source, tmp_path / "untied")
    converted = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "untied")
    torch.testing.assert_close(converted.lm_head.weight, converted.get_input_embeddings().weight + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "internvl"}, "model_type of .*config.json must be 'internvl_chat', got 'internvl'"),
        ({"ps_version": "v1"}, "ps_version must be 'v2', got 'v1'"),
        ({"use_llm_lora": 16}, "use_llm_lora must be 0, got 16"),
        ({"force_image_size": 112}, "force_image_size must be vision_config.image_size, 56, got 112"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "be one of Qwen2ForCausalLM.*got Phi3.*OpenGVLab"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "got GptOss.*: take .*GPT-OSS-20B-A4B-Preview-HF"),
        ({"llm_config": {"architectures": ["InternLM3ForCausalLM"]}}, "got InternLM3.*: take .*InternVL3-9B-hf"),
        ({"template": "phi3-chat"}, "template must be one of internvl2_5, .*, got phi3-chat"),
        ({"use_thumbnail": False}, "use_thumbnail must be True, got False"),
        ({"dynamic_image_size": False}, "dynamic_image_size must be True, got False"),
        ({"llm_config": None}, "must have a section llm_config, got None"),
        ({"vision_config": {**vision_config(is_large=False), "num_hidden_layers": 3}}, "fit the config, got .*none"),
        ({"vision_config": {**vision_config(is_large=False), "image_size": 28}, "force_image_size": 28},
         r"position_embeddings with shape \(1, 17, 16\) instead of \(1, 5, 16\)"),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write_original(tmp_path / "in", build("Qwen3"), "Qwen3", **changes)
    with pytest.raises(ValueError, match=message):
        convert_internvl(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_and_missing_weights_are_refused(tmp_path: Path) -> None:
    source = write_original(tmp_path / "in", build("Qwen3Moe"), "Qwen3Moe", files=1)
    path = source / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "router.0.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"got router\.0\.weight, which transformers' InternVL lacks"):
        convert_internvl(source, tmp_path / "out")
    fewer = {name: value for name, value in weights.items() if ".experts.3.up_proj" not in name}
    save_file(fewer, path)
    with pytest.raises(ValueError, match="must hold 24 matrices of experts, got 22"):
        convert_internvl(source, tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"without model\.safetensors"):
        convert_internvl(source, tmp_path / "out")


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_original(tmp_path / "in", build("Qwen3"), "Qwen3")
    values = json.loads((source / "config.json").read_text())
    values["llm_config"]["vocab_size"] = 261
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"id of <IMG_CONTEXT> must be below .*\.vocab_size, 261, got 261"):
        convert_internvl(source, tmp_path / "out")


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert main(["convert-model", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "OUT must be a new or empty folder" in capsys.readouterr().err


def test_the_current_folder_is_refused_before_the_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", "../out"):
        assert main(["convert-model", str(tmp_path), out]) == 2
        assert f"OUT must not be the current folder, got {tmp_path}/out: name another" in capsys.readouterr().err


def test_a_revision_of_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-model", str(tmp_path), str(tmp_path / "out"), "--revision", "v1"]) == 2
    assert f"--revision must be left out for a folder, got v1 for {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "must hold a JSON object, got \\[\\]"),
        ("config.json", "{", "config.json must be JSON in UTF-8"),
        (
            "model.safetensors.index.json",
            "{}",
            "weight_map of .*index.json must name the file of each weight, got None",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": 1}}',
            "must name the file of each weight, got {'a': 1}",
        ),
    ],
)
def test_broken_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    source = write_original(tmp_path / "in", build("Qwen3"), "Qwen3")
    (source / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert_internvl(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_name_the_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_original(tmp_path / "in", build("Qwen3"), "Qwen3")
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {source}, trust_remote_code: true}}\ndata: {{train: p.jsonl}}\noutput: {{dir: out}}\n"
    )
    (tmp_path / "p.jsonl").write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n')
    command = ["train", str(tmp_path / "r.yaml"), f"data.train={tmp_path / 'p.jsonl'}", f"output.dir={tmp_path / 'o'}"]
    assert main([*command, "--dry-run"]) == 2
    assert main(command) == 2
    assert main(["doctor", str(source)]) == 2
    err = capsys.readouterr().err
    assert err.count(f"'mpo-ext convert-model {source} FOLDER'") == 3
    with pytest.raises(ValueError, match="model_type internvl_chat"):
        load_config(str(source), trust_remote_code=True)
