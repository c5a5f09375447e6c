"""Tests that invalid arguments raise the right exceptions. A message names the argument, the rule and the value."""

import dataclasses
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from devices import device_of
from torch import Tensor

from mpo_ext import MPOConfig, RewardShift, linear_mpo_loss, linear_token_logp, mpo_loss, token_logp

NEITHER_OR_BOTH = r"ref_logp.*ref_logits"


def good(packed: bool = False, **changes: Any) -> dict[str, Any]:
    """Returns valid arguments of mpo_loss for two pairs of four positions, updated with ``changes``."""
    arguments: dict[str, Any] = {
        "logits": torch.zeros(4, 4, 7),
        "labels": torch.ones(4, 4, dtype=torch.int64),
        "ref_logp": torch.zeros(4),
    }
    if packed:
        arguments["logits"] = arguments["logits"].flatten(0, 1)
        arguments["labels"] = arguments["labels"].flatten()
        arguments["cu_seqlens"] = torch.tensor([0, 3, 5, 9, 16], dtype=torch.int32)
    return {**arguments, **changes}


def packed_by(*offsets: int) -> dict[str, Any]:
    """Returns packed arguments of mpo_loss with ``offsets`` as cu_seqlens."""
    return good(packed=True, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def on_meta(name: str, **options: Any) -> dict[str, Any]:
    """Returns valid arguments of mpo_loss, except that the argument ``name`` is on the meta device."""
    arguments = good(**options)
    return {**arguments, name: arguments[name].to("meta")}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a tensor of zeros."""
    return torch.zeros(*shape, dtype=dtype)


ELSEWHERE = (ValueError, RuntimeError)
INT64 = torch.int64

MISTAKES: dict[str, tuple[dict[str, Any], Any, str]] = {
    # dtypes
    "logits int64": (good(logits=zeros(4, 4, 7, dtype=INT64)), TypeError, r"^logits must .*got torch\.int64"),
    "logits complex": (good(logits=zeros(4, 4, 7, dtype=torch.complex64)), TypeError, r"^logits must .*complex64"),
    "logits a list": (good(logits=[[1.0]]), TypeError, r"^logits must .*got list"),
    "labels float": (good(labels=zeros(4, 4)), TypeError, r"^labels must be .*int64, got torch\.float32"),
    "labels int32": (good(labels=zeros(4, 4, dtype=torch.int32)), TypeError, r"^labels must be .*int64, got .*int32"),
    "labels bool": (good(labels=zeros(4, 4, dtype=torch.bool)), TypeError, r"^labels must be .*int64, got .*bool"),
    "labels a list": (good(labels=[[1] * 4] * 4), TypeError, r"^labels must .*got list"),
    "ref_logp int64": (good(ref_logp=zeros(4, dtype=INT64)), TypeError, r"^ref_logp must .*got torch\.int64"),
    "ref_logp a list": (good(ref_logp=[0.0] * 4), TypeError, r"^ref_logp must .*got list"),
    "ref_logits int64": (
        good(ref_logp=None, ref_logits=zeros(4, 4, 7, dtype=INT64)),
        TypeError,
        r"^ref_logits must .*got torch\.int64",
    ),
    "cu_seqlens float": (
        good(packed=True, cu_seqlens=torch.tensor([0.0, 3, 5, 9, 16])),
        TypeError,
        r"^cu_seqlens must .*got torch\.float32",
    ),
    "cu_seqlens a list": (good(packed=True, cu_seqlens=[0, 3, 5, 9, 16]), TypeError, r"^cu_seqlens must .*got list"),
    # shapes
    "logits flat": (good(logits=zeros(7)), ValueError, r"^logits must .*\(7,\)"),
    "logits packed without cu_seqlens": (
        good(logits=zeros(16, 7), labels=zeros(16, dtype=INT64)),
        ValueError,
        r"^logits must .*cu_seqlens.*\(16, 7\)",
    ),
    "logits padded with cu_seqlens": (
        good(cu_seqlens=torch.tensor([0, 3, 5, 9, 16])),
        ValueError,
        r"^(logits|cu_seqlens) must .*\(4, 4, 7\)",
    ),
    "logits of an odd number of rows": (
        good(logits=zeros(3, 4, 7), labels=zeros(3, 4, dtype=INT64), ref_logp=zeros(3)),
        ValueError,
        r"^logits must .*got .*3",
    ),
    "logits of no pair": (
        good(logits=zeros(0, 4, 7), labels=zeros(0, 4, dtype=INT64), ref_logp=zeros(0)),
        ValueError,
        r"^logits must .*got .*0",
    ),
    "logits without a vocabulary": (good(logits=zeros(4, 4, 0)), ValueError, r"^logits must .*\(4, 4, 0\)"),
    "labels shorter": (good(labels=zeros(4, 3, dtype=INT64)), ValueError, r"^labels must .*\(4, 3\)"),
    "labels transposed": (
        good(logits=zeros(4, 2, 7), labels=zeros(2, 4, dtype=INT64)),
        ValueError,
        r"^labels must .*\(2, 4\)",
    ),
    "ref_logp of one side": (good(ref_logp=zeros(2)), ValueError, r"^ref_logp must .*\(2,\)"),
    "ref_logp per token": (good(ref_logp=zeros(4, 4)), ValueError, r"^ref_logp must .*\(4, 4\)"),
    "ref_logp a number": (good(ref_logp=torch.tensor(0.0)), ValueError, r"^ref_logp must .*\(\)"),
    "ref_logits of another shape": (
        good(ref_logp=None, ref_logits=zeros(4, 4, 6)),
        ValueError,
        r"^ref_logits must .*\(4, 4, 6\)",
    ),
    # the reference
    "no reference": (good(ref_logp=None), ValueError, NEITHER_OR_BOTH),
    "two references": (good(ref_logits=zeros(4, 4, 7)), ValueError, NEITHER_OR_BOTH),
    # packing
    "cu_seqlens decreasing": (packed_by(0, 5, 3, 9, 16), ValueError, r"^cu_seqlens must .*got .*3"),
    "cu_seqlens standing still": (packed_by(0, 5, 5, 9, 16), ValueError, r"^cu_seqlens must .*got .*5"),
    "cu_seqlens starting late": (packed_by(1, 3, 5, 9, 16), ValueError, r"^cu_seqlens must .*0.*got .*1"),
    "cu_seqlens ending early": (packed_by(0, 3, 5, 9, 15), ValueError, r"^cu_seqlens must .*16.*got .*15"),
    "cu_seqlens ending late": (packed_by(0, 3, 5, 9, 17), ValueError, r"^cu_seqlens must .*16.*got .*17"),
    "cu_seqlens of an odd number of sequences": (packed_by(0, 3, 5, 16), ValueError, r"^cu_seqlens must .*4"),
    "cu_seqlens of no sequence": (
        good(
            packed=True,
            logits=zeros(0, 7),
            labels=zeros(0, dtype=INT64),
            ref_logp=zeros(0),
            cu_seqlens=torch.tensor([0]),
        ),
        ValueError,
        r"^cu_seqlens must .*1",
    ),
    "cu_seqlens empty": (good(packed=True, cu_seqlens=zeros(0, dtype=INT64)), ValueError, r"^cu_seqlens must .*0"),
    "cu_seqlens of two axes": (
        good(packed=True, cu_seqlens=torch.tensor([[0, 3, 5, 9, 16]])),
        ValueError,
        r"^cu_seqlens must .*\(1, 5\)",
    ),
    # devices
    "logits elsewhere": (on_meta("logits"), ELSEWHERE, r"meta"),
    "labels elsewhere": (on_meta("labels"), ELSEWHERE, r"labels must .*meta"),
    "ref_logp elsewhere": (on_meta("ref_logp"), ELSEWHERE, r"ref_logp must .*meta"),
    "cu_seqlens elsewhere": (on_meta("cu_seqlens", packed=True), ELSEWHERE, r"cu_seqlens must .*meta"),
    # options
    "stats unknown": (good(stats=("entropy", "perplexity")), ValueError, r"^stats must .*'perplexity'"),
    "stats a bool": (good(stats=True), TypeError, r"^stats must be a sequence of names .*got True"),
    "stats one string": (good(stats="entropy"), (TypeError, ValueError), r"^stats must .*'entropy'"),
    "backend unknown": (good(backend="gpu"), ValueError, r"^backend must .*'gpu'"),
    "config a dict": (good(config={"beta": 0.1}), TypeError, r"^config must be an MPOConfig, got dict"),
    "reward_shift a string": (good(reward_shift="ema"), TypeError, r"^reward_shift must .*got str"),
    "reward_shift a vector": (good(reward_shift=zeros(2)), ValueError, r"^reward_shift must .*\(2,\)"),
    "reward_shift NaN": (good(reward_shift=math.nan), ValueError, r"^reward_shift must .*nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(backend: str, mistake: str) -> None:
    arguments, exception, message = MISTAKES[mistake]
    with pytest.raises(exception, match=f"(?s){message}"):
        mpo_loss(**{"backend": backend, **arguments})


def test_good_arguments_pass(backend: str) -> None:
    for arguments in (good(), good(packed=True), good(packed=True, cu_seqlens=torch.tensor([0, 1, 2, 3, 16]))):
        assert torch.isfinite(mpo_loss(**on(device_of(backend), arguments), backend=backend).loss)


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with their tensors moved to a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


TOKEN_MISTAKES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "logits int64": (
        lambda: token_logp(zeros(2, 7, dtype=INT64), zeros(2, dtype=INT64), shift=False),
        TypeError,
        r"^logits must",
    ),
    "labels float": (
        lambda: token_logp(zeros(2, 7), zeros(2), shift=False),
        TypeError,
        r"^labels must be .*int64, got .*float32",
    ),
    "labels too many": (
        lambda: token_logp(zeros(2, 7), zeros(3, dtype=INT64), shift=False),
        ValueError,
        r"^labels must .*\(2, 7\).*\(3,\)",
    ),
    "labels with an axis too many": (
        lambda: token_logp(zeros(2, 7), zeros(2, 1, dtype=INT64), shift=False),
        ValueError,
        r"^labels must .*\(2, 1\)",
    ),
    "labels elsewhere": (
        lambda: token_logp(zeros(2, 7), zeros(2, dtype=INT64).to("meta"), shift=False),
        ELSEWHERE,
        r"^labels must .*meta",
    ),
    "backend unknown": (
        lambda: token_logp(zeros(2, 7), zeros(2, dtype=INT64), backend="c++", shift=False),
        ValueError,
        r"^backend must .*'c\+\+'",
    ),
}


@pytest.mark.parametrize("mistake", TOKEN_MISTAKES)
def test_a_mistake_with_token_logp_is_named(mistake: str) -> None:
    call, exception, message = TOKEN_MISTAKES[mistake]
    with pytest.raises(exception, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_here_says_so(backend: str) -> None:
    with pytest.raises(RuntimeError, match=backend):
        mpo_loss(**good(), backend=backend)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": math.nan}, r"^beta must .*nan"),
        ({"beta": 0.0}, r"^beta must .*0\.0"),
        ({"beta": -0.1}, r"^beta must .*-0\.1"),
        ({"beta": math.inf}, r"^beta must .*inf"),
        ({"dpo_weight": -1.0}, r"^dpo_weight must .*-1\.0"),
        ({"bco_weight": -0.2}, r"^bco_weight must .*-0\.2"),
        ({"ntp_weight": -1e-9}, r"^ntp_weight must .*-1e-09"),
        ({"ntp_weight": math.nan}, r"^ntp_weight must .*nan"),
        ({"dpo_weight": 0.0, "bco_weight": 0.0, "ntp_weight": 0.0}, r"dpo_weight.*bco_weight.*ntp_weight"),
        ({"label_smoothing": 0.5}, r"^label_smoothing must .*0\.5"),
        ({"label_smoothing": -0.1}, r"^label_smoothing must .*-0\.1"),
        ({"label_smoothing": math.nan}, r"^label_smoothing must .*nan"),
        ({"ntp_average": "mean"}, r"^ntp_average must .*'mean'"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPOConfig(**settings)
    with pytest.raises(ValueError, match=message):
        MPOConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("key", "nearest"), [("bata", "beta"), ("dpo_wieght", "dpo_weight"), ("labelsmoothing", "label_smoothing")]
)
def test_an_unknown_setting_is_an_error_that_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"'{key}'.*'{nearest}'"):
        MPOConfig.from_dict({"beta": 0.1, key: 0.5})


def test_a_config_keeps_what_it_was_given() -> None:
    settings = {"beta": 0.2, "ntp_average": "sequence", "ignore_index": -1}
    config = MPOConfig.from_dict(settings)
    assert config == MPOConfig(**settings)
    assert (config.beta, config.ntp_average, config.ignore_index) == (0.2, "sequence", -1)
    assert dataclasses.asdict(MPOConfig()) == {
        "beta": 0.1,
        "dpo_weight": 0.8,
        "bco_weight": 0.2,
        "ntp_weight": 1.0,
        "label_smoothing": 0.0,
        "ntp_average": "token",
        "ignore_index": -100,
    }


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MPOConfig().beta = 0.2  # type: ignore[misc]
    with pytest.raises(TypeError):
        MPOConfig(0.2)  # type: ignore[misc]


def test_reuse_logits_needs_rows_in_one_piece(kernel: str) -> None:
    device = device_of(kernel)
    transposed = zeros(4, 7, 4).to(device).transpose(1, 2).requires_grad_()
    expanded = zeros(4, 1, 7).to(device).expand(4, 4, 7)
    for logits in (transposed, expanded):
        with pytest.raises(ValueError, match="reuse_logits"):
            mpo_loss(**on(device, good()) | {"logits": logits}, reuse_logits=True, backend=kernel)
        with pytest.raises(ValueError, match="reuse_logits"):
            token_logp(logits, on(device, good())["labels"], reuse_logits=True, backend=kernel)


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPO_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"MPO_CPU_ISA must .*'sse9'"):
        mpo_loss(**good(), backend="cpu")


@pytest.mark.parametrize("name", ["beta", "dpo_weight", "label_smoothing"])
@pytest.mark.parametrize("value", ["1e-1", True, None], ids=repr)
def test_a_setting_that_is_no_number_is_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a number, got {value!r}"):
        MPOConfig.from_dict({name: value})


def test_an_empty_file_of_settings_is_refused() -> None:
    with pytest.raises(TypeError, match="values must be a mapping of settings, got None"):
        MPOConfig.from_dict(None)


def test_a_reward_shift_names_what_is_no_number() -> None:
    with pytest.raises(TypeError, match="decay must be a number, got 'x'"):
        RewardShift(decay="x")
    with pytest.raises(TypeError, match=r"state must be what RewardShift\.state_dict\(\) returned, got None"):
        RewardShift().load_state_dict(None)
    with pytest.raises(TypeError, match="value must be a number, got 'abc'"):
        RewardShift().load_state_dict({**RewardShift().state_dict(), "value": "abc"})


@pytest.mark.parametrize("function", [mpo_loss, linear_mpo_loss])
def test_a_field_of_the_config_says_where_it_belongs(function: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=r"^beta is a field of MPOConfig: pass config=MPOConfig\(beta=0.2\)"):
        function(zeros(2, 3, 7), zeros(2, 3, dtype=INT64), beta=0.2)


def test_the_functions_shift_by_default_as_models_do() -> None:
    for function in (mpo_loss, linear_mpo_loss, token_logp, linear_token_logp):
        assert signature(function).parameters["shift"].default is True
