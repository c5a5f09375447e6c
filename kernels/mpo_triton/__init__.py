"""Triton kernels of mpo_ext, for GPUs without the compiled CUDA kernels; installed as ``mpo_ext.kernels``.

A row is the V logits of one token position. Each file holds one operator of ``mpo_ext.ops``. The operators there call
these functions after checking all arguments.
"""

from .exp_logits import exp_logits
from .logits_grad import logits_grad
from .pair_loss import PairLossOutputs, pair_loss
from .token_logp import token_logp

__all__ = ["PairLossOutputs", "exp_logits", "logits_grad", "pair_loss", "token_logp"]
