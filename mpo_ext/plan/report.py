"""The tables and advice that ``mpo-ext plan`` and ``mpo-ext train --dry-run`` print."""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mpo_ext.plan.machines import Machine
from mpo_ext.plan.memory import Memory
from mpo_ext.plan.roofline import Cost
from mpo_ext.plan.steps import ModelShape, StepShape, step_cost
from mpo_ext.report import is_numeric_column, text_table
from mpo_ext.train.batch import RowLayout
from mpo_ext.train.mixture import MixtureSubset
from mpo_ext.train.optim_recipe import OptimRecipe
from mpo_ext.train.recipe import Recipe


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table of predicted times: the planned run, a run with one changed setting, or TRL's trainer.

    Attributes:
        name: The changed setting, such as "loss.from_logits=true"; otherwise "this recipe" or "TRL's DPOTrainer".
        trainer: Key of ``steps.STEPS``.
        changes: Fields of ``Plan.cost_step`` that differ from the planned run, as a dict from name to value.
        bytes: Estimated memory of a rank without sharding. None for TRL's trainer, whose memory
            ``mpo_ext.plan.steps`` predicts.
    """

    name: str
    trainer: str
    changes: dict[str, Any]
    bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a training run. ``str(plan)`` returns all tables as text.

    Attributes:
        model_class: Name of the model's class.
        parameters: Number of parameters, including adapters. Tied parameters count once.
        active: Number of parameters that process a token. Inactive experts do not count.
        trainable: Number of parameters that the run trains.
        steps_per_epoch: Number of optimizer steps per epoch, before pairs are skipped.
        warmup_steps: Number of steps in which the learning rate rises.
        pairs_per_rank: Maximum number of pairs of a rank per step.
        micro_batches: Maximum number of micro-batches of a rank per step.
        world: Number of processes (ranks).
        layout: "shared": one row of the batch holds a prompt and both responses. "separate": each response has a row
            with its prompt. The layout is predicted from the recipe and from the model's config and code. The trainer
            verifies "shared" on the first pairs.
        tokens: Assumed number of tokens of a response with its prompt (see docs/train.md).
        positions: Number of decoder positions of a micro-batch whose pairs all have ``tokens`` tokens.
        memory: Parts of a rank's memory.
        other_activations: Bytes of the activations if the setting of gradient checkpointing were reversed.
        eager_loss: Peak bytes of a loss in plain torch on all logits, with a separate row for each response.
        cost_model: Sizes and dtypes of the model, for ``mpo_ext.plan.steps``.
        cost_step: Shape of a rank's step with pairs of the assumed length, for ``mpo_ext.plan.steps``.
        variants: The planned run, then runs with one changed setting each, then TRL's trainer.
        notes: Remarks that are printed after the tables.
    """

    recipe: Recipe
    model_class: str
    parameters: int
    active: int
    trainable: int
    vocab_size: int
    hidden_size: int
    layers: int
    subsets: tuple[MixtureSubset, ...]
    eval_subsets: tuple[MixtureSubset, ...]
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    world: int
    pairs_per_rank: int
    micro_batches: int
    layout: RowLayout
    tokens: int
    positions: int
    memory: tuple[Memory, ...]
    other_activations: int
    eager_loss: int
    cost_model: ModelShape
    cost_step: StepShape
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]

    @property
    def pairs_per_epoch(self) -> int:
        return sum(subset.pairs for subset in self.subsets)

    @property
    def total_bytes(self) -> int:
        """Estimated bytes of a rank's memory without sharding."""
        return sum(part.bytes for part in self.memory)

    @property
    def total_sharded(self) -> int:
        """Estimated memory of a rank in bytes, if parameters, gradients and optimizer state are sharded."""
        return sum(part.sharded for part in self.memory)

    def predict(self, trainer: str, machine: Machine, **changes: Any) -> Cost:
        """Returns the predicted time and memory of a rank's training step on a machine.

        ``trainer`` is a key of ``steps.STEPS``. ``changes`` replace fields of ``cost_step``.
        """
        return step_cost(trainer, self.cost_model, dataclasses.replace(self.cost_step, **changes), machine)

    def times(self, machine: Machine) -> list[tuple[str, ...]]:
        """Returns the rows of the table of predicted times, one for each entry of ``variants``."""
        costs = [self.predict(variant.trainer, machine, **variant.changes) for variant in self.variants]
        first = costs[0]
        rows: list[tuple[str, ...]] = []
        for variant, cost in zip(self.variants, costs, strict=True):
            memory = variant.bytes
            if memory is None:  # another trainer, whose additional memory the roofline predicts
                memory = max(0, self.total_bytes + round(cost.memory - first.memory))
            ratio = f"{cost.seconds / first.seconds:.2f}"
            rows.append((variant.name, _format_seconds(cost.seconds), ratio, format_bytes(memory)))
        return rows

    def advice(self, machine: Machine) -> Iterator[str]:
        """Yields sentences that recommend settings for the machine, based on predicted times and memory."""
        if self.cost_model.head_learns:
            for variant in self.variants:
                if variant.name.startswith("loss.recompute") and variant.bytes is not None:
                    yield (
                        "loss.recompute=false saves one of four products with the head and takes "
                        f"{format_bytes(abs(variant.bytes - self.total_bytes))} more: use it if that memory is free"
                    )
        else:
            yield "the head is frozen: the loss projects once, and loss.recompute has no effect"
        text = "loss.from_logits=true is for models whose head is not a plain linear layer"
        from_logits = next((each for each in self.variants if each.name == "loss.from_logits=true"), None)
        if from_logits is not None and from_logits.bytes is not None:
            times = [self.predict(each.trainer, machine).seconds for each in (self.variants[0], from_logits)]
            text += (
                f"; it takes {times[1] / times[0]:.2f} of the time of this recipe and "
                f"{format_bytes(abs(from_logits.bytes - self.total_bytes))} "
                f"{'more' if from_logits.bytes >= self.total_bytes else 'less'} memory"
            )
        yield text
        if self.cost_step.has_reference:
            trainer = self.variants[0].trainer
            whole = self.predict(trainer, machine, precomputed=False).seconds
            saved = whole - self.predict(trainer, machine, precomputed=True).seconds
            epochs = self.recipe.optim.epochs
            yield (
                f"reference.kind=precomputed saves {saved / whole:.0%} of a step and the reference's memory, for one "
                f"forward per pair before the first step: in time it pays from the second epoch on (here: {epochs})"
            )

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Yields the title, the header and the rows of each table."""
        recipe, optim = self.recipe, self.recipe.optim
        active = [("active per token", f"{self.active:,}")] if self.active < self.parameters else []
        other = "without" if recipe.model.gradient_checkpointing else "with"
        yield (
            "Model",
            ("", ""),
            [
                ("path", recipe.model.path),
                ("class", self.model_class),
                ("parameters", f"{self.parameters:,}"),
                *active,
                ("trainable", f"{self.trainable:,} ({self.trainable / self.parameters:.2%})"),
                ("vocabulary x hidden size", f"{self.vocab_size:,} x {self.hidden_size:,}"),
                ("decoder layers", f"{self.layers:,}"),
                ("reference", _describe_reference(recipe)),
            ],
        )
        yield "Data", ("subset", "lines", "repeat_time", "pairs"), list(_data_rows(self.subsets, self.eval_subsets))
        yield (
            "Schedule",
            ("", ""),
            [
                ("steps", f"{self.steps:,} ({self.steps_per_epoch:,} per epoch, before pairs are skipped)"),
                ("warmup steps", f"{self.warmup_steps:,}"),
                ("optimizer", optim.name),
                ("learning rate", _describe_schedule(optim, self.steps)),
                *((f"  {part}", _describe_group(optim, part)) for part in optim.groups),
                ("pairs per step", f"{optim.batch_size:,}"),
                ("processes", f"{self.world:,}"),
                ("pairs per step and rank", f"{self.pairs_per_rank:,} in {self.micro_batches:,} micro-batches"),
                ("layout", self.layout),
                ("longest pair", f"{self.tokens:,} tokens, {self.positions:,} positions per micro-batch"),
            ],
        )
        yield "Output", ("", ""), list(_output_rows(recipe))
        rows = [self._memory_row(part) for part in self.memory]
        rows.append(self._memory_row(Memory("total", self.total_bytes, self.total_sharded, "")))
        columns = ("one copy per rank", "sharded") if self.world > 1 else ("estimate",)
        yield "Memory per rank (an estimate)", ("part", *columns, "formula"), rows
        yield (
            "Memory of alternatives (an estimate)",
            ("", ""),
            [
                (f"activations {other} gradient checkpointing", format_bytes(self.other_activations)),
                ("the loss in plain torch, on all logits", format_bytes(self.eager_loss)),
            ],
        )

    def _memory_row(self, part: Memory) -> tuple[str, ...]:
        sharded = (format_bytes(part.sharded),) if self.world > 1 else ()
        return (part.name, format_bytes(part.bytes), *sharded, part.formula)

    def __str__(self) -> str:
        tables = [f"{title}\n{text_table(header, rows)}\n" for title, header, rows in self.tables()]
        return "\n".join([*tables, *(f"note: {note}" for note in self.notes)]).rstrip()


def print_plan(plan: Plan) -> None:
    """Prints a plan: as rich tables on a terminal, otherwise as plain text."""
    if not sys.stdout.isatty():
        print(plan)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in plan.tables():
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(header), pad_edge=False)
        for column, name in enumerate(header):
            table.add_column(name, justify="right" if is_numeric_column(rows, column) else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def print_times(plan: Plan, machine: Machine) -> None:
    """Prints the predicted times on a machine, followed by the advice."""
    article = "an" if machine.name[0] in "AH" else "a"  # an A100, an H200
    print(
        f"\nTime of a step on {article} {machine.name}, PREDICTED ({machine.source}; communication and data left out)"
    )
    memory = "memory" if plan.world == 1 else "memory, one copy per rank"
    print(text_table(("", "step", "of this recipe", memory), plan.times(machine)) + "\n")
    for line in plan.advice(machine):
        print(f"- {line}")


def format_bytes(size: int) -> str:
    """Returns a number of bytes as text in MiB or GiB."""
    gib = size / 2**30
    if gib < 0.1:
        return f"{size / 2**20:,.1f} MiB" if size else "0"
    return f"{gib:,.1f} GiB" if gib >= 10 else f"{gib:.2f} GiB"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _describe_reference(recipe: Recipe) -> str:
    reference = recipe.reference
    if reference.sync_every:
        return (
            f"copy, moved by {reference.sync_mix:g} of the way to the policy every {reference.sync_every:,} steps "
            "(TR-DPO)"
        )
    return recipe.reference_kind or "none: the loss needs none"


def _describe_schedule(optim: OptimRecipe, steps: int) -> str:
    text = f"{optim.learning_rate:g}, then {optim.schedule}"
    if optim.schedule == "wsd":
        text += f": constant, and linear in the last {max(1, math.ceil(optim.decay_ratio * steps)):,} steps"
    return text + (f", down to {optim.min_lr_ratio * optim.learning_rate:g}" if optim.min_lr_ratio else "")


def _describe_group(optim: OptimRecipe, part: str) -> str:
    group = optim.groups[part]
    rate = optim.learning_rate if group.learning_rate is None else group.learning_rate
    decay = optim.weight_decay if group.weight_decay is None else group.weight_decay
    return f"{rate:g}, weight decay {decay:g}"


def _output_rows(recipe: Recipe) -> Iterator[tuple[str, str]]:
    output, generation = recipe.output, recipe.output.eval_generate
    yield "folder", output.dir
    yield "checkpoints", f"every {output.save_every:,} steps" if output.save_every else "at the end"
    if recipe.data.eval:
        yield "evaluation", f"every {output.eval_every:,} steps" if output.eval_every else "at the end"
    if generation is not None:
        every = f"every {generation.every:,} steps" if generation.every else "after each epoch"
        most = "" if generation.max_items is None else f", at most {generation.max_items:,} questions"
        yield "evaluation by generation", f"{generation.path}, {every}{most}"
    if output.keep_best:
        yield "best checkpoint", f"kept, by {output.best_metric}"
    if output.early_stopping:
        yield (
            "early stopping",
            f"after {output.early_stopping:,} evaluations in a row without a better {output.best_metric}",
        )
    if output.trackers:
        yield "trackers", ", ".join(output.trackers)
    if output.push_to_hub is not None:
        hub = output.push_to_hub
        yield "upload to the hub", f"{hub.repo_id} ({'private' if hub.private else 'public'})"


def _data_rows(subsets: Sequence[MixtureSubset], eval_subsets: Sequence[MixtureSubset]) -> Iterator[tuple[str, ...]]:
    for subset in subsets:
        yield subset.label, f"{subset.lines:,}", f"{subset.repeat_time:g}", f"{subset.pairs:,}"
    lines, pairs = sum(subset.lines for subset in subsets), sum(subset.pairs for subset in subsets)
    yield "train, an epoch", f"{lines:,}", "", f"{pairs:,}"
    for subset in eval_subsets:
        yield f"eval: {subset.label}", f"{subset.lines:,}", f"{subset.repeat_time:g}", f"{subset.pairs:,}"
