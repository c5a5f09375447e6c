"""Tests the parts of a run other than its steps: settings, log, counts, and the state that resuming needs."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import families
import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from digits_run import recipe, tiny, weights, write_pairs
from test_trainer import TEXT, log, run, text_pairs, text_tokenizer
from torch import nn

from mpo_ext.checks import LinesError
from mpo_ext.files import FileLock, LockedError
from mpo_ext.loss.weights import fingerprint
from mpo_ext.train import (
    batch_loss,
    evaluation,
    loop,
    model_card,
    progress,
    reference_file,
    reference_model,
    resume,
    setup,
)
from mpo_ext.train import forward as forward_module
from mpo_ext.train.loop import Trainer
from mpo_ext.train.metrics import Log, Totals, means
from mpo_ext.train.model import freeze_parts, load_model, prepare_model, switch_off_dropout
from mpo_ext.train.pair_counts import PairCounts
from mpo_ext.train.progress import Console, busy_cpu_line
from mpo_ext.train.ranks import EvaluationAnswerError, EvaluationPairError
from mpo_ext.train.recipe import ModelRecipe
from mpo_ext.train.reference_file import reference_settings
from mpo_ext.train.split_attention import base_implementation

INTERRUPTED = 128 + signal.SIGTERM  # exit status


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file of twenty pairs, which give steps of 8, 8 and 4 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 20)


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the model card, which is slow to draw. Returns a list that collects the arguments of each card."""
    written: list[Any] = []
    monkeypatch.setattr(model_card, "write_card", lambda folder, **values: written.append(values))
    return written


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Resets accelerate's state before and after a test, because accelerate allows only one precision per process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def trainer_of(out: Path, pairs: Path, model: nn.Module | None = None, **settings: Any) -> Trainer:
    own, processor = tiny()
    return Trainer(recipe(out, pairs, **settings), model=own if model is None else model, processor=processor)


def with_lines(pairs: Path, name: str, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """Writes a copy of a file of pairs with changed lines to the same folder. Returns the path of the copy."""
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    change(lines)
    path = pairs.with_name(name)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Precision.


def test_autocast_is_on_for_policy_and_reference(tmp_path: Path, pairs: Path, any_precision: None) -> None:
    losses = {}
    for name, settings in {
        "copy": {},
        "adapter": {"model__lora": {"rank": 2}},
        "precomputed": {"reference__kind": "precomputed"},
        "fp32": {"precision": "fp32"},
    }.items():
        AcceleratorState._reset_state(True)
        settings = {"precision": "bf16", "optim__max_steps": 1, **settings}
        (line,) = run(recipe(tmp_path / name, pairs, **settings))
        losses[name] = line["loss"]
        assert abs(line["chosen_reward"]) < 1e-6, name
    for name in ("copy", "adapter", "precomputed"):
        assert 1e-6 < abs(losses[name] - losses["fp32"]) < 0.05, name


# The arguments of the loss.


@pytest.mark.parametrize("kind", ["softcap", "scale"])
def test_a_head_with_options_has_its_own_logits(tmp_path: Path, kind: str) -> None:
    data = text_pairs(tmp_path / "text.jsonl", 9)
    lines = []
    for from_logits in (False, True):
        torch.manual_seed(0)
        if kind == "softcap":
            config = transformers.Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.5)
            model: Any = transformers.Gemma2ForCausalLM(config)
        else:
            model = transformers.CohereForCausalLM(transformers.CohereConfig(**TEXT, logit_scale=0.1))
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
        settings = {"loss__from_logits": from_logits, "optim__warmup_ratio": 0}
        lines.append(run(recipe(tmp_path / str(from_logits), data, **settings), model, text_tokenizer()))
    for ours, theirs in zip(*lines, strict=True):
        for name in ("loss", "chosen_logp", "chosen_reward", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert lines[0][0]["chosen_reward"] == pytest.approx(0, abs=1e-6)


def test_the_memory_budget_is_that_of_the_recipe(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    for owner, name in ((batch_loss, "linear_mpo_loss"), (reference_model, "linear_token_logp")):
        whole = getattr(owner, name)

        def note(*args: Any, _whole: Any = whole, _name: str = name, **options: Any) -> Any:
            seen.append((_name, options["memory_budget"]))
            return _whole(*args, **options)

        monkeypatch.setattr(owner, name, note)
    run(recipe(tmp_path / "out", pairs, loss__memory_budget_mib=3, optim__max_steps=1))
    assert set(seen) == {("linear_mpo_loss", 3 << 20), ("linear_token_logp", 3 << 20)}


def test_long_pairs_come_first(tmp_path: Path, pairs: Path) -> None:
    trainer = trainer_of(tmp_path / "out", pairs, optim__micro_batch_size=2)
    batches = trainer.data.steps()[0].batches
    prompts = [int((batch.segments == 0).sum(1).max()) for batch in batches]
    lengths = [int((batch.segments >= 0).sum(1).max()) for batch in batches]
    assert len(batches) == 4
    assert max(lengths) == lengths[0] > lengths[-1], prompts


@pytest.mark.parametrize(("prefix", "layout"), [(True, "packed"), ("padded", "shared"), (False, "separate")])
def test_micro_batches_are_filled_by_tokens_with_the_pairs_of_a_step(
    tmp_path: Path, pairs: Path, prefix: Any, layout: str
) -> None:
    by_pairs = trainer_of(tmp_path / "pairs", pairs, optim__micro_batch_size=1)
    settings = {"optim__micro_batch_size": 1, "optim__micro_batch_tokens": 400, "loss__shared_prefix": prefix}
    by_tokens = trainer_of(tmp_path / "tokens", pairs, **settings)
    setup.choose_layout(by_tokens.model, by_tokens.data)
    for step in range(2):
        batches, again = (by_tokens.data.steps()[step].batches for _ in range(2))
        assert [batch.names for batch in batches] == [batch.names for batch in again]
        assert {batch.layout for batch in batches} == {layout}
        assert max(batch.positions for batch in batches) <= 400
        assert len(batches) < sum(batch.pairs for batch in batches)
        names = sorted(name for batch in batches for name in batch.names)
        assert names == sorted(batch.names[0] for batch in by_pairs.data.steps()[step].batches)


def test_the_template_of_the_recipe_reaches_the_encoder(tmp_path: Path, pairs: Path) -> None:
    template = "{% for message in messages %}<|{{ message['role'] }}|> x {% endfor %}<|assistant|> "
    with pytest.raises(ValueError, match=r"(?i)template"):  # it writes no response
        trainer_of(tmp_path / "template", pairs, model__chat_template=template)


# The model.


def test_drop_path_is_off_and_so_are_probabilities_that_are_attributes() -> None:
    model = nn.Module()
    for name in ("drop_path_rate", "drop_prob", "attention_dropout", "scale"):
        setattr(model, name, 0.3)
    model.drop = nn.Dropout2d(0.3)
    switch_off_dropout(model)
    assert (model.drop_path_rate, model.drop_prob, model.attention_dropout, model.drop.p) == (0, 0, 0, 0)
    assert model.scale == 0.3


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_frozen_language_model_has_a_frozen_head_that_is_not_tied() -> None:
    model: Any = families.build("llava")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    freeze_parts(model, ["language_model"])
    assert learning(model)
    assert all("vision_tower" in name or "projector" in name for name in learning(model))


@pytest.mark.parametrize(("parts", "learns"), [(["vision_tower"], True), (["vision_tower", "projector"], False)])
def test_a_projector_inside_of_a_frozen_tower_learns_unless_it_is_named(parts: list[str], learns: bool) -> None:
    model = families.build("qwen2_vl")
    freeze_parts(model, parts)
    assert {name.startswith("model.visual.merger") for name in learning(model) if "visual" in name} == (
        {True} if learns else set()
    )


def test_a_model_in_which_nothing_learns_is_refused() -> None:
    model = families.build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="freeze must leave something to train"):
        prepare_model(model, ModelRecipe(path="unused"))


def test_adapters_are_on_the_layers_that_are_named() -> None:
    lora = {"rank": 2, "target": ["q_proj"], "dropout": 0.25}
    model = prepare_model(families.build("llama"), ModelRecipe(path="unused", lora=lora))  # type: ignore[arg-type]
    assert {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in learning(model)} == {"q_proj"}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}


def test_adapters_learn_the_same_with_gradient_checkpointing(tmp_path: Path, pairs: Path) -> None:
    settings = {"model__lora": {"rank": 2}, "optim__learning_rate": 1e-2, "optim__warmup_ratio": 0}
    plain = run(recipe(tmp_path / "plain", pairs, **settings))
    again = run(recipe(tmp_path / "again", pairs, model__gradient_checkpointing=True, **settings))
    assert plain[0]["grad_norm"] > 0
    assert abs(plain[2]["chosen_reward"]) > 1e-4
    for one, other in zip(plain, again, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_a_model_is_loaded_as_the_recipe_says(tmp_path: Path) -> None:
    saved = families.build("llama", dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    text_tokenizer().save_pretrained(tmp_path / "model")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model: Any = load_model(ModelRecipe(path=str(tmp_path / "model"), dtype=dtype, attention="eager"))[0]  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert base_implementation(model.config._attn_implementation) == "eager"


def test_a_fingerprint_sees_all_of_a_small_parameter_and_its_type() -> None:
    model = families.build("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[-1] += 1e-3  # type: ignore[index, operator, union-attr]
    assert fingerprint(model) != before


def test_adapters_begin_as_the_seed_says(tmp_path: Path, pairs: Path) -> None:
    begun = []
    for number in range(3):
        torch.manual_seed(number)
        model, processor = tiny()
        torch.manual_seed(number)
        trained = recipe(tmp_path / str(number), pairs, model__lora={"rank": 2}, optim__seed=number // 2)
        trainer = Trainer(trained, model=model, processor=processor)
        begun.append({name: one for name, one in weights(trainer.model).items() if "lora_A" in name})
    assert all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0])
    assert not any(torch.equal(begun[0][name], begun[2][name]) for name in begun[0])


def test_merged_adapters_of_a_model_that_came_from_nowhere(tmp_path: Path, pairs: Path) -> None:
    settings = {"model__lora": {"rank": 2}, "output__save_merged": True, "optim__learning_rate": 1e-2}
    trainer = trainer_of(tmp_path / "out", pairs, **settings)
    assert trainer.run() == 0
    merged: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "final" / "merged")
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        ours, truth = (model.eval()(input_ids=ids).logits for model in (merged, trainer.model))
        with trainer.model.disable_adapter():
            untrained = trainer.model(input_ids=ids).logits
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    assert (truth - untrained).abs().max() > 1e-4


def test_what_cannot_be_merged_ends_a_run_before_it_begins(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo_ext.train import export

    monkeypatch.setattr(export, "FSDPModule", nn.Linear)  # as if its layers were sharded
    with pytest.raises(export.CheckpointError, match="a sharded model to be merged must have come from"):
        trainer_of(tmp_path / "out", pairs, model__lora={"rank": 2}, output__save_merged=True)


def test_model_and_processor_go_together(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(ValueError, match="model and processor go together"):
        Trainer(recipe(tmp_path / "out", pairs), model=tiny()[0])


# The reference.


@pytest.fixture
def two_models(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "one", tmp_path / "two"
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).save_pretrained(folder)
        text_tokenizer().save_pretrained(folder)
    return folders


@pytest.mark.parametrize("kind", ["copy", "precomputed"])
def test_another_model_is_the_reference_as_it_is_on_the_disk(
    tmp_path: Path, two_models: tuple[Path, Path], kind: str, capsys: Any
) -> None:
    one, two = two_models
    data = text_pairs(tmp_path / "pairs.jsonl", 9)
    settings = {"model__path": str(one), "model__lora": {"rank": 2, "dropout": 0.5}, "reference__path": str(two)}
    trainer = Trainer(recipe(tmp_path / "out", data, reference__kind=kind, **settings))
    truth = transformers.AutoModelForCausalLM.from_pretrained(two)
    assert trainer.reference_fingerprint == fingerprint(truth) != fingerprint(trainer.model)
    assert trainer.reference_model is not None
    ours = weights(trainer.reference_model)
    assert ours.keys() == weights(truth).keys()  # so it has no adapters
    assert all(torch.equal(ours[name], value) for name, value in weights(truth).items())
    assert not any(module.training for module in trainer.reference_model.modules())
    assert trainer.run() == 0
    assert "policy and reference" not in capsys.readouterr().err


def settings_of(out: Path, data: Path, **settings: Any) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    trainer = trainer_of(out, data, reference__kind="precomputed", **settings)
    return reference_settings(trainer.recipe, trainer.data, trainer.reference_fingerprint)


def test_log_probs_are_stale_when_what_they_depend_on_has_changed(
    tmp_path: Path, pairs: Path, any_precision: None
) -> None:
    first = settings_of(tmp_path / "first", pairs)
    shuffled = with_lines(pairs, "shuffled.jsonl", lambda lines: lines.reverse())
    assert settings_of(tmp_path / "shuffled", shuffled) == first

    def other(lines: list[dict[str, Any]]) -> None:
        lines[3]["rejected"] += " 7"

    for name, changes in {
        "data": {"data__train": [str(with_lines(pairs, "other.jsonl", other))]},
        "pairs": {"data__eval": [str(pairs)]},
        "precision": {"precision": "bf16"},
        "dtype": {"model__dtype": "bfloat16"},
        "attention": {"model__attention": "eager"},
        "too_long": {"data__too_long": "truncate"},
        "from_logits": {"loss__from_logits": True},
    }.items():
        settings = settings_of(tmp_path / name, pairs, **changes)
        assert {key for key in settings if settings[key] != first[key]} >= {name}
    assert settings_of(tmp_path / "same", pairs, optim__learning_rate=0.1, loss__beta=0.3) == first


@pytest.mark.parametrize("size", [1, 3])
def test_log_probs_that_are_known_are_not_computed_again(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    settings = {"reference__kind": "precomputed", "optim__micro_batch_size": 1, "optim__max_steps": 1}
    whole = reference_file.sequence_logp
    computed: list[str] = []

    def stop_at(limit: int) -> None:
        def counted(model: Any, batch: Any, recipe: Any) -> Any:
            if len(computed) == limit:
                raise KeyboardInterrupt
            computed.extend(batch.digests)
            return whole(model, batch, recipe)

        monkeypatch.setattr(reference_file, "sequence_logp", counted)

    stop_at(7)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "out", pairs, **settings).run()
    with pytest.raises(ValueError, match=r"(?s)is stale:.*max_length was 4096, is 900"):
        trainer_of(tmp_path / "out", pairs, data__max_length=900, **settings).run()
    stop_at(1000)
    settings["optim__micro_batch_size"] = size  # batches may then hold some that are known
    assert trainer_of(tmp_path / "out", pairs, **settings).run() == 0
    assert len(set(computed)) == 20
    assert len(computed) == 20 or size > 1


def test_a_signal_while_log_probs_are_computed_ends_the_run_and_loses_none(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reference_file.sequence_logp
    computed: list[str] = []

    def counted(model: Any, batch: Any, recipe: Any) -> Any:
        if not computed:
            signal.raise_signal(signal.SIGTERM)
        computed.extend(batch.digests)
        return whole(model, batch, recipe)

    monkeypatch.setattr(reference_file, "sequence_logp", counted)
    settings = {"reference__kind": "precomputed", "optim__max_steps": 1}
    assert trainer_of(tmp_path / "out", pairs, **settings).run() == INTERRUPTED
    assert len(computed) == 8  # those of a step
    assert trainer_of(tmp_path / "out", pairs, **settings).run() == 0
    assert len(computed) == len(set(computed)) == 20


def test_a_bad_pair_ends_a_run_with_known_log_probs_by_its_name(tmp_path: Path, pairs: Path) -> None:
    data = with_lines(pairs, "broken.jsonl", lambda lines: lines[19].update(images=["damaged.png"]))
    data.with_name("damaged.png").write_bytes(b"no image")
    trainer = trainer_of(tmp_path / "out", data, reference__kind="precomputed")
    with pytest.raises(ValueError, match=r"broken\.jsonl:20.*damaged\.png"):
        trainer.run()
    assert len((tmp_path / "out" / "reference.jsonl").read_text().splitlines()) == 1 + 19


@pytest.mark.parametrize(
    ("device", "threads", "load", "shown"),
    [("cpu", 4, 3.9, True), ("cpu", 1, 3.9, False), ("cpu", 4, 1.0, False), ("cuda", 4, 3.9, False)],
)
def test_a_busy_cpu_is_said(
    device: str, threads: int, load: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    line = busy_cpu_line(torch.device(device))
    assert (line is not None) == shown
    assert line is None or "OMP_NUM_THREADS=1 may be several times faster than the 4 threads" in line


# The first step.


def test_the_first_loss_counts_the_reward_shift(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    settings = {"reward_shift__mode": "fixed", "reward_shift__value": 2.0, "optim__max_steps": 3}
    run(recipe(tmp_path / "out", pairs, **settings))
    expected = 0.8 * math.log(2) + 0.2 * (math.log1p(math.exp(2)) + math.log1p(math.exp(-2)))
    text = capsys.readouterr().err
    assert f"expected {expected:.4f} + " in text
    assert text.count("policy and reference") == 1
    assert "policy and reference agree" in text


@pytest.mark.parametrize(
    ("settings", "deltas"),
    [
        ({"mode": "ema", "value": 2.0, "decay": 0.5}, [1.0, 0.5]),
        ({"mode": "ema", "value": 2.0, "decay": 0.5, "update": "after"}, [2.0, 1.0]),
        ({"mode": "ema", "value": 2.0, "decay": 0.5, "update": "after", "per": "optimizer_step"}, [2.0, 2.0]),
        ({"mode": "cumulative", "value": 2.0}, [0.0, 0.0]),
        ({"mode": "cumulative", "value": 2.0, "update": "after"}, [2.0, 0.0]),
        ({"mode": "fixed", "value": 1000.0}, [1000.0, 1000.0]),
    ],
)
def test_the_first_loss_counts_the_reward_shift_of_each_micro_batch(
    tmp_path: Path, pairs: Path, capsys: Any, settings: dict[str, Any], deltas: list[float]
) -> None:
    shift = {f"reward_shift__{name}": value for name, value in settings.items()}
    run(recipe(tmp_path / "out", pairs, **shift, optim__max_steps=1))  # two micro-batches of four pairs
    terms = [abs(delta) + 2 * math.log1p(math.exp(-abs(delta))) for delta in deltas]
    text = capsys.readouterr().err
    assert f"expected {0.8 * math.log(2) + 0.2 * sum(terms) / 2:.4f} + " in text
    assert "policy and reference agree" in text


def test_dropout_of_adapters_is_named_where_the_first_rewards_are_not_0(
    tmp_path: Path, pairs: Path, capsys: Any
) -> None:
    lora = {"rank": 4, "dropout": 0.5, "alpha": 400.0}

    class Moved(Trainer):
        def make_reference(self) -> Any:
            with torch.no_grad():  # adapters begin with 0, whatever is dropped
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(0.05)
            return super().make_reference()

    model, processor = tiny()
    Moved(
        recipe(tmp_path / "out", pairs, model__lora=lora, optim__max_steps=1), model=model, processor=processor
    ).run()
    assert "DIFFER" in (text := capsys.readouterr().err)
    assert "the adapters' dropout (model.lora.dropout) is on" in text


def test_the_layout_is_tried_on_a_pair_with_images(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def but_one(lines: list[dict[str, Any]]) -> None:
        for line in lines[:-1]:
            line["images"] = []

    seen: list[Any] = []
    monkeypatch.setattr(setup, "check_shared_prefix", lambda model, samples, **options: seen.extend(samples))
    trainer = trainer_of(tmp_path / "out", with_lines(pairs, "one.jsonl", but_one))
    setup.choose_layout(trainer.model, trainer.data)
    assert [bool(sample.image_inputs) for sample in seen] == [False, True]


PACKED = "one row without padding for all pairs of a micro-batch (shared prefix), checked on the first pairs"
CHECKED = "one row for each prompt with its responses (shared prefix), checked on the first pairs"


@pytest.mark.parametrize(
    ("settings", "failing", "layout", "line"),
    [
        ({}, (), "packed", PACKED),
        ({"loss__shared_prefix": "padded"}, (), "shared", f"{CHECKED}, not packed: loss.shared_prefix is padded"),
        ({}, ("packed",), "shared", f"{CHECKED}, not packed: packed fails"),
        (
            {"loss__shared_prefix": "masked"},
            (),
            "masked",
            f"{CHECKED}, with a dense attention mask: loss.shared_prefix is masked",
        ),
        ({"model__attention": "eager"}, (), "packed", PACKED),
        (
            {},
            ("packed", "shared"),
            "masked",
            f"{CHECKED}, with a dense attention mask: packed fails; shared fails",
        ),
        (
            {},
            ("packed", "shared", "masked"),
            "separate",
            "separate rows for chosen and rejected responses: packed fails; shared fails; masked fails",
        ),
        (
            {"loss__shared_prefix": False},
            (),
            "separate",
            "separate rows for chosen and rejected responses: loss.shared_prefix is false",
        ),
    ],
    ids=["packed", "padded", "packing fails", "masked", "eager", "split fails", "all fail", "separate"],
)
def test_the_layout_is_the_first_that_passes_the_check(
    tmp_path: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    failing: tuple[str, ...],
    layout: str,
    line: str,
) -> None:
    model, _ = tiny()
    model.set_attn_implementation(settings.get("model__attention", "sdpa"))
    trainer = trainer_of(tmp_path / "out", pairs, model, **settings)
    if failing:
        monkeypatch.setattr(
            setup,
            "check_shared_prefix",
            lambda *args, layout, **options: f"{layout} fails" if layout in failing else None,
        )
    assert setup.choose_layout(trainer.model, trainer.data) == line
    assert trainer.data.collator.layout == layout


def test_a_reference_model_from_a_path_is_checked_too(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path / "out", pairs)
    reference = tiny()[0]

    def check(model: nn.Module, *args: Any, layout: str, **options: Any) -> str | None:
        return "the reference fails" if model is reference and layout == "packed" else None

    monkeypatch.setattr(setup, "check_shared_prefix", check)
    assert setup.choose_layout(trainer.model, trainer.data, reference) == PACKED  # a copy of the policy
    other = dataclasses.replace(trainer.recipe.reference, path="other")
    trainer.data.recipe = dataclasses.replace(trainer.recipe, reference=other)
    assert setup.choose_layout(trainer.model, trainer.data, reference) == f"{CHECKED}, not packed: the reference fails"
    assert trainer.data.collator.layout == "shared"


def test_a_run_from_logits_never_asks_for_the_head(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``from_logits``, a run must not call ``hidden_and_head``, which does not support some models."""

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no head")

    monkeypatch.setattr(forward_module, "hidden_and_head", refuse)
    trainer = trainer_of(tmp_path / "out", pairs, loss__from_logits=True, optim__max_steps=1)
    assert trainer.run() == 0
    assert trainer.data.collator.layout == "packed"


def test_split_attention_trains_as_the_dense_mask_and_separate_rows_do(tmp_path: Path, pairs: Path) -> None:
    packed, padded, masked, separate = (
        run(recipe(tmp_path / str(value), pairs, loss__shared_prefix=value, model__gradient_checkpointing=True))
        for value in (True, "padded", "masked", False)
    )
    assert len(packed) == 3
    for other in (padded, masked, separate):
        for ours, theirs in zip(packed, other, strict=True):
            for name in ("loss", "chosen_logp", "chosen_reward", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


# Steps without pairs, and steps that are not finite.


def test_a_step_whose_pairs_are_all_skipped_is_logged_and_saved(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    order = trainer_of(tmp_path / "order", pairs, optim__batch_size=4).data.sampler

    def long(lines: list[dict[str, Any]]) -> None:
        for index in order.step(1):
            lines[index]["chosen"] = "1 , " * 200

    model, processor = tiny()
    called: list[tuple[int, dict[str, float]]] = []
    settings = {
        "data__max_length": 100, "optim__batch_size": 4, "optim__warmup_ratio": 0, "optim__max_steps": 3,
        "output__save_every": 2, "reference__sync_every": 2, "reference__sync_mix": 1.0, "output__keep_last": 9,
    }  # fmt: skip
    trained = recipe(tmp_path / "out", with_lines(pairs, "long.jsonl", long), **settings)
    code = loop.train(
        trained, model=model, processor=processor, on_step=lambda step, line: called.append((step, dict(line)))
    )
    assert code == 0
    lines = log(trained)
    assert [line["step"] for line in lines] == [step for step, _ in called] == [1, 2, 3]
    assert lines[1].items() >= {"pairs": 0, "epoch": 2 / 5, "skipped_steps": 0}.items()
    rates = [0.5e-3 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert "loss" not in lines[1]
    assert lines[0]["pairs"] == lines[2]["pairs"] == 4
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000003"
    ]  # fmt: skip
    assert lines[2]["chosen_reward"] == pytest.approx(0, abs=1e-6)  # the reference has moved at step 2
    assert "step 2: all of its pairs were skipped" in capsys.readouterr().err


def poison(model: Any, calls: set[int], factor: float = math.nan) -> None:
    """Breaks the forward pass number n of training, for each n in ``calls``. The first forward pass has the number 1.

    If ``factor`` is NaN, the hidden states become NaN. Otherwise, the gradients of the hidden states become infinite
    or NaN.
    """
    count = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal count
        if not torch.is_grad_enabled():
            return output
        count += 1
        if count in calls and math.isnan(factor):
            return output * math.nan
        if count in calls:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    model.model.language_model.norm.register_forward_hook(hook)


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(tmp_path: Path, pairs: Path) -> None:
    model, processor = tiny()
    poison(model, {3}, 1.0)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"step 2: not finite: the gradient \(norm (inf|nan)\)"):
        run(recipe(tmp_path / "out", pairs), model, processor)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())  # step 1 has rate 0


def test_only_the_pairs_of_a_micro_batch_that_is_not_finite_are_named(tmp_path: Path, pairs: Path) -> None:
    model, processor = tiny()
    poison(model, {3})
    with pytest.raises(FloatingPointError) as caught:  # a reward shift that moved would spoil what comes behind
        run(recipe(tmp_path / "out", pairs, reward_shift__mode="fixed"), model, processor)
    assert str(caught.value).count("pairs.jsonl:") == 4


def test_a_skipped_step_leaves_the_reward_shift_as_it_was(tmp_path: Path, pairs: Path) -> None:
    settings = {"output__on_nonfinite": "skip", "optim__warmup_ratio": 0, "optim__learning_rate": 1e-2}
    settings |= {"optim__batch_size": 4, "optim__max_steps": 4, "output__log_every": 1}
    model, processor = tiny()
    poison(model, {3}, 1.0)  # its rewards are finite
    lines = run(recipe(tmp_path / "out", pairs, **settings), model, processor)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1]
    assert lines[2]["reward_shift"] == lines[1]["reward_shift"] != 0
    assert lines[3]["reward_shift"] != lines[2]["reward_shift"]


def test_the_loss_scaler_is_updated_when_a_step_is_skipped(tmp_path: Path, pairs: Path, any_precision: None) -> None:
    model, _ = tiny()
    poison(model, {3})
    settings = {"output__on_nonfinite": "skip", "optim__warmup_ratio": 0, "optim__max_steps": 3}
    trainer = trainer_of(tmp_path / "out", pairs, model, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator._optimizers, trainer.accelerator.scaler = [trainer.optimizer], scaler
    trainer.accelerator.native_amp = True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    scales: list[float] = []
    trainer.on_step = lambda step, line: scales.append(scaler.get_scale())
    assert trainer.run() == 0  # step 3 raised: unscale_() has already been called
    assert scales == [8.0, 4.0, 4.0]
    assert [line["skipped_steps"] for line in log(trainer.recipe)] == [0, 1, 1]


def test_a_skipped_step_counts_once(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed, which steps in the backward pass, says itself that it has skipped a step."""
    model, _ = tiny()
    poison(model, {3})
    trainer = trainer_of(tmp_path / "out", pairs, model, output__on_nonfinite="skip", optim__warmup_ratio=0)
    is_skipped = property(lambda self: trainer.state.step == 1)
    monkeypatch.setattr(accelerate.Accelerator, "optimizer_step_was_skipped", is_skipped)
    assert trainer.run() == 0
    assert [line["skipped_steps"] for line in log(trainer.recipe)] == [0, 1, 1]


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_step_that_deepspeed_has_done_is_not_skipped(
    tmp_path: Path, pairs: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny()
    poison(model, {3})
    trainer = trainer_of(tmp_path / "out", pairs, model, output__on_nonfinite=mode, output__save_every=1)
    monkeypatch.setattr(loop, "is_deepspeed", lambda accelerator: True)
    with pytest.raises(FloatingPointError, match=r"step 2: .* is \S+step-00000001; DeepSpeed cannot leave it out"):
        trainer.run()


def long_but(lines: list[dict[str, Any]], kept: Any) -> None:
    for index, line in enumerate(lines):
        if index not in kept:
            line["chosen"] = "1 , " * 200


def test_the_first_step_with_pairs_is_checked(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    order = trainer_of(tmp_path / "order", pairs).data.sampler.step(0).tolist()
    late = with_lines(pairs, "late.jsonl", lambda lines: long_but(lines, set(range(20)) - set(order)))
    settings = {"data__max_length": 100, "optim__max_steps": 2, "output__save_every": 1}
    trainer = trainer_of(tmp_path / "out", late, **settings)
    trainer.on_step = lambda step, line: signal.raise_signal(signal.SIGTERM) if step == 1 else None
    assert trainer.run() == INTERRUPTED
    assert "step 1: all of its pairs were skipped" in capsys.readouterr().err
    trainer = trainer_of(tmp_path / "out", late, **settings)
    assert trainer.run() == 0
    text = capsys.readouterr().err
    assert text.count("policy and reference agree") == 1
    assert "step 2: loss " in text
    assert "step 2: the policy still equals the reference" in text
    assert trainer_of(tmp_path / "out", late, **{**settings, "optim__max_steps": 3}).run() == 0
    text = capsys.readouterr().err
    assert "resumes from" in text
    assert "policy and reference" not in text


def test_the_step_after_a_first_step_that_is_not_finite_is_checked(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    model, _ = tiny()
    poison(model, {1, 3})  # both steps have two micro-batches
    assert trainer_of(tmp_path / "out", pairs, model, output__on_nonfinite="skip", optim__max_steps=4).run() == 0
    text = capsys.readouterr().err
    assert "step 2: not finite" in text
    assert text.count("policy and reference agree") == 1
    assert "step 3: loss " in text


def test_a_run_goes_on_if_the_next_epoch_draws_other_pairs(tmp_path: Path, pairs: Path) -> None:
    train = {"path": str(pairs), "repeat_time": 0.1}
    settings = {"data__max_length": 100, "optim__epochs": 4, "optim__batch_size": 2, "optim__micro_batch_size": 2}
    epochs = trainer_of(tmp_path / "order", pairs, data__train=[train], **settings).data.mixture.epoch
    drawn = set(epochs(0).tolist())
    kept = set(range(20)) - drawn
    assert kept & {int(line) for epoch in (1, 2, 3) for line in epochs(epoch)}
    train["path"] = str(with_lines(pairs, "drawn.jsonl", lambda lines: long_but(lines, kept)))
    assert trainer_of(tmp_path / "out", pairs, data__train=[train], **settings).run() == 0


# Console and log.


def test_tokens_per_second_and_memory_have_their_units(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 4))
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(loop, "time", fake)
    trainer = trainer_of(tmp_path / "out", pairs, optim__max_steps=99)  # more than an epoch has
    tokens = []
    for step in range(3):
        batches = trainer.data.steps()[step].batches
        tokens.append(sum(int((batch.segments >= 0).sum()) for batch in batches))
    assert trainer.run() == 0
    lines = log(trainer.recipe)
    assert [line["tokens_per_s"] for line in lines] == [count / 4 for count in tokens]
    assert [line["pairs_per_s"] for line in lines] == [line["pairs"] / 4 for line in lines]
    assert [line["step_s"] for line in lines] == [4] * len(lines)
    assert all(64 < line["memory_mib"] < 2**17 for line in lines)
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(("every", "logged"), [(2, [2, 3]), (9, [3])])
def test_on_step_is_called_for_each_and_the_log_has_some_and_the_last(
    tmp_path: Path, pairs: Path, every: int, logged: list[int]
) -> None:
    model, processor = tiny()
    called: list[int] = []
    trained = recipe(tmp_path / "out", pairs, output__log_every=every, optim__max_steps=3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock").touch()
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 77}\n')  # left by a run without a checkpoint
    loop.train(trained, model=model, processor=processor, on_step=lambda step, line: called.append(step))
    assert called == [1, 2, 3]
    assert [line["step"] for line in log(trained)] == logged


def test_trackers_get_settings_steps_and_evaluations(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, cards: list[Any], capsys: Any
) -> None:
    double = with_lines(pairs, "double.jsonl", lambda lines: lines[4].update(rejected=lines[4]["chosen"]))
    trainer = trainer_of(tmp_path / "out", double, data__eval=[str(double)], output__log_every=1)
    output = dataclasses.replace(trainer.recipe.output, trackers=("mine",))
    trainer.recipe = trainer.output.recipe = dataclasses.replace(trainer.recipe, output=output)
    sent: list[tuple[int, set[str]]] = []
    begun: list[Any] = []
    monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: sent.append((step, set(values))))
    start = lambda name, config, **options: begun.append((name, config))  # noqa: E731
    monkeypatch.setattr(trainer.accelerator, "init_trackers", start)
    assert trainer.run() == 0
    assert begun[0][0] == "mpo_ext"
    assert begun[0][1]["optim.batch_size"] == 8
    assert [step for step, _ in sent] == [1, 2, 3, 3]
    assert all(name.startswith("train/") for _, names in sent[:3] for name in names)
    assert {"eval/loss", "eval/reward_accuracy"} <= sent[3][1]
    (values,) = cards
    last, evaluation = log(trainer.recipe)[-2:]
    assert values["summary"].items() >= {"loss": last["loss"], "eval_loss": evaluation["eval_loss"]}.items()
    assert values["summary"]["skipped"] == {"chosen and rejected are equal": 1}
    assert "skipped 1: chosen and rejected are equal" in capsys.readouterr().err
    assert trainer.state.pair_counts.kept == 19
    assert sum(trainer.eval_pair_counts.skipped.values()) == 1


def test_a_reward_that_is_equal_is_not_accurate() -> None:
    totals = Totals(torch.device("cpu"))
    rewards = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])
    zero = torch.zeros(())
    out: Any = SimpleNamespace(
        loss=zero, dpo_loss=zero, bco_loss=zero, ntp_loss=zero, chosen_reward=rewards[0], rejected_reward=rewards[1],
        chosen_logp=rewards[0], rejected_logp=rewards[1], stats={}, tokens=torch.ones(4), reward_shift=None,
    )  # fmt: skip
    totals.add(out, ntp_parts=2, tokens=9)
    sums = totals.reduce(SimpleNamespace(num_processes=1))
    assert (sums["reward_accuracy"], sums["pairs"], sums["tokens"]) == (1, 2, 9)


@pytest.mark.parametrize(
    ("chosen", "rejected", "rewards", "expected"),
    [
        ([5, 5, 5, 1], [1, 1, 1, 5], [1, 1, 1, -1], (0.75, 0.75, 0.5)),  # only length counts
        ([5, 5, 5, 1], [1, 1, 1, 5], [1, 1, 1, 1], (1.0, 0.75, 1.0)),
        ([5, 3, 3, 1], [1, 3, 3, 5], [1, 1, -1, -1], (0.5, 0.5, 0.5)),
        ([5, 3], [1, 3], [1, -1], (0.5, 0.75, 1.0)),  # one kind of pairs
        ([3, 3], [3, 3], [1, 1], (1.0, 0.5, 1.0)),
    ],
)
def test_the_accuracy_is_beside_that_of_the_longer_response(
    chosen: list[int], rejected: list[int], rewards: list[float], expected: tuple[float, float, float]
) -> None:
    zero, pairs = torch.zeros(()), len(chosen)
    out: Any = SimpleNamespace(
        loss=zero, dpo_loss=zero, bco_loss=zero, ntp_loss=zero, chosen_reward=torch.tensor(rewards).float(),
        rejected_reward=torch.zeros(pairs), chosen_logp=zero, rejected_logp=zero, stats={},
        tokens=torch.tensor(chosen + rejected), reward_shift=None,
    )  # fmt: skip
    totals = Totals(torch.device("cpu"))
    totals.add(out, ntp_parts=1, tokens=1)
    line = means(totals.reduce(SimpleNamespace(num_processes=1)), (1, 1, 1))
    assert (line["reward_accuracy"], line["length_accuracy"], line["balanced_accuracy"]) == pytest.approx(expected)


def test_the_log_is_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    kept = Log(tmp_path / "log.jsonl")
    kept.append({"loss": math.nan, "norm": -math.inf, "step": 3})
    assert kept.read() == [{"loss": "nan", "norm": "-inf", "step": 3}]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_console_shows_some_steps_the_last_and_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = io.StringIO()
    console = Console(10, 4, stream)
    line = {"loss": 1.5, "learning_rate": 0.1}
    for step in (5, 6, 7, 10):
        now[0] += 20
        console.step(step, line)
    shown = [text.split(":")[0] for text in stream.getvalue().splitlines()]
    # The estimate leaves out the first step, which takes longest.
    assert shown == ["step 5/10", "step 7/10, 60 s left", "step 10/10, 0 s left"]
    assert stream.getvalue().startswith("step 5/10: loss 1.5000, rate 1.00e-01\n")  # SFT has no accuracy, no margin
    console.step(10, {**line, "reward_accuracy": 0.5, "reward_margin": 0.25})
    assert stream.getvalue().endswith("loss 1.5000, accuracy 0.50, margin 0.250, rate 1.00e-01\n")
    Console(10, 0, None).say("nothing")
    Console(10, 0, None).step(1, line)
    assert capsys.readouterr() == ("", "")
    with Console(10, 4, Screen()) as bar:
        bar.step(6, line)
        bar.say("words [in] brackets")
        (task,) = bar._bar.tasks
        assert (task.completed, task.total) == (6, 10)
    assert "words [in] brackets" in bar.stream.getvalue()  # type: ignore[union-attr]


def test_out_of_memory_of_the_machine_is_explained_like_that_of_a_gpu(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, expected in (
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
            "out of memory in step 1 with 4",
        ),
        ("another error", "^another error$"),
    ):

        def fail(*args: Any, _text: str = text, **options: Any) -> Any:
            raise RuntimeError(_text)

        monkeypatch.setattr(batch_loss, "linear_mpo_loss", fail)
        with pytest.raises(RuntimeError, match=expected):
            run(recipe(tmp_path / text[:3], pairs))


def test_a_run_leaves_the_handlers_of_signals_and_runs_in_a_thread(tmp_path: Path, pairs: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    lines = run(recipe(tmp_path / "main", pairs, optim__max_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(run(recipe(tmp_path / "thread", pairs, optim__max_steps=1))))
    thread.start()
    thread.join()
    assert [line["loss"] for line in found] == [line["loss"] for line in lines]


# Evaluation and checkpoints.


def test_an_evaluation_is_without_dropout_and_training_continues_with_it(tmp_path: Path, pairs: Path) -> None:
    lora = {"rank": 4, "dropout": 0.5}
    trainer = trainer_of(tmp_path / "out", pairs, model__lora=lora, data__eval=[str(pairs)], optim__learning_rate=1e-1)
    assert trainer.run() == 0
    shift = trainer.state.reward_shift.state_dict()
    first = trainer.evaluate()
    assert first["pairs"] == 20
    assert first["reward_margin"] != 0
    assert trainer.model.training
    assert trainer.evaluate() == first
    assert trainer.state.reward_shift.state_dict() == shift
    assert trainer.state.reward_shift.training


def test_a_signal_in_an_evaluation_ends_the_run_behind_it(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(self: Trainer) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {"loss": 1.0, "reward_accuracy": 0.5}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    trainer = trainer_of(tmp_path / "out", pairs, data__eval=[str(pairs)], output__eval_every=1)
    assert trainer.run() == INTERRUPTED
    assert trainer.state.step == 1


def test_a_bad_pair_to_evaluate_on_ends_the_run_by_name(tmp_path: Path, pairs: Path) -> None:
    broken = with_lines(pairs, "bad-eval.jsonl", lambda lines: lines[1].update(images=["gone.png"]))
    with pytest.raises(ValueError, match=r"bad-eval\.jsonl:2.*gone\.png"):
        trainer_of(tmp_path / "out", pairs, data__eval=[str(broken)], optim__max_steps=1).run()


@pytest.mark.parametrize("every", [0, 1])
def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path, pairs: Path, every: int) -> None:
    bad = with_lines(pairs, "bad-eval.jsonl", lambda lines: lines[1].update(images=["bad-eval.png"]))
    bad.with_name("bad-eval.png").write_bytes(b"no image")
    settings = {"data__eval": [str(bad)], "output__eval_every": every, "optim__max_steps": 2}
    step = 1 if every else 2
    for _ in range(2):  # the second run fails in the same evaluation
        with pytest.raises(ValueError, match=r"bad-eval\.jsonl:2: .*bad-eval\.png.*data\.skip_bad=true"):
            trainer_of(tmp_path / "out", pairs, **settings).run()
        assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    resumed = trainer_of(tmp_path / "out", pairs, data__skip_bad=True, **settings)
    assert resumed.run() == 0
    assert [line["step"] for line in log(resumed.recipe) if "eval_loss" in line] == ([1, 2] if every else [2])


def test_an_error_of_one_rank_in_an_evaluation_saves_nothing() -> None:
    for n_ranks, error, saves in [
        (1, ValueError("x"), True), (2, ValueError("x"), False), (2, RuntimeError("x"), False),
        (2, EvaluationPairError("x"), True), (2, EvaluationAnswerError("x"), True),
    ]:  # fmt: skip
        assert evaluation.fails_on_all_ranks(SimpleNamespace(num_processes=n_ranks), error) == saves


def test_skipped_evaluation_pairs_are_said_and_no_pair_is_no_score(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    def same(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["rejected"] = line["chosen"]

    double = with_lines(pairs, "same.jsonl", same)
    settings = {"output__eval_every": 1, "output__early_stopping": 2, "output__best_metric": "loss"}
    settings |= {"output__keep_best": True, "output__save_every": 1}
    trainer = trainer_of(tmp_path / "out", pairs, data__eval=[str(double)], **settings)
    assert trainer.run() == 0
    text = capsys.readouterr().err
    assert text.count("data.eval: skipped 20: chosen and rejected are equal, for example ") == 1  # not each time
    assert text.count("WARNING: MOST EVALUATION PAIRS WERE SKIPPED, 20 of 20: there is no score") == 1
    assert "evaluation after step 1: loss nan" in text
    assert "early stopping: no loss in 2 evaluations, so the run ends after step 2" in text
    line = log(trainer.recipe)[1]
    assert (line["eval_loss"], line["eval_reward_accuracy"], line["eval_pairs"]) == ("nan", "nan", 0)
    assert trainer.state.best_score is None
    some = with_lines(pairs, "some.jsonl", lambda lines: same(lines[:12]))
    assert trainer_of(tmp_path / "some", pairs, data__eval=[str(some)]).run() == 0
    assert "12 of 20: the scores are those of the few others" in capsys.readouterr().err


def test_the_best_checkpoint_is_of_the_current_metric_and_data(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_lines(pairs, "other-eval.jsonl", lambda lines: lines.pop())
    settings = {"output__eval_every": 1, "output__keep_best": True, "output__keep_last": 1}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"reward_accuracy": 0.5, "loss": 3 - self.state.step / 10})
    for steps, data, metric, best in [
        (1, pairs, "reward_accuracy", 1), (2, pairs, "reward_accuracy", 1), (3, pairs, "loss", 3),
        (5, other, "reward_accuracy", 3),  # the first with these data: the run evaluates before it trains
    ]:  # fmt: skip
        changed = {"output__best_metric": metric, "data__eval": [str(data)], "optim__max_steps": steps}
        trainer = trainer_of(tmp_path / "out", pairs, **settings, **changed, optim__epochs=9)
        assert trainer.run() == 0
        assert trainer.output.checkpoints.best() == tmp_path / "out" / "checkpoints" / f"step-{best:08d}"
        kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
        assert kept == sorted({f"step-{best:08d}", f"step-{steps:08d}"})


def test_a_best_evaluation_after_resuming_has_a_checkpoint(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data__eval": [str(pairs)], "output__eval_every": 1, "output__keep_best": True, "output__keep_last": 1}
    for step in (1, 2):
        values_of_evaluations(monkeypatch, [0.9])
        trainer = trainer_of(tmp_path / "out", pairs, **settings)
        trainer.on_step = lambda number, line, last=step: signal.raise_signal(signal.SIGTERM) if number == last else 0
        assert trainer.run() == INTERRUPTED
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002"]
    assert trainer.output.checkpoints.best() == tmp_path / "out" / "checkpoints" / "step-00000001"


@pytest.mark.parametrize(("metric", "best"), [("reward_accuracy", 2), ("loss", 1)])
def test_the_best_checkpoint_is_kept_by_its_metric(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    values = iter([(0.2, 1.0), (0.9, 2.0), (0.1, 3.0)])
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: dict(zip(("reward_accuracy", "loss"), next(values), strict=True))
    )
    settings = {"eval_every": 1, "save_every": 1, "keep_last": 1, "keep_best": True, "best_metric": metric}
    settings = {f"output__{name}": value for name, value in settings.items()}
    trainer = trainer_of(tmp_path / "out", pairs, data__eval=[str(pairs)], optim__max_steps=3, **settings)
    assert trainer.run() == 0
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", "step-00000003"]


def values_of_evaluations(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    left = iter(values)
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"reward_accuracy": next(left), "loss": 1.0})


def test_a_run_that_no_longer_improves_ends(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data__eval": [str(pairs)], "output__eval_every": 1, "output__early_stopping": 2, "optim__epochs": 4}
    values_of_evaluations(monkeypatch, [math.nan, 0.5, 0.7, 0.7, 0.6, 0.9])
    trainer = trainer_of(tmp_path / "out", pairs, **settings)
    assert trainer.run() == 0
    assert trainer.state.step == 5  # the third evaluation was the best, and two were not better
    assert (tmp_path / "out" / "final" / "config.json").exists()

    again = trainer_of(tmp_path / "out", pairs, **settings)
    assert again.run() == 0
    assert again.state.step == 5
    values_of_evaluations(monkeypatch, [0.1] * 9)
    patient = trainer_of(tmp_path / "out", pairs, **{**settings, "output__early_stopping": 4})
    assert patient.run() == 0
    assert patient.state.step == 7  # it counts on from two


def test_the_best_evaluation_has_a_checkpoint_and_the_end_is_explained(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {"eval_every": 1, "early_stopping": 2, "keep_best": True, "keep_last": 1}
    values_of_evaluations(monkeypatch, [0.5, 0.7, 0.6, 0.6])
    options = {f"output__{name}": value for name, value in settings.items()}
    trainer = trainer_of(tmp_path / "out", pairs, data__eval=[str(pairs)], optim__epochs=4, **options)
    assert trainer.run() == 0
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    text = "early stopping: no better reward_accuracy than 0.7000 in 2 evaluations, so the run ends after step 4"
    assert text in capsys.readouterr().err


def test_a_run_interrupted_before_it_stops_early_counts_on(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data__eval": [str(pairs)], "output__eval_every": 1, "output__early_stopping": 2, "optim__epochs": 4}
    values_of_evaluations(monkeypatch, [0.5, 0.4])
    trainer = trainer_of(tmp_path / "out", pairs, **settings, output__save_every=1)
    trainer.on_step = lambda step, line: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    assert trainer.run() == INTERRUPTED
    values_of_evaluations(monkeypatch, [0.4, 0.4, 0.4])
    trainer = trainer_of(tmp_path / "out", pairs, **settings)
    assert trainer.run() == 0
    assert trainer.state.step == 3


# What a run says at its start.


def test_rates_on_the_console_are_those_that_train(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    parts = ("vision_tower", "projector", "language_model")
    groups = {part: {"learning_rate": 10.0**-n} for n, part in enumerate(parts, 3)}
    for name, own in (("all", groups), ("one", {"projector": groups["projector"]})):
        trainer_of(tmp_path / name, pairs, optim__groups=own, optim__max_steps=1, optim__warmup_ratio=0.0).run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 1/1")]
    rates = "vision_tower rate 1.00e-03, projector rate 1.00e-04, language_model rate 1.00e-05"
    assert lines[0].endswith(f", {rates}")
    assert lines[1].endswith(", rate 1.00e-03, projector rate 1.00e-04")
    assert "learning_rate" not in log(recipe(tmp_path / "all", pairs))[0]


def test_a_limit_of_tokens_below_every_pair_is_said(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    for limit in (20, 200):
        settings = {"optim__micro_batch_tokens": limit, "optim__micro_batch_size": 1, "optim__max_steps": 1}
        (line,) = run(recipe(tmp_path / str(limit), pairs, **settings))
        text = capsys.readouterr().err
        assert ("optim.micro_batch_tokens is 20, less than every pair of the first step (at least" in text) == (
            limit == 20
        )
        assert (line["micro_batches"] == 8) == (limit == 20)


@pytest.mark.parametrize("place", ["train", "eval"])
def test_a_line_without_a_pair_ends_a_run_at_its_start(
    place: str, tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = pairs.with_name(f"no-{place}.jsonl")
    lines = pairs.read_text().splitlines()
    bad.write_text("\n".join([*lines[:17], '{"question": "Q"}', *lines[18:], "{"]) + "\n")
    files = {"data__train": [str(bad if place == "train" else pairs)], "data__eval": [str(bad)]}
    with pytest.raises(LinesError, match=rf"(?s)the lines must hold pairs.*{bad.name}:18: .*{bad.name}:21: "):
        trainer_of(tmp_path / "out", pairs, **files).run()
    assert not (tmp_path / "out" / "log.jsonl").exists()
    trainer = trainer_of(tmp_path / "skip", pairs, **files, data__skip_bad=True)
    assert trainer.run() == 0
    assert trainer.state.pair_counts.n_skipped == (2 if place == "train" else 0)


def test_workers_do_not_import_from_the_current_folder(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    for name in ("struct", "pickle", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write('{name} ')")
    trainer = trainer_of(tmp_path / "out", pairs, data__workers=1, optim__max_steps=1)
    assert trainer.run() == 0
    assert not (tmp_path / "imported").exists()
    assert "PYTHONSAFEPATH" not in os.environ


# The state with which a run resumes.


class EndedError(Exception):
    pass


def test_counts_continue_when_a_run_resumes(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    def change(lines: list[dict[str, Any]]) -> None:
        for line in lines[:5]:
            line["rejected"] = line["chosen"]
        for line in lines[5:]:
            line["chosen"] += " , 9" * 30

    data = with_lines(pairs, "counted.jsonl", change)
    settings = {
        "output__save_every": 1, "output__on_nonfinite": "skip", "data__too_long": "truncate", "data__max_length": 40
    }  # fmt: skip

    def end_at_3(step: int, line: Any) -> None:
        if step == 3:
            raise EndedError

    model, processor = tiny()
    poison(model, {1})
    with pytest.raises(EndedError):
        loop.train(recipe(tmp_path / "out", data, **settings), model=model, processor=processor, on_step=end_at_3)
    trainer = trainer_of(tmp_path / "out", data, **settings)
    assert trainer.run() == 0
    assert [line["skipped_steps"] for line in log(trainer.recipe)] == [1, 1, 1]
    straight = trainer_of(tmp_path / "straight", data, **settings)
    assert straight.run() == 0
    assert vars(trainer.state.pair_counts) == vars(straight.state.pair_counts)
    assert (trainer.state.pair_counts.kept, trainer.state.pair_counts.cut) == (15, 15)
    assert "cut the responses of 15 pairs" in capsys.readouterr().err
    assert trainer.state.pair_counts.skipped == collections.Counter({"chosen and rejected are equal": 5})


def test_counts_of_several_epochs_say_so(tmp_path: Path, pairs: Path, cards: list[Any], capsys: Any) -> None:
    double = with_lines(pairs, "epochs.jsonl", lambda lines: lines[4].update(rejected=lines[4]["chosen"]))
    assert trainer_of(tmp_path / "out", double, optim__epochs=2).run() == 0
    assert "skipped 2 in 2 epochs: chosen and rejected are equal" in capsys.readouterr().err
    assert cards[0]["summary"]["skipped in 2 epochs"] == {"chosen and rejected are equal": 2}


def test_counts_of_all_ranks_are_one(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path / "out", pairs)
    other = PairCounts()
    other.kept, trainer.state.pair_counts.kept = 3, 4
    monkeypatch.setattr(resume, "gather", lambda accelerator, value: [value, other])
    assert trainer.state.pair_counts_of_all_ranks().kept == 7


def test_settings_that_may_change_when_a_run_resumes(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"data__eval": [str(pairs)], "optim__max_steps": 1}
    trainer = trainer_of(tmp_path / "out", pairs, **base)
    assert trainer.run() == 0
    path = trainer.output.checkpoints.latest()
    assert path is not None
    state = trainer.output.checkpoints.load(trainer.accelerator, path, trainer.model, trainer.optimizer)
    monkeypatch.setattr(trainer.output.checkpoints, "load", lambda *args, **options: state)
    free = {
        "loss__memory_budget_mib": 5, "loss__recompute": False, "loss__shared_prefix": False,
        "loss__from_logits": True, "loss__backend": "reference", "model__attention": "eager",
        "model__gradient_checkpointing": True,
        "optim__epochs": 3, "optim__max_steps": 2, "optim__micro_batch_size": 2, "data__workers": 1,
        "data__eval": [], "output__log_every": 3, "output__save_every": 7,
    }  # fmt: skip
    for name, value in free.items():
        trainer.output.recipe = recipe(tmp_path / "out", pairs, **{**base, name: value})
        trainer.state.evaluation = None
        trainer.output.check_inputs(trainer.data, path, trainer.fixed_weights)
        assert trainer.output.resume(path, trainer.model, trainer.optimizer, None)
        assert (trainer.state.evaluation is None) == (name == "data__eval"), name
    second_rank = resume.RunState(trainer.recipe, SimpleNamespace(is_main_process=False))
    second_rank.load_state_dict(state, keep_evaluation=True)
    assert second_rank.pair_counts.kept == 0  # the main process has them all
    fixed = {
        "loss__beta": 0.2, "loss__ntp_average": "sequence", "loss__average_over": "micro_batch", "precision": "bf16",
        "model__dtype": "bfloat16", "model__freeze": ["vision_tower"], "optim__seed": 1, "optim__batch_size": 4,
        "optim__betas": [0.5, 0.5], "optim__warmup_ratio": 0.5, "data__max_length": 77, "data__group_prompts": True,
        "reward_shift__mode": "fixed", "reference__kind": "precomputed", "reference__sync_every": 2,
    }  # fmt: skip
    for name, value in fixed.items():
        trainer.output.recipe = recipe(tmp_path / "out", pairs, **{**base, name: value})
        with pytest.raises(ValueError, match=rf"(?s){name.replace('__', '.')} was .*, is .*use another output\.dir"):
            trainer.output.check_inputs(trainer.data, path, trainer.fixed_weights)


def test_a_checkpoint_of_another_folder_starts_a_new_log(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    first = trainer_of(tmp_path / "first", pairs, optim__max_steps=2)
    assert first.run() == 0
    path = first.output.checkpoints.latest()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock").touch()
    (tmp_path / "out" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0, "text": "x" * 4000}) + "\n")
    trainer = trainer_of(tmp_path / "out", pairs, output__resume=str(path), optim__epochs=2)
    trainer.on_step = lambda step, line: signal.raise_signal(signal.SIGTERM) if step == 4 else None
    assert trainer.run() == INTERRUPTED
    assert [line["step"] for line in log(trainer.recipe)] == [3, 4]  # was cut in the middle of the other run's line
    text = capsys.readouterr().err
    assert "SIGTERM: ended after step 4 of 6; output.resume=auto resumes from here" in text
    with pytest.raises(ValueError, match="which has the checkpoints of a run"):
        trainer_of(tmp_path / "out", pairs, output__resume=str(path), optim__epochs=2)
    assert trainer_of(tmp_path / "out", pairs, optim__epochs=2).run() == 0
    assert [line["step"] for line in log(trainer.recipe)] == [3, 4, 5, 6]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, pairs: Path) -> None:
    trainer = trainer_of(tmp_path / "out", pairs)
    with (
        FileLock(tmp_path / "out" / "run.lock", "the run"),
        pytest.raises(LockedError, match=r"output.dir: .*out must"),
    ):
        trainer.run()


def test_processes_that_accelerate_does_not_know_are_refused(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, accelerate sets the world size to 1 in each process of torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes must be the 2 that the launcher started, got 1 in accelerate"):
        trainer_of(tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


def test_an_accelerate_that_frees_the_head_is_refused_with_fsdp2(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "is_fsdp2", property(lambda self: True), raising=False)
    monkeypatch.setattr(accelerate.utils, "compare_versions", lambda *args: args == ("accelerate", "<", "1.14.0"))
    with pytest.raises(ImportError, match=r"accelerate must be at least 1\.14\.0 for FSDP2, got \d"):
        trainer_of(tmp_path / "out", pairs)


def test_the_learning_rate_is_set_before_the_backward_pass(tmp_path: Path, pairs: Path) -> None:
    """With DeepSpeed, backward includes the optimizer step, so the learning rate must be set before backward."""
    trainer = trainer_of(tmp_path / "out", pairs, optim__warmup_ratio=0.5)
    rates: list[float] = []
    backward = trainer.accelerator.backward

    def record(loss: torch.Tensor, **options: Any) -> None:
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        backward(loss, **options)

    trainer.accelerator.backward = record
    trainer.run()
    steps = [line["learning_rate"] for line in log(trainer.recipe)]
    assert list(dict.fromkeys(rates)) == steps


def test_a_bad_pair_saves_the_steps_before_and_may_be_skipped_by_the_resumed_run(tmp_path: Path, pairs: Path) -> None:
    def damage_an_image(lines: list[dict[str, Any]]) -> None:
        lines[3]["images"] = ["damaged.png"]

    bad = with_lines(pairs, "bad.jsonl", damage_an_image)
    bad.with_name("damaged.png").write_bytes(b"no image")
    for seed in range(20):  # the bad pair must not be in the first step
        trainer = trainer_of(tmp_path / f"{seed}", bad, optim__seed=seed)
        with pytest.raises(ValueError, match=r"bad.jsonl:4: .*damaged.png.*data.skip_bad=true leaves such pairs out"):
            trainer.run()
        if trainer.state.step > 0:
            break
    assert [path.name for path in (tmp_path / f"{seed}" / "checkpoints").iterdir()] == [
        f"step-{trainer.state.step:08d}"
    ]
    resumed = trainer_of(tmp_path / f"{seed}", bad, optim__seed=seed, data__skip_bad=True)
    assert resumed.run() == 0
    assert resumed.state.step == 3
    assert resumed.state.pair_counts.n_skipped == 1
    assert resumed.state.pair_counts.kept == 19
