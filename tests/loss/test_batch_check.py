"""Tests that ``check_batch`` finds planted mistakes and reports nothing for correct batches."""

import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_ext import (
    BatchFinding,
    MPOConfig,
    RewardShift,
    check_batch,
    linear_mpo_loss,
    mpo_loss,
    sequence_sums,
    shift_labels,
    token_logp,
)

VOCAB, PAD = 50, 0


class Letters:
    """A minimal tokenizer: it decodes each id to a letter."""

    pad_token_id = PAD

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + token) for token in ids)


def batch(seed: int, pairs: int = 3, *, confidence: float = 6.0, packed: bool = False) -> dict[str, Any]:
    """Returns a batch without mistakes: most labels are likely, and the reference is close to the policy."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(rng.randint(2, 9))] for _ in range(pairs)]
    rows, masks = [], []
    for number in range(2 * pairs):
        prompt = prompts[number % pairs]
        response = [rng.randrange(1, VOCAB) for _ in range(rng.randint(4, 12))]
        rows.append(prompt + response)
        masks.append([-100] * len(prompt) + response)
    cu_seqlens = None
    if packed:
        ids, labels = (torch.tensor(list(itertools.chain(*lists))) for lists in (rows, masks))
        cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()])
    else:
        length = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
        labels = torch.tensor([mask + [-100] * (length - len(mask)) for mask in masks])
    following = shift_labels(ids, 1, cu_seqlens)
    logits = torch.randn(*ids.shape, VOCAB, generator=generator)
    noise = torch.rand(ids.shape, generator=generator)
    logits.scatter_add_(-1, following.unsqueeze(-1), (confidence * noise).unsqueeze(-1))
    values = {"logits": logits, "labels": labels, "input_ids": ids, "cu_seqlens": cu_seqlens, "tokenizer": Letters()}
    values["ref_logp"] = sums(values) + 0.01 * torch.randn(2 * pairs, generator=generator)
    return values


def sums(values: dict[str, Any], labels: Tensor | None = None) -> Tensor:
    aligned = shift_labels(values["labels"] if labels is None else labels, cu_seqlens=values["cu_seqlens"])
    return sequence_sums(token_logp(values["logits"], aligned, shift=False), values["cu_seqlens"])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_right_batches_have_no_findings(packed: bool) -> None:
    for seed in range(25):
        values = batch(seed, random.Random(seed).randint(1, 5), confidence=seed % 7, packed=packed)
        assert check_batch(**values, reward_shift=RewardShift()) == []
        for left_out in ("tokenizer", "input_ids", "ref_logp"):
            values[left_out] = None
            assert check_batch(**values) == []


def test_hidden_states_and_aligned_labels_are_right_too() -> None:
    values = batch(1)
    head = torch.eye(VOCAB)
    assert check_batch(**values, weight=head) == []
    assert check_batch(**values, weight=head / 4, logit_scale=2.0, temperature=0.5) == []
    assert check_batch(**values, weight=head / 4) != []  # these logits do not fit the reference
    aligned = shift_labels(values["labels"])
    assert check_batch(**{**values, "labels": aligned}, shift=False) == []


def interleaved(tensor: Tensor) -> Tensor:
    return torch.stack(tensor.chunk(2), 1).flatten(0, 1)


MISTAKES: dict[str, tuple[str, Any]] = {
    "shifted twice": ("labels shifted", lambda v: {"labels": shift_labels(v["labels"])}),
    "shifted twice, no ids": ("labels shifted", lambda v: {"labels": shift_labels(v["labels"]), "input_ids": None}),
    "not shifted": ("labels shifted", lambda v: {"shift": False}),
    "interleaved": (
        "pairs interleaved",
        lambda v: {name: interleaved(v[name]) for name in ("logits", "labels", "input_ids", "ref_logp")},
    ),
    "mean": (
        "mean instead of sum",
        lambda v: {"ref_logp": v["ref_logp"] / (v["labels"][:, 1:] != -100).sum(1)},
    ),
    "prompt": ("prompt not masked", lambda v: {"labels": v["input_ids"].where(v["input_ids"] != PAD, -100)}),
    "padding": (
        "padding not masked",
        lambda v: {"labels": v["labels"].where(v["input_ids"] != PAD, PAD)},
    ),
    "nothing labelled": ("no labels", lambda v: {"labels": torch.full_like(v["labels"], -100)}),
    "out of range": ("label out of range", lambda v: {"labels": v["labels"].where(v["labels"] < 30, VOCAB)}),
    "reference swapped": ("reference in another order", lambda v: {"ref_logp": v["ref_logp"].roll(3)}),
    "reference of other tokens": (
        "reference of other tokens",
        lambda v: {"ref_logp": sums(v, torch.where(v["labels"] == -100, -100, (v["labels"] + 1) % VOCAB))},
    ),
    "NaN logits": ("not finite", lambda v: {"logits": torch.full_like(v["logits"], torch.nan)}),
    "NaN reference": ("not finite", lambda v: {"ref_logp": v["ref_logp"] * torch.nan}),
    "infinite reference": ("not finite", lambda v: {"ref_logp": v["ref_logp"].where(v["ref_logp"] > 0, -torch.inf)}),
    "no reward shift": ("no reward shift", lambda v: {"reward_shift": None}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_found(name: str) -> None:
    kind, change = MISTAKES[name]
    for seed in range(10):
        values = batch(seed)
        findings = check_batch(**{**values, **change(values)})
        assert [finding.kind for finding in findings[:1]] == [kind], (seed, findings)
        assert kind != "not finite" or len(findings) == 1  # such values are not compared


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(
    ("times", "shift", "advice"),
    [
        (0, False, "the labels are not shifted: pass shift=True, or shift_labels(labels)"),
        (1, True, "the labels are shifted already: pass shift=False, or labels that equal input_ids"),
        (2, False, "1 position too early: the label at position t must be the token at position t + 1; were the labels"
                   " shifted twice?"),
        (-1, True, "1 position too late: the label at position t must be the token at position t"),
    ],
)  # fmt: skip
def test_shifted_labels_get_advice(times: int, shift: bool, advice: str, with_ids: bool) -> None:
    values = batch(0, confidence=6)
    padded = torch.nn.functional.pad(values["labels"], (2, 2), value=-100)
    values["labels"] = padded[:, 2 + times :][:, : values["logits"].shape[1]]
    if not with_ids:
        values["input_ids"] = None
    kinds = {finding.kind: finding.message for finding in check_batch(**values, shift=shift)}
    assert advice in kinds["labels shifted"]


def test_findings_name_their_evidence() -> None:
    values = batch(0)
    values["labels"][4, -1] = values["labels"][4, -2] = 77
    (finding,) = check_batch(**values)
    assert isinstance(finding, BatchFinding)
    assert "labels of rejected 1 are neither -100 nor in [0, 50), as 77 at position" in str(finding)
    assert check_batch(**batch(0), reward_shift=None, config=MPOConfig(bco_weight=0.0)) == []
    with pytest.raises(ValueError, match="input_ids must have the shape of labels"):
        check_batch(**{**batch(0), "input_ids": torch.zeros(1)})


def test_debug_mode_checks_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    values = batch(0)
    arguments = {name: values[name] for name in ("logits", "labels", "ref_logp")}
    shifted = {**arguments, "labels": shift_labels(values["labels"])}
    hidden = {"hidden" if name == "logits" else name: value for name, value in shifted.items()}
    quiet = mpo_loss(**shifted, reward_shift=RewardShift())
    monkeypatch.setenv("MPO_DEBUG", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpo_loss(**arguments, reward_shift=RewardShift())
    for _ in range(2):
        with pytest.warns(UserWarning, match="MPO_DEBUG: labels shifted: labels have a log-prob of") as found:
            loud = mpo_loss(**shifted, reward_shift=RewardShift())
        assert found[0].filename == __file__
        assert "the labels are shifted already: pass shift=False" in str(found[0].message)
        assert torch.equal(loud.loss, quiet.loss)
    with pytest.warns(UserWarning, match="MPO_DEBUG: labels shifted"):
        linear_mpo_loss(**hidden, weight=torch.eye(VOCAB), reward_shift=RewardShift())
    with pytest.warns(UserWarning, match="MPO_DEBUG: no reward shift"):
        mpo_loss(**arguments)
    for value in ("yes", "true", "2"):
        monkeypatch.setenv("MPO_DEBUG", value)
        with pytest.raises(ValueError, match=f"MPO_DEBUG must be 0 or 1 in the environment, got '{value}'"):
            mpo_loss(**arguments)
    monkeypatch.setenv("MPO_DEBUG", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpo_loss(**shifted)
