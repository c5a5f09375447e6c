"""The training loop: runs optimizer steps over preference pairs with accelerate (one process, DDP, FSDP2, DeepSpeed).

The micro-batch losses of all ranks are weighted such that they add up to the loss of the step. Checkpoints are written
between steps.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mpo_ext.media_limits import restored_limits
from mpo_ext.ops.memory import empty_cache
from mpo_ext.train.batch_loss import (
    BatchLoss,
    explain_out_of_memory,
    router_weight,
    weighted_config,
    with_logged_average,
)
from mpo_ext.train.dataset import StepSize, StepSlice, check_lines, size_over_ranks
from mpo_ext.train.evaluation import evaluate, evaluate_if_due, fails_on_all_ranks, open_answers
from mpo_ext.train.first_batch import FirstBatchCheck
from mpo_ext.train.metrics import Totals, log_line, nonfinite_cause, peak_memory_mib, speed
from mpo_ext.train.optimizer import clip_gradients, set_learning_rates
from mpo_ext.train.output import RunOutput
from mpo_ext.train.pair_counts import PairCounts
from mpo_ext.train.progress import busy_cpu_line, first_step_lines, resume_advice
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.reference_file import (
    PrecomputedReference,
    compute_reference_file,
    reference_path,
    reference_settings,
)
from mpo_ext.train.reference_model import AdapterReference, CopyReference, Reference
from mpo_ext.train.resume import RunState
from mpo_ext.train.router_loss import make_router_loss
from mpo_ext.train.setup import choose_layout, make_accelerator, set_up
from mpo_ext.train.signals import InterruptedRunError, StopRequests
from mpo_ext.train.trackers import start_trackers
from mpo_ext.train.zero import is_deepspeed

_COUNTED_LINES = 10_000  # number of lines per source in which pairs with images are counted

OnStep = Callable[[int, Mapping[str, float]], object]


def train(
    recipe: Recipe, *, model: nn.Module | None = None, processor: Any = None, on_step: OnStep | None = None
) -> int:
    """Trains a model on preference pairs as the recipe specifies.

    Args:
        recipe: Recipe of the run.
        model: Model to train in place; None: load ``recipe.model.path``.
        processor: Processor or tokenizer of ``model``; None if ``model`` is None.
        on_step: Function that the main process calls after each step as ``on_step(step, line)``. ``step`` is counted
            from 1, and ``line`` is the log line of the step. If all pairs of the step were skipped, ``line["pairs"]``
            is 0 and the loss is missing. If the function returns True, the run ends as if this step were the last.
            None: no call.

    Returns:
        The exit status: 0 if the run finished; 143 if SIGTERM ended the run, and 130 if SIGINT did. The progress of an
        interrupted run is saved.

    Raises:
        ValueError: If recipe, data and checkpoint do not match, or every pair was skipped.
        OSError: If a file cannot be read or written.
        FloatingPointError: If a loss or gradient is not finite and ``output.on_nonfinite`` is "stop".
        RuntimeError: If memory runs out, a checkpoint cannot be written or restored, or another rank fails.
    """
    try:
        with restored_limits():
            return Trainer(recipe, model=model, processor=processor, on_step=on_step).run()
    finally:
        empty_cache()


class Trainer:
    """A training run. The function ``train`` is the usual entry point.

    If ``save`` is False, no checkpoint, final model or model card is written. For the other arguments, see ``train``.

    Attributes:
        model: Policy, as ``accelerator.prepare`` returned it.
        data: Training and evaluation pairs; ``data.encoder`` may be replaced before ``run``.
        checkpoint: Checkpoint from which ``run`` resumes, or None.
        state: Step number, pair counts and reward shift of the BCO term.
        output: Console, log, checkpoints and exported model.
        reference_model: The separate reference model while the run needs it in memory, otherwise None.
        reference: Source of the reference log-probs; None before ``run`` and for a loss without reference.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: nn.Module | None = None,
        processor: Any = None,
        on_step: OnStep | None = None,
        save: bool = True,
    ) -> None:
        if (model is None) != (processor is None):
            raise ValueError("model and processor go together, got one of them")
        self.recipe, self.on_step = recipe, on_step
        self.accelerator = make_accelerator(recipe)
        self.state = RunState(recipe, self.accelerator)
        self.output = RunOutput(recipe, self.accelerator, self.state, save=save)
        self.stop = StopRequests(self.accelerator)
        self.eval_pair_counts = PairCounts()
        self.checkpoint = self.output.checkpoints.resolve(self.accelerator, recipe.output.resume)
        date = self.output.template_date(self.checkpoint)
        setup = set_up(recipe, self.accelerator, model, processor, date=date)
        self.model, self.processor, self.optimizer = setup.model, setup.processor, setup.optimizer
        self.groups = setup.groups
        self.data, self.reference_model = setup.data, setup.reference_model
        self.reference_fingerprint, self.fixed_weights = setup.reference_fingerprint, setup.fixed_weights
        self.reference: Reference | None = None
        self.answers = open_answers(recipe, self.accelerator, self.model, self.processor, date=date)
        self.state.questions = None if self.answers is None else self.answers.questions.source.digest
        self.output.console.total = self.data.total_steps

    def run(self) -> int:
        """Trains the model and returns the exit status; see ``train``."""
        state, say = self.state, self.output.console.say
        checkpoint = self.checkpoint
        with self.output.locked(), self.output.console, self.stop.caught():
            self.output.check_inputs(self.data, checkpoint, self.fixed_weights)
            self._prepare()
            routers = make_router_loss(self.model, self.recipe.loss.router_aux_loss_coef, say)
            try:
                self.reference = self.make_reference()
            except InterruptedRunError:
                advice = resume_advice("auto")  # there is no checkpoint of this process yet
                return self._interrupted(f"while the log-probs of the reference were computed{advice}")
            self.batch_loss = BatchLoss(self.recipe.loss, self.accelerator, self.reference, routers)
            if checkpoint is None:
                self.output.start_log()
            else:
                has_changed = self.output.resume(checkpoint, self.model, self.optimizer, self._moving_reference())
                position = f"step {state.step} of {self.data.total_steps}"
                if state.step > self.data.total_steps:
                    say(f"the recipe asks for {self.data.total_steps} steps, but the model has {state.step}")
                # A recipe with fewer steps does not describe the exported model, which therefore stays as it is.
                is_same = not has_changed or state.step > self.data.total_steps
                is_done = state.step >= self.data.total_steps or state.has_stalled()
                if is_done and is_same and self.output.is_finished(checkpoint):
                    say(f"already finished ({position}): the model is in {self.output.final}")
                    self.output.push()
                    return self._close()
                say(f"resumes from {checkpoint} after step {state.step}")
            self.output.console.done = state.step
            self.model.train()
            # The interrupted run may have ended before an evaluation that was due after its last step.
            is_due = checkpoint is not None and state.step < self.data.total_steps
            if is_due and state.current_evaluation() is None and self._evaluate_if_due() is not None:
                self._save_if_due(is_end=state.is_best())
            for step_slice in () if state.has_stalled() else self.data.load_steps(state.step):
                if self._run_step(step_slice):
                    self._save_if_due(is_end=True)
                    advice = resume_advice(self.recipe.output.resume) if self.output.save else ""
                    return self._interrupted(f"after step {state.step} of {self.data.total_steps}{advice}")
                if self.stop.is_over:
                    break
            state.check_trained_on_pairs()
            self._evaluate_if_due(is_end=True)
            self._save_if_due(is_end=True)
            self.output.finish(self.model, self.processor)
            return self._close()

    def _prepare(self) -> None:
        """Starts the trackers, prints the data sources, checks the first pairs and chooses the layout of batches."""
        say = self.output.console.say
        start_trackers(self.recipe, self.accelerator)
        for line in self.data.mixture.lines():
            say(line)
        check_lines(self.data, _COUNTED_LINES, say)
        self.output.check_first_pairs(self.data)
        if layout := choose_layout(self.model, self.data, self.reference_model):
            say(layout)
        if advice := busy_cpu_line(self.accelerator.device):
            say(advice)

    def make_reference(self) -> Reference | None:
        """Returns the source of the reference log-probs, or None if the loss needs no reference.

        For ``reference.kind`` "precomputed", this method also computes the log-probs if their file does not exist.
        Raises ``InterruptedRunError`` if a signal arrives meanwhile.
        """
        kind, loss = self.recipe.reference_kind, self.recipe.loss
        if kind is None:
            return None
        if kind == "adapter":
            return AdapterReference(loss, self.accelerator.autocast)
        if kind == "copy":
            assert self.reference_model is not None
            return CopyReference(self.reference_model, loss, self.accelerator.autocast)
        path = reference_path(self.recipe)
        settings = reference_settings(self.recipe, self.data, self.reference_fingerprint)
        if not path.exists():
            model = self.model if self.reference_model is None else self.reference_model
            compute_reference_file(path, settings, model, self.data, stop=self.stop, say=self.output.console.say)
        self.reference_model = None
        return PrecomputedReference(path, settings)

    def _moving_reference(self) -> nn.Module | None:
        """Returns the reference model if ``reference.sync_every`` updates it during training, otherwise None."""
        moves = self.recipe.reference.sync_every and isinstance(self.reference, CopyReference)
        return self.reference.model if moves else None  # type: ignore[union-attr]

    def _run_step(self, step_slice: StepSlice) -> bool:
        """Runs an optimizer step on this rank's part of the pairs. Returns whether a signal ends the run."""
        began_s = time.perf_counter()
        recipe, state = self.recipe, self.state
        try:
            size = size_over_ranks(self.accelerator, step_slice)
        except ValueError:  # a bad pair, which ends the run on all ranks
            self._save_if_due(is_end=True)
            raise
        state.count_pairs(step_slice)
        rates = set_learning_rates(self.optimizer, self.groups, recipe.optim, state.step, self.data.total_steps)
        if size.micro_steps == 0:
            return self._skip_empty_step(rates)
        shift_before = copy.deepcopy(state.reward_shift)
        check = FirstBatchCheck(recipe, self.processor) if state.is_first_step() else None
        self.batch_loss.first_batch = check
        totals, losses = self._accumulate_gradients(step_slice, size)
        if check is not None:
            check.report(self.accelerator, self.output.console.say)
        grad_norm = clip_gradients(self.accelerator, self.model, recipe.optim.max_grad_norm)
        sums = totals.reduce(self.accelerator)
        line = log_line(sums, recipe.loss, state.reward_shift, self.batch_loss.router_coef)
        if recipe.loss.average_over == "micro_batch":
            line["loss"] = sums["loss"] / self.accelerator.num_processes
        # With float16 the loss scaler handles gradients that overflow.
        is_finite = math.isfinite(sums["loss"]) and (recipe.precision == "fp16" or math.isfinite(grad_norm))
        if is_finite:
            self.optimizer.step()
            state.reward_shift.step()
            state.n_skipped_steps += self.accelerator.optimizer_step_was_skipped  # by the loss scaler or by DeepSpeed
        else:
            state.reward_shift = shift_before
            _handle_nonfinite(self.accelerator, state, self.output, losses, grad_norm)
            state.n_idle_steps += check is not None  # the next step is checked instead
        if "reward_shift" in line:
            line["reward_shift"] = state.reward_shift.value  # the value after the update
        self.optimizer.zero_grad()
        if check is not None and is_finite:
            for text in first_step_lines(self.accelerator, recipe, state.step + 1, line, step_slice.batches):
                self.output.console.say(text)
        self._count_step()
        line |= {
            **rates,
            "grad_norm": grad_norm,
            "micro_batches": size.micro_batches,
            **speed(sums, time.perf_counter() - began_s),
            "memory_mib": peak_memory_mib(self.accelerator.device),
        }
        self._report(line)
        return self._end_step()

    def _accumulate_gradients(
        self, step_slice: StepSlice, size: StepSize
    ) -> tuple[Totals, list[tuple[tuple[str, ...], Tensor]]]:
        """Runs forward and backward of each micro-batch. Returns (sums of the metrics, losses).

        ``losses`` is a list of ``(pair names, loss)``, one for each micro-batch that has pairs.
        """
        recipe, accelerator = self.recipe, self.accelerator
        totals = Totals(accelerator.device)
        losses: list[tuple[tuple[str, ...], Tensor]] = []
        for number, (batch, counts) in enumerate(self.data.equal_batches(step_slice, size), 1):
            config = weighted_config(recipe, counts, size, accelerator.num_processes)
            is_last = number == size.micro_steps
            accelerator.sync_gradients = is_last
            with (
                contextlib.nullcontext() if is_last else accelerator.no_sync(self.model),
                explain_out_of_memory(batch, recipe, self.state.step + 1),
            ):
                used = config or recipe.loss.config
                weight = router_weight(recipe, self.batch_loss.router_coef, counts, size, accelerator.num_processes)
                out = self.batch_loss(self.model, batch, used, self.state.reward_shift, weight)
                accelerator.backward(out.loss if config is not None or weight else out.loss * 0)
            if counts is not None:
                out = with_logged_average(out, used, recipe.loss, counts)
                totals.add(out, ntp_parts=counts.ntp_parts(recipe.loss.ntp_average), tokens=batch.tokens)
                losses.append((batch.names, out.loss.detach()))
        return totals, losses

    def _skip_empty_step(self, rates: Mapping[str, float]) -> bool:
        """Counts and logs a step whose pairs were all skipped. Returns whether a signal ends the run now."""
        self._count_step()
        self.state.n_idle_steps += 1
        self.output.console.say(f"step {self.state.step}: all of its pairs were skipped, so the model is unchanged")
        self._report({"pairs": 0.0, **rates})
        return self._end_step()

    def _count_step(self) -> None:
        """Increments the step number. Updates the reference model every ``reference.sync_every`` steps."""
        self.state.step += 1
        every = self.recipe.reference.sync_every
        if every and self.reference is not None and self.state.step % every == 0:
            self.reference.sync(self.model, self.recipe.reference.sync_mix)

    def _report(self, line: Mapping[str, float]) -> None:
        """Shows the step on the console, calls ``on_step``, and writes ``line`` to the log if a log line is due."""
        step = self.state.step
        epoch = step / self.data.sampler.steps_per_epoch
        line = {"step": step, "epoch": epoch, **line, "skipped_steps": self.state.n_skipped_steps}
        if self.accelerator.is_main_process:
            self.output.console.step(step, line)
            if self.on_step is not None:
                self.stop.is_over = self.on_step(step, line) is True
        if step % self.recipe.output.log_every == 0 or step == self.data.total_steps or self.stop.is_over:
            self.output.log_step(line)

    def _end_step(self) -> bool:
        """Runs due evaluations, and writes a checkpoint if one is due. Returns whether a signal ends the run."""
        if self.stop.agree():
            return True
        if self.stop.is_over or self.state.step == self.data.total_steps:
            return False
        has_read_all = all(subset.pairs >= subset.lines for subset in self.data.mixture.subsets)
        if self.state.step == self.data.sampler.steps_per_epoch and has_read_all:  # later epochs skip the same pairs
            self.state.check_trained_on_pairs()
        has_evaluated = self._evaluate_if_due() is not None
        self.stop.is_over = self.state.has_stalled()
        self._save_if_due(is_end=has_evaluated and self.state.is_best())
        return has_evaluated and self.stop.agree()  # a signal may arrive during a long evaluation

    def _evaluate_if_due(self, *, is_end: bool = False) -> dict[str, float] | None:
        """Runs the evaluations that are due. Returns their log line, or None if no evaluation is due."""
        try:
            return evaluate_if_due(self.state, self.output, self.data, self.evaluate, self.answers, is_end=is_end)
        except Exception as error:
            if fails_on_all_ranks(self.accelerator, error):
                self._save_if_due(is_end=True)
            raise

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics (loss, rewards, ...) over all evaluation pairs. All ranks must call this method."""
        metrics, counts = evaluate(self.model, self.data, self.batch_loss, self.state.reward_shift)
        if counts.state_dict() != self.eval_pair_counts.state_dict():
            self.output.report_evaluation_pairs(counts)
        self.eval_pair_counts = counts
        return metrics

    def _save_if_due(self, *, is_end: bool = False) -> None:
        every = self.recipe.output.save_every
        if self.state.step and (is_end or (every and self.state.step % every == 0)):
            self.output.save_checkpoint(self.model, self.optimizer, self._moving_reference())

    def _interrupted(self, position: str) -> int:
        """Prints that a signal ended the run, closes the run and returns the exit status.

        ``position`` is the end of the printed sentence, such as "after step 3 of 9".
        """
        self.output.console.say(f"{self.stop.name()}: ended {position}")
        return self._close() or self.stop.status()

    def _close(self) -> int:
        """Ends the trackers and the process group. Returns 0, the exit status of a finished run."""
        # Release DDP before the process group. If DDP owned the group last, DDP would wait for gloo's threads, which
        # wait for the interpreter to release the last gathered tensors.
        self.model = self.accelerator.unwrap_model(self.model)
        self.accelerator.end_training()
        return 0


def _handle_nonfinite(
    accelerator: Any,
    state: RunState,
    output: RunOutput,
    losses: list[tuple[tuple[str, ...], Tensor]],
    grad_norm: float,
) -> None:
    """Skips a step with a non-finite loss or gradient, or raises ``FloatingPointError``.

    The step is skipped if ``output.on_nonfinite`` is "skip" and DeepSpeed has not yet updated the weights. ``losses``
    has (names of the pairs, loss) for each micro-batch.
    """
    text = f"step {state.step + 1}: not finite: the {nonfinite_cause(accelerator, losses, grad_norm)}"
    is_done = is_deepspeed(accelerator) and not accelerator.optimizer_step_was_skipped
    if is_done or output.recipe.output.on_nonfinite != "skip":
        advice = "DeepSpeed cannot leave it out" if is_done else "output.on_nonfinite=skip leaves such steps out"
        good = output.checkpoints.latest() or "none"
        raise FloatingPointError(f"{text}. The last good checkpoint is {good}; {advice}")
    if accelerator.scaler is not None:  # it has unscaled the gradients, and refuses to do that again
        accelerator.scaler.update()
    state.n_skipped_steps += 1
    output.console.say(f"{text}; the step is skipped, {state.n_skipped_steps} so far")
