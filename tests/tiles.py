"""Check functions for the tests of all backends: logits in vocabulary tiles, and linear_mpo_loss."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from oracle import (
    assert_as_accurate,
    assert_gradient_as_accurate,
    score_rows,
    token_logp_eager,
    token_logp_exact,
    wide,
)

from mpo_ext import MPOConfig, MPOOutput, linear_mpo_loss, mpo_loss
from mpo_ext.ops import exp_logits, linear, matmul, tiles
from mpo_ext.ops import logits as ops
from mpo_ext.ops.checks import STATS
from mpo_ext.ops.memory import ROW_STATE, Tile

ALL_STATS = 15
#: Labels with a bad label, 99, in a response that no term of the loss contains, and the settings of the loss.
UNSEEN_BAD_LABELS = {
    "rejected under NTP": ([[1, 2, 3], [1, 99, 3]], {"dpo_weight": 0.0, "bco_weight": 0.0}),
    "chosen without NTP": ([[1, 99, 3], [-100] * 3], {"ntp_weight": 0.0}),
    "rejected without chosen": ([[-100] * 3, [1, 99, 3]], {}),
    "sequence": ([[-100] * 3, [1, 99, 3]], {"ntp_average": "sequence"}),
}


def check_tiles(backend: str, dtype: torch.dtype, vocab: int, inner_edges: Sequence[int], seed: int = 0) -> None:
    """Processes logits in tiles, and checks the log-probs, the statistics and the gradient.

    ``inner_edges`` are the columns at which a tile ends and the next tile begins. Some labels are ignored or invalid.
    Some labels have a probability near 1. Some logits are -inf.
    """
    generator = torch.Generator().manual_seed(seed + vocab)
    edges = [0, *inner_edges, vocab]
    labels = torch.tensor([0, -100, vocab - 1, edges[1], edges[1] - 1, vocab, -1, vocab // 2, -100, vocab // 3])
    logits = (3 * torch.randn(len(labels), vocab, generator=generator)).to(dtype)
    logits[labels == -100] = torch.nan  # never read
    logits[3, : edges[1]] = -torch.inf  # a first tile without a maximum
    logits[7, -2:] = -torch.inf
    logits[2, -1] = 16  # a confident label in the last tile
    logits[0, 0] = 16  # a confident label in the first tile
    # One NaN column on each side, so that tiles start at any address and reads beyond them are detected.
    wide_logits = torch.full((len(labels), vocab + 2), torch.nan, dtype=dtype)
    view = wide_logits[:, 1:-1]
    view.copy_(logits)

    outputs = ops.token_logp_outputs(view, labels, ALL_STATS)
    state = torch.full((len(labels), ROW_STATE), torch.nan, dtype=torch.float64)
    for first, end in itertools.pairwise(edges):
        ops.score(view[:, first:end], labels, -100, ALL_STATS, backend, outputs, Tile(first, vocab, state))
    logp, row_max, row_sum, row_stats = outputs
    weight = torch.linspace(-1, 2, len(labels), dtype=logp.dtype)
    exact, gradient, share = token_logp_exact(logits, labels, weight)
    eager, eager_gradient = token_logp_eager(logits, labels.where((labels >= 0) & (labels < vocab), -100), weight)
    assert_as_accurate(logp, eager, exact, name="logp")
    rows = score_rows(wide(logits), labels.numpy(), -100)
    possible = rows.labelled & np.isfinite(rows.logp)
    for values, name in zip(row_stats, STATS, strict=True):
        expected = getattr(rows, name)
        np.testing.assert_allclose(values.numpy()[possible], expected[possible].astype(float), rtol=1e-5, atol=1e-5)

    # In place, as in the backward of hidden states.
    scale = torch.tensor(0.5, dtype=torch.float64)
    for first, end in itertools.pairwise(edges):
        part = view[:, first:end]
        tile = Tile(first, vocab, None)
        ops.write_grad(part, labels, row_max, row_sum, weight, scale, -100, backend, part, tile=tile)
    assert_gradient_as_accurate(view, eager_gradient * 0.5, gradient * 0.5, share)
    assert wide_logits[:, [0, -1]].isnan().all(), "something beside the tiles was written"


def check_linear(backend: str, dtype: torch.dtype, **options: object) -> None:
    """Computes linear_mpo_loss in many tiles on a backend. Compares the results with those of the CPU backend."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(4, 5, 13, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(203, 13, generator=generator)).to(dtype)
    labels = torch.randint(203, (4, 5), generator=generator)
    labels[:, :2] = -100
    frozen = bool(options.pop("frozen", False))

    def run(name: str) -> tuple[MPOOutput, tuple[torch.Tensor, ...]]:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        output = linear_mpo_loss(
            *inputs, labels, torch.linspace(-20, -10, 4), stats=("entropy", "top1"), memory_budget=2000, backend=name,
            **options,
        )  # fmt: skip
        return output, torch.autograd.grad(2 * output.loss, [x for x in inputs if x.requires_grad])

    ours, gradients = run(backend)
    expected, expected_gradients = run("cpu")
    assert ours.backend == backend
    torch.testing.assert_close(ours.loss, expected.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.stats, expected.stats, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        largest = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=torch.finfo(dtype).eps, atol=2e-6 * largest)


def check_gpu_tiles(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Compares linear_mpo_loss on the code path for GPUs with a float64 reference. Needs no GPU.

    Torch computes the matrix products on the CPU. All other kernels run with ``backend``.
    """

    def scaled_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, scale: float, bias: object) -> None:
        out.copy_(scale * (a.float() @ b.float() + (0 if bias is None else bias)))

    def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, is_first: bool) -> None:
        total.copy_(a.float() @ b.float() + (0 if is_first else total.float()))

    monkeypatch.setattr(tiles, "is_on_cpu", lambda tensor: False)
    monkeypatch.setattr(tiles, "wide_matmuls", lambda device, dtype: matmul.WideMatmuls(True, True))
    monkeypatch.setattr(tiles, "scaled_matmul", scaled_matmul)
    monkeypatch.setattr(tiles, "accumulate", accumulate)
    monkeypatch.setattr(linear, "accumulate", accumulate)
    monkeypatch.setenv("MPO_CPU_MATMUL", "native")
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(4, 5, 16, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(203, 16, generator=generator)).to(dtype)
    labels = torch.randint(203, (4, 5), generator=generator)
    labels[:, :2] = -100
    has_bias, is_frozen = bool(options.pop("bias", False)), bool(options.pop("frozen", False))
    bias = torch.randn(203, generator=generator).to(dtype) if has_bias else None

    def run(precision: torch.dtype, name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        inputs = [hidden.to(precision).requires_grad_(), weight.to(precision).requires_grad_(not is_frozen)]
        extra = None if bias is None else bias.to(precision).requires_grad_(not is_frozen)
        output = linear_mpo_loss(
            *inputs, labels, torch.linspace(-20, -10, 4), bias=extra, shift=False, memory_budget=6000, backend=name,
            **options,
        )  # fmt: skip
        leaves = [leaf for leaf in (*inputs, extra) if leaf is not None and leaf.requires_grad]
        return output.loss, torch.autograd.grad(2 * output.loss, leaves)

    loss, gradients = run(dtype, backend)
    exact, exact_gradients = run(torch.float64, "reference")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert (gradient.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


def exp_logits_case(vocab: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Returns hard cases for exp_logits: logits ``[7, vocab]``, labels ``[7]``, and the edges of three tiles.

    Examples are tiles of -inf, a maximum that rises from tile to tile, and logits of magnitude 1e9.
    """
    edges = [0, vocab // 3 + 1, vocab // 3 + 1 + vocab // 4, vocab]
    logits = 3 * torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    labels = torch.tensor([0, vocab - 1, edges[1], edges[1] - 1, edges[2], vocab // 2, 1])
    logits[0, edges[1] + 1] = 20.0  # raises the maximum, but not the reference
    logits[1, edges[2]] = 90.0  # raises both
    logits[2, : edges[1]] = -torch.inf  # nothing in the first tile
    logits[3, : edges[2]] = -torch.inf
    logits[4, 1] = -1e9  # a banned token
    logits[5] += 300.0  # a large common offset
    logits[6] = logits[6] * 1e8 - 2e9  # so large that neighbouring floats are far apart
    return logits, labels, edges


def check_exp_logits(backend: str, dtype: torch.dtype, vocab: int) -> None:
    """Compares the results of write_exp_logits on three tiles with float64 results.

    The kernel writes ``exp(z - r)`` for each logit z. The number r is the reference of a row (see
    mpo_ext/ops/exp_logits.py). If the reference rises from one tile to the next, the kernel rescales the row's sums.
    """
    logits, labels, edges = exp_logits_case(vocab)
    sums = torch.randn(len(labels), 37, generator=torch.Generator().manual_seed(1))
    expected_sums = sums.double().clone()
    unit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    reference, old, row_max = None, torch.full((7,), -torch.inf), torch.full((7,), -torch.inf)
    for first, end in itertools.pairwise(edges):
        tile = logits[:, first:end].contiguous()
        row_max = torch.maximum(row_max, tile.amax(1))
        out = torch.full(tile.shape, torch.nan, dtype=dtype)
        reference = exp_logits.write_exp_logits(
            tile, labels, row_max, reference, sums, backend, out, Tile(first, vocab, None), is_last=end == vocab
        )
        slack = 0.0 if dtype == torch.float16 or end == vocab else 40.0
        assert torch.equal(reference, torch.where(row_max > old + slack, row_max, old))
        if first > 0:
            scale = torch.where(old == -torch.inf, 0.0, torch.exp(old.double() - reference.double()))
            expected_sums *= scale.where(reference != old, 1.0).unsqueeze(1)
        safe = reference.where(reference != -torch.inf, 0.0).double()
        expected = torch.exp(tile.double() - safe.unsqueeze(1))
        column = labels - first
        inside = (column >= 0) & (column < end - first)
        expected[inside, column[inside]] = 0.0
        smallest = 2.0**-25 if dtype == torch.float16 else 1e-37  # smaller results are flushed to 0
        assert ((out.double() - expected).abs() <= (unit + 4e-6) * expected + smallest).all()
        old = reference
    assert torch.equal(reference, row_max), "after the last tile, the reference is the maximum"
    torch.testing.assert_close(sums.double(), expected_sums, rtol=2e-6, atol=1e-37)


GPU_TILES = [
    {"recompute": True}, {"recompute": False}, {"frozen": True}, {"softcap": 5.0, "recompute": False},
    {"softcap": 5.0, "frozen": True}, {"bias": True, "recompute": False}, {"bias": True, "logit_scale": 0.5},
]  # fmt: skip
LINEAR_OPTIONS = [{"recompute": True}, {"recompute": False}, {"frozen": True}, {"softcap": 5.0, "logit_scale": 0.5}]


def check_unseen_bad_label(name: str, backend: str, device: str = "cpu") -> None:
    """Checks that an out-of-range label makes the loss NaN, even if no loss term uses its response.

    With a valid label instead, the loss must not be NaN.
    """
    rows, settings = UNSEEN_BAD_LABELS[name]
    labels = torch.tensor(rows)
    options = {"config": MPOConfig(**settings), "shift": False, "backend": backend}
    for is_bad in (True, False):
        labels = labels if is_bad else labels.where(labels != 99, 4)
        logits = torch.zeros(2, 3, 7, device=device, requires_grad=True)
        output = mpo_loss(logits, labels.to(device), torch.zeros(2, device=device), **options)
        (gradient,) = torch.autograd.grad(output.loss, logits)
        assert bool(torch.isnan(output.loss)) == is_bad, (name, output)
        if backend != "reference":  # for it, torch.where hides the NaN from autograd
            assert bool(torch.isnan(gradient).any()) == is_bad, (name, gradient)
