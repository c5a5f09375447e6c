"""Precomputed reference log-probs. All ranks compute them once and store them in a file, which later steps read."""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpo_ext.checks import LinesError
from mpo_ext.data.reader import BadLine
from mpo_ext.files import atomic_write
from mpo_ext.journal import Journal, encode_line, read_header, read_records
from mpo_ext.provenance import changed_independently, changed_parts, library_versions, processor_parts
from mpo_ext.train.batch import Batch
from mpo_ext.train.dataset import NO_PAIR, RunData
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.reference_model import sequence_logp
from mpo_ext.train.signals import InterruptedRunError, StopRequests

_PROVENANCE = ("processor", "versions", "date")  # need not be equal in file and run; see ``_check_settings``


class PrecomputedReference:
    """Reads reference log-probs from a file. The key of a pair in the file is its ``Sample.digest``.

    Args:
        path: File of the log-probs.
        settings: Settings of this run, from ``reference_settings``.

    Raises:
        ValueError: If the file was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        header = _check_settings(path, settings)
        self._changes = _possible_causes(header, settings)
        self._logp = {NO_PAIR: [0.0, 0.0], **{record["key"]: record["logp"] for record in read_records(path)}}

    def logp(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Returns the summed log-probs of the B chosen and then the B rejected responses: ``[2B]`` float64.

        Raises ``ValueError`` if the file lacks a pair. ``policy`` is not used.
        """
        for name, digest in zip(batch.names, batch.digests, strict=True):
            if digest not in self._logp:
                raise ValueError(
                    f"reference.file must hold the pair {name}, got none with its tokens and pixels in {self.path}: "
                    f"{self._changes}; delete the file to compute it again"
                )
        logp = torch.tensor([self._logp[digest] for digest in batch.digests], dtype=torch.float64)
        return logp.T.flatten().to(batch.index.device)

    def sync(self, policy: nn.Module, mix: float) -> None:
        """Raises ``ValueError``, because stored log-probs cannot be updated towards the policy."""
        raise ValueError("sync_every must be 0 for a reference of kind 'precomputed'")


def reference_path(recipe: Recipe) -> Path:
    """Returns the path of the log-prob file: ``reference.file``, or "reference.jsonl" in the output folder."""
    return Path(recipe.reference.file or Path(recipe.output.dir, "reference.jsonl"))


def reference_settings(recipe: Recipe, data: RunData, fingerprint: str) -> dict[str, Any]:
    """Returns a dict of everything that the reference log-probs depend on: settings, versions and hashes.

    Reads all lines of the data. ``fingerprint`` is a hash of the weights of the reference model.
    """
    keys = []
    for mixture in data.mixtures:
        for index in range(len(mixture)):
            pair, name = mixture.read(index)
            keys.append(name if isinstance(pair, BadLine) else pair.key())
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(keys):
        digest.update(key.encode())
    return {
        "model": fingerprint,
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "precision": recipe.precision,
        "pairs": len(keys),
        "data": digest.hexdigest(),
        "max_length": recipe.data.max_length,
        "too_long": recipe.data.too_long,
        "from_logits": recipe.loss.from_logits,
        "processor": processor_parts(data.encoder.chat, [data.encoder.chat.end_id]),
        "versions": library_versions(),
        "date": data.encoder.chat.date.isoformat(),
    }


def reference_date(recipe: Recipe) -> datetime.date | None:
    """Returns the date that the prompts contained when the log-probs were precomputed.

    The date is read from the log-prob file, or from the unfinished files of an interrupted run. Returns None if no
    file stores a date. Also returns None if ``recipe.reference_kind`` is not "precomputed".
    """
    if recipe.reference_kind != "precomputed":
        return None
    path = reference_path(recipe)
    for file in (path, *_journal_paths(path)):
        if file.exists() and (settings := read_header(file)) is not None and "date" in settings:
            return datetime.date.fromisoformat(settings["date"])
    return None


def compute_reference_file(
    path: Path,
    settings: Mapping[str, Any],
    model: nn.Module,
    data: RunData,
    *,
    stop: StopRequests,
    say: Callable[[str], None],
) -> None:
    """Writes the reference log-probs of all pairs to a file. All ranks must call this function.

    Each rank computes the log-probs of a part of the pairs and appends them to a journal, a file beside ``path``. At
    the end, the journals are merged into ``path``. After an interruption, the next call continues from the journals.

    Args:
        path: File to write.
        settings: Settings of this run, from ``reference_settings``.
        model: Reference model.
        data: Pairs of the run.
        stop: Requests to end the run, such as signals.
        say: Function that prints a line.

    Raises:
        InterruptedRunError: If a signal ends the computation.
        ValueError: If the journals of an interrupted run were made with other settings.
    """
    recipe, accelerator = data.recipe, data.accelerator
    known = _known_digests(path, settings)
    say(f"reference: log-probs of {sum(map(len, data.mixtures)):,} pairs, computed once into {path}")
    was_training = model.training
    model.eval()
    journal_path = _journal_path(path, accelerator.process_index)
    begun = (
        read_header(journal_path) if journal_path.exists() else None
    )  # the journal of an interrupted run has equal settings, except perhaps for the versions of libraries
    with Journal(journal_path, begun or settings) as journal:
        for batches in _batches_of_ranks(data, known):
            for batch in batches:
                with torch.no_grad(), accelerator.autocast():
                    sums = sequence_logp(model, batch.to(accelerator.device), recipe.loss)
                logp = dict(zip(batch.digests, sums.view(2, -1).T.tolist(), strict=True))
                journal.append([{"key": key, "logp": logp[key]} for key in logp if key != NO_PAIR])
            if stop.agree():
                raise InterruptedRunError
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        say(f"reference: {_merge_journals(path, settings):,} pairs")
    accelerator.wait_for_everyone()
    model.train(was_training)


def _batches_of_ranks(data: RunData, known: set[str]) -> Iterator[list[Batch]]:
    """Yields this rank's batches of each step. Leaves out batches whose pairs are all in ``known``.

    ``known`` contains digests of pairs. Dummy batches are appended, so that all ranks have the same number of batches.
    """
    for step_slice in data.load_all_lines():
        batches = [batch for batch in step_slice.batches if not known.issuperset(batch.digests)]
        n_batches = max(gather(data.accelerator, len(batches)))
        yield batches + [data.dummy_batch()] * (n_batches - len(batches))


def _check_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a log-prob file. Raises ``LinesError`` if they differ from ``settings``.

    The error lists all differences. The date and the library versions may differ. With other library versions, only
    the parts of the processor that do not depend on the versions are compared.
    """
    old, new = read_header(path) or {}, json.loads(json.dumps(settings))
    texts = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if name not in _PROVENANCE and old.get(name) != new.get(name)
    ]
    if "processor" in old:  # earlier versions of mpo_ext did not store it
        parts = changed_parts(old["processor"], new["processor"])
        has_same_versions = old["versions"] == new["versions"]
        texts += [parts[name] for name in (parts if has_same_versions else changed_independently(parts))]
    if texts:
        raise LinesError(
            f"reference.file must have been made for this run, but {path} is stale:\n  " + "\n  ".join(texts) + "\n"
            "delete it to compute it again, or name another file"
        )
    return old


def _possible_causes(header: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Returns a text with the reasons why a pair may be missing in a log-prob file, such as a changed processor.

    ``header`` holds the settings of the file, and ``settings`` holds the settings of this run.
    """
    if "processor" not in header:
        return "the images, the processor, or the date in the prompts have changed (the file does not say which)"
    changed = [*changed_parts(header["processor"], settings["processor"]).values()]
    changed += changed_parts(header["versions"], settings["versions"]).values()
    return "; ".join(changed) or "the image files have changed, or this machine rounds pixels differently"


def _known_digests(path: Path, settings: Mapping[str, Any]) -> set[str]:
    """Returns the digests of the pairs whose log-probs an interrupted run has already computed.

    The digests are in journals beside ``path``. A journal is the unfinished file of a rank.
    """
    known: set[str] = set()
    for journal in _journal_paths(path):
        if read_header(journal) is not None:
            _check_settings(journal, settings)
            known.update(record["key"] for record in read_records(journal))
    return known


def _merge_journals(path: Path, settings: Mapping[str, Any]) -> int:
    """Merges the journals of all ranks into the file ``path`` and deletes them. Returns the number of pairs."""
    journals = _journal_paths(path)
    logp = {record["key"]: record["logp"] for journal in journals for record in read_records(journal)}
    with atomic_write(path, is_locked=True) as file:
        file.write(encode_line({"format": "mpo_ext.journal/1", "settings": dict(settings)}))
        for digest in sorted(logp):
            file.write(encode_line({"key": digest, "logp": logp[digest]}))
    for journal in journals:
        journal.unlink()
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    return len(logp)


def _journal_paths(path: Path) -> Iterable[Path]:
    return sorted(journal for journal in path.parent.glob(f"{path.name}.part-*") if journal.suffix != ".lock")


def _journal_path(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.part-{rank:05d}")
