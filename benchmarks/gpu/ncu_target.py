"""The program that Nsight Compute (ncu) profiles. It runs each main kernel twice, on the main shape."""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.session import PairBatch
from mpo_ext import mpo_loss


def main() -> int:
    """Runs forward and backward twice for each backend. ``--dry`` runs them on a CPU with small sizes."""
    dry = "--dry" in sys.argv
    size = ("cpu", 1, 8, 211) if dry else ("cuda", 1, 4096, 151_936)
    batch = PairBatch.random(*size, torch.bfloat16)
    for backend in ("cpu",) if dry else ("cuda", "triton"):
        for _ in range(2):
            leaf = batch.logits.detach().requires_grad_()
            loss = mpo_loss(leaf, batch.labels, batch.ref_logp, shift=False, backend=backend).loss
            torch.autograd.grad(loss, leaf)
            if not dry:
                torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
