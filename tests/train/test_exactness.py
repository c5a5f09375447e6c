"""Compares the trainer with the float64 script plain.py: loss, rewards, delta, gradient norms and final weights.

A trainer in float32 must agree with the script to 1e-5 over 20 steps. A trainer in float64 must agree to 1e-9, which
finds errors that float32 rounding could hide. By default, a selection of settings is tested. MPO_EXACTNESS_ALL=1 tests
all combinations of reward-shift mode, reference and gradient accumulation, over 20 steps in float32.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import digits_run
import plain
import pytest
import torch
from torch import Tensor, nn

from mpo_ext.data.records import Pair
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.loop import Trainer
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.recipe import SourceRecipe
from mpo_ext.train.sampler import StepSampler, micro_batches

ALL = os.environ.get("MPO_EXACTNESS_ALL") == "1"
STEPS = 20
BATCH = 8
RANK, ALPHA = 4, 8.0
# AdamW divides a gradient by its size: with the usual eps of 1e-8, a gradient that is 0 except for rounding (1e-9 in
# float32) would move its weight like any other gradient, and the test would compare rounding errors. 1e-4 is small
# compared with the gradients' root mean square, 1e-3 to 1e-2, and large compared with their rounding.
OPTIM = {"optim__learning_rate": 2e-3, "optim__eps": 1e-4, "optim__warmup_ratio": 0.1}
MOVED = 5e-6  # minimum movement per step of some value of each parameter; otherwise 1e-5 would prove nothing

MODES: dict[str, dict[str, Any]] = {
    "cumulative before": {},
    "cumulative after": {"reward_shift__update": "after"},
    "cumulative step": {"reward_shift__update": "after", "reward_shift__per": "optimizer_step"},
    "ema before": {"reward_shift__mode": "ema", "reward_shift__decay": 0.9},
    "ema after": {"reward_shift__mode": "ema", "reward_shift__update": "after", "reward_shift__value": 0.1},
    "ema step": {
        "reward_shift__mode": "ema",
        "reward_shift__decay": 0.8,
        "reward_shift__update": "after",
        "reward_shift__per": "optimizer_step",
    },
    "fixed 0": {"reward_shift__mode": "fixed"},
    "fixed 0.3": {"reward_shift__mode": "fixed", "reward_shift__value": 0.3},
}
LAYOUTS = {"1x8": 8, "2x4": 4, "8x1": 1}  # micro-batches x pairs
REFERENCES: dict[str, dict[str, Any]] = {
    "copy": {"reference__kind": "copy"},
    "precomputed": {"reference__kind": "precomputed"},
    "adapter": {"model__lora": {"rank": RANK, "alpha": ALPHA}},
}
# Each mode, each layout and each reference, the last two in all combinations.
LONG = [
    ("cumulative before", "1x8", "copy"),
    ("cumulative after", "2x4", "copy"),
    ("ema before", "8x1", "copy"),
    ("ema after", "1x8", "precomputed"),
    ("cumulative before", "2x4", "precomputed"),
    ("ema step", "8x1", "precomputed"),
    ("fixed 0.3", "1x8", "adapter"),
    ("fixed 0", "2x4", "adapter"),
    ("cumulative step", "8x1", "adapter"),
]
# The other layouts of each mode, with the references in turn.
SHORT = [
    (mode, layout, list(REFERENCES)[(number + turn) % 3])
    for number, mode in enumerate(MODES)
    for turn, layout in enumerate(LAYOUTS)
    if (mode, layout) not in {case[:2] for case in LONG}
]
# Other options that the arithmetic depends on, or must not depend on.
OPTIONS: dict[str, dict[str, Any]] = {
    "means of micro-batches": {"loss__average_over": "micro_batch"},
    "means of micro-batches, by response": {
        "loss__average_over": "micro_batch",
        "loss__ntp_average": "sequence",
        "optim__schedule": "linear",
    },
    "by response, two rows": {"loss__ntp_average": "sequence", "loss__shared_prefix": False},
    "from logits": {"loss__from_logits": True, "loss__label_smoothing": 0.1, "optim__micro_batch_size": 3},
    "from logits, two rows, precomputed": {
        "loss__from_logits": True,
        "loss__shared_prefix": False,
        "reference__kind": "precomputed",
        "optim__micro_batch_size": 8,
    },
    "smoothed, little memory": {"loss__label_smoothing": 0.2, "loss__memory_budget_mib": 1, "loss__beta": 0.5},
    "no clipping": {"optim__max_grad_norm": 0, "optim__weight_decay": 0.3, "optim__schedule": "constant"},
    "other betas": {"optim__betas": [0.8, 0.9], "optim__max_grad_norm": 0.1, "optim__warmup_ratio": 0.5},
    "moving reference": {"reference__sync_every": 2, "reference__sync_mix": 0.3},
    "SFT": {"loss__dpo_weight": 0, "loss__bco_weight": 0, "optim__micro_batch_size": 3},
    "preference only": {"loss__ntp_weight": 0, "loss__dpo_weight": 1.0, "loss__bco_weight": 0.7, "loss__beta": 0.3},
    "kept activations, recomputed layers": {
        "loss__recompute": False,
        "loss__backend": "reference",
        "model__gradient_checkpointing": True,
    },
    "frozen tower": {"model__freeze": ["vision_tower"]},
    "prompts together": {"data__group_prompts": True},
    "prompts together, two rows": {"data__group_prompts": True, "loss__shared_prefix": False},
    "evaluation between": {"output__eval_every": 1},
    **{
        f"filled by tokens, {name}": {
            "optim__micro_batch_size": 1,  # of the script
            "optim__micro_batch_tokens": 400,
            "reward_shift__update": "after",
            "reward_shift__per": "optimizer_step",
            **settings,
        }
        for name, settings in {
            "by token": {},
            "by response": {"loss__ntp_average": "sequence"},
            "means of pairs": {"loss__average_over": "micro_batch"},
            "means of pairs, by response": {"loss__average_over": "micro_batch", "loss__ntp_average": "sequence"},
            "two rows": {"loss__shared_prefix": False, "reference__kind": "precomputed"},
            "prompts together": {"data__group_prompts": True},
        }.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Data:
    """A file of pairs, and the pairs as the script reads them.

    Attributes:
        path: The file.
        pairs: The pairs of the file, in order.
    """

    path: Path
    pairs: list[plain.Pair]

    def steps(self, steps: int, micro_batch_size: int, *, grouped: bool) -> list[list[list[plain.Pair]]]:
        """Returns the micro-batches of each step, in the order of the trainer's sampler.

        Like the trainer, leaves out pairs with equal responses.
        """
        mixture = Mixture([SourceRecipe(path=str(self.path))])
        groups = mixture.prompt_groups() if grouped else None
        sampler = StepSampler(mixture.epoch, batch_size=BATCH, groups=groups)
        result = []
        for step in range(steps):
            taken = [self.pairs[index] for index in sampler.step(step)]
            taken = [pair for pair in taken if pair.chosen != pair.rejected]
            lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in taken]
            prompts = [
                (pair.prompt, pair.pixels.numpy().tobytes() if pair.pixels is not None else b"") for pair in taken
            ]
            split = micro_batches(lengths, micro_batch_size, groups=prompts if grouped else None)
            result.append([[taken[position] for position in positions] for positions in split])
        return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Returns 11 pairs. Half of the first 10 pairs have no image. The last pair has equal responses.

    The trainer skips a pair with equal responses.
    """
    # A step reads 8 of the 11 lines, and the next one 3, so steps and micro-batches differ in size.
    return make_data(tmp_path_factory.mktemp("pairs"), 10, text_only=2)


@pytest.fixture(scope="module")
def grouped_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Returns three pairs for each of five prompts, and a pair with equal responses, which the trainer skips."""
    return make_data(tmp_path_factory.mktemp("grouped"), 5, text_only=2, repeats=3)


def make_data(folder: Path, count: int, **options: int) -> Data:
    path = digits_run.write_pairs(folder, count, **options)
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**first, "rejected": first["chosen"]}) + "\n")
    return Data(path, plain.read_pairs(path, digits_run.tiny()[1].tokenizer.get_vocab()))


def adapters() -> dict[str, tuple[Tensor, Tensor]]:
    """Returns LoRA matrices (A, B) for all linear layers of the language model.

    B is not 0, so policy and reference differ.
    """
    model, _ = digits_run.tiny()
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5,
            torch.randn(layer.out_features, RANK, generator=generator) * 0.1,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "language_model.layers" in name
    }


@dataclasses.dataclass
class Run:
    """The log lines of a run, and its final weights under the parameter names of plain.py."""

    lines: list[dict[str, float]]
    weights: dict[str, Tensor]


def run_script(data: Data, overrides: Mapping[str, Any], *, steps: int = STEPS) -> Run:
    """Trains with the script plain.py. ``overrides`` are overrides of the recipe."""
    grouped = bool(overrides.get("data__group_prompts"))
    order = data.steps(steps, overrides.get("optim__micro_batch_size", 4), grouped=grouped)
    base = plain.widen(digits_run.tiny()[0])
    if "model__lora" in overrides:
        model = plain.add_lora(base, adapters(), ALPHA / RANK)
    else:
        model = plain.widen(digits_run.tiny()[0])
    for name, parameter in model.named_parameters():
        if any(part in name for part in overrides.get("model__freeze", ())):
            parameter.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = settings_of(overrides)
    has_preference = settings.dpo_weight + settings.bco_weight > 0
    lines = list(plain.train(model, base if has_preference else None, order, settings))
    for name, parameter in model.named_parameters():
        moved = float((parameter - before[name]).detach().abs().max())
        assert moved > MOVED * steps if parameter.requires_grad else moved == 0, (name, moved)
    return Run(lines, {name.replace(".base.", "."): one.detach() for name, one in model.named_parameters()})


def run_trainer(
    out: Path, data: Data, overrides: Mapping[str, Any], *, steps: int = STEPS, dtype: torch.dtype = torch.float32
) -> Run:
    model, processor = digits_run.tiny()
    if dtype == torch.float64:
        model = plain.widen(model)
    settings = {**OPTIM, "optim__max_steps": steps, "optim__epochs": steps, **overrides}
    if settings.get("output__eval_every"):
        settings["data__eval"] = [str(data.path)]
    recipe = digits_run.recipe(out, data.path, **settings)
    lines: list[dict[str, float]] = []
    trainer = Trainer(
        recipe, model=model, processor=processor, on_step=lambda _, line: lines.append(dict(line)), save=False
    )
    if recipe.model.lora is not None:
        set_adapters(trainer.model)
    assert trainer.run() == 0
    assert trainer.data.collator.layout == ("packed" if recipe.loss.shared_prefix else "separate")
    assert sum(trainer.state.pair_counts.skipped.values()) > 0  # the line of equal responses
    return Run(lines, {plain_name(name): one.detach() for name, one in trainer.model.named_parameters()})


def set_adapters(model: nn.Module) -> None:
    with torch.no_grad():
        for name, (a, b) in adapters().items():
            layer: Any = model.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)


def plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B")


def settings_of(overrides: Mapping[str, Any]) -> plain.Settings:
    """Converts overrides of a recipe to settings of plain.py. Other settings keep plain.py's defaults."""
    names = {field.name for field in dataclasses.fields(plain.Settings)}
    values: dict[str, Any] = {}
    for name, value in {**OPTIM, **overrides}.items():
        section, _, setting = name.partition("__")
        known = f"shift_{setting}" if section == "reward_shift" else setting
        if known in names:
            values[known] = tuple(value) if isinstance(value, list) else value
    return plain.Settings(**values)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def assert_equal(run: Run, script: Run, tolerance: float) -> None:
    """Compares a run with the script: the logged numbers of all steps, and the final weights."""
    assert len(run.lines) == len(script.lines)
    off: dict[str, float] = {}
    for line, wanted in zip(run.lines, script.lines, strict=True):
        assert wanted.keys() <= line.keys()
        for name, value in wanted.items():
            if math.isnan(value):
                continue
            difference = abs(line[name] - value)
            off[name] = max(off.get(name, 0.0), difference)
    assert run.weights.keys() == script.weights.keys()
    off["weights"] = max(float((run.weights[name] - one).abs().max()) for name, one in script.weights.items())
    assert {name: value for name, value in off.items() if not value <= tolerance} == {}


def check(data: Data, out: Path, case: tuple[str, str, str], *, steps: int, dtype: torch.dtype) -> None:
    mode, layout, reference = case
    overrides = {**MODES[mode], **REFERENCES[reference], "optim__micro_batch_size": LAYOUTS[layout]}
    run = run_trainer(out, data, overrides, steps=steps, dtype=dtype)
    assert_equal(run, run_script(data, overrides, steps=steps), TOLERANCE[dtype])


@pytest.mark.parametrize("case", list(itertools.product(MODES, LAYOUTS, REFERENCES)) if ALL else LONG, ids=", ".join)
def test_float32(data: Data, tmp_path: Path, case: tuple[str, str, str]) -> None:
    check(data, tmp_path / "run", case, steps=STEPS, dtype=torch.float32)


@pytest.mark.parametrize("case", SHORT, ids=", ".join)
def test_float64(data: Data, tmp_path: Path, case: tuple[str, str, str]) -> None:
    check(data, tmp_path / "run", case, steps=4, dtype=torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(data: Data, grouped_data: Data, tmp_path: Path, name: str) -> None:
    pairs = grouped_data if "data__group_prompts" in OPTIONS[name] else data
    run = run_trainer(tmp_path / "run", pairs, OPTIONS[name], steps=5, dtype=torch.float64)
    assert_equal(run, run_script(pairs, OPTIONS[name], steps=5), TOLERANCE[torch.float64])


def test_script_reads_what_the_trainer_reads(data: Data, grouped_data: Data) -> None:
    """Checks that the script and the encoder produce the same tokens and pixels, bit for bit."""
    _, processor = digits_run.tiny()
    encoder = Encoder(processor)
    kept = 0
    for one in (data, grouped_data):
        mixture = Mixture([SourceRecipe(path=str(one.path))])
        assert len(mixture) == len(one.pairs)
        for index, pair in enumerate(one.pairs):
            record, name = mixture.read(index)
            assert isinstance(record, Pair)
            sample = encoder.encode(record, name)
            assert isinstance(sample, Sample) == (pair.chosen != pair.rejected)
            if not isinstance(sample, Sample):
                continue
            kept += 1
            assert tuple(sample.prompt_ids.tolist()) == pair.prompt
            assert tuple(sample.chosen_ids.tolist()) == pair.chosen
            assert tuple(sample.rejected_ids.tolist()) == pair.rejected
            assert (pair.pixels is not None) == bool(sample.image_inputs)
            if pair.pixels is not None:
                torch.testing.assert_close(sample.image_inputs["pixel_values"], pair.pixels, rtol=0, atol=0)
    assert kept > 20
