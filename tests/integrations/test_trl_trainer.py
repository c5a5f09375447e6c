"""Tests MPOTrainer and the patch of TRL. The expected results come from TRL and from plain float64 torch."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed_runs
import peft
import plain
import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
import two_ranks

import mpo_ext
from mpo_ext import RewardShift
from mpo_ext.integrations import patching
from mpo_ext.integrations.sources import KnownSources

if os.environ.get("CI") == "true":
    import trl
else:
    trl = pytest.importorskip("trl", reason="needs the extra trl, which dev installs with Python 3.11 and later")

from mpo_ext.integrations.trl import MPOTrainer, MPOTrainingConfig

MPO_TERMS = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
SAME_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
              "logps/rejected", "entropy", "num_tokens", "grad_norm")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    names = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "text": tiny_models.save_text_model(folder / "text"),
        "images": tiny_models.save_image_model(folder / "images"),
    }


def arguments(kind: type, folder: Path, **settings: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 10, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "seed": 0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": None, "disable_tqdm": True, "optim": "adamw_torch",
    }  # fmt: skip
    return kind(**{**values, **MPO_TERMS, **settings})


def make(
    kind: type,
    models: dict[str, Path],
    family: str,
    folder: Path,
    *,
    lora: bool = False,
    shift: RewardShift | None = None,
    **settings: Any,
) -> Any:
    is_mpo = issubclass(kind, MPOTrainer)
    options: dict[str, Any] = {"reward_shift": shift} if is_mpo else {}
    if lora:
        options["peft_config"] = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    processor = (transformers.AutoTokenizer if family == "text" else transformers.AutoProcessor).from_pretrained(
        models[family]
    )
    model = settings.pop("model", str(models[family]))
    torch.manual_seed(0)  # TRL before 1.15 makes the adapters before it sets the seed
    return kind(
        model, settings.pop("ref_model", None),
        args=arguments(MPOTrainingConfig if is_mpo else trl.DPOConfig, folder, **settings),
        train_dataset=tiny_models.pairs(images=family == "images"), processing_class=processor, **options,
    )  # fmt: skip


def train(trainer: Any, **options: Any) -> list[dict[str, Any]]:
    trainer.train(**options)
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same_run(ours: Any, theirs: Any, our_log: list[dict[str, Any]], their_log: list[dict[str, Any]]) -> None:
    assert len(our_log) == len(their_log) > 0
    for step, (our_line, their_line) in enumerate(zip(our_log, their_log, strict=True)):
        for name in SAME_NAMES:
            if name == "rewards/accuracies" and step == 0:
                continue  # policy and reference agree, so rounding decides
            assert our_line[name] == pytest.approx(their_line[name], rel=1e-5, abs=1e-5), f"{name} of step {step}"
    for (name, one), two in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("reward_shift", "cumulativ"), ("reward_shift_update", "later"), ("reward_shift_per", "step"),
     ("reward_shift_decay", 2.0), ("ntp_average", "word"), ("label_smoothing", 0.7)],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_its_name(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .*{value}"):
        arguments(MPOTrainingConfig, tmp_path, **{name: value})


def test_the_reward_shift_of_a_patch_is_a_mapping() -> None:
    with pytest.raises(TypeError, match=r"^reward_shift must be a mapping of the settings of RewardShift, got 'ema'"):
        mpo_ext.patch("trl", reward_shift="ema")


def test_a_config_of_trl_without_the_three_terms_gives_a_warning(models: dict[str, Path], tmp_path: Path) -> None:
    options = {"train_dataset": tiny_models.pairs(), "processing_class": None}
    with pytest.warns(UserWarning, match=r"terms of loss_type alone, got \['sigmoid'\] in a DPOConfig: MPOTraining"):
        MPOTrainer(str(models["text"]), args=trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MPOTrainer computes")
        MPOTrainer(str(models["text"]), args=arguments(trl.DPOConfig, tmp_path), **options)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["text", "images"])
def test_ten_steps_without_a_reward_shift_are_those_of_trl(
    models: dict[str, Path], tmp_path: Path, family: str, lora: bool
) -> None:
    theirs = make(trl.DPOTrainer, models, family, tmp_path, lora=lora)
    ours = make(MPOTrainer, models, family, tmp_path, lora=lora, shift=RewardShift("fixed"))
    their_log, our_log = train(theirs), train(ours)
    assert_same_run(ours, theirs, our_log, their_log)
    for line in our_log:
        terms = 0.8 * line["loss/dpo"] + 0.2 * line["loss/bco"] + line["loss/ntp"]
        assert line["loss"] == pytest.approx(terms, rel=1e-6)


def _versions() -> list[str]:
    return list(patching.KNOWN["trl"].versions)


def test_the_patch_leaves_the_losses_and_is_undone(
    models: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(vars(trl.DPOTrainer))
    theirs = make(trl.DPOTrainer, models, "text", tmp_path, gradient_accumulation_steps=2, max_steps=4)
    their_log = train(theirs)
    mpo_ext.patch("trl")
    try:
        assert "trl 1." in capsys.readouterr().err
        with pytest.raises(RuntimeError, match="'trl', which is patched"):
            mpo_ext.patch("trl")
        known = {**patching.KNOWN, "axolotl": KnownSources("trl", "axolotl", {version: {} for version in _versions()})}
        monkeypatch.setattr(patching, "KNOWN", known)  # as if axolotl, whose loss is TRL's, were installed
        with pytest.raises(RuntimeError, match=r"must be without a patch for patch\('axolotl'\), got that of 'trl'"):
            mpo_ext.patch("axolotl")
        ours = make(trl.DPOTrainer, models, "text", tmp_path, gradient_accumulation_steps=2, max_steps=4)
        our_log = train(ours)
        other = make(trl.DPOTrainer, models, "text", tmp_path, loss_type=["hinge"], loss_weights=None, max_steps=1)
        assert "loss/dpo" not in train(other)[0], "another loss stays TRL's"
        assert make(MPOTrainer, models, "text", tmp_path).reward_shift.mode == "cumulative"
    finally:
        mpo_ext.unpatch("trl")
    assert_same_run(ours, theirs, our_log, their_log)
    assert "loss/dpo" in our_log[0]
    assert dict(vars(trl.DPOTrainer)) == own
    with pytest.raises(RuntimeError, match="not patched"):
        mpo_ext.unpatch("trl")


def test_a_patched_trainer_has_the_reward_shift_that_the_patch_asks_for(
    models: dict[str, Path], tmp_path: Path
) -> None:
    mpo_ext.patch("trl", reward_shift={"mode": "cumulative"})
    try:
        log = train(make(trl.DPOTrainer, models, "text", tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
        again = make(trl.DPOTrainer, models, "text", tmp_path, max_steps=4)
        resumed = train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        alone = make(trl.DPOTrainer, models, "text", tmp_path, max_steps=1, loss_type=["sigmoid"], loss_weights=None)
        with pytest.warns(UserWarning, match="the loss of DPOTrainer has no BCO term"):
            train(alone)
    finally:
        mpo_ext.unpatch("trl")
    truth = train(make(MPOTrainer, models, "text", tmp_path, max_steps=4))
    assert [line["reward_shift"] for line in log] == [line["reward_shift"] for line in truth]
    assert log[-1]["reward_shift"] != 0
    assert [line["loss"] for line in resumed] == [line["loss"] for line in log]


class Recorder:
    """A collator that records the token ids of its batches."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.batches = collator, []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        self.batches.append([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in examples])
        return self.collator(examples)


@pytest.mark.parametrize(
    "shift",
    [RewardShift(), RewardShift("ema", decay=0.5, update="after", per="optimizer_step")],
    ids=["authors", "per_step"],
)
def test_the_reward_shift_is_that_of_plain_float64(
    models: dict[str, Path], tmp_path: Path, shift: RewardShift
) -> None:
    shift = copy.deepcopy(shift)
    model = plain.widen(transformers.AutoModelForCausalLM.from_pretrained(models["text"]))
    reference, truth_model, truth_reference = (copy.deepcopy(model) for _ in range(3))
    trainer = make(
        MPOTrainer, models, "text", tmp_path, shift=shift, model=model, ref_model=reference,
        gradient_accumulation_steps=2, max_steps=5,
    )  # fmt: skip
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    log = train(trainer)
    settings = plain.Settings(
        average_over="micro_batch", weight_decay=0.0, warmup_ratio=0.0, schedule="constant", shift_mode=shift.mode,
        shift_decay=shift.decay, shift_update=shift.update_order, shift_per=shift.per,
    )  # fmt: skip
    batches = [[plain.Pair(*map(tuple, ids), None) for ids in batch] for batch in recorder.batches[:10]]
    steps = [batches[first : first + 2] for first in range(0, 10, 2)]
    truth = list(plain.train(truth_model, truth_reference, steps, settings))
    for line, expected in zip(log, truth, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["rewards/margins"] == pytest.approx(expected["reward_margin"], abs=1e-6)
    assert shift.value == pytest.approx(truth[-1]["reward_shift"], rel=1e-6)
    assert shift.value != 0
    for (name, one), two in zip(trainer.model.named_parameters(), truth_model.parameters(), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-7, msg=name)


def saved(model: Path, folder: Path, per: str) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3,
        "reward_shift_per": per, "reward_shift_update": "after",
    }  # fmt: skip
    return make(MPOTrainer, {"text": model}, "text", folder, **settings)


def run_until_killed(model: str, folder: str, per: str) -> None:
    train(saved(Path(model), Path(folder), per))


@pytest.mark.parametrize("per", ["micro_batch", "optimizer_step"])
def test_a_killed_run_resumes_as_the_uninterrupted_run(models: dict[str, Path], tmp_path: Path, per: str) -> None:
    whole = saved(models["text"], tmp_path / "whole", per)
    log = train(whole)
    killed_runs.kill_in_step(6, "test_trl_trainer", models["text"], tmp_path, per)
    state = json.loads((tmp_path / "checkpoint-3" / "reward_shift.json").read_text())
    assert state["count"] == (6 if per == "micro_batch" else 3)
    resumed = saved(models["text"], tmp_path, per)
    resumed_log = train(resumed, resume_from_checkpoint=True)
    assert resumed.reward_shift.state_dict() == whole.reward_shift.state_dict()
    for name in ("loss", "reward_shift", "grad_norm"):
        assert [line[name] for line in resumed_log] == [line[name] for line in log]
    assert len(resumed_log) == 6, "the log holds the lines before the checkpoint, too"
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@contextlib.contextmanager
def patched_if(is_patched: bool) -> Iterator[None]:
    """Patches TRL in the ``with`` block if ``is_patched`` is True. The patch uses the reward shift of MPO."""
    if is_patched:
        mpo_ext.patch("trl", reward_shift={"mode": "cumulative"})
    try:
        yield
    finally:
        if is_patched:
            mpo_ext.unpatch("trl")


@pytest.mark.parametrize("kind", [MPOTrainer, trl.DPOTrainer], ids=["MPOTrainer", "patch"])
def test_a_resumed_run_has_the_trained_weights_of_an_image_model(
    kind: type, models: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    with patched_if(kind is trl.DPOTrainer):
        whole = make(kind, models, "images", tmp_path, **settings)
        log = train(whole)
        resumed = make(kind, models, "images", tmp_path, **settings)
        assert train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[-1]["loss"] == log[-1]["loss"]
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", [MPOTrainer, trl.DPOTrainer], ids=["MPOTrainer", "patch"])
def test_the_best_weights_of_an_image_model_are_loaded_at_the_end(
    kind: type, models: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    with patched_if(kind is trl.DPOTrainer):
        trainer = make(kind, models, "images", tmp_path, **settings)
        train(trainer)
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
        trainer._load_best_model()  # which Trainer calls for load_best_model_at_end
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    for one, two in zip(trainer.model.parameters(), best.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_with_other_weights_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(make(MPOTrainer, models, "text", tmp_path, **settings))
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["other.weight"] = weights.pop("model.norm.weight")
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    trainer = make(MPOTrainer, models, "text", tmp_path, **settings)
    with pytest.raises(ValueError, match=r"must have the weights of the model, got .*checkpoint-1 with 2 weights"):
        train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_without_a_reward_shift_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(make(trl.DPOTrainer, models, "text", tmp_path, **settings))
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"must be a checkpoint with a reward shift, got .*checkpoint-1 without"):
        train(make(MPOTrainer, models, "text", tmp_path, **settings), resume_from_checkpoint=checkpoint)
    fixed = make(MPOTrainer, models, "text", tmp_path, reward_shift="fixed", **settings)
    train(fixed, resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_precomputed_references_of_images_are_those_of_the_reference_model(
    models: dict[str, Path], tmp_path: Path, lora: bool
) -> None:
    if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 14):
        with pytest.raises(ValueError, match=r"must be False for images with TRL before 1\.14"):
            make(MPOTrainer, models, "images", tmp_path, lora=lora, max_steps=4, precompute_ref_log_probs=True)
        return
    plain_run = make(MPOTrainer, models, "images", tmp_path, lora=lora, max_steps=4)
    run = make(MPOTrainer, models, "images", tmp_path, lora=lora, max_steps=4, precompute_ref_log_probs=True)
    assert run.ref_model is None
    assert "ref_chosen_logps" in run.train_dataset.column_names
    for line, expected in zip(train(run), train(plain_run), strict=True):
        for name in ("loss", "reward_shift", "rewards/chosen"):
            assert line[name] == pytest.approx(expected[name], abs=2e-5)


def test_precomputed_references_of_text_are_those_of_the_reference_model(
    models: dict[str, Path], tmp_path: Path
) -> None:
    plain_run = make(MPOTrainer, models, "text", tmp_path, max_steps=3)
    run = make(MPOTrainer, models, "text", tmp_path, max_steps=3, precompute_ref_log_probs=True)
    for line, expected in zip(train(run), train(plain_run), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=2e-5)


def test_an_evaluation_logs_the_terms_and_leaves_the_reward_shift(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = make(MPOTrainer, models, "text", tmp_path, max_steps=2)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    train(trainer)
    before = trainer.reward_shift.state_dict()
    metrics = trainer.evaluate()
    terms = 0.8 * metrics["eval_loss/dpo"] + 0.2 * metrics["eval_loss/bco"] + metrics["eval_loss/ntp"]
    assert metrics["eval_loss"] == pytest.approx(terms, rel=1e-2)  # the mean of batches with other numbers of tokens
    assert metrics["eval_reward_shift"] == pytest.approx(before["value"])
    assert trainer.reward_shift.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ["ipo"], "loss_weights": None}, "loss_type must be among sigmoid, bco_pair, sft, got ipo"),
        ({"loss_type": ["ipo"]}, "loss_type must be among sigmoid, bco_pair, sft, got ipo"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False, got True"),
        ({"ld_alpha": 0.5}, "ld_alpha must be None, got 0.5"),
        ({"loss_type": ["sigmoid"], "loss_weights": None, "f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"use_weighting": True}, "use_weighting must be False"),
        ({"reward_shift": "mean"}, "reward_shift must be"),
    ],
)
def test_other_losses_are_refused(
    models: dict[str, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(MPOTrainer, models, "text", tmp_path, **settings)


def test_unknown_versions_and_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "trl.trainer.dpo_trainer:DPOTrainer._compute_loss"
    known = {
        "old": KnownSources("trl", "trl", {"90.1": {}, "90.12": {}}),
        "absent": KnownSources("no-such-package", "trl", {"1.2": {}}),
    }
    with monkeypatch.context() as change:
        change.setattr(patching, "KNOWN", known)
        with pytest.raises(RuntimeError, match=r"trl must have a version that mpo_ext knows \(90.1, 90.12\), got 1\."):
            mpo_ext.patch("old")
        with pytest.raises(ImportError, match=r"no-such-package must be installed: pip install .*==1.2.\*"):
            mpo_ext.patch("absent")
    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", lambda self: None)
    with pytest.raises(RuntimeError, match=f"{path} of trl 1.* must have the source that mpo_ext knows"):
        mpo_ext.patch("trl")
    with pytest.raises(ValueError, match=r"must be the name of a trainer .*, got 'tlr'.*'trl'"):
        mpo_ext.patch("tlr")
    monkeypatch.undo()
    with pytest.raises(TypeError, match="reward_shift must have keys among"):
        mpo_ext.patch("trl", reward_shift={"kind": "ema"})
    assert "trl" not in patching._applied


def _rank(rank: int, folder: str, text: str) -> None:
    two_ranks.join(rank, folder)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    models = {"text": Path(text)}
    settings: dict[str, Any] = {"max_steps": 4, "ddp_backend": "gloo"}
    theirs = make(trl.DPOTrainer, models, "text", Path(folder), **settings)
    ours = make(MPOTrainer, models, "text", Path(folder), shift=RewardShift("fixed"), **settings)
    shifted = make(MPOTrainer, models, "text", Path(folder), **settings)
    logs = {"theirs": train(theirs), "ours": train(ours), "shifted": train(shifted)}
    lines = {"logs": logs, "state": shifted.reward_shift.state_dict(), "world": shifted.accelerator.num_processes}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(lines))
    torch.distributed.destroy_process_group()


def test_two_ranks_are_those_of_trl_and_share_the_reward_shift(models: dict[str, Path], tmp_path: Path) -> None:
    two_ranks.spawn(_rank, tmp_path, str(models["text"]))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["world"] == 2
    for ours, theirs in zip(first["logs"]["ours"], first["logs"]["theirs"], strict=True):
        for name in {*SAME_NAMES} - {"rewards/accuracies"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert first["state"] == second["state"]
    assert first["state"]["count"] == 8, "each of two ranks counts in each of four steps"
    rewards = [line["rewards/chosen"] / 2 + line["rewards/rejected"] / 2 for line in first["logs"]["shifted"]]
    assert first["state"]["value"] == pytest.approx(sum(rewards) / 4, rel=1e-5)
