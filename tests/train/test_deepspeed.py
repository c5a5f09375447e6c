"""Compares DeepSpeed runs of two ranks with runs of one process. Also resumes DeepSpeed runs.

``make deepspeed-check`` runs all combinations; CI runs a few of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_folders
import pytest
import torch
from run_recipe import Job, log_of, result_of, run, signal_at_forward, text_of
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="needs the extra deepspeed, which dev installs")

ALL = os.environ.get("MPO_DEEPSPEED_ALL") == "1"
only_in_all = pytest.mark.skipif(not ALL, reason="part of make deepspeed-check")
# Six steps; the last of an epoch has one pair, so one of two ranks has none. The learning rate differs in each step.
_BASE = {
    "optim__batch_size": 5, "optim__micro_batch_size": 2, "optim__epochs": 2, "optim__warmup_ratio": 0.4,
    "optim__schedule": "cosine", "optim__weight_decay": 0.1, "output__save_every": 2,
    "reward_shift__mode": "ema", "reward_shift__update": "after", "reward_shift__per": "optimizer_step",
}  # fmt: skip
_TRAINED = {"full": {}, "lora": {"model__lora": {"rank": 4}}}
_LOSSES = {"linear": {}, "from_logits": {"loss__from_logits": True}}
_REFERENCES = {kind: {"reference__kind": kind} for kind in ("copy", "adapter", "precomputed")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    model_folders.write_qwen2(folder / "qwen2")
    model_folders.write_qwen2(folder / "tied", tied=True)
    model_folders.write_qwen2(folder / "other", seed=1)
    model_folders.write_llava(folder / "llava")
    model_folders.write_pairs(folder / "text", 11, images=False)
    model_folders.write_pairs(folder / "images", 11, images=True)
    return folder


@pytest.fixture(scope="module")
def job_of(folder: Path) -> Callable[..., Job]:
    def job_of(out: str, model: str, stage: int, *, zero: dict[str, Any] | None = None, **settings: Any) -> Job:
        pairs = folder / ("images" if model == "llava" else "text") / "pairs.jsonl"
        job = Job(folder / out, pairs, {**_BASE, **settings}, model=folder / model)
        return dataclasses.replace(job, world_size=2, zero={"stage": stage, **(zero or {})}) if stage else job

    return job_of


@pytest.fixture(scope="module")
def single(job_of: Callable[..., Job]) -> Callable[..., Job]:
    """Returns a function that runs a job in one process. Runs with equal settings are cached."""
    jobs: dict[str, Job] = {}

    def single(model: str, **settings: Any) -> Job:
        key = f"{model} {sorted(settings.items())}"
        if key not in jobs:
            job = job_of(f"single-{len(jobs)}", model, 0, **settings)
            assert run(job) == [0], text_of(job)
            jobs[key] = job
        return jobs[key]

    return single


@pytest.fixture(scope="module")
def questions(folder: Path) -> Path:
    """Returns a file of seven questions, some with an image."""
    lines = [json.loads(line) for line in (folder / "images" / "pairs.jsonl").read_text().splitlines()[:7]]
    lines = [{"question": line["question"], "images": line.get("images", []), "answer_gt": "5"} for line in lines]
    path = folder / "images" / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def final(job: Job) -> dict[str, torch.Tensor]:
    """Returns the tensors of the exported model, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (job.out / "final").rglob("*.safetensors"):
        tensors.update({f"{path.parent.name}/{name}": value for name, value in load_file(path).items()})
    return tensors


def assert_equal(job: Job, expected: Job, atol: float = 1e-5) -> None:
    """Compares two runs: all values of the log, the weights in memory, and the exported weights."""
    lines, truth = log_of(job), log_of(expected)
    assert len(lines) == len(truth) == 6
    for line, other in zip(lines, truth, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if (name, line["step"]) == ("reward_accuracy", 1):  # all rewards are 0 except for rounding
                continue
            assert line[name] == pytest.approx(value, abs=atol, rel=atol), f"{name} in step {line['step']}"
    pairs = [(final(job), final(expected))]
    pairs += [(result_of(job, rank)["weights"], result_of(expected)["weights"]) for rank in range(job.world_size)]
    for weights, other_weights in pairs:
        assert weights.keys() == other_weights.keys()
        for name, value in other_weights.items():
            torch.testing.assert_close(weights[name], value, atol=atol, rtol=0, msg=name)


def assert_same_bits(tensors: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == truth.keys()
    assert truth
    for name, value in truth.items():
        assert torch.equal(tensors[name], value), name


def check(
    job_of: Callable[..., Job],
    single: Callable[..., Job],
    model: str,
    stage: int,
    zero: dict[str, Any] | None = None,
    **settings: Any,
) -> Job:
    name = f"zero{stage}-{model}-{abs(hash(str((zero, settings)))):x}"
    job = job_of(name, model, stage, zero=zero, **settings)
    # With offloading, DeepSpeed compiles its Adam at the first start.
    assert run(job, limit_s=120 if zero is None else 400) == [0, 0], text_of(job)
    assert_equal(job, single(model, **settings))
    return job


def test_zero3_trains_an_image_model_as_one_process_does(
    job_of: Callable[..., Job], single: Callable[..., Job]
) -> None:
    """Compares two ranks with one process. Some pairs have no image, so a rank may have a batch without images.

    The reference is a copy of the policy.
    """
    job = check(job_of, single, "llava", 3)
    assert "(shared prefix), checked on the first pairs" in text_of(job)
    assert "agree" in text_of(job)


def test_zero3_trains_adapters_as_one_process_does(job_of: Callable[..., Job], single: Callable[..., Job]) -> None:
    check(job_of, single, "qwen2", 3, **_TRAINED["lora"], output__save_merged=True)


def test_zero2_trains_as_one_process_does(job_of: Callable[..., Job], single: Callable[..., Job]) -> None:
    check(job_of, single, "qwen2", 2)


_ENDS = [(stage, sent, trained) for trained in _TRAINED for stage in (3, 2, 1)
         for sent in (signal.SIGKILL, signal.SIGTERM)]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "sent", "trained"), [_ENDS[0], *(pytest.param(*end, marks=only_in_all) for end in _ENDS[1:])]
)
def test_a_run_resumes_bit_for_bit(stage: int, sent: signal.Signals, trained: str, job_of: Callable[..., Job]) -> None:
    settings = {"lora": {"model__lora": {"rank": 4, "dropout": 0.2}}, "full": {}}[trained]
    whole = job_of(f"whole-{stage}-{trained}", "qwen2", stage, **settings)
    if not whole.out.exists():
        assert run(whole) == [0, 0], text_of(whole)
    job = job_of(f"ended-{stage}-{sent}-{trained}", "qwen2", stage, **settings)
    hook = functools.partial(signal_at_forward, 7, [sent], 1)  # only one rank gets the signal
    codes = run(dataclasses.replace(job, hook=hook))
    assert codes == [143, 143] if sent == signal.SIGTERM else codes[1] == -9, text_of(job)
    assert 0 < len(log_of(job)) < 6
    other = dataclasses.replace(job, world_size=1)
    assert run(other) == [1]
    assert "must be resumed by the 2 processes that saved it, got 1" in text_of(other)
    assert run(job) == [0, 0], text_of(job)
    assert log_of(job) == log_of(whole)
    assert_same_bits(final(job), final(whole))
    assert_same_bits(result_of(job)["weights"], result_of(whole)["weights"])


_ASKED = [(2, {"model__lora": {"rank": 4, "dropout": 0.2}}), (3, {}), (1, {}), (2, {"precision": "bf16"}),
          (3, {"model__lora": {"rank": 4, "dropout": 0.2}, "model__gradient_checkpointing": True})]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "settings"), [_ASKED[0], *(pytest.param(*case, marks=only_in_all) for case in _ASKED[1:])]
)
def test_training_is_the_same_with_and_without_questions(
    stage: int, settings: dict[str, Any], job_of: Callable[..., Job], questions: Path
) -> None:
    """Generating answers for ``output.eval_generate`` on all ranks leaves training unchanged, bit for bit."""
    name = f"asked-{stage}-{len(str(settings))}"
    generation = {"path": str(questions), "every": 2, "max_new_tokens": 5, "style": "direct", "prompt": "none",
                  "batch_size": 2, "matcher": {"kind": "number"}, "image_root": str(questions.parent)}  # fmt: skip
    plain = job_of(f"{name}-plain", "llava", stage, **settings)
    asked = job_of(name, "llava", stage, **settings, output__eval_generate=generation)
    for job in (plain, asked):
        assert run(job) == [0, 0], text_of(job)
    lines = log_of(asked)
    scores = [line for line in lines if "eval_questions" in line]
    assert [(line["step"], line["eval_questions"]) for line in scores] == [(2, 7), (4, 7), (6, 7)]
    assert [line for line in lines if "loss" in line] == log_of(plain)
    for rank in range(2):
        assert_same_bits(result_of(asked, rank)["weights"], result_of(plain, rank)["weights"])
    assert_same_bits(final(asked), final(plain))
    answers = (asked.out / "answers" / "step-00000006.jsonl").read_text().splitlines()
    asked_questions = [json.loads(line)["question"] for line in questions.read_text().splitlines()]
    assert [json.loads(line)["question"] for line in answers] == asked_questions
    assert all("problem" not in json.loads(line) for line in answers)


@only_in_all
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_answers_are_those_of_one_process(
    stage: int, job_of: Callable[..., Job], single: Callable[..., Job], questions: Path
) -> None:
    generation = {"path": str(questions), "every": 3, "max_new_tokens": 5, "style": "direct", "prompt": "none",
                  "batch_size": 1, "image_root": str(questions.parent)}  # fmt: skip
    settings = {"output__eval_generate": generation}
    job, expected = job_of(f"answers-{stage}", "llava", stage, **settings), single("llava", **settings)
    assert run(job) == [0, 0], text_of(job)
    for step in (3, 6):
        ours, truth = (each.out / "answers" / f"step-{step:08}.jsonl" for each in (job, expected))
        assert ours.read_text() == truth.read_text()


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=only_in_all) for stage in (1, 2))])
def test_a_reference_file_of_another_model_is_refused(stage: int, job_of: Callable[..., Job], folder: Path) -> None:
    settings = {"reference__kind": "precomputed", "reference__file": str(folder / f"reference-{stage}.jsonl")}
    job = job_of(f"file-{stage}", "qwen2", stage, **settings)
    assert run(job) == [0, 0], text_of(job)
    single = job_of(f"file-{stage}-single", "qwen2", 0, **settings)
    assert run(single) == [0], text_of(single)
    other = job_of(f"file-{stage}-other", "other", stage, **settings)
    assert run(other) == [1, 1]
    assert "is stale" in text_of(other)


@only_in_all
@pytest.mark.parametrize("reference", _REFERENCES)
@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("trained", _TRAINED)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_combinations(
    stage: int, trained: str, loss: str, reference: str, job_of: Callable[..., Job], single: Callable[..., Job]
) -> None:
    if (trained, reference) == ("full", "adapter"):
        pytest.skip("a full model has no adapters")
    check(job_of, single, "qwen2", stage, **_TRAINED[trained], **_LOSSES[loss], **_REFERENCES[reference])


@only_in_all
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["tied", "llava"])
@pytest.mark.parametrize("trained", _TRAINED)
def test_all_models(
    stage: int, model: str, trained: str, job_of: Callable[..., Job], single: Callable[..., Job]
) -> None:
    check(job_of, single, model, stage, **_TRAINED[trained])


@only_in_all
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("device", ["optimizer", "parameters"])
def test_offloading(stage: int, device: str, job_of: Callable[..., Job], single: Callable[..., Job]) -> None:
    if (stage, device) == (2, "parameters"):
        pytest.skip("ZeRO-2 offloads no parameters")
    zero = {"offload_optimizer": {"device": "cpu"}}
    if device == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    check(job_of, single, "qwen2", stage, zero=zero)


@only_in_all
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradient_checkpointing(stage: int, job_of: Callable[..., Job], single: Callable[..., Job]) -> None:
    check(job_of, single, "llava", stage, model__gradient_checkpointing=True)


@only_in_all
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_policy_and_reference_agree_in_bfloat16(stage: int, job_of: Callable[..., Job]) -> None:
    """DeepSpeed casts the policy's weights to bfloat16, so the reference must be cast in the same way."""
    job = job_of(f"bf16-{stage}", "llava", stage, precision="bf16")
    assert run(job) == [0, 0], text_of(job)
    assert abs(log_of(job)[0]["chosen_reward"]) < 1e-6
    assert "agree" in text_of(job)


@only_in_all
@pytest.mark.parametrize("stage", [2, 3, "FSDP2"])
def test_qlora(stage: Any, job_of: Callable[..., Job], single: Callable[..., Job]) -> None:
    """Exporting the merged model gathers and dequantizes the sharded 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora, which dev installs")
    settings = {"model__lora": {"rank": 4, "quantization": "4bit"}, "output__save_merged": True}
    if stage != "FSDP2":
        check(job_of, single, "llava", stage, **settings)
        return
    job = dataclasses.replace(job_of("fsdp2-qlora", "llava", 0, **settings), world_size=2, sharded=True)
    assert run(job) == [0, 0], text_of(job)
    assert_equal(job, single("llava", **settings))
