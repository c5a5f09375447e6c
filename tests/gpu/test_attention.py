"""Tests split attention on a GPU. The flash kernel must run. Loss and gradients must equal those of a dense mask.

With split attention, a row can hold several responses to one prompt without a mask tensor.
"""

import pytest
import torch
from families import FAMILIES, HYBRID, build
from single_forwards import assert_same, gradients
from test_split_attention import SPLIT, Operators, several_pairs
from torch import nn

from mpo_ext import linear_mpo_loss
from mpo_ext.train.batch import collate
from mpo_ext.train.forward import forward
from mpo_ext.train.masks import prompt_positions, use_split_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch sees")


def loss_of(model: nn.Module, family: str, layout: str) -> torch.Tensor:
    samples = several_pairs(family, 2)
    batch = collate(samples, layout, pad_id=0, positions=prompt_positions(model)).to("cuda")  # type: ignore[arg-type]
    out = forward(model, batch)
    reference = -torch.linspace(3, 9, 2 * batch.pairs, device="cuda")
    return linear_mpo_loss(
        out.hidden, out.weight, batch.labels, reference, cu_seqlens=batch.cu_seqlens, shift=False, **out.options
    ).loss


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("family", SPLIT)
def test_loss_and_gradients_are_those_of_the_dense_mask(family: str, dtype: torch.dtype, tol: float) -> None:
    model = build(family, "split sdpa", dtype).cuda()
    expected = loss_of(model, family, "masked")
    loss = loss_of(model, family, "shared")
    torch.testing.assert_close(loss, expected, rtol=tol, atol=0)
    assert_same(gradients(model, loss), gradients(model, expected), tol)


@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_layers_give_the_loss_of_separate_rows(family: str) -> None:
    """Checks that shared and separate rows give the same loss and gradients, for models with recurrent layers.

    A shared row has several responses to one prompt. Uses flash-linear-attention, mamba-ssm and causal-conv1d if they
    are installed, otherwise plain torch.
    """
    model = build(family, "sdpa", torch.bfloat16).cuda()
    assert use_split_attention(model) is None
    expected = loss_of(model, family, "separate")
    loss = loss_of(model, family, "shared")
    torch.testing.assert_close(loss, expected, rtol=5e-2, atol=0)
    assert_same(gradients(model, loss), gradients(model, expected), 5e-2)


def test_causal_calls_keep_the_flash_kernel() -> None:
    model = build("llama", "split sdpa", torch.bfloat16).cuda()
    with Operators() as found:
        loss_of(model, "llama", "shared").backward()
    assert any("flash_attention" in name for name in found.names)
    assert not any("efficient_attention" in name or "attention_math" in name for name in found.names)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_flash_attention_gives_the_loss_of_separate_rows(family: str) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is not a dependency of the package")
    assert not FAMILIES[family].images
    model = build(family, None, torch.bfloat16).cuda()
    model.set_attn_implementation("flash_attention_2")
    assert use_split_attention(model) is None
    expected = loss_of(model, family, "separate")
    loss = loss_of(model, family, "shared")
    torch.testing.assert_close(loss, expected, rtol=5e-2, atol=0)
    assert_same(gradients(model, loss), gradients(model, expected), 5e-2)
