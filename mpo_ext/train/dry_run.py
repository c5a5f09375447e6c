"""The checks of ``mpo-ext train --dry-run`` that need the model's processor, but not its weights."""

import dataclasses
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.processors import load_without_weights
from mpo_ext.train.checkpoint import Checkpoints, read_state
from mpo_ext.train.dataset import Collator, RunData
from mpo_ext.train.encode import BAD_PAIR, BadPairError, Encoder, Sample
from mpo_ext.train.inputs import collect_inputs, compare_inputs, stored_date
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.pair_counts import PairCounts
from mpo_ext.train.proof import prove
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.resume import changed_settings
from mpo_ext.train.setup import check_reference_tokens, make_encoder
from mpo_ext.train.unknown_tokens import find_unknown

_ENCODED_PAIRS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class EncodingReport:
    """The result of ``check_encoding``.

    Attributes:
        lines: Lines of text about the encoded pairs: lengths in tokens, skipped pairs, warnings.
        problems: Reasons why the run would stop.
    """

    lines: tuple[str, ...]
    problems: tuple[str, ...]

    def text_lines(self) -> Iterator[str]:
        """Yields the lines of the report, and then a line for each problem."""
        yield from self.lines
        yield from (f"NOT VALID: {problem}" for problem in self.problems)


def find_checkpoint(recipe: Recipe) -> Path | None:
    """Returns the checkpoint from which the run would resume, or None. Raises the errors of ``Checkpoints.find``."""
    return Checkpoints(Path(recipe.output.dir) / "checkpoints").find(recipe.output.resume)


def load_encoder(recipe: Recipe, checkpoint: Path | None) -> Encoder:
    """Returns the encoder of a run. Loads the processors of the model and of ``reference.path``, but no weights.

    ``checkpoint`` is the result of ``find_checkpoint``. It determines the date that a chat template may print.

    Raises the errors of ``load_without_weights``, ``ChatEncoder`` and ``check_reference_tokens``.
    """
    loaded = load_without_weights(recipe.model.path, **recipe.model.hub_options)
    inputs = None if checkpoint is None else read_state(checkpoint).get("inputs")
    encoder = make_encoder(
        recipe,
        loaded.processor,
        loaded.config,
        date=stored_date(inputs) or datetime.date.today(),
        stop_ids=loaded.stop_ids,
        embedding_rows=loaded.embedding_rows,
    )
    path = recipe.reference.path
    if path is not None and recipe.reference_kind is not None:
        reference = load_without_weights(path, **recipe.reference_hub_options)
        check_reference_tokens(path, encoder.chat, reference.processor, reference.embedding_rows)
    return encoder


def check_encoding(recipe: Recipe, mixture: Mixture, encoder: Encoder) -> EncodingReport:
    """Encodes up to 100 training pairs as the run would.

    The pairs are spread evenly over an epoch of ``mixture``. Bad lines are left out. Like the run, this function
    compares the first three encoded pairs with the model's own processor.
    """
    pairs = list(_spread_pairs(mixture))
    counts, lengths = PairCounts(), []
    for pair, name in pairs:
        try:
            result = encoder.encode(pair, name)
        except BadPairError as error:
            counts.add(error)
            continue
        counts.add(result)
        if isinstance(result, Sample):
            lengths.append(len(result.prompt_ids) + max(len(result.chosen_ids), len(result.rejected_ids)))
    size = f", {min(lengths):,} to {max(lengths):,} tokens (prompt and longer response)" if lengths else ""
    proof = prove(encoder, pairs)
    lines = [f"{len(pairs):,} pairs were encoded: {counts.kept:,} can be trained{size}", *counts.lines()]
    lines += [f"chat template: {notice}" for notice in proof.notices]
    if (unknown := find_unknown(encoder.chat, pairs)) is not None:
        lines.append(f"WARNING: {unknown}")
    problems = [*proof.problems]
    if counts.kept == 0:
        problems.append("the run would skip every pair" if recipe.data.skip_bad else "no pair can be trained")
    elif counts.skipped[BAD_PAIR] and not recipe.data.skip_bad:
        problems.append("the run would stop at the first pair that cannot be encoded")
    return EncodingReport(tuple(lines), tuple(problems))


def check_resume(recipe: Recipe, checkpoint: Path | None, encoder: Encoder, steps: int) -> Iterator[str]:
    """Yields lines of text that say whether the run would be new, would resume, or would have no steps left.

    The function compares the recipe and the data with the checkpoint, as the run does. If the data cannot be compared,
    a line says why. Weights are not compared. Damaged files of the checkpoint are not detected.

    Args:
        recipe: Recipe of the run.
        checkpoint: The result of ``find_checkpoint``.
        encoder: The result of ``load_encoder``.
        steps: Total number of steps of the run.

    Raises:
        LinesError: If a change of the recipe or the data prevents the run from resuming.
    """
    folder = recipe.output.dir
    if checkpoint is None:
        yield f"{folder}: a new run of {steps} steps"
        return
    state = read_state(checkpoint)
    changed = changed_settings(state, recipe, checkpoint)
    yield from (f"since the checkpoint: {text}" for text in changed.values())
    stored = state.get("inputs")
    if stored is None:
        yield f"not compared: the data of {checkpoint}, which an earlier version of mpo_ext wrote"
    elif "LOCAL_RANK" in os.environ:  # an Accelerator would wait for the other ranks
        yield f"not compared: the data and those of {checkpoint} (a dry run without a launcher compares them)"
    else:
        from accelerate import Accelerator

        collator = Collator("separate", encoder.end_id, recipe.loss.has_preference, positions=None)
        data = RunData(recipe, Accelerator(cpu=True), encoder, collator)
        changes = compare_inputs(stored, collect_inputs(data, stored, {}), changed)
        changes.check(checkpoint, accept=recipe.output.resume_changed_data)
        yield from changes.lines()
    step = state["step"]
    if step > steps:
        yield f"the recipe asks for {steps} steps, but the model has {step}"
    if step >= steps:
        yield f"{folder}: already finished (step {step} of {steps}), so the run would train nothing"
    else:
        yield f"{folder}: the run would resume after step {step} of {steps}"


def _spread_pairs(mixture: Mixture) -> Iterator[tuple[Pair, str]]:
    epoch = mixture.epoch(0)
    for place in np.unique(np.linspace(0, len(epoch) - 1, _ENCODED_PAIRS).round().astype(int)):
        pair, name = mixture.read(int(epoch[place]))
        if not isinstance(pair, BadLine):
            yield pair, name
