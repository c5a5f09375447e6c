"""Triton kernels of mpo_ext, for GPUs without the compiled CUDA kernels; installed as ``mpo_ext.kernels``.

A row is the V logits of one token position. Each function here is the GPU part of an operator in ``mpo_ext.ops``. The
operator checks its arguments, and then calls the function.
"""

from .exp_logits import exp_logits
from .logits_grad import logits_grad
from .pair_loss import PairLossOutputs, pair_loss
from .token_logp import token_logp

__all__ = ["PairLossOutputs", "exp_logits", "logits_grad", "pair_loss", "token_logp"]
