"""Loads a model's processor and rejects unsupported models, before the weights are loaded."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

from mpo_ext.chat.encoder import as_ids
from mpo_ext.chat.template import special_ids
from mpo_ext.checks import install_hint

_CACHED_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")
_HUB_SECONDS = 10.0
#: Options of ``from_pretrained`` that decide which files are loaded.
HUB_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")
# Encoders that transformers also loads as causal models; their attention is causal only if ``is_decoder`` is set.
_ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet",
    "xmod",
}  # fmt: skip
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "decoder")  # parts that may hold the decoder's config


def takes_images(config: Any) -> bool:
    """Returns whether a config belongs to an image-text-to-text model, including models with custom code."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in own_code


def load_config(path: str, **options: Any) -> Any:
    """Returns the config of a model.

    Args:
        path: Folder or hub name of the model.
        **options: Passed to ``from_pretrained``, such as ``revision`` or ``trust_remote_code``.

    Raises:
        OSError: If the config cannot be read.
        ValueError: If the checkpoint has the format of InternVL's authors, needs ``trust_remote_code``, or has a model
            type that transformers does not know.
    """
    from transformers import AutoConfig, PretrainedConfig

    hub = {key: options[key] for key in HUB_OPTIONS if key in options and key != "trust_remote_code"}
    values: dict[str, Any] = {}
    with contextlib.suppress(OSError):  # AutoConfig explains the error
        values, _ = PretrainedConfig.get_config_dict(path, **hub)
    if values.get("model_type") == "internvl_chat":
        raise ValueError(
            f"model must have the format of transformers, got {path} in the format of InternVL's authors (model_type "
            f"internvl_chat): convert it once with 'mpo-ext convert-model {path} FOLDER', or take the checkpoint of "
            "the hub whose name ends with -HF (InternVL3.5) or -hf"
        )
    return AutoConfig.from_pretrained(path, **options)


def check_on_hub(name: str, path: str, **options: Any) -> None:
    """Checks that a model exists locally, in the cache, or on the hub.

    Args:
        name: Name of the argument in messages.
        path: Folder or hub name of the model.
        **options: Arguments of ``from_pretrained``. Only ``revision``, ``token``, ``cache_dir`` and
            ``local_files_only`` are used.

    Raises:
        FileNotFoundError: If the model is not found, or the hub cannot be reached.
    """
    # ``from_pretrained`` would ask the hub several times, and would not say that the folder does not exist.
    if os.path.exists(path) or "://" in path:
        return
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    here = (
        f"{name} must be a folder here or a model of the Hugging Face hub, got {path}: no folder {path} exists in "
        f"{os.getcwd()}"
    )
    revision = options.get("revision")
    is_offline = hub.constants.HF_HUB_OFFLINE
    try:
        for file in _CACHED_FILES:
            found = hub.try_to_load_from_cache(path, file, cache_dir=options.get("cache_dir"), revision=revision)
            if isinstance(found, str):
                return
        if not (is_offline or options.get("local_files_only")):
            url = hub.hf_hub_url(path, "config.json", revision=revision)
            hub.get_hf_file_metadata(url, token=options.get("token"), timeout=_HUB_SECONDS)
            return
        reason = (
            f"{'HF_HUB_OFFLINE' if is_offline else 'local_files_only'} is set, and the cache does not hold the model"
            + (f" at the revision {revision!r}" if revision is not None else "")
        )
    except (EntryNotFoundError, RevisionNotFoundError):
        return  # the model exists, but without config.json or this revision
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        reason = f"the hub does not give it ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    raise FileNotFoundError(f"{here}, and {reason}")


def load_processor(path: str, config: Any, **options: Any) -> Any:
    """Loads and returns the processor of an image model, or the tokenizer of a text model.

    Args:
        path: Folder or hub name of the model.
        config: The model's config.
        **options: Passed to ``from_pretrained``, such as ``revision``.

    Raises:
        ImportError: If transformers needs torchvision for this processor, and torchvision cannot be imported.
        ValueError: If ``check_supported`` rejects the model, or the files of the tokenizer are missing.
    """
    files = f"model must have the files of its tokenizer, such as tokenizer.json, got {path} without them"
    with _torchvision_errors(path):
        from transformers import AutoProcessor, AutoTokenizer

        check_supported(config)
        loader = AutoProcessor if takes_images(config) else AutoTokenizer
        try:
            processor = loader.from_pretrained(path, **options)
        except ValueError as error:
            if "backend tokenizer" not in str(error):
                raise
            raise ValueError(f"{files}, or in an unknown format: {' '.join(str(error).split())}") from error
    check_supported(config, processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    # Some tokenizers of transformers load without any file. AutoProcessor may return an image processor.
    if not hasattr(tokenizer, "all_special_ids") or len(tokenizer) <= len(special_ids(tokenizer)):
        raise ValueError(f"{files}: {type(tokenizer).__name__} has no tokens, except perhaps special ones")
    return processor


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedProcessor:
    """A model's processor and config, with the token ids that end a response or must not be generated.

    Attributes:
        processor: Processor, or the tokenizer of a text model.
        config: Config of the model.
        stop_ids: Ids at which the model stops, from ``generation_config.json``, or else from the config.
        embedding_rows: Number of rows of the input embedding, from the config; None: the config does not state it.
        suppressed: Sequences of ids that the model must not generate, from ``suppress_tokens`` and ``bad_words_ids``
            in ``generation_config.json``.
    """

    processor: Any
    config: Any
    stop_ids: tuple[int, ...]
    embedding_rows: int | None
    suppressed: tuple[tuple[int, ...], ...] = ()


def load_without_weights(path: str, **options: Any) -> LoadedProcessor:
    """Loads and returns a ``LoadedProcessor``: a model's processor, config and special token ids, without the weights.

    ``options`` are arguments of ``from_pretrained``. Only those in ``HUB_OPTIONS``, such as ``revision``, are used.

    Raises:
        ImportError: If the processor needs torchvision, and torchvision is missing.
        OSError: If a file is missing.
        ValueError: If transformers or this package does not support the model.
    """
    from transformers import GenerationConfig

    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    check_on_hub("model", path, **hub)
    with _torchvision_errors(path):
        config = load_config(path, **hub)
    processor = load_processor(path, config, **hub)
    text_config = config.get_text_config()
    suppressed: list[tuple[int, ...]] = []
    try:
        generation = GenerationConfig.from_pretrained(path, **hub)
    except OSError:  # the model has no generation_config.json
        stop_ids = getattr(text_config, "eos_token_id", None)
    else:
        stop_ids = generation.eos_token_id
        suppressed += [(token,) for token in as_ids(generation.suppress_tokens)]
        suppressed += [tuple(ids) for ids in generation.bad_words_ids or ()]
    rows = getattr(text_config, "vocab_size", None)
    return LoadedProcessor(processor, config, tuple(as_ids(stop_ids)), rows, tuple(suppressed))


def check_model(path: str, **options: Any) -> None:
    """Checks that a model is supported and, for an image model, that its processor can be loaded.

    Raises the errors of ``check_on_hub``, ``load_config`` and ``load_processor``. ``options`` are passed to
    ``from_pretrained``.
    """
    check_on_hub("model", path, **options)
    with _torchvision_errors(path):
        config = load_config(path, **options)
        has_images = takes_images(config)
    check_supported(config)
    if has_images:
        load_processor(path, config, **options)


@contextlib.contextmanager
def _torchvision_errors(path: str) -> Iterator[None]:
    """Converts an error in the ``with`` block to an ImportError if a missing or broken torchvision caused it."""
    try:
        yield
    except Exception as error:  # transformers raises ImportError, ValueError or RuntimeError, some with a cause
        problem, texts = torchvision_problem(), []
        cause: BaseException | None = error
        while cause is not None:
            texts.append(str(cause).lower())
            cause = cause.__cause__ or cause.__context__
        if problem is None or not any("torchvision" in text for text in texts):
            raise
        raise ImportError(
            f"the processor of {path} needs torchvision, but torchvision {problem}: {install_hint('vision')}, with "
            f"the torchvision that matches torch {importlib.metadata.version('torch')}"
        ) from error


def check_supported(config: Any, processor: Any = None) -> None:
    """Checks that a model generates text from left to right, and reads images as tokens of the text.

    Raises:
        ValueError: If the model is an encoder, has an encoder and a decoder, attends to images by cross-attention, or
            attends to its prompt in both directions (PaliGemma). Also raised if the processor returns labels.
    """
    configs = [config, *(getattr(config, name, None) for name in _TEXT_CONFIGS)]

    def has(name: str) -> bool:
        values = (getattr(one, name, None) for one in configs)
        return any(value is True or (isinstance(value, (list, tuple)) and bool(value)) for value in values)

    reason = None
    if has("is_encoder_decoder"):
        reason = "has an encoder and a decoder"
    elif getattr(config, "model_type", None) in _ENCODERS and not getattr(config, "is_decoder", False):
        reason = "attends to its whole text in both directions"
    elif has("cross_attention_layers"):
        reason = "attends to images by cross-attention"
    elif has("use_bidirectional_attention"):
        reason = "attends to its prompt in both directions"
    elif "labels" in (getattr(processor, "model_input_names", None) or ()):
        reason = f"has a processor that makes labels ({type(processor).__name__})"
    if reason is not None:
        raise ValueError(
            "model must read its prompt from left to right, with images as tokens of the prompt, got the model type "
            f"{getattr(config, 'model_type', type(config).__name__)!r}, which {reason}: it is not supported"
        )


def torchvision_problem() -> str | None:
    """Returns the reason why torchvision cannot be imported, or None if it can."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == "torchvision" else f"cannot be imported ({error})"
    except Exception as error:  # a torchvision built for another torch raises RuntimeError or OSError
        text = " ".join(str(error).split())[:120]
        return f"cannot be imported ({type(error).__name__}: {text})"
    return None
