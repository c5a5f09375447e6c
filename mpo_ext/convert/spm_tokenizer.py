"""Converts a SentencePiece model to a ``PreTrainedTokenizerFast``, without running the checkpoint's code.

InternLM2 checkpoints have no ``tokenizer.json``. Their code reads ``tokenizer.model`` and renames some unused pieces.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BPE = 2  # kinds of models and of pieces in SentencePiece's format
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")


def load_spm_tokenizer(folder: Path, *, extra_special_tokens: Mapping[str, str]) -> Any:
    """Loads ``tokenizer.model`` and ``tokenizer_config.json``, and returns a ``PreTrainedTokenizerFast``.

    The token ids are those of SentencePiece. The setting ``added_tokens_decoder`` may rename tokens. Each text between
    special tokens is encoded separately, as in transformers' slow tokenizers.

    Args:
        folder: Folder of the files.
        extra_special_tokens: Further special tokens: a dict from the name of a tokenizer attribute, such as
            "video_token", to a token. Missing tokens are added to the vocabulary.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the model is not a BPE model, or ``tokenizers`` would split texts in another way. Also raised if
            the ids in ``added_tokens_decoder`` do not continue the ids of the model.
        ModuleNotFoundError: If protobuf is not installed.
    """
    import transformers
    from tokenizers import AddedToken

    for name in ("tokenizer.model", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"IN must have the tokenizer of an InternLM2, got {folder} without {name}")
    proto = _read_model(folder / "tokenizer.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {int(token_id): values for token_id, values in settings.get("added_tokens_decoder", {}).items()}
    tokenizer = _build(proto, {token_id: values["content"] for token_id, values in added.items()})
    others = {
        token_id: {"content": piece.piece, "special": piece.type == _CONTROL, "normalized": False}
        for token_id, piece in enumerate(proto.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED)
    }
    for token_id, values in sorted({**others, **added}.items()):
        tokenizer.add_tokens([AddedToken(**values)])
        if tokenizer.token_to_id(values["content"]) != token_id:
            raise ValueError(
                f"added_tokens_decoder must continue the ids of tokenizer.model, got {values['content']!r} with id "
                f"{token_id} instead of {tokenizer.token_to_id(values['content'])}"
            )
    names = {name: _content(settings[name]) for name in _TOKENS if settings.get(name)}
    _set_ends(tokenizer, settings, names)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        padding_side=settings.get("padding_side", "left"),
        extra_special_tokens=dict(extra_special_tokens),
        **names,
    )


def _read_model(path: Path) -> Any:
    """Reads a SentencePiece model, and returns its ``ModelProto``. Raises ValueError unless it is a BPE model."""
    try:
        import google.protobuf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("protobuf, which reads tokenizer.model, is missing: pip install protobuf") from error
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} must be a SentencePiece model: {error}") from error
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f"{path} must be a BPE model (model_type 2), got {proto.trainer_spec.model_type}")
    return proto


def _build(proto: Any, names: Mapping[int, str]) -> Any:
    """Returns a ``Tokenizer`` with the pieces of a SentencePiece model.

    ``names`` maps the id of a piece to its new text, for renamed pieces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise ValueError(
            "tokenizer.model must keep the text as it is (normalization identity, remove_extra_whitespaces false, "
            f"escape_whitespaces true), got normalization {spec.name or 'identity'}, remove_extra_whitespaces "
            f"{spec.remove_extra_whitespaces}, escape_whitespaces {spec.escape_whitespaces}"
        )
    whole = [piece.piece for number, piece in enumerate(proto.pieces)
             if piece.type == _USER_DEFINED and number not in names]  # fmt: skip
    if spec.add_dummy_prefix and whole:
        raise ValueError(
            "tokenizer.model must not both prepend a space (add_dummy_prefix) and have user-defined pieces, got "
            f"{whole[0]!r}"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={names.get(number, piece.piece): number for number, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=names.get(proto.trainer_spec.unk_id, proto.trainer_spec.unk_piece),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    space = [normalizers.Prepend(" ")] if spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Returns the BPE merges: pairs of normal pieces whose concatenation is also a normal piece.

    A merge whose concatenation has a higher score comes first.
    """
    normal = {piece.piece: (-piece.score, number) for number, piece in enumerate(proto.pieces)
              if piece.type == _NORMAL}  # fmt: skip
    ranked = []
    for text, rank in normal.items():
        for split in range(1, len(text)):
            left, right = text[:split], text[split:]
            if left in normal and right in normal:
                ranked.append((rank, left, right))
    return [(left, right) for _, left, right in sorted(ranked)]


def _content(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else value


def _set_ends(tokenizer: Any, settings: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Makes the tokenizer add BOS or EOS to each text, according to ``add_bos_token`` and ``add_eos_token``.

    ``names`` holds the special tokens, such as ``names["bos_token"]``.
    """
    from tokenizers import processors

    begin = [names["bos_token"]] if settings.get("add_bos_token", True) else []
    end = [names["eos_token"]] if settings.get("add_eos_token", False) else []
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*begin, *end])],
        )
