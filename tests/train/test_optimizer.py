"""Tests a recipe's optimizers: updates, learning rates of parts of the model, schedules, and resuming."""

import types
from pathlib import Path
from typing import Any

import digits_run
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor, get_scheduler

from mpo_ext.plan.memory import MemoryEstimate
from mpo_ext.train.loop import Trainer, train
from mpo_ext.train.optim_recipe import OptimRecipe
from mpo_ext.train.optimizer import clip_gradients, make_optimizer, parameter_groups, scheduled_learning_rate
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.zero import check_zero_stage

ONE_PROCESS = types.SimpleNamespace(distributed_type="NO", device=torch.device("cpu"))


def optimizer(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    recipe = OptimRecipe(**settings)
    return make_optimizer(parameter_groups(model, recipe), recipe, model, ONE_PROCESS)


def with_gradients(seed: int = 1) -> nn.Module:
    model, _ = digits_run.tiny()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def steps(model: nn.Module, made: torch.optim.Optimizer, count: int = 3) -> dict[str, torch.Tensor]:
    """Calls ``made.step()`` with the same gradients, ``count`` times. Returns the parameters by name."""
    for _ in range(count):
        made.step()
    return digits_run.weights(model)


def one_by_one(model: nn.Module, make: Any) -> dict[str, torch.Tensor]:
    """Runs three steps with a separate optimizer for each parameter. Returns the parameters by name.

    ``make(name, parameter)`` returns the optimizer.
    """
    for name, parameter in model.named_parameters():
        made = make(name, parameter)
        for _ in range(3):
            made.step()
    return digits_run.weights(model)


def assert_equal(measured: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            measured[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_muon_updates_matrices_of_hidden_layers_and_adamw_all_others() -> None:
    model, twin = with_gradients(), with_gradients()
    outer = [id(twin.get_output_embeddings().weight)]  # type: ignore[operator]
    outer += [id(module.weight) for module in twin.modules() if isinstance(module, nn.Embedding)]

    def plain(name: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
        if parameter.ndim == 2 and id(parameter) not in outer:
            return torch.optim.Muon([parameter], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", ns_steps=4)
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        return torch.optim.AdamW([parameter], lr=1e-2, weight_decay=decay, betas=(0.8, 0.9), eps=1e-6)

    made = optimizer(
        model, name="muon", learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, args={"ns_steps": 4}
    )
    assert_equal(steps(model, made), one_by_one(twin, plain))


def test_adafactor_has_the_given_rate() -> None:
    model, twin = with_gradients(), with_gradients()

    def plain(name: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        return Adafactor(
            [parameter], lr=1e-2, weight_decay=decay, scale_parameter=False, relative_step=False, beta1=0.5
        )

    made = optimizer(model, name="adafactor", learning_rate=1e-2, weight_decay=0.1, args={"beta1": 0.5})
    assert_equal(steps(model, made), one_by_one(twin, plain))


def test_an_import_path_names_any_optimizer() -> None:
    model, twin = with_gradients(), with_gradients()

    def plain(name: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
        decay = 0.05 if parameter.ndim >= 2 else 0.0
        return torch.optim.SGD([parameter], lr=1e-2, momentum=0.5, weight_decay=decay)

    made = optimizer(model, name="torch.optim.SGD", learning_rate=1e-2, args={"momentum": 0.5})
    assert_equal(steps(model, made), one_by_one(twin, plain))


def test_eight_bits_hold_the_moments_of_all_but_embeddings() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra qlora, which dev installs")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    made = optimizer(model, name="adamw_8bit", learning_rate=1e-2)
    assert isinstance(made, bitsandbytes.optim.AdamW8bit)
    made.step()
    matrices = model.get_input_embeddings().weight, model.model.layers[0].self_attn.q_proj.weight
    assert [made.state[matrix]["state1"].dtype for matrix in matrices] == [torch.float32, torch.uint8]


def test_parts_have_their_own_rates_and_decay() -> None:
    model, twin = with_gradients(), with_gradients()
    own = {"vision_tower": (1e-3, 0.05), "multi_modal_projector": (1e-2, 0.0)}

    def plain(name: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
        rate, decay = next((own[part] for part in own if part in name), (1e-4, 0.05))
        return torch.optim.AdamW([parameter], lr=rate, weight_decay=decay if parameter.ndim >= 2 else 0.0, fused=True)

    recipe = OptimRecipe(
        learning_rate=1e-4,
        groups={"vision_tower": {"learning_rate": 1e-3}, "projector": {"learning_rate": 1e-2, "weight_decay": 0}},
    )
    groups = parameter_groups(model, recipe)
    made = make_optimizer(groups, recipe, model, ONE_PROCESS)
    for described, group in zip(made.param_groups, groups, strict=True):
        described["lr"] = group.learning_rate
    assert_equal(steps(model, made), one_by_one(twin, plain))


@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
def test_a_rate_of_zero_keeps_a_part_as_it_is(tmp_path: Path, part: str) -> None:
    model, processor = digits_run.tiny()
    before = digits_run.weights(model)
    pairs = digits_run.write_pairs(tmp_path / "data", 16)
    log: list[dict[str, float]] = []
    recipe = digits_run.recipe(
        tmp_path / "out", pairs, optim__groups={part: {"learning_rate": 0.0}}, optim__warmup_ratio=0.0
    )
    Trainer(recipe, model=model, processor=processor, save=False, on_step=lambda _, line: log.append(dict(line))).run()
    prefixes = {"vision_tower": "vision_tower", "projector": "multi_modal_projector"}
    fixed = [
        name
        for name in before
        if prefixes.get(part, "") in name
        and (part in prefixes or not any(other in name for other in prefixes.values()))
    ]
    after = digits_run.weights(model)
    assert fixed
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in fixed), name
    assert [line[f"learning_rate_{part}"] for line in log] == [0.0] * len(log)
    assert all(line["learning_rate"] > 0 for line in log)


@pytest.mark.parametrize(
    ("settings", "name", "options"),
    [
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "min_lr_ratio": 0.2}, "cosine_with_min_lr", {"min_lr_rate": 0.2}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        (
            {"schedule": "wsd", "decay_ratio": 0.25, "min_lr_ratio": 0.1},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "min_lr_ratio": 0.1, "decay_type": "linear"},
        ),
    ],
)
def test_the_schedules_are_those_of_transformers(settings: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    recipe = OptimRecipe(learning_rate=1e-3, warmup_ratio=0.1, **settings)
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, made, num_warmup_steps=4, num_training_steps=40, scheduler_specific_kwargs=options)
    for step in range(40):
        rate = scheduled_learning_rate(recipe, 1e-3, step, 40)
        if step >= 4 or name != "warmup_stable_decay":  # whose warmup begins at the minimum instead of 0
            assert rate == pytest.approx(made.param_groups[0]["lr"], rel=1e-12)
        made.step()
        theirs.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "adamw_8bit", "torch.optim.AdamW"])
def test_the_dry_run_knows_the_size_of_the_state(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora, which dev installs")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    made = optimizer(model, name=name)
    made.step()
    state = [value for entries in made.state.values() for value in entries.values() if isinstance(value, torch.Tensor)]
    maps = {value.data_ptr(): value for value in state}.values()  # 8-bit states share their maps of values
    recipe = Recipe(
        model={"path": "m"}, data={"train": ["a"]}, output={"dir": "o"}, optim={"name": name}, loss={"beta": 0.1}
    )
    parts = {part.name: part.bytes for part in MemoryEstimate(recipe, model, "shared", 1).parts()}
    assert parts["optimizer state"] == pytest.approx(sum(value.nbytes for value in maps), rel=0.02)


class StoppedRun(Exception):  # noqa: N818 - no error of the program
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "muon", "groups": {"projector": {"learning_rate": 1e-2}}},
        {"name": "adafactor"},
        {"name": "torch.optim.SGD", "args": {"momentum": 0.9}},
        {"name": "adamw_8bit"},
        {
            "schedule": "wsd",
            "decay_ratio": 0.5,
            "min_lr_ratio": 0.1,
            "groups": {"vision_tower": {"weight_decay": 0.0}},
        },
    ],
    ids=lambda settings: settings.get("name", "groups"),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    if settings.get("name") == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora, which dev installs")
    pairs = digits_run.write_pairs(tmp_path / "data", 32)
    options = {f"optim__{name}": value for name, value in settings.items()} | {"output__save_every": 2}

    def stop(step: int, line: Any) -> None:
        if step == 3:
            raise StoppedRun

    ends = []
    for name in ("whole", "stopped"):
        recipe = digits_run.recipe(tmp_path / name, pairs, **options)
        if name == "stopped":
            with pytest.raises(StoppedRun):
                train(recipe, model=digits_run.tiny(dtype=dtype)[0], processor=digits_run.tiny()[1], on_step=stop)
        model, processor = digits_run.tiny(dtype=dtype)
        seen: list[int] = []
        train(recipe, model=model, processor=processor, on_step=lambda step, _, seen=seen: seen.append(step))
        assert seen == ([1, 2, 3, 4] if name == "whole" else [3, 4])
        ends.append(digits_run.weights(model))
    assert_equal(ends[1], ends[0])


def test_a_schedule_without_stable_steps_reaches_the_maximum() -> None:
    recipe = OptimRecipe(learning_rate=1.0, schedule="wsd", warmup_ratio=0.25, decay_ratio=0.75)
    rates = [scheduled_learning_rate(recipe, 1.0, step, 10) for step in range(10)]
    assert rates == pytest.approx([0, 1 / 3, 2 / 3, *((10 - step) / 7 for step in range(3, 10))])


@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.5])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_each_run_has_a_step_that_trains(schedule: Any, warmup_ratio: float, min_lr_ratio: float) -> None:
    minimum = 0.0 if schedule == "constant" else min_lr_ratio
    decay = 0.01 if schedule == "wsd" else 0.1
    recipe = OptimRecipe(schedule=schedule, warmup_ratio=warmup_ratio, min_lr_ratio=minimum, decay_ratio=decay)
    for total in range(1, 40):
        rates = [scheduled_learning_rate(recipe, 1.0, step, total) for step in range(total)]
        assert max(rates) == 1.0, (total, rates)
    assert scheduled_learning_rate(recipe, 1.0, 0, 1) == 1.0


def test_a_run_of_a_single_step_trains(tmp_path: Path) -> None:
    model, processor = digits_run.tiny()
    before, pairs = digits_run.weights(model), digits_run.write_pairs(tmp_path / "data", 8)
    assert train(digits_run.recipe(tmp_path / "out", pairs, optim__max_steps=1), model=model, processor=processor) == 0
    after = digits_run.weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_weight_decay_that_the_optimizer_does_not_have_is_refused() -> None:
    model = digits_run.tiny()[0]
    with pytest.raises(
        ValueError, match=r"optim.weight_decay must be 0 with torch.optim.Rprop, which has none, got 0.05"
    ):
        optimizer(model, name="torch.optim.Rprop")
    optimizer(model, name="torch.optim.Rprop", weight_decay=0.0)


def test_settings_of_accelerate_do_not_scale_the_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = digits_run.write_pairs(tmp_path / "data", 8)
    settings: dict[str, Any] = {"optim__name": "torch.optim.SGD", "optim__max_steps": 1, "optim__max_grad_norm": 0}
    results = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        model, processor = digits_run.tiny()
        recipe = digits_run.recipe(tmp_path / steps, pairs, **settings)
        assert train(recipe, model=model, processor=processor) == 0
        results.append(digits_run.weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "torch.optim.adamw.AdamW"])
def test_betas_of_an_imported_optimizer_are_in_args(name: str) -> None:
    made = optimizer(digits_run.tiny()[0], name=name, args={"betas": (0.8, 0.9), "eps": 1e-5})
    assert made.defaults["betas"] == (0.8, 0.9)
    assert made.defaults["eps"] == 1e-5
    with pytest.raises(ValueError, match=f"betas and eps must be the defaults with {name}, which does not read them"):
        OptimRecipe(name=name, betas=(0.8, 0.9))
    with pytest.raises(ValueError, match="args must not hold a setting of optim, got betas"):
        OptimRecipe(args={"betas": (0.8, 0.9)})


def test_deepspeed_must_report_the_gradient_norm() -> None:
    plugin = types.SimpleNamespace(deepspeed_config={"train_batch_size": 1})
    accelerator = types.SimpleNamespace(
        distributed_type="DEEPSPEED",
        state=types.SimpleNamespace(deepspeed_plugin=plugin),
        clip_grad_norm_=lambda parameters, norm: None,
    )
    with pytest.raises(ValueError, match=r"zero_optimization\.stage of DeepSpeed must be 1, 2 or 3, got 0"):
        check_zero_stage(accelerator)
    plugin.deepspeed_config["zero_optimization"] = {"stage": 1}  # type: ignore[assignment]
    check_zero_stage(accelerator)
    model = nn.Linear(2, 2)
    model.get_global_grad_norm = lambda: 3.0  # type: ignore[assignment]
    assert clip_gradients(accelerator, model, 1.0) == 3.0
    model.get_global_grad_norm = lambda: None  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="the gradient norm must be computed, got None from DeepSpeed"):
        clip_gradients(accelerator, model, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "adamm"},
            r"name must be one of adamw, .*, or the import path of a class, got 'adamm'; did you",
        ),
        ({"groups": {"tower": {}}}, r"groups must name parts among vision_tower, .*, got 'tower'"),
        (
            {"groups": {"projector": {"lr": 1.0}}},
            r"groups\.projector\.lr; did you mean .*groups\.projector\.learning_rate\?",
        ),
        ({"groups": {"projector": {"learning_rate": -1.0}}}, r"groups\.projector\.learning_rate must be finite"),
        ({"args": {"lr": 1.0}}, "args must not hold a setting of optim, got lr"),
        ({"name": "adafactor", "eps": 1e-6}, "betas and eps must be the defaults with adafactor"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio must be 0 with schedule 'constant', got 0.1"),
        ({"decay_ratio": 0.2}, "decay_ratio must be 0.1 unless schedule is 'wsd', got 0.2"),
        ({"schedule": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "must be at most 1 together"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimRecipe(**settings)


def test_what_cannot_train_is_refused() -> None:
    model, _ = digits_run.tiny()
    with pytest.raises(ValueError, match=r"import path of a class, got 'torch\.optim\.Sgd', .*; did you mean 'SGD'\?"):
        optimizer(model, name="torch.optim.Sgd")
    with pytest.raises(ValueError, match=r"import path of a class, got 'no_such\.Sgd': No module named 'no_such'"):
        optimizer(model, name="no_such.Sgd")
    with pytest.raises(TypeError, match=r"optim\.args must be arguments of adamw, got \{'rate': 1\}"):
        optimizer(model, args={"rate": 1})
    with pytest.raises(TypeError, match=r"optim\.name must be a torch\.optim\.Optimizer, got builtins\.dict"):
        optimizer(model, name="builtins.dict")
    model.model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parts that are trained, got 'vision_tower', which is frozen"):
        optimizer(model, groups={"vision_tower": {}})
    text = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"parts that the model has, got 'projector', not found in LlamaForCausalLM"):
        optimizer(text, groups={"projector": {}})
    assert [group.part for group in parameter_groups(text, OptimRecipe(groups={"language_model": {}}))] == [
        "language_model",
        "language_model",
    ]
    for sharding, name in (("DEEPSPEED", "muon"), ("FSDP", "adafactor"), ("FSDP", "adamw_8bit")):
        ranks = types.SimpleNamespace(distributed_type=sharding, device=torch.device("cpu"))
        recipe = OptimRecipe(name=name)
        with pytest.raises(ValueError, match=f"shards of parameters under {sharding}, got '{name}'"):
            make_optimizer([], recipe, model, ranks)


def test_the_fused_update_of_a_cpu_is_that_of_adamw() -> None:
    model, twin = with_gradients(), with_gradients()
    made = optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    assert made.defaults["fused"]
    fused = steps(model, made)
    plain = steps(twin, optimizer(twin, learning_rate=1e-2, weight_decay=0.1, args={"fused": False}))
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-7)


def test_vectors_have_no_weight_decay_even_if_zero3_has_emptied_them() -> None:
    """ZeRO-3 replaces each parameter by an empty vector."""
    model, _ = digits_run.tiny()
    shapes = {}
    for parameter in model.parameters():
        shapes[id(parameter)] = parameter.ds_shape = parameter.shape  # the mark of DeepSpeed
        parameter.data = torch.empty(0)
    decay = {True: 0.5, False: 0.0}
    for group in parameter_groups(model, OptimRecipe(weight_decay=0.5)):
        assert {decay[len(shapes[id(parameter)]) >= 2] for parameter in group.parameters} == {group.weight_decay}
