"""Settings of a source of pairs: an entry of ``data.train`` or ``data.eval`` in a recipe."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StrictStr

from mpo_ext.train.settings import Positive, Strings, Text, TwoStrings, list_of, section, wrong_type


@section
class SourceRecipe:
    """A file or folder of pairs in a format that ``mpo_ext.data.open_pairs`` reads.

    Attributes:
        path: File, folder or dataset on the Hugging Face hub.
            File: an MMPR meta file, or pairs as .jsonl, .json, .csv or .parquet, also compressed.
            Folder: parquet files, or a dataset that ``save_to_disk`` wrote.
            Hub: ``hf://owner/name``, or ``owner/name`` if no local path has this name.
        format: "mmpr", "pairs" (written by ``mpo-ext sample``), "trl", "sharegpt", "alpaca", "swift", "openai",
            "rlaif-v" or "hf" (folder that ``save_to_disk`` wrote); None detects the format.
        root: Folder against which relative image paths are resolved. None: the folder that contains ``path``; ``path``
            itself for a folder of parquet files; the current folder for the hub. Not used for an MMPR meta file.
        root_map: List of folders ``(old, new)``: images and annotations in ``old`` have moved to ``new``.
        image_dir: Folder to which images are written if the source stores them as bytes. None: ``mpo_ext/images``
            beside the cache folder of the package ``datasets``.
        split: Name of the split to read, for a dataset that has several splits.
        revision: Branch, tag or commit of a dataset of the hub; None: the default branch.
        config: Name of the configuration to read, for a dataset of the hub that has several configurations.
        ignore: Names of fields that are removed from each line before it is read, also from nested objects.
        repeat_time: Average number of visits to each pair per epoch: 0.5 visits a random half of the pairs, 2 visits
            each pair twice. In an MMPR meta file, the ``repeat_time`` of each subset is multiplied by this value.
    """

    path: Text
    format: Literal["mmpr", "pairs", "trl", "sharegpt", "alpaca", "swift", "openai", "rlaif-v", "hf"] | None = None
    root: StrictStr | None = None
    root_map: Annotated[tuple[TwoStrings, ...], list_of("lists of 2 strings")] = ()
    image_dir: StrictStr | None = None
    split: StrictStr | None = None
    revision: StrictStr | None = None
    config: StrictStr | None = None
    ignore: Strings = ()
    repeat_time: Positive = 1.0


def _to_source(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, (Mapping, SourceRecipe)):
        raise wrong_type("a path or a section")
    return value


def _to_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, (str, Mapping, SourceRecipe)) else value


_Source = Annotated[SourceRecipe, BeforeValidator(_to_source)]
#: A source, or a list of sources; None is an empty list. pydantic runs BeforeValidators from right to left.
Sources = Annotated[tuple[_Source, ...], list_of("paths or sections"), BeforeValidator(_to_list)]
