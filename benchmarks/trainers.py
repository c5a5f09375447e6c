"""Runs mpo_ext's trainer or TRL's DPOTrainer step by step, and measures each step."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.measure import reset_peak, resident_bytes
from benchmarks.step_inputs import LEARNING_RATE, Sizes, build, make_recipe, order_of
from mpo_ext.data.records import Pair
from mpo_ext.train.mixture import Mixture


@dataclasses.dataclass
class MeasuredStep:
    """Measurements of a training step.

    Attributes:
        loss: Mean loss of the micro-batches.
        seconds: Elapsed time.
        cpu_seconds: CPU time of all threads.
        peak: Peak resident bytes in the step, minus the resident bytes before the model was built.
        parts: Seconds by part of the step; empty if the parts are not measured.
    """

    loss: float
    seconds: float
    cpu_seconds: float
    peak: int
    parts: dict[str, float]


class Gate:
    """Measures each step of a trainer. Between steps, makes the trainer wait for its turn.

    The trainer calls the gate with the loss after each step.

    Args:
        connection: Connection to the process that assigns the turns. The gate sends each measured step to this
            process. None: the trainer never waits, and ``steps`` receives the measured steps.
        parts: Measures the parts of each step. None: only whole steps are measured.

    Attributes:
        steps: Measured steps; empty if ``connection`` is given.
    """

    def __init__(self, connection: Any = None, parts: Parts | None = None) -> None:
        self.connection, self.parts = connection, parts
        self.steps: list[MeasuredStep] = []
        self.before = resident_bytes("VmRSS")
        self._start()

    def _start(self) -> None:
        reset_peak()
        if self.parts is not None:
            self.parts.seconds.clear()
        self.begin_s, self.begin_cpu_s = time.perf_counter(), time.process_time()

    def __call__(self, loss: float) -> None:
        """Reports the measurements of a finished step, and waits for the next turn."""
        elapsed, cpu = time.perf_counter() - self.begin_s, time.process_time() - self.begin_cpu_s
        parts = {} if self.parts is None else dict(self.parts.seconds)
        step = MeasuredStep(loss, elapsed, cpu, resident_bytes("VmHWM") - self.before, parts)
        if self.connection is None:
            self.steps.append(step)
        else:
            self.connection.send(step)
            self.connection.recv()
        self._start()


class Parts:
    """Measures the seconds of each part of a training step, with hooks on the model and the accelerator."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._marks: dict[str, float] = {}

    def wrap(self, call: Callable[..., Any], name: str, *, of_policy: bool = False) -> Callable[..., Any]:
        """Returns a function that calls ``call``, and adds the seconds of each call to the part ``name``.

        With ``of_policy``, calls without gradients are not counted, because they belong to the reference model.
        """

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if of_policy and not torch.is_grad_enabled():
                return call(*args, **kwargs)
            begin_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin_s

        return timed

    def watch(self, model: Any, accelerator: Any) -> None:
        """Installs hooks that measure the parts of a training step.

        The parts are the model's forward and backward passes, the gradient norm and the optimizer step.
        """
        from torch.optim import optimizer

        tower, decoder = model.model.vision_tower, model.model.language_model
        for module, name in ((tower, "vision"), (decoder, "decoder")):
            module.forward = self.wrap(module.forward, f"{name}, forward", of_policy=True)
            module.register_forward_hook(functools.partial(self._mark_backward, name))
        backward = accelerator.backward

        def marked(*args: Any, **kwargs: Any) -> None:
            self._marks = {"begin": time.perf_counter()}
            backward(*args, **kwargs)
            end_s = time.perf_counter()
            at_decoder = self._marks.get("decoder", end_s)
            at_vision = self._marks.get("vision", end_s)
            self.seconds["head, backward"] += at_decoder - self._marks["begin"]
            self.seconds["decoder, backward"] += at_vision - at_decoder
            self.seconds["vision, backward"] += end_s - at_vision

        accelerator.backward = marked
        accelerator.clip_grad_norm_ = self.wrap(accelerator.clip_grad_norm_, "gradient norm")
        begun: list[float] = []
        optimizer.register_optimizer_step_pre_hook(lambda *_: begun.append(time.perf_counter()))
        optimizer.register_optimizer_step_post_hook(
            lambda *_: self.seconds.__setitem__("optimizer", time.perf_counter() - begun[-1])
        )

    def _mark_backward(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._marks.__setitem__(name, time.perf_counter()))


class _DoneError(Exception):
    """Raised to end a run after its last step, before the trainer writes the model."""


def run_ours(gate: Gate, pairs: Path, sizes: Sizes, steps: int, settings: Mapping[str, Any]) -> None:
    """Trains ``steps`` steps with mpo_ext's trainer, and calls ``gate`` with the loss of each step.

    ``pairs`` is the pair file. ``settings`` override the recipe.
    """
    from mpo_ext.train import batch_loss, dataset, loop
    from mpo_ext.train import reference_model as references

    def on_step(step: int, line: Mapping[str, float]) -> None:
        gate(line["loss"])
        if step == steps:
            raise _DoneError

    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        recipe = make_recipe(Path(folder), pairs, sizes, steps, settings)
        model, processor = build(sizes)
        trainer = loop.Trainer(recipe, model=model, processor=processor, on_step=on_step)
        with contextlib.ExitStack() as stack:
            if gate.parts is not None:
                wrap = gate.parts.wrap
                gate.parts.watch(model, trainer.accelerator)
                for owner, name, part in (
                    (batch_loss, "linear_mpo_loss", "head, forward"),
                    (batch_loss, "mpo_loss", "head, forward"),
                    (references.CopyReference, "logp", "reference"),
                    (dataset.StepDataset, "__getitem__", "data"),
                ):
                    stack.callback(setattr, owner, name, getattr(owner, name))
                    setattr(owner, name, wrap(getattr(owner, name), part))
            with contextlib.suppress(_DoneError):
                trainer.run()


def _trl_rows(recipe: Any, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yields the pairs in TRL's conversational format, in the order in which mpo_ext's trainer reads them."""
    mixture = Mixture(recipe.data.train, seed=recipe.optim.seed)
    for index in order_of(recipe, sizes):
        pair = mixture[index]
        assert isinstance(pair, Pair)
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": pair.question.replace("<image>", "")}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        yield {**row, "images": list(pair.images)} if sizes.images else row


def _trl_options(recipe: Any, sizes: Sizes, steps: int, folder: str) -> dict[str, Any]:
    """Returns the options of ``DPOConfig`` that make TRL compute the same losses and updates as ``recipe``."""
    return {
        "output_dir": folder,
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [recipe.loss.dpo_weight, recipe.loss.bco_weight, recipe.loss.ntp_weight],
        "beta": recipe.loss.beta,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": recipe.optim.max_grad_norm,
        "max_steps": steps,
        "per_device_train_batch_size": sizes.micro_batch,
        "gradient_accumulation_steps": sizes.batch // sizes.micro_batch,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_trl(gate: Gate, pairs: Path, sizes: Sizes, steps: int, settings: Mapping[str, Any]) -> None:
    """Trains with TRL's DPOTrainer for ``steps`` steps, and calls ``gate`` after each step.

    The loss, the learning rate and the order of the pairs are those of mpo_ext's recipe. TRL runs in float32, without
    gradient checkpointing, without a length limit and without a log. All other options have TRL's defaults. ``pairs``
    is the pair file. ``settings`` override the options of ``DPOConfig``.
    """
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from datasets import List as ListFeature
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class RecordingTrainer(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class GateCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = statistics.fmean(losses)
            losses.clear()
            gate(loss)

    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        recipe = make_recipe(Path(folder), pairs, sizes, steps, {})
        dataset = Dataset.from_list(list(_trl_rows(recipe, sizes)))
        if sizes.images:
            dataset = dataset.cast_column("images", ListFeature(ImageFeature()))
        options = {**_trl_options(recipe, sizes, steps, folder), **settings}
        model, processor = build(sizes)
        trainer = RecordingTrainer(
            model=model,
            ref_model=None if options.get("precompute_ref_log_probs") else copy.deepcopy(model),
            args=DPOConfig(**options),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[GateCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        with contextlib.ExitStack() as stack:
            if gate.parts is not None:
                _watch_trl(gate.parts, model, trainer, stack)
            trainer.train()


def _watch_trl(parts: Parts, model: Any, trainer: Any, stack: contextlib.ExitStack) -> None:
    """Makes ``parts`` measure the parts of TRL's training steps.

    Replaces a function of TRL until ``stack`` is closed.
    """
    from trl.trainer import utils

    parts.watch(model, trainer.accelerator)
    name = "_ChunkedLogProbFunction"
    function = getattr(utils, name)
    stack.callback(setattr, utils, name, function)
    setattr(utils, name, SimpleNamespace(apply=parts.wrap(function.apply, "head, forward", of_policy=True)))
    if trainer.ref_model is not None:
        trainer.ref_model.forward = parts.wrap(trainer.ref_model.forward, "reference")
    trainer.data_collator = parts.wrap(trainer.data_collator, "data")
