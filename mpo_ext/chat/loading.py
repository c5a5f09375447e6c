"""Loads the processor of a model and the parts of its configs that belong to it, without the weights."""

import dataclasses
from typing import Any

_HUB_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedProcessor:
    """The processor of a model.

    Attributes:
        processor: Processor, or the tokenizer of a text model.
        config: Config of the model.
        stop_ids: Ids at which the model stops, from ``generation_config.json``, or else from the config.
        embedding_rows: Number of rows of the input embedding according to the config; None: the config has none.
    """

    processor: Any
    config: Any
    stop_ids: tuple[int, ...]
    embedding_rows: int | None


def load_processor(name: str, **options: Any) -> LoadedProcessor:
    """Loads the processor of a model.

    Args:
        name: Folder or hub name of the model.
        **options: Options for ``from_pretrained``, of which those that do not concern the location are ignored.

    Raises:
        ImportError: If a package that the processor needs is missing.
        OSError: If a file is missing.
        ValueError: If the files are not those of a model that transformers supports.
    """
    import transformers

    hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
    config = transformers.AutoConfig.from_pretrained(name, **hub)
    has_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    processor = (transformers.AutoProcessor if has_images else transformers.AutoTokenizer).from_pretrained(name, **hub)
    text_config = config.get_text_config()
    try:
        stop_ids = transformers.GenerationConfig.from_pretrained(name, **hub).eos_token_id
    except OSError:  # the model has no generation_config.json
        stop_ids = getattr(text_config, "eos_token_id", None)
    ids = () if stop_ids is None else (stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids)
    return LoadedProcessor(processor, config, ids, getattr(text_config, "vocab_size", None))
