"""Reads, encodes and batches the pairs of a run: ``StepDataset`` gives each rank its part of each optimizer step.

The pairs of a step depend only on the seed and the step number (``StepSampler``), so a run resumes without a stored
position in the data. Each rank sorts its pairs by length and divides them into micro-batches.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mpo_ext.checks import LinesError
from mpo_ext.data.media import place_problem
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.train.batch import Batch, RowLayout, collate
from mpo_ext.train.encode import BadPairError, Encoder, MissingImageError, Sample, SkippedPair
from mpo_ext.train.mixture import Mixture, root_advice, stored_lines
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.sampler import StepSampler, micro_batches, token_micro_batches
from mpo_ext.train.signals import blocked_in_new_workers, init_worker

NO_PAIR = ""  # digest of a dummy sample


class BatchCounts(NamedTuple):
    """The numbers by which averaged losses are divided: pairs, tokens and responses in a micro-batch or a step."""

    pairs: int = 0
    chosen_tokens: int = 0
    chosen_responses: int = 0
    routed_tokens: int = 0  # Batch.routed_tokens

    def ntp_parts(self, ntp_average: str) -> int:
        """Returns the number of items over which the next-token loss is averaged.

        If ``ntp_average`` is "token", the items are the tokens of the chosen responses. If it is "sequence", the items
        are the chosen responses.
        """
        return self.chosen_tokens if ntp_average == "token" else self.chosen_responses


def _sum_counts(counts: Sequence[BatchCounts]) -> BatchCounts:
    return BatchCounts(*(sum(values) for values in zip(BatchCounts(), *counts, strict=True)))


@dataclasses.dataclass(frozen=True, slots=True)
class StepSlice:
    """The part of a step that one rank trains on.

    Attributes:
        step: Step number, from 0.
        batches: The micro-batches.
        counts: Sizes of each micro-batch in ``batches``.
        skipped: Skipped pairs; each object states its reason.
        n_cut: Number of pairs with a truncated response.
        n_split: Number of pairs with a response that was tokenized separately from the prompt.
        error: Message of an error that must end the run, such as a bad pair; None: no error.
    """

    step: int
    batches: tuple[Batch, ...]
    counts: tuple[BatchCounts, ...]
    skipped: tuple[SkippedPair | BadLine | BadPairError, ...]
    n_cut: int = 0
    n_split: int = 0
    error: str | None = None


class StepSize(NamedTuple):
    """The size of a step over all ranks.

    Attributes:
        counts: Sums over all micro-batches of all ranks.
        micro_steps: Number of micro-batches on the rank with the most micro-batches.
        micro_batches: Number of micro-batches on all ranks together.
    """

    counts: BatchCounts
    micro_steps: int
    micro_batches: int


def size_over_ranks(accelerator: Any, step_slice: StepSlice) -> StepSize:
    """Returns the size of a step over all ranks. ``step_slice`` is this rank's part of the step.

    All ranks must call this function. If ``step_slice.error`` is set on any rank, all ranks raise ``ValueError``.
    """
    ranks = gather(accelerator, (step_slice.error, _sum_counts(step_slice.counts), len(step_slice.batches)))
    if errors := [error for error, _, _ in ranks if error is not None]:
        raise ValueError("; ".join(errors))
    n_batches = [number for _, _, number in ranks]
    return StepSize(_sum_counts([counts for _, counts, _ in ranks]), max(n_batches), sum(n_batches))


@dataclasses.dataclass(frozen=True, slots=True)
class Collator:
    """A picklable ``collate`` for DataLoader workers. The fields are the options of ``collate``."""

    layout: RowLayout
    pad_id: int
    with_rejected: bool
    positions: Any
    blank: Sample | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return collate(
            samples, self.layout, pad_id=self.pad_id, with_rejected=self.with_rejected, positions=self.positions,
            blank=self.blank,
        )  # fmt: skip


@dataclasses.dataclass(eq=False)
class StepDataset(torch.utils.data.Dataset[StepSlice]):
    """Reads, encodes and batches the pairs of a rank. Item k is the ``StepSlice`` of step k.

    DataLoader workers run this class.

    Attributes:
        mixture: The pairs of all data sources.
        sampler: Assigns pairs to steps and ranks.
        encoder: Encodes a pair as a sample.
        collator: Combines samples into a batch.
        rank: Rank of this process.
        world_size: Number of processes.
        micro_batch_size: Number of pairs per micro-batch, if ``micro_batch_tokens`` is None.
        micro_batch_tokens: Maximum number of token positions per micro-batch; None: ``micro_batch_size`` pairs.
        group_prompts: Whether pairs with the same prompt stay adjacent when pairs are divided into micro-batches. Not
            used with ``micro_batch_tokens``.
        skip_bad: Whether bad pairs are skipped; False: a bad pair ends the run.
    """

    mixture: Mixture
    sampler: StepSampler
    encoder: Encoder
    collator: Collator
    rank: int
    world_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    group_prompts: bool
    skip_bad: bool

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __getitem__(self, step: int) -> StepSlice:
        samples: list[Sample] = []
        skipped: list[SkippedPair | BadLine | BadPairError] = []
        for index in self.sampler.rank_slice(step, self.rank, self.world_size):
            result = self.encode(int(index))
            if isinstance(result, Sample):
                samples.append(result)
            elif isinstance(result, SkippedPair) or self.skip_bad:
                skipped.append(result)
            else:
                return StepSlice(step, (), (), (), error=f"{result} ({self._advice(int(index), result)})")
        parts = [[samples[position] for position in positions] for positions in self._split(samples)]
        batches = tuple(map(self.collator, parts))
        counts = tuple(
            BatchCounts(
                len(part),
                sum(sample.n_chosen_targets for sample in part),
                sum(sample.n_chosen_targets > 0 for sample in part),
                batch.routed_tokens,
            )
            for part, batch in zip(parts, batches, strict=True)
        )
        n_cut, n_split = sum(sample.is_cut for sample in samples), sum(sample.is_split for sample in samples)
        return StepSlice(step, batches, counts, tuple(skipped), n_cut, n_split)

    def _split(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Divides samples into micro-batches. Returns the indices in ``samples`` for each micro-batch."""
        prompts, keys = [len(sample.prompt_ids) for sample in samples], [sample.prompt_key for sample in samples]
        if self.micro_batch_tokens is None:
            lengths = [
                prompt + max(len(sample.chosen_ids), len(sample.rejected_ids))
                for prompt, sample in zip(prompts, samples, strict=True)
            ]
            return micro_batches(lengths, self.micro_batch_size, groups=keys if self.group_prompts else None)
        sides = ("chosen_ids", "rejected_ids") if self.collator.with_rejected else ("chosen_ids",)
        responses = [[len(getattr(sample, side)) for side in sides] for sample in samples]
        rejected_prompts = {
            place: (sample.rejected_prompt.prompt_key, len(sample.rejected_prompt.prompt_ids))
            for place, sample in enumerate(samples)
            if sample.rejected_prompt is not None
        }
        return token_micro_batches(
            prompts,
            responses,
            self.micro_batch_tokens,
            self.collator.layout,
            groups=keys,
            rejected_prompts=rejected_prompts,
        )

    def _advice(self, index: int, result: BadLine | BadPairError) -> str:
        """Returns advice on a bad pair: how to skip it or, for a missing image, how to correct the path."""
        skip = "data.skip_bad=true leaves such pairs out"
        if not isinstance(result, MissingImageError):
            return skip
        source = self.mixture.open_source(self.mixture.locate(index)[0])
        return f"{root_advice(source.path, source.root)}; mpo-ext data check finds all missing images; {skip}"

    def encode(self, index: int) -> Sample | SkippedPair | BadLine | BadPairError:
        """Reads and encodes the pair on line ``index`` of ``mixture``.

        If the pair cannot be used, returns an object with the reason instead of a sample.
        """
        pair, name = self.mixture.read(index)
        if isinstance(pair, BadLine):
            return pair
        if (problem := place_problem(pair)) is not None:
            return BadPairError(f"{name}: {problem}")
        try:
            return self.encoder.encode(pair, name)
        except BadPairError as error:
            return error


def _all_lines(lines: int, epoch: int) -> np.ndarray:
    """Returns an epoch that visits each line once: the indices from 0 to ``lines - 1``, for any ``epoch``."""
    return np.arange(lines)


class RunData:
    """Loads this rank's part of all training pairs and evaluation pairs, step by step.

    Attributes:
        encoder: Encodes pairs as samples; may be replaced before the run.
        mixture: Training pairs.
        sampler: Assigns the training pairs to steps and ranks.
        total_steps: Number of steps of the run.
        eval_mixture: Evaluation pairs, or None.
        dummy: Sample for ``dummy_batch``, or None before ``set_dummy`` is called.
    """

    def __init__(self, recipe: Recipe, accelerator: Any, encoder: Encoder, collator: Collator) -> None:
        self.recipe, self.accelerator, self.encoder, self.collator = recipe, accelerator, encoder, collator
        self.mixture = Mixture(recipe.data.train, seed=recipe.optim.seed, name="data.train")
        groups = self.mixture.prompt_groups() if recipe.data.group_prompts else None
        self.sampler = StepSampler(
            self.mixture.epoch, batch_size=recipe.optim.batch_size, seed=recipe.optim.seed, groups=groups
        )
        self.eval_mixture = None
        if recipe.data.eval:
            self.eval_mixture = Mixture(recipe.data.eval, seed=recipe.optim.seed, name="data.eval")
        self.total_steps = recipe.optim.epochs * self.sampler.steps_per_epoch
        if recipe.optim.max_steps is not None:
            self.total_steps = min(self.total_steps, recipe.optim.max_steps)
        self.dummy: Sample | None = None

    @property
    def mixtures(self) -> list[Mixture]:
        """The training pairs and, if there are any, the evaluation pairs."""
        return [mixture for mixture in (self.mixture, self.eval_mixture) if mixture is not None]

    def first_pairs(self) -> Iterator[tuple[Pair, str]]:
        """Yields the valid training pairs in the order of the first epoch, each with its file and line number."""
        for index in self.sampler.order(0):
            pair, name = self.mixture.read(int(index))
            if not isinstance(pair, BadLine):
                yield pair, name

    def steps(self) -> StepDataset:
        """Returns the dataset of this rank's training pairs, with one item per step."""
        return self._dataset(self.mixture, self.sampler)

    def load_steps(self, first: int) -> Iterator[StepSlice]:
        """Yields this rank's part of each training step, from step ``first`` (counted from 0) to the last step."""
        return self._load(self.steps(), range(first, self.total_steps))

    def load_evaluation(self) -> Iterator[StepSlice]:
        """Yields this rank's part of the evaluation pairs, step by step. A step has as many pairs as in training."""
        assert self.eval_mixture is not None
        sampler = StepSampler(self.eval_mixture.epoch, batch_size=self.recipe.optim.batch_size)
        return self._load(self._dataset(self.eval_mixture, sampler), range(sampler.steps_per_epoch))

    def load_all_lines(self) -> Iterator[StepSlice]:
        """Yields this rank's part of all training and evaluation lines, step by step. Each line occurs once.

        Bad pairs are skipped, even if ``data.skip_bad`` is False.
        """
        for mixture in self.mixtures:
            epoch = functools.partial(_all_lines, len(mixture))
            sampler = StepSampler(epoch, batch_size=self.recipe.optim.batch_size)
            yield from self._load(self._dataset(mixture, sampler, skip_bad=True), range(sampler.steps_per_epoch))

    def equal_batches(self, step_slice: StepSlice, size: StepSize) -> Iterator[tuple[Batch, BatchCounts | None]]:
        """Yields (micro-batch, sizes) for each micro-batch of ``step_slice``. Then yields (dummy batch, None).

        In total, yields ``size.micro_steps`` tuples. This number is the same on all ranks.
        """
        yield from zip(step_slice.batches, step_slice.counts, strict=True)
        for _ in range(size.micro_steps - len(step_slice.batches)):
            yield self.dummy_batch(), None

    def dummy_batch(self) -> Batch:
        """Returns a dummy batch, whose labels are all -100. A rank runs it if other ranks have more micro-batches."""
        assert self.dummy is not None
        return self.collator([self.dummy])

    def set_dummy(self, sample: Sample) -> None:
        """Sets the sample from which ``dummy_batch`` makes its batch. Only the prompt of the sample is kept."""
        self.dummy = dataclasses.replace(without_responses(sample), name="no pair", digest=NO_PAIR)

    def _dataset(self, mixture: Mixture, sampler: StepSampler, *, skip_bad: bool = False) -> StepDataset:
        return StepDataset(
            mixture,
            sampler,
            self.encoder,
            self.collator,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batch_size=self.recipe.optim.micro_batch_size,
            micro_batch_tokens=self.recipe.optim.micro_batch_tokens,
            group_prompts=self.recipe.data.group_prompts,
            skip_bad=skip_bad or self.recipe.data.skip_bad,
        )

    def _load(self, dataset: StepDataset, steps: range) -> Iterator[StepSlice]:
        workers = min(self.recipe.data.workers, max(len(steps), 1))
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,  # type: ignore[arg-type]
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # forking with tokenizer threads may deadlock
            generator=torch.Generator(),  # the default draws from torch's global generator and so breaks resuming
            worker_init_fn=init_worker,
        )
        with blocked_in_new_workers() if workers else contextlib.nullcontext():
            return iter(loader)


def without_responses(sample: Sample) -> Sample:
    """Returns a copy of the sample with two empty responses."""
    empty = sample.chosen_ids[:0]
    return dataclasses.replace(
        sample, chosen_ids=empty, rejected_ids=empty, chosen_targets=None, rejected_targets=None, rejected_prompt=None
    )


def check_lines(data: RunData, limit: int, say: Callable[[str], None]) -> None:
    """Reads some lines of each data source, prints an overview of the training data, and reports errors.

    An error is a line without a valid pair, or a missing image or video file. All ranks must call this function.

    Args:
        data: Data of the run.
        limit: Maximum number of lines to read per source. The lines are spread evenly over the source.
        say: Function that prints a line.

    Raises:
        LinesError: If a line that was read has an error and ``data.skip_bad`` is False.
    """
    problems: list[str] = []
    if data.accelerator.is_main_process:
        overviews = [mixture.inspect(limit=limit) for mixture in data.mixtures]
        for overview in overviews[0]:
            say(str(overview))
        for overview in itertools.chain.from_iterable(overviews):
            problems += overview.examples
            if overview.missing:
                count = f"{overview.missing:,} of {overview.images:,} images and videos do not exist"
                problems.append(f"{overview.path}: {count}: {root_advice(overview.path, overview.root)}")
                say(problems[-1])
        for line in stored_lines(itertools.chain.from_iterable(overviews)):
            say(line)
    for texts in gather(data.accelerator, problems):
        if texts and not data.recipe.data.skip_bad:
            raise LinesError(
                "the lines must hold pairs with existing images, but:\n  "
                + "\n  ".join(dict.fromkeys(texts))
                + "\ndata.skip_bad=true leaves such lines out"
            )
