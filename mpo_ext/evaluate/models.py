"""Loads models as engines. The folder of a model may hold a whole model, a training run or LoRA adapters."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_ext.chat import find_chat_template
from mpo_ext.chat.encoder import with_template
from mpo_ext.chat.variables import unused_notice
from mpo_ext.checks import check_model_path, install_hint
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.transformers_engine import TransformersEngine

_MAX_NAMES = 8  # maximum number of file names in an error message
# Files that are not downloaded with a revision
_UNREAD_FILES = ("original/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """The location of a model.

    Attributes:
        path: Folder or hub name of a whole model.
        adapter: Folder of LoRA adapters to merge into this model, or None.
        revision: Revision of ``path`` on the hub that the adapters were trained with; None: the default revision, or
            ``path`` is a folder.
    """

    path: str
    adapter: str | None = None
    revision: str | None = None


def find_model(name: str) -> ModelSource:
    """Returns the location of the model ``name``.

    ``name`` is a hub name or a folder. The folder holds a whole model or adapters. The folder of a training run is
    also accepted: its model is in the subfolder ``final``.

    Raises:
        FileNotFoundError: If the name is ``a/b``, and the folder ``a`` exists without ``b``.
        ValueError: If the name is neither a folder nor a possible hub name, or the folder has no usable model. The
            message says what to do.
    """
    folder = Path(name)
    if not folder.exists():
        if _is_hub_name(name):
            check_model_path("model", name)
            return ModelSource(name)
        raise ValueError(f"model must be a folder or a name on the hub, got {name!r}: the folder does not exist")
    if not folder.is_dir():
        raise ValueError(f"model must be a folder or a name on the hub, got the file {name!r}")
    if not _is_model(folder) and _is_model(folder / "final"):
        folder = folder / "final"
    if (folder / "config.json").exists() or any(folder.glob("*.gguf")):
        return ModelSource(str(folder))
    if (folder / "adapter_config.json").exists():
        if (folder / "merged" / "config.json").exists():
            return ModelSource(str(folder / "merged"))
        base, revision = _base_of(folder)
        return ModelSource(base, str(folder), revision)
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"model must be a folder with a model, got the run {name!r} without final/: "
            "repeat its mpo-ext train command to finish the run"
        )
    if (folder / "manifest.json").exists():
        raise ValueError(
            f"model must be a folder with a model, got the checkpoint {name!r}: the model of the run is in its final/"
        )
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    raise ValueError(
        "model must be a folder with config.json or adapter_config.json, or a run with final/, "
        f"got {name!r} with {', '.join(names[:_MAX_NAMES]) or 'nothing'}{more}"
    )


def load_engine(source: ModelSource, make: Callable[[str], Engine]) -> Engine:
    """Creates and returns the engine of a model, with the adapters of ``source`` merged into the model.

    If ``make`` has set a chat template, this template stays. Otherwise, a chat template in the folder of the adapters
    replaces the template of the base model. A revision of the base model is read from the cache of the hub, where
    missing files are downloaded first. A warning names the ``chat_template_kwargs`` that the template does not read.

    Args:
        source: Location of the model.
        make: Function that creates an engine from the path of a whole model.

    Raises:
        ImportError: If the model has adapters and peft is missing.
        ValueError: If the model has adapters and ``make`` does not return a ``TransformersEngine``.
    """
    engine = make(source.path if source.revision is None else _snapshot(source.path, source.revision))
    if source.adapter is not None:
        if not isinstance(engine, TransformersEngine):
            raise ValueError(
                f"model must be a whole model for the engine {type(engine).__name__}, got the adapters "
                f"{source.adapter!r}: train with output.save_merged=true, use the engine transformers, or give the "
                f"base model {source.path!r} with --engine-option adapter={source.adapter} to the engine vllm"
            )
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError(f"the adapters in {source.adapter} need peft: {install_hint('lora')}") from error
        adapted: Any = PeftModel.from_pretrained(engine.model, source.adapter)
        engine.model = adapted.merge_and_unload(safe_merge=True).eval()
        engine.name = source.adapter
        path = Path(source.adapter) / "chat_template.jinja"
        own = find_chat_template(engine.processor)
        if path.is_file() and engine.chat.chat_template == own and (template := path.read_text("utf-8")) != own:
            engine.chat = with_template(engine.chat, template)  # the template of the training run
    chat = getattr(engine, "chat", None)
    if chat is not None and (notice := unused_notice(chat.chat_template, chat.chat_template_kwargs)):
        warnings.warn(notice, stacklevel=2)
    return set_weights(engine)


def set_weights(engine: Engine) -> Engine:
    """Adds a hash of the model's weights to the settings of a ``TransformersEngine``, and returns the engine.

    A resumed run compares the settings. It thus detects changed weights in the same folder.
    """
    from mpo_ext.loss.weights import fingerprint

    if isinstance(engine, TransformersEngine):
        engine.weights = fingerprint(engine.model)
    return engine


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _snapshot(name: str, revision: str) -> str:
    """Returns the folder of a revision of a hub model. Downloads the files that the cache of the hub lacks."""
    import huggingface_hub

    try:
        return str(huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=list(_UNREAD_FILES)))
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise FileNotFoundError(
            f"the adapters need the base model {name} at the revision {revision!r}, got {reason}"
        ) from error


def _base_of(folder: Path) -> tuple[str, str | None]:
    """Returns the name of the adapters' base model and its revision. A base model in a folder has no revision."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must name the base model of the adapters, got {error!r}") from error
    if not isinstance(base, str) or not (Path(base).is_dir() or _is_hub_name(base)):
        raise ValueError(
            f"{path} must name a base model that exists here, got {base!r}: write its folder into "
            "base_model_name_or_path, or train with output.save_merged=true"
        )
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"revision in {path} must be a text or null, got {revision!r}")
    return base, None if Path(base).is_dir() else revision or None
