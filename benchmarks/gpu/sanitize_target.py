"""A small program for compute-sanitizer. It runs every kernel of mpo_ext.

Inputs and expected values are computed on the CPU, so that compute-sanitizer checks few kernels of torch. The shapes
cover wide, narrow and unaligned rows of logits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from mpo_ext import linear_mpo_loss, mpo_loss, token_logp

_STATS = ("entropy", "mean_logit", "top1")


def loss_and_grad(logits: Tensor, labels: Tensor, ref_logp: Tensor, backend: str, **options: Any) -> list[Tensor]:
    leaf = logits.detach().requires_grad_()
    out = mpo_loss(leaf, labels, ref_logp, shift=False, backend=backend, **options)
    return [out.loss.detach().cpu().double(), torch.autograd.grad(out.loss, leaf)[0].cpu().double()]


def logits_problems(backend: str, device: str) -> list[str]:
    """Returns a line for each result of ``mpo_loss`` or ``token_logp`` that differs from the result in float64.

    Tests several dtypes and sizes of the vocabulary.
    """
    wrong = []
    generator = torch.Generator().manual_seed(1)
    ref_logp = torch.tensor([-30.0, -40.0])
    shapes = ((7, 5), (1003, 9), (9001, 3), (70_001, 2))
    for dtype, (vocab, tokens) in itertools.product((torch.bfloat16, torch.float32, torch.float16), shapes):
        logits = (3 * torch.randn(2, tokens, vocab, generator=generator)).to(dtype)
        labels = torch.randint(vocab, (2, tokens), generator=generator)
        labels[:, 0] = -100
        packed = {"cu_seqlens": torch.tensor([0, tokens - 1, 2 * tokens], dtype=torch.int32)}
        for stats, options in itertools.product(((), _STATS), ({}, packed)):
            inputs = (logits.flatten(0, 1), labels.flatten()) if options else (logits, labels)
            expected = loss_and_grad(inputs[0].double(), inputs[1], ref_logp.double(), "reference", **options)
            moved = {key: value.to(device) for key, value in options.items()}
            tensors = [tensor.to(device) for tensor in (*inputs, ref_logp)]
            found = loss_and_grad(*tensors, backend, stats=stats, **moved)
            rtol = 2 * torch.finfo(dtype).eps
            for name, ours, exact, tol in zip(("loss", "gradient"), found, expected, (1e-5, rtol), strict=True):
                if not torch.allclose(ours, exact, rtol=tol, atol=1e-5 if name == "loss" else 2e-6):
                    wrong.append(f"{dtype} V={vocab} {stats} packed={bool(options)}: {name}")
        rows = token_logp(logits.to(device), labels.to(device), shift=False, backend=backend).cpu().double()
        exact_rows = token_logp(logits.double(), labels, shift=False, backend="reference")
        if not torch.allclose(rows, exact_rows, rtol=1e-5, atol=1e-5):
            wrong.append(f"{dtype} V={vocab}: token_logp")
        loss_and_grad(logits.to(device), labels.to(device), ref_logp.to(device), backend, reuse_logits=True)
    return wrong


def linear_problems(backend: str, device: str) -> list[str]:
    """Compares the loss of ``linear_mpo_loss`` with float64 for several dtypes. Returns a line for each difference.

    Runs with ``recompute`` on and off, and with a frozen head. Gradients are computed, but not compared.
    """
    wrong = []
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 9, 64), (1003, 64)))
    labels = torch.randint(1003, (2, 9), generator=generator)
    labels[:, :3] = -100
    ref_logp = torch.tensor([-30.0, -40.0])
    modes = ((False, True), (False, False), (True, True))
    for dtype, (is_frozen, recompute) in itertools.product((torch.bfloat16, torch.float32, torch.float16), modes):
        head = (weight / 8).to(dtype)
        inputs = [hidden.to(dtype).to(device).requires_grad_(), head.to(device).requires_grad_(not is_frozen)]
        options = {"shift": False, "recompute": recompute, "memory_budget": 1 << 17, "backend": backend}
        loss = linear_mpo_loss(*inputs, labels, ref_logp.to(device), **options).loss
        torch.autograd.grad(loss, [tensor for tensor in inputs if tensor.requires_grad])
        exact_inputs = hidden.to(dtype).double(), head.double()
        exact = linear_mpo_loss(*exact_inputs, labels, ref_logp.double(), shift=False, backend="reference").loss
        if abs(float(loss) - float(exact)) > 1e-4:
            wrong.append(f"linear {dtype} frozen={is_frozen} recompute={recompute}: {float(loss)} for {float(exact)}")
    return wrong


def main() -> int:
    """Checks the kernels of the backend ``--backend``. Returns 1 if a result is wrong, else 0."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda", "triton"))
    backend = parser.parse_args().backend
    device = "cpu" if backend == "cpu" else "cuda"
    wrong = logits_problems(backend, device) + linear_problems(backend, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("\n".join(f"Error: {line}" for line in wrong) or "the small program is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
