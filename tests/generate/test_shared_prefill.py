"""Tests that the samples of a question share one prefill. Their tokens must be the same as without sharing."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

for package in ("transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

import families
import tiny_processors
import torch
import transformers
import vision_families
from PIL import Image
from torch import nn
from transformers.cache_utils import DynamicLayer

from mpo_ext.demo.model import build_model, build_processor
from mpo_ext.generate.engine import Generation, Request, SamplingConfig, derive_seed
from mpo_ext.generate.growing_cache import GrowingLayer
from mpo_ext.generate.transformers_engine import TransformersEngine

SAMPLING = SamplingConfig(max_new_tokens=12, top_k=0, temperature=1.0)
GREEDY = dataclasses.replace(SAMPLING, temperature=0.0)
COUNTS = (5, 1, 3, 2)  # samples of each question
RECURRENT = {"lru_width": 16, "attention_window_size": 8, "block_types": ("recurrent", "attention")}


def text_family(family: str, **settings: Any) -> tuple[Any, Any]:
    tokenizer = tiny_processors.build_tokenizer(["<end>"])
    template = tiny_processors.ZEPHYR.replace(" {{ eos_token }}", "<end>")
    model = families.text_model(family, **{"vocab_size": len(tokenizer), "eos_token_id": None, **settings})
    return model, tiny_processors.with_template(tokenizer, template)


def mamba() -> tuple[Any, Any]:
    model, tokenizer = text_family("Qwen2")
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "pad_token_id": 0}
    config = transformers.MambaConfig(vocab_size=model.config.vocab_size, eos_token_id=None, **sizes)
    return transformers.MambaForCausalLM(config), tokenizer


def internvl() -> tuple[Any, Any]:
    processor = build_processor()
    return build_model(processor.tokenizer, hidden_size=32, layers=1), processor


HYBRID = {
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
}  # fmt: skip
TEXT: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2": partial(text_family, "Qwen2"),
    "gemma2-sliding": partial(text_family, "Gemma2", **families.GEMMA),
    "qwen3_next-hybrid": partial(text_family, "Qwen3Next", **HYBRID),
    "mamba": mamba,
}
IMAGES: dict[str, Callable[[], tuple[Any, Any]]] = {"InternVL": internvl, **vision_families.BUILDERS}
TOWERS = {"InternVL": "vision_tower", "LLaVA": "vision_tower", "Qwen2.5-VL": "visual", "Idefics3": "vision_model"}


def make_engine(build: Callable[[], tuple[Any, Any]], **options: Any) -> TransformersEngine:
    torch.manual_seed(0)
    model, processor = build()
    with torch.no_grad():  # as they are initialised, the images and the earlier tokens would hardly matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return TransformersEngine(model, processor, **options)


def requests_of(
    counts: Sequence[int], *, images: int = 0, sampling: SamplingConfig = SAMPLING, prefix_ids: tuple[int, ...] = ()
) -> list[Request]:
    """Returns ``counts[i]`` requests for question i. The questions alternate, and differ in length."""
    rng = np.random.default_rng(0)
    by_question = []
    for number, count in enumerate(counts):
        pixels = rng.integers(256, size=(images, 32, 32 + 24 * (number % 2), 3), dtype=np.uint8)
        pictures = tuple(Image.fromarray(image) for image in pixels)
        question = "<image>" * images + "What is the sum of these digits ?" + " And why ?" * number
        by_question.append([
            Request(
                question=question, images=pictures, prefix_ids=prefix_ids,
                seed=derive_seed(number, sample), sampling=sampling,
            )
            for sample in range(count)
        ])  # fmt: skip
    return [request for requests in itertools.zip_longest(*by_question) for request in requests if request]


def one_by_one(engine: TransformersEngine, requests: Sequence[Request]) -> list[Generation]:
    alone = TransformersEngine(engine.model, engine.processor, batch_size=1)
    alone.shares_prefill = False
    return alone.generate(requests)


class Calls:
    """Records the shape of the first tensor argument in each call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[torch.Size] = []
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        values = [*args, *kwargs.values()]
        self.shapes.append(next(value.shape for value in values if isinstance(value, torch.Tensor)))


@pytest.mark.parametrize("name", [*TEXT, *IMAGES])
def test_the_tokens_are_those_of_separate_rows(name: str) -> None:
    engine = make_engine({**TEXT, **IMAGES}[name])
    images = 2 if name in IMAGES else 0
    sampled = requests_of(COUNTS, images=images, prefix_ids=(9, 10, 11))
    requests = [*sampled, *(dataclasses.replace(request, sampling=GREEDY) for request in sampled)]
    expected = one_by_one(engine, requests)
    assert len({generation.token_ids for generation in expected}) > 6
    for batch_size in (16, 6, 2):  # several questions in a batch; one in a batch; parts of a question
        engine.batch_size = batch_size
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert engine.generate(requests) == expected
    assert engine.shares_prefill


@pytest.mark.parametrize("batch_size", [16, 4])
@pytest.mark.parametrize("name", IMAGES)
def test_prompt_and_images_run_once_per_question(name: str, batch_size: int) -> None:
    engine = make_engine(IMAGES[name], batch_size=batch_size)
    requests = requests_of((8, 8), images=2)
    tower = Calls(getattr(engine.model.model, TOWERS[name]))
    decoder = Calls(engine.model.get_decoder().layers[0])
    engine.generate(requests_of((1, 1), images=2))
    expected = sum(shape[0] for shape in tower.shapes)
    tower.shapes.clear()
    decoder.shapes.clear()
    engine.generate(requests)
    assert sum(shape[0] for shape in tower.shapes) == expected
    prompts = [shape for shape in decoder.shapes if shape[1] > 1]
    assert sum(shape[0] for shape in prompts) == 2
    steps = [shape[0] for shape in decoder.shapes if shape[1] == 1]
    assert max(steps) == batch_size
    assert sum(steps) <= 16 * (SAMPLING.max_new_tokens - 1)


def test_samples_that_have_ended_leave_the_batch() -> None:
    engine = make_engine(TEXT["qwen2"], batch_size=32)
    requests = requests_of((24, 8), sampling=dataclasses.replace(SAMPLING, max_new_tokens=20))
    engine.model.generation_config.eos_token_id = list(range(60, 100))  # about a seventh of the tokens
    engine = TransformersEngine(engine.model, engine.processor, batch_size=32)
    expected = one_by_one(engine, requests)
    assert len({len(generation.token_ids) for generation in expected}) > 8
    steps = Calls(engine.model.get_decoder().layers[0])
    assert engine.generate(requests) == expected
    rows = [shape[0] for shape in steps.shapes if shape[1] == 1]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 4 * rows[-1]
    assert sum(rows) < 32 * len(rows) / 2


def test_questions_that_differ_in_an_image_share_nothing() -> None:
    engine = make_engine(IMAGES["InternVL"])
    (first, second), (other, _) = requests_of((2,), images=1), requests_of((1, 1), images=1)[::-1]
    other = dataclasses.replace(first, images=other.images, seed=second.seed)
    requests = [first, dataclasses.replace(first, seed=second.seed), other]
    expected = one_by_one(engine, requests)
    assert expected[1] != expected[2]
    assert engine.generate(requests) == expected


def test_a_single_sample_of_each_question_goes_through_the_loop_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(TEXT["qwen2"])
    options: list[Any] = []
    generate = engine.model.generate
    monkeypatch.setattr(engine.model, "generate", lambda **given: options.append(given) or generate(**given))
    engine.generate(requests_of((1, 1, 1)))
    assert len(options) == 1
    assert "custom_generate" not in options[0]


class StaticModel(transformers.Qwen2ForCausalLM):
    """A model that overrides the method ``generate`` of transformers."""

    def generate(self, *args: Any, **options: Any) -> Any:
        return super().generate(*args, **options)


def static_cache() -> tuple[Any, Any]:
    model, tokenizer = text_family("Qwen2")
    model.generation_config.cache_implementation = "static"
    return model, tokenizer


def overridden() -> tuple[Any, Any]:
    model, tokenizer = text_family("Qwen2")
    return StaticModel(model.config), tokenizer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (partial(text_family, "RecurrentGemma", **RECURRENT), r"keeps a state in model\.layers\.0\..*state"),
        (static_cache, "its cache is a StaticCache, not a DynamicCache"),
        (overridden, "it overrides generate"),
    ],
    ids=["states in modules", "static cache", "generate"],
)
def test_a_model_that_cannot_share_says_why_once(build: Callable[[], tuple[Any, Any]], reason: str) -> None:
    engine = make_engine(build)
    requests = requests_of((3, 1, 2))
    expected = one_by_one(engine, requests)
    with pytest.warns(UserWarning, match=rf"runs the prompt for each sample, because .*{reason}") as said:
        assert engine.generate(requests) == expected
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.generate(requests) == expected


def test_a_growing_layer_holds_what_a_layer_of_transformers_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = DynamicLayer()
    plain.update(*torch.randn(2, 2, 3, 5, 4, generator=generator))
    growing = GrowingLayer(plain, torch.tensor([1, 0, 1]))
    plain.reorder_cache(torch.tensor([1, 0, 1]))
    for step in range(150):
        if step == 100:
            for layer in (plain, growing):
                layer.reorder_cache(torch.tensor([2, 1]))
        states = torch.randn(2, len(plain.keys), 3, 1, 4, generator=generator)
        for expected, held in zip(plain.update(*states), growing.update(*states), strict=True):
            assert torch.equal(expected, held)
        assert growing.get_seq_length() == plain.get_seq_length()
