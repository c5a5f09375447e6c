"""Compares log-prob functions of OpenRLHF, verl and Unsloth with mpo_ext's. ``make integrations`` runs this file."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from bare_packages import add_bare_packages

import mpo_ext

#: The module and the name of the function, and the packages above it, which are imported without their own code.
FUNCTIONS = {
    "openrlhf": ("openrlhf.models.utils", "log_probs_from_logits", ("openrlhf", "openrlhf.models")),
    "verl": ("verl.utils.torch_functional", "logprobs_from_logits", ("verl", "verl.utils")),
    "unsloth": ("unsloth_zoo.rl_replacements", "chunked_selective_log_softmax", ()),
}
SHAPES = {"openrlhf": [(3, 7)], "verl": [(3, 7), (11,)], "unsloth": [(3, 7)]}


@pytest.fixture(params=FUNCTIONS)
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"make integrations runs this test in an environment with {name}")
    if packages := FUNCTIONS[name][2]:
        add_bare_packages(*packages)  # their own code needs flash attention, Ray or a GPU
    if name == "unsloth":
        monkeypatch.setenv("UNSLOTH_FORCE_CPU", "1")
        importlib.import_module(name)
    return name


def value_and_gradient(function: Any, leaf: torch.Tensor, labels: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    logp = function(leaf * 1, labels, **options)
    weight = torch.linspace(-1, 1, labels.numel()).reshape(labels.shape)
    (gradient,) = torch.autograd.grad((logp.float() * weight).sum(), leaf)
    return [logp.detach().float(), gradient.float()]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}], ids=["plain", "temperature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_gradients_are_those_of_the_trainer(
    trainer: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    home, name, _ = FUNCTIONS[trainer]
    if trainer == "verl" and options:
        pytest.skip("verl divides the logits elsewhere")
    utils = importlib.import_module(home)
    own = getattr(utils, name)
    mpo_ext.patch(trainer)
    try:
        ours = getattr(utils, name)
        assert ours is not own
        for shape in SHAPES[trainer]:
            generator = torch.Generator().manual_seed(0)
            leaf = (4 * torch.randn(*shape, 32_003, generator=generator)).to(dtype).requires_grad_()
            labels = torch.randint(32_003, shape, generator=generator)
            theirs = value_and_gradient(own, leaf, labels, **options)
            got = value_and_gradient(ours, leaf, labels, **options)
            tolerance = 1e-5 if dtype == torch.float32 else 0.05  # bfloat16: their result is rounded to bfloat16
            torch.testing.assert_close(got, theirs, rtol=tolerance, atol=tolerance)
            assert theirs[1].abs().max() > 0.1
    finally:
        mpo_ext.unpatch(trainer)
    assert getattr(utils, name) is own


@pytest.mark.parametrize(
    ("has_flash_attention", "environment", "inplace_backward"),
    [(True, "0", True), (True, "0", False), (True, "1", True), (False, "0", True)],
)
def test_verls_gradient_overwrites_the_logits_where_verls_own_does(
    trainer: str,
    monkeypatch: pytest.MonkeyPatch,
    has_flash_attention: bool,
    environment: str,
    inplace_backward: bool,
) -> None:
    if trainer != "verl":
        pytest.skip("only verl has this option")
    utils = importlib.import_module(FUNCTIONS["verl"][0])
    monkeypatch.setattr(utils, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", has_flash_attention)
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", environment)
    mpo_ext.patch("verl")
    try:
        logits = torch.randn(5, 70, requires_grad=True) * 1
        gradients: list[torch.Tensor] = []
        logits.register_hook(gradients.append)
        utils.logprobs_from_logits(logits, torch.arange(5), inplace_backward=inplace_backward).sum().backward()
    finally:
        mpo_ext.unpatch("verl")
    is_overwritten = gradients[0].data_ptr() == logits.data_ptr()
    assert is_overwritten == (has_flash_attention and environment == "0" and inplace_backward)
