"""From what the user names to an engine: whole models, folders of runs, and adapters."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_ext.checks import check_model_path, install_hint
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.transformers_engine import TransformersEngine

_SHOWN = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        path: Folder or name of a whole model.
        adapter: Folder of LoRA adapters to merge into it.
    """

    path: str
    adapter: str | None = None


def find_model(name: str) -> Source:
    """Says what to load for a folder or name: a model, the ``final`` of a run, or adapters with their base model.

    Raises:
        FileNotFoundError: If a path of a folder here is none.
        ValueError: If nothing here can be loaded. The message says what to do.
    """
    folder = Path(name)
    if not folder.exists():
        if _is_hub_name(name):
            check_model_path("model", name)
            return Source(name)
        raise ValueError(f"model must be a folder or a name on the hub, got {name!r}: the folder does not exist")
    if not folder.is_dir():
        raise ValueError(f"model must be a folder or a name on the hub, got the file {name!r}")
    if not _is_model(folder) and _is_model(folder / "final"):
        folder = folder / "final"
    if (folder / "config.json").exists() or any(folder.glob("*.gguf")):
        return Source(str(folder))
    if (folder / "adapter_config.json").exists():
        if (folder / "merged" / "config.json").exists():
            return Source(str(folder / "merged"))
        return Source(_base_of(folder), str(folder))
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"model must be a folder with a model, got the run {name!r} that has no final/ yet: "
            "give its mpo-ext train command again to end it"
        )
    if (folder / "manifest.json").exists():
        raise ValueError(
            f"model must be a folder with a model, got the checkpoint {name!r}: the run that wrote it leaves a model "
            "in its final/"
        )
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ValueError(
        "model must be a folder with config.json or adapter_config.json, or a run with final/, "
        f"got {name!r} with {', '.join(names[:_SHOWN]) or 'nothing'}{more}"
    )


def load_engine(source: Source, make: Callable[[str], Engine]) -> Engine:
    """Loads a model, with its adapters merged.

    Args:
        source: From ``find_model``.
        make: Makes an engine of the path of a whole model.

    Raises:
        ImportError: If there are adapters and peft is missing.
        ValueError: If there are adapters and the engine is not one of transformers.
    """
    engine = make(source.path)
    if source.adapter is not None:
        if not isinstance(engine, TransformersEngine):
            raise ValueError(
                f"model must be a whole one for the engine {type(engine).__name__}, got the adapters "
                f"{source.adapter!r}: train with output.save_merged=true, or take the engine transformers"
            )
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError(f"the adapters in {source.adapter} need peft: {install_hint('lora')}") from error
        adapted: Any = PeftModel.from_pretrained(engine.model, source.adapter)
        engine.model = adapted.merge_and_unload(safe_merge=True).eval()
        engine.name = source.adapter
    return engine


class Fingerprinted:
    """An engine whose settings tell its weights from others that stood in the same folder.

    Args:
        engine: Of transformers.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        from mpo_ext.train.model import fingerprint

        self.name = engine.name
        self.generate, self.encode, self.decode = engine.generate, engine.encode, engine.decode
        self._settings = {**engine.settings(), "weights": fingerprint(engine.model)}

    def settings(self) -> dict[str, Any]:
        """What the generations depend on."""
        return dict(self._settings)


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _base_of(folder: Path) -> str:
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must name the base model of the adapters, got {error!r}") from error
    if not isinstance(base, str) or not (Path(base).is_dir() or _is_hub_name(base)):
        raise ValueError(
            f"{path} must name a base model that is here, got {base!r}: put its folder into base_model_name_or_path, "
            "or train with output.save_merged=true"
        )
    return base
