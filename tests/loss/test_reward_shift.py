"""Tests RewardShift directly and through mpo_loss: the value that a call uses, and the value after the call."""

import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from oracle import ExactShift, make_case

from mpo_ext import RewardShift, mpo_loss

SETTINGS: list[dict[str, Any]] = [
    {"mode": "cumulative", "update": "before"},
    {"mode": "cumulative", "update": "after"},
    {"mode": "cumulative", "update": "after", "per": "optimizer_step"},
    {"mode": "ema", "decay": 0.75, "update": "before"},
    {"mode": "ema", "decay": 0.75, "update": "after"},
    {"mode": "ema", "decay": 0.75, "update": "after", "per": "optimizer_step"},
    {"mode": "fixed", "value": -0.5},
    {"mode": "fixed", "value": -0.5, "per": "optimizer_step"},
]


def name_of(settings: dict[str, Any]) -> str:
    """Returns a test id such as `ema,0.75,after`."""
    return ",".join(str(value) for value in settings.values())


# By hand.


def test_cumulative_is_the_mean_of_all_updates() -> None:
    shift = RewardShift()
    values = []
    for reward_sum, count in [(2.0, 2), (6.0, 2), (20.0, 4), (-1.0, 1)]:  # each mean has weight 1, whatever its count
        shift.update(reward_sum, count)
        values.append(shift.value)
    assert values == [1.0, 2.0, 3.0, 2.0]


def test_the_first_update_replaces_the_initial_value_of_cumulative() -> None:
    shift = RewardShift(value=100.0)
    assert shift.value == 100.0
    shift.update(1.0, 2)
    assert shift.value == 0.5


def test_ema_moves_from_the_initial_value() -> None:
    shift = RewardShift(mode="ema", decay=0.5, value=1.0)
    values = []
    for reward_sum, count in [(6.0, 2), (0.0, 4), (-3.0, 1)]:
        shift.update(reward_sum, count)
        values.append(shift.value)
    assert values == [2.0, 1.0, -1.0]


def test_ema_keeps_99_percent_by_default() -> None:
    shift = RewardShift(mode="ema")
    shift.update(1.0, 1)
    assert shift.value == pytest.approx(0.01, rel=1e-6)


def test_the_fixture_of_nemo_rl() -> None:
    shift = RewardShift(mode="ema", decay=0.5, update="after", value=1.0, per="optimizer_step")
    shift.update(-2, 1)
    shift.update(-8, 3)
    assert shift.value == 1.0
    shift.step()
    assert shift.value == -0.75


def test_cumulative_per_optimizer_step_counts_each_step_once() -> None:
    shift = RewardShift(update="after", per="optimizer_step")
    for batch in ([(2.0, 2), (6.0, 2)], [(8.0, 2)]):
        for reward_sum, count in batch:
            shift.update(reward_sum, count)
        shift.step()
    assert shift.value == 3.0  # the mean of 8 / 4 and 8 / 2
    shift.step()  # without new rewards
    assert shift.value == 3.0


def test_fixed_never_moves() -> None:
    shift = RewardShift(mode="fixed", value=0.25)
    shift.update(100.0, 1)
    shift.step()
    assert shift.value == 0.25


def test_a_batch_without_rewards_changes_nothing() -> None:
    for settings in SETTINGS:
        shift = RewardShift(**settings)
        shift.update(0.0, 0)
        shift.step()
        assert shift.value == settings.get("value", 0.0)
        shift.update(4.0, 2)
        shift.step()
        moved = shift.value
        shift.update(0.0, 0)
        shift.step()
        assert shift.value == moved
    cumulative = RewardShift()
    cumulative.update(0.0, 0)
    cumulative.update(1.0, 1)
    assert cumulative.value == 1.0  # the empty batch did not count


def test_update_takes_tensors() -> None:
    shift = RewardShift()
    shift.update(torch.tensor(3.0), torch.tensor(2))
    shift.update(torch.tensor(5.0, dtype=torch.float64), torch.tensor(2.0))
    assert shift.value == 2.0


def test_update_keeps_no_graph() -> None:
    reward = torch.tensor(3.0, requires_grad=True)
    shift = RewardShift()
    shift.update(reward * 2, 2)
    assert isinstance(shift.value, float)
    assert shift.value == 3.0


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_hundred_updates_follow_the_book(settings: dict[str, Any]) -> None:
    shift, exact = RewardShift(**settings), ExactShift(**settings)
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        reward_sum, count = 10 * torch.randn((), generator=generator).item(), i % 5
        shift.update(reward_sum, count)
        exact.update(reward_sum, count)
        if i % 3 == 2:
            shift.step()
            if settings.get("per") == "optimizer_step":
                exact.step()
        assert shift.value == pytest.approx(exact.value, rel=1e-5, abs=1e-6)


# Through mpo_loss.


def batches(count: int) -> list[Any]:
    """Returns test cases with different rewards."""
    return [make_case(torch.float32, 19, pairs=1 + seed % 3, length=5, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_the_sequence_of_deltas_follows_the_book(backend: str, device: str, settings: dict[str, Any]) -> None:
    shift, exact_shift = RewardShift(**settings), ExactShift(**settings)
    for i, case in enumerate(batches(6)):
        exact = case.exact(exact_shift)
        logits = case.logits.to(device, copy=True).requires_grad_()
        output = mpo_loss(
            logits, case.labels.to(device), case.ref_logp.to(device), reward_shift=shift, backend=backend
        )
        assert float(output.reward_shift) == pytest.approx(float(exact.reward_shift), rel=1e-5, abs=1e-6)
        assert float(output.bco_loss) == pytest.approx(float(exact.bco_loss), rel=1e-5)
        assert output.loss.item() == pytest.approx(float(exact.loss), rel=1e-5)
        if settings.get("per") == "optimizer_step" and i % 2:
            shift.step()
            exact_shift.step()
        assert shift.value == pytest.approx(exact_shift.value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_the_delta_returned_is_the_one_used(backend: str, device: str, settings: dict[str, Any]) -> None:
    shift = RewardShift(**settings)
    for case in batches(3):
        before = shift.value
        logits = case.logits.to(device, copy=True).requires_grad_()
        y, ref = case.labels.to(device), case.ref_logp.to(device)
        output = mpo_loss(logits, y, ref, reward_shift=shift, backend=backend)
        expected = shift.value if settings.get("update", "before") == "before" else before
        assert float(output.reward_shift) == pytest.approx(expected, rel=1e-6)
        again = mpo_loss(logits, y, ref, reward_shift=output.reward_shift, backend=backend)
        torch.testing.assert_close(again.loss, output.loss, rtol=1e-6, atol=0)
        with torch.no_grad():
            number = mpo_loss(logits, y, ref, reward_shift=float(output.reward_shift), backend=backend)
        torch.testing.assert_close(number.loss, output.loss.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_leaves_it_alone(backend: str, device: str, settings: dict[str, Any], how: str) -> None:
    shift = RewardShift(**settings)
    shift.update(1.5, 2)
    shift.step()
    before, state = shift.value, shift.state_dict()
    for case in batches(3):
        logits = case.logits.to(device, copy=True).requires_grad_()
        arguments = (logits, case.labels.to(device), case.ref_logp.to(device))
        if how == "eval":
            shift.eval()
            output = mpo_loss(*arguments, reward_shift=shift, backend=backend)
            shift.train()
        else:
            with getattr(torch, how)():
                output = mpo_loss(*arguments, reward_shift=shift, backend=backend)
        assert float(output.reward_shift) == pytest.approx(before, rel=1e-6)
        assert shift.value == before
        assert shift.state_dict() == state
    shift.step()  # nothing was collected
    assert shift.value == before


def test_training_goes_on_after_evaluation(backend: str, device: str) -> None:
    shift, undisturbed = RewardShift(), RewardShift()
    for case in batches(3):
        logits = case.logits.to(device, copy=True).requires_grad_()
        arguments = (logits, case.labels.to(device), case.ref_logp.to(device))
        mpo_loss(*arguments, reward_shift=shift, backend=backend)
        mpo_loss(*arguments, reward_shift=undisturbed, backend=backend)
        with torch.inference_mode():
            mpo_loss(*arguments, reward_shift=shift, backend=backend)
    assert shift.value == undisturbed.value


def test_the_first_call_under_inference_mode_does_no_harm(backend: str, device: str) -> None:
    shift = RewardShift()
    (case,) = batches(1)
    logits = case.logits.to(device, copy=True).requires_grad_()
    arguments = (logits, case.labels.to(device), case.ref_logp.to(device))
    with torch.inference_mode():
        mpo_loss(*arguments, reward_shift=shift, backend=backend)
    output = mpo_loss(*arguments, reward_shift=shift, backend=backend)
    output.loss.backward()
    assert logits.grad is not None
    assert shift.value == pytest.approx(float(case.exact(ExactShift()).reward_shift), rel=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_pair_with_an_empty_side_does_not_move_it(backend: str, device: str, settings: dict[str, Any]) -> None:
    case = make_case(torch.float32, 19, pairs=3, length=5)
    labels = case.labels.clone()
    labels[1] = -100
    shift, exact_shift = RewardShift(**settings), ExactShift(**settings)
    logits = case.logits.to(device, copy=True).requires_grad_()
    whole = (logits, labels.to(device), case.ref_logp.to(device))
    output = mpo_loss(*whole, reward_shift=shift, backend=backend)
    rewards = [*output.chosen_reward.tolist(), *output.rejected_reward.tolist()]
    assert rewards[1] == rewards[4] == 0
    exact_shift(sum(rewards), 4)
    shift.step()
    exact_shift.step()
    assert shift.value == pytest.approx(exact_shift.value, rel=1e-5)

    state = shift.state_dict()
    labels[:3] = -100  # no pair is left
    output = mpo_loss(logits, labels.to(device), case.ref_logp.to(device), reward_shift=shift, backend=backend)
    assert float(output.reward_shift) == pytest.approx(shift.value, rel=1e-6)
    assert shift.state_dict() == state


def test_policy_equal_to_reference_keeps_it_at_zero(backend: str, device: str) -> None:
    shift = RewardShift()
    for case in batches(3):
        logits = case.logits.to(device, copy=True).requires_grad_()
        mpo_loss(
            logits, case.labels.to(device), ref_logits=case.logits.to(device), reward_shift=shift, backend=backend
        )
        assert shift.value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("delta", [0.7, -3, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)], ids=str)
def test_a_number_or_a_tensor_is_a_constant(backend: str, device: str, delta: Any) -> None:
    case = make_case(torch.float32, 19)
    exact = case.exact(float(delta))
    logits = case.logits.to(device, copy=True).requires_grad_()
    arguments = (logits, case.labels.to(device), case.ref_logp.to(device))
    output = mpo_loss(*arguments, reward_shift=delta, backend=backend)
    assert float(output.reward_shift) == pytest.approx(float(delta), rel=1e-6)
    assert output.loss.item() == pytest.approx(float(exact.loss), rel=1e-6)


def test_none_is_zero(backend: str, device: str) -> None:
    case = make_case(torch.float32, 19)
    arguments = (case.logits.to(device), case.labels.to(device), case.ref_logp.to(device))
    none, zero = mpo_loss(*arguments, backend=backend), mpo_loss(*arguments, reward_shift=0.0, backend=backend)
    assert float(none.reward_shift) == 0
    assert torch.equal(none.loss, zero.loss)


def test_a_delta_that_requires_grad_gets_none(backend: str, device: str) -> None:
    case = make_case(torch.float32, 19)
    delta = torch.tensor(0.5, device=device, requires_grad=True)
    logits = case.logits.to(device, copy=True).requires_grad_()
    arguments = (logits, case.labels.to(device), case.ref_logp.to(device))
    mpo_loss(*arguments, reward_shift=delta, backend=backend).loss.backward()
    assert delta.grad is None


# State.


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_resumed_run_goes_on_as_if_nothing_happened(settings: dict[str, Any]) -> None:
    whole, first = RewardShift(**settings), RewardShift(**settings)
    updates = [(3.0, 2), (-1.0, 4), (2.5, 1), (7.0, 3), (0.5, 2)]
    for reward_sum, count in updates[:3]:
        whole.update(reward_sum, count)
        first.update(reward_sum, count)
    resumed = RewardShift(**settings)  # in the middle of an optimizer step, if per="optimizer_step"
    resumed.load_state_dict(first.state_dict())
    assert resumed.value == whole.value
    for reward_sum, count in updates[3:]:
        whole.update(reward_sum, count)
        resumed.update(reward_sum, count)
        assert resumed.value == whole.value
    whole.step()
    resumed.step()
    assert resumed.value == whole.value
    assert resumed.state_dict() == whole.state_dict()


def test_the_state_is_a_copy_that_can_be_saved(tmp_path: Any) -> None:
    shift = RewardShift()
    shift.update(1.0, 1)
    state = shift.state_dict()
    torch.save(state, tmp_path / "state.pt")
    shift.update(3.0, 1)
    assert shift.value == 2.0
    shift.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert shift.value == 1.0
    shift.load_state_dict(state)
    assert shift.value == 1.0


@pytest.mark.parametrize(
    ("name", "other"),
    [("mode", "ema"), ("update", "after"), ("decay", 0.5), ("per", "optimizer_step")],
)
def test_a_state_of_other_settings_is_refused(name: str, other: Any) -> None:
    settings: dict[str, Any] = {"mode": "cumulative", "update": "before", "decay": 0.99, "per": "micro_batch"}
    settings[name] = other
    if name == "per":
        settings["update"] = "after"
        shift = RewardShift(update="after")
    else:
        shift = RewardShift()
    with pytest.raises(ValueError, match=name):
        shift.load_state_dict(RewardShift(**settings).state_dict())


def test_train_and_eval_can_be_chained_and_undone(backend: str, device: str) -> None:
    shift = RewardShift()
    (case,) = batches(1)
    logits = case.logits.to(device, copy=True).requires_grad_()
    arguments = (logits, case.labels.to(device), case.ref_logp.to(device))
    shift.eval()
    mpo_loss(*arguments, reward_shift=shift, backend=backend)
    assert shift.value == 0
    shift.train()
    mpo_loss(*arguments, reward_shift=shift, backend=backend)
    assert shift.value != 0


# Errors.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mean"}, r"^mode must .*'mean'"),
        ({"update": "during"}, r"^update must .*'during'"),
        ({"per": "epoch"}, r"^per must .*'epoch'"),
        ({"mode": "ema", "decay": -0.1}, r"^decay must .*-0\.1"),
        ({"mode": "ema", "decay": 1.5}, r"^decay must .*1\.5"),
        ({"mode": "ema", "decay": math.nan}, r"^decay must .*nan"),
        ({"value": math.nan}, r"^value must .*nan"),
        ({"per": "optimizer_step"}, r"^(update|per) must .*optimizer_step"),
        ({"mode": "ema", "update": "before", "per": "optimizer_step"}, r"^(update|per) must .*optimizer_step"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardShift(**settings)


def test_a_fixed_value_does_not_change_on_resume() -> None:
    state = RewardShift("fixed", value=0.5).state_dict()
    RewardShift("fixed", value=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state must come from a RewardShift with value=5\.0, got 0\.5"):
        RewardShift("fixed", value=5.0).load_state_dict(state)


def test_an_instance_of_inference_mode_can_train() -> None:
    with torch.inference_mode():
        reward_shift = RewardShift()
    reward_shift.update(1.0, 2)
    assert reward_shift.value == 0.5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_batch_does_not_count_twice(use_reentrant: bool) -> None:
    reward_shift, logits = RewardShift(), torch.randn(2, 4, 8, requires_grad=True)
    labels, ref_logp = torch.randint(8, (2, 4)), torch.zeros(2)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return mpo_loss(logits, labels, ref_logp, reward_shift=reward_shift).loss

    loss = torch.utils.checkpoint.checkpoint(loss_of, logits, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="reward_shift must not be updated twice for a batch"):
        loss.backward()
