"""Imports modules for the server of ``run_recipe``, so that forked processes need not import them."""

import accelerate.state
import digits_run
import peft
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.internvl.modeling_internvl

import mpo_ext.train.loop
import mpo_ext.train.model_card

__all__ = ["accelerate", "digits_run", "mpo_ext", "peft", "torch", "transformers"]
torch.set_num_threads(1)
torch.distributed.is_available()
digits_run.tiny()
