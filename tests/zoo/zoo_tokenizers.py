"""Tiny tokenizers of the real classes with the families' special tokens, trained on a few sentences."""

import functools
import json
from typing import Any, Literal

import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# The corpus holds the words of the templates, so that merges across the border of a template and a text exist.
CORPUS = [
    "The cat sat on the mat. The answer is 12, because 7 plus 5 is 12.",
    "user\nassistant\nsystem\nmodel\nUSER: ASSISTANT: Assistant: User: You are a helpful assistant.",
    "[INST] What is shown here? [/INST] The picture shows a red square.",
    "Describe the picture. Which colour has the square? It is red. No, it is blue.\n\nFinal answer: blue",
    "First count the squares.\nThere are 3 squares in the first row and 4 in the second row.\n\nThe answer is 7.",
    "<think>\nCount the squares: 3 and 4.\n</think>\n\nThe answer is 7.",
    "question answer picture square colour count Answer with one word. Answer the question: 1 2 3 4 5 6 7 8 9 10 11",
    "这 是 一 张 图 片 。 红 色 的 正 方 形",
    *["one.\n\ntwo\n\nthree:\n"] * 12,  # there are tokens for line breaks, also after a full stop
]
METASPACE = "\u2581"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Scheme = Literal["legacy", "always", "first", "never"]


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def byte_level_bpe(size: int = 420) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the vocabulary and the merges of a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split(LLAMA3_PATTERN)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return _vocabulary_and_merges(tokenizer)


@functools.cache
def metaspace_bpe(size: int = 520) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the vocabulary and the merges of a SentencePiece-style BPE tokenizer, with a token for each byte."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split("\n", behavior="isolated")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    vocabulary, merges = _vocabulary_and_merges(tokenizer)
    doubled = METASPACE * 2  # SentencePiece has tokens for runs of spaces
    vocabulary[doubled] = vocabulary.pop("\n")  # a line break is a byte, as in Llama 2
    merges = [merge for merge in merges if "\n" not in "".join(merge)]
    return vocabulary, [*merges, (METASPACE, METASPACE)]


def _vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]]


def _special(tokens: tuple[str, ...], *, rstrip: bool = False, normalized: bool = False) -> list[AddedToken]:
    return [AddedToken(token, special=True, rstrip=rstrip, normalized=normalized) for token in tokens]


def qwen(*special: str, plain: tuple[str, ...] = (), **options: Any) -> Any:
    """Returns a Qwen2Tokenizer; ``plain`` are added tokens that are not special, such as ``<think>``."""
    vocabulary, merges = byte_level_bpe()
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", **options}
    options.setdefault("additional_special_tokens", ["<|im_start|>", "<|im_end|>", *special])
    tokenizer = transformers.Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), **options)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def gpt2(*special: str, **options: Any) -> Any:
    """Returns a GPT2Tokenizer like SmolLM's."""
    vocabulary, merges = byte_level_bpe()
    options = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>", **options}
    options.setdefault("additional_special_tokens", ["<|im_start|>", "<|im_end|>", *special])
    return transformers.GPT2Tokenizer(vocab=dict(vocabulary), merges=list(merges), **options)


def llama3(*special: str, bos: str = "<|begin_of_text|>", eos: str = "<|eot_id|>", **options: Any) -> Any:
    """Returns a tokenizer with the split pattern of Llama 3. The post-processor adds BOS."""
    vocabulary, merges = byte_level_bpe()
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=True))
    tokenizer.pre_tokenizer = _split(LLAMA3_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_special((bos, eos, *special)))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False, **options
    )


def sentencepiece(
    *special: str,
    scheme: Scheme = "first",
    add_bos: bool = True,
    add_eos: bool = False,
    rstrip: bool = False,
    **options: Any,
) -> Any:
    """Returns a SentencePiece-style tokenizer with byte fallback.

    Args:
        *special: Special tokens. They split a text into pieces.
        scheme: Where the tokenizer adds a space. "never": nowhere. "first": at the beginning of the text. "always": at
            the beginning of each piece. "legacy": as "always", but by a normalizer, as in the tokenizer.json of
            Llama 2 and Mistral v0.1.
        add_bos: Whether encoding with special tokens adds BOS.
        add_eos: Whether encoding with special tokens adds EOS.
        rstrip: Whether special tokens absorb the white space after them, as in Phi-3.
        **options: Passed to the tokenizer class.
    """
    vocabulary, merges = metaspace_bpe()
    vocabulary, merges = dict(vocabulary), list(merges)
    if scheme == "legacy":
        tokenizer = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace(METASPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        )
        tokenizer.add_special_tokens(_special(("<unk>", "<s>", "</s>", *special), rstrip=rstrip))
        begin = ["<s>"] if add_bos else []
        end = ["</s>"] if add_eos else []
        if begin or end:
            single = " ".join([*begin, "$0", *end])
            tokenizer.post_processor = processors.TemplateProcessing(single, None, [("<s>", 1), ("</s>", 2)])
        defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **{**defaults, **options}
        )
    fast = transformers.LlamaTokenizer(
        vocab=vocabulary,
        merges=merges,
        legacy=scheme == "always",
        add_prefix_space=scheme != "never",
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        **options,
    )
    if special:
        fast.add_special_tokens({"additional_special_tokens": _special(special, rstrip=rstrip)})
    return fast


def gemma(*special: str, **options: Any) -> Any:
    """Returns a GemmaTokenizer. It replaces spaces by METASPACE, prepends no space, and keeps line breaks."""
    vocabulary, merges = metaspace_bpe()
    names = {"<unk>": "<unk>", "<s>": "<bos>", "</s>": "<eos>"}
    vocabulary = {names.get(token, token): index for token, index in vocabulary.items()}
    for token in ("<pad>", "<mask>", "\n", "\n\n"):
        vocabulary[token] = len(vocabulary)
    merges = [*merges, ("\n", "\n")]
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=merges, **{"add_bos_token": True, **options})
    tokenizer.add_tokens(_special(special), special_tokens=True)
    return tokenizer
