"""Triton kernels of mpo_ext, for GPUs without a CUDA build; installed as ``mpo_ext.kernels``. Needs triton.

Each file holds one operator. The functions follow the contracts of ``mpo_ext.ops``, their only caller, which checks
all arguments.
"""

from .logits_grad import logits_grad
from .pair_loss import PairLossOutputs, pair_loss
from .token_logp import token_logp

__all__ = ["PairLossOutputs", "logits_grad", "pair_loss", "token_logp"]
