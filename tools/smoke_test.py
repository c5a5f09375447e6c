"""Checks losses and gradients of an installed mpo_ext against plain torch. Also checks the compiled module.

It runs in any folder.
"""

import torch

import mpo_ext
from mpo_ext.ops import native


def main() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 1000, requires_grad=True)
    labels = torch.randint(1000, (4, 6))
    labels[:, :2] = -100
    out = mpo_ext.mpo_loss(logits, labels, torch.full((4,), -30.0), reward_shift=0.1)
    assert out.backend == "cpu", out.backend
    (ours,) = torch.autograd.grad(out.loss, logits)
    truth = mpo_ext.mpo_loss(logits, labels, torch.full((4,), -30.0), reward_shift=0.1, backend="reference")
    (gradient,) = torch.autograd.grad(truth.loss, logits)
    torch.testing.assert_close(out.loss, truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-7)

    hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    linear = mpo_ext.linear_mpo_loss(hidden, weight, labels, torch.full((4,), -30.0))
    whole = mpo_ext.mpo_loss(hidden @ weight.T, labels, torch.full((4,), -30.0), backend="reference")
    torch.testing.assert_close(linear.loss, whole.loss, rtol=1e-5, atol=1e-6)
    one, two = (torch.autograd.grad(value.loss, (hidden, weight)) for value in (linear, whole))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)

    module = native.compiled()
    cuda = f"CUDA for {module.cuda_archs}" if module.has_cuda else "no CUDA kernels"
    print(f"mpo_ext {mpo_ext.__version__} in {module.__file__}: loss and gradients are right; {cuda}")


if __name__ == "__main__":
    main()
