"""Tests the conversion of a tiny InternVL2.5 with InternLM2.

The expected logits come from a reimplementation of the authors' ``modeling_internlm2.py``.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert_internvl import build, logits, write_original

from mpo_ext.convert.internvl import convert_internvl

pytest.importorskip("google.protobuf", reason="SentencePiece's files are read with protobuf")
VOCAB, HEADS, GROUPS, LAYERS, WIDTH, INNER = 400, 4, 2, 2, 16, 24
CHAT = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
LETTERS = "▁\nabcdefghijklmnopqrstuvwxyzHT.,?:0123456789"
MERGED = ["▁t", "he", "▁the", "in", "▁a", "▁m", "an", "▁man", "y?", "any", "▁many?", "▁▁", "aa", "aaa", "▁many"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_tokenizer(folder: Path, *, dummy: bool = False, unused: int = 1, **changes: Any) -> Any:
    """Writes InternLM2 tokenizer files. Returns the SentencePiece model (a protobuf message).

    Args:
        folder: Where to write.
        dummy: Whether the tokenizer adds a space before the text.
        unused: Number of pieces [UNUSED_TOKEN_n] that the tokenizer config does not rename.
        **changes: Entries of tokenizer_config.json to replace or add.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.unk_id, spec.unk_piece = 2, True, 0, "<unk>"
    normalizer = proto.normalizer_spec
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = (
        dummy,
        False,
        True,
    )
    pieces = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
    pieces += [(text, -number, NORMAL) for number, text in enumerate([*MERGED, *LETTERS])]
    pieces += [(f"[UNUSED_TOKEN_{number}]", 0, USER_DEFINED) for number in range(unused + 2)]
    for text, score, kind in pieces:
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = {0: "<unk>", 1: "<s>", 2: "</s>", **dict(enumerate(CHAT, len(pieces) - 2))}  # renames two of the pieces
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_bos_token": True, "add_eos_token": False, "auto_map": {"AutoTokenizer": ["tokens.X", None]},
        "added_tokens_decoder": {str(number): {"content": text, **flags} for number, text in names.items()},
        "additional_special_tokens": CHAT, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "unk_token": "<unk>", "tokenizer_class": "InternLM2Tokenizer", "model_max_length": 8192, **changes,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return proto


def spm_ids(proto: Any, text: str) -> list[int]:
    """Encodes text with SentencePiece's BPE: merges the adjacent pair with the best score until no pair is left.

    Among equal scores, the leftmost pair is merged first.
    """
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    text = (" " if proto.normalizer_spec.add_dummy_prefix else "") + text
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[a + b], n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        _, first = min(pairs)
        parts[first : first + 2] = ["".join(parts[first : first + 2])]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def language() -> dict[str, Any]:
    return {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "attn_implementation": "eager",
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "bias": False, "hidden_act": "silu",
        "max_position_embeddings": 8, "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "initializer_range": 0.02, "use_cache": True, "return_dict": True, "top_k": 50,
    }  # fmt: skip


def weights(*, bias: bool = False) -> dict[str, torch.Tensor]:
    """Returns random weights under the parameter names of ``modeling_internlm2.py``."""
    torch.manual_seed(3)
    size, shapes = WIDTH // HEADS, {"language_model.model.tok_embeddings.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        at = f"language_model.model.layers.{layer}."
        shapes |= {f"{at}attention.wqkv.weight": ((HEADS + 2 * GROUPS) * size, WIDTH),
                   f"{at}attention.wo.weight": (WIDTH, WIDTH), f"{at}feed_forward.w1.weight": (INNER, WIDTH),
                   f"{at}feed_forward.w2.weight": (WIDTH, INNER), f"{at}feed_forward.w3.weight": (INNER, WIDTH),
                   f"{at}attention_norm.weight": (WIDTH,), f"{at}ffn_norm.weight": (WIDTH,)}  # fmt: skip
        if bias:
            shapes |= {f"{at}attention.wqkv.bias": ((HEADS + 2 * GROUPS) * size,), f"{at}attention.wo.bias": (WIDTH,)}
    shapes |= {"language_model.model.norm.weight": (WIDTH,), "language_model.output.weight": (VOCAB, WIDTH)}
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}


def internlm2_logits(values: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Computes logits [T, vocabulary] of token ids [T] with the equations of ``modeling_internlm2.py``."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, values[f"{name}.weight"], values.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * values[f"{name}.weight"]

    length, size = len(ids), WIDTH // HEADS
    base = 1e6 * ((2.0 * length / 8) - 1) ** (size / (size - 2))  # longer than max_position_embeddings
    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [T, heads, size]
        one, two = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-two, one), -1) * angles.sin()

    x = values["language_model.model.tok_embeddings.weight"][ids]
    mask = torch.full((length, length), -math.inf).triu(1)
    for layer in range(LAYERS):
        at = f"language_model.model.layers.{layer}."
        groups = linear(norm(x, f"{at}attention_norm"), f"{at}attention.wqkv").view(length, GROUPS, -1, size)
        query = rotate(groups[:, :, :-2].reshape(length, HEADS, size))
        key = rotate(groups[:, :, -2]).repeat_interleave(HEADS // GROUPS, 1)
        value = groups[:, :, -1].repeat_interleave(HEADS // GROUPS, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(size) + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(length, WIDTH)
        x = x + linear(mixed, f"{at}attention.wo")
        y = norm(x, f"{at}ffn_norm")
        y = torch.nn.functional.silu(linear(y, f"{at}feed_forward.w1")) * linear(y, f"{at}feed_forward.w3")
        x = x + linear(y, f"{at}feed_forward.w2")
    return linear(norm(x, "language_model.model.norm"), "language_model.output")


def write_internlm2(folder: Path, values: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Writes a checkpoint and returns its folder. ``values`` are the weights of the language model.

    The vision tower and the projector have random weights. ``changes`` are settings of the language model's config.
    """
    source = write_original(folder, build("Qwen3"), "Qwen3", files=1, llm_config={**language(), **changes})
    others = load_file(source / "model.safetensors")
    others = {name: value for name, value in others.items() if not name.startswith("language_model.")}
    save_file({**others, **values}, source / "model.safetensors")
    for path in source.glob("tokenizer*"):
        path.unlink()
    write_tokenizer(source)
    return source


@pytest.mark.parametrize("bias", [False, True])
def test_a_converted_internlm2_has_the_logits_of_its_authors_code(tmp_path: Path, bias: bool) -> None:
    values = weights(bias=bias)
    convert_internvl(write_internlm2(tmp_path / "in", values, bias=bias), tmp_path / "out")
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.text_config.model_type == "llama"
    ids = torch.randint(3, 250, (12,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = model.eval()(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(ours, internlm2_logits(values, ids), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(logits(model)).all()  # with images


@pytest.mark.parametrize(("dummy", "unused"), [(False, 1), (True, 0)])
def test_the_tokenizer_makes_the_ids_of_sentencepiece(tmp_path: Path, dummy: bool, unused: int) -> None:
    source = write_internlm2(tmp_path / "in", weights())
    proto = write_tokenizer(source, dummy=dummy, unused=unused)
    convert_internvl(source, tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    n_pieces = len(proto.pieces)
    assert [made.convert_tokens_to_ids(text) for text in CHAT] == list(range(n_pieces - 2, n_pieces + len(CHAT) - 2))
    assert made.convert_tokens_to_ids("<s>") == made.bos_token_id == 1
    assert (made.pad_token, made.eos_token, made.context_image_token) == ("</s>", "</s>", "<IMG_CONTEXT>")
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices([*LETTERS.replace("▁", " "), " the", " many?", "aaa", "é", "書", "  "], k=12))
        assert made(text)["input_ids"] == [1, *spm_ids(proto, text)]
        assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == text
    turn = [CHAT.index("<|im_start|>") + n_pieces - 2, *spm_ids(proto, "the man"), n_pieces - 2, *spm_ids(proto, "\n")]
    assert made("<|im_start|>the man<|im_end|>\n")["input_ids"] == [1, *turn]
    if unused:
        ids = made("a[UNUSED_TOKEN_0]a", add_special_tokens=False)["input_ids"]
        assert ids == [*spm_ids(proto, "a"), n_pieces - 3, *spm_ids(proto, "a")]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == n_pieces - 2


def test_bos_and_eos_are_those_of_the_settings(tmp_path: Path) -> None:
    source = write_internlm2(tmp_path / "in", weights())
    for number, (begin, end) in enumerate([(False, False), (False, True), (True, True)]):
        write_tokenizer(source, add_bos_token=begin, add_eos_token=end)
        convert_internvl(source, tmp_path / str(number))
        made = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        ids = made("a")["input_ids"]
        assert (ids[0] == 1, ids[-1] == 2, len(ids)) == (begin, end, 1 + begin + end)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_pos_id_version": "v2pe"}, "rope_pos_id_version must be default, got v2pe"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type must be linear or dynamic, got .*yarn"),
        ({"num_key_value_heads": 1}, r"attention\.wqkv\.weight with shape \(32, 16\) for 4 heads of size 4 and 1 key"),
        ({"bias": True}, r"self_attn\.k_proj\.bias with shape none instead of \(8,\)"),
    ],
)
def test_other_internlm2_models_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_internvl(write_internlm2(tmp_path / "in", weights(), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    source = write_internlm2(tmp_path / "in", weights())
    proto = write_tokenizer(source, dummy=True)
    with pytest.raises(ValueError, match=r"prepend a space .* and have user-defined pieces, got '\[UNUSED_TOKEN_0\]'"):
        convert_internvl(source, tmp_path / "out")
    for name, value in (("remove_extra_whitespaces", True), ("escape_whitespaces", False)):
        changed = write_tokenizer(source)
        setattr(changed.normalizer_spec, name, value)
        (source / "tokenizer.model").write_bytes(changed.SerializeToString())
        with pytest.raises(ValueError, match=f"must keep the text as it is .*, got .* {name} {value}"):
            convert_internvl(source, tmp_path / "out")
    proto.trainer_spec.model_type = 1
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"must be a BPE model \(model_type 2\), got 1"):
        convert_internvl(source, tmp_path / "out")
    write_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["900"] = {"content": "<extra>", "special": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"must continue the ids of tokenizer.model, got '<extra>' with id 900 instead"
    ):
        convert_internvl(source, tmp_path / "out")
    (source / "tokenizer.model").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="must be a SentencePiece model"):
        convert_internvl(source, tmp_path / "out")
    (source / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"without tokenizer\.model"):
        convert_internvl(source, tmp_path / "out")
