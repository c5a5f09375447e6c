"""The output of a run: console, log, trackers, checkpoints, final model and model card."""

import contextlib
import datetime
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpo_ext.files import FileLock, LockedError, atomic_write, check_outputs
from mpo_ext.train import model_card
from mpo_ext.train.checkpoint import Checkpoints
from mpo_ext.train.dataset import RunData
from mpo_ext.train.export import export_model, is_exported, mark_exported, with_chat_settings
from mpo_ext.train.hub import HubUpload
from mpo_ext.train.inputs import InputChanges, collect_inputs, compare_inputs, stored_date
from mpo_ext.train.metrics import Log
from mpo_ext.train.pair_counts import PairCounts, in_epochs
from mpo_ext.train.progress import Console
from mpo_ext.train.proof import Proof, prove
from mpo_ext.train.ranks import gather
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.reference_file import reference_date
from mpo_ext.train.resume import RunState, changed_settings
from mpo_ext.train.unknown_tokens import find_unknown

_LOCK = "run.lock"
_READ_PAIRS = 100  # number of pairs in which unknown tokens are searched
_SHOWN_EVALUATION = ("loss", "accuracy", "unreadable", "cut_off", "refused")  # ends of the names of printed metrics


class RunOutput:
    """Writes the output of a run. All ranks must call each method.

    If ``save`` is False, no checkpoint, final model or model card is written. ``final`` is the folder of the final
    model.
    """

    def __init__(self, recipe: Recipe, accelerator: Any, state: RunState, *, save: bool) -> None:
        self.recipe, self.accelerator, self.state, self.save = recipe, accelerator, state, save
        self.folder = Path(recipe.output.dir)
        self.final = self.folder / "final"
        self.is_main = accelerator.is_main_process
        self._check_outputs()  # on all ranks, so that all of them raise
        self.hub = HubUpload(recipe.output.push_to_hub, accelerator) if save and recipe.output.push_to_hub else None
        if self.hub is not None:
            self.hub.prepare()
        accelerator.wait_for_everyone()
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        self.inputs: dict[str, Any] | None = None
        self.input_changes = InputChanges()
        self.changed: dict[str, str] = {}
        self.console = Console(0, 0, sys.stderr if self.is_main else None)
        self.log = Log(self.folder / "log.jsonl")
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep_last=recipe.output.keep_last,
            keep_best=recipe.output.keep_best,
            higher_is_better=recipe.output.higher_is_better,
        )

    def template_date(self, checkpoint: Path | None) -> datetime.date:
        """Returns the date that chat templates write as today's date. All ranks get the same date.

        The result is the date in ``checkpoint``, so a resumed run has the same prompts. Without this date, the result
        is the date in the file of precomputed reference log-probs. Without both dates, the result is today's date.
        """
        inputs = None if checkpoint is None else self.checkpoints.state(self.accelerator, checkpoint).get("inputs")
        date = stored_date(inputs) or reference_date(self.recipe) or datetime.date.today()
        return gather(self.accelerator, date)[0]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the output folder for this run.

        Raises:
            LockedError: If another run writes into the folder.
        """
        error: str | None = None
        with contextlib.ExitStack() as stack:
            if self.is_main:
                try:
                    stack.enter_context(FileLock(self.folder / _LOCK, str(self.folder)))
                except LockedError as locked:
                    error = f"output.dir: {locked}"
            for text in gather(self.accelerator, error):
                if text is not None:
                    raise LockedError(text)
            yield

    def _check_outputs(self) -> None:
        """Raises ``ValueError`` if the run would overwrite one of its inputs.

        Raises ``FileExistsError`` if output files exist that are not from an earlier run.
        """
        recipe, names = (
            self.recipe,
            ("log.jsonl", "first_pairs.txt", "final", "checkpoints", "answers", "exported.json"),
        )
        sources = [*recipe.data.train, *recipe.data.eval]
        inputs = [*(source.path for source in sources), recipe.model.path, recipe.reference.path]
        if recipe.output.eval_generate is not None:
            inputs.append(recipe.output.eval_generate.path)
        checkpoints = self.folder.glob("checkpoints/step-*/manifest.json")  # runs of earlier versions have no lock
        check_outputs(
            "output.dir",
            [self.folder / name for name in names],
            inputs=[path for path in inputs if path is not None],
            is_ours=(self.folder / _LOCK).exists() or any(checkpoints),
        )

    def check_first_pairs(self, data: RunData) -> None:
        """Checks the encoding of the first pairs, and writes the decoded pairs to ``first_pairs.txt``.

        Also prints the first pair, and a warning if the first 100 pairs contain unknown tokens. Raises ``LinesError``
        if a check fails.
        """
        proof: Proof | None = None
        if self.is_main:
            proof = prove(data.encoder, data.first_pairs())
            self._write_first_pairs(proof)
            unknown = find_unknown(data.encoder.chat, itertools.islice(data.first_pairs(), _READ_PAIRS))
            if unknown is not None:
                self.console.say(f"WARNING: {unknown}")
        for shared in gather(self.accelerator, proof):
            if shared is not None:
                shared.check()

    def _write_first_pairs(self, proof: Proof) -> None:
        """Prints the first pair, and writes all pairs of ``proof`` to ``first_pairs.txt``."""
        path = self.folder / "first_pairs.txt"
        for line in proof.console_lines():
            self.console.say(line)
        with atomic_write(path) as file:
            file.write(("\n".join(proof.lines()) + "\n").encode())
        self.console.say(f"the first pairs, decoded, are in {path}")

    def start_log(self) -> None:
        """Empties the log at the start of a new run.

        The log may hold lines of an earlier run that ended before its first checkpoint.
        """
        if self.is_main:
            if self.log.position():
                self.console.say(
                    f"no checkpoint in {self.checkpoints.folder} yet: starts from the beginning, with a new log"
                )
            self.log.rewind(0)

    def check_inputs(self, data: RunData, checkpoint: Path | None, fixed_weights: Mapping[str, str]) -> None:
        """Compares the recipe and the inputs of this run with the values in a checkpoint.

        An input is, for example, the training data. Also collects the inputs of this run, which its checkpoints will
        store.

        Args:
            data: Data of the run.
            checkpoint: Folder of the checkpoint. None: the run is new, and nothing is compared.
            fixed_weights: As in ``collect_inputs``.

        Raises:
            LinesError: If a setting that must stay the same in a run has changed. Also raised if an input that affects
                training has changed and ``output.resume_changed_data`` is False.
        """
        if checkpoint is None:
            self.inputs = collect_inputs(data, None, fixed_weights) if self.save else None
            return
        state = self.checkpoints.state(self.accelerator, checkpoint)
        self.changed = changed_settings(state, self.recipe, checkpoint)
        stored = state.get("inputs")
        self.inputs = collect_inputs(data, stored, fixed_weights)
        if stored is None:
            self.console.say(
                f"the data cannot be compared with those of {checkpoint}, which an earlier version of mpo_ext wrote"
            )
            return
        # All ranks must agree, although their machines may round pixels differently.
        self.input_changes = gather(self.accelerator, compare_inputs(stored, self.inputs, self.changed))[0]
        self.input_changes.check(checkpoint, accept=self.recipe.output.resume_changed_data)

    def resume(self, path: Path, model: nn.Module, optimizer: Any, reference: nn.Module | None) -> bool:
        """Restores the run from a checkpoint: models, optimizer, run state and log.

        Call ``check_inputs`` with the checkpoint first.

        Args:
            path: Folder of the checkpoint.
            model: Policy.
            optimizer: Optimizer of the policy.
            reference: Reference model if training updates it; None otherwise.

        Returns:
            Whether anything has changed since the checkpoint: a setting, an input that affects training, a file of
            ``data.eval``, or the questions of ``output.eval_generate``.
        """
        changes = self.input_changes
        state = self.checkpoints.load(self.accelerator, path, model, optimizer, reference=reference)
        for text in self.changed.values():
            self.console.say(f"since the checkpoint: {text}")
        for text in changes.lines():
            self.console.say(text)
        has_new_questions = self.state.questions is not None and state.get("questions") not in (
            None,
            self.state.questions,
        )
        if has_new_questions:
            self.console.say("the questions of output.eval_generate have changed: the best score counts from here")
        has_new_evaluation = has_new_questions or changes.evaluation or any(map(_changes_evaluation, self.changed))
        self.state.load_state_dict(state, keep_evaluation=not has_new_evaluation)
        is_ours = self.checkpoints.contains(path)
        if self.is_main:
            if has_new_evaluation or not is_ours:
                self.state.evaluation_number = self.checkpoints.next_number()
            self.log.rewind(state["log_position"] if is_ours else 0)  # the position is that in the log of its run
        self.accelerator.wait_for_everyone()
        return bool(self.changed or changes.refused or has_new_evaluation)

    def save_checkpoint(self, model: nn.Module, optimizer: Any, reference: nn.Module | None) -> None:
        """Writes a checkpoint of the policy, the optimizer and the run state. Does nothing if ``save`` is False.

        If training updates the reference model, ``reference`` is this model, and the checkpoint includes it.
        Otherwise, ``reference`` is None.
        """
        if not self.save:
            return
        state = self.state.state_dict(self.log.position() if self.is_main else 0, self.inputs)
        self.checkpoints.save(
            self.accelerator, self.state.step, model, optimizer, state, score=self.state.score(),
            evaluation=self.state.evaluation_number, reference=reference,
        )  # fmt: skip

    def log_step(self, line: Mapping[str, float]) -> None:
        """Writes the metrics of a step to the log and the trackers."""
        if self.is_main:
            self.log.append(line)
        self._track("train", line)

    def report_evaluation(self, line: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation to the console, the log and the trackers."""
        if self.is_main:
            self.log.append(line)
            self.console.say(
                f"evaluation after step {self.state.step}: "
                + ", ".join(f"{name[5:]} {line[name]:.4f}" for name in line if name.endswith(_SHOWN_EVALUATION))
            )
            if self.state.has_stalled():
                recipe, best = self.recipe.output, self.state.best_score
                known = (
                    f"no {recipe.best_metric}" if best is None else f"no better {recipe.best_metric} than {best:.4f}"
                )
                self.console.say(
                    f"early stopping: {known} in {recipe.early_stopping} evaluations, so the run ends after step "
                    f"{self.state.step}"
                )
        self._track("eval", {name.removeprefix("eval_"): value for name, value in line.items()})

    def report_evaluation_pairs(self, counts: PairCounts) -> None:
        """Prints the counts of the evaluation pairs. ``counts`` covers all ranks."""
        for text in counts.lines():
            self.console.say(f"data.eval: {text}")
        if counts.n_skipped > counts.kept:
            few = "there is no score" if counts.kept == 0 else "the scores are those of the few others"
            self.console.say(
                f"WARNING: MOST EVALUATION PAIRS WERE SKIPPED, {counts.n_skipped:,} of "
                f"{counts.n_skipped + counts.kept:,}: {few}"
            )

    def _track(self, prefix: str, line: Mapping[str, float]) -> None:
        if self.recipe.output.trackers:
            values = {f"{prefix}/{name}": value for name, value in line.items()}
            self.accelerator.log(values, step=self.state.step)

    def is_finished(self, checkpoint: Path) -> bool:
        """Returns whether the model of the checkpoint has already been exported as the final model.

        If the export lacks its model card, this method writes the card.
        """
        if not is_exported(self.accelerator, self.final, checkpoint):
            return False
        if not all(gather(self.accelerator, (self.final / "README.md").exists())):  # killed after the export
            self._write_card()
        return True

    def finish(self, model: nn.Module, processor: Any) -> None:
        """Exports the final model, prints the counts of skipped pairs, writes the model card and uploads the model.

        Does nothing if ``save`` is False. The upload needs ``output.push_to_hub``.
        """
        if not self.save:
            return
        processor = with_chat_settings(processor, self.recipe.model)
        export_model(self.accelerator, model, processor, self.final, merged=self.recipe.output.save_merged)
        mark_exported(self.accelerator, self.final, self.checkpoints.latest() if self.is_main else None)
        counts = self.state.pair_counts_of_all_ranks()
        epochs = _epochs(self.log.read())
        for text in counts.lines(epochs):
            self.console.say(text)
        if counts.n_skipped > counts.kept:
            self.console.say(
                f"WARNING: MOST PAIRS WERE SKIPPED, {counts.n_skipped:,} of {counts.n_skipped + counts.kept:,}"
                f"{in_epochs(epochs)}: the model has learned from the few others"
            )
        self._write_card()
        self.console.say(f"the model is in {self.final}, the log in {self.log.path}")
        self.push()

    def push(self) -> None:
        """Uploads the final model to the hub if ``output.push_to_hub`` is set."""
        if self.hub is not None:
            self.console.say(f"the model is on the hub: {self.hub.push(self.final)}")

    def _write_card(self) -> None:
        """Writes the model card with the last training metrics.

        If the current step has an evaluation, the card also has the metrics of the evaluation.
        """
        counts = self.state.pair_counts_of_all_ranks()
        if not self.is_main:
            return
        lines = self.log.read()
        last: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
        evaluation = self.state.current_evaluation() or {}
        summary = {**last, **evaluation, f"skipped{in_epochs(_epochs(lines))}": dict(counts.skipped)}
        model_card.write_card(self.final, recipe=self.recipe, curves=lines, summary=summary)


def _epochs(lines: Sequence[Mapping[str, Any]]) -> float:
    """Returns the number of trained epochs from the last log line with the key "epoch"; 1 without such a line."""
    return next((line["epoch"] for line in reversed(lines) if "epoch" in line), 1)


def _changes_evaluation(setting: str) -> bool:
    """Returns whether a change of ``setting`` makes new evaluation scores incomparable with earlier scores."""
    return setting.startswith(("data.eval", "output.eval_generate", "output.best_metric"))
