"""Tests TR-DPO, whose reference follows the policy: resumed runs, runs on two ranks, and comparisons with plain.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits_run
import pytest
import test_exactness as exactness
import torch
import transformers
from accelerate import Accelerator, DistributedType
from digits_run import tiny
from run_recipe import TIMING, Job, log_of, result_of, run, text_of
from safetensors.torch import load_file
from test_exactness import TOLERANCE, assert_equal
from test_trainer import TEXT, text_pairs, text_tokenizer
from torch import Tensor, nn

from mpo_ext.plan import planner as plans
from mpo_ext.train import model_card as card
from mpo_ext.train import reference_model as references
from mpo_ext.train.loop import Trainer
from mpo_ext.train.recipe import LossRecipe, Recipe

SYNC = {"reference__sync_every": 2, "reference__sync_mix": 0.6}
HARD = {"reference__sync_every": 2, "reference__sync_mix": 1.0}
STEPS = 7  # the last sees the third move


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> exactness.Data:
    return exactness.make_data(tmp_path_factory.mktemp("pairs"), 10, text_only=2)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "write_card", lambda *args, **values: None)  # draws, which takes longer than a run


# Against the plain script.


CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "MPO": (SYNC, torch.float32),
    "hard update": ({**HARD, "optim__micro_batch_size": 8}, torch.float64),
    "from logits": (
        {"reference__sync_every": 3, "reference__sync_mix": 0.3, "loss__from_logits": True},
        torch.float64,
    ),
    # whose log-probs are float32
    "loss.preference": ({**SYNC, "loss__preference": "sigmoid", "loss__bco_weight": 0}, torch.float32),
}


@pytest.fixture(scope="module")
def script_of(data: exactness.Data) -> Callable[[dict[str, Any]], exactness.Run]:
    """Returns a function that runs plain.py with overrides of a recipe. Results are cached."""
    kept: dict[str, exactness.Run] = {}

    def script_of(overrides: dict[str, Any]) -> exactness.Run:
        name = str(overrides)
        if name not in kept:
            kept[name] = exactness.run_script(data, overrides, steps=STEPS)
        return kept[name]

    return script_of


@pytest.mark.parametrize("name", CASES)
def test_a_moving_reference_agrees_with_the_script(
    name: str,
    data: exactness.Data,
    script_of: Callable[[dict[str, Any]], exactness.Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides, dtype = CASES[name]
    script = script_of(overrides)
    if "loss__preference" in overrides:  # whose lines have none of these
        gone = ("entropy", "top1", "reward_shift", "bco_loss")
        lines = [{key: line[key] for key in line if key not in gone} for line in script.lines]
        script = exactness.Run(lines, script.weights)
    trained = exactness.run_trainer(tmp_path / "run", data, overrides, steps=STEPS, dtype=dtype)
    assert_equal(trained, script, TOLERANCE[dtype])


def test_what_is_compared_depends_on_the_moves(script_of: Callable[[dict[str, Any]], exactness.Run]) -> None:
    moving, still = script_of(SYNC), script_of({})
    for step, (line, other) in enumerate(zip(moving.lines, still.lines, strict=True), start=1):
        assert (abs(line["chosen_reward"] - other["chosen_reward"]) > 1e-3) == (step > 2), step


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(
    ("other", "tolerance"),
    [
        ({}, 1e-6),  # policy and reference go through functions that may split their rows in other ways
        ({"loss__preference": "sigmoid", "loss__bco_weight": 0}, 0.0),
    ],
    ids=["MPO", "loss.preference"],
)
def test_after_a_hard_update_rewards_are_0(
    tmp_path: Path, data: exactness.Data, other: dict[str, Any], tolerance: float
) -> None:
    lines: list[dict[str, float]] = []
    run_here(
        digits_run.recipe(
            tmp_path / "run", data.path, **HARD, optim__max_steps=6, optim__epochs=3, optim__learning_rate=1e-2,
            optim__warmup_ratio=0, output__save_every=0, **other,
        ),
        lines,
    )  # fmt: skip
    for line in lines:
        rewards = [line[name] for name in ("chosen_reward", "rejected_reward", "reward_margin")]
        is_zero = all(abs(reward) <= tolerance for reward in rewards)
        assert is_zero == (line["step"] % 2 == 1), (line["step"], rewards)


def run_here(recipe: Recipe, lines: list[dict[str, float]]) -> Trainer:
    """Trains in this process, and appends the metrics of each step to ``lines``. Returns the trainer."""
    model, processor = tiny()
    trainer = Trainer(recipe, model=model, processor=processor, on_step=lambda _, line: lines.append(dict(line)))
    assert trainer.run() == 0
    return trainer


# The move.


class Two(nn.Module):
    """A model with two parameters and a buffer. It has the method by which ``unwrap_model`` recognises a model."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(64, 33, generator=generator).to(dtype))
        self.second = nn.Parameter(torch.randn(7, generator=generator).to(dtype))
        self.register_buffer("running", torch.full((3,), float(seed)))

    def get_output_embeddings(self) -> None: ...


def moved(reference: nn.Module, policy: nn.Module, mix: float) -> dict[str, Tensor]:
    references.CopyReference(reference, LossRecipe(), torch.no_grad).sync(policy, mix)
    return {name: one.detach().clone() for name, one in reference.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy_dtype", [None, torch.float32], ids=["same", "float32 policy"])
@pytest.mark.parametrize("mix", [0.3, 0.6, 1.0])
def test_the_mix_is_rounded_once(dtype: torch.dtype, policy_dtype: torch.dtype | None, mix: float) -> None:
    reference, policy = Two(0, dtype), Two(1, policy_dtype or dtype)
    wide = max(torch.float32, dtype, key=lambda one: torch.finfo(one).bits)
    before = {name: one.detach().double().clone() for name, one in reference.named_parameters()}
    theirs = {name: one.detach().double().clone() for name, one in policy.named_parameters()}
    for name, found in moved(reference, policy, mix).items():
        exact = mix * theirs[name] + (1 - mix) * before[name]
        best = (exact.to(dtype).double() - exact).abs()
        unavoidable = 4 * torch.finfo(wide).eps * (theirs[name].abs() + before[name].abs())
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= best + unavoidable).all(), name
        assert torch.equal(policy.get_parameter(name).double(), theirs[name])


def test_a_hard_update_copies_and_buffers_stay() -> None:
    reference, policy = Two(0, torch.float32), Two(1, torch.float32)
    assert all(torch.equal(one, policy.get_parameter(name)) for name, one in moved(reference, policy, 1.0).items())
    assert torch.equal(reference.get_buffer("running"), torch.zeros(3))


def test_weights_in_4_bits_stay() -> None:
    """Checks that an update of the reference leaves 4-bit weights unchanged: packed integers cannot be averaged."""
    reference, policy = Two(0, torch.float32), Two(1, torch.float32)
    for number, model in enumerate((reference, policy)):
        model.packed = nn.Parameter(torch.full((5,), 16 * number, dtype=torch.uint8), requires_grad=False)
    assert not moved(reference, policy, 0.5)["packed"].any()


@pytest.mark.usefixtures("no_card")
def test_adapters_of_a_copy_move(tmp_path: Path, data: exactness.Data) -> None:
    recipe = digits_run.recipe(
        tmp_path / "run", data.path, model__lora={"rank": 2}, reference__kind="copy", reference__sync_every=1,
        reference__sync_mix=1.0, optim__max_steps=2, optim__epochs=2, optim__learning_rate=1e-2,
        optim__warmup_ratio=0,
    )  # fmt: skip
    lines: list[dict[str, float]] = []
    trainer = run_here(recipe, lines)
    assert [line["chosen_reward"] for line in lines] == pytest.approx([0, 0], abs=1e-6)
    assert trainer.reference_model is not None
    theirs = dict(trainer.model.named_parameters())
    both = {name: (one, theirs[name]) for name, one in trainer.reference_model.named_parameters() if "lora_B" in name}
    assert both
    assert all(torch.equal(one, other) and other.any() for one, other in both.values())


# Checkpoints.


def settings_of(**overrides: Any) -> dict[str, Any]:
    base = {
        **SYNC, "optim__max_steps": 6, "optim__epochs": 3, "optim__warmup_ratio": 0, "optim__learning_rate": 1e-2,
        "output__save_every": 1, "output__keep_last": 9,
    }  # fmt: skip
    return {**base, **overrides}


@pytest.fixture(scope="module")
def whole(data: exactness.Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[dict[str, float]]]:
    """Returns trainer and log lines of an uninterrupted run of six steps, with a checkpoint after each step."""
    lines: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "write_card", lambda *args, **values: None)
        out = tmp_path_factory.mktemp("whole") / "run"
        return run_here(digits_run.recipe(out, data.path, **settings_of()), lines), lines


def checkpoint_of(trainer: Trainer, step: int) -> Path:
    return trainer.output.checkpoints.folder / f"step-{step:08d}"


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_ends_with_the_same_bits(
    step: int,
    whole: tuple[Trainer, list[dict[str, float]]],
    data: exactness.Data,
    tmp_path: Path,
) -> None:
    """Resumes from two checkpoints: one before an update of the reference, and one right after it."""
    trainer, lines = whole
    resume = {"output__resume": str(checkpoint_of(trainer, step)), "output__save_every": 0}
    rest: list[dict[str, float]] = []
    resumed = run_here(digits_run.recipe(tmp_path / "run", data.path, **settings_of(**resume)), rest)
    for line, other in zip(rest, lines[step:], strict=True):
        assert {name: line[name] for name in line if name not in TIMING} == {
            name: other[name] for name in other if name not in TIMING
        }
    for one, other in ((resumed.model, trainer.model), (resumed.reference_model, trainer.reference_model)):
        assert one is not None
        assert other is not None
        for name, value in one.named_parameters():
            assert torch.equal(value, other.get_parameter(name)), name
    one, other = (
        load_file(next((Path(run.recipe.output.dir) / "final").glob("*.safetensors"))) for run in (resumed, trainer)
    )
    assert all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.usefixtures("no_card")
def test_only_a_reference_that_moves_is_in_a_checkpoint(
    whole: tuple[Trainer, list[dict[str, float]]], data: exactness.Data, tmp_path: Path
) -> None:
    trainer, _ = whole
    names = tensors_of(checkpoint_of(trainer, 1))
    assert {f"reference.{name}" for name, _ in trainer.model.named_parameters()} <= names
    still = run_here(
        digits_run.recipe(tmp_path / "run", data.path, **settings_of(reference__sync_every=0, optim__max_steps=1)), []
    )
    assert tensors_of(checkpoint_of(still, 1)) == {name for name in names if not name.startswith("reference.")}


def tensors_of(checkpoint: Path) -> set[str]:
    return set(
        torch.distributed.checkpoint.FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    )


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("sync_every", 0, "reference.sync_every was 2, is 0"),
        ("sync_every", 3, "reference.sync_every was 2, is 3"),
        ("sync_mix", 0.5, "reference.sync_mix was 0.6, is 0.5"),
    ],
)
def test_another_move_is_another_run(
    setting: str,
    value: float,
    text: str,
    whole: tuple[Trainer, list[dict[str, float]]],
    data: exactness.Data,
    tmp_path: Path,
) -> None:
    resume = {"output__resume": str(checkpoint_of(whole[0], 3)), f"reference__{setting}": value}
    with pytest.raises(ValueError, match=rf"(?s){text}\n.*use another output\.dir"):
        run_here(digits_run.recipe(tmp_path / "run", data.path, **settings_of(**resume)), [])


@pytest.mark.usefixtures("no_card")
def test_a_run_whose_reference_stood_still_does_not_begin_to_move_it(data: exactness.Data, tmp_path: Path) -> None:
    short = settings_of(reference__sync_every=0, optim__max_steps=1)
    run_here(digits_run.recipe(tmp_path / "run", data.path, **short), [])
    with pytest.raises(ValueError, match=r"reference\.sync_every was 0, is 2"):
        run_here(digits_run.recipe(tmp_path / "run", data.path, **{**short, "reference__sync_every": 2}), [])


# Errors and messages.


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (DistributedType.DEEPSPEED, "under DEEPSPEED, got 2"),
        (DistributedType.MEGATRON_LM, "under MEGATRON_LM, got 2"),
        (DistributedType.FSDP, "under FSDP of fsdp_version 1, got 2"),
    ],
    ids=str,
)
def test_a_sharding_whose_parts_cannot_be_mixed_ends_a_run_before_it_begins(
    kind: DistributedType, text: str, data: exactness.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*args: Any, **options: Any) -> Any:
        raise AssertionError("nothing may be sharded before")

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: False), raising=False)
    monkeypatch.setattr(Accelerator, "prepare", prepare)
    model, processor = tiny()
    with pytest.raises(ValueError, match=rf"^reference\.sync_every must be 0 {text}"):
        Trainer(digits_run.recipe(tmp_path / "run", data.path, **SYNC), model=model, processor=processor)


@pytest.fixture
def two_sizes(tmp_path: Path) -> tuple[Path, Path]:
    """Returns the folders of two text models; the second has a wider MLP."""
    folders = tmp_path / "one", tmp_path / "two"
    for number, folder in enumerate(folders):
        config = transformers.Qwen2Config(**{**TEXT, "intermediate_size": 24 + 8 * number})
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
        text_tokenizer().save_pretrained(folder)
    return folders


def test_a_model_of_another_shape_cannot_follow(tmp_path: Path, two_sizes: tuple[Path, Path]) -> None:
    one, two = two_sizes
    pairs = text_pairs(tmp_path / "pairs.jsonl", 4)
    settings = {"model__path": str(one), "reference__path": str(two)}
    recipe = digits_run.recipe(tmp_path / "out", pairs, **settings, **SYNC)
    text = (
        r"^reference\.sync_every must be 0 unless reference\.path has the parameters of model\.path, got 2 with "
        r"\S*mlp\.\w+\.weight: \(32, 16\) in the reference, \(24, 16\) in the policy"
    )
    for begin in (Trainer, plans.plan):
        with pytest.raises(ValueError, match=text):
            begin(recipe)
    Trainer(digits_run.recipe(tmp_path / "still", pairs, **settings))
    same = {**settings, "reference__path": str(one)}
    Trainer(digits_run.recipe(tmp_path / "same", pairs, **same, **SYNC))


def test_the_plan_and_the_card_name_it(tmp_path: Path, two_sizes: tuple[Path, Path]) -> None:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 4)
    settings: dict[str, Any] = {"model__path": str(two_sizes[0]), "data__max_length": 32}
    still = digits_run.recipe(tmp_path / "out", pairs, **settings)
    best = {"data__eval": [str(pairs)], "output__keep_best": True}
    moving = digits_run.recipe(tmp_path / "out", pairs, **settings, **SYNC, **best)
    text, without = str(plans.plan(moving)), str(plans.plan(still))
    assert "copy, moved by 0.6 of the way to the policy every 2 steps (TR-DPO)" in text
    (size,) = (line.split()[1] for line in text.splitlines() if line.split()[:1] == ["reference"] and "a copy" in line)
    assert f"note: reference.sync_every: each checkpoint also contains the reference, {size} " in text
    assert "note: output.keep_best compares evaluations under different references" in text
    assert "sync_every" not in without
    assert "TR-DPO" not in without
    for recipe in (moving, still):
        card.write_card(tmp_path, recipe=recipe, curves=[], summary={})
        written = (tmp_path / "README.md").read_text().partition("## Recipe")[0]
        assert ("moves by 0.6 of the way to the policy every 2 steps (TR-DPO, [arXiv 2404.09656]" in written) == (
            recipe is moving
        )


# Two ranks.


@pytest.fixture(scope="module")
def job_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    folder = tmp_path_factory.mktemp("ranks")
    pairs = digits_run.write_pairs(folder / "train", 11, text_only=3)
    settings = {
        **SYNC, "optim__batch_size": 5, "optim__micro_batch_size": 2, "optim__epochs": 2,
        "reward_shift__mode": "ema", "reward_shift__update": "after", "reward_shift__per": "optimizer_step",
    }  # fmt: skip
    return lambda out, **options: Job(folder / out, pairs, {**settings, **options.pop("settings", {})}, **options)


@pytest.fixture(scope="module")
def single(job_of: Callable[..., Job]) -> Job:
    job = job_of("single")
    assert run(job) == [0], text_of(job)
    assert log_of(job)[2]["chosen_reward"] != 0  # as after a hard update, or none
    return job


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_move_it_as_one_does(sharded: bool, job_of: Callable[..., Job], single: Job) -> None:
    job = job_of(f"two-{sharded}", world_size=2, sharded=sharded)
    assert run(job) == [0, 0], text_of(job)
    lines, expected = log_of(job), log_of(single)
    assert len(lines) == len(expected) == 6
    for line, other in zip(lines, expected, strict=True):
        for name, value in other.items():
            assert line[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    first, second, alone = (result_of(*one)["weights"] for one in ((job, 0), (job, 1), (single, 0)))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=2e-5, rtol=0, msg=name)
