"""Converts the weights in a checkpoint of InternVL's authors to the names and shapes that transformers uses.

A joint query-key-value projection is split into three weights. All other weights are only renamed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    (r"language_model\.lm_head\.weight", r"lm_head.weight"),
]
_OTHER_LANGUAGE = [(r"language_model\.model\.(.+)", r"model.language_model.\1")]
_LAYER_2, _NEW_LAYER_2 = r"language_model\.model\.layers\.(\d+)", r"model.language_model.layers.\1"
_INTERNLM2 = [
    (r"language_model\.model\.tok_embeddings\.weight", r"model.language_model.embed_tokens.weight"),
    (r"language_model\.model\.norm\.weight", r"model.language_model.norm.weight"),
    (r"language_model\.output\.weight", r"lm_head.weight"),
    (rf"{_LAYER_2}\.attention\.wo\.(weight|bias)", rf"{_NEW_LAYER_2}.self_attn.o_proj.\2"),
    (rf"{_LAYER_2}\.feed_forward\.w1\.weight", rf"{_NEW_LAYER_2}.mlp.gate_proj.weight"),
    (rf"{_LAYER_2}\.feed_forward\.w2\.weight", rf"{_NEW_LAYER_2}.mlp.down_proj.weight"),
    (rf"{_LAYER_2}\.feed_forward\.w3\.weight", rf"{_NEW_LAYER_2}.mlp.up_proj.weight"),
    (rf"{_LAYER_2}\.attention_norm\.weight", rf"{_NEW_LAYER_2}.input_layernorm.weight"),
    (rf"{_LAYER_2}\.ffn_norm\.weight", rf"{_NEW_LAYER_2}.post_attention_layernorm.weight"),
]
_QKV = re.compile(rf"{_LAYER}\.attn\.qkv\.(weight|bias)")
_WQKV = re.compile(rf"{_LAYER_2}\.attention\.wqkv\.(weight|bias)")
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
INTERNLM2 = "InternLM2ForCausalLM"


def converted(name: str, tensor: Any, language: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a weight of the authors' checkpoint, and returns a dict from names in transformers to tensors.

    A joint projection becomes three tensors, for queries, keys and values. Any other tensor is only renamed.

    Args:
        name: Name of the weight in the authors' checkpoint.
        tensor: The weight, on any device. If it is on the meta device, so are the results, which have only shapes.
        language: Section ``llm_config`` of the checkpoint's ``config.json``.

    Raises:
        ValueError: If the name is unknown, or the shape does not fit the config.
    """
    if match := _QKV.fullmatch(name):
        layer, kind = match.groups()
        parts = tensor.chunk(3)
        return {f"{_TOWER}.encoder.layer.{layer}.attention.{part}_proj.{kind}": value
                for part, value in zip("qkv", parts, strict=True)}  # fmt: skip
    is_internlm2 = (language.get("architectures") or [None])[0] == INTERNLM2
    if is_internlm2 and (match := _WQKV.fullmatch(name)):
        layer, kind = match.groups()
        parts = _separate(name, tensor, language)
        return {f"model.language_model.layers.{layer}.self_attn.{part}_proj.{kind}": value
                for part, value in zip("qkv", parts, strict=True)}  # fmt: skip
    for pattern, new in [*_NAMES, *(_INTERNLM2 if is_internlm2 else _OTHER_LANGUAGE)]:
        if match := re.fullmatch(pattern, name):
            return {match.expand(new): tensor}
    raise ValueError(f"the weights must be those of an InternVL model, got {name}, which transformers' InternVL lacks")


def _separate(name: str, tensor: Any, language: Mapping[str, Any]) -> Sequence[Any]:
    """Splits InternLM2's weight ``wqkv`` into the weights of the queries, keys and values.

    The rows of ``wqkv`` form groups, one group for each key-value head. A group has the rows of its query heads, then
    the rows of the key head, then the rows of the value head.
    """
    heads = language["num_attention_heads"]
    groups = language.get("num_key_value_heads") or heads
    per_group, size = heads // groups, language["hidden_size"] // heads
    if tensor.shape[0] != (heads + 2 * groups) * size:
        raise ValueError(
            f"the weights must fit the config, got {name} with shape {tuple(tensor.shape)} for {heads} heads of size "
            f"{size} and {groups} key-value heads"
        )
    rows = tensor.unflatten(0, (groups, per_group + 2, size))
    return [rows[:, :per_group].flatten(0, 2), rows[:, per_group].flatten(0, 1), rows[:, per_group + 1].flatten(0, 1)]
