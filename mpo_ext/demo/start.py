"""Loads the trained SFT model that the package contains, so that the demo need not train it.

``python -m mpo_ext.demo.start FOLDER`` replaces the model in the package with the SFT model in ``FOLDER``. This folder
must be the output of ``mpo-ext demo --from-scratch``.
"""

import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import InternVLForConditionalGeneration

from mpo_ext.demo.model import DigitsProcessor, build_model, build_processor
from mpo_ext.demo.settings import Settings
from mpo_ext.demo.train import START
from mpo_ext.files import write_json

WEIGHTS = Path(__file__).with_name("start.safetensors")
INFO = WEIGHTS.with_suffix(".json")
_PACKAGES = ("torch", "transformers", "scikit-learn", "numpy")


def new_model(settings: Settings) -> tuple[InternVLForConditionalGeneration, DigitsProcessor]:
    """Sets torch's seed to the seed of the settings, and returns an untrained model and its processor."""
    torch.manual_seed(settings.seed)
    processor = build_processor(settings.side)
    size = {"hidden_size": settings.hidden_size, "layers": settings.layers, "side": settings.side}
    return build_model(processor.tokenizer, **size), processor


def shipped_start(settings: Settings) -> dict[str, Any] | None:
    """Returns the description of the SFT model in the package; None if this model does not fit ``settings``."""
    if not settings.uses_shipped_start or not INFO.exists():
        return None
    info: dict[str, Any] = json.loads(INFO.read_text(encoding="utf-8"))
    return info if info["settings"] == settings.start_settings() else None


def load_shipped(model: InternVLForConditionalGeneration, info: dict[str, Any]) -> None:
    """Loads the package's weights file into the model. ``info`` is the result of ``shipped_start``.

    Raises:
        ValueError: If the SHA-256 of the weights file differs from ``info``.
    """
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    if digest != info["sha256"]:
        raise ValueError(
            f"{WEIGHTS} must have the SHA-256 {info['sha256']}, got {digest}: install the package again, or run "
            "mpo-ext demo --from-scratch"
        )
    load_model(model, WEIGHTS)


def load_trained(model: InternVLForConditionalGeneration, run: Path) -> None:
    """Loads the final weights of the training run in the folder ``run`` into the model."""
    trained = InternVLForConditionalGeneration.from_pretrained(run / "final", dtype=torch.float32)
    model.load_state_dict(trained.state_dict())


def weights_digest(model: InternVLForConditionalGeneration) -> str:
    """Returns a short hash of the model's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def ship(folder: Path) -> None:
    """Copies the SFT model of a demo run into the package. ``folder`` is the folder of the run.

    Raises:
        ValueError: If the demo did not train an SFT model.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    run = results["runs"][0]
    if run["start"] is not None:
        raise ValueError(f"folder must hold a demo that ran with --from-scratch, got {folder}")
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: value for name, value in run["settings"].items() if name in names})
    model, _ = new_model(settings)
    load_trained(model, folder / "runs" / START)
    save_model(model, str(WEIGHTS))
    WEIGHTS.chmod(0o644)
    info = {
        "command": results["command"],
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "settings": settings.start_settings(),
        "seconds": round(run["seconds"]["SFT start"]),
        "platform": platform.platform(),
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }
    write_json(INFO, info)


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
