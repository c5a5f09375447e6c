"""Tests recipes: the settings of a file, the messages about wrong settings, and the training command."""

from __future__ import annotations

import builtins
import math
import re
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_ext.__main__ import main
from mpo_ext.checks import install_hint
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.ops.backends import BACKENDS
from mpo_ext.train import __main__ as module_main
from mpo_ext.train import model, recipe
from mpo_ext.train.recipe import (
    DataRecipe,
    LoraRecipe,
    LossRecipe,
    ModelRecipe,
    OptimRecipe,
    OutputRecipe,
    Recipe,
    ReferenceRecipe,
    RewardShiftRecipe,
    SourceRecipe,
    load_recipe,
)
from mpo_ext.train.recipe_file import parse_yaml
from mpo_ext.train.settings import MODEL_PARTS

RECENT = (
    "internvl3.5-1b", "internvl3.5-8b", "internvl3.5-30b-a3b", "qwen3-vl-2b", "qwen3-vl-8b", "qwen3-vl-30b-a3b",
    "qwen3.5-9b", "gemma3-4b",
)  # fmt: skip
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = "model: {path: m}\ndata: {train: a.jsonl}\noutput: {dir: out}\n"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """Returns a function that writes a text to a file and loads it as a recipe."""

    def load_text(text: str = SMALL, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "r.yaml", overrides)

    return load_text


def small(**sections: Any) -> Recipe:
    given = {"model": ModelRecipe(path="m"), "data": DataRecipe(train=(SourceRecipe(path="a"),))}
    return Recipe(**{**given, "output": OutputRecipe(dir="out"), **sections})


def test_omitted_settings_have_their_defaults(load: Callable[..., Recipe]) -> None:
    assert load() == small(data=DataRecipe(train=(SourceRecipe(path="a.jsonl"),)))
    assert load("model: {path: m}\ndata: {train: a.jsonl}\noutput: {dir: out}\nloss:\n  # beta: 1\n") == load()
    assert load("model: {path: m, lora: {}}\ndata: {train: a}\noutput: {dir: o}\n").model.lora == LoraRecipe()
    assert load("model: {path: m, lora: }\ndata: {train: a}\noutput: {dir: o}\n").model.lora is None


def test_the_defaults_are_those_of_the_loss() -> None:
    assert LossRecipe().config == MPOConfig()
    shift, theirs = RewardShiftRecipe(), RewardShift()
    assert (shift.mode, shift.decay, shift.update, shift.value, shift.per) == (
        theirs.mode, theirs.decay, theirs.update_order, theirs.value, theirs.per,
    )  # fmt: skip


def test_names_are_those_of_the_parts_that_use_them() -> None:
    assert set(MODEL_PARTS) == set(model.PARTS)
    assert typing.get_args(recipe.BackendName) == BACKENDS


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.jsonl", (SourceRecipe(path="a.jsonl"),)),
        ("[a.jsonl, b.json]", (SourceRecipe(path="a.jsonl"), SourceRecipe(path="b.json"))),
        ("{path: a.json, repeat_time: 2}", (SourceRecipe(path="a.json", repeat_time=2.0),)),
        (
            "[{path: a, format: hf, image_dir: i}, {path: b, root: r, root_map: [[/x, /y], [/z, /w]]}, c]",
            (
                SourceRecipe(path="a", format="hf", image_dir="i"),
                SourceRecipe(path="b", root="r", root_map=(("/x", "/y"), ("/z", "/w"))),
                SourceRecipe(path="c"),
            ),
        ),
    ],
)
def test_sources_may_be_written_in_many_ways(
    load: Callable[..., Recipe], text: str, sources: tuple[SourceRecipe, ...]
) -> None:
    assert load(SMALL, f"data.train={text}", f"data.eval={text}").data == DataRecipe(train=sources, eval=sources)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("2E+3", 2e3), ("1", 1.0), (".5", 0.5), ("5.", 5.0), ("1.0e-06", 1e-6), ("0.1", 0.1),
        ("0x10", 16.0), ("010", 10.0), ("+3", 3.0), ("0o17", 15.0),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(load: Callable[..., Recipe], text: str, value: float) -> None:
    rate = load(SMALL, f"optim.learning_rate={text}").optim.learning_rate
    assert rate == value
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    "text", ["no", "on", "y", "12:30", "2024-11-15", "1_000", "1e", "~a", "nullable", "<<", "inf"]
)
def test_other_words_are_strings(load: Callable[..., Recipe], text: str) -> None:
    assert load(SMALL, f"output.dir={text}").output.dir == text


def test_words_of_yaml_1_2() -> None:
    assert parse_yaml("[true, False, null, ~, .inf, -.INF, '1']") == [
        True, False, None, None, float("inf"), -float("inf"), "1",
    ]  # fmt: skip
    assert parse_yaml(".nan") != parse_yaml(".NaN")


def test_a_recipe_comes_back_from_its_own_file(load: Callable[..., Recipe]) -> None:
    strings = ["no", "1e6", "0o17", "12:30", "null", "2024-11-15", "a: b", "é", "", "x\n{{ y }}\n", "5.", "1e-6"]
    for text in filter(None, strings):
        built = small(
            model=ModelRecipe(path=text, revision=text, chat_template=text, lora=LoraRecipe(target=("q", text))),
            data=DataRecipe(train=(SourceRecipe(path=text, root_map=((text, "b"),), repeat_time=1e-7),)),
            optim=OptimRecipe(learning_rate=1e-22, eps=3e-9, max_steps=3, betas=(0, 0.5)),
            output=OutputRecipe(dir=text, trackers=("wandb", "tensorboard"), save_merged=True),
        )
        assert load(built.to_yaml()) == built
        plain = built.to_dict()
        assert plain == yaml.safe_load(yaml.safe_dump(plain))
        if text not in ("1e6", "0o17", "1e-6"):  # PyYAML does not quote these
            assert load(yaml.safe_dump(plain)) == built


def test_overrides_reach_every_depth(load: Callable[..., Recipe]) -> None:
    text = "model: {path: m, lora: {rank: 4}}\ndata: {train: a.jsonl}\noutput: {dir: out}\noptim: {seed: 3}\n"
    built = load(
        text, "model.lora.alpha=8", "optim.seed=5", "optim.seed=7", "precision=bf16", "loss.beta=0.2",
        "model.chat_template='a=b'", "reference.kind=precomputed", "optim.betas=[0.5, 0.6]",
    )  # fmt: skip
    assert built.model.lora == LoraRecipe(rank=4, alpha=8.0)
    assert (built.optim.seed, built.precision, built.loss.beta) == (7, "bf16", 0.2)
    assert built.model.chat_template == "a=b"
    assert built.optim.betas == (0.5, 0.6)
    assert load(SMALL, "model.lora.rank=2").model.lora == LoraRecipe(rank=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", r"unknown setting optim\.learning_rat; did you mean optim\.learning_rate\?"),
        ("optim.lr=1", r"unknown setting optim\.lr; did you mean optim\.learning_rate\?"),
        ("learning_rate=1", r"unknown setting learning_rate; did you mean optim\.learning_rate\?"),
        ("loss.micro_batch_size=1", r"unknown setting loss\.micro_batch_size; did you mean optim\.micro_batch_size"),
        ("optims.seed=1", r"unknown setting optims; did you mean optim\?"),
        ("zzz=1", r"unknown setting zzz; known settings: model, data, output, loss, .*precision"),
        ("model.lora.rnk=1", r"unknown setting model\.lora\.rnk; did you mean model\.lora\.rank\?"),
        (
            "data.train=[a, {path: b, rot: c}]",
            r"unknown setting data\.train\[1\]\.rot; did you mean data\.train\[1\]\.root\?",
        ),
        ("data.train=[{root: c}]", r"data\.train\[0\]\.path must be given"),
        ("data.train=[]", r"data\.train must not be empty, got \[\]"),
        ("optim.seed", r"an override must read KEY=VALUE, got 'optim\.seed'"),
        ("optim..seed=1", r"an override must read KEY=VALUE, got 'optim\.\.seed=1'"),
        ("optim.seed=[", r"optim\.seed must have a value in YAML, got '\['"),
        ("model.path.x=1", r"model\.path\.x must be in a section, but model\.path is 'm'"),
        ("optim.schedule=cosin", r"optim\.schedule must be 'cosine', 'linear', 'constant' or 'wsd', got 'cosin'"),
        ("model.freeze=[vision_towr]", r"model\.freeze must name .*got 'vision_towr'; did you mean 'vision_tower'\?"),
        ("loss.beta=0", r"loss\.beta must be positive and finite, got 0\.0"),
        ("reward_shift.per=optimizer_step", r"reward_shift\.update must be 'after' when per is 'optimizer_step'"),
        ("reward_shift.decay=1", r"reward_shift\.decay must be in \[0, 1\), got 1\.0"),
        ("data.train={path: a, repeat_time: 0}", r"data\.train\[0\]\.repeat_time must be positive .*, got 0$"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_named(load: Callable[..., Recipe], override: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"r\.yaml with .*: {message}"):
        load(SMALL, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=fast", r"optim\.learning_rate must be a number, got 'fast'"),
        ("optim.learning_rate=true", r"optim\.learning_rate must be a number, got True"),
        ("optim.batch_size=true", r"optim\.batch_size must be an integer, got True"),
        ("optim.batch_size=2.0", r"optim\.batch_size must be an integer, got 2\.0"),
        ("optim.max_steps=x", r"optim\.max_steps must be an integer, got 'x'"),
        ("data.skip_bad=1", r"data\.skip_bad must be true or false, got 1"),
        ("loss.shared_prefix=dense", r"loss\.shared_prefix must be true, false, 'padded' or 'masked', got 'dense'"),
        ("loss.shared_prefix=1", r"loss\.shared_prefix must be true, false, 'padded' or 'masked', got 1"),
        ("data.skip_bad=no", r"data\.skip_bad must be true or false, got 'no'"),
        ("model.path=3", r"model\.path must be a string, got 3: put it in quotes"),
        ("model.path=", r"model\.path must be a string, got None"),
        ("model.freeze=vision_tower", r"model\.freeze must be a list of strings, got 'vision_tower'"),
        ("model.freeze=[1]", r"model\.freeze\[0\] must be a string, got 1"),
        ("model.lora=3", r"model\.lora must be a section, got 3"),
        ("model.lora.target=3", r"model\.lora\.target must be a string or a list of strings, got 3"),
        ("model.lora.target=[q, 1]", r"model\.lora\.target\[1\] must be a string, got 1"),
        ("model.dtype=16", r"model\.dtype must be 'float32', .* or 'auto', got 16"),
        ("optim.betas=[0.9]", r"optim\.betas must be a list of 2 numbers, got \[0\.9\]"),
        ("optim.betas=0.9", r"optim\.betas must be a list of 2 numbers, got 0\.9"),
        ("data.train=3", r"data\.train must be a list of paths or sections, got 3"),
        ("data.train=[3]", r"data\.train\[0\] must be a path or a section, got 3"),
        ("data.train={path: a, root_map: {a: b}}", r"data\.train\[0\]\.root_map must be a list of lists of 2 strings"),
        ("optim=3", r"optim must be a section, got 3"),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_named(load: Callable[..., Recipe], override: str, message: str) -> None:
    with pytest.raises(TypeError, match=rf"r\.yaml with .*: {message}"):
        load(SMALL, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: a}\noutput: {dir: o}\n", r"r\.yaml: model\.path must be given"),
        ("model: {path: m}\ndata:\noutput: {dir: o}\n", r"r\.yaml: data\.train must be given"),
        ("model: [\n", r"r\.yaml: a recipe must be YAML: "),
        ("model: {path: a}\nmodel: {path: b}\n", r"a setting must be given once, got 'model' again"),
        ("optim:\n  seed: 1\n  seed: 2\n", r"a setting must be given once, got 'seed' again"),
        ("1: 2\n", r"r\.yaml: unknown setting 1; known settings"),
    ],
)
def test_files_that_are_not_recipes(load: Callable[..., Recipe], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(text)


def test_a_file_that_does_not_exist_or_is_not_a_mapping(load: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.yaml"):
        load_recipe(tmp_path / "gone.yaml")
    for text in ("", "- a\n", "text"):
        with pytest.raises(TypeError, match=r"r\.yaml: a recipe must be a mapping of sections, got"):
            load(text)
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xe9}\n")
    with pytest.raises(ValueError, match=r"latin\.yaml: a recipe must be YAML"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoraRecipe(rank=0), "rank must be at least 1, got 0"),
        (lambda: LoraRecipe(alpha=0), "alpha must be positive and finite, got 0$"),
        (lambda: LoraRecipe(dropout=1), r"dropout must be in \[0, 1\), got 1$"),
        (lambda: LoraRecipe(target=()), r"target must not be empty, got \(\)"),
        (lambda: ModelRecipe(path=""), "path must not be empty, got ''"),
        (lambda: ModelRecipe(path="m", attention=""), "attention must not be empty"),
        (lambda: ModelRecipe(path="m", freeze=("vision",)), "freeze must name parts among vision_tower, projector, "),
        (
            lambda: ModelRecipe(path="m", freeze=MODEL_PARTS),
            "freeze must leave something to train, got vision_",
        ),
        (
            lambda: ModelRecipe(path="m", freeze=("projector",), lora=LoraRecipe()),
            "freeze must be empty with lora, which freezes all but the adapters, got projector",
        ),
        (lambda: ModelRecipe(path="m", dtype="float16"), "dtype must be 'float32' .* got 'float16': the loss scaler"),
        (lambda: SourceRecipe(path="a", repeat_time=float("nan")), "repeat_time must be positive and finite, got nan"),
        (lambda: DataRecipe(train=()), r"train must not be empty, got \(\)"),
        (lambda: DataRecipe(train="a", max_length=1), "max_length must be at least 2, got 1"),  # type: ignore[arg-type]
        (lambda: DataRecipe(train="a", workers=-1), "workers must be at least 0, got -1"),  # type: ignore[arg-type]
        (lambda: LossRecipe(dpo_weight=0, bco_weight=0, ntp_weight=0), "dpo_weight, bco_weight or ntp_weight must be"),
        (lambda: LossRecipe(ntp_weight=-1), "ntp_weight must be finite and not negative, got -1.0"),
        (lambda: LossRecipe(memory_budget_mib=0), "memory_budget_mib must be at least 1, got 0"),
        (lambda: LossRecipe(from_logits=True, memory_budget_mib=8), "memory_budget_mib must be None with from_logits"),
        (lambda: LossRecipe(from_logits=True, recompute=False), "recompute must be None with from_logits"),
        (lambda: LossRecipe(backend="gpu"), "backend must be 'cpu', 'cuda', 'triton' or 'reference', got 'gpu'"),
        (lambda: RewardShiftRecipe(per="optimizer_step"), "update must be 'after' when per is 'optimizer_step'"),
        (lambda: ReferenceRecipe(sync_every=-1), "sync_every must be at least 0, got -1"),
        (lambda: ReferenceRecipe(sync_mix=0), r"sync_mix must be in \(0, 1\], got 0$"),
        (lambda: ReferenceRecipe(kind="adapter", path="n"), "path must be None for kind 'adapter'.* got 'n'"),
        (lambda: ReferenceRecipe(file="f"), "file must be None unless kind is 'precomputed', got 'f' with None"),
        (lambda: OptimRecipe(learning_rate=float("inf")), "learning_rate must be finite and not negative, got inf"),
        (
            lambda: OptimRecipe(batch_size=3, micro_batch_size=4),
            "batch_size must be at least micro_batch_size 4, got 3",
        ),
        (
            lambda: RewardShiftRecipe(decay=0.9),
            "decay must be left out unless mode is 'ema', got 0.9 with 'cumulative'",
        ),
        (lambda: OptimRecipe(micro_batch_size=0), "micro_batch_size must be at least 1, got 0"),
        (lambda: OptimRecipe(micro_batch_tokens=0), "micro_batch_tokens must be at least 1, got 0"),
        (
            lambda: OptimRecipe(micro_batch_size=2, micro_batch_tokens=4096),
            "micro_batch_tokens must be None with micro_batch_size 2, got 4096: one of them sets the size",
        ),
        (
            lambda: ModelRecipe(path="m", chat_template=" "),
            "chat_template must be the text of a chat template, got ' '",
        ),
        *(
            (lambda name=name: ModelRecipe(path="m", chat_template_kwargs={name: 1}), f"{rule}, got '{name}'")
            for rule, names in (
                ("chat_template_kwargs must have names of Jinja variables", ("enable-thinking", "", "a b", "not")),
                (
                    "chat_template_kwargs must hold variables of the chat template alone",
                    ("tools", "documents", "messages", "tokenize"),
                ),
                ("chat_template_kwargs must have names of Jinja variables", ("loop", "raise_exception", "True")),
            )
            for name in names
        ),
        (
            lambda: ModelRecipe(path="m", chat_template_kwargs={"x": [math.nan]}),
            r"chat_template_kwargs.x\[0\] must be finite, got nan",
        ),
        (lambda: OptimRecipe(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: OptimRecipe(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: OptimRecipe(betas=(0.9, 1)), r"betas must be in \[0, 1\), got \(0.9, 1\)"),
        (lambda: OptimRecipe(eps=0), "eps must be positive and finite, got 0$"),
        (lambda: OptimRecipe(weight_decay=-1), "weight_decay must be finite and not negative"),
        (lambda: OptimRecipe(warmup_ratio=1), r"warmup_ratio must be in \[0, 1\), got 1$"),
        (lambda: OptimRecipe(max_grad_norm=-1), "max_grad_norm must be finite and not negative"),
        (lambda: OptimRecipe(seed=-1), "seed must be at least 0, got -1"),
        (lambda: OutputRecipe(dir=""), "dir must not be empty, got ''"),
        (lambda: OutputRecipe(dir="o", resume=""), "resume must not be empty"),
        (lambda: OutputRecipe(dir="o", keep_last=0), "keep_last must be at least 1, got 0"),
        (lambda: OutputRecipe(dir="o", log_every=0), "log_every must be at least 1, got 0"),
        (lambda: OutputRecipe(dir="o", save_every=-1), "save_every must be at least 0, got -1"),
        (lambda: OutputRecipe(dir="o", trackers=("",)), r"trackers must not hold an empty name, got \('',\)"),
        (
            lambda: small(reference=ReferenceRecipe(kind="adapter")),
            "reference.kind must be 'copy' or 'precomputed' without model.lora, got 'adapter'",
        ),
        (
            lambda: small(model=ModelRecipe(path="m", lora=LoraRecipe()), reference=ReferenceRecipe(path="n")),
            "reference.kind must be 'copy' or 'precomputed' with reference.path, got None",
        ),
        (
            lambda: small(reference=ReferenceRecipe(kind="precomputed", sync_every=5)),
            "reference.sync_every must be 0 unless the reference is a 'copy', got 5 with 'precomputed'",
        ),
        (
            lambda: small(model=ModelRecipe(path="m", lora=LoraRecipe()), reference=ReferenceRecipe(sync_every=5)),
            "reference.sync_every must be 0 unless the reference is a 'copy', got 5 with 'adapter'",
        ),
        (
            lambda: small(loss=LossRecipe(dpo_weight=0, bco_weight=0), reference=ReferenceRecipe(sync_every=5)),
            "reference.sync_every must be 0 .* got 5 with none, since the loss needs none",
        ),
        (
            lambda: small(
                model=ModelRecipe(path="m", lora=LoraRecipe()),
                reference=ReferenceRecipe(kind="copy", path="n", sync_every=5),
            ),
            "reference.sync_every must be 0 with model.lora and reference.path, .* got 5 with 'n'",
        ),
        (
            lambda: small(output=OutputRecipe(dir="o", keep_best=True)),
            "output.keep_best must be False without data.eval, got True",
        ),
        (
            lambda: small(output=OutputRecipe(dir="o", eval_every=10)),
            "output.eval_every must be 0 without data.eval, got 10",
        ),
        (
            lambda: small(
                data=DataRecipe(train=("a",), eval=("b",)),  # type: ignore[arg-type]
                output=OutputRecipe(dir="o", keep_best=True),
                loss=LossRecipe(dpo_weight=0, bco_weight=0),
            ),
            "output.best_metric must be 'loss' with keep_best if the loss has no preference term",
        ),
        (
            lambda: small(output=OutputRecipe(dir="o", save_merged=True)),
            "output.save_merged must be False without model.lora, got True",
        ),
    ],
)
def test_rules_hold_for_recipes_built_in_python(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_similar_but_valid_recipes_are_allowed() -> None:
    assert ModelRecipe(path="m", dtype="float16", lora=LoraRecipe()).dtype == "float16"
    assert small(reference=ReferenceRecipe(sync_every=5)).reference_kind == "copy"
    lora = ModelRecipe(path="m", lora=LoraRecipe())
    assert small(model=lora, reference=ReferenceRecipe(kind="copy", sync_every=5)).reference_kind == "copy"
    assert small(reference=ReferenceRecipe(path="n", sync_every=5)).reference_kind == "copy"
    evaluated = DataRecipe(train=("a",), eval=("b",))  # type: ignore[arg-type]
    assert small(data=evaluated, output=OutputRecipe(dir="o", keep_best=True, eval_every=1)).output.keep_best
    assert small(loss=LossRecipe(dpo_weight=0, bco_weight=0)).reference_kind is None
    assert OptimRecipe(batch_size=4, micro_batch_size=4, learning_rate=0, warmup_ratio=0).learning_rate == 0.0


def test_python_values_take_the_types_of_their_fields() -> None:
    built = ModelRecipe(path="m", freeze=["projector"])  # type: ignore[arg-type]
    assert built.freeze == ("projector",)
    assert hash(built) == hash(ModelRecipe(path="m", freeze=("projector",)))
    assert type(OptimRecipe(weight_decay=0).weight_decay) is float
    with pytest.raises(TypeError, match=r"^seed must be an integer, got '1'"):
        OptimRecipe(seed="1")  # type: ignore[arg-type]


def test_a_missing_yaml_names_the_extra(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Recipe]) -> None:
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    with pytest.raises(ImportError, match=r"recipes need ruamel.yaml: install the extra 'train' of mpo-ext"):
        load()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_can_be_loaded(path: Path) -> None:
    built = load_recipe(path)
    assert built.loss.config == MPOConfig()
    assert built.model.dtype == "float32" or built.model.lora is not None
    assert str(Path(path).name) in path.read_text()  # the command that checks it


def test_the_recipes_have_the_authors_hyperparameters() -> None:
    built = {path.stem: load_recipe(path) for path in RECIPES}
    assert set(built) == {
        "internvl2.5-8b", "internvl3-1b", "internvl3-8b", "qwen2.5-vl-7b", "qwen2.5-vl-7b-lora", "smollm2-135m",
        *RECENT,
    }  # fmt: skip
    expected = {"internvl2.5-8b": (1e-6, 8192), "internvl3-1b": (2e-7, 12288), "internvl3-8b": (2e-7, 12288)}
    for name, (rate, length) in expected.items():
        one = built[name]
        assert (one.optim, one.data.max_length) == (OptimRecipe(learning_rate=rate), length)
        assert (one.loss.average_over, one.precision, one.model.freeze) == ("micro_batch", "bf16", ())
        assert one.reward_shift == RewardShiftRecipe()
    for name in RECENT:  # internvl_chat_gpt_oss/shell/internvl3_5_qwen3
        one = built[name]
        assert (one.optim, one.data.max_length) == (OptimRecipe(learning_rate=2e-7, seed=42), 16384)
        assert (one.loss.average_over, one.precision, one.model.freeze) == ("micro_batch", "bf16", ())
        assert one.loss.router_aux_loss_coef is None
        assert one.model.gradient_checkpointing
        assert not one.model.trust_remote_code
    assert built["qwen2.5-vl-7b-lora"].reference_kind == "adapter"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Replaces the trainer by a function that only records its recipe. Returns the list of recorded recipes."""
    calls: list[Recipe] = []
    monkeypatch.setattr("mpo_ext.train.preflight.check_needs", lambda recipe: None)  # no such data, no such model
    loop = types.ModuleType("mpo_ext.train.loop")
    loop.train = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpo_ext.train.loop", loop)
    return calls


@pytest.mark.parametrize("run", [lambda args: main(["train", *args]), module_main.main], ids=["mpo-ext", "python -m"])
def test_the_commands_train(trained: list[Recipe], tmp_path: Path, run: Callable[[list[str]], int]) -> None:
    (tmp_path / "r.yaml").write_text(SMALL)
    assert run([str(tmp_path / "r.yaml"), "optim.seed=5", "--debug", "optim.epochs=2"]) == 0
    assert trained == [load_recipe(tmp_path / "r.yaml", ["optim.seed=5", "optim.epochs=2"])]
    assert trained[0].optim.epochs == 2


def test_the_exit_status_is_that_of_the_trainer(
    trained: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(SMALL)
    monkeypatch.setattr(sys.modules["mpo_ext.train.loop"], "train", lambda recipe: 143)
    assert main(["train", str(tmp_path / "r.yaml")]) == 143


@pytest.mark.parametrize(
    "error",
    [ValueError("a\n  b"), TypeError("a b"), OSError("a b"), RuntimeError("a b"), FloatingPointError("a b")],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_one_line_and_a_traceback_on_demand(
    trained: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:  # fmt: skip
    def fail(recipe: Recipe) -> int:
        raise error

    (tmp_path / "r.yaml").write_text(SMALL)
    monkeypatch.setattr(sys.modules["mpo_ext.train.loop"], "train", fail)
    assert main(["train", str(tmp_path / "r.yaml")]) in (1, 2)
    assert capsys.readouterr().err == "mpo-ext train: a b\n"
    with pytest.raises(type(error)):
        main(["train", str(tmp_path / "r.yaml"), "--debug"])


def test_missing_packages_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_accelerate(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "accelerate" or name == "mpo_ext.train.loop":
            raise ModuleNotFoundError("No module named 'accelerate'")
        return real(name, *args, **kwargs)

    (tmp_path / "r.yaml").write_text(SMALL)
    monkeypatch.setattr("mpo_ext.train.preflight.check_needs", lambda recipe: None)
    monkeypatch.setattr(builtins, "__import__", without_accelerate)
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    assert capsys.readouterr().err == (f"mpo-ext train: No module named 'accelerate': {install_hint('train')}\n")


def test_a_wrong_recipe_has_the_status_of_wrong_arguments(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(SMALL)
    for arguments in (["none.yaml"], [str(tmp_path / "r.yaml"), "optim.epochs=0"]):
        for command in ("train", "plan"):
            assert main([command, *arguments]) == 2
            error = capsys.readouterr().err
            assert "none.yaml" in error or "optim.epochs must be at least 1, got 0" in error
    with pytest.raises(ValueError, match=r"optim\.epochs must be"):
        main(["train", str(tmp_path / "r.yaml"), "optim.epochs=0", "--debug"])
    assert trained == []


def test_no_evaluation_is_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SMALL)
    assert load_recipe(tmp_path / "r.yaml", ["data.eval=null"]).data.eval == ()
    with pytest.raises(ValueError, match=r"data\.train must not be empty"):
        load_recipe(tmp_path / "r.yaml", ["data.train=null"])


def test_words_that_are_not_settings_are_rejected(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(SMALL)
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "r.yaml"), "--debug", "seed"])
    assert "unrecognized arguments: seed" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "r.yaml"), "--world", "2"]) == 2
    assert "--world must come with --dry-run, got 2" in capsys.readouterr().err
    assert trained == []


def test_the_package_and_its_extras_are_installed() -> None:
    text = (RECIPES[0].parents[1] / "pyproject.toml").read_text()
    packaged = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert packaged is not None
    assert '"mpo_ext.train"' in packaged[1]
    for extra, package in (
        ("train", "pydantic>="),
        ("train", "ruamel.yaml>="),
        ("train", "rich>="),
        ("lora", "peft>="),
    ):
        assert re.search(rf'^{extra} = \[.*"{package}', text, re.MULTILINE), extra


def alias_bomb(levels: int) -> str:
    """Returns a short YAML text whose aliases expand to more than ``9 ** levels`` values."""
    parts = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    parts += [f"&a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    return f"[{', '.join(parts)}]"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"data: {{train: {alias_bomb(9)}}}", "aliases must expand to at most 1,000,000 values"),
        (f"data: {{train: a.jsonl}}\nmore: {alias_bomb(30)}", "aliases must expand to at most 1,000,000 values"),
        (
            f"data: {{train: a.jsonl}}\nmore: {alias_bomb(100)}",
            "must expand|must be at most 50 deep|nested at most 50 deep",
        ),
        ("data: {train: &a [*a]}", "must not contain themselves through an alias"),
        ("data: &a {train: *a}", "must not contain themselves through an alias"),
        (f"data: {{train: {'[' * 60}{']' * 60}}}", "must be at most 50 deep"),
        (f"data: {{train: {'[' * 5000}{']' * 5000}}}", "must be nested at most 50 deep"),
    ],
)
def test_hostile_yaml_is_refused_soon(setting: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{path: m}}\noutput: {{dir: o}}\n{setting}\n")
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")
    assert time.process_time() - start < 10
    (tmp_path / "r.yaml").write_text("model: {path: m}\noutput: {dir: o}\ndata: {train: a.jsonl}\n")
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml", [f"model.chat_template_kwargs={{{setting.splitlines()[-1]}}}"])


def test_aliases_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {path: &m m}\noutput: {dir: o}\ndata: &d {train: a.jsonl}\nreference: {path: *m}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").reference.path == "m"


def test_an_override_changes_only_the_named_place_of_an_alias(load: Callable[..., Recipe]) -> None:
    text = "model: {path: m}\noutput: {dir: o}\ndata: {train: &data {path: a.jsonl, root: r}, eval: *data}\n"
    data = load(text, "data.eval.path=test.jsonl").data
    assert [data.train[0].path, data.eval[0].path, data.eval[0].root] == ["a.jsonl", "test.jsonl", "r"]
    groups = "optim: {groups: {vision_tower: &rate {learning_rate: 1e-6}, projector: *rate}}\n"
    override = "optim.groups.projector.learning_rate=5e-6"
    as_override = groups.strip().replace("optim: ", "optim=")
    for changed in (load(SMALL + groups, override), load(SMALL, as_override, override)):
        rates = {part: group.learning_rate for part, group in changed.optim.groups.items()}
        assert rates == {"vision_tower": 1e-6, "projector": 5e-6}
