"""Tests the argument checks: which values they accept, and the text of their errors."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_ext.checks import (
    check_choice,
    check_index,
    check_integer,
    check_json,
    check_model_path,
    check_number,
    did_you_mean,
    shorten,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [0, -1, 2.5, INF, NAN, np.float32(0.5), Fraction(1, 3)])
def test_a_number_is_any_real_number(value: Any) -> None:
    check_number("x", value)


@pytest.mark.parametrize("value", ["1", None, True, 1j, [1]])
def test_other_values_are_not_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="x must be a number, got "):
        check_number("x", value)


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "rule"),
    [
        ("[0, 1)", (0, 0.5, 0.999), (1, -0.1, NAN, INF), r"in \[0, 1\)"),
        ("(0, 1]", (1, 1e-9), (0, 1.1), r"in \(0, 1\]"),
        ("(0, inf)", (1e-9, 1e300), (0, -1, INF, NAN, 10**400), "positive and finite"),
        ("[0, inf)", (0, 1e300), (-1, INF, NAN), "finite and not negative"),
        ("(-inf, inf)", (0, -1e300), (INF, -INF, NAN), "finite"),
        ("[0, inf]", (0, INF), (-1, NAN), r"in \[0, inf\]"),
    ],
)
def test_an_interval_limits_a_number(
    interval: str, inside: tuple[float, ...], outside: tuple[float, ...], rule: str
) -> None:
    for value in inside:
        check_number("x", value, interval)
    for value in outside:
        with pytest.raises(ValueError, match=f"^x must be {rule}, got {value}$"):
            check_number("x", value, interval)


def test_an_integer_has_a_least_value() -> None:
    check_integer("n", -5)
    check_integer("n", 3, least=3)
    with pytest.raises(ValueError, match=r"^n must be at least 3, got 2$"):
        check_integer("n", 2, least=3)
    for value in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=r"^n must be an integer, got "):
            check_integer("n", value, least=0)


def test_an_index_counts_from_either_end() -> None:
    assert [check_index(index, 3) for index in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"^index must be in \[-3, 3\), got {index}$"):
            check_index(index, 3)


def test_a_wrong_choice_suggests_the_most_similar() -> None:
    check_choice("mode", "fixed", ("fixed", "ema"))
    with pytest.raises(ValueError, match=r"^mode must be one of fixed, ema, got 'fixd'; did you mean 'fixed'\?$"):
        check_choice("mode", "fixd", ("fixed", "ema"))
    with pytest.raises(ValueError, match=r"^mode must be one of fixed, ema, got 7$"):
        check_choice("mode", 7, iter(("fixed", "ema")))
    assert did_you_mean("zzz", ["fixed"], otherwise="; see the docs") == "; see the docs"
    settings = ["learning_rate", "batch_size", "betas", "micro_batch_size"]
    assert did_you_mean("lr", settings) == "; did you mean 'learning_rate'?"
    assert did_you_mean("bs", settings) == "; did you mean 'batch_size'?"
    assert did_you_mean("lr", [*settings, "log_root"]) == ""  # two names have these initials


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"a": [1, {"b": NAN}]}, ValueError, r"x\.a\[1\]\.b must be finite, got nan"),
        ({"a": (1,)}, TypeError, r"x\.a must be JSON \(None, .*\), got tuple \(1,\)"),
        ({1: 2}, TypeError, "x must have keys of type str, got int 1"),
        (["\ud800"], ValueError, r"x\[0\] must be text that UTF-8 can hold, got the lone surrogate '\\ud800' at char"),
    ],
)
def test_a_value_that_json_would_change_is_named(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_json("x", value)
    check_json("x", {"a": [None, True, 2**70, 0.5, "é", {"b": []}]})


def test_only_a_path_that_cannot_be_a_hub_id_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for path in ("gpt2", "org/name", "hf://a/b/c", "runs"):
        check_model_path("model", path)
    for path in ("./x", "/x", "~/x", "a/b/c", "runs/x"):
        with pytest.raises(FileNotFoundError, match=f"model must be a folder here or a hub id, got {path}: "):
            check_model_path("model", path)


def test_long_values_are_shortened() -> None:
    assert shorten([1, 2]) == "[1, 2]"
    assert shorten("x" * 200, 20) == f"'{'x' * 16}..."
