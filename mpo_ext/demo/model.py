"""A real InternVLForConditionalGeneration, small enough for two cores, with a tokenizer of whole words."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from mpo_ext.demo import digits

IMAGE_TOKENS = 4  # one per digit: 4x4 patches of 8x8 pixels, joined 2x2 by the downsample ratio of 0.5
IGNORE_INDEX = -100
_PIXEL_MEAN, _PIXEL_SPREAD = 0.3, 0.35  # of the digits, rounded
_PAD, _END, _IMAGE, _USER, _ASSISTANT = "<pad>", "<|im_end|>", "<IMG_CONTEXT>", "<|user|>", "<|assistant|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: one token per word, so that an answer takes few steps."""
    special = [_PAD, _END, _IMAGE, _USER, _ASSISTANT]
    words = [*special, "<unk>", *digits.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token="<unk>",
        additional_special_tokens=[_IMAGE, _USER, _ASSISTANT],
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, layers: int = 3
) -> InternVLForConditionalGeneration:
    """Builds an untrained model. No dropout and no drop path, so policy and reference agree at the first step."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [digits.IMAGE_PIXELS] * 2,
            "patch_size": [8, 8],
            "num_channels": 1,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE),
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=0.5,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # A sampled image token would make a response that no forward pass accepts: it has no image to stand for.
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    model.generation_config.suppress_tokens = sorted(special)
    return model


def prompt_ids(tokenizer: PreTrainedTokenizerFast, task: digits.Task) -> list[int]:
    """Token ids of a question up to where the response begins. All prompts with an image have the same length."""
    image = "" if task.image is None else f"{_IMAGE} " * IMAGE_TOKENS
    return tokenizer.encode(f"{_USER} {image}{task.question} {_ASSISTANT}", add_special_tokens=False)


def response_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a response, without the end token."""
    return tokenizer.encode(text, add_special_tokens=False)


def image_inputs(tasks: Sequence[digits.Task]) -> dict[str, Tensor]:
    """The images of those tasks that have one, as ``pixel_values`` ``[B, 1, 32, 32]``; nothing where none has."""
    images = [task.image for task in tasks if task.image is not None]
    return {"pixel_values": (torch.stack(images) - _PIXEL_MEAN) / _PIXEL_SPREAD} if images else {}


def collate(
    tokenizer: PreTrainedTokenizerFast, tasks: Sequence[digits.Task], responses: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Builds a batch of prompts with responses, padded on the right. The end token is scored, the prompt is not.

    Args:
        tokenizer: From ``build_tokenizer``.
        tasks: Length B.
        responses: Length B; token ids without the end token.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]`` int64, and ``pixel_values``.
    """
    rows, labels = [], []
    for task, response in zip(tasks, responses, strict=True):
        prompt = prompt_ids(tokenizer, task)
        target = [*response, tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + target))
        labels.append(torch.tensor([IGNORE_INDEX] * len(prompt) + target))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        **image_inputs(tasks),
    }


def logits_of(model: InternVLForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Runs the model on a batch of ``collate``: logits ``[B, T, V]``."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits


@torch.no_grad()
def generate(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[digits.Task],
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    temperature: float = 0.0,
    max_tokens: int = 40,
    batch_size: int = 256,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Generates one response per task: token ids without the end token, the prefix included.

    Args:
        model: The model.
        tokenizer: From ``build_tokenizer``.
        tasks: What to answer; all with an image, or all without.
        prefixes: Beginnings of the responses, as token ids; None starts from nothing.
        temperature: 0 takes the likeliest token, otherwise one is drawn.
        max_tokens: Longest response.
        batch_size: Rows at a time. Rows of a batch have inputs of one length, so none is padded on the left.
        on_batch: Called with the number of rows of each finished batch.
    """
    prefixes = prefixes if prefixes is not None else [[]] * len(tasks)
    prompts = [prompt_ids(tokenizer, task) for task in tasks]
    by_length: dict[int, list[int]] = {}
    for index, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        by_length.setdefault(len(prompt) + len(prefix), []).append(index)

    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    responses: list[list[int]] = [[] for _ in tasks]
    model.eval()
    for length in sorted(by_length):
        for start in range(0, len(by_length[length]), batch_size):
            rows = by_length[length][start : start + batch_size]
            input_ids = torch.tensor([prompts[row] + list(prefixes[row]) for row in rows])
            longest = max_tokens - min(len(prefixes[row]) for row in rows)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                **image_inputs([tasks[row] for row in rows]),
                **options,
                max_new_tokens=longest,
            )
            for row, generated in zip(rows, output[:, length:].tolist(), strict=True):
                if tokenizer.eos_token_id in generated:
                    generated = generated[: generated.index(tokenizer.eos_token_id)]
                responses[row] = [*prefixes[row], *generated]
            on_batch(len(rows))
    return responses
