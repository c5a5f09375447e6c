"""Tests the loss of a micro-batch when ``loss.preference`` replaces the DPO term by another loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits_run
import pytest
import torch

from mpo_ext.loss.preference import LOSSES
from mpo_ext.train.batch_loss import weighted_config
from mpo_ext.train.dataset import BatchCounts, StepSize
from mpo_ext.train.loop import Trainer, train
from mpo_ext.train.recipe import LossRecipe


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run.write_pairs(tmp_path_factory.mktemp("pairs"), 16, text_only=4)


def run(out: Path, pairs: Path, **overrides: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Trains three steps. Returns the log's lines and the final weights."""
    model, processor = digits_run.tiny()
    lines: list[dict[str, float]] = []
    common = {"loss__bco_weight": 0, "optim__max_steps": 3, "optim__epochs": 2, "optim__eps": 1e-4}
    recipe = digits_run.recipe(out, pairs, **{**common, **overrides})
    assert train(recipe, model=model, processor=processor, on_step=lambda _, line: lines.append(dict(line))) == 0
    return lines, digits_run.weights(model)


def assert_same(one: Any, other: Any, *names: str) -> None:
    for line, expected in zip(one[0], other[0], strict=True):
        assert {name: line[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=2e-5, abs=1e-7
        )
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "of_pairs", "of_tokens"),
    [
        ({}, [0.4, 0.2, 0.4], [1 / 3, 0.6, 1 / 15]),
        ({"loss__ntp_average": "sequence"}, [0.4, 0.2, 0.4], [0.5, 0.25, 0.25]),
        ({"loss__average_over": "micro_batch"}, [1 / 3] * 3, [1 / 3] * 3),
        (
            {"loss__average_over": "micro_batch", "optim__micro_batch_size": 1, "optim__micro_batch_tokens": 100},
            [0.4, 0.2, 0.4],  # each pair counts as a micro-batch; one has no chosen tokens
            [0.4, 0.2, 0.2],
        ),
    ],
)
def test_each_micro_batch_has_its_share_of_the_step(
    tmp_path: Path, settings: dict[str, Any], of_pairs: list[float], of_tokens: list[float]
) -> None:
    """Checks the factors of the loss weights for each micro-batch of a step.

    For example, 2 of 5 pairs give the factor 2/5. With two ranks, the factor is 4/5, because accelerate averages the
    gradients over the ranks.
    """
    recipe = digits_run.recipe(tmp_path / "run", tmp_path / "pairs.jsonl", **settings)
    counts = [BatchCounts(2, 5, 2), BatchCounts(1, 9, 1), BatchCounts(2, 1, 1)]
    size = StepSize(BatchCounts(5, 15, 4), micro_steps=2, micro_batches=3)
    configs = [weighted_config(recipe, each, size, world_size=2) for each in counts]
    weights = [(c.dpo_weight, c.bco_weight, c.ntp_weight) for c in configs if c is not None]
    shares = zip(of_pairs, of_tokens, strict=True)
    assert weights == [pytest.approx((2 * 0.8 * pairs, 2 * 0.2 * pairs, 2 * tokens)) for pairs, tokens in shares]
    assert weighted_config(recipe, None, size, world_size=2) is None


@pytest.mark.parametrize(("average", "smoothing"), [("token", 0), ("sequence", 0.1)])
def test_sigmoid_is_dpo(tmp_path: Path, pairs: Path, average: str, smoothing: float) -> None:
    common: dict[str, Any] = {
        "loss__dpo_weight": 0.7,
        "loss__ntp_average": average,
        "loss__label_smoothing": smoothing,
        "loss__ntp_weight": 0.5,
        "loss__beta": 0.3,
    }
    dpo = run(tmp_path / "dpo", pairs, **common)
    other = run(tmp_path / "other", pairs, loss__preference="sigmoid", **common)
    assert_same(other, dpo, "loss", "dpo_loss", "ntp_loss", "chosen_reward", "rejected_reward", "chosen_logp",
                "rejected_logp", "grad_norm", "chosen_tokens")  # fmt: skip
    for line, expected in zip(other[0], dpo[0], strict=True):
        if (
            abs(expected["reward_margin"]) > 1e-4
        ):  # while policy and reference agree, rounding decides which reward is larger
            assert line["reward_accuracy"] == expected["reward_accuracy"]
    assert abs(dpo[0][-1]["reward_margin"]) > 1e-4
    assert not {"entropy", "top1", "reward_shift"} & set(other[0][0])


@pytest.mark.parametrize(("from_logits", "average_over"), [(False, "step"), (True, "micro_batch")])
def test_a_loss_of_each_pair_does_not_depend_on_micro_batches(
    tmp_path: Path, pairs: Path, from_logits: bool, average_over: str
) -> None:
    common: dict[str, Any] = {"loss__preference": "ipo", "loss__from_logits": from_logits, "loss__ntp_weight": 0}
    common["loss__average_over"] = average_over  # without next-token loss the same: micro-batches are equally large
    whole = run(tmp_path / "whole", pairs, optim__micro_batch_size=8, **common)
    parts = run(tmp_path / "parts", pairs, optim__micro_batch_size=2, **common)
    assert_same(parts, whole, "loss", "dpo_loss", "grad_norm")
    assert whole[0][0]["dpo_loss"] == pytest.approx(25, rel=1e-4)  # (0 - 1 / (2 * beta))^2


def test_a_loss_without_reference_has_none(tmp_path: Path, pairs: Path) -> None:
    model, processor = digits_run.tiny()
    overrides = {"loss__preference": "orpo", "loss__dpo_weight": 1, "loss__bco_weight": 0, "optim__max_steps": 2}
    trainer = Trainer(digits_run.recipe(tmp_path / "run", pairs, **overrides), model=model, processor=processor)
    assert trainer.reference_model is None
    assert trainer.run() == 0
    assert trainer.reference is None
    line = trainer.output.log.read()[0]
    tokens = line["chosen_tokens"] / line["pairs"]
    assert line["chosen_reward"] == pytest.approx(0.1 * line["chosen_logp"], rel=1e-5)
    assert line["ntp_loss"] == pytest.approx(-line["chosen_logp"] / tokens, rel=1e-5)
    assert line["loss"] == pytest.approx(line["dpo_loss"] + line["ntp_loss"], rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_lowers_itself(tmp_path: Path, pairs: Path, name: str) -> None:
    smoothing = 1e-3 if LOSSES[name].label_smoothing == "positive" else 0
    overrides = {"optim__batch_size": 16, "optim__micro_batch_size": 16, "optim__max_steps": 5, "optim__epochs": 5}
    lines, _ = run(tmp_path / "run", pairs, loss__preference=name, loss__ntp_weight=0, loss__dpo_weight=1,
                   loss__label_smoothing=smoothing, **overrides)  # fmt: skip
    assert lines[-1]["dpo_loss"] < lines[1]["dpo_loss"]
    if name != "discopop":  # it falls on both sides of a margin of 0
        assert lines[-1]["reward_margin"] > lines[1]["reward_margin"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"preference": "ipoo", "dpo_weight": 1, "bco_weight": 0},
            "preference: unknown loss 'ipoo'; did you mean 'ipo'",
        ),
        ({"preference": "ipo"}, "preference needs a positive dpo_weight, .* and bco_weight 0, got 0.8 and 0.2"),
        ({"preference": "ipo", "dpo_weight": 0, "bco_weight": 0}, "got 0.0 and 0.0"),
        (
            {"preference": "ipo", "bco_weight": 0, "label_smoothing": 0.1},
            "preference: label_smoothing must be 0 for the loss 'ipo', which has none, got 0.1",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossRecipe(**values)


def test_on_step_ends_a_run(tmp_path: Path, pairs: Path) -> None:
    """``on_step`` ends the run at step 3; the run still writes a checkpoint, a log line and the final model."""
    model, processor = digits_run.tiny()
    recipe = digits_run.recipe(tmp_path / "run", pairs, optim__epochs=5, output__log_every=100)
    seen: list[int] = []

    def stop(step: int, line: Any) -> bool:
        seen.append(step)
        return step == 3

    assert train(recipe, model=model, processor=processor, on_step=stop) == 0
    assert seen == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
