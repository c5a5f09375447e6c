"""Loads a checkpoint in which the weights have other names than in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def renamed_weights_loaded(trainer: Any, model: nn.Module, checkpoint: str) -> Iterator[None]:
    """Loads a checkpoint even if its weights have other names than the weights of the model.

    The ``with`` block calls ``_load_from_checkpoint`` or ``_load_best_model`` of Trainer. For some models, such as
    LLaVA and InternVL, ``save_pretrained`` renames the weights. Trainer then finds none of the weights, warns, and
    leaves the model unchanged. This context suppresses the warning, and loads the checkpoint with ``from_pretrained``,
    which knows the names. Loading needs memory for a second model on the CPU.

    Args:
        trainer: Trainer that loads the checkpoint.
        model: Model of the trainer, without wrappers.
        checkpoint: Folder of the checkpoint.

    Raises:
        ValueError: If the checkpoint has weights of unknown names, and ``from_pretrained`` cannot match all weights.
    """
    unknown: list[str] = []
    warn = trainer._issue_warnings_after_load

    def note(result: Any) -> None:
        unknown.extend(result.unexpected_keys)
        if not unknown:
            warn(result)

    outer = vars(trainer).get("_issue_warnings_after_load")  # set if another patch calls this function, too
    trainer._issue_warnings_after_load = note
    try:
        yield
    finally:
        if outer is None:
            del trainer._issue_warnings_after_load
        else:
            trainer._issue_warnings_after_load = outer
    if unknown:
        _load_renamed(model, checkpoint, unknown)


def _load_renamed(model: nn.Module, checkpoint: str, unknown: list[str]) -> None:
    """Loads the weights with ``from_pretrained``. ``unknown`` are names in the checkpoint that the model lacks."""
    wrong = unknown
    if isinstance(model, PreTrainedModel):
        dtype = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        loaded, report = type(model).from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        wrong = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise ValueError(
            f"the checkpoint must have the weights of the model, got {checkpoint} with {len(wrong):,} weights "
            f"of other names, such as {wrong[0]}"
        )
    model.load_state_dict(loaded.state_dict())
