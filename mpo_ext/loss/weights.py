"""Shape, values and hash of a model's weights, also if ZeRO-3 has partitioned them.

ZeRO-3 replaces each parameter's values with an empty tensor. The parameter's attribute ``ds_shape`` is the shape of
the whole parameter. Without DeepSpeed, the functions use the parameters unchanged.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpo_ext.loss.hf_head import unwrap_model

_SAMPLED = 4096  # minimum number of values that a fingerprint reads from a larger parameter


def full_shape(parameter: Tensor) -> torch.Size:
    """Returns the shape of the whole parameter, even if ZeRO-3 has partitioned the parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    """Gathers a parameter that ZeRO-3 has partitioned, for the ``with`` block. All ranks must enter the block."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of a model's weights, without LoRA adapters.

    The hash covers the model's class, and the name, shape, dtype and up to 8,191 evenly spaced values of each
    parameter. If ZeRO-3 has partitioned the model, all ranks must call this function.
    """
    inner = unwrap_model(model)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(type(inner).__name__.encode())
    for name, parameter in sorted(inner.named_parameters()):
        if "lora_" in name:
            continue
        with gathered(parameter):
            flat = parameter.detach().reshape(-1)
            stride = max(1, flat.numel() // _SAMPLED)
            values = flat[::stride].clone().cpu()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(full_shape(parameter))} {parameter.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
