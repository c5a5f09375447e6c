"""QLoRA (arXiv 2305.14314): quantization of base weights to NF4 with bitsandbytes, and their dequantization."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpo_ext.checks import install_hint


def quantization_config(dtype: str, skipped: Sequence[str]) -> Any:
    """Returns transformers' config for NF4 with double quantization.

    Args:
        dtype: Name of the dtype to compute in; "auto": bfloat16.
        skipped: Names of the linear layers that are not quantized.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"model.lora.quantization needs bitsandbytes: {install_hint('qlora')}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        llm_int8_skip_modules=list(skipped),  # transformers uses it for 4 bits, too
    )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields name and module of each 4-bit linear layer."""
    if "bitsandbytes" not in sys.modules:  # transformers has imported it if the model has such layers
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def disable_weight_packing(model: nn.Module) -> None:
    """Prevents bitsandbytes from packing 4-bit weights on a CPU, because packed weights give wrong gradients.

    Without this call, bitsandbytes packs the weights on a CPU with AVX512-BF16. This happens in the first forward pass
    in evaluation mode without gradients.

    Raises:
        RuntimeError: If the installed version of bitsandbytes packs the weights nevertheless.
    """
    for name, layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.device.type != "cpu":
            continue
        was_training = layer.training
        layer.eval()
        with torch.no_grad():
            layer(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
        layer.train(was_training)
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            import bitsandbytes

            raise RuntimeError(
                f"bitsandbytes must keep the 4-bit weights of {name} in the format for training, got packed weights "
                f"from version {bitsandbytes.__version__}, whose gradients would be wrong: use another version"
            )


def load_dequantized(target: nn.Module, base: nn.Module, state_dict: Mapping[str, Tensor] | None) -> None:
    """Copies the dequantized 4-bit weights of a base model into an unquantized model.

    Args:
        target: Unquantized model on the CPU.
        base: Model with 4-bit layers, with or without adapters.
        state_dict: For a sharded ``base``, the unsharded state dict of the peft model around ``base``. None: the
            weights are read from ``base``.
    """
    for name, layer in quantized_layers(base):
        from bitsandbytes.functional import dequantize_4bit

        quant_state = getattr(layer.weight, "quant_state", None) or layer.quant_state
        packed = layer.weight.detach() if state_dict is None else state_dict[f"base_model.model.{name}.weight"]
        weight = dequantize_4bit(packed.to(quant_state.absmax.device), quant_state)
        with torch.no_grad():
            target.get_submodule(name.replace(".base_layer", "")).weight.copy_(weight)  # type: ignore[operator]
