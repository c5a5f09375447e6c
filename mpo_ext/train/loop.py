"""The training loop: optimizer steps over preference pairs, on whatever accelerate runs them.

A step's pairs follow from the seed and the step's number (``mixture.StepSampler``), so a checkpoint at the end of a
step, which is where all of them are made, needs no state of the data. Each rank takes a share of the step, splits it
into micro-batches by length, and weighs each so that their sum is the loss of the whole step.
"""

import contextlib
import copy
import dataclasses
import math
import multiprocessing.resource_tracker
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpo_ext.checks import LinesError, check_model_path
from mpo_ext.data.reader import BadLine
from mpo_ext.loss.config import MPOConfig
from mpo_ext.loss.functions import MPOOutput, linear_mpo_loss, mpo_loss
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.loss.reward_shift import RewardShift
from mpo_ext.train import reference_model as references
from mpo_ext.train.batch import Batch, RowLayout, collate
from mpo_ext.train.checkpoint import Checkpoints
from mpo_ext.train.encode import BadPairError, Encoder, MissingImageError, PairCounts, Sample, SkippedPair
from mpo_ext.train.export import check_mergeable, export_model
from mpo_ext.train.forward import forward, forward_logits
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.metrics import Console, Log, Totals, means, peak_memory_mib
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.model import fingerprint, has_vision, load_model, prepare_model, without_adapters
from mpo_ext.train.preference import preference_output
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.sampler import StepSampler, micro_batches
from mpo_ext.train.shared_prefix import check_shared_prefix

INTERRUPTED = 128 + signal.SIGTERM  # what a shell calls the end by SIGTERM
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# What may change between a checkpoint and the run that goes on from it: what is learnt depends on it by rounding only,
# or by how long it is learnt, or (micro-batches) as the user must be free to change when memory ends.
_FREE = (
    "output.", "data.eval", "data.workers", "optim.epochs", "optim.max_steps", "optim.micro_batch_size",
    "loss.memory_budget_mib", "loss.recompute", "loss.shared_prefix", "loss.from_logits", "loss.backend",
    "model.attention", "model.gradient_checkpointing", "reference.file",
)  # fmt: skip
_STATS = ("entropy", "top1")
_CHECKED_SAMPLES = 2
_SEARCHED_PAIRS = 1000
_COUNTED_LINES = 10_000  # of a source, among which pairs with images are counted
_STEP_0_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
_COUNTS = ("pairs", "chosen_tokens", "chosen_responses")


def train(
    recipe: Recipe,
    *,
    model: nn.Module | None = None,
    processor: Any = None,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
) -> int:
    """Trains as the recipe says.

    Args:
        recipe: The run.
        model: Takes the place of ``recipe.model.path``, with its ``processor``; it is changed in place.
        processor: Of ``model``.
        on_step: Called after each step with its number, from 1, and its line of the log; on the main process. Where it
            returns True the run comes to its end with this step, as if it were the last.
            The line of a step whose pairs were all left out has 0 for ``pairs`` and no loss.

    Returns:
        0 where the run came to its end, ``INTERRUPTED`` where SIGTERM or SIGINT ended it after a checkpoint.

    Raises:
        ValueError: If the recipe, the data or a checkpoint do not fit, or every pair was left out.
        OSError: If something cannot be read or written.
        FloatingPointError: If loss or gradient are not finite.
        RuntimeError: If memory ends, or a rank fails.
    """
    return Trainer(recipe, model=model, processor=processor, on_step=on_step).run()


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """A rank's share of a step.

    Attributes:
        step: Number of the step, from 0.
        batches: Its micro-batches.
        counts: For each of them the numbers of ``_COUNTS``.
        results: Pairs that were left out.
        cut: Number of pairs whose responses were cut.
        error: Why the run must end; None where it need not.
    """

    step: int
    batches: tuple[Batch, ...]
    counts: tuple[tuple[int, int, int], ...]
    results: tuple[SkippedPair | BadLine | BadPairError, ...]
    cut: int = 0
    error: str | None = None


class Shares(torch.utils.data.Dataset[Share]):
    """Reads, encodes and batches a rank's share of each step; item k is step k. Works in a DataLoader's worker.

    Args:
        mixture: The pairs.
        sampler: Which of them each step takes.
        encoder: Makes samples of them.
        collate: Makes a batch of samples.
        rank: Of this process.
        world: Number of processes.
        micro_batch_size: Pairs of a micro-batch.
        group_prompts: Keeps the pairs of a prompt together.
        skip_bad: Leaves pairs out that cannot be read.
    """

    def __init__(
        self,
        mixture: Mixture,
        sampler: StepSampler,
        encoder: Encoder,
        collate: Callable[[Sequence[Sample]], Batch],
        *,
        rank: int,
        world: int,
        micro_batch_size: int,
        group_prompts: bool,
        skip_bad: bool,
    ) -> None:
        self.mixture, self.sampler, self.encoder, self.collate = mixture, sampler, encoder, collate
        self.rank, self.world = rank, world
        self.micro_batch_size, self.group_prompts, self.skip_bad = micro_batch_size, group_prompts, skip_bad

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __getitem__(self, step: int) -> Share:
        samples: list[Sample] = []
        results: list[SkippedPair | BadLine | BadPairError] = []
        for index in self.sampler.rank_slice(step, self.rank, self.world):
            result = self.encode(int(index))
            if isinstance(result, Sample):
                samples.append(result)
            elif isinstance(result, SkippedPair) or self.skip_bad:
                results.append(result)
            else:
                return Share(step, (), (), (), error=f"{result} ({self._advice(int(index), result)})")
        lengths = [len(one.prompt_ids) + max(len(one.chosen_ids), len(one.rejected_ids)) for one in samples]
        groups = [one.prompt_key for one in samples] if self.group_prompts else None
        split = micro_batches(lengths, self.micro_batch_size, groups=groups)
        parts = [[samples[position] for position in positions] for positions in split]
        counts = tuple(
            (len(part), sum(len(one.chosen_ids) for one in part), sum(len(one.chosen_ids) > 0 for one in part))
            for part in parts
        )
        cut = sum(one.is_cut for one in samples)
        return Share(step, tuple(map(self.collate, parts)), counts, tuple(results), cut)

    def _advice(self, index: int, result: BadLine | BadPairError) -> str:
        """What to do about a pair that ends the run: mend the path first, leave pairs out last."""
        last = "data.skip_bad=true leaves such pairs out"
        if not isinstance(result, MissingImageError):
            return last
        source = self.mixture.sources[self.mixture.locate(index)[0]]
        if source.path.endswith(".json"):
            return f"root_map moves the folders of a meta file: {{path: {source.path}, root_map: ...}}; {last}"
        return (
            "relative images start at the folder of their file; root names another folder, as in data.train="
            f"{{path: {source.path}, root: .}}; mpo-ext data check finds all that are missing; {last}"
        )

    def encode(self, index: int) -> Sample | SkippedPair | BadLine | BadPairError:
        """Reads a pair of the mixture and encodes it; what is wrong with it is returned."""
        pair, name = self.mixture.read(index)
        if isinstance(pair, BadLine):
            return pair
        try:
            return self.encoder.encode(pair, name)
        except BadPairError as error:
            return error


@dataclasses.dataclass(frozen=True, slots=True)
class _AllLines:
    """All lines of a mixture, each once, as an epoch of a ``StepSampler``."""

    lines: int

    def __call__(self, epoch: int) -> np.ndarray:
        return np.arange(self.lines)


@dataclasses.dataclass(frozen=True, slots=True)
class Collate:
    """``collate`` with all but the samples; can be pickled.

    Attributes:
        layout: Of the batches.
        pad_id: As in ``collate``.
        with_rejected: As in ``collate``.
        positions: As in ``collate``.
        blank: A sample whose images stand in where a batch has none; see ``collate``.
    """

    layout: RowLayout
    pad_id: int
    with_rejected: bool
    positions: Any
    blank: Sample | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Puts samples together."""
        return collate(
            samples, self.layout, pad_id=self.pad_id, with_rejected=self.with_rejected, positions=self.positions,
            blank=self.blank,
        )  # fmt: skip


class _SignalledError(Exception):
    """A signal ends the run before there is anything to save."""


def _leave_signals_to_the_run(worker: int) -> None:
    """In a worker: a signal to all processes at once ends the run, and that its workers. A second SIGTERM works."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class Trainer:
    """One run. ``train`` is the way to call it."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: nn.Module | None = None,
        processor: Any = None,
        on_step: Callable[[int, Mapping[str, float]], object] | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import set_seed

        if (model is None) != (processor is None):
            raise ValueError("model and processor go together, got one of them")
        self.recipe = recipe
        self.on_step = on_step
        self.out = Path(recipe.output.dir)
        # Models with images do not always run all of their parts.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        self.accelerator = Accelerator(
            mixed_precision=_PRECISIONS[recipe.precision],
            kwargs_handlers=handlers,
            log_with=list(recipe.output.trackers) or None,
            project_dir=str(self.out),
        )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        set_seed(recipe.optim.seed)
        if self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.console = Console(0, 0, sys.stderr if self.is_main else None)
        self.log = Log(self.out / "log.jsonl")
        best = recipe.output.best_metric
        self.checkpoints = Checkpoints(
            self.out / "checkpoints",
            keep_last=recipe.output.keep_last,
            keep_best=recipe.output.keep_best,
            higher_is_better=best == "reward_accuracy",
        )
        self.config = recipe.loss.config
        self.reward_shift = RewardShift(**dataclasses.asdict(recipe.reward_shift))
        self.tally, self.eval_tally = PairCounts(), PairCounts()
        self.skipped_steps = 0
        self.step = 0
        self._signal: int | None = None  # that has come to this rank
        self._stop: int | None = None  # that all ranks know of
        self._is_over = False  # as ``on_step`` has said, and then all ranks know
        self._evaluation: dict[str, float] | None = None  # line of the last one
        self._build(model, processor)

    # What is set up.

    def _build(self, model: nn.Module | None, processor: Any) -> None:
        recipe = self.recipe
        if recipe.reference.path is not None:
            check_model_path("reference.path", recipe.reference.path)
        if model is None:
            model, self.processor = load_model(recipe.model)
        else:
            model, self.processor = prepare_model(model, recipe.model), processor
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        inner: Any = unwrap_model(model)
        self.encoder = Encoder(
            self.processor,
            max_length=recipe.data.max_length,
            too_long=recipe.data.too_long,
            chat_template=recipe.model.chat_template,
            image_token_id=getattr(inner.config, "image_token_id", None),
        )
        self.has_vision = has_vision(model)
        self.mixture = Mixture(recipe.data.train, seed=recipe.optim.seed)
        groups = self.mixture.prompt_groups() if recipe.data.group_prompts else None
        self.sampler = StepSampler(
            self.mixture.epoch, batch_size=recipe.optim.batch_size, seed=recipe.optim.seed, groups=groups
        )
        self.eval_mixture = Mixture(recipe.data.eval, seed=recipe.optim.seed) if recipe.data.eval else None
        self.total = recipe.optim.epochs * self.sampler.steps_per_epoch
        if recipe.optim.max_steps is not None:
            self.total = min(self.total, recipe.optim.max_steps)
        self.console.total = self.total

        pad = tokenizer.pad_token_id
        self._collate = Collate(
            "shared",
            pad_id=pad if pad is not None else self.encoder.end_id,
            with_rejected=recipe.loss.has_preference,
            positions=prompt_positions(model),
        )
        # Before anything is wrapped or moved: it is what the reference is.
        self.fingerprint = fingerprint(model) if recipe.reference_kind == "precomputed" else ""
        other = recipe.reference.path
        second: nn.Module | None = None
        if other is not None and recipe.reference_kind in ("copy", "precomputed"):
            second, _ = load_model(without_adapters(dataclasses.replace(recipe.model, path=other, revision=None)))
            self.fingerprint = fingerprint(second)
        elif recipe.reference_kind == "copy":
            second = copy.deepcopy(model)
        if recipe.reference_kind == "precomputed" and self._reference_file().exists():
            second = None
        if recipe.reference.sync_every and second is not None:
            self._check_can_move(model, second)
        self.optimizer: Any = torch.optim.AdamW(
            _decay_groups(model, recipe.optim.weight_decay),
            lr=recipe.optim.learning_rate,
            betas=recipe.optim.betas,
            eps=recipe.optim.eps,
            fused=self.device.type == "cuda" or None,
        )
        self._set_deepspeed_sizes()
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        if recipe.output.save_merged:  # now, and not when all is learnt
            check_mergeable(self.model)
        self._second = None if second is None else self._prepare_second(second)

    def _set_deepspeed_sizes(self) -> None:
        """DeepSpeed wants sizes that it would else take from a data loader; micro-batches are counted here."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.recipe.optim.micro_batch_size
            plugin.deepspeed_config["gradient_accumulation_steps"] = 1
            plugin.deepspeed_config["gradient_clipping"] = self.recipe.optim.max_grad_norm

    def _check_can_move(self, policy: nn.Module, reference: nn.Module) -> None:
        """Raises ``ValueError`` where the reference could not follow the policy, or not be kept in a checkpoint."""
        every = self.recipe.reference.sync_every
        sharding = self.accelerator.distributed_type.value
        if sharding == "FSDP" and not getattr(self.accelerator, "is_fsdp2", False):
            sharding = "FSDP of fsdp_version 1"
        if sharding in ("DEEPSPEED", "MEGATRON_LM", "FSDP of fsdp_version 1"):
            raise ValueError(
                f"reference.sync_every must be 0 under {sharding}, got {every}: "
                "its shards of policy and reference cannot be mixed here, nor kept in a checkpoint; FSDP2 and DDP can"
            )
        references.check_can_follow(reference, policy, every)

    def _prepare_second(self, model: nn.Module) -> nn.Module:
        """The reference where the policy is, and sharded where the policy is."""
        model.eval().requires_grad_(False)
        if getattr(self.accelerator, "is_fsdp2", False):
            from accelerate.utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, model)
        return self.accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)

    def _shares(self, mixture: Mixture, sampler: StepSampler) -> Shares:
        return Shares(
            mixture,
            sampler,
            self.encoder,
            self._collate,
            rank=self.rank,
            world=self.world,
            micro_batch_size=self.recipe.optim.micro_batch_size,
            group_prompts=self.recipe.data.group_prompts,
            skip_bad=self.recipe.data.skip_bad,
        )

    def _loader(self, shares: Shares, steps: range) -> Iterator[Share]:
        workers = min(self.recipe.data.workers, max(len(steps), 1))
        loader = torch.utils.data.DataLoader(
            shares,
            batch_size=None,
            sampler=steps,  # type: ignore[arg-type]
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # forked threads of the tokenizers may lock up
            generator=torch.Generator(),  # else it draws from torch's own, and a run that goes on draws once more
            worker_init_fn=_leave_signals_to_the_run,
        )
        if not workers:
            return iter(loader)
        multiprocessing.resource_tracker.ensure_running()  # unblocks the signals when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # workers begin with what is blocked here
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _choose_layout(self) -> None:
        """Takes the shared prefix where the model allows it and the first pairs show that it works."""
        shares = self._shares(self.mixture, self.sampler)
        samples: list[Sample] = []
        with_images: Sample | None = None
        for index in self.sampler.order(0)[:_SEARCHED_PAIRS]:
            result = shares.encode(int(index))
            if not isinstance(result, Sample):
                continue
            if len(samples) < _CHECKED_SAMPLES:
                samples.append(result)
            if result.image_inputs and with_images is None:
                with_images = result
            if len(samples) == _CHECKED_SAMPLES and (with_images is not None or not self.has_vision):
                break
        if not samples:
            return  # the first step will say why
        if with_images is not None:
            if with_images not in samples:
                samples[-1] = with_images
            if self.world > 1:  # ranks must run the same parts of the model in each forward
                nothing = with_images.chosen_ids[:0]
                blank = dataclasses.replace(with_images, chosen_ids=nothing, rejected_ids=nothing)
                self._collate = dataclasses.replace(self._collate, blank=blank)
        self._dummy = dataclasses.replace(
            samples[0],
            chosen_ids=samples[0].chosen_ids[:0],
            rejected_ids=samples[0].rejected_ids[:0],
            name="no pair",
            digest=references.NO_PAIR,
        )
        reason: str | None = "loss.shared_prefix is false"
        if self.recipe.loss.shared_prefix:
            with self.accelerator.autocast():
                reason = check_shared_prefix(
                    self.model,
                    samples,
                    pad_id=self._collate.pad_id,
                    positions=self._collate.positions,
                    device=self.device,
                )
        reasons = self._gather(reason)
        reason = next((one for one in reasons if one is not None), None)
        if reason is not None:
            self._collate = dataclasses.replace(self._collate, layout="separate")
            self.console.say(f"separate rows for chosen and rejected responses: {reason}")
        else:
            self.console.say("one row for each prompt with its responses (shared prefix), checked on the first pairs")

    # The reference.

    def _reference_file(self) -> Path:
        named = self.recipe.reference.file
        return Path(named) if named is not None else self.out / "reference.jsonl"

    def _make_reference(self) -> references.Reference | None:
        recipe, kind = self.recipe, self.recipe.reference_kind
        if kind is None:
            return None
        if kind == "adapter":
            return references.AdapterReference(recipe.loss, self.accelerator.autocast)
        if kind == "copy":
            assert self._second is not None
            return references.CopyReference(self._second, recipe.loss, self.accelerator.autocast)
        path, settings = self._reference_file(), self._reference_settings()
        if not path.exists():
            self._precompute(path, settings)
        self._second = None
        return references.PrecomputedReference(path, settings)

    def _reference_settings(self) -> dict[str, Any]:
        recipe = self.recipe
        keys = []
        for mixture in filter(None, (self.mixture, self.eval_mixture)):
            for index in range(len(mixture)):
                pair, name = mixture.read(index)
                keys.append(name if isinstance(pair, BadLine) else pair.key())
        return {
            "model": self.fingerprint,
            "dtype": recipe.model.dtype,
            "attention": recipe.model.attention,
            "precision": recipe.precision,
            "pairs": len(keys),
            "data": references.data_fingerprint(keys),
            "max_length": recipe.data.max_length,
            "too_long": recipe.data.too_long,
            **references.loss_settings(recipe.loss),
        }

    def _precompute(self, path: Path, settings: dict[str, Any]) -> None:
        """Computes the log-probs of all pairs under the reference, each rank its share."""
        known = references.known_digests(path, settings)
        model = self._second if self._second is not None else self.model
        was_training = self.model.training
        self.model.eval()
        total = sum(len(mixture) for mixture in (self.mixture, self.eval_mixture) if mixture is not None)
        self.console.say(f"reference: log-probs of {total:,} pairs, computed once into {path}")

        def logp(batch: Batch) -> Tensor:
            with torch.no_grad(), self.accelerator.autocast():
                return references.sequence_logp(model, batch.to(self.device), self.recipe.loss)

        done = 0
        for share in self._equal_shares(known):
            for count in references.precompute(path, settings, share, logp, rank=self.rank):
                done += count
            if self._must_end():
                raise _SignalledError
        self.accelerator.wait_for_everyone()
        if self.is_main:
            count = references.merge(path, settings)
            self.console.say(f"reference: {count:,} pairs")
        self.accelerator.wait_for_everyone()
        self.model.train(was_training)

    def _equal_shares(self, known: set[str]) -> Iterator[list[Batch]]:
        """A rank's batches of all lines, in steps of which each rank has equally many batches."""
        for mixture in filter(None, (self.mixture, self.eval_mixture)):
            sampler = StepSampler(_AllLines(len(mixture)), batch_size=self.recipe.optim.batch_size)
            shares = self._shares(mixture, sampler)
            shares.skip_bad = True  # those that must not be skipped end the run where they are trained on
            for share in self._loader(shares, range(sampler.steps_per_epoch)):
                batches = [batch for batch in share.batches if not all(digest in known for digest in batch.digests)]
                most = max(self._gather(len(batches)))
                yield batches + [self._dummy_batch()] * (most - len(batches))

    # The run.

    def run(self) -> int:
        """Runs to the end, or to a signal."""
        recipe = self.recipe
        path = self.checkpoints.resolve(recipe.output.resume)
        with self.console, self._signals():
            self._trackers()
            for line in self.mixture.lines():
                self.console.say(line)
            for look in self.mixture.inspect(files=False, limit=_COUNTED_LINES) if self.is_main else ():
                self.console.say(str(look))
            self._choose_layout()
            try:
                self.reference = self._make_reference()
            except _SignalledError:
                return self._interrupted("while the log-probs of the reference were computed")
            if path is not None:
                changes = self._resume(path)
                if self.step >= self.total and not changes and self._is_exported(path):
                    has_card = self._gather((self.out / "final" / "README.md").exists())
                    if not all(has_card):  # it was killed between model and card
                        self._write_card(self._evaluated())
                    self.console.say(
                        f"already finished (step {self.step} of {self.total}): the model is in {self.out / 'final'}"
                    )
                    self._close()
                    return 0
                self.console.say(f"goes on from {path} after step {self.step}")
            elif self.is_main:
                if self.log.position():
                    self.console.say(f"no checkpoint in {self.checkpoints.folder} yet: starts anew, and the log too")
                self.log.rewind(0)
            self.console.done = self.step
            self.model.train()
            # A signal ends a run before the evaluation that is due.
            is_due = path is not None and self.step < self.total and self._evaluated() is None
            if is_due and self._evaluate_if_due() is not None:
                self._save()
            loader = self._loader(self._shares(self.mixture, self.sampler), range(self.step, self.total))
            for share in loader:
                if self._step(share):
                    return self._end_early()
                if self._is_over:
                    break
            self._check_something_learnt()
            last = self._evaluate_if_due(is_end=True)
            self._save(is_end=True)
            self._finish(last)
        return 0

    def _step(self, share: Share) -> bool:
        """One optimizer step. Returns whether a signal asks to end."""
        began_s = time.perf_counter()
        recipe = self.recipe
        for result in share.results:
            self.tally.add(result)
        self.tally.kept += sum(counts[0] for counts in share.counts)
        self.tally.cut += share.cut
        states = self._gather((share.error, *_summed(share.counts), len(share.batches)))
        errors = [state[0] for state in states if state[0] is not None]
        if errors:
            raise ValueError("; ".join(errors))
        totals = dict(zip(_COUNTS, (sum(state[1 + place] for state in states) for place in range(3)), strict=True))
        micro_steps = max(state[4] for state in states)
        averages = sum(state[4] for state in states)
        if micro_steps == 0:
            return self._step_of_nothing()
        before = copy.deepcopy(self.reward_shift)
        sums = Totals(self.device)
        losses: list[tuple[tuple[str, ...], Tensor]] = []
        for number in range(micro_steps):
            is_last = number == micro_steps - 1
            is_real = number < len(share.batches)
            batch = share.batches[number] if is_real else self._dummy_batch()
            config = self._weighted(share.counts[number] if is_real else (0, 0, 0), totals, averages)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model), self._sizes(batch):
                out = self._loss(batch, config or self.config)
                self.accelerator.backward(out.loss if config is not None else out.loss * 0)
            if is_real:
                parts = share.counts[number][1 if recipe.loss.ntp_average == "token" else 2]
                sums.add(out, ntp_parts=parts, tokens=batch.tokens)
                losses.append((batch.names, out.loss.detach()))
        norm = self._clip()
        rate = self._rate(self.step)
        reduced = sums.reduce(self.accelerator)
        line = self._line(reduced)
        if recipe.loss.average_over == "micro_batch":
            line["loss"] = reduced["loss"] / self.world
        # With float16 a gradient that overflows is the gradient scaler's business.
        is_finite = math.isfinite(reduced["loss"]) and (recipe.precision == "fp16" or math.isfinite(norm))
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.reward_shift.step()
        else:
            self._nonfinite(losses, norm, before)
        if "reward_shift" in line:  # as it is after the step, whatever moves it
            line["reward_shift"] = self.reward_shift.value
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:
            self.skipped_steps += 1
        if self.step == 0 and is_finite:
            self._check_step_0(line)
        self._count_step()
        seconds = time.perf_counter() - began_s
        line |= {
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_s": reduced["tokens"] / seconds,
            "memory_mib": peak_memory_mib(self.device),
            "skipped_steps": self.skipped_steps,
        }
        line = {"step": self.step, "epoch": self.step / self.sampler.steps_per_epoch, **line}
        self._report(line)
        return self._end_step()

    def _step_of_nothing(self) -> bool:
        """A step whose pairs were all left out. What it learns is nothing, but it is one: its line has no loss."""
        rate = self._rate(self.step)
        self._count_step()
        self.console.say(f"step {self.step}: all of its pairs were left out, so nothing is learnt from it")
        epoch = self.step / self.sampler.steps_per_epoch
        line = {"step": self.step, "epoch": epoch, "pairs": 0.0, "learning_rate": rate}
        self._report({**line, "skipped_steps": self.skipped_steps})
        return self._end_step()

    def _count_step(self) -> None:
        """Numbers the step, and moves the reference where it is time to."""
        self.step += 1
        every = self.recipe.reference.sync_every
        if every and self.reference is not None and self.step % every == 0:
            self.reference.sync(self.model, self.recipe.reference.sync_mix)

    def _end_step(self) -> bool:
        """Evaluates and saves where it is time to. Returns whether a signal asks to end."""
        if self._must_end():
            return True
        if self._is_over or self.step == self.total:
            return False
        if self.step == self.sampler.steps_per_epoch:  # the next epochs would be like the first
            self._check_something_learnt()
        evaluation = self._evaluate_if_due()
        self._save()
        return evaluation is not None and self._must_end()  # it may have taken long

    def _must_end(self) -> bool:
        """Whether a signal has come to any rank. All of them ask together, so that they end together."""
        states = self._gather((self._signal, self._is_over))
        self._stop = next((signal for signal, _ in states if signal is not None), None)
        self._is_over = any(is_over for _, is_over in states)
        return self._stop is not None

    def _loss(self, batch: Batch, config: MPOConfig) -> MPOOutput:
        """The loss of a micro-batch, by the reference and the layout of the run."""
        recipe = self.recipe.loss
        batch = batch.to(self.device)
        if self.reference is not None:
            ref_logp = self.reference.logp(self.model, batch)
        else:
            ref_logp = torch.zeros(2 * batch.pairs, dtype=torch.float64, device=self.device)
        shift = self.reward_shift if self.reference is not None else None
        with self.accelerator.autocast():
            if recipe.preference is not None:
                logp = references.label_logp(self.model, batch, recipe)
                return preference_output(recipe.preference, logp, batch, ref_logp, config)
            if recipe.from_logits:
                logits = forward_logits(self.model, batch)
                return mpo_loss(
                    logits, batch.labels.to(logits.device), ref_logp, config=config, reward_shift=shift,
                    cu_seqlens=batch.cu_seqlens, shift=False, stats=_STATS, backend=recipe.backend,
                )  # fmt: skip
            out = forward(self.model, batch)
            return linear_mpo_loss(
                out.hidden, out.weight, batch.labels, ref_logp, config=config, reward_shift=shift,
                cu_seqlens=batch.cu_seqlens, shift=False, stats=_STATS, backend=recipe.backend,
                memory_budget=references.budget(recipe), recompute=recipe.recompute, **out.options,
            )  # fmt: skip

    def _weighted(self, counts: Sequence[int], totals: Mapping[str, int], averages: int) -> MPOConfig | None:
        """The weights with which a micro-batch adds up to the loss of the step; None where it adds nothing.

        Gradients of ranks are averaged, hence the number of ranks as a factor.
        """
        pairs, tokens, responses = counts
        if pairs == 0:
            return None
        config = self.config
        if self.recipe.loss.average_over == "micro_batch":
            share = ntp_share = self.world / averages
        else:
            share = self.world * pairs / totals["pairs"]
            by_token = config.ntp_average == "token"
            part, whole = (tokens, totals["chosen_tokens"]) if by_token else (responses, totals["chosen_responses"])
            ntp_share = self.world * part / max(whole, 1)
        weights = {
            "dpo_weight": config.dpo_weight * share,
            "bco_weight": config.bco_weight * share,
            "ntp_weight": config.ntp_weight * ntp_share,
        }
        return dataclasses.replace(config, **weights) if any(weights.values()) else None

    def _dummy_batch(self) -> Batch:
        """A batch without a label, for a rank that has no more pairs while others have."""
        return self._collate([self._dummy])

    def _clip(self) -> float:
        most = self.recipe.optim.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), most if most > 0 else math.inf)
        if norm is None:  # DeepSpeed clips by itself
            return math.nan if not hasattr(self.model, "get_global_grad_norm") else self.model.get_global_grad_norm()
        return float(norm)

    def _rate(self, step: int) -> float:
        """The learning rate of a step, from 0: that of the schedules of transformers, which begin with 0."""
        optim = self.recipe.optim
        warmup = math.ceil(self.total * optim.warmup_ratio)
        if step < warmup:
            return optim.learning_rate * step / warmup
        done = (step - warmup) / max(1, self.total - warmup)
        if optim.schedule == "cosine":
            return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return optim.learning_rate * (1 - done if optim.schedule == "linear" else 1)

    def _line(self, sums: Mapping[str, float]) -> dict[str, float]:
        config = self.config
        weights = (config.dpo_weight, config.bco_weight, config.ntp_weight)
        line = means(sums, weights)
        if not self.recipe.loss.has_preference:
            kept = ("loss", "ntp_loss", "chosen_logp", "entropy", "top1", "pairs", "chosen_tokens")
            return {name: line[name] for name in kept}
        if self.recipe.loss.preference is not None:
            return {name: value for name, value in line.items() if name not in _STATS}
        return {**line, "reward_shift": self.reward_shift.value}

    def _report(self, line: Mapping[str, float]) -> None:
        step = int(line["step"])
        if self.is_main:
            self.console.step(step, line)
            if self.on_step is not None:
                self._is_over = self.on_step(step, line) is True
        if step % self.recipe.output.log_every == 0 or step == self.total or self._is_over:
            if self.is_main:
                self.log.append(line)
            if self.recipe.output.trackers:
                self.accelerator.log({f"train/{name}": value for name, value in line.items()}, step=step)

    def _check_step_0(self, line: Mapping[str, float]) -> None:
        """Says what the first loss should be: with policy and reference equal, all rewards are 0."""
        recipe = self.recipe
        if self.reference is None or recipe.reference.path is not None or recipe.loss.preference is not None:
            return
        config, shift = self.config, self.recipe.reward_shift
        delta = shift.value if shift.mode != "cumulative" or shift.update == "after" else 0.0
        preference = config.dpo_weight * math.log(2)
        preference += config.bco_weight * (math.log1p(math.exp(delta)) + math.log1p(math.exp(-delta)))
        measured = config.dpo_weight * line["dpo_loss"] + config.bco_weight * line["bco_loss"]
        ntp = line["loss"] - measured
        text = f"step 1: loss {line['loss']:.4f}, expected {preference:.4f} + {ntp:.4f} (next token)"
        if abs(measured - preference) <= _STEP_0_TOLERANCE[self.recipe.precision]:
            self.console.say(f"{text}: policy and reference agree")
            return
        causes = "the reference is not the model that is trained"
        if self.recipe.model.lora is not None and self.recipe.model.lora.dropout > 0:
            causes = "the adapters' dropout (model.lora.dropout) is on"
        self.console.say(
            f"{text}: policy and reference DIFFER. Mean rewards are {line['chosen_reward']:.4f} (chosen) and "
            f"{line['rejected_reward']:.4f} (rejected) where 0 was expected: {causes}"
        )

    def _nonfinite(self, losses: Sequence[tuple[tuple[str, ...], Tensor]], norm: float, before: RewardShift) -> None:
        """Ends the run, or leaves the step out."""
        self.reward_shift = before
        bad = [name for names, loss in losses if not math.isfinite(loss.item()) for name in names]
        names = [name for rank in self._gather(bad or []) for name in rank]
        what = f"loss of {', '.join(names)}" if names else f"gradient (norm {norm}) of all its pairs"
        text = f"step {self.step + 1}: not finite: the {what}"
        if self.recipe.output.on_nonfinite == "skip":
            self.skipped_steps += 1
            self.console.say(f"{text}; the step is skipped, {self.skipped_steps} so far")
            return
        last = self.checkpoints.latest()
        raise FloatingPointError(
            f"{text}. The last good checkpoint is {last or 'none'}; output.on_nonfinite=skip leaves such steps out"
        )

    # Evaluation.

    def _evaluate_if_due(self, *, is_end: bool = False) -> dict[str, float] | None:
        every = self.recipe.output.eval_every
        if self.eval_mixture is None or not (is_end or (every and self.step % every == 0)):
            return None
        if (known := self._evaluated()) is not None:
            return known
        line = {"step": self.step, **{f"eval_{name}": value for name, value in self.evaluate().items()}}
        self._evaluation = line
        if self.is_main:
            self.log.append(line)
            self.console.say(
                f"evaluation after step {self.step}: "
                + ", ".join(f"{name[5:]} {line[name]:.4f}" for name in line if name.endswith(("loss", "accuracy")))
            )
        if self.recipe.output.trackers:
            values = {f"eval/{name.removeprefix('eval_')}": value for name, value in line.items()}
            self.accelerator.log(values, step=self.step)
        return line

    def _evaluated(self) -> dict[str, float] | None:
        """The line of an evaluation after this very step, if there was one, perhaps before a checkpoint."""
        line = self._evaluation
        return line if line is not None and line["step"] == self.step else None

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The terms of the loss, rewards and the rest over all pairs of ``data.eval``."""
        assert self.eval_mixture is not None
        sampler = StepSampler(self.eval_mixture.epoch, batch_size=self.recipe.optim.batch_size)
        sums = Totals(self.device)
        self.eval_tally = PairCounts()
        self.model.eval()
        self.reward_shift.eval()
        shares = self._shares(self.eval_mixture, sampler)
        for share in self._loader(shares, range(sampler.steps_per_epoch)):
            states = self._gather((share.error, len(share.batches)))
            if errors := [state[0] for state in states if state[0] is not None]:
                raise ValueError("; ".join(errors))
            for result in share.results:
                self.eval_tally.add(result)
            for number in range(max(state[1] for state in states)):
                is_real = number < len(share.batches)
                batch = share.batches[number] if is_real else self._dummy_batch()
                out = self._loss(batch, self.config)
                if is_real:
                    parts = share.counts[number][1 if self.recipe.loss.ntp_average == "token" else 2]
                    sums.add(out, ntp_parts=parts, tokens=batch.tokens)
        self.model.train()
        self.reward_shift.train()
        return self._line(sums.reduce(self.accelerator))

    # Checkpoints and the end.

    def _save(self, *, is_end: bool = False) -> None:
        every = self.recipe.output.save_every
        if not is_end and not (every and self.step % every == 0):
            return
        evaluation = self._evaluated()
        score = None if evaluation is None else evaluation[f"eval_{self.recipe.output.best_metric}"]
        tally = self._whole_tally()
        state = {
            "step": self.step,
            "reward_shift": self.reward_shift.state_dict(),
            "recipe": _plain(self.recipe.to_dict()),
            "log_position": self.log.position() if self.is_main else 0,
            "skipped_steps": self.skipped_steps,
            "evaluation": evaluation,
            "tally": tally.state_dict(),
        }
        self.checkpoints.save(
            self.accelerator, self.step, self.model, self.optimizer, state, score=score, **self._extra()
        )

    def _whole_tally(self) -> PairCounts:
        """Of all ranks."""
        whole = PairCounts()
        for one in self._gather(self.tally):
            whole.merge(one)
        return whole

    def _check_something_learnt(self) -> None:
        """Raises where every pair was left out: what would be saved is the model as it came."""
        tally = self._whole_tally()
        if tally.kept == 0 and self.step > 0:
            raise LinesError(
                "every pair was skipped, so nothing was learnt and no model is saved:\n  "
                + "\n  ".join(tally.lines())
            )

    def _is_exported(self, checkpoint: Path) -> bool:
        """Whether ``final``, which is written whole or not at all, is from after a checkpoint."""
        final = self.out / "final"
        configs = [final / name for name in ("config.json", "adapter_config.json") if (final / name).exists()]
        return all(self._gather(any(one.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns for one in configs)))

    def _extra(self) -> dict[str, Any]:
        """A reference that has moved must be kept, too."""
        if self.recipe.reference.sync_every and isinstance(self.reference, references.CopyReference):
            return {"reference": self.reference.model}
        return {}

    def _resume(self, path: Path) -> list[tuple[str, str]]:
        """Takes up a checkpoint. Returns the settings that have changed since, each with a text that shows how."""
        state = self.checkpoints.state(self.accelerator, path)
        changed = _changes(state["recipe"], _plain(self.recipe.to_dict()))
        refused = [text for name, text in changed if not name.startswith(_FREE)]
        if refused:
            raise LinesError(
                f"the recipe must be the one that {path} was made with, but:\n  " + "\n  ".join(refused) + "\n"
                "take another output.dir to begin anew"
            )
        self.checkpoints.load(self.accelerator, path, self.model, self.optimizer, **self._extra())
        for _, text in changed:
            self.console.say(f"since the checkpoint: {text}")
        self.step = state["step"]
        if not any(name.startswith("data.eval") for name, _ in changed):
            self._evaluation = state["evaluation"]
        if self.is_main:
            self.tally.load_state_dict(state["tally"])
        self.skipped_steps = state["skipped_steps"]
        self.reward_shift.load_state_dict(state["reward_shift"])
        if self.is_main:
            self.log.rewind(state["log_position"])
        self.accelerator.wait_for_everyone()
        return changed

    def _end_early(self) -> int:
        self._save(is_end=True)
        return self._interrupted(f"after step {self.step} of {self.total}")

    def _interrupted(self, when: str) -> int:
        name = signal.Signals(self._stop or signal.SIGTERM).name
        goes_on = "" if self.recipe.output.resume == "never" else "; the same command goes on from here"
        self.console.say(f"{name}: ended {when}{goes_on}")
        self._close()
        return INTERRUPTED

    def _finish(self, evaluation: Mapping[str, float] | None) -> None:
        folder = self.out / "final"
        export_model(self.accelerator, self.model, self.processor, folder, merged=self.recipe.output.save_merged)
        tally = self._whole_tally()
        if self.is_main:
            for text in tally.lines():
                self.console.say(text)
            if tally.n_skipped > tally.kept:
                self.console.say(
                    f"WARNING: MOST PAIRS WERE SKIPPED, {tally.n_skipped:,} of {tally.n_skipped + tally.kept:,}: "
                    "the model has learnt from the few others"
                )
        self._write_card(evaluation)
        self.console.say(f"the model is in {folder}, the log in {self.log.path}")
        self._close()

    def _write_card(self, evaluation: Mapping[str, float] | None) -> None:
        from mpo_ext.train.model_card import write_card

        tally = self._whole_tally()
        if not self.is_main:
            return
        lines = self.log.read()
        last: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
        summary = {**last, **(evaluation or {}), "dropped": dict(tally.skipped)}
        write_card(self.out / "final", recipe=self.recipe, curves=lines, summary=summary)

    def _close(self) -> None:
        """Ends the trackers and the process group.

        DDP goes before its group: as the last to hold it, it would wait for gloo's threads, and these for the
        interpreter, to let go of the last tensors that were gathered.
        """
        self.model = self.accelerator.unwrap_model(self.model)
        self.accelerator.end_training()

    def _trackers(self) -> None:
        if not self.recipe.output.trackers:
            return
        settings = {}
        for name, value in _flat(_plain(self.recipe.to_dict())):
            settings[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
        self.accelerator.init_trackers("mpo_ext", config=settings)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A first SIGTERM or SIGINT ends the run after the step at work; a second SIGINT at once."""

        def note(number: int, frame: object) -> None:
            self._signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            before = {number: signal.signal(number, note) for number in _SIGNALS}
        except ValueError:  # not the main thread: signals are somebody else's there
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _sizes(self, batch: Batch) -> Iterator[None]:
        """Adds sizes and advice to the error of a device or machine that is out of memory."""
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            pixels = batch.inputs.get("pixel_values")
            images = "none" if pixels is None else " x ".join(map(str, pixels.shape))
            raise RuntimeError(
                f"out of memory in step {self.step + 1} with {batch.pairs} pairs in {batch.rows} rows of "
                f"{batch.segments.shape[1]} positions ({batch.projected_rows} labelled), images {images}: "
                f"{', '.join(batch.names[:4])}. What lowers it: optim.micro_batch_size (now "
                f"{self.recipe.optim.micro_batch_size}), model.gradient_checkpointing=true, data.max_length (now "
                f"{self.recipe.data.max_length}), reference.kind=precomputed, model.lora, "
                f"loss.memory_budget_mib, sharding through accelerate. {error}"
            ) from error

    def _gather(self, value: Any) -> list[Any]:
        """A value of each rank, in their order."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def _summed(counts: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    return tuple(sum(one[place] for one in counts) for place in range(3))


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that learn: matrices with decay, biases and norms without."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in learning if one.ndim >= 2], "weight_decay": weight_decay},
        {"params": [one for one in learning if one.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _plain(values: Any) -> Any:
    """Values as JSON gives them back."""
    if isinstance(values, Mapping):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return os.fspath(values) if isinstance(values, os.PathLike) else values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of the settings that differ, each with a text that shows how."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = dict.fromkeys([*before, *after])
    return [
        (name, f"{name} was {before.get(name)!r}, is {after.get(name)!r}")
        for name in names
        if before.get(name) != after.get(name)
    ]
