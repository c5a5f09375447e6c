"""Stage "correct": compares the losses on a GPU with a float64 reference, and runs the checks in hardware.py."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import hardware
from benchmarks.gpu.session import GpuStage, PairBatch
from mpo_ext import MPOConfig, MPOOutput, RewardShift, linear_mpo_loss, linear_token_logp, mpo_loss, token_logp

#: Relative rounding error of a number of each dtype.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
STATS = ("entropy", "mean_logit", "top1")
_CONFIG = MPOConfig(label_smoothing=0.05, ntp_average="sequence")
_VOCABS = (1, 2, 7, 8, 9, 63, 1003, 4096, 9001, 32_768, 92_553, 151_674, 151_936)
_DRY_VOCABS = (1, 7, 1003)
_HEADS: tuple[dict[str, Any], ...] = ({}, {"logit_scale": 0.5, "softcap": 20.0, "temperature": 0.7})


def difference(found: Tensor, exact: Tensor, rtol: float, atol: float, what: str) -> list[str]:
    """Compares two tensors. Returns [] if they agree, else a list with one line of text about the largest error.

    Two values agree if both are NaN, or if their difference is at most ``atol + rtol * abs(exact)``. ``what`` is the
    name of the tensors in the text.
    """
    found, exact = found.detach().double(), exact.detach().double()
    error = (found - exact).abs()
    bad = ~(error <= atol + rtol * exact.abs())  # NaN counts as bad
    bad &= ~(found.isnan() & exact.isnan())
    if not bad.any():
        return []
    largest = float(error[bad].nan_to_num(nan=float("inf")).max())
    return [f"{what}: off by {largest:.3e} at {int(bad.sum())} places"]


def run(stage: GpuStage) -> None:
    """Runs every check, and adds its result (passed or failed) to the result file."""
    for dtype, vocab in itertools.product(UNIT, _DRY_VOCABS if stage.dry else _VOCABS):
        stage.check(f"logits: {dtype}, V = {vocab}", functools.partial(_logits_problems, stage, dtype, vocab))
    for backend in stage.backends:
        stage.check(f"other inputs: {backend}", functools.partial(_input_problems, stage, backend))
        stage.check(f"reward shift: {backend}", functools.partial(_shift_problems, stage, backend))
    for dtype, vocab in itertools.product((torch.bfloat16, torch.float16, torch.float32), (203, 5003)):
        for head, has_bias in itertools.product(_HEADS, (False, True)):
            check = functools.partial(_linear_problems, stage, dtype, vocab, head, has_bias)
            stage.check(f"linear: {dtype}, V = {vocab}, {head or 'plain'}, bias {has_bias}", check)
    stage.check("large: the shape of the benchmarks", functools.partial(_large_problems, stage))
    if stage.dry:
        return
    stage.free()
    for backend in stage.backends:
        stage.check(f"large: beyond 2^31 logits, {backend}", functools.partial(_beyond_problems, stage, backend))
        stage.free()
    for name, check in hardware.CHECKS.items():
        for backend in stage.backends:
            stage.check(f"{name}: {backend}", functools.partial(check, backend))


def _loss(batch: PairBatch, logits: Tensor, backend: str, **options: Any) -> MPOOutput:
    options = {"config": _CONFIG, "reward_shift": 0.3, "shift": False, **options}
    return mpo_loss(logits, batch.labels, batch.ref_logp, backend=backend, **options)


def _logits_problems(stage: GpuStage, dtype: torch.dtype, vocab: int) -> list[str]:
    """Compares ``mpo_loss`` with a float64 reference. Returns a line of text for each difference.

    Compares the loss, its gradient and its statistics, for contiguous and for unaligned logits.
    """
    wrong = []
    for pairs, tokens, share in ((2, 10, 0.7), (1, 20, 0.1), (3, 5, 1.0)):
        batch = PairBatch.random(stage.device, pairs, tokens, vocab, dtype, share, seed=vocab + pairs)
        batch.labels[0, -1] = vocab - 1
        wide = torch.full((2 * pairs, tokens + 1, vocab + 5), torch.nan, dtype=dtype, device=stage.device)
        unaligned = wide[:, :tokens, 3 : 3 + vocab]
        unaligned.copy_(batch.logits)
        exact_leaf = batch.logits.double().requires_grad_()
        exact = _loss(batch, exact_leaf, "reference", stats=STATS)
        (exact_grad,) = torch.autograd.grad(exact.loss, exact_leaf)
        largest = float(exact_grad.abs().amax())
        for logits, backend in itertools.product((batch.logits, unaligned), stage.backends):
            where = f"{backend} B={pairs} {'contiguous' if logits is batch.logits else 'unaligned'}"
            leaf = logits.detach().requires_grad_()
            out = _loss(batch, leaf, backend, stats=STATS)
            (grad,) = torch.autograd.grad(out.loss, leaf)
            for name in ("loss", "dpo_loss", "bco_loss", "ntp_loss", "chosen_logp", "rejected_reward"):
                wrong += difference(getattr(out, name), getattr(exact, name), 3e-6, 3e-6, f"{where} {name}")
            for name in STATS:
                wrong += difference(out.stats[name], exact.stats[name], 1e-5, 1e-5, f"{where} {name}")
            atol = largest * 1e-6 + 2.0**-25
            wrong += difference(grad, exact_grad, UNIT[dtype] + 2e-5, atol, f"{where} gradient")
            wrong += [f"{where}: ignored rows have a gradient"] if grad[batch.labels == -100].any() else []
            with torch.no_grad():
                plain = _loss(batch, logits, backend)
            wrong += difference(plain.loss, out.loss, 1e-6, 1e-6, f"{where}: statistics change the loss")
            own = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            same = _loss(batch, own, backend, reuse_logits=True)
            (in_place,) = torch.autograd.grad(same.loss, own)
            wrong += difference(in_place, grad, 0, largest * (2e-6 + UNIT[dtype]), f"{where} reuse_logits")
    return wrong


def _input_problems(stage: GpuStage, backend: str) -> list[str]:
    """Checks ``mpo_loss`` with unusual inputs, such as infinite logits. Returns a line of text for each problem."""
    wrong = []
    options: dict[str, Any] = {"shift": False, "backend": backend}
    batch = PairBatch.random(stage.device, 2, 6, 1003, torch.bfloat16, 0.8)
    logits, labels, ref_logp = batch.logits, batch.labels, batch.ref_logp
    flat, flat_labels = logits.flatten(0, 1), labels.flatten()
    exact_options = {"shift": False, "backend": "reference"}
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 3, 11, 16, 24], dtype=dtype, device=stage.device)
        found = mpo_loss(flat, flat_labels, ref_logp.double(), cu_seqlens=offsets, **options)
        exact = mpo_loss(flat.double(), flat_labels, ref_logp.double(), cu_seqlens=offsets, **exact_options)
        wrong += difference(found.loss, exact.loss, 3e-6, 3e-6, f"packed {dtype}")
    found = mpo_loss(logits, labels, ref_logits=logits, **options)
    wrong += difference(found.loss, 0.8317766 + found.ntp_loss.double(), 1e-5, 1e-5, "policy equal to reference")
    bad = labels.clone()
    bad[1, 2] = 1003
    is_nan = bool(mpo_loss(logits, bad, ref_logp, **options).loss.isnan())
    wrong += [] if is_nan else ["a label out of range does not give NaN"]
    banned = logits.clone()
    banned[..., ::3] = -torch.inf
    allowed = torch.where((labels >= 0) & (labels % 3 == 0), labels + 1, labels)
    leaf = banned.detach().requires_grad_()
    found = mpo_loss(leaf, allowed, ref_logp, stats=STATS, **options)
    (grad,) = torch.autograd.grad(found.loss, leaf)
    exact = mpo_loss(banned.double(), allowed, ref_logp, stats=STATS, **exact_options)
    wrong += difference(found.loss, exact.loss, 3e-6, 3e-6, "banned tokens")
    wrong += difference(found.stats["entropy"], exact.stats["entropy"], 1e-5, 1e-5, "banned tokens, entropy")
    wrong += [] if bool(grad.isfinite().all()) else ["banned tokens: the gradient is not finite"]
    poisoned = logits.clone()
    poisoned[labels == -100] = torch.nan
    is_finite = bool(mpo_loss(poisoned, labels, ref_logp, **options).loss.isfinite())
    wrong += [] if is_finite else ["ignored rows are read"]
    for offset in (1e5, 1e9, -1e9):  # beyond 2e8, the kernels compute exponentials by another formula
        large = (logits.float() * max(abs(offset) * 1e-6, 1.0) + offset).requires_grad_()
        found = mpo_loss(large, labels, ref_logp, stats=STATS, **options)
        exact = mpo_loss(large.detach().double(), labels, ref_logp, stats=STATS, **exact_options)
        wrong += difference(found.loss, exact.loss, 1e-5, 1e-5, f"logits near {offset:g}")
        wrong += difference(found.stats["entropy"], exact.stats["entropy"], 1e-5, 1e-5, f"entropy near {offset:g}")
        (grad,) = torch.autograd.grad(found.loss, large)
        wrong += [] if bool(grad.isfinite().all()) else [f"logits near {offset:g}: the gradient is not finite"]
    nothing = torch.full_like(labels, -100)
    has_ntp = bool(mpo_loss(logits, nothing, ref_logp, **options).ntp_loss != 0)
    wrong += ["without a label, ntp_loss is not 0"] if has_ntp else []
    rows = token_logp(flat, flat_labels, **options)
    wrong += difference(rows, token_logp(flat.double(), flat_labels, **exact_options), 3e-6, 3e-6, "token_logp")
    if not stage.dry:  # on a CPU, offsets that decrease raise an error
        offsets = torch.tensor([0, 5, 3, 16, 24], device=stage.device)
        is_nan = bool(mpo_loss(flat, flat_labels, ref_logp, cu_seqlens=offsets, **options).loss.isnan())
        wrong += [] if is_nan else ["offsets that decrease do not give NaN"]
    return wrong


def _shift_problems(stage: GpuStage, backend: str) -> list[str]:
    """Compares the reward shift after three loss calls with a float64 reference. Returns [] if both agree."""
    batch = PairBatch.random(stage.device, 2, 6, 1003, torch.bfloat16, 0.8)
    shifts = RewardShift(), RewardShift()
    for _ in range(3):
        found = _loss(batch, batch.logits.detach().requires_grad_(), backend, reward_shift=shifts[0])
        exact = _loss(batch, batch.logits.double().requires_grad_(), "reference", reward_shift=shifts[1])
    return difference(found.reward_shift, exact.reward_shift, 1e-5, 1e-6, "reward shift after three calls")


def _linear_problems(
    stage: GpuStage, dtype: torch.dtype, vocab: int, head: dict[str, Any], has_bias: bool
) -> list[str]:
    """Compares ``linear_mpo_loss`` and its gradients with a float64 reference. Returns a line for each difference.

    Runs with several values of ``recompute`` and ``memory_budget``, with and without a frozen head, and with labels on
    the CPU and on the GPU.
    """
    generator = torch.Generator(stage.device).manual_seed(vocab)
    on_device: dict[str, Any] = {"generator": generator, "device": stage.device}
    hidden = torch.randn(4, 9, 64, **on_device).to(dtype)
    weight = (torch.randn(vocab, 64, **on_device) / 8).to(dtype)
    weight[-2] += 60 / hidden[1, 5].square().sum() * hidden[1, 5]  # a logit that is much larger than those before it
    bias = torch.randn(vocab, **on_device).to(dtype) if has_bias else None
    labels = torch.randint(vocab, (4, 9), **on_device)
    labels[:, :3] = -100
    ref_logp = torch.linspace(-60, -30, 4, device=stage.device)

    def loss_and_grads(
        precision: torch.dtype, frozen: bool, where: str, **options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        leaves = [hidden.to(precision).requires_grad_(), weight.to(precision).requires_grad_(not frozen)]
        leaves += [] if bias is None else [bias.to(precision).requires_grad_(not frozen)]
        given_bias = None if bias is None else leaves[2]
        out = linear_mpo_loss(
            *leaves[:2], labels.to(where), ref_logp, bias=given_bias, shift=False, **head, **options
        )  # fmt: skip
        return out.loss, list(torch.autograd.grad(out.loss, [leaf for leaf in leaves if leaf.requires_grad]))

    wrong = []
    exact = {
        frozen: loss_and_grads(torch.float64, frozen, stage.device, backend="reference") for frozen in (False, True)
    }
    modes = ((False, True), (False, False), (True, True))  # frozen head, recompute
    budgets = (1 << 15,) if stage.dry else (None, 1 << 18, 1 << 15)
    for backend, (frozen, recompute), budget in itertools.product(stage.backends, modes, budgets):
        for where in {"cpu", stage.device}:
            name = f"{backend} frozen={frozen} recompute={recompute} budget={budget} labels on {where}"
            options = {"backend": backend, "recompute": recompute, "memory_budget": budget}
            loss, gradients = loss_and_grads(dtype, frozen, where, **options)
            wrong += difference(loss, exact[frozen][0], 1e-5, 1e-5, f"{name} loss")
            for ours, expected in zip(gradients, exact[frozen][1], strict=True):
                error = float((ours.double() - expected).norm() / expected.norm())
                wrong += [f"{name}: a gradient is off by {error:.2e}"] if not error < 4 * UNIT[dtype] + 1e-5 else []
    logp = linear_token_logp(hidden, weight, labels, bias=bias, shift=False)
    return wrong + ([] if bool(logp[labels >= 0].isfinite().all()) else ["linear_token_logp is not finite"])


def _large_problems(stage: GpuStage) -> list[str]:
    """Checks the loss and the gradient of ``mpo_loss`` with V = 151,936. Returns a line of text for each problem.

    The gradient of the logits must sum to 0 over the vocabulary.
    """
    tokens, vocab = (8, 101) if stage.dry else (1024, 151_936)
    batch = PairBatch.random(stage.device, 1, tokens, vocab, torch.bfloat16)
    exact = _loss(batch, batch.logits.double(), "reference")
    wrong = []
    for backend in stage.backends:
        leaf = batch.logits.detach().requires_grad_()
        out = _loss(batch, leaf, backend)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        wrong += difference(out.loss, exact.loss, 3e-6, 3e-5, f"{backend} loss")
        wrong += difference(out.chosen_logp, exact.chosen_logp, 3e-6, 3e-3, f"{backend} chosen_logp")
        sums = float(grad.float().sum(-1).abs().max())  # a row of the exact gradient sums to 0
        largest = float(grad.abs().max())
        wrong += [f"{backend}: rows of the gradient sum to {sums:.2e}"] if not sums < 0.5 * largest else []
    return wrong


def _beyond_problems(stage: GpuStage, backend: str) -> list[str]:
    """Checks ``mpo_loss`` on more than 2^31 logits, where 32-bit indices overflow. Returns a line for each problem."""
    vocab, few = 151_936, 4
    tokens = 2**31 // (2 * vocab) + 9
    logits = torch.empty(2, tokens, vocab, dtype=torch.bfloat16, device=stage.device)
    last = (4 * torch.randn(2, few, vocab, device=stage.device)).bfloat16()
    logits[:, -few:] = last
    labels = torch.full((2, tokens), -100, device=stage.device)
    labels[:, -few:] = torch.randint(vocab, (2, few), device=stage.device)
    ref_logp = torch.full((2,), -44.0, device=stage.device)
    small = last.double().requires_grad_()
    exact = mpo_loss(small, labels[:, -few:], ref_logp, shift=False, backend="reference")
    (exact_grad,) = torch.autograd.grad(exact.loss, small)
    leaf = logits.requires_grad_()
    out = mpo_loss(leaf, labels, ref_logp, shift=False, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    wrong = difference(out.loss, exact.loss, 3e-6, 3e-6, "loss")
    wrong += difference(grad[:, -few:], exact_grad, 2.0**-8 + 1e-5, 1e-9, "gradient")
    return wrong + (["ignored rows have a gradient"] if grad[:, :-few].any() else [])
