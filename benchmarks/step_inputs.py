"""Makes a small InternVL, pairs and a recipe for benchmarks such as ``benchmarks.train_step``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mpo_ext.data.jsonl import write_pairs
from mpo_ext.data.records import Pair
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.recipe import Recipe, load_recipe
from mpo_ext.train.sampler import StepSampler, micro_batches

LEARNING_RATE = 1e-3  # high enough that ten steps change the loss of the small model


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the pairs.

    Attributes:
        vocab: Vocabulary size V, at least the number of words that the tokenizer knows.
        hidden: Hidden size of the decoder. Each attention head has size 64.
        layers: Number of decoder layers.
        images: Number of images per pair; 0 makes text-only pairs.
        image_tokens: Number of tokens per image, a square number. A token covers 28 x 28 pixels.
        vision_hidden: Hidden size of the vision tower. It has two layers, and each attention head has size 64.
        response: Largest number of tokens per response, including the end token.
        least_response: Smallest number of tokens per response, including the end token.
        text: Largest number of extra words in a prompt. Every prompt has eight words besides these.
        least_text: Smallest number of extra words in a prompt. None: each prompt has ``text`` extra words.
        batch: Number of pairs per optimizer step.
        micro_batch: Number of pairs per forward pass.
    """

    vocab: int = 151936
    hidden: int = 256
    layers: int = 2
    images: int = 4
    image_tokens: int = 256
    vision_hidden: int = 128
    response: int = 128
    least_response: int = 128
    text: int = 0
    least_text: int | None = None
    batch: int = 1
    micro_batch: int = 1

    @property
    def prompt(self) -> int:
        """Largest number of tokens in a prompt.

        A prompt has the image tokens, 2 tokens of the chat template, and 8 + ``text`` words. Each word is one token.
        """
        return self.images * self.image_tokens + self.text + 10

    @property
    def pixels(self) -> int:
        """Height and width of an image in pixels."""
        return 28 * round(self.image_tokens**0.5)


def build(sizes: Sizes) -> tuple[Any, Any]:
    """Returns an untrained model, initialized with a fixed seed, and its processor."""
    from transformers import GotOcr2ImageProcessorPil, InternVLForConditionalGeneration

    from mpo_ext.demo.model import CHAT_TEMPLATE, DigitsProcessor, build_tokenizer, make_config

    tokenizer = build_tokenizer()
    if sizes.vocab < len(tokenizer):
        raise ValueError(
            f"vocab must be at least {len(tokenizer)}, the number of words of the tokenizer, got {sizes.vocab}"
        )
    size = {"height": sizes.pixels, "width": sizes.pixels}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=False)
    processor = DigitsProcessor(images, tokenizer, sizes.image_tokens, CHAT_TEMPLATE)
    heads, vision_heads = max(1, sizes.hidden // 64), max(1, sizes.vision_hidden // 64)
    text = {"hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers, "num_attention_heads": heads}
    text |= {"vocab_size": sizes.vocab, "max_position_embeddings": 16384}
    vision = {"hidden_size": sizes.vision_hidden, "num_attention_heads": vision_heads, "patch_size": [14, 14]}
    config = make_config(tokenizer, text, vision, pixels=sizes.pixels, image_tokens=sizes.image_tokens)
    torch.manual_seed(0)
    return InternVLForConditionalGeneration(config), processor


def make_pairs(folder: Path, sizes: Sizes, count: int) -> Path:
    """Writes pairs with random words and random images to a JSON Lines file, and returns the path of that file."""
    from mpo_ext.demo import digits

    rng = np.random.default_rng(0)
    words = sorted(digits.vocabulary())

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    def response() -> str:
        return text(int(rng.integers(sizes.least_response, sizes.response + 1)) - 1)  # the end token follows

    pairs = []
    for number in range(count):
        paths = []
        for place in range(sizes.images):
            coarse = rng.integers(256, size=(sizes.pixels // 14, sizes.pixels // 14, 3), dtype=np.uint8)
            path = folder / f"{number}-{place}.png"
            Image.fromarray(coarse).resize((sizes.pixels, sizes.pixels), Image.Resampling.NEAREST).save(path)
            paths.append(str(path))
        words_of_prompt = sizes.text
        if sizes.least_text is not None:
            words_of_prompt = int(rng.integers(sizes.least_text, sizes.text + 1))
        question = "<image>" * sizes.images + text(8 + words_of_prompt)
        pairs.append(Pair(question, response(), response(), tuple(paths)))
    path = folder / "pairs.jsonl"
    write_pairs(path, pairs)
    return path


def make_recipe(folder: Path, pairs: Path, sizes: Sizes, steps: int, settings: Mapping[str, Any]) -> Recipe:
    """Returns a recipe for mpo_ext's trainer. Its steps are the same as those of TRL in ``trainers.run_trl``.

    ``settings`` override values of the recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    sections = {"model": {"path": "unused"}, "data": {"train": [str(pairs)]}, "output": {"dir": str(folder / "run")}}
    path.write_text(json.dumps(sections))
    values = {
        "data.max_length": None,
        "loss.average_over": "micro_batch",
        "reward_shift.mode": "fixed",
        "optim.learning_rate": LEARNING_RATE,
        "optim.batch_size": sizes.batch,
        "optim.micro_batch_size": sizes.micro_batch,
        "optim.max_steps": steps,
        "optim.schedule": "constant",
        "optim.warmup_ratio": 0.0,
        "optim.weight_decay": 0.0,
        "output.save_every": 0,
        **settings,
    }
    return load_recipe(path, [f"{name}={json.dumps(value)}" for name, value in values.items()])


def order_of(recipe: Recipe, sizes: Sizes) -> list[int]:
    """Returns the indices of the pairs in the order in which mpo_ext's trainer reads them."""
    mixture = Mixture(recipe.data.train, seed=recipe.optim.seed)
    sampler = StepSampler(mixture.epoch, batch_size=recipe.optim.batch_size, seed=recipe.optim.seed)
    order: list[int] = []
    for step in range(sampler.steps_per_epoch):
        indices = [int(index) for index in sampler.step(step)]
        lengths = []
        for index in indices:
            pair = mixture[index]
            assert isinstance(pair, Pair)
            lengths.append(len(pair.question.split()) + max(len(pair.chosen.split()), len(pair.rejected.split())))
        parts = micro_batches(lengths, sizes.micro_batch)
        order += [indices[position] for part in parts for position in part]
    return order
