"""Records the processor and the library versions that turn text and images into token ids and pixels.

Each run stores this record. A later run may resume this run, or use its samples or log-probs. The later run compares
the stored record with a new record of its processor and libraries, and names the parts that have changed.
"""

import enum
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mpo_ext.chat import ChatEncoder
from mpo_ext.checks import shorten
from mpo_ext.journal import differences

#: Packages whose versions can change token ids or pixels.
LIBRARIES = ("transformers", "tokenizers", "torch", "torchvision", "pillow", "sentencepiece", "tiktoken")

# Parts that depend only on the user's files and settings. The other parts also depend on a library's serialization.
_INDEPENDENT_PARTS = ("chat_template", "chat_template_kwargs", "date")
# Settings that name a class, a file or a version, or are set by calls, and so do not change pixels.
_IGNORED_SETTINGS = (
    "auto_map", "feature_extractor_type", "image_processor_type", "name_or_path", "_name_or_path", "processor_class",
    "transformers_version", "video_processor_type",
)  # fmt: skip
# Fields of tokenizer.json: the version of its format, and the state that calls with padding or truncation change.
_IGNORED_FIELDS = ("version", "truncation", "padding")
_TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space")
_VIDEO_PROCESSOR = "video_processor"


def library_versions() -> dict[str, str]:
    """Returns the versions of mpo_ext and of installed packages that can change token ids or pixels."""
    import mpo_ext

    versions = {"mpo_ext": mpo_ext.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def processor_parts(chat: ChatEncoder, end_ids: Iterable[int]) -> dict[str, Any]:
    """Returns the parts of a processor that determine token ids and pixels, as JSON values.

    The tokenizer and the chat template are represented by hashes. The date is included if the chat template writes it.
    Paths, versions and class names are left out. Null and false fields of the tokenizer are also left out, because
    later library versions may add such fields.

    Args:
        chat: Encoder with the processor, the chat template and its settings.
        end_ids: Ids of the tokens that end a response.
    """
    processor, tokenizer, chat_template = chat.processor, chat.tokenizer, chat.chat_template
    parts: dict[str, Any] = {
        "tokenizer": _tokenizer_digest(tokenizer),
        "special_tokens": {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()},
        "end_ids": sorted(end_ids),
    }
    flags = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_FLAGS}
    parts["special_tokens"] |= {name: flag for name, flag in flags.items() if isinstance(flag, bool)}
    if chat_template is not None:
        parts["chat_template"] = _digest(chat_template.encode(errors="surrogatepass"))
        if reads_date(chat_template):
            parts["date"] = chat.date.isoformat()
    if chat.chat_template_kwargs:
        parts["chat_template_kwargs"] = _plain(chat.chat_template_kwargs)
    if processor is not tokenizer:
        parts["processor"] = {
            name: value
            for name, value in sorted(vars(processor).items())
            if isinstance(value, (bool, int, float, str)) and name not in (*_IGNORED_SETTINGS, "chat_template")
        }
        image_processor = getattr(processor, "image_processor", None)
        if image_processor is not None:
            parts["image_processor"] = _plain(image_processor.to_dict())
        video_processor = getattr(processor, "video_processor", None)
        if video_processor is not None and hasattr(video_processor, "to_dict"):
            parts[_VIDEO_PROCESSOR] = _plain(video_processor.to_dict())
    return json.loads(json.dumps(parts))


def reads_date(chat_template: str | None) -> bool:
    """Returns whether a chat template may write the current date."""
    return chat_template is not None and "strftime_now" in chat_template


def changed_parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Returns a message for each difference between two results of ``processor_parts``.

    The keys are the dotted names of settings, such as ``image_processor.size.height``. The video processor is not
    compared if ``old`` has none, because earlier versions of mpo_ext did not record it.
    """
    if _VIDEO_PROCESSOR not in old:
        new = {name: value for name, value in new.items() if name != _VIDEO_PROCESSOR}
    return {
        name: f"{name} was {shorten(before)}, is {shorten(after)}" for name, before, after in differences(old, new)
    }


def changed_independently(names: Iterable[str]) -> list[str]:
    """Returns the changed parts that do not depend on library versions, such as "chat_template".

    ``names`` are the keys of a result of ``changed_parts``: all changed parts.
    """
    return [name for name in names if name.partition(".")[0] in _INDEPENDENT_PARTS]


def _tokenizer_digest(tokenizer: Any) -> str:
    """Returns a hash of a tokenizer.

    For a slow tokenizer, the hash covers the class name, the vocabulary and the added tokens. For a fast tokenizer, it
    covers the JSON definition. Fields in ``_IGNORED_FIELDS`` and fields that are null or false are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        added = {str(key): str(token) for key, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        values: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), sorted(added.items())]
    else:
        values = json.loads(backend.to_str())
        values = _without_defaults({name: value for name, value in values.items() if name not in _IGNORED_FIELDS})
        merges = values.get("model", {}).get("merges")
        if merges and not isinstance(merges[0], str):  # earlier versions write a merge as one string
            values["model"]["merges"] = [" ".join(merge) for merge in merges]
    return _digest(json.dumps(values, sort_keys=True).encode())


def _without_defaults(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _without_defaults(field) for name, field in value.items() if field is not None and field is not False
        }
    return [_without_defaults(field) for field in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Returns settings as JSON values. Leaves out settings that are None, and those in ``_IGNORED_SETTINGS``."""
    if isinstance(value, Mapping):
        return {
            str(name): _plain(setting)
            for name, setting in sorted(value.items(), key=lambda item: str(item[0]))
            if setting is not None and name not in _IGNORED_SETTINGS
        }
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if hasattr(value, "tolist"):  # an array
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
