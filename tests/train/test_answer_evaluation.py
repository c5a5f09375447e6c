"""Tests evaluation by generated answers during training (``output.eval_generate``)."""

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_folders
import numpy as np
import pytest
import run_recipe
import torch
from accelerate.state import AcceleratorState
from digits_run import recipe, tiny, weights, write_pairs
from run_recipe import Job
from torch import nn
from transformers import GenerationMixin

from mpo_ext.evaluate.run import evaluate
from mpo_ext.evaluate.scoring import EvaluationConfig, QuestionScore
from mpo_ext.train import model_card
from mpo_ext.train.answer_evaluation import AnswerEvaluation, answer_metrics, shards_parameters
from mpo_ext.train.loop import Trainer
from mpo_ext.train.preserve import preserved
from mpo_ext.train.recipe import OutputRecipe

TIMING = run_recipe.TIMING


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file of twenty pairs, which give steps of 8, 8 and 4 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 20, text_only=5)


@pytest.fixture(scope="module")
def items(pairs: Path) -> Path:
    """Writes the questions of nine pairs and made-up true answers to a file. Returns the file.

    The tiny model answers some questions correctly.
    """
    lines = [json.loads(line) for line in pairs.read_text().splitlines()[:9]]
    path = pairs.with_name("items.jsonl")
    path.write_text(
        "".join(
            json.dumps({"question": line["question"], "images": line["images"], "answer_gt": str(number % 3)}) + "\n"
            for number, line in enumerate(lines)
        )
    )
    return path


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_card, "write_card", lambda *args, **values: None)


@pytest.fixture
def any_precision() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def settings_of(items: Path, **settings: Any) -> dict[str, Any]:
    """Returns overrides of a recipe: ``output.eval_generate`` with defaults of this test and with ``settings``."""
    generation = {
        "path": str(items), "prompt": "none", "style": "direct", "max_new_tokens": 6, "image_root": str(items.parent),
        "batch_size": 4, "matcher": {"kind": "number"}, "every": 1, **settings,
    }  # fmt: skip
    return {"output__eval_generate": generation}


def run(out: Path, pairs: Path, **settings: Any) -> Trainer:
    model, processor = tiny()
    trainer = Trainer(recipe(out, pairs, **settings), model=model, processor=processor)
    assert trainer.run() == 0
    return trainer


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__lora": {"rank": 2, "dropout": 0.2}, "model__gradient_checkpointing": True},
        {"precision": "bf16", "loss__shared_prefix": False},
    ],
    ids=["full", "lora", "bf16"],
)
def test_training_is_the_same_with_and_without_it(
    settings: dict[str, Any], tmp_path: Path, pairs: Path, items: Path, any_precision: None
) -> None:
    plain = run(tmp_path / "plain", pairs, **settings)
    AcceleratorState._reset_state(True)
    evaluated = run(tmp_path / "evaluated", pairs, **settings, **settings_of(items))
    lines = log(tmp_path / "evaluated")
    assert [line["step"] for line in lines if "eval_answer_accuracy" in line] == [1, 2, 3]
    one, other = (
        [{name: line[name] for name in line if name not in TIMING} for line in log(tmp_path / name) if "loss" in line]
        for name in ("plain", "evaluated")
    )
    assert one == other
    after = weights(evaluated.model)
    assert all(torch.equal(value, after[name]) for name, value in weights(plain.model).items())


def test_the_scores_are_those_of_the_evaluation_of_the_final_model(tmp_path: Path) -> None:
    model = model_folders.write_qwen2(tmp_path / "model")
    data = model_folders.write_pairs(tmp_path / "data", 12, images=False)
    questions = [json.loads(line)["question"] for line in data.read_text().splitlines()[:9]]
    items = tmp_path / "items.jsonl"
    generation = {"path": str(items), "prompt": "none", "style": "direct", "max_new_tokens": 8, "matcher": "exact"}
    settings = {"model__path": str(model), "optim__learning_rate": 1e-4, "optim__epochs": 3}

    def answers_of(out: Path, truths: list[str]) -> list[dict[str, Any]]:
        lines = [{"question": q, "answer_gt": truth} for q, truth in zip(questions, truths, strict=True)]
        items.write_text("".join(json.dumps(line) + "\n" for line in lines))
        trainer = Trainer(recipe(out, data, output__eval_generate=generation, **settings))
        assert trainer.run() == 0
        path = out / "answers" / f"step-{trainer.state.step:08d}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    first = answers_of(tmp_path / "first", ["nothing"] * 9)
    assert len({answer["text"] for answer in first}) > 1
    # Now every second answer is correct.
    truths = [(answer["answer"] or "nothing") if number % 2 else "nothing" for number, answer in enumerate(first)]
    out = tmp_path / "out"
    answers = answers_of(out, truths)
    assert [answer["text"] for answer in answers] == [answer["text"] for answer in first]
    lines = [line for line in log(out) if "eval_answer_accuracy" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]  # the ends of the epochs
    config = EvaluationConfig(prompts=("none",), style="direct", max_new_tokens=8, matcher={"kind": "exact"})
    whole = evaluate({"m": out}, {"d": items}, tmp_path / "eval", config=config)
    assert whole is not None
    (expected,) = whole["results"]
    assert 0 < expected["accuracy"] < 1
    names = {"accuracy", "standard_error", "cut_off", "unreadable"}
    assert {name: expected[name] for name in names} == {name: lines[-1][f"eval_answer_{name}"] for name in names}
    assert lines[-1]["eval_answer_tokens"] == expected["tokens_per_response"]
    assert lines[-1]["eval_questions"] == expected["questions"] == 9
    predictions = [json.loads(line) for line in (tmp_path / "eval" / "predictions-m.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == [prediction["response"] for prediction in predictions]
    assert [answer["correct"] for answer in answers] == [prediction["correct"] for prediction in predictions]


def test_a_run_with_fewer_questions_asks_the_first(tmp_path: Path, pairs: Path, items: Path) -> None:
    run(tmp_path / "out", pairs, optim__max_steps=1, **settings_of(items, max_items=4))
    lines = (tmp_path / "out" / "answers" / "step-00000001.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in items.read_text().splitlines()]
    assert [json.loads(line)["question"] for line in lines] == questions[:4]


def test_two_ranks_share_the_questions(tmp_path: Path, pairs: Path, items: Path) -> None:
    settings = {**settings_of(items), "reward_shift__mode": "fixed", "optim__max_steps": 2}
    run(tmp_path / "one", pairs, **settings)
    job = Job(tmp_path / "two", pairs, settings, world_size=2)
    assert run_recipe.run(job) == [0, 0], run_recipe.text_of(job)
    one, two = (
        [{name: line[name] for name in line if name.startswith("eval")} for line in log(out)]
        for out in (tmp_path / "one", job.out)
    )
    assert one == two
    assert one[1]["eval_questions"] == 9
    one, two = (
        [path.read_text() for path in sorted((out / "answers").iterdir())] for out in (tmp_path / "one", job.out)
    )
    assert one == two
    first, second = (run_recipe.result_of(job, rank)["weights"] for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_error_of_one_rank_ends_all(tmp_path: Path, pairs: Path, items: Path) -> None:
    job = Job(tmp_path / "out", pairs, settings_of(items), hook=fail_on_rank_1, world_size=2)
    assert run_recipe.run(job) == [1, 1]
    text = "output.eval_generate failed after step 1: RuntimeError: out of memory"
    assert run_recipe.text_of(job).count(text) >= 2


def fail_on_rank_1(rank: int) -> None:
    def fail(self: AnswerEvaluation) -> Iterator[Any]:
        raise RuntimeError("out of memory")

    if rank == 1:
        AnswerEvaluation._ask = fail  # type: ignore[method-assign]


def test_fsdp2_trains_the_same_with_and_without_it(tmp_path: Path, pairs: Path, items: Path) -> None:
    settings = {"reward_shift__mode": "fixed"}
    run(tmp_path / "one", pairs, **settings, **settings_of(items))
    plain = Job(tmp_path / "plain", pairs, settings, world_size=2, sharded=True)
    asked = Job(tmp_path / "asked", pairs, {**settings, **settings_of(items)}, world_size=2, sharded=True)
    asked = dataclasses.replace(asked, hook=refuse_inference_mode)
    for job in (plain, asked):
        assert run_recipe.run(job) == [0, 0], run_recipe.text_of(job)
    assert [line for line in run_recipe.log_of(asked) if "loss" in line] == run_recipe.log_of(plain)
    for rank in range(2):
        after = run_recipe.result_of(asked, rank)["weights"]
        assert all(
            torch.equal(value, after[name]) for name, value in run_recipe.result_of(plain, rank)["weights"].items()
        )
    one, two = (
        [path.read_text() for path in sorted((tmp_path / name / "answers").iterdir())] for name in ("one", "asked")
    )
    assert len(one) == 3
    assert one == two


def refuse_inference_mode(rank: int) -> None:
    """Makes ``generate`` fail in inference mode. The trainer must not use inference mode.

    If FSDP2 first gathers parameters in inference mode, they cannot be trained later.
    """
    generate = GenerationMixin.generate

    def checked(*args: Any, **kwargs: Any) -> Any:
        assert not torch.is_inference_mode_enabled()
        return generate(*args, **kwargs)

    GenerationMixin.generate = checked


@pytest.mark.parametrize(
    ("kind", "stage", "is_sharded"),
    [("DEEPSPEED", 3, True), ("DEEPSPEED", 2, False), ("FSDP", 2, True), ("MULTI_GPU", 0, False), ("FSDP", 1, None),
     ("TP", 0, None)],
)  # fmt: skip
def test_kinds_of_sharding(kind: str, stage: int, is_sharded: bool | None) -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=kind, state=state, is_fsdp2=stage == 2)
    if is_sharded is not None:
        assert shards_parameters(accelerator, "items.jsonl") == is_sharded
        return
    with pytest.raises(ValueError, match=f"must be None under {kind}, got 'items.jsonl'"):
        shards_parameters(accelerator, "items.jsonl")


# The scores and what they decide.


def test_the_answer_accuracy_stops_a_run_and_keeps_its_best_checkpoint(
    tmp_path: Path, pairs: Path, items: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    values = iter([0.2, 0.6, 0.4, 0.6, 0.9])
    monkeypatch.setattr(
        AnswerEvaluation, "evaluate", lambda self, step: {"answer_accuracy": next(values), "answer_unreadable": 0.25}
    )
    trainer = run(
        tmp_path / "out", pairs, data__eval=[str(pairs)], output__best_metric="answer_accuracy",
        output__early_stopping=2, output__keep_best=True, output__keep_last=1, output__eval_every=1, optim__epochs=4,
        **settings_of(items),
    )  # fmt: skip
    assert trainer.state.step == 4
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    text = capsys.readouterr().err
    assert "no better answer_accuracy than 0.6000 in 2 evaluations" in text
    assert "answer_accuracy 0.2000, answer_unreadable 0.2500" in text
    line = log(tmp_path / "out")[-1]
    assert line["eval_answer_accuracy"] == 0.6
    assert "eval_reward_accuracy" in line  # both evaluations of a step are one line


def test_a_pair_evaluation_does_not_count_for_the_answer_accuracy(
    tmp_path: Path, pairs: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.6])
    monkeypatch.setattr(
        AnswerEvaluation, "evaluate", lambda self, step: {"answer_accuracy": next(values), "answer_unreadable": 0.25}
    )
    trainer = run(
        tmp_path / "out", pairs, data__eval=[str(pairs)], output__best_metric="answer_accuracy",
        output__early_stopping=1, output__keep_best=True, output__eval_every=1, optim__epochs=2,
        **settings_of(items, every=0),
    )  # fmt: skip
    assert trainer.state.step == 6
    assert trainer.state.best_score == 0.6


def test_an_accuracy_that_is_not_a_number_is_saved_and_restored(
    tmp_path: Path, pairs: Path, items: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(AnswerEvaluation, "evaluate", lambda self, step: answer_metrics([]))
    settings = {"output__best_metric": "answer_accuracy", "output__early_stopping": 2, "output__save_every": 1}
    settings |= {**settings_of(items, every=1)}
    assert run(tmp_path / "out", pairs, optim__epochs=2, **settings).state.step == 2
    assert "early stopping: no answer_accuracy in 2 evaluations, so the run ends" in capsys.readouterr().err
    again = run(tmp_path / "out", pairs, optim__epochs=2, **settings)  # failed before: NaN is not JSON
    assert math.isnan(again.state.evaluation["eval_answer_accuracy"])  # type: ignore[index]
    assert (again.state.n_stalled, again.state.best_score) == (2, None)


def test_a_generation_that_fails_costs_no_step(
    tmp_path: Path, pairs: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: AnswerEvaluation) -> Iterator[Any]:
        raise ValueError("no answers")

    with monkeypatch.context() as patch:
        patch.setattr(AnswerEvaluation, "_ask", fail)
        with pytest.raises(RuntimeError, match=r"failed after step 3: .*no answers"):
            run(tmp_path / "out", pairs, **settings_of(items, every=0))
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert run(tmp_path / "out", pairs, **settings_of(items, every=0)).state.evaluation is not None
    assert (tmp_path / "out" / "final").exists()


def test_other_questions_start_the_best_score_anew(
    tmp_path: Path, pairs: Path, items: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    own = items.with_name("own.jsonl")
    own.write_text(items.read_text())
    settings = {"output__best_metric": "answer_accuracy", "output__keep_best": True, **settings_of(own)}
    monkeypatch.setattr(AnswerEvaluation, "evaluate", lambda self, step: {"answer_accuracy": 1 / step})
    assert run(tmp_path / "out", pairs, optim__epochs=1, **settings).state.best_score == 1
    assert run(tmp_path / "out", pairs, optim__epochs=2, **settings).state.best_score == 1
    assert "have changed" not in capsys.readouterr().err
    own.write_text("".join(items.read_text().splitlines(keepends=True)[1:]))
    assert run(tmp_path / "out", pairs, optim__epochs=3, **settings).state.best_score == 1 / 6
    assert "the questions of output.eval_generate have changed" in capsys.readouterr().err
    # A finished run is evaluated again on changed questions.
    steps: list[int] = []
    monkeypatch.setattr(
        AnswerEvaluation, "evaluate", lambda self, step: steps.append(step) or {"answer_accuracy": 0.1}
    )
    run(tmp_path / "out", pairs, optim__epochs=3, **settings)
    assert steps == []
    own.write_text(items.read_text())
    assert run(tmp_path / "out", pairs, optim__epochs=3, **settings).state.best_score == 0.1
    assert steps == [9]


def test_metrics_of_answers() -> None:
    right, wrong = QuestionScore(right=(True,), tokens=4), QuestionScore(right=(False,), cut_off=1, tokens=8)
    unreadable = QuestionScore(right=(False,), unreadable=1)
    metrics = answer_metrics([right, wrong, unreadable, QuestionScore("image cannot be read")])
    assert metrics["answer_accuracy"] == pytest.approx(1 / 3)
    assert metrics["answer_standard_error"] == pytest.approx(1 / 3)  # sqrt(2/9 * 3/2 / 3)
    assert metrics["answer_cut_off"] == metrics["answer_unreadable"] == pytest.approx(1 / 3)
    assert metrics["answer_tokens"] == 4
    assert (metrics["questions"], metrics["questions_refused"]) == (3, 1)
    assert np.isnan(answer_metrics([])["answer_accuracy"])


# What is refused at the start.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "none.jsonl"}, r"output\.eval_generate\.path: .*none\.jsonl"),
        (
            {"image_root": "elsewhere"},
            r"images exist, got .*items\.jsonl with 7 of 7 images missing, such as elsewhere",
        ),
    ],
)
def test_questions_are_checked_before_training(
    settings: dict[str, Any], message: str, tmp_path: Path, pairs: Path, items: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "out", pairs, **settings_of(items, **settings))
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_generate": 3}, "eval_generate must be a string or a section, got 3"),
        ({"eval_generate": {"every": 2}}, "eval_generate.path must be given"),
        ({"eval_generate": {"path": "i.jsonl", "matcher": "guess"}}, "eval_generate.matcher: kind must be one of"),
        ({"eval_generate": {"path": "i.jsonl", "prompt": "cott"}}, "did you mean 'cot'?"),
        ({"eval_generate": {"path": "i.jsonl", "max_itens": 2}}, "did you mean eval_generate.max_items?"),
        ({"best_metric": "answer_accuracy"}, "best_metric must be 'reward_accuracy' or 'loss' without eval_generate"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        OutputRecipe(dir="out", **settings)
    assert message in str(error.value)


def test_a_path_is_the_whole_section() -> None:
    output = OutputRecipe(dir="out", eval_generate="items.jsonl", best_metric="answer_accuracy", early_stopping=2)
    assert output.eval_generate is not None
    assert output.eval_generate.path == "items.jsonl"
    assert output.eval_generate.config.matcher == {"kind": "vqa"}


# The state of training.


class Caching(nn.Module):
    """A module whose forward replaces attributes and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))
        self.seen: int | None = None
        self.inner = nn.Dropout(0.5)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen, self.table, self.extra = len(values), torch.zeros(5), 1
        return self.inner(values)


def test_modules_and_random_states_are_restored() -> None:
    model = Caching()
    model.inner.eval()  # a single module in evaluation mode stays so
    table, accelerator = model.table, SimpleNamespace(device=torch.device("cpu"))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    with preserved(accelerator, model):
        model.eval()
        model.inner.train()
        model(torch.rand(4))
        random.random()
        np.random.rand()
    assert model.table is table
    assert model.seen is None
    assert not hasattr(model, "extra")
    assert (model.training, model.inner.training) == (True, False)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
