"""Tests patching a function that several modules of a package import by name.

The package is a small imitation of OpenRLHF.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mpo_ext
from mpo_ext.integrations import patching
from mpo_ext.integrations.sources import KNOWN, KnownSources

FUNCTION = "openrlhf.models.utils:log_probs_from_logits"
UTILS = """import torch


def log_probs_from_logits(logits, labels, temperature=1.0):
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.gather(logits.log_softmax(-1), -1, labels.unsqueeze(-1)).squeeze(-1)
"""
METADATA = "Metadata-Version: 2.1\nName: openrlhf\nVersion: "
USER = "from openrlhf.models.utils import log_probs_from_logits as used\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes a fake package ``openrlhf`` 0.11.2 importable, with source code that mpo_ext can patch.

    Yields the folder ``openrlhf/models``.
    """
    models = tmp_path / "openrlhf" / "models"
    models.mkdir(parents=True)
    for path, text in (
        (models.parent / "__init__.py", ""),
        (models / "__init__.py", ""),
        (models / "utils.py", UTILS),
        (models / "actor.py", USER),
        (models / "later.py", USER),
        (
            tmp_path / "openrlhf-0.11.2.dist-info" / "METADATA",
            f"{METADATA}0.11.2\n",
        ),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = patching.source_hash(FUNCTION)
    known = {**KNOWN, "openrlhf": KnownSources("openrlhf", "openrlhf", {"0.11": {FUNCTION: digest}})}
    monkeypatch.setattr(patching, "KNOWN", known)
    yield models
    if "openrlhf" in patching._applied:
        mpo_ext.unpatch("openrlhf")
    for name in set(sys.modules) - set(before):
        if name.startswith(("openrlhf", "mpo_ext.integrations.openrlhf")):
            del sys.modules[name]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"openrlhf.models.{name}")


def test_every_module_gets_the_function_and_gets_its_own_back(package: Path, capsys: Any) -> None:
    utils, actor = module("utils"), module("actor")
    own = utils.log_probs_from_logits
    mpo_ext.patch("openrlhf")
    assert re.match(r"mpo_ext: openrlhf 0\.11\.2 patched: log_probs_from_logits .*\n$", capsys.readouterr().err)
    later = module("later")  # imported after the patch
    assert own not in (utils.log_probs_from_logits, actor.used, later.used)
    assert utils.log_probs_from_logits is actor.used is later.used
    assert patching.source_hash(FUNCTION) == patching.KNOWN["openrlhf"].versions["0.11"][FUNCTION]
    with pytest.raises(RuntimeError, match="'openrlhf', which is patched"):
        mpo_ext.patch("openrlhf")
    mpo_ext.unpatch("openrlhf")
    assert utils.log_probs_from_logits is actor.used is later.used is own


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_stay(package: Path, temperature: float) -> None:
    actor = module("actor")
    own = actor.used
    mpo_ext.patch("openrlhf")
    generator = torch.Generator().manual_seed(0)
    leaf = (4 * torch.randn(3, 5, 1000, generator=generator)).requires_grad_()
    labels = torch.randint(1000, (3, 5), generator=generator)
    weight = torch.randn(3, 5, generator=generator)
    results = []
    for function in (own, actor.used):
        logits = leaf * 1
        logp = function(logits, labels, temperature)
        (gradient,) = torch.autograd.grad((logp * weight).sum(), leaf)
        results.append((logp.detach(), gradient, logits.detach()))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert results[1][1].abs().max() > 0.01


def test_another_source_or_version_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = module("utils")
    own = utils.log_probs_from_logits
    monkeypatch.setattr(utils, "log_probs_from_logits", lambda *args: own(*args))
    with pytest.raises(RuntimeError, match=rf"{FUNCTION} of openrlhf 0.11.2 must have the source .* got hash \w+:"):
        mpo_ext.patch("openrlhf")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(package.parents[1]))
    with pytest.raises(RuntimeError, match=rf"{FUNCTION} of openrlhf 0.11.2 must have the source"):
        mpo_ext.patch("openrlhf")  # the true digest is not that of the stand-in
    for version, rule in (
        ("0.10.3", r"openrlhf must have a version that mpo_ext knows \(0.11\), got 0.10.3"),
        ("0.12.0", rf"a later one with the same functions, got 0.12.0 with another {FUNCTION}"),
        ("0.12rc1", r"openrlhf must have a version that mpo_ext knows \(0.11\), got 0.12rc1"),
    ):
        (package.parents[1] / "openrlhf-0.11.2.dist-info" / "METADATA").write_text(f"{METADATA}{version}\n")
        with pytest.raises(RuntimeError, match=rule):
            mpo_ext.patch("openrlhf")
    assert "openrlhf" not in patching._applied


def test_a_later_version_with_the_same_functions_is_patched(package: Path, capsys: Any) -> None:
    (package.parents[1] / "openrlhf-0.11.2.dist-info" / "METADATA").write_text(f"{METADATA}0.12.0\n")
    mpo_ext.patch("openrlhf")
    assert "openrlhf 0.12.0 (tested with 0.11) patched" in capsys.readouterr().err


def test_unknown_options_are_refused(package: Path) -> None:
    with pytest.raises(TypeError, match=r"options of patch\('openrlhf'\) must not be given, got reward_shift"):
        mpo_ext.patch("openrlhf", reward_shift={"mode": "ema"})
    assert "openrlhf" not in patching._applied


def test_a_later_patch_must_be_undone_first(package: Path) -> None:
    actor = module("actor")
    mpo_ext.patch("openrlhf")
    ours, actor.used = actor.used, len
    with pytest.raises(RuntimeError, match=r"openrlhf.models.actor.used must be the function of mpo_ext, got"):
        mpo_ext.unpatch("openrlhf")
    actor.used = ours
