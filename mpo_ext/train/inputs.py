"""Records the inputs of a run: data files, processor, library versions, weights and the first encoded pairs.

Checkpoints store the inputs. A run that resumes compares its inputs with the stored inputs and reports the changes.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_ext.checks import LinesError
from mpo_ext.data.fingerprint import HashedFile, describe_change, files_of, hash_file
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.provenance import changed_independently, changed_parts, library_versions, processor_parts
from mpo_ext.train.checkpoint_files import together
from mpo_ext.train.dataset import RunData
from mpo_ext.train.encode import BadPairError, Sample
from mpo_ext.train.mixture import Mixture, MixtureSubset
from mpo_ext.train.ranks import gather

_ENCODED_PAIRS = 8  # number of pairs of the run whose encoding is recorded
_SEARCHED_PAIRS = 1000  # maximum number of pairs that are searched for a pair with images
_IMAGE_LINES = 32  # number of lines per subset whose image files are recorded by size
_SHOWN = 10  # maximum number of changes in a message
_ACCEPT = "output.resume_changed_data=true accepts the changes; another output.dir starts a new run"


@dataclasses.dataclass
class InputChanges:
    """Messages about the inputs that have changed since the checkpoint.

    Attributes:
        refused: Changes that affect training: changed training data, a changed encoding of the same data, changed
            frozen weights or changed reference weights. The run resumes only if the user accepts these changes.
        allowed: Changes that do not affect training, such as other library versions that encode pairs in the same way.
        evaluation: Changes of the evaluation data. They do not prevent the run from resuming.
    """

    refused: list[str] = dataclasses.field(default_factory=list)
    allowed: list[str] = dataclasses.field(default_factory=list)
    evaluation: list[str] = dataclasses.field(default_factory=list)

    def check(self, path: Path, *, accept: bool) -> None:
        """Raises ``LinesError`` if there are refused changes and ``accept`` is False.

        ``path`` is the path of the checkpoint, for the message.
        """
        if self.refused and not accept:
            raise LinesError(
                f"data, processor and start model must be those of {path}, but:\n  "
                + "\n  ".join(_shown(self.refused))
                + "\n"
                f"training would continue with other pairs, tokens or weights. {_ACCEPT}"
            )

    def lines(self) -> Iterator[str]:
        """Yields a line of text for each change, for the log."""
        for text in _shown(self.refused):
            yield f"since the checkpoint, accepted by output.resume_changed_data: {text}"
        if self.refused:
            yield "this epoch may visit some pairs twice and leave out others"
        for text in _shown(self.evaluation):
            yield f"since the checkpoint: evaluation: {text}"
        for text in _shown(self.allowed):
            yield f"since the checkpoint: {text}"


def collect_inputs(data: RunData, known: Mapping[str, Any] | None, fixed_weights: Mapping[str, str]) -> dict[str, Any]:
    """Returns the inputs of a run as JSON values. All ranks must call this function.

    Args:
        data: Data and encoder of the run.
        known: Inputs that a checkpoint stores, or None. A file is not read again if it has the same path, size and
            modification time as in the checkpoint.
        fixed_weights: Hashes of the weights of those models that no checkpoint stores. The keys are settings, such as
            ``model.path``.

    Raises:
        CheckpointError: If a rank cannot read a file.
    """
    accelerator = data.accelerator
    known_files = [] if known is None else [
        file for name in ("train", "eval") for subset in known[name] for file in subset["files"]
    ]  # fmt: skip
    files = [subset for mixture in data.mixtures for subset in _files_of_mixture(mixture)]
    flat = [file for subset in files for file in subset]
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with together(accelerator):
        hashed = [(number, hash_file(flat[number], known_files)) for number in range(rank, len(flat), world_size)]
    hashes = {number: values for part in gather(accelerator, hashed) for number, values in part}
    numbers = iter(range(len(flat)))
    fingerprints = iter([[hashes[next(numbers)] for _ in subset] for subset in files])
    inputs: dict[str, Any] = {"train": [], "eval": []}
    for name, mixture in zip(("train", "eval"), data.mixtures, strict=False):
        inputs[name] = [_describe_subset(mixture, subset, next(fingerprints)) for subset in mixture.subsets]
    return {
        **inputs,
        "date": data.encoder.chat.date.isoformat(),
        "processor": processor_parts(data.encoder.chat, [data.encoder.chat.end_id]),
        "versions": library_versions(),
        "weights": dict(fixed_weights),
        "pairs": _encoded_pairs(data),
    }


def compare_inputs(
    old: Mapping[str, Any], new: Mapping[str, Any], changed_settings: Iterable[str] = ()
) -> InputChanges:
    """Returns the changes from the inputs of a checkpoint (``old``) to the inputs of the run that resumes (``new``).

    ``changed_settings`` are the names of the recipe's changed settings. If a setting of ``data.eval`` is among them,
    the evaluation data are not compared, because the message about the setting suffices.
    """
    changes = InputChanges()
    changes.refused += _changed_subsets(old["train"], new["train"])
    if not any(name.startswith("data.eval") for name in changed_settings):
        changes.evaluation += _changed_subsets(old["eval"], new["eval"])
    for name in old["weights"].keys() & new["weights"].keys():
        if old["weights"][name] != new["weights"][name]:
            changes.refused.append(f"{name}: the model has other weights than at the beginning of the run")
    _compare_encoding(old, new, changes)
    return changes


def stored_date(inputs: Mapping[str, Any] | None) -> datetime.date | None:
    """Returns the date in the prompts of a run, from the ``inputs`` of its checkpoint; None if ``inputs`` is None."""
    return None if inputs is None else datetime.date.fromisoformat(inputs["date"])


def _files_of_mixture(mixture: Mixture) -> Iterator[list[HashedFile]]:
    for number in range(len(mixture.sources)):
        yield from files_of(mixture.open_source(number))


def _describe_subset(mixture: Mixture, subset: MixtureSubset, files: list[dict[str, Any]]) -> dict[str, Any]:
    source = mixture.open_source(subset.source)
    return {
        "name": subset.label,
        "path": source.path,
        "format": source.format,
        "lines": subset.lines,
        "repeat_time": subset.repeat_time,
        "files": files,
        "images": [[image, _size(image)] for image in _compared_images(mixture, subset)],
    }


def _compared_images(mixture: Mixture, subset: MixtureSubset) -> Iterator[str]:
    """Yields the image and video paths of a few lines. The lines are spread evenly over a subset of the data."""
    count = min(subset.lines, _IMAGE_LINES)
    for line in np.linspace(0, subset.lines - 1, count).round().astype(int) if count else ():
        pair, _ = mixture.read(subset.first + int(line))
        if not isinstance(pair, BadLine):
            yield from pair.media_paths


def _size(image: str) -> int | None:
    """Returns the size of an image file in bytes, or None if the file does not exist."""
    try:
        return os.stat(image).st_size
    except (OSError, ValueError):
        return None


def _changed_subsets(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a message for each difference between the data of a checkpoint and the data of the run.

    ``old`` (checkpoint) and ``new`` (run) hold the descriptions of all data subsets.
    """
    names = [[subset["name"] for subset in subsets] for subsets in (old, new)]
    if len(old) != len(new):
        yield f"the subsets were {', '.join(names[0])}, are {', '.join(names[1])}"
        return
    digests = {file["digest"]: file["name"] for subset in old for file in subset["files"]}
    for before, after in zip(old, new, strict=True):
        where = f"{after['path']}" if after["name"] in after["path"] else f"{after['path']}: {after['name']}"
        for name in ("repeat_time", "format"):
            if before[name] != after[name]:
                yield f"{where}: {name} was {before[name]!r}, is {after[name]!r}"
        if len(before["files"]) != len(after["files"]):
            lines = f"{before['lines']:,} pairs before, {after['lines']:,} now"
            yield f"{where}: has {len(after['files'])} files, had {len(before['files'])} ({lines})"
            continue
        texts = []
        for old_file, new_file in zip(before["files"], after["files"], strict=True):
            if text := describe_change(old_file, new_file):
                other = digests.get(new_file["digest"])
                texts.append(f"{new_file['name']}: {f'it holds what {other} held' if other else text}")
        yield from texts
        if not texts:
            yield from _changed_images(before, after)


def _changed_images(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message if image files have another size than at the checkpoint, or no longer exist.

    ``old`` describes a data subset at the checkpoint, and ``new`` describes the same subset in the run. Images that
    were already missing at the checkpoint are not compared.
    """
    pairs = zip(old["images"], new["images"], strict=False)
    changed = [(path, before, after) for (_, before), (path, after) in pairs if before is not None and before != after]
    if changed:
        path, before, after = changed[0]
        yield (
            f"{new['path']}: {len(changed)} of the {len(new['images'])} compared images have another size, as {path}: "
            f"{before:,} bytes before, {'missing' if after is None else f'{after:,}'} now"
        )


def _encoded_pairs(data: RunData) -> list[dict[str, Any]]:
    """Returns a dict of hashes for each of the first 8 pairs of the run.

    A dict has separate hashes for the texts, the image files, the token ids, and all encoded inputs. If the 8 pairs
    have no images and no videos, the next pair with an image or a video is added. Only 1,000 pairs are searched.
    """
    encoded: list[dict[str, Any]] = []
    has_images = False
    for pair, name in itertools.islice(data.first_pairs(), _SEARCHED_PAIRS):
        if len(encoded) >= _ENCODED_PAIRS and not pair.media_paths:
            continue
        try:
            sample = data.encoder.encode(pair, name)
        except BadPairError:
            continue
        has_images = has_images or bool(pair.media_paths)
        encoded.append(
            {
                "name": name,
                "content": _hash_pair(pair),
                "files": [_hash_image(path) for path in pair.media_paths],
                "tokens": _hash_tokens(sample) if isinstance(sample, Sample) else f"skipped: {sample.reason}",
                "digest": sample.digest if isinstance(sample, Sample) else "",
            }
        )
        if len(encoded) >= _ENCODED_PAIRS and has_images:
            break
    return encoded


def _hash_pair(pair: Pair) -> str:
    """Returns a hash of a pair. Paths do not count, because the folder of images may move.

    The hash covers the texts, the tools, the numbers of images, and the settings and number of files of each video.
    """
    turns = [pair.source.get(name) for name in ("messages", "chosen_messages", "rejected_messages")]
    texts: list[Any] = [pair.question, pair.chosen, pair.rejected, turns, len(pair.images)]
    texts += [tools] if (tools := pair.source.get("tools")) else []
    if pair.videos or pair.rejected_images:
        videos = [(len(video.paths), video.fps, video.max_frames) for video in pair.videos]
        texts += [videos, len(pair.rejected_images)]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def _hash_image(image: str) -> str:
    try:
        return hashlib.blake2b(Path(image).read_bytes(), digest_size=16).hexdigest()
    except (OSError, ValueError):
        return ""


def _hash_tokens(sample: Sample) -> str:
    """Returns a hash of the token ids, targets and per-token inputs of a sample. Pixels are left out."""
    hasher = hashlib.blake2b(digest_size=16)
    ids = {"prompt": sample.prompt_ids, "chosen": sample.chosen_ids, "rejected": sample.rejected_ids}
    targets = {"chosen targets": sample.chosen_targets, "rejected targets": sample.rejected_targets}
    for name, tensor in sorted({**ids, **targets, **sample.token_inputs}.items()):
        if tensor is not None:
            hasher.update(f"{name} {tensor.tolist()};".encode())
    return hasher.hexdigest()


def _compare_encoding(old: Mapping[str, Any], new: Mapping[str, Any], changes: InputChanges) -> None:
    """Compares the processor, the library versions and the encoded first pairs. Adds the differences to ``changes``.

    A new library version may write the same processor in another form. This difference is allowed if the first pairs
    are encoded as before.
    """
    parts = changed_parts(old["processor"], new["processor"])
    versions = list(changed_parts(old["versions"], new["versions"]).values())
    both = _same_texts(old["pairs"], new["pairs"])
    replaced = [after["name"] for before, after in both if before["files"] != after["files"]]
    changes.refused += [f"{name}: the content of its images has changed" for name in replaced[:1]]
    both = [(before, after) for before, after in both if before["files"] == after["files"]]
    tokens = [after["name"] for before, after in both if before["tokens"] != after["tokens"]]
    pixels = [after["name"] for before, after in both if before["digest"] != after["digest"]]
    same = f"the first {len(both)} compared pairs are encoded as before"
    if tokens or (pixels and (parts or versions)):
        changes.refused += [*parts.values(), *versions]
        kind = "other token ids" if tokens else "other pixels"
        changes.refused.append(f"{(tokens or pixels)[0]}: the pair has {kind} than before")
    elif parts and (changed_independently(parts) or not versions or not both):
        changes.refused += parts.values()
        changes.allowed += [f"{text} ({same})" for text in versions]
    else:
        changes.allowed += [f"{text} ({same})" for text in [*parts.values(), *versions]]
        changes.allowed += [
            f"{name}: the pixels differ by rounding: same files, processor and versions" for name in pixels[:1]
        ]


def _same_texts(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Returns tuples (old pair, new pair) with equal texts. New pairs without a match are left out.

    If several old pairs have the texts of a new pair, the old pair with the same images is chosen. If no old pair has
    the same images, the old pair with the same name is chosen.
    """
    both = []
    for pair in new:
        alike = [other for other in old if other["content"] == pair["content"]]
        found = next((other for other in alike if other["files"] == pair["files"]), None)
        if found is None and len(alike) > 1:
            found = next((other for other in alike if other["name"] == pair["name"]), None)
        elif found is None and alike:
            found = alike[0]
        if found is not None:
            both.append((found, pair))
    return both


def _shown(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - _SHOWN:,} more"] if len(texts) > _SHOWN else []
    return [*texts[:_SHOWN], *more]
