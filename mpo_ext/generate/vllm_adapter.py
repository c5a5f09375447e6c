"""Checks whether vLLM can run LoRA adapters completely, and returns the vLLM options for them."""

import json
from pathlib import Path
from typing import Any

from mpo_ext.checks import install_hint

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM takes for max_lora_rank
# Parts of the names of modules outside the language model, whose adapters vLLM ignores.
_TOWERS = ("vision", "visual", "image", "projector", "connector", "merger", "audio")
_MERGE = "merge the adapters (output.save_merged=true), or use the engine transformers"


def adapter_options(adapter: str) -> dict[str, Any]:
    """Checks a folder of LoRA adapters, and returns the options of ``vllm.LLM`` that they need.

    Raises:
        FileNotFoundError: If the folder does not hold adapters.
        ImportError: If safetensors is missing.
        ValueError: If vLLM cannot run the adapters, or would ignore a part of them.
    """
    folder = Path(adapter)
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"adapter must be a folder with adapter_config.json, got {adapter}")
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ValueError(f"adapter must be without {name} for vLLM, got {config[name]!r} in {path}: {_MERGE}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError(
            f"adapter must be of type LORA without biases for vLLM, got {config.get('peft_type')} with bias "
            f"{config.get('bias')!r} in {path}: {_MERGE}"
        )
    for name in _tensor_names(folder):
        if any(part in name.lower() for part in _TOWERS):
            raise ValueError(
                f"adapter must change the language model only for vLLM, which ignores the rest, got {name}: {_MERGE}"
            )
    rank = next((rank for rank in _RANKS if rank >= config["r"]), None)
    if rank is None:
        raise ValueError(f"adapter must have a rank of at most {_RANKS[-1]} for vLLM, got {config['r']}: {_MERGE}")
    return {"enable_lora": True, "max_lora_rank": rank}


def adapter_request(adapter: str) -> Any:
    """Returns vLLM's ``LoRARequest`` for a folder of LoRA adapters."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(Path(adapter).absolute()))


def _tensor_names(folder: Path) -> list[str]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"adapter must be a folder with adapter_model.safetensors, got {folder}")
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"adapters need safetensors: {install_hint('train')}") from error
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
