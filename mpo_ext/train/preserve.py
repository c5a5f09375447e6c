"""``preserved`` runs a block of code, such as an evaluation, and restores the state of training afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mpo_ext.train.checkpoint_state import random_state, restore_random_state


@contextlib.contextmanager
def preserved(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Restores the modules of a model and the random states of this rank at the end of the ``with`` block.

    A module gets back its buffers and attributes, such as the training mode. Tensors are not copied, so the block must
    not change them in place.
    """
    saved = [(vars(module), dict(vars(module)), dict(vars(module)["_buffers"])) for module in model.modules()]
    random = random_state(accelerator)
    try:
        yield
    finally:
        for attributes, values, buffers in saved:
            attributes.clear()
            attributes.update(values)
            attributes["_buffers"].clear()
            attributes["_buffers"].update(buffers)
        restore_random_state(accelerator, random)
